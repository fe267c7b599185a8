"""Calls of diffusers and of hf_lora in turn on one pipeline, and pipelines that are not the usual.

The judges: plain diffusers with the same file, peft, and the weights of before.
"""

import copy
import pickle

import diffusers
import peft
import pytest
import torch
from torch import nn
from transformers import CLIPTextModel

from hf_lora import (
    InvalidOption,
    LoraError,
    MergeError,
    UnsupportedHost,
    UnsupportedTarget,
    attach_lora,
    base_model,
    detach_lora,
    load_lora,
    merge_lora,
    save_lora,
    set_adapters,
    unmerge_lora,
)
from hf_lora.hosts import model_of
from hf_lora.testing import component_output, tiny, tiny_pipeline
from tests.support import assert_same, logits, randomise, snapshot, tuner_layers
from tests.test_pipeline_hosts import (
    ALPHA,
    BOTH,
    RANK,
    SECOND,
    adapted,
    assert_close,
    assert_equal,
    outputs,
)


@pytest.fixture(scope="module")
def style(tmp_path_factory):
    """A file for the denoiser and the text encoder."""
    file = tmp_path_factory.mktemp("style") / "style.safetensors"
    return str(save_lora(adapted(components=BOTH), file, name="style"))


@pytest.fixture(scope="module")
def detail(tmp_path_factory):
    """A file for the denoiser alone, of another rank."""
    file = tmp_path_factory.mktemp("detail") / "detail.safetensors"
    pipe = adapted(name="detail", seed=7, rank=6, alpha=5)
    return str(save_lora(pipe, file, name="detail"))


def ours(file, name="style"):
    pipe = tiny_pipeline("sd")
    load_lora(pipe, file, name=name)
    return pipe


def theirs(file, name="style"):
    pipe = tiny_pipeline("sd")
    pipe.load_lora_weights(file, adapter_name=name)
    return pipe


def sharing(pipe):
    """Another pipeline with the same models, which has no method of ours."""
    return diffusers.StableDiffusionImg2ImgPipeline(
        **pipe.components, requires_safety_checker=False
    )


# -- merged by merge_lora, then calls of diffusers -------------------------------------------------

REFUSED = {
    "set_adapters": lambda p, file: p.set_adapters("style", 0.3),
    "load_lora_weights": lambda p, file: p.load_lora_weights(file, adapter_name="other"),
    "hotswap": lambda p, file: p.load_lora_weights(file, adapter_name="style", hotswap=True),
    "fuse_lora": lambda p, file: p.fuse_lora(lora_scale=0.5),
    "unet.set_adapters": lambda p, file: p.unet.set_adapters(["style"], [0.3]),
    "unet.set_adapter": lambda p, file: p.unet.set_adapter("style"),
    "unet.add_adapter": lambda p, file: p.unet.add_adapter(
        peft.LoraConfig(target_modules=["to_q"]), "other"
    ),
    "unet.load_lora_adapter": lambda p, file: p.unet.load_lora_adapter(file, prefix="unet"),
    "unet.fuse_lora": lambda p, file: p.unet.fuse_lora(),
    "another pipeline": lambda p, file: sharing(p).set_adapters("style", 0.3),
}


@pytest.mark.parametrize("act", REFUSED.values(), ids=REFUSED)
def test_calls_that_a_merge_would_swallow_are_refused_and_change_nothing(act, style, detail):
    pipe = ours(style)
    merge_lora(pipe)
    merged, before = outputs(pipe), [snapshot(m) for m in (pipe.unet, pipe.text_encoder)]
    with pytest.raises(MergeError, match=r"merged into the weights of .* unmerge_lora\(host\)"):
        act(pipe, detail)
    assert_equal(outputs(pipe), merged)
    for model, held in zip((pipe.unet, pipe.text_encoder), before, strict=True):
        assert_same(held, snapshot(model))


@pytest.mark.filterwarnings(SECOND)
def test_after_unmerging_the_same_calls_do_what_they_do_in_plain_diffusers(style, detail):
    pipe, judge = ours(style), theirs(style)
    merge_lora(pipe)
    unmerge_lora(pipe)
    for each in (pipe, judge):
        each.set_adapters("style", 0.3)
    assert_equal(outputs(pipe), outputs(judge))
    for each in (pipe, judge):
        each.load_lora_weights(detail, adapter_name="detail")
        each.set_adapters(["style", "detail"], [0.5, 0.25])
    assert_equal(outputs(pipe), outputs(judge))


