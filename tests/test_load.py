"""Load and save: what was applied is said, and nothing else is touched."""

import copy
import json
import os

import peft
import pytest
import torch
from safetensors.torch import load_file

from hf_lora import (
    attach_lora,
    detach_lora,
    load_lora,
    open_adapter,
    save_lora,
    set_adapters,
)
from hf_lora.errors import AdapterNotFound, InvalidOption
from hf_lora.testing import tiny
from tests.support import ALPHA, RANK, assert_same, logits, randomise, snapshot, tuner_layers


@pytest.fixture
def saved(tmp_path):
    model = randomise(attach_lora(tiny("llama"), rank=RANK, alpha=ALPHA))
    return save_lora(model, tmp_path / "style"), logits(model)


def test_the_report_says_what_was_applied(saved):
    folder, outputs = saved
    model = tiny("llama")
    report = load_lora(model, folder)
    assert torch.equal(logits(model), outputs)
    assert report.roles == {
        "mlp.down": 2, "mlp.gate": 2, "mlp.up": 2,
        "attn.k": 2, "attn.o": 2, "attn.q": 2, "attn.v": 2,
    }  # fmt: skip
    assert report.targets == 14
    assert report.parameters == 14_848  # 2 layers x 16 x (64+48+48+64+80+80+80)
    assert (report.name, report.host, report.dtype) == ("default", "LlamaForCausalLM", "float32")
    assert (report.scale, report.trainable, report.heads) == (1.0, False, ())
    text = str(report)
    assert "14 targets, 14,848 parameters, float32, scale 1, frozen" in text
    assert "base: matched: 16 weights are those of the training base" in text
    assert report.verified


def test_flags_and_modes_of_everything_else_stay(saved):
    folder, _ = saved
    model = tiny("llama").train()
    model.lm_head.requires_grad_(False)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    load_lora(model, folder)
    after = {
        n.replace(".base_layer", ""): p.requires_grad
        for n, p in model.named_parameters()
        if "lora_" not in n
    }
    assert after == flags
    assert all(m.training for n, m in model.named_modules() if "lora_" not in n)
    assert not any(p.requires_grad for n, p in model.named_parameters() if "lora_" in n)


EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]  # peft nests the layers of one module


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("llama", peft.LoraConfig(r=2)),
        ("llama", peft.LoraConfig(r=2, use_dora=True)),
        ("llama", peft.LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"])),
        ("llama", peft.LoHaConfig(r=2)),
        ("qwen3_moe", peft.LoraConfig(r=2, target_parameters=EXPERTS)),
    ],
    ids=["lora", "dora", "embedding", "loha", "experts"],
)
def test_flags_set_by_hand_come_back_when_a_third_adapter_goes(family, config, trainable, tmp_path):
    """Beside an active adapter and an inactive one, a few of whose factors were thawed by hand."""
    save_lora(randomise(attach_lora(tiny(family), config=copy.deepcopy(config))), tmp_path)
    model = tiny(family)
    for name in ("inactive", "active"):
        attach_lora(model, config=copy.deepcopy(config), name=name)
    by_hand = [n for n, _ in model.named_parameters() if ".inactive" in n][1::3]
    for name in (*by_hand, "model.norm.weight"):
        model.get_parameter(name).requires_grad_(True)
    before = snapshot(model)
    load_lora(model, tmp_path, name="third", trainable=trainable)
    for name, parameter in model.named_parameters():
        adapter = next((a for a in ("inactive", "active", "third") if f".{a}" in name), None)
        # peft, too, leaves the base as it finds it beside other adapters
        expected = adapter == "third" and trainable if adapter else name == "model.norm.weight"
        assert parameter.requires_grad == expected
    detach_lora(model, "third")
    assert_same(before, snapshot(model))


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("loaded", [False, True])
def test_the_base_is_frozen_beside_adapters_that_were_only_loaded(saved, dora, loaded, tmp_path):
    """A plain load leaves the flags of the base, so it is the training that must freeze it."""
    config = peft.LoraConfig(r=2, use_dora=dora)
    model = tiny("llama")
    load_lora(model, saved[0], name="first")
    before = snapshot(model)
    assert before["requires_grad"]["model.norm.weight"]
    if loaded:
        save_lora(attach_lora(tiny("llama"), config=config), tmp_path / "second")
        load_lora(model, tmp_path / "second", name="second", trainable=True)
    else:
        attach_lora(model, config=config, name="second")
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (".second" in name), name
    detach_lora(model, "second")
    assert_same(before, snapshot(model))


