"""The parts of a README, each with every byte it has: metadata, text, and what was generated.

    ---                                                 metadata, YAML
    ...
    ---
    text of the owner
    <!-- hf_lora:begin ... -->
    <!-- hf_lora:section intro -->                      one generated section after the other
    ...
    <!-- hf_lora:state eyJ2... -->                      what was generated, to know edits by
    <!-- hf_lora:end -->
    text of the owner

A part that is not replaced is written as it was read: its line ends, its blanks.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from huggingface_hub.repocard import REGEX_YAML_BLOCK

from hf_lora.errors import InvalidOption
from hf_lora.hub.escape import LINE_START

__all__ = ["Piece", "Readme", "Section", "State", "digest", "generated", "parse"]

_MARK = re.compile(
    LINE_START + r"<!-- hf_lora:(begin|section|state|end)\b[ \t]*([^\r\n]*?)[ \t]*-->[ \t]*"
    r"(?:\r\n|\r|\n|\Z)"
)
_BEGIN = "<!-- hf_lora:begin Written by hf_lora. What you change, here or elsewhere, stays. -->\n"
_END = "<!-- hf_lora:end -->\n"
_VERSION = 1


@dataclass(frozen=True)
class Section:
    """A generated part of the body.

    Attributes:
        name: What it is known by in later cards.
        title: Its heading.
        text: Markdown below the heading, its lines ended by LF.
        depth: 0 for the first, which has the title of the page, 1 for the others.
    """

    name: str
    title: str
    text: str
    depth: int = 1

    def render(self, level: int) -> str:
        """Returns the section, its heading `level` steps below a title of depth 0."""
        return f"{'#' * (level + self.depth)} {self.title}\n\n{self.text}\n\n"


@dataclass(frozen=True)
class State:
    """What was generated last time.

    Attributes:
        data: Metadata.
        sections: Name of a section -> digest of its text.
        level: Level of the first heading: 1, or 2 below the text of somebody else.
    """

    data: Mapping[str, Any]
    sections: Mapping[str, str]
    level: int = 1

    def line(self) -> str:
        """Returns the comment that holds it; base64, so that nothing in it can end the comment."""
        fields = {
            "v": _VERSION,
            "level": self.level,
            "data": self.data,
            "sections": self.sections,
        }
        text = json.dumps(fields, separators=(",", ":"), sort_keys=True, allow_nan=False)
        return f"<!-- hf_lora:state {base64.b64encode(text.encode()).decode()} -->\n"


def _state(text: str) -> State | None:
    """Reads a state back; None where it is damaged or of a newer version."""
    try:
        fields = json.loads(base64.b64decode(text, validate=True))
        found = State(dict(fields["data"]), dict(fields["sections"]), fields["level"])
        known = fields["v"] == _VERSION and found.level in (1, 2)
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    texts = all(isinstance(value, str) for value in found.sections.values())
    return found if known and texts else None


def digest(text: str) -> str:
    """Returns what tells a text from another; line ends and blanks at their ends do not count."""
    lines = "\n".join(line.rstrip() for line in re.split(r"\r\n|\r|\n", text)).strip()
    return hashlib.sha256(lines.encode("utf-8", "surrogatepass")).hexdigest()[:16]


@dataclass(frozen=True)
class Piece:
    """One comment of ours and the text up to the next one, as they stand.

    Attributes:
        kind: `begin`, `section`, `state` or `end`.
        name: What the comment says behind that.
        mark: The comment's line.
        text: What follows it; empty for `end`.
    """

    kind: str
    name: str
    mark: str
    text: str


@dataclass(frozen=True)
class Readme:
    """A README in parts; joined they are the file.

    Attributes:
        lead: What stands before the metadata: a byte order mark.
        fence: The line above the metadata; empty where there are none.
        block: The metadata without the lines around them.
        close: The line below, with the line end before it.
        before: Text up to our first comment, or all.
        pieces: Our comments and what is between them; empty where there are none.
        after: Text behind our last comment.
        newline: How its lines end, most of them.
    """

    lead: str
    fence: str
    block: str
    close: str
    before: str
    pieces: Sequence[Piece]
    after: str
    newline: str

    def join(self) -> str:
        """Returns the file."""
        inside = "".join(piece.mark + piece.text for piece in self.pieces)
        head = self.lead + self.fence + self.block + self.close
        return head + self.before + inside + self.after

    @property
    def state(self) -> State | None:
        """What was generated last time; None where no comment says so, or it is damaged."""
        return next((_state(p.name) for p in self.pieces if p.kind == "state"), None)

    @property
    def outside(self) -> str:
        """The owner's text around ours."""
        return self.before + self.after


def parse(text: str) -> Readme:
    """Takes a README apart.

    Raises:
        InvalidOption: One of the comments around our part is missing, or there twice.
    """
    lead = "\ufeff" if text.startswith("\ufeff") else ""
    text = text[len(lead) :]
    found = REGEX_YAML_BLOCK.search(text)
    fence, block, close = found.groups()[:3] if found else ("", "", "")
    body = text[found.end() :] if found else text
    before, pieces, after = _split(body)
    return Readme(lead, fence, block, close, before, pieces, after, _newline(text))


def _split(body: str) -> tuple[str, Sequence[Piece], str]:
    marks = list(_MARK.finditer(body))
    kinds = [mark.group(1) for mark in marks]
    if "begin" not in kinds and "end" not in kinds:
        return body, (), ""
    sound = kinds.count("begin") == kinds.count("end") == 1
    first, last = (kinds.index("begin"), kinds.index("end")) if sound else (0, 0)
    # a section that was moved out, comment and all, is the owner's text
    inside = marks[first : last + 1]
    if not inside or kinds[first:last].count("state") > 1 or not sound:
        raise InvalidOption(
            "the README has lost, or has twice, one of the comments <!-- hf_lora:begin -->, "
            "<!-- hf_lora:state --> and <!-- hf_lora:end --> around what hf_lora wrote",
            fix="Put it right as it was in an earlier commit, or delete all lines that begin with "
            "<!-- hf_lora:. Nothing was changed.",
            file="README.md",
        )
    ends = [mark.start() for mark in inside[1:]] + [inside[-1].end()]
    pieces = [
        Piece(mark.group(1), mark.group(2), mark.group(), body[mark.end() : end])
        for mark, end in zip(inside, ends, strict=True)
    ]
    return body[: inside[0].start()], pieces, body[inside[-1].end() :]


def _newline(text: str) -> str:
    # a lone CR ends no line of metadata for the Hub, so that none is written
    both = text.count("\r\n")
    return "\r\n" if both > text.count("\n") - both else "\n"


def section_piece(section: Section, level: int, newline: str) -> Piece:
    """Returns a section as it stands in a file."""
    mark = f"<!-- hf_lora:section {section.name} -->\n"
    text = section.render(level)
    return Piece("section", section.name, mark.replace("\n", newline), text.replace("\n", newline))


def state_piece(state: State, newline: str, text: str = "") -> Piece:
    """Returns the state as it stands in a file, with what the owner wrote behind it."""
    return Piece("state", "", state.line().replace("\n", newline), text)


def generated(sections: Sequence[Section], state: State, newline: str = "\n") -> list[Piece]:
    """Returns all of our part, for a file that has none."""
    return [
        Piece("begin", "", _BEGIN.replace("\n", newline), ""),
        *(section_piece(section, state.level, newline) for section in sections),
        state_piece(state, newline),
        Piece("end", "", _END.replace("\n", newline), ""),
    ]
