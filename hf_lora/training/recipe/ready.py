"""A recipe made ready: where it goes, what it reads, and everything decided but the weights."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from hf_lora.errors import InvalidOption, TrainingError, listing
from hf_lora.formats import FILES
from hf_lora.training.checkpoints import newest_complete
from hf_lora.training.recipe import differing, make_recipe
from hf_lora.training.recipe.file import FILE, read_recipe
from hf_lora.training.recipe.kit import Run
from hf_lora.training.recipe.models import read_config
from hf_lora.training.recipe.pictures import prepare_pictures
from hf_lora.training.recipe.pipelines import is_pipeline
from hf_lora.training.recipe.presets import located, processes
from hf_lora.training.recipe.table import FIELDS, Base, Recipe, flag_of
from hf_lora.training.recipe.texts import prepare_texts

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
    "resolution": ("data_digest",),
    "trigger": ("data_digest",),
}
# Kind of base -> how its run is made ready.
_PREPARE: Mapping[Base, Callable[[Recipe], Run]] = {
    "language model": prepare_texts,
    "pipeline": prepare_pictures,
}
_ADAPTER = {name for names in FILES for name in names}


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


def prepare(recipe: Recipe) -> Run:
    """Reads the base's configs and the data, and decides everything that is still open.

    Raises:
        LoraError: One of its subclasses, for whatever cannot be used; nothing has been changed.
    """
    _check_together(recipe)
    base: Base = "pipeline" if is_pipeline(recipe) else "language model"
    if base == "language model":
        read_config(recipe)  # what is no base at all is no fault of the options
    _check_for_base(recipe, base)
    return _PREPARE[base](recipe)


def _check_together(recipe: Recipe) -> None:
    """Refuses what cannot be had together, before anything is read."""
    if recipe.epochs is not None and recipe.max_steps is not None:
        raise InvalidOption("--epochs and --max-steps both say how long", fix="Give one of them.")
    if recipe.eval_data and recipe.held_out:
        raise InvalidOption(
            "--eval-data and --held-out both say what to be judged by",
            fix="Give one of them.",
            field="held_out",
        )


def _check_for_base(recipe: Recipe, base: Base) -> None:
    """Refuses options that this kind of base does not have."""
    for name, row in FIELDS.items():
        only = row.metadata["only"]
        if only not in ("", base) and getattr(recipe, name) != row.default:
            raise InvalidOption(
                f"{flag_of(name)} is for a {only}, and {str(recipe.model)!r} is a {base}",
                fix="Leave it out, or give another --model.",
                field=name,
            )


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
    adapter = there & _ADAPTER
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


def make_ready(recipe: Recipe, out: Path | None, *, first: bool) -> Run:
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
