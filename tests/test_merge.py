"""Merge and unmerge: equal outputs merged, equal bits after, nothing lost when it fails."""

import peft
import pytest
import torch

from hf_lora import (
    as_peft_model,
    attach_lora,
    detach_lora,
    merge_lora,
    save_lora,
    set_adapters,
    unmerge_lora,
)
from hf_lora.errors import AdapterNotFound, InvalidOption, MergeError
from hf_lora.testing import tiny
from tests.support import ALPHA, RANK, assert_same, logits, randomise, snapshot, tuner_layers

FAMILIES = ["llama", "gpt2", "bert", "t5"]


def _attached(family="llama", dtype=torch.float32, **options):
    model = tiny(family).to(dtype)
    return randomise(attach_lora(model, **({"rank": RANK, "alpha": ALPHA} | options)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_merge_then_unmerge_restores_every_bit(family, dtype):
    model = _attached(family, dtype)
    before, outputs = snapshot(model), logits(model)
    for _ in range(3):
        assert merge_lora(model) is model
        merged = {k: v for k, v in model.state_dict().items() if k.endswith("base_layer.weight")}
        assert any(not torch.equal(v, before["tensors"][k]) for k, v in merged.items())
        unmerge_lora(model)
    after = snapshot(model)
    for held in (before, after):
        held["attributes"] = None  # the record remembers that nothing is merged
    assert_same(before, after)
    assert torch.equal(logits(model), outputs)


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_outputs_equal_the_dense_float64_reference(family):
    model = _attached(family).double()
    base = {k: v.clone() for k, v in model.state_dict().items()}
    merge_lora(model)
    for path, layer in tuner_layers(model).items():
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        delta = ALPHA / RANK * (b @ a)
        delta = delta.T if layer.fan_in_fan_out else delta
        wanted = base[f"{path}.base_layer.weight"] + delta
        # one float64 rounding of products around 0.05
        assert torch.allclose(layer.base_layer.weight, wanted, rtol=0, atol=1e-15)


def test_merged_outputs_equal_those_of_plain_peft():
    model, theirs = _attached(), _attached()
    merge_lora(model)
    for layer in tuner_layers(theirs).values():
        layer.merge()
    assert torch.equal(logits(model), logits(theirs))


def test_the_copy_is_no_part_of_the_state_dict():
    model = _attached()
    keys = set(model.state_dict())
    merge_lora(model)
    assert set(model.state_dict()) == keys


def test_the_bytes_kept_are_logged(caplog):
    model = _attached(targets="attn.q")
    with caplog.at_level("INFO", logger="hf_lora"):
        merge_lora(model)
    assert f"{2 * 32 * 32 * 4} bytes" in caplog.text  # two 32x32 float32 weights


def test_without_a_copy_merge_works_and_unmerge_refuses():
    model = _attached()
    outputs = logits(model)
    merge_lora(model, keep=None)
    assert torch.allclose(logits(model), outputs, atol=1e-6)  # fp32 rounding of the sum
    with pytest.raises(MergeError, match="no copy of the base weights"):
        unmerge_lora(model)


def test_a_named_adapter_is_merged_and_the_active_one_comes_back():
    model = _attached(name="first", targets="attention")
    randomise(attach_lora(model, name="second", targets="mlp"), seed=6)
    second = logits(model)
    set_adapters(model, "first")
    first = logits(model)
    set_adapters(model, "second")
    merge_lora(model, "first")
    assert torch.allclose(logits(model), first, atol=1e-6)  # fp32 rounding of the sum
    unmerge_lora(model)
    assert model.active_adapters() == ["second"]
    assert torch.equal(logits(model), second)


def test_several_adapters_merge_together():
    model = _attached(name="first", targets="attention")
    randomise(attach_lora(model, name="second", targets="default"), seed=6)
    set_adapters(model, ["first", "second"], [0.5, 2.0])
    both, before = logits(model), snapshot(model)
    merge_lora(model)
    assert torch.allclose(logits(model), both, atol=1e-5)  # fp32 rounding, two sums
    unmerge_lora(model)
    assert torch.equal(logits(model), both)
    assert before["requires_grad"] == snapshot(model)["requires_grad"]


def test_dora_merges_and_returns():
    model = randomise(attach_lora(tiny("llama"), config=peft.LoraConfig(r=4, use_dora=True)))
    outputs = logits(model)
    merge_lora(model)
    assert torch.allclose(logits(model), outputs, atol=1e-5)  # norm and scale round in fp32
    unmerge_lora(model)
    assert torch.equal(logits(model), outputs)


def test_a_merged_host_can_still_be_saved(tmp_path):
    model = _attached()
    save_lora(model, tmp_path / "before")
    merge_lora(model)
    save_lora(model, tmp_path / "merged")
    one, two = ((tmp_path / n / "adapter_model.safetensors") for n in ("before", "merged"))
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (lambda m: attach_lora(m, name="more"), "attach another adapter"),
        (lambda m: set_adapters(m, "default", 0.5), "change adapters"),
        (lambda m: merge_lora(m), "merge again"),
    ],
)
def test_what_would_falsify_merged_weights_is_refused(act, words):
    model = _attached()
    merge_lora(model)
    outputs = logits(model)
    with pytest.raises(MergeError, match=words):
        act(model)
    assert torch.equal(logits(model), outputs)
    unmerge_lora(model)


