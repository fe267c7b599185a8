"""What the layers of a host are called elsewhere: by its makers, by ComfyUI, by kohya's scripts.

ComfyUI puts `diffusion_model.` before the makers' path, kohya `lora_unet_` with `_` for every `.`;
how a file spells it is the business of its codec. Here are the paths, on the layers that one host
has.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate, pairwise

from hf_lora.formats import native_images as images
from hf_lora.formats import native_videos as videos
from hf_lora.formats.names import Names, Piece
from hf_lora.formats.native_rows import Block, Rows
from hf_lora.formats.sgm import sgm_names

# Class name -> its rows. What is not here has its makers' names (Qwen-Image, HiDream, Ernie, T5),
# or is not known.
ROWS: Mapping[str, Rows] = {
    "AceStepTransformer1DModel": videos.ACE_STEP,
    "AuraFlowTransformer2DModel": images.AURAFLOW,
    "ChromaTransformer2DModel": images.FLUX,
    "ChronoEditTransformer3DModel": videos.WAN,
    "CosmosTransformer3DModel": videos.COSMOS,
    "Flux2Transformer2DModel": images.FLUX2,
    "Flux3Transformer2DModel": images.FLUX3,
    "FluxTransformer2DModel": images.FLUX,
    "HunyuanVideoFramepackTransformer3DModel": videos.HUNYUAN_VIDEO,
    "HunyuanVideoTransformer3DModel": videos.HUNYUAN_VIDEO,
    "Ideogram4Transformer2DModel": images.IDEOGRAM4,
    "Krea2Transformer2DModel": images.KREA2,
    "LTX2VideoTransformer3DModel": videos.LTX2,
    "LTXVideoTransformer3DModel": videos.LTX,
    "Lumina2Transformer2DModel": images.LUMINA2,
    "MiniMaxH3Transformer3DModel": videos.MINIMAX_H3,
    "MochiTransformer3DModel": videos.MOCHI,
    "QwenImage21Transformer2DModel": images.QWEN_IMAGE_21,
    "SD3Transformer2DModel": images.SD3,
    "SanaTransformer2DModel": images.SANA,
    "SkyReelsV2Transformer3DModel": videos.WAN,
    "WanAnimate2Transformer3DModel": videos.WAN_ANIMATE_2,
    "WanAnimateTransformer3DModel": videos.WAN,
    "WanTransformer3DModel": videos.WAN,
    "WanVACETransformer3DModel": videos.WAN,
    "ZImageTransformer2DModel": images.Z_IMAGE,
}

UNETS = ("UNet2DConditionModel", "UNetMotionModel")  # the motion model has the UNet's layers
_CLIPS = ("CLIPTextModel", "CLIPTextModelWithProjection")
_CLIP_TRUNK = "text_model."

# What `fuse_qkv_projections` puts beside three layers, and then calls in their place.
_FUSED = {
    ("to_q", "to_k", "to_v"): "to_qkv",
    ("add_q_proj", "add_k_proj", "add_v_proj"): "to_added_qkv",
}


def native_names(names: Names) -> dict[str, tuple[Piece, ...]]:
    """Returns the other names of a host's layers.

    Args:
        names: Class and layers of one component.

    Returns:
        Dotted path in the makers' repository -> the host's layers that its output features lie on,
        in their order. The host's own paths are not among them. Empty for a class that has no
        other names, or none that are known.
    """
    found: dict[str, tuple[Piece, ...]]
    if names.kind in UNETS:
        found = {name: (Piece(path),) for name, path in sgm_names(names.layers)}
    elif names.kind in _CLIPS:
        found = {name: (Piece(path),) for name, path in _clip_names(names.layers)}
    else:
        rows = ROWS.get(names.kind, ())
        found = {name: pieces for row in rows for name, pieces in _expanded(row, names.layers)}
    return {name: pieces for name, pieces in found.items() if pieces != (Piece(name),)}


def _clip_names(layers: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yields names with `text_model.` for a host without, and the reverse.

    transformers 5.6 took that level out of CLIPTextModel, not out of the class with a projection.
    """
    trunk = [path for path in layers if path.startswith(_CLIP_TRUNK)]
    for path in trunk or layers:
        yield (path.removeprefix(_CLIP_TRUNK) if trunk else f"{_CLIP_TRUNK}{path}"), path


def _expanded(
    row: Block, layers: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[str, tuple[Piece, ...]]]:
    """Yields (their name, pieces) of a row for every block that the host has."""
    for filled in _places(row.ours, layers):
        theirs, ours = row.theirs.format(*filled), row.ours.format(*filled)
        for name, places in _unstarred(row.layers, ours, layers):
            paths = [_joined(ours, place) for place in places.split()]
            if all(path in layers for path in paths):
                yield _joined(theirs, name), _pieces(row, name, paths, layers)


def _places(template: str, paths: Iterable[str]) -> list[tuple[str, ...]]:
    """Returns what stands for the `{}` of a block's path, once for each block of the host."""
    if "{}" not in template:
        return [()]
    pattern = re.compile(r"([^.]+)".join(map(re.escape, template.split("{}"))) + r"\.")
    matches = (pattern.match(path) for path in paths)
    return list(dict.fromkeys(match.groups() for match in matches if match))


def _unstarred(
    rows: Mapping[str, str], ours: str, layers: Iterable[str]
) -> Iterator[tuple[str, str]]:
    """Yields the rows of a block, one that ends in `*` as often as the host has such layers."""
    for name, place in rows.items():
        if not place.endswith("*"):
            yield name, place
            continue
        start = _joined(ours, place[:-1])
        for path in layers:
            if path.startswith(start):
                rest = path.removeprefix(start)
                yield f"{name[:-1]}{rest}", f"{place[:-1]}{rest}"


def _pieces(
    row: Block, name: str, paths: list[str], layers: Mapping[str, tuple[int, ...]]
) -> tuple[Piece, ...]:
    if len(paths) == 1:
        out, width = layers[paths[0]][:2]
        swapped = name in row.swapped or (name in row.halved and out == 2 * width)
        return (Piece(paths[0], swapped=swapped),)
    paths = _fused(paths, layers)
    if len(paths) == 1:
        return (Piece(paths[0]),)
    ends = accumulate((layers[path][0] for path in paths), initial=0)
    return tuple(Piece(path, rows) for path, rows in zip(paths, pairwise(ends), strict=True))


def _fused(paths: list[str], layers: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Returns the paths, with the layer that the host calls in place of three that it has fused."""
    parent = paths[0].rpartition(".")[0]
    for parts, whole in _FUSED.items():
        fused = f"{parent}.{whole}"
        if fused in layers and paths[:3] == [f"{parent}.{part}" for part in parts]:
            return [fused, *paths[3:]]
    return paths


def _joined(block: str, path: str) -> str:
    return f"{block}.{path}" if block else path
