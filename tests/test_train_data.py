"""The data of `hf-lora train`: every fault named with its line, every mask found, none guessed."""

import datetime
import itertools
import json
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from hf_lora.demo import cached_model
from hf_lora.errors import BadDataset, InvalidOption, UnsupportedHost
from hf_lora.testing import tiny
from hf_lora.training.data import load_data
from hf_lora.training.data.chat import ChatEncoder, template_for
from hf_lora.training.data.jsonl import data_files, read_lines
from hf_lora.training.data.packing import (
    LengthSampler,
    PackCollator,
    PackedRows,
    attends_flat,
    check_packs,
    pack,
)
from hf_lora.training.data.shapes import Item, shape_of
from hf_lora.training.data.tokens import IGNORED, PadCollator, TokenRows
from tests.train_support import CHATML, chats, labelled, tokenizer, write

# --- files --------------------------------------------------------------------------------------


def test_marks_blank_lines_and_line_ends_of_windows_are_passed_over(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n  \n{"text": "b"}')
    (tmp_path / "b.jsonl").write_text('{"text": "c"}\n')
    lines = list(read_lines(data_files([str(tmp_path)])))
    assert [line.value["text"] for line in lines] == ["a", "b", "c"]
    assert [line.where[-15:] for line in lines] == [
        "a.jsonl, line 1", "a.jsonl, line 4", "b.jsonl, line 1",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "d.jsonl: the file holds no rows"),
        (b"\n \r\n", "d.jsonl: the file holds no rows"),
        (b'{"text": "a"}\n{"text"', "line 2: the row is no JSON (Expecting ':' delimiter at"),
        (b'[{"text": "a"}]', "line 1: the row is a list, not an object. Data is JSON Lines"),
        (b'"text"', "line 1: the row is 'text', not an object"),
        (b"null", "line 1: the row is None, not an object"),
        (b'{"text": "\xff"}', "line 1: byte 11 of the row, 0xff, is not UTF-8"),
        ('{"text": "a"}'.encode("utf-16"), "d.jsonl: the file is UTF-16"),
        ('{"text": "a"}'.encode("utf-32"), "d.jsonl: the file is UTF-32"),
        (b'{"text": "a", "x": NaN}', "line 1: the row is refused: it holds NaN"),
        (b'{"text": "a", "x": -Infinity}', "it holds -Infinity, which is no JSON number"),
        (b'{"x": ' + b"9" * 5000 + b"}", "line 1: the row is refused: Exceeds the limit"),
        (b'{"text": ' + b"[" * 100_000 + b"}", "line 1: the row is nested too deep"),
        (b'{"text": "\\ud800"}', "line 1: the column 'text' holds half a character"),
        (b'{"text": 5}', "line 1: the column 'text' is 5, not a text"),
        (b'{"text": null}', "line 1: the column 'text' is null, not a text"),
        (b'{"body": "a"}', "line 1: the columns of the row fit no form of any task; it has 'body'"),
        (b"{}", "line 1: the columns of the row fit no form of any task; it has no columns"),
        (
            b'{"text": "a"}\n{"txt": "a"}',
            "line 2: the row lacks the column 'text', which the first row has; it has 'txt'. "
            "Rename 'txt' to 'text'.",
        ),
    ],
)
def test_a_fault_of_a_file_is_named_with_its_line(tmp_path, content, words):
    path = tmp_path / "d.jsonl"
    path.write_bytes(content)
    with pytest.raises(BadDataset) as error:
        load_data([str(path)], tokenizer(), max_length=64)
    assert words in str(error.value)
    assert str(path) in str(error.value)


def test_a_row_without_end_is_not_read_into_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_lora.training.data.jsonl.LONGEST_LINE", 100)
    with pytest.raises(BadDataset, match="line 1: the row is longer than 100 bytes"):
        load_data([write(tmp_path / "d", [{"text": "a" * 200}])], tokenizer(), max_length=64)


def test_paths_that_are_no_files_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "data.csv").write_text("a")
    one = write(tmp_path / "one.jsonl", [{"text": "a"}])
    for paths, words in (
        ([str(tmp_path / "none.jsonl")], "does not exist"),
        ([str(tmp_path / "empty")], "holds no .jsonl file; it holds nothing"),
        ([str(tmp_path / "other")], "holds no .jsonl file; it holds data.csv"),
        (["/dev/null"], "is no plain file"),
        (["a\0b"], "does not exist"),
        ([one, one], "would be read twice"),
    ):
        with pytest.raises(BadDataset, match=words):
            data_files(paths)


