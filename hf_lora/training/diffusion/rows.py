"""Denoisers that can be trained: how captions become their text, and how they are called.

One row a kind. The calls are those of the training scripts of diffusers 0.42.1, see `losses`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hf_lora.errors import BadDataset, UnsupportedHost, listing, shown
from hf_lora.hosts import model_of

IDS = ("input_ids", "input_ids_2", "input_ids_3")


@dataclass(frozen=True)
class Text:
    """What captions are to a denoiser.

    Attributes:
        embeds: (batch, tokens, width).
        pooled: (batch, width); None where the denoiser takes none.
    """

    embeds: Tensor
    pooled: Tensor | None = None


@dataclass(frozen=True)
class Kind:
    """How one kind of denoiser is trained.

    Attributes:
        component: Where the pipeline has it.
        encoders: Components that read captions, in the order of `IDS`.
        encode: (encoders, token ids of each) -> text.
        pooled: Whether text has a pooled part.
        predict: (denoiser, noisy latents, timesteps, text, extras) -> prediction, as the latents.
        widths: Config of the denoiser -> widths of `Text.embeds` and `Text.pooled` that it takes,
            None where it does not say.
        channels: Channels of the latents for one channel that the denoiser takes.
        multiple: Height and width of latents are multiples of it.
        longest: The longest caption of encoders without a limit of their own, in tokens.
        sampling: Where on the way to noise, see `losses.SAMPLINGS`.
        flow: Whether it knows flow matching alone; others may know it too.
        optional: The last of `encoders`, where the pipeline works without it. Its tokens are zeros
            then, see `kind_for`.
    """

    component: str
    encoders: tuple[str, ...]
    encode: Callable[[Sequence[Any], Sequence[Tensor]], Text]
    pooled: bool
    predict: Callable[[Any, Tensor, Tensor, Text, Extras], Tensor]
    widths: Callable[[Any], tuple[int | None, int | None]]
    channels: float = 1
    multiple: int = 1
    longest: int = 256
    sampling: str = "uniform"
    flow: bool = False
    optional: str = ""


@dataclass(frozen=True)
class Extras:
    """What some denoisers are told besides.

    Attributes:
        time_ids: (batch, 6): original height and width, top and left of the crop, target height
            and width, in pixels.
        guidance: Strength of distilled guidance.
    """

    time_ids: Tensor | None
    guidance: float


def _first(encoders: Sequence[Any], ids: Sequence[Tensor]) -> Text:
    return Text(encoders[0](ids[0])[0])


def _clips(encoders: Sequence[Any], ids: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Returns last but one hidden states and first outputs of encoders."""
    said = [encoder(x, output_hidden_states=True) for encoder, x in zip(encoders, ids, strict=True)]
    return [one.hidden_states[-2] for one in said], [one[0] for one in said]


def _both_clips(encoders: Sequence[Any], ids: Sequence[Tensor]) -> Text:
    hidden, pooled = _clips(encoders, ids)
    return Text(torch.cat(hidden, -1), pooled[-1])


def _clip_and_t5(encoders: Sequence[Any], ids: Sequence[Tensor]) -> Text:
    clip, t5 = encoders
    return Text(t5(ids[1])[0], clip(ids[0]).pooler_output)


def _clips_and_t5(encoders: Sequence[Any], ids: Sequence[Tensor]) -> Text:
    hidden, pooled = _clips(encoders[:2], ids[:2])
    long = encoders[2](ids[2])[0]
    short = torch.cat(hidden, -1)
    short = functional.pad(short, (0, long.shape[-1] - short.shape[-1]))
    return Text(torch.cat([short, long.to(short.dtype)], -2), torch.cat(pooled, -1))


def _clips_and_zeros(
    width: int, tokens: int, encoders: Sequence[Any], ids: Sequence[Tensor]
) -> Text:
    """Returns what SD3's pipeline makes of captions without T5."""
    hidden, pooled = _clips(encoders, ids)
    short = torch.cat(hidden, -1)
    padded = functional.pad(short, (0, width - short.shape[-1], 0, tokens))
    return Text(padded, torch.cat(pooled, -1))


def _unet_widths(config: Any) -> tuple[int | None, int | None]:
    width = config.get("encoder_hid_dim") or config.cross_attention_dim
    pooled = config.get("projection_class_embeddings_input_dim")
    if pooled is not None:
        pooled -= 6 * (config.get("addition_time_embed_dim") or 0)
    return width if isinstance(width, int) else None, pooled


