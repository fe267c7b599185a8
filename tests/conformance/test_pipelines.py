"""Adapters of pipelines: our files in plain diffusers and theirs in ours, to the last bit."""

import peft
import pytest
import torch

from hf_lora import (
    AdapterMismatch,
    AdapterNotFound,
    attach_lora,
    base_model,
    detach_lora,
    load_lora,
    merge_lora,
    open_adapter,
    save_lora,
    set_adapters,
    unmerge_lora,
)
from hf_lora.hosts import parts_of
from hf_lora.testing import component_output, tiny_pipeline
from tests.support import ALPHA, RANK, as_foreign, assert_same, randomise, snapshot

UNET = {"target_modules": ["to_q", "to_v", "to_out.0", "conv1", "proj_in"]}
TEXT = {"target_modules": ["q_proj", "v_proj"]}
DIT = {"target_modules": ["to_q", "to_k", "proj_out"]}
PARTS = {
    "sd": {"unet": UNET, "text_encoder": TEXT},
    "sdxl": {"unet": UNET, "text_encoder": TEXT, "text_encoder_2": TEXT},
    "flux": {"transformer": DIT, "text_encoder": TEXT},
}
OPTIONS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q": 3}, "alpha_pattern": {"q": 7}},
    "dora": {"use_dora": True},
}
CASES = [("sd", option) for option in OPTIONS] + [("sdxl", "plain"), ("flux", "patterns")]


def adapted(kind, option="plain", name="default"):
    """A pipeline with an adapter that plain diffusers attached, alpha unlike rank."""
    pipe = tiny_pipeline(kind)
    for seed, (part, fields) in enumerate(PARTS[kind].items()):
        query = fields["target_modules"][0]
        extra = {
            field: {query: value["q"]} if isinstance(value, dict) else value
            for field, value in OPTIONS[option].items()
        }
        config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, **fields, **extra)
        getattr(pipe, part).add_adapter(config, name)
        randomise(getattr(pipe, part), seed=seed)
    return pipe


def outputs(pipe):
    return {name: component_output(part) for name, part in parts_of(pipe).items()}


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


def snapshots(pipe):
    return {name: snapshot(part) for name, part in parts_of(pipe).items()}


def assert_untouched(before, pipe):
    for name, after in snapshots(pipe).items():
        assert_same(before[name], after)


@pytest.mark.parametrize(("kind", "option"), CASES)
def test_our_file_is_read_by_plain_diffusers_and_by_us(kind, option, tmp_path):
    pipe = adapted(kind, option)
    bare = outputs(tiny_pipeline(kind))
    wanted = outputs(pipe)
    assert all(not torch.equal(bare[n], wanted[n]) for n in PARTS[kind])
    save_lora(pipe, tmp_path)
    theirs, ours = tiny_pipeline(kind), tiny_pipeline(kind)
    theirs.load_lora_weights(str(tmp_path))
    report = load_lora(ours, tmp_path)
    assert_equal(outputs(theirs), wanted)
    assert_equal(outputs(ours), wanted)
    assert report.verified
    assert report.components.keys() == PARTS[kind].keys()
    assert ours.get_active_adapters() == ["default"]
    assert set(ours.get_list_adapters()) == set(PARTS[kind])


@pytest.mark.parametrize(("kind", "option"), CASES)
def test_a_file_of_plain_diffusers_is_read_by_us(kind, option, tmp_path):
    pipe = adapted(kind, option)
    layers = {
        f"{part}_lora_layers": peft.get_peft_model_state_dict(getattr(pipe, part))
        for part in PARTS[kind]
    }
    facts = {
        f"{part}_lora_adapter_metadata": getattr(pipe, part).peft_config["default"].to_dict()
        for part in PARTS[kind]
    }
    for config in facts.values():
        config["target_modules"] = sorted(config["target_modules"])
        config.pop("runtime_config", None)
    pipe.save_lora_weights(tmp_path, **layers, **facts)
    ours = tiny_pipeline(kind)
    report = load_lora(ours, tmp_path)
    assert_equal(outputs(ours), outputs(pipe))
    assert not report.verified
    assert "carries no fingerprint" in report.base


def test_a_file_without_alpha_is_scaled_as_diffusers_scales_it_and_the_report_says_so(tmp_path):
    file = as_foreign(save_lora(adapted("sd"), tmp_path / "style.safetensors"))
    theirs, ours = tiny_pipeline("sd"), tiny_pipeline("sd")
    theirs.load_lora_weights(str(file))
    report = load_lora(ours, file)
    assert_equal(outputs(ours), outputs(theirs))
    assert "states no alpha" in report.repairs[0]


