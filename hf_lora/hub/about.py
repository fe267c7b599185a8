"""What a card is about: an adapter, and what its owner says that no file does."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from huggingface_hub import EvalResult

from hf_lora.adapter import MODEL, Adapter
from hf_lora.errors import InvalidOption, shown
from hf_lora.facts import Said, said_by
from hf_lora.formats import diffusers_io as diffusers
from hf_lora.formats import peft
from hf_lora.hub.escape import is_path, plain
from hf_lora.hub.tasks import Task, task_for

__all__ = ["About", "CardExtras", "figure", "is_hub_id", "is_license"]

# peft type -> (name in a sentence, tag)
KINDS: Mapping[str, tuple[str, str]] = {
    "LORA": ("LoRA", "lora"),
    "ADALORA": ("AdaLoRA", "adalora"),
    "LOHA": ("LoHa", "loha"),
    "LOKR": ("LoKr", "lokr"),
    "IA3": ("(IA)³", "ia3"),
}
# Switch of a LoRA's config -> (name in a sentence, tag beside that of LoRA)
VARIANTS: Mapping[str, tuple[str, str]] = {
    "use_dora": ("DoRA", "dora"),
    "use_rslora": ("rsLoRA", "rslora"),
}

# As `validate_repo_id` of huggingface_hub 2.4.0 has it, which also refuses `--`, `..` and `.git`.
_ID = re.compile(r"(?:\b[\w\-.]+\b/)?\b[\w\-.]{1,96}\b", re.ASCII)


def check_repo_id(repo_id: object, field: str) -> None:
    """Raises InvalidOption for what is no "user/name" to push to."""
    if not _is_id(repo_id) or "/" not in str(repo_id):
        raise InvalidOption(
            f"{field}={shown(repo_id)} is no repository id",
            fix="Give one like 'user/name'.",
            field=field,
        )


def is_hub_id(name: object) -> bool:
    """Tells whether a base or data set is named by its Hub repository rather than by a local path.

    Of "a/b" nobody can tell; it is a path where such a folder exists.
    """
    return _is_id(name) and not os.path.lexists(str(name))


def _is_id(name: object) -> bool:
    if not isinstance(name, str) or not _ID.fullmatch(name) or len(name) > 96:
        return False
    return "--" not in name and ".." not in name and not name.endswith(".git")


@dataclass(frozen=True)
class CardExtras:
    """What a card shall say that no file says; every field may stay empty.

    Attributes:
        repo_id: The repository the card lies in, "user/name".
        base_model: Hub id of the base; empty: the one that the adapter names, if it is an id.
        license: The adapter's licence, by the Hub's identifier ("apache-2.0").
        base_license: That of the base's card; carried on where `license` is empty.
        language: Codes of the languages it was trained on.
        datasets: Hub ids of the data it was trained on.
        tags: More tags.
        description: Markdown below the first sentences.
        limitations: Markdown before the usual limitations.
        instance_prompt: What calls a style up; empty: the trigger words.
        metrics: What was measured.
        answers: (prompt, what the model with the adapter answered).
        images: Path in the repository -> the prompt that gave this picture.
        weights: Name of the weights in the repository; empty: the usual one.
        private: Say that one must log in first.

    Raises:
        InvalidOption: A value is none that the Hub takes.
    """

    repo_id: str = ""
    base_model: str = ""
    license: str = ""
    base_license: str = ""
    language: Sequence[str] = ()
    datasets: Sequence[str] = ()
    tags: Sequence[str] = ()
    description: str = ""
    limitations: str = ""
    instance_prompt: str = ""
    metrics: Sequence[EvalResult] = ()
    answers: Sequence[tuple[str, str]] = ()
    images: Mapping[str, str] = field(default_factory=dict)
    weights: str = ""
    private: bool = False

    def __post_init__(self) -> None:
        for name in ("language", "datasets", "tags", "metrics", "answers"):
            if isinstance(getattr(self, name), str):
                raise _wrong(name, getattr(self, name), "is one text", "Give a list.")
        # a repository may well be named like the folder that the adapter was trained into
        _check_ids("repo_id", [self.repo_id], _is_id)
        _check_ids("base_model", [self.base_model], is_hub_id)
        _check_ids("datasets", self.datasets, _is_id)
        _check_words("license", [self.license] if self.license else [])
        _check_words("language", self.language)
        _check_inside("images", self.images)
        _check_inside("weights", [self.weights] if self.weights else [])
        for result in self.metrics:
            _check_result(result)


def _wrong(name: str, value: object, what: str, fix: str) -> InvalidOption:
    return InvalidOption(f"{name}={shown(value)} {what}", fix=fix, field=name)


def _check_ids(name: str, values: Iterable[object], good: Callable[[object], bool]) -> None:
    for value in values:
        if value and not good(value):
            fix = "Give one like 'user/name'."
            raise _wrong(name, value, "is no id of a Hub repository", fix)


# Field -> what its values look like, what they are, and the fix.
_WORDS = {
    "license": (
        re.compile(r"[a-z0-9][a-z0-9.\-]*"),
        "is no identifier of a licence",
        "Give the Hub's, like 'apache-2.0', or 'other'.",
    ),
    # two or three letters, with a region or script, and what the Hub knows beside
    "language": (
        re.compile(r"[a-z]{2,3}(?:[-_][A-Za-z0-9]+)*|code|multilingual"),
        "is no code of ISO 639",
        "Give codes like 'en', 'deu' or 'multilingual'.",
    ),
}


def is_license(name: str) -> bool:
    """Tells whether a name can be the Hub's identifier of a licence."""
    return bool(_WORDS["license"][0].fullmatch(name))


