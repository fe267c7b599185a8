"""Push and pull: one commit on a checked parent, whatever the connection does."""

import json
import threading

import peft
import pytest
import torch
from huggingface_hub import ModelCard
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from hf_lora import (
    CardExtras,
    LoadLimits,
    attach_lora,
    load_lora,
    open_adapter,
    pull_lora,
    push_lora,
    save_adapter,
    save_lora,
)
from hf_lora.errors import AdapterNotFound, BadAdapterFile, HubError, InvalidOption, PushConflict
from hf_lora.testing import component_output, tiny, tiny_pipeline
from tests.local_hub_clients import BASE, logits, pipeline_with_style, push_adapter, push_base
from tests.support import randomise

REPO = "ann/style"
FILES = {"README.md", "adapter_config.json", "adapter_model.safetensors"}
COMMIT = "POST /api/models/ann/style/commit/"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """An adapter that does something, and another of the same base."""
    found = []
    for seed in (1, 2):
        model = randomise(attach_lora(tiny("llama"), rank=4, alpha=9), seed)
        folder = save_lora(model, tmp_path_factory.mktemp("adapter"))
        found.append(open_adapter(folder))
    return found


def own_commits(hub, repo=REPO, revision="main"):
    """The commits but the one that every repository begins with."""
    return hub.commits(repo, revision=revision)[:-1]


def published(hub, repo=REPO):
    """The files but the one that every repository begins with."""
    try:
        return {n: data for n, data in hub.files(repo).items() if n != ".gitattributes"}
    except InvalidOption:  # no such repository
        return {}


# Round trips


def test_what_we_push_is_loaded_by_peft_and_transformers(hub):
    push_base()
    model = randomise(attach_lora(AutoModelForCausalLM.from_pretrained(BASE), rank=4, alpha=9))
    expected = logits(model)
    commit = push_lora(model, REPO)
    assert commit.oid == hub.commits(REPO)[0].oid
    assert set(hub.files(REPO)) >= FILES
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), REPO)
    assert torch.equal(logits(theirs), expected)
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(REPO)), expected)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(REPO)), expected)
    card = ModelCard.load(REPO)
    card.validate()
    assert card.data.base_model == BASE
    assert (card.data.library_name, card.data.base_model_relation) == ("peft", "adapter")


def test_what_we_push_from_a_pipeline_is_loaded_by_diffusers(hub):
    pipe = tiny_pipeline("sd")
    randomise(attach_lora(pipe, rank=4, alpha=9).unet)
    push_lora(pipe, REPO)
    theirs = tiny_pipeline("sd")
    theirs.load_lora_weights(REPO)
    assert torch.equal(component_output(theirs.unet), component_output(pipe.unet))
    card = ModelCard.load(REPO)
    card.validate()
    assert card.data.library_name == "diffusers"


def test_what_peft_pushes_is_pulled(hub):
    expected = logits(push_adapter())
    ours = AutoModelForCausalLM.from_pretrained(BASE)
    load_lora(ours, "ann/adapter")
    assert torch.equal(logits(ours), expected)
    pulled = AutoModelForCausalLM.from_pretrained(BASE)
    load_lora(pulled, pull_lora("ann/adapter"))
    assert torch.equal(logits(pulled), expected)


def test_what_diffusers_and_kohyas_scripts_publish_is_pulled(hub, tmp_path):
    pipe = pipeline_with_style()
    expected = component_output(pipe.unet)
    adapter = open_adapter(save_lora(pipe, tmp_path / "own", name="default"))
    save_adapter(adapter, tmp_path / "kohya.safetensors", layout="kohya", host=pipe)
    kohya = (tmp_path / "kohya.safetensors").read_bytes()
    diffusers = next((tmp_path / "own").iterdir()).read_bytes()
    hub.add_repo("bob/kohya", {"my_style.safetensors": kohya, "README.md": b"hi"})
    hub.add_repo("bob/diffusers", {"pytorch_lora_weights.safetensors": diffusers})
    for repo in ("bob/kohya", "bob/diffusers"):
        host = tiny_pipeline("sd")
        load_lora(host, repo)
        assert (component_output(host.unet) - expected).abs().max() <= 1e-6
        assert pull_lora(repo, host=host).components["unet"].kind == "LORA"


