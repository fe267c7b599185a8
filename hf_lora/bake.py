"""A base and an adapter -> a folder with the merged model, as `hf-lora merge` writes it."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from hf_lora.adapter import MODEL
from hf_lora.errors import InvalidOption
from hf_lora.exchange import open_adapter
from hf_lora.load import load_lora
from hf_lora.merge import bake, merge_lora, merge_report
from hf_lora.verify import load_base

DTYPES = ("auto", "bfloat16", "float16", "float32", "float64")


def merge_files(
    base: str,
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    scale: float = 1.0,
    dtype: str = "auto",
    revision: str | None = None,
    strict: bool = True,
    extra_modules: bool = False,
) -> dict[str, Any]:
    """Loads a base, merges an adapter into its weights and saves the whole.

    Args:
        base: Folder or repository id of the base.
        source: Folder, file or repository id of the adapter.
        out: Folder to write, new or empty. It is there whole or not at all. A model's tokenizer and
            processor come along.
        scale: Strength of the adapter, 1.0 as trained.
        dtype: Dtype to load the base in, and so of the result: one of `DTYPES`. `"auto"` keeps that
            of the files, for each component of a pipeline its own.
        revision: Branch, tag or commit of the base's repository.
        strict: As in `load_lora`.
        extra_modules: As in `load_lora`.

    Returns:
        `lines` to show, and the figures of the merge.

    Raises:
        InvalidOption: `out` is a file, not empty or cannot be written, or `dtype` is not known.
        LoraError: The adapter does not fit or cannot be merged.
    """
    if dtype not in DTYPES:
        raise InvalidOption(
            f"dtype={dtype!r} is none that a model is merged in",
            fix=f"Use one of {', '.join(DTYPES)}.",
            field="dtype",
        )
    folder = Path(out)
    with _whole(folder) as aside:
        adapter = open_adapter(source)
        host = load_base(base, adapter, dtype=dtype, revision=revision)
        report = load_lora(host, adapter, scale=scale, strict=strict, extra_modules=extra_modules)
        merge_lora(host, keep=None)
        rounding = merge_report(host)
        try:
            bake(host).save_pretrained(aside)
            if MODEL in adapter.components:
                _save_processing(base, revision, aside)
        except (OSError, SafetensorError) as error:
            raise _unwritable(folder, error) from None
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


@contextlib.contextmanager
def _whole(out: Path) -> Iterator[Path]:
    """Gives a folder aside, inside `out`, whose content lies in `out` at the end.

    When the body raises, what was made here is gone, missing parents of `out` too. Made before the
    body runs: a folder that cannot be written is no news after an hour of merging.

    Raises:
        InvalidOption: `out` is a file, not empty, or cannot be made.
    """
    made: list[Path] = []
    try:
        try:
            _check_free(out)
            made += [path for path in (out, *out.parents) if not path.exists()]
            out.mkdir(parents=True, exist_ok=True)
            aside = Path(tempfile.mkdtemp(prefix=".hf_lora.", dir=out))
        except (OSError, ValueError) as error:
            raise _unwritable(out, error) from None
        made.insert(0, aside)
        yield aside
        for path in sorted(aside.iterdir()):
            made.insert(0, out / path.name)
            path.rename(out / path.name)
        aside.rmdir()
    except BaseException:
        for path in made:
            _remove(path, whole=path.parent == out)
        raise


def _check_free(out: Path) -> None:
    if out.is_dir():
        if any(out.iterdir()):
            raise InvalidOption(f"{out} exists and is not empty", fix="Name a new folder.")
    elif os.path.lexists(out):
        raise InvalidOption(f"{out} is a file, not a folder", fix="Name a new folder.")


def _unwritable(out: Path, error: Exception) -> InvalidOption:
    why = getattr(error, "strerror", None) or error
    return InvalidOption(
        f"{out} cannot be written ({why})",
        fix="Name a folder that can be made and has room.",
        field="out",
    )


def _remove(path: Path, *, whole: bool) -> None:
    """Removes what lies in the folder to write, and folders around it that are empty."""
    with contextlib.suppress(OSError):
        if not path.is_dir():
            path.unlink()
        elif whole:
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.rmdir()


def _save_processing(base: str, revision: str | None, folder: Path) -> None:
    """Saves what turns text, images and sound into inputs, as far as the base has it."""
    import transformers

    where = {} if revision is None else {"revision": revision}
    for name in ("AutoProcessor", "AutoTokenizer", "AutoImageProcessor", "AutoFeatureExtractor"):
        kind: Any = getattr(transformers, name)
        try:
            found = kind.from_pretrained(base, trust_remote_code=False, **where)
        except Exception:  # a base without one; each class says so by an error of its own
            continue
        whole = isinstance(found, transformers.ProcessorMixin)
        if whole or name != "AutoProcessor":  # which gives a part where there is no processor
            found.save_pretrained(folder)
        if whole:
            return
