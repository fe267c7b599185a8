"""Tiny hosts for our tests and for users' own: models of every kind in a few kilobytes."""

from __future__ import annotations

from hf_lora.testing.models import FAMILIES, tiny, tiny_batch

__all__ = ["FAMILIES", "tiny", "tiny_batch"]
