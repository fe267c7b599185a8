"""The commands: results on stdout, messages on stderr, exit codes a shell user expects."""

import json
import subprocess
import sys

import diffusers
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from hf_lora import attach_lora, load_lora, open_adapter, save_adapter, save_lora
from hf_lora.architectures import ARCHITECTURES
from hf_lora.cli import main
from hf_lora.errors import InvalidOption, UnsupportedHost
from hf_lora.testing import tiny
from hf_lora.testing.pipelines import component_output, tiny_pipeline
from tests.support import ALPHA, RANK, as_foreign, logits, randomise

COMMANDS = ("demo", "plan", "inspect", "probe", "convert", "verify", "merge")


@pytest.fixture
def adapter(tmp_path):
    tiny("bert", task="classifier").save_pretrained(tmp_path / "base")
    model = type(tiny("bert", task="classifier")).from_pretrained(tmp_path / "base")
    randomise(attach_lora(model, rank=RANK, alpha=ALPHA))
    return save_lora(model, tmp_path / "adapter")


def rows_of(capsys):
    return {row["name"]: row for row in json.loads(capsys.readouterr().out)}


def test_plan_needs_a_config_only(tmp_path, capsys):
    tiny("llama").config.save_pretrained(tmp_path)
    for place in (tmp_path, tmp_path / "config.json"):
        assert main(["plan", str(place)]) == 0
        out, _ = capsys.readouterr()
        assert out.startswith("LoRA plan for LlamaForCausalLM")
        assert "attn.q" in out


def test_plan_as_json_with_options(tmp_path, capsys):
    tiny("llama").save_pretrained(tmp_path)  # names the class in `architectures`
    options = ["--rank", "4", "--alpha", "11", "--targets", "attn.q,v_proj", "--json"]
    assert main(["plan", str(tmp_path), *options]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["rank"], plan["alpha"], plan["host"]) == (4, 11, "LlamaForCausalLM")
    assert set(plan["roles"]) == {"attn.q", "attn.v"}
    assert main(["plan", str(tmp_path), "--targets", "attn.q, attn.v", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)["roles"]) == {"attn.q", "attn.v"}


def test_plan_builds_the_class_that_the_config_names(adapter, capsys):
    assert main(["plan", str(adapter.parent / "base")]) == 0
    assert "Trained whole: classifier" in capsys.readouterr().out


def test_inspect_reads_config_and_header(adapter, capsys):
    assert main(["inspect", str(adapter)]) == 0
    out = capsys.readouterr().out
    assert "rank            16 (12 targets)" in out
    assert "attn.q 2" in out
    assert "classifier 99" in out
    assert open_adapter(adapter).digest in out
    assert "fingerprint       model fp1:" in out


def test_inspect_as_json(adapter, capsys):
    assert main(["inspect", str(adapter), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["base"] == str(adapter.parent / "base")
    assert facts["digest"] == open_adapter(adapter).digest
    assert facts["host"] == "BertForSequenceClassification"
    part = facts["components"]["model"]
    assert part["task"] == "SEQ_CLS"
    assert part["rank"] == {"16": 12}
    assert (part["alpha"], part["scaling"]) == (11, [11 / 16])
    assert part["targets"] == 12
    assert part["trained_whole"] == {"classifier": 99}  # 32 x 3 + 3
    assert part["dtype"] == "float32"
    assert facts["bytes"] == 4 * facts["parameters"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["inspect", "nowhere"], "AdapterNotFound: there is no file or folder 'nowhere'"),
        (["plan", "nowhere/x"], "AdapterNotFound: no usable model config at 'nowhere/x'"),
    ],
)
def test_failures_exit_with_1_and_one_line_on_stderr(arguments, words, capsys):
    assert main(arguments) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert words in err
    assert err.startswith("hf-lora: ")
    assert len(err.strip().splitlines()) == 1


