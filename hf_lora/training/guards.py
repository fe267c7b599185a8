"""Guards of a run: against losses that jump, gradients that are no numbers, and overfitting."""

from __future__ import annotations

import copy
import math
import statistics
from collections import deque
from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from hf_lora.errors import InvalidOption, shown

NonFinite = Literal["stop", "back"]
Spike = Literal["ignore", "warn", "stop", "back"]
Overfitting = Literal["ignore", "warn", "stop"]

KEPT_EVERY = 100  # steps after which a copy to go back to is too old, whatever is logged and saved

_CHOICES = {
    "non_finite": get_args(NonFinite),
    "spike": get_args(Spike),
    "overfitting": get_args(Overfitting),
}
_ENOUGH = 5  # losses that a median is taken of, at least
_WINDOW = 20  # and at most


def check_choices(chosen: Mapping[str, object], counts: Mapping[str, object]) -> None:
    """Checks what a guard was asked to do.

    Args:
        chosen: Name of a guard -> what it shall do.
        counts: Name of an argument -> a number from 1.

    Raises:
        InvalidOption: A choice is not among those of its guard, or a number is none.
    """
    for field, value in chosen.items():
        if value not in _CHOICES[field]:
            raise InvalidOption(
                f"{field}={shown(value)} is not one of {', '.join(_CHOICES[field])}", field=field
            )
    for field, number in counts.items():
        if not isinstance(number, int) or isinstance(number, bool) or number < 1:
            raise InvalidOption(f"{field}={shown(number)} is no positive whole number", field=field)


class LossGuard:
    """Watches the logged training loss.

    Args:
        factor: A loss above this many times the median of the last 20 is a spike.
    """

    def __init__(self, factor: float = 3.0) -> None:
        self.factor = factor
        self.losses: deque[float] = deque(maxlen=_WINDOW)

    def see(self, loss: float) -> str:
        """Takes in one loss; returns what is wrong with it, empty when nothing is."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if len(self.losses) >= _ENOUGH:
            usual = statistics.median(self.losses)
            if loss > self.factor * usual > 0:
                return f"the loss jumped to {loss:.4g}, the median of the last ones is {usual:.4g}"
        self.losses.append(loss)
        return ""

    def state(self) -> dict[str, Any]:
        """Returns what a resumed run needs, as plain data."""
        return {"losses": list(self.losses)}

    def load(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state` gave."""
        self.losses = deque(state.get("losses", ()), maxlen=_WINDOW)


class OverfitGuard:
    """Watches the evaluation loss beside the training loss.

    Args:
        patience: Evaluations in a row above the best one, while the training loss is below what it
            was then, that count as overfitting.
    """

    def __init__(self, patience: int = 3) -> None:
        self.patience = patience
        self.best = math.inf
        self.train_then = math.inf
        self.worse = 0

    def see(self, evaluation: float, train: float | None) -> str:
        """Takes in one evaluation loss; returns what is wrong, empty when nothing is."""
        now = math.inf if train is None else train
        if evaluation <= self.best:
            self.best, self.train_then, self.worse = evaluation, now, 0
            return ""
        if not now < self.train_then:
            return ""
        self.worse += 1
        if self.worse < self.patience:
            return ""
        return (
            f"the held-out loss has been above its best ({self.best:.4g}) for {self.worse} "
            f"evaluations and is {evaluation:.4g}, while the training loss fell"
        )

    def state(self) -> dict[str, Any]:
        """Returns what a resumed run needs, as plain data; infinities as None."""
        finite = {"best": self.best, "train_then": self.train_then}
        held = {k: v if math.isfinite(v) else None for k, v in finite.items()}
        return {**held, "worse": self.worse}

    def load(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state` gave."""
        best, then = state.get("best"), state.get("train_then")
        self.best = math.inf if best is None else best
        self.train_then = math.inf if then is None else then
        self.worse = int(state.get("worse", 0))


class Memory:
    """What the guards of a run have seen and done: a checkpoint keeps it, a new run begins anew.

    Args:
        patience: Of the guard against overfitting.

    Attributes:
        loss: The guard of the training loss.
        overfit: The guard against overfitting.
        events: What they did, in order, as plain data.
        backs: Times in a row that the run went back.
        not_finite: Steps in a row whose gradients were no numbers.
    """

    def __init__(self, patience: int) -> None:
        self.loss, self.overfit = LossGuard(), OverfitGuard(patience)
        self.events: list[dict[str, Any]] = []
        self.backs = self.not_finite = 0

    def state(self) -> dict[str, Any]:
        """Returns what a resumed run needs, as plain data."""
        return {
            "loss_guard": self.loss.state(),
            "overfit_guard": self.overfit.state(),
            "events": self.events,
            "in_a_row": {"backs": self.backs, "not_finite": self.not_finite},
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state` gave."""
        self.loss.load(state.get("loss_guard", {}))
        self.overfit.load(state.get("overfit_guard", {}))
        self.events = list(state.get("events", []))
        row = state.get("in_a_row", {})
        self.backs, self.not_finite = row.get("backs", 0), row.get("not_finite", 0)


class Lifeline:
    """A copy of parameters and optimizer state in memory, to go back to.

    Args:
        parameters: What the run trains.
        optimizer: Its optimizer, or accelerate's wrapper.
        step: Optimizer steps taken so far.

    Attributes:
        step: The step that the copy is of.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], optimizer: Any, step: int = 0
    ) -> None:
        self._parameters = parameters
        self._optimizer = getattr(optimizer, "optimizer", optimizer)
        self.keep(step)

    @torch.no_grad()
    def keep(self, step: int) -> None:
        """Takes a copy of how things are after a step."""
        self.step = step
        self._values: dict[str, Tensor] = {n: p.clone() for n, p in self._parameters.items()}
        self._state = copy.deepcopy(self._optimizer.state_dict()["state"])

    @torch.no_grad()
    def back(self, scheduler: Any, factor: float) -> float:
        """Puts values and optimizer state back, multiplies the rate, and drops the gradients.

        Args:
            scheduler: The learning rate scheduler, or accelerate's wrapper; None without one.
            factor: What every learning rate is multiplied with, now and in the schedule.

        Returns:
            The first group's rate from now on.
        """
        for name, parameter in self._parameters.items():
            parameter.copy_(self._values[name])
            parameter.grad = None  # the step that follows changes nothing
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict(
            {"state": copy.deepcopy(self._state), "param_groups": groups}
        )
        scheduler = getattr(scheduler, "scheduler", scheduler)
        if hasattr(scheduler, "base_lrs"):
            scheduler.base_lrs = [rate * factor for rate in scheduler.base_lrs]
        for group in self._optimizer.param_groups:
            group["lr"] *= factor
        if hasattr(scheduler, "_last_lr"):  # what Trainer logs
            scheduler._last_lr = [group["lr"] for group in self._optimizer.param_groups]
        return float(self._optimizer.param_groups[0]["lr"])
