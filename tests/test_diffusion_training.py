"""`DiffusionTrainingModule`: pipelines trained by `LoraTrainer`, against diffusers' own scripts."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler, FluxPipeline
from diffusers.training_utils import (
    compute_density_for_timestep_sampling,
    compute_loss_weighting_for_sd3,
    compute_snr,
)
from safetensors.torch import load_file
from transformers import Trainer, set_seed

from hf_lora import (
    BadCheckpoint,
    BadDataset,
    InvalidOption,
    LoraCallback,
    LoraTrainer,
    TrainingError,
    UnsupportedHost,
    attach_lora,
    open_adapter,
    save_lora,
)
from hf_lora.testing import PIPELINES, tiny, tiny_pipeline
from hf_lora.training.diffusion import DiffusionTrainingModule, cache_rows, open_cache
from hf_lora.training.diffusion.losses import (
    PREDICTIONS,
    SAMPLINGS,
    WEIGHTINGS,
    DiffusionNoise,
    FlowNoise,
    loss_of,
)
from tests.runs import arguments, assert_equal, factors
from tests.support import randomise

KINDS = ("sd", "sdxl", "flux", "sd3")
CAPTIONS = ["a cat", "two dogs", "a red hat", "rain"]
SIDE = 16  # pixels
WITH_TEXT = {
    "sd": ["unet", "text_encoder"],
    "sdxl": ["unet", "text_encoder_2"],
    "flux": ["transformer", "text_encoder"],
    "sd3": ["transformer", "text_encoder", "text_encoder_2"],
}


def pipeline(kind, prediction=None, **attach):
    """A tiny pipeline with a fresh adapter."""
    set_seed(0)
    pipe = tiny_pipeline(kind)
    if prediction:
        config = dict(pipe.scheduler.config, prediction_type=prediction)
        pipe.scheduler = type(pipe.scheduler).from_config(config)
    return attach_lora(pipe, **({"rank": 4} | attach))


def pictures(count=4, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, SIDE, SIDE, generator=generator) * 2 - 1


def batch(module, count=4, *, seed=0):
    captions = [CAPTIONS[i % len(CAPTIONS)] for i in range(count)]
    return {"pixel_values": pictures(count, seed=seed), **module.tokenize(captions)}


def rows(module, count=8, *, seed=0):
    whole = batch(module, count, seed=seed)
    return [{key: value[i] for key, value in whole.items()} for i in range(count)]


# --- the formulas, in float64 -------------------------------------------------------------------


def alphas():
    """Products of 1 - beta of DDPM's linear betas, which a scheduler has by default."""
    return torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)


