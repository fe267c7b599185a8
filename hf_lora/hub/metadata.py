"""The metadata of a README: read, merged three ways, and written with every line that stays.

Three ways: what was generated last time, what is there now, what is generated now. Where the first
two are equal nobody has touched the value, and the third takes its place; where they differ the
owner has, and theirs stays.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from huggingface_hub import CardData, RepoCard

from hf_lora.errors import InvalidOption, shown

__all__ = ["Merged", "dumped", "loaded", "merged", "patched"]

_KEY = re.compile(r"""(?:([A-Za-z_][\w.\-]*)|"([^"\\]+)"|'([^']+)')[ \t]*:(?:[ \t]|$)""")
_NOTHING = object()
# Lists that are one value: two figures of one metric would stand side by side.
_WHOLE = ("model-index",)


def loaded(block: str) -> dict[str, Any]:
    """Reads metadata.

    Raises:
        InvalidOption: They are no YAML, or no mapping with texts as keys.
    """
    try:  # RepoCard gives what YAML says; ModelCard would make figures of it
        return dict(vars(RepoCard(f"---\n{block}\n---\n").data))
    except Exception as error:  # the YAML parser is no dependency of ours, nor are its errors
        why = " ".join(str(error).split())[:200]
        raise InvalidOption(
            f"the metadata between the --- lines cannot be read: {why}",
            fix="Mend the YAML there, then push again. Nothing was changed.",
            file="README.md",
        ) from None


def dumped(data: Mapping[str, Any], newline: str = "\n") -> str:
    """Returns metadata as YAML, without a line end behind the last line."""
    return CardData(**data).to_yaml(line_break=newline) if data else ""


@dataclass(frozen=True)
class Merged:
    """The outcome of a merge.

    Attributes:
        data: What the file shall say.
        base: What counts as generated the next time.
        notes: What of the owner's was kept, one sentence each.
    """

    data: Mapping[str, Any]
    base: Mapping[str, Any]
    notes: tuple[str, ...]


def merged(last: Mapping[str, Any], now: Mapping[str, Any], new: Mapping[str, Any]) -> Merged:
    """Merges metadata.

    Args:
        last: What was generated last time.
        now: What is there.
        new: What is generated now.
    """
    data: dict[str, Any] = {}
    base: dict[str, Any] = {}
    notes: list[str] = []
    for key in dict.fromkeys((*now, *new, *last)):
        value, known, note = _one(
            key, last.get(key, _NOTHING), now.get(key, _NOTHING), new.get(key, _NOTHING)
        )
        if value is not _NOTHING:
            data[key] = value
        if known is not _NOTHING:
            base[key] = known
        notes += [note] if note else []
    return Merged(data, base, tuple(notes))


def _one(key: str, last: Any, now: Any, new: Any) -> tuple[Any, Any, str]:
    """Returns value, what counts as generated from now on, and what is to be told."""
    if now is _NOTHING:
        if last is _NOTHING:
            return new, new, ""
        # kept in mind, so that it stays away for good
        return _NOTHING, last, "" if new is _NOTHING else f"{key} was deleted and stays away"
    if _is_same(now, last) or _is_same(now, new):
        return new, new, ""
    if _are_lists(key, now, last, new):
        return _lists(key, last, now, new)
    note = "" if new is _NOTHING else f"{key} stays {shown(now)}; generated was {shown(new)}"
    # the value of an earlier push, so that one put back is ours again
    return now, new if last is _NOTHING else last, note


def _lists(key: str, last: Any, now: Any, new: Any) -> tuple[Any, Any, str]:
    """Merges lists: what the owner added stays, what they took out stays out."""
    before = [] if last is _NOTHING else last
    wanted = [] if new is _NOTHING else new
    value = [item for item in now if item not in before or item in wanted]
    value += [item for item in wanted if item not in before and item not in now]
    if not value and now:
        return _NOTHING, new, ""
    known = [] if new is _NOTHING and last is not _NOTHING else new
    own = last is _NOTHING and new is _NOTHING
    changed = not own and value != wanted
    return value, known, f"{key} keeps what you added or took out" if changed else ""


def _is_same(one: Any, other: Any) -> bool:
    # True equals 1 in Python, not in YAML
    same = one is other or one == other
    return bool(same) and isinstance(one, bool) == isinstance(other, bool)


def _are_lists(key: str, now: Any, *others: Any) -> bool:
    if key in _WHOLE or not isinstance(now, list):
        return False
    return all(isinstance(other, list) for other in others if other is not _NOTHING)


def patched(block: str, now: Mapping[str, Any], data: Mapping[str, Any], newline: str) -> str:
    """Returns metadata as YAML in which the lines of values that stay are as they were.

    Comments stay as well, save those on a line that is replaced.

    Args:
        block: The lines that are there.
        now: What they say.
        data: What they shall say.
        newline: How lines end.
    """
    if _is_same(now, data):
        return block
    lines: list[str] = []
    done: set[str] = set()
    for key, chunk in _chunks(block):
        if key is None or (key in data and _is_same(now.get(key), data[key])):
            lines += chunk
        elif key in data and key not in done:
            lines += [dumped({key: data[key]}, newline)]
        done |= {key} if key else set()
    lines += [dumped({key: data[key]}, newline) for key in data if key not in done]
    text = newline.join(lines)
    try:
        good = _is_same(loaded(text), dict(data))
    except InvalidOption:
        good = False
    # a mapping in braces, say, has no lines of its own for a key
    return text if good else dumped(data, newline)


def _chunks(block: str) -> list[tuple[str | None, Sequence[str]]]:
    """Returns (key, its lines) for the lines of a block; None for comments between them."""
    chunks: list[tuple[str | None, list[str]]] = [(None, [])]
    for line in re.split(r"\r\n|\r|\n", block) if block else []:
        found = _KEY.match(line)
        if found:
            name = next(group for group in found.groups() if group)
            chunks += [*_loose(chunks), (name, [line])]
        else:
            chunks[-1][1].append(line)
    return [*chunks, *_loose(chunks)]


def _loose(chunks: list[tuple[str | None, list[str]]]) -> list[tuple[None, list[str]]]:
    """Takes comments and empty lines off the end of the last chunk: they are no part of it."""
    lines, taken = chunks[-1][1], 0
    while taken < len(lines) - 1 and (not lines[-1 - taken].strip() or lines[-1 - taken][0] == "#"):
        taken += 1
    tail = lines[len(lines) - taken :]
    del lines[len(lines) - taken :]
    return [(None, tail)] if tail else []
