"""Files go both ways between hf_lora, plain peft and plain transformers, to the last bit.

The judges are peft's AutoPeftModel classes and transformers' load_adapter, unmodified.
"""

import json
import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file

from hf_lora import attach_lora, load_lora, save_lora
from hf_lora.errors import AdapterMismatch
from hf_lora.testing import tiny
from tests.support import ALPHA, CLASSES, RANK, logits, randomise, tuner_layers

# peft's own opener for each task type; None: peft knows no type, auto_mapping names the class
OPENERS = {
    "CAUSAL_LM": peft.AutoPeftModelForCausalLM,
    "SEQ_2_SEQ_LM": peft.AutoPeftModelForSeq2SeqLM,
    "SEQ_CLS": peft.AutoPeftModelForSequenceClassification,
    None: peft.AutoPeftModel,
}


@pytest.fixture(params=CLASSES, ids=lambda c: "-".join(c))
def trained(request, tmp_path):
    """A model with a random adapter, saved; returns (base folder, adapter folder, model)."""
    tiny(*request.param[:1], task=request.param[1]).save_pretrained(tmp_path / "base")
    model = _base(tmp_path / "base", *request.param)
    attach_lora(model, rank=RANK, alpha=ALPHA)
    randomise(model)
    save_lora(model, tmp_path / "ours")
    return tmp_path, request.param, model


def _base(folder, family, task):
    return type(tiny(family, task=task)).from_pretrained(folder).eval()


def _scalings(model):
    return {
        name.removeprefix("base_model.model."): layer.scaling["default"]
        for name, layer in tuner_layers(model).items()
    }