def _transformer_widths(config: Any) -> tuple[int | None, int | None]:
    return config.joint_attention_dim, config.pooled_projection_dim


def _unet(model: Any, noisy: Tensor, steps: Tensor, text: Text, extras: Extras) -> Tensor:
    return model(noisy, steps, text.embeds, return_dict=False)[0]  # type: ignore[no-any-return]


def _unet_xl(model: Any, noisy: Tensor, steps: Tensor, text: Text, extras: Extras) -> Tensor:
    added = {"text_embeds": text.pooled, "time_ids": extras.time_ids}
    found = model(noisy, steps, text.embeds, added_cond_kwargs=added, return_dict=False)
    return found[0]  # type: ignore[no-any-return]


def _flux(model: Any, noisy: Tensor, steps: Tensor, text: Text, extras: Extras) -> Tensor:
    height, width = noisy.shape[-2] // 2, noisy.shape[-1] // 2
    places = torch.zeros(height, width, 3, device=noisy.device, dtype=noisy.dtype)
    places[..., 1] += torch.arange(height, device=noisy.device)[:, None]
    places[..., 2] += torch.arange(width, device=noisy.device)[None, :]
    guidance = None
    bare: Any = model_of(model)
    if bare.config.guidance_embeds:
        guidance = torch.full((len(noisy),), extras.guidance, device=noisy.device)
    found = model(
        hidden_states=packed(noisy),
        timestep=steps / 1000,  # the model multiplies by a thousand
        guidance=guidance,
        pooled_projections=text.pooled,
        encoder_hidden_states=text.embeds,
        txt_ids=text.embeds.new_zeros(text.embeds.shape[1], 3),
        img_ids=places.flatten(0, 1),
        return_dict=False,
    )[0]
    return unpacked(found, height, width)


