"""One picture of many: prompts as rows, steps as columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

CELL = 192  # pixels a side for a picture, which is enlarged or made smaller
COLUMNS = 12  # at most: first and last, and others evenly between

_GAP = 8
_LINE = 16  # pixels a line of text


def sheet(drawn: Mapping[tuple[int, int], Path], prompts: Sequence[str]) -> Any:
    """Returns a picture of PIL; a place whose file is missing or broken is white.

    Args:
        drawn: (step, number of the prompt) -> picture.
        prompts: Written above their rows.
    """
    from PIL import Image, ImageDraw

    steps = spread(sorted({step for step, _ in drawn}))
    line = CELL + _LINE + _GAP
    size = (_GAP + len(steps) * (CELL + _GAP), _LINE + _GAP + len(prompts) * line)
    page = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(page)
    for column, step in enumerate(steps):
        left = _GAP + column * (CELL + _GAP)
        pen.text((left, 2), f"step {step}", fill="black")
        for row in range(len(prompts)):
            picture = _opened(drawn.get((step, row)))
            if picture is not None:
                page.paste(_fitted(picture), (left, 2 * _LINE + row * line))
    for row, prompt in enumerate(prompts):
        _write(pen, (_GAP, _LINE + row * line + 2), prompt, size[0] - 2 * _GAP)
    return page


def spread(steps: Sequence[int]) -> list[int]:
    """Returns at most `COLUMNS` of the steps, the first and the last among them."""
    if len(steps) <= COLUMNS:
        return list(steps)
    return [steps[round(i * (len(steps) - 1) / (COLUMNS - 1))] for i in range(COLUMNS)]


def _opened(path: Path | None) -> Any:
    from PIL import Image

    if path is None:
        return None
    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError):
        return None


def _fitted(picture: Any) -> Any:
    from PIL import Image

    scale = CELL / max(picture.size)
    size = tuple(max(1, round(side * scale)) for side in picture.size)
    how = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
    return picture.resize(size, how)


def _write(pen: Any, place: tuple[int, int], text: str, width: int) -> None:
    """Writes a text on one line, cut where it does not fit."""
    text = " ".join(text.split())
    if type(pen.getfont()).__name__ == "ImageFont":  # Pillow without FreeType
        text = text.encode("latin-1", "replace").decode("latin-1")  # its letters
    if pen.textlength(text) > width:
        while text and pen.textlength(text + "...") > width:
            text = text[:-1]
        text += "..."
    pen.text(place, text, fill="black")
