"""What the training benchmarks share: kept results, steps measured side by side, sizes on disk."""

import gc
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from fnmatch import fnmatch
from itertools import accumulate
from pathlib import Path

import peft
import torch
import transformers
from torch.profiler import ProfilerActivity, profile

from hf_lora import LoraTrainer


class Results:
    """Results by name in a JSON file, each written as soon as it is there.

    Args:
        path: The file; what it holds already is not measured again.
        only: Patterns of names; other results are left out unless the file holds them.
    """

    def __init__(self, path, only=()):
        self.path, self.only = Path(path), only
        self.rows = json.loads(self.path.read_text()) if self.path.is_file() else {}

    def once(self, name, measure):
        """Returns the result of that name, measured now where it must be; None if left out."""
        wanted = not self.only or any(fnmatch(name, pattern) for pattern in self.only)
        if name not in self.rows and wanted:
            began = time.perf_counter()
            row = measure()
            self.rows[name] = {**row, "wall_seconds": round(time.perf_counter() - began, 1)}
            self.path.parent.mkdir(parents=True, exist_ok=True)
            aside = self.path.with_suffix(".new")
            aside.write_text(json.dumps(self.rows, indent=1) + "\n")
            os.replace(aside, self.path)
            print(f"{name}: {json.dumps(self.rows[name])[:300]}", file=sys.stderr, flush=True)
        return self.rows.get(name)


def machine():
    """Returns the machine and the versions in one line."""
    return (
        f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, Python "
        f"{platform.python_version()}, torch {torch.__version__}, peft {peft.__version__}, "
        f"transformers {transformers.__version__}"
    )


def train(model, rows, collate, *, rate, batch, warmup, epochs=1, seed=0, bf16=False):
    """Trains with hf_lora's Trainer where an adapter is attached, else with the plain one.

    Both take the same batches in the same order; the rate falls linearly after `warmup` steps.
    bf16: Products are computed in bfloat16 (autocast); weights, factors and states stay float32.
    """
    attached = getattr(model, "peft_config", None)
    trainer_class = LoraTrainer if attached else transformers.Trainer
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            folder,
            num_train_epochs=epochs,
            per_device_train_batch_size=batch,
            learning_rate=rate,
            warmup_steps=warmup,
            weight_decay=0.0,
            seed=seed,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            use_cpu=True,
            bf16=bf16,
        )
        trainer = trainer_class(model, arguments, collate, rows)
        trainer.remove_callback(transformers.PrinterCallback)  # a log is no result
        trainer.train()


def optimizer_of(model):
    """Returns AdamW over the trainable parameters, as Trainer makes it."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)


def step_of(model, batch, *, bf16=False):
    """Returns (a function that makes one training step on the batch, its optimizer)."""
    optimizer = optimizer_of(model.train())
    trained = [p for p in model.parameters() if p.requires_grad]

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step, optimizer


def state_bytes(optimizer):
    """Returns the bytes of the optimizer's state, all tensors of more than one value."""
    states = (value for state in optimizer.state.values() for value in state.values())
    tensors = (t for t in states if torch.is_tensor(t) and t.numel() > 1)
    return sum(t.numel() * t.element_size() for t in tensors)


def cpu_seconds(steps, rounds):
    """Returns the median CPU seconds of each step, all of them once a round, in turning order."""
    times, names = defaultdict(list), list(steps)
    for number in range(rounds + 1):
        for name in names if number % 2 else reversed(names):
            gc.collect()
            start = time.process_time()
            steps[name]()
            if number:  # the first round warms up
                times[name].append(time.process_time() - start)
    return {name: statistics.median(times[name]) for name in names}


def peak_bytes(step):
    """Returns the bytes that torch allocates for a step at its peak, over what it held before.

    Gradients count, since they come and go within a step; weights and optimizer state do not. It is
    what the resident set grows by where freed blocks go back at once; with glibc's defaults the
    gaps between blocks come on top, up to as much again and different in each run.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiled.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = [(e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]"]
    changes.sort(key=lambda change: change[0])
    return max(accumulate(count for _, count in changes))


def bytes_written(save):
    """Returns the bytes of the weight file that `save(folder)` leaves."""
    with tempfile.TemporaryDirectory() as folder:
        save(folder)
        return sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))


def trainable(model):
    """Returns the number of trainable parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def table(heads, rows):
    """Prints a Markdown table."""
    print(f"| {' | '.join(heads)} |\n|{' --- |' * len(heads)}")
    for row in rows:
        print(f"| {' | '.join(map(str, row))} |")


def mb(count):
    """Returns bytes as megabytes."""
    return f"{count / 1e6:,.1f}"
