"""Bad input: each a LoraError of the named kind, in words that help, the host bit-equal."""

import json
import os
import re
import shutil

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from hf_lora import attach_lora, load_lora, open_adapter, plan_lora, save_lora
from hf_lora.adapter import Adapter, Component
from hf_lora.errors import (
    AdapterExists,
    AdapterMismatch,
    AdapterNotFound,
    BadAdapterFile,
    InvalidOption,
    LoraError,
    TargetNotFound,
    UnsupportedHost,
    UnsupportedTarget,
)
from hf_lora.testing import tiny
from tests.support import ALPHA, RANK, as_foreign, assert_same, logits, randomise, snapshot

ATTACH = [
    # what is asked, the error, words it must say
    (
        {"targets": "query"},
        TargetNotFound,
        r"no layer matches 'query' in LlamaForCausalLM\. Closest: .*\(2 modules\).*"
        r"Roles present: attn\.q attn\.k attn\.v attn\.o mlp\.gate mlp\.up mlp\.down.*default",
    ),
    ({"targets": ["q_proj", "v_prj"]}, TargetNotFound, r"'v_prj'.*Closest: self_attn\.v_proj"),
    ({"targets": "q"}, TargetNotFound, "no layer matches 'q'"),  # never a substring
    ({"targets": "self_attn"}, TargetNotFound, "is no layer but holds some"),
    ({"targets": "cross-attention"}, TargetNotFound, "preset 'cross-attention' has no target"),
    ({"targets": "attn.qkv"}, TargetNotFound, "Roles present"),
    ({"targets": []}, InvalidOption, "no name and no list of names"),
    ({"targets": [3]}, InvalidOption, "no name and no list of names"),
    ({"targets": ".*q_proj"}, TargetNotFound, "no layer matches"),
    ({"rank": 0}, InvalidOption, "rank=0 is not a positive whole number"),
    ({"rank": -4}, InvalidOption, "rank=-4"),
    ({"rank": 4.5}, InvalidOption, "rank=4.5"),
    ({"rank": "8"}, InvalidOption, "rank='8'"),
    ({"rank": True}, InvalidOption, "rank=True"),
    ({"alpha": float("nan")}, InvalidOption, "alpha=nan is not a finite number"),
    ({"alpha": float("inf")}, InvalidOption, "alpha=inf"),
    ({"alpha": "16"}, InvalidOption, "alpha='16'"),
    ({"alpha": -8}, InvalidOption, "not positive"),
    ({"dropout": 1.5}, InvalidOption, r"dropout=1\.5 is not in \[0, 1\)"),
    ({"dropout": "0.1"}, InvalidOption, "dropout"),
    ({"components": ["unet"]}, InvalidOption, "single component 'model'"),
    ({"name": ""}, InvalidOption, "1 to 64"),
    ({"name": "a.b"}, InvalidOption, "1 to 64"),
    ({"name": "../x"}, InvalidOption, "1 to 64"),
    ({"name": "self_attn"}, InvalidOption, "part of module names"),
    ({"name": "keys"}, InvalidOption, "part of module names"),
    ({"train_also": ["score"]}, TargetNotFound, "no module of LlamaForCausalLM. Closest"),
    ({"train_also": "lm_head"}, InvalidOption, "no list of module names"),
    ({"train_also": 3}, InvalidOption, "no list of module names"),
    ({"targets": 3}, InvalidOption, "no name and no list of names"),
    ({"components": 3}, InvalidOption, "single component"),
    ({"train_also": ["head"]}, TargetNotFound, "no module of LlamaForCausalLM"),
    ({"config": {"r": 4}}, InvalidOption, "config is a dict"),
    ({"config": peft.LoraConfig(), "rank": 4}, InvalidOption, "together with rank"),
    ({"config": peft.LoraConfig(), "alpha": 4}, InvalidOption, "together with rank"),
    (
        {"config": peft.LoraConfig(target_modules=["q_proj"]), "targets": "mlp"},
        InvalidOption,
        "together with a config that has target_modules",
    ),
    (
        {"config": peft.LoraConfig(target_modules=["q_proj", "FAKE"])},
        TargetNotFound,
        "'FAKE'",
    ),
    ({"config": peft.LoraConfig(target_modules="nothing")}, TargetNotFound, "matches no layer"),
    (
        {"config": peft.LoraConfig(modules_to_save=["lm_head"]), "train_also": ["lm_head"]},
        InvalidOption,
        "modules_to_save",
    ),
    (
        {"config": peft.LoraConfig(exclude_modules=r".*"), "targets": "mlp"},
        TargetNotFound,
        "excluded",
    ),
    ({"config": peft.LoraConfig(init_lora_weights="pissa")}, InvalidOption, "changes the base"),
    ({"config": peft.LoraConfig(init_lora_weights="pissa_niter_4")}, InvalidOption, "pissa_niter"),
    ({"config": peft.LoraConfig(init_lora_weights="olora")}, InvalidOption, "changes the base"),
    ({"config": peft.LoraConfig(layer_replication=[(0, 2), (0, 2)])}, InvalidOption, "changes"),
    ({"config": peft.LoraConfig(bias="all")}, InvalidOption, "base's own biases"),
    (
        {"config": peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")},
        InvalidOption,
        "cannot be attached in place",
    ),
    ({"config": peft.VeraConfig()}, InvalidOption, "cannot be attached in place"),
    ({"config": peft.LoraConfig(lora_alpha=float("nan"))}, InvalidOption, "alpha=nan"),
    ({"config": peft.LoraConfig(lora_alpha=0)}, InvalidOption, "not positive"),
    ({"config": peft.LoraConfig(lora_dropout=float("nan"))}, InvalidOption, "dropout=nan"),
    ({"config": peft.LoraConfig(modules_to_save="lm_head")}, InvalidOption, "is a string"),
    ({"config": peft.LoraConfig(target_modules="*q")}, InvalidOption, "no regular expression"),
    ({"config": peft.LoraConfig(rank_pattern={"*q": 4})}, InvalidOption, "no regular expression"),
    (
        {"config": peft.LoraConfig(target_parameters=["nothing"])},
        TargetNotFound,
        "no parameter of LlamaForCausalLM matches 'nothing'. Closest",
    ),
    (
        {"config": peft.LoraConfig(target_modules=["q_proj"], target_parameters=["foo"])},
        TargetNotFound,
        "matches 'foo'",
    ),
    (
        {"config": peft.LoraConfig(target_parameters=["norm.weight"])},
        UnsupportedTarget,
        "two dimensions or three",
    ),
    ({"train_also": [3]}, InvalidOption, "holds more than names"),
    (
        {"config": peft.LoraConfig(alora_invocation_tokens=[5], task_type="CAUSAL_LM")},
        InvalidOption,
        "silently do nothing",
    ),
    ({"config": peft.LoraConfig(ensure_weight_tying=True)}, InvalidOption, "read back"),
    ({"name": "weight"}, InvalidOption, "part of module names"),
    ({"rank": 1, "alpha": 5000}, InvalidOption, "alpha/rank"),
]


@pytest.mark.parametrize(("options", "error", "words"), ATTACH, ids=lambda v: str(v)[:40])
def test_attach_refuses(options, error, words):
    model = tiny("llama")
    before = snapshot(model)
    with pytest.raises(error, match=words) as caught:
        attach_lora(model, **options)
    assert type(caught.value) is error
    assert_same(before, snapshot(model))


@pytest.mark.parametrize(("options", "error", "words"), ATTACH[:15], ids=lambda v: str(v)[:40])
def test_the_plan_refuses_the_same(options, error, words):
    with pytest.raises(error, match=words):
        plan_lora(tiny("llama", meta=True), **options)


@pytest.mark.parametrize(
    ("host", "words"),
    [
        ("gpt2", "not the name 'gpt2'.*from_pretrained"),
        (None, "NoneType is no torch.nn.Module"),
        ({"weights": 1}, "dict is no torch.nn.Module"),
        (nn.Sequential(nn.ReLU(), nn.LayerNorm(4)), "has no linear layer"),
        (nn.Linear(4, 4), "is itself one layer"),
    ],
)
def test_hosts_that_are_none_are_named(host, words):
    with pytest.raises(UnsupportedHost, match=words):
        attach_lora(host)


def test_a_pipeline_is_pointed_to_its_components():
    class Pipe:
        components = {"scheduler": object(), "unet": nn.Linear(2, 2)}  # noqa: RUF012

    with pytest.raises(UnsupportedHost, match=r"Give a component, pipe\.unet"):
        attach_lora(Pipe())


def test_linears_outside_of_blocks_must_be_named():
    model = nn.ModuleDict({"first": nn.Linear(4, 4), "second": nn.Linear(4, 4)})
    with pytest.raises(TargetNotFound, match="preset 'default' has no target"):
        attach_lora(model)
    attach_lora(model, targets=["first"])


def test_attaching_twice_under_one_name():
    model = attach_lora(tiny("llama"))
    before = snapshot(model)
    with pytest.raises(AdapterExists, match="already has an adapter 'default'.*another name"):
        attach_lora(model)
    assert_same(before, snapshot(model))


def test_a_layer_peft_forbids_is_refused_with_its_reason():
    model = tiny("mamba2")
    before = snapshot(model)
    with pytest.raises(UnsupportedTarget, match="incompatible with Mamba"):
        attach_lora(model, targets=["in_proj", "out_proj"])
    assert_same(before, snapshot(model))


def test_a_head_that_peft_would_match_too_widely_is_refused():
    model = nn.ModuleDict(
        {
            "head": nn.Linear(4, 4),
            "ahead": nn.Linear(4, 4),
            "layers": nn.Sequential(nn.Linear(4, 4)),
        }
    )
    with pytest.raises(InvalidOption, match="would also train ahead"):
        attach_lora(model, train_also=["head"])


# ---------------------------------------------------------------- files


@pytest.fixture
def saved(tmp_path):
    """A good adapter of the tiny Llama as other programs write it: without a manifest."""
    model = randomise(attach_lora(tiny("llama"), rank=RANK, alpha=ALPHA))
    return as_foreign(save_lora(model, tmp_path / "good"))


def _edit(folder, **fields):
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


def _tensors(folder, change):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    changed = change(tensors)
    save_file(tensors if changed is None else changed, path)


def _write(folder, name, data):
    (folder / name).write_bytes(data)


TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KEY = "base_model.model.model.layers.1.mlp.up_proj"


def _drop(part):
    return lambda f: _tensors(f, lambda t: {k: v for k, v in t.items() if part not in k})


def _add(key, tensor=None):
    value = torch.zeros(4, 4) if tensor is None else tensor
    return lambda f: _tensors(f, lambda t: t.update({key: value}))


def _set(key, make):
    return lambda f: _tensors(f, lambda t: t.update({key: make(t[key])}))


FILES = [
    # how the file is broken, the error, words it must say
    (lambda f: _write(f, "adapter_config.json", b""), BadAdapterFile, "no valid JSON"),
    (lambda f: _write(f, "adapter_config.json", b"\xff\xfe{"), BadAdapterFile, "no valid JSON"),
    (lambda f: _write(f, "adapter_config.json", b"[1]"), BadAdapterFile, "no JSON object"),
    (
        lambda f: _write(f, "adapter_config.json", b"[" * 100000),
        BadAdapterFile,
        "nested deeper than 32",
    ),
    (
        lambda f: _write(f, "adapter_config.json", b" " * (2 << 20)),
        BadAdapterFile,
        "over 1,048,576",
    ),
    (lambda f: (f / "adapter_config.json").unlink(), AdapterNotFound, "no adapter_config.json"),
    (
        lambda f: (f / "adapter_model.safetensors").unlink(),
        AdapterNotFound,
        "with adapter_model.saf",
    ),
    (
        lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"),
        AdapterNotFound,
        "pickle",
    ),
    (
        lambda f: os.truncate(f / "adapter_model.safetensors", 5000),
        BadAdapterFile,
        "no whole safetensors file",
    ),
    (lambda f: _write(f, "adapter_model.safetensors", b""), BadAdapterFile, "no whole safetensors"),
    (lambda f: _write(f, "adapter_model.safetensors", b"\x80" * 64), BadAdapterFile, "no whole"),
    (lambda f: _edit(f, peft_type="SUPERLORA"), BadAdapterFile, "peft_type is 'SUPERLORA'"),
    (lambda f: _edit(f, peft_type=...), BadAdapterFile, "peft_type is None"),
    (lambda f: _edit(f, peft_type="IA3"), BadAdapterFile, "neither IA3 factors"),
    (lambda f: _edit(f, r="4"), BadAdapterFile, "r is '4', not a positive whole number"),
    (lambda f: _edit(f, r=10**9), AdapterMismatch, "rank 16 in file, 1000000000 in config"),
    (lambda f: _edit(f, r=8), AdapterMismatch, "rank 16 in file, 8 in config"),
    (lambda f: _edit(f, lora_alpha=None), BadAdapterFile, "lora_alpha is None"),
    (lambda f: _edit(f, lora_alpha=float("nan")), BadAdapterFile, "NaN is no JSON number"),
    (lambda f: _edit(f, rank_pattern={"up_proj": 4}), AdapterMismatch, "rank 16 in file, 4"),
    (lambda f: _edit(f, rank_pattern={"(a+)+$": 4}), BadAdapterFile, "regular expression"),
    (lambda f: _edit(f, alpha_pattern={"(a+)+$": 4}), BadAdapterFile, "regular expression"),
    (lambda f: _edit(f, alpha_pattern=[1]), BadAdapterFile, "alpha_pattern is list"),
    (lambda f: _edit(f, target_modules=["(a+)+$"]), BadAdapterFile, "no plain module name"),
    (lambda f: _edit(f, modules_to_save=["(a+)+$"]), BadAdapterFile, "no plain module name"),
    (lambda f: _edit(f, layers_pattern="(a+)+$"), BadAdapterFile, "no plain module name"),
    (lambda f: _edit(f, new_maths=True), BadAdapterFile, "'new_maths' is not known"),
    (lambda f: _edit(f, init_lora_weights="pissa"), BadAdapterFile, "changes base weights"),
    (lambda f: _edit(f, layer_replication=[[0, 2]] * 9), BadAdapterFile, "changes base weights"),
    (lambda f: _edit(f, bias="all"), BadAdapterFile, "changes base weights"),
    (lambda f: _edit(f, use_dora=True), AdapterMismatch, "has no magnitude"),
    (lambda f: _edit(f, task_type="BOGUS"), BadAdapterFile, "does not make a LoraConfig"),
    (lambda f: _edit(f, modules_to_save=["lm_head"]), AdapterMismatch, "no tensors for lm_head"),
    (
        lambda f: _edit(f, target_modules=[*TARGETS, "lm_head"]),
        AdapterMismatch,
        "targets 1 layers for which the file has no tensors: lm_head",
    ),
    (
        lambda f: _edit(f, target_modules=["q_proj"]),
        AdapterMismatch,
        "tensors for 12 layers that its config does not target",
    ),
    (lambda f: _edit(f, exclude_modules=["q_proj"]), AdapterMismatch, "tensors for 2 layers"),
    (lambda f: _edit(f, layers_to_transform=[0]), AdapterMismatch, "tensors for 7 layers"),
    (lambda f: _edit(f, lora_alpha=10**400), BadAdapterFile, "lora_alpha is 1000"),
    (lambda f: _edit(f, lora_alpha=10**9), BadAdapterFile, "scaling at .* is 6.25e"),
    (lambda f: _edit(f, lora_alpha=0), BadAdapterFile, "scaling at .* is 0, which is nothing"),
    (lambda f: _edit(f, modules_to_save="lm_head"), BadAdapterFile, "not a list of names"),
    (lambda f: _edit(f, modules_to_save=5), BadAdapterFile, "not a list of names"),
    (lambda f: _edit(f, exclude_modules=5), BadAdapterFile, "exclude_modules is 5, not a list"),
    (lambda f: _edit(f, layers_pattern=True), BadAdapterFile, "layers_pattern is True"),
    (lambda f: _edit(f, target_parameters=["x.y"]), AdapterMismatch, "names no parameter"),
    (lambda f: _edit(f, megatron_config={"a": 1}), BadAdapterFile, "'megatron_config' is not acc"),
    (lambda f: _edit(f, alora_invocation_tokens=[5]), BadAdapterFile, "alora_invocation_tokens"),
    (lambda f: _edit(f, arrow_config={"a": 1}), BadAdapterFile, "'arrow_config' is not accepted"),
    (lambda f: _edit(f, trainable_token_indices="abc"), BadAdapterFile, "trainable_token_indices"),
    (lambda f: _edit(f, trainable_token_indices=[-1]), BadAdapterFile, "trainable_token_indices"),
    (
        lambda f: _edit(f, trainable_token_indices=[96]),
        AdapterMismatch,
        "token 96, and the largest",
    ),
    (
        lambda f: _edit(f, qalora_group_size=10**9),
        BadAdapterFile,
        "no tensor of the file is larger",
    ),
    (_drop("layers.1.mlp"), AdapterMismatch, "targets 3 layers .* no tensors"),
    (_drop("lora_B"), AdapterMismatch, "has lora_A but no lora_B"),
    (_drop("lora_A"), AdapterMismatch, "has lora_B but no lora_A"),
    (_drop(KEY + ".lora_B"), AdapterMismatch, "has lora_A but no lora_B"),
    (_drop("base_model"), BadAdapterFile, "no key of the 0 tensors is a LORA factor"),
    (_add("base_model.model.lm_head.weight"), BadAdapterFile, "overwrite base weights"),
    (_add(f"{KEY}.weight"), BadAdapterFile, "overwrite base weights"),
    (_add(f"{KEY}.base_layer.weight"), AdapterMismatch, "own copy of the base weight"),
    (_add("base_model.model.nowhere.base_layer.weight"), AdapterMismatch, "own copy of the base"),
    (_add(f"{KEY}.lora_C.weight"), AdapterMismatch, "1 have no place"),
    (
        lambda f: _tensors(f, lambda t: {k.replace("self_attn", "attn"): v for k, v in t.items()}),
        AdapterMismatch,
        r"another architecture: 8 of its 14 targets.*Closest: model\.layers",
    ),
    (_set(f"{KEY}.lora_B.weight", lambda t: t * float("nan")), BadAdapterFile, "NaN or infinite"),
    (_set(f"{KEY}.lora_A.weight", lambda t: t.to(torch.int8)), BadAdapterFile, "int8 values"),
    (_set(f"{KEY}.lora_B.weight", lambda t: t[:, 0].clone()), BadAdapterFile, "of shape"),
    (
        _set(f"{KEY}.lora_A.weight", lambda t: t.double() * 1e300),
        BadAdapterFile,
        "lora_A holds values up to 1.6",
    ),
    (
        _add(KEY.removeprefix("base_model.model.") + ".lora_A.weight", torch.zeros(16, 32)),
        BadAdapterFile,
        "stands twice, under two spellings",
    ),
    (_add(f"{KEY}.lora_A", torch.zeros(16, 32)), BadAdapterFile, "stands twice"),
    (
        _set(f"{KEY}.lora_A.weight", lambda t: t[:8].clone()),
        AdapterMismatch,
        "disagree on the rank",
    ),
    (
        _set(f"{KEY}.lora_A.weight", lambda t: torch.zeros(16, 64)),
        AdapterMismatch,
        r"another size: model\.layers\.1\.mlp\.up_proj\.lora_A is \(16, 64\)",
    ),
]


@pytest.mark.parametrize(("damage", "error", "words"), FILES, ids=[w[:40] for *_, w in FILES])
def test_load_refuses(saved, damage, error, words):
    damage(saved)
    model = tiny("llama").train()
    before = snapshot(model)
    with pytest.raises(error, match=words) as caught:
        load_lora(model, saved)
    assert type(caught.value) is error
    assert str(saved) in str(caught.value)
    assert_same(before, snapshot(model))


def _loha(tmp_path, **fields):
    model = randomise(attach_lora(tiny("llama"), config=peft.LoHaConfig(r=4, alpha=11)))
    folder = as_foreign(save_lora(model, tmp_path / "loha"))
    _edit(folder, **fields)
    return folder


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"rank_pattern": {"([a-z_.0-9]+)+X": 4}}, "regular expression"),
        ({"r": 10**9}, "r is 1000000000, but no tensor"),
        ({"alpha": float("nan")}, "NaN is no JSON number"),
        ({"feedforward_modules": "([a-z_.0-9]+)+X"}, "'feedforward_modules' is not known"),
    ],
)
def test_other_kinds_than_lora_are_checked_as_well(tmp_path, fields, words):
    folder = _loha(tmp_path, **fields)
    model = tiny("llama")
    before = snapshot(model)
    with pytest.raises(BadAdapterFile, match=words):
        load_lora(model, folder)
    assert_same(before, snapshot(model))


