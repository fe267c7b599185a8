"""Tiny bases with a real tokenizer, and files of rows, for the tests of `hf-lora train`."""

import json

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ("<|im_start|>", "<|im_end|>", "<s>", "</s>", "[INST]", "[/INST]", "<|eot_id|>",
           "<|start_header_id|>", "<|end_header_id|>", "<start_of_turn>", "<end_of_turn>",
           "<bos>", "<pad>")  # fmt: skip
MERGES = [("h", "e"), ("Ġ", "t"), ("Ċ", "Ċ"), ("o", "r"), ("l", "l"), ("he", "ll"), ("Ġt", "he")]


def tokenizer(template=CHATML, eos="<|im_end|>", pad="<pad>"):
    """A byte-level BPE tokenizer with a few merges, one of which joins two line breaks."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *("".join(pair) for pair in MERGES)]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=MERGES))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token=eos, pad_token=pad, bos_token="<s>"
    )
    made.chat_template = template
    return made


def base(folder, family="llama", seed=0, template=CHATML, **fields):
    """Saves a tiny model with the tokenizer; returns the folder's name."""
    made = tokenizer(template)
    sizes = {
        "vocab_size": len(made), "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 128, "pad_token_id": made.pad_token_id,
        "bos_token_id": made.bos_token_id, "eos_token_id": made.eos_token_id,
    }  # fmt: skip
    kinds = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "bert": (transformers.BertConfig, transformers.BertForMaskedLM),
        "bloom": (transformers.BloomConfig, transformers.BloomForCausalLM),
        "t5": (transformers.T5Config, transformers.T5ForConditionalGeneration),
    }
    config, kind = kinds[family]
    if family == "bloom":
        sizes = {"vocab_size": len(made), "hidden_size": 32, "n_layer": 1, "n_head": 4}
    if family == "t5":
        sizes = {"vocab_size": len(made), "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        kind(config(**sizes, **fields)).save_pretrained(folder)
    made.save_pretrained(folder)
    return str(folder)


def write(path, rows):
    """Writes rows as JSON Lines; returns the path as text."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def chats(count):
    """Conversations of one question and one answer, all different."""
    return [
        {"messages": [{"role": "user", "content": f"say {i} " + "x" * (i % 5)},
                      {"role": "assistant", "content": f"{i}!"}]}
        for i in range(count)
    ]  # fmt: skip


def labelled(count):
    """Texts of two classes that one letter tells apart."""
    return [
        {"text": f"{'zzz' if i % 2 else 'aaa'} {i}", "label": "bad" if i % 2 else "good"}
        for i in range(count)
    ]
