"""The safetensors container and JSON, read within limits before anything of size is allocated.

The container is handled here, and not by the safetensors package, for two reasons. Its bounds come
too late for files from strangers: it accepts headers of 100 MB, names that stand twice and millions
of tensors. And it writes metadata in random order, so equal adapters would give unequal files.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from hf_lora.errors import AdapterNotFound, BadAdapterFile, LoraError
from hf_lora.limits import LoadLimits
from hf_lora.progress import Moved, reading

METADATA = "__metadata__"
DAMAGED = "Download or save it again."  # what to do where an error knows nothing better
_ALIGNED = 8  # the data section starts at a multiple of this many bytes
_DIMENSIONS = 16  # convolutions have five; torch itself stops at 64
_NAME = 1000  # characters; names in use have up to some hundred

# dtype names of the safetensors header -> torch; others are refused by name
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


@dataclass(frozen=True)
class Contents:
    """A whole safetensors file.

    Attributes:
        metadata: Its `__metadata__`, text by text.
        tensors: Name -> tensor, on the CPU, each with memory of its own, or on meta where only the
            header was read.
    """

    metadata: Mapping[str, str]
    tensors: Mapping[str, Tensor]


def to_safetensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> list[bytes]:
    """Returns a whole file in pieces, the same for the same content: all names are sorted.

    Raises:
        BadAdapterFile: A tensor is of a dtype that the format lacks.
    """
    # the widest first, as safetensors writes them, so that every tensor is aligned
    order = sorted(tensors, key=lambda n: (-tensors[n].element_size(), n))
    header: dict[str, Any] = {METADATA: dict(sorted(metadata.items()))}
    pieces, end = [], 0
    for name in order:
        tensor = tensors[name].detach().cpu().contiguous()
        if tensor.dtype not in _NAMES:
            raise BadAdapterFile(f"{name} is of {tensor.dtype}, which no file holds", field=name)
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
        if start != end:
            pieces.append(tensor.reshape(-1).view(torch.uint8).numpy().data)
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % _ALIGNED)
    return [len(raw).to_bytes(8, "little"), raw, *pieces]  # type: ignore[list-item]


def read_safetensors(path: Path, limits: LoadLimits, *, header_only: bool = False) -> Contents:
    """Reads a file whole, or its header.

    Raises:
        AdapterNotFound: There is no such file.
        BadAdapterFile: It is no regular file, over a limit, truncated, or not what the format says:
            every byte belongs to one tensor, no name stands twice.
    """
    try:
        with _opened(path) as file:
            size = os.fstat(file.fileno()).st_size
            metadata, entries = _header(file, size, limits)
            device = "meta" if header_only else "cpu"
            tensors = {name: _empty(name, entry, device) for name, entry in entries.items()}
            if header_only:
                _read_numbers(file, tensors, entries)
            else:
                with reading(path.name, size) as moved:
                    _fill(file, [tensors[name] for name in _in_order(entries)], moved)
            tensors = {
                n: t.bool() if entries[n]["dtype"] == "BOOL" else t for n, t in tensors.items()
            }
        return Contents(metadata, tensors)
    except LoraError as error:
        raise error.within(file=str(path), fix=DAMAGED) from None
    except OSError as error:
        raise BadAdapterFile(
            f"the file cannot be read ({error.strerror})", fix=DAMAGED, file=str(path)
        ) from None


def _opened(path: Path) -> BinaryIO:
    try:
        # not blocking, so that a named pipe cannot hold us; it is refused below
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | _binary())
    except FileNotFoundError:
        raise AdapterNotFound(f"there is no file {path.name}", file=str(path)) from None
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise BadAdapterFile("it is no regular file")
    return os.fdopen(handle, "rb")


def _binary() -> int:
    return getattr(os, "O_BINARY", 0)  # Windows


def _header(
    file: BinaryIO, size: int, limits: LoadLimits
) -> tuple[dict[str, str], dict[str, dict[str, Any]]]:
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > size - 8:
        raise BadAdapterFile(f"it is no whole safetensors file: {size} bytes, header of {length}")
    if length > limits.header:
        raise BadAdapterFile(
            f"its header has {length:,} bytes, over the limit of {limits.header:,}",
            fix="Pass limits=LoadLimits(header=...) if you trust it.",
        )
    raw = file.read(length)
    # before parsing, which takes some twenty times the memory of the text
    if raw.count(b'"data_offsets"') > limits.tensors or raw.count(b"{") > 2 * limits.tensors:
        raise BadAdapterFile(
            f"it names more than {limits.tensors:,} tensors",
            fix="Pass limits=LoadLimits(tensors=...) if you trust it.",
        )
    entries = parse_json(raw, limits.depth, "the header")
    if not isinstance(entries, dict):
        raise BadAdapterFile("its header is no JSON object")
    metadata = entries.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise BadAdapterFile(f"its {METADATA} does not map text to text", field=METADATA)
    _check_layout(entries, size - 8 - length)
    return metadata, entries


def _check_layout(entries: dict[str, Any], size: int) -> None:
    """Checks that the tensors cover the data section of `size` bytes once, without a gap."""
    for name, entry in entries.items():
        _check_entry(name, entry)
    end = 0
    for name in _in_order(entries):
        entry = entries[name]
        start, stop = entry["data_offsets"]
        wanted = math.prod(entry["shape"]) * DTYPES[entry["dtype"]].itemsize
        if start != end or stop - start != wanted:
            raise BadAdapterFile(
                f"it is no whole safetensors file: {name!r} of {wanted} bytes stands at "
                f"{start} to {stop}, the one before ends at {end}",
                field=name,
            )
        end = stop
    if end != size:
        raise BadAdapterFile(
            f"it is no whole safetensors file: its tensors end at {end}, its data at {size} bytes"
        )


def _check_entry(name: str, entry: Any) -> None:
    def is_size(value: object) -> bool:
        return type(value) is int and 0 <= value < 1 << 53

    if len(name) > _NAME:
        raise BadAdapterFile(
            f"a tensor has a name of {len(name):,} characters, over the limit of {_NAME:,}: "
            f"{name[:80]}...",
            field=name[:80],
        )
    if not name.isprintable():
        raise BadAdapterFile(f"{name[:80]!r} cannot name a tensor", field=repr(name[:80]))
    keys = {"dtype", "shape", "data_offsets"}
    if not isinstance(entry, dict) or set(entry) != keys or not isinstance(entry["dtype"], str):
        raise BadAdapterFile(f"the header entry of {name!r} is malformed", field=name)
    if entry["dtype"] not in DTYPES:
        raise BadAdapterFile(
            f"{name} has the dtype {entry['dtype'][:40]}, which is not read",
            fix=f"Save it in one of {', '.join(DTYPES)}.",
            field=name,
        )
    shape, offsets = entry["shape"], entry["data_offsets"]
    lists = isinstance(shape, list) and isinstance(offsets, list)
    if not lists or len(offsets) != 2 or len(shape) > _DIMENSIONS:
        raise BadAdapterFile(f"the header entry of {name!r} is malformed", field=name)
    # torch multiplies the dimensions, nothing or not, and cannot count beyond 2^63
    if not all(map(is_size, [*shape, *offsets])) or math.prod(max(n, 1) for n in shape) >= 1 << 53:
        raise BadAdapterFile(f"{name} has sizes that are none", field=name)


def _in_order(entries: Mapping[str, Any]) -> list[str]:
    return sorted(entries, key=lambda name: entries[name]["data_offsets"])


def _empty(name: str, entry: Mapping[str, Any], device: str) -> Tensor:
    # bytes that are neither 0 nor 1 are no booleans: they are read as numbers first
    dtype = torch.uint8 if entry["dtype"] == "BOOL" else DTYPES[entry["dtype"]]
    try:
        return torch.empty(entry["shape"], dtype=dtype, device=device)
    except RuntimeError:  # what torch's allocator raises
        raise BadAdapterFile(
            f"{name[:200]} of shape {tuple(entry['shape'])} does not fit into memory",
            field=name[:200],
        ) from None


def _read_numbers(file: BinaryIO, tensors: dict[str, Tensor], entries: Mapping[str, Any]) -> None:
    """Reads the tensors of one value, such as alpha, of a file whose others stay on meta."""
    data = file.tell()
    for name, entry in entries.items():
        if math.prod(entry["shape"]) == 1:
            tensors[name] = _empty(name, entry, "cpu")
            file.seek(data + entry["data_offsets"][0])
            _fill(file, [tensors[name]])


def _fill(file: BinaryIO, tensors: Sequence[Tensor], moved: Moved | None = None) -> None:
    """Reads the data section into tensors that stand in its order."""
    for tensor in tensors:
        view = tensor.view(-1).view(torch.uint8).numpy().data
        done = 0
        while done < len(view):
            count = file.readinto(view[done:])  # type: ignore[attr-defined]
            if not count:
                raise BadAdapterFile("it is no whole safetensors file: it ends before its data")
            done += count
        if moved is not None:
            moved(done)


def read_json(path: Path, limits: LoadLimits) -> Any:
    """Reads a JSON file within `limits.config` bytes and `limits.depth` levels.

    Raises:
        AdapterNotFound: There is no such file.
        BadAdapterFile: It is no regular file, over a limit, or no strict JSON.
    """
    try:
        with _opened(path) as file:
            raw = file.read(limits.config + 1)
        if len(raw) > limits.config:
            raise BadAdapterFile(
                f"it has over {limits.config:,} bytes",
                fix="Pass limits=LoadLimits(config=...) if you trust it.",
            )
        return parse_json(raw, limits.depth, "it")
    except LoraError as error:
        raise error.within(file=str(path), fix=DAMAGED) from None
    except OSError as error:
        raise BadAdapterFile(
            f"the file cannot be read ({error.strerror})", fix=DAMAGED, file=str(path)
        ) from None


def parse_json(raw: bytes | str, depth: int, what: str) -> Any:
    """Parses strict JSON: UTF-8, no NaN, no key twice, nested at most `depth` deep."""
    try:
        text = raw if isinstance(raw, str) else raw.decode("utf-8")
        value = json.loads(text, parse_constant=_no_constant, object_pairs_hook=_once)
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()  # half of a pair could not be written
    except RecursionError:
        raise BadAdapterFile(f"{what} is nested deeper than {depth} levels") from None
    except ValueError as error:
        raise BadAdapterFile(f"{what} is no valid JSON ({str(error)[:200]})") from None
    if _deeper(value, depth):
        raise BadAdapterFile(f"{what} is nested deeper than {depth} levels")
    return value


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice[:200]!r} stands twice")
    return found


def _deeper(value: object, levels: int) -> bool:
    """Tells whether lists and objects are nested more than `levels` deep."""
    layer = [value]
    for _ in range(levels + 1):
        nests = [item for item in layer if isinstance(item, dict | list)]
        if not nests:
            return False
        layer = [x for n in nests for x in (n.values() if isinstance(n, dict) else n)]
    return True