def test_an_expression_for_feedforward_layers_is_not_run(tmp_path):
    config = peft.IA3Config(target_modules=["k_proj", "up_proj"], feedforward_modules=["up_proj"])
    folder = as_foreign(save_lora(attach_lora(tiny("llama"), config=config), tmp_path))
    load_lora(tiny("llama"), folder)
    _edit(folder, feedforward_modules="([a-z_.0-9]+)+X")
    with pytest.raises(BadAdapterFile, match="no plain module name"):
        load_lora(tiny("llama"), folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t * float("nan"), "NaN or infinite"),
        (lambda t: t.to(torch.int8), "holds int8 values where the host has float32"),
    ],
)
def test_a_head_is_checked_like_a_factor(tmp_path, change, words):
    folder = save_lora(randomise(attach_lora(tiny("bert", task="classifier"))), tmp_path)
    _set("base_model.model.classifier.weight", change)(folder)
    model = tiny("bert", task="classifier")
    before = snapshot(model)
    with pytest.raises(BadAdapterFile, match=words):
        load_lora(model, folder)
    assert_same(before, snapshot(model))


def test_a_head_that_overflows_in_the_hosts_dtype_is_refused(tmp_path):
    folder = save_lora(randomise(attach_lora(tiny("bert", task="classifier"))), tmp_path)
    _set("base_model.model.classifier.weight", lambda t: t * 1e7)(folder)
    with pytest.raises(BadAdapterFile, match="as float16, holds NaN or infinite"):
        load_lora(tiny("bert", task="classifier").half(), folder)