# --- shapes -------------------------------------------------------------------------------------

ASKED = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
SYSTEM = {"role": "system", "content": "s"}


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"messages": ASKED, "id": 7}, ASKED),
        ({"messages": [{**m, "extra": 1} for m in ASKED]}, ASKED),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, ASKED[1]]},
         ASKED),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
         ASKED),
        ({"system": "s", "conversations": [{"from": "human", "value": "q"},
                                           {"from": "gpt", "value": "a"}]}, [SYSTEM, *ASKED]),
        ({"conversations": ASKED}, ASKED),
        ({"prompt": "q", "completion": "a"}, ASKED),
        ({"prompt": "q", "response": "a"}, ASKED),
        ({"prompt": ASKED[:1], "completion": ASKED[1:]}, ASKED),
        ({"instruction": "q", "input": "", "output": "a"}, ASKED),
        ({"instruction": "q", "output": "a", "system": "s"}, [SYSTEM, *ASKED]),
        ({"instruction": "q", "input": "more", "output": "a"},
         [{"role": "user", "content": "q\n\nmore"}, ASKED[1]]),
        ({"instruction": "q", "context": "more", "response": "a"},
         [{"role": "user", "content": "q\n\nmore"}, ASKED[1]]),
        ({"question": "q", "answer": "a"}, ASKED),
    ],
)  # fmt: skip
def test_rows_of_every_shape_are_read(row, messages):
    shape = shape_of(row, None)
    assert shape.task == "chat"
    assert list(shape.item(row).messages) == messages


def test_labels_are_names_or_numbers():
    for label in ("spam", 3, "3"):
        row = {"text": "t", "label": label}
        assert shape_of(row, None).item(row) == Item(text="t", label=label)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"messages": []}, "the column 'messages' is empty, not a list of messages"),
        ({"messages": "hello"}, "the column 'messages' is 'hello', not a list"),
        ({"messages": ["hello"]}, "message 1 is 'hello', not an object with 'role'"),
        ({"messages": [{"from": "human", "value": "q"}]}, "message 1 lacks 'role'; it has 'from'"),
        ({"messages": [{"role": 1, "content": "q"}]}, "the role of message 1 is 1, not a text"),
        ({"messages": [{"role": "user", "content": 1}]}, "the content of message 1 is 1"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            "a part that is no text",
        ),
        ({"messages": [*ASKED[:1], {**ASKED[1], "weight": 0}]}, "message 2 has the weight 0"),
        ({"messages": ASKED, "tools": "x"}, "the column 'tools' is 'x', not a list"),
        (
            {"conversations": [{"from": "bob", "value": "q"}]},
            "turn 1 is from 'bob', who is unknown",
        ),
        ({"conversations": [{"from": ["human"], "value": "q"}]}, "turn 1 is from \\['human'\\]"),
        ({"conversations": [3]}, "turn 1 is 3, not {'from'"),
        ({"prompt": "q", "completion": ["a"]}, "the column 'completion' is \\['a'\\], not a text"),
        ({"instruction": "q", "input": 3, "output": "a"}, "the column 'input' is 3"),
        ({"text": "t", "label": 0.5}, "the column 'label' is 0.5, neither a whole number nor"),
        ({"text": "t", "label": True}, "the column 'label' is True"),
        ({"text": "t", "label": None}, "the column 'label' is null"),
    ],
)
def test_a_row_of_wrong_types_is_named(row, words):
    with pytest.raises(BadDataset, match=words):
        shape_of(row, None).item(row)


def test_a_task_that_the_columns_do_not_fit_is_refused_with_the_one_they_do():
    with pytest.raises(BadDataset, match=r"no form of the task 'chat'; it has 'text'.*--task text"):
        shape_of({"text": "t"}, "chat")
    assert shape_of({"text": "t", "label": 1}, "text").task == "text"


