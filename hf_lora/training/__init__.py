"""Training: what Trainer leaves open when an adapter is attached in place."""

from hf_lora.training.callback import LoraCallback
from hf_lora.training.diffusion import DiffusionTrainingModule
from hf_lora.training.optimizers import lora_optimizer
from hf_lora.training.trainer import LoraTrainer, LoraTrainerMixin

__all__ = [
    "DiffusionTrainingModule",
    "LoraCallback",
    "LoraTrainer",
    "LoraTrainerMixin",
    "lora_optimizer",
]
