"""The example files run as they are, and their last lines say what they promise."""

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


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_has_at_most_eighty_lines(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 80


def test_every_example_is_run_above():
    source = Path(__file__).read_text(encoding="utf-8")
    assert not [path.name for path in EXAMPLES if f'output_of("{path.name}"' not in source]
