"""What `DiffusionTrainingModule` takes and refuses: pipelines, batches, rows and caches."""

import json
import shutil
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainingArguments, set_seed

from hf_lora import BadDataset, InvalidOption, LoraTrainer, UnsupportedHost
from hf_lora.testing import tiny, tiny_pipeline
from hf_lora.training.diffusion import DiffusionTrainingModule, cache, cache_rows, open_cache
from hf_lora.training.diffusion.losses import SAMPLINGS, DiffusionNoise, FlowNoise
from hf_lora.training.processes import spread_noise
from tests.runs import arguments
from tests.test_diffusion_training import (
    CAPTIONS,
    SIDE,
    WITH_TEXT,
    batch,
    images,
    pictures,
    pipeline,
    rows,
)

Module = DiffusionTrainingModule


# --- several processes ----------------------------------------------------------------------------


def drawn_after(rank, step, model):
    set_seed(3)
    spread_noise(SimpleNamespace(process_index=rank), SimpleNamespace(global_step=step), model)
    return torch.randn(4)


def test_each_process_of_a_fresh_run_draws_its_own_noise():
    module = Module(tiny_pipeline("sd"))
    set_seed(3)
    first = torch.randn(4)
    ranks = [drawn_after(rank, 0, module) for rank in range(3)]
    assert torch.equal(ranks[0], first)
    assert len({tuple(noise.tolist()) for noise in ranks}) == 3
    # a resumed run has the states of its checkpoint; other models draw dropout alone
    assert torch.equal(drawn_after(1, 2, module), first)
    assert torch.equal(drawn_after(1, 0, tiny("llama")), first)


def test_processes_still_shuffle_alike_in_a_second_run():
    # accelerate's sampler takes torch.initial_seed() where there is no data_seed (1.15)
    module = Module(tiny_pipeline("sd"))
    seeds = set()
    for rank in range(3):
        drawn_after(rank, 0, module)
        seeds.add(torch.initial_seed())
    assert seeds == {3}


def test_a_run_on_another_process_has_other_timesteps(tmp_path, monkeypatch):
    seen = []
    for rank in (0, 1, 0):
        monkeypatch.setattr(TrainingArguments, "process_index", rank)
        module = Module(pipeline("sd"))
        at = module.noise.at
        module.noise.at = lambda x, n, steps, at=at: seen.append(steps.tolist()) or at(x, n, steps)
        settings = arguments(tmp_path, max_steps=1, save_strategy="no")
        LoraTrainer(module, settings, train_dataset=rows(module)).train()
    assert seen[0] == seen[2] != seen[1]


# --- schedulers -----------------------------------------------------------------------------------


def with_scheduler(kind, name, **config):
    pipe = tiny_pipeline(kind)
    pipe.scheduler = getattr(diffusers, name)(**config)
    return pipe


@pytest.mark.parametrize(
    "name", ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler", "UnCLIPScheduler"]
)
def test_noise_that_no_betas_describe_is_refused(name):
    with pytest.raises(UnsupportedHost, match=f"noise of {name}"):
        Module(with_scheduler("sdxl", name))


FLOWS = ("UniPCMultistepScheduler", "DPMSolverMultistepScheduler")


@pytest.mark.parametrize("name", FLOWS)
def test_a_solver_of_flow_keeps_its_shift_and_the_sampling_of_the_denoiser(name):
    pipe = with_scheduler(
        "sd3", name, use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction"
    )
    noise = Module(pipe).noise
    assert noise._sample is SAMPLINGS["logit_normal"]
    found = noise.at(torch.zeros(1, 4, 2, 2), torch.ones(1, 4, 2, 2), torch.tensor([500]))
    # 0.5 of the way, shifted: 3 * 0.5 / (1 + 2 * 0.5); float32
    assert found.noisy[0, 0, 0, 0].item() == pytest.approx(0.75, rel=1e-6)
    assert found.timesteps.item() == pytest.approx(750, rel=1e-6)


@pytest.mark.parametrize(
    ("kind", "name"), [("flux", "EulerDiscreteScheduler"), ("sd3", "DDIMScheduler")]
)
def test_a_denoiser_of_flow_with_another_scheduler_is_refused(kind, name):
    with pytest.raises(UnsupportedHost, match=f"flow matching, and {name}"):
        Module(with_scheduler(kind, name))


