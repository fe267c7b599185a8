"""Kinds of foreign layers. Judges: LyCORIS's own modules, peft's layers, and float64 by formula.

Relative differences are norms: |ours - theirs| / |theirs|.
"""

import logging
import random

import peft
import pytest
import torch
from lycoris.modules.loha import LohaModule
from lycoris.wrapper import LycorisNetwork, create_lycoris_from_weights
from lycoris_files import NOT_HELD, VARIANTS, dense, names_of, update, write
from torch import nn
from torch.nn import functional

from hf_lora import load_lora, open_adapter, save_adapter
from hf_lora.adapter import MODEL, Adapter, Component, check_component
from hf_lora.errors import AdapterMismatch, BadAdapterFile, LoraError
from hf_lora.fields import peft_config
from hf_lora.formats.kinds import (
    KINDS,
    REFUSED,
    Loose,
    component_of,
    divided,
    loose_of,
    refusal,
)
from hf_lora.formats.names import Names, Piece

SAME = 2e-6  # float32 sums in another order; measured here: up to 5e-7
HELD = [name for name in VARIANTS if name != "dylora"]  # whose own forward draws the rank


@pytest.fixture(autouse=True)
def steady():
    """The same numbers in every order of tests; LyCORIS says by its logger what it chose."""
    logging.getLogger("LyCORIS").setLevel(logging.ERROR)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        yield


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(32, 32, 3, padding=1)
        self.shortcut = nn.Conv2d(32, 32, 1)
        self.to_q = nn.Linear(32, 32)
        self.up = nn.Linear(32, 128, bias=False)
        self.down = nn.Linear(128, 32)

    def forward(self, x):
        x = x + self.shortcut(self.conv(x)).tanh()
        y = x.flatten(2).transpose(1, 2)
        y = y + self.down(self.up(self.to_q(y)).tanh())
        return y.transpose(1, 2).reshape(x.shape)


