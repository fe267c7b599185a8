"""The training runs that one process and two are compared by."""

import os
from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments

from hf_lora import attach_lora
from hf_lora.testing import tiny
from hf_lora.training.callback import LoraCallback
from hf_lora.training.trainer import LoraTrainer

STEPS = 6


@dataclass(frozen=True)
class Run:
    """One run, the same on any number of processes.

    Attributes:
        batch: Rows of a batch over all processes, before accumulation.
        lengths: Lengths of the rows, in tokens, over and over; several make padding.
        options: Further training arguments.
        attach: Further arguments of `attach_lora`.
    """

    batch: int = 4
    lengths: tuple[int, ...] = (12,)
    options: dict = field(default_factory=dict)
    attach: dict = field(default_factory=dict)


# Adam divides by the size of a gradient and so shows rounding in those that are next to nothing; at
# LoRA's usual rate that stays small. Plain descent shows the size of a gradient, which Adam hides.
ADAM = {"optim": "adamw_torch", "learning_rate": 2e-4}
DESCENT = {"optim": "sgd", "learning_rate": 0.5}
RAGGED = (12, 11, 3, 4, 9, 2, 7)  # the two processes have different numbers of tokens

RUNS = {
    "plain": Run(options=ADAM),
    "accumulated": Run(options=DESCENT | {"gradient_accumulation_steps": 2}),
    "ragged": Run(lengths=RAGGED, options=DESCENT | {"gradient_accumulation_steps": 2}),
}
# Each process takes the mean over its own tokens: another gradient, so that the test can fail.
APART = Run(lengths=RAGGED, options=DESCENT | {"average_tokens_across_devices": False})
TOGETHER = Run(lengths=RAGGED, options=DESCENT)


def data_of(run, rows=64):
    """Rows of random tokens; a row is as long as its place says."""
    generator = torch.Generator().manual_seed(1)
    lengths = [run.lengths[i % len(run.lengths)] for i in range(rows)]
    return [{"input_ids": torch.randint(3, 96, (n,), generator=generator)} for n in lengths]


def collate(rows):
    """Pads at the right; padding is neither seen nor counted in the loss."""
    ids = [row["input_ids"] for row in rows]
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad(ids, batch_first=True, padding_value=0),
        "attention_mask": pad([torch.ones_like(x) for x in ids], batch_first=True),
        "labels": pad(ids, batch_first=True, padding_value=-100),
    }


def arguments(run, folder, processes, **options):
    base = {
        "output_dir": str(folder),
        "use_cpu": True,
        "per_device_train_batch_size": run.batch // processes,
        "max_steps": STEPS,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "seed": 7,
        "ddp_timeout": 60,
    }
    return TrainingArguments(**(base | run.options | options))


def adapted(run, seed=0, model=None):
    """A model with an adapter whose A is random after `seed`."""
    model = tiny("llama") if model is None else model
    torch.manual_seed(seed)
    attach_lora(model, **({"rank": 4, "alpha": 8} | run.attach))
    return model


def trainer_of(
    run, folder, processes, *, seed=0, model=None, prepare=None, kind=LoraTrainer, **options
):
    """A trainer of a run; `prepare` is called when the strategy has been found, not yet taken."""
    model = adapted(run, seed) if model is None else model
    args = arguments(run, folder, processes, **options)
    if prepare is not None:
        prepare(args)
    return kind(
        model=model,
        args=args,
        train_dataset=data_of(run),
        eval_dataset=data_of(run, rows=8),
        data_collator=collate,
        callbacks=[LoraCallback(pictures=False)],  # drawing takes longer than these runs
    )


def factors(model):
    """Every trained tensor, copied, by the name it has without a wrapper."""
    return {
        name.replace("module.", "", 1) if name.startswith("module.") else name: p.detach().clone()
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def outcome(trainer):
    """What a run came to: weights, logged losses and gradient norms."""
    logged = [row for row in trainer.state.log_history if "loss" in row]
    return {
        "weights": factors(trainer.model),
        "losses": [row["loss"] for row in logged],
        "norms": [row["grad_norm"] for row in logged],
    }


def rank():
    return int(os.environ.get("RANK", "0"))
