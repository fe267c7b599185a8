"""The base of a run: config, class, tokenizer and weights; no code that it brings is run."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedTokenizerBase

from hf_lora.configs import heads_of
from hf_lora.errors import InvalidOption, MissingExtra, UnsupportedHost, listing
from hf_lora.training.data.shapes import Task
from hf_lora.training.recipe.table import Recipe

# For each task the classes of transformers that can learn it, best first.
_CLASSES: Mapping[Task, tuple[str, ...]] = {
    "chat": ("AutoModelForCausalLM", "AutoModelForImageTextToText"),
    "text": ("AutoModelForCausalLM", "AutoModelForImageTextToText"),
    "label": ("AutoModelForSequenceClassification",),
}
# Names that configs have for the longest sequence a model can take.
_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
# Types whose positions begin behind the padding token's number (transformers 5.23 modeling files).
_OFFSET_TYPES = {
    "camembert", "data2vec-text", "esm", "ibert", "longformer", "luke", "markuplm", "mpnet",
    "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod",
}  # fmt: skip
# Parts of a classifier's trunk that a masked language model was saved without (BERT's kind).
_NEW_PARTS = ("pooler",)
_NO_LIMIT = 1_000_000  # tokens; tokenizers without a limit state 10^30


def where_of(recipe: Recipe) -> dict[str, Any]:
    """Returns the arguments by which all parts of the base are loaded from one commit."""
    where: dict[str, Any] = {"trust_remote_code": False}
    return where if recipe.revision is None else {**where, "revision": recipe.revision}


def read_config(recipe: Recipe) -> Any:
    """Returns the config of the base.

    Raises:
        UnsupportedHost: There is none that transformers knows, or the folder is an adapter's.
    """
    name = str(recipe.model)
    folder = Path(name)
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise UnsupportedHost(
            f"{name!r} holds an adapter and no base", fix="Give the base as --model."
        )
    try:
        return transformers.AutoConfig.from_pretrained(name, **where_of(recipe))
    except Exception as error:  # a config may hold anything, and its class may raise anything
        raise UnsupportedHost(
            f"no usable model config at {name!r}: {first_line(error)}",
            fix="Give a folder with config.json, or a repository id.",
            field="model",
        ) from None


def read_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """Returns the tokenizer of the base; UnsupportedHost when it has none."""
    auto: Any = transformers.AutoTokenizer
    try:
        tokenizer: PreTrainedTokenizerBase = auto.from_pretrained(recipe.model, **where_of(recipe))
    except Exception as error:  # each kind of tokenizer file fails in its own way
        raise UnsupportedHost(
            f"{recipe.model!r} has no usable tokenizer: {first_line(error)}",
            fix="Save the tokenizer beside the model: tokenizer.save_pretrained(folder).",
            field="model",
        ) from None
    return tokenizer


def class_for(config: Any, task: Task) -> Any:
    """Returns the class that learns the task.

    Raises:
        UnsupportedHost: transformers has none for this type of model, or it reads both ways or has
            an encoder, so that it cannot learn to go on with a text.
    """
    kind = str(config.model_type)
    if task != "label":
        masked = type(config) in transformers.AutoModelForMaskedLM._model_mapping
        if config.is_encoder_decoder or (masked and not getattr(config, "is_decoder", False)):
            what = (
                "has an encoder and a decoder" if config.is_encoder_decoder else "reads both ways"
            )
            raise UnsupportedHost(
                f"a model of type {kind!r} {what}, and the task {task!r} is for decoders",
                fix="Use --task label for it, or train it in Python with LoraTrainer.",
                field="task",
            )
    for name in _CLASSES[task]:
        auto: Any = getattr(transformers, name)
        if type(config) in auto._model_mapping:
            return auto
    raise UnsupportedHost(
        f"transformers {transformers.__version__} has no class for models of type {kind!r} and the "
        f"task {task!r}",
        fix="Use a base of another type, or another --task.",
        field="model",
    )


def longest(config: Any, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Returns the most tokens that the base can take; None where it states no limit."""
    text = config.get_text_config()
    stated = next((getattr(text, n) for n in _POSITIONS if getattr(text, n, None)), None)
    if stated is not None and config.model_type in _OFFSET_TYPES:
        stated -= (config.pad_token_id or 0) + 1
    limits = [n for n in (stated, tokenizer.model_max_length) if n and n < _NO_LIMIT]
    return min(limits, default=None)


def width_of(config: Any) -> int | None:
    """Returns the width of the base's residual stream; None where the config does not say."""
    width = getattr(config.get_text_config(), "hidden_size", None)
    return width if isinstance(width, int) and width > 0 else None


def base_labels(config: Any) -> tuple[str, ...]:
    """Returns the names of the classes that the base knows; none where they are made up."""
    names = tuple(str(config.id2label[i]) for i in sorted(config.id2label or {}))
    return () if names == tuple(f"LABEL_{i}" for i in range(len(names))) else names


def _set_labels(config: Any, labels: Sequence[str]) -> None:
    config.id2label = dict(enumerate(labels))
    config.label2id = {name: i for i, name in enumerate(labels)}
    config.problem_type = "single_label_classification"


