"""Files of other programs that are damaged, mixed up or for another host: errors with a name.

Each leaves the host as it was, bit for bit. tests/conformance/test_file_formats.py has what loads.
"""

import json
import logging
import re
import tempfile
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_lora import (
    AdapterExists,
    AdapterMismatch,
    AdapterNotFound,
    BadAdapterFile,
    InvalidOption,
    LoraError,
    load_lora,
    open_adapter,
    save_lora,
    set_adapters,
)
from hf_lora.architectures import ARCHITECTURES, architecture
from hf_lora.formats.grammar import STARTS
from hf_lora.formats.lookup import Index
from hf_lora.formats.misfits import UNREAD
from hf_lora.hosts import parts_of
from hf_lora.testing import component_output, tiny_pipeline
from tests import lycoris_files as lycoris
from tests.conformance.foreign_files import (
    HOSTS,
    difference,
    made,
    merged_outputs,
    outputs,
    pipeline,
)
from tests.conformance.foreign_page import BAR
from tests.conformance.foreign_rows import (
    KOHYA,
    PEFT,
    always,
    comfy,
    kohya,
    never,
    of_lycoris,
    one,
    saved_by_diffusers,
)
from tests.support import assert_same, snapshot

ATTENTION = "transformer_blocks_0_attn1_to_q"
TO_Q = f"lora_unet_down_blocks_1_attentions_0_{ATTENTION}"
TE_Q = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    monkeypatch.setattr(logging.getLogger("LyCORIS"), "level", logging.ERROR)


@cache
def sound(host="SD1", spelling="kohya", kind="LoRA"):
    """The tensors of a sound file of LyCORIS."""
    make = {
        "kohya": of_lycoris(kohya, native=never if host == "SD1" else always),
        "diffusers' names": of_lycoris(kohya, native=never),
        "ComfyUI": of_lycoris(comfy, native=always, ends=KOHYA, flat=False),
    }[spelling]
    return _read(lambda folder: make(HOSTS[host], kind, folder)[0])


@cache
def of_diffusers():
    """The tensors of a sound file of diffusers for SD1."""
    make = saved_by_diffusers(metadata=True)
    return _read(lambda folder: make(HOSTS["SD1"], "LoRA", folder)[0])


def _read(make):
    with tempfile.TemporaryDirectory() as folder:
        file = make(Path(folder))
        return load_file(file if file.is_file() else next(file.glob("*.safetensors")))


def state(pipe):
    return {name: snapshot(part) for name, part in parts_of(pipe).items()}


def assert_untouched(before, pipe):
    for name, after in state(pipe).items():
        assert_same(before[name], after)


def refused(tensors, tmp_path, host="SD1", pipe=None, metadata=None, **options):
    """The error of a load, which leaves the host as it was."""
    pipe = pipe or pipeline(HOSTS[host].pipeline)
    file = tmp_path / "style.safetensors"
    save_file(dict(tensors), file, metadata=metadata)
    before = state(pipe)
    with pytest.raises(LoraError) as caught:
        load_lora(pipe, file, **options)
    assert_untouched(before, pipe)
    assert caught.value.file == str(file)
    assert caught.value.fix
    return caught.value


def with_(**changes):
    """The sound file with tensors changed (key -> tensor) or taken out (key -> None)."""
    tensors = {**sound(), **changes}
    return {key: tensor for key, tensor in tensors.items() if tensor is not None}


# --- for another host -----------------------------------------------------------------------

OTHERS = [
    # file of, its spelling, into, what the error says
    ("SDXL", "kohya", "Flux", "another architecture: all of its 7 modules that begin with "
     "lora_unet_ are none of FluxTransformer2DModel"),
    ("Flux", "kohya", "SD1", "another architecture: all of its 8 .* are none of UNet2DCondition"),
    ("Flux", "ComfyUI", "SD1", r"all of its 8 modules that begin with diffusion_model\. are none"),
    ("Wan", "kohya", "SDXL", "all of its 7 modules that begin with lora_unet_ are none of UNet2D"),
    ("SD3", "kohya", "Flux", "another architecture: 7 of its 8 modules"),
    ("SD1", "kohya", "Flux2", "another architecture: all of its 6 modules"),
]  # fmt: skip


