"""Routes of accounts and repositories: who am I, create, delete, settings, information, cards."""

from __future__ import annotations

from typing import Any

from hf_lora.testing.local_hub import cards
from hf_lora.testing.local_hub.answers import (
    Answer,
    Call,
    Refused,
    pushable,
    readable,
    reply,
    revision_of,
    writable,
)
from hf_lora.testing.local_hub.reading import open_to
from hf_lora.testing.local_hub.store import Commit, File, Repo, Store

__all__ = ["ROUTES"]


def _signed_in(call: Call) -> str:
    if call.user is None:
        raise Refused(401, "Invalid username or password.")
    return call.user


def _whoami(store: Store, call: Call) -> Answer:
    user = _signed_in(call)
    orgs = [{"type": "org", "name": org, "roleInOrg": "write"} for org in store.orgs]
    access = {"type": "access_token", "accessToken": {"displayName": "local", "role": "write"}}
    return reply({"type": "user", "name": user, "fullname": user, "orgs": orgs, "auth": access})


def _named(store: Store, call: Call) -> str:
    """Returns the id that the body of a create or delete names."""
    data = call.json()
    if data.get("type") not in (None, "model"):
        raise Refused(404, f"this Hub holds models only, not a {data['type']}")
    name = data.get("name")
    if not isinstance(name, str) or not name:
        raise Refused(400, '"name" is required')
    return f"{data.get('organization') or _signed_in(call)}/{name}"


def _create(store: Store, call: Call) -> Answer:
    _signed_in(call)
    data, repo_id = call.json(), _named(store, call)
    url = {"url": f"{store.endpoint}/{repo_id}"}
    owner = repo_id.partition("/")[0]
    if not store.owns(call.user, owner):
        raise Refused(403, f"You don't have the rights to create a model under the name {owner}")
    if repo_id in store.repos:
        return reply({"error": "You already created this model repo", **url}, 409)
    store.add(repo_id, private=_is_private(data) is True)
    return reply({**url, "name": repo_id, "id": repo_id})


def _is_private(data: dict[str, Any]) -> bool | None:
    """Returns what a body says of who may see a repository, None when it says nothing."""
    if data.get("visibility") is not None:
        return bool(data["visibility"] != "public")
    return None if data.get("private") is None else bool(data["private"])


def _delete(store: Store, call: Call) -> Answer:
    _signed_in(call)
    del store.repos[writable(store, call, _named(store, call)).id]
    return reply({})


def _settings(store: Store, call: Call, repo_id: str) -> Answer:
    repo, data = writable(store, call, repo_id), call.json()
    private = _is_private(data)
    if private is not None:
        repo.private = private
    if "gated" in data:
        repo.gated = data["gated"]
    return reply({"private": repo.private, "gated": repo.gated})


def _sibling(path: str, file: File, blobs: bool) -> dict[str, Any]:
    if not blobs:
        return {"rfilename": path}
    size = len(file.data)
    shown: dict[str, Any] = {"rfilename": path, "size": size, "blobId": file.blob}
    if file.lfs:
        shown["lfs"] = {"size": size, "sha256": file.sha256, "pointerSize": len(file.pointer)}
    return shown


def _info(repo: Repo, commit: Commit, *, blobs: bool = False) -> dict[str, Any]:
    card = cards.card_of(commit.files)
    *_, first = repo.history(commit)
    return {
        "_id": first.oid[:24],
        "id": repo.id,
        "modelId": repo.id,
        "author": repo.owner,
        "sha": commit.oid,
        "private": repo.private,
        "gated": repo.gated,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "createdAt": first.date,
        "lastModified": commit.date,
        "tags": cards.tags_of(card),
        "cardData": card or None,
        "siblings": [_sibling(path, commit.files[path], blobs) for path in sorted(commit.files)],
        **{key: card[key] for key in ("library_name", "pipeline_tag") if key in card},
    }


def _model(store: Store, call: Call, repo_id: str, revision: str = "main") -> Answer:
    repo = readable(store, call, repo_id)
    return reply(_info(repo, revision_of(repo, revision), blobs=call.flag("blobs")))


def _models(store: Store, call: Call) -> Answer:
    author, search, wanted = call.first("author"), call.first("search"), call.query.get("filter")
    shown = []
    for repo in store.repos.values():
        hidden = repo.private and not store.owns(call.user, repo.owner)
        if hidden or (author and repo.owner != author) or search.lower() not in repo.id.lower():
            continue
        info = _info(repo, revision_of(repo, "main"))
        if set(wanted or ()) <= set(info["tags"]):
            shown.append(info)
    return reply(shown[: int(call.first("limit") or len(shown))])


def _check_access(store: Store, call: Call, repo_id: str) -> Answer:
    open_to(store, call, readable(store, call, repo_id))
    return reply({})


def _check_write(store: Store, call: Call, repo_id: str) -> Answer:
    pushable(store, call, repo_id)
    writable(store, call, repo_id)
    return reply({})


def _validate_card(store: Store, call: Call) -> Answer:
    wrong, odd = cards.problems(str(call.json().get("content", "")))
    said = {
        "errors": [{"message": text} for text in wrong],
        "warnings": [{"message": text} for text in odd],
    }
    return reply(said, 400 if wrong else 200)


ROUTES = (
    ("GET", "/api/whoami-v2", _whoami),
    ("POST", "/api/repos/create", _create),
    ("DELETE", "/api/repos/delete", _delete),
    ("POST", "/api/validate-yaml", _validate_card),
    ("GET", "/api/models", _models),
    ("PUT", "/api/models/{repo}/settings", _settings),
    ("GET", "/api/models/{repo}/auth-check", _check_access),
    ("GET", "/api/models/{repo}/auth-check/write", _check_write),
    ("GET", "/api/models/{repo}/revision/{revision}", _model),
    ("GET", "/api/models/{repo}", _model),
)
