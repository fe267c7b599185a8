"""LoRA on linears and convolutions (LoCon), with Tucker cores and with magnitudes (DoRA).

A: (rank, in, kernel...), B: (out, rank, 1...), a Tucker core: (rank, rank, kernel...). Sources:
sd-scripts `networks/lora.py`, lycoris-lora 4.1.3 `modules/locon.py` and `functional/general.py`,
peft 0.21.2 `tuners/lora/layer.py` and `tuners/lora/dora.py`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from hf_lora.adapter import Component
from hf_lora.errors import BadAdapterFile, listing
from hf_lora.formats.kinds.loose import (
    ALPHA,
    MAGNITUDE,
    SCALE,
    Loose,
    Shape,
    alpha_for,
    alpha_of,
    alpha_tensor,
    broken,
    check_floating,
    check_present,
    config_of,
    host_shape,
    reshaped,
    rows_of,
    size,
    unfit,
)
from hf_lora.formats.names import Names, Piece

A, B, MID, BIAS = "lora_A", "lora_B", "lora_mid", "lora_B.bias"
FACTORS = (A, B, MID, BIAS)

# Fields of a LoraConfig that change what the factors mean, and that a foreign file has no place for
UNSAID = (
    "alora_invocation_tokens", "arrow_config", "bias", "kasa_config", "layer_replication",
    "megatron_config", "modules_to_save", "monteclora_config", "target_parameters",
    "trainable_token_indices", "use_bdlora", "use_qalora", "velora_config",
)  # fmt: skip


def width_of(path: str, loose: Loose) -> int:
    """Returns the number of output features."""
    check_present(path, loose, (A, B))
    b, bias = loose.factors[B], loose.factors.get(BIAS)
    if bias is not None and bias.shape != b.shape[:1]:
        raise broken(path, loose, f"B is {size(b)}, and the bias {size(bias)}", BIAS)
    return b.shape[0] if b.ndim else 0


def part_of(path: str, loose: Loose, piece: Piece) -> Loose | None:
    """Returns the piece's rows of B and of what lies beside it; A is shared.

    Ranks that no row of the piece uses are left out, with their rows of A: what was made
    block-diagonal to fit a fused layer comes apart again. None where no rank is used.
    """
    factors = cut(path, loose, piece)
    used = _used(factors)
    if used is None or used.all():
        return Loose(factors, loose.keys)
    if not used.any():
        return None if factors.keys() <= {A, B, ALPHA} else Loose(factors, loose.keys)
    rank, slim = used.numel(), int(used.sum())
    if ALPHA in factors:  # alpha/rank stays
        alpha = alpha_for(alpha_of(path, loose, rank) / rank, slim)
        factors[ALPHA] = torch.tensor(alpha, dtype=torch.float64)
    factors[A], factors[B] = factors[A][used], factors[B][:, used]
    return Loose(factors, loose.keys)


def cut(path: str, loose: Loose, piece: Piece) -> dict[str, Tensor]:
    """Returns the factors of a piece, of all ranks."""
    factors = dict(loose.factors)
    for name in (B, BIAS):
        if name in factors:
            factors[name] = rows_of(factors[name], piece)
    for name in (SCALE, MAGNITUDE):
        if name in factors:
            held = _by_output(path, loose, name, loose.factors[B].shape[0])
            factors[name] = rows_of(held, piece, _axis(held))
    return factors


def _used(factors: Mapping[str, Tensor]) -> Tensor | None:
    """Returns which ranks a piece uses; None where that cannot be told, or a core mixes them."""
    b = factors[B]
    if b.is_meta or factors[A].is_meta or MID in factors or b.ndim < 2:
        return None
    # torch compares no one-byte floats
    values = b.float() if b.element_size() == 1 else b
    return values.movedim(1, 0).reshape(b.shape[1], -1).ne(0).any(1)


def _axis(magnitude: Tensor) -> int:
    """Returns where a magnitude has its output features: second, as peft has it on convolutions."""
    return 1 if magnitude.ndim > 1 and magnitude.shape[0] == 1 else 0


def component(layers: Mapping[str, Loose], names: Names) -> Component:
    """Returns the layers as a LoRA of peft.

    Raises:
        BadAdapterFile: A layer is incomplete, or some have magnitudes or biases and others not.
        AdapterMismatch: A layer has another shape than the host's.
    """
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    targets: dict[str, dict[str, Tensor]] = {}
    scaled, biased = [], []
    for path, loose in layers.items():
        shape = host_shape(path, loose, names)
        a, b = _pair(path, loose, shape)
        ranks[path] = a.shape[0]
        alphas[path] = alpha_of(path, loose, a.shape[0])
        targets[path] = {A: a, B: b}
        if len(loose.factors) > 2:
            if BIAS in loose.factors:
                biased.append(path)
                targets[path][BIAS] = _bias(path, loose, shape)
            if SCALE in loose.factors or MAGNITUDE in loose.factors:
                scaled.append(path)
                targets[path][MAGNITUDE] = _magnitude(path, loose, shape)
    _check_all_scaled(layers, scaled)
    for path in targets.keys() - set(biased) if biased else ():
        # peft has biases on all targets or on none; one of zeros adds nothing
        b = targets[path][B]
        targets[path][BIAS] = torch.zeros(b.shape[0], dtype=b.dtype, device=b.device)
    config = config_of("LORA", "lora_alpha", ranks, alphas)
    config |= {"use_dora": bool(scaled), "lora_bias": bool(biased)}
    return Component(config, targets)


def _pair(path: str, loose: Loose, shape: Shape) -> tuple[Tensor, Tensor]:
    """Returns A and B in the shapes that peft has them in on a host's weight of this shape."""
    check_present(path, loose, (A, B))
    check_floating(path, loose)
    a, b = loose.factors[A], loose.factors[B]
    if MID in loose.factors:
        a = _with_core(path, loose)
    rank = a.shape[0] if a.ndim else 0
    if a.ndim < 2 or b.ndim < 2 or rank != b.shape[1]:
        raise broken(path, loose, f"A {size(a)} and B {size(b)} disagree on the rank", A)
    if not rank:
        raise broken(path, loose, f"the rank is 0: A is {size(a)}, B is {size(b)}", A)
    if len(shape) == 2 == a.ndim == b.ndim and (b.shape[0], a.shape[1]) == shape:
        return a, b
    found = reshaped(a, (rank, *shape[1:]))
    up = reshaped(b, (shape[0], rank, *(1 for _ in shape[2:])))
    if found is None or up is None:
        kernel = tuple(a.shape[2:])
        why = (
            f"its factors are those of a convolution with kernel {kernel}, and the host has "
            f"a {'linear layer' if len(shape) == 2 else 'convolution'} there"
            if any(side != 1 for side in kernel) and kernel != shape[2:]
            else "the adapter is for another size"
        )
        factor = A if found is None else B
        raise unfit(path, loose, f"{why}: A {size(a)}, B {size(b)}, host weight {shape}", factor)
    return found, up


