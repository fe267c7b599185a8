"""What two processes do together under DDP; started by torchrun."""

import os

from accelerate.state import AcceleratorState

from hf_lora.training.processes import running
from tests.workers.runs import (
    APART,
    RUNS,
    TOGETHER,
    Run,
    adapted,
    factors,
    outcome,
    rank,
    trainer_of,
)
from tests.workers.sections import run_all


def strategy(out):
    trainer = trainer_of(RUNS["plain"], out / "strategy", 2)
    found = running(trainer.args, trainer.accelerator.state, trainer.model)
    return {"processes": found.processes, "strategy": found.strategy, "device": found.device}


def runs(out):
    found = {}
    for name, run in {**RUNS, "apart": APART, "together": TOGETHER}.items():
        trainer = trainer_of(run, out / name, 2, seed=100 + rank())
        before = factors(trainer.model)
        trainer.train()
        found[name] = {"before": before, **outcome(trainer)}
    return found


def _without_second_layer():
    model = adapted(Run())
    model.model.layers[1].forward = lambda hidden, *_, **__: hidden
    return model


def unreached_is_left(out):
    model = _without_second_layer()
    before = factors(model)
    trainer = trainer_of(Run(), out / "left", 2, model=model)
    trainer.train()
    return {"before": before, **outcome(trainer)}


def unreached_is_named(out):
    trainer = trainer_of(
        Run(), out / "named", 2, model=_without_second_layer(), ddp_find_unused_parameters=False
    )
    trainer.train()


DROPS = Run(attach={"dropout": 0.2})  # a random state that is not its own shows


def uninterrupted(out):
    trainer = trainer_of(DROPS, out / "saved", 2, save_strategy="steps", save_steps=3)
    trainer.train()
    return outcome(trainer)


def resumed(out):
    trainer = trainer_of(DROPS, out / "resumed", 2, seed=5 + rank())
    trainer.train(resume_from_checkpoint=str(out / "saved" / "checkpoint-3"))
    return outcome(trainer)


def fsdp_asked(out):
    try:
        trainer_of(Run(), out / "fsdp_asked", 2, fsdp=True).train()
    finally:
        os.environ.pop("ACCELERATE_USE_FSDP", None)  # accelerate leaves it behind


def use_cpu_forgotten(out):
    try:
        trainer_of(Run(), out / f"forgotten{rank()}", 2, use_cpu=False).train()
    finally:
        AcceleratorState._reset_state(True)  # the sections after this one are distributed


if __name__ == "__main__":
    run_all(
        use_cpu_forgotten,
        strategy,
        runs,
        unreached_is_left,
        unreached_is_named,
        uninterrupted,
        resumed,
        fsdp_asked,
        refused=("use_cpu_forgotten", "unreached_is_named", "fsdp_asked"),
    )
