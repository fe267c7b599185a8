"""Putting the values of a saved adapter back into the factors that a run trains.

A load makes new factors, which an optimizer that was built before does not hold. Here the values
are written into the parameters that are there, so that whatever holds them goes on with them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_lora.adapter import MODEL, Adapter, Component
from hf_lora.base import fingerprint_of_model, id_of, unreadable
from hf_lora.errors import BadCheckpoint, LoraError, TrainingError, listing, shown
from hf_lora.formats import read_adapter
from hf_lora.hosts import (
    active_names,
    adapter_names,
    class_name,
    model_of,
    parts_of,
    peft_configs,
)
from hf_lora.limits import LoadLimits
from hf_lora.record import record_of
from hf_lora.slots import check_saveable, component_of, parameters_in, slots_of
from hf_lora.spelling import respelled
from hf_lora.training.sharding import scattered
from hf_lora.verdict import compare
from hf_lora.walks import bare_modules

# The fields of a config that say what the adapter computes; a run goes on only with the same.
_MATHEMATICAL = (
    "peft_type",
    "r",
    "lora_alpha",
    "alpha",
    "use_rslora",
    "use_dora",
    "lora_bias",
    "target_modules",
    "target_parameters",
    "modules_to_save",
    "alpha_pattern",
    "fan_in_fan_out",
)
_ANY_SIZE = LoadLimits(value=1e300, scaling=1e300)  # a run may go through what a user may not load


@dataclass(frozen=True)
class Trained:
    """The adapter that a run trains.

    Attributes:
        model: The bare model, wrappers taken off.
        name: Name of the adapter.
        host: What the adapter is saved from: the model, or the pipeline that a model says it trains
            (`lora_host`).
    """

    model: nn.Module
    name: str
    host: object

    @property
    def parts(self) -> dict[str, nn.Module]:
        """Component name -> bare model, of those that have the adapter."""
        held = {name: model_of(part) for name, part in parts_of(self.host).items()}
        return {name: part for name, part in held.items() if self.name in adapter_names(part)}


def trained_adapter(host: object, name: str | None = None) -> Trained:
    """Finds the adapter that training the host would train.

    Args:
        host: A model with an adapter, wrapped or not.
        name: The adapter; None for the one that is active.

    Raises:
        TrainingError: There is none, several are active, it is frozen, or its kind cannot be saved.
    """
    model = model_of(host)
    names = adapter_names(model)
    if not names:
        raise TrainingError(
            f"{type(model).__name__} has no adapter to train",
            fix="Call attach_lora(model) first, or load_lora(model, ..., trainable=True).",
        )
    active = [n for n in active_names(model) if name is None or n == name]
    if len(active) != 1:
        has = f"active are {listing(active_names(model)) or 'none'} of {listing(names)}"
        raise TrainingError(
            f"one adapter is trained at a time, and {has}",
            fix=f"Choose one: set_adapters(model, {names[0]!r}).",
        )
    if not any(parameter.requires_grad for _, parameter in parameters_in(model, active[0])):
        raise TrainingError(
            f"no parameter of adapter {active[0]!r} requires a gradient, so nothing would be "
            "trained",
            fix="Load it with load_lora(model, ..., trainable=True).",
        )
    try:
        check_saveable(peft_configs(model)[active[0]])
    except LoraError as error:
        raise TrainingError(error.fact, fix=error.fix) from None
    return Trained(model, active[0], getattr(model, "lora_host", model))


def facts_of(trained: Trained) -> dict[str, Any]:
    """Returns what is trained, as plain data; parameters are counted in values."""
    parts = trained.parts
    components = [component_of(model, trained.name) for model in parts.values()]
    info = components[0].info
    kept = ("method", "task", "rank", "alpha", "rslora", "dora", "targets", "roles")
    adapter = {key: info[key] for key in kept}
    parameters = sum(t.numel() for one in components for _, t in one.tensors())
    return {
        "host": _host_name(trained),
        "base": id_of(trained.host, parts),
        "adapter": {"name": trained.name, **adapter, "parameters": parameters},
    }


@torch.no_grad()
def restore_adapter(trained: Trained, folder: str | os.PathLike[str]) -> None:
    """Writes the values of a saved adapter into the factors of the run, bit for bit.

    Args:
        trained: The adapter of the run.
        folder: A checkpoint, or any folder with an adapter.

    Raises:
        BadCheckpoint: There is no sound adapter, it is another one (kind, rank, alpha, targets,
            sizes) or was made on another base. The run's factors are then as they were.
    """
    try:
        adapter = read_adapter(Path(folder), limits=_ANY_SIZE)
    except (LoraError, OSError) as error:
        raise BadCheckpoint(f"its adapter cannot be read: {error}", file=str(folder)) from None
    parts = trained.parts
    if set(parts) != set(adapter.components):
        held = "a pipeline" if MODEL in parts else listing(adapter.components)
        raise BadCheckpoint(f"its adapter is one for {held}", file=str(folder))
    made_on, here = adapter.manifest.host, _host_name(trained)
    if made_on and made_on != here:
        raise BadCheckpoint(f"it was saved on {made_on}, this is {here}", file=str(folder))
    saved = {
        part: respelled(dict(bare_modules(model)), adapter.components[part])[0]
        for part, model in parts.items()
    }
    with scattered(trained.model, trained.name):  # each process keeps its shards
        for part, model in parts.items():
            _check_same(model, trained.name, saved[part], str(folder))
            _check_base(model, part, adapter, str(folder))
        for part, model in parts.items():
            tensors = dict(saved[part].tensors())
            for slot in slots_of(model, trained.name):
                slot.overwrite(tensors[f"{slot.path}.{slot.name}"])


def _host_name(trained: Trained) -> str:
    host = trained.host
    return class_name(host) if isinstance(host, nn.Module) else type(host).__name__


def _check_base(model: nn.Module, part: str, adapter: Adapter, where: str) -> None:
    """Compares the base that a saved adapter was made on with that of the run."""
    stored = adapter.manifest.base.fingerprints.get(part)
    here = record_of(model).sampled
    if here is None and not unreadable(model):
        here = fingerprint_of_model(model)
    if stored is None or here is None:
        return
    verdict = compare(stored, here)
    if verdict.state == "mismatched":
        raise BadCheckpoint(
            f"it was saved on another base: {len(verdict.differing)} of {verdict.compared} "
            f"weights differ, for instance {verdict.differing[0]}",
            fix=f"Load {adapter.manifest.base.id or 'the base of that run'}, then attach.",
            file=where,
        )


def _check_same(model: nn.Module, name: str, saved: Component, where: str) -> None:
    """Compares config and tensors of a saved adapter with those of the run."""
    here = component_of(model, name)
    for field in _MATHEMATICAL:
        a, b = saved.config.get(field), here.config.get(field)
        if _plain(a) != _plain(b):
            raise BadCheckpoint(
                f"it holds another adapter: {field} is {shown(a)} there and {shown(b)} in this run",
                fix="Attach with the same arguments as that run, or train into another folder.",
                file=where,
                field=field,
            )
    shapes = [{key: tuple(t.shape) for key, t in c.tensors()} for c in (saved, here)]
    if shapes[0] != shapes[1]:
        odd = sorted(k for k in {**shapes[0], **shapes[1]} if shapes[0].get(k) != shapes[1].get(k))
        raise BadCheckpoint(
            f"it holds another adapter: {len(odd)} tensors differ in name or size, for instance "
            f"{odd[0]}, {shapes[0].get(odd[0], 'absent')} there and "
            f"{shapes[1].get(odd[0], 'absent')} in this run",
            fix="Attach with the same arguments as that run, or train into another folder.",
            file=where,
        )


def _plain(value: Any) -> object:
    """Returns a config value as one that compares: lists without order, empty as None."""
    if isinstance(value, list | tuple | set):
        return sorted(map(str, value)) or None
    if isinstance(value, Mapping):
        return dict(value) or None
    return value or None
