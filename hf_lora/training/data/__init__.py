"""Rows of files -> token rows to learn from and to be judged by, with a count of what was cut."""

from __future__ import annotations

import datetime
import hashlib
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from hf_lora.errors import BadDataset, InvalidOption, LoraError, listing
from hf_lora.training.data.chat import ChatEncoder, Example, template_for
from hf_lora.training.data.jsonl import Line, data_files, read_lines
from hf_lora.training.data.shapes import Item, Task, shape_of
from hf_lora.training.data.tokens import TokenRows

MOST_HELD_OUT = 512  # rows a held-out share takes at most: enough for a loss to two digits


@dataclass(frozen=True)
class Data:
    """What a run learns from.

    Attributes:
        task: What the rows are for.
        train: Sequences to learn from.
        held_out: Sequences to be judged by; may be empty.
        labels: Names of the classes in their order, for the task `label`.
        rows: Rows of the files, those held out included.
        notes: What a reader should know: rows cut, dropped or rendered apart.
        digest: SHA-256 over both sets of sequences.
        template: Text of the chat template when it is not the tokenizer's own.
        dated: Whether the template shows a date.
    """

    task: Task
    train: TokenRows
    held_out: TokenRows
    labels: tuple[str, ...]
    rows: int
    notes: tuple[str, ...]
    digest: str
    template: str | None = None
    dated: bool = False


class Encoder(Protocol):
    """Turns an item into sequences."""

    def encode(self, item: Item) -> list[Example]:
        """Returns the sequences of one row."""


class TextEncoder:
    """Turns a text into one sequence that ends with the token for the end of a text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer: Any = tokenizer

    def encode(self, item: Item) -> list[Example]:
        """Returns the tokens; all but the first are learnt: nothing comes before it."""
        ids = list(self.tokenizer(item.text)["input_ids"])
        end = self.tokenizer.eos_token_id
        if end is not None and ids[-1:] != [end]:
            ids.append(end)
        return [Example(ids, [False, *[True] * (len(ids) - 1)][: len(ids)])]


class LabelEncoder:
    """Turns a labelled text into one sequence with a class, cut as the tokenizer cuts it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        self.tokenizer: Any = tokenizer
        self.max_length = max_length
        self.cut = 0

    def encode(self, item: Item) -> list[Example]:
        """Returns the tokens; a cut sequence keeps the tokens that end every sequence."""
        ids = self.tokenizer(item.text)["input_ids"]
        if len(ids) > self.max_length:
            self.cut += 1
            ids = self.tokenizer(item.text, truncation=True, max_length=self.max_length)[
                "input_ids"
            ]
        return [Example(ids, [True] * len(ids), item.label)]


@dataclass
class _Reader:
    """Reads files into `rows`; the first row decides the task, if nothing else has."""

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    template: str | None
    today: datetime.date | None
    task: Task | None
    progress: Callable[[Iterable[Line]], Iterable[Line]]
    rows: TokenRows = field(default_factory=TokenRows)
    groups: list[range] = field(default_factory=list)  # for each row of a file, its sequences
    names: dict[str | int, int] = field(default_factory=dict)  # label as spelt -> class
    encoder: Encoder | None = None
    cut: int = 0
    unanswered: int = 0
    template_text: str | None = None

    def read(self, paths: Sequence[str], *, new_names: bool = True) -> None:
        """Reads all rows of the paths.

        Args:
            paths: Files and folders.
            new_names: Whether classes may come up that were not there before.
        """
        shape = None
        before = len(self.groups)
        for line in self.progress(read_lines(data_files(paths))):
            try:
                if shape is None:
                    shape = shape_of(line.value, self.task)
                    self.task = shape.task
                    self.encoder = self.encoder or self._encoder(shape.task)
                self._take(shape.item(line.value), new_names)
            except InvalidOption:
                raise
            except LoraError as error:
                raise error.within(file=line.where) from None
        if len(self.groups) == before or not any(self.groups[before:]):
            raise BadDataset(
                f"no row of {listing(paths)} is left to learn from: every answer lies beyond "
                f"{self.max_length} tokens, or is empty",
                fix="Raise --max-length.",
            )

    def _encoder(self, task: Task) -> Encoder:
        if task == "label":
            return LabelEncoder(self.tokenizer, self.max_length)
        if task == "text":
            return TextEncoder(self.tokenizer)
        self.template_text = template_for(self.tokenizer, self.template)
        return ChatEncoder(self.tokenizer, self.template_text, self.today)

    def _take(self, item: Item, new_names: bool) -> None:
        assert self.encoder is not None  # made with the first row
        first = len(self.rows)
        for example in self.encoder.encode(item):
            ids, learnt = example.ids[: self.max_length], example.learnt[: self.max_length]
            self.cut += len(ids) < len(example.ids)
            if any(learnt[1:]) or (example.label is not None and ids):
                # nothing comes before the first token that it could be learnt from
                self.rows.append(ids, [False, *learnt[1:]], self._class(example.label, new_names))
            else:
                self.unanswered += 1
        self.groups.append(range(first, len(self.rows)))

    def _class(self, label: str | int | None, new_names: bool) -> int | None:
        if label is None:
            return None
        if label not in self.names:
            if not new_names:
                known = listing(map(repr, self.names), limit=12)
                raise BadDataset(
                    f"the label {label!r} does not occur in the training data, which has {known}",
                    fix="Correct it, or add rows of this class to --data.",
                    field="label",
                )
            if self.names and type(label) is not type(next(iter(self.names))):
                raise BadDataset(
                    f"the label is {label!r}, and others are like {next(iter(self.names))!r}",
                    fix="Use texts throughout, or whole numbers throughout.",
                    field="label",
                )
            self.names[label] = len(self.names)
        return self.names[label]


