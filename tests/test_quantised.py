"""Quantised bases: they train as their dense twin does, and nothing of them changes.

The judge of every kind is its dense twin: the same model whose linears hold the weights as the
kind's own package dequantises them.
"""

import copy
import importlib
from functools import cache
from types import SimpleNamespace

import peft
import pytest
import torch
import transformers
from safetensors import safe_open
from torch import nn

from hf_lora import (
    attach_lora,
    base_model,
    detach_lora,
    load_lora,
    merge_lora,
    open_adapter,
    plan_lora,
    save_lora,
    set_adapters,
)
from hf_lora.errors import InvalidOption, MergeError, UnsupportedHost, UnsupportedTarget
from hf_lora.layers.quantised import keep_unpacked
from hf_lora.quantised import FOREIGN, STORAGES, bytes_in, storage_of, stored_layers
from hf_lora.testing import tiny, tiny_batch
from tests.support import logits, randomise, snapshot, tuner_layers

SIZES = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
VALUES = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128) + 2 * 96 * 64 + 5 * 64
LAYERS = {
    "nf4": "peft.tuners.lora.bnb.Linear4bit",
    "nf4 double": "peft.tuners.lora.bnb.Linear4bit",
    "fp4": "peft.tuners.lora.bnb.Linear4bit",
    "int8": "peft.tuners.lora.bnb.Linear8bitLt",
    "torchao": "peft.tuners.lora.torchao.TorchaoLoraLinear",
    "hqq": "peft.tuners.lora.hqq.HqqLoraLinear",
    # not its int4, which compiles an extension for a minute: benchmarks/quantised.py trains on that
    "quanto8": "peft.tuners.lora.layer.Linear",
}
PACKAGE = {
    "torchao": "torchao",
    "hqq": "hqq",
    "quanto8": "optimum.quanto",
}
KINDS = list(LAYERS)
ONE_A_STORAGE = ["nf4", "int8", "torchao", "hqq", "quanto8"]
DORA = [kind for kind in KINDS if kind != "int8"]  # int8 on the CPU: see its own test


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).save_pretrained(path)
    return path


def config_of(kind, dtype=torch.float32):
    bnb = transformers.BitsAndBytesConfig
    if kind == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig

        return transformers.TorchAoConfig(Int8WeightOnlyConfig())
    return {
        "nf4": bnb(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype),
        "nf4 double": bnb(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        ),
        "fp4": bnb(load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_compute_dtype=dtype),
        "int8": bnb(load_in_8bit=True),
        "quanto8": transformers.QuantoConfig(weights="int8"),
    }[kind]


def built(kind, folder, dtype=torch.float32, auto=transformers.AutoModelForCausalLM, **config):
    """A freshly quantised base, in evaluation mode."""
    pytest.importorskip(PACKAGE.get(kind, "bitsandbytes"), reason="the kind's package is optional")
    if kind == "hqq":  # transformers 5.23 cannot load it
        return copy.deepcopy(by_hqq(folder, dtype))  # quantising takes it seconds
    quantisation = config_of(kind, dtype)
    for name, value in config.items():
        setattr(quantisation, name, value)
    return auto.from_pretrained(folder, dtype=dtype, quantization_config=quantisation)


@cache
def by_hqq(folder, dtype):
    from hqq.core.quantize import BaseQuantizeConfig
    from hqq.models.hf.base import AutoHQQHFModel

    model = dense(folder, dtype)
    bits = BaseQuantizeConfig(nbits=4, group_size=64)
    AutoHQQHFModel.quantize_model(model, bits, compute_dtype=dtype, device="cpu")
    return model


def dense(folder, dtype=torch.float32):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def dequantised(layer):
    """The weight as the kind's own package has it."""
    name = type(layer).__name__
    if name == "Linear4bit":
        functional = importlib.import_module("bitsandbytes.functional")
        return functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    if name == "Linear8bitLt":
        functional = importlib.import_module("bitsandbytes.functional")
        scales = layer.state.SCB if layer.weight.SCB is None else layer.weight.SCB
        return functional.int8_vectorwise_dequant(layer.weight.data, scales)
    return layer.dequantize() if name == "HQQLinear" else layer.weight.dequantize()


