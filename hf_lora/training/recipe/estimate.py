"""How much memory a run will take, from the model's shapes alone.

    total = weights + adapter + optimizer states + peak(activations and gradients of one step)

The last term is counted, not guessed: one step runs on the meta device, where tensors have shapes
and no values, and every storage is followed from its making to its end. So it holds for any
architecture, with gradient checkpointing, heads and dropout as they will be. Two things are put in
by hand, because the meta device does not do what the others do: attention saves what a fused kernel
saves (torch has one for every device; on meta it would write the attention matrix), and under
autocast linear layers compute in half precision.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_lora.training.diffusion import DiffusionTrainingModule
from hf_lora.training.diffusion.losses import Noised, loss_of
from hf_lora.training.diffusion.rows import Extras
from hf_lora.training.recipe.models import checkpoint_activations

_FLOAT = 4  # bytes of the float32 that factors, gradients and AdamW's states have

# Bytes that a quantised linear of (out, in) features takes.
# 4bit: NF4 with double quantisation: half a byte a value; a byte for the scale of each block of 64;
# of the scales, float32 for each block of 256 (bitsandbytes 0.50). 8bit: a float32 scale a row.
_QUANTISED: Mapping[str, Callable[[int, int], int]] = {
    "4bit": lambda out, width: out * width // 2 + out * width // 64 + out * width // (64 * 256) * 4,
    "8bit": lambda out, width: out * width + out * _FLOAT,
}
_STATES = 2  # float32 values that AdamW, in all of its kinds, keeps of a trained parameter


@dataclass(frozen=True)
class Memory:
    """Bytes that a run takes beside Python and its libraries.

    Attributes:
        weights: The base.
        adapter: Factors and whole modules, float32.
        optimizer: States of the optimizer.
        step: Activations, gradients and what is in between, at the peak of one step; None where the
            model's forward needs values, so that shapes cannot tell.
        why_not: Why `step` is None.
    """

    weights: int
    adapter: int
    optimizer: int
    step: int | None
    why_not: str = ""

    @property
    def total(self) -> int:
        """All of it; without `step` where that is not known."""
        return self.weights + self.adapter + self.optimizer + (self.step or 0)

    def to_dict(self) -> dict[str, Any]:
        """Returns the figures as plain data, for JSON."""
        return {**vars(self), "total": self.total}


def estimate(
    model: nn.Module,
    *,
    rows: int,
    tokens: int,
    dtype: torch.dtype,
    load_in: str | None = None,
    optimizer: str = "adamw",
    device: str = "cpu",
    checkpointing: bool = False,
) -> Memory:
    """Estimates the memory of a run.

    Args:
        model: A model on the meta device, with its adapter attached; it is used up.
        rows: Sequences in a batch.
        tokens: Tokens of the longest sequence.
        dtype: Of the base and, when it is half precision, of autocast.
        load_in: `4bit` or `8bit` for a quantised base.
        optimizer: Kind of the optimizer.
        device: Type of the device it will run on.
        checkpointing: Whether activations are computed twice instead of kept.
    """
    alike = _AsOnDevice(dtype, device)
    weights = _weight_bytes(model, dtype, load_in)
    return _weighed(
        model, weights, optimizer, lambda: _step_bytes(model, rows, tokens, alike, checkpointing)
    )


def estimate_pictures(
    module: DiffusionTrainingModule,
    *,
    rows: int,
    resolution: int,
    dtype: torch.dtype,
    optimizer: str = "adamw",
    device: str = "cpu",
) -> Memory:
    """Estimates the memory of a run of a pipeline, whose pictures and captions are cached.

    Args:
        module: A pipeline on the meta device, with its adapter attached; it is used up.
        rows: Pictures in a batch.
        resolution: Pixels a side.
        dtype: Of the base and, when it is half precision, of autocast.
        optimizer: Kind of the optimizer.
        device: Type of the device it will run on.
    """
    alike = _AsOnDevice(dtype, device)
    weights = 0
    for name, part in module.pipe.components.items():
        if isinstance(part, nn.Module):
            weights += _weight_bytes(part, torch.float32 if name == "vae" else dtype, None)
    return _weighed(
        module, weights, optimizer, lambda: _picture_bytes(module, rows, resolution, alike)
    )


def _weighed(
    model: nn.Module, weights: int, optimizer: str, step_bytes: Callable[[], int]
) -> Memory:
    """Adds up what a run takes; the step is the last to be counted and uses the model up."""
    adapter = sum(p.numel() for p in model.parameters() if p.requires_grad) * _FLOAT
    if optimizer == "lora-fa":  # which trains no A
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and ".lora_A." not in name)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad) * _FLOAT
    try:
        step: int | None = step_bytes()
        why_not = ""
    except Exception as error:  # whatever a forward that needs values, or another mask, raises
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        step, why_not = None, first[:200]
    return Memory(
        weights=weights,
        adapter=adapter,
        optimizer=_STATES * trained,
        step=step,
        why_not=why_not,
    )


def _weight_bytes(model: nn.Module, dtype: torch.dtype, load_in: str | None) -> int:
    """Counts the base as it will be loaded; tied weights once."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    quantised = {
        module.weight: module
        for module in model.modules()
        if load_in and isinstance(module, nn.Linear) and module is not head
    }
    size = 0
    for parameter in dict.fromkeys(model.parameters()):
        if parameter.requires_grad:
            continue
        if parameter in quantised:
            size += _QUANTISED[str(load_in)](*parameter.shape)
        else:
            size += parameter.numel() * dtype.itemsize
    return size


