"""Repositories: pinned to one commit, two files only, and a cause for every failure.

A loopback server plays the Hub's part; the real huggingface_hub client talks to it.
"""

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import constants

from hf_lora import attach_lora, load_lora, save_lora
from hf_lora.errors import AdapterNotFound
from hf_lora.fetch import local_files
from hf_lora.testing import tiny
from tests.support import as_foreign

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


# part of the path -> status and the Hub's error code
REFUSALS = {
    "/gated": (403, "GatedRepo"),
    "/missing": (404, "RepoNotFound"),
    "/revision/nope": (404, "RevisionNotFound"),
}


# part of the path -> files under names of their own
OWN_NAMES = {
    "/one": ["README.md", "inner/other.safetensors", "my_style.safetensors"],
    "/two": ["first.safetensors", "second.safetensors"],
    "/whole": ["config.json", "model.safetensors"],
    "/shards": ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
    "/both": ["config.json", "model.safetensors", "style.safetensors"],
}


def _names(path, folder):
    """The files of a repository: none, below a folder, or at the root, by its name."""
    own = next((names for part, names in OWN_NAMES.items() if part in path), None)
    if own is not None:
        return own
    names = [] if "/empty" in path else sorted(p.name for p in folder.iterdir())
    return [f"inner/{name}" for name in names] if "/nested" in path else names


class Hub:
    """The loopback Hub, as the client of this process sees it.

    The client reads its endpoint and cache at import; here its constants are changed instead.

    Attributes:
        requests: What was asked for, as "METHOD path".
    """

    def __init__(self, monkeypatch, port, home, requests):
        self._monkeypatch, self.requests = monkeypatch, requests
        self.environment = {
            **os.environ,
            "HF_ENDPOINT": f"http://127.0.0.1:{port}",
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
        }
        self._set(HF_HUB_DISABLE_XET=True)
        self.cache_in(home)
        self.answer(f"http://127.0.0.1:{port}")

    def _set(self, **values):
        for name, value in values.items():
            self._monkeypatch.setattr(constants, name, value)

    def answer(self, endpoint, *, offline=False):
        template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        self._set(ENDPOINT=endpoint, HUGGINGFACE_CO_URL_TEMPLATE=template, HF_HUB_OFFLINE=offline)

    def fall_silent(self):
        """From now on nobody listens where the client asks; it tries again without waiting."""
        self._monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
        self.answer("http://127.0.0.1:9")

    def go_offline(self):
        """From now on the client does not ask."""
        self.answer("http://127.0.0.1:9", offline=True)

    def cache_in(self, home):
        self._set(HF_HUB_CACHE=str(home / "hub"))

    def downloads(self):
        return {r.partition(f"/resolve/{COMMIT}/")[2] for r in self.requests if "/resolve/" in r}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub with one adapter, one gated, one empty repository."""
    folder = save_lora(attach_lora(tiny("llama")), tmp_path / "repo")
    requests = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def _answer(self, code, body=b"", **headers):
            self.send_response(code)
            for key, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(key.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def do_GET(self):
            requests.append(f"{self.command} {self.path}")
            refusal = next((r for part, r in REFUSALS.items() if part in self.path), None)
            if refusal:
                self._answer(refusal[0], b"{}", X_Error_Code=refusal[1], X_Error_Message="no")
            elif self.path.startswith("/api/models/"):
                files = [{"rfilename": name} for name in _names(self.path, folder)]
                info = json.dumps({"id": "u/r", "sha": COMMIT, "siblings": files})
                self._answer(200, info.encode(), Content_Type="application/json")
            else:
                file = folder / self.path.rsplit("/", 1)[1]
                data = (file if file.exists() else folder / WEIGHTS).read_bytes()
                self._answer(200, data, X_Repo_Commit=COMMIT, ETag=f'"{len(data):040x}"')

        do_HEAD = do_GET

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield Hub(monkeypatch, server.server_port, tmp_path / "home", requests)
    server.shutdown()
    server.server_close()


def test_a_repository_is_pinned_to_one_commit_and_read_again_offline(hub):
    """In a new process, whose client is set up as a user's is."""
    load = "from hf_lora import load_lora; from hf_lora.testing import tiny; "
    load += "print(load_lora(tiny('llama'), 'u/style').targets)"
    done = subprocess.run(
        [sys.executable, "-c", load],
        env=hub.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "14"
    files = [r for r in hub.requests if "/resolve/" in r]
    assert files
    assert all(f"/resolve/{COMMIT}/adapter_" in r for r in files)
    assert sum(r.startswith("GET /api/models/") for r in hub.requests) == 1
    del hub.requests[:]
    hub.go_offline()
    assert local_files("u/style", revision=COMMIT).name == COMMIT
    assert not hub.requests


def test_a_hub_that_does_not_answer_leaves_the_cache(hub):
    local_files("u/style")
    hub.fall_silent()
    assert local_files("u/style", revision=COMMIT).name == COMMIT
    with pytest.raises(AdapterNotFound, match="cannot be reached and is not in the cache"):
        local_files("u/x")


def test_a_folder_of_a_repository_is_named_by_file(hub):
    assert local_files("u/nested", file="inner").name == "inner"
    assert all("/inner/adapter_" in r for r in hub.requests if "/resolve/" in r)
    with pytest.raises(AdapterNotFound, match="It has adapters in inner"):
        local_files("u/nested")


def _path_and_targets(source, **where):
    targets = load_lora(tiny("llama"), source, **where).targets
    return local_files(source, **where), targets


@pytest.mark.parametrize("inner", ["", "inner/"])
def test_a_weights_file_that_is_named_brings_its_config(hub, tmp_path, inner):
    as_foreign(tmp_path / "repo")  # the config is in its file alone
    source, file = "u/nested" if inner else "u/style", f"{inner}{WEIGHTS}"
    path, targets = _path_and_targets(source, file=file)
    assert path.as_posix().endswith(f"{COMMIT}/{file}")
    assert targets == 14  # 7 linears in each of 2 layers
    assert hub.downloads() == {f"{inner}{CONFIG}", file}
    hub.fall_silent()
    assert _path_and_targets(source, file=file, revision=COMMIT) == (path, targets)


def test_a_named_file_without_a_config_is_taken_alone(hub):
    path, targets = _path_and_targets("u/two", file="second.safetensors")
    assert path.as_posix().endswith(f"{COMMIT}/second.safetensors")
    assert targets == 14
    assert hub.downloads() == {"second.safetensors"}


@pytest.mark.parametrize(("source", "name"), [("u/one", "my_style"), ("u/both", "style")])
def test_the_only_weights_of_a_repository_need_no_known_name(hub, source, name):
    path, targets = _path_and_targets(source)
    assert path.as_posix().endswith(f"{COMMIT}/{name}.safetensors")
    assert targets == 14
    assert hub.downloads() == {f"{name}.safetensors"}


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (
            "u/two",
            "It has first.safetensors, second.safetensors. Name one: file='first.safetensors'.",
        ),
        (
            "u/whole",
            "It has model.safetensors, a name of whole models. "
            "If that is an adapter, name it: file='model.safetensors'.",
        ),
        ("u/shards", "file='model-00001-of-00002.safetensors'"),
    ],
)
def test_weights_that_are_not_taken_are_named(hub, source, said):
    with pytest.raises(AdapterNotFound) as error:
        local_files(source)
    assert said in str(error.value)
    assert not hub.downloads()