def test_a_merge_on_the_text_encoder_alone_holds_the_pipeline_too(style, detail):
    pipe = adapted(components=["text_encoder"])
    merge_lora(pipe)
    for act in (
        lambda: pipe.set_adapters("style", 0.3),
        lambda: pipe.load_lora_weights(detail, adapter_name="other"),
    ):
        with pytest.raises(MergeError, match="merged into the weights of CLIPTextModel"):
            act()
    assert "peft_config" not in vars(pipe.unet)


def test_merged_weights_whose_layers_are_gone_take_calls_of_diffusers(style, detail):
    pipe, judge = ours(style), theirs(style)
    merge_lora(pipe)
    judge.fuse_lora()
    for each in (pipe, judge):
        each.unload_lora_weights()
        each.load_lora_weights(detail, adapter_name="detail")
        each.set_adapters("detail", 0.5)
    assert_close(outputs(pipe), outputs(judge))


def test_inside_base_model_diffusers_changes_no_adapter(style):
    pipe = ours(style)
    before = outputs(pipe)
    with (
        base_model(pipe),
        pytest.raises(InvalidOption, match="inside base_model .* Do it after the block"),
    ):
        pipe.set_adapters("style", 0.3)
    assert_equal(outputs(pipe), before)


# -- fused by diffusers, then calls of ours --------------------------------------------------------


def test_what_others_merged_is_said_to_be_undone_by_their_call(style, detail, tmp_path):
    pipe = ours(style)
    plain = outputs(pipe)
    pipe.fuse_lora()
    acts = (
        lambda: load_lora(pipe, detail, name="detail"),
        lambda: set_adapters(pipe, "style", 0.5),
        lambda: attach_lora(pipe, name="other"),
        lambda: detach_lora(pipe),
        lambda: merge_lora(pipe),
        lambda: unmerge_lora(pipe),
        lambda: pipe.save_pretrained(tmp_path),
    )
    for act in acts:
        with pytest.raises(MergeError, match=r"unfuse_lora\(\) of the pipeline") as caught:
            act()
        assert "unmerge_lora(host)" not in str(caught.value)
    pipe.unfuse_lora()
    assert_close(outputs(pipe), plain)
    set_adapters(pipe, "style")
    assert_close(outputs(pipe), plain)


def test_what_peft_merged_is_said_to_be_undone_by_peft():
    model = peft.get_peft_model(tiny("llama"), peft.LoraConfig(target_modules=["q_proj"]))
    model.merge_adapter()
    for act in (lambda: set_adapters(model, "default", 0.5), lambda: unmerge_lora(model)):
        with pytest.raises(MergeError, match=r"call unmerge_adapter\(\) of the PeftModel"):
            act()
    model.unmerge_adapter()
    set_adapters(model, "default", 0.5)


# -- the scale of a fusing -------------------------------------------------------------------------

# peft says so of each layer; `unfuse_lora` of diffusers calls them all
UNMERGED = "ignore:Already unmerged. Nothing to do"
MERGED = "ignore:Already following adapters were merged"


def scalings(*models):
    return [
        float(x.scaling[n]) for m in models for x in tuner_layers(m).values() for n in x.scaling
    ]


WAYS = {
    "the denoiser": (lambda p: p.unet, lambda p: p.unet),
    "by another pipeline": (lambda p: sharing(p), lambda p: sharing(p)),
    "fused by one, unfused by another": (lambda p: p, lambda p: sharing(p)),
    "fused by another": (lambda p: sharing(p), lambda p: p),
    "a copy": (lambda p: p, lambda p: p),
}


@pytest.mark.parametrize("way", WAYS)
def test_half_strength_of_a_fusing_goes_away_with_it(way, detail):
    pipe, judge = ours(detail, "detail"), theirs(detail, "detail")
    plain, held = outputs(pipe), scalings(pipe.unet)
    fuser, unfuser = WAYS[way]
    fuser(pipe).fuse_lora(lora_scale=0.5)
    judge.unet.fuse_lora(lora_scale=0.5)
    assert_equal(outputs(pipe), outputs(judge))
    if way == "a copy":
        pipe = pickle.loads(pickle.dumps(copy.deepcopy(pipe)))
    unfuser(pipe).unfuse_lora()
    judge.unet.unfuse_lora()
    assert_close(outputs(pipe), plain)
    assert scalings(pipe.unet) == held
    assert scalings(judge.unet) == [scaling / 2 for scaling in held]  # what diffusers 0.42 leaves
    assert not any("unmerge" in vars(layer) for layer in tuner_layers(pipe.unet).values())


