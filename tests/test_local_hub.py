"""The loopback Hub: the unmodified clients are the judges of what it answers."""

import hashlib
import inspect
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import huggingface_hub
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.loaders import lora_base
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    RepoCard,
    constants,
    create_repo,
    file_exists,
    hf_hub_download,
    metadata_update,
    snapshot_download,
)
from huggingface_hub.errors import (
    BadRequestError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import _http, get_session
from huggingface_hub.utils.sha import git_hash
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM

from hf_lora.errors import InvalidOption, LoraError
from hf_lora.testing import LocalHub, component_output, tiny_pipeline
from tests.local_hub_clients import (
    ADAPTER,
    BASE,
    logits,
    pipeline_with_style,
    push_adapter,
    push_base,
    write_style,
)

# the client itself sends LFS objects so, through http_backoff("PUT", url, data=file)
pytestmark = pytest.mark.filterwarnings(
    "ignore:Use 'content=<...>' to upload raw:DeprecationWarning"
)

httpx = vars(_http).get("httpx2") or vars(_http)["httpx"]  # the client's own, by its version
WEIGHTS = bytes(range(256)) * 40
TEXT = b"a line\n" * 60
STAMP = 1_704_067_201  # the second commit of a repository, in seconds


HEADER = {"key": "header", "value": {"summary": "S"}}


def of_file(path, content="b2s="):
    return {"key": "file", "value": {"path": path, "content": content, "encoding": "base64"}}


@pytest.fixture
def slept(monkeypatch):
    """What the client would have waited between its tries, in seconds."""
    waits = []
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", waits.append)
    return waits


@pytest.fixture
def hub(slept):
    with LocalHub("ann", orgs=("team",)) as opened:
        yield opened
    assert not opened.unknown


@pytest.fixture
def api(hub):
    return HfApi()


@pytest.fixture
def repo(hub):
    """A repository of ann's with a file of each kind."""
    hub.add_repo("ann/style", {"a.txt": TEXT, "sub/w.safetensors": WEIGHTS})
    return "ann/style"


def added(files):
    return [CommitOperationAdd(path, data) for path, data in files.items()]


def put(api, repo, path="b.txt", data=b"b", **more):
    return api.upload_file(repo_id=repo, path_or_fileobj=data, path_in_repo=path, **more)


def lines(hub):
    return [str(request) for request in hub.requests]


# The libraries


def test_transformers_reads_what_it_pushed(hub):
    model = push_base()
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(BASE)), logits(model))
    assert {"config.json", "model.safetensors", "README.md"} <= set(hub.files(BASE))


def test_peft_and_transformers_read_an_adapter_that_peft_pushed(hub):
    model = push_adapter()
    expected = logits(model)
    base = AutoModelForCausalLM.from_pretrained(BASE)
    assert not torch.equal(logits(base), expected)
    assert torch.equal(logits(PeftModel.from_pretrained(base, ADAPTER)), expected)
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(ADAPTER)), expected)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(ADAPTER)), expected)
    with hub.offline():
        before = len(hub.requests)
        assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(ADAPTER)), expected)
        assert len(hub.requests) == before


def test_diffusers_reads_the_pipeline_and_the_style_that_were_pushed(hub, api, tmp_path):
    pipe = pipeline_with_style()
    expected = component_output(pipe.unet)
    write_style(pipe, tmp_path)
    api.create_repo("ann/style")
    api.upload_folder(repo_id="ann/style", folder_path=tmp_path)
    tiny_pipeline("sd").push_to_hub("ann/pipe")
    loaded = DiffusionPipeline.from_pretrained("ann/pipe")
    loaded.load_lora_weights("ann/style")
    assert torch.equal(component_output(loaded.unet), expected)


