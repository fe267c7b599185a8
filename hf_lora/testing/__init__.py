"""Tiny hosts for our tests and for users' own: models of every kind in a few kilobytes."""

from __future__ import annotations

from hf_lora.testing.models import FAMILIES, tiny, tiny_batch
from hf_lora.testing.pipelines import PIPELINES, component_output, tiny_pipeline

__all__ = ["FAMILIES", "PIPELINES", "component_output", "tiny", "tiny_batch", "tiny_pipeline"]
