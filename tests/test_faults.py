"""What plain diffusers 0.42.1 does wrong with LoRA files, done right: one test a fault.

The numbers are the rows of the list of measured faults, in its order; tests/test_pipelines.py has
those of merging, strengths and devices. Judges are what trained or made the files: plain peft, the
modules of LyCORIS, or the update in float64.
"""

import copy
import logging

import peft
import pytest
import torch
from diffusers.utils import convert_state_dict_to_kohya
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from hf_lora import (
    AdapterMismatch,
    BadAdapterFile,
    load_lora,
    open_adapter,
    save_adapter,
    save_lora,
    set_adapters,
)
from hf_lora.hosts import parts_of
from hf_lora.testing import component_output, tiny_pipeline
from tests import lycoris_files as lycoris
from tests.conformance.foreign_files import (
    HOSTS,
    bare_outputs,
    difference,
    made,
    merged_outputs,
    outputs,
    pipeline,
)
from tests.conformance.foreign_page import BAR
from tests.conformance.foreign_rows import kohya, of_lycoris, randomised
from tests.support import assert_same, snapshot

SD1, FLUX = HOSTS["SD1"], HOSTS["Flux"]
RANK, ALPHA = 4, 8
UNET, TEXT = ["to_q", "to_v", "conv1"], ["q_proj", "v_proj", "fc1"]


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    monkeypatch.setattr(logging.getLogger("LyCORIS"), "level", logging.ERROR)


def trained(kind="sd", parts=("unet", "text_encoder")):
    """A pipeline with an adapter of plain peft, alpha twice the rank."""
    pipe = tiny_pipeline(kind)
    for seed, part in enumerate(parts):
        targets = TEXT if part.startswith("text") else UNET
        config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets)
        getattr(pipe, part).add_adapter(config)
        randomised(getattr(pipe, part), seed)
    return pipe


def state(pipe):
    return {name: snapshot(part) for name, part in parts_of(pipe).items()}


def assert_untouched(before, pipe):
    for name, after in state(pipe).items():
        assert_same(before[name], after)


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


def assert_near(ours, theirs, part="unet"):
    """Equal but for the order of sums, in every component, and `part` does something."""
    assert difference(theirs[part], bare_outputs("sd")[part]) > 1e-2
    for name in theirs:
        assert difference(ours[name], theirs[name]) <= BAR, name


def peft_folder(model, folder, targets, **fields):
    """A folder that plain peft wrote of one model, and what that model computes."""
    model = copy.deepcopy(model)
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets, **fields)
    randomised(peft.get_peft_model(model, config), 0).save_pretrained(folder)
    return component_output(model)


def kohya_file(folder, kind="LoRA", edit=lambda tensors: tensors, metadata=None):
    """A file of LyCORIS in kohya's spelling for SD1, changed, and what it was to give before."""
    file, wanted = of_lycoris(kohya, native=lambda host: False)(SD1, kind, folder)
    save_file(edit(load_file(file)), file, metadata=metadata)
    return file, wanted


def test_row_1_alpha_survives_a_save_and_its_absence_is_said(tmp_path):
    pipe = trained()
    save_lora(pipe, tmp_path / "ours")
    ours = tiny_pipeline("sd")
    load_lora(ours, tmp_path / "ours")
    assert_equal(outputs(ours), outputs(pipe))
    layers = {f"{n}_lora_layers": get_peft_model_state_dict(m) for n, m in parts_of(pipe).items()}
    pipe.save_lora_weights(tmp_path / "theirs", **layers)  # as the fault has it: no metadata
    report = load_lora(tiny_pipeline("sd"), tmp_path / "theirs")
    assert any("states no alpha" in line for line in report.repairs)


@pytest.mark.parametrize(("row", "host"), [(2, SD1), (3, FLUX)], ids=["row 2", "row 3"])
def test_rows_2_and_3_a_peft_folder_loads_into_a_pipeline(row, host, tmp_path):
    targets = UNET if row == 2 else ["to_q", "proj_mlp"]
    wanted = peft_folder(getattr(pipeline(host.pipeline), host.denoiser), tmp_path, targets)
    pipe = tiny_pipeline(host.pipeline)
    report = load_lora(pipe, tmp_path)
    assert report.components.keys() == {host.denoiser}
    bare = bare_outputs(host.pipeline)
    assert_equal(outputs(pipe), {**bare, host.denoiser: wanted})
    assert not torch.equal(wanted, bare[host.denoiser])


