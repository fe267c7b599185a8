"""Folders and lists of pictures -> which file has which caption, every fault named.

A folder says it in `metadata.jsonl` or `metadata.csv` (the form of Hugging Face's ImageFolder), or
with a text beside each picture, `cat.txt` or `cat.caption` beside `cat.png` (that of kohya and
ai-toolkit). A `.jsonl` file says it in its rows.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_lora.errors import BadAdapterFile, BadDataset, listing, shown
from hf_lora.formats.disk import inside
from hf_lora.training.data.jsonl import read_lines

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")
CAPTIONS = (".txt", ".caption")
METADATA = ("metadata.jsonl", "metadata.csv")
FORM = (
    "Put a text beside each picture, cat.txt beside cat.png, or write metadata.jsonl with rows "
    '{"file_name": "cat.png", "text": "a cat"}.'
)

_FILE_KEYS = ("file_name", "image")
_CAPTION_KEYS = ("text", "caption")
_LONGEST = 1 << 16  # bytes of a caption
_SHOWN = 5  # faults that an error lists


@dataclass(frozen=True)
class Captioned:
    """A picture and what is said of it.

    Attributes:
        path: Where the picture lies.
        caption: In one line; may be empty.
    """

    path: Path
    caption: str


class Faults:
    """Faults of single pictures, raised together."""

    def __init__(self) -> None:
        self._found: list[BadDataset] = []

    def add(self, fact: str, file: object, fix: str = "") -> None:
        """Notes what is wrong with a file, or with a line of one."""
        self._found.append(BadDataset(fact, fix=fix, file=str(file)))

    def check(self, of: str) -> None:
        """Raises BadDataset with the first faults and their number, where there are any.

        Args:
            of: What the pictures are from.
        """
        if not self._found:
            return
        if len(self._found) == 1:
            raise self._found[0]
        lines = [f"{Path(e.file).name}: {e.fact}" for e in self._found[:_SHOWN]]
        more = len(self._found) - _SHOWN
        fixes = dict.fromkeys(error.fix for error in self._found if error.fix)
        raise BadDataset(
            f"{len(self._found)} faults: {'; '.join(lines)}{f'; and {more} more' * (more > 0)}",
            fix=" ".join(list(fixes)[:3]),
            file=of,
        )


def find_pictures(
    paths: Sequence[str], *, trigger: str | None = None
) -> tuple[list[Captioned], list[str]]:
    """Finds the pictures of folders and `.jsonl` files, in the order of names and rows.

    Args:
        paths: Folders, which are not searched deeper, and files.
        trigger: Put before each caption.

    Returns:
        Pictures with captions, and what a reader should know: files that are not read.

    Raises:
        BadDataset: There are no pictures, or any has no caption or leads out of its folder.
    """
    found: list[Captioned] = []
    notes: list[str] = []
    faults = Faults()
    places = [Path(path) for path in paths]
    for path in places:
        if places.count(path) > 1:
            raise BadDataset(f"{str(path)!r} would be read twice", fix="Name it once.")
        try:
            found += _of_path(path, faults, notes)
        except (OSError, ValueError) as error:  # no permission, a NUL in the name
            why = getattr(error, "strerror", None) or error
            raise BadDataset(f"{shown(str(path))} cannot be read ({why})") from None
    if not trigger:
        for one in found:
            if not one.caption:
                fix = "Write one, or give a trigger word, which then is the caption."
                faults.add("its caption is empty", one.path, fix)
    faults.check(listing(paths))
    if not found:
        raise BadDataset(f"there are no pictures in {listing(map(repr, paths))}", fix=FORM)
    before = trigger or ""
    joined = (", ".join(filter(None, (before, one.caption))) for one in found)
    return [Captioned(o.path, c) for o, c in zip(found, joined, strict=True)], notes


def _of_path(path: Path, faults: Faults, notes: list[str]) -> Iterator[Captioned]:
    if path.is_dir():
        return _of_folder(path, faults, notes)
    if not path.is_file():
        what = "is no plain file" if path.exists() else "does not exist"
        raise BadDataset(f"{str(path)!r} {what}", fix="Give a folder of pictures, or a .jsonl.")
    if path.suffix.lower() != ".jsonl":
        raise BadDataset(
            f"{str(path)!r} is neither a folder nor a .jsonl file",
            fix='Rows of a .jsonl are {"image": "cat.png", "caption": "a cat"}.',
        )
    rows = ((line.where, line.value) for line in read_lines([path]))
    return _of_rows(rows, path.parent, faults, within=None)


def _of_folder(folder: Path, faults: Faults, notes: list[str]) -> Iterator[Captioned]:
    there = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    files = [path for path in there if not path.is_dir()]
    pictures = [path for path in files if path.suffix.lower() in SUFFIXES]
    texts = [path for path in files if path.suffix.lower() in CAPTIONS]
    tables = [path for path in files if path.name in METADATA and path.is_file()]
    rest = [p for p in files if p not in tables and p not in texts and p not in pictures]
    if not pictures and not tables:
        held = listing([path.name for path in there]) or "nothing"
        raise BadDataset(
            f"there are no pictures in {str(folder)!r}; it holds {held}",
            fix=f"Pictures are {listing(SUFFIXES, limit=99)} files; folders are not searched "
            "deeper.",
        )
    if rest:
        notes.append(f"{len(rest)} other files are not read: {_names(rest)}")
    if tables:
        if texts:
            notes.append(f"captions are those of {tables[0].name}; {_names(texts)} are not read")
        return _of_table(folder, tables, pictures, faults)
    return _of_texts(folder, pictures, texts, faults, notes)


def _of_texts(
    folder: Path,
    pictures: Sequence[Path],
    texts: Sequence[Path],
    faults: Faults,
    notes: list[str],
) -> Iterator[Captioned]:
    """Yields pictures with the texts beside them."""
    stems = [path.stem for path in pictures]
    alone = [path for path in texts if path.stem not in stems]
    if alone:
        notes.append(f"{len(alone)} texts have no picture: {_names(alone)}")
    for path in pictures:
        beside = [text for text in texts if text.stem == path.stem]
        if stems.count(path.stem) > 1:
            others = [p for p in pictures if p.stem == path.stem and p != path]
            faults.add(f"{_names(others)} has the same name, and one caption", path, "Rename it.")
        elif len(beside) > 1:
            faults.add(f"it has two captions, {_names(beside)}", path, "Leave one.")
        elif not beside:
            faults.add("it has no caption", path, FORM)
        elif all(_leads_within(folder, part.name, faults) for part in (path, *beside)):
            caption = _text_of(beside[0], faults)
            if caption is not None:
                yield Captioned(path, caption)


def _text_of(path: Path, faults: Faults) -> str | None:
    """Returns the caption that a file holds, in one line."""
    if not path.is_file():
        faults.add("the caption is no plain file", path)
        return None
    try:
        with path.open("rb") as file:
            raw = file.read(_LONGEST + 1)
        if len(raw) > _LONGEST:
            faults.add(f"the caption is longer than {_LONGEST:,} bytes", path)
            return None
        return _in_line(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        fact = f"byte {error.start + 1} of the caption is not UTF-8"
        faults.add(fact, path, "Convert the file to UTF-8.")
    except OSError as error:
        faults.add(f"the caption cannot be read ({error.strerror})", path)
    return None


def _in_line(text: str) -> str:
    return " ".join(text.split())


def _of_table(
    folder: Path, tables: Sequence[Path], pictures: Sequence[Path], faults: Faults
) -> Iterator[Captioned]:
    """Yields the rows of a folder's metadata, and notes pictures that it leaves out."""
    if len(tables) > 1:
        raise BadDataset(
            f"there are {listing(p.name for p in tables)}", fix="Leave one.", file=str(folder)
        )
    named = set()
    for one in _of_rows(_table_rows(tables[0]), folder, faults, within=folder):
        named.add(one.path)
        yield one
    for path in pictures:
        if path not in named:
            faults.add(f"it has no caption: {tables[0].name} does not name it", path)


