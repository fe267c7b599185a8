"""One spelling for module paths that differ between versions of a library or classes of a model.

`model.language_model.layers.0.q_proj`, `language_model.model.layers.0.q_proj` and
`layers.0.q_proj` are one layer: what stands in front are wrappers. Digest and fingerprint are
taken over the canonical spelling, and a file spelt otherwise finds its layers through it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

# Leading segments that name the class around a trunk, not a place in it.
WRAPPERS = frozenset({"base_model", "model", "language_model", "text_model", "transformer"})

# Segments, dotted, that may stand anywhere -> what newer versions say.
# transformers 5 flattened CLIPVisionModel and its kin.
ALIASES = {"vision_tower.vision_model": "vision_tower"}


def canonical(path: str) -> str:
    """Returns the path without leading wrappers; at least its last segment stays."""
    for old, new in ALIASES.items():
        path = f".{path}.".replace(f".{old}.", f".{new}.")[1:-1]
    segments = path.split(".")
    start = 0
    while start < len(segments) - 1 and segments[start] in WRAPPERS:
        start += 1
    return ".".join(segments[start:])


def canonical_names(paths: Iterable[str]) -> dict[str, str]:
    """Returns path -> canonical path; paths that would share one all keep their own spelling."""
    names = {path: canonical(path) for path in paths}
    count = Counter(names.values())
    return {path: name if count[name] == 1 else path for path, name in names.items()}
