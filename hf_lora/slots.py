"""Where the tensors of an adapter live on a host: read them out, or put loaded ones in.

A slot is one tensor of one adapter. Only slots are ever written by a load, so base weights cannot
be touched whatever a file holds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from hf_lora.adapter import Component, check_finite
from hf_lora.configs import check_keeps_base, saved_config
from hf_lora.errors import (
    AdapterMismatch,
    BadAdapterFile,
    InvalidOption,
    TrainingError,
    listing,
    shown,
)
from hf_lora.formats.peft import FACTOR_MARKS, factor_name, with_all_ranks
from hf_lora.hosts import peft_configs
from hf_lora.layers.parts import PartsB
from hf_lora.targets import condense, condense_values
from hf_lora.walks import bare_modules, nested, tuner_modules


@dataclass(slots=True)  # not frozen, which would cost a load a tenth of its time here
class Slot:
    """One tensor of an adapter on a host.

    Attributes:
        path: Module path in the bare model.
        name: Factor name, or parameter name inside a module trained whole.
        whole: Whether it belongs to a module trained whole (a head) or in rows (new tokens).
        owner: The module or dict that holds the tensor under `key`.
        key: Name of the parameter or buffer in its owner.
        device: Where the base layer lies.
        dtype: What a loaded tensor becomes here.
    """

    path: str
    name: str
    whole: bool
    owner: nn.Module
    key: str
    device: torch.device
    dtype: torch.dtype

    @property
    def value(self) -> Tensor:
        """The tensor as it is now; on meta before a load has put one in."""
        value = self.owner._parameters.get(self.key)
        return self.owner._buffers[self.key] if value is None else value  # type: ignore[return-value]

    def put(self, tensor: Tensor, *, own: bool = False) -> None:
        """Puts a loaded tensor in, on the base layer's device; it needs a gradient as before.

        Args:
            tensor: The value. It becomes the parameter itself where `own` and no cast is needed.
            own: Whether nobody else holds the tensor and its values are known to be finite.

        Raises:
            BadAdapterFile: It is no number of the host's kind, or overflows in the host's dtype.
        """
        name = f"{self.path}.{self.name}"
        if tensor.is_floating_point() != self.dtype.is_floating_point:
            raise BadAdapterFile(
                f"{name} holds {str(tensor.dtype).removeprefix('torch.')} values where the host "
                f"has {str(self.dtype).removeprefix('torch.')}",
                field=name,
            )
        ready = tensor.to(self.device, self.dtype, copy=not own)
        if not own or ready.dtype != tensor.dtype:
            check_finite(f"{name}, as {str(self.dtype).removeprefix('torch.')},", ready)
        held = self.owner._parameters.get(self.key)
        if held is not None:
            needs_grad = held.requires_grad
            self.owner._parameters[self.key] = nn.Parameter(ready, requires_grad=needs_grad)
        else:
            self.owner._buffers[self.key] = ready

    def overwrite(self, tensor: Tensor) -> None:
        """Writes values of the same shape into the tensor that is there, under `torch.no_grad`."""
        self.value.copy_(tensor)


@dataclass(slots=True)
class PartsSlot(Slot):
    """The factor B of a LoRA on parts of a fused projection, whole as files have it."""

    @property
    def value(self) -> Tensor:
        """The whole B, made of the blocks."""
        parts: Any = self.owner
        return parts.weight  # type: ignore[no-any-return]

    def put(self, tensor: Tensor, *, own: bool = False) -> None:
        """Puts the blocks of a whole B in; AdapterMismatch where it has values beside them."""
        parts: Any = self.owner
        name = f"{self.path}.{self.name}"
        ready = tensor.to(self.device, self.dtype)
        check_finite(f"{name}, as {str(self.dtype).removeprefix('torch.')},", ready)
        parts.put(ready)

    def overwrite(self, tensor: Tensor) -> None:
        """Writes the blocks of a whole B into those that are there."""
        parts: Any = self.owner
        parts.put(tensor)


def slots_of(model: nn.Module, name: str) -> Iterator[Slot]:
    """Yields every slot of an adapter, in the model's order."""
    for path, outer in tuner_modules(model):
        if isinstance(outer, AuxiliaryTrainingWrapper):
            yield from _wrapped(path, outer, name)
            continue
        depth = path  # peft writes nested parameter wrappers as path, path.base_layer, ...
        for module in nested(outer):
            if isinstance(module, BaseTunerLayer):
                yield from _factors(depth, module, name)
            depth += ".base_layer"


