"""`LocalHub`: the server, the client of this process, and what a test asks of both."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from hf_lora.errors import InvalidOption, LoraError
from hf_lora.testing.local_hub import client
from hf_lora.testing.local_hub.answers import Refused
from hf_lora.testing.local_hub.faults import Fault, Faults, Plan
from hf_lora.testing.local_hub.routes import answer
from hf_lora.testing.local_hub.server import Request, Server
from hf_lora.testing.local_hub.store import ATTRIBUTES, Commit, File, Repo, Store, is_lfs
from hf_lora.testing.local_hub.writing import checked_tree

__all__ = ["LocalHub"]

_OPEN = threading.Lock()  # a process has one client, so one Hub that it can be pointed at
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class LocalHub:
    """A Hub of models on this machine, for tests without a network.

    While it is open, the `huggingface_hub` client of this process, and with it transformers, peft
    and diffusers, push to it and pull from it, with an empty cache of their own. When it closes,
    all of that is as it was. What was pushed stays readable through this object.

    Args:
        user: Name of the user who is signed in.
        orgs: Names of organisations that the user may write to.

    Attributes:
        endpoint: Address of the Hub, empty before it opens.
        token: Token of the user.
        environment: All variables of a new process that is to use the Hub.
        home: `HF_HOME` while the Hub is open; a temporary folder.
        requests: A `Request` for everything that was asked, in the order of the answers.
        unknown: `METHOD path` of requests that the Hub has no route for.

    Raises:
        InvalidOption: A name is none that the Hub takes.
    """

    def __init__(self, user: str = "user", orgs: tuple[str, ...] = ()) -> None:
        for name in (user, *orgs):
            _check_name(name, name)
        self.token = f"hf_{secrets.token_hex(17)}"
        self.endpoint = ""
        self.environment: dict[str, str] = {}
        self.home = Path()
        self.requests: list[Request] = []
        self.unknown: list[str] = []
        self._store = Store(user, tuple(orgs), self.token)
        self._faults = Faults()
        self._exit = ExitStack()

    def __enter__(self) -> Self:
        """Opens the Hub and points this process at it.

        Raises:
            LoraError: Another one is open in this process.
        """
        if not _OPEN.acquire(blocking=False):
            raise LoraError(
                "a LocalHub is open in this process already",
                fix="Close it first: a process has one client, which can use one Hub at a time.",
            )
        with ExitStack() as stack:
            stack.callback(_OPEN.release)
            temporary = tempfile.TemporaryDirectory(prefix="hub-", ignore_cleanup_errors=True)
            self.home = Path(stack.enter_context(temporary))
            self._server = Server(lambda call: answer(self._store, call), self._faults)
            stack.callback(self._server.close)
            self._server.requests, self._server.unknown = self.requests, self.unknown
            self.endpoint = self._store.endpoint = self._server.endpoint
            wanted = client.environment(self.endpoint, self.token, self.home)
            self.environment = {
                name: value for name, value in {**os.environ, **wanted}.items() if value is not None
            }
            stack.enter_context(client.pointed_at(self.endpoint, self.token, self.home))
            self._exit = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Closes the Hub and puts this process back.

        Raises:
            Exception: What a callback of `before` raised, unless the block itself failed.
        """
        self._exit.close()
        if error is None and self._server.errors:
            raise self._server.errors[0]

    def files(self, repo_id: str, *, revision: str = "main") -> dict[str, bytes]:
        """Returns the content of every file of a revision, by its path.

        Args:
            repo_id: `owner/name`.
            revision: A branch, a tag, `refs/pr/N` or a commit id.

        Raises:
            InvalidOption: There is no such repository or revision.
        """
        with self._store.lock:
            _, commit = self._found(repo_id, revision)
            return {path: file.data for path, file in sorted(commit.files.items())}

    def commits(self, repo_id: str, *, revision: str = "main") -> list[Commit]:
        """Returns the commits of a revision, the newest first.

        The last is the Hub's own, which every repository begins with.

        Args:
            repo_id: `owner/name`.
            revision: A branch, a tag, `refs/pr/N` or a commit id.

        Raises:
            InvalidOption: There is no such repository or revision.
        """
        with self._store.lock:
            repo, commit = self._found(repo_id, revision)
            return list(repo.history(commit))

    def add_repo(
        self,
        repo_id: str,
        files: Mapping[str, bytes] | None = None,
        *,
        private: bool = False,
        gated: bool = False,
    ) -> str:
        """Makes a repository, of any owner, and returns the id of its newest commit.

        Args:
            repo_id: `owner/name`.
            files: Path to content.
            private: Whether only the owner may see it.
            gated: Whether only the owner may read its files.

        Raises:
            InvalidOption: The id is none or is taken, or a path cannot be.
        """
        owner, _, name = repo_id.partition("/")
        _check_name(owner, repo_id)
        _check_name(name, repo_id)
        with self._store.lock:
            if repo_id in self._store.repos:
                raise InvalidOption(f"{repo_id} exists", fix="Give another id, or commit to it.")
            repo = self._store.add(repo_id, private=private, gated="auto" if gated else False)
            if not files:
                return repo.refs["refs/heads/main"]
            try:
                return self.commit(repo_id, files)
            except InvalidOption:
                del self._store.repos[repo_id]
                raise

    def commit(
        self,
        repo_id: str,
        files: Mapping[str, bytes | None],
        *,
        message: str = "A commit",
        revision: str = "main",
    ) -> str:
        """Makes a commit as its owner, as if by another machine, and returns its id.

        Args:
            repo_id: `owner/name`.
            files: Path to content; None deletes the file.
            message: The commit's message.
            revision: A branch or `refs/pr/N`.

        Raises:
            InvalidOption: There is no such repository or branch, or a path cannot be.
        """
        with self._store.lock:
            repo, parent = self._found(repo_id, revision)
            ref = repo.find_ref(revision)
            if ref is None or ref.startswith("refs/tags/"):
                raise InvalidOption(f"{revision!r} is no branch", fix=f"Refs: {[*repo.refs]}.")
            held = dict(parent.files)
            for path, data in files.items():
                held.pop(path, None)
                if data is not None:
                    lfs = is_lfs(parent.files.get(ATTRIBUTES), path, data[:512], len(data))
                    held[path] = File(data, lfs)
            try:
                checked_tree(held)
            except Refused as refused:
                raise InvalidOption(refused.message, fix="Name files below the root.") from None
            return repo.advance(ref, parent.oid, held, message, repo.owner).oid

    def fail(
        self,
        fault: Fault,
        *,
        at: int = 0,
        matching: str | re.Pattern[str] | None = None,
        times: int = 1,
        seconds: float | None = None,
    ) -> None:
        """Makes requests from now on go wrong.

        Args:
            fault: What happens to them:
                `"drop"`: the connection is closed, and nothing is done.
                `"drop-answer"`: the request is carried out, then the connection is closed.
                `"cut"`: half of the answer's body is sent, then the connection is closed; an answer
                without a body is dropped.
                `"delay"`: the request waits.
                429, 500, 503: that is answered, and nothing is done.
            at: Matching requests that pass before the first that is hit.
            matching: Text or compiled pattern to be found in `METHOD path`, the path with its query
                as it was sent; None hits any request.
            times: How many are hit.
            seconds: How long a delay is; or how long 429 and 503 tell the client to wait. Without
                it they tell nothing.

        Raises:
            InvalidOption: The fault is unknown or a number cannot work.
        """
        self._faults.add(Plan(fault, matching, at, times, seconds))

    def before(
        self,
        matching: str | re.Pattern[str] | None,
        callback: Callable[[], object],
        *,
        at: int = 0,
        times: int = 1,
    ) -> None:
        """Calls something before a request is carried out, such as another push.

        It is called in a thread of the server. What it raises makes the request fail with 500, and
        is raised again when the Hub closes.

        Args:
            matching: Text or compiled pattern to be found in `METHOD path`; None: any request.
            callback: What to call.
            at: Matching requests that pass before the first.
            times: How often to call it.

        Raises:
            InvalidOption: A number cannot work.
        """
        self._faults.add(Plan(callback, matching, at, times))

    @property
    def faults_hit(self) -> int:
        """How many requests went wrong on purpose."""
        return self._faults.hits

    def clear_faults(self) -> None:
        """Forgets what `fail` and `before` asked for, and how many requests it hit."""
        self._faults.clear()

    def clear_cache(self) -> None:
        """Empties the cache of this process, so that the next pull downloads again."""
        shutil.rmtree(self.home / "hub", ignore_errors=True)

    @contextmanager
    def offline(self) -> Iterator[None]:
        """Puts the libraries of this process in offline mode until it is left."""
        wanted = {"HF_HUB_OFFLINE": "1"}
        with client.set_values({"HF_HUB_OFFLINE": True}), client.set_environment(wanted):
            yield

    def _found(self, repo_id: str, revision: str) -> tuple[Repo, Commit]:
        repo = self._store.repos.get(repo_id)
        if repo is None:
            raise InvalidOption(f"no repository {repo_id!r}", fix=f"Here: {[*self._store.repos]}.")
        commit = repo.find(revision)
        if commit is None:
            raise InvalidOption(f"{repo_id} has no {revision!r}", fix=f"Refs: {[*repo.refs]}.")
        return repo, commit


def _check_name(name: str, given: str) -> None:
    if not _NAME.fullmatch(name):
        raise InvalidOption(
            f"{given!r} is no name on the Hub", fix="A repository is named 'owner/name'."
        )
