"""Files of a pipeline on one of its models, and those of one model on the pipeline around it."""

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from hf_lora import attach_lora, detach_lora, load_lora, probe_lora, save_lora
from hf_lora.architectures import names_of_host
from hf_lora.errors import AdapterMismatch
from hf_lora.testing import component_output, tiny_pipeline
from tests.conformance.foreign_files import difference, pipeline, replaced
from tests.conformance.foreign_page import BAR
from tests.support import assert_same, randomise, snapshot


def wide(pipe):
    """The pipeline with a second text encoder wider than the first, as public ones have it."""
    torch.manual_seed(3)
    config = CLIPTextConfig(
        vocab_size=99, hidden_size=48, intermediate_size=64, num_hidden_layers=3,
        num_attention_heads=4, projection_dim=32, max_position_embeddings=77,
    )  # fmt: skip
    pipe.text_encoder_2 = CLIPTextModelWithProjection(config).eval()
    return pipe


def sdxl():
    return wide(tiny_pipeline("sdxl"))


def ids(model):
    """What a text encoder gives for some words."""
    with torch.no_grad():
        return model(torch.arange(8).reshape(1, 8)).last_hidden_state


def adapted(pipe, *parts):
    for seed, name in enumerate(parts):
        randomise(attach_lora(getattr(pipe, name), rank=2, alpha=3, targets="attention"), seed)
    return pipe


# ------------------------------------------------------------ a file of diffusers on one model


@pytest.mark.parametrize("header", [True, False])
def test_the_one_component_of_a_file_goes_onto_that_model(header, tmp_path):
    """As in plain diffusers, whose `load_lora_adapter` takes such files with prefix=..."""
    pipe = adapted(tiny_pipeline("flux"), "transformer")
    file = save_lora(pipe, tmp_path / "style.safetensors")
    if not header:
        save_file(load_file(file), file)
    theirs, ours = tiny_pipeline("flux"), tiny_pipeline("flux")
    theirs.load_lora_weights(file)
    assert probe_lora(file, ours.transformer).loads
    report = load_lora(ours.transformer, file)
    assert torch.equal(component_output(ours.transformer), component_output(theirs.transformer))
    assert report.host == "FluxTransformer2DModel"
    assert report.base.startswith("matched" if header else "not verified")
    save_lora(ours.transformer, tmp_path / "again")
    again = tiny_pipeline("flux")
    load_lora(again.transformer, tmp_path / "again")
    assert torch.equal(component_output(again.transformer), component_output(ours.transformer))


def test_the_fingerprint_of_another_base_is_seen_on_the_one_model(tmp_path):
    file = save_lora(adapted(tiny_pipeline("sd"), "unet"), tmp_path / "style.safetensors")
    other = tiny_pipeline("sd", seed=1).unet
    before = snapshot(other)
    with pytest.raises(AdapterMismatch, match="made on another base"):
        load_lora(other, file)
    assert_same(before, snapshot(other))


def test_the_first_transformers_file_goes_onto_the_second(tmp_path):
    pipe = adapted(tiny_pipeline("wan"), "transformer")
    file = save_lora(pipe, tmp_path / "high.safetensors")
    save_file(load_file(file), file)  # without the fingerprint, by which it is another base
    fresh = tiny_pipeline("wan")
    load_lora(fresh.transformer_2, file)
    by_peft = tiny_pipeline("wan").transformer_2
    by_peft.load_lora_adapter(load_file(file), prefix="transformer")
    assert torch.equal(component_output(fresh.transformer_2), component_output(by_peft))


@pytest.mark.parametrize("part", ["unet", "text_encoder", "text_encoder_2"])
def test_other_components_are_named_and_can_be_left_out(part, tmp_path):
    parts = ("unet", "text_encoder", "text_encoder_2")
    pipe = adapted(sdxl(), *parts)
    file = save_lora(pipe, tmp_path / "style.safetensors")
    others = [name for name in parts if name != part]
    fresh = getattr(sdxl(), part)
    before = snapshot(fresh)
    with pytest.raises(
        AdapterMismatch, match="for a pipeline with .* as well, and the host is"
    ) as e:
        load_lora(fresh, file)
    assert_same(before, snapshot(fresh))
    assert all(name in e.value.fact for name in others)
    assert part not in e.value.fact.replace("text_encoder_2", "").split()
    assert e.value.fix == "Load it into the pipeline, or pass strict=False to leave them out."
    probed = probe_lora(file, fresh)
    assert (probed.loads, probed.lenient, set(probed.left_out)) == (False, True, {*others})
    report = load_lora(fresh, file, strict=False)
    assert {*report.skipped} == {*others}
    assert report.base.startswith("matched")
    give = component_output if part == "unet" else ids
    assert torch.equal(give(fresh), give(getattr(pipe, part)))


