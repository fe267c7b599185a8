"""What a killed training run leaves, and whether it goes on as if it had not been killed.

    python -m tests.crash_training [--kills 100] [--seed 0]

A run is killed at a random time, before or after a call that changes the disk, or at a byte of a
file; started again, it takes the newest complete checkpoint, and may be killed again. Every
checkpoint marked complete must be that of the uninterrupted run, bit for bit, and so must the
weights at the end. Prints what was found; exits with 1 for any fault. Needs a POSIX system.
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from hf_lora import BadCheckpoint
from hf_lora.training.callback import LoraCallback
from hf_lora.training.checkpoints import MARKER, newest_complete
from hf_lora.training.trainer import LoraTrainer
from tests.breakage import at_steps, ended, forked
from tests.runs import factors, trainer

STEPS, SAVES = 12, 2


@dataclass(frozen=True)
class Whole:
    """The run that nothing kills.

    Attributes:
        folder: Where all its checkpoints are.
        weights: What it trained.
        seconds: How long it takes in a child process.
        disk_steps: Calls before and after which it can be killed.
        largest: Bytes of the largest file of a checkpoint.
    """

    folder: Path
    weights: dict
    seconds: float
    disk_steps: int
    largest: int


def train(out):
    """What a user's script does: go on from the newest complete checkpoint, else begin."""
    with contextlib.suppress(BadCheckpoint):
        newest_complete(out)
        return _train(out, resume=True)
    return _train(out, resume=None)


def _train(out, *, resume):
    run = _trainer(out, save_total_limit=2)
    with contextlib.redirect_stdout(None):
        run.train(resume_from_checkpoint=resume)
    return factors(run.model)


def _trainer(out, **changes):
    return trainer(
        LoraTrainer,
        out,
        callbacks=[LoraCallback(report=False, figures=False)],
        max_steps=STEPS,
        save_steps=SAVES,
        logging_strategy="no",
        **changes,
    )


def finish(out, result):
    """Runs to the end in a child of its own, and keeps the weights."""
    process = forked(lambda: save_file(train(out), result))
    if ended(process):
        raise RuntimeError("a run that nothing killed was killed")


def kill_at_time(out, generator, whole):
    """Kills the run after a part of the time that a whole run takes."""
    process = forked(lambda: train(out))
    time.sleep(generator.random() * whole.seconds)
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)
    return ended(process)


def kill_at_step(out, generator, whole):
    """Kills the run before or after one of the calls that change the disk."""
    wanted = generator.randrange(whole.disk_steps)

    def die(number, _):
        if number == wanted:
            os.kill(os.getpid(), signal.SIGKILL)

    def run():
        with at_steps(die):
            train(out)

    return ended(forked(run))


def kill_at_byte(out, generator, whole):
    """Lets the kernel end the run when a file reaches a size."""
    size = generator.randrange(1, whole.largest)

    def run():
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        train(out)

    return ended(forked(run))


KILLS = (kill_at_time, kill_at_step, kill_at_time, kill_at_byte)


def wrong_with(out, reference):
    """Judges what a kill left: the words of a fault, empty when there is none."""
    for folder in sorted(out.glob("checkpoint-*")):
        marker = folder / MARKER
        fields = json.loads(marker.read_text()) if marker.is_file() else {}
        if not fields.get("complete"):
            continue
        for name, facts in fields["files"].items():
            found = hashlib.sha256((folder / name).read_bytes()).hexdigest()
            if found != facts["sha256"]:
                return f"{folder.name}/{name} is not what was marked complete"
        for name in ("optimizer.pt", "scheduler.pt"):
            torch.load(folder / name, weights_only=True)
        adapters = [load_file(f / "adapter_model.safetensors")
                    for f in (folder, reference / folder.name)]  # fmt: skip
        if not _same(*adapters):
            return f"{folder.name} holds another adapter than the uninterrupted run's"
    return ""


def _same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def whole_run(root):
    """Trains once without a kill, with all checkpoints kept."""
    began = time.perf_counter()
    finish(root / "timed", root / "timed.safetensors")
    seconds = time.perf_counter() - began
    steps = []
    run = _trainer(root / "whole", save_total_limit=None)
    with contextlib.redirect_stdout(None), at_steps(lambda *step: steps.append(step)):
        run.train()
    files = (root / "whole").rglob("*.*")
    largest = max(path.stat().st_size for path in files if path.is_file())
    return Whole(root / "whole", factors(run.model), seconds, len(steps), largest)


def crashes(count, root, generator):
    """Yields (how it was killed, step it went on from, fault) for each of `count` kills."""
    whole = whole_run(root)
    done = number = 0
    while done < count:
        number += 1
        out, result = root / f"run{number}", root / f"run{number}.safetensors"
        out.mkdir()
        for _ in range(generator.randint(1, 4)):
            how = KILLS[done % len(KILLS)]
            if not how(out, generator, whole):
                continue  # it was over before
            done += 1
            fault = wrong_with(out, whole.folder)
            yield how.__name__, _goes_on_from(out), fault
        finish(out, result)
        if not _same(load_file(result), whole.weights):
            yield "at the end", 0, "the weights are not those of the uninterrupted run"
        shutil.rmtree(out)


def _goes_on_from(out):
    try:
        return newest_complete(out)[0].step
    except BadCheckpoint:
        return 0


def main(argv=None):
    """Runs everything and prints figures; 1 when there is a fault."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    root = Path(tempfile.mkdtemp(prefix="hf_lora-crash-"))
    try:
        found = list(crashes(args.kills, root, random.Random(args.seed)))
    finally:
        shutil.rmtree(root)
    faults = [fault for _, _, fault in found if fault]
    kills = [row for row in found if row[0] != "at the end"]
    lines = [f"{len(kills)} kills of a training run: {len(faults)} faults"]
    for what, count in sorted(Counter(how for how, _, _ in kills).items()):
        lines.append(f"  {count:4} {what}")
    for step, count in sorted(Counter(step for _, step, _ in kills).items()):
        lines.append(f"  {count:4} went on from step {step}")
    lines += [f"FAULT {fault}" for fault in faults]
    sys.stdout.write("\n".join(lines) + "\n")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
