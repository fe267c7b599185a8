"""The zoo's models that see or hear: vision, vision and language, speech and sound."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tests.zoo_row import Row, ids, noise
from tests.zoo_text import DECODER, ENCODER

_TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
          "num_attention_heads": 4, "image_size": 16, "patch_size": 8}  # fmt: skip
_SWIN = {"image_size": 16, "patch_size": 4, "embed_dim": 16, "depths": [1, 2],
         "num_heads": [2, 4], "window_size": 2}  # fmt: skip
_PIXELS = {"pixel_values": noise(2, 3, 16, 16)}
_IMAGE = 90  # the token that stands for a piece of a picture


def _sees(model: str, output: str = "logits", **sizes: Any) -> Row:
    return Row("vision", model, {**_TOWER, **sizes}, _PIXELS, output)


def _tokens(pictures: int, *, start: int | None = None, rows: int = 2) -> Tensor:
    """Returns token ids (rows, 6 + pictures) with the picture's places in the middle."""
    text = ids(rows, 6) % 80 + 3
    if start is not None:
        text[:, 2] = start
    return torch.cat([text[:, :3], torch.full((rows, pictures), _IMAGE), text[:, 3:]], 1)


def _reads(
    model: str,
    text: Mapping[str, Any],
    vision: Mapping[str, Any],
    inputs: Mapping[str, Any],
    **sizes: Any,
) -> Row:
    """A model with a language tower and one that sees; their sizes come on top of the usual."""
    towers = {"text_config": {**DECODER, **text}, "vision_config": {**_TOWER, **vision}}
    pictures = {"image_token_id": _IMAGE, "image_token_index": _IMAGE}
    sizes = {**towers, **pictures, "pad_token_id": 0, **sizes}
    return Row("vlm", f"{model}ForConditionalGeneration", sizes, inputs)


_VISION = {
    "vit": _sees("ViTForImageClassification"),
    "deit": _sees("DeiTForImageClassification"),
    "beit": _sees("BeitForImageClassification"),
    "dinov2": _sees("Dinov2ForImageClassification"),
    "dinov3_vit": _sees("DINOv3ViTModel", "last_hidden_state"),
    "ijepa": _sees("IJepaForImageClassification"),
    "yolos": _sees("YolosForObjectDetection", image_size=[16, 16], num_detection_tokens=3),
    "vit_mae": Row(
        "vision", "ViTMAEForPreTraining",
        {**_TOWER, "decoder_hidden_size": 32, "decoder_num_hidden_layers": 1,
         "decoder_num_attention_heads": 4, "decoder_intermediate_size": 48, "mask_ratio": 0.5},
        {**_PIXELS, "noise": noise(2, 4)},
    ),
    "videomae": Row(
        "vision", "VideoMAEForVideoClassification", {**_TOWER, "num_frames": 4, "tubelet_size": 2},
        {"pixel_values": noise(2, 4, 3, 16, 16)},
    ),
    "dpt": _sees("DPTForSemanticSegmentation", num_hidden_layers=4, num_labels=3,
                 backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[8, 8, 8, 8],
                 fusion_hidden_size=8, use_auxiliary_head=False),
    "swin": Row("vision", "SwinForImageClassification", _SWIN, _PIXELS),
    "swin_model": Row("vision", "SwinModel", _SWIN, _PIXELS, "last_hidden_state"),
    "swinv2": Row("vision", "Swinv2ForImageClassification", _SWIN, _PIXELS),
    "segformer": Row(
        "vision", "SegformerForSemanticSegmentation",
        {"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [16, 32],
         "patch_sizes": [3, 3], "strides": [2, 2], "num_attention_heads": [2, 4],
         "mlp_ratios": [2, 2], "decoder_hidden_size": 16, "num_labels": 3}, _PIXELS,
    ),
    "pvt_v2": Row(
        "vision", "PvtV2ForImageClassification",
        {"image_size": 32, "num_encoder_blocks": 4, "depths": [1, 1, 1, 1],
         "sr_ratios": [4, 2, 2, 1], "hidden_sizes": [8, 16, 16, 16],
         "num_attention_heads": [1, 2, 2, 2], "mlp_ratios": [2, 2, 2, 2]},
        {"pixel_values": noise(2, 3, 64, 64)},
    ),
    "hiera": Row(
        "vision", "HieraForImageClassification",
        {"embed_dim": 8, "image_size": [32, 32], "patch_kernel": [7, 7], "depths": [1, 1, 1, 1],
         "num_heads": [1, 2, 2, 4], "mlp_ratio": 2.0},
        {"pixel_values": noise(2, 3, 32, 32)},
    ),
}  # fmt: skip

