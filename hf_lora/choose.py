"""Request and survey -> the layers to adapt, the modules to train whole, and a literal config.

What the user gives may hold presets, roles, short names or (in a ready peft config) expressions;
what comes out names layers one by one, so that files and other programs need no expression.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from peft import LoraConfig, PeftConfig, PeftType
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import nn

from hf_lora.configs import PEFT_HEADS, add_identity, heads_of
from hf_lora.errors import InvalidOption, TargetNotFound, UnsupportedTarget, closest
from hf_lora.families import role_in, tower_in
from hf_lora.select import TargetSpec, select
from hf_lora.targets import (
    Layer,
    Survey,
    condense,
    condense_values,
    in_block,
)
from hf_lora.walks import bare_modules


def choose_heads(
    model: nn.Module, found: Survey, config: PeftConfig, train_also: Sequence[str] | None
) -> list[str]:
    """Returns the paths of the modules to train whole.

    Raises:
        InvalidOption: `train_also` is no list of names, given twice, or too wide for peft.
        TargetNotFound: A name is no module.
    """
    own = getattr(config, "modules_to_save", None)
    if train_also is not None and own:
        raise InvalidOption(
            "train_also= was given together with a config that has modules_to_save",
            fix="Use one of the two.",
            field="train_also",
        )
    if train_also is not None and not isinstance(train_also, list | tuple | set | frozenset):
        raise InvalidOption(
            f"train_also={train_also!r} is no list of module names",
            fix=f"Give a list: train_also=[{train_also!r}].",
            field="train_also",
        )
    if own:  # peft writes its own head names into configs, whatever the model has
        last = {path.rpartition(".")[2] for path in found.paths}
        own = [name for name in own if name not in PEFT_HEADS or name in last]
    named = train_also if train_also is not None else own
    wanted = _nameable(model, found) if named is None else list(named)
    argument = "train_also" if train_also is not None else "modules_to_save"
    if not all(isinstance(entry, str) for entry in wanted):
        raise InvalidOption(f"train_also={wanted!r} holds more than names", field="train_also")
    matches = {entry: module_matches(found, entry, argument) for entry in wanted}
    intended = {path for paths, _ in matches.values() for path in paths}
    for entry, (_, stray) in matches.items():
        if set(stray) - intended:
            raise InvalidOption(
                f"{argument} names {entry!r}, which would also train {stray[0]}, because peft "
                "compares the ends of names",
                fix="Give the full module path.",
                field=argument,
            )
    outer = [p for p in intended if not p.startswith(tuple(f"{q}." for q in intended))]
    return [path for path in found.paths if path in outer]


def _nameable(model: nn.Module, found: Survey) -> list[str]:
    """Returns the modules of the task heads by paths that mean them alone.

    peft wraps what ends in a name, as text: `head` also means `head.head`, and `class_embed` a
    `denoising_class_embed` of the trunk. It wraps no list of modules. Where that happens the single
    layers of all heads are named; what is still ambiguous stays as it is in the base.
    """
    modules = dict(bare_modules(model))
    heads = heads_of(model)
    lists = nn.ModuleList | nn.ModuleDict
    if not any(isinstance(modules[h], lists) or _strays(found, h, heads) for h in heads):
        return heads
    single = [p for h in heads for p in found.paths if p == h or p.startswith(f"{h}.")]
    single = [p for p in single if any(x is not None for x in modules[p]._parameters.values())]
    return [path for path in single if not _strays(found, path, single)]


def _strays(found: Survey, name: str, meant: Collection[str]) -> bool:
    return any(p.endswith(name) and p not in meant for p in found.paths)


def unnamed_heads(model: nn.Module, whole: Collection[str]) -> list[str]:
    """Returns the layers of task heads that are not among the modules trained whole."""
    inside = tuple(f"{path}." for path in heads_of(model))
    taken = tuple(f"{path}." for path in whole)
    return [
        path
        for path, module in bare_modules(model)
        if f"{path}.".startswith(inside)
        and not f"{path}.".startswith(taken)
        and any(p is not None for p in module._parameters.values())
    ]


def choose_layers(
    model: nn.Module,
    found: Survey,
    config: PeftConfig,
    targets: TargetSpec,
    heads: Sequence[str],
) -> list[Layer]:
    """Returns the layers to adapt: what the config names, else what `targets` means."""
    own = getattr(config, "target_modules", None)
    if own and targets != "default":
        raise InvalidOption(
            "targets= was given together with a config that has target_modules",
            fix="Use one of the two.",
            field="targets",
        )
    if own:
        chosen = _named_by_config(found, own)
    elif getattr(config, "target_parameters", None):
        chosen = []  # only parameters were asked for
    else:
        chosen = select(found, targets)
    chosen = [*chosen, *named_parameters(model, found, getattr(config, "target_parameters", None))]
    inside = tuple(f"{path}." for path in heads)
    chosen = [x for x in chosen if x.path not in heads and not x.path.startswith(inside)]
    if getattr(config, "exclude_modules", None) or getattr(config, "layers_to_transform", None):
        trial = copy.copy(config)
        # last segments, because peft skips the layer check for a path given in full
        trial.target_modules = {x.path.rpartition(".")[2] for x in chosen}  # type: ignore[attr-defined]
        chosen = [x for x in chosen if x.kind == "parameter" or _matched(trial, x.path)]
    if not chosen:
        raise TargetNotFound(
            f"every target in {found.host} is excluded or trained whole",
            fix="Relax exclude_modules, layers_to_transform or train_also.",
            field="targets",
        )
    return chosen


def _named_by_config(found: Survey, own: Any) -> list[Layer]:
    if not isinstance(own, str):
        return select(found, sorted(own))
    if own.lower() == "all-linear":
        return select(found, "all-linear")
    # the user's own expression, in the user's own process: run as peft would
    chosen = [x for x in found.layers if _matched(LoraConfig(target_modules=own), x.path)]
    if not chosen:
        raise TargetNotFound(
            f"target_modules={own!r} matches no layer of {found.host}",
            fix="peft matches a string as a regular expression against full paths; a list such as "
            f"[{own!r}] matches trailing names.",
            field="target_modules",
        )
    return chosen


def _matched(config: PeftConfig, path: str) -> bool:
    try:
        return bool(check_target_module_exists(config, path))
    except re.error as error:
        raise InvalidOption(
            f"the config holds {error.pattern!r}, which is no regular expression ({error})",
            field="config",
        ) from None


def cap_ranks(config: LoraConfig, chosen: Iterable[Layer], found: Survey) -> None:
    """Lowers the rank to min(in, out) where it is above, through `rank_pattern`."""
    ranks = {layer.path: min(config.r, *layer.shape, *part_sizes(layer)) for layer in chosen}
    config.rank_pattern = condense_values(ranks, config.r, _universe(found, chosen))


def part_sizes(layer: Layer) -> list[int]:
    """Returns the output features of each part that is asked for; empty for a whole layer."""
    return [len(rows) for rows in layer.rows.values()]


def _universe(found: Survey, chosen: Iterable[Layer]) -> list[str]:
    """Returns all paths that a pattern could mean: modules, and parameters where they matter."""
    parameters = dict.fromkeys(x.path for x in (*found.experts, *chosen) if x.kind == "parameter")
    return [*found.paths, *parameters]


def fill_config(
    config: Any, model: nn.Module, found: Survey, chosen: Sequence[Layer], heads: Sequence[str]
) -> None:
    """Writes targets, patterns, heads and identity into the config, all in literal names."""
    layers = [x for x in chosen if x.kind != "parameter"]
    parameters = [x.path for x in chosen if x.kind == "parameter"]
    universe = _universe(found, chosen)
    kinds: dict[str, Any] = dict(bare_modules(model))
    _check_method(config, chosen)
    if config.peft_type == PeftType.LORA:  # AdaLoRA's config is a LoraConfig with other ranks
        _check_dilation({x.path: kinds[x.path] for x in layers if x.kind == "conv"})
        # the LoRA of several parts is one of as many times the rank, see `layers.parts`
        times = {x.path: max(1, len(x.parts)) for x in chosen}
        ranks = {p: by_pattern(config.rank_pattern, p, config.r) * n for p, n in times.items()}
        alphas = {
            p: by_pattern(config.alpha_pattern, p, config.lora_alpha) * n for p, n in times.items()
        }
        config.rank_pattern = condense_values(ranks, config.r, universe)
        config.alpha_pattern = condense_values(alphas, config.lora_alpha, universe)
        config.target_parameters = condense(parameters, universe) if parameters else None
    # never None: peft would fall back to its own defaults
    config.target_modules = set(condense([x.path for x in layers], found.paths))
    for field in ("exclude_modules", "layers_to_transform", "layers_pattern"):
        if hasattr(config, field):
            setattr(config, field, None)  # the literal list says it already
    if heads:
        config.modules_to_save = list(heads)
    if hasattr(config, "fan_in_fan_out"):
        config.fan_in_fan_out = any(type(kinds[x.path]).__name__ == "Conv1D" for x in layers)
    config.inference_mode = False
    add_identity(config, model)


def _check_dilation(convolutions: Mapping[str, Any]) -> None:
    """Raises UnsupportedTarget where peft's A would give another size than the base."""
    for path, module in convolutions.items():
        if set(module.dilation) != {1}:
            raise UnsupportedTarget(
                f"{path} cannot be adapted: peft's LoRA leaves the dilation out and fails",
                fix="Leave it out of targets.",
                field="targets",
            )


