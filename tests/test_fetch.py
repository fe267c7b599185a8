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

from hf_lora import attach_lora, save_lora
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


@pytest.fixture
def hub(tmp_path):
    """A Hub with one adapter, one gated, one empty repository; yields (environment, log)."""
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
    environment = {
        **os.environ,
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
    }
    yield environment, requests
    server.shutdown()
    server.server_close()


def _python(code, environment):
    """Runs code in a new process, as the client reads its endpoint at import."""
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


LOAD = """
from hf_lora.fetch import local_files
from hf_lora.errors import LoraError
for source, revision in {calls}:
    try:
        print(local_files(source, revision=revision))
    except LoraError as error:
        print(type(error).__name__, error)
"""


def test_a_repository_is_pinned_to_one_commit_and_read_again_offline(hub, tmp_path):
    environment, requests = hub
    load = "from hf_lora import load_lora; from hf_lora.testing import tiny; "
    load += "print(load_lora(tiny('llama'), 'u/style').targets)"
    assert _python(load, environment) == "14"
    files = [r for r in requests if "/resolve/" in r]
    assert files
    assert all(f"/resolve/{COMMIT}/adapter_" in r for r in files)
    assert sum(r.startswith("GET /api/models/") for r in requests) == 1
    offline = environment | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "1"}
    del requests[:]
    folder = _python(LOAD.format(calls=[("u/style", COMMIT)]), offline)
    assert folder.endswith(COMMIT)
    assert not requests


def test_a_hub_that_does_not_answer_leaves_the_cache(hub):
    environment, _ = hub
    _python(LOAD.format(calls=[("u/style", None)]), environment)
    silent = environment | {"HF_ENDPOINT": "http://127.0.0.1:9"}  # nobody listens there
    found, missed = _python(
        LOAD.format(calls=[("u/style", COMMIT), ("u/x", None)]), silent
    ).splitlines()
    assert found.endswith(COMMIT)
    assert "cannot be reached and is not in the cache" in missed


def test_a_folder_of_a_repository_is_named_by_file(hub):
    environment, requests = hub
    code = "from hf_lora.fetch import local_files as f; print(f('u/nested', file='inner').name)"
    assert _python(code, environment) == "inner"
    assert all("/inner/adapter_" in r for r in requests if "/resolve/" in r)
    line = _python(LOAD.format(calls=[("u/nested", None)]), environment)
    assert "It has adapters in inner" in line


def _downloads(requests):
    return {r.partition(f"/resolve/{COMMIT}/")[2] for r in requests if "/resolve/" in r}


FILE = """
from hf_lora import load_lora
from hf_lora.fetch import local_files
from hf_lora.testing import tiny
print(local_files({source!r}, file={file!r}, revision={revision!r}))
print(load_lora(tiny("llama"), {source!r}, file={file!r}, revision={revision!r}).targets)
"""


@pytest.mark.parametrize("inner", ["", "inner/"])
def test_a_weights_file_that_is_named_brings_its_config(hub, tmp_path, inner):
    environment, requests = hub
    as_foreign(tmp_path / "repo")  # the config is in its file alone
    source = "u/nested" if inner else "u/style"
    code = FILE.format(source=source, file=f"{inner}{WEIGHTS}", revision=None)
    path, targets = _python(code, environment).splitlines()
    assert path.endswith(f"{COMMIT}/{inner}{WEIGHTS}")
    assert targets == "14"  # 7 linears in each of 2 layers
    assert _downloads(requests) == {f"{inner}{CONFIG}", f"{inner}{WEIGHTS}"}
    offline = environment | {"HF_ENDPOINT": "http://127.0.0.1:9"}
    code = FILE.format(source=source, file=f"{inner}{WEIGHTS}", revision=COMMIT)
    assert _python(code, offline).splitlines() == [path, targets]


def test_a_named_file_without_a_config_is_taken_alone(hub):
    environment, requests = hub
    code = FILE.format(source="u/two", file="second.safetensors", revision=None)
    path, targets = _python(code, environment).splitlines()
    assert path.endswith(f"{COMMIT}/second.safetensors")
    assert targets == "14"
    assert _downloads(requests) == {"second.safetensors"}


@pytest.mark.parametrize(("source", "name"), [("u/one", "my_style"), ("u/both", "style")])
def test_the_only_weights_of_a_repository_need_no_known_name(hub, source, name):
    environment, requests = hub
    code = FILE.format(source=source, file=None, revision=None)
    path, targets = _python(code, environment).splitlines()
    assert path.endswith(f"{COMMIT}/{name}.safetensors")
    assert targets == "14"
    assert _downloads(requests) == {f"{name}.safetensors"}


def test_weights_that_are_not_taken_are_named(hub):
    environment, requests = hub
    calls = [("u/two", None), ("u/whole", None), ("u/shards", None)]
    two, whole, shards = _python(LOAD.format(calls=calls), environment).splitlines()
    assert two.endswith(
        "It has first.safetensors, second.safetensors. Name one: file='first.safetensors'."
    )
    assert whole.endswith(
        "It has model.safetensors, a name of whole models. "
        "If that is an adapter, name it: file='model.safetensors'."
    )
    assert "file='model-00001-of-00002.safetensors'" in shards
    assert not _downloads(requests)


def test_a_file_that_is_not_there_is_refused_with_those_that_are(hub):
    environment, _ = hub
    code = LOAD.replace("revision=revision", "file=revision").format(
        calls=[("u/two", "third.safetensors"), ("u/nested", WEIGHTS)]
    )
    two, nested = _python(code, environment).splitlines()
    assert "holds no third.safetensors. It has first.safetensors, second.safetensors." in two
    assert f"holds no {WEIGHTS}. It has adapters in inner." in nested


def test_every_way_to_find_no_adapter_is_told_apart(hub):
    environment, _ = hub
    calls = [("u/gated", None), ("u/missing", None), ("u/style", "nope"), ("u/empty", None)]
    lines = _python(LOAD.format(calls=calls), environment).splitlines()
    words = ["is gated", "does not exist or is private", "has no revision 'nope'", "holds no adapt"]
    assert len(lines) == 4
    for line, said in zip(lines, words, strict=True):
        assert line.startswith("AdapterNotFound")
        assert said in line


def test_offline_without_a_cache_says_so(hub, tmp_path):
    environment, _ = hub
    offline = environment | {"HF_HOME": str(tmp_path / "empty"), "HF_HUB_OFFLINE": "1"}
    line = _python(LOAD.format(calls=[("u/style", None)]), offline)
    assert "cannot be reached and is not in the cache" in line


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