def test_a_new_process_uses_the_hub_through_its_environment(hub, repo):
    code = "from huggingface_hub import *; print(whoami()['name'], hf_hub_download('{0}', 'a.txt'))"
    done = subprocess.run(
        [sys.executable, "-c", code.format(repo)],
        env=hub.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    name, path = done.stdout.split()
    assert (name, Path(path).read_bytes()) == ("ann", TEXT)
    assert Path(path).is_relative_to(hub.home)


# Accounts and repositories


def test_a_user_owns_what_is_under_their_name_and_their_organisations(hub, api):
    me = api.whoami()
    assert (me["name"], [org["name"] for org in me["orgs"]]) == ("ann", ["team"])
    assert create_repo("style").repo_id == "ann/style"
    assert create_repo("team/style", private=True) == f"{hub.endpoint}/team/style"
    assert create_repo("ann/style", exist_ok=True).repo_id == "ann/style"
    with pytest.raises(HfHubHTTPError, match="(?s)409.*already created"):
        create_repo("ann/style")
    with pytest.raises(HfHubHTTPError, match="403"):
        create_repo("bob/style")
    assert [model.id for model in api.list_models(author="team")] == ["team/style"]
    assert [model.id for model in HfApi(token=False).list_models()] == ["ann/style"]
    assert [model.id for model in api.list_models(search="STYLE", limit=1)] == ["ann/style"]
    assert [commit.title for commit in hub.commits("ann/style")] == ["initial commit"]


def test_a_deleted_repository_is_gone(hub, api, repo):
    api.delete_repo(repo)
    assert not api.repo_exists(repo)
    api.delete_repo(repo, missing_ok=True)
    with pytest.raises(RepositoryNotFoundError):
        api.delete_repo(repo)
    with pytest.raises(InvalidOption, match="no repository 'ann/style'"):
        hub.files(repo)


def test_a_private_repository_is_missing_to_strangers(hub, api, repo):
    stranger = HfApi(token=False)
    assert stranger.model_info(repo).private is False
    api.update_repo_settings(repo, private=True)
    assert api.model_info(repo).private is True
    for ask in (stranger.model_info, stranger.list_repo_refs, stranger.list_repo_files):
        with pytest.raises(RepositoryNotFoundError):
            ask(repo)
    with pytest.raises(RepositoryNotFoundError):
        hf_hub_download(repo, "a.txt", token=False)
    hub.add_repo("bob/secret", {"a.txt": TEXT}, private=True)
    assert not api.repo_exists("bob/secret")
    assert not api.repo_exists("gpt2")


def test_a_gated_repository_is_shown_but_not_read(hub, api, repo):
    hub.add_repo("bob/style", {"a.txt": TEXT}, gated=True)
    assert api.model_info("bob/style").gated == "auto"
    with pytest.raises(GatedRepoError) as error:
        hf_hub_download("bob/style", "a.txt")
    assert error.value.response.status_code == 403
    with pytest.raises(GatedRepoError):
        snapshot_download("bob/style", token=False)
    with pytest.raises(GatedRepoError):
        api.auth_check("bob/style")
    api.update_repo_settings(repo, gated="manual")
    assert Path(hf_hub_download(repo, "a.txt")).read_bytes() == TEXT
    api.auth_check(repo, write=True)


def test_a_wrong_token_is_refused_and_none_may_only_read(hub, repo):
    wrong, stranger = HfApi(token="hf_wrong"), HfApi(token=False)
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        wrong.whoami()
    with pytest.raises(HfHubHTTPError) as error:
        wrong.model_info(repo)
    assert error.value.response.status_code == 401
    assert Path(hf_hub_download(repo, "a.txt", token=False)).read_bytes() == TEXT
    with pytest.raises(HfHubHTTPError) as error:
        put(stranger, repo)
    assert error.value.response.status_code == 401
    hub.add_repo("bob/style")
    with pytest.raises(HfHubHTTPError) as error:
        put(HfApi(), "bob/style")
    assert error.value.response.status_code == 403


# Reading


def test_the_ids_are_those_of_git(hub, tmp_path):
    files = {"a.txt": TEXT, "a/b/c.txt": b"c", "a-b.txt": b"", "z/w.bin": WEIGHTS}
    oid = hub.add_repo("ann/style", files)
    commit = hub.commits("ann/style")[0]
    assert commit.files["a.txt"].blob == git_hash(TEXT)
    if shutil.which("git") is None:
        pytest.skip("the outside judge, git, is not installed")

    def git(*words, **more):
        plain = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
        environment = {**os.environ, **plain}
        done = subprocess.run(
            ["git", *words], cwd=tmp_path, env=environment, capture_output=True, check=True, **more
        )
        return done.stdout.decode().strip()

    git("init", "-q")
    for path, file in commit.files.items():
        held = file.pointer if file.lfs else file.data
        blob = git("hash-object", "-w", "--stdin", input=held)
        git("update-index", "--add", "--cacheinfo", f"100644,{blob},{path}")
    tree = git("write-tree")
    assert tree == commit.folders[""]
    first = "\n".join(
        [f"tree {tree}", f"parent {commit.parent}", *(f"{who} ann <ann@localhost> {STAMP} +0000"
         for who in ("author", "committer")), "", "A commit", ""]
    )  # fmt: skip
    made = git("hash-object", "-t", "commit", "--literally", "--stdin", input=first.encode())
    assert made == commit.oid == oid


def test_a_model_is_described_down_to_its_files(hub, api, repo):
    info = api.model_info(repo, files_metadata=True)
    commit = hub.commits(repo)[0]
    assert (info.sha, info.author, info.gated) == (commit.oid, "ann", False)
    by_name = {sibling.rfilename: sibling for sibling in info.siblings}
    assert by_name["a.txt"].blob_id == git_hash(TEXT)
    assert by_name["a.txt"].lfs is None
    weights = by_name["sub/w.safetensors"].lfs
    assert (weights.size, weights.sha256) == (len(WEIGHTS), hashlib.sha256(WEIGHTS).hexdigest())
    assert api.list_repo_files(repo) == [".gitattributes", "a.txt", "sub/w.safetensors"]
    entries = {entry.path: entry for entry in api.list_repo_tree(repo)}
    assert entries["sub"].tree_id == commit.folders["sub"]
    assert [entry.path for entry in api.list_repo_tree(repo, "sub")] == ["sub/w.safetensors"]
    with pytest.raises(RemoteEntryNotFoundError):
        list(api.list_repo_tree(repo, "nope"))
    found = api.get_paths_info(repo, ["a.txt", "sub", "nope"])
    assert [type(entry).__name__ for entry in found] == ["RepoFile", "RepoFolder"]


def test_what_is_not_there_is_told_apart(api, repo):
    assert file_exists(repo, "a.txt")
    assert not file_exists(repo, "b.txt")
    with pytest.raises(RemoteEntryNotFoundError):
        hf_hub_download(repo, "b.txt")
    for ask in (api.model_info, api.list_repo_files, api.list_repo_commits, snapshot_download):
        with pytest.raises(RevisionNotFoundError):
            ask(repo, revision="nope")
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download(repo, "a.txt", revision="nope")
    with pytest.raises(RepositoryNotFoundError):
        hf_hub_download("ann/nope", "a.txt")


def test_a_snapshot_is_cached_and_only_news_is_downloaded(hub, repo):
    folder = Path(snapshot_download(repo))
    read = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.*")}
    assert read == hub.files(repo)
    hub.commit(repo, {"a.txt": b"new", "sub/w.safetensors": WEIGHTS})
    hub.requests.clear()
    again = Path(snapshot_download(repo))
    assert (again / "a.txt").read_bytes() == b"new"
    assert [path.rpartition("/")[2] for path in lines(hub) if "GET /ann" in path] == ["a.txt"]
    hub.clear_cache()
    assert Path(snapshot_download(repo, revision=folder.name)) == folder
    assert (folder / "a.txt").read_bytes() == TEXT


def test_parts_of_a_file_and_unchanged_files_are_answered_as_http_says(hub, repo):
    url = f"{hub.endpoint}/{repo}/resolve/main/sub/w.safetensors"

    def get(**headers):
        return get_session().get(url, headers={k.replace("_", "-"): v for k, v in headers.items()})

    whole = get()
    assert whole.content == WEIGHTS
    assert whole.headers["etag"] == whole.headers["x-linked-etag"]
    size = len(WEIGHTS)
    for asked, part in (("0-9", WEIGHTS[:10]), ("100-", WEIGHTS[100:]), ("-7", WEIGHTS[-7:])):
        answer = get(Range=f"bytes={asked}")
        assert (answer.status_code, answer.content) == (206, part)
        assert answer.headers["content-range"].endswith(f"/{size}")
    beyond = get(Range=f"bytes={size}-")
    assert (beyond.status_code, beyond.headers["content-range"]) == (416, f"bytes */{size}")
    unchanged = get(If_None_Match=whole.headers["etag"])
    assert (unchanged.status_code, unchanged.content) == (304, b"")
    assert get_session().head(url).headers["content-length"] == str(size)


def test_a_connection_serves_many_requests_with_bodies_in_chunks(hub, api, repo):
    pieces = (b"x" * n for n in (1, 4000, 70_000))
    oid = hashlib.sha256(b"x" * 74_001).hexdigest()
    batch = f"{hub.endpoint}/{repo}.git/info/lfs/objects"
    objects = {"objects": [{"oid": oid, "size": 74_001}]}
    with httpx.Client(headers={"Authorization": f"Bearer {hub.token}"}) as client:
        assert "actions" in client.post(f"{batch}/batch", json=objects).json()["objects"][0]
        assert client.put(f"{batch}/{oid}", content=pieces).status_code == 200
        assert "actions" not in client.post(f"{batch}/batch", json=objects).json()["objects"][0]
        assert len(client._transport._pool.connections) == 1


def test_a_client_that_goes_away_in_the_middle_leaves_nothing(hub, api, repo):
    held = hub.commits(repo)
    head = f"POST /api/models/{repo}/commit/main HTTP/1.1\r\nHost: x\r\n"
    head += f"Authorization: Bearer {hub.token}\r\n"
    body = "\n".join(map(json.dumps, [HEADER, of_file("new.txt")]))
    chunk = f"{len(body):x}\r\n{body}\r\n"
    for rest in (f"Content-Length: {len(body) + 9}\r\n\r\n{body}",
                 f"Transfer-Encoding: chunked\r\n\r\n{chunk}",
                 "Transfer-Encoding: chunked\r\n\r\nnot a size\r\n"):  # fmt: skip
        with socket.create_connection(("127.0.0.1", int(hub.endpoint.rpartition(":")[2]))) as out:
            out.sendall((head + rest).encode())
            out.shutdown(socket.SHUT_WR)
            assert out.recv(1) == b""
    assert hub.commits(repo) == held
    assert not hub.requests
    with socket.create_connection(("127.0.0.1", int(hub.endpoint.rpartition(":")[2]))) as out:
        out.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n{chunk}0\r\n\r\n".encode())
        assert b" 200 " in out.recv(100)
    assert "new.txt" in hub.files(repo)


def test_what_the_hub_does_not_know_is_not_found_and_noted():
    with LocalHub() as hub:
        with pytest.raises(HfHubHTTPError, match="404"):
            HfApi().create_repo("user/data", repo_type="dataset")
        with pytest.raises(HfHubHTTPError, match="404"):
            HfApi().dataset_info("user/data")
        assert hub.unknown == ["GET /api/datasets/user/data"]


# Writing


def test_a_commit_is_on_top_of_the_parent_it_names_or_refused(hub, api, repo):
    old = hub.commits(repo)[0].oid
    made = put(api, repo, parent_commit=old, commit_message="Title", commit_description="More.")
    newest = hub.commits(repo)[0]
    assert (newest.oid, newest.parent, newest.title) == (made.oid, old, "Title")
    assert newest.description == "More."
    assert made.commit_url == f"{hub.endpoint}/{repo}/commit/{made.oid}"
    with pytest.raises(HfHubHTTPError, match="412") as error:
        put(api, repo, data=b"other", parent_commit=old)
    assert error.value.response.status_code == 412
    assert hub.files(repo)["b.txt"] == b"b"
    titles = [commit.title for commit in api.list_repo_commits(repo)]
    assert titles == ["Title", "A commit", "initial commit"]


def test_two_commits_at_once_on_one_parent_leave_one(hub, api, repo):
    old = hub.commits(repo)[0].oid
    together = threading.Barrier(2)
    hub.before("/commit/", together.wait, times=2)

    def push(data):
        try:
            return put(HfApi(), repo, data=data, parent_commit=old).oid
        except HfHubHTTPError as error:
            return error.response.status_code

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(push, [b"one", b"two"]))
    winner = results.index(hub.commits(repo)[0].oid)
    assert results[1 - winner] == 412
    assert hub.files(repo)["b.txt"] == [b"one", b"two"][winner]
    assert len(hub.commits(repo)) == 3


