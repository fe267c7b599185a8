"""Pictures and captions read once: what VAE and text encoders make of them, in memory or a folder.

A training step with cached rows runs the denoiser alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers.utils import logging

from hf_lora.errors import BadDataset, InvalidOption, LoraError, shown
from hf_lora.formats.disk import Files, replace_files
from hf_lora.training.diffusion.batches import check_pixels
from hf_lora.training.diffusion.encoded import Row, check_finite, encoded
from hf_lora.training.diffusion.module import DiffusionTrainingModule
from hf_lora.walks import bare_modules

INDEX = "cache.json"
VERSION = 2

_SHARD = 256  # rows a file
_SAMPLED = 64  # values of each weight that tell one encoder from another
_PROBE = "A cat, 2 dogs"  # tokenizers are told apart by what they make of it
# What latents are scaled by, in the config of a VAE
_SCALES = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")

logger = logging.get_logger(__name__)


class CachedRows(Dataset[dict[str, Tensor]]):
    """Rows for `Trainer`, each a dict of tensors that `DiffusionTrainingModule.forward` takes.

    Args:
        count: How many.
        fields: Names of the tensors of a row.
        folder: Where they lie, a shard a file; None for rows in memory.
        run: What the shards of a folder are marked with.
        shards: Number of a shard -> field -> tensor (rows, ...), of rows in memory.
    """

    def __init__(
        self,
        count: int,
        fields: Sequence[str],
        *,
        folder: Path | None = None,
        run: str = "",
        shards: Mapping[int, Mapping[str, Tensor]] | None = None,
    ) -> None:
        self._count, self._fields, self._run = count, list(fields), run
        self._folder = None if folder is None else folder.absolute()
        self._shards: dict[int, Any] = dict(shards or {})

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        if not 0 <= row < self._count:
            raise IndexError(row)
        number, place = divmod(row, _SHARD)
        if number not in self._shards:
            assert self._folder is not None  # in memory all shards are there
            self._shards[number] = self._open(self._folder, number)
        shard = self._shards[number]
        if isinstance(shard, dict):
            return {field: shard[field][place] for field in self._fields}
        return {field: shard.get_slice(field)[place] for field in self._fields}

    def _open(self, folder: Path, number: int) -> Any:
        """Returns a shard whose header is that of these rows; else raises BadDataset."""
        path = folder / _name(number)
        try:
            shard: Any = safe_open(path, "pt")
            rows = {field: shard.get_slice(field).get_shape()[0] for field in self._fields}
        except (OSError, SafetensorError, IndexError) as error:
            fact = f"a part of the cache cannot be read ({type(error).__name__})"
            raise BadDataset(fact, fix="Cache the pictures anew.", file=str(path)) from None
        if (shard.metadata() or {}).get("run") != self._run:
            raise BadDataset(
                "another run has written this part of the cache",
                fix="Delete the folder, and let one process cache into it.",
                file=str(path),
            )
        wanted = min(_SHARD, self._count - number * _SHARD)
        if set(rows.values()) != {wanted}:
            fact = f"this part of the cache holds {rows}, and {wanted} rows each are needed"
            raise BadDataset(fact, fix="Cache the pictures anew.", file=str(path))
        return shard

    def check(self) -> None:
        """Raises BadDataset where files are no longer those that were written, by their headers."""
        if self._folder is not None:
            for number in range(-(-self._count // _SHARD)):
                self._open(self._folder, number)

    def __getstate__(self) -> dict[str, Any]:
        # open files do not go to the workers of a DataLoader
        return {**self.__dict__, "_shards": {} if self._folder else self._shards}


def open_cache(folder: str | os.PathLike[str], module: DiffusionTrainingModule) -> CachedRows:
    """Returns the rows that `cache_rows` has written into a folder.

    Args:
        folder: The folder.
        module: What will be trained; it must have the VAE and text encoders of then.

    Raises:
        BadDataset: The folder holds no whole cache, or one made with other models.
        UnsupportedHost: The pipeline lacks a tokenizer.
    """
    index = _index(Path(folder))
    if index["made_with"] != identity(module, text="prompt_embeds" in index["fields"]):
        raise BadDataset(
            "the cache was made with another VAE, or other tokenizers or text encoders",
            fix="Cache the pictures anew with this pipeline.",
            file=str(folder),
        )
    found = CachedRows(index["rows"], index["fields"], folder=Path(folder), run=index["run"])
    found.check()
    return found


def cache_rows(
    module: DiffusionTrainingModule,
    rows: Sequence[Mapping[str, Any]],
    *,
    folder: str | os.PathLike[str] | None = None,
    moments: bool = True,
    batch_size: int = 8,
    seed: int = 0,
) -> CachedRows:
    """Runs VAE and text encoders once over a data set.

    Text encoders that have an adapter change in training: for them token ids are kept.

    Args:
        module: What will be trained; adapters are attached already.
        rows: Each with `caption` and `image` (a picture of PIL in RGB, or bytes (height, width, 3))
            or `pixel_values`, (3, height, width) in [-1, 1]; all of one size. All or none have
            `time_ids`, six numbers for SDXL, see `DiffusionTrainingModule.forward`.
        folder: An empty or new folder, for this process alone; None to keep the rows in memory.
        moments: Keep what the VAE says of a picture, from which latents are drawn anew each time,
            as without a cache; False to keep one draw, half the bytes. An AutoencoderTiny says
            latents, which are kept in any case.
        batch_size: Pictures at a time.
        seed: Of that one draw.

    Raises:
        BadDataset: A row lacks something or does not fit, or what the VAE or a text encoder makes
            of it is not finite; the message has its number. Or another process has written into
            the folder.
        InvalidOption: The folder holds a cache or is none, or `batch_size` is no count.
    """
    if not isinstance(batch_size, int) or batch_size < 1:
        raise InvalidOption(f"batch_size={shown(batch_size)} is no count", field="batch_size")
    place = None if folder is None else Path(folder).absolute()
    if not len(rows):
        raise BadDataset("there are no rows to cache", field="rows")
    text = not any(module.inputs.adapted(name) for name in module.inputs.kind.encoders)
    generator = None if moments else torch.Generator().manual_seed(seed)
    run = secrets.token_hex(8)
    reader = _Reader(module, rows)
    kept: dict[int, dict[str, Tensor]] = {}
    fields: list[str] = []
    for number in range(-(-len(rows) // _SHARD)):
        _check_free(place)  # before the work, and again where another process was quicker
        pieces = []
        until = min(len(rows), (number + 1) * _SHARD)
        for start in range(number * _SHARD, until, batch_size):
            several = [reader.row(i) for i in range(start, min(start + batch_size, until))]
            pieces.append(encoded(module.inputs, several, generator, text=text, first=start))
            check_finite(rows, pieces[-1], start)
        shard = {field: torch.cat([piece[field] for piece in pieces]) for field in pieces[0]}
        fields = list(shard)
        if place is None:
            kept[number] = shard
        else:
            replace_files(Files(place, {_name(number): [save(shard, {"run": run})]}))
    reader.warn()
    made = CachedRows(len(rows), fields, folder=place, run=run, shards=kept)
    if place is not None:
        _check_free(place)
        made.check()
        facts = {"format": VERSION, "rows": len(rows), "fields": fields, "run": run}
        facts["made_with"] = identity(module, text=text)
        replace_files(Files(place, {INDEX: [json.dumps(facts).encode()]}))
    return made


def _check_free(place: Path | None) -> None:
    """Raises InvalidOption for a folder that is none, or holds a cache already."""
    if place is None or not os.path.lexists(place):
        return
    if not place.is_dir():
        raise InvalidOption(
            f"{str(place)!r} is no folder", fix="Give a folder, or a new name.", field="folder"
        )
    if (place / INDEX).exists():
        raise InvalidOption(
            f"{str(place)!r} holds a cache",
            fix="Open it with open_cache(folder, module), or give another folder.",
            field="folder",
        )


def pixels_of(image: Any) -> Tensor:
    """Returns a picture, bytes (height, width, 3), as (3, height, width) in [-1, 1].

    Raises:
        BadDataset: It is no such picture.
    """
    try:
        values = np.asarray(image)
    except Exception as error:  # a truncated file is found out here, each format in its way
        raise BadDataset(f"the picture cannot be read ({error})", field="image") from None
    if values.ndim != 3 or values.shape[2] != 3 or values.dtype != np.uint8:
        raise BadDataset(
            f"the picture is {values.shape} of {values.dtype}, not bytes (height, width, 3)",
            fix='Open it with .convert("RGB").',
            field="image",
        )
    return torch.from_numpy(values.copy()).permute(2, 0, 1).float() / 127.5 - 1


def identity(module: DiffusionTrainingModule, *, text: bool) -> str:
    """Returns a hash by which a cache knows VAE and, with `text`, the text encoders again."""
    inputs = module.inputs
    digest = hashlib.sha256(type(inputs.pipe).__name__.encode())
    for name in ("vae", *(inputs.kind.encoders if text else ())):
        part = getattr(inputs.pipe, name, None)
        if not isinstance(part, nn.Module):
            raise BadDataset(f"the pipeline has no {name}", fix="Load it whole.", field=name)
        for path, owner in bare_modules(part):
            for key, value in owner._parameters.items():
                if value is not None:
                    flat = value.detach().flatten()
                    # an odd step does not stay in one column
                    few = flat[:: flat.numel() // _SAMPLED | 1].float().cpu()
                    digest.update(f"{name}.{path}.{key}{tuple(value.shape)}".encode())
                    digest.update(few.numpy().tobytes())
    config: Any = inputs.pipe.vae.config
    read = {field: ids.tolist() for field, ids in inputs.tokenize([""]).items()}
    names = [name.replace("text_encoder", "tokenizer") for name in inputs.kind.encoders]
    probe = [list(getattr(inputs.pipe, name)(_PROBE).input_ids) for name in names]
    digest.update(repr(([config.get(name) for name in _SCALES], read, probe)).encode())
    return digest.hexdigest()


class _Reader:
    """Rows, each checked by itself and against the first.

    Args:
        module: What will be trained.
        rows: See `cache_rows`.
    """

    def __init__(self, module: DiffusionTrainingModule, rows: Sequence[Mapping[str, Any]]) -> None:
        self._module, self._rows = module, rows
        self._first: Row | None = None
        self._least = -1.0  # of all pictures that are given as numbers

    def row(self, i: int) -> Row:
        """Returns a row; raises BadDataset with its number."""
        try:
            read = self._read(self._rows[i], i)
        except LoraError as error:
            fact = f"row {i}: {error.fact}"
            raise BadDataset(fact, fix=error.fix, file=error.file, field=error.field) from None
        self._first = self._first or read
        return read

    def warn(self) -> None:
        """Tells of pictures that seem to go from 0 to 1."""
        if self._least >= 0:
            logger.warning(
                "no picture has a value below 0, and black is -1: if pixel_values go from 0 to 1, "
                "give 2 * pixel_values - 1"
            )

    def _read(self, row: object, i: int) -> Row:
        if not isinstance(row, Mapping):
            raise BadDataset(f"it is of type {type(row).__name__}, not a dict")
        caption = row.get("caption")
        if not isinstance(caption, str):
            raise BadDataset("it has no caption", fix="A picture without one has caption ''.")
        numbers = row.get("pixel_values")
        inputs = self._module.inputs
        if numbers is None:
            picture = pixels_of(row.get("image"))
        else:
            picture = _tensor(numbers, "pixel_values")
        check_pixels(picture[None], inputs.factor, inputs.kind.multiple)
        if numbers is not None:
            least = float(picture.min())
            self._least = min(self._least, least) if i else least
        read = Row(picture, caption, _time_ids(row.get("time_ids")))
        if self._first is not None:
            _check_alike(read, self._first)
        return read


def _tensor(value: Any, field: str) -> Tensor:
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        raise BadDataset(f"its {field} are {shown(value)}, no tensor", field=field) from None


def _time_ids(given: Any) -> Tensor | None:
    if given is None:
        return None
    found = _tensor(given, "time_ids").float()
    if found.shape != (6,) or not found.isfinite().all():
        raise BadDataset(f"its time_ids are {shown(given)}, not six numbers", field="time_ids")
    return found


def _check_alike(row: Row, first: Row) -> None:
    """Raises BadDataset where a row cannot be in a batch with the first."""
    if row.pixels.shape != first.pixels.shape:
        raise BadDataset(
            f"its picture is {tuple(row.pixels.shape)} and those before are "
            f"{tuple(first.pixels.shape)}",
            fix="Resize and crop all to one size.",
        )
    if (row.time_ids is None) != (first.time_ids is None):
        has = "no time_ids, and those before have" if row.time_ids is None else "time_ids alone"
        raise BadDataset(f"it has {has}", fix="Give them to all rows or none.", field="time_ids")


def _name(number: int) -> str:
    return f"cache-{number:05}.safetensors"


def _index(folder: Path) -> dict[str, Any]:
    """Returns what the index of a cache says; BadDataset when it is no sound one."""
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        sound = index["format"] == VERSION and type(index["rows"]) is int and index["made_with"]
        sound = sound and type(index["fields"]) is list and type(index["run"]) is str
        sound = sound and all(isinstance(field, str) for field in index["fields"])
        shards = range(-(-index["rows"] // _SHARD))
        missing = [_name(n) for n in shards if not (folder / _name(n)).is_file()]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise BadDataset(
            f"there is no whole cache ({type(error).__name__})",
            fix="cache_rows(module, rows, folder=...) makes one.",
            file=str(folder),
        ) from None
    if not sound or missing:
        what = f"it lacks {missing[0]}" if missing else f"{INDEX} is not of format {VERSION}"
        raise BadDataset(what, fix="Cache the pictures anew.", file=str(folder))
    return dict(index)
