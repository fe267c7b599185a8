"""Starts workers, waits for them no longer than they may take, and leaves none behind."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from tests.workers.sections import SECONDS

ROOT = Path(__file__).parent.parent.parent

# Each picks a free port by itself, on the loopback.
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
ACCELERATE = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2")
WORKERS = {"ddp": TORCHRUN, "fsdp": TORCHRUN, "guard": ACCELERATE}


def launch(folder):
    """Runs every worker at once; each writes below its name in the folder."""
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "FSDP_"))},
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "HF_HOME": str(folder / "home"),  # no config file of accelerate
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo",
    }
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    deadline = time.monotonic() + SECONDS + 20
    running = {}
    try:
        for name, launcher in WORKERS.items():
            out = folder / name
            out.mkdir()
            script = Path(__file__).parent / f"{name}.py"
            with (out / "log").open("wb") as log:
                running[name] = subprocess.Popen(
                    [sys.executable, *launcher, str(script), str(out)],
                    cwd=folder,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        for process in running.values():
            process.wait(max(1, deadline - time.monotonic()))
    finally:
        for process in running.values():
            _end(process)


def _end(process):
    """Ends a launcher; torchrun takes its workers with it, which have sessions of their own."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(40)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(10)


def result(folder, worker, section, rank):
    """What one process of a worker got of a section."""
    path = folder / worker / f"{section}.{rank}.pt"
    assert path.exists(), (folder / worker / "log").read_text(errors="replace")[-3000:]
    return torch.load(path, weights_only=False)
