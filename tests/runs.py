"""Small training runs that tests compare: the same seed, data and model each time."""

import torch
from transformers import TrainingArguments, set_seed

from hf_lora import attach_lora
from hf_lora.testing import tiny


def rows(count=24, *, seed=0, length=12):
    """Rows of random tokens with themselves as labels."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 90, (count, length), generator=generator)
    return [{"input_ids": row, "labels": row} for row in ids]


def arguments(out, **changes):
    """Arguments of a run of twelve steps on the CPU that says nothing."""
    settings = {
        "max_steps": 12,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "save_steps": 3,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
    }
    return TrainingArguments(str(out), **{**settings, **changes})


def model(family="llama", **attach):
    """A tiny model with a fresh adapter; dropout, so that random states matter to a resume."""
    set_seed(0)
    return attach_lora(
        tiny(family), **({"dropout": 0.1} if "config" not in attach else {}), **attach
    )


def trainer(kind, out, *, host=None, callbacks=None, data=None, judge=None, **changes):
    """A trainer of a class over the rows; `changes` are training arguments."""
    set_seed(0)
    extra = {}
    for key in ("optimizers", "processing_class"):
        if key in changes:
            extra[key] = changes.pop(key)
    return kind(
        model() if host is None else host,
        arguments(out, **changes),
        train_dataset=rows() if data is None else data,
        eval_dataset=rows(8, seed=1) if judge is None else judge,
        callbacks=callbacks,
        **extra,
    )


def factors(host):
    """The state of everything that is trained, copied."""
    return {n: p.detach().clone() for n, p in host.named_parameters() if p.requires_grad}


def assert_equal(first, second):
    """Asserts that two sets of tensors are equal to the bit."""
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
