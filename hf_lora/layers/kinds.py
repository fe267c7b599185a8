"""What is known of each kind of adapter layer: one row a kind, and one row a trap.

Read from the forward and merge of peft 0.21.2; `tests/test_layers.py` compares each row with the
forward in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from peft.tuners.adalora.layer import AdaLoraLayer
from peft.tuners.boft.layer import BOFTLayer
from peft.tuners.c3a.layer import C3ALayer
from peft.tuners.hra.layer import HRALayer
from peft.tuners.ia3.layer import IA3Layer
from peft.tuners.lora.layer import LoraLayer, MultiheadAttention, ParamWrapper
from peft.tuners.lycoris_utils import LycorisLayer
from peft.tuners.miss.layer import MissLayer
from peft.tuners.oft.layer import Conv2d as OFTConv2d
from peft.tuners.oft.layer import Linear as OFTLinear
from peft.tuners.oft.layer import OFTLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn


@dataclass(frozen=True)
class Kind:
    """How the adapters of one kind combine on a layer.

    Attributes:
        layers: The peft classes of the kind.
        combine: `"sum"`: each adds an update taken at the base weight. `"chain"`: each maps the
            weight that the ones before it have made.
        order: The order in which merges apply a chain: `"any"` where they commute.
        scaling: Whether peft's `set_scale` multiplies the update by exactly its argument.
        several: Whether peft's forward is right with several of the kind active.
        known: False for methods without a row, which nothing here has compared with their forward.
    """

    layers: tuple[type, ...]
    combine: Literal["sum", "chain"]
    order: Literal["any", "active", "reversed"] = "any"
    scaling: bool = False
    several: bool = True
    known: bool = True


# The first row that holds the layer decides.
KINDS: tuple[Kind, ...] = (
    # AdaLoRA's scaling is alpha, and the `set_scale` that it inherits sets alpha/r
    Kind((AdaLoraLayer,), "sum"),
    Kind((LoraLayer, LycorisLayer), "sum", scaling=True),
    # forward feeds the second adapter the output of the first instead of the input
    Kind((C3ALayer,), "sum", several=False),
    Kind((MissLayer,), "sum"),
    Kind((IA3Layer,), "chain"),
    # forward rotates the input by the first adapter first: the last is next to the weight
    Kind((OFTLinear, OFTConv2d), "chain", order="reversed"),
    Kind((OFTLayer, BOFTLayer, HRALayer), "chain", order="active"),
)
# `init_weights="bat"` of MiSS multiplies by the weight, the other forms add to it
_BAT = Kind((MissLayer,), "chain", order="active")
# Any other method: one adapter alone, as peft merges it, in the adapter's own dtype.
_OTHER = Kind((BaseTunerLayer,), "chain", order="active", known=False)


def kind_of_layer(layer: Any) -> Kind:
    """Returns the row of a tuner layer."""
    if getattr(layer, "miss_fn", None) == "bat":
        return _BAT
    return next((kind for kind in KINDS if isinstance(layer, kind.layers)), _OTHER)


def in_order(layer: Any, names: Sequence[str]) -> list[str]:
    """Returns adapter names in the order in which a merge applies them.

    `"any"` gives the alphabetical one, so that no bit depends on how the names were given.
    """
    order = kind_of_layer(layer).order
    if order == "any":
        return sorted(names)
    return list(names) if order == "active" else list(reversed(names))


_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def _unequal(base: Any) -> bool:
    return len(set(base.stride)) > 1 or len(set(base.padding)) > 1


# (tuner classes, base classes, test on the base layer, what peft's forward does there). In each of
# them the forward computes something that no merged weight does, or fails.
_Trap = tuple[tuple[type, ...], tuple[type, ...], Callable[[Any], bool], str]
TRAPS: tuple[_Trap, ...] = (
    (
        (MultiheadAttention,),
        (nn.Module,),
        lambda base: True,
        "peft merges and unmerges torch's MultiheadAttention in every forward",
    ),
    (
        (LoraLayer, LycorisLayer, BOFTLayer, HRALayer),
        _CONVS,
        lambda base: base.padding_mode != "zeros",
        "peft pads with zeros there, whatever the padding_mode",
    ),
    (
        (LoraLayer, BOFTLayer, HRALayer),
        _CONVS,
        lambda base: any(step != 1 for step in base.dilation),
        "peft leaves the dilation out",
    ),
    (
        (LoraLayer,),
        _CONVS,
        lambda base: base.groups > 1,
        "the update reaches across the groups of the convolution",
    ),
    (
        (BOFTLayer, HRALayer),
        _CONVS,
        _unequal,
        "peft uses the first stride and padding for every direction",
    ),
    (
        (OFTConv2d,),
        _CONVS,
        lambda base: any(side != 1 for side in base.kernel_size),
        "peft adds up overlapping patches of the rotated input",
    ),
    (
        (BaseTunerLayer,),
        (nn.Embedding,),
        lambda base: base.max_norm is not None,
        "the rows are renormalised (max_norm) whenever they are read",
    ),
)


def trap_of(layer: Any) -> str:
    """Returns why no merged weight equals the forward of this layer; empty where one does."""
    base = layer.get_base_layer()
    rows = (
        words
        for tuners, bases, test, words in TRAPS
        if isinstance(layer, tuners) and isinstance(base, bases) and test(base)
    )
    return next(rows, "")


def is_scalable(layer: Any) -> bool:
    """Tells whether a strength can be given at all; torch's MultiheadAttention returns a tuple."""
    return not isinstance(layer, MultiheadAttention)


def reset_scaling(layer: Any, name: str) -> None:
    """Takes back what peft's or diffusers' `set_scale` has made of the `scaling` of an adapter."""
    if isinstance(layer, AdaLoraLayer):
        alpha = layer.lora_alpha[name]
        layer.scaling[name] = alpha if alpha > 0 else float(layer.r[name])  # as its update_layer
    elif kind_of_layer(layer).scaling:
        layer.set_scale(name, 1.0)


def parameter_keys(layer: Any) -> list[str]:
    """Returns the names of the base layer's own parameters that a merge can change."""
    if isinstance(layer, ParamWrapper):
        return [layer.parameter_name]
    own = layer.get_base_layer()._parameters
    return [key for key, parameter in own.items() if parameter is not None]


def active_here(layer: Any) -> list[str]:
    """Returns the active adapters that this layer has, in the order in which they are active."""
    present = layer._get_available_adapters()
    return [name for name in layer.active_adapters if name in present]