@pytest.mark.parametrize(("theirs", "spelling", "host", "said"), OTHERS)
def test_a_file_of_another_family_is_refused(theirs, spelling, host, said, tmp_path):
    error = refused(sound(theirs, spelling), tmp_path, host)
    assert isinstance(error, AdapterMismatch)
    assert error.fix == "Load it into the pipeline that it was made for."
    assert_matches(said, error)


def assert_matches(said, error):
    assert re.search(said, str(error)), str(error)


def test_a_file_of_sdxl_is_refused_by_sd1_which_lacks_the_second_text_encoder(tmp_path):
    tensors = {k: v for k, v in sound("SDXL").items() if "label_emb" not in k}
    error = refused(tensors, tmp_path)
    assert isinstance(error, AdapterMismatch)
    assert_matches(
        "3 of its 12 modules are of text_encoder_2, and the host has unet, text_encoder", error
    )


def public(name, part, ends=("to_q", "to_v")):
    """A kohya file for a pipeline of the real size: few layers, factors of zeros."""
    index = Index(architecture(name)[part])
    tensors = {}
    for path, places in index.flat.items():
        shape = index.names.layers[places.pieces[0].path]
        if not places.own and len(places.pieces) == 1 and path.endswith(ends):
            start = f"lora_unet_{path}"
            tensors[f"{start}.lora_down.weight"] = torch.zeros(2, shape[1])
            tensors[f"{start}.lora_up.weight"] = torch.zeros(shape[0], 2)
            tensors[f"{start}.alpha"] = torch.tensor(1.0)
    return tensors


def test_the_error_names_the_public_pipeline_that_a_file_fits(tmp_path):
    tensors = public("sdxl", "unet")
    assert len(tensors) > 300
    error = refused(tensors, tmp_path)
    assert isinstance(error, AdapterMismatch)
    assert error.fix == "It fits the public pipeline sdxl; load it into one of that kind."
    with pytest.raises(
        AdapterMismatch, match=r"another architecture.*fits the public pipeline sdxl"
    ):
        open_adapter(tmp_path / "style.safetensors", host="sd1")
    assert open_adapter(tmp_path / "style.safetensors").components.keys() == {"unet"}


def test_a_file_of_another_size_of_the_same_family_is_refused(tmp_path):
    tensors = {k: v for k, v in public("sd2", "unet").items() if "input_blocks_1_1" in k}
    assert tensors
    file = tmp_path / "style.safetensors"
    save_file(tensors, file)
    with pytest.raises(AdapterMismatch, match=r"another size.*fits the public pipeline sd2"):
        open_adapter(file, host="sd1")


def test_a_damaged_file_without_a_host_says_what_is_wrong_with_it(tmp_path):
    tensors = public("sdxl", "unet")
    first = next(k for k in tensors if k.endswith("lora_up.weight"))
    file = tmp_path / "style.safetensors"
    save_file({k: v for k, v in tensors.items() if k != first}, file)
    with pytest.raises(BadAdapterFile, match="lora_A but no lora_B"):
        open_adapter(file)


def test_a_file_that_fits_nothing_known_asks_for_the_host(tmp_path):
    file = tmp_path / "style.safetensors"
    save_file(sound("Flux"), file)  # tiny
    with pytest.raises(AdapterMismatch, match=r"none of the pipelines.*host=pipe"):
        open_adapter(file)
    with pytest.raises(InvalidOption, match="no known pipeline 'sd9'.*sd1, sdxl"):
        open_adapter(file, host="sd9")
    assert open_adapter(file, host=pipeline("flux")).components.keys() == {
        "transformer",
        "text_encoder",
    }


def test_modules_that_the_host_lacks_are_named_with_what_comes_closest(tmp_path):
    tensors = {k.replace("down_blocks_1", "down_blocks_7"): v for k, v in sound().items()}
    error = refused(tensors, tmp_path)
    assert isinstance(error, AdapterMismatch)
    wrong = TO_Q.replace("blocks_1", "blocks_7")
    assert_matches(f"2 of its 6 modules .* have no place in UNet2DConditionModel: {wrong}, ", error)
    assert_matches(f"Closest to the first: {TO_Q}, .*strict=False", error)


@pytest.mark.parametrize("only", [False, True])
def test_a_missing_text_encoder_is_named(only, tmp_path):
    pipe = tiny_pipeline("sd")
    pipe.text_encoder = None
    tensors = {k: v for k, v in sound().items() if not only or k.startswith("lora_te_")}
    error = refused(tensors, tmp_path, pipe=pipe)
    assert isinstance(error, AdapterMismatch)
    total = 3 if only else 9
    assert_matches(f"3 of its {total} modules are of text_encoder, and the host has unet", error)
    assert ("strict=False" in error.fix) is not only  # nothing would be left