def test_row_4_the_config_beside_a_peft_file_is_read(tmp_path):
    wanted = peft_folder(pipeline("sd").unet, tmp_path, UNET, alpha_pattern={"conv1": 3})
    pipe = tiny_pipeline("sd")
    load_lora(pipe.unet, tmp_path / "adapter_model.safetensors")
    assert torch.equal(component_output(pipe.unet), wanted)
    layer = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    assert layer.scaling["default"] == ALPHA / RANK


def test_row_4_without_its_config_a_peft_file_is_refused(tmp_path):
    peft_folder(pipeline("sd").unet, tmp_path, UNET)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "style.safetensors")
    pipe = tiny_pipeline("sd")
    before = state(pipe)
    with pytest.raises(Exception, match="no config, so alpha is not known"):
        load_lora(pipe, tmp_path / "style.safetensors")
    assert_untouched(before, pipe)


@pytest.mark.parametrize("whole", [True, False], ids=["pipeline", "component"])
def test_row_5_what_save_lora_adapter_writes_loads_again(whole, tmp_path):
    theirs = trained(parts=("unet",))
    theirs.unet.save_lora_adapter(tmp_path)
    pipe = tiny_pipeline("sd")
    load_lora(pipe if whole else pipe.unet, tmp_path)
    assert_equal(outputs(pipe), outputs(theirs))


def test_row_8_a_file_of_another_family_is_refused(tmp_path):
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["to_q"])
    flux = tiny_pipeline("flux")
    flux.transformer.add_adapter(config)
    flux.save_lora_weights(
        tmp_path, transformer_lora_layers=get_peft_model_state_dict(flux.transformer)
    )
    pipe = tiny_pipeline("sd")
    before = state(pipe)
    with pytest.raises(AdapterMismatch, match="for transformer as well.* has unet, text_encoder"):
        load_lora(pipe, tmp_path)
    assert_untouched(before, pipe)
    assert pipe.get_list_adapters() == {}


def test_row_9_unknown_modules_are_an_error_or_in_the_report(tmp_path):
    def renamed(tensors):
        return {key.replace("mid_block", "mid_blocc"): tensor for key, tensor in tensors.items()}

    file, wanted = kohya_file(tmp_path, edit=renamed)
    pipe = tiny_pipeline("sd")
    before = state(pipe)
    found = "2 of its 6 modules that begin with lora_unet_ have no place in UNet2DConditionModel"
    with pytest.raises(AdapterMismatch, match=f"{found}: lora_unet_mid_blocc_.*Closest"):
        load_lora(pipe, file)
    assert_untouched(before, pipe)
    report = load_lora(pipe, file, strict=False)
    assert sorted(report.skipped) == sorted(key for key in load_file(file) if "mid_blocc" in key)
    assert not torch.equal(component_output(pipe.unet), wanted["unet"])
    assert_equal({"text_encoder": component_output(pipe.text_encoder)},
                 {"text_encoder": wanted_text(file)})  # fmt: skip


def wanted_text(file):
    """What a file gives the text encoder alone."""
    alone = tiny_pipeline("sd")
    load_lora(alone.text_encoder, file, strict=False)
    return component_output(alone.text_encoder)


def test_row_11_an_adapter_takes_the_place_of_another_in_all_components_or_in_none(tmp_path):
    first, second = trained(), trained()
    for part in parts_of(second).values():
        randomised(part, seed=7)
    save_lora(first, tmp_path / "first")
    save_lora(second, tmp_path / "second")
    pipe = tiny_pipeline("sd")
    load_lora(pipe, tmp_path / "first", name="first")
    tensors = load_file(tmp_path / "second" / "pytorch_lora_weights.safetensors")
    key = next(key for key in tensors if key.startswith("text_encoder") and "lora_A" in key)
    save_file({**tensors, key: tensors[key][:, :-1].contiguous()}, tmp_path / "bad.safetensors")
    before = state(pipe)
    with pytest.raises(AdapterMismatch):  # the text encoder's part does not fit
        load_lora(pipe, tmp_path / "bad.safetensors", name="second")
    assert_untouched(before, pipe)
    assert_equal(outputs(pipe), outputs(first))
    load_lora(pipe, tmp_path / "second", name="second")
    assert_equal(outputs(pipe), outputs(second))
    set_adapters(pipe, "first")
    assert_equal(outputs(pipe), outputs(first))


