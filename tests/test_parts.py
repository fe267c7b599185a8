"""LoRA on parts of a fused projection, and on fused experts: counts of the paper, plain peft."""

import copy
import pickle

import peft
import pytest
import torch
import transformers

from hf_lora import (
    Family,
    attach_lora,
    detach_lora,
    load_lora,
    merge_lora,
    open_adapter,
    plan_lora,
    register_family,
    save_lora,
    set_adapters,
    unmerge_lora,
)
from hf_lora.errors import AdapterMismatch, InvalidOption, TargetNotFound, UnsupportedTarget
from hf_lora.families import unregister_family
from hf_lora.fused import attention_split
from hf_lora.layers.parts import PartsB
from hf_lora.testing import tiny, tiny_batch
from tests.support import ALPHA, assert_same, logits, randomise, snapshot, tuner_layers

FUSED = ["bloom", "falcon", "gpt2", "gpt_neox", "phi3"]


def on_meta(name, config, **sizes):
    with torch.device("meta"):
        return getattr(transformers, name)(getattr(transformers, config)(**sizes))


# arXiv 2106.09685, tables 2, 3 and 18; Llama-2-7B by its shapes: 32 layers, d 4096, ff 11008
GPT3 = {"vocab_size": 50257, "n_embd": 12288, "n_layer": 96, "n_head": 96}
COUNTS = [
    ("RobertaModel", "RobertaConfig", {}, "qv", 8, 294_912),
    (
        "RobertaModel",
        "RobertaConfig",
        {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16},
        *("qv", 8, 786_432),
    ),
    (
        "DebertaV2Model",
        "DebertaV2Config",
        {"hidden_size": 1536, "num_hidden_layers": 48, "intermediate_size": 6144},
        *("qv", 16, 4_718_592),
    ),
    ("GPT2Model", "GPT2Config", {"n_embd": 1024, "n_layer": 24, "n_head": 16}, "qv", 4, 393_216),
    ("GPT2Model", "GPT2Config", {"n_embd": 1280, "n_layer": 36, "n_head": 20}, "qv", 4, 737_280),
    *[
        ("GPT2Model", "GPT2Config", GPT3, "qv", rank, count)
        for rank, count in ((1, 4_718_592), (4, 18_874_368), (8, 37_748_736), (64, 301_989_888))
    ],
    ("LlamaModel", "LlamaConfig", {}, "qv", 8, 4_194_304),
    ("LlamaModel", "LlamaConfig", {}, "all-linear", 8, 19_988_480),
    ("LlamaModel", "LlamaConfig", {}, "all-linear", 16, 39_976_960),
]


@pytest.mark.parametrize(("name", "config", "sizes", "targets", "rank", "count"), COUNTS)
def test_parameter_counts_are_those_of_the_paper(name, config, sizes, targets, rank, count):
    model = on_meta(name, config, **sizes)
    assert plan_lora(model, rank=rank, targets=targets).adapter_parameters == count
    attach_lora(model, rank=rank, targets=targets)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count


@pytest.mark.parametrize("family", FUSED)
def test_parts_are_a_plain_lora_on_disk(family, tmp_path):
    model = randomise(attach_lora(tiny(family), rank=4, alpha=ALPHA, targets="qv"))
    assert all(isinstance(x.lora_B["default"], PartsB) for x in tuner_layers(model).values())
    outputs = logits(model)
    folder = save_lora(model, tmp_path / "ours")
    wrapped = peft.PeftModel.from_pretrained(tiny(family), folder)
    assert torch.equal(logits(wrapped.base_model.model), outputs)
    host = tiny(family)
    load_lora(host, folder)
    assert torch.equal(logits(host), outputs)
    model.save_pretrained(tmp_path / "theirs")  # transformers' own
    host = tiny(family)
    host.load_adapter(tmp_path / "theirs")
    assert torch.equal(logits(host), outputs)


