"""True strengths: the model at strength w is the one whose weight update is w times the adapter's.

Three ways, chosen per layer: peft's `scaling` where that is exact; a variant for DoRA; for every
other kind a class whose forward blends the layer's outputs, which are linear in the weight.

A strength is kept as a tensor of one number wherever compiled code may read it: a number would be
part of what was compiled, and another one would compile the layer again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType, MethodType
from typing import Any

import torch
from peft.tuners.lokr.layer import LoKrLayer
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor

from hf_lora.errors import UnsupportedTarget
from hf_lora.layers.dora import is_dora, is_strong, strength_of_variant, variant_for
from hf_lora.layers.kinds import Kind, active_here, kind_of_layer, reset_scaling
from hf_lora.layers.twin import with_active

# A strength that others set or compiled code reads, and one that is 1 and nowhere kept.
Number = Tensor | float
# A linear combination of forwards: adapters taking part -> factor.
Terms = dict[tuple[str, ...], Number]


class Steered:
    """Mixed into the class of a tuner layer while its strengths are not peft's own.

    A class, because hooks then wrap the forward as they wrap any, and copies and replicas compute
    with their own weights.

    A sum of updates is base + sum of w_i (f_i - base). A chain of maps, each (1 - w_i) + w_i f_i,
    is linear in each w_i, so it is a combination of the 2^n forwards with and without the adapters
    whose strength is not 1. Which forwards these are does not depend on the values, so that another
    value compiles nothing anew. No forward hook: with two C3A adapters active peft's forward itself
    can fail.

    Attributes:
        peer: peft's class, which the layer has otherwise.
    """

    peer: Any

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Runs the layer with the active adapters at their strengths."""
        layer: Any = self
        active, kind = active_here(layer), kind_of_layer(layer)
        held = {n: w for n, w in _strengths(layer).items() if n in active}
        alone = not held and (kind.several or len(active) < 2)
        if layer.disable_adapters or layer.merged or alone:
            whole: Tensor = self.peer.forward(layer, *args, **kwargs)
            return whole
        terms = _terms(kind, active, held)
        # without any as peft runs it disabled
        doubles = [(with_active(layer, names), w) for names, w in terms.items()]
        outputs = [(self.peer.forward(double, *args, **kwargs), w) for double, w in doubles]
        first = outputs[0][0]
        wide = torch.promote_types(first.dtype, torch.float32)
        return torch.stack([output.to(wide) * w for output, w in outputs]).sum(0).to(first.dtype)

    def delete_adapter(self, adapter_name: str) -> None:
        """As peft's; a later adapter of the name starts at strength 1."""
        self.peer.delete_adapter(self, adapter_name)
        settle(self)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return (_unpickled, (self.peer,), *object.__reduce_ex__(self, protocol)[2:])


def _set_scale(layer: Any, adapter: str, scale: float) -> None:
    """As peft's, which diffusers calls, too: that scale takes the place of a strength from here."""
    layer.peer.set_scale(layer, adapter, scale)
    _forget(layer, adapter)
    settle(layer)


@cache
def _steered(kind: type) -> Any:
    """Returns the subclass of a class of peft's layers that has strengths."""
    own = {"peer": kind, "__module__": kind.__module__, "__qualname__": kind.__qualname__}
    setter = {"set_scale": _set_scale} if hasattr(kind, "set_scale") else {}
    meta: Any = type(kind)
    return meta(kind.__name__, (Steered, kind), own | setter)


def _unpickled(kind: type) -> Any:
    return object.__new__(_steered(kind))


def class_of(layer: Any) -> type:
    """Returns peft's class of a tuner layer, whether or not strengths steer it."""
    kind: type = layer.peer if isinstance(layer, Steered) else type(layer)
    return kind


def _terms(kind: Kind, active: Sequence[str], held: Mapping[str, Number]) -> Terms:
    """Returns the forwards to combine; no loop that torch.compile could not follow."""
    if kind.combine == "sum":
        terms: Terms = {(): 1.0}
        for name in active:
            terms[()] = terms[()] - held.get(name, 1.0)
            terms[(name,)] = held.get(name, 1.0)
        return terms
    terms = {(): 1.0}
    for name in active:
        so_far, terms = terms, {}
        for names, factor in so_far.items():
            if name in held:
                terms[names] = factor * (1.0 - held[name])
                terms[(*names, name)] = factor * held[name]
            else:
                terms[(*names, name)] = factor
    return terms


def number(value: float, like: Tensor | None = None) -> Tensor:
    """Returns a number as a tensor that compiled code takes as an input.

    On the CPU in float64 it multiplies exactly as the number does, whatever the device and dtype of
    the other side. Outside of inference mode, so that training can go on with it.

    Args:
        value: The number.
        like: What the tensor replaces, whose dtype and device it gets.
    """
    with torch.inference_mode(False):
        if like is not None:
            return torch.tensor(value, dtype=like.dtype, device=like.device)
        return torch.tensor(value, dtype=torch.float64, device="cpu")


def make_adjustable(layer: Any, name: str) -> None:
    """Keeps the `scaling` of a LoRA or LoKr as a tensor; what others compute with it is the same.

    LoHa makes a tensor of its number in every forward and cannot take one, and Metal has no
    float64: there the first change of strength compiles once more.
    """
    scaling = getattr(layer, "scaling", {}).get(name)
    plain = isinstance(layer, LoraLayer | LoKrLayer) and kind_of_layer(layer).scaling
    if not plain or isinstance(scaling, Tensor) or _variant(layer, name) is not None:
        return
    weight = next((p for p in layer.get_base_layer()._parameters.values() if p is not None), None)
    if scaling is not None and (weight is None or weight.device.type != "mps"):
        layer.scaling[name] = number(scaling)