def twin_of(model, folder):
    """The dense twin of a quantised model without adapters."""
    twin = dense(folder)
    for path, (layer, _) in stored_layers(model).items():
        twin.get_submodule(path).weight.data.copy_(dequantised(layer))
    return twin


def flat(name, tensor):
    """Yields the plain tensors of a tensor, which may be one that holds others."""
    if hasattr(tensor, "__tensor_flatten__"):
        for part in tensor.__tensor_flatten__()[0]:
            yield from flat(f"{name}.{part}", getattr(tensor, part))
    elif isinstance(tensor, torch.Tensor):
        yield name, tensor.detach().clone()


def beside(module):
    """What the kinds keep of a weight beside it: scales, codes, zero points."""
    state = getattr(module._parameters.get("weight"), "quant_state", None)
    found = dict(getattr(module, "meta", {})) | ({} if state is None else state.as_dict())
    if hasattr(module, "state"):
        found["SCB"] = module.state.SCB if module.weight.SCB is None else module.weight.SCB
    return found


def pieces(model):
    """Every tensor of the base, scales and codes included."""
    found = {}
    for path, module in model.named_modules():
        if "lora_" not in path:
            for key, tensor in (module._parameters | module._buffers | beside(module)).items():
                found |= flat(f"{path.replace('.base_layer', '')}.{key}", tensor)
    return found


def state_of(model):
    """All that attaching could change but tensors, whose classes compare in ways of their own."""
    return {key: value for key, value in snapshot(model).items() if key != "tensors"}


def assert_equal(before, after):
    assert before.keys() == after.keys()
    assert not [name for name in before if not torch.equal(before[name], after[name])]


def same_values(ours, theirs, seed=3):
    """Gives two models with the same trainable parameters the same random ones."""
    generator = torch.Generator().manual_seed(seed)
    own = dict(ours.named_parameters())
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            noise = 0.05 * torch.randn(parameter.shape, generator=generator)
            value = parameter.data * (1 + noise) if parameter.all() else noise
            parameter.data.copy_(value)
            own[name].data.copy_(value)


