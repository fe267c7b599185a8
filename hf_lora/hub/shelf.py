"""Which adapters lie in the local cache of the Hub, or below a folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CacheNotFound, scan_cache_dir

from hf_lora.adapter import Adapter
from hf_lora.errors import AdapterNotFound, LoraError
from hf_lora.formats import FILES, SUFFIX, read_header

_WHOLE_MODELS = ("model", "diffusion_pytorch_model", "consolidated")  # how their names begin
_LONGEST = 64 << 20  # bytes; a file under a name of its own that is longer is a model or no LoRA


@dataclass(frozen=True)
class Shelved:
    """An adapter on this machine, by what its header says.

    Attributes:
        path: Its folder or file.
        repo_id: The repository it was downloaded from; empty for a folder.
        revision: The commit, and the branches and tags that lead there.
        base: The model it was made on; empty when unknown.
        digest: Its identity; empty for files of other programs.
        kinds: Component -> kind of adapter.
        parameters: Number of values.
        size: Bytes of its weights.
        problem: Why it cannot be read; empty when it can.
    """

    path: str
    repo_id: str = ""
    revision: tuple[str, ...] = ()
    base: str = ""
    digest: str = ""
    kinds: tuple[tuple[str, str], ...] = ()
    parameters: int = 0
    size: int = 0
    problem: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Returns the entry as plain data."""
        return asdict(self) | {"kinds": dict(self.kinds), "revision": list(self.revision)}


def adapters_in_cache(cache: str | os.PathLike[str] | None = None) -> list[Shelved]:
    """Lists the adapters of every revision in the Hub's cache; asks nobody.

    Args:
        cache: The cache; the client's own when left out.

    Raises:
        AdapterNotFound: There is no such folder; the client's own may be missing.
    """
    try:
        found = scan_cache_dir(None if cache is None else Path(cache))
    except CacheNotFound:
        if cache is None:
            return []
        raise AdapterNotFound(f"there is no cache in {os.fspath(cache)}") from None
    rows = []
    for repo in sorted(found.repos, key=lambda repo: repo.repo_id):
        if repo.repo_type != "model":
            continue
        for revision in sorted(repo.revisions, key=lambda r: (-r.last_modified, r.commit_hash)):
            names = (revision.commit_hash, *sorted(revision.refs))
            for path in _places(revision.snapshot_path):
                rows += _row(path, repo.repo_id, names)
    return rows


def adapters_below(folder: str | os.PathLike[str]) -> list[Shelved]:
    """Lists the adapters in a folder and the folders below.

    Raises:
        AdapterNotFound: There is no such folder.
    """
    root = Path(folder)
    if not root.is_dir():
        raise AdapterNotFound(f"there is no folder {os.fspath(folder)!r}")
    return [row for path in _places(root) for row in _row(path)]


def _places(root: Path) -> Iterator[Path]:
    """Yields what may be adapters: folders of a known layout, other safetensors files alone."""
    for at, folders, files in os.walk(root):
        folders.sort()
        here = Path(at)
        layout = next((names for names in FILES if set(names) <= set(files)), ())
        if layout:
            yield here
        for name in sorted(files):
            if name.endswith(SUFFIX) and name not in layout and not _is_model(here / name):
                yield here / name


def _is_model(file: Path) -> bool:
    whole = file.name.partition(".")[0].partition("-0")[0] in _WHOLE_MODELS
    return whole or file.stat().st_size > _LONGEST


def _row(path: Path, repo_id: str = "", revision: tuple[str, ...] = ()) -> list[Shelved]:
    """Returns the entry of one place; none for a file that holds no adapter."""
    weights = path
    if path.is_dir():
        weights = next(path / names[-1] for names in FILES if (path / names[-1]).is_file())
    where: dict[str, Any] = {"path": str(path), "repo_id": repo_id, "revision": revision}
    size = weights.stat().st_size
    try:
        adapter = read_header(path, strict=False)
    except LoraError as error:
        known = path.is_dir() or error.field == "host"  # of another program, sound as it looks
        return [Shelved(**where, size=size, problem=error.fact)] if known else []
    return [_entry(adapter, size, where)]


def _entry(adapter: Adapter, size: int, where: dict[str, Any]) -> Shelved:
    return Shelved(
        **where,
        base=str(adapter.info["base"] or ""),
        digest=adapter.digest,
        kinds=tuple((n, c.kind.lower()) for n, c in adapter.components.items()),
        parameters=sum(t.numel() for c in adapter.components.values() for _, t in c.tensors()),
        size=size,
    )