# --- masks --------------------------------------------------------------------------------------

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + "
    "'<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + m['content'] + ' [/INST]' }}{% elif m['role'] == 'assistant' %}"
    "{{ ' ' + m['content'] + '</s>' }}{% else %}{{ raise_exception('only two roles') }}{% endif %}"
    "{% endfor %}"
)
GEMMA = (
    "{{ '<bos>' }}{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else "
    "m['role'] %}{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ 'A:' }}{% generation %}"
    "{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ 'U:' + m['content'] }}"
    "{% endif %}{{ '\n' }}{% endfor %}"
)
TURNS = [
    {"role": "user", "content": "hello"}, {"role": "assistant", "content": "the first"},
    {"role": "user", "content": "more"}, {"role": "assistant", "content": "the last"},
]  # fmt: skip

# Template -> what is rendered, cut by hand: every second piece is what the assistant says.
BY_HAND = {
    "chatml": (CHATML, [
        "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n", "the first<|im_end|>",
        "\n<|im_start|>user\nmore<|im_end|>\n<|im_start|>assistant\n", "the last<|im_end|>"]),
    "llama 3": (LLAMA3, [
        "<s><|start_header_id|>user<|end_header_id|>\n\nhello<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n", "the first<|eot_id|>",
        "<|start_header_id|>user<|end_header_id|>\n\nmore<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n", "the last<|eot_id|>"]),
    "mistral": (MISTRAL, [
        "<s>[INST] hello [/INST]", " the first</s>", "[INST] more [/INST]", " the last</s>"]),
    "gemma": (GEMMA, [
        "<bos><start_of_turn>user\nhello<end_of_turn>\n<start_of_turn>model\n",
        "the first<end_of_turn>", "\n<start_of_turn>user\nmore<end_of_turn>\n"
        "<start_of_turn>model\n", "the last<end_of_turn>"]),
    "marked": (MARKED, ["U:hello\nA:", "the first<|im_end|>", "\nU:more\nA:", "the last<|im_end|>",
                        "\n"]),
    "plain": ("plain", ["User: hello\nAssistant:", " the first<|im_end|>",
                        "\nUser: more\nAssistant:", " the last<|im_end|>"]),
}  # fmt: skip


def assert_cut(example, tokens, pieces):
    """Asserts that the tokens are those of the pieces, and that every second piece is learnt."""
    parts = [tokens(piece, add_special_tokens=False)["input_ids"] for piece in pieces]
    assert list(example.ids) == [i for part in parts for i in part]
    assert list(example.learnt) == [bool(n % 2) for n, part in enumerate(parts) for _ in part]


@pytest.mark.parametrize("name", BY_HAND)
def test_only_what_the_assistant_says_is_learnt(name):
    template, pieces = BY_HAND[name]
    tokens = tokenizer(None if template == "plain" else template)
    text = template_for(tokens, "plain") if template == "plain" else None
    encoder = ChatEncoder(tokens, text)
    (example,) = encoder.encode(Item(tuple(TURNS)))
    assert_cut(example, tokens, pieces)
    assert not encoder.endless


@pytest.mark.real
def test_the_mask_of_the_real_template_of_smollm2():
    tokens = transformers.AutoTokenizer.from_pretrained(cached_model(lambda _: None))
    (example,) = ChatEncoder(tokens).encode(Item(tuple(TURNS)))
    assert_cut(example, tokens, [
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n",
        "the first<|im_end|>", "\n<|im_start|>user\nmore<|im_end|>\n<|im_start|>assistant\n",
        "the last<|im_end|>"])  # fmt: skip


