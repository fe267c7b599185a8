"""`hf-lora train`: recipe -> data, model, trainer, adapter."""

from __future__ import annotations

import contextlib
import logging
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import transformers
from transformers import ProgressCallback

from hf_lora.formats.disk import Files, replace_files
from hf_lora.plan import LoraPlan
from hf_lora.save import save_lora
from hf_lora.training.recipe.file import FILE, write_recipe
from hf_lora.training.recipe.kit import Run
from hf_lora.training.recipe.loop import Progress
from hf_lora.training.recipe.presets import is_first_process
from hf_lora.training.recipe.ready import make_ready
from hf_lora.training.recipe.table import Recipe
from hf_lora.training.sharding import gathered

Log = Callable[[str], None]


def train(recipe: Recipe, log: Log = lambda _: None) -> dict[str, Any]:
    """Trains an adapter as a recipe says.

    Args:
        recipe: From `gather`.
        log: Receives what is known before the run, some lines at a time.

    Returns:
        Plain data: `lines` to show, losses before and after, sizes, times. Nothing on all but the
        first of several processes.

    Raises:
        LoraError: One of its subclasses. Before the first step nothing has been written.
    """
    out, first = Path(str(recipe.out)), is_first_process()
    log = log if first else lambda _: None
    run = make_ready(recipe, out, first=first)
    for line in run.counted():
        log(line)
    began = time.perf_counter()
    loaded = run.load()
    for remark in loaded.remarks:
        log(f"  note: {remark}")
    trainer = run.trainer(loaded, out)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(Progress)
    if first and not recipe.resume:
        _write_recipe(out, run.recipe)
    # Trainer writes losses to stdout, which is for results
    with _warnings(), contextlib.redirect_stdout(sys.stderr):
        before = trainer.evaluate() if run.recipe.eval_every else {}
        trainer.train(resume_from_checkpoint=True if recipe.resume else None)
        after = _last_evaluation(trainer) if run.recipe.eval_every else {}
    with gathered(loaded.model, loaded.plan.name):
        if first:
            save_lora(getattr(loaded.model, "lora_host", loaded.model), out)
    if not first:
        return {}
    run.finish(out)
    seconds = time.perf_counter() - began
    notes = [*run.notes, *loaded.remarks]
    return _result(run, loaded.plan, trainer, before, after, seconds, notes)


@contextlib.contextmanager
def _warnings() -> Iterator[None]:
    """Lets Trainer's and our warnings through: loading was quiet, the run should not be."""
    ours: Any = transformers.logging
    before = ours.get_verbosity()
    ours.set_verbosity_warning()
    # says of every product in 8 bit that its input is cast (bitsandbytes 0.50)
    theirs = logging.getLogger("bitsandbytes.autograd._functions")
    level = theirs.level
    theirs.setLevel(logging.ERROR)
    try:
        yield
    finally:
        ours.set_verbosity(before)
        theirs.setLevel(level)


def _write_recipe(out: Path, recipe: Recipe) -> None:
    """Writes the resolved recipe where the run begins; from here on the folder is the run's."""
    out.mkdir(parents=True, exist_ok=True)
    told = replace(recipe, resume=False, dry_run=False)
    text = write_recipe(told, f"hf-lora train --config {FILE} --out NEW repeats this run.")
    replace_files(Files(out, {FILE: [text.encode()]}))


def _last_evaluation(trainer: Any) -> Mapping[str, Any]:
    """Returns the evaluation of the final weights, which the run may have made already."""
    history: list[Mapping[str, Any]] = trainer.state.log_history
    known = [
        row for row in history if "eval_loss" in row and row["step"] == trainer.state.max_steps
    ]
    made: Mapping[str, Any] = known[-1] if known else trainer.evaluate()
    return made


def _result(
    run: Run,
    plan: LoraPlan,
    trainer: Any,
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    seconds: float,
    notes: Sequence[str],
) -> dict[str, Any]:
    recipe, out = run.recipe, str(run.recipe.out)
    size = (Path(out) / run.weights).stat().st_size
    model = trainer.model
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    facts: dict[str, Any] = {
        "out": out,
        **run.counts(),
        "held_out_loss": {"before": before.get("eval_loss"), "after": after.get("eval_loss")},
        "trainable_parameters": trained,
        "host_parameters": plan.host_parameters,
        "adapter_bytes": size,
        "seconds": seconds,
        "device": str(trainer.args.device),
        "notes": list(notes),
        "recipe": recipe.to_dict(),
        "next": [shlex.join(["hf-lora", "verify", out, "--base", str(recipe.model)])],
    }
    lines = []
    if before:
        lines.append(f"held-out loss {_change(before, after, 'eval_loss')}")
    if "eval_accuracy" in after:
        facts["accuracy"] = {
            n: x["eval_accuracy"] for n, x in (("before", before), ("after", after))
        }
        lines.append(f"held-out accuracy {_change(before, after, 'eval_accuracy')}")
    lines += [
        f"trainable parameters {trained:,} beside {plan.host_parameters:,}",
        f"{run.steps} steps in {seconds:.0f} s on {trainer.args.device}",
        f"adapter {size / 1e6:.1f} MB in {out}, with {FILE} and report.json",
        f"next: {facts['next'][0]}",
    ]
    return {**facts, "lines": lines}


def _change(before: Mapping[str, Any], after: Mapping[str, Any], name: str) -> str:
    return f"{before[name]:.3f} -> {after[name]:.3f}"