def _with_core(path: str, loose: Loose) -> Tensor:
    """Returns A with the Tucker core in it, which peft has no place for: (rank, in, kernel...).

    `sum_n core[m, n, k...] A[n, i]`, computed in float64 and kept in the file's dtype.
    """
    a, core = loose.factors[A], loose.factors[MID]
    flat = reshaped(a, tuple(a.shape[:2])) if a.ndim > 1 else None
    if flat is None or core.ndim < 3 or tuple(core.shape[:2]) != (flat.shape[0],) * 2:
        raise broken(path, loose, f"core {size(core)} and A {size(a)} do not fit together", MID)
    if a.is_meta or core.is_meta:
        shape = (core.shape[0], flat.shape[1], *core.shape[2:])
        return torch.empty(shape, dtype=a.dtype, device="meta")
    wide = torch.einsum("mn...,ni->mi...", core.double(), flat.double())
    return wide.to(a.dtype).contiguous()


def _bias(path: str, loose: Loose, shape: Shape) -> Tensor:
    bias = loose.factors[BIAS]
    if tuple(bias.shape) != shape[:1]:
        raise unfit(path, loose, f"the bias is {size(bias)}, the host weight {shape}", BIAS)
    return bias


def _magnitude(path: str, loose: Loose, shape: Shape) -> Tensor:
    """Returns a DoRA magnitude as peft has it: (out,) of linears, (1, out, 1...) of convolutions.

    LyCORIS has (out, 1...). One over the input features, (1, in), is another method.
    """
    if SCALE in loose.factors and MAGNITUDE in loose.factors:
        raise broken(path, loose, f"the magnitude stands twice, also as {MAGNITUDE}", SCALE)
    name = SCALE if SCALE in loose.factors else MAGNITUDE
    held = _by_output(path, loose, name, shape[0])
    return held.reshape(shape[0] if len(shape) == 2 else (1, *shape[:1], *(1 for _ in shape[2:])))


