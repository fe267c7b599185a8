"""Pictures drawn while a pipeline is trained, against plain calls of plain pipelines."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Trainer, set_seed

from hf_lora import (
    DiffusionTrainingModule,
    InvalidOption,
    LoraCallback,
    LoraTrainer,
    TrainingError,
    attach_lora,
    load_lora,
    open_adapter,
)
from hf_lora.testing import tiny, tiny_pipeline
from hf_lora.training.diffusion.sheet import CELL, COLUMNS, sheet, spread
from hf_lora.training.samples import Samples
from tests.runs import arguments, assert_equal, factors

SMALL = {"height": 16, "width": 16, "num_inference_steps": 2}
CAT = {"prompt": "a cat", **SMALL}
PARTS = {"sd": ["unet", "text_encoder"], "flux": ["transformer", "text_encoder"]}


def module(kind="sd", **options):
    set_seed(0)
    pipe = attach_lora(tiny_pipeline(kind), rank=4, components=PARTS[kind], dropout=0.1)
    return DiffusionTrainingModule(pipe, **options)


def rows(model, count=4):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(count, 3, 16, 16, generator=generator) * 2 - 1
    ids = model.tokenize(["rain", "a red hat"] * (count // 2))
    return [{"pixel_values": p, **{k: v[i] for k, v in ids.items()}} for i, p in enumerate(pixels)]


def run(out, samples, *, model=None, judged=True, kind=LoraTrainer, resume=None, **changes):
    """Trains four steps and evaluates, or saves alone, after the second and the fourth."""
    model = module() if model is None else model
    settings = {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 2, **changes}
    if judged:
        settings |= {"eval_strategy": "steps", "eval_steps": 2}
    made = kind(
        model,
        arguments(out, **settings),
        train_dataset=rows(model),
        eval_dataset=rows(model, 2) if judged else None,
        callbacks=[LoraCallback(samples=samples, report=False)],
    )
    made.train(resume_from_checkpoint=resume)
    return made


def told(folder):
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def pixels(path):
    with Image.open(path) as picture:
        return np.asarray(picture)


OPTIONS = {
    "sd": {"caption_dropout": 0.3},
    "flux": {"gradient_checkpointing": True, "longest_caption": 16},
}


@pytest.mark.parametrize("kind", OPTIONS)
def test_pictures_are_those_of_the_plain_pipeline_and_the_run_is_the_same_without(kind, tmp_path):
    first = run(tmp_path / "a", [CAT], model=module(kind, **OPTIONS[kind]))
    second = run(tmp_path / "b", [], model=module(kind, **OPTIONS[kind]))
    assert_equal(factors(first.model), factors(second.model))
    assert [r.get("loss", r.get("eval_loss")) for r in first.state.log_history] == [
        r.get("loss", r.get("eval_loss")) for r in second.state.log_history
    ]
    for mine, other in zip(first.model.modules(), second.model.modules(), strict=True):
        assert mine.training == other.training
    pipe, fresh = first.model.pipe, tiny_pipeline(kind)
    assert pipe.scheduler.timesteps.tolist() == fresh.scheduler.timesteps.tolist()
    assert not any(part._forward_pre_hooks for part in (pipe.vae.decoder, first.model.pipe.vae))

    assert told(tmp_path / "a") == [
        {"step": step, "seed": 0, **CAT, "file": f"samples/step-00000{step}-0.png"}
        for step in (2, 4)
    ]
    longest = {"max_sequence_length": 16} if kind == "flux" else {}
    for row in told(tmp_path / "a"):
        plain = tiny_pipeline(kind)
        plain.load_lora_weights(tmp_path / "a" / f"checkpoint-{row['step']}")
        generator = torch.Generator().manual_seed(0)
        image = plain(**CAT, **longest, generator=generator).images[0]
        assert np.array_equal(np.asarray(image), pixels(tmp_path / "a" / row["file"]))
    assert not (tmp_path / "b" / "samples").exists()
    # plain diffusers leaves dropout on, so it is told of none; the file holds the true one
    found = open_adapter(tmp_path / "a" / "checkpoint-4").components
    assert {name: part.config["lora_dropout"] for name, part in found.items()} == dict.fromkeys(
        PARTS[kind], 0.1
    )
    again = tiny_pipeline(kind)
    load_lora(again, tmp_path / "a" / "checkpoint-4", trainable=True)
    configs = [
        config for name in PARTS[kind] for config in getattr(again, name).peft_config.values()
    ]
    assert [config.lora_dropout for config in configs] == [0.1, 0.1]


def test_a_run_that_is_never_evaluated_draws_at_each_save_from_the_same_noise(tmp_path):
    asked = [
        {"prompt": "a dog", **SMALL},
        {**CAT, "seed": 7, "guidance_scale": 1},
        {**CAT, "negative_prompt": "rain"},
    ]
    run(tmp_path, asked, judged=False, learning_rate=0.0)
    found = told(tmp_path)
    assert [(row["step"], row["prompt"], row["seed"]) for row in found] == [
        (step, *sample) for step in (2, 4) for sample in (("a dog", 0), ("a cat", 7), ("a cat", 2))
    ]
    before, after = ([pixels(tmp_path / row["file"]) for row in found[i : i + 3]] for i in (0, 3))
    for one, other in zip(before, after, strict=True):
        assert np.array_equal(one, other)
    assert not np.array_equal(before[1], before[2])
    plain = tiny_pipeline("sd")(
        **{**CAT, "guidance_scale": 1}, generator=torch.Generator().manual_seed(7)
    )
    assert np.array_equal(np.asarray(plain.images[0]), before[1])  # B is zero as yet
    height, width, _ = pixels(tmp_path / "samples.png").shape
    assert width > 2 * CELL
    assert height > 3 * CELL


def test_a_plain_trainer_that_never_saves_draws_at_the_end(tmp_path):
    run(tmp_path, ["a dog"], judged=False, kind=Trainer, save_strategy="no")
    file = "samples/step-000004-0.png"
    assert told(tmp_path) == [{"step": 4, "prompt": "a dog", "seed": 0, "file": file}]
    size = tiny_pipeline("sd").unet.config.sample_size * 2  # two pixels a place
    assert pixels(tmp_path / file).shape == (size, size, 3)


def test_pictures_of_an_interrupted_run_go(tmp_path):
    run(tmp_path, [CAT])
    whole = {path.name: path.read_bytes() for path in (tmp_path / "samples").iterdir()}
    lines = (tmp_path / "samples.jsonl").read_text()
    sheet_of = (tmp_path / "samples.png").read_bytes()
    shutil.rmtree(tmp_path / "checkpoint-4")
    late = tmp_path / "samples" / "step-000006-0.png"
    late.write_bytes(b"of a run that went further")
    with (tmp_path / "samples.jsonl").open("a") as file:
        file.write('{"step": 6, "prompt": "a cat", "file": "samples/step-000006-0.png"}\n')
    run(tmp_path, [CAT], resume=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "samples").iterdir()} == whole
    assert (tmp_path / "samples.jsonl").read_text() == lines
    assert (tmp_path / "samples.png").read_bytes() == sheet_of


def test_pictures_go_to_tensorboard_where_trainer_reports_there(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "runs"))
    run(tmp_path, [CAT], report_to="tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    seen = set()
    for events in (tmp_path / "runs" / "samples").glob("events*"):
        found = EventAccumulator(str(events))
        found.Reload()
        seen |= {(image.step, tag) for tag in found.Tags()["images"] for image in found.Images(tag)}
    assert seen == {(2, "samples/0"), (4, "samples/0")}


@pytest.mark.parametrize("kind", PARTS)
def test_a_pipeline_of_mixed_types_is_drawn_and_left_as_it_was(kind, tmp_path):
    model = module(kind)
    frozen = [p for p in model.inputs.denoiser.parameters() if not p.requires_grad]
    for parameter in frozen:
        parameter.data = parameter.data.bfloat16()
    model.train()
    model.pipe.vae.decoder.train()
    state, scheduler = torch.get_rng_state(), model.pipe.scheduler
    sampler = model.lora_sampler([{**CAT, "prompt": "a dog"}])
    sampler.check()
    sampler.write(3, arguments(tmp_path))
    assert torch.equal(state, torch.get_rng_state())
    assert model.pipe.scheduler is scheduler
    assert model.inputs.denoiser.training
    assert model.pipe.vae.decoder.training
    assert not model.pipe.vae.encoder.training
    assert not model.inputs.denoiser._forward_pre_hooks
    assert all(p.dtype == torch.bfloat16 for p in frozen)
    wide = module(kind).lora_sampler([{**CAT, "prompt": "a dog"}])
    wide.write(3, arguments(tmp_path / "wide"))
    found, right = (
        pixels(folder / "samples" / "step-000003-0.png").astype(int)
        for folder in (tmp_path, tmp_path / "wide")
    )
    assert np.abs(found - right).mean() < 8  # of 255: two steps in bfloat16


def test_a_run_that_goes_on_after_a_failed_picture_would_find_the_pipeline_as_it_was():
    model = module()
    model.train()
    sampler = model.lora_sampler([CAT])
    model.pipe.vae.decoder.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(TrainingError, match=r"cannot draw 'a cat' .*division by zero") as caught:
        sampler.check()
    assert caught.value.field == "samples"
    assert model.pipe.unet.training


WRONG = {
    "a chat": ([{"role": "user", "content": "a cat"}], TrainingError, "is a chat, and a pipeline"),
    "too long": ("a very long caption it is", TrainingError, "tokens and text_encoder takes 16"),
    "a long negative": ({**CAT, "negative_prompt": "rain " * 9}, TrainingError, "takes 16"),
    "unknown": ({**CAT, "strength": 1}, InvalidOption, "'strength' in samples is no option"),
    "of another": ({**CAT, "true_cfg_scale": 1}, InvalidOption, "seed, negative_prompt, num_inf"),
    "seed": ({**CAT, "seed": -1}, InvalidOption, "seed=-1 in samples is not a whole number"),
    "truth": ({**CAT, "num_inference_steps": True}, InvalidOption, "num_inference_steps=True"),
    "guidance": ({**CAT, "guidance_scale": "a"}, InvalidOption, "guidance_scale='a'"),
    "size": ({**CAT, "height": 20}, InvalidOption, "height=20 .* no multiple of 8 pixels"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_sample_that_cannot_be_drawn_is_named(case):
    sample, error, said = WRONG[case]
    model = DiffusionTrainingModule(tiny_pipeline("sd"))
    with pytest.raises(error, match=said) as caught:
        model.lora_sampler([CAT, sample]).check()
    assert caught.value.field == "samples"


def test_that_is_an_error_before_the_first_step(tmp_path):
    model = module()
    before = factors(model)
    with pytest.raises(InvalidOption, match="no option of this pipeline"):
        run(tmp_path, [{**CAT, "strength": 1}], model=model)
    assert_equal(before, factors(model))


@pytest.mark.parametrize("part", ["vae", "tokenizer", "text_encoder"])
def test_a_pipeline_without_a_part_cannot_draw(part):
    model = DiffusionTrainingModule(attach_lora(tiny_pipeline("sd"), rank=2))
    setattr(model.pipe, part, None)
    with pytest.raises(TrainingError, match=f"has no {part}, so it cannot draw"):
        model.lora_sampler([CAT]).check()


@pytest.mark.parametrize("sample", [{"seed": 3}, {"prompt": ""}, {"prompt": "a", "seed": [1]}])
def test_a_mapping_that_is_no_sample_is_named(sample):
    with pytest.raises(InvalidOption, match="in samples is neither"):
        LoraCallback(samples=[sample])


def test_a_language_model_takes_no_options_of_a_pipeline():
    class Reader:
        chat_template = None

        def decode(self, ids):
            return ""

    with pytest.raises(TrainingError, match="is for a pipeline, and LlamaForCausalLM answers"):
        Samples([CAT], 4).begin(tiny("llama"), Reader())


def test_a_sheet_has_prompts_as_rows_and_white_where_nothing_was_drawn(tmp_path):
    colours = {(1, 0): "red", (1, 1): "lime", (20, 0): "blue"}
    drawn = {at: tmp_path / f"{at[0]}-{at[1]}.png" for at in colours}
    for at, colour in colours.items():
        Image.new("RGB", (16, 8) if at[1] else (400, 400), colour).save(drawn[at])
    drawn[20, 1] = tmp_path / "broken.png"
    drawn[20, 1].write_bytes(b"\x89PNG")
    page = np.asarray(sheet(drawn, ["a cat " * 40, "\u4eee 🦊\n"]))
    rows_of = {
        name: np.argwhere((page == rgb).all(-1))
        for name, rgb in (("red", (255, 0, 0)), ("lime", (0, 255, 0)), ("blue", (0, 0, 255)))
    }
    count = {name: len(places) for name, places in rows_of.items()}
    assert count == {"red": CELL**2, "lime": CELL * CELL // 2, "blue": CELL**2}
    assert rows_of["red"][0][0] == rows_of["blue"][0][0] < rows_of["lime"][0][0]
    assert rows_of["red"][0][1] == rows_of["lime"][0][1] < rows_of["blue"][0][1]


def test_a_sheet_of_many_steps_keeps_the_first_and_the_last():
    assert spread([1, 5]) == [1, 5]
    few = spread(range(0, 1000, 10))
    assert len(few) == len(set(few)) == COLUMNS
    assert (few[0], few[-1]) == (0, 990)
