"""Runs of language models: chats, texts or labelled texts as sequences of tokens."""

from __future__ import annotations

import datetime
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedTokenizerBase

from hf_lora.attach import attach_lora
from hf_lora.base import fingerprint_of_model
from hf_lora.errors import InvalidOption, listing
from hf_lora.fingerprint import Fingerprint
from hf_lora.formats.peft import WEIGHTS
from hf_lora.manifest import Manifest
from hf_lora.plan import LoraPlan, plan_lora
from hf_lora.record import keep_record, record_of
from hf_lora.training.data import Data, load_data
from hf_lora.training.data.jsonl import Line
from hf_lora.training.data.packing import PackCollator, PackedRows, attends_flat, check_packs
from hf_lora.training.data.tokens import PadCollator, TokenRows
from hf_lora.training.optimizers import lora_optimizer
from hf_lora.training.recipe.estimate import Memory, estimate
from hf_lora.training.recipe.kit import Loaded, adapter_arguments, run_line
from hf_lora.training.recipe.loop import RecipeTrainer, accuracy, arguments
from hf_lora.training.recipe.models import (
    base_labels,
    check_can_quantise,
    checkpoint_activations,
    class_for,
    load_model,
    meta_model,
    read_config,
    read_tokenizer,
)
from hf_lora.training.recipe.presets import (
    after_data,
    before_data,
    device_type,
    processes,
    steps_of,
)
from hf_lora.training.recipe.table import Recipe, flag_of

_SILENCE = 5.0  # seconds


