"""What the user asks -> a checked peft config, and what a host's class says about it.

The only place where rank and alpha become peft's `r` and `lora_alpha`.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Mapping
from enum import Enum
from functools import cache
from typing import Any

from peft import LoraConfig, PeftConfig
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from torch import nn

from hf_lora.errors import InvalidOption, shown
from hf_lora.families import LANGUAGE, Defaults
from hf_lora.hosts import config_of
from hf_lora.limits import DEFAULT_LIMITS

_KEEP_BASE = "it changes the base weights, so detach and other adapters would be wrong"

# config field -> values (True: any truthy value) that change the base model, with the reason
_BASE_MUTATING: Mapping[str, tuple[str, ...] | bool] = {
    "init_lora_weights": ("pissa", "olora", "corda", "lora_ga", "loftq"),
    "kasa_config": True,
    "layer_replication": True,
}

# config field -> why an adapter in place, without a PeftModel around the model, cannot have it
_NOT_IN_PLACE = {
    "alora_invocation_tokens": "PeftModel.forward computes where it begins, so in place it would "
    "silently do nothing",
    "ensure_weight_tying": "peft adds tied modules that the saved config does not list, so the "
    "file could not be read back",
}

# transformers' table of classes -> (peft task type, whether the class adds a task head).
# The first table that holds the class decides; peft knows no type for the ones with "".
_TASKS: tuple[tuple[str, str, bool], ...] = (
    ("MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES", "SEQ_CLS", True),
    ("MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES", "TOKEN_CLS", True),
    ("MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES", "QUESTION_ANS", True),
    ("MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES", "", True),
    ("MODEL_FOR_DOCUMENT_QUESTION_ANSWERING_MAPPING_NAMES", "", True),
    ("MODEL_FOR_VISUAL_QUESTION_ANSWERING_MAPPING_NAMES", "", True),
    ("MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES", "", True),
    ("MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING_NAMES", "", True),
    ("MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES", "", True),
    ("MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES", "", True),
    ("MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES", "", True),
    ("MODEL_FOR_AUDIO_FRAME_CLASSIFICATION_MAPPING_NAMES", "", True),
    ("MODEL_FOR_AUDIO_XVECTOR_MAPPING_NAMES", "", True),
    ("MODEL_FOR_CTC_MAPPING_NAMES", "", True),
    ("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES", "SEQ_2_SEQ_LM", False),
    ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "CAUSAL_LM", False),
    ("MODEL_MAPPING_NAMES", "FEATURE_EXTRACTION", False),
)

# What peft 0.21's classes for a task type add to `modules_to_save` by themselves.
PEFT_HEADS = ("classifier", "score", "qa_outputs")

# Heads of classes that have no single trunk attribute (T5ForQuestionAnswering).
_HEAD_NAMES = ("classification_head", "classifier", "qa_outputs", "score")


@cache
def _classes(table: str) -> frozenset[str]:
    from transformers.models.auto import modeling_auto

    names: set[str] = set()
    for value in getattr(modeling_auto, table).values():
        names.update([value] if isinstance(value, str) else value)
    return frozenset(names)


def task_of(model: nn.Module) -> tuple[str | None, bool]:
    """Returns (peft task type or None, whether the class adds a task head to its trunk)."""
    for kind in type(model).__mro__:
        for table, task, headed in _TASKS:
            if kind.__name__ in _classes(table):
                return (task or None) if _takes_tokens(kind, task) else None, headed
    return None, False


def _takes_tokens(kind: type, task: str) -> bool:
    """Tells whether peft's wrapper for a task can call the class.

    That for FEATURE_EXTRACTION always hands over tokens and embeddings (peft 0.21.2), which vision,
    speech and two-tower trunks have no place for.
    """
    if task != "FEATURE_EXTRACTION":
        return True
    names = inspect.signature(kind.forward).parameters  # type: ignore[attr-defined]
    return {"input_ids", "inputs_embeds"} <= names.keys()


def heads_of(model: nn.Module) -> list[str]:
    """Returns the paths of modules that belong to the task class and not to the trunk."""
    if not task_of(model)[1]:
        return []
    trunk = getattr(model, "base_model_prefix", "")
    children = {n: m for n, m in model.named_children() if any(True for _ in m.parameters())}
    if trunk in children:
        return [n for n in children if n != trunk]
    return [n for n in children if n in _HEAD_NAMES]


def make_config(
    rank: int, alpha: float | None, dropout: float, defaults: Defaults = LANGUAGE
) -> LoraConfig:
    """Returns a LoRA config from the public arguments and the defaults of the host's kind.

    Raises:
        InvalidOption: A value is out of range; the error names the argument.
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise InvalidOption(
            f"rank={rank!r} is not a positive whole number",
            fix="Common ranks are 4 to 64; the default is 16.",
            field="rank",
        )
    if alpha is None:
        alpha = rank if defaults.alpha is None else defaults.alpha
    number = isinstance(alpha, int | float) and not isinstance(alpha, bool)
    # the bound first: a whole number may be too large for a float
    if not number or not abs(alpha) < 1e300 or not math.isfinite(alpha):
        raise InvalidOption(
            f"alpha={shown(alpha)} is not a finite number",
            fix=f"The default is {defaults.alpha or 'the rank'}; the update is scaled by "
            "alpha/rank.",
            field="alpha",
        )
    if alpha <= 0:
        raise InvalidOption(
            f"alpha={alpha!r} is not positive, so the adapter would do nothing or the reverse",
            fix="Use set_adapters(host, name, 0) to silence an adapter at run time.",
            field="alpha",
        )
    if alpha / rank > DEFAULT_LIMITS.scaling:
        raise InvalidOption(
            f"alpha/rank is {alpha / rank:g}, far above what trains",
            fix=f"Loads accept up to {DEFAULT_LIMITS.scaling:g}; common values are 1 to 4.",
            field="alpha",
        )
    numeric = isinstance(dropout, int | float) and not isinstance(dropout, bool)
    if not numeric or not 0 <= dropout < 1:
        raise InvalidOption(f"dropout={dropout!r} is not in [0, 1)", field="dropout")
    # peft types alpha as int; whole numbers stay whole so that files read as others write them
    whole = int(alpha) if float(alpha).is_integer() else alpha
    return LoraConfig(
        r=rank,
        lora_alpha=whole,  # type: ignore[arg-type]
        lora_dropout=float(dropout),
        init_lora_weights=defaults.init,
    )


