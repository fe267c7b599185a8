"""Tiny diffusers pipelines, one row a kind, with random weights from a fixed seed.

Their tokenizers are built in memory and know single letters, so `pipe("a cat")` runs.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Generator, Tensor, nn

from hf_lora.errors import InvalidOption

_TOKENS = 16  # length of a prompt, in tokens
_START, _END = "<|startoftext|>", "<|endoftext|>"
_LETTERS = string.ascii_lowercase + string.digits + string.punctuation
_CLIP_VOCAB = {
    token: number
    for number, token in enumerate([*_LETTERS, *(f"{x}</w>" for x in _LETTERS), _START, _END])
}
_T5_VOCAB = [
    ("<pad>", 0.0),
    ("</s>", 0.0),
    ("<unk>", 0.0),
    *((x, -2.0) for x in f"\N{LOWER ONE EIGHTH BLOCK}{_LETTERS}"),
]


@dataclass(frozen=True)
class Part:
    """How to build one component small.

    Attributes:
        kind: Class name in diffusers or transformers.
        sizes: Its arguments, or the fields of its config for a model of transformers.
    """

    kind: str
    sizes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TinyPipeline:
    """How to build one kind of pipeline small.

    Attributes:
        kind: Class name of the pipeline.
        parts: Component name -> how to build it.
        settings: The pipeline's other arguments.
    """

    kind: str
    parts: Mapping[str, Part]
    settings: Mapping[str, Any] = field(default_factory=dict)


_CLIP = {
    "vocab_size": len(_CLIP_VOCAB),
    "hidden_size": 32,
    "intermediate_size": 48,
    "projection_dim": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": _TOKENS,
    "bos_token_id": _CLIP_VOCAB[_START],
    "eos_token_id": _CLIP_VOCAB[_END],
    "pad_token_id": _CLIP_VOCAB[_END],
}
_CLIP_TOKENIZER = Part(
    "CLIPTokenizer", {"vocab": _CLIP_VOCAB, "merges": [], "model_max_length": _TOKENS}
)
_UNET = {
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": 4,
    "norm_num_groups": 8,
    "cross_attention_dim": 32,
}
_VAE = Part(
    "AutoencoderKL",
    {
        "block_out_channels": (8, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "norm_num_groups": 4,
        "latent_channels": 4,
        "sample_size": 16,
        "shift_factor": 0.0,
    },
)
# The values that the pipelines ask for; with others they warn and set them themselves.
_DDIM = Part("DDIMScheduler", {"steps_offset": 1, "clip_sample": False})

PIPELINES: Mapping[str, TinyPipeline] = {
    "sd": TinyPipeline(
        "StableDiffusionPipeline",
        {
            "unet": Part("UNet2DConditionModel", _UNET),
            "text_encoder": Part("CLIPTextModel", _CLIP),
            "tokenizer": _CLIP_TOKENIZER,
            "vae": _VAE,
            "scheduler": _DDIM,
        },
        {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False},
    ),
    "sdxl": TinyPipeline(
        "StableDiffusionXLPipeline",
        {
            "unet": Part(
                "UNet2DConditionModel",
                {
                    **_UNET,
                    "cross_attention_dim": 64,  # both text encoders, side by side
                    "addition_embed_type": "text_time",
                    "addition_time_embed_dim": 8,
                    "projection_class_embeddings_input_dim": 80,  # six time ids of 8, and 32
                },
            ),
            "text_encoder": Part("CLIPTextModel", _CLIP),
            "text_encoder_2": Part("CLIPTextModelWithProjection", _CLIP),
            "tokenizer": _CLIP_TOKENIZER,
            "tokenizer_2": _CLIP_TOKENIZER,
            "vae": _VAE,
            "scheduler": _DDIM,
        },
        {"add_watermarker": False},
    ),
    "flux": TinyPipeline(
        "FluxPipeline",
        {
            "transformer": Part(
                "FluxTransformer2DModel",
                {
                    "in_channels": 16,  # 2x2 patches of four latent channels
                    "num_layers": 2,
                    "num_single_layers": 2,
                    "attention_head_dim": 16,
                    "num_attention_heads": 2,
                    "joint_attention_dim": 32,
                    "pooled_projection_dim": 32,
                    "axes_dims_rope": (4, 4, 8),
                },
            ),
            "text_encoder": Part("CLIPTextModel", _CLIP),
            "text_encoder_2": Part(
                "T5EncoderModel",
                {"vocab_size": len(_T5_VOCAB), "d_model": 32, "d_kv": 8, "d_ff": 48,
                 "num_layers": 2, "num_heads": 4},
            ),
            "tokenizer": _CLIP_TOKENIZER,
            "tokenizer_2": Part(
                "T5Tokenizer",
                {"vocab": _T5_VOCAB, "extra_ids": 0, "model_max_length": _TOKENS},
            ),
            "vae": _VAE,
            "scheduler": Part("FlowMatchEulerDiscreteScheduler"),
        },
    ),
}  # fmt: skip


def tiny_pipeline(kind: str, *, seed: int = 0) -> Any:
    """Builds a tiny pipeline on the CPU in float32, its models in evaluation mode.

    Args:
        kind: A key of `PIPELINES`: `"sd"`, `"sdxl"` or `"flux"`.
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
        torch.tensor([3, 700]),
        torch.randn(2, _TOKENS, config.cross_attention_dim, generator=generator),
        added_cond_kwargs=extra,
    ).sample


def _of_flux(model: Any, generator: Generator) -> Any:
    config = model.config
    places = torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0))
    return model(
        hidden_states=torch.randn(2, 16, config.in_channels, generator=generator),
        timestep=torch.tensor([0.003, 0.7]),
        pooled_projections=torch.randn(2, config.pooled_projection_dim, generator=generator),
        encoder_hidden_states=torch.randn(
            2, _TOKENS, config.joint_attention_dim, generator=generator
        ),
        txt_ids=torch.zeros(_TOKENS, 3),
        img_ids=places,
    ).sample


def _of_text_encoder(model: Any, generator: Generator) -> Any:
    ids = torch.randint(3, len(_LETTERS), (2, _TOKENS), generator=generator)
    if model.config.model_type != "t5":
        ids[:, -1] = model.config.eos_token_id
    output = model(input_ids=ids)
    return output.text_embeds if hasattr(output, "text_embeds") else output.last_hidden_state


_CALLS: Mapping[str, Callable[[Any, Generator], Any]] = {
    "UNet2DConditionModel": _of_unet,
    "FluxTransformer2DModel": _of_flux,
    "CLIPTextModel": _of_text_encoder,
    "CLIPTextModelWithProjection": _of_text_encoder,
    "T5EncoderModel": _of_text_encoder,
}
