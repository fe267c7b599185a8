"""A conversation -> tokens, and which of them the assistant said: only those are learnt.

The spans are found, never guessed. What the template renders before an answer, with the generation
prompt, must be the beginning of what it renders for the whole; so must what it renders up to the
end of the answer. Where a template rewrites earlier turns (thinking that it strips, marks that it
puts behind the last answer alone), each answer becomes an example of its own, rendered as the
model will see it when it is asked. Where even that does not hold, the row is refused.
"""

from __future__ import annotations

import datetime
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from hf_lora.errors import BadDataset, InvalidOption, listing
from hf_lora.training.data.shapes import Item, Message

ASSISTANT = "assistant"
OPTION = "--chat-template"

_LARGEST_TEMPLATE = 1 << 20  # characters
_SEEN = 32  # characters of a message that must be found in what a template renders
_SHOWS_DATE = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")
_MARKS_ANSWERS = re.compile(r"\{%-?\s*generation\s*-?%\}")

# Built-in templates, for tokenizers that have none.
TEMPLATES = {
    # the form of OpenAI's early chat models, which Qwen, SmolLM and many others keep
    "chatml": "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] "
    "+ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    # for any tokenizer: it needs no token beside the one that ends a text
    "plain": "{% for m in messages %}{{ m['role'] | capitalize + ':' }}{{ ' ' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}",
}
_NEEDED_TOKENS = {"chatml": ("<|im_start|>", "<|im_end|>")}


@dataclass(frozen=True)
class Example:
    """One sequence to learn from.

    Attributes:
        ids: Tokens, (tokens,).
        learnt: For each token whether the loss counts it.
        label: The class as the row spells it, for classification.
        whole: Whether the whole row is in it; False for one answer of several.
    """

    ids: Sequence[int]
    learnt: Sequence[bool]
    label: str | int | None = None
    whole: bool = True


def template_for(tokenizer: PreTrainedTokenizerBase, wanted: str | None) -> str | None:
    """Returns the text of the template to use, or None for the tokenizer's own.

    Args:
        tokenizer: The tokenizer.
        wanted: A key of `TEMPLATES`, the path of a Jinja file, or None.

    Raises:
        InvalidOption: The tokenizer has no template and none is given, the file cannot be read, or
            the tokenizer lacks the tokens that a built-in template is made of.
    """
    known = tokenizer.get_vocab()
    usable = [name for name in TEMPLATES if all(t in known for t in _NEEDED_TOKENS.get(name, ()))]
    if wanted is None:
        if not tokenizer.chat_template:
            raise InvalidOption(
                "the tokenizer of the model has no chat template",
                fix=f"Give one: {OPTION} {usable[0]}, or {OPTION} FILE with a Jinja template.",
                field="chat_template",
            )
        return None
    if wanted not in TEMPLATES:
        return _template_file(wanted)
    if wanted not in usable:
        raise InvalidOption(
            f"the template {wanted!r} is made of {' and '.join(_NEEDED_TOKENS[wanted])}, which are "
            "no tokens of this model: it would not learn to stop at one",
            fix=f"Use {OPTION} {usable[0]}, or {OPTION} FILE with a Jinja template.",
            field="chat_template",
        )
    return TEMPLATES[wanted]


def _template_file(path: str) -> str:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or "it is no UTF-8 text"
        raise InvalidOption(
            f"the chat template {path!r} cannot be read ({why})",
            fix=f"Give a file with a Jinja template, or one of: {', '.join(TEMPLATES)}.",
            field="chat_template",
        ) from None
    if not text.strip() or len(text) > _LARGEST_TEMPLATE:
        size = "empty" if not text.strip() else f"longer than {_LARGEST_TEMPLATE:,} characters"
        raise InvalidOption(f"the chat template {path!r} is {size}", field="chat_template")
    return text


@dataclass(frozen=True)
class _Form:
    """One way of calling a template.

    Attributes:
        parts: Whether contents are lists of parts, as templates of multimodal models want them.
        variables: What the template is told besides.
    """

    parts: bool = False
    variables: Mapping[str, Any] = field(default_factory=dict)


def _forms(source: str, always: Mapping[str, Any]) -> Iterator[_Form]:
    """Yields the forms to try, those that the template itself prefers first."""
    plain = {"enable_thinking": False}
    for variables in (always, *([{**always, **plain}] if "enable_thinking" in source else [])):
        yield _Form(variables=variables)
        if "type" in source and "text" in source:
            yield _Form(parts=True, variables=variables)