def test_the_text_encoder_gets_its_strength_back_by_any_pipeline(style):
    pipe = ours(style)
    plain, held = outputs(pipe), scalings(pipe.unet, pipe.text_encoder)
    pipe.fuse_lora(lora_scale=0.5)
    sharing(pipe).unfuse_lora()
    assert_close(outputs(pipe), plain)
    assert scalings(pipe.unet, pipe.text_encoder) == held


def test_a_strength_that_diffusers_sets_while_fused_spoils_no_weight_and_stays(detail):
    pipe, judge = ours(detail, "detail"), theirs(detail, "detail")
    bare = snapshot(tiny_pipeline("sd").unet)["tensors"]
    for each in (pipe, judge):
        each.fuse_lora(lora_scale=0.5, components=["unet"])
        each.set_adapters("detail", 0.25)
        each.unfuse_lora(components=["unet"])

    def drift(each):
        layers = tuner_layers(each.unet).items()
        return max((x.base_layer.weight - bare[f"{n}.weight"]).abs().max() for n, x in layers)

    assert drift(pipe) < 1e-6  # one float32 addition and its way back
    assert drift(judge) > 1e-3  # peft takes out a quarter of what went in as a half
    fresh = theirs(detail, "detail")
    fresh.set_adapters("detail", 0.25)
    assert_close(outputs(pipe), outputs(fresh))


@pytest.mark.filterwarnings(SECOND, MERGED, UNMERGED)
def test_two_fusings_one_after_the_other_come_out_whole(style, detail):
    pipe = ours(detail, "detail")
    load_lora(pipe, style, name="style")
    set_adapters(pipe, ["style", "detail"], [0.5, 0.25])
    plain, held = outputs(pipe), scalings(pipe.unet, pipe.text_encoder)
    pipe.fuse_lora(adapter_names=["style"], lora_scale=0.5)
    pipe.fuse_lora(adapter_names=["detail"], lora_scale=0.5)
    pipe.unfuse_lora()
    assert_close(outputs(pipe), plain)
    assert scalings(pipe.unet, pipe.text_encoder) == held


@pytest.mark.filterwarnings(UNMERGED)
def test_a_fusing_that_fails_or_passes_layers_by_leaves_their_strength(style, detail):
    pipe = ours(style)
    held = scalings(pipe.unet, pipe.text_encoder)
    pipe.fuse_lora(components=["unet"], lora_scale=0.5)
    assert scalings(pipe.text_encoder) == held[-len(scalings(pipe.text_encoder)) :]
    set_by_hand = [0.75 * s for s in scalings(pipe.text_encoder)]
    for layer in tuner_layers(pipe.text_encoder).values():
        layer.scale_layer(0.75)
    pipe.unfuse_lora()
    assert scalings(pipe.text_encoder) == set_by_hand
    pipe = ours(detail, "detail")
    held = scalings(pipe.unet)
    layers = list(tuner_layers(pipe.unet).values())
    layers[-1].lora_A["detail"].weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="NaNs detected"):
        pipe.fuse_lora(lora_scale=0.5, safe_fusing=True, components=["unet"])
    pipe.unfuse_lora(components=["unet"])
    assert scalings(pipe.unet) == held


# -- one model in two places; new tokens -----------------------------------------------------------


def twins():
    pipe = tiny_pipeline("wan")
    pipe.transformer_2 = pipe.transformer
    return pipe


