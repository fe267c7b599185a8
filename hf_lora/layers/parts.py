"""LoRA on parts of a fused projection: q and v of one qkv matrix, as in arXiv 2106.09685.

Each part has factors of its own, A of (rank, in) and B of (its features, rank). Together they are a
LoRA of the fused matrix: A is all A one below the other, B has the blocks where the part's features
and the part's rank meet, and zeros elsewhere. peft's layer keeps its stacked A; its B becomes a
module that holds the blocks alone and looks like the whole B from outside: in the forward, in
merges, in every state dict. So a file of it is a plain LoRA of rank `parts * rank`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_lora.errors import AdapterMismatch

_WEIGHT = "weight"


class PartsB(nn.Module):
    """The factor B of a LoRA on parts: blocks that are trained, and zeros that cannot be.

    Each part is a parameter of its own name, (features of the part, rank).

    Attributes:
        rows: Part -> its output features in the fused projection.
        rank: Rank of one part.
        bias: None; peft asks for it.
    """

    def __init__(
        self, rows: Mapping[str, Sequence[int]], features: int, rank: int, like: Tensor
    ) -> None:
        """Makes blocks of zeros.

        Args:
            rows: Part -> its output features in the fused projection, in order.
            features: Output features of the fused projection.
            rank: Rank of one part.
            like: A tensor whose device and dtype the blocks take.
        """
        super().__init__()
        self.rank = rank
        self.bias = None
        self.in_features, self.out_features = rank * len(rows), features
        self.rows = {part: tuple(at) for part, at in rows.items()}
        for part, at in rows.items():
            self.register_parameter(part, nn.Parameter(like.new_zeros(len(at), rank)))
        # no buffer: `to_empty` would fill it with whatever the memory held
        self._orders: dict[torch.device, Tensor] = {}

    @property
    def weight(self) -> Tensor:
        """The whole B, (features, parts * rank), with gradients to the blocks."""
        last = len(self.rows) - 1
        wide = [
            F.pad(getattr(self, part), (i * self.rank, (last - i) * self.rank))
            for i, part in enumerate(self.rows)
        ]
        return torch.cat([*wide, wide[0].new_zeros(1, self.in_features)])[self._order(wide[0])]

    def _order(self, like: Tensor) -> Tensor:
        """Row i of the whole B is row `order[i]` of all blocks and, behind them, one of zeros."""
        if like.device not in self._orders:
            empty = sum(map(len, self.rows.values()))
            order = torch.full((self.out_features,), empty, dtype=torch.int64, device="cpu")
            start = 0
            for at in self.rows.values():
                order[list(at)] = torch.arange(start, start + len(at), device="cpu")
                start += len(at)
            self._orders[like.device] = order.to(like.device)
        return self._orders[like.device]

    def forward(self, x: Tensor) -> Tensor:
        """Returns x B^T: (..., parts * rank) -> (..., features)."""
        return F.linear(x, self.weight)

    @torch.no_grad()
    def put(self, weight: Tensor) -> None:
        """Takes the blocks out of a whole B.

        Raises:
            AdapterMismatch: It has another shape, or values where these parts have zeros.
        """
        shape = (self.out_features, self.in_features)
        if tuple(weight.shape) != shape:
            raise AdapterMismatch(f"B is {tuple(weight.shape)}, and {shape} is needed here")
        cut = {}
        for i, (part, at) in enumerate(self.rows.items()):
            columns = weight[:, i * self.rank : (i + 1) * self.rank]
            cut[part] = columns[list(at)]
        if sum(int(block.count_nonzero()) for block in cut.values()) != int(weight.count_nonzero()):
            raise AdapterMismatch(
                f"B has values outside the parts {' and '.join(self.rows)}, so it is no LoRA on "
                "these parts alone"
            )
        for part, block in cut.items():
            own = self._parameters[part]
            assert own is not None
            if own.is_meta:
                needs_grad = own.requires_grad
                self._parameters[part] = nn.Parameter(block.to(own.dtype), requires_grad=needs_grad)
            else:
                own.copy_(block)  # an optimizer may hold it

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        whole = self.weight
        destination[f"{prefix}{_WEIGHT}"] = whole if keep_vars else whole.detach()

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        key = f"{prefix}{_WEIGHT}"
        if key not in state_dict:
            missing_keys.append(key)
            return
        try:
            self.put(state_dict[key])
        except AdapterMismatch as error:
            error_msgs.append(f"{key}: {error}")


def cut_into_parts(layer: Any, name: str, rows: Mapping[str, Sequence[int]]) -> None:
    """Gives an adapter of a layer factors for these parts only, in place of its whole B.

    Args:
        layer: peft's LoRA layer; the adapter's rank there is a multiple of the number of parts.
        name: The adapter.
        rows: Part -> its output features.
    """
    whole = layer.lora_B[name].weight
    parts = PartsB(rows, whole.shape[0], whole.shape[1] // len(rows), whole)
    parts.requires_grad_(whole.requires_grad)
    parts.train(layer.training)
    layer.lora_B[name] = parts
