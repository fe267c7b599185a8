"""The defaults that depend on the base, the data and the machine; why is said in the recipe."""

from __future__ import annotations

import datetime
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from hf_lora.errors import BadDataset, InvalidOption
from hf_lora.training.data import Data
from hf_lora.training.data.chat import TEMPLATES
from hf_lora.training.recipe.models import longest, width_of
from hf_lora.training.recipe.table import Recipe

# How the best rate falls with the width, by the beginning of a model's type: lr ~ width^-p.
# Source: tinker-cookbook, hyperparam_utils.get_lr: 5e-5 * 10 * (2000/width)^p, fitted on Llama 3
# and Qwen 3. A factor 15 for runs below 100 steps is known from an excerpt alone, and left out.
_POWERS: Mapping[str, float] = {"llama": 0.781, "qwen": 0.0775}
_HIGHEST_RATE = 2e-3  # the fit has no width below 2000; it is not carried below 340
_RATE = 2e-4  # for all others, as QLoRA has it (arXiv 2305.14314)

CACHES = (None, "memory", "none")  # any other is a folder
_ALPHA = {"lora": 32.0, "dora": 32.0, "rslora": 8.0}
# Of diffusers' examples/text_to_image/train_text_to_image_lora.py
_PICTURE_RATE = 1e-4
_PICTURE_ALPHA: Mapping[str, Callable[[Recipe], float]] = {
    "lora": lambda recipe: float(recipe.rank),
    "dora": lambda recipe: float(recipe.rank),
    "rslora": lambda recipe: math.sqrt(recipe.rank),
}
# Whether they are pictures -> what rows become, and by what
_DIGESTED = {
    False: ("tokens", "chat template and tokenizer"),
    True: ("pictures or captions", "captions and trigger word"),
}
_LENGTH = 1024
_SAVE_AT_MOST = 500  # steps


def rate_for(model_type: str, width: int | None) -> float:
    """Returns the learning rate for a type of model and its width, to three digits."""
    power = next((p for name, p in _POWERS.items() if model_type.startswith(name)), None)
    if power is None or width is None:
        return _RATE
    return float(f"{min(_HIGHEST_RATE, 5e-4 * (2000 / width) ** power):.3g}")


