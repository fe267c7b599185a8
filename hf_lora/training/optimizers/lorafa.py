"""LoRA-FA: A stays frozen, and the gradient of B is that of the best update of the weight.

With W' = W + s B A and A frozen, the update of B whose effect on the weight is nearest to the full
gradient G is g_B (A A^T)^-1 / s^2, for then s * update * A = G P with P the projection onto the
rows of A. Source: arXiv 2308.03303, and section 3 of arXiv 2407.18242 for the projection.

A never changes, so its (rank, rank) inverse is computed once, in float64.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_lora.hosts import active_names, peft_configs
from hf_lora.training.optimizers.pairs import Pair, lora_layers, odd_variant, pairs_at
from hf_lora.walks import holds


def freeze(pairs: Iterable[Pair]) -> int:
    """Freezes one factor of each pair, for good; returns how many values that is.

    The names go into peft's own list of frozen weights, so that activating the adapter again does
    not thaw them, and detaching it leaves no trace.
    """
    count = 0
    for pair in pairs:
        layer, known = pair.layer, pair.layer.frozen_peft_weight_names
        names = known.get(pair.name, ())
        if pair.freezes not in names:
            layer.frozen_peft_weight_names = {**known, pair.name: (*names, pair.freezes)}
            count += pair.frozen.numel()
        pair.frozen.requires_grad_(False)
    return count


def thaw(model: nn.Module) -> int:
    """Takes back every earlier `freeze` on the model; returns how many values train again.

    Factors of adapters that are not trained now stay frozen until they are activated.
    """
    configs = peft_configs(model)
    training = {n for n in active_names(model) if not configs[n].inference_mode}
    count = 0
    for pair in frozen_pairs(model):
        layer, known = pair.layer, dict(pair.layer.frozen_peft_weight_names)
        known[pair.name] = tuple(n for n in known[pair.name] if n != pair.freezes)
        layer.frozen_peft_weight_names = {name: names for name, names in known.items() if names}
        if pair.name in training:
            pair.frozen.requires_grad_(True)
            count += pair.frozen.numel()
    return count


def frozen_pairs(model: nn.Module) -> list[Pair]:
    """Returns the pairs whose factor an earlier `freeze` has frozen, one a layer and adapter."""
    return [
        pairs_at(layer, name)[0]
        for _, layer in lora_layers(model)
        for name, frozen in layer.frozen_peft_weight_names.items()
        # MiCA freezes by itself, and is a variant
        if holds(layer, name) and not odd_variant(layer, name)
        if pairs_at(layer, name)[0].freezes in frozen
    ]


class LoraFA(torch.optim.AdamW):
    """AdamW that hands preconditioned gradients of B to its own step; `p.grad` stays as it is.

    Parameters without a frozen partner (magnitudes, biases, heads) are stepped as AdamW does.

    Args:
        groups: Parameter groups.
        pairs: The pairs of the factors that are trained.
        lr: Learning rate of groups without one.
        betas: Coefficients of AdamW.
        eps: Term of AdamW's denominator.
    """

    def __init__(
        self,
        groups: Sequence[Mapping[str, Any]],
        pairs: Iterable[Pair],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
    ) -> None:
        super().__init__([dict(group) for group in groups], lr=lr, betas=betas, eps=eps)
        by_id = {id(pair.trained): pair for pair in pairs}
        # by place: accelerate exchanges the parameters of a group for those on the device
        self._pairs = [[by_id.get(id(p)) for p in g["params"]] for g in self.param_groups]

    def _init_group(
        self, group: dict[str, Any], params_with_grad: list[Tensor], grads: list[Tensor], *rest: Any
    ) -> Any:
        """Collects what a step works on, as AdamW does, with other gradients for paired factors."""
        collect: Any = super()._init_group  # torch does not type it
        result = collect(group, params_with_grad, grads, *rest)
        at = next(i for i, known in enumerate(self.param_groups) if known is group)
        pairs = self._pairs[at] if at < len(self._pairs) else []
        stepped = [i for i, p in enumerate(group["params"]) if p.grad is not None]
        for place, i in enumerate(stepped):
            pair = pairs[i] if i < len(pairs) else None
            if pair is not None:
                grads[place] = pair.precondition(grads[place])
        return result

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads as AdamW does; what was computed from the frozen factors is computed anew."""
        super().load_state_dict(state_dict)
        self.refresh()

    def refresh(self) -> None:
        """Drops what was computed from the frozen factors; needed after writes into `A.data`."""
        for pair in (pair for group in self._pairs for pair in group if pair is not None):
            pair.forget()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_pairs": self._pairs}
