"""Which checkpoint is complete: a marker that says so with the hash of every file.

Trainer writes a checkpoint file by file and resumes from the highest number, so a run that was
killed while saving leaves a newest checkpoint that is broken, or one that resumes with a fresh
optimizer and says nothing. Here a checkpoint is marked incomplete before its first file is written
and complete, with size and SHA-256 of every file, when the last one is on disk.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_lora.errors import BadCheckpoint, listing, shown
from hf_lora.formats.disk import Files, replace_files

MARKER = "hf_lora_checkpoint.json"
VERSION = 1

_NUMBERED = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
_PIECE = 1 << 20  # bytes hashed at a time

_PIPELINE = "pytorch_lora_weights.safetensors"  # of a pipeline, its config in the header

# What a checkpoint needs for a run to go on as if it had not been interrupted: any one name of a
# row. `{rank}` stands for the number of a process. FSDP writes its optimizer as a folder.
_NEEDED: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("the adapter", ("adapter_model.safetensors", _PIPELINE)),
    ("the adapter's config", ("adapter_config.json", _PIPELINE)),
    ("the state of the run", ("trainer_state.json",)),
    ("the optimizer", ("optimizer.pt", "optimizer.bin", "optimizer_0")),
    ("the schedule of the learning rate", ("scheduler.pt",)),
)
_RANDOM = ("the random states", "rng_state.pth", "rng_state_{rank}.pth")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder that can be resumed from.

    Attributes:
        path: The folder.
        step: The optimizer steps it was taken after.
    """

    path: Path
    step: int


def mark_incomplete(folder: Path) -> None:
    """Says of a checkpoint that it is being written; call before its first file."""
    _write_marker(folder, {"format": VERSION, "complete": False})


def mark_complete(folder: Path, *, step: int, world_size: int, adapter: str) -> None:
    """Says of a checkpoint that all of it is on disk; call after its last file.

    Args:
        folder: The checkpoint.
        step: Optimizer steps it was taken after.
        world_size: Number of processes of the run.
        adapter: Digest of the adapter in it.
    """
    files = {}
    for path in _files(folder):
        files[path.relative_to(folder).as_posix()] = {
            "bytes": path.stat().st_size,
            "sha256": _hash(path, sync=True),
        }
    facts = {"step": step, "world_size": world_size, "adapter": adapter, "files": files}
    _write_marker(folder, {"format": VERSION, "complete": True, **facts})


def prune(run: Path, limit: int | None, keep: Iterable[Path]) -> None:
    """Removes the oldest checkpoints of a run until `limit` are left, incomplete ones first.

    Trainer's own rotation goes by number or time alone: after a resume it could keep a checkpoint
    that was half written before the crash and remove the good one.

    Args:
        run: The output folder.
        limit: How many to keep; None or 0 for all.
        keep: Those that stay in any case: the newest and the best.
    """
    if not limit or limit < 0:
        return
    sure = {path.resolve() for path in keep}
    loose = [path for path in _newest_first(run) if path.resolve() not in sure]
    # of a step number that comes twice in a run's history the folder is the same
    loose.sort(key=lambda path: (_is_marked_complete(path), path.stat().st_mtime_ns))
    for path in loose[: max(0, len(loose) + len(sure) - limit)]:
        mark_incomplete(path)  # removing takes a while, and may be killed
        shutil.rmtree(path, ignore_errors=True)


def _is_marked_complete(folder: Path) -> bool:
    return (_marker(folder) or {}).get("complete") is True


def checked(folder: str | os.PathLike[str], *, world_size: int = 1) -> Checkpoint:
    """Returns the checkpoint when a run can go on from it exactly.

    Args:
        folder: The checkpoint folder.
        world_size: Number of processes that are to go on.

    Raises:
        BadCheckpoint: It is incomplete, damaged, or of another number of processes.
    """
    path = Path(folder)
    if not path.is_dir():
        raise BadCheckpoint(
            f"there is no checkpoint folder {str(folder)!r}",
            fix="Give the path of a checkpoint-N folder, or resume_from_checkpoint=True.",
        )
    marker = _marker(path)
    if marker is not None:
        _check_marked(path, marker, world_size)
    _check_needed(path, world_size)
    if marker is None:
        _check_readable(path)
    return Checkpoint(path, _step_of(path))


