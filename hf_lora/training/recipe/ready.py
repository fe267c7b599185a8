"""A recipe made ready: where it goes, what it reads, and everything decided but the weights."""

from __future__ import annotations

import contextlib
import datetime
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from peft import LoraConfig
from transformers import PreTrainedTokenizerBase

from hf_lora.errors import InvalidOption, TrainingError, listing
from hf_lora.formats.peft import CONFIG, WEIGHTS
from hf_lora.training.checkpoints import newest_complete
from hf_lora.training.data import Data, load_data
from hf_lora.training.data.jsonl import Line
from hf_lora.training.data.packing import PackedRows
from hf_lora.training.data.tokens import TokenRows
from hf_lora.training.recipe import Recipe, differing, flag_of, make_recipe
from hf_lora.training.recipe.file import FILE, read_recipe
from hf_lora.training.recipe.models import (
    base_labels,
    check_can_quantise,
    class_for,
    read_config,
    read_tokenizer,
)
from hf_lora.training.recipe.presets import after_data, before_data, located, processes, steps_of

_SILENCE = 5.0  # seconds
# A flag -> the rows of a file that do not hold any more where it is given.
_OUTDATES: Mapping[str, tuple[str, ...]] = {
    "model": ("revision", "data_digest"),
    "data": ("labels", "data_digest"),
    "eval_data": ("held_out", "data_digest"),
    "held_out": ("eval_data", "data_digest"),
    "seed": ("data_digest",),
    "task": ("labels", "data_digest"),
    "chat_template": ("data_digest",),
    "today": ("data_digest",),
    "max_length": ("data_digest",),
    "epochs": ("max_steps",),
    "max_steps": ("epochs",),
}


