"""The weights that one layer merges into, and the way back.

`fold` only computes. `put` and the `Undo` it returns write, by giving each parameter new data, so
that no tensor that others hold is changed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from hf_lora.errors import MergeError
from hf_lora.layers.dora import is_dora
from hf_lora.layers.kinds import in_order, kind_of_layer, parameter_keys
from hf_lora.layers.rounding import add_figures, figures_of
from hf_lora.layers.strength import strength_of
from hf_lora.layers.twin import adapted, wide_dtype
from hf_lora.record import Record
from hf_lora.walks import bare_modules, nested, tuner_modules

# Layers whose forward adds `bias` whenever there is one, so that one can be given to them.
_TAKES_BIAS = tuple(kind.forward for kind in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d))


@dataclass(frozen=True)
class Folded:
    """Merged values of one layer.

    Attributes:
        values: Parameter name -> value, rounded once to the parameter's dtype; only those that the
            adapters change.
        applied: The adapters in the order in which they were applied.
        caches: What peft keeps for its own unmerge.
        figures: What rounding did, see `figures_of`.
    """

    values: dict[str, Tensor]
    applied: list[str]
    caches: dict[str, Any]
    figures: dict[str, float]


def fold(path: str, layer: Any, names: Sequence[str]) -> Folded:
    """Computes the weights that do what the layer does with the named adapters active.

    Sums are W + sum of w_i (f_i(W) - W), chains W -> W + w_i (f_i(W) - W) in turn, where f_i is
    peft's merge and w_i the strength. Everything is float32 or float64 until it is rounded once.

    Raises:
        MergeError: peft cannot merge the layer, or a merged value is not finite.
    """
    applied = in_order(layer, names)
    values, caches = _summed(path, layer, applied)
    rounded: dict[str, Tensor] = {}
    total: dict[str, float] = {}
    for key, wide in values.items():
        parameter = layer.get_base_layer()._parameters.get(key)
        old = torch.zeros_like(wide, dtype=_dtype_of(layer)) if parameter is None else parameter
        value = wide.to(old.dtype)
        figures = figures_of(old.detach(), wide, value)
        if parameter is not None and not figures:
            continue  # nothing to put in: the adapters change no weight
        if not math.isfinite(figures.get("max_error", 0.0)):
            finite = _finite(f"{path}.{key}", old, value)
            figures = figures_of(old.detach()[finite], wide[finite], value[finite])
        rounded[key] = value
        add_figures(total, figures)
    return Folded(rounded, applied, caches, total)


def _summed(
    path: str, layer: Any, names: Sequence[str]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns the merged values before rounding, and what peft keeps."""
    kind = kind_of_layer(layer)
    if not kind.known and len(names) > 1:
        raise MergeError(
            f"{path} has {len(names)} adapters of the method {type(layer).__module__}, of which "
            "only one can be merged",
            fix="Name one: merge_lora(host, name).",
        )
    start, factors = _wide_values(path, layer, names)
    values = start
    caches: dict[str, Any] = {}
    for name in names:
        source = start if kind.combine == "sum" else values
        w = strength_of(layer, name)
        consume = w == 1 and (kind.combine == "chain" or len(names) == 1) and kind.known
        try:
            new, cached = adapted(layer, name, source, dtype=factors, consume=consume)
        except Exception as error:  # peft raises many kinds; each means that it cannot
            raise MergeError(f"peft cannot merge {path}: {error}") from error
        if not kind.known and all(torch.equal(source[key], new[key]) for key in source):
            # such as LNTuning, which swaps modules
            raise MergeError(
                f"peft merges {type(layer).__name__} at {path} otherwise than into its weights",
                fix="Keep the adapter unmerged.",
            )
        caches |= cached
        values = _blended(source, new, values, w)
    return values, caches


def _blended(
    source: Mapping[str, Tensor], new: Mapping[str, Tensor], so_far: Mapping[str, Tensor], w: float
) -> dict[str, Tensor]:
    """Returns so_far + w (new - source); exactly `new` where w is 1 and nothing came before."""
    moved = {key: new[key].to(source[key]) for key in source}
    if w != 1:
        moved = {key: torch.lerp(source[key], moved[key], w) for key in source}
    if so_far is source:
        return moved
    return {key: so_far[key] + (moved[key] - source[key]) for key in source}


