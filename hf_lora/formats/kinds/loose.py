"""One layer of a foreign file, and what every kind asks of it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from hf_lora.errors import AdapterMismatch, BadAdapterFile, LoraError, listing, shown
from hf_lora.formats.names import Names, Piece
from hf_lora.patterns import tails

ALPHA, SCALE, MAGNITUDE = "alpha", "dora_scale", "lora_magnitude_vector"

Shape = tuple[int, ...]
_Value = TypeVar("_Value", int, float)
_Error = TypeVar("_Error", bound=LoraError)


@dataclass(frozen=True)
class Loose:
    """One layer of a foreign file.

    Attributes:
        factors: Canonical factor -> tensor. On meta where only the header was read, alpha never.
        keys: The file's own keys, for messages; in the order of `factors` where each has one.
    """

    factors: Mapping[str, Tensor]
    keys: tuple[str, ...] = ()

    def key(self, factor: str) -> str:
        """Returns the file's key of a factor, or what comes nearest to it."""
        if len(self.keys) == len(self.factors) and factor in self.factors:
            return self.keys[list(self.factors).index(factor)]
        return self.keys[0] if self.keys else ""


def broken(path: str, loose: Loose, fact: str, factor: str = "", fix: str = "") -> BadAdapterFile:
    """Returns the error for a layer that the file itself has wrong, or of a kind not held here."""
    return _about(BadAdapterFile, path, loose, fact, factor, fix)


def unfit(path: str, loose: Loose, fact: str, factor: str = "", fix: str = "") -> AdapterMismatch:
    """Returns the error for a layer that does not fit the host's."""
    fix = fix or "Load it into the model that it was made for."
    return _about(AdapterMismatch, path, loose, fact, factor, fix)


def _about(kind: type[_Error], path: str, loose: Loose, fact: str, factor: str, fix: str) -> _Error:
    key = loose.key(factor)[:200]
    named = f" (in the file: {key})" if key else ""
    return kind(f"at {path} {fact}{named}", fix=fix, field=key or path)


def size(tensor: Tensor) -> str:
    """Returns a tensor's shape in words."""
    return str(tuple(tensor.shape))


def host_shape(path: str, loose: Loose, names: Names) -> Shape:
    """Returns the shape of the host's weight at a path; AdapterMismatch where there is none."""
    shape = names.layers.get(path)
    if shape is None:
        raise unfit(path, loose, f"{names.kind} has no layer that an adapter could sit on")
    return shape


def check_floating(path: str, loose: Loose) -> None:
    """Raises BadAdapterFile where a factor holds no floating point numbers."""
    for name, tensor in loose.factors.items():
        if name != ALPHA and not tensor.is_floating_point():
            kind = str(tensor.dtype).removeprefix("torch.")
            raise broken(path, loose, f"{name} holds {kind} values", name)


def check_present(path: str, loose: Loose, wanted: Iterable[str]) -> None:
    """Raises BadAdapterFile where one of the factors that belong together is missing."""
    absent = [name for name in wanted if name not in loose.factors]
    if absent:
        held = [name for name in loose.factors if name != ALPHA]
        raise broken(
            path,
            loose,
            f"there is {listing(held, limit=9)} but no {' and no '.join(absent)}",
            held[0] if held else "",
            fix="The file is incomplete; download or save it again.",
        )


def alpha_of(path: str, loose: Loose, rank: int) -> float:
    """Returns alpha as a number, whole where it is; the rank where the file states none.

    Raises:
        BadAdapterFile: It has several elements, or is NaN, infinite or 0.
    """
    check_one_alpha(path, loose)
    tensor = loose.factors.get(ALPHA)
    if tensor is None:
        return rank
    value = float(tensor)
    if not math.isfinite(value) or value == 0:
        update = "nothing" if value == 0 else "no number"
        raise broken(
            path,
            loose,
            f"alpha is {value:g}, so the update would be {update}",
            ALPHA,
            fix="The file was damaged, or written by a program with a fault; save it again.",
        )
    return int(value) if value.is_integer() else value


