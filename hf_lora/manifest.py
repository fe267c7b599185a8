"""What a file says about its adapter, beside config and tensors: the `hf_lora` header key.

Specified in docs/format.md. A manifest that is there must be right: an unknown version or critical
feature, a wrong type or a malformed digest is an error, never skipped.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hf_lora.digest import PATTERN
from hf_lora.errors import BadAdapterFile, listing, shown
from hf_lora.fingerprint import Fingerprint

KEY = "hf_lora"  # the key of the safetensors `__metadata__` that holds the manifest
VERSION = 1
CRITICAL: frozenset[str] = frozenset()  # known features that bear on the result; none so far

_DAMAGED = "The file was damaged or altered; download or save it again."

MAX_WORDS = 1000  # trigger words, digests of ancestors


@dataclass(frozen=True)
class Base:
    """The model an adapter was made on.

    Attributes:
        id: Repository id or path it was loaded from; empty when unknown.
        revision: Commit of that repository; empty when unknown.
        fingerprints: Component -> sampled values of its weights.
    """

    id: str = ""
    revision: str = ""
    fingerprints: Mapping[str, Fingerprint] = field(default_factory=dict)


@dataclass(frozen=True)
class Manifest:
    """What a file says about its adapter; all fields are optional but the digest.

    Attributes:
        digest: The adapter's digest as the file states it; empty for a foreign file.
        configs: Component -> peft config, the truth that `adapter_config.json` is a copy of.
        base: The model it was made on.
        host: Class name of that model or pipeline.
        family: Name of the family row that applied.
        fused: Target path -> parts, for a LoRA on parts of a fused projection.
        training: Facts of the training run, plain data.
        trigger_words: Words that call the style up.
        derived_from: Digests of the adapters this one was made from.
        optional: Feature flags that a reader may ignore.
        foreign: The other keys of the header (`ss_*`, `modelspec.*`), kept as they were.
    """

    digest: str = ""
    configs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    base: Base = field(default_factory=Base)
    host: str = ""
    family: str = ""
    fused: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    trigger_words: tuple[str, ...] = ()
    derived_from: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    foreign: Mapping[str, str] = field(default_factory=dict)


def encode(manifest: Manifest) -> str:
    """Returns the value of the header key, without the foreign keys."""
    base = manifest.base
    fields = {
        "format": VERSION,
        "critical": [],
        "optional": list(manifest.optional),
        "digest": manifest.digest,
        "configs": {n: dict(sorted(c.items())) for n, c in sorted(manifest.configs.items())},
        "base": {
            "id": base.id,
            "revision": base.revision,
            "fingerprints": {n: f.to_json() for n, f in sorted(base.fingerprints.items())},
        },
        "host": manifest.host,
        "family": manifest.family,
        "fused": dict(manifest.fused),
        "training": dict(manifest.training),
        "trigger_words": list(manifest.trigger_words),
        "derived_from": list(manifest.derived_from),
    }
    # not sorted: of the patterns in a config the first that matches counts
    return json.dumps(fields, separators=(",", ":"), allow_nan=False)


def decode(fields: Any) -> Manifest:
    """Builds a manifest from the parsed JSON of the header key.

    Raises:
        BadAdapterFile: It is of a newer version, needs a feature that is not known here, or has a
            field of a wrong kind; the error names the field.
    """
    if not isinstance(fields, dict):
        raise _wrong("manifest", "is no object")
    version = fields.get("format")
    if type(version) is not int or version < 1:
        raise _wrong("format", f"is {shown(version)}, not a version number")
    unknown = [f for f in _words(fields, "critical") if f not in CRITICAL]
    if version > VERSION or unknown:
        needs = f"critical of the manifest has {listing(map(shown, unknown))}"
        raise BadAdapterFile(
            f"{needs if unknown else f'format of the manifest is {shown(version)}'}, which this "
            "hf_lora does not know",
            fix="Update hf_lora.",
            field="critical" if unknown else "format",
        )
    digest = _text(fields, "digest")
    if not PATTERN.fullmatch(digest):
        raise _wrong("digest", f"is {shown(digest)}, not v1:sha256: and 64 hex digits")
    base = _object(fields, "base")
    prints = _object(base, "fingerprints")
    configs = _object(fields, "configs")
    if not configs or not all(isinstance(config, dict) for config in configs.values()):
        raise _wrong("configs", "does not hold one config for each component")
    return Manifest(
        digest=digest,
        configs=configs,
        base=Base(
            id=_text(base, "id"),
            revision=_text(base, "revision"),
            fingerprints={name: _fingerprint(name, found) for name, found in prints.items()},
        ),
        host=_text(fields, "host"),
        family=_text(fields, "family"),
        fused=_object(fields, "fused"),
        training=_object(fields, "training"),
        trigger_words=_words(fields, "trigger_words"),
        derived_from=_words(fields, "derived_from"),
        optional=_words(fields, "optional"),
    )


def _wrong(name: str, what: str) -> BadAdapterFile:
    return BadAdapterFile(
        f"{name} of the manifest {what}",
        fix=_DAMAGED,
        field=name,
    )


def _fingerprint(component: str, value: object) -> Fingerprint:
    try:
        return Fingerprint.from_json(value)
    except BadAdapterFile as error:
        fact = f"fingerprint of {shown(component)}: {error.fact}"
        raise BadAdapterFile(fact, fix=_DAMAGED, field=error.field) from None


def _text(fields: Mapping[str, Any], name: str) -> str:
    value = fields.get(name, "")
    if not isinstance(value, str):
        raise _wrong(name, f"is {type(value).__name__}, not text")
    return value


def _object(fields: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = fields.get(name, {})
    if not isinstance(value, dict):
        raise _wrong(name, f"is {type(value).__name__}, not an object")
    return value


def _words(fields: Mapping[str, Any], name: str) -> tuple[str, ...]:
    value = fields.get(name, [])
    fit = isinstance(value, list) and len(value) <= MAX_WORDS
    if not fit or not all(isinstance(word, str) for word in value):
        raise _wrong(name, f"is no list of at most {MAX_WORDS} words")
    return tuple(value)
