"""hf_lora: one call puts a LoRA on any Hugging Face model; one format carries it everywhere.

The package is lazy: `import hf_lora` loads neither torch nor transformers, peft or diffusers.
A name is imported from its room when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_ROOMS = {
    "adapter": ("Adapter",),
    "attach": (
        "as_peft_model",
        "attach_lora",
        "base_model",
        "detach_lora",
        "merge_lora",
        "set_adapters",
        "unmerge_lora",
    ),
    "errors": (
        "AdapterExists",
        "AdapterMismatch",
        "AdapterNotFound",
        "BadAdapterFile",
        "BadCheckpoint",
        "BadDataset",
        "HubError",
        "InvalidOption",
        "LoraError",
        "MergeError",
        "MetaHost",
        "MissingExtra",
        "PushConflict",
        "TargetNotFound",
        "TrainingError",
        "UnsupportedHost",
        "UnsupportedTarget",
    ),
    "exchange": ("open_adapter", "save_adapter"),
    "families": ("Family", "register_family"),
    "hub": ("CardExtras", "pull_lora", "push_lora"),
    "limits": ("LoadLimits",),
    "load": ("load_lora",),
    "plan": ("LoraPlan", "plan_lora"),
    "probe": ("ProbeReport", "probe_lora"),
    "report": ("LoadReport",),
    "save": ("save_lora",),
    "training": (
        "DiffusionTrainingModule",
        "LoraCallback",
        "LoraTrainer",
        "LoraTrainerMixin",
        "lora_optimizer",
    ),
}
_HOME = {name: room for room, names in _ROOMS.items() for name in names}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'hf_lora' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"hf_lora.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])


if TYPE_CHECKING:
    from hf_lora.adapter import Adapter as Adapter
    from hf_lora.attach import as_peft_model as as_peft_model
    from hf_lora.attach import attach_lora as attach_lora
    from hf_lora.attach import base_model as base_model
    from hf_lora.attach import detach_lora as detach_lora
    from hf_lora.attach import merge_lora as merge_lora
    from hf_lora.attach import set_adapters as set_adapters
    from hf_lora.attach import unmerge_lora as unmerge_lora
    from hf_lora.errors import AdapterExists as AdapterExists
    from hf_lora.errors import AdapterMismatch as AdapterMismatch
    from hf_lora.errors import AdapterNotFound as AdapterNotFound
    from hf_lora.errors import BadAdapterFile as BadAdapterFile
    from hf_lora.errors import BadCheckpoint as BadCheckpoint
    from hf_lora.errors import BadDataset as BadDataset
    from hf_lora.errors import HubError as HubError
    from hf_lora.errors import InvalidOption as InvalidOption
    from hf_lora.errors import LoraError as LoraError
    from hf_lora.errors import MergeError as MergeError
    from hf_lora.errors import MetaHost as MetaHost
    from hf_lora.errors import MissingExtra as MissingExtra
    from hf_lora.errors import PushConflict as PushConflict
    from hf_lora.errors import TargetNotFound as TargetNotFound
    from hf_lora.errors import TrainingError as TrainingError
    from hf_lora.errors import UnsupportedHost as UnsupportedHost
    from hf_lora.errors import UnsupportedTarget as UnsupportedTarget
    from hf_lora.exchange import open_adapter as open_adapter
    from hf_lora.exchange import save_adapter as save_adapter
    from hf_lora.families import Family as Family
    from hf_lora.families import register_family as register_family
    from hf_lora.hub import CardExtras as CardExtras
    from hf_lora.hub import pull_lora as pull_lora
    from hf_lora.hub import push_lora as push_lora
    from hf_lora.limits import LoadLimits as LoadLimits
    from hf_lora.load import load_lora as load_lora
    from hf_lora.plan import LoraPlan as LoraPlan
    from hf_lora.plan import plan_lora as plan_lora
    from hf_lora.probe import ProbeReport as ProbeReport
    from hf_lora.probe import probe_lora as probe_lora
    from hf_lora.report import LoadReport as LoadReport
    from hf_lora.save import save_lora as save_lora
    from hf_lora.training import DiffusionTrainingModule as DiffusionTrainingModule
    from hf_lora.training import LoraCallback as LoraCallback
    from hf_lora.training import LoraTrainer as LoraTrainer
    from hf_lora.training import LoraTrainerMixin as LoraTrainerMixin
    from hf_lora.training import lora_optimizer as lora_optimizer
