"""`lora_optimizer`: AdamW, LoRA+ and LoRA-FA for whatever adapter a host has."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft import PeftType
from torch import nn
from torch.optim import Optimizer
from transformers.utils import logging

from hf_lora.errors import BadCheckpoint, InvalidOption, TrainingError, listing, shown
from hf_lora.hosts import check_has_weights, model_of, peft_configs
from hf_lora.merge import check_unmerged
from hf_lora.record import all_or_nothing
from hf_lora.training.optimizers.groups import Part, groups_of, trained_parts
from hf_lora.training.optimizers.lorafa import LoraFA, freeze, frozen_pairs, thaw
from hf_lora.training.optimizers.pairs import pairs_of

Kind = Literal["adamw", "lora+", "lora-fa"]

logger = logging.get_logger(__name__)

_RATIO = 16.0


@dataclass(frozen=True)
class _Settings:
    """The numbers of one call, checked."""

    lr: float
    weight_decay: float
    ratio: float
    betas: tuple[float, float]
    eps: float

    def groups(self, parts: Sequence[Part]) -> list[dict[str, Any]]:
        return groups_of(parts, lr=self.lr, weight_decay=self.weight_decay, ratio=self.ratio)

    def adamw(self, parts: Sequence[Part]) -> Optimizer:
        groups = self.groups(parts)
        return torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, eps=self.eps)


def lora_optimizer(
    model: object,
    kind: Kind = "adamw",
    *,
    lr: float,
    weight_decay: float = 0.0,
    ratio: float = _RATIO,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> Optimizer:
    """Builds an optimizer over all that training the host trains, and nothing else.

    Its groups are named `A`, `B`, `factors` (those of other methods), `whole` (heads and other
    modules trained whole) and `vectors` (magnitudes, biases, norms), which have no weight decay.
    Give it to a trainer as `Trainer(optimizers=(optimizer, None))`.

    Args:
        model: The host: a model with an adapter in place, a `PeftModel`, or one of them wrapped for
            several processes.
        kind: `"adamw"`: one rate. `"lora+"`: B has `ratio` times the rate (arXiv 2402.12354).
            `"lora-fa"`: A is frozen, and B gets the gradient whose effect on the weight is nearest
            to the full one (arXiv 2308.03303); on embeddings, where peft starts A at zero, B is the
            frozen one. Another kind on the same host trains A again, and so does a detached and
            attached adapter.
        lr: Learning rate.
        weight_decay: Decay of matrices, decoupled as in AdamW.
        ratio: Of LoRA+: the rate of B over that of A.
        betas: Coefficients of AdamW's two averages.
        eps: Term of AdamW's denominator.

    Returns:
        A torch optimizer; AdamW's own state and numbers.

    Raises:
        InvalidOption: An argument has a value that cannot work.
        TrainingError: Nothing is trainable, parameters of the base are, or the adapter has no A and
            B where the kind needs them. The host is then as it was.
        UnsupportedTarget: LoRA-FA has no formula for a layer.
        MergeError: Adapters are merged into the weights.
        MetaHost: The host has no weights.
    """
    settings = _checked(kind, lr, weight_decay, ratio, betas, eps)
    bare = model_of(model)
    check_unmerged(bare, "train them")
    check_has_weights(bare, "trained")
    build = _KINDS[kind]

    def make(_: object) -> Optimizer:
        return build(model, bare, settings)

    # of a pipeline in training, every part has a record
    optimizer = all_or_nothing(getattr(bare, "lora_host", bare), make)
    for group in optimizer.param_groups:
        group["kind"] = kind
    optimizer.register_load_state_dict_pre_hook(_check_state)
    return optimizer


def _adamw(host: object, model: nn.Module, settings: _Settings) -> Optimizer:
    _train_again(host, model)
    return settings.adamw(trained_parts(host))


def _lora_plus(host: object, model: nn.Module, settings: _Settings) -> Optimizer:
    _train_again(host, model)
    parts = trained_parts(host)
    _check_lora(model, parts)
    return settings.adamw(parts)


def _lora_fa(host: object, model: nn.Module, settings: _Settings) -> Optimizer:
    parts = trained_parts(host)  # the base is frozen, and something is not
    pairs = pairs_of(model)
    held = {id(part.parameter) for part in parts}
    if any(id(pair.trained) not in held for pair in pairs):
        raise TrainingError(
            f"B is frozen on {sum(id(p.trained) not in held for p in pairs)} layers, and LoRA-FA "
            "trains nothing else there",
            fix="Activate the adapter again: set_adapters(model, name).",
        )
    if any(pair.frozen.requires_grad for pair in pairs):
        _check_unwrapped(host, "freezes A")
    count = freeze(pairs)
    if count:
        logger.info(f"LoRA-FA has frozen A on {len(pairs)} layers, {count} parameters")
    return LoraFA(
        settings.groups(trained_parts(host)),
        pairs,
        lr=settings.lr,
        betas=settings.betas,
        eps=settings.eps,
    )


_KINDS: Mapping[str, Callable[[object, nn.Module, _Settings], Optimizer]] = {
    "adamw": _adamw,
    "lora+": _lora_plus,
    "lora-fa": _lora_fa,
}


def _train_again(host: object, model: nn.Module) -> None:
    """Takes back what an earlier LoRA-FA has frozen, which would be left out in silence."""
    if frozen_pairs(model):
        _check_unwrapped(host, "trains A again, which LoRA-FA has frozen,")
        logger.info(f"{thaw(model)} parameters that LoRA-FA had frozen train again")


def _check_unwrapped(host: object, what: str) -> None:
    """DDP counts the parameters that need gradients when it wraps: one more or less breaks it."""
    if isinstance(host, nn.parallel.DistributedDataParallel):
        raise TrainingError(
            f"this optimizer {what} and the model is in DistributedDataParallel already",
            fix="Build the optimizer first, then wrap the model.",
        )


def _check_lora(model: nn.Module, parts: Sequence[Part]) -> None:
    """LoRA+ is about B that starts at zero beside a random A."""
    configs = peft_configs(model)
    names = sorted({part.adapter for part in parts if part.adapter})
    for name in names:
        if configs[name].peft_type != PeftType.LORA:
            method = getattr(configs[name].peft_type, "value", configs[name].peft_type)
            raise TrainingError(
                f"LoRA+ raises the rate of a LoRA's B, and adapter {name!r} is of the method "
                f"{method}",
                fix='Use lora_optimizer(model, "adamw").',
            )
    if not any(part.role == "B" for part in parts):
        raise TrainingError(
            "LoRA+ raises the rate of B, and no B requires a gradient",
            fix='Use lora_optimizer(model, "adamw").',
        )


def _checked(
    kind: object, lr: object, weight_decay: object, ratio: object, betas: object, eps: object
) -> _Settings:
    if not isinstance(kind, str) or kind not in _KINDS:
        raise InvalidOption(
            f"kind={shown(kind)} is no optimizer", fix=f"Kinds: {', '.join(_KINDS)}.", field="kind"
        )
    if kind != "lora+" and ratio != _RATIO:
        raise InvalidOption(
            f"ratio={shown(ratio)} is of LoRA+, and kind is {kind!r}",
            fix='Leave ratio out, or use kind="lora+".',
            field="ratio",
        )
    pair = betas if isinstance(betas, tuple | list) and len(betas) == 2 else ()
    if not pair or not all(_is_number(beta) and 0 <= beta < 1 for beta in pair):
        raise InvalidOption(f"betas={shown(betas)} are not two numbers in [0, 1)", field="betas")
    return _Settings(
        lr=_number("lr", lr, above=0),
        weight_decay=_number("weight_decay", weight_decay),
        ratio=_number("ratio", ratio, above=0) if kind == "lora+" else 1.0,
        betas=(float(pair[0]), float(pair[1])),
        eps=_number("eps", eps),
    )


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < 1e300 and math.isfinite(value)


def _number(field: str, value: Any, *, above: float | None = None) -> float:
    """Returns a number that is not negative, or above a bound where there is one."""
    if _is_number(value) and (value >= 0 if above is None else value > above):
        return float(value)
    wanted = "a finite number that is not negative" if above is None else "a positive finite number"
    raise InvalidOption(f"{field}={shown(value)} is not {wanted}", field=field)


def _check_state(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Hook before a state is loaded: one of another kind or adapter would fit in silence.

    Raises:
        BadCheckpoint: The state is of another kind, or of other parameters.
    """
    saved = state.get("param_groups", [])
    if not any("kind" in group for group in saved):
        return  # of a plain torch optimizer: torch compares the sizes
    for field in ("kind", "param_names"):
        here = [group.get(field) for group in optimizer.param_groups]
        there = [group.get(field) for group in saved]
        if here != there:
            raise BadCheckpoint(
                f"the optimizer's state is of another {_FIELDS[field]}: {_short(there)} there, "
                f"{_short(here)} here",
                fix="Build the optimizer, and attach, with the same arguments as that run.",
                field=field,
            )


_FIELDS = {"kind": "kind", "param_names": "adapter"}


def _short(values: Sequence[Any]) -> str:
    flat = [x for value in values for x in (value if isinstance(value, list) else [value])]
    return (
        f"{len(flat)} names, {listing(flat, limit=2)}"
        if len(flat) > 5
        else listing(dict.fromkeys(map(str, flat)))
    )