def gradients(model):
    model.train()
    model.zero_grad()
    model(**tiny_batch(model)).loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def distance(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert not [name for name in ours if ours[name] is None]
    return max(float((ours[n] - g).norm() / g.norm().clamp(min=1e-9)) for n, g in theirs.items())


def steps(model, count=20, rate=1e-2):
    batch = tiny_batch(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    losses = []
    for _ in range(count):
        loss = model(**batch).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses


def plain_peft(kind, folder, saved):
    """The adapter on a fresh base by plain peft, which then computes in the same layout."""
    base = built(kind, folder)
    keep_unpacked(stored_layers(base))
    return peft.PeftModel.from_pretrained(base, saved).eval()


# -- what trains, and how


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_base_is_planned_by_its_true_counts(kind, folder):
    model = built(kind, folder)
    plan = plan_lora(model, rank=4)
    same = plan_lora(dense(folder), rank=4)
    assert plan.host_parameters == same.host_parameters == VALUES
    assert plan.adapter_parameters == same.adapter_parameters
    assert [t.shape for t in plan.targets] == [t.shape for t in same.targets]
    assert plan.quantised.layers == 14
    assert plan.quantised.parameters == sum(t.shape[0] * t.shape[1] for t in plan.targets)
    assert plan.to_dict()["quantised"]["bytes"] == plan.quantised.bytes
    assert f"Quantised: {plan.quantised.kinds[0]}" in str(plan)
    assert same.quantised is None
    assert "Quantised" not in str(same)
    attach_lora(model, rank=4)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trainable == plan.trainable_parameters
    kinds = {f"{type(x).__module__}.{type(x).__name__}" for x in tuner_layers(model).values()}
    assert kinds == {LAYERS[kind]}


ORDER = 1e-5  # kernels of int8 sum in another order than float32; 4 bit agree to the bit here


@pytest.mark.parametrize(
    ("kind", "dora"), [(k, False) for k in KINDS] + [(k, True) for k in DORA], ids=str
)
def test_logits_and_every_gradient_are_those_of_the_dense_twin(kind, dora, folder):
    model = built(kind, folder)
    twin = twin_of(model, folder)
    for each in (model, twin):
        attach_lora(each, config=peft.LoraConfig(r=4, lora_alpha=11, use_dora=dora))
    same_values(model, twin)
    ours, theirs = gradients(model), gradients(twin)
    assert distance(ours, theirs) <= ORDER
    with torch.no_grad():
        outputs = [m(**tiny_batch(m)).logits for m in (model, twin)]
    assert (outputs[0] - outputs[1]).abs().max() <= ORDER


@pytest.mark.parametrize("kind", KINDS)
def test_training_lowers_the_loss_and_the_file_gives_the_trained_model_everywhere(
    kind, folder, tmp_path
):
    model = built(kind, folder)
    before = pieces(model)
    attach_lora(model, rank=4, alpha=11)
    model.train()
    losses = steps(model)
    assert losses[-1] < losses[0] - 0.3
    assert all(gradient.any() for gradient in gradients(model).values())
    assert_equal(before, pieces(model))
    trained = logits(model)
    save_lora(model, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }

    fresh = built(kind, folder)
    report = load_lora(fresh, tmp_path)
    assert torch.equal(logits(fresh), trained)
    assert report.base == "not verified: the file carries no fingerprint"
    assert report.digest == open_adapter(tmp_path).digest
    assert torch.equal(logits(plain_peft(kind, folder, tmp_path)), trained)
    ours = dict(model.named_parameters())
    loaded = {n: p for n, p in fresh.named_parameters() if "lora_" in n}
    assert all(torch.equal(p, ours[n]) for n, p in loaded.items())

    whole = dense(folder)
    assert load_lora(whole, tmp_path).base == "not verified: the file carries no fingerprint"
    save_lora(whole, tmp_path / "again")
    assert open_adapter(tmp_path / "again").digest == report.digest
    back = load_lora(built(kind, folder), tmp_path / "again")
    assert back.base == "not verified: the host is quantised"


@pytest.mark.parametrize("kind", ["nf4", "int8", "torchao", "quanto8"])
def test_a_half_precision_base_trains_float32_factors(kind, folder, tmp_path):
    dtype = torch.bfloat16
    model = attach_lora(built(kind, folder, dtype), rank=4)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    losses = steps(model.train())
    assert losses[-1] < losses[0] - 0.3
    save_lora(model, tmp_path)
    fresh = built(kind, folder, dtype)
    load_lora(fresh, tmp_path)
    assert torch.equal(logits(fresh), logits(model))


@pytest.mark.parametrize("kind", KINDS)
def test_detach_leaves_no_trace(kind, folder):
    model = built(kind, folder)
    outputs = logits(model)
    model = built(kind, folder)
    before, bits = state_of(model), pieces(model)
    randomise(attach_lora(model, rank=4))
    attach_lora(model, name="second", rank=2)
    logits(model)
    detach_lora(model, "second")
    detach_lora(model)
    assert_equal(bits, pieces(model))
    assert before == state_of(model)
    assert torch.equal(logits(model), outputs)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", ONE_A_STORAGE)
def test_checkpointing_gives_the_same_gradients_and_asks_for_its_own_input_gradients(
    kind, reentrant, folder
):
    model = randomise(attach_lora(built(kind, folder), rank=4))
    assert not hasattr(model, "_require_grads_hooks")
    plain = gradients(model)
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    assert distance(gradients(model), plain) == 0
    earlier = built(kind, folder)
    earlier.activation_checkpointing_enable({"use_reentrant": reentrant})
    hooks = snapshot(earlier)["hooks"]
    assert distance(gradients(randomise(attach_lora(earlier, rank=4))), plain) == 0
    detach_lora(earlier)
    assert snapshot(earlier)["hooks"] == hooks


def test_norms_in_float32_alone_would_break_a_half_precision_head(folder):
    """Why they stay as loaded; peft's preparation makes embeddings and head float32, too."""
    model = attach_lora(built("nf4", folder, torch.bfloat16), rank=4)
    model(**tiny_batch(model))
    for layer in model.modules():
        if "Norm" in type(layer).__name__:
            layer.float()
    with pytest.raises(RuntimeError, match="same dtype"):
        model(**tiny_batch(model))


# -- strengths and switches


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "torchao", "hqq", "quanto8"])
def test_strengths_are_those_of_the_dense_twin(kind, dora, folder):
    model = built(kind, folder)
    twin = twin_of(model, folder)
    plain = logits(twin)
    for each in (model, twin):
        for name in ("a", "b"):
            config = peft.LoraConfig(r=4, lora_alpha=11, use_dora=dora)
            attach_lora(each, config=config, name=name)
    for name in ("a", "b"):
        for each in (model, twin):
            set_adapters(each, name)
        same_values(model, twin, seed=len(name) + ord(name))
    for weights in ({"a": 0.5}, {"a": 1.0, "b": -0.3}, {"b": 1.0}):
        for each in (model, twin):
            set_adapters(each, weights)
        # of float32 sums in another order; DoRA with a strength sums apart from the base
        assert torch.allclose(logits(model), logits(twin), atol=1e-5)
    set_adapters(model, "a", 0)
    with base_model(model):
        none = logits(model)
    assert torch.equal(logits(model), none)
    assert torch.allclose(none, plain, atol=1e-5)  # torchao's product is made in another order


