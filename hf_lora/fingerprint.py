"""The base fingerprint: at most 32 values of every weight with two or more dimensions.

Whether two of them are of one base decides `verdict`. Tensors come in with names already canonical;
nothing here knows of models.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_lora.errors import BadAdapterFile

VERSION = 1
SAMPLES = 32  # values a tensor
MAX_TENSORS = 200_000  # a trillion-parameter model with separate experts has about 100,000
MAX_NAME, MAX_DIMS = 1000, 16

# 2^64 over the golden ratio: its multiples modulo 2^64 spread evenly, however many are taken.
_GOLDEN = 0x9E3779B97F4A7C15

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_READABLE = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16, *FP8})


@dataclass(frozen=True, eq=False)
class Sample:
    """What is kept of one tensor.

    Attributes:
        shape: The shape of the whole tensor.
        values: fp32, (min(32, elements),), on the CPU, at `positions(elements)` in row-major order.
    """

    shape: tuple[int, ...]
    values: Tensor


@dataclass(frozen=True, eq=False)
class Fingerprint:
    """Sampled values of a base, by canonical tensor name."""

    tensors: Mapping[str, Sample]

    @property
    def short(self) -> str:
        """An id to print: `fp1:` and 12 hex digits. Another dtype of the same base has another."""
        text = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"))
        return f"fp{VERSION}:{hashlib.sha256(text.encode()).hexdigest()[:12]}"

    def to_json(self) -> dict[str, Any]:
        """Returns plain data: the version, then shape and base64 values of each tensor."""
        tensors = {
            name: {"shape": list(sample.shape), **_encoded(sample.values)}
            for name, sample in sorted(self.tensors.items())
        }
        return {"version": VERSION, "tensors": tensors}

    @classmethod
    def from_json(cls, value: object) -> Fingerprint:
        """Reads what `to_json` wrote.

        Raises:
            BadAdapterFile: Anything about it is not as written; its field is `fingerprint`.
        """
        if not isinstance(value, dict) or value.keys() != {"version", "tensors"}:
            raise _bad("the fingerprint is no object of version and tensors")
        version, tensors = value["version"], value["tensors"]
        if type(version) is not int or version != VERSION:
            raise _bad(f"the fingerprint has another version than {VERSION}; update hf_lora")
        if not isinstance(tensors, dict) or len(tensors) > MAX_TENSORS:
            raise _bad(f"the fingerprint's tensors are no object of at most {MAX_TENSORS} names")
        return cls(_decoded(tensors))


def positions(elements: int) -> list[int]:
    """Returns the row-major positions that are sampled: 32 (a few twice below 47 elements)."""
    spread = (i * _GOLDEN % 2**64 for i in range(SAMPLES))
    return [s * elements >> 64 for s in spread] if elements > SAMPLES else list(range(elements))


@torch.no_grad()
def fingerprint_of(tensors: Iterable[tuple[str, Tensor]]) -> Fingerprint:
    """Samples every floating point tensor with two or more dimensions.

    Left out: empty, integer, sparse and meta tensors, and subclasses of Tensor, which are sharded
    or quantised. Nothing is copied but the samples, and each device is waited for once a dtype.
    fp64 is rounded to fp32. Of two tensors of one name the first counts.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    indices: dict[tuple[object, ...], tuple[Tensor, ...]] = {}
    groups: dict[tuple[torch.device, torch.dtype], dict[str, Tensor]] = {}
    for name, tensor in tensors:
        if name in shapes or not _is_readable(tensor):
            continue
        key = (tensor.shape, tensor.device)
        if key not in indices:
            flat = torch.tensor(positions(tensor.numel()), device="cpu")
            unravelled = torch.unravel_index(flat, tensor.shape)
            indices[key] = tuple(i.to(tensor.device) for i in unravelled)
        plain = tensor.detach()
        # not every device can index one-byte floats
        plain = plain.view(torch.uint8) if plain.element_size() == 1 else plain
        shapes[name] = tuple(tensor.shape)
        groups.setdefault((tensor.device, tensor.dtype), {})[name] = plain[indices[key]]
    values: dict[str, Tensor] = {}
    for (_, dtype), group in groups.items():
        # one copy to the CPU a group: each copy waits for the device
        together = torch.cat(list(group.values())).view(dtype).cpu().float()
        values |= zip(group, torch.split(together, [len(v) for v in group.values()]), strict=True)
    return Fingerprint({name: Sample(shape, values[name]) for name, shape in shapes.items()})


