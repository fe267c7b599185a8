"""Conversions: the same adapter, or an error that says what would be lost."""

import json
import os

import diffusers
import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hf_lora import attach_lora, load_lora, open_adapter, save_adapter, save_lora
from hf_lora.architectures import architecture
from hf_lora.cli import main
from hf_lora.convert import convert
from hf_lora.errors import AdapterMismatch, BadAdapterFile, InvalidOption
from hf_lora.testing import tiny
from hf_lora.testing.pipelines import component_output, tiny_pipeline
from tests.lycoris_files import write
from tests.support import logits, randomise

FLUX_QKV = ("to_q", "to_k", "to_v")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of tiny pipelines, of which the configs are read."""
    root = tmp_path_factory.mktemp("pipelines")
    for kind in ("sd", "flux"):
        tiny_pipeline(kind).save_pretrained(root / kind)
    return {kind: str(root / kind) for kind in ("sd", "flux")}


def outputs(kind, path, parts=("unet", "text_encoder"), **options):
    """What the components of a fresh pipeline give with a file loaded."""
    pipe = tiny_pipeline(kind)
    load_lora(pipe, path, **options)
    return [component_output(getattr(pipe, name)) for name in parts]


def assert_same(ones, others):
    assert all(map(torch.equal, ones, others))


def lycoris(path, variant, only=lambda p, _: "attentions" in p or "resnets" in p):
    """A file of LyCORIS's own for the tiny denoiser."""
    made = write(tiny_pipeline("sd").unet, variant, prefix="lora_unet", only=only)
    save_file({key: t.contiguous() for key, t in made.tensors.items()}, path)
    return made


@pytest.fixture
def style(tmp_path):
    """A file of ours for a denoiser and a text encoder, alpha unlike rank."""
    pipe = tiny_pipeline("sd")
    for part in (pipe.unet, pipe.text_encoder):
        randomise(attach_lora(part, rank=4, alpha=7, targets="attention"))
    return save_lora(pipe, tmp_path / "style.safetensors")


# ---------------------------------------------------------------- exact


@pytest.mark.parametrize("variant", ["lora", "dora", "lora tucker", "loha", "lokr", "loha tucker"])
@pytest.mark.parametrize("layout", ["kohya", "comfyui", "diffusers", "peft"])
def test_every_kind_stays_what_it_is_or_the_layout_is_refused(variant, layout, folders, tmp_path):
    source, out = tmp_path / "style.safetensors", tmp_path / "out"
    lycoris(source, variant)
    if layout == "diffusers" and variant.startswith("lo") and "lora" not in variant:
        kind = variant[:4].upper()
        with pytest.raises(BadAdapterFile, match=f"unet is an adapter of the method {kind}"):
            convert(source, out, layout, host=folders["sd"])
        assert not out.exists()
        return
    done = convert(source, out, layout, host=folders["sd"])
    assert done.checked.startswith("read back: ")
    if layout == "peft":
        pipe = tiny_pipeline("sd")
        load_lora(pipe.unet, out)
        assert_same([component_output(pipe.unet)], outputs("sd", source, ["unet"]))
    else:
        assert done.digest == done.digest_before
        assert_same(outputs("sd", out, ["unet"]), outputs("sd", source, ["unet"]))


def test_a_lycoris_file_as_diffusers_computes_in_plain_diffusers_what_lycoris_does(
    folders, tmp_path
):
    source, out = tmp_path / "style.safetensors", tmp_path / "out.safetensors"
    made = lycoris(source, "lora")
    convert(source, out, "diffusers", host=folders["sd"])
    plain = diffusers.StableDiffusionPipeline.from_pretrained(folders["sd"])
    plain.load_lora_weights(out)
    # the modules' own base weights are those of the same seed
    for path in ("mid_block.attentions.0.proj_in", "down_blocks.0.resnets.0.conv1"):
        layer = plain.unet.get_submodule(path)
        delta = layer.get_delta_weight("default_0").double()
        wanted = made.dense(path) - layer.base_layer.weight.double()
        # one fp32 product of factors of at most rank 4
        assert torch.allclose(delta, wanted, rtol=0, atol=1e-6 * float(wanted.abs().max()))


def test_a_kohya_file_has_true_alphas_and_the_names_of_sd_scripts(style, folders, tmp_path):
    out = tmp_path / "out.safetensors"
    convert(style, out, "kohya", host=folders["sd"])
    tensors = load_file(out)
    assert {float(t) for key, t in tensors.items() if key.endswith(".alpha")} == {7.0}
    assert "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight" in tensors
    back = tmp_path / "back.safetensors"
    done = convert(out, back, "diffusers", host=folders["sd"])
    assert done.digest == open_adapter(style).digest
    assert_same(outputs("sd", back), outputs("sd", style))