@dataclass(frozen=True)
class Dial:
    """The strength of the adapters of one layer, with the setter that peft's layers have."""

    layer: Any

    def set_scale(self, name: str, value: float) -> None:
        """Sets the strength of one adapter of the layer; 1 is the adapter as trained.

        Raises:
            UnsupportedTarget: Somebody has given the layer a forward of its own.
        """
        layer = self.layer
        variant = _variant(layer, name)
        changed: dict[str, float] = {}
        if variant is None and kind_of_layer(layer).scaling:
            before = layer.scaling.get(name)
            layer.set_scale(name, value)
            if isinstance(before, Tensor):
                layer.scaling[name] = number(float(layer.scaling[name]), like=before)
        else:
            reset_scaling(layer, name)
            if is_dora(variant):
                layer.lora_variant[name] = variant_for(variant, value, alone=False)
            else:
                changed = {name: value}
        settle(layer, changed)


def _variant(layer: Any, name: str) -> Any:
    return layer.lora_variant.get(name) if hasattr(layer, "lora_variant") else None


def _forget(layer: Any, name: str) -> None:
    """Takes back the strength of an adapter, so that it is as trained."""
    variant = _variant(layer, name)
    if is_dora(variant):
        layer.lora_variant[name] = variant_for(variant, 1.0, alone=True)
    if isinstance(layer, Steered):
        vars(layer)[_HELD] = {n: w for n, w in _strengths(layer).items() if n != name}


def strength_of(layer: Any, name: str) -> float:
    """Returns the strength of an adapter beyond what its peft `scaling` holds already."""
    variant = _variant(layer, name)
    if is_dora(variant):
        return strength_of_variant(variant)
    return float(_strengths(layer).get(name, 1.0))


def settle(layer: Any, changed: Mapping[str, float] = MappingProxyType({})) -> None:
    """Leaves on the layer what its active adapters and strengths need, and takes off the rest.

    With one adapter at strength 1 that is nothing: peft's own class and variant.

    Args:
        layer: The tuner layer.
        changed: Strengths to set, of adapters that have neither `scaling` nor a DoRA variant.
    """
    active = active_here(layer)
    for name, variant in list(getattr(layer, "lora_variant", {}).items()):
        if is_dora(variant):
            alone = len(active) < 2 or name not in active
            strength = strength_of_variant(variant)
            if is_strong(variant) != (strength != 1 or not alone):
                layer.lora_variant[name] = variant_for(variant, strength, alone=alone)
    present = layer._get_available_adapters()
    wanted = _strengths(layer) | dict(changed)
    strengths = {n: w for n, w in wanted.items() if w != 1 and n in present}
    if strengths or (len(active) > 1 and not kind_of_layer(layer).several):
        _steer(layer, strengths)
    elif any(map(is_strong, getattr(layer, "lora_variant", {}).values())):
        if not _own_forward(layer):
            _steer(layer, {})  # for `set_scale`; the variants act without it
    else:
        _release(layer)


def sums_elsewise(layer: Any, names: Sequence[str]) -> bool:
    """Tells whether peft's own forward of several adapters is not the one that a merge gives.

    So it is for DoRA and C3A made active by others than `set_adapters`.
    """
    if len(names) < 2:
        return False
    variants = [_variant(layer, name) for name in names]
    if any(is_dora(v) and not is_strong(v) for v in variants):
        return True
    return not kind_of_layer(layer).several and not isinstance(layer, Steered)


_HELD = "_hf_lora_strengths"


def _strengths(layer: Any) -> dict[str, Number]:
    """Returns adapter name -> strength where it is not 1; never changed, as snapshots hold it."""
    held: dict[str, Number] = vars(layer).get(_HELD, {})
    return held


def _steer(layer: Any, strengths: Mapping[str, Number]) -> None:
    if not isinstance(layer, Steered):
        if _own_forward(layer):
            raise UnsupportedTarget(
                f"a forward of its own stands on a {type(layer).__name__} layer, which would not "
                "see the strength",
                fix="Take it off first, or use weight 1.",
            )
        _change_class(layer, _steered(class_of(layer)))
    kept = {n: w if isinstance(w, Tensor) else number(w) for n, w in strengths.items()}
    vars(layer)[_HELD] = kept


def _release(layer: Any) -> None:
    if not isinstance(layer, Steered):
        return
    vars(layer)[_HELD] = {}
    if not _own_forward(layer):  # else it may call the forward of this class
        del vars(layer)[_HELD]
        _change_class(layer, layer.peer)


# accelerate keeps the forward that it wraps under the second name
_PLACES = ("forward", "_old_forward")


def _bound(layer: Any) -> list[str]:
    """Returns the attributes of the layer itself that are the bound forward of its class."""
    kind: Any = type(layer)
    held = ((place, vars(layer).get(place)) for place in _PLACES)
    return [
        place
        for place, x in held
        if isinstance(x, MethodType) and x.__self__ is layer and x.__func__ is kind.forward
    ]


def _own_forward(layer: Any) -> bool:
    """Tells whether the layer has a forward that may not call that of its class."""
    return "forward" in vars(layer) and not _bound(layer)


def _change_class(layer: Any, kind: Any) -> None:
    bound = _bound(layer)
    layer.__class__ = kind
    for place in bound:
        vars(layer)[place] = MethodType(kind.forward, layer)
