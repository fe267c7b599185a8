"""The pipeline file: `pytorch_lora_weights.safetensors` in diffusers' own grammar.

Keys, as written by diffusers 0.42.1 (`save_lora_weights`):
    <component>.<module path>.lora_A.weight    factors of a target, spelt as in the peft layout
The header carries `lora_adapter_metadata`: one JSON object with the fields of every component's
`LoraConfig`, each spelt `<component>.<field>`. Files without it state no alpha; diffusers then
takes alpha = rank for every target.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping
from dataclasses import fields
from functools import cache
from typing import Any

from torch import Tensor

from hf_lora.adapter import MODEL, Component
from hf_lora.errors import BadAdapterFile, listing, shown
from hf_lora.formats.container import parse_json
from hf_lora.formats.peft import FACTOR_MARKS, factor_name
from hf_lora.limits import DEFAULT_LIMITS, LoadLimits

WEIGHTS = "pytorch_lora_weights.safetensors"
METADATA = "lora_adapter_metadata"

# What diffusers 0.42.1 loads LoRAs into (`_lora_loadable_modules` of its pipelines, together)
COMPONENTS = frozenset(
    {"connectors", "prior", "text_conditioner", "text_encoder", "text_encoder_2", "transformer",
     "transformer_2", "transformer_ref", "unet"}
)  # fmt: skip

# Factor name -> what its key ends in besides. diffusers' text encoders lose magnitudes without
# `.weight`, its denoisers read both spellings.
_FACTORS = {
    "lora_A": ".weight",
    "lora_B": ".weight",
    "lora_B.bias": "",
    "lora_magnitude_vector": ".weight",
    "lora_embedding_A": "",
    "lora_embedding_B": "",
}

# config field -> what it adds that this layout has no keys for
_NOT_CARRIED = {
    "modules_to_save": "modules trained whole",
    "trainable_token_indices": "new rows of embeddings",
    "target_parameters": "factors of bare parameters",
}

# peft type -> the defaults that peft fills in where a header leaves them out. What diffusers 0.42.1
# writes of LoHa and LoKr it reads back for Flux2 and Z-Image (LoKr) or nowhere.
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "LORA": {"r": 8, "lora_alpha": 8},
    "LOHA": {"r": 8, "alpha": 8},
    "LOKR": {"r": 8, "alpha": 8},
}

# diffusers knows a text encoder's file by these; without one it raises "could not infer"
_TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")


def states_alpha(metadata: Mapping[str, str]) -> bool:
    """Says whether the header states alpha; without it diffusers takes alpha = rank."""
    return bool(metadata.get(METADATA))  # diffusers takes an empty text for none


def join(components: Mapping[str, Component]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns the flat tensors and the header of a file that diffusers applies exactly.

    Configs go into the header as they are, with two exceptions that mean the same: targets that
    are no list of names become the list of paths, and names lose a leading `text_model.`, which
    hosts of transformers 5 no longer have. Dropout is 0 there, because diffusers 0.42.1 leaves it
    on after a load; the manifest has the true one.

    Raises:
        BadAdapterFile: A component holds what diffusers does not read in this layout.
    """
    flat: dict[str, Tensor] = {}
    stated: dict[str, Any] = {}
    for name, component in components.items():
        _check_name(name)
        _check_carried(name, component)
        for path, factors in component.targets.items():
            for factor, tensor in factors.items():
                flat[f"{name}.{path}.{factor}{_FACTORS[factor]}"] = tensor
        stated |= {f"{name}.{key}": value for key, value in _stated(component).items()}
    if not flat:
        raise BadAdapterFile("the adapter holds no LoRA factors")
    return flat, {"format": "pt", METADATA: _as_json(stated)}


def _check_name(name: str) -> None:
    if name == MODEL:
        raise BadAdapterFile(
            "the diffusers layout carries the components of a pipeline, not a single model",
            fix="Save it in the peft layout.",
        )
    if not name or "." in name:
        raise BadAdapterFile(
            f"{name!r} cannot name a component",
            fix="A component's name is not empty and has no dot.",
        )


def _check_carried(name: str, component: Component) -> None:
    fix = f"Save the component {name!r} alone in the peft layout, which can carry it."
    if component.kind != "LORA":
        raise BadAdapterFile(
            f"{name} is an adapter of the method {component.kind or 'unknown'}, and the diffusers "
            "layout carries LoRA (diffusers 0.42.1 reads LoKr for Flux2 and Z-Image, no other)",
            fix=_in_kohya(name, component.kind) or fix,
            field="peft_type",
        )
    extra = [words for key, words in _NOT_CARRIED.items() if component.config.get(key)]
    if component.modules or extra:
        held = " and ".join(extra or [f"whole modules ({listing(component.modules)})"])
        raise BadAdapterFile(f"{name} has {held}, which diffusers 0.42.1 does not read", fix=fix)
    unknown = [key for key in component.config if key not in lora_fields()]
    if unknown:
        raise BadAdapterFile(
            f"the config of {name} has fields that peft's LoraConfig lacks: {listing(unknown)}",
            fix="diffusers raises TypeError for them; remove them or install the peft they are of.",
            field=unknown[0],
        )
    _check_targets(name, component.targets, fix)