def _table_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if path.suffix == ".jsonl":
        for line in read_lines([path]):
            yield line.where, line.value
        return
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for number, row in enumerate(csv.DictReader(file, strict=True), 1):
                # a field too many has the name None
                yield f"{path}, row {number}", {str(k): v for k, v in row.items()}
    except (csv.Error, UnicodeDecodeError) as error:
        fix = "CSV has one picture a line, its first line is file_name,text."
        raise BadDataset(
            f"the file is no CSV in UTF-8 ({error})", fix=fix, file=str(path)
        ) from None


def _of_rows(
    rows: Iterator[tuple[str, Mapping[str, Any]]],
    folder: Path,
    faults: Faults,
    *,
    within: Path | None,
) -> Iterator[Captioned]:
    """Yields the pictures that rows name.

    Args:
        rows: Where each stands, and its columns.
        folder: What paths begin at.
        faults: Takes what is wrong.
        within: The folder that no path may lead out of; None where they may lead anywhere.
    """
    for where, row in rows:
        name = _column(row, _FILE_KEYS)
        caption = _column(row, _CAPTION_KEYS)
        lacks = [k for k, v in ((_FILE_KEYS, name), (_CAPTION_KEYS, caption)) if v is None]
        if lacks:
            fact = f"it has no {' or '.join(lacks[0])}, but {listing(map(shown, row)) or 'nothing'}"
            faults.add(fact, where, 'Rows are {"file_name": "cat.png", "text": "a cat"}.')
            continue
        path = folder / str(name)
        if within is not None and not _leads_within(within, str(name), faults):
            continue
        if not path.is_file():
            faults.add(f"there is no picture {shown(name)}", where, f"Paths begin at {folder}.")
            continue
        yield Captioned(path, _in_line(str(caption)))


def _column(row: Mapping[str, Any], keys: Sequence[str]) -> str | None:
    """Returns the text in the first of some columns that the row has."""
    value = next((row[key] for key in keys if key in row), None)
    return value if isinstance(value, str) else None


def _leads_within(folder: Path, name: str, faults: Faults) -> bool:
    """Tells whether a path, links followed, lies in the folder; what does not is a fault."""
    try:
        inside(folder, name)
    except BadAdapterFile as error:
        fix = "Copy it there, or list the pictures in a .jsonl file, which may name any path."
        faults.add(error.fact, folder / name, fix)
        return False
    return True


def _names(paths: Sequence[Path]) -> str:
    return listing(path.name for path in paths)
