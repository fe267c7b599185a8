"""LoKr: the Kronecker product of two factors, each whole or of low rank (arXiv 2309.14859).

delta = scaling kron(w1, w2), w1: (p, m), w2: (k, n, kernel...), p k = out, m n = in. Of low rank
are w1 = w1_a w1_b and w2 = w2_a w2_b with a: (k, rank), b: (rank, n kernel...), or with a core on
kernels larger than 1, t2: (rank, rank, kernel...), a: (rank, k), b: (rank, n). alpha/rank counts
only where one of the two is of low rank. Sources: lycoris-lora 4.1.3 `modules/lokr.py`, peft 0.21.2
`tuners/lokr/layer.py`.

peft makes the sizes of all layers from one `decompose_factor` and one `decompose_both`; they are
found here by what peft would make of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from torch import Tensor

from hf_lora.adapter import Component
from hf_lora.errors import BadAdapterFile
from hf_lora.formats.kinds.loose import (
    ALPHA,
    Loose,
    Shape,
    alpha_of,
    alpha_tensor,
    broken,
    check_core,
    check_floating,
    check_held,
    check_one_alpha,
    check_present,
    config_of,
    fitted,
    host_shape,
    rows_of,
    size,
    unfit,
)
from hf_lora.formats.names import Names, Piece

W1, W1_A, W1_B = "lokr_w1", "lokr_w1_a", "lokr_w1_b"
W2, W2_A, W2_B, CORE = "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"
FACTORS = (W1, W1_A, W1_B, W2, W2_A, W2_B, CORE)
_FIX = "Merge it with the program that made it."


class _Sizes(NamedTuple):
    """What there is on one layer; `rank` is 0 where both factors are whole."""

    outer: tuple[int, int]
    inner: tuple[int, int]
    rank: int
    low_outer: bool
    low_inner: bool
    core: bool
    host: Shape


def width_of(path: str, loose: Loose) -> int:
    """Returns the number of output features."""
    outer, inner = _heights(path, loose)
    return outer * inner


def _heights(path: str, loose: Loose) -> tuple[int, int]:
    """Returns how many rows w1 and w2 have."""
    _check_factors(path, loose)
    factors = loose.factors
    outer = factors[W1 if W1 in factors else W1_A].shape[0]
    return outer, factors[W2 if W2 in factors else W2_A].shape[1 if CORE in factors else 0]


def part_of(path: str, loose: Loose, piece: Piece) -> Loose:
    """Returns the piece's rows, where they are rows of one of the two factors.

    Row i k + j of the product is row i of w1 with row j of w2.

    Raises:
        BadAdapterFile: The piece begins or ends within a row of w1.
    """
    outer, inner = _heights(path, loose)
    first, end = piece.rows or (0, outer * inner)
    half = (end - first) // 2 if piece.swapped else 0
    factors = dict(loose.factors)
    if first % inner == 0 == end % inner and half % inner == 0:
        name = W1 if W1 in factors else W1_A
        rows = (first // inner, end // inner)
        factors[name] = rows_of(factors[name], Piece(path, rows, piece.swapped))
        return Loose(factors, loose.keys)
    row = first // inner
    if (end - 1) // inner == row:
        name = W1 if W1 in factors else W1_A
        factors[name] = rows_of(factors[name], Piece(path, (row, row + 1)))
        name, axis = (W2, 0) if W2 in factors else (W2_A, 1 if CORE in factors else 0)
        rows = (first - row * inner, end - row * inner)
        factors[name] = rows_of(factors[name], Piece(path, rows, piece.swapped), axis)
        return Loose(factors, loose.keys)
    raise broken(
        path,
        loose,
        f"there is a LoKr on a layer whose output features {first} to {end} are "
        f"{'turned' if half else 'apart'} on the host, and it can be cut at multiples of {inner} "
        "only",
        fix=_FIX,
    )


def component(layers: Mapping[str, Loose], names: Names) -> Component:
    """Returns the layers as a LoKr of peft.

    Raises:
        BadAdapterFile: A layer is incomplete, or no one config of peft makes all of these sizes.
        AdapterMismatch: A layer has another shape than the host's.
    """
    sizes = {path: _sizes(path, loose, names) for path, loose in layers.items()}
    distinct: dict[_Sizes, str] = {}
    for path, held in sizes.items():
        distinct.setdefault(held, path)
    both = any(held.low_outer for held in distinct)
    effective = _effective(distinct, layers)
    factor = _factor(distinct, layers)
    for held, path in distinct.items():
        _check_ranks(held, path, layers[path], both=both)
    # one rank for all that are whole: it only has to be large enough
    whole = max((_least(held, both=both) for held in distinct if not held.rank), default=0)
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    targets: dict[str, dict[str, Tensor]] = {}
    for path, loose in layers.items():
        held = sizes[path]
        ranks[path] = held.rank or whole
        alphas[path] = alpha_of(path, loose, held.rank) if held.rank else whole
        targets[path] = fitted(path, loose, _shapes(held), held.host)
    config = config_of("LOKR", "alpha", ranks, alphas)
    config |= {
        "decompose_both": both,
        "decompose_factor": factor,
        "use_effective_conv2d": effective,
    }
    return Component(config, targets)


def _check_factors(path: str, loose: Loose) -> None:
    """Checks that w1 and w2 are there, each in one form and whole."""
    factors = loose.factors
    for whole, a, b in ((W1, W1_A, W1_B), (W2, W2_A, W2_B)):
        if whole in factors and (a in factors or b in factors):
            part = a if a in factors else b
            raise broken(path, loose, f"there is {whole} and {part} as well", part)
        if whole not in factors and not (a in factors or b in factors):
            check_present(path, loose, (whole,))
        check_present(path, loose, (whole,) if whole in factors else (a, b))
    if CORE in factors:
        check_present(path, loose, (W2_A, W2_B))
    check_floating(path, loose)
    for name, tensor in factors.items():
        if name != ALPHA and tensor.ndim < (3 if name == CORE else 2):
            raise broken(path, loose, f"{name} is {size(tensor)}, no matrix", name)


def _sizes(path: str, loose: Loose, names: Names) -> _Sizes:
    """Returns the sizes of a layer's factors, checked against each other and the host."""
    shape = host_shape(path, loose, names)
    check_held(path, loose, shape, "LoKr")
    _check_factors(path, loose)
    check_one_alpha(path, loose)  # its value does not count where both are whole
    factors = loose.factors
    low_outer, low_inner, core = W1 not in factors, W2 not in factors, CORE in factors
    height = _heights(path, loose)
    width = factors[W1_B if low_outer else W1].shape[1]
    depth = factors[W2_B if low_inner else W2].shape[1]
    if low_inner and not core and factors[W2_B].ndim == 2:
        depth //= math.prod(shape[2:])
    found = _Sizes(
        (height[0], width),
        (height[1], depth),
        _rank(path, loose),
        low_outer,
        low_inner,
        core,
        shape,
    )
    if height[0] * height[1] != shape[0] or width * depth != shape[1]:
        raise unfit(
            path,
            loose,
            f"the adapter is for another size: a LoKr of {found.outer} and {found.inner}, and the "
            f"host weight is {shape}",
        )
    if core and all(side == 1 for side in shape[2:]):
        raise unfit(
            path, loose, f"there is a core of a kernel, and the host weight is {shape}", CORE
        )
    if len(shape) == 3 and not low_inner:
        raise broken(
            path,
            loose,
            "there is a whole LoKr factor on a one-dimensional convolution, where peft 0.21.2 "
            "computes another product than LyCORIS",
            W2,
            fix=_FIX,
        )
    return found


