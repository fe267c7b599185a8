"""What the base and its styles have learnt, measured on concepts that no style has seen.

Two small judges are trained first, on pictures of concepts that are not held out: one tells the
style of a picture, one its concept whatever the style. Then pictures of the held-out concepts, four
seeds each, are made by plain diffusers and judged. About an hour on one core; what has been judged
is not judged again, so remove `judged` and `judge-*.pt` from the folder after training anew:

    python judge.py FOLDER        # after train_base.py and train_styles.py

The table is in `results.json`.
"""

import argparse
import json
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from pictures import BASE, CONCEPTS, HERE, SETS, caption
from torch import nn
from torch.nn import functional
from train_base import floats
from train_styles import RANK, STYLES, TARGETS, base

from hf_lora import attach_lora

SEEDS, GALLERY, STEPS, GUIDANCE = 4, 50, 25, 2.0
LESS = 0.75  # the other strength that is judged
NAMES = list(SETS)
LOOK_ALIKE = ("noto", "twemoji")  # one class where accuracy is asked


def body(widths=(32, 64, 96, 128)):
    """Returns convolutions that halve a picture with each width."""
    layers, width = [], 3
    for wider in widths:
        layers += [nn.Conv2d(width, wider, 3, stride=2, padding=1), nn.GroupNorm(8, wider)]
        layers += [nn.SiLU(), nn.Conv2d(wider, wider, 3, padding=1), nn.SiLU()]
        width = wider
    return nn.Sequential(*layers)


class StyleJudge(nn.Module):
    """Tells styles by their shapes and by their colours; `features` are what its last layer sees.

    Args:
        styles: How many.
    """

    def __init__(self, styles):
        super().__init__()
        self.shapes, self.head = body((24, 48, 96)), nn.Linear(2 * 96 + 64, styles)
        # what single pixels are, counted: sets draw with a palette
        self.colours = nn.Sequential(
            nn.Conv2d(3, 64, 1), nn.SiLU(), nn.Conv2d(64, 64, 1), nn.Softmax(1)
        )
        self.drop = nn.Dropout(0.4)

    def features(self, x):
        """Returns features (n, 256) of pictures (n, 3, 64, 64) in [-1, 1]."""
        y = self.shapes(x)
        counted = self.colours(4 * x[..., ::2, ::2]).mean((2, 3)) * 10
        return torch.cat([y.mean((2, 3)), y.amax((2, 3)), counted], 1)

    def forward(self, x):
        """Returns logits (n, styles)."""
        return self.head(self.drop(self.features(x)))


class ConceptJudge(nn.Module):
    """Tells concepts, by where things are; the same concept is near in any style.

    Args:
        width: Of the embedding.
    """

    def __init__(self, width):
        super().__init__()
        self.body, self.head = body(), nn.Linear(128 * 16, width)

    def forward(self, x):
        """Returns embeddings (n, width) of length 1."""
        return functional.normalize(self.head(self.body(x).flatten(1)), dim=1)


def moved(x, draw, much=1.0):
    """Returns pictures moved, resized and turned a little."""
    n = len(x)
    angle = (torch.rand(n, generator=draw) - 0.5) * 0.3 * much
    zoom = 1 + (torch.rand(n, generator=draw) - 0.5) * 0.3 * much
    move = (torch.rand(n, 2, generator=draw) - 0.5) * 0.2 * much
    cos, sin = angle.cos() * zoom, angle.sin() * zoom
    theta = torch.stack([cos, -sin, move[:, 0], sin, cos, move[:, 1]], 1).view(n, 2, 3)
    grid = functional.affine_grid(theta, list(x.shape), align_corners=False)
    return 1 + functional.grid_sample(x - 1, grid, align_corners=False)  # white outside


def jittered(x, draw):
    """Returns pictures moved, resized and turned a little, some of them blurred."""
    y = moved(x, draw)
    soft = functional.avg_pool2d(functional.pad(y, (1, 1, 1, 1), mode="replicate"), 3, 1)
    return torch.where(torch.rand(len(x), 1, 1, 1, generator=draw) < 0.3, soft, y)


def loaded(file, model):
    """Returns a judge as it was saved."""
    model.load_state_dict(torch.load(file, weights_only=True))
    return model.eval()


