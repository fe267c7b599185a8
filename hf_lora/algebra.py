"""Low-rank arithmetic on factors: no model, and never a matrix of the size of the weight."""

from __future__ import annotations

import torch
from torch import Tensor

_WIDE = ("cpu", "cuda")  # devices with float64


def fold_diagonal(a: Tensor, e: Tensor, b: Tensor, *, factor: float = 1.0) -> tuple[Tensor, Tensor]:
    """Returns the plain factors of `factor * B diag(e) A`; ranks whose e is zero are left out.

    Computed in float64 and rounded once, to the dtypes of A and B.

    Args:
        a: (rank, in).
        e: Singular values, (rank, 1) or (rank,).
        b: (out, rank).
        factor: What goes into B besides.

    Returns:
        A of (kept, in) and B of (out, kept), on their own devices.
    """
    values = e.detach().flatten()
    kept = values.nonzero().flatten()
    device = b.device if b.device.type in _WIDE else torch.device("cpu")
    wide = values[kept].to(device, torch.float64) * factor
    columns = b.detach()[:, kept.to(b.device)].to(device, torch.float64) * wide
    return a.detach()[kept.to(a.device)].clone(), columns.to(b.device, b.dtype)