def test_a_unet_may_learn_flow():
    noise = Module(with_scheduler("sd", "FlowMatchEulerDiscreteScheduler", shift=2.0)).noise
    assert isinstance(noise, FlowNoise)
    assert noise._sample is SAMPLINGS["uniform"]
    assert isinstance(Module(with_scheduler("sd", "LCMScheduler")).noise, DiffusionNoise)


# --- the VAE --------------------------------------------------------------------------------------


def test_means_and_deviations_of_latents_count_as_in_the_script_of_sdxl():
    module = Module(pipeline("sdxl"))
    drawn = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    mean, deviation = [0.1, -0.2, 0.3, 0.0], [1.0, 2.0, 0.5, 4.0]
    module.pipe.vae.register_to_config(latents_mean=mean, latents_std=deviation)
    m, d = (torch.tensor(x).view(1, 4, 1, 1) for x in (mean, deviation))
    wanted = (drawn - m) * module.pipe.vae.config.scaling_factor / d
    moments = torch.cat([drawn, torch.full_like(drawn, -1e9)], 1)  # no deviation but rounding
    torch.testing.assert_close(module.inputs.latents_of(moments), wanted, rtol=1e-5, atol=1e-5)


def test_the_vae_keeps_its_precision_in_a_run_of_mixed_precision():
    inputs = Module(pipeline("sdxl")).inputs
    plain = inputs.encoded(pictures())["moments"]
    with torch.autocast("cpu", torch.bfloat16):
        mixed = inputs.encoded(pictures())["moments"]
    assert mixed.dtype == torch.float32
    assert torch.equal(plain, mixed)


def test_a_half_precision_vae_that_must_not_be_runs_in_float32():
    module = Module(pipeline("sdxl"))
    vae = module.pipe.vae.half()
    assert vae.config.force_upcast
    found = module.inputs.encoded(pictures())["moments"]
    assert vae.dtype == torch.float16
    with torch.no_grad():
        wanted = vae.float().encode(pictures()).latent_dist.parameters
    assert torch.equal(found, wanted)


def tiny_vae():
    set_seed(0)
    return diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
        latent_channels=4,
        scaling_factor=1.5,
    ).eval()


def test_a_tiny_autoencoder_trains_and_its_cache_holds_latents():
    pipe = pipeline("sd")
    pipe.vae = tiny_vae()
    module = Module(pipe).train()
    module(**batch(module))["loss"].backward()
    data = images(2)
    cached = cache_rows(module, data)
    assert set(cached[0]) == {"latents", "prompt_embeds"}
    pixels = torch.stack([cache.pixels_of(row["image"]) for row in data])
    with torch.no_grad():
        wanted = pipe.vae.encode(pixels).latents * 1.5
    assert torch.equal(torch.stack([cached[0]["latents"], cached[1]["latents"]]), wanted)


# --- the module -----------------------------------------------------------------------------------


def test_a_lenient_load_leaves_the_base_and_tells_what_it_left_out():
    module = Module(pipeline("sd"))
    name = "unet.conv_in.weight"
    before = module.pipe.unet.conv_in.weight.clone()
    result = module.load_state_dict({name: torch.zeros_like(before)}, strict=False)
    assert torch.equal(module.pipe.unet.conv_in.weight, before)
    assert result.unexpected_keys == [name]
    assert result.missing_keys == sorted(module.state_dict())


def test_parts_without_an_adapter_stay_in_evaluation_mode():
    pipe = pipeline("flux")
    for part in (pipe.text_encoder_2, pipe.vae, pipe.text_encoder):
        part.train()
    module = Module(pipe)
    for step in range(2):
        for part in (pipe.text_encoder_2, pipe.vae, pipe.text_encoder):
            assert not any(one.training for one in part.modules())
        pipe.text_encoder_2.train()
        module.train(step == 0)
        assert pipe.transformer.training == (step == 0)


def test_a_text_encoder_with_an_adapter_is_trained_with_its_dropout():
    module = Module(pipeline("sd", components=WITH_TEXT["sd"])).train()
    assert module.pipe.text_encoder.training
    assert not module.pipe.vae.training


