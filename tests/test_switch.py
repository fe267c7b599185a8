"""set_adapters and as_peft_model: strengths are true, views are free, nothing else moves."""

import peft
import pytest
import torch

from hf_lora import as_peft_model, attach_lora, load_lora, save_lora, set_adapters
from hf_lora.errors import AdapterNotFound, InvalidOption
from hf_lora.testing import tiny
from tests.support import ALPHA, RANK, logits, randomise, snapshot, tuner_layers


@pytest.fixture
def pair():
    """A model with the adapters `style` (attention) and `detail` (everything)."""
    model = tiny("llama")
    randomise(attach_lora(model, name="style", targets="attention", rank=RANK, alpha=ALPHA))
    randomise(attach_lora(model, name="detail", rank=RANK, alpha=ALPHA), seed=6)
    return model


def _scalings(model, name):
    return {p: x.scaling[name] for p, x in tuner_layers(model).items() if name in x.scaling}


def test_names_left_out_are_inactive(pair):
    set_adapters(pair, ["style", "detail"])
    assert pair.active_adapters() == ["style", "detail"]
    set_adapters(pair, "style")
    assert pair.active_adapters() == ["style"]
    trainable = [n for n, p in pair.named_parameters() if p.requires_grad]
    assert trainable
    assert all(".style." in n for n in trainable)


@pytest.mark.parametrize(
    "arguments",
    [
        ({"style": 0.8, "detail": 0.3},),
        (["style", "detail"], [0.8, 0.3]),
    ],
)
def test_a_weight_multiplies_the_adapters_own_scaling(pair, arguments):
    set_adapters(pair, *arguments)
    assert set(_scalings(pair, "style").values()) == {0.8 * ALPHA / RANK}
    assert set(_scalings(pair, "detail").values()) == {0.3 * ALPHA / RANK}


def test_weight_one_is_exactly_the_adapter_and_zero_exactly_the_base(pair):
    bare = logits(tiny("llama"))
    set_adapters(pair, "detail")
    once = logits(pair)
    set_adapters(pair, "detail", 0.5)
    assert not torch.equal(logits(pair), once)
    set_adapters(pair, ["detail"], [None])
    assert torch.equal(logits(pair), once)
    set_adapters(pair, {"style": 0, "detail": 0.0})
    assert torch.equal(logits(pair), bare)


def test_a_weight_by_module_path_goes_by_whole_segments(pair):
    set_adapters(pair, {"style": {"model.layers.1": 0.25}})
    by_path = _scalings(pair, "style")
    assert by_path["model.layers.1.self_attn.q_proj"] == 0.25 * ALPHA / RANK
    assert by_path["model.layers.0.self_attn.q_proj"] == ALPHA / RANK
    with pytest.raises(InvalidOption, match=r"no target below \['model.layer'\]"):
        set_adapters(pair, {"style": {"model.layer": 0.25}})


def test_rslora_keeps_its_own_scaling():
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, use_rslora=True)
    model = attach_lora(tiny("llama"), config=config)
    set_adapters(model, "default", 0.5)
    assert set(_scalings(model, "default").values()) == {0.5 * ALPHA / RANK**0.5}


@pytest.mark.parametrize(
    ("names", "weights", "error", "words"),
    [
        ("stile", None, AdapterNotFound, "It has 'style', 'detail'"),
        (["style", "detail"], [1.0], InvalidOption, "1 weights for 2 adapters"),
        (["style", "style"], None, InvalidOption, "named twice"),
        ({"style": 1.0}, 1.0, InvalidOption, "given twice"),
        ("style", float("nan"), InvalidOption, "not finite"),
        ("style", float("inf"), InvalidOption, "not finite"),
        ({"style": "strong"}, None, InvalidOption, "no number"),
        ({"style": True}, None, InvalidOption, "no number"),
        (3, None, InvalidOption, "no adapter name"),
        ([["style"]], None, InvalidOption, "no adapter name"),
        ("style", object(), InvalidOption, "no number and no list"),
    ],
)
def test_bad_weights_change_nothing(pair, names, weights, error, words):
    before = (pair.active_adapters(), _scalings(pair, "style"), snapshot(pair)["requires_grad"])
    with pytest.raises(error, match=words):
        set_adapters(pair, names, weights)
    after = (pair.active_adapters(), _scalings(pair, "style"), snapshot(pair)["requires_grad"])
    assert before == after


def test_dora_has_no_exact_strength_and_says_so():
    model = randomise(attach_lora(tiny("llama"), config=peft.LoraConfig(use_dora=True)))
    set_adapters(model, "default", 1.0)
    with pytest.raises(InvalidOption, match="cannot be scaled exactly"):
        set_adapters(model, "default", 0.5)


def test_two_heads_for_one_place_are_refused():
    model = attach_lora(tiny("bert", task="classifier"), name="one")
    attach_lora(model, name="two")
    with pytest.raises(InvalidOption, match="'one' and 'two' both bring their own classifier"):
        set_adapters(model, ["one", "two"])


def test_loaded_adapters_stay_frozen_when_activated(tmp_path):
    save_lora(randomise(attach_lora(tiny("llama"))), tmp_path)
    model = tiny("llama")
    load_lora(model, tmp_path, name="frozen")
    attach_lora(model, name="fresh")
    set_adapters(model, ["frozen", "fresh"])
    grads = {n: p.requires_grad for n, p in model.named_parameters() if "lora_" in n}
    assert all(flag == (".fresh." in n) for n, flag in grads.items())


def test_a_peft_view_shares_everything_and_changes_nothing(pair, tmp_path):
    before, outputs = snapshot(pair), logits(pair)
    view = as_peft_model(pair)
    assert isinstance(view, peft.PeftModel)
    assert snapshot(pair).keys() == before.keys()
    after = snapshot(pair)
    for key in before.keys() - {"tensors", "attributes"}:
        assert before[key] == after[key], key
    assert torch.equal(logits(view), outputs)
    assert list(view.peft_config) == ["style", "detail"]
    assert view.active_adapters == ["detail"]
    with view.disable_adapter():
        assert torch.equal(logits(view), logits(tiny("llama")))
    view.save_pretrained(str(tmp_path))
    assert (tmp_path / "style" / "adapter_model.safetensors").exists()
    assert as_peft_model(view) is view


def test_a_view_of_a_classifier_keeps_the_trained_head():
    model = randomise(attach_lora(tiny("bert", task="classifier")))
    outputs = logits(model)
    view = as_peft_model(model)
    assert torch.equal(logits(view), outputs)
    assert list(model.classifier.modules_to_save) == ["default"]


def test_a_bare_model_has_no_view():
    with pytest.raises(AdapterNotFound, match="nothing to view"):
        as_peft_model(tiny("llama"))


def test_other_methods_have_a_view_too():
    for config in (peft.AdaLoraConfig(total_step=9), peft.LoHaConfig(r=4)):
        model = randomise(attach_lora(tiny("llama"), config=config))
        outputs = logits(model)
        assert torch.equal(logits(as_peft_model(model)), outputs)
