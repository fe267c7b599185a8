"""Does a batch fit the pipeline? What does not is a BadDataset that says so."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_lora.errors import BadDataset
from hf_lora.hosts import model_of
from hf_lora.training.diffusion.rows import IDS, Text

_ROUNDING = 1e-2  # half precision and resampling go past 1 by less


def check_pixels(pixels: Tensor, factor: int, multiple: int) -> None:
    """Checks pictures (batch, 3, height, width) of numbers from -1 to 1.

    Args:
        pixels: The pictures.
        factor: Pixels a side for one place of the latents.
        multiple: Height and width of latents are multiples of it.
    """
    if pixels.ndim != 4 or pixels.shape[1] != 3 or not len(pixels):
        raise BadDataset(
            f"pixel_values are {tuple(pixels.shape)}, not (batch, 3, height, width)",
            fix='Open pictures with .convert("RGB") and put channels first.',
            field="pixel_values",
        )
    if not pixels.is_floating_point():
        raise BadDataset(
            f"pixel_values are {pixels.dtype}, not floats in [-1, 1]",
            fix="Divide bytes by 127.5 and subtract 1.",
            field="pixel_values",
        )
    side = factor * multiple
    height, width = pixels.shape[-2:]
    if not height or not width or height % side or width % side:
        raise BadDataset(
            f"pictures are {height} x {width} pixels, which are no multiples of {side}",
            fix="Resize or crop them.",
            field="pixel_values",
        )
    least, most = pixels.aminmax()
    if not (least >= -1 - _ROUNDING and most <= 1 + _ROUNDING):
        raise BadDataset(
            f"pixel_values go from {float(least):.4g} to {float(most):.4g}, not from -1 to 1",
            fix="Divide bytes by 127.5 and subtract 1; a picture that is not finite is broken.",
            field="pixel_values",
        )


def check_latents(latents: Tensor, channels: int, multiple: int, field: str) -> None:
    """Checks latents or moments (batch, channels, height, width)."""
    sound = latents.ndim == 4 and latents.shape[1] == channels and latents.is_floating_point()
    if not sound or not latents.numel():
        raise BadDataset(
            f"{field} are {tuple(latents.shape)} of {latents.dtype}, not floats "
            f"(batch, {channels}, height, width)",
            fix="Cache them anew with this pipeline.",
            field=field,
        )
    height, width = latents.shape[-2:]
    if height % multiple or width % multiple:
        raise BadDataset(
            f"{field} are {height} x {width}, which are no multiples of {multiple}",
            fix="Resize or crop the pictures.",
            field=field,
        )
    if not latents.isfinite().all():
        raise BadDataset(f"{field} hold values that are not finite", field=field)


def ids_of(given: Sequence[Tensor | None]) -> list[Tensor]:
    """Returns the token ids of a batch, the first encoder's first; none may be left out between."""
    there = [x is not None for x in given]
    if there != sorted(there, reverse=True):
        raise BadDataset(
            f"a batch has {IDS[len(there) - 1 - there[::-1].index(True)]} and no "
            f"{IDS[there.index(False)]}",
            fix="Give the ids of every text encoder: module.tokenize(captions) makes them.",
            field=IDS[there.index(False)],
        )
    return [x for x in given if x is not None]


def check_ids(ids: Sequence[Tensor], encoders: Sequence[Any], names: Sequence[str]) -> None:
    """Checks token ids (batch, tokens), one tensor for each text encoder."""
    if len(ids) != len(encoders):
        raise BadDataset(
            f"a batch has {len(ids)} tensors of token ids, and the pipeline has {len(encoders)} "
            f"text encoders",
            fix=f"Give {', '.join(IDS[: len(encoders)])}: module.tokenize(captions) makes them.",
            field="input_ids",
        )
    for tensor, encoder, name, field in zip(ids, encoders, names, IDS, strict=False):
        whole = not tensor.is_floating_point() and tensor.dtype != torch.bool
        if tensor.ndim != 2 or not whole or not tensor.numel():
            raise BadDataset(
                f"{field} are {tuple(tensor.shape)} of {tensor.dtype}, not whole numbers "
                "(batch, tokens)",
                field=field,
            )
        config: Any = model_of(encoder).config
        limit = getattr(config, "max_position_embeddings", None)
        if limit is not None and tensor.shape[1] > limit:
            raise BadDataset(
                f"captions are {tensor.shape[1]} tokens long, and {name} takes {limit}",
                fix="Shorten them: module.tokenize(captions) names the longest.",
                field=field,
            )
        least, most = (int(x) for x in tensor.aminmax())
        if least < 0 or most >= config.vocab_size:
            raise BadDataset(
                f"{field} go from {least} to {most}, and {name} knows {config.vocab_size} tokens",
                fix="Tokenise with the pipeline's own tokenizers: module.tokenize(captions).",
                field=field,
            )


def check_text(
    text: Text, count: int, *, pooled: bool, widths: tuple[int | None, int | None]
) -> None:
    """Checks that text is as many captions as there are pictures, with all the denoiser takes.

    Args:
        text: Of the batch.
        count: Pictures in it.
        pooled: Whether the denoiser takes pooled text too.
        widths: Of text and pooled text; None where the denoiser does not say.
    """
    _check_embeds(text.embeds, (count, None, widths[0]), "prompt_embeds", "(batch, tokens, width)")
    if not pooled:
        return
    if text.pooled is None:
        raise BadDataset(
            f"pooled_prompt_embeds are none for {count} pictures, not (batch, width)",
            fix="The denoiser takes them beside prompt_embeds.",
            field="pooled_prompt_embeds",
        )
    _check_embeds(text.pooled, (count, widths[1]), "pooled_prompt_embeds", "(batch, width)")


def _check_embeds(tensor: Tensor, wanted: tuple[int | None, ...], field: str, axes: str) -> None:
    """Checks floats of a shape, None where an axis may be of any length."""
    shape = tuple(tensor.shape)
    if len(shape) != len(wanted) or shape[0] != wanted[0] or not tensor.is_floating_point():
        raise BadDataset(
            f"{field} are {shape} of {tensor.dtype} for {wanted[0]} pictures, not floats {axes}",
            field=field,
        )
    if wanted[-1] is not None and shape[-1] != wanted[-1]:
        raise BadDataset(
            f"{field} are {shape[-1]} wide, and the denoiser takes {wanted[-1]}",
            fix="They are of another pipeline: cache them anew with this one.",
            field=field,
        )
    if not tensor.isfinite().all():
        raise BadDataset(f"{field} hold values that are not finite", field=field)
