"""Tiny transformers models, one row a family, with random weights from a fixed seed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from hf_lora.errors import InvalidOption

_DECODER = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_ENCODER = {k: v for k, v in _DECODER.items() if k not in {"num_key_value_heads", "head_dim"}}
_GPT = {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip


@dataclass(frozen=True)
class Tiny:
    """How to build one family small.

    Attributes:
        config: Class name of the config.
        lm: Class name of its language model (causal, masked or sequence to sequence).
        classifier: Class name of its sequence classifier, empty where transformers has none.
        sizes: Config fields that make it small.
    """

    config: str
    lm: str
    classifier: str
    sizes: Mapping[str, Any] = field(default_factory=dict)


FAMILIES: Mapping[str, Tiny] = {
    "llama": Tiny("LlamaConfig", "LlamaForCausalLM", "LlamaForSequenceClassification", _DECODER),
    "qwen3": Tiny("Qwen3Config", "Qwen3ForCausalLM", "Qwen3ForSequenceClassification", _DECODER),
    "qwen3_moe": Tiny(
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        "Qwen3MoeForSequenceClassification",
        {**_DECODER, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    ),
    "gemma3": Tiny(
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        "Gemma3TextForSequenceClassification",
        {**_DECODER, "sliding_window": 16},
    ),
    "phi3": Tiny("Phi3Config", "Phi3ForCausalLM", "Phi3ForSequenceClassification", _DECODER),
    "gpt2": Tiny("GPT2Config", "GPT2LMHeadModel", "GPT2ForSequenceClassification", _GPT),
    "falcon": Tiny(
        "FalconConfig",
        "FalconForCausalLM",
        "FalconForSequenceClassification",
        {**_ENCODER, "new_decoder_architecture": False, "multi_query": True, "alibi": False},
    ),
    "bloom": Tiny(
        "BloomConfig",
        "BloomForCausalLM",
        "BloomForSequenceClassification",
        {"vocab_size": 96, "hidden_size": 32, "n_layer": 2, "n_head": 4, "pad_token_id": 0,
         "bos_token_id": 1, "eos_token_id": 2},
    ),
    "gpt_neox": Tiny(
        "GPTNeoXConfig", "GPTNeoXForCausalLM", "GPTNeoXForSequenceClassification", _ENCODER
    ),
    "mamba2": Tiny(
        "Mamba2Config",
        "Mamba2ForCausalLM",
        "",
        {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 8,
         "head_dim": 8, "state_size": 8, "n_groups": 1, "expand": 2, "chunk_size": 8,
         "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    ),
    "bert": Tiny("BertConfig", "BertForMaskedLM", "BertForSequenceClassification", _ENCODER),
    "roberta": Tiny(
        "RobertaConfig", "RobertaForMaskedLM", "RobertaForSequenceClassification", _ENCODER
    ),
    "deberta-v2": Tiny(
        "DebertaV2Config",
        "DebertaV2ForMaskedLM",
        "DebertaV2ForSequenceClassification",
        {**_ENCODER, "relative_attention": True, "pos_att_type": ["p2c", "c2p"],
         "pooler_hidden_size": 32},
    ),
    "modernbert": Tiny(
        "ModernBertConfig",
        "ModernBertForMaskedLM",
        "ModernBertForSequenceClassification",
        {**_ENCODER, "cls_token_id": 1, "sep_token_id": 2, "global_attn_every_n_layers": 2,
         "local_attention": 8, "reference_compile": False},
    ),
    "distilbert": Tiny(
        "DistilBertConfig",
        "DistilBertForMaskedLM",
        "DistilBertForSequenceClassification",
        {"vocab_size": 96, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4,
         "max_position_embeddings": 64, "pad_token_id": 0},
    ),
    "t5": Tiny(
        "T5Config",
        "T5ForConditionalGeneration",
        "T5ForSequenceClassification",
        {"vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
         "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0},
    ),
    "bart": Tiny(
        "BartConfig",
        "BartForConditionalGeneration",
        "BartForSequenceClassification",
        {"vocab_size": 96, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
         "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48,
         "decoder_ffn_dim": 48, "max_position_embeddings": 64, "pad_token_id": 0,
         "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2,
         "forced_eos_token_id": 2},
    ),
}  # fmt: skip


def tiny(family: str, *, task: str = "lm", seed: int = 0, meta: bool = False) -> Any:
    """Builds a tiny model in evaluation mode.

    Args:
        family: A key of `FAMILIES`.
        task: `"lm"` or `"classifier"` (three labels).
        seed: Seed of the weights; the global generator is left as it was.
        meta: Build on the meta device, without weights.

    Raises:
        InvalidOption: The family is unknown or has no such class.
    """
    row = FAMILIES.get(family)
    name = getattr(row, task, "")
    if row is None or not name:
        raise InvalidOption(f"no tiny {task} of {family!r}", fix=f"Families: {list(FAMILIES)}.")
    labels = {"num_labels": 3} if task == "classifier" else {}
    config = getattr(transformers, row.config)(**row.sizes, **labels)
    kind: Any = getattr(transformers, name)
    with torch.random.fork_rng(devices=[]), torch.device("meta" if meta else "cpu"):
        torch.manual_seed(seed)
        model: nn.Module = kind(config)
    return model.eval()


def tiny_batch(model: Any, *, rows: int = 4, length: int = 12, seed: int = 1) -> dict[str, Tensor]:
    """Returns input_ids (rows, length), attention_mask and labels that fit a tiny model."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 96, (rows, length), generator=generator)
    # classifiers of encoder-decoder kinds read the last end-of-text token of each row
    ids[:, -1] = 2
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    classifies = type(inner).__name__.endswith("SequenceClassification")
    batch["labels"] = torch.arange(rows) % 3 if classifies else ids.clone()
    return batch
