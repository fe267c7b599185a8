"""What a file says about its adapter: it survives, it is checked, and it is the truth."""

import dataclasses
import json

import pytest
import torch
from safetensors import safe_open

from hf_lora import (
    AdapterMismatch,
    BadAdapterFile,
    InvalidOption,
    LoadLimits,
    attach_lora,
    load_lora,
    merge_lora,
    open_adapter,
    save_adapter,
    save_lora,
)
from hf_lora.adapter import MODEL, Adapter, Component
from hf_lora.formats import read_header
from hf_lora.manifest import Base, Manifest, decode, encode
from hf_lora.paths import canonical, canonical_names
from hf_lora.testing import tiny
from tests.support import ALPHA, RANK, as_foreign, logits, randomise

CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 11, "target_modules": ["q"]}
DIGEST = f"v1:sha256:{'0' * 64}"


def factors(rank=4, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(rank, 8, generator=generator), torch.randn(6, rank, generator=generator)
    return {"lora_A": a.to(dtype), "lora_B": b.to(dtype)}


def adapter(config=CONFIG, path="layers.0.q", **options):
    return Adapter({MODEL: Component(config, {path: factors(**options)})})


@pytest.fixture
def saved(tmp_path):
    model = randomise(attach_lora(tiny("llama"), rank=RANK, alpha=ALPHA))
    return save_lora(model, tmp_path / "style")


# ---------------------------------------------------------------- digest


@pytest.mark.parametrize(
    "same",
    [
        adapter({**CONFIG, "base_model_name_or_path": "elsewhere", "lora_dropout": 0.3}),
        adapter({**CONFIG, "lora_alpha": 99, "alpha_pattern": {"q": 11}}),
        adapter({**CONFIG, "lora_alpha": 11 / 2, "use_rslora": True}),  # 5.5/sqrt(4) = 11/4
        adapter(path="model.layers.0.q"),
        adapter(path="language_model.model.layers.0.q"),
    ],
    ids=["comments", "pattern", "rslora", "wrapped", "older"],
)
def test_the_digest_is_equal_for_equal_mathematics(same):
    assert same.digest == adapter().digest


def test_the_digest_of_a_wider_spelling_is_equal():
    narrow = adapter(dtype=torch.bfloat16)
    part = narrow.components[MODEL]
    wide = {p: {n: t.float() for n, t in f.items()} for p, f in part.targets.items()}
    assert Adapter({MODEL: Component(CONFIG, wide)}).digest == narrow.digest


@pytest.mark.parametrize(
    "other",
    [
        adapter(seed=1),
        adapter({**CONFIG, "lora_alpha": 12}),
        adapter({**CONFIG, "use_rslora": True}),
        adapter(path="layers.1.q"),
        Adapter({"unet": adapter().components[MODEL]}),
        Adapter({MODEL: Component(CONFIG, {"layers.0.q": factors()}, {"h": {"w": torch.ones(2)}})}),
    ],
    ids=["values", "alpha", "rslora", "path", "component", "head"],
)
def test_the_digest_is_another_for_other_mathematics(other):
    assert other.digest != adapter().digest


def test_canonical_paths_drop_wrappers_and_never_collide():
    assert canonical("model.language_model.layers.0.q") == "layers.0.q"
    assert canonical("model.vision_tower.vision_model.encoder.q") == "vision_tower.encoder.q"
    assert canonical("model") == "model"
    both = ["text_model.encoder.q", "encoder.q", "vision_model.encoder.q"]
    assert canonical_names(both) == dict(zip(both, both, strict=True))


# ---------------------------------------------------------------- the manifest


FULL = Manifest(
    digest=DIGEST,
    configs={MODEL: CONFIG},
    base=Base("user/base", "abc"),
    host="LlamaForCausalLM",
    family="mamba",
    fused={"layers.0.qkv": ["q", "v"]},
    training={"steps": 10, "loss": 0.5},
    trigger_words=("sks", "日本"),
    derived_from=(DIGEST,),
    optional=("card",),
)


def test_a_manifest_reads_as_it_was_written():
    assert decode(json.loads(encode(FULL))) == FULL


def test_of_patterns_the_first_that_matches_counts_after_a_save_as_well(tmp_path):
    config = {**CONFIG, "alpha_pattern": {"q": 2, "0.q": 16}}
    told = adapter(config)
    again = open_adapter(save_adapter(told, tmp_path))
    assert again.digest == told.digest
    assert again.components[MODEL].alpha("layers.0.q") == 2
    plain = json.loads((tmp_path / "adapter_config.json").read_text())
    assert list(plain["alpha_pattern"]) == ["q", "0.q"]


def test_the_digest_of_other_methods_takes_no_notice_of_spelling():
    factors = {"layers.0.q": {"ia3_l": torch.ones(4)}}
    configs = [
        {"peft_type": "IA3", "feedforward_modules": ["b", "a"], "x": 16.0},
        {"peft_type": "IA3", "feedforward_modules": ["a", "b"], "x": 16},
    ]
    one, two = (Adapter({MODEL: Component(config, factors)}).digest for config in configs)
    assert one == two


def test_facts_and_foreign_metadata_survive_a_load_and_a_save(saved, tmp_path):
    facts = dataclasses.replace(
        open_adapter(saved).manifest,
        trigger_words=("sks",),
        training={"steps": 5},
        foreign={"ss_tag_frequency": '{"a": 1}', "modelspec.title": "Title"},
    )
    told = dataclasses.replace(open_adapter(saved), manifest=facts)
    model = tiny("llama")
    load_lora(model, save_adapter(told, tmp_path / "told"), name="style")
    again = open_adapter(save_lora(model, tmp_path / "again", name="style"))
    assert again.digest == told.digest
    assert again.manifest.trigger_words == ("sks",)
    assert again.manifest.training == {"steps": 5}
    assert again.manifest.derived_from == ()
    with safe_open(tmp_path / "again" / "adapter_model.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["ss_tag_frequency"] == '{"a": 1}'
    assert metadata["modelspec.title"] == "Title"
    assert metadata["format"] == "pt"


def test_an_adapter_that_was_trained_on_names_its_parent(saved, tmp_path):
    model = tiny("llama")
    load_lora(model, saved, trainable=True)
    randomise(model, seed=99)
    child = open_adapter(save_lora(model, tmp_path / "child"))
    parent = open_adapter(saved)
    assert child.digest != parent.digest
    assert child.manifest.derived_from == (parent.digest,)


def test_the_header_alone_tells_all_but_the_values(saved):
    whole, header = open_adapter(saved), read_header(saved)
    assert header.info == whole.info
    assert header.digest == whole.digest
    assert all(t.is_meta for _, t in header.components[MODEL].tensors())
    with pytest.raises(BadAdapterFile, match="has no values to save"):
        save_adapter(header, saved)
    assert open_adapter(saved).digest == whole.digest


def test_equal_adapters_are_equal_files(tmp_path):
    told = dataclasses.replace(adapter(), manifest=Manifest(foreign={"b": "1", "a": "2", "c": "3"}))
    one, two = (save_adapter(told, tmp_path / name) for name in "ab")
    name = "adapter_model.safetensors"
    assert (one / name).read_bytes() == (two / name).read_bytes()


# ---------------------------------------------------------------- the header is the truth


def edit(folder, **fields):
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"lora_alpha": 99}, "lora_alpha is 99 in adapter_config.json, but 11 in the header"),
        ({"lora_alpha": ...}, "lora_alpha is null in adapter_config.json, but 11"),
        ({"r": 8}, "r is 8 in adapter_config.json, but 16"),
        ({"use_rslora": True}, "use_rslora is true in adapter_config.json, but false"),
        ({"target_modules": ["q_proj"]}, "target_modules is"),
        ({"alpha_pattern": {"(a+)+$": 1}}, "alpha_pattern is"),
    ],
)
def test_a_config_that_disagrees_is_repaired_from_the_header(saved, fields, words):
    good = tiny("llama")
    load_lora(good, saved)
    edit(saved, **fields)
    model = tiny("llama")
    report = load_lora(model, saved)
    assert len(report.repairs) == 1
    assert report.repairs[0].startswith(words)
    assert f"repaired: {words}" in str(report)
    assert torch.equal(logits(model), logits(good))


