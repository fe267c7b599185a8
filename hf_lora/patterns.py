"""Values by module path, as configs write them, read without running what a file says."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from hf_lora.errors import BadAdapterFile, shown

# `.*\.` and `(.*\.)?` in front say "any parent", which a plain dotted suffix says as well.
_ANY_PARENT = re.compile(r"^(?:\.\*\\\.|\(\.\*\\\.\)\?)")
_PLAIN_PATH = re.compile(r"[A-Za-z0-9_\-]+(?:\.[A-Za-z0-9_\-]+)*")


class Patterns:
    r"""Values by pattern, as in `rank_pattern`: the first one that matches a path counts.

    peft runs these keys as regular expressions. A file must not make us run its expressions, so
    only the forms in common use are read: a dotted suffix, escaped dots, `^` for a full path, and
    `.*\.` in front. A look-up takes as many steps as the path has segments, however many patterns a
    file brings.

    Raises:
        BadAdapterFile: A key has other metacharacters; the error names the field and the key.
    """

    def __init__(self, patterns: Mapping[str, Any], field_name: str) -> None:
        self._ends: dict[str, tuple[int, Any]] = {}
        self._whole: dict[str, tuple[int, Any]] = {}
        for place, (key, value) in enumerate(patterns.items()):
            group = self._whole if str(key).startswith("^") else self._ends
            group.setdefault(plain_key(key, field_name), (place, value))

    def value(self, path: str, default: Any) -> Any:
        """Returns the value for a module path."""
        if not self._ends and not self._whole:
            return default
        found = [self._ends[end] for end in tails(path) if end in self._ends]
        found += [self._whole[path]] if path in self._whole else []
        return min(found, key=lambda entry: entry[0])[1] if found else default


def tails(path: str) -> Iterator[str]:
    """Yields the path and all its dotted ends, the longest first."""
    yield path
    while "." in path:
        path = path.partition(".")[2]
        yield path


def plain_key(key: str, field_name: str) -> str:
    """Returns a pattern key as a plain dotted suffix; BadAdapterFile where it is none."""
    text = key if isinstance(key, str) else ""
    plain = _ANY_PARENT.sub("", text.removeprefix("^")).removesuffix("$").replace("\\.", ".")
    if not _PLAIN_PATH.fullmatch(plain):
        raise BadAdapterFile(
            f"{field_name} has the key {shown(key)}, which is a regular expression",
            fix="Save the adapter with full module paths as keys; expressions from a file "
            "are not run.",
            field=field_name,
        )
    return plain
