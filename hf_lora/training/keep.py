"""What a checkpoint holds besides Trainer's own files."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors.torch import load_file, save
from torch import Tensor
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import SAFE_WEIGHTS_NAME, logging

from hf_lora.errors import BadCheckpoint, TrainingError, listing, shown
from hf_lora.formats import read_header
from hf_lora.formats.disk import Files, replace_files
from hf_lora.manifest import Manifest
from hf_lora.record import keep_record, record_of
from hf_lora.save import save_lora
from hf_lora.slots import slots_of
from hf_lora.training.checkpoints import mark_complete, mark_incomplete
from hf_lora.training.restore import Trained

logger = logging.get_logger(__name__)

STATE = "hf_lora_state.json"
TENSORS = "hf_lora_state.safetensors"


def _is_number(value: Any) -> bool:
    return isinstance(value, float) and math.isfinite(value)


def _is_number_or_null(value: Any) -> bool:
    return value is None or _is_number(value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _are_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_number, value))


# What stands in the file: part -> field -> what it must be. The fields of `adalora` are checked
# where its schedule is known.
_FIELDS: Mapping[str, Mapping[str, Callable[[Any], bool]]] = {
    "loss_guard": {"losses": _are_numbers},
    "overfit_guard": {
        "best": _is_number_or_null,
        "train_then": _is_number_or_null,
        "worse": _is_count,
    },
    "in_a_row": {"backs": _is_count, "not_finite": _is_count},
    "adalora": {},
}
_EVENT: Mapping[str, type] = {"step": int, "what": str, "then": str}


def keep_state(folder: Path, kept: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Writes the state of guards and AdaLoRA into a checkpoint."""
    contents = {STATE: [json.dumps(kept).encode()]}
    if tensors:
        contents[TENSORS] = [save({k: t.contiguous() for k, t in tensors.items()})]
    replace_files(Files(folder, contents))


