"""The form of a row of `native_images` and `native_videos`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Block:
    """The layers of one kind of block, or of the model itself.

    Attributes:
        theirs: Path of the block in the makers' repository; `{}` stands for one path segment, such
            as its number. Empty for the model itself.
        ours: Its path on the host, with as many `{}` in the same order.
        layers: Their path below the block -> the host's below its own. Several, apart by spaces,
            lie side by side in the output features of the one layer of theirs. One that ends in
            `*` stands for every layer that begins so.
        swapped: Layers of theirs whose two halves the host has in the other order.
        halved: The same, but only of layers with two output features for each input feature: what
            is one shift and one scale in the last block has three of each in the others, in the
            same order on both sides.
    """

    theirs: str
    ours: str
    layers: Mapping[str, str]
    swapped: tuple[str, ...] = ()
    halved: tuple[str, ...] = ()


Rows = tuple[Block, ...]

QKV = "attn.to_q attn.to_k attn.to_v"
ADDED = "attn.add_q_proj attn.add_k_proj attn.add_v_proj"
TIME = "time_text_embed.timestep_embedder"
GUIDANCE = "time_text_embed.guidance_embedder"
POOLED = "time_text_embed.text_embedder"
SHIFT_SCALE = ("final_layer.adaLN_modulation.1",)  # diffusers has the scale first
