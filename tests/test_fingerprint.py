"""The base fingerprint: the same base in any dtype is matched, any other base is not."""

import base64
import hashlib
import itertools
import json
import math
import struct

import pytest
import torch

from hf_lora import verdict as rules
from hf_lora.base import fingerprint_of_model
from hf_lora.errors import BadAdapterFile
from hf_lora.fingerprint import Fingerprint, Sample, fingerprint_of, positions
from hf_lora.testing import FAMILIES, tiny
from hf_lora.verdict import compare

B16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
E4, E5 = torch.float8_e4m3fn, torch.float8_e5m2

# Every way that loading and saving in three dtypes can take, and some through fp64.
CHAINS = [
    *((a,) for a in (F32, B16, F16, F64)),
    *itertools.permutations((B16, F16, F32), 2),
    *itertools.permutations((B16, F16, F32), 3),
    (F16, B16, F16),
    (B16, F16, B16),
    (F16, B16, F16, B16, F32),
    (F16, F32, B16, F32),
    (F64, F16, B16, F64),
    (F64, B16, F16, F32),
]
MODELS = ["llama", "qwen3_moe", "gpt2", "bert", "t5"]


def named(chain):
    return "-".join(str(dtype).removeprefix("torch.") for dtype in chain)


def realistic(seed=0, std=0.02):
    """30 tensors of a transformer, an expert stack and a convolution; some values tiny in fp16."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"embed.weight": (500, 64), "lm_head.weight": (500, 64), "conv.weight": (32, 3, 5, 5)}
    shapes |= {f"layers.{i}.mlp.weight": (176, 64) for i in range(24)}
    shapes |= {"experts.up": (4, 32, 64), "experts.down": (4, 64, 32), "tiny.weight": (64, 64)}
    tensors = {n: torch.randn(s, generator=generator) * std for n, s in shapes.items()}
    tensors["tiny.weight"] *= 1e-4  # around 2e-6: subnormal in fp16
    return tensors


def weights(model):
    return {name: p.detach() for name, p in model.named_parameters()}


def cast(tensors, *chain):
    for dtype in chain:
        tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    return tensors


def taken(tensors):
    return fingerprint_of(tensors.items())


def verdict(stored, host):
    return compare(taken(stored), taken(host))


def sample(values, shape=None):
    values = torch.tensor(values, dtype=F32)
    return Sample(shape or (len(values), 1), values)


# --- the same base ------------------------------------------------------------------------------


@pytest.mark.parametrize("chain", CHAINS, ids=named)
def test_the_same_base_in_any_dtype_is_matched_in_both_roles(chain):
    original = realistic()
    for other in CHAINS:
        found = verdict(cast(original, *chain), cast(original, *other))
        assert found.state in ("matched", "rounded"), (other, found.text)
        assert not found.differing
        assert found.compared == len(original)


@pytest.mark.parametrize("family", MODELS)
def test_a_tiny_model_is_matched_after_every_cast(family):
    original = weights(tiny(family))
    for chain in CHAINS:
        assert verdict(original, cast(original, *chain)).state == "matched"
        assert verdict(cast(original, *chain), original).state == "matched"


def test_one_side_as_a_cast_of_the_other_is_matched_and_two_roundings_are_rounded():
    original = realistic()
    for chain in CHAINS:
        assert verdict(original, cast(original, *chain)).state == "matched"
    two_ways = verdict(cast(original, B16), cast(original, F16, B16))
    assert two_ways.state == "rounded"
    # 1/16 of 960 samples; five standard deviations on either side
    assert abs(two_ways.share - 1 / 16) < 5 * math.sqrt(1 / 16 * 15 / 16 / 960)


def test_random_seeds_of_the_same_base_give_no_false_alarm():
    wrong = []
    for seed in range(10):
        original = realistic(seed, std=0.5 ** (seed % 7))
        for chain, other in (((B16,), (F16,)), ((F16, B16), (B16,)), ((F16,), (B16, F16))):
            found = verdict(cast(original, *chain), cast(original, *other))
            wrong += [found.text] if found.state != "rounded" else []
    assert not wrong


def test_values_beyond_the_range_of_fp16_are_matched_after_every_cast():
    original = realistic()
    original["conv.weight"] *= 1e7
    for chain in CHAINS:
        for other in ((B16,), (F16,), (F16, B16), (B16, F16), (F16, B16, F16)):
            assert not verdict(cast(original, *chain), cast(original, *other)).differing


@pytest.mark.parametrize("chain", [(E4,), (E5,), (B16, E4), (F16, E4, B16)], ids=named)
def test_a_base_kept_in_8_bits_is_matched_with_its_original(chain):
    original = realistic()
    assert verdict(original, cast(original, *chain)).state == "matched"
    assert verdict(cast(original, *chain), original).state == "matched"


def test_a_base_in_scaled_8_bits_is_not_verified():
    original = realistic()
    scaled = {name: (tensor * 1000).to(E4) for name, tensor in original.items()}
    found = verdict(cast(original, B16), scaled)
    assert found.state == "unverified"
    assert "rounding may explain" in found.text
    other = realistic(seed=1)
    assert verdict(cast(original, E4), cast(other, E4)).state == "mismatched"


def test_values_that_are_not_finite_are_equal_to_themselves_only():
    special = realistic()
    special["embed.weight"] = torch.full((4, 8), math.nan)
    special["conv.weight"] = torch.tensor([[math.inf, -math.inf, 0.0, -0.0, 1e-30]])
    for chain in CHAINS:
        assert not verdict(special, cast(special, *chain)).differing
        assert not verdict(cast(special, *chain), cast(special, F16, B16)).differing
    for value in (0.0, math.inf, 1.0):
        changed = special | {"embed.weight": torch.full((4, 8), value)}
        assert verdict(special, changed).differing == ("embed.weight",)
        assert verdict(changed, special).differing == ("embed.weight",)


# --- another base -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, B16, F16], ids=str)
@pytest.mark.parametrize("family", MODELS)
def test_another_seed_is_mismatched(family, dtype):
    mine, other = weights(tiny(family)), weights(tiny(family, seed=1))
    for left, right in ((mine, other), (other, mine)):
        assert verdict(cast(left, B16), cast(right, dtype)).state == "mismatched"


@pytest.mark.parametrize("dtypes", list(itertools.product((F32, B16, F16), repeat=2)), ids=named)
@pytest.mark.parametrize("name", ["lm_head.weight", "embed.weight", "conv.weight", "experts.down"])
def test_one_changed_part_is_mismatched_and_named(name, dtypes):
    changed = realistic() | {name: realistic(seed=1)[name]}
    found = verdict(cast(realistic(), dtypes[0]), cast(changed, dtypes[1]))
    assert (found.state, found.differing) == ("mismatched", (name,))
    assert name in found.text


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_a_single_training_step_in_fp32_is_mismatched(kind):
    model = tiny("llama")
    before = taken(weights(model))
    optimizer = kind(model.parameters(), lr=1e-4)
    ids = torch.arange(48).view(4, 12)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    assert compare(before, taken(weights(model))).state == "mismatched"


def fine_tuned(relative):
    noise = realistic(seed=1, std=1.0)
    return {n: t * (1 + relative * noise[n]) for n, t in realistic().items()}


@pytest.mark.parametrize("dtype", [F32, B16], ids=str)
@pytest.mark.parametrize("relative", [1e-2, 1e-3, 1e-4])
def test_a_base_changed_by_far_less_than_a_bf16_step_is_mismatched(relative, dtype):
    assert verdict(cast(realistic(), B16), cast(fine_tuned(relative), dtype)).state == "mismatched"


def test_a_detour_through_fp16_hides_changes_below_its_step_and_no_others():
    rounded = cast(realistic(), B16)
    # an fp16 step is 5e-4 to 1e-3 of a value
    for detour in ((F16, B16), (F16,)):
        assert verdict(rounded, cast(fine_tuned(1e-4), *detour)).state == "rounded"
        assert verdict(rounded, cast(fine_tuned(1e-3), *detour)).state == "mismatched"


def test_a_few_bf16_steps_are_never_matched():
    original = cast(realistic(), B16)
    for steps in range(1, 10):
        bits = {n: t.clone().view(torch.int16) for n, t in original.items()}
        for name in list(bits)[:steps]:
            bits[name].view(-1)[0] += 1
        host = {n: t.view(B16) for n, t in bits.items()}
        found = verdict(original, host)
        assert found.state in ("unverified", "mismatched")
        assert set(found.differing) == set(list(bits)[:steps]) or found.state == "mismatched"


def test_rounding_steps_count_only_towards_the_even_side_and_in_sufficient_number():
    odd, even = 1 + 1 / 128, 1 + 2 / 128  # neighbours in bf16
    rest = [[1.5 + i / 128] * 31 for i in range(12)]

    def bases(values):
        return Fingerprint({f"w{i}": sample([v, *rest[i]]) for i, v in enumerate(values)})

    def state(stored, host):
        return compare(bases(stored), bases(host)).state

    assert state([odd] * 12, [even] * 12) == "rounded"  # the host was fp16 first
    assert state([even] * 12, [odd] * 12) == "rounded"  # the stored side was
    assert state([odd] * 11 + [even], [even] * 11 + [odd]) == "mismatched"
    assert state([odd] * 9 + [even] * 3, [even] * 12) == "unverified"
    assert state([odd] * 12, [1 + 4 / 128] * 12) == "mismatched"  # three steps


def test_a_tensor_of_zeros_does_not_pass_for_a_rounded_copy():
    original = realistic() | {"conv.weight": torch.zeros(32, 3, 5, 5)}
    tuned = realistic() | {"conv.weight": torch.full((32, 3, 5, 5), 1e-4)}
    for dtype in (F32, B16, F16):
        assert verdict(cast(original, dtype), tuned).differing == ("conv.weight",)
        assert verdict(tuned, cast(original, dtype)).differing == ("conv.weight",)


def test_another_shape_is_mismatched():
    reshaped = realistic() | {"conv.weight": torch.zeros(33, 3, 5, 5)}
    found = verdict(realistic(), reshaped)
    assert (found.state, found.differing) == ("mismatched", ("conv.weight",))
    assert found.compared == len(reshaped) - 1
    alone = {"w": torch.ones(2, 2)}
    assert verdict(alone, {"w": torch.ones(2, 3)}).state == "mismatched"


@pytest.mark.parametrize("chain", [(F32,), (B16,), (F16, B16)], ids=named)
def test_another_number_of_tokens_is_no_other_base(chain):
    tables = {"embed_tokens.weight": torch.ones(500, 64), "lm_head.weight": torch.ones(500, 64)}
    original = realistic() | tables
    longer = original | {name: torch.zeros(502, 64) for name in tables}
    for stored, host in ((original, longer), (longer, original)):
        found = verdict(cast(stored, *chain), host)
        assert (found.state, found.differing) == ("matched", ())
        assert set(found.resized) == set(tables)
        assert found.compared == len(original) - 2
        assert found.text.endswith(
            "; 2 of another number of tokens not compared: lm_head.weight, embed_tokens.weight"
        )
    other = realistic(seed=1) | {name: torch.zeros(502, 64) for name in tables}
    assert verdict(cast(original, *chain), other).state == "mismatched"
    wider = original | {"lm_head.weight": torch.zeros(502, 65)}
    assert verdict(original, wider).differing == ("lm_head.weight",)
    two = verdict(tables, {name: longer[name] for name in tables})
    assert (two.state, two.compared) == ("unverified", 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tiny_family_stays_the_same_base_with_new_tokens(family):
    model = tiny(family)
    before = fingerprint_of_model(model)
    model.resize_token_embeddings(
        model.get_input_embeddings().weight.shape[0] + 8, mean_resizing=False
    )
    for stored, host in itertools.permutations((before, fingerprint_of_model(model))):
        found = compare(stored, host)
        assert found.state == "matched"
        assert found.resized


# --- too little to tell -------------------------------------------------------------------------


def test_names_that_the_host_lacks_are_listed():
    host = realistic()
    del host["lm_head.weight"]
    found = verdict(realistic(), host | {"another.weight": torch.ones(3, 3)})
    assert (found.state, found.absent) == ("matched", ("lm_head.weight",))


def test_a_host_with_fewer_than_half_of_the_names_is_not_verified():
    original = realistic()
    half = dict(list(original.items())[: len(original) // 2])
    assert verdict(original, half).state == "matched"
    half.popitem()
    found = verdict(original, half)
    assert found.state == "unverified"
    assert "14 of 30" in found.text


@pytest.mark.parametrize(("stored", "host"), [({}, realistic()), (realistic(), {}), ({}, {})])
def test_nothing_to_compare_is_not_verified(stored, host):
    assert verdict(stored, host).state == "unverified"


def test_a_host_on_meta_is_not_verified():
    assert verdict(weights(tiny("llama")), weights(tiny("llama", meta=True))).state == "unverified"


# --- sampling -----------------------------------------------------------------------------------


def test_positions_follow_from_the_number_of_elements_alone():
    assert positions(5) == [0, 1, 2, 3, 4]
    assert positions(32) == list(range(32))
    assert positions(1000)[:5] == [0, 618, 236, 854, 472]  # i times the golden section
    for elements in (47, 48, 1000, 2**31 + 1, 2**62):
        assert len(set(positions(elements))) == 32
        assert max(positions(elements)) < elements


@pytest.mark.parametrize("shape", [(3, 5), (40, 30), (4, 32, 64), (8, 3, 3, 3)])
def test_samples_stand_at_their_row_major_positions(shape):
    tensor = torch.randn(shape)
    wanted = tensor.reshape(-1)[positions(tensor.numel())]
    turned = tensor.transpose(0, 1).contiguous().transpose(0, 1)
    for same in (tensor, turned, tensor.double(), torch.nn.Parameter(tensor)):
        found = taken({"w": same}).tensors["w"]
        assert found.shape == shape
        assert found.values.dtype == F32
        assert torch.equal(found.values, wanted)
        assert not found.values.requires_grad


@pytest.mark.parametrize("dtype", [F32, B16, E4], ids=str)
def test_a_tensor_is_not_copied(dtype):
    # 2^40 elements over one value: any copy would ask for a terabyte
    broad = torch.ones(1, 1).to(dtype).expand(2**20, 2**20)
    assert torch.equal(taken({"w": broad}).tensors["w"].values, torch.ones(32))


class Wrapped(torch.Tensor):
    pass


@pytest.mark.parametrize(
    "tensor",
    [
        torch.ones(4, 4, dtype=torch.int8),
        torch.ones(4, 4, dtype=torch.bool),
        torch.ones(4, 4, dtype=torch.complex64),
        torch.ones(16),
        torch.tensor(1.0),
        torch.ones(4, 0),
        torch.ones(4, 4, device="meta"),
        torch.ones(4, 4).to_sparse(),
        torch.ones(4, 4).as_subclass(Wrapped),
        torch.nn.Parameter(torch.ones(4, 4).as_subclass(Wrapped)),
    ],
    ids=["int8", "bool", "complex", "1-D", "0-D", "empty", "meta", "sparse", "subclass", "wrapped"],
)
def test_what_holds_no_plain_values_is_left_out(tensor):
    assert list(taken({"skip": tensor, "keep": torch.ones(2, 2)}).tensors) == ["keep"]


def test_the_first_of_two_tensors_of_one_name_counts():
    twice = fingerprint_of([("w", torch.ones(2, 2)), ("w", torch.zeros(3, 3, dtype=B16))])
    assert twice.tensors["w"].shape == (2, 2)
    assert torch.equal(twice.tensors["w"].values, torch.ones(4))


def test_the_default_device_and_dtype_of_the_user_change_nothing():
    original = realistic()
    rounded = cast(original, F16, B16)
    wanted = taken(original).short
    torch.set_default_dtype(F64)
    try:
        with torch.device("meta"):
            print_ = taken(original)
            read = Fingerprint.from_json(print_.to_json())
            states = [verdict(original, rounded), verdict(cast(original, B16), rounded)]
    finally:
        torch.set_default_dtype(F32)
    assert (print_.short, read.short) == (wanted, wanted)
    assert [found.state for found in states] == ["matched", "rounded"]


# --- the arithmetic -----------------------------------------------------------------------------


def every(dtype):
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).float()


def test_the_casts_are_closed():
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (200_000,), generator=generator)
    values = torch.cat([every(B16), every(F16), bits.to(torch.int32).view(F32)])
    for chain in rules._CHAINS:
        for dtype in (B16, F16):
            longer = rules._cast(values, (*chain, dtype))
            assert any(
                bool(rules._same(longer, rules._cast(values, known)).all())
                for known in rules._CHAINS
            )


@pytest.mark.parametrize("chain", rules._CHAINS, ids=named)
def test_the_originals_of_a_value_are_exactly_those_that_become_it(chain):
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(0x32000000, 0x48000000, (50_000,), generator=generator)
    values = bits.to(torch.int32).view(F32)  # 7e-9 to 131,072: what fp16 rounds, and beyond
    values = torch.cat([values, -values, torch.tensor([0.0, -0.0, math.inf, -math.inf])])
    become = rules._cast(values, chain)
    least, most = rules._originals(become, chain)
    key = rules._key(values)
    assert bool(((least <= key) & (key <= most)).all())

    def becomes(keys):
        return rules._same(rules._cast(rules._value(keys), chain), become)

    assert becomes(least).all()
    assert becomes(most).all()
    assert not becomes(least - 1).any()
    assert not becomes(most + 1).any()


def test_what_no_cast_gives_has_no_originals():
    values = torch.tensor([1 + 2**-20, 3e-9, math.nan, -math.nan])
    for chain in rules._CHAINS[1:]:
        least, most = rules._originals(values, chain)
        representable = rules._same(rules._cast(values, chain), values)
        assert bool((least > most)[~representable | values.isnan()].all())


# --- on disk ------------------------------------------------------------------------------------


@pytest.mark.parametrize("chain", [(F32,), (B16,), (F16,), (F16, B16)], ids=named)
def test_a_fingerprint_survives_json(chain):
    original = taken(cast(realistic(), *chain))
    read = Fingerprint.from_json(json.loads(json.dumps(original.to_json())))
    assert read.to_json() == original.to_json()
    assert read.short == original.short
    for name, kept in original.tensors.items():
        assert read.tensors[name].shape == kept.shape
        assert torch.equal(read.tensors[name].values, kept.values)


def test_values_that_are_not_finite_survive_json_bit_for_bit():
    special = taken({"w": torch.tensor([[math.nan, math.inf, -math.inf, -0.0, 1e-45, 0.1]])})
    read = Fingerprint.from_json(json.loads(json.dumps(special.to_json(), allow_nan=False)))
    bits = [f.tensors["w"].values.view(torch.int32) for f in (special, read)]
    assert torch.equal(*bits)


def test_the_encoding_is_the_one_in_the_docs():
    tensors = {"b": torch.tensor([[1.0, -2.5]]), "a": torch.tensor([[0.1], [3.0]])}
    halves = struct.pack("<HH", 0x3F80, 0xC020)  # the upper halves of fp32 1.0 and -2.5
    assert taken(tensors).to_json() == {
        "version": 1,
        "tensors": {
            "a": {"shape": [2, 1], "fp32": base64.b64encode(struct.pack("<ff", 0.1, 3)).decode()},
            "b": {"shape": [1, 2], "bf16": base64.b64encode(halves).decode()},
        },
    }


def test_the_short_id_names_the_values_and_is_fit_to_print():
    text = '{"tensors":{"w":{"bf16":"gD8=","shape":[1,1]}},"version":1}'
    digest = hashlib.sha256(text.encode()).hexdigest()
    assert taken({"w": torch.ones(1, 1)}).short == f"fp1:{digest[:12]}"
    short = taken(realistic()).short
    assert short == taken(dict(reversed(realistic().items()))).short
    assert short != taken(realistic(seed=1)).short
    assert short.startswith("fp1:")
    assert len(short) == 16


def entry(**fields):
    return {"version": 1, "tensors": {"w": {"shape": [2, 2], "fp32": "AAAAAA==" * 4} | fields}}


GOOD = base64.b64encode(bytes(16)).decode()
MALFORMED = {
    "none": None,
    "list": [],
    "text": "fp1:0123456789ab",
    "no version": {"tensors": {}},
    "no tensors": {"version": 1},
    "a field more": {"version": 1, "tensors": {}, "more": 1},
    "version 2": {"version": 2, "tensors": {}},
    "version true": {"version": True, "tensors": {}},
    "version 1.0": {"version": 1.0, "tensors": {}},
    "version text": {"version": "1", "tensors": {}},
    "version huge": {"version": 10**6000, "tensors": {}},
    "tensors list": {"version": 1, "tensors": []},
    "tensors null": {"version": 1, "tensors": None},
    "too many": {"version": 1, "tensors": dict.fromkeys(map(str, range(200_001)))},
    "empty name": {"version": 1, "tensors": {"": {"shape": [2, 2], "fp32": GOOD}}},
    "line in name": {"version": 1, "tensors": {"a\nb": {"shape": [2, 2], "fp32": GOOD}}},
    "escape in name": {"version": 1, "tensors": {"a\x1b[31m": {"shape": [2, 2], "fp32": GOOD}}},
    "long name": {"version": 1, "tensors": {"a" * 1001: {"shape": [2, 2], "fp32": GOOD}}},
    "name no text": {"version": 1, "tensors": {7: {"shape": [2, 2], "fp32": GOOD}}},
    "entry null": {"version": 1, "tensors": {"w": None}},
    "entry list": {"version": 1, "tensors": {"w": [[2, 2], GOOD]}},
    "entry empty": {"version": 1, "tensors": {"w": {}}},
    "no shape": {"version": 1, "tensors": {"w": {"fp32": GOOD}}},
    "no values": {"version": 1, "tensors": {"w": {"shape": [2, 2]}}},
    "both kinds": entry(fp32=GOOD, bf16=GOOD),
    "other kind": {"version": 1, "tensors": {"w": {"shape": [2, 2], "fp16": GOOD}}},
    "entry field more": entry(fp32=GOOD, more=1),
    "shape text": entry(fp32=GOOD, shape="22"),
    "shape number": entry(fp32=GOOD, shape=4),
    "shape one": entry(fp32=GOOD, shape=[4]),
    "shape none": entry(fp32=GOOD, shape=[]),
    "shape zero": entry(fp32="", shape=[0, 2]),
    "shape negative": entry(fp32=GOOD, shape=[-2, -2]),
    "shape float": entry(fp32=GOOD, shape=[2.0, 2]),
    "shape bool": entry(fp32=GOOD, shape=[True, 4]),
    "shape nested": entry(fp32=GOOD, shape=[[2], 2]),
    "shape huge": entry(fp32=GOOD, shape=[2**62, 2]),
    "shape vast": entry(fp32=GOOD, shape=[10**6000, 2]),
    "shape deep": entry(fp32=GOOD, shape=[2, 2] + [1] * 15),
    "values null": entry(fp32=None),
    "values list": entry(fp32=[0.0] * 4),
    "values number": entry(fp32=7),
    "values bytes": entry(fp32=GOOD.encode()),
    "not base64": entry(fp32="!" * 24),
    "no padding": entry(fp32=GOOD.rstrip("=")),
    "not ascii": entry(fp32="é" * 24),
    "spaces": entry(fp32=" " + GOOD),
    "too short": entry(fp32=base64.b64encode(bytes(12)).decode()),
    "too long": entry(fp32=base64.b64encode(bytes(20)).decode()),
    "no whole values": entry(fp32=base64.b64encode(bytes(15)).decode()),
    "too few of 32": entry(fp32=GOOD, shape=[100, 100]),
}


@pytest.mark.parametrize("value", MALFORMED.values(), ids=MALFORMED.keys())
def test_a_malformed_fingerprint_is_refused_by_field(value):
    with pytest.raises(BadAdapterFile) as error:
        Fingerprint.from_json(value)
    assert error.value.field == "fingerprint"
    assert len(str(error.value)) < 1300
    assert str(error.value).isprintable()


def test_the_well_formed_neighbour_of_the_malformed_ones_is_read():
    assert Fingerprint.from_json(entry(fp32=GOOD)).tensors["w"].shape == (2, 2)


def test_every_tiny_family_has_a_fingerprint():
    for family in FAMILIES:
        assert taken(weights(tiny(family))).tensors
