"""What a file is and whether it would load, from its header alone."""

import copy
import json
import re
import shutil
from dataclasses import replace

import peft
import pytest
import torch
from safetensors.torch import save_file

from hf_lora import attach_lora, load_lora, merge_lora, open_adapter, save_adapter, save_lora
from hf_lora.architectures import ARCHITECTURES, architecture
from hf_lora.errors import (
    AdapterMismatch,
    AdapterNotFound,
    BadAdapterFile,
    InvalidOption,
    LoraError,
    UnsupportedHost,
)
from hf_lora.formats import container, read_header
from hf_lora.formats.diffusers import METADATA
from hf_lora.hosts import parts_of
from hf_lora.manifest import KEY
from hf_lora.probe import probe_lora
from hf_lora.rehearsal import stand_in
from hf_lora.skeletons import laid_out
from hf_lora.testing import tiny, tiny_pipeline
from tests import hostile_files, hostile_models, hostile_pipelines
from tests.damage import metadata, stated
from tests.lycoris_files import NOT_HELD, VARIANTS, write
from tests.support import ALPHA, RANK, assert_same, randomise, snapshot
from tests.test_hostile import FILES, assert_unchanged, copied, host_named
from tests.test_hostile import good as good  # a fixture

# Only the values of a file tell these, and a probe reads none.
OF_VALUES = re.compile("NaN or infinite|values up to|digest|own copy of the base weight")
QV = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_"


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline("sd")


def kohya(path, *, extra=None, metadata=None, rank=4, alpha=3.0):
    """Writes a file of two modules of the tiny denoiser, as sd-scripts does."""
    tensors = {}
    for name in ("q", "v"):
        tensors[f"{QV}{name}.lora_down.weight"] = torch.zeros(rank, 64)
        tensors[f"{QV}{name}.lora_up.weight"] = torch.zeros(64, rank)
        if alpha is not None:
            tensors[f"{QV}{name}.alpha"] = torch.tensor(alpha)
    save_file({**tensors, **(extra or {})}, path, metadata=metadata)
    return path


def tried(host, source, **options):
    """What a load into a copy of the host says: its report, or its error."""
    try:
        return load_lora(copied(host), source, **options)
    except LoraError as error:
        return error


def probed(host, source):
    """What a probe says: its report, or its error."""
    try:
        return probe_lora(source, host)
    except LoraError as error:
        return error


@pytest.fixture(autouse=True)
def few_pipelines(monkeypatch):
    """Some of the public pipelines; all of them take seconds to lay out."""
    few = {name: ARCHITECTURES[name] for name in ("sd1", "sdxl", "sd2", "flux")}
    monkeypatch.setattr("hf_lora.recognise.ARCHITECTURES", few)
    monkeypatch.setattr("hf_lora.exchange.ARCHITECTURES", few)


# ---------------------------------------------------------------- would it load


def rows():
    """Bad files and those that are right all the same; not options of a call, nor names in use."""
    models = (
        *hostile_models.TAMPERED,
        *hostile_models.HANGING,
        *hostile_files.CRYPTIC,
        *hostile_files.CLEAR,
        *hostile_files.MANIFEST,
    )
    every = (*hostile_pipelines.ROWS[::2], *models[::8])
    return [row for row in every if "loaded" not in row.host]


@pytest.mark.parametrize("row", rows(), ids=lambda row: row.name)
def test_a_probe_says_what_a_load_of_the_file_does(row, good, tmp_path, monkeypatch):
    """`tests/test_hostile.py` makes sure that the load does what the row says."""
    folder = shutil.copytree(good(row.file), tmp_path / "adapter")
    options = {"source": folder, **(row.damage(folder) or {})}
    if options.keys() - {"source"}:
        pytest.skip("the row is about an option of the call, not about a file")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    host, before, _ = host_named(row.host or FILES[row.file].host)
    report = probed(host, options["source"])
    raised = isinstance(report, LoraError)
    assert not raised or type(report) is row.error
    loads = False if raised else report.loads
    words = str(report) if raised else f"{report.reason} {report.fix}"
    assert_unchanged(before, host)
    if row.error is not None and OF_VALUES.search(row.words):
        assert loads or re.search(row.words, words)
    else:
        assert loads is (row.error is None), words
        assert loads or re.search(row.words, words), words


