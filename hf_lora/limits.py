"""How large and deep a file may be before it is refused unread."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from hf_lora.errors import InvalidOption


@dataclass(frozen=True)
class LoadLimits:
    """Bounds that a file must keep; raise one for a file you trust.

    Attributes:
        header: Bytes of a safetensors header, its metadata included.
        tensors: Number of tensors in a file.
        config: Bytes of a JSON config.
        depth: Nesting of JSON.
        scaling: Absolute value of alpha/rank; adapters in use lie between 0.01 and some tens.
        value: Absolute value of the numbers in a factor; trained ones lie far below 100.

    Raises:
        InvalidOption: A bound is no positive number.
    """

    header: int = 64 << 20
    tensors: int = 500_000
    config: int = 1 << 20
    depth: int = 32
    scaling: float = 1000.0
    value: float = 1e6

    def __post_init__(self) -> None:
        for bound in fields(self):
            value = getattr(self, bound.name)
            whole = isinstance(value, int) or bound.name in ("scaling", "value")
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not (number and whole and math.isfinite(value) and value > 0):
                raise InvalidOption(
                    f"limits.{bound.name}={value!r} is no positive number", field="limits"
                )


DEFAULT_LIMITS = LoadLimits()
