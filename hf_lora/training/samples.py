"""Answers of the model in training to fixed prompts, written down at each evaluation."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from hf_lora.errors import InvalidOption, TrainingError, shown
from hf_lora.formats.disk import Files, replace_files

FILE = "samples.jsonl"
Prompt = str | Sequence[Mapping[str, str]]  # text to go on with, or the messages of a chat


def check_prompts(prompts: object) -> tuple[Prompt, ...]:
    """Returns the prompts; InvalidOption where they are no list of texts or chats."""
    if isinstance(prompts, str) or not isinstance(prompts, Sequence):
        raise InvalidOption(
            f"samples={shown(prompts)} is no list of prompts",
            fix='Give a list: samples=["Once upon a time"].',
            field="samples",
        )
    for prompt in prompts:
        turns = () if isinstance(prompt, str) or not isinstance(prompt, Sequence) else prompt
        chat = bool(turns) and all(isinstance(t, Mapping) and "role" in t for t in turns)
        if not (chat or (isinstance(prompt, str) and prompt)):
            raise InvalidOption(
                f"{shown(prompt)} in samples is neither a text nor the messages of a chat",
                fix='A chat is [{"role": "user", "content": "..."}].',
                field="samples",
            )
    return tuple(prompts)


def check_can_answer(model: Any, tokenizer: Any, prompts: Sequence[Prompt], tokens: int) -> None:
    """Raises TrainingError where prompts were given and the model or its tokenizer cannot answer.

    A run finds out at its first step, not at its first evaluation.

    Args:
        model: The bare model.
        tokenizer: The trainer's, None where it has none.
        prompts: From `check_prompts`.
        tokens: The longest answer.
    """
    if not prompts:
        return
    if not callable(getattr(model, "generate", None)) or not model.can_generate():
        raise TrainingError(
            f"{type(model).__name__} generates no text, so it cannot answer the samples",
            fix="Leave samples= out.",
        )
    if tokenizer is None or not callable(getattr(tokenizer, "decode", None)):
        raise TrainingError(
            "samples need a tokenizer, and the trainer has none",
            fix="Give it to the trainer: processing_class=tokenizer.",
        )
    if any(not isinstance(p, str) for p in prompts) and not tokenizer.chat_template:
        raise TrainingError(
            "a chat among the samples needs a chat template, and the tokenizer has none",
            fix="Give plain texts as samples, or set tokenizer.chat_template.",
        )
    for prompt in prompts:
        _check_length(model, prompt, _length(tokenizer, prompt), tokens)


def _length(tokenizer: Any, prompt: Prompt) -> int:
    try:
        return _encode(tokenizer, prompt).shape[1]
    except Exception as error:  # a chat template raises what it likes
        why = " ".join(str(error).split())[:300] or type(error).__name__
        raise TrainingError(
            f"the tokenizer cannot encode {shown(prompt)} of the samples ({why})",
            fix="Give it as its chat template takes it, or as a plain text.",
            field="samples",
        ) from None


def _check_length(model: Any, prompt: Prompt, length: int, tokens: int) -> None:
    """Raises TrainingError for a prompt of no tokens, or one that leaves no room to answer."""
    if not length:
        raise TrainingError(f"{shown(prompt)} of the samples has no tokens", field="samples")
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    apart = model.config.is_encoder_decoder  # prompt and answer have positions of their own
    needed = max(length, tokens) if apart else length + tokens
    if isinstance(most, int) and needed > most:
        raise TrainingError(
            f"{shown(prompt)} of the samples has {length} tokens, and with an answer of {tokens} "
            f"goes past the {most} positions of {type(model).__name__}",
            fix="Shorten it, or lower sample_tokens.",
            field="samples",
        )


@torch.no_grad()
def answers(model: Any, tokenizer: Any, prompts: Sequence[Prompt], tokens: int) -> list[str]:
    """Returns the greedy answers, each of at most `tokens` tokens.

    Mode, cache setting and random states of the model are afterwards as before, so that a run is
    the same, bit for bit, with samples and without.
    """
    said = []
    with _answering(model):
        for prompt in prompts:
            ids = _encode(tokenizer, prompt).to(model.device)
            limits: Any = {"max_new_tokens": tokens, "attention_mask": torch.ones_like(ids)}
            if model.generation_config.pad_token_id is None:
                limits["pad_token_id"] = tokenizer.eos_token_id
            whole = model.generate(ids, do_sample=False, use_cache=True, **limits)
            new = whole[0] if model.config.is_encoder_decoder else whole[0, ids.shape[1] :]
            said.append(str(tokenizer.decode(new.tolist(), skip_special_tokens=True)))
    return said


def _encode(tokenizer: Any, prompt: Prompt) -> torch.Tensor:
    if isinstance(prompt, str):
        ids = tokenizer(prompt)["input_ids"]
    else:
        text = tokenizer.apply_chat_template(
            list(prompt), tokenize=False, add_generation_prompt=True
        )
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return torch.tensor([ids])


@contextmanager
def _answering(model: Any) -> Any:
    modes = [(module, module.training) for module in model.modules()]
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        model.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training


def ask(
    model: Any, tokenizer: Any, prompts: Sequence[Prompt], tokens: int, *, step: int, args: Any
) -> None:
    """Lets the model answer and writes it down in the output folder of Trainer's arguments."""
    folder = Path(args.output_dir)
    said = answers(model, tokenizer, prompts, tokens)
    write_down(folder, step, prompts, said, _board(args, folder))


def write_down(
    folder: Path, step: int, prompts: Sequence[Prompt], said: Sequence[str], board: Any = None
) -> None:
    """Adds the answers to `samples.jsonl`, and to TensorBoard where a writer is given.

    Rows of this step and of later ones go: they are of a run that was interrupted, and this one
    went on from a checkpoint before them.
    """
    rows = _rows_before(folder / FILE, step)
    for prompt, answer in zip(prompts, said, strict=True):
        row = {"step": step, "prompt": prompt, "answer": answer}
        rows.append(json.dumps(row, ensure_ascii=False).encode())
    replace_files(Files(folder, {FILE: [row + b"\n" for row in rows]}))
    if board is not None:
        for i, (prompt, answer) in enumerate(zip(prompts, said, strict=True)):
            asked = prompt if isinstance(prompt, str) else prompt[-1].get("content", "")
            board.add_text(f"samples/{i}", f"**{asked}**\n\n{answer}", step)
        board.flush()


def _rows_before(path: Path, step: int) -> list[bytes]:
    """Returns the lines of the file that are of earlier steps, and those it cannot read."""
    kept = []
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        try:
            earlier = json.loads(line)["step"] < step
        except (ValueError, KeyError, TypeError, RecursionError):
            earlier = bool(line)
        if earlier:
            kept.append(line)
    return kept


def _board(args: Any, folder: Path) -> Any:
    """Returns a TensorBoard writer when Trainer reports to TensorBoard; None when it does not."""
    if "tensorboard" not in args.report_to:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder / "runs" / "samples"))
