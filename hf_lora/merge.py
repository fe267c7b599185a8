"""Merging adapters into the weights, and taking them out again to the last bit."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Literal, TypeVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from hf_lora.errors import InvalidOption, MergeError
from hf_lora.hosts import (
    active_names,
    adapter_names,
    check_has_weights,
    check_known_name,
    model_of,
    nested,
    tuner_modules,
)
from hf_lora.inject import activate
from hf_lora.record import flags_of, keep_record, record_of, restore_flags

H = TypeVar("H")

log = logging.getLogger(__name__)


def _layers(model: nn.Module) -> Iterator[tuple[str, BaseTunerLayer]]:
    for path, outer in tuner_modules(model):
        for module in nested(outer):
            if isinstance(module, BaseTunerLayer):
                yield path, module


def is_merged(model: nn.Module) -> bool:
    """Tells whether any layer has an adapter merged into its weight, whoever merged it."""
    return any(layer.merged for _, layer in _layers(model))


def check_unmerged(model: nn.Module, doing: str) -> None:
    """Raises MergeError while adapters are merged into the weights."""
    if is_merged(model) or record_of(model).merged_names:
        raise MergeError(
            f"adapters are merged into the weights of {type(model).__name__}, so one cannot "
            f"{doing}",
            fix="Call unmerge_lora(host) first, or reload the base where no copy was kept.",
        )


def merge_lora(
    host: H, names: str | Sequence[str] | None = None, *, keep: Literal["cpu"] | None = "cpu"
) -> H:
    """Adds the update scaling*B*A of adapters to the base weights, so that they cost nothing.

    Args:
        host: The host.
        names: The adapters to merge; they become the active ones. None: those active now.
        keep: `"cpu"` keeps a copy of every touched weight in host memory, outside `state_dict`,
            so that `unmerge_lora` restores it bit for bit. None keeps no copy and cannot be undone.

    Returns:
        The same object. The bytes kept are logged at INFO level.

    Raises:
        AdapterNotFound: No adapter, or none of that name.
        MergeError: Already merged; a weight is tied to another, quantised, computed or not
            finite; or the adapter kind cannot be merged. The weights are then as before: to the
            bit with a copy; without one, where peft fails midway, but for rounding.
        MetaHost: There are no weights.
    """
    model = model_of(host)
    if keep not in ("cpu", None):
        raise InvalidOption(f"keep={keep!r} is not 'cpu' or None", field="keep")
    wanted = [names] if isinstance(names, str) else list(names or active_names(model))
    if not wanted and adapter_names(model):
        raise MergeError(
            f"no adapter of {type(model).__name__} is active, so there is nothing to merge",
            fix="Name one: merge_lora(host, 'default').",
        )
    for name in wanted or ["default"]:
        check_known_name(model, name)
    check_has_weights(model, "merged")
    check_unmerged(model, "merge again")
    layers = [(p, x) for p, x in _layers(model) if x._get_available_adapters() & set(wanted)]
    _check_mergeable(model, layers, wanted)
    record = record_of(model)
    before = flags_of(model)
    kept = _copies(layers) if keep == "cpu" else None
    activate(host, tuple(wanted))
    try:
        for path, layer in layers:
            _merge_layer(path, layer, wanted)
    except BaseException:
        _put_back(layers, kept)
        activate(host, before.active, enabled=before.enabled)
        restore_flags(model, before, modes=False)
        raise
    record.merged, record.merged_names, record.before_merge = kept, tuple(wanted), before
    keep_record(model, record)
    size = sum(t.numel() * t.element_size() for t in (kept or {}).values())
    log.info("merged %s into %d layers, %d bytes of base kept", wanted, len(layers), size)
    return host


def unmerge_lora(host: H) -> H:
    """Takes merged adapters out of the weights: every base tensor is as before, bit for bit.

    Returns:
        The same object, with the adapters active that were active before the merge.

    Raises:
        MergeError: Nothing is merged, or no copy was kept.
    """
    model = model_of(host)
    record = record_of(model)
    if not is_merged(model) and not record.merged_names:
        raise MergeError(f"nothing is merged into {type(model).__name__}")
    if record.merged is None or record.before_merge is None:
        raise MergeError(
            "no copy of the base weights was kept, so they cannot be restored exactly",
            fix="Reload the base model, or merge with keep='cpu' next time.",
        )
    # also when peft has unmerged by itself meanwhile: it subtracts, which rounds
    _put_back(list(_layers(model)), record.merged)
    activate(host, record.before_merge.active, enabled=record.before_merge.enabled)
    restore_flags(model, record.before_merge, modes=False)
    record.merged, record.merged_names, record.before_merge = None, (), None
    return host


def _weights(path: str, layer: BaseTunerLayer) -> Iterator[tuple[str, nn.Parameter]]:
    """Yields the base parameters a merge of this layer can touch."""
    for name, parameter in layer.get_base_layer()._parameters.items():
        if parameter is not None:
            yield f"{path}.{name}", parameter


def _copies(layers: Sequence[tuple[str, BaseTunerLayer]]) -> dict[str, Tensor]:
    return {
        name: parameter.detach().to("cpu", copy=True)
        for path, layer in layers
        for name, parameter in _weights(path, layer)
    }


def _put_back(layers: Sequence[tuple[str, BaseTunerLayer]], kept: dict[str, Tensor] | None) -> None:
    for path, layer in layers:
        if kept is None:
            if layer.merged:
                layer.unmerge()
            continue
        with torch.no_grad():
            for name, parameter in _weights(path, layer):
                if name in kept:
                    parameter.copy_(kept[name])
        layer.merged_adapters.clear()
        getattr(layer, "_caches", {}).clear()  # DoRA's norm of the merged weight


def _merge_layer(path: str, layer: BaseTunerLayer, names: Sequence[str]) -> None:
    here = [n for n in names if n in layer._get_available_adapters()]
    try:
        layer.merge(adapter_names=here)
    except (ValueError, RuntimeError, NotImplementedError) as error:
        raise MergeError(f"peft cannot merge {path}: {error}") from error


def _check_mergeable(
    model: nn.Module, layers: Sequence[tuple[str, BaseTunerLayer]], names: Sequence[str]
) -> None:
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for path, layer in layers:
        base = layer.get_base_layer()
        computed = "weight" in dir(base) and "weight" not in base._parameters
        if computed or base._forward_hooks or base._forward_pre_hooks:
            raise MergeError(
                f"the weight or output of {path} is computed by a hook or parametrization, which a "
                "merge would not pass through",
                fix="Keep the adapter unmerged.",
            )
        for name, parameter in _weights(path, layer):
            tied = [n for n in owners[id(parameter)] if not n.startswith(f"{path}.")]
            if tied and name.endswith(".weight"):
                raise MergeError(
                    f"{name} is tied to {tied[0]}, which a merge would change as well",
                    fix="Keep the adapter unmerged.",
                )
            if not parameter.is_floating_point():
                raise MergeError(
                    f"{name} is quantised ({parameter.dtype}); merging would round it",
                    fix="Load the base in bfloat16 or float32 to merge.",
                )
        _check_factors(path, layer, names)


def _check_factors(path: str, layer: BaseTunerLayer, names: Sequence[str]) -> None:
    for attribute in layer.adapter_layer_names:
        held = getattr(layer, attribute)
        for name in names:
            if name not in held:
                continue
            item = held[name]
            tensors = [item] if isinstance(item, Tensor) else list(item.parameters())
            if not all(torch.isfinite(t).all() for t in tensors):
                raise MergeError(f"adapter {name!r} has NaN or infinite values at {path}")
            bias = getattr(item, "bias", None) if attribute == "lora_B" else None
            if bias is not None and getattr(layer.get_base_layer(), "bias", None) is None:
                raise MergeError(
                    f"adapter {name!r} has a bias at {path}, but the base layer has none"
                )