def test_a_load_and_detach_leave_no_trace(tmp_path):
    save_lora(adapted("sd"), tmp_path)
    pipe = tiny_pipeline("sd")
    before = snapshots(pipe)
    load_lora(pipe, tmp_path)
    for part in ("unet", "text_encoder"):
        detach_lora(getattr(pipe, part))
    assert_untouched(before, pipe)


def test_strengths_merge_and_base_work_on_what_was_loaded(tmp_path):
    save_lora(adapted("sd"), tmp_path)
    pipe, bare = tiny_pipeline("sd"), outputs(tiny_pipeline("sd"))
    load_lora(pipe, tmp_path, name="style")
    full = outputs(pipe)
    with base_model(pipe):
        assert_equal(outputs(pipe), bare)
    set_adapters(pipe, "style", {"unet": 0.0})
    mixed = outputs(pipe)
    assert torch.equal(mixed["unet"], bare["unet"])
    assert torch.equal(mixed["text_encoder"], full["text_encoder"])
    set_adapters(pipe, "style")
    merge_lora(pipe)
    for name, merged in outputs(pipe).items():
        assert torch.allclose(merged, full[name], rtol=0, atol=1e-5)  # one fp32 rounding a weight
    unmerge_lora(pipe)
    assert_equal(outputs(pipe), full)


def test_a_pipeline_without_the_text_encoder_is_a_mismatch_unless_asked(tmp_path):
    save_lora(adapted("sd"), tmp_path)
    pipe = tiny_pipeline("sd")
    pipe.text_encoder = None
    before = snapshots(pipe)
    with pytest.raises(AdapterMismatch, match=r"for text_encoder as well.*strict=False"):
        load_lora(pipe, tmp_path)
    assert_untouched(before, pipe)
    report = load_lora(pipe, tmp_path, strict=False)
    assert report.skipped == ("text_encoder",)
    assert report.components.keys() == {"unet"}


def test_model_and_pipeline_adapters_are_told_apart(tmp_path):
    pipe = adapted("sd")
    save_lora(pipe, tmp_path / "pipe")
    save_lora(pipe.unet, tmp_path / "unet")
    whole = tiny_pipeline("sd")
    load_lora(whole, tmp_path / "unet")  # it has its place in one component only
    assert torch.equal(component_output(whole.unet), component_output(pipe.unet))
    with pytest.raises(AdapterMismatch, match=r"for a single model.*load_lora\(pipe\.transformer"):
        load_lora(tiny_pipeline("flux"), tmp_path / "unet")
    with pytest.raises(AdapterMismatch, match="for a pipeline with .*Load it into the pipeline"):
        load_lora(tiny_pipeline("sd").unet, tmp_path / "pipe")
    fresh = tiny_pipeline("sd")
    load_lora(fresh.unet, tmp_path / "unet")
    assert torch.equal(component_output(fresh.unet), component_output(pipe.unet))


def test_a_failure_in_the_last_component_leaves_all_untouched(tmp_path):
    save_lora(adapted("sd"), tmp_path)
    pipe = tiny_pipeline("sd")
    pipe.unet = tiny_pipeline("sd", seed=1).unet  # the text encoder fits, the unet does not
    before = snapshots(pipe)
    with pytest.raises(AdapterMismatch, match="another base: .* weights of unet differ"):
        load_lora(pipe, tmp_path)
    assert_untouched(before, pipe)
    report = load_lora(pipe, tmp_path, strict=False)
    assert not report.verified
    assert "unet mismatched" in report.base
    assert "text_encoder matched" in report.base


def test_other_adapters_become_inactive_in_every_component(tmp_path):
    pipe = adapted("sd", name="first")
    only = tiny_pipeline("sd")
    attach_lora(only.unet, targets="attention", name="second")
    save_lora(only, tmp_path, name="second")
    load_lora(pipe, tmp_path, name="second")
    bare = outputs(tiny_pipeline("sd"))
    assert torch.equal(outputs(pipe)["text_encoder"], bare["text_encoder"])


def test_the_digest_is_the_same_with_and_without_text_model(tmp_path):
    pipe = adapted("sd")
    flat = open_adapter(save_lora(pipe, tmp_path / "flat"))
    part = flat.components["text_encoder"]
    nested = type(part)(part.config, {f"text_model.{p}": f for p, f in part.targets.items()})
    other = type(flat)({**flat.components, "text_encoder": nested})
    assert other.digest == flat.digest
    fresh = tiny_pipeline("sd")
    report = load_lora(fresh, other)
    assert_equal(outputs(fresh), outputs(pipe))
    assert any("spelt as in other versions" in note for note in report.notes)


def test_a_name_that_no_component_has_is_not_saved(tmp_path):
    with pytest.raises(AdapterNotFound, match="has no adapter 'styl'. It has 'style'"):
        save_lora(adapted("sd", name="style"), tmp_path, name="styl")