@pytest.mark.parametrize("variant", [*VARIANTS, *NOT_HELD])
def test_every_kind_of_lycoris_is_named_and_judged_as_a_load_judges_it(variant, pipe, tmp_path):
    path = tmp_path / "style.safetensors"
    part = "mid_block" if variant != "tlora" else "mid_block.attentions.0.proj"  # it takes SVDs
    inside = write(pipe.unet, variant, prefix="lora_unet", only=lambda p, _: part in p)
    save_file({key: t.contiguous() for key, t in inside.tensors.items()}, path)
    report, done = probe_lora(path, pipe), tried(pipe, path)
    assert report.loads is not isinstance(done, LoraError)
    assert report.format == "kohya"
    assert sum(part.modules for part in report.parts) == len(inside.modules)
    assert {part.name for part in report.parts} == {"unet"}
    if report.loads:
        wanted = {"lora": "LoRA", "dora": "LoRA", "dylora": "LoRA", "loha": "LoHa", "lokr": "LoKr"}
        (part,) = report.parts
        assert part.kind == wanted[variant.split()[0]]
        assert part.dora is variant.startswith("dora")
        # as the file states it, for layers without a factorisation as well
        stated = {float(t) for key, t in inside.tensors.items() if key.endswith(".alpha")}
        assert set(part.alphas) == stated
    else:
        assert (report.reason, report.fix) == (done.fact, done.fix)


def test_kinds_that_are_not_read_are_named_with_the_reason(pipe, tmp_path):
    path = tmp_path / "style.safetensors"
    glora = write(pipe.unet, "glora", prefix="lora_unet", only=lambda p, _: "mid_block" in p)
    save_file({key: t.contiguous() for key, t in glora.tensors.items()}, path)
    (part,) = probe_lora(path).parts
    assert part.kind == "GLoRA"
    assert "made of the base weight" in part.why_not
    assert "GLoRA on" in str(probe_lora(path))


def test_a_lora_with_something_beside_it_counts_as_both(pipe, tmp_path):
    beside = {f"{QV}q.diff_b": torch.zeros(64), f"{QV}v.diff_b": torch.zeros(64)}
    alone = QV.replace("attn1_to_", "norm1.diff")
    path = kohya(tmp_path / "style.safetensors", extra={**beside, alone: torch.zeros(64)})
    report = probe_lora(path, pipe)
    lora, whole = sorted(report.parts, key=lambda part: part.why_not)
    assert (lora.kind, lora.modules, lora.alphas, lora.ranks) == ("LoRA", 2, (3.0,), {4: 2})
    assert (whole.kind, whole.modules) == ("whole differences (LyCORIS full, diffs of Wan)", 3)
    assert (report.loads, report.lenient, {*report.left_out}) == (False, True, {*beside, alone})


METHODS = {
    "lora": peft.LoraConfig(r=RANK, lora_alpha=ALPHA),
    "rslora": peft.LoraConfig(r=4, use_rslora=True),
    "dora": peft.LoraConfig(r=4, use_dora=True),
    "embedding": peft.LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"]),
    "loha": peft.LoHaConfig(r=4, alpha=ALPHA),
    "lokr": peft.LoKrConfig(r=4, alpha=ALPHA),
    "ia3": peft.IA3Config(feedforward_modules=[]),
    "c3a": peft.C3AConfig(block_size=8),
    "whole": peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]),
}


def with_another():
    return attach_lora(tiny("llama"), name="first", targets="attention")


def in_a_wrapper():
    return peft.get_peft_model(tiny("llama"), peft.LoraConfig(target_modules=["v_proj"]), "first")