def test_trainable_goes_on_training_with_a_frozen_base(saved):
    folder, _ = saved
    model = tiny("llama")
    assert load_lora(model, folder, trainable=True).trainable
    assert all(p.requires_grad == ("lora_" in n) for n, p in model.named_parameters())


def test_detach_after_load_restores_everything(saved):
    folder, _ = saved
    model = tiny("llama").train()
    before = snapshot(model)
    load_lora(model, folder)
    detach_lora(model)
    after = snapshot(model)
    assert all(torch.equal(before["tensors"][k], after["tensors"][k]) for k in before["tensors"])
    assert all(before[k] == after[k] for k in before.keys() - {"tensors"})


def test_scale_multiplies_the_adapters_own_scaling(saved):
    folder, _ = saved
    model = tiny("llama")
    assert load_lora(model, folder, scale=0.5).scale == 0.5
    scalings = {x.scaling["default"] for x in tuner_layers(model).values()}
    assert scalings == {0.5 * ALPHA / RANK}


def test_a_dora_is_loaded_at_any_strength(tmp_path):
    model = randomise(attach_lora(tiny("llama"), config=peft.LoraConfig(use_dora=True)))
    save_lora(model, tmp_path)
    fresh, half = tiny("llama"), tiny("llama")
    bare = logits(fresh)
    load_lora(fresh, tmp_path, scale=0.0)
    assert torch.equal(logits(fresh), bare)
    load_lora(half, tmp_path, scale=0.5)
    assert torch.equal(logits(half), logits(set_adapters(model, "default", 0.5)))
    assert not torch.equal(logits(half), bare)


def test_several_adapters_live_side_by_side(saved, tmp_path):
    folder, outputs = saved
    other = randomise(attach_lora(tiny("llama"), targets="mlp"), seed=9)
    save_lora(other, tmp_path / "other")
    model = tiny("llama")
    load_lora(model, folder, name="style")
    load_lora(model, tmp_path / "other", name="other")
    assert model.active_adapters() == ["other"]
    assert torch.equal(logits(model), logits(other))
    detach_lora(model, "other")
    assert torch.equal(logits(model), outputs)


def test_a_peft_model_is_loaded_into_like_any_host(saved):
    folder, outputs = saved
    theirs = peft.get_peft_model(tiny("llama"), peft.LoraConfig(target_modules=["q_proj"]))
    load_lora(theirs, folder, name="style")
    assert theirs.active_adapters == ["style"]
    assert torch.equal(logits(theirs), outputs)
    theirs.set_adapter("default")
    assert torch.equal(logits(theirs), logits(tiny("llama")))


def test_one_of_several_adapters_is_saved_alone(tmp_path):
    model = attach_lora(tiny("llama"), name="one", targets="mlp")
    randomise(attach_lora(model, name="two", targets="attn.q"))
    save_lora(model, tmp_path / "two", name="two")
    keys = load_file(tmp_path / "two" / "adapter_model.safetensors")
    assert len(keys) == 4
    assert not any("two" in k or "mlp" in k for k in keys)


def test_a_loaded_record_is_loaded_without_a_file(saved):
    folder, outputs = saved
    model = tiny("llama")
    report = load_lora(model, open_adapter(folder), name="again")
    assert report.source == str(folder)
    assert torch.equal(logits(model), outputs)


def test_an_adapter_in_a_subfolder_is_named_by_file(tmp_path):
    view = peft.get_peft_model(tiny("llama"), peft.LoraConfig(target_modules=["q_proj"]), "style")
    view.save_pretrained(str(tmp_path))  # peft writes tmp_path/style/
    with pytest.raises(AdapterNotFound, match=r"no adapter_config\.json"):
        load_lora(tiny("llama"), tmp_path)
    assert load_lora(tiny("llama"), tmp_path, file="style").targets == 2


