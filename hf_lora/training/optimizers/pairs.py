"""Where a trained factor and the frozen one beside it lie on each kind of layer, as matrices.

What LoRA-FA does with them is the same on all; see `lorafa`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from peft import PeftType
from peft.tuners.lora.layer import Embedding, LoraLayer, ParamWrapper
from peft.tuners.lora.tp_layer import LoraParallelLinear
from torch import Tensor, nn

from hf_lora.errors import TrainingError, UnsupportedTarget
from hf_lora.hosts import active_names, peft_configs
from hf_lora.layers.dora import is_dora
from hf_lora.layers.parts import PartsB
from hf_lora.walks import holds, nested, tuner_modules

# Directions in which A is this much smaller than in its largest are noise: nothing is divided by
# them. The bound is one of A A^T, so the square of that of A.
_SMALLEST = 1e-10
_WIDE = ("cpu", "cuda")  # devices with float64


class Pair(ABC):
    """A trained factor and the frozen one beside it, on one layer.

    As matrices the trained one is (blocks, out, rank), the frozen one (blocks, rank, in), and a
    block's update of the weight is their product.

    Attributes:
        layer: peft's layer.
        name: The adapter.
    """

    freezes: ClassVar[str] = "lora_A"

    def __init__(self, layer: Any, name: str) -> None:
        self.layer, self.name = layer, name
        self._inverse: Tensor | None = None
        self._seen: tuple[Tensor, Tensor, int, float] | None = None

    @property
    def trained(self) -> nn.Parameter:
        """The factor that is trained; looked up, for loads put new parameters in."""
        return self.layer.lora_B[self.name].weight  # type: ignore[no-any-return]

    @property
    def frozen(self) -> nn.Parameter:
        """The factor that is not."""
        return self.layer.lora_A[self.name].weight  # type: ignore[no-any-return]

    @abstractmethod
    def rows(self, frozen: Tensor) -> Tensor:
        """Returns the frozen factor as (blocks, rank, in)."""

    @abstractmethod
    def cut(self, gradient: Tensor) -> Tensor:
        """Returns a gradient of the trained factor as (blocks, out, rank)."""

    @abstractmethod
    def paste(self, blocks: Tensor, shape: torch.Size) -> Tensor:
        """The inverse of `cut`."""

    def precondition(self, gradient: Tensor) -> Tensor:
        """Returns g (A A^T)^-1 / s^2 in the gradient's dtype, computed in float32 or wider.

        Raises:
            TrainingError: The factors are sharded.
        """
        if "DTensor" in (type(gradient).__name__, type(self.frozen).__name__):
            raise TrainingError(
                "the factors are sharded (FSDP or tensor parallel), and LoRA-FA needs each whole",
                fix='Use DDP, or lora_optimizer(model, "adamw").',
            )
        wide = torch.promote_types(gradient.dtype, torch.float32)
        inverse = self._inverse_for(gradient.device, wide)
        # under autocast the product would be rounded to half precision
        with torch.autocast(gradient.device.type, enabled=False):
            product = self.cut(gradient.to(wide)) @ inverse
        return self.paste(product, gradient.shape).to(gradient.dtype)

    def forget(self) -> None:
        """Drops the cached inverse."""
        self._inverse = self._seen = None

    def _inverse_for(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Returns (blocks, rank, rank); computed anew when the frozen factor is another.

        Seen by its object, its memory and its version. Held on to, so that no other tensor can
        come to lie where it was.
        """
        factor, scaling = self.frozen, float(self.layer.scaling[self.name])
        seen = self._seen
        same = (
            seen is not None
            and seen[0] is factor
            and seen[1].data_ptr() == factor.data_ptr()
            and seen[2:] == (factor._version, scaling)
        )
        if not same:
            self._inverse = None
            self._seen = (factor, factor.detach(), factor._version, scaling)
        if self._inverse is None:
            self._inverse = inverse_of(self.rows(factor.detach()), scaling)
        if self._inverse.device != device or self._inverse.dtype != dtype:
            self._inverse = self._inverse.to(device, dtype)
        return self._inverse


def inverse_of(rows: Tensor, scaling: float) -> Tensor:
    """Returns (A A^T)^+ / s^2 in float64: (blocks, rank, in) -> (blocks, rank, rank).

    The pseudo-inverse: dependent rows of A span fewer directions, and s * g (A A^T)^+ / s^2 * A is
    the projection onto those that they span.
    """
    device = rows.device if rows.device.type in _WIDE else torch.device("cpu")
    wide = rows.to(device, torch.float64)
    inverse: Tensor = torch.linalg.pinv(wide @ wide.mT, rtol=_SMALLEST, hermitian=True)
    return inverse / scaling**2


def _split(matrix: Tensor, blocks: int) -> Tensor:
    """Returns the rows in blocks, in order: (blocks * n, m) -> (blocks, n, m)."""
    return matrix.reshape(blocks, -1, matrix.shape[1])


class _Grouped(Pair):
    """Linears and convolutions; B of a grouped convolution has a share of the rank per group."""

    @property
    def _groups(self) -> int:
        return int(getattr(self.layer.lora_B[self.name], "groups", 1))

    def rows(self, frozen: Tensor) -> Tensor:
        return _split(frozen.flatten(1), self._groups)

    def cut(self, gradient: Tensor) -> Tensor:
        return _split(gradient.flatten(1), self._groups)

    def paste(self, blocks: Tensor, shape: torch.Size) -> Tensor:
        return blocks.reshape(shape)


