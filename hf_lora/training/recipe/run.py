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
from transformers import PreTrainedTokenizerBase, ProgressCallback

from hf_lora.attach import attach_lora
from hf_lora.base import fingerprint_of_model
from hf_lora.errors import listing
from hf_lora.fingerprint import Fingerprint
from hf_lora.formats.disk import Files, replace_files
from hf_lora.formats.peft import WEIGHTS
from hf_lora.manifest import Manifest
from hf_lora.plan import LoraPlan, plan_lora
from hf_lora.record import keep_record, record_of
from hf_lora.save import save_lora
from hf_lora.training.data.packing import PackCollator, attends_flat, check_packs
from hf_lora.training.data.tokens import PadCollator
from hf_lora.training.optimizers import lora_optimizer
from hf_lora.training.recipe import Recipe
from hf_lora.training.recipe.file import FILE, write_recipe
from hf_lora.training.recipe.loop import Progress, RecipeTrainer, accuracy, arguments
from hf_lora.training.recipe.models import checkpoint_activations, load_model
from hf_lora.training.recipe.presets import is_first_process
from hf_lora.training.recipe.ready import (
    Ready,
    adapter_arguments,
    counted,
    counts,
    make_ready,
)
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
    ready = make_ready(recipe, out, first=first)
    for line in counted(ready):
        log(line)
    began = time.perf_counter()
    model, plan, remarks = _attached(ready)
    for remark in remarks:
        log(f"  note: {remark}")
    ready = replace(ready, data=replace(ready.data, notes=(*ready.data.notes, *remarks)))
    trainer = _trainer(ready, model, out)
    if first and not recipe.resume:
        _write_recipe(out, ready.recipe)
    # Trainer writes losses to stdout, which is for results
    with _warnings(), contextlib.redirect_stdout(sys.stderr):
        before = trainer.evaluate() if ready.recipe.eval_every else {}
        trainer.train(resume_from_checkpoint=True if recipe.resume else None)
        after = _last_evaluation(trainer) if ready.recipe.eval_every else {}
    with gathered(model, plan.name):
        if first:
            save_lora(model, out)
    if not first:
        return {}
    if ready.data.template is not None:  # the base's own does not have it
        ready.tokenizer.save_pretrained(out)
    return _result(ready, plan, trainer, before, after, time.perf_counter() - began)


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


def _attached(ready: Ready) -> tuple[Any, LoraPlan, tuple[str, ...]]:
    """Loads the base and attaches the adapter that the recipe describes.

    Returns:
        The model, what was attached, and remarks on it.
    """
    recipe, data = ready.recipe, ready.data
    transformers.set_seed(recipe.seed)  # a new head is drawn while loading
    model, new = load_model(recipe, ready.config, data.task, data.labels)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = _pad_id(ready.tokenizer)  # decoders find a row's end by it
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
    remarks = [
        f"the base has no weights for {listing(new)}, which is trained whole: load the adapter "
        "with extra_modules=True, merge it with --extra-modules"
    ]
    return model, plan, tuple(remarks if new else ())


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


def _trainer(ready: Ready, model: Any, out: Path) -> RecipeTrainer:
    recipe, pad = ready.recipe, _pad_id(ready.tokenizer)
    kind: Any = recipe.optimizer
    rate = float(recipe.lr or 0)
    optimizer = lora_optimizer(model, kind, lr=rate, weight_decay=recipe.weight_decay)
    collator: Any = PadCollator(pad)
    if recipe.packing:
        collator = PackCollator(pad, flat=attends_flat(model))
    trainer = RecipeTrainer(
        model=model,
        args=arguments(recipe, out, ready.steps),
        data_collator=collator,
        train_dataset=ready.train,
        eval_dataset=ready.held_out if recipe.eval_every else None,
        # a checkpoint gets the tokenizer where it has a template that the base's has not
        processing_class=ready.tokenizer if ready.data.template is not None else None,
        optimizers=(optimizer, None),
        compute_metrics=accuracy if ready.data.task == "label" else None,
    )
    trainer.group_by_length = recipe.group_by_length
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(Progress)
    return trainer


def _write_recipe(out: Path, recipe: Recipe) -> None:
    """Writes the resolved recipe where the run begins; from here on the folder is the run's."""
    out.mkdir(parents=True, exist_ok=True)
    told = replace(recipe, resume=False, dry_run=False)
    text = write_recipe(told, f"hf-lora train --config {FILE} --out NEW repeats this run.")
    replace_files(Files(out, {FILE: [text.encode()]}))


def _last_evaluation(trainer: RecipeTrainer) -> Mapping[str, Any]:
    """Returns the evaluation of the final weights, which the run may have made already."""
    history = trainer.state.log_history
    known = [
        row for row in history if "eval_loss" in row and row["step"] == trainer.state.max_steps
    ]
    return known[-1] if known else trainer.evaluate()


def _result(
    ready: Ready,
    plan: LoraPlan,
    trainer: RecipeTrainer,
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    seconds: float,
) -> dict[str, Any]:
    recipe, out = ready.recipe, str(ready.recipe.out)
    size = (Path(out) / WEIGHTS).stat().st_size
    model: Any = trainer.model
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    facts: dict[str, Any] = {
        "out": out,
        **counts(ready),
        "held_out_loss": {"before": before.get("eval_loss"), "after": after.get("eval_loss")},
        "trainable_parameters": trained,
        "host_parameters": plan.host_parameters,
        "adapter_bytes": size,
        "seconds": seconds,
        "device": str(trainer.args.device),
        "notes": list(ready.data.notes),
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
        f"{ready.steps} steps in {seconds:.0f} s on {trainer.args.device}",
        f"adapter {size / 1e6:.1f} MB in {out}, with {FILE} and report.json",
        f"next: {facts['next'][0]}",
    ]
    return {**facts, "lines": lines}


def _change(before: Mapping[str, Any], after: Mapping[str, Any], name: str) -> str:
    return f"{before[name]:.3f} -> {after[name]:.3f}"