# One commit


def test_an_unchanged_adapter_makes_no_commit(hub, adapter):
    first = push_lora(adapter[0], REPO)
    hub.requests.clear()
    again = push_lora(adapter[0], REPO)
    assert again.oid == first.oid
    assert len(own_commits(hub)) == 1
    assert {request.method for request in hub.requests} <= {"GET", "HEAD"}


def test_a_new_adapter_is_one_commit_more_and_only_what_changed_is_sent(hub, adapter):
    push_lora(adapter[0], REPO)
    old = hub.files(REPO)
    push_lora(adapter[1], REPO)
    assert len(own_commits(hub)) == 2
    changed = {name for name, data in hub.files(REPO).items() if old[name] != data}
    assert changed == {"README.md", "adapter_model.safetensors"}


def test_branch_tag_and_pull_request(hub, adapter):
    push_lora(adapter[0], REPO, tag="v1")
    main = hub.commits(REPO)[0].oid
    assert hub.commits(REPO, revision="v1")[0].oid == main
    push_lora(adapter[1], REPO, revision="wide")
    assert hub.commits(REPO)[0].oid == main
    assert hub.commits(REPO, revision="wide")[1].oid == main
    request = push_lora(adapter[1], REPO, create_pr=True, message="Better")
    assert request.pr_url.endswith("/discussions/1")
    assert hub.commits(REPO)[0].oid == main
    assert hub.commits(REPO, revision="refs/pr/1")[0].title == "Better"
    with pytest.raises(InvalidOption, match=r"the tag 'v1' of 'ann/style' is on commit"):
        push_lora(adapter[1], REPO, tag="v1")


def test_a_repository_is_private_where_that_was_asked_for(hub, adapter):
    push_lora(adapter[0], REPO, private=True)
    with pytest.raises(AdapterNotFound, match="does not exist or is private"):
        pull_lora(REPO, token=False)
    with pytest.raises(AdapterNotFound, match="refuses the access token"):
        pull_lora(REPO, token="hf_" + "x" * 34)


def test_a_folder_of_the_repositorys_name_does_not_matter(hub, adapter, tmp_path, monkeypatch):
    (tmp_path / REPO).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert push_lora(adapter[0], REPO).oid == hub.commits(REPO)[0].oid


def test_what_is_to_be_private_does_not_go_into_a_public_repository(hub, adapter):
    hub.add_repo(REPO, {"a.txt": b"x"})
    with pytest.raises(InvalidOption, match="exists and is public"):
        push_lora(adapter[0], REPO, private=True)
    assert published(hub) == {"a.txt": b"x"}


def test_the_licence_of_the_base_is_carried_and_never_lost_for_a_moments_failure(hub, adapter):
    hub.add_repo("meta/base", {"README.md": b"---\nlicense: mit\n---\n"})
    push_lora(adapter[0], REPO, base_model="meta/base")
    assert ModelCard.load(REPO).data.license == "mit"
    before = published(hub)
    hub.fail(500, matching="/api/models/meta/base", times=40)
    with pytest.raises(HubError):
        push_lora(adapter[1], REPO, base_model="meta/base")
    assert published(hub) == before
    hub.clear_faults()
    push_lora(adapter[1], REPO, base_model="meta/base", card=CardExtras(license="apache-2.0"))
    assert ModelCard.load(REPO, ignore_metadata_errors=True).data.license == "apache-2.0"


