"""Denoisers whose weights are cast for each call (`enable_layerwise_casting` of diffusers).

The judge: the same values in float32, rounded by hand.
"""

import copy

import peft
import pytest
import torch
from diffusers.hooks import apply_layerwise_casting

from hf_lora import UnsupportedTarget, attach_lora, load_lora, save_lora, set_adapters
from hf_lora.testing import component_output, tiny_pipeline
from tests.support import assert_same, randomise, snapshot
from tests.test_pipeline_hosts import ALPHA, RANK, adapted

BYTES = torch.float8_e4m3fn


def output(pipe):
    return component_output(pipe.unet)


def cast(pipe):
    pipe.unet.enable_layerwise_casting(storage_dtype=BYTES, compute_dtype=torch.float32)
    return pipe


def rounded():
    """The same values as a cast pipeline, in float32."""
    pipe = tiny_pipeline("sd")
    values = cast(tiny_pipeline("sd")).unet.state_dict()
    pipe.unet.load_state_dict({name: value.float() for name, value in values.items()})
    return pipe


QKV = ["to_q", "to_k", "to_v", "to_out.0"]  # the last with a bias
BOFTS = ("ignore:Failed to load the CUDA ext", "ignore:Setting boft_n_butterfly_factor to 1")
RIGHT = {
    "lora": peft.LoraConfig(r=RANK, lora_alpha=ALPHA),
    "loha": peft.LoHaConfig(r=RANK, alpha=ALPHA),
    "lokr": peft.LoKrConfig(r=RANK, alpha=ALPHA),
    "oft": peft.OFTConfig(oft_block_size=8, r=0),
    "miss": peft.MissConfig(r=RANK),
    "ia3": peft.IA3Config(feedforward_modules=[]),
    "fourierft": peft.FourierFTConfig(n_frequency=20),
    "hra": peft.HRAConfig(r=RANK),
    "c3a": peft.C3AConfig(block_size=8),
    "road": peft.RoadConfig(),
    "waveft": peft.WaveFTConfig(n_frequency=20),
    "gralora": peft.GraloraConfig(r=RANK, gralora_k=2),
}
CASTABLE = ("lora", "loha", "lokr", "oft", "miss")  # afterwards, too
WRONG = {
    "boft": peft.BOFTConfig(boft_block_size=4),
    "dora": peft.LoraConfig(r=RANK, use_dora=True),
    "bat": peft.MissConfig(r=RANK, init_weights="bat"),
    "adalora": peft.AdaLoraConfig(total_step=10),
}


def with_kind(pipe, config):
    config = copy.deepcopy(config)
    config.target_modules = QKV
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        randomise(attach_lora(pipe, config=config).unet)
    return pipe


@pytest.mark.parametrize("kind", RIGHT)
def test_kinds_that_leave_the_base_to_its_layer_compute_right_over_bytes(kind):
    judge, pipe = (
        with_kind(rounded(), RIGHT[kind]),
        with_kind(cast(tiny_pipeline("sd")), RIGHT[kind]),
    )
    assert torch.equal(output(pipe), output(judge))
    for each in (pipe, judge):
        set_adapters(each, "default", 0.5)
    assert torch.equal(output(pipe), output(judge))
    pipe = with_kind(tiny_pipeline("sd"), RIGHT[kind])
    if kind in CASTABLE:
        set_adapters(judge, "default")
        assert torch.equal(output(cast(pipe)), output(judge))
    else:
        with pytest.raises(UnsupportedTarget, match=f"{kind.upper()} at .* detach_lora"):
            cast(pipe)


@pytest.mark.filterwarnings(*BOFTS)
@pytest.mark.parametrize("kind", WRONG)
def test_kinds_that_read_the_base_are_refused_over_bytes(kind):
    pipe = cast(tiny_pipeline("sd"))
    before, base = snapshot(pipe.unet), output(pipe)
    with pytest.raises(UnsupportedTarget, match="floats of one byte .* Use a plain LoRA"):
        with_kind(pipe, WRONG[kind])
    after = snapshot(pipe.unet)
    for held in (before, after):  # torch.equal knows no floats of one byte
        held["tensors"] = {n: t.float() for n, t in held["tensors"].items()}
    assert_same(before, after)
    assert torch.equal(output(pipe), base)
    pipe = with_kind(tiny_pipeline("sd"), WRONG[kind])
    before = output(pipe)
    with pytest.raises(UnsupportedTarget, match=r"detach_lora\(host, 'default'\) first"):
        cast(pipe)
    assert torch.equal(output(pipe), before)


def test_a_dora_file_is_refused_over_bytes_and_at_casts_that_nobody_told_of(tmp_path):
    file = save_lora(with_kind(tiny_pipeline("sd"), WRONG["dora"]), tmp_path)
    pipe = cast(tiny_pipeline("sd"))
    with pytest.raises(UnsupportedTarget, match="LORA with use_dora=True at "):
        load_lora(pipe, file)
    assert pipe.get_list_adapters() == {}
    pipe = tiny_pipeline("sd")
    load_lora(pipe, file, name="dora")
    load_lora(pipe, save_lora(adapted(), tmp_path / "plain", name="style"), name="style")
    apply_layerwise_casting(pipe.unet, BYTES, torch.float32, skip_modules_pattern=("lora_", "norm"))
    for names in ("dora", ["style", "dora"]):
        with pytest.raises(UnsupportedTarget, match="Leave 'dora' out"):
            set_adapters(pipe, names)
    set_adapters(pipe, "style", 0.5)
    assert output(pipe).isfinite().all()


def test_casts_to_two_bytes_take_every_kind():
    pipe, judge = (with_kind(tiny_pipeline("sd"), WRONG["dora"]) for _ in range(2))
    values = pipe.unet.state_dict()
    pipe.unet.enable_layerwise_casting(torch.bfloat16, torch.float32)
    held = pipe.unet.state_dict()
    assert {t.dtype for n, t in held.items() if "base_layer" in n} == {torch.bfloat16}
    judge.unet.load_state_dict({name: held[name].to(value) for name, value in values.items()})
    # the weights are cast to float32 at different points of DoRA's sum
    assert torch.allclose(output(pipe), output(judge), rtol=0, atol=2e-6)
