"""Which layers a host has, what each does, and which of them a request means.

`survey` reads a model once (names, types and shapes; meta tensors are enough). `select` turns what
the user asked for, a preset, roles or names, into layers, or into an error that says what there is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

from torch import nn

from hf_lora.errors import (
    UnsupportedHost,
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
from hf_lora.fused import GATE_UP, SPLITS, Split, rows_of, split_of
from hf_lora.hosts import config_of, features, kind_of
from hf_lora.quantised import values_in, values_of
from hf_lora.roles import NEVER
from hf_lora.walks import bare, bare_modules

V = TypeVar("V", int, float)

ALL_LINEAR = "all-linear"
UNKNOWN = "unknown"

_ASIDE = ("projector", "patcher", "condition")  # never the trunk

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
        split: How a fused projection is cut into parts, where that is known.
        parts: The parts that are asked for; empty for the whole layer.
    """

    path: str
    role: str | None
    tower: str
    shape: tuple[int, int]
    kind: str
    in_block: bool
    parameters: int
    barred: str = ""
    split: Split | None = None
    parts: tuple[str, ...] = ()

    @property
    def order(self) -> tuple[str, ...]:
        """The parts of a fused projection, in the order of its features; empty where unknown."""
        return self.split.names if self.split else ()

    @cached_property
    def rows(self) -> dict[str, list[int]]:
        """Part -> its output features, for the parts that are to be adapted."""
        if self.split is None:
            return {}
        found = rows_of(self.split, self.shape[1])
        return {part: found[part] for part in self.parts}

    @property
    def linear(self) -> bool:
        """Whether it is a linear map with a 2-D weight, quantised ones included."""
        return self.kind == "linear"


@dataclass(frozen=True)
class Survey:
    """What `survey` found in one model; `main` are the towers that are the trunk."""

    host: str
    family: Family | None
    defaults: Defaults
    main: tuple[str, ...]
    layers: tuple[Layer, ...]
    experts: tuple[Layer, ...]
    paths: tuple[str, ...]
    parameters: int

    @cached_property
    def roles(self) -> tuple[str, ...]:
        """The roles of linears inside blocks, in order of first appearance."""
        return tuple(dict.fromkeys(x.role for x in self.layers if x.role and x.in_block))

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
        if shape is not None and path:
            role, tower = role_in(path, family), tower_in(path, family)
            barred = _bypassed(modules, path) or rewritten.get(path.rpartition(".")[2], "")
            if places[id(module)] > 1:
                barred = f"shared by {places[id(module)]} modules; peft would adapt one place only"
            layers.append(
                Layer(
                    path=path,
                    role=role,
                    tower=tower,
                    shape=shape,
                    kind=kind_of(module),
                    in_block=in_block(path),
                    parameters=values_in(module),
                    barred=barred,
                    split=_split(model, family, role, tower),
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
    total = values_of(modules.values())
    main = family.main if family and family.main else _trunk(layers)
    return Survey(
        name, family, defaults_of(model), main, tuple(layers), tuple(experts), tuple(modules), total
    )


def _trunk(layers: Iterable[Layer]) -> tuple[str, ...]:
    """Returns the towers whose layers are default targets; the layers of others are opt-in."""
    towers = dict.fromkeys(x.tower for x in layers if x.linear and x.in_block)
    return ("language",) if "language" in towers else tuple(t for t in towers if t not in _ASIDE)


def _split(model: nn.Module, family: Family | None, role: str | None, tower: str) -> Split | None:
    """Returns how a fused projection of the model's language tower is cut."""
    kind = (role or "").rpartition(".")[2]
    if role is None or kind not in ("qkv", "kv", "gate_up") or tower != "language":
        return None
    config = config_of(model)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    if kind == "gate_up":
        known = getattr(text, "model_type", None) in GATE_UP
        return Split(1, (("gate", 1), ("up", 1))) if known else None
    if family is not None and family.split is not None:
        return split_of(family.split, text, role)
    configs = (c for c in (text, config) if getattr(c, "model_type", None) in SPLITS)
    return next((split_of(SPLITS[c.model_type], c, role) for c in configs), None)


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


def has_role(layer: Layer, roles: Iterable[str]) -> bool:
    """Tells whether a layer has one of the roles, or one below it (`attn` has `attn.q` below)."""
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
        (layer.kind == "conv", "only linear layers are targets by default"),
        (not layer.in_block, "outside the repeated blocks"),
        (has_role(layer, (_EXPERTS,)), OPT_IN_EXPERTS),
    )
    return next((why for holds, why in rows if holds), "")


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
