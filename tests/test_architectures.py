"""Public pipelines by name: sizes as published, components and names as on a loaded host."""

import math
import re
from functools import cache

import bitsandbytes
import diffusers
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_lora import architectures, attach_lora
from hf_lora.architectures import ARCHITECTURES, architecture, names_of, names_of_host
from hf_lora.errors import InvalidOption, UnsupportedHost
from hf_lora.formats.names import Names
from hf_lora.testing import PIPELINES, tiny, tiny_pipeline

# Parameters of the checkpoints on the Hub, from their file headers.
COUNTED = {
    "sd1.unet": 859_520_964,
    "sd1.text_encoder": 123_060_480,
    "sd2.unet": 865_910_724,
    "sdxl.unet": 2_567_463_684,
    "sdxl.text_encoder": 123_060_480,
    "sdxl.text_encoder_2": 694_659_840,
    "flux.transformer": 11_901_408_320,
    "flux.text_encoder": 123_060_480,
}
# Billions of parameters as their makers call them.
CALLED = {
    "sd3.transformer": 2,
    "sd3.5-medium.transformer": 2.5,
    "sd3.5-large.transformer": 8.1,
    "flux2.transformer": 32,
    "flux2-klein-4b.transformer": 4,
    "flux2-klein-9b.transformer": 9,
    "qwen-image.transformer": 20,
    "z-image.transformer": 6,
    "wan.transformer": 14,
    "wan-1.3b.transformer": 1.3,
    "wan2.2.transformer": 14,
    "wan2.2.transformer_2": 14,
    "wan2.2-i2v.transformer": 14,
    "wan2.2-i2v.transformer_2": 14,
    "wan2.2-5b.transformer": 5,
    "hunyuan-video.transformer": 13,
    "ltx.transformer": 2,
}
# Those of SD3 are CLIP's, which the others have; the 14 billion of this Wan leave out what it sees
# the picture through.
WITHOUT_A_NUMBER = {
    "sd2.text_encoder",
    "wan-i2v.transformer",
    *(f"{name}.text_encoder{n}" for name in ("sd3", "sd3.5-medium", "sd3.5-large")
      for n in ("", "_2")),
}  # fmt: skip

CLASSES = {
    "sd1": diffusers.StableDiffusionPipeline,
    "sd2": diffusers.StableDiffusionPipeline,
    "sdxl": diffusers.StableDiffusionXLPipeline,
    "sd3": diffusers.StableDiffusion3Pipeline,
    "flux2-klein-": diffusers.Flux2KleinPipeline,
    "flux2": diffusers.Flux2Pipeline,
    "flux": diffusers.FluxPipeline,
    "wan": diffusers.WanPipeline,
    "qwen-image": diffusers.QwenImagePipeline,
    "z-image": diffusers.ZImagePipeline,
    "hunyuan-video": diffusers.HunyuanVideoPipeline,
    "ltx": diffusers.LTXPipeline,
}


def weights_in(names):
    return sum(math.prod(shape) for shape in names.layers.values())


def every_component():
    return {f"{n}.{part}": names for n in ARCHITECTURES for part, names in architecture(n).items()}


def test_sizes_are_those_of_the_public_models():
    found = {ident: weights_in(names) for ident, names in every_component().items()}
    assert found.keys() == COUNTED.keys() | CALLED.keys() | WITHOUT_A_NUMBER
    for ident, count in COUNTED.items():
        # biases, norms and tables, which are no layers, are less than a thousandth
        assert found[ident] == pytest.approx(count, rel=1e-3), ident
    for ident, billions in CALLED.items():
        # round numbers; that of SD3.5 medium also counts 0.23 for its table of positions
        assert found[ident] == pytest.approx(billions * 1e9, rel=0.11), ident


