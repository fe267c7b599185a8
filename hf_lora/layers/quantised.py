"""What a quantised base has while adapters are on it: a layout that trains, heads in float32."""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from hf_lora.errors import UnsupportedHost
from hf_lora.hosts import features, on_meta
from hf_lora.quantised import FOUR_BIT, HALF, PACKS, Stored, is_packed
from hf_lora.walks import bare_modules


def keep_unpacked(stored: Stored) -> tuple[str, ...]:
    """Keeps bitsandbytes from repacking 4-bit weights, and unpacks those that it has repacked.

    In eval mode on a CPU with AVX512-BF16 bitsandbytes 0.50.2 gives a weight the layout of its
    kernel for inference. From then on, also in training mode, no gradient passes the layer, so all
    factors but those of the last layers train on nothing, DoRA reads noise, and `state_dict()`,
    which Trainer calls at a save, leaves the scales in the wrong order.

    Args:
        stored: The quantised linears of a model; call inside `all_or_nothing`.

    Returns:
        The paths of the layers that would have repacked, for `let_pack`.
    """
    changed = []
    for path, (layer, row) in stored.items():
        if row is not FOUR_BIT:
            continue
        if is_packed(layer):
            weight = _unpacked(layer._parameters["weight"])
            layer._parameters["weight"] = weight
            layer.quant_state = weight.quant_state
        if vars(layer).get(PACKS):
            vars(layer)[PACKS] = False
            changed.append(path)
    return tuple(changed)


def let_pack(model: nn.Module, paths: Collection[str]) -> None:
    """Takes `keep_unpacked` back; what was repacked is so again after the next run in eval mode."""
    wanted = set(paths)
    for path, layer in bare_modules(model) if wanted else ():
        if path in wanted and PACKS in vars(layer):
            vars(layer)[PACKS] = True


def _unpacked(packed: Any) -> Any:
    """Returns a repacked 4-bit parameter in bitsandbytes' own layout, as a parameter of its own.

    (rows, columns/2) bytes hold, for 32 rows at a time, a column of low halves and one of high
    halves; the own layout is row by row. The inverse in bitsandbytes 0.50.2 forgets the scales,
    which are (columns/64, rows) there and (rows * columns/64,) here; their rounding to bfloat16
    stays. Source: bitsandbytes/functional.py, `_convert_weight_packed_for_cpu`.
    """
    state = copy.copy(packed.quant_state)
    rows, columns = state.shape
    data = packed.data.reshape(-1, 32)
    halves = torch.cat([data & 15, data >> 4], dim=1).reshape(rows // 32, columns // 2, 32, 2)
    pairs = halves.transpose(1, 2).reshape(-1, 2)
    whole = (pairs[:, 0] << 4 | pairs[:, 1]).reshape(state.original_qshape)
    kind = getattr(state, "original_storage_type", None)
    state.absmax = state.absmax.T.reshape(-1).float()
    state.dtype, state.packing_format_for_cpu = state.original_dtype, False
    weight = torch.Tensor._make_subclass(
        type(packed), whole if kind is None else whole.view(kind), packed.requires_grad
    )
    vars(weight).update(vars(packed))
    weight.quant_state = state
    return weight


def check_gradients(model: nn.Module, stored: Stored) -> None:
    """Checks that a gradient passes the quantised layers, on one layer of each sort.

    Where it does not, the loss still falls: the factors of the last layers learn. The test is that
    the layer is linear: <v, y(x) - y(0)> is <g, x> with g the gradient of <v, y(x)>.

    Args:
        model: The bare model.
        stored: Its quantised linears. Those of which one class is one way to compute are not tried.

    Raises:
        UnsupportedHost: It does not pass, as with torchao's dynamically quantised activations.
    """
    tried = set()
    for path, (layer, row) in stored.items():
        sort = type(layer), type(layer._parameters.get("weight"))
        fresh = row.varied and sort not in tried and not on_meta(model)
        tried.add(sort)
        if fresh and not _passes_gradient(layer):
            raise UnsupportedHost(
                f"no gradient passes {path}, quantised as {row.name}, so that factors in the "
                "layers before it would learn nothing",
                fix="Quantise weights only, for instance with Int8WeightOnlyConfig.",
            )


def _passes_gradient(layer: nn.Module) -> bool:
    """Tells whether a linear layer's gradient is its own; True where it cannot be run like this."""
    shape = features(layer)
    place = next(iter((*layer.parameters(), *layer.buffers())), None)
    if shape is None or place is None:
        return True
    dtype = place.dtype if place.is_floating_point() else torch.get_default_dtype()
    x = torch.linspace(-1, 1, shape[0], dtype=dtype, device=place.device)[None]
    try:
        with torch.enable_grad():
            y = layer(x.requires_grad_())
            v = torch.linspace(1, 2, y.shape[-1], dtype=y.dtype, device=y.device)
            loss = (y * v).sum()
            asked = loss.requires_grad
            found = torch.autograd.grad(loss, x, allow_unused=True)[0] if asked else None
        moved = float(((y.detach() - layer(torch.zeros_like(x)).detach()) * v).sum())
    except (RuntimeError, TypeError, NotImplementedError):
        return True
    told = 0.0 if found is None else float((found * x.detach()).sum())
    # a tenth, for products of 8-bit activations are that rough where the sum nearly cancels
    return found is not None and abs(moved - told) <= 0.1 * max(abs(moved), abs(told)) + 1e-6


def train_in_float32(head: nn.Module) -> None:
    """Makes the copy of a task head that is trained float32, whatever dtype its input has.

    A step of 1e-5 on a weight of 0.02 is lost in bfloat16, where its neighbours are 1.2e-4 away.
    """
    if any(p.dtype in HALF for p in head.parameters()):
        head.float()
        head.register_forward_pre_hook(cast_input, with_kwargs=True)


def cast_input(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Forward pre-hook: gives tensors the dtype of the module's parameters."""
    dtype = next(p.dtype for p in module.parameters() if p.is_floating_point())
    return _cast(args, dtype), _cast(kwargs, dtype)


def _cast(thing: Any, dtype: torch.dtype) -> Any:
    if isinstance(thing, Tensor):
        return thing.to(dtype) if thing.is_floating_point() else thing
    if isinstance(thing, dict):
        return {key: _cast(value, dtype) for key, value in thing.items()}
    if type(thing) in (list, tuple):
        return type(thing)(_cast(value, dtype) for value in thing)
    return thing
