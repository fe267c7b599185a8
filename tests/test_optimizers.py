"""Optimizers for adapters: judged by torch's AdamW, plain peft's builders and closed forms."""

import copy
import io
import warnings

import peft
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
from peft.optimizers import lorafa as peft_lorafa
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments

from hf_lora import (
    attach_lora,
    base_model,
    detach_lora,
    load_lora,
    merge_lora,
    save_lora,
    set_adapters,
)
from hf_lora.errors import (
    BadCheckpoint,
    InvalidOption,
    MergeError,
    MetaHost,
    TrainingError,
    UnsupportedHost,
    UnsupportedTarget,
)
from hf_lora.layers.parts import PartsB
from hf_lora.testing import tiny, tiny_batch
from hf_lora.training.optimizers import lora_optimizer
from tests.support import assert_same, logits, snapshot, tuner_layers

KINDS = ["adamw", "lora+", "lora-fa"]


def steps(model, optimizer, count=3, seed=1):
    """Trains on fixed batches; gradients are dropped before a step, so the last ones stay."""
    model.train()
    for step in range(count):
        optimizer.zero_grad()
        torch.manual_seed(seed + step)  # of dropout
        model(**tiny_batch(model, seed=seed + step)).loss.backward()
        optimizer.step()
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def attached(model, **arguments):
    """Attaches with the same random A each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return randomised(attach_lora(model, **arguments))


def mixed():
    """A classifier with all that is neither A nor B: head, magnitudes, embedding."""
    model = tiny("llama", task="classifier")
    config = peft.LoraConfig(
        r=4, use_dora=True, target_modules=["q_proj", "down_proj", "embed_tokens"]
    )
    return attached(model, config=config)


def biased():
    config = peft.LoraConfig(r=4, lora_bias=True, target_modules=["query", "value"])
    return attached(tiny("bert", task="classifier"), config=config)


def experts():
    model = tiny("qwen3_moe")
    model.set_experts_implementation("eager")  # grouped products are not for float64
    return attached(model, rank=4, targets="experts")


def parts():
    return attached(tiny("gpt2"), rank=4, targets="qv")


def plain():
    return attached(tiny("llama"), rank=4)


def randomised(model):
    """Moves the trained values a little: zeros would hide half of the terms."""
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator) * 0.02
            parameter.data += noise
    return model


class Layers(nn.Module):
    """Layers on which a LoRA lies otherwise than on a linear, one after the other."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(11, 8)
        self.conv = nn.Conv2d(1, 6, 3, padding=1)
        self.grouped = nn.Conv2d(6, 4, 3, padding=1, groups=2)
        self.last = nn.Linear(8, 5)

    def forward(self, ids, delta=None):
        x = self.conv(self.words(ids)[:, None])
        y = self.grouped(x)
        if delta is not None:
            y = y + nn.functional.conv2d(x, delta, padding=1)
        return self.last(y).square().mean()


def layers(**settings):
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        torch.manual_seed(0)
        warnings.simplefilter("ignore")  # peft says of a grouped convolution that merges are not
        config = peft.LoraConfig(r=4, target_modules=["words", "conv", "grouped", "last"])
        return randomised(peft.inject_adapter_in_model(config, Layers())).double()


IDS = torch.arange(18).reshape(3, 6) % 11
HOSTS = {
    "plain": plain,
    "mixed": mixed,
    "biased": biased,
    "experts": experts,
    "parts": parts,
    "layers": layers,
}


# --- what is in which group ------------------------------------------------------------------


def role_by_name(name):
    """Which group a parameter belongs to, by the names that peft gives."""
    if "magnitude" in name or name.endswith("bias"):
        return "vectors"
    if "modules_to_save" in name:
        return "whole"
    return "A" if "lora_A" in name or "lora_embedding_A" in name else "B"


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_trainable_parameter_is_in_exactly_one_group_the_right_one(kind, host):
    model = HOSTS[host]()
    optimizer = lora_optimizer(model, kind, lr=1e-3, weight_decay=0.1)
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(map(id, trainable.values()))
    for group in optimizer.param_groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            assert trainable[name] is parameter
            assert role_by_name(name) == group["name"]
        assert group["weight_decay"] == (0 if group["name"] == "vectors" else 0.1)
        assert group["lr"] == (16e-3 if (kind, group["name"]) == ("lora+", "B") else 1e-3)
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    fixed = {n for n in frozen if ".lora_A." in n or ".lora_embedding_B." in n}
    assert bool(fixed) is (kind == "lora-fa")


