"""JSON Lines -> objects: one JSON object a line, read as a stream, every fault with its line."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from hf_lora.errors import BadDataset, listing, shown

LONGEST_LINE = 64 << 20  # bytes of one row; a file without line ends is not read into memory
FORM = "Data is JSON Lines: one JSON object a line, UTF-8."

_WIDE_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


@dataclass(frozen=True)
class Line:
    """One object of a file.

    Attributes:
        where: File and line, as an error names them.
        value: The object.
    """

    where: str
    value: dict[str, Any]


def data_files(paths: Sequence[str]) -> list[Path]:
    """Returns the files that the given files and folders stand for, in their order.

    A folder stands for its `.jsonl` files by name; it is not searched deeper.

    Raises:
        BadDataset: A path is missing or no plain file, is given twice, or a folder holds no such
            file.
    """
    found: list[Path] = []
    for name in paths:
        path = Path(name)
        try:
            if path.is_dir():
                found += _of_folder(path)
            elif path.is_file():
                found.append(path)
            else:
                what = "is no plain file" if path.exists() else "does not exist"
                raise BadDataset(f"{name!r} {what}", fix=f"Give a file or folder. {FORM}")
        except (OSError, ValueError) as error:  # a NUL in the name, no permission
            raise BadDataset(f"{shown(name)} cannot be read ({_why(error)})") from None
    twice = {str(path) for path in found if found.count(path) > 1}
    if twice:
        raise BadDataset(f"{listing(sorted(twice))} would be read twice", fix="Name it once.")
    return found


def _of_folder(folder: Path) -> list[Path]:
    files = sorted(path for path in folder.glob("*.jsonl") if path.is_file())
    if not files:
        there = listing(sorted(path.name for path in folder.iterdir())) or "nothing"
        raise BadDataset(
            f"the folder {str(folder)!r} holds no .jsonl file; it holds {there}",
            fix="Name the files themselves.",
        )
    return files


def read_lines(files: Sequence[Path]) -> Iterator[Line]:
    """Yields the objects of the files in order; blank lines are passed over.

    Raises:
        BadDataset: A line is no JSON object or not UTF-8, holds NaN or an infinite number, is
            nested too deep or longer than `LONGEST_LINE`; or a file has no object at all.
    """
    for path in files:
        empty = True
        for line in _lines_of(path):
            empty = False
            yield line
        if empty:
            raise BadDataset("the file holds no rows", fix=FORM, file=str(path))


def _lines_of(path: Path) -> Iterator[Line]:
    try:
        with path.open("rb") as file:
            number = 0
            while raw := file.readline(LONGEST_LINE + 1):
                number += 1
                if number == 1:
                    raw = _unmarked(raw, path)
                raw = raw.strip(b" \t\r\n")
                if raw:
                    where = f"{path}, line {number}"
                    yield Line(where, _parsed(raw, where))
    except OSError as error:
        raise BadDataset(f"the file cannot be read ({_why(error)})", file=str(path)) from None


def _unmarked(first: bytes, path: Path) -> bytes:
    for mark, name in _WIDE_MARKS.items():
        if first.startswith(mark):
            raise BadDataset(f"the file is {name}", fix=f"Convert it. {FORM}", file=str(path))
    return first.removeprefix(codecs.BOM_UTF8)


def _parsed(raw: bytes, where: str) -> dict[str, Any]:
    if len(raw) > LONGEST_LINE:
        raise BadDataset(f"the row is longer than {LONGEST_LINE:,} bytes", fix=FORM, file=where)
    try:
        value = json.loads(raw.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        fact = f"byte {error.start + 1} of the row, 0x{raw[error.start]:02x}, is not UTF-8"
        raise BadDataset(fact, fix="Convert the file to UTF-8.", file=where) from None
    except json.JSONDecodeError as error:
        fact = f"the row is no JSON ({error.msg} at character {error.pos + 1})"
        raise BadDataset(fact, fix=FORM, file=where) from None
    except RecursionError:
        raise BadDataset("the row is nested too deep", fix=FORM, file=where) from None
    except ValueError as error:  # NaN, or a number of thousands of digits
        raise BadDataset(f"the row is refused: {_why(error)}", file=where) from None
    if not isinstance(value, dict):
        kind = "a list" if isinstance(value, list) else shown(value)
        raise BadDataset(f"the row is {kind}, not an object", fix=FORM, file=where)
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"it holds {name}, which is no JSON number")


def _why(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error).partition(";")[0]