def test_a_weight_tied_to_another_is_not_merged():
    model = tiny("gpt2")  # its head and embedding are one tensor
    with pytest.warns(UserWarning, match="tie_word_embeddings"):
        randomise(attach_lora(model, targets=["lm_head", "c_fc"]))
    before = snapshot(model)
    with pytest.raises(MergeError, match=r"lm_head\.weight is tied to transformer\.wte\.weight"):
        merge_lora(model)
    assert_same(before, snapshot(model))


def test_values_that_are_not_finite_are_not_merged():
    model = _attached()
    layer = tuner_layers(model)["model.layers.1.mlp.up_proj"]
    layer.lora_B["default"].weight.data[0, 0] = float("nan")
    before = {k: v.clone() for k, v in model.state_dict().items() if "base_layer" in k}
    with pytest.raises(MergeError, match=r"NaN or infinite values at model\.layers\.1\.mlp"):
        merge_lora(model)
    assert all(torch.equal(before[k], model.state_dict()[k]) for k in before)


def test_an_adapter_bias_without_a_base_bias_is_refused_before_anything_changes():
    config = peft.LoraConfig(r=4, lora_bias=True)
    with pytest.warns(UserWarning, match="has no bias"):
        model = attach_lora(tiny("llama"), config=config)
    before = snapshot(model)
    with pytest.raises(MergeError, match="has a bias at"):
        merge_lora(model)
    assert_same(before, snapshot(model))


@pytest.mark.parametrize("keep", ["cpu", None])
def test_a_merge_that_fails_midway_is_rolled_back(monkeypatch, keep):
    model = _attached()
    outputs, before = logits(model), snapshot(model)
    last = list(tuner_layers(model).values())[-1]

    def broken(**_):
        raise RuntimeError("disk on fire")

    monkeypatch.setattr(last, "merge", broken)
    with pytest.raises(MergeError, match=r"peft cannot merge .*: disk on fire"):
        merge_lora(model, keep=keep)
    monkeypatch.undo()
    after = snapshot(model)
    assert before["requires_grad"] == after["requires_grad"]
    if keep == "cpu":
        assert torch.equal(logits(model), outputs)
    else:  # peft subtracts what it added, which rounds
        assert torch.allclose(logits(model), outputs, atol=1e-6)


def test_merge_errors_name_what_is_there():
    with pytest.raises(AdapterNotFound, match="has no adapter"):
        merge_lora(tiny("llama"))
    model = _attached()
    with pytest.raises(MergeError, match="nothing is merged"):
        unmerge_lora(model)
    with pytest.raises(InvalidOption, match="keep='gpu'"):
        merge_lora(model, keep="gpu")
    with pytest.raises(AdapterNotFound, match="It has 'default'"):
        merge_lora(model, "defult")


def test_a_merge_by_peft_itself_is_named_and_not_touched():
    model = _attached()
    for layer in tuner_layers(model).values():
        layer.merge()
    with pytest.raises(MergeError, match="no copy of the base weights"):
        unmerge_lora(model)


@pytest.mark.parametrize(
    "meddle",
    [
        lambda m: [x.unmerge() for x in tuner_layers(m).values()],
        lambda m: (m.disable_adapters(), logits(m), m.enable_adapters()),
    ],
    ids=["unmerge", "disable"],
)
def test_a_merge_undone_by_others_is_still_restored_to_the_bit(meddle):
    model = tiny("llama")
    bare = {k: v.clone() for k, v in model.state_dict().items()}
    randomise(attach_lora(model))
    merge_lora(model)
    meddle(model)
    with pytest.raises(MergeError, match="attach another"):
        attach_lora(model, name="more")
    detach_lora(model)
    assert all(torch.equal(bare[k], v) for k, v in model.state_dict().items())


def test_a_merged_host_has_no_peft_view():
    model = _attached()
    merge_lora(model)
    with pytest.raises(MergeError, match="view it as a PeftModel"):
        as_peft_model(model)
    unmerge_lora(model)


def test_nothing_active_is_nothing_to_merge():
    model = _attached()
    set_adapters(model, [])
    with pytest.raises(MergeError, match="no adapter .* is active"):
        merge_lora(model)


def test_a_computed_weight_is_not_merged():
    block = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(8, 8), "k_proj": torch.nn.Linear(8, 8)})
    torch.nn.utils.parametrizations.weight_norm(block["q_proj"])
    block["k_proj"].register_forward_hook(lambda *_: None)
    for name in block:
        model = torch.nn.ModuleList([block])
        randomise(attach_lora(model, targets=[name]))
        with pytest.raises(MergeError, match="computed by a hook or parametrization"):
            merge_lora(model)
        detach_lora(model)
