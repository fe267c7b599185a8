"""Tiny diffusers pipelines, with random weights from a fixed seed.

Their tokenizers are built in memory and know single letters, so `pipe("a cat")` runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers
from torch import Generator, Tensor, nn

from hf_lora.errors import InvalidOption
from hf_lora.testing.pipeline_rows import LETTERS, PIPELINES, TOKENS, Part

__all__ = ["PIPELINES", "component_output", "tiny_pipeline"]


def tiny_pipeline(kind: str, *, seed: int = 0) -> Any:
    """Builds a tiny pipeline on the CPU in float32, its models in evaluation mode.

    Args:
        kind: A key of `PIPELINES`: `"sd"`, `"sdxl"`, `"flux"` ... What makes a call quick is in
            `PIPELINES[kind].call`.
        seed: Seed of the weights; the global generator is left as it was.

    Raises:
        InvalidOption: There is no tiny pipeline of that kind.
    """
    import diffusers  # a second, which tests of language models need not spend

    row = PIPELINES.get(kind)
    if row is None:
        raise InvalidOption(f"no tiny pipeline {kind!r}", fix=f"Kinds: {list(PIPELINES)}.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = {name: _built(part, diffusers) for name, part in row.parts.items()}
    pipeline = getattr(diffusers, row.kind)(**parts, **row.settings)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _built(part: Part, diffusers: Any) -> Any:
    library = diffusers if hasattr(diffusers, part.kind) else transformers
    kind: Any = getattr(library, part.kind)
    if hasattr(kind, "config_class"):
        built = kind(kind.config_class(**part.sizes))
    else:
        built = kind(**part.sizes)
    return built.eval() if isinstance(built, nn.Module) else built


@torch.no_grad()
def component_output(model: Any, *, seed: int = 1) -> Tensor:
    """Returns what a denoiser or text encoder of a tiny pipeline makes of fixed random inputs.

    The model runs in evaluation mode and gets its modes back.

    Args:
        model: A `unet`, `transformer` or text encoder, with adapters or without.
        seed: Seed of the inputs.

    Raises:
        InvalidOption: No inputs are known for a model of that class.
    """
    known = (_CALLS.get(kind.__name__) for kind in type(model).__mro__)
    call = next((call for call in known if call is not None), None)
    if call is None:
        raise InvalidOption(f"no inputs for {type(model).__name__}", fix=f"Known: {[*_CALLS]}.")
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        output: Tensor = call(model, torch.Generator().manual_seed(seed))
    finally:
        for module, training in modes.items():
            module.training = training
    return output


def _of_unet(model: Any, generator: Generator) -> Any:
    config = model.config
    extra = {}
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        extra = {
            "text_embeds": torch.randn(2, pooled, generator=generator),
            "time_ids": torch.full((2, 6), 16.0),
        }
    size = config.sample_size
    return model(
        torch.randn(2, config.in_channels, size, size, generator=generator),
        _STEPS,
        _text(config.cross_attention_dim, generator),
        added_cond_kwargs=extra,
    ).sample


_STEPS = torch.tensor([3, 700])  # of a thousand
_PARTS = torch.tensor([0.003, 0.7])  # of the whole way, for the models that count so


def _text(width: int, generator: Generator) -> Tensor:
    return torch.randn(2, TOKENS, width, generator=generator)


def _packed(model: Any, generator: Generator, axes: int = 3, **more: Any) -> Any:
    """Calls a denoiser with 16 latent tokens, text, and the places of both."""
    config = model.config
    places = torch.zeros(16, axes)
    places[:, 1:3] = torch.cartesian_prod(torch.arange(4.0), torch.arange(4.0))
    return model(
        hidden_states=torch.randn(2, 16, config.in_channels, generator=generator),
        timestep=_PARTS,
        encoder_hidden_states=_text(config.joint_attention_dim, generator),
        txt_ids=torch.zeros(TOKENS, axes),
        img_ids=places,
        **more,
    ).sample


def _of_flux(model: Any, generator: Generator) -> Any:
    width = model.config.pooled_projection_dim
    return _packed(model, generator, pooled_projections=torch.randn(2, width, generator=generator))


def _of_flux2(model: Any, generator: Generator) -> Any:
    return _packed(model, generator, axes=4)


def _of_qwen_image(model: Any, generator: Generator) -> Any:
    config = model.config
    return model(
        hidden_states=torch.randn(2, 16, config.in_channels, generator=generator),
        timestep=_PARTS,
        encoder_hidden_states=_text(config.joint_attention_dim, generator),
        encoder_hidden_states_mask=torch.ones(2, TOKENS).long(),
        img_shapes=[(1, 4, 4)] * 2,
    ).sample


def _of_latents(model: Any, generator: Generator, text: int, *shape: int, **more: Any) -> Any:
    """Calls a denoiser with latents of a shape (channels apart) and text of a width."""
    latents = torch.randn(2, model.config.in_channels, *shape, generator=generator)
    given = {"timestep": _STEPS, "encoder_hidden_states": _text(text, generator), **more}
    return model(hidden_states=latents, **given).sample


def _of_sd3(model: Any, generator: Generator) -> Any:
    pooled = torch.randn(2, model.config.pooled_projection_dim, generator=generator)
    width = model.config.joint_attention_dim
    return _of_latents(model, generator, width, 8, 8, pooled_projections=pooled)


def _of_sana(model: Any, generator: Generator) -> Any:
    return _of_latents(model, generator, model.config.caption_channels, 8, 8)


def _of_wan(model: Any, generator: Generator) -> Any:
    return _of_latents(model, generator, model.config.text_dim, 2, 4, 4)


def _of_hunyuan_video(model: Any, generator: Generator) -> Any:
    config = model.config
    return _of_latents(
        model, generator, config.text_embed_dim, 2, 4, 4,
        pooled_projections=torch.randn(2, config.pooled_projection_dim, generator=generator),
        encoder_attention_mask=torch.ones(2, TOKENS),
        guidance=torch.tensor([100.0, 600.0]),
    )  # fmt: skip


def _of_ltx(model: Any, generator: Generator) -> Any:
    config = model.config
    return model(
        hidden_states=torch.randn(2, 32, config.in_channels, generator=generator),
        timestep=_STEPS,
        encoder_hidden_states=_text(config.caption_channels, generator),
        encoder_attention_mask=torch.ones(2, TOKENS).bool(),
        num_frames=2,
        height=4,
        width=4,
    ).sample


def _of_z_image(model: Any, generator: Generator) -> Any:
    config = model.config
    latents = torch.randn(2, config.in_channels, 1, 8, 8, generator=generator)
    text = _text(config.cap_feat_dim, generator)
    return torch.stack(model(x=[*latents], t=_PARTS, cap_feats=[*text]).sample)


def _of_text_encoder(model: Any, generator: Generator) -> Any:
    ids = torch.randint(3, len(LETTERS), (2, TOKENS), generator=generator)
    if model.config.model_type.startswith("clip"):
        ids[:, -1] = model.config.eos_token_id
    output = model(input_ids=ids)
    kinds = ("text_embeds", "last_hidden_state", "logits")
    return next(getattr(output, kind) for kind in kinds if hasattr(output, kind))


_CALLS: Mapping[str, Callable[[Any, Generator], Any]] = {
    "UNet2DConditionModel": _of_unet,
    "Flux2Transformer2DModel": _of_flux2,
    "FluxTransformer2DModel": _of_flux,
    "HunyuanVideoTransformer3DModel": _of_hunyuan_video,
    "LTXVideoTransformer3DModel": _of_ltx,
    "QwenImageTransformer2DModel": _of_qwen_image,
    "SD3Transformer2DModel": _of_sd3,
    "SanaTransformer2DModel": _of_sana,
    "WanTransformer3DModel": _of_wan,
    "ZImageTransformer2DModel": _of_z_image,
    "CLIPTextModel": _of_text_encoder,
    "CLIPTextModelWithProjection": _of_text_encoder,
    "Gemma2Model": _of_text_encoder,
    "LlamaModel": _of_text_encoder,
    "Qwen2_5_VLForConditionalGeneration": _of_text_encoder,
    "Qwen3ForCausalLM": _of_text_encoder,
    "Qwen3Model": _of_text_encoder,
    "T5EncoderModel": _of_text_encoder,
    "UMT5EncoderModel": _of_text_encoder,
}
