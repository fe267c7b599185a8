"""Is this base the one the adapter was trained on? Two fingerprints, compared.

No hash could compare them: the same base is loaded in fp32 here and in bf16 there. No tolerance
could either: a fine-tuned base lies nearer to its origin than one bf16 step. So casts are computed
exactly. Two bases are the same where one side is a cast of the other, bit for bit, or where some
fp32 original exists that both sides are casts of.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from hf_lora.errors import listing
from hf_lora.fingerprint import FP8, Fingerprint, Sample

_BF16, _FP16 = torch.bfloat16, torch.float16
_INFINITY = 0x7F800000  # the bits of fp32 infinity

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

# Modules whose rows are the tokens of a vocabulary, by the ends of their paths in transformers 5.23
# (`get_input_embeddings`, `get_output_embeddings` and the ties between them). New tokens make them
# longer, as a textual inversion and `resize_token_embeddings` do, and the base stays the same one.
_VOCABULARIES = (
    "embed_tokens", "word_embeddings", "word_embedding", "token_embedding", "tok_embeddings",
    "tokens_embed", "embeddings", "wte", "shared", "embed_in", "embed_out", "lm_head",
    "lm_head.decoder", "generator_lm_head", "predictions.decoder", "vocab_projector",
    "output_projection", "lm_loss",
)  # fmt: skip

# How well a tensor fits, from best to worst; the worst tensor decides.
State = Literal["matched", "rounded", "unverified", "mismatched"]
_GRADES: tuple[State, ...] = get_args(State)
_ROUNDED, _DOUBTFUL, _WRONG = 1, 2, 3


@dataclass(frozen=True)
class Verdict:
    """What a comparison of two fingerprints says.

    Attributes:
        state: `matched`: one side is a cast of the other. `rounded`: both are casts of one
            original. `mismatched`: another base. `unverified`: too little to tell.
        differing: Tensors with another shape, or with values that no cast explains.
        compared: Number of tensors of one name and shape on both sides.
        absent: Tensors of the stored fingerprint that the host lacks.
        resized: Embeddings of another number of tokens, which cannot be compared.
        share: Part of the compared samples, 0 to 1, in which neither is a cast of the other.
        text: The verdict as one sentence for a report.
    """

    state: State
    differing: tuple[str, ...]
    compared: int
    absent: tuple[str, ...]
    resized: tuple[str, ...]
    share: float
    text: str


def compare(stored: Fingerprint, host: Fingerprint) -> Verdict:
    """Decides whether the host's base is the one that the stored fingerprint was taken of.

    A tensor is the same where one of the casts turns all samples of one side into those of the
    other, bit for bit. What is left must have a common original, sample by sample, with the same
    side rounded to fp16 first in all tensors. A tensor that has none makes the base another one.
    Tensors that only the host has do not count, nor do embeddings of another number of tokens.
    """
    absent = tuple(name for name in stored.tensors if name not in host.tensors)
    shared = [name for name in stored.tensors if name in host.tensors]
    resized = tuple(n for n in shared if _is_resized(n, stored.tensors[n], host.tensors[n]))
    alike = [n for n in shared if stored.tensors[n].shape == host.tensors[n].shape]
    if not shared or len(shared) < len(absent) or len(resized) == len(shared):
        text = f"the host has {len(shared)} of {len(stored.tensors)} weights by their names"
        text += _about(resized)
        return Verdict("unverified", (), 0, absent, resized, 0.0, f"not verified: {text}")
    with torch.device("cpu"):  # whatever the user's default device
        pairs = _Pairs.of([(stored.tensors[n].values, host.tensors[n].values) for n in alike])
        exact, explained, kinds = _casts(pairs)
        found = _grades(pairs, exact, explained, kinds)
    unequal = [n for n in shared if n not in resized]
    grades = dict.fromkeys(unequal, _WRONG) | dict(zip(alike, found, strict=True))
    differing = tuple(name for name, grade in grades.items() if grade >= _DOUBTFUL)
    odd, state = int((~explained).sum()), _GRADES[max(grades.values())]
    text = _text(state, len(alike), odd, differing) + _about(resized)
    share = odd / max(1, len(explained))
    return Verdict(state, differing, len(alike), absent, resized, share, text)


def _is_resized(name: str, stored: Sample, host: Sample) -> bool:
    """Tells whether two embeddings differ in the number of their tokens alone."""
    known = f".{name}".endswith(tuple(f".{end}.weight" for end in _VOCABULARIES))
    rows, others = stored.shape[:1], host.shape[:1]
    return known and rows != others and stored.shape[1:] == host.shape[1:]


def _about(resized: tuple[str, ...]) -> str:
    if not resized:
        return ""
    return f"; {len(resized)} of another number of tokens not compared: {listing(resized)}"


def is_cast(copy: Tensor, own: Tensor) -> bool:
    """Tells whether all values of a copy are those of the host's weight, up to casts."""
    if copy.is_floating_point() != own.is_floating_point():
        return False  # whole numbers are no copy of what they are the whole part of
    if torch.equal(own, copy.to(own.dtype)) or torch.equal(own.to(copy.dtype), copy):
        return True
    if {copy.dtype, own.dtype} != {torch.float16, torch.bfloat16} or copy.shape != own.shape:
        return False
    # Neither is a cast of the other, but both can be of one fp32 original. Each pair of values is
    # looked at once: there are few, and a vocabulary may have hundreds of millions.
    first, second = (t.contiguous().view(torch.int16).int() for t in (copy, own))
    pairs = torch.unique(first << 16 | second & 0xFFFF)
    halves = (pairs >> 16, copy.dtype), (pairs, own.dtype)
    prints = [
        Fingerprint({"copy": Sample((), x.to(torch.int16).view(d).float())}) for x, d in halves
    ]
    return compare(*prints).state in ("matched", "rounded")


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


def _casts(pairs: _Pairs) -> tuple[Tensor, Tensor, Kinds]:
    """Returns the tensors that one cast of a side fits, and the samples that any fits. bool.

    The 8-bit kinds are looked for where something is left that needs them.
    """
    stored, host = pairs.stored, pairs.host
    explained = _same(stored, host)
    exact = pairs.whole(explained)
    if bool(exact.all()):  # most often: no cast is needed
        return exact, explained, (None, None)
    kinds = _eight_bit(pairs, stored), _eight_bit(pairs, host)
    for original, copy, kind in ((stored, host, kinds[1]), (host, stored, kinds[0])):
        for chain in (*_CHAINS[1:], *((*c, kind) for c in _CHAINS if kind)):
            fits = _same(_cast(original, chain), copy)
            exact |= pairs.whole(fits)
            explained |= fits
            if bool(exact.all()):
                return exact, explained, kinds
    return exact, explained, kinds


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
    for kind in FP8:
        exact = pairs.whole(_same(_cast(values, (kind,)), values)) & filled
        if 2 * int(exact.sum()) > int(filled.sum()):
            return kind
    return None
