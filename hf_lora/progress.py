"""A bar on standard error while a large file is read; nothing where nobody looks."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

LARGE = 200 << 20  # bytes; what is smaller is read before a bar is seen

Moved = Callable[[int], object]  # is told of every number of bytes that has been read


@contextmanager
def reading(name: str, size: int) -> Iterator[Moved | None]:
    """Shows a bar for the block, where the file is large and standard error is a terminal.

    The switches of huggingface_hub for bars, such as `HF_HUB_DISABLE_PROGRESS_BARS`, hold.

    Args:
        name: What is read, for the bar.
        size: Its bytes.

    Yields:
        What to tell of the bytes that have been read; None without a bar.
    """
    bar = _bar(name, size) if size >= LARGE and _is_watched() else None
    if bar is None:
        yield None
        return
    with bar:
        yield bar.update


def _is_watched() -> bool:
    try:
        return sys.stderr is not None and sys.stderr.isatty()
    except ValueError:  # closed
        return False


def _bar(name: str, size: int) -> Any:
    from huggingface_hub.utils.tqdm import tqdm

    bar: Any = tqdm  # untyped
    return bar(
        total=size, desc=name[:40], unit="B", unit_scale=True, unit_divisor=1024, leave=False
    )
