"""Every check of an adapter, one by one, so that a person can see which hold."""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open

from hf_lora.adapter import MODEL, Adapter, Component
from hf_lora.errors import (
    AdapterNotFound,
    InvalidOption,
    LoraError,
    UnsupportedHost,
    listing,
    shown,
)
from hf_lora.fetch import local_files
from hf_lora.formats import CHECKS, checks, read_header
from hf_lora.formats.peft import CONFIG
from hf_lora.hosts import adapter_names, check_has_weights, model_of, parts_of
from hf_lora.load import load_lora
from hf_lora.merge import check_unmerged
from hf_lora.record import Snapshot
from hf_lora.report import LoadReport

OF_BASE = ("fits", "base")

# What peft calls a task -> the class of transformers that loads a model for it.
AUTO_CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "FEATURE_EXTRACTION": "AutoModel",
}

# How safetensors writes the dtypes that a model can be loaded in.
_STORED = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}

log = logging.getLogger(__name__)


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
        One row a check, in the order of the checks. What comes behind a failed one is open; so are
        those against a base that can take no adapter now (merged, or without weights).

    Raises:
        AdapterNotFound: There is no adapter to check.
        UnsupportedHost: `base` is neither a model nor a pipeline.
    """
    if base is not None:
        parts_of(base)
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
    reason = _why_not(base)
    if reason:
        for name in OF_BASE:
            yield Check(name, "open", f"not checked: {reason}")
        return
    report, replaced = _on_trial(base, adapter)
    if report.skipped:
        raise UnsupportedHost(f"{len(report.skipped)} targets have no layer: {report.skipped[0]}")
    fits = f"{report.targets} targets have their layers in {report.host}"
    yield Check("fits", "ok", f"{fits}{replaced}")
    state: Literal["ok", "failed", "open"] = "ok" if report.verified else "open"
    yield Check("base", "failed" if "mismatched" in report.base else state, report.base)


def _why_not(base: Any) -> str:
    """Returns why the base can take no adapter now, which is no fault of the adapter's."""
    try:
        for part in parts_of(base).values():
            check_has_weights(model_of(part), "loaded into")
            check_unmerged(model_of(part), "check another on them")
    except LoraError as error:
        return str(error)
    return ""


def _on_trial(base: Any, adapter: Adapter) -> tuple[LoadReport, str]:
    """Loads onto the base and takes everything back; returns the report and what it replaced.

    Taken back from a snapshot, not detached: other adapters stay active on every component.
    """
    parts = parts_of(base).values()
    taken = {n for part in parts for n in adapter_names(model_of(part))}
    trial = next(f"trial{i}" for i in range(len(taken) + 1) if f"trial{i}" not in taken)
    snapshots = [Snapshot(part) for part in parts]
    try:
        try:
            return load_lora(base, adapter, name=trial, strict=False), ""
        except InvalidOption as error:
            if error.field != "extra_modules":
                raise
            replaced = f"; {error.fact}, which a load must allow: extra_modules=True"
        report = load_lora(base, adapter, name=trial, strict=False, extra_modules=True)
        return report, replaced
    finally:
        for snapshot in snapshots:
            snapshot.restore()


def load_base(
    name: str, adapter: Adapter, *, dtype: str = "auto", revision: str | None = None
) -> Any:
    """Loads the model or pipeline an adapter is for: the class its manifest or task names.

    A classifier gets as many labels as the adapter's head has. An adapter that lies beside the base
    in its folder is not loaded with it, as `from_pretrained` would by itself.

    Args:
        name: Folder or repository id of the base.
        adapter: Of which only manifest, configs and shapes are looked at.
        dtype: Name of a torch dtype; `"auto"` for those of the files, each component its own.
        revision: Branch, tag or commit of a repository.

    Raises:
        UnsupportedHost: No class of transformers or diffusers is found for it, it does not load, or
            it is an adapter. Code from a repository is never run.
    """
    _check_holds_base(name)
    where = {} if revision is None else {"revision": revision}
    try:
        if MODEL in adapter.components:
            return _model(name, adapter, dtype, where)
        return _pipeline(name, dtype, where)
    except Exception as error:  # whatever a config or a library raises
        first = next(iter(str(error).strip(" .").splitlines()), type(error).__name__)
        raise UnsupportedHost(f"{name!r} does not load as the base ({first[:200]})") from None


