"""Weights that stand in several places of a model: who gets its own when one of them merges."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from hf_lora.layers.kinds import parameter_keys


class Sharing:
    """Which parameters and modules of the host stand in several places."""

    def __init__(self, models: Sequence[nn.Module]) -> None:
        self._owners: dict[int, dict[tuple[int, str], None]] = {}
        self._parents: dict[int, int] = {}
        self._split: dict[int, list[str]] = {}
        for module in {id(m): m for model in models for m in model.modules()}.values():
            for key, parameter in module._parameters.items():
                if parameter is not None:
                    self._owners.setdefault(id(parameter), {})[id(module), key] = None
            for child in module._modules.values():
                self._parents[id(child)] = self._parents.get(id(child), 0) + 1

    def settle(self, layers: Sequence[Any]) -> None:
        """Decides which of the layers get parameters of their own.

        Of a group that is touched everywhere the last one keeps the parameter: the others need
        the base values until then.
        """
        places = [
            (layer, key, layer.get_base_layer()._parameters[key])
            for layer in layers
            for key in parameter_keys(layer)
        ]
        left = {id(p): len(self._owners[id(p)]) for _, _, p in places}
        for layer, key, parameter in places:
            left[id(parameter)] -= 1
            if left[id(parameter)]:
                self._split.setdefault(id(layer), []).append(key)

    def keys_of(self, layer: Any) -> list[str]:
        """Returns the parameters of which the layer gets its own."""
        return self._split.get(id(layer), [])

    def is_shared(self, module: nn.Module) -> bool:
        """Tells whether a module stands below more than one other."""
        return self._parents.get(id(module), 0) > 1
