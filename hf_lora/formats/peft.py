"""The peft folder: `adapter_config.json` + `adapter_model.safetensors`.

Key grammar, as written by peft 0.21 (`get_peft_model_state_dict`):
    base_model.model.<module path>.lora_A.weight          factors of a LoRA target
    base_model.model.<module path>.lora_magnitude_vector  DoRA; `.weight` may follow
    base_model.model.<module path>.<parameter>            modules listed in `modules_to_save`
transformers' `save_pretrained` writes the same keys without a difference.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_lora.adapter import MODEL, Adapter, Component, check_component
from hf_lora.digest import COMMENTS
from hf_lora.errors import AdapterNotFound, BadAdapterFile, LoraError, listing, shown
from hf_lora.formats.container import Contents, read_json, to_safetensors
from hf_lora.formats.disk import Files, backup, inside
from hf_lora.formats.header import Steps, check_digest, header_of, in_words, read_manifest, sound
from hf_lora.limits import DEFAULT_LIMITS, LoadLimits

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."

# Segment prefixes that mark where the module path ends and the factor name begins.
# One row a peft type whose saved keys are its parameter names minus the adapter name.
FACTOR_MARKS: Mapping[str, tuple[str, ...]] = {
    "LORA": ("lora_",),
    "ADALORA": ("lora_",),
    "LOHA": ("hada_",),
    "LOKR": ("lokr_",),
    "IA3": ("ia3_",),
    "OFT": ("oft_",),
    "BOFT": ("boft_",),
    "HRA": ("hra_",),
    "C3A": ("c3a_",),
    "MISS": ("miss_",),
}

TOKENS = "token_adapter"  # new rows of an embedding (`trainable_token_indices`)
COPY = "base_layer"  # the base weight of a targeted embedding, which peft saves as well


def steps(contents: Contents, weights: Path, limits: LoadLimits) -> Steps:
    """Makes an adapter with the single component `"model"` from a weights file, check by check.

    Where the header holds a manifest, its config is the truth: a config file that says otherwise,
    or is missing, is repaired from it, and the adapter's `repairs` say so.

    Raises:
        AdapterNotFound: There is no config, neither beside the file nor in its header.
        BadAdapterFile: Config or tensors cannot be right, or the digest is another.
        AdapterMismatch: Config and tensors contradict each other.
    """
    manifest = read_manifest(contents.metadata, limits)
    if manifest.configs and set(manifest.configs) != {MODEL}:
        raise BadAdapterFile(
            f"the configs of its manifest are for {listing(manifest.configs)}, not for a model",
            field="configs",
        )
    header = manifest.configs.get(MODEL)
    if header is not None:
        _check_kind(header)
    yield "manifest", in_words(manifest)
    config, repairs = _config_beside(weights, header, limits)
    yield "config", "; ".join(repairs) or f"{config['peft_type']}, as in the header"
    component = split(config, contents.tensors)
    try:
        check_component(component, limits)
    except LoraError as error:
        stated = header is None and error.field.partition("[")[0] in config
        raise error.within(file=str(weights.parent / CONFIG) if stated else "") from None
    yield "tensors", sound(component)
    named = weights.parent if weights.name == WEIGHTS else weights
    adapter = Adapter({MODEL: component}, manifest, str(named), repairs)
    yield "digest", check_digest(adapter)
    return adapter


def _config_beside(
    weights: Path, header: Mapping[str, Any] | None, limits: LoadLimits
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Returns the config in force and what had to be repaired."""
    if weights.name != WEIGHTS:  # a file under a name of its own has nothing beside it
        if header is None:
            raise AdapterNotFound(
                "the file holds peft factors but no config, so alpha is not known",
                fix=f"Give the folder it came from, with {CONFIG} beside {WEIGHTS}.",
            )
        return dict(header), ()
    folder = weights.parent
    kept = folder / backup(CONFIG)
    if not inside(folder, CONFIG).exists():
        if header is not None:
            return dict(header), (f"{CONFIG} is missing; the header of {WEIGHTS} holds it",)
        if kept.exists():  # a save was killed after it took the old config out of sight
            config, repairs = _with_defaults(read_config(inside(folder, kept.name), limits))
            return config, (
                f"{CONFIG} was taken from {kept.name}, which an interrupted save left",
                *repairs,
            )
        raise AdapterNotFound(
            f"there is no {CONFIG} in {folder}",
            fix="Copy it from where the weights came from; without it alpha is not known.",
            file=str(folder),
        )
    if header is None:
        return _with_defaults(read_config(inside(folder, CONFIG), limits))
    try:
        beside = read_config(inside(folder, CONFIG), limits)
    except BadAdapterFile as error:
        return dict(header), (f"{CONFIG} is broken ({error.fact}); the header was used",)
    wrong = sorted(
        name
        for name in {*header, *beside} - COMMENTS
        if _plain(header.get(name)) != _plain(beside.get(name))
    )
    config = {**beside, **{k: v for k, v in header.items() if k not in COMMENTS}}
    for name in wrong:
        if name not in header:
            del config[name]
    return config, tuple(
        f"{name} is {_short(beside.get(name))} in {CONFIG}, but {_short(header.get(name))} in the "
        "header, which holds"
        for name in wrong
    )


