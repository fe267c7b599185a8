"""One adapter layer: a strength is true for every kind, and merged weights do what the layer does.

The judge is peft's forward in float64, and for LoRA and DoRA the formula written out.
"""

import copy
import io
import warnings
from dataclasses import replace
from itertools import permutations

import peft
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_lora.errors import MergeError, UnsupportedTarget
from hf_lora.layers.checks import check_mergeable
from hf_lora.layers.dora import is_strong
from hf_lora.layers.fold import drop_copies, fold, put
from hf_lora.layers.kinds import kind_of_layer, trap_of
from hf_lora.layers.strength import Dial, Steered, settle, strength_of

LINEAR = {
    "lora": (peft.LoraConfig, {"r": 4, "lora_alpha": 11}),
    "rslora": (peft.LoraConfig, {"r": 4, "lora_alpha": 11, "use_rslora": True}),
    "bias": (peft.LoraConfig, {"r": 4, "lora_bias": True}),
    "mica": (peft.LoraConfig, {"r": 4, "init_lora_weights": "mica"}),
    "dora": (peft.LoraConfig, {"r": 4, "lora_alpha": 11, "use_dora": True}),
    "adalora": (
        peft.AdaLoraConfig,
        {"init_r": 4, "lora_alpha": 11, "total_step": 9, "inference_mode": True},
    ),
    "loha": (peft.LoHaConfig, {"r": 4, "alpha": 11}),
    "lokr": (peft.LoKrConfig, {"r": 4, "alpha": 11}),
    "ia3": (peft.IA3Config, {"feedforward_modules": []}),
    "ia3-ff": (peft.IA3Config, {"feedforward_modules": ["at"]}),
    "oft": (peft.OFTConfig, {"r": 0, "oft_block_size": 4}),
    "boft": (peft.BOFTConfig, {"boft_block_size": 4}),
    "hra": (peft.HRAConfig, {"r": 4}),
    "c3a": (peft.C3AConfig, {"block_size": 4}),
    "miss": (peft.MissConfig, {"r": 4}),
    "miss-bat": (peft.MissConfig, {"r": 4, "init_weights": "bat"}),
}
ROWLESS = {
    "fourierft": (peft.FourierFTConfig, {"n_frequency": 20}),
    "ln": (peft.LNTuningConfig, {}),
}
CONVS = ["lora", "bias", "dora", "loha", "lokr", "ia3", "ia3-ff", "boft", "hra"]
CHAINS = ["oft", "boft", "hra", "miss-bat"]  # the order of activation is part of the model
# (kind, base layer): every shape peft has the kind for
CASES = [
    *((kind, "linear") for kind in LINEAR),
    *((kind, "no-bias") for kind in LINEAR),
    *((kind, "conv1d-gpt2") for kind in ("lora", "dora", "ia3", "ia3-ff")),
    *((kind, shape) for shape in ("conv2d", "conv2d-1x1") for kind in CONVS),
    *((kind, "conv1d") for kind in ("lora", "bias", "dora", "loha")),
    ("oft", "conv2d-1x1"),
    *((kind, "embedding") for kind in ("lora", "rslora", "dora", "oft")),
]
BASES = {
    "linear": lambda: nn.Linear(16, 16),
    "no-bias": lambda: nn.Linear(16, 16, bias=False),
    "conv1d-gpt2": lambda: Conv1D(16, 16),
    "conv2d": lambda: nn.Conv2d(8, 12, 3, padding=1, stride=2),
    "conv2d-1x1": lambda: nn.Conv2d(8, 12, 1),
    "conv1d": lambda: nn.Conv1d(8, 12, 3, padding=1),
    "embedding": lambda: nn.Embedding(20, 16),
    "norm": lambda: nn.LayerNorm(16),
}
STRENGTHS = [{}, {"a": 0.3}, {"a": -0.7, "b": 1.6}, {"a": 0.0}, {"a": 0.0, "b": 0.0}]