@pytest.mark.parametrize("kind", ["sd", "sd3"])
def test_the_loss_of_an_evaluation_does_not_depend_on_its_batches(kind):
    module = Module(pipeline(kind), longest_caption=16)
    given = batch(module)

    def loss(size):
        module.eval()
        parts = [{k: v[i : i + size] for k, v in given.items()} for i in range(0, 4, size)]
        return sum(module(**part)["loss"].item() * size for part in parts) / 4

    one = loss(1)
    assert [loss(2), loss(4)] == pytest.approx([one, one], rel=1e-5)  # sums in another order
    module.eval()
    turned = module(**{k: v.flip(0) for k, v in given.items()})["loss"].item()
    assert turned != pytest.approx(one, rel=1e-4)  # the noise is that of a place


def test_weights_in_eight_bits_are_computed_with_in_the_denoisers_precision():
    for kind in ("sd", "flux"):
        pipe = pipeline(kind)
        name = "unet" if kind == "sd" else "transformer"
        getattr(pipe, name).enable_layerwise_casting(
            storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32
        )
        module = Module(pipe).train()
        assert module.inputs.dtype == torch.float32
        plain = Module(pipeline(kind)).train()
        torch.manual_seed(1)
        rough = module(**batch(module))["loss"].item()
        torch.manual_seed(1)
        # weights of 3 bits of mantissa, the rest is exact
        assert rough == pytest.approx(plain(**batch(plain))["loss"].item(), rel=0.1)


# --- pipelines ------------------------------------------------------------------------------------


def test_sd3_without_t5_reads_captions_as_its_pipeline_does():
    pipe = pipeline("sd3")
    pipe.text_encoder_3 = pipe.tokenizer_3 = None
    module = Module(pipe, longest_caption=12, caption_dropout=0.5).train()
    given = batch(module)
    assert {"input_ids", "input_ids_2"} == given.keys() - {"pixel_values"}
    found = module.inputs.encode([given["input_ids"], given["input_ids_2"]])
    embeds, _, pooled, _ = pipe.encode_prompt(
        CAPTIONS, None, None, do_classifier_free_guidance=False, max_sequence_length=12
    )
    assert torch.equal(found.embeds, embeds)
    assert torch.equal(found.pooled, pooled)
    module(**given)["loss"].backward()
    cached = cache_rows(module, images(2))[0]
    assert cached["prompt_embeds"].shape == embeds.shape[1:]


def test_pipelines_that_tell_their_denoiser_more_are_refused():
    parts = tiny_pipeline("flux").components
    with pytest.raises(UnsupportedHost, match="FluxKontextPipeline gives its denoiser a picture"):
        Module(diffusers.FluxKontextPipeline(**parts))
    pipe = tiny_pipeline("sd")
    pipe.text_encoder.config.use_attention_mask = True
    with pytest.raises(UnsupportedHost, match="attention mask"):
        Module(pipe)
    pipe = tiny_pipeline("sd")
    pipe.unet.register_to_config(time_cond_proj_dim=32)
    with pytest.raises(UnsupportedHost, match="time_cond_proj_dim"):
        Module(pipe)


def test_lengths_that_are_no_whole_numbers_are_refused():
    with pytest.raises(InvalidOption, match="longest_caption=16.5 is no whole number"):
        Module(tiny_pipeline("flux"), longest_caption=16.5)


# --- batches --------------------------------------------------------------------------------------


@pytest.mark.parametrize("captions", ["a cat", []])
def test_captions_are_a_list_that_is_not_empty(captions):
    with pytest.raises(BadDataset, match="not a list of texts"):
        Module(tiny_pipeline("sd")).tokenize(captions)


