"""What a crash, a full disk or a second writer leaves of an adapter on disk.

    python -m tests.crash [--kills 500] [--offsets 100] [--rounds 60] [--seed 0]

Saves are broken on purpose: the process is killed before and after every call that changes the
disk, at a byte of the file and at random times; the disk is full from a byte on; a call fails or is
interrupted; other processes save into the same folder. Two judges then read what is there, hf_lora
and plain peft or diffusers: it must be the old or the new adapter whole. Prints what was found,
about four minutes on one core; exits with 1 for any fault. Needs a POSIX system.
"""

import argparse
import errno
import itertools
import os
import random
import shutil
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from hf_lora import save_adapter
from hf_lora.adapter import Adapter
from tests.breakage import (
    KILLS,
    disk_with,
    ended,
    failing_at,
    filled,
    forked,
    kill_at_step,
    small_disk,
    steps_of,
)
from tests.judges import BEFORE, NAMES, SIZES, bytes_of, judge_of, next_save, prepare

_SHARES = (6, 3, 1)  # how often each size is taken
ERRORS = (OSError(errno.EIO, os.strerror(errno.EIO)), KeyboardInterrupt(), MemoryError())
# What may come of it
PHASES = (
    "not begun",
    "writing aside",
    "old config taken away",
    "one renamed",
    "renamed, not tidied",
    "done",
)
READ = ("old / old", "old / refused", "new / new", "new / refused", "nothing / refused")
LATE = "stopped after the new one was in place"

# --- kills ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What one broken save left: the two judges' words, and whether the next save put it right."""

    before: str
    layout: str
    phase: str
    ours: str
    theirs: str
    leftovers: tuple[str, ...]

    @property
    def fault(self):
        """What is wrong, as words; empty when nothing is."""
        good = {"new", "nothing" if self.before == "nothing" else "old"}
        if self.ours not in good:
            return f"hf_lora reads {self.ours}"
        alone = self.layout == "diffusers" and self.before != "nothing"  # one file, always there
        if self.theirs != self.ours and (self.theirs != "refused" or alone):
            return f"others read {self.theirs}, hf_lora {self.ours}"
        return f"left after the next save: {self.leftovers}" if self.leftovers else ""


def phase_of(judge, folder, before):
    """Says how far a save had come, from what lies in the folder."""
    now = bytes_of(folder)
    hidden = [name for name in now if name.startswith(".")]
    weights, *config = NAMES[judge.layout]
    if weights in now and now[weights] != before.get(weights):
        whole = all(n in now and now[n] != before.get(n) for n in config)
        return "renamed, not tidied" if whole and hidden else "done" if whole else "one renamed"
    if any(name in before and name not in now for name in config):
        return "old config taken away"
    return "writing aside" if hidden else "not begun"


def kill(judge, before, breakage, folder, then):
    """One kill, judged; None when the save was over before. `then` is saved next."""
    old = prepare(judge, before, folder)
    if not breakage(judge, folder):
        return None
    phase = phase_of(judge, folder, old)
    ours, theirs = judge.ours(folder), judge.theirs(folder)
    left = next_save(judge, folder, {*old}, then)
    return Outcome(before, judge.layout, phase, ours, theirs, left)