def test_a_file_of_a_pipeline_is_told_apart_from_that_of_one_model(tmp_path):
    error = refused(sound(), tmp_path, pipe=pipeline("sd").unet)
    assert_matches("3 of its 9 modules are of text_encoder, and the host is a single UNet2D", error)


# --- damaged --------------------------------------------------------------------------------

DAMAGED = {
    "half a pair": (
        {f"{TO_Q}.lora_up.weight": None},
        BadAdapterFile,
        f"lora_A but no lora_B .in the file: {TO_Q}.lora_down.weight",
    ),
    "the other half": (
        {f"{TE_Q}.lora_down.weight": None},
        BadAdapterFile,
        "lora_B but no lora_A .in the file: lora_te_text_model",
    ),
    "alpha alone": (
        {f"{TO_Q}.lora_up.weight": None, f"{TO_Q}.lora_down.weight": None},
        BadAdapterFile,
        f"only alpha .in the file: {TO_Q}.alpha",
    ),
    "factors of a convolution for a linear layer": (
        {f"{TO_Q}.lora_down.weight": torch.ones(4, 64, 3, 3)},
        AdapterMismatch,
        r"a convolution with kernel \(3, 3\), and the host has a linear layer there",
    ),
    "factors of another size": (
        {f"{TO_Q}.lora_down.weight": torch.ones(4, 128)},
        AdapterMismatch,
        r"another size: A \(4, 128\), B \(64, 4\), host weight \(64, 64\)",
    ),
    "two ranks": (
        {f"{TO_Q}.lora_down.weight": torch.ones(5, 64)},
        BadAdapterFile,
        "disagree on the rank",
    ),
    "alpha of four elements": (
        {f"{TO_Q}.alpha": torch.ones(4)},
        BadAdapterFile,
        "alpha has 4 elements, not one",
    ),
    "alpha of no elements": (
        {f"{TO_Q}.alpha": torch.ones(0)},
        BadAdapterFile,
        "alpha has 0 elements, not one",
    ),
    "alpha that is no number": (
        {f"{TO_Q}.alpha": torch.tensor(float("nan"))},
        BadAdapterFile,
        "alpha is nan",
    ),
    "infinite alpha": (
        {f"{TO_Q}.alpha": torch.tensor(float("inf"))},
        BadAdapterFile,
        "alpha is inf",
    ),
    "alpha of nothing": ({f"{TO_Q}.alpha": torch.tensor(0.0)}, BadAdapterFile, "alpha is 0"),
    "alpha far off": (
        {f"{TO_Q}.alpha": torch.tensor(1e9)},
        BadAdapterFile,
        "scaling at .* is 2.5e.08, which is nothing or far off",
    ),
    "factors that are no numbers": (
        {f"{TO_Q}.lora_up.weight": torch.full((64, 4), float("nan"))},
        BadAdapterFile,
        "NaN or infinite",
    ),
    "factors of whole numbers": (
        {f"{TO_Q}.lora_up.weight": torch.ones(64, 4, dtype=torch.int32)},
        BadAdapterFile,
        "lora_B holds int32 values",
    ),
    "a factor in two spellings": (
        {f"{TO_Q}.lora_A.weight": torch.ones(4, 64)},
        BadAdapterFile,
        "stands twice, under two spellings",
    ),
    "a magnitude at one layer": (
        {f"{TO_Q}.dora_scale": torch.ones(64, 1)},
        BadAdapterFile,
        "no magnitude .DoRA., but at 1 there is",
    ),
    "a key of nothing": (
        {"what.is.this": torch.ones(1)},
        BadAdapterFile,
        "1 of its 28 keys is no factor",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_refused(name, tmp_path):
    changes, kind, said = DAMAGED[name]
    error = refused(with_(**changes), tmp_path)
    assert isinstance(error, kind)
    assert_matches(said, error)


def test_an_empty_file_is_refused(tmp_path):
    error = refused({}, tmp_path)
    assert isinstance(error, BadAdapterFile)
    assert_matches("the file holds no tensors", error)


def test_a_file_without_a_factor_is_refused(tmp_path):
    error = refused({"a.b": torch.ones(1)}, tmp_path)
    assert isinstance(error, BadAdapterFile)
    assert_matches("no factor of an adapter is among its 1 keys: a.b. This is no LoRA", error)


# --- two in one -----------------------------------------------------------------------------


def disjoint(one, other):
    """Modules of the down blocks from one file, all others from the other."""
    return {k: v for k, v in one.items() if "input_blocks" in k} | {
        k: v for k, v in other.items() if "down_blocks" not in k and "unet" in k
    }


MIXED = {
    "SGM and diffusers' names of the same layers": (
        "SDXL",
        lambda: {**sound("SDXL"), **sound("SDXL", "diffusers' names")},
    ),
    "SGM and diffusers' names of different layers": (
        "SDXL",
        lambda: disjoint(sound("SDXL"), sound("SDXL", "diffusers' names")),
    ),
    "fused and split": (
        "Flux",
        lambda: {**sound("Flux"), **sound("Flux", "diffusers' names")},
    ),
    "kohya and ComfyUI": ("Flux", lambda: {**sound("Flux"), **sound("Flux", "ComfyUI")}),
    "kohya and diffusers": ("SD1", lambda: {**sound(), **of_diffusers()}),
}


@pytest.mark.parametrize("name", MIXED)
def test_two_formats_in_one_file_are_refused(name, tmp_path):
    host, tensors = MIXED[name]
    error = refused(tensors(), tmp_path, host)
    assert isinstance(error, BadAdapterFile)
    assert_matches("spells modules of .* in two ways, .* and .*one by one", error)


def test_a_layer_that_stands_twice_in_one_spelling_is_refused(tmp_path):
    texts = {k: v.clone() for k, v in sound().items() if "_te_" in k}
    tensors = {k.replace("lora_te_", "lora_te1_"): v for k, v in texts.items()}
    error = refused({**sound(), **tensors}, tmp_path)
    assert_matches("encoder.layers.* stands twice, as lora_te1_.* and as lora_te_", error)


def test_components_may_be_spelt_by_different_formats(tmp_path):
    # ComfyUI's denoiser with kohya's text encoders is common, and nothing is in doubt
    tensors = {k: v for k, v in sound("Flux", "ComfyUI").items() if k.startswith("diffusion_")}
    texts = {k: v for k, v in sound("Flux").items() if k.startswith("lora_te1_")}
    file = tmp_path / "style.safetensors"
    save_file({**tensors, **texts}, file)
    pipe = tiny_pipeline("flux")
    load_lora(pipe, file)
    assert_loaded(pipe, "Flux", native=True)


def assert_loaded(pipe, host, *, native):
    """The pipeline computes what LyCORIS does with a sound LoRA."""
    found = made(HOSTS[host], "LoRA", native=native, starts=kohya(HOSTS[host]))
    weights = {
        part: own.weights(getattr(pipeline(HOSTS[host].pipeline), part), own.written.weight)
        for part, own in found.items()
    }
    wanted = merged_outputs(HOSTS[host], weights)
    for part, output in outputs(pipe).items():
        assert difference(output, wanted[part]) <= BAR, part


# --- known by name, not read ----------------------------------------------------------------

KEYS = {
    "XLabs": {
        f"double_blocks.0.processor.{x}_lora1.{end}.weight": torch.ones(4, 4)
        for x in ("qkv", "proj")
        for end in ("down", "up")
    },
    "a control LoRA of Black Forest Labs": {
        "double_blocks.0.img_attn.proj.lora_A.weight": torch.ones(4, 32),
        "double_blocks.0.img_attn.proj.lora_B.weight": torch.ones(32, 4),
        "double_blocks.0.img_attn.norm.query_norm.scale": torch.ones(16),
    },
    "a control-LoRA of Stability AI": {
        "lora_controlnet": torch.ones(1),
        "input_blocks.0.0.down": torch.ones(4, 4),
    },
    "OneTrainer": {"bundle_emb.cat.string_to_param.*": torch.ones(2, 8)},
    "a whole model": {"first_stage_model.decoder.conv_in.weight": torch.ones(2, 2)},
}


@pytest.mark.parametrize("name", KEYS)
def test_files_that_are_known_by_name_are_refused_by_it(name, tmp_path):
    error = refused(KEYS[name], tmp_path, "Flux")
    assert isinstance(error, BadAdapterFile)
    assert_matches(f"the file holds .*{name}", error)


def test_every_row_of_what_is_known_by_name_is_tested():
    assert len(UNREAD) == len(KEYS)


def test_norms_beside_a_lora_are_named_though_no_layer_is_there(tmp_path):
    norm = {"diffusion_model.blocks.0.norm3.diff": torch.ones(24)}
    error = refused({**sound("Wan", "ComfyUI"), **norm}, tmp_path, "Wan")
    assert isinstance(error, BadAdapterFile)
    assert_matches("blocks.0.norm3 is whole differences.*strict=False", error)


def test_what_diffusers_reads_of_xlabs_can_be_saved_and_read(tmp_path):
    # the way out that the error names
    generator = torch.Generator().manual_seed(0)
    shapes = {"qkv": (96, 32), "proj": (32, 32)}
    tensors = {
        f"double_blocks.{n}.processor.{x}_lora{i}.{end}.weight": torch.randn(
            (4, shapes[x][1]) if end == "down" else (shapes[x][0], 4), generator=generator
        )
        for n in (0, 1)
        for i in (1, 2)
        for x in shapes
        for end in ("down", "up")
    }
    save_file(tensors, tmp_path / "xlabs.safetensors")
    fix = refused(tensors, tmp_path, "Flux").fix
    assert 'pipe.load_lora_weights(file, adapter_name="style")' in fix
    assert 'save_lora(pipe, path, name="style")' in fix
    pipe, fresh = tiny_pipeline("flux"), tiny_pipeline("flux")
    pipe.load_lora_weights(str(tmp_path / "xlabs.safetensors"), adapter_name="style")
    load_lora(fresh, save_lora(pipe, tmp_path / "own.safetensors", name="style"))
    bare = component_output(pipeline("flux").transformer)
    assert not torch.equal(component_output(pipe.transformer), bare)
    assert torch.equal(component_output(fresh.transformer), component_output(pipe.transformer))


# --- strict=False ---------------------------------------------------------------------------


def test_with_strict_false_every_key_that_is_left_out_is_in_the_report(tmp_path):
    """Unknown modules, keys of nothing, a missing component and kinds that are not read."""
    lost = {
        "lora_unet_down_blocks_9_conv.lora_down.weight": torch.ones(2, 4),
        "lora_unet_down_blocks_9_conv.lora_up.weight": torch.ones(4, 2),
        "lora_te2_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight": torch.ones(2, 4),
        "lora_te2_text_model_encoder_layers_0_self_attn_q_proj.lora_up.weight": torch.ones(4, 2),
        "what.is.this": torch.ones(1),
        "lora_unet_mid_block_attentions_0_proj_in.diff": torch.ones(64, 64, 1, 1),
        f"{TO_Q}.diff_b": torch.ones(64),
        "lora_unet_conv_norm_out.w_norm": torch.ones(32),
    }
    refused({**sound(), **lost}, tmp_path)
    pipe = tiny_pipeline("sd")
    report = load_lora(pipe, tmp_path / "style.safetensors", strict=False)
    assert sorted(report.skipped) == sorted(lost)
    assert_loaded(pipe, "SD1", native=False)
    assert all(f"skipped: {key}" in str(report) for key in lost)


def test_with_strict_false_a_damaged_file_is_refused_all_the_same(tmp_path):
    refused(with_(**{f"{TO_Q}.lora_up.weight": None}), tmp_path, strict=False)
    refused(with_(**{f"{TO_Q}.alpha": torch.ones(4)}), tmp_path, strict=False)


@pytest.mark.parametrize("variant", ["glora", "full", "ia3"])
def test_with_strict_false_a_file_of_which_nothing_would_be_left_is_refused(variant, tmp_path):
    written = lycoris.write(
        pipeline("sd").unet, variant, prefix="lora_unet",
        only=lambda path, _: path.endswith("attn1.to_q"),
    )  # fmt: skip
    refused(written.tensors, tmp_path, strict=False)
    refused(sound("Flux2"), tmp_path, strict=False)


# --- names, blocks, detection ---------------------------------------------------------------


def test_a_name_in_use_is_refused(tmp_path):
    pipe = tiny_pipeline("sd")
    save_file(sound(), tmp_path / "style.safetensors")
    load_lora(pipe, tmp_path / "style.safetensors", name="style")
    before = state(pipe)
    with pytest.raises(AdapterExists, match="style"):
        load_lora(pipe, tmp_path / "style.safetensors", name="style")
    assert_untouched(before, pipe)


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ({"unet": {"down_blocks.7": 0.5}}, r"no target below \['down_blocks.7'\]. It has down"),
        ({"unet": {"transformer_blocks.0": 0.5}}, "no target below"),
        ({"transformer": 0.5}, "'transformer' is no component of .* on text_encoder, unet|on unet"),
        ({"unet": {"down_blocks.1": float("nan")}}, "is not finite"),
    ],
)  # fmt: skip
def test_blocks_and_components_that_do_not_exist_are_refused(weights, said, tmp_path):
    pipe = tiny_pipeline("sd")
    save_file(sound(), tmp_path / "style.safetensors")
    load_lora(pipe, tmp_path / "style.safetensors", name="style")
    before, wanted = state(pipe), outputs(pipe)
    with pytest.raises(InvalidOption, match=said):
        set_adapters(pipe, "style", weights)
    assert_untouched(before, pipe)
    for name, output in outputs(pipe).items():
        assert torch.equal(output, wanted[name])


