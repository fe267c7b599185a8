"""Bytes <-> Adapter: one codec a file, chosen here by what lies on disk.

Codecs know files and tensors, never a model. Reading is strict: a file is read whole and checked,
or refused with one typed error that names file, field and fix.
"""

from __future__ import annotations

import os
from pathlib import Path

from hf_lora.adapter import Adapter
from hf_lora.errors import AdapterNotFound, BadAdapterFile, InvalidOption
from hf_lora.formats import peft

__all__ = ["open_adapter", "read_header", "save_adapter"]

LAYOUTS = {"peft": peft.write}


def open_adapter(source: str | os.PathLike[str] | Adapter) -> Adapter:
    """Reads an adapter with all its tensors, checked.

    Args:
        source: A peft folder (`adapter_config.json` and `adapter_model.safetensors`), the
            safetensors file inside one, or an `Adapter`, which comes back as it is.

    Returns:
        The adapter, tensors on the CPU in the file's dtypes.

    Raises:
        AdapterNotFound: There is nothing at `source`, or no adapter in it.
        BadAdapterFile: A file is truncated, not understood, or holds values that cannot be right.
        AdapterMismatch: Config and tensors contradict each other.
    """
    return source if isinstance(source, Adapter) else peft.read(_folder(source))


def read_header(source: str | os.PathLike[str]) -> Adapter:
    """Reads config and file header only; the adapter's tensors lie on the meta device."""
    return peft.read(_folder(source), header_only=True)


def save_adapter(adapter: Adapter, path: str | os.PathLike[str], *, layout: str = "peft") -> Path:
    """Writes an adapter as a folder that plain peft and transformers load.

    Each file is written aside and renamed, so a broken write leaves the old file whole.

    Args:
        adapter: What to write.
        path: The folder; it is made when missing.
        layout: `"peft"`, the only layout so far.

    Returns:
        The folder.

    Raises:
        InvalidOption: The layout is unknown or `path` is a file.
        BadAdapterFile: The adapter holds what this layout cannot carry.
    """
    if layout not in LAYOUTS:
        raise InvalidOption(f"unknown layout {layout!r}", fix=f"Use one of {sorted(LAYOUTS)}.")
    if not isinstance(path, str | os.PathLike):
        raise InvalidOption(f"path={path!r} is no path", field="path")
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise InvalidOption(f"{folder} is a file", fix="Give a folder to save into.")
    LAYOUTS[layout](adapter, folder)
    return folder


def _folder(source: str | os.PathLike[str]) -> Path:
    if not isinstance(source, str | os.PathLike) or len(os.fspath(source)) >= 4096:
        raise AdapterNotFound(f"{str(source)[:200]!r} is no path of a file or folder")
    path = Path(source)
    if path.is_file():
        if path.name == peft.WEIGHTS:
            return path.parent
        raise BadAdapterFile(
            f"a {path.suffix or 'bare'} file alone is not read yet",
            fix=f"Give a folder with {peft.CONFIG} and {peft.WEIGHTS}.",
            file=str(path),
        )
    if not path.is_dir():
        raise AdapterNotFound(
            f"there is no file or folder {str(source)!r}",
            fix='A Hub repository is read by load_lora(host, "user/name").',
        )
    return path