# -- merging


@pytest.mark.parametrize("kind", KINDS)
def test_a_merge_is_refused_and_nothing_changes(kind, folder):
    model = randomise(attach_lora(built(kind, folder), rank=4))
    before, bits, outputs = state_of(model), pieces(model), logits(model)
    with pytest.raises(MergeError, match=r"q_proj is quantised.*hf-lora merge MODEL ADAPTER OUT"):
        merge_lora(model)
    assert_equal(bits, pieces(model))
    assert before == state_of(model)
    assert torch.equal(logits(model), outputs)


@pytest.mark.parametrize("kind", ["nf4", "nf4 double", "int8"])
def test_a_dequantised_base_merges_what_was_trained_on_the_quantised_one(kind, folder, tmp_path):
    model = randomise(attach_lora(built(kind, folder), rank=4))
    model.train()  # int8 has 8-bit activations in evaluation mode
    with torch.no_grad():
        trained = model(**tiny_batch(model)).logits
    save_lora(model, tmp_path)
    model.dequantize()
    with pytest.raises(MergeError, match="dequantised below its adapter"):
        merge_lora(model)
    with torch.no_grad():  # the same sums of float32, int8's in another order
        assert torch.allclose(model(**tiny_batch(model)).logits, trained, atol=1e-5)
    detach_lora(model)
    load_lora(model, tmp_path)
    merge_lora(model)
    # one product with W + BA for two with W and BA
    assert torch.allclose(logits(model), trained, atol=1e-5)


# -- what a kind does not do


def method_config(method):
    sizes = {
        "LORA": {"r": 4},
        "ADALORA": {"init_r": 6, "target_r": 4, "total_step": 100},
        "IA3": {"feedforward_modules": []},
        "OFT": {"oft_block_size": 4},
        "BOFT": {"boft_block_size": 4},
        "LOHA": {"r": 4},
        "LOKR": {"r": 4},
        "HRA": {"r": 4},
        "MISS": {"r": 4},
        "C3A": {"block_size": 16},
        "FOURIERFT": {"n_frequency": 50},
    }
    kind = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(method)]
    return kind(**sizes[method])


METHODS = ["ADALORA", "IA3", "OFT", "BOFT", "LOHA", "LOKR", "HRA", "MISS", "C3A", "FOURIERFT"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ONE_A_STORAGE)
@pytest.mark.filterwarnings("ignore:(?s).*(CUDA|boft_n_butterfly).*:UserWarning")
def test_each_row_names_the_methods_that_compute_as_on_the_dense_twin(kind, method, folder):
    model = built(kind, folder)
    row = storage_of(model.model.layers[0].self_attn.q_proj)
    if method not in row.methods:
        before, bits = state_of(model), pieces(model)
        with pytest.raises(InvalidOption, match=f"{method} reads the weight") as caught:
            attach_lora(model, config=method_config(method))
        assert caught.value.field == "config"
        assert_equal(bits, pieces(model))
        assert before == state_of(model)
        return
    twin = twin_of(model, folder)
    for each in (model, twin):
        torch.manual_seed(0)
        attach_lora(each, config=method_config(method))
    same_values(model, twin)
    assert distance(gradients(model), gradients(twin)) < 1e-4  # int8 sums in another order


