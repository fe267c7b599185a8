"""source -> local files: a folder, a file, or a Hub repository pinned to one commit."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path, PureWindowsPath

from huggingface_hub import HfApi, constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.constants import DEFAULT_REVISION
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.file_download import repo_folder_name

from hf_lora.client import patiently, reason
from hf_lora.errors import AdapterNotFound, InvalidOption, LoraError, listing
from hf_lora.formats import FILES, SUFFIX
from hf_lora.formats.disk import inside
from hf_lora.formats.peft import CONFIG

_LONGEST = 4096  # bytes of a path; longer ones make the system raise
_KNOWN = tuple(layout[-1] for layout in FILES)  # weights under the names that layouts use
_IN_FOLDERS = tuple(f"/{name}" for name in _KNOWN)
# Weights of a whole model, by the names of transformers, diffusers and Mistral.
_WHOLE = re.compile(
    r"(model|diffusion_pytorch_model|consolidated)(-\d+-of-\d+)?(\.\w+)?\.safetensors"
)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.\-]*/[\w.\-]+")


def local_files(
    source: str | os.PathLike[str],
    *,
    file: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
) -> Path:
    """Returns a local folder or file that holds the adapter.

    A path that exists is taken as it is. A repository id is resolved to one commit first, so that
    config and weights can never come from two; only the adapter's files are downloaded, and
    files in the cache are used when the Hub cannot be reached.

    Raises:
        AdapterNotFound: Nothing there, or the repository is missing, gated, unreachable, or holds
            no adapter; the error tells which.
    """
    if not isinstance(source, str | os.PathLike) or not isinstance(file, str | None):
        raise InvalidOption(
            f"source={source!r}, file={file!r} are no path or repository id, and name inside",
            fix="Give a folder, a file or a repository id like 'user/name'.",
            field="source",
        )
    below, elsewhere = Path(file or "."), PureWindowsPath(file or ".")
    # by the rules of all systems: a service may pass on what it checked by those of another
    if below.is_absolute() or elsewhere.anchor or ".." in elsewhere.parts:
        raise InvalidOption(
            f"file={file!r} leads out of {source}",
            fix="Name a file or folder inside, or give its own path as the source.",
            field="file",
        )
    if not os.fsdecode(source).strip():
        raise InvalidOption(
            "source is an empty name",
            fix="Give a folder, a file or a repository id like 'user/name'.",
            field="source",
        )
    path = Path(os.fsdecode(source))
    if _exists(path):
        return inside(path, str(below)) if path.is_dir() else path / below
    if not isinstance(source, str) or not _REPO_ID.fullmatch(source):
        raise AdapterNotFound(
            f"there is no file or folder {str(source)[:200]!r}",
            fix="Give a path that exists or a repository id like 'user/name'.",
        )
    try:
        commit, names = _pinned(source, below, revision, token)
        files = [_downloaded(source, n, commit, token) for n in names]
        if commit is not None:
            _remember(source, revision or DEFAULT_REVISION, commit)
    except LoraError:
        raise
    except Exception as error:  # the client passes on what its transport raises
        fact, fix = reason(source, revision, error, "read")
        raise AdapterNotFound(fact, fix=fix) from None
    weights = Path(files[-1])
    named = below.suffix == SUFFIX or weights.name not in _KNOWN
    return weights if named else weights.parent


def _downloaded(source: str, name: str, commit: str | None, token: str | bool | None) -> str:
    """Returns where a file lies in the cache, downloaded whole or not at all."""
    return patiently(lambda: hf_hub_download(source, name, revision=commit, token=token))


def _remember(source: str, revision: str, commit: str) -> None:
    """Notes in the cache where a branch or tag leads, as a download by that name would.

    Without it the cache could not be used by that name when the Hub cannot be reached.
    """
    cache = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=source, repo_type="model")
    ref = cache / "refs" / revision
    if revision == commit or not cache.is_dir():
        return
    with suppress(OSError):  # a cache that cannot be written to serves all the same
        ref.parent.mkdir(parents=True, exist_ok=True)
        aside = ref.with_name(f".{ref.name}.{os.getpid()}")
        aside.write_text(commit, encoding="utf-8")
        os.replace(aside, ref)


def _exists(path: Path) -> bool:
    try:
        return len(os.fspath(path)) < _LONGEST and path.exists()
    except (OSError, ValueError):  # a name that is too long, a NUL byte
        return False


def _pinned(
    source: str, below: Path, revision: str | None, token: str | bool | None
) -> tuple[str | None, Sequence[str]]:
    """Returns the commit hash and the files to load.

    A commit of which the cache holds a layout is not asked for. Where the Hub cannot be reached,
    these are the revision as given, which the cache can still resolve, and the first layout.
    """
    layouts = [[(below / name).as_posix() for name in names] for names in FILES]
    if below.suffix == SUFFIX:  # with its config, where there is one
        layouts = [[(below.parent / CONFIG).as_posix(), below.as_posix()], [below.as_posix()]]
    if revision is not None and _COMMIT.fullmatch(revision):
        held = _cached(source, layouts, revision)
        if held is not None:
            return revision, held
    try:
        info = patiently(lambda: HfApi().model_info(source, revision=revision, token=token))
    except (HfHubHTTPError, ValueError):
        raise
    except Exception:  # no answer at all, in whatever way the transport says so
        return revision, _cached(source, layouts, revision) or layouts[0]
    names = {f.rfilename for f in info.siblings or ()}
    found = next((layout for layout in layouts if names.issuperset(layout)), None)
    if found is None:
        named = below.suffix == SUFFIX
        folder = below.parent if named else below
        here = sorted(n for n in names if n.endswith(SUFFIX) and Path(n).parent == folder)
        found = [n for n in here if not _WHOLE.fullmatch(Path(n).name)]
        if named or len(found) != 1:
            wanted = [below.as_posix()] if named else [" with ".join(each) for each in layouts]
            said, fix = _there(names, found, here)
            raise AdapterNotFound(
                f"the repository {source!r} holds no {' and no '.join(wanted)}. {said}", fix=fix
            )
    return info.sha, found


def _there(names: Collection[str], found: Sequence[str], here: Sequence[str]) -> tuple[str, str]:
    """Returns what a repository has instead, and the fix.

    Args:
        names: All its files.
        found: Those of the right folder that may be adapters.
        here: All weights in that folder.
    """
    folders = sorted({n.rpartition("/")[0] for n in names if n.endswith(_IN_FOLDERS)})
    if found:
        return f"It has {listing(found)}", f"Name one: file={found[0]!r}."
    if folders:
        return f"It has adapters in {', '.join(folders)}", "Name the folder: file=...."
    if here:
        fix = f"If that is an adapter, name it: file={here[0]!r}."
        return f"It has {listing(here)}, a name of whole models", fix
    return "It has none elsewhere", "Other layouts are not read yet."


def _cached(
    source: str, layouts: Sequence[Sequence[str]], revision: str | None
) -> Sequence[str] | None:
    """Returns the first layout of which the cache holds all files; None when it holds none."""

    def is_cached(name: str) -> bool:
        return isinstance(try_to_load_from_cache(source, name, revision=revision), str)

    return next((layout for layout in layouts if all(map(is_cached, layout))), None)
