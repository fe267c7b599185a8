"""Walks over a model with adapters on it: its modules, tuner layers and parameters.

All are loops over plain stacks, several times as fast as torch's generators, which hand each item
up through all levels: every attach and load takes some of them, whatever adapters are there.
Paths are those of the bare model.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from peft.tuners.lora.layer import LoraLayer, MultiheadAttention
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from hf_lora.errors import UnsupportedTarget

AROUND = ("base_layer", "original_module")  # segments of paths that wrappers add

TunerModule = BaseTunerLayer | AuxiliaryTrainingWrapper


def modules_of(model: nn.Module, *, factors: bool = True) -> Iterator[nn.Module]:
    """Yields every module once, in no order that matters.

    Several times as fast as torch's generator, which hands each module up through all levels.

    Args:
        model: The model.
        factors: Whether to go into the containers of a LoRA layer, where the factors are.
    """
    seen: set[int] = set()
    stack = [model]
    while stack:
        module = stack.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield module
        below = module._modules
        if not factors and below and isinstance(module, LoraLayer):
            yield from (c for key, c in below.items() if key != "base_layer" and c is not None)
            stack.append(module.base_layer)
        else:
            stack.extend(c for c in below.values() if c is not None)


def bare_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yields (path, module) of the bare model, each module once, adapters looked through."""
    seen: set[int] = set()
    stack = [("", model)]
    while stack:
        path, module = stack.pop()
        module = bare(module)
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield path, module
        children = [
            (f"{path}.{name}" if path else name, child)
            for name, child in module._modules.items()
            if child is not None
        ]
        stack += reversed(children)


def parameters_of(model: nn.Module, *, factors: bool = True) -> list[nn.Parameter]:
    """Returns every parameter, shared ones as often as they are held.

    Args:
        model: The model.
        factors: Whether to include the factors of LoRA layers.
    """
    seen: set[int] = set()
    stack: list[nn.Module] = [model]
    found: list[nn.Parameter | None] = []
    while stack:
        module = stack.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        found.extend(module._parameters.values())
        below = module._modules
        if below and not factors and isinstance(module, LoraLayer):
            below = {"base_layer": module.base_layer}
        for child in below.values():
            if child is None:
                continue
            if child._modules:
                stack.append(child)
            else:
                found.extend(child._parameters.values())
    return [parameter for parameter in found if parameter is not None]


def named_parts(model: nn.Module) -> tuple[dict[str, nn.Parameter], list[tuple[str, Any]]]:
    """Returns all parameters but the factors of LoRA layers by bare name, and those layers.

    Names are without the segments of tuner layers around the base; a shared parameter or layer has
    the first of its. With each layer stands what its place puts before the names of its factors.
    """
    named: dict[str, nn.Parameter] = {}
    layers: list[tuple[str, Any]] = []
    seen: set[int] = set()
    stack = [("", model)]
    while stack:
        path, module = stack.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        front = f"{path}." if path else ""
        for key, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                named[front + key] = parameter
        below = module._modules
        if below and isinstance(module, LoraLayer):
            # peft nests the layers of several parameters of one module at one path
            own = vars(module).get("parameter_name")
            layers.append((f"{front}{own}." if own else front, module))
            below = {"base_layer": module.base_layer}
        stack += [
            (path if key in AROUND else front + key, child)
            for key, child in reversed(below.items())
            if child is not None and (child._modules or child._parameters)
        ]
    return named, layers


def factors_of(layer: Any) -> Iterator[tuple[tuple[str, str, str], nn.Parameter]]:
    """Yields ((container, adapter, key), parameter) of the factors on one LoRA layer."""
    for kind, container in layer._modules.items():
        if kind == "base_layer" or container is None:
            continue
        for name, parameter in container._parameters.items():
            if parameter is not None:
                yield (kind, name, ""), parameter
        for name, item in container._modules.items():
            held = item.named_parameters() if item._modules else item._parameters.items()
            for key, parameter in held:
                if parameter is not None:
                    yield (kind, name, key), parameter


def bare(module: nn.Module) -> nn.Module:
    """Returns the module that a tuner layer or a training wrapper stands in for."""
    while True:
        if isinstance(module, BaseTunerLayer):
            module = module.get_base_layer()
        elif isinstance(module, AuxiliaryTrainingWrapper):
            module = module.original_module
        else:
            return module


def tuner_modules(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yields (bare path, module) of every tuner layer and training wrapper, outermost only.

    Typed as Any because peft's layers are modules mixed with an interface it does not type.
    """
    seen: set[int] = set()
    stack = [("", model)]
    while stack:
        path, module = stack.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        if isinstance(module, TunerModule):
            _check_known_layer(path, module)
            yield path, module
            continue
        stack += [
            (f"{path}.{name}" if path else name, child)
            for name, child in reversed(module._modules.items())
            if child is not None
        ]


def _check_known_layer(path: str, module: nn.Module) -> None:
    """Refuses what would be half seen: peft's LoRA of a MultiheadAttention has another inside."""
    if isinstance(module, MultiheadAttention):
        raise UnsupportedTarget(
            f"{path} is peft's LoRA on torch's MultiheadAttention, which hf_lora does not read",
            fix="Use peft's own save_pretrained and PeftModel.from_pretrained for it.",
        )


def nested(module: Any) -> Iterator[Any]:
    """Yields a tuner module and the tuner layers below it (several parameters of one module)."""
    while isinstance(module, TunerModule):
        yield module
        module = getattr(module, "base_layer", None)


def holds(layer: Any, name: str) -> bool:
    """Tells whether a tuner layer has factors of the adapter.

    As peft's `_get_available_adapters`, which collects the names of all adapters for the answer.
    """
    factors = (getattr(layer, attribute, None) for attribute in layer.adapter_layer_names)
    return any(name in f for f in factors if isinstance(f, nn.ModuleDict | nn.ParameterDict))
