"""Kinds of values that a recipe holds: how each is taken from YAML, and read as a flag."""

from __future__ import annotations

import argparse
import datetime
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Kind:
    """A kind of value.

    Attributes:
        what: As an error names it.
        take: A value from YAML -> the value, or TypeError where it is of another kind.
        flag: How argparse reads it.
    """

    what: str
    take: Callable[[Any], Any]
    flag: Mapping[str, Any]


def _take_text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise TypeError
    return value


def _take_date(value: Any) -> str:
    if isinstance(value, datetime.date):  # YAML reads 2026-01-31 as one
        return value.isoformat()
    try:
        return datetime.date.fromisoformat(_take_text(value)).isoformat()
    except ValueError:
        raise TypeError from None


def _take_whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError
    return value


def _take_number(value: Any) -> float:
    # YAML 1.1 reads 1e-4, without a point, as text
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise TypeError
    try:
        number = float(value)
    except (ValueError, OverflowError):
        raise TypeError from None
    if not math.isfinite(number):
        raise TypeError
    return number


def _take_switch(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError
    return value


def _take_list(value: Any) -> tuple[str, ...]:
    listed = [value] if isinstance(value, str) else value
    if not isinstance(listed, list | tuple) or not listed:
        raise TypeError
    return tuple(_take_text(item) for item in listed)


def _take_names(value: Any) -> tuple[str, ...]:
    listed = value.split(",") if isinstance(value, str) else value
    return tuple(item.strip() for item in _take_list(listed))


def _take_classes(value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        return _take_names(value)
    if not isinstance(value, list | tuple) or not value:
        raise TypeError
    # a text is a class as it stands in the data, blanks at its ends included, or empty
    names = tuple(str(item) if type(item) is int else item for item in value)
    if not all(isinstance(name, str) for name in names):
        raise TypeError
    return names


TEXT = Kind("a text", _take_text, {"metavar": "TEXT"})
DATE = Kind("a date such as 2026-01-31", _take_date, {"metavar": "DATE"})
WHOLE = Kind("a whole number", _take_whole, {"type": int, "metavar": "N"})
NUMBER = Kind("a number", _take_number, {"type": float, "metavar": "X"})
SWITCH = Kind("true or false", _take_switch, {"action": argparse.BooleanOptionalAction})
PATHS = Kind("a path, or a list of them", _take_list, {"nargs": "+", "metavar": "PATH"})
TEXTS = Kind("a text, or a list of them", _take_list, {"nargs": "+", "metavar": "TEXT"})
NAMES = Kind("names, as a list or with commas between", _take_names, {"metavar": "NAME,NAME"})
CLASSES = Kind("names, as a list or with commas between", _take_classes, NAMES.flag)
QUOTED = (TEXT, TEXTS, NAMES, CLASSES)  # of which YAML makes other things where quotes are left out
