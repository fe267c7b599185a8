"""A small text-to-image pipeline learns Noto emoji from nothing.

It is a `StableDiffusionPipeline` of 3.6 M parameters: a VAE (64 x 64 pixels to 16 x 16 x 8), a CLIP
text encoder of two layers and a UNet that predicts velocity. All is trained here, on Noto alone:
first on its pictures, then on these and on what `manners.py` makes of them, half of each.
About two hours on two cores; when it is stopped, the same command goes on:

    python train_base.py FOLDER        # with the pictures.npz of pictures.py
"""

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from manners import in_manners
from pictures import BASE, CONCEPTS, HERE, SIDE, caption
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from hf_lora.training.diffusion.losses import DiffusionNoise, loss_of

TOKENS = 16  # the longest caption
BATCH = 64
EVERY = 250  # steps from one checkpoint to the next
DROPPED = 0.1  # captions left out, for guidance


def make_vae():
    return AutoencoderKL(
        block_out_channels=(16, 32, 64), down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3, latent_channels=8, norm_num_groups=8,
        sample_size=SIDE, mid_block_add_attention=False,
    )  # fmt: skip


def make_unet():
    return UNet2DConditionModel(
        sample_size=SIDE // 4, in_channels=8, out_channels=8, block_out_channels=(48, 96),
        down_block_types=["CrossAttnDownBlock2D"] * 2, up_block_types=["CrossAttnUpBlock2D"] * 2,
        cross_attention_dim=128, attention_head_dim=(2, 3), norm_num_groups=8, layers_per_block=1,
    )  # fmt: skip


def make_tokenizer(captions, folder):
    """Returns a CLIP tokenizer whose merges are learnt from the captions."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    special = ["<|startoftext|>", "<|endoftext|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=1000, end_of_word_suffix="</w>", show_progress=False, special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    bpe.train_from_iterator(captions, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    vocab, merges = bpe.model.save(str(folder))
    return CLIPTokenizer(vocab, merges, model_max_length=TOKENS, pad_token=special[1])


def make_text_encoder(tokenizer):
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            projection_dim=128,
            max_position_embeddings=TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def make_scheduler():
    return DDIMScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing",
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False,
        set_alpha_to_one=True, steps_offset=1,
    )  # fmt: skip


def floats(pictures):
    """Returns bytes (n, height, width, 3) as (n, 3, height, width) in [-1, 1]."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def shapes(count, rng):
    """Returns random ellipses and polygons, half of them with an outline: what Noto does not have.

    The VAE must show what styles will draw later, and sees Noto alone besides.
    """
    from PIL import Image, ImageDraw

    made = []
    for _ in range(count):
        picture = Image.new("RGB", (SIDE * 2, SIDE * 2), "white")
        draw = ImageDraw.Draw(picture)
        for _ in range(rng.integers(3, 9)):
            fill = tuple(int(x) for x in rng.integers(0, 256, 3))
            line = (
                {"outline": "black", "width": int(rng.integers(2, 7))} if rng.random() < 0.5 else {}
            )
            spots = rng.integers(8, SIDE * 2 - 8, (int(rng.integers(3, 7)), 2))
            if rng.random() < 0.5:
                (x, y), size = spots[0], rng.integers(6, 70, 2)
                draw.ellipse([x, y, x + size[0], y + size[1]], fill=fill, **line)
            else:
                draw.polygon([tuple(map(int, s)) for s in spots], fill=fill, **line)
        made.append(np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.BOX)))
    return floats(np.stack(made))


def edges(x):
    """Returns differences of neighbours, across and down."""
    return x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :]