def meta_model(config: Any, task: Task, labels: Sequence[str], dtype: torch.dtype) -> Any:
    """Builds the model without weights.

    Raises:
        UnsupportedHost: The config makes no model.
    """
    auto = class_for(config, task)
    if task == "label":
        _set_labels(config, labels)
    try:
        with torch.device("meta"):
            return auto.from_config(config, dtype=dtype)
    except Exception as error:  # whatever a config leads to
        raise UnsupportedHost(f"the config makes no model: {first_line(error)}") from None


def check_can_quantise() -> None:
    """Raises MissingExtra when bitsandbytes is not installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingExtra(
            "--load-in needs bitsandbytes, which is not installed",
            fix='Run: pip install "hf-lora[quantised]"',
        )


def _quantisation(recipe: Recipe, dtype: torch.dtype, whole: Sequence[str]) -> dict[str, Any]:
    """Returns arguments that quantise the base but for modules that are trained whole."""
    if recipe.load_in is None:
        return {}
    check_can_quantise()
    kinds: dict[str, dict[str, Any]] = {
        "4bit": {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": dtype,
        },
        "8bit": {"load_in_8bit": True},
    }
    quantise: Any = transformers.BitsAndBytesConfig
    skip = {"llm_int8_skip_modules": list(whole)} if whole else {}
    gpu = {"device_map": {"": torch.cuda.current_device()}} if torch.cuda.is_available() else {}
    return {"quantization_config": quantise(**kinds[recipe.load_in], **skip), **gpu}


def load_model(
    recipe: Recipe, config: Any, task: Task, labels: Sequence[str]
) -> tuple[Any, tuple[str, ...]]:
    """Loads the base with its weights.

    Args:
        recipe: Resolved.
        config: As `read_config` gave it.
        task: What it is to learn.
        labels: Names of the classes.

    Returns:
        The model, and paths of modules below its head that the base has no weights for, so that
        they must be trained whole: the pooler of a BERT that was no classifier.

    Raises:
        UnsupportedHost: It does not load, or weights are missing that are not trained here.
        MissingExtra: It is to be quantised and bitsandbytes is not installed.
    """
    auto = class_for(config, task)
    dtype: torch.dtype = getattr(torch, str(recipe.dtype))
    whole: list[str] = []
    if task == "label" and recipe.load_in is not None:
        bare = meta_model(copy.deepcopy(config), task, labels, dtype)
        new = [path for path, _ in bare.named_modules() if path.endswith(_NEW_PARTS)]
        whole = [*heads_of(bare), *new]
    options = _quantisation(recipe, dtype, whole)
    if task == "label":
        # a head for other classes than these is made anew
        options["ignore_mismatched_sizes"] = config.num_labels != len(labels)
        _set_labels(config, labels)
    try:
        model, info = auto.from_pretrained(
            recipe.model,
            config=config,
            dtype=dtype,
            # transformers 5.23 loads an adapter that lies beside the model; here it finds none
            adapter_kwargs={"subfolder": "no-adapter"},
            output_loading_info=True,
            **options,
            **where_of(recipe),
        )
    except Exception as error:  # files that are missing, damaged or of another model
        raise UnsupportedHost(
            f"{recipe.model!r} does not load: {first_line(error)}", field="model"
        ) from None
    return model, _new_parts(recipe, model, set(info["missing_keys"]), task)


def _new_parts(recipe: Recipe, model: Any, missing: set[str], task: Task) -> tuple[str, ...]:
    """Refuses a base of random weights: only what tops a classifier may be new."""
    trunk = f"{model.base_model_prefix}."
    made = sorted(k for k in missing if task != "label" or k.startswith(trunk))
    new = dict.fromkeys(_part_of(key) for key in made) if task == "label" else {}
    if made and ("" in new or not new):
        raise UnsupportedHost(
            f"{recipe.model!r} has no weights for {listing(made)} of {type(model).__name__}",
            fix="Give a base of this kind, or another --task.",
            field="model",
        )
    return tuple(new)


def _part_of(key: str) -> str:
    """Returns the path of the new part that a parameter belongs to; empty for none."""
    names = key.split(".")
    found = next((i for i, name in enumerate(names) if name in _NEW_PARTS), None)
    return "" if found is None else ".".join(names[: found + 1])


def checkpoint_activations(
    model: Any,
    context_fn: Callable[[], tuple[AbstractContextManager[Any], Any]] | None = None,
) -> None:
    """Lets a model compute its activations twice instead of keeping them.

    Args:
        model: A model of transformers.
        context_fn: Of `torch.utils.checkpoint`: contexts of the two computations.

    Raises:
        InvalidOption: The model cannot.
    """
    if not model.supports_gradient_checkpointing:
        raise InvalidOption(
            f"{type(model).__name__} does not support gradient checkpointing",
            fix="Leave --gradient-checkpointing out.",
            field="gradient_checkpointing",
        )
    kwargs: dict[str, Any] = {"use_reentrant": False}
    if context_fn is not None:
        kwargs["context_fn"] = context_fn
    # transformers before 5.22 has the older name alone, which now warns
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)(kwargs)


def first_line(error: Exception) -> str:
    """Returns the first line of an error, which libraries spread over pages."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]
