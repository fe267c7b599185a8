"""What each trainable parameter is: A, B, another factor, a vector, or a module trained whole.

Read from where it lies in peft's layers, never from its shape alone: a B of rank one looks like a
vector, and a magnitude of DoRA on a convolution looks like a matrix.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from hf_lora.errors import TrainingError, listing
from hf_lora.hosts import active_names, adapter_names, model_of, peft_configs
from hf_lora.record import enabled
from hf_lora.walks import AROUND, TunerModule, nested, tuner_modules

Role = Literal["A", "B", "factor", "whole", "vector"]

# peft's containers of a layer's factors. An embedding's A is (rank, vocabulary).
_ROLES: dict[str, Role] = {
    "lora_A": "A",
    "lora_embedding_A": "A",
    "lora_B": "B",
    "lora_embedding_B": "B",
}
_OWN_BIASES = ("all", "lora_only")  # values of a config's `bias` that train biases of the base

# Name of a group -> the role in it, and whether weight decay applies. Decay pulls magnitudes,
# biases and norms to zero, where for them no effect is not.
_GROUPS: tuple[tuple[str, Role, bool], ...] = (
    ("A", "A", True),
    ("B", "B", True),
    ("factors", "factor", True),
    ("whole", "whole", True),
    ("vectors", "vector", False),
)


@dataclass(frozen=True)
class Part:
    """One parameter that is trained.

    Attributes:
        name: Dotted name in the bare model.
        parameter: The parameter.
        role: What it is.
        adapter: The adapter it belongs to; empty where several share it.
    """

    name: str
    parameter: nn.Parameter
    role: Role
    adapter: str


def trained_parts(host: object) -> list[Part]:
    """Returns every parameter that training the host would train, once, in the model's order.

    Raises:
        TrainingError: There is no adapter, nothing of the active ones is trainable, or parameters
            outside of them are.
    """
    model = model_of(host)
    if not adapter_names(model):
        raise TrainingError(
            f"{type(model).__name__} has no adapter to train",
            fix="Call attach_lora(model) first; the optimizer must hold the adapter's parameters.",
        )
    own = dict(_own_parameters(model))
    active = active_names(model)
    found, idle, loose = [], [], []
    for name, parameter, inside in _named(host, model):
        if not parameter.requires_grad:
            continue
        adapter, role = own.get(id(parameter), ("", None))
        if role is None:
            role = _elsewhere(model, name, parameter, inside=inside)
        if role is None:
            loose.append(name)
        elif adapter and adapter not in active:
            idle.append(name)
        else:
            found.append(Part(name, parameter, role, adapter))
    if not found:  # before the base, which a load for inference leaves as it is
        raise _nothing(model, active)
    _check_loose(loose, idle, active)
    return found


def groups_of(
    parts: Sequence[Part], *, lr: float, weight_decay: float, ratio: float
) -> list[dict[str, Any]]:
    """Returns the optimizer's groups, those without a parameter left out.

    Args:
        parts: What is trained.
        lr: Learning rate.
        weight_decay: For matrices; vectors have none.
        ratio: The rate of B is this times `lr`.
    """
    groups = []
    for name, role, decays in _GROUPS:
        named = [(part.name, part.parameter) for part in parts if part.role == role]
        if named:
            groups.append(
                {
                    "params": named,
                    "name": name,
                    "lr": lr * ratio if role == "B" else lr,
                    "weight_decay": weight_decay if decays else 0.0,
                }
            )
    return groups


def _own_parameters(model: nn.Module) -> Iterator[tuple[int, tuple[str, Role]]]:
    """Yields id -> (adapter, role) of all that belongs to adapters, trainable or not."""
    names = set(adapter_names(model))
    for _, outer in tuner_modules(model):
        for module in nested(outer):
            whole = isinstance(module, AuxiliaryTrainingWrapper)
            for trail, parameter in _below(module):
                adapter = next((key for key in trail if key in names), "")
                yield id(parameter), (adapter, _role(trail, parameter, whole=whole))


def _below(module: nn.Module, trail: tuple[str, ...] = ()) -> Iterator[Any]:
    """Yields (keys on the way, parameter) of a tuner module without what it stands around."""
    for key, parameter in module._parameters.items():
        if parameter is not None:
            yield (*trail, key), parameter
    around = AROUND if isinstance(module, TunerModule) else ()
    for key, child in module._modules.items():
        if child is not None and key not in around:
            yield from _below(child, (*trail, key))


def _role(trail: tuple[str, ...], parameter: nn.Parameter, *, whole: bool) -> Role:
    if parameter.ndim < 2:
        return "vector"
    if whole:
        return "whole"
    if trail[0] in _ROLES:
        return _ROLES[trail[0]]
    # a magnitude on a convolution is (1, out, 1, 1)
    return "vector" if parameter.numel() == max(parameter.shape) else "factor"


def _named(host: Any, model: nn.Module) -> Iterator[tuple[str, nn.Parameter, bool]]:
    """Yields (name, parameter, whether it is in the bare model), each parameter once."""
    known = set()
    for name, parameter in model.named_parameters():
        known.add(id(parameter))
        yield name, parameter, True
    for name, parameter in host.named_parameters():
        if id(parameter) not in known:
            yield name, parameter, False


def _elsewhere(
    model: nn.Module, name: str, parameter: nn.Parameter, *, inside: bool
) -> Role | None:
    """Returns the role of a parameter that lies in no tuner layer; None where it is the base's.

    A PeftModel may hold what all layers share (the vector bank of VB-LoRA) beside the model.
    """
    if not inside:
        return "factor" if parameter.ndim > 1 else "vector"
    wanted = {getattr(config, "bias", "none") for config in peft_configs(model).values()}
    biases = name.endswith("bias") and not wanted.isdisjoint(_OWN_BIASES)
    return "vector" if biases else None


def _check_loose(loose: Sequence[str], idle: Sequence[str], active: Sequence[str]) -> None:
    if loose:
        raise TrainingError(
            f"{len(loose)} parameters of the base require gradients and would be trained without "
            f"being saved: {listing(loose, limit=3)}",
            fix="Freeze them (requires_grad_(False)), or name their modules when attaching: "
            "attach_lora(model, train_also=[...]).",
        )
    if idle:
        raise TrainingError(
            f"{len(idle)} parameters of inactive adapters require gradients, which they will never "
            f"get: {listing(idle, limit=3)}",
            fix=f"Active is {listing(active) or 'none'}; set_adapters(model, names) activates "
            "others and freezes the rest.",
        )


def _nothing(model: nn.Module, active: Sequence[str]) -> TrainingError:
    if not enabled(model):
        return TrainingError(
            f"the adapters of {type(model).__name__} are disabled, so nothing is trainable",
            fix="Enable them: model.enable_adapters(), or leave the block that disables them.",
        )
    return TrainingError(
        f"no parameter of {listing(map(repr, active)) or 'any adapter'} on {type(model).__name__} "
        "requires a gradient, so nothing would be trained",
        fix="Load it with load_lora(model, ..., trainable=True), or activate another: "
        f"set_adapters(model, name), of {listing(adapter_names(model))}.",
    )
