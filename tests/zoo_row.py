"""What a row of the zoo says, how its model is built, and the inputs the tables share."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
import transformers
from torch import Tensor, nn


@dataclass(frozen=True)
class Row:
    """How to build one family small, and what to feed it.

    Attributes:
        kind: What sort of model it is: `"decoder"`, `"dit"` and so on.
        model: Class name in transformers or diffusers.
        sizes: Fields of its config, or arguments of a diffusers class.
        inputs: Arguments of `forward`.
        output: Attribute of what `forward` returns.
        silent: Pattern of target paths -> why no gradient can reach them. A pattern that matches
            a target with a gradient, or none at all, is a failure.
    """

    kind: str
    model: str
    sizes: Mapping[str, Any]
    inputs: Mapping[str, Any]
    output: str = "logits"
    silent: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_denoiser(self) -> bool:
        """Whether it is a class of diffusers, which peft loads by injection."""
        return self.kind in {"unet", "dit"}

    def build(self) -> Any:
        """Builds it in evaluation mode; two calls give equal weights.

        Every parameter gets noise on top of its start, as much as keeps the size of what flows:
        gates that start at zero would keep the gradient from the layers before them.
        """
        kind: Any = getattr(diffusers if self.is_denoiser else transformers, self.model)
        sizes = copy.deepcopy(dict(self.sizes))
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            model: nn.Module = (
                kind(**sizes) if self.is_denoiser else kind(kind.config_class(**sizes))
            )
            for name, parameter in model.named_parameters():
                if name.endswith("pad_token"):  # diffusers 0.42 leaves it as torch.empty gives it
                    parameter.zero_()
                width = parameter[0].numel() if parameter.ndim > 1 else 400
                parameter.add_(torch.randn_like(parameter) / width**0.5)
        return model.eval()

    def run(self, model: Any) -> Tensor:
        """Returns the output of `model` for the fixed inputs, in the mode it is in."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # for the dropout of training mode
            output = getattr(model(**copy.deepcopy(dict(self.inputs))), self.output)
        return torch.stack(output) if isinstance(output, list) else output


def ids(rows: int = 2, length: int = 12) -> Tensor:
    """Returns token ids from 3 to 95, as many rows as asked for."""
    return torch.randint(3, 96, (rows, length), generator=torch.Generator().manual_seed(1))


def noise(*shape: int) -> Tensor:
    """Returns normal noise that depends on the shape alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
