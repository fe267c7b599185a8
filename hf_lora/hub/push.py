"""An adapter -> one commit on the Hub, on top of a revision that was looked at, once and no more.

What a push sends is compared with what the repository has, so that an unchanged adapter makes no
commit and a push that broke sends only what is missing. A commit that got no answer is looked for
before it is tried again.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, hf_hub_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import ModelInfo

from hf_lora.adapter import Adapter
from hf_lora.client import is_last, is_passing, patiently, pause, reason, status_of
from hf_lora.errors import HubError, InvalidOption, LoraError, PushConflict
from hf_lora.formats import SUFFIX
from hf_lora.hub.about import check_repo_id
from hf_lora.hub.card import CardExtras, card_of
from hf_lora.hub.edits import updated
from hf_lora.hub.package import CARD, package, pictures

log = logging.getLogger(__name__)

MAIN = "main"
_LAST = 10  # pull requests that are looked at for one that got no answer
_MARK = "hf_lora-push"  # in the description of a commit: which push made it


@dataclass(frozen=True)
class _Push:
    """Where a push goes.

    Attributes:
        api: The client.
        repo_id: The repository.
        branch: Its branch.
        create_pr: Whether to open a pull request instead of moving the branch.
        message: First line of the commit.
    """

    api: HfApi
    repo_id: str
    branch: str
    create_pr: bool
    message: str

    def info(self, revision: str | None = None) -> ModelInfo:
        """Returns commit and files of the branch, or of another revision."""
        at = revision or self.branch
        return patiently(
            lambda: self.api.model_info(self.repo_id, revision=at, files_metadata=True)
        )


def push_lora(
    host: object,
    repo_id: str,
    *,
    name: str = "default",
    revision: str | None = None,
    private: bool | None = None,
    create_pr: bool = False,
    tag: str | None = None,
    message: str | None = None,
    token: str | bool | None = None,
    base_model: str = "",
    card: CardExtras | None = None,
    images: Mapping[str | os.PathLike[str], str] | None = None,
) -> CommitInfo:
    """Publishes an adapter with its model card as one commit.

    The repository is made when it is missing. It is at the old or at the whole new revision at any
    time; when it already holds just this adapter and card, no commit is made. What its owner has
    written into the card stays. Config and card name the base by its Hub id, never by a local path.

    Args:
        host: A model or pipeline with the adapter, or an `Adapter`.
        repo_id: The repository, "user/name".
        name: Which adapter of the host.
        revision: The branch; made from `main` when it is missing.
        private: Whether a repository that is made here is private. One that exists stays as it is,
            and one that is public then is an error.
        create_pr: Open a pull request instead of moving the branch.
        tag: A tag to put on the commit.
        message: First line of the commit.
        token: Access token; the logged-in one when left out.
        base_model: Hub id of the base, where it was loaded from a local folder.
        card: What the card shall say besides: licence, metrics, answers.
        images: File -> prompt of pictures that the adapter made, for the card.

    Returns:
        The commit; that of the branch where nothing had changed.

    Raises:
        AdapterNotFound: The host has no adapter of that name.
        BadAdapterFile: The adapter holds NaN or infinite values, or a kind that files cannot carry.
        InvalidOption: An argument cannot work; the tag is on another commit; the card that is there
            cannot be read. Of these only the tag is looked at after the commit.
        PushConflict: Somebody else has moved the branch meanwhile. Nothing was changed.
        HubError: The Hub refuses, or cannot be reached. Nothing was changed, or all of it.
    """
    _check_arguments(repo_id, revision, create_pr, tag)
    push = _Push(
        api=HfApi(token=token),
        repo_id=repo_id,
        branch=revision or MAIN,
        create_pr=create_pr,
        message=message or ("Add the adapter" if isinstance(host, Adapter) else f"Add {name}"),
    )
    with tempfile.TemporaryDirectory(prefix="hf_lora-push-") as folder:
        shown = pictures(images or {})
        adapter, written = package(host, Path(folder), name, base_model)
        files = {file.name: file for file in written} | {at: f for at, (f, _) in shown.items()}
        extras = replace(
            card or CardExtras(),
            repo_id=repo_id,
            weights=next(f.name for f in written if f.suffix == SUFFIX),
            images={at: prompt for at, (_, prompt) in shown.items()},
        )
        try:
            head = _head(push, private)
            if private and not head.private:
                raise InvalidOption(
                    f"private=True, and {repo_id!r} exists and is public",
                    fix="Make it private on the Hub, choose another, or leave private out.",
                    field="private",
                )
            if not (extras.license or extras.base_license):
                extras = replace(extras, base_license=_license_of(push.api, adapter))
            files[CARD] = Path(folder) / CARD
            page = updated(_old_card(push, head), card_of(adapter, extras))
            for note in page.notes:
                log.info("the card of %s: %s", repo_id, note)
            files[CARD].write_bytes(page.text.encode())
            commit = _commit(push, head, files)
            if tag is not None and not create_pr:
                _tag(push, tag, commit.oid)
        except LoraError:
            raise
        except Exception as error:  # the client passes on what its transport raises
            fact, fix = reason(repo_id, revision, error, "written")
            raise HubError(fact, fix=fix) from None
    return commit


def _check_arguments(repo_id: object, revision: object, create_pr: bool, tag: object) -> None:
    """Checks what the client would refuse late or take for something else."""
    check_repo_id(repo_id, "repo_id")
    for field, value in (("revision", revision), ("tag", tag)):
        if value is not None and (not isinstance(value, str) or not value.strip()):
            raise InvalidOption(f"{field}={value!r} is no name", field=field)
    if create_pr and revision not in (None, MAIN):
        raise InvalidOption(
            f"a pull request is made against main, not against {revision!r}",
            fix="Leave out revision or create_pr.",
            field="revision",
        )
    if create_pr and tag is not None:
        raise InvalidOption(
            "a pull request cannot be tagged before it is merged",
            fix="Leave out tag or create_pr.",
            field="tag",
        )


def _head(push: _Push, private: bool | None) -> ModelInfo:
    """Returns the state of the branch; makes repository and branch where they are missing."""
    api, repo_id = push.api, push.repo_id
    try:
        return push.info()
    except RepositoryNotFoundError as error:
        if status_of(error) == 403:  # gated, for one
            raise
        patiently(lambda: api.create_repo(repo_id, private=private, exist_ok=True))
    except RevisionNotFoundError:
        pass
    if push.branch != MAIN:
        patiently(lambda: api.create_branch(repo_id, branch=push.branch, exist_ok=True))
    return push.info()


def _license_of(api: HfApi, adapter: Adapter) -> str:
    """Returns the licence that the card of the base names; empty when that is not to be had."""
    base = adapter.manifest.base.id
    try:
        card = patiently(lambda: api.model_info(base)).card_data if base else None
    except (RepositoryNotFoundError, HFValidationError):
        return ""  # without an answer there is no push: the card would lose what it says
    found = card.get("license") if card is not None else None
    return found if isinstance(found, str) else ""


def _old_card(push: _Push, head: ModelInfo) -> bytes | None:
    """Returns the card that is there, as of the commit that the push goes on top of."""
    if all(f.rfilename != CARD for f in head.siblings or ()):
        return None
    token, sha = push.api.token, head.sha
    path = patiently(lambda: hf_hub_download(push.repo_id, CARD, revision=sha, token=token))
    return Path(path).read_bytes()


def _commit(push: _Push, head: ModelInfo, files: Mapping[str, Path]) -> CommitInfo:
    """Sends what differs from the head as one commit on top of it."""
    changed = _changed(head, files)
    if not changed:
        log.info("%s holds this adapter already, at %s", push.repo_id, head.sha)
        return _commit_info(push, str(head.sha))
    size = sum(file.stat().st_size for file in changed.values())
    log.info("pushing %d files, %s bytes, to %s", len(changed), f"{size:,}", push.repo_id)
    mark = _mark_of(str(head.sha), changed)
    again = 0
    while True:
        try:
            return push.api.create_commit(
                push.repo_id,
                [CommitOperationAdd(name, str(file)) for name, file in changed.items()],
                commit_message=push.message,
                commit_description=mark,
                revision=push.branch,
                create_pr=push.create_pr,
                parent_commit=head.sha,
            )
        except Exception as error:
            landed = _landed(push, head, mark)
            if landed is not None:
                return landed
            if is_last(again) or not is_passing(error):
                raise
        pause(again)
        again += 1


def _landed(push: _Push, head: ModelInfo, mark: str) -> CommitInfo | None:
    """Returns the commit of this push where one is there though no answer came.

    Raises:
        PushConflict: The branch has moved, and not by this push.
    """
    api, repo_id = push.api, push.repo_id
    branches = [push.branch]
    if push.create_pr:
        refs = patiently(lambda: api.list_repo_refs(repo_id, include_pull_requests=True))
        numbers = [int(r.ref.removeprefix("refs/pr/")) for r in refs.pull_requests or ()]
        branches = [f"refs/pr/{number}" for number in sorted(numbers)[-_LAST:]]
    for branch in branches:
        commits = patiently(partial(api.list_repo_commits, repo_id, revision=branch))
        for commit in commits:
            if commit.commit_id == head.sha:
                break
            if mark in f"{commit.title}\n{commit.message}":
                return _commit_info(push, commit.commit_id, branch)
        if not push.create_pr and commits and commits[0].commit_id != head.sha:
            raise PushConflict(
                f"somebody else has pushed to {push.branch!r} of {repo_id!r} meanwhile "
                f"({commits[0].title!r})",
                fix="Look at it, then push again.",
            )
    return None


def _mark_of(parent: str, files: Mapping[str, Path]) -> str:
    """Returns what tells the commit of these files on this parent from all others."""
    found = hashlib.sha256(parent.encode())
    for name, file in sorted(files.items()):
        found.update(f"\n{name} {hashlib.sha256(file.read_bytes()).hexdigest()}".encode())
    return f"{_MARK}: {found.hexdigest()[:32]}"


def _changed(head: ModelInfo, files: Mapping[str, Path]) -> dict[str, Path]:
    """Returns the files that the head lacks, or has with another content."""
    there = {f.rfilename: f for f in head.siblings or ()}
    changed = {}
    for name, file in files.items():
        found, content = there.get(name), file.read_bytes()
        if found is None or not _is_content(found, content):
            changed[name] = file
    return changed


def _is_content(found: object, content: bytes) -> bool:
    """Tells whether a file of a repository has this content, by the hash that the Hub keeps."""
    lfs = getattr(found, "lfs", None)
    if lfs is not None:
        return bool(lfs.sha256 == hashlib.sha256(content).hexdigest())
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False)
    return bool(getattr(found, "blob_id", None) == blob.hexdigest())


def _commit_info(push: _Push, oid: str, branch: str = "") -> CommitInfo:
    url = f"{push.api.endpoint}/{push.repo_id}"
    number = branch.removeprefix("refs/pr/") if push.create_pr else ""
    return CommitInfo(
        commit_url=f"{url}/commit/{oid}",
        commit_message=push.message,
        commit_description="",
        oid=oid,
        pr_url=f"{url}/discussions/{number}" if number else None,
    )


def _tag(push: _Push, tag: str, oid: str) -> None:
    """Puts a tag on the commit.

    Raises:
        InvalidOption: It is on another one.
    """
    api, repo_id = push.api, push.repo_id

    def put() -> None:
        try:
            api.create_tag(repo_id, tag=tag, revision=oid)
        except HfHubHTTPError as error:
            if status_of(error) != 409:
                raise

    patiently(put)
    refs = patiently(lambda: api.list_repo_refs(repo_id))
    at = next((ref.target_commit for ref in refs.tags if ref.name == tag), None)
    if at != oid:
        raise InvalidOption(
            f"the tag {tag!r} of {repo_id!r} is on commit {at}; the adapter was pushed as {oid} "
            "and has no tag",
            fix="Choose another tag, or delete that one.",
            field="tag",
        )
