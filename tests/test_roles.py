"""Roles read off paths; the expectations are written by hand from the modelling source named."""

import re

import pytest

from hf_lora.roles import NEVER, PRESETS, ROLES, TOWERS, expand, role_of, tower_of

# Path -> role, grouped by file under transformers 5.23.0 `models/`.
PATHS = {
    "llama": {
        "model.layers.0.self_attn.q_proj": "attn.q",
        "model.layers.31.self_attn.o_proj": "attn.o",
        "model.layers.0.mlp.gate_proj": "mlp.gate",
        "lm_head": "lm_head",
    },
    "qwen3": {"model.layers.0.mlp.down_proj": "mlp.down", "model.embed_tokens": "embed"},
    "qwen3_moe": {
        "model.layers.0.mlp.gate": "moe.router",
        "model.layers.0.mlp.experts.gate_up_proj": "moe.experts.gate_up",
        "model.layers.0.mlp.experts.down_proj": "moe.experts.down",
    },
    "qwen2_moe": {
        "model.layers.0.mlp.shared_expert.down_proj": "moe.shared.down",
        "model.layers.0.mlp.shared_expert_gate": "moe.shared_gate",
    },
    "qwen3_next": {
        "model.layers.0.linear_attn.in_proj_qkvz": "linear_attn.qkv",
        "model.layers.0.linear_attn.in_proj_ba": "linear_attn.decay",
        "model.layers.0.linear_attn.out_proj": "linear_attn.o",
    },
    "gemma3": {
        "model.language_model.layers.0.self_attn.v_proj": "attn.v",
        "model.language_model.layers.0.mlp.up_proj": "mlp.up",
    },
    "phi3": {
        "model.layers.0.self_attn.qkv_proj": "attn.qkv",
        "model.layers.0.mlp.gate_up_proj": "mlp.gate_up",
    },
    "gpt2": {
        "transformer.h.0.attn.c_attn": "attn.qkv",
        "transformer.h.0.attn.c_proj": "attn.o",
        "transformer.h.0.mlp.c_fc": "mlp.up",
        "transformer.h.0.mlp.c_proj": "mlp.down",
        "transformer.h.0.crossattention.q_attn": "cross_attn.q",
        "transformer.h.0.crossattention.c_attn": "cross_attn.kv",
        "transformer.h.0.crossattention.c_proj": "cross_attn.o",
    },
    "falcon": {
        "transformer.h.0.self_attention.query_key_value": "attn.qkv",
        "transformer.h.0.self_attention.dense": "attn.o",
        "transformer.h.0.mlp.dense_h_to_4h": "mlp.up",
    },
    "bloom": {"transformer.h.0.mlp.dense_4h_to_h": "mlp.down"},
    "gpt_neox": {"gpt_neox.layers.0.attention.dense": "attn.o"},
    "gptj": {
        "transformer.h.0.attn.out_proj": "attn.o",
        "transformer.h.0.mlp.fc_in": "mlp.up",
        "transformer.h.0.mlp.fc_out": "mlp.down",
    },
    "mamba2": {
        "backbone.layers.0.mixer.in_proj": "ssm.in",
        "backbone.layers.0.mixer.out_proj": "ssm.out",
    },
    "mamba": {
        "backbone.layers.0.mixer.x_proj": "ssm.x",
        "backbone.layers.0.mixer.dt_proj": "ssm.dt",
    },
    "bert": {
        "bert.encoder.layer.0.attention.self.query": "attn.q",
        "bert.encoder.layer.0.attention.output.dense": "attn.o",
        "bert.encoder.layer.0.intermediate.dense": "mlp.up",
        "bert.encoder.layer.0.output.dense": "mlp.down",
        "bert.encoder.layer.0.crossattention.self.key": "cross_attn.k",
        "bert.encoder.layer.0.crossattention.output.dense": "cross_attn.o",
        "cls.predictions.transform.dense": "lm_head",
        "bert.pooler.dense": "head",
    },
    "roberta": {"roberta.encoder.layer.0.attention.self.value": "attn.v"},
    "deberta": {
        "deberta.encoder.layer.0.attention.self.in_proj": "attn.qkv",
        "deberta.encoder.layer.0.attention.self.pos_q_proj": "position",
    },
    "deberta_v2": {"deberta.encoder.layer.0.attention.self.query_proj": "attn.q"},
    "modernbert": {
        "model.layers.0.attn.Wqkv": "attn.qkv",
        "model.layers.0.attn.Wo": "attn.o",
        "model.layers.0.mlp.Wi": "mlp.gate_up",
        "model.layers.0.mlp.Wo": "mlp.down",
    },
    "distilbert": {
        "distilbert.transformer.layer.0.attention.out_lin": "attn.o",
        "distilbert.transformer.layer.0.ffn.lin1": "mlp.up",
        "distilbert.transformer.layer.0.ffn.lin2": "mlp.down",
    },
    "t5": {
        "decoder.block.0.layer.0.SelfAttention.q": "attn.q",
        "decoder.block.0.layer.1.EncDecAttention.q": "cross_attn.q",
        "decoder.block.0.layer.1.EncDecAttention.o": "cross_attn.o",
        "encoder.block.0.layer.1.DenseReluDense.wi_0": "mlp.gate",
        "encoder.block.0.layer.1.DenseReluDense.wo": "mlp.down",
    },
    "bart": {
        "model.decoder.layers.0.self_attn.out_proj": "attn.o",
        "model.decoder.layers.0.encoder_attn.v_proj": "cross_attn.v",
        "model.decoder.layers.0.encoder_attn.out_proj": "cross_attn.o",
        "model.decoder.layers.0.fc1": "mlp.up",
        "model.decoder.layers.0.fc2": "mlp.down",
    },
    "deepseek_v3": {
        "model.layers.3.self_attn.q_a_proj": "attn.q_a",
        "model.layers.3.self_attn.kv_a_proj_with_mqa": "attn.kv_a",
        "model.layers.3.self_attn.kv_b_proj": "attn.kv_b",
        "model.layers.3.mlp.shared_experts.up_proj": "moe.shared.up",
    },
    "deepseek_v32": {"model.layers.0.self_attn.indexer.wq_b": "indexer"},
    "switch_transformers": {"encoder.block.1.layer.1.mlp.experts.expert_7.wi": "moe.experts.up"},
    "nllb_moe": {"model.encoder.layers.3.ffn.experts.expert_12.fc2": "moe.experts.down"},
    "rwkv": {
        "rwkv.blocks.0.attention.key": "attn.k",
        "rwkv.blocks.0.attention.receptance": "attn.gate",
        "rwkv.blocks.0.feed_forward.key": "mlp.up",
        "rwkv.blocks.0.feed_forward.value": "mlp.down",
        "rwkv.blocks.0.feed_forward.receptance": "mlp.gate",
    },
    "recurrent_gemma": {
        "model.layers.0.temporal_block.linear_y": "ssm.gate",
        "model.layers.2.temporal_block.q_proj": "attn.q",
    },
    "lfm2": {
        "model.layers.0.feed_forward.w1": "mlp.gate",
        "model.layers.0.feed_forward.w2": "mlp.down",
        "model.layers.0.feed_forward.w3": "mlp.up",
        "model.layers.0.conv.in_proj": "conv.in",
    },
    "granitemoehybrid": {"model.layers.0.shared_mlp.input_linear": "moe.shared.gate_up"},
    "albert": {
        "albert.encoder.albert_layer_groups.0.albert_layers.0.attention.dense": "attn.o",
        "albert.encoder.albert_layer_groups.0.albert_layers.0.ffn": "mlp.up",
    },
    "afmoe": {"model.layers.0.self_attn.gate_proj": "attn.gate"},
    "sam": {
        "mask_decoder.transformer.layers.0.cross_attn_token_to_image.out_proj": "cross_attn.o",
        "mask_decoder.output_hypernetworks_mlps.0.proj_in": "head",
    },
    "rt_detr": {
        "model.decoder.layers.0.encoder_attn.sampling_offsets": "sampling",
        "model.decoder.layers.0.encoder_attn.output_proj": "cross_attn.o",
        "model.decoder.bbox_embed.0.layers.1": "head",
        "model.decoder.query_pos_head.layers.0": "position",
    },
    "lxmert": {
        "lxmert.encoder.x_layers.0.visual_attention.att.query": "cross_attn.q",
        "lxmert.encoder.x_layers.0.visn_self_att.output.dense": "attn.o",
        "lxmert.encoder.x_layers.0.visn_output.dense": "mlp.down",
    },
    "swin": {"swin.encoder.layers.0.downsample.reduction": "proj"},
    "convnext": {"convnext.encoder.stages.0.layers.0.pwconv1": "mlp.up"},
    "axk2": {"model.layers.0.input_layernorm.mlp.fc1": "norm"},
    "xlm": {"transformer.attentions.0.q_lin": "attn.q", "transformer.ffns.0.lin2": "mlp.down"},
}

