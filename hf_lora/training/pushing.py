"""Checkpoints -> the Hub, beside the training: one at a time, the newest next, never in its way."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from transformers.utils import logging

from hf_lora.adapter import Adapter
from hf_lora.errors import LoraError
from hf_lora.formats import read_adapter
from hf_lora.save import adapter_on
from hf_lora.training.restore import Trained

logger = logging.get_logger(__name__)


def checked(repo_id: str | None) -> str | None:
    """Returns the repository to push to as it came; InvalidOption where it is none."""
    from hf_lora.hub.about import check_repo_id  # as below

    if repo_id is not None:
        check_repo_id(repo_id, "push_to")
    return repo_id


class Pusher:
    """Pushes adapters in the background.

    An adapter that is offered while another is being pushed waits; a newer one takes its place. No
    failure reaches the training: it stands among the outcomes.

    Args:
        repo_id: The repository.

    Attributes:
        outcomes: What became of each push, in order: `step`, and `commit` or `error`.
    """

    def __init__(self, repo_id: str) -> None:
        self.repo_id = repo_id
        self.outcomes: list[dict[str, Any]] = []
        self._lock = threading.Lock()
        self._next: tuple[Adapter, int] | None = None
        self._thread: threading.Thread | None = None

    def offer(self, adapter: Adapter, step: int) -> None:
        """Hands over an adapter, whose tensors nobody changes from now on; returns at once."""
        with self._lock:
            self._next = adapter, step
            if self._thread is None:
                # no daemon: when the program ends, the push that has begun is finished
                self._thread = threading.Thread(target=self._work, name="hf_lora-push")
                self._thread.start()

    def offer_checkpoint(self, folder: Path, step: int) -> None:
        """Hands over the adapter of a checkpoint, which is read now: later ones may replace it."""
        try:
            self.offer(read_adapter(folder), step)
        except (LoraError, OSError) as error:
            self._failed(step, error)

    def finish(self, trained: Trained, step: int) -> dict[str, Any]:
        """Pushes the adapter as it is now and waits for it; returns what the report says."""
        try:
            self.offer(adapter_on(trained.host, trained.name), step)
        except LoraError as error:
            self._failed(step, error)
        self.wait()
        return {"to": self.repo_id, "outcomes": self.outcomes}

    def wait(self) -> None:
        """Waits for what was offered."""
        while True:
            with self._lock:
                thread = self._thread
            if thread is None:
                return
            thread.join()

    def _failed(self, step: int, error: Exception) -> None:
        logger.warning(f"the adapter of step {step} was not pushed: {error}")
        self.outcomes.append({"step": step, "error": str(error)})

    def _work(self) -> None:
        while True:
            with self._lock:
                job, self._next = self._next, None
                if job is None:
                    self._thread = None
                    return
            self._push(*job)

    def _push(self, adapter: Adapter, step: int) -> None:
        from hf_lora.hub.push import push_lora  # cards and all, which few runs need

        try:
            commit = push_lora(adapter, self.repo_id, message=f"The adapter at step {step}")
        except Exception as error:  # whatever it is: the training goes on
            self._failed(step, error)
        else:
            self.outcomes.append({"step": step, "commit": commit.oid})
