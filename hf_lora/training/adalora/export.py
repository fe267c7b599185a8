"""AdaLoRA as a plain LoRA, exactly: what serving engines, diffusers and merges can read."""

from __future__ import annotations

from collections import Counter
from dataclasses import fields, replace
from typing import Any

from peft import AdaLoraConfig, LoraConfig
from peft.tuners.adalora.layer import AdaLoraLayer
from torch import Tensor, nn

from hf_lora.adapter import MODEL, Adapter, Component
from hf_lora.algebra import fold_diagonal
from hf_lora.base import base_of
from hf_lora.configs import saved_config
from hf_lora.errors import InvalidOption, UnsupportedTarget
from hf_lora.families import family_of
from hf_lora.hosts import check_has_weights, check_known_name, model_of, peft_configs
from hf_lora.layers.kinds import trap_of
from hf_lora.manifest import Manifest
from hf_lora.record import record_of
from hf_lora.slots import component_of
from hf_lora.targets import condense, condense_values
from hf_lora.walks import bare_modules, tuner_modules


def plain_lora(host: object, name: str = "default") -> Adapter:
    """Returns an AdaLoRA adapter as a plain LoRA that computes the same.

    B takes the singular values, dropped ranks are left out, and so are layers without any. A
    layer's alpha/rank stays what it was when training began: alpha over `init_r`. The 1e-5 that
    peft adds to the rank goes into B as well. Heads trained whole come along.

    Args:
        host: A model or `PeftModel` with the adapter.
        name: The adapter.

    Raises:
        AdapterNotFound: The host has no such adapter.
        InvalidOption: It is no AdaLoRA, or all its singular values are zero: it does nothing.
        UnsupportedTarget: A convolution on which AdaLoRA computes what no LoRA can.
        MetaHost: The adapter has no weights.
    """
    model = model_of(host)
    check_known_name(model, name)
    config = peft_configs(model)[name]
    if not isinstance(config, AdaLoraConfig):
        raise InvalidOption(
            f"adapter {name!r} is of the method {getattr(config.peft_type, 'value', '')}, and this "
            "is for AdaLoRA",
            fix="save_lora saves it as it is.",
            field="name",
        )
    check_has_weights(model, "exported")
    targets: dict[str, dict[str, Tensor]] = {}
    strengths: dict[str, float] = {}
    for path, layer in _layers(model, name):
        a, b, strength = _plain_factors(path, layer, name)
        if len(a):
            targets[path], strengths[path] = {"lora_A": a, "lora_B": b}, strength
    if not targets:
        raise InvalidOption(
            f"all singular values of adapter {name!r} are zero, so there is no LoRA that does what "
            "it does",
            fix="Train it first; peft starts them at zero.",
            field="name",
        )
    ranks = {path: len(factors["lora_A"]) for path, factors in targets.items()}
    whole = component_of(model, name).modules
    component = Component(_plain_config(model, config, ranks, strengths), targets, whole)
    known = record_of(model).manifests.get(name, Manifest())
    manifest = replace(
        known,
        digest="",
        configs={},
        base=base_of(host, {MODEL: model}),
        host=type(model).__name__,
        family=getattr(family_of(model), "name", ""),
        fused={},
    )
    return Adapter({MODEL: component}, manifest)


def _layers(model: nn.Module, name: str) -> list[tuple[str, Any]]:
    return [
        (path, layer)
        for path, layer in tuner_modules(model)
        if isinstance(layer, AdaLoraLayer) and name in layer.lora_A
    ]


def _plain_factors(path: str, layer: Any, name: str) -> tuple[Tensor, Tensor, float]:
    """Returns A, B and alpha/rank of a plain LoRA that does what the layer does."""
    trap = trap_of(layer)
    if trap:
        raise UnsupportedTarget(f"{path} has no equal as a LoRA: {trap}", field=path)
    initial = float(layer.ranknum[name])
    strength = layer.scaling[name] / initial
    a, e, b = (getattr(layer, key)[name] for key in ("lora_A", "lora_E", "lora_B"))
    rank = int(e.detach().count_nonzero())
    # as peft will divide, to the bit; what AdaLoRA's layer multiplies by instead goes into B
    stated = (strength * rank) / rank if rank else strength
    factor = layer.scaling[name] / (initial + 1e-5) / stated
    a, b = fold_diagonal(a, e, b, factor=factor)
    base = layer.get_base_layer()
    if isinstance(base, nn.Conv2d):
        # E A is the kernel in one row
        a = a.reshape(len(a), -1, *base.kernel_size)
        b = b[:, :, None, None]
    return a, b, strength


def _plain_config(
    model: nn.Module, config: Any, ranks: dict[str, int], strengths: dict[str, float]
) -> dict[str, Any]:
    names = {field.name for field in fields(LoraConfig)} | {"peft_version"}
    plain = {key: value for key, value in saved_config(config).items() if key in names}
    paths = [path for path, _ in bare_modules(model)]
    alphas = {path: _whole(strengths[path] * rank) for path, rank in ranks.items()}
    (rank, alpha), _ = Counter((ranks[path], alphas[path]) for path in ranks).most_common(1)[0]
    return {
        **plain,
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": condense(ranks, paths),
        "rank_pattern": condense_values(ranks, rank, paths),
        "alpha_pattern": condense_values(alphas, alpha, paths),
        "init_lora_weights": True,
    }


def _whole(alpha: float) -> float:
    """Returns whole numbers as such, as peft's configs have them."""
    return int(alpha) if alpha.is_integer() else alpha
