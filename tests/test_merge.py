"""Merge and unmerge: equal outputs merged, equal bits after, nothing lost when it fails."""

import copy
import warnings

import peft
import pytest
import torch
from torch import nn

from hf_lora import (
    as_peft_model,
    attach_lora,
    base_model,
    detach_lora,
    merge_lora,
    save_lora,
    set_adapters,
    unmerge_lora,
)
from hf_lora.errors import AdapterNotFound, InvalidOption, MergeError, UnsupportedHost
from hf_lora.hosts import parts_of
from hf_lora.merge import bake, merge_report
from hf_lora.testing import tiny
from hf_lora.testing.pipelines import component_output, tiny_pipeline
from tests.support import ALPHA, RANK, assert_same, logits, randomise, snapshot, tuner_layers

FAMILIES = ["llama", "gpt2", "bert", "t5"]
# (family, targets that share their weight with another module or with each other)
TIED = [
    ("gpt2", ["lm_head", "c_fc"]),
    ("gpt2", ["wte"]),
    ("gpt2", ["lm_head", "wte"]),
    ("llama", ["lm_head", "embed_tokens", "q_proj"]),
    ("bert", ["decoder", "query"]),
    ("bart", ["embed_tokens"]),
    ("t5", ["lm_head", "encoder.embed_tokens"]),
    ("gemma3", ["lm_head", "embed_tokens"]),  # its embedding scales what it reads
]


def _attached(family="llama", dtype=torch.float32, **options):
    model = tiny(family).to(dtype)
    return randomise(attach_lora(model, **({"rank": RANK, "alpha": ALPHA} | options)))


def _tied(family, targets, dtype=torch.float32):
    model = tiny(family)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft says what its own merge does to a tied head
        return randomise(attach_lora(model.to(dtype), targets=targets))


def _objects(model):
    return {n: id(p) for n, p in model.named_parameters(remove_duplicate=False)}


def _assert_as_before(before, model):
    """Asserts that a snapshot holds but for the record, which remembers that nothing is merged."""
    after = snapshot(model)
    for held in (before, after):
        held["attributes"] = {n: a - {"_hf_lora_record"} for n, a in held["attributes"].items()}
    assert_same(before, after)


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
    _assert_as_before(before, model)
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


def test_merged_float32_weights_are_the_rounded_sum_where_plain_pefts_are_not_always():
    model, theirs = _attached(), _attached()
    wanted = {}
    for path, layer in tuner_layers(model).items():
        a, b = (m["default"].weight.double() for m in (layer.lora_A, layer.lora_B))
        wanted[path] = (layer.base_layer.weight.double() + ALPHA / RANK * (b @ a)).float()
    merge_lora(model)
    for layer in tuner_layers(theirs).values():
        layer.merge()
    for path, layer in tuner_layers(model).items():
        assert torch.equal(layer.base_layer.weight, wanted[path])
    off = [(x.base_layer.weight != wanted[p]).sum() for p, x in tuner_layers(theirs).items()]
    assert sum(off) > 0
    assert torch.allclose(logits(model), logits(theirs), atol=1e-6)  # fp32 rounding


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_rounded_once_where_plain_peft_rounds_each_adapter(dtype):
    errors = []
    for ours in (True, False):
        model = _attached(dtype=dtype, name="first")
        randomise(attach_lora(model, name="second", rank=RANK, alpha=ALPHA), seed=6)
        set_adapters(model, ["first", "second"])
        layers = tuner_layers(model)
        wanted = {
            path: x.base_layer.weight.double()
            + sum(x.get_delta_weight(n).double() for n in ("first", "second"))
            for path, x in layers.items()
        }
        if ours:
            merge_lora(model)
        else:
            for layer in layers.values():
                layer.merge(adapter_names=["first"])
                with pytest.warns(UserWarning, match="additionally merging"):
                    layer.merge(adapter_names=["second"])
        off = [x.base_layer.weight.double() - wanted[path] for path, x in layers.items()]
        errors.append(torch.cat([e.flatten() for e in off]).detach().norm())
    # measured 0.71 for bfloat16, 0.73 for float16: one rounding against two
    assert errors[0] < 0.8 * errors[1]


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


