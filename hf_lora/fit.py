"""Does an adapter fit a host: its targets, its heads, and the config that peft shall be given.

Nothing from a file reaches peft as an expression: names are plain, target lists literal.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import PeftType
from torch import nn

from hf_lora.adapter import Component
from hf_lora.configs import check_keeps_base, heads_of
from hf_lora.errors import AdapterMismatch, BadAdapterFile, InvalidOption, closest, listing
from hf_lora.formats.peft import TOKENS
from hf_lora.hosts import bare_modules, features
from hf_lora.targets import condense, condense_values

_PLAIN = re.compile(r"[A-Za-z0-9_.\-]+")

# Config lists whose entries peft builds into regular expressions or compares as path ends.
_NAME_LISTS = ("exclude_modules", "modules_to_save", "target_parameters", "layers_pattern")


def match_targets(
    model: nn.Module, component: Component, *, strict: bool
) -> tuple[Component, tuple[str, ...]]:
    """Checks that the file's targets are layers of the model, and the config's targets are filled.

    Returns:
        The component, and the targets left out because the model lacks them (`strict=False` only).

    Raises:
        AdapterMismatch: Targets have no layer, or layers that the config names have no tensors.
    """
    modules = dict(bare_modules(model))
    absent = [p for p in component.targets if p.removesuffix(".base_layer") not in modules]
    if absent and (strict or len(absent) == len(component.targets)):
        known = [p for p, m in modules.items() if features(m) is not None]
        raise AdapterMismatch(
            f"the adapter is for another architecture: {len(absent)} of its "
            f"{len(component.targets)} targets are no modules of {type(model).__name__}, for "
            f"instance {absent[0]}. Closest: {', '.join(closest(absent[0], known))}",
            fix=_base_hint(component),
        )
    kept = {p: f for p, f in component.targets.items() if p not in absent}
    component = dataclasses.replace(component, targets=kept)
    _check_filled(model, modules, component)
    return component, tuple(absent)


def _base_hint(component: Component) -> str:
    base = component.config.get("base_model_name_or_path")
    return f"It was made for {base!r}." if base else "The file does not say what it was made for."


def _check_filled(model: nn.Module, modules: Mapping[str, nn.Module], component: Component) -> None:
    """Compares the layers that the config names with those the file has tensors for."""
    named = component.config.get("target_modules")
    if not isinstance(named, list) or not all(isinstance(n, str) for n in named):
        return  # an expression is not run; the tensors alone say what is targeted
    config = _peft_config(component)
    unfilled = [
        path
        for path, module in modules.items()
        if path not in component.targets
        and features(module) is not None
        and not any(f"{path}.".startswith(f"{head}.") for head in component.modules)
        and check_target_module_exists(config, path)
    ]
    if unfilled:
        raise AdapterMismatch(
            f"the config targets {len(unfilled)} layers for which the file has no tensors: "
            f"{listing(unfilled, limit=3)}",
            fix="The file is incomplete, or for a model with fewer layers. "
            + _base_hint(component),
        )


def split_heads(model: nn.Module, component: Component, *, extra_modules: bool) -> None:
    """Checks the modules that the file brings whole.

    Raises:
        AdapterMismatch: A module is no part of the model, or the config lists one that the model
            has and the file has no tensors for.
        InvalidOption: A module is no task head and `extra_modules` is not set.
    """
    modules = dict(bare_modules(model))
    absent = [p for p in component.modules if p not in modules]
    if absent:
        raise AdapterMismatch(
            f"the file brings {absent[0]} whole, which is no module of {type(model).__name__}",
            fix="Load it into the class it was trained with. " + _base_hint(component),
        )
    for listed in component.config.get("modules_to_save") or ():
        inside = [p for p in modules if p == listed or p.endswith(f".{listed}")]
        if inside and not set(inside) & set(component.modules):
            raise AdapterMismatch(
                f"modules_to_save lists {listed!r}, but the file has no tensors for {inside[0]}",
                field="modules_to_save",
            )
    foreign = [p for p in component.modules if p not in heads_of(model)]
    if foreign and not extra_modules:
        size = sum(t.numel() for p in foreign for t in component.modules[p].values())
        raise InvalidOption(
            f"the file replaces pretrained modules: {listing(foreign)} ({size:,} values)",
            fix="Pass extra_modules=True if that is what you want.",
            field="extra_modules",
        )


def fitted_config(model: nn.Module, component: Component) -> PeftConfig:
    """Returns the peft config for injection: literal targets, heads that are there.

    Raises:
        BadAdapterFile: A field is not understood, holds an expression, or would change the base.
    """
    config: Any = _peft_config(component)
    modules = dict(bare_modules(model))
    targets = [p for p in component.targets if p in modules and features(modules[p]) is not None]
    config.target_modules = set(condense(targets, modules)) or None
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


def _rows_only(tensors: Mapping[str, object]) -> bool:
    """Tells new rows of an embedding from a module trained whole."""
    return all(name.startswith(TOKENS) for name in tensors)


def _peft_config(component: Component) -> PeftConfig:
    """Builds peft's config object from the file's fields, each checked.

    peft drops fields it does not know with a warning, even those that change the result; here
    such a field must be empty.
    """
    fields = dict(component.config)
    kind = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(component.kind)]
    known = {f.name for f in dataclasses.fields(kind)} - {"runtime_config"}
    for name in sorted(set(fields) - known):
        if fields.pop(name):
            raise BadAdapterFile(
                f"the config field {name!r} is not known to the installed peft",
                fix="Update peft, or save the adapter with an older one.",
                field=name,
            )
    for name in _NAME_LISTS:
        _check_plain(name, fields.get(name))
    if isinstance(fields.get("target_modules"), list):
        _check_plain("target_modules", fields["target_modules"])
    else:
        fields["target_modules"] = None
    fields["peft_type"] = component.kind
    try:
        config = kind(**fields)
    except (TypeError, ValueError) as error:
        raise BadAdapterFile(f"the config does not make a {kind.__name__}: {error}") from None
    try:
        check_keeps_base(config)
    except InvalidOption as error:
        raise BadAdapterFile(
            f"the adapter changes base weights: {error.fact}",
            fix="Save it converted to plain LoRA (peft: path_initial_model_for_weight_conversion).",
            field=error.field,
        ) from None
    return config


def _check_plain(name: str, value: object) -> None:
    entries: Iterable[object] = [value] if isinstance(value, str) else value or ()  # type: ignore[assignment]
    for entry in entries:
        if not isinstance(entry, str) or not _PLAIN.fullmatch(entry):
            raise BadAdapterFile(
                f"{name} has the entry {entry!r}, which is no plain module name",
                fix="Expressions from a file are not run; save the adapter with plain names.",
                field=name,
            )
