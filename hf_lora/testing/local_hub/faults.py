"""What is to go wrong, and with which requests."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from hf_lora.errors import InvalidOption

__all__ = ["Fault", "Faults", "Plan"]

Fault = Literal["drop", "drop-answer", "cut", "delay", 429, 500, 503]
_TIMED = ("delay", 429, 503)  # faults that a number of seconds belongs to


@dataclass
class Plan:
    """What happens to some requests.

    Attributes:
        what: A fault, or what is called before the request is carried out.
        matching: Text or pattern that is found in `METHOD path`; None: in every request.
        at: Matching requests that pass before the first that is hit.
        times: How many are hit.
        seconds: How long to wait, or to tell the client to wait; None: nothing is told.
        seen: Matching requests so far.
        hits: Requests hit so far.
    """

    what: Fault | Callable[[], object]
    matching: str | re.Pattern[str] | None
    at: int
    times: int
    seconds: float | None = None
    seen: int = 0
    hits: int = 0

    def is_due(self, line: str) -> bool:
        """Counts a request, `METHOD path`, and returns whether it is to be hit."""
        if isinstance(self.matching, re.Pattern):
            matches = self.matching.search(line) is not None
        else:
            matches = self.matching is None or self.matching in line
        if not matches:
            return False
        self.seen += 1
        return self.seen > self.at and self.hits < self.times


def checked(plan: Plan) -> Plan:
    """Returns a plan that can be carried out.

    Raises:
        InvalidOption: A value cannot work.
    """
    if not callable(plan.what) and plan.what not in get_args(Fault):
        raise InvalidOption(f"no fault {plan.what!r}", fix=f"Faults: {[*get_args(Fault)]}.")
    if plan.at < 0 or plan.times < 1:
        raise InvalidOption(
            f"at={plan.at}, times={plan.times} hits no request",
            fix="Give at=0 or more and times=1 or more.",
        )
    if plan.what == "delay" and plan.seconds is None:
        raise InvalidOption("a delay without a length", fix="Give seconds=.")
    if plan.seconds is not None and (plan.what not in _TIMED or plan.seconds < 0):
        raise InvalidOption(
            f"seconds={plan.seconds} with {plan.what!r}",
            fix="seconds= is 0 or more, and belongs to a delay, 429 or 503.",
        )
    return plan


class Faults:
    """All plans. Several threads ask at once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._plans: list[Plan] = []

    def add(self, plan: Plan) -> None:
        """Adds a plan.

        Raises:
            InvalidOption: A value cannot work.
        """
        with self._lock:
            self._plans.append(checked(plan))

    def clear(self) -> None:
        """Forgets all plans, what they hit included."""
        with self._lock:
            self._plans.clear()

    def take(self, line: str) -> Plan | None:
        """Returns the fault that hits a request, the first where several are due."""
        with self._lock:
            plans = [plan for plan in self._plans if not callable(plan.what)]
            due = [plan for plan in plans if plan.is_due(line)]
            if not due:
                return None
            due[0].hits += 1
            return due[0]

    def callbacks(self, line: str) -> list[Callable[[], object]]:
        """Returns what is to be called before a request is carried out."""
        called = []
        with self._lock:
            for plan in self._plans:
                if callable(plan.what) and plan.is_due(line):
                    plan.hits += 1
                    called.append(plan.what)
        return called

    @property
    def hits(self) -> int:
        """How many requests were hit by a fault."""
        with self._lock:
            return sum(plan.hits for plan in self._plans if not callable(plan.what))