@dataclass(frozen=True)
class Ready:
    """A run before its weights are loaded.

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


def gather(flags: Mapping[str, Any]) -> Recipe:
    """Returns the recipe of flags over a file: `--config`, or that of the run to be resumed.

    Args:
        flags: Row -> value as given, `config` among them.

    Raises:
        InvalidOption: A file or value cannot be used, or the model, the data or `out` is missing.
    """
    given = {name: value for name, value in flags.items() if name != "config"}
    source = flags.get("config")
    if source is None and given.get("resume") and given.get("out"):
        source = Path(str(given["out"])) / FILE
        if not source.is_file():
            raise InvalidOption(
                f"{str(given['out'])!r} holds no run to resume: it has no {FILE}",
                fix="Leave --resume out, or name the folder of a run.",
                field="resume",
            )
    known = {} if source is None else read_recipe(source)
    outdated = {row for flag in given for row in _OUTDATES.get(flag, ())}
    known = {name: value for name, value in known.items() if name not in outdated}
    recipe = located(make_recipe({**known, **given}))
    for name in ("model", "data", *(() if recipe.dry_run and not recipe.resume else ("out",))):
        if not getattr(recipe, name):
            raise InvalidOption(
                f"{flag_of(name)} is missing",
                fix=f"Give it as a flag, or as {name}: in a file named by --config.",
                field=name,
            )
    return recipe


def prepare(recipe: Recipe) -> Ready:
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
    return Ready(recipe, config, tokenizer, data, train, held, steps)


def _counting(lines: Iterable[Line]) -> Iterator[Line]:
    """Says on stderr how far reading is, where it takes long."""
    said = time.monotonic()
    for number, line in enumerate(lines, 1):
        yield line
        if time.monotonic() - said > _SILENCE:
            said = time.monotonic()
            sys.stderr.write(f"{number:,} rows read\n")


def _check_together(recipe: Recipe) -> None:
    """Refuses what cannot be had together, before anything is read."""
    if recipe.epochs is not None and recipe.max_steps is not None:
        raise InvalidOption("--epochs and --max-steps both say how long", fix="Give one of them.")
    if recipe.packing and recipe.group_by_length:
        raise InvalidOption(
            "--packing and --group-by-length both decide what a batch holds",
            fix="Give one of them.",
        )
    if recipe.eval_data and recipe.held_out:
        raise InvalidOption(
            "--eval-data and --held-out both say what to be judged by",
            fix="Give one of them.",
            field="held_out",
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


def adapter_arguments(recipe: Recipe) -> dict[str, Any]:
    """Returns the arguments of `attach_lora` and `plan_lora`."""
    targets = list(recipe.targets)
    where = {"targets": targets if len(targets) > 1 else targets[0]}
    size = {"rank": recipe.rank, "alpha": recipe.alpha, "dropout": recipe.dropout or 0.0}
    if recipe.variant == "lora":
        return {**where, **size}
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,  # type: ignore[arg-type]
        lora_dropout=recipe.dropout or 0.0,
        use_dora=recipe.variant == "dora",
        use_rslora=recipe.variant == "rslora",
    )
    return {**where, "config": config}


def counts(ready: Ready) -> dict[str, Any]:
    """Returns how much there is to learn, as plain data."""
    rows = ready.data
    return {
        "task": rows.task,
        "rows": rows.rows,
        "train_sequences": len(rows.train),
        "held_out_sequences": len(rows.held_out),
        "train_tokens": sum(rows.train.lengths),
        "learnt_tokens": rows.train.learnt_tokens,
        "batches": len(ready.train),
        "steps": ready.steps,
    }


def counted(ready: Ready) -> list[str]:
    """Returns how much there is to learn, as lines to show."""
    recipe, data, sizes = ready.recipe, ready.data, counts(ready)
    learnt = f", {sizes['learnt_tokens']:,} of them learnt" if data.task != "label" else ""
    packed = f", packed into {len(ready.train)}" if recipe.packing else ""
    lines = [
        f"Task {data.task}: {len(data.train)} sequences to learn from{packed}, "
        f"{len(data.held_out)} held out, of {data.rows} rows",
        f"  {sizes['train_tokens']:,} tokens{learnt}; the longest has {max(data.train.lengths)}",
        *(f"  note: {note}" for note in data.notes),
        f"{ready.steps} steps of {recipe.batch_size * recipe.accumulate * processes()} sequences, "
        f"rate {recipe.lr:g} ({recipe.schedule}), {recipe.optimizer}, dropout {recipe.dropout:g}, "
        f"{recipe.dtype}",
    ]
    if data.labels:
        lines.insert(1, f"  classes: {', '.join(f'{i} {n}' for i, n in enumerate(data.labels))}")
    return lines


def check_out(out: Path, *, resume: bool) -> None:
    """Checks that a run may write into a folder, and that a run to be resumed is there.

    Raises:
        InvalidOption: The folder holds an adapter, another run or other files; or there is no run
            to resume.
        TrainingError: The run to be resumed is finished.
    """
    if out.exists() and not out.is_dir():
        raise InvalidOption(f"{str(out)!r} is a file, not a folder", fix="Name a new folder.")
    there = {path.name for path in out.iterdir()} if out.is_dir() else set()
    adapter = there & {WEIGHTS, CONFIG}
    if resume:
        if FILE not in there:
            raise InvalidOption(f"{str(out)!r} holds no run to resume", field="resume")
        if adapter:
            raise TrainingError(
                f"the run in {str(out)!r} is finished: its adapter lies there",
                fix="To train more, start a new run in another folder.",
            )
        return
    if adapter:
        raise InvalidOption(
            f"{str(out)!r} holds an adapter already", fix="Name a new folder.", field="out"
        )
    run = sorted(name for name in there if name.startswith("checkpoint-"))
    if run or there - {FILE}:
        what = f"another run ({listing([*run, FILE])})" if run else listing(sorted(there))
        raise InvalidOption(
            f"{str(out)!r} holds {what}",
            fix="Name a new folder" + (", or go on with that run: --resume." if run else "."),
            field="out",
        )


def try_to_write(out: Path) -> None:
    """Makes the folder and takes it away again: that it cannot be is no news after an hour.

    Raises:
        InvalidOption: It cannot be made, or nothing can be written in it.
    """
    made = [path for path in (out, *out.parents) if not path.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise InvalidOption(
            f"{str(out)!r} cannot be written ({why})", fix="Name another folder.", field="out"
        ) from None
    finally:
        for path in made:
            with contextlib.suppress(OSError, ValueError):
                path.rmdir()


def make_ready(recipe: Recipe, out: Path | None, *, first: bool) -> Ready:
    """Checks where the run goes, and of a resumed one that it is the same; then reads the data.

    Args:
        recipe: From `gather`.
        out: The folder to write; None in a dry run without one.
        first: Whether this process is the one that writes.

    Raises:
        LoraError: One of its subclasses, for whatever cannot be used, a run to be resumed without
            a complete checkpoint among it; nothing has been changed.
    """
    if out is None:
        return prepare(recipe)
    if first:
        check_out(out, resume=recipe.resume)
    if not recipe.resume:
        if first:
            try_to_write(out)
        return prepare(recipe)
    saved = make_recipe(read_recipe(out / FILE))
    recipe = _as_before(recipe, saved)
    _check_same(recipe, saved, out)  # before anything is read
    newest_complete(out, world_size=processes())
    ready = prepare(recipe)
    _check_same(ready.recipe, saved, out)
    return ready


def _as_before(recipe: Recipe, saved: Recipe) -> Recipe:
    """Puts what the first run decided in the place of what is left open."""
    left = {
        f.name: getattr(saved, f.name)
        for f in fields(Recipe)
        if getattr(recipe, f.name) is None and f.name not in ("epochs", "max_steps")
    }
    if recipe.epochs is None and recipe.max_steps is None:
        left |= {"epochs": saved.epochs, "max_steps": saved.max_steps}
    return replace(recipe, **left)


def _check_same(recipe: Recipe, saved: Recipe, out: Path) -> None:
    other = differing(recipe, saved)
    if other:
        changes = listing(
            (f"{flag_of(n)} {getattr(saved, n)} -> {getattr(recipe, n)}" for n in other), limit=8
        )
        raise InvalidOption(
            f"the run in {str(out)!r} was another one: {changes}",
            fix="Resume with what it began with (--resume and --out are enough), or start a new "
            "run in another folder.",
            field=other[0],
        )
