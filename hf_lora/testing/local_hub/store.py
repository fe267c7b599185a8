"""What the Hub holds: repositories of commits, with the ids that git would give them.

Nothing here speaks HTTP. A commit and its tree never change once they are made, and a branch moves
in one assignment: whoever reads sees the old revision or the whole new one.
"""

from __future__ import annotations

import datetime
import fnmatch
import hashlib
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType

__all__ = ["ATTRIBUTES", "Commit", "File", "Repo", "Store", "folder_ids", "git_id"]

ATTRIBUTES = ".gitattributes"  # the file that says which others are kept as LFS objects
LARGE = 10_000_000  # bytes from which any file is an LFS object
_PATTERNS = "bin ckpt gguf gz h5 model msgpack npy npz onnx pickle pkl pt pth safetensors tar zip"
_EPOCH = 1_704_067_200  # seconds; the day of the first commit, 2024-01-01
_BRANCH, _TAG, _PULL = "refs/heads/", "refs/tags/", "refs/pr/"


def git_id(kind: str, data: bytes) -> str:
    """Returns the id that git gives an object, kind `blob`, `tree` or `commit`."""
    head = f"{kind} {len(data)}\0".encode()
    return hashlib.sha1(head + data, usedforsecurity=False).hexdigest()


@dataclass(frozen=True)
class File:
    """One version of a file.

    Attributes:
        data: The content, also of an LFS object.
        lfs: Whether git holds a pointer and LFS the content.
    """

    data: bytes
    lfs: bool

    @cached_property
    def sha256(self) -> str:
        """The id of the content as an LFS object."""
        return hashlib.sha256(self.data).hexdigest()

    @cached_property
    def pointer(self) -> bytes:
        """What git holds in place of an LFS object."""
        version = "version https://git-lfs.github.com/spec/v1"
        return f"{version}\noid sha256:{self.sha256}\nsize {len(self.data)}\n".encode()

    @cached_property
    def blob(self) -> str:
        """The id of what git holds: the pointer of an LFS object, the content of any other."""
        return git_id("blob", self.pointer if self.lfs else self.data)

    @property
    def oid(self) -> str:
        """What the Hub tells a client about the content: sha256 of LFS objects, else the git id."""
        return self.sha256 if self.lfs else self.blob


def folder_ids(files: Mapping[str, File]) -> dict[str, str]:
    """Returns the git id of every folder's tree; the whole tree is the folder ``""``."""
    inside: dict[str, dict[str, str]] = {"": {}}  # folder -> name -> path
    for path in files:
        while path:
            folder, _, name = path.rpartition("/")
            inside.setdefault(folder, {})[name] = path
            path = folder
    ids: dict[str, str] = {}
    for folder in sorted(inside, key=lambda name: (name.count("/"), name != ""), reverse=True):
        entries = []
        for name, path in inside[folder].items():
            is_file = path in files
            line = f"{'100644' if is_file else '40000'} {name}\0".encode()
            line += bytes.fromhex(files[path].blob if is_file else ids[path])
            entries.append((name if is_file else f"{name}/", line))
        ids[folder] = git_id("tree", b"".join(line for _, line in sorted(entries)))
    return ids


@dataclass(frozen=True)
class Commit:
    """One revision of a repository.

    Attributes:
        oid: Its id, 40 hexadecimal digits: what git makes of tree, parent, author, date, message.
        parent: The id of the commit before it, empty for the first.
        title: First line of the message.
        description: The rest of the message.
        author: Who made it.
        number: Which of the repository's commits it is, from 0; its date is that many seconds on.
        files: Path to file.
    """

    oid: str
    parent: str
    title: str
    description: str
    author: str
    number: int
    files: Mapping[str, File] = field(repr=False)

    @property
    def date(self) -> str:
        """When it was made, in ISO 8601."""
        made = datetime.datetime.fromtimestamp(_EPOCH + self.number, datetime.UTC)
        return made.strftime("%Y-%m-%dT%H:%M:%S.000Z")

    @cached_property
    def folders(self) -> Mapping[str, str]:
        """Folder to the id of its tree."""
        return folder_ids(self.files)


def _commit(parent: str, files: Mapping[str, File], message: str, author: str, n: int) -> Commit:
    who = f"{author} <{author}@localhost> {_EPOCH + n} +0000"
    lines = [f"tree {folder_ids(files)['']}", *([f"parent {parent}"] if parent else [])]
    text = "\n".join([*lines, f"author {who}", f"committer {who}", "", message])
    title, _, rest = message.partition("\n")
    oid = git_id("commit", f"{text}\n".encode())
    return Commit(oid, parent, title, rest.strip(), author, n, MappingProxyType(dict(files)))


