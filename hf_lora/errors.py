"""Every error that hf_lora raises on purpose.

    LoraError
    ├── InvalidOption        an argument or config field has a value that cannot work
    ├── UnsupportedHost      what was given is no model, or holds nothing a LoRA can sit on
    │   └── MetaHost         the host has shapes but no weights
    ├── TargetNotFound       a name, role or preset matches nothing in this host
    ├── UnsupportedTarget    the target exists but cannot be adapted as asked
    ├── AdapterExists        the adapter name is in use on this host
    ├── AdapterNotFound      no adapter of that name, or no adapter at the source
    ├── BadAdapterFile       the file or config is broken, unsafe or not understood
    ├── AdapterMismatch      the adapter is sound but does not fit this host
    ├── MergeError           merging or unmerging would lose or falsify weights
    ├── TrainingError        a training run cannot begin, or go on, as it was asked for
    │   ├── BadCheckpoint    a checkpoint is incomplete, or of another run, adapter or base
    │   └── BadDataset       a data set is empty or lacks what the run needs
    ├── HubError             the Hub refuses what was asked for, or cannot be reached
    │   └── PushConflict     somebody else has pushed meanwhile
    └── MissingExtra         an optional package is not installed

An error says what was asked, what there is, and what to do. The inner function raises the short
fact; the outer call adds where (file, adapter, host) once, with `within`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Self

__all__ = [
    "AdapterExists",
    "AdapterMismatch",
    "AdapterNotFound",
    "BadAdapterFile",
    "BadCheckpoint",
    "BadDataset",
    "HubError",
    "InvalidOption",
    "LoraError",
    "MergeError",
    "MetaHost",
    "MissingExtra",
    "PushConflict",
    "TargetNotFound",
    "TrainingError",
    "UnsupportedHost",
    "UnsupportedTarget",
]

_LONGEST = 2000  # characters of a fact


class LoraError(Exception):
    """Base of all errors of hf_lora.

    Args:
        fact: What was asked and what there is, as one sentence without the fix.
        fix: What the user can do, as one sentence; empty when there is nothing to do.
        file: The file or folder the fact is about.
        field: The config field, argument or tensor name the fact is about.
    """

    def __init__(self, fact: str, *, fix: str = "", file: str = "", field: str = "") -> None:
        # what a file says may be long, and stands in some facts
        self.fact = fact if len(fact) <= _LONGEST else f"{fact[:_LONGEST]}..."
        self.fix = fix
        self.file = file
        self.field = field
        super().__init__(fact, fix, file, field)

    def __str__(self) -> str:
        where = f"{self.file}: " if self.file else ""
        fact = self.fact if self.fact.endswith((".", "?", "!")) else f"{self.fact}."
        return f"{where}{fact} {self.fix}".strip()

    def within(self, *, file: str = "", field: str = "", fix: str = "") -> Self:
        """Returns the same error with the context filled in that the inner function lacked."""
        return type(self)(
            self.fact,
            fix=self.fix or fix,
            file=self.file or file,
            field=self.field or field,
        )


class InvalidOption(LoraError):
    """An argument or config field has a value that cannot work."""


class UnsupportedHost(LoraError):
    """The host is no model, or holds nothing a LoRA can sit on."""


class MetaHost(UnsupportedHost):
    """The host lies on the meta device: it has shapes but no weights."""


class TargetNotFound(LoraError):
    """A name, role or preset matches nothing in this host."""


class UnsupportedTarget(LoraError):
    """The target exists but cannot be adapted as asked."""


class AdapterExists(LoraError):
    """The adapter name is in use on this host."""


class AdapterNotFound(LoraError):
    """The host has no adapter of that name, or the source holds none."""


class BadAdapterFile(LoraError):
    """An adapter file or config is broken, unsafe or not understood."""


class AdapterMismatch(LoraError):
    """The adapter is sound but does not fit this host."""


class MergeError(LoraError):
    """Merging or unmerging would lose or falsify weights."""


class TrainingError(LoraError):
    """A training run cannot begin, or go on, as it was asked for."""


class BadCheckpoint(TrainingError):
    """A checkpoint is incomplete, or belongs to another run, adapter or base."""


class BadDataset(TrainingError):
    """A data set is empty, or lacks what the run needs."""


class HubError(LoraError):
    """The Hub refuses what was asked for, or cannot be reached."""


class PushConflict(HubError):
    """Somebody else has pushed to the branch meanwhile."""


class MissingExtra(LoraError):
    """An optional package is not installed; the fix names the command that installs it."""


def closest(name: str, known: Iterable[str], *, limit: int = 3) -> list[str]:
    """Returns at most `limit` of the known names that look most like `name`, best first.

    A dotted name is also compared by its last segments, so `query` finds `self_attn.q_proj`
    no better than chance but `q_prj` finds it.
    """
    pool = list(dict.fromkeys(known))
    leaf = name.rsplit(".", 1)[-1].lower()

    def likeness(candidate: str) -> float:
        tail = candidate.rsplit(".", 1)[-1].lower()
        whole = difflib.SequenceMatcher(None, name.lower(), candidate.lower()).ratio()
        return max(whole, difflib.SequenceMatcher(None, leaf, tail).ratio())

    return sorted(pool, key=likeness, reverse=True)[:limit]


def listing(names: Iterable[str], *, limit: int = 5) -> str:
    """Returns the names as a comma list, cut after `limit` with the number left out."""
    pool = list(names)
    cut = f" and {len(pool) - limit} more" if len(pool) > limit else ""
    return ", ".join(pool[:limit]) + cut


def shown(value: object, *, limit: int = 80) -> str:
    """Returns the `repr` of a value from a file, cut to a length that a message can hold."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
