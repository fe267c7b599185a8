"""Putting tuner layers onto a model and taking them off again, whole or not at all.

Works on one model with peft's own injection, so the result is what peft, transformers and
diffusers know. Whoever calls `inject` inside `all_or_nothing` gets back the model of before
when anything fails.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from peft import PeftConfig, PeftModel, inject_adapter_in_model
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from hf_lora.casting import check_stored
from hf_lora.configs import heads_of
from hf_lora.errors import UnsupportedTarget
from hf_lora.hosts import active_names, adapter_names, model_of, on_meta, peft_configs
from hf_lora.joined import SINGLE, passed_by
from hf_lora.layers.quantised import check_gradients, keep_unpacked, train_in_float32
from hf_lora.layers.strength import class_of, settle
from hf_lora.offload import check_called
from hf_lora.overrides import guard, keep_adjustable
from hf_lora.quantised import Stored, check_fits, check_trains, check_whole, stored_layers
from hf_lora.record import (
    Flags,
    Grads,
    Record,
    drop_record,
    flags_of,
    keep_record,
    record_of,
    restore_flags,
)
from hf_lora.siblings import Siblings
from hf_lora.walks import bare, bare_modules, holds, nested, tuner_modules

_FLAG = "_hf_peft_config_loaded"

# peft says these where we have already chosen; each is a fact of every second adapter or Conv1D.
_EXPECTED = (
    "Already found a `peft_config` attribute",
    "fan_in_fan_out is set to",
    "Adapter .* was active which is now deleted",
    "`is_gradient_checkpointing` is deprecated",  # peft 0.21 reads it on transformers 5.23
    "The following (rank|alpha)_pattern keys did not match",  # those of layers that are copied
)


@contextmanager
def quiet() -> Iterator[None]:
    """Silences what peft says about choices that were made on purpose."""
    with warnings.catch_warnings():
        for message in _EXPECTED:
            warnings.filterwarnings("ignore", message=message)
        yield


def inject(
    host: object,
    config: PeftConfig,
    name: str,
    *,
    empty: bool = False,
    freeze: bool = True,
    alike: Siblings | None = None,
    grads: Grads | None = None,
) -> None:
    """Adds one adapter and makes it the active one; the flags of before go on the record.

    Args:
        host: The host; call inside `all_or_nothing`.
        config: Complete config with literal target names.
        name: Adapter name, checked before.
        empty: Leave the factors on the meta device, to be assigned by a load.
        freeze: Freeze the base, as peft does; with False its flags stay as they are.
        alike: How the targets can be made apart from the model, see `siblings_of`; None where peft
            must see all of it, as of every quantised one.
        grads: Which parameters require gradients, where somebody has looked already.

    Raises:
        UnsupportedTarget: peft refuses a layer; its reason is passed on.
        InvalidOption: What the config asks for does not work on a quantised layer.
        UnsupportedHost: No gradient passes a quantised layer, and `freeze`.
    """
    model = model_of(host)
    grads = grads if grads is not None and grads.model is model else Grads.of(model)
    # later adapters change no mode
    flags = flags_of(model, modes=not adapter_names(model), grads=grads)
    record = record_of(model)
    if not flags.names:
        record = Record(bare=_bare_flags(flags, record.bare), unpacked=record.unpacked)
    record.manifests.pop(name, None)
    record.before[name] = flags
    check_stored(model, config)
    stored = stored_layers(model) if alike is None else {}
    if stored:
        _check_quantised(model, stored, config)
        record.unpacked += keep_unpacked(stored)
        if freeze:  # else nothing is trained
            check_trains(model)
            check_gradients(model, stored)
    keep_record(model, record)
    hollow = empty or on_meta(model)
    try:
        with quiet():
            if alike is not None:
                alike.put_on(config, name, hollow=hollow, empty=empty)
            else:
                inject_adapter_in_model(config, model, name, low_cpu_mem_usage=hollow)
    except Exception as error:  # peft raises many kinds; each means that it cannot
        raise UnsupportedTarget(f"peft cannot attach this: {error}") from error
    mark_loaded(model, True)
    guard(model)
    check_called(model, name)
    if stored:
        _widen_heads(model, name)
    if alike is None:
        _as_the_base(model)
    if freeze:
        _freeze_base(grads, flags.names, peft_configs(model))
    else:
        put_back((p, n in grads.needed) for n, p in grads.named.items())
    for parameter in grads.thawed.values():  # peft, too, trains the new adapter alone
        parameter.requires_grad_(False)
    activate(host, (name,), fresh=alike is not None)
    keep_adjustable(model, name)


def put_back(needs_grad: Iterable[tuple[nn.Parameter, bool]]) -> None:
    """Gives parameters the `requires_grad` that was taken down."""
    for parameter, needed in needs_grad:
        if parameter.requires_grad != needed:  # most are as they were, and the setter is slow
            parameter.requires_grad_(needed)


def _check_quantised(model: nn.Module, stored: Stored, config: PeftConfig) -> None:
    """Checks a config that names its targets as peft reads it; a plan has done so already."""
    targets = [path for path in stored if check_target_module_exists(config, path)]
    for entry in getattr(config, "target_parameters", None) or ():
        holder, _, key = entry.rpartition(".")
        targets += [f"{p}.{key}" for p in stored if p == holder or p.endswith(f".{holder}")]
    check_fits(stored, config, targets)
    modules = dict(bare_modules(model))
    check_whole(modules, getattr(config, "modules_to_save", None) or ())


def _widen_heads(model: nn.Module, name: str) -> None:
    """Makes an adapter's own task heads float32, as its factors are."""
    heads = tuple(f"{head}." for head in heads_of(model))
    for path, module in tuner_modules(model):
        held = getattr(module, "modules_to_save", {})
        if f"{path}.".startswith(heads) and name in held:
            train_in_float32(held[name])