def test_a_file_of_a_method_that_misreads_packed_weights_is_refused(folder, tmp_path):
    save_lora(attach_lora(dense(folder), config=peft.LoHaConfig(r=4)), tmp_path)
    model = built("nf4", folder)
    before = state_of(model)
    with pytest.raises(InvalidOption, match="LOHA reads the weight"):
        load_lora(model, tmp_path, strict=False)
    assert before == state_of(model)


@pytest.mark.parametrize(
    ("field", "value"), [("use_qalora", True), ("init_lora_weights", "mica")], ids=str
)
def test_a_variant_that_peft_would_leave_out_is_refused_by_name(field, value, folder):
    model = built("nf4", folder)
    with pytest.raises(InvalidOption, match=field) as caught:
        attach_lora(model, config=peft.LoraConfig(r=4, **{field: value}))
    assert caught.value.field == field
    assert not tuner_layers(model)


def test_dora_on_int8_is_refused_on_the_cpu_alone(folder, tmp_path):
    save_lora(attach_lora(dense(folder), config=peft.LoraConfig(r=4, use_dora=True)), tmp_path)
    model = built("int8", folder)
    before, bits = state_of(model), pieces(model)
    for call in (
        lambda: attach_lora(model, config=peft.LoraConfig(r=4, use_dora=True)),
        lambda: load_lora(model, tmp_path, strict=False),
    ):
        with pytest.raises(InvalidOption, match="use_dora cannot be had on .*int8 on the cpu"):
            call()
    assert_equal(bits, pieces(model))
    assert before == state_of(model)


def test_peft_still_loses_the_scales_of_int8_below_dora(folder):
    """When this fails, `no_dora` of the row can go."""
    config = peft.LoraConfig(r=4, use_dora=True, target_modules=["q_proj"])
    model = peft.get_peft_model(built("int8", folder), config).train()
    model(**tiny_batch(model))
    with pytest.raises(AttributeError, match="NoneType"):
        model(**tiny_batch(model))


def test_packed_weights_are_no_parameters_to_adapt(folder):
    model = built("nf4", folder)
    config = peft.LoraConfig(r=4, target_parameters=["q_proj.weight"])
    with pytest.raises(UnsupportedTarget, match=r"q_proj\.weight is packed"):
        attach_lora(model, config=config)


def test_a_base_that_its_quantiser_calls_untrainable_is_refused(folder):
    model = dense(folder)
    model.hf_quantizer = SimpleNamespace(is_trainable=False)
    model.config.quantization_config = SimpleNamespace(quant_method="gptq")
    with pytest.raises(UnsupportedHost, match="quantised by gptq"):
        plan_lora(model)
    with pytest.raises(UnsupportedHost, match="nothing can be trained on"):
        attach_lora(model)
    model.hf_quantizer.packed_modules = {}  # as a GGUF file leaves it that was loaded as floats
    attach_lora(model)


def test_a_base_that_passes_no_gradient_is_refused(folder):
    """transformers 5.23 calls torchao's dynamically quantised activations trainable."""
    pytest.importorskip("torchao", reason="the kind's package is optional")
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    config = transformers.TorchAoConfig(Int8DynamicActivationInt8WeightConfig())
    model = dense(folder)
    model = type(model).from_pretrained(folder, quantization_config=config, dtype=torch.float32)
    before = snapshot_flags(model)
    with pytest.raises(UnsupportedHost, match="no gradient passes model.layers.0.self_attn.q_proj"):
        attach_lora(model)
    assert snapshot_flags(model) == before


def snapshot_flags(model):
    names = {n: (p.requires_grad, id(p)) for n, p in model.named_parameters()}
    return names, {n: type(m) for n, m in model.named_modules()}, set(vars(model))


