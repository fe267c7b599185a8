"""host -> files: one adapter with everything that is known of it."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from pathlib import Path

from torch import nn

from hf_lora.adapter import MODEL, Adapter, check_component
from hf_lora.base import base_of
from hf_lora.errors import AdapterNotFound, LoraError, closest
from hf_lora.families import family_of
from hf_lora.formats import write_adapter
from hf_lora.hosts import (
    adapter_names,
    check_has_weights,
    class_name,
    model_of,
    parts_of,
    peft_configs,
)
from hf_lora.manifest import Manifest
from hf_lora.offload import with_weights
from hf_lora.record import record_of
from hf_lora.slots import check_saveable, check_whole, component_of, cuts_of

log = logging.getLogger(__name__)

# Components that `load_lora_weights` of diffusers 0.42.1 passes over, without a word, in a file
# that holds others as well (WanLoraLoaderMixin), and how they are loaded there.
_ASKED_FOR = {
    "transformer_2": 'pipe.transformer_2.load_lora_adapter(path, prefix="transformer_2", '
    "use_safetensors=True)"
}


@with_weights
def save_lora(host: object, path: str | os.PathLike[str], *, name: str = "default") -> Path:
    """Saves one adapter as files that plain peft, transformers and diffusers load.

    A model's adapter becomes a peft folder, a pipeline's a `pytorch_lora_weights.safetensors`.
    Their header says what it was made on, with samples of the base weights.

    Args:
        host: A model or a pipeline.
        path: The folder; it is made when missing, and its adapter files are replaced. For a
            pipeline also the name of a `.safetensors` file.
        name: Which adapter.

    Returns:
        The folder or file.

    Raises:
        AdapterNotFound: The host has no such adapter.
        MetaHost: The adapter has no weights.
        TrainingError: This process holds only a part of it (FSDP); nothing is written.
        BadAdapterFile: It holds NaN or infinite values, or a kind that files cannot carry.
        InvalidOption: `path` is a file.
        OSError: The files cannot be written; old ones are as they were.
    """
    return write_adapter(_on(host, name), path)


@with_weights
def adapter_on(host: object, name: str = "default") -> Adapter:
    """Returns one adapter of a host with everything that is known of it; errors as `save_lora`.

    Its tensors are those of the host, not copies.
    """
    return _on(host, name)


def _on(host: object, name: str) -> Adapter:
    parts = {n: model_of(part) for n, part in parts_of(host).items()}
    held = {n: model for n, model in parts.items() if name in adapter_names(model)}
    if not held:
        names = sorted({n for model in parts.values() for n in adapter_names(model)})
        near = ", ".join(repr(n) for n in closest(str(name), names))
        raise AdapterNotFound(
            f"{type(host).__name__} has no adapter {name!r}. It has {near or 'none'}.",
            field="name",
        )
    components = {}
    for part, model in held.items():
        check_has_weights(model, "saved")
        check_whole(model, name)
        try:
            check_saveable(peft_configs(model)[name])
            components[part] = component_of(model, name)
            check_component(components[part])
        except LoraError as error:
            raise error.within(file=f"adapter {name!r}") from None
    for part, how in _ASKED_FOR.items():
        if part in held and len(held) > 1:
            log.warning("plain diffusers loads %s from this file when asked: %s", part, how)
    return Adapter(components, _manifest_of(host, held, name))


def _manifest_of(host: object, parts: dict[str, nn.Module], name: str) -> Manifest:
    """Returns what is known of an adapter on a host, facts of the file it came from included."""
    known = (record_of(model).manifests.get(name) for model in parts.values())
    loaded = next((manifest for manifest in known if manifest), Manifest())
    family = next((f.name for f in map(family_of, parts.values()) if f), "")
    return replace(
        loaded,
        base=base_of(host, parts),
        host=class_name(model_of(host)) if isinstance(host, nn.Module) else type(host).__name__,
        family=family,
        fused={
            path if part == MODEL else f"{part}.{path}": list(cut)
            for part, model in parts.items()
            for path, cut in cuts_of(model, name).items()
        },
    )