def test_pictures_and_their_prompts_stand_in_the_card(hub, tmp_path):
    picture = tmp_path / "grid.png"
    picture.write_bytes(b"\x89PNG....")
    pipe = tiny_pipeline("sd")
    randomise(attach_lora(pipe, rank=2).unet)
    push_lora(pipe, REPO, images={picture: "a red fox"})
    assert hub.files(REPO)["images/grid.png"] == picture.read_bytes()
    card = ModelCard.load(REPO)
    assert card.data.widget == [{"text": "a red fox", "output": {"url": "images/grid.png"}}]
    assert "<Gallery />" in card.text
    for wrong in ({tmp_path / "none.png": "x"}, {tmp_path: "x"}):
        with pytest.raises(InvalidOption, match="images has"):
            push_lora(pipe, REPO, images=wrong)


def test_what_the_owner_wrote_into_the_card_stays(hub, adapter):
    push_lora(adapter[0], REPO)
    text = hub.files(REPO)["README.md"].decode()
    hub.commit(REPO, {"README.md": (text + "\nMine.\n").encode()})
    push_lora(adapter[1], REPO)
    card = hub.files(REPO)["README.md"].decode()
    assert "Mine." in card
    assert adapter[1].digest in card


# Nothing of this machine


def test_no_local_path_is_published(hub, tmp_path, caplog):
    tiny("llama").save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    push_lora(randomise(attach_lora(model, rank=4)), REPO)
    assert "name it: push_lora(..., base_model='user/name')" in caplog.text
    push_lora(model, "ann/named", base_model="meta/base")
    for repo in (REPO, "ann/named"):
        for name, data in hub.files(repo).items():
            assert str(tmp_path).encode() not in data, name
    config = json.loads(hub.files("ann/named")["adapter_config.json"])
    assert config["base_model_name_or_path"] == "meta/base"
    weights = tmp_path / "w.safetensors"
    weights.write_bytes(hub.files("ann/named")["adapter_model.safetensors"])
    with safe_open(weights, "pt") as file:
        assert json.loads(file.metadata()["hf_lora"])["base"]["id"] == "meta/base"
    with pytest.raises(InvalidOption, match="is no repository id"):
        push_lora(model, REPO, base_model=str(tmp_path / "base"))


def test_values_that_are_no_numbers_are_never_published(hub):
    model = attach_lora(tiny("llama"), rank=2)
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad)[0, 0] = float("nan")
    with pytest.raises(BadAdapterFile, match=r"NaN|nan"):
        push_lora(model, REPO)
    assert not hub.requests


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"repo_id": "style"}, "repo_id"),
        ({"repo_id": "a/b/c"}, "repo_id"),
        ({"repo_id": None}, "repo_id"),
        ({"revision": " "}, "revision"),
        ({"revision": "wide", "create_pr": True}, "revision"),
        ({"tag": "v1", "create_pr": True}, "tag"),
        ({"tag": ""}, "tag"),
    ],
)
def test_arguments_that_cannot_work(hub, adapter, options, field):
    with pytest.raises(InvalidOption) as error:
        push_lora(adapter[0], **{"repo_id": REPO, **options})
    assert error.value.field == field
    assert not hub.requests


@pytest.mark.parametrize("readme", [b"\xff\xfe", b"---\n: [\n---\nx"], ids=["bytes", "yaml"])
def test_a_card_that_cannot_be_read_is_never_overwritten(hub, adapter, readme):
    hub.add_repo(REPO, {"README.md": readme})
    with pytest.raises(InvalidOption):
        push_lora(adapter[0], REPO)
    assert hub.files(REPO)["README.md"] == readme
    assert len(own_commits(hub)) == 1


# The connection

FAULTS = ("drop", "drop-answer", "cut", 429, 500, 503)