class Packed(nn.Module):
    """A linear of nobody's package: bytes in a buffer, and floats when it runs."""

    def __init__(self, linear, through=True):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.through = through
        self.scale = linear.weight.abs().max().item() / 127
        rounded = (linear.weight.detach() / self.scale).round().to(torch.int8)
        self.register_buffer("codes", rounded)

    def forward(self, x):
        y = nn.functional.linear(x, self.codes.float() * self.scale)
        return y if self.through else y.detach() + 0 * x.sum()


def _packed(through=True):
    model = tiny("llama")
    for block in model.model.layers:
        for name, layer in list(block.self_attn.named_children()):
            setattr(block.self_attn, name, Packed(layer, through))
    return model


def test_layers_that_nobody_knows_are_counted_named_and_tried():
    plan = plan_lora(_packed(), targets="mlp")
    assert plan.host_parameters == plan_lora(tiny("llama")).host_parameters
    assert plan.quantised.kinds == ("Packed",)
    assert "8 layers are quantised as Packed" in plan.notes[-1]
    attach_lora(_packed(), targets="mlp")
    with pytest.raises(UnsupportedHost, match="no gradient passes"):
        attach_lora(_packed(through=False), targets="mlp")
    with pytest.raises(UnsupportedTarget, match="peft cannot attach this"):
        attach_lora(_packed())
    assert storage_of(Packed(nn.Linear(4, 4))) is FOREIGN


# -- the layout of bitsandbytes' inference kernel


@cache
def repacks():
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is optional")
    return functional.has_avx512bf16()


def run_in_eval_mode(model):
    """Runs the base as an evaluation does; skips where bitsandbytes would not repack."""
    if not repacks():
        pytest.skip("bitsandbytes repacks on CPUs with AVX512-BF16 alone")
    outputs = logits(model)
    layers = [layer for layer, _ in stored_layers(model).values()]
    assert all(layer.weight.quant_state.packing_format_for_cpu for layer in layers)
    return outputs


@pytest.mark.parametrize("kind", ["nf4", "nf4 double", "fp4"])
def test_evaluation_between_steps_takes_no_gradient_away(kind, folder):
    model = randomise(attach_lora(built(kind, folder), rank=4))
    before, bits = gradients(model), pieces(model)
    logits(model)
    model.state_dict()
    assert distance(gradients(model), before) == 0
    assert_equal(bits, pieces(model))


@pytest.mark.filterwarnings("ignore:bitsandbytes..gemv_4bit. an autograd kernel:UserWarning")
def test_bitsandbytes_still_stops_gradients_after_an_evaluation(folder):
    """When this fails, `keep_unpacked` can go."""
    config = peft.LoraConfig(r=4, target_modules="all-linear")
    model = randomise(peft.get_peft_model(built("nf4", folder), config))
    before = gradients(model)
    run_in_eval_mode(model)
    assert distance(gradients(model), before) > 0.1
    twin = built("nf4", folder)
    run_in_eval_mode(twin)
    outputs = logits(twin)
    twin.state_dict()
    assert not torch.allclose(logits(twin), outputs, atol=1e-3)  # scales in another order


@pytest.mark.parametrize("kind", ["nf4", "nf4 double", "fp4"])
def test_a_base_that_was_evaluated_is_unpacked_and_says_so(kind, folder):
    model = built(kind, folder)
    before = run_in_eval_mode(model)
    plan = plan_lora(model)
    assert "rounded its scales to bfloat16" in plan.notes[-1]
    attach_lora(model, rank=4)
    twin = attach_lora(twin_of_packed(model, folder), rank=4)
    same_values(model, twin)
    assert distance(gradients(model), gradients(twin)) == 0
    detach_lora(model)
    assert torch.equal(logits(model), before)


def twin_of_packed(model, folder):
    detached = copy.deepcopy(model)
    detach_lora(detached)
    return twin_of(detached, folder)


