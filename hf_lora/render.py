"""Plans and reports as text: what `print` shows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hf_lora.plan import LoraPlan
    from hf_lora.prepared import QuantisedBase


def plan_table(plan: LoraPlan) -> str:
    """Returns a plan as a table: one line a role, totals, then what stays frozen and why."""
    return "\n".join(_lines(plan))


def short(number: int) -> str:
    """Returns a count with three significant digits: 960, 39.3 k, 1.57 M, 6.74 B."""
    for limit, unit in ((10**9, "B"), (10**6, "M"), (10**4, "k")):
        if number >= limit:
            return f"{number / (1000 if unit == 'k' else limit):.3g} {unit}"
    return f"{number:,}"


def _lines(plan: LoraPlan) -> Iterable[str]:
    family = f" ({plan.family})" if plan.family else ""
    method = plan.config.peft_type.value.replace("LORA", "LoRA")  # type: ignore[union-attr]
    sizes = f", rank {plan.rank}, alpha {plan.alpha}" if plan.rank else ""
    yield f"{method} plan for {plan.host}{family}: adapter {plan.name!r}{sizes}"
    names = (*plan.by_role(), *(left.what for left in plan.frozen))
    wide = max(18, *(len(name) + 1 for name in names))
    for role, group in plan.by_role().items():
        shapes = list(dict.fromkeys(f"{i}->{o}" for i, o in (t.shape for t in group)))
        shape = shapes[0] if len(shapes) == 1 else f"{shapes[0]} and {len(shapes) - 1} more"
        cost = short(sum(t.parameters or 0 for t in group)) if plan.rank else "?"
        yield f"  {role:<{wide}}{len(group):>4} targets  {f'({shape})':<24}{cost:>8} parameters"
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
    if plan.quantised:
        yield from _quantised(plan.quantised)
    if plan.frozen:
        yield "Stays frozen:"
    for left in plan.frozen:
        size = short(left.parameters)
        yield f"  {left.what:<{wide}}{left.count:>4} layers   {size:>8} parameters  {left.reason}"
    for note in plan.notes:
        yield f"Note: {note}"


def _quantised(base: QuantisedBase) -> Iterable[str]:
    yield (
        f"Quantised: {'; '.join(base.kinds)}; {base.layers} layers, {short(base.parameters)} "
        f"parameters in {base.bytes / 1e6:.1f} MB"
    )
    for row in base.settings:
        yield f"  {row.what:<24}{row.value}: {row.why}"