# The same for diffusers 0.42.1 `models/`.
DIFFUSION = {
    "unets/unet_2d_condition.py": {
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0": "attn.o",
        "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k": "cross_attn.k",
        "down_blocks.0.attentions.0.proj_in": "proj",
        "down_blocks.0.attentions.0.proj_out": "proj",
        "down_blocks.0.resnets.0.time_emb_proj": "time",
    },
    "transformers/transformer_flux.py": {
        "transformer_blocks.0.attn.to_q": "attn.q",
        "transformer_blocks.0.attn.add_q_proj": "attn.add_q",
        "transformer_blocks.0.attn.to_add_out": "attn.add_o",
        "transformer_blocks.0.attn.to_added_qkv": "attn.add_qkv",
        "transformer_blocks.0.norm1_context.linear": "modulation",
        "transformer_blocks.0.ff_context.net.0.proj": "mlp.up",
        "transformer_blocks.0.ff_context.net.2": "mlp.down",
        "single_transformer_blocks.0.proj_mlp": "mlp.up",
        "single_transformer_blocks.0.proj_out": "attn.o_mlp",
        "proj_out": "lm_head",
    },
    "transformers/transformer_flux2.py": {
        "single_transformer_blocks.0.attn.to_qkv_mlp_proj": "attn.qkv_mlp",
        "transformer_blocks.0.ff.linear_in": "mlp.gate_up",
    },
    "transformers/transformer_wan.py": {
        "blocks.0.attn2.add_k_proj": "cross_attn.add_k",
        "blocks.0.ffn.net.0.proj": "mlp.up",
    },
    "transformers/transformer_kandinsky.py": {
        "visual_transformer_blocks.0.cross_attention.to_query": "cross_attn.q",
        "visual_transformer_blocks.0.self_attention.out_layer": "attn.o",
        "visual_transformer_blocks.0.feed_forward.out_layer": "mlp.down",
        "visual_transformer_blocks.0.visual_modulation.out_layer": "modulation",
    },
    "transformers/transformer_qwenimage.py": {
        "transformer_blocks.0.img_mod.1": "modulation",
        "transformer_blocks.0.txt_mlp.net.2": "mlp.down",
    },
    "transformers/transformer_z_image.py": {
        "layers.0.attention.to_out.0": "attn.o",
        "layers.0.adaLN_modulation.0": "modulation",
        "t_embedder.mlp.0": "time",
    },
    "controlnets/controlnet_flux.py": {"controlnet_blocks.0": "proj"},
}
ALL_PATHS = [row for rows in (*PATHS.values(), *DIFFUSION.values()) for row in rows.items()]


