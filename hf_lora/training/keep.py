"""What a checkpoint holds besides Trainer's own files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors.torch import load_file, save
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_NAME

from hf_lora.errors import BadCheckpoint
from hf_lora.formats import read_header
from hf_lora.formats.disk import Files, replace_files
from hf_lora.manifest import Manifest
from hf_lora.record import keep_record, record_of
from hf_lora.save import save_lora
from hf_lora.slots import slots_of
from hf_lora.training.checkpoints import mark_complete, mark_incomplete
from hf_lora.training.restore import Trained

STATE = "hf_lora_state.json"
TENSORS = "hf_lora_state.safetensors"


def keep_state(folder: Path, kept: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Writes the state of guards and AdaLoRA into a checkpoint."""
    contents = {STATE: [json.dumps(kept).encode()]}
    if tensors:
        contents[TENSORS] = [save({k: t.contiguous() for k, t in tensors.items()})]
    replace_files(Files(folder, contents))


def kept_state(*folders: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns what `keep_state` wrote into the first folder that has it; else nothing.

    Raises:
        BadCheckpoint: It is there and cannot be read.
    """
    folder = next((f for f in folders if (f / STATE).is_file()), None)
    if folder is None:
        return {}, {}
    try:
        kept = json.loads((folder / STATE).read_text(encoding="utf-8"))
        tensors = load_file(folder / TENSORS) if (folder / TENSORS).is_file() else {}
    except Exception as error:  # safetensors raises a class of its own for each damage
        raise BadCheckpoint(f"{STATE} cannot be read: {error}", file=str(folder)) from None
    if not isinstance(kept, dict):
        raise BadCheckpoint(f"{STATE} is no object", file=str(folder))
    return kept, tensors


def finish_checkpoint(folder: Path, host: object, trained: Trained, state: Any, args: Any) -> None:
    """Completes a checkpoint that a plain Trainer has written.

    The adapter becomes a folder of ours, with manifest and fingerprint. For a host that is no
    PeftModel, plain Trainer loads weights from `model.safetensors` by the names of the model's own
    parameters and nothing else, so the factors are there under those names as well.
    """
    mark_incomplete(folder)
    remember(trained, args, state)
    save_lora(trained.model, folder, name=trained.name)
    if not isinstance(host, PeftModel):
        content = save(own_names(trained), metadata={"format": "pt"})
        replace_files(Files(folder, {SAFE_WEIGHTS_NAME: [content]}))
    mark_complete(
        folder,
        step=state.global_step,
        world_size=args.world_size,
        adapter=read_header(folder).digest,
    )


def remember(trained: Trained, args: Any, state: Any) -> None:
    """Puts the facts of the run where `save_lora` takes them from."""
    record = record_of(trained.model)
    before = record.manifests.get(trained.name, Manifest())
    # the adapter that this run began with, where it was loaded from a file
    origin = (before.digest,) if before.digest else ()
    record.manifests[trained.name] = replace(
        before,
        digest="",
        derived_from=(*before.derived_from, *origin),
        training={**before.training, **run_facts(args), "steps": state.global_step},
    )
    keep_record(trained.model, record)


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
