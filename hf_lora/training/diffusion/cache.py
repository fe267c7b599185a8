"""Pictures and captions read once: what VAE and text encoders make of them, in memory or a folder.

A training step with cached rows runs the denoiser alone.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.utils.data import Dataset

from hf_lora.errors import BadDataset, InvalidOption, LoraError, shown
from hf_lora.formats.disk import Files, replace_files
from hf_lora.training.diffusion.batches import check_pixels
from hf_lora.training.diffusion.module import DiffusionTrainingModule
from hf_lora.walks import bare_modules

INDEX = "cache.json"
VERSION = 1

_SHARD = 256  # rows a file
_SAMPLED = 8  # values of each weight that tell one encoder from another


class CachedRows(Dataset[dict[str, Tensor]]):
    """Rows for `Trainer`, each a dict of tensors that `DiffusionTrainingModule.forward` takes.

    Args:
        count: How many.
        fields: Names of the tensors of a row.
        folder: Where they lie, a shard a file; None for rows in memory.
        shards: Number of a shard -> field -> tensor (rows, ...), of rows in memory.
    """

    def __init__(
        self,
        count: int,
        fields: Sequence[str],
        *,
        folder: Path | None = None,
        shards: Mapping[int, Mapping[str, Tensor]] | None = None,
    ) -> None:
        self._count, self._fields, self._folder = count, list(fields), folder
        self._shards: dict[int, Any] = dict(shards or {})

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        if not 0 <= row < self._count:
            raise IndexError(row)
        number, place = divmod(row, _SHARD)
        if number not in self._shards:
            assert self._folder is not None  # in memory all shards are there
            self._shards[number] = safe_open(self._folder / _name(number), "pt")
        shard = self._shards[number]
        if isinstance(shard, dict):
            return {field: shard[field][place] for field in self._fields}
        return {field: shard.get_slice(field)[place] for field in self._fields}

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
    """
    index = _index(Path(folder))
    if index["made_with"] != identity(module, text="prompt_embeds" in index["fields"]):
        raise BadDataset(
            "the cache was made with another VAE or other text encoders",
            fix="Cache the pictures anew with this pipeline.",
            file=str(folder),
        )
    return CachedRows(index["rows"], index["fields"], folder=Path(folder))


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
            or `pixel_values`, (3, height, width) in [-1, 1]; all of one size.
        folder: An empty or new folder; None to keep the rows in memory.
        moments: Keep what the VAE says of a picture, from which latents are drawn anew each time,
            as without a cache; False to keep one draw, half the bytes.
        batch_size: Pictures at a time.
        seed: Of that one draw.

    Raises:
        BadDataset: A row lacks something or does not fit; the message has its number.
        InvalidOption: The folder holds a cache, or `batch_size` is no count.
    """
    if not isinstance(batch_size, int) or batch_size < 1:
        raise InvalidOption(f"batch_size={shown(batch_size)} is no count", field="batch_size")
    place = None if folder is None else Path(folder)
    if place is not None and (place / INDEX).exists():
        raise InvalidOption(
            f"{str(folder)!r} holds a cache",
            fix="Open it with open_cache(folder, module), or give another folder.",
            field="folder",
        )
    if not len(rows):
        raise BadDataset("there are no rows to cache", field="rows")
    text = not any(module.inputs.adapted(name) for name in module.inputs.kind.encoders)
    generator = None if moments else torch.Generator().manual_seed(seed)
    size: tuple[int, ...] | None = None
    kept: dict[int, dict[str, Tensor]] = {}
    fields: list[str] = []
    for number in range(-(-len(rows) // _SHARD)):
        pieces = []
        until = min(len(rows), (number + 1) * _SHARD)
        for start in range(number * _SHARD, until, batch_size):
            pixels, captions = [], []
            for i in range(start, min(start + batch_size, until)):
                picture, caption = _row(module, rows[i], i, size)
                size = tuple(picture.shape)
                pixels.append(picture)
                captions.append(caption)
            pieces.append(_encoded(module, pixels, captions, generator, text=text, first=start))
        shard = {field: torch.cat([piece[field] for piece in pieces]) for field in pieces[0]}
        fields = list(shard)
        if place is None:
            kept[number] = shard
        else:
            replace_files(Files(place, {_name(number): [save(shard)]}))
    if place is not None:
        facts = {"format": VERSION, "rows": len(rows), "fields": fields}
        facts["made_with"] = identity(module, text=text)
        replace_files(Files(place, {INDEX: [json.dumps(facts).encode()]}))
    return CachedRows(len(rows), fields, folder=place, shards=kept)


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
                    few = value.detach().flatten()[:_SAMPLED].float().cpu()
                    digest.update(f"{name}.{path}.{key}{tuple(value.shape)}".encode())
                    digest.update(few.numpy().tobytes())
    return digest.hexdigest()


def _row(
    module: DiffusionTrainingModule, row: Mapping[str, Any], i: int, size: tuple[int, ...] | None
) -> tuple[Tensor, str]:
    """Returns picture and caption of a row, checked by themselves."""
    try:
        if not isinstance(row, Mapping):
            raise BadDataset(f"it is of type {type(row).__name__}, not a dict")
        caption = row.get("caption")
        if not isinstance(caption, str):
            raise BadDataset("it has no caption", fix="A picture without one has caption ''.")
        pixels = row.get("pixel_values")
        picture = pixels_of(row.get("image")) if pixels is None else torch.as_tensor(pixels)
        check_pixels(picture[None], module.inputs.factor, module.inputs.kind.multiple)
        if size is not None and tuple(picture.shape) != size:
            raise BadDataset(
                f"its picture is {tuple(picture.shape)} and those before are {size}",
                fix="Resize and crop all to one size.",
            )
    except LoraError as error:
        raise BadDataset(f"row {i}: {error.fact}", fix=error.fix, field=error.field) from None
    return picture, caption


@torch.no_grad()
def _encoded(
    module: DiffusionTrainingModule,
    pixels: Sequence[Tensor],
    captions: Sequence[str],
    generator: torch.Generator | None,
    *,
    text: bool,
    first: int,
) -> dict[str, Tensor]:
    """Returns field -> tensor (rows, ...) of some rows, on the CPU."""
    inputs = module.inputs
    parameters = inputs.moments_of(torch.stack(list(pixels)))
    found = {"moments": parameters}
    if generator is not None:
        found = {"latents": inputs.latents_of(parameters, generator)}
    try:
        ids = inputs.tokenize(captions)
    except BadDataset as error:
        last = first + len(captions) - 1
        fact = f"rows {first} to {last}: {error.fact}"
        raise BadDataset(fact, fix=error.fix, field=error.field) from None
    if text:
        made = inputs.encode(list(ids.values()))
        found["prompt_embeds"] = made.embeds
        if made.pooled is not None:
            found["pooled_prompt_embeds"] = made.pooled
    else:
        found.update(ids)
    return {field: value.cpu().contiguous() for field, value in found.items()}


def _name(number: int) -> str:
    return f"cache-{number:05}.safetensors"


def _index(folder: Path) -> dict[str, Any]:
    """Returns what the index of a cache says; BadDataset when it is no sound one."""
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        sound = index["format"] == VERSION and type(index["rows"]) is int and index["made_with"]
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