def test_another_push_may_land_in_between(hub, api, repo):
    old = hub.commits(repo)[0].oid
    hub.before(re.compile("^POST .*/commit/"), lambda: hub.commit(repo, {"c.txt": b"c"}))
    with pytest.raises(HfHubHTTPError, match="412"):
        put(api, repo, parent_commit=old)
    put(api, repo, parent_commit=hub.commits(repo)[0].oid)
    assert {"b.txt", "c.txt"} <= set(hub.files(repo))


def test_one_commit_adds_copies_and_deletes(hub, api, repo):
    hub.commit(repo, {"old/1.txt": b"1", "old/2.txt": b"2", "w2.bin": WEIGHTS})
    operations = [
        *added({"new.txt": b"new", "new.bin": WEIGHTS + b"more"}),
        CommitOperationCopy("sub/w.safetensors", "copy.safetensors"),
        CommitOperationCopy("a.txt", "copy.txt"),
        CommitOperationDelete("old/"),
        CommitOperationDelete("w2.bin"),
    ]
    api.create_commit(repo, operations, commit_message="All")
    files = hub.files(repo)
    assert not [path for path in files if path.startswith("old/") or path == "w2.bin"]
    assert files["copy.safetensors"] == files["sub/w.safetensors"] == WEIGHTS
    assert files["copy.txt"] == TEXT
    assert files["new.bin"] == WEIGHTS + b"more"
    api.delete_file("new.txt", repo)
    assert "new.txt" not in hub.files(repo)
    with pytest.raises(RemoteEntryNotFoundError):
        api.delete_file("new.txt", repo)