def test_a_block_by_whole_segments_is_that_block_alone(tmp_path):
    # "transformer_blocks.0" is no part of "single_transformer_blocks.0"
    pipe = tiny_pipeline("flux")
    save_file(sound("Flux"), tmp_path / "style.safetensors")
    load_lora(pipe, tmp_path / "style.safetensors", name="style")
    set_adapters(pipe, "style", {"transformer": {"transformer_blocks.0": 0.0}})
    block, single = (
        pipe.transformer.transformer_blocks[0],
        pipe.transformer.single_transformer_blocks,
    )
    assert block.attn.to_q.scaling["style"] == 0
    assert single[0].attn.to_q.scaling["style"] != 0


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_no_two_layers_of_a_public_pipeline_have_one_name_with_underscores(name):
    for names in architecture(name).values():
        flat = Index(names).flat  # raises where two have
        assert len(flat) >= len(names.layers)


def test_beginnings_stand_once_and_name_components_that_there_are():
    assert len({start.text for start in STARTS}) == len(STARTS)
    assert all(start.components for start in STARTS)


@pytest.mark.parametrize("alpha", [True, False])
def test_factors_in_peft_s_words_behind_the_makers_names_need_no_config(alpha, tmp_path):
    # fal's files; alpha may stand beside the factors
    make = of_lycoris(one("base_model.model."), native=always, ends=PEFT, flat=False, alpha=alpha)
    file, wanted = make(HOSTS["Flux"], "LoRA", tmp_path)
    pipe = tiny_pipeline("flux")
    report = load_lora(pipe, file)
    assert difference(component_output(pipe.transformer), wanted["transformer"]) <= BAR
    assert any("states no alpha" in line for line in report.repairs) is not alpha


