"""Styles for the base: a LoRA of 0.5 M parameters each, and a full fine-tune to compare it with.

Both learn the same 400 pictures in the same number of steps, as they are and in the manners that
the base knows; the held-out concepts are for `judge.py`. Each takes about ten minutes on one core.
A run that was stopped goes on, and what is finished is not trained again:

    python train_styles.py FOLDER                    # with the pictures.npz of pictures.py
    python train_styles.py FOLDER openmoji --full    # the fine-tune of one style
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from manners import in_manners
from pictures import BASE, CONCEPTS, HERE, SETS, caption
from torch.utils.data import Subset
from train_base import TOKENS, Run, floats, latents_of, make_scheduler
from transformers import TrainingArguments

from hf_lora import (
    CardExtras,
    DiffusionTrainingModule,
    LoraTrainer,
    attach_lora,
    open_adapter,
    save_lora,
)
from hf_lora.hub.card import card_of
from hf_lora.training.diffusion import cache_rows
from hf_lora.training.diffusion.losses import DiffusionNoise, loss_of

STYLES = [style for style in SETS if style != BASE]
STEPS, BATCH, RANK, RATE, FULL_RATE = 500, 40, 16, 1.5e-3, 3e-4
PLAIN = 6  # times each picture as it is; with manners beside them about a quarter of all
# A drawing style is in edges and areas, so convolutions learn as well as attention.
TARGETS = [
    "to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out",
    "conv1", "conv2", "conv_shortcut", "conv", "conv_in", "conv_out",
]  # fmt: skip


def base(folder=HERE / "base"):
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def rows_of(folder, style, tokenizer):
    """Returns the style's pictures of the learnt concepts, with captions, and what to draw from.

    A picture in another manner has that in its caption, as in the base's training: so the LoRA
    learns how the style differs from what the base knows, and less of each single picture.
    """
    data = np.load(folder / "pictures.npz")
    row = {name: i for i, name in enumerate(data["names"].tolist())}
    names = json.loads(CONCEPTS.read_text())["learnt"]
    pictures = data[style][[row[name] for name in names]]
    draw = np.random.default_rng(1)
    rows = [
        {"caption": caption(name), "image": picture}
        for name, picture in zip(names, pictures, strict=True)
    ]
    others = [
        {"caption": ", ".join([plain["caption"], *words]), "image": made}
        for plain in rows
        for words, made in in_manners(plain["image"], draw)
    ]
    fits = [row for row in others if len(tokenizer(row["caption"]).input_ids) <= TOKENS]
    order = [*range(len(rows))] * PLAIN + [len(rows) + i for i in range(len(fits))]
    return rows + fits, order


def train_lora(folder, style, pipe, out):
    """Trains a LoRA as any model of transformers is trained, and saves it for plain diffusers."""
    torch.manual_seed(0)
    attach_lora(pipe, rank=RANK, targets=TARGETS, name=style)
    module = DiffusionTrainingModule(pipe, caption_dropout=0.1)
    arguments = TrainingArguments(
        str(folder / f"run-{style}"), max_steps=STEPS, per_device_train_batch_size=BATCH,
        learning_rate=RATE, lr_scheduler_type="cosine", warmup_steps=50, bf16=True, use_cpu=True,
        logging_steps=50, save_steps=200, save_total_limit=1, report_to="none", seed=0,
        disable_tqdm=True,
    )  # fmt: skip
    rows, order = rows_of(folder, style, pipe.tokenizer)
    learnt = Subset(cache_rows(module, rows, batch_size=64), order)
    trainer = LoraTrainer(module, arguments, train_dataset=learnt)
    trainer.train(resume_from_checkpoint=any(Path(arguments.output_dir).glob("checkpoint-*")))
    pipe.unet.half()  # half the bytes; what is judged is this file
    save_lora(pipe, out, name=style)
    (out / "README.md").write_text(card(out, style))


def card(folder, style):
    """Returns the model card of a style."""
    _, license, owner = SETS[style]
    what = (
        f"Draws emoji in the style of {style}, over the pipeline `examples/emoji/base` of hf_lora. "
        f"Trained on pictures of {owner}, licence {license}; the weights are under the same one."
    )
    return card_of(open_adapter(folder), CardExtras(license=license.lower(), description=what)).text


def train_full(folder, style, pipe, out):
    """Trains all of the UNet's weights on the same pictures."""
    torch.manual_seed(0)
    rows, order = rows_of(folder, style, pipe.tokenizer)
    order = torch.tensor(order)
    latents = latents_of(pipe.vae, floats(np.stack([row["image"] for row in rows])))
    latents = latents * pipe.vae.config.scaling_factor
    options = {"padding": "max_length", "return_tensors": "pt"}
    with torch.no_grad():
        ids = pipe.tokenizer([row["caption"] for row in rows] + [""], **options).input_ids
        text = torch.cat([pipe.text_encoder(some)[0] for some in ids.split(256)])
    text, empty, noise = text[:-1], text[-1], DiffusionNoise(make_scheduler().config)
    unet = pipe.unet.train()

    def loss():
        picked = order[torch.randint(len(order), (BATCH,))]
        dropped = torch.rand(BATCH, 1, 1) < 0.1
        noised = noise(latents[picked])
        said = torch.where(dropped, empty, text[picked])
        return loss_of(unet(noised.noisy, noised.timesteps, said).sample, noised)

    file = folder / f"full-{style}.pt"
    Run(file, {"unet": unet}, STEPS, FULL_RATE, print, average=0.9).go(loss)
    unet.half().save_pretrained(out)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("styles", nargs="*", default=STYLES)
    parser.add_argument("--full", action="store_true", help="fine-tune all weights instead")
    args = parser.parse_args()
    for style in args.styles:
        out = args.folder / "full" / style if args.full else HERE / "styles" / style
        if not out.exists():
            (train_full if args.full else train_lora)(args.folder, style, base(), out)


if __name__ == "__main__":
    main()