def _wide_values(
    path: str, layer: Any, names: Sequence[str]
) -> tuple[dict[str, Tensor], torch.dtype | None]:
    """Returns the base values in the dtype of the sums, and what the factors become."""
    base = layer.get_base_layer()
    keys = parameter_keys(layer)
    old = {key: base._parameters[key].detach() for key in keys}
    first = next(iter(old.values()))
    whole = kind_of_layer(layer).known
    wide = wide_dtype(first.dtype, first.device)
    if not whole:
        wide = torch.promote_types(first.dtype, torch.float32)
    values = {key: value.to(wide, copy=True) for key, value in old.items()}
    if "bias" not in values and _brings_bias(layer, names):
        if "bias" not in base._parameters or type(base).forward not in _TAKES_BIAS:
            raise MergeError(
                f"an adapter has a bias at {path}, and {type(base).__name__} has no place for one",
                fix="Keep the adapter unmerged.",
            )
        values["bias"] = torch.zeros(layer.out_features, dtype=wide, device=first.device)
    return values, wide if whole else None


def _finite(name: str, old: Tensor, value: Tensor) -> Tensor:
    """Returns where the base is finite; raises MergeError where the merged value is not."""
    finite = torch.isfinite(old)
    if not torch.isfinite(value[finite]).all():
        raise MergeError(
            f"the merged {name} is not finite in {str(value.dtype).removeprefix('torch.')}",
            fix="Keep the adapter unmerged, or load the base in float32.",
        )
    return finite


def _brings_bias(layer: Any, names: Sequence[str]) -> bool:
    return isinstance(layer, LoraLayer) and any(layer.lora_bias.get(name) for name in names)


def _dtype_of(layer: Any) -> torch.dtype:
    dtype: torch.dtype = layer.get_base_layer().weight.dtype
    return dtype


@dataclass(frozen=True)
class _Kept:
    """One parameter as it was: the object, and its data where the object has new data now."""

    parameter: nn.Parameter | None
    data: Tensor | None


@dataclass
class Undo:
    """Takes a merge out of one layer to the last bit; stands on the layer as its `unmerge`.

    So peft's own ways to unmerge (`disable_adapters`, `unfuse_lora`) are exact as well.

    Attributes:
        layer: The tuner layer.
        kept: Parameter name -> how it was.
        refuses: Nothing was kept, and peft's own unmerge would be wrong: raise.
    """

    layer: Any
    kept: dict[str, _Kept] = field(default_factory=dict)
    refuses: bool = False

    def __call__(self) -> None:
        """Restores the base weights; the kept copies stay for the next time."""
        if self.refuses:
            raise MergeError(
                "no copy of the base weights was kept, and they cannot be had back from these "
                "adapters",
                fix="Reload the base model, or merge with keep='cpu' next time.",
            )
        self._restore(last=False)

    def finish(self) -> None:
        """Restores the base weights, parameter objects included, and leaves the layer's side."""
        self._restore(last=True)
        self.leave()

    def leave(self) -> None:
        """Takes this off the layer and forgets the copies; the weights stay as they are."""
        self.layer.__dict__.pop("unmerge", None)
        self.kept = {}

    def _restore(self, *, last: bool) -> None:
        own = self.layer.get_base_layer()._parameters
        for key, kept in self.kept.items():
            if kept.parameter is not None and kept.data is not None:
                # a copy before the last time, for peft merges by writing into the data
                kept.parameter.data = kept.data.to(kept.parameter.data, copy=not last)
            own[key] = kept.parameter
        self.layer.merged_adapters.clear()
        getattr(self.layer, "_caches", {}).clear()

    @property
    def replaced(self) -> dict[str, nn.Parameter | None]:
        """Parameter name -> what stood in the place of a new parameter; None for nothing."""
        return {key: kept.parameter for key, kept in self.kept.items() if kept.data is None}

    @property
    def size(self) -> int:
        """Bytes of the copies."""
        held = [kept.data for kept in self.kept.values() if kept.data is not None]
        return sum(t.numel() * t.element_size() for t in held)


