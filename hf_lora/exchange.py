"""source <-> Adapter: with the names of the host it is for, or of the public model it fits.

Files of other programs name modules in the words of the pipeline they were made for, so these words
must come from somewhere: a loaded host, the name of a known pipeline, or, when neither is given,
the first known pipeline in which every name and shape of the file has its place.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import nn

from hf_lora.adapter import MODEL, Adapter, Component
from hf_lora.architectures import ARCHITECTURES, architecture, names_of_host
from hf_lora.errors import AdapterMismatch, BadAdapterFile, InvalidOption, LoraError, listing
from hf_lora.fetch import local_files
from hf_lora.formats import FOREIGN, NamesOf, read_adapter, write_adapter
from hf_lora.formats.foreign import Finder, Host, fits
from hf_lora.formats.grammar import Group
from hf_lora.formats.names import Names
from hf_lora.hosts import model_of
from hf_lora.limits import LoadLimits
from hf_lora.spelling import respelled
from hf_lora.walks import bare_modules


def open_adapter(
    source: str | os.PathLike[str] | Adapter,
    *,
    host: object | None = None,
    limits: LoadLimits | None = None,
) -> Adapter:
    """Reads an adapter with all its tensors, checked.

    Args:
        source: A peft folder (`adapter_config.json` and `adapter_model.safetensors`), a folder with
            `pytorch_lora_weights.safetensors`, a safetensors file of any format that is read, a Hub
            repository id, or an `Adapter`, which comes back as it is.
        host: For files of kohya, LyCORIS, ComfyUI and their kin: the model or pipeline they are
            for, or the name of a public one (`"sdxl"`). Left out, the first one that fits.
        limits: Bounds on what is read.

    Returns:
        The adapter, tensors on the CPU in the file's dtypes.

    Raises:
        AdapterNotFound: There is nothing at `source`, or no adapter in it.
        BadAdapterFile: A file is truncated, over a limit, altered since it was made, not
            understood, or holds values that cannot be right.
        AdapterMismatch: Config and tensors contradict each other, or the file is for another host.
        InvalidOption: There is no public pipeline of that name.
    """
    if isinstance(source, Adapter):
        return source
    return read_adapter(local_files(source), limits=limits, names_of=finder(host))


def save_adapter(
    adapter: Adapter,
    path: str | os.PathLike[str],
    *,
    layout: str | None = None,
    host: object | None = None,
) -> Path:
    """Writes an adapter as files that other programs load.

    Files are written aside, synced and renamed together, so a broken write leaves the old adapter
    whole. Nothing is rounded: what a layout cannot hold exactly is an error.

    Args:
        adapter: What to write.
        path: The folder, made when missing; save for the peft layout also a `.safetensors` file.
        layout: `"peft"`: for plain peft and transformers; `"diffusers"`: for plain diffusers; both
            with the manifest and a fresh digest in the header. `"kohya"`: for sd-scripts and all
            that read its files, LyCORIS' kinds included; `"comfyui"`: the same for UNets, ComfyUI's
            own spelling for transformers; both with alpha beside the factors. Left out, peft for a
            model and diffusers for a pipeline.
        host: For kohya and comfyui: the pipeline it is for, or the name of a public one. Left out,
            the first that fits.

    Returns:
        The folder or file.

    Raises:
        InvalidOption: The layout is unknown or `path` is a file.
        BadAdapterFile: The adapter could not be read back, or holds what this layout cannot carry.
        AdapterMismatch: Its config and tensors contradict each other, or it fits no known pipeline.
        OSError: The files cannot be written; old ones are as they were.
    """
    names = None
    if isinstance(layout, str) and layout in FOREIGN and isinstance(adapter, Adapter):
        names = _names_for(adapter, host)
    return write_adapter(adapter, path, layout=layout, host=names)


def _names_for(adapter: Adapter, host: object | None) -> Host:
    """Returns the names of the host that an adapter is written for."""
    if host is not None:
        return finder(host)(())
    for name in ARCHITECTURES:
        known = architecture(name)
        if all(_fits(part, known.get(at)) for at, part in adapter.components.items()):
            return known
    raise AdapterMismatch(
        f"the adapter fits none of the pipelines that are known by name ({listing(ARCHITECTURES)})",
        fix="Give the pipeline it is for: save_adapter(adapter, path, layout=..., host=pipe).",
    )


def _fits(component: Component, names: Names | None) -> bool:
    """Tells whether a component's targets are layers of those names, in their shapes."""
    if names is None:
        return False
    for path, factors in component.targets.items():
        shape, a, b = names.layers.get(path), factors.get("lora_A"), factors.get("lora_B")
        if shape is None or (a is not None and a.shape[1] != shape[1]):
            return False
        if b is not None and b.shape[0] != shape[0]:
            return False
    return True


def finder(host: object | None) -> NamesOf:
    """Returns how the names for a foreign file are found: those of the host, or of one that fits.

    Raises:
        InvalidOption: `host` names no public pipeline.
    """
    if host is None:
        return guessed
    if not isinstance(host, str):
        return Finder(lambda _: names_of_host(host), fitting)
    if host not in ARCHITECTURES:
        raise InvalidOption(
            f"no known pipeline {host!r}", fix=f"Known: {', '.join(ARCHITECTURES)}.", field="host"
        )
    return Finder(lambda _: architecture(host), fitting)


def guessed(groups: Sequence[Group]) -> Host:
    """Returns the names of the first known pipeline in which a file has its place.

    Raises:
        AdapterMismatch: There is none.
    """
    damaged = None
    for name in ARCHITECTURES:
        try:
            if fits(groups, architecture(name)):
                return architecture(name)
        except AdapterMismatch:
            continue
        except BadAdapterFile:  # its names have their places there, and reading says what is wrong
            damaged = damaged or name
    if damaged is not None:
        return architecture(damaged)
    group = groups[0]
    name = next(iter(group.layers))
    raise AdapterMismatch(
        f"the file fits none of the pipelines that are known by name ({listing(ARCHITECTURES)}); "
        f"it names, for instance, {group.start.text}{name}",
        fix="Give the pipeline it was made for: open_adapter(source, host=pipe).",
    )


def fitting(groups: Sequence[Group]) -> Iterator[str]:
    """Yields the known pipelines in which every module of a file has its place, in their order."""
    for name in ARCHITECTURES:
        try:
            if fits(groups, architecture(name)):
                yield name
        except LoraError:
            continue


def placed(adapter: Adapter, parts: Mapping[str, nn.Module]) -> Adapter:
    """Returns an adapter of one model, made on a component, as one of the pipeline around it.

    The component is the only one of the pipeline that has all of the targets. Any other adapter
    comes back as it is.

    Args:
        adapter: The adapter.
        parts: The components of the host it shall go on.
    """
    component = adapter.components.get(MODEL)
    if component is None or len(adapter.components) > 1 or MODEL in parts:
        return adapter
    fit = []
    for name, part in parts.items():
        modules = dict(bare_modules(model_of(part)))
        here, _ = respelled(modules, component)
        if here.targets and all(p.partition(".base_layer")[0] in modules for p in here.targets):
            fit.append((name, here))
    if len(fit) != 1:
        return adapter
    name, here = fit[0]
    base = adapter.manifest.base
    prints = {name: base.fingerprints[MODEL]} if MODEL in base.fingerprints else {}
    manifest = replace(adapter.manifest, base=replace(base, fingerprints=prints))
    return replace(adapter, components={name: here}, manifest=manifest)