def _plain(value: Any) -> Any:
    """Returns a config value in the form in which order and emptiness do not matter."""
    if isinstance(value, list) and all(isinstance(x, str) for x in value):
        return sorted(value) or None
    return value or None


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def read_config(path: Path, limits: LoadLimits = DEFAULT_LIMITS) -> dict[str, Any]:
    """Reads and checks `adapter_config.json`: an object within the limits, of a known peft type."""
    config = read_json(path, limits)
    try:
        if not isinstance(config, dict):
            raise BadAdapterFile("the config is no JSON object")
        _check_kind(config)
    except LoraError as error:
        raise error.within(file=str(path)) from None
    return config


def _with_defaults(config: dict[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Fills in peft's defaults, which old configs leave out, and says so."""
    if config["peft_type"].upper() != "LORA":
        return config, ()
    absent = {k: v for k, v in {"r": 8, "lora_alpha": 8}.items() if k not in config}
    return {**absent, **config}, tuple(
        f"{CONFIG} states no {name}; peft's default {value} was taken"
        for name, value in absent.items()
    )


def _check_kind(config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind.upper() not in FACTOR_MARKS:
        raise BadAdapterFile(
            f"peft_type is {shown(kind)}",
            fix=f"Types that are read: {', '.join(FACTOR_MARKS)}; for others use "
            "peft.PeftModel.from_pretrained.",
            field="peft_type",
        )


def split(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Component:
    """Sorts a flat peft state dict into targets and whole modules.

    Raises:
        BadAdapterFile: A key is neither a factor nor inside a module listed in `modules_to_save`.
            Such keys overwrite base weights when plain peft loads them.
    """
    marks = FACTOR_MARKS[str(config["peft_type"]).upper()]
    listed = config.get("modules_to_save") or []
    if not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
        raise BadAdapterFile(
            f"modules_to_save is {shown(listed)}, not a list of names", field="modules_to_save"
        )
    targets: dict[str, dict[str, Tensor]] = defaultdict(dict)
    modules: dict[str, dict[str, Tensor]] = defaultdict(dict)
    foreign = []
    ends = _Ends(listed)
    for key, tensor in sorted(tensors.items()):
        segments = key.removeprefix(PREFIX).split(".")
        cut = next((i for i, s in enumerate(segments) if s.startswith(marks)), 0)
        whole = ends.module_cut(segments)
        place: dict[str, Tensor]
        if cut:
            place = targets[".".join(segments[:cut])]
            name = factor_name(".".join(segments[cut:]))
        elif TOKENS in segments or COPY in segments:
            row = next(i for i, s in enumerate(segments) if s in (TOKENS, COPY))
            place, name = modules[".".join(segments[:row])], ".".join(segments[row:])
        elif whole:
            place, name = modules[".".join(segments[:whole])], ".".join(segments[whole:])
        else:
            foreign.append(key)
            continue
        if name in place:
            raise BadAdapterFile(f"{key} stands twice, under two spellings", field=key)
        place[name] = tensor
    if foreign:
        raise BadAdapterFile(
            f"{len(foreign)} tensors are neither {config['peft_type']} factors nor inside "
            f"modules_to_save: {listing(foreign)}",
            fix="Loading them would overwrite base weights; remove them from the file.",
            field=foreign[0],
        )
    if not targets:
        raise BadAdapterFile(
            f"no key of the {len(tensors)} tensors is a {config['peft_type']} factor",
            fix=f"Expected names like {PREFIX}<module>.{marks[0]}A.weight.",
        )
    return with_all_ranks(Component(dict(config), dict(targets), dict(modules)))


# AdaLoRA's factors -> the dimension that is the rank.
_RANKS = {"lora_A": 0, "lora_E": 0, "lora_B": 1}


def with_all_ranks(component: Component, name: str = "") -> Component:
    """Puts zeros where peft leaves out the rows of ranks that AdaLoRA has dropped.

    `rank_pattern` says which: target.lora_E -> one bool a rank. With all rows the factors do the
    same, fit a fresh layer of `init_r` and can be trained on. Other kinds come back as they are.

    Args:
        component: The component.
        name: The adapter's name, which ends the pattern's keys while a model is trained.

    Raises:
        BadAdapterFile: The pattern does not fit the tensors.
    """
    if component.kind != "ADALORA":
        return component
    pattern = component.config.get("rank_pattern") or {}
    if not isinstance(pattern, Mapping):
        raise BadAdapterFile(f"rank_pattern is {shown(pattern)}, not an object")
    targets = {path: dict(factors) for path, factors in component.targets.items()}
    for key, kept in pattern.items():
        path = str(key).removesuffix(f".{name}").removesuffix(".lora_E")
        if path not in targets or not isinstance(kept, list) or set(map(type, kept)) - {bool}:
            raise BadAdapterFile(
                f"rank_pattern[{shown(key)}] is no list of true and false for a target",
                field="rank_pattern",
            )
        for factor, dim in _RANKS.items():
            held = targets[path].get(factor)
            if held is None or held.ndim != 2 or held.shape[dim] not in (sum(kept), len(kept)):
                raise BadAdapterFile(
                    f"rank_pattern[{shown(key)}] keeps {sum(kept)} of {len(kept)} ranks, and "
                    f"{factor} is {'missing' if held is None else tuple(held.shape)}",
                    field="rank_pattern",
                )
            if held.shape[dim] != len(kept):
                shape = [len(kept) if d == dim else n for d, n in enumerate(held.shape)]
                rows = [row for row, here in enumerate(kept) if here]  # nonzero() fails on meta
                at = torch.tensor(rows, device=held.device)
                targets[path][factor] = held.new_zeros(shape).index_copy(dim, at, held)
    return Component({**component.config, "rank_pattern": None}, targets, component.modules)


class _Ends:
    """Names of `modules_to_save`, looked up by length, however many a file lists."""

    def __init__(self, names: list[str]) -> None:
        self._names = {name for name in names if name}
        self._lengths = sorted({len(name) for name in self._names})

    def module_cut(self, segments: list[str]) -> int:
        """Returns how many leading segments name a listed module; 0 for none.

        peft compares the ends of names, so `classifier` saves `pre_classifier` as well.
        """
        path = ""
        for count, segment in enumerate(segments[:-1] if self._names else (), start=1):
            path = f"{path}.{segment}" if path else segment
            if self._ends(path):
                return count
        return 0

    def _ends(self, path: str) -> bool:
        for length in self._lengths:
            if length > len(path):
                return False
            if path[-length:] in self._names:
                return True
        return False


def join(component: Component) -> dict[str, Tensor]:
    """Returns the flat peft state dict of a component, the inverse of `split`."""
    flat = {}
    suffixes = {} if component.kind == "ADALORA" else _SUFFIXED  # whose factors are no modules
    for path, factors in component.targets.items():
        for name, tensor in factors.items():
            flat[f"{PREFIX}{path}.{name}{suffixes.get(name, '')}"] = tensor
    for path, parameters in component.modules.items():
        for name, tensor in parameters.items():
            flat[f"{PREFIX}{path}.{name}"] = tensor
    return flat


# peft holds these as modules, so their keys end in `.weight`. It leaves that out for magnitudes,
# reads both spellings, and transformers 5.23 loses magnitudes without it.
_SUFFIXED = {name: ".weight" for name in ("lora_A", "lora_B", "lora_magnitude_vector")}


def factor_name(name: str) -> str:
    """Returns a factor as the record spells it: without the `.weight` peft adds to some."""
    bare = name.removesuffix(".weight")
    return bare if bare in _SUFFIXED else name


def files_of(adapter: Adapter, path: Path) -> Files:
    """Returns what to write into the folder `path`: weights with the manifest, and the config.

    An old config is taken out of sight while the two are renamed, so that no reader ever sees it
    beside the new weights.

    Raises:
        BadAdapterFile: The adapter has another component than `"model"`, or meta tensors.
    """
    if set(adapter.components) != {MODEL}:
        raise BadAdapterFile(
            f"the peft layout carries one model, not {listing(sorted(adapter.components))}",
            fix='Use layout="diffusers", or save each component apart.',
        )
    component = adapter.components[MODEL]
    metadata = header_of(adapter, {"format": "pt"})
    # fields sorted as peft sorts them, but not the patterns, of which the first match counts
    fields = dict(sorted(component.config.items()))
    config = json.dumps(fields, indent=2, allow_nan=False).encode()
    return Files(
        folder=path,
        contents={WEIGHTS: to_safetensors(join(component), metadata), CONFIG: [config]},
        guard=CONFIG,
    )