class Run:
    """Steps of AdamW at a rate that falls as a cosine, with checkpoints that a new start finds."""

    def __init__(self, file, parts, steps, rate, log, average=0.998):
        self.average = average  # how much of the running average of weights a step keeps
        self.file, self.parts, self.steps, self.rate, self.log = file, parts, steps, rate, log
        self.weights = [p for part in parts.values() for p in part.parameters()]
        self.averages = [p.detach().clone() for p in self.weights]
        self.optimizer = torch.optim.AdamW(self.weights, lr=rate, weight_decay=0.01, fused=True)
        self.step, self.seconds = 0, 0.0
        if file.exists():
            state = torch.load(file, weights_only=True)
            for name, part in parts.items():
                part.load_state_dict(state[name])
            self.optimizer.load_state_dict(state["optimizer"])
            self.averages, self.step = state["averages"], state["step"]
            self.seconds = state["seconds"]
            torch.set_rng_state(state["random"])

    def save(self):
        """Writes all that a new start needs, whole or not at all."""
        state = {name: part.state_dict() for name, part in self.parts.items()}
        state |= {"optimizer": self.optimizer.state_dict(), "averages": self.averages}
        state |= {"step": self.step, "seconds": self.seconds, "random": torch.get_rng_state()}
        aside = self.file.with_suffix(".part")
        torch.save(state, aside)
        aside.replace(self.file)

    def go(self, loss_of_step):
        """Runs the steps that are left and puts the running average into the parts."""
        said = 0.0
        while self.step < self.steps:
            start = time.monotonic()
            warm = min(1.0, (self.step + 1) / 100)
            rate = (
                self.rate
                * warm
                * (0.02 + 0.98 * (1 + math.cos(math.pi * self.step / self.steps)) / 2)
            )
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            with torch.autocast("cpu", torch.bfloat16):
                loss = loss_of_step()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.step += 1
            keep = min(self.average, self.step / (self.step + 10))
            torch._foreach_lerp_(self.averages, [p.detach() for p in self.weights], 1 - keep)
            said += float(loss.detach())
            self.seconds += time.monotonic() - start
            if self.step % EVERY == 0 or self.step == self.steps:
                row = {"what": self.file.stem, "step": self.step, "loss": round(said / EVERY, 5)}
                self.log(row | {"seconds": round(self.seconds)})
                said = 0.0
                self.save()
        for weight, average in zip(self.weights, self.averages, strict=True):
            weight.data.copy_(average)
        self.save()


def train_vae(folder, every, steps, log):
    """Returns a VAE that shows Noto's pictures and random shapes again."""
    torch.manual_seed(0)
    vae = make_vae()
    run = Run(folder / "vae.pt", {"vae": vae}, steps, 2e-3, log)
    noto, drawn = floats(every), shapes(2000, np.random.default_rng(0))

    def loss():
        x = torch.cat([noto[torch.randint(len(noto), (24,))], drawn[torch.randint(2000, (8,))]])
        mixed = x[:, torch.randperm(3)] if torch.rand(()) < 0.5 else x  # other colours
        x = torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, mixed.flip(-1), x)
        said = vae.encode(x).latent_dist
        made = vae.decode(said.sample()).sample.float()
        rough = functional.l1_loss(made, x)
        sharp = sum(functional.l1_loss(a, b) for a, b in zip(edges(made), edges(x), strict=True))
        return rough + sharp + 1e-4 * said.kl().float().mean() / 2048

    run.go(loss)
    vae.eval().requires_grad_(False)
    return vae


@torch.no_grad()
def latents_of(vae, pictures):
    """Returns what the VAE makes of pictures in [-1, 1], (n, 8, 16, 16), not scaled."""
    return torch.cat([vae.encode(x).latent_dist.mean for x in pictures.split(128)])


