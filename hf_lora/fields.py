"""The config of a file -> peft's config object, with every field checked.

Nothing from a file reaches peft as an expression, names a package to import, or sets a size that
the tensors do not have.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import PeftType

from hf_lora.adapter import Component
from hf_lora.configs import check_keeps_base
from hf_lora.errors import BadAdapterFile, InvalidOption, shown
from hf_lora.formats.peft import COPY, FACTOR_MARKS
from hf_lora.patterns import plain_key, tails

_PLAIN = re.compile(r"[A-Za-z0-9_.\-]+")

# Config lists whose entries peft builds into regular expressions or compares as path ends.
_NAME_LISTS = (
    "exclude_modules",
    "feedforward_modules",
    "layers_pattern",
    "modules_to_save",
    "target_parameters",
)

# Config fields that hold names, or an expression that is not run.
_NAMES_OR_PATTERN = ("exclude_modules", "feedforward_modules", "layers_pattern", "target_modules")

_TEXTS = ("base_model_name_or_path", "bias", "megatron_core", "peft_version", "revision")

_ROWS = "trainable_token_indices"

_SMALL = 65536  # seeds and counts up to here are no sizes worth a look

# Config fields that import packages, need other adapters or a PeftModel around the model, change
# what training computes, or put tensors under names that the config does not list.
_REFUSED = (
    "alora_invocation_tokens",
    "arrow_config",
    "ensure_weight_tying",
    "megatron_config",
    "monteclora_config",
    "velora_config",
)


def peft_config(component: Component) -> PeftConfig:
    """Builds peft's config object from the file's fields, each checked.

    peft drops fields it does not know with a warning, even those that change the result; here
    such a field must be empty.

    Raises:
        BadAdapterFile: A field is not understood, holds an expression, or would change the base.
    """
    fields = dict(component.config)
    if component.kind not in FACTOR_MARKS:
        raise BadAdapterFile(
            f"peft_type is {shown(component.kind)}",
            fix=f"Types that are read: {', '.join(FACTOR_MARKS)}.",
            field="peft_type",
        )
    kind = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(component.kind)]
    known = {f.name for f in dataclasses.fields(kind)} - {"runtime_config"}
    for name in sorted(set(fields) - known):
        if fields.pop(name):
            raise BadAdapterFile(
                f"the config field {shown(name)} is not known to the installed peft",
                fix="Update peft, or save the adapter with an older one.",
                field=name,
            )
    # peft asks some of these whether they are None, and takes an empty one for set
    filled = {"target_modules", "feedforward_modules"}  # None: peft would take its own defaults
    unset = {f.name for f in dataclasses.fields(kind) if f.default is None} - filled
    fields = {n: v for n, v in fields.items() if n not in unset or v not in ("", [], {})}
    _check_kinds(kind, fields)
    _check_fields(component, fields)
    _check_keeps_base(fields)  # before peft's class: for some values it imports packages
    fields["peft_type"] = component.kind
    try:
        config = kind(**fields)
    except Exception as error:  # a config class may raise anything on a field of a wrong kind
        raise BadAdapterFile(
            f"the config does not make a {kind.__name__}: {str(error)[:400]}",
            fix="Correct the config, or save the adapter again.",
        ) from None
    return config


def _check_keeps_base(fields: Mapping[str, Any]) -> None:
    try:
        check_keeps_base(SimpleNamespace(**fields))
    except InvalidOption as error:
        raise BadAdapterFile(
            f"the adapter changes base weights: {error.fact}",
            fix="Train with lora_bias=True instead of bias."
            if error.field == "bias"
            else "Save it as plain LoRA (peft: path_initial_model_for_weight_conversion).",
            field=error.field,
        ) from None


def _check_kinds(kind: type[PeftConfig], fields: Mapping[str, Any]) -> None:
    """Checks each value against the kind of peft's default: a switch in quotes is never off."""
    for field in dataclasses.fields(kind):
        if field.name in fields and not field.name.startswith("init_"):  # may also name a method
            _check_kind(field.name, field.default, fields[field.name])


