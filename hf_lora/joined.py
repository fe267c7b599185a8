"""Projections that `fuse_qkv_projections()` of diffusers has joined, and the layers it passes by.

Joining makes one layer of the weights of several, which stay in the model and are called no more
(diffusers 0.42.1 models/attention.py, models/attention_processor.py). An adapter on a layer that is
passed by would do nothing, without a word.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from torch import nn

from hf_lora.hosts import of_diffusers
from hf_lora.targets import Survey
from hf_lora.walks import bare_modules

# The joined layer -> the layers whose weights it holds, below one attention module.
JOINED = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_kv": ("to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
    "to_added_kv": ("add_k_proj", "add_v_proj"),
}
SINGLE = frozenset(name for names in JOINED.values() for name in names)

# The class whose processors, and not itself, say whether the joined layers are called.
_BY_PROCESSOR = ("diffusers.models.attention_processor", "Attention")


def passed_by(model: nn.Module) -> dict[str, str]:
    """Returns path -> why, for the layers that no forward calls while projections are joined."""
    return dict(_passed_by(model))


def _passed_by(model: nn.Module) -> Iterator[tuple[str, str]]:
    for path, module in bare_modules(model) if of_diffusers(model) else ():
        if not hasattr(module, "fused_projections"):
            continue
        for joined, single in JOINED.items():
            if joined not in module._modules or not hasattr(module, "fuse_projections"):
                continue
            if _calls_joined(module):
                why = f"fuse_qkv_projections() has put {joined} in its place"
                yield from ((f"{path}.{x}", why) for x in single if x in module._modules)
            else:
                yield f"{path}.{joined}", "unfuse_qkv_projections() has taken it out of use"


def _calls_joined(module: nn.Module) -> bool:
    if any((k.__module__, k.__name__) == _BY_PROCESSOR for k in type(module).__mro__):
        return type(getattr(module, "processor", None)).__name__.startswith("Fused")
    return bool(getattr(module, "fused_projections", False))


def barring(found: Survey, model: nn.Module) -> Survey:
    """Returns a survey in which the layers that are passed by cannot be adapted."""
    why = passed_by(model)
    if not why:
        return found
    layers = (replace(x, barred=x.barred or why.get(x.path, "")) for x in found.layers)
    return replace(found, layers=tuple(layers))
