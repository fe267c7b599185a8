"""What makers of video and audio models call the layers of their denoisers, see `native_images`."""

from __future__ import annotations

from collections.abc import Mapping

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

_WAN_BLOCK = {
    "self_attn.q": "attn1.to_q",
    "self_attn.k": "attn1.to_k",
    "self_attn.v": "attn1.to_v",
    "self_attn.o": "attn1.to_out.0",
    "cross_attn.q": "attn2.to_q",
    "cross_attn.k": "attn2.to_k",
    "cross_attn.v": "attn2.to_v",
    "cross_attn.o": "attn2.to_out.0",
    "cross_attn.k_img": "attn2.add_k_proj",
    "cross_attn.v_img": "attn2.add_v_proj",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
}
WAN: Rows = (
    Block("blocks.{}", "blocks.{}", _WAN_BLOCK),
    Block("vace_blocks.{}", "vace_blocks.{}", {
        **_WAN_BLOCK,
        "before_proj": "proj_in",
        "after_proj": "proj_out",
    }),
    Block("face_adapter.fuser_blocks.{}", "face_adapter.{}", {  # WanAnimate, as the next
        "linear1_q": "to_q",
        "linear1_kv": "to_k to_v",
        "linear2": "to_out",
    }),
    Block("face_encoder", "face_encoder", {
        "conv1_local.conv": "conv1_local",
        "conv2.conv": "conv2",
        "conv3.conv": "conv3",
    }),
    Block("", "", {
        "text_embedding.0": "condition_embedder.text_embedder.linear_1",
        "text_embedding.2": "condition_embedder.text_embedder.linear_2",
        "time_embedding.0": "condition_embedder.time_embedder.linear_1",
        "time_embedding.2": "condition_embedder.time_embedder.linear_2",
        "time_projection.1": "condition_embedder.time_proj",
        "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
        "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
        "head.head": "proj_out",
    }),
)  # fmt: skip
WAN_ANIMATE_2: Rows = (
    Block("blocks.{}.block", "blocks.{}", {
        **{name: path.replace("attn1", "self_attn").replace("attn2", "cross_attn")
           for name, path in _WAN_BLOCK.items()},
        "ffn.0": "ffn.0",
        "ffn.2": "ffn.2",
    }),
)  # fmt: skip

HUNYUAN_VIDEO: Rows = (
    Block("double_blocks.{}", "transformer_blocks.{}", {
        "img_attn_qkv": QKV,
        "img_attn_proj": "attn.to_out.0",
        "img_mlp.fc1": "ff.net.0.proj",
        "img_mlp.fc2": "ff.net.2",
        "img_mod.linear": "norm1.linear",
        "txt_attn_qkv": ADDED,
        "txt_attn_proj": "attn.to_add_out",
        "txt_mlp.fc1": "ff_context.net.0.proj",
        "txt_mlp.fc2": "ff_context.net.2",
        "txt_mod.linear": "norm1_context.linear",
    }),
    Block("single_blocks.{}", "single_transformer_blocks.{}", {
        "linear1": f"{QKV} proj_mlp",
        "linear2": "proj_out",
        "modulation.linear": "norm.linear",
    }),
    Block("txt_in.individual_token_refiner.blocks.{}",
          "context_embedder.token_refiner.refiner_blocks.{}", {
        "self_attn_qkv": QKV,
        "self_attn_proj": "attn.to_out.0",
        "mlp.fc1": "ff.net.0.proj",
        "mlp.fc2": "ff.net.2",
        "adaLN_modulation.1": "norm_out.linear",
    }),
    Block("", "", {
        "img_in.proj": "x_embedder.proj",
        "time_in.mlp.0": f"{TIME}.linear_1",
        "time_in.mlp.2": f"{TIME}.linear_2",
        "vector_in.in_layer": f"{POOLED}.linear_1",
        "vector_in.out_layer": f"{POOLED}.linear_2",
        "guidance_in.mlp.0": f"{GUIDANCE}.linear_1",
        "guidance_in.mlp.2": f"{GUIDANCE}.linear_2",
        "txt_in.input_embedder": "context_embedder.proj_in",
        "txt_in.t_embedder.mlp.0": f"context_embedder.{TIME}.linear_1",
        "txt_in.t_embedder.mlp.2": f"context_embedder.{TIME}.linear_2",
        "txt_in.c_embedder.linear_1": f"context_embedder.{POOLED}.linear_1",
        "txt_in.c_embedder.linear_2": f"context_embedder.{POOLED}.linear_2",
        "final_layer.adaLN_modulation.1": "norm_out.linear",
        "final_layer.linear": "proj_out",
    }, swapped=SHIFT_SCALE),
)  # fmt: skip

