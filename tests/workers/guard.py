"""What `accelerate launch --cpu --num_processes 2` comes to."""

from hf_lora.training.processes import launch_options
from tests.workers.runs import Run, trainer_of
from tests.workers.sections import run_all


def options(out):
    return launch_options()


def trained(out):
    trainer_of(Run(), out / "guard", 1).train()


if __name__ == "__main__":
    run_all(
        options,
        trained,
        refused=("trained",),
    )
