"""A recipe's trainer: losses weighted by tokens, an order that a resumed run repeats."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Sampler
from transformers import ProgressCallback, TrainingArguments

from hf_lora.training.data.packing import LengthSampler
from hf_lora.training.data.tokens import IGNORED
from hf_lora.training.recipe.presets import device_type
from hf_lora.training.recipe.table import Recipe
from hf_lora.training.trainer import LoraTrainer

_MIXED = {"bfloat16": {"bf16": True}, "float16": {"fp16": True}, "float32": {}}
_LOGS = 200  # points of the loss curve, about


class RecipeTrainer(LoraTrainer):
    """`LoraTrainer` whose held-out loss is the mean over all tokens of the held-out rows.

    Trainer's own is a mean over batches, which changes with their size and with packing. With
    several processes a few rows may count twice: accelerate fills the last batch up with them.
    """

    group_by_length = False

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        rows: Any = self.train_dataset if train_dataset is None else train_dataset
        if not self.group_by_length:
            return super()._get_train_sampler(train_dataset)
        batch = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return LengthSampler(rows.lengths, batch * self.args.world_size, self.args.seed)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluates as Trainer does, and puts the loss over tokens in the place of its own."""
        self._seen = torch.zeros(2, dtype=torch.float64)
        output: Any = super().evaluation_loop(*args, **kwargs)
        summed: Any = self.accelerator.reduce(self._seen.to(self._number_device()), "sum")
        loss, tokens = summed.tolist()
        if tokens:
            prefix = kwargs.get("metric_key_prefix", "eval")
            output.metrics[f"{prefix}_loss"] = loss / tokens
        return output

    def _number_device(self) -> torch.device:
        # Apple's has no float64, and one process has nothing to send
        return self.args.device if self.args.world_size > 1 else torch.device("cpu")

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Predicts as Trainer does, and adds up the losses of tokens."""
        labels = inputs["labels"]
        step = super().prediction_step(model, inputs, *args, **kwargs)
        if labels.ndim == 2 and step[0] is not None:
            tokens = int((labels[:, 1:] != IGNORED).sum())
            self._seen += torch.tensor([float(step[0]) * tokens, tokens], dtype=torch.float64)
        return step


class Progress(ProgressCallback):
    """Trainer's progress bar, with the last losses behind it and no line for each of them."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Shows the losses; all other figures are in the report."""
        bar: Any = self.training_bar
        if bar is not None:
            known = {name: logs[key] for key, name in _SHOWN.items() if key in logs}
            self._losses = {**getattr(self, "_losses", {}), **known}
            bar.set_postfix({k: f"{v:.3f}" for k, v in self._losses.items()})


_SHOWN = {"loss": "loss", "eval_loss": "held-out", "eval_accuracy": "accuracy"}


def accuracy(prediction: Any) -> Mapping[str, float]:
    """Returns the share of rows whose class has the highest logit."""
    logits = prediction.predictions
    logits = logits[0] if isinstance(logits, tuple) else logits
    return {"accuracy": float((np.argmax(logits, axis=-1) == prediction.label_ids).mean())}


def arguments(recipe: Recipe, out: Path, steps: int) -> TrainingArguments:
    """Returns Trainer's arguments for a resolved recipe.

    Args:
        recipe: Resolved.
        out: Where checkpoints go.
        steps: Of the run.
    """
    span: dict[str, Any] = (
        {"max_steps": steps} if recipe.epochs is None else {"num_train_epochs": recipe.epochs}
    )
    mixed: dict[str, Any] = _MIXED[str(recipe.dtype)]
    evaluates = recipe.eval_every is not None
    return TrainingArguments(
        output_dir=str(out),
        per_device_train_batch_size=recipe.batch_size,
        per_device_eval_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.accumulate,
        learning_rate=float(recipe.lr or 0),
        lr_scheduler_type=_SCHEDULES[recipe.schedule],
        warmup_steps=math.ceil(recipe.warmup * steps),
        weight_decay=recipe.weight_decay,
        logging_steps=max(1, steps // _LOGS),
        eval_strategy="steps" if evaluates else "no",
        eval_steps=recipe.eval_every,
        save_strategy="steps",
        save_steps=recipe.save_every or steps,
        save_total_limit=recipe.keep,
        prediction_loss_only=recipe.task != "label",
        remove_unused_columns=False,  # rows have no other columns
        seed=recipe.seed,
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),  # without a GPU it only warns
        use_cpu=device_type() == "cpu",  # else bf16 is refused there
        disable_tqdm=False,  # else quiet logs switch the progress bar off, too
        **span,
        **mixed,
    )


_SCHEDULES = {
    "linear": "linear",
    "cosine": "cosine",
    "constant": "constant_with_warmup",
}
