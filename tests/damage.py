"""Ways to damage a saved adapter: each function here returns one that damages a folder."""

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from hf_lora import open_adapter
from hf_lora.errors import LoraError
from hf_lora.formats.container import read_safetensors, to_safetensors
from hf_lora.limits import LoadLimits
from hf_lora.manifest import KEY


@dataclass(frozen=True)
class Row:
    """One bad input.

    Attributes:
        name: What is wrong, unique.
        cites: The measured case it stands for: `<table>: <words of its row>`.
        damage: Takes a copy of the good folder; may return options for the load.
        error: What must be raised; None where the load must be right all the same.
        words: Pattern that the message, or the report, must match.
        file: Which good file is damaged.
        host: What it is loaded into; empty for the host that the file is for.
        like: A right load equals one of the good file after this damage; else of the good file.
        scale: A right load equals that at this scale.
        costs: What is counted besides: "all" for steps and bytes, "steps", or nothing.
    """

    name: str
    cites: str
    damage: Callable[[Path], Any]
    error: type[Exception] | None
    words: str
    file: str = "foreign"
    host: str = ""
    like: Callable[[Path], Any] | None = None
    scale: float = 1.0
    costs: str = ""


CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PIPELINE = "pytorch_lora_weights.safetensors"
GONE = object()  # as a value: the key is removed


def weights_in(folder):
    """The weights file of a folder, whichever layout it has."""
    return next(folder / name for name in (WEIGHTS, PIPELINE) if (folder / name).exists())


# ---------------------------------------------------------------- whole files


def write(name, data):
    return lambda folder: void((folder / name).write_bytes(data))


def drop(name):
    return lambda folder: (folder / name).unlink()


def move(name, other):
    return lambda folder: void((folder / name).rename(folder / other))


def cut(size):
    """Cuts the weights file to its first bytes; a negative size counts from the end."""

    def damage(folder):
        path = weights_in(folder)
        os.truncate(path, size if size >= 0 else path.stat().st_size + size)

    return damage


def patch(name, change):
    """Replaces a file's bytes by what `change` makes of them."""
    return lambda folder: void((folder / name).write_bytes(change((folder / name).read_bytes())))


def replace(name, make):
    """Removes a file and lets `make(path)` put something else in its place."""

    def damage(folder):
        (folder / name).unlink()
        make(folder / name)

    return damage


def out_of_folder(name):
    """Moves a file out of the folder and links to it."""

    def damage(folder):
        (folder.parent / "elsewhere").mkdir()
        os.symlink((folder / name).rename(folder.parent / "elsewhere" / name), folder / name)

    return damage


def loop(path):
    os.symlink(path.name, path)


def both(*damages):
    def damage(folder):
        for each in damages:
            each(folder)

    return damage


def given(damage=None, **options):
    """Damages, and has these options given to the load; `source` replaces the folder."""

    def apply(folder):
        if damage is not None:
            damage(folder)
        return {k: v(folder) if callable(v) else v for k, v in options.items()}

    return apply


def void(_):
    """Lets an expression stand where nothing is to be returned."""


# ---------------------------------------------------------------- config


def config(**fields):
    return configs(lambda values: values.update(fields))


def configs(change):
    """Edits `adapter_config.json`; Python's own NaN and Infinity are written as such."""

    def damage(folder):
        values = json.loads((folder / CONFIG).read_text())
        change(values)
        kept = {k: v for k, v in values.items() if v is not GONE}
        (folder / CONFIG).write_text(json.dumps(kept))

    return damage


def config_text(old, new):
    """Edits the text of the config, for what `json` does not write."""

    def damage(folder):
        text = (folder / CONFIG).read_text()
        assert old in text
        (folder / CONFIG).write_text(text.replace(old, new, 1))

    return damage


# ---------------------------------------------------------------- the container


def raw_header(path):
    """Returns (header, data) of a safetensors file."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:start]), content[start:]


def write_raw(path, header, data, length=None):
    """Writes a safetensors file of any header, as an object or as bytes."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)