@pytest.mark.parametrize("keep", ["cpu", None])
@pytest.mark.parametrize(("family", "targets"), TIED)
def test_a_tied_weight_is_merged_apart_from_its_partner(family, targets, keep):
    model = _tied(family, targets)
    outputs = logits(model)
    bare = {p: x.get_base_layer().weight.clone() for p, x in tuner_layers(model).items()}
    untouched = {
        n: p.clone()
        for n, p in model.named_parameters(remove_duplicate=False)
        if not any(n.startswith(f"{path}.") for path in bare)
    }
    merge_lora(model, keep=keep)
    assert torch.allclose(logits(model), outputs, atol=3e-6)  # fp32 rounding; T5 embeds up to 4
    for path, layer in tuner_layers(model).items():
        assert not torch.equal(layer.get_base_layer().weight, bare[path])
    parameters = dict(model.named_parameters(remove_duplicate=False))
    assert all(torch.equal(value, parameters[name]) for name, value in untouched.items())


def test_plain_peft_changes_the_partner_of_a_tied_weight():
    model = _tied("gpt2", ["lm_head", "wte"])
    outputs = logits(model)
    for layer in tuner_layers(model).values():
        layer.merge()
    assert (logits(model) - outputs).abs().max() > 0.1  # peft 0.21.2: 0.84 here


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("family", "targets"), TIED)
def test_unmerge_ties_the_very_same_parameters_again(family, targets, dtype):
    model = _tied(family, targets, dtype)
    before, objects, outputs = snapshot(model), _objects(model), logits(model)
    for _ in range(2):
        merge_lora(model)
        assert _objects(model) != objects
        unmerge_lora(model)
    assert _objects(model) == objects
    _assert_as_before(before, model)
    assert torch.equal(logits(model), outputs)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if family in ("gpt2", "llama"):
        assert head.weight is embedding.weight


def test_a_module_used_in_two_places_is_not_merged():
    shared = torch.nn.Linear(8, 8)
    block = torch.nn.ModuleDict({"q_proj": shared, "k_proj": torch.nn.Linear(8, 8)})
    model = torch.nn.ModuleList([block])
    randomise(attach_lora(model, targets=["q_proj"]))
    block["twin"] = shared
    with pytest.raises(MergeError, match="same module is used elsewhere without the adapter"):
        merge_lora(model)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8], ids=str)
def test_a_quantised_weight_is_not_merged(dtype):
    model = _attached()
    base = tuner_layers(model)["model.layers.1.mlp.up_proj"].base_layer
    base.weight = torch.nn.Parameter(base.weight.data.to(dtype), requires_grad=False)
    with pytest.raises(MergeError, match=r"mlp\.up_proj\.weight is quantised or sharded"):
        merge_lora(model)


def test_values_that_are_not_finite_are_not_merged():
    model = _attached()
    layer = tuner_layers(model)["model.layers.1.mlp.up_proj"]
    layer.lora_B["default"].weight.data[0, 0] = float("nan")
    before = {k: v.clone() for k, v in model.state_dict().items() if "base_layer" in k}
    with pytest.raises(MergeError, match=r"NaN or infinite values at model\.layers\.1\.mlp"):
        merge_lora(model)
    assert all(torch.equal(before[k], model.state_dict()[k]) for k in before)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_bias_of_an_adapter_is_merged_also_where_the_base_has_none(family):
    config = peft.LoraConfig(r=4, lora_bias=True)
    model = tiny(family)
    if family == "llama":
        with pytest.warns(UserWarning, match="has no bias"):
            attach_lora(model, config=config)
    else:
        attach_lora(model, config=config)
    before, outputs = snapshot(randomise(model)), logits(model)
    merge_lora(model)
    assert torch.allclose(logits(model), outputs, atol=1e-6)  # fp32 rounding of the sum
    assert all(x.base_layer.bias is not None for x in tuner_layers(model).values())
    unmerge_lora(model)
    _assert_as_before(before, model)
    assert torch.equal(logits(model), outputs)