def trained(file, model, steps, decay, loss_of_step):
    """Returns a judge after some steps, which is saved."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=decay)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for step in range(steps):
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of_step(model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        rates.step()
        if (step + 1) % 100 == 0:
            print(file.stem, step + 1, f"{float(loss.detach()):.3f}", flush=True)
    torch.save(model.state_dict(), file)
    return model.eval()


@torch.no_grad()
def with_copies(pictures):
    """Returns pictures (n, 3, height, width) and what the base's VAE makes of them, as (2, ...).

    All that is judged has gone through that VAE, so half of what a judge learns from has as well.
    """
    vae = base().vae
    again = torch.cat([vae(x).sample for x in pictures.split(128)]).clamp(-1, 1)
    return torch.stack([pictures, again])


def train_style_judge(folder, held):
    """Returns the judge of style; it learns from whole sets, without the held-out concepts."""
    torch.manual_seed(0)
    file, judge = folder / "judge-style.pt", StyleJudge(len(SETS))
    if file.exists():
        return loaded(file, judge)
    whole = np.load(folder / "sets.npz")
    sets = []
    for style in SETS:
        names = whole[f"{style} names"].tolist()
        # a variant of a held-out concept counts as that concept
        seen = [
            i for i, n in enumerate(names) if not any(f"{n}-".startswith(f"{h}-") for h in held)
        ]
        sets.append(with_copies(floats(whole[style][seen])))
    draw = torch.Generator().manual_seed(0)

    def loss(model):
        style = torch.randint(len(SETS), (64,), generator=draw)
        way = torch.randint(2, (64,), generator=draw)
        which = torch.rand(64, generator=draw)
        picked = [
            sets[s][w, int(r * sets[s].shape[1])]
            for s, w, r in zip(style.tolist(), way.tolist(), which.tolist(), strict=True)
        ]
        said = model(moved(torch.stack(picked), draw, 0.25)).float()
        return functional.cross_entropy(said, style, label_smoothing=0.05)

    return trained(file, judge, 2500, 0.1, loss)


def train_concept_judge(folder, pictures):
    """Returns the judge of concepts; pictures: (styles, concepts, 3, height, width)."""
    torch.manual_seed(0)
    file, judge = folder / "judge-concept.pt", ConceptJudge(128)
    if file.exists():
        return loaded(file, judge)
    styles, concepts = pictures.shape[:2]
    draw = torch.Generator().manual_seed(0)
    both = with_copies(pictures.flatten(0, 1)).unflatten(1, pictures.shape[:2])

    def picked(style, concept):
        way = torch.randint(2, (len(style),), generator=draw)
        return jittered(both[way, style, concept], draw)

    def loss(model):
        concept = torch.randperm(concepts, generator=draw)[:96]
        one, other = (torch.randint(styles, (96,), generator=draw) for _ in range(2))
        a, b = model(picked(one, concept)).float(), model(picked(other, concept)).float()
        alike = a @ b.T / 0.07
        which = torch.arange(96)
        return functional.cross_entropy(alike, which) + functional.cross_entropy(alike.T, which)

    return trained(file, judge, 1200, 0.05, loss)


def style_of(judge, x):
    """Returns the style of each picture, as its number; look-alikes have the number of the first.

    The probabilities of look-alikes count together.
    """
    chances = judge(x).softmax(1)
    first, second = (NAMES.index(name) for name in LOOK_ALIKE)
    chances[:, first] += chances[:, second]
    chances[:, second] = 0
    return chances.argmax(1)


def draw_pictures(pipe, captions):
    """Returns pictures (seeds, captions, 3, height, width) in [-1, 1], one noise for each."""
    made = []
    for seed in range(SEEDS):
        for start in range(0, len(captions), GALLERY):
            few = captions[start : start + GALLERY]
            noise = [
                torch.Generator().manual_seed(1000 * seed + start + i) for i in range(len(few))
            ]
            made.append(
                pipe(
                    few, generator=noise, num_inference_steps=STEPS, guidance_scale=GUIDANCE,
                    output_type="pt",
                ).images
            )  # fmt: skip
    return (torch.cat(made) * 2 - 1).view(SEEDS, len(captions), *made[0].shape[1:])


def retrieved(queries, gallery):
    """Returns how often the nearest of 50 true pictures is the one of the query's own concept.

    Args:
        queries: Embeddings (seeds, concepts, width).
        gallery: Of the true pictures, (ways, concepts, width); a concept is as near as its nearest.
    """
    right = []
    for start in range(0, queries.shape[1], GALLERY):
        near = torch.einsum(
            "sqd,wgd->sqwg", queries[:, start:][:, :GALLERY], gallery[:, start:][:, :GALLERY]
        )
        best = near.amax(2).argmax(-1)
        right.append((best == torch.arange(best.shape[1])).float())
    return float(torch.cat(right, 1).mean())


class Truth:
    """True pictures of the held-out concepts as the judges see them, and figures against them."""

    def __init__(self, judge, embedder, pictures):
        self.judge, self.embedder, self.pictures = judge, embedder, pictures
        flat = pictures.flatten(0, 1)
        self.features = judge.features(flat).view(*pictures.shape[:2], -1)
        self.spread = self.features.flatten(0, 1).std(0) + 1e-3
        self.concepts = embedder(flat).view(*pictures.shape[:2], -1)

    def figures(self, made, style):
        """Returns what pictures (seeds, concepts, 3, ...) are, seen as ones of a style.

        `distance` is that of features to the true picture's, root mean square in units of their
        deviation; `pixels` the mean squared difference on [-1, 1].
        """
        flat, at = made.flatten(0, 1), NAMES.index(style)
        said = style_of(self.judge, flat)
        seen = self.judge.features(flat).view(*made.shape[:2], -1)
        away = ((seen - self.features[at]) / self.spread).square().mean(-1).sqrt()
        own = self.embedder(flat).view(*made.shape[:2], -1)
        return {
            "called": {name: float((said == i).float().mean()) for i, name in enumerate(NAMES)},
            "distance": float(away.mean()),
            "pixels": float((made - self.pictures[at]).square().mean()),
            "retrieved": retrieved(own, self.concepts[at : at + 1]),
            "retrieved in any style": retrieved(own, self.concepts),
        }


def pipes(folder):
    """Yields what is judged: name, the style it should have, and how to make its pipeline."""
    yield "base", BASE, base
    for style in STYLES:

        def with_lora(style=style, strength=1.0):
            pipe = base()
            pipe.load_lora_weights(HERE / "styles" / style)
            pipe.fuse_lora(lora_scale=strength)  # the same pictures in less time
            return pipe

        def full(style=style):
            pipe = base()
            pipe.unet = UNet2DConditionModel.from_pretrained(folder / "full" / style)
            return pipe

        yield f"LoRA {style}", style, with_lora
        yield f"LoRA {style} at {LESS:g}", style, partial(with_lora, strength=LESS)
        yield f"full {style}", style, full

    def untrained():
        pipe = base()
        return attach_lora(pipe, rank=RANK, targets=TARGETS)

    yield "untrained LoRA", STYLES[0], untrained


def table(results):
    """Returns the figures as lines of Markdown: who drew, what the judges say."""
    lines = [
        "| Drawn by | Judged as | Style right | Distance | Concept found | in any style |",
        "| --- | --- | --- | --- | --- | --- |",
    ]

    def put(name, style, row):
        classes = LOOK_ALIKE if style in LOOK_ALIKE else (style,)
        right = sum(row["called"][one] for one in classes)
        figures = [f"{right:.1%}", f"{row['distance']:.3f}"]
        figures += [f"{row['retrieved']:.1%}", f"{row['retrieved in any style']:.1%}"]
        lines.append(f"| {' | '.join([name, style, *figures])} |")

    for style, row in results["judges"].items():
        put("the true pictures", style, row)
    for style, row in results["Noto in other styles"].items():
        put("the true pictures of noto", style, row)
    put("base", BASE, results["base"])
    put("base, shuffled prompts", BASE, results["base, shuffled prompts"])
    for style in STYLES:
        put("base", style, results["base, seen as"][style])
        rows = {"untrained LoRA": "untrained LoRA"} if style == STYLES[0] else {}
        for name in ("LoRA", f"LoRA at {LESS:g}", "LoRA, shuffled prompts"):
            rows[name] = name.replace("LoRA", f"LoRA {style}")
        rows["full fine-tune"] = f"full {style}"
        for name, key in rows.items():
            if key in results:
                put(name, style, results[key])
    return lines


def gains(results):
    """Returns style -> the part of the full fine-tune's gain in distance that the LoRA reaches."""
    found = {}
    for style in STYLES:
        if f"full {style}" in results:
            base = results["base, seen as"][style]["distance"]
            lora, full = (results[f"{kind} {style}"]["distance"] for kind in ("LoRA", "full"))
            found[style] = (base - lora) / (base - full)
    return found