def device_type() -> str:
    """Returns the type of the device that Trainer will take: `cuda`, `cpu` or another."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return "cpu" if found is None else str(found.type)


def _dtype() -> str:
    if device_type() != "cuda":
        return "float32"
    return "bfloat16" if torch.cuda.is_bf16_supported() else "float16"


def before_data(recipe: Recipe, config: Any, tokenizer: PreTrainedTokenizerBase) -> Recipe:
    """Fills in what the base and the machine decide.

    Raises:
        InvalidOption: The base cannot take sequences as long as asked for, or a CPU is asked to
            compute in float16.
    """
    most = longest(config, tokenizer)
    if recipe.max_length is not None and most is not None and recipe.max_length > most:
        raise InvalidOption(
            f"--max-length {recipe.max_length} is more than the {most} tokens that the base takes",
            fix=f"Use --max-length {most} or less.",
            field="max_length",
        )
    lr = recipe.lr if recipe.lr is not None else rate_for(config.model_type, width_of(config))
    return replace(
        recipe,
        revision=recipe.revision or getattr(config, "_commit_hash", None),
        max_length=recipe.max_length or min(_LENGTH, most or _LENGTH),
        held_out=recipe.held_out if recipe.held_out is not None else 0.05,
        alpha=recipe.alpha if recipe.alpha is not None else _ALPHA[recipe.variant],
        today=recipe.today or datetime.date.today().isoformat(),
        dtype=dtype_for(recipe),
        lr=lr,
    )


def dtype_for(recipe: Recipe) -> str:
    """Returns the dtype of base and products; InvalidOption for float16 on a CPU."""
    dtype = recipe.dtype or _dtype()
    if dtype == "float16" and device_type() == "cpu":
        raise InvalidOption(
            "float16 on a CPU trains on rounding errors",
            fix="Use --dtype bfloat16 or float32.",
            field="dtype",
        )
    return dtype


def before_pictures(recipe: Recipe, revision: str | None, resolution: int) -> Recipe:
    """Fills in what a pipeline and the machine decide.

    Args:
        recipe: As told.
        revision: The commit of the base; None for a folder.
        resolution: What the base was made for, pixels a side.

    Raises:
        InvalidOption: A CPU is asked to compute in float16.
    """
    return replace(
        recipe,
        revision=recipe.revision or revision,
        resolution=recipe.resolution or resolution,
        held_out=recipe.held_out if recipe.held_out is not None else 0.05,
        # strength 1, as all programs that train pictures take it
        alpha=recipe.alpha if recipe.alpha is not None else _PICTURE_ALPHA[recipe.variant](recipe),
        dtype=dtype_for(recipe),
        lr=recipe.lr if recipe.lr is not None else _PICTURE_RATE,
        dropout=recipe.dropout or 0.0,
    )


def steps_of(recipe: Recipe, sequences: int, processes: int = 1) -> int:
    """Returns the optimizer steps of a run over so many sequences, as Trainer counts them."""
    if recipe.max_steps is not None:
        return recipe.max_steps
    epochs = 1.0 if recipe.epochs is None else recipe.epochs
    return math.ceil(epochs * _epoch(recipe, sequences, processes))


def _epoch(recipe: Recipe, sequences: int, processes: int) -> int:
    batches = math.ceil(sequences / (recipe.batch_size * processes))
    return max(1, math.ceil(batches / recipe.accumulate))


def processes() -> int:
    """Returns how many processes the launcher started."""
    return int(os.environ.get("WORLD_SIZE", 1))


def is_first_process() -> bool:
    """Says whether this process is the one that writes and speaks."""
    return int(os.environ.get("RANK", 0)) == 0


def after_data(recipe: Recipe, data: Data, sequences: int) -> Recipe:
    """Fills in what the data of a language model decides.

    Args:
        recipe: As `before_data` left it.
        data: What was read.
        sequences: Sequences to learn from, after packing.

    Raises:
        BadDataset: `data_digest` is that of other data.
    """
    several = steps_of(recipe, sequences, processes()) > _epoch(recipe, sequences, processes())
    recipe = replace(
        recipe,
        task=data.task,
        labels=data.labels or None,
        today=recipe.today if data.dated else None,
        dropout=recipe.dropout if recipe.dropout is not None else (0.05 if several else 0.0),
    )
    return after_rows(recipe, data.digest, sequences, judged=len(data.held_out) > 0)


def after_rows(recipe: Recipe, digest: str, rows: int, *, judged: bool) -> Recipe:
    """Fills in what any data decides.

    Args:
        recipe: Resolved but for this.
        digest: SHA-256 of what is learnt and judged by.
        rows: To learn from.
        judged: Whether rows are held out.

    Raises:
        BadDataset: `data_digest` is that of other data.
    """
    if recipe.data_digest not in (None, digest):
        what, files = _DIGESTED[recipe.resolution is not None]
        raise BadDataset(
            f"the data gives other {what} than the run was made with: {digest[:12]} and "
            f"{str(recipe.data_digest)[:12]}",
            fix=f"Restore files, {files} as they were; for a new run leave data_digest out.",
            field="data_digest",
        )
    fifth = max(1, math.ceil(steps_of(recipe, rows, processes()) / 5))
    return replace(
        recipe,
        data_digest=digest,
        held_out=None if recipe.eval_data else recipe.held_out,
        epochs=None if recipe.max_steps is not None else (recipe.epochs or 1.0),
        eval_every=(recipe.eval_every or fifth) if judged else None,
        save_every=recipe.save_every or min(_SAVE_AT_MOST, fifth),
    )


def located(recipe: Recipe) -> Recipe:
    """Returns the recipe with local paths made absolute, so that it holds from any folder."""
    template = recipe.chat_template
    model = recipe.model
    return replace(
        recipe,
        model=os.path.abspath(model) if model and Path(model).is_dir() else model,
        data=tuple(os.path.abspath(p) for p in recipe.data),
        eval_data=tuple(os.path.abspath(p) for p in recipe.eval_data),
        chat_template=template
        if not template or template in TEMPLATES
        else os.path.abspath(template),
        cache=os.path.abspath(recipe.cache) if recipe.cache not in CACHES else recipe.cache,
        out=os.path.abspath(recipe.out) if recipe.out else None,
    )
