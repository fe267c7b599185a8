"""Layers that the original repository holds as one: their factors put together, or not at all.

The inverse of `kinds.divided`. Parts that share A stay one factor; others become blocks on a
diagonal, of the sum of their ranks; a part without factors is a block of zeros.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hf_lora.errors import BadAdapterFile, listing
from hf_lora.formats.kinds import Loose
from hf_lora.formats.kinds.loose import ALPHA, SCALE, alpha_for, alpha_tensor, equal
from hf_lora.formats.names import Piece

_WITH_ROWS = ("lora_B", "hada_w1_a", "hada_w2_a", SCALE)  # of linears; cores are on kernels only
_APART = "Convert it to a format that keeps them apart, such as diffusers."
_OUTER = ("lokr_w1", "lokr_w1_a")
_HADA = (("hada_w1_a", "hada_w1_b"), ("hada_w2_a", "hada_w2_b"))


def joined(name: str, pieces: Sequence[Piece], found: Mapping[str, Loose]) -> Loose:
    """Returns the factors of one foreign layer from those of the host's layers.

    Args:
        name: The foreign layer, for messages.
        pieces: Where its output features lie on the host, see `native_names`.
        found: Host path -> factors; paths of some pieces may be absent.

    Raises:
        BadAdapterFile: No single layer computes the same.
    """
    held = [found.get(piece.path) for piece in pieces]
    first = next(loose for loose in held if loose is not None)
    if len(pieces) == 1:
        return _swapped(name, first) if pieces[0].swapped else first
    kinds = {_kind(loose) for loose in held if loose is not None}
    if kinds == {"lora"}:
        return _lora(name, pieces, held)
    if kinds == {"hada"} and None not in held and _share(held, ("hada_w1_b", "hada_w2_b", "alpha")):
        factors = dict(first.factors)
        for rows, _ in _HADA:
            factors[rows] = _stacked([x.factors[rows] for x in held if x is not None])
        return Loose(factors, first.keys)
    raise BadAdapterFile(
        f"{listing(p.path for p in pieces)} are one layer in that format, {name}, which could not "
        f"hold their {' and '.join(sorted(kinds)).upper()} factors exactly",
        fix=_APART,
    )


def _kind(loose: Loose) -> str:
    return next(iter(loose.factors)).split("_")[0] if "lora_A" not in loose.factors else "lora"


def _share(held: Sequence[Loose | None], names: Sequence[str]) -> bool:
    """Tells whether all parts have equal factors of these names."""
    first, *others = [loose.factors for loose in held if loose is not None]
    return all(_equal(first.get(n), other.get(n)) for n in names for other in others)


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return equal(one, other)


def _swapped(name: str, loose: Loose) -> Loose:
    """Returns the layer with the halves of its output features exchanged."""
    factors = dict(loose.factors)
    rows = _halved(name, loose) if _kind(loose) == "lokr" else _WITH_ROWS
    for factor in rows:
        if factor in factors:
            factors[factor] = torch.cat(factors[factor].chunk(2)[::-1])
    return Loose(factors, loose.keys)


def _halved(name: str, loose: Loose) -> tuple[str, ...]:
    """Returns the factor of a LoKr whose halves are those of the product: the outer one's."""
    outer = next(factor for factor in _OUTER if factor in loose.factors)
    count = len(loose.factors[outer])
    if count % 2:
        raise BadAdapterFile(
            f"that format has the halves of {name} in the other order, and its LoKr has {count} "
            "blocks of rows, which have no halves",
            fix="Convert it to a format that has the host's order, such as diffusers.",
        )
    return (outer,)


def _lora(name: str, pieces: Sequence[Piece], held: Sequence[Loose | None]) -> Loose:
    parts = [loose for loose in held if loose is not None]
    having = [SCALE in loose.factors for loose in parts]
    if any(having) and not (all(having) and None not in held):
        raise BadAdapterFile(
            f"only some of {listing(p.path for p in pieces)}, which are one layer in that "
            f"format, have a {SCALE}",
            fix=_APART,
        )
    whole = {SCALE: _stacked([loose.factors[SCALE] for loose in parts])} if any(having) else {}
    if None not in held and _share(held, ("lora_A", ALPHA)):
        b = _stacked([loose.factors["lora_B"] for loose in parts])
        return Loose({**parts[0].factors, "lora_B": b, **whole}, parts[0].keys)
    scaling, ratios = _scalings(name, parts)
    a = _stacked([loose.factors["lora_A"] for loose in parts])
    blocks: list[Tensor] = []
    column, ratio = 0, iter(ratios)
    for piece, loose in zip(pieces, held, strict=True):
        assert piece.rows is not None  # a layer in several parts says which rows are whose
        b = (loose or parts[0]).factors["lora_B"]
        rows = b.new_zeros(piece.rows[1] - piece.rows[0], len(a))
        if loose is not None:
            rows[:, column : column + b.shape[1]] = _times(name, b, next(ratio))
            column += b.shape[1]
        blocks.append(rows)
    alpha = alpha_tensor(alpha_for(scaling, len(a)))
    keys = tuple(key for loose in parts for key in loose.keys)
    return Loose({"lora_A": a, "lora_B": _stacked(blocks), ALPHA: alpha, **whole}, keys)


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    """Returns the rows of all, in the one dtype they have or in one that holds all of theirs."""
    kinds = {t.dtype for t in tensors}
    if len(kinds) == 1:
        return torch.cat(list(tensors))
    wide = torch.float64 if torch.float64 in kinds else torch.float32
    return torch.cat([t.to(wide) for t in tensors])


def _times(name: str, b: Tensor, ratio: float) -> Tensor:
    """Returns B times a power of two, exactly; half precision and less may not reach so far."""
    if ratio == 1:
        return b
    wide = b.double() * ratio
    done = wide.to(b.dtype)
    if not torch.equal(done.double(), wide):
        kind = str(b.dtype).removeprefix("torch.")
        raise BadAdapterFile(
            f"a part of {name} would have to be multiplied by {ratio:g}, which {kind} values "
            "could only hold by rounding",
            fix=_APART,
        )
    return done


def _scalings(name: str, parts: Sequence[Loose]) -> tuple[float, list[float]]:
    """Returns the scaling of the whole, and what each part's B is multiplied by, exactly."""
    each = []
    for loose in parts:
        rank = len(loose.factors["lora_A"])
        each.append(float(loose.factors["alpha"]) / rank if "alpha" in loose.factors else 1.0)
    ratios = [value / each[0] for value in each]
    if any(math.frexp(abs(ratio))[0] != 0.5 for ratio in ratios):  # no power of two
        raise BadAdapterFile(
            f"the parts of {name} have the scalings {listing(f'{x:g}' for x in each)}, which one "
            "layer could only hold by rounding",
            fix=_APART,
        )
    return each[0], ratios