def test_comments_in_the_config_are_the_users_business(saved):
    edit(saved, base_model_name_or_path="mine", task_type=None, revision="main")
    assert load_lora(tiny("llama"), saved).repairs == ()


def test_a_missing_or_broken_config_is_repaired_from_the_header(saved):
    path = saved / "adapter_config.json"
    path.write_text("{")
    assert "is broken" in load_lora(tiny("llama"), saved).repairs[0]
    path.unlink()
    assert "is missing" in load_lora(tiny("llama"), saved).repairs[0]
    alone = (saved / "adapter_model.safetensors").rename(saved / "style.safetensors")
    assert load_lora(tiny("llama"), alone).verified


# ---------------------------------------------------------------- the base


def test_another_base_is_an_error_unless_asked(saved):
    model = tiny("llama", seed=1)
    with pytest.raises(AdapterMismatch, match=r"made on another base: 16 of 16 weights differ"):
        load_lora(model, saved)
    assert not hasattr(model, "peft_config")
    report = load_lora(model, saved, strict=False)
    assert not report.verified
    assert report.base.startswith("mismatched")


def test_a_base_changed_by_one_step_of_training_is_found(saved):
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.add_(1e-6)
    with pytest.raises(AdapterMismatch, match="another base: 1 of 16 weights"):
        load_lora(model, saved)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_same_base_in_another_dtype_is_verified(saved, dtype):
    assert load_lora(tiny("llama").to(dtype), saved).verified