@pytest.mark.filterwarnings(SECOND)
def test_a_model_that_is_two_components_has_its_adapters_once(tmp_path):
    files = [
        save_lora(
            adapted("wan", components=["transformer"], seed=seed),
            tmp_path / f"{seed}.safetensors",
            name="style",
        )
        for seed in (1, 5)
    ]
    pipe, judge, one = twins(), tiny_pipeline("wan"), tiny_pipeline("wan").transformer
    bare = component_output(one)
    for name, file in zip("ab", files, strict=True):
        load_lora(pipe, file, name=name)
        judge.load_lora_weights(str(file), adapter_name=name)
        assert torch.equal(
            component_output(pipe.transformer_2), component_output(judge.transformer)
        )
        assert pipe.get_active_adapters() == [name]
    set_adapters(pipe, {"a": {"transformer": 0.5}, "b": 0.25})
    judge.set_adapters(["a", "b"], [0.5, 0.25])
    mixed = component_output(pipe.transformer)
    assert torch.equal(mixed, component_output(judge.transformer))
    merge_lora(pipe)
    merged = component_output(pipe.transformer)
    assert torch.allclose(merged, mixed, rtol=0, atol=2e-6)  # rounded merged weights
    unmerge_lora(pipe)
    assert torch.equal(component_output(pipe.transformer), mixed)
    detach_lora(pipe, "b")
    assert pipe.get_active_adapters() == ["a"]
    detach_lora(pipe)
    assert torch.equal(component_output(pipe.transformer), bare)
    attach_lora(pipe, rank=RANK)
    assert any(p.requires_grad for p in pipe.transformer.parameters())
    assert pipe.get_active_adapters() == ["default"]
    with pytest.raises(InvalidOption, match="transformer_2 is the same model as transformer"):
        attach_lora(pipe, components=["transformer_2"], name="other")


def with_token(pipe):
    pipe.load_textual_inversion({"<toy>": torch.ones(32)}, token="<toy>")
    return pipe


def test_a_textual_inversion_leaves_the_base_the_one_of_the_file(style, tmp_path):
    pipe, judge = with_token(tiny_pipeline("sd")), with_token(tiny_pipeline("sd"))
    report = load_lora(pipe, style, name="style")
    judge.load_lora_weights(style, adapter_name="style")
    assert report.verified
    assert "not compared: embeddings.token_embedding.weight" in report.base
    assert_equal(outputs(pipe), outputs(judge))
    # and the other way round: made with the new token, loaded without
    file = save_lora(pipe, tmp_path, name="style")
    assert load_lora(tiny_pipeline("sd"), file).verified
    other = with_token(tiny_pipeline("sd"))
    next(iter(other.text_encoder.encoder.parameters())).data.mul_(1.01)
    with pytest.raises(LoraError, match="1 of 13 weights of text_encoder differ"):
        load_lora(other, style)


def test_a_language_model_with_new_tokens_takes_the_adapters_of_before(tmp_path):
    made = randomise(attach_lora(tiny("llama"), rank=RANK, alpha=ALPHA))
    folder = save_lora(made, tmp_path)
    model, judge = tiny("llama"), tiny("llama")
    for each in (model, judge):
        each.resize_token_embeddings(104, mean_resizing=False)
    report = load_lora(model, folder)
    judge.load_adapter(str(folder))
    assert report.verified
    assert "2 of another number of tokens not compared: embed_tokens.weight" in report.base
    assert torch.equal(logits(model)[..., :96], logits(judge)[..., :96])  # the new rows are random


# -- hosts that are none ---------------------------------------------------------------------------


class Plain(nn.Module):
    pass


@pytest.mark.parametrize(
    ("host", "words"),
    [
        (diffusers.StableDiffusionPipeline, r"StableDiffusionPipeline\.from_pretrained\(\.\.\.\)"),
        (diffusers.UNet2DConditionModel, r"UNet2DConditionModel\.from_pretrained\(\.\.\.\)"),
        (CLIPTextModel, r"CLIPTextModel\.from_pretrained\(\.\.\.\)"),
        (Plain, r"Plain\(\.\.\.\)"),
    ],
)
def test_a_class_is_not_yet_a_host(host, words, style):
    for act in (attach_lora, detach_lora, merge_lora, model_of, lambda h: load_lora(h, style)):
        with pytest.raises(UnsupportedHost, match=f"not the class .* Load it first: {words}"):
            act(host)


@pytest.mark.parametrize("config", [None, peft.LoHaConfig(r=RANK, alpha=ALPHA)])
def test_factors_made_on_meta_are_called_what_they_are(config):
    pipe = tiny_pipeline("sd")
    before = snapshot(pipe.unet)
    with (
        torch.device("meta"),
        pytest.raises(UnsupportedHost, match=r"factors of adapters .* outside of torch\.device"),
    ):
        attach_lora(pipe, config=config)
    assert_same(before, snapshot(pipe.unet))


@pytest.mark.filterwarnings(SECOND)
def test_methods_that_do_not_mix_are_named():
    pipe = adapted(config=peft.LoHaConfig(r=RANK, alpha=ALPHA))
    with pytest.raises(UnsupportedTarget, match=r"another method \(loha and lora\)"):
        attach_lora(pipe, targets=["to_q"], name="other")
