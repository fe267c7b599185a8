"""What makers of image models call the layers of their denoisers, and where diffusers has them.

Sources are diffusers' converters (0.42.1): `loaders/single_file_utils.py` for whole checkpoints,
`loaders/lora_conversion_utils.py` for LoRAs. tests/test_native.py sends every row through them.
"""

from __future__ import annotations

from hf_lora.formats.native_rows import (
    ADDED,
    GUIDANCE,
    POOLED,
    QKV,
    SHIFT_SCALE,
    TIME,
    Block,
    Rows,
)

FLUX: Rows = (
    Block("double_blocks.{}", "transformer_blocks.{}", {
        "img_attn.qkv": QKV,
        "img_attn.proj": "attn.to_out.0",
        "img_mlp.0": "ff.net.0.proj",
        "img_mlp.2": "ff.net.2",
        "img_mod.lin": "norm1.linear",
        "txt_attn.qkv": ADDED,
        "txt_attn.proj": "attn.to_add_out",
        "txt_mlp.0": "ff_context.net.0.proj",
        "txt_mlp.2": "ff_context.net.2",
        "txt_mod.lin": "norm1_context.linear",
    }),
    Block("single_blocks.{}", "single_transformer_blocks.{}", {
        "linear1": f"{QKV} proj_mlp",
        "linear2": "proj_out",
        "modulation.lin": "norm.linear",
    }),
    Block("distilled_guidance_layer.layers.{}", "distilled_guidance_layer.layers.{}", {  # Chroma
        "in_layer": "linear_1",
        "out_layer": "linear_2",
    }),
    Block("", "", {
        "img_in": "x_embedder",
        "txt_in": "context_embedder",
        "time_in.in_layer": f"{TIME}.linear_1",
        "time_in.out_layer": f"{TIME}.linear_2",
        "vector_in.in_layer": f"{POOLED}.linear_1",
        "vector_in.out_layer": f"{POOLED}.linear_2",
        "guidance_in.in_layer": f"{GUIDANCE}.linear_1",
        "guidance_in.out_layer": f"{GUIDANCE}.linear_2",
        "final_layer.adaLN_modulation.1": "norm_out.linear",
        "final_layer.linear": "proj_out",
    }, swapped=SHIFT_SCALE),
)  # fmt: skip

FLUX2: Rows = (
    Block("double_blocks.{}", "transformer_blocks.{}", {
        "img_attn.qkv": QKV,
        "img_attn.proj": "attn.to_out.0",
        "img_mlp.0": "ff.linear_in",
        "img_mlp.2": "ff.linear_out",
        "txt_attn.qkv": ADDED,
        "txt_attn.proj": "attn.to_add_out",
        "txt_mlp.0": "ff_context.linear_in",
        "txt_mlp.2": "ff_context.linear_out",
    }),
    Block("single_blocks.{}", "single_transformer_blocks.{}", {
        "linear1": "attn.to_qkv_mlp_proj",
        "linear2": "attn.to_out",
    }),
    Block("", "", {
        "img_in": "x_embedder",
        "txt_in": "context_embedder",
        "time_in.in_layer": "time_guidance_embed.timestep_embedder.linear_1",
        "time_in.out_layer": "time_guidance_embed.timestep_embedder.linear_2",
        "guidance_in.in_layer": "time_guidance_embed.guidance_embedder.linear_1",
        "guidance_in.out_layer": "time_guidance_embed.guidance_embedder.linear_2",
        "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
        "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
        "single_stream_modulation.lin": "single_stream_modulation.linear",
        # diffusers swaps these halves in a checkpoint and forgets to in a LoRA (0.42.1)
        "final_layer.adaLN_modulation.1": "norm_out.linear",
        "final_layer.linear": "proj_out",
    }, swapped=SHIFT_SCALE),
)  # fmt: skip