def test_a_folder_is_one_commit_and_what_is_there_is_not_sent_again(hub, api, repo, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "w.safetensors").write_bytes(WEIGHTS)
    (tmp_path / "b.txt").write_bytes(TEXT)
    (tmp_path / "empty.bin").write_bytes(b"")
    api.upload_folder(repo_id=repo, folder_path=tmp_path)
    assert len(hub.commits(repo)) == 3
    # the same content lies there under another path already
    assert not [line for line in lines(hub) if line.startswith("PUT")]
    assert hub.files(repo)["in/w.safetensors"] == WEIGHTS
    assert hub.files(repo)["empty.bin"] == b""
    hub.requests.clear()
    api.upload_folder(repo_id=repo, folder_path=tmp_path)
    assert not [line for line in lines(hub) if "/commit/" in line]
    assert len(hub.commits(repo)) == 3


def test_a_pull_request_is_a_ref_of_its_own_and_open_to_readers(hub, api):
    hub.add_repo("bob/style", {"a.txt": TEXT})
    old = hub.commits("bob/style")[0].oid
    made = put(api, "bob/style", "w.bin", WEIGHTS, create_pr=True)
    assert (made.pr_num, made.pr_revision) == (1, "refs/pr/1")
    assert hub.commits("bob/style")[0].oid == old
    put(api, "bob/style", data=b"more", revision="refs/pr/1")
    assert put(api, "bob/style", create_pr=True).pr_num == 2
    files = hub.files("bob/style", revision="refs/pr/1")
    assert (files["w.bin"], files["b.txt"]) == (WEIGHTS, b"more")
    refs = api.list_repo_refs("bob/style", include_pull_requests=True)
    assert [ref.ref for ref in refs.pull_requests] == ["refs/pr/1", "refs/pr/2"]
    assert Path(hf_hub_download("bob/style", "w.bin", revision="refs/pr/1")).read_bytes() == WEIGHTS