@pytest.mark.parametrize("keep", ["cpu", None])
@pytest.mark.parametrize("targets", [["lm_head", "wte", "c_fc"], "default"], ids=str)
def test_a_merge_that_fails_midway_is_rolled_back_to_the_bit(monkeypatch, keep, targets):
    model = _tied("gpt2", targets) if isinstance(targets, list) else _attached("gpt2")
    outputs, before, objects = logits(model), snapshot(model), _objects(model)
    last = list(tuner_layers(model).values())[-1]

    def broken(**_):
        raise RuntimeError("disk on fire")

    monkeypatch.setattr(last, "merge", broken)
    with pytest.raises(MergeError, match=r"peft cannot merge .*: disk on fire"):
        merge_lora(model, keep=keep)
    monkeypatch.undo()
    assert_same(before, snapshot(model))
    assert _objects(model) == objects
    assert torch.equal(logits(model), outputs)


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
    with pytest.raises(InvalidOption, match="names=3 is no adapter name"):
        merge_lora(model, 3)


def test_an_adapter_named_twice_is_merged_once():
    model = _attached()
    outputs = logits(model)
    merge_lora(model, ["default", "default"])
    assert torch.allclose(logits(model), outputs, atol=1e-6)  # fp32 rounding of the sum


def test_a_component_without_weights_does_not_stop_the_others():
    pipe = _adapted_pipeline()
    detach_lora(pipe.text_encoder)
    pipe.text_encoder.to("meta")
    outputs = component_output(pipe.unet)
    merge_lora(pipe, "detail")
    unmerge_lora(pipe)
    assert torch.equal(component_output(pipe.unet), outputs)


def test_a_merge_by_peft_itself_is_named_and_not_touched():
    model = _attached()
    for layer in tuner_layers(model).values():
        layer.merge()
    with pytest.raises(MergeError, match=r"not merged by merge_lora.* call unmerge_adapter\(\)"):
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
    weights = {k.replace(".base_layer", ""): v for k, v in model.state_dict().items()}
    assert all(torch.equal(bare[k], weights[k]) for k in bare)
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


def test_adapters_disabled_while_merged_leave_the_exact_base():
    model = tiny("llama")
    bare = logits(model)
    config = peft.LoraConfig(r=4, use_dora=True)
    for name in ("one", "two"):  # peft's own unmerge of two would be off by 0.2
        randomise(attach_lora(model, config=config, name=name), seed=len(name) + ord(name[0]))
    set_adapters(model, ["one", "two"], 0.5)
    outputs = logits(model)
    merge_lora(model)
    model.disable_adapters()
    assert torch.equal(logits(model), bare)
    model.enable_adapters()
    unmerge_lora(model)
    assert torch.equal(logits(model), outputs)


@pytest.mark.parametrize("keep", ["cpu", None])
def test_two_dora_adapters_merge_into_the_sum_whatever_their_order(keep):
    weights = []
    for names in (["one", "two"], ["two", "one"]):
        model = tiny("llama")
        for name in ("one", "two"):
            config = peft.LoraConfig(r=4, use_dora=True)
            randomise(attach_lora(model, config=config, name=name), seed=ord(name[0]))
        set_adapters(model, names)
        outputs = logits(model)
        merge_lora(model, keep=keep)
        assert torch.allclose(logits(model), outputs, atol=2e-6)  # fp32 rounding, norms and sums
        weights.append({p: x.base_layer.weight for p, x in tuner_layers(model).items()})
    assert all(torch.equal(w, weights[1][p]) for p, w in weights[0].items())


def test_a_merge_says_when_the_forward_was_not_the_sum(caplog):
    model = tiny("llama")
    for name in ("one", "two"):
        config = peft.LoraConfig(r=4, use_dora=True)
        randomise(attach_lora(model, config=config, name=name), seed=ord(name[0]))
    model.set_adapter(["one", "two"])  # transformers' own, which leaves peft's forward in place
    outputs = logits(model)
    with caplog.at_level("WARNING", logger="hf_lora"):
        merge_lora(model)
    assert "peft's forward of one, two depends on their order" in caplog.text
    unmerge_lora(model)
    assert torch.equal(logits(model), outputs)


