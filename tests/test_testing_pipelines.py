"""The tiny pipelines are what they say: seeded, quiet, complete, and they leave the generator."""

import pytest
import torch

from hf_lora.errors import InvalidOption
from hf_lora.testing import PIPELINES, component_output, tiny_pipeline

COMPONENTS = [
    (kind, name)
    for kind, row in PIPELINES.items()
    for name in row.parts
    if name.startswith(("unet", "transformer", "text_encoder"))
]


def test_the_seed_decides_the_weights_and_nothing_else_moves():
    torch.manual_seed(7)
    first = torch.rand(1)
    torch.manual_seed(7)
    one, two, other = (tiny_pipeline("sd", seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.rand(1), first)
    for name in ("unet", "text_encoder", "vae"):
        weights = [getattr(pipe, name).state_dict() for pipe in (one, two, other)]
        assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
        assert not all(torch.equal(weights[0][key], weights[2][key]) for key in weights[0])


@pytest.mark.parametrize("kind", PIPELINES)
def test_every_kind_makes_another_picture_of_another_prompt(kind):
    pipe = tiny_pipeline(kind)

    def picture(prompt):
        generator = torch.Generator().manual_seed(3)
        made = pipe(prompt=prompt, generator=generator, **PIPELINES[kind].call)
        return made.frames if hasattr(made, "frames") else made.images

    cat, again, dog = picture("a cat"), picture("a cat"), picture("a dog")
    size = PIPELINES[kind].call["height"]
    assert cat.shape[-3:] == (3, size, size)
    assert torch.isfinite(cat).all()
    assert torch.equal(cat, again)
    assert not torch.equal(cat, dog)


def test_both_denoisers_of_wan_have_a_part_in_the_video():
    def video(**noisier):
        pipe = tiny_pipeline("wan")
        for name, scale in noisier.items():
            getattr(pipe, name).proj_out.weight.data *= scale
        generator = torch.Generator().manual_seed(3)
        return pipe(prompt="a cat", generator=generator, **PIPELINES["wan"].call).frames

    plain = video()
    assert not torch.equal(plain, video(transformer=2))
    assert not torch.equal(plain, video(transformer_2=2))


@pytest.mark.parametrize(("kind", "name"), COMPONENTS)
def test_the_output_of_a_component_follows_its_inputs_and_leaves_its_mode(kind, name):
    model = getattr(tiny_pipeline(kind), name)
    assert not any(module.training for module in model.modules())
    model.train()
    output = component_output(model)
    assert all(module.training for module in model.modules())
    assert torch.isfinite(output).all()
    assert torch.equal(output, component_output(model))
    assert not torch.allclose(output, component_output(model, seed=2))


def test_unknown_kinds_and_components_are_named():
    with pytest.raises(InvalidOption, match="no tiny pipeline 'sd4'.*'sd', 'sdxl', 'flux'"):
        tiny_pipeline("sd4")
    with pytest.raises(InvalidOption, match="no inputs for AutoencoderKL.*CLIPTextModel"):
        component_output(tiny_pipeline("sd").vae)