_FLUX3_BLOCK = {
    "q_proj": "attn.to_q",
    "k_proj": "attn.to_k",
    "v_proj": "attn.to_v",
    "attn_out": "attn.to_out.0",
    "mlp_in": "ff.linear_in",
    "mlp_out": "ff.linear_out",
}
FLUX3: Rows = (
    Block("content_mode_blocks.{}.{}", "mode_blocks.{}.{}", _FLUX3_BLOCK),
    Block("txt_mode_blocks.{}", "txt_mode_blocks.{}", _FLUX3_BLOCK),
    Block("single_blocks.{}", "single_transformer_blocks.{}", _FLUX3_BLOCK),
    Block("early_stream_modulations.{}", "early_stream_modulations.{}", {"lin": "linear"}),
    Block("single_stream_modulations.{}", "single_stream_modulations.{}", {"lin": "linear"}),
    Block("emb_in", "x_embedders", {"*": "*"}),
    Block("", "", {
        "txt_in": "context_embedder",
        "time_in.in_layer": "timestep_embedder.linear_1",
        "time_in.out_layer": "timestep_embedder.linear_2",
        "ref_time_in.in_layer": "target_timestep_embedder.linear_1",
        "ref_time_in.out_layer": "target_timestep_embedder.linear_2",
        "final_layer.image.linear": "proj_out",
        "final_layer.image.adaLN_modulation.1": "norm_out.linear",
    }, swapped=("final_layer.image.adaLN_modulation.1",)),
)  # fmt: skip

SD3: Rows = (
    Block("joint_blocks.{}", "transformer_blocks.{}", {
        "x_block.attn.qkv": QKV,
        "x_block.attn.proj": "attn.to_out.0",
        "x_block.attn2.qkv": "attn2.to_q attn2.to_k attn2.to_v",
        "x_block.attn2.proj": "attn2.to_out.0",
        "x_block.mlp.fc1": "ff.net.0.proj",
        "x_block.mlp.fc2": "ff.net.2",
        "x_block.adaLN_modulation.1": "norm1.linear",
        "context_block.attn.qkv": ADDED,
        "context_block.attn.proj": "attn.to_add_out",
        "context_block.mlp.fc1": "ff_context.net.0.proj",
        "context_block.mlp.fc2": "ff_context.net.2",
        "context_block.adaLN_modulation.1": "norm1_context.linear",
    }, halved=("context_block.adaLN_modulation.1",)),
    Block("", "", {
        "x_embedder.proj": "pos_embed.proj",
        "t_embedder.mlp.0": f"{TIME}.linear_1",
        "t_embedder.mlp.2": f"{TIME}.linear_2",
        "y_embedder.mlp.0": f"{POOLED}.linear_1",
        "y_embedder.mlp.2": f"{POOLED}.linear_2",
        "final_layer.adaLN_modulation.1": "norm_out.linear",
        "final_layer.linear": "proj_out",
    }, swapped=SHIFT_SCALE),
)  # fmt: skip

_LUMINA2_BLOCK = {
    "attention.qkv": QKV,
    "attention.out": "attn.to_out.0",
    "feed_forward.w1": "feed_forward.linear_1",
    "feed_forward.w2": "feed_forward.linear_2",
    "feed_forward.w3": "feed_forward.linear_3",
    "adaLN_modulation.1": "norm1.linear",
}
LUMINA2: Rows = (
    Block("layers.{}", "layers.{}", _LUMINA2_BLOCK),
    Block("noise_refiner.{}", "noise_refiner.{}", _LUMINA2_BLOCK),
    Block("context_refiner.{}", "context_refiner.{}", _LUMINA2_BLOCK),
    Block("", "", {
        "cap_embedder.1": "time_caption_embed.caption_embedder.1",
        "t_embedder.mlp.0": "time_caption_embed.timestep_embedder.linear_1",
        "t_embedder.mlp.2": "time_caption_embed.timestep_embedder.linear_2",
        "final_layer.adaLN_modulation.1": "norm_out.linear_1",
        "final_layer.linear": "norm_out.linear_2",
    }),
)  # fmt: skip

_NEXT_BLOCK = {
    "attention.qkv": "attention.to_q attention.to_k attention.to_v",
    "attention.out": "attention.to_out.0",
}
Z_IMAGE: Rows = (
    Block("layers.{}", "layers.{}", _NEXT_BLOCK),
    Block("noise_refiner.{}", "noise_refiner.{}", _NEXT_BLOCK),
    Block("context_refiner.{}", "context_refiner.{}", _NEXT_BLOCK),
    Block("", "", {
        "x_embedder": "all_x_embedder.2-1",  # of the one patch size that its makers have
        "final_layer.*": "all_final_layer.2-1.*",
    }),
)  # fmt: skip

IDEOGRAM4: Rows = (
    Block("layers.{}", "layers.{}", {
        "attention.qkv": "attention.to_q attention.to_k attention.to_v",
        "attention.o": "attention.to_out.0",
    }),
)  # fmt: skip