def _rank(path: str, loose: Loose) -> int:
    """Returns the one rank of a layer's factors; 0 where both are whole."""
    factors = loose.factors
    ranks: dict[str, int] = {}
    if W1 not in factors:
        ranks |= {W1_A: factors[W1_A].shape[1], W1_B: factors[W1_B].shape[0]}
    if W2 not in factors:
        axis = 0 if CORE in factors else 1
        ranks |= {W2_A: factors[W2_A].shape[axis], W2_B: factors[W2_B].shape[0]}
    if CORE in factors:
        ranks |= {CORE: factors[CORE].shape[0], f"{CORE}, second": factors[CORE].shape[1]}
    if 0 in ranks.values() or len(set(ranks.values())) > 1:
        raise broken(path, loose, f"the ranks of the factors are {ranks}", next(iter(ranks)))
    return next(iter(ranks.values()), 0)


def _effective(distinct: Mapping[_Sizes, str], layers: Mapping[str, Loose]) -> bool:
    """Returns `use_effective_conv2d`: whether kernels are in cores.

    Raises:
        BadAdapterFile: They are at some layers only.
    """
    low = [held for held in distinct if held.low_inner and any(k != 1 for k in held.host[2:])]
    forms = {held.core: distinct[held] for held in low}
    if len(forms) == 2:
        raise broken(
            forms[False],
            layers[forms[False]],
            f"the kernel is in a factor, and at {forms[True]} it is in a core (Tucker); peft has "
            "one or the other on all convolutions of an adapter",
            fix="Load them as two adapters.",
        )
    return True in forms