def test_a_strange_module_is_left_out_of_the_one_component(tmp_path):
    pipe = adapted(tiny_pipeline("flux"), "transformer")
    file = save_lora(pipe, tmp_path / "style.safetensors")
    strange = {f"transformer.nowhere.to_q.lora_{x}.weight": torch.ones(2, 2) for x in "AB"}
    save_file({**load_file(file), **strange}, file)
    fresh = tiny_pipeline("flux").transformer
    with pytest.raises(AdapterMismatch, match=r"nowhere\.to_q"):
        load_lora(fresh, file)
    assert load_lora(fresh, file, strict=False).skipped == ("nowhere.to_q",)


def test_two_components_that_fit_one_model_are_told_apart_in_the_pipeline_only(tmp_path):
    pipe = adapted(tiny_pipeline("wan"), "transformer", "transformer_2")
    file = save_lora(pipe, tmp_path / "style.safetensors")
    for strict in (True, False):
        with pytest.raises(AdapterMismatch, match="transformer and transformer_2 fit alike") as e:
            load_lora(tiny_pipeline("wan").transformer, file, strict=strict)
        assert e.value.fix == "Load it into the pipeline."


# ------------------------------------------------------------ a file of kohya on one model


def kohya(tmp_path, pipe, starts):
    """A file of kohya's for parts of a pipeline, and the weights that it makes, by part."""
    tensors, merged = {}, {}
    made = torch.Generator().manual_seed(0)
    for start, part in starts.items():
        layers = names_of_host(pipe)[part].layers
        ends = (".q_proj", ".attn1.to_q")
        merged[part] = {}
        for path, shape in layers.items():
            if not path.endswith(ends):
                continue
            inner = path if part == "unet" else f"text_model.{path.removeprefix('text_model.')}"
            key = f"{start}{inner.replace('.', '_')}"
            a = torch.randn(2, shape[1], generator=made)
            b = torch.randn(shape[0], 2, generator=made)
            tensors |= {f"{key}.lora_down.weight": a, f"{key}.lora_up.weight": b}
            tensors[f"{key}.alpha"] = torch.tensor(3.0)
            weight = getattr(pipe, part).get_submodule(path).weight.double()
            merged[part][path] = (weight + 1.5 * (b.double() @ a.double())).float()
    save_file(tensors, tmp_path / "xl.safetensors")
    return tmp_path / "xl.safetensors", merged


XL = {"lora_unet_": "unet", "lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2"}


@pytest.mark.parametrize("start", XL)
def test_a_model_gets_its_own_part_of_a_file_for_sdxl(start, tmp_path):
    pipe = sdxl()
    file, merged = kohya(tmp_path, pipe, XL)
    model = getattr(pipe, XL[start])
    before = snapshot(model)
    with pytest.raises(AdapterMismatch, match="and the host is a single .*strict=False"):
        load_lora(model, file)
    assert_same(before, snapshot(model))
    probed = probe_lora(file, model)
    assert (probed.loads, probed.lenient) == (False, True)
    give = component_output if start == "lora_unet_" else ids
    with replaced(model, merged[XL[start]]):
        wanted = give(model)
    report = load_lora(model, file, strict=False)
    assert difference(give(model), wanted) <= BAR  # sums in another order
    assert all(not key.startswith(start) for key in report.skipped)
    assert {key.partition("text_")[0].partition("down_")[0] for key in report.skipped} >= {
        other for other in XL if other not in (start, "lora_unet_")
    }


