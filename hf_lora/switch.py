"""Which adapters take part and how strongly; the host without them; the host as a PeftModel."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import nn

from hf_lora.errors import AdapterNotFound, InvalidOption
from hf_lora.hosts import (
    active_names,
    adapter_names,
    check_known_name,
    model_of,
    nested,
    peft_configs,
    tuner_modules,
)
from hf_lora.inject import activate, quiet
from hf_lora.merge import check_unmerged, is_merged, merge_lora, unmerge_lora
from hf_lora.record import flags_of, record_of, restore_flags, transaction

H = TypeVar("H")
Weight = float | Mapping[str, float]


def set_adapters(
    host: H,
    names: str | Sequence[str] | Mapping[str, Weight],
    weights: Weight | Sequence[Weight | None] | None = None,
) -> H:
    """Chooses which adapters are active and how strongly; a name left out is inactive.

    Args:
        host: The host.
        names: One name, several, or a mapping of name to weight.
        weights: One weight for all, or one a name; None is 1.0. A weight multiplies the adapter's
            own scaling; a mapping gives weights by module path, by whole segments
            (`{"model.layers.3": 0.5}`), 1.0 elsewhere.

    Returns:
        The same object.

    Raises:
        AdapterNotFound: A name is not attached.
        InvalidOption: Weights do not fit the names, are not finite, name no target, or the adapter
            kind has no exact strength; or two of the adapters bring the same head.
        MergeError: Adapters are merged into the weights.
    """
    model = model_of(host)
    check_unmerged(model, "change adapters")
    wanted = _pairs(names, weights)
    for name in wanted:
        check_known_name(model, name)
    _check_heads(model, wanted)
    scales = {name: strengths(model, name, weight) for name, weight in wanted.items()}
    activate(host, tuple(wanted))
    for name, by_layer in scales.items():
        for layer, weight in by_layer:
            layer.set_scale(name, weight)
    return host


def _pairs(
    names: str | Sequence[str] | Mapping[str, Weight],
    weights: Weight | Sequence[Weight | None] | None,
) -> dict[str, Weight]:
    if not isinstance(names, str | Mapping | list | tuple) or not all(
        isinstance(name, str) for name in ([names] if isinstance(names, str) else names)
    ):
        raise InvalidOption(
            f"names={names!r} is no adapter name and no list of them", field="names"
        )
    if isinstance(names, Mapping):
        if weights is not None:
            raise InvalidOption("weights were given twice, in names and in weights")
        return dict(names)
    listed = [names] if isinstance(names, str) else list(names)
    if len(set(listed)) != len(listed):
        raise InvalidOption(f"an adapter is named twice in {listed}", field="names")
    if weights is None or isinstance(weights, int | float | Mapping):
        return dict.fromkeys(listed, 1.0 if weights is None else weights)
    if not isinstance(weights, list | tuple):
        raise InvalidOption(f"weights={weights!r} is no number and no list of them")
    if len(weights) != len(listed):
        raise InvalidOption(
            f"{len(weights)} weights for {len(listed)} adapters",
            fix="Give one weight an adapter, or one number for all.",
            field="weights",
        )
    return {n: 1.0 if w is None else w for n, w in zip(listed, weights, strict=True)}


def strengths(model: nn.Module, name: str, weight: Weight) -> list[tuple[Any, float]]:
    """Returns (layer, weight) of one adapter, checked; what takes no weight but 1 is left out."""
    rows = dict(weight) if isinstance(weight, Mapping) else {"": weight}
    unused = set(rows)
    pairs = []
    for path, outer in tuner_modules(model):
        row = max((p for p in rows if _under(path, p)), key=len, default=None)
        value = 1.0 if row is None else rows[row]
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InvalidOption(f"weight {value!r} of {name!r} is no number", field="weights")
        if not math.isfinite(value):
            raise InvalidOption(f"weight {value!r} of {name!r} is not finite", field="weights")
        for layer in nested(outer):
            if isinstance(layer, BaseTunerLayer) and name in layer._get_available_adapters():
                unused.discard(row or "")
                pairs += _checked(path, layer, name, float(value))
    if unused:
        raise InvalidOption(
            f"adapter {name!r} has no target below {sorted(unused)}", field="weights"
        )
    return pairs


def _checked(path: str, layer: BaseTunerLayer, name: str, value: float) -> list[tuple[Any, float]]:
    if hasattr(layer, "set_scale") and name not in getattr(layer, "lora_variant", {}):
        return [(layer, value)]
    if value != 1.0:
        raise InvalidOption(
            f"adapter {name!r} at {path} is of a kind whose strength cannot be scaled exactly",
            fix="Use weight 1, or leave the adapter out.",
            field="weights",
        )
    return []


def _under(path: str, prefix: str) -> bool:
    return not prefix or path == prefix or path.startswith(f"{prefix}.")


def _check_heads(model: nn.Module, names: Mapping[str, Weight]) -> None:
    for path, module in tuner_modules(model):
        here = [n for n in names if n in module._get_available_adapters()]
        if not isinstance(module, BaseTunerLayer) and len(here) > 1:
            raise InvalidOption(
                f"adapters {here[0]!r} and {here[1]!r} both bring their own {path}",
                fix="Only one of them can be active at a time.",
                field="names",
            )


@contextmanager
def base_model(host: H) -> Iterator[H]:
    """Runs the host without adapters inside the `with` block, heads included.

    Reference-free DPO and GRPO take their reference logits so. Nested blocks are fine; a host
    merged with `keep="cpu"` is unmerged for the block.

    Raises:
        MergeError: The host is merged and no copy of the weights was kept.
    """
    model = model_of(host)
    merged = record_of(model).merged_names
    if merged or is_merged(model):
        unmerge_lora(host)
    # the flag alone: peft's enable_adapters() would also turn requires_grad on and off
    switched = []
    for _, outer in tuner_modules(model):
        for module in nested(outer):
            switched.append((module, module._disable_adapters))
            module._disable_adapters = True
    try:
        yield host
    finally:
        for module, disabled in switched:
            module._disable_adapters = disabled
        if merged:
            merge_lora(host, merged)


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
    with transaction(model), quiet():
        view = PeftModel(model, throwaway, adapter_name=_THROWAWAY, autocast_adapter_dtype=False)
    activate(view, active, enabled=flags.enabled)
    view.peft_config.pop(_THROWAWAY)
    restore_flags(model, flags, modes=True)
    return view


_THROWAWAY = "hf_lora_view"
