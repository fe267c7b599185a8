"""The identity of an adapter: equal for equal mathematics, whatever the file around it.

Specified in docs/format.md, so that a stranger can compute it: SHA-256 over one line of JSON for
each component, target, factor and whole module, in canonical spelling and sorted, with the
effective scaling as the bits of a float64 and values hashed in float32.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_lora.paths import canonical_names

if TYPE_CHECKING:
    from hf_lora.adapter import Component

VERSION = "v1"
PATTERN = re.compile(r"v1:sha256:[0-9a-f]{64}")

# Config fields that do not bear on what a loaded adapter computes: comments, and its training.
COMMENTS = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "boft_dropout",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "inference_mode",
        "init_ia3_weights",
        "init_lora_weights",
        "init_weights",
        "loftq_config",
        "lora_dropout",
        "lora_ga_config",
        "megatron_config",
        "megatron_core",
        "miss_dropout",
        "module_dropout",
        "peft_version",
        "rank_dropout",
        "rank_dropout_scale",
        "revision",
        "runtime_config",
        "task_type",
    }
)
# Fields that say where the factors sit, which the tensors' own paths say as well.
_PLACES = frozenset(
    {
        "exclude_modules",
        "fan_in_fan_out",
        "layers_pattern",
        "layers_to_transform",
        "modules_to_save",
        "peft_type",
        "target_modules",
        "target_parameters",
        "trainable_token_indices",
    }
)
_COPY = "base_layer."  # a copy of the base's own weight, which peft adds to some files
# Switches of LoRA that show neither in the scaling nor in the names of the factors.
_LORA_SWITCHES = ("qalora_group_size", "use_bdlora", "use_qalora")
# Factors of parameters: which parameter of a module a pair is for, and so its scaling, is told by
# these alone.
_OF_PARAMETERS = ("alpha_pattern", "lora_alpha", "r", "rank_pattern", "target_parameters")


def digest_of(components: Mapping[str, Component]) -> str:
    """Returns `v1:sha256:` and 64 hex digits. Tensors must have values (none on meta)."""
    whole = hashlib.sha256()
    text = json.JSONEncoder(separators=(",", ":"), sort_keys=True).encode
    for line in _lines(components):
        whole.update(text(line).encode() + b"\n")
    return f"{VERSION}:sha256:{whole.hexdigest()}"


def _lines(components: Mapping[str, Component]) -> Iterator[list[Any]]:
    for name, component in sorted(components.items()):
        yield ["component", name, component.kind, _mathematics(component)]
        spelled = canonical_names(component.targets)
        for path in sorted(component.targets, key=spelled.__getitem__):
            scaling = None
            if component.kind == "LORA" and component.rank(path) is not None:
                scaling = struct.pack(">d", component.scaling(path)).hex()
            yield ["target", spelled[path], scaling]
            for factor, tensor in sorted(component.targets[path].items()):
                yield ["factor", factor, *_hashed(tensor)]
        spelled = canonical_names(component.modules)
        for path in sorted(component.modules, key=spelled.__getitem__):
            own = {k: t for k, t in component.modules[path].items() if not k.startswith(_COPY)}
            if own:
                yield ["module", spelled[path]]
            for key, tensor in sorted(own.items()):
                yield ["parameter", key, *_hashed(tensor)]


def _mathematics(component: Component) -> dict[str, Any]:
    """Returns the settings that neither scalings nor tensors show, without empty ones."""
    config = component.config
    if component.kind == "LORA":
        switched = config.get("use_bdlora") or config.get("use_qalora")
        names = set(_LORA_SWITCHES if switched else ())
        names |= set(_OF_PARAMETERS if config.get("target_parameters") else ())
    else:
        names = set(config) - COMMENTS - _PLACES
    return {name: _settled(config[name]) for name in names if config.get(name)}


def _settled(value: Any) -> Any:
    """Returns a setting in one spelling: names in order, whole numbers as such."""
    if isinstance(value, list | tuple) and all(isinstance(entry, str) for entry in value):
        return sorted(value)
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _hashed(tensor: Tensor) -> tuple[str, list[int], str]:
    """Returns (dtype, shape, SHA-256 of the little-endian values); narrow floats become float32."""
    if tensor.is_floating_point() and tensor.dtype != torch.float64:
        tensor = tensor.float()
    plain = tensor.detach().cpu().contiguous().numpy()
    name = str(tensor.dtype).removeprefix("torch.")
    return name, list(tensor.shape), hashlib.sha256(plain.data).hexdigest()