def _check_holds_base(name: str) -> None:
    """Raises UnsupportedHost for the folder of an adapter, and for an empty name.

    The base that the adapter names is not loaded in its place: a check or a merge against a model
    that nobody named would look like one against the model that was.
    """
    if not name.strip():
        raise UnsupportedHost("the base has an empty name", fix="Give a folder or repository id.")
    folder = Path(name)
    if not (folder / CONFIG).is_file():
        return
    if (folder / "config.json").is_file() or (folder / "model_index.json").is_file():
        return
    made_on = None
    with contextlib.suppress(LoraError):
        made_on = read_header(folder).info["base"]
    raise UnsupportedHost(
        f"{name!r} holds an adapter and no base",
        fix=f"Give the base: it names {shown(made_on)}." if made_on else "Give the base.",
    )


def _model(name: str, adapter: Adapter, dtype: str, where: dict[str, str]) -> Any:
    component = adapter.components[MODEL]
    kind = _class_for(name, adapter, where)
    model, info = kind.from_pretrained(
        name,
        dtype=dtype,
        trust_remote_code=False,
        # transformers 5.23 loads an adapter that lies beside the model; here it looks for none
        adapter_kwargs={"subfolder": "no-adapter"},
        output_loading_info=True,
        **_labels(kind, name, component, where),
        **where,
    )
    missing = info["missing_keys"]
    if all(key in missing for key, _ in model.named_parameters()):
        raise UnsupportedHost(f"none of its weights is one of {type(model).__name__}")
    brought = tuple(f"{path}." for path in component.modules)
    made = sorted(key for key in missing if not key.startswith(brought))
    if made:
        log.warning("%s has no %s: values are random", name, listing(made))
    return model


def _class_for(name: str, adapter: Adapter, where: dict[str, str]) -> Any:
    """Returns the class to load with: by manifest, by config, by task, by the base's own config."""
    import transformers

    fields = adapter.components[MODEL].config
    mapping = fields.get("auto_mapping")
    own = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    kind = _class_named(adapter.manifest.host) or _class_named(own)
    if kind is not None:
        return kind
    config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False, **where)
    auto: Any = getattr(transformers, AUTO_CLASSES.get(str(fields.get("task_type")), ""), None)
    if auto is not None and type(config) in auto._model_mapping:
        return auto
    kind = _class_named(next(iter(config.architectures or ()), None))
    return kind or transformers.AutoModelForCausalLM


def _class_named(name: object) -> Any:
    """Returns the model class of transformers of that name, or None."""
    import transformers

    kind = getattr(transformers, str(name), None)
    model = isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)
    return kind if model else None


def _labels(kind: Any, name: str, component: Component, where: dict[str, str]) -> dict[str, Any]:
    """Returns the arguments that give the model a head in the size of the adapter's.

    The size is read off the tensor of a trained module that differs from the model's own by its
    number of labels; none differs where the base has the right number already.
    """
    import transformers

    if not component.modules:
        return {}
    configs = getattr(kind, "config_class", None) or transformers.AutoConfig
    config = configs.from_pretrained(name, trust_remote_code=False, **where)
    try:
        with torch.device("meta"):
            model = kind.from_config(config) if hasattr(kind, "from_config") else kind(config)
    except Exception:  # a few classes compute with values in __init__, which meta has none of
        return {}
    own = {key: tuple(tensor.shape) for key, tensor in model.named_parameters()}
    for path, tensors in component.modules.items():
        for key, tensor in tensors.items():
            here, there = own.get(f"{path}.{key}", ()), tuple(tensor.shape)
            by_label = here[:1] == (config.num_labels,) and here[1:] == there[1:]
            if by_label and there and here != there:
                # the base may bring a head of its own, with other labels
                return {"num_labels": there[0], "ignore_mismatched_sizes": True}
    return {}


def _pipeline(name: str, dtype: str, where: dict[str, str]) -> Any:
    import diffusers

    pipeline: Any = diffusers.DiffusionPipeline
    if dtype != "auto":
        return pipeline.from_pretrained(name, dtype=getattr(torch, dtype), **where)
    folder = Path(name if os.path.isdir(name) else pipeline.download(name, **where))
    found = {part.name: _stored_dtype(part) for part in folder.iterdir() if part.is_dir()}
    known = {part: stored for part, stored in found.items() if stored is not None}
    return pipeline.from_pretrained(name, dtype={"default": torch.float32, **known}, **where)


def _stored_dtype(folder: Path) -> torch.dtype | None:
    """Returns the dtype of most values in the weights of a component; None where there are none."""
    values: Counter[str] = Counter()
    for path in folder.glob("*.safetensors"):
        if "." in path.stem:  # a variant such as model.fp16.safetensors, which is not loaded
            continue
        with safe_open(path, "pt") as file:
            for key in file.keys():
                tensor = file.get_slice(key)
                values[tensor.get_dtype()] += math.prod(tensor.get_shape())
    kinds = [kind for kind, _ in values.most_common() if kind in _STORED]
    return _STORED[kinds[0]] if kinds else None