def checkpoint_folder(args: Any, state: Any) -> Path:
    """Returns where Trainer saves the checkpoint of this step."""
    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def find_checkpoint(args: Any, state: Any) -> Path | None:
    """Finds the checkpoint that a plain Trainer goes on from, which it tells no callback.

    A folder of that step may belong to another run. What the callback leaves in Trainer's state has
    a mark, which no other save has.

    Args:
        args: Trainer's arguments.
        state: Trainer's state, as it was read from the checkpoint.

    Returns:
        The folder; None where the checkpoint was saved without the callback.

    Raises:
        TrainingError: It lies where nothing points to.
    """
    marks = _marks(state.stateful_callbacks)
    if not marks:
        return None
    told = args.resume_from_checkpoint
    places = [Path(told)] if isinstance(told, str) else []
    places += [checkpoint_folder(args, state), *map(Path, marks.values())]
    for folder in places:
        try:
            held = json.loads((folder / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
            if _marks(held["stateful_callbacks"]).keys() == marks.keys():
                return folder
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue  # it is not there, or is no checkpoint
    raise TrainingError(
        "the checkpoint was moved: what LoraCallback keeps in it is not found at "
        f"{listing(dict.fromkeys(map(str, places)))}",
        fix="Say where it is, TrainingArguments(resume_from_checkpoint=path), or use LoraTrainer.",
    )


def _marks(callbacks: Mapping[str, Any]) -> dict[str, str]:
    """Returns mark -> where it was saved, of what callbacks left in Trainer's state."""
    found = {}
    for saved in callbacks.values():
        for one in saved if isinstance(saved, list) else [saved]:
            noted = one.get("attributes", {})
            if noted.get("mark"):
                found[str(noted["mark"])] = str(noted.get("saved_in", ""))
    return found


def state_of_run(
    folder: Path | None, args: Any, state: Any, *, needed: bool
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns what `keep_state` wrote into the checkpoint that a run goes on from.

    Args:
        folder: The checkpoint; None to find it.
        args: Trainer's arguments.
        state: Trainer's state, as it was read from the checkpoint.
        needed: Whether the run cannot go on without it; else a warning says what is lost.

    Raises:
        BadCheckpoint: It cannot be read.
        TrainingError: It is needed, and the checkpoint is not found.
    """
    try:
        found = folder or find_checkpoint(args, state)
    except TrainingError as error:
        if needed:
            raise
        logger.warning(f"the guards of the run begin anew: {error}")
        return {}, {}
    return ({}, {}) if found is None else kept_state(found)


def kept_state(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns what `keep_state` wrote into a checkpoint; nothing where it did not.

    Raises:
        BadCheckpoint: It is there and cannot be read.
    """
    if not (folder / STATE).is_file():
        return {}, {}
    try:
        kept = json.loads((folder / STATE).read_text(encoding="utf-8"))
        tensors = load_file(folder / TENSORS) if (folder / TENSORS).is_file() else {}
    except Exception as error:  # safetensors raises a class of its own for each damage
        raise BadCheckpoint(f"{STATE} cannot be read: {error}", file=str(folder)) from None
    if not isinstance(kept, dict):
        raise BadCheckpoint(f"{STATE} is no object", file=str(folder))
    for field, value in _misfits(kept):
        raise BadCheckpoint(
            f"{STATE} is damaged: {field} is {shown(value)}", file=str(folder), field=field
        )
    return kept, tensors


def _misfits(kept: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yields name and value of what is of another type than `keep_state` wrote."""
    for part, fields in _FIELDS.items():
        held = kept.get(part, {})
        if not isinstance(held, dict):
            yield part, held
            continue
        for name, fits in fields.items():
            if name in held and not fits(held[name]):
                yield f"{part}.{name}", held[name]
    events = kept.get("events", [])
    if not isinstance(events, list) or not all(map(_is_event, events)):
        yield "events", events


def _is_event(event: Any) -> bool:
    return isinstance(event, dict) and all(
        isinstance(event.get(name), kind) for name, kind in _EVENT.items()
    )


def finish_checkpoint(folder: Path, host: object, trained: Trained, state: Any, args: Any) -> None:
    """Completes a checkpoint that a plain Trainer has written.

    The adapter becomes a folder of ours, with manifest and fingerprint. For a host that is no
    PeftModel, plain Trainer loads weights from `model.safetensors` by the names of the model's own
    parameters and nothing else, so the factors are there under those names as well.
    """
    mark_incomplete(folder)
    remember(trained, args, state)
    save_lora(trained.host, folder, name=trained.name)
    if not isinstance(host, PeftModel):
        content = save(own_names(trained), metadata={"format": "pt"})
        replace_files(Files(folder, {SAFE_WEIGHTS_NAME: [content]}))
    mark_complete(
        folder,
        step=state.global_step,
        world_size=args.world_size,
        adapter=read_header(folder).digest,
    )


def remember(trained: Trained, args: Any, state: Any, *, ended: bool = False) -> None:
    """Puts the facts of the run where `save_lora` takes them from.

    Args:
        trained: The adapter.
        args: Trainer's arguments.
        state: Trainer's state.
        ended: Whether the weights are those that the run ends with, the best ones where asked for.
    """
    records = {id(model): (model, record_of(model)) for model in trained.parts.values()}
    held = (record.manifests.get(trained.name) for _, record in records.values())
    before = next((manifest for manifest in held if manifest), Manifest())
    # the adapter that this run began with, where it was loaded from a file
    origin = (before.digest,) if before.digest else ()
    after = replace(
        before,
        digest="",
        derived_from=(*before.derived_from, *origin),
        training={
            **{k: v for k, v in before.training.items() if not k.startswith("eval_")},
            **run_facts(args),
            "steps": state.global_step,
            **_measured(state, best=ended and args.load_best_model_at_end),
        },
    )
    for model, record in records.values():
        record.manifests[trained.name] = after
        keep_record(model, record)


def _measured(state: Any, *, best: bool) -> dict[str, float]:
    """Returns the last evaluation of just these weights; empty where there was none."""
    step = state.best_global_step if best else state.global_step
    rows = [row for row in state.log_history if row.get("step") == step]
    figures = {key: value for row in rows for key, value in row.items() if key.startswith("eval_")}
    return {key: value for key, value in figures.items() if _is_number(value)}


def run_facts(args: Any) -> dict[str, Any]:
    """Returns what a run was asked to do, as plain data."""
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    return {
        "learning_rate": args.learning_rate,
        "batch_size": batch,
        "optimizer": str(getattr(args.optim, "value", args.optim)),
        "schedule": str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
        "weight_decay": args.weight_decay,
        "seed": args.seed,
        "processes": args.world_size,
        "precision": "bf16" if args.bf16 else "fp16" if args.fp16 else "as the model's",
    }


def own_names(trained: Trained) -> dict[str, Tensor]:
    """Returns the adapter's tensors under their names in the model's state dict."""
    modules = {id(module): path for path, module in trained.model.named_modules()}
    found = {}
    for slot in slots_of(trained.model, trained.name):
        path = modules[id(slot.owner)]
        found[f"{path}.{slot.key}".lstrip(".")] = slot.value.detach().contiguous()
    return found