def put(layer: Any, folded: Folded, shared: Sequence[str], done: list[Undo] | None = None) -> Undo:
    """Gives a layer its merged values, with peft's bookkeeping, and returns the way back.

    Args:
        layer: The tuner layer.
        folded: Its merged values.
        shared: Names of the parameters that are tied to one elsewhere; the layer gets parameters
            of its own in their place, and the others keep theirs.
        done: Takes the way back before anything is written, for a failure halfway.
    """
    own = layer.get_base_layer()._parameters
    undo = Undo(layer)
    if done is not None:
        done.append(undo)
    for key, value in folded.values.items():
        old = own[key]
        if old is None or key in shared:
            undo.kept[key] = _Kept(old, None)
            grad = old is not None and old.requires_grad
            own[key] = nn.Parameter(value, requires_grad=grad)
        else:
            # on the CPU the old tensor itself is the copy: the new data is another tensor
            undo.kept[key] = _Kept(old, old.data.to("cpu"))
            old.data = value
    layer.merged_adapters.extend(folded.applied)
    if hasattr(layer, "_caches"):
        layer._caches.update(folded.caches)
    layer.__dict__["unmerge"] = undo
    return undo


def originals(undos: Sequence[tuple[str, Undo]]) -> dict[str, Tensor]:
    """Returns full parameter name -> the data before the merge, of layers with their paths."""
    kept = [(f"{path}.{key}", k) for path, undo in undos for key, k in undo.kept.items()]
    moved = {id(k.parameter): k.data for _, k in kept if k.data is not None}
    return {
        name: moved.get(id(k.parameter), k.parameter.data)
        for name, k in kept
        if k.parameter is not None
    }


def layers_of(model: nn.Module) -> Iterator[tuple[str, BaseTunerLayer]]:
    """Yields (bare path, layer) of every tuner layer, nested ones too."""
    for path, outer in tuner_modules(model):
        for module in nested(outer):
            if isinstance(module, BaseTunerLayer):
                yield path, module


def is_merged(model: nn.Module) -> bool:
    """Tells whether any layer has an adapter merged into its weight, whoever merged it."""
    return any(layer.merged for _, layer in layers_of(model))


def undos_of(model: nn.Module) -> list[tuple[str, Undo]]:
    """Returns (path, way back) of every layer that has one."""
    found = [(path, vars(layer).get("unmerge")) for path, layer in layers_of(model)]
    return [(path, undo) for path, undo in found if isinstance(undo, Undo)]


Places = dict[str, tuple[nn.Module, str]]


def places_of(model: nn.Module, record: Record) -> Places:
    """Returns full parameter name -> (module, key) of what was merged and has no `Undo` any more.

    So it is where peft or diffusers took the tuner layers off. See `put_back`.

    Raises:
        MergeError: The model has no such weight any more, or one of another shape.
    """
    merged = record.merged or {}
    undone = {f"{path}.{key}" for path, undo in undos_of(model) for key in undo.kept}
    names = [name for name in {**merged, **record.merge_replaced} if name not in undone]
    modules = dict(bare_modules(model)) if names else {}
    places = {}
    for name in names:
        path, _, key = name.rpartition(".")
        now = modules[path]._parameters.get(key) if path in modules else None
        if now is None or (name in merged and now.shape != merged[name].shape):
            raise MergeError(
                f"{type(model).__name__} has no {name} any more of the shape that was merged into",
                fix="Reload the base model.",
            )
        places[name] = (modules[path], key)
    return places


def put_back(places: Places, record: Record) -> None:
    """Restores these weights from the record of a merge, to the bit and with the same ties."""
    for name, (module, key) in places.items():
        now = module._parameters[key]
        if name in record.merge_replaced:
            module._parameters[key] = record.merge_replaced[name]
        elif now is not None and record.merged is not None:
            now.data = record.merged[name].to(now.data)


def drop_copies(undo: Undo, names: Sequence[str]) -> None:
    """Forgets what a layer kept, and leaves peft's own unmerge only where it is about right."""
    layer = undo.layer
    wrong = any(strength_of(layer, name) != 1 for name in names) or (
        len(names) > 1 and any(is_dora(v) for v in getattr(layer, "lora_variant", {}).values())
    )
    undo.leave()
    if wrong:
        undo.refuses = True
        layer.__dict__["unmerge"] = undo