def test_factors_in_peft_s_words_behind_the_host_s_own_names_need_their_config(tmp_path):
    make = of_lycoris(one("base_model.model."), native=never, ends=PEFT, flat=False, alpha=False)
    file, _ = make(HOSTS["Flux"], "LoRA", tmp_path)
    pipe = pipeline("flux")
    before = state(pipe)
    with pytest.raises(AdapterNotFound, match="no config, so alpha is not known"):
        load_lora(pipe, file)
    assert_untouched(before, pipe)


def test_a_file_of_a_text_encoder_with_the_old_segment_needs_its_config_too(tmp_path):
    # the name differs between versions of transformers, and is the host's own in both
    name = "base_model.model.text_model.encoder.layers.0.self_attn.q_proj"
    tensors = {
        f"{name}.lora_A.weight": torch.ones(2, 32),
        f"{name}.lora_B.weight": torch.ones(32, 2),
    }
    error = refused(tensors, tmp_path)
    assert isinstance(error, AdapterNotFound)


def test_the_manifest_of_a_foreign_file_is_not_made_up(tmp_path):
    file = tmp_path / "style.safetensors"
    save_file(sound(), file, metadata={"ss_network_dim": "4", "note": json.dumps({"a": 1})})
    adapter = open_adapter(file, host=pipeline("sd"))
    assert adapter.manifest.digest == ""
    assert adapter.manifest.foreign == {"ss_network_dim": "4", "note": '{"a": 1}'}
    assert adapter.left_out == ()
