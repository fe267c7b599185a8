"""The pipeline file alone: what is joined is split again, and what is not understood is refused."""

import json

import pytest
import torch

from hf_lora.adapter import Component, check_component
from hf_lora.errors import BadAdapterFile
from hf_lora.formats.diffusers import METADATA, join, split, states_alpha
from tests.support import ALPHA, RANK

LORA = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA}


def factors(rank=RANK, **extra):
    return {"lora_A": torch.randn(rank, 8), "lora_B": torch.randn(6, rank), **extra}


def component(path="mid.to_q", targets=None, modules=None, **config):
    config = {**LORA, "target_modules": ["to_q", "q_proj"], **config}
    return Component(config, targets or {path: factors()}, modules or {})


def file(**components):
    """The tensors and the header of a sound file with the given components."""
    return join(components or {"unet": component(), "text_encoder": component("l.0.q_proj")})


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, part in ours.items():
        assert part.config == theirs[name].config
        assert part.targets.keys() == theirs[name].targets.keys()
        for path, tensors in part.targets.items():
            assert tensors.keys() == theirs[name].targets[path].keys()
            assert all(torch.equal(theirs[name].targets[path][f], x) for f, x in tensors.items())


def test_what_is_joined_is_split_again():
    parts = {
        "unet": component(
            targets={
                "mid.0.to_q": factors(**{"lora_B.bias": torch.randn(6)}),
                "down.to_q": factors(4, lora_magnitude_vector=torch.randn(6)),
            },
            rank_pattern={"^down.to_q": 4},
            use_rslora=True,
        ),
        "text_encoder": component(
            targets={
                "layers.0.q_proj": factors(),
                "token_embedding": {
                    "lora_embedding_A": torch.randn(RANK, 9),
                    "lora_embedding_B": torch.randn(6, RANK),
                },
            },
            target_modules=["q_proj", "token_embedding"],
        ),
    }
    tensors, metadata = join(parts)
    assert_equal(split(tensors, metadata), parts)
    assert metadata.keys() == {"format", METADATA}
    assert metadata["format"] == "pt"
    assert states_alpha(metadata)
    assert {key for key in tensors if "down" in key} == {
        "unet.down.to_q.lora_A.weight",
        "unet.down.to_q.lora_B.weight",
        "unet.down.to_q.lora_magnitude_vector.weight",
    }


def test_magnitudes_are_read_in_both_spellings_but_not_twice():
    magnitude = torch.randn(6)
    tensors, metadata = file(unet=component(targets={"q": factors()}, target_modules=["q"]))
    tensors["unet.q.lora_magnitude_vector"] = magnitude
    found = split(tensors, metadata)["unet"].targets["q"]
    assert torch.equal(found["lora_magnitude_vector"], magnitude)
    tensors["unet.q.lora_magnitude_vector.weight"] = magnitude
    with pytest.raises(BadAdapterFile, match="stands twice, under two spellings"):
        split(tensors, metadata)


@pytest.mark.parametrize(
    "targets", ["all-linear", r".*\.to_q", None, [], ["to_k"], ["id.to_q"], [3], {"other": 1}]
)
def test_targets_that_are_no_names_of_every_path_are_written_as_paths(targets):
    # a text encoder of diffusers gets its targets from the header alone
    _, metadata = file(unet=component(target_modules=targets))
    assert json.loads(metadata[METADATA])["unet.target_modules"] == ["mid.to_q"]


@pytest.mark.parametrize("targets", [["to_q", "mid.to_k"], {"mid.to_k", "to_q"}, ("to_q",)])
def test_targets_that_are_names_are_written_as_they_are(targets):
    _, metadata = file(unet=component(target_modules=targets))
    assert set(json.loads(metadata[METADATA])["unet.target_modules"]) == set(targets)


def test_a_leading_text_model_stays_in_keys_and_goes_from_the_header():
    path = "text_model.encoder.0.q_proj"
    part = component(
        path, target_modules=[path], alpha_pattern={f"^{path}": 3}, rank_pattern={path: RANK}
    )
    tensors, metadata = join({"text_encoder": part})
    assert f"text_encoder.{path}.lora_A.weight" in tensors
    again = split(tensors, metadata)["text_encoder"]
    assert again.config["target_modules"] == ["encoder.0.q_proj"]
    assert again.config["rank_pattern"] == {"encoder.0.q_proj": RANK}
    assert again.scaling(path) == part.scaling(path) == 3 / RANK


