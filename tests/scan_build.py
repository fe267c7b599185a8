"""Builds every model class the scan reads, on the meta device and from its default config."""

from __future__ import annotations

import importlib
import inspect
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import SimpleNamespace
from typing import Any

import diffusers.models
import torch
import transformers
from diffusers.loaders import PeftAdapterMixin
from torch import nn
from transformers import CONFIG_MAPPING
from transformers.models.auto import modeling_auto
from transformers.utils import import_utils

from tests.scan_configs import NOT_BUILT, OVERRIDES, WITHOUT_MIXIN

SECONDS = 60  # for one model
DIFFUSERS = "diffusers"
NO_MIXIN = "diffusers, without PeftAdapterMixin"
_HEADLESS = "MODEL"  # lists nearly every type; read only where no other auto class has the type

Jobs = dict[str, dict[str, list[str]]]  # class -> model type -> auto classes


@cache
def jobs() -> Jobs:
    """Every class of transformers' auto classes, and diffusers' classes with `PeftAdapterMixin`."""
    found: Jobs = {}
    for name in sorted(dir(modeling_auto)):
        auto = name.removesuffix("_MAPPING_NAMES")
        if auto == name or auto == "CONFIG":
            continue
        for model_type, classes in getattr(modeling_auto, name).items():
            for cls in (classes,) if isinstance(classes, str) else classes:
                types = found.setdefault(cls, {})
                types.setdefault(model_type, []).append(auto.removeprefix("MODEL_FOR_"))
    with_head = {
        t for types in found.values() for t, autos in types.items() if autos != [_HEADLESS]
    }
    kept = {
        cls: types
        for cls, types in found.items()
        if any(autos != [_HEADLESS] or t not in with_head for t, autos in types.items())
    }
    others = {name: {DIFFUSERS: [NO_MIXIN]} for name in WITHOUT_MIXIN}
    return kept | others | {name: {DIFFUSERS: [DIFFUSERS]} for name in _with_adapters()}


def _with_adapters() -> list[str]:
    found = []
    for name in dir(diffusers.models):
        thing = getattr(diffusers.models, name) if name[0].isupper() else None
        if inspect.isclass(thing) and issubclass(thing, PeftAdapterMixin):
            found.append(name)
    return found


class _Timm(nn.Module):
    """Stands in for a timm tower, which would need torchvision: it has no layer."""

    num_features = 8


@contextmanager
def stand_ins() -> Iterator[None]:
    """Lets models build that ask for scipy or timm and do not need it for their layers.

    Works the same whether or not those packages are installed.
    """
    package = importlib.import_module("transformers.models.timm_wrapper")
    module: Any = importlib.import_module("transformers.models.timm_wrapper.modeling_timm_wrapper")
    module.timm = SimpleNamespace(create_model=lambda *_, **__: _Timm())
    module.requires_backends = lambda *_: None
    for name in ("TimmWrapperModel", "TimmWrapperForImageClassification"):
        setattr(package, name, getattr(module, name))
    before = dict(import_utils.BACKENDS_MAPPING)
    import_utils.BACKENDS_MAPPING["scipy"] = (lambda: True, "")  # asked for by losses
    try:
        yield
    finally:
        import_utils.BACKENDS_MAPPING.update(before)


def _timed_out(*_: object) -> None:
    raise TimeoutError(f"more than {SECONDS} s")


def build(cls: str, types: dict[str, list[str]]) -> nn.Module | str:
    """Builds one class, or returns why it was not built. For the main thread of a process."""
    if cls in NOT_BUILT:
        return NOT_BUILT[cls]
    cause = ""
    signal.signal(signal.SIGALRM, _timed_out)
    for model_type in types:
        signal.alarm(SECONDS)
        try:
            with stand_ins(), torch.device("meta"):
                return _make(cls, model_type)
        except Exception as error:  # any failure of a default config is a finding, not ours
            cause = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        finally:
            signal.alarm(0)
    return cause


def _make(cls: str, model_type: str) -> nn.Module:
    """Builds a class; where a composite config fails, from the part of it that fits."""
    overrides = OVERRIDES.get(cls, OVERRIDES.get(model_type, {}))
    if model_type == DIFFUSERS:
        made: nn.Module = getattr(diffusers, cls)(**overrides)
        return made
    config = CONFIG_MAPPING[model_type](**overrides)
    make = getattr(transformers, cls)
    try:
        return make(config)
    except (AttributeError, ValueError) as first:
        for part in ("text_config", "decoder", "vision_config"):
            try:
                return make(getattr(config, part))
            except Exception:  # the first error is the one to report
                continue
        raise first from None
