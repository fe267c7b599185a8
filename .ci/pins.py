"""Prints the pip constraints of an environment.

`pins.py tested` prints `constraints.txt` for the Python that runs it. The torch line is left out
when a torch that meets the project's bound is installed already: pip then keeps the build the user
chose (CPU, CUDA, Apple) and never replaces it.

`pins.py lowest` prints `constraints.txt` with every run-time dependency at its lower bound, except
torch: old torch builds are not made for new Pythons, so its bound is marked untested.
"""

from __future__ import annotations

import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def numbers(version: str) -> tuple[int, ...]:
    """Returns the release part of a version as numbers: `2.13.0+cpu` is (2, 13, 0)."""
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0])[:3])


def bounds() -> dict[str, str]:
    """Returns the lower bound of each run-time dependency of `pyproject.toml`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return dict(line.split(">=") for line in project["dependencies"])


def tested() -> dict[str, str]:
    """Returns the tested version of each package of `constraints.txt`."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def installed_torch_meets(bound: str) -> bool:
    """Says whether this Python has a torch of at least `bound`."""
    try:
        return numbers(metadata.version("torch")) >= numbers(bound)
    except metadata.PackageNotFoundError:
        return False


def pins(kind: str) -> dict[str, str]:
    """Returns the pins of kind `tested` or `lowest`."""
    wanted = tested()
    if kind == "lowest":
        return wanted | {name: bound for name, bound in bounds().items() if name != "torch"}
    if installed_torch_meets(bounds()["torch"]):
        del wanted["torch"]
    return wanted


if __name__ == "__main__":
    if sys.argv[1:] not in (["tested"], ["lowest"]):
        sys.exit("usage: pins.py tested|lowest")
    for name, version in pins(sys.argv[1]).items():
        print(f"{name}=={version}")