def test_a_base_with_other_adapters_is_still_the_base(saved):
    model = randomise(attach_lora(tiny("llama"), name="other"))
    assert load_lora(model, saved).verified


def test_the_base_of_an_adapter_saved_while_merged_is_the_unmerged_one(tmp_path):
    model = randomise(attach_lora(tiny("llama"), rank=RANK, alpha=ALPHA))
    merge_lora(model)
    assert load_lora(tiny("llama"), save_lora(model, tmp_path)).verified
    lost = randomise(attach_lora(tiny("llama"), rank=RANK, alpha=ALPHA))
    merge_lora(lost, keep=None)
    report = load_lora(tiny("llama"), save_lora(lost, tmp_path / "lost"))
    assert "carries no fingerprint" in report.base


def test_a_head_is_no_part_of_the_base(tmp_path):
    model = randomise(attach_lora(tiny("bert", task="classifier")))
    save_lora(model, tmp_path)
    fresh = tiny("bert", task="classifier")
    torch.nn.init.normal_(fresh.classifier.weight)  # as from_pretrained does, each time anew
    report = load_lora(fresh, tmp_path)
    assert report.verified
    assert torch.equal(logits(fresh), logits(model))


# ---------------------------------------------------------------- spellings and limits


def test_paths_of_an_older_transformers_find_their_layers(saved):
    good = tiny("llama")
    load_lora(good, saved)
    part = open_adapter(saved).components[MODEL]
    config = {
        **part.config,
        "target_modules": [f"language_model.{path}" for path in part.targets],
        "alpha_pattern": {f"language_model.{path}": ALPHA for path in part.targets},
        "lora_alpha": 1,
    }
    older = Adapter(
        {MODEL: Component(config, {f"language_model.{p}": f for p, f in part.targets.items()})}
    )
    assert older.digest == open_adapter(saved).digest
    model = tiny("llama")
    report = load_lora(model, older)
    assert report.notes[0].startswith("14 modules were spelt as in other versions")
    assert torch.equal(logits(model), logits(good))


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        (LoadLimits(header=100), "header has .* over the limit of 100"),
        (LoadLimits(tensors=10), "more than 10 tensors"),
        (LoadLimits(config=10), "over 10 bytes"),
        (LoadLimits(depth=1), "nested deeper than 1"),
        (LoadLimits(scaling=0.1), r"scaling at .* is 0\.6875"),
    ],
)
def test_limits_hold_and_can_be_moved(saved, limits, words):
    as_foreign(saved)  # its config is read, not the header's
    with pytest.raises(BadAdapterFile, match=words):
        load_lora(tiny("llama"), saved, limits=limits)
    with pytest.raises(BadAdapterFile, match=words):
        open_adapter(saved, limits=limits)
    load_lora(tiny("llama"), saved, limits=LoadLimits())


@pytest.mark.parametrize("bad", [{"header": 0}, {"depth": 1.5}, {"scaling": float("inf")}])
def test_limits_that_are_none(bad):
    with pytest.raises(InvalidOption, match=f"limits.{next(iter(bad))}="):
        LoadLimits(**bad)


def test_limits_of_another_type(saved):
    with pytest.raises(InvalidOption, match="limits is a dict"):
        load_lora(tiny("llama"), saved, limits={"header": 1})
