"""`hf-lora train`: from a file of rows to an adapter that any peft reads, and the same again."""

import dataclasses
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from hf_lora import attach_lora, load_lora, lora_optimizer, open_adapter
from hf_lora.cli import main
from hf_lora.errors import InvalidOption, MissingExtra
from hf_lora.formats import read_header
from hf_lora.training.recipe import FIELDS, Recipe, flag_of, make_recipe
from hf_lora.training.recipe.estimate import estimate
from hf_lora.training.recipe.file import read_recipe, write_recipe
from hf_lora.training.recipe.models import checkpoint_activations, longest
from hf_lora.training.recipe.presets import rate_for, steps_of
from hf_lora.training.recipe.ready import gather
from tests.train_support import base, chats, labelled, tokenizer, write

WEIGHTS = "adapter_model.safetensors"
COMMAND = "import sys; from hf_lora.cli import main; sys.exit(main())"


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Pictures take longer than these runs; the run in a process of its own draws them."""
    monkeypatch.setattr("hf_lora.training.summary.can_draw", lambda: False)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return base(tmp_path_factory.mktemp("base") / "llama")


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return base(tmp_path_factory.mktemp("base") / "bert", "bert")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write(tmp_path_factory.mktemp("data") / "chat.jsonl", chats(30))


@pytest.fixture(scope="module")
def run(llama, rows, tmp_path_factory):
    """One finished run: (folder, what --json said, stderr)."""
    out = tmp_path_factory.mktemp("run") / "out"
    words = [*train_words(llama, rows, out), "--epochs", "2", "--dropout", "0.1", "--json"]
    return out, *spoken(words)


def train_words(model, data, out, *more):
    return ["train", "--model", str(model), "--data", str(data), "--out", str(out), *more]


def spoken(words):
    """Runs a command in a process of its own; returns its JSON and its stderr."""
    here = {"PYTHONPATH": str(Path(__file__).parent.parent), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMMAND, *words],
        env=os.environ | here, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


def one_line(capsys):
    err = capsys.readouterr().err
    said = [line for line in err.splitlines() if line.startswith("hf-lora: ")]
    assert len(said) == 1, err
    return said[0]


def weights(out):
    return load_file(Path(out) / WEIGHTS)


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


# --- a run --------------------------------------------------------------------------------------


def test_results_go_to_stdout_and_the_progress_bar_to_stderr(run):
    out, said, err = run
    assert said["steps"] == 8  # 28 rows in batches of 8, twice
    assert (said["train_sequences"], said["held_out_sequences"]) == (28, 2)
    assert said["held_out_loss"]["after"] < said["held_out_loss"]["before"]
    assert said["adapter_bytes"] == (out / WEIGHTS).stat().st_size
    assert "8/8" in err  # of 8 steps
    there = {path.name for path in out.iterdir()}
    assert {WEIGHTS, "adapter_config.json", "train.yaml", "report.json", "loss.png"} <= there
    assert "tokenizer.json" not in there  # it is the base's own


def test_plain_peft_computes_the_held_out_loss_that_was_said(run, llama, rows):
    out, said, _ = run
    model = transformers.AutoModelForCausalLM.from_pretrained(llama)
    tokens = transformers.AutoTokenizer.from_pretrained(llama)
    recipe = make_recipe(read_recipe(out / "train.yaml"))
    drawn = random.Random(recipe.seed).sample(range(30), 2)
    lines = [json.loads(line) for line in Path(rows).read_text().splitlines()]

    def held_out_loss(model):
        total = count = 0
        for number in drawn:
            messages = lines[number]["messages"]
            text = tokens.apply_chat_template(messages, tokenize=False).removesuffix("\n")
            prompt = tokens.apply_chat_template(
                messages[:1], tokenize=False, add_generation_prompt=True
            )
            ids = torch.tensor([tokens(text)["input_ids"]])
            labels = ids.clone()
            labels[:, : len(tokens(prompt)["input_ids"])] = -100
            learnt = int((labels != -100).sum())
            with torch.no_grad():
                total += float(model(ids, labels=labels).loss) * learnt
            count += learnt
        return total / count

    # in batches, the sums of float32 have another order
    assert held_out_loss(model) == pytest.approx(said["held_out_loss"]["before"], rel=1e-5)
    adapted = peft.PeftModel.from_pretrained(model, str(out)).eval()
    assert held_out_loss(adapted) == pytest.approx(said["held_out_loss"]["after"], rel=1e-5)


def test_the_written_recipe_told_again_gives_the_same_adapter_to_the_bit(run, tmp_path, capsys):
    out, said, _ = run
    again = tmp_path / "again"
    assert main(["train", "--config", str(out / "train.yaml"), "--out", str(again)]) == 0
    assert_equal(weights(out), weights(again))
    shown = capsys.readouterr().out
    assert f"{said['held_out_loss']['after']:.3f}" in shown
    first, second = (read_recipe(folder / "train.yaml") for folder in (out, again))
    assert first.pop("out") != second.pop("out")
    assert first == second
    assert main(["train", "--config", str(out / "train.yaml")]) == 1
    assert "holds an adapter already. Name a new folder." in one_line(capsys)


def test_the_adapter_verifies_and_remembers_how_it_was_made(run, llama, capsys):
    out, said, _ = run
    assert said["next"] == [f"hf-lora verify {out} --base {llama}"]
    assert main(said["next"][0].split()[1:]) == 0
    assert "failed" not in capsys.readouterr().out
    facts = read_header(out).manifest.training
    assert facts["task"] == "chat"
    assert facts["steps"] == 8


@pytest.mark.parametrize("more", [(), ("--packing",), ("--group-by-length", "--accumulate", "2")])
def test_a_run_that_was_cut_off_goes_on_as_if_it_had_not_been(llama, rows, tmp_path, more, capsys):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    spans = ["--epochs", "3", "--batch-size", "4", "--dropout", "0.2", "--save-every", "3",
             "--eval-every", "4", "--keep", "9", *more]  # fmt: skip
    assert main(train_words(llama, rows, whole, *spans)) == 0
    shutil.copytree(whole, cut)
    saved = sorted(cut.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
    for path in saved[1:]:
        shutil.rmtree(path)
    for name in (WEIGHTS, "adapter_config.json", "report.json"):
        (cut / name).unlink()
    capsys.readouterr()
    assert main(["train", "--resume", "--out", str(cut)]) == 0
    assert_equal(weights(whole), weights(cut))
    losses = [json.loads((out / "report.json").read_text()) for out in (whole, cut)]
    assert losses[0].keys() == losses[1].keys()
    assert "held-out loss" in capsys.readouterr().out


def test_a_classifier_is_trained_with_its_head_and_its_names(bert, tmp_path, capsys):
    data = write(tmp_path / "d.jsonl", labelled(60))
    out = tmp_path / "out"
    more = ["--epochs", "4", "--lr", "0.01", "--held-out", "0.2", "--json"]
    assert main(train_words(bert, data, out, *more)) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["accuracy"]["after"] == 1.0
    assert said["recipe"]["labels"] == ["bad", "good"]
    assert "no weights for bert.pooler, which is trained whole" in said["notes"][0]
    assert read_header(out).manifest.training["labels"] == ["bad", "good"]
    modules = open_adapter(out).components["model"].modules
    assert set(modules) == {"classifier", "bert.pooler"}  # the base was no classifier
    kind = transformers.AutoModelForSequenceClassification
    model = kind.from_pretrained(bert, num_labels=2, id2label={0: "bad", 1: "good"})
    load_lora(model, out, extra_modules=True)  # a pooler is no head
    view = peft.PeftModel.from_pretrained(kind.from_pretrained(bert, num_labels=2), str(out))
    tokens = tokenizer()
    for text, name in (("zzz 999", "bad"), ("aaa 999", "good")):
        ids = torch.tensor([tokens(text)["input_ids"]])
        logits = model.eval()(ids).logits
        assert model.config.id2label[int(logits.argmax())] == name
        assert torch.equal(view.eval()(ids).logits, logits)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_decoders_and_quantised_bases_classify_too(llama, bert, tmp_path, family, capsys):
    model = {"llama": llama, "bert": bert}[family]
    data = write(tmp_path / "d.jsonl", labelled(20))
    words = train_words(model, data, tmp_path / "out", "--max-steps", "2", "--json")
    assert main([*words, "--load-in", "4bit"]) == 0
    assert json.loads(capsys.readouterr().out)["task"] == "label"


def test_texts_are_learnt_whole(llama, tmp_path, capsys):
    data = write(tmp_path / "d.jsonl", [{"text": f"hello {i}"} for i in range(12)])
    words = train_words(llama, data, tmp_path / "out", "--held-out", "0", "--json")
    assert main(words) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["task"], said["held_out_loss"]) == ("text", {"before": None, "after": None})
    assert said["learnt_tokens"] == said["train_tokens"] - 12
    assert said["recipe"]["eval_every"] is None
    assert "no rows are held out" in said["notes"][0]


@pytest.mark.parametrize(
    ("more", "config"),
    [
        (["--variant", "dora"], {"use_dora": True, "lora_alpha": 32}),
        (["--variant", "rslora"], {"use_rslora": True, "lora_alpha": 8}),
        (
            ["--rank", "4", "--alpha", "6", "--targets", "attn.q,mlp.down"],
            {"r": 4, "lora_alpha": 6},
        ),
        (["--optimizer", "lora+"], {"r": 16}),
        (["--optimizer", "lora-fa"], {"r": 16}),
        (["--dtype", "bfloat16", "--gradient-checkpointing"], {"r": 16}),
        (["--schedule", "cosine", "--warmup", "0.5", "--weight-decay", "0.1"], {"r": 16}),
        (["--load-in", "4bit"], {"r": 16}),
        (["--load-in", "8bit"], {"r": 16}),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_every_option_reaches_the_adapter(llama, rows, tmp_path, more, config, capsys):
    out = tmp_path / "out"
    assert main(train_words(llama, rows, out, "--max-steps", "2", "--json", *more)) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["held_out_loss"]["after"] < said["held_out_loss"]["before"]
    written = json.loads((out / "adapter_config.json").read_text())
    assert {name: written[name] for name in config} == config
    paths = {path.rsplit(".", 1)[1] for path in open_adapter(out).components["model"].targets}
    assert len(paths) == (2 if "--targets" in more else 7)
    trained = sum(tensor.numel() for tensor in weights(out).values())
    a = sum(t.numel() for n, t in weights(out).items() if "lora_A" in n)
    assert said["trainable_parameters"] == trained - (a if "lora-fa" in more else 0)


def test_a_template_of_the_run_travels_with_the_adapter(tmp_path, rows):
    model = base(tmp_path / "bare", template=None)
    out = tmp_path / "out"
    words = train_words(model, rows, out, "--max-steps", "1")
    assert main([*words, "--chat-template", "chatml"]) == 0
    there = transformers.AutoTokenizer.from_pretrained(out)
    assert "<|im_start|>" in there.chat_template
    assert transformers.AutoTokenizer.from_pretrained(model).chat_template is None


def test_a_chat_template_is_not_taken_for_texts(llama, tmp_path, capsys):
    data = write(tmp_path / "d.jsonl", [{"text": f"hello {i}"} for i in range(12)])
    words = train_words(llama, data, tmp_path / "out", "--chat-template", "chatml")
    refused(words, capsys, "--chat-template is for the task 'chat', and the rows are of 'text'")


def test_classes_of_odd_names_are_those_of_the_data_in_the_recipe_too(bert, tmp_path, capsys):
    names = [" spam", "", "h\x85m", "a\u2028b,c"]
    data = write(
        tmp_path / "d.jsonl", [{"text": f"t {i}", "label": names[i % 4]} for i in range(24)]
    )
    first, again = tmp_path / "first", tmp_path / "again"
    assert main(train_words(bert, data, first, "--max-steps", "1")) == 0
    assert main(["train", "--config", str(first / "train.yaml"), "--out", str(again)]) == 0
    assert_equal(weights(first), weights(again))
    assert read_header(again).manifest.training["labels"] == sorted(names)


def test_packed_and_unpacked_runs_judge_by_the_same_loss(llama, rows, tmp_path, capsys):
    losses = []
    for more in ((), ("--packing",), ("--batch-size", "1")):
        out = tmp_path / f"out{len(losses)}"
        assert main(train_words(llama, rows, out, "--max-steps", "1", "--json", *more)) == 0
        losses.append(json.loads(capsys.readouterr().out)["held_out_loss"]["before"])
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)  # sums of float32 in other orders


# --- the dry run --------------------------------------------------------------------------------


def test_a_dry_run_needs_no_weights_and_writes_nothing(llama, rows, tmp_path, capsys):
    bare = tmp_path / "bare"
    shutil.copytree(llama, bare)
    (bare / "model.safetensors").unlink()
    before = sorted(tmp_path.rglob("*"))
    words = train_words(bare, rows, tmp_path / "out", "--dry-run", "--epochs", "2.5")
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("LoRA plan for LlamaForCausalLM")
    assert "10 steps of 8 sequences, rate 0.002 (linear), adamw, dropout 0.05, float32" in shown
    assert "Memory: " in shown
    assert main([*words, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["steps"] == 10
    assert said["recipe"]["lr"] == 0.002
    assert said["plan"]["rank"] == 16
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("sequences", [1, 7, 8, 9, 33])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("epochs", [0.5, 1, 2.5])
def test_steps_are_those_that_trainer_counts(sequences, accumulate, epochs, tmp_path):
    recipe = Recipe(batch_size=4, accumulate=accumulate, epochs=epochs)
    arguments = transformers.TrainingArguments(
        str(tmp_path), per_device_train_batch_size=4, gradient_accumulation_steps=accumulate,
        num_train_epochs=epochs, use_cpu=True, report_to="none", dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = transformers.Trainer(
        torch.nn.Linear(1, 1), arguments, train_dataset=[{"x": 0}] * sequences
    )
    counted = trainer.set_initial_training_values(arguments, trainer.get_train_dataloader())
    assert steps_of(recipe, sequences) == counted[-1]


def peak_bytes(step):
    """The most bytes that torch's own profiler sees alive at once during a call."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profiled:
        step()
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("optimizer", ["adamw", "lora-fa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_memory_estimate_is_what_torch_itself_counts(llama, checkpointing, optimizer, dtype):
    kind = transformers.AutoModelForCausalLM
    config = transformers.AutoConfig.from_pretrained(llama)
    with torch.device("meta"):
        bare = attach_lora(kind.from_config(config, dtype=dtype))
    told = estimate(
        bare, rows=4, tokens=64, dtype=dtype, optimizer=optimizer, checkpointing=checkpointing
    )
    model = attach_lora(kind.from_pretrained(llama, dtype=dtype)).train()
    model.config.use_cache = False
    if checkpointing:
        checkpoint_activations(model)
    ids = torch.randint(0, 200, (4, 64))
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0  # a row is padded
    adamw = lora_optimizer(model, optimizer, lr=1e-3)

    def step():
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = model(input_ids=ids, attention_mask=mask, labels=ids).loss
        loss.backward()
        adamw.step()
        adamw.zero_grad()

    step()  # makes the optimizer's states
    # left out: masks, rotary tables, what LoRA-FA computes; in half precision casts of the factors
    slack = 0.2 if dtype == torch.bfloat16 else 0.1 if optimizer == "lora-fa" else 0.06
    assert told.step == pytest.approx(peak_bytes(step), rel=slack)
    trained = [p for p in model.parameters() if p.requires_grad]
    states = sum(
        value.numel() * value.element_size()
        for p in trained for name, value in adamw.state[p].items() if name.startswith("exp_avg")
    )  # fmt: skip
    assert told.optimizer == states
    assert told.weights == kind.from_pretrained(llama).num_parameters() * dtype.itemsize


def test_a_model_whose_forward_needs_values_is_said_to_be_unknown(llama):
    with torch.device("meta"):
        config = transformers.AutoConfig.from_pretrained(llama)
        model = attach_lora(transformers.AutoModelForCausalLM.from_config(config))
    model.model.forward = lambda **_: int(torch.ones((), device="meta"))
    told = estimate(model, rows=1, tokens=4, dtype=torch.float32)
    assert told.step is None
    assert "meta" in told.why_not
    assert told.total == told.weights + told.adapter + told.optimizer


# --- what is refused ----------------------------------------------------------------------------


def refused(words, capsys, *parts):
    assert main(words) == 1
    said = one_line(capsys)
    for part in parts:
        assert part in said, said


@pytest.mark.parametrize(
    ("more", "parts"),
    [
        (["--epochs", "1", "--max-steps", "2"], ["--epochs and --max-steps both say how long"]),
        (["--packing", "--group-by-length"], ["both decide what a batch holds"]),
        (["--max-length", "4096"], ["is more than the 128 tokens that the base takes"]),
        (["--held-out", "1"], ["--held-out 1.0 is not below 1"]),
        (["--rank", "0"], ["--rank 0 is less than 1"]),
        (["--lr", "nan"], ["lr is nan, not a number"]),
        (["--lr", "0"], ["--lr 0.0 is less than"]),
        (["--dtype", "float16"], ["float16 on a CPU", "Use --dtype bfloat16 or float32"]),
        (["--targets", "query"], ["TargetNotFound", "query"]),
        (["--task", "text"], ["fit no form of the task 'text'", "They fit --task chat"]),
        (["--chat-template", "nowhere.jinja"], ["cannot be read (No such file"]),
        (["--today", "soon"], ["today is 'soon', not a date such as 2026-01-31"]),
        (["--data-digest", "0" * 64], ["the data gives other tokens than the run was made with"]),
        (["--model", "nowhere/x"], ["UnsupportedHost: no usable model config at 'nowhere/x'"]),
        (["--out", "/proc/nothing/out"], ["cannot be written"]),
        (["--model", ""], ["model is '', not a text"]),
        (["--out", "a\0b"], ["cannot be written (embedded null byte)"]),
        (["--seed", str(2**32)], ["--seed 4294967296 is not below 4294967296"]),
        (["--eval-data", "x", "--held-out", "0.5"], ["both say what to be judged by. Give one"]),
        (["--labels", "a,b"], ["--labels is for the task 'label', and the rows are of 'chat'"]),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_before_anything_is_written(
    llama, rows, tmp_path, more, parts, capsys
):
    refused([*train_words(llama, rows, tmp_path / "out"), *more], capsys, *parts)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["model", "data", "out"])
def test_what_is_missing_is_named(llama, rows, tmp_path, name, capsys):
    told = {"model": llama, "data": rows, "out": str(tmp_path / "out")}
    words = [word for key, value in told.items() if key != name for word in (flag_of(key), value)]
    refused(["train", *words], capsys, f"{flag_of(name)} is missing. Give it as a flag, or as")


def test_bases_that_cannot_learn_the_task_are_refused(bert, rows, tmp_path, capsys):
    out = tmp_path / "out"
    refused(train_words(bert, rows, out), capsys, "'bert' reads both ways", "Use --task label")
    t5 = base(tmp_path / "t5", "t5")
    refused(train_words(t5, rows, out), capsys, "has an encoder and a decoder")
    bloom = base(tmp_path / "bloom", "bloom")
    refused(train_words(bloom, rows, out, "--packing"), capsys, "Use --group-by-length")
    classes = write(tmp_path / "d.jsonl", labelled(9))
    refused(train_words(bert, classes, out, "--packing"), capsys, "--packing is for texts")
    assert not out.exists()


def test_an_adapter_is_no_base_and_an_empty_folder_no_run(run, rows, tmp_path, capsys):
    out, _, _ = run
    words = train_words(out, rows, tmp_path / "out")
    refused(words, capsys, "holds an adapter and no base. Give the base as --model.")
    (tmp_path / "empty").mkdir()
    resume = ["train", "--resume", "--out", str(tmp_path / "empty")]
    refused(resume, capsys, "holds no run to resume: it has no train.yaml")


def test_a_type_of_model_that_has_no_class_for_the_task_is_named(tmp_path, capsys):
    model = base(tmp_path / "mamba")
    transformers.MambaConfig(vocab_size=300, hidden_size=16).save_pretrained(model)
    data = write(tmp_path / "d.jsonl", labelled(9))
    words = train_words(model, data, tmp_path / "out")
    refused(words, capsys, "has no class for models of type 'mamba' and the task 'label'")


def test_a_base_without_its_weights_or_tokenizer_is_refused(llama, rows, tmp_path, capsys):
    words = {}
    for name, pattern in (("weights", "*.safetensors"), ("tokens", "token*")):
        folder = tmp_path / name
        shutil.copytree(llama, folder)
        for path in folder.glob(pattern):
            path.unlink()
        words[name] = train_words(folder, rows, tmp_path / "out")
    refused(words["weights"], capsys, "does not load")
    refused(words["tokens"], capsys, "has no usable tokenizer")
    trunk = tmp_path / "trunk"
    transformers.AutoModel.from_pretrained(llama).save_pretrained(trunk)
    tokenizer().save_pretrained(trunk)
    refused(
        train_words(trunk, rows, tmp_path / "out"), capsys,
        "has no weights for lm_head.weight of LlamaForCausalLM",
    )  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_of_another_base_is_refused(llama, rows, tmp_path, capsys):
    small = base(tmp_path / "small")
    config = json.loads((tmp_path / "small/config.json").read_text())
    (tmp_path / "small/config.json").write_text(json.dumps(config | {"vocab_size": 100}))
    refused(train_words(small, rows, tmp_path / "out"), capsys, "and the base knows 100")


@pytest.mark.parametrize(
    ("there", "parts"),
    [
        (["adapter_config.json"], ["holds an adapter already. Name a new folder"]),
        (["train.yaml", "checkpoint-3/x"], ["another run (checkpoint-3, train.yaml)", "--resume"]),
        (["mine.txt"], ["holds mine.txt. Name a new folder"]),
    ],
)
def test_a_folder_with_files_in_it_is_left_as_it_is(llama, rows, tmp_path, there, parts, capsys):
    out = tmp_path / "out"
    for name in there:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("mine")
    before = {path: path.read_text() for path in out.rglob("*") if path.is_file()}
    refused(train_words(llama, rows, out), capsys, *parts)
    assert {path: path.read_text() for path in out.rglob("*") if path.is_file()} == before
    (tmp_path / "file").write_text("mine")
    refused(train_words(llama, rows, tmp_path / "file"), capsys, "is a file, not a folder")


def test_a_run_that_never_saved_may_begin_again(llama, rows, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    words = train_words(llama, rows, out, "--max-steps", "1")

    def fails(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("hf_lora.training.recipe.texts.RecipeTrainer.train", fails)
        assert main(words) == 130
    assert [path.name for path in out.iterdir()] == ["train.yaml"]
    capsys.readouterr()
    refused(["train", "--resume", "--out", str(out)], capsys, "BadCheckpoint: no complete")
    assert main(words) == 0


def test_only_the_same_run_is_resumed(run, llama, rows, tmp_path, capsys):
    out, _, _ = run
    refused(["train", "--resume", "--out", str(out)], capsys, "is finished: its adapter lies")
    cut = tmp_path / "cut"
    shutil.copytree(out, cut)
    (cut / WEIGHTS).unlink()
    (cut / "adapter_config.json").unlink()
    resume = ["train", "--resume", "--out", str(cut)]
    refused([*resume, "--lr", "1", "--rank", "3"], capsys,
            "was another one: --rank 16 -> 3, --lr 0.002 -> 1.0")  # fmt: skip
    other = write(tmp_path / "other.jsonl", chats(31))
    refused([*resume, "--data", other], capsys, "BadDataset: the data gives other tokens")
    shutil.copy(rows, tmp_path / "moved.jsonl")
    # where the rows lie and which checkpoints are kept change nothing
    moved = train_words(llama, tmp_path / "moved.jsonl", cut, "--resume")
    assert main([*moved, "--epochs", "2", "--save-every", "1", "--keep", "1"]) == 0
    assert_equal(weights(out), weights(cut))


def test_a_dry_run_of_a_resume_refuses_what_the_resume_does(run, tmp_path, capsys):
    out, _, _ = run
    dry = ["train", "--resume", "--dry-run", "--out"]
    refused([*dry, str(out)], capsys, "is finished: its adapter lies")
    refused(dry[:-1], capsys, "--model is missing")
    cut = tmp_path / "cut"
    shutil.copytree(out, cut)
    (cut / WEIGHTS).unlink()
    (cut / "adapter_config.json").unlink()
    assert main([*dry, str(cut)]) == 0
    assert "8 steps of 8 sequences" in capsys.readouterr().out
    refused([*dry, str(cut), "--lr", "0.5"], capsys, "was another one: --lr 0.002 -> 0.5")
    for folder in cut.glob("checkpoint-*"):
        (folder / "optimizer.pt").unlink()
    refused([*dry, str(cut)], capsys, "BadCheckpoint: no complete checkpoint")


def test_a_run_is_not_resumed_on_data_that_has_changed(llama, tmp_path, capsys):
    data = tmp_path / "d.jsonl"
    write(data, chats(10))
    out = tmp_path / "out"
    assert main(train_words(llama, data, out)) == 0
    (out / WEIGHTS).unlink()
    (out / "adapter_config.json").unlink()
    write(data, chats(11)[1:])
    capsys.readouterr()
    refused(["train", "--resume", "--out", str(out)], capsys, "BadDataset: the data gives other")


def test_quantising_without_bitsandbytes_names_the_command(
    llama, rows, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    words = train_words(llama, rows, tmp_path / "out", "--load-in", "4bit")
    refused(words, capsys, "MissingExtra", 'pip install "hf-lora[quantised]"')


# --- the table ----------------------------------------------------------------------------------


def test_every_row_is_a_flag_and_a_key_and_says_why(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    shown = " ".join(capsys.readouterr().out.split()).replace("- ", "-")
    for name, row in FIELDS.items():
        assert flag_of(name) in shown
        assert " ".join(row.metadata["text"].split()).replace("- ", "-") in shown
        if name not in ("model", "data", "out"):
            reason = row.metadata["default"]
            assert reason
            assert f"(default: {reason})".replace("- ", "-") in shown


FULL = {
    "model": "m", "data": ["d"], "lr": 1e-05, "held_out": 0.25, "packing": True, "rank": 4,
    "targets": ["attn.q", "mlp.up"], "today": "2026-01-31", "seed": 7,
    "labels": ["no", "1", "é☃", " x", "", "a\x85b\x7f", "\u2028", "\ufeff\U0001f600"],
}  # fmt: skip


def test_what_is_written_is_read_back_with_and_without_pyyaml(tmp_path):
    yaml = pytest.importorskip("yaml", reason="the judge is PyYAML")
    recipe = make_recipe(FULL)
    text = write_recipe(recipe, "a comment")
    path = tmp_path / "train.yaml"
    path.write_text(text, encoding="utf-8")
    assert make_recipe(read_recipe(path)) == recipe
    assert make_recipe(yaml.safe_load(text)) == recipe
    path.write_text("---\n" + text, encoding="utf-8")  # no longer what hf_lora writes
    assert make_recipe(read_recipe(path)) == recipe


def test_yaml_as_people_write_it(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "# mine\nmodel: some/model\ndata: train.jsonl\nlr: 1e-4\nbatch-size: 4\n"
        "targets: attn.q, mlp.up\nlabels: [0, 1]\ntoday: 2026-01-31\nmax_steps: ~\npacking: yes\n"
    )
    assert read_recipe(path) == {
        "model": "some/model", "data": ("train.jsonl",), "lr": 1e-4, "batch_size": 4,
        "targets": ("attn.q", "mlp.up"), "labels": ("0", "1"), "today": "2026-01-31",
        "packing": True,
    }  # fmt: skip
    recipe = gather({"config": str(path), "lr": 0.5, "out": "o"})
    assert (recipe.lr, recipe.batch_size) == (0.5, 4)
    assert recipe.data == (os.path.abspath("train.jsonl"),)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("bach_size: 4", "there is no option 'bach_size'. Closest: batch_size"),
        ("3: 4", "there is no option '3'"),
        ("rank: four", "rank is 'four', not a whole number"),
        ("rank: 4.5", "rank is 4.5, not a whole number"),
        ("rank: true", "rank is True, not a whole number"),
        ("packing: 1", "packing is 1, not true or false"),
        ("lr: fast", "lr is 'fast', not a number"),
        ("lr: .inf", "lr is inf, not a number"),
        ("labels: [no, yes]", "labels is \\[False, True\\], not names.*need quotes in YAML"),
        ("data: {a: b}", "data is {'a': 'b'}, not a path, or a list"),
        ("data: []", "data is \\[\\], not a path, or a list"),
        ("schedule: steep", "--schedule 'steep' is none of linear, cosine, constant"),
        ("rank: 4\nrank: 5", "rank stands there twice"),
        ("batch-size: 4\nbatch_size: 5", "batch_size stands there twice"),
        ("", "the config is empty"),
        ("- a\n- b", "the config is no mapping"),
        ("a: [", "the config is no YAML"),
        ("model: !!python/object/apply:os.system ['true']", "could not determine a constructor"),
        ("[" * 5000, "the config is no YAML"),
        ("today: !!timestamp abc", "the config is no YAML"),
        ("rank: !!int ''", "the config is no YAML"),
        ("packing: !!bool maybe", "the config is no YAML"),
        ("labels: [1.5, a]", "labels is \\[1.5, 'a'\\], not names"),
        (b"model: \xff", "it is not UTF-8"),
    ],
)  # fmt: skip
def test_a_config_that_cannot_be_is_named(tmp_path, text, words):
    path = tmp_path / "run.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InvalidOption, match=words) as error:
        read_recipe(path)
    assert "run.yaml" in str(error.value)
    with pytest.raises(InvalidOption, match="cannot be read"):
        read_recipe(tmp_path / "nowhere.yaml")


def test_yaml_without_pyyaml_names_the_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "yaml", None)
    path = tmp_path / "run.yaml"
    path.write_text("model: plain\n")
    with pytest.raises(MissingExtra, match=r'Run: pip install "hf-lora\[train\]"'):
        read_recipe(path)


def test_a_flag_drops_what_a_file_says_that_does_not_hold_any_more(run, tmp_path):
    out, _, _ = run
    told = {"config": str(out / "train.yaml"), "out": str(tmp_path)}
    assert gather(told).data_digest is not None
    for flag in ({"data": ["other.jsonl"]}, {"seed": 3}, {"max_length": 9}, {"model": "other"}):
        assert gather({**told, **flag}).data_digest is None
    assert gather({**told, "rank": 3}).data_digest is not None
    judged = gather({**told, "eval_data": ["held.jsonl"]})
    assert (judged.eval_data, judged.held_out) == ((os.path.abspath("held.jsonl"),), None)
    steps = gather({**told, "max_steps": 3})
    assert (steps.max_steps, steps.epochs) == (3, None)


@pytest.mark.parametrize(
    ("kind", "width", "rate"),
    [
        ("llama", 2048, 4.91e-4),  # 5e-4 * (2000/2048)**0.781
        ("llama", 576, 1.32e-3),
        ("llama", 32, 2e-3),
        ("qwen3", 4096, 4.73e-4),
        ("mistral", 4096, 2e-4),
        ("llama", None, 2e-4),
    ],
)
def test_the_rate_follows_the_width(kind, width, rate):
    assert rate_for(kind, width) == rate


def test_positions_behind_the_padding_are_not_counted(tmp_path):
    tokens = tokenizer()
    config = transformers.RobertaConfig(max_position_embeddings=514, pad_token_id=1)
    assert longest(config, tokens) == 512
    assert longest(transformers.BloomConfig(), tokens) is None
    tokens.model_max_length = 100
    assert longest(config, tokens) == 100


def test_help_of_other_commands_loads_no_torch():
    code = f"{COMMAND.replace('sys.exit(main())', '')}main(['plan', '--help'])"
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", code], capture_output=True, text=True,
        check=False, timeout=100,
    )  # fmt: skip
    assert " torch\n" not in done.stderr


def test_the_table_has_no_row_twice_and_every_default_is_allowed():
    recipe = Recipe()
    assert dataclasses.asdict(recipe).keys() == FIELDS.keys()
