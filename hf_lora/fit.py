"""Does an adapter fit a host: its targets, its heads, and the config that peft shall be given.

Nothing from a file reaches peft as an expression: names are plain, target lists literal.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from peft import PeftConfig
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from hf_lora.adapter import Component
from hf_lora.configs import heads_of
from hf_lora.errors import (
    AdapterMismatch,
    InvalidOption,
    UnsupportedTarget,
    closest,
    listing,
    shown,
)
from hf_lora.fields import peft_config
from hf_lora.formats.peft import COPY, TOKENS
from hf_lora.hosts import features
from hf_lora.patterns import tails
from hf_lora.spelling import Modules
from hf_lora.targets import condense, condense_values
from hf_lora.verdict import is_cast


def match_targets(
    modules: Modules, component: Component, *, strict: bool
) -> tuple[Component, tuple[str, ...]]:
    """Checks that the file's targets are layers of the model, and the config's targets are filled.

    Returns:
        The component, and the targets left out because the model lacks them (`strict=False` only).

    Raises:
        AdapterMismatch: Targets have no layer, or layers that the config names have no tensors.
    """
    absent = [p for p in component.targets if p.partition(".base_layer")[0] not in modules]
    if absent and (strict or len(absent) == len(component.targets)):
        known = [p for p, m in modules.items() if features(m) is not None]
        raise AdapterMismatch(
            f"the adapter is for another architecture: {len(absent)} of its "
            f"{len(component.targets)} targets are no modules of {_class(modules)}, for "
            f"instance {absent[0]}. Closest: {', '.join(closest(absent[0], known))}",
            fix=_base_hint(component),
        )
    _check_kinds(modules, component)
    _check_parameters(modules, component)
    kept = {p: f for p, f in component.targets.items() if p not in absent}
    component = dataclasses.replace(component, targets=kept)
    _check_filled(modules, component)
    return component, tuple(absent)


def _class(modules: Modules) -> str:
    return type(modules[""]).__name__


def _check_kinds(modules: Modules, component: Component) -> None:
    for path in component.targets:
        outer = path.partition(".base_layer")[0]
        if isinstance(modules.get(outer), nn.MultiheadAttention):
            raise UnsupportedTarget(
                f"the file has a LoRA on torch's MultiheadAttention at {outer}, which hf_lora does "
                "not put on",
                fix="Use PeftModel.from_pretrained for it.",
            )


def _check_parameters(modules: Modules, component: Component) -> None:
    named = component.config.get("target_parameters")
    if not named or not isinstance(named, list):
        return
    known = {
        tail
        for path, module in modules.items()
        for name in module._parameters
        for tail in tails(f"{path}.{name}")
    }
    for entry in named:
        if not isinstance(entry, str) or entry not in known:
            raise AdapterMismatch(
                f"target_parameters has {shown(entry)}, which names no parameter of "
                f"{_class(modules)}",
                fix=_base_hint(component),
                field="target_parameters",
            )


def _base_hint(component: Component) -> str:
    base = component.config.get("base_model_name_or_path")
    return (
        f"It was made for {shown(base)}." if base else "The file does not say what it was made for."
    )


def _check_filled(modules: Modules, component: Component) -> None:
    """Compares the layers that the config names with those the file has tensors for."""
    if expression_of(component):
        return  # it is not run; the tensors alone say what is targeted
    config: Any = peft_config(component)
    config.modules_to_save = None  # peft would compile an expression of each; see below
    # peft tries every name on every module; those that end no path need not be tried
    ends = {tail for path in modules for tail in tails(path)}
    for field in ("target_modules", "exclude_modules"):
        if getattr(config, field, None):
            setattr(config, field, ends & set(getattr(config, field)))
    wanted = {
        path
        for path, module in modules.items()
        if features(module) is not None
        and not any(f"{path}.".startswith(f"{head}.") for head in component.modules)
        and check_target_module_exists(config, path)
    }
    filled = {p for p in component.targets if p in modules and features(modules[p]) is not None}
    unfilled, unnamed = sorted(wanted - filled), sorted(filled - wanted)
    if unnamed:
        raise AdapterMismatch(
            f"the file has tensors for {len(unnamed)} layers that its config does not target: "
            f"{listing(unnamed, limit=3)}",
            fix="Other programs would leave them out; correct target_modules or save it again.",
            field="target_modules",
        )
    if unfilled:
        raise AdapterMismatch(
            f"the config targets {len(unfilled)} layers for which the file has no tensors: "
            f"{listing(unfilled, limit=3)}",
            fix="The file is incomplete, or for a model with fewer layers. "
            + _base_hint(component),
        )


def expression_of(component: Component) -> str:
    """Returns the config field that does not list what it selects; empty where all do."""
    named, parameters = (component.config.get(f"target_{x}") for x in ("modules", "parameters"))
    if not isinstance(named, list) and (named or not parameters):  # parameters alone: no modules
        return "target_modules"
    return "exclude_modules" if isinstance(component.config.get("exclude_modules"), str) else ""


def drop_base_copies(modules: Modules, component: Component) -> Component:
    """Returns the component without the copies of base weights that peft adds to some files.

    peft saves a targeted or resized embedding with the adapter. A copy equal to the host's own
    weight, up to casts, says nothing new; any other would replace it.

    Raises:
        AdapterMismatch: A copy differs from the host's weight.
    """
    kept = {}
    for path, tensors in component.modules.items():
        here = path in modules or path not in component.targets  # else left to `match_targets`
        copies = {n: t for n, t in tensors.items() if here and n.startswith(f"{COPY}.")}
        for name, tensor in copies.items():
            own = getattr(modules.get(path), "_parameters", {}).get(name.removeprefix(f"{COPY}."))
            if own is None or not is_cast(tensor, own.detach().cpu()):
                raise AdapterMismatch(
                    f"the file brings its own copy of the base weight {path}.{name}, which differs "
                    f"from that of {_class(modules)}",
                    fix="Loading it would overwrite the base. " + _base_hint(component),
                    field=f"{path}.{name}",
                )
        rest = {n: t for n, t in tensors.items() if n not in copies}
        if rest:
            kept[path] = rest
    return dataclasses.replace(component, modules=kept)


def split_heads(
    modules: Modules, component: Component, *, extra_modules: bool, strict: bool = True
) -> tuple[Component, tuple[str, ...]]:
    """Checks the modules that the file brings whole.

    Returns:
        The component, and the modules left out because the model lacks them (`strict=False` only).

    Raises:
        AdapterMismatch: A module is no part of the model, or the config lists one that the model
            has and the file has no tensors for.
        InvalidOption: A module is no task head and `extra_modules` is not set.
    """
    absent = [p for p in component.modules if p not in modules]
    if absent and strict:
        raise AdapterMismatch(
            f"the file brings {absent[0]} whole, which is no module of {_class(modules)}",
            fix="Load it into the class it was trained with. " + _base_hint(component),
        )
    kept = {p: tensors for p, tensors in component.modules.items() if p in modules}
    component = dataclasses.replace(component, modules=kept)
    filled = {tail for path in component.modules for tail in tails(path)}
    ends = {tail: path for path in modules for tail in tails(path)}
    for listed in component.config.get("modules_to_save") or ():
        if listed in ends and listed not in filled:
            raise AdapterMismatch(
                f"modules_to_save lists {shown(listed)}, but the file has no tensors for "
                f"{ends[listed]}",
                field="modules_to_save",
            )
    heads = tuple(f"{head}." for head in heads_of(modules[""]))
    foreign = [p for p in component.modules if not f"{p}.".startswith(heads)]
    if foreign and not extra_modules:
        size = sum(t.numel() for p in foreign for t in component.modules[p].values())
        raise InvalidOption(
            f"the file replaces pretrained modules: {listing(foreign)} ({size:,} values)",
            fix="Pass extra_modules=True if that is what you want.",
            field="extra_modules",
        )
    return component, tuple(absent)


def fitted_config(modules: Modules, component: Component) -> PeftConfig:
    """Returns the peft config for injection: literal targets, heads that are there.

    Raises:
        BadAdapterFile: A field is not understood, holds an expression, or would change the base.
    """
    config: Any = peft_config(component)
    _check_vocabulary(modules, component)
    targets = [p for p in component.targets if p in modules and features(modules[p]) is not None]
    # never None: peft would fall back to its own defaults
    config.target_modules = set(condense(targets, modules))
    config.exclude_modules = None
    config.modules_to_save = [p for p, t in component.modules.items() if not _rows_only(t)] or None
    for field in ("layers_to_transform", "layers_pattern"):
        if hasattr(config, field):
            setattr(config, field, None)  # the literal list says it already
    if hasattr(config, "fan_in_fan_out"):
        config.fan_in_fan_out = any(type(modules[p]).__name__ == "Conv1D" for p in targets)
    if component.kind == "LORA":
        config.init_lora_weights = True
        if not config.target_parameters:
            ranks = {p: component.rank(p) or config.r for p in targets}
            alphas = {p: component.alpha(p) for p in targets}
            config.rank_pattern = condense_values(ranks, config.r, modules)
            config.alpha_pattern = condense_values(alphas, config.lora_alpha, modules)
    return config  # type: ignore[no-any-return]


def _check_vocabulary(modules: Modules, component: Component) -> None:
    rows = component.config.get("trainable_token_indices") or []
    tokens = [n for part in (rows.values() if isinstance(rows, dict) else [rows]) for n in part]
    size = max(
        (m.num_embeddings for m in modules.values() if isinstance(m, nn.Embedding)), default=0
    )
    if tokens and max(tokens) >= size:
        raise AdapterMismatch(
            f"trainable_token_indices has token {max(tokens)}, and the largest vocabulary of "
            f"{_class(modules)} has {size} tokens",
            fix=_base_hint(component),
            field="trainable_token_indices",
        )


def _rows_only(tensors: Mapping[str, object]) -> bool:
    """Tells new rows of an embedding from a module trained whole."""
    return all(name.startswith(TOKENS) for name in tensors)


def notes_on(modules: Modules, component: Component) -> list[str]:
    """Returns what a reader of the report should know of a component that fits."""
    notes = []
    field = expression_of(component)
    if field:
        what = "is an expression" if component.config.get(field) else "names no layers"
        notes.append(f"{field} {what}, so it was not checked that no target is missing")
    headless = list(_own_heads(modules, component))
    if headless:
        notes.append(f"the file brings no {' and no '.join(headless)}: the host's own is used")
    above = [p for p in component.targets if _above_full_rank(component, p)]
    if above:
        notes.append(f"rank is above min(in, out) at {len(above)} targets")
    return notes


def _own_heads(modules: Modules, component: Component) -> Iterator[str]:
    """Yields the heads, or parts of heads, that the file does not bring."""
    brought = tuple(f"{p}." for p, t in component.modules.items() if not _rows_only(t))
    for head in heads_of(modules[""]):
        parts = [p for p, m in modules.items() if f"{p}.".startswith(f"{head}.") and m._parameters]
        absent = [p for p in parts if not f"{p}.".startswith(brought)]
        yield from [head] if absent == parts else absent


def _above_full_rank(component: Component, path: str) -> bool:
    factors = component.targets[path]
    if "lora_A" not in factors or "lora_B" not in factors:
        return False
    a, b = factors["lora_A"], factors["lora_B"]
    return a.shape[0] > min(a[0].numel(), b.shape[0])
