"""The layers of public pipelines by name, so that a file can be read without loading its base.

Models are built on the meta device: classes and sizes, no weights, nothing from the network.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import transformers
from torch import nn

from hf_lora.errors import InvalidOption, closest, shown
from hf_lora.formats.names import Names
from hf_lora.hosts import class_name, features, kind_of, model_of, parts_of
from hf_lora.walks import bare_modules

__all__ = ["ARCHITECTURES", "Model", "architecture", "names_of", "names_of_host"]


@dataclass(frozen=True, eq=False)  # by identity: pipelines that share one build it once
class Model:
    """How to build one component.

    Attributes:
        kind: Class name in diffusers or transformers.
        sizes: What differs from the defaults of the class, or of its config for transformers.
    """

    kind: str
    sizes: Mapping[str, Any] = field(default_factory=dict)


# openai/clip-vit-large-patch14 and laion/CLIP-ViT-bigG-14-laion2B-39B-b160k, their text halves
_CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12,
           "projection_dim": 768}  # fmt: skip
_CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32,
           "num_attention_heads": 20, "projection_dim": 1280}  # fmt: skip
_CLIP_L_TEXT = Model("CLIPTextModel", _CLIP_L)
_CLIP_L_PROJECTED = Model("CLIPTextModelWithProjection", _CLIP_L)
_CLIP_G_PROJECTED = Model("CLIPTextModelWithProjection", _CLIP_G)

_SDXL_UNET = {
    "down_block_types": ("DownBlock2D", *("CrossAttnDownBlock2D",) * 2),
    "up_block_types": (*("CrossAttnUpBlock2D",) * 2, "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
_WAN_14B = Model("WanTransformer3DModel")
_WAN_22_I2V = Model("WanTransformer3DModel", {"in_channels": 36})


def _sd3(layers: int, **sizes: Any) -> Mapping[str, Model]:
    """Returns a pipeline of the SD3 family, whose denoisers have as many heads as layers."""
    width = 64 * layers
    common = {
        "num_layers": layers,
        "num_attention_heads": layers,
        "caption_projection_dim": width,
    }
    return {
        "transformer": Model("SD3Transformer2DModel", {**common, **sizes}),
        "text_encoder": _CLIP_L_PROJECTED,
        "text_encoder_2": _CLIP_G_PROJECTED,
    }


def _denoiser(kind: str, **sizes: Any) -> Mapping[str, Model]:
    return {"transformer": Model(kind, sizes)}


# Name -> component -> how to build it: only what diffusers 0.42.1 loads LoRAs into, which leaves
# out T5 and the language models that write prompts for others. Sizes are those of the config.json
# on the Hub that the comment names, as diffusers' conversion scripts write them.
#
# Whoever looks for the first that fits a file wants the most usual one: it stands before those that
# share its names.
ARCHITECTURES: Mapping[str, Mapping[str, Model]] = {
    "sd1": {  # stable-diffusion-v1-5/stable-diffusion-v1-5
        "unet": Model("UNet2DConditionModel", {"cross_attention_dim": 768}),
        "text_encoder": _CLIP_L_TEXT,
    },
    "sdxl": {  # stabilityai/stable-diffusion-xl-base-1.0
        "unet": Model("UNet2DConditionModel", _SDXL_UNET),
        "text_encoder": _CLIP_L_TEXT,
        "text_encoder_2": _CLIP_G_PROJECTED,
    },
    "sd2": {  # stabilityai/stable-diffusion-2-1
        "unet": Model(
            "UNet2DConditionModel",
            {"attention_head_dim": (5, 10, 20, 20), "cross_attention_dim": 1024,
             "use_linear_projection": True},
        ),
        "text_encoder": Model(
            "CLIPTextModel",
            {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23,
             "num_attention_heads": 16},
        ),
    },
    # black-forest-labs/FLUX.1-dev; FLUX.1-schnell is the same without the embedding of the guidance
    "flux": {
        "transformer": Model("FluxTransformer2DModel", {"guidance_embeds": True}),
        "text_encoder": _CLIP_L_TEXT,
    },
    # stabilityai/stable-diffusion-3-medium-diffusers, and 3.5; scripts/convert_sd3_to_diffusers.py
    "sd3": _sd3(24, pos_embed_max_size=192),
    "sd3.5-medium": _sd3(
        24, pos_embed_max_size=384, qk_norm="rms_norm", dual_attention_layers=tuple(range(13))
    ),
    "sd3.5-large": _sd3(38, pos_embed_max_size=192, qk_norm="rms_norm"),
    # black-forest-labs/FLUX.2-dev and FLUX.2-klein-*; `Klein4BParams` and its kin in its model.py
    "flux2": _denoiser("Flux2Transformer2DModel"),
    "flux2-klein-4b": _denoiser(
        "Flux2Transformer2DModel", num_layers=5, num_single_layers=20, num_attention_heads=24,
        joint_attention_dim=7680, guidance_embeds=False,
    ),
    "flux2-klein-9b": _denoiser(
        "Flux2Transformer2DModel", num_layers=8, num_single_layers=24, num_attention_heads=32,
        joint_attention_dim=12288, guidance_embeds=False,
    ),
    "qwen-image": _denoiser("QwenImageTransformer2DModel"),  # Qwen/Qwen-Image
    "z-image": _denoiser("ZImageTransformer2DModel"),  # Tongyi-MAI/Z-Image-Turbo
    # Wan-AI/Wan2.1-T2V-14B-Diffusers and its kin; scripts/convert_wan_to_diffusers.py
    "wan": {"transformer": _WAN_14B},
    "wan-1.3b": _denoiser(
        "WanTransformer3DModel", num_layers=30, num_attention_heads=12, ffn_dim=8960
    ),
    "wan-i2v": _denoiser(
        "WanTransformer3DModel", in_channels=36, image_dim=1280, added_kv_proj_dim=5120
    ),
    "wan2.2": {"transformer": _WAN_14B, "transformer_2": _WAN_14B},  # Wan2.2-T2V-A14B
    "wan2.2-i2v": {"transformer": _WAN_22_I2V, "transformer_2": _WAN_22_I2V},  # Wan2.2-I2V-A14B
    "wan2.2-5b": _denoiser(  # Wan2.2-TI2V-5B
        "WanTransformer3DModel", num_layers=30, num_attention_heads=24, ffn_dim=14336,
        in_channels=48, out_channels=48,
    ),
    "hunyuan-video": _denoiser("HunyuanVideoTransformer3DModel"),  # hunyuanvideo-community
    "ltx": _denoiser("LTXVideoTransformer3DModel"),  # Lightricks/LTX-Video, 2B
}  # fmt: skip


def architecture(name: str) -> dict[str, Names]:
    """Returns the layers of a public pipeline, by component.

    Built on the first call, which takes 0.02 to 0.4 s on one core (the very first one also imports
    diffusers, 3 s), and remembered.

    Args:
        name: One of `ARCHITECTURES`.

    Raises:
        InvalidOption: There is none of that name.
    """
    models = ARCHITECTURES.get(name) if isinstance(name, str) else None
    if models is None:
        near = ", ".join(closest(str(name), list(ARCHITECTURES)))
        raise InvalidOption(
            f"no public pipeline is known by the name {shown(name)}; the closest are {near}",
            fix=f"Names: {', '.join(ARCHITECTURES)}.",
            field="architecture",
        )
    return {component: _built(model) for component, model in models.items()}


@cache
def _built(model: Model) -> Names:
    """Builds a model without weights and reads its names."""
    import diffusers  # a second, which loads of diffusers' own files need not spend

    library: Any = diffusers if hasattr(diffusers, model.kind) else transformers
    kind = getattr(library, model.kind)
    with torch.device("meta"):
        if hasattr(kind, "config_class"):
            return names_of(kind(kind.config_class(**model.sizes)))
        return names_of(kind(**model.sizes))


def names_of(model: nn.Module) -> Names:
    """Returns the layers of a model that a LoRA can sit on.

    Args:
        model: A model with adapters or without, in a `PeftModel` or not, quantised or not, on any
            device. Paths and shapes are those of its layers without all that.

    Raises:
        UnsupportedHost: It is no model, or a wrapper that holds prompts.
    """
    inner = model_of(model)
    shapes = ((path, _shape(module)) for path, module in bare_modules(inner))
    return Names(class_name(inner), {path: shape for path, shape in shapes if shape is not None})


def _shape(module: nn.Module) -> tuple[int, ...] | None:
    """Returns the shape of a layer's weight as it would be in floats; None for what is no layer."""
    sizes = features(module)
    if sizes is None:
        return None
    kind = kind_of(module)
    if kind == "embedding":
        return sizes
    if kind == "conv":
        conv: Any = module
        return (sizes[1], sizes[0] // conv.groups, *conv.kernel_size)
    return (sizes[1], sizes[0])


def names_of_host(host: object) -> dict[str, Names]:
    """Returns component -> layers of a host; a host that is one model has the component `"model"`.

    Raises:
        UnsupportedHost: `host` is neither a model nor a pipeline that diffusers loads LoRAs into.
    """
    return {name: names_of(part) for name, part in parts_of(host).items()}
