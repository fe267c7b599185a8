"""`hf lora ...` with the real `hf`: registered by hf-lora, and as an extension of its own."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from hf_lora import attach_lora, save_lora
from hf_lora.errors import HubError, InvalidOption
from hf_lora.hub.extension import register, unregister
from hf_lora.testing import tiny

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "integrations" / "hf_cli" / "hf-lora"
HF = Path(sys.executable).parent / "hf"


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("HF_HUB_DISABLE_UPDATE_CHECK", "1")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    return tmp_path


@pytest.fixture
def program(tmp_path):
    """What pip makes of the console script."""
    file = tmp_path / "bin" / "hf-lora"
    file.parent.mkdir()
    file.write_text(
        f"#!{sys.executable}\nimport sys\nfrom hf_lora.cli import main\nsys.exit(main())\n"
    )
    file.chmod(0o755)
    return file


def hf(*words):
    return subprocess.run([HF, *words], capture_output=True, text=True, timeout=120, check=False)


def test_hf_runs_what_is_registered(home, program):
    manifest = register(program)
    assert manifest == home / ".local/share/hf/extensions/hf-lora/manifest.json"
    folder = save_lora(attach_lora(tiny("llama")), home / "adapter")
    done = hf("lora", "inspect", str(folder), "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["components"]["model"]["rank"]
    assert "lora" in hf("extensions", "ls").stdout
    assert unregister()
    assert not manifest.parent.exists()
    assert not unregister()
    assert hf("lora", "inspect", str(folder)).returncode != 0


def test_the_script_of_the_extension_runs_in_the_environment_of_hf(home):
    assert SCRIPT.stat().st_mode & stat.S_IXUSR
    register(SCRIPT)
    done = hf("lora", "--version")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("hf-lora ")


def test_the_script_says_what_is_missing(home, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    done = subprocess.run(
        [SCRIPT, "ls"], capture_output=True, text=True, cwd=home, timeout=60, check=False
    )
    assert done.returncode == 1
    assert "pip install hf-lora" in done.stderr


def test_another_extension_of_that_name_is_left_alone(home, program):
    folder = home / ".local/share/hf/extensions/hf-lora"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text('{"owner": "bob"}')
    for act in (lambda: register(program), unregister):
        with pytest.raises(HubError, match="hf extensions rm lora"):
            act()
    assert (folder / "manifest.json").read_text() == '{"owner": "bob"}'


def test_only_a_program_is_registered(home, tmp_path):
    with pytest.raises(InvalidOption, match="no program that can be run"):
        register(tmp_path / "none")
    assert not (home / ".local").exists()
