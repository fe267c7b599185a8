"""What a plan says: layers, heads, what stays frozen and why, and what it costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from peft import LoraConfig, PeftConfig

from hf_lora.adapter import MODEL
from hf_lora.prepared import QuantisedBase
from hf_lora.render import plan_table


@dataclass(frozen=True)
class Target:
    """A layer that gets a LoRA.

    Attributes:
        path: Dotted path in the bare model, which is the component for a pipeline.
        role: What it does; `unknown` when it was named or inferred without one.
        shape: (in, out) features.
        rank: Rank of the factors; None for methods other than LoRA.
        parameters: Values the adapter adds here; None for methods other than LoRA.
        is_parameter: Whether it is a parameter of a module (fused experts) and not a layer.
        rows: Part -> its output features, for a LoRA on parts of a fused projection, each of which
            has the rank; empty for a whole layer.
        component: The component of the host; a model has the one `"model"`.
    """

    path: str
    role: str
    shape: tuple[int, int]
    rank: int | None
    parameters: int | None
    is_parameter: bool = False
    rows: Mapping[str, Sequence[int]] = field(default_factory=dict, repr=False)
    component: str = MODEL

    @property
    def module(self) -> str:
        """Path of the module that peft wraps: the layer, or the owner of a parameter."""
        return self.path.rpartition(".")[0] if self.is_parameter else self.path

    @property
    def place(self) -> str:
        """The path in the host: that of a pipeline begins with the component."""
        return self.path if self.component == MODEL else f"{self.component}.{self.path}"


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
        component: The component of the host; a model has the one `"model"`.
    """

    what: str
    count: int
    parameters: int
    reason: str
    component: str = MODEL

    def to_dict(self) -> dict[str, Any]:
        """Returns the group as plain data; the component only where there are several."""
        data = vars(self).copy()
        if self.component == MODEL:
            del data["component"]
        return data


@dataclass(frozen=True)
class LoraPlan:
    """The dry run of `attach_lora`; `print(plan)` shows it as a table.

    The plan of a pipeline is that of its components together: `components` holds the plan of each,
    exactly as `plan_lora` makes it of that model, and everything else here sums them up.

    Attributes:
        host: Class name of the model or pipeline.
        family: Name of the family row that applied, or None.
        name: Name of the adapter.
        targets: Layers that get a LoRA.
        heads: Modules trained whole.
        frozen: What stays frozen, with the reason.
        notes: What a reader should know besides.
        host_parameters: Values of the bare model, tied ones once; of a pipeline, of the components
            that get a LoRA.
        config: The peft config that will be attached; of a pipeline, that of the first component.
        quantised: What is quantised of the base and how training on it is set; None for nothing,
            and for a pipeline, whose components say it.
        components: Component -> its own plan; empty for a model.
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
    components: Mapping[str, LoraPlan] = field(default_factory=dict, repr=False)

    @property
    def rank(self) -> int | None:
        """Rank before caps; None for methods other than LoRA, or where components differ."""
        rank: int | None = self._of_all("r")
        return rank

    @property
    def alpha(self) -> float | None:
        """Alpha; None for methods other than LoRA, or where components differ."""
        alpha: float | None = self._of_all("lora_alpha")
        return alpha

    def _of_all(self, field: str) -> Any:
        """Returns a number of the LoRA config that all components agree in, else None."""
        configs = [plan.config for plan in self.components.values()] or [self.config]
        values = {getattr(c, field) if isinstance(c, LoraConfig) else None for c in configs}
        return values.pop() if len(values) == 1 else None

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
        parts = {name: plan.to_dict() for name, plan in self.components.items()}
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
                    "targets": [t.place for t in group],
                    "parameters": sum(t.parameters or 0 for t in group),
                }
                for role, group in self.by_role().items()
            },
            "heads": {h.path: h.parameters for h in self.heads},
            "frozen": [f.to_dict() for f in self.frozen],
            "quantised": None if self.quantised is None else asdict(self.quantised),
            "notes": list(self.notes),
            **({"components": parts} if parts else {}),
        }

    def __str__(self) -> str:
        return plan_table(self)
