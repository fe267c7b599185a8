"""The commands: results on stdout, messages on stderr, exit codes a shell user expects."""

import json
import subprocess
import sys

import diffusers
import peft
import pytest
import torch

from hf_lora import attach_lora, load_lora, open_adapter, save_lora
from hf_lora.cli import main
from hf_lora.testing import tiny
from hf_lora.testing.pipelines import component_output, tiny_pipeline
from tests.support import ALPHA, RANK, as_foreign, logits, randomise


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
    assert all(word in done.stdout for word in ("demo", "plan", "inspect", "verify", "merge"))


def test_interrupts_and_closed_pipes_are_quiet(monkeypatch, capsys):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_lora.fetch.local_files", interrupted)
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
