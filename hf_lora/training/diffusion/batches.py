"""Does a batch fit the pipeline? What does not is a BadDataset that says so."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
        if tensor.ndim != 2 or tensor.is_floating_point() or not tensor.numel():
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


def check_text(text: Text, count: int, pooled: bool) -> None:
    """Checks that text is as many captions as there are pictures, with all the denoiser takes."""
    if text.embeds.ndim != 3 or len(text.embeds) != count:
        raise BadDataset(
            f"text is {tuple(text.embeds.shape)} for {count} pictures, not (batch, tokens, width)",
            field="prompt_embeds",
        )
    if not pooled:
        return
    if text.pooled is None or text.pooled.ndim != 2 or len(text.pooled) != count:
        has = "none" if text.pooled is None else str(tuple(text.pooled.shape))
        raise BadDataset(
            f"pooled_prompt_embeds are {has} for {count} pictures, not (batch, width)",
            fix="The denoiser takes them beside prompt_embeds.",
            field="pooled_prompt_embeds",
        )
