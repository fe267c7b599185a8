r"""Text out of files in Markdown: shown as it is, whatever it says.

Trigger words, facts of a training, prompts and answers are the claims of whoever wrote the file. On
a page they are text and nothing else: no link, no HTML, no second column, no end of a code block.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence

__all__ = ["code", "fenced", "inline", "is_path", "plain", "prose", "table"]

LINE_START = r"(?:(?<=\n)|(?<=\r)|\A)"  # of a file with any line ends; `^` knows `\n` only

# Controls, marks of the direction of writing, which hide what a reader sees, and what is no
# character at all. Tabs and line ends stay.
_GONE = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\u200b\u200e\u200f\u202a-\u202e\u2060-\u2069\ufeff"
    "\ufff9-\uffff\ud800-\udfff]"
)
_SPECIAL = re.compile(r"://|(?<=[wW]{3})\.|(?<![^\W_])_|_(?![^\W_])|[&<>|@$\\`*\[\]~#!^]")
_ENTITIES = {
    "://": "&#58;//",  # no link is made of an address
    ".": "&#46;",
    "&": "&amp;",
    "<": "&lt;",
    ">": "&gt;",
    "|": "&#124;",  # in a table even `\\|` is a new column for some readers
    "@": "&#64;",
    "$": "&#36;",
}
_FIRST = re.compile(
    r"[-+=](?=[-+=\s]|$)|\d+(?=[.)](?:\s|$))"
)  # begins a list or underlines a heading
_FENCE = re.compile(r"^ {0,3}(`{3,}|~{3,})(.*)$", re.MULTILINE)
_MARK = re.compile(LINE_START + r"(?=<!--\s*hf_lora:)")

# Anything that leads into a file system: /home/x, ~/x, ../x, C:\x, \\server, file:x. A slash inside
# of a word (and/or, user/name) or of an address does not.
_PATH = re.compile(
    r"(?<![\w:/.\-])(?:/[\w.~\-]|~[\\/]|\.{1,2}[\\/]|\\\\)|(?<!\w)(?:[A-Za-z]:[\\/]|file:)|\w\\\w"
)
# Two slashes or more (no date), or a file of a known kind in a folder; one slash is a Hub id.
_RELATIVE = re.compile(
    r"(?=.*[A-Za-z])[\w.\-]+(?:/[\w.\- ]+){2,}/?"
    r"|[\w.\- /]+/[\w.\- ]+\.(?:jsonl?|csv|tsv|txt|parquet|arrow|safetensors|bin|ckpt|pth?|toml"
    r"|ya?ml|py|png|jpe?g|webp)"
)


def is_path(text: str) -> bool:
    """Tells whether a text is a path of some machine, or holds one."""
    text = text.strip()
    if _PATH.search(text) or _RELATIVE.fullmatch(text):
        return True
    try:
        return "/" in text and len(text) < 1000 and os.path.lexists(text)
    except ValueError:  # a NUL byte
        return False


def plain(text: object, limit: int = 200) -> str:
    """Returns a text on one line without control characters, cut to `limit` characters."""
    line = " ".join(_GONE.sub("", str(text)).split())
    return line if len(line) <= limit else f"{line[: limit - 1].rstrip()}…"


def inline(text: object, limit: int = 200) -> str:
    """Returns a text for a sentence or the cell of a table, in which nothing is Markdown."""
    line = plain(text, limit)
    first = _FIRST.match(line)
    at = 0 if first is None else first.end()
    head = "" if first is None else first.group()
    if head.isdigit():
        head, at = f"{head}\\{line[at]}", at + 1
    elif head:
        head = f"\\{head}"
    return head + _SPECIAL.sub(lambda m: _ENTITIES.get(m.group(), f"\\{m.group()}"), line[at:])


def code(text: object, limit: int = 200) -> str:
    """Returns a text as a code span; not for the cells of a table."""
    line = plain(text, limit)
    ticks = "`" * (_longest(line) + 1)
    space = " " if not line or "`" in (line[0], line[-1]) else ""
    return f"{ticks}{space}{line}{space}{ticks}"


def fenced(text: str, language: str = "text", limit: int = 4000) -> str:
    """Returns a text as a code block that it cannot end."""
    body = _lines(text).strip("\n")
    body = body if len(body) <= limit else f"{body[: limit - 1]}…"
    ticks = "`" * max(3, _longest(body) + 1)
    return f"{ticks}{language}\n{_unmarked(body)}\n{ticks}"


def _longest(text: str) -> int:
    """Returns the length of the longest run of backticks."""
    return max((len(run) for run in re.findall("`+", text)), default=0)


def prose(text: str) -> str:
    """Returns the owner's Markdown as it is, save lines that read like our own comments.

    A code block that is left open is closed: the rest of the page is none.
    """
    text = _unmarked(_lines(text).strip())
    fence = ""
    for ticks, rest in _FENCE.findall(text):
        if not fence:
            fence = "" if ticks[0] == "`" and "`" in rest else ticks
        elif ticks.startswith(fence) and not rest.strip():
            fence = ""
    return f"{text}\n{fence}" if fence else text


def _lines(text: str) -> str:
    """Returns a text of many lines without control characters."""
    return _GONE.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))


def _unmarked(text: str) -> str:
    return _MARK.sub(" ", text)  # our comments are known by standing at the start of a line


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a table; cells are Markdown already."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
