"""How to build each tiny pipeline: one row a kind, sized as diffusers' own tests size them."""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

TOKENS = 16  # length of a prompt, in tokens
_START, _END = "<|startoftext|>", "<|endoftext|>"
LETTERS = string.ascii_lowercase + string.digits + string.punctuation
_CLIP_VOCAB = {
    token: number
    for number, token in enumerate([*LETTERS, *(f"{x}</w>" for x in LETTERS), _START, _END])
}
_T5_VOCAB = [
    ("<pad>", 0.0),
    ("</s>", 0.0),
    ("<unk>", 0.0),
    *((x, -2.0) for x in f"\N{LOWER ONE EIGHTH BLOCK}{LETTERS}"),
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
        call: What a call takes besides `prompt=` to be over in a moment and give a tensor: a
            picture of 16 or 32 pixels a side, or a video of some frames.
    """

    kind: str
    parts: Mapping[str, Part]
    settings: Mapping[str, Any] = field(default_factory=dict)
    call: Mapping[str, Any] = field(default_factory=dict)


_CALL = {"height": 16, "width": 16, "num_inference_steps": 2, "output_type": "pt"}
_SHORT = {**_CALL, "max_sequence_length": TOKENS}
_LARGE = {**_SHORT, "height": 32, "width": 32}  # the least that some allow
_FRAMES = {"num_frames": 5}

_CLIP = {
    "vocab_size": len(_CLIP_VOCAB),
    "hidden_size": 32,
    "intermediate_size": 48,
    "projection_dim": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": TOKENS,
    "bos_token_id": _CLIP_VOCAB[_START],
    "eos_token_id": _CLIP_VOCAB[_END],
    "pad_token_id": _CLIP_VOCAB[_END],
}
_CLIP_TOKENIZER = Part(
    "CLIPTokenizer", {"vocab": _CLIP_VOCAB, "merges": [], "model_max_length": TOKENS}
)
_T5 = {
    "vocab_size": len(_T5_VOCAB),
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
}
_LETTER_TOKENIZER = {"vocab": _T5_VOCAB, "extra_ids": 0, "model_max_length": TOKENS}
_T5_TOKENIZER = Part("T5Tokenizer", _LETTER_TOKENIZER)
# In place of the tokenizers of language models, which know no single letters
_CHAT_TOKENIZER = Part(
    "T5Tokenizer",
    {**_LETTER_TOKENIZER, "chat_template": "{{ messages[0]['content'] }}"},
)
# A language model that writes for a denoiser: Llama, Qwen, Gemma
_DECODER = {
    "vocab_size": len(_T5_VOCAB),
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
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
_VAE_SIZES = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
    "latent_channels": 4,
    "sample_size": 16,
}
_VAE = Part("AutoencoderKL", {**_VAE_SIZES, "shift_factor": 0.0})
# Of Wan and Qwen-Image: eight pixels a side to a latent, four frames
_VIDEO_VAE = {
    "base_dim": 4,
    "z_dim": 16,
    "dim_mult": [1, 1, 1, 1],
    "num_res_blocks": 1,
    "temperal_downsample": [False, True, True],
}
# The values that the pipelines ask for; with others they warn and set them themselves.
_DDIM = Part("DDIMScheduler", {"steps_offset": 1, "clip_sample": False})
_FLOW = Part("FlowMatchEulerDiscreteScheduler")
_WAN = Part(
    "WanTransformer3DModel",
    {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 16, "out_channels": 16,
     "text_dim": 32, "freq_dim": 32, "ffn_dim": 32, "num_layers": 2, "rope_max_seq_len": 32},
)  # fmt: skip

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
        _CALL,
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
        _CALL,
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
            "text_encoder_2": Part("T5EncoderModel", _T5),
            "tokenizer": _CLIP_TOKENIZER,
            "tokenizer_2": _T5_TOKENIZER,
            "vae": _VAE,
            "scheduler": _FLOW,
        },
        call=_SHORT,
    ),
    "sd3": TinyPipeline(
        "StableDiffusion3Pipeline",
        {
            "transformer": Part(
                "SD3Transformer2DModel",
                {"sample_size": 8, "in_channels": 4, "out_channels": 4, "num_layers": 2,
                 "attention_head_dim": 8, "num_attention_heads": 4, "caption_projection_dim": 32,
                 # both CLIPs side by side, and T5 as wide
                 "joint_attention_dim": 64, "pooled_projection_dim": 64, "pos_embed_max_size": 8,
                 "dual_attention_layers": (0,), "qk_norm": "rms_norm"},
            ),
            "text_encoder": Part("CLIPTextModelWithProjection", _CLIP),
            "text_encoder_2": Part("CLIPTextModelWithProjection", _CLIP),
            "text_encoder_3": Part("T5EncoderModel", {**_T5, "d_model": 64}),
            "tokenizer": _CLIP_TOKENIZER,
            "tokenizer_2": _CLIP_TOKENIZER,
            "tokenizer_3": _T5_TOKENIZER,
            "vae": _VAE,
            "scheduler": _FLOW,
        },
        call=_SHORT,
    ),
    "flux2": TinyPipeline(
        "Flux2KleinPipeline",
        {
            "transformer": Part(
                "Flux2Transformer2DModel",
                {"in_channels": 16, "num_layers": 2, "num_single_layers": 2,
                 "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 64,
                 "timestep_guidance_channels": 32, "axes_dims_rope": (4, 4, 4, 4),
                 "guidance_embeds": False},
            ),
            "text_encoder": Part("Qwen3ForCausalLM", _DECODER),
            "tokenizer": _CHAT_TOKENIZER,
            "vae": Part("AutoencoderKLFlux2", _VAE_SIZES),
            "scheduler": _FLOW,
        },
        call={**_SHORT, "text_encoder_out_layers": (1, 2)},
    ),
    "qwen-image": TinyPipeline(
        "QwenImagePipeline",
        {
            "transformer": Part(
                "QwenImageTransformer2DModel",
                {"in_channels": 64, "out_channels": 16, "num_layers": 2, "attention_head_dim": 16,
                 "num_attention_heads": 2, "joint_attention_dim": 32, "axes_dims_rope": (8, 4, 4)},
            ),
            "text_encoder": Part(
                "Qwen2_5_VLForConditionalGeneration",
                {"text_config": {
                    **_DECODER,
                    "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]},
                 },
                 "vision_config": {"depth": 1, "hidden_size": 16, "intermediate_size": 16,
                                   "num_heads": 2, "out_hidden_size": 32}},
            ),
            "tokenizer": _T5_TOKENIZER,
            "vae": Part("AutoencoderKLQwenImage", _VIDEO_VAE),
            "scheduler": _FLOW,
        },
        call={**_CALL, "true_cfg_scale": 1.0},
    ),
    "z-image": TinyPipeline(
        "ZImagePipeline",
        {
            "transformer": Part(
                "ZImageTransformer2DModel",
                {"in_channels": 4, "dim": 32, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2,
                 "n_kv_heads": 2, "cap_feat_dim": 32, "axes_dims": [8, 4, 4],
                 "axes_lens": [64, 32, 32]},
            ),
            "text_encoder": Part("Qwen3Model", _DECODER),
            "tokenizer": _CHAT_TOKENIZER,
            "vae": _VAE,
            "scheduler": _FLOW,
        },
        call=_SHORT,
    ),
    "sana": TinyPipeline(
        "SanaPipeline",
        {
            "transformer": Part(
                "SanaTransformer2DModel",
                {"in_channels": 4, "out_channels": 4, "num_layers": 2, "attention_head_dim": 8,
                 "num_attention_heads": 2, "num_cross_attention_heads": 2,
                 "cross_attention_head_dim": 8, "cross_attention_dim": 16, "caption_channels": 32,
                 "sample_size": 8},
            ),
            "text_encoder": Part("Gemma2Model", _DECODER),
            "tokenizer": _T5_TOKENIZER,
            "vae": Part(
                "AutoencoderDC",
                {"in_channels": 3, "latent_channels": 4, "attention_head_dim": 2,
                 "encoder_block_types": ("ResBlock",) * 2, "decoder_block_types": ("ResBlock",) * 2,
                 "encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8),
                 "encoder_qkv_multiscales": ((), ()), "decoder_qkv_multiscales": ((), ()),
                 "encoder_layers_per_block": (1, 1), "decoder_layers_per_block": (1, 1)},
            ),
            "scheduler": _FLOW,
        },
        call={**_LARGE, "use_resolution_binning": False, "complex_human_instruction": None},
    ),
    "wan": TinyPipeline(
        "WanPipeline",
        {
            "transformer": _WAN,
            "transformer_2": _WAN,
            "text_encoder": Part("UMT5EncoderModel", _T5),
            "tokenizer": _T5_TOKENIZER,
            "vae": Part("AutoencoderKLWan", _VIDEO_VAE),
            "scheduler": _FLOW,
        },
        {"boundary_ratio": 0.7},  # one step for each denoiser
        {**_SHORT, **_FRAMES},
    ),
    "hunyuan-video": TinyPipeline(
        "HunyuanVideoPipeline",
        {
            "transformer": Part(
                "HunyuanVideoTransformer3DModel",
                {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2,
                 "attention_head_dim": 10, "num_layers": 2, "num_single_layers": 2,
                 "num_refiner_layers": 1, "text_embed_dim": 32, "pooled_projection_dim": 32,
                 "rope_axes_dim": (2, 4, 4)},
            ),
            "text_encoder": Part("LlamaModel", _DECODER),
            # the pipeline asks for this many of CLIP's tokens
            "text_encoder_2": Part("CLIPTextModel", {**_CLIP, "max_position_embeddings": 77}),
            "tokenizer": _T5_TOKENIZER,
            "tokenizer_2": _CLIP_TOKENIZER,
            "vae": Part(
                "AutoencoderKLHunyuanVideo",
                {"latent_channels": 4, "block_out_channels": (8, 8, 8, 8), "layers_per_block": 1,
                 "norm_num_groups": 4},
            ),
            "scheduler": _FLOW,
        },
        # the usual template is so long in letters that the prompt would be cut off
        call={**_SHORT, **_FRAMES, "prompt_template": {"template": "{}", "crop_start": 0}},
    ),
    "ltx": TinyPipeline(
        "LTXPipeline",
        {
            "transformer": Part(
                "LTXVideoTransformer3DModel",
                {"in_channels": 8, "out_channels": 8, "num_attention_heads": 2,
                 "attention_head_dim": 8, "cross_attention_dim": 16, "num_layers": 2,
                 "caption_channels": 32},
            ),
            "text_encoder": Part("T5EncoderModel", _T5),
            "tokenizer": _T5_TOKENIZER,
            "vae": Part(
                "AutoencoderKLLTXVideo",
                {"latent_channels": 8, "block_out_channels": (8, 8, 8, 8),
                 "decoder_block_out_channels": (8, 8, 8, 8), "layers_per_block": (1,) * 5,
                 "decoder_layers_per_block": (1,) * 5, "patch_size": 1,
                 "spatio_temporal_scaling": (True, True, False, False),
                 "decoder_spatio_temporal_scaling": (True, True, False, False)},
            ),
            "scheduler": _FLOW,
        },
        call={**_LARGE, "num_frames": 9},
    ),
}  # fmt: skip