def check_whole(model: nn.Module, name: str) -> None:
    """Raises TrainingError where this process does not hold every value of an adapter.

    A sharded model (FSDP2, ZeRO-3) gives each process a part, or nothing, and a save of that would
    look like an adapter.
    """
    broken = [
        f"{where} {tuple(parameter.shape)}"
        for where, parameter in parameters_in(model, name)
        if type(parameter).__name__ == "DTensor" or not parameter.numel()
    ]
    if broken:
        raise TrainingError(
            f"{len(broken)} tensors of adapter {name!r} are spread over the processes or empty, "
            f"and a save by one process would hold a part of them: {listing(broken, limit=2)}",
            fix="LoraTrainer.save_model saves it whole. In a loop of your own let every process "
            "enter hf_lora.training.sharding.gathered(model), and one of them save inside.",
            field="name",
        )


def parameters_in(model: nn.Module, name: str) -> Iterator[tuple[str, nn.Parameter]]:
    """Yields (dotted name, parameter) of all that training an adapter can change."""
    for slot in slots_of(model, name):
        whole = f"{slot.path}.{slot.name}"
        if isinstance(slot, PartsSlot):
            for part, block in slot.owner.named_parameters():
                yield f"{whole}.{part}", block
        elif (parameter := slot.owner._parameters.get(slot.key)) is not None:
            yield whole, parameter


def _factors(path: str, layer: BaseTunerLayer, name: str) -> Iterator[Slot]:
    device, dtype = _place(layer)
    for attribute in layer.adapter_layer_names:
        held: Any = getattr(layer, attribute, None)
        if not isinstance(held, nn.Module) or name not in held:  # type: ignore[operator]
            continue
        item = held[name]  # type: ignore[index]
        if isinstance(item, Tensor):
            yield Slot(path, attribute, False, held, name, device, dtype)
            continue
        if isinstance(item, PartsB):
            yield PartsSlot(path, attribute, False, item, "weight", device, dtype)
            continue
        for key, tensor in item.named_parameters() if item._modules else item._parameters.items():
            if tensor is not None:
                owner = item.get_submodule(key.rpartition(".")[0]) if "." in key else item
                factor = factor_name(f"{attribute}.{key}")
                yield Slot(path, factor, False, owner, key.rpartition(".")[2], device, dtype)


def _place(layer: BaseTunerLayer) -> tuple[torch.device, torch.dtype]:
    """Returns the base layer's device and the factor dtype: float32 at least, as peft trains."""
    inner = layer.get_base_layer()
    base = next((p for p in inner._parameters.values() if p is not None), None)
    base = next(inner.parameters(), None) if base is None else base
    if base is None:
        return torch.device("cpu"), torch.float32
    # one-byte floats only store (diffusers' layerwise casting); nothing is promoted with them
    wide = base.dtype if base.dtype.is_floating_point and base.dtype.itemsize > 1 else torch.float32
    return base.device, torch.promote_types(wide, torch.float32)


def _wrapped(path: str, wrapper: Any, name: str) -> Iterator[Slot]:
    if name not in wrapper._get_available_adapters():
        return  # peft's wrapper of new tokens lists names for adapters that it does not have
    for saved, inner in wrapper.adapter_state_dict_load_map(name).items():
        parent, _, key = inner.rpartition(".")
        owner = wrapper.get_submodule(parent)
        held = owner._parameters.get(key)
        tensor = owner._buffers[key] if held is None else held
        if tensor is not None:
            yield Slot(path, saved, True, owner, key, tensor.device, tensor.dtype)