def test_text_that_does_not_fit_the_denoiser_is_named():
    module = Module(pipeline("sdxl")).train()
    latents = torch.zeros(2, 4, 8, 8)
    ids = module.tokenize(["a", "b"])
    text = module.inputs.encode(list(ids.values()))
    embeds, pooled = {"prompt_embeds": text.embeds}, {"pooled_prompt_embeds": text.pooled}
    cases = [
        ({**embeds, **ids}, "both token ids and prompt_embeds"),
        ({"input_ids": ids["input_ids"], "input_ids_3": ids["input_ids"]}, "no input_ids_2"),
        ({"input_ids_2": ids["input_ids_2"]}, "has input_ids_2 and no input_ids"),
        ({name: x.bool() for name, x in ids.items()}, "not whole numbers"),
        ({**pooled, "prompt_embeds": text.embeds[..., :-1]}, "prompt_embeds are 63 wide"),
        ({**pooled, "prompt_embeds": text.embeds.long()}, "int64"),
        ({**pooled, "prompt_embeds": text.embeds * torch.nan}, "prompt_embeds hold values"),
        ({**embeds, "pooled_prompt_embeds": text.pooled[:, 1:]}, "31 wide"),
    ]
    for given, said in cases:
        with pytest.raises(BadDataset, match=said):
            module(latents=latents, **given)


# --- caches ---------------------------------------------------------------------------------------


def scaled(pipe):
    pipe.vae.register_to_config(scaling_factor=0.5)


def moved(pipe):
    with torch.no_grad():
        pipe.text_encoder.get_input_embeddings().weight[1:] += 1.0


def padded(pipe):
    pipe.tokenizer.pad_token = pipe.tokenizer.convert_ids_to_tokens(5)


@pytest.mark.parametrize("change", [scaled, moved, padded])
def test_a_cache_of_what_has_changed_since_is_refused(change, tmp_path):
    module = Module(pipeline("sd"))
    cache_rows(module, images(2), folder=tmp_path, moments=False)
    assert len(open_cache(tmp_path, module)) == 2
    change(module.pipe)
    with pytest.raises(BadDataset, match="made with another VAE, or other tokenizers"):
        open_cache(tmp_path, module)


def test_a_cache_of_another_longest_caption_is_refused(tmp_path):
    cache_rows(Module(pipeline("flux"), longest_caption=8), short(2), folder=tmp_path)
    with pytest.raises(BadDataset, match="other tokenizers"):
        open_cache(tmp_path, Module(pipeline("flux"), longest_caption=9))


def short(count):
    return [{**row, "caption": "a"} for row in images(count)]


def test_what_is_not_finite_does_not_go_into_a_cache(tmp_path):
    module = Module(pipeline("sd"))
    with torch.no_grad():
        module.pipe.vae.encoder.conv_in.weight.fill_(torch.inf)
    with pytest.raises(BadDataset, match=r"row 0: what VAE .* is not finite \(moments\)"):
        cache_rows(module, images(3), folder=tmp_path)
    assert not list(tmp_path.iterdir())
    module = Module(pipeline("sd"))
    first, second = module.tokenize(CAPTIONS[:2])["input_ids"].tolist()
    letter = min(set(second) - set(first))
    with torch.no_grad():
        module.pipe.text_encoder.get_input_embeddings().weight[letter] = torch.nan
    with pytest.raises(BadDataset, match=r"row 1: .* is not finite \(prompt_embeds\)"):
        cache_rows(module, images(2))


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(cache, "_SHARD", 2)


def test_two_writers_do_not_mix_their_rows(tmp_path, monkeypatch, small_shards):
    module = Module(pipeline("sd"))
    write, others = cache.replace_files, []

    def meanwhile(files):
        write(files)
        if not others:  # the first has written one shard, and another process all of its own
            others.append(None)
            others[0] = cache_rows(module, short(4), folder=tmp_path)

    monkeypatch.setattr(cache, "replace_files", meanwhile)
    with pytest.raises(InvalidOption, match="holds a cache"):
        cache_rows(module, images(3), folder=tmp_path)
    found = open_cache(tmp_path, module)
    assert len(found) == 4
    for i in range(4):
        assert torch.equal(found[i]["moments"], others[0][i]["moments"])


def test_a_shard_of_another_run_is_found_out(tmp_path, small_shards):
    module = Module(pipeline("sd"))
    for name in ("a", "b"):
        made = cache_rows(module, images(4), folder=tmp_path / name)
    shutil.copy(tmp_path / "a" / "cache-00001.safetensors", tmp_path / "b")
    with pytest.raises(BadDataset, match="another run has written this part"):
        open_cache(tmp_path / "b", module)
    made[0]
    with pytest.raises(BadDataset, match="another run has written this part"):
        made[3]


