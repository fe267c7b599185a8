"""What a merge rounded, in figures that add up over tensors, layers and components."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def figures_of(old: Tensor, wide: Tensor, value: Tensor) -> dict[str, float]:
    """Returns the figures of one tensor; all but the largest error add up.

    Args:
        old: The base value; without an update in any weight there are no figures.
        wide: The merged value before rounding.
        value: The merged value as it is kept, in the dtype of `old`.
    """
    update = wide - old
    updated = int(torch.count_nonzero(update))
    if not updated:
        return {}
    norm = torch.linalg.vector_norm(update)
    error = update.copy_(value).sub_(wide)
    return {
        "max_error": float(torch.linalg.vector_norm(error, torch.inf)),
        "error_square": float(torch.linalg.vector_norm(error)) ** 2,
        "update_square": float(norm) ** 2,
        "updated": float(updated),
        # a weight without an update is not rounded, so what changed is among the updated
        "unchanged": float(updated - int(torch.count_nonzero(value != old))),
        "weights": float(value.numel()),
    }


def add_figures(total: dict[str, float], more: Mapping[str, float]) -> None:
    """Adds the figures of one tensor or layer to a total, in place."""
    for key, value in more.items():
        held = total.get(key, 0.0)
        total[key] = max(held, value) if key == "max_error" else held + value


@dataclass(frozen=True)
class MergeReport:
    """What a merge kept and what it rounded.

    Attributes:
        names: The merged adapters.
        layers: Number of layers they were merged into.
        weights: Number of weights there.
        kept: Bytes of the copies of the base in host memory.
        max_error: Largest rounding error of a weight.
        lost: Norm of all rounding errors over the norm of the whole update.
        unchanged: Share of the weights with an update that have their old value all the same.
    """

    names: tuple[str, ...]
    layers: int
    weights: int
    kept: int
    max_error: float
    lost: float
    unchanged: float

    def __str__(self) -> str:
        return (
            f"merged {', '.join(self.names)} into {self.layers} layers, {self.kept} bytes of base "
            f"kept; rounding moved weights by at most {self.max_error:.1e}, "
            f"{100 * self.lost:.2g} % of the update's norm, and left {100 * self.unchanged:.2g} % "
            "of the updated weights as they were"
        )


def report_of(total: Mapping[str, float], names: Sequence[str]) -> MergeReport:
    """Returns the report of summed figures; `layers` and `kept` are among them."""
    update, updated = total.get("update_square", 0.0), total.get("updated", 0.0)
    return MergeReport(
        names=tuple(dict.fromkeys(names)),
        layers=int(total["layers"]),
        weights=int(total.get("weights", 0)),
        kept=int(total["kept"]),
        max_error=total.get("max_error", 0.0),
        lost=(total["error_square"] / update) ** 0.5 if update else 0.0,
        unchanged=total["unchanged"] / updated if updated else 0.0,
    )