# ComfyUI renames these layers when it loads a checkpoint (`HunyuanVideo` in supported_models.py of
# October 2025), mostly to what Flux calls its own; LoRAs come in both spellings.
_COMFY = {
    "_attn_qkv": "_attn.qkv",
    "_attn_proj": "_attn.proj",
    "mlp.fc1": "mlp.0",
    "mlp.fc2": "mlp.2",
    "_mod.linear": "_mod.lin",
    "modulation.linear": "modulation.lin",
    "_in.mlp.0": "_in.in_layer",
    "_in.mlp.2": "_in.out_layer",
    "t_embedder.mlp.0": "t_embedder.in_layer",
    "t_embedder.mlp.2": "t_embedder.out_layer",
    "c_embedder.linear_1": "c_embedder.in_layer",
    "c_embedder.linear_2": "c_embedder.out_layer",
}


def _respelt(block: Block, spelling: Mapping[str, str]) -> Block:
    """Returns a block's layers that are spelt otherwise, in the other spelling."""
    layers = {
        name.replace(old, new): path
        for name, path in block.layers.items()
        for old, new in spelling.items()
        if old in name
    }
    return Block(block.theirs, block.ours, layers)


HUNYUAN_VIDEO += tuple(_respelt(block, _COMFY) for block in HUNYUAN_VIDEO)

LTX: Rows = (
    Block("", "", {"patchify_proj": "proj_in", "adaln_single.*": "time_embed.*"}),
)  # fmt: skip

LTX2: Rows = (
    Block("", "", {
        "patchify_proj": "proj_in",
        "audio_patchify_proj": "audio_proj_in",
        "adaln_single.*": "time_embed.*",
        "audio_adaln_single.*": "audio_time_embed.*",
        "prompt_adaln_single.*": "prompt_adaln.*",
        "audio_prompt_adaln_single.*": "audio_prompt_adaln.*",
        "av_ca_video_scale_shift_adaln_single.*": "av_cross_attn_video_scale_shift.*",
        "av_ca_audio_scale_shift_adaln_single.*": "av_cross_attn_audio_scale_shift.*",
        "av_ca_a2v_gate_adaln_single.*": "av_cross_attn_video_a2v_gate.*",
        "av_ca_v2a_gate_adaln_single.*": "av_cross_attn_audio_v2a_gate.*",
    }),
)  # fmt: skip

COSMOS: Rows = (
    # 2.0, whose names stand first: who writes a file takes the first that a layer has
    Block("blocks.{}", "transformer_blocks.{}", {
        "self_attn.q_proj": "attn1.to_q",
        "self_attn.k_proj": "attn1.to_k",
        "self_attn.v_proj": "attn1.to_v",
        "self_attn.output_proj": "attn1.to_out.0",
        "cross_attn.q_proj": "attn2.to_q",
        "cross_attn.k_proj": "attn2.to_k",
        "cross_attn.v_proj": "attn2.to_v",
        "cross_attn.output_proj": "attn2.to_out.0",
        "mlp.layer1": "ff.net.0.proj",
        "mlp.layer2": "ff.net.2",
        "adaln_modulation_self_attn.1": "norm1.linear_1",
        "adaln_modulation_self_attn.2": "norm1.linear_2",
        "adaln_modulation_cross_attn.1": "norm2.linear_1",
        "adaln_modulation_cross_attn.2": "norm2.linear_2",
        "adaln_modulation_mlp.1": "norm3.linear_1",
        "adaln_modulation_mlp.2": "norm3.linear_2",
    }),
    # 1.0
    Block("blocks.block{}", "transformer_blocks.{}", {
        "blocks.0.block.attn.to_q.0": "attn1.to_q",
        "blocks.0.block.attn.to_k.0": "attn1.to_k",
        "blocks.0.block.attn.to_v.0": "attn1.to_v",
        "blocks.0.block.attn.to_out.0": "attn1.to_out.0",
        "blocks.0.adaLN_modulation.1": "norm1.linear_1",
        "blocks.0.adaLN_modulation.2": "norm1.linear_2",
        "blocks.1.block.attn.to_q.0": "attn2.to_q",
        "blocks.1.block.attn.to_k.0": "attn2.to_k",
        "blocks.1.block.attn.to_v.0": "attn2.to_v",
        "blocks.1.block.attn.to_out.0": "attn2.to_out.0",
        "blocks.1.adaLN_modulation.1": "norm2.linear_1",
        "blocks.1.adaLN_modulation.2": "norm2.linear_2",
        "blocks.2.block.layer1": "ff.net.0.proj",
        "blocks.2.block.layer2": "ff.net.2",
        "blocks.2.adaLN_modulation.1": "norm3.linear_1",
        "blocks.2.adaLN_modulation.2": "norm3.linear_2",
    }),
    Block("", "", {
        "x_embedder.proj.1": "patch_embed.proj",
        "t_embedder.1.*": "time_embed.t_embedder.*",
        "final_layer.adaln_modulation.1": "norm_out.linear_1",
        "final_layer.adaln_modulation.2": "norm_out.linear_2",
        "final_layer.adaLN_modulation.1": "norm_out.linear_1",
        "final_layer.adaLN_modulation.2": "norm_out.linear_2",
        "final_layer.linear": "proj_out",
    }),
)  # fmt: skip

