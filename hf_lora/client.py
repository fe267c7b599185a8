"""The Hub's client, made patient: what fails for a moment is tried again, the rest is explained.

huggingface_hub 2.4 tries some requests again and others not (a commit, `model_info`, the body of a
download). Every call that goes through `patiently` must be one that may be made twice.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

T = TypeVar("T")

TRIES = 4
_WAIT = 0.5  # seconds before the second try; each later one waits twice as long
_PASSING = {408, 425, 429, 500, 502, 503, 504}  # HTTP status of what may work a moment later


def _cause(error: BaseException) -> BaseException:
    """Returns what a download or upload failed by: the client says so with an error of its own."""
    wrapped = isinstance(error, LocalEntryNotFoundError) or type(error) is RuntimeError
    return error.__cause__ if wrapped and error.__cause__ is not None else error


def status_of(error: BaseException) -> int | None:
    """Returns the HTTP status of an error that the Hub answered with; None when it did not."""
    response = getattr(_cause(error), "response", None)
    status = getattr(response, "status_code", None)
    return status if isinstance(status, int) else None


def is_passing(error: BaseException) -> bool:
    """Tells whether a request that failed so may work a moment later."""
    status = status_of(error)
    if status is not None:
        return status in _PASSING
    if isinstance(_cause(error), OfflineModeIsEnabled):
        return False
    # the transport's errors, whatever library the client uses for it (requests, httpx, httpx2)
    names = {kind.__name__ for kind in type(_cause(error)).__mro__}
    return bool(names & {"TransportError", "RequestException", "ConnectionError", "TimeoutError"})


def patiently(call: Callable[[], T]) -> T:
    """Returns what a call to the Hub returns, made again after what passes.

    Args:
        call: May be made several times: what it does twice is as if done once.
    """
    again = 0
    while True:
        try:
            return call()
        except Exception as error:
            if is_last(again) or not is_passing(error):
                raise
        pause(again)
        again += 1


def is_last(again: int) -> bool:
    """Tells whether the try after that many failed ones is the last."""
    return again >= TRIES - 1


def pause(again: int) -> None:
    """Waits before the try after that many failed ones."""
    time.sleep(_WAIT * 2**again)


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
    (
        OfflineModeIsEnabled,
        "is not asked for, because HF_HUB_OFFLINE is set",
        "Unset it, or give a local folder.",
    ),
)


def reason(repo_id: str, revision: str | None, error: Exception, doing: str) -> tuple[str, str]:
    """Returns what went wrong with a repository and what to do, as two sentences.

    Args:
        repo_id: The repository.
        revision: What was asked for.
        error: What the client raised.
        doing: Of what is not known better: "read", "written".
    """
    if status_of(error) == 401 and "Invalid credentials" in str(error):
        return "the Hub refuses the access token", "Log in anew: hf auth login."
    for kind, what, fix in _CAUSES:
        if isinstance(error, kind):
            return f"the repository {repo_id!r} {what.format(revision=revision)}", fix
    return (
        f"the repository {repo_id!r} cannot be {doing}: {str(error)[:400]}",
        "Check the name, your rights and the connection.",
    )