def test_experts_held_as_parameters_are_merged():
    config = peft.LoraConfig(
        r=4,
        target_modules=["q_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    model = randomise(attach_lora(tiny("qwen3_moe"), config=config))
    set_adapters(model, "default", 0.4)
    before, outputs = snapshot(model), logits(model)
    merge_lora(model)
    assert torch.allclose(logits(model), outputs, atol=1e-6)  # fp32 rounding of the sum
    unmerge_lora(model)
    _assert_as_before(before, model)
    assert torch.equal(logits(model), outputs)


@pytest.mark.filterwarnings("ignore:Failed to load the CUDA extension")  # BOFT asks for one
@pytest.mark.filterwarnings("ignore:Setting boft_n_butterfly_factor to 1")
@pytest.mark.parametrize(
    "config",
    [
        peft.LoraConfig(r=4, rank_pattern={"q_proj": 2}, alpha_pattern={"k_proj": 5}),
        peft.LoraConfig(r=4, use_rslora=True),
        peft.LoHaConfig(r=4),
        peft.LoKrConfig(r=4),
        peft.IA3Config(feedforward_modules=["down_proj"]),
        peft.OFTConfig(r=0, oft_block_size=4),
        peft.BOFTConfig(boft_block_size=4),
        peft.HRAConfig(r=4),
        peft.C3AConfig(block_size=4),
        peft.MissConfig(r=4),
    ],
    ids=lambda c: type(c).__name__,
)
def test_every_kind_that_files_carry_merges_and_returns(config):
    config.target_modules = ["q_proj", "k_proj", "down_proj"]
    model = attach_lora(tiny("llama"), config=config)
    for seed, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
        parameter.data += 0.1 * noise
    set_adapters(model, "default", 0.6)
    before, outputs = snapshot(model), logits(model)
    with base_model(model):
        assert (logits(model) - outputs).abs().max() > 1e-3  # it does something
    merge_lora(model)
    assert torch.allclose(logits(model), outputs, atol=1e-6)  # fp32 rounding of the sum
    unmerge_lora(model)
    _assert_as_before(before, model)
    assert torch.equal(logits(model), outputs)


def test_two_heads_for_one_place_are_not_merged():
    model = attach_lora(tiny("bert", task="classifier"), name="one")
    attach_lora(model, name="two")
    with pytest.raises(InvalidOption, match="'one' and 'two' both bring their own classifier"):
        merge_lora(model, ["one", "two"])


def test_a_base_model_block_leaves_the_same_merged_weights():
    model = _attached(name="first")
    bare = logits(tiny("llama"))
    merge_lora(model)
    merged = {k: v.clone() for k, v in model.state_dict().items()}
    with base_model(model):
        assert torch.equal(logits(model), bare)
    assert all(torch.equal(v, merged[k]) for k, v in model.state_dict().items())


def test_a_merged_copy_is_unmerged_alone():
    model = _tied("gpt2", ["lm_head", "wte", "c_fc"])
    outputs = logits(model)
    merge_lora(model)
    merged = logits(model)
    other = unmerge_lora(copy.deepcopy(model))
    assert torch.equal(logits(other), outputs)
    assert other.lm_head.weight is other.transformer.wte.weight
    assert torch.equal(logits(model), merged)


def test_the_report_counts_what_half_precision_rounds():
    report = merge_report(merge_lora(_attached(dtype=torch.bfloat16)))
    exact = merge_report(merge_lora(_attached().double()))
    assert (report.names, report.layers, report.weights) == (("default",), 14, exact.weights)
    assert report.kept == 2 * report.weights  # two bytes each
    assert exact.lost == exact.max_error == exact.unchanged == 0
    # half a step of bfloat16 below 2^-3, the largest power that a merged weight exceeds
    assert report.max_error == pytest.approx(2**-3 * 2**-8 / 2, rel=0.5)
    assert 0 < report.lost < 0.05
    assert 0 < report.unchanged < 0.05
    assert "\n" not in str(report)


def test_a_merge_that_loses_much_of_the_update_is_a_warning(caplog):
    model = _attached(dtype=torch.bfloat16)
    set_adapters(model, "default", 0.01)
    with caplog.at_level("INFO", logger="hf_lora"):
        merge_lora(model)
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert merge_report(model).lost > 0.1
    unmerge_lora(model)
    with pytest.raises(MergeError, match="nothing is merged"):
        merge_report(model)


def _adapted_pipeline(kind="sd"):
    """A pipeline with `style` on its denoiser and `detail` on its text encoder as well."""
    pipe = tiny_pipeline(kind)
    denoiser = next(c for c in parts_of(pipe) if c in ("unet", "transformer"))
    randomise(attach_lora(getattr(pipe, denoiser), name="style", rank=4))
    for part in (getattr(pipe, denoiser), pipe.text_encoder):
        randomise(attach_lora(part, name="detail", rank=4), seed=6)
    return pipe


def _outputs(pipe):
    return {c: component_output(part) for c, part in parts_of(pipe).items()}


@pytest.mark.parametrize("kind", ["sd", "flux"])
def test_a_pipeline_merges_and_unmerges_as_one(kind):
    pipe = _adapted_pipeline(kind)
    set_adapters(pipe, ["style", "detail"], [0.8, 0.5])
    outputs, before = _outputs(pipe), {c: snapshot(p) for c, p in parts_of(pipe).items()}
    merge_lora(pipe)
    assert all(
        _is_merged(part) for part in (pipe.text_encoder, next(iter(parts_of(pipe).values())))
    )
    for component, value in _outputs(pipe).items():
        assert torch.allclose(value, outputs[component], atol=3e-6)  # fp32 rounding of the sum
    with base_model(pipe):
        bare = tiny_pipeline(kind)
        assert all(
            torch.equal(v, component_output(getattr(bare, c))) for c, v in _outputs(pipe).items()
        )
    unmerge_lora(pipe)
    for component, part in parts_of(pipe).items():
        _assert_as_before(before[component], part)
    assert all(torch.equal(v, outputs[c]) for c, v in _outputs(pipe).items())


def _is_merged(part):
    return any(layer.merged for layer in tuner_layers(part).values())


@pytest.mark.parametrize("keep", ["cpu", None])
def test_a_pipeline_merges_whole_or_not_at_all(monkeypatch, keep):
    pipe = _adapted_pipeline()
    set_adapters(pipe, ["style", "detail"])
    outputs, before = _outputs(pipe), {c: snapshot(p) for c, p in parts_of(pipe).items()}
    last = list(tuner_layers(list(parts_of(pipe).values())[-1]).values())[-1]
    monkeypatch.setattr(last, "merge", None)
    with pytest.raises(MergeError, match="peft cannot merge"):
        merge_lora(pipe, keep=keep)
    monkeypatch.undo()
    for component, part in parts_of(pipe).items():
        assert_same(before[component], snapshot(part))
    assert all(torch.equal(v, outputs[c]) for c, v in _outputs(pipe).items())


def test_a_pipeline_says_which_adapters_it_has():
    pipe = _adapted_pipeline()
    with pytest.raises(
        AdapterNotFound, match=r"It has 'style' \(unet\), 'detail' \(unet, text_enc"
    ):
        merge_lora(pipe, "stile")
    with pytest.raises(MergeError, match="nothing is merged into StableDiffusionPipeline"):
        unmerge_lora(pipe)
    with pytest.raises(AdapterNotFound, match="It has none"):
        merge_lora(tiny_pipeline("sd"))
    merge_lora(pipe, "style")  # the text encoder has none of that name
    assert not _is_merged(pipe.text_encoder)
    assert merge_report(pipe).names == ("style",)
    unmerge_lora(pipe)


@pytest.mark.parametrize(("family", "targets"), TIED)
def test_a_baked_model_is_plain_and_loads_with_equal_outputs(family, targets, tmp_path, caplog):
    model = _tied(family, targets)
    outputs = logits(model)
    assert bake(model) is model
    assert {type(m).__module__.split(".")[0] for m in model.modules()} <= {"torch", "transformers"}
    assert not {"peft_config", "_hf_peft_config_loaded", "_hf_lora_record"} & set(vars(model))
    baked = logits(model)
    assert torch.allclose(baked, outputs, atol=3e-6)  # fp32 rounding of the sum
    model.save_pretrained(tmp_path)
    again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(logits(again.eval()), baked)
    if family != "t5":  # its config ignores the field; the load leaves unequal weights untied
        assert again.config.tie_word_embeddings is False


def test_baking_keeps_what_is_still_tied(tmp_path):
    model = randomise(attach_lora(tiny("gpt2")))
    merge_lora(model)
    baked = logits(bake(model))
    assert model.lm_head.weight is model.transformer.wte.weight
    assert model.config.tie_word_embeddings
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(type(model).from_pretrained(tmp_path).eval()), baked)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_baked_classifier_has_the_trained_head(family, tmp_path):
    plain = tiny(family, task="classifier")
    flags = {n: p.requires_grad for n, p in plain.named_parameters()}
    model = randomise(attach_lora(plain))
    head = "classifier" if family == "bert" else "score"
    trained = getattr(model, head).modules_to_save["default"].weight.clone()
    outputs = logits(model)
    baked = logits(bake(model))
    assert torch.equal(getattr(model, head).weight, trained)
    assert torch.allclose(baked, outputs, atol=1e-6)  # fp32 rounding of the sum
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(type(model).from_pretrained(tmp_path).eval()), baked)