def test_a_component_becomes_a_peft_folder_that_plain_peft_loads(folders, tmp_path):
    pipe = tiny_pipeline("sd")
    randomise(attach_lora(pipe.unet, rank=4, alpha=7, targets="attention"))
    source = save_lora(pipe, tmp_path / "style.safetensors")
    done = convert(source, tmp_path / "folder", "peft")
    assert done.digest != done.digest_before  # it counts the name of the component
    assert "every factor and scaling is the same" in done.checked
    adapter = open_adapter(tmp_path / "folder")
    assert adapter.manifest.derived_from == (done.digest_before,)
    plain = peft.PeftModel.from_pretrained(tiny_pipeline("sd").unet, tmp_path / "folder")
    assert torch.equal(component_output(plain.base_model.model), component_output(pipe.unet))
    # and back, onto the only component that has these layers; its fingerprint comes along
    again = tmp_path / "again.safetensors"
    back = convert(tmp_path / "folder", again, "diffusers", host=folders["sd"])
    assert back.digest == done.digest_before
    fresh = tiny_pipeline("sd")
    assert load_lora(fresh, again).verified
    assert torch.equal(component_output(fresh.unet), component_output(pipe.unet))


def flux(path, alphas):
    """A file of ours with factors on q, k and v apart, each with its own alpha."""
    pipe = tiny_pipeline("flux")
    pattern = {name: alpha for name, alpha in zip(FLUX_QKV, alphas, strict=True) if alpha != 8}
    config = peft.LoraConfig(
        r=4, lora_alpha=8, alpha_pattern=pattern, target_modules=list(FLUX_QKV)
    )
    randomise(attach_lora(pipe.transformer, config=config))
    return save_lora(pipe, path)


def test_where_rows_are_joined_and_the_digest_cannot_stay_every_update_is_compared(
    folders, tmp_path
):
    source, out = flux(tmp_path / "style.safetensors", (8, 16, 4)), tmp_path / "out.safetensors"
    done = convert(source, out, "comfyui", host=folders["flux"])
    assert any("img_attn.qkv" in key for key in load_file(out))
    assert done.digest != done.digest_before
    assert "which were joined or cut, the update is the same" in done.checked
    # B times a power of two, and scaling divided by it: exact but for the order of one product
    for one, other in zip(
        outputs("flux", out, ["transformer"]),
        outputs("flux", source, ["transformer"]),
        strict=True,
    ):
        assert torch.allclose(one, other, rtol=0, atol=1e-6)


def test_what_joining_would_round_is_refused(folders, tmp_path):
    source, out = flux(tmp_path / "style.safetensors", (8, 7, 8)), tmp_path / "out.safetensors"
    with pytest.raises(BadAdapterFile, match="could only hold by rounding.*such as diffusers"):
        convert(source, out, "kohya", host=folders["flux"])
    assert not out.exists()
    assert convert(source, out, "diffusers").digest == open_adapter(source).digest


def test_without_a_pipeline_the_first_public_one_that_fits_is_taken(tmp_path):
    """A peft folder made on the denoiser of SD1: its own shapes, a handful of layers."""
    path = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    out, width = architecture("sd1")["unet"].layers[path]
    generator = torch.Generator().manual_seed(0)
    config = peft.LoraConfig(r=2, lora_alpha=5, target_modules=[path]).to_dict()
    factors = {
        f"base_model.model.{path}.lora_A.weight": torch.randn(2, width, generator=generator),
        f"base_model.model.{path}.lora_B.weight": torch.randn(out, 2, generator=generator),
    }
    (tmp_path / "folder").mkdir()
    save_file(factors, tmp_path / "folder" / "adapter_model.safetensors")
    plain = {k: v.value if hasattr(v, "value") else v for k, v in config.items()}
    plain = {k: sorted(v) if isinstance(v, set) else v for k, v in plain.items()}
    (tmp_path / "folder" / "adapter_config.json").write_text(json.dumps(plain))
    file = tmp_path / "style.safetensors"
    done = convert(tmp_path / "folder", file, "kohya")
    assert [part.name for part in done.parts] == ["unet"]
    name = f"lora_unet_{path.replace('.', '_')}"
    tensors = load_file(file)
    assert set(tensors) == {f"{name}.{x}" for x in ("alpha", "lora_down.weight", "lora_up.weight")}
    assert float(tensors[f"{name}.alpha"]) == 5.0
    assert torch.equal(tensors[f"{name}.lora_up.weight"], [*factors.values()][1])