def _open_with_peft(folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    with warnings.catch_warnings():
        # peft says that fan_in_fan_out is set by itself where Conv1D and Linear meet
        warnings.simplefilter("ignore")
        return OPENERS[config["task_type"]].from_pretrained(folder)


def test_auto_peft_model_opens_our_file_with_equal_outputs(trained):
    folder, _, model = trained
    theirs = _open_with_peft(folder / "ours")
    assert torch.equal(logits(theirs.eval()), logits(model))
    assert _scalings(theirs) == _scalings(model)
    assert set(_scalings(model).values()) == {ALPHA / RANK}


def test_transformers_loads_our_file_with_equal_outputs(trained):
    folder, kind, model = trained
    theirs = _base(folder / "base", *kind)
    theirs.load_adapter(str(folder / "ours"))
    assert torch.equal(logits(theirs), logits(model))
    assert theirs.active_adapters() == ["default"]


def test_peft_writes_the_same_tensors_that_we_read(trained):
    folder, kind, model = trained
    _open_with_peft(folder / "ours").save_pretrained(folder / "theirs")
    ours, theirs = (load_file(folder / f / "adapter_model.safetensors") for f in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    again = _base(folder / "base", *kind)
    load_lora(again, folder / "theirs")
    assert torch.equal(logits(again), logits(model))


def test_save_pretrained_of_transformers_writes_what_we_read(trained):
    folder, kind, model = trained
    model.save_pretrained(folder / "theirs")
    assert {p.name for p in (folder / "theirs").iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert not (folder / "theirs" / "model.safetensors").exists()
    again = _base(folder / "base", *kind)
    load_lora(again, folder / "theirs")
    assert torch.equal(logits(again), logits(model))


def test_an_adapter_attached_by_peft_is_saved_and_read_by_us(tmp_path):
    model = tiny("llama")
    config = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"
    )
    theirs = randomise(peft.get_peft_model(model, config))
    save_lora(theirs, tmp_path)
    fresh = tiny("llama")
    report = load_lora(fresh, tmp_path)
    assert report.roles == {"attn.q": 2, "mlp.down": 2}
    assert torch.equal(logits(fresh), logits(theirs))


def test_an_adapter_attached_by_transformers_is_saved_and_read_by_us(tmp_path):
    model = tiny("llama")
    model.add_adapter(peft.LoraConfig(r=4, lora_alpha=11, target_modules=["v_proj"]))
    randomise(model)
    save_lora(model, tmp_path)
    fresh = tiny("llama")
    load_lora(fresh, tmp_path)
    assert torch.equal(logits(fresh), logits(model))


@pytest.mark.parametrize(
    "config",
    [
        peft.LoraConfig(r=4, lora_alpha=11, use_dora=True),
        peft.LoraConfig(r=4, lora_alpha=11, use_rslora=True),
        peft.LoraConfig(
            r=4, lora_alpha=11, rank_pattern={"k_proj": 2}, alpha_pattern={"v_proj": 7}
        ),
        peft.LoraConfig(r=4, lora_alpha=11, init_lora_weights="gaussian"),
        peft.LoraConfig(r=4, lora_alpha=11, init_lora_weights="orthogonal"),
        peft.LoraConfig(r=4, lora_alpha=11, target_modules=["embed_tokens", "q_proj"]),
        peft.LoraConfig(r=4, lora_alpha=11, trainable_token_indices=[3, 5]),
        peft.LoraConfig(r=4, lora_alpha=11, modules_to_save=["lm_head"]),
        peft.LoHaConfig(r=4, alpha=11),
        peft.LoKrConfig(r=4, alpha=11),
        peft.IA3Config(feedforward_modules=[]),
        peft.HRAConfig(r=4),
        peft.OFTConfig(oft_block_size=4),
    ],
    ids=lambda c: f"{c.peft_type.value}-{getattr(c, 'use_dora', '')}{len(str(c))}",
)
def test_every_peft_kind_that_files_carry_goes_both_ways(config, tmp_path):
    model = tiny("llama")
    attach_lora(model, config=config)
    randomise(model)
    save_lora(model, tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft warns about embeddings it saves as well
        theirs = peft.PeftModel.from_pretrained(tiny("llama"), str(tmp_path / "ours"))
    assert torch.equal(logits(theirs.eval()), logits(model))
    wanted = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    peers = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    # both spellings of magnitudes are peft's, ours is the one that transformers reads as well
    spelled = {f"{k}.weight" if k.endswith("magnitude_vector") else k for k in peers}
    assert wanted.keys() == {f"base_model.model.{key}" for key in spelled}
    fresh = tiny("llama")
    load_lora(fresh, tmp_path / "ours", extra_modules=True)
    assert torch.equal(logits(fresh), logits(model))


def test_a_head_trained_with_peft_is_found_again(tmp_path):
    config = peft.LoraConfig(r=4, lora_alpha=11, target_modules=["query"], task_type="SEQ_CLS")
    theirs = randomise(peft.get_peft_model(tiny("bert", task="classifier"), config))
    theirs.save_pretrained(tmp_path)
    # peft lists ["classifier", "score"] whatever the model has
    listed = json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"]
    assert set(listed) == {"classifier", "score"}
    fresh = tiny("bert", task="classifier")
    assert load_lora(fresh, tmp_path).heads == ("classifier",)
    assert torch.equal(logits(fresh), logits(theirs))


def test_a_targeted_embedding_saved_by_peft_is_read_where_the_base_is_the_same(tmp_path):
    config = peft.LoraConfig(r=4, lora_alpha=11, target_modules=["embed_tokens", "q_proj"])
    theirs = randomise(peft.get_peft_model(tiny("llama"), config))
    with pytest.warns(UserWarning, match="save_embedding_layers"):
        theirs.save_pretrained(str(tmp_path))
    assert any("base_layer" in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    fresh = tiny("llama")
    load_lora(fresh, tmp_path)
    assert torch.equal(logits(fresh), logits(theirs))
    other = tiny("llama", seed=1)
    before = {k: v.clone() for k, v in other.state_dict().items()}
    with pytest.raises(AdapterMismatch, match="own copy of the base weight"):
        load_lora(other, tmp_path)
    assert all(torch.equal(before[k], v) for k, v in other.state_dict().items())


@pytest.mark.parametrize(
    ("family", "task", "options"),
    [
        ("distilbert", "classifier", {"target_modules": ["q_lin"], "task_type": "SEQ_CLS"}),
        ("llama", "lm", {"target_modules": ["q_proj"], "modules_to_save": ["norm"]}),
        ("llama", "lm", {"target_modules": "all-linear"}),
        ("llama", "lm", {"target_modules": r".*\.self_attn\.(q|v)_proj"}),
        ("llama", "lm", {"target_modules": ["q_proj"], "exclude_modules": r".*layers\.0.*"}),
        ("llama", "lm", {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
        ("gpt2", "lm", {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
        ("t5", "lm", {"target_modules": ["q", "v"], "use_rslora": True}),
    ],
)
def test_what_plain_peft_makes_and_saves_is_read_to_the_bit(tmp_path, family, task, options):
    config = peft.LoraConfig(r=4, lora_alpha=11, **options)
    theirs = randomise(peft.get_peft_model(tiny(family, task=task), config))
    theirs.save_pretrained(str(tmp_path))
    fresh = tiny(family, task=task)
    report = load_lora(fresh, tmp_path, extra_modules=True)
    assert torch.equal(logits(fresh), logits(theirs))
    expression = isinstance(options.get("exclude_modules"), str) or ".*" in str(options)
    assert any("is an expression" in note for note in report.notes) == expression
    save_lora(fresh, tmp_path / "again")
    again = peft.PeftModel.from_pretrained(tiny(family, task=task), str(tmp_path / "again"))
    assert torch.equal(logits(again.eval()), logits(theirs))


def test_transformers_loads_our_dora(tmp_path):
    """Its load_adapter loses the magnitudes of a file that spells them as peft 0.21 does."""
    model = randomise(attach_lora(tiny("llama"), config=peft.LoraConfig(r=4, use_dora=True)))
    theirs = tiny("llama")
    theirs.load_adapter(str(save_lora(model, tmp_path)))
    assert torch.equal(logits(theirs), logits(model))
