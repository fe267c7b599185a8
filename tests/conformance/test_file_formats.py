"""Files of other programs load exactly, and other programs load ours: the judges are theirs.

What loads, and how exactly, is the table of docs/file-formats.md, which is measured anew here, cell
by cell.
"""

import logging
import re

import peft
import pytest
import torch
from lycoris.wrapper import LycorisNetwork, create_lycoris, create_lycoris_from_weights
from safetensors.torch import load_file

from hf_lora import LoraError, load_lora, open_adapter, save_adapter, save_lora
from hf_lora.testing import component_output, tiny_pipeline
from tests import lycoris_files as lycoris
from tests.conformance import foreign_page as page
from tests.conformance.foreign_files import (
    HOSTS,
    KINDS,
    Made,
    bare_outputs,
    difference,
    merged_outputs,
    names_in,
    outputs,
    pipeline,
    view,
)
from tests.conformance.foreign_rows import (
    ROWS,
    always,
    config_of,
    kohya,
    of_lycoris,
    one,
    randomised,
)

CASES = [(row, kind) for row in ROWS for kind in row.cells]

pytestmark = [
    # LyCORIS makes scalars of tensors that want a gradient
    pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True"),
]


@pytest.fixture(autouse=True)
def _quiet():
    loggers = [logging.getLogger(name) for name in ("LyCORIS", "diffusers", "transformers")]
    levels = [logger.level for logger in loggers]
    page.quiet()
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


@pytest.fixture(scope="module")
def said():
    """The cells of the committed page."""
    return page.cells_of(page.generated())


@pytest.mark.parametrize(("row", "kind"), CASES, ids=lambda x: x if isinstance(x, str) else x.title)
def test_files_load_as_the_page_says(row, kind, said, tmp_path):
    found = {}
    for name, text in said[row.title][kind].items():
        if name not in row.cells[kind]:
            assert text == page.NONE
            continue
        (tmp_path / name).mkdir()
        value = page.measured(row, kind, HOSTS[name], tmp_path / name)
        found[name] = (value, text)
        if isinstance(value, str) or not value or text == "0":
            assert page.shown(value) == text, name  # a refusal, or equal to the last bit
        else:
            # other processors sum in another order
            assert value <= page.BAR, name
            assert float(text) / 10 <= value <= float(text) * 10, name
    assert len(found) == len(row.cells[kind])


def test_the_tables_of_the_page_are_generated(said):
    assert page.generated() == f"\n{page.block(said)}"


# Its options as its own training scripts pass them -> the kind of every layer.
NETWORKS = {
    "LoRA": {"algo": "lora", "preset": "full-lin"},
    "LoCon": {"algo": "locon"},
    "LoCon with Tucker cores": {"algo": "locon", "use_tucker": True},
    "LoHa": {"algo": "loha"},
    "LoHa with Tucker cores": {"algo": "loha", "use_tucker": True},
    "LoKr": {"algo": "lokr"},
    "LoKr, factor 8": {"algo": "lokr", "factor": 8},
    "LoKr with Tucker cores": {"algo": "lokr", "use_tucker": True},
    "LoKr of both": {"algo": "lokr", "decompose_both": True},
    "DoRA": {"algo": "locon", "dora_wd": True},
}


@pytest.mark.parametrize("name", NETWORKS)
def test_what_a_network_of_lycoris_saves_computes_what_the_network_does(name, tmp_path):
    theirs, ours = tiny_pipeline("sd"), tiny_pipeline("sd")
    rank, alpha, conv_rank, conv_alpha = 3, 5, 2, 3
    network = create_lycoris(
        theirs.unet, 1.0, rank, alpha, conv_dim=conv_rank, conv_alpha=conv_alpha, **NETWORKS[name]
    )
    lycoris_values(network.loras)
    network.apply_to()
    file = tmp_path / "style.safetensors"
    network.save_weights(file, torch.float32, {"ss_network_module": "lycoris.kohya"})
    wanted = component_output(theirs.unet)
    report = load_lora(ours, file)
    assert report.targets == len(network.loras)
    assert difference(wanted, bare_outputs("sd")["unet"]) > 0.01
    assert difference(component_output(ours.unet), wanted) <= page.BAR


