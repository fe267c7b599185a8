"""Is what should be trained in the optimizer?"""

from __future__ import annotations

from collections import Counter
from typing import Any

from hf_lora.errors import TrainingError, listing
from hf_lora.training.optimizers.groups import trained_parts


def check_coverage(host: object, optimizer: Any) -> None:
    """Checks that the optimizer holds every parameter of the adapter that is trained, once.

    Args:
        host: The model of the run.
        optimizer: A torch optimizer, or accelerate's wrapper.

    Raises:
        TrainingError: It misses some (it was built before the adapter was attached or moved) or
            holds one twice; nothing is trainable, or parameters of the base are.
    """
    wanted = trained_parts(host)
    held = Counter(id(p) for group in optimizer.param_groups for p in group["params"])
    missing = [part.name for part in wanted if not held[id(part.parameter)]]
    if missing:
        raise TrainingError(
            f"the optimizer misses {len(missing)} of {len(wanted)} parameters that are to be "
            f"trained: {listing(missing, limit=3)}",
            fix="It was built before the adapter was attached: build it afterwards, or let Trainer "
            "build it.",
        )
    twice = [part.name for part in wanted if held[id(part.parameter)] > 1]
    if twice:
        raise TrainingError(
            f"the optimizer holds {len(twice)} parameters twice, which are stepped twice: "
            f"{listing(twice, limit=3)}",
            fix="Put each parameter into one group.",
        )
