"""A request as the routes see it, what they answer, and how they refuse."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, urlsplit

from hf_lora.testing.local_hub.store import Commit, Repo, Store

__all__ = ["Answer", "Call", "Refused", "pushable", "readable", "reply", "revision_of", "writable"]


@dataclass(frozen=True)
class Call:
    """A request.

    Attributes:
        method: `GET`, `HEAD`, `POST`, `PUT` or `DELETE`.
        target: Path and query, as they were sent.
        headers: Header by its name in lower case.
        body: Body in bytes.
        user: Who is signed in, None for a stranger.
    """

    method: str
    target: str
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    user: str | None = None

    @property
    def path(self) -> str:
        """The path without the query, still quoted."""
        return urlsplit(self.target).path

    @property
    def query(self) -> dict[str, list[str]]:
        """The values of each name in the query."""
        return parse_qs(urlsplit(self.target).query)

    def first(self, name: str) -> str:
        """Returns the first value of a name in the query, empty when it is not there."""
        return self.query.get(name, [""])[0]

    def flag(self, name: str) -> bool:
        """Returns whether a name in the query is set to something true."""
        return self.first(name).lower() in ("1", "true")

    def json(self) -> dict[str, Any]:
        """Returns the body as a JSON object.

        Raises:
            Refused: It is none.
        """
        try:
            data = json.loads(self.body or b"{}")
        except ValueError:
            data = None
        if not isinstance(data, dict):
            raise Refused(400, "the body is not a JSON object")
        return data


@dataclass(frozen=True)
class Answer:
    """What is sent back: status, body in bytes, headers."""

    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)


def reply(data: object, status: int = 200) -> Answer:
    """Returns data as an answer in JSON."""
    return Answer(status, json.dumps(data).encode(), {"Content-Type": "application/json"})


class Refused(Exception):
    """A request that is not carried out.

    Args:
        status: HTTP status.
        message: What the client shows.
        code: The Hub's error code, by which the client picks its exception.
        headers: More headers.
    """

    def __init__(
        self, status: int, message: str, code: str = "", headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code
        self.headers = headers or {}

    def answer(self) -> Answer:
        """Returns the answer that says so."""
        said = reply({"error": self.message}, self.status)
        codes = {"X-Error-Code": self.code} if self.code else {}
        headers = {**said.headers, **codes, "X-Error-Message": self.message, **self.headers}
        return Answer(said.status, said.body, headers)


def readable(store: Store, call: Call, repo_id: str) -> Repo:
    """Returns a repository that the caller may see.

    Raises:
        Refused: There is none, or it is private; which of both, a stranger is not told.
    """
    repo = store.repos.get(repo_id)
    if repo is None or (repo.private and not store.owns(call.user, repo.owner)):
        raise Refused(404, "Repository not found", "RepoNotFound")
    return repo


def pushable(store: Store, call: Call, repo_id: str) -> Repo:
    """Returns a repository to which the caller may at least open a pull request.

    Raises:
        Refused: It cannot be seen, or nobody is signed in.
    """
    repo = readable(store, call, repo_id)
    if call.user is None:
        raise Refused(401, "Invalid username or password.")
    return repo


def writable(store: Store, call: Call, repo_id: str) -> Repo:
    """Returns a repository that the caller may change.

    Raises:
        Refused: It cannot be seen, nobody is signed in, or it belongs to somebody else.
    """
    repo = pushable(store, call, repo_id)
    if not store.owns(call.user, repo.owner):
        raise Refused(403, f"You don't have the rights to write to {repo.id}")
    return repo


def revision_of(repo: Repo, revision: str) -> Commit:
    """Returns the commit of a revision.

    Raises:
        Refused: The repository has no such revision.
    """
    commit = repo.find(revision)
    if commit is None:
        raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
    return commit
