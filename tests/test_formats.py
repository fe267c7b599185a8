"""Files and records: open, save, header-only reading, patterns, errors."""

import json

import pytest
import torch

from hf_lora import open_adapter, save_adapter
from hf_lora.adapter import MODEL, Adapter, Component, check_component
from hf_lora.errors import (
    AdapterMismatch,
    AdapterNotFound,
    BadAdapterFile,
    InvalidOption,
    closest,
    listing,
)
from hf_lora.formats import read_header
from hf_lora.patterns import Patterns
from hf_lora.targets import condense_values
from tests.support import as_foreign

CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 11, "target_modules": ["q"]}


def _adapter(**config):
    factors = {"lora_A": torch.ones(4, 8), "lora_B": torch.ones(6, 4)}
    return Adapter({MODEL: Component({**CONFIG, **config}, {"layers.0.q": factors})})


def test_what_is_saved_is_opened_again(tmp_path):
    adapter = _adapter()
    folder = save_adapter(adapter, tmp_path / "a")
    again = open_adapter(folder)
    part = again.components[MODEL]
    assert again.source == str(folder)
    assert part.targets.keys() == {"layers.0.q"}
    assert torch.equal(part.targets["layers.0.q"]["lora_A"], torch.ones(4, 8))
    assert part.config["lora_alpha"] == 11
    assert open_adapter(again) is again
    assert open_adapter(folder / "adapter_model.safetensors").parameters == 56  # 4x8 + 6x4


def test_a_header_is_enough_for_sizes(tmp_path):
    folder = save_adapter(_adapter(), tmp_path)
    header = read_header(folder)
    assert (header.parameters, header.nbytes) == (56, 224)
    assert all(t.is_meta for _, t in header.components[MODEL].tensors())
    assert header.components[MODEL].rank("layers.0.q") == 4


@pytest.mark.parametrize(
    ("fields", "scaling"),
    [
        ({}, 11 / 4),
        ({"use_rslora": True}, 11 / 2),
        ({"alpha_pattern": {"q": 7}}, 7 / 4),
        ({"alpha_pattern": {"k": 7}}, 11 / 4),
    ],
)
def test_scaling_follows_alpha_patterns_and_rslora(fields, scaling):
    assert _adapter(**fields).components[MODEL].scaling("layers.0.q") == scaling


@pytest.mark.parametrize(
    ("key", "matches"),
    [
        ("q", True),
        ("layers.0.q", True),
        ("^layers.0.q", True),
        ("^q", False),
        (r".*\.q", True),
        (r"(.*\.)?q$", True),
        (r"layers\.0\.q", True),
        ("0.k", False),
        ("ayers.0.q", False),  # whole segments
    ],
)
def test_patterns_match_by_whole_trailing_segments(key, matches):
    assert Patterns({key: 1}, "rank_pattern").value("layers.0.q", 0) == int(matches)


def test_a_component_without_lora_factors_has_no_scaling():
    part = Component({"peft_type": "LOHA"}, {"q": {"hada_w1_a": torch.ones(2, 2)}})
    assert part.rank("q") is None
    with pytest.raises(BadAdapterFile, match="no LoRA factors"):
        part.scaling("q")
    check_component(part)


def test_a_pattern_rank_must_equal_the_tensors():
    check_component(_adapter(r=8, rank_pattern={"q": 4}).components[MODEL])
    with pytest.raises(AdapterMismatch, match=r"rank 4 in file, 2 in config, at layers\.0\.q"):
        check_component(_adapter(rank_pattern={"q": 2}).components[MODEL])


def test_places_without_an_adapter_are_named(tmp_path):
    with pytest.raises(AdapterNotFound, match="no file or folder 'nowhere'"):
        open_adapter("nowhere")
    with pytest.raises(AdapterNotFound, match="no adapter_config.json"):
        open_adapter(tmp_path)
    (tmp_path / "style.safetensors").write_bytes(b"x")
    with pytest.raises(BadAdapterFile, match="no whole safetensors file: 1 bytes"):
        open_adapter(tmp_path / "style.safetensors")


def test_old_configs_get_pefts_own_defaults(tmp_path):
    folder = as_foreign(save_adapter(_adapter(), tmp_path))
    config = json.loads((folder / "adapter_config.json").read_text())
    del config["lora_alpha"]
    (folder / "adapter_config.json").write_text(json.dumps(config))
    assert open_adapter(folder).components[MODEL].config["lora_alpha"] == 8  # peft's default


def test_a_layout_that_is_none(tmp_path):
    with pytest.raises(InvalidOption, match="unknown layout 'ckpt'"):
        save_adapter(_adapter(), tmp_path, layout="ckpt")
    pipeline = Adapter({"unet": _adapter().components[MODEL]})
    with pytest.raises(BadAdapterFile, match="carries one model, not unet"):
        save_adapter(pipeline, tmp_path, layout="peft")
    with pytest.raises(BadAdapterFile, match="components of a pipeline, not a single model"):
        save_adapter(_adapter(), tmp_path, layout="diffusers")
    with pytest.raises(InvalidOption, match="a dict is no Adapter"):
        save_adapter({}, tmp_path)
    assert not list(tmp_path.iterdir())


def test_tensors_that_share_memory_are_written_apart(tmp_path):
    shared = torch.ones(4, 4)
    part = Component(CONFIG, {"q": {"lora_A": shared, "lora_B": shared}})
    again = open_adapter(save_adapter(Adapter({MODEL: part}), tmp_path))
    assert again.parameters == 32


def test_closest_names_prefer_the_last_segment():
    known = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj", "lm_head"]
    assert closest("q_prj", known)[0] == known[0]
    assert closest("head", known)[0] == "lm_head"
    assert listing("abcdefg", limit=3) == "a, b, c and 4 more"


def test_a_pattern_for_a_path_that_others_end_in_is_anchored():
    universe = ["proj_out", "single.0.proj_out", "single.1.proj_out", "q"]
    own = {"proj_out": 2, "single.0.proj_out": 1, "single.1.proj_out": 1}
    pattern = condense_values(own, 1, universe)
    assert pattern == {"^proj_out": 2}
    assert [Patterns(pattern, "alpha_pattern").value(path, 1) for path in own] == [2, 1, 1]
    assert condense_values(dict.fromkeys(own, 2), 1, universe) == {"proj_out": 2}