_CLIP_TEXT = {**ENCODER, "projection_dim": 16}
_BOTH_TOWERS = {**_PIXELS, "input_ids": torch.cat([ids(2, 8), torch.full((2, 1), 2)], 1)}
_QWEN_VISION = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 4,
                "temporal_patch_size": 2, "spatial_merge_size": 2,
                "out_hidden_size": 32}  # fmt: skip
_QWEN_TOKENS = {"vision_start_token_id": 88, "vision_end_token_id": 89, "video_token_id": 91}
_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4,
                              "mrope_section": [1, 1, 2]}}  # fmt: skip
_PATCHES = {
    "input_ids": _tokens(4, start=88, rows=1),
    "pixel_values": noise(16, 3 * 2 * 4 * 4),
    "image_grid_thw": torch.tensor([[1, 4, 4]]),
}
_TYPED = {**_PATCHES, "mm_token_type_ids": (_PATCHES["input_ids"] == _IMAGE).long()}
_TILES = {"input_ids": _tokens(1), "pixel_values": noise(2, 1, 3, 16, 16)}

_VISION_LANGUAGE = {
    "clip": Row(
        "vlm", "CLIPModel",
        {"text_config": _CLIP_TEXT, "vision_config": {**_TOWER, "projection_dim": 16},
         "projection_dim": 16}, _BOTH_TOWERS, "logits_per_image",
    ),
    "clip_text_model": Row(
        "vlm", "CLIPTextModel", _CLIP_TEXT, {"input_ids": ids()}, "last_hidden_state"
    ),
    "siglip": Row(
        "vlm", "SiglipModel",
        {"text_config": {**ENCODER, "projection_size": 32}, "vision_config": _TOWER},
        _BOTH_TOWERS, "logits_per_image",
    ),
    "llava": _reads(
        "Llava", {"model_type": "llama"}, {"model_type": "clip_vision_model"},
        {**_PIXELS, "input_ids": _tokens(4)}, vision_feature_layer=-1,
    ),
    "gemma3": _reads(
        "Gemma3", {"model_type": "gemma3_text", "sliding_window": 8},
        {"model_type": "siglip_vision_model"},
        {**_PIXELS, "input_ids": _tokens(4), "token_type_ids": (_tokens(4) == _IMAGE).long()},
        mm_tokens_per_image=4, boi_token_index=88, eoi_token_index=89,
    ),
    "paligemma": _reads(
        "PaliGemma", {"model_type": "gemma"},
        {"model_type": "siglip_vision_model", "projection_dim": 32},
        {**_PIXELS, "input_ids": _tokens(4), "token_type_ids": torch.zeros(2, 10).long()},
        projection_dim=32,
    ),
    "mistral3": _reads(
        "Mistral3", {"model_type": "mistral"}, {"model_type": "pixtral", "head_dim": 8},
        {**_PIXELS, "input_ids": _tokens(1), "image_sizes": torch.tensor([[16, 16]] * 2)},
        spatial_merge_size=2, vision_feature_layer=-1,
    ),
    "internvl": _reads(
        "InternVL", {"model_type": "qwen2"},
        {"model_type": "internvl_vision", "image_size": [16, 16], "patch_size": [8, 8]},
        {**_PIXELS, "input_ids": _tokens(1)}, downsample_ratio=0.5,
    ),
    "idefics3": _reads("Idefics3", {"model_type": "llama"}, {}, _TILES, scale_factor=2),
    "smolvlm": _reads("SmolVLM", {"model_type": "llama"}, {}, _TILES, scale_factor=2),
    "qwen2_vl": _reads("Qwen2VL", _MROPE, _QWEN_VISION, _TYPED, **_QWEN_TOKENS),
    "qwen2_5_vl": _reads(
        "Qwen2_5_VL", _MROPE, {**_QWEN_VISION, "window_size": 16, "fullatt_block_indexes": [1]},
        _TYPED, **_QWEN_TOKENS,
    ),
    "qwen3_vl": _reads(
        "Qwen3VL", _MROPE,
        {**_QWEN_VISION, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
        _TYPED, **_QWEN_TOKENS,
    ),
    "mllama": _reads(
        "Mllama", {"cross_attention_layers": [1]},
        {"attention_heads": 4, "num_global_layers": 1, "max_num_tiles": 1,
         "intermediate_layers_indices": [0], "vision_output_dim": 64,
         "supported_aspect_ratios": [[1, 1]]},
        {"input_ids": _tokens(1), "pixel_values": noise(2, 1, 1, 3, 16, 16),
         "aspect_ratio_ids": torch.ones(2, 1).long(), "aspect_ratio_mask": torch.ones(2, 1, 1),
         "cross_attention_mask": torch.ones(2, 7, 1, 1)},
    ),
    "blip": Row(
        "vlm", "BlipForConditionalGeneration",
        {"text_config": {**ENCODER, "encoder_hidden_size": 32, "projection_dim": 16},
         "vision_config": {**_TOWER, "projection_dim": 16}, "projection_dim": 16}, _BOTH_TOWERS,
    ),
}  # fmt: skip

_SOUND = {**ENCODER, "conv_dim": [8, 8], "conv_kernel": [10, 3], "conv_stride": [5, 2],
          "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4, "layerdrop": 0.0,
          "num_conv_pos_embedding_groups": 2, "apply_spec_augment": False}  # fmt: skip
_WAVE = {"input_values": noise(2, 400)}
_SPEAKER = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
    "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0, "vocab_size": 96, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
    "max_source_positions": 20, "max_target_positions": 20,
}  # fmt: skip