@pytest.mark.parametrize(
    "config",
    [
        peft.LoHaConfig(r=4),
        peft.IA3Config(),
        peft.OFTConfig(r=0, oft_block_size=4),
        peft.AdaLoraConfig(init_r=4, total_step=9),
        peft.LoraConfig(r=4, init_lora_weights="mica"),
        peft.LoraConfig(r=4, trainable_token_indices=[3, 5]),
    ],
    ids=["loha", "ia3", "oft", "adalora", "mica", "tokens"],
)
def test_adamw_trains_adapters_of_any_method_as_torch_does(config):
    model = attach_lora(tiny("llama"), config=config)
    twin = copy.deepcopy(model)
    optimizer = lora_optimizer(model, lr=1e-2)
    judge = torch.optim.AdamW(
        [p for p in twin.parameters() if p.requires_grad], lr=1e-2, weight_decay=0
    )
    assert same(steps(model, optimizer, 2), steps(twin, judge, 2))


@pytest.mark.parametrize("host", ["plain", "mixed", "biased", "experts", "parts"])
def test_adamw_equals_torch_bit_for_bit(host):
    model = HOSTS[host]()
    twin = copy.deepcopy(model)
    optimizer = lora_optimizer(model, lr=1e-2, betas=(0.8, 0.95), eps=1e-7)
    judge = torch.optim.AdamW(
        [p for p in twin.parameters() if p.requires_grad],
        **{"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-7, "weight_decay": 0},
    )
    assert same(steps(model, optimizer), steps(twin, judge))


@pytest.mark.parametrize("host", ["plain", "mixed", "biased", "experts", "parts"])
def test_lora_plus_equals_adamw_with_groups_made_by_hand(host):
    model = HOSTS[host]()
    twin = copy.deepcopy(model)
    optimizer = lora_optimizer(model, "lora+", lr=1e-3, ratio=8, weight_decay=0.1)
    by_hand = {"A": [], "B": [], "whole": [], "vectors": []}
    for name, parameter in twin.named_parameters():
        if parameter.requires_grad:
            by_hand[role_by_name(name)].append(parameter)
    judge = torch.optim.AdamW(
        [
            {"params": by_hand["A"] + by_hand["whole"]},
            {"params": by_hand["B"], "lr": 8e-3},
            {"params": by_hand["vectors"], "weight_decay": 0},
        ],
        lr=1e-3,
        weight_decay=0.1,
    )
    assert same(steps(model, optimizer), steps(twin, judge))


def test_lora_plus_equals_plain_peft_where_nothing_is_but_a_and_b():
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"])
    model = peft.get_peft_model(tiny("llama"), config)
    twin = copy.deepcopy(model)
    optimizer = lora_optimizer(model, "lora+", lr=1e-3, weight_decay=0.1)
    judge = create_loraplus_optimizer(
        twin,
        torch.optim.AdamW,
        **{"lr": 1e-3, "loraplus_lr_ratio": 16, "loraplus_weight_decay": 0.1},
    )
    assert same(steps(model, optimizer), steps(twin, judge))


def test_peft_model_and_host_in_place_train_alike():
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(tiny("llama"), config)
    torch.manual_seed(0)
    model = attach_lora(tiny("llama"), config=config)
    names = []
    for host in (wrapped, model):
        optimizer = lora_optimizer(host, "lora+", lr=1e-3)
        steps(host, optimizer, 2)
        names.append([n for group in optimizer.param_groups for n in group["param_names"]])
    assert names[0] == names[1]
    assert same(dict(model.named_parameters()), dict(wrapped.get_base_model().named_parameters()))


def test_biases_that_the_config_trains_are_vectors():
    config = peft.LoraConfig(r=4, target_modules=["query"], bias="lora_only")
    model = peft.get_peft_model(tiny("bert"), config)
    groups = {g["name"]: g for g in lora_optimizer(model, "lora+", lr=1e-3).param_groups}
    assert len(groups["vectors"]["params"]) == 2  # of two layers
    assert groups["vectors"]["lr"] == 1e-3


def test_a_magnitude_of_several_dimensions_is_a_vector_and_a_b_of_rank_one_is_none():
    model = nn.Sequential(nn.Conv2d(3, 5, 3))
    config = peft.LoraConfig(r=1, use_dora=True, target_modules=["0"])
    peft.inject_adapter_in_model(config, model)
    model[0].base_layer.requires_grad_(False)
    model.peft_config = {"default": config}
    groups = {g["name"]: g["params"] for g in lora_optimizer(model, "lora+", lr=1e-3).param_groups}
    shapes = {name: tuple(p.shape for p in params) for name, params in groups.items()}
    assert shapes == {"A": ((1, 3, 3, 3),), "B": ((5, 1, 1, 1),), "vectors": ((1, 5, 1, 1),)}


def test_what_peft_holds_beside_the_model_is_trained():
    config = peft.VBLoRAConfig(
        r=2, num_vectors=4, vector_length=8, target_modules=["q_proj"], topk=2
    )
    model = peft.get_peft_model(tiny("llama"), config)
    held = [p for g in lora_optimizer(model, lr=1e-3).param_groups for p in g["params"]]
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert sorted(map(id, held)) == sorted(map(id, trainable))


# --- LoRA-FA ---------------------------------------------------------------------------------


def preconditioned(optimizer, parameter):
    """What the optimizer made of a gradient in its first step: AdamW's average is a tenth of it."""
    return optimizer.state[parameter]["exp_avg"] / (1 - 0.9)


def test_lora_fa_makes_the_full_gradient_projected_onto_the_rows_of_a():
    model = attach_lora(tiny("llama"), rank=4, alpha=11).double()
    optimizer = lora_optimizer(model, "lora-fa", lr=1e-3)
    for layer in tuner_layers(model).values():
        layer.base_layer.weight.requires_grad_(True)  # its gradient is that of the whole weight
    steps(model, optimizer, 1)
    for layer in tuner_layers(model).values():
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        update = layer.scaling["default"] * preconditioned(optimizer, b) @ a
        projection = torch.linalg.pinv(a) @ a
        expected = layer.base_layer.weight.grad @ projection
        error = (update - expected).abs().max() / expected.abs().max()
        assert error < 1e-13  # float64


def full_gradients(model, run, optimizer):
    """Takes one step; returns layer -> the gradient of its whole base weight."""
    bases = {}
    for name, layer in tuner_layers(model).items():
        key = getattr(layer, "parameter_name", "weight")
        bases[name] = layer.get_base_layer().get_parameter(key).requires_grad_(True)
    run().backward()
    optimizer.step()
    return {name: base.grad for name, base in bases.items()}


def trained_factors(layer):
    if layer.lora_embedding_A:
        return [layer.lora_embedding_A["default"]]
    b = layer.lora_B["default"]
    return list(b.parameters()) if isinstance(b, PartsB) else [b.weight]


def lies_in_a_layer_of_its_own(host):
    model = HOSTS[host]().double()
    batch = None if host == "layers" else tiny_batch(model)
    return model, lambda: model(IDS) if host == "layers" else model(**batch).loss


@pytest.mark.parametrize("host", ["plain", "parts", "experts", "layers"])
def test_lora_fa_makes_the_update_of_the_weight_nearest_to_the_full_gradient(host):
    """Nearest: what is left of the gradient has no share along any update that B can make."""
    model, run = lies_in_a_layer_of_its_own(host)
    optimizer = lora_optimizer(model, "lora-fa", lr=1e-3)
    gradients = full_gradients(model, run, optimizer)
    for name, layer in tuner_layers(model).items():
        if name == "grouped":
            continue  # peft's merged weight is wrong there; see the next test
        factors = trained_factors(layer)
        for factor in factors:
            factor.data.copy_(preconditioned(optimizer, factor))
        left = gradients[name] - layer.get_delta_weight("default").detach()
        along = torch.autograd.grad((layer.get_delta_weight("default") * left).sum(), factors)
        for share in along:
            assert share.abs().max() < 1e-12 * gradients[name].abs().max()  # float64
        assert left.norm() < gradients[name].norm()


def test_lora_fa_on_a_grouped_convolution_takes_each_group_by_itself():
    model = layers()
    optimizer = lora_optimizer(model, "lora-fa", lr=1e-3)
    # LoRA's A sees all input channels, so the update is that of an ungrouped weight
    delta = torch.zeros(4, 6, 3, 3, dtype=torch.float64, requires_grad=True)
    model(IDS, delta).backward()
    optimizer.step()
    layer = model.grouped
    a = layer.lora_A["default"].weight.flatten(1)
    b = layer.lora_B["default"].weight
    update = preconditioned(optimizer, b).flatten(1)
    for group in range(2):
        rows, share = slice(2 * group, 2 * group + 2), a[2 * group : 2 * group + 2]
        made = layer.scaling["default"] * update[rows] @ share
        expected = delta.grad.flatten(1)[rows] @ torch.linalg.pinv(share) @ share
        assert torch.allclose(made, expected, rtol=1e-11, atol=1e-15)  # float64


@pytest.mark.parametrize("rslora", [False, True])
def test_lora_fa_with_dora_has_the_closed_form_and_trains_magnitudes_as_adamw(rslora):
    config = peft.LoraConfig(
        r=4, lora_alpha=11, use_dora=True, use_rslora=rslora, target_modules=["q_proj"]
    )
    model = randomised(attach_lora(tiny("llama"), config=config)).double()
    optimizer = lora_optimizer(model, "lora-fa", lr=1e-3)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    steps(model, optimizer, 1)
    for name, layer in tuner_layers(model).items():
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        expected = torch.linalg.solve(a @ a.T, b.grad.T).T / layer.scaling["default"] ** 2
        made = preconditioned(optimizer, b)
        assert torch.allclose(made, expected, rtol=1e-10, atol=1e-14)  # float64
        m = layer.lora_magnitude_vector["default"].weight
        old = before[f"{name}.lora_magnitude_vector.default.weight"]
        # AdamW's first step: the rate times the sign, but for its eps
        moved = old - 1e-3 * m.grad / (m.grad.abs() + 1e-8)
        assert torch.allclose(m, moved, rtol=1e-13, atol=0)  # float64


def test_lora_fa_equals_plain_peft_where_that_computes_in_float32(monkeypatch):
    # with it peft projects in bfloat16, whatever the training is in
    monkeypatch.setattr(peft_lorafa, "is_bf16_available", lambda: False)
    config = peft.LoraConfig(r=4, lora_alpha=11, target_modules=["q_proj", "down_proj"])
    model = peft.get_peft_model(tiny("llama"), config)
    twin = copy.deepcopy(model)
    optimizer = lora_optimizer(model, "lora-fa", lr=1e-3, eps=1e-12)
    judge = create_lorafa_optimizer(twin, r=4, lora_alpha=11, lr=1e-3)
    for group in judge.param_groups:
        group["eps"] = 1e-12  # peft adds it elsewhere in the formula
    ours, theirs = steps(model, optimizer), steps(twin, judge)
    worst = max(float((ours[k] - theirs[k]).abs().max()) for k in ours)
    assert worst < 3e-6  # of steps of 3e-3: float32, and peft's 1e-8 on the diagonal of A A^T


@pytest.mark.parametrize("host", ["plain", "mixed", "parts", "experts"])
def test_lora_fa_leaves_the_frozen_factor_bit_identical_and_stores_less(host):
    model = HOSTS[host]()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = lora_optimizer(model, "lora-fa", lr=1e-2, weight_decay=0.1)
    fixed = {n for n, p in model.named_parameters() if not p.requires_grad}
    after = steps(model, optimizer)
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    assert not changed & fixed
    assert changed == before.keys() - fixed
    assert all("exp_avg" in s for s in optimizer.state.values())
    assert len(optimizer.state) == len(changed)


def test_lora_fa_keeps_no_input_of_the_layers_for_the_backward():
    sizes = {}
    for kind in ("adamw", "lora-fa"):
        model = attach_lora(tiny("llama"), rank=4).train()
        lora_optimizer(model, kind, lr=1e-3)
        seen = {}

        def pack(tensor, seen=seen):
            seen[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            model(**tiny_batch(model))
        sizes[kind] = sum(seen.values())
    assert sizes["lora-fa"] < 0.95 * sizes["adamw"]  # 0.78 in all on a model of width 64


def test_lora_fa_computes_in_float32_under_autocast_and_leaves_gradients_alone():
    model = plain()
    twin = copy.deepcopy(model)
    results = []
    for host in (model, twin):
        optimizer = lora_optimizer(host, "lora-fa", lr=1e-3)
        host.train()
        host(**tiny_batch(host)).loss.backward()
        before = {n: p.grad.clone() for n, p in host.named_parameters() if p.grad is not None}
        with torch.autocast("cpu", torch.bfloat16, enabled=host is twin):
            optimizer.step()
        after = {n: p.grad for n, p in host.named_parameters() if p.grad is not None}
        assert same(before, after)
        results.append({n: p.detach() for n, p in host.named_parameters()})
    assert same(*results)


def test_lora_fa_with_dependent_rows_projects_onto_what_they_span():
    model = attach_lora(tiny("llama"), rank=4, targets=["q_proj"]).double()
    for layer in tuner_layers(model).values():
        a = layer.lora_A["default"].weight
        a.data[3] = a.data[2]
        layer.base_layer.weight.requires_grad_(False)
    optimizer = lora_optimizer(model, "lora-fa", lr=1e-3)
    gradients = full_gradients(model, lambda: model(**tiny_batch(model)).loss, optimizer)
    for name, layer in tuner_layers(model).items():
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        update = layer.scaling["default"] * preconditioned(optimizer, b) @ a
        expected = gradients[name] @ torch.linalg.pinv(a) @ a
        assert torch.allclose(update, expected, rtol=1e-10, atol=1e-15)  # float64


def put_version(layer, value):
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(value)


def put_data(layer, value):
    layer.lora_A["default"].weight.data = value.clone()


def put_parameter(layer, value):
    layer.lora_A["default"].weight = nn.Parameter(value.clone(), requires_grad=False)


@pytest.mark.parametrize("put", [put_version, put_data, put_parameter])
def test_lora_fa_sees_that_another_a_was_put_in_place(put):
    outcomes = []
    for again in (False, True):
        model = plain()
        optimizer = lora_optimizer(model, "lora-fa", lr=1e-3)
        if again:
            steps(model, optimizer, 1)
            optimizer.state.clear()
            fresh = plain()
            for name, layer in tuner_layers(model).items():
                layer.lora_B["default"].load_state_dict(
                    tuner_layers(fresh)[name].lora_B["default"].state_dict()
                )
        for number, layer in enumerate(tuner_layers(model).values()):
            shape = layer.lora_A["default"].weight.shape
            put(layer, torch.randn(shape, generator=torch.Generator().manual_seed(number)))
        outcomes.append(steps(model, optimizer, 2))
    assert same(*outcomes)


def test_lora_fa_computes_anew_after_a_state_was_loaded_or_when_told():
    model = plain()
    optimizer = lora_optimizer(model, "lora-fa", lr=1e-3)
    steps(model, optimizer, 1)
    outcomes = []
    for tell in (
        lambda o: o.load_state_dict(o.state_dict()),
        lambda o: o.refresh(),
        lambda o: None,
    ):
        host, mine = copy.deepcopy((model, optimizer))
        steps(host, mine, 1)
        for layer in tuner_layers(host).values():
            # such a write leaves no mark on the parameter; one row, for AdamW knows no scale
            layer.lora_A["default"].weight.data[0].mul_(3.0)
        tell(mine)
        outcomes.append(steps(host, mine, 1))
    assert same(outcomes[0], outcomes[1])
    assert not same(outcomes[0], outcomes[2])


# --- freezing, and what takes it back --------------------------------------------------------


def flags(model):
    return {n: p.requires_grad for n, p in model.named_parameters()}


def test_activating_again_does_not_thaw_what_lora_fa_has_frozen():
    model = plain()
    lora_optimizer(model, "lora-fa", lr=1e-3)
    before = flags(model)
    set_adapters(model, "default")
    model.set_adapter("default")  # transformers' own
    assert flags(model) == before


@pytest.mark.parametrize("kind", ["adamw", "lora+"])
@pytest.mark.parametrize("host", ["plain", "mixed", "parts", "experts"])
def test_another_kind_trains_what_lora_fa_had_frozen(kind, host):
    model = HOSTS[host]()
    before = snapshot(model)
    lora_optimizer(model, "lora-fa", lr=1e-3)
    assert flags(model) != before["requires_grad"]
    optimizer = lora_optimizer(model, kind, lr=1e-3)
    after = snapshot(model)
    for attributes in after["attributes"].values():
        attributes.discard("frozen_peft_weight_names")  # an empty one, as peft leaves
    assert_same(before, after)
    judge = lora_optimizer(HOSTS[host](), kind, lr=1e-3)
    names = [[g["param_names"] for g in o.param_groups] for o in (optimizer, judge)]
    assert names[0] == names[1]


def test_detaching_leaves_no_trace_of_lora_fa():
    model = tiny("llama")
    model.lm_head.weight.requires_grad_(False)
    before = snapshot(model)
    attach_lora(model, rank=4)
    lora_optimizer(model, "lora-fa", lr=1e-3)
    detach_lora(model)
    assert_same(before, snapshot(model))
    attach_lora(model, rank=4)
    assert all(p.requires_grad for n, p in model.named_parameters() if "lora_" in n)


def test_with_several_adapters_only_the_active_ones_are_frozen_and_trained():
    model = attach_lora(attach_lora(tiny("llama"), rank=4, name="a"), rank=4, name="b")
    attach_lora(model, rank=2, name="c", targets=["q_proj"])
    set_adapters(model, ["a", "c"])
    optimizer = lora_optimizer(model, "lora-fa", lr=1e-2)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    after = steps(model, optimizer, 2)
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    assert changed == {n for n in before if n.endswith(("lora_B.a.weight", "lora_B.c.weight"))}
    detach_lora(model, "c")
    set_adapters(model, "b")
    assert all(p.requires_grad for n, p in model.named_parameters() if ".b.weight" in n)
    set_adapters(model, "a")
    lora_optimizer(model, lr=1e-3)
    assert all(p.requires_grad for n, p in model.named_parameters() if ".a.weight" in n)


def test_what_lora_fa_has_trained_is_saved_whole_and_loads(tmp_path):
    model = plain()
    steps(model, lora_optimizer(model, "lora-fa", lr=1e-2))
    save_lora(model, tmp_path / "fa")
    judge = peft.PeftModel.from_pretrained(tiny("llama"), tmp_path / "fa")
    assert torch.equal(logits(judge.get_base_model()), logits(model))
    again = tiny("llama")
    load_lora(again, tmp_path / "fa", trainable=True)
    assert all(p.requires_grad for n, p in again.named_parameters() if "lora_" in n)


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


def test_in_ddp_the_set_of_trained_parameters_may_not_change_any_more(one_process):
    model = plain()
    wrapped = DistributedDataParallel(model)
    before = flags(model)
    with pytest.raises(TrainingError, match="freezes A and the model is in DistributedData"):
        lora_optimizer(wrapped, "lora-fa", lr=1e-3)
    assert flags(model) == before
    steps(wrapped, lora_optimizer(wrapped, "lora+", lr=1e-3), 1)
    lora_optimizer(model, "lora-fa", lr=1e-3)
    wrapped = DistributedDataParallel(model)
    steps(wrapped, lora_optimizer(wrapped, "lora-fa", lr=1e-3), 1)
    with pytest.raises(TrainingError, match="trains A again"):
        lora_optimizer(wrapped, "adamw", lr=1e-3)


# --- a torch optimizer like any other --------------------------------------------------------


def reloaded(state):
    stream = io.BytesIO()
    torch.save(state, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("host", ["mixed", "parts"])
def test_a_run_resumed_from_a_saved_state_is_bit_equal(kind, host):
    whole = HOSTS[host]()
    optimizer = lora_optimizer(whole, kind, lr=1e-2, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 4)
    for step in range(4):
        if step == 2:
            halfway = copy.deepcopy(whole.state_dict())
            saved = reloaded({"o": optimizer.state_dict(), "s": schedule.state_dict()})
        expected = steps(whole, optimizer, 1, seed=step)
        schedule.step()
    resumed = HOSTS[host]()
    optimizer = lora_optimizer(resumed, kind, lr=1e-2, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 4)
    steps(resumed, optimizer, 1, seed=9)  # what it holds now must not matter
    missing = resumed.load_state_dict(halfway)
    assert not missing.missing_keys
    optimizer.load_state_dict(saved["o"])
    schedule.load_state_dict(saved["s"])
    for step in (2, 3):
        found = steps(resumed, optimizer, 1, seed=step)
        schedule.step()
    assert same(found, expected)


def test_a_state_of_another_kind_or_adapter_is_refused():
    state = lora_optimizer(plain(), "lora+", lr=1e-3).state_dict()
    with pytest.raises(BadCheckpoint, match="of another kind: lora\\+ there, adamw here"):
        lora_optimizer(plain(), lr=1e-3).load_state_dict(state)
    other = attach_lora(tiny("llama"), rank=4, name="other")
    with pytest.raises(BadCheckpoint, match="of another adapter: 28 names, .*q_proj.*default"):
        lora_optimizer(other, "lora+", lr=1e-3).load_state_dict(state)
    plainly = torch.optim.AdamW([nn.Parameter(torch.zeros(2))]).state_dict()
    with pytest.raises(ValueError, match="different number of parameter groups"):  # torch's own
        lora_optimizer(plain(), lr=1e-3).load_state_dict(plainly)


def test_model_and_optimizer_are_copied_together():
    model = plain()
    optimizer = lora_optimizer(model, "lora-fa", lr=1e-2)
    steps(model, optimizer, 1)
    twin, copied = copy.deepcopy((model, optimizer))
    assert same(steps(model, optimizer, 1), steps(twin, copied, 1))


def test_closures_and_hooks_work_and_run_once():
    model, twin = plain(), plain()
    optimizer, judge = (lora_optimizer(m, "lora-fa", lr=1e-2) for m in (model, twin))
    torch.optim.AdamW([nn.Parameter(torch.zeros(1))])  # torch patches its class for hooks
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))

    def closure():
        calls.append("closure")
        loss = model(**tiny_batch(model)).loss
        loss.backward()
        return loss

    model.train()
    assert torch.isfinite(optimizer.step(closure))
    assert calls == ["before", "closure", "after"]
    assert same({n: p.detach() for n, p in model.named_parameters()}, steps(twin, judge, 1))


@pytest.mark.parametrize("kind", KINDS)
def test_a_grad_scaler_steps_and_skips(kind):
    model, twin = plain(), plain()
    optimizer, judge = (lora_optimizer(m, kind, lr=1e-2) for m in (model, twin))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)  # a power of two: nothing is rounded
    model.train()
    scaler.scale(model(**tiny_batch(model)).loss).backward()
    scaler.step(optimizer)
    scaler.update()
    after = {n: p.detach().clone() for n, p in model.named_parameters()}
    assert same(after, steps(twin, judge, 1))
    optimizer.zero_grad()
    (scaler.scale(model(**tiny_batch(model)).loss) * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0
    assert same(after, {n: p.detach() for n, p in model.named_parameters()})


ROWS = [
    {k: v[0] for k, v in tiny_batch(tiny("llama", meta=True), rows=1, seed=seed).items()}
    for seed in range(8)
]
PAIRS = [
    {k: torch.stack([row[k] for row in ROWS[start : start + 2]]) for k in ROWS[0]}
    for start in range(0, 8, 2)
]


def accumulated(model, optimizer):
    """Steps on two batches at a time, by a loop; returns the parameters."""
    model.train()
    for number, batch in enumerate(PAIRS):
        (model(**batch).loss / 2).backward()
        if number % 2:
            optimizer.step()
            optimizer.zero_grad()
    return {n: p.detach() for n, p in model.named_parameters()}


@pytest.fixture
def fresh_accelerate():
    """Accelerate's states are shared by all of a process, and keep what a Trainer has left."""
    for state in (AcceleratorState, GradientState):
        state._reset_state()
    yield
    for state in (AcceleratorState, GradientState):
        state._reset_state()


@pytest.mark.parametrize("kind", KINDS)
def test_accelerate_steps_it_as_a_loop_does(kind, fresh_accelerate):
    model, twin = plain(), plain()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    wrapped, optimizer = accelerator.prepare(model, lora_optimizer(model, kind, lr=1e-2))
    wrapped.train()
    for batch in PAIRS:
        with accelerator.accumulate(wrapped):
            accelerator.backward(wrapped(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()
    expected = accumulated(twin, lora_optimizer(twin, kind, lr=1e-2))
    assert same({n: p.detach() for n, p in model.named_parameters()}, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_trainer_steps_it_as_a_loop_does(kind, tmp_path, fresh_accelerate):
    model, twin = plain(), plain()
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=2,
        lr_scheduler_type="constant",
        max_grad_norm=0,
        train_sampling_strategy="sequential",
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    optimizer = lora_optimizer(model, kind, lr=1e-2, eps=1e-4)
    trainer = Trainer(model, arguments, train_dataset=ROWS, optimizers=(optimizer, None))
    trainer.train()
    assert trainer.optimizer.optimizer is optimizer
    rates = {g["name"]: g["lr"] for g in optimizer.param_groups}
    assert rates["B"] == (0.16 if kind == "lora+" else 0.01)
    expected = accumulated(twin, lora_optimizer(twin, kind, lr=1e-2, eps=1e-4))
    for name, parameter in model.named_parameters():
        # Trainer divides by the tokens of both batches at once: other rounding, which an eps of
        # 1e-4 keeps from being amplified where a gradient is near zero
        assert torch.allclose(parameter, expected[name], atol=1e-4), name


# --- bad input -------------------------------------------------------------------------------

WRONG = [
    ({"kind": "sgd"}, "kind='sgd' is no optimizer.*adamw, lora\\+, lora-fa"),
    ({"kind": ["adamw"]}, "kind=\\['adamw'\\] is no optimizer"),
    ({"lr": 0}, "lr=0 is not a positive finite number"),
    ({"lr": float("nan")}, "lr=nan is not"),
    ({"lr": "1e-3"}, "lr='1e-3' is not"),
    ({"lr": True}, "lr=True is not"),
    ({"weight_decay": -1}, "weight_decay=-1 is not a finite number that is not negative"),
    ({"kind": "lora+", "ratio": 0}, "ratio=0 is not a positive"),
    ({"kind": "lora+", "ratio": float("inf")}, "ratio=inf is not a positive"),
    ({"ratio": 4}, "ratio=4 is of LoRA\\+, and kind is 'adamw'"),
    ({"betas": (0.9, 1.0)}, "betas=\\(0.9, 1.0\\) are not two numbers"),
    ({"betas": 0.9}, "betas=0.9 are not"),
    ({"eps": -1e-8}, "eps=-1e-08 is not"),
]


@pytest.mark.parametrize(("wrong", "words"), WRONG, ids=[str(w) for w, _ in WRONG])
def test_a_bad_number_is_an_error_that_names_it(wrong, words):
    model = plain()
    before = snapshot(model)
    with pytest.raises(InvalidOption, match=words):
        lora_optimizer(model, **{"lr": 1e-3, **wrong})
    assert_same(before, snapshot(model))


def untouched(model):
    return model


def frozen(model):
    return attach_lora(model, rank=4).requires_grad_(False)


def loose(model):
    attach_lora(model, rank=4)
    model.lm_head.weight.requires_grad_(True)
    return model


def all_loose(model):
    return attach_lora(model, rank=4).requires_grad_(True)


def idle(model):
    attach_lora(attach_lora(model, rank=4, name="a"), rank=4, name="b")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".a." in name or parameter.requires_grad)
    return model


def disabled(model):
    attach_lora(model, rank=4).disable_adapters()
    return model


CANNOT = [
    (untouched, "LlamaForCausalLM has no adapter to train"),
    (frozen, "no parameter of 'default' on LlamaForCausalLM requires a gradient"),
    (loose, "1 parameters of the base require gradients.*lm_head.weight.*train_also"),
    (all_loose, "parameters of the base require gradients"),
    (idle, "28 parameters of inactive adapters require gradients.*Active is b"),
    (disabled, "the adapters of LlamaForCausalLM are disabled"),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("spoil", "words"), CANNOT, ids=[c[0].__name__ for c in CANNOT])
def test_what_cannot_be_trained_is_an_error_and_the_host_stays_as_it_was(kind, spoil, words):
    model = spoil(tiny("llama", seed=1))
    before = snapshot(model)
    with pytest.raises(TrainingError, match=words):
        lora_optimizer(model, kind, lr=1e-3)
    assert_same(before, snapshot(model))


def test_hosts_that_compute_otherwise_are_refused(tmp_path):
    model = plain()
    with base_model(model), pytest.raises(InvalidOption, match="inside base_model"):
        lora_optimizer(model, lr=1e-3)
    merge_lora(model)
    with pytest.raises(MergeError, match="merged into the weights"):
        lora_optimizer(model, lr=1e-3)
    with pytest.raises(MetaHost):
        lora_optimizer(attach_lora(tiny("llama", meta=True), rank=4), lr=1e-3)
    with pytest.raises(UnsupportedHost):
        lora_optimizer("llama", lr=1e-3)
    save_lora(plain(), tmp_path / "x")
    loaded = tiny("llama")
    load_lora(loaded, tmp_path / "x")
    with pytest.raises(TrainingError, match="load_lora\\(model, ..., trainable=True\\)"):
        lora_optimizer(loaded, lr=1e-3)


@pytest.mark.parametrize("kind", ["lora+", "lora-fa"])
@pytest.mark.parametrize(
    "config",
    [peft.LoHaConfig(r=4), peft.AdaLoraConfig(init_r=4, total_step=9)],
    ids=["LOHA", "ADALORA"],
)
def test_kinds_for_lora_name_the_method_that_is_none(kind, config):
    model = attach_lora(tiny("llama"), config=config)
    with pytest.raises(TrainingError, match="adapter 'default' is of the method .*adamw"):
        lora_optimizer(model, kind, lr=1e-3)


def strengthless(model):
    return set_adapters(attach_lora(model, rank=4), "default", 0.0)


def zeros(model):
    attach_lora(model, rank=4)
    for layer in tuner_layers(model).values():
        layer.lora_A["default"].weight.data.zero_()
    return model


def mica(model):
    return attach_lora(model, config=peft.LoraConfig(r=4, init_lora_weights="mica"))


def still(model):
    attach_lora(model, rank=4)
    for layer in list(tuner_layers(model).values())[:2]:
        layer.lora_B["default"].weight.requires_grad_(False)
    return model


@pytest.mark.parametrize(
    ("spoil", "error", "words"),
    [
        (strengthless, TrainingError, "strength 0 at .*q_proj"),
        (zeros, TrainingError, "lora_A at .*q_proj is zero, and with it frozen nothing"),
        (mica, UnsupportedTarget, "q_proj is that of MiCALinearVariant, for which LoRA-FA"),
        (still, TrainingError, "B is frozen on 2 layers"),
    ],
    ids=["strengthless", "zeros", "mica", "still"],
)
def test_lora_fa_refuses_what_it_could_not_train(spoil, error, words):
    model = spoil(tiny("llama"))
    before = snapshot(model)
    with pytest.raises(error, match=words):
        lora_optimizer(model, "lora-fa", lr=1e-3)
    assert_same(before, snapshot(model))


def test_lora_plus_without_a_trainable_b_is_an_error():
    with pytest.raises(TrainingError, match="no B requires a gradient"):
        lora_optimizer(mica(tiny("llama")), "lora+", lr=1e-3)


def test_trained_values_move_the_model():
    for kind in KINDS:
        model = tiny("llama")
        before = logits(model)
        attach_lora(model, rank=4)
        batch = tiny_batch(model)
        model.train()
        first = model(**batch).loss.item()
        optimizer = lora_optimizer(model, kind, lr=1e-2)
        for _ in range(10):
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()
        assert model(**batch).loss.item() < first
        detach_lora(model)
        assert torch.equal(logits(model), before)


def test_values_put_into_a_before_the_first_step_count_however_they_were_written():
    model = attach_lora(tiny("llama"), rank=4)
    optimizer = lora_optimizer(model, "lora-fa", lr=1e-3)
    for layer in tuner_layers(model).values():
        layer.lora_A["default"].weight.data.mul_(2.0)
    steps(model, optimizer, 1)
    for layer in tuner_layers(model).values():
        a, b = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight
        expected = torch.linalg.solve(a @ a.T, b.grad.double().T).T / 64  # alpha/rank = 8
        made = preconditioned(optimizer, b).double()
        assert torch.allclose(made, expected, rtol=1e-4, atol=1e-8)  # float32
