"""What a row may look like: a table from column names to a conversation, a text or a label."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from hf_lora.errors import BadDataset, closest, listing, shown

Task = Literal["chat", "text", "label"]
Message = dict[str, Any]

# Who speaks, in the ShareGPT form -> what chat templates call them.
SPEAKERS = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
_KEPT = ("role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content", "thinking")


@dataclass(frozen=True)
class Item:
    """What one row says.

    Attributes:
        messages: The conversation, for the task `chat`.
        tools: Descriptions of tools, for templates that take them.
        text: The text, for the tasks `text` and `label`.
        label: The label as the row spells it, for the task `label`.
    """

    messages: tuple[Message, ...] = ()
    tools: list[Any] | None = None
    text: str = ""
    label: str | int | None = None


@dataclass(frozen=True)
class Shape:
    """One form of a row.

    Attributes:
        task: What it is for.
        columns: Columns that every row has.
        optional: Columns that a row may have besides; all others are left aside.
        read: Columns -> item.
    """

    task: Task
    columns: tuple[str, ...]
    read: Callable[[Mapping[str, Any]], Item] = field(repr=False)
    optional: tuple[str, ...] = ()

    def item(self, row: Mapping[str, Any]) -> Item:
        """Returns what the row says; BadDataset names the column that is missing or wrong."""
        for column in self.columns:
            if column not in row:
                there = listing(map(repr, row)) or "no columns"
                near = closest(column, row, limit=1)
                raise BadDataset(
                    f"the row lacks the column {column!r}, which the first row has; it has {there}",
                    fix=f"Rename {near[0]!r} to {column!r}." if near else "",
                    field=column,
                )
        return self.read(row)


def _text(row: Mapping[str, Any], column: str) -> str:
    return _checked_text(row[column], f"the column {column!r}")


def _checked_text(value: object, what: str) -> str:
    if not isinstance(value, str):
        kind = "null" if value is None else shown(value)
        raise BadDataset(f"{what} is {kind}, not a text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:  # JSON can spell half of a surrogate pair, which no text holds
        raise BadDataset(f"{what} holds half a character (a lone surrogate)") from None
    return value


def _label(row: Mapping[str, Any]) -> Item:
    label = row["label"]
    if isinstance(label, str):
        _checked_text(label, "the column 'label'")
    elif not isinstance(label, int) or isinstance(label, bool):
        raise BadDataset(
            f"the column 'label' is {'null' if label is None else shown(label)}, neither a whole "
            "number nor a text",
            fix="Name the class, such as 'spam', or number it.",
            field="label",
        )
    return Item(text=_text(row, "text"), label=label)


def _list(row: Mapping[str, Any], column: str) -> list[Any]:
    value = row[column]
    if not isinstance(value, list) or not value:
        kind = "empty" if value == [] else f"{'null' if value is None else shown(value)}"
        raise BadDataset(f"the column {column!r} is {kind}, not a list of messages", field=column)
    return value


def _tools(row: Mapping[str, Any]) -> list[Any] | None:
    tools = row.get("tools")
    if tools is not None and not isinstance(tools, list):
        raise BadDataset(f"the column 'tools' is {shown(tools)}, not a list", field="tools")
    return tools or None


def _messages(row: Mapping[str, Any]) -> Item:
    listed = _list(row, "messages")
    return Item(tuple(_message(m, i) for i, m in enumerate(listed, 1)), tools=_tools(row))


def _message(value: object, number: int) -> Message:
    what = f"message {number}"
    if not isinstance(value, dict):
        raise BadDataset(f"{what} is {shown(value)}, not an object with 'role' and 'content'")
    for key in ("role", "content"):
        if key not in value and not (key == "content" and value.get("tool_calls")):
            raise BadDataset(
                f"{what} lacks {key!r}; it has {listing(map(repr, value)) or 'nothing'}",
                fix="A message is {'role': ..., 'content': ...}; the form with 'from' and 'value' "
                "stands in the column 'conversations'.",
            )
    _checked_text(value["role"], f"the role of {what}")
    if value.get("weight", 1) != 1:
        raise BadDataset(
            f"{what} has the weight {shown(value['weight'])}; every answer counts once here",
            fix="End the conversation at the last answer to learn, or leave the weight out.",
        )
    kept = {key: value[key] for key in _KEPT if value.get(key) is not None}
    if not (value.get("content") is None and value.get("tool_calls")):
        kept["content"] = _content(value["content"], what)
    return kept


def _content(value: object, what: str) -> str:
    """Returns the text of a message; one in parts, as chat APIs write it, is joined."""
    if not isinstance(value, list):
        return _checked_text(value, f"the content of {what}")
    texts = []
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text":
            raise BadDataset(
                f"the content of {what} has a part that is no text: {shown(part)}",
                fix="Only text is trained on here.",
            )
        texts.append(_checked_text(part.get("text"), f"a part of {what}"))
    return "".join(texts)


def _conversations(row: Mapping[str, Any]) -> Item:
    messages = [_turn(turn, i) for i, turn in enumerate(_list(row, "conversations"), 1)]
    if row.get("system") is not None:
        messages.insert(0, {"role": "system", "content": _text(row, "system")})
    return Item(tuple(messages), tools=_tools(row))


def _turn(value: object, number: int) -> Message:
    if isinstance(value, dict) and {"role", "content"} <= value.keys():
        return _message(value, number)
    if not isinstance(value, dict) or not {"from", "value"} <= value.keys():
        raise BadDataset(f"turn {number} is {shown(value)}, not {{'from': ..., 'value': ...}}")
    speaker = SPEAKERS.get(value["from"]) if isinstance(value["from"], str) else None
    if speaker is None:
        raise BadDataset(
            f"turn {number} is from {shown(value['from'])}, who is unknown",
            fix=f"Speakers: {', '.join(SPEAKERS)}. Or use 'messages' with the template's roles.",
        )
    return {"role": speaker, "content": _checked_text(value["value"], f"turn {number}")}


def _pair(question: str, answer: str, context: str = "") -> Callable[[Mapping[str, Any]], Item]:
    """Returns a reader of rows that hold one question, perhaps more to it, and its answer."""

    def read(row: Mapping[str, Any]) -> Item:
        if isinstance(row[question], list) and isinstance(row[answer], list):
            both = [*_list(row, question), *_list(row, answer)]
            return Item(tuple(_message(m, i) for i, m in enumerate(both, 1)), tools=_tools(row))
        asked = _text(row, question)
        more = _text(row, context) if row.get(context) not in (None, "") else ""
        system = [{"role": "system", "content": _text(row, "system")}] if row.get("system") else []
        return Item(
            (
                *system,
                {"role": "user", "content": f"{asked}\n\n{more}" if more else asked},
                {"role": "assistant", "content": _text(row, answer)},
            ),
            tools=_tools(row),
        )

    return read


# The first shape whose columns a row has is its shape: richer ones stand before poorer ones.
SHAPES = (
    Shape("chat", ("messages",), _messages, ("tools",)),
    Shape("chat", ("conversations",), _conversations, ("system", "tools")),
    Shape("chat", ("prompt", "completion"), _pair("prompt", "completion"), ("system", "tools")),
    Shape("chat", ("prompt", "response"), _pair("prompt", "response"), ("system", "tools")),
    Shape(
        "chat",
        ("instruction", "output"),
        _pair("instruction", "output", "input"),
        ("input", "system", "tools"),
    ),
    Shape(
        "chat",
        ("instruction", "response"),
        _pair("instruction", "response", "context"),
        ("context", "system", "tools"),
    ),
    Shape("chat", ("question", "answer"), _pair("question", "answer"), ("system", "tools")),
    Shape("label", ("text", "label"), _label),
    Shape("text", ("text",), lambda row: Item(text=_text(row, "text"))),
)


def shape_of(row: Mapping[str, Any], task: Task | None) -> Shape:
    """Returns the shape of a first row, of the task asked for or of any.

    Raises:
        BadDataset: The row has the columns of no shape of that task.
    """
    known = [shape for shape in SHAPES if task in (None, shape.task)]
    for shape in known:
        if all(column in row for column in shape.columns):
            return shape
    there = listing(map(repr, row), limit=12) or "no columns"
    forms = "; ".join(" and ".join(map(repr, shape.columns)) for shape in known)
    fits = next((s for s in SHAPES if all(c in row for c in s.columns)), None)
    wanted = f"the task {task!r}" if task else "any task"
    raise BadDataset(
        f"the columns of the row fit no form of {wanted}; it has {there}",
        fix=(f"They fit --task {fits.task}. " if fits else "") + f"Forms: {forms}.",
    )
