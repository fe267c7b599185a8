"""Whose layout a file has, where words of diffusers stand beside those of other programs."""

import json

import peft
import pytest
import torch
from safetensors.torch import save_file

from hf_lora import load_lora, open_adapter, probe_lora
from hf_lora.architectures import architecture, names_of_host
from hf_lora.errors import BadAdapterFile
from hf_lora.formats.diffusers import METADATA
from hf_lora.formats.native import native_names
from hf_lora.testing import component_output, tiny_pipeline
from tests.conformance.foreign_files import difference, pipeline, replaced
from tests.conformance.foreign_page import BAR

RANK, ALPHA = 2, 3.0


def pair(shape, seed):
    made = torch.Generator().manual_seed(seed)
    return torch.randn(RANK, shape[1], generator=made), torch.randn(shape[0], RANK, generator=made)


def merged(kind, pairs, scaling):
    """What the transformer gives with the updates in its weights, summed in float64."""
    model = pipeline(kind).transformer
    weights = {}
    for path, (a, b) in pairs.items():
        weight = model.get_submodule(path).weight.double()
        weights[path] = (weight + scaling(path) * (b.double() @ a.double())).float()
    with replaced(model, weights):
        return component_output(model)


# ------------------------------------------------- the makers' names behind diffusers' component


def official_names(pipe):
    """Pairs under HunyuanVideo's own names, `linear1` apart, of which diffusers knows one size."""
    names = names_of_host(pipe)["transformer"]
    places = {
        name: pieces
        for name, pieces in native_names(names).items()
        if name.startswith(("double_blocks.", "single_blocks."))
        and name.endswith(("attn_qkv", "attn_proj", "mlp.fc1", "linear2", "mod.linear"))
    }
    widths = {n: sum(names.layers[p.path][0] for p in pieces) for n, pieces in places.items()}
    inner = {n: names.layers[pieces[0].path][1] for n, pieces in places.items()}
    return {n: pair((widths[n], inner[n]), seed) for seed, n in enumerate(places)}


@pytest.fixture
def official(tmp_path):
    """HunyuanVideo's own names behind `transformer.`, and no alpha, as diffusion-pipe writes."""
    pairs = official_names(pipeline("hunyuan-video"))
    assert len(pairs) > 8
    tensors = {}
    for name, (a, b) in pairs.items():
        tensors[f"transformer.{name}.lora_A.weight"] = a
        tensors[f"transformer.{name}.lora_B.weight"] = b
    save_file(tensors, tmp_path / "official.safetensors")
    return tmp_path / "official.safetensors"


def test_makers_names_behind_diffusers_component_load_as_in_plain_diffusers(official):
    theirs, ours = tiny_pipeline("hunyuan-video"), tiny_pipeline("hunyuan-video")
    theirs.load_lora_weights(official)
    wanted = component_output(theirs.transformer)
    report = load_lora(ours, official)
    assert difference(component_output(ours.transformer), wanted) <= BAR  # q, k, v summed apart
    assert difference(component_output(tiny_pipeline("hunyuan-video").transformer), wanted) > 0.1
    assert report.repairs == (
        "the file states no alpha; alpha = rank was taken, as other programs do",
    )


def test_a_probe_reads_makers_names_behind_diffusers_component(official):
    report = probe_lora(official, pipeline("hunyuan-video"))
    assert report.loads, report.reason
    assert [part.name for part in report.parts] == ["transformer"]


def test_the_public_pipeline_with_such_makers_names_is_found(tmp_path):
    names = architecture("hunyuan-video")["transformer"]
    places = native_names(names)["double_blocks.0.img_attn_qkv"]
    a, b = pair((sum(names.layers[p.path][0] for p in places), names.layers[places[0].path][1]), 0)
    key = "transformer.double_blocks.0.img_attn_qkv"
    file = tmp_path / "public.safetensors"
    save_file({f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}, file)
    assert set(open_adapter(file).components["transformer"].targets) == {p.path for p in places}
    assert "hunyuan-video" in probe_lora(file).fits


def test_a_file_with_the_hosts_own_names_stays_diffusers(tmp_path):
    """The header decides nothing there, and patterns of alpha hold as diffusers has them."""
    pipe = tiny_pipeline("hunyuan-video")
    pipe.transformer.add_adapter(peft.LoraConfig(r=2, lora_alpha=3, target_modules=["to_q"]))
    layers = peft.get_peft_model_state_dict(pipe.transformer, adapter_name="default")
    pipe.save_lora_weights(tmp_path, transformer_lora_layers=layers)
    assert probe_lora(tmp_path, pipeline("hunyuan-video")).format == "diffusers"


# ------------------------------------------------- diffusers' header beside ComfyUI's keys


