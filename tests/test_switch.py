"""set_adapters and as_peft_model: strengths are true, views are free, nothing else moves."""

import copy
from fractions import Fraction

import numpy as np
import peft
import pytest
import torch
from peft.tuners.lora.variants import DoraLinearVariant

from hf_lora import (
    as_peft_model,
    attach_lora,
    base_model,
    detach_lora,
    load_lora,
    merge_lora,
    save_lora,
    set_adapters,
)
from hf_lora.errors import (
    AdapterNotFound,
    InvalidOption,
    MergeError,
    UnsupportedHost,
    UnsupportedTarget,
)
from hf_lora.hosts import parts_of
from hf_lora.testing import tiny, tiny_batch
from hf_lora.testing.pipelines import component_output, tiny_pipeline
from tests.support import ALPHA, RANK, assert_same, logits, randomise, snapshot, tuner_layers

TARGETS = ["q_proj", "up_proj"]
KINDS = {
    "lora": peft.LoraConfig(r=4),
    "dora": peft.LoraConfig(r=4, use_dora=True),
    "adalora": peft.AdaLoraConfig(init_r=4, lora_alpha=11, total_step=9),
    "loha": peft.LoHaConfig(r=4),
    "lokr": peft.LoKrConfig(r=4),
    "ia3": peft.IA3Config(feedforward_modules=["up_proj"]),
    "oft": peft.OFTConfig(r=0, oft_block_size=4),
    "hra": peft.HRAConfig(r=4),
    "c3a": peft.C3AConfig(block_size=4),
    "miss": peft.MissConfig(r=4),
}


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


@pytest.mark.parametrize("weight", [np.float32(0.5), np.float64(0.5), Fraction(1, 2)], ids=repr)
def test_a_weight_is_any_real_number(pair, weight):
    for arguments in (("style", weight), ({"style": weight},), (["style"], [weight])):
        set_adapters(pair, *arguments)
        assert set(_scalings(pair, "style").values()) == {0.5 * ALPHA / RANK}


def test_none_is_weight_one_in_a_mapping_as_in_a_list(pair):
    set_adapters(pair, "style", 0.5)
    set_adapters(pair, {"style": None})
    assert set(_scalings(pair, "style").values()) == {ALPHA / RANK}


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
        ("style", {0: 0.5}, InvalidOption, "0 in the weights of 'style' is no module path"),
        ("style", {None: 0.5}, InvalidOption, "None in the weights of 'style' is no module path"),
        ("style", {1: 0.5, "x": 0.2}, InvalidOption, "1 in the weights of 'style'"),
        ("style", 10**400, InvalidOption, "not finite"),
        ("style", {"model.layers": -(10**400)}, InvalidOption, "not finite"),
        ({3: 0.5}, None, InvalidOption, "no adapter name"),
        ("style", np.bool_(True), InvalidOption, "no number"),
    ],
)
def test_bad_weights_change_nothing(pair, names, weights, error, words):
    before = (pair.active_adapters(), _scalings(pair, "style"), snapshot(pair)["requires_grad"])
    with pytest.raises(error, match=words) as caught:
        set_adapters(pair, names, weights)
    assert caught.value.field or "given twice" in words
    after = (pair.active_adapters(), _scalings(pair, "style"), snapshot(pair)["requires_grad"])
    assert before == after


