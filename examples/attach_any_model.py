"""Attach a LoRA to a model, train it, save it, and load it in plain peft.

You see the plan (which layers get a LoRA and why), the loss before and after a few steps, and at
the end that plain peft computes exactly the same from the saved file. The model is a tiny Llama
with random weights, so nothing is downloaded: about ten seconds on a laptop. Replace `tiny_model`
by `AutoModelForCausalLM.from_pretrained(...)` and the rest stays the same.
"""

import tempfile

import torch
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from hf_lora import attach_lora, base_model, plan_lora, save_lora


def tiny_model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.1,
    )
    return LlamaForCausalLM(config).eval()


def counting_rows(rows=64, length=16):
    """Returns rows that count upwards: something a small LoRA can learn."""
    for start in range(rows):
        numbers = torch.arange(start, start + length) % 64
        yield {"input_ids": numbers, "labels": numbers}


def loss_of(model, row):
    with torch.no_grad():
        return model(input_ids=row["input_ids"][None], labels=row["labels"][None]).loss.item()


def main():
    data = list(counting_rows())
    model = tiny_model()
    print(plan_lora(model))
    attach_lora(model, rank=8)

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=60,
            learning_rate=1e-2,
            logging_strategy="no",
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
        )
        Trainer(model=model, args=arguments, train_dataset=data).train()
        model.eval()
        save_lora(model, f"{folder}/lora")
        judge = PeftModel.from_pretrained(tiny_model(), f"{folder}/lora").eval()

    with base_model(model):
        base_loss = loss_of(model, data[0])
    tokens = data[0]["input_ids"][None]
    with torch.no_grad():
        same = torch.equal(model(tokens).logits, judge(tokens).logits)
    print(f"loss: base {base_loss:.3f}, with the LoRA {loss_of(model, data[0]):.3f}")
    print(f"plain peft computes the same from the file, bit for bit: {same}")


if __name__ == "__main__":
    main()
