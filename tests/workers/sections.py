"""Runs the sections of a worker in order and writes what each process got of each."""

import faulthandler
import sys
import traceback
from pathlib import Path

import torch

from tests.workers.runs import rank

SECONDS = 180  # a quiet machine with two cores needs about 40 for all workers


def run_all(*sections, refused=()):
    """Calls each section with the output folder.

    Those named in `refused` are to end in an error, which is their result. An error of another one
    ends the worker, and torchrun then the other process, which may be waiting for this one.
    """
    # whatever becomes of its launcher, a worker ends, and the log says where it hung
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    out = Path(sys.argv[1])
    for section in sections:
        try:
            result = section(out)
        except Exception as error:
            result = {
                "error": type(error).__name__,
                "text": str(error),
                "trace": traceback.format_exc(),
            }
            if section.__name__ not in refused:
                torch.save(result, out / f"{section.__name__}.{rank()}.pt")
                raise
        torch.save(result, out / f"{section.__name__}.{rank()}.pt")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    faulthandler.cancel_dump_traceback_later()