def test_a_file_without_metadata_takes_alpha_from_the_ranks_and_says_so():
    parts = {
        "unet": component(
            targets={
                "proj_out": factors(4),
                "a.proj_out": factors(7, lora_magnitude_vector=torch.ones(6)),
                "b.proj_out": factors(7, **{"lora_B.bias": torch.ones(6)}),
            }
        )
    }
    tensors, _ = join(parts)
    for metadata in ({}, {"format": "pt"}, {METADATA: ""}):
        assert not states_alpha(metadata)
        found = split(tensors, metadata)["unet"]
        assert (found.config["r"], found.config["lora_alpha"]) == (7, 7)
        assert found.config["rank_pattern"] == {"^proj_out": 4}
        assert found.config["target_modules"] == ["a.proj_out", "b.proj_out", "proj_out"]
        assert found.config["use_dora"]
        assert found.config["lora_bias"]
        assert {found.scaling(path) for path in found.targets} == {1.0}


def test_guessed_patterns_of_text_encoders_are_not_anchored_as_in_diffusers():
    targets = {f"encoder.{i}.q_proj": factors(rank) for i, rank in enumerate((7, 7, 4))}
    tensors, _ = join({"text_encoder": component(targets=targets)})
    found = split(tensors, {})["text_encoder"]
    assert found.config["rank_pattern"] == found.config["alpha_pattern"] == {"encoder.2.q_proj": 4}


def test_what_a_header_leaves_out_is_peft_s_default():
    tensors, _ = file(unet=component(targets={"q": factors(8)}))
    found = split(tensors, {METADATA: json.dumps({"unet.target_modules": ["q"]})})["unet"]
    check_component(found)
    assert found.config == {
        "peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": ["q"]
    }  # fmt: skip


FOREIGN = [
    "lora_unet_mid_attn_to_q.lora_down.weight",
    "lora_te1_text_model_q_proj.alpha",
    "lycoris_mid_to_q.lora_up.weight",
    "unet.mid.to_q.hada_w1_a",
    "transformer.mid.to_q.lokr_w1",
    "unet.mid.to_q.dora_scale",
    "unet.mid.attn1.processor.to_q_lora.down.weight",
    "text_encoder.l.0.self_attn.to_q_lora.up.weight",
    "text_encoder.l.0.q_proj.lora_linear_layer.up.weight",
    "text_encoder_2.text_projection.lora.down.weight",
    "base_model.model.mid.to_q.lora_A.weight",
    "diffusion_model.mid.to_q.lora_A.weight",
    "double_blocks.0.img_attn.qkv.lora_A.weight",
    "unet.mid.to_q.lora_down.weight",
    "unet.mid.to_q.alpha",
    "mid_block.to_q.lora_A.weight",
    "to_q.lora_A.weight",
    "mid.0.lora_magnitude_vector",
    "unet.lora_A.weight",
    "unet..lora_B.bias",
    "unet.mid.to_q.lora_C.weight",
    "unet.mid.to_q.lora_A.default.weight",
    "unet.conv_in.weight",
    "unet",
    "",
]


@pytest.mark.parametrize("header", [True, False], ids=["header", "bare"])
@pytest.mark.parametrize("key", FOREIGN)
def test_keys_that_are_no_factors_are_refused(key, header):
    tensors, metadata = file()
    tensors[key] = torch.ones(2, 2)
    with pytest.raises(BadAdapterFile, match="1 of 5 keys are no LoRA factors.*Expected") as error:
        split(tensors, metadata if header else {})
    assert error.value.field == key


def test_a_file_without_tensors_is_refused():
    with pytest.raises(BadAdapterFile, match="the file holds no tensors"):
        split({}, {})


def test_a_component_without_a_matrix_has_no_rank():
    with pytest.raises(BadAdapterFile, match="unet has no lora_A to take a rank from"):
        split({"unet.q.lora_B.weight": torch.ones(2, 2)}, {})
    with pytest.raises(BadAdapterFile, match="unet has no lora_A to take a rank from"):
        split({"unet.q.lora_A.weight": torch.ones(2)}, {})


def test_long_names_are_cut():
    with pytest.raises(BadAdapterFile) as error:
        split({"x" * 10_000: torch.ones(1)}, {})
    assert len(str(error.value)) < 400