def test_where_only_names_could_tell_the_class_of_the_host_does(tmp_path):
    pipe = tiny_pipeline("sdxl")  # its text encoders are of one size
    file, merged = kohya(tmp_path, pipe, XL)
    with replaced(pipe.text_encoder, merged["text_encoder"]):
        wanted = component_output(pipe.text_encoder)
    load_lora(pipe.text_encoder, file, strict=False)
    assert difference(component_output(pipe.text_encoder), wanted) <= BAR  # sums in another order
    for strict in (True, False):
        with pytest.raises(AdapterMismatch, match="text_encoder and of text_encoder_2, which fit"):
            load_lora(pipe.text_encoder_2, file, strict=strict)
    assert not probe_lora(file, pipe.text_encoder_2).loads


@pytest.mark.parametrize("kind", ["sdxl", "wide"])
def test_a_file_for_the_second_text_encoder_is_none_for_the_first(kind, tmp_path):
    pipe = sdxl() if kind == "wide" else tiny_pipeline("sdxl")
    file, _ = kohya(tmp_path, pipe, {"lora_te2_": "text_encoder_2"})
    for strict in (True, False):
        with pytest.raises(
            AdapterMismatch, match="are of text_encoder_2, and the host is a single"
        ):
            load_lora(pipe.text_encoder, file, strict=strict)
    load_lora(pipe.text_encoder_2, file)


@pytest.mark.parametrize("start", ["", "lycoris_"])
@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2"])
def test_names_without_a_component_go_where_their_shapes_do(start, part, tmp_path):
    pipe = sdxl()
    paths = names_of_host(pipe)["text_encoder"].layers  # the second one has these and more
    tensors = {}
    for path in (p for p in paths if p.endswith(".q_proj")):
        width = getattr(pipe, part).config.hidden_size
        inner = f"text_model.{path.removeprefix('text_model.')}" if not start else path
        key = f"{start}{inner.replace('.', '_') if start else inner}"
        tensors[f"{key}.lora_A.weight"] = torch.ones(2, width)
        tensors[f"{key}.lora_B.weight"] = torch.ones(width, 2)
    save_file(tensors, tmp_path / "bare.safetensors")
    assert {*load_lora(pipe, tmp_path / "bare.safetensors").components} == {part}


# ------------------------------------------------------------ a peft folder on a pipeline


@pytest.mark.parametrize("method", ["LoraConfig", "LoHaConfig", "LoKrConfig"])
@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2"])
def test_a_folder_of_one_text_encoder_goes_where_its_shapes_do(part, method, tmp_path):
    pipe = sdxl()
    config = getattr(peft, method)(r=2, target_modules=["q_proj"], task_type="FEATURE_EXTRACTION")
    model = peft.get_peft_model(getattr(pipe, part), config)
    randomise(model)
    wanted = ids(model.get_base_model())
    model.save_pretrained(tmp_path)
    fresh = sdxl()
    assert probe_lora(tmp_path, sdxl()).loads
    assert {*load_lora(fresh, tmp_path).components} == {part}
    assert torch.equal(ids(getattr(fresh, part)), wanted)
    detach_lora(fresh)


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2"])
def test_among_those_of_one_size_the_class_in_the_file_decides(part, tmp_path):
    pipe = tiny_pipeline("sdxl")
    model = peft.get_peft_model(
        getattr(pipe, part), peft.LoraConfig(r=2, target_modules=["q_proj"])
    )
    model.save_pretrained(tmp_path)
    assert {*load_lora(tiny_pipeline("sdxl"), tmp_path).components} == {part}


def test_components_that_a_folder_fits_alike_are_named(tmp_path):
    save_lora(adapted(tiny_pipeline("wan"), "transformer").transformer, tmp_path)
    pipe = pipeline("wan")
    with pytest.raises(
        AdapterMismatch, match="of which transformer and transformer_2 fit"
    ) as error:
        load_lora(pipe, tmp_path)
    assert error.value.fix == (
        "Load it into the one it was made on: load_lora(pipe.transformer, ...) or "
        "load_lora(pipe.transformer_2, ...)."
    )


def test_a_folder_that_fits_none_says_which_comes_nearest(tmp_path):
    pipe = adapted(tiny_pipeline("sd"), "text_encoder")
    save_lora(pipe.text_encoder, tmp_path)
    shorter = tiny_pipeline("sd")
    del shorter.text_encoder.encoder.layers[-1]
    with pytest.raises(AdapterMismatch, match="none of which has all of its targets") as error:
        load_lora(shorter, tmp_path)
    assert "load_lora(pipe.text_encoder, ...) says" in error.value.fix
