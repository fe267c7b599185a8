"""One training step of a style LoRA at the size of Stable Diffusion 1.5: time, memory, checkpoint.

The shapes are those of the real pipeline (UNet 860 M, VAE 84 M, text encoder 123 M parameters), the
weights random. The peer is the step of diffusers' text_to_image script: plain peft over the UNet,
VAE and text encoder run at each step. Adapters, batch, noise and optimizer are the same. About ten
minutes on two cores, 12 GB of memory:

    python benchmarks/diffusion_train.py [--side 256] [--batch 1] [--rounds 5] [--small]
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from _training import cpu_seconds, machine, mb, optimizer_of, peak_bytes, table
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModel

from hf_lora import DiffusionTrainingModule, LoraTrainer, attach_lora, detach_lora
from hf_lora.testing import tiny_pipeline
from hf_lora.training.diffusion import cache_rows

RANK = 16
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]


def pipeline(small):
    """Returns a pipeline of the shapes of SD 1.5, frozen; `small` has a quarter of the channels."""
    part = 4 if small else 1
    torch.manual_seed(0)
    with torch.device("cpu"):
        unet = UNet2DConditionModel(
            sample_size=64, cross_attention_dim=768, attention_head_dim=8,
            block_out_channels=[c // part for c in (320, 640, 1280, 1280)],
            norm_num_groups=32 // part,
        )  # fmt: skip
        vae = AutoencoderKL(
            block_out_channels=[c // part for c in (128, 256, 512, 512)], layers_per_block=2,
            down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
            latent_channels=4, sample_size=512,
        )  # fmt: skip
        text = CLIPTextModel(
            CLIPTextConfig(
                hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
                num_attention_heads=12,
            )
        )  # fmt: skip
    tokenizer = tiny_pipeline("sd").tokenizer
    tokenizer.model_max_length = 77
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1)
    pipe = StableDiffusionPipeline(
        vae, text, tokenizer, unet, scheduler, None, None,
        requires_safety_checker=False,
    )  # fmt: skip
    for name in ("unet", "vae", "text_encoder"):
        getattr(pipe, name).requires_grad_(False)
    return pipe


def script_step(pipe, batch):
    """Returns a step as diffusers' script makes it, over plain peft."""
    unet = pipe.unet.train()
    optimizer = optimizer_of(unet)
    trained = [p for p in unet.parameters() if p.requires_grad]

    def step():
        latents = pipe.vae.encode(batch["pixel_values"]).latent_dist.sample()
        latents = latents * pipe.vae.config.scaling_factor
        noise = torch.randn_like(latents)
        steps = torch.randint(0, 1000, (len(latents),))
        noisy = pipe.scheduler.add_noise(latents, noise, steps)
        text = pipe.text_encoder(batch["input_ids"])[0]
        made = unet(noisy, steps, text, return_dict=False)[0]
        functional.mse_loss(made.float(), noise.float()).backward()
        finish(trained, optimizer)

    return step


def module_step(module, batch):
    module.train()
    optimizer = optimizer_of(module)
    trained = [p for p in module.parameters() if p.requires_grad]

    def step():
        module(**batch)["loss"].backward()
        finish(trained, optimizer)

    return step


def finish(trained, optimizer):
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def checkpointed(module, step):
    """Returns the step with activations computed again in its backward pass."""

    def again():
        module.activation_checkpointing_enable()
        step()
        module.pipe.unet.disable_gradient_checkpointing()

    return again


def checkpoint(module, rows):
    """Returns (bytes of a checkpoint, bytes of adapter and optimizer state)."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            folder, max_steps=1, save_steps=1, per_device_train_batch_size=1, report_to="none",
            use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False, logging_strategy="no",
        )  # fmt: skip
        trainer = LoraTrainer(module, arguments, train_dataset=rows)
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
        written = sum(f.stat().st_size for f in Path(folder, "checkpoint-1").rglob("*"))
    adapter = sum(p.numel() for p in module.parameters() if p.requires_grad) * 4
    return written, adapter * 3  # AdamW keeps two values for each


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args()
    print(machine())
    pipe = pipeline(args.small)
    draw = np.random.default_rng(0)
    size = (args.side, args.side, 3)
    rows = [
        {"caption": "a", "image": draw.integers(0, 256, size, np.uint8)} for _ in range(args.batch)
    ]

    pipe.unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=ATTENTION))
    images = np.stack([row["image"] for row in rows])
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1
    module = DiffusionTrainingModule(pipe)  # one adapter serves all ways
    raw = {"pixel_values": pixels, **module.tokenize([row["caption"] for row in rows])}
    cached_rows = cache_rows(module, rows)
    cached = torch.utils.data.default_collate([cached_rows[i] for i in range(len(rows))])
    ways = {
        "diffusers' script": script_step(pipe, raw),
        "hf_lora": module_step(module, raw),
        "hf_lora, cached": module_step(module, cached),
    }
    ways["hf_lora, cached, checkpointed"] = checkpointed(module, ways["hf_lora, cached"])
    seconds = cpu_seconds(ways, args.rounds)
    peaks = {name: peak_bytes(step) for name, step in ways.items()}
    first = next(iter(ways))
    table(
        ["step", "CPU time", "peak memory of the step", "MB"],
        [
            [name, f"{seconds[name] / seconds[first]:.2f}", f"{peaks[name] / peaks[first]:.2f}",
             mb(peaks[name])]
            for name in ways
        ],
    )  # fmt: skip
    detach_lora(pipe)
    attach_lora(pipe, rank=RANK)
    written, least = checkpoint(DiffusionTrainingModule(pipe), cached_rows)
    said = f"checkpoint {written:,} bytes, adapter and optimizer state {least:,}"
    print(f"{said}: {written / least:.3f}")


if __name__ == "__main__":
    main()