def newest_complete(
    folder: str | os.PathLike[str], *, world_size: int = 1
) -> tuple[Checkpoint, dict[str, str]]:
    """Finds the newest complete checkpoint of a run.

    Args:
        folder: The run's output folder.
        world_size: Number of processes that are to go on.

    Returns:
        The checkpoint, and for every newer one that was passed over: its name -> why.

    Raises:
        BadCheckpoint: There is none; the message says what is wrong with each.
    """
    skipped: dict[str, str] = {}
    for path in _newest_first(Path(folder)):
        try:
            return checked(path, world_size=world_size), skipped
        except BadCheckpoint as error:
            skipped[path.name] = error.fact
    found = "; ".join(f"{name}: {why}" for name, why in skipped.items())
    raise BadCheckpoint(
        f"no complete checkpoint in {str(folder)!r}" + (f" ({found})" if found else ""),
        fix="Train from the start, or load_lora(model, checkpoint, trainable=True) to go on from "
        "the weights alone.",
    )


def _newest_first(folder: Path) -> list[Path]:
    numbered = []
    for path in folder.iterdir() if folder.is_dir() else ():
        found = _NUMBERED.fullmatch(path.name)
        if found and path.is_dir():
            numbered.append((int(found[1]), path))
    return [path for _, path in sorted(numbered, reverse=True)]


def _step_of(folder: Path) -> int:
    """Returns the step in the run's state, which must be there and readable."""
    try:
        state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
        return int(state["global_step"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise BadCheckpoint(
            f"trainer_state.json cannot be read ({type(error).__name__})", file=str(folder)
        ) from None


def _files(folder: Path) -> Iterator[Path]:
    """Yields all files below a checkpoint but the marker and what a killed writer left."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != MARKER and not path.name.startswith(".hf_lora."):
            yield path


def _hash(path: Path, *, sync: bool = False) -> str:
    """Returns the SHA-256 of a file; with `sync` after its bytes have reached the disk."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        if sync:
            os.fsync(file.fileno())
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()


def _write_marker(folder: Path, fields: Mapping[str, Any]) -> None:
    content = json.dumps(fields, indent=1).encode()
    replace_files(Files(folder, {MARKER: [content]}))


def _marker(folder: Path) -> dict[str, Any] | None:
    """Returns the marker's fields; None without one. A damaged one marks nothing complete."""
    path = folder / MARKER
    if not path.exists():
        return None
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        fields = None
    return fields if isinstance(fields, dict) else {}


def _check_marked(folder: Path, marker: Mapping[str, Any], world_size: int) -> None:
    version, files = marker.get("format", VERSION), marker.get("files")
    if version != VERSION:
        raise BadCheckpoint(
            f"{MARKER} is of format {shown(version)}, and this hf_lora reads format {VERSION}",
            fix="Resume with the hf_lora that saved it, or a newer one.",
            file=str(folder),
            field="format",
        )
    if marker.get("complete") is not True or not isinstance(files, dict):
        raise BadCheckpoint(
            "it is marked incomplete: the run stopped while saving it",
            fix="Resume from an older one: resume_from_checkpoint=True finds it.",
            file=str(folder),
        )
    if marker.get("world_size") != world_size:
        raise BadCheckpoint(
            f"it was saved by {marker.get('world_size')} processes, and {world_size} are running",
            fix="Start as many; random states and batches are those of each process.",
            file=str(folder),
        )
    for name, facts in files.items():
        path = folder / str(name)
        if not isinstance(facts, dict):
            raise _broken(folder, f"{MARKER} is damaged: {name} is {shown(facts)}")
        if not path.is_file():
            raise _broken(folder, f"{name} is missing")
        if path.stat().st_size != facts.get("bytes") or _hash(path) != facts.get("sha256"):
            raise _broken(folder, f"{name} is not the file that was saved")


def _check_needed(folder: Path, world_size: int) -> None:
    what, alone, each = _RANDOM
    ranks = [alone] if world_size == 1 else [each.format(rank=i) for i in range(world_size)]
    rows = (*_NEEDED, *((what, (name,)) for name in ranks))
    missing = [
        f"{what} ({' or '.join(names)})"
        for what, names in rows
        if not any((folder / name).exists() for name in names)
    ]
    if missing:
        raise _broken(folder, f"it lacks {listing(missing)}")


def _check_readable(folder: Path) -> None:
    """Checks what torch wrote without a marker: a zip archive has a checksum of every member."""
    for path in _files(folder):
        if path.suffix in (".pt", ".pth"):
            try:
                with zipfile.ZipFile(path) as archive:
                    bad = archive.testzip()
            except Exception as error:  # each damage of a zip archive raises something else
                raise _broken(folder, f"{path.name} cannot be read ({error})") from None
            if bad is not None:
                raise _broken(folder, f"{path.name} is damaged at {bad}")


def _broken(folder: Path, fact: str) -> BadCheckpoint:
    return BadCheckpoint(
        fact,
        fix="A run that went on from it would differ without a word. Resume from an older one, or "
        "load_lora(model, checkpoint, trainable=True) to go on from the weights alone.",
        file=str(folder),
    )
