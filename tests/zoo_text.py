"""The zoo's language models: decoders, mixtures of experts, state spaces, encoders, seq2seq."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tests.zoo_row import Row, ids

ENCODER = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DECODER = {**ENCODER, "num_key_value_heads": 2, "head_dim": 8}
_GPT = {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64,
        "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
_SEQ2SEQ = {
    "vocab_size": 96,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
_T5 = {"vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
       "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}  # fmt: skip
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
_ROUTED = {**_EXPERTS, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "n_shared_experts": 1,
           "first_k_dense_replace": 1}  # fmt: skip
_LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
           "v_head_dim": 8, "num_key_value_heads": 4}  # fmt: skip
_MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1,
           "mamba_expand": 2, "mamba_chunk_size": 8}  # fmt: skip


def _causal(kind: str, model: str, sizes: Mapping[str, Any] = DECODER, **more: Any) -> Row:
    return Row(kind, f"{model}ForCausalLM", {**sizes, **more}, {"input_ids": ids()})


def _masked(model: str, sizes: Mapping[str, Any] = ENCODER, **more: Any) -> Row:
    return Row("encoder", f"{model}ForMaskedLM", {**sizes, **more}, {"input_ids": ids()})


def _seq2seq(model: str, sizes: Mapping[str, Any] = _SEQ2SEQ, **more: Any) -> Row:
    inputs = {"input_ids": ids(2, 12), "decoder_input_ids": ids(2, 7)}
    return Row("seq2seq", f"{model}ForConditionalGeneration", {**sizes, **more}, inputs)


_DECODERS = {
    "llama": _causal("decoder", "Llama"),
    "mistral": _causal("decoder", "Mistral", sliding_window=8),
    "qwen2": _causal("decoder", "Qwen2"),
    "qwen3": _causal("decoder", "Qwen3"),
    "gemma": _causal("decoder", "Gemma"),
    "gemma2": _causal("decoder", "Gemma2", sliding_window=8),
    "gemma3_text": _causal("decoder", "Gemma3", sliding_window=8),
    "phi": _causal("decoder", "Phi"),
    "phi3": _causal("decoder", "Phi3"),
    "starcoder2": _causal("decoder", "Starcoder2"),
    "stablelm": _causal("decoder", "StableLm"),
    "olmo": _causal("decoder", "Olmo"),
    "olmo2": _causal("decoder", "Olmo2"),
    "cohere": _causal("decoder", "Cohere"),
    "cohere2": _causal("decoder", "Cohere2", sliding_window=8),
    "glm": _causal("decoder", "Glm"),
    "glm4": _causal("decoder", "Glm4"),
    "granite": _causal("decoder", "Granite"),
    "nemotron": _causal("decoder", "Nemotron"),
    "exaone4": _causal("decoder", "Exaone4", sliding_window=8),
    "smollm3": _causal("decoder", "SmolLM3"),
    "ernie4_5": _causal("decoder", "Ernie4_5"),
    "persimmon": _causal("decoder", "Persimmon", ENCODER),
    "gpt_neox": _causal("decoder", "GPTNeoX", ENCODER),
    "falcon": _causal("decoder", "Falcon", ENCODER, multi_query=True, alibi=False),
    "bloom": _causal("decoder", "Bloom", ENCODER, n_layer=2, n_head=4),
    "gpt2": Row("decoder", "GPT2LMHeadModel", _GPT, {"input_ids": ids()}),
    "openai-gpt": Row("decoder", "OpenAIGPTLMHeadModel", _GPT, {"input_ids": ids()}),
    "gpt_bigcode": _causal("decoder", "GPTBigCode", _GPT),
    "gptj": _causal("decoder", "GPTJ", _GPT, rotary_dim=4),
    "codegen": _causal("decoder", "CodeGen", _GPT, rotary_dim=4),
    "gpt_neo": _causal(
        "decoder", "GPTNeo", ENCODER, num_layers=2, num_heads=4,
        attention_types=[[["global", "local"], 1]], window_size=8,
    ),
    "opt": _causal("decoder", "OPT", ENCODER, ffn_dim=48, word_embed_proj_dim=32),
    "mpt": _causal("decoder", "Mpt", ENCODER, d_model=32, n_heads=4, n_layers=2, max_seq_len=64),
    "xglm": _causal("decoder", "XGLM", ENCODER, d_model=32, ffn_dim=48, num_layers=2,
                    attention_heads=4),
    "biogpt": _causal("decoder", "BioGpt", ENCODER),
}  # fmt: skip

_MOE = {
    "mixtral": _causal("moe", "Mixtral", num_local_experts=4, num_experts_per_tok=2),
    "qwen2_moe": _causal("moe", "Qwen2Moe", num_experts=4,
                         shared_expert_intermediate_size=16, **_EXPERTS),
    "qwen3_moe": _causal("moe", "Qwen3Moe", num_experts=4, **_EXPERTS),
    "deepseek_v2": _causal("moe", "DeepseekV2", **{**_ROUTED, **_LATENT, "topk_method": "greedy"}),
    "deepseek_v3": _causal("moe", "DeepseekV3", **{**_ROUTED, **_LATENT}),
    "gpt_oss": _causal("moe", "GptOss", num_local_experts=4, num_experts_per_tok=2,
                       sliding_window=8),
    "olmoe": _causal("moe", "Olmoe", num_experts=4, num_experts_per_tok=2),
    "granitemoe": _causal("moe", "GraniteMoe", num_local_experts=4, num_experts_per_tok=2),
    "phimoe": _causal("moe", "Phimoe", num_local_experts=4, num_experts_per_tok=2),
    "glm4_moe": _causal("moe", "Glm4Moe", **_ROUTED),
    "ernie4_5_moe": _causal("moe", "Ernie4_5_Moe", moe_num_experts=4, moe_k=2,
                            moe_intermediate_size=16, moe_num_shared_experts=1),
    "llama4_text": _causal("moe", "Llama4", num_local_experts=4, intermediate_size_mlp=48),
    "jetmoe": _causal("moe", "JetMoe", num_local_experts=4, num_experts_per_tok=2,
                      kv_channels=8, num_key_value_heads=2),
}  # fmt: skip

_STATE_SPACES = {
    "mamba": _causal("ssm", "Mamba", DECODER, state_size=8),
    "mamba2": _causal("ssm", "Mamba2", ENCODER, num_heads=8, head_dim=8, state_size=8, n_groups=1,
                      chunk_size=8),
    "falcon_mamba": _causal("ssm", "FalconMamba", DECODER, state_size=8),
    "jamba": _causal("ssm", "Jamba", num_experts=2, mamba_d_state=8, mamba_dt_rank=4,
                     attn_layer_period=2, attn_layer_offset=1, use_mamba_kernels=False),
    "bamba": _causal("ssm", "Bamba", attn_layer_indices=[1], **_MAMBA2),
    "falcon_h1": _causal("ssm", "FalconH1", **{**_MAMBA2, "mamba_d_ssm": 64}),
    "zamba2": _causal("ssm", "Zamba2", num_hidden_layers=3, hybrid_layer_ids=[1],
                      layers_block_type=["mamba", "hybrid", "mamba"], num_mem_blocks=1,
                      mamba_d_state=8, n_mamba_heads=8, mamba_ngroups=1, chunk_size=8,
                      num_key_value_heads=4, use_mamba_kernels=False, adapter_rank=4),
    "recurrent_gemma": _causal("ssm", "RecurrentGemma", num_hidden_layers=3, lru_width=32,
                               attention_window_size=8),
    "qwen3_next": _causal("ssm", "Qwen3Next", num_experts=4, linear_key_head_dim=8,
                          linear_value_head_dim=8, linear_num_key_heads=2,
                          linear_num_value_heads=4, shared_expert_intermediate_size=16,
                          layer_types=["linear_attention", "full_attention"], **_EXPERTS),
    "lfm2": _causal("ssm", "Lfm2", layer_types=["conv", "full_attention"],
                    block_auto_adjust_ff_dim=False),
    "granitemoehybrid": _causal("ssm", "GraniteMoeHybrid", num_local_experts=4,
                                num_experts_per_tok=2, shared_intermediate_size=16,
                                layer_types=["mamba", "attention"], **_MAMBA2),
    "nemotron_h": _causal("ssm", "NemotronH", layers_block_type=["mamba", "attention"],
                          mamba_num_heads=8, mamba_head_dim=8, ssm_state_size=8, n_groups=1,
                          chunk_size=8),
}  # fmt: skip

_ENCODERS = {
    "bert": _masked("Bert"),
    "roberta": _masked("Roberta"),
    "xlm-roberta": _masked("XLMRoberta"),
    "electra": _masked("Electra", embedding_size=16),
    "albert": _masked("Albert", embedding_size=16),
    "mpnet": _masked("MPNet"),
    "esm": _masked("Esm", token_dropout=False),
    "roformer": _masked("RoFormer", embedding_size=32),
    "convbert": _masked("ConvBert", embedding_size=16),
    "deberta": _masked("Deberta", relative_attention=True, pos_att_type=["p2c", "c2p"],
                       max_relative_positions=8),
    "deberta-v2": _masked("DebertaV2", relative_attention=True, pos_att_type=["p2c", "c2p"],
                          pooler_hidden_size=32),
    "modernbert": _masked("ModernBert", global_attn_every_n_layers=2, local_attention=8,
                          cls_token_id=1, sep_token_id=2),
    "distilbert": _masked("DistilBert", {"vocab_size": 96, "dim": 32, "hidden_dim": 48,
                                         "n_layers": 2, "n_heads": 4,
                                         "max_position_embeddings": 64}),
}  # fmt: skip

_SEQ2SEQS = {
    "t5": _seq2seq("T5", _T5),
    "umt5": _seq2seq("UMT5", _T5),
    "longt5": _seq2seq("LongT5", _T5, local_radius=4, encoder_attention_type="local"),
    "switch_transformers": _seq2seq("SwitchTransformers", _T5, num_experts=4,
                                    num_sparse_encoder_layers=1,
                                    num_sparse_decoder_layers=1, num_decoder_layers=2),
    "bart": _seq2seq("Bart"),
    "mbart": _seq2seq("MBart"),
    "pegasus": _seq2seq("Pegasus"),
    "m2m_100": _seq2seq("M2M100", encoder_layerdrop=0.0, decoder_layerdrop=0.0),
    "blenderbot": _seq2seq("Blenderbot"),
    "marian": Row("seq2seq", "MarianMTModel", _SEQ2SEQ,
                  {"input_ids": ids(2, 12), "decoder_input_ids": ids(2, 7)}),
    "led": Row(
        "seq2seq", "LEDForConditionalGeneration",
        {**_SEQ2SEQ, "attention_window": 4, "max_encoder_position_embeddings": 64,
         "max_decoder_position_embeddings": 64},
        {"input_ids": ids(2, 12), "decoder_input_ids": ids(2, 7),
         "global_attention_mask": torch.eye(2, 12).long()},
    ),
}  # fmt: skip

ROWS = {**_DECODERS, **_MOE, **_STATE_SPACES, **_ENCODERS, **_SEQ2SEQS}