def _check_words(name: str, values: Iterable[object]) -> None:
    pattern, what, fix = _WORDS[name]
    for value in values:
        if not isinstance(value, str) or not pattern.fullmatch(value):
            raise _wrong(name, value, what, fix)


def _check_inside(name: str, paths: Iterable[str]) -> None:
    for path in paths:
        inside = PurePosixPath(path)
        rooted = inside.is_absolute() or PureWindowsPath(path).anchor
        if rooted or "\\" in path or "://" in path or ".." in inside.parts or not inside.name:
            fix = "Give one like 'images/1.png'."
            raise _wrong(name, path, "is no path in a repository", fix)


def _check_result(result: object) -> None:
    """Checks a figure for what the Hub needs: task, data set, metric and a finite value."""
    if not isinstance(result, EvalResult):
        raise _wrong("metrics", result, "is no EvalResult", "Make one of huggingface_hub.")
    for name in ("task_type", "dataset_type", "dataset_name", "metric_type"):
        if not isinstance(getattr(result, name), str) or not getattr(result, name).strip():
            fix = f"Fill {name} of the EvalResult."
            raise _wrong("metrics", getattr(result, name), f"is no {name}", fix)
    value = figure(result.metric_value)
    if value is None:
        fix = "Leave this figure out."
        raise _wrong("metrics", result.metric_value, f"is no value of {result.metric_type}", fix)


def figure(value: Any) -> int | float | str | None:
    """Returns a measured value as plain data; None where it is none, or not finite."""
    if hasattr(value, "item"):  # of torch and numpy
        try:
            value = value.item()
        except (ValueError, RuntimeError):
            return None
    if isinstance(value, str):
        return plain(value) or None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if math.isfinite(value) else None


@dataclass(frozen=True)
class About:
    """An adapter with what its owner says of it, in the words of a card.

    Attributes:
        adapter: The adapter.
        extras: What its owner says.
    """

    adapter: Adapter
    extras: CardExtras

    @property
    def is_pipeline(self) -> bool:
        """Whether it is for a pipeline of diffusers rather than for a single model."""
        return MODEL not in self.adapter.components

    @property
    def library(self) -> str:
        """Library whose model or pipeline it is for."""
        return "diffusers" if self.is_pipeline else self.task.library

    @property
    def repo(self) -> str:
        """The repository; one to be filled in where it is unknown."""
        return self.extras.repo_id or "user/name"

    @property
    def title(self) -> str:
        """Name of the adapter."""
        if self.extras.repo_id:
            return self.extras.repo_id.rpartition("/")[2]
        return f"{self.kind} for {self.base or self.host or 'a model'}"

    @property
    def host(self) -> str:
        """Class of the model or pipeline it was made on, where the file says one."""
        name = self.adapter.manifest.host
        return "" if is_path(name) else plain(name, 80)

    @cached_property
    def base(self) -> str:
        """Hub id of the base; empty where it is unknown or has none."""
        if self.extras.base_model:
            return self.extras.base_model
        configs = (part.config for part in self.adapter.components.values())
        named = [config.get("base_model_name_or_path") for config in configs]
        found = [self.adapter.manifest.base.id, *named]
        return next((str(name) for name in found if is_hub_id(name)), "")

    @property
    def revision(self) -> str:
        """Commit of the base; empty where it is unknown, or that of another repository."""
        base = self.adapter.manifest.base
        sound = base.id == self.base and re.fullmatch(r"[0-9a-f]{7,64}", base.revision)
        return base.revision if sound else ""

    @property
    def folder(self) -> str:
        """Folder of the weights in the repository; empty for its root."""
        return self.extras.weights.rpartition("/")[0]

    @property
    def file(self) -> str:
        """Name of the weights, without their folder."""
        usual = diffusers.WEIGHTS if self.is_pipeline else peft.WEIGHTS
        return self.extras.weights.rpartition("/")[2] or usual

    @cached_property
    def parts(self) -> Mapping[str, Mapping[str, Any]]:
        """Component -> what config and shapes tell of it."""
        parts: Mapping[str, Mapping[str, Any]] = self.adapter.info["components"]
        return parts

    @cached_property
    def kinds(self) -> Mapping[str, str]:
        """Name in a sentence -> tag, of every kind and variant that a component is."""
        found = {}
        for part in self.adapter.components.values():
            name, tag = KINDS.get(part.kind, (plain(part.kind, 40), plain(part.kind, 40).lower()))
            found[name] = tag
            found |= {n: t for switch, (n, t) in VARIANTS.items() if part.config.get(switch)}
        return found

    @property
    def kind(self) -> str:
        """What it is, in a sentence."""
        names = list(self.kinds)
        return " and ".join(names[-1:] if names[:-1] == ["LoRA"] else names)

    @cached_property
    def task(self) -> Task:
        """What it is for."""
        return task_for(self.adapter, self.base)

    @cached_property
    def said(self) -> Said:
        """What the header of its file says."""
        return said_by(self.adapter.manifest, self.adapter)

    @property
    def trigger_words(self) -> Sequence[str]:
        """Words that call it up."""
        words = (plain(word, 100) for word in self.said.trigger_words[:50])
        return [word for word in words if word and not is_path(word)]

    @property
    def prompt(self) -> str:
        """A prompt that calls a style up; empty where none is known."""
        return plain(self.extras.instance_prompt or ", ".join(self.trigger_words), 500)
