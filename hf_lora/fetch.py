"""source -> local files: a folder, a file, or a Hub repository pinned to one commit."""

from __future__ import annotations

import os
import re
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from hf_lora.errors import AdapterNotFound, LoraError
from hf_lora.formats.peft import CONFIG, WEIGHTS

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.\-]*/[\w.\-]+")


def local_files(
    source: str | os.PathLike[str], *, revision: str | None = None, token: str | None = None
) -> Path:
    """Returns a local folder or file that holds the adapter.

    A path that exists is taken as it is. A repository id is resolved to one commit first, so that
    config and weights can never come from two; only the adapter's two files are downloaded, and
    files in the cache are used when the Hub cannot be reached.

    Raises:
        AdapterNotFound: Nothing there, or the repository is missing, gated, unreachable, or holds
            no adapter; the error tells which.
    """
    path = Path(source)
    if path.exists():
        return path
    if not isinstance(source, str) or not _REPO_ID.fullmatch(source):
        raise AdapterNotFound(
            f"there is no file or folder {str(source)!r}",
            fix="Give a path that exists or a repository id like 'user/name'.",
        )
    try:
        commit = _commit(source, revision, token)
        files = [
            hf_hub_download(source, name, revision=commit, token=token)
            for name in (CONFIG, WEIGHTS)
        ]
    except LoraError:
        raise
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise _explained(source, revision, error) from None
    return Path(files[0]).parent


def _commit(source: str, revision: str | None, token: str | None) -> str | None:
    """Returns the commit hash, or the revision as given when the Hub cannot be reached."""
    try:
        info = HfApi().model_info(source, revision=revision, token=token)
    except HfHubHTTPError:
        raise
    except (OSError, OfflineModeIsEnabled):
        return revision  # the cache still knows which commit a branch was at
    names = {f.rfilename for f in info.siblings or ()}
    if not {CONFIG, WEIGHTS} <= names:
        raise AdapterNotFound(
            f"the repository {source!r} holds no {CONFIG} with {WEIGHTS}",
            fix="Other layouts are not read yet.",
        )
    return info.sha


# First match wins: the more special error stands above its base.
_CAUSES: tuple[tuple[type[Exception], str, str], ...] = (
    (GatedRepoError, "is gated", "Accept its terms on the Hub and log in: hf auth login."),
    (
        RepositoryNotFoundError,
        "does not exist or is private",
        "Check the name, or log in: hf auth login.",
    ),
    (RevisionNotFoundError, "has no revision {revision!r}", "Check the branch, tag or commit."),
    (
        LocalEntryNotFoundError,
        "cannot be reached and is not in the cache",
        "Connect once, or give a local folder.",
    ),
)


def _explained(source: str, revision: str | None, error: Exception) -> AdapterNotFound:
    for kind, what, fix in _CAUSES:
        if isinstance(error, kind):
            said = what.format(revision=revision)
            return AdapterNotFound(f"the repository {source!r} {said}", fix=fix)
    return AdapterNotFound(f"the repository {source!r} cannot be read: {error}")
