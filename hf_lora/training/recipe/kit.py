"""What runs of language models and of pipelines have in common."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from peft import LoraConfig

from hf_lora.plan import LoraPlan
from hf_lora.training.recipe.estimate import Memory
from hf_lora.training.recipe.presets import processes
from hf_lora.training.recipe.table import Recipe


@dataclass(frozen=True)
class Loaded:
    """A base with its weights and a fresh adapter.

    Attributes:
        model: What is trained.
        plan: What was attached.
        remarks: On it, for the reader.
    """

    model: Any
    plan: LoraPlan
    remarks: tuple[str, ...] = ()


class Run(Protocol):
    """A run before its weights are loaded: everything is decided."""

    @property
    def recipe(self) -> Recipe:
        """Resolved: nothing is left to decide."""

    @property
    def steps(self) -> int:
        """Optimizer steps."""

    @property
    def weights(self) -> str:
        """Name of the file that the adapter is saved in."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader should know of the data."""

    def counts(self) -> dict[str, Any]:
        """Returns how much there is to learn, as plain data."""

    def counted(self) -> list[str]:
        """Returns how much there is to learn, as lines to show."""

    def weigh(self) -> tuple[LoraPlan, Memory]:
        """Returns plan and memory of the run, from shapes alone."""

    def load(self) -> Loaded:
        """Loads the base and attaches the adapter that the recipe describes."""

    def trainer(self, loaded: Loaded, out: Path) -> Any:
        """Returns the trainer of a loaded base, which writes into a folder."""

    def finish(self, out: Path) -> None:
        """Writes what the adapter needs beside it."""


def adapter_arguments(recipe: Recipe) -> dict[str, Any]:
    """Returns the arguments of `attach_lora` and `plan_lora`."""
    targets = list(recipe.targets)
    where: dict[str, Any] = {"targets": targets if len(targets) > 1 else targets[0]}
    if recipe.components is not None:
        where["components"] = list(recipe.components)
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


def run_line(recipe: Recipe, steps: int, what: str) -> str:
    """Returns the line on steps and rate; `what` a step takes, such as sequences."""
    return (
        f"{steps} steps of {recipe.batch_size * recipe.accumulate * processes()} {what}, "
        f"rate {recipe.lr:g} ({recipe.schedule}), {recipe.optimizer}, dropout {recipe.dropout:g}, "
        f"{recipe.dtype}"
    )