STRIPS = (  # as Qwen3's: thoughts are shown in the last answer alone, which always has some
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
    "{% if loop.last %}{{ '<think>' + m.get('reasoning_content', '') + '</think>' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% else %}{{ '<|im_start|>' + m['role'] + '\n' + "
    "m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_answers_that_a_template_rewrites_later_are_learnt_one_by_one_as_they_are_asked_for():
    tokens = tokenizer(STRIPS)
    encoder = ChatEncoder(tokens)
    first, last = encoder.encode(Item(tuple(TURNS)))
    asked = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert_cut(first, tokens, [asked, "<think></think>the first<|im_end|>"])
    assert_cut(last, tokens, [
        asked + "the first<|im_end|>\n<|im_start|>user\nmore<|im_end|>\n<|im_start|>assistant\n",
        "<think></think>the last<|im_end|>"])  # fmt: skip
    assert encoder.apart == 1
    assert not first.whole


OPENS = (  # its prompt opens a thought, which an answer without one does not have
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' + PROMPT }}{% endif %}"
)


def test_a_prompt_that_is_not_how_answers_begin_is_refused_and_never_masked():
    with pytest.raises(BadDataset, match="cannot be found.*generation prompt is not how"):
        ChatEncoder(tokenizer(OPENS.replace("PROMPT", "'<think>'"))).encode(Item(tuple(TURNS)))


def test_a_prompt_that_can_do_without_the_thought_is_taken_so_and_said():
    option = "('' if enable_thinking is defined and not enable_thinking else '<think>')"
    tokens = tokenizer(OPENS.replace("PROMPT", option))
    encoder = ChatEncoder(tokens)
    (example,) = encoder.encode(Item(tuple(TURNS)))
    assert_cut(example, tokens, BY_HAND["chatml"][1])
    assert encoder.unthinking == 1


def test_a_template_for_lists_of_parts_gets_them_and_never_drops_a_text():
    parts = CHATML.replace(
        "m['content']",
        "(m['content'] | selectattr('type', 'equalto', 'text') | map(attribute='text') | join)",
    )
    tokens = tokenizer(parts)
    plain = tokens.apply_chat_template(TURNS, tokenize=False)
    assert "hello" not in plain  # what the template shows of texts: nothing, and no error
    (example,) = ChatEncoder(tokens).encode(Item(tuple(TURNS)))
    assert_cut(example, tokens, BY_HAND["chatml"][1])
    drops = CHATML.replace("m['content']", "'...'")
    with pytest.raises(BadDataset, match="does not show the content of message 1"):
        ChatEncoder(tokenizer(drops)).encode(Item(tuple(TURNS)))


@pytest.mark.parametrize("answer", ["\nyes", "\n\nyes", " yes", "yes\n"])
def test_a_token_never_spans_prompt_and_answer(answer):
    # "\n\n" is one token here: of a whole, it would hold the prompt's end and the answer's begin
    tokens = tokenizer(CHATML)
    messages = ({"role": "user", "content": "hi"}, {"role": "assistant", "content": answer})
    (example,) = ChatEncoder(tokens).encode(Item(messages))
    prompt = tokens.apply_chat_template(
        [messages[0]], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    assert list(example.ids[: len(prompt)]) == prompt  # what the model will have before it
    assert list(example.learnt) == [False] * len(prompt) + [True] * (len(example.ids) - len(prompt))
    assert tokens.decode(example.ids[len(prompt) :]) == f"{answer}<|im_end|>"


def test_a_tokenizer_that_begins_texts_with_a_space_is_cut_right():
    inner = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate("▁:UAabcdef\n<>/s")}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    inner.add_special_tokens([AddedToken("</s>", special=True)])
    tokens = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")
    tokens.chat_template = (
        "{% for m in messages %}{{ ('A: ' if m['role'] == 'assistant' else 'U: ') + m['content'] }}"
        "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'A: ' }}{% endif %}"
    )
    messages = ({"role": "user", "content": "ab"}, {"role": "assistant", "content": "cde"})
    (example,) = ChatEncoder(tokens).encode(Item(messages))
    shown = tokens.convert_ids_to_tokens(list(example.ids))
    assert "".join(shown) == "▁U:▁abA:▁cde</s>"
    assert "".join(itertools.compress(shown, example.learnt)) == "cde</s>"


def test_dates_in_templates_are_those_of_the_recipe():
    dated = "{{ strftime_now('%Y-%m-%d') }}" + CHATML
    tokens = tokenizer(dated)
    encoder = ChatEncoder(tokens, today=datetime.date(2025, 3, 1))
    (example,) = encoder.encode(Item(tuple(TURNS)))
    assert encoder.dated
    assert tokens.decode(example.ids).startswith("2025-03-01<|im_start|>")


def test_a_conversation_that_the_assistant_opens_is_learnt_from_its_first_question_on():
    tokens = tokenizer(CHATML)
    encoder = ChatEncoder(tokens)
    (example,) = encoder.encode(Item(tuple(TURNS[1:])))
    assert_cut(example, tokens, [
        "<|im_start|>assistant\nthe first<|im_end|>\n<|im_start|>user\nmore<|im_end|>\n"
        "<|im_start|>assistant\n", "the last<|im_end|>"])  # fmt: skip
    assert encoder.opening == 1


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        (TURNS[:1], "has no answer: no message behind the first is of the role 'assistant'"),
        (TURNS[1:2], "has no answer"),
        ([SYSTEM, *TURNS], "the chat template refuses the conversation: only two roles"),
        ([TURNS[0], {**TURNS[1], "tool_calls": [{}]}], "'tool_calls', which the chat template"),
    ],
)
def test_conversations_without_answers_or_against_the_template_are_refused(messages, words):
    with pytest.raises(BadDataset, match=words):
        ChatEncoder(tokenizer(MISTRAL)).encode(Item(tuple(messages)))


