"""Plans and reports as text: what `print` shows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_lora.planned import LoraPlan
    from hf_lora.prepared import QuantisedBase


def plan_table(plan: LoraPlan) -> str:
    """Returns a plan as a table: one line a role, totals, then what stays frozen and why.

    That of a pipeline has the roles and what stays frozen below each component.
    """
    return "\n".join(_lines(plan))


def short(number: int) -> str:
    """Returns a count with three significant digits: 960, 39.3 k, 1.57 M, 6.74 B."""
    for limit, unit in ((10**9, "B"), (10**6, "M"), (10**4, "k")):
        if number >= limit:
            return f"{number / (1000 if unit == 'k' else limit):.3g} {unit}"
    return f"{number:,}"


def _lines(plan: LoraPlan) -> Iterable[str]:
    family = f" ({plan.family})" if plan.family else ""
    configs = [part.config for part in plan.components.values()] or [plan.config]
    methods: list[Any] = list(dict.fromkeys(config.peft_type for config in configs))
    method = " and ".join(m.value.replace("LORA", "LoRA") for m in methods)
    sizes = f", rank {plan.rank}, alpha {plan.alpha}" if plan.rank else ""
    yield f"{method} plan for {plan.host}{family}: adapter {plan.name!r}{sizes}"
    names = (*plan.by_role(), *(left.what for left in plan.frozen))
    wide = max(18, *(len(name) + 1 for name in names))
    for component, part in (plan.components or {"": plan}).items():
        if component:
            yield _heading(component, part, alone=not plan.rank)
        yield from _roles(part, wide)
    share = 100 * plan.trainable_parameters / max(plan.host_parameters, 1)
    yield (
        f"  {'total':<{wide}}{len(plan.targets):>4} targets  {'':<24}"
        f"{short(plan.adapter_parameters):>8} parameters, "
        f"{plan.adapter_bytes / 1e6:.1f} MB in float32"
    )
    for head in plan.heads:
        yield f"Trained whole: {head.path} ({short(head.parameters)} parameters)"
    memory = {name: f"{size / 1e6:.1f} MB" for name, size in plan.training_bytes.items()}
    yield (
        f"Trainable: {share:.2f} % of {short(plan.host_parameters)} parameters; training adds "
        f"{memory['gradients']} of gradients and {memory['adamw']} for AdamW"
    )
    for component, part in (plan.components or {"": plan}).items():
        if part.quantised:
            yield from _quantised(part.quantised, component)
    if plan.frozen:
        yield "Stays frozen:"
    above = ""
    for left in plan.frozen:
        if plan.components and left.component != above:
            above = left.component
            yield f" {above}"
        size = short(left.parameters)
        yield f"  {left.what:<{wide}}{left.count:>4} layers   {size:>8} parameters  {left.reason}"
    for note in plan.notes:
        yield f"Note: {note}"


def _heading(component: str, part: LoraPlan, *, alone: bool) -> str:
    """Returns the line above a component's roles; with its sizes where components differ."""
    family = f", {part.family}" if part.family else ""
    sizes = f": rank {part.rank}, alpha {part.alpha}" if alone and part.rank else ""
    return f" {component} ({part.host}{family}){sizes}"


def _roles(plan: LoraPlan, wide: int) -> Iterable[str]:
    for role, group in plan.by_role().items():
        shapes = list(dict.fromkeys(f"{i}->{o}" for i, o in (t.shape for t in group)))
        shape = shapes[0] if len(shapes) == 1 else f"{shapes[0]} and {len(shapes) - 1} more"
        cost = short(sum(t.parameters or 0 for t in group)) if plan.rank else "?"
        yield f"  {role:<{wide}}{len(group):>4} targets  {f'({shape})':<24}{cost:>8} parameters"


def _quantised(base: QuantisedBase, component: str) -> Iterable[str]:
    where = f" {component}" if component else ""
    yield (
        f"Quantised{where}: {'; '.join(base.kinds)}; {base.layers} layers, "
        f"{short(base.parameters)} parameters in {base.bytes / 1e6:.1f} MB"
    )
    for row in base.settings:
        yield f"  {row.what:<24}{row.value}: {row.why}"
