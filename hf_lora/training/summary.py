"""What a run was and did: `report.json`, and pictures for those who would rather look."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hf_lora.errors import MissingExtra
from hf_lora.formats.disk import Files, replace_files
from hf_lora.training.measure import LayerFigures

FILE = "report.json"
EXTRA_FIX = 'pip install "hf-lora[train]"'
_VERSIONS = ("torch", "transformers", "peft", "accelerate")

Curve = list[tuple[int, float]]  # (step, value)

# Picture -> title, unit of the second axis, and the keys of Trainer's log that it shows.
_CURVES: tuple[tuple[str, str, str, tuple[str, ...]], ...] = (
    ("loss.png", "Loss", "loss", ("loss", "eval_loss")),
    ("rate.png", "Learning rate", "learning rate", ("learning_rate",)),
    ("norm.png", "Adapter", "Frobenius norm of the update", ("adapter_norm",)),
)
_NAMES = {"loss": "training", "eval_loss": "held out"}


def curve(history: Sequence[Mapping[str, Any]], key: str) -> Curve:
    """Returns (step, value) of one key of Trainer's log, a step logged twice once.

    Values that are no numbers, such as a metric that was None once, are left out.
    """
    rows = {int(row["step"]): float(row[key]) for row in history if _is_number(row.get(key))}
    return sorted(rows.items())


def _is_number(value: object) -> bool:
    return isinstance(value, int | float)


def summarise(
    state: Any,
    layers: Sequence[LayerFigures],
    facts: Mapping[str, Any],
    events: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Returns the report of a run as plain data.

    Args:
        state: Trainer's state.
        layers: The figures of the adapter's layers at the end.
        facts: What the run was: host, adapter, rate, seed and the like.
        events: What the guards did, in order.
    """
    history = state.log_history
    keys = sorted({k for row in history for k, v in row.items() if _is_number(v)})
    return {
        **facts,
        "versions": {name: importlib.metadata.version(name) for name in _VERSIONS},
        "steps": state.global_step,
        "epochs": state.epoch,
        "best": {"metric": state.best_metric, "checkpoint": state.best_model_checkpoint},
        "curves": {k: curve(history, k) for k in keys if k not in ("step", "epoch")},
        "layers": [asdict(layer) for layer in layers],
        "events": list(events),
    }


def write_report(folder: Path, report: Mapping[str, Any]) -> Path:
    """Writes `report.json`, whole or not at all; numbers that are none become null."""
    text = json.dumps(_finite(report), indent=1, ensure_ascii=False, allow_nan=False)
    replace_files(Files(folder, {FILE: [text.encode()]}))
    return folder / FILE


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    if isinstance(value, float) and value - value != 0:  # infinite or no number
        return None
    return value


def can_draw() -> bool:
    """Tells whether the pictures can be drawn: matplotlib belongs to the extra `train`."""
    return importlib.util.find_spec("matplotlib") is not None


def check_can_draw() -> None:
    """Raises MissingExtra where matplotlib is not installed."""
    if not can_draw():
        raise MissingExtra("pictures need matplotlib, which is not installed", fix=EXTRA_FIX)


def draw(folder: Path, report: Mapping[str, Any]) -> list[Path]:
    """Draws the curves, the norm of each layer and a map of ranks as PNG; returns the files."""
    from matplotlib.figure import Figure

    drawn = []
    for name, title, unit, keys in _CURVES:
        curves = {k: report["curves"][k] for k in keys if report["curves"].get(k)}
        if not curves:
            continue
        figure = Figure(figsize=(6.4, 3.6), layout="constrained")
        axes = figure.subplots()
        for key, points in curves.items():
            marker = "o" if len(points) < 3 or key.startswith("eval") else None
            axes.plot(*zip(*points, strict=True), marker=marker, label=_NAMES.get(key, key))
        axes.set(title=title, xlabel="step", ylabel=unit)
        if len(curves) > 1:
            axes.legend()
        drawn.append(_save(figure, folder / name))
    layers = [layer for layer in report["layers"] if layer["block"] is not None]
    for name, key, title in (
        ("norms.png", "norm", "Norm of the update by layer"),
        ("ranks.png", "effective_rank", "Effective rank of the update by layer"),
    ):
        if layers:
            drawn.append(_save(_map(layers, key, title), folder / name))
    return drawn


def _map(layers: Sequence[Mapping[str, Any]], key: str, title: str) -> Any:
    """Draws one value a layer: blocks across, roles down; grey where there is no layer."""
    import numpy as np
    from matplotlib.figure import Figure

    roles = list(dict.fromkeys(layer["role"] for layer in layers))
    blocks = sorted({layer["block"] for layer in layers})
    grid = np.full((len(roles), len(blocks)), np.nan)
    for layer in layers:
        grid[roles.index(layer["role"]), blocks.index(layer["block"])] = layer[key]
    figure = Figure(figsize=(max(4.8, 0.28 * len(blocks) + 2), 0.36 * len(roles) + 1.6))
    figure.set_layout_engine("constrained")
    axes = figure.subplots()
    axes.set_facecolor("0.85")
    image = axes.imshow(grid, aspect="auto", cmap="viridis", vmin=0)
    step = max(1, len(blocks) // 16)
    axes.set_xticks(range(0, len(blocks), step), [str(b) for b in blocks[::step]])
    axes.set_yticks(range(len(roles)), roles)
    axes.set(title=title, xlabel="block")
    figure.colorbar(image)
    return figure


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=120)
    return path