def _of_kind(kind, name="default", model=None, seed=0):
    """A model with an adapter of a kind that does something, at strength 1."""
    config = copy.deepcopy(KINDS[kind])
    config.target_modules = TARGETS
    torch.manual_seed(seed)
    model = attach_lora(tiny("llama") if model is None else model, config=config, name=name)
    for number, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
        generator = torch.Generator().manual_seed(seed + number)
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def _steering(model):
    """What a strength may leave on the layers: variants and attributes."""
    return {
        path: (
            type(x),
            set(vars(x)),
            {n: type(v) for n, v in getattr(x, "lora_variant", {}).items()},
        )
        for path, x in tuner_layers(model).items()
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_zero_is_the_base_and_one_the_adapter_to_the_bit(kind, dtype):
    model = _of_kind(kind, model=tiny("llama").to(dtype))
    once, before, steering = logits(model), snapshot(model), _steering(model)
    with base_model(model):
        bare = logits(model)
    assert (once - bare).abs().max() > 1e-3  # it does something
    set_adapters(model, "default", 0.5)
    half = logits(model)
    assert not torch.equal(half, once)
    assert not torch.equal(half, bare)
    set_adapters(model, "default", 0)
    assert torch.equal(logits(model), bare)
    set_adapters(model, "default", 1)
    assert torch.equal(logits(model), once)
    assert_same(before, snapshot(model))
    assert _steering(model) == steering


@pytest.mark.parametrize("kind", ["dora", "ia3", "c3a"])
def test_detach_takes_strengths_off_with_the_adapter(kind):
    model = _of_kind(kind, name="one")
    steering = _steering(model)
    _of_kind(kind, name="two", model=model, seed=50)
    set_adapters(model, ["one", "two"], [1.0, 0.5])
    detach_lora(model, "two")
    assert _steering(model) == steering
    set_adapters(model, "one", 0.5)
    assert _steering(model) != steering
    detach_lora(model)
    assert torch.equal(logits(model), logits(tiny("llama")))


def test_training_after_strength_one_is_pefts_own():
    model, other = _of_kind("dora"), _of_kind("dora")
    set_adapters(model, "default", 0.3)
    set_adapters(model, "default", 1)
    for each in (model, other):
        each(**tiny_batch(each)).loss.backward()
    layers = tuner_layers(model)
    assert {type(x.lora_variant["default"]) for x in layers.values()} == {DoraLinearVariant}
    grads = {n: p.grad for n, p in other.named_parameters() if p.requires_grad}
    assert grads
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter.grad, grads[name])


@pytest.mark.parametrize("kind", ["dora", "c3a"])
def test_updates_add_up_whatever_the_order(kind):
    outputs = []
    for names in (["one", "two"], ["two", "one"]):
        model = _of_kind(kind, name="one")
        _of_kind(kind, name="two", model=model, seed=50)
        set_adapters(model, names, [0.5, 0.8] if names[0] == "one" else [0.8, 0.5])
        outputs.append(logits(model))
    assert torch.allclose(*outputs, atol=1e-6)  # fp32 rounding of the sum


def test_peft_still_makes_the_order_of_dora_matter():
    outputs = []
    for names in (["one", "two"], ["two", "one"]):
        model = _of_kind("dora", name="one")
        _of_kind("dora", name="two", model=model, seed=50)
        model.set_adapter(names)
        outputs.append(logits(model))
    assert (outputs[0] - outputs[1]).abs().max() > 1e-3  # else the variants here can go


def test_peft_still_has_no_true_scale_for_these():
    for kind in ("adalora", "dora"):
        model = _of_kind(kind)
        with base_model(model):
            bare = logits(model)
        once = logits(model)
        for layer in tuner_layers(model).values():
            layer.set_scale("default", 1.0 if kind == "adalora" else 0.0)
        off = once if kind == "adalora" else bare
        assert (logits(model) - off).abs().max() > 1e-3  # else the special ways here can go
    with pytest.raises(AttributeError, match="scaling"):
        next(iter(tuner_layers(_of_kind("oft")).values())).set_scale("default", 0.5)


@pytest.mark.parametrize("kind", ["dora", "ia3"])
def test_a_loaded_adapter_takes_any_scale(kind, tmp_path):
    model = _of_kind(kind)
    save_lora(model, tmp_path)
    set_adapters(model, "default", 0.4)
    other = tiny("llama")
    load_lora(other, tmp_path, scale=0.4)
    assert torch.equal(logits(other), logits(model))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "adalora"])  # in no file
@pytest.mark.parametrize("again", ["load", "attach", "theirs"])
def test_a_later_adapter_of_the_name_starts_at_strength_one(kind, again, tmp_path):
    model = _of_kind(kind)
    once = logits(model)
    save_lora(model, tmp_path)
    set_adapters(model, "default", 0.0)
    model.delete_adapter("default")  # transformers' own, which knows no strengths
    if again == "load":
        load_lora(model, tmp_path)
    elif again == "attach":
        _of_kind(kind, model=model)
    else:
        model.load_adapter(str(tmp_path))
    assert torch.equal(logits(model), once)


def test_diffusers_and_hf_lora_set_the_scale_of_dora_in_turn():
    pipe, theirs = tiny_pipeline("sd"), tiny_pipeline("sd")
    for each in (pipe, theirs):
        config = peft.LoraConfig(r=4, use_dora=True, target_modules=["to_q", "to_v"])
        randomise(attach_lora(each.unet, config=config, name="do"))
    once = component_output(pipe.unet)
    theirs.set_adapters("do", 0.5)
    half = component_output(theirs.unet)
    pipe.set_adapters("do", 0.5)
    assert torch.equal(component_output(pipe.unet), half)
    set_adapters(pipe, "do", 1.0)
    assert torch.equal(component_output(pipe.unet), once)
    for weight, wanted in ((1.0, once), (0.5, half)):
        set_adapters(pipe, "do", 0.25)
        assert not torch.equal(component_output(pipe.unet), wanted)
        pipe.set_adapters("do", weight)
        assert torch.equal(component_output(pipe.unet), wanted)