def check_one_alpha(path: str, loose: Loose) -> None:
    """Raises BadAdapterFile where alpha has several elements, or none."""
    tensor = loose.factors.get(ALPHA)
    if tensor is not None and tensor.numel() != 1:
        raise broken(path, loose, f"alpha has {tensor.numel()} elements, not one", ALPHA)


def alpha_tensor(alpha: float) -> Tensor:
    """Returns alpha as files hold it: in float32, in float64 where that would round it."""
    narrow = torch.tensor(alpha, dtype=torch.float32)
    return narrow if float(narrow) == alpha else torch.tensor(alpha, dtype=torch.float64)


def alpha_for(scaling: float, rank: int) -> float:
    """Returns the alpha that over rank is exactly this scaling, where there is one."""
    alpha = scaling * rank
    near = (alpha, math.nextafter(alpha, math.inf), math.nextafter(alpha, -math.inf))
    return next((value for value in near if value / rank == scaling), alpha)


def equal(one: Tensor, other: Tensor) -> bool:
    """Tells whether two tensors have the same shape, dtype and values."""
    if one is other:
        return True
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if one.is_floating_point() and one.element_size() == 1:  # torch compares no one-byte floats
        return torch.equal(one.float(), other.float())
    return torch.equal(one, other)


def reshaped(tensor: Tensor, shape: Shape) -> Tensor | None:
    """Returns the same values in another shape where that says the same; None where it does not.

    Kernel dimensions of 1 may come or go, and a matrix may be the flat form of a kernel. A kernel
    larger than 1 is never flattened: by chance its size may be that of another layer.
    """
    own = tuple(tensor.shape)
    if own == shape:
        return tensor
    if len(own) < 2 or own[0] != shape[0] or any(side != 1 for side in own[2:]):
        return None
    flat = len(own) == 2 and own[1] == math.prod(shape[1:])
    if not flat and own[1:2] + (1,) * (len(shape) - 2) != shape[1:]:
        return None
    return tensor.reshape(shape)


def fitted(path: str, loose: Loose, wanted: Mapping[str, Shape], host: Shape) -> dict[str, Tensor]:
    """Returns the factors in the shapes that peft has them in.

    Raises:
        AdapterMismatch: One has another size; `host` is the shape of the weight there.
    """
    found = {}
    for name, shape in wanted.items():
        held = loose.factors[name]
        if held.ndim == 3 and len(shape) == 4 and shape[3] == 1:
            held = held.unsqueeze(3)  # peft 0.21.2 keeps the core of a 1-D kernel as a 2-D one
        ready = reshaped(held, shape)
        if ready is None:
            raise unfit(
                path,
                loose,
                f"the adapter is for another size: {name} is {size(held)}, and the host weight "
                f"{host} takes {shape}",
                name,
            )
        found[name] = ready
    return found


def check_held(path: str, loose: Loose, shape: Shape, kind: str) -> None:
    """Raises BadAdapterFile for a weight on which peft 0.21.2 has no layer of LoHa or LoKr."""
    if len(shape) not in (2, 3, 4):
        raise broken(
            path,
            loose,
            f"there is {kind} on a weight {shape}, and peft has {kind} on linear layers and "
            "on convolutions of one and two dimensions",
            fix="Merge it with the program that made it.",
        )


def check_core(path: str, core: Tensor) -> None:
    """Raises BadAdapterFile for a core of which the record does not say how files have it.

    peft's core of a one-dimensional kernel looks as that of a kernel (k, 1); LyCORIS has
    (rank, rank, k) and (rank, rank, k, 1).
    """
    if core.ndim == 4 and core.shape[3] == 1:
        raise BadAdapterFile(
            f"at {path} the core is {size(core)}, which LyCORIS files have with one or with two "
            "kernel dimensions, and the adapter does not say with which",
            fix="Save it in the peft layout.",
            field=path,
        )


def suits(factors: Mapping[str, Tensor], shape: Shape) -> bool:
    """Tells whether factors are for a weight of this shape, as far as theirs tell."""
    rows, columns = _sides(factors)
    if rows not in (None, shape[0]) or columns not in (None, shape[1], math.prod(shape[1:])):
        return False
    a = factors.get("lora_A")
    kernel = a is not None and a.ndim == len(shape) > 2 and "lora_mid" not in factors
    return not kernel or a is None or tuple(a.shape[2:]) == shape[2:]