def kills(judges, before, count, root, generator):
    """Yields the outcomes of about `count` kills, over layouts, sizes and means."""
    folder = root / "killed"
    sizes = list(dict.fromkeys(size for size, _ in judges))
    for layout in NAMES:
        steps = steps_of(judges[sizes[0], layout], before, folder)
        total = count // len(NAMES)
        for number in range(total):
            judge = judges[generator.choices(sizes, _SHARES[: len(sizes)])[0], layout]
            how = KILLS[number % len(KILLS)]
            share = number / total if how is kill_at_step else generator.random()
            outcome = None
            while outcome is None:  # a save that was over before is no kill
                breakage = partial(how, share=share, steps=steps)
                outcome = kill(judge, before, breakage, folder, ("old", "new")[number // 2 % 2])
                share = generator.random()
            yield outcome


# --- a full disk, a call that fails ---------------------------------------------------------------


def broken(judge, before, folder, breakage):
    """One save that fails by itself; returns `refused`, `saved` or what is wrong."""
    old = prepare(judge, before, folder)
    try:
        with breakage:
            save_adapter(judge.known["new"], folder)
        word = "saved"
    except (OSError, KeyboardInterrupt, MemoryError):
        word = "refused"
    if word == "refused" and bytes_of(folder) != old:
        word = f"refused, and not as before: {sorted(bytes_of(folder))}"
        if judge.ours(folder) == judge.theirs(folder) == "new":
            word = LATE
    if word == "saved" and not judge.ours(folder) == judge.theirs(folder) == "new":
        word = "saved, and not whole"
    left = next_save(judge, folder, {*old}, "new")
    return f"{word}, then {left}" if left else word


def full_disks(judges, befores, count, root):
    """Yields what saves on disks with ever more room do, up to all but the last byte."""
    folder = root / "full"
    for judge, before in itertools.product(judges, befores):
        prepare(judge, "nothing", folder)
        save_adapter(judge.known["new"], folder)
        size = sum(map(len, bytes_of(folder).values()))
        for number in range(count):
            free = number * (size - 1) // max(count - 1, 1)
            yield broken(judge, before, folder, disk_with(free))


def failures(judges, befores, errors, root):
    """Yields what saves do of which one call fails or is interrupted, for every call."""
    folder = root / "failing"
    for judge, before, error in itertools.product(judges, befores, errors):
        for number in range(len(steps_of(judge, before, folder))):
            yield broken(judge, before, folder, failing_at(number, error))


def small_disks(judge, befores, count, root):
    """Yields what saves do on a real file system that is full; raises OSError without one."""
    place, size = root / "small", judge.known["new"].nbytes
    with small_disk(place, 4 * size):
        for before, number in itertools.product(befores, range(count)):
            yield broken(judge, before, place / "adapter", filled(place, number * size // count))


# --- several writers ------------------------------------------------------------------------------


def writers(judge, count, rounds, root):
    """Yields what both judges read after processes saved at once, each another adapter."""
    known = {str(n): _variant(judge.known["new"], n) for n in range(1, count + 1)}
    judge = replace(judge, known=known)
    folder = root / "shared"
    for number in range(rounds):
        before = prepare(judge, BEFORE[number % len(BEFORE)], folder)
        gate = os.pipe()
        adapters = list(known.values())
        random.Random(number).shuffle(adapters)
        processes = [forked(partial(_save_at, gate, adapter, folder)) for adapter in adapters]
        for end in gate:
            os.close(end)
        for process in processes:
            ended(process)
        ours, theirs = judge.ours(folder), judge.theirs(folder)
        others = set(bytes_of(folder)) - set(before) - set(NAMES[judge.layout])
        yield ours if ours == theirs and not others else f"{ours} / {theirs}, {sorted(others)}"


def _save_at(gate, adapter, folder):
    """Saves when the parent opens the gate, a pipe that ends for all of its children at once."""
    read, write = gate
    os.close(write)
    os.read(read, 1)
    save_adapter(adapter, folder)


def _variant(adapter, number):
    """The adapter with other weights and another alpha."""
    parts = {}
    for name, part in adapter.components.items():
        targets = {
            path: {factor: tensor * number for factor, tensor in tensors.items()}
            for path, tensors in part.targets.items()
        }
        parts[name] = replace(part, config={**part.config, "lora_alpha": number}, targets=targets)
    variant = Adapter(parts)
    assert variant.digest  # computed before the fork, so that the processes meet at the disk
    return variant


# --- the script -----------------------------------------------------------------------------------


def say(title, words, good):
    """Prints how often each word came; returns how many are not among the good ones."""
    counted = Counter(words)
    bad = sum(n for word, n in counted.items() if word not in good)
    listed = ", ".join(f"{n} {word}" for word, n in sorted(counted.items()))
    sys.stdout.write(f"{title:34} {counted.total():5}  faults {bad}: {listed}\n")
    sys.stdout.flush()
    return bad


def say_kills(judges, root, args):
    """Kills into fresh folders, over our own and over foreign adapters, by how far the save was."""
    generator, bad = random.Random(args.seed), 0
    for before, count in zip(
        BEFORE, (args.kills // 2, args.kills // 2, args.kills // 5), strict=True
    ):
        found = list(kills(judges, before, count, root, generator))
        for layout in NAMES:
            here = [outcome for outcome in found if outcome.layout == layout]
            say(f"killed, {before} before, {layout}", [o.phase for o in here], PHASES)
            words = [o.fault or f"{o.ours} / {o.theirs}" for o in here]
            bad += say("  hf_lora reads / others read", words, READ)
    return bad


def say_full(judges, root, args):
    """Full disks and failing calls."""
    share = -(-args.offsets // (len(judges) * len(BEFORE)))
    found = full_disks(judges.values(), BEFORE, share, root)
    bad = say("disk full at a byte", found, ("refused",))
    small = [judges["2 KiB", layout] for layout in NAMES]
    failed = failures(small, BEFORE, ERRORS[:1], root)
    bad += say("one call fails", failed, ("refused", "saved"))
    stopped = failures(small, BEFORE, ERRORS[1:], root)
    bad += say("one call interrupted", stopped, ("refused", "saved", LATE))
    try:
        found = list(small_disks(judges["1 MiB", "peft"], BEFORE, 20, root))
        return bad + say("small tmpfs full", found, ("refused",))
    except OSError as error:
        sys.stdout.write(f"small tmpfs full: skipped, {error}\n")
        return bad


def say_writers(judges, root, args):
    """Two and four processes that save into one folder."""
    bad = 0
    for count, layout in itertools.product((2, 4), NAMES):
        found = writers(judges["1 MiB", layout], count, args.rounds, root)
        bad += say(f"{count} writers, {layout}", found, {str(n) for n in range(1, count + 1)})
    return bad


def main(argv=None):
    """Runs everything and prints figures; 1 when there is a fault."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--offsets", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    root = Path(tempfile.mkdtemp(prefix="hf_lora-crash-"))
    try:
        judges = {(size, n): judge_of(n, size, root) for size in SIZES for n in NAMES}
        parts = (say_kills, say_full, say_writers)
        return int(sum(part(judges, root, args) for part in parts) > 0)
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    sys.exit(main())
