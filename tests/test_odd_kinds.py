"""Adapters and hosts that are rare: judged by plain peft, which loads the same files."""

import json
import warnings

import peft
import pytest
import torch
from torch import nn

from hf_lora import attach_lora, detach_lora, load_lora, open_adapter, save_adapter, save_lora
from hf_lora.adapter import MODEL, Adapter, Component
from hf_lora.errors import BadAdapterFile, InvalidOption, LoraError, UnsupportedTarget
from hf_lora.testing import tiny, tiny_pipeline
from tests.format_reader import digest as digest_by_the_page
from tests.format_reader import read_adapter as read_by_the_page
from tests.support import assert_same, logits, randomise, snapshot, tuner_layers

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def foreign(model, folder, **fields):
    """Saves what plain peft makes of a config; returns the folder and the outputs."""
    wrapped = randomise(peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=4, **fields)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft says that it saves a targeted embedding as well
        wrapped.save_pretrained(folder)
    return folder, logits(wrapped.base_model.model)


class Blocks(nn.Module):
    """Layers that take a LoRA, in repeated blocks."""

    def __init__(self, *layers):
        super().__init__()
        self.blocks = nn.ModuleList(layers)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def test_alpha_of_a_parameter_is_part_of_the_identity(tmp_path):
    folder, _ = foreign(
        tiny("qwen3_moe"), tmp_path / "a", target_modules=[], target_parameters=EXPERTS
    )
    first = open_adapter(folder)
    assert first.info["components"][MODEL]["rank"] == {4: 4}
    assert first.info["components"][MODEL]["scaling"] == [1.0]
    config = json.loads((folder / "adapter_config.json").read_text())
    config["alpha_pattern"] = {"mlp.experts.down_proj": 64}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    other = open_adapter(folder)
    assert other.digest != first.digest
    assert other.digest == digest_by_the_page(read_by_the_page(folder).components)


def test_a_copy_of_the_base_is_no_part_of_the_identity(tmp_path):
    folder, outputs = foreign(
        tiny("llama"), tmp_path / "a", target_modules=["q_proj", "embed_tokens"]
    )
    assert any("base_layer" in n for n, _ in open_adapter(folder).components[MODEL].tensors())
    host = tiny("llama")
    report = load_lora(host, folder)
    assert torch.equal(logits(host), outputs)
    again = open_adapter(save_lora(host, tmp_path / "b"))
    assert again.digest == report.digest
    assert report.digest == digest_by_the_page(read_by_the_page(folder).components)


@pytest.mark.parametrize("first", ["tokens", "plain"])
def test_new_tokens_and_another_adapter_stand_side_by_side(first, tmp_path):
    folders = {
        "tokens": foreign(
            tiny("llama"), tmp_path / "t", target_modules=["q_proj"], trainable_token_indices=[3, 5]
        ),
        "plain": foreign(tiny("llama"), tmp_path / "p", target_modules=["q_proj", "v_proj"]),
    }
    second = "plain" if first == "tokens" else "tokens"
    host = tiny("llama")
    for name in (first, second):
        load_lora(host, folders[name][0], name=name, extra_modules=True)
    assert torch.equal(logits(host), folders[second][1])
    for name in (first, second):
        saved = open_adapter(save_lora(host, tmp_path / f"{name}.again", name=name))
        assert saved.digest == open_adapter(folders[name][0]).digest


def test_a_host_that_stores_one_byte_floats_is_saved_and_loaded(tmp_path):
    def denoiser():
        model = tiny_pipeline("flux").transformer
        model.enable_layerwise_casting(
            storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16
        )
        return model

    folder = save_lora(randomise(attach_lora(denoiser())), tmp_path / "a")
    host = denoiser()
    assert load_lora(host, folder).dtype == "float32"
    again = open_adapter(save_lora(host, tmp_path / "b"))
    assert again.digest == open_adapter(folder).digest