def test_a_template_without_an_end_of_turn_is_said(tmp_path):
    template = CHATML.replace("<|im_end|>", "").replace("<|im_start|>", "# ")
    data = load_data(
        [write(tmp_path / "d", chats(3))], tokenizer(template), max_length=64, held_out=0
    )
    assert "no token at the end of an answer" in " ".join(data.notes)


def test_a_tokenizer_without_template_names_the_fix(tmp_path):
    with pytest.raises(InvalidOption, match="no chat template. Give one: --chat-template chatml"):
        template_for(tokenizer(None), None)
    bare = tokenizer(None)
    bare.get_vocab = lambda: {"a": 0}
    with pytest.raises(InvalidOption, match="Give one: --chat-template plain"):
        template_for(bare, None)
    with pytest.raises(InvalidOption, match="would not learn to stop.*Use --chat-template plain"):
        template_for(bare, "chatml")
    for content, words in (
        (None, "No such file"),
        (b"\xff", "it is no UTF-8 text"),
        (b" ", "empty"),
    ):
        path = tmp_path / "t.jinja"
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(InvalidOption, match=words):
            template_for(tokenizer(), str(path))
    path.write_text(MISTRAL)
    assert template_for(tokenizer(), str(path)) == MISTRAL


def trl_templates():
    """Templates of TRL, each with its twin that marks what the assistant says."""
    trl = pytest.importorskip("trl", reason="the judge is TRL's collection of templates")
    folder = Path(trl.__file__).parent / "chat_templates"
    for twin in sorted(folder.glob("*_training.jinja")):
        original = folder / twin.name.replace("_training", "")
        if original.exists():
            yield original, twin


# What TRL learns besides: a header that the prompt gives, or a role's name as a mark of the end.
OTHERWISE = {"gptoss", "muse_glimmer", "glm4moe"}
# TRL's own twin cannot be given texts, or shows nothing of them.
NO_JUDGE = {"llava_next", "idefics3", "smolvlm"}
REFUSED = {"deepseek_r1_distill", "deepseekv3"}  # prompts open a thought that answers lack


def said(text):
    """What a judge marks, without thoughts and line breaks, which templates put in differently."""
    for mark in ("<think>", "</think>", "\n"):
        text = text.replace(mark, "")
    return text


def test_trl_marks_the_same_words_in_its_forty_templates():
    judged = 0
    for original, twin in trl_templates():
        tokens, theirs = tokenizer(original.read_text()), tokenizer(twin.read_text())
        item = Item(tuple(TURNS[:2]))
        if original.stem in REFUSED:
            with pytest.raises(BadDataset, match="cannot be found"):
                ChatEncoder(tokens).encode(item)
            continue
        (example,) = ChatEncoder(tokens).encode(item)
        ours = tokens.decode(list(itertools.compress(example.ids, example.learnt)))
        assert "the first" in ours
        assert "hello" not in ours
        if original.stem in OTHERWISE | NO_JUDGE:
            continue
        judge = theirs.apply_chat_template(
            TURNS[:2], return_dict=True, return_assistant_tokens_mask=True
        )
        marked = itertools.compress(judge["input_ids"], judge["assistant_masks"])
        assert said(ours) == said(theirs.decode(list(marked))), original.stem
        judged += 1
    assert judged >= 20


# --- data ---------------------------------------------------------------------------------------


def ids_of(rows):
    return [rows[i]["input_ids"] for i in range(len(rows))]


