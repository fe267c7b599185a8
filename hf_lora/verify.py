"""Every check of an adapter, one by one, so that a person can see which hold."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from hf_lora.adapter import MODEL, Adapter
from hf_lora.attach import detach_lora
from hf_lora.errors import AdapterNotFound, LoraError, UnsupportedHost
from hf_lora.fetch import local_files
from hf_lora.formats import CHECKS, checks
from hf_lora.hosts import adapter_names, model_of, parts_of
from hf_lora.load import load_lora

OF_BASE = ("fits", "base")


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        name: `file`, `manifest`, `config`, `tensors`, `digest`; with a base also `fits` (every
            target has its layer, in its shape) and `base` (it is the one the adapter was made on).
        state: `ok`, `failed`, or `open` where it could not be made.
        text: What was found, or the error.
    """

    name: str
    state: Literal["ok", "failed", "open"]
    text: str


def verify(source: str | os.PathLike[str], *, base: Any = None) -> list[Check]:
    """Makes every check of an adapter.

    Args:
        source: A folder, a file or a repository id.
        base: The loaded model or pipeline to check it against, which stays as it is; None to leave
            these checks out.

    Returns:
        One row a check, in the order of the checks. What comes behind a failed one is open.

    Raises:
        AdapterNotFound: There is no adapter to check.
    """
    names = [*CHECKS, *(OF_BASE if base is not None else ())]
    rows: list[Check] = []
    try:
        for row in _steps(source, base):
            rows.append(row)
    except AdapterNotFound:
        raise
    except LoraError as error:
        rows.append(Check(names[len(rows)], "failed", str(error)))
    return [*rows, *(Check(name, "open", "not reached") for name in names[len(rows) :])]


def _steps(source: str | os.PathLike[str], base: Any) -> Iterator[Check]:
    steps = checks(local_files(source))
    while True:
        try:
            name, text = next(steps)
            yield Check(name, "ok", text)
        except StopIteration as done:
            adapter: Adapter = done.value
            break
    if base is None:
        return
    # a load on trial, taken off again
    taken = {n for part in parts_of(base).values() for n in adapter_names(model_of(part))}
    trial = next(f"trial{i}" for i in range(len(taken) + 1) if f"trial{i}" not in taken)
    report = load_lora(base, adapter, name=trial, strict=False, extra_modules=True)
    detach_lora(base, trial)
    if report.skipped:
        raise UnsupportedHost(f"{len(report.skipped)} targets have no layer: {report.skipped[0]}")
    yield Check("fits", "ok", f"{report.targets} targets have their layers in {report.host}")
    state: Literal["ok", "failed", "open"] = "ok" if report.verified else "open"
    yield Check("base", "failed" if "mismatched" in report.base else state, report.base)


def load_base(name: str, adapter: Adapter, *, dtype: str = "auto") -> Any:
    """Loads the model or pipeline an adapter is for: the class its manifest or task names.

    Args:
        name: Folder or repository id of the base.
        adapter: Of which only manifest and configs are looked at.
        dtype: As `from_pretrained` takes it.

    Raises:
        UnsupportedHost: No class of transformers or diffusers is found for it, or it does not load.
            Code from a repository is never run.
    """
    import diffusers
    import transformers

    wanted = adapter.manifest.host
    try:
        if MODEL not in adapter.components:
            pipeline: Any = diffusers.DiffusionPipeline
            return pipeline.from_pretrained(name)
        kind: Any = getattr(transformers, wanted, None)
        if kind is None or not hasattr(kind, "from_pretrained"):
            config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
            kind = getattr(transformers, next(iter(config.architectures or ()), ""), None)
        if kind is None:
            kind = transformers.AutoModelForCausalLM
        return kind.from_pretrained(name, dtype=dtype)
    except Exception as error:  # whatever a config or a library raises
        raise UnsupportedHost(
            f"{name!r} does not load as the base ({str(error).splitlines()[0][:200]})"
        ) from None
