"""Family rows: what they change against the lexicon, and that nobody claims a model twice."""

from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_lora.errors import InvalidOption
from hf_lora.families import (
    FAMILIES,
    Family,
    family_of,
    frozen_in,
    register_family,
    role_in,
    tower_in,
    unregister_family,
)
from hf_lora.roles import expand

MAMBA_TYPES = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")


def config(model_type, **parts):
    return SimpleNamespace(model_type=model_type, **parts)


def by_type(model_type):
    return family_of(config(model_type))


@pytest.fixture
def register():
    rows = []

    def add(*args, **kwargs):
        rows.append(register_family(Family(*args, **{"source": "a test", **kwargs})))
        return rows[-1]

    yield add
    for row in rows:
        unregister_family(row)


def meta(config_class, model_class, **options):
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, **options}
    with torch.device("meta"):
        return getattr(transformers, model_class)(getattr(transformers, config_class)(**sizes))


def defaults(model):
    """Role -> number of linears inside blocks that the default takes."""
    family, roles = family_of(model), {}
    for path, module in model.named_modules():
        inside = any(part.isdigit() for part in path.split("."))
        role = role_in(path, family)
        if not isinstance(module, nn.Linear | Conv1D) or not inside or frozen_in(path, family):
            continue
        if role in expand("default"):
            roles[role] = roles.get(role, 0) + 1
    return roles


@pytest.mark.parametrize("model_type", MAMBA_TYPES)
def test_where_peft_refuses_out_proj_it_is_no_default_target(model_type):
    reason = frozen_in("backbone.layers.0.mixer.out_proj", by_type(model_type))
    assert "without calling the layer" in reason


def test_peft_still_refuses_out_proj_on_the_mamba_types_we_know():
    # Fails when peft changes its list: then the rows of families.py are to be read again.
    from peft.tuners.tuners_utils import _check_lora_target_modules_mamba as check

    for model_type in (*MAMBA_TYPES, "bamba"):
        model = nn.Module()
        model.config = config(model_type)
        if model_type in MAMBA_TYPES:
            with pytest.raises(ValueError, match="incompatible with Mamba"):
                check(SimpleNamespace(peft_type="LORA"), model, "out_proj")
        else:
            check(SimpleNamespace(peft_type="LORA"), model, "out_proj")


def test_a_family_asks_its_own_aliases_before_the_lexicon():
    xclip = by_type("xclip")
    assert role_in("prompts_generator.decoder.0.mlp.0", xclip) == "mlp.up"
    assert role_in("prompts_generator.decoder.0.mlp.3", xclip) == "mlp.down"
    assert role_in("prompts_generator.decoder.0.mlp.3", None) is None


def test_jamba_keeps_dt_frozen_and_the_rest_of_its_mixer_not():
    jamba = by_type("jamba")
    assert frozen_in("model.layers.0.mamba.dt_proj", jamba)
    assert not frozen_in("model.layers.0.mamba.x_proj", jamba)
    assert not frozen_in("model.layers.0.mamba.nothing_known", jamba)


def test_rwkv_keeps_frozen_what_it_rescales_for_evaluation():
    rwkv = by_type("rwkv")
    assert "rescale_every" in frozen_in("rwkv.blocks.0.attention.output", rwkv)
    assert "rescale_every" in frozen_in("rwkv.blocks.0.feed_forward.value", rwkv)
    assert not frozen_in("rwkv.blocks.0.attention.key", rwkv)


def test_cross_attention_is_frozen_in_a_decoder_without_its_encoder_only():
    sizes = {"d_model": 32, "decoder_layers": 1, "encoder_layers": 1, "vocab_size": 64}
    alone = meta("BartConfig", "BartForCausalLM", **sizes)
    whole = meta("BartConfig", "BartForConditionalGeneration", **sizes)
    path = "model.decoder.layers.0.encoder_attn.q_proj"
    assert "encoder_hidden_states" in frozen_in(path, family_of(alone))
    assert "cross_attn.q" not in defaults(alone)
    assert defaults(whole)["cross_attn.q"] == 1


def test_a_wavlm_reads_its_attention_weights_without_calling_the_layers():
    assert "without calling" in frozen_in("encoder.layers.0.attention.q_proj", by_type("wavlm"))
    assert not frozen_in("encoder.layers.0.feed_forward.output_dense", by_type("wavlm"))


def test_a_dual_encoder_is_trunk_in_both_towers():
    assert by_type("clip").main == ("language", "vision")
    assert by_type("clap").main == ("language", "audio", "vision")


def test_where_a_feed_forward_is_gated_its_first_matrix_holds_both_halves():
    unet = family_of(type("UNet2DConditionModel", (), {})())
    path = "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj"
    assert role_in(path, unet) == "mlp.gate_up"
    assert role_in(path, None) == "mlp.up"