def _input(shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    if shape == "embedding":
        return torch.randint(0, 20, (3, 5), generator=generator)
    sizes = {"conv2d": (2, 8, 6, 6), "conv2d-1x1": (2, 8, 6, 6), "conv1d": (2, 8, 6)}
    return torch.randn(sizes.get(shape, (3, 16)), generator=generator).to(dtype)


def _layer(kind, shape, names=("a", "b"), dtype=torch.float64):
    """A tuner layer with adapters of one kind that all do something."""
    torch.manual_seed(0)
    holder = nn.ModuleDict({"at": BASES[shape]()})
    config_of, options = (LINEAR | ROWLESS)[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft: fan_in_fan_out, no bias, a second adapter
        for name in names:
            config = config_of(target_modules=["at"], **options)
            peft.inject_adapter_in_model(config, holder, name)
    holder.to(dtype)
    layer = holder["at"]
    for seed, name in enumerate(names):
        generator = torch.Generator().manual_seed(seed)
        for key, parameter in layer.named_parameters():
            if f".{name}" in key and "base_layer" not in key and parameter.is_floating_point():
                noise = torch.randn(parameter.shape, generator=generator) * 0.1
                parameter.data += noise.to(parameter)
    return layer.eval().requires_grad_(False)


def _set(layer, active, strengths):
    layer.set_adapter(list(active))
    for name in active:
        Dial(layer).set_scale(name, strengths.get(name, 1.0))
    return layer


def _tolerance(kind):
    # C3A goes through a Fourier transform in float32
    return 1e-6 if kind == "c3a" else 1e-12  # float64 rounding of sums around 1


def _close(one, two, kind):
    assert torch.allclose(one, two, rtol=0, atol=_tolerance(kind)), (one - two).abs().max()


@pytest.mark.parametrize(("kind", "shape"), CASES)
@pytest.mark.parametrize("strengths", STRENGTHS, ids=str)
@pytest.mark.parametrize("active", ["a", "ab", "ba"])
def test_merged_weights_do_what_the_layer_does(kind, shape, strengths, active):
    layer, x = _set(_layer(kind, shape), active, strengths), _input(shape)
    unmerged = layer(x)
    put(layer, fold("at", layer, list(active)), shared=())
    _close(layer(x), unmerged, kind)
    assert layer.merged == bool(active)


@pytest.mark.parametrize(("kind", "shape"), CASES)
def test_a_strength_multiplies_the_update(kind, shape):
    layer, x = _set(_layer(kind, shape), "a", {}), _input(shape)
    once = layer(x)
    base = layer.base_layer(x)
    assert (once - base).abs().max() > 0.01  # the adapter does something
    for weight in (0.5, -1.0, 2.0):
        _close(_set(layer, "a", {"a": weight})(x), base + weight * (once - base), kind)
    assert torch.equal(_set(layer, "a", {"a": 0})(x), base)
    assert torch.equal(_set(layer, "a", {"a": 1})(x), once)


@pytest.mark.parametrize(("kind", "shape"), CASES)
def test_strength_one_leaves_nothing_on_the_layer(kind, shape):
    layer = _layer(kind, shape)
    variants = {n: type(v) for n, v in getattr(layer, "lora_variant", {}).items()}
    attributes = set(vars(layer))
    _set(layer, "ab", {"a": 0.5, "b": 0.25})
    _set(layer, "a", {})
    _set(layer, "b", {})
    assert {n: type(v) for n, v in getattr(layer, "lora_variant", {}).items()} == variants
    assert set(vars(layer)) == attributes
    assert not isinstance(layer, Steered)


@pytest.mark.parametrize(("kind", "shape"), [c for c in CASES if c[0] not in CHAINS])
def test_the_order_of_activation_changes_no_bit_of_the_merge(kind, shape):
    merged = []
    for order in permutations("abc"):
        layer = _set(_layer(kind, shape, names="abc"), order, {"a": 0.3, "c": 1.7})
        merged.append(fold("at", layer, order).values)
    for other in merged[1:]:
        assert all(torch.equal(other[key], value) for key, value in merged[0].items())


@pytest.mark.parametrize(("kind", "shape"), [c for c in CASES if c[0] not in CHAINS])
def test_the_order_of_activation_does_not_change_the_forward(kind, shape):
    x, strengths = _input(shape), {"a": 0.3}
    one = _set(_layer(kind, shape), "ab", strengths)(x)
    _close(_set(_layer(kind, shape), "ba", strengths)(x), one, kind)


@pytest.mark.parametrize("shape", ["linear", "conv1d-gpt2", "embedding", "conv2d"])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_merged_weights_equal_the_formula(kind, shape):
    layer = _set(_layer(kind, shape), "ab", {"a": 0.3, "b": 1.6})
    base = layer.get_base_layer().weight.clone()
    wanted = base.clone()
    for name, weight in (("a", 0.3), ("b", 1.6)):
        wanted += weight * _update(layer, shape, name, base, dora=kind == "dora")
    put(layer, fold("at", layer, "ab"), shared=())
    # float64 rounding of products around 1
    assert torch.allclose(layer.get_base_layer().weight, wanted, rtol=0, atol=1e-14)


@pytest.mark.parametrize("active", ["ab", "ba"])
@pytest.mark.parametrize("shape", ["linear", "conv2d", "embedding"])
def test_dora_beside_a_plain_lora_adds_up(shape, active):
    layer, x = _layer("lora", shape, names="a"), _input(shape)
    config = peft.LoraConfig(r=4, use_dora=True, lora_alpha=11)
    layer.requires_grad_(False)
    layer.update_layer("b", r=4, lora_alpha=11, config=config)
    layer.double()
    held = layer.lora_embedding_A["b"] if shape == "embedding" else layer.lora_B["b"].weight
    held.data += 0.1
    base = layer.get_base_layer()(x)
    alone = sum(_set(layer, name, {"b": 0.4})(x) - base for name in "ab")
    both = _set(layer, active, {"b": 0.4})(x)
    _close(both, base + alone, "lora")
    put(layer, fold("at", layer, active), shared=())
    _close(layer(x), both, "lora")


def test_dora_trains_with_dropout_at_any_strength():
    layer, x = _layer("dora", "linear", names="a"), _input("linear")
    layer.lora_dropout["a"] = nn.Dropout(0.5)
    base = layer.base_layer(x)
    layer.train()
    outputs = []
    for weight in (1.0, 0.5):
        _set(layer, "a", {"a": weight})
        torch.manual_seed(1)
        outputs.append(layer(x) - base)
    _close(outputs[1], 0.5 * outputs[0], "dora")


def _update(layer, shape, name, base, *, dora):
    """D = s B A, or (g - 1) W + g s B A with g = m / |W + s B A| over each output, by hand."""
    if shape == "embedding":
        delta = (layer.lora_embedding_B[name] @ layer.lora_embedding_A[name]).T
    elif shape == "conv2d":
        a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
        delta = torch.einsum("orxy,riuv->oiuv", b, a)
    else:
        delta = layer.lora_B[name].weight @ layer.lora_A[name].weight
        delta = delta.T if shape == "conv1d-gpt2" else delta
    delta = delta * 11 / 4  # alpha/rank
    if not dora:
        return delta
    over = (0,) if shape in ("embedding", "conv1d-gpt2") else tuple(range(1, base.ndim))
    norm = (base + delta).pow(2).sum(over, keepdim=True).sqrt()
    g = layer.lora_magnitude_vector[name].weight.view(norm.shape) / norm
    return (g - 1) * base + g * delta


@pytest.mark.parametrize("kind", LINEAR)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_merge_rounds_once(kind, dtype):
    exact, layer = _layer(kind, "linear"), _layer(kind, "linear")
    for each in (exact, layer):
        each.base_layer.weight.data = each.base_layer.weight.data.to(dtype).double()
        _set(each, "ab", {"a": 0.3})
    layer.base_layer.to(dtype)
    wide = fold("at", exact, "ab").values["weight"]
    rounded = fold("at", layer, "ab").values["weight"]
    assert rounded.dtype == dtype
    step = torch.finfo(dtype).eps * wide.abs().clamp(min=torch.finfo(dtype).tiny)
    # half a unit in the last place, and what the sum in float32 adds for half precision
    assert ((rounded.double() - wide).abs() <= 0.51 * step + _tolerance(kind)).all()


@pytest.mark.parametrize("kind", LINEAR)
@pytest.mark.parametrize("strengths", [{}, {"a": 0.5}], ids=str)
def test_undo_restores_every_bit_whoever_calls_it(kind, strengths):
    layer = _set(_layer(kind, "linear", dtype=torch.float32), "ab", strengths)
    x = _input("linear", torch.float32)
    unmerged, base = layer(x), {k: v.clone() for k, v in layer.base_layer.state_dict().items()}
    parameters = dict(layer.base_layer.named_parameters())
    undo = put(layer, fold("at", layer, "ab"), shared=())
    layer.unmerge()  # peft calls it so when adapters are disabled
    assert not layer.merged
    assert all(torch.equal(base[k], v) for k, v in layer.base_layer.state_dict().items())
    assert torch.equal(layer(x), unmerged)
    layer.merge(adapter_names=["a"])  # peft's own, into data that must not be the kept copy
    layer.unmerge()
    assert all(torch.equal(base[k], v) for k, v in layer.base_layer.state_dict().items())
    undo.finish()
    assert dict(layer.base_layer.named_parameters()) == parameters
    assert "unmerge" not in vars(layer)


def test_without_copies_peft_unmerges_where_it_can_and_refuses_where_it_would_be_wrong():
    layer = _set(_layer("dora", "linear"), "a", {})
    base = layer.base_layer.weight.clone()
    drop_copies(put(layer, fold("at", layer, "a"), shared=()), "a")
    layer.unmerge()
    assert torch.allclose(layer.base_layer.weight, base, rtol=0, atol=1e-12)  # float64 rounding
    for active, strengths in (("ab", {}), ("a", {"a": 0.5})):
        layer = _set(_layer("dora", "linear"), active, strengths)
        drop_copies(put(layer, fold("at", layer, active), shared=()), active)
        with pytest.raises(MergeError, match="no copy of the base weights"):
            layer.unmerge()


@pytest.mark.parametrize("shape", ["linear", "conv1d-gpt2", "conv2d", "embedding"])
@pytest.mark.parametrize("safe", [True, False])
def test_peft_itself_merges_and_unmerges_dora_with_strengths(shape, safe):
    layer, x = _set(_layer("dora", shape), "ab", {"a": 0.3}), _input(shape)
    base, unmerged = layer.get_base_layer().weight.clone(), layer(x)
    layer.merge(safe_merge=safe, adapter_names=["a"])
    with pytest.warns(UserWarning, match="additionally merging"):
        layer.merge(safe_merge=safe, adapter_names=["b"])
    assert torch.allclose(layer(x), unmerged, rtol=0, atol=1e-12)  # float64 rounding
    layer.unmerge()
    assert torch.allclose(layer.get_base_layer().weight, base, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("kind", "shape"), CASES)
def test_gradients_pass_at_any_strength(kind, shape):
    layer, x = _layer(kind, shape), _input(shape)
    layer.requires_grad_(True)
    for parameter in layer.base_layer.parameters():
        parameter.requires_grad_(False)
    grads = {}
    for weight in (1.0, 0.5):
        _set(layer, "a", {"a": weight})
        layer.zero_grad()
        layer(x).sum().backward()
        grads[weight] = {
            k: p.grad.clone() for k, p in layer.named_parameters() if p.grad is not None
        }
    assert grads[1.0].keys() == grads[0.5].keys()
    for key, grad in grads[0.5].items():
        _close(grad, 0.5 * grads[1.0][key], kind)


@pytest.mark.parametrize("kind", ["dora", "ia3", "c3a"])
def test_strengths_survive_copies_and_pickles_and_leave_with_the_adapter(kind):
    layer, x = _set(_layer(kind, "linear"), "ab", {"a": 0.5}), _input("linear")
    out = layer(x)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for other in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
        assert torch.equal(other(x), out)
        assert [strength_of(other, n) for n in "ab"] == [0.5, 1.0]
    layer.delete_adapter("a")
    settle(layer)
    assert "forward" not in vars(layer)
    assert not any(is_strong(v) for v in getattr(layer, "lora_variant", {}).values())


@pytest.mark.parametrize("kind", ["lora", "dora", "ia3", "oft"])
def test_a_merged_layer_survives_copies_and_pickles(kind):
    layer, x = _set(_layer(kind, "linear"), "ab", {}), _input("linear")
    base = layer.base_layer.weight.clone()
    put(layer, fold("at", layer, "ab"), shared=())
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for other in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
        assert torch.equal(other(x), layer(x))
        other.unmerge()
        assert torch.equal(other.base_layer.weight, base)
        assert layer.merged


def test_what_accelerate_puts_around_a_layer_stays_there():
    layer, x = _layer("ia3", "linear"), _input("linear")
    once, base = _set(layer, "a", {})(x), layer.base_layer(x)
    for wrap_first in (True, False):
        if not wrap_first:
            _set(layer, "a", {"a": 0.5})
        seen = []
        add_hook_to_module(layer, _Spy(seen))
        half = _set(layer, "a", {"a": 0.5})(x)
        _close(half, (base + once) / 2, "ia3")
        assert torch.equal(_set(layer, "a", {})(x), once)
        assert seen
        remove_hook_from_module(layer)
        assert torch.equal(layer(x), once)


def test_hooks_of_accelerate_see_a_blended_forward_and_leave_it_when_they_go():
    layer, x = _layer("ia3", "linear"), _input("linear")
    half = (_set(layer, "a", {})(x) + layer.base_layer(x)) / 2
    for wrap_first in (True, False):
        seen, layer = [], _layer("ia3", "linear")
        if wrap_first:
            add_hook_to_module(layer, _Spy(seen))
        _set(layer, "a", {"a": 0.5})
        if not wrap_first:
            add_hook_to_module(layer, _Spy(seen))
        _close(layer(x), half, "ia3")
        assert seen == [layer]
        other = copy.deepcopy(layer)
        remove_hook_from_module(layer)
        _close(layer(x), half, "ia3")
        assert seen == [layer]
        other.base_layer.weight.data.zero_()
        other.base_layer.bias.data.zero_()
        assert not other(x).any()


@pytest.mark.parametrize("kind", ["ia3", "oft", "c3a", "hra"])
def test_a_replica_computes_with_its_own_weights(kind):
    layer, x = _set(_layer(kind, "linear"), "a", {"a": 0.5}), _input("linear")
    out = layer(x)
    replica = layer._replicate_for_data_parallel()  # as nn.DataParallel makes one a device
    replica._modules["base_layer"] = _layer(kind, "linear").base_layer
    replica.base_layer.weight.data.zero_()
    replica.base_layer.bias.data.zero_()
    assert not torch.equal(replica(x), out)
    assert torch.equal(layer(x), out)


def test_a_forward_that_somebody_put_on_the_layer_is_not_bypassed():
    layer, x = _layer("ia3", "linear"), _input("linear")
    once, real = _set(layer, "a", {})(x), layer.forward
    layer.forward = lambda x: 2 * real(x)
    with pytest.raises(UnsupportedTarget, match="a forward of its own"):
        Dial(layer).set_scale("a", 0.5)
    assert torch.equal(layer(x), 2 * once)
    assert strength_of(layer, "a") == 1
    del layer.forward
    blended = _set(layer, "a", {"a": 0.5})(x)
    half = layer.forward
    layer.forward = lambda x: 2 * half(x)
    assert torch.equal(layer(x), 2 * blended)
    Dial(layer).set_scale("a", 1)
    assert torch.equal(layer(x), 2 * once)


@pytest.mark.parametrize("kind", ["lora", "dora", "mica", "adalora", "loha"])
def test_a_strength_takes_the_place_of_pefts_scale(kind):
    layer, x = _layer(kind, "linear"), _input("linear")
    once, base = _set(layer, "a", {})(x), layer.base_layer(x)
    layer.set_scale("a", 0.5)
    assert (layer(x) - once).abs().max() > 1e-3
    assert torch.equal(_set(layer, "a", {})(x), once)
    layer.set_scale("a", 0.5)
    _close(_set(layer, "a", {"a": 0.25})(x), base + (once - base) / 4, kind)


@pytest.mark.parametrize("kind", ["lora", "dora", "mica"])
def test_pefts_scale_takes_the_place_of_a_strength(kind):
    layer, other, x = _layer(kind, "linear"), _layer(kind, "linear"), _input("linear")
    _set(other, "a", {})
    for scale in (1.0, 0.5):
        other.set_scale("a", scale)
        _set(layer, "a", {"a": 0.25})
        layer.set_scale("a", scale)
        assert torch.equal(layer(x), other(x))
    assert type(layer) is type(other)


@pytest.mark.parametrize("kind", ["dora", "ia3", "oft"])
def test_a_strength_goes_when_peft_deletes_the_adapter(kind):
    layer = _set(_layer(kind, "linear"), "a", {"a": 0.5})
    with pytest.warns(UserWarning, match="now deleted"):
        layer.delete_adapter("a")
    assert not isinstance(layer, Steered)
    assert strength_of(layer, "a") == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_failure_between_two_parameters_of_a_layer_can_be_undone(dtype):
    layer = _set(_layer("ia3", "linear", dtype=dtype), "a", {})
    before = {k: v.clone() for k, v in layer.base_layer.state_dict().items()}
    folded, done = fold("at", layer, "a"), []
    assert list(folded.values) == ["weight", "bias"]
    broken = replace(folded, values={"weight": folded.values["weight"], "bias": "no tensor"})
    with pytest.raises(TypeError):
        put(layer, broken, (), done)
    assert not torch.equal(layer.base_layer.weight, before["weight"])
    for undo in done:
        undo.finish()
    assert all(torch.equal(v, before[k]) for k, v in layer.base_layer.state_dict().items())


class _Spy(ModelHook):
    def __init__(self, seen):
        self.seen = seen

    def pre_forward(self, module, *args, **kwargs):
        self.seen.append(module)
        return args, kwargs


def test_disabled_and_merged_layers_blend_nothing():
    layer, x = _set(_layer("ia3", "linear"), "a", {"a": 0.5}), _input("linear")
    base = layer.base_layer(x)
    layer._disable_adapters = True
    assert torch.equal(layer(x), base)
    assert isinstance(layer, Steered)


def _conv(**options):
    return nn.Conv2d(8, 8, **({"kernel_size": 3, "padding": 1} | options))


@pytest.mark.parametrize(
    ("kind", "base", "words"),
    [
        ("lora", _conv(padding_mode="reflect"), "pads with zeros"),
        ("loha", _conv(padding_mode="circular"), "pads with zeros"),
        ("lora", _conv(padding="same", dilation=2), "leaves the dilation out"),
        ("lora", _conv(groups=2), "across the groups"),
        ("hra", _conv(stride=(1, 2)), "first stride and padding"),
        ("oft", _conv(), "overlapping patches"),
        ("lora", nn.Embedding(9, 8, max_norm=1.0), "renormalised"),
    ],
)
def test_what_no_weight_does_is_refused(kind, base, words):
    holder = nn.ModuleDict({"at": base})
    config_of, options = LINEAR[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.inject_adapter_in_model(config_of(target_modules=["at"], **options), holder, "a")
    with pytest.raises(MergeError, match=f"no weight of at does .*{words}"):
        check_mergeable("at", holder["at"], ["a"], shared=False)


def test_a_trap_springs_when_peft_no_longer_has_it():
    """The forward differs from the merge by more than rounding today; else take the row away."""
    for base, kind in ((_conv(padding_mode="reflect"), "lora"), (_conv(), "oft")):
        holder = nn.ModuleDict({"at": base.double()})
        config_of, options = LINEAR[kind]
        peft.inject_adapter_in_model(config_of(target_modules=["at"], **options), holder, "a")
        layer, x = holder.double()["at"], _input("conv2d")
        for key, parameter in layer.named_parameters():
            parameter.data += 0.1 * ("base_layer" not in key)
        unmerged = layer(x)
        layer.merge()
        assert trap_of(layer)
        assert (layer(x) - unmerged).abs().max() > 0.01


def test_a_bias_needs_a_layer_that_takes_one():
    class Odd(nn.Linear):
        def forward(self, x):
            return x @ self.weight.T

    holder = nn.ModuleDict({"at": Odd(8, 8, bias=False)})
    with pytest.warns(UserWarning, match="has no bias"):
        peft.inject_adapter_in_model(
            peft.LoraConfig(target_modules=["at"], lora_bias=True), holder, "a"
        )
    with pytest.raises(MergeError, match="Odd has no place for one"):
        fold("at", holder["at"], ["a"])


def test_an_update_beyond_float16_is_refused():
    layer = _layer("lora", "linear", dtype=torch.float32)
    layer.base_layer.half()
    layer.lora_B["a"].weight.data += 3e5
    with pytest.raises(MergeError, match=r"merged at\.weight is not finite in float16"):
        fold("at", layer, ["a"])


def test_figures_count_what_rounding_takes():
    layer = _layer("lora", "no-bias", names="a", dtype=torch.float32)
    layer.base_layer.weight.data.fill_(1.0)
    layer.base_layer.to(torch.bfloat16)
    layer.lora_A["a"].weight.data.fill_(0.0)
    layer.lora_A["a"].weight.data[0, :8] = 1.0
    layer.lora_B["a"].weight.data.fill_(0.0)
    layer.lora_B["a"].weight.data[:, 0] = 4 / 11 * 2**-9  # a quarter of bfloat16's step at 1
    figures = fold("at", layer, ["a"]).figures
    assert (figures["updated"], figures["unchanged"], figures["weights"]) == (128, 128, 256)
    assert figures["max_error"] == pytest.approx(2**-9, rel=1e-6)  # float32 sums
    assert figures["error_square"] == pytest.approx(figures["update_square"], rel=1e-6)


def test_every_kind_has_the_row_that_its_forward_asks_for():
    rows = {kind: kind_of_layer(_layer(kind, "linear")) for kind in LINEAR}
    assert {k for k, row in rows.items() if row.combine == "chain"} == {
        *CHAINS, "ia3", "ia3-ff",
    }  # fmt: skip


def test_a_method_without_a_row_merges_alone_and_has_strengths():
    layer, x = _set(_layer("fourierft", "linear"), "a", {"a": 0.3}), _input("linear")
    unmerged = layer(x)
    put(layer, fold("at", layer, "a"), shared=())
    assert torch.allclose(layer(x), unmerged, rtol=0, atol=1e-12)  # float64 rounding
    with pytest.raises(MergeError, match="only one can be merged"):
        fold("at", _layer("fourierft", "linear"), "ab")


def test_a_method_that_swaps_modules_is_refused():
    layer = _layer("ln", "norm", names="a")
    with pytest.raises(MergeError, match="otherwise than into its weights"):
        fold("at", layer, "a")
    assert not layer.merged
