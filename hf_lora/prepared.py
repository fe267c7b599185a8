"""How training on a quantised base is set, in words: what a plan shows of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hf_lora.errors import listing
from hf_lora.quantised import (
    FOREIGN,
    FOUR_BIT,
    HALF,
    PACKS,
    Storage,
    Stored,
    bytes_in,
    is_packed,
    values_in,
)
from hf_lora.walks import bare_modules


@dataclass(frozen=True)
class Setting:
    """One thing that training on a quantised base needs, or does not.

    Attributes:
        what: What it is about.
        value: How it is.
        why: The reason.
    """

    what: str
    value: str
    why: str


@dataclass(frozen=True)
class QuantisedBase:
    """The quantised linears of a model, and how training on them is set.

    Attributes:
        kinds: How they are stored, in words.
        layers: How many there are.
        parameters: Their values, counted unpacked.
        bytes: What they take in memory, scales included.
        settings: What is set, or left as it is, and why.
        notes: What may be wrong with the way the base was loaded.
    """

    kinds: tuple[str, ...]
    layers: int
    parameters: int
    bytes: int
    settings: tuple[Setting, ...]
    notes: tuple[str, ...]


def describe(model: nn.Module, stored: Stored, whole: Collection[str]) -> QuantisedBase | None:
    """Returns what to know of a quantised base before training; None for one that is not.

    Args:
        model: The bare model.
        stored: Its quantised linears.
        whole: Paths of the modules trained whole.
    """
    if not stored:
        return None
    layers = [layer for layer, _ in stored.values()]
    kinds = dict.fromkeys(_in_words(layer, row) for layer, row in stored.values())
    dtype = _dtype_beside(model, stored)
    return QuantisedBase(
        kinds=tuple(kinds),
        layers=len(layers),
        parameters=sum(values_in(layer) for layer in layers),
        bytes=bytes_in(layers),
        settings=tuple(_settings(stored, dtype, whole)),
        notes=tuple(_notes(stored, dtype)),
    )


def _in_words(layer: Any, row: Storage) -> str:
    """Returns the row's name with what is particular to the layer."""
    if row is FOREIGN:
        return type(layer).__name__
    if row is not FOUR_BIT:
        compute = getattr(layer, "compute_dtype", None)
        return row.name if compute is None else f"{row.name}, computes in {_short(compute)}"
    weight, state = layer.weight, getattr(layer.weight, "quant_state", None)
    twice = ", double quantised" if getattr(state, "nested", False) else ""
    return (
        f"{row.name} ({weight.quant_type}{twice}, stored as {_short(weight.quant_storage)}), "
        f"computes in {_short(layer.compute_dtype or torch.float32)}"
    )


def _short(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype_beside(model: nn.Module, stored: Stored) -> torch.dtype | None:
    """Returns the dtype of most values that are not quantised: norms, embeddings, the LM head."""
    packed = {id(layer) for layer, _ in stored.values()}
    count: Counter[torch.dtype] = Counter()
    for _, module in bare_modules(model):
        for p in module._parameters.values() if id(module) not in packed else ():
            if p is not None and p.is_floating_point():
                count[p.dtype] += p.numel()
    return count.most_common(1)[0][0] if count else None


def _settings(
    stored: Stored, dtype: torch.dtype | None, whole: Collection[str]
) -> Iterator[Setting]:
    """Says what is set; what peft.prepare_model_for_kbit_training does besides is not needed.

    It makes all that is not quantised float32, embeddings and LM head too, which takes memory and
    trains no better (benchmarks/quantised.py), and asks for the gradient of the embeddings, which
    transformers 5.23 does itself where checkpointing needs it (`activation_checkpointing_enable`).
    """
    yield Setting("factors", "float32", "half precision loses small updates")
    if whole and dtype in HALF:
        yield Setting("task head", "float32, its input is cast", "as the factors")
    if dtype is not None:
        yield Setting("norms, embeddings", f"{_short(dtype)}, as loaded", "they are frozen")
    yield Setting(
        "input gradients", "not asked for", "checkpointing asks itself where it needs them"
    )
    yield Setting(
        "gradient checkpointing", "works", "reentrant or not, before or after attach_lora"
    )
    if any(vars(layer).get(PACKS) for layer, _ in stored.values()):
        yield Setting(
            "layout on this CPU",
            "stays as loaded",
            "the one that bitsandbytes makes for inference passes no gradient",
        )


def _notes(stored: Stored, dtype: torch.dtype | None) -> Iterator[str]:
    four_bit: list[Any] = [layer for layer, row in stored.values() if row is FOUR_BIT]
    sorts = {(x.compute_dtype or torch.float32, x.weight.device.type) for x in four_bit}
    for compute, device in sorted(sorts, key=str):
        if dtype is not None and compute != dtype:
            yield (
                f"the 4-bit layers compute in {_short(compute)} and the rest of the model in "
                f"{_short(dtype)}, so their inputs and outputs are cast; load with "
                f"bnb_4bit_compute_dtype=torch.{_short(dtype)}"
            )
        elif compute == torch.float32 and device not in ("cpu", "meta"):
            yield (
                f"the 4-bit layers compute in float32, which is slow on {device}; load with "
                "dtype=torch.bfloat16 and bnb_4bit_compute_dtype=torch.bfloat16"
            )
    if any(is_packed(layer) for layer, _ in stored.values()):
        yield (
            "the base has run in eval mode on this CPU, where bitsandbytes rounded its scales to "
            "bfloat16; an adapter is best trained on a base that was not run before attach_lora"
        )
    foreign = [type(layer).__name__ for layer, row in stored.values() if row is FOREIGN]
    if foreign:
        yield (
            f"{len(foreign)} layers are quantised as {listing(dict.fromkeys(foreign))}, on which "
            "hf_lora has compared nothing: check that the loss falls as without quantising"
        )