def _in_kohya(name: str, kind: str) -> str:
    """Returns the way out for kinds that LyCORIS has: files of kohya hold all components."""
    if kind not in ("LOHA", "LOKR"):
        return ""
    return f"Save it in the kohya layout, which carries it, or {name!r} alone in the peft layout."


@cache
def lora_fields() -> frozenset[str]:
    """Returns the fields of peft's LoraConfig."""
    from peft import LoraConfig

    return frozenset(field.name for field in fields(LoraConfig))


@cache
def known_fields() -> frozenset[str]:
    """Returns the fields of the configs of all kinds that are read."""
    from peft import LoHaConfig, LoKrConfig

    others = (field.name for kind in (LoHaConfig, LoKrConfig) for field in fields(kind))
    return lora_fields() | {*others}


def _check_targets(name: str, targets: Mapping[str, Mapping[str, Tensor]], fix: str) -> None:
    if not any(targets.values()):
        raise BadAdapterFile(f"{name} holds no LoRA factors")
    strange = [
        f"{path}.{factor}"
        for path, factors in targets.items()
        for factor in factors
        if factor not in _FACTORS or _parsed(f"{name}.{path}.{factor}") != (name, path, factor)
    ]
    if strange:
        raise BadAdapterFile(
            f"{name} has tensors that diffusers 0.42.1 does not read: {listing(strange)}",
            fix=fix,
            field=strange[0],
        )
    if name.startswith("text_encoder") and not any(p.endswith(_TEXT_TARGETS) for p in targets):
        raise BadAdapterFile(
            f"{name} has no target named {listing(_TEXT_TARGETS)}, and diffusers 0.42.1 takes "
            "no file without one for a text encoder's",
            fix=fix,
        )


def _stated(component: Component) -> dict[str, Any]:
    """Returns the config fields as diffusers is to pass them to `LoraConfig`."""
    config = dict(component.config)
    for key in ("rank_pattern", "alpha_pattern"):
        if isinstance(config.get(key), Mapping):
            config[key] = {_bare(name): value for name, value in config[key].items()}
    config["target_modules"] = [_bare(name) for name in _names(component)]
    if config.get("lora_dropout"):
        config["lora_dropout"] = 0.0
    return config


def _names(component: Component) -> list[str]:
    """Returns the config's targets if they are names that select every path, else the paths."""
    stated = component.config.get("target_modules")
    if isinstance(stated, Collection) and all(isinstance(name, str) for name in stated):
        ends = tuple(f".{name}" for name in stated)
        if not isinstance(stated, str) and all(f".{p}".endswith(ends) for p in component.targets):
            return list(stated) if isinstance(stated, list | tuple) else sorted(stated)
    return sorted(component.targets)


def _bare(name: str) -> str:
    """Drops a leading `text_model.`; peft compares the ends of names, so it means the same."""
    plain = name.removeprefix("^")
    return plain.removeprefix("text_model.") if plain.startswith("text_model.") else name


