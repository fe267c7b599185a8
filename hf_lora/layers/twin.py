"""Doubles of a tuner layer: peft's own code runs on them and touches nothing else."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

_NO_DOUBLE = ("mps",)  # devices without float64


def wide_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Returns the dtype in which sums for a weight are made, rounded once at the end.

    float32 for half precision. float64 for float32: taking an update apart from the sum and adding
    it again costs up to two units in the last place otherwise.
    """
    half = torch.finfo(dtype).bits < 32
    return torch.float32 if half or device.type in _NO_DOUBLE else torch.float64


def shallow(module: Any) -> Any:
    """Returns a second module object with the same attributes; its own dicts are shared."""
    double = object.__new__(type(module))
    double.__dict__.update(module.__dict__)
    return double


def with_active(layer: Any, names: Sequence[str]) -> Any:
    """Returns a double of the layer on which exactly the named adapters are active, or disabled."""
    double = shallow(layer)
    double.__dict__.update(_active_adapter=list(names), _disable_adapters=not names)
    return double


def adapted(
    layer: Any,
    name: str,
    values: Mapping[str, Tensor],
    *,
    dtype: torch.dtype | None,
    consume: bool = False,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns what peft's merge of one adapter makes of base values, and what it caches.

    Args:
        layer: The tuner layer; it stays as it is.
        name: One of its adapters.
        values: Base parameter name -> value.
        dtype: What the factors become; None leaves them.
        consume: Let peft write into `values`, which saves a copy of them.

    Raises:
        Exception: Of many kinds, where peft cannot merge.
    """
    base = shallow(layer.get_base_layer())
    data = {k: v.detach() if consume else v.detach().clone() for k, v in values.items()}
    own = {k: nn.Parameter(v, requires_grad=False) for k, v in data.items()}
    base.__dict__["_parameters"] = dict(base._parameters) | own
    double = shallow(layer)
    modules = dict(layer._modules)
    for attribute in layer.adapter_layer_names:
        held = modules.get(attribute)
        if isinstance(held, nn.ModuleDict | nn.ParameterDict):
            modules[attribute] = _only(held, name, dtype)
    modules["base_layer"] = base
    double.__dict__.update(_modules=modules, merged_adapters=[], _caches={})
    for method in ("unmerge", "forward"):
        double.__dict__.pop(method, None)
    if isinstance(layer, LoraLayer):
        double.__dict__["lora_variant"] = _plain_variants(layer, name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        double.merge(adapter_names=[name])
    return {key: base._parameters[key].detach() for key in values}, double._caches


def _only(held: Any, name: str, dtype: torch.dtype | None) -> Any:
    """Returns a container like `held` with a copy of the one adapter in it."""
    if name not in held:
        return type(held)({})
    item = held[name]
    if isinstance(item, Tensor):
        return type(held)({name: nn.Parameter(item.detach().to(dtype or item.dtype, copy=True))})
    double = copy.deepcopy(item)
    return type(held)({name: double if dtype is None else double.to(dtype)})


def _plain_variants(layer: Any, name: str) -> dict[str, Any]:
    """Returns the LoRA variant at full strength: peft's own in place of one that has a strength."""
    variant = layer.lora_variant.get(name)
    plain = getattr(variant, "peer", type(variant))
    return {} if variant is None else {name: plain()}