def test_branches_and_tags_come_and_go(hub, api, repo):
    old = hub.commits(repo)[0].oid
    api.create_branch(repo, branch="try/it")
    api.create_tag(repo, tag="v1", tag_message="First")
    put(api, repo, revision="try/it")
    refs = api.list_repo_refs(repo)
    assert {ref.name: ref.target_commit for ref in refs.tags} == {"v1": old}
    assert {ref.name for ref in refs.branches} == {"main", "try/it"}
    assert api.model_info(repo, revision="try/it").sha != old
    assert api.model_info(repo, revision=old[:8]).sha == old
    assert Path(hf_hub_download(repo, "a.txt", revision="v1")).parent.name == old
    api.create_branch(repo, branch="back", revision="v1")
    for again in (lambda **k: api.create_branch(repo, branch="try/it", **k),
                  lambda **k: api.create_tag(repo, tag="v1", **k)):  # fmt: skip
        again(exist_ok=True)
        with pytest.raises(HfHubHTTPError, match="409"):
            again()
    with pytest.raises(BadRequestError, match="v1 is no branch"):
        put(api, repo, revision="v1")
    api.delete_branch(repo, branch="try/it")
    api.delete_tag(repo, tag="v1")
    with pytest.raises(RevisionNotFoundError):
        api.delete_tag(repo, tag="v1")
    with pytest.raises(HfHubHTTPError, match="403"):
        api.delete_branch(repo, branch="main")
    assert list(api.list_repo_refs(repo).tags) == []


CARD = "---\nlicense: mit\nlibrary_name: peft\ntags: [lora]\nbase_model: a/b\n---\nHi"


def test_cards_are_checked_and_shown(hub, api, repo):
    more = "base_model_relation: adapter\npipeline_tag: text-generation\n---\nHi"
    put(api, repo, "README.md", CARD.replace("---\nHi", more).encode())
    info = api.model_info(repo)
    assert (info.library_name, info.pipeline_tag) == ("peft", "text-generation")
    assert info.card_data.license == "mit"
    tags = ["peft", "lora", "base_model:a/b", "base_model:adapter:a/b", "license:mit"]
    assert info.tags == tags
    assert [model.id for model in api.list_models(filter="lora")] == [repo]
    assert ModelCard.load(repo).text == "Hi"
    held = hub.commits(repo)[0].oid
    for bad, said in BAD_CARDS.items():
        text = f"---\n{bad}\n---\n"
        with pytest.raises(ValueError, match=said):
            put(api, repo, "README.md", text.encode())
    assert hub.commits(repo)[0].oid == held
    with pytest.warns(UserWarning, match="empty or missing yaml metadata"):
        put(api, repo, "README.md", b"no metadata")


@pytest.mark.skipif(
    "constants.ENDPOINT" not in inspect.getsource(RepoCard.validate),
    reason="huggingface_hub 1.31 asks the real Hub here, whatever its endpoint",
)
def test_a_card_validates_itself(hub, repo):
    card = ModelCard(CARD)
    card.validate()
    card.push_to_hub(repo)
    metadata_update(repo, {"pipeline_tag": "text-generation"})
    assert ModelCard.load(repo).data.to_dict() == {
        **card.data.to_dict(),
        "pipeline_tag": "text-generation",
    }
    with pytest.raises(ValueError, match="base_model_relation"):
        ModelCard("---\nbase_model_relation: child\n---\n").validate()