_SPEECH = {
    "whisper": Row(
        "speech", "WhisperForConditionalGeneration", {**_SPEAKER, "num_mel_bins": 8},
        {"input_features": noise(2, 8, 40), "decoder_input_ids": ids(2, 7)},
    ),
    "whisper_model": Row(
        "speech", "WhisperModel", {**_SPEAKER, "num_mel_bins": 8},
        {"input_features": noise(2, 8, 40), "decoder_input_ids": ids(2, 7)}, "last_hidden_state",
    ),
    "speech_to_text": Row(
        "speech", "Speech2TextForConditionalGeneration",
        {**_SPEAKER, "input_feat_per_channel": 8, "conv_channels": 16, "num_conv_layers": 2},
        {"input_features": noise(2, 40, 8), "decoder_input_ids": ids(2, 7)},
    ),
    "moonshine": Row(
        "speech", "MoonshineForConditionalGeneration",
        {**DECODER, "encoder_num_hidden_layers": 2, "decoder_num_hidden_layers": 2,
         "encoder_num_attention_heads": 4, "decoder_num_attention_heads": 4,
         "encoder_num_key_value_heads": 4, "decoder_num_key_value_heads": 4,
         "decoder_start_token_id": 1},
        {"input_values": noise(2, 4000), "decoder_input_ids": ids(2, 7)},
    ),
    "wav2vec2": Row("speech", "Wav2Vec2ForCTC", _SOUND, _WAVE),
    "hubert": Row("speech", "HubertForCTC", _SOUND, _WAVE),
    "wavlm": Row("speech", "WavLMForCTC", {**_SOUND, "num_buckets": 8}, _WAVE),
    "wav2vec2-bert": Row(
        "speech", "Wav2Vec2BertForCTC",
        {**ENCODER, "feature_projection_input_dim": 8, "apply_spec_augment": False,
         "layerdrop": 0.0, "left_max_position_embeddings": 4, "right_max_position_embeddings": 2,
         "conv_depthwise_kernel_size": 3},
        {"input_features": noise(2, 20, 8)},
    ),
    "audio-spectrogram": Row(
        "speech", "ASTForAudioClassification",
        {**_TOWER, "max_length": 20, "num_mel_bins": 8, "patch_size": 4,
         "frequency_stride": 4, "time_stride": 4},
        {"input_values": noise(2, 20, 8)},
    ),
    "musicgen": Row(
        "speech", "MusicgenForCausalLM",
        {**DECODER, "ffn_dim": 48, "num_codebooks": 2, "layerdrop": 0.0},
        {"input_ids": ids(4, 12), "encoder_hidden_states": noise(2, 5, 32)},
    ),
}  # fmt: skip

ROWS = {**_VISION, **_VISION_LANGUAGE, **_SPEECH}