def test_a_failed_change_takes_the_strengths_back():
    model = _of_kind("ia3")
    outputs, steering = logits(model), _steering(model)
    last = list(tuner_layers(model).values())[-1]
    real = last.forward
    last.forward = lambda *a: real(*a)
    with pytest.raises(UnsupportedTarget, match="a forward of its own"):
        set_adapters(model, "default", 0.5)
    del last.forward
    assert torch.equal(logits(model), outputs)
    assert _steering(model) == steering


_CHANGES = {
    "set": lambda m, d: set_adapters(m, "default"),
    "attach": lambda m, d: attach_lora(m, name="second"),
    "load": lambda m, d: load_lora(m, d, name="second"),
    "merge": lambda m, d: merge_lora(m, "default"),
    "detach": lambda m, d: detach_lora(m),
    "view": lambda m, d: as_peft_model(m),
}


@pytest.mark.parametrize("change", _CHANGES)
def test_adapters_do_not_change_inside_base_model(change, tmp_path):
    model = randomise(attach_lora(tiny("llama")))
    save_lora(model, tmp_path)
    before, adapted, bare = snapshot(model), logits(model), logits(tiny("llama"))
    with base_model(model):
        with base_model(model):
            pass
        with pytest.raises(InvalidOption, match="inside base_model"):
            _CHANGES[change](model, tmp_path)
        assert torch.equal(logits(model), bare)
        attach_lora(copy.deepcopy(model), name="second")  # a model of its own
    assert torch.equal(logits(model), adapted)
    assert_same(before, snapshot(model))
    _CHANGES[change](model, tmp_path)


def test_a_strength_is_no_part_of_what_is_saved(tmp_path):
    model = _of_kind("dora")
    save_lora(model, tmp_path / "one")
    set_adapters(model, "default", 0.4)
    save_lora(model, tmp_path / "scaled")
    one, scaled = ((tmp_path / n / "adapter_model.safetensors") for n in ("one", "scaled"))
    assert one.read_bytes() == scaled.read_bytes()


def test_heads_trained_whole_have_no_strength():
    model = randomise(attach_lora(tiny("bert", task="classifier")))
    set_adapters(model, "default", 0.0)
    head = model.classifier.modules_to_save["default"]
    bare = tiny("bert", task="classifier")
    bare.classifier = head
    assert torch.equal(logits(model), logits(bare))


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


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_view_leaves_no_hook_on_a_model_with_gradient_checkpointing(family):
    model = tiny(family)
    model.activation_checkpointing_enable()
    model.enable_input_require_grads()
    bare, held = _hooks(model), model._require_grads_hooks
    attach_lora(model)
    for _ in range(3):
        as_peft_model(model)
    assert model._require_grads_hooks is held
    detach_lora(model)
    assert _hooks(model) == bare
    model.disable_input_require_grads()
    assert sum(_hooks(model).values()) < sum(bare.values())


def _hooks(model):
    return {n: len(m._forward_hooks) for n, m in model.named_modules() if m._forward_hooks}


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


@pytest.fixture
def pipe():
    """A pipeline with `style` on its denoiser and `detail` on its text encoder as well."""
    pipe = tiny_pipeline("sd")
    randomise(attach_lora(pipe.unet, name="style", rank=RANK, alpha=ALPHA))
    for part in (pipe.unet, pipe.text_encoder):
        randomise(attach_lora(part, name="detail", rank=RANK, alpha=ALPHA), seed=6)
    return pipe


def _scales(pipe, name):
    """Component -> set of the strengths of an adapter there."""
    return {
        component: {round(float(s) * RANK / ALPHA, 6) for s in _scalings(part, name).values()}
        for component, part in parts_of(pipe).items()
    }


