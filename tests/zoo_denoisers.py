"""The zoo's denoisers, sized as diffusers' own tests size them (0.42, `tests/models`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tests.zoo_row import Row, noise

# Of the last joint block only the picture is used, so nothing hears what its text asks for.
_LAST_TEXT = "the last block's text stream is thrown away"
_STEPS = torch.tensor([30, 700])
_PARTS = torch.tensor([0.1, 0.7])  # of the whole way, for the models that count so
_UNET = {"block_out_channels": (16, 32), "norm_num_groups": 8, "layers_per_block": 1,
         "cross_attention_dim": 16, "in_channels": 4, "out_channels": 4,
         "sample_size": 8}  # fmt: skip
_WAN = {"patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12,
        "in_channels": 4, "out_channels": 4, "text_dim": 16, "freq_dim": 32, "ffn_dim": 32,
        "num_layers": 2, "rope_max_seq_len": 32}  # fmt: skip
_FLUX = {"patch_size": 1, "in_channels": 4, "num_layers": 1, "num_single_layers": 1,
         "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 32,
         "axes_dims_rope": (4, 4, 8)}  # fmt: skip
_COG = {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4,
        "num_layers": 2, "text_embed_dim": 8}  # fmt: skip


def _places(tokens: int, axes: int = 3) -> torch.Tensor:
    """Returns positions (tokens, axes) on a row."""
    places = torch.zeros(tokens, axes)
    places[:, -1] = torch.arange(tokens)
    return places


def _image(text: int, *, channels: int = 4, size: int = 8, **more: Any) -> dict[str, Any]:
    """Returns latents (2, channels, size, size) and 6 text tokens of width `text`."""
    return _denoise(noise(2, channels, size, size), text, **more)


def _video(text: int, **more: Any) -> dict[str, Any]:
    """Returns latents (2, 4, 2, 8, 8) of two frames and 6 text tokens of width `text`."""
    return _denoise(noise(2, 4, 2, 8, 8), text, **more)


def _packed(text: int = 32, axes: int = 3, **more: Any) -> dict[str, Any]:
    """Returns 16 latent tokens of width 4, 6 text tokens and the places of both."""
    places = {"img_ids": _places(16, axes), "txt_ids": _places(6, axes)}
    return _denoise(noise(2, 16, 4), text, **{"timestep": _PARTS, **places, **more})


def _denoise(latents: torch.Tensor, text: int, **more: Any) -> dict[str, Any]:
    return {
        "hidden_states": latents,
        "encoder_hidden_states": noise(2, 6, text),
        "timestep": _STEPS,
        **more,
    }


def _unet(model: str, blocks: str, sizes: Mapping[str, Any], inputs: Mapping[str, Any]) -> Row:
    types = {
        "down_block_types": (f"CrossAttnDownBlock{blocks}", f"DownBlock{blocks}"),
        "up_block_types": (f"UpBlock{blocks}", f"CrossAttnUpBlock{blocks}"),
    }
    return Row("unet", model, {**_UNET, **types, **sizes}, inputs, "sample")


def _dit(
    model: str,
    sizes: Mapping[str, Any],
    inputs: Mapping[str, Any],
    silent: Mapping[str, str] | None = None,
) -> Row:
    return Row("dit", model, sizes, inputs, "sample", silent or {})


_SD_INPUTS = {"sample": noise(2, 4, 8, 8), "timestep": _STEPS,
              "encoder_hidden_states": noise(2, 6, 16)}  # fmt: skip
_FRAMES = {**_SD_INPUTS, "sample": noise(2, 4, 4, 8, 8)}

_UNETS = {
    "sd": _unet("UNet2DConditionModel", "2D", {"attention_head_dim": 4}, _SD_INPUTS),
    "sdxl": _unet(
        "UNet2DConditionModel", "2D",
        {"attention_head_dim": 4, "use_linear_projection": True,
         "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
         "projection_class_embeddings_input_dim": 64},
        {**_SD_INPUTS,
         "added_cond_kwargs": {"text_embeds": noise(2, 16), "time_ids": torch.ones(2, 6)}},
    ),
    "unet_motion": _unet(
        "UNetMotionModel", "Motion", {"num_attention_heads": 2, "motion_num_attention_heads": 2},
        {**_FRAMES, "encoder_hidden_states": noise(8, 6, 16)},
    ),
    "unet_3d": _unet("UNet3DConditionModel", "3D", {"attention_head_dim": 4}, _FRAMES),
}  # fmt: skip

_IMAGES = {
    "sd3": _dit(
        "SD3Transformer2DModel",
        {"sample_size": 8, "patch_size": 2, "in_channels": 4, "num_layers": 2,
         "attention_head_dim": 8, "num_attention_heads": 4, "caption_projection_dim": 32,
         "joint_attention_dim": 32, "pooled_projection_dim": 32, "out_channels": 4,
         "pos_embed_max_size": 8, "dual_attention_layers": (0,), "qk_norm": "rms_norm"},
        _image(32, pooled_projections=noise(2, 32)),
        {r"transformer_blocks\.1\.attn\.add_q_proj": _LAST_TEXT},
    ),
    "flux": _dit(
        "FluxTransformer2DModel",
        {**_FLUX, "pooled_projection_dim": 32, "guidance_embeds": True},
        _packed(pooled_projections=noise(2, 32), guidance=torch.tensor([3.5, 4.0])),
    ),
    "flux2": _dit(
        "Flux2Transformer2DModel",
        {**_FLUX, "axes_dims_rope": (4, 4, 4, 4), "timestep_guidance_channels": 32},
        _packed(axes=4, guidance=torch.tensor([3.5, 4.0])),
    ),
    "chroma": _dit(
        "ChromaTransformer2DModel",
        {**_FLUX, "approximator_num_channels": 8, "approximator_hidden_dim": 16,
         "approximator_layers": 1},
        _packed(),
    ),
    "bria": _dit("BriaTransformer2DModel", {**_FLUX, "pooled_projection_dim": None}, _packed()),
    "longcat_image": _dit(
        "LongCatImageTransformer2DModel", {**_FLUX, "pooled_projection_dim": 32}, _packed()
    ),
    "ovis_image": _dit("OvisImageTransformer2DModel", {**_FLUX, "out_channels": 4}, _packed()),
    "qwenimage": _dit(
        "QwenImageTransformer2DModel",
        {"patch_size": 2, "in_channels": 16, "out_channels": 4, "num_layers": 2,
         "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 16,
         "axes_dims_rope": (8, 4, 4)},
        _denoise(noise(2, 16, 16), 16, timestep=_PARTS, img_shapes=[(1, 4, 4)] * 2,
                 encoder_hidden_states_mask=torch.ones(2, 6).long()),
        {r"transformer_blocks\.1\.attn\.(add_q_proj|to_add_out)": _LAST_TEXT},
    ),
    "auraflow": _dit(
        "AuraFlowTransformer2DModel",
        {"sample_size": 8, "patch_size": 2, "in_channels": 4, "num_mmdit_layers": 1,
         "num_single_dit_layers": 1, "attention_head_dim": 8, "num_attention_heads": 4,
         "caption_projection_dim": 32, "joint_attention_dim": 32, "out_channels": 4,
         "pos_embed_max_size": 16},
        _image(32),
    ),
    "pixart": _dit(
        "PixArtTransformer2DModel",
        {"sample_size": 8, "num_layers": 2, "patch_size": 2, "attention_head_dim": 8,
         "num_attention_heads": 2, "in_channels": 4, "cross_attention_dim": 16,
         "out_channels": 8, "caption_channels": 8, "use_additional_conditions": False},
        _image(8, added_cond_kwargs={"aspect_ratio": None, "resolution": None}),
    ),
    "sana": _dit(
        "SanaTransformer2DModel",
        {"patch_size": 1, "in_channels": 4, "out_channels": 4, "num_layers": 2,
         "attention_head_dim": 8, "num_attention_heads": 2, "num_cross_attention_heads": 2,
         "cross_attention_head_dim": 8, "cross_attention_dim": 16, "caption_channels": 8,
         "sample_size": 8},
        _image(8),
    ),
    "hunyuan_dit": _dit(
        "HunyuanDiT2DModel",
        {"sample_size": 8, "patch_size": 2, "in_channels": 4, "num_layers": 2,
         "attention_head_dim": 8, "num_attention_heads": 2, "cross_attention_dim": 8,
         "cross_attention_dim_t5": 8, "pooled_projection_dim": 4, "hidden_size": 16,
         "text_len": 6, "text_len_t5": 6, "activation_fn": "gelu-approximate"},
        _image(8, text_embedding_mask=torch.ones(2, 6), text_embedding_mask_t5=torch.ones(2, 6),
               encoder_hidden_states_t5=noise(2, 6, 8), timestep=_STEPS.float(),
               image_meta_size=torch.ones(2, 6), style=torch.zeros(2).long(),
               image_rotary_emb=[torch.ones(1, 8), torch.zeros(1, 8)]),
    ),
    "cogview3plus": _dit(
        "CogView3PlusTransformer2DModel",
        {**_COG, "patch_size": 2, "time_embed_dim": 8, "condition_dim": 4,
         "pos_embed_max_size": 8, "sample_size": 8},
        _image(8, original_size=torch.full((2, 2), 64), target_size=torch.full((2, 2), 64),
               crop_coords=torch.zeros(2, 2).long()),
    ),
    "cogview4": _dit(
        "CogView4Transformer2DModel",
        {**_COG, "patch_size": 2, "time_embed_dim": 8, "condition_dim": 4},
        _image(8, original_size=torch.full((2, 2), 64), target_size=torch.full((2, 2), 64),
               crop_coords=torch.zeros(2, 2).long()),
    ),
    "lumina": _dit(
        "LuminaNextDiT2DModel",
        {"sample_size": 8, "patch_size": 2, "in_channels": 4, "hidden_size": 24, "num_layers": 2,
         "num_attention_heads": 3, "num_kv_heads": 1, "multiple_of": 16, "learn_sigma": False,
         "cross_attention_dim": 32},
        _image(32, timestep=_PARTS, encoder_mask=torch.ones(2, 6), cross_attention_kwargs={},
               image_rotary_emb=noise(384, 384, 4)),
    ),
    "lumina2": _dit(
        "Lumina2Transformer2DModel",
        {"sample_size": 8, "patch_size": 2, "in_channels": 4, "hidden_size": 24, "num_layers": 2,
         "num_refiner_layers": 1, "num_attention_heads": 3, "num_kv_heads": 1, "multiple_of": 2,
         "axes_dim_rope": (4, 2, 2), "axes_lens": (16, 16, 16), "cap_feat_dim": 32},
        _image(32, timestep=_PARTS, encoder_attention_mask=torch.ones(2, 6).bool()),
    ),
    "z_image": _dit(
        "ZImageTransformer2DModel",
        {"all_patch_size": (2,), "all_f_patch_size": (1,), "in_channels": 4, "dim": 32,
         "n_layers": 1, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2, "qk_norm": True,
         "cap_feat_dim": 16, "axes_dims": [8, 4, 4], "axes_lens": [64, 32, 32]},
        {"x": [noise(4, 1, 8, 8)] * 2, "cap_feats": [noise(6, 16)] * 2, "t": _PARTS},
    ),
    "hidream": _dit(
        "HiDreamImageTransformer2DModel",
        {"patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 1,
         "num_single_layers": 1, "attention_head_dim": 8, "num_attention_heads": 4,
         "caption_channels": [8, 4], "text_emb_dim": 8, "num_routed_experts": 2,
         "num_activated_experts": 2, "axes_dims_rope": (4, 2, 2), "max_resolution": (8, 8),
         "llama_layers": (0, 1), "force_inference_output": True},
        {"hidden_states": noise(2, 4, 8, 8), "encoder_hidden_states_t5": noise(2, 6, 8),
         "encoder_hidden_states_llama3": noise(2, 2, 6, 4), "pooled_embeds": noise(2, 8),
         "timesteps": _STEPS},
    ),
    "omnigen": _dit(
        "OmniGenTransformer2DModel",
        {"hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 4,
         "intermediate_size": 32, "num_layers": 2, "pad_token_id": 0, "vocab_size": 96,
         "in_channels": 4, "time_step_dim": 4,
         "rope_scaling": {"long_factor": [1, 2], "short_factor": [1, 2]}},
        {"hidden_states": noise(2, 4, 8, 8), "timestep": _PARTS,
         "input_ids": torch.arange(48).reshape(2, 24),
         "input_img_latents": [noise(1, 4, 8, 8)], "input_image_sizes": {0: [[0, 16]]},
         "attention_mask": torch.ones(2, 41, 41), "position_ids": torch.arange(41).expand(2, 41)},
    ),
    "prx": _dit(
        "PRXTransformer2DModel",
        {"in_channels": 4, "patch_size": 2, "context_in_dim": 16, "hidden_size": 32,
         "mlp_ratio": 2.0, "num_heads": 2, "depth": 2, "axes_dim": [8, 8]},
        _image(16, timestep=_PARTS),
    ),
    "glm_image": _dit(
        "GlmImageTransformer2DModel",
        {**_COG, "patch_size": 2, "time_embed_dim": 16, "condition_dim": 8,
         "prior_vq_quantizer_codebook_size": 64},
        _image(8, prior_token_id=torch.arange(32).reshape(2, 16),
               prior_token_drop=torch.zeros(2, 16).bool(),
               target_size=torch.full((2, 2), 8.0), crop_coords=torch.zeros(2, 2)),
    ),
    "ernie_image": _dit(
        "ErnieImageTransformer2DModel",
        {"hidden_size": 32, "num_attention_heads": 2, "num_layers": 2, "ffn_hidden_size": 48,
         "in_channels": 4, "out_channels": 4, "text_in_dim": 16, "rope_axes_dim": (8, 4, 4)},
        {"hidden_states": noise(2, 4, 8, 8), "timestep": _STEPS, "text_bth": noise(2, 6, 16),
         "text_lens": torch.tensor([6, 4])},
    ),
}  # fmt: skip

_VIDEOS = {
    "wan": _dit(
        "WanTransformer3DModel",
        {**_WAN, "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads"}, _video(16),
    ),
    "skyreels_v2": _dit("SkyReelsV2Transformer3DModel", _WAN, _video(16)),
    "ltx": _dit(
        "LTXVideoTransformer3DModel",
        {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 8,
         "cross_attention_dim": 16, "num_layers": 2, "caption_channels": 16},
        _denoise(noise(2, 32, 4), 16, encoder_attention_mask=torch.ones(2, 6).bool(),
                 num_frames=2, height=4, width=4),
    ),
    "hunyuan_video": _dit(
        "HunyuanVideoTransformer3DModel",
        {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 10,
         "num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1, "patch_size": 2,
         "patch_size_t": 1, "text_embed_dim": 16, "pooled_projection_dim": 8,
         "rope_axes_dim": (2, 4, 4)},
        _video(16, pooled_projections=noise(2, 8), encoder_attention_mask=torch.ones(2, 6),
               guidance=torch.tensor([100.0, 600.0])),
    ),
    "hunyuan_video15": _dit(
        "HunyuanVideo15Transformer3DModel",
        {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 8,
         "num_layers": 2, "num_refiner_layers": 1, "mlp_ratio": 2.0, "patch_size": 2,
         "patch_size_t": 1, "text_embed_dim": 16, "text_embed_2_dim": 8, "image_embed_dim": 12,
         "rope_axes_dim": (2, 2, 4), "target_size": 16, "task_type": "i2v"},
        _video(16, timestep=_PARTS, encoder_hidden_states_2=noise(2, 4, 8),
               image_embeds=noise(2, 3, 12), encoder_attention_mask=torch.ones(2, 6),
               encoder_attention_mask_2=torch.ones(2, 4)),
        {r"transformer_blocks\.1\.attn\.(add_q_proj|to_add_out)": _LAST_TEXT},
    ),
    "cogvideox": _dit(
        "CogVideoXTransformer3DModel",
        {**_COG, "time_embed_dim": 8, "sample_width": 8, "sample_height": 8, "sample_frames": 5,
         "patch_size": 2, "temporal_compression_ratio": 4, "max_text_seq_length": 6},
        _denoise(noise(2, 2, 4, 8, 8), 8),
    ),
    "mochi": _dit(
        "MochiTransformer3DModel",
        {"patch_size": 2, "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2,
         "pooled_projection_dim": 16, "in_channels": 4, "text_embed_dim": 16,
         "time_embed_dim": 4, "max_sequence_length": 6},
        _video(16, encoder_attention_mask=torch.ones(2, 6).bool()),
        {r"transformer_blocks\.1\.attn1\.add_q_proj": _LAST_TEXT},
    ),
    "allegro": _dit(
        "AllegroTransformer3DModel",
        {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4,
         "num_layers": 2, "cross_attention_dim": 24, "sample_width": 8, "sample_height": 8,
         "sample_frames": 8, "caption_channels": 8},
        _video(8),
    ),
    "easyanimate": _dit(
        "EasyAnimateTransformer3DModel",
        {"attention_head_dim": 16, "num_attention_heads": 2, "in_channels": 4, "mmdit_layers": 2,
         "num_layers": 2, "out_channels": 4, "patch_size": 2, "sample_height": 8,
         "sample_width": 8, "text_embed_dim": 16, "time_embed_dim": 8},
        _video(16),
        {r"transformer_blocks\.1\.attn1\.(add_q_proj|to_add_out)": _LAST_TEXT},
    ),
    "latte": _dit(
        "LatteTransformer3DModel",
        {"sample_size": 8, "num_layers": 2, "patch_size": 2, "attention_head_dim": 8,
         "num_attention_heads": 2, "caption_channels": 8, "in_channels": 4,
         "cross_attention_dim": 16, "out_channels": 8, "attention_bias": True,
         "activation_fn": "gelu-approximate", "norm_type": "ada_norm_single",
         "num_embeds_ada_norm": 1000, "norm_elementwise_affine": False, "video_length": 2},
        _video(8, enable_temporal_attentions=True),
    ),
    "cosmos": _dit(
        "CosmosTransformer3DModel",
        {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 12,
         "num_layers": 2, "mlp_ratio": 2, "text_embed_dim": 16, "adaln_lora_dim": 4,
         "max_size": (4, 32, 32), "patch_size": (1, 2, 2), "rope_scale": (2.0, 1.0, 1.0),
         "concat_padding_mask": False},  # it would ask for torchvision
        _video(16, attention_mask=torch.ones(2, 6), fps=30),
    ),
    "sana_video": _dit(
        "SanaVideoTransformer3DModel",
        {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 12,
         "num_layers": 2, "num_cross_attention_heads": 2, "cross_attention_head_dim": 12,
         "cross_attention_dim": 24, "caption_channels": 8, "sample_size": 8,
         "patch_size": (1, 2, 2), "rope_max_seq_len": 32},
        _video(8),
    ),
    "kandinsky5": _dit(
        "Kandinsky5Transformer3DModel",
        {"in_visual_dim": 4, "in_text_dim": 16, "in_text_dim2": 8, "time_dim": 16,
         "out_visual_dim": 4, "patch_size": (1, 2, 2), "model_dim": 32, "ff_dim": 48,
         "num_text_blocks": 1, "num_visual_blocks": 2, "axes_dims": (4, 6, 6)},
        {"hidden_states": noise(1, 2, 8, 8, 4), "encoder_hidden_states": noise(1, 6, 16),
         "timestep": _STEPS[:1], "pooled_projections": noise(1, 8),
         "visual_rope_pos": [torch.arange(2), torch.arange(4), torch.arange(4)],
         "text_rope_pos": torch.arange(6)},
    ),
}  # fmt: skip

ROWS = {**_UNETS, **_IMAGES, **_VIDEOS}
