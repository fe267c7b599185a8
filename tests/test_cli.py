"""The commands: results on stdout, messages on stderr, exit codes a shell user expects."""

import json
import subprocess
import sys

import pytest

from hf_lora import attach_lora, save_lora
from hf_lora.cli import main
from hf_lora.testing import tiny
from tests.support import ALPHA, RANK


@pytest.fixture
def adapter(tmp_path):
    tiny("bert", task="classifier").save_pretrained(tmp_path / "base")
    model = type(tiny("bert", task="classifier")).from_pretrained(tmp_path / "base")
    return save_lora(attach_lora(model, rank=RANK, alpha=ALPHA), tmp_path / "adapter")


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


def test_plan_builds_the_class_that_the_config_names(adapter, capsys):
    assert main(["plan", str(adapter.parent / "base")]) == 0
    assert "Trained whole: classifier" in capsys.readouterr().out


def test_inspect_reads_config_and_header(adapter, capsys):
    assert main(["inspect", str(adapter)]) == 0
    out = capsys.readouterr().out
    assert "rank         16 (12 targets)" in out
    assert "attn.q 2" in out
    assert "classifier 99" in out


def test_inspect_as_json(adapter, capsys):
    assert main(["inspect", str(adapter), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["base"] == str(adapter.parent / "base")
    assert facts["task"] == "SEQ_CLS"
    assert facts["rank"] == {"16": 12}
    assert facts["alpha"] == 11
    assert facts["targets"] == 12
    assert facts["heads"] == {"classifier": 99}  # 32 x 3 + 3
    assert facts["dtype"] == "float32"
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


@pytest.mark.parametrize("arguments", [[], ["fly"], ["plan"], ["plan", "x", "--rank", "big"]])
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
    assert all(word in done.stdout for word in ("demo", "plan", "inspect"))


def test_interrupts_and_closed_pipes_are_quiet(monkeypatch, capsys):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_lora.cli._facts", interrupted)
    monkeypatch.setattr("hf_lora.formats.read_header", lambda _: None)
    assert main(["inspect", "x"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_demo_prints_its_log_or_json_alone(monkeypatch, capsys, tmp_path):
    def run(out, *, seed, log):
        log(f"seed {seed} to {out.name}")
        return {"seed": seed}

    monkeypatch.setattr("hf_lora.demo.run", run)
    assert main(["demo", "--out", str(tmp_path / "d"), "--seed", "3"]) == 0
    assert capsys.readouterr().out == "seed 3 to d\n"
    assert main(["demo", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"seed": 0}