@pytest.mark.parametrize("mlp", [False, True], ids=["attention", "attention and mlp"])
def test_row_12_a_text_encoder_with_some_projections_only_is_read(mlp, tmp_path):
    leaves = ("self_attn_q_proj", "mlp_fc1") if mlp else ("self_attn_q_proj",)

    def some(tensors):
        return {
            key: tensor for key, tensor in tensors.items() if key.partition(".")[0].endswith(leaves)
        }

    file, _ = kohya_file(tmp_path, edit=some)
    found = made(SD1, "LoRA", native=False, starts=kohya(SD1))["text_encoder"]
    weights = found.weights(pipeline("sd").text_encoder, found.written.weight)
    kept = {p: w for p, w in weights.items() if p.replace(".", "_").endswith(leaves)}
    assert len(kept) == len(leaves)
    pipe = tiny_pipeline("sd")
    load_lora(pipe, file)
    assert_near(outputs(pipe), merged_outputs(SD1, {"text_encoder": kept}), "text_encoder")


def test_row_13_the_magnitudes_of_dora_count(tmp_path):
    file, wanted = kohya_file(tmp_path, "DoRA")
    pipe = tiny_pipeline("sd")
    load_lora(pipe, file)
    assert_near(outputs(pipe), wanted)
    stripped = {k: v for k, v in load_file(file).items() if "dora_scale" not in k}
    save_file(stripped, tmp_path / "lora.safetensors")
    plain = tiny_pipeline("sd")
    load_lora(plain, tmp_path / "lora.safetensors")  # what plain diffusers makes of the file
    assert difference(component_output(plain.unet), wanted["unet"]) > 0.1


@pytest.mark.parametrize("kind", ["LoHa", "LoKr", "Tucker"])
def test_row_14_kinds_of_lycoris_that_peft_holds_load(kind, tmp_path):
    file, wanted = kohya_file(tmp_path, kind)
    pipe = tiny_pipeline("sd")
    load_lora(pipe, file)
    assert_near(outputs(pipe), wanted)


REFUSED = {
    "full": "whole differences",
    "ia3": r"\(IA\)3",
    "glora": "GLoRA",
    "diag-oft": "OFT",
    "boft": "OFT",
    "tlora": "T-LoRA",
    "dora on input": "a magnitude for each input feature",
    "doha": "DoRA.* on LoHa",
    "dokr": "DoRA.* on LoKr",
    "lokr unbalanced": "unbalanced",
}


@pytest.mark.parametrize("variant", REFUSED)
def test_row_14_kinds_that_peft_does_not_hold_are_refused_by_name(variant, tmp_path):
    pipe = tiny_pipeline("sd")
    written = lycoris.write(
        pipe.unet, variant, prefix="lora_unet", only=lambda path, _: path.endswith("attn1.to_out.0")
    )
    save_file(dict(written.tensors), tmp_path / "style.safetensors")
    before = state(pipe)
    with pytest.raises(
        BadAdapterFile, match=f"{REFUSED[variant]}.*Merge it|{REFUSED[variant]}.*merge"
    ):
        load_lora(pipe, tmp_path / "style.safetensors")
    assert_untouched(before, pipe)


def test_row_17_a_load_says_nothing_but_its_report(tmp_path, capfd, caplog):
    save_lora(trained(), tmp_path)
    pipe = tiny_pipeline("sd")
    capfd.readouterr()
    names = ("", "diffusers", "transformers", "peft")
    loggers = [logging.getLogger(name) for name in names]
    for logger in loggers:
        logger.addHandler(caplog.handler)
    try:
        load_lora(pipe, tmp_path)
    finally:
        for logger in loggers:
            logger.removeHandler(caplog.handler)
    assert [entry for entry in caplog.records if entry.levelno >= logging.WARNING] == []
    assert capfd.readouterr() == ("", "")


def test_row_18_our_kohya_file_states_alpha_and_names_text_encoders_as_kohya_does(tmp_path):
    pipe = trained()
    adapter = open_adapter(save_lora(pipe, tmp_path / "own.safetensors"))
    file = save_adapter(adapter, tmp_path / "k.safetensors", layout="kohya", host=pipe)
    tensors = load_file(file)
    assert {float(v) for k, v in tensors.items() if k.endswith(".alpha")} == {ALPHA}
    starts = {key.split("_text_model_")[0] for key in tensors if "text_model" in key}
    assert starts == {"lora_te"}  # lora_te1 is for pipelines with two
    weights = {"unet": {}, "text_encoder": {}}
    for key in tensors:
        name, _, end = key.partition(".")
        if end != "alpha":
            continue
        part = "unet" if name.startswith("lora_unet_") else "text_encoder"
        model = getattr(pipeline("sd"), part)
        flat = name.removeprefix("lora_unet_").removeprefix("lora_te_text_model_")
        path = next(p for p, _ in model.named_modules() if p.replace(".", "_") == flat)
        ends = {"lora_A": "lora_down.weight", "lora_B": "lora_up.weight", "alpha": "alpha"}
        factors = {factor: tensors[f"{name}.{end}"] for factor, end in ends.items()}
        base = model.get_submodule(path).weight.detach()
        weights[part][path] = lycoris.dense(factors, base).float()
    assert_near(merged_outputs(SD1, weights), outputs(pipe))