def test_pefts_lora_on_multihead_attention_is_refused_by_name(tmp_path):
    def model():
        torch.manual_seed(0)
        return Blocks(nn.TransformerEncoderLayer(16, 2, 32))

    config = peft.LoraConfig(r=2, target_modules=["blocks.0.self_attn"])
    wrapped = peft.get_peft_model(model(), config)
    wrapped.save_pretrained(tmp_path / "a")
    host = model()
    before = snapshot(host)
    with pytest.raises(UnsupportedTarget, match="MultiheadAttention"):
        load_lora(host, tmp_path / "a")
    assert_same(before, snapshot(host))
    for step in (lambda: save_lora(wrapped, tmp_path / "b"), lambda: detach_lora(wrapped)):
        with pytest.raises(LoraError):
            step()
    assert not (tmp_path / "b").exists()


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd")
def test_a_grouped_convolution_is_saved_and_read_by_peft(tmp_path):
    def model():
        torch.manual_seed(0)
        return Blocks(nn.Conv2d(4, 8, 3, groups=2), nn.Conv2d(8, 4, 1))

    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    config = peft.LoraConfig(r=4, target_modules=["blocks.0", "blocks.1"])
    ours = randomise(attach_lora(model(), config=config))
    folder = save_lora(ours, tmp_path / "a")
    theirs = peft.PeftModel.from_pretrained(model(), folder)
    host = model()
    load_lora(host, folder)
    with torch.no_grad():
        assert torch.equal(theirs(x), ours(x))
        assert torch.equal(host(x), ours(x))


def test_loading_inside_inference_mode_is_refused(tmp_path):
    folder, _ = foreign(tiny("llama"), tmp_path / "a", target_modules=["q_proj"])
    host = tiny("llama")
    with torch.inference_mode(), pytest.raises(InvalidOption, match="inference_mode"):
        load_lora(host, folder)
    assert not tuner_layers(host)


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda a, d: load_lora(tiny("llama"), a, scale=10**400), InvalidOption),
        (lambda a, d: load_lora(tiny("llama"), Adapter({})), BadAdapterFile),
        (lambda a, d: save_adapter(a, f"{d}/a\0b"), InvalidOption),
        (lambda a, d: save_adapter(a, d, layout=["peft"]), InvalidOption),
        (lambda a, d: save_adapter(_with(a, alpha_pattern={5: 3}), d), BadAdapterFile),
        (lambda a, d: save_adapter(_with(a, lora_alpha=None), d), BadAdapterFile),
        (lambda a, d: load_lora(tiny("llama"), _with(a, alpha_pattern={5: 3})), BadAdapterFile),
    ],
)
def test_what_cannot_be_is_refused_in_words(make, error, tmp_path):
    folder, _ = foreign(tiny("llama"), tmp_path / "a", target_modules=["q_proj"])
    with pytest.raises(error) as caught:
        make(open_adapter(folder), tmp_path / "out")
    assert caught.value.fact
    assert not (tmp_path / "out").exists()


def _with(adapter, **fields):
    part = adapter.components[MODEL]
    return Adapter({MODEL: Component({**part.config, **fields}, part.targets)})


def test_a_config_of_pefts_own_making_is_an_adapters(tmp_path):
    """`to_dict` holds an enum where a file holds a text."""
    folder, outputs = foreign(tiny("llama"), tmp_path / "a", target_modules=["q_proj"])
    fields = peft.LoraConfig.from_pretrained(folder).to_dict() | {"target_modules": ["q_proj"]}
    adapter = _with(open_adapter(folder), **fields)
    assert adapter.components[MODEL].kind == "LORA"
    host = tiny("llama")
    load_lora(host, save_adapter(adapter, tmp_path / "b"))
    assert torch.equal(logits(host), outputs)


def test_a_pipelines_file_does_not_take_a_models_name(tmp_path):
    pipe = tiny_pipeline("sd")
    attach_lora(pipe.unet, targets="attention")
    with pytest.raises(InvalidOption, match="a model's adapter"):
        save_lora(pipe, tmp_path / "adapter_model.safetensors")
    assert not list(tmp_path.iterdir())


def test_saving_removes_no_file_of_somebody_else(tmp_path):
    (tmp_path / ".hf_lora.toml").write_text("mine")
    (tmp_path / ".hf_lora.cache").mkdir()
    (tmp_path / ".hf_lora.0123456789abcdef").write_text("left by a killed writer")
    save_lora(attach_lora(tiny("llama")), tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        ".hf_lora.cache", ".hf_lora.toml", "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip
