"""An adapter whose factors lie in shards over processes (FSDP2): read whole, written back, checked.

A save by one process writes its own shard, which is empty or a part (peft issues 453, 2500 and
2892, trl issue 4416). Here all processes join to make the tensors whole, one of them writes, and a
tensor that is not whole is an error before the first byte.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hf_lora.base import fingerprint_of_model, unreadable
from hf_lora.errors import TrainingError, listing
from hf_lora.hosts import model_of, peft_configs
from hf_lora.record import keep_record, record_of
from hf_lora.slots import PartsSlot, slots_of
from hf_lora.walks import modules_of

# Methods that compute with whole factors outside of the forward: peft type -> what does.
_WHOLE_ONLY = {"ADALORA": "AdaLoRA chooses its ranks from whole factors and their gradients"}

_UNUSED = re.compile(r"did not receive grad for rank \d+: ([\d ]+)")
_ONE_ITERATION = "Expected to have finished reduction in the prior iteration"


def is_sharding(model: nn.Module) -> bool:
    """Tells whether FSDP2 holds parameters of a model or of a part of it."""
    return bool(_units(model))


def _units(model: nn.Module) -> list[Any]:
    """Returns the modules that FSDP2 shards as one piece each."""
    if not _together():
        return []
    from torch.distributed.fsdp import FSDPModule

    return [module for module in modules_of(model) if isinstance(module, FSDPModule)]


def _together() -> bool:
    """Tells whether processes work together at all; most runs are one process."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _shards(model: nn.Module, name: str) -> list[tuple[nn.Module, str, Any]]:
    """Returns (owner, key, shard) of every parameter of an adapter that lies in shards."""
    found = []
    for slot in slots_of(model, name):
        keys = list(slot.owner._parameters) if isinstance(slot, PartsSlot) else [slot.key]
        for key in keys:
            held = slot.owner._parameters.get(key)
            if type(held).__name__ == "DTensor":
                found.append((slot.owner, key, held))
    return found


def check_shardable(host: object, name: str = "default") -> None:
    """Checks that an adapter's method can be trained on this host, which may be sharded.

    Raises:
        TrainingError: It needs whole factors, and FSDP2 gives each process a part of them.
    """
    model = model_of(host)
    kind = str(getattr(peft_configs(model)[name].peft_type, "value", ""))
    if kind in _WHOLE_ONLY and is_sharding(model):
        raise TrainingError(
            f"{_WHOLE_ONLY[kind]}, and FSDP2 gives each process a part of them",
            fix="Use DDP (torchrun without fsdp), or a plain LoRA.",
        )


def sample_base(host: object) -> None:
    """Samples the base weights while they are whole, for saves of the sharded model."""
    model = model_of(host)
    if not unreadable(model):
        record = record_of(model)
        record.sampled = fingerprint_of_model(model)
        keep_record(model, record)


@contextmanager
def gathered(host: object, name: str = "default") -> Iterator[None]:
    """Makes an adapter's tensors whole on every process for the `with` block, to be read.

    Every process must enter, or all wait for the one that does not; inside, one may save alone.
    What is changed inside is lost. On a model that is not sharded it changes nothing.

    Args:
        host: A model.
        name: The adapter.

    Raises:
        TrainingError: A tensor comes out in another size than its shards say.
    """
    with _stand_ins(model_of(host), name, _whole):
        yield


@contextmanager
def scattered(host: object, name: str = "default") -> Iterator[None]:
    """Lets whole values be written into an adapter; each process keeps its shard of them.

    Inside the `with` block the tensors are whole and hold nothing, so every value must be written,
    and each process must write the same. No process waits for another. After an error inside, the
    adapter is as it was. On a model that is not sharded it changes nothing.

    Args:
        host: A model.
        name: The adapter.
    """
    model = model_of(host)
    for unit in _units(model):
        unit.reshard()  # after an evaluation the last units still compute with what they gathered
    with _stand_ins(model, name, _room) as stand_ins:
        yield
        for shard, whole in stand_ins:
            _take_shard(shard, whole)


@contextmanager
def _stand_ins(
    model: nn.Module, name: str, make: Callable[[Any], Tensor]
) -> Iterator[list[tuple[Any, Tensor]]]:
    """Puts a plain parameter in the place of every shard of an adapter, made by `make(shard)`."""
    shards = _shards(model, name) if _together() else []
    with torch.no_grad():
        made = [nn.Parameter(make(shard), requires_grad=False) for _, _, shard in shards]
    try:
        for (owner, key, _), whole in zip(shards, made, strict=True):
            owner._parameters[key] = whole
        yield [(shard, whole) for (_, _, shard), whole in zip(shards, made, strict=True)]
    finally:
        for owner, key, shard in shards:
            owner._parameters[key] = shard


def _whole(shard: Any) -> Tensor:
    value, kind = shard.detach(), shard.device_mesh.device_type
    # shards that are offloaded to the CPU travel between the devices of the mesh, as in torch's
    # own torch/distributed/_state_dict_utils.py
    value = value if value.device.type == kind else value.to(kind)
    whole: Tensor = value.full_tensor().to(shard.device)
    if whole.shape != shard.shape:
        raise TrainingError(
            f"a tensor of shape {tuple(shard.shape)} came out {tuple(whole.shape)} when its shards "
            "were put together",
            fix="Load and shard the model again; some process holds other values.",
        )
    return whole


def _room(shard: Any) -> Tensor:
    return torch.empty(shard.shape, dtype=shard.dtype, device=shard.device)


@torch.no_grad()
def _take_shard(shard: Any, whole: Tensor) -> None:
    from torch.distributed.tensor import distribute_tensor

    # no source rank: each process has all values and takes its own, without a word to the others
    own = distribute_tensor(whole.detach(), shard.device_mesh, shard.placements, src_data_rank=None)
    shard.copy_(own)


def unreached(error: RuntimeError, model: nn.Module) -> TrainingError | None:
    """Says which parameters a step of DDP has not reached, when that is what stopped it.

    Args:
        error: What a training step raised.
        model: The model inside DDP.

    Returns:
        The error that names them; None when the error is another one.
    """
    text = str(error)
    if _ONE_ITERATION not in text:
        return None
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    found = _UNUSED.search(text)
    numbers = [int(number) for number in found[1].split()] if found else []
    names = [trained[number] for number in numbers if number < len(trained)]
    which = f": {listing(names, limit=3)}" if names else ""
    return TrainingError(
        f"{len(names) or 'some'} parameters of the adapter got no gradient in the last step, and "
        f"DDP waits for all of them{which}",
        fix="Pass TrainingArguments(ddp_find_unused_parameters=True), or attach to layers that "
        "every batch runs through. Gradient checkpointing needs it said explicitly.",
    )
