"""Diffusion pipelines trained by the same Trainer as any other model."""

from hf_lora.training.diffusion.cache import CachedRows, cache_rows, open_cache
from hf_lora.training.diffusion.module import DiffusionTrainingModule
from hf_lora.training.diffusion.pictures import PictureRows, picture_rows

__all__ = [
    "CachedRows",
    "DiffusionTrainingModule",
    "PictureRows",
    "cache_rows",
    "open_cache",
    "picture_rows",
]