def take_config(config: object, rank: int, alpha: float | None, dropout: float) -> PeftConfig:
    """Returns a checked copy of a ready peft tuner config.

    Raises:
        InvalidOption: No tuner config, given together with rank, alpha or dropout, or one that
            changes base weights.
    """
    if not isinstance(config, PeftConfig):
        raise InvalidOption(
            f"config is a {type(config).__name__}, not a peft config",
            fix="Give for instance peft.LoraConfig(r=16).",
            field="config",
        )
    if (rank, alpha, dropout) != (16, None, 0.0):
        raise InvalidOption(
            "config= was given together with rank, alpha or dropout",
            fix="Set them inside the config (r, lora_alpha, lora_dropout).",
            field="config",
        )
    tuner = PEFT_TYPE_TO_TUNER_MAPPING.get(config.peft_type)  # type: ignore[call-overload]
    if config.is_prompt_learning or tuner is None or getattr(tuner, "uses_shared_state", False):
        raise InvalidOption(
            f"{type(config).__name__} cannot be attached in place",
            fix="Use peft.get_peft_model for prompt learning and methods with shared state.",
            field="config",
        )
    check_keeps_base(config)
    if isinstance(config, LoraConfig):
        make_config(config.r, config.lora_alpha, config.lora_dropout)  # the same ranges hold
    if isinstance(getattr(config, "modules_to_save", None), str):
        raise InvalidOption(
            f"modules_to_save={config.modules_to_save!r} is a string",  # type: ignore[attr-defined]
            fix="peft would read it letter by letter; give a list.",
            field="modules_to_save",
        )
    return copy.deepcopy(config)


def check_keeps_base(config: object) -> None:
    """Raises InvalidOption for a config whose adapter would change the base model."""
    for name, values in _BASE_MUTATING.items():
        value = getattr(config, name, None)
        listed = isinstance(values, tuple)
        bad = str(value).lower().startswith(values) if isinstance(values, tuple) else bool(value)
        if bad:
            raise InvalidOption(
                f"{name}={value!r} is refused: {_KEEP_BASE}"
                if listed
                else f"{name} is refused: {_KEEP_BASE}",
                fix='Use init_lora_weights=True, "gaussian", "orthogonal" or "eva".',
                field=name,
            )
    for name, why in _NOT_IN_PLACE.items():
        if getattr(config, name, None):
            raise InvalidOption(
                f"{name} is refused: {why}", fix="Use peft.get_peft_model.", field=name
            )
    if getattr(config, "bias", "none") not in ("none", False, None):
        raise InvalidOption(
            f"bias={getattr(config, 'bias', None)!r} is refused: it trains the base's own biases, "
            "and an adapter file that carries them overwrites base weights",
            fix="Use LoraConfig(lora_bias=True), a bias of the adapter's own.",
            field="bias",
        )


def add_identity(config: PeftConfig, model: nn.Module) -> None:
    """Writes into the config which base and class it is for, so that AutoPeftModel can open it.

    peft's `auto_mapping` stands in where peft knows no task type for the class.
    """
    config.base_model_name_or_path = getattr(model, "name_or_path", None) or None
    task, _ = task_of(model)
    heads = [model.get_submodule(head) for head in heads_of(model)]
    inside = [path for head in heads for path, _ in head.named_modules() if path]
    if any(path.rpartition(".")[2] in PEFT_HEADS for path in inside):
        task = None  # peft adds its own head names for a task type and would wrap the inner one
    if config.task_type is None:
        config.task_type = task
    if config.task_type is None and config_of(model) is not None:
        config.auto_mapping = {
            "base_model_class": type(model).__name__,
            "parent_library": type(model).__module__,
        }


def saved_config(config: PeftConfig) -> dict[str, Any]:
    """Returns the config as plain data for a file: sorted lists, ready for inference."""
    fields = config.to_dict()
    names = ("target_modules", "exclude_modules", "modules_to_save", "target_parameters")
    for name, value in fields.items():
        if isinstance(value, Enum):
            fields[name] = value.value
        elif isinstance(value, set) or (name in names and isinstance(value, list | tuple)):
            fields[name] = sorted(value)
    fields.pop("runtime_config", None)  # peft: never saved, it concerns one process
    fields["inference_mode"] = True
    return fields
