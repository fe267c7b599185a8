"""Where q, k and v lie in one fused matrix: rows of knowledge, by model type.

A fused projection makes all heads at once. Its output features stand in equal groups, one behind
the other; each group holds the q features of its heads, then k, then v (or in another order). One
group is the plain stack [Q; K; V]; a group for each head is the interleaved layout of BLOOM and
GPT-NeoX. Wrong rows would train another part without a word, so a type that is not listed here
cannot be adapted by parts. No torch here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

__all__ = ["SPLITS", "Split", "rows_of", "split_of"]


@dataclass(frozen=True)
class Split:
    """How one fused projection is cut.

    Attributes:
        groups: Number of equal groups.
        heads: Heads of q over all groups; 0 where q has a layer of its own.
        kv_heads: Heads of k, and as many of v.
        order: Parts inside a group.
    """

    groups: int
    heads: int
    kv_heads: int
    order: str = "qkv"


def rows_of(split: Split, features: int) -> dict[str, list[int]]:
    """Returns part -> its output features in order.

    Args:
        split: The layout.
        features: Output features of the fused projection.

    Raises:
        ValueError: The layout does not divide that number.
    """
    all_heads = split.heads + 2 * split.kv_heads
    if features % all_heads or split.heads % split.groups or split.kv_heads % split.groups:
        raise ValueError(f"{features} features are no {split}")
    width = features // all_heads
    rows: dict[str, list[int]] = {}
    start = 0
    for part in split.order * split.groups:
        size = (split.heads if part == "q" else split.kv_heads) // split.groups * width
        rows.setdefault(part, []).extend(range(start, start + size))
        start += size
    return rows


def _heads(config: Any) -> int:
    return int(config.num_attention_heads)


def _kv_heads(config: Any) -> int:
    return int(getattr(config, "num_key_value_heads", None) or _heads(config))


def _stacked(config: Any) -> Split:
    return Split(1, _heads(config), _kv_heads(config))


def _by_head(config: Any) -> Split:
    return Split(_heads(config), _heads(config), _heads(config))


def _dbrx(config: Any) -> Split:
    return Split(1, int(config.n_heads), int(config.attn_config.kv_n_heads))


def _falcon(config: Any) -> Split:
    if config.new_decoder_architecture:
        return Split(int(config.num_kv_heads), _heads(config), int(config.num_kv_heads))
    return Split(1, _heads(config), 1) if config.multi_query else _by_head(config)


def _bigcode(config: Any) -> Split:
    return Split(1, _heads(config), 1) if config.multi_query else _by_head(config)


def _codegen(config: Any) -> Split:
    return Split(4, _heads(config), _heads(config), order="qvk")


# Read off the forward of `models/<type>/modeling_<type>.py` of transformers 5.23.0.
SPLITS: Mapping[str, Callable[[Any], Split]] = MappingProxyType(
    {
        "bloom": _by_head,
        "codegen": _codegen,
        "dbrx": _dbrx,
        "deberta": _by_head,
        "falcon": _falcon,
        "fuyu": _by_head,  # the text model is a persimmon
        "gpt2": _stacked,
        "gpt_bigcode": _bigcode,
        "gpt_neox": _by_head,
        "gpt_neox_japanese": _by_head,
        "jetmoe": _stacked,
        "minimax": _by_head,
        "modernbert": _stacked,
        "mpt": _stacked,
        "openai-gpt": _stacked,
        "persimmon": _by_head,
        "phi3": _stacked,
        "phi4_multimodal": _stacked,
    }
)


def split_of(known: Callable[[Any], Split], config: Any, role: str) -> Split:
    """Returns how the projection of a role is cut.

    Args:
        known: An entry of `SPLITS`, or one of a family's own.
        config: Config of the language model.
        role: `attn.qkv`, or `attn.kv` where q has a layer of its own.
    """
    split = known(config)
    if role.endswith(".kv"):
        return Split(split.groups, 0, split.kv_heads, split.order.replace("q", ""))
    return split