def _sides(factors: Mapping[str, Tensor]) -> tuple[int | None, int | None]:
    """Returns how many rows and columns the weight has that factors are for."""
    if "lora_embedding_A" in factors:
        return _side(factors, "lora_embedding_A", 1), _side(factors, "lora_embedding_B", 0)
    if any(name.startswith("hada_") for name in factors):
        core = "hada_t1" in factors  # factors beside a core stand the other way round
        return _side(factors, "hada_w1_a", int(core)), _side(factors, "hada_w1_b", 1)
    if any(name.startswith("lokr_") for name in factors):
        inner = ("lokr_w2", 0), ("lokr_w2_a", int("lokr_t2" in factors))
        sides = [
            next((s for at in ends if (s := _side(factors, *at)) is not None), None)
            for ends in ((("lokr_w1", 0), ("lokr_w1_a", 0)), inner)
        ]
        return (None if None in sides else math.prod(s for s in sides if s is not None)), None
    return _side(factors, "lora_B", 0), _side(factors, "lora_A", 1)


def _side(factors: Mapping[str, Tensor], name: str, dim: int) -> int | None:
    tensor = factors.get(name)
    return None if tensor is None or tensor.ndim <= dim else tensor.shape[dim]


def rows_of(tensor: Tensor, piece: Piece, dim: int = 0) -> Tensor:
    """Returns a piece of the output features, which lie along `dim`; a view where order stays."""
    first, end = piece.rows or (0, tensor.shape[dim])
    part = tensor.narrow(dim, first, end - first)
    if not piece.swapped:
        return part
    half = (end - first) // 2
    return torch.cat([part.narrow(dim, half, half), part.narrow(dim, 0, half)], dim)


def patterned(values: Mapping[str, _Value]) -> tuple[_Value, dict[str, _Value]]:
    """Returns the commonest value, and the others by whole path, as `rank_pattern` has them."""
    common = Counter(values.values()).most_common(1)[0][0]
    return common, {f"^{path}": value for path, value in values.items() if value != common}


def condensed(values: Mapping[str, _Value]) -> tuple[_Value, dict[str, _Value]]:
    """Returns the commonest value, and the others by the shortest end of a path that is theirs.

    peft 0.21.2 tries every pattern on every target as an expression, and Python compiles each anew
    where there are more than 512: 600 whole paths cost a load of LoHa or LoKr a minute. (Those of
    LoRA are condensed on the way to peft, over all layers of the host.)
    """
    common = Counter(values.values()).most_common(1)[0][0]
    ends: dict[str, _Value] = {}
    mixed = set()
    for path, value in values.items():
        for end in tails(path):
            if ends.setdefault(end, value) != value:
                mixed.add(end)
    others = {}
    for path, value in values.items():
        if value != common:
            own = [end for end in tails(path) if end not in mixed]
            others[own[-1] if own else f"^{path}"] = value
    return common, others


def config_of(
    peft_type: str, alpha: str, ranks: Mapping[str, int], alphas: Mapping[str, float]
) -> dict[str, Any]:
    """Returns the fields of a peft config that every kind has; `alpha` is what it calls alpha."""
    in_short = patterned if peft_type == "LORA" else condensed
    rank, other_ranks = in_short(ranks)
    value, other_alphas = in_short(alphas)
    return {
        "peft_type": peft_type,
        "r": rank,
        alpha: value,
        "rank_pattern": other_ranks,
        "alpha_pattern": other_alphas,
        "target_modules": sorted(ranks),
    }


def refuse_values(config: Mapping[str, Any], fields: Iterable[str]) -> None:
    """Raises BadAdapterFile for config fields that no foreign file can say."""
    for name in fields:
        value = config.get(name)
        if value and value != "none":
            raise BadAdapterFile(
                f"the adapter has {name}={shown(value)}, which no foreign file can say",
                fix="Save it in the peft or diffusers layout, which carry it.",
                field=name,
            )