MOCHI: Rows = (
    Block("blocks.{}", "transformer_blocks.{}", {
        "attn.qkv_x": "attn1.to_q attn1.to_k attn1.to_v",
        "attn.proj_x": "attn1.to_out.0",
        "attn.qkv_y": "attn1.add_q_proj attn1.add_k_proj attn1.add_v_proj",
        "attn.proj_y": "attn1.to_add_out",
        "mod_x": "norm1.linear",
        "mod_y": "norm1_context.linear",
        "mlp_x.w1": "ff.net.0.proj",
        "mlp_x.w2": "ff.net.2",
        "mlp_y.w1": "ff_context.net.0.proj",
        "mlp_y.w2": "ff_context.net.2",
    }, swapped=("mlp_x.w1", "mlp_y.w1")),  # the gate comes last on the host
    Block("blocks.{}", "transformer_blocks.{}", {"mod_y": "norm1_context.linear_1"}),  # the last
    Block("", "", {
        "x_embedder.proj": "patch_embed.proj",
        "t_embedder.mlp.0": "time_embed.timestep_embedder.linear_1",
        "t_embedder.mlp.2": "time_embed.timestep_embedder.linear_2",
        "t5_y_embedder.*": "time_embed.pooler.*",
        "t5_yproj": "time_embed.caption_proj",
        "final_layer.mod": "norm_out.linear",
        "final_layer.linear": "proj_out",
    }, swapped=("final_layer.mod",)),
)  # fmt: skip

_MINIMAX_BLOCK = {
    # in the order of the published single files; DiffSynth's LoRAs have it head by head
    "attn.qkv_proj": QKV,
    "attn.out_proj": "attn.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
    "adaln_proj.linear": "adaln_proj.linear",
}
MINIMAX_H3: Rows = (
    Block("blocks.{}", "transformer_blocks.{}", _MINIMAX_BLOCK, swapped=("mlp.fc1",)),
    Block("token_refiner.blocks.{}", "token_refiner.refiner_blocks.{}", _MINIMAX_BLOCK,
          swapped=("mlp.fc1",)),
    Block("", "", {
        "video_patch_proj": "proj_in",
        "audio_patch_proj": "audio_proj_in",
        "condition_proj": "context_embedder",
        "time_embedder.proj_in": "time_embedder.linear_1",
        "time_embedder.proj_out": "time_embedder.linear_2",
        "final_layer.adaln_proj.linear": "norm_out.linear",
        "final_layer.video_out": "proj_out",
        "final_layer.audio_out": "audio_proj_out",
    }),
)  # fmt: skip

_ACE_ATTENTION = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "o_proj": "to_out.0"}
ACE_STEP: Rows = (
    Block("layers.{}.self_attn", "layers.{}.self_attn", _ACE_ATTENTION),
    Block("layers.{}.cross_attn", "layers.{}.cross_attn", _ACE_ATTENTION),
)  # fmt: skip
