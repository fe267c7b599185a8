"""Is there anything to learn from? Data without a batch, a column or a label is BadDataset."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hf_lora.errors import BadDataset, listing


def check_rows(loader: Any) -> None:
    """Raises BadDataset for a loader that knows to have no batch; Trainer would end without one."""
    try:
        count = len(loader)
    except TypeError:
        return  # an iterable data set does not know
    if not count:
        raise BadDataset(
            "the training data has no batch",
            fix="It is empty, or dataloader_drop_last drops the one batch it has.",
        )


def without_loss(inputs: Any, labels: Sequence[str]) -> BadDataset | None:
    """Returns what a batch lacks that no loss came of; None where it lacks nothing.

    Args:
        inputs: The batch, as the collator made it.
        labels: The arguments of the model that are labels, each enough for a loss.
    """
    if not isinstance(inputs, Mapping) or any(name in inputs for name in labels):
        return None
    if not inputs:
        return BadDataset(
            "no column of the training data is an argument of the model's forward",
            fix="Tokenise the rows: the model takes input_ids and labels, not text.",
            field="train_dataset",
        )
    return BadDataset(
        f"the training data has no labels: a batch holds {listing(inputs)}, and the model computes "
        f"its loss from {listing(labels) or 'labels'}",
        fix="Add the column, or give a data_collator that makes it, such as "
        "DataCollatorForLanguageModeling(tokenizer, mlm=False).",
        field="train_dataset",
    )
