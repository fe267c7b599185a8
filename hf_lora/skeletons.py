"""Hosts without weights: models and pipelines laid out on the meta device from their configs.

Shapes and classes are all that a check or a plan needs. Only configs are read or downloaded, and no
code of a repository runs.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_lora.architectures import ARCHITECTURES, Model
from hf_lora.errors import AdapterNotFound, InvalidOption, UnsupportedHost, shown
from hf_lora.formats.container import read_json
from hf_lora.limits import DEFAULT_LIMITS

INDEX, CONFIG = "model_index.json", "config.json"
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.\-]*/[\w.\-]+")


def laid_out(name: str, *, revision: str | None = None) -> Any:
    """Returns a host of which only classes and shapes are there, on the meta device.

    Args:
        name: A pipeline known by name (`"sdxl"`, see `ARCHITECTURES`), or the folder or repository
            id of a pipeline or model.
        revision: Branch, tag or commit of a repository.

    Returns:
        A model, or an object that has the class name and the components of a pipeline that
        diffusers loads LoRAs into, and nothing else of it.

    Raises:
        InvalidOption: `name` is none of these.
        AdapterNotFound: There is no usable config.
        UnsupportedHost: A config names a class that is not installed, or makes no model.
    """
    if name in ARCHITECTURES:
        rows = ARCHITECTURES[name]
        return as_pipeline(name, {part: _public(model) for part, model in rows.items()})
    if os.path.exists(name):
        return _in_folder(Path(name))
    if not _REPO_ID.fullmatch(name):
        raise InvalidOption(
            f"no pipeline is known by the name {shown(name)}, and there is no such folder",
            fix=f"Known: {', '.join(ARCHITECTURES)}; or give the folder or repository id of one.",
            field="host",
        )
    found = _downloaded(name, revision)
    return laid_out_model(name, revision=revision) if found is None else _pipeline(found)


def _in_folder(folder: Path) -> Any:
    """Lays out what a folder holds: a pipeline, one component of one, or a model."""
    if (folder / INDEX).is_file():
        return _pipeline(folder)
    if (folder / CONFIG).is_file():
        config = read_json(folder / CONFIG, DEFAULT_LIMITS)
        if isinstance(config, dict) and "_class_name" in config:  # diffusers' mark of its models
            return _component(folder, config["_class_name"])
    return laid_out_model(str(folder))


def as_pipeline(kind: str, parts: Mapping[str, nn.Module]) -> Any:
    """Returns an object that is a pipeline to whoever asks for its class name and components."""
    made = type(kind, (), {"_lora_loadable_modules": list(parts)})()
    vars(made).update(parts)
    return made


def _public(model: Model) -> nn.Module:
    """Builds one component of a pipeline that is known by name."""
    kind = _class_named(model.kind)
    configs = getattr(kind, "config_class", None)
    with torch.device("meta"):
        built: nn.Module = kind(configs(**model.sizes)) if configs else kind(**model.sizes)
    return built


def _class_named(name: object) -> Any:
    """Returns a model class of diffusers or transformers; UnsupportedHost for any other name."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        kind = getattr(library, str(name), None)
        if isinstance(kind, type) and issubclass(kind, nn.Module):
            return kind
    raise UnsupportedHost(
        f"{shown(name)} is no model class of diffusers {diffusers.__version__} or transformers "
        f"{transformers.__version__}",
        fix="Code from a repository is not run here; load the pipeline in Python and give that.",
    )


def _downloaded(name: str, revision: str | None) -> Path | None:
    """Returns a folder with the configs of a repository's pipeline; None where it holds none."""
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        hf_hub_download(name, INDEX, revision=revision)
        folder = snapshot_download(name, revision=revision, allow_patterns=[INDEX, f"*/{CONFIG}"])
    except LocalEntryNotFoundError:  # no answer: what the cache has of a model will do
        return None
    except EntryNotFoundError:
        return None
    except Exception as error:  # the client passes on what its transport raises
        raise AdapterNotFound(
            f"the repository {name!r} cannot be read: {_first_line(error)}",
            fix="Check the name and the connection, or give a folder.",
        ) from None
    return Path(folder)


def _pipeline(folder: Path) -> Any:
    """Lays out the components of a pipeline's folder that LoRAs are loaded into."""
    import diffusers

    index = read_json(folder / INDEX, DEFAULT_LIMITS)
    name = index.get("_class_name") if isinstance(index, dict) else None
    kind = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not (isinstance(kind, type) and issubclass(kind, diffusers.DiffusionPipeline)):
        raise UnsupportedHost(
            f"{folder} names the class {shown(name)}, which is no pipeline of diffusers "
            f"{diffusers.__version__}",
            fix="Code from a repository is not run here; load it in Python and give that.",
        )
    wanted = getattr(kind, "_lora_loadable_modules", ())
    entries = {part: index[part] for part in wanted if _is_entry(index.get(part))}
    if not entries:
        raise UnsupportedHost(
            f"{kind.__name__} in {folder} has no component that diffusers loads LoRAs into",
            fix=f"It would be one of {', '.join(wanted)}." if wanted else "",
        )
    return as_pipeline(
        kind.__name__,
        {part: _component(folder / part, entry[1]) for part, entry in entries.items()},
    )


def _is_entry(entry: object) -> bool:
    """Tells whether an entry of the index says what a component is: (library, class)."""
    return isinstance(entry, list) and len(entry) == 2 and all(isinstance(x, str) for x in entry)


def _component(folder: Path, name: object) -> nn.Module:
    kind = _class_named(name)
    config = read_json(folder / CONFIG, DEFAULT_LIMITS)
    try:
        configs = getattr(kind, "config_class", None)
        with torch.device("meta"):
            built: nn.Module = (
                kind(configs.from_dict(config)) if configs else kind.from_config(config)
            )
    except Exception as error:  # a config may hold anything, and its class may raise anything
        raise UnsupportedHost(
            f"{folder / CONFIG} makes no {kind.__name__}: {_first_line(error)}"
        ) from None
    return built


def laid_out_model(source: str, *, revision: str | None = None) -> Any:
    """Lays out a model of transformers from its config: shapes, no weights, no code.

    Args:
        source: Folder with `config.json`, that file, or a repository id.
        revision: Branch, tag or commit of a repository.

    Raises:
        AdapterNotFound: There is no usable config.
        UnsupportedHost: It names a class that transformers lacks, or makes no model.
    """
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(
            source, revision=revision, trust_remote_code=False
        )
    except Exception as error:  # a config may hold anything, and its class may raise anything
        raise AdapterNotFound(
            f"no usable model config at {source!r}: {_first_line(error)}",
            fix="Give a folder with config.json, that file, or a repository id.",
        ) from None
    named = next(iter(config.architectures or ()), None)
    kind = getattr(transformers, str(named), None)
    if named and not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise UnsupportedHost(
            f"{source!r} names the class {named!r}, which transformers {transformers.__version__} "
            "does not have",
            fix="Code from a repository is not run here; load the model and use plan_lora.",
        )
    try:
        with torch.device("meta"):
            if kind is not None:
                return kind(config)
            auto: Any = transformers.AutoModelForCausalLM
            return auto.from_config(config)
    except Exception as error:
        raise UnsupportedHost(f"{source!r} makes no model: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