@dataclass
class Repo:
    """A repository.

    Attributes:
        id: `owner/name`.
        private: Whether only its owner may see it.
        gated: Whether only its owner may read its files: False, `"auto"` or `"manual"`.
        commits: Every commit by its id.
        refs: Full name of a branch, tag or pull request to the id of its commit.
        objects: LFS objects by their sha256, committed or not.
        granted: LFS objects that a client was told to upload.
    """

    id: str
    private: bool = False
    gated: bool | str = False
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    granted: set[str] = field(default_factory=set)

    @property
    def owner(self) -> str:
        """The user or organisation in its id."""
        return self.id.partition("/")[0]

    def find_ref(self, revision: str) -> str | None:
        """Returns the full name of a branch, tag or pull request, or None."""
        names = (revision, _BRANCH + revision, _TAG + revision)
        return next((name for name in names if name in self.refs), None)

    def find(self, revision: str) -> Commit | None:
        """Returns the commit that a branch, tag, pull request or commit id names, or None.

        A commit id may be cut down to 7 digits or more as long as it is the only one.
        """
        ref = self.find_ref(revision)
        if ref is not None:
            return self.commits[self.refs[ref]]
        found = [oid for oid in self.commits if len(revision) >= 7 and oid.startswith(revision)]
        return self.commits[found[0]] if len(found) == 1 else None

    def history(self, commit: Commit) -> Iterator[Commit]:
        """Yields a commit and those before it, the newest first."""
        yield commit
        while commit.parent:
            commit = self.commits[commit.parent]
            yield commit

    def advance(
        self, ref: str, parent: str, files: Mapping[str, File], message: str, author: str
    ) -> Commit:
        """Adds a commit after a parent and points a ref at it, which may be new."""
        made = _commit(parent, files, message, author, len(self.commits))
        self.commits[made.oid] = made
        for file in files.values():
            if file.lfs:
                self.objects[file.sha256] = file.data
        self.refs[ref] = made.oid
        return made

    def next_pull(self) -> int:
        """Returns the number that the next pull request gets."""
        return 1 + sum(name.startswith(_PULL) for name in self.refs)


def is_lfs(attributes: File | None, path: str, sample: bytes, size: int) -> bool:
    """Returns whether a file is kept as an LFS object.

    Args:
        attributes: The `.gitattributes` of the revision.
        path: Path of the file.
        sample: Its first bytes; one that is zero says that it is no text.
        size: Its size in bytes.
    """
    text = attributes.data.decode("utf-8", "replace") if attributes else ""
    lines = [line.split() for line in text.splitlines()]
    patterns = [words[0] for words in lines if "filter=lfs" in words[1:]]
    name = path.rpartition("/")[2]
    matches = any(fnmatch.fnmatch(path if "/" in p else name, p) for p in patterns)
    return size > 0 and (matches or size > LARGE or b"\0" in sample)


class Store:
    """All repositories, and who may do what.

    Args:
        user: The user whose token the Hub knows.
        orgs: Organisations that the user may write to.
        token: The user's token.

    Attributes:
        endpoint: Address of the Hub, for the links in its answers.
        lock: Held while a request is carried out.
        repos: Repository by id.
    """

    def __init__(self, user: str, orgs: tuple[str, ...], token: str) -> None:
        self.user, self.orgs, self.token = user, orgs, token
        self.endpoint = ""
        self.lock = threading.RLock()
        self.repos: dict[str, Repo] = {}

    def owns(self, user: str | None, owner: str) -> bool:
        """Returns whether a user (None: nobody signed in) may write to what an owner has."""
        return user is not None and owner in (self.user, *self.orgs)

    def add(self, repo_id: str, *, private: bool, gated: bool | str = False) -> Repo:
        """Makes a repository with the first commit that the Hub gives it."""
        repo = Repo(repo_id, private, gated)
        rows = [f"*.{end} filter=lfs diff=lfs merge=lfs -text\n" for end in _PATTERNS.split()]
        first = {ATTRIBUTES: File("".join(rows).encode(), lfs=False)}
        repo.advance(f"{_BRANCH}main", "", first, "initial commit", repo.owner)
        self.repos[repo_id] = repo
        return repo
