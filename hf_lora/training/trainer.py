"""`Trainer` with an adapter attached in place: saved alone, resumed exactly, best model at the end.

Trainer resolves and loads checkpoints before any callback runs, and asks `isinstance(PeftModel)`
for adapter-only work, so this cannot be a callback. What it does differently:

- A save writes the adapter, never the base, and marks the checkpoint complete when all is on disk.
- `resume_from_checkpoint=True` takes the newest complete checkpoint; one that is incomplete, or of
  another adapter or base, is an error and never a run that silently differs.
- Values go back into the parameters that are there, bit for bit, `load_best_model_at_end` included.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import save_fsdp_optimizer
from torch import nn
from transformers import Trainer
from transformers.trainer import SCHEDULER_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from hf_lora.errors import BadCheckpoint, BadDataset, listing
from hf_lora.formats import read_header
from hf_lora.save import save_lora
from hf_lora.training.batches import without_loss
from hf_lora.training.callback import LoraCallback
from hf_lora.training.checkpoints import (
    checked,
    mark_complete,
    mark_incomplete,
    newest_complete,
    prune,
)
from hf_lora.training.keep import remember
from hf_lora.training.processes import check_processes
from hf_lora.training.restore import Trained, restore_adapter, trained_adapter
from hf_lora.training.sharding import gathered, sample_base, unreached

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object

logger = logging.get_logger(__name__)


class LoraTrainerMixin(_Base):
    """Makes any `Trainer` class train an adapter that was attached in place.

    Put it before the class: `class LoraSFTTrainer(LoraTrainerMixin, SFTTrainer)`. Arguments are
    those of the class. A `LoraCallback` is added unless one is given.

    Raises:
        TrainingError: The model has no adapter, several active ones, or a frozen one.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not any(isinstance(c, LoraCallback) for c in self.callback_handler.callbacks):
            self.add_callback(LoraCallback())
        check_processes(
            self.args, self.accelerator.state, model=self.model, processes=self._lora.processes
        )
        self._check_adapter()

    def _check_adapter(self) -> None:
        """Raises TrainingError where the model has no adapter to train."""
        made_later: Any = self.model_init
        if made_later is None:
            trained_adapter(self.model, self._lora.name)

    @property
    def _lora(self) -> LoraCallback:
        """The callback, looked up each time: Trainer may make it anew when it resumes."""
        handlers = self.callback_handler.callbacks
        return next(c for c in handlers if isinstance(c, LoraCallback))

    def _trained(self) -> Trained:
        return trained_adapter(self.model, self._lora.name)

    # --- resuming ---------------------------------------------------------------------------

    def train(
        self,
        resume_from_checkpoint: str | os.PathLike[str] | bool | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Trains as `Trainer.train` does.

        Args:
            resume_from_checkpoint: True for the newest complete checkpoint of the output folder, or
                the path of one.
            args: Of the trainer's own `train`.
            kwargs: Of the trainer's own `train`.

        Raises:
            BadCheckpoint: There is no complete checkpoint, the one given is not, or it is of
                another adapter, base or number of processes.
            BadDataset: There are no rows to train on, or they have no column that the model takes
                or no labels.
            TrainingError: The optimizer misses parameters, values are no numbers, or processes are
                not as asked, see `LoraCallback`.
        """
        self._lora.join()
        # before torch finds an optimizer without parameters, or a sampler without rows
        self._check_adapter()
        rows: Any = self.train_dataset
        if hasattr(rows, "__len__") and not len(rows):
            raise BadDataset("the training data is empty", field="train_dataset")
        if self.is_fsdp_enabled and self.model is not None:
            sample_base(self.model)  # shards cannot be sampled
        found: str | None = None
        if resume_from_checkpoint is True:
            newest, skipped = newest_complete(
                self._get_output_dir(None),
                world_size=self.args.world_size,
            )
            for name, why in skipped.items():
                logger.warning(f"{name} is passed over: {why}")
            found = str(newest.path)
        elif resume_from_checkpoint:
            path = Path(os.fspath(resume_from_checkpoint))
            found = str(checked(path, world_size=self.args.world_size).path)
        return super().train(found, *args, **kwargs)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        restore_adapter(self._trained(), resume_from_checkpoint)
        self._lora.load_state(Path(resume_from_checkpoint))

    def _load_callback_state(self) -> None:
        before = self._lora
        super()._load_callback_state()
        self._lora.replace(before)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        optimizer: Any = self.optimizer
        settings = [set(group) for group in optimizer.param_groups]
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
            # torch takes the settings of another kind of optimizer without a word
            held = [set(group) for group in optimizer.param_groups]
            lost = sorted(set().union(*(s - h for s, h in zip(settings, held, strict=True))))
            if lost:
                raise ValueError(f"it has no {listing(lost)}")
        except (ValueError, KeyError, RuntimeError) as error:
            raise BadCheckpoint(
                f"its optimizer does not fit this run's: {error}",
                fix="Train with the same optimizer and parameter groups as that run.",
                file=str(checkpoint),
            ) from None

    def _load_best_model(self) -> None:
        best = str(self.state.best_model_checkpoint)
        logger.info(f"Loading the best adapter from {best} (score {self.state.best_metric})")
        try:
            restore_adapter(self._trained(), best)
        except BadCheckpoint as error:
            raise BadCheckpoint(
                f"the best checkpoint cannot be loaded, the model holds the last step's weights: "
                f"{error.fact}",
                fix=error.fix,
                file=best,
            ) from None

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Trains on one batch.

        Raises:
            TrainingError: DDP misses gradients of the adapter.
            BadDataset: The batch has nothing that the model takes, or no labels.
        """
        named: Exception | None
        held = dict(inputs) if isinstance(inputs, Mapping) else inputs  # labels may be taken out
        try:
            return super().training_step(model, inputs, *args, **kwargs)
        except RuntimeError as error:
            named = unreached(error, self._trained().model)
            if named is None:
                raise
        except ValueError as error:
            # a model that needs no labels has said what it lacks
            named = None if self.can_return_loss else without_loss(held, self.label_names)
            if named is None:
                raise
            raise named from error
        raise named

    def _remove_unused_columns(self, dataset: Any, description: str | None = None) -> Any:
        try:
            return super()._remove_unused_columns(dataset, description)
        except ValueError as error:
            raise BadDataset(str(error)) from None

    # --- saving -----------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run = Path(self._get_output_dir(trial))
        folder = run / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            mark_incomplete(folder)
        # rotating is for afterwards: older checkpoints stay until this one is complete
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()  # each process has written its random states
        if not self.args.should_save:
            return
        torch.save(self.args, folder / TRAINING_ARGS_NAME)  # once more, with the limit
        self._lora.save_state(folder)
        mark_complete(
            folder,
            step=self.state.global_step,
            world_size=self.args.world_size,
            adapter=read_header(folder).digest,
        )
        best = self.state.best_model_checkpoint
        prune(run, limit, [folder, Path(best)] if best else [folder])

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the adapter; every process must call it."""
        if not self.is_fsdp_enabled:
            super().save_model(output_dir, _internal_call)
            return
        self._save(output_dir)  # Trainer would gather the whole base first, or save nothing
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        # Trainer writes the whole base beside it: it asks isinstance(PeftModel) for the adapter's
        save_fsdp_optimizer(
            self.accelerator.state.fsdp_plugin,
            self.accelerator,
            self.optimizer,
            self.model,
            output_dir,
        )
        if self.args.should_save and self.lr_scheduler is not None:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir if output_dir is not None else str(self.args.output_dir))
        trained = self._trained()
        with gathered(trained.model, trained.name):  # each process has a part of it under FSDP2
            if self.args.should_save:
                remember(trained, self.args, self.state)
                save_lora(trained.host, folder, name=trained.name)
        if not self.args.should_save:
            return
        tokenizer: Any = self.processing_class or getattr(self.data_collator, "tokenizer", None)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        torch.save(self.args, folder / TRAINING_ARGS_NAME)  # as Trainer does, for other tools

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Logs as `Trainer.log` does, with the adapter's own figures for every reporter."""
        self._lora.add_figures(logs)
        super().log(logs, *args, **kwargs)


class LoraTrainer(LoraTrainerMixin, Trainer):
    """`transformers.Trainer` for a model with an adapter attached in place; same arguments."""