def packed(latents: Tensor) -> Tensor:
    """Returns (batch, channels, height, width) as tokens (batch, places, channels x 2 x 2)."""
    b, c, h, w = latents.shape
    blocks = latents.reshape(b, c, h // 2, 2, w // 2, 2)
    return blocks.permute(0, 2, 4, 1, 3, 5).reshape(b, h // 2 * (w // 2), c * 4)


def unpacked(tokens: Tensor, height: int, width: int) -> Tensor:
    """Returns the inverse of `packed`; height and width are those in tokens."""
    blocks = tokens.reshape(len(tokens), height, width, -1, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return blocks.reshape(len(tokens), -1, height * 2, width * 2)


def _sd3(model: Any, noisy: Tensor, steps: Tensor, text: Text, extras: Extras) -> Tensor:
    return model(  # type: ignore[no-any-return]
        hidden_states=noisy,
        timestep=steps,
        encoder_hidden_states=text.embeds,
        pooled_projections=text.pooled,
        return_dict=False,
    )[0]


# Class of the denoiser and its `addition_embed_type` -> how it is trained
KINDS: Mapping[tuple[str, str], Kind] = {
    ("UNet2DConditionModel", ""): Kind(
        "unet", ("text_encoder",), _first, False, _unet, _unet_widths
    ),
    ("UNet2DConditionModel", "text_time"): Kind(
        "unet", ("text_encoder", "text_encoder_2"), _both_clips, True, _unet_xl, _unet_widths
    ),
    ("FluxTransformer2DModel", ""): Kind(
        "transformer", ("text_encoder", "text_encoder_2"), _clip_and_t5, True, _flux,
        _transformer_widths, channels=4, multiple=2, longest=512, flow=True,
    ),
    ("SD3Transformer2DModel", ""): Kind(
        "transformer", ("text_encoder", "text_encoder_2", "text_encoder_3"), _clips_and_t5, True,
        _sd3, _transformer_widths, multiple=2, sampling="logit_normal", flow=True,
        optional="text_encoder_3",
    ),
}  # fmt: skip


def kind_for(pipe: Any, longest: int | None = None) -> Kind:
    """Returns how the denoiser of a pipeline is trained.

    Args:
        pipe: The pipeline.
        longest: Tokens of encoders without a limit of their own; None for the pipeline's.

    Raises:
        UnsupportedHost: It is of no known kind, or takes more than noisy latents (inpainting).
    """
    for (name, added), kind in KINDS.items():
        denoiser = getattr(pipe, kind.component, None)
        if not isinstance(denoiser, torch.nn.Module):
            continue
        model = model_of(denoiser)
        found: Any = model.config
        if type(model).__name__ == name and (found.get("addition_embed_type") or "") == added:
            _check_channels(pipe, found.in_channels, kind)
            _check_plain(pipe, found, kind)
            if not kind.optional or getattr(pipe, kind.optional, None) is not None:
                return kind
            tokens = longest or kind.longest
            made = partial(_clips_and_zeros, found.joint_attention_dim, tokens)
            return replace(kind, encoders=kind.encoders[:-1], encode=made)
    raise UnsupportedHost(
        f"no training of {type(pipe).__name__} is known",
        fix=f"Known are text-to-image pipelines with {listing(sorted({n for n, _ in KINDS}))}.",
    )


def _check_channels(pipe: Any, takes: int, kind: Kind) -> None:
    vae = getattr(pipe, "vae", None)
    if vae is None:
        return  # latents will be given
    makes = int(vae.config.latent_channels * kind.channels)
    if takes != makes:
        raise UnsupportedHost(
            f"the denoiser of {type(pipe).__name__} takes {takes} channels, and latents have "
            f"{makes}: it takes a picture or mask besides",
            fix="Give a text-to-image pipeline.",
        )


def _check_plain(pipe: Any, config: Any, kind: Kind) -> None:
    """Raises UnsupportedHost where the pipeline tells its denoiser what training does not."""
    name = type(pipe).__name__
    if "Kontext" in name:
        raise UnsupportedHost(
            f"{name} gives its denoiser a picture besides", fix="Give a text-to-image pipeline."
        )
    if config.get("time_cond_proj_dim"):
        raise UnsupportedHost(
            f"the UNet of {name} is distilled and told how strong guidance is (time_cond_proj_dim)",
            fix="Train on the base that it was distilled from.",
        )
    encoder = getattr(pipe, kind.encoders[0], None)
    masked = isinstance(encoder, torch.nn.Module) and getattr(
        model_of(encoder).config, "use_attention_mask", False
    )
    if kind.encode is _first and masked:  # pipelines of other kinds leave it out
        raise UnsupportedHost(
            f"the text encoder of {name} reads captions with an attention mask "
            "(use_attention_mask), which training has none of",
            fix="Set pipe.text_encoder.config.use_attention_mask = False for training and drawing.",
        )


def tokenize(
    pipe: Any, kind: Kind, captions: Sequence[str], *, longest: int | None = None
) -> dict[str, Tensor]:
    """Returns token ids for each text encoder, (batch, tokens), padded as the pipeline pads them.

    Args:
        pipe: The pipeline.
        kind: Its row.
        captions: One a picture.
        longest: Tokens of encoders without a limit of their own; None for the pipeline's.

    Raises:
        BadDataset: There are no captions, or one is no text, or longer than an encoder takes.
        UnsupportedHost: The pipeline lacks a tokenizer.
    """
    if isinstance(captions, str) or not len(captions):
        raise BadDataset(
            f"captions are {shown(captions)}, not a list of texts",
            fix="Give a list, of one caption too.",
            field="caption",
        )
    odd = next((x for x in captions if not isinstance(x, str)), None)
    if odd is not None:
        raise BadDataset(f"a caption is of type {type(odd).__name__}, not text", field="caption")
    found = {}
    for name, field in zip(kind.encoders, IDS, strict=False):
        tokenizer: Any = getattr(pipe, name.replace("text_encoder", "tokenizer"), None)
        if tokenizer is None:
            raise UnsupportedHost(
                f"{type(pipe).__name__} has no tokenizer for {name}",
                fix="Load the pipeline whole, or give cached embeddings.",
            )
        clip = "CLIP" in type(tokenizer).__name__
        most = tokenizer.model_max_length
        length = most if clip else longest or min(most, kind.longest)
        rows = tokenizer(list(captions)).input_ids
        lengths = [len(row) for row in rows]
        if lengths and max(lengths) > length:
            worst = lengths.index(max(lengths))
            raise BadDataset(
                f"a caption has {max(lengths)} tokens and {name} takes {length}: "
                f"{captions[worst][:80]!r}",
                fix="Shorten it; the rest would be cut off without a word.",
                field="caption",
            )
        padded = tokenizer(
            list(captions), padding="max_length", max_length=length, return_tensors="pt"
        )
        found[field] = padded.input_ids
    return found
