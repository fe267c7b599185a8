"""The pipeline file as a whole: its manifest and configs, read and written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from hf_lora.adapter import MODEL, Adapter, Component, check_component
from hf_lora.errors import BadAdapterFile, LoraError, listing, shown
from hf_lora.formats.container import Contents, parse_json, to_safetensors
from hf_lora.formats.diffusers import (
    METADATA,
    WEIGHTS,
    in_grammar,
    join,
    known_fields,
    split,
    states_alpha,
)
from hf_lora.formats.disk import Files
from hf_lora.formats.grammar import is_of_others
from hf_lora.formats.header import Steps, check_digest, header_of, in_words, read_manifest, sound
from hf_lora.limits import LoadLimits
from hf_lora.manifest import KEY

__all__ = ["WEIGHTS", "files_of", "is_own", "steps"]


def is_own(contents: Contents) -> bool:
    """Tells whether a file is of this layout: by all of its keys, or by its header.

    Other programs write diffusers' header beside keys of their own (SimpleTuner with
    `lora_format=comfyui`), and alpha as a tensor, which diffusers never does.
    """
    if contents.tensors and all(map(in_grammar, contents.tensors)):
        return True
    if not states_alpha(contents.metadata):
        return False
    return KEY in contents.metadata or not any(map(is_of_others, contents.tensors))


def steps(contents: Contents, weights: Path, limits: LoadLimits) -> Steps:
    """Makes an adapter from the contents of a pipeline's file, check by check.

    Where the header holds a manifest, its configs are the truth, and `lora_adapter_metadata` is
    their copy for diffusers.

    Raises:
        BadAdapterFile: Keys or header cannot be right, or the digest is another.
        AdapterMismatch: Config and tensors contradict each other.
    """
    manifest = read_manifest(contents.metadata, limits)
    yield "manifest", in_words(manifest)
    repairs: tuple[str, ...] = ()
    contents = _with_component(contents, limits)
    if manifest.configs:
        found, repairs = _by_manifest(contents, manifest.configs, limits)
    else:
        found = split(contents.tensors, contents.metadata, limits=limits)
        if not states_alpha(contents.metadata):
            repairs = ("the file states no alpha; as in diffusers, alpha = rank was taken",)
    yield "config", "; ".join(repairs) or f"LORA for {listing(found)}"
    for name, component in found.items():
        try:
            check_component(component, limits)
        except LoraError as error:
            raise error.within(field=name) from None
    adapter = Adapter(found, manifest, str(weights), repairs)
    yield "tensors", "; ".join(f"{name}: {sound(part)}" for name, part in found.items())
    yield "digest", check_digest(adapter)
    return adapter


def _with_component(contents: Contents, limits: LoadLimits) -> Contents:
    """Returns what diffusers' `save_lora_adapter` writes for one model with names in front.

    Neither its keys nor the fields of its header name a component; both get that of a single model.
    """
    if KEY in contents.metadata or any(map(in_grammar, contents.tensors)):
        return contents
    stated = parse_json(contents.metadata[METADATA], limits.depth, METADATA)
    if not isinstance(stated, dict) or not stated or not stated.keys() <= known_fields():
        return contents
    header = json.dumps({f"{MODEL}.{key}": value for key, value in stated.items()})
    tensors = {f"{MODEL}.{key}": tensor for key, tensor in contents.tensors.items()}
    return Contents({**contents.metadata, METADATA: header}, tensors)


def _by_manifest(
    contents: Contents, configs: Mapping[str, Mapping[str, object]], limits: LoadLimits
) -> tuple[dict[str, Component], tuple[str, ...]]:
    """Returns the components with the manifest's configs, and what was wrong with their copy."""
    for name, config in configs.items():
        if str(config.get("peft_type")).upper() != "LORA":
            raise BadAdapterFile(
                f"peft_type of {name} is {shown(config.get('peft_type'))}, not 'LORA'",
                field="peft_type",
            )
    try:
        stated = split(contents.tensors, contents.metadata, limits=limits)
    except BadAdapterFile as error:
        if error.field != METADATA:
            raise
        bare = split(contents.tensors, {})
        return _with_configs(bare, configs), (
            f"{METADATA} is broken ({error.fact}); the manifest was used",
        )
    found = _with_configs(stated, configs)
    return found, _repaired(found, stated)


def _with_configs(
    found: Mapping[str, Component], configs: Mapping[str, Mapping[str, object]]
) -> dict[str, Component]:
    if set(configs) != set(found):
        raise BadAdapterFile(
            f"the configs of its manifest are for {listing(sorted(configs))}, its tensors for "
            f"{listing(sorted(found))}",
            field="configs",
        )
    return {name: Component(configs[name], part.targets) for name, part in found.items()}


def _repaired(truth: Mapping[str, Component], stated: Mapping[str, Component]) -> tuple[str, ...]:
    """Says where the copy for diffusers gives other scalings than the manifest."""
    wrong = []
    for name, component in truth.items():
        for path in component.targets:
            scaling = _scaling(component, path)
            if scaling is None or scaling != _scaling(stated[name], path):
                wrong.append(f"{name}.{path}")
    if not wrong:
        return ()
    return (f"lora_adapter_metadata gives another scaling than the manifest at {listing(wrong)}",)


def _scaling(component: Component, path: str) -> float | None:
    try:
        return component.scaling(path)
    except Exception:  # a config that was not checked yet may hold anything
        return None


def files_of(adapter: Adapter, path: Path) -> Files:
    """Returns the one file to write: `path` itself when it has a suffix, else into that folder.

    Raises:
        BadAdapterFile: The adapter holds what diffusers cannot read, or lies on meta.
    """
    tensors, own = join(adapter.components)
    one_file = path.suffix == ".safetensors" and not path.is_dir()
    folder, name = (path.parent, path.name) if one_file else (path, WEIGHTS)
    return Files(folder, {name: to_safetensors(tensors, header_of(adapter, own))})
