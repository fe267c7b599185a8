"""What a file means does not change with the class, the dtype or the parts of the host."""

import copy
import json
import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_lora import attach_lora, load_lora, save_lora
from hf_lora.errors import AdapterMismatch
from hf_lora.testing import tiny, tiny_batch
from tests.support import logits, randomise

T = ["q_proj", "v_proj"]
LAYER = "model.layers.0"
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
IN_FULL = [f"{LAYER}.mlp.experts.gate_up_proj", f"{LAYER}.mlp.experts.down_proj"]


def lora(**options):
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 11, "target_modules": T} | options)


@torch.no_grad()
def states(trunk):
    """The last hidden states on the fixed batch."""
    return trunk.eval()(**tiny_batch(trunk), use_cache=False).last_hidden_state


def by_peft(model, config, folder):
    """The model with an adapter that plain peft made, trained and saved."""
    with warnings.catch_warnings(action="ignore"):  # dead patterns, embeddings that are saved
        theirs = randomise(peft.get_peft_model(model, copy.deepcopy(config)))
        theirs.save_pretrained(str(folder))
    return theirs.base_model.model


def changed(folder, **fields):
    """Writes other values into a config file."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


FILES = {
    "alpha of one layer": ("llama", lora(alpha_pattern={f"{LAYER}.self_attn.q_proj": 64})),
    "rank of one layer": ("llama", lora(rank_pattern={f"^{LAYER}.self_attn.q_proj": 8})),
    "alpha, dots escaped": (
        "llama",
        lora(alpha_pattern={r"^model\.layers\.1\.self_attn": 3,
                            r"model\.layers\.1\.self_attn\.q_proj": 64}),
    ),
    "the first pattern counts": (
        "llama",
        lora(alpha_pattern={"0.self_attn.q_proj": 64, f"{LAYER}.self_attn.q_proj": 3}),
    ),
    "alpha of experts": (
        "qwen3_moe", lora(target_parameters=EXPERTS, alpha_pattern={"mlp.experts.down_proj": 40})
    ),
    "rank of experts": (
        "qwen3_moe", lora(target_parameters=EXPERTS, rank_pattern={"mlp.experts.down_proj": 8})
    ),
    "alpha of a parameter's last name": (
        "qwen3_moe", lora(target_parameters=EXPERTS, alpha_pattern={"down_proj": 40, "q_proj": 20})
    ),
    "experts of one layer": (
        "qwen3_moe",
        lora(target_parameters=IN_FULL,
             alpha_pattern={IN_FULL[1]: 40}, rank_pattern={IN_FULL[0]: 8}),
    ),
    "experts of one layer, anchored": (
        "qwen3_moe", lora(target_parameters=IN_FULL, alpha_pattern={f"^{IN_FULL[1]}": 40})
    ),
    "one parameter": ("qwen3_moe", lora(target_parameters=IN_FULL[1:])),
    "alpha and rank of LoHa": (
        "llama",
        peft.LoHaConfig(r=4, alpha=4, target_modules=T,
                        alpha_pattern={f"{LAYER}.self_attn.q_proj": 64},
                        rank_pattern={"model.layers.1.self_attn.v_proj": 2}),
    ),
    "alpha and rank of LoKr": (
        "llama",
        peft.LoKrConfig(r=2, alpha=4, target_modules=T,
                        alpha_pattern={f"^{LAYER}.self_attn.q_proj": 64},
                        rank_pattern={"model.layers.1.self_attn.v_proj": 1}),
    ),
    "block size of C3A, in full": (
        "llama",
        peft.C3AConfig(block_size=4, target_modules=T,
                       block_size_pattern={f"{LAYER}.self_attn.q_proj": 8}),
    ),
    "block size of C3A": (
        "llama",
        peft.C3AConfig(block_size=4, target_modules=T,
                       block_size_pattern={"layers.0.self_attn.q_proj": 8}),
    ),
    "BDLoRA": (
        "llama",
        lora(use_bdlora=peft.tuners.lora.BdLoraConfig(
            nblocks=2, match_strict=False,
            target_modules_bd_a=[f"{LAYER}.self_attn.q_proj", "model.layers.1.self_attn.q_proj"])),
    ),
    "targets in full": ("llama", lora(target_modules=[f"{LAYER}.self_attn.q_proj", "v_proj"])),
    "exclusions": ("llama", lora(exclude_modules=[f"{LAYER}.self_attn.q_proj"])),
    "new tokens": ("llama", lora(trainable_token_indices={"model.embed_tokens": [1, 2]})),
    "a norm trained whole": ("llama", lora(modules_to_save=[f"{LAYER}.input_layernorm"])),
    "IA3": (
        "llama",
        peft.IA3Config(target_modules=["k_proj", f"{LAYER}.mlp.down_proj"],
                       feedforward_modules=[f"{LAYER}.mlp.down_proj"]),
    ),
    "layers by number": ("llama", lora(layers_to_transform=[1])),
    "layers by number and name": (
        "llama", lora(layers_to_transform=1, layers_pattern="model.layers")
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", FILES)
def test_a_file_of_a_language_model_does_the_same_on_its_trunk(tmp_path, what):
    family, config = FILES[what]
    theirs = by_peft(tiny(family), config, tmp_path).model
    trunk = tiny(family).model
    assert load_lora(trunk, tmp_path, extra_modules=True).targets
    assert torch.equal(states(trunk), states(theirs))
    assert not torch.equal(states(trunk), states(tiny(family).model))


BACK = {
    "alpha of one layer": lora(alpha_pattern={"layers.0.self_attn.q_proj": 64}),
    "alpha that nothing takes": lora(alpha_pattern={f"{LAYER}.self_attn.q_proj": 64}),
    "LoHa": peft.LoHaConfig(
        r=4, target_modules=T, alpha_pattern={"^layers.0.self_attn.q_proj": 64}
    ),
    "exclusions": lora(exclude_modules=["layers.0.self_attn.q_proj"]),
    "layers by number": lora(layers_to_transform=[1], layers_pattern="layers"),
    "new tokens": lora(trainable_token_indices={"embed_tokens": [1, 2]}),
}


@pytest.mark.parametrize("what", BACK)
def test_a_file_of_a_trunk_does_the_same_in_a_language_model(tmp_path, what):
    theirs = by_peft(tiny("llama").model, BACK[what], tmp_path)
    model = tiny("llama")
    load_lora(model, tmp_path, extra_modules=True)
    assert torch.equal(states(model.model), states(theirs))


def test_a_layer_that_the_config_numbers_and_the_file_lacks_is_missed(tmp_path):
    by_peft(tiny("llama"), lora(layers_to_transform=[0, 1]), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file({k: v for k, v in load_file(path).items() if "layers.1.self_attn.q" not in k}, path)
    with pytest.raises(AdapterMismatch, match="no tensors: layers.1.self_attn.q_proj"):
        load_lora(tiny("llama").model, tmp_path)


def test_every_head_that_the_file_lacks_is_named(tmp_path):
    config = lora(task_type="SEQ_CLS", target_modules=["query_proj"])
    by_peft(tiny("deberta-v2", task="classifier"), config, tmp_path)
    keys = load_file(tmp_path / "adapter_model.safetensors")
    assert any(".classifier." in k for k in keys)
    assert not any(".pooler." in k for k in keys)
    report = load_lora(tiny("deberta-v2", task="classifier"), tmp_path)
    assert report.notes == ("the file brings no pooler: the host's own is used",)


def test_the_part_of_a_head_that_the_file_lacks_is_named(tmp_path):
    config = lora(target_modules=["query"], modules_to_save=["classifier.out_proj"])
    by_peft(tiny("roberta", task="classifier"), config, tmp_path)
    report = load_lora(tiny("roberta", task="classifier"), tmp_path)
    assert report.notes == ("the file brings no classifier.dense: the host's own is used",)


def test_a_whole_head_in_the_file_leaves_nothing_to_note(tmp_path):
    config = lora(target_modules=["query_proj"], modules_to_save=["classifier", "pooler"])
    by_peft(tiny("deberta-v2", task="classifier"), config, tmp_path)
    assert not load_lora(tiny("deberta-v2", task="classifier"), tmp_path).notes


HALVES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("host", HALVES, ids=str)
@pytest.mark.parametrize("trained", HALVES, ids=str)
def test_a_copy_of_the_embedding_in_another_dtype_is_the_embedding(tmp_path, trained, host):
    config = lora(target_modules=["q_proj", "embed_tokens"])
    by_peft(tiny("llama").to(trained), config, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    copies = [k for k in tensors if k.endswith("embed_tokens.base_layer.weight")]
    assert [tensors[k].dtype for k in copies] == [trained]
    model = tiny("llama").to(host)
    load_lora(model, tmp_path)
    # plain peft, given the factors alone
    theirs = peft.get_peft_model(tiny("llama").to(host), config)
    rest = {k: v for k, v in tensors.items() if k not in copies}
    peft.set_peft_model_state_dict(theirs, rest)
    assert torch.equal(logits(model), logits(theirs.base_model.model))
    own = model.model.embed_tokens.base_layer.weight
    assert torch.equal(own, tiny("llama").model.embed_tokens.weight.to(host))


@pytest.mark.parametrize("host", HALVES, ids=str)
@pytest.mark.parametrize("trained", HALVES, ids=str)
def test_a_copy_with_one_other_value_is_refused(tmp_path, trained, host):
    by_peft(tiny("llama").to(trained), lora(target_modules=["embed_tokens"]), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(k for k in tensors if k.endswith("base_layer.weight"))
    tensors[key][40, 7] *= 1 + 2**-6  # two steps of bf16 at least
    save_file(tensors, path)
    with pytest.raises(AdapterMismatch, match="its own copy of the base weight"):
        load_lora(tiny("llama").to(host), tmp_path)


def test_a_copy_of_another_size_is_refused(tmp_path):
    by_peft(tiny("llama"), lora(target_modules=["embed_tokens"]), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(k for k in tensors if k.endswith("base_layer.weight"))
    for dtype in HALVES:
        save_file(tensors | {key: tensors[key][:-1].to(dtype).contiguous()}, path)
        with pytest.raises(AdapterMismatch, match="its own copy of the base weight"):
            load_lora(tiny("llama").to(torch.bfloat16), tmp_path)


def test_a_head_is_left_out_where_the_model_has_none(tmp_path):
    theirs = randomise(attach_lora(tiny("llama", task="classifier")))
    save_lora(theirs, tmp_path)
    with pytest.raises(AdapterMismatch, match="brings score whole"):
        load_lora(tiny("llama"), tmp_path)
    model = tiny("llama")
    report = load_lora(model, tmp_path, strict=False)
    assert report.skipped == ("score",)
    assert report.heads == ()
    # plain peft, given the factors alone
    config = peft.LoraConfig.from_pretrained(str(tmp_path))
    config.modules_to_save, config.task_type = None, None
    judge = peft.get_peft_model(tiny("llama"), config)
    factors = load_file(tmp_path / "adapter_model.safetensors")
    peft.set_peft_model_state_dict(judge, {k: v for k, v in factors.items() if "lora_" in k})
    assert torch.equal(logits(model), logits(judge.base_model.model))


def test_a_target_with_its_copy_is_left_out_where_the_model_has_none(tmp_path):
    by_peft(tiny("llama"), lora(target_modules=["q_proj", "lm_head", "embed_tokens"]), tmp_path)
    with pytest.raises(AdapterMismatch, match="lm_head"):
        load_lora(tiny("llama").model, tmp_path)
    assert load_lora(tiny("llama").model, tmp_path, strict=False).skipped == ("lm_head",)


def test_targets_that_the_config_does_not_name_are_called_so(tmp_path):
    by_peft(tiny("llama"), lora(), tmp_path)
    changed(tmp_path, target_modules=None)
    notes = load_lora(tiny("llama"), tmp_path).notes
    assert notes == (
        "target_modules names no layers, so it was not checked that no target is missing",
    )


def test_parameters_alone_need_no_targets(tmp_path):
    config = lora(target_modules=[], target_parameters=EXPERTS)
    theirs = by_peft(tiny("qwen3_moe"), config, tmp_path)
    changed(tmp_path, target_modules=None)
    model = tiny("qwen3_moe")
    assert not load_lora(model, tmp_path).notes
    assert torch.equal(logits(model), logits(theirs))