@pytest.mark.parametrize("host", [lambda: tiny("llama"), with_another, in_a_wrapper])
@pytest.mark.parametrize("method", METHODS)
def test_a_host_with_adapters_is_judged_as_it_is_and_stays_so(method, host, tmp_path):
    config = copy.deepcopy(METHODS[method])
    save_lora(attach_lora(tiny("llama"), config=config), tmp_path / "adapter")
    model = host()
    before, flags = snapshot(model), {n: p.requires_grad for n, p in model.named_parameters()}
    report = probe_lora(tmp_path / "adapter", model)
    assert_same(before, snapshot(model))
    assert flags == {n: p.requires_grad for n, p in model.named_parameters()}
    why = ""
    try:
        load_lora(model, tmp_path / "adapter", name="second")
    except LoraError as error:
        why = error.fact
    assert (report.loads, report.reason) == (not why, why)


def test_what_strict_false_leaves_out_is_what_a_load_leaves_out(pipe, tmp_path):
    extra = {
        "lora_unet_mid_block_nowhere.lora_down.weight": torch.zeros(4, 64),
        "lora_unet_mid_block_nowhere.lora_up.weight": torch.zeros(64, 4),
    }
    path = kohya(tmp_path / "style.safetensors", extra=extra)
    report = probe_lora(path, pipe)
    assert (report.loads, report.lenient) == (False, True)
    assert report.left_out == tried(pipe, path, strict=False).skipped == tuple(extra)
    assert "strict=False      loads, without 2: lora_unet_mid_block_nowhere" in str(report)
    assert report.reason == tried(pipe, path).fact
    assert "pass strict=False" in report.fix


def test_a_component_that_the_host_lacks_is_left_out_by_name(tmp_path):
    pipe = tiny_pipeline("sd")
    for part in (pipe.unet, pipe.text_encoder):
        attach_lora(part, targets="attention")
    path = save_lora(pipe, tmp_path / "style.safetensors")
    pipe = tiny_pipeline("sd")
    pipe.register_modules(text_encoder=None)
    report = probe_lora(path, pipe)
    assert not report.loads
    assert report.left_out == ("text_encoder",)
    assert "text_encoder as well" in report.reason


def test_the_fingerprint_of_the_base_counts(tmp_path):
    pipe = tiny_pipeline("sd")
    attach_lora(pipe.unet, targets="attention")
    path = save_lora(pipe, tmp_path / "style.safetensors")
    assert probe_lora(path, tiny_pipeline("sd")).base.startswith("matched")
    other = probe_lora(path, tiny_pipeline("sd", seed=1))
    assert not other.loads
    assert "made on another base" in other.reason
    assert (other.lenient, other.left_out) == (True, ())
    assert "strict=False      loads, whole" in str(other)


def test_hosts_that_can_take_nothing_now_are_named(tmp_path):
    path = save_lora(attach_lora(tiny("llama"), rank=4), tmp_path / "adapter")
    merged = merge_lora(randomise(attach_lora(tiny("llama"), name="style")))
    assert "merged" in probe_lora(path, merged).reason
    with torch.device("meta"):
        bare = type(tiny("llama"))(tiny("llama").config)
    assert "lies on the meta device" in probe_lora(path, bare).reason
    for host, error in ((object(), UnsupportedHost), ("no such thing", InvalidOption)):
        with pytest.raises(error):
            probe_lora(path, host)


def test_a_name_in_use_is_a_note_for_names_are_chosen_at_the_load(tmp_path):
    path = save_lora(attach_lora(tiny("llama"), rank=4), tmp_path / "adapter")
    report = probe_lora(path, attach_lora(tiny("llama"), rank=4))
    assert report.loads
    assert "has an adapter 'default' already; load this one as name=..." in report.notes[0]


def test_a_stand_in_shares_weights_and_nothing_that_can_be_changed():
    model = attach_lora(tiny("llama"), rank=4)
    copied_modules = stand_in(model, [])
    theirs, ours = dict(model.named_modules()), dict(copied_modules.named_modules())
    assert theirs.keys() == ours.keys()
    assert not {id(m) for m in theirs.values()} & {id(m) for m in ours.values()}
    for (name, held), (_, own) in zip(
        model.named_parameters(), copied_modules.named_parameters(), strict=True
    ):
        assert held is not own, name
        assert held.data_ptr() == own.data_ptr(), name
    assert copied_modules.peft_config is not model.peft_config
    # tied weights stay tied
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == (
        copied_modules.lm_head.weight is copied_modules.get_input_embeddings().weight
    )