def test_the_header_of_a_stranger_comes_along(folders, tmp_path):
    made = write(
        tiny_pipeline("sd").unet, "lora", prefix="lora_unet", only=lambda p, _: "attn" in p
    )
    source, out = tmp_path / "style.safetensors", tmp_path / "out.safetensors"
    words = {"ss_sd_model_name": "base.safetensors", "modelspec.trigger_phrase": "ohwx"}
    save_file(dict(made.tensors), source, metadata=words)
    for layout in ("diffusers", "kohya"):
        convert(source, out, layout, host=folders["sd"])
        with safe_open(out, "pt") as file:
            assert words.items() <= file.metadata().items()
        assert open_adapter(out, host=tiny_pipeline("sd")).manifest.trigger_words == ("ohwx",)


def test_facts_that_the_layout_has_no_place_for_are_listed(style, folders, tmp_path):
    done = convert(style, tmp_path / "out.safetensors", "kohya", host=folders["sd"])
    assert done.not_carried == ("the base's fingerprint, by which another base is noticed",)
    assert "not carried" in str(done)
    assert convert(style, tmp_path / "again.safetensors", "diffusers").not_carried == ()
    assert json.loads(json.dumps(done.as_dict()))["parts"][0]["kind"] == "LoRA"


# ---------------------------------------------------------------- refused


def test_several_components_make_no_peft_folder(style, tmp_path):
    with pytest.raises(AdapterMismatch, match="is for text_encoder, unet, and a peft folder holds"):
        convert(style, tmp_path / "out", "peft")
    assert not (tmp_path / "out").exists()


def test_several_components_of_a_kind_that_diffusers_lacks_are_sent_to_kohya(folders, tmp_path):
    pipe, tensors = tiny_pipeline("sd"), {}
    for part, start in ((pipe.unet, "lora_unet"), (pipe.text_encoder, "lora_te_text_model")):
        made = write(part, "loha", prefix=start, only=lambda p, _: p.endswith(("to_q", "q_proj")))
        tensors |= {key: t.contiguous() for key, t in made.tensors.items()}
    source = tmp_path / "style.safetensors"
    save_file(tensors, source)
    with pytest.raises(AdapterMismatch) as error:
        convert(source, tmp_path / "out", "peft", host=folders["sd"])
    assert error.value.fix == "Convert it to kohya, which holds all."
    with pytest.raises(BadAdapterFile) as refused:
        convert(source, tmp_path / "out", "diffusers", host=folders["sd"])
    assert refused.value.fix.startswith("Save it in the kohya layout")
    done = convert(source, tmp_path / "out", "kohya", host=folders["sd"])  # as both say
    assert done.digest == done.digest_before
    assert done.out == str(tmp_path / "out" / "lora.safetensors")


FILE_NAMES = [
    # layout, name of a file that it does not write
    ("peft", "out.safetensors"), ("peft", "out.bin"), ("kohya", "out.bin"), ("comfyui", "out.PT"),
    ("diffusers", "out.json"), ("kohya", "out.SAFETENSORS"), ("diffusers", "out.ckpt"),
]  # fmt: skip


@pytest.mark.parametrize(("layout", "name"), FILE_NAMES)
def test_the_name_of_a_file_that_a_layout_does_not_write_is_refused(
    layout, name, style, folders, tmp_path
):
    source = style
    if layout == "peft":
        source = tmp_path / "one.safetensors"
        lycoris(source, "lora")
    with pytest.raises(InvalidOption, match=f"{name} is the name of a file") as error:
        convert(source, tmp_path / name, layout, host=folders["sd"])
    assert error.value.field == "path"
    assert not (tmp_path / name).exists()


def test_what_was_written_is_named_and_folders_may_have_dots(style, folders, tmp_path):
    for layout, name, file in (
        ("kohya", "style-v1.5", "style-v1.5/lora.safetensors"),
        ("diffusers", "style.d", "style.d/pytorch_lora_weights.safetensors"),
        ("kohya", "x.safetensors", "x.safetensors"),
    ):
        done = convert(style, tmp_path / name, layout, host=folders["sd"])
        assert done.out == str(tmp_path / file)
        assert (tmp_path / file).is_file()
    (tmp_path / "old.bin").mkdir()  # a folder that is there is one
    done = convert(style, tmp_path / "old.bin", "kohya", host=folders["sd"])
    assert done.out == str(tmp_path / "old.bin" / "lora.safetensors")


@pytest.mark.parametrize(
    "command", ["inspect {file}", "verify {file}", "merge {base} {file} {out}"]
)
def test_commands_without_an_option_for_it_advise_none(command, folders, tmp_path, capsys):
    file = tmp_path / "style.safetensors"
    lycoris(file, "lora")
    words = command.format(file=file, base=folders["sd"], out=tmp_path / "out")
    assert main(words.split()) == 1
    said = "".join(capsys.readouterr())
    advice = f"`hf-lora probe {file} --for PIPELINE`"
    assert said.count("--for") == said.count(advice) == 1
    assert main(["probe", str(file), "--for", folders["sd"]]) == 0