def edited(**fields):
    """The header's JSON with fields added or, with None, taken away."""
    stated = json.loads(file()[1][METADATA]) | {k.replace("__", "."): v for k, v in fields.items()}
    return json.dumps({key: value for key, value in stated.items() if value is not None})


def only(name):
    stated = json.loads(file()[1][METADATA])
    return json.dumps({key: v for key, v in stated.items() if key.startswith(f"{name}.")})


METADATA_ERRORS = [
    # the header's text, and the words of the error
    ("{", "is no valid JSON"),
    ("[1]", "is no JSON object"),
    ("3", "is no JSON object"),
    ('{"unet.r": NaN}', "NaN is no JSON number"),
    ('{"unet.lora_alpha": -Infinity}', "-Infinity is no JSON number"),
    ('{"unet.r": 1, "unet.r": 2}', "'unet.r' stands twice"),
    ('{"unet.r": ' + "[" * 40 + "]" * 40 + "}", "nested deeper than 32"),
    ('{"unet.r": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested deeper than 32"),
    ('{"r": 4, "lora_alpha": 4}', "'r', which is no <component>.<field>.*save_lora_adapter"),
    ('{".r": 4}', "'.r', which is no <component>.<field>"),
    ('{"unet.": 4}', "'unet.', which is no <component>.<field>"),
    ("{}", "text_encoder, unet: the file has tensors but not a config"),
    (only("unet"), "text_encoder: the file has tensors but not a config in lora_adapter"),
    (edited(text_encoder_2__r=4), "text_encoder_2: the file has a config but not tensors"),
    (edited(unet__peft_type="IA3"), "unet.peft_type is 'IA3', not 'LORA'"),
    (edited(unet__peft_type=[]), r"unet.peft_type is \[\], not 'LORA'"),
]


@pytest.mark.parametrize(("text", "words"), METADATA_ERRORS, ids=range(len(METADATA_ERRORS)))
def test_a_broken_header_is_refused(text, words):
    tensors, metadata = file()
    with pytest.raises(BadAdapterFile, match=words) as error:
        split(tensors, metadata | {METADATA: text})
    assert error.value.field == METADATA


def test_a_component_of_another_name_is_read_where_the_header_states_it():
    assert split(*file(image_encoder=component()))["image_encoder"].config["r"] == RANK


JOIN_ERRORS = [
    # components, and the words of the error
    ({"unet": component(peft_type="LOHA")}, "method LOHA.*diffusers 0.42.1.*peft layout"),
    ({"unet": component(peft_type="LOKR")}, "method LOKR.*reads LoKr for Flux2 and Z-Image"),
    ({"unet": component(peft_type=None)}, "the method NONE"),
    ({"unet": component(modules={"head": {"weight": torch.ones(2)}})}, r"whole modules \(head\)"),
    ({"unet": component(modules_to_save=["head"])}, "modules trained whole"),
    ({"unet": component(trainable_token_indices=[3])}, "new rows of embeddings"),
    ({"unet": component(target_parameters=["w"])}, "factors of bare parameters"),
    ({"unet": component(future=1)}, "fields that peft's LoraConfig lacks: future"),
    ({"unet": component(targets={"q": factors(lora_diag=torch.ones(2))})}, r"q\.lora_diag"),
    ({"unet": component("lora_x.to_q")}, r"does not read: lora_x\.to_q\.lora_A"),
    ({"unet": Component(LORA, {})}, "unet holds no LoRA factors"),
    ({}, "holds no LoRA factors"),
    ({"unet.mid": component()}, "'unet.mid' cannot name a component"),
    ({"": component()}, "'' cannot name a component"),
    ({"model": component()}, "not a single model.*peft layout"),
    (
        {"unet": component(), "text_encoder_2": component("layers.0.mlp.fc1")},
        "text_encoder_2 has no target named q_proj, k_proj, v_proj, out_proj",
    ),
    ({"unet": component(lora_alpha=float("nan"))}, "a config holds what JSON cannot"),
    ({"unet": component(revision=object())}, "a config holds what JSON cannot.*type object"),
]


@pytest.mark.parametrize(("parts", "words"), JOIN_ERRORS, ids=range(len(JOIN_ERRORS)))
def test_what_diffusers_does_not_read_is_not_written(parts, words):
    with pytest.raises(BadAdapterFile, match=words):
        join(parts)
