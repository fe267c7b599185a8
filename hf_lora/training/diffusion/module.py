"""`DiffusionTrainingModule`: a pipeline as a model that any Trainer can train."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import PeftConfig
from torch import Generator, Tensor, nn

from hf_lora.adapter import MODEL
from hf_lora.errors import InvalidOption, UnsupportedHost, listing, shown
from hf_lora.hosts import adapter_names, model_of, parts_of, peft_configs
from hf_lora.slots import parameters_in
from hf_lora.training.diffusion.inputs import Inputs
from hf_lora.training.diffusion.losses import loss_of, noised_each, noiser_for, number
from hf_lora.training.diffusion.rows import Extras, Text, kind_for
from hf_lora.training.diffusion.samples import Drawings
from hf_lora.training.samples import Prompt


class DiffusionTrainingModule(nn.Module):
    """A diffusion pipeline as a model whose `forward` returns the loss of a batch.

    The adapter is attached to the pipeline, before or after: `attach_lora(pipe)`. All that the
    pipeline loads LoRAs into is a part of the module; VAE and other text encoders stay beside it
    and go to its device when they are first needed. Every base weight is frozen, and all parts but
    the denoiser and those with an adapter stay in evaluation mode. State dicts hold adapters only.
    While training, randomness is that of torch's global generators, so that a resumed run goes on
    exactly; in evaluation mode the noise of the first picture, the second and so on comes from
    `seed`, the same in each evaluation, however many pictures are a batch.

    Args:
        pipe: A text-to-image pipeline with a UNet (Stable Diffusion 1, 2, XL), or Flux, or SD3.
        components: Its parts that the module holds; None for all that have LoRAs.
        prediction: `"epsilon"`, `"v_prediction"` or `"flow"`; None for the scheduler's.
        min_snr_gamma: Gamma of min-SNR weights (arXiv 2303.09556); None for none.
        noise_offset: How much of one random value a channel is added to the noise.
        sampling: Of flow matching: `"uniform"`, `"logit_normal"` or `"mode"`; None for what the
            script of the denoiser does: uniform for Flux, logit-normal for SD3.
        weighting: Of flow matching: `"none"`, `"sigma_sqrt"`, `"cosmap"` or `"preconditioned"`.
        guidance: What a guidance-distilled denoiser is told in training.
        caption_dropout: Probability that a picture is trained without its caption.
        longest_caption: Tokens for T5; None for 512 (Flux) or 256 (SD3).
        gradient_checkpointing: Compute activations again in the backward pass.
        seed: Of the noise in evaluation mode.

    Raises:
        UnsupportedHost: The pipeline is of no kind that is known.
        InvalidOption: An option has a value that cannot work with this pipeline.
    """

    main_input_name = "pixel_values"
    accepts_loss_kwargs = False  # the loss is a mean over the batch, which Trainer divides
    _keys_to_ignore_on_save = None  # read by Trainer where a state dict lacks keys

    def __init__(
        self,
        pipe: Any,
        *,
        components: Sequence[str] | None = None,
        prediction: str | None = None,
        min_snr_gamma: float | None = None,
        noise_offset: float = 0.0,
        sampling: str | None = None,
        weighting: str = "none",
        guidance: float = 3.5,
        caption_dropout: float = 0.0,
        longest_caption: int | None = None,
        gradient_checkpointing: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        parts = parts_of(pipe)
        if MODEL in parts:
            raise UnsupportedHost(
                f"{type(pipe).__name__} is one model, and a pipeline is needed",
                fix="Give the whole pipeline, with scheduler and VAE.",
            )
        if longest_caption is not None and type(longest_caption) is not int:
            raise InvalidOption(
                f"longest_caption={shown(longest_caption)} is no whole number of tokens",
                field="longest_caption",
            )
        if longest_caption is not None:
            number("longest_caption", longest_caption, least=1)
        kind = kind_for(pipe, longest_caption)
        self.noise = noiser_for(
            getattr(pipe, "scheduler", None),
            flow_only=kind.flow,
            prediction=prediction,
            min_snr_gamma=min_snr_gamma,
            noise_offset=noise_offset,
            sampling=sampling,
            default_sampling=kind.sampling,
            weighting=weighting,
        )
        self._guidance = number("guidance", guidance, least=0.0)
        self._dropout = number("caption_dropout", caption_dropout, least=0.0, most=1.0)
        if not isinstance(seed, int) or not 0 <= seed < 2**31:
            raise InvalidOption(f"seed={shown(seed)} is no whole number of 0 or more", field="seed")
        self._seed = seed
        self.pipe = pipe
        self.inputs = Inputs(pipe, kind, longest_caption)
        self._parts = _chosen(parts, components, kind.component)
        for name in self._parts:
            self.add_module(name, parts[name])
        self._freeze(pipe)
        self._settle()
        self._evaluated = 0
        if gradient_checkpointing:
            self.activation_checkpointing_enable()

    @property
    def lora_host(self) -> object:
        """The pipeline: what adapters are saved from and loaded onto."""
        return self.pipe

    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        """Adapter name -> config of the first part that has it."""
        found: dict[str, PeftConfig] = {}
        for name in self._parts:
            for adapter, config in peft_configs(model_of(self._modules[name])).items():
                found.setdefault(adapter, config)
        return found

    def _freeze(self, pipe: Any) -> None:
        """Takes the gradients of all base weights; those of factors stay as they are."""
        for part in pipe.components.values():
            if isinstance(part, nn.Module):
                own = {
                    id(p)
                    for n in adapter_names(model_of(part))
                    for _, p in parameters_in(model_of(part), n)
                }
                for parameter in part.parameters():
                    if id(parameter) not in own:
                        parameter.requires_grad_(False)

    # --- what Trainer asks of a model ---------------------------------------------------------

    def forward(
        self,
        pixel_values: Tensor | None = None,
        latents: Tensor | None = None,
        moments: Tensor | None = None,
        input_ids: Tensor | None = None,
        input_ids_2: Tensor | None = None,
        input_ids_3: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        time_ids: Tensor | None = None,
        return_loss: bool = True,
    ) -> dict[str, Tensor]:
        """Returns `{"loss": ...}`, the mean of the batch in float32.

        Args:
            pixel_values: Pictures (batch, 3, height, width) in [-1, 1]. Or one of:
            latents: (batch, channels, height, width), scaled as the denoiser sees them.
            moments: (batch, 2 x channels, height, width), what the VAE says of each picture;
                latents are drawn from it anew each time.
            input_ids: Captions for the first text encoder, (batch, tokens), see `tokenize`.
            input_ids_2: For the second.
            input_ids_3: For the third. In place of ids:
            prompt_embeds: (batch, tokens, width), see `encode`.
            pooled_prompt_embeds: (batch, width), where the denoiser takes it.
            time_ids: Of SDXL, (batch, 6) in pixels; None for whole pictures as they are.
            return_loss: Asked by Trainer; there is nothing else to return.

        Raises:
            BadDataset: The batch lacks something, or holds what does not fit.
        """
        self._check_parts()
        inputs = self.inputs
        draws = self._generators(pixel_values, latents, moments)
        clean = inputs.latents(pixel_values, latents, moments, draws)
        noised = self.noise(clean) if draws is None else noised_each(self.noise, clean, draws)
        ids = (input_ids, input_ids_2, input_ids_3)
        text = inputs.text(ids, prompt_embeds, pooled_prompt_embeds, len(clean))
        if self._dropout and self.training:
            text = inputs.dropped(text, [x for x in ids if x is not None], self._dropout)
        extras = Extras(inputs.time_ids(time_ids, clean), self._guidance)
        dtype = inputs.dtype
        text = Text(text.embeds.to(dtype), None if text.pooled is None else text.pooled.to(dtype))
        made = inputs.kind.predict(inputs.denoiser, noised.noisy, noised.timesteps, text, extras)
        return {"loss": loss_of(made, noised)}

    def train(self, mode: bool = True) -> DiffusionTrainingModule:
        """Sets the mode; VAE and text encoders without an adapter stay in evaluation mode."""
        super().train(mode)
        self._evaluated = 0  # each evaluation begins with the same noise
        self._settle()
        return self

    def _settle(self) -> None:
        """Takes VAE and text encoders without an adapter out of training: T5 has dropout."""
        for name, part in self.pipe.components.items():
            if name == self.inputs.kind.component or not isinstance(part, nn.Module):
                continue
            if part.training and not self.inputs.adapted(name):
                part.train(False)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the adapters' tensors alone, by their names in this module."""
        state = super().state_dict(*args, **kwargs)
        prefix = kwargs.get("prefix", args[1] if len(args) > 1 else "")
        kept = {prefix + name for name in self._own_names()}
        for name in [n for n in state if n.startswith(prefix) and n not in kept]:
            del state[name]
        return state

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Loads what `state_dict` returned; the base stays as it is, whatever else is given."""
        own = self._own_names()
        missing, odd = own - state_dict.keys(), state_dict.keys() - own
        if strict and (missing or odd):
            raise RuntimeError(
                f"{len(missing)} tensors of adapters are missing and {len(odd)} have no place: "
                f"{listing(sorted(missing | odd), limit=3)}"
            )
        given = {name: value for name, value in state_dict.items() if name in own}
        result = super().load_state_dict(given, strict=False, assign=assign)
        result.missing_keys[:] = sorted(missing)
        result.unexpected_keys[:] = sorted(odd)
        return result

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: Mapping[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Lets all parts compute their activations again in the backward pass.

        Args:
            activation_checkpointing_kwargs: `use_reentrant=False`, which is also the default.
            every_n_layers: 1; diffusers knows nothing else.
            offload: False; likewise.

        Raises:
            InvalidOption: Something else is asked for.
        """
        kwargs = dict(activation_checkpointing_kwargs or {})
        # inputs have no gradient here, which reentrant checkpoints need
        if kwargs.pop("use_reentrant", False) or kwargs or every_n_layers != 1 or offload:
            raise InvalidOption(
                f"checkpointing with {shown(activation_checkpointing_kwargs)}, every "
                f"{every_n_layers} layers, offload={offload}",
                fix="Pipelines take gradient_checkpointing=True without further arguments.",
                field="gradient_checkpointing_kwargs",
            )
        for name in self._parts:
            part: Any = model_of(self._modules[name])
            if hasattr(part, "enable_gradient_checkpointing"):
                part.enable_gradient_checkpointing()
            else:
                # the second name is that of transformers before 5.23
                on = getattr(part, "activation_checkpointing_enable", None)
                (on or part.gradient_checkpointing_enable)({"use_reentrant": False})

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None
    ) -> None:
        """The name before transformers 5.23 of `activation_checkpointing_enable`."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs)

    # --- captions and pictures ----------------------------------------------------------------

    def tokenize(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Returns `input_ids` and those of further encoders, (batch, tokens).

        Raises:
            BadDataset: A caption is no text, or longer than an encoder takes.
            UnsupportedHost: The pipeline lacks a tokenizer.
        """
        return self.inputs.tokenize(captions)

    def lora_sampler(self, prompts: Sequence[Prompt]) -> Drawings:
        """Returns what draws prompts while the pipeline is trained, see `LoraCallback`.

        Raises:
            TrainingError: A prompt is a chat.
            InvalidOption: A prompt has an option that the pipeline does not take.
        """
        return Drawings(self.inputs, prompts)

    # --- parts --------------------------------------------------------------------------------

    def _generators(self, *pictures: Tensor | None) -> list[Generator] | None:
        """Returns one for each picture of an evaluation, by its number; None while training."""
        if self.training:
            return None
        given = next((x for x in pictures if x is not None and x.ndim), ())
        first = self._seed * 1_000_003 + self._evaluated
        self._evaluated += len(given)
        return [torch.Generator().manual_seed(first + i) for i in range(len(given))]

    def _own_names(self) -> set[str]:
        own = {id(p) for n in self.peft_config for _, p in parameters_in(self, n)}
        return {n for n, p in self.named_parameters(remove_duplicate=False) if id(p) in own}

    def _check_parts(self) -> None:
        """Raises InvalidOption where an adapter lies on a part that is not trained."""
        for name in parts_of(self.pipe):
            if name not in self._parts and self.inputs.adapted(name):
                raise InvalidOption(
                    f"{name} has an adapter, and components={list(self._parts)} leaves it out",
                    fix="Name it, or leave components= out.",
                    field="components",
                )


def _chosen(
    parts: Mapping[str, nn.Module], components: Sequence[str] | None, denoiser: str
) -> tuple[str, ...]:
    """Returns the parts a module holds, the denoiser among them."""
    if components is None:
        return tuple(parts)
    odd = isinstance(components, str) or not components
    unknown = [] if odd else [name for name in components if name not in parts]
    if odd or unknown or denoiser not in components:
        raise InvalidOption(
            f"components={shown(components)} must be a list with {denoiser}, of {listing(parts)}",
            field="components",
        )
    return tuple(name for name in parts if name in components)