def load_data(
    paths: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    task: Task | None = None,
    eval_paths: Sequence[str] = (),
    held_out: float = 0.05,
    seed: int = 0,
    labels: Sequence[str] = (),
    known_labels: Sequence[str] = (),
    template: str | None = None,
    today: datetime.date | None = None,
    progress: Callable[[Iterable[Line]], Iterable[Line]] = iter,
) -> Data:
    """Reads and tokenises the data of a run.

    Args:
        paths: `.jsonl` files, or folders of them.
        tokenizer: Of the model.
        max_length: Tokens after which a sequence is cut.
        task: `chat`, `text` or `label`; None to take that of the first row.
        eval_paths: Files to be judged by; without them a share of the rows is held out.
        held_out: Share of the rows to hold out, at most `MOST_HELD_OUT` rows; 0 for none.
        seed: Seed of which rows are held out.
        labels: Names of the classes in the order of their numbers; left out, they are taken from
            the data: numbers in their order, names by alphabet.
        known_labels: Names that the base has for its classes, in their order: taken where the data
            has no others, so that a trained head keeps its meaning.
        template: For chat: a name of `TEMPLATES` or a file, instead of the tokenizer's own.
        today: For chat: the date in templates that show one.
        progress: Wraps the stream of rows, to show how far it is.

    Raises:
        BadDataset: A file or row cannot be used; the message names file and line.
        InvalidOption: `labels` are not those of the data, or there is no chat template.
    """
    reader = _Reader(tokenizer, max_length, template, today, task, progress)
    reader.read(paths)
    rows = len(reader.groups)
    if eval_paths:
        reader.read(eval_paths, new_names=False)
        chosen = set(range(rows, len(reader.groups)))
    else:
        chosen = _draw(rows, held_out, seed)
    known = _name_classes(reader, labels, known_labels, rows) if reader.task == "label" else ()
    train, held = (
        reader.rows.view(
            [i for n, group in enumerate(reader.groups) if (n in chosen) is held for i in group]
        )
        for held in (False, True)
    )
    if not len(train):
        raise BadDataset(
            f"all of the {rows} rows would be held out, or hold nothing to learn",
            fix="Give more rows, or --held-out 0.",
        )
    state = hashlib.sha256()
    for part in (train, held):
        state.update(len(part).to_bytes(8, "little"))
        part.digest(state)
    encoder = reader.encoder
    assert reader.task is not None  # a file without rows is an error
    return Data(
        task=reader.task,
        train=train,
        held_out=held,
        labels=known,
        rows=len(reader.groups),
        notes=tuple(_notes(reader, train, held)),
        digest=state.hexdigest(),
        template=reader.template_text,
        dated=isinstance(encoder, ChatEncoder) and encoder.dated,
    )


def _draw(rows: int, share: float, seed: int) -> set[int]:
    """Returns which rows are held out: the same for the same number of rows, share and seed."""
    wanted = min(MOST_HELD_OUT, max(1, round(share * rows))) if share > 0 and rows > 1 else 0
    return set(random.Random(seed).sample(range(rows), wanted))


def _name_classes(
    reader: _Reader, wanted: Sequence[str], known: Sequence[str], rows: int
) -> tuple[str, ...]:
    """Numbers the classes and returns their names in that order."""
    found = {str(label): number for label, number in reader.names.items()}
    if len(found) < 2:
        raise BadDataset(
            f"all {rows} rows have the label {next(iter(reader.names))!r}",
            fix="A classifier needs rows of at least two classes.",
            field="label",
        )
    order = [str(label) for label in sorted(reader.names)]
    if wanted:
        twice = [name for name in wanted if list(wanted).count(name) > 1]
        missing = [name for name in order if name not in wanted]
        if twice or missing:
            raise InvalidOption(
                f"--labels names {twice[0]!r} twice"
                if twice
                else f"--labels lacks {listing(map(repr, missing))}, which the data has",
                fix="Name every class once, or leave the option out.",
                field="labels",
            )
        order = list(wanted)
    elif found.keys() <= set(known):
        order = list(known)
    number = {name: i for i, name in enumerate(order)}
    by_old = sorted(found, key=lambda name: found[name])
    reader.rows.rename_classes([number[name] for name in by_old])
    return tuple(order)


def _notes(reader: _Reader, train: TokenRows, held: TokenRows) -> Iterable[str]:
    encoder = reader.encoder
    cut = reader.cut + (encoder.cut if isinstance(encoder, LabelEncoder) else 0)
    if cut:
        yield f"{cut} sequences were cut at {reader.max_length} tokens"
    if reader.unanswered:
        yield f"{reader.unanswered} sequences were dropped: nothing to learn is left of them"
    if isinstance(encoder, ChatEncoder):
        if encoder.apart:
            yield (
                f"{encoder.apart} conversations were split, one answer each: the chat template "
                "shows earlier answers otherwise than it asks for them"
            )
        if encoder.opening:
            yield f"{encoder.opening} conversations begin with the assistant: that is not learnt"
        if encoder.unthinking:
            yield (
                f"{encoder.unthinking} conversations are learnt as with enable_thinking=False: ask "
                "the model so"
            )
        if encoder.endless:
            yield "the chat template has no token at the end of an answer: none is learnt"
    if not len(held):
        yield "no rows are held out: nothing says whether it learns more than its rows by heart"
    twice = _twice(train, held)
    if twice:
        yield f"{twice} of {len(held)} held-out sequences also stand in the training rows"


def _twice(train: TokenRows, held: TokenRows) -> int:
    if not len(held):
        return 0
    seen = {hash(tuple(train[i]["input_ids"])) for i in range(len(train))}
    return sum(hash(tuple(held[i]["input_ids"])) in seen for i in range(len(held)))
