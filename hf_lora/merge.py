"""Merging adapters into the weights, and taking them out again to the last bit."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, TypeVar

import torch
from peft import PeftModel
from torch import nn

from hf_lora.components import check_known
from hf_lora.errors import InvalidOption, MergeError, UnsupportedHost, listing
from hf_lora.hosts import active_names, adapter_names, check_has_weights, model_of, parts_of
from hf_lora.inject import activate, check_reached, mark_loaded
from hf_lora.joined import passed_by
from hf_lora.layers.checks import check_heads, check_mergeable, names_in
from hf_lora.layers.fold import (
    Undo,
    drop_copies,
    fold,
    is_merged,
    layers_of,
    originals,
    places_of,
    put,
    put_back,
    undos_of,
)
from hf_lora.layers.plain import untie, unwrap
from hf_lora.layers.rounding import MergeReport, add_figures, report_of
from hf_lora.layers.sharing import Sharing
from hf_lora.layers.strength import sums_elsewise
from hf_lora.merged import check_unmerged, is_ours, way_back
from hf_lora.offload import with_weights
from hf_lora.overrides import unguard, unguard_host
from hf_lora.record import (
    Flags,
    drop_record,
    enabled,
    flags_of,
    keep_record,
    record_of,
    restore_flags,
    transaction,
)

__all__ = ["bake", "check_unmerged", "merge_again", "merge_lora", "merge_report", "unmerge_lora"]

H = TypeVar("H")
Layers = list[tuple[str, Any]]

log = logging.getLogger(__name__)

_LOST = 0.1  # the share of an update's norm above which its rounding is worth a warning


@with_weights
def merge_lora(
    host: H, names: str | Sequence[str] | None = None, *, keep: Literal["cpu"] | None = "cpu"
) -> H:
    """Adds the updates of adapters to the base weights, so that they cost nothing.

    The merged weight is W plus the sum of the adapters' updates, each taken at W and times its
    strength, made in float32 or float64 and rounded once. IA3, OFT, BOFT, HRA and MiSS "bat" do
    not add up: they follow one another as in their forward. A weight that is tied to another
    becomes one of its own until `unmerge_lora`; so does the bias of an adapter on a layer without.

    Args:
        host: A model, or a pipeline, all components of which are merged or none.
        names: The adapters to merge; they become the active ones. None: those active now.
        keep: `"cpu"` keeps a copy of every touched weight in host memory, outside `state_dict`,
            so that `unmerge_lora` restores it bit for bit. None keeps it only while merging, for
            the case that something fails, and cannot be undone.

    Returns:
        The same object. Bytes kept and what was rounded are logged at INFO level, at WARNING when
        over a tenth of the update is lost.

    Raises:
        AdapterNotFound: No adapter, or none of that name on any component.
        InvalidOption: Two of the adapters bring the same head; or inside `base_model`.
        MergeError: Already merged; switched off and not named; a weight is quantised, computed,
            shared as a module or not finite; or no weight does what the adapter does. The host is
            then as before, bit for bit.
        MetaHost: There are no weights.
    """
    if keep not in ("cpu", None):
        raise InvalidOption(f"keep={keep!r} is not 'cpu' or None", field="keep")
    wanted = _wanted(host, names)
    for component, part in parts_of(host).items():
        if wanted[component]:
            check_has_weights(model_of(part), "merged")
        check_unmerged(model_of(part), "merge again")
    _merge(host, wanted, keep=keep is not None)
    report = merge_report(host)
    log.log(logging.WARNING if report.lost > _LOST else logging.INFO, "%s", report)
    return host


def _wanted(host: object, names: str | Sequence[str] | None) -> dict[str, list[str]]:
    """Returns component -> the adapters to merge there, in order."""
    parts = {c: model_of(p) for c, p in parts_of(host).items()}
    if names is None:
        wanted = {c: list(active_names(model)) for c, model in parts.items()}
        off = [type(m).__name__ for c, m in parts.items() if wanted[c] and not enabled(m)]
        if off:
            raise MergeError(
                f"the adapters of {listing(off)} are switched off, so none is active",
                fix="Name those to merge, or switch them on: set_adapters(host, names).",
            )
    else:
        listed = list(dict.fromkeys(names_in(names)))
        if not listed:
            raise InvalidOption(
                "names is empty, so there is nothing to merge",
                fix="Leave it out for the active adapters.",
                field="names",
            )
        for name in listed:
            check_known(host, name)
        wanted = {c: [n for n in listed if n in adapter_names(m)] for c, m in parts.items()}
    if any(wanted.values()):
        return wanted
    known = [name for model in parts.values() for name in adapter_names(model)]
    if not known:
        check_known(host, "default")
    raise MergeError(
        f"no adapter of {type(host).__name__} is active, so there is nothing to merge",
        fix=f"Name one: merge_lora(host, {next(iter(known), 'default')!r}).",
    )


def _merge(host: object, wanted: Mapping[str, Sequence[str]], *, keep: bool) -> None:
    """Merges the named adapters of each component, all or nothing."""
    parts = {c: p for c, p in parts_of(host).items() if adapter_names(model_of(p))}
    shared = Sharing([model_of(p) for p in parts_of(host).values()])
    layers = {
        c: [(p, x) for p, x in layers_of(model_of(part)) if _here(x, wanted[c])]
        for c, part in parts.items()
    }
    for component, part in parts.items():
        check_heads(model_of(part), wanted[component])
        dead = passed_by(model_of(part))
        for path, layer in layers[component]:
            check_reached(path, dead)
            shared_base = shared.is_shared(layer.get_base_layer())
            check_mergeable(path, layer, wanted[component], shared=shared_base)
    shared.settle([layer for found in layers.values() for _, layer in found])
    done: list[Undo] = []
    with transaction(host):
        try:
            for component, part in parts.items():
                _merge_part(part, layers[component], wanted[component], shared, done, keep=keep)
        except BaseException:
            for undo in reversed(done):
                undo.finish()
            raise
    if not keep:
        for undo in done:
            drop_copies(undo, undo.layer.merged_adapters)


@with_weights
def merge_again(host: object, merged: Mapping[str, Sequence[str]]) -> None:
    """Merges component -> names once more, after an unmerge; the weights come out the same."""
    _merge(host, merged, keep=True)


def _here(layer: Any, names: Sequence[str]) -> list[str]:
    present = layer._get_available_adapters()
    return [name for name in names if name in present]


def _merge_part(
    part: nn.Module,
    layers: Layers,
    names: Sequence[str],
    shared: Sharing,
    done: list[Undo],
    *,
    keep: bool,
) -> None:
    model = model_of(part)
    before = flags_of(model)
    as_active = set(names) == set(before.active)
    if as_active and any(sums_elsewise(layer, _here(layer, names)) for _, layer in layers):
        log.warning(
            "peft's forward of %s depends on their order; merged is the sum of their updates, as "
            "after set_adapters",
            ", ".join(names),
        )
    activate(part, tuple(names))
    undos: list[tuple[str, Undo]] = []
    replaced: dict[str, nn.Parameter | None] = {}
    figures = {"layers": float(len(layers)), "kept": 0.0}
    with torch.inference_mode(False), torch.no_grad():
        for path, layer in layers:
            folded = fold(path, layer, _here(layer, names))
            undo = put(layer, folded, shared.keys_of(layer), done)
            undos.append((path, undo))
            replaced |= {f"{path}.{key}": old for key, old in undo.replaced.items()}
            add_figures(figures, folded.figures)
            figures["kept"] += undo.size * keep
    record = replace(
        record_of(model),
        merged=originals(undos) if keep else None,
        merged_names=tuple(names),
        before_merge=before,
        merge_figures=figures,
        merge_replaced=replaced,
    )
    keep_record(model, record)


def merge_report(host: object) -> MergeReport:
    """Returns what the merge that is in the weights now kept and rounded.

    Raises:
        MergeError: `merge_lora` has merged nothing.
    """
    records = [record_of(model_of(part)) for part in parts_of(host).values()]
    total: dict[str, float] = {}
    for record in records:
        add_figures(total, record.merge_figures)
    if not total:
        raise MergeError(f"nothing is merged into {type(host).__name__}")
    return report_of(total, [name for record in records for name in record.merged_names])


@with_weights
def unmerge_lora(host: H) -> H:
    """Takes merged adapters out of the weights: every base tensor is as before, bit for bit.

    Weights that were tied are tied again, as the same parameter objects. So it is also when peft or
    diffusers have taken the adapters off meanwhile (`unload`, `merge_and_unload`,
    `unload_lora_weights`): the merged weights stay in the model until then.

    Returns:
        The same object, with the adapters active that were active before the merge.

    Raises:
        MergeError: Nothing is merged, no copy was kept, or a merged weight is gone.
        UnsupportedTarget: The merged weights are joined by `fuse_qkv_projections` meanwhile.
    """
    parts = [(part, model_of(part)) for part in parts_of(host).values()]
    merged = [(p, m) for p, m in parts if is_merged(m) or is_ours(m)]
    if not merged:
        raise MergeError(f"nothing is merged into {type(host).__name__}")
    for _, model in merged:
        if not is_ours(model):
            raise MergeError(
                f"what is merged into {type(model).__name__} was not merged by merge_lora",
                fix=way_back(model),
            )
    records = [record_of(model) for _, model in merged]
    if any(record.merged is None for record in records):
        raise MergeError(
            "no copy of the base weights was kept, so they cannot be restored exactly",
            fix="Reload the base model, or merge with keep='cpu' next time.",
        )
    for (_, model), record in zip(merged, records, strict=True):
        dead = passed_by(model)
        for key in record.merged or ():
            check_reached(key.rpartition(".")[0], dead)
    lost = [places_of(model, record_of(model)) for _, model in merged]
    for (part, model), record, places in zip(merged, records, lost, strict=True):
        # also when peft has unmerged by itself meanwhile
        for _, undo in undos_of(model):
            undo.finish()
        put_back(places, record)
        before: Flags = record.before_merge  # type: ignore[assignment]
        activate(part, before.active, enabled=before.enabled)
        restore_flags(model, before, modes=False)
        keep_record(
            model,
            replace(
                record,
                merged=None,
                merged_names=(),
                before_merge=None,
                merge_figures={},
                merge_replaced={},
            ),
        )
        if not adapter_names(model):
            drop_record(model)
    return host


@with_weights
def bake(host: H, *, names: str | Sequence[str] | None = None) -> H:
    """Makes a plain model of a host: adapters in the weights for good, and no trace of peft.

    `save_pretrained` then saves the whole model, and plain transformers or diffusers loads it.
    Heads trained whole are those of the merged adapters. Where the merge has untied a weight,
    `config.tie_word_embeddings` becomes False.

    Args:
        host: A model or pipeline; a `PeftModel` cannot be without its adapter.
        names: The adapters, see `merge_lora`; left out for a host that is merged.

    Returns:
        The same object.

    Raises:
        MergeError: As `merge_lora`, or an adapter brings a bias to layers whose class has none, so
            that a load would leave it out. The host is then as before.
        UnsupportedHost: The host is a `PeftModel`.
    """
    parts = {c: model_of(p) for c, p in parts_of(host).items()}
    if any(isinstance(part, PeftModel) for part in parts_of(host).values()):
        raise UnsupportedHost(
            "a PeftModel cannot be without an adapter",
            fix="Give it bare: bake(peft_model.get_base_model()).",
        )
    fresh = not any(record_of(model).before_merge for model in parts.values())
    if fresh:
        merge_lora(host, names)
    try:
        with transaction(host):
            for model in parts.values():
                _bake_one(model)
            unguard_host(host)
    except BaseException:
        if fresh:
            unmerge_lora(host)
        raise
    return host


def _bake_one(model: nn.Module) -> None:
    record = record_of(model)
    added = [name for name, old in record.merge_replaced.items() if old is None]
    if added:
        raise MergeError(
            f"{listing(added)} came with an adapter, and a load of "
            f"{type(model).__name__} would leave it out",
            fix="Keep the adapter in a file of its own.",
        )
    if any(_here(x, record.merged_names) and not x.merged for _, x in layers_of(model)):
        raise MergeError(
            f"peft has taken the merged adapters out of {type(model).__name__} meanwhile",
            fix="Call unmerge_lora(host), then bake it.",
        )
    undos = undos_of(model)
    unwrap(model)
    untie(model)
    for _, undo in undos:
        undo.leave()
    if hasattr(model, "peft_config"):
        del model.peft_config
    mark_loaded(model, False)
    unguard(model)
    if record.bare is not None:
        restore_flags(model, record.bare, modes=True)
    drop_record(model)
