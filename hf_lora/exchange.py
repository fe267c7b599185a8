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
from hf_lora.architectures import ARCHITECTURES, architecture, names_of, names_of_host
from hf_lora.errors import AdapterMismatch, BadAdapterFile, InvalidOption, LoraError, listing
from hf_lora.fetch import local_files
from hf_lora.formats import FOREIGN, NamesOf, read_adapter, write_adapter
from hf_lora.formats.foreign import Finder, fits
from hf_lora.formats.grammar import Group
from hf_lora.formats.kinds.loose import suits
from hf_lora.formats.lookup import Host
from hf_lora.hosts import class_name, model_of
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
        path: The folder, made when missing; for all layouts but peft also a `.safetensors` file.
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
        InvalidOption: The layout is unknown, or `path` is a file or the name of one that the layout
            does not write.
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
        parts = adapter.components.items()
        if all(at in known and has_place(part, known[at].layers) for at, part in parts):
            return known
    raise AdapterMismatch(
        f"the adapter fits none of the pipelines that are known by name ({listing(ARCHITECTURES)})",
        fix="Give the pipeline it is for: save_adapter(adapter, path, layout=..., host=pipe).",
    )


def has_place(component: Component, layers: Mapping[str, tuple[int, ...]]) -> bool:
    """Tells whether all targets are among layers (path -> shape), in their shapes."""
    return all(path in layers and suits(f, layers[path]) for path, f in component.targets.items())


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
    """Returns an adapter of one model as one of the pipeline around it, and the other way round.

    A component of the file goes where all of its targets have their layers, in their shapes, if
    that is one place only. Any other adapter comes back as it is.

    Args:
        adapter: The adapter.
        parts: The components of the host it shall go on.
    """
    held = adapter.components
    if (MODEL in held) == (MODEL in parts):
        return adapter
    if MODEL in parts:
        fit = _best({n: _share(c, parts[MODEL]) for n, c in held.items()})
        return with_name(adapter, fit[0], MODEL) if len(fit) == 1 else adapter
    fit = _homes(adapter, parts) if len(held) == 1 else []
    if len(fit) != 1:
        return adapter
    here, _ = respelled(dict(bare_modules(model_of(parts[fit[0]]))), held[MODEL])
    return with_name(replace(adapter, components={MODEL: here}), MODEL, fit[0])


def _homes(adapter: Adapter, parts: Mapping[str, nn.Module]) -> list[str]:
    """Returns the components of a pipeline that an adapter of one model fits.

    Where several do, it is that of the class which the file names, if it names one.
    """
    shares = {name: _share(adapter.components[MODEL], part) for name, part in parts.items()}
    fit = [name for name, share in shares.items() if share == 1]
    mapping = adapter.components[MODEL].config.get("auto_mapping")
    theirs = mapping.get("base_model_class") if isinstance(mapping, Mapping) else None
    kind = adapter.manifest.host or theirs
    named = [name for name in fit if class_name(model_of(parts[name])) == kind]
    return named if len(named) == 1 else fit


def _best(shares: Mapping[str, float]) -> list[str]:
    """Returns what fits whole; where nothing does, what fits for the most part."""
    whole = [name for name, share in shares.items() if share == 1]
    return whole or [name for name, share in shares.items() if share > 0.5]


def _share(component: Component, part: nn.Module) -> float:
    """Returns how many of a component's targets have a layer of a model, in its shape, of one."""
    model = model_of(part)
    modules = dict(bare_modules(model))
    here, _ = respelled(modules, component)
    layers = names_of(model).layers
    at = [(path.partition(".base_layer")[0], factors) for path, factors in here.targets.items()]
    fit = [p in modules and (p not in layers or suits(factors, layers[p])) for p, factors in at]
    return sum(fit) / len(fit) if fit else 0


def with_name(adapter: Adapter, old: str, new: str) -> Adapter:
    """Returns an adapter with another name of a component, and what is known of that one alone."""
    before, after = ("" if name == MODEL else f"{name}." for name in (old, new))
    known = adapter.manifest
    held = known.base.fingerprints.get(old)
    base = replace(known.base, fingerprints={} if held is None else {new: held})
    fused = {
        f"{after}{path.removeprefix(before)}": parts
        for path, parts in known.fused.items()
        if path.startswith(before)
    }
    parts = {new if name == old else name: part for name, part in adapter.components.items()}
    return replace(adapter, components=parts, manifest=replace(known, base=base, fused=fused))


def check_components(
    host: object, parts: Mapping[str, nn.Module], adapter: Adapter, *, strict: bool
) -> tuple[str, ...]:
    """Returns the components of an adapter, after `placed`, that the host lacks.

    Raises:
        AdapterMismatch: There are some, and `strict`; or none is left.
    """
    if not adapter.components:
        raise BadAdapterFile("the adapter has no components, so there is nothing to load")
    missing = tuple(n for n in adapter.components if n not in parts)
    if not missing or (not strict and len(missing) < len(adapter.components)):
        return missing
    if MODEL in parts:
        raise _of_a_pipeline(parts[MODEL], adapter, missing)
    if MODEL in missing:
        raise _of_one_model(host, parts, adapter)
    raise AdapterMismatch(
        f"the adapter is for {listing(missing)} as well, and {type(host).__name__} has "
        f"{listing(parts)}",
        fix="Load the pipeline with them, or pass strict=False to leave them out.",
    )


def _of_a_pipeline(part: nn.Module, adapter: Adapter, missing: tuple[str, ...]) -> AdapterMismatch:
    kind = class_name(model_of(part))
    if MODEL in adapter.components:
        return AdapterMismatch(
            f"the adapter is for a pipeline with {listing(missing)} as well, and the host is a "
            f"single {kind}",
            fix="Load it into the pipeline, or pass strict=False to leave them out.",
        )
    fit = _best({name: _share(held, part) for name, held in adapter.components.items()})
    why = f"of which {' and '.join(fit)} fit alike" if fit else "none of which fits"
    return AdapterMismatch(
        f"the adapter is for a pipeline with {listing(missing)}, {why}, and the host is a single "
        f"{kind}",
        fix="Load it into the pipeline.",
    )


def _of_one_model(
    host: object, parts: Mapping[str, nn.Module], adapter: Adapter
) -> AdapterMismatch:
    fit = _homes(adapter, parts)
    fact = f"the adapter is for a single model, and {type(host).__name__} has {listing(parts)}"
    if fit:
        return AdapterMismatch(
            f"{fact}, of which {' and '.join(fit)} fit it alike",
            fix="Load it into the one it was made on: "
            f"{' or '.join(f'load_lora(pipe.{name}, ...)' for name in fit)}.",
        )
    shares = {name: _share(adapter.components[MODEL], part) for name, part in parts.items()}
    nearest = max(shares, key=lambda name: shares[name])
    return AdapterMismatch(
        f"{fact}, none of which has all of its targets in their shapes",
        fix="Load it into the model it was made on. What is missing of the nearest, "
        f"load_lora(pipe.{nearest}, ...) says.",
    )