@pytest.mark.parametrize(("path", "role"), ALL_PATHS)
def test_a_path_has_the_role_its_modelling_source_gives_it(path, role):
    assert role_of(path) == role


def test_an_alias_belongs_to_one_role_only():
    aliases = [alias for row in ROLES.values() for alias in row]
    assert sorted(aliases) == sorted(set(aliases))


def test_no_ambiguous_leaf_stands_alone():
    alone = {alias for row in ROLES.values() for alias in row if "." not in alias}
    assert not alone & {"out_proj", "dense", "c_proj", "output", "wo", "Wo", "in_proj", "gate", "o"}


@pytest.mark.parametrize(
    "path", ["layers.0.my_q_proj", "layers.0.q_proj_norm", "layers.0.myself_attn.dense", "Q_PROJ"]
)
def test_part_of_a_segment_is_no_match(path):
    assert role_of(path) is None


def test_the_alias_with_most_segments_wins():
    assert role_of("layers.0.mlp.gate_proj") == "mlp.gate"
    assert role_of("layers.0.self_attn.gate_proj") == "attn.gate"
    assert role_of("layers.0.self_attn.compressor.indexer.gate_proj") == "indexer"


def test_an_index_between_parent_and_leaf_changes_nothing():
    assert role_of("mlp.experts.5.w1") == role_of("mlp.experts.w1") == "moe.experts.gate"
    assert role_of("attn.to_out.0") == "attn.o"


