"""What `fuse_lora(lora_scale=...)` of diffusers 0.42 does to strengths, taken back with the fusing.

diffusers multiplies the `scaling` of every active adapter by the scale, merges, and leaves it so:
after unfusing the adapter has half its strength. And peft unmerges with the `scaling` of that
moment, so that whoever changes a strength meanwhile gets back other weights than there were.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from hf_lora.layers.strength import number
from hf_lora.walks import nested, tuner_modules


class Unscale:
    """Unmerges a layer that others merged; stands on the layer as its `unmerge` until then.

    So every way to unfuse puts the strengths back, that of another pipeline with the same model
    too.

    Attributes:
        layer: The tuner layer.
        before: Adapter name -> its `scaling` before the first of the fusings.
        merged: Adapter name -> its `scaling` in the merged weight.
        left: Adapter name -> its `scaling` as the last fusing left it.
    """

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self.before = _scaling(layer)
        self.merged: dict[str, float] = {}
        self.left: dict[str, float] = {}

    def note(self) -> None:
        """Takes down what a fusing has merged just now."""
        self.left = _scaling(self.layer)
        for name in self.layer.merged_adapters:
            if name in self.left:
                self.merged.setdefault(name, self.left[name])

    def __call__(self) -> None:
        """Unmerges as the class of the layer does, and puts back the strengths of before.

        A strength that somebody has set since stays.
        """
        now = _scaling(self.layer)
        back = {n: s for n, s in self.before.items() if now.get(n) == self.left.get(n)}
        self._set(self.merged)
        type(self.layer).unmerge(self.layer)
        self._set(now | back)
        self.layer.__dict__.pop("unmerge", None)

    def give_up(self) -> None:
        """Puts back the strengths of before and takes this off: nothing was merged here."""
        self._set(self.before)
        self.layer.__dict__.pop("unmerge", None)

    def _set(self, values: dict[str, float]) -> None:
        scaling = self.layer.scaling
        for name in values.keys() & scaling.keys():
            held = scaling[name]
            value = values[name]
            scaling[name] = number(value, like=held) if isinstance(held, Tensor) else value


def _scaling(layer: Any) -> dict[str, float]:
    return {name: float(value) for name, value in layer.scaling.items()}


def before_fusing(models: Iterable[nn.Module]) -> list[Any]:
    """Puts an `Unscale` on every layer that can be scaled, and returns these layers."""
    layers = [
        layer
        for model in models
        for _, outer in tuner_modules(model)
        for layer in nested(outer)
        if isinstance(layer, BaseTunerLayer) and hasattr(layer, "scaling")
    ]
    for layer in layers:
        held = vars(layer).get("unmerge")
        if held is None or (isinstance(held, Unscale) and not layer.merged):
            layer.__dict__["unmerge"] = Unscale(layer)
    return layers


def after_fusing(layers: Iterable[Any]) -> None:
    """Takes down what was fused; layers in which nothing was get their strengths back at once."""
    for layer in layers:
        unscale = vars(layer).get("unmerge")
        if not isinstance(unscale, Unscale):
            continue
        unscale.note()
        if not layer.merged:
            unscale.give_up()
