"""The metadata of model cards: read, and checked for shape.

An imitation: the Hub's own rules are not public. Here a known field must have the kind of value
that the Hub's documentation gives it; unknown fields are let through.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from huggingface_hub.repocard import REGEX_YAML_BLOCK, RepoCard

from hf_lora.testing.local_hub.store import File

__all__ = ["CARD", "card_of", "problems", "tags_of"]

CARD = "README.md"
RELATIONS = ("adapter", "finetune", "merge", "quantized")


class _BadCard(ValueError):
    """A card that cannot be read."""


def _read(text: str) -> dict[str, Any]:
    if not REGEX_YAML_BLOCK.search(text):
        return {}
    try:
        data: Any = RepoCard(text, ignore_metadata_errors=True).data
        return dict(data.to_dict())
    except Exception as error:  # the YAML parser is no dependency of ours, nor are its errors
        raise _BadCard(str(error)) from None


def card_of(files: Mapping[str, File]) -> dict[str, Any]:
    """Returns the metadata of a revision's card, empty where there is none that can be read."""
    if CARD not in files:
        return {}
    try:
        return _read(files[CARD].data.decode("utf-8", "replace"))
    except _BadCard:
        return {}


def tags_of(card: Mapping[str, Any]) -> list[str]:
    """Returns the tags that the Hub shows for a card."""
    tags = [card["library_name"]] if card.get("library_name") else []
    tags += card.get("tags") or []
    bases = card.get("base_model") or []
    for base in [bases] if isinstance(bases, str) else bases:
        relation = card.get("base_model_relation")
        tags += [f"base_model:{base}", *([f"base_model:{relation}:{base}"] if relation else [])]
    if card.get("license"):
        tags.append(f"license:{card['license']}")
    return list(dict.fromkeys(map(str, tags)))


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _is_text_or_texts(value: object) -> bool:
    return _is_text(value) or _is_texts(value)


def _is_mappings(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


_TEXT, _TEXTS, _EITHER = "a string", "an array of strings", "a string or an array of strings"
_FIELDS: Mapping[str, tuple[Callable[[object], bool], str]] = {
    "base_model": (_is_text_or_texts, _EITHER),
    "base_model_relation": (lambda value: value in RELATIONS, f"one of {', '.join(RELATIONS)}"),
    "datasets": (_is_text_or_texts, _EITHER),
    "instance_prompt": (_is_text, _TEXT),
    "language": (_is_text_or_texts, _EITHER),
    "library_name": (_is_text, _TEXT),
    "license": (_is_text_or_texts, _EITHER),
    "license_link": (_is_text, _TEXT),
    "license_name": (_is_text, _TEXT),
    "metrics": (_is_text_or_texts, _EITHER),
    "model-index": (_is_mappings, "an array of objects"),
    "pipeline_tag": (_is_text, _TEXT),
    "tags": (_is_texts, _TEXTS),
    "thumbnail": (_is_text, _TEXT),
    "widget": (_is_mappings, "an array of objects"),
}
# what each result of a model index names
_RESULT = {"task": ("type",), "dataset": ("type", "name")}


def _index_problems(models: list[dict[str, Any]]) -> list[str]:
    wrong = []
    for place, model in enumerate(models):
        where = f"model-index[{place}]"
        if not isinstance(model.get("name"), str):
            wrong.append(f'"{where}.name" must be a string')
        if not _is_mappings(model.get("results")):
            wrong.append(f'"{where}.results" must be an array of objects')
            continue
        for number, result in enumerate(model["results"]):
            wrong += _result_problems(f"{where}.results[{number}]", result)
    return wrong


def _result_problems(where: str, result: dict[str, Any]) -> list[str]:
    wrong = []
    for part, names in _RESULT.items():
        value = result.get(part)
        lacking = [name for name in names if not isinstance(value, dict) or name not in value]
        wrong += [f'"{where}.{part}.{name}" is required' for name in lacking]
    metrics = result.get("metrics")
    if not _is_mappings(metrics):
        return [*wrong, f'"{where}.metrics" must be an array of objects']
    for number, metric in enumerate(metrics or []):
        lacking = [name for name in ("type", "value") if name not in metric]
        wrong += [f'"{where}.metrics[{number}].{name}" is required' for name in lacking]
    return wrong


def problems(text: str) -> tuple[list[str], list[str]]:
    """Returns what is wrong with a card, and what is merely worth a warning."""
    try:
        card = _read(text)
    except _BadCard as error:
        return [f"Invalid YAML metadata: {error}"], []
    if not card:
        return [], ["empty or missing yaml metadata in repo card"]
    wrong = [
        f'"{name}" must be {kind}'
        for name, (fits, kind) in _FIELDS.items()
        if name in card and not fits(card[name])
    ]
    if _is_mappings(card.get("model-index")):
        wrong += _index_problems(card["model-index"])
    return wrong, []
