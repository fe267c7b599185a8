"""What a user gets from the wheel: the package alone, its seven dependencies, its command."""

import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import hf_lora

ROOT = Path(__file__).parent.parent
SHIPPED = ("pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md")
DEPENDENCIES = {
    "accelerate",
    "diffusers",
    "huggingface-hub",
    "peft",
    "safetensors",
    "torch",
    "transformers",
}
# The backend is called as pip calls it, without the network that an isolated build would need.
BUILD = (
    "import setuptools.build_meta as backend; "
    "backend.build_sdist('dist'); backend.build_wheel('dist')"
)


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """Returns the folder with the wheel and the sdist, built from a copy of the project."""
    copy = tmp_path_factory.mktemp("project")
    for name in SHIPPED:
        shutil.copy(ROOT / name, copy / name)
    skip = shutil.ignore_patterns("__pycache__")
    for name in ("hf_lora", "tests", "examples", "benchmarks", "integrations"):
        shutil.copytree(ROOT / name, copy / name, ignore=skip)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", BUILD], cwd=copy, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return copy / "dist"


@pytest.fixture(scope="module")
def wheel(dist):
    (path,) = dist.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def metadata(wheel):
    info = f"hf_lora-{hf_lora.__version__}.dist-info"
    with zipfile.ZipFile(wheel) as archive:
        return Parser().parsestr(archive.read(f"{info}/METADATA").decode())


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    tops = {name.split("/")[0] for name in names}
    assert tops == {"hf_lora", f"hf_lora-{hf_lora.__version__}.dist-info"}
    sources = {f"hf_lora/{p.relative_to(ROOT / 'hf_lora')}" for p in ROOT.glob("hf_lora/**/*.py")}
    assert {n for n in names if n.endswith(".py")} == {s.replace(os.sep, "/") for s in sources}
    assert "hf_lora/py.typed" in names


def test_the_wheel_depends_on_exactly_the_seven(metadata):
    required = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert {line.split(">=")[0] for line in required} == DEPENDENCIES
    assert not [line for line in required if "==" in line or "<" in line]


def test_the_extras_are_those_of_users_and_of_developers(metadata):
    extras = {"demo", "train", "quantised", "test", "dev"}
    assert set(metadata.get_all("Provides-Extra")) == extras


def test_the_metadata_names_version_licence_and_python(metadata):
    assert metadata["Version"] == hf_lora.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"


def test_the_sdist_builds_the_same_package(dist):
    (path,) = dist.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert {"pyproject.toml", "README.md", "LICENSE", "hf_lora/__init__.py"} <= names


@pytest.mark.slow
def test_it_installs_and_imports_in_an_empty_environment(wheel, tmp_path):
    venv.create(tmp_path / "empty", with_pip=False)
    folder = "Scripts" if os.name == "nt" else "bin"
    python = tmp_path / "empty" / folder / "python"
    where = subprocess.check_output(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
    ).strip()
    pip = [sys.executable, "-m", "pip", "--isolated", "--disable-pip-version-check"]
    subprocess.run(
        [*pip, "install", "--quiet", "--no-index", "--no-deps", "--target", where, wheel],
        check=True,
    )
    code = (
        "import importlib.metadata as m, importlib.util as u, hf_lora; "
        "(script,) = m.entry_points(group='console_scripts', name='hf-lora'); "
        "print(hf_lora.__version__, hf_lora.__file__, script.value, u.find_spec('torch'))"
    )
    printed = subprocess.check_output([python, "-c", code], text=True, cwd=tmp_path).split()
    assert printed[0] == hf_lora.__version__
    assert Path(printed[1]).is_relative_to(tmp_path)
    assert printed[2:] == ["hf_lora.cli:main", "None"]


def test_the_lower_bounds_are_met_by_the_tested_set():
    pins = (line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines())
    tested = {pin[0]: pin[1] for pin in pins if len(pin) == 2}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    def parts(version):
        return [int(part) for part in version.split(".")]

    for line in project["dependencies"]:
        name, bound = line.split(">=")
        assert parts(tested[name]) >= parts(bound)


def pins(kind, *python_flags):
    command = [sys.executable, *python_flags, ROOT / ".ci" / "pins.py", kind]
    return subprocess.check_output(command, text=True).splitlines()


def test_the_pins_leave_a_torch_that_is_there_alone():
    assert not [pin for pin in pins("tested") if pin.startswith("torch==")]
    # -S hides the installed packages
    assert [pin for pin in pins("tested", "-S") if pin.startswith("torch==")]


def test_the_lowest_pins_are_the_bounds_save_torch():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    bounds = {line.replace(">=", "==") for line in project["dependencies"]}
    missing = bounds - set(pins("lowest"))
    assert [line.split("==")[0] for line in missing] == ["torch"]


def test_no_file_names_a_registry_or_a_machine():
    names = ("pyproject.toml", "constraints.txt", "Makefile", "README.md", ".ci/run")
    text = "".join((ROOT / name).read_text() for name in names)
    for word in ("--index-url", "--extra-index-url", "find-links", "+cpu", "file://"):
        assert word not in text