@pytest.mark.parametrize("update", [False, True], ids=["new", "update"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_push_is_whole_or_not_there_wherever_it_is_cut(hub, adapter, fault, update, monkeypatch):
    """Without our own patience, so that what fails once stays failed, and the user pushes again."""
    monkeypatch.setattr("hf_lora.client.TRIES", 1)
    cuts = 0
    for at in range(12):
        repo = f"ann/{fault}-{at}"
        if update:
            push_lora(adapter[1], repo)
        before = published(hub, repo)
        hub.clear_faults()
        hub.fail(fault, at=at)
        try:
            push_lora(adapter[0], repo)
        except HubError:
            now = published(hub, repo)
            assert now == before or set(now) == FILES
            cuts += 1
        if not hub.faults_hit:
            break
        hub.clear_faults()
        push_lora(adapter[0], repo)
        assert len(own_commits(hub, repo)) == 1 + update
        assert pull_lora(repo).digest == adapter[0].digest
    else:
        raise AssertionError("a push makes fewer requests")
    assert at >= 6
    assert cuts >= 1


@pytest.mark.parametrize("fault", FAULTS)
def test_a_push_that_fails_once_goes_on_by_itself(hub, adapter, fault):
    for at in range(12):
        repo = f"ann/{fault}-{at}"
        hub.clear_faults()
        hub.fail(fault, at=at)
        commit = push_lora(adapter[0], repo)
        assert [c.oid for c in own_commits(hub, repo)] == [commit.oid]
        if not hub.faults_hit:
            break
    assert at >= 6


@pytest.mark.parametrize("fault", FAULTS)
def test_a_cut_pull_leaves_nothing_half_and_goes_on(hub, adapter, fault):
    push_lora(adapter[0], REPO)
    for at in range(6):
        hub.clear_cache()
        hub.clear_faults()
        hub.fail(fault, at=at, times=40)  # more than anybody tries
        if at == 5:  # what a pull asks for: the commit, and twice for each of two files
            assert pull_lora(REPO).digest == adapter[0].digest
            assert not hub.faults_hit
            return
        with pytest.raises(AdapterNotFound):
            pull_lora(REPO)
        snapshots = hub.home.glob("hub/models--*/snapshots/*/*")
        sent = published(hub)
        assert all(file.read_bytes() == sent[file.name] for file in snapshots)
        hub.clear_faults()
        assert pull_lora(REPO).digest == adapter[0].digest


def test_a_pull_is_of_one_revision_while_another_push_lands(hub, adapter):
    push_lora(adapter[0], REPO)
    first = hub.commits(REPO)[0].oid
    files = {}

    def land():
        files.update(hub.files(REPO))
        hub.commit(REPO, {"adapter_model.safetensors": b"other", "adapter_config.json": b"{}"})

    hub.before("adapter_model.safetensors", land)
    assert pull_lora(REPO).digest == adapter[0].digest
    assert files
    assert hub.commits(REPO)[0].oid != first
    with pytest.raises(BadAdapterFile):
        pull_lora(REPO)


def test_of_two_pushes_at_once_one_wins_and_the_other_says_so(hub, adapter):
    push_lora(adapter[0], REPO)
    hub.before(COMMIT, lambda: hub.commit(REPO, {"notes.txt": b"first"}, message="Notes"))
    with pytest.raises(PushConflict, match=r"somebody else has pushed to 'main'.*'Notes'"):
        push_lora(adapter[1], REPO)
    assert hub.files(REPO)["notes.txt"] == b"first"
    push_lora(adapter[1], REPO)
    assert pull_lora(REPO).digest == adapter[1].digest


def test_two_threads_push_and_one_of_them_is_told(hub, adapter):
    push_lora(adapter[0], REPO)
    gate, failed = threading.Barrier(2), []
    hub.before(COMMIT, lambda: gate.wait(20), times=2)
    models = [adapter[1], attach_lora(tiny("llama"), rank=2)]

    def push(model):
        try:
            push_lora(model, REPO)
        except PushConflict as error:
            failed.append(error)

    threads = [threading.Thread(target=push, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(failed) == 1
    assert len(own_commits(hub)) == 2


def test_a_lost_answer_under_somebody_elses_commit_is_found(hub, adapter):
    push_lora(adapter[0], REPO)
    hub.fail("drop-answer", matching=COMMIT)
    hub.before("/commits/", lambda: hub.commit(REPO, {"notes.txt": b"later"}))
    commit = push_lora(adapter[1], REPO)
    assert [c.oid for c in own_commits(hub)][1] == commit.oid
    assert len(own_commits(hub)) == 3


def test_a_pull_request_whose_answer_was_lost_is_not_opened_twice(hub, adapter):
    push_lora(adapter[0], REPO)
    hub.fail("drop-answer", matching=COMMIT)
    assert push_lora(adapter[1], REPO, create_pr=True).pr_url.endswith("/discussions/1")
    with pytest.raises(InvalidOption, match=r"has no 'refs/pr/2'"):
        hub.files(REPO, revision="refs/pr/2")


# What is asked for


def test_a_pull_asks_little_and_a_pinned_one_in_the_cache_nothing(hub, adapter):
    commit = push_lora(adapter[0], REPO)
    hub.requests.clear()
    assert pull_lora(REPO).digest == adapter[0].digest
    assert len(hub.requests) <= 2 + 2 * 2  # config and weights
    hub.requests.clear()
    assert pull_lora(REPO, revision=commit.oid).digest == adapter[0].digest
    assert not hub.requests
    with hub.offline():
        assert pull_lora(REPO).digest == adapter[0].digest


def test_several_adapters_are_listed_and_one_is_asked_for(hub, adapter, tmp_path):
    files = {}
    for n, each in enumerate(adapter):
        for file in save_adapter(each, tmp_path / str(n)).iterdir():
            files[f"{n}/{file.name}"] = file.read_bytes()
    hub.add_repo("bob/two", files)
    with pytest.raises(AdapterNotFound, match="It has adapters in 0, 1"):
        pull_lora("bob/two")
    assert pull_lora("bob/two", file="1").digest == adapter[1].digest


def test_every_way_to_get_no_adapter_is_told_apart(hub, adapter):
    push_lora(adapter[0], REPO)
    layout = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"{}"}
    hub.add_repo("bob/gated", layout, gated=True)
    hub.add_repo("bob/empty", {"README.md": b"x"})
    rows = [
        ({"repo_id": "bob/none"}, "does not exist or is private"),
        ({"repo_id": "bob/empty"}, "holds no adapter"),
        ({"repo_id": REPO, "revision": "v9"}, "has no revision 'v9'"),
    ]
    for options, words in rows:
        with pytest.raises(AdapterNotFound, match=words):
            pull_lora(**options)
    with hub.offline(), pytest.raises(AdapterNotFound, match="not in the cache"):
        pull_lora("bob/empty")
    with pytest.raises(AdapterNotFound, match="is gated"):
        pull_lora("bob/gated")


def test_limits_hold_for_what_is_pulled(hub, adapter):
    push_lora(adapter[0], REPO)
    with pytest.raises(BadAdapterFile):
        pull_lora(REPO, limits=LoadLimits(tensors=2))


def test_a_stranger_may_not_push(hub, adapter):
    hub.add_repo("bob/style", {"a.txt": b"x"})
    with pytest.raises(HubError, match=r"bob/style"):
        push_lora(adapter[0], "bob/style")
    assert set(hub.files("bob/style")) - {".gitattributes"} == {"a.txt"}


def test_peft_configs_keep_their_type(hub):
    """A LoHa is pushed as peft writes it."""
    config = peft.LoHaConfig(r=2, alpha=3, target_modules=["q_proj"])
    model = randomise(attach_lora(tiny("llama"), config=config))
    push_lora(model, REPO)
    theirs = PeftModel.from_pretrained(tiny("llama"), REPO)
    assert torch.equal(logits(theirs), logits(model))
