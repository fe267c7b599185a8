"""Where q, k and v lie in a fused projection, judged by upstream's own forward.

In attention a query changes its own position only, and of a single token the value is all that
counts: softmax over one key is 1. So rows that are called q must not reach another position, and
with one token nothing but the rows called v may reach the output.
"""

import pytest
import torch
import transformers

from hf_lora.fused import GATE_UP, SPLITS, Split, attention_split, rows_of, split_of
from hf_lora.targets import survey

SMALL = {"vocab_size": 40, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1}
OLD = {"vocab_size": 40, "n_embd": 32, "n_head": 4, "n_layer": 1}
WIDE = {**SMALL, "intermediate_size": 64}
MOE = {"num_local_experts": 2, "num_experts_per_tok": 1}
# model type, class, config
MODELS = [
    ("bloom", "BloomForCausalLM", {"vocab_size": 40, "hidden_size": 32, "n_head": 4, "n_layer": 1}),
    ("codegen", "CodeGenForCausalLM", {**OLD, "n_ctx": 32, "n_positions": 32, "rotary_dim": 4}),
    (
        "dbrx",
        "DbrxForCausalLM",
        {
            **{"vocab_size": 40, "d_model": 32, "n_heads": 4, "n_layers": 1},
            "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 100.0},
            "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 2, "moe_top_k": 1},
        },
    ),
    ("deberta", "DebertaForMaskedLM", {**WIDE, "relative_attention": False}),
    ("falcon", "FalconForCausalLM", {**SMALL, "multi_query": True}),
    ("falcon", "FalconForCausalLM", {**SMALL, "multi_query": False}),
    (
        "falcon",
        "FalconForCausalLM",
        {**SMALL, "new_decoder_architecture": True, "num_kv_heads": 2},
    ),
    ("gpt2", "GPT2LMHeadModel", OLD),
    ("gpt_bigcode", "GPTBigCodeForCausalLM", {**OLD, "multi_query": True}),
    ("gpt_bigcode", "GPTBigCodeForCausalLM", {**OLD, "multi_query": False}),
    ("gpt_neox", "GPTNeoXForCausalLM", WIDE),
    ("gpt_neox_japanese", "GPTNeoXJapaneseForCausalLM", SMALL),
    ("modernbert", "ModernBertForMaskedLM", {**WIDE, "pad_token_id": 0}),
    ("mpt", "MptForCausalLM", {"vocab_size": 40, "d_model": 32, "n_heads": 4, "n_layers": 1}),
    ("openai-gpt", "OpenAIGPTLMHeadModel", OLD),
    ("persimmon", "PersimmonForCausalLM", WIDE),
    ("phi3", "Phi3ForCausalLM", {**WIDE, "num_key_value_heads": 2, "pad_token_id": 0}),
]
UNJUDGED = {
    "fuyu": "its text model is a persimmon",
    "jetmoe": "k and v alone: chunk(2) of kv_proj, k first (modeling_jetmoe.py)",
    "minimax": "no softmax: view (heads, 3 * head_dim), split in q, k, v (modeling_minimax.py)",
    "phi4_multimodal": "its attention is a copy of phi3's",
}


def test_every_row_is_judged_or_says_why_not():
    assert {model_type for model_type, *_ in MODELS} | UNJUDGED.keys() == SPLITS.keys()


def made(model_type, name, fields):
    torch.manual_seed(0)
    config = transformers.CONFIG_MAPPING[model_type](**fields)
    config._attn_implementation = "eager"
    model = getattr(transformers, name)(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    fused = next(x for x in survey(model).layers if x.split is not None)
    return model, model.get_submodule(fused.path), rows_of(fused.split, fused.shape[1])


@torch.no_grad()
def changed(model, layer, rows, tokens, at):
    """Returns which positions change when rows of the fused output change at one position."""
    ids = torch.arange(3, 3 + tokens)[None]
    before = model(input_ids=ids).logits

    def disturb(module, args, output):
        output = output.clone()
        output.view(-1, output.shape[-1])[at, rows] += torch.linspace(-2, 3, len(rows)).square()
        return output

    handle = layer.register_forward_hook(disturb)
    after = model(input_ids=ids).logits
    handle.remove()
    # a token that is routed elsewhere changes the last bits of its neighbours
    return [int(i) for i in ((before - after).abs() > 1e-6).any(-1)[0].nonzero()]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("model_type", "name", "fields"), MODELS)
def test_rows_are_those_that_upstream_splits(model_type, name, fields):
    model, layer, rows = made(model_type, name, fields)
    every = sorted(i for part in rows.values() for i in part)
    assert every == list(range(len(every)))
    assert changed(model, layer, rows["q"], tokens=5, at=2) == [2]
    for part in "kv":
        assert set(changed(model, layer, rows[part], tokens=5, at=2)) - {2}
    others = sorted(rows["q"] + rows["k"])
    assert changed(model, layer, rows["v"], tokens=1, at=0) == [0]
    assert changed(model, layer, others, tokens=1, at=0) == []


def test_rows_by_hand():
    grouped = rows_of(attention_split(2, heads=4, kv_heads=2), 16)  # two features a head
    assert grouped == {
        "q": [0, 1, 2, 3, 8, 9, 10, 11],
        "k": [4, 5, 12, 13],
        "v": [6, 7, 14, 15],
    }
    assert rows_of(attention_split(1, 0, 2), 8) == {"k": [0, 1, 2, 3], "v": [4, 5, 6, 7]}
    assert rows_of(Split(1, (("gate", 1), ("up", 1))), 4) == {"gate": [0, 1], "up": [2, 3]}
    with pytest.raises(ValueError, match="7 features"):
        rows_of(attention_split(1, 2, 2), 7)


def test_a_projection_of_k_and_v_has_no_q():
    cross = split_of(SPLITS["gpt2"], transformers.GPT2Config(), "cross_attn.kv")
    assert cross == Split(1, (("k", 12), ("v", 12)))


GATED = {
    "phi3": ("Phi3ForCausalLM", {**WIDE, "pad_token_id": 0}),
    "glm": ("GlmForCausalLM", {**WIDE, "head_dim": 8, "pad_token_id": 0}),
    "glm4": ("Glm4ForCausalLM", {**WIDE, "head_dim": 8, "pad_token_id": 0}),
}


@pytest.mark.parametrize("model_type", GATED)
@torch.no_grad()
def test_the_gate_is_what_goes_through_the_activation(model_type):
    """With a gate of zeros silu gives zeros, so what lies in the other half cannot matter."""
    assert model_type in GATE_UP
    name, fields = GATED[model_type]
    torch.manual_seed(0)
    model = getattr(transformers, name)(transformers.CONFIG_MAPPING[model_type](**fields)).eval()
    fused = next(x for x in survey(model).layers if x.role == "mlp.gate_up")
    rows = rows_of(fused.split, fused.shape[1])
    weight, ids = model.get_submodule(fused.path).weight, torch.arange(3, 8)[None]
    weight[rows["gate"]] = 0
    before = model(input_ids=ids).logits
    weight[rows["up"]] += 1
    assert torch.equal(model(input_ids=ids).logits, before)
    weight[rows["gate"]] += 1
    assert not torch.equal(model(input_ids=ids).logits, before)
