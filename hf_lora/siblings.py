"""Layers of one kind are made once: peft makes the first, its siblings are copies of it.

peft makes a LoRA layer in some 0.5 ms, most of it spent on empty containers and on factors that a
load replaces. A model has few kinds of layers (SmolLM2: four shapes) and hundreds of each.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_lora.adapter import Component
from hf_lora.hosts import features

_ALIKE = (nn.Linear, Conv1D)  # exactly these: a subclass may be dispatched by other facts


@dataclass(frozen=True)
class Siblings:
    """Which targets of a model peft must make itself, and which are copies of those.

    Attributes:
        modules: The bare model's modules by path, from before the adapter.
        groups: A target that peft makes -> those that are copied from it. Empty where peft must
            make them all.
    """

    modules: Mapping[str, nn.Module]
    groups: Mapping[str, Sequence[str]]

    def copy(self) -> None:
        """Gives each sibling a copy of the layer that peft made, over the sibling's own base.

        Factors are shared with the first until a load puts others in their place.
        """
        for first, others in self.groups.items():
            if not others:
                continue
            parent, leaf = _place(self.modules, first)
            assert parent is not None  # `siblings_of` found it
            layer: Any = parent._modules[leaf]
            recipe = _Recipe.of(layer)
            for path in others:
                parent, leaf = _place(self.modules, path)
                assert parent is not None
                base = parent._modules[leaf]
                # a path that others end in has its layer from peft already
                if base is not None and not isinstance(base, BaseTunerLayer):
                    parent._modules[leaf] = recipe.follow(base_layer=base)


def siblings_of(modules: Mapping[str, nn.Module], component: Component) -> Siblings:
    """Finds the targets that can be made by copying.

    Copied are bare layers without hooks or parametrizations that differ in their base alone. None
    are for other methods, for factors of parameters, and for models with fused 3-D parameters,
    where peft rewrites names.
    """
    if component.kind != "LORA" or component.config.get("target_parameters"):
        return Siblings(modules, {})
    if any(p.ndim == 3 for m in modules.values() for p in m._parameters.values() if p is not None):
        return Siblings(modules, {})
    groups: dict[object, list[str]] = defaultdict(list)
    for path in component.targets:
        parent, leaf = _place(modules, path)
        base = parent._modules.get(leaf) if parent is not None else None
        alike = base is not None and type(base) in _ALIKE and not _steered(base)
        groups[_kind(base, component, path) if alike else path].append(path)
    return Siblings(modules, {paths[0]: paths[1:] for paths in groups.values()})


def _place(modules: Mapping[str, nn.Module], path: str) -> tuple[nn.Module | None, str]:
    parent, _, leaf = path.rpartition(".")
    return modules.get(parent), leaf


def _steered(base: nn.Module) -> bool:
    hooks = (base._forward_hooks, base._forward_pre_hooks, base._backward_hooks)
    return any(hooks) or "parametrizations" in base._modules or "forward" in vars(base)


def _kind(base: Any, component: Component, path: str) -> tuple[object, ...]:
    weight, bias = base.weight, base._parameters.get("bias")
    of_base = (type(base), features(base), bias is None, weight.dtype, weight.device, base.training)
    factors = component.targets[path]
    shapes = (tuple(tensor.shape) for tensor in factors.values())
    return (*of_base, component.scaling(path), *factors, *shapes)


@dataclass(frozen=True)
class _Recipe:
    """How to make copies of one module: worked out once, followed hundreds of times.

    Attributes:
        kind: Class of the module.
        shared: Attributes that copies share (numbers, configs, parameters by way of `copied`).
        empty: Empty containers: name -> type. A new one is made several times as fast as a copy.
        copied: Other containers, which every copy gets its own of.
        children: The modules below, without the base layer.
    """

    kind: type[nn.Module]
    shared: Mapping[str, Any]
    empty: Mapping[str, type]
    copied: Mapping[str, Any]
    children: Mapping[str, _Recipe | None]

    @classmethod
    def of(cls, module: nn.Module) -> _Recipe:
        held = {k: v for k, v in vars(module).items() if isinstance(v, dict | list | set)}
        below = {k: m for k, m in module._modules.items() if k != "base_layer"}
        return cls(
            kind=type(module),
            shared={k: v for k, v in vars(module).items() if k not in held},
            empty={k: type(v) for k, v in held.items() if not v},
            copied={k: v for k, v in held.items() if v},
            children={k: m if m is None else cls.of(m) for k, m in below.items()},
        )

    def follow(self, **base: nn.Module) -> nn.Module:
        """Returns a copy; `base` are modules that it is to hold besides."""
        new = self.kind.__new__(self.kind)
        attributes = vars(new)
        attributes.update(self.shared)
        for name, kind in self.empty.items():
            attributes[name] = kind()
        for name, value in self.copied.items():
            attributes[name] = value.copy()
        for name, child in self.children.items():
            attributes["_modules"][name] = None if child is None else child.follow()
        attributes["_modules"].update(base)
        return new