def test_the_held_out_share_is_the_same_for_the_same_seed_and_apart_from_the_rest(tmp_path):
    path = write(tmp_path / "d.jsonl", [{"text": f"row {i}"} for i in range(60)])
    one, again, other = (
        load_data([path], tokenizer(), max_length=64, held_out=0.1, seed=seed) for seed in (1, 1, 2)
    )
    assert (len(one.train), len(one.held_out), one.rows, one.task) == (54, 6, 60, "text")
    assert ids_of(one.held_out) == ids_of(again.held_out)
    assert one.digest == again.digest != other.digest
    assert ids_of(one.held_out) != ids_of(other.held_out)
    assert sorted(ids_of(one.train) + ids_of(one.held_out)) == sorted(
        ids_of(other.train) + ids_of(other.held_out)
    )
    assert not [row for row in ids_of(one.held_out) if row in ids_of(one.train)]


def test_a_text_ends_with_the_token_for_its_end_and_its_first_token_is_not_learnt(tmp_path):
    tokens = tokenizer()
    data = load_data(
        [write(tmp_path / "d", [{"text": "hello"}, {"text": ""}])],
        tokens, max_length=64, held_out=0,
    )  # fmt: skip
    row = data.train[0]
    ids = tokens("hello")["input_ids"]
    assert row["input_ids"] == [*ids, tokens.eos_token_id]
    assert row["labels"] == [IGNORED, *ids[1:], tokens.eos_token_id]
    assert data.train.learnt_tokens == len(ids)
    assert len(data.train) == 1
    assert "1 sequences were dropped: nothing to learn is left of them" in data.notes


def test_rows_are_cut_and_those_without_an_answer_dropped_and_all_is_counted(tmp_path):
    long = {"prompt": "x" * 90, "completion": "never seen"}
    rows = [{"prompt": "q", "completion": "a" * 90}, long, {"prompt": "q", "completion": "a"}]
    data = load_data([write(tmp_path / "d", rows)], tokenizer(), max_length=50, held_out=0)
    assert data.train.lengths[0] == 50
    assert len(data.train) == 2
    assert "2 sequences were cut at 50 tokens" in data.notes
    assert "1 sequences were dropped: nothing to learn is left of them" in data.notes
    with pytest.raises(BadDataset, match=r"no row of .*e is left.*beyond 50 tokens.*Raise --max"):
        load_data([write(tmp_path / "e", [long])], tokenizer(), max_length=50)


def test_a_cut_row_of_a_classifier_keeps_the_tokens_that_every_row_has(tmp_path):
    class Closing:
        """A tokenizer that closes every text, as BERT's does."""

        def __init__(self, inner):
            self.inner = inner

        def __call__(self, text, truncation=False, max_length=None):
            ids = self.inner(text)["input_ids"]
            room = max_length - 1 if truncation else len(ids)
            return {"input_ids": [*ids[:room], 0]}

    rows = [{"text": "hello world", "label": 1}, {"text": "a", "label": 0}]
    data = load_data([write(tmp_path / "d", rows)], Closing(tokenizer()), max_length=5, held_out=0)
    assert len(data.train[0]["input_ids"]) == 5
    assert data.train[0]["input_ids"][-1] == 0
    assert "1 sequences were cut at 5 tokens" in data.notes


def test_classes_are_numbered_by_value_and_can_be_put_in_order(tmp_path):
    rows = [{"text": "a", "label": n} for n in (10, 2, 2, 10)]
    path = write(tmp_path / "d", rows)
    data = load_data([path], tokenizer(), max_length=8, held_out=0)
    assert data.labels == ("2", "10")
    assert [data.train[i]["labels"] for i in range(4)] == [1, 0, 0, 1]
    asked = load_data([path], tokenizer(), max_length=8, held_out=0, labels=("10", "5", "2"))
    assert asked.labels == ("10", "5", "2")
    assert [asked.train[i]["labels"] for i in range(4)] == [0, 2, 2, 0]
    of_base = load_data(
        [path], tokenizer(), max_length=8, held_out=0, known_labels=("x", "10", "2")
    )
    assert of_base.labels == ("x", "10", "2")
    unknown = load_data([path], tokenizer(), max_length=8, held_out=0, known_labels=("x", "10"))
    assert unknown.labels == ("2", "10")