@pytest.mark.parametrize("family", FUSED)
def test_k_stays_as_it_is(family):
    base = tiny(family)
    model = randomise(attach_lora(copy.deepcopy(base), rank=4, alpha=ALPHA, targets="qv"))
    for path, layer in tuner_layers(model).items():
        parts = layer.lora_B["default"]
        touched = layer.get_delta_weight("default")
        touched = touched.T if layer.fan_in_fan_out else touched
        rows = {i for i, row in enumerate(touched) if row.any()}
        assert rows == {i for at in parts.rows.values() for i in at}, path
        # A and B of each part, in float64: scaling * B_part @ A_part
        a = layer.lora_A["default"].weight.detach().double()
        for number, (part, at) in enumerate(parts.rows.items()):
            own = a[number * 4 : number * 4 + 4]
            wanted = getattr(parts, part).detach().double() @ own * (ALPHA / 4)
            assert torch.allclose(touched[list(at)].double(), wanted, rtol=1e-5, atol=1e-7)


def test_every_part_gets_a_gradient_and_the_rest_does_not_move():
    model = attach_lora(tiny("gpt2"), rank=4, targets="qv").train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for step in range(2):
        model(**tiny_batch(model)).loss.backward()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and (step or ".lora_B." in name):  # A follows B
                assert parameter.grad.abs().sum() > 0, name
        optimizer.step()
        optimizer.zero_grad()


def test_training_goes_on_with_parts(tmp_path):
    model = randomise(attach_lora(tiny("gpt2"), rank=4, alpha=ALPHA, targets="qv"))
    folder = save_lora(model, tmp_path / "a")
    fused = open_adapter(folder).manifest.fused
    assert fused == {f"transformer.h.{i}.attn.c_attn": ["q", "v"] for i in range(2)}
    host = tiny("gpt2")
    load_lora(host, folder, trainable=True)
    own = {n: p for n, p in model.named_parameters() if p.requires_grad}
    again = {n: p for n, p in host.named_parameters() if p.requires_grad}
    assert own.keys() == again.keys()
    assert all(torch.equal(own[n], again[n]) for n in own)
    assert open_adapter(save_lora(host, tmp_path / "b")).digest == open_adapter(folder).digest


def test_merge_strength_copy_and_detach():
    model = tiny("gpt2").eval()
    bare, before = logits(model), snapshot(model)
    attach_lora(model, rank=4, alpha=ALPHA, targets="qv")
    randomise(model)
    outputs = logits(model)
    merge_lora(model)
    assert torch.allclose(logits(model), outputs, atol=1e-5)
    unmerge_lora(model)
    assert torch.equal(logits(model), outputs)
    set_adapters(model, "default", 0)
    assert torch.equal(logits(model), bare)
    set_adapters(model, "default")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other), outputs)
    detach_lora(model)
    assert_same(before, snapshot(model))


def test_a_state_dict_has_the_whole_factor():
    model = randomise(attach_lora(tiny("gpt2"), rank=4, targets="qv"))
    state = model.state_dict()
    key = next(k for k in state if k.endswith("lora_B.default.weight"))
    assert state[key].shape == (96, 8)  # three times 32 features, two times rank 4
    other = attach_lora(tiny("gpt2"), rank=4, targets="qv")
    other.load_state_dict(state)
    assert torch.equal(logits(other), logits(model))
    state[key] = torch.ones_like(state[key])
    with pytest.raises(RuntimeError, match="outside the parts"):
        other.load_state_dict(state)


def test_single_parts_and_whole_layers_add_up():
    def parts(targets):
        layers = tuner_layers(attach_lora(tiny("gpt2"), rank=2, targets=targets)).values()
        return {tuple(getattr(x.lora_B["default"], "rows", ())) for x in layers}

    assert parts("attn.k") == {("k",)}
    with pytest.raises(TargetNotFound):
        parts("mlp.gate")  # no gate in GPT-2
    assert parts(["attn.v", "attn.q"]) == {("q", "v")}
    assert parts(["qv", "attn.qkv"]) == {()}


