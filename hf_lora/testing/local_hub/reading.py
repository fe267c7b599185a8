"""Routes that read a revision: trees, paths, refs, history, and the files themselves."""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import parse_qs

from hf_lora.testing.local_hub.answers import Answer, Call, Refused, readable, reply, revision_of
from hf_lora.testing.local_hub.store import Commit, File, Repo, Store

__all__ = ["ROUTES", "open_to"]


def open_to(store: Store, call: Call, repo: Repo) -> None:
    """Checks that the caller may read the files of a repository.

    Raises:
        Refused: It is gated, and the caller is not its owner.
    """
    if repo.gated and not store.owns(call.user, repo.owner):
        said = f"Access to model {repo.id} is restricted."
        raise Refused(403 if call.user else 401, said, "GatedRepo")


def _missing(commit: Commit, path: str) -> Refused:
    # with the commit, the client remembers that the file is not there
    said = {"X-Repo-Commit": commit.oid}
    return Refused(404, f"{path} does not exist on {commit.oid}", "EntryNotFound", said)


def _entry(commit: Commit, path: str) -> dict[str, Any]:
    """Returns how a file or folder is listed."""
    if path not in commit.files:
        return {"type": "directory", "oid": commit.folders[path], "size": 0, "path": path}
    file = commit.files[path]
    size = len(file.data)
    entry: dict[str, Any] = {"type": "file", "oid": file.blob, "size": size, "path": path}
    if file.lfs:
        entry["lfs"] = {"oid": file.sha256, "size": size, "pointerSize": len(file.pointer)}
    return entry


def _tree(store: Store, call: Call, repo_id: str, revision: str, folder: str = "") -> Answer:
    commit = revision_of(readable(store, call, repo_id), revision)
    folder = folder.strip("/")
    if folder not in commit.folders:
        raise _missing(commit, folder)
    within = f"{folder}/" if folder else ""
    paths = [path for path in (*commit.folders, *commit.files) if path.startswith(within) and path]
    if not call.flag("recursive"):
        paths = [path for path in paths if "/" not in path[len(within) :]]
    return reply([_entry(commit, path) for path in sorted(paths)])


def _paths(store: Store, call: Call, repo_id: str, revision: str) -> Answer:
    commit = revision_of(readable(store, call, repo_id), revision)
    asked = [path.strip("/") for path in parse_qs(call.body.decode()).get("paths", [])]
    known = [path for path in asked if path in commit.files or path in commit.folders]
    return reply([_entry(commit, path) for path in known])


def _refs(store: Store, call: Call, repo_id: str) -> Answer:
    repo = readable(store, call, repo_id)
    kinds = {"branches": "refs/heads/", "tags": "refs/tags/"}
    if call.flag("include_prs"):
        kinds["pullRequests"] = "refs/pr/"
    shown: dict[str, list[dict[str, str]]] = {"converts": []}
    for kind, start in kinds.items():
        shown[kind] = [
            {"name": ref.removeprefix(start), "ref": ref, "targetCommit": oid}
            for ref, oid in repo.refs.items()
            if ref.startswith(start)
        ]
    return reply(shown)


def _commits(store: Store, call: Call, repo_id: str, revision: str) -> Answer:
    repo = readable(store, call, repo_id)
    shown = [
        {
            "id": commit.oid,
            "title": commit.title,
            "message": commit.description,
            "date": commit.date,
            "authors": [{"user": commit.author}],
        }
        for commit in repo.history(revision_of(repo, revision))
    ]
    return reply(shown)


def _resolve(store: Store, call: Call, repo_id: str, revision: str, path: str) -> Answer:
    repo = readable(store, call, repo_id)
    open_to(store, call, repo)
    commit = revision_of(repo, revision)
    file = commit.files.get(path)
    if file is None:
        raise _missing(commit, path)
    headers = {
        "X-Repo-Commit": commit.oid,
        "ETag": f'"{file.oid}"',
        "Accept-Ranges": "bytes",
        "Content-Type": "application/octet-stream",
    }
    if file.lfs:
        headers |= {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(len(file.data))}
    if file.oid in call.headers.get("if-none-match", ""):
        return Answer(304, b"", headers)
    return _part(call, file, headers)


def _part(call: Call, file: File, headers: dict[str, str]) -> Answer:
    """Returns the bytes that the Range header asks for: all, from, to, or the last of them."""
    size = len(file.data)
    asked = re.fullmatch(r"\s*bytes=(\d*)-(\d*)\s*", call.headers.get("range", ""))
    if asked is None or asked.groups() == ("", ""):
        return Answer(200, file.data, headers)
    first, last = asked.groups()
    start = int(first) if first else max(0, size - int(last))
    end = min(int(last), size - 1) if first and last else size - 1
    if start > end:
        said = {"Content-Range": f"bytes */{size}"}
        raise Refused(416, f"the file ends before byte {start}", headers=said)
    headers["Content-Range"] = f"bytes {start}-{end}/{size}"
    return Answer(206, file.data[start : end + 1], headers)


ROUTES = (
    ("GET", "/api/models/{repo}/tree/{revision}", _tree),
    ("GET", "/api/models/{repo}/tree/{revision}/{path}", _tree),
    ("POST", "/api/models/{repo}/paths-info/{revision}", _paths),
    ("GET", "/api/models/{repo}/refs", _refs),
    ("GET", "/api/models/{repo}/commits/{revision}", _commits),
    ("GET", "/{repo}/resolve/{revision}/{path}", _resolve),
)