def test_the_base_it_was_made_for_is_compared_by_name(tmp_path):
    tiny("llama").save_pretrained(tmp_path / "a")
    tiny("llama").save_pretrained(tmp_path / "b")
    kind = type(tiny("llama"))
    save_lora(attach_lora(kind.from_pretrained(tmp_path / "a")), tmp_path / "adapter")
    report = load_lora(kind.from_pretrained(tmp_path / "b"), tmp_path / "adapter")
    assert any("the file names the base" in note for note in report.notes)
    assert not load_lora(kind.from_pretrained(tmp_path / "a"), tmp_path / "adapter").notes


def test_rank_above_the_layers_is_legal_and_said(tmp_path):
    config = peft.LoraConfig(r=40, lora_alpha=11, target_modules=["k_proj"])
    save_lora(attach_lora(tiny("llama"), config=config), tmp_path)
    report = load_lora(tiny("llama"), tmp_path)
    assert report.notes == ("rank is above min(in, out) at 2 targets",)


def test_half_precision_hosts_get_the_files_values_exactly(saved):
    folder, _ = saved
    model = tiny("llama").to(torch.bfloat16)
    assert load_lora(model, folder).dtype == "float32"
    layer = tuner_layers(model)["model.layers.0.mlp.up_proj"]
    key = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
    assert torch.equal(
        layer.lora_A["default"].weight, load_file(folder / "adapter_model.safetensors")[key]
    )


def test_the_saved_config_names_base_class_and_short_targets(tmp_path):
    tiny("bert").save_pretrained(tmp_path / "base")
    model = type(tiny("bert")).from_pretrained(tmp_path / "base")
    save_lora(attach_lora(model), tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "base")
    assert config["task_type"] is None  # peft has no masked-LM type
    assert config["auto_mapping"]["base_model_class"] == "BertForMaskedLM"
    assert config["target_modules"] == [
        "intermediate.dense", "key", "output.dense", "query", "value",
    ]  # fmt: skip
    assert config["inference_mode"] is True


def test_two_saves_of_one_adapter_are_the_same_bytes(tmp_path):
    model = randomise(attach_lora(tiny("llama")))
    for name in ("one", "two"):
        save_lora(model, tmp_path / name)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_saving_obeys_the_umask_and_leaves_no_other_file(tmp_path):
    save_lora(attach_lora(tiny("llama")), tmp_path / "out")
    files = {p.name: p for p in (tmp_path / "out").iterdir()}
    assert set(files) == {"adapter_config.json", "adapter_model.safetensors"}
    umask = os.umask(0)
    os.umask(umask)
    assert {p.stat().st_mode & 0o777 for p in files.values()} == {0o666 & ~umask}


def test_a_save_that_breaks_leaves_the_old_files(tmp_path, monkeypatch):
    model = randomise(attach_lora(tiny("llama")))
    save_lora(model, tmp_path)
    old = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    randomise(model, seed=6)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        save_lora(model, tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == old


def test_saving_into_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InvalidOption, match="is a file"):
        save_lora(attach_lora(tiny("llama")), tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_saving_what_is_not_attached_names_what_is():
    with pytest.raises(AdapterNotFound, match="It has 'style'"):
        save_lora(attach_lora(tiny("llama"), name="style"), "out", name="stile")


def test_experts_attached_by_parameter_are_saved_and_read_by_peft(tmp_path):
    config = peft.LoraConfig(
        r=4, lora_alpha=11, target_parameters=["experts.gate_up_proj", "experts.down_proj"]
    )
    model = randomise(attach_lora(tiny("qwen3_moe"), config=config))
    save_lora(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny("qwen3_moe"), str(tmp_path))
    assert torch.equal(logits(theirs.eval()), logits(model))
    fresh = tiny("qwen3_moe")
    load_lora(fresh, tmp_path)
    assert torch.equal(logits(fresh), logits(model))


def test_a_file_without_a_head_says_that_the_hosts_own_is_used(tmp_path):
    save_lora(attach_lora(tiny("bert", task="classifier"), train_also=()), tmp_path)
    report = load_lora(tiny("bert", task="classifier"), tmp_path)
    assert report.notes == ("the file brings no classifier: the host's own is used",)