@pytest.mark.parametrize(
    ("rows", "labels", "words"),
    [
        ([("a", 1), ("b", 1)], (), "all 2 rows have the label 1. A classifier needs"),
        ([("a", 1), ("b", "x")], (), "line 2: the label is 'x', and others are like 1"),
        ([("a", 1), ("b", 2)], ("1", "1", "2"), "--labels names '1' twice"),
        ([("a", 1), ("b", 2)], ("1", "3"), "--labels lacks '2', which the data has"),
    ],
)
def test_classes_that_cannot_be_are_refused(tmp_path, rows, labels, words):
    path = write(tmp_path / "d.jsonl", [{"text": t, "label": n} for t, n in rows])
    with pytest.raises((BadDataset, InvalidOption), match=words):
        load_data([path], tokenizer(), max_length=8, labels=labels)


def test_a_class_that_training_never_saw_is_refused_in_held_out_data(tmp_path):
    path = write(tmp_path / "d.jsonl", labelled(4))
    other = write(tmp_path / "e.jsonl", [*labelled(2), {"text": "a", "label": "odd"}])
    with pytest.raises(BadDataset, match=r"e.jsonl, line 3: the label 'odd' does not occur in"):
        load_data([path], tokenizer(), max_length=8, eval_paths=[other])


def test_held_out_files_are_kept_apart_and_their_repeats_are_said(tmp_path):
    rows = [{"text": f"row {i}"} for i in range(5)]
    path, other = write(tmp_path / "d", rows), write(tmp_path / "e", rows[:2])
    data = load_data([path], tokenizer(), max_length=64, eval_paths=[other])
    assert (len(data.train), len(data.held_out)) == (5, 2)
    assert "2 of 2 held-out sequences also stand in the training rows" in data.notes


def test_answers_of_one_conversation_stay_on_one_side(tmp_path):
    rows = [{"messages": [{**m, "content": f"{m['content']} {i}"} for m in TURNS]}
            for i in range(10)]  # fmt: skip
    tokens = tokenizer(STRIPS)
    data = load_data([write(tmp_path / "d", rows)], tokens, max_length=128, held_out=0.3)
    assert (len(data.train), len(data.held_out)) == (14, 6)
    assert any("10 conversations were split" in note for note in data.notes)
    numbers = [{tokens.decode(ids)[-11] for ids in ids_of(part)}
               for part in (data.train, data.held_out)]  # fmt: skip
    assert not numbers[0] & numbers[1]


def test_one_row_cannot_be_held_out_from_itself(tmp_path):
    path = write(tmp_path / "d", [{"text": "hello"}])
    data = load_data([path], tokenizer(), max_length=64, held_out=0.5)
    assert (len(data.train), len(data.held_out)) == (1, 0)
    assert any("no rows are held out" in note for note in data.notes)


def test_a_million_tokens_take_five_bytes_each():
    rows = TokenRows()
    for _ in range(1000):
        rows.append(range(1000), [True] * 1000)
    view = rows.view(range(10))
    assert rows._ids.itemsize * len(rows._ids) + len(rows._learnt) == 5_000_000
    assert view._ids is rows._ids
    assert view.lengths == [1000] * 10
    with pytest.raises(IndexError):
        view[10]


# --- packing ------------------------------------------------------------------------------------


