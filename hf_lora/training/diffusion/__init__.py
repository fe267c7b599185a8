"""Diffusion pipelines trained by the same Trainer as any other model."""

from hf_lora.training.diffusion.cache import CachedRows, cache_rows, open_cache
from hf_lora.training.diffusion.module import DiffusionTrainingModule

__all__ = ["CachedRows", "DiffusionTrainingModule", "cache_rows", "open_cache"]