# config field -> what cannot be had together with it
_WHOLE_ONLY = ("use_dora", "lora_bias", "use_qalora", "use_bdlora")


def _check_method(config: Any, chosen: Sequence[Layer]) -> None:
    """Raises InvalidOption for what peft cannot do on parameters, or nobody on parts."""
    rows = (
        ("fused experts", [x for x in chosen if x.kind == "parameter"], ("lora_dropout",)),
        ("parts of a fused projection", [x for x in chosen if x.parts], ()),
    )
    for what, layers, more in rows:
        if not layers:
            continue
        if not isinstance(config, LoraConfig):
            raise InvalidOption(
                f"{config.peft_type} cannot adapt {what} ({layers[0].path})",
                fix="Use LoRA, or other targets.",
                field="config",
            )
        field = next((n for n in (*_WHOLE_ONLY, *more) if getattr(config, n, None)), None)
        if field:
            raise InvalidOption(
                f"{field} cannot be had on {what} ({layers[0].path})",
                fix="Leave it out, or give these targets an adapter of their own.",
                field={"lora_dropout": "dropout"}.get(field, field),
            )


def by_pattern(patterns: Mapping[str, int] | None, path: str, default: int) -> int:
    """Returns what peft reads for a path: the value of the first expression that matches."""
    rows = patterns or {}
    try:
        return rows.get(get_pattern_key(list(rows), path), default)
    except re.error as error:
        raise InvalidOption(
            f"a pattern of the config is no regular expression: {error}", field="config"
        ) from None