@pytest.mark.parametrize("source", [None, 5, "x" * 5000, "a/" + "b" * 5000])
def test_sources_that_are_none(source):
    with pytest.raises((InvalidOption, AdapterNotFound)):
        load_lora(tiny("llama"), source)
    with pytest.raises((InvalidOption, AdapterNotFound)):
        open_adapter(source)


def test_kinds_that_files_do_not_carry_are_not_saved(tmp_path):
    model = attach_lora(tiny("llama"), config=peft.FourierFTConfig(n_frequency=8))
    with pytest.raises(BadAdapterFile, match="method FOURIERFT are not saved by hf_lora"):
        save_lora(model, tmp_path / "out")
    theirs = peft.get_peft_model(
        tiny("bert"), peft.LoraConfig(target_modules=["query"], bias="all")
    )
    with pytest.raises(BadAdapterFile, match="changes the base model"):
        save_lora(theirs, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_after_a_failed_load_the_right_one_works(saved, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(saved, broken)
    _set(f"{KEY}.lora_A.weight", lambda t: torch.zeros(16, 64))(broken)
    model = tiny("llama")
    for _ in range(2):
        with pytest.raises(AdapterMismatch):
            load_lora(model, broken)
    load_lora(model, saved)
    assert model.active_adapters() == ["default"]


def test_a_failed_load_leaves_the_adapters_that_were_there(saved, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(saved, broken)
    _set(f"{KEY}.lora_A.weight", lambda t: torch.zeros(16, 64))(broken)
    model = randomise(attach_lora(tiny("llama"), name="mine", targets="attention"))
    before, outputs = snapshot(model), logits(model)
    with pytest.raises(AdapterMismatch):
        load_lora(model, broken)
    assert_same(before, snapshot(model))
    assert torch.equal(logits(model), outputs)


@pytest.mark.parametrize(
    ("host", "words"),
    [
        (lambda: tiny("gpt2"), "another architecture: 14 of its 14 targets"),
        (lambda: tiny("bert"), "another architecture"),
        (lambda: tiny("phi3"), "another architecture"),
        (lambda: tiny("gemma3"), None),  # the same names and sizes: fits
    ],
)
def test_an_adapter_for_another_architecture(saved, host, words):
    model = host()
    before = snapshot(model)
    if words is None:
        assert "carries no fingerprint" in load_lora(model, saved).base
        return
    with pytest.raises(AdapterMismatch, match=words):
        load_lora(model, saved)
    assert_same(before, snapshot(model))


def test_an_adapter_for_a_model_with_more_layers_loads_only_if_asked(saved):
    config = tiny("llama").config
    config.num_hidden_layers = 1
    model = type(tiny("llama"))(config)
    with pytest.raises(AdapterMismatch, match="7 of its 14 targets are no modules"):
        load_lora(model, saved)
    report = load_lora(model, saved, strict=False)
    assert report.targets == 7
    assert len(report.skipped) == 7
    assert "skipped: model.layers.1" in str(report)


def test_loading_under_a_name_in_use(saved):
    model = tiny("llama")
    load_lora(model, saved)
    before = snapshot(model)
    with pytest.raises(AdapterExists):
        load_lora(model, saved)
    assert_same(before, snapshot(model))
    load_lora(model, saved, name="again")


@pytest.mark.parametrize("scale", [float("nan"), "1", True])
def test_a_scale_that_is_no_number(saved, scale):
    with pytest.raises(InvalidOption, match="scale="):
        load_lora(tiny("llama"), saved, scale=scale)


def test_a_file_argument_that_leads_out_of_the_folder(saved):
    with pytest.raises(InvalidOption, match="leads out of"):
        load_lora(tiny("llama"), saved, file="../../etc")


def test_pretrained_modules_in_a_file_need_permission(tmp_path):
    save_lora(randomise(attach_lora(tiny("llama"), train_also=["lm_head"])), tmp_path)
    model = tiny("llama")
    before = snapshot(model)
    with pytest.raises(InvalidOption, match=r"replaces pretrained modules: lm_head \(3,072 values"):
        load_lora(model, tmp_path)
    assert_same(before, snapshot(model))
    assert load_lora(model, tmp_path, extra_modules=True).heads == ("lm_head",)


def test_a_head_of_another_class_is_named(tmp_path):
    save_lora(randomise(attach_lora(tiny("llama", task="classifier"))), tmp_path)
    with pytest.raises(AdapterMismatch, match="brings score whole, which is no module of Llama"):
        load_lora(tiny("llama"), tmp_path)


def test_an_adapter_of_a_pipeline_is_no_model_adapter():
    part = Component({"peft_type": "LORA", "r": 1, "lora_alpha": 1}, {})
    with pytest.raises(AdapterMismatch, match="pipeline with unet"):
        load_lora(tiny("llama"), Adapter({"unet": part}))


def test_a_lost_alpha_pattern_cannot_pass(saved, monkeypatch):
    """Were peft to read alpha otherwise than we do, the load must fail, not scale wrongly."""
    monkeypatch.setattr(Component, "scaling", lambda self, path: 99.0)
    model = tiny("llama")
    before = snapshot(model)
    with pytest.raises(AdapterMismatch, match="by the file and"):
        load_lora(model, saved)
    assert_same(before, snapshot(model))


def test_not_finite_values_are_not_saved(tmp_path):
    model = randomise(attach_lora(tiny("llama")))
    next(p for p in model.parameters() if p.requires_grad).data[0] = float("inf")
    with pytest.raises(BadAdapterFile, match="NaN or infinite"):
        save_lora(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_every_error_says_what_to_do_or_what_there_is():
    """The messages of this file's tables carry no bare Python error."""
    model = tiny("llama")
    for options, _, _ in ATTACH:
        with pytest.raises(LoraError) as caught:
            attach_lora(model, **options)
        text = str(caught.value)
        assert text.endswith((".", ")", ":")), text
        assert not re.search(r"Traceback|object at 0x|NoneType' object", text), text
