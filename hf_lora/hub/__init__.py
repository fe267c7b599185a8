"""Adapters on the Hub: push, pull and model cards."""

from __future__ import annotations

from hf_lora.hub.card import CardExtras
from hf_lora.hub.pull import pull_lora
from hf_lora.hub.push import push_lora

__all__ = ["CardExtras", "pull_lora", "push_lora"]