class _Experts(Pair):
    """A parameter with one matrix an expert: A is (experts * rank, in), B (out, rank * experts)."""

    @property
    def _experts(self) -> int:
        return int(self.layer.num_experts)

    def rows(self, frozen: Tensor) -> Tensor:
        return _split(frozen, self._experts)

    def cut(self, gradient: Tensor) -> Tensor:
        wide = gradient.reshape(gradient.shape[0], -1, self._experts)
        return wide.permute(2, 0, 1)

    def paste(self, blocks: Tensor, shape: torch.Size) -> Tensor:
        return blocks.permute(1, 2, 0).reshape(shape)


class _Tokens(Pair):
    """An embedding, whose sides are the other way round: peft starts A at zero and B at random.

    With A frozen nothing could ever be trained, so B is the frozen one. A is (rank, vocabulary).
    """

    freezes = "lora_embedding_B"

    @property
    def trained(self) -> nn.Parameter:
        return self.layer.lora_embedding_A[self.name]  # type: ignore[no-any-return]

    @property
    def frozen(self) -> nn.Parameter:
        return self.layer.lora_embedding_B[self.name]  # type: ignore[no-any-return]

    def rows(self, frozen: Tensor) -> Tensor:
        return frozen.T[None]

    def cut(self, gradient: Tensor) -> Tensor:
        return gradient.T[None]

    def paste(self, blocks: Tensor, shape: torch.Size) -> Tensor:
        return blocks[0].T.contiguous()


class _Piece(Pair):
    """One part of a fused projection: its block of B, and its rows of A."""

    def __init__(self, layer: Any, name: str, part: str) -> None:
        super().__init__(layer, name)
        self.part = part

    @property
    def trained(self) -> nn.Parameter:
        return self.layer.lora_B[self.name].get_parameter(self.part)  # type: ignore[no-any-return]

    def rows(self, frozen: Tensor) -> Tensor:
        whole: PartsB = self.layer.lora_B[self.name]
        start = list(whole.rows).index(self.part) * whole.rank
        return frozen[start : start + whole.rank][None]

    def cut(self, gradient: Tensor) -> Tensor:
        return gradient[None]

    def paste(self, blocks: Tensor, shape: torch.Size) -> Tensor:
        return blocks[0]


# Layers whose factors lie otherwise; the first row that holds the layer decides.
_FORMS: tuple[tuple[type, type[Pair]], ...] = (
    (ParamWrapper, _Experts),
    (Embedding, _Tokens),
    (LoraLayer, _Grouped),
)


def pairs_of(model: nn.Module) -> list[Pair]:
    """Returns the pairs of all active adapters that are trained.

    Raises:
        TrainingError: An adapter is no LoRA, or the factor that would be frozen is zero, so that
            nothing could be trained.
        UnsupportedTarget: A layer's update is not s B A; the error names it.
    """
    configs = peft_configs(model)
    names = [name for name in active_names(model) if not configs[name].inference_mode]
    for name in names:
        if configs[name].peft_type != PeftType.LORA:
            raise TrainingError(
                f"LoRA-FA freezes A of a LoRA, and adapter {name!r} is of the method "
                f"{getattr(configs[name].peft_type, 'value', configs[name].peft_type)}",
                fix='Use lora_optimizer(model, "adamw").',
            )
    found: list[Pair] = []
    for path, layer in lora_layers(model):
        for name in names:
            if holds(layer, name):
                _check_form(path, layer, name)
                found += pairs_at(layer, name)
                _check_trains(path, found[-1])
    return found


def lora_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yields (path, layer) of every LoRA layer, nested ones too."""
    for path, outer in tuner_modules(model):
        for module in nested(outer):
            if isinstance(module, LoraLayer):
                yield path, module


def pairs_at(layer: Any, name: str) -> list[Pair]:
    """Returns an adapter's pairs on a layer: one, or one for each part of a fused projection."""
    whole = layer.lora_B[name] if name in layer.lora_B else None
    if isinstance(whole, PartsB):
        return [_Piece(layer, name, part) for part in whole.rows]
    form = next(form for kind, form in _FORMS if isinstance(layer, kind))
    return [form(layer, name)]


def odd_variant(layer: Any, name: str) -> str:
    """Returns the name of a variant whose update is not s B A; DoRA's is, with its rows scaled."""
    variant = layer.lora_variant.get(name)
    return "" if variant is None or is_dora(variant) else type(variant).__name__


def _check_form(path: str, layer: Any, name: str) -> None:
    odd = odd_variant(layer, name)
    if isinstance(layer, LoraParallelLinear):
        odd = type(layer).__name__
    if odd:
        raise UnsupportedTarget(
            f"the update at {path} is that of {odd}, for which LoRA-FA has no formula",
            fix='Use lora_optimizer(model, "adamw").',
            field=path,
        )


def _check_trains(path: str, pair: Pair) -> None:
    if not pair.layer.scaling[pair.name]:
        raise TrainingError(
            f"adapter {pair.name!r} has strength 0 at {path}, so its gradient there is zero",
            fix=f"set_adapters(model, {pair.name!r}) gives it strength 1.",
            field=path,
        )
    if not pair.frozen.count_nonzero():
        raise TrainingError(
            f"{pair.freezes} at {path} is zero, and with it frozen nothing can be trained there",
            fix='Use lora_optimizer(model, "adamw"), or attach with another init_lora_weights.',
            field=path,
        )
