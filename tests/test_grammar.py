"""Keys of foreign files are cut into beginning, module and factor by tables alone."""

import pytest
import torch

from hf_lora.errors import BadAdapterFile
from hf_lora.formats.grammar import OLD, format_of, grouped, parsed

# a key -> what begins it, the module, the factor
KEYS = [
    ("lora_unet_mid_block_to_q.lora_down.weight", "lora_unet_", "mid_block_to_q", "lora_A"),
    ("lora_unet_mid_block_to_q.lora_up.weight", "lora_unet_", "mid_block_to_q", "lora_B"),
    ("lora_unet_mid_block_to_q.alpha", "lora_unet_", "mid_block_to_q", "alpha"),
    ("lora_unet_conv.lora_mid.weight", "lora_unet_", "conv", "lora_mid"),
    ("lora_unet__blocks_0_q.lora_up.weight", "lora_unet__", "blocks_0_q", "lora_B"),
    ("lora_te_text_model_fc1.dora_scale", "lora_te_", "text_model_fc1", "dora_scale"),
    ("lora_te1_fc1.hada_w1_a", "lora_te1_", "fc1", "hada_w1_a"),
    ("lora_te2_fc1.lokr_w2_b", "lora_te2_", "fc1", "lokr_w2_b"),
    ("lora_te3_encoder_q.alpha", "lora_te3_", "encoder_q", "alpha"),
    ("lora_transformer_x_embedder.lora_up.weight", "lora_transformer_", "x_embedder", "lora_B"),
    ("lycoris_mid_to_q.oft_blocks", "lycoris_", "mid_to_q", "oft_blocks"),
    ("lycoris_mid_to_q.a1.weight", "lycoris_", "mid_to_q", "a1.weight"),
    ("diffusion_model.a.b.lora_A.weight", "diffusion_model.", "a.b", "lora_A"),
    ("diffusion_model.a.b.diff_b", "diffusion_model.", "a.b", "diff_b"),
    ("model.diffusion_model.a.lora_B.weight", "model.diffusion_model.", "a", "lora_B"),
    ("base_model.model.a.b.lora_A.weight", "base_model.model.", "a.b", "lora_A"),
    ("text_encoders.clip_l.transformer.a.lora_A.weight", "text_encoders.clip_l.transformer.", "a",
     "lora_A"),
    ("text_encoders.t5xxl.a.lora_A.weight", "text_encoders.t5xxl.", "a", "lora_A"),
    ("transformer.a.0.lora_A.default.weight", "transformer.", "a.0", "lora_A"),
    ("transformer.a.0.lora_A", "transformer.", "a.0", "lora_A"),
    ("transformer_2.a.lora_magnitude_vector", "transformer_2.", "a", "lora_magnitude_vector"),
    ("unet.a.lora_B.bias", "unet.", "a", "lora_B.bias"),
    ("unet.a.attn1.processor.to_q_lora.down.weight", "unet.", "a.attn1.to_q", "lora_A"),
    ("unet.a.attn1.processor.to_out_lora.up.weight", "unet.", "a.attn1.to_out.0", "lora_B"),
    ("text_encoder.l.0.self_attn.to_out_lora.up.weight", "text_encoder.", "l.0.self_attn.out_proj",
     "lora_B"),
    ("text_encoder.l.0.q_proj.lora_linear_layer.up.weight", "text_encoder.", "l.0.q_proj",
     "lora_B"),
    ("text_encoder_2.text_projection.lora.down.weight", "text_encoder_2.", "text_projection",
     "lora_A"),
    ("double_blocks.0.img_attn.qkv.lora_A.weight", "", "double_blocks.0.img_attn.qkv", "lora_A"),
    ("to_q.lora_A.weight", "", "to_q", "lora_A"),
]  # fmt: skip

STRANGE = [
    "", "unet", "bundle_emb.cat.string_to_param.*", "unet.mid.to_q.lora_C.weight",
    "lora_unet_mid.lora_down.weight.old", "lora_unet_mid", "lora_unet_.alpha", ".lora_A.weight",
    "lora_unet_mid.to_q.alpha",
]  # fmt: skip


@pytest.mark.parametrize(("key", "start", "module", "factor"), KEYS, ids=[row[0] for row in KEYS])
def test_a_key_is_cut_where_the_tables_say(key, start, module, factor):
    found, name, end = parsed(key)
    assert (found.text, name, end) == (start, module, factor)


@pytest.mark.parametrize("key", STRANGE)
def test_keys_of_no_factor_are_named(key):
    groups, strange = grouped({key: torch.ones(1), "unet.a.lora_A.weight": torch.ones(1)})
    assert strange == [key]
    assert [group.start.text for group in groups] == ["unet."]


def test_two_spellings_of_one_factor_are_refused():
    tensors = {f"unet.a.lora_{x}.weight": torch.ones(1) for x in ("down", "A")}
    with pytest.raises(BadAdapterFile, match=r"unet\.a\.lora_down\.weight stands twice"):
        grouped(tensors)


def test_groups_know_their_keys_and_format():
    keys = [
        "lora_unet_a.lora_up.weight",
        "lora_unet_a.alpha",
        "unet.b.processor.to_q_lora.up.weight",
    ]
    groups, _ = grouped({key: torch.ones(1) for key in keys})
    assert {key for g in groups for layer in g.layers.values() for key in layer.keys} == {*keys}
    assert format_of(groups) == f"kohya and {OLD}"
