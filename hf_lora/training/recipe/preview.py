"""The dry run of `hf-lora train`: plan, steps and memory. It reads no weights, writes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from hf_lora.attach import attach_lora
from hf_lora.plan import plan_lora
from hf_lora.training.recipe import Recipe
from hf_lora.training.recipe.estimate import Memory, estimate
from hf_lora.training.recipe.models import meta_model
from hf_lora.training.recipe.presets import device_type, is_first_process
from hf_lora.training.recipe.ready import adapter_arguments, counted, counts, make_ready


def dry_run(recipe: Recipe) -> dict[str, Any]:
    """Says what a run would do; loads no weights and leaves nothing written.

    Returns:
        Plain data: `lines` to show, the resolved `recipe`, `plan`, `memory` and counts.

    Raises:
        LoraError: As `train` would before its first step.
    """
    out = Path(recipe.out) if recipe.out else None
    ready = make_ready(recipe, out, first=is_first_process())
    recipe = ready.recipe
    dtype: torch.dtype = getattr(torch, str(recipe.dtype))
    model = meta_model(ready.config, ready.data.task, ready.data.labels, dtype)
    plan = plan_lora(model, **adapter_arguments(recipe))
    attach_lora(model, **adapter_arguments(recipe))
    memory = estimate(
        model,
        rows=recipe.batch_size,
        tokens=max(ready.train.lengths),
        dtype=dtype,
        load_in=recipe.load_in,
        optimizer=recipe.optimizer,
        device=device_type(),
        checkpointing=recipe.gradient_checkpointing,
    )
    return {
        "recipe": recipe.to_dict(),
        **counts(ready),
        "plan": plan.to_dict(),
        "memory": memory.to_dict(),
        "notes": list(ready.data.notes),
        "lines": [str(plan), *counted(ready), *_weighed(memory, recipe)],
    }


def _weighed(memory: Memory, recipe: Recipe) -> list[str]:
    def shown(size: int) -> str:
        return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"

    if memory.step is None:
        step = f"one step not known ({memory.why_not})"
        total = f"at least {shown(memory.total)}"
    else:
        step, total = f"one step {shown(memory.step)}", shown(memory.total)
    checked = " with checkpointing" if recipe.gradient_checkpointing else ""
    return [
        f"Memory: {total} beside Python: weights {shown(memory.weights)}, adapter "
        f"{shown(memory.adapter)}, optimizer {shown(memory.optimizer)}, {step}{checked}"
    ]