def _as_the_base(model: nn.Module) -> None:
    """Gives tuner layers the mode of their base: peft makes them in training mode, always."""
    for _, module in tuner_modules(model):
        module.train(bare(module).training)


def _freeze_base(grads: Grads, names: Sequence[str], configs: Mapping[str, PeftConfig]) -> None:
    """Freezes the base with the first adapter that is to be trained.

    Beside a later one it stays as it is found, as peft leaves it: whoever thawed a part of it by
    hand meant to. Adapters that were only loaded have frozen nothing.
    """
    if all(configs[name].inference_mode for name in names):
        for name in grads.needed:
            grads.named[name].requires_grad_(False)


def _bare_flags(now: Flags, held: Flags | None) -> Flags:
    """Returns the flags of a model whose adapters, if it had any, were taken off by others.

    They leave the base frozen, as attaching made it, so where all of it is frozen the flags from
    before those adapters hold. Else the user has set them anew.
    """
    if held is None or any(now.requires_grad.values()):
        return now
    return replace(now, requires_grad={**now.requires_grad, **held.requires_grad})


def mark_loaded(model: nn.Module, loaded: bool) -> None:
    """Sets the flag by which transformers and diffusers know that a model has adapters."""
    if not hasattr(type(model), _FLAG):
        return
    if loaded:
        setattr(model, _FLAG, True)
    else:
        vars(model).pop(_FLAG, None)  # the class says False


def check_targets(model: nn.Module, name: str, expected: set[str]) -> None:
    """Checks that exactly the expected layers got the adapter: the end of silent no-ops."""
    actual = set()
    dead = passed_by(model)
    for path, outer in tuner_modules(model):
        layers = [m for m in nested(outer) if isinstance(m, BaseTunerLayer)]
        if any(holds(m, name) for m in layers):
            actual.add(path)
            check_reached(path, dead)
        kinds = {class_of(m) for m in layers} if len(layers) > 1 else ()
        if len(kinds) > 1 and path in expected:
            raise UnsupportedTarget(
                f"{path} already has an adapter of another method "
                f"({' and '.join(_methods(kinds))}), whose updates do not add up",
                fix="Choose other targets, or detach the other adapter first.",
            )
    if actual != expected:
        missed, extra = sorted(expected - actual), sorted(actual - expected)
        raise UnsupportedTarget(
            f"peft adapted other layers than planned: missed {missed[:3]}, added {extra[:3]}",
            fix="Name the targets in full: targets=[...].",
        )


def _methods(kinds: Iterable[type]) -> list[str]:
    """Returns the methods that classes of peft's layers belong to: `lora` or `loha`."""
    parts = {kind: kind.__module__.split(".") for kind in kinds}
    packages = {kind: p[2] if p[:2] == ["peft", "tuners"] else p[0] for kind, p in parts.items()}
    plain = len(set(packages.values())) == len(packages)
    return sorted(p if plain else f"{p} {kind.__name__}" for kind, p in packages.items())


def check_reached(path: str, dead: Mapping[str, str]) -> None:
    """Raises UnsupportedTarget for a layer that no forward calls, by what `passed_by` says."""
    if path in dead:
        raise UnsupportedTarget(
            f"an adapter on {path} would do nothing: {dead[path]}",
            fix="Call unfuse_qkv_projections() first, and fuse again after merging."
            if path.rpartition(".")[2] in SINGLE
            else "Call fuse_qkv_projections() first.",
            field="targets",
        )


def stand_aside(host: object, name: str) -> None:
    """Makes the adapters of a component inactive beside one that other components get.

    What was active is noted, so that `come_back` can undo it.
    """
    model = model_of(host)
    if adapter_names(model):
        record = record_of(model)
        record.before[name] = flags_of(model, modes=False)
        keep_record(model, record)
        activate(host, ())


