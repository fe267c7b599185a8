"""Figures of an adapter in training: how large its update is, of which rank, and its gradients.

The update B A is never formed, (out, in) for each layer: its norm and singular values come from the
(rank, rank) products A A^T and B^T B, for all layers of one rank at once.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_lora.families import family_of, role_in
from hf_lora.slots import Slot, parameters_in, slots_of
from hf_lora.targets import UNKNOWN
from hf_lora.training.restore import Trained
from hf_lora.walks import nested, tuner_modules

SPECTRA = 64  # the largest rank whose singular values are computed at every log
HEAD = "head"  # the role of modules trained whole
_PAIRS = (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B"))
_NUMBER = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")


@dataclass(frozen=True)
class LayerFigures:
    """What one layer's update is.

    Of factors that are not finite, norm and effective rank are NaN.

    Attributes:
        path: The target.
        role: What it does.
        block: Number of the block it lies in; None outside of numbered blocks.
        rank: Rank of the factors.
        norm: Frobenius norm of the update, scaling included.
        effective_rank: Exponential of the entropy of the normalised singular values (Roy and
            Vetterli, EUSIPCO 2007): 1 for one direction, the rank for equal ones, 0 for no update.
    """

    path: str
    role: str
    block: int | None
    rank: int
    norm: float
    effective_rank: float


@dataclass(frozen=True)
class _Pair:
    path: str
    role: str
    factors: Mapping[str, Slot]
    scaling: float

    @property
    def rank(self) -> int:
        """Rank of the factors."""
        return next(self.factors[a].value.shape[0] for a, _ in _PAIRS if a in self.factors)

    def products(self) -> tuple[Tensor, Tensor]:
        """Returns A A^T and B^T B, each (rank, rank) in float32, scaling in the second."""
        a, b = next((self.factors[x], self.factors[y]) for x, y in _PAIRS if x in self.factors)
        # the kernel of a convolution lies with A; its B is 1x1
        down = a.value.detach().flatten(1).float()
        up = b.value.detach().flatten(1).float() * self.scaling
        if "lora_E" in self.factors:
            up = up * self.factors["lora_E"].value.detach().flatten()
        return down @ down.T, up.T @ up


class Meter:
    """Takes the figures of one adapter."""

    def __init__(self, trained: Trained) -> None:
        family = family_of(trained.model)
        scalings = _scalings(trained)
        by_path: dict[str, dict[str, Slot]] = defaultdict(dict)
        self._by_role: dict[str, list[nn.Parameter]] = defaultdict(list)
        whole = set()
        for slot in slots_of(trained.model, trained.name):
            by_path[slot.path][slot.name] = slot
            if slot.whole:
                whole.add(slot.path)
        self._pairs = [
            _Pair(path, role_in(path, family) or UNKNOWN, factors, scalings[path])
            for path, factors in by_path.items()
            if path in scalings and _is_pair(factors)
        ]
        for name, parameter in parameters_in(trained.model, trained.name):
            path = next((p for p in _prefixes(name) if p in by_path), "")
            role = HEAD if path in whole else role_in(path, family) or UNKNOWN
            self._by_role[role].append(parameter)

    @torch.no_grad()
    def gradients(self) -> dict[str, Tensor]:
        """Returns role -> norm of its gradients as a tensor (), not yet waited for."""
        found = {}
        for role, parameters in self._by_role.items():
            grads = [p.grad for p in parameters if p.grad is not None]
            if grads:
                found[role] = _whole(torch.nn.utils.get_total_norm(grads))
        return found

    @torch.no_grad()
    def layers(self) -> list[LayerFigures]:
        """Returns the figures of every layer with a pair of factors A and B."""
        found: dict[int, LayerFigures] = {}
        for indices, values in self._spectra():
            norms = values.square().sum(1).sqrt()
            shares = values / values.sum(1, keepdim=True).clamp_min(1e-300)
            entropy = -(shares * shares.clamp_min(1e-300).log()).sum(1)
            ranks = torch.where(norms == 0, torch.zeros_like(norms), entropy.exp())
            for i, norm, rank in zip(indices, norms.tolist(), ranks.tolist(), strict=True):
                pair = self._pairs[i]
                found[i] = LayerFigures(
                    pair.path, pair.role, _block(pair.path), values.shape[1], norm, rank
                )
        return [found[i] for i in sorted(found)]

    @torch.no_grad()
    def figures(self) -> dict[str, float]:
        """Returns `adapter_norm` and, for ranks that are quickly done, `adapter_effective_rank`."""
        if not self._pairs:
            return {}
        if max(pair.rank for pair in self._pairs) <= SPECTRA:
            layers = self.layers()
            norm = math.sqrt(sum(layer.norm**2 for layer in layers))
            rank = sum(layer.effective_rank for layer in layers) / len(layers)
            return {"adapter_norm": norm, "adapter_effective_rank": rank}
        squares = [(a * b).sum() for a, b in (pair.products() for pair in self._pairs)]
        return {"adapter_norm": float(torch.stack(squares).sum().sqrt())}

    def _spectra(self) -> Iterable[tuple[list[int], Tensor]]:
        """Yields, for each rank, the numbers of its pairs and their singular values (n, rank).

        Those of a pair that is not finite, or too large to be squared, are NaN: the figures of a
        run that diverged must not end it.
        """
        by_rank: dict[int, list[tuple[int, Tensor, Tensor]]] = defaultdict(list)
        for i, pair in enumerate(self._pairs):
            a, b = (_whole(x) for x in pair.products())
            by_rank[pair.rank].append((i, a, b))
        for rows in by_rank.values():
            # a device is waited for once; float64, because squares lose half the digits
            a = torch.stack([row[1] for row in rows]).cpu().double()
            b = torch.stack([row[2] for row in rows]).cpu().double()
            sound = (a.isfinite() & b.isfinite()).flatten(1).all(1)
            a[~sound], b[~sound] = 0, 0  # eigh fails for all pairs where one is not finite
            values, vectors = torch.linalg.eigh(a)
            root = vectors * values.clamp_min(0).sqrt().unsqueeze(1)
            squares = torch.linalg.eigvalsh(root.mT @ b @ root).clamp_min(0)
            squares[~sound] = math.nan
            yield [row[0] for row in rows], squares.sqrt()


def _whole(tensor: Any) -> Tensor:
    """Returns a tensor that may be sharded as a whole one."""
    whole: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole


def _is_pair(factors: Mapping[str, Slot]) -> bool:
    """Tells whether the update is B A; factors of grouped layers and of experts are not."""
    for down, up in _PAIRS:
        if down in factors and up in factors:
            a, b = factors[down].value, factors[up].value
            return a.shape[0] == b.shape[1] and b.flatten(1).shape[1] == b.shape[1]
    return False


def _scalings(trained: Trained) -> dict[str, float]:
    """Returns target -> what its B A is multiplied with."""
    found: dict[str, float] = {}
    for path, outer in tuner_modules(trained.model):
        layers: list[Any] = [m for m in nested(outer) if hasattr(m, "scaling")]
        if len(layers) != 1 or trained.name not in layers[0].scaling:
            continue  # several parameters of one module: fused experts
        layer = layers[0]
        ranks = getattr(layer, "ranknum", {})
        divisor = float(ranks[trained.name]) + 1e-5 if trained.name in ranks else 1.0
        if not getattr(layer, "parameter_name", ""):
            found[path] = float(layer.scaling[trained.name]) / divisor
    return found


def _prefixes(name: str) -> Iterable[str]:
    """Yields the paths a dotted name lies below, the longest first."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _block(path: str) -> int | None:
    found = _NUMBER.search(path)
    return int(found[1]) if found else None