def _is_readable(tensor: Tensor) -> bool:
    return (
        type(tensor) in (Tensor, torch.nn.Parameter)
        and tensor.dtype in _READABLE
        and tensor.layout == torch.strided
        and tensor.device.type != "meta"
        and tensor.ndim >= 2
        and tensor.numel() > 0
    )


def _encoded(values: Tensor) -> dict[str, str]:
    """Returns base64 of little-endian values, two bytes each where all are exact in bf16."""
    bits = values.view(torch.int32)
    half = bool((bits & 0xFFFF == 0).all())  # a bf16 is the upper half of an fp32
    numbers = (bits >> 16 if half else bits).tolist()
    data = struct.pack(f"<{len(numbers)}{'h' if half else 'i'}", *numbers)
    return {"bf16" if half else "fp32": base64.b64encode(data).decode("ascii")}


def _decoded(entries: Mapping[str, Any]) -> dict[str, Sample]:
    """Reads the samples of all tensors, each kind in one piece: a tensor costs more than values."""
    shapes = {name: _checked(name, entry) for name, entry in entries.items()}
    values: dict[str, Tensor] = {}
    for kind, code in (("bf16", "h"), ("fp32", "i")):
        group = {name: entry[kind] for name, entry in entries.items() if kind in entry}
        counts = [min(SAMPLES, math.prod(shapes[name])) for name in group]
        data = b"".join(
            _bytes(name, text, struct.calcsize(code) * count)
            for (name, text), count in zip(group.items(), counts, strict=True)
        )
        numbers = struct.unpack(f"<{sum(counts)}{code}", data)
        bits = torch.tensor(numbers, dtype=torch.int32, device="cpu")
        bits = bits << 16 if kind == "bf16" else bits
        values |= zip(group, torch.split(bits.view(torch.float32), counts), strict=True)
    return {name: Sample(shape, values[name]) for name, shape in shapes.items()}


def _checked(name: object, entry: object) -> tuple[int, ...]:
    """Returns the shape of a tensor whose entry is one."""
    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME or not name.isprintable():
        raise _bad(f"the fingerprint has a tensor name that is none: {str(name)[:80]!r}")
    kind = "bf16" if isinstance(entry, dict) and "bf16" in entry else "fp32"
    if not isinstance(entry, dict) or entry.keys() != {"shape", kind}:
        raise _bad(f"the fingerprint of {name} is no object of shape and either bf16 or fp32")
    return _shape(name, entry["shape"])


def _bytes(name: str, text: object, count: int) -> bytes:
    try:
        data = base64.b64decode(text.encode("ascii"), validate=True)  # type: ignore[attr-defined]
    except (AttributeError, ValueError):
        raise _bad(f"the values of {name} are not base64") from None
    if len(data) != count:
        raise _bad(f"{name} has {len(data)} bytes of values, {count} fit its shape")
    return data


def _shape(name: str, shape: Any) -> tuple[int, ...]:
    known = isinstance(shape, list) and all(type(n) is int and n > 0 for n in shape)
    if known and 2 <= len(shape) <= MAX_DIMS and math.prod(shape) < 2**63:
        return tuple(shape)
    raise _bad(f"the shape of {name} is not one that a tensor can have")


def _bad(fact: str) -> BadAdapterFile:
    return BadAdapterFile(fact, field="fingerprint")
