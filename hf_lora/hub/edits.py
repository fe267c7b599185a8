"""The card of the last push and its owner's changes -> the card of the next push."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

from huggingface_hub.repocard import TEMPLATE_MODELCARD_PATH

from hf_lora.errors import InvalidOption, listing, shown
from hf_lora.hub.about import is_hub_id
from hf_lora.hub.metadata import Merged, dumped, loaded, merged, patched
from hf_lora.hub.readme import (
    Piece,
    Readme,
    Section,
    State,
    digest,
    generated,
    parse,
    section_piece,
    state_piece,
)

if TYPE_CHECKING:
    from hf_lora.hub.card import Card

__all__ = ["Updated", "updated"]

_NO_STATE = State({}, {})


@dataclass(frozen=True)
class Updated:
    """A card that goes on from the one before.

    Attributes:
        text: The README.
        notes: What of its owner's was kept, one sentence each.
    """

    text: str
    notes: tuple[str, ...] = ()


def updated(old: str | bytes | None, card: Card) -> Updated:
    """Returns the README of the next push.

    What nobody has touched since the last push is written anew; the rest stays: values, sections
    and text that the owner changed, added or deleted. A README of another program, or of a person,
    keeps its metadata and its text, and ours goes behind it.

    Args:
        old: The README that is there; None where there is none.
        card: What is known of the adapter now.

    Raises:
        InvalidOption: The README is not UTF-8, its metadata are no YAML, or the comments around our
            part are damaged.
    """
    text = _decoded(old)
    if not text.lstrip("\ufeff").strip():
        return Updated(card.text)
    readme = parse(text)
    now = loaded(readme.block)
    if not readme.pieces:
        return _adopted(readme, now, card)
    state = readme.state
    last = state or _NO_STATE
    level = state.level if state else 2 if readme.before.strip() else 1
    data = merged(last.data, now, card.data)
    wanted = _wanted(card.sections, readme.outside)
    pieces, known, notes = _pieces(readme, wanted, last.sections, level)
    after = State(data.base, known, level)
    if state is None:
        notes = [
            "the comment hf_lora:state is damaged, so all that is there counts as yours",
            *notes,
        ]
    done = replace(readme, pieces=_with_state(pieces, after, readme.newline))
    return Updated(_with_data(done, now, data).join(), (*data.notes, *notes))


def _decoded(old: str | bytes | None) -> str:
    if not isinstance(old, bytes):
        return old or ""
    try:
        return old.decode()
    except UnicodeDecodeError as error:
        raise InvalidOption(
            f"the README is not UTF-8 (byte {error.start}), and what its owner wrote would be lost",
            fix="Save it as UTF-8, or delete it. Nothing was changed.",
            file="README.md",
        ) from None


def _wanted(sections: Sequence[Section], outside: str) -> list[Section]:
    """Leaves the gallery out where the owner has put one: it shows the same pictures."""
    return [s for s in sections if "<Gallery" not in s.text or "<Gallery" not in outside]


def _with_data(readme: Readme, now: Mapping[str, Any], data: Merged) -> Readme:
    """Returns the README with other metadata."""
    newline = readme.newline
    if readme.fence:
        return replace(readme, block=patched(readme.block, now, data.data, newline))
    if not data.data:
        return readme
    close = f"{newline}---{newline}" + ("" if readme.before[:1] in ("\r", "\n") else newline)
    block = dumped(data.data, newline)
    return replace(readme, fence=f"---{newline}", block=block, close=close)


# ---------------------------------------------------------------- our own card


def _pieces(
    readme: Readme, sections: Sequence[Section], last: Mapping[str, str], level: int
) -> tuple[list[Piece], dict[str, str], list[str]]:
    """Returns our part with what nobody touched written anew, digests for the state, and notes."""
    new = {section.name: section_piece(section, level, readme.newline) for section in sections}
    titles = {section.name: section.title for section in sections}
    pieces: list[Piece] = []
    known: dict[str, str] = {}
    kept: list[str] = []
    for piece in readme.pieces:
        name = piece.name
        if piece.kind != "section" or name in known:  # a copy of a section is the owner's text
            pieces.append(piece)
            continue
        found, made = digest(piece.text), new.get(name)
        if made is not None and found in (last.get(name), digest(made.text)):
            pieces.append(made)
            known[name] = digest(made.text)
        elif made is not None or found != last.get(name):
            pieces.append(piece)
            known[name] = last.get(name, "")
            kept.append(titles.get(name, name))
    there = {piece.name for piece in readme.pieces if piece.kind == "section"}
    gone = [name for name in last if name not in there]
    known |= {name: last[name] for name in gone}
    for name, made in new.items():
        if name not in there and name not in last:
            pieces.insert(_place(pieces, name, list(new)), made)
            known[name] = digest(made.text)
    notes = [f"your text stays in: {listing(kept, limit=20)}"] if kept else []
    stays = [titles[name] for name in gone if name in titles]
    return pieces, known, notes + ([f"deleted, and stays so: {listing(stays)}"] if stays else [])


def _place(pieces: Sequence[Piece], name: str, order: Sequence[str]) -> int:
    """Returns where a new section goes: behind the last that stands before it in a new card."""
    before = order[: order.index(name)]
    places = [i for i, p in enumerate(pieces) if p.kind == "section" and p.name in before]
    return max(places, default=0) + 1


def _with_state(pieces: Sequence[Piece], state: State, newline: str) -> list[Piece]:
    """Puts the state in the place of the old one, or before the last comment."""
    kinds = [piece.kind for piece in pieces]
    at = kinds.index("state") if "state" in kinds else len(pieces) - 1
    old = pieces[at : at + 1] if "state" in kinds else []
    made = state_piece(state, newline, old[0].text if old else "")
    return [*pieces[:at], made, *pieces[at + len(old) :]]


# ---------------------------------------------------------------- a card of somebody else


def _adopted(readme: Readme, now: Mapping[str, Any], card: Card) -> Updated:
    """Puts our part behind a README that we did not write, or in the place of an empty template."""
    template = is_template(readme.before)
    usable = _usable(now, card.data.get("tags", ()) if template else None)
    data = merged({}, usable, card.data)
    alone = template or not readme.before.strip()
    level = 1 if alone else 2
    made = {s.name: s for s in _wanted(card.sections, "" if template else readme.before)}
    known = {n: digest(section_piece(s, level, "\n").text) for n, s in made.items()}
    ours = generated(list(made.values()), State(data.base, known, level), readme.newline)
    if template:
        ordered = {key: data.data[key] for key in (*card.data, *data.data) if key in data.data}
        bare = Readme(readme.lead, "", "", "", readme.newline, ours, "", readme.newline)
        text = _with_data(bare, {}, replace(data, data=ordered)).join()
        return Updated(text, ("a template that nobody had filled in was replaced", *data.notes))
    before = readme.before + readme.newline * _missing(readme.close + readme.before)
    notes = [] if alone else ["the text that was there stays, in front of what hf_lora writes"]
    if "base_model" in now and "base_model" not in usable:
        notes.append(f"base_model {shown(now['base_model'])} is no id of the Hub and was dropped")
    done = _with_data(replace(readme, before=before, pieces=ours), now, data)
    return Updated(done.join(), (*data.notes, *notes))


def _missing(text: str) -> int:
    """Returns how many line ends a text lacks to end with an empty line."""
    tail = text[len(text.rstrip("\r\n")) :]
    return max(0, 2 - len(re.findall(r"\r\n|\r|\n", tail)))


# What peft and transformers write into a card by themselves.
_THEIRS = ("base_model", "base_model_relation", "library_name", "pipeline_tag")


def _usable(now: Mapping[str, Any], ours: Sequence[str] | None) -> dict[str, Any]:
    """Returns the metadata of a foreign card without local paths, which the Hub refuses.

    Args:
        now: The metadata.
        ours: For a template, the tags that we write; what its library wrote goes.
    """
    kept = dict(now)
    for key in _THEIRS if ours is not None else ():
        kept.pop(key, None)
    bases = kept.get("base_model")
    if not all(map(is_hub_id, bases if isinstance(bases, list) else [bases])):
        kept.pop("base_model", None)
    tags = kept.get("tags")
    if isinstance(tags, list):
        kept["tags"] = [t for t in tags if _is_sound(t) and (ours is None or not _is_made(t, ours))]
    return {key: value for key, value in kept.items() if value is not None and value != []}


def _is_made(tag: object, ours: Sequence[str] = ()) -> bool:
    """Tells whether a tag names a base, or is one of those that we write."""
    return isinstance(tag, str) and (tag.startswith("base_model:") or tag in ours)


def _is_sound(tag: object) -> bool:
    """Tells whether a tag that names a base names one on the Hub."""
    return not _is_made(tag) or is_hub_id(str(tag).rpartition(":")[2])


_NEEDED = "[More Information Needed]"
# Lines that stand in cards of that template without being in it: peft's, transformers'.
_ADDED = re.compile(
    r"### Framework versions|- PEFT [\w.+\-]+|"
    r"This is the model card of a 🤗 transformers model that has been pushed on the Hub\. This "
    r"model card has been automatically generated\."
)
_BLANK = re.compile(r"""\{\{\s*\w+\s*\|\s*default\("([^"]*)",\s*true\s*\)\s*\}\}""")


@cache
def _template() -> frozenset[str]:
    """Returns the lines of huggingface_hub's template with nothing filled in."""
    lines = TEMPLATE_MODELCARD_PATH.read_text(encoding="utf-8").splitlines()
    return frozenset(_BLANK.sub(r"\1", line).strip() for line in lines)


def is_template(body: str) -> bool:
    """Tells whether a card is the template that peft and transformers write, not filled in."""
    lines = [line.strip() for line in body.splitlines() if line.strip()]
    if sum(_NEEDED in line for line in lines) < 10:
        return False
    return all(line in _template() or _ADDED.fullmatch(line) for line in lines)