def test_parts_that_nobody_knows_are_refused():
    model = tiny("gpt2")
    model.config.model_type = "a_new_one"
    with pytest.raises(UnsupportedTarget, match=r"more than q and v in one matrix.*not known"):
        attach_lora(model, targets="qv")
    row = Family(
        "new",
        model_types=("a_new_one",),
        split=lambda c: attention_split(1, c.n_head, c.n_head),
        source="me",
    )
    register_family(row)
    try:
        own, known = plan_lora(model, targets="qv"), plan_lora(tiny("gpt2"), targets="qv")
        assert (own.targets, own.family) == (known.targets, "new")
    finally:
        unregister_family(row)
    for option in ({"use_dora": True}, {"lora_bias": True}):
        with pytest.raises(InvalidOption, match="parts of a fused projection"):
            attach_lora(tiny("gpt2"), targets="qv", config=peft.LoraConfig(**option))
    with pytest.raises(InvalidOption, match="parts of a fused projection"):
        attach_lora(tiny("gpt2"), targets="qv", config=peft.LoHaConfig(r=4))


def test_a_whole_b_does_not_go_into_parts():
    parts = PartsB({"q": [0, 1], "v": [4, 5]}, 6, 2, torch.zeros(1))
    with pytest.raises(AdapterMismatch, match="outside the parts q and v"):
        parts.put(torch.ones(6, 4))
    with pytest.raises(AdapterMismatch, match=r"\(6, 4\) is needed"):
        parts.put(torch.ones(6, 2))


def test_experts_are_reached_by_name_of_the_preset(tmp_path):
    plan = plan_lora(tiny("qwen3_moe"), targets=["default", "experts"])
    roles = plan.by_role()
    assert {"attn.q", "moe.experts.gate_up", "moe.experts.down"} <= set(roles)
    assert not any("frozen" in note for note in plan.notes)
    model = randomise(attach_lora(tiny("qwen3_moe"), targets=["default", "experts"]))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == plan.adapter_parameters
    folder = save_lora(model, tmp_path / "a")
    wrapped = peft.PeftModel.from_pretrained(tiny("qwen3_moe"), folder)
    assert torch.equal(logits(wrapped.base_model.model), logits(model))
    host = tiny("qwen3_moe")
    load_lora(host, folder)
    assert torch.equal(logits(host), logits(model))


def test_what_experts_cannot_have_is_said():
    with pytest.raises(InvalidOption, match="lora_dropout cannot be had on fused experts"):
        attach_lora(tiny("qwen3_moe"), targets="experts", dropout=0.1)
    with pytest.raises(InvalidOption, match="cannot adapt fused experts"):
        attach_lora(tiny("qwen3_moe"), targets="experts", config=peft.LoHaConfig(r=4))
    with pytest.raises(TargetNotFound, match="experts"):
        attach_lora(tiny("llama"), targets="experts")


def test_targets_by_tower():
    config = transformers.LlavaConfig(
        text_config={"model_type": "llama", "num_hidden_layers": 1, "vocab_size": 64},
        vision_config={"model_type": "clip_vision_model", "num_hidden_layers": 2},
    )
    with torch.device("meta"):
        model = transformers.LlavaForConditionalGeneration(config)
    plain = plan_lora(model)
    assert not any("vision" in t.path for t in plain.targets)
    both = plan_lora(model, targets={"language": "default", "vision": "attention"})
    seen = [t for t in both.targets if "vision" in t.path]
    assert {t.role for t in seen} == {"attn.q", "attn.k", "attn.v", "attn.o"}
    assert len(seen) == 8
    assert [t for t in both.targets if "vision" not in t.path] == list(plain.targets)
    with pytest.raises(TargetNotFound, match=r"no tower 'audio'. Towers: .*vision"):
        plan_lora(model, targets={"audio": "default"})
    with pytest.raises(InvalidOption):
        plan_lora(model, targets={})