@pytest.mark.parametrize(
    ("arguments", "style", "detail"),
    [
        ((["style", "detail"],), 1.0, (1.0, 1.0)),
        ((["style", "detail"], 0.5), 0.5, (0.5, 0.5)),
        ((["style", "detail"], [0.5, None]), 0.5, (1.0, 1.0)),
        (({"style": 0.8, "detail": 0.3},), 0.8, (0.3, 0.3)),
        (({"style": 1, "detail": {"unet": 0.5, "text_encoder": 0.0}},), 1.0, (0.5, 0.0)),
        (({"style": 1, "detail": {"text_encoder": 0.25}},), 1.0, (1.0, 0.25)),
        ((["style", "detail"], [1.0, {"unet": 0.5}]), 1.0, (0.5, 1.0)),
    ],
)
def test_a_pipeline_takes_weights_by_component(pipe, arguments, style, detail):
    set_adapters(pipe, *arguments)
    assert _scales(pipe, "style") == {"unet": {style}, "text_encoder": set()}
    assert _scales(pipe, "detail") == {"unet": {detail[0]}, "text_encoder": {detail[1]}}
    assert pipe.unet.active_adapters() == ["style", "detail"]
    assert pipe.text_encoder.active_adapters() == ["detail"]


def test_a_pipeline_takes_weights_by_block_inside_a_component(pipe):
    set_adapters(pipe, {"detail": {"unet": {"down_blocks.1": 0.3}}})
    by_path = _scalings(pipe.unet, "detail")
    for path, scaling in by_path.items():
        wanted = 0.3 if path.startswith("down_blocks.1.") else 1.0
        assert scaling == wanted * ALPHA / RANK
    assert _scales(pipe, "detail")["text_encoder"] == {1.0}
    assert any(path.startswith("up_blocks") for path in by_path)


@pytest.mark.parametrize(
    ("names", "error", "words"),
    [
        ("stile", AdapterNotFound, r"It has 'style' \(unet\), 'detail' \(unet, text_encoder\)"),
        ({"detail": {"vae": 0.5}}, InvalidOption, "'vae' is no component .* on unet, text_encoder"),
        ({"style": {"text_encoder": 0.5}}, InvalidOption, "'style', which is on unet"),
        ({"detail": {"down_blocks.1": 0.5}}, InvalidOption, "'down_blocks.1' is no component"),
        (
            {"detail": {"unet": {"down": 0.5}}},
            InvalidOption,
            r"below \['down'\]. It has down_blocks",
        ),
        ({"detail": {"unet": {"down_blocks.1": None}}}, InvalidOption, "no number"),
        ({"detail": {"unet": float("nan")}}, InvalidOption, "not finite"),
    ],
)
def test_bad_weights_of_a_pipeline_change_no_component(pipe, names, error, words):
    set_adapters(pipe, {"style": 0.5, "detail": 0.25})
    before = {c: component_output(part) for c, part in parts_of(pipe).items()}
    with pytest.raises(error, match=words):
        set_adapters(pipe, names)
    after = {c: component_output(part) for c, part in parts_of(pipe).items()}
    assert all(torch.equal(before[c], after[c]) for c in before)


def test_a_step_that_fails_changes_no_component(pipe, monkeypatch):
    set_adapters(pipe, {"style": 0.5, "detail": 0.25})
    before = {c: snapshot(part) for c, part in parts_of(pipe).items()}
    scales = [_scales(pipe, name) for name in ("style", "detail")]
    last = list(tuner_layers(list(parts_of(pipe).values())[-1]).values())[-1]
    monkeypatch.setattr(last, "set_scale", None)
    with pytest.raises(TypeError):
        set_adapters(pipe, "detail", 0.75)
    monkeypatch.undo()
    for component, part in parts_of(pipe).items():
        assert_same(before[component], snapshot(part))
    assert [_scales(pipe, name) for name in ("style", "detail")] == scales


def test_a_pipeline_without_adapters_for_a_block_and_after(pipe):
    bare = {c: component_output(part) for c, part in parts_of(tiny_pipeline("sd")).items()}
    set_adapters(pipe, ["style", "detail"])
    adapted = {c: component_output(part) for c, part in parts_of(pipe).items()}
    with base_model(pipe) as inside:
        assert inside is pipe
        for component, part in parts_of(pipe).items():
            assert torch.equal(component_output(part), bare[component])
    for component, part in parts_of(pipe).items():
        assert torch.equal(component_output(part), adapted[component])


def test_a_pipeline_has_no_peft_view(pipe):
    with pytest.raises(UnsupportedHost, match="is a pipeline"):
        as_peft_model(pipe)


def test_a_merged_pipeline_keeps_its_adapters(pipe):
    merge_lora(pipe)
    with pytest.raises(MergeError, match="change adapters"):
        set_adapters(pipe, "style")