@pytest.mark.parametrize(
    ("source", "file", "said"),
    [
        (
            "u/two",
            "third.safetensors",
            "holds no third.safetensors. It has first.safetensors, second.safetensors.",
        ),
        ("u/nested", WEIGHTS, f"holds no {WEIGHTS}. It has adapters in inner."),
    ],
)
def test_a_file_that_is_not_there_is_refused_with_those_that_are(hub, source, file, said):
    with pytest.raises(AdapterNotFound) as error:
        local_files(source, file=file)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("source", "revision", "said"),
    [
        ("u/gated", None, "is gated"),
        ("u/missing", None, "does not exist or is private"),
        ("u/style", "nope", "has no revision 'nope'"),
        ("u/empty", None, "holds no adapt"),
    ],
)
def test_every_way_to_find_no_adapter_is_told_apart(hub, source, revision, said):
    with pytest.raises(AdapterNotFound, match=said):
        local_files(source, revision=revision)


def test_offline_without_a_cache_says_so(hub, tmp_path):
    hub.cache_in(tmp_path / "empty")
    hub.go_offline()
    with pytest.raises(AdapterNotFound, match="cannot be reached and is not in the cache"):
        local_files("u/style")


@pytest.mark.parametrize("source", ["nowhere", "a/b/c", "../up", "user/with space", ""])
def test_what_is_neither_path_nor_repository(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "inner").mkdir()
    monkeypatch.chdir(tmp_path / "inner")
    if source in ("", "../up"):
        source = source or "no such"
    with pytest.raises(AdapterNotFound, match="no file or folder"):
        local_files(source)


def test_a_path_that_exists_is_taken_as_it_is(tmp_path):
    assert local_files(tmp_path) == tmp_path