def simple_tuner(tmp_path, kind, start, *, alphas=True, metadata=None):
    """What SimpleTuner writes with `lora_format=comfyui`, and the pairs by the host's paths."""
    layers = names_of_host(pipeline(kind))["transformer"].layers
    paths = [path for path in layers if path.endswith((".to_q", ".to_k"))]
    pairs = {path: pair(layers[path], seed) for seed, path in enumerate(paths)}
    tensors = {}
    for turn, (path, (a, b)) in enumerate(pairs.items()):
        tensors[f"{start}{path}.lora_A.weight"] = a
        tensors[f"{start}{path}.lora_B.weight"] = b
        if alphas or turn == 0:
            tensors[f"{start}{path}.alpha"] = torch.tensor(ALPHA)
    file = tmp_path / "tuner.safetensors"
    save_file(tensors, file, metadata={"format": "pt", METADATA: json.dumps(metadata)})
    return file, pairs


def fields(**changes):
    """A whole LoraConfig as plain data, as SimpleTuner puts it into the header."""
    config = peft.LoraConfig(r=RANK, lora_alpha=16, target_modules=["to_q", "to_k"]).to_dict()
    plain = {k: sorted(v) if isinstance(v, set) else v for k, v in config.items()}
    return json.loads(json.dumps({**plain, **changes}, default=str))


@pytest.mark.parametrize(
    ("kind", "start"),
    [("flux", "diffusion_model."), ("flux", "transformer."), ("z-image", "transformer.")],
)
def test_tensors_of_alpha_count_and_not_the_header_beside_them(kind, start, tmp_path):
    file, pairs = simple_tuner(tmp_path, kind, start, metadata=fields())
    pipe = tiny_pipeline(kind)
    report = load_lora(pipe, file)
    wanted = merged(kind, pairs, lambda _: ALPHA / RANK)
    assert difference(component_output(pipe.transformer), wanted) <= BAR  # sums in another order
    assert not report.repairs
    assert probe_lora(file, pipeline(kind)).loads


@pytest.mark.parametrize("front", ["", "transformer."])
def test_the_headers_alpha_is_taken_where_a_tensor_of_it_is_missing(front, tmp_path):
    config = fields(use_rslora=True, alpha_pattern={"single_transformer_blocks.1.attn.to_k": 5})
    stated = {f"{front}{name}": value for name, value in config.items()}
    file, pairs = simple_tuner(tmp_path, "flux", "diffusion_model.", alphas=False, metadata=stated)
    first = next(iter(pairs))

    def scaling(path):
        if path == first:
            return ALPHA / RANK
        return (5 if path == "single_transformer_blocks.1.attn.to_k" else 16) / RANK**0.5

    for host in ("flux", None):
        pipe = tiny_pipeline("flux")
        report = load_lora(pipe if host else pipe.transformer, file)
        wanted = merged("flux", pairs, scaling)
        assert difference(component_output(pipe.transformer), wanted) <= BAR
        assert report.repairs == (
            f"alpha is the header's at {len(pairs) - 1} modules, which as a tensor the file does "
            "not state",
        )


@pytest.mark.parametrize(
    ("stated", "words"),
    [
        ([], "is no JSON object"),
        ({"lora_alpha": 0}, "lora_alpha=0"),
        ({"lora_alpha": "8"}, "lora_alpha='8'"),
        ({"lora_alpha": 8, "alpha_pattern": {"(a+)+": 2}}, "regular expression"),
    ],
)
def test_a_header_whose_alpha_is_needed_and_none_is_refused(stated, words, tmp_path):
    file, _ = simple_tuner(tmp_path, "flux", "diffusion_model.", alphas=False, metadata=stated)
    with pytest.raises(BadAdapterFile, match=words.replace("(", r"\(").replace("+", r"\+")):
        load_lora(tiny_pipeline("flux"), file)


# ------------------------------------------------- one spelling, two families


@pytest.mark.parametrize(
    ("header", "kind"),
    [
        ({"modelspec.architecture": "flux-1-dev/lora"}, "FluxTransformer2DModel"),
        ({"ss_base_model_version": "flux1"}, "FluxTransformer2DModel"),
        ({"ss_base_model_version": "sdxl_base_v1-0"}, "UNet2DConditionModel"),
        ({"ss_base_model_version": "somebody's own"}, ""),
        ({}, ""),
    ],
)
def test_a_header_that_names_another_family_is_a_note(header, kind, tmp_path):
    """Flux and HunyuanVideo have layers of the same names, in sizes that public ones share."""
    layer = pipeline("hunyuan-video").transformer.get_submodule(
        "single_transformer_blocks.0.proj_out"
    )
    a, b = pair((layer.out_features, layer.in_features), 0)
    key = "lora_unet_single_blocks_0_linear2"
    file = tmp_path / "style.safetensors"
    save_file({f"{key}.lora_down.weight": a, f"{key}.lora_up.weight": b}, file, metadata=header)
    report = load_lora(tiny_pipeline("hunyuan-video"), file)
    probed = probe_lora(file, pipeline("hunyuan-video"))
    for notes in (report.notes, probed.notes):
        found = [note for note in notes if "says that it is for" in note]
        assert len(found) == bool(kind)
        assert all(f"which is {kind}, and the host has HunyuanVideo" in note for note in found)
