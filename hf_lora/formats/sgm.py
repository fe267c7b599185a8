"""Stability AI's names of a UNet's layers: `input_blocks.4.1.proj_in`, `out.2`, `time_embed.0`.

They number the blocks through, so the names follow from how many resnets, attentions and samplers
each block of the host has. Source: diffusers 0.42.1, `convert_ldm_unet_checkpoint`.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping

# Layers outside the blocks.
_OUTSIDE = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "class_embedding": "label_emb",  # of numbered classes
    "class_embedding.linear_1": "label_emb.0.0",  # of vectors
    "class_embedding.linear_2": "label_emb.0.2",
    "add_embedding.linear_1": "label_emb.0.0",  # SDXL's sizes and pooled text
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
}

# Layers of a resnet.
_RESNET = {
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}

_PART = re.compile(r"(down_blocks\.\d+|mid_block|up_blocks\.\d+)\.(\w+)\.(\d+)\.(.+)")

# Layers of an attention, which have one name on both sides. Other UNets have other attentions.
_ATTENTION = ("proj_in", "proj_out", "transformer_blocks.")

# Block -> kind of part -> number of the part -> its layers below it.
Parts = Mapping[str, Mapping[str, Mapping[int, list[str]]]]


def sgm_names(layers: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yields (name of Stability AI, path on the host) of the layers of a UNet that have one.

    Args:
        layers: Paths of the host's layers.
    """
    parts: dict[str, dict[str, dict[int, list[str]]]]
    parts = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for path in layers:
        if path in _OUTSIDE:
            yield _OUTSIDE[path], path
        elif match := _PART.fullmatch(path):
            block, kind, number, layer = match.groups()
            parts[block][kind][int(number)].append(layer)
    for theirs, ours in _blocks(parts):
        block, kind, number = ours.rsplit(".", 2)
        for layer in parts[block][kind][int(number)]:
            name = _spelt(kind, layer)
            if name:
                yield f"{theirs}.{name}", f"{ours}.{layer}"


def _spelt(kind: str, layer: str) -> str:
    """Returns their name of a layer below a part, empty where they have no such layer."""
    if kind == "resnets":
        return _RESNET.get(layer, "")
    if kind == "attentions":
        return layer if layer.startswith(_ATTENTION) else ""
    sampler = {"downsamplers": "op", "upsamplers": "conv"}[kind]
    return sampler if layer == "conv" else ""


def _blocks(parts: Parts) -> Iterator[tuple[str, str]]:
    """Yields (their path, the host's path) of every resnet, attention and sampler."""
    place = 1  # 0 is conv_in
    for block in _numbered("down_blocks", parts):
        for number in sorted(parts[block]["resnets"]):
            yield from _beside(f"input_blocks.{place}", block, number, parts)
            place += 1
        if 0 in parts[block]["downsamplers"]:
            yield f"input_blocks.{place}.0", f"{block}.downsamplers.0"
            place += 1
    yield from _middle(parts)
    place = 0
    for block in _numbered("up_blocks", parts):
        numbers = sorted(parts[block]["resnets"])
        for number in numbers:
            theirs = f"output_blocks.{place}"
            beside = list(_beside(theirs, block, number, parts))
            yield from beside
            if number == numbers[-1] and 0 in parts[block]["upsamplers"]:
                yield f"{theirs}.{len(beside)}", f"{block}.upsamplers.0"
            place += 1


def _beside(theirs: str, block: str, number: int, parts: Parts) -> Iterator[tuple[str, str]]:
    """Yields a resnet and, if there is one, the attention after it: to them one block."""
    yield f"{theirs}.0", f"{block}.resnets.{number}"
    if number in parts[block]["attentions"]:
        yield f"{theirs}.1", f"{block}.attentions.{number}"


def _middle(parts: Parts) -> Iterator[tuple[str, str]]:
    """Yields the middle block, where a resnet comes first and attentions and resnets follow."""
    kinds = parts["mid_block"]
    place = 0
    for number in sorted(kinds["resnets"]):
        yield f"middle_block.{place}", f"mid_block.resnets.{number}"
        place += 1
        if number in kinds["attentions"]:
            yield f"middle_block.{place}", f"mid_block.attentions.{number}"
            place += 1


def _numbered(kind: str, parts: Parts) -> list[str]:
    blocks = [block for block in parts if block.startswith(f"{kind}.")]
    return sorted(blocks, key=lambda block: int(block.rpartition(".")[2]))
