"""What a layer must be for its adapters to be merged, or active together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from hf_lora.errors import InvalidOption, MergeError, shown
from hf_lora.layers.kinds import parameter_keys, trap_of
from hf_lora.quantised import FOREIGN, storage_of
from hf_lora.walks import tuner_modules

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def names_in(names: object) -> list[str]:
    """Returns one name or several as a list.

    Raises:
        InvalidOption: They are neither.
    """
    if isinstance(names, str):
        return [names]
    if isinstance(names, list | tuple) and all(isinstance(name, str) for name in names):
        return list(names)
    raise InvalidOption(
        f"names={shown(names)} is no adapter name and no list of them",
        fix="Give for instance 'default', or ['style', 'detail'].",
        field="names",
    )


def check_heads(model: nn.Module, names: Sequence[str]) -> None:
    """Raises InvalidOption when two of the adapters bring the same module trained whole."""
    for path, module in tuner_modules(model):
        here = [n for n in names if n in module._get_available_adapters()]
        if not isinstance(module, BaseTunerLayer) and len(here) > 1:
            raise InvalidOption(
                f"adapters {here[0]!r} and {here[1]!r} both bring their own {path}",
                fix="Only one of them can be active at a time.",
                field="names",
            )


def check_mergeable(path: str, layer: Any, names: Sequence[str], *, shared: bool) -> None:
    """Checks that weights can do what a layer does, and would come back.

    Args:
        path: Path of the layer, for the error.
        layer: The tuner layer.
        names: The adapters to merge.
        shared: Whether the base layer is used elsewhere as well, without the adapter.

    Raises:
        MergeError: They cannot, or the adapters hold values that are not finite.
    """
    base = layer.get_base_layer()
    _check_storage(path, layer, base)
    computed = "weight" in dir(base) and "weight" not in base._parameters
    computed |= any(key not in base._parameters for key in parameter_keys(layer))
    if computed or base._forward_hooks or base._forward_pre_hooks:
        raise MergeError(
            f"the weight or output of {path} is computed by a hook or parametrization, which a "
            "merge would not pass through",
            fix="Keep the adapter unmerged.",
        )
    reason = trap_of(layer)
    if shared:
        reason = "the same module is used elsewhere without the adapter"
    if reason:
        raise MergeError(
            f"no weight of {path} does what the adapter does: {reason}",
            fix="Keep the adapter unmerged.",
        )
    for key in parameter_keys(layer):
        parameter = base._parameters[key]
        if parameter.dtype not in _FLOATS or type(parameter.data) is not Tensor:
            raise MergeError(
                f"{path}.{key} is quantised or sharded ({parameter.dtype}); merging would round it",
                fix="Load the base whole, in bfloat16 or float32, to merge.",
            )
    _check_factors(path, layer, names)


def _check_storage(path: str, layer: nn.Module, base: nn.Module) -> None:
    """Raises MergeError for a base layer that is quantised, or was so when its adapter came."""
    row = storage_of(base)
    if row is not None and not (row is FOREIGN and "weight" in base._parameters):
        raise MergeError(
            f"{path} is quantised ({row.name}), and the merged weight would be rounded to as few "
            "bits again, which can lose most of what was learnt",
            fix=row.merge,
        )
    if type(layer).__module__ in _ON_QUANTISED:
        raise MergeError(
            f"{path} was dequantised below its adapter, and peft's {type(layer).__name__} layer "
            "merges into a quantised weight only",
            fix="Call save_lora, detach_lora and load_lora, then merge.",
        )


# modules of peft's layers over quantised weights
_ON_QUANTISED = ("peft.tuners.lora.bnb", "peft.tuners.lora.hqq", "peft.tuners.lora.torchao")


def _check_factors(path: str, layer: Any, names: Sequence[str]) -> None:
    for attribute in layer.adapter_layer_names:
        held = getattr(layer, attribute)
        for name in names:
            if name not in held:
                continue
            item = held[name]
            tensors = [item] if isinstance(item, Tensor) else list(item.parameters())
            if not all(torch.isfinite(t).all() for t in tensors):
                raise MergeError(f"adapter {name!r} has NaN or infinite values at {path}")