def fill(model: nn.Module, component: Component, name: str, *, own: bool) -> set[str]:
    """Puts every tensor of a component into its slot, one to one; returns the dtypes there.

    Args:
        model: The model that has the adapter.
        component: What goes in.
        name: Name of the adapter on the model.
        own: Whether nobody else holds the tensors and their values are known to be finite.

    Raises:
        AdapterMismatch: A slot has no tensor, a tensor no slot, or their shapes differ.
        BadAdapterFile: A tensor is of another kind of numbers, or overflows in the host's dtype.
    """
    slots: dict[str, Slot] = {f"{s.path}.{s.name}": s for s in slots_of(model, name)}
    tensors = dict(component.tensors())
    missing = [k for k in slots if k not in tensors]
    extra = [k for k in tensors if k not in slots]
    if missing or extra:
        raise AdapterMismatch(
            f"{len(missing)} tensors are missing ({listing(missing, limit=2) or 'none'}) and "
            f"{len(extra)} have no place ({listing(extra, limit=2) or 'none'}) on "
            f"{type(model).__name__}",
            fix="Save the adapter again whole, or load it into the architecture it was made for.",
        )
    for key, slot in slots.items():
        if slot.value.shape != tensors[key].shape:
            raise AdapterMismatch(
                f"the adapter is for another size: {key} is {tuple(tensors[key].shape)} in the "
                f"file, {tuple(slot.value.shape)} on {type(model).__name__}",
                fix=f"Load it into {_base_of(component)}.",
                field=key,
            )
    for key, slot in slots.items():
        slot.put(tensors[key], own=own)
    return {str(dtype).removeprefix("torch.") for dtype in {s.dtype for s in slots.values()}}


def _base_of(component: Component) -> str:
    base = component.config.get("base_model_name_or_path")
    return shown(base) if base else "the base it was made on"


def cuts_of(model: nn.Module, name: str) -> dict[str, tuple[str, ...]]:
    """Returns target -> parts, for the targets that an adapter has on parts of a projection."""
    layers = {p: getattr(x, "lora_B", {}) for p, x in tuner_modules(model)}
    held = {path: b[name] for path, b in layers.items() if name in b}
    return {path: tuple(b.rows) for path, b in held.items() if isinstance(b, PartsB)}


def check_saveable(config: PeftConfig) -> None:
    """Raises BadAdapterFile for a kind of adapter that a file of ours cannot carry whole."""
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind not in FACTOR_MARKS:
        raise BadAdapterFile(
            f"adapters of the method {kind} are not saved by hf_lora",
            fix="Use save_pretrained of peft or transformers.",
        )
    try:
        check_keeps_base(config)
    except InvalidOption as error:
        raise BadAdapterFile(
            f"the adapter changes the base model: {error.fact}",
            fix="Use save_pretrained of peft, which can convert it.",
        ) from None


def component_of(model: nn.Module, name: str) -> Component:
    """Returns the adapter `name` as a record whose tensors are the host's own."""
    targets: dict[str, dict[str, Tensor]] = {}
    modules: dict[str, dict[str, Tensor]] = {}
    for slot in slots_of(model, name):
        group = modules if slot.whole else targets
        group.setdefault(slot.path, {})[slot.name] = slot.value.detach()
    config = saved_config(peft_configs(model)[name])
    if config["peft_type"] == "LORA" and not config.get("target_parameters"):
        config |= _literal(model, name, config)
    return with_all_ranks(Component(config, targets, modules), name)


def _literal(model: nn.Module, name: str, config: dict[str, Any]) -> dict[str, Any]:
    """Returns targets, ranks and alphas as they are on the layers, without expressions."""
    layers = {p: x for p, x in tuner_modules(model) if name in getattr(x, "r", {})}
    paths = [path for path, _ in bare_modules(model)]
    ranks = {path: layer.r[name] for path, layer in layers.items()}
    alphas = {path: layer.lora_alpha[name] for path, layer in layers.items()}
    return {
        "target_modules": condense(layers, paths),
        "rank_pattern": condense_values(ranks, config["r"], paths),
        "alpha_pattern": condense_values(alphas, config["lora_alpha"], paths),
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
    }