@dataclass(frozen=True)
class TextRun:
    """A run of a language model before its weights are loaded, see `kit.Run`.

    Attributes:
        recipe: Resolved: nothing is left to decide.
        config: Of the base.
        tokenizer: Of the base, with the chat template that is used.
        data: What was read.
        train: Sequences to learn from, packed or not.
        held_out: Sequences to be judged by, likewise.
        steps: Optimizer steps.
    """

    recipe: Recipe
    config: Any
    tokenizer: PreTrainedTokenizerBase
    data: Data
    train: TokenRows | PackedRows
    held_out: TokenRows | PackedRows
    steps: int

    weights = WEIGHTS

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader should know of the data."""
        return self.data.notes

    def counts(self) -> dict[str, Any]:
        """Returns how much there is to learn, as plain data."""
        rows = self.data
        return {
            "task": rows.task,
            "rows": rows.rows,
            "train_sequences": len(rows.train),
            "held_out_sequences": len(rows.held_out),
            "train_tokens": sum(rows.train.lengths),
            "learnt_tokens": rows.train.learnt_tokens,
            "batches": len(self.train),
            "steps": self.steps,
        }

    def counted(self) -> list[str]:
        """Returns how much there is to learn, as lines to show."""
        recipe, data, sizes = self.recipe, self.data, self.counts()
        learnt = f", {sizes['learnt_tokens']:,} of them learnt" if data.task != "label" else ""
        packed = f", packed into {len(self.train)}" if recipe.packing else ""
        tokens = f"{sizes['train_tokens']:,} tokens{learnt}"
        lines = [
            f"Task {data.task}: {len(data.train)} sequences to learn from{packed}, "
            f"{len(data.held_out)} held out, of {data.rows} rows",
            f"  {tokens}; the longest has {max(data.train.lengths)}",
            *(f"  note: {note}" for note in data.notes),
            run_line(recipe, self.steps, "sequences"),
        ]
        if data.labels:
            lines.insert(
                1, f"  classes: {', '.join(f'{i} {n}' for i, n in enumerate(data.labels))}"
            )
        return lines

    def weigh(self) -> tuple[LoraPlan, Memory]:
        """Returns plan and memory of the run, from shapes alone."""
        recipe = self.recipe
        dtype: torch.dtype = getattr(torch, str(recipe.dtype))
        model = meta_model(self.config, self.data.task, self.data.labels, dtype)
        plan = plan_lora(model, **adapter_arguments(recipe))
        attach_lora(model, **adapter_arguments(recipe))
        memory = estimate(
            model,
            rows=recipe.batch_size,
            tokens=max(self.train.lengths),
            dtype=dtype,
            load_in=recipe.load_in,
            optimizer=recipe.optimizer,
            device=device_type(),
            checkpointing=recipe.gradient_checkpointing,
        )
        return plan, memory

    def load(self) -> Loaded:
        """Loads the base and attaches the adapter that the recipe describes."""
        recipe, data = self.recipe, self.data
        transformers.set_seed(recipe.seed)  # a new head is drawn while loading
        model, new = load_model(recipe, self.config, data.task, data.labels)
        if model.config.pad_token_id is None:
            model.config.pad_token_id = _pad_id(self.tokenizer)  # decoders find a row's end by it
        transformers.set_seed(recipe.seed)
        also: dict[str, Any] = {}
        if new:
            heads = plan_lora(model, **adapter_arguments(recipe)).heads
            also = {"train_also": [*(head.path for head in heads), *new]}
        plan = plan_lora(model, **adapter_arguments(recipe), **also)
        attach_lora(model, **adapter_arguments(recipe), **also)
        if recipe.packing:
            check_packs(model)
        if recipe.gradient_checkpointing:
            checkpoint_activations(model)
        record = record_of(model)
        facts = {"task": data.task, **({"labels": list(data.labels)} if data.labels else {})}
        record.manifests[plan.name] = Manifest(training=facts)
        if new:  # their values in the base are chance: no mark of the base, as those of a head
            record.sampled = _without(fingerprint_of_model(model), new)
        keep_record(model, record)
        remarks = (
            f"the base has no weights for {listing(new)}, which is trained whole: load the adapter "
            "with extra_modules=True, merge it with --extra-modules",
        )
        return Loaded(model, plan, remarks if new else ())

    def trainer(self, loaded: Loaded, out: Path) -> RecipeTrainer:
        """Returns the trainer of a loaded model."""
        recipe, pad, model = self.recipe, _pad_id(self.tokenizer), loaded.model
        kind: Any = recipe.optimizer
        rate = float(recipe.lr or 0)
        optimizer = lora_optimizer(model, kind, lr=rate, weight_decay=recipe.weight_decay)
        collator: Any = PadCollator(pad)
        if recipe.packing:
            collator = PackCollator(pad, flat=attends_flat(model))
        trainer = RecipeTrainer(
            model=model,
            args=arguments(recipe, out, self.steps),
            data_collator=collator,
            train_dataset=self.train,
            eval_dataset=self.held_out if recipe.eval_every else None,
            # a checkpoint gets the tokenizer where it has a template that the base's has not
            processing_class=self.tokenizer if self.data.template is not None else None,
            optimizers=(optimizer, None),
            compute_metrics=accuracy if self.data.task == "label" else None,
        )
        trainer.group_by_length = recipe.group_by_length
        return trainer

    def finish(self, out: Path) -> None:
        """Writes what the adapter needs beside it."""
        if self.data.template is not None:  # the base's own does not have it
            self.tokenizer.save_pretrained(out)


def prepare_texts(recipe: Recipe) -> TextRun:
    """Reads config, tokenizer and data, and decides everything that is still open.

    Raises:
        LoraError: One of its subclasses, for whatever cannot be used; nothing has been changed.
    """
    _check_together(recipe)
    config = read_config(recipe)
    tokenizer = read_tokenizer(recipe)
    recipe = before_data(recipe, config, tokenizer)
    if recipe.task is not None:
        class_for(config, recipe.task)  # type: ignore[arg-type]
    data = load_data(
        recipe.data,
        tokenizer,
        max_length=int(recipe.max_length or 0),
        task=recipe.task,  # type: ignore[arg-type]
        eval_paths=recipe.eval_data,
        held_out=recipe.held_out or 0.0,
        seed=recipe.seed,
        labels=recipe.labels or (),
        known_labels=base_labels(config),
        template=recipe.chat_template,
        today=datetime.date.fromisoformat(str(recipe.today)),
        progress=_counting,
    )
    class_for(config, data.task)
    _check_for_task(recipe, data)
    _check_vocabulary(config, data)
    train: TokenRows | PackedRows = data.train
    held: TokenRows | PackedRows = data.held_out
    if recipe.packing:
        length = int(recipe.max_length or 0)
        train, held = PackedRows(data.train, length), PackedRows(data.held_out, length)
    if data.template is not None:
        tokenizer.chat_template = data.template
    recipe = after_data(recipe, data, len(train))
    steps = steps_of(recipe, len(train), processes())
    return TextRun(recipe, config, tokenizer, data, train, held, steps)


def _counting(lines: Iterable[Line]) -> Iterator[Line]:
    """Says on stderr how far reading is, where it takes long."""
    said = time.monotonic()
    for number, line in enumerate(lines, 1):
        yield line
        if time.monotonic() - said > _SILENCE:
            said = time.monotonic()
            sys.stderr.write(f"{number:,} rows read\n")


def _check_together(recipe: Recipe) -> None:
    if recipe.packing and recipe.group_by_length:
        raise InvalidOption(
            "--packing and --group-by-length both decide what a batch holds",
            fix="Give one of them.",
        )
    if recipe.load_in is not None:
        check_can_quantise()


def _check_for_task(recipe: Recipe, data: Data) -> None:
    """Refuses what another task than that of the rows would need."""
    if recipe.packing and data.task == "label":
        raise InvalidOption(
            "--packing is for texts; a classifier reads one row at a time",
            fix="Use --group-by-length.",
            field="packing",
        )
    for name, task in (("labels", "label"), ("chat_template", "chat")):
        if getattr(recipe, name) and data.task != task:
            raise InvalidOption(
                f"{flag_of(name)} is for the task {task!r}, and the rows are of {data.task!r}",
                fix="Leave it out, or give data for that task.",
                field=name,
            )


def _check_vocabulary(config: Any, data: Data) -> None:
    size = getattr(config.get_text_config(), "vocab_size", None)
    if isinstance(size, int) and data.train.largest_id >= size:
        raise InvalidOption(
            f"the tokenizer makes the token {data.train.largest_id}, and the base knows {size}",
            fix="Use the tokenizer that the base was trained with.",
            field="model",
        )


def _without(found: Fingerprint, parts: Sequence[str]) -> Fingerprint:
    inside = tuple(f"{part}." for part in parts)
    kept = {n: sample for n, sample in found.tensors.items() if not n.startswith(inside)}
    return Fingerprint(kept)


def _pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Returns a token for padding, which neither attention nor loss reads."""
    for number in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(number, int):
            return number
    return 0
