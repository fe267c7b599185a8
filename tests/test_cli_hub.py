"""The commands on the Hub, against one on this machine."""

import json

import pytest

from hf_lora import attach_lora, open_adapter, pull_lora, save_adapter, save_lora
from hf_lora.cli import main
from hf_lora.testing import tiny, tiny_pipeline
from tests.support import randomise

REPO = "ann/style"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    model = randomise(attach_lora(tiny("llama"), rank=4))
    return save_lora(model, tmp_path_factory.mktemp("adapter"))


def test_push_then_pull_gives_the_adapter(hub, folder, tmp_path, capsys):
    assert main(["push", str(folder), REPO, "--license", "apache-2.0", "--tag", "v1"]) == 0
    said = capsys.readouterr().out
    assert "23.6 kB" in said or "kB, to ann/style" in said
    assert hub.commits(REPO)[0].oid in said
    assert "license: apache-2.0" in hub.files(REPO)["README.md"].decode()
    assert main(["pull", REPO, "--revision", "v1", "--out", str(tmp_path / "out"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    digest = open_adapter(folder).digest
    assert told["digest"] == digest
    assert open_adapter(tmp_path / "out").digest == digest


def test_a_file_of_another_program_is_pushed_as_plain_diffusers_reads_it(hub, tmp_path, capsys):
    pipe = tiny_pipeline("sd")
    randomise(attach_lora(pipe, rank=2).unet)
    adapter = open_adapter(save_lora(pipe, tmp_path / "own"))
    picture = tmp_path / "fox.png"
    picture.write_bytes(b"\x89PNG")
    words = ["push", str(tmp_path / "own"), REPO, "--image", f"{picture}=a red fox", "--json"]
    assert main([*words, "--private", "--message", "A style"]) == 0
    assert json.loads(capsys.readouterr().out)["commit"] == hub.commits(REPO)[0].oid
    assert hub.commits(REPO)[0].title == "A style"
    assert "images/fox.png" in hub.files(REPO)
    assert pull_lora(REPO).digest == adapter.digest


def test_ls_shows_the_cache_and_folders(hub, folder, tmp_path, capsys):
    assert main(["ls"]) == 0
    assert capsys.readouterr().out == "No adapters in the cache.\n"
    assert main(["push", str(folder), REPO]) == 0
    assert main(["pull", REPO]) == 0
    capsys.readouterr()
    assert main(["ls", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["repo_id"], row["digest"]) == (REPO, open_adapter(folder).digest)
    assert row["revision"] == [hub.commits(REPO)[0].oid, "main"]
    assert main(["ls", str(folder)]) == 0
    said = capsys.readouterr().out
    assert open_adapter(folder).digest in said
    assert "model lora" in said


def test_ls_names_what_cannot_be_read_and_passes_models_by(tmp_path, capsys):
    pipe = tiny_pipeline("sd")
    randomise(attach_lora(pipe, rank=2).unet)
    adapter = open_adapter(save_lora(pipe, tmp_path / "own"))
    save_adapter(adapter, tmp_path / "kohya.safetensors", layout="kohya", host=pipe)
    tiny("llama").save_pretrained(tmp_path / "base")
    broken = (
        save_lora(attach_lora(tiny("llama")), tmp_path / "broken") / "adapter_model.safetensors"
    )
    broken.write_bytes(broken.read_bytes()[:100])
    assert main(["ls", str(tmp_path), "--json"]) == 0
    rows = {row["path"].rpartition("/")[2]: row for row in json.loads(capsys.readouterr().out)}
    assert rows.keys() == {"own", "kohya.safetensors", "broken"}
    assert rows["own"]["digest"] == adapter.digest
    assert "no whole safetensors file" in rows["broken"]["problem"]
    assert "kohya" in rows["kohya.safetensors"]["problem"]


def test_card_prints_what_a_push_would_write(folder, capsys):
    assert main(["card", str(folder), "--repo", "ann/x", "--base-model", "meta/base"]) == 0
    card = capsys.readouterr().out
    assert card.startswith("---\n")
    assert "base_model: meta/base" in card
    assert "ann/x" in card


@pytest.mark.parametrize(
    "words",
    [
        ["push", "FOLDER", "style"],
        ["push", "FOLDER", REPO, "--license", "My Licence"],
        ["push", "FOLDER", REPO, "--image", "none.png=x"],
        ["push", "FOLDER", REPO, "--base-model", "/tmp/x"],
        ["push", "nowhere", REPO],
        ["pull", "ann/none"],
        ["ls", "nowhere"],
        ["card", "FOLDER", "--repo", "/x"],
    ],
)
def test_what_cannot_work_is_one_line_and_changes_nothing(hub, folder, words, capsys):
    assert main([str(folder) if word == "FOLDER" else word for word in words]) == 1
    said = capsys.readouterr()
    assert said.err.startswith("hf-lora: ")
    assert said.err.count("\n") == 1
    assert not hub._store.repos
