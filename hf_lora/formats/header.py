"""The manifest in the header of a file: read with its checks, written with a fresh digest."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import replace

from hf_lora.adapter import Adapter, Component
from hf_lora.errors import BadAdapterFile, LoraError
from hf_lora.formats.container import parse_json
from hf_lora.formats.native import UNETS
from hf_lora.limits import LoadLimits
from hf_lora.manifest import KEY, VERSION, Manifest, decode, encode

# Header keys that a layout writes itself.
LAYOUT_KEYS = frozenset({"format", "lora_adapter_metadata"})
# Hashes of the bytes behind the header, which are other ones in every file that is written here.
# Sources: sd-scripts `precalculate_safetensors_hashes`, Stability AI's metadata standard.
_OF_BYTES = frozenset({"sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256"})
# Keys for words that call a style up, the first that has some. Sources: Stability AI's metadata
# standard, SimpleTuner.
TRIGGER = "modelspec.trigger_phrase"
_TRIGGERS = (TRIGGER, "trained_words")
NOTHING = ("", "None", "null", "{}", "[]")  # what programs write where they have no value


# How headers name the denoiser a file was made for -> its classes in diffusers. Sources: sd-scripts
# `library/sai_model_spec.py` and `get_model_version_str_for_sd1_sd2`, and its `*_utils.py`.
_SAYS = ("modelspec.architecture", "ss_base_model_version")
_CLASSES = {
    ("stable-diffusion-v", "stable-diffusion-xl", "sd_v", "sdxl"): UNETS,
    ("stable-diffusion-3", "sd3"): ("SD3Transformer2DModel",),
    ("flux-1", "flux1"): ("FluxTransformer2DModel",),
    ("chroma",): ("ChromaTransformer2DModel",),
    ("lumina-2", "lumina2"): ("Lumina2Transformer2DModel",),
}


def denoiser_said(header: Mapping[str, str]) -> tuple[str, tuple[str, ...]]:
    """Returns the words of a header for the denoiser and its classes; empty where none is known."""
    for text in (header.get(key, "") for key in _SAYS):
        for starts, classes in _CLASSES.items():
            if text.startswith(starts):
                return text, classes
    return "", ()


def carried(foreign: Mapping[str, str]) -> dict[str, str]:
    """Returns what other programs' headers say and what is still true of another file."""
    left = (KEY, *LAYOUT_KEYS, *_OF_BYTES)
    return {key: value for key, value in foreign.items() if key not in left}


def trigger_words(header: Mapping[str, str]) -> tuple[str, ...]:
    """Returns the words that call a style up: a list in JSON, or separated by commas."""
    for key in _TRIGGERS:
        text = header.get(key, "").strip()
        try:
            listed = parse_json(text, 1, key) if text.startswith("[") else None
        except BadAdapterFile:
            listed = None
        parts = listed if isinstance(listed, list) else text.split(",")
        words = [part.strip() for part in parts if isinstance(part, str)]
        found = tuple(dict.fromkeys(word for word in words if word not in NOTHING))
        if found:
            return found
    return ()


def read_manifest(metadata: Mapping[str, str], limits: LoadLimits) -> Manifest:
    """Returns the manifest of a header; for a foreign file one that holds the foreign keys only.

    Raises:
        BadAdapterFile: There is a manifest and it is broken, or needs a newer hf_lora.
    """
    foreign = {k: v for k, v in metadata.items() if k != KEY and k not in LAYOUT_KEYS}
    if KEY not in metadata:
        return Manifest(foreign=foreign)
    try:
        fields = parse_json(metadata[KEY], limits.depth, "the manifest")
        return replace(decode(fields), foreign=foreign)
    except LoraError as error:
        raise error.within(field=KEY) from None


# What is checked of a file, in this order: each step has a name and says what it found.
CHECKS = ("file", "manifest", "config", "tensors", "digest")
Steps = Generator[tuple[str, str], None, Adapter]


def check_digest(adapter: Adapter) -> str:
    """Compares the stated digest with the tensors'; a header-only adapter has none to compare.

    Returns:
        What was found, in words.

    Raises:
        BadAdapterFile: They differ: values, scalings or names were changed after the file was made.
    """
    stated = adapter.manifest.digest
    if not stated:
        return f"computed: {adapter.digest}" if adapter.digest else "not computed"
    if adapter.digest != stated:
        raise BadAdapterFile(
            f"its content has the digest {adapter.digest}, its manifest states {stated}",
            fix="The file was damaged or altered; download or save it again.",
            field="digest",
        )
    return stated


def sound(component: Component) -> str:
    """Returns what was found right about a component's tensors, on one line."""
    targets, modules = len(component.targets), len(component.modules)
    whole = f", {modules} modules trained whole" if modules else ""
    return f"{targets} targets{whole}: pairs whole, ranks as stated, scalings in range, all finite"


def in_words(manifest: Manifest) -> str:
    """Returns what a manifest says, on one line."""
    if not manifest.digest:
        return "none: another program wrote the file"
    base = manifest.base.id or "an unnamed base"
    return f"format {VERSION}, made on {base} ({manifest.host or 'unknown class'})"


def header_of(adapter: Adapter, own: Mapping[str, str]) -> dict[str, str]:
    """Returns the whole metadata of a file, with a manifest of the adapter's digest and configs.

    An adapter that is no longer what its manifest states (trained on) is derived from that.

    Args:
        adapter: With values, not on meta.
        own: The keys of the layout, see `LAYOUT_KEYS`.

    Raises:
        BadAdapterFile: The adapter lies on meta, or facts of the manifest are no plain data.
    """
    if any(t.is_meta for c in adapter.components.values() for _, t in c.tensors()):
        raise BadAdapterFile("the adapter was read from its header only and has no values to save")
    known = adapter.manifest
    changed = known.digest not in ("", adapter.digest)
    manifest = replace(
        known,
        digest=adapter.digest,
        derived_from=(known.digest,) if changed else known.derived_from,
        configs={name: component.config for name, component in adapter.components.items()},
    )
    foreign = carried(manifest.foreign)
    try:
        return {**foreign, **own, KEY: encode(manifest)}
    except (TypeError, ValueError) as error:
        raise BadAdapterFile(f"the manifest holds what JSON cannot ({error})", field=KEY) from None
