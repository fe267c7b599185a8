"""The lexicon: role -> the names that libraries give to that part, each a dotted suffix of a path.

How an alias is matched, and what the words mean, is in `hf_lora.roles`. A leaf that means different
things (`out_proj`, `dense`, `c_proj`, `output`, `proj`) is listed only with the parent that settles
it. What is right for one family only is a row of `hf_lora.families`.

The names are those of transformers 5.23.0 and diffusers 0.42.1, on every model type that
`tests/scan.py` can build.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

__all__ = ["ROLES"]

_CROSS_PARENTS = (
    "EncDecAttention",  # t5
    "encoder_attn",  # bart
    "encoder_attn_text",  # grounding_dino
    "cross_attn",  # mllama, t5gemma, prophetnet
    "cross_attn_layers",  # blt
    "cross_attn_image", "text_cross_attn", "vision_cross_attn",  # sam3
    "cross_attn_image_to_token", "cross_attn_token_to_image",  # sam
    "cross_attention",  # nllb_moe, seamless_m4t
    "cross_attention.attention",  # efficientloftr
    "crossattention",  # gpt2
    "crossattention.self",  # bert
    "crossattention.attention",  # blip-2 style Q-Formers
    "cross_attention.attention.self",  # perceiver
    "encoder_decoder_attention.attention",  # pix2struct
    "visual_attention.att",  # lxmert
    "downsample.assign", "pre_assign_attn.attn",  # groupvit: group tokens read image tokens
    "sequence_compressor_resampler.layers",  # evolla: latents read the protein
    "attn2",  # diffusers: the second attention of a block reads the condition
    "audio_attn2", "audio_to_video_attn", "video_to_audio_attn",  # ltx2
    "av_cross_attention", "va_cross_attention",  # kandinsky6
    "face_adapter",  # wan_animate
)  # fmt: skip

_ATTENTION: dict[str, tuple[str, ...]] = {
    "attn.q": (
        "q_proj", "query", "q", "wq", "Wq", "query_proj", "q_lin", "q_head", "to_q", "project_q",
        "q_proj.linear",  # moshi
        "linear_q", "to_query", "projection_query", "layout_query", "queries.linear",
        "q_content_proj", "self_attn_query_content_proj",  # conditional_detr, dab_detr
        "query_global",  # longformer, led: the global-attention copy of the query
        "e2e_query", "e2w_query", "w2e_query",  # luke: word/entity pairs
    ),
    "attn.k": (
        "k_proj", "key", "k", "wk", "Wk", "key_proj", "k_lin", "k_head", "to_k", "project_k",
        "k_proj.linear", "key_global", "linear_k", "to_key", "projection_key", "layout_key",
        "k_content_proj", "self_attn_key_content_proj",
    ),
    "attn.v": (
        "v_proj", "value", "v", "wv", "Wv", "value_proj", "v_lin", "v_head", "to_v", "project_v",
        "v_proj.linear", "value_global", "linear_v", "to_value", "projection_value", "layout_value",
        "self_attn_value_proj",
        "v_proj_current", "v_proj_delayed",  # zaya: halves of v, of this token and the one before
    ),
    "attn.qkv": (
        "query_key_value", "qkv_proj", "Wqkv", "wqkv", "qkv", "to_qkv", "att_proj", "img_qkv_proj",
        "img_attn_qkv",
        "attn.c_attn",  # gpt2
        "self.in_proj",  # deberta (v1)
        "queries_keys_values.linear",  # levit
    ),
    "attn.kv": ("kv_proj", "to_kv", "attn.kv", "keys_values.linear", "txt_kv_proj"),
    "attn.qk": ("query_key",),  # reformer's LSH attention shares one projection
    "attn.o": (
        "o_proj", "o_proj.linear", "out_lin", "attention_out", "to_out",
        "self_attn.out_proj", "attn.out_proj", "attention.out_proj", "message_attn.out_proj",
        "attention.output.dense", "attention.dense", "attn.dense", "self_attn.dense",
        "self_attention.dense", "self_attention.output.dense", "multi_head_attention.dense",
        "temporal_attention.output.dense", "temporal_dense",  # timesformer
        "lang_self_att.output.dense", "visn_self_att.output.dense",  # lxmert
        "attention.layout_output.dense",  # lilt
        "attn.c_proj", "attn.proj", "attn.Wo", "attn.o", "SelfAttention.o", "LocalSelfAttention.o",
        "TransientGlobalSelfAttention.o", "attention.wo", "attention.output", "self_attn.output",
        "attention.post_proj", "attention.proj", "self_attn.output_proj",
        # of vision and audio models
        "self_attn.projection", "self_attn.projection_layer", "attention.projection_layer",
        "self_attn.linear_out", "channel_attn.proj", "window_attn.proj", "attention.post",
        "self_attn.post.linear", "mel_attn_blocks.out_proj", "projection.linear", "attn.final",
        # of diffusion models
        "self_attention.out_layer", "attn.out_layer", "img_attn_proj",
    ),
    "attn.gate": (
        "self_attn.gate_proj", "self_attn.g_proj", "self_attn.output_gate", "q_gate_proj",
        "g_a_proj", "g_b_proj",  # kimi_linear: low-rank pair
        "output_projection.gate_proj",  # neomme
        "compressor.gate_proj",  # deepseek_v4: pools keys and values
        "attention.receptance",  # rwkv
        "attn.to_gate", "mha.to_g",  # krea2, rfd4_proteina
    ),
    "attn.q_a": ("q_a_proj",),
    "attn.q_b": ("q_b_proj",),
    "attn.kv_a": ("kv_a_proj_with_mqa", "kv_a_proj"),
    "attn.kv_b": ("kv_b_proj",),
    "attn.o_a": ("o_a_proj",),
    "attn.o_b": ("o_b_proj",),
    # joint attention of diffusion transformers: the text stream
    "attn.add_q": ("add_q_proj", "to_q_t"),
    "attn.add_k": ("add_k_proj", "to_k_t"),
    "attn.add_v": ("add_v_proj", "to_v_t"),
    "attn.add_qkv": ("to_added_qkv", "txt_attn_qkv"),  # after fuse_qkv_projections()
    "attn.add_o": ("to_add_out", "to_out_t", "txt_attn_proj"),
    # single-stream blocks: attention and MLP share their projections
    "attn.qkv_mlp": ("to_qkv_mlp_proj",),
    "attn.o_mlp": ("single_transformer_blocks.proj_out",),
}  # fmt: skip

_CROSS_ONLY: dict[str, tuple[str, ...]] = {
    "cross_attn.q": (
        "crossattention.q_attn",  # gpt2
        "fusion_layer.attn.vision_proj", "cross_attn_query_content_proj", "layers.adapter.query",
    ),
    "cross_attn.k": (
        "layers.adapter.key_protein", "fusion_layer.attn.text_proj", "cross_attn_key_content_proj",
    ),
    "cross_attn.v": (
        "cross_attn_value_proj",
        "layers.adapter.value_protein",  # evolla
        "attn.values_vision_proj", "attn.values_text_proj",  # grounding_dino: both directions
    ),
    "cross_attn.kv": ("crossattention.c_attn",),  # gpt2: q has its own layer here
    "cross_attn.o": (
        "crossattention.output.dense", "cross_attention.attention.output.dense",
        "crossattention.c_proj", "encoder_attn.output", "EncDecAttention.o",
        "encoder_decoder_attention.attention.output", "visual_attention.output.dense",
        "layers.adapter.out_proj", "downsample.assign.proj", "cross_attn.proj",
        "attn.out_vision_proj", "attn.out_text_proj",
        "cross_attention.out_layer", "av_cross_attention.out_layer", "va_cross_attention.out_layer",
    ),
    "cross_attn.add_k": ("attn2.add_k_proj", "cross_attn.add_k_proj"),  # wan: image condition
    "cross_attn.add_v": ("attn2.add_v_proj", "cross_attn.add_v_proj"),
    "cross_attn.add_kv": ("attn2.to_added_kv", "cross_attn.to_added_kv"),  # both, joined
}  # fmt: skip

_MIXERS: dict[str, tuple[str, ...]] = {
    "linear_attn.q": ("linear_attn.q_proj", "mlstm_layer.q"),
    "linear_attn.k": ("linear_attn.k_proj", "mlstm_layer.k"),
    "linear_attn.v": ("linear_attn.v_proj", "mlstm_layer.v"),
    "linear_attn.qkv": ("in_proj_qkv", "in_proj_qkvz"),
    "linear_attn.o": ("linear_attn.out_proj", "linear_attn.o_proj", "mlstm_layer.out_proj"),
    "linear_attn.gate": ("in_proj_z", "linear_attn.g_proj", "ogate_preact"),
    "linear_attn.decay": (
        "in_proj_ba", "in_proj_a", "in_proj_b", "linear_attn.a_proj", "linear_attn.b_proj",
        "self_attn.b_proj", "f_proj", "f_a_proj", "f_b_proj",  # kimi_linear, bailing_hybrid
        "igate_preact", "fgate_preact",  # xlstm
    ),
    "ssm.in": ("mixer.in_proj", "mamba.in_proj", "temporal_block.linear_x"),
    "ssm.gate": ("temporal_block.linear_y",),  # recurrent_gemma
    "ssm.x": ("x_proj",),
    "ssm.dt": ("mixer.dt_proj", "mamba.dt_proj"),
    "ssm.out": ("mixer.out_proj", "mamba.out_proj", "temporal_block.linear_out"),
    "conv.in": (
        "conv.in_proj", "linear_start", "linear_start.linear", "conv.pointwise_lin1",
        "conv_out_layer",  # convbert
        "modulation.projection_in",  # focalnet: focal modulation stands in for attention
    ),
    "conv.out": (
        "conv.out_proj", "linear_end", "linear_end.linear", "conv.pointwise_lin2",
        "modulation.projection_out",
    ),
    "conv.kernel": ("conv_kernel_layer", "k_sconv.weight_proj", "v_sconv.weight_proj"),
}  # fmt: skip

_MLP: dict[str, tuple[str, ...]] = {
    "mlp.gate": (
        "gate_proj", "gate_proj.linear", "wi_0", "feed_forward.w1", "ffn.w1", "ff_t.w1", "w_in.w_0",
        "proj_up_gate", "ff.gate", "ff.linear_1", "ff_context.linear_1", "feed_forward.linear_1",
        "img_mlp.gate_layer",
        "feed_forward.receptance",  # rwkv: sigmoid gate of the channel mix
        "gating_block.attn_layer",  # patchtsmixer: softmax gate on the features
    ),
    "mlp.up": (
        "up_proj", "up_proj.linear", "wi_1", "feed_forward.w3", "ffn.w3", "ff_t.w3", "w_in.w_1",
        "proj_up",
        "fc1", "fc_in", "lin1", "linear1", "linear_fc1", "intermediate_dense", "ffw_layer_1",
        "ffw_layer_1.linear", "mlp.c_fc", "dense_h_to_4h", "mlp.dense1", "mlp.wi", "mlp.proj_in",
        "mlp.in_proj", "mlp.linear_1", "mlp.layers.0", "mlp.0", "ffn.0", "ff.0", "linear_up.linear",
        "DenseReluDense.wi", "intermediate.dense", "intermediate_query.dense",
        "lang_inter.dense", "visn_inter.dense", "layout_intermediate.dense",
        "feed_forward.dense.dense", "feed_forward.intermediate", "feed_forward.key",
        "ff.layer_1", "ffn.linear_1", "albert_layers.ffn",
        "pwconv1", "pointwise_conv1", "deepstack_mergers.linear_1", "projector.readout.0",
        # of diffusion models; net.0 is a gate_up pair where a family row says so
        "net.0.proj", "proj_mlp", "ff.up", "ff.linear_2", "ff_context.linear_2",
        "feed_forward.linear_3", "feed_forward.in_layer", "img_mlp.proj", "channelwise_linear_1",
        "transition_out.linear_1",
    ),
    "mlp.down": (
        "down_proj", "down_proj.linear", "feed_forward.w2", "ffn.w2", "ff_t.w2", "ffn.w_out",
        "proj_down",
        "fc2", "fc_out", "lin2", "linear2", "linear_fc2", "output_dense", "ffw_layer_2",
        "ffw_layer_2.linear", "mlp.c_proj", "dense_4h_to_h", "mlp.dense2", "mlp.wo", "mlp.Wo",
        "mlp.proj_out", "mlp.out_proj", "mlp.linear_2", "mlp.layers.1", "mlp.2", "ffn.2", "ff.3",
        "linear_down.linear", "DenseReluDense.wo", "output.dense", "output_query.dense",
        "lang_output.dense", "visn_output.dense", "layout_output.dense",
        "feed_forward.output", "feed_forward.value",
        "ff.layer_2", "ffn.linear_2", "ffn_output", "weights_out",
        "pwconv2", "pointwise_conv2", "deepstack_mergers.linear_2", "projector.readout.2",
        "aligner.hidden_layers", "generation_aligner.hidden_layers",  # janus
        "net.2", "ff.down", "ff.out_projection", "ff_context.out_projection", "ff.linear_out",
        "ff_context.linear_out", "feed_forward.linear_2", "feed_forward.out_layer", "img_mlp.out",
        "channelwise_linear_2", "transition_out.linear_2", "transition.linear_out",
    ),
    "mlp.gate_up": (
        "gate_up_proj", "mlp.Wi", "fc1.proj", "ff.linear_in", "ff_context.linear_in",
        "swish_linear", "weights_in",  # last: dinov2 with use_swiglu_ffn
    ),
    # mobilebert around a block, muse_spark around all experts
    "block.in": ("bottleneck.input.dense", "bottleneck.attention.dense", "pre_expert_proj"),
    "block.out": ("output.bottleneck.dense", "post_expert_proj"),
    "moe.experts.gate": ("experts.gate_proj", "experts.w1"),
    "moe.experts.up": ("experts.up_proj", "experts.w3", "experts.fc1", "experts.wi"),
    "moe.experts.down": ("experts.down_proj", "experts.w2", "experts.fc2", "experts.wo"),
    "moe.experts.gate_up": ("experts.gate_up_proj",),
    "moe.shared.gate": (
        "shared_expert.gate_proj", "shared_experts.gate_proj", "shared_mlp.gate_proj",
        "shared_experts.w1",
    ),
    "moe.shared.up": (
        "shared_expert.up_proj", "shared_experts.up_proj", "shared_mlp.up_proj",
        "shared_experts.w3",
    ),
    "moe.shared.down": (
        "shared_expert.down_proj", "shared_experts.down_proj", "shared_mlp.down_proj",
        "shared_mlp.output_linear",  # granitemoehybrid
        "shared_expert.net.2", "shared_experts.w2",
    ),
    "moe.shared.gate_up": (
        "shared_expert.gate_up_proj", "shared_experts.gate_up_proj", "shared_mlp.gate_up_proj",
        "shared_mlp.input_linear", "shared_expert.net.0.proj",
    ),
}  # fmt: skip

_UNTARGETED: dict[str, tuple[str, ...]] = {
    "moe.router": (
        "router", "mlp.gate", "block_sparse_moe.gate", "feed_forward.gate", "router.gate",
        "router.classifier", "router.layer", "router.proj", "router_gate", "gate.down_proj",
        "router_mlp.fc1", "router_mlp.fc2", "router_mlp.out_proj",  # zaya
        "gate.wg",  # hunyuan_v1_moe
        "img_mlp.gate",  # nucleusmoe_image
    ),
    "moe.shared_gate": ("shared_expert_gate",),
    "indexer": (
        "indexer.wq_b", "indexer.wk", "indexer.weights_proj", "scorer.weights_proj",
        "indexer.q_b_proj", "indexer.kv_proj", "indexer.gate_proj", "index_qk_proj",
    ),
    "position": (
        "relative_pos_embeddings", "relative_attention_bias", "pos_proj", "pos_q_proj",
        "pos_key_proj", "pos_query_proj", "linear_pos", "relative_k_proj",
        "self_attn.r_proj", "sink_proj",  # inkling: relative term, attention sink
        "self_attn.dt_proj",  # doge: dynamic mask
        "continuous_position_bias_mlp", "gru_rel_pos_linear", "mha.to_bias",
        "keypoint_encoder.encoder", "keypoint_encoder.encoder.linear",  # superglue
        "query_pos_head.layers", "ref_point_head.layers", "reference_points_head.layers",  # detr
        "query_position_head.layers", "query_scale.layers", "ref_anchor_head.layers",
        "q_pos_proj", "k_pos_proj", "q_pos_sine_proj",  # conditional_detr
        "self_attn_query_pos_proj", "self_attn_key_pos_proj", "cross_attn_query_pos_proj",
        "cross_attn_key_pos_proj", "cross_attn_query_pos_sine_proj",  # dab_detr
    ),
    "sampling": (  # deformable attention
        "encoder_attn.attention_weights", "encoder_attn.sampling_offsets",
        "cross_attn.attention_weights", "cross_attn.sampling_offsets",
        "self_attn.attention_weights", "self_attn.sampling_offsets",
    ),
    "norm": ("input_layernorm.mlp.fc1", "input_layernorm.mlp.fc2",  # axk2: a gated norm
             "post_attention_layernorm.mlp.fc1", "post_attention_layernorm.mlp.fc2"),
    "modulation": (
        "norm.linear", "norm1.linear", "norm2.linear", "norm3.linear", "norm1_context.linear",
        "norm_out.linear", "attn_norm.linear", "norm1.linear_1", "norm1.linear_2", "norm2.linear_1",
        "norm2.linear_2", "norm3.linear_1", "norm3.linear_2", "norm1_context.linear_1",
        "ada_rms_norm.linear1", "ada_rms_norm.linear2",  # voxtral_realtime
        "img_mod", "txt_mod", "modulation", "modulation.lin", "adaLN_modulation",
        "adaln_modulation", "adaln_proj",
        "adaln_proj.linear", "adaln.to_gamma", "adaln.to_beta", "scale_output",
        "visual_modulation.out_layer", "text_modulation.out_layer", "av_modulation.out_layer",
        "va_modulation.out_layer", "cond_embeds_mapper", "distilled_guidance_layer.layers.linear_1",
        "distilled_guidance_layer.layers.linear_2", "diffusion_head.layers.linear",
    ),
    "time": (
        "time_emb_proj", "timestep_embedder.linear_1",
        "timestep_embedder.linear_2", "time_pos_embed.linear_1", "time_pos_embed.linear_2",
        "time_mlp", "time_embedding", "time_projection", "t_embedder.mlp.0",
        "t_embedder.mlp.2", "timestep_embeddings.fc1", "timestep_embeddings.fc2",
        "transition_c_1.swish_linear", "transition_c_2.swish_linear",  # rfd4_proteina
    ),
    "proj": (
        "proj_in", "attentions.proj_out", "motion_modules.proj_out", "vace_blocks.proj_out",
        "controlnet_blocks", "controlnet_single_blocks", "kv_mapper", "encoder_proj",
        "blocks.proj", "layers.proj", "downsample.reduction",  # between stages of other widths
        "readout_projects", "readout_projects.layers", "message_fc", "linear_x",
        "out_linear", "before_proj", "after_proj", "encoder_vision_features", "encoder.fc",
        "multi_modal_projector.linear_1", "vision_projection",
        "text_projection", "visual_projection", "object_pointer_proj.layers",
    ),
    "residual": (
        "modality_router", "prediction_coefs", "correction_coefs", "altup_projections",
        "altup_unembed_projections", "laurel.linear_left", "laurel.linear_right",  # gemma3n
        "input_mix_weight_down", "input_mix_weight_up", "block_inject_weight",  # qwen4_exp
        "gateway.gate",  # d_fine: mixes the two attentions of a layer
    ),
    "adapter": (
        "gate_up_proj_adapter_list", "linear_q_adapter_list", "linear_k_adapter_list",
        "linear_v_adapter_list",  # zamba2
        "en_XX.dense1", "en_XX.dense2",  # xmod
    ),
    "embed": (
        "embed_tokens", "wte", "wpe", "shared", "word_embeddings", "position_embeddings",
        "token_type_embeddings", "embeddings_project", "embedding_hidden_mapping_in",
        "per_layer_input_gate", "per_layer_projection", "per_layer_model_projection",  # gemma3n
        "ple.key_proj", "ple.value_proj",  # qwen4_exp: n-gram embeddings
        "patch_embedder.proj", "vision_tower.encoder_layers.projection", "prenet.layers",
        "patch_embedding.linear", "patch_embedder.patch_embedding", "task_mlp.layers",
        "text_embedding", "img_emb.proj", "cap_embedder", "caption_embedder", "caption_projection",
        "caption_projection.linear", "pair_repr_builder.adaln.to_gamma",
    ),
    "lm_head": (
        "lm_head", "lm_heads", "lm_head.dense", "lm_head.decoder", "lm_head.out_proj", "embed_out",
        "output_projection", "pred_layer.proj", "predictions.decoder", "predictions.dense",
        "predictions.transform.dense", "generator_lm_head", "generator_predictions.dense",
        "vocab_projector", "vocab_transform", "proj_out",
    ),
    "head": (
        "score", "classifier", "qa_outputs", "pooler", "pooler.dense", "answer_head.logit_fc",
        # of detectors and segmenters
        "bbox_embed.layers", "enc_out_bbox_embed.layers", "encoder_output_bbox_embed.layers",
        "bbox_predictor.layers", "enc_bbox_head.layers", "pre_bbox_head.layers",
        "decoder_bbox_head.layers",
        "encoder_bbox_head.layers", "decoder_class_head", "reg_conf.layers",
        "class_embed", "enc_out_class_embed", "class_labels_classifier.layers", "enc_output",
        "mask_query_head.layers", "decoder_order_head", "successor_order_head.proj",
        "relative_order_head.proj", "mask_embedder", "mask_embedder.layers", "mask_embed.layers",
        "hq_mask_mlp.layers",
        "iou_prediction_head.layers", "pred_obj_score_head.layers", "output_hypernetworks_mlps",
        "output_hypernetworks_mlps.proj_in", "output_hypernetworks_mlps.proj_out",
        "output_hypernetworks_mlps.layers",
        "linear_projections.proj", "blocks.pointwise_conv", "predict_action", "tdnn.kernel",
        "match_assignment_layers.final_projection", "match_assignment_layers.matchability",
        "token_confidence.token",
        # a small diffusion model that draws one audio frame from the state of the trunk
        "flow_head.layers.fc1", "flow_head.layers.fc2", "loss_weighting.layers",
        "diffusion_head.layers.ffn.gate_proj", "diffusion_head.layers.ffn.up_proj",
        "diffusion_head.layers.ffn.down_proj",
        "local_latents_linear", "ca_linear", "sequence_readout",  # rfd4_proteina
    ),
}  # fmt: skip


def _cross_attention() -> dict[str, tuple[str, ...]]:
    """One-segment self-attention aliases below each cross-attention parent, plus the special ones.

    Returns:
        Role -> aliases of `cross_attn.*`.
    """
    rows = {role: list(aliases) for role, aliases in _CROSS_ONLY.items()}
    for role, aliases in _ATTENTION.items():
        leaves = [alias for alias in aliases if "." not in alias]
        if leaves and "_" not in role:  # low-rank pairs and joint attention: no cross-attention
            row = rows.setdefault(role.replace("attn.", "cross_attn."), [])
            row += [f"{parent}.{leaf}" for parent in _CROSS_PARENTS for leaf in leaves]
    outputs = ("out_proj", "output_proj")
    rows["cross_attn.o"] += [f"{parent}.{leaf}" for parent in _CROSS_PARENTS for leaf in outputs]
    return {role: tuple(aliases) for role, aliases in sorted(rows.items())}


ROLES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    _ATTENTION | _cross_attention() | _MIXERS | _MLP | _UNTARGETED
)