def test_wan_from_a_picture_is_wan_and_what_it_sees_the_picture_through():
    plain, seeing = (architecture(name)["transformer"].layers for name in ("wan", "wan-i2v"))
    assert plain.keys() < seeing.keys()
    new = {re.sub(r"\d+", "N", path) for path in seeing.keys() - plain.keys()}
    image = "condition_embedder.image_embedder.ff.net.N"
    assert new == {
        "blocks.N.attnN.add_k_proj", "blocks.N.attnN.add_v_proj", image, f"{image}.proj",
    }  # fmt: skip
    other = {path for path in plain if plain[path] != seeing[path]}
    assert other == {"patch_embedding"}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_components_are_what_diffusers_loads_loras_into(name):
    start = next(start for start in CLASSES if name.startswith(start))
    loadable = set(CLASSES[start]._lora_loadable_modules)
    if start == "wan" and name not in ("wan2.2", "wan2.2-i2v"):
        loadable.remove("transformer_2")
    assert set(architecture(name)) == loadable


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("sd", "sd1"),
        ("sdxl", "sdxl"),
        ("flux", "flux"),
        ("flux2", "flux2-klein-4b"),
        ("sd3", "sd3.5-medium"),  # the tiny one attends twice, too
        ("qwen-image", "qwen-image"),
        ("z-image", "z-image"),
        ("wan", "wan2.2"),
        ("hunyuan-video", "hunyuan-video"),
        ("ltx", "ltx"),
    ],
)
def test_a_tiny_pipeline_has_the_components_and_layers_of_the_public_one(kind, name):
    def shapeless(names):
        return {re.sub(r"\d+", "N", path) for path in names.layers}

    host, public = names_of_host(tiny_pipeline(kind)), architecture(name)
    assert host.keys() == public.keys()
    for component, names in host.items():
        assert names.kind == public[component].kind
        assert shapeless(names) <= shapeless(public[component])


def test_a_pipeline_is_built_once_and_leaves_generator_and_defaults(monkeypatch):
    fresh = cache(architectures._built.__wrapped__)
    monkeypatch.setattr(architectures, "_built", fresh)
    torch.manual_seed(5)
    first = torch.rand(1)
    torch.manual_seed(5)
    one = architecture("wan2.2")
    assert torch.equal(torch.rand(1), first)
    assert torch.empty(0).device.type == "cpu"
    one.pop("transformer")  # the caller's own
    two = architecture("wan2.2")
    assert two["transformer"] is two["transformer_2"] is one["transformer_2"]


def test_an_unknown_name_is_answered_with_those_there_are():
    with pytest.raises(InvalidOption, match="'sdx1'.*closest are.*sdxl.*Names: sd1, .*, ltx"):
        architecture("sdx1")
    with pytest.raises(InvalidOption, match="Names: sd1"):
        architecture(["sdxl"])


@pytest.mark.parametrize("kind", PIPELINES)
def test_shapes_are_those_of_the_weights(kind):
    pipe = tiny_pipeline(kind)
    for component, names in names_of_host(pipe).items():
        model = getattr(pipe, component)
        assert names.kind == type(model).__name__
        layers = (nn.Linear, nn.Conv2d, nn.Conv3d, nn.Embedding)
        there = {
            path: tuple(module.weight.shape)
            for path, module in model.named_modules()
            if isinstance(module, layers)
        }
        assert names.layers == there


def test_shapes_of_grouped_convolutions_and_of_gpt2s_own_class_are_as_a_lora_needs_them():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(6, 9, 5, groups=3)
            self.linear = Conv1D(4, 7)  # 7 in, 4 out, its weight lies the other way round
            self.norm = nn.LayerNorm(4)

    names = names_of(Model())
    assert names == Names("Model", {"conv": (9, 2, 5), "linear": (4, 7)})


def test_names_are_those_of_the_bare_model_whoever_put_an_adapter_on_it():
    bare = names_of(tiny("llama"))
    config = LoraConfig(target_modules=["q_proj"], r=2)
    assert names_of(attach_lora(tiny("llama"), rank=2)) == bare
    assert names_of(get_peft_model(tiny("llama"), config)) == bare
    pipe = tiny_pipeline("sdxl")
    plain = names_of_host(pipe)
    pipe.unet.add_adapter(LoraConfig(target_modules=["conv1", "to_q"], r=2))
    assert names_of_host(pipe) == plain
    compiled = torch.compile(tiny("llama"))  # compiles nothing before it is called
    assert names_of(compiled) == bare


@pytest.mark.parametrize("layer", [bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt])
def test_a_quantised_layer_has_its_true_shape(layer):
    model = nn.Sequential(layer(64, 32), nn.Linear(32, 16)).to("cpu")
    names = names_of(model)
    assert names.layers == {"0": (32, 64), "1": (16, 32)}
    assert names.layers == names_of(get_peft_model(model, LoraConfig(target_modules=["0"]))).layers


def test_a_model_is_a_host_of_one_component_and_a_name_is_none():
    model = tiny("llama")
    assert names_of_host(model) == {"model": names_of(model)}
    with pytest.raises(UnsupportedHost, match="loaded model"):
        names_of_host("runwayml/stable-diffusion-v1-5")
    with pytest.raises(UnsupportedHost, match=r"Give a component, pipe\.unet"):
        names_of(tiny_pipeline("sd"))
