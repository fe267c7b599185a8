"""The dry run of `hf-lora train`: plan, steps and memory. It reads no weights, writes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hf_lora.training.recipe.estimate import Memory
from hf_lora.training.recipe.presets import is_first_process
from hf_lora.training.recipe.ready import make_ready
from hf_lora.training.recipe.table import Recipe


def dry_run(recipe: Recipe) -> dict[str, Any]:
    """Says what a run would do; loads no weights and leaves nothing written.

    Returns:
        Plain data: `lines` to show, the resolved `recipe`, `plan`, `memory` and counts.

    Raises:
        LoraError: As `train` would before its first step.
    """
    out = Path(recipe.out) if recipe.out else None
    run = make_ready(recipe, out, first=is_first_process())
    plan, memory = run.weigh()
    return {
        "recipe": run.recipe.to_dict(),
        **run.counts(),
        "plan": plan.to_dict(),
        "memory": memory.to_dict(),
        "notes": list(run.notes),
        "lines": [str(plan), *run.counted(), *_weighed(memory, run.recipe)],
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