def test_the_second_attention_of_a_motion_block_is_self_attention():
    motion = family_of(type("UNetMotionModel", (), {})())
    block = "down_blocks.0.motion_modules.0.transformer_blocks.0.attn2"
    assert role_in(f"{block}.to_q", motion) == "attn.q"
    assert role_in(f"{block}.to_out.0", motion) == "attn.o"
    assert role_in(f"{block}.to_q", None) == "cross_attn.q"


def test_a_grouped_linear_is_frozen():
    assert "block-diagonal" in frozen_in("layers.0.self_attn.o_a_proj", by_type("deepseek_v4"))


def test_a_tower_without_a_name_of_its_own_is_a_family_matter():
    speech = by_type("granite_speech")
    assert tower_in("model.encoder.layers.0.ff1.up_proj", speech) == "audio"
    assert tower_in("model.projector.qformer.encoder.layer.0.output.dense", speech) == "projector"
    assert tower_in("model.encoder.layers.0.ff1.up_proj", None) == "language"


def test_a_model_inside_a_composite_config_is_found():
    assert family_of(config("some_vlm", text_config=config("nemotron_h"))) is by_type("mamba2")


def test_the_outer_type_comes_before_the_inner_one():
    assert family_of(config("jamba", text_config=config("mamba"))) is by_type("jamba")


@pytest.mark.parametrize("thing", [None, 3, "mamba", object(), nn.Linear(2, 2), config(None)])
def test_what_has_no_known_type_has_no_family(thing):
    assert family_of(thing) is None


def test_most_types_need_no_row():
    assert not [name for name in ("llama", "qwen3_moe", "bert", "t5", "gpt2") if by_type(name)]


def test_a_registered_class_and_its_subclasses_are_found(register):
    class MyDenoiser(nn.Module): ...

    class Child(MyDenoiser): ...

    row = register("mine", classes=("MyDenoiser",), roles={"attn.q": "to_query"})
    assert family_of(MyDenoiser()) is family_of(Child()) is row
    assert role_in("blocks.0.attn.to_query", row) == "attn.q"


def test_two_rows_that_claim_one_type_are_refused_by_name(register):
    register("first", model_types=("my_type",))
    with pytest.raises(InvalidOption, match="'first' and 'second' both claim 'my_type'"):
        register("second", model_types=("my_type",))


def test_a_refused_row_claims_nothing(register):
    with pytest.raises(InvalidOption, match="both claim 'mamba'"):
        register("greedy", model_types=("my_type", "mamba"))
    assert by_type("my_type") is None


def test_a_row_may_be_registered_twice_and_unregistered(register):
    row = register("mine", model_types=("my_type",))
    assert register_family(row) is row
    unregister_family(row)
    assert by_type("my_type") is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"roles": {"attn.query": "q"}}, r"unknown role 'attn.query'.*Closest: .*attn\.q"),
        ({"frozen": {"ssm.output": "why"}}, "unknown role 'ssm.output'"),
        ({"towers": {"encoder": "sound"}}, "unknown tower 'sound'"),
        ({"source": ""}, "lacks a name or a source"),
        ({"model_types": ()}, "claims no model"),
    ],
)
def test_a_row_that_makes_no_sense_is_refused(options, message):
    with pytest.raises(InvalidOption, match=message):
        Family(**{"name": "odd", "model_types": ("odd",), "source": "a test", **options})


def test_every_row_names_library_version_and_file():
    files = ("transformers 5.23.0 models/", "diffusers 0.42.1 models/")
    assert all(any(file in row.source for file in files) for row in FAMILIES)
    assert len({row.name for row in FAMILIES}) == len(FAMILIES)


def test_all_linears_of_a_llama_are_default_targets():
    model = meta("LlamaConfig", "LlamaForCausalLM", intermediate_size=64, num_attention_heads=4)
    parts = ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.up", "mlp.down")
    assert defaults(model) == dict.fromkeys(parts, 2)


def test_a_mamba_adapts_its_input_projection_only():
    assert defaults(meta("MambaConfig", "MambaForCausalLM", state_size=4)) == {"ssm.in": 2}


def test_a_bert_adapts_every_block_and_not_its_head():
    model = meta("BertConfig", "BertForMaskedLM", intermediate_size=64, num_attention_heads=4)
    parts = ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.up", "mlp.down")
    assert defaults(model) == dict.fromkeys(parts, 2)


def test_a_gpt2_with_transposed_layers_is_read_alike():
    model = meta("GPT2Config", "GPT2LMHeadModel", num_attention_heads=4)
    assert defaults(model) == dict.fromkeys(("attn.qkv", "attn.o", "mlp.up", "mlp.down"), 2)