# ---------------------------------------------------------------- what it is


def real(tmp_path, keys, name="style.safetensors", metadata=None):
    """Writes factors of rank 2 for modules given as key -> (out, in)."""
    tensors = {}
    for key, (out, width) in keys.items():
        tensors[f"{key}.lora_down.weight"] = torch.zeros(2, width)
        tensors[f"{key}.lora_up.weight"] = torch.zeros(out, 2)
        tensors[f"{key}.alpha"] = torch.tensor(1.0)
    save_file(tensors, tmp_path / name, metadata=metadata)
    return tmp_path / name


# Modules as the files of these pipelines name them, with the shapes of the public models.
PUBLIC = {
    "sd1": {"lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k": (1280, 768)},
    "sd2": {"lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k": (1280, 1024)},
    "sdxl": {"lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k": (640, 2048)},
    "flux": {
        "lora_unet_double_blocks_0_img_attn_qkv": (9216, 3072),
        "lora_te1_text_model_encoder_layers_0_mlp_fc1": (3072, 768),
    },
}


@pytest.mark.parametrize("name", PUBLIC)
def test_the_public_pipeline_that_a_file_fits_is_found_by_names_and_shapes(name, tmp_path):
    report = probe_lora(real(tmp_path, PUBLIC[name]))
    assert report.fits == (name,)
    assert (report.loads, report.ok, report.host) == (None, True, "")
    assert {part.scalings for part in report.parts} == {(0.5,)}
    here = probe_lora(real(tmp_path, PUBLIC[name]), name)
    assert (here.loads, here.host) == (True, name)
    other = probe_lora(real(tmp_path, PUBLIC[name]), "sd3.5-medium")
    assert (other.loads, other.fits) == (False, (name,))


def test_files_of_our_own_layouts_say_which_pipelines_they_fit(tmp_path):
    shapes = architecture("sdxl")["unet"].layers
    path = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
    out, width = shapes[path]
    found = open_adapter(real(tmp_path, PUBLIC["sdxl"]))
    assert found.components["unet"].targets[path]["lora_B"].shape == (out, 2)
    file = save_adapter(found, tmp_path / "pytorch_lora_weights.safetensors", layout="diffusers")
    assert probe_lora(file).fits == ("sdxl",)
    assert probe_lora(file).format == "diffusers"
    assert probe_lora(found).fits == ("sdxl",)
    assert width == 2048


def test_a_file_that_fits_nothing_is_described_and_says_so(tmp_path):
    report = probe_lora(kohya(tmp_path / "tiny.safetensors"))
    assert (report.fits, report.ok, report.loads) == ((), False, None)
    assert "fits none of the pipelines that are known by name" in report.reason
    (part,) = report.parts
    assert (part.name, part.modules, part.ranks) == ("lora_unet_...", 2, {4: 2})
    assert (part.alphas, part.scalings) == ((3.0,), (0.75,))


def test_an_adapter_of_a_language_model_needs_no_pipeline(tmp_path):
    path = save_lora(attach_lora(tiny("llama"), rank=RANK, alpha=ALPHA), tmp_path / "adapter")
    report = probe_lora(path)
    assert (report.format, report.fits, report.ok) == ("peft", (), True)
    assert report.digest == open_adapter(path).digest
    assert report.said["class"] == "LlamaForCausalLM"
    (part,) = report.parts
    assert (part.name, part.scalings) == ("model", (ALPHA / RANK,))
    assert report.parameters == open_adapter(path).parameters
    assert report.bytes == open_adapter(path).nbytes


def test_an_open_adapter_is_probed_like_its_file(pipe, tmp_path):
    path = kohya(tmp_path / "style.safetensors", metadata={"modelspec.title": "t"})
    adapter = open_adapter(path, host=pipe)
    report = probe_lora(adapter, pipe)
    assert report.loads
    assert report.facts == {"title": "t"}
    header = read_header(save_lora(attach_lora(tiny("llama")), tmp_path / "lm"))
    assert probe_lora(header, tiny("llama")).loads