@pytest.mark.parametrize("kind", ["nf4", "nf4 double", "fp4"])
def test_unpacking_is_the_exact_inverse_but_for_the_rounding_of_scales(kind, folder):
    model = built(kind, folder)
    functional = importlib.import_module("bitsandbytes.functional")
    layer = model.model.layers[0].mlp.down_proj
    data = layer.weight.data.clone()
    state = copy.deepcopy(layer.weight.quant_state)
    if state.nested:
        scales = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    else:
        scales = state.absmax
    packed = functional._convert_weight_packed_for_cpu(data, layer.weight.quant_state)
    layer.weight.data, layer.weight.quant_state = packed
    keep_unpacked({"down": (layer, storage_of(layer))})
    assert torch.equal(layer.weight.data, data)
    assert torch.equal(layer.weight.quant_state.absmax, scales.bfloat16().float())
    again, state = functional._convert_weight_packed_for_cpu(
        layer.weight.data, copy.copy(layer.weight.quant_state)
    )
    assert torch.equal(again, packed[0])


def test_an_attach_that_fails_leaves_a_packed_base_as_it_was(folder, monkeypatch):
    model = built("nf4", folder)
    before = run_in_eval_mode(model)
    held = {n: p for n, p in model.named_parameters()}

    def fail(*_):
        raise RuntimeError("at the last step")

    monkeypatch.setattr("hf_lora.attach.check_targets", fail)
    with pytest.raises(RuntimeError, match="last step"):
        attach_lora(model)
    assert all(p is held[n] for n, p in model.named_parameters())
    layer = model.model.layers[0].self_attn.q_proj
    assert layer.support_avx512bf16_for_cpu
    assert layer.quant_state is layer.weight.quant_state
    assert torch.equal(logits(model), before)


# -- task heads


def classifier(family, tmp_path, dtype=torch.bfloat16, **config):
    tiny(family, task="classifier").to(dtype).save_pretrained(tmp_path)
    auto = transformers.AutoModelForSequenceClassification
    return built("nf4", tmp_path, dtype, auto, **config)


@pytest.mark.parametrize(
    ("family", "part"), [("bert", "classifier"), ("roberta", "classifier.dense")]
)
def test_a_head_that_was_quantised_is_refused_with_the_way_to_load_it(family, part, tmp_path):
    model = classifier(family, tmp_path)
    before = state_of(model)
    with pytest.raises(UnsupportedTarget, match=rf"{part} is quantised.*skip_modules=\['classif"):
        attach_lora(model)
    assert before == state_of(model)
    attach_lora(model, train_also=())
    whole = classifier(family, tmp_path, llm_int8_skip_modules=["classifier"])
    assert plan_lora(whole).heads[0].path == "classifier"


@pytest.mark.parametrize("family", ["llama", "roberta"])
def test_a_task_head_is_trained_in_float32_and_comes_back_so(family, tmp_path):
    skip = {"llm_int8_skip_modules": ["score", "classifier"]}
    model = classifier(family, tmp_path / "base", **skip)
    plan = plan_lora(model)
    assert ("task head", "float32, its input is cast") in [
        (s.what, s.value) for s in plan.quantised.settings
    ]
    before = state_of(model)
    torch.manual_seed(0)
    attach_lora(model, rank=4)
    head = {n: p for n, p in model.named_parameters() if "modules_to_save" in n}
    assert {p.dtype for p in head.values()} == {torch.float32}
    values = {n: p.detach().clone() for n, p in head.items()}
    steps(model.train(), count=3, rate=1e-5)
    # in bfloat16 most of these steps of 1e-5 round to nothing
    assert all((values[n] != p).float().mean() > 0.9 for n, p in head.items())
    weights = {n: p for n, p in head.items() if p.ndim > 1}  # biases begin at zero
    for name, weight in weights.items():
        assert (values[name].bfloat16() == weight.bfloat16()).float().mean() > 0.5
    save_lora(model, tmp_path / "saved")
    fresh = classifier(family, tmp_path / "base", **skip)
    load_lora(fresh, tmp_path / "saved")
    assert torch.equal(logits(fresh), logits(model))
    detach_lora(model)
    assert before == state_of(model.eval())