@pytest.mark.parametrize("gamma", [None, 5.0])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_noise_target_and_weight_are_the_closed_form(prediction, gamma):
    noise_of = DiffusionNoise({}, prediction=prediction, min_snr_gamma=gamma)
    latents, noise, made = torch.randn(3, 5, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    steps = torch.tensor([0, 1, 300, 700, 999])
    found = noise_of.at(latents, noise, steps)
    a = alphas()[steps].view(-1, 1, 1, 1)
    x, n = latents.double(), noise.double()
    target = n if prediction == "epsilon" else a.sqrt() * n - (1 - a).sqrt() * x
    snr = (a / (1 - a)).flatten()
    weight = torch.ones(5, dtype=torch.float64)
    if gamma:
        weight = snr.clamp(max=gamma) / (snr if prediction == "epsilon" else snr + 1)
    errors = ((made.double() - target) ** 2).flatten(1).mean(1) * weight
    # float32 betas multiplied a thousand times
    torch.testing.assert_close(
        found.noisy.double(), a.sqrt() * x + (1 - a).sqrt() * n, rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(found.target.double(), target, rtol=1e-4, atol=1e-4)  # the same
    torch.testing.assert_close(loss_of(made, found).double(), errors.mean(), rtol=1e-4, atol=0)


def test_a_terminal_step_without_signal_has_a_finite_weight():
    for name, row in PREDICTIONS.items():
        weight = row.weight(torch.tensor([0.0]), 5.0)
        assert weight.item() == (1.0 if name == "epsilon" else 0.0)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_flow_matching_is_the_closed_form(weighting):
    noise_of = FlowNoise({"shift": 3.0}, weighting=weighting)
    latents, noise, made = torch.randn(3, 4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    places = torch.tensor([0, 10, 500, 999])
    found = noise_of.at(latents, noise, places)
    plain = (1000 - places.double()) / 1000
    sigma = 3 * plain / (1 + 2 * plain)
    torch.testing.assert_close(found.timesteps.double(), sigma * 1000, rtol=1e-6, atol=1e-3)
    part, x, n = sigma.view(-1, 1, 1, 1), latents.double(), noise.double()
    weight = {
        "none": torch.ones_like(sigma),
        "sigma_sqrt": 1 / sigma**2,
        "cosmap": 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2)),
        "preconditioned": sigma**2,
    }[weighting]
    errors = ((made.double() - (n - x)) ** 2).flatten(1).mean(1) * weight
    torch.testing.assert_close(
        found.noisy.double(), (1 - part) * x + part * n, rtol=1e-5, atol=1e-5
    )  # float32
    torch.testing.assert_close(loss_of(made, found).double(), errors.mean(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_places_are_drawn_as_diffusers_draws_them(sampling):
    torch.manual_seed(3)
    ours = SAMPLINGS[sampling](64, None)
    torch.manual_seed(3)
    theirs = compute_density_for_timestep_sampling(
        sampling, 64, logit_mean=0.0, logit_std=1.0, mode_scale=1.29
    )
    assert torch.equal(ours, theirs)


# --- the loss of a batch, as the scripts compute it -----------------------------------------------


def text_of(pipe, kind):
    """What the pipeline's own `encode_prompt` makes of the captions."""
    if kind == "sd":
        return pipe.encode_prompt(CAPTIONS, "cpu", 1, False)[0], None
    if kind == "sdxl":
        found = pipe.encode_prompt(CAPTIONS, device="cpu", do_classifier_free_guidance=False)
        return found[0], found[2]
    if kind == "flux":
        return pipe.encode_prompt(CAPTIONS, None, device="cpu", max_sequence_length=16)[:2]
    found = pipe.encode_prompt(
        CAPTIONS, None, None, do_classifier_free_guidance=False, max_sequence_length=16
    )
    return found[0], found[2]


def latents_of(pipe, pixels):
    drawn = pipe.vae.encode(pixels).latent_dist.sample()
    scaled = (drawn - (pipe.vae.config.shift_factor or 0)) * pipe.vae.config.scaling_factor
    return scaled.contiguous()  # noise is drawn in the order of memory


def diffusion_script(pipe, kind, pixels, *, gamma=None, offset=0.0):
    """What train_text_to_image_lora.py and _sdxl do with a batch."""
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    latents = latents_of(pipe, pixels)
    noise = torch.randn_like(latents)
    if offset:
        noise += offset * torch.randn((len(latents), latents.shape[1], 1, 1))
    steps = torch.randint(0, 1000, (len(latents),))
    embeds, pooled = text_of(pipe, kind)
    added = {"text_embeds": pooled, "time_ids": torch.tensor([[16, 16, 0, 0, 16, 16]] * 4).float()}
    made = pipe.unet(
        scheduler.add_noise(latents, noise, steps), steps, embeds,
        added_cond_kwargs=added if kind == "sdxl" else None,
    ).sample  # fmt: skip
    velocity = scheduler.config.prediction_type == "v_prediction"
    target = scheduler.get_velocity(latents, noise, steps) if velocity else noise
    if gamma is None:
        return torch.nn.functional.mse_loss(made, target)
    snr = compute_snr(scheduler, steps)
    weight = torch.stack([snr, gamma * torch.ones_like(snr)], 1).min(1)[0] / (
        snr + 1 if velocity else snr
    )
    return (((made - target) ** 2).mean((1, 2, 3)) * weight).mean()


def flow_script(pipe, kind, pixels, scheme):
    """What train_dreambooth_lora_flux.py does with a batch, and _sd3.py without preconditioning."""
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)
    latents = latents_of(pipe, pixels)
    noise = torch.randn_like(latents)
    u = compute_density_for_timestep_sampling(scheme, 4, 0.0, 1.0, 1.29)
    steps = scheduler.timesteps[(u * 1000).long()]
    where = [(scheduler.timesteps == step).nonzero().item() for step in steps]
    sigmas = scheduler.sigmas[where].view(-1, 1, 1, 1)
    noisy = (1 - sigmas) * latents + sigmas * noise
    embeds, pooled = text_of(pipe, kind)
    if kind == "sd3":
        made = pipe.transformer(noisy, embeds, pooled, steps).sample
    else:
        b, c, h, w = noisy.shape
        made = pipe.transformer(
            FluxPipeline._pack_latents(noisy, b, c, h, w), embeds, pooled, steps / 1000,
            FluxPipeline._prepare_latent_image_ids(b, h // 2, w // 2, "cpu", torch.float32),
            torch.zeros(embeds.shape[1], 3),
        ).sample  # fmt: skip
        factor = pipe.vae_scale_factor
        made = FluxPipeline._unpack_latents(made, h * factor, w * factor, factor)
    weight = compute_loss_weighting_for_sd3(scheme, sigmas)
    return (weight * (made - (noise - latents)) ** 2).reshape(b if kind == "flux" else 4, -1).mean()


DIFFUSION = {
    "epsilon": ("sd", None, {}),
    "v": ("sd", "v_prediction", {}),
    "epsilon, min-SNR and offset": ("sd", None, {"gamma": 5.0, "offset": 0.1}),
    "v, min-SNR": ("sd", "v_prediction", {"gamma": 5.0}),
    "SDXL": ("sdxl", None, {}),
}


@pytest.mark.parametrize("case", DIFFUSION)
def test_the_loss_is_that_of_the_text_to_image_scripts(case):
    kind, prediction, options = DIFFUSION[case]
    pipe = randomise_all(pipeline(kind, prediction))
    module = DiffusionTrainingModule(
        pipe, min_snr_gamma=options.get("gamma"), noise_offset=options.get("offset", 0.0)
    ).train()
    given = batch(module)
    torch.manual_seed(7)
    ours = module(**given)["loss"]
    torch.manual_seed(7)
    theirs = diffusion_script(pipe, kind, given["pixel_values"], **options)
    # the SNR is a quotient here and two roots, squared, there
    torch.testing.assert_close(ours, theirs, rtol=1e-5 if options else 0, atol=0)


@pytest.mark.parametrize(
    ("kind", "scheme"),
    [("flux", "none"), ("flux", "sigma_sqrt"), ("sd3", "logit_normal"), ("sd3", "mode")],
)
def test_the_loss_is_that_of_the_flow_matching_scripts(kind, scheme):
    pipe = randomise_all(pipeline(kind))
    drawn = scheme in SAMPLINGS
    module = DiffusionTrainingModule(
        pipe,
        sampling=scheme if drawn else None,
        weighting="none" if drawn else scheme,
        longest_caption=16,
    ).train()
    given = batch(module)
    torch.manual_seed(7)
    ours = module(**given)["loss"]
    torch.manual_seed(7)
    theirs = flow_script(pipe, kind, given["pixel_values"], scheme)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)  # means in another order


def randomise_all(pipe):
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            randomise_factors(part)
    return pipe


def randomise_factors(part):
    if getattr(part, "peft_config", None):
        randomise(part)


# --- what Trainer sees ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_adapter_parameter_gets_a_gradient_and_nothing_else_does(kind):
    module = DiffusionTrainingModule(
        randomise_all(pipeline(kind, components=WITH_TEXT[kind])), longest_caption=None
    ).train()
    module(**batch(module))["loss"].backward()
    for part in module.pipe.components.values():
        for name, parameter in part.named_parameters() if hasattr(part, "forward") else ():
            assert (parameter.grad is not None) == ("lora_" in name), name
    trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
    idle = {name for name, p in trained.items() if not p.grad.any()}
    assert len(trained) > 20
    # SD3 drops what its last block makes of the text, and so the queries of it
    assert idle == {name for name in trained if kind == "sd3" and "1.attn.add_q_proj" in name}


def test_the_adapter_may_be_attached_before_or_after():
    first = DiffusionTrainingModule(pipeline("sd", components=WITH_TEXT["sd"]))
    pipe = tiny_pipeline("sd")
    second = DiffusionTrainingModule(pipe)
    set_seed(0)
    attach_lora(pipe, rank=4, components=WITH_TEXT["sd"])
    assert_equal(factors(first), factors(second))
    assert first.state_dict().keys() == second.state_dict().keys() == factors(first).keys()


def test_a_state_dict_holds_the_adapters_alone_and_goes_back():
    module = DiffusionTrainingModule(pipeline("sd"))
    state = {name: value.clone() for name, value in module.state_dict().items()}
    assert state
    assert all("lora_" in name for name in state)
    randomise(module)
    module.load_state_dict(state)
    assert_equal(state, dict(module.state_dict()))
    with pytest.raises(RuntimeError, match="1 tensors of adapters are missing"):
        module.load_state_dict(dict(list(state.items())[1:]))


def test_checkpoints_of_activations_change_no_gradient():
    found = []
    for kept in (False, True):
        pipe = randomise_all(pipeline("sd", components=WITH_TEXT["sd"]))
        module = DiffusionTrainingModule(pipe, gradient_checkpointing=kept).train()
        torch.manual_seed(1)
        module(**batch(module))["loss"].backward()
        found.append({n: p.grad for n, p in module.named_parameters() if p.requires_grad})
    assert_equal(*found)


def test_evaluation_is_the_same_each_time_and_draws_nothing():
    module = DiffusionTrainingModule(pipeline("sd"), seed=4)
    given = batch(module)

    def losses():
        module.eval()
        return [module(**given)["loss"].item() for _ in range(2)]

    state = torch.get_rng_state()
    first = losses()
    assert torch.equal(state, torch.get_rng_state())
    module.train()
    assert losses() == first
    assert first[0] != first[1]  # each batch has its own noise


def test_a_dropped_caption_is_an_empty_one():
    for kind in ("sd", "sdxl"):
        pipe = pipeline(kind)
        module = DiffusionTrainingModule(pipe, caption_dropout=1.0).train()
        plain = DiffusionTrainingModule(pipe).train()
        given = batch(module)
        torch.manual_seed(2)
        dropped = module(**given)["loss"]
        torch.manual_seed(2)
        empty = plain(pixel_values=given["pixel_values"], **plain.tokenize([""] * 4))["loss"]
        # one empty caption is encoded here, four there
        torch.testing.assert_close(dropped, empty, rtol=1e-5, atol=0)


# --- runs -----------------------------------------------------------------------------------------

RUNS = {
    "epsilon": ("sd", None, {"caption_dropout": 0.3}),
    "v": ("sd", "v_prediction", {"min_snr_gamma": 5.0, "noise_offset": 0.1}),
    "flux": ("flux", None, {"gradient_checkpointing": True, "longest_caption": 16}),
}


def trainer(case, out, **changes):
    kind, prediction, options = RUNS[case]
    pipe = pipeline(kind, prediction, components=WITH_TEXT[kind], dropout=0.1)
    module = DiffusionTrainingModule(pipe, **options)
    settings = {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 2, **changes}
    return LoraTrainer(
        module,
        arguments(out, **settings),
        train_dataset=rows(module),
        eval_dataset=rows(module, 4, seed=1),
    )


def picture(pipe, kind):
    generator = torch.Generator().manual_seed(0)
    call = {"prompt": "a cat", "generator": generator, **PIPELINES[kind].call}
    return pipe(**call).images


@pytest.mark.parametrize("case", RUNS)
def test_a_run_resumes_to_the_bit_and_its_file_loads_in_plain_diffusers(case, tmp_path):
    kind = RUNS[case][0]
    run = trainer(case, tmp_path / "a")
    untrained = picture(run.model.eval().pipe, kind)
    run.train()
    shutil.copytree(tmp_path / "a" / "checkpoint-2", tmp_path / "b" / "checkpoint-2")
    again = trainer(case, tmp_path / "b")
    again.train(resume_from_checkpoint=True)
    assert_equal(factors(run.model), factors(again.model))
    losses = [[r["loss"] for r in t.state.log_history if "loss" in r] for t in (run, again)]
    assert losses[0] == losses[1]

    folder = tmp_path / "a" / "checkpoint-4"
    names = {path.name for path in folder.iterdir()}
    assert "pytorch_lora_weights.safetensors" in names
    assert not names & {"model.safetensors", "adapter_model.safetensors"}
    assert set(open_adapter(folder).components) == set(WITH_TEXT[kind])
    plain = tiny_pipeline(kind)
    plain.scheduler = type(plain.scheduler).from_config(run.model.pipe.scheduler.config)
    plain.load_lora_weights(folder)
    trained = picture(run.model.eval().pipe, kind)
    assert torch.equal(picture(plain, kind), trained)
    assert not torch.equal(trained, untrained)


def test_a_checkpoint_is_adapter_and_optimizer(tmp_path):
    run = trainer("epsilon", tmp_path, max_steps=2)
    run.train()
    folder = tmp_path / "checkpoint-2"
    trained = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    saved = load_file(folder / "pytorch_lora_weights.safetensors")
    assert sum(tensor.numel() for tensor in saved.values()) == trained
    optimizer = torch.load(folder / "optimizer.pt", weights_only=True)["state"].values()
    assert sum(state["exp_avg"].numel() for state in optimizer) == trained
    assert [path.name for path in folder.glob("*.safetensors")] == [
        "pytorch_lora_weights.safetensors"
    ]


def test_the_best_adapter_is_loaded_at_the_end(tmp_path):
    run = trainer(
        "epsilon", tmp_path, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True,
        learning_rate=1.0,
    )  # fmt: skip
    run.train()
    losses = [row["eval_loss"] for row in run.state.log_history if "eval_loss" in row]
    assert len(set(losses)) == 2
    assert run.evaluate()["eval_loss"] == min(losses) == run.state.best_metric


def test_a_checkpoint_of_another_pipeline_or_adapter_is_refused(tmp_path):
    trainer("epsilon", tmp_path, max_steps=2).train()
    both = WITH_TEXT["sd"]
    others = {
        "r is 4 there and 2": pipeline("sd", rank=2, components=both),
        "its adapter is one for": pipeline("sd"),
        "saved on StableDiffusionPipeline": pipeline("sdxl", components=both),
    }
    for said, pipe in others.items():
        module = DiffusionTrainingModule(pipe)
        before = factors(module)
        run = LoraTrainer(module, arguments(tmp_path), train_dataset=rows(module))
        with pytest.raises(BadCheckpoint, match=said):
            run.train(resume_from_checkpoint=True)
        assert_equal(before, factors(module))


def test_a_pipeline_without_an_adapter_is_not_trained(tmp_path):
    module = DiffusionTrainingModule(tiny_pipeline("sd"))
    with pytest.raises(TrainingError, match="no adapter"):
        LoraTrainer(module, arguments(tmp_path), train_dataset=rows(module))


def test_a_picture_that_is_not_finite_stops_the_run(tmp_path):
    module = DiffusionTrainingModule(pipeline("sd"))
    data = rows(module)
    data[0]["pixel_values"][0, 0, 0] = math.nan
    settings = arguments(tmp_path, per_device_train_batch_size=8)
    run = LoraTrainer(module, settings, train_dataset=data)
    with pytest.raises(BadDataset, match="pixel_values go from nan"):
        run.train()


def test_a_plain_trainer_with_the_callback_resumes_as_well(tmp_path):
    def run(out, **kwargs):
        module = DiffusionTrainingModule(pipeline("sd"))
        data = cache_rows(module, images(6))
        made = Trainer(
            module,
            arguments(out, max_steps=4, save_steps=2, activation_checkpointing=True),
            train_dataset=data,
            callbacks=[LoraCallback()],
        )
        made.train(**kwargs)
        return factors(module)

    first = run(tmp_path)
    assert (tmp_path / "checkpoint-2" / "pytorch_lora_weights.safetensors").exists()
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["host"] == "StableDiffusionPipeline"
    assert_equal(first, run(tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-2")))


# --- cached rows ----------------------------------------------------------------------------------


def images(count=5):
    generator = np.random.default_rng(0)
    return [
        {
            "image": generator.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8),
            "caption": CAPTIONS[i % 4],
        }
        for i in range(count)
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_cached_rows_give_the_loss_of_the_pictures(kind, tmp_path):
    module = DiffusionTrainingModule(pipeline(kind), longest_caption=16).train()
    data = images()
    pixels = torch.stack([torch.from_numpy(row["image"]) for row in data]).permute(0, 3, 1, 2)
    plain = {"pixel_values": pixels / 127.5 - 1, **module.tokenize([r["caption"] for r in data])}
    cache_rows(module, data, folder=tmp_path, batch_size=2)
    for cached in (cache_rows(module, data, batch_size=5), open_cache(tmp_path, module)):
        assert len(cached) == 5
        one = [cached[i] for i in range(5)]
        together = {key: torch.stack([row[key] for row in one]) for key in one[0]}
        torch.manual_seed(1)
        loss = module(**together)["loss"]
        torch.manual_seed(1)
        torch.testing.assert_close(loss, module(**plain)["loss"], rtol=1e-5, atol=0)  # batch sizes


def test_captions_stay_ids_where_a_text_encoder_is_trained():
    module = DiffusionTrainingModule(pipeline("sd", components=WITH_TEXT["sd"]))
    assert set(cache_rows(module, images(2))[0]) == {"moments", "input_ids"}
    latents = cache_rows(module, images(2), moments=False)[1]["latents"]
    assert latents.shape == (4, SIDE // 2, SIDE // 2)
    with pytest.raises(BadDataset, match="text_encoder is trained"):
        module(latents=latents[None], prompt_embeds=torch.zeros(1, 16, 32))


def test_a_cache_of_other_models_or_a_broken_one_is_refused(tmp_path):
    module = DiffusionTrainingModule(pipeline("sd"))
    cache_rows(module, images(2), folder=tmp_path)
    with pytest.raises(InvalidOption, match="holds a cache"):
        cache_rows(module, images(2), folder=tmp_path)
    other = DiffusionTrainingModule(tiny_pipeline("sd", seed=9))
    with pytest.raises(BadDataset, match="another VAE"):
        open_cache(tmp_path, other)
    (tmp_path / "cache-00000.safetensors").unlink()
    with pytest.raises(BadDataset, match="lacks cache-00000"):
        open_cache(tmp_path, module)
    with pytest.raises(BadDataset, match="no whole cache"):
        open_cache(tmp_path / "nowhere", module)


BAD_ROWS = {
    "no caption": ({"caption": None}, "row 1: it has no caption"),
    "one pixel": ({"image": np.zeros((1, 1, 3), np.uint8)}, "row 1: pictures are 1 x 1"),
    "grey": ({"image": np.zeros((SIDE, SIDE), np.uint8)}, "row 1: the picture is"),
    "nothing": ({"image": None}, "row 1: the picture is"),
    "another size": ({"image": np.zeros((32, 32, 3), np.uint8)}, "row 1: its picture is"),
    "long caption": ({"caption": "a very long caption it is"}, "tokens and text_encoder takes 16"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row_is_named(case):
    change, said = BAD_ROWS[case]
    data = images(2)
    data[1] |= change
    with pytest.raises(BadDataset, match=said):
        cache_rows(DiffusionTrainingModule(pipeline("sd")), data)


def test_no_rows_are_no_cache():
    with pytest.raises(BadDataset, match="no rows"):
        cache_rows(DiffusionTrainingModule(pipeline("sd")), [])


# --- what cannot work -----------------------------------------------------------------------------

BAD_BATCHES = {
    "nothing": ({"pixel_values": None}, "no picture"),
    "two kinds of pictures": ({"latents": torch.zeros(4, 4, 8, 8)}, "one of pixel_values"),
    "no captions": ({"input_ids": None}, "no captions"),
    "one picture without a batch": ({"pixel_values": torch.zeros(3, 16, 16)}, "not \\(batch"),
    "grey": ({"pixel_values": torch.zeros(4, 1, 16, 16)}, "not \\(batch, 3"),
    "bytes": ({"pixel_values": torch.zeros(4, 3, 16, 16, dtype=torch.uint8)}, "not floats"),
    "0 to 255": ({"pixel_values": torch.full((4, 3, 16, 16), 255.0)}, "go from 255"),
    "odd size": ({"pixel_values": torch.zeros(4, 3, 15, 16)}, "no multiples of 2"),
    "one pixel": ({"pixel_values": torch.zeros(4, 3, 1, 1)}, "1 x 1 pixels"),
    "long captions": ({"input_ids": torch.ones(4, 17).long()}, "17 tokens long"),
    "unknown tokens": ({"input_ids": torch.full((4, 16), 10**6)}, "knows"),
    "ids that are floats": ({"input_ids": torch.ones(4, 16)}, "not whole numbers"),
    "fewer captions": ({"input_ids": torch.ones(3, 16).long()}, "for 4 pictures"),
    "a second encoder": ({"input_ids_2": torch.ones(4, 16).long()}, "has 1"),
}


@pytest.mark.parametrize("case", BAD_BATCHES)
def test_a_bad_batch_is_named(case):
    change, said = BAD_BATCHES[case]
    module = DiffusionTrainingModule(pipeline("sd")).train()
    with pytest.raises(BadDataset, match=said):
        module(**(batch(module) | change))


def test_cached_tensors_that_do_not_fit_are_named():
    module = DiffusionTrainingModule(pipeline("sdxl")).train()
    text = {"prompt_embeds": torch.zeros(1, 16, 64)}
    with pytest.raises(BadDataset, match="pooled_prompt_embeds are none"):
        module(latents=torch.zeros(1, 4, 8, 8), **text)
    text["pooled_prompt_embeds"] = torch.zeros(1, 32)
    with pytest.raises(BadDataset, match="time_ids are"):
        module(latents=torch.zeros(1, 4, 8, 8), time_ids=torch.zeros(1, 4), **text)
    with pytest.raises(BadDataset, match="Cache them anew"):
        module(latents=torch.zeros(1, 16, 8, 8), **text)
    with pytest.raises(BadDataset, match="not finite"):
        module(latents=torch.full((1, 4, 8, 8), math.inf), **text)


BAD_OPTIONS = {
    "prediction": ("sd", {"prediction": "sample"}, "is none of epsilon"),
    "flow on DDIM": ("sd", {"prediction": "flow"}, "with a DDIMScheduler"),
    "epsilon on flow": ("flux", {"prediction": "epsilon"}, "with a FlowMatch"),
    "sampling": ("flux", {"sampling": "often"}, "is none of uniform"),
    "weighting": ("flux", {"weighting": None}, "is none of none"),
    "weighting of DDIM": ("sd", {"weighting": "cosmap"}, "does nothing"),
    "gamma of flow": ("flux", {"min_snr_gamma": 5.0}, "does nothing"),
    "gamma": ("sd", {"min_snr_gamma": 0.0}, "no number"),
    "offset": ("sd", {"noise_offset": math.nan}, "no number"),
    "dropout": ("sd", {"caption_dropout": 1.5}, "no number of 0.0 to 1.0"),
    "seed": ("sd", {"seed": -1}, "seed=-1"),
    "components": ("sd", {"components": "unet"}, "must be a list"),
    "no denoiser": ("sd", {"components": ["text_encoder"]}, "must be a list with unet"),
    "longest": ("flux", {"longest_caption": 0}, "no number of 1"),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_an_option_that_cannot_work_is_named(case):
    kind, options, said = BAD_OPTIONS[case]
    with pytest.raises(InvalidOption, match=said):
        DiffusionTrainingModule(tiny_pipeline(kind), **options)


def test_an_adapter_on_a_part_that_is_left_out_is_an_error():
    pipe = pipeline("sd", components=WITH_TEXT["sd"])
    module = DiffusionTrainingModule(pipe, components=["unet"]).train()
    with pytest.raises(InvalidOption, match="text_encoder has an adapter"):
        module(**batch(module))


def test_adapters_go_onto_the_pipeline_and_not_onto_the_module():
    module = DiffusionTrainingModule(pipeline("sd"))
    before = factors(module)
    for wrong in (lambda: attach_lora(module, name="other"), lambda: save_lora(module, "x")):
        with pytest.raises(UnsupportedHost, match="trains a StableDiffusionPipeline"):
            wrong()
    assert_equal(before, factors(module))


def test_hosts_that_are_not_known_are_refused():
    with pytest.raises(UnsupportedHost, match="no training of WanPipeline is known"):
        DiffusionTrainingModule(tiny_pipeline("wan"))
    with pytest.raises(UnsupportedHost, match="a pipeline is needed"):
        DiffusionTrainingModule(tiny("llama"))