def test_a_parameter_has_the_role_of_its_module():
    assert role_of("layers.0.self_attn.q_proj.weight") == "attn.q"


def test_a_name_nobody_listed_has_no_role():
    assert role_of("layers.0.frobnicate") is None
    assert role_of("") is None


def test_a_router_is_never_a_default_target():
    default = expand("default")
    assert "moe.router" not in default
    assert not set(default) & set(NEVER)


def test_routed_experts_are_opt_in_and_shared_experts_are_not():
    assert "moe.shared.up" in expand("default")
    assert not [role for role in expand("default") if role.startswith("moe.experts")]
    assert expand("experts") == tuple(r for r in ROLES if r.startswith("moe.experts."))


def test_every_role_is_a_default_target_or_opt_in_or_has_a_reason():
    assert set(ROLES) == {*expand("default"), *expand("experts"), *NEVER}


def test_every_preset_pattern_is_the_start_of_a_role():
    patterns = {pattern for row in PRESETS.values() for pattern in row}
    assert all(expand(pattern) for pattern in patterns)


def test_attention_includes_cross_attention():
    assert {"attn.q", "cross_attn.q", "linear_attn.q"} <= set(expand("attention"))


def test_qv_leaves_the_key_and_the_output_out():
    assert {"attn.q", "attn.v", "cross_attn.q", "cross_attn.v", "attn.qkv"} <= set(expand("qv"))
    assert not {"attn.k", "attn.o", "cross_attn.k"} & set(expand("qv"))


def test_a_prefix_expands_by_whole_words_and_never_to_a_router():
    assert expand("attn.q") == ("attn.q",)
    assert "moe.router" not in expand("moe")
    assert expand("moe.router") == ("moe.router",)


@pytest.mark.parametrize("word", ["att", "q_proj", "all-linear", ""])
def test_a_word_that_is_no_role_expands_to_nothing(word):
    assert expand(word) is None


def test_role_names_are_lower_case_dotted_words():
    assert all(re.fullmatch(r"[a-z_]+(\.[a-z_]+)*", role) for role in ROLES)


@pytest.mark.parametrize(
    ("path", "tower"),
    [
        ("model.language_model.layers.0.self_attn.q_proj", "language"),
        ("model.vision_tower.encoder.layers.0.self_attn.q_proj", "vision"),
        ("model.visual.blocks.0.attn.qkv", "vision"),
        ("model.visual.merger.mlp.0", "projector"),
        ("model.audio_tower.layers.0.fc1", "audio"),
        ("model.multi_modal_projector.linear_1", "projector"),
        ("model.patcher.layers.0.self_attn.q_proj", "patcher"),
        ("model.encoder.layers.0.self_attn.q_proj", "language"),
        ("model.revisual.layers.0.fc1", "language"),
    ],
)
def test_the_innermost_named_segment_gives_the_tower(path, tower):
    assert tower_of(path) == tower


def test_towers_are_few():
    assert set(TOWERS.values()) == {"vision", "audio", "projector", "condition", "patcher"}