def random_rows(lengths, vocabulary=96, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = TokenRows()
    for length in lengths:
        ids = torch.randint(3, vocabulary, (length,), generator=generator).tolist()
        learnt = (torch.rand(length, generator=generator) > 0.3).tolist()
        rows.append(ids, [False, *learnt[1:-1], True])
    return rows


@pytest.mark.parametrize("seed", range(5))
def test_every_example_is_packed_once_and_whole(seed):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 65, (200,), generator=generator).tolist()
    packs = pack(lengths, 64)
    assert sorted(i for numbers in packs for i in numbers) == list(range(200))
    assert all(sum(lengths[i] for i in numbers) <= 64 for numbers in packs)
    # best-fit-decreasing needs at most 11/9 of the best number of rows and 4 (Johnson 1973)
    assert len(packs) <= 11 / 9 * -(-sum(lengths) // 64) + 4


def loss_and_gradients(model, batch):
    model.zero_grad()
    labelled_tokens = int((batch["labels"][:, 1:] != IGNORED).sum())
    loss = model(**batch).loss * labelled_tokens
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_packed_examples_give_the_loss_and_gradients_of_the_same_examples_alone(
    family, attention, flat
):
    model = tiny(family).double()
    model.set_attn_implementation(attention)
    model.config.use_cache = False
    rows = random_rows([5, 9, 20, 3, 12, 7])
    packed = PackedRows(rows, 24)
    assert len(packed) < len(rows)
    batch = PackCollator(0, flat=flat)([packed[i] for i in range(len(packed))])
    assert "attention_mask" not in batch
    together, gradients = loss_and_gradients(model, batch)
    total, expected = 0.0, {}
    for i in range(len(rows)):
        alone = PadCollator(0)([rows[i]])
        loss, grads = loss_and_gradients(model, alone)
        total += loss
        expected = {n: expected.get(n, 0) + g for n, g in grads.items()}
    # transformers takes the loss of any model in float32, and the sums differ in their order
    torch.testing.assert_close(together, total, rtol=1e-6, atol=0)
    for name, gradient in gradients.items():
        # the same, against the largest gradient of the parameter
        slack = 1e-5 * float(expected[name].abs().max()) + 1e-9
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=slack, msg=name)


def test_padded_rows_give_the_loss_of_the_same_rows_alone():
    model = tiny("llama").double()
    rows = random_rows([5, 9, 20])
    together, _ = loss_and_gradients(model, PadCollator(0)([rows[i] for i in range(3)]))
    alone = [loss_and_gradients(model, PadCollator(0)([rows[i]]))[0] for i in range(3)]
    # order of the sums in float32
    torch.testing.assert_close(together, sum(alone), rtol=1e-6, atol=0)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "phi3"])
def test_models_that_keep_packed_examples_apart_may_pack(family):
    model = tiny(family).train()
    check_packs(model)
    assert model.training


@pytest.mark.parametrize("family", ["falcon", "bloom", "mamba2"])
def test_models_in_which_packed_examples_would_leak_are_refused(family):
    with pytest.raises(UnsupportedHost, match="see each other.*Use --group-by-length"):
        check_packs(tiny(family))


def test_models_without_position_ids_are_refused():
    class Old(torch.nn.Linear):
        def forward(self, input_ids, use_cache=True):
            return None

    with pytest.raises(UnsupportedHost, match="Old takes no position ids.*Use --group-by-length"):
        check_packs(Old(1, 1))


def test_rows_are_laid_end_to_end_for_flash_attention_alone():
    model = torch.nn.Module()
    for name, flat in (("flash_attention_2", True), ("sdpa", False), ("flex_attention", False)):
        model.config = transformers.LlamaConfig()
        model.config._attn_implementation = name
        assert attends_flat(model) is flat
    packed = PackedRows(random_rows([5, 9, 6]), 12)
    batch = PackCollator(0, flat=True)([packed[0], packed[1]])
    assert batch["input_ids"].shape == (1, 20)
    assert int((batch["position_ids"] == 0).sum()) == 3  # where transformers cuts


def test_batches_of_like_length_are_the_same_for_the_same_epoch():
    lengths = [int(x) for x in torch.randint(1, 99, (203,), generator=torch.manual_seed(0))]
    sampler = LengthSampler(lengths, 4, seed=3)
    first = list(sampler)
    assert sorted(first) == list(range(203))
    assert list(sampler) == first
    sampler.set_epoch(1)
    assert list(sampler) != first
    sampler.set_epoch(0)
    assert list(sampler) == first
    waste = sum(
        max(part) * len(part) - sum(part)
        for part in ([lengths[i] for i in first[n : n + 4]] for n in range(0, 203, 4))
    )
    assert waste < 0.1 * sum(lengths)  # in the order of the file it is about 0.5 of it


def test_rows_of_json_that_came_from_elsewhere_keep_their_digest(tmp_path):
    one = write(tmp_path / "a", chats(3))
    other = tmp_path / "b"
    other.write_text("\n\n".join(json.dumps(row, indent=None) for row in chats(3)) + "\r\n")
    digests = {load_data([str(p)], tokenizer(), max_length=64).digest for p in (one, other)}
    assert len(digests) == 1
