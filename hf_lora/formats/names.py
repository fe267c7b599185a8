"""What the layers of a host are called, as plain data that codecs can work with.

Codecs see no model. They see, for each component, its class name and the path and weight shape of
every layer that a LoRA can sit on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Names:
    """One component of a host, or of a pipeline that is only known by name.

    Attributes:
        kind: Class name of the component (`UNet2DConditionModel`).
        layers: Path in the bare model -> shape of the weight: (out, in) of linears, (out,
            in/groups, kernel...) of convolutions, (vocabulary, width) of embeddings.
    """

    kind: str
    layers: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Piece:
    """Where a part of a foreign layer's output features lies on the host.

    Attributes:
        path: Path of the host's layer.
        rows: (first, end) of the foreign layer's output features; None for all of them.
        swapped: Whether the host has the two halves of the features in the other order.
    """

    path: str
    rows: tuple[int, int] | None = None
    swapped: bool = False