def test_no_alpha_in_the_file_is_said(pipe, tmp_path):
    report = probe_lora(kohya(tmp_path / "style.safetensors", alpha=None), pipe)
    assert report.parts[0].alphas == (None,)
    assert report.parts[0].scalings == (1.0,)
    assert "no alpha stated, so alpha = rank" in str(report)
    assert "alpha = rank was taken" in report.repairs[0]


def test_only_single_numbers_are_read(pipe, tmp_path, monkeypatch):
    path = kohya(tmp_path / "style.safetensors")
    read, fill = [], container._fill

    def counted(file, tensors, *more):
        read.extend(tensor.numel() for tensor in tensors)
        return fill(file, tensors, *more)

    monkeypatch.setattr(container, "_fill", counted)
    assert probe_lora(path, pipe).loads
    assert set(read) == {1}  # alphas


# ---------------------------------------------------------------- what it says of itself

EVIL = "\x1b[2J\x1b]0;owned\x07" + "x" * 500 + "\u202e"
HEADER = {
    "ss_base_model_version": "sd_v1",
    "ss_sd_model_name": EVIL,
    "modelspec.architecture": "stable-diffusion-v1/lora",
    "modelspec.title": EVIL,
    "modelspec.author": "Someone",
    "modelspec.license": "CC0-1.0",
    "modelspec.trigger_phrase": "ohwx, in the style of ohwx",
    "ss_training_finished_at": "1700000000.5",
    "ss_resolution": "(512, 512)",
    "ss_steps": "1200",
    "ss_num_epochs": "10",
    "ss_learning_rate": "0.0001",
    "ss_unet_lr": "None",
    "ss_network_module": "networks.lora",
    "ss_network_dim": "4",
    "ss_network_alpha": "3.0",
    "software": '{"name": "trainer"}',
    "ss_tag_frequency": json.dumps(
        {
            "10_style": {"1girl": 30, " hat ": 5, "": 99, "odd": "many", "minus": -1},
            "5_more": {"hat": 40, EVIL: 7},
            "odd": 5,
        }
    ),
}


def test_the_header_is_told_by_a_table_of_facts(pipe, tmp_path):
    report = probe_lora(kohya(tmp_path / "style.safetensors", metadata=HEADER), pipe)
    assert report.trigger_words == ("ohwx", "in the style of ohwx")
    assert report.tags == {"hat": 45, "1girl": 30, EVIL: 7}
    assert report.facts == {
        "title": EVIL,
        "author": "Someone",
        "license": "CC0-1.0",
        "date": "2023-11-14 22:13:20+00:00",
        "resolution": "(512, 512)",
        "steps": "1200",
        "epochs": "10",
        "learning rate": "0.0001",
        "network module": "networks.lora",
        "network dim": "4",
        "network alpha": "3.0",
        "software": '{"name": "trainer"}',
    }
    assert report.said == {
        "ss_base_model_version": "sd_v1",
        "ss_sd_model_name": EVIL,
        "modelspec.architecture": "stable-diffusion-v1/lora",
    }


def test_text_of_strangers_is_shown_short_and_printable(pipe, tmp_path):
    text = str(probe_lora(kohya(tmp_path / "style.safetensors", metadata=HEADER), pipe))
    assert all(line.isprintable() for line in text.splitlines())
    assert max(map(len, text.splitlines())) < 300
    assert r"\x1b[2J" in text
    assert "Trigger words: 'ohwx', 'in the style of ohwx'" in text
    assert "which are no triggers: 'hat' 45, '1girl' 30" in text


@pytest.mark.parametrize(
    ("tags", "words"),
    [
        ("{", "no valid JSON"),
        ("[" * 1000 + "]" * 1000, "nested deeper"),
        ("[1, 2]", ""),
        ('{"a": {"b": 1e400}}', ""),
        (" " * (9 << 20), "characters and was not read"),
    ],
)
def test_tags_that_cannot_be_read_are_a_note_at_most(tags, words, pipe, tmp_path):
    metadata = {"ss_tag_frequency": tags, "ss_training_finished_at": "1e300"}
    report = probe_lora(kohya(tmp_path / "style.safetensors", metadata=metadata), pipe)
    assert report.loads
    assert report.tags == {}
    assert report.facts == {"date": "1e300"}
    assert [words in note for note in report.notes] == ([True] if words else [])


