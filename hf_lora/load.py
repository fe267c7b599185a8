"""Adapter -> host: strict, all or nothing, and never silent about what was applied."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.lora import LoraLayer
from torch import nn

from hf_lora.adapter import MODEL, Adapter, Component, check_component
from hf_lora.base import fingerprint_of_model, id_of, unreadable
from hf_lora.errors import AdapterMismatch, BadAdapterFile, InvalidOption, LoraError, listing, shown
from hf_lora.exchange import check_components, finder, placed
from hf_lora.families import family_of, role_in
from hf_lora.fetch import local_files
from hf_lora.fit import (
    drop_base_copies,
    fitted_config,
    match_targets,
    notes_on,
    split_heads,
)
from hf_lora.formats import checked_limits, read_adapter
from hf_lora.formats.container import DAMAGED
from hf_lora.formats.header import denoiser_said
from hf_lora.hosts import (
    check_has_weights,
    check_new_name,
    class_name,
    model_of,
    of_diffusers,
    parts_of,
)
from hf_lora.inject import check_targets, inject, stand_aside
from hf_lora.layers.parts import cut_into_parts
from hf_lora.limits import LoadLimits
from hf_lora.manifest import Manifest
from hf_lora.merge import check_unmerged
from hf_lora.offload import with_weights
from hf_lora.overrides import guard_host
from hf_lora.paths import canonical
from hf_lora.record import Grads, Snapshot, all_or_nothing, keep_record, record_of
from hf_lora.report import LoadReport
from hf_lora.siblings import Siblings, siblings_of
from hf_lora.slots import fill
from hf_lora.spelling import respelled
from hf_lora.switch import strengths
from hf_lora.targets import UNKNOWN, survey
from hf_lora.verdict import Verdict, compare
from hf_lora.walks import bare_modules, nested, tuner_modules


@dataclass(frozen=True)
class _Fitted:
    """One component of a file, checked against its place on the host but not attached yet."""

    part: nn.Module
    model: nn.Module
    alike: Siblings | None
    cuts: Mapping[str, Sequence[str]]
    component: Component
    config: PeftConfig
    verdict: Verdict | str
    notes: tuple[str, ...]
    skipped: tuple[str, ...]


@with_weights
def load_lora(
    host: object,
    source: str | os.PathLike[str] | Adapter,
    *,
    name: str | None = None,
    file: str | None = None,
    scale: float = 1.0,
    revision: str | None = None,
    token: str | None = None,
    trainable: bool = False,
    strict: bool = True,
    extra_modules: bool = False,
    limits: LoadLimits | None = None,
) -> LoadReport:
    """Loads an adapter onto a model or pipeline, in place, and makes it the active one.

    Every tensor of the file must have its place on the host and every target its tensors, in
    matching shapes; the base must be the one the adapter was made on, where the file can tell. Only
    tensors the load created are written. When anything fails the host is as it was, bit for bit.
    Training mode and requires_grad of the base stay as they are; adapters that were active before
    become inactive, and their factors frozen.

    Args:
        host: A model, as for `attach_lora`, or a diffusers pipeline.
        source: A folder or file that `open_adapter` reads, a Hub repository id, or an `Adapter`.
        name: Name of the adapter on the host; `"default"` when left out.
        file: Which folder or file below `source` is the adapter.
        scale: Multiplies the adapter's own scaling at run time.
        revision: Branch, tag or commit of a repository.
        token: Access token for a repository; the logged-in one when left out.
        trainable: Go on training: the factors require gradients and the base is frozen.
        strict: With False, what the host lacks is left out, and another base than the one the
            adapter was made on is accepted; the report lists both.
        extra_modules: Allow modules in the file that replace pretrained ones. Task heads of a
            classification class need no permission.
        limits: Bounds on what is read from files.

    Returns:
        What was applied.

    Raises:
        AdapterNotFound: There is no adapter at `source`.
        AdapterExists: The name is in use.
        BadAdapterFile: The file or config is broken, unsafe or not understood.
        AdapterMismatch: The adapter is for another architecture, size or base, or tensors are
            missing.
        LoraError: Another of its subclasses.
    """
    name = "default" if name is None else name
    parts = _ready_for(host, name, scale)
    limits = checked_limits(limits)
    own = not isinstance(source, Adapter)  # nobody else holds what is read here, and it is checked
    if isinstance(source, Adapter):
        adapter = source
    else:
        found = local_files(source, file=file, revision=revision, token=token)
        names_of = finder(host)
        adapter = read_adapter(found, limits=limits, names_of=names_of, strict=strict)
    try:
        for component in () if own else adapter.components.values():
            _check_values(component)
            check_component(component, limits)
        adapter = placed(adapter, parts)
        missing = check_components(host, parts, adapter, strict=strict)
        fitted = {
            n: _fit(parts[n], component, adapter.manifest, n, strict, extra_modules)
            for n, component in adapter.components.items()
            if n not in missing
        }

        def put_on(before: Mapping[str, Snapshot]) -> LoadReport:
            dtypes: set[str] = set()
            for n, each in fitted.items():
                _put_on(each, name, before[n].grads, trainable=trainable)
                dtypes |= fill(each.model, each.component, name, own=own)
                _check_scaling(each.model, each.component, name)
                _keep_manifest(each.model, name, adapter.manifest)
                for layer, weight in strengths(each.model, name, scale) if scale != 1.0 else ():
                    layer.set_scale(name, weight)
            for n, part in parts.items():
                if n not in fitted:
                    stand_aside(part, name)
            guard_host(host, loaded=name)
            return _report(host, adapter, fitted, missing, name, scale, trainable, dtypes)

        return all_or_nothing(host, put_on)
    except LoraError as error:
        theirs = isinstance(error, BadAdapterFile | AdapterMismatch)  # not where a host cannot
        raise error.within(file=adapter.source or "adapter", fix=DAMAGED * theirs) from None


def _ready_for(host: object, name: str, scale: object) -> dict[str, nn.Module]:
    """Returns the components of a host that can take an adapter of this name."""
    parts = parts_of(host)
    for part in parts.values():
        check_new_name(model_of(part), name)
        check_has_weights(model_of(part), "loaded into", factors=False)
        check_unmerged(model_of(part), "load another adapter")
    number = isinstance(scale, int | float) and not isinstance(scale, bool)
    # the bound first: a whole number may be too large for a float
    if not number or not abs(scale) < 1e300 or not math.isfinite(scale):  # type: ignore[arg-type]
        raise InvalidOption(f"scale={shown(scale)} is not a finite number", field="scale")
    if torch.is_inference_mode_enabled():
        raise InvalidOption(
            "load_lora was called inside torch.inference_mode(), and what is made there fails "
            "outside of it",
            fix="Load outside; run the model inside.",
        )
    return parts


def _check_values(component: Component) -> None:
    if any(tensor.is_meta for _, tensor in component.tensors()):
        raise BadAdapterFile(
            "the adapter was read from its header only and has no values to load",
            fix="Open it with open_adapter, or give its file.",
        )


def _fit(
    part: nn.Module,
    component: Component,
    manifest: Manifest,
    place: str,
    strict: bool,
    extra_modules: bool,
) -> _Fitted:
    """Checks one component against its model; changes nothing."""
    model = model_of(part)
    modules = dict(bare_modules(model))
    component, renamed = respelled(modules, component)
    component = drop_base_copies(modules, component)
    component, skipped = match_targets(modules, component, strict=strict)
    component, left_out = split_heads(
        modules, component, extra_modules=extra_modules, strict=strict
    )
    verdict = _verdict(model, manifest, place, strict=strict)
    notes = [f"{renamed} modules were spelt as in other versions of the host"] if renamed else []
    return _Fitted(
        part=part,
        model=model,
        alike=siblings_of(modules, component),
        cuts=_cuts(manifest, place, component),
        component=component,
        config=fitted_config(modules, component),
        verdict=verdict,
        notes=(*notes, *notes_on(modules, component)),
        skipped=tuple(dict.fromkeys((*skipped, *left_out))),  # a target may have its own copy
    )


def _cuts(manifest: Manifest, place: str, component: Component) -> dict[str, Sequence[str]]:
    """Returns target -> parts, as the manifest names them for one component."""
    front = "" if place == MODEL else f"{place}."
    # by canonical path: the component is in the host's spelling, the manifest in the file's
    named = {canonical(p.removeprefix(front)): parts for p, parts in manifest.fused.items()}
    found = {p: named.get(canonical(p)) for p in component.targets}
    return {p: parts for p, parts in found.items() if isinstance(parts, Sequence)}


def _cut(model: nn.Module, name: str, cuts: Mapping[str, Sequence[str]]) -> None:
    """Gives a LoRA that was trained on parts its blocks again, so that training goes on with them.

    Where the parts are not known here the whole factor is trained; it computes the same.
    """
    layers = {x.path: x for x in survey(model).layers if x.path in cuts} if cuts else {}
    for path, layer in layers.items():
        if layer.split is not None and set(cuts[path]) <= set(layer.order):
            rows = replace(layer, parts=tuple(cuts[path])).rows
            cut_into_parts(model.get_submodule(path), name, rows)


def _verdict(model: nn.Module, manifest: Manifest, place: str, *, strict: bool) -> Verdict | str:
    """Compares base and fingerprint; a string says why that cannot be done.

    Raises:
        AdapterMismatch: The base is another one, and `strict`.
    """
    stored = manifest.base.fingerprints.get(place)
    if stored is None:
        return "not verified: the file carries no fingerprint"
    reason = unreadable(model)
    if reason:
        return f"not verified: the host {reason}"
    verdict = compare(stored, fingerprint_of_model(model))
    if verdict.state == "mismatched" and strict:
        where = "" if place == MODEL else f" of {place}"
        raise AdapterMismatch(
            f"the adapter was made on another base: {len(verdict.differing)} of "
            f"{verdict.compared} weights{where} differ, for instance {verdict.differing[0]}",
            fix=f"Load {manifest.base.id or 'the base it was made on'}, or pass strict=False to "
            "use it on this one.",
            field="base",
        )
    return verdict


def _put_on(fitted: _Fitted, name: str, grads: Grads, *, trainable: bool) -> None:
    """Attaches one component, its factors on the meta device; inside `all_or_nothing`."""
    model, config, alike = fitted.model, fitted.config, fitted.alike
    config.inference_mode = not trainable
    inject(fitted.part, config, name, empty=True, freeze=trainable, alike=alike, grads=grads)
    check_targets(model, name, {_outer(p) for p in fitted.component.targets})
    if trainable:
        _cut(model, name, fitted.cuts)


def _keep_manifest(model: nn.Module, name: str, manifest: Manifest) -> None:
    record = record_of(model)
    record.manifests[name] = manifest
    keep_record(model, record)


def _outer(path: str) -> str:
    """Peft nests several parameters of one module as path.base_layer; the module is the target."""
    while path.endswith(".base_layer"):
        path = path.removesuffix(".base_layer")
    return path


def _check_scaling(model: nn.Module, component: Component, name: str) -> None:
    """Checks that peft read rank and alpha as we did: the end of lost alphas."""
    if component.kind != "LORA":
        return
    for path, outer in tuner_modules(model):
        where = path
        for layer in nested(outer):
            if isinstance(layer, LoraLayer) and name in layer.scaling:
                wanted = component.scaling(where)
                if layer.scaling[name] != wanted and not component.config.get("target_parameters"):
                    raise AdapterMismatch(
                        f"scaling at {path} is {wanted} by the file and {layer.scaling[name]} "
                        "by peft",
                        field="alpha_pattern",
                    )
            where += ".base_layer"


def _report(
    host: Any,
    adapter: Adapter,
    fitted: Mapping[str, _Fitted],
    missing: tuple[str, ...],
    name: str,
    scale: float,
    trainable: bool,
    dtypes: set[str],
) -> LoadReport:
    def at(part: str, path: str) -> str:
        return path if part == MODEL else f"{part}.{path}"

    components = {}
    for part, each in fitted.items():
        family = family_of(each.model)
        roles = (role_in(_outer(p), family) or UNKNOWN for p in each.component.targets)
        components[part] = dict(Counter(roles))
    model = host if MODEL not in fitted else fitted[MODEL].model
    verified, base = _base_in_words(fitted)
    return LoadReport(
        name=name,
        source=adapter.source,
        host=type(model).__name__,
        components=components,
        parameters=sum(t.numel() for f in fitted.values() for _, t in f.component.tensors()),
        heads=tuple(at(n, path) for n, f in fitted.items() for path in f.component.modules),
        skipped=(
            *adapter.left_out,
            *missing,
            *(at(n, path) for n, f in fitted.items() for path in f.skipped),
        ),
        dtype=", ".join(sorted(dtypes)),
        scale=float(scale),
        trainable=trainable,
        digest=adapter.digest,
        verified=verified,
        base=base,
        repairs=adapter.repairs,
        notes=(*_other_base(host, adapter, fitted), *(x for f in fitted.values() for x in f.notes)),
    )


def _base_in_words(fitted: Mapping[str, _Fitted]) -> tuple[bool, str]:
    """Returns whether every component's base is verified, and what to say."""
    verdicts = {n: f.verdict for n, f in fitted.items()}
    said = {n: v.text if isinstance(v, Verdict) else v for n, v in verdicts.items()}
    good = ("matched", "rounded")
    verified = all(isinstance(v, Verdict) and v.state in good for v in verdicts.values())
    if len(set(said.values())) == 1:
        return verified, next(iter(said.values()))
    return verified, "; ".join(f"{n} {text}" for n, text in said.items())


def _other_base(host: Any, adapter: Adapter, fitted: Mapping[str, _Fitted]) -> list[str]:
    made_for = adapter.manifest.base.id or next(
        (f.component.config.get("base_model_name_or_path") for f in fitted.values()), None
    )
    here = id_of(host, {n: f.model for n, f in fitted.items()})
    notes = []
    if made_for and here and made_for != here:
        notes.append(f"the file names the base {shown(made_for)}, the host is {shown(here)}")
    said, classes = denoiser_said(adapter.manifest.foreign)
    kinds = [class_name(f.model) for f in fitted.values() if of_diffusers(f.model)]
    if classes and kinds and not {*kinds} & {*classes}:
        notes.append(
            f"the file says that it is for {shown(said)}, which is {classes[0]}, and the host has "
            f"{listing(kinds)}"
        )
    return notes
