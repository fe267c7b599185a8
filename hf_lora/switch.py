"""Which adapters take part and how strongly; the host without them; the host as a PeftModel."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Real
from typing import Any, TypeVar

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import nn

from hf_lora.adapter import MODEL
from hf_lora.casting import check_readable
from hf_lora.components import check_known
from hf_lora.errors import AdapterNotFound, InvalidOption, MergeError, closest, listing, shown
from hf_lora.hosts import active_names, adapter_names, model_of, parts_of, peft_configs
from hf_lora.inject import activate, check_reached, quiet
from hf_lora.joined import passed_by
from hf_lora.layers.checks import check_heads, names_in
from hf_lora.layers.fold import is_merged
from hf_lora.layers.kinds import is_scalable
from hf_lora.layers.strength import Dial
from hf_lora.merge import (
    check_unmerged,
    merge_again,
    unmerge_lora,
)
from hf_lora.overrides import guard_host, keep_adjustable
from hf_lora.record import flags_of, record_of, restore_flags, switched_off, transaction
from hf_lora.walks import holds, nested, tuner_modules

H = TypeVar("H")
Weight = float | Mapping[str, "float | Mapping[str, float]"]


def set_adapters(
    host: H,
    names: str | Sequence[str] | Mapping[str, Weight],
    weights: Weight | Sequence[Weight | None] | None = None,
) -> H:
    """Chooses which adapters are active and how strongly; a name left out is inactive.

    At weight w the model is the one whose weight update is w times the adapter's, for every kind of
    adapter: 0 is the base, 1 the adapter as trained. With several active their updates add up (IA3,
    OFT, BOFT, HRA and MiSS "bat" follow one another), DoRA's too, whose order matters in peft.
    Heads trained whole and new token rows have no strength: w applies to factors alone.

    On a compiled model of diffusers another strength of a LoRA or LoKr compiles nothing anew; other
    kinds compile once more when their strength is first another one than 1.

    Args:
        host: A model, or a pipeline, all components of which change or none.
        names: One name, several, or a mapping of name to weight.
        weights: One weight for all, or one a name; None is 1.0. On a model a mapping gives weights
            by module path, by whole segments (`{"model.layers.3": 0.5}`), 1.0 elsewhere. On a
            pipeline it gives them by component, and inside one by module path:
            `{"unet": {"down_blocks.1": 0.3}, "text_encoder": 0.0}`.

    Returns:
        The same object.

    Raises:
        AdapterNotFound: No component has an adapter of that name.
        InvalidOption: Weights do not fit the names, are not finite or name no target; or two of the
            adapters bring the same head; or inside `base_model`.
        MergeError: Adapters are merged into the weights.
        UnsupportedTarget: A layer has a forward of its own, which would not see the strength, is
            passed by since `fuse_qkv_projections`, or cannot read weights cast to 8-bit floats.
    """
    parts = parts_of(host)
    for part in parts.values():
        check_unmerged(model_of(part), "change adapters")
    wanted = _pairs(names, weights)
    for name in wanted:
        check_known(host, name)
    for part in parts.values():
        check_heads(model_of(part), list(wanted))
        check_readable(model_of(part), wanted)
    scales = [
        (name, strengths(model_of(parts[component]), name, weight))
        for name, whole in wanted.items()
        for component, weight in _by_component(host, name, whole).items()
    ]
    with transaction(host):
        for part in parts.values():
            activate(part, tuple(wanted))
        for name, by_layer in scales:
            for dial, weight in by_layer:
                dial.set_scale(name, weight)
        for part in parts.values():
            keep_adjustable(model_of(part))
        guard_host(host)
    return host


def _pairs(
    names: str | Sequence[str] | Mapping[str, Weight],
    weights: Weight | Sequence[Weight | None] | None,
) -> dict[str, Weight]:
    if isinstance(names, Mapping):
        if weights is not None:
            raise InvalidOption("weights were given twice, in names and in weights")
        names_in(list(names))
        return {n: 1.0 if w is None else w for n, w in names.items()}
    listed = names_in(names)
    if len(set(listed)) != len(listed):
        raise InvalidOption(f"an adapter is named twice in {listed}", field="names")
    if weights is None or isinstance(weights, Real | Mapping):
        return dict.fromkeys(listed, 1.0 if weights is None else weights)
    if not isinstance(weights, list | tuple):
        raise InvalidOption(
            f"weights={shown(weights)} is no number and no list of them",
            fix="Give one number for all, or one an adapter.",
            field="weights",
        )
    if len(weights) != len(listed):
        raise InvalidOption(
            f"{len(weights)} weights for {len(listed)} adapters",
            fix="Give one weight an adapter, or one number for all.",
            field="weights",
        )
    return {n: 1.0 if w is None else w for n, w in zip(listed, weights, strict=True)}


def _by_component(host: object, name: str, weight: Weight) -> dict[str, Weight]:
    """Returns component -> weight of one adapter, for the components that have it.

    Raises:
        InvalidOption: A key is no component that has the adapter.
    """
    parts = {c: model_of(part) for c, part in parts_of(host).items()}
    held = [c for c, model in parts.items() if name in adapter_names(model)]
    if set(parts) == {MODEL} or not isinstance(weight, Mapping):
        return dict.fromkeys(held, weight)
    unknown = [key for key in weight if key not in held]
    if unknown:
        raise InvalidOption(
            f"{shown(unknown[0])} is no component of {type(host).__name__} with adapter "
            f"{name!r}, which is on {listing(held)}",
            fix=f"Give weights by component, for instance {{{held[0]!r}: 0.5}}.",
            field="weights",
        )
    return {component: weight.get(component, 1.0) for component in held}


def strengths(model: nn.Module, name: str, weight: Weight) -> list[tuple[Dial, float]]:
    """Returns (dial, weight) for every layer of one adapter on one model, checked.

    Raises:
        InvalidOption: A weight is no finite number, a path names no target of the adapter, or the
            kind of a layer has no strength.
        UnsupportedTarget: A layer is passed by, see `joined`.
    """
    rows = _rows(name, weight)
    dead = passed_by(model)
    dials, used, paths = [], set(), []
    for path, outer in tuner_modules(model):
        row = max((p for p in rows if _under(path, p)), key=len, default=None)
        value = 1.0 if row is None else rows[row]
        for layer in nested(outer):
            if isinstance(layer, BaseTunerLayer) and holds(layer, name):
                used.add(row)
                paths.append(path)
                check_reached(path, dead)
                if value != 1 and not is_scalable(layer):
                    raise InvalidOption(
                        f"adapter {name!r} at {path} is of a kind that has no strength",
                        fix="Use weight 1, or leave the adapter out.",
                        field="weights",
                    )
                dials.append((Dial(layer), value))
    unused = sorted(set(rows) - used - {""})
    if unused:
        raise InvalidOption(
            f"adapter {name!r} has no target below {unused}. It has "
            f"{listing(closest(unused[0], _prefixes(paths)))}",
            field="weights",
        )
    return dials


def _rows(name: str, weight: Weight) -> dict[str, float]:
    """Returns module path -> weight, the empty path for everywhere."""
    rows: dict[str, float] = {}
    for path, value in (weight if isinstance(weight, Mapping) else {"": weight}).items():
        if not isinstance(path, str):
            raise InvalidOption(
                f"{shown(path)} in the weights of {name!r} is no module path",
                fix="Give weights by module path, for instance {'model.layers.3': 0.5}.",
                field="weights",
            )
        given: object = value
        if isinstance(given, bool) or not isinstance(given, Real):
            raise InvalidOption(
                f"weight {shown(given)} of {name!r} is no number",
                fix="Give a number: 1 is the adapter as trained, 0 none of it.",
                field="weights",
            )
        try:
            rows[path] = float(given)
        except OverflowError:
            rows[path] = math.inf
        if not math.isfinite(rows[path]):
            raise InvalidOption(
                f"weight {shown(given)} of {name!r} is not finite",
                fix="Give a number: 1 is the adapter as trained, 0 none of it.",
                field="weights",
            )
    return rows


def _prefixes(paths: Sequence[str]) -> list[str]:
    """Returns the paths and all that they lie below."""
    cut = [path.split(".") for path in paths]
    return list(dict.fromkeys(".".join(p[:n]) for p in cut for n in range(1, len(p) + 1)))


def _under(path: str, prefix: str) -> bool:
    return not prefix or path == prefix or path.startswith(f"{prefix}.")


@contextmanager
def base_model(host: H) -> Iterator[H]:
    """Runs the host without adapters inside the `with` block, heads included.

    Reference-free DPO and GRPO take their reference logits so. Nested blocks are fine; a host
    merged with `keep="cpu"` is unmerged for the block. Inside it, adapters cannot be attached,
    loaded, chosen, merged or taken off: its end would undo the change in part.

    Raises:
        MergeError: The host is merged and no copy of the weights was kept, or peft has taken the
            merged adapters off.
    """
    models = {c: model_of(part) for c, part in parts_of(host).items()}
    merged = {c: record_of(model).merged_names for c, model in models.items()}
    if any(merged.values()) or any(is_merged(model) for model in models.values()):
        if any(set(merged[c]) - set(adapter_names(model)) for c, model in models.items()):
            raise MergeError(
                f"adapters merged into {type(host).__name__} were taken off meanwhile",
                fix="Call unmerge_lora(host) first.",
            )
        unmerge_lora(host)
    # the flag alone: peft's enable_adapters() would also turn requires_grad on and off
    switched = []
    for model in models.values():
        for _, outer in tuner_modules(model):
            for module in nested(outer):
                switched.append((module, module._disable_adapters))
                module._disable_adapters = True
    try:
        with switched_off(list(models.values())):
            yield host
    finally:
        for module, disabled in switched:
            module._disable_adapters = disabled
        if any(merged.values()):
            merge_again(host, merged)


def as_peft_model(host: nn.Module) -> PeftModel:
    """Returns a `PeftModel` that shares all modules with the host, for code that asks for one.

    accelerate's adapter-only FSDP save and Trainer's ZeRO-3 branches test `isinstance(PeftModel)`.
    The view needs no memory of its own; adapters, flags and outputs of the host stay as they are.
    Take a new view after attaching or detaching: a PeftModel remembers its active adapter by name.

    Raises:
        AdapterNotFound: The host has no adapter.
        MergeError: Adapters are merged; PeftModel would unmerge them, which rounds.
    """
    if isinstance(host, PeftModel):
        return host
    model = model_of(host)
    names = adapter_names(model)
    if not names:
        raise AdapterNotFound(
            f"{type(model).__name__} has no adapter, so there is nothing to view as a PeftModel",
            fix="Call attach_lora or load_lora first.",
        )
    check_unmerged(model, "view it as a PeftModel")
    flags = flags_of(model)
    active = active_names(model) or tuple(names[:1])
    # A throw-away adapter without targets lets PeftModel's own constructor do the wrapping.
    throwaway: Any = copy.copy(peft_configs(model)[active[0]])
    throwaway.target_modules = DUMMY_TARGET_MODULES
    throwaway.inference_mode = True  # AdaLoRA allows one trainable adapter only
    for field in ("modules_to_save", "target_parameters", "trainable_token_indices"):
        if hasattr(throwaway, field):
            setattr(throwaway, field, None)
    for field in ("rank_pattern", "alpha_pattern"):
        if hasattr(throwaway, field):
            setattr(throwaway, field, {})
    with transaction(model), quiet(), _same_hooks(model):
        view = PeftModel(model, throwaway, adapter_name=_THROWAWAY, autocast_adapter_dtype=False)
    activate(view, active, enabled=flags.enabled)
    view.peft_config.pop(_THROWAWAY)
    restore_flags(model, flags, modes=True)
    return view


@contextmanager
def _same_hooks(model: nn.Module) -> Iterator[None]:
    """Takes off what the constructor of PeftModel hooks onto a host with gradient checkpointing."""
    hooks = [(m, list(m._forward_hooks)) for m in model.modules()]
    names = ("_require_grads_hook", "_require_grads_hooks")  # where transformers keeps them
    held = {name: vars(model)[name] for name in names if name in vars(model)}
    yield
    for module, before in hooks:
        for key in set(module._forward_hooks) - set(before):
            del module._forward_hooks[key]
    for name in names:
        vars(model).pop(name, None)
    vars(model).update(held)


_THROWAWAY = "hf_lora_view"
