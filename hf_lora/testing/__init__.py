"""For our tests and for users' own: tiny models of every kind, and a Hub on this machine."""

from __future__ import annotations

from hf_lora.testing.local_hub import LocalHub
from hf_lora.testing.models import FAMILIES, tiny, tiny_batch
from hf_lora.testing.pipelines import PIPELINES, component_output, tiny_pipeline

__all__ = [
    "FAMILIES",
    "PIPELINES",
    "LocalHub",
    "component_output",
    "tiny",
    "tiny_batch",
    "tiny_pipeline",
]