def _check_kind(name: str, default: object, value: object) -> None:
    is_number = type(default) in (int, float)
    is_whole = type(default) is int and not name.endswith("alpha")
    if value is None and not is_number and name != "bias":
        return
    rows = (
        (name.endswith("dropout"), _in_unit(value), "a number from 0 to 1"),
        (name == "layers_to_transform", _is_layers(value), "layer numbers"),
        (name in _NAMES_OR_PATTERN, isinstance(value, list | str), "a list of names"),
        (name in _TEXTS, isinstance(value, str), "text"),
        (isinstance(default, bool), isinstance(value, bool), "true or false"),
        (is_whole, type(value) is int, "a whole number"),
        (is_number, type(value) in (int, float), "a number"),
    )
    for concerned, good, wanted in rows:
        if concerned and not good:
            raise BadAdapterFile(
                f"{name} is {shown(value)}, not {wanted}",
                fix="Correct the config, or save the adapter again.",
                field=name,
            )


def _in_unit(value: object) -> bool:
    return type(value) in (int, float) and 0 <= value <= 1  # type: ignore[operator]


def _is_layers(value: object) -> bool:
    return all(type(n) is int for n in (value if isinstance(value, list) else [value]))


def _check_fields(component: Component, fields: dict[str, Any]) -> None:
    """Refuses what a file may not hold; expressions that need not be run are taken out."""
    for name in _REFUSED:
        if fields.pop(name, None):
            raise BadAdapterFile(
                f"the config field {name!r} is not accepted from a file",
                fix="Load the adapter with plain peft if you trust it.",
                field=name,
            )
    if isinstance(fields.get("exclude_modules"), str):
        fields["exclude_modules"] = None  # an expression; the tensors say what is adapted
    for name in _NAME_LISTS:
        _check_plain(name, fields.get(name))
    ends = {tail for p in component.targets for tail in tails(p.partition(f".{COPY}")[0])}
    named = {str(entry).rpartition(".")[2] for entry in fields.get("target_parameters") or ()}

    def is_known(key: str) -> bool:
        parent, _, last = key.rpartition(".")
        return key in ends or (last in named and (not parent or parent in ends))

    for name in [name for name in fields if name.endswith("_pattern") and name != "layers_pattern"]:
        patterns = fields[name] or {}
        if not isinstance(patterns, Mapping):
            raise BadAdapterFile(f"{name} is {shown(patterns)}, not an object", field=name)
        # peft tries every key on every target; those that end no target need not be tried
        fields[name] = {k: v for k, v in patterns.items() if is_known(plain_key(k, name))}
    _check_sizes(component, fields)
    if not fields.get(_ROWS):
        fields.pop(_ROWS, None)  # peft takes a list that is empty for one that is there
    _check_tokens(fields.get(_ROWS))
    if isinstance(fields.get("target_modules"), list):
        _check_plain("target_modules", fields["target_modules"])
    else:
        fields["target_modules"] = None


def _check_sizes(component: Component, fields: Mapping[str, Any]) -> None:
    """Refuses sizes that the tensors cannot have: peft would allocate them before it looks."""
    largest = max((max(t.shape, default=0) for _, t in component.tensors()), default=0)
    rows = list(fields.items())
    for name in ("block_size_pattern", "rank_pattern"):
        rows += [(f"{name}[{shown(k)}]", v) for k, v in (fields.get(name) or {}).items()]
    for name, value in rows:
        if type(value) is int and abs(value) > max(largest, _SMALL):
            raise BadAdapterFile(
                f"{name} is {shown(value)}, but no tensor of the file is larger than {largest}",
                fix="The file was damaged or altered; download or save it again.",
                field=name,
            )


def _check_tokens(rows: object) -> None:
    lists = list(rows.values()) if isinstance(rows, dict) else [rows or []]
    if isinstance(rows, dict):
        _check_plain(_ROWS, list(rows))
    if not all(isinstance(x, list) and all(type(i) is int and i >= 0 for i in x) for x in lists):
        raise BadAdapterFile(f"{_ROWS} is {shown(rows)}, not token numbers", field=_ROWS)


def _check_plain(name: str, value: object) -> None:
    entries = [value] if isinstance(value, str) and value else value or []
    if not isinstance(entries, list):
        raise BadAdapterFile(f"{name} is {shown(value)}, not a list of names", field=name)
    for entry in entries:
        if not isinstance(entry, str) or not _PLAIN.fullmatch(entry):
            raise BadAdapterFile(
                f"{name} has the entry {shown(entry)}, which is no plain module name",
                fix="Expressions from a file are not run; save the adapter with plain names.",
                field=name,
            )
