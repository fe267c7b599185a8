"""DoRA with a strength, and DoRA beside other adapters.

peft's DoRA variants have neither: `set_scale` enters the norm, and with several adapters active
each rescales the outputs of those before it, so the order of activation changes the model. Here
the update of an adapter is D = (g - 1) W + g s B A with g = m / |W + s B A|, taken at the base
weight and at full scaling s; strength w adds w D. Source of D: arXiv 2402.09353, section 4.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.variants import (
    DoraConv1dVariant,
    DoraConv2dVariant,
    DoraConv3dVariant,
    DoraEmbeddingVariant,
    DoraLinearVariant,
)
from torch import Tensor, nn

from hf_lora.layers.kinds import active_here
from hf_lora.layers.twin import adapted, wide_dtype


class _Strong:
    """What the variants below share: a strength, and peft's merge calls for it.

    Attributes:
        strength: The factor w of the update.
        peer: peft's variant of the same layer, which is used at strength 1 alone.
    """

    peer: type

    def __init__(self, strength: float) -> None:
        self.strength = strength
        # what forwards multiply by: as a number it would be part of compiled code
        with torch.inference_mode(False):
            self.factor = torch.tensor(strength, dtype=torch.float64, device="cpu")

    def supports_lora_conversion(self) -> bool:
        return True

    def merge_safe(self, module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """Returns the weight with the update in it; peft and diffusers merge through this."""
        update = self._update(module, active_adapter)
        # kept whole: with several merged there is no inverse from the factors of one
        module._cache_store(f"{active_adapter}-update", update)
        merged: Tensor = module.get_base_layer().weight.data + update
        return merged

    def merge_unsafe(self, module: Any, active_adapter: str, orig_weight: Tensor) -> None:
        """As `merge_safe`, into the parameter given."""
        orig_weight.data = self.merge_safe(module, active_adapter, orig_weight)

    def unmerge(self, module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """Returns the weight with the update taken out again, but for rounding."""
        update: Tensor = module._cache_pop(f"{active_adapter}-update")
        return orig_weight.data - update

    def _update(self, module: Any, name: str) -> Tensor:
        with module._unmerged_base_weight(safe_merge=True) as weight:
            dtype = wide_dtype(weight.dtype, weight.device)
            base = weight.to(dtype)
            whole, _ = adapted(module, name, {"weight": base}, dtype=dtype)
        update: Tensor = self.strength * (whole["weight"] - base)
        return update.to(weight.dtype)

    def _is_first(self, module: Any, name: str) -> bool:
        return active_here(module)[:1] == [name]


class _StrongLayer(_Strong):
    """Linear layers and convolutions."""

    def forward(
        self, module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any
    ) -> Tensor:
        """Returns `result` plus w D x.

        Args:
            module: The tuner layer.
            active_adapter: The adapter.
            x: Input of the layer.
            result: Output so far; that of the base layer for the first active adapter.
            kwargs: What peft hands to other variants.
        """
        if self.strength == 0:
            return result
        dropout = module.lora_dropout[active_adapter]
        whole = isinstance(dropout, nn.Identity) or not module.training
        extra = module.lora_magnitude_vector[active_adapter](
            x if whole else dropout(x),
            lora_A=module.lora_A[active_adapter],
            lora_B=module.lora_B[active_adapter],
            scaling=module.scaling[active_adapter],
            base_layer=module.get_base_layer(),
            # left out, peft computes the base product anew, which others have not changed
            base_result=result if whole and self._is_first(module, active_adapter) else None,
            adapter_name=active_adapter,
        )
        return result + self.factor * extra  # type: ignore[no-any-return]


class _StrongEmbedding(_Strong):
    """Embeddings, whose peft variant scales the base rows in place of adding to them."""

    def forward(
        self, module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any
    ) -> Tensor:
        """Returns `result` plus the strength times the rows of D; see the layer above."""
        if self.strength == 0:
            return result
        first = self._is_first(module, active_adapter)
        base = result if first else module.base_layer(x).to(result.dtype)
        whole: Tensor = self.peer.forward(module, active_adapter=active_adapter, x=x, result=base)  # type: ignore[attr-defined]
        if first and self.strength == 1:
            return whole
        return result + self.factor * (whole - base)


class StrongLinear(_StrongLayer, DoraLinearVariant):
    """peft's linear DoRA with a strength."""

    peer = DoraLinearVariant


class StrongEmbedding(_StrongEmbedding, DoraEmbeddingVariant):
    """peft's DoRA of embeddings with a strength."""

    peer = DoraEmbeddingVariant


class StrongConv1d(_StrongLayer, DoraConv1dVariant):
    """peft's DoRA of one-dimensional convolutions with a strength."""

    peer = DoraConv1dVariant


class StrongConv2d(_StrongLayer, DoraConv2dVariant):
    """peft's DoRA of two-dimensional convolutions with a strength."""

    peer = DoraConv2dVariant


class StrongConv3d(_StrongLayer, DoraConv3dVariant):
    """peft's DoRA of three-dimensional convolutions with a strength."""

    peer = DoraConv3dVariant


_STRONG: dict[type, type[_Strong]] = {
    kind.peer: kind
    for kind in (StrongLinear, StrongEmbedding, StrongConv1d, StrongConv2d, StrongConv3d)
}


def is_dora(variant: object) -> bool:
    """Tells whether a LoRA variant is DoRA, peft's or the one with a strength."""
    return isinstance(variant, _Strong) or type(variant) in _STRONG


def is_strong(variant: object) -> bool:
    """Tells whether a LoRA variant is one of those with a strength."""
    return isinstance(variant, _Strong)


def strength_of_variant(variant: object) -> float:
    """Returns the strength of a DoRA variant; peft's own have strength 1."""
    return variant.strength if isinstance(variant, _Strong) else 1.0


def variant_for(variant: object, strength: float, *, alone: bool) -> Any:
    """Returns the DoRA variant for a strength: peft's own where that computes the same."""
    peer = variant.peer if isinstance(variant, _Strong) else type(variant)
    return peer() if strength == 1 and alone else _STRONG[peer](strength)
