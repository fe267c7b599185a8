"""A merged model made plain again: no tuner layers, and no tie declared that does not hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from hf_lora.errors import MergeError
from hf_lora.hosts import config_of


def unwrap(model: nn.Module) -> None:
    """Puts base layers in the place of tuner layers, and what was trained in that of the original.

    A head trained whole is that of the active adapter; new token rows go into the embedding.

    Raises:
        MergeError: peft cannot put token rows in. The weights are then as before; the module tree
            may be half done.
    """
    wrappers = [m for m in model.modules() if isinstance(m, AuxiliaryTrainingWrapper)]
    rows = [m.token_adapter.get_base_layer() for m in wrappers if hasattr(m, "token_adapter")]
    before = [(base.weight, base.weight.data) for base in rows]
    try:
        _unwrap(model)
    except Exception as error:
        for parameter, data in before:
            parameter.data = data
        raise MergeError(f"peft cannot merge new token rows: {error}") from error


def _unwrap(module: nn.Module) -> None:
    children: list[tuple[str, Any]] = list(module._modules.items())
    for key, child in children:
        if isinstance(child, AuxiliaryTrainingWrapper):
            names = list(child.active_adapters)
            child = child.unload_and_optionally_merge_module(True, True, names)
        while isinstance(child, BaseTunerLayer):
            child = child.base_layer  # type: ignore[attr-defined]
        module._modules[key] = child
        if child is not None:
            _unwrap(child)


def untie(model: Any) -> bool:
    """Makes config and weights say the same when a tied weight has become one of its own.

    transformers ties at every load what its config says is tied, and leaves out of a file what
    shares memory. So where one tie is broken, `tie_word_embeddings` becomes False and every other
    weight that this flag ties gets memory of its own.

    Returns:
        Whether anything was changed.
    """
    ties = [tie for module in model.modules() for tie in _declared_ties(module)]
    broken = [tie for tie in ties if not tie.holds()]
    configs = {id(c): c for tie in broken for c in _configs(tie.module)}
    owners: dict[int, tuple[int, str]] = {}
    for tie in ties:
        if any(id(c) in configs for c in _configs(tie.module)):
            tie.loosen(owners)
    if broken:
        configs |= {id(c): c for c in _configs(model)}
    for config in configs.values():
        if getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = False
    if broken and hasattr(model, "all_tied_weights_keys"):
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
    return bool(broken)


@dataclass(frozen=True)
class _Tie:
    """A tie that transformers makes at a load: the parameter `name` becomes that at `source`."""

    module: nn.Module
    name: str
    source: str

    def holds(self) -> bool:
        return self.module.get_parameter(self.name) is self.module.get_parameter(self.source)

    def loosen(self, owners: dict[int, tuple[int, str]]) -> None:
        """Gives each side a copy of its own when its parameter stands elsewhere as well.

        Args:
            owners: Parameter id -> the one place that keeps it, filled on the way.
        """
        for path in (self.source, self.name):
            parent, _, key = path.rpartition(".")
            module, parameter = self.module.get_submodule(parent), self.module.get_parameter(path)
            place = (id(module), key)
            if owners.setdefault(id(parameter), place) != place:
                own = parameter.detach().clone()
                module._parameters[key] = nn.Parameter(own, requires_grad=parameter.requires_grad)


def _declared_ties(module: nn.Module) -> list[_Tie]:
    declared = getattr(module, "get_expanded_tied_weights_keys", None)
    if declared is None:
        return []
    known = dict(module.named_parameters(remove_duplicate=False))
    pairs = declared(all_submodels=False).items()
    return [_Tie(module, a, b) for a, b in pairs if a in known and b in known]


def _configs(module: nn.Module) -> list[Any]:
    config = config_of(module)
    text = getattr(config, "get_text_config", None)
    return [config] if text is None else [config, text()]
