"""Fine-tune a classifier: the fresh head is trained and saved with the LoRA.

A LoRA on a frozen, randomly made head learns little, and a file without the head is useless. You
see that both are trained, and that a new model gets both back from the file. The model is a tiny
BERT with random weights, so nothing is downloaded: about ten seconds on a laptop.
"""

import tempfile

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from hf_lora import attach_lora, load_lora, save_lora


def tiny_classifier(seed=0):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_labels=2,
    )
    model = BertForSequenceClassification(config).eval()
    torch.manual_seed(seed)  # the head is fresh in every process, unlike the pretrained trunk
    torch.nn.init.normal_(model.classifier.weight, std=0.02)
    return model


def rows(count, seed):
    """Returns rows of ids whose label says whether most of them are in the upper half."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        upper = torch.rand(1, generator=generator).item() < 0.5
        ids = torch.randint(0, 48, (15,), generator=generator) + (16 if upper else 0)
        yield {"input_ids": ids, "labels": int(upper)}


def accuracy(model, data):
    with torch.no_grad():
        logits = model(torch.stack([row["input_ids"] for row in data])).logits
    labels = torch.tensor([row["labels"] for row in data])
    return (logits.argmax(-1) == labels).float().mean().item()


def main():
    held_out = list(rows(200, seed=1))
    model = tiny_classifier()
    before = accuracy(model, held_out)
    attach_lora(model)

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=60,
            learning_rate=5e-3,
            logging_strategy="no",
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
        )
        Trainer(model=model, args=arguments, train_dataset=list(rows(256, seed=2))).train()
        save_lora(model, f"{folder}/lora")
        fresh = tiny_classifier(seed=3)
        print(load_lora(fresh, f"{folder}/lora"))

    after, loaded = accuracy(model.eval(), held_out), accuracy(fresh.eval(), held_out)
    print(f"accuracy: base {before:.2f}, trained {after:.2f}, loaded in a new model {loaded:.2f}")


if __name__ == "__main__":
    main()