def named_parameters(
    model: nn.Module, found: Survey, entries: Collection[str] | None
) -> list[Layer]:
    """Returns the parameters that peft's `target_parameters` names, as layers of that kind.

    Raises:
        TargetNotFound: An entry names no parameter; peft would leave it out without a word.
    """
    known = {
        f"{path}.{name}": parameter
        for path, module in bare_modules(model)
        for name, parameter in module._parameters.items()
        if parameter is not None
    }
    chosen = {}
    for entry in entries or ():
        paths = [p for p in known if p == entry or p.endswith(f".{entry}")]
        if not paths:
            raise TargetNotFound(
                f"no parameter of {found.host} matches {entry!r}. "
                f"Closest: {', '.join(closest(str(entry), known))}",
                field="target_parameters",
            )
        chosen.update(dict.fromkeys(paths))
    flat = next((path for path in chosen if known[path].ndim not in (2, 3)), None)
    if flat:
        raise UnsupportedTarget(
            f"{flat} is {tuple(known[flat].shape)}; a LoRA needs two dimensions or three",
            field="target_parameters",
        )
    return [
        Layer(
            path=path,
            role=role_in(path, found.family),
            tower=tower_in(path, found.family),
            shape=(known[path].shape[-1], known[path].shape[-2]),
            kind="parameter",
            in_block=in_block(path),
            parameters=known[path].numel(),
        )
        for path in chosen
    ]


def module_matches(found: Survey, entry: str, argument: str) -> tuple[list[str], list[str]]:
    """Returns the modules an entry means, and those only peft's looser comparison would add."""
    meant = [p for p in found.paths if p == entry or p.endswith(f".{entry}")]
    if not meant or not entry:
        near = ", ".join(closest(entry, [p for p in found.paths if p]))
        raise TargetNotFound(
            f"{argument} names {entry!r}, which is no module of {found.host}. Closest: {near}",
            field=argument,
        )
    return meant, [p for p in found.paths if p.endswith(entry) and p not in meant]
