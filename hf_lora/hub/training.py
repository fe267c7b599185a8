"""What a file says of its training and of what was measured, as rows of a table."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from huggingface_hub import EvalResult

from hf_lora.hub.about import About, figure, is_hub_id
from hf_lora.hub.escape import is_path, plain

__all__ = ["evaluation", "facts", "results"]

# Fact of a run -> what it is called. Ours, and those that Trainer's arguments have.
_NAMES: Mapping[str, str] = {
    "task": "task",
    "dataset": "data set",
    "labels": "labels",
    "examples": "examples",
    "steps": "steps",
    "epochs": "epochs",
    "batch_size": "batch size",
    "learning_rate": "learning rate",
    "schedule": "schedule",
    "warmup_steps": "warm-up steps",
    "optimizer": "optimizer",
    "weight_decay": "weight decay",
    "precision": "precision",
    "processes": "processes",
    "seed": "seed",
}
_UNITED = ("seed",)  # a number without commas
_MOST = 60  # rows; a file may say anything

# Where figures stand: Trainer's names, and mappings of metric -> value.
_MEASURED = "eval_"
_MAPPINGS = ("evaluation", "metrics")
# What Trainer measures of itself, not of the model.
_OF_THE_RUN = re.compile(r".*(runtime|per_second|model_preparation_time|compilation_time|steps)")
_METRIC = re.compile(r"[A-Za-z0-9][\w.@\-]*")


def facts(about: About) -> list[tuple[str, str]]:
    """Returns (what it is called, value): known facts first, then others, then a foreign header's.

    Nested data are left out, and so is whatever leads into a file system.
    """
    training = about.adapter.manifest.training
    known = [(name, training[key], key) for key, name in _NAMES.items() if key in training]
    others = [
        (key, value, key)
        for key, value in training.items()
        if key not in _NAMES and not key.startswith(_MEASURED)
    ]
    rows = [(name, _shown(value, key)) for name, value, key in (*known, *others)]
    rows += [(name, plain(value)) for name, value in about.said.facts.items()]
    sound = ((plain(n, 60), v) for n, v in rows if v and not is_path(v) and not is_path(n))
    return [(name, value) for name, value in sound if name][:_MOST]


def _shown(value: Any, key: str) -> str:
    """Returns a scalar, or a list of them, in words; empty for anything else."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return str(value) if key in _UNITED or abs(value) > 1 << 62 else f"{value:,}"
    if isinstance(value, float):
        return f"{value:g}" if math.isfinite(value) else ""
    if isinstance(value, str):
        # paths are looked for in all of it, not in what is left when it is cut
        return "" if is_path(value) else plain(value)
    if isinstance(value, list | tuple) and all(isinstance(v, str | int | float) for v in value):
        cells = [_shown(v, key) for v in value[:20]]
        more = f" and {len(value) - 20} more" if len(value) > 20 else ""
        return ", ".join(cell for cell in cells if cell) + more
    return ""


def results(about: About) -> list[EvalResult]:
    """Returns the figures for the card's metadata: the owner's, then those of the training.

    The Hub wants a data set with every figure, so that those of a training are given only where
    one is known.
    """
    found = [_plainly(result) for result in about.extras.metrics]
    name = _dataset(about)
    if not name:
        return found
    given = {(result.dataset_type, result.metric_type) for result in found}
    for metric, value in _figures(about.adapter.manifest.training):
        if (name, metric) not in given:
            found.append(
                EvalResult(
                    task_type=about.task.tag,
                    dataset_type=name,
                    dataset_name=name,
                    metric_type=metric,
                    metric_value=value,
                )
            )
    return found


def evaluation(about: About) -> list[Sequence[str]]:
    """Returns (data, metric, value) of everything that was measured."""
    rows: list[Sequence[str]] = []
    for result in results(about):
        where = [result.dataset_name, result.dataset_config, result.dataset_split]
        name = result.metric_name or result.metric_type
        rows.append((", ".join(str(w) for w in where if w), name, _value(result.metric_value)))
    if not _dataset(about):  # those of the training are not among them
        training = about.adapter.manifest.training
        rows += [("held out", metric, _value(value)) for metric, value in _figures(training)]
    return rows


def _value(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _figures(training: Mapping[str, Any]) -> Iterator[tuple[str, int | float]]:
    """Yields (metric, finite value) of what was measured on held-out data."""
    pools = [training[name] for name in _MAPPINGS if isinstance(training.get(name), Mapping)]
    pairs = [(key, value) for key, value in training.items() if key.startswith(_MEASURED)]
    pairs += [(str(key), value) for pool in pools for key, value in pool.items()]
    seen = set()
    for key, found in pairs:
        metric, value = key.removeprefix(_MEASURED), figure(found)
        good = _METRIC.fullmatch(metric) and not _OF_THE_RUN.fullmatch(metric)
        if good and isinstance(value, int | float) and metric not in seen and len(metric) < 60:
            seen.add(metric)
            yield metric, value


def _dataset(about: About) -> str:
    """Returns the Hub id of the data that figures of a training were measured on; empty if none.

    None either where the task has no name that the Hub knows, which figures need as well.
    """
    if not about.task.tag:
        return ""
    training = about.adapter.manifest.training
    named = [training.get("eval_dataset"), training.get("dataset")]
    if len(about.extras.datasets) == 1:
        named += about.extras.datasets
    return next((str(n) for n in named if is_hub_id(n) and not is_path(str(n))), "")


def _plainly(result: EvalResult) -> EvalResult:
    """Returns a figure with its value as plain data."""
    fields = {**vars(result), "metric_value": figure(result.metric_value)}
    return EvalResult(**fields)