def judged(name, style, pipe, truth, captions):
    """Returns the figures of one pipeline, by name of the row, those of its controls too."""
    pipe.set_progress_bar_config(disable=True)
    made = draw_pictures(pipe, captions)
    rows = {name: truth.figures(made, style)}
    if name == "base":
        rows["base, seen as"] = {s: truth.figures(made, s) for s in STYLES}
    if name in ("base", f"LoRA {style}"):
        wrong = draw_pictures(pipe, captions[1:] + captions[:1])
        rows[f"{name}, shuffled prompts"] = truth.figures(wrong, style)
    return rows


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*", help="judge these only, beside another process")
    args = parser.parse_args()
    data, split = np.load(args.folder / "pictures.npz"), json.loads(CONCEPTS.read_text())
    names = data["names"].tolist()
    held = split["held_out"]
    seen = [i for i, name in enumerate(names) if name not in set(held)]
    every = torch.stack([floats(data[style]) for style in SETS])
    with torch.enable_grad():
        judge = train_style_judge(args.folder, held)
        embedder = train_concept_judge(args.folder, every[:, seen])
    truth = Truth(judge, embedder, every[:, [names.index(name) for name in held]])
    rows = {}
    rows["judges"] = {
        style: truth.figures(truth.pictures[i : i + 1], style) for i, style in enumerate(SETS)
    }
    # what a picture of the base finds in another style when it is perfect: the most a style can do
    rows["Noto in other styles"] = {
        style: truth.figures(truth.pictures[:1], style) for style in STYLES
    }
    (args.folder / "judged").mkdir(exist_ok=True)
    for name, style, make in pipes(args.folder):
        file = args.folder / "judged" / f"{name}.json"
        if not file.exists() and name in (args.names or [name]):
            found = judged(name, style, make(), truth, [caption(name) for name in held])
            file.write_text(json.dumps(found))
            print(name, found[name], flush=True)
        rows |= json.loads(file.read_text()) if file.exists() else {}
    if not args.names:
        (HERE / "results.json").write_text(json.dumps(rows, indent=1) + "\n")
        print("\n".join(table(rows)), gains(rows), sep="\n")


if __name__ == "__main__":
    main()
