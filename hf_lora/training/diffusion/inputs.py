"""Batches made into what a denoiser takes: latents, text, and what comes beside them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Generator, Tensor, nn

from hf_lora.errors import BadDataset, listing
from hf_lora.hosts import adapter_names, model_of
from hf_lora.training.diffusion.batches import (
    check_ids,
    check_latents,
    check_pixels,
    check_text,
    ids_of,
)
from hf_lora.training.diffusion.rows import IDS, Kind, Text, tokenize


class Inputs:
    """What a pipeline makes of pictures and captions.

    Args:
        pipe: The pipeline.
        kind: How its denoiser is trained.
        longest: Tokens of encoders without a limit of their own; None for the pipeline's.
    """

    def __init__(self, pipe: Any, kind: Kind, longest: int | None) -> None:
        self.pipe, self.kind = pipe, kind
        self.longest = longest
        self._empty: dict[int, Text] = {}

    def tokenize(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Returns `input_ids` and those of further encoders, (batch, tokens).

        Raises:
            BadDataset: A caption is no text, or longer than an encoder takes.
            UnsupportedHost: The pipeline lacks a tokenizer.
        """
        return tokenize(self.pipe, self.kind, captions, longest=self.longest)

    def encode(self, ids: Sequence[Tensor]) -> Text:
        """Returns the text that token ids are, one tensor for each text encoder.

        Raises:
            BadDataset: There are more or fewer than the pipeline has encoders, or ids do not fit.
        """
        device = self.device
        encoders = [self._brought(name) for name in self.kind.encoders]
        check_ids(ids, encoders, self.kind.encoders)
        return self.kind.encode(encoders, [x.to(device) for x in ids])

    @torch.no_grad()
    def encoded(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """Returns what the VAE says of pictures: `moments`, or `latents` where it knows no others.

        It runs in its own precision, whatever that of the run; one of half precision that makes
        numbers that are not finite there (`force_upcast`) in float32, as in the pipelines.
        """
        vae = self._brought("vae")
        check_pixels(pixel_values, self.factor, self.kind.multiple)
        kept = vae.dtype
        raised = kept == torch.float16 and bool(vae.config.get("force_upcast"))
        try:
            if raised:
                vae.to(torch.float32)
            with torch.autocast(self.device.type, enabled=False):
                said = vae.encode(pixel_values.to(self.device, vae.dtype))
        finally:
            if raised:
                vae.to(kept)
        if hasattr(said, "latent_dist"):
            return {"moments": said.latent_dist.parameters}
        return {"latents": self._scaled(said.latents)}  # AutoencoderTiny

    def latents_of(
        self, moments: Tensor, generator: Generator | list[Generator] | None = None
    ) -> Tensor:
        """Draws latents from moments and scales them as the denoiser sees them.

        Args:
            moments: (batch, 2 x channels, height, width).
            generator: One for all pictures or one for each; None for torch's global ones.
        """
        from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

        told: Any = generator  # a list is passed on
        return self._scaled(DiagonalGaussianDistribution(moments.to(self.device)).sample(told))

    def _scaled(self, latents: Tensor) -> Tensor:
        config: Any = self._part("vae").config
        mean, deviation = config.get("latents_mean"), config.get("latents_std")
        if mean is None or deviation is None:
            return (latents - (config.get("shift_factor") or 0.0)) * config.scaling_factor  # type: ignore[no-any-return]
        each = (1, -1, 1, 1)
        centred = latents - latents.new_tensor(mean).view(each)
        return centred * config.scaling_factor / latents.new_tensor(deviation).view(each)  # type: ignore[no-any-return]

    def latents(
        self,
        pixels: Tensor | None,
        latents: Tensor | None,
        moments: Tensor | None,
        generators: list[Generator] | None,
    ) -> Tensor:
        """Returns the latents of a batch, of which one of three is given, see `forward`.

        Args:
            pixels: Pictures.
            latents: Scaled already.
            moments: What the VAE says.
            generators: One a picture, for drawing from moments; None for torch's global ones.
        """
        given = {"pixel_values": pixels, "latents": latents, "moments": moments}
        there = [name for name, value in given.items() if value is not None]
        if len(there) != 1:
            raise BadDataset(
                f"a batch holds {listing(there) or 'no picture'}, and one of {listing(given)} is "
                "needed",
                field="pixel_values",
            )
        if pixels is not None:
            said = self.encoded(pixels)
            moments, latents = said.get("moments"), said.get("latents")
        if moments is not None:
            check_latents(moments, 2 * self.channels, self.kind.multiple, "moments")
            latents = self.latents_of(moments, generators)
        assert latents is not None
        check_latents(latents, self.channels, self.kind.multiple, "latents")
        # noise is drawn in the order of memory, which must not depend on how pictures were laid out
        return latents.to(self.device, self.dtype).contiguous()

    def text(
        self,
        given: Sequence[Tensor | None],
        embeds: Tensor | None,
        pooled: Tensor | None,
        count: int,
    ) -> Text:
        """Returns the text of a batch with so many pictures, see `forward`."""
        ids = ids_of(given)
        if ids and (embeds is not None or pooled is not None):
            raise BadDataset(
                "a batch has both token ids and prompt_embeds",
                fix="Leave one out: prompt_embeds are what the text encoders make of ids.",
                field="input_ids",
            )
        if embeds is None and not ids:
            raise BadDataset(
                "a batch has no captions",
                fix="Give input_ids, see module.tokenize(captions), or prompt_embeds.",
                field="input_ids",
            )
        if embeds is None:
            text = self.encode(ids)
        else:
            trained = [name for name in self.kind.encoders if self.adapted(name)]
            if trained:
                raise BadDataset(
                    f"a batch has cached prompt_embeds, and {listing(trained)} is trained",
                    fix="Give input_ids, or attach to the denoiser alone.",
                    field="prompt_embeds",
                )
            device = self.device
            text = Text(embeds.to(device), None if pooled is None else pooled.to(device))
        config: Any = model_of(self.denoiser).config
        check_text(text, count, pooled=self.kind.pooled, widths=self.kind.widths(config))
        return text

    def dropped(self, text: Text, ids: Sequence[Tensor], chance: float) -> Text:
        """Returns the text with captions empty by chance; `ids` are None or those it is of."""
        count, length = text.embeds.shape[:2]
        drop = torch.rand(count, device=text.embeds.device) < chance
        empty = self._nothing(length, ids)
        embeds = torch.where(drop[:, None, None], empty.embeds.to(text.embeds.dtype), text.embeds)
        if text.pooled is None or empty.pooled is None:
            return Text(embeds)
        pooled = torch.where(drop[:, None], empty.pooled.to(text.pooled.dtype), text.pooled)
        return Text(embeds, pooled)

    def _nothing(self, length: int, ids: Sequence[Tensor]) -> Text:
        """Returns the text of an empty caption, as long as those of the batch."""
        trained = any(self.adapted(name) for name in self.kind.encoders)
        if trained or length not in self._empty:
            longest = ids[-1].shape[1] if ids else self.longest
            made = tokenize(self.pipe, self.kind, [""], longest=longest)
            found = self.encode([made[name] for name in IDS if name in made])
            if found.embeds.shape[1] != length:
                raise BadDataset(
                    f"captions are {length} tokens long, and an empty one {found.embeds.shape[1]}",
                    fix="Pad captions as module.tokenize does; longest_caption= says how far.",
                    field="prompt_embeds",
                )
            if trained:
                return found
            self._empty[length] = found
        return self._empty[length]

    def time_ids(self, given: Tensor | None, latents: Tensor) -> Tensor:
        """Returns sizes and crop, (batch, 6), see `forward`; latents stand for whole pictures."""
        if given is not None:
            if given.shape != (len(latents), 6):
                raise BadDataset(
                    f"time_ids are {tuple(given.shape)}, not {(len(latents), 6)}", field="time_ids"
                )
            return given.to(latents)
        height, width = (size * self.factor for size in latents.shape[-2:])
        return latents.new_tensor([[height, width, 0, 0, height, width]]).repeat(len(latents), 1)

    # --- parts --------------------------------------------------------------------------------

    def adapted(self, component: str) -> bool:
        """Tells whether a component has an adapter."""
        part = getattr(self.pipe, component, None)
        return isinstance(part, nn.Module) and bool(adapter_names(model_of(part)))

    def _part(self, name: str) -> Any:
        part = getattr(self.pipe, name, None)
        if part is None:
            raise BadDataset(
                f"the pipeline has no {name}",
                fix="Load it whole, or give cached latents and prompt_embeds.",
            )
        return part

    def _brought(self, name: str) -> Any:
        """Returns a component that may lie on another device, brought to that of the denoiser."""
        part = self._part(name)
        if next(part.parameters()).device != self.device:
            part.to(self.device)
        return part

    @property
    def denoiser(self) -> Any:
        """The denoiser, wrappers left on."""
        return getattr(self.pipe, self.kind.component)

    @property
    def device(self) -> torch.device:
        """Where the denoiser lies."""
        return next(_frozen(self.denoiser)).device

    @property
    def dtype(self) -> torch.dtype:
        """That the denoiser computes in: weights may be stored in fewer bits, factors be wider."""
        model: Any = model_of(self.denoiser)
        return model.dtype  # type: ignore[no-any-return]

    @property
    def factor(self) -> int:
        """Pixels a side that one place of the latents stands for."""
        return int(self.pipe.vae_scale_factor)

    @property
    def channels(self) -> int:
        """Channels of the latents."""
        config: Any = model_of(self.denoiser).config
        return int(config.in_channels // self.kind.channels)


def _frozen(part: nn.Module) -> Iterator[nn.Parameter]:
    return (p for p in part.parameters() if not p.requires_grad)
