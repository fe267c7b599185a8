"""A base and an adapter -> a folder with the merged model, as `hf-lora merge` writes it."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

from hf_lora.adapter import MODEL
from hf_lora.errors import InvalidOption
from hf_lora.fetch import local_files
from hf_lora.formats import open_adapter
from hf_lora.load import load_lora
from hf_lora.merge import bake, merge_lora, merge_report
from hf_lora.verify import load_base


def merge_files(
    base: str,
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    scale: float = 1.0,
    dtype: str = "auto",
) -> dict[str, Any]:
    """Loads a base, merges an adapter into its weights and saves the whole.

    Args:
        base: Folder or repository id of the base.
        source: Folder, file or repository id of the adapter.
        out: Folder to write, new or empty. A model's tokenizer comes along.
        scale: Strength of the adapter, 1.0 as trained.
        dtype: Dtype to load the base in, and so of the result.

    Returns:
        `lines` to show, and the figures of the merge.

    Raises:
        InvalidOption: `out` is there and not empty.
        LoraError: The adapter does not fit or cannot be merged.
    """
    folder = Path(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InvalidOption(f"{folder} exists and is not empty", fix="Name a new folder.")
    adapter = open_adapter(local_files(source))
    host = load_base(base, adapter, dtype=dtype)
    report = load_lora(host, adapter, scale=scale)
    merge_lora(host, keep=None)
    rounding = merge_report(host)
    bake(host).save_pretrained(folder)
    if MODEL in adapter.components:
        import transformers

        with contextlib.suppress(OSError, ValueError):  # a base without a tokenizer
            transformers.AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return {
        "out": str(folder),
        "digest": report.digest,
        "base": report.base,
        "layers": rounding.layers,
        "max_error": rounding.max_error,
        "lost": rounding.lost,
        "unchanged": rounding.unchanged,
        "lines": [str(report), str(rounding), f"saved as {folder}"],
    }