def header(change):
    """Edits the parsed header; `change` may return another one, or its bytes."""

    def damage(folder):
        path = weights_in(folder)
        values, data = raw_header(path)
        changed = change(values)
        write_raw(path, values if changed is None else changed, data)

    return damage


def entry(key, **fields):
    """Edits the header entry of one tensor."""
    return header(lambda values: values[key].update(fields))


def container(change):
    def damage(folder):
        path = weights_in(folder)
        write_raw(path, *change(*raw_header(path)))

    return damage


def header_only(values, data=b""):
    """Replaces the whole file by this header."""
    return lambda folder: write_raw(weights_in(folder), values, data)


def tensors(change):
    """Edits the tensors as a dict, metadata and all else kept."""

    def damage(folder):
        path = weights_in(folder)
        contents = read_safetensors(path, LoadLimits())
        values = {name: tensor.clone() for name, tensor in contents.tensors.items()}
        changed = change(values)
        changed = values if changed is None else changed
        path.write_bytes(b"".join(to_safetensors(changed, contents.metadata)))

    return damage


def put(key, value=None):
    """Adds a tensor, zeros (4, 4) unless another is given."""
    value = torch.zeros(4, 4) if value is None else value
    return tensors(lambda found: found.update({key: value}))


def edit(key, change):
    return tensors(lambda found: found.update({key: change(found[key])}))


def edit_all(change):
    return tensors(lambda found: {key: change(value) for key, value in found.items()})


def without(part):
    return tensors(lambda found: {k: v for k, v in found.items() if part not in k})


def only(part):
    return tensors(lambda found: {k: v for k, v in found.items() if part in k})


def respell(old, new):
    return tensors(lambda found: {k.replace(old, new): v for k, v in found.items()})


def typed(key, name, size):
    """Gives one tensor a dtype by its name in the header, with bytes to match."""

    def change(values, data):
        count = prod(values[key]["shape"])
        moved = {n: e for n, e in values.items() if n not in (key, "__metadata__")}
        kept, end = b"", 0
        for each in moved.values():
            start, stop = each["data_offsets"]
            kept += data[start:stop]
            each["data_offsets"] = [end, end + stop - start]
            end += stop - start
        values[key].update(dtype=name, data_offsets=[end, end + size * count])
        return values, kept + bytes(size * count)

    return container(change)


# ---------------------------------------------------------------- metadata and manifest


def metadata(**values):
    def change(found):
        found.setdefault("__metadata__", {}).update(values)
        found["__metadata__"] = {k: v for k, v in found["__metadata__"].items() if v is not GONE}

    return header(change)


def stated(**fields):
    """Edits `lora_adapter_metadata` of a pipeline's file; write dots as two underscores."""

    def change(found):
        values = json.loads(found["__metadata__"]["lora_adapter_metadata"])
        values |= {k.replace("__", "."): v for k, v in fields.items()}
        kept = {k: v for k, v in values.items() if v is not GONE}
        found["__metadata__"]["lora_adapter_metadata"] = json.dumps(kept)

    return header(change)


def manifest(change=None, **fields):
    """Edits the manifest, its digest left as it was."""

    def edited(found):
        values = json.loads(found["__metadata__"][KEY])
        values |= fields
        if change is not None:
            change(values)
        kept = {k: v for k, v in values.items() if v is not GONE}
        found["__metadata__"][KEY] = json.dumps(kept)

    return header(edited)


def manifest_config(part="model", /, **fields):
    """Edits a config inside the manifest."""

    def change(values):
        kept = values["configs"][part] | fields
        values["configs"][part] = {k: v for k, v in kept.items() if v is not GONE}

    return manifest(change)


def signed(*damages):
    """Damages, then states the digest that the damaged content has, as a forger would."""

    def damage(folder):
        both(*damages, manifest(digest="v1:sha256:" + "0" * 64))(folder)
        try:
            open_adapter(folder)
        except LoraError as error:
            found = re.search("content has the digest (v1:sha256:[0-9a-f]{64})", str(error))
            if found:
                manifest(digest=found[1])(folder)

    return damage
