"""`hf lora ...`: the manifest by which the `hf` command of huggingface_hub finds this one.

huggingface_hub 2.4 runs `hf NAME` from a manifest below the home folder and looks at neither PATH
nor entry points. Nothing is registered at installation; `hf extensions rm lora` takes it back too.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from datetime import UTC, datetime
from pathlib import Path

from hf_lora.errors import HubError, InvalidOption

_ROOT = Path("~/.local/share/hf/extensions")  # of huggingface_hub 2.4.0, not to be configured
_NAME, _REPO = "lora", "hf-lora"
_OWNER = "hf_lora"  # no GitHub repository: `hf` then finds no update, and says nothing
_FILE = "manifest.json"


def register(command: str | os.PathLike[str] | None = None) -> Path:
    """Makes `hf lora ...` run this installation.

    Args:
        command: The program to run; left out, the `hf-lora` of this Python.

    Returns:
        The manifest that was written.

    Raises:
        InvalidOption: The program is no file that can be run.
        HubError: Another extension of that name is installed; it is left as it is.
        OSError: The manifest cannot be written.
    """
    program = _program() if command is None else Path(command).expanduser().absolute()
    if not program.is_file() or not os.access(program, os.X_OK):
        raise InvalidOption(
            f"{program} is no program that can be run",
            fix="Install hf-lora with pip, or name its hf-lora command.",
            field="command",
        )
    folder = _ROOT.expanduser() / _REPO
    owner = _owner(folder)
    if owner not in (None, _OWNER):
        raise HubError(
            f"an extension {_REPO!r} of {owner} is installed in {folder}",
            fix="Remove it first: hf extensions rm lora.",
        )
    manifest = {
        "owner": _OWNER,
        "repo": _REPO,
        "repo_id": f"{_OWNER}/{_REPO}",
        "short_name": _NAME,
        "executable_path": str(program),
        "type": "python",
        "installed_at": datetime.now(UTC).isoformat(),
        "description": "LoRA adapters: train, check, convert, push and pull.",
        "commit_sha": None,
    }
    folder.mkdir(parents=True, exist_ok=True)
    aside = folder / f"{_FILE}.new"
    aside.write_text(f"{json.dumps(manifest, indent=2)}\n", encoding="utf-8")
    os.replace(aside, folder / _FILE)
    return folder / _FILE


def unregister() -> bool:
    """Takes `hf lora` away again.

    Returns:
        Whether it was there.

    Raises:
        HubError: Another extension of that name is installed; it is left as it is.
    """
    folder = _ROOT.expanduser() / _REPO
    owner = _owner(folder)
    if owner is None:
        return False
    if owner != _OWNER:
        raise HubError(
            f"the extension in {folder} is {owner}'s", fix="Remove it: hf extensions rm lora."
        )
    shutil.rmtree(folder)
    return True


def _owner(folder: Path) -> str | None:
    """Returns who installed an extension: None where there is none."""
    if not folder.exists():
        return None
    try:
        owner = json.loads((folder / _FILE).read_text(encoding="utf-8"))["owner"]
    except (OSError, ValueError, KeyError, TypeError):
        return "an unknown owner"
    return str(owner)


def _program() -> Path:
    """Returns the console script beside the Python that runs."""
    beside = Path(sys.executable).parent / ("hf-lora.exe" if os.name == "nt" else "hf-lora")
    found = beside if beside.is_file() else shutil.which("hf-lora")
    return Path(found or beside).absolute()
