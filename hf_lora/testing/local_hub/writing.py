"""Routes that change a repository: uploads, commits, branches, tags."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

from hf_lora.testing.local_hub import cards
from hf_lora.testing.local_hub.answers import (
    Answer,
    Call,
    Refused,
    pushable,
    reply,
    revision_of,
    writable,
)
from hf_lora.testing.local_hub.store import ATTRIBUTES, Commit, File, Repo, Store, is_lfs

__all__ = ["ROUTES", "checked_tree"]

Files = dict[str, File]


def _decoded(text: object) -> bytes:
    try:
        return base64.b64decode(str(text), validate=True)
    except binascii.Error:
        raise Refused(400, "content is not base64") from None


def _target(store: Store, call: Call, repo_id: str, revision: str) -> Repo:
    """Returns a repository that the caller may commit to at that revision."""
    # whoever may read may propose, and add to what was proposed
    free = call.flag("create_pr") or revision.startswith("refs/pr/")
    return (pushable if free else writable)(store, call, repo_id)


def _modes(store: Store, call: Call, repo_id: str, revision: str) -> Answer:
    """Says of each file how it is to be uploaded, and what is there under its path now."""
    files = revision_of(_target(store, call, repo_id, revision), revision).files
    shown = []
    for file in call.json().get("files", []):
        path, size, sample = file["path"], file["size"], _decoded(file.get("sample", ""))
        lfs = is_lfs(files.get(ATTRIBUTES), path, sample, size)
        mode = {"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
        shown.append(mode | ({"oid": files[path].oid} if path in files else {}))
    return reply({"files": shown})


def _batch(store: Store, call: Call, repo_id: str) -> Answer:
    """Says of each LFS object where to upload it; nothing of those that are there already."""
    repo = pushable(store, call, repo_id)
    base = f"{store.endpoint}/{repo.id}.git/info/lfs"
    shown = []
    for item in call.json().get("objects", []):
        entry: dict[str, Any] = {"oid": item["oid"], "size": item["size"]}
        if item["oid"] not in repo.objects:
            repo.granted.add(item["oid"])
            entry["actions"] = {
                "upload": {"href": f"{base}/objects/{item['oid']}"},
                "verify": {"href": f"{base}/verify"},
            }
        shown.append(entry)
    return reply({"transfer": "basic", "objects": shown})


def _upload(store: Store, call: Call, repo_id: str, oid: str) -> Answer:
    """Takes an LFS object. Like the storage behind the Hub it asks for no token, but for leave."""
    repo = store.repos.get(repo_id)
    if repo is None or oid not in repo.granted:
        raise Refused(403, f"nobody was told to upload {oid}")
    if hashlib.sha256(call.body).hexdigest() != oid:
        raise Refused(400, f"the content is not that of {oid}")
    repo.objects[oid] = call.body
    return Answer(headers={"ETag": f'"{oid}"'})


def _verify(store: Store, call: Call, repo_id: str) -> Answer:
    repo, data = pushable(store, call, repo_id), call.json()
    held = repo.objects.get(data.get("oid", ""))
    if held is None:
        raise Refused(404, f"no LFS object {data.get('oid')}")
    if len(held) != data.get("size"):
        raise Refused(422, f"the LFS object has {len(held)} bytes, not {data.get('size')}")
    return reply({})


def _add(repo: Repo, files: Files, value: Mapping[str, Any]) -> None:
    if value.get("encoding") != "base64":
        raise Refused(400, f"unknown encoding {value.get('encoding')}")
    files[value["path"]] = File(_decoded(value["content"]), lfs=False)


def _add_object(repo: Repo, files: Files, value: Mapping[str, Any]) -> None:
    held = repo.objects.get(value["oid"])
    if held is None:
        said = f"LFS pointer of {value['path']} points to {value['oid']}, which does not exist"
        raise Refused(400, f"Your push was rejected: {said}")
    if value.get("size") not in (None, len(held)):
        raise Refused(400, f"{value['path']} has {len(held)} bytes, not {value['size']}")
    files[value["path"]] = File(held, lfs=True)


def _remove(repo: Repo, files: Files, value: Mapping[str, Any]) -> None:
    if files.pop(value["path"], None) is None:
        raise Refused(404, f"no file {value['path']} to delete", "EntryNotFound")


def _remove_folder(repo: Repo, files: Files, value: Mapping[str, Any]) -> None:
    folder = value["path"].rstrip("/") + "/"
    inside = [path for path in files if path.startswith(folder)]
    if not inside:
        raise Refused(404, f"no folder {folder} to delete", "EntryNotFound")
    for path in inside:
        del files[path]


def _copy(repo: Repo, files: Files, value: Mapping[str, Any]) -> None:
    revision, source = value.get("srcRevision"), value["srcPath"]
    held: Mapping[str, File] = revision_of(repo, revision).files if revision else files
    if source not in held:
        raise Refused(404, f"no file {source} to copy", "EntryNotFound")
    files[value["path"]] = held[source]


_OPERATIONS: Mapping[str, Callable[[Repo, Files, Mapping[str, Any]], None]] = {
    "file": _add,
    "lfsFile": _add_object,
    "deletedFile": _remove,
    "deletedFolder": _remove_folder,
    "copyFile": _copy,
}


def _lines(body: bytes) -> tuple[dict[str, Any], list[tuple[str, dict[str, Any]]]]:
    """Returns the header of a commit, and its operations with their values."""
    try:
        lines = [json.loads(line) for line in body.splitlines() if line.strip()]
        rows = [(line["key"], dict(line["value"])) for line in lines]
    except (ValueError, TypeError, KeyError):
        raise Refused(400, "a commit is lines of JSON, each a key and a value") from None
    if not rows or rows[0][0] != "header" or not rows[0][1].get("summary"):
        raise Refused(400, "the first line of a commit is a header with a summary")
    unknown = [key for key, _ in rows[1:] if key not in _OPERATIONS]
    if unknown:
        raise Refused(400, f"unknown operation {unknown[0]}")
    return rows[0][1], rows[1:]


def checked_tree(files: Files) -> Files:
    """Returns the files of a revision when git could hold them.

    Raises:
        Refused: A path leaves the repository, or is a file and a folder.
    """
    for path in files:
        parts = path.split("/")
        if any(part in ("", ".", "..", ".git") for part in parts):
            raise Refused(400, f"bad path {path!r}")
        above = ["/".join(parts[:depth]) for depth in range(1, len(parts))]
        if any(folder in files for folder in above):
            raise Refused(400, f"{path!r} lies in a folder that is a file")
    return files


def _changed(repo: Repo, parent: Commit, rows: list[tuple[str, dict[str, Any]]]) -> Files:
    """Returns the files of a revision after the operations of a commit."""
    files = dict(parent.files)
    for key, value in rows:
        try:
            _OPERATIONS[key](repo, files, value)
        except (KeyError, TypeError, AttributeError):
            raise Refused(400, f"{key} lacks a value it needs") from None
    card = files.get(cards.CARD)
    if card is not None and card != parent.files.get(cards.CARD):
        wrong, _ = cards.problems(card.data.decode("utf-8", "replace"))
        if wrong:
            raise Refused(400, f"Invalid metadata in {cards.CARD}: {'; '.join(wrong)}")
    return checked_tree(files)


def _commit(store: Store, call: Call, repo_id: str, revision: str) -> Answer:
    as_pull = call.flag("create_pr")
    repo = _target(store, call, repo_id, revision)
    parent = revision_of(repo, revision)
    ref = repo.find_ref(revision)
    if ref is None or ref.startswith("refs/tags/"):
        raise Refused(400, f"{revision} is no branch")
    header, rows = _lines(call.body)
    asked = header.get("parentCommit")
    if asked is not None and asked != parent.oid:
        said = f"{revision} is at {parent.oid}, not at {asked}"
        raise Refused(412, f"A commit has happened since. Please refresh and try again: {said}")
    files = _changed(repo, parent, rows)
    number = repo.next_pull() if as_pull else 0
    message = f"{header['summary']}\n\n{header.get('description') or ''}".rstrip("\n")
    target = f"refs/pr/{number}" if as_pull else ref
    made = repo.advance(target, parent.oid, files, message, call.user or "")
    url = f"{store.endpoint}/{repo.id}"
    said_pull = {"pullRequestUrl": f"{url}/discussions/{number}"} if as_pull else {}
    said_all = {"success": True, "commitOid": made.oid, "commitUrl": f"{url}/commit/{made.oid}"}
    return reply(said_all | said_pull)


def _new_ref(repo: Repo, ref: str, revision: str) -> Answer:
    commit = revision_of(repo, revision)
    if ref in repo.refs:
        raise Refused(409, f"Reference already exists: {ref}")
    repo.refs[ref] = commit.oid
    return reply({})


def _drop_ref(repo: Repo, ref: str) -> Answer:
    if ref == "refs/heads/main":
        raise Refused(403, "the branch main cannot be deleted")
    if repo.refs.pop(ref, None) is None:
        raise Refused(404, f"no {ref}", "RevisionNotFound")
    return reply({})


def _new_branch(store: Store, call: Call, repo_id: str, branch: str) -> Answer:
    repo = writable(store, call, repo_id)
    return _new_ref(repo, f"refs/heads/{branch}", call.json().get("startingPoint") or "main")


def _drop_branch(store: Store, call: Call, repo_id: str, branch: str) -> Answer:
    return _drop_ref(writable(store, call, repo_id), f"refs/heads/{branch}")


def _new_tag(store: Store, call: Call, repo_id: str, revision: str) -> Answer:
    repo, tag = writable(store, call, repo_id), call.json().get("tag")
    if not tag:
        raise Refused(400, '"tag" is required')
    return _new_ref(repo, f"refs/tags/{tag}", revision)


def _drop_tag(store: Store, call: Call, repo_id: str, tag: str) -> Answer:
    return _drop_ref(writable(store, call, repo_id), f"refs/tags/{tag}")


ROUTES = (
    ("POST", "/api/models/{repo}/preupload/{revision}", _modes),
    ("POST", "/{repo}.git/info/lfs/objects/batch", _batch),
    ("PUT", "/{repo}.git/info/lfs/objects/{oid}", _upload),
    ("POST", "/{repo}.git/info/lfs/verify", _verify),
    ("POST", "/api/models/{repo}/commit/{revision}", _commit),
    ("POST", "/api/models/{repo}/branch/{revision}", _new_branch),
    ("DELETE", "/api/models/{repo}/branch/{revision}", _drop_branch),
    ("POST", "/api/models/{repo}/tag/{revision}", _new_tag),
    ("DELETE", "/api/models/{repo}/tag/{revision}", _drop_tag),
)