QWEN_IMAGE_21: Rows = (
    # one product in ComfyUI
    Block("transformer_blocks.{}", "transformer_blocks.{}", {
        "img_mlp.gate_up": "img_mlp.gate_layer img_mlp.proj",
    }),
)  # fmt: skip

_AURA_MLP = {"c_fc1": "linear_1", "c_fc2": "linear_2", "c_proj": "out_projection"}
AURAFLOW: Rows = (
    Block("double_layers.{}", "joint_transformer_blocks.{}", {
        "attn.w2q": "attn.to_q",
        "attn.w2k": "attn.to_k",
        "attn.w2v": "attn.to_v",
        "attn.w2o": "attn.to_out.0",
        "attn.w1q": "attn.add_q_proj",
        "attn.w1k": "attn.add_k_proj",
        "attn.w1v": "attn.add_v_proj",
        "attn.w1o": "attn.to_add_out",
        "modX.1": "norm1.linear",
        "modC.1": "norm1_context.linear",
    }),
    Block("double_layers.{}.mlpX", "joint_transformer_blocks.{}.ff", _AURA_MLP),
    Block("double_layers.{}.mlpC", "joint_transformer_blocks.{}.ff_context", _AURA_MLP),
    Block("single_layers.{}", "single_transformer_blocks.{}", {
        "attn.w1q": "attn.to_q",
        "attn.w1k": "attn.to_k",
        "attn.w1v": "attn.to_v",
        "attn.w1o": "attn.to_out.0",
        "modCX.1": "norm1.linear",
    }),
    Block("single_layers.{}.mlp", "single_transformer_blocks.{}.ff", _AURA_MLP),
    Block("", "", {
        "init_x_linear": "pos_embed.proj",
        "cond_seq_linear": "context_embedder",
        "t_embedder.mlp.0": "time_step_proj.linear_1",
        "t_embedder.mlp.2": "time_step_proj.linear_2",
        "modF.1": "norm_out.linear",
        "final_linear": "proj_out",
    }, swapped=("modF.1",)),
)  # fmt: skip

SANA: Rows = (
    Block("blocks.{}", "transformer_blocks.{}", {
        "attn.qkv": "attn1.to_q attn1.to_k attn1.to_v",
        "attn.proj": "attn1.to_out.0",
        "cross_attn.q_linear": "attn2.to_q",
        "cross_attn.kv_linear": "attn2.to_k attn2.to_v",
        "cross_attn.proj": "attn2.to_out.0",
        "mlp.inverted_conv.conv": "ff.conv_inverted",
        "mlp.depth_conv.conv": "ff.conv_depth",
        "mlp.point_conv.conv": "ff.conv_point",
    }),
    Block("", "", {
        "x_embedder.proj": "patch_embed.proj",
        "t_embedder.mlp.0": "time_embed.emb.timestep_embedder.linear_1",
        "t_embedder.mlp.2": "time_embed.emb.timestep_embedder.linear_2",
        "t_block.1": "time_embed.linear",
        "y_embedder.y_proj.fc1": "caption_projection.linear_1",
        "y_embedder.y_proj.fc2": "caption_projection.linear_2",
        "final_layer.linear": "proj_out",
    }),
)  # fmt: skip

_KREA2_BLOCK = {
    "attn.wq": "attn.to_q",
    "attn.wk": "attn.to_k",
    "attn.wv": "attn.to_v",
    "attn.wo": "attn.to_out.0",
    "attn.gate": "attn.to_gate",
    "mlp.gate": "ff.gate",
    "mlp.up": "ff.up",
    "mlp.down": "ff.down",
}
KREA2: Rows = (
    Block("blocks.{}", "transformer_blocks.{}", _KREA2_BLOCK),
    Block("txtfusion.layerwise_blocks.{}", "text_fusion.layerwise_blocks.{}", _KREA2_BLOCK),
    Block("txtfusion.refiner_blocks.{}", "text_fusion.refiner_blocks.{}", _KREA2_BLOCK),
    Block("", "", {
        "first": "img_in",
        "tmlp.0": "time_embed.linear_1",
        "tmlp.2": "time_embed.linear_2",
        "tproj.1": "time_mod_proj",
        "txtmlp.1": "txt_in.linear_1",
        "txtmlp.3": "txt_in.linear_2",
        "txtfusion.projector": "text_fusion.projector",
        "last.linear": "final_layer.linear",
    }),
)  # fmt: skip
