"""Files of a folder: none read through a link that leads out, all replaced whole or not at all."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hf_lora.errors import BadAdapterFile

if sys.platform != "win32":
    import fcntl

_ASIDE = ".hf_lora."  # prefix of files on their way


@dataclass(frozen=True)
class Files:
    """What a layout wants written.

    Attributes:
        folder: Where to.
        contents: File name -> content in pieces, in the order in which they are renamed.
        pull: Name of an old file that must not be read with the new ones; empty for none.
    """

    folder: Path
    contents: Mapping[str, Sequence[bytes]]
    pull: str = ""


def inside(folder: Path, name: str) -> Path:
    """Returns the path of a file in the folder.

    Raises:
        BadAdapterFile: It is a link that leads out of the folder. The Hub's cache links from a
            snapshot to the blobs beside it, which is allowed.
    """
    path, root = folder / name, folder.resolve()
    try:
        target = path.resolve()
    except (OSError, RuntimeError):
        raise BadAdapterFile(f"{name} is a link that leads nowhere", file=str(path)) from None
    allowed = [root]
    if "snapshots" in root.parts:
        at = len(root.parts) - 1 - root.parts[::-1].index("snapshots")
        allowed.append(Path(*root.parts[:at], "blobs"))
    if path.is_symlink() and not any(target.is_relative_to(place) for place in allowed):
        raise BadAdapterFile(
            f"{name} is a link that leads out of its folder",
            fix="Copy the file itself into the folder, or name the folder it lies in.",
            file=str(path),
        )
    return path


def replace_files(files: Files) -> None:
    """Writes files into a folder, each under its name only when all are safe on disk.

    A crash at any moment leaves each file old or new, never part of one. A file to be pulled is
    kept under `backup(name)` until the new ones are there. The folder is made when missing.

    Raises:
        OSError: The disk is full, or the folder cannot be written; the old files are whole.
    """
    folder, contents, pull = files.folder, files.contents, files.pull
    folder.mkdir(parents=True, exist_ok=True)
    with _only_writer(folder) as alone:
        if alone:
            _sweep(folder)
        aside: dict[str, str] = {}
        pulled = False
        try:
            for name, content in contents.items():
                aside[name] = _write_aside(folder, name, content)
            if pull and (folder / pull).is_file():
                os.replace(folder / pull, folder / backup(pull))
                pulled = True
            for name in contents:
                os.replace(aside[name], folder / name)
                del aside[name]
            if pulled:
                (folder / backup(pull)).unlink(missing_ok=True)
            _sync(folder)
        except BaseException:
            if pulled and len(aside) == len(contents):  # nothing is new yet: all is old again
                os.replace(folder / backup(pull), folder / pull)
            for path in aside.values():
                Path(path).unlink(missing_ok=True)
            raise


def backup(name: str) -> str:
    """Returns the name under which `replace_files` keeps a file that it took away."""
    return f".{name}.before"


def _write_aside(folder: Path, name: str, content: Sequence[bytes]) -> str:
    handle, aside = tempfile.mkstemp(dir=folder, prefix=f"{_ASIDE}{name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.writelines(content)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(aside, 0o666 & ~umask)  # mkstemp makes 0600, which hides a shared folder's file
    except BaseException:
        Path(aside).unlink(missing_ok=True)
        raise
    return aside


@contextlib.contextmanager
def _only_writer(folder: Path) -> Iterator[bool]:
    """Holds the folder's lock; gives False where the file system has none."""
    if sys.platform == "win32":
        yield False
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            locked = True
        except OSError:
            locked = False
        yield locked
    finally:
        os.close(handle)


def _sweep(folder: Path) -> None:
    """Removes what a killed writer left; call as the only writer."""
    for path in folder.glob(f"{_ASIDE}*"):
        path.unlink(missing_ok=True)


def _sync(folder: Path) -> None:
    """Makes the renames last through a power loss, where folders can be synced."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