def test_a_config_that_makes_no_model(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "clip_vision_model"}')
    assert main(["plan", str(tmp_path)]) == 1
    assert "makes no model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_attention_heads": 0}, "no usable model config"),
        ({"hidden_size": -4}, "makes no model"),
        ({"hidden_size": "big"}, "no usable model config"),
        ({"architectures": ["pipeline"]}, "names the class 'pipeline'"),
        ({"architectures": [5]}, "5"),
        ({"architectures": ["Evil"]}, "names the class 'Evil'"),
        ({"architectures": ["BertModel"]}, "makes no model"),
    ],
)
def test_configs_that_cannot_be_built_are_one_line(tmp_path, fields, words, capsys):
    tiny("llama").config.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    assert main(["plan", str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert words in err
    assert len(err.strip().splitlines()) == 1
    assert len(err) < 1000


def test_code_of_a_repository_is_not_run_and_nothing_is_asked(tmp_path, capsys):
    (tmp_path / "model.py").write_text("raise SystemExit('ran')")
    config = {"model_type": "x", "auto_map": {"AutoConfig": "model.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["plan", str(tmp_path)]) == 1
    assert "no usable model config" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        *([], ["fly"], ["plan"], ["plan", "x", "--rank", "big"]),
        # an empty name would be read as the current folder, an empty --base as none
        *(["plan", ""], ["inspect", ""], ["inspect", " "], ["verify", "x", "--base", ""]),
        *(["merge", "", "x", "y"], ["merge", "x", "", "y"], ["merge", "x", "y", ""]),
        *(["inspect", "x", "--revision", ""], ["demo", "--out", ""]),
        *(["probe", ""], ["probe", "x", "--for", ""], ["convert", "x", "y"]),
        *(["convert", "x", "y", "--to", "onnx"], ["convert", "x", "", "--to", "kohya"]),
    ],
)
def test_bad_usage_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 2
    assert capsys.readouterr().out == ""


def test_help_and_version_load_no_torch():
    code = "import sys, hf_lora.cli as c\ntry: c.main(['--help'])\nexcept SystemExit: pass\n"
    code += "print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
    assert all(word in done.stdout for word in COMMANDS)


def test_interrupts_and_closed_pipes_are_quiet(monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_lora.fetch.local_files", interrupted)
    assert main(["inspect", "x"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_demo_prints_its_log_or_json_alone(monkeypatch, capsys, tmp_path):
    def run(out, *, seed, push, log):
        assert not push  # nothing goes to the real Hub unless it is named
        log(f"seed {seed} to {out.name}")
        return {"seed": seed}

    monkeypatch.setattr("hf_lora.demo.run", run)
    assert main(["demo", "--out", str(tmp_path / "d"), "--seed", "3"]) == 0
    assert capsys.readouterr().out == "seed 3 to d\n"
    assert main(["demo", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"seed": 0}


def test_verify_lists_every_check(adapter, capsys):
    assert main(["verify", str(adapter), "--base", str(adapter.parent / "base")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == [
        *("file", "manifest", "config", "tensors", "digest", "fits", "base")
    ]
    assert all(line.startswith("ok ") for line in lines)
    assert open_adapter(adapter).digest in lines[4]


def test_verify_leaves_open_what_a_foreign_file_cannot_tell(adapter, capsys):
    as_foreign(adapter)
    assert main(["verify", str(adapter), "--base", str(adapter.parent / "base"), "--json"]) == 0
    rows = rows_of(capsys)
    assert rows["manifest"]["text"].startswith("none")
    assert rows["base"] == {
        "name": "base",
        "state": "open",
        "text": "not verified: the file carries no fingerprint",
    }


def test_verify_names_the_check_that_fails_and_leaves_the_rest_open(adapter, capsys):
    weights = adapter / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1  # one bit of a value
    weights.write_bytes(data)
    base = str(adapter.parent / "base")
    assert main(["verify", str(adapter), "--base", base, "--json"]) == 1
    rows = rows_of(capsys)
    assert [row["state"] for row in rows.values()] == ["ok"] * 4 + ["failed", "open", "open"]
    assert "its manifest states v1:sha256:" in rows["digest"]["text"]


def test_verify_finds_another_base(adapter, tmp_path, capsys):
    tiny("bert", task="classifier", seed=1).save_pretrained(tmp_path / "other")
    assert main(["verify", str(adapter), "--base", str(tmp_path / "other")]) == 1
    out, err = capsys.readouterr()
    assert "failed  base      mismatched" in out
    assert "the check 'base' failed" in err


def test_verify_of_a_base_that_does_not_load(adapter, capsys):
    assert main(["verify", str(adapter), "--base", "nowhere/x"]) == 1
    assert "'nowhere/x' does not load as the base" in capsys.readouterr().err


def test_merge_writes_a_model_that_plain_transformers_loads(adapter, tmp_path, capsys):
    base, out = str(adapter.parent / "base"), tmp_path / "merged"
    assert main(["merge", base, str(adapter), str(out)]) == 0
    assert "merged default into 12 layers" in capsys.readouterr().out
    kind = type(tiny("bert", task="classifier"))
    plain, adapted = kind.from_pretrained(out), kind.from_pretrained(base)
    load_lora(adapted, adapter)
    # one fp32 rounding of W + sBA a weight
    assert torch.allclose(logits(plain), logits(adapted), rtol=0, atol=1e-5)
    assert not torch.allclose(logits(plain), logits(kind.from_pretrained(base)), atol=1e-3)
    assert main(["merge", base, str(adapter), str(out)]) == 1
    assert "exists and is not empty" in capsys.readouterr().err


def test_merge_writes_a_pipeline_that_plain_diffusers_loads(tmp_path, capsys):
    pipe = tiny_pipeline("sd")
    pipe.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=4, lora_alpha=7, target_modules=["to_q"], init_lora_weights=False)
    pipe.unet.add_adapter(config, "default")
    file = save_lora(pipe, tmp_path / "style.safetensors")
    base, out = str(tmp_path / "base"), tmp_path / "merged"
    assert main(["merge", base, str(file), str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["base"].startswith("matched")
    plain = diffusers.StableDiffusionPipeline.from_pretrained(out)
    # one fp32 rounding of W + sBA a weight
    assert torch.allclose(
        component_output(plain.unet), component_output(pipe.unet), rtol=0, atol=1e-5
    )


@pytest.fixture
def base(tmp_path):
    tiny("llama").save_pretrained(tmp_path / "lm")
    return str(tmp_path / "lm")


def adapter_on(base, path, *, kind="LlamaForCausalLM", train_also=None, **options):
    model = getattr(transformers, kind).from_pretrained(base, **options)
    randomise(attach_lora(model, rank=RANK, alpha=ALPHA, train_also=train_also))
    return model, str(save_lora(model, path))


def one_line(capsys, *, out=False):
    said, err = capsys.readouterr()
    assert out or said == ""
    assert len(err.strip().splitlines()) == 1
    return err


@pytest.mark.parametrize("foreign", [False, True])
def test_a_classifier_on_the_folder_of_a_language_model(base, tmp_path, foreign, capsys):
    kind = "LlamaForSequenceClassification"
    model, path = adapter_on(base, tmp_path / "adapter", kind=kind, num_labels=3)
    if foreign:
        as_foreign(tmp_path / "adapter")
    assert main(["verify", path, "--base", base, "--json"]) == 0
    assert rows_of(capsys)["fits"]["state"] == "ok"
    assert main(["merge", base, path, str(tmp_path / "out")]) == 0
    plain = getattr(transformers, kind).from_pretrained(tmp_path / "out")
    # one fp32 rounding of W + sBA a weight
    assert torch.allclose(logits(plain), logits(model), rtol=0, atol=1e-5)
    assert logits(plain).shape[1] == 3


def test_a_plain_peft_classifier_with_its_task_alone(base, tmp_path, capsys):
    model = transformers.LlamaForSequenceClassification.from_pretrained(base)
    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"])
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    assert main(["verify", str(tmp_path / "adapter"), "--base", base]) == 0
    assert "in LlamaForSequenceClassification" in capsys.readouterr().out


def test_a_pipeline_verifies_against_its_folder(tmp_path, capsys):
    pipe = tiny_pipeline("sd")
    pipe.save_pretrained(tmp_path / "base")
    for part in (pipe.unet, pipe.text_encoder):
        attach_lora(part, targets="attention")
    path = str(save_lora(pipe, tmp_path / "style.safetensors"))
    assert main(["verify", path, "--base", str(tmp_path / "base"), "--json"]) == 0
    assert {row["state"] for row in rows_of(capsys).values()} == {"ok"}


@pytest.mark.parametrize(
    ("stored", "asked", "expected"),
    [
        (torch.float16, "auto", torch.float16),
        (torch.float32, "bfloat16", torch.bfloat16),
    ],
)
def test_a_merged_pipeline_has_the_dtype_asked_for(tmp_path, stored, asked, expected):
    pipe = tiny_pipeline("sd")
    attach_lora(pipe.unet, targets="attention")
    path = str(save_lora(pipe, tmp_path / "style.safetensors"))
    tiny_pipeline("sd").to(stored).save_pretrained(tmp_path / "base")
    out = tmp_path / "out"
    assert main(["merge", str(tmp_path / "base"), path, str(out), "--dtype", asked]) == 0
    for part in ("unet", "text_encoder", "vae"):
        (file,) = (out / part).glob("*.safetensors")
        kinds = {t.dtype for t in load_file(file).values() if t.is_floating_point()}
        assert kinds == {expected}, part


@pytest.mark.parametrize("dtype", ["float33", "int8", "float8_e4m3fn", "nn"])
def test_unknown_dtypes_are_refused_before_anything_is_read(tmp_path, dtype, capsys):
    (tmp_path / "adapter").mkdir()
    arguments = ["nowhere/x", str(tmp_path / "adapter"), str(tmp_path / "out")]
    assert main(["merge", *arguments, "--dtype", dtype]) == 1
    assert f"InvalidOption: dtype='{dtype}'" in one_line(capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("out", "words"),
    [
        ("file", "file is a file, not a folder. Name a new folder"),
        ("file/out", "file/out cannot be written (Not a directory)"),
        ("/proc/nothing/out", "/proc/nothing/out cannot be written"),
        ("full", "full exists and is not empty"),
    ],
)
def test_out_is_checked_before_the_base_is_loaded(tmp_path, monkeypatch, out, words, capsys):
    def loads(*_, **__):
        raise AssertionError("loaded")

    monkeypatch.setattr("hf_lora.bake.load_base", loads)
    monkeypatch.setattr("hf_lora.bake.open_adapter", loads)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    (tmp_path / "adapter").mkdir()
    before = sorted(tmp_path.rglob("*"))
    assert main(["merge", "base", str(tmp_path / "adapter"), str(tmp_path / out)]) == 1
    assert words in one_line(capsys)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("there", [False, True])
def test_a_save_that_fails_leaves_nothing(base, tmp_path, monkeypatch, there, capsys):
    _, path = adapter_on(base, tmp_path / "adapter")
    out = tmp_path / "a" / "b"
    if there:
        out.mkdir(parents=True)

    def fills_up(_, folder):
        (folder / "config.json").write_text("{}")
        (folder / "parts").mkdir()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", fills_up)
    assert main(["merge", base, path, str(out)]) == 1
    assert "cannot be written (No space left on device)" in one_line(capsys)
    assert list(out.iterdir()) == [] if there else not out.parent.exists()


def test_a_rename_that_fails_leaves_nothing(base, tmp_path, monkeypatch):
    _, path = adapter_on(base, tmp_path / "adapter")
    inner, moved = type(tmp_path).rename, []

    def fails(self, target):
        if moved:
            raise KeyboardInterrupt
        moved.append(target)
        return inner(self, target)

    monkeypatch.setattr(type(tmp_path), "rename", fails)
    assert main(["merge", base, path, str(tmp_path / "out")]) == 130
    assert not (tmp_path / "out").exists()


def test_a_base_of_another_architecture_is_refused_and_leaves_no_folder(
    base, tmp_path, adapter, capsys
):
    assert main(["merge", base, str(adapter), str(tmp_path / "x" / "out")]) == 1
    # transformers would make a BERT of random weights on the folder of a Llama
    assert "none of its weights is one of BertForSequenceClassification" in one_line(capsys)
    assert not (tmp_path / "x").exists()


def test_merge_writes_into_the_current_folder(base, tmp_path, monkeypatch):
    _, path = adapter_on(base, tmp_path / "adapter")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert main(["merge", base, path, "."]) == 0
    names = {p.name for p in (tmp_path / "here").iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors"}


def test_a_trained_lm_head_is_merged_where_it_is_allowed(base, tmp_path, capsys):
    model, path = adapter_on(base, tmp_path / "adapter", train_also=["lm_head"])
    assert main(["merge", base, path, str(tmp_path / "out")]) == 1
    err = one_line(capsys)
    assert "Pass --extra-modules" in err
    assert "extra_modules" not in err
    assert main(["verify", path, "--base", base]) == 0
    assert "which a load must allow: --extra-modules" in capsys.readouterr().out
    assert main(["merge", base, path, str(tmp_path / "out"), "--extra-modules"]) == 0
    plain = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out")
    # one fp32 rounding of W + sBA a weight
    assert torch.allclose(logits(plain), logits(model), rtol=0, atol=1e-5)


def test_another_base_is_merged_where_it_is_allowed(base, tmp_path, capsys):
    _, path = adapter_on(base, tmp_path / "adapter")
    tiny("llama", seed=5).save_pretrained(tmp_path / "other")
    merge = ["merge", str(tmp_path / "other"), path, str(tmp_path / "out")]
    assert main(merge) == 1
    assert "pass --no-strict to use it on this one" in one_line(capsys)
    assert main([*merge, "--no-strict"]) == 0
    assert "base: mismatched" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("python", "here"),
    [
        ("Pass limits=LoadLimits(header=...) if you trust it.", "In Python, limits=LoadLimits"),
        ('Use targets="attention".', "Use --targets attention."),
        ("Name one: file='a b.safetensors'.", "Name one: --file 'a b.safetensors'."),
        ("Name the folder: file=....", "Name the folder: --file FOLDER."),
        ("Give the pipeline: open_adapter(source, host=pipe).", "Give the pipeline: --for PIPE"),
        ("Give it: save_adapter(adapter, path, layout=..., host=pipe).", "Give it: --for PIPE"),
        ("Open it with open_adapter(source, host=...).", "Give --for PIPELINE."),
        ('Use targets="default" or print(plan_lora(model)).', "Use --targets default or `hf-lora"),
    ],
)
def test_advice_names_options_not_arguments(monkeypatch, python, here, capsys):
    def fails(*_, **__):
        raise InvalidOption("the fact says strict=False", fix=python)

    monkeypatch.setattr("hf_lora.cli._files", fails)
    assert main(["probe", "x"]) == 1  # it has all of these options
    err = one_line(capsys)
    assert here in err
    assert "the fact says strict=False" in err  # a fact may quote a file


def test_the_folder_of_an_adapter_is_refused_as_base(base, tmp_path, capsys):
    _, path = adapter_on(base, tmp_path / "adapter")
    for arguments in (["verify", path, "--base", path], ["merge", path, path, str(tmp_path / "o")]):
        assert main(arguments) == 1
        err = one_line(capsys)
        assert "holds an adapter and no base" in err
        assert f"it names {base!r}" in err


def test_file_and_revisions_reach_where_they_belong(monkeypatch, tmp_path, adapter):
    asked = []

    def found(source, **options):
        asked.append((source, options))
        return adapter

    def fails(name, *_, revision, **__):
        asked.append((name, revision))
        raise UnsupportedHost("stop")

    monkeypatch.setattr("hf_lora.fetch.local_files", found)
    monkeypatch.setattr("hf_lora.verify.load_base", fails)
    monkeypatch.setattr("hf_lora.bake.load_base", fails)
    options = ["--file", "f", "--revision", "a1"]
    assert main(["inspect", "user/a", *options]) == 0
    options += ["--base-revision", "b2"]
    assert main(["verify", "user/a", *options, "--base", "user/b"]) == 1
    assert main(["merge", "user/b", "user/a", str(tmp_path / "out"), *options]) == 1
    of_adapter = ("user/a", {"file": "f", "revision": "a1"})
    of_base = ("user/b", "b2")
    assert asked == [of_adapter, of_adapter, of_base, of_adapter, of_base]


def test_an_image_processor_comes_along(tmp_path):
    config = transformers.ViTConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        image_size=16, patch_size=8, num_labels=3,
    )  # fmt: skip
    base, kind = tmp_path / "vit", transformers.ViTForImageClassification
    kind(config).save_pretrained(base)
    transformers.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(base)
    _, path = adapter_on(base, tmp_path / "adapter", kind=kind.__name__)
    assert main(["merge", str(base), path, str(tmp_path / "out")]) == 0
    found = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out")
    assert found.size == {"height": 16, "width": 16}


def test_a_processor_and_its_tokenizer_come_along(base, tmp_path):
    tokenizer = tiny_pipeline("sd").tokenizer
    image = transformers.CLIPImageProcessor(size={"shortest_edge": 16})
    transformers.CLIPProcessor(image, tokenizer).save_pretrained(base)
    _, path = adapter_on(base, tmp_path / "adapter")
    assert main(["merge", base, path, str(tmp_path / "out")]) == 0
    found = transformers.AutoProcessor.from_pretrained(tmp_path / "out")
    assert type(found).__name__ == "CLIPProcessor"
    assert found.tokenizer.get_vocab() == tokenizer.get_vocab()


@pytest.fixture
def style(tmp_path):
    """A pipeline's folder without weights, and a file for its denoiser with a key too many."""
    pipe = tiny_pipeline("sd")
    pipe.save_pretrained(tmp_path / "pipe")
    for weights in (tmp_path / "pipe").glob("*/*.safetensors"):
        weights.unlink()
    randomise(attach_lora(pipe.unet, rank=4, alpha=7, targets="attention"))
    file = save_lora(pipe, tmp_path / "style.safetensors")
    words = {"modelspec.title": "a \x1b[2J title", "modelspec.trigger_phrase": "ohwx"}
    kohya = save_adapter(
        open_adapter(file), tmp_path / "kohya.safetensors", layout="kohya", host=pipe
    )
    more = {f"lora_unet_nowhere.lora_{x}.weight": torch.zeros(4, 4) for x in ("down", "up")}
    save_file({**load_file(kohya), **more}, tmp_path / "more.safetensors", metadata=words)
    return tmp_path


def test_probe_says_what_a_file_is_and_whether_it_would_load(style, capsys):
    for file in ("style.safetensors", "kohya.safetensors"):
        assert main(["probe", str(style / file), "--for", str(style / "pipe")]) == 0
        out, err = capsys.readouterr()
        assert err == ""
        assert "unet              LoRA on" in out
        assert "alpha 7, scaling 1.75" in out
        assert f"Loads into {style / 'pipe'}: yes" in out


def test_probe_exits_with_1_and_the_reason_where_a_file_would_not_load(style, capsys):
    command = ["probe", str(style / "more.safetensors"), "--for", str(style / "pipe")]
    assert main(command) == 1
    out, err = capsys.readouterr()
    assert f"Loads into {style / 'pipe'}: no." in out
    assert "or pass --no-strict to leave" in out
    assert r"title             'a \x1b[2J title'" in out
    assert "Trigger words: 'ohwx'" in out
    assert "lora_unet_nowhere" in err
    assert len(err.strip().splitlines()) == 1
    assert main([*command, "--no-strict"]) == 0
    capsys.readouterr()
    assert main([*command, "--json"]) == 1
    facts = json.loads(capsys.readouterr().out)
    assert (facts["loads"], facts["lenient"], facts["ok"]) == (False, True, False)
    assert facts["left_out"] == [f"lora_unet_nowhere.lora_{x}.weight" for x in ("down", "up")]
    assert facts["facts"]["title"] == "a \x1b[2J title"


def test_probe_without_a_pipeline_looks_for_one(style, adapter, monkeypatch, capsys):
    few = {name: ARCHITECTURES[name] for name in ("sd1", "flux")}
    monkeypatch.setattr("hf_lora.recognise.ARCHITECTURES", few)
    monkeypatch.setattr("hf_lora.exchange.ARCHITECTURES", few)
    assert main(["probe", str(style / "kohya.safetensors")]) == 1
    assert "fits none of the pipelines" in one_line(capsys, out=True)
    assert main(["probe", str(adapter)]) == 0  # a language model's needs none
    assert main(["probe", str(style / "kohya.safetensors"), "--for", "sd1"]) == 1
    assert "AdapterMismatch" in one_line(capsys, out=True)
    assert main(["probe", str(style / "kohya.safetensors"), "--for", "sd9"]) == 1
    assert "no pipeline is known by the name 'sd9'" in one_line(capsys)


def test_convert_writes_a_file_that_another_program_loads(style, capsys):
    out, pipe = style / "out.safetensors", str(style / "pipe")
    command = ["convert", str(style / "kohya.safetensors"), str(out), "--to", "diffusers"]
    assert main([*command, "--for", pipe]) == 0
    text, err = capsys.readouterr()
    assert err == ""
    assert "the digest is the same" in text
    assert main([*command, "--for", pipe, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["digest"] == facts["digest_before"] == open_adapter(out).digest
    plain, ours = tiny_pipeline("sd"), tiny_pipeline("sd")
    plain.load_lora_weights(out)
    load_lora(ours, style / "style.safetensors")
    assert torch.equal(component_output(plain.unet), component_output(ours.unet))


def test_convert_refuses_what_would_be_lost_and_its_own_source(style, capsys):
    out, pipe = str(style / "out.safetensors"), str(style / "pipe")
    more, kohya = str(style / "more.safetensors"), str(style / "kohya.safetensors")
    assert main(["convert", more, out, "--to", "diffusers", "--for", pipe]) == 1
    err = one_line(capsys)
    assert "lora_unet_nowhere" in err
    assert "strict" not in err
    assert main(["convert", kohya, kohya, "--to", "kohya", "--for", pipe]) == 1
    assert "which stays as it is" in one_line(capsys)
    assert not (style / "out.safetensors").exists()