# lines of a card -> what the Hub says of them
BAD_CARDS = {
    "license: [mit": "Invalid YAML",
    "- mit": "should be a dict",
    "tags: lora": '"tags" must be an array of strings',
    "base_model: {a: b}": '"base_model" must be a string or an array',
    "base_model_relation: child": "must be one of adapter, finetune, merge, quantized",
    "widget: [a]": '"widget" must be an array of objects',
    "model-index: [{name: a}]": 'model-index.0..results" must be an array',
    "model-index: [{results: []}]": 'model-index.0..name" must be a string',
    "model-index: [{name: a, results: [{task: {type: t}, dataset: {type: d}, metrics: [{}]}]}]": (
        '(?s)dataset.name" is required.*metrics.0..type" is required'
    ),
}


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], "header with a summary"),
        ([{"key": "file", "value": {}}], "header with a summary"),
        ([{"key": "header"}], "lines of JSON"),
        ([HEADER, {"key": "what", "value": {}}], "unknown operation what"),
        ([HEADER, {"key": "file", "value": {"path": "x"}}], "unknown encoding"),
        ([HEADER, {"key": "file", "value": {"path": "x", "encoding": "base64"}}], "lacks a value"),
        ([HEADER, of_file("x", "?")], "not base64"),
        ([HEADER, of_file("../x")], "bad path"),
        ([HEADER, of_file("a//x")], "bad path"),
        ([HEADER, of_file("a.txt/x")], "in a folder that is a file"),
        ([HEADER, {"key": "lfsFile", "value": {"path": "x", "oid": "0" * 64}}], "does not exist"),
        ([HEADER, {"key": "deletedFolder", "value": {"path": "no/"}}], "no folder no/"),
        ([HEADER, {"key": "copyFile", "value": {"path": "x", "srcPath": "no"}}], "no file no"),
        ([HEADER, of_file("README.md", "LS0tCnRhZ3M6IGEKLS0tCg==")], '"tags" must be'),
    ],
)
def test_a_commit_that_cannot_be_changes_nothing(hub, api, repo, rows, said):
    held = hub.commits(repo)
    body = "\n".join(
        map(json.dumps, [*rows[:1], *([of_file("ok", "b2s=")] * (len(rows) > 1)), *rows[1:]])
    )
    answer = get_session().post(
        f"{hub.endpoint}/api/models/{repo}/commit/main",
        content=body.encode(),
        headers={"Authorization": f"Bearer {hub.token}"},
    )
    assert answer.status_code in (400, 404)
    assert re.search(said, answer.json()["error"])
    assert hub.commits(repo) == held


def test_an_old_copy_and_its_revision_may_be_named(hub, api, repo):
    old = hub.commits(repo)[0].oid
    hub.commit(repo, {"a.txt": b"new"})
    copy = {"path": "b.txt", "srcPath": "a.txt", "srcRevision": old}
    rows = [HEADER, {"key": "copyFile", "value": copy}]
    get_session().post(
        f"{hub.endpoint}/api/models/{repo}/commit/main",
        content="\n".join(map(json.dumps, rows)).encode(),
        headers={"Authorization": f"Bearer {hub.token}"},
    ).raise_for_status()
    assert hub.files(repo)["b.txt"] == TEXT


def test_lfs_objects_are_taken_only_as_they_were_announced(hub, repo):
    oid = hashlib.sha256(b"new").hexdigest()
    lfs = f"{hub.endpoint}/{repo}.git/info/lfs"
    signed = {"Authorization": f"Bearer {hub.token}"}
    session = get_session()
    assert session.put(f"{lfs}/objects/{oid}", content=b"new").status_code == 403
    announced = {"objects": [{"oid": oid, "size": 3}]}
    session.post(f"{lfs}/objects/batch", json=announced, headers=signed)
    assert session.put(f"{lfs}/objects/{oid}", content=b"old").status_code == 400
    verify = {"oid": oid, "size": 3}
    assert session.post(f"{lfs}/verify", json=verify, headers=signed).status_code == 404
    assert session.put(f"{lfs}/objects/{oid}", content=b"new").status_code == 200
    assert session.post(f"{lfs}/verify", json=verify, headers=signed).status_code == 200
    wrong = {"oid": oid, "size": 4}
    assert session.post(f"{lfs}/verify", json=wrong, headers=signed).status_code == 422


# Faults


