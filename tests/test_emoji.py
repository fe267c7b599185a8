"""The emoji pipeline and its styles, as they lie in the clone, are what docs/emoji.md says."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from PIL import Image

from hf_lora import load_lora, set_adapters
from hf_lora.demo_styles import drawn, pipeline, run
from hf_lora.errors import LoraError

ROOT = Path(__file__).parent.parent
EMOJI = ROOT / "examples" / "emoji"
STYLES = ("openmoji", "fluent", "twemoji")
LICENCES = {"openmoji": "cc-by-sa-4.0", "fluent": "mit", "twemoji": "cc-by-4.0"}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def concepts():
    return json.loads((EMOJI / "concepts.json").read_text())


@pytest.fixture(scope="module")
def gallery(concepts):
    """Returns the true pictures of the first 50 held-out concepts, (50, 64, 64, 3) from 0 to 1."""
    whole = np.asarray(Image.open(EMOJI / "held_out.png").convert("RGB")) / 255
    return whole.reshape(5, 64, 10, 64, 3).swapaxes(1, 2).reshape(50, 64, 64, 3)


def test_the_base_is_a_plain_pipeline_of_at_most_eight_megabytes():
    files = [file for file in (EMOJI / "base").rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 8_000_000
    pipe = DiffusionPipeline.from_pretrained(EMOJI / "base", safety_checker=None)
    assert type(pipe) is StableDiffusionPipeline
    assert 1_000_000 <= sum(p.numel() for p in pipe.unet.parameters()) <= 5_000_000
    assert pipe.text_encoder.dtype == pipe.unet.dtype == torch.float32
    assert pipe("owl", num_inference_steps=1, output_type="np").images.shape == (1, 64, 64, 3)


def test_no_concept_is_both_learnt_and_held_out(concepts):
    learnt, held_out = concepts["learnt"], concepts["held_out"]
    assert (len(set(learnt)), len(set(held_out))) == (400, 100)
    assert not set(learnt) & set(held_out)


@pytest.mark.real  # seconds: with `make examples`
def test_the_base_draws_what_it_is_asked_for(concepts, gallery):
    """The gate of the base, by squared difference of pixels and for ten concepts."""
    pipe = pipeline(EMOJI / "base")
    asked = list(range(0, 50, 5))
    captions = [concepts["held_out"][i].replace("-", " ") for i in asked]
    made = drawn(pipe, captions)
    nearest = ((made[:, None] - gallery[None]) ** 2).mean((2, 3, 4)).argmin(1)
    assert (nearest == asked).mean() >= 0.85
    shuffled = drawn(pipe, captions[1:] + captions[:1])
    nearest = ((shuffled[:, None] - gallery[None]) ** 2).mean((2, 3, 4)).argmin(1)
    assert (nearest == asked).mean() <= 0.1


@pytest.mark.parametrize("style", STYLES)
def test_a_style_draws_the_same_in_plain_diffusers(style):
    ours, plain = pipeline(EMOJI / "base"), pipeline(EMOJI / "base")
    before = drawn(ours, ["owl"])
    load_lora(ours, EMOJI / "styles" / style)
    plain.load_lora_weights(EMOJI / "styles" / style)
    assert np.array_equal(drawn(ours, ["owl"]), drawn(plain, ["owl"]))
    assert abs(drawn(ours, ["owl"]) - before).mean() > 0.02


@pytest.mark.parametrize("style", STYLES)
def test_a_style_says_its_licence_and_whom_to_name(style):
    from huggingface_hub import ModelCard

    card = ModelCard.load(EMOJI / "styles" / style / "README.md")
    assert card.data.license == LICENCES[style]
    assert {"openmoji": "OpenMoji", "fluent": "Microsoft", "twemoji": "Twemoji"}[style] in card.text


def test_strength_zero_is_the_base():
    pipe = pipeline(EMOJI / "base")
    before = drawn(pipe, ["tiger"])
    load_lora(pipe, EMOJI / "styles" / "openmoji", name="openmoji")
    set_adapters(pipe, {"openmoji": 0.0})
    assert np.array_equal(drawn(pipe, ["tiger"]), before)


@pytest.mark.real  # seconds: with `make examples`
def test_the_demo_mixes_two_styles_that_it_pulled(tmp_path):
    said = []
    result = run(EMOJI, tmp_path / "out", said.append)
    assert result["difference"] == 0  # from plain diffusers with the same two files
    with Image.open(result["picture"]) as picture:
        drawn_at_all = np.asarray(picture.convert("L"))
    assert drawn_at_all.shape == (584, 936)  # four rows of six
    assert all(
        drawn_at_all[y : y + 128, x : x + 128].std() > 10 for y in (40, 448) for x in (120, 800)
    )
    assert "openmoji and fluent, pulled from a Hub on this machine" in said[0]


def test_the_demo_names_what_a_folder_lacks(tmp_path):
    (tmp_path / "base").mkdir()
    with pytest.raises(LoraError, match="has no folder 'styles/openmoji'"):
        run(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_page_says_what_was_measured():
    sys.path.insert(0, str(EMOJI))
    try:
        from judge import gains, table
    finally:
        sys.path.remove(str(EMOJI))
    page = (ROOT / "docs" / "emoji.md").read_text()
    results = json.loads((EMOJI / "results.json").read_text())
    for line in table(results):
        assert line in page
    parts = [f"{part:.0%}".removesuffix("%") for part in gains(results).values()]
    assert f"reach {parts[0]}, {parts[1]} and {parts[2]} % of the distance" in page