def _in_parts(message: Message) -> Message:
    content = message.get("content")
    if not isinstance(content, str):
        return message
    return {**message, "content": [{"type": "text", "text": content}]}


class ChatEncoder:
    """Turns conversations into examples, with the tokenizer's chat template.

    Args:
        tokenizer: The tokenizer.
        template: Text of the template instead of its own.
        today: The date that a template shows which asks for one, so that a run can be repeated on
            another day; None for the day of the run.

    Attributes:
        apart: Conversations whose answers became examples of their own.
        opening: Conversations that begin with the assistant, whose first words answer nothing and
            are not learnt.
        unthinking: Conversations that are as the template has them without thinking: with it, its
            prompt opens a thought that the answers lack.
        endless: Whether an answer ended without a token that marks its end.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: str | None = None,
        today: datetime.date | None = None,
    ) -> None:
        self.tokenizer: Any = tokenizer
        own = tokenizer.chat_template
        source = template or (own if isinstance(own, str) else (own or {}).get("default", ""))
        self._marks = bool(_MARKS_ANSWERS.search(source))
        self._source = source
        ends = {*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens}
        self._ends = tuple(sorted(filter(None, ends), key=len, reverse=True))
        self.dated = bool(_SHOWS_DATE.search(source))
        if self.dated and today is not None:
            # a template is given plain data alone, so the function cannot be replaced
            template = _SHOWS_DATE.sub(lambda m: repr(today.strftime(m[2])), source)
        self._forms = tuple(_forms(source, {"chat_template": template}))
        self._form = self._forms[0]
        self.apart = self.opening = self.unthinking = 0
        self.endless = False

    def encode(self, item: Item) -> list[Example]:
        """Returns the examples of one conversation.

        Raises:
            BadDataset: There is no answer to learn, or the template refuses the conversation or
                renders it so that the answers cannot be found.
        """
        messages = item.messages
        self._check_fits(item)
        answers = [i for i, m in enumerate(messages) if i and m["role"] == ASSISTANT]
        if not answers:
            raise BadDataset(
                "the conversation has no answer: no message behind the first is of the role "
                "'assistant'",
                fix=f"Its roles: {listing(m['role'] for m in messages)}.",
            )
        self.opening += messages[0]["role"] == ASSISTANT
        first: BadDataset | None = None
        for form in self._forms:
            self._form = form
            try:
                found = self._encoded(item, answers)
            except BadDataset as error:
                first = first or error
            else:
                self.apart += not found[0].whole
                self.unthinking += "enable_thinking" in self._form.variables
                return found
        raise first or BadDataset("the chat template has no form")

    def _encoded(self, item: Item, answers: Sequence[int]) -> list[Example]:
        """Returns the examples as the template gives them in the present form."""
        if self._marks:
            self._check_shown(self._render(item.messages, item.tools), item.messages)
            return [self._marked(item)]
        known = item.messages[: answers[-1] + 1]  # what is behind the last answer teaches nothing
        whole = self._render(known, item.tools)
        self._check_shown(whole, known)
        spans = []
        for i in answers:
            span = self._span(whole, known, i, item.tools)
            if span is None:
                return [self._alone(known[: i + 1], item.tools) for i in answers]
            spans.append(span)
        return [self._example(whole, spans)]

    def _check_shown(self, text: str, messages: Sequence[Message]) -> None:
        """A template for lists of parts walks over a text in silence, and shows nothing of it."""
        for number, message in enumerate(messages, 1):
            # the end: of thoughts before it, templates show what they like
            end = str(message.get("content") or "").strip()[-_SEEN:]
            if message["role"] in (ASSISTANT, "user") and end not in text:
                raise BadDataset(
                    f"the chat template does not show the content of message {number}",
                    fix=f"Give another template with {OPTION}.",
                )

    def _check_fits(self, item: Item) -> None:
        """A template that knows no tools would drop them without a word."""
        used = {"tools": item.tools, "tool_calls": any("tool_calls" in m for m in item.messages)}
        for word, value in used.items():
            if value and word not in self._source:
                raise BadDataset(
                    f"the row has {word!r}, which the chat template does not know",
                    fix=f"Leave it out, or give a template that does with {OPTION} FILE.",
                )

    def _render(
        self, messages: Sequence[Message], tools: list[Any] | None, *, prompt: bool = False
    ) -> str:
        return str(self._apply(messages, tools=tools, add_generation_prompt=prompt, tokenize=False))

    def _apply(self, messages: Sequence[Message], **options: Any) -> Any:
        shown = [_in_parts(m) for m in messages] if self._form.parts else list(messages)
        try:
            return self.tokenizer.apply_chat_template(shown, **self._form.variables, **options)
        except Exception as error:  # a template may raise anything, to refuse or by mistake
            first = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise BadDataset(
                f"the chat template refuses the conversation: {first[:300]}",
                fix=f"Change the row, or give another template with {OPTION}.",
            ) from None

    def _marked(self, item: Item) -> Example:
        """The template says itself which tokens are the assistant's."""
        found = self._apply(
            item.messages,
            tools=item.tools,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        learnt = [bool(x) for x in found["assistant_masks"]]
        if not any(learnt):
            raise BadDataset(
                "the chat template marks no token of the conversation as the assistant's",
                fix=f"Give another template with {OPTION}.",
            )
        return Example(list(found["input_ids"]), learnt)

    def _span(
        self, whole: str, messages: Sequence[Message], index: int, tools: list[Any] | None
    ) -> tuple[int, int] | None:
        """Returns where an answer begins and ends in the text; None where it is not as alone."""
        before = self._render(messages[:index], tools, prompt=True)
        last = index == len(messages) - 1
        upto = whole if last else self._render(messages[: index + 1], tools)
        if not (whole.startswith(upto) and upto.startswith(before) and len(before) < len(upto)):
            return None
        return len(before), self._end(whole, len(before), len(upto))

    def _end(self, text: str, start: int, end: int) -> int:
        """Returns the end of the answer's end-of-turn token: what is behind it is not generated."""
        said = text[start:end].rstrip()
        if said.endswith(self._ends):
            return start + len(said)
        self.endless = True
        return end

    def _alone(self, messages: Sequence[Message], tools: list[Any] | None) -> Example:
        """One answer as the model will give it: with the history as the template then shows it."""
        whole = self._render(messages, tools)
        span = self._span(whole, messages, len(messages) - 1, tools)
        if span is None:
            raise BadDataset(
                f"the answer in message {len(messages)} cannot be found in what the chat template "
                "renders: its generation prompt is not how the answer begins",
                fix=f"Give a template with {OPTION} FILE whose prompt is how answers begin, or "
                "that marks them with {% generation %}.",
            )
        return self._example(whole, [span], whole_row=False)

    def _example(
        self, text: str, spans: Sequence[tuple[int, int]], *, whole_row: bool = True
    ) -> Example:
        """Cuts a text at the spans' ends and labels the tokens of the spans."""
        text = text[: spans[-1][1]]
        pieces, learnt, at = [], [], 0
        for start, end in spans:
            pieces += [text[at:start], text[start:end]]
            learnt += [False, True]
            at = end
        parts = self._tokens(text, pieces)
        ids = [i for part in parts for i in part]
        mask = [flag for part, flag in zip(parts, learnt, strict=True) for _ in part]
        return Example(ids, mask, whole=whole_row)

    def _tokens(self, text: str, pieces: Sequence[str]) -> list[list[int]]:
        """Returns the tokens of each piece of a text, such that no token spans two.

        As a rule the pieces' own tokens are those of the whole. Where a tokenizer treats the
        beginning of a text specially, the tokens of ever longer beginnings tell where to cut. Where
        a token of the whole would span prompt and answer, the pieces' own tokens are right: it is
        how a prompt is tokenised before it is answered.
        """
        own = [self._ids(piece) for piece in pieces]
        whole = self._ids(text)
        if [i for part in own for i in part] == whole:
            return own
        cuts, at = [0], 0
        for piece in pieces:
            at += len(piece)
            begun = self._ids(text[:at])
            if whole[: len(begun)] != begun:
                break
            cuts.append(len(begun))
        if len(cuts) == len(pieces) + 1:
            return [whole[a:b] for a, b in itertools.pairwise(cuts)]
        joined = self._text([i for part in own for i in part])
        if joined == self._text(whole):
            return own
        raise BadDataset(
            "the tokenizer joins the end of a prompt and the beginning of its answer in one token, "
            "and cannot tokenise them apart",
            fix=f"Begin the answer with a word, or give another template with {OPTION}.",
        )

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _text(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False))