def test_a_lost_answer_leaves_the_commit_and_a_repeat_adds_an_empty_one(hub, api, repo):
    hub.fail("drop-answer", matching="/commit/")
    with pytest.raises(httpx.RemoteProtocolError):
        put(api, repo)
    assert hub.files(repo)["b.txt"] == b"b"
    assert [request.status for request in hub.requests] == [200, 0]
    put(api, repo)  # preupload tells the client that the content is there
    assert len(hub.commits(repo)) == 3
    assert hub.faults_hit == 1


def test_a_dropped_request_does_nothing(hub, api, repo):
    hub.fail("drop", matching="/commit/")
    with pytest.raises(httpx.RemoteProtocolError):
        put(api, repo)
    assert "b.txt" not in hub.files(repo)
    put(api, repo)
    assert hub.files(repo)["b.txt"] == b"b"


@pytest.mark.parametrize("fault", ["drop", "drop-answer", 429, 500, 503])
def test_the_client_repeats_what_comes_before_a_commit(hub, api, repo, slept, fault):
    for path in ("/preupload/", "PUT ", "/verify", "/objects/batch"):
        hub.fail(fault, matching=path)
    put(api, repo, "new.bin", WEIGHTS + b"more")
    assert hub.files(repo)["new.bin"] == WEIGHTS + b"more"
    assert slept == [1, 1, 1, 1]
    assert hub.faults_hit == 4


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_commit_and_the_information_are_asked_for_once(hub, api, repo, slept, status):
    hub.fail(status, matching="/commit/")
    with pytest.raises(HfHubHTTPError) as error:
        put(api, repo)
    assert error.value.response.status_code == status
    hub.fail(status, matching="GET /api/models/")
    with pytest.raises(HfHubHTTPError) as error:
        api.model_info(repo)
    assert error.value.response.status_code == status
    assert slept == []


def test_a_client_waits_as_long_as_it_is_told(hub, api, repo, slept):
    hub.fail(429, matching="/preupload/", seconds=7)
    hub.fail(503, matching="PUT ", seconds=3)
    put(api, repo, "new.bin", WEIGHTS + b"more")
    assert slept == [8, 4]  # the client adds a second


def test_a_cut_download_goes_on_where_it_was_cut(hub, repo, slept, monkeypatch):
    # what is not a whole chunk, of 10 MiB, the client forgets
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1024)
    hub.fail("cut", matching="GET /ann")
    path = hf_hub_download(repo, "sub/w.safetensors")
    assert Path(path).read_bytes() == WEIGHTS
    parts = [r for r in hub.requests if str(r).startswith("GET /ann")]
    half = len(WEIGHTS) // 2
    assert [(r.status, r.received) for r in parts] == [(200, half), (206, half)]
    assert slept == [1]


def test_a_download_that_stays_cut_leaves_no_file(hub, repo):
    hub.fail(500, matching="GET /ann")
    with pytest.raises(HfHubHTTPError):
        hf_hub_download(repo, "sub/w.safetensors")
    assert [p for p in hub.home.rglob("*") if p.is_file() and p.stat().st_size > 1000] == []
    assert Path(hf_hub_download(repo, "sub/w.safetensors")).read_bytes() == WEIGHTS


def test_a_cut_answer_in_json_is_an_error_of_the_connection(hub, api, repo):
    hub.fail("cut", matching=re.compile(r"^GET /api/models/[^?]*$"))
    with pytest.raises(httpx.RemoteProtocolError):
        api.model_info(repo)
    hub.fail("cut", matching="HEAD ")  # which has no body
    with pytest.raises(httpx.RemoteProtocolError):
        file_exists(repo, "a.txt")


def test_a_delay_passes_or_runs_into_the_timeout(hub, api, repo, monkeypatch):
    hub.fail("delay", seconds=0.05)
    assert api.model_info(repo).id == repo
    hub.fail("delay", seconds=60)  # it ends when the Hub closes
    with pytest.raises(httpx.ReadTimeout):
        api.model_info(repo, timeout=0.05)


def test_faults_hit_the_requests_they_are_meant_for(hub, api, repo):
    hub.fail(500, at=1, times=2)
    hub.fail(503, at=1, matching="/refs")

    def status(ask):
        try:
            ask(repo)
        except HfHubHTTPError as error:
            return error.response.status_code
        return 200

    asked = [api.model_info, api.list_repo_refs, api.model_info, api.list_repo_refs, api.model_info]
    assert [status(ask) for ask in asked] == [200, 500, 500, 503, 200]
    assert hub.faults_hit == 3
    hub.fail(500, times=9)
    hub.clear_faults()
    assert (status(api.model_info), hub.faults_hit) == (200, 0)