def _least(held: _Sizes, *, both: bool) -> int:
    """Returns the least rank at which peft makes both factors of a layer whole."""
    sides = held.inner + held.outer if both else held.inner
    return (max(sides) + 1) // 2


def _check_ranks(held: _Sizes, path: str, loose: Loose, *, both: bool) -> None:
    """Checks that peft makes of low rank what is so here, and nothing else.

    Raises:
        BadAdapterFile: It would not.
    """
    if not held.rank:
        return
    rows = (
        ("first", held.low_outer, both and held.rank < max(held.outer) / 2, held.outer),
        ("second", held.low_inner, held.rank < max(held.inner) / 2, held.inner),
    )
    for which, low, made, shape in rows:
        if low != made:
            forms = ("whole", f"of rank {held.rank}")
            raise broken(
                path,
                loose,
                f"the {which} LoKr factor {shape} is {forms[low]}, and beside the others peft "
                f"would have it {forms[made]}",
                fix=_FIX,
            )


def _factor(distinct: Mapping[_Sizes, str], layers: Mapping[str, Loose]) -> int:
    """Returns the `decompose_factor` that makes all sizes.

    Raises:
        BadAdapterFile: There is none.
    """
    found = next(_factors_of(pair for held in distinct for pair in _pairs(held)), None)
    if found is not None:
        return found
    alone = (held for held in distinct if next(_factors_of(_pairs(held)), None) is None)
    held = next(alone, None)
    if held is None:
        held = max(distinct, key=lambda each: each.outer)
        why = "which one factor makes, but no one factor makes the sizes of all layers"
    else:
        why = (
            "which LyCORIS makes by unbalanced_factorization, or by a factor above the root of a "
            "size, and peft by no factor"
        )
    path = distinct[held]
    raise broken(
        path,
        layers[path],
        f"the LoKr factors are {held.outer} and {held.inner}, {why}; peft has one decompose_factor "
        "for an adapter, and no other way to say sizes",
        fix=_FIX,
    )


def _pairs(held: _Sizes) -> tuple[tuple[int, int], tuple[int, int]]:
    """Returns how the output and the input features are factorised."""
    return (held.outer[0], held.inner[0]), (held.outer[1], held.inner[1])


def _factors_of(pairs: Iterable[tuple[int, int]]) -> Iterator[int]:
    """Yields the factors from which peft makes all of these pairs, of those that could.

    peft takes a factor that divides a size, else the largest divisor below it: so it is at least
    the largest first number. Above all square roots every factor does as -1, which sets no bound.
    """
    from peft.tuners.lokr.layer import factorization

    distinct = set(pairs)
    wanted = {first * second: (first, second) for first, second in distinct}
    if len(wanted) < len(distinct):
        return  # two for one size
    least = max(first for first, _ in distinct)
    most = math.isqrt(max(wanted))
    for factor in (-1, least, *range(least + 1, most + 1)):
        if all(factorization(size, factor) == pair for size, pair in wanted.items()):
            yield factor


def _shapes(held: _Sizes) -> dict[str, Shape]:
    """Returns the shapes that peft gives the factors of a layer."""
    (p, m), (k, n), rank, kernel = held.outer, held.inner, held.rank, held.host[2:]
    first = {W1_A: (p, rank), W1_B: (rank, m)} if held.low_outer else {W1: (p, m)}
    if held.core:
        core = (rank, rank, *(*kernel, 1)[:2])
        return {**first, W2_A: (rank, k), W2_B: (rank, n), CORE: core}
    if held.low_inner:
        return {**first, W2_A: (k, rank), W2_B: (rank, n * math.prod(kernel))}
    return {**first, W2: (k, n, *kernel)}


def loose(component: Component, path: str) -> dict[str, Tensor]:
    """Returns a target's factors as LyCORIS has them.

    Raises:
        BadAdapterFile: Two whole factors are scaled, or a core may be of one or two dimensions.
    """
    factors = dict(component.targets[path])
    if CORE in factors:
        check_core(path, factors[CORE])
    alpha, rank = component.alpha(path), component.stated_rank(path)
    if W1 in factors and W2 in factors and alpha != rank:
        raise BadAdapterFile(
            f"at {path} two whole LoKr factors have the scaling {alpha / rank:g}, and in LyCORIS "
            "files alpha does not count there",
            fix="Save it in the peft layout.",
            field=path,
        )
    return {**factors, ALPHA: alpha_tensor(alpha)}