def train_denoiser(run, rows, empty):
    """Trains UNet and text encoder.

    Args:
        run: Has both.
        rows: One or more sets that a step draws from in equal parts, each latents (n, 8, 16, 16)
            and token ids (n, TOKENS).
        empty: Token ids of no caption, (1, TOKENS).
    """
    unet, encoder = run.parts["unet"], run.parts["text_encoder"]
    noise = DiffusionNoise(make_scheduler().config)
    each = BATCH // len(rows)

    def loss():
        picked = [torch.randint(len(latents), (each,)) for latents, _ in rows]
        latents, ids = (
            torch.cat([x[i] for x, i in zip(of, picked, strict=True)])
            for of in zip(*rows, strict=True)
        )
        dropped = torch.rand(len(ids), 1) < DROPPED
        text = encoder(torch.where(dropped, empty, ids))[0]
        noised = noise(latents)
        return loss_of(unet(noised.noisy, noised.timesteps, text).sample, noised)

    run.go(loss)


def manners_of(folder, vae, tokenized, pictures, captions):
    """Returns latents and token ids of all pictures in several manners; kept in a file."""
    file = folder / "manners.pt"
    if not file.exists():
        draw = np.random.default_rng(0)
        texts, made = [], []
        for picture, text in zip(pictures, captions, strict=True):
            for words, other in in_manners(picture, draw):
                texts.append(", ".join([text, *words]))
                made.append(other)
        ids = tokenized(texts)
        fits = [i for i, row in enumerate(ids) if len(row) == TOKENS]
        latents = latents_of(vae, floats(np.stack([made[i] for i in fits])))
        torch.save({"latents": latents, "ids": torch.tensor([ids[i] for i in fits])}, file)
    state = torch.load(file, weights_only=True)
    return state["latents"], state["ids"]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--vae-steps", type=int, default=3500)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--more-steps", type=int, default=4000)
    parser.add_argument("--out", type=Path, default=HERE / "base")
    args = parser.parse_args()
    data = np.load(args.folder / "pictures.npz")
    split = json.loads(CONCEPTS.read_text())
    names = [*split["learnt"], *split["held_out"]]  # the base knows all: a style learns the first
    row = {name: i for i, name in enumerate(data["names"].tolist())}

    def log(entry):
        print(entry, flush=True)
        with (args.folder / "base.jsonl").open("a") as file:
            file.write(json.dumps(entry) + "\n")

    vae = train_vae(args.folder, data["every"], args.vae_steps, log)
    pictures = data[BASE][[row[n] for n in names]]
    latents = latents_of(vae, floats(pictures))
    vae.register_to_config(scaling_factor=round(1 / float(latents.std()), 4))

    torch.manual_seed(1)
    captions = [caption(name) for name in names]
    tokenizer = make_tokenizer(captions, args.folder / "tokenizer")

    def tokenized(texts):
        return tokenizer(texts, padding="max_length", max_length=TOKENS).input_ids

    ids, empty = torch.tensor(tokenized(captions)), torch.tensor(tokenized([""]))
    latents = latents * vae.config.scaling_factor
    parts = {"unet": make_unet(), "text_encoder": make_text_encoder(tokenizer)}
    run = Run(args.folder / "denoiser.pt", parts, args.steps, 2e-3, log)
    train_denoiser(run, [(latents, ids)], empty)
    others, other_ids = manners_of(args.folder, vae, tokenized, pictures, captions)
    others = others * vae.config.scaling_factor
    run = Run(args.folder / "manners-known.pt", parts, args.more_steps, 1.5e-3, log)
    train_denoiser(run, [(latents, ids), (others, other_ids)], empty)
    pipe = StableDiffusionPipeline(
        vae=vae, tokenizer=tokenizer, scheduler=make_scheduler(), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False, **parts,
    )  # fmt: skip
    pipe.to(torch.float16).save_pretrained(args.out)
    # transformers would load this part in float16 where diffusers loads the others in float32
    file = args.out / "text_encoder" / "config.json"
    config = json.loads(file.read_text()) | {"dtype": "float32"}
    file.write_text(json.dumps(config, indent=2) + "\n")
    print(f"{sum(f.stat().st_size for f in args.out.rglob('*') if f.is_file()):,} bytes")


if __name__ == "__main__":
    main()
