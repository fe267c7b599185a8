"""Would this adapter load? Every step of a load, on a stand-in for the host, without values.

A stand-in has the host's modules, one by one, and shares its weights. peft puts its layers onto it
as it would onto the host, and every tensor of the file must find its slot there in its shape. The
host itself is not touched, not even for a moment, so that it may be in use meanwhile.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hf_lora.adapter import Adapter, Component
from hf_lora.exchange import check_components, placed
from hf_lora.formats.peft import COPY
from hf_lora.hosts import adapter_names, model_of, parts_of
from hf_lora.inject import check_targets, inject
from hf_lora.load import (
    _base_in_words,
    _check_scaling,
    _fit,
    _Fitted,
    _other_base,
    _outer,
    _ready_for,
)
from hf_lora.record import _CHANGEABLE, RECORD
from hf_lora.slots import fill, slots_of
from hf_lora.spelling import respelled
from hf_lora.walks import bare_modules

DEFAULT = "default"  # the name that a load gives where none is asked for


@dataclass(frozen=True)
class Rehearsed:
    """What a load would say.

    Attributes:
        left_out: What the host lacks, as in the report of a load; only with `strict=False`.
        base: Whether it is the base the adapter was made on, in words.
        notes: What a reader should know besides.
    """

    left_out: tuple[str, ...]
    base: str
    notes: tuple[str, ...]


def rehearse(host: Any, adapter: Adapter, *, strict: bool, ready: bool = True) -> Rehearsed:
    """Goes through a load of an adapter of which only the header may have been read.

    Values, and with them the digest, are what a load checks beyond this.

    Args:
        host: A model or pipeline; it stays as it is.
        adapter: The adapter.
        strict: As in `load_lora`.
        ready: Whether the host must be able to take an adapter now: not on meta, not merged.

    Raises:
        LoraError: The one that the load would raise.
    """
    parts = parts_of(host)
    name = _free_name(parts)
    if ready:
        _ready_for(host, name, 1.0)
    adapter = placed(adapter, parts)
    missing = check_components(host, parts, adapter, strict=strict)
    kept: list[tuple[nn.Parameter, bool]] = []
    try:
        fitted = {}
        for place, component in adapter.components.items():
            if place not in missing:
                part = stand_in(parts[place], kept)
                component = _with_own_copies(part, component)
                fitted[place] = _fit(part, component, adapter.manifest, place, strict, False)
        for each in fitted.values():
            _put_on(each, name)
    finally:
        for parameter, needs_grad in kept:
            parameter.requires_grad_(needs_grad)
    skipped = [_at(n, path, parts) for n, each in fitted.items() for path in each.skipped]
    notes = _other_base(host, adapter, fitted)
    notes += [note for each in fitted.values() for note in each.notes]
    if any(DEFAULT in adapter_names(model_of(part)) for part in parts.values()):
        notes.append(f"the host has an adapter {DEFAULT!r} already; load this one as name=...")
    left_out = (*adapter.left_out, *missing, *skipped)
    return Rehearsed(left_out, _base_in_words(fitted)[1], tuple(notes))


def _at(place: str, path: str, parts: Mapping[str, nn.Module]) -> str:
    return path if len(parts) == 1 and place == "model" else f"{place}.{path}"


def _free_name(parts: Mapping[str, nn.Module]) -> str:
    """Returns a name that no adapter has: that of a load is the user's choice."""
    taken = {name for part in parts.values() for name in adapter_names(model_of(part))}
    return next(f"trial{i}" for i in range(len(taken) + 1) if f"trial{i}" not in taken)


def _put_on(fitted: _Fitted, name: str) -> None:
    """Puts an adapter on a stand-in and its tensors into their slots, as far as shapes go."""
    model, component = fitted.model, fitted.component
    fitted.config.inference_mode = True
    inject(fitted.part, fitted.config, name, empty=True, freeze=False, alike=fitted.alike)
    check_targets(model, name, {_outer(p) for p in component.targets})
    fill(model, _weightless(model, component, name), name, own=True)
    _check_scaling(model, component, name)


def _weightless(model: nn.Module, component: Component, name: str) -> Component:
    """Returns a component with tensors of one stored zero each, as their slots would have them."""
    slots = {f"{slot.path}.{slot.name}": slot for slot in slots_of(model, name)}

    def hollow(path: str, factor: str, tensor: Tensor) -> Tensor:
        slot = slots.get(f"{path}.{factor}")
        here = slot is not None and slot.dtype.is_floating_point == tensor.is_floating_point()
        dtype = slot.dtype if slot is not None and here else tensor.dtype
        device = "cpu" if slot is None else slot.device
        return torch.zeros((), dtype=dtype, device=device).expand(tensor.shape)

    def hollowed(group: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        return {p: {f: hollow(p, f, t) for f, t in held.items()} for p, held in group.items()}

    return replace(
        component, targets=hollowed(component.targets), modules=hollowed(component.modules)
    )


def _with_own_copies(model: nn.Module, component: Component) -> Component:
    """Returns the component with the host's weights in the place of the file's copies of them.

    peft adds these to some files, and a load compares them. Without values they count as equal
    where their shape is.
    """
    if not any(n.startswith(f"{COPY}.") for held in component.modules.values() for n in held):
        return component
    modules = dict(bare_modules(model_of(model)))
    component, _ = respelled(modules, component)

    def own(path: str, name: str, tensor: Tensor) -> Tensor:
        held = getattr(modules.get(path), "_parameters", {}).get(name.removeprefix(f"{COPY}."))
        if not name.startswith(f"{COPY}.") or not tensor.is_meta or held is None:
            return tensor
        return held.detach() if held.shape == tensor.shape else torch.empty(0)

    return replace(
        component,
        modules={
            path: {name: own(path, name, tensor) for name, tensor in held.items()}
            for path, held in component.modules.items()
        },
    )


def stand_in(part: nn.Module, kept: list[tuple[nn.Parameter, bool]]) -> nn.Module:
    """Returns a model of copies of the modules, over the same weights, that may be changed.

    Args:
        part: The model, in a wrapper or not, with adapters or without.
        kept: Gets the parameters that cannot be held twice (those of quantised layers), each with
            its `requires_grad`, to be put back.
    """
    copies: dict[int, Any] = {}  # of what several modules may hold: parameters, containers

    def contents(value: Any) -> Any:
        if type(value) not in _CHANGEABLE:
            return value
        return copies.setdefault(id(value), value.copy())

    def parameter(value: nn.Parameter | None) -> nn.Parameter | None:
        if value is None or id(value) in copies:
            return None if value is None else copies[id(value)]
        made = value
        if type(value) is nn.Parameter:
            made = nn.Parameter(value.detach(), requires_grad=value.requires_grad)
        else:
            kept.append((value, value.requires_grad))
        copies[id(value)] = made
        return made

    def module(value: nn.Module) -> nn.Module:
        if id(value) in copies:
            return copies[id(value)]  # type: ignore[no-any-return]
        kind = type(value)
        new = copies[id(value)] = kind.__new__(kind)
        held = {key: contents(item) for key, item in vars(value).items()}
        if RECORD in held:
            held[RECORD] = held[RECORD].copy()
        vars(new).update(held)
        below = {k: None if m is None else module(m) for k, m in value._modules.items()}
        vars(new)["_modules"].update(below)
        vars(new)["_parameters"].update({k: parameter(p) for k, p in value._parameters.items()})
        return new

    return module(part)