def test_row_18_diffusers_still_writes_the_rank_for_alpha():
    model = trained().unet
    layers = {f"unet.{key}": t for key, t in get_peft_model_state_dict(model).items()}
    theirs = convert_state_dict_to_kohya(layers)
    assert {float(t) for key, t in theirs.items() if key.endswith(".alpha")} == {RANK}


def test_row_19_what_a_header_says_is_kept(tmp_path):
    header = {
        "ss_base_model_version": "sd_v1",
        "ss_tag_frequency": '{"10_cat": {"sks cat": 10}}',
        "modelspec.title": "A style",
        "modelspec.trigger_phrase": "sks cat, watercolour",
    }
    file, _ = kohya_file(tmp_path, metadata=header)
    pipe = tiny_pipeline("sd")
    load_lora(pipe, file)
    adapter = open_adapter(file, host=pipe)
    assert adapter.manifest.trigger_words == ("sks cat", "watercolour")
    again = {
        "ours": save_lora(pipe, tmp_path / "ours.safetensors"),
        "kohya": save_adapter(adapter, tmp_path / "k.safetensors", layout="kohya", host=pipe),
    }
    for name, copy_of in again.items():
        with safe_open(copy_of, "pt") as opened:
            kept = opened.metadata()
        assert header.items() <= kept.items(), name
    reopened = open_adapter(again["ours"])
    assert reopened.manifest.trigger_words == ("sks cat", "watercolour")


class Words(nn.Module):
    """Modules with the names by which diffusers tells formats apart."""

    def __init__(self):
        super().__init__()
        self.processor = nn.ModuleDict({"base_model": nn.Linear(8, 8), "alpha": nn.Linear(8, 8)})
        self.lora_unet_ = nn.Linear(8, 8)
        self.diffusion_model = nn.Linear(8, 8)

    def forward(self, x):
        for layer in (*self.processor.values(), self.lora_unet_, self.diffusion_model):
            x = layer(x)
        return x


@pytest.mark.parametrize("flat", [True, False], ids=["kohya", "ComfyUI"])
def test_row_20_words_in_the_names_of_modules_mean_nothing(flat, tmp_path):
    torch.manual_seed(0)
    model = Words()
    written = lycoris.write(model, "lora", prefix="lora_unet")
    tensors = dict(written.tensors)
    if not flat:
        dotted = {name: path for path, name in written.names.items()}
        tensors = {
            f"diffusion_model.{dotted[key.partition('.')[0]]}.{key.partition('.')[2]}": tensor
            for key, tensor in tensors.items()
        }
    save_file(tensors, tmp_path / "style.safetensors")
    merged = copy.deepcopy(model)
    for path in written.modules:
        merged.get_submodule(path).weight.data = written.weight(path)
    load_lora(model, tmp_path / "style.safetensors")
    x = torch.randn(4, 8)
    with torch.no_grad():
        assert difference(model(x), merged(x)) <= BAR


def test_row_21_a_key_of_another_kind_is_named_and_can_be_left_out(tmp_path):
    extra = {"bundle_emb.cat.string_to_param.*": torch.ones(2, 8)}
    file, wanted = kohya_file(tmp_path, edit=lambda tensors: {**tensors, **extra})
    pipe = tiny_pipeline("sd")
    before = state(pipe)
    with pytest.raises(BadAdapterFile, match="OneTrainer .*1 of its 28 keys.*strict=False"):
        load_lora(pipe, file)
    assert_untouched(before, pipe)
    report = load_lora(pipe, file, strict=False)
    assert report.skipped == tuple(extra)
    assert_near(outputs(pipe), wanted)


def test_each_module_has_its_own_alpha(tmp_path):
    # no row of the list: plain diffusers takes one alpha for all attention layers of a kohya file
    file, wanted = kohya_file(tmp_path)
    theirs, ours = tiny_pipeline("sd"), tiny_pipeline("sd")
    with pytest.warns(RuntimeWarning, match="alpha_pattern keys did not match"):
        theirs.load_lora_weights(str(file))
    assert difference(component_output(theirs.unet), wanted["unet"]) > 1e-3
    load_lora(ours, file)
    assert_near(outputs(ours), wanted)
