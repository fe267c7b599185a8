"""Which layers a host has, what each does, and which of them a request means.

`survey` reads a model once (names, types and shapes; meta tensors are enough). `select` turns what
the user asked for, a preset, roles or names, into layers, or into an error that says what there is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

from torch import nn

from hf_lora.errors import (
    InvalidOption,
    LoraError,
    TargetNotFound,
    UnsupportedHost,
    UnsupportedTarget,
    closest,
    listing,
)
from hf_lora.families import (
    Defaults,
    Family,
    defaults_of,
    family_of,
    frozen_in,
    role_in,
    tower_in,
)
from hf_lora.hosts import bare, bare_modules, config_of, features, kind_of
from hf_lora.roles import NEVER, PRESETS, ROLES

V = TypeVar("V", int, float)

ALL_LINEAR = "all-linear"
_FUSED = ("attn.qkv", "attn.kv", "attn.qk", "cross_attn.qkv", "cross_attn.kv")
UNKNOWN = "unknown"
TargetSpec = str | Sequence[str]

_ASIDE = ("projector", "patcher")  # never the trunk

_EXPERTS = "moe.experts"
OPT_IN_EXPERTS = 'experts are opt-in: targets="experts"'

# A LoRA below these parents would be skipped without a word: they read the child's weight.
_BYPASS: dict[type[nn.Module], str] = {
    nn.MultiheadAttention: "torch's MultiheadAttention reads this weight without calling the layer",
    nn.TransformerEncoderLayer: "torch's inference fast path reads this weight without calling "
    "the layer",
}


@dataclass(frozen=True)
class Layer:
    """One layer that a LoRA could sit on, or one fused parameter.

    Attributes:
        path: Dotted path in the bare model.
        role: What it does, or None when the lexicon does not know.
        tower: `language`, `vision`, `audio` or `projector`.
        shape: (in, out) features, channels or vocabulary and width.
        kind: `linear`, `conv`, `embedding`, or `parameter` for a fused 3-D one.
        in_block: Whether it lies inside repeated blocks.
        parameters: Values of its own (weight and bias).
        barred: Why no LoRA can work here; empty when one can.
    """

    path: str
    role: str | None
    tower: str
    shape: tuple[int, int]
    kind: str
    in_block: bool
    parameters: int
    barred: str = ""

    @property
    def linear(self) -> bool:
        """Whether it is a linear map with a 2-D weight, quantised ones included."""
        return self.kind == "linear"


@dataclass(frozen=True)
class Survey:
    """What `survey` found in one model."""

    host: str
    family: Family | None
    defaults: Defaults
    layers: tuple[Layer, ...]
    experts: tuple[Layer, ...]
    paths: tuple[str, ...]
    parameters: int

    @cached_property
    def roles(self) -> tuple[str, ...]:
        """The roles of linears inside blocks, in order of first appearance."""
        return tuple(dict.fromkeys(x.role for x in self.layers if x.role and x.in_block))

    @cached_property
    def main(self) -> tuple[str, ...]:
        """The towers that are the trunk; those of others are opt-in."""
        if self.family and self.family.main:
            return self.family.main
        towers = dict.fromkeys(x.tower for x in self.layers if x.linear and x.in_block)
        return (
            ("language",) if "language" in towers else tuple(t for t in towers if t not in _ASIDE)
        )

    @cached_property
    def nameless(self) -> bool:
        """True when no linear inside the blocks has a known role."""
        open_layers = (x for x in self.layers if x.in_block and x.linear and not x.barred)
        return not any(x.role for x in open_layers)


def survey(model: nn.Module) -> Survey:
    """Reads names, types and shapes of a model once.

    Raises:
        UnsupportedHost: The model has no layer that a LoRA can sit on.
    """
    family = family_of(model)
    modules = dict(bare_modules(model))
    rewritten = _rewritten_names(model, modules)
    places = Counter(id(bare(c)) for m in modules.values() for c in m._modules.values() if c)
    layers, experts = [], []
    for path, module in modules.items():
        shape = features(module)
        own = sum(p.numel() for p in module._parameters.values() if p is not None)
        if shape is not None and path:
            role = role_in(path, family)
            barred = _bypassed(modules, path) or rewritten.get(path.rpartition(".")[2], "")
            if places[id(module)] > 1:
                barred = f"shared by {places[id(module)]} modules; peft would adapt one place only"
            layers.append(
                Layer(
                    path=path,
                    role=role,
                    tower=tower_in(path, family),
                    shape=shape,
                    kind=kind_of(module),
                    in_block=in_block(path),
                    parameters=own,
                    barred=barred,
                )
            )
        elif in_block(path):
            experts += _fused_experts(path, module, family)
    name = type(model).__name__
    if features(modules[""]) is not None:
        raise UnsupportedHost(
            f"the host is itself one layer ({name}), which cannot be replaced in place",
            fix="Give the module that holds it.",
        )
    if not layers and not experts:
        raise UnsupportedHost(
            f"{name} has no linear layer, so there is nothing a LoRA can sit on",
            fix="Give the part of it that has linear layers.",
        )
    total = sum(p.numel() for p in _distinct_parameters(modules.values()))
    return Survey(
        name, family, defaults_of(model), tuple(layers), tuple(experts), tuple(modules), total
    )


def _distinct_parameters(modules: Iterable[nn.Module]) -> Iterable[nn.Parameter]:
    distinct = {id(p): p for m in modules for p in m._parameters.values() if p is not None}
    return distinct.values()


def in_block(path: str) -> bool:
    """A repeated block is an entry of a ModuleList or Sequential, so its segment is a number."""
    return any(segment.isdigit() for segment in path.split("."))


def _bypassed(modules: dict[str, nn.Module], path: str) -> str:
    parent = modules.get(path.rpartition(".")[0])
    return next((why for kind, why in _BYPASS.items() if isinstance(parent, kind)), "")


def _fused_experts(path: str, module: nn.Module, family: Family | None) -> list[Layer]:
    """Lists the 3-D parameters (experts, out, in) of a module; peft calls them parameters."""
    found = []
    for name, parameter in module._parameters.items():
        if parameter is None or parameter.ndim != 3:
            continue
        full = f"{path}.{name}"
        role = role_in(full, family)
        if not (role or "").startswith("moe."):
            continue  # other 3-D weights: relative positions, grouped convolutions
        shape = (parameter.shape[-1], parameter.shape[-2])
        found.append(
            Layer(full, role, tower_in(full, family), shape, "parameter", True, parameter.numel())
        )
    return found


def _rewritten_names(model: nn.Module, modules: dict[str, nn.Module]) -> dict[str, str]:
    """Returns the layer names that peft rewrites to fused expert parameters on this model.

    For mixture-of-experts types that transformers 5 fused, peft 0.21 turns a target such as
    `gate_proj` into the experts' parameter, wherever it stands, so a dense or shared layer of that
    name cannot be targeted alone, nor read back by plain peft.
    """
    if getattr(config_of(model), "model_type", None) is None:
        return {}
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    found = {}
    for leaf in {p.rpartition(".")[2] for p, m in modules.items() if kind_of(m) == "linear"}:
        config = LoraConfig(target_modules=[leaf])
        try:
            convert_peft_config_for_transformers(config, model=model, conversions=None)
            kept = leaf in (config.target_modules or ())
        except ValueError:  # "Cannot convert ... without also targeting ..."
            kept = False
        if not kept:
            found[leaf] = f"peft would turn the name {leaf!r} into the fused experts"
    return found


def select(found: Survey, targets: TargetSpec) -> list[Layer]:
    """Returns the layers that `targets` means, in the model's order.

    Args:
        found: What the model has.
        targets: A preset, a role, a module name (full path or trailing segments), or several of
            roles and names.

    Raises:
        InvalidOption: `targets` is no string and no list of strings, or empty.
        TargetNotFound: An entry matches nothing.
        UnsupportedTarget: An entry names a layer that cannot be adapted.
    """
    many = isinstance(targets, Collection) and not isinstance(targets, str)
    entries: list[str] = list(targets) if many else [targets]  # type: ignore[list-item]
    if not entries or not all(isinstance(e, str) and e for e in entries):
        raise InvalidOption(
            f"targets={targets!r} is no name and no list of names",
            fix=f"Presets: {listing([*PRESETS, ALL_LINEAR], limit=9)}; or roles, or module names.",
            field="targets",
        )
    chosen: dict[str, Layer] = {}
    for entry in entries:
        for layer in _meant(found, entry):
            chosen[layer.path] = layer
    return [x for x in found.layers if x.path in chosen]


def _meant(found: Survey, entry: str) -> list[Layer]:
    if entry == "default" and found.nameless:
        layers = [x for x in found.layers if x.linear and x.in_block and not x.barred]
    elif entry in PRESETS or entry == ALL_LINEAR:
        layers = [x for x in found.layers if _by_preset(found, x, entry)]
    elif entry in found.roles or any(r.startswith(f"{entry}.") for r in ROLES):
        layers = [x for x in found.layers if _has_role(x, (entry,)) and x.in_block and not x.barred]
    else:
        return _by_name(found, entry)
    fused = next((x for x in layers if entry == "qv" and x.role in _FUSED), None)
    if fused:
        raise UnsupportedTarget(
            f"{found.host} holds more than q or v in one matrix ({fused.path}); adapting q and v "
            "alone is not built yet",
            fix='Use targets="attention".',
            field="targets",
        )
    if not layers:
        raise _nothing(found, entry)
    return layers


def _by_preset(found: Survey, layer: Layer, preset: str) -> bool:
    if preset == ALL_LINEAR:
        routine = layer.linear and layer.in_block and layer.tower in found.main
        return routine and not layer.barred and layer.role not in NEVER
    preset = found.defaults.preset if preset == "default" else preset
    if not _has_role(layer, PRESETS[preset]):
        return False
    return excuse(found, layer) in (("", OPT_IN_EXPERTS) if preset == "experts" else ("",))


def _has_role(layer: Layer, roles: Iterable[str]) -> bool:
    return any(layer.role == r or (layer.role or "").startswith(f"{r}.") for r in roles)


def excuse(found: Survey, layer: Layer) -> str:
    """Returns why a layer is no target unless it is named; empty when presets may take it."""
    role = layer.role or ""
    soft = frozen_in(layer.path, found.family)
    rows = (
        (role in NEVER, NEVER.get(role, "")),
        (bool(layer.barred), layer.barred),
        (bool(soft), soft),
        (layer.tower not in found.main, f"{layer.tower} tower is opt-in"),
        (layer.kind == "embedding", NEVER["embed"]),
        (not layer.linear, "only linear layers are targets by default"),
        (not layer.in_block, "outside the repeated blocks"),
        (_has_role(layer, (_EXPERTS,)), OPT_IN_EXPERTS),
    )
    return next((why for holds, why in rows if holds), "")


def _by_name(found: Survey, name: str) -> list[Layer]:
    layers = [x for x in found.layers if x.path == name or x.path.endswith(f".{name}")]
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
    if entry == "experts" and found.experts:
        return UnsupportedTarget(
            f"the experts of {found.host} are fused 3-D parameters "
            f"({found.experts[0].path}), which attach_lora does not reach yet",
            fix="Use config=LoraConfig(target_parameters=[...]) of peft.",
            field="targets",
        )
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


def condense(chosen: Iterable[str], universe: Iterable[str]) -> list[str]:
    """Returns the shortest trailing names that match exactly the chosen paths of a universe.

    peft matches a target by whole trailing segments over all modules, so `q_proj` stands for all
    layers when nothing else ends in it. A name never starts with a layer number.
    """
    wanted = set(chosen)
    taken = {tail for path in universe if path not in wanted for tail in _tails(path)}
    short = set()
    for path in wanted:
        tails = (t for t in _tails(path) if t not in taken and not t.split(".")[0].isdigit())
        short.add(next(tails, path))
    return sorted(short)


def condense_values(values: Mapping[str, V], default: V, universe: Collection[str]) -> dict[str, V]:
    """Returns a peft pattern (trailing name -> value) for all paths whose value is no default.

    A path that others end in (`proj_out` of Flux) is anchored: `^proj_out`.
    """
    groups: dict[V, list[str]] = {}
    for path, value in values.items():
        if value != default:
            groups.setdefault(value, []).append(path)
    pattern: dict[str, V] = {}
    for value, paths in groups.items():
        others = {t for p in set(universe) - set(paths) for t in _tails(p) if t != p}
        pattern |= {f"^{t}" if t in others else t: value for t in condense(paths, universe)}
    return pattern


def _tails(path: str) -> Iterable[str]:
    segments = path.split(".")
    return (".".join(segments[i:]) for i in range(len(segments) - 1, -1, -1))