def test_trigger_words_of_a_manifest_are_told(tmp_path):
    pipe = tiny_pipeline("sd")
    attach_lora(pipe.unet, targets="attention")
    adapter = open_adapter(save_lora(pipe, tmp_path / "style.safetensors"))
    adapter = replace(adapter, manifest=replace(adapter.manifest, trigger_words=("ohwx",)))
    report = probe_lora(save_adapter(adapter, tmp_path / "again.safetensors"), pipe.unet)
    assert report.trigger_words == ("ohwx",)


def test_a_report_is_plain_data_as_well(pipe, tmp_path):
    odd = kohya(tmp_path / "odd.safetensors", alpha=float("nan"))
    for path in (kohya(tmp_path / "style.safetensors", metadata=HEADER), odd):
        report = probe_lora(path, pipe)
        plain = json.loads(json.dumps(report.as_dict(), allow_nan=False))
        assert plain["loads"] is report.loads is report.ok
        assert plain["parts"][0]["kind"] == "LoRA"
    assert plain["parts"][0]["alphas"] == ["nan"]
    assert "alpha is nan" in plain["reason"]


# ---------------------------------------------------------------- no adapter


def test_what_is_no_adapter_raises(tmp_path):
    whole = tmp_path / "model.safetensors"
    save_file({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(4, 4)}, whole)
    with pytest.raises(BadAdapterFile, match="weights of a whole model"):
        probe_lora(whole)
    save_file({}, tmp_path / "empty.safetensors")
    with pytest.raises(BadAdapterFile, match="empty.safetensors: the file holds no tensors"):
        probe_lora(tmp_path / "empty.safetensors")
    (tmp_path / "short.safetensors").write_bytes(b"12345678")
    with pytest.raises(BadAdapterFile, match="no whole safetensors file"):
        probe_lora(tmp_path / "short.safetensors")
    with pytest.raises(AdapterNotFound):
        probe_lora(tmp_path / "nowhere.safetensors")


def test_damage_that_a_layout_of_our_own_states_raises(good, tmp_path):
    folder = shutil.copytree(good("sd"), tmp_path / "adapter")
    stated(unet__r=8)(folder)
    with pytest.raises(AdapterMismatch, match="rank 16 in file, 8 in config"):
        probe_lora(folder)
    metadata(**{METADATA: "{", KEY: "{"})(folder)
    with pytest.raises(BadAdapterFile, match="no valid JSON"):
        probe_lora(folder)


def test_half_a_pair_is_described_and_refused(pipe, tmp_path):
    extra = {"lora_unet_mid_block_attentions_0_proj_in.lora_up.weight": torch.zeros(64, 4)}
    report = probe_lora(kohya(tmp_path / "style.safetensors", extra=extra), pipe)
    assert not report.loads
    assert not report.lenient
    assert "there is lora_B but no lora_A" in report.reason


# ---------------------------------------------------------------- hosts by name


def test_a_folder_of_a_pipeline_is_enough_to_judge_by(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "pipe")
    for weights in (tmp_path / "pipe").glob("*/*.safetensors"):
        weights.unlink()  # configs are all that is read
    path = kohya(tmp_path / "style.safetensors")
    report = probe_lora(path, str(tmp_path / "pipe"))
    assert (report.loads, report.host) == (True, str(tmp_path / "pipe"))
    laid = laid_out(str(tmp_path / "pipe"))
    assert type(laid).__name__ == "StableDiffusionPipeline"
    assert parts_of(laid).keys() == parts_of(pipe).keys()
    component = laid_out(str(tmp_path / "pipe" / "unet"))
    assert probe_lora(path, str(tmp_path / "pipe" / "unet")).loads
    assert type(component) is type(pipe.unet)