def test_an_adapter_of_a_language_model_becomes_no_file_of_a_pipeline(tmp_path, folders):
    model = randomise(attach_lora(tiny("llama"), rank=4))
    source = save_lora(model, tmp_path / "adapter")
    for host in (None, folders["sd"]):
        with pytest.raises(AdapterMismatch, match="for a single model, and kohya files are for"):
            convert(source, tmp_path / "out.safetensors", "kohya", host=host)
    convert(source, tmp_path / "copy", "peft")
    fresh = tiny("llama")
    assert load_lora(fresh, tmp_path / "copy").verified
    assert torch.equal(logits(fresh), logits(model))


def test_keys_that_lead_nowhere_stop_it_and_leaving_them_out_is_no_advice(folders, tmp_path):
    made = write(
        tiny_pipeline("sd").unet, "lora", prefix="lora_unet", only=lambda p, _: "attn" in p
    )
    lost = {f"lora_unet_nowhere.lora_{x}.weight": torch.zeros(4, 4) for x in ("down", "up")}
    strange = {"bundle_emb.x": torch.zeros(4)}
    for extra in (lost, strange):
        source = tmp_path / "style.safetensors"
        save_file({**made.tensors, **extra}, source)
        with pytest.raises((AdapterMismatch, BadAdapterFile)) as caught:
            convert(source, tmp_path / "out.safetensors", "diffusers", host=folders["sd"])
        assert next(iter(extra)).partition(".")[0] in str(caught.value)
        assert "strict" not in str(caught.value)


def places(tmp_path, style):
    """Places that hold what is read, each by another name."""
    folder = tmp_path / "folder"
    folder.mkdir()
    os.link(style, folder / "pytorch_lora_weights.safetensors")
    os.symlink(style, tmp_path / "link.safetensors")
    yield style, style
    yield style, tmp_path / "link.safetensors"
    yield style, folder  # a hard link
    yield folder, folder
    yield folder / "pytorch_lora_weights.safetensors", folder


def test_what_is_read_is_never_replaced(style, folders, tmp_path):
    before = style.read_bytes()
    for source, out in places(tmp_path, style):
        with pytest.raises(InvalidOption, match="is where .* is read from, which stays as it is"):
            convert(source, out, "diffusers")
    with pytest.raises(InvalidOption, match="is where"):  # two adapters in one folder
        convert(tmp_path / "folder", tmp_path / "folder", "kohya", host=folders["sd"])
    assert style.read_bytes() == before
    model = save_lora(attach_lora(tiny("llama"), rank=4), tmp_path / "lm")
    with pytest.raises(InvalidOption, match="is where adapter_model.safetensors is read from"):
        convert(model, model, "peft")


def test_a_file_that_reads_back_as_another_replaces_nothing(style, folders, tmp_path, monkeypatch):
    out = tmp_path / "out.safetensors"
    out.write_bytes(b"mine")
    whole = convert.__globals__["write_adapter"]

    def halved(adapter, path, **options):
        """A writer with a fault."""
        made = whole(adapter, path, **options)
        tensors = load_file(made)
        key = next(key for key in tensors if key.endswith("lora_up.weight"))
        save_file({**tensors, key: tensors[key] / 2}, made)
        return made

    monkeypatch.setitem(convert.__globals__, "write_adapter", halved)
    with pytest.raises(BadAdapterFile, match="read back, the file is not the adapter.*is another"):
        convert(style, out, "kohya", host=folders["sd"])
    assert out.read_bytes() == b"mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.safetensors", "style.safetensors"]


def test_places_that_cannot_be_written_are_named(style, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidOption, match="file is a file"):
        convert(style, tmp_path / "file" / "out.safetensors", "diffusers")
    with pytest.raises(InvalidOption, match="unknown layout 'onnx'"):
        convert(style, tmp_path / "out.safetensors", "onnx")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(convert.__globals__, "write_adapter", full)
    with pytest.raises(InvalidOption, match="cannot be written .No space left on device"):
        convert(style, tmp_path / "out.safetensors", "diffusers")


def test_an_old_file_is_replaced_and_folders_are_made(style, tmp_path):
    out = tmp_path / "new" / "deep" / "out.safetensors"
    convert(style, out, "diffusers")
    first = out.read_bytes()
    convert(style, out, "diffusers")
    assert out.read_bytes() == first
    assert [p.name for p in out.parent.iterdir()] == [out.name]
    assert save_adapter(open_adapter(style), tmp_path / "same.safetensors").read_bytes() == first
