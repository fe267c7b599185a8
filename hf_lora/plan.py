"""host -> LoraPlan: which layers get a LoRA, what that costs, and what stays frozen and why.

Planning changes nothing and needs shapes only, so it works on meta tensors. `attach_lora` builds
exactly what its plan says.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from peft import LoraConfig, PeftConfig
from torch import nn

from hf_lora.choose import (
    by_pattern,
    cap_ranks,
    choose_heads,
    choose_layers,
    fill_config,
    part_sizes,
    unnamed_heads,
)
from hf_lora.configs import make_config, take_config
from hf_lora.errors import listing
from hf_lora.hosts import bare_modules, check_components, model_of
from hf_lora.prepared import QuantisedBase, describe
from hf_lora.quantised import check_fits, check_trains, check_whole, stored_layers
from hf_lora.render import plan_table
from hf_lora.select import TargetSpec
from hf_lora.targets import UNKNOWN, Layer, Survey, excuse, survey


@dataclass(frozen=True)
class Target:
    """A layer that gets a LoRA.

    Attributes:
        path: Dotted path in the bare model.
        role: What it does; `unknown` when it was named or inferred without one.
        shape: (in, out) features.
        rank: Rank of the factors; None for methods other than LoRA.
        parameters: Values the adapter adds here; None for methods other than LoRA.
        is_parameter: Whether it is a parameter of a module (fused experts) and not a layer.
        rows: Part -> its output features, for a LoRA on parts of a fused projection, each of which
            has the rank; empty for a whole layer.
    """

    path: str
    role: str
    shape: tuple[int, int]
    rank: int | None
    parameters: int | None
    is_parameter: bool = False
    rows: Mapping[str, Sequence[int]] = field(default_factory=dict, repr=False)

    @property
    def module(self) -> str:
        """Path of the module that peft wraps: the layer, or the owner of a parameter."""
        return self.path.rpartition(".")[0] if self.is_parameter else self.path


@dataclass(frozen=True)
class Head:
    """A module trained whole and saved with the adapter."""

    path: str
    parameters: int


@dataclass(frozen=True)
class Frozen:
    """A group of layers that stay as they are.

    Attributes:
        what: Their role, or their last path segments where the role is unknown.
        count: How many layers.
        parameters: Their values together.
        reason: Why they are no targets.
    """

    what: str
    count: int
    parameters: int
    reason: str


@dataclass(frozen=True)
class LoraPlan:
    """The dry run of `attach_lora`; `print(plan)` shows it as a table.

    Attributes:
        host: Class name of the model.
        family: Name of the family row that applied, or None.
        name: Name of the adapter.
        targets: Layers that get a LoRA.
        heads: Modules trained whole.
        frozen: What stays frozen, with the reason.
        notes: What a reader should know besides.
        host_parameters: Values of the bare model, tied ones once.
        config: The peft config that will be attached.
        quantised: What is quantised of the base and how training on it is set; None for nothing.
    """

    host: str
    family: str | None
    name: str
    targets: tuple[Target, ...]
    heads: tuple[Head, ...]
    frozen: tuple[Frozen, ...]
    notes: tuple[str, ...]
    host_parameters: int
    config: PeftConfig = field(repr=False)
    quantised: QuantisedBase | None = field(default=None, repr=False)

    @property
    def rank(self) -> int | None:
        """Rank before caps; None for methods other than LoRA."""
        return self.config.r if isinstance(self.config, LoraConfig) else None

    @property
    def alpha(self) -> float | None:
        """Alpha; None for methods other than LoRA."""
        return self.config.lora_alpha if isinstance(self.config, LoraConfig) else None

    @property
    def adapter_parameters(self) -> int:
        """Values of all factors (0 where the method is not LoRA and the count is not known)."""
        return sum(t.parameters or 0 for t in self.targets)

    @property
    def trainable_parameters(self) -> int:
        """Values of factors and heads."""
        return self.adapter_parameters + sum(h.parameters for h in self.heads)

    @property
    def adapter_bytes(self) -> int:
        """Size of the factors in float32, which they are trained and saved in."""
        return 4 * self.adapter_parameters

    @property
    def training_bytes(self) -> dict[str, int]:
        """What training takes beside model, factors and activations: gradients, AdamW's states.

        AdamW keeps two float32 values a trainable parameter (torch 2.13).
        """
        return {"gradients": 4 * self.trainable_parameters, "adamw": 8 * self.trainable_parameters}

    def by_role(self) -> dict[str, tuple[Target, ...]]:
        """Returns the targets grouped by role, in the model's order."""
        roles = dict.fromkeys(t.role for t in self.targets)
        return {role: tuple(t for t in self.targets if t.role == role) for role in roles}

    def to_dict(self) -> dict[str, Any]:
        """Returns the plan as plain data, for JSON."""
        return {
            "host": self.host,
            "family": self.family,
            "name": self.name,
            "method": str(self.config.peft_type.value),  # type: ignore[union-attr]
            "task_type": self.config.task_type,
            "rank": self.rank,
            "alpha": self.alpha,
            "host_parameters": self.host_parameters,
            "adapter_parameters": self.adapter_parameters,
            "trainable_parameters": self.trainable_parameters,
            "trainable_share": self.trainable_parameters / max(1, self.host_parameters),
            "adapter_bytes": self.adapter_bytes,
            "training_bytes": self.training_bytes,
            "roles": {
                role: {
                    "targets": [t.path for t in group],
                    "parameters": sum(t.parameters or 0 for t in group),
                }
                for role, group in self.by_role().items()
            },
            "heads": {h.path: h.parameters for h in self.heads},
            "frozen": [vars(f) for f in self.frozen],
            "quantised": None if self.quantised is None else asdict(self.quantised),
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        return plan_table(self)


def plan_lora(
    host: object,
    *,
    rank: int = 16,
    alpha: float | None = None,
    targets: TargetSpec = "default",
    dropout: float = 0.0,
    components: Sequence[str] | None = None,
    train_also: Sequence[str] | None = None,
    name: str = "default",
    config: PeftConfig | None = None,
) -> LoraPlan:
    """Says what `attach_lora` would do with the same arguments, and changes nothing.

    Args:
        host: A transformers model, a `PeftModel`, or any `torch.nn.Module`; weights may be on the
            meta device.
        rank: Rank of A: (rank, in) and B: (out, rank); capped at min(in, out) for each target.
        alpha: The update is scaled by alpha/rank; 32 when left out.
        targets: A preset (`default`, `all-linear`, `attention`, `qv`, `mlp`, `cross-attention`,
            `experts`), roles, or module names.
        dropout: Dropout probability on the input of A.
        components: For hosts of several components; a model has one, leave it out.
        train_also: Modules trained whole and saved with the adapter. Left out: the task head of a
            classification class; `()`: none.
        name: Name of the adapter.
        config: A ready peft tuner config instead of rank, alpha and dropout; its empty
            `target_modules` is filled from the family map.

    Returns:
        The plan.

    Raises:
        UnsupportedHost: `host` is no model, has no linear layers or is quantised in a way that
            nothing can be trained on.
        TargetNotFound: A target or a module of `train_also` matches nothing.
        UnsupportedTarget: A target exists but cannot be adapted, or a head is quantised.
        InvalidOption: An argument cannot work, or not on the way in which the base is quantised.
    """
    check_components(components)
    model = model_of(host)
    check_trains(model)
    found = survey(model)
    made = make_config(rank, alpha, dropout, found.defaults) if config is None else None
    ready = made or take_config(config, rank, alpha, dropout)
    whole = choose_heads(model, found, ready, train_also)
    chosen = choose_layers(model, found, ready, targets, whole)
    if made is not None:
        cap_ranks(made, chosen, found)
    fill_config(ready, model, found, chosen, whole)
    modules = dict(bare_modules(model))
    stored = stored_layers(model)
    check_fits(stored, ready, [x.path for x in chosen])
    check_whole(modules, whole)
    quantised = describe(model, stored, whole)
    return LoraPlan(
        host=found.host,
        family=found.family.name if found.family else None,
        name=name,
        targets=tuple(_target(x, ready, model) for x in chosen),
        heads=tuple(
            Head(path, sum(p.numel() for p in modules[path].parameters())) for path in whole
        ),
        frozen=tuple(_frozen(found, chosen, whole)),
        notes=(
            *_notes(found, ready, chosen, targets),
            *(_note_on_heads(model, whole) if train_also is None else ()),
            *(quantised.notes if quantised else ()),
        ),
        host_parameters=found.parameters,
        config=ready,
        quantised=quantised,
    )


def _target(layer: Layer, config: PeftConfig, model: nn.Module) -> Target:
    rank = parameters = None
    if isinstance(config, LoraConfig):
        rank = by_pattern(config.rank_pattern, layer.path, config.r) // max(1, len(layer.parts))
        parameters = _lora_parameters(layer, config, rank, model)
    is_parameter = layer.kind == "parameter"
    return Target(
        layer.path, layer.role or UNKNOWN, layer.shape, rank, parameters, is_parameter, layer.rows
    )


def _lora_parameters(layer: Layer, config: LoraConfig, rank: int, model: nn.Module) -> int:
    """Counts A, B and what the variant adds.

    A of a convolution spans its kernel, B is 1x1 and grouped (peft 0.21 `_ConvNd.update_layer`).
    """
    width, height = layer.shape
    extra = height * (bool(config.use_dora) + bool(config.lora_bias))
    if layer.parts:
        return rank * (width * len(layer.parts) + sum(part_sizes(layer)))
    if layer.kind == "parameter":
        return rank * layer.parameters // (width * height) * (width + height)  # for every expert
    if layer.kind != "conv":
        return rank * (width + height) + extra
    module: Any = dict(bare_modules(model))[layer.path]
    kernel: int = math.prod(module.kernel_size)
    groups: int = module.groups
    return rank * width * kernel + height * rank // groups + extra


def _frozen(found: Survey, chosen: Iterable[Layer], whole: Sequence[str]) -> Iterable[Frozen]:
    """Groups every layer that is no target, with its reason."""
    taken = {x.path for x in chosen} | set(whole)
    inside = tuple(f"{path}." for path in whole)
    groups: dict[tuple[str, str], list[Layer]] = {}
    for layer in (*found.layers, *found.experts):
        if layer.path not in taken and not layer.path.startswith(inside):
            groups.setdefault((_what(layer), _reason(found, layer)), []).append(layer)
    for (what, reason), layers in groups.items():
        yield Frozen(what, len(layers), sum(x.parameters for x in layers), reason)


def _what(layer: Layer) -> str:
    names = [s for s in layer.path.split(".") if not s.isdigit()]
    return layer.role or ".".join(names[-2:]) or layer.path


def _reason(found: Survey, layer: Layer) -> str:
    if layer in found.experts:
        return 'fused experts, opt-in: targets=["default", "experts"]'
    return excuse(found, layer) or (
        "not among the targets asked for" if layer.role else "unknown role; name it to target it"
    )


def _note_on_heads(model: nn.Module, whole: Sequence[str]) -> Iterable[str]:
    left = unnamed_heads(model, whole)
    if left:
        yield (
            f"{len(left)} layers of the task head stay as they are in the base, because peft "
            f"cannot name them alone: {listing(left, limit=3)}"
        )


def _notes(
    found: Survey, config: PeftConfig, chosen: Sequence[Layer], targets: TargetSpec
) -> Iterable[str]:
    if found.nameless and targets == "default":
        yield (
            "no layer name is known to the lexicon: all linears of the repeated blocks are "
            "targets; name some with targets=[...] to choose"
        )
    capped = [x for x in chosen if isinstance(config, LoraConfig) and min(x.shape) < config.r]
    if capped and getattr(config, "rank_pattern", None):
        yield f"rank is capped at min(in, out) for {len(capped)} targets"
    taken = {x.path for x in chosen}
    experts = sum(x.parameters for x in found.experts if x.path not in taken)
    if experts:
        share = 100 * experts / found.parameters
        yield f"{share:.0f} % of the parameters lie in fused experts, which stay frozen"