@pytest.mark.parametrize(
    "given",
    [
        {"fault": "explode"},
        {"fault": 404},
        {"fault": "delay"},
        {"fault": "drop", "seconds": 1},
        {"fault": "delay", "seconds": -1},
        {"fault": "drop", "at": -1},
        {"fault": "drop", "times": 0},
    ],
)
def test_a_fault_that_cannot_be_is_refused(hub, given):
    with pytest.raises(InvalidOption):
        hub.fail(**given)


def test_what_a_callback_raises_is_not_lost(slept):
    def broken():
        raise ZeroDivisionError("of the test")

    def push():
        with LocalHub("ann") as hub:
            hub.add_repo("ann/style")
            hub.before("/api/", broken)
            with pytest.raises(HfHubHTTPError, match="ZeroDivisionError: of the test"):
                HfApi().model_info("ann/style")

    with pytest.raises(ZeroDivisionError, match="of the test"):
        push()


# This process


def test_everything_is_as_before_when_the_hub_closes(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(lora_base, "HF_HUB_OFFLINE", False)  # not what the constants say
    monkeypatch.setenv("HF_HUB_CACHE", "/a/cache")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    shared = huggingface_hub.hf_api.api
    threads = set(threading.enumerate())

    def state():
        held = {name: value for name, value in vars(constants).items() if name.isupper()}
        return held, dict(os.environ), shared.endpoint, lora_base.HF_HUB_OFFLINE

    before = state()

    def fail_inside():
        with LocalHub("ann") as hub:
            assert state()[0]["ENDPOINT"] == shared.endpoint == hub.endpoint
            assert state()[0]["HF_HUB_OFFLINE"] is False
            assert "HF_HUB_CACHE" not in os.environ
            assert HfApi().whoami()["name"] == "ann"
            raise KeyError(str(hub.home))

    with pytest.raises(KeyError) as error:
        fail_inside()
    assert state() == before
    assert not Path(error.value.args[0]).exists()
    assert set(threading.enumerate()) <= threads
    with pytest.raises(OfflineModeIsEnabled):
        HfApi().whoami(token="hf_any")


def test_modules_imported_in_the_meantime_are_put_back_too(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HOME", "/a/home")
    monkeypatch.delenv("HF_MODULES_CACHE", raising=False)
    late = ModuleType("diffusers.imported_late")  # does as diffusers.utils.constants does
    with LocalHub():
        monkeypatch.setitem(sys.modules, late.__name__, late)
        exec("from huggingface_hub.constants import HF_HOME, HF_HUB_OFFLINE", vars(late))
        late.HF_MODULES_CACHE = os.path.join(late.HF_HOME, "modules")
        late.ENDPOINT = "of its own"
        assert late.HF_HUB_OFFLINE is False
    assert (late.HF_HUB_OFFLINE, late.HF_HOME) == (True, "/a/home")
    assert late.HF_MODULES_CACHE == os.path.join("/a/home", "modules")
    assert late.ENDPOINT == "of its own"


def test_a_hub_opens_again_with_what_it_holds_but_not_twice_at_once(slept):
    hub = LocalHub("ann")
    with hub:
        hub.add_repo("ann/style", {"a.txt": TEXT})
        with pytest.raises(LoraError, match="open in this process already"), LocalHub():
            pass
        with pytest.raises(LoraError, match="open in this process already"), hub:
            pass
        assert HfApi().repo_exists("ann/style")
    assert hub.files("ann/style")["a.txt"] == TEXT
    with hub:
        assert file_exists("ann/style", "a.txt")


def test_offline_uses_the_cache_alone(hub, repo):
    path = hf_hub_download(repo, "a.txt")
    hub.requests.clear()
    with hub.offline():
        assert hf_hub_download(repo, "a.txt") == path
        with pytest.raises(LocalEntryNotFoundError):
            hf_hub_download(repo, "sub/w.safetensors")
        assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert not hub.requests
    assert file_exists(repo, "a.txt")


def test_names_and_files_that_cannot_be_are_refused(hub, repo):
    with pytest.raises(InvalidOption, match="'a b' is no name"):
        LocalHub("a b")
    for bad in ("style", "ann/", "ann/a/b"):
        with pytest.raises(InvalidOption, match="is no name"):
            hub.add_repo(bad)
    with pytest.raises(InvalidOption, match="exists"):
        hub.add_repo(repo)
    with pytest.raises(InvalidOption, match="bad path"):
        hub.add_repo("ann/other", {"../x": b""})
    with pytest.raises(InvalidOption, match="no repository"):
        hub.commits("ann/other")
    with pytest.raises(InvalidOption, match="has no 'nope'"):
        hub.files(repo, revision="nope")
    with pytest.raises(InvalidOption, match="is no branch"):
        hub.commit(repo, {"x": b""}, revision=hub.commits(repo)[0].oid)
    hub.commit(repo, {"a.txt": None})
    assert "a.txt" not in hub.files(repo)