def test_a_baked_model_has_the_trained_token_rows(tmp_path):
    config = peft.LoraConfig(r=4, trainable_token_indices=[5, 6], target_modules=["c_attn"])
    model = randomise(attach_lora(tiny("gpt2"), config=config))
    outputs = logits(model)
    baked = logits(bake(model))
    assert torch.allclose(baked, outputs, atol=1e-6)  # fp32 rounding of the sum
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(type(model).from_pretrained(tmp_path).eval()), baked)


def test_broken_token_rows_leave_the_host_as_it_was():
    config = peft.LoraConfig(r=4, trainable_token_indices=[5, 6], target_modules=["c_attn"])
    model = randomise(attach_lora(tiny("gpt2"), config=config))
    wrapper = model.lm_head  # tied: the rows of the embedding are put in first
    wrapper.token_adapter.trainable_tokens_delta["default"].data[1, 0] = float("nan")
    before, objects = snapshot(model), _objects(model)
    with pytest.raises(MergeError, match="cannot merge new token rows: NaNs"):
        bake(model)
    after = snapshot(model)
    assert _objects(model) == objects
    for held in (before, after):
        held["tensors"] = {k: v.nan_to_num(7.0) for k, v in held["tensors"].items()}
        held["attributes"] = {n: a - {"_hf_lora_record"} for n, a in held["attributes"].items()}
    assert_same(before, after)


