"""The base fingerprint: is this base the one the adapter was trained on?

A fingerprint holds at most 32 values of every weight with two or more dimensions. No hash could
compare them: the same base is loaded in fp32 here and in bf16 there. No tolerance could either: a
fine-tuned base lies nearer to its origin than one bf16 step. So casts are computed exactly. Two
bases are the same where one side is a cast of the other, bit for bit, or where some fp32 original
exists that both sides are casts of. Tensors come in with names already canonical; nothing here
knows of models.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from hf_lora.errors import BadAdapterFile, listing

VERSION = 1
SAMPLES = 32  # values a tensor
MAX_TENSORS = 200_000  # a trillion-parameter model with separate experts has about 100,000
MAX_NAME, MAX_DIMS = 1000, 16

# 2^64 over the golden ratio: its multiples modulo 2^64 spread evenly, however many are taken.
_GOLDEN = 0x9E3779B97F4A7C15

_BF16, _FP16 = torch.bfloat16, torch.float16
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_INFINITY = 0x7F800000  # the bits of fp32 infinity
_READABLE = frozenset({torch.float64, torch.float32, _FP16, _BF16, *_FP8})

Chain = tuple[torch.dtype, ...]
Kinds = tuple[torch.dtype | None, torch.dtype | None]  # 8-bit kind of the stored side, the host

# All that casts between fp32, bf16 and fp16 can do to a value, in the order of the casts. The set
# is closed: one more cast of any of these is one of these again (a test tries it). Order matters
# because fp16 has three more bits, so that fp32 -> fp16 -> bf16 rounds twice, and because its
# range is short. The last differs from fp16 -> bf16 in what overflows only.
_EARLY: tuple[Chain, ...] = ((_FP16,), (_FP16, _BF16), (_FP16, _BF16, _FP16))  # fp16 came first
_LATE: tuple[Chain, ...] = ((_BF16,), (_BF16, _FP16))
_CHAINS: tuple[Chain, ...] = ((), *_EARLY, *_LATE)

# Where both sides are rounded, the original is unknown, and 1/16 of the values may differ by one
# bf16 step: fp16 took them to a bf16 tie, and the tie to its other side. The side that was fp16
# first then has the even one of the two. A changed base steps either way, so each step that goes
# right halves its chance to pass: ten of them leave 1 in 512 (there are two sides).
_ENOUGH_STEPS = 10

# How well a tensor fits, from best to worst; the worst tensor decides.
State = Literal["matched", "rounded", "unverified", "mismatched"]
_GRADES: tuple[State, ...] = get_args(State)
_ROUNDED, _DOUBTFUL, _WRONG = 1, 2, 3


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
        return cls({name: _sample(name, entry) for name, entry in tensors.items()})


@dataclass(frozen=True)
class Verdict:
    """What a comparison of two fingerprints says.

    Attributes:
        state: `matched`: one side is a cast of the other. `rounded`: both are casts of one
            original. `mismatched`: another base. `unverified`: too little to tell.
        differing: Tensors with another shape, or with values that no cast explains.
        compared: Number of tensors of one name and shape on both sides.
        absent: Tensors of the stored fingerprint that the host lacks.
        share: Part of the compared samples, 0 to 1, in which neither is a cast of the other.
        text: The verdict as one sentence for a report.
    """

    state: State
    differing: tuple[str, ...]
    compared: int
    absent: tuple[str, ...]
    share: float
    text: str


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


def compare(stored: Fingerprint, host: Fingerprint) -> Verdict:
    """Decides whether the host's base is the one that the stored fingerprint was taken of.

    A tensor is the same where one of the casts turns all samples of one side into those of the
    other, bit for bit. What is left must have a common original, sample by sample, with the same
    side rounded to fp16 first in all tensors. A tensor that has none makes the base another one.
    Tensors that only the host has do not count.
    """
    absent = tuple(name for name in stored.tensors if name not in host.tensors)
    shared = [name for name in stored.tensors if name in host.tensors]
    alike = [n for n in shared if stored.tensors[n].shape == host.tensors[n].shape]
    if not shared or len(shared) < len(absent):
        text = f"the host has {len(shared)} of {len(stored.tensors)} weights by their names"
        return Verdict("unverified", (), 0, absent, 0.0, f"not verified: {text}")
    with torch.device("cpu"):  # whatever the user's default device
        pairs = _Pairs.of([(stored.tensors[n].values, host.tensors[n].values) for n in alike])
        kinds = _eight_bit(pairs, pairs.stored), _eight_bit(pairs, pairs.host)
        exact, explained = _casts(pairs, kinds)
        found = _grades(pairs, exact, explained, kinds)
    grades = dict.fromkeys(shared, _WRONG) | dict(zip(alike, found, strict=True))
    differing = tuple(name for name, grade in grades.items() if grade >= _DOUBTFUL)
    odd, state = int((~explained).sum()), _GRADES[max(grades.values())]
    text = _text(state, len(alike), odd, differing)
    return Verdict(state, differing, len(alike), absent, odd / max(1, len(explained)), text)


def _text(state: State, compared: int, odd: int, differing: tuple[str, ...]) -> str:
    if state == "mismatched":
        return f"mismatched: {len(differing)} weights are other ones: {listing(differing)}"
    if state == "unverified":
        return f"not verified: rounding may explain {odd} samples in {listing(differing)}"
    how = " up to rounding" if state == "rounded" else ""
    return f"matched{how}: {compared} weights are those of the training base"


@dataclass(frozen=True)
class _Pairs:
    """The samples of all compared tensors, one behind the other: fp32, (samples,) each.

    Attributes:
        owner: int64, (samples,): the number of the tensor that a sample belongs to.
        count: Number of tensors.
    """

    stored: Tensor
    host: Tensor
    owner: Tensor
    count: int

    @classmethod
    def of(cls, values: list[tuple[Tensor, Tensor]]) -> _Pairs:
        lengths = torch.tensor([len(stored) for stored, _ in values], dtype=torch.int64)
        none = torch.empty(0, dtype=torch.float32)
        return cls(
            torch.cat([none, *(stored for stored, _ in values)]),
            torch.cat([none, *(host for _, host in values)]),
            torch.arange(len(values)).repeat_interleave(lengths),
            len(values),
        )

    def whole(self, fits: Tensor) -> Tensor:
        """Returns, for each tensor, whether all its samples fit. bool (samples,) -> (tensors,)."""
        return torch.bincount(self.owner[~fits], minlength=self.count) == 0

    def of_tensors(self, chosen: Tensor) -> _Pairs:
        """Returns the samples of the chosen tensors only; the tensors keep their numbers."""
        keep = chosen[self.owner]
        return _Pairs(self.stored[keep], self.host[keep], self.owner[keep], self.count)


def _grades(pairs: _Pairs, exact: Tensor, explained: Tensor, kinds: Kinds) -> list[int]:
    """Returns for each tensor an index into `_GRADES`."""
    if bool(exact.all()):
        return [0] * pairs.count
    rest = ~exact & pairs.whole(_is_half(pairs.stored) & _is_half(pairs.host))
    answers = _common_originals(pairs.of_tensors(rest))
    # One side was fp16 first in the whole base: the one that explains more tensors.
    fits = max((f & rest for f in answers), key=lambda f: int(f.sum()))
    steps = int((~explained & fits[pairs.owner]).sum())
    # If one side only is in 8 bits, it may be scaled, and the scale is not known here.
    grades = torch.where(exact, 0, _WRONG if kinds[0] == kinds[1] else _DOUBTFUL)
    grades[fits] = _ROUNDED if steps >= _ENOUGH_STEPS else _DOUBTFUL
    return [int(grade) for grade in grades]


def _casts(pairs: _Pairs, kinds: Kinds) -> tuple[Tensor, Tensor]:
    """Returns the tensors that one cast of a side fits, and the samples that any fits. bool."""
    exact, explained = (torch.zeros(n, dtype=torch.bool) for n in (pairs.count, len(pairs.owner)))
    stored, host = pairs.stored, pairs.host
    for original, copy, kind in ((stored, host, kinds[1]), (host, stored, kinds[0])):
        for chain in (*_CHAINS, *((*c, kind) for c in _CHAINS if kind)):
            fits = _same(_cast(original, chain), copy)
            exact |= pairs.whole(fits)
            explained |= fits
            if bool(exact.all()):  # most often at once: no cast is needed
                break
    return exact, explained


def _common_originals(pairs: _Pairs) -> tuple[Tensor, Tensor]:
    """Returns the tensors with a common original if the host, or else the stored side, was fp16.

    Casts keep the order of values, so what can become a given value is an interval. Two samples
    have a common original where their intervals meet. bool (tensors,) each.
    """
    nan = pairs.stored.isnan() & pairs.host.isnan()
    answers = []
    for first, second in ((pairs.host, pairs.stored), (pairs.stored, pairs.host)):
        answer = torch.zeros(pairs.count, dtype=torch.bool)
        lates = [_originals(second, chain) for chain in _LATE]
        for least, most in (_originals(first, chain) for chain in _EARLY):
            for low, high in lates:
                meet = torch.maximum(least, low) <= torch.minimum(most, high)
                answer |= pairs.whole(meet | nan)
        answers.append(answer)
    return answers[0], answers[1]


def _originals(values: Tensor, chain: Chain) -> tuple[Tensor, Tensor]:
    """Returns the least and the greatest key of the fp32 values that the casts turn into `values`.

    The least is above the greatest where there are none (for NaN). int64, (samples,) each.
    """
    keys, back = torch.unique(
        _key(values), return_inverse=True
    )  # half precision has 65,536 at most
    least, above = _first(torch.stack([keys, keys + 1]), chain)
    return least[back], above[back] - 1


def _first(wanted: Tensor, chain: Chain) -> Tensor:
    """Returns the least key whose value, cast, has at least the wanted key, by bisection."""
    low, high = torch.full_like(wanted, -_INFINITY - 1), torch.full_like(wanted, _INFINITY + 1)
    for _ in range(32):  # halves at most 2^32 keys down to one
        middle = ((low + high) >> 1).clamp(max=_INFINITY)  # above are NaN
        reaches = _key(_cast(_value(middle), chain)) >= wanted
        low, high = torch.where(reaches, low, middle + 1), torch.where(reaches, middle, high)
    return low


def _key(values: Tensor) -> Tensor:
    """Numbers all fp32 values in their order, -0 before 0. fp32 -> int64."""
    bits = values.view(torch.int32)
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()


def _value(keys: Tensor) -> Tensor:
    """Inverts `_key`."""
    bits = keys.int()
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).view(torch.float32)


def _cast(values: Tensor, chain: Chain) -> Tensor:
    for dtype in chain:
        values = values.to(dtype).float()
    return values


def _is_half(values: Tensor) -> Tensor:
    return _same(_cast(values, (_BF16,)), values) | _same(_cast(values, (_FP16,)), values)


def _same(a: Tensor, b: Tensor) -> Tensor:
    """Compares bit for bit; all NaN are one, because casts do not keep their bits."""
    return (a.view(torch.int32) == b.view(torch.int32)) | (a.isnan() & b.isnan())


def _eight_bit(pairs: _Pairs, values: Tensor) -> torch.dtype | None:
    """Returns the 8-bit kind that more than half of a side's tensors are exact in, or None.

    Of a side, not of a tensor: zeros are exact in 8 bits, and a tensor of zeros must not pass for
    a rounded copy of one that a fine-tuning has moved a little.
    """
    filled = ~pairs.whole(values == 0)
    for kind in _FP8:
        exact = pairs.whole(_same(_cast(values, (kind,)), values)) & filled
        if 2 * int(exact.sum()) > int(filled.sum()):
            return kind
    return None


def _encoded(values: Tensor) -> dict[str, str]:
    """Returns base64 of little-endian values, two bytes each where all are exact in bf16."""
    bits = values.view(torch.int32)
    half = bool((bits & 0xFFFF == 0).all())  # a bf16 is the upper half of an fp32
    numbers = (bits >> 16 if half else bits).tolist()
    data = struct.pack(f"<{len(numbers)}{'h' if half else 'i'}", *numbers)
    return {"bf16" if half else "fp32": base64.b64encode(data).decode("ascii")}


def _sample(name: object, entry: object) -> Sample:
    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME or not name.isprintable():
        raise _bad(f"the fingerprint has a tensor name that is none: {str(name)[:80]!r}")
    kind = "bf16" if isinstance(entry, dict) and "bf16" in entry else "fp32"
    if not isinstance(entry, dict) or entry.keys() != {"shape", kind}:
        raise _bad(f"the fingerprint of {name} is no object of shape and either bf16 or fp32")
    shape = _shape(name, entry["shape"])
    count = min(SAMPLES, math.prod(shape))
    width, code = (2, "h") if kind == "bf16" else (4, "i")
    try:
        data = base64.b64decode(entry[kind].encode("ascii"), validate=True)
    except (AttributeError, ValueError):
        raise _bad(f"the values of {name} are not base64") from None
    if len(data) != width * count:
        raise _bad(f"{name} has {len(data)} bytes of values, {width * count} fit its shape")
    bits = torch.tensor(struct.unpack(f"<{count}{code}", data), dtype=torch.int32, device="cpu")
    return Sample(shape, (bits << 16 if kind == "bf16" else bits).view(torch.float32))


def _shape(name: str, shape: Any) -> tuple[int, ...]:
    known = isinstance(shape, list) and all(type(n) is int and n > 0 for n in shape)
    if known and 2 <= len(shape) <= MAX_DIMS and math.prod(shape) < 2**63:
        return tuple(shape)
    raise _bad(f"the shape of {name} is not one that a tensor can have")


def _bad(fact: str) -> BadAdapterFile:
    return BadAdapterFile(fact, field="fingerprint")