def _as_json(stated: Mapping[str, Any]) -> str:
    try:
        fields = dict(sorted(stated.items()))  # patterns keep their order: the first match counts
        return json.dumps(fields, default=_plain, indent=2, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise BadAdapterFile(f"a config holds what JSON cannot ({error})", field=METADATA) from None


def _plain(value: object) -> object:
    if isinstance(value, set | frozenset):
        return sorted(value)
    raise TypeError(f"a value of type {type(value).__name__}")


def split(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    *,
    limits: LoadLimits = DEFAULT_LIMITS,
) -> dict[str, Component]:
    """Sorts the flat tensors of a file into components, the inverse of `join`.

    Where the header states no alpha, ranks are taken from the shapes and alpha = rank from
    diffusers' convention; `states_alpha` says which it was.

    Raises:
        BadAdapterFile: A key is no factor of a component, or the header's configs are broken or
            are of other components than the tensors.
    """
    configs = _configs(metadata[METADATA], limits) if states_alpha(metadata) else None
    known = COMPONENTS if configs is None else COMPONENTS | configs.keys()
    parts: dict[str, dict[str, dict[str, Tensor]]] = defaultdict(lambda: defaultdict(dict))
    foreign = []
    kinds = {name: _kind(config) for name, config in (configs or {}).items()}
    for key, tensor in sorted(tensors.items()):
        kind = kinds.get(key.partition(".")[0], "LORA")
        name, path, factor = _parsed(key, kind)
        if name not in known or not factor or (kind == "LORA" and factor not in _FACTORS):
            foreign.append(key)
        elif factor in parts[name][path]:
            raise BadAdapterFile(f"{key} stands twice, under two spellings", field=key)
        else:
            parts[name][path][factor] = tensor
    if foreign or not parts:
        raise _not_factors(foreign, len(tensors))
    if configs is None:
        configs = {name: _guessed(name, targets) for name, targets in parts.items()}
    _check_same(configs.keys(), parts.keys())
    return {name: Component(configs[name], dict(targets)) for name, targets in parts.items()}


def _kind(config: Mapping[str, Any]) -> str:
    return str(config["peft_type"]).upper()


def _parsed(key: str, kind: str = "LORA") -> tuple[str, str, str]:
    """Returns component, module path and factor name; the last is empty where there is none."""
    name, *rest = key.split(".")
    marks = FACTOR_MARKS[kind]
    cut = next((i for i, segment in enumerate(rest) if segment.startswith(marks)), 0)
    path = ".".join(rest[:cut])
    return name, path, factor_name(".".join(rest[cut:])) if path else ""


def in_grammar(key: str) -> bool:
    """Tells whether a key names a factor of a component as diffusers writes them."""
    name, _, factor = _parsed(key)
    return name in COMPONENTS and factor in _FACTORS


def _not_factors(foreign: list[str], total: int) -> BadAdapterFile:
    if not foreign:
        return BadAdapterFile("the file holds no tensors")
    return BadAdapterFile(
        f"{len(foreign)} of {total} keys are no LoRA factors of a pipeline's component: "
        f"{listing(key[:200] for key in foreign)}",
        fix="Expected names like unet.<module path>.lora_A.weight.",
        field=foreign[0][:200],
    )


def _configs(text: str, limits: LoadLimits) -> dict[str, dict[str, Any]]:
    """Returns component -> config fields from the header's JSON."""
    try:
        stated = parse_json(text, limits.depth, METADATA)
    except BadAdapterFile as error:
        raise error.within(field=METADATA) from None
    if not isinstance(stated, dict):
        raise BadAdapterFile(f"{METADATA} is no JSON object", field=METADATA)
    configs: dict[str, dict[str, Any]] = defaultdict(lambda: {"peft_type": "LORA"})
    for key, value in stated.items():
        name, dot, field = key.partition(".")
        if not (name and dot and field):
            raise BadAdapterFile(
                f"{METADATA} has the key {shown(key)}, which is no <component>.<field>",
                fix="Fields without a component are what save_lora_adapter writes for one model; "
                "such a file is not read here yet.",
                field=METADATA,
            )
        configs[name][field] = value
    for name, config in configs.items():
        if _kind(config) not in DEFAULTS:
            raise BadAdapterFile(
                f"{METADATA}: {name}.peft_type is {shown(config['peft_type'])}, not 'LORA'",
                fix=f"Types that are read: {', '.join(DEFAULTS)}.",
                field=METADATA,
            )
    return {name: {**DEFAULTS[_kind(config)], **config} for name, config in configs.items()}


def _check_same(stated: Collection[str], held: Collection[str]) -> None:
    for have, lack, wrong in (
        ("a config", "tensors", set(stated) - set(held)),
        ("tensors", f"a config in {METADATA}", set(held) - set(stated)),
    ):
        if wrong:
            raise BadAdapterFile(
                f"{listing(sorted(wrong))}: the file has {have} but not {lack}",
                fix=f"Save it again with the {METADATA} of every component.",
                field=METADATA,
            )


def _guessed(name: str, targets: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Any]:
    """Returns the config that diffusers takes where the header has none: alpha = rank."""
    ranks = {}
    for path, factors in targets.items():
        for factor in ("lora_A", "lora_embedding_A"):
            if factor in factors and factors[factor].ndim > 1:
                ranks[path] = factors[factor].shape[0]
    if not ranks:
        raise BadAdapterFile(f"{name} has no lora_A to take a rank from", field=name)
    common = Counter(ranks.values()).most_common(1)[0][0]
    # anchored where diffusers anchors them: its text encoders may be nested one level deeper
    anchor = "" if name.startswith("text_encoder") else "^"
    others = {f"{anchor}{path}": rank for path, rank in ranks.items() if rank != common}
    names = {factor for factors in targets.values() for factor in factors}
    return {
        "peft_type": "LORA",
        "r": common,
        "lora_alpha": common,
        "rank_pattern": others,
        "alpha_pattern": dict(others),
        "target_modules": sorted(targets),
        "use_dora": "lora_magnitude_vector" in names,
        "lora_bias": "lora_B.bias" in names,
    }
