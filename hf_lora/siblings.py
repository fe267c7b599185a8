"""Layers of one kind are made once: peft makes the first, its siblings are copies of it.

peft walks the whole model for every adapter, other adapters' factors included, and makes a LoRA
layer in some 0.5 ms, most of it spent on empty containers and on factors that a load replaces. A
model has few kinds of layers (SmolLM2: four shapes) and hundreds of each. So peft injects into a
skeleton that holds one layer of each kind at its own path, and the rest is copied. Where values
are drawn peft makes every layer, in the model's order, so they are those of its own injection.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, inject_adapter_in_model
from peft.functional import cast_adapter_dtype
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer, _check_lora_target_modules_mamba
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_lora.adapter import Component
from hf_lora.choose import by_pattern
from hf_lora.hosts import features, peft_configs
from hf_lora.walks import bare

_ALIKE = (nn.Linear, Conv1D)  # exactly these: a subclass may be dispatched by other facts
_APART = (*_ALIKE, nn.Conv2d, nn.Conv3d)  # peft looks at such a layer alone
_STACKS = (nn.Conv1d, nn.ConvTranspose1d)  # their 3-D weights are no experts

# fields of a LoraConfig for which peft looks beyond the layer
_BEYOND = (
    "alora_invocation_tokens", "arrow_config", "corda_config", "ensure_weight_tying", "eva_config",
    "kasa_config", "layer_replication", "loftq_config", "lora_ga_config", "megatron_config",
    "modules_to_save", "monteclora_config", "target_parameters", "trainable_token_indices",
    "use_bdlora", "use_qalora", "velora_config",
)  # fmt: skip


@dataclass(frozen=True)
class Siblings:
    """Which targets of a model peft must make itself, and which are copies of those.

    Attributes:
        modules: The bare model's modules by path, from before the adapter.
        groups: A target that peft makes -> those that are copied from it.
    """

    modules: Mapping[str, nn.Module]
    groups: Mapping[str, Sequence[str]]

    def put_on(self, config: Any, name: str, *, hollow: bool, empty: bool) -> None:
        """Gives all targets their layers, and the model the config.

        Args:
            config: Complete config with literal target names.
            name: Name of the adapter.
            hollow: Leave the factors on the meta device. Else nothing is copied.
            empty: A load puts others in place of all factors, so copies may share the first's.
        """
        chosen = {p for first, others in self.groups.items() for p in (first, *others)}
        every = [path for path in self.modules if path in chosen]
        held = {path: _held(self.modules, path) for path in every}
        made = [path for path in every if path in self.groups] if hollow else every
        layers = self._injected(config, name, {path: held[path] for path in made}, hollow=hollow)
        for path, layer in layers.items():
            mode = bare(layer).training  # peft makes layers in training mode, eval() model or not
            new = layer.modules() if layer is not held[path] else _entries(layer, name)
            for module in new:
                module.training = mode
            self._put(path, layer)
        for first, others in self.groups.items() if hollow else ():
            recipe = _Recipe.of(layers[first])
            for path in others:
                if isinstance(held[path], BaseTunerLayer):
                    _graft(layers[first], held[path], name)
                else:
                    self._put(path, recipe.follow(base_layer=held[path]))
                for module in () if empty else _entries(_held(self.modules, path), name):
                    _own_parameters(module)
        model: Any = self.modules[""]
        if peft_configs(model):
            model.peft_config[name] = config
        else:
            model.peft_config = {name: config}

    def _put(self, path: str, layer: nn.Module) -> None:
        parent, _, leaf = path.rpartition(".")
        self.modules[parent]._modules[leaf] = layer

    def _injected(
        self, config: Any, name: str, layers: Mapping[str, nn.Module], *, hollow: bool
    ) -> dict[str, Any]:
        """Returns what peft makes of these layers, each at its path in an otherwise empty model."""
        root = nn.Module()
        for path, layer in layers.items():
            *parents, leaf = path.split(".")
            _check_lora_target_modules_mamba(config, self.modules[""], leaf)
            node = root
            for segment in parents:
                node = node._modules.setdefault(segment, nn.Module())  # type: ignore[assignment]
            node._modules[leaf] = layer
        named = config.target_modules
        try:
            config.target_modules = set(layers)  # peft shortens a long list by what it sees
            inject_adapter_in_model(config, root, name, low_cpu_mem_usage=hollow)
            # as peft.get_peft_model does: half-precision factors lose small updates
            cast_adapter_dtype(root, adapter_name=name, autocast_adapter_dtype=True)
        finally:
            config.target_modules = named
        return {path: root.get_submodule(path) for path in layers}


def siblings_of(modules: Mapping[str, nn.Module], component: Component) -> Siblings | None:
    """Finds the targets of a file's component that can be made by copying.

    None where peft must see the whole model: for other methods, for more than LoRA on layers, where
    peft rewrites the names of targets (fused 3-D parameters), for quantised models.
    """
    if component.kind != "LORA" or _looks_beyond(modules, component.config):
        return None
    keys = {}
    for path, factors in component.targets.items():
        shapes = (tuple(tensor.shape) for tensor in factors.values())
        keys[path] = (component.scaling(path), *factors, *shapes)
    return _grouped(modules, keys)


def siblings_by(
    modules: Mapping[str, nn.Module], config: PeftConfig, paths: Iterable[str]
) -> Siblings | None:
    """Finds the targets of a config that can be made by copying; None as in `siblings_of`."""
    if type(config) is not LoraConfig or _looks_beyond(modules, vars(config)):
        return None
    keys = {}
    for path in paths:
        rank = by_pattern(config.rank_pattern, path, config.r)
        keys[path] = (rank, by_pattern(config.alpha_pattern, path, config.lora_alpha))
    return _grouped(modules, keys)


def _looks_beyond(modules: Mapping[str, nn.Module], config: Mapping[str, Any]) -> bool:
    if any(config.get(name) for name in _BEYOND) or getattr(modules[""], "is_quantized", False):
        return True
    return any(
        type(p) is not nn.Parameter
        or not p.is_floating_point()  # packed
        or (p.ndim == 3 and not isinstance(m, _STACKS))
        for m in modules.values()
        for p in m._parameters.values()
        if p is not None
    )


def _grouped(modules: Mapping[str, nn.Module], keys: Mapping[str, Hashable]) -> Siblings | None:
    """Groups targets by what they are and what is asked for there.

    Copied are layers without hooks or parametrizations that differ in their base alone.
    """
    groups: dict[object, list[str]] = defaultdict(list)
    for path, key in keys.items():
        held: Any = _held(modules, path) if path.rpartition(".")[0] in modules else None
        base: Any = None if held is None else bare(held)
        if type(base) not in _APART:
            return None
        alike = type(base) in _ALIKE and not _steered(base) and type(held) in (*_ALIKE, LoraLinear)
        groups[(_kind(held, base), key) if alike else path].append(path)
    return Siblings(modules, {paths[0]: paths[1:] for paths in groups.values()})


def _held(modules: Mapping[str, nn.Module], path: str) -> Any:
    """Returns what stands at a path: a layer, or the tuner layer around it."""
    parent, _, leaf = path.rpartition(".")
    return modules[parent]._modules.get(leaf)


def _steered(base: nn.Module) -> bool:
    hooks = (base._forward_hooks, base._forward_pre_hooks, base._backward_hooks)
    return any(hooks) or "parametrizations" in base._modules or "forward" in vars(base)


def _kind(held: nn.Module, base: Any) -> tuple[object, ...]:
    weight, bias = base.weight, base._parameters.get("bias")
    of_base = (type(base), features(base), bias is None, weight.dtype, weight.device, base.training)
    return (type(held), *of_base)


def _entries(layer: Any, name: str) -> Iterable[nn.Module]:
    """Yields the modules that one adapter has on a layer."""
    for key, container in layer._modules.items():
        if key != "base_layer" and name in container._modules:
            yield from container._modules[name].modules()


def _own_parameters(module: nn.Module) -> None:
    """Gives a copy parameters of its own, on meta."""
    for key, parameter in module._parameters.items():
        if parameter is not None:
            own = nn.Parameter(torch.empty_like(parameter), requires_grad=parameter.requires_grad)
            module._parameters[key] = own


def _graft(first: Any, layer: Any, name: str) -> None:
    """Gives a layer that has other adapters what peft gave its sibling for this one."""
    for key, value in vars(first).items():
        own = vars(layer).get(key)
        if isinstance(value, dict) and isinstance(own, dict) and name in value:
            own[name] = value[name]
    if "adapter_layer_names" in vars(first):  # DoRA lists one factor more
        layer.adapter_layer_names = first.adapter_layer_names
    for key, container in first._modules.items():
        if key != "base_layer" and name in container._modules:
            item = container._modules[name]
            layer._modules[key]._modules[name] = _Recipe.of(item).follow()


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
