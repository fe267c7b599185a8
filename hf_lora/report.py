"""LoadReport: what a load did, for people and programs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from hf_lora.adapter import MODEL


@dataclass(frozen=True)
class LoadReport:
    """What a load did; `print(report)` shows it.

    Attributes:
        name: The adapter's name on the host.
        source: Where it came from.
        host: Class name of the model or pipeline.
        components: Component -> role -> number of targets; a model is the component `"model"`.
        parameters: Values loaded, heads included.
        heads: Modules that were loaded whole, by component and path.
        skipped: Targets and components of the file that the host lacks; only with `strict=False`.
        dtype: Dtype of the factors on the host.
        scale: The run-time multiplier that was set.
        trainable: Whether the adapter can be trained on.
        digest: The adapter's identity, `v1:sha256:...`.
        verified: Whether the base is the one the adapter was made on, by its fingerprint.
        base: The same in words, or why it could not be told.
        repairs: What was wrong with the file and could be put right.
        notes: What a reader should know besides.
    """

    name: str
    source: str
    host: str
    components: Mapping[str, Mapping[str, int]]
    parameters: int
    heads: tuple[str, ...]
    skipped: tuple[str, ...]
    dtype: str
    scale: float
    trainable: bool
    digest: str
    verified: bool
    base: str
    repairs: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def roles(self) -> Mapping[str, int]:
        """Role -> number of targets, over all components."""
        total: Counter[str] = Counter()
        for roles in self.components.values():
            total.update(roles)
        return dict(total)

    @property
    def targets(self) -> int:
        """Number of layers that got the adapter."""
        return sum(self.roles.values())

    def __str__(self) -> str:
        lines = [
            f"Loaded {self.name!r} from {self.source or 'memory'} into {self.host}: "
            f"{self.targets} targets, {self.parameters:,} parameters, {self.dtype}, "
            f"scale {self.scale:g}, {'trainable' if self.trainable else 'frozen'}"
        ]
        for component, roles in self.components.items():
            listed = ", ".join(f"{role} {count}" for role, count in roles.items())
            lines.append(f"  {'by role' if component == MODEL else component}: {listed}")
        lines.append(f"  base: {self.base}")
        rows = (
            ("trained whole", self.heads),
            ("skipped", self.skipped),
            ("repaired", self.repairs),
            ("note", self.notes),
        )
        lines += [f"  {what}: {entry}" for what, entries in rows for entry in entries]
        return "\n".join(lines)
