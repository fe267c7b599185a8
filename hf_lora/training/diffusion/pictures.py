"""Pictures from files: opened, laid on white, brought to one size, every fault named."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from hf_lora.errors import BadDataset, InvalidOption, LoraError, listing, shown
from hf_lora.training.diffusion.cache import pixels_of
from hf_lora.training.diffusion.folders import Captioned, Faults, find_pictures
from hf_lora.training.diffusion.module import DiffusionTrainingModule

SMALLEST = 4  # a picture is enlarged at most so many times
# What Pillow may take a file for; it knows others that run programs (EPS).
_FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "BMP", "GIF", "TIFF", "AVIF")
_LONG = 2  # length over width from which most of a picture may be cropped away


class PictureRows(Sequence[dict[str, Any]]):
    """Rows for `cache_rows`, each with `caption` and `image`; a picture is opened when asked for.

    Args:
        pictures: Files and captions.
        resolution: Pixels a side.
    """

    def __init__(self, pictures: Sequence[Captioned], resolution: int) -> None:
        self.pictures, self.resolution = list(pictures), resolution
        self.digests: list[str] = []
        self.notes: list[str] = []

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, row: Any) -> Any:
        one = self.pictures[row]
        return {"caption": one.caption, "image": open_picture(one.path, self.resolution)}

    def check(self, of: str, check_caption: Callable[[str], Any] | None = None) -> None:
        """Opens every picture once; fills `digests` (SHA-256 of pixels and caption) and `notes`.

        Args:
            of: What the pictures are from, for errors.
            check_caption: Raises BadDataset for a caption that is too long.

        Raises:
            BadDataset: Pictures or captions cannot be used: the first five, and how many.
        """
        faults = Faults()
        sizes = []
        self.digests = []
        for one in self.pictures:
            try:
                if check_caption is not None:
                    check_caption(one.caption)
                image, size = _opened(one.path, self.resolution)
            except BadDataset as error:
                faults.add(error.fact, one.path, error.fix)
                continue
            sizes.append(size)
            state = hashlib.sha256(np.asarray(image).tobytes())
            state.update(one.caption.encode("utf-8", "surrogatepass"))
            self.digests.append(state.hexdigest())
        faults.check(of)
        self.notes = list(_notes(sizes, self.resolution))


def picture_rows(
    paths: str | Sequence[str],
    *,
    resolution: int,
    trigger: str | None = None,
    check_caption: Callable[[str], Any] | None = None,
) -> PictureRows:
    """Reads folders of pictures with captions, or `.jsonl` files that name them.

    A folder has `metadata.jsonl` or `metadata.csv` with `file_name` and `text`, or a text beside
    each picture: `cat.txt` or `cat.caption` beside `cat.png`. Rows of a `.jsonl` file have `image`
    or `file_name` (paths begin at the file's folder), and `caption` or `text`. Every picture is
    opened once, so that what is wrong is known before a run.

    Args:
        paths: A folder or file, or several.
        resolution: Pixels a side. The shorter side is resized to it, the middle is cut out.
        trigger: Put before each caption.
        check_caption: Raises BadDataset for a caption that is too long, such as
            `lambda caption: module.tokenize([caption])`.

    Returns:
        Rows for `cache_rows`; `.notes` says what a reader should know.

    Raises:
        BadDataset: There are no pictures, or pictures or captions that cannot be used.
        InvalidOption: `resolution` is no size.
    """
    if type(resolution) is not int or resolution < 1:
        raise InvalidOption(f"resolution={shown(resolution)} is no size", field="resolution")
    listed = [str(paths)] if isinstance(paths, str | Path) else [str(path) for path in paths]
    found, notes = find_pictures(listed, trigger=trigger)
    rows = PictureRows(found, resolution)
    rows.check(listing(listed), check_caption)
    rows.notes = [*notes, *rows.notes]
    return rows


def open_picture(path: Path, resolution: int) -> Any:
    """Returns a picture of PIL in RGB, (resolution, resolution).

    It is turned as its EXIF data says; what is transparent becomes white.

    Raises:
        BadDataset: The file is no single picture that can be read, or too small or too large.
    """
    try:
        return _opened(path, resolution)[0]
    except LoraError as error:
        raise error.within(file=str(path)) from None


def _opened(path: Path, resolution: int) -> tuple[Any, tuple[int, int]]:
    """Returns a picture as it is learnt, and its width and height in the file."""
    from PIL import Image, ImageOps

    if not path.is_file():  # a link to nowhere, a pipe that would be waited for
        raise BadDataset("it is no plain file", fix="Replace it.")
    Image.init()
    known = [name for name in _FORMATS if name in Image.OPEN]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata; what bears on pixels is an error
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=known) as file:
                _check_single(file)
                _check_size(*file.size, resolution)
                file.load()
                image = _in_rgb(ImageOps.exif_transpose(file), file.format)
    except LoraError:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise BadDataset(
            f"the picture has more than {Image.MAX_IMAGE_PIXELS:,} pixels",
            fix="Shrink it; a small file may claim any size.",
        ) from None
    except Exception as error:  # each format fails in its own way
        why = " ".join(str(error).replace(str(path), "it").split())[:200] or type(error).__name__
        raise BadDataset(f"the picture cannot be read ({why})", fix="Replace the file.") from None
    side = (resolution, resolution)
    return ImageOps.fit(image, side, Image.Resampling.LANCZOS), image.size


def _check_single(file: Any) -> None:
    """Raises BadDataset for an animation; cameras keep a preview behind the picture in MPO."""
    frames = getattr(file, "n_frames", 1)
    if frames > 1 and file.format != "MPO":
        raise BadDataset(
            f"the picture has {frames} frames",
            fix="Save each frame that is to be learnt by itself.",
        )


def _check_size(width: int, height: int, resolution: int) -> None:
    if min(width, height) * SMALLEST < resolution:
        raise BadDataset(
            f"the picture is {width} x {height} pixels, less than a quarter of {resolution}",
            fix="Take it out, or lower the resolution.",
        )


def _in_rgb(image: Any, kind: str | None) -> Any:
    """Returns a picture of any mode, from a file of some kind, in RGB on white."""
    from PIL import Image

    if image.mode.startswith("I;16") or (image.mode == "I" and kind == "PNG"):
        # Pillow would cut off all above 255
        image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise BadDataset(
            f"its values are of mode {image.mode!r}, which has no white",
            fix="Save the picture with 8 bits a channel.",
        )
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _notes(sizes: Sequence[tuple[int, int]], resolution: int) -> list[str]:
    small = sum(min(size) < resolution for size in sizes)
    long = sum(max(size) > _LONG * min(size) for size in sizes)
    notes = []
    if small:
        notes.append(f"{small} pictures are smaller than {resolution} pixels, and enlarged")
    if long:
        notes.append(f"{long} pictures are long, and lose more than half to the crop")
    return notes


class UncachedRows(Dataset[dict[str, Tensor]]):
    """Rows for `Trainer` that are opened and encoded at each step: nothing is kept of them.

    Args:
        module: What is trained.
        rows: From `picture_rows`.
    """

    def __init__(self, module: DiffusionTrainingModule, rows: PictureRows) -> None:
        self._module, self._rows = module, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        read = self._rows[row]
        ids = self._module.tokenize([read["caption"]])
        return {"pixel_values": pixels_of(read["image"]), **{k: v[0] for k, v in ids.items()}}
