"""What the scan changes or leaves out, and why: overrides, unbuilt classes, reviewed exceptions."""

from __future__ import annotations

from typing import Any

from transformers import ResNetConfig

QWEN4_EXP = {
    "ple_layer_ids": [1],
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 256,
    "eos_token_id": 1,
    "indexer_budget": 2048,
    "indexer_compress_ratio": 16,
}
NO_TIMM = {
    "use_timm_backbone": False,
    "use_pretrained_backbone": False,
    "backbone": None,
    "backbone_config": ResNetConfig(out_features=["stage4"]),
}
NO_TIMM_4 = {**NO_TIMM, "backbone_config": ResNetConfig(out_indices=[2, 3, 4])}
COMPASS = {
    "num_hidden_layers": 4,
    "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}},
}
HORIZON = {"prediction_length": 24}

# Default configs that cannot build their own model, by class or model type.
OVERRIDES: dict[str, dict[str, Any]] = {
    "aya_vision": {"vision_config": {"model_type": "siglip_vision_model"}},
    "autoformer": HORIZON,
    "chameleon": {"vocabulary_map": {"<image>": 8711}},
    "conditional_detr": NO_TIMM,
    "convnext": {"depths": [3, 3, 9, 3], "hidden_sizes": [96, 192, 384, 768]},
    "convnextv2": {"depths": [3, 3, 9, 3], "hidden_sizes": [96, 192, 384, 768]},
    "dab-detr": NO_TIMM,
    "deformable_detr": NO_TIMM_4,
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense"] + ["sparse"] * 63}},
    "detr": NO_TIMM,
    "diffusion_gemma": {
        "text_config": {"num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 704}
    },
    "emu3": {"vocabulary_map": {"<image>": 151851, "<|extra_200|>": 151846}},
    "esm": {"vocab_size": 33, "pad_token_id": 1},
    "focalnet": {"depths": [2, 2, 6, 2], "hidden_sizes": [192, 384, 768, 768]},
    "granite4_vision": {"deepstack_layer_map": [(5, 3), (11, 6)], "downsample_rate": "4/8"},
    "hiera": {"decoder_hidden_size": 512, "decoder_depth": 8, "decoder_num_heads": 16},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "hunyuan_vl": {"text_config": {"head_dim": 128}},
    "hunyuan_vl_text": {"head_dim": 128},
    "informer": HORIZON,
    "moonshine_streaming": {"num_key_value_heads": 8},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 48},
    "omdet-turbo": {**NO_TIMM, "backbone_config": ResNetConfig(out_indices=[2, 3, 4])},
    "perception_lm": {"vision_config": {"model_args": {"embed_dim": 1024}}},
    "qwen3_omni_moe": {"enable_audio_output": False},
    "qwen4_exp": {"text_config": QWEN4_EXP},
    "sapiens2": {"head_config": {"upsample_out_channels": [768, 768], "conv_out_channels": [64]}},
    "t5gemma2_encoder": {"text_config": {"dropout_rate": 0.0}},
    "table-transformer": NO_TIMM,
    "time_series_transformer": HORIZON,
    "vitmatte": {"fusion_hidden_sizes": [256, 128, 64, 32]},
    "wav2vec2-bert": {"vocab_size": 32},
    "wav2vec2-conformer": {"vocab_size": 32},
    "BeitForSemanticSegmentation": {"out_indices": [3, 5, 7, 11]},
    "CohereCompassForCausalLM": COMPASS,
    "cohere_compass_text": COMPASS,
    "cohere_compass": {"text_config": COMPASS},
    "DbrxForCausalLM": {"attn_config": {"rope_theta": 1e4}},
    "Dots1ForCausalLM": {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "Lfm2MoeForCausalLM": {"layer_types": ["conv", "full_attention"] * 16},
    "DetrForSegmentation": {**NO_TIMM, "backbone_config": ResNetConfig(out_indices=[1, 2, 3, 4])},
    "PerceiverForImageClassificationConvProcessing": {"num_cross_attention_heads": 1},
    "PerceiverForImageClassificationFourier": {"num_cross_attention_heads": 1},
    "T5GemmaEncoderModel": {"is_encoder_decoder": False},
    "HiDreamImageTransformer2DModel": {
        "patch_size": 2,
        "caption_channels": [4096, 4096],
        "llama_layers": list(range(48)),
        "out_channels": 16,
        "in_channels": 16,
        "axes_dims_rope": (64, 32, 32),
    },
    "ZImageControlNetModel": {
        "control_layers_places": [0, 6, 12, 18, 24],
        "control_refiner_layers_places": [0, 1],
        "control_in_dim": 33,
        "add_control_noise_refiner": "control_noise_refiner",
    },
    "Qwen4ExpForCausalLM": QWEN4_EXP,
    "ReformerForMaskedLM": {"is_decoder": False},
    "ReformerModelWithLMHead": {"is_decoder": True},
}

# Denoisers of diffusers that lack `PeftAdapterMixin`; an adapter attaches to them all the same.
WITHOUT_MIXIN = (
    *("AllegroTransformer3DModel", "AudioLDM2UNet2DConditionModel"),
    *("CogView3PlusTransformer2DModel", "DiTTransformer2DModel", "JoyImageEditTransformer3DModel"),
    *("JoyImageEditPlusTransformer3DModel", "PRXTransformer2DModel", "PixArtTransformer2DModel"),
    *("UNet2DModel", "UNet3DConditionModel", "UNetControlNetXSModel"),
    "UNetSpatioTemporalConditionModel",
)

# Classes that are not tried, with the cause.
NOT_BUILT = {
    **dict.fromkeys(("DinatBackbone", "DinatForImageClassification", "DinatModel"), "needs natten"),
    **dict.fromkeys(
        (
            "LayoutLMv2ForQuestionAnswering",
            "LayoutLMv2ForSequenceClassification",
            "LayoutLMv2ForTokenClassification",
        ),
        "needs detectron2",
    ),
    **dict.fromkeys(
        ("TimmBackbone", "TimmWrapperForImageClassification", "TimmWrapperModel"),
        "wraps any model of timm, which brings its own names",
    ),
    **dict.fromkeys(
        ("Gemma4AssistantForCausalLM", "Gemma4UnifiedAssistantForCausalLM"),
        "drafts for another model, whose caches it reads; its config cannot stand alone",
    ),
    "HiggsAudioV2TokenizerModel": "needs torchaudio",
    **dict.fromkeys(
        ("PPOCRV5ServerDetForObjectDetection", "PPOCRV6MediumDetForObjectDetection"),
        "made of convolutions, and the default config leaves their sizes out",
    ),
    "VoxtralRealtimeTextModel": "named by the auto class, but transformers does not export it",
    "QwenImageMultiControlNetModel": "holds a list of QwenImageControlNetModel",
}

# Linears inside blocks that have no role, reviewed: class -> pattern -> why.
_TRIANGLE = "triangle update of pairs of residues: neither attention nor MLP; name it to target it"
EXCEPTIONS: dict[str, dict[str, str]] = {
    "RFD4ProteinaTransformer": {
        f"pair_update_layers.*.tri_mult_{side}.linear_{part}": _TRIANGLE
        for side in ("in", "out")
        for part in ("a_g", "a_p", "b_g", "b_p", "g", "z")
    },
}

# Classes without a default target, and why: start of the class name -> reason.
_CONVOLUTIONS = "made of convolutions; name some to target them"
NO_TARGET: dict[str, str] = {
    **dict.fromkeys(
        (
            *("Bit", "Dac", "EfficientNet", "Encodec", "GlmImageVQVAE", "HGNetV2", "MobileNetV1"),
            *("MobileNetV2", "PoolFormer", "PPLCNet", "PPOCRV5MobileDet", "PPOCRV6SmallDet"),
            *("PPOCRV6TinyRec", "RegNet", "ResNet", "RTDetrResNet", "SLANet", "SuperPoint"),
            *("TextNet", "UnivNet", "UperNet", "UVDoc"),
        ),
        _CONVOLUTIONS,
    ),
    "EdgeTamVisionModel": "its layers are those of a timm tower",
    "IBert": "integer layers of its own (QuantLinear), which peft does not know",
    "MobileViTV2": "attention and MLP are 1x1 convolutions; name some to target them",
    "SqueezeBert": "every projection is a grouped 1x1 convolution; a request by role reaches them",
}