def test_a_baked_pipeline_loads_with_equal_outputs(tmp_path):
    pipe = _adapted_pipeline()
    set_adapters(pipe, ["style", "detail"], [0.8, 0.5])
    outputs = _outputs(pipe)
    baked = _outputs(bake(pipe))
    for component, value in baked.items():
        assert torch.allclose(value, outputs[component], atol=3e-6)  # fp32 rounding of the sum
    pipe.save_pretrained(tmp_path)
    again = type(pipe).from_pretrained(tmp_path, safety_checker=None)
    assert all(torch.equal(v, baked[c]) for c, v in _outputs(again).items())


def test_what_cannot_be_baked_stays_as_it_was():
    with pytest.warns(UserWarning, match="has no bias"):
        model = attach_lora(tiny("llama"), config=peft.LoraConfig(r=4, lora_bias=True))
    before, outputs = snapshot(randomise(model)), logits(model)
    with pytest.raises(MergeError, match="a load of LlamaForCausalLM would leave it out"):
        bake(model)
    _assert_as_before(before, model)
    assert torch.equal(logits(model), outputs)
    model = merge_lora(_attached())
    tuner_layers(model)["model.layers.0.mlp.up_proj"].unmerge()
    with pytest.raises(MergeError, match="taken the merged adapters out"):
        bake(model)
    with pytest.raises(UnsupportedHost, match="get_base_model"):
        bake(as_peft_model(_attached()))


def _peft_pair(tied=()):
    """A model, tied where asked, and the PeftModel with random factors around it."""
    model = tiny("llama")
    if tied:
        model.config.tie_word_embeddings = True
        model.tie_weights()
    targets = ["q_proj", *tied] if tied else ["q_proj", "down_proj"]
    config = peft.LoraConfig(target_modules=targets, init_lora_weights=False, lora_bias=not tied)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft: tied weights, layers without a bias
        return model, peft.get_peft_model(model, config)


