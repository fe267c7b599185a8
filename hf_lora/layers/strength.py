"""True strengths: the model at strength w is the one whose weight update is w times the adapter's.

Three ways, chosen per layer: peft's `scaling` where that is exact; a variant for DoRA; for every
other kind a forward that blends the layer's outputs, which are linear in the weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from math import prod
from typing import Any

import torch
from torch import Tensor

from hf_lora.layers.dora import is_dora, is_strong, strength_of_variant, variant_for
from hf_lora.layers.kinds import Kind, active_here, kind_of_layer
from hf_lora.layers.twin import with_active

# A linear combination of forwards: adapters taking part -> factor.
Terms = dict[tuple[str, ...], float]


class Blend:
    """Stands on a tuner layer as its `forward` and gives the adapters strengths.

    A sum of updates is base + sum of w_i (f_i - base). A chain of maps, each (1 - w_i) + w_i f_i,
    is linear in each w_i, so it is a combination of the 2^n forwards with and without the adapters
    whose strength is neither 0 nor 1. At 0 such a forward leaves the adapter out, at 1 it is
    peft's. No hook: with two C3A adapters active peft's forward itself can fail.

    Attributes:
        layer: The tuner layer.
        strengths: Adapter name -> strength, where it is not 1. Never changed: a new strength is a
            new object, so that a snapshot of the layer holds the old one.
        inner: What stood there before, such as accelerate's; None for the forward of the class.
    """

    def __init__(self, layer: Any, strengths: Mapping[str, float], inner: Any) -> None:
        self.layer = layer
        self.strengths = dict(strengths)
        self.inner = inner

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Runs the layer with the active adapters at their strengths."""
        layer, active = self.layer, active_here(self.layer)
        terms = _terms(kind_of_layer(layer), [(n, self.strengths.get(n, 1.0)) for n in active])
        if layer.disable_adapters or layer.merged or terms == {tuple(active): 1.0}:
            whole: Tensor = (self.inner or partial(type(layer).forward, layer))(*args, **kwargs)
            return whole
        outputs = [(_forward(layer, names, args, kwargs), w) for names, w in terms.items()]
        first = outputs[0][0]
        wide = torch.promote_types(first.dtype, torch.float32)
        return torch.stack([output.to(wide) * w for output, w in outputs]).sum(0).to(first.dtype)


def _forward(
    layer: Any, names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor:
    """Runs the layer with exactly the named adapters; without any as peft runs it disabled."""
    output: Tensor = type(layer).forward(with_active(layer, names), *args, **kwargs)
    return output


def _terms(kind: Kind, strengths: Sequence[tuple[str, float]]) -> Terms:
    """Returns the forwards to combine, those with factor 0 left out."""
    if all(w == 1 for _, w in strengths) and (kind.several or len(strengths) < 2):
        return {tuple(n for n, _ in strengths): 1.0}
    terms: Terms
    if kind.combine == "sum":
        terms = {(): 1.0 - sum(w for _, w in strengths)} | {(n,): w for n, w in strengths}
    else:
        choices = [((n, w), (None, 1.0 - w)) for n, w in strengths]
        terms = {
            tuple(n for n, _ in choice if n is not None): prod(w for _, w in choice)
            for choice in product(*choices)
        }
    return {names: factor for names, factor in terms.items() if factor != 0}


@dataclass(frozen=True)
class Dial:
    """The strength of the adapters of one layer, with the setter that peft's layers have."""

    layer: Any

    def set_scale(self, name: str, value: float) -> None:
        """Sets the strength of one adapter of the layer; 1 is the adapter as trained."""
        layer = self.layer
        variant = layer.lora_variant.get(name) if hasattr(layer, "lora_variant") else None
        if is_dora(variant):
            layer.lora_variant[name] = variant_for(variant, value, alone=False)
        elif variant is None and kind_of_layer(layer).scaling:
            layer.set_scale(name, value)
        else:
            _blend(layer, _strengths(layer) | {name: value})
        settle(layer)


def strength_of(layer: Any, name: str) -> float:
    """Returns the strength of an adapter beyond what its peft `scaling` holds already."""
    variant = layer.lora_variant.get(name) if hasattr(layer, "lora_variant") else None
    if is_dora(variant):
        return strength_of_variant(variant)
    return _strengths(layer).get(name, 1.0)


def settle(layer: Any) -> None:
    """Leaves on the layer what its active adapters and strengths need, and takes off the rest.

    With one adapter at strength 1 that is nothing: peft's own variant and forward.
    """
    active = active_here(layer)
    for name, variant in list(getattr(layer, "lora_variant", {}).items()):
        if is_dora(variant):
            alone = len(active) < 2 or name not in active
            strength = strength_of_variant(variant)
            if is_strong(variant) != (strength != 1 or not alone):
                layer.lora_variant[name] = variant_for(variant, strength, alone=alone)
    present = layer._get_available_adapters()
    strengths = {n: w for n, w in _strengths(layer).items() if w != 1 and n in present}
    if strengths or (len(active) > 1 and not kind_of_layer(layer).several):
        _blend(layer, strengths)
    else:
        _drop(layer)


def sums_elsewise(layer: Any, names: Sequence[str]) -> bool:
    """Tells whether peft's own forward of several adapters is not the one that a merge gives.

    So it is for DoRA and C3A made active by others than `set_adapters`.
    """
    if len(names) < 2:
        return False
    variants = [getattr(layer, "lora_variant", {}).get(name) for name in names]
    if any(is_dora(v) and not is_strong(v) for v in variants):
        return True
    return not kind_of_layer(layer).several and _found(layer) is None


# accelerate keeps the forward that it wraps under the second name
_PLACES = ("forward", "_old_forward")


def _found(layer: Any) -> tuple[str, Blend] | None:
    held = ((place, vars(layer).get(place)) for place in _PLACES)
    return next(((place, x) for place, x in held if isinstance(x, Blend)), None)


def _strengths(layer: Any) -> dict[str, float]:
    found = _found(layer)
    return dict(found[1].strengths) if found else {}


def _blend(layer: Any, strengths: Mapping[str, float]) -> None:
    """Puts a blend with these strengths on the layer, in the place of the one it has."""
    found = _found(layer)
    place, inner = (found[0], found[1].inner) if found else ("forward", vars(layer).get("forward"))
    vars(layer)[place] = Blend(layer, strengths, inner)


def _drop(layer: Any) -> None:
    found = _found(layer)
    if found is None:
        return
    place, blend = found
    if blend.inner is None and place == "forward":
        del vars(layer)[place]
    else:
        vars(layer)[place] = blend.inner or partial(type(layer).forward, layer)