def _by_output(path: str, loose: Loose, name: str, width: int) -> Tensor:
    """Returns a magnitude after checking that it has one value for each output feature."""
    held = loose.factors[name]
    shape = tuple(held.shape)
    first = shape[:1] == (width,) and all(side == 1 for side in shape[1:])
    second = shape[:2] == (1, width) and all(side == 1 for side in shape[2:])
    if first or (name == MAGNITUDE and second):
        return held
    if name == SCALE and len(shape) > 1 and shape[0] == 1 and all(s == 1 for s in shape[2:]):
        raise broken(
            path,
            loose,
            f"{name} is {shape}: a magnitude for each input feature, which is no DoRA as its "
            "paper and peft have it",
            name,
            fix="Only magnitudes for each output feature are read (LyCORIS: wd_on_output=True); "
            "merge it with the program that made it.",
        )
    raise unfit(path, loose, f"{name} is {shape}, and the layer has {width} output features", name)


def _check_all_scaled(layers: Mapping[str, Loose], scaled: list[str]) -> None:
    if scaled and len(scaled) < len(layers):
        bare = [path for path in layers if path not in set(scaled)]
        raise broken(
            bare[0],
            layers[bare[0]],
            f"and at {len(bare) - 1} other layers there is no magnitude (DoRA), but at "
            f"{len(scaled)} there is ({listing(scaled, limit=2)}). peft has one on all layers of "
            "an adapter or on none, and one that changes nothing would have to be computed from "
            "the base weights",
            fix="Load the layers with and without it as two adapters.",
        )


def loose(component: Component, path: str) -> dict[str, Tensor]:
    """Returns a target's factors as LyCORIS has them.

    Raises:
        BadAdapterFile: It holds factors of an embedding.
    """
    held = component.targets[path]
    strange = [name for name in held if name not in (*FACTORS, MAGNITUDE)]
    if strange or A not in held or B not in held:
        raise BadAdapterFile(
            f"{path} holds {listing(sorted(held))}, which are not the factors of a linear layer "
            "or convolution, and foreign files have no others",
            fix="Save it in the peft or diffusers layout, which carry them.",
            field=path,
        )
    if BIAS in held and held[BIAS].any():
        raise BadAdapterFile(
            f"{path} has a bias of its own (lora_bias=True), which no other program reads",
            fix="Save it in the peft or diffusers layout, which carry it.",
            field="lora_bias",
        )
    factors = {name: tensor for name, tensor in held.items() if name not in (MAGNITUDE, BIAS)}
    alpha = component.alpha(path)
    if component.config.get("use_rslora"):
        alpha = alpha_for(component.scaling(path), held[A].shape[0])
    factors[ALPHA] = alpha_tensor(alpha)
    if MAGNITUDE in held:
        width, ones = held[B].shape[0], (1 for _ in held[A].shape[1:])
        factors[SCALE] = held[MAGNITUDE].reshape(width, *ones)
    return factors
