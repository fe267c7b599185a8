"""What the model in training makes of fixed prompts, written down as the run goes on.

A language model answers them, here; a model of another kind says itself what it does (`Sampler`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from hf_lora.errors import InvalidOption, TrainingError, shown
from hf_lora.formats.disk import Files, replace_files
from hf_lora.training.sharding import is_sharding

FILE = "samples.jsonl"
# Text to go on with or to draw, the messages of a chat, or {"prompt": text, option: value}
Prompt = str | Sequence[Mapping[str, str]] | Mapping[str, Any]


class Sampler(Protocol):
    """What a model makes of prompts; one that is no language model has it as `lora_sampler`."""

    def check(self) -> None:
        """Raises TrainingError or InvalidOption where it cannot be made."""

    def write(self, step: int, args: Any) -> None:
        """Makes it and writes it down in the output folder of Trainer's arguments.

        The model, and all that a run depends on, is afterwards as before, bit for bit.
        """


class Samples:
    """The samples of a run: taken once a step, by one process.

    Args:
        prompts: What to make samples of.
        tokens: The longest answer.

    Raises:
        InvalidOption: They are no list of prompts.
    """

    def __init__(self, prompts: object, tokens: int) -> None:
        self._prompts, self._tokens = check_prompts(prompts), tokens
        self._sampler: Sampler | None = None
        self._taken = -1  # the last step with samples

    def begin(self, model: Any, tokenizer: Any) -> None:
        """Finds out before the first step whether the samples can be made.

        Args:
            model: The bare model.
            tokenizer: The trainer's, None where it has none.

        Raises:
            TrainingError: The model or its tokenizer cannot make them.
            InvalidOption: A sample has an option that the model does not know.
        """
        self.end()
        if not self._prompts:
            return
        if is_sharding(model) and torch.distributed.get_world_size() > 1:
            raise TrainingError(
                "samples are made by one process, and FSDP2 gives each a part of the model",
                fix="Leave samples= out, or use DDP (torchrun without fsdp).",
                field="samples",
            )
        own = getattr(model, "lora_sampler", None)
        answers = Answers(model, tokenizer, self._prompts, self._tokens)
        sampler: Sampler = own(self._prompts) if callable(own) else answers
        sampler.check()
        self._sampler = sampler

    def take(self, args: Any, state: Any) -> None:
        """Takes samples, unless this step has them: several evaluation sets are one evaluation."""
        if self._sampler is None or not state.is_world_process_zero:
            return
        if self._taken != state.global_step:
            self._taken = state.global_step
            self._sampler.write(state.global_step, args)

    def take_without_evaluation(self, args: Any, state: Any) -> None:
        """Takes samples at a save or at the end of a run that is never evaluated."""
        if args.eval_strategy == "no":
            self.take(args, state)

    def end(self) -> None:
        """Lets go of the model."""
        self._sampler, self._taken = None, -1


def check_prompts(prompts: object) -> tuple[Prompt, ...]:
    """Returns the prompts; InvalidOption where they are no list of texts, chats or mappings."""
    if isinstance(prompts, str) or not isinstance(prompts, Sequence):
        raise InvalidOption(
            f"samples={shown(prompts)} is no list of prompts",
            fix='Give a list: samples=["Once upon a time"].',
            field="samples",
        )
    for prompt in prompts:
        if not (_is_text(prompt) or _is_chat(prompt) or _has_options(prompt)):
            raise InvalidOption(
                f"{shown(prompt)} in samples is neither a text nor the messages of a chat",
                fix='A chat is [{"role": "user", "content": "..."}]; a pipeline also takes '
                '{"prompt": "...", "seed": 3}.',
                field="samples",
            )
    return tuple(prompts)


def _is_text(prompt: object) -> bool:
    return isinstance(prompt, str) and bool(prompt)


def _is_chat(prompt: object) -> bool:
    turns = prompt if isinstance(prompt, Sequence) and not isinstance(prompt, str) else ()
    return bool(turns) and all(isinstance(t, Mapping) and "role" in t for t in turns)


def _has_options(prompt: object) -> bool:
    """Tells whether it is a text with options, of values that Trainer's state can hold."""
    if not isinstance(prompt, Mapping) or not _is_text(prompt.get("prompt")):
        return False
    return all(isinstance(k, str) and isinstance(v, str | int | float) for k, v in prompt.items())


@dataclass(frozen=True)
class Answers:
    """The answers of a language model.

    Attributes:
        model: The bare model.
        tokenizer: The trainer's, None where it has none.
        prompts: From `check_prompts`.
        tokens: The longest answer.
    """

    model: Any
    tokenizer: Any
    prompts: Sequence[Prompt]
    tokens: int

    def check(self) -> None:
        """Raises TrainingError where the model or its tokenizer cannot answer."""
        check_can_answer(self.model, self.tokenizer, self.prompts, self.tokens)

    def write(self, step: int, args: Any) -> None:
        """Lets the model answer and writes it down."""
        said = answers(self.model, self.tokenizer, self.prompts, self.tokens)
        pairs = list(zip(self.prompts, said, strict=True))
        folder = Path(args.output_dir)
        write_rows(folder, step, [{"prompt": p, "answer": answer} for p, answer in pairs])
        writer = board(args, folder)
        if writer is not None:
            for i, (prompt, answer) in enumerate(pairs):
                last: Any = prompt if isinstance(prompt, str) else [*prompt][-1]
                asked = last if isinstance(last, str) else last.get("content", "")
                writer.add_text(f"samples/{i}", f"**{asked}**\n\n{answer}", step)
            writer.flush()


def check_can_answer(model: Any, tokenizer: Any, prompts: Sequence[Prompt], tokens: int) -> None:
    """Raises TrainingError where the model or its tokenizer cannot answer, see `Answers`."""
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
    for prompt in prompts:
        if isinstance(prompt, Mapping):
            raise TrainingError(
                f"{shown(prompt)} of the samples is for a pipeline, and {type(model).__name__} "
                "answers texts and chats",
                fix="Give its text alone.",
                field="samples",
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


def write_rows(folder: Path, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
    """Adds the rows of a step to `samples.jsonl`.

    Rows of this step and of later ones go: they are of a run that was interrupted, and this one
    went on from a checkpoint before them.
    """
    lines = _rows_before(folder / FILE, step)
    lines += [json.dumps({"step": step, **row}, ensure_ascii=False).encode() for row in rows]
    replace_files(Files(folder, {FILE: [line + b"\n" for line in lines]}))


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


def board(args: Any, folder: Path) -> Any:
    """Returns a TensorBoard writer when Trainer reports to TensorBoard; None when it does not."""
    if "tensorboard" not in args.report_to:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder / "runs" / "samples"))
