"""Files written for kohya's scripts and ComfyUI: what they hold, and what is refused by name."""

import math
from dataclasses import replace

import diffusers
import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hf_lora import attach_lora, load_lora, open_adapter, probe_lora, save_adapter, save_lora
from hf_lora.convert import convert
from hf_lora.errors import BadAdapterFile
from hf_lora.formats.header import trigger_words
from hf_lora.testing import component_output, tiny_pipeline
from tests.support import randomise

QKV = [f"transformer_blocks.0.attn.to_{x}" for x in "qkv"]
FUSED = "lora_unet_double_blocks_0_img_attn_qkv"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of tiny pipelines, of which a conversion reads the configs."""
    root = tmp_path_factory.mktemp("pipelines")
    for kind in ("sd", "flux", "wan"):
        tiny_pipeline(kind).save_pretrained(root / kind)
    return {kind: str(root / kind) for kind in ("sd", "flux", "wan")}


def with_biases(tmp_path, value):
    """A UNet with a bias in its LoRA, and its file."""
    pipe = tiny_pipeline("sd")
    config = peft.LoraConfig(r=4, lora_alpha=3, target_modules=["to_out.0"], lora_bias=True)
    randomise(attach_lora(pipe.unet, config=config))
    for name, parameter in pipe.unet.named_parameters():
        if "lora_B" in name and name.endswith("bias"):
            parameter.data.fill_(value)
    return pipe, save_lora(pipe, tmp_path / "bias.safetensors")


@pytest.mark.parametrize("layout", ["kohya", "comfyui"])
def test_a_bias_that_no_other_program_reads_is_refused_by_name(layout, tmp_path):
    pipe, file = with_biases(tmp_path, 0.5)
    with pytest.raises(
        BadAdapterFile, match=r"to_out.0 has a bias of its own .lora_bias=True"
    ) as error:
        save_adapter(open_adapter(file), tmp_path / "out.safetensors", layout=layout, host=pipe)
    assert error.value.field == "lora_bias"
    assert not (tmp_path / "out.safetensors").exists()


def test_biases_of_zero_are_left_away(folders, tmp_path):
    pipe, file = with_biases(tmp_path, 0)
    done = convert(file, tmp_path / "out.safetensors", "kohya", host=folders["sd"])
    assert "the update is the same" in done.checked
    assert not [key for key in load_file(tmp_path / "out.safetensors") if "bias" in key]
    fresh = tiny_pipeline("sd")
    load_lora(fresh, tmp_path / "out.safetensors")
    assert torch.equal(component_output(fresh.unet), component_output(pipe.unet))


# ------------------------------------------------------------ layers that are one there


def flux_file(path, dtype, *, shared, alphas=(None, None, None)):
    """q, k and v of a block in a dtype, and their updates one below the other in float64."""
    pipe = tiny_pipeline("flux")
    made = torch.Generator().manual_seed(0)
    tensors, updates = {}, []
    a = torch.randn(2, pipe.transformer.get_submodule(QKV[0]).in_features, generator=made).to(dtype)
    for name, alpha in zip(QKV, alphas, strict=True):
        layer = pipe.transformer.get_submodule(name)
        if not shared:
            a = torch.randn(2, layer.in_features, generator=made).to(dtype)
        b = torch.randn(layer.out_features, 2, generator=made).to(dtype)
        tensors[f"transformer.{name}.lora_A.weight"] = a.clone()
        tensors[f"transformer.{name}.lora_B.weight"] = b
        if alpha is not None:
            tensors[f"transformer.{name}.alpha"] = torch.tensor(alpha, dtype=torch.float64)
        scaling = 1 if alpha is None else alpha / 2
        updates.append(scaling * (b.double() @ a.double()))
    save_file(tensors, path)
    return pipe, torch.cat(updates)


def fused_update(path):
    """The update of the one layer as other programs compute it, in float64."""
    held = load_file(path)
    a, b = held[f"{FUSED}.lora_down.weight"], held[f"{FUSED}.lora_up.weight"]
    return float(held[f"{FUSED}.alpha"]) / len(a) * (b.double() @ a.double()), b.dtype


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "float16"])
@pytest.mark.parametrize(
    ("shared", "alphas"),
    [(True, (None,) * 3), (False, (None,) * 3), (False, (3.0, 6.0, 12.0)), (True, (3.0, 3.0, 3.0))],
)
def test_narrow_factors_are_joined_to_the_last_bit(dtype, shared, alphas, tmp_path):
    dtype = getattr(torch, dtype)
    file, out = tmp_path / "narrow.safetensors", tmp_path / "out.safetensors"
    pipe, wanted = flux_file(file, dtype, shared=shared, alphas=alphas)
    adapter = open_adapter(file, host=pipe)
    save_adapter(adapter, out, layout="kohya", host=pipe)
    found, held = fused_update(out)
    assert held == dtype
    torch.testing.assert_close(found, wanted, rtol=1e-14, atol=0)  # a product in another order
    back = open_adapter(out, host=pipe).components["transformer"]
    for path in QKV:
        here, there = adapter.components["transformer"].targets[path], back.targets[path]
        assert torch.equal(here["lora_A"].float(), there["lora_A"].float())
    load_lora(tiny_pipeline("flux"), out)


def test_a_product_that_a_narrow_dtype_cannot_hold_is_refused(tmp_path):
    file = tmp_path / "narrow.safetensors"
    pipe, _ = flux_file(file, torch.float8_e4m3fn, shared=False, alphas=(1.0, 512.0, 1.0))
    with pytest.raises(BadAdapterFile, match="multiplied by 512, which float8_e4m3fn values"):
        save_adapter(open_adapter(file, host=pipe), tmp_path / "o", layout="kohya", host=pipe)
    assert not (tmp_path / "o").exists()


def test_parts_of_different_dtypes_are_not_rounded_to_one(tmp_path):
    file, out = tmp_path / "mixed.safetensors", tmp_path / "out.safetensors"
    pipe, _ = flux_file(file, torch.float32, shared=False)
    tensors = load_file(file)
    first = f"transformer.{QKV[0]}.lora_A.weight"
    tensors[first] = tensors[first].half()
    save_file(tensors, file)
    save_adapter(open_adapter(file, host=pipe), out, layout="kohya", host=pipe)
    rows = [tensors[f"transformer.{p}.lora_{x}.weight"].double() for p in QKV for x in "BA"]
    wanted = torch.cat([b @ a for b, a in zip(rows[::2], rows[1::2], strict=True)])
    torch.testing.assert_close(fused_update(out)[0], wanted, rtol=1e-14, atol=0)  # other order


@pytest.mark.parametrize(
    ("fields", "scaling"),
    [
        ({"r": 4, "lora_alpha": 0.7}, 0.7 / 4),
        ({"r": 3, "lora_alpha": 1}, 1 / 3),
        ({"r": 8, "lora_alpha": 16, "use_rslora": True}, 16 / 8**0.5),
        ({"r": 4, "lora_alpha": 0.7, "use_rslora": True}, 0.7 / 4**0.5),
    ],
)
def test_scalings_of_joined_layers_stay_to_the_last_bit(fields, scaling, folders, tmp_path):
    pipe = tiny_pipeline("flux")
    config = peft.LoraConfig(target_modules=["to_q", "to_k", "to_v"], **fields)
    randomise(attach_lora(pipe.transformer, config=config))
    file, out = save_lora(pipe, tmp_path / "style.safetensors"), tmp_path / "out.safetensors"
    convert(file, out, "kohya", host=folders["flux"])
    held = load_file(out)
    alphas = {key: float(t) for key, t in held.items() if key.endswith("_qkv.alpha")}
    assert len(alphas) == 2
    for key, alpha in alphas.items():
        down = held[key.replace(".alpha", ".lora_down.weight")]
        assert len(down) == 3 * fields["r"]
        # divided by 12, no float64 gives some of these
        assert math.isclose(alpha / len(down), scaling, rel_tol=2**-52)


# ------------------------------------------------------------ which denoiser


@pytest.mark.parametrize("layout", ["kohya", "comfyui"])
def test_the_second_transformer_alone_gets_the_names_of_the_first(layout, folders, tmp_path):
    pipe = tiny_pipeline("wan")
    randomise(attach_lora(pipe.transformer_2, rank=2, alpha=3))
    file, out = save_lora(pipe, tmp_path / "low.safetensors"), tmp_path / "out.safetensors"
    done = convert(file, out, layout, host=folders["wan"])
    assert done.digest == done.digest_before
    assert any("load_lora(pipe.transformer_2, ...)" in words for words in done.not_carried)
    start = {"kohya": "lora_unet_blocks_", "comfyui": "diffusion_model.blocks."}[layout]
    assert all(key.startswith(start) for key in load_file(out))
    fresh = tiny_pipeline("wan")
    load_lora(fresh.transformer_2, out)
    wanted = component_output(pipe.transformer_2)
    assert torch.equal(component_output(fresh.transformer_2), wanted)


def test_both_transformers_want_a_file_each_and_the_error_says_how(tmp_path):
    pipe = tiny_pipeline("wan")
    for part in (pipe.transformer, pipe.transformer_2):
        randomise(attach_lora(part, rank=2, alpha=3))
    adapter = open_adapter(save_lora(pipe, tmp_path / "both.safetensors"))
    with pytest.raises(BadAdapterFile, match="the same names for transformer, transformer_2") as e:
        save_adapter(adapter, tmp_path / "out.safetensors", layout="comfyui", host=pipe)
    assert "replace(adapter, components={name: adapter.components[name]})" in e.value.fix
    for name in adapter.components:
        one = replace(adapter, components={name: adapter.components[name]})
        file = tmp_path / f"{name}.safetensors"
        save_adapter(one, file, layout="comfyui", host=pipe)
        fresh = tiny_pipeline("wan")
        load_lora(getattr(fresh, name), file)
        wanted = component_output(getattr(pipe, name))
        assert torch.equal(component_output(getattr(fresh, name)), wanted)


def animated(pipe):
    """An AnimateDiff pipeline around the UNet of SD1."""
    unet = diffusers.UNetMotionModel.from_unet2d(pipe.unet)
    return diffusers.AnimateDiffPipeline(
        vae=pipe.vae, text_encoder=pipe.text_encoder, tokenizer=pipe.tokenizer, unet=unet,
        motion_adapter=None, scheduler=pipe.scheduler,
    )  # fmt: skip


@pytest.mark.parametrize("layout", ["kohya", "comfyui"])
def test_a_motion_model_gets_the_names_of_its_unet(layout, tmp_path):
    plain = tiny_pipeline("sd")
    moving = animated(plain)
    config = peft.LoraConfig(r=4, target_modules=r".*\.attentions\..*attn1\.to_q")
    randomise(attach_lora(moving.unet, config=config))
    randomise(attach_lora(moving.text_encoder, rank=4, alpha=3, targets="attention"))
    adapter = open_adapter(save_lora(moving, tmp_path / "style.safetensors"))
    written = []
    for host in (moving, tiny_pipeline("sd")):
        save_adapter(adapter, tmp_path / "out.safetensors", layout=layout, host=host)
        written.append(sorted(load_file(tmp_path / "out.safetensors")))
    assert written[0] == written[1]
    assert any(key.startswith("lora_te_text_model_encoder_") for key in written[0])
    fresh = tiny_pipeline("sd")
    load_lora(fresh, tmp_path / "out.safetensors")


def test_motion_modules_have_no_names_there(tmp_path):
    moving = animated(tiny_pipeline("sd"))
    config = peft.LoraConfig(r=4, target_modules=r".*(motion_modules|attentions)\..*attn1\.to_q")
    randomise(attach_lora(moving.unet, config=config))
    adapter = open_adapter(save_lora(moving, tmp_path / "style.safetensors"))
    with pytest.raises(BadAdapterFile, match="layers are of motion modules .*motion_modules"):
        save_adapter(adapter, tmp_path / "out.safetensors", layout="kohya", host=moving)


# ------------------------------------------------------------ the header


def test_hashes_of_other_bytes_are_not_carried_over(folders, tmp_path):
    said = {
        "sshs_model_hash": "aa", "sshs_legacy_hash": "bb", "modelspec.hash_sha256": "0xcc",
        "ss_new_sd_model_hash": "dd", "modelspec.title": "Style",
    }  # fmt: skip
    file = tmp_path / "style.safetensors"
    plain = {}
    for x, rows in (("down", (4, 64)), ("up", (64, 4))):
        key = f"lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q.lora_{x}.weight"
        plain[key] = torch.ones(rows)
    save_file(plain, file, metadata=said)
    for layout in ("kohya", "comfyui", "diffusers", "peft"):
        out = tmp_path / (layout if layout == "peft" else f"{layout}.safetensors")
        convert(file, out, layout, host=folders["sd"])
        with safe_open(out / "adapter_model.safetensors" if out.is_dir() else out, "pt") as held:
            kept = {key: held.metadata().get(key) for key in said}
        assert kept == {**dict.fromkeys(list(said)[:3]), **dict(list(said.items())[3:])}, layout


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ({"modelspec.trigger_phrase": "None"}, ()),
        ({"modelspec.trigger_phrase": "ohwx man,  None,,a, a"}, ("ohwx man", "a")),
        ({"modelspec.trigger_phrase": "null", "trained_words": "ohwx man"}, ("ohwx man",)),
        ({"trained_words": '["ohwx, man", " b ", ""]'}, ("ohwx, man", "b")),
        ({"trained_words": "[b, c"}, ("[b", "c")),
        ({"trained_words": "[]"}, ()),
        ({"trained_words": "[1, [2]]"}, ("[1", "[2]]")),
        ({}, ()),
    ],
)
def test_trigger_words_are_the_same_wherever_they_are_told(header, words, tmp_path):
    assert trigger_words(header) == words
    pipe = tiny_pipeline("sd")
    tensors = {}
    for x, rows in (("down", (4, 64)), ("up", (64, 4))):
        key = f"lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q.lora_{x}.weight"
        tensors[key] = torch.ones(rows)
    file = tmp_path / "style.safetensors"
    save_file(tensors, file, metadata=header or None)
    assert open_adapter(file, host=pipe).manifest.trigger_words == words
    assert probe_lora(file, pipe).trigger_words == words