@pytest.mark.parametrize("tied", [(), ("lm_head",), ("lm_head", "embed_tokens")], ids=str)
@pytest.mark.parametrize("how", ["unload", "merge_and_unload"])
def test_unmerge_restores_every_bit_after_peft_took_the_layers_off(how, tied):
    plain, view = _peft_pair(tied)
    adapted = logits(view)
    with base_model(view):
        bare = logits(view)
    state = {k.replace("base_layer.", ""): v.clone() for k, v in plain.state_dict().items()}
    objects = {k.replace("base_layer.", ""): i for k, i in _objects(plain).items()}
    merge_lora(view)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft: already merged
        model = getattr(view, how)()
    assert model is plain
    assert torch.allclose(logits(model), adapted, atol=1e-5)  # fp32 rounding of the merge
    with pytest.raises(MergeError, match=r"unmerge_lora\(host\) restores those of before"):
        attach_lora(model)
    with pytest.raises(MergeError, match="taken off meanwhile"), base_model(model):
        pass
    unmerge_lora(model)
    assert torch.equal(logits(model), bare)
    after = model.state_dict()
    assert after.keys() == {k for k in state if "lora_" not in k}
    assert all(torch.equal(v, state[k]) for k, v in after.items())
    assert all(i == objects[k] for k, i in _objects(model).items())
    assert "_hf_lora_record" not in vars(model)
    attach_lora(model)


def test_without_a_copy_a_model_that_peft_unloaded_is_simply_that_model():
    plain, view = _peft_pair()
    merge_lora(view, keep=None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft: already merged
        model = view.merge_and_unload()
    merged = logits(model)
    with pytest.raises(MergeError, match="no copy of the base weights"):
        unmerge_lora(model)
    attach_lora(model)
    assert torch.equal(logits(model), merged)
    detach_lora(model)
    assert torch.equal(logits(plain), merged)


@pytest.mark.parametrize("copied", [False, True])
def test_unmerge_restores_a_pipeline_whose_adapters_diffusers_took_off(copied):
    pipe, bare = tiny_pipeline("sd"), tiny_pipeline("sd")
    for part in (pipe.unet, pipe.text_encoder):
        randomise(attach_lora(part, rank=RANK, alpha=ALPHA))
    merge_lora(pipe)
    if copied:
        pipe.unet = copy.deepcopy(pipe.unet)
    pipe.unload_lora_weights()
    assert not torch.equal(component_output(pipe.unet), component_output(bare.unet))
    unmerge_lora(pipe)
    for component, part in parts_of(pipe).items():
        wanted = parts_of(bare)[component].state_dict()
        assert part.state_dict().keys() == wanted.keys()
        assert all(torch.equal(v, wanted[k]) for k, v in part.state_dict().items())
    with pytest.raises(MergeError, match="nothing is merged"):
        unmerge_lora(pipe)


def test_a_merged_weight_that_is_gone_is_an_error_and_nothing_is_touched():
    plain, view = _peft_pair()
    merge_lora(view)
    model = view.unload()
    merged = {k: v.clone() for k, v in model.state_dict().items()}
    held, model.model.layers[1].mlp.down_proj = model.model.layers[1].mlp.down_proj, nn.Identity()
    with pytest.raises(MergeError, match=r"no model\.layers\.1\.mlp\.down_proj\.weight any more"):
        unmerge_lora(model)
    model.model.layers[1].mlp.down_proj = held
    assert all(torch.equal(v, merged[k]) for k, v in plain.state_dict().items())
    unmerge_lora(model)
    assert torch.equal(logits(model), logits(tiny("llama")))


def test_adapters_that_are_switched_off_are_merged_only_by_name():
    model, bare = _attached(), logits(tiny("llama"))
    adapted = logits(model)
    model.disable_adapters()
    with pytest.raises(MergeError, match="LlamaForCausalLM are switched off"):
        merge_lora(model)
    assert torch.equal(logits(model), bare)
    merge_lora(model, "default")
    assert torch.allclose(logits(model), adapted, atol=1e-6)  # fp32 rounding
    unmerge_lora(model)
    assert torch.equal(logits(model), bare)
    model.enable_adapters()
    assert torch.equal(logits(model), adapted)


@pytest.mark.parametrize("names", [[["a"]], [1], {"default": 0.5}, 3, [None]])
def test_names_to_merge_that_are_none(names):
    with pytest.raises(InvalidOption, match="no adapter name") as caught:
        merge_lora(_attached(), names)
    assert caught.value.field == "names"
    assert caught.value.fix


def test_no_names_to_merge():
    with pytest.raises(InvalidOption, match="names is empty") as caught:
        merge_lora(_attached(), [])
    assert caught.value.field == "names"
