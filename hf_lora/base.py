"""Which base a host is: its id, its commit and samples of its weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from hf_lora.configs import heads_of
from hf_lora.fingerprint import Fingerprint, fingerprint_of
from hf_lora.hosts import config_of
from hf_lora.manifest import Base
from hf_lora.paths import canonical_names
from hf_lora.quantised import storage_of
from hf_lora.record import record_of
from hf_lora.walks import bare_modules, tuner_modules


def base_of(host: object, parts: dict[str, nn.Module]) -> Base:
    """Returns what a file should remember of the base.

    Args:
        host: The model or pipeline as it was given.
        parts: Component name -> bare model, see `parts_of` and `model_of`.
    """
    commit = getattr(config_of(next(iter(parts.values()))), "_commit_hash", None)
    held = {n: record_of(m).sampled for n, m in parts.items()}
    prints = {
        n: held[n] or fingerprint_of_model(m)
        for n, m in parts.items()
        if held[n] or not unreadable(m)
    }
    return Base(
        id=id_of(host, parts),
        revision=commit if isinstance(commit, str) else "",
        fingerprints={name: found for name, found in prints.items() if found.tensors},
    )


def id_of(host: object, parts: dict[str, nn.Module]) -> str:
    """Returns the repository or path the host was loaded from; empty when unknown."""
    names = [getattr(m, "name_or_path", None) for m in (host, *parts.values())]
    return next((name for name in names if isinstance(name, str) and name), "")


def fingerprint_of_model(model: nn.Module) -> Fingerprint:
    """Samples the base weights of a model, looking through adapters.

    Task heads are left out: from_pretrained makes them anew each time, and an adapter brings its
    own.
    """
    weights = dict(_weights(model))
    names = canonical_names(weights)
    return fingerprint_of((names[path], tensor) for path, tensor in weights.items())


def _weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    kept = record_of(model).merged or {}
    heads = tuple(f"{head}." for head in heads_of(model))
    seen: set[int] = set()
    for path, module in bare_modules(model):
        if f"{path}.".startswith(heads):
            continue
        for name, parameter in module._parameters.items():
            full = f"{path}.{name}".lstrip(".")
            if parameter is not None and id(parameter) not in seen:  # tied ones once
                seen.add(id(parameter))
                yield full, kept.get(full, parameter)


def unreadable(model: nn.Module) -> str:
    """Returns why the base weights of a model cannot be sampled; empty when they can."""
    config: Any = getattr(config_of(model), "quantization_config", None)
    quantised = getattr(model, "is_quantized", False) and not getattr(config, "dequantize", False)
    quantised |= any(storage_of(module) is not None for _, module in bare_modules(model))
    meta = sharded = False
    for parameter in model.parameters():
        meta |= parameter.is_meta
        sharded |= type(parameter).__name__ == "DTensor"
        quantised |= parameter.ndim >= 2 and not parameter.is_floating_point()
    rows: tuple[tuple[bool, str], ...] = (
        (meta, "has no weights yet"),
        (quantised, "is quantised"),
        (sharded, "is sharded"),
        (_merged_without_copy(model), "has an adapter merged into its weights"),
    )
    return next((why for holds, why in rows if holds), "")


def _merged_without_copy(model: nn.Module) -> bool:
    record = record_of(model)
    merged = any(getattr(layer, "merged", False) for _, layer in tuner_modules(model))
    return (merged or bool(record.merged_names)) and record.merged is None
