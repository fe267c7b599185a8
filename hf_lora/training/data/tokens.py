"""Token rows in memory, and batches of them."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

IGNORED = -100  # the label of a token that the loss leaves out, as torch has it


class TokenRows(Dataset[dict[str, Any]]):
    """Sequences of tokens, kept flat: five bytes a token.

    An item has `input_ids` and `labels`, both of `tokens` values, or one class in `labels`.
    """

    def __init__(self) -> None:
        self._ids = array("i")
        self._learnt = bytearray()
        self._ends = array("q", [0])
        self._classes = array("i")
        self._order: Sequence[int] | None = None  # of all rows; those of this view

    def append(self, ids: Sequence[int], learnt: Sequence[bool], label: int | None = None) -> None:
        """Adds a sequence."""
        self._ids.extend(ids)
        self._learnt.extend(learnt)
        self._ends.append(len(self._ids))
        if label is not None:
            self._classes.append(label)

    def view(self, order: Sequence[int]) -> TokenRows:
        """Returns some of the rows, in the order given, without copying them."""
        part = TokenRows()
        part.__dict__.update(self.__dict__)
        part._order = order if self._order is None else [self._order[i] for i in order]
        return part

    def __len__(self) -> int:
        return len(self._ends) - 1 if self._order is None else len(self._order)

    def _place(self, index: int) -> tuple[int, int, int]:
        row = index if self._order is None else self._order[index]
        return row, self._ends[row], self._ends[row + 1]

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        row, start, end = self._place(index)
        ids = self._ids[start:end].tolist()
        if self._classes:
            return {"input_ids": ids, "labels": self._classes[row]}
        learnt = self._learnt[start:end]
        return {
            "input_ids": ids,
            "labels": [i if flag else IGNORED for i, flag in zip(ids, learnt, strict=True)],
        }

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence."""
        places = (self._place(i) for i in range(len(self)))
        return [end - start for _, start, end in places]

    @property
    def learnt_tokens(self) -> int:
        """Tokens that the loss counts (0 for classes)."""
        if self._classes:
            return 0
        places = (self._place(i) for i in range(len(self)))
        return sum(self._learnt.count(1, start, end) for _, start, end in places)

    @property
    def largest_id(self) -> int:
        """The largest token number; -1 without tokens."""
        return max(self._ids, default=-1)

    def rename_classes(self, numbers: Sequence[int]) -> None:
        """Puts `numbers[c]` in the place of every class c."""
        self._classes = array("i", (numbers[c] for c in self._classes))

    def digest(self, state: Any) -> None:
        """Feeds the rows, in order, into a hashlib object."""
        for i in range(len(self)):
            row, start, end = self._place(i)
            state.update((end - start).to_bytes(8, "little"))
            state.update(self._ids[start:end].tobytes())
            state.update(self._learnt[start:end])
            if self._classes:
                state.update(self._classes[row].to_bytes(4, "little"))


class PadCollator:
    """Makes a batch of sequences, the shorter ones padded at their end.

    Args:
        pad_id: Token in the padding; no attention goes to it and no loss counts it.
    """

    def __init__(self, pad_id: int) -> None:
        self.pad_id = pad_id

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Returns input_ids and attention_mask, (rows, tokens), and labels, alike or (rows,)."""
        longest = max(len(item["input_ids"]) for item in items)
        ids = torch.full((len(items), longest), self.pad_id)
        mask = torch.zeros((len(items), longest), dtype=torch.long)
        for row, item in enumerate(items):
            ids[row, : len(item["input_ids"])] = torch.tensor(item["input_ids"])
            mask[row, : len(item["input_ids"])] = 1
        batch = {"input_ids": ids, "attention_mask": mask}
        if not isinstance(items[0]["labels"], list):
            return {**batch, "labels": torch.tensor([item["labels"] for item in items])}
        labels = torch.full((len(items), longest), IGNORED)
        for row, item in enumerate(items):
            labels[row, : len(item["labels"])] = torch.tensor(item["labels"])
        return {**batch, "labels": labels}