def broken(path):
    path.write_bytes(path.read_bytes()[:-100])


def shorter(path):
    with cache.safe_open(path, "pt") as shard:
        told = shard.metadata()
    save_file({name: x[:1].clone() for name, x in load_file(path).items()}, path, told)


def fieldless(path):
    with cache.safe_open(path, "pt") as shard:
        told = shard.metadata()
    save_file({"moments": load_file(path)["moments"]}, path, told)


@pytest.mark.parametrize(
    ("harm", "said"),
    [(broken, "cannot be read"), (shorter, "and 3 rows each"), (fieldless, "cannot be read")],
)
def test_a_broken_shard_is_named_when_the_cache_is_opened(harm, said, tmp_path):
    module = Module(pipeline("sd"))
    cache_rows(module, images(3), folder=tmp_path)
    harm(tmp_path / "cache-00000.safetensors")
    with pytest.raises(BadDataset, match=f"cache-00000.safetensors: .*{said}"):
        open_cache(tmp_path, module)


def test_an_index_whose_fields_are_no_list_is_refused(tmp_path):
    module = Module(pipeline("sd"))
    cache_rows(module, images(1), folder=tmp_path)
    index = json.loads((tmp_path / "cache.json").read_text())
    (tmp_path / "cache.json").write_text(json.dumps({**index, "fields": "moments"}))
    with pytest.raises(BadDataset, match="is not of format"):
        open_cache(tmp_path, module)


def test_a_cache_is_read_from_where_it_was_opened(tmp_path, monkeypatch):
    module = Module(pipeline("sd"))
    monkeypatch.chdir(tmp_path)
    cache_rows(module, images(1), folder="kept")
    found = open_cache("kept", module)
    monkeypatch.chdir("/")
    assert found[0]["moments"].ndim == 3


def test_a_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InvalidOption, match="is no folder"):
        cache_rows(Module(pipeline("sd")), images(1), folder=tmp_path / "file")


def numbered(**changes):
    """Rows with pictures as numbers from 0 to 1."""
    plain = pictures(2).abs()
    return [{"pixel_values": one, "caption": "a", **changes} for one in plain]


def test_sizes_of_rows_are_kept_beside_their_pictures():
    module = Module(pipeline("sdxl")).train()
    told = [64.0, 32.0, 0.0, 8.0, 16.0, 16.0]
    cached = cache_rows(module, numbered(time_ids=told))
    assert cached[1]["time_ids"].tolist() == told
    module(**{key: torch.stack([row[key] for row in cached]) for key in cached[0]})
    first, second = numbered(time_ids=told)
    with pytest.raises(BadDataset, match="row 1: it has no time_ids"):
        cache_rows(module, [first, {**second, "time_ids": None}])
    for wrong in ([1.0, 2.0], "six", [np.inf] * 6):
        with pytest.raises(BadDataset, match="row 0: its time_ids are"):
            cache_rows(module, numbered(time_ids=wrong))


def test_pictures_that_are_no_numbers_are_named_by_their_row():
    data = numbered()
    data[1]["pixel_values"] = "x"
    with pytest.raises(BadDataset, match="row 1: its pixel_values are 'x', no tensor"):
        cache_rows(Module(pipeline("sd")), data)


def test_pictures_from_zero_to_one_are_warned_of(monkeypatch):
    module, said = Module(pipeline("sd")), []
    monkeypatch.setattr(cache.logger, "warning", said.append)
    white = {"image": np.full((SIDE, SIDE, 3), 255, np.uint8), "caption": "a"}
    cache_rows(module, [white, *images(1)])
    data = numbered()
    data[1]["pixel_values"] = data[1]["pixel_values"] * 2 - 1
    cache_rows(module, data)
    cache_rows(module, [white, white])  # bytes are read rightly
    assert not said
    cache_rows(module, numbered())
    assert len(said) == 1
    assert "no picture has a value below 0" in said[0]


def test_a_whole_model_that_holds_the_module_has_its_adapters_in_the_state():
    outer = nn.Module()
    outer.inner = Module(pipeline("sd"))
    assert all("lora_" in name for name in outer.state_dict())
