"""Where the parts of one fused matrix lie: rows of knowledge, by model type.

A fused projection of q, k and v makes all heads at once. Its output features stand in equal groups,
one behind the other; each group holds the q features of its heads, then k, then v (or in another
order). One group is the plain stack [Q; K; V]; a group for each head is the interleaved layout of
BLOOM and GPT-NeoX. A fused gate and up projection of an MLP is a stack of two halves. Wrong rows
would train another part without a word, so a type that is not listed here cannot be adapted by
parts. No torch here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

__all__ = ["GATE_UP", "SPLITS", "Split", "attention_split", "rows_of", "split_of"]


@dataclass(frozen=True)
class Split:
    """How one fused projection is cut.

    Attributes:
        groups: Number of equal groups.
        parts: (part, size) inside a group, in order; sizes relative to each other.
    """

    groups: int
    parts: tuple[tuple[str, int], ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The parts in order."""
        return tuple(part for part, _ in self.parts)


def rows_of(split: Split, features: int) -> dict[str, list[int]]:
    """Returns part -> its output features in order.

    Args:
        split: The layout.
        features: Output features of the fused projection.

    Raises:
        ValueError: The layout does not divide that number.
    """
    units = split.groups * sum(size for _, size in split.parts)
    if not units or features % units:
        raise ValueError(f"{features} features are no {split}")
    rows: dict[str, list[int]] = {part: [] for part in split.names}
    start = 0
    for part, size in split.parts * split.groups:
        end = start + size * (features // units)
        rows[part].extend(range(start, end))
        start = end
    return rows


def attention_split(groups: int, heads: int, kv_heads: int, order: str = "qkv") -> Split:
    """Returns the layout of attention, by numbers of heads over all groups; 0 leaves q out."""
    sizes = {"q": heads // groups, "k": kv_heads // groups, "v": kv_heads // groups}
    return Split(groups, tuple((part, sizes[part]) for part in order if sizes[part]))


def _heads(config: Any) -> int:
    return int(config.num_attention_heads)


def _kv_heads(config: Any) -> int:
    return int(getattr(config, "num_key_value_heads", None) or _heads(config))


def _stacked(config: Any) -> Split:
    return attention_split(1, _heads(config), _kv_heads(config))


def _by_head(config: Any) -> Split:
    return attention_split(_heads(config), _heads(config), _heads(config))


def _dbrx(config: Any) -> Split:
    return attention_split(1, int(config.n_heads), int(config.attn_config.kv_n_heads))


def _falcon(config: Any) -> Split:
    if config.new_decoder_architecture:
        return attention_split(int(config.num_kv_heads), _heads(config), int(config.num_kv_heads))
    return attention_split(1, _heads(config), 1) if config.multi_query else _by_head(config)


def _bigcode(config: Any) -> Split:
    return attention_split(1, _heads(config), 1) if config.multi_query else _by_head(config)


def _codegen(config: Any) -> Split:
    return attention_split(4, _heads(config), _heads(config), order="qvk")


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


# Types whose MLP makes `gate, up = gate_up_proj(x).chunk(2)`; read there, too.
GATE_UP = frozenset(
    {"dia", "glm", "glm4", "glm4v_text", "glm_image_text", "glm_ocr_text", "phi3", "zamba2"}
)


def split_of(known: Callable[[Any], Split], config: Any, role: str) -> Split:
    """Returns how a projection of attention is cut.

    Args:
        known: An entry of `SPLITS`, or one of a family's own.
        config: Config of the language model.
        role: `attn.qkv`, or `attn.kv` where q has a layer of its own.
    """
    split = known(config)
    if role.endswith(".kv"):
        return Split(split.groups, tuple((p, size) for p, size in split.parts if p != "q"))
    return split
