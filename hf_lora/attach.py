"""Attach and detach: one call puts a LoRA on a host in place, one takes it off without a trace."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch
from peft import PeftConfig, PeftModel
from peft.functional import cast_adapter_dtype
from torch import nn

from hf_lora.adapter import MODEL
from hf_lora.components import check_known
from hf_lora.errors import InvalidOption, MetaHost, UnsupportedHost
from hf_lora.hosts import active_names, adapter_names, check_new_name, model_of, on_meta, parts_of
from hf_lora.inject import (
    activate,
    check_targets,
    come_back,
    inject,
    remove,
    stand_aside,
)
from hf_lora.layers.parts import cut_into_parts
from hf_lora.layers.quantised import let_pack
from hf_lora.merge import check_unmerged, merge_lora, unmerge_lora
from hf_lora.offload import is_onloaded, with_weights
from hf_lora.overrides import guard_host, unguard, unguard_host
from hf_lora.plan import LoraPlan, plan_lora
from hf_lora.record import Flags, Snapshot, all_or_nothing, drop_record, record_of, restore_flags
from hf_lora.select import TargetSpec
from hf_lora.siblings import siblings_by
from hf_lora.switch import as_peft_model, base_model, set_adapters
from hf_lora.walks import bare_modules

__all__ = [
    "as_peft_model",
    "attach_lora",
    "base_model",
    "detach_lora",
    "merge_lora",
    "set_adapters",
    "unmerge_lora",
]

H = TypeVar("H")


@with_weights
def attach_lora(
    host: H,
    *,
    rank: int = 16,
    alpha: float | None = None,
    targets: TargetSpec = "default",
    dropout: float = 0.0,
    components: Sequence[str] | None = None,
    train_also: Sequence[str] | None = None,
    name: str = "default",
    config: PeftConfig | Mapping[str, PeftConfig] | None = None,
) -> H:
    """Puts a new LoRA on a model or pipeline, in place, and makes it the active, trainable adapter.

    The base is frozen, every other adapter becomes inactive, and the host computes the same as
    before until it is trained (B starts at zero). Factors of half-precision models are float32,
    which is what stable training needs. `Trainer`, `generate` and `save_pretrained` work as ever.

    On a pipeline the base of the components that get the adapter is frozen, those of others, such
    as the VAE, stay as they are. `pipe.save_pretrained` then saves the base, and `save_lora` the
    adapter.

    Args:
        host: A transformers model, a `PeftModel` (its inner model is adapted), any
            `torch.nn.Module` with linears in repeated blocks, or a diffusers pipeline.
        rank: Rank of A: (rank, in) and B: (out, rank); capped at min(in, out) for each target.
        alpha: The update is scaled by alpha/rank; when left out 32, and the rank for denoisers and
            pipelines.
        targets: A preset (`default`, `all-linear`, `attention`, `qv`, `mlp`, `cross-attention`,
            `experts`), roles, or module names. On a pipeline a mapping gives them by component.
        dropout: Dropout probability on the input of A.
        components: Which components of a pipeline; its denoisers when left out. A model has one,
            leave it out.
        train_also: Modules trained whole and saved with the adapter. Left out: the task head of a
            classification class; `()`: none. A pipeline has none.
        name: Name of the adapter.
        config: A ready peft tuner config instead of rank, alpha and dropout; its empty
            `target_modules` is filled from the family map. On a pipeline it is taken for every
            component, and a mapping gives one for each.

    Returns:
        The same object.

    Raises:
        LoraError: One of its subclasses, as `plan_lora` raises, or AdapterExists. The host is then
            as it was, bit for bit.
    """
    parts = parts_of(host)
    for part in parts.values():
        check_new_name(model_of(part), name)
        check_unmerged(model_of(part), "attach another adapter")
    plan = plan_lora(
        host,
        rank=rank,
        alpha=alpha,
        targets=targets,
        dropout=dropout,
        components=components,
        train_also=train_also,
        name=name,
        config=config,
    )
    if torch.is_inference_mode_enabled():
        raise InvalidOption(
            "attach_lora was called inside torch.inference_mode(), where no trainable parameter "
            "can be made",
            fix="Call it outside.",
        )
    all_or_nothing(host, lambda before: _put_on_all(host, parts, plan, before))
    return host


def _put_on_all(
    host: object,
    parts: Mapping[str, nn.Module],
    plan: LoraPlan,
    before: Mapping[str, Snapshot],
) -> None:
    plans = plan.components or {MODEL: plan}
    for component, part in parts.items():
        if component in plans:
            _put_on(part, plans[component], before[component])
        else:
            stand_aside(part, plan.name)
    guard_host(host)


def _put_on(part: nn.Module, plan: LoraPlan, before: Snapshot) -> None:
    """Attaches to one component what was planned for it; called inside `all_or_nothing`."""
    model, name = model_of(part), plan.name
    paths = [t.path for t in plan.targets]
    modules = dict(bare_modules(model))
    alike = None if plan.quantised else siblings_by(modules, plan.config, paths)
    inject(part, plan.config, name, alike=alike, grads=before.grads)
    check_targets(model, name, {t.module for t in plan.targets})
    for target in plan.targets:
        if target.rows:
            cut_into_parts(model.get_submodule(target.path), name, target.rows)
    # factors made under torch.device("meta") beside real weights: an error
    hollow = on_meta(model)
    if alike is None:
        # as peft.get_peft_model does: half-precision factors lose small updates
        cast_adapter_dtype(model, adapter_name=name, autocast_adapter_dtype=True)
    untrainable = hollow or is_onloaded(model)
    if untrainable and refuse_training not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(refuse_training)


def refuse_training(module: nn.Module, _: object) -> None:
    """Forward pre-hook of hosts attached on meta or offloaded: training there is an error."""
    if module.training and torch.is_grad_enabled() and on_meta(module):
        raise MetaHost(
            f"{type(module).__name__} lies on the meta device and has no weights, so it "
            "cannot be trained",
            fix="Load it with from_pretrained, then attach.",
        )


def _drop_hooks(model: nn.Module) -> None:
    hooks = model._forward_pre_hooks
    for key in [key for key, hook in hooks.items() if hook is refuse_training]:
        del hooks[key]


@with_weights
def detach_lora(host: H, name: str | None = None) -> H:
    """Takes one adapter, or all, off a host and restores what attaching changed.

    Parameters, requires_grad, training mode, flags and outputs are then as before attach, bit for
    bit. With other adapters left, the ones active before this one are active again. A host merged
    with `keep="cpu"` is unmerged first.

    Args:
        host: The host.
        name: The adapter to take off; None for all.

    Returns:
        The same object.

    Raises:
        AdapterNotFound: There is no adapter, or none of that name.
        MergeError: The adapter is merged and no copy of the weights was kept.
        UnsupportedHost: The host is a `PeftModel` that would be left without an adapter.
    """
    parts = parts_of(host)
    there = list(dict.fromkeys(n for p in parts.values() for n in adapter_names(model_of(p))))
    names = there if name is None else [name]
    for known in names or ["default"]:
        check_known(host, known)
    for part in parts.values():
        if isinstance(part, PeftModel) and set(adapter_names(model_of(part))) <= set(names):
            raise UnsupportedHost(
                "detaching every adapter would leave this PeftModel without one",
                fix="Use model = peft_model.get_base_model(); detach_lora(model).",
            )
    if any(record_of(model_of(part)).merged_names for part in parts.values()):
        unmerge_lora(host)
    for part in parts.values():
        check_unmerged(model_of(part), "detach")
    all_or_nothing(host, lambda _: _take_off_all(host, parts, names))
    return host


def _take_off_all(host: object, parts: Mapping[str, nn.Module], names: Sequence[str]) -> None:
    for name in names:
        for part in parts.values():
            if name in adapter_names(model_of(part)):
                _detach_one(part, model_of(part), name)
            else:
                come_back(part, name)
    unguard_host(host)


def _detach_one(host: object, model: nn.Module, name: str) -> None:
    record = record_of(model)
    active = active_names(model)
    before = record.before.get(name)
    if not any(name in flags.active for flags in record.before.values()):
        record.before.pop(name, None)  # else it says what to go back to when those are taken off
    record.manifests.pop(name, None)
    remove(model, name)
    left = adapter_names(model)
    if not left:
        _drop_hooks(model)
        unguard(model)
        if record.bare is not None:
            restore_flags(model, record.bare, modes=True)
        let_pack(model, record.unpacked)
        drop_record(model)
        return
    if name not in active:
        return
    if before is None or not before.names:
        activate(host, tuple(left[:1]))
        return
    back = _left_of(before.active, record.before, left)
    if back == before.active:
        activate(host, back, enabled=before.enabled)
        restore_flags(model, before, modes=False)
        return
    # those active then were taken off, too: their factors' flags of that time are not these
    restore_flags(model, before, modes=False)
    activate(host, back or tuple(left[:1]), enabled=before.enabled)


def _left_of(
    active: Sequence[str], before: Mapping[str, Flags], left: Sequence[str]
) -> tuple[str, ...]:
    """Returns the adapters of `active` that are left; for one that is gone, those before it."""
    found: dict[str, None] = {}
    for name in active:
        if name in left:
            found[name] = None
        elif name in before:
            others = {n: flags for n, flags in before.items() if n != name}
            found |= dict.fromkeys(_left_of(before[name].active, others, left))
    return tuple(found)
