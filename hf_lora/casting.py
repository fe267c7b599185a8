"""Weights that are kept in floats of one byte and cast for each call of the layer that holds them.

So `enable_layerwise_casting` of diffusers 0.42 keeps them. A tuner layer that reads the weight or
bias of its base by itself finds those of between the calls.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from torch import nn

from hf_lora.errors import UnsupportedTarget
from hf_lora.hosts import peft_configs
from hf_lora.walks import bare_modules, holds, nested, tuner_modules

# Methods whose layers compute right over such weights: compared under peft 0.21 and diffusers 0.42
# with the same values in float32, at strengths 1 and 1/2. The others read weight or bias of the
# base themselves, or take its dtype for their own factors.
_OVER_BYTES = frozenset({
    "LORA", "LOHA", "LOKR", "IA3", "OFT", "FOURIERFT", "HRA", "C3A", "MISS", "ROAD",
    "WAVEFT", "GRALORA",
})  # fmt: skip
# Those that do so where casting is switched on over the adapter, too: diffusers puts a forward of
# its own on each tuner layer then, which needs layers with `cast_input_dtype_enabled`.
_UNDER_CASTING = frozenset({"LORA", "LOHA", "LOKR", "OFT", "MISS"})
# methods of these -> the value of a field of the config with which they read the base's weight
_READERS = {"LORA": ("use_dora", True), "MISS": ("init_weights", "bat")}


def check_stored(model: nn.Module, config: PeftConfig) -> None:
    """Checks that an adapter can sit on weights that are kept in floats of one byte.

    Raises:
        UnsupportedTarget: Its method reads them without calling the layers that hold them, and
            would take them for what they are between calls.
    """
    if _method(config, _OVER_BYTES):
        return
    for path, module in bare_modules(model):
        if _in_bytes(module) and check_target_module_exists(config, path):
            raise _refusal(model, path, config, "Use a plain LoRA, LoHa or LoKr")


def check_castable(model: nn.Module, dtype: torch.dtype) -> None:
    """Checks that the adapters of a model work when its weights are kept in another dtype.

    Raises:
        UnsupportedTarget: The dtype has one byte, and an adapter is not of the kinds that do.
    """
    if dtype.itemsize > 1:
        return
    for name, config in peft_configs(model).items():
        if not _method(config, _UNDER_CASTING):
            first = next((p for p, layer in _layers(model) if holds(layer, name)), name)
            raise _refusal(model, first, config, f"Call detach_lora(host, {name!r}) first")


def check_readable(model: nn.Module, names: Collection[str]) -> None:
    """Checks that adapters can be used on the weights as they are kept now.

    Raises:
        UnsupportedTarget: Weights below one of them were cast to one byte since it was attached.
    """
    configs = peft_configs(model)
    doubtful = [n for n in names if n in configs and not _method(configs[n], _UNDER_CASTING)]
    for path, layer in _layers(model) if doubtful else ():
        late = hasattr(layer, "_diffusers_hook")  # the forward that casting puts on tuner layers
        for name in doubtful:
            fails = late or not _method(configs[name], _OVER_BYTES)
            if fails and holds(layer, name) and _in_bytes(layer.get_base_layer()):
                raise _refusal(model, path, configs[name], f"Leave {name!r} out")


def _layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for path, outer in tuner_modules(model):
        for layer in nested(outer):
            if isinstance(layer, BaseTunerLayer):
                yield path, layer


def _method(config: PeftConfig, methods: Collection[str]) -> bool:
    """Tells whether a config is of one of the methods, and not of the form that reads weights."""
    kind = _kind_of(config)
    key, value = _READERS.get(kind, ("", True))
    return kind in methods and getattr(config, key, None) != value


def _kind_of(config: PeftConfig) -> str:
    return str(getattr(config.peft_type, "value", config.peft_type))


def _in_bytes(module: nn.Module) -> bool:
    held = (p for p in module._parameters.values() if p is not None)
    return any(p.is_floating_point() and p.element_size() == 1 for p in held)


def _refusal(model: nn.Module, path: str, config: PeftConfig, fix: str) -> UnsupportedTarget:
    kind = _kind_of(config)
    key, value = _READERS.get(kind, ("", None))
    form = f" with {key}={value!r}" if key and getattr(config, key, None) == value else ""
    return UnsupportedTarget(
        f"the weights of {type(model).__name__} are kept in floats of one byte between calls, and "
        f"{kind}{form} at {path} would compute with those",
        fix=f"{fix}, or keep the base in two or four bytes.",
    )
