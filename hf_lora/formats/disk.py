"""Files of a folder: none read through a link that leads out, all replaced whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hf_lora.errors import BadAdapterFile

if sys.platform != "win32":
    import fcntl

_ASIDE = ".hf_lora."  # prefix of files that are not yet, or no longer, under their name


@dataclass(frozen=True)
class Files:
    """What a layout wants written.

    Attributes:
        folder: Where to.
        contents: File name -> content in pieces, in the order in which they are renamed.
        guard: Name of the one among them that gives the others their meaning: an old one must not
            be read with the new ones, nor a new one with the old. Empty for none.
    """

    folder: Path
    contents: Mapping[str, Sequence[bytes]]
    guard: str = ""


def inside(folder: Path, name: str) -> Path:
    """Returns the path of a file in the folder.

    Raises:
        BadAdapterFile: It is a link that leads out of the folder. The Hub's cache links from a
            snapshot to the blobs beside it, which is allowed.
    """
    path, root = folder / name, folder.resolve()
    try:
        target = path.resolve()
    except (OSError, RuntimeError, ValueError):  # a loop, a NUL byte
        raise BadAdapterFile(
            f"{name!r} is no file or a link that leads nowhere",
            fix="Copy the file itself into the folder.",
            file=str(path),
        ) from None
    allowed = [root]
    if "snapshots" in root.parts:
        at = len(root.parts) - 1 - root.parts[::-1].index("snapshots")
        allowed.append(Path(*root.parts[:at], "blobs"))
    if not any(target.is_relative_to(place) for place in allowed):
        raise BadAdapterFile(
            f"{name} is a link that leads out of its folder",
            fix="Copy the file itself into the folder, or name the folder it lies in.",
            file=str(path),
        )
    return path


def replace_files(files: Files) -> None:
    """Writes files into a folder, each under its name only when all are safe on disk.

    A crash at any moment leaves each file old or new, never part of one. A guard that changes is
    kept under `backup(name)` until the new files are there. The folder is made when missing.

    Raises:
        OSError: The disk is full, or the folder cannot be written; the old files are whole.
    """
    folder, guard = files.folder, files.guard
    folder.mkdir(parents=True, exist_ok=True)
    with _only_writer(folder) as alone, _names_aside(folder) as name_aside:
        if alone:
            _sweep(folder)
        new = {name: name_aside() for name in files.contents}
        for name, content in files.contents.items():
            _write(new[name], content)
        old = {name: name_aside() for name in new if os.path.lexists(folder / name)}
        for name, path in old.items():
            _keep(folder / name, path)
        try:
            if guard in old and not _holds(folder / guard, files.contents[guard]):
                os.replace(folder / guard, folder / backup(guard))
            for name, path in new.items():
                os.replace(path, folder / name)
        except BaseException:
            _put_back(folder, old, new, guard)
            raise
        _sync(folder)
        if guard:
            with contextlib.suppress(OSError):
                (folder / backup(guard)).unlink(missing_ok=True)


def backup(name: str) -> str:
    """Returns the name under which `replace_files` keeps a file that it took away."""
    return f".{name}.before"


def _put_back(folder: Path, old: Mapping[str, Path], new: Mapping[str, Path], guard: str) -> None:
    """Undoes the renames, as far as the old files could be kept; no moment pairs old with new."""
    if all(path.exists() for path in new.values()):  # nothing was renamed but the guard
        if guard in old and not os.path.lexists(folder / guard):
            os.replace(folder / backup(guard), folder / guard)
        return
    if not all(os.path.lexists(path) for path in old.values()):
        return
    if guard:
        (folder / guard).unlink(missing_ok=True)
    for name in new:
        if name in old:
            os.replace(old[name], folder / name)
        else:
            (folder / name).unlink(missing_ok=True)
    if guard in old:
        (folder / backup(guard)).unlink(missing_ok=True)


@contextlib.contextmanager
def _names_aside(folder: Path) -> Iterator[Callable[[], Path]]:
    """Gives names that no other writer has; what lies under them at the end is removed."""
    given: list[Path] = []

    def give() -> Path:
        given.append(folder / f"{_ASIDE}{secrets.token_hex(8)}")
        return given[-1]

    try:
        yield give
    finally:
        for path in given:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


def _write(path: Path, content: Sequence[bytes]) -> None:
    """Writes a new file and waits until it is on disk; its mode follows the umask."""
    with open(path, "xb") as file:
        file.writelines(content)
        file.flush()
        os.fsync(file.fileno())


def _keep(path: Path, name: Path) -> None:
    """Gives an old file a second name, where the file system has links."""
    if path.is_dir() and not path.is_symlink():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    with contextlib.suppress(OSError):
        os.link(path, name)


def _holds(path: Path, content: Sequence[bytes]) -> bool:
    """Tells whether the file has exactly this content."""
    wanted = b"".join(content)
    try:
        return path.stat().st_size == len(wanted) and path.read_bytes() == wanted
    except OSError:
        return False


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
        try:
            # closing is not enough: a process forked meanwhile would go on holding the lock
            with contextlib.suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_UN)
        finally:
            with contextlib.suppress(OSError):
                os.close(handle)


def _sweep(folder: Path) -> None:
    """Removes what a killed writer left; call as the only writer."""
    for path in folder.glob(f"{_ASIDE}{'[0-9a-f]' * 16}"):  # no other file of such a name
        if path.is_file() or path.is_symlink():
            path.unlink(missing_ok=True)


def _sync(folder: Path) -> None:
    """Makes the renames last through a power loss, where folders can be synced."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
