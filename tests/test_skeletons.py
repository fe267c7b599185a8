"""Hosts laid out from their configs: classes and shapes, no weights, no code of strangers."""

import json

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError

from hf_lora.architectures import ARCHITECTURES, architecture, names_of, names_of_host
from hf_lora.errors import AdapterNotFound, BadAdapterFile, InvalidOption, UnsupportedHost
from hf_lora.hosts import parts_of
from hf_lora.skeletons import laid_out
from hf_lora.testing import tiny, tiny_pipeline


@pytest.mark.parametrize("kind", ["sd", "sdxl", "flux", "wan"])
def test_a_pipelines_folder_gives_its_components_without_weights(kind, tmp_path):
    pipe = tiny_pipeline(kind)
    pipe.save_pretrained(tmp_path)
    for weights in tmp_path.glob("*/*.safetensors"):
        weights.unlink()
    laid = laid_out(str(tmp_path))
    assert type(laid).__name__ == type(pipe).__name__
    assert names_of_host(laid) == names_of_host(pipe)
    for part in parts_of(laid).values():
        assert all(parameter.is_meta for parameter in part.parameters())


def test_public_names_give_what_architectures_say():
    assert names_of_host(laid_out("sd1")) == architecture("sd1")
    assert type(laid_out("sd1")).__name__ == "sd1"
    assert not torch.empty(0).is_meta  # the default device is as it was


def test_folders_of_a_model_or_of_one_component(tmp_path):
    tiny("llama").save_pretrained(tmp_path / "lm")
    unet = tiny_pipeline("sd").unet
    unet.save_config(tmp_path / "unet")
    assert type(laid_out(str(tmp_path / "lm"))) is type(tiny("llama"))
    assert names_of(laid_out(str(tmp_path / "unet"))) == names_of(unet)
    assert type(laid_out(str(tmp_path / "lm" / "config.json"))) is type(tiny("llama"))


def edited(folder, file, **fields):
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    ("file", "fields", "error", "words"),
    [
        ("model_index.json", {"_class_name": "Evil"}, UnsupportedHost, "no pipeline of diffusers"),
        ("model_index.json", {"_class_name": ["pipeline", "Evil"]}, UnsupportedHost, "no pipeline"),
        ("model_index.json", {"_class_name": "load_image"}, UnsupportedHost, "no pipeline"),
        ("model_index.json", {"unet": ["unet", "Evil"]}, UnsupportedHost, "'Evil' is no model cla"),
        ("model_index.json", {"unet": ["diffusers", "DDIMScheduler"]}, UnsupportedHost, "no model"),
        ("unet/config.json", {"block_out_channels": "big"}, UnsupportedHost, "makes no UNet2D"),
        ("unet/config.json", {"block_out_channels": [-1, 5]}, UnsupportedHost, "makes no UNet2D"),
        ("text_encoder/config.json", {"hidden_size": "x"}, UnsupportedHost, "makes no CLIPText"),
    ],
)
def test_configs_that_lead_nowhere_are_named(file, fields, error, words, tmp_path):
    tiny_pipeline("sd").save_pretrained(tmp_path)
    edited(tmp_path, file, **fields)
    with pytest.raises(error, match=words):
        laid_out(str(tmp_path))


def test_components_that_a_pipeline_has_not_are_left_out(tmp_path):
    tiny_pipeline("sd").save_pretrained(tmp_path)
    edited(tmp_path, "model_index.json", text_encoder=[None, None])
    assert list(parts_of(laid_out(str(tmp_path)))) == ["unet"]
    edited(tmp_path, "model_index.json", unet=[None, None])
    with pytest.raises(UnsupportedHost, match="has no component that diffusers loads LoRAs into"):
        laid_out(str(tmp_path))


def test_broken_or_absent_files_are_named(tmp_path):
    tiny_pipeline("sd").save_pretrained(tmp_path)
    (tmp_path / "unet" / "config.json").unlink()
    with pytest.raises(AdapterNotFound, match="config.json"):
        laid_out(str(tmp_path))
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(BadAdapterFile, match=r"model_index.json: it is no valid JSON"):
        laid_out(str(tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(AdapterNotFound, match="no usable model config"):
        laid_out(str(tmp_path / "empty"))
    with pytest.raises(InvalidOption, match="no pipeline is known by the name 'sd7'.*sdxl"):
        laid_out("sd7")
    assert "sd1" in ARCHITECTURES


def test_of_a_repository_only_configs_are_fetched(tmp_path, monkeypatch):
    tiny_pipeline("sd").save_pretrained(tmp_path / "pipe")
    tiny("llama").config.save_pretrained(tmp_path / "lm")
    asked = []

    def one(name, file, *, revision):
        asked.append((name, file, revision))
        if name == "user/lm":
            raise EntryNotFoundError("none")
        if name == "user/gone":
            raise OSError("no such repository")
        return str(tmp_path / "pipe" / file)

    def whole(name, *, revision, allow_patterns):
        asked.append((name, *allow_patterns, revision))
        return str(tmp_path / "pipe")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", one)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", whole)
    assert type(laid_out("user/pipe", revision="a1")).__name__ == "StableDiffusionPipeline"
    assert asked == [
        ("user/pipe", "model_index.json", "a1"),
        ("user/pipe", "model_index.json", "*/config.json", "a1"),
    ]
    with pytest.raises(AdapterNotFound, match="'user/gone' cannot be read: no such repository"):
        laid_out("user/gone")
    monkeypatch.setattr("hf_lora.skeletons.laid_out_model", lambda name, revision: (name, revision))
    assert laid_out("user/lm") == ("user/lm", None)