def come_back(host: object, name: str) -> None:
    """Makes active again what stood aside for an adapter, unless others were chosen since."""
    model = model_of(host)
    record = record_of(model)
    before = record.before.pop(name, None)
    if before is not None and not active_names(model):
        left = tuple(n for n in before.active if n in adapter_names(model))
        activate(host, left, enabled=before.enabled)
        if left == before.active:
            restore_flags(model, before, modes=False)
    if record == Record():
        drop_record(model)


def remove(model: nn.Module, name: str) -> None:
    """Removes an adapter's factors; a layer that holds no adapter any more becomes bare again."""
    for _, outer in list(tuner_modules(model)):
        for module in nested(outer):
            if isinstance(module, BaseTunerLayer):
                with quiet():
                    module.delete_adapter(name)
                _forget_extras(module)
                settle(module)
            else:
                _remove_wrapped(module, name)
    _unwrap_empty(model)
    configs = getattr(model, "peft_config", None)
    if configs is not None:
        configs.pop(name, None)
        if not configs:
            del model.peft_config
            mark_loaded(model, False)


def _forget_extras(layer: BaseTunerLayer) -> None:
    """Takes back the longer list of factors that peft's variants (DoRA) give to a layer itself."""
    own = vars(layer).get("adapter_layer_names", ())
    added = own[len(type(layer).adapter_layer_names) :]  # may name again what the class has
    if added and not any(getattr(layer, attribute, None) for attribute in added):
        del layer.adapter_layer_names


def _remove_wrapped(module: nn.Module, name: str) -> None:
    if isinstance(module, AuxiliaryTrainingWrapper) and name in module._adapters:
        module.delete_adapter(name, new_active_adapters=None)
        module._adapters.discard(name)


def _unwrap_empty(module: nn.Module) -> None:
    children: list[tuple[str, Any]] = list(module._modules.items())
    for key, child in children:
        while isinstance(child, BaseTunerLayer) and not child._get_available_adapters():
            child = child.base_layer  # type: ignore[attr-defined]
        if isinstance(child, AuxiliaryTrainingWrapper) and not child._get_available_adapters():
            child = child.original_module
        module._modules[key] = child
        if child is not None:
            _unwrap_empty(child)


def activate(
    host: object, names: tuple[str, ...], *, enabled: bool = True, fresh: bool = False
) -> None:
    """Makes the named adapters the active ones; a name a layer lacks is inactive there.

    Trainability follows each adapter's config: `inference_mode` adapters stay frozen. A model
    whose adapters were disabled has them enabled, or the new ones would silently do nothing.

    Args:
        host: The host.
        names: The adapters, in order.
        enabled: Whether adapters take part at all.
        fresh: The factors of all other adapters are frozen already.
    """
    model = model_of(host)
    configs = peft_configs(model)
    present = tuple(n for n in names if n in configs)
    trainable = {n for n in present if not configs[n].inference_mode}
    for _, outer in tuner_modules(model):
        for module in nested(outer):
            if isinstance(module, LoraLayer):
                # transformers' active_adapters() reads one layer, so all layers name all adapters
                module._active_adapter = list(present)
                _freeze(module, present if fresh else None)
                wanted = [n for n in trainable if holds(module, n)]
            else:
                wanted = _activate_here(module, present, trainable)
            if wanted:
                module.set_requires_grad(wanted, True)
            module._disable_adapters = not enabled
    if isinstance(host, PeftModel) and present:
        tuner: Any = host.base_model
        tuner.active_adapter = list(present)
        host.active_adapter = present[0]


def _activate_here(module: Any, names: Sequence[str], trainable: Collection[str]) -> list[str]:
    """Activates adapters on a layer or wrapper by peft's own call; returns those to be trained."""
    here = [n for n in names if n in module._get_available_adapters()]
    if not isinstance(module, BaseTunerLayer):
        module.set_adapter(here[:1], inference_mode=True)  # a wrapper has one
    elif isinstance(module, TrainableTokensLayer):
        module.set_adapter(here, inference_mode=True)  # it fails on a name that it lacks
    else:
        module.set_adapter(list(names), inference_mode=True)
    return [n for n in here if n in trainable]


def _freeze(layer: Any, names: Sequence[str] | None) -> None:
    """Freezes factors, those of all adapters or of the named ones.

    As peft's `set_adapter`, which asks every adapter several times.
    """
    for key in layer.adapter_layer_names:
        container = layer._modules.get(key)
        if container is None:
            continue
        items, held = container._modules, container._parameters
        chosen = {*items, *held} if names is None else names
        found = [held[name] for name in chosen if name in held]
        for item in (items[name] for name in chosen if name in items):
            found += item.parameters() if item._modules else item._parameters.values()
        for parameter in found:
            if parameter is not None and parameter.requires_grad:
                parameter.requires_grad_(False)