def _step_bytes(model: Any, rows: int, tokens: int, alike: _AsOnDevice, checkpointing: bool) -> int:
    """Runs forward and backward on meta and returns the most bytes that lived at once."""
    if checkpointing:
        checkpoint_activations(model, lambda: (nullcontext(), alike))
    model._forward_pre_hooks.clear()  # the guard against training without weights
    model.train()
    model.config.use_cache = False
    ids = torch.zeros((rows, tokens), dtype=torch.long, device="meta")
    one_label = "SequenceClassification" in type(model).__name__
    labels = ids[:, 0] if one_label else ids
    mask = torch.ones((rows, 1, tokens, tokens), dtype=torch.bool, device="meta")
    live = _Live([*model.parameters(), *model.buffers()])
    with live, alike:
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
    return live.peak


def _picture_bytes(
    module: DiffusionTrainingModule, rows: int, resolution: int, alike: _AsOnDevice
) -> int:
    """Runs forward and backward of a pipeline on meta, without the VAE."""
    inputs, kind = module.inputs, module.inputs.kind
    for part in module.children():
        part._forward_pre_hooks.clear()  # the guard against training without weights
    module.train()
    side = resolution // inputs.factor
    shape = (rows, inputs.channels, side, side)
    latents = torch.empty(shape, device="meta", dtype=inputs.dtype)
    ids = [x.to("meta").expand(rows, -1) for x in inputs.tokenize([""]).values()]
    encoders = [getattr(module.pipe, name) for name in kind.encoders]
    trained = any(inputs.adapted(name) for name in kind.encoders)
    if not trained:  # read before the run
        with torch.no_grad():
            text = kind.encode(encoders, ids)
    steps = torch.empty(rows, device="meta")
    live = _Live([*module.parameters(), *module.buffers()])
    with live, alike:
        if trained:
            text = kind.encode(encoders, ids)
        extras = Extras(inputs.time_ids(None, latents), 1.0)
        made = kind.predict(inputs.denoiser, latents, steps, text, extras)
        loss: Any = loss_of(made, Noised(latents, steps, latents, None))
        loss.backward()
    return live.peak


class _Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the bytes of the storages that are alive, and keeps the most there ever were."""

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._seen = weakref.WeakSet(tensor.untyped_storage() for tensor in known)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        return out

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._seen:
            return
        self._seen.add(storage)
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._end, size)

    def _end(self, size: int) -> None:
        self.now -= size


_ATTENDED = ("query", "key", "value")


class _AsOnDevice(TorchFunctionMode):
    """Lets attention and autocast on meta save what they save on a real device."""

    def __init__(self, dtype: torch.dtype, device: str) -> None:
        super().__init__()
        self.half = dtype if dtype.itemsize < _FLOAT else None
        self.device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.linear and self.half is not None:
            args = tuple(x.to(self.half) if isinstance(x, Tensor) else x for x in args)
        # torch 2.13 has no fused attention with dropout on a CPU
        fused = self.device != "cpu" or not kwargs.get("dropout_p")
        if func is F.scaled_dot_product_attention and fused:
            given = {**dict(zip(_ATTENDED, args, strict=False)), **kwargs}
            return _FusedAttention.apply(*(given[x] for x in _ATTENDED))  # type: ignore[no-untyped-call]
        return func(*args, **kwargs)


class _FusedAttention(torch.autograd.Function):
    """Saves queries, keys, values, the result and one number a query, as fused kernels do."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = query.new_empty((*query.shape[:-1], value.shape[-1]))
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1]).float())
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])
