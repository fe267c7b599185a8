"""Batches without padding waste: whole examples packed into one row, or grouped by length.

Packed examples must not see each other. transformers 5.23 builds the block-diagonal mask itself
(`masking_utils.find_packed_sequence_indices`) when position ids restart, no attention mask is given
and no cache is used; its FlashAttention path reads the same from position ids, but only in a batch
of one row. Models that number positions or carry a state in their own way do neither and would
leak; `check_packs` asks the model itself.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler

from hf_lora.errors import UnsupportedHost
from hf_lora.training.data.tokens import IGNORED, TokenRows

_MEGABATCH = 50  # batches that are sorted by length together, as transformers' own sampler does
_PROBE = 6  # tokens of each of the two examples of `check_packs`


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Distributes examples over rows, each as full as best-fit-decreasing makes it.

    Args:
        lengths: Tokens of each example; none is longer than `capacity`.
        capacity: Tokens a row holds at most.

    Returns:
        For each row the numbers of its examples.
    """
    packs: list[list[int]] = []
    room: list[int] = []  # the free tokens that occur, ascending
    by_room: dict[int, list[int]] = {}  # free tokens -> rows with just as many
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        place = bisect.bisect_left(room, length)
        if place == len(room):
            number, left = len(packs), capacity - length
            packs.append([index])
        else:
            free = room[place]
            number, left = by_room[free].pop(), free - length
            packs[number].append(index)
            if not by_room[free]:
                del by_room[free], room[place]
        if left:
            if left not in by_room:
                bisect.insort(room, left)
            by_room.setdefault(left, []).append(number)
    return packs


class PackedRows(Dataset[dict[str, Any]]):
    """Rows of several examples each; an item also has `position_ids`, which restart.

    Args:
        rows: The examples.
        max_length: Tokens a row holds at most.
    """

    def __init__(self, rows: TokenRows, max_length: int) -> None:
        self.rows = rows
        self.packs = pack(rows.lengths, max_length)

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item: dict[str, Any] = {"input_ids": [], "labels": [], "position_ids": []}
        for number in self.packs[index]:
            example = self.rows[number]
            item["input_ids"] += example["input_ids"]
            item["labels"] += example["labels"]
            item["position_ids"] += range(len(example["input_ids"]))
        return item

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        lengths = self.rows.lengths
        return [sum(lengths[i] for i in numbers) for numbers in self.packs]


class PackCollator:
    """Makes a batch of packed rows. There is no attention mask: position ids say it all.

    Args:
        pad_id: Token in the padding, which forms an example of its own that no loss counts.
        flat: Whether rows are laid end to end, as FlashAttention needs it. Other kinds of attention
            get a batch of rows: one long row would square their cost.
    """

    def __init__(self, pad_id: int, *, flat: bool) -> None:
        self.pad_id = pad_id
        self.flat = flat

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Returns input_ids, labels and position_ids, (rows, tokens)."""
        if self.flat:
            items = [{key: [x for item in items for x in item[key]] for key in items[0]}]
        longest = max(len(item["input_ids"]) for item in items)
        fills = {"input_ids": [self.pad_id], "labels": [IGNORED]}
        batch = {}
        for key in ("input_ids", "labels", "position_ids"):
            rows = []
            for item in items:
                gap = longest - len(item[key])
                rows.append(item[key] + (fills[key] * gap if key in fills else list(range(gap))))
            batch[key] = torch.tensor(rows)
        return batch


def attends_flat(model: nn.Module) -> bool:
    """Says whether the model's attention reads packed examples only from a batch of one row."""
    config = getattr(model, "config", None)
    return "flash" in str(getattr(config, "_attn_implementation", ""))


def check_packs(model: Any) -> None:
    """Checks on the model itself that examples packed into a row do not see each other.

    Two short examples go through the model in one row, then the first is exchanged and the second
    stays: what is computed for the second may not change. Then it goes alone: positions restart.

    Raises:
        UnsupportedHost: They see each other, or the model takes no position ids.
    """
    name = type(model).__name__
    fix = "Use --group-by-length, which wastes little on padding, in place of --packing."
    device = next(model.parameters()).device
    first, other, second = (
        torch.arange(start, start + _PROBE, device=device)[None] for start in (1, 31, 11)
    )
    places = torch.arange(_PROBE, device=device)[None]
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            together, exchanged = (
                model(
                    input_ids=torch.cat([ids, second], dim=1),
                    position_ids=torch.cat([places, places], dim=1),
                    use_cache=False,
                ).logits[:, _PROBE:]
                for ids in (first, other)
            )
            alone = model(input_ids=second, position_ids=places, use_cache=False).logits
    except TypeError:
        raise UnsupportedHost(f"{name} takes no position ids, so it cannot pack", fix=fix) from None
    finally:
        for module, training in modes.items():
            module.training = training
    # against the spread of the logits: measured 0 to 1e-6 in the first case, 1e-6 (float32) in the
    # second, where sums have another order; 0.02 and more in models that leak
    half = together.dtype != torch.float32
    for what, wrong, slack in (
        ("see each other", exchanged, 1e-3),
        ("keep no positions of their own", alone, 0.25 if half else 1e-3),
    ):
        difference = (together.float() - wrong.float()).abs().max()
        if float(difference) > slack * float(alone.float().std()):
            raise UnsupportedHost(f"in {name}, examples packed into one row {what}", fix=fix)


class LengthSampler(Sampler[int]):
    """Shuffles, then puts examples of like length side by side; the same for the same epoch.

    transformers' own draws from the global generator, so a resumed run would see another order.

    Args:
        lengths: Tokens of each example.
        batch: Examples that are computed together.
        seed: Seed of the order.
    """

    def __init__(self, lengths: Sequence[int], batch: int, seed: int) -> None:
        self.lengths = lengths
        self.batch = batch
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Says which epoch comes next; accelerate calls it."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        size = self.batch * _MEGABATCH
        batches = []
        for start in range(0, len(order), size):
            part = sorted(order[start : start + size], key=lambda i: -self.lengths[i])
            batches += [part[i : i + self.batch] for i in range(0, len(part), self.batch)]
        # a short last batch stays last: between the others it would shift all that follow
        last = [batches.pop()] if batches and len(batches[-1]) < self.batch else []
        mixed = torch.randperm(len(batches), generator=generator).tolist()
        for batch in [batches[i] for i in mixed] + last:
            yield from batch