# -- what others do with the host


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU:UserWarning")
@pytest.mark.parametrize("kind", ["nf4", "torchao", "quanto8"])
def test_trainer_with_a_paged_optimizer_trains_all_factors_and_saves_the_adapter(
    kind, folder, tmp_path
):
    pytest.importorskip("bitsandbytes", reason="the optimizer is its")
    model = attach_lora(built(kind, folder), rank=4)
    ids = tiny_batch(model, rows=8)["input_ids"]
    arguments = transformers.TrainingArguments(
        output_dir=tmp_path / "runs",
        max_steps=2,
        per_device_train_batch_size=4,
        optim="paged_adamw_8bit",
        activation_checkpointing=True,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    rows = [{"input_ids": row, "labels": row} for row in ids]
    trainer = transformers.Trainer(model, arguments, train_dataset=rows)
    trainer.create_optimizer()
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters() if p.requires_grad}
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    trainer.train()
    now = dict(model.named_parameters())
    assert all((p != now[n]).any() for n, p in before.items() if "lora_B" in n)
    trainer.save_model(tmp_path / "by trainer")
    model.save_pretrained(tmp_path / "by model")
    for place in ("by trainer", "by model"):
        names = {p.name for p in (tmp_path / place).iterdir()}
        assert {"adapter_config.json", "adapter_model.safetensors"} <= names
        assert "model.safetensors" not in names
        with safe_open(tmp_path / place / "adapter_model.safetensors", "pt") as file:
            assert all("lora_" in key for key in file.keys())
        fresh = built(kind, folder)
        load_lora(fresh, tmp_path / place)
        assert torch.equal(logits(fresh), logits(model))


def test_a_four_bit_gpt2_and_a_dense_one_share_their_files(tmp_path):
    """The dense one has Conv1D layers, whose weights lie the other way round."""
    tiny("gpt2").save_pretrained(tmp_path / "base")
    model = randomise(attach_lora(built("nf4", tmp_path / "base"), targets="qv", rank=4))
    save_lora(model, tmp_path / "saved")
    whole = dense(tmp_path / "base")
    load_lora(whole, tmp_path / "saved")
    save_lora(whole, tmp_path / "again")
    back = built("nf4", tmp_path / "base")
    load_lora(back, tmp_path / "again")
    assert torch.equal(logits(back), logits(model))


# -- memory, and what was loaded oddly


@pytest.mark.parametrize(
    ("kind", "size"),
    [
        # half a byte a weight, a float32 for 64 of them, 16 codes of a float32
        ("nf4", lambda n, rows: n // 2 + 4 * n // 64 + 64),
        # the scales in a byte, with a float32 for 256 of them, 256 codes, one offset
        ("nf4 double", lambda n, rows: n // 2 + n // 64 + 4 * -(-n // 64 // 256) + 64 + 1024 + 4),
        ("int8", lambda n, rows: n + 4 * rows),
    ],
)
def test_bytes_are_those_of_the_formula(kind, size, folder):
    layers = [layer for layer, _ in stored_layers(built(kind, folder)).values()]
    expected = sum(size(x.in_features * x.out_features, x.out_features) for x in layers)
    assert bytes_in(layers) == expected


@pytest.mark.parametrize("kind", ["torchao", "hqq", "quanto8"])
def test_bytes_lie_between_the_packed_weights_and_two_thirds_of_half_precision(kind, folder):
    bits = 4 if kind == "hqq" else 8
    for layer, _ in stored_layers(built(kind, folder)).values():
        values = layer.in_features * layer.out_features
        assert values * bits / 8 < bytes_in([layer]) < values * 4 / 3


@pytest.mark.parametrize(
    ("compute", "dtype", "note"),
    [
        (
            torch.float32,
            torch.bfloat16,
            "compute in float32 and the rest of the model in bfloat16",
        ),
        (torch.float16, torch.bfloat16, "bnb_4bit_compute_dtype=torch.bfloat16"),
        (torch.bfloat16, torch.float32, "the rest of the model in float32"),
        (torch.bfloat16, torch.bfloat16, None),
    ],
    ids=str,
)
def test_a_compute_dtype_beside_the_models_is_noted(compute, dtype, note, folder):
    model = built("nf4", folder, dtype, bnb_4bit_compute_dtype=compute)
    notes = plan_lora(model).notes
    assert (not notes) if note is None else any(note in text for text in notes)


def test_every_storage_has_another_name():
    assert len({row.name for row in (*STORAGES, FOREIGN)}) == len(STORAGES) + 1