class Denoiser(nn.Module):
    """Linears and convolutions in repeated blocks, as a UNet has them."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.downsample = nn.Conv2d(32, 64, 3, stride=2, padding=1)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.downsample(x)


def denoiser():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Denoiser()


def layers(**made):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.ModuleDict({name: make() for name, make in made.items()})


X = torch.randn(2, 32, 6, 6, generator=torch.Generator().manual_seed(1))


def relative(ours, theirs):
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


def loaded(host, component):
    check_component(component)
    load_lora(host, Adapter({MODEL: component}))
    return host


def as_computed(layer, x, weight):
    """What a layer computes with another weight, in float64."""
    base = getattr(layer, "base_layer", layer)
    bias = None if base.bias is None else base.bias.double()
    if isinstance(base, nn.Linear):
        return functional.linear(x.double(), weight, bias)
    conv = {3: functional.conv1d, 4: functional.conv2d, 5: functional.conv3d}[weight.ndim]
    return conv(x.double(), weight, bias, base.stride, base.padding, base.dilation, base.groups)


def input_of(layer):
    generator = torch.Generator().manual_seed(2)
    if isinstance(layer, nn.Linear):
        return torch.randn(3, layer.in_features, generator=generator)
    return torch.randn(2, layer.in_channels, *(5 for _ in layer.kernel_size), generator=generator)


@torch.no_grad()
def worst_layer(host, file, weights):
    """The largest difference of a tuner layer from its base with the merged weight."""
    return max(
        relative(layer(x), as_computed(layer, x, weights[path]))
        for path in file.names
        for layer in [host.get_submodule(path)]
        for x in [input_of(layer.base_layer)]
    )


# --- what LyCORIS writes computes the same


@pytest.mark.parametrize("variant", HELD)
@torch.no_grad()
def test_what_lycoris_writes_computes_the_same_in_layers_of_peft(variant):
    model = denoiser()
    file = write(model, variant)
    before = model(X)
    with file.applied():
        theirs = model(X)
    assert relative(theirs, before) > 0.1
    component = component_of(file.loose(), names_of(model))
    host = loaded(denoiser(), component)
    assert relative(host(X), theirs) <= SAME
    weights = {path: file.dense(path) for path in file.names}
    assert worst_layer(host, file, weights) <= SAME
    assert max(relative(file.weight(p), weights[p]) for p in file.names) <= SAME


@torch.no_grad()
def test_dylora_is_the_lora_of_all_its_ranks():
    model = denoiser()
    file = write(model, "dylora")
    component = component_of(file.loose(), names_of(model))
    weights = {path: file.dense(path) for path in file.names}
    assert worst_layer(loaded(denoiser(), component), file, weights) <= SAME


@pytest.mark.parametrize("variant", ["lora tucker", "dora tucker rs_lora", "loha tucker"])
@torch.no_grad()
def test_convolutions_of_one_and_three_dimensions_compute_the_same(variant):
    def host():
        made = {"one": lambda: nn.Conv1d(8, 12, 3, padding=1), "flat": lambda: nn.Conv1d(8, 12, 1)}
        if not variant.startswith("loha"):
            made["three"] = lambda: nn.Conv3d(6, 10, (1, 3, 3), stride=(1, 2, 2))
            made["patch"] = lambda: nn.Conv3d(6, 10, 1)
        return layers(**made)

    model = host()
    file = write(model, variant)
    component = component_of(file.loose(), names_of(model))
    weights = {path: file.dense(path) for path in file.names}
    with_adapter = loaded(host(), component)
    assert worst_layer(with_adapter, file, weights) <= SAME
    for path, module in file.modules.items():
        x = input_of(model[path])
        assert relative(with_adapter[path](x), module(x)) <= SAME


@pytest.mark.parametrize("variant", ["lokr", "lokr tucker"])
@torch.no_grad()
def test_lokr_of_low_rank_on_a_convolution_of_one_dimension_computes_the_same(variant):
    def host():
        return layers(one=lambda: nn.Conv1d(64, 128, 3, padding=1))

    file = write(host(), variant)
    component = component_of(file.loose(), names_of(host()))
    weights = {path: file.dense(path) for path in file.names}
    assert worst_layer(loaded(host(), component), file, weights) <= SAME


@torch.no_grad()
def test_peft_computes_another_product_of_whole_lokr_factors_in_one_dimension():
    """Why these are refused; where this fails, peft has repaired it and the refusal can go."""
    model = layers(one=lambda: nn.Conv1d(64, 128, 3, padding=1))
    file = write(model, "lokr full_matrix")
    with pytest.raises(BadAdapterFile, match="one-dimensional convolution, where peft 0.21.2"):
        component_of(file.loose(), names_of(model))
    config = peft.LoKrConfig(r=64, alpha=64, target_modules=["one"])
    peft.inject_adapter_in_model(config, model)
    layer = model["one"]
    for name in ("lokr_w1", "lokr_w2"):
        getattr(layer, name)["default"].copy_(file.loose()["one"].factors[name])
    base, x = layer.base_layer, input_of(layer.base_layer)
    merged = dense(file.loose()["one"].factors, base.weight)
    assert relative(layer(x), as_computed(base, x, merged)) > 0.1


def test_lycoris_merges_loha_with_its_scale_squared():
    """Why `Written.weight` does not ask `get_merged_weight`; its forward multiplies once."""
    layer = nn.Linear(8, 8)
    module = LohaModule("x", layer, 1.0, 4, 2)
    nn.init.normal_(module.hada_w2_a)
    with torch.no_grad():
        update = module.get_weight(module.shape)  # scaled already, by 2/4
        assert torch.equal(module.get_merged_weight()[0], layer.weight + update * 0.5)
        x = torch.randn(3, 8)
        once = functional.linear(x, layer.weight + update, layer.bias)
        assert relative(module(x), once) <= SAME


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("variant", ["dora", "lora tucker", "loha tucker", "lokr decompose_both"])
@torch.no_grad()
def test_factors_stay_in_the_dtype_of_the_file(variant, dtype):
    model = denoiser()
    file = write(model, variant, dtype=dtype)
    loose = file.loose()
    component = component_of(loose, names_of(model))
    assert {tensor.dtype for _, tensor in component.tensors()} == {dtype}
    for path, factors in component.targets.items():
        for name, tensor in factors.items():
            given = loose[path].factors.get(name)
            if given is not None and not (name == "lora_A" and "lora_mid" in loose[path].factors):
                assert torch.equal(tensor.flatten(), given.flatten())
    weights = {path: file.dense(path) for path in file.names}
    # a contracted core is rounded to the file's dtype once
    limit = {torch.float16: 1e-3, torch.bfloat16: 8e-3}.get(dtype, SAME)
    limit = limit if variant == "lora tucker" else SAME
    assert worst_layer(loaded(denoiser(), component), file, weights) <= limit


def test_a_core_is_contracted_in_float64():
    model = layers(conv=lambda: nn.Conv2d(16, 16, 3))
    held = write(model, "lora tucker", dtype=torch.bfloat16).loose()["conv"].factors
    found = component_of({"conv": Loose(held)}, names_of(model)).targets["conv"]["lora_A"]
    a, core = held["lora_A"].double().flatten(1), held["lora_mid"].double()
    assert torch.equal(found, torch.einsum("mnkl,ni->mikl", core, a).bfloat16())


@pytest.mark.parametrize("variant", ["lora tucker", "loha", "lokr decompose_both"])
def test_the_file_names_layers_as_the_network_of_lycoris_does(variant):
    model = denoiser()
    algorithm, options = VARIANTS[variant]
    fields = dict(lora_dim=4, conv_lora_dim=2, alpha=3, conv_alpha=5, network_module=algorithm)
    network = LycorisNetwork(model, 1.0, warn_on_unmatched=False, **fields, **options)
    network.apply_to()
    saved = network.state_dict()
    network.restore()
    ours = write(model, variant).tensors
    assert {k: v.shape for k, v in saved.items()} == {k: v.shape for k, v in ours.items()}
    assert all(torch.equal(v, saved[k]) for k, v in ours.items() if k.endswith(".alpha"))


# --- the record


def test_the_config_has_rank_and_alpha_of_every_layer():
    model = denoiser()
    component = component_of(write(model, "lora").loose(), names_of(model))
    convs = [p for p in component.targets if p.endswith(("conv", "downsample"))]
    assert len(convs) == 3
    assert component.config == {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 3,
        "rank_pattern": {f"^{path}": 2 for path in convs},
        "alpha_pattern": {f"^{path}": 5 for path in convs},
        "target_modules": sorted(component.targets),
        "use_dora": False,
        "lora_bias": False,
    }
    assert all(component.scaling(p) == (2.5 if p in convs else 0.75) for p in component.targets)


@pytest.mark.parametrize("variant", ["loha", "lokr factor 4"])
def test_patterns_that_peft_runs_are_few(variant):
    model = denoiser()
    config = component_of(write(model, variant).loose(), names_of(model)).config
    ends = {"up", "down", "conv", "downsample"}
    assert {*config["rank_pattern"], *config["alpha_pattern"]} <= ends
    assert config["rank_pattern"]["conv"] == 2


def test_a_pattern_of_one_path_does_not_reach_a_longer_one():
    """`a` is the end of `b.a`, whose rank is another, so it stands whole."""
    made = {
        path: Loose(
            {f"hada_w{n}_{x}": torch.randn((8, r) if x == "a" else (r, 8))
             for n in (1, 2) for x in "ab"}
        )
        for path, r in {"a": 3, "b.a": 2, "c": 2}.items()
    }  # fmt: skip
    component = component_of(made, Names("X", dict.fromkeys(made, (8, 8))))
    assert component.config["rank_pattern"] == {"^a": 3}
    assert [component.stated_rank(path) for path in made] == [3, 2, 2]


def test_without_alpha_the_scaling_is_one():
    model = denoiser()
    for variant in ("lora", "loha", "lokr decompose_both"):
        loose = {
            path: Loose({n: t for n, t in x.factors.items() if n != "alpha"})
            for path, x in write(model, variant).loose().items()
        }
        component = component_of(loose, names_of(model))
        assert all(component.alpha(p) == component.stated_rank(p) for p in loose)


def test_alpha_does_not_count_where_both_lokr_factors_are_whole():
    model = denoiser()
    loose = write(model, "lokr full_matrix").loose()
    for alpha in (torch.tensor(1e10), torch.tensor(float("inf")), torch.tensor(0.0)):
        changed = {p: Loose({**x.factors, "alpha": alpha}) for p, x in loose.items()}
        component = component_of(changed, names_of(model))
        assert component.config["alpha"] == component.config["r"] == 8
        assert not component.config["alpha_pattern"]


def test_rs_lora_of_whole_lokr_factors_is_read_as_by_lycoris_itself():
    """The network trains with sqrt(rank), which its file does not say."""
    model = layers(a=lambda: nn.Linear(16, 16))
    file = write(model, "lokr rs_lora")
    with torch.no_grad():
        network, _ = create_lycoris_from_weights(1.0, "", model, dict(file.tensors))
        (module,) = network.loras
        theirs = model["a"].weight + module.get_weight(module.shape)
        host = loaded(
            layers(a=lambda: nn.Linear(16, 16)), component_of(file.loose(), names_of(model))
        )
        ours = host["a"].base_layer.weight + host["a"].get_delta_weight("default")
    assert relative(ours, theirs) <= SAME


def test_a_bias_on_some_layers_is_none_on_the_others():
    model = denoiser()
    bias = torch.randn(32)
    loose = write(model, "lora").loose()
    path = "blocks.1.to_q"
    loose[path] = Loose({**loose[path].factors, "lora_B.bias": bias})
    component = component_of(loose, names_of(model))
    assert component.config["lora_bias"] is True
    assert torch.equal(component.targets[path]["lora_B.bias"], bias)
    assert not component.targets["downsample"]["lora_B.bias"].any()
    check_component(component)


@pytest.mark.parametrize("variant", HELD)
def test_a_header_alone_gives_the_same_record(variant):
    model = denoiser()
    loose = write(model, variant).loose()
    hollow = {
        p: Loose({n: t if n == "alpha" else t.to("meta") for n, t in x.factors.items()}, x.keys)
        for p, x in loose.items()
    }
    found, empty = (component_of(x, names_of(model)) for x in (loose, hollow))
    assert empty.config == found.config
    shapes = [{name: t.shape for name, t in part.tensors()} for part in (found, empty)]
    assert shapes[0] == shapes[1]
    assert all(tensor.is_meta for _, tensor in empty.tensors())
    check_component(empty)


@pytest.mark.parametrize("variant", ["dora", "loha tucker", "lokr decompose_both tucker"])
def test_what_was_read_is_saved_and_read_again_as_the_same_adapter(variant, tmp_path):
    model = denoiser()
    adapter = Adapter({MODEL: component_of(write(model, variant).loose(), names_of(model))})
    again = open_adapter(save_adapter(adapter, tmp_path / "a"))
    assert again.digest == adapter.digest
    theirs = peft.PeftModel.from_pretrained(denoiser(), str(tmp_path / "a"))
    host = loaded(denoiser(), again.components[MODEL])
    with torch.no_grad():
        assert torch.equal(host(X), theirs(X))


# --- shapes of peft


SIZES = [1, 3, 4, 6, 12, 16, 24, 30, 32, 64, 77, 97, 128, 320, 640, 1280, 3072]
PLAIN = {
    "linear": lambda i, o: nn.Linear(i, o),
    "conv 1": lambda i, o: nn.Conv2d(i, o, 1),
    "conv 3": lambda i, o: nn.Conv2d(i, o, 3),
    "conv 1x3": lambda i, o: nn.Conv2d(i, o, (1, 3)),
    "conv 1d": lambda i, o: nn.Conv1d(i, o, 3),
}


def drawn(seed):
    """Layers and a config of peft, by chance."""
    draw = random.Random(seed)
    with torch.device("meta"):
        kinds = [draw.choice(list(PLAIN)) for _ in range(draw.randint(1, 4))]
        made = [PLAIN[kind](draw.choice(SIZES), draw.choice(SIZES)) for kind in kinds]
    host = nn.ModuleDict({f"x{n}": layer for n, layer in enumerate(made)})
    fields = {
        "r": draw.choice([1, 2, 4, 8, 16, 64]),
        "alpha": 3,
        "rank_pattern": {"x0": draw.choice([1, 3, 8])},
        "target_modules": list(host),
        "use_effective_conv2d": draw.random() < 0.5,
    }
    if draw.random() < 0.3:
        return host, peft.LoHaConfig(**fields)
    factor = draw.choice([-1, 2, 3, 4, 5, 8, 16, 32])
    return host, peft.LoKrConfig(
        decompose_factor=factor, decompose_both=draw.random() < 0.5, **fields
    )


def made_by_peft(host, config):
    """Target -> factor -> tensor on meta, as peft makes them."""
    peft.inject_adapter_in_model(config, host, low_cpu_mem_usage=True)
    return {
        path: {
            name: getattr(layer, name)["default"]
            for name in layer.adapter_layer_names
            if "default" in getattr(layer, name)
        }
        for path, layer in host.items()
    }


def shapes_of(targets):
    return {path: {n: tuple(t.shape) for n, t in held.items()} for path, held in targets.items()}


@pytest.mark.parametrize("seed", range(60))
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys")
def test_peft_makes_exactly_the_shapes_from_the_config_that_was_found(seed):
    host, config = drawn(seed)
    names = names_of(host)
    given = made_by_peft(host, config)
    loose = {path: Loose({**held, "alpha": torch.tensor(3.0)}) for path, held in given.items()}
    if any("lokr_w2" in held and held["lokr_w2"].ndim == 3 for held in given.values()):
        with pytest.raises(BadAdapterFile, match="one-dimensional"):
            component_of(loose, names)
        return
    component = component_of(loose, names)
    again = made_by_peft(drawn(seed)[0], peft_config(component))
    assert shapes_of(again) == shapes_of(component.targets) == shapes_of(given)


SD1 = (320, 640, 768, 960, 1280, 1920, 2560, 5120, 10240)
FLUX = (256, 768, 3072, 9216, 12288, 15360, 18432)


@pytest.mark.parametrize("sizes", [SD1, FLUX], ids=["sd1", "flux"])
@pytest.mark.parametrize("factor", [-1, 2, 4, 6, 8, 10, 12, 16, 20, 24])
def test_factors_of_lycoris_up_to_24_are_found_on_blocks_of_real_sizes(sizes, factor):
    with torch.device("meta"):
        host = nn.ModuleDict({f"x{n}": nn.Linear(n, n) for n in sizes})
    loose = write_on_meta(host, factor)
    component = component_of(loose, names_of(host))
    again = made_by_peft(host, peft_config(component))
    assert shapes_of(again) == shapes_of(component.targets)


def write_on_meta(host, factor):
    from lycoris.modules.lokr import LokrModule

    with torch.device("meta"):
        made = {p: LokrModule(p, layer, 1.0, 4, 2, factor=factor) for p, layer in host.items()}
    return {p: Loose(dict(m.named_parameters())) for p, m in made.items()}


def test_a_factor_above_the_root_of_a_size_is_refused_by_name():
    """LyCORIS turns (64, 5) and (64, 48) round, peft does not."""
    with torch.device("meta"):
        host = nn.ModuleDict({f"x{n}": nn.Linear(n, n) for n in (3072, 320)})
    with pytest.raises(BadAdapterFile, match="no one factor makes the sizes of all"):
        component_of(write_on_meta(host, 64), names_of(host))
    with torch.device("meta"):
        host = nn.ModuleDict({f"x{n}": nn.Linear(n, 3072) for n in (3072, 320)})
    with pytest.raises(BadAdapterFile, match=r"at x\d+ the LoKr factors are .*peft by no factor"):
        component_of(write_on_meta(host, 64), names_of(host))


# --- fused layers


def fused(variant, width=96, make=lambda: nn.Linear(32, 96), **options):
    model = nn.ModuleDict({"qkv": make()})
    return write(model, variant, **options).loose()["qkv"]


def rows(merged, first, end):
    return merged[first:end]


THIRDS = [Piece("q", (0, 32)), Piece("k", (32, 64)), Piece("v", (64, 96))]
BASE = torch.randn(96, 32, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("variant", ["lora", "dora", "loha", "lokr factor 3"])
def test_a_fused_layer_comes_apart_exactly(variant, monkeypatch):
    monkeypatch.setitem(VARIANTS, "lokr factor 3", ("lokr", {"factor": 3}))
    loose = fused(variant)
    whole = dense(loose.factors, BASE)
    for piece, part in zip(THIRDS, divided(loose, THIRDS, 96).values(), strict=True):
        merged = dense(part.factors, BASE[slice(*piece.rows)])
        assert torch.equal(merged, whole[slice(*piece.rows)]) or (
            relative(merged, whole[slice(*piece.rows)]) < 1e-14  # matmul of fewer rows, float64
        )
        for name, tensor in part.factors.items():
            assert tensor.untyped_storage().data_ptr() == (
                loose.factors[name].untyped_storage().data_ptr()
            ), f"{name} was copied"


def test_cores_are_shared_by_the_pieces_of_a_fused_convolution():
    pieces = [Piece("a", (0, 10)), Piece("b", (10, 32))]
    base = torch.randn(32, 8, 3, 3)
    for variant in ("lora tucker", "loha tucker", "lokr tucker", "lokr full_matrix"):
        cut = [Piece("a", (0, 16)), Piece("b", (16, 32))] if "lokr" in variant else pieces
        loose = fused(variant, make=lambda: nn.Conv2d(8, 32, 3), conv_rank=1)
        whole = dense(loose.factors, base)
        for piece, part in zip(cut, divided(loose, cut, 32).values(), strict=True):
            span = slice(*piece.rows)
            assert relative(dense(part.factors, base[span]), whole[span]) < 1e-14


def test_a_lokr_is_cut_within_one_row_of_its_first_factor():
    """A first factor of one row is the second one scaled, which can be cut anywhere."""
    factors = {
        "lokr_w1": torch.randn(1, 4),
        "lokr_w2_a": torch.randn(96, 2),
        "lokr_w2_b": torch.randn(2, 8),
        "alpha": torch.tensor(3.0),
    }
    pieces = [Piece("a", (0, 40)), Piece("b", (40, 96), swapped=True)]
    parts = divided(Loose(factors), pieces, 96)
    whole = update({n: t.double() for n, t in factors.items()}, (96, 32))
    found = [
        update({n: t.double() for n, t in parts[p.path].factors.items()}, (n, 32))
        for p, n in zip(pieces, (40, 56), strict=True)
    ]
    assert torch.equal(found[0], whole[:40])
    assert torch.equal(found[1], torch.cat([whole[68:], whole[40:68]]))


@pytest.mark.parametrize("variant", ["lora", "dora", "loha", "lokr factor 4"])
def test_halves_in_the_other_order_change_places(variant):
    loose = fused(variant)
    whole = dense(loose.factors, BASE)
    (part,) = divided(loose, [Piece("x", swapped=True)], 96).values()
    turned = torch.cat([BASE[48:], BASE[:48]])
    expected = torch.cat([whole[48:], whole[:48]])
    assert relative(dense(part.factors, turned), expected) < 1e-14


def test_a_whole_layer_is_not_touched():
    loose = fused("lora")
    assert divided(loose, [Piece("x")], 96)["x"] is loose


def block_diagonal(parts, alpha):
    """A LoRA on a fused layer that holds one of its own for each part: B is block-diagonal."""
    factors = {
        "lora_A": torch.cat([a for a, _ in parts]),
        "lora_B": torch.block_diag(*(b for _, b in parts)),
    }
    return Loose(factors | ({} if alpha is None else {"alpha": torch.tensor(alpha)}))


@pytest.mark.parametrize("alpha", [None, 5.0])
@pytest.mark.parametrize("ranks", [(4, 4, 4), (2, 5, 1)])
def test_a_block_diagonal_factor_gives_back_what_it_was_made_of(ranks, alpha):
    given = [(torch.randn(r, 32), torch.randn(32, r)) for r in ranks]
    loose = block_diagonal(given, alpha)
    parts = divided(loose, THIRDS, 96)
    for (a, b), part in zip(given, parts.values(), strict=True):
        assert torch.equal(part.factors["lora_A"], a)
        assert torch.equal(part.factors["lora_B"], b)
    names = Names("X", dict.fromkeys(parts, (32, 32)))
    component = component_of(parts, names)
    expected = 1.0 if alpha is None else alpha / sum(ranks)
    # alpha becomes alpha * part / rank, one rounding in float64
    assert all(component.scaling(p) == pytest.approx(expected, rel=1e-15) for p in parts)


def test_a_part_that_nothing_reaches_is_no_target():
    a, b = torch.randn(4, 32), torch.randn(32, 4)
    loose = block_diagonal([(a, b), (a[:0], torch.zeros(32, 0)), (a, b)], 4.0)
    assert list(divided(loose, THIRDS, 96)) == ["q", "v"]


def test_a_part_with_a_magnitude_or_bias_stays_though_nothing_reaches_it():
    a, b = torch.randn(4, 32), torch.randn(32, 4)
    loose = block_diagonal([(a, b), (a[:0], torch.zeros(32, 0)), (a, b)], 4.0)
    for extra in ({"dora_scale": torch.rand(96, 1) + 1}, {"lora_B.bias": torch.randn(96)}):
        parts = divided(Loose({**loose.factors, **extra}), THIRDS, 96)
        assert list(parts) == ["q", "k", "v"]
        assert parts["k"].factors["lora_A"].shape == (8, 32)


def test_a_factor_of_zeros_keeps_all_its_ranks_everywhere():
    """As a file from before the first step."""
    loose = Loose({"lora_A": torch.randn(4, 32), "lora_B": torch.zeros(96, 4)})
    parts = divided(loose, THIRDS, 96)
    assert [p.factors["lora_A"].shape[0] for p in parts.values()] == [4, 4, 4]


def test_of_a_header_no_values_are_asked():
    loose = Loose({"lora_A": torch.empty(4, 32, device="meta"),
                   "lora_B": torch.empty(96, 4, device="meta")})  # fmt: skip
    parts = divided(loose, THIRDS, 96)
    assert [tuple(p.factors["lora_B"].shape) for p in parts.values()] == [(32, 4)] * 3


def test_one_byte_floats_come_apart():
    a, b = torch.randn(4, 32), torch.randn(32, 4)
    loose = block_diagonal([(a, b), (a, b), (a, b)], 4.0)
    kept = {n: t.to(torch.float8_e4m3fn) for n, t in loose.factors.items() if n != "alpha"}
    parts = divided(Loose(kept), THIRDS, 96)
    assert [p.factors["lora_A"].shape[0] for p in parts.values()] == [4, 4, 4]


def test_a_magnitude_of_pefts_own_shape_comes_apart():
    magnitude = torch.rand(1, 96, 1, 1)
    loose = Loose({"lora_A": torch.randn(4, 32, 1, 1), "lora_B": torch.randn(96, 4, 1, 1),
                   "lora_magnitude_vector": magnitude})  # fmt: skip
    parts = divided(loose, THIRDS, 96)
    assert torch.equal(parts["k"].factors["lora_magnitude_vector"], magnitude[:, 32:64])


UNCUT = {
    "other width": (fused, "lora", THIRDS, 99, AdapterMismatch, "96 output features.*make up 99"),
    "a gap": (fused, "lora", [THIRDS[0], THIRDS[2]], 96, AdapterMismatch, "no place.*from 32"),
    "too short": (fused, "lora", THIRDS[:2], 96, AdapterMismatch, "no place.*from 64"),
    "beyond": (fused, "lora", [Piece("q", (0, 97))], 96, AdapterMismatch, "no place.*from 0"),
    "odd halves": (
        fused, "lora", [Piece("q", (0, 33), swapped=True), Piece("k", (33, 96))], 96,
        AdapterMismatch, "33 output features have no halves",
    ),
    "lokr": (fused, "lokr", THIRDS, 96, BadAdapterFile, "at q .*0 to 32 .*multiples of 12 only"),
    "lokr turned": (
        fused, "lokr factor 3", [Piece("q", swapped=True)], 96, BadAdapterFile, "turned on the",
    ),
    "dora on input": (fused, "dora on input", THIRDS, 96, BadAdapterFile, "each input feature"),
    "dora on lokr": (fused, "dokr", THIRDS, 96, BadAdapterFile, "DoRA. on LoKr"),
    "full": (fused, "full", THIRDS, 96, BadAdapterFile, "whole differences"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNCUT)
def test_what_cannot_be_cut_exactly_is_refused_by_name(case, monkeypatch):
    monkeypatch.setitem(VARIANTS, "lokr factor 3", ("lokr", {"factor": 3}))
    make, variant, pieces, width, error, words = UNCUT[case]
    with pytest.raises(error, match=words):
        divided(make(variant), pieces, width)


@pytest.mark.parametrize("shape", [(), (95, 2), (95,)])
@pytest.mark.parametrize("core", [False, True])
def test_factors_of_a_fused_layer_that_cannot_be_cut_are_named(core, shape):
    out = torch.ones(2, 96) if core else torch.ones(96, 2)
    loha = {"hada_w1_a": out, "hada_w1_b": torch.ones(2, 8), "hada_w2_b": torch.ones(2, 8)}
    cores = {"hada_t1": torch.ones(2, 2), "hada_t2": torch.ones(2, 2)} if core else {}
    loose = Loose({**loha, **cores, "hada_w2_a": torch.ones(shape)})
    with pytest.raises(BadAdapterFile, match="hada_w2_a .* disagree on the rows"):
        divided(loose, THIRDS, 96)
    lora = {"lora_A": torch.ones(2, 8), "lora_B": torch.ones(96, 2)}
    with pytest.raises(BadAdapterFile, match="and the bias"):
        divided(Loose({**lora, "lora_B.bias": torch.ones(shape)}), THIRDS, 96)
    with pytest.raises(AdapterMismatch, match="output features"):
        divided(Loose({**lora, "lora_B": torch.ones(shape)}), THIRDS, 96)


def test_half_a_pair_on_a_fused_layer_is_named():
    loose = Loose({"lora_B": torch.randn(96, 4)}, ("qkv.lora_up.weight",))
    with pytest.raises(BadAdapterFile, match="lora_B but no lora_A.*qkv.lora_up.weight"):
        divided(loose, THIRDS, 96)


# --- the way back


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_way_back_and_forth_keeps_every_bit(variant):
    model = denoiser()
    component = component_of(write(model, variant).loose(), names_of(model))
    loose = loose_of(component)
    again = component_of(loose, names_of(model))
    assert again.config == component.config
    before, after = dict(component.tensors()), dict(again.tensors())
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert {loose[p].factors["alpha"].dtype for p in loose} == {torch.float32}


@pytest.mark.parametrize("variant", [v for v in HELD if "lokr" not in v or "tucker" not in v])
def test_lycoris_reads_what_the_way_back_gives(variant):
    """Not LoKr with cores: LyCORIS 4.1.3 takes the output features of their factor for the rank."""
    model = denoiser()
    file = write(model, variant)
    named = {"lora_A": "lora_down.weight", "lora_B": "lora_up.weight"}
    flat = {
        f"{file.names[path]}.{named.get(name, name)}": tensor
        for path, loose in loose_of(component_of(file.loose(), names_of(model))).items()
        for name, tensor in loose.factors.items()
    }
    with torch.no_grad():
        network, _ = create_lycoris_from_weights(1.0, "", model, flat)
        assert len(network.loras) == len(file.names)
        network.apply_to()
        theirs = model(X)
        network.restore()
        with file.applied():
            assert relative(theirs, model(X)) <= SAME


@pytest.mark.parametrize("kind", ["LORA", "DORA", "LOHA", "LOKR"])
def test_what_peft_has_trained_goes_out_and_comes_back(kind, tmp_path):
    """alpha unlike rank, rsLoRA, ranks and alphas by pattern: scaling times rank says it all."""
    fields = {"r": 4, "target_modules": ["to_q", "conv", "downsample"], "rank_pattern": {"conv": 2}}
    fields["alpha_pattern"] = {"to_q": 7}
    config = {
        "LORA": lambda: peft.LoraConfig(lora_alpha=3, use_rslora=True, **fields),
        "DORA": lambda: peft.LoraConfig(lora_alpha=3, use_dora=True, **fields),
        "LOHA": lambda: peft.LoHaConfig(alpha=3, use_effective_conv2d=True, **fields),
        "LOKR": lambda: peft.LoKrConfig(alpha=3, decompose_factor=2, **fields),
    }[kind]()
    wrapped = peft.get_peft_model(denoiser(), config)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, mean=0.1, std=0.1)
    wrapped.save_pretrained(tmp_path)
    component = open_adapter(tmp_path).components[MODEL]
    again = component_of(loose_of(component), names_of(denoiser()))
    before, after = dict(component.tensors()), dict(again.tensors())
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    with torch.no_grad():
        host = loaded(denoiser(), again)
        assert relative(host(X), wrapped(X)) <= SAME
    for path in again.targets:
        scalings = [
            host.get_submodule(path).scaling["default"],
            wrapped.base_model.model.get_submodule(path).scaling["default"],
        ]
        assert scalings[0] == pytest.approx(scalings[1], rel=1e-15)  # alpha / rank * rank / rank


def trained(**fields):
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["a"], **fields}
    pair = {"lora_A": torch.randn(2, 4), "lora_B": torch.randn(4, 2)}
    return Component(config, {"a": pair})


def test_alpha_is_written_in_more_bits_where_fewer_would_round_it():
    assert loose_of(trained(lora_alpha=0.1))["a"].factors["alpha"].dtype == torch.float64
    assert float(loose_of(trained(lora_alpha=0.1))["a"].factors["alpha"]) == 0.1
    assert loose_of(trained(lora_alpha=0.5))["a"].factors["alpha"].dtype == torch.float32


LOKR = {"lokr_w1": torch.randn(2, 2), "lokr_w2": torch.randn(2, 2)}
UNSAID = {
    "a method of peft's own": (Component({"peft_type": "IA3"}, {}), "the method IA3"),
    "a module trained whole": (
        Component(trained().config, trained().targets, {"head": {"weight": torch.ones(1)}}),
        "trained whole .head.",
    ),
    "heads": (trained(modules_to_save=["head"]), "modules_to_save=.'head'."),
    "parameters": (trained(target_parameters=["w"]), "target_parameters"),
    "tokens": (trained(trainable_token_indices=[3]), "trainable_token_indices"),
    "activated LoRA": (trained(alora_invocation_tokens=[1]), "alora_invocation_tokens"),
    "biases of the base": (trained(bias="all"), "bias='all'"),
    "factors of an embedding": (
        Component(trained().config, {"a": {"lora_embedding_A": X, "lora_embedding_B": X}}),
        "a holds lora_embedding_A, lora_embedding_B",
    ),
    "scaled whole factors": (
        Component({"peft_type": "LOKR", "r": 4, "alpha": 8}, {"a": LOKR}), "scaling 2",
    ),
    "a core of one or two dimensions": (
        Component(
            {"peft_type": "LOHA", "r": 1, "alpha": 1}, {"a": {"hada_t1": torch.ones(1, 1, 3, 1)}}
        ),
        r"core is \(1, 1, 3, 1\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", UNSAID)
def test_what_no_foreign_file_can_say_is_named(case):
    component, words = UNSAID[case]
    with pytest.raises(BadAdapterFile, match=words) as caught:
        loose_of(component)
    assert caught.value.fix


def test_a_bias_of_none_is_said_by_saying_nothing():
    assert loose_of(trained(bias="none", modules_to_save=None))


# --- what is refused


@pytest.mark.parametrize("variant", NOT_HELD)
def test_what_no_layer_of_peft_holds_is_refused_by_name(variant):
    model = denoiser()
    file = write(
        model, variant, only=lambda path, layer: path in ("blocks.0.to_q", "blocks.1.conv")
    )
    words = {
        "dora on input": "each input feature",
        "doha": r"DoRA. on LoHa",
        "dokr": r"DoRA. on LoKr",
        "lokr unbalanced": "LyCORIS makes by unbalanced_factorization.*peft by no factor",
        "glora": "GLoRA",
        "full": "those of whole differences",
        "diag-oft": "OFT or BOFT",
        "boft": "OFT or BOFT",
        "ia3": r"\(IA\)3",
        "tlora": "T-LoRA",
    }[variant]
    with pytest.raises(BadAdapterFile, match=f"(?s)at blocks.*{words}.*lycoris_blocks") as caught:
        component_of(file.loose(), names_of(model))
    assert caught.value.fix
    assert caught.value.field.startswith("lycoris_")


def test_every_row_of_refused_kinds_is_recognised_by_each_of_its_factors():
    for row in REFUSED:
        for mark in row.marks:
            assert refusal(["lora_A", mark]).startswith(row.name)
    for kind in KINDS:
        assert not refusal(kind.factors)


def pair(a, b, **more):
    return {"lora_A": torch.randn(a), "lora_B": torch.randn(b), **more}


def hada(w1_a, w1_b, w2_a, w2_b, **more):
    shapes = zip(("w1_a", "w1_b", "w2_a", "w2_b"), (w1_a, w1_b, w2_a, w2_b), strict=True)
    return {f"hada_{name}": torch.randn(shape) for name, shape in shapes} | more


def kron(**shapes):
    return {f"lokr_{name}": torch.randn(shape) for name, shape in shapes.items()}


GOOD = pair((2, 8), (6, 2))
HADA = hada((6, 2), (2, 8), (6, 2), (2, 8))
CONV = hada((6, 2), (2, 72), (6, 2), (2, 72))
CORED = hada(
    (2, 6), (2, 8), (2, 6), (2, 8), hada_t1=torch.randn(2, 2, 3, 3), hada_t2=torch.randn(2, 2, 3, 3)
)
CORE = {"lora_mid": torch.randn(2, 2, 3, 3)}
ALPHAS = {
    "two values": (torch.ones(2), "alpha has 2 elements"),
    "none": (torch.ones(0), "alpha has 0 elements"),
    "nan": (torch.tensor(float("nan")), "alpha is nan"),
    "inf": (torch.tensor(float("-inf")), "alpha is -inf"),
    "zero": (torch.tensor(0.0), "alpha is 0, so the update would be nothing"),
}
# Name -> ({path: factors}, error, words); the host has `lin` (6, 8), `one` (6, 8, 1, 1), `conv`
# (6, 8, 3, 3), `line` (6, 8, 3) and `room` (6, 8, 3, 3, 3). The error names the path and a key.
WRONG = {
    **{f"alpha, {n}": ({"lin": {**GOOD, "alpha": t}}, BadAdapterFile, w)
       for n, (t, w) in ALPHAS.items()},
    **{f"alpha of LoHa, {n}": ({"lin": {**HADA, "alpha": t}}, BadAdapterFile, w)
       for n, (t, w) in ALPHAS.items()},
    "alpha of two values that does not count": (
        {"lin": {**kron(w1=(2, 2), w2=(3, 4)), "alpha": torch.ones(2)}},
        BadAdapterFile,
        "alpha has 2 elements",
    ),
    "no layer there": ({"gone": GOOD}, AdapterMismatch, "Host has no layer that an adapter"),
    "A alone": ({"lin": {"lora_A": GOOD["lora_A"]}}, BadAdapterFile, "lora_A but no lora_B"),
    "B alone": ({"lin": {"lora_B": GOOD["lora_B"]}}, BadAdapterFile, "lora_B but no lora_A"),
    "a core alone": ({"conv": CORE}, BadAdapterFile, "lora_mid but no lora_A and no lora_B"),
    "alpha alone": ({"lin": {"alpha": torch.tensor(1.0)}}, BadAdapterFile, "only alpha"),
    "ranks disagree": ({"lin": pair((2, 8), (6, 3))}, BadAdapterFile, "disagree on the rank"),
    "rank 0": ({"lin": pair((0, 8), (6, 0))}, BadAdapterFile, "the rank is 0"),
    "a vector": ({"lin": pair((2,), (6, 2))}, BadAdapterFile, "disagree on the rank"),
    "a number": ({"lin": pair((), ())}, BadAdapterFile, "disagree on the rank"),
    "other input": ({"lin": pair((2, 9), (6, 2))}, AdapterMismatch, "another size.*weight .6, 8"),
    "other output": ({"lin": pair((2, 8), (7, 2))}, AdapterMismatch, "another size"),
    "conv on a linear": (
        {"lin": pair((2, 8, 3, 3), (6, 2, 1, 1))}, AdapterMismatch,
        r"convolution with kernel \(3, 3\), and the host has a linear layer",
    ),
    "conv on a linear of as many numbers": (
        {"wide": pair((2, 8, 3, 3), (6, 2, 1, 1))}, AdapterMismatch, "the host has a linear layer",
    ),
    "other kernel": (
        {"conv": pair((2, 8, 5, 5), (6, 2, 1, 1))}, AdapterMismatch, "the host has a convolution",
    ),
    "kernel in B": ({"conv": pair((2, 8, 3, 3), (6, 2, 3, 3))}, AdapterMismatch, "B .6, 2, 3, 3"),
    "1x1 on a kernel": ({"conv": pair((2, 8, 1, 1), (6, 2))}, AdapterMismatch, "another size"),
    "a core of other rank": (
        {"conv": pair((3, 8, 1, 1), (6, 2, 1, 1), **CORE)}, BadAdapterFile, "core .2, 2, 3, 3. and",
    ),
    "a core on a linear": (
        {"lin": pair((2, 8), (6, 2), **CORE)}, AdapterMismatch, "the host has a linear layer",
    ),
    "whole numbers": (
        {"lin": {**GOOD, "lora_A": torch.ones(2, 8, dtype=torch.int8)}}, BadAdapterFile,
        "lora_A holds int8 values",
    ),
    "a bias of other size": (
        {"lin": {**GOOD, "lora_B.bias": torch.ones(7)}}, AdapterMismatch, "the bias is .7,.",
    ),
    "a magnitude of other size": (
        {"lin": {**GOOD, "dora_scale": torch.ones(7, 1)}}, AdapterMismatch, "dora_scale is .7, 1.",
    ),
    "a magnitude of peft of other size": (
        {"lin": {**GOOD, "lora_magnitude_vector": torch.ones(7)}}, AdapterMismatch,
        "lora_magnitude_vector is .7,.",
    ),
    "a magnitude over the input": (
        {"lin": {**GOOD, "dora_scale": torch.ones(1, 8)}}, BadAdapterFile, "each input feature",
    ),
    "two magnitudes": (
        {"lin": {**GOOD, "dora_scale": torch.ones(6, 1), "lora_magnitude_vector": torch.ones(6)}},
        BadAdapterFile, "stands twice",
    ),
    "a magnitude on some": (
        {"lin": {**GOOD, "dora_scale": torch.ones(6, 1)}, "one": GOOD}, BadAdapterFile,
        r"at one and at 0 other layers there is no magnitude .DoRA., but at 1 there is .lin.",
    ),
    "two kinds on one layer": (
        {"lin": GOOD | HADA}, BadAdapterFile, "factors of LoRA and of LoHa",
    ),
    "two kinds": ({"lin": GOOD, "one": HADA}, BadAdapterFile, "there is LoHa, and at lin LoRA"),
    "an unknown factor": ({"lin": {**GOOD, "lora_C": torch.ones(1)}}, BadAdapterFile, "lora_C is"),
    "a part of LoHa": (
        {"lin": {k: v for k, v in HADA.items() if k != "hada_w2_a"}}, BadAdapterFile,
        "no hada_w2_a",
    ),
    "one core of LoHa": (
        {"conv": {k: v for k, v in CORED.items() if k != "hada_t2"}}, BadAdapterFile, "no hada_t2",
    ),
    "ranks of LoHa disagree": (
        {"lin": hada((6, 2), (2, 8), (6, 3), (3, 8))}, BadAdapterFile, "the rank is not one",
    ),
    "rank 0 of LoHa": ({"lin": hada((6, 0), (0, 8), (6, 0), (0, 8))}, BadAdapterFile, "rank is 0"),
    "a vector in LoHa": (
        {"lin": hada((6, 2), (2,), (6, 2), (2, 8))}, BadAdapterFile, "hada_w1_b is .2,., no matrix",
    ),
    "LoHa of other size": (
        {"lin": hada((6, 2), (2, 9), (6, 2), (2, 9))}, AdapterMismatch,
        r"hada_w1_b is \(2, 9\), and the host weight \(6, 8\) takes \(2, 8\)",
    ),
    "LoHa cores on a linear": ({"lin": CORED}, AdapterMismatch, "cores of a kernel"),
    "LoHa with cores and without": (
        {"conv": CORED, "conv2": CONV}, BadAdapterFile,
        "at conv2 the kernel is in the factors, and at conv it is in a core",
    ),
    "LoHa in three dimensions": (
        {"room": hada((6, 2), (2, 216), (6, 2), (2, 216))}, BadAdapterFile, "peft has LoHa on",
    ),
    "w1 twice": (
        {"lin": kron(w1=(2, 2), w1_a=(2, 1), w2=(3, 4))}, BadAdapterFile, "lokr_w1 and lokr_w1_a",
    ),
    "w2 twice": (
        {"lin": kron(w1=(2, 2), w2=(3, 4), w2_b=(1, 4))}, BadAdapterFile, "lokr_w2 and lokr_w2_b",
    ),
    "no w1": ({"lin": kron(w2=(3, 4))}, BadAdapterFile, "lokr_w2 but no lokr_w1"),
    "half of w2": ({"lin": kron(w1=(2, 2), w2_a=(3, 1))}, BadAdapterFile, "no lokr_w2_b"),
    "a core with a whole w2": (
        {"conv": kron(w1=(2, 2), w2=(3, 4, 3, 3), t2=(1, 1, 3, 3))}, BadAdapterFile,
        "no lokr_w2_a and no lokr_w2_b",
    ),
    "a vector in LoKr": (
        {"lin": kron(w1=(2,), w2=(3, 4))}, BadAdapterFile, "lokr_w1 is .2,., no matrix",
    ),
    "LoKr of other size": (
        {"lin": kron(w1=(2, 2), w2=(4, 4))}, AdapterMismatch, "size: a LoKr of .2, 2. and .4, 4",
    ),
    "ranks of LoKr disagree": (
        {"lin": kron(w1=(2, 2), w2_a=(3, 1), w2_b=(2, 4))}, BadAdapterFile, "ranks of the factors",
    ),
    "rank 0 of LoKr": (
        {"lin": kron(w1=(2, 2), w2_a=(3, 0), w2_b=(0, 4))}, BadAdapterFile, "ranks of the factors",
    ),
    "both of low rank, unlike": (
        {"big": kron(w1_a=(8, 1), w1_b=(1, 8), w2_a=(8, 2), w2_b=(2, 8))}, BadAdapterFile,
        "ranks of the factors",
    ),
    "whole where peft has low rank": (
        {"big": kron(w1_a=(8, 1), w1_b=(1, 8), w2=(8, 8))}, BadAdapterFile,
        r"second LoKr factor \(8, 8\) is whole, and beside the others peft would have it of rank 1",
    ),
    "of low rank where peft has whole": (
        {"big": kron(w1=(8, 8), w2_a=(8, 4), w2_b=(4, 8))}, BadAdapterFile,
        r"second LoKr factor \(8, 8\) is of rank 4, and beside the others peft would have it whole",
    ),
    "the first whole here and of low rank there": (
        {
            "big": kron(w1_a=(8, 1), w1_b=(1, 8), w2_a=(8, 1), w2_b=(1, 8)),
            "big2": kron(w1=(8, 8), w2_a=(8, 1), w2_b=(1, 8)),
        },
        BadAdapterFile, r"at big2 the first LoKr factor \(8, 8\) is whole",
    ),
    "a LoKr core on a linear": (
        {"lin": kron(w1=(2, 2), w2_a=(1, 3), w2_b=(1, 4), t2=(1, 1, 3, 3))}, AdapterMismatch,
        "a core of a kernel",
    ),
    "LoKr with cores and without": (
        {
            "conv": kron(w1=(2, 2), w2_a=(1, 3), w2_b=(1, 4), t2=(1, 1, 3, 3)),
            "conv2": kron(w1=(2, 2), w2_a=(3, 1), w2_b=(1, 36)),
        },
        BadAdapterFile, "at conv2 the kernel is in a factor, and at conv it is in a core",
    ),
    "LoKr in three dimensions": (
        {"room": kron(w1=(2, 2), w2=(3, 4, 3, 3, 3))}, BadAdapterFile, "peft has LoKr on linear",
    ),
    "whole LoKr in one dimension": (
        {"line": kron(w1=(2, 2), w2=(3, 4, 3))}, BadAdapterFile, "one-dimensional convolution",
    ),
}  # fmt: skip
HOST = Names(
    "Host",
    {
        "lin": (6, 8), "wide": (6, 72), "one": (6, 8, 1, 1), "conv": (6, 8, 3, 3),
        "conv2": (6, 8, 3, 3), "line": (6, 8, 3), "room": (6, 8, 3, 3, 3), "big": (64, 64),
        "big2": (64, 64),
    },
)  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_named_with_its_place_and_key(case):
    held, error, words = WRONG[case]
    given = {p: Loose(f, tuple(f"file.{p}.{n}" for n in f)) for p, f in held.items()}
    with pytest.raises(LoraError, match=words) as caught:
        component_of(given, HOST)
    assert type(caught.value) is error
    assert any(f"at {path} " in str(caught.value) for path in held)
    assert caught.value.field.startswith("file.")
    assert caught.value.field in str(caught.value)


def test_no_layers_are_no_adapter():
    with pytest.raises(BadAdapterFile, match="no layers for Host"):
        component_of({}, HOST)


def test_keys_that_do_not_match_the_factors_are_still_shown():
    loose = Loose({"lora_A": torch.randn(2, 9), "lora_B": torch.randn(6, 2)}, ("some.key",))
    with pytest.raises(AdapterMismatch, match="some.key"):
        component_of({"lin": loose}, HOST)
    with pytest.raises(AdapterMismatch, match="at lin the adapter"):
        component_of({"lin": Loose(loose.factors)}, HOST)


@pytest.mark.parametrize(
    ("path", "a", "b"),
    [
        ("lin", (2, 8, 1, 1), (6, 2, 1, 1)),
        ("one", (2, 8), (6, 2)),
        ("one", (2, 8, 1, 1), (6, 2)),
        ("conv", (2, 72), (6, 2)),
        ("conv", (2, 8, 3, 3), (6, 2)),
        ("line", (2, 8, 3), (6, 2)),
    ],
)
def test_flat_and_1x1_factors_take_the_form_of_the_host(path, a, b):
    loose = pair(a, b)
    found = component_of({path: Loose(loose)}, HOST).targets[path]
    shape = HOST.layers[path]
    assert tuple(found["lora_A"].shape) == (2, *shape[1:])
    assert tuple(found["lora_B"].shape) == (6, 2, *(1 for _ in shape[2:]))
    assert torch.equal(found["lora_A"].flatten(), loose["lora_A"].flatten())


@pytest.mark.parametrize("path", ["lin", "one", "conv", "line", "room"])
@pytest.mark.parametrize("shape", [(6,), (6, 1), (6, 1, 1, 1)])
def test_a_magnitude_takes_the_form_of_peft(path, shape):
    host = HOST.layers[path]
    factors = pair((2, *host[1:]), (6, 2), dora_scale=torch.rand(shape))
    found = component_of({path: Loose(factors)}, HOST).targets[path]["lora_magnitude_vector"]
    assert tuple(found.shape) == ((6,) if path == "lin" else (1, 6, *(1 for _ in host[2:])))
    assert torch.equal(found.flatten(), factors["dora_scale"].flatten())