@torch.no_grad()
def lycoris_values(modules):
    """Random values in every factor; magnitudes stay near those of the weights."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in torch.nn.ModuleList(modules).named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        size = 0.2 if "hada" in name else 0.06
        near = parameter * (1 + 0.1 * noise.clamp(-2, 2))
        parameter.copy_(near if "dora" in name else noise * size)


def adapted(host, kind="LoRA", convs=False, **fields):
    """A tiny pipeline with adapters of plain peft on its denoiser and text encoders."""
    pipe = tiny_pipeline(host.pipeline)
    for seed, part in enumerate((host.denoiser, *host.texts)):
        config = config_of(host, part, "conv" if convs and host.convs else kind)
        for field, value in fields.items():
            setattr(config, field, value)
        getattr(pipe, part).add_adapter(config)
        randomised(getattr(pipe, part), seed)
    return pipe


@pytest.mark.parametrize("name", HOSTS)
def test_our_diffusers_files_load_in_plain_diffusers_to_the_last_bit(name, tmp_path):
    pipe = adapted(HOSTS[name], convs=True)
    save_lora(pipe, tmp_path)
    theirs = tiny_pipeline(HOSTS[name].pipeline)
    theirs.load_lora_weights(str(tmp_path))
    assert equal(outputs(theirs), outputs(pipe))


def equal(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


# What plain diffusers 0.42.1 converts of kohya's files, on layers of every size. It reads none of
# SD3, and of Flux's single blocks it asks for the width of the public model.
CONVERTED = {
    "SD1": r".*\.(to_[qkv]|to_out\.0|net\.2|proj_in|conv[12]|conv|time_emb_proj)",
    "SDXL": r".*\.(to_[qkv]|to_out\.0|net\.2|proj_in|conv[12]|conv|time_emb_proj)",
    "Flux": r"transformer_blocks\..*(to_[qkv]|add_\w_proj|out\.0|net\.2|norm1\.linear)"
    r"|single_transformer_blocks\.\d\.(proj_out|norm\.linear)",
    "Flux2": r".*transformer_blocks\..*(to_[qkv]|out\.0|add_\w_proj|to_qkv_mlp_proj|linear_in)",
    "Wan": r"blocks\..*(to_[qkv]|to_out\.0|ffn\.net\.0\.proj|ffn\.net\.2)",
    "Qwen-Image": r"transformer_blocks\..*(to_[qkv]|to_out\.0|img_mod\.1|txt_mlp\.net\.2)",
}
CLIP = r".*\.(q_proj|k_proj|v_proj|out_proj|fc1)"


@pytest.mark.parametrize("alpha", [6, 5])
@pytest.mark.parametrize("name", CONVERTED)
def test_our_kohya_files_load_in_plain_diffusers(name, alpha, tmp_path):
    host = HOSTS[name]
    pipe = tiny_pipeline(host.pipeline)
    for seed, part in enumerate((host.denoiser, *host.texts)):
        targets = CLIP if part in host.texts else CONVERTED[name]
        # every layer one alpha, see test_faults
        config = peft.LoraConfig(r=3, lora_alpha=alpha, target_modules=targets)
        getattr(pipe, part).add_adapter(config)
        randomised(getattr(pipe, part), seed)
    file = save_adapter(
        open_adapter(save_lora(pipe, tmp_path / "own.safetensors")),
        tmp_path / "kohya.safetensors",
        layout="kohya",
        host=pipe,
    )
    theirs = tiny_pipeline(host.pipeline)
    theirs.load_lora_weights(str(file))
    found, wanted = outputs(theirs), outputs(pipe)
    assert difference(wanted[host.denoiser], bare_outputs(host.pipeline)[host.denoiser]) > 0.01
    if name in ("SD1", "SDXL") or alpha == 6:
        assert equal(found, wanted)
    else:
        # it multiplies A by alpha/rank, which rounds where that is no power of two
        assert max(difference(found[part], wanted[part]) for part in wanted) <= page.BAR


READ_AGAIN = [(name, kind) for name in HOSTS for kind in KINDS
              if (kind not in ("conv", "Tucker") or HOSTS[name].convs)
              and kind != "LoKr on fused layers"]  # fmt: skip


@pytest.mark.parametrize(("name", "kind"), READ_AGAIN)
def test_our_kohya_files_are_read_by_lycoris(name, kind, tmp_path, monkeypatch):
    host, native = HOSTS[name], name != "SD1"  # sd-scripts trains SD1 on diffusers' UNet
    make = of_lycoris(one("lora_unet"), native=lambda host: native, texts=False)
    theirs, wanted = make(host, kind, tmp_path)
    pipe = pipeline(host.pipeline)
    try:
        adapter = open_adapter(theirs, host=pipe)
        file = save_adapter(adapter, tmp_path / "k.safetensors", layout="kohya", host=pipe)
    except LoraError as error:
        pytest.fail(str(error))
    assert load_file(theirs).keys() == load_file(file).keys() | {
        key
        for key in load_file(theirs)
        if "lora_mid" in key  # the core is in A now
    }
    monkeypatch.setattr(LycorisNetwork, "LORA_PREFIX", "lora_unet")
    model = getattr(pipe, host.denoiser)
    names = names_in(host, native=native, convs=True)[host.denoiser]
    network, _ = create_lycoris_from_weights(1.0, str(file), view(model, names))
    flat = {f"lora_unet_{n}".replace(".", "_"): n for n in names}
    modules = {flat[module.lora_name]: module for module in network.loras}
    assert len(modules) == len({key.partition(".")[0] for key in load_file(file)})
    again = Made(lycoris.Written({}, modules, {}), {n: names[n] for n in modules})
    weights = {host.denoiser: again.weights(model, again.written.weight)}
    found = merged_outputs(host, weights)
    assert max(difference(found[part], wanted[part]) for part in wanted) <= page.BAR


def test_a_lokr_on_fused_layers_loads_where_the_host_has_fused_them_too(tmp_path):
    host = HOSTS["Flux2"]
    make = of_lycoris(kohya, native=always)
    file, wanted = make(host, "LoKr on fused layers", tmp_path)
    pipe = tiny_pipeline(host.pipeline)
    with pytest.raises(LoraError, match=re.escape("apart on the host")):
        load_lora(pipe, file)
    pipe.transformer.fuse_qkv_projections()
    load_lora(pipe, file)
    assert difference(component_output(pipe.transformer), wanted["transformer"]) <= page.BAR
