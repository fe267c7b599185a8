"""What the user asks for -> layers of a survey, or an error that says what there is.

A request is a preset, a role, a module name, several of these, or such a request for each tower.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from hf_lora.errors import (
    InvalidOption,
    LoraError,
    TargetNotFound,
    UnsupportedTarget,
    closest,
    listing,
)
from hf_lora.roles import NEVER, PRESETS, ROLES
from hf_lora.targets import ALL_LINEAR, OPT_IN_EXPERTS, Layer, Survey, excuse, has_role

# A mapping is by tower; on a pipeline by component, each of which may have one by tower.
TargetSpec = str | Sequence[str] | Mapping[str, "TargetSpec"]

# A request for one part finds it inside of these as well.
_FUSED = {
    f"{word}.{part}": [f"{word}.{whole}" for whole in ("qkv", "kv", "qk") if part in whole]
    for word in ("attn", "cross_attn")
    for part in "qkv"
} | {f"mlp.{part}": ["mlp.gate_up"] for part in ("gate", "up")}
_PARTS = {"qv": [f"{word}.{part}" for word in ("attn", "cross_attn") for part in "qv"]}


def select(found: Survey, targets: TargetSpec) -> list[Layer]:
    """Returns the layers that `targets` means, in the model's order.

    Args:
        found: What the model has.
        targets: A preset, a role, a module name (full path or trailing segments), several of these,
            or a mapping from towers to such requests.

    Raises:
        InvalidOption: `targets` is none of that, or empty.
        TargetNotFound: An entry or tower matches nothing.
        UnsupportedTarget: An entry names a layer that cannot be adapted.
    """
    chosen: dict[str, Layer] = {}
    if isinstance(targets, Mapping):
        for tower, request in targets.items():
            if isinstance(request, Mapping):
                raise InvalidOption(f"targets[{tower!r}] is a mapping again", field="targets")
            chosen |= {x.path: x for x in select(_tower(found, tower), request)}
    else:
        for entry in _entries(targets):
            for layer in _meant(found, entry):
                before = chosen.get(layer.path)
                chosen[layer.path] = layer if before is None else _together(before, layer)
    if not chosen:
        raise InvalidOption("targets={} asks for nothing", field="targets")
    return [chosen[x.path] for x in (*found.layers, *found.experts) if x.path in chosen]


def _entries(targets: object) -> list[str]:
    many = isinstance(targets, Collection) and not isinstance(targets, str)
    entries: list[Any] = list(targets) if many else [targets]  # type: ignore[call-overload]
    if not entries or not all(isinstance(e, str) and e for e in entries):
        raise InvalidOption(
            f"targets={targets!r} is no name and no list of names",
            fix=f"Presets: {listing([*PRESETS, ALL_LINEAR], limit=9)}; or roles, or module names.",
            field="targets",
        )
    return entries


def _tower(found: Survey, tower: str) -> Survey:
    """Returns the survey of one tower, which is then the trunk."""
    layers = tuple(x for x in found.layers if x.tower == tower)
    if not layers:
        towers = dict.fromkeys(x.tower for x in found.layers if x.linear)
        raise TargetNotFound(
            f"{found.host} has no tower {tower!r}. Towers: {' '.join(towers)}", field="targets"
        )
    experts = tuple(x for x in found.experts if x.tower == tower)
    return replace(found, layers=layers, experts=experts, main=(tower,))


def _together(one: Layer, other: Layer) -> Layer:
    """Returns a layer that was asked for twice: whole, or the parts of both requests."""
    if not one.parts or not other.parts:
        return replace(one, parts=())
    return replace(one, parts=tuple(p for p in one.order if p in {*one.parts, *other.parts}))


def _meant(found: Survey, entry: str) -> list[Layer]:
    everything = (*found.layers, *found.experts)
    if entry == "default" and found.nameless:
        layers = [x for x in found.layers if x.linear and x.in_block and not x.barred]
    elif entry in PRESETS or entry == ALL_LINEAR:
        layers = [x for x in everything if _by_preset(found, x, entry)]
    elif entry in _inside(found) or any(r.startswith(f"{entry}.") for r in ROLES):
        wanted = (entry, *_FUSED.get(entry, ()))
        layers = [x for x in everything if has_role(x, wanted) and x.in_block and not x.barred]
        if not layers and any(x.path.endswith(f".{entry}") for x in everything):
            return _by_name(found, entry)  # a name here that is a role elsewhere
    else:
        return _by_name(found, entry)
    if not layers:
        raise _nothing(found, entry)
    asked = _PARTS.get(entry, [entry])
    return [_part(found, x, asked) for x in layers]


def _inside(found: Survey) -> set[str]:
    """Returns the roles that blocks have; outside of them a word such as `lm_head` is a name."""
    own = {*found.roles, *(x.role for x in found.experts if x.role)}
    return own | {part for part, fused in _FUSED.items() if own & set(fused)}


def _part(found: Survey, layer: Layer, asked: Sequence[str]) -> Layer:
    """Returns the layer, or its parts where less than all of a fused projection was asked for."""
    parts = tuple(role.rpartition(".")[2] for role in asked if layer.role in _FUSED.get(role, ()))
    if not parts:
        return layer
    if layer.split is None:
        raise UnsupportedTarget(
            f"{layer.path} holds more than {' and '.join(parts)} in one matrix, and how is not "
            f"known for {found.host}",
            fix='Use targets="attention", or say how: register_family(Family(..., split=...)).',
            field="targets",
        )
    return replace(layer, parts=tuple(p for p in layer.order if p in parts))


def _by_preset(found: Survey, layer: Layer, preset: str) -> bool:
    if preset == "experts":
        return has_role(layer, PRESETS[preset]) and excuse(found, layer) in ("", OPT_IN_EXPERTS)
    if layer.kind == "parameter":
        return False
    if preset == ALL_LINEAR:
        routine = layer.linear and layer.in_block and layer.tower in found.main
        return routine and not layer.barred and layer.role not in NEVER
    preset = found.defaults.preset if preset == "default" else preset
    if not has_role(layer, PRESETS[preset]):
        return False
    return not excuse(found, layer)


def _by_name(found: Survey, name: str) -> list[Layer]:
    everything = (*found.layers, *found.experts)
    layers = [x for x in everything if x.path == name or x.path.endswith(f".{name}")]
    barred = next((x for x in layers if x.barred), None)
    if barred:
        raise UnsupportedTarget(
            f"{barred.path} cannot be adapted: {barred.barred}", field="targets"
        )
    if not layers:
        raise _nothing(found, name)
    return layers


def _nothing(found: Survey, entry: str) -> LoraError:
    """Builds the error for an entry that means no layer, with what is close and what there is."""
    near = [
        f"{leaf} ({sum(_tail(x.path) == leaf for x in found.layers)} modules)"
        for leaf in closest(entry, dict.fromkeys(_tail(x.path) for x in found.layers))
    ]
    holder = next((p for p in found.paths if p == entry or p.endswith(f".{entry}")), None)
    what = f"{holder} is no layer but holds some" if holder else f"no layer matches {entry!r}"
    if entry in PRESETS or entry == ALL_LINEAR:
        reasons = Counter(excuse(found, x) for x in found.layers if x.linear)
        left = ", ".join(f"{n} x {why}" for why, n in reasons.most_common(3) if why)
        what = f"the preset {entry!r} has no target" + (f" ({left})" if left else "")
    return TargetNotFound(
        f"{what} in {found.host}. Closest: {', '.join(near)}. "
        f"Roles present: {' '.join(found.roles) or 'none known'}",
        fix="Name layers: targets=[...]."
        if entry == "default"
        else 'Use targets="default" or print(plan_lora(model)).',
        field="targets",
    )


def _tail(path: str) -> str:
    """Returns the last two segments, without layer numbers."""
    return ".".join([s for s in path.split(".") if not s.isdigit()][-2:]) or path
