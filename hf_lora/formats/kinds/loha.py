"""LoHa: the elementwise product of two low-rank matrices (arXiv 2108.06098).

delta = scaling (w1_a w1_b) * (w2_a w2_b), a: (out, rank), b: (rank, in kernel...). With cores, on
kernels larger than 1, t: (rank, rank, kernel...), a: (rank, out), b: (rank, in). Sources:
lycoris-lora 4.1.3 `modules/loha.py`, peft 0.21.2 `tuners/loha/layer.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from hf_lora.adapter import Component
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
    check_present,
    config_of,
    fitted,
    host_shape,
    rows_of,
    size,
    unfit,
)
from hf_lora.formats.names import Names, Piece

_OUT = ("hada_w1_a", "hada_w2_a")
_IN = ("hada_w1_b", "hada_w2_b")
_CORES = ("hada_t1", "hada_t2")
FACTORS = (*_OUT, *_IN, *_CORES)


def width_of(path: str, loose: Loose) -> int:
    """Returns the number of output features."""
    check_present(path, loose, (*_OUT, *_IN))
    axis = _axis(loose)
    held = [loose.factors[name] for name in _OUT]
    first, second = (x.shape[axis] if x.ndim > axis else 0 for x in held)
    if first != second:
        fact = f"{_OUT[0]} {size(held[0])} and {_OUT[1]} {size(held[1])} disagree on the rows"
        raise broken(path, loose, fact, _OUT[1])
    return first


def part_of(path: str, loose: Loose, piece: Piece) -> Loose:
    """Returns the piece's rows of both products; the other factors are shared."""
    axis = _axis(loose)
    cut = {name: rows_of(loose.factors[name], piece, axis) for name in _OUT}
    return Loose({**loose.factors, **cut}, loose.keys)


def _axis(loose: Loose) -> int:
    """Returns where the outer factors have the output features."""
    return 1 if _CORES[0] in loose.factors else 0


def component(layers: Mapping[str, Loose], names: Names) -> Component:
    """Returns the layers as a LoHa of peft.

    Raises:
        BadAdapterFile: A layer is incomplete, or peft has no such layer.
        AdapterMismatch: A layer has another shape than the host's.
    """
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    targets: dict[str, dict[str, Tensor]] = {}
    cored: dict[bool, str] = {}  # with cores -> a layer on which they make a difference
    for path, loose in layers.items():
        shape = host_shape(path, loose, names)
        check_held(path, loose, shape, "LoHa")
        rank, cores = _rank(path, loose)
        kernel = shape[2:]
        if any(side != 1 for side in kernel):
            cored.setdefault(cores, path)
        elif cores:
            raise unfit(
                path,
                loose,
                f"there are cores of a kernel, and the host weight is {shape}",
                "hada_t1",
            )
        targets[path] = fitted(path, loose, _shapes(shape, rank, cores=cores), shape)
        ranks[path], alphas[path] = rank, alpha_of(path, loose, rank)
    if len(cored) == 2:
        raise broken(
            cored[False],
            layers[cored[False]],
            f"the kernel is in the factors, and at {cored[True]} it is in a core (Tucker); peft "
            "has one or the other on all convolutions of an adapter",
            fix="Load them as two adapters.",
        )
    config = config_of("LOHA", "alpha", ranks, alphas)
    return Component({**config, "use_effective_conv2d": True in cored}, targets)


def _rank(path: str, loose: Loose) -> tuple[int, bool]:
    """Returns the rank, and whether there are cores."""
    factors = loose.factors
    cores = any(name in factors for name in _CORES)
    check_present(path, loose, (*_OUT, *_IN, *(_CORES if cores else ())))
    check_floating(path, loose)
    flat = [n for n in factors if n != ALPHA and factors[n].ndim < (3 if n in _CORES else 2)]
    if flat:
        raise broken(path, loose, f"{flat[0]} is {size(factors[flat[0]])}, no matrix", flat[0])
    ranks = {n: factors[n].shape[0] for n in (*_IN, *(_CORES if cores else ()))}
    ranks |= {n: factors[n].shape[0 if cores else 1] for n in _OUT}
    ranks |= {f"{n}, second": factors[n].shape[1] for n in _CORES if cores}
    rank = ranks[_IN[0]]
    if not rank or len(set(ranks.values())) > 1:
        said = "is 0" if not rank else f"is not one: {ranks}"
        raise broken(path, loose, f"the rank {said}", _IN[0])
    return rank, cores


def _shapes(shape: Shape, rank: int, *, cores: bool) -> dict[str, Shape]:
    """Returns the shapes that peft gives the factors on a weight of this shape."""
    if not cores:
        wide = math.prod(shape[1:])
        return {**dict.fromkeys(_OUT, (shape[0], rank)), **dict.fromkeys(_IN, (rank, wide))}
    kernel = (*shape[2:], 1)[:2]
    return {
        **dict.fromkeys(_OUT, (rank, shape[0])),
        **dict.fromkeys(_IN, (rank, shape[1])),
        **dict.fromkeys(_CORES, (rank, rank, *kernel)),
    }


def loose(component: Component, path: str) -> dict[str, Tensor]:
    """Returns a target's factors as LyCORIS has them.

    Raises:
        BadAdapterFile: It has cores of which the record does not say how files have them.
    """
    factors = dict(component.targets[path])
    for name in _CORES:
        if name in factors:
            check_core(path, factors[name])
    return {**factors, ALPHA: alpha_tensor(component.alpha(path))}
