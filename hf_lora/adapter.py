"""The canonical record of an adapter in memory, and the checks it must pass alone.

An `Adapter` holds one `Component` for each part of a host (a model has the single component
`"model"`). A component is a peft config as plain data plus tensors by dotted module path, spelt as
in the bare host: no `base_model.model.` prefix, no adapter name. Factors keep peft's names without
`.weight` (`lora_A`, `lora_B`, `lora_magnitude_vector`, ...). Tensors on the meta device stand for a
record that was read from file headers only.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from hf_lora.digest import digest_of
from hf_lora.errors import AdapterMismatch, BadAdapterFile, listing, shown
from hf_lora.limits import DEFAULT_LIMITS, LoadLimits
from hf_lora.manifest import Manifest
from hf_lora.patterns import Patterns, plain_key
from hf_lora.roles import role_of

MODEL = "model"  # the component name of a host that is a single model

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Component:
    """One component's share of an adapter.

    Attributes:
        config: Fields of the peft tuner config, as in `adapter_config.json`.
        targets: Module path -> factor name -> tensor. For LoRA, A: (rank, in), B: (out, rank);
            convolutions carry their kernel dimensions behind these.
        modules: Module path -> parameter name -> tensor, for modules trained whole (task heads).
    """

    config: Mapping[str, Any]
    targets: Mapping[str, Tensors]
    modules: Mapping[str, Tensors] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """The peft type in capitals, `LORA` for LoRA and its variants."""
        kind = self.config.get("peft_type", "")
        return str(getattr(kind, "value", kind)).upper()  # peft's own is an enum

    def rank(self, path: str) -> int | None:
        """Returns the rank of A at a target, or None where the factors are not LoRA's."""
        factors = self.targets[path]
        a = factors.get("lora_A", factors.get("lora_embedding_A"))
        return None if a is None else a.shape[0]

    def alpha(self, path: str) -> float:
        """Returns alpha at a target: the first match of `alpha_pattern`, else the config's."""
        alpha: float = self._alphas.value(path, self.config[self._alpha])
        return alpha

    def stated_rank(self, path: str) -> int:
        """Returns the rank that the config gives a target, whatever the factors have."""
        rank: int = self._ranks.value(path, self.config["r"])
        return rank

    @property
    def _alpha(self) -> str:
        return "lora_alpha" if self.kind in ("LORA", "ADALORA") else "alpha"

    @cached_property
    def _alphas(self) -> Patterns:
        return Patterns(self.config.get("alpha_pattern") or {}, "alpha_pattern")

    @cached_property
    def _ranks(self) -> Patterns:
        return Patterns(self.config.get("rank_pattern") or {}, "rank_pattern")

    def scaling(self, path: str) -> float:
        """Returns alpha/rank at a target, alpha/sqrt(rank) with rsLoRA (arXiv 2312.03732)."""
        rank = self.rank(path)
        if rank is None:
            raise BadAdapterFile(f"{path} holds no LoRA factors, so it has no scaling")
        if self.config.get("target_parameters"):
            rank = self.stated_rank(path)  # A of fused experts is (experts*rank, in)
        divisor = math.sqrt(rank) if self.config.get("use_rslora") else rank
        return self.alpha(path) / divisor

    @property
    def info(self) -> dict[str, Any]:
        """What config and shapes tell, as plain data."""
        config = self.config
        own = self.stated_rank if config.get("target_parameters") else self.rank
        ranks = Counter(own(path) for path in self.targets if self.rank(path) is not None)
        scalings = [self.scaling(path) for path in self.targets if self.rank(path)]
        return {
            "method": self.kind,
            "task": config.get("task_type"),
            "rank": dict(sorted(ranks.items(), key=str)),
            "alpha": config.get("lora_alpha", config.get("alpha")),
            "scaling": sorted(set(scalings)) if self.kind == "LORA" else [],
            "rslora": bool(config.get("use_rslora")),
            "dora": bool(config.get("use_dora")),
            "targets": len(self.targets),
            "roles": dict(Counter(role_of(p) or "unknown" for p in self.targets)),
            "trained_whole": {
                path: sum(t.numel() for t in held.values()) for path, held in self.modules.items()
            },
            "dtype": ", ".join(sorted({str(t.dtype)[6:] for _, t in self.tensors()})),
            "peft": config.get("peft_version"),
        }

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yields every tensor with its dotted name (`path.factor` or `path.parameter`)."""
        for group in (self.targets, self.modules):
            for path, tensors in group.items():
                for name, tensor in tensors.items():
                    yield f"{path}.{name}", tensor


@dataclass(frozen=True)
class Adapter:
    """One named set of low-rank factors with its config, free of any host.

    Attributes:
        components: Component name -> its share; a single model has the one component `"model"`.
        manifest: What the file says besides: base, digest, training facts, trigger words.
        source: Where it was read from, for messages; empty when made in memory.
        repairs: What reading had to put right, one sentence each.
        left_out: Keys of the file that are not in the record, with `strict=False` only.
    """

    components: Mapping[str, Component]
    manifest: Manifest = field(default_factory=Manifest)
    source: str = ""
    repairs: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()

    @cached_property
    def digest(self) -> str:
        """The identity `v1:sha256:...`, equal for equal mathematics.

        A header-only adapter gives what its file states; empty when that states none.
        """
        if any(t.is_meta for c in self.components.values() for _, t in c.tensors()):
            return self.manifest.digest
        return digest_of(self.components)

    @property
    def info(self) -> dict[str, Any]:
        """What config, header and shapes tell, as plain data; needs no values. Sizes in bytes."""
        base = self.manifest.base
        named = (c.config.get("base_model_name_or_path") for c in self.components.values())
        prints = {name: p.short for name, p in base.fingerprints.items()}
        return {
            "source": self.source,
            "digest": self.digest,
            "base": base.id or next((name for name in named if name), None),
            "base_revision": base.revision,
            "fingerprint": prints,
            "host": self.manifest.host,
            "family": self.manifest.family,
            "trigger_words": list(self.manifest.trigger_words),
            "derived_from": list(self.manifest.derived_from),
            "foreign_metadata": sorted(self.manifest.foreign),
            "repairs": list(self.repairs),
            "components": {name: part.info for name, part in self.components.items()},
            "parameters": self.parameters,
            "bytes": self.nbytes,
        }

    @property
    def parameters(self) -> int:
        """Number of values over all components, heads included."""
        return sum(t.numel() for c in self.components.values() for _, t in c.tensors())

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors in their own dtypes, without headers."""
        return sum(
            t.numel() * t.element_size() for c in self.components.values() for _, t in c.tensors()
        )


def check_component(component: Component, limits: LoadLimits = DEFAULT_LIMITS) -> None:
    """Checks what can be known without a host: config values, factor pairs, ranks, scalings.

    Raises:
        BadAdapterFile: A config field or tensor cannot be right.
        AdapterMismatch: Config and tensors contradict each other.
    """
    for group, limit in ((component.targets, limits.value), (component.modules, math.inf)):
        for path, tensors in group.items():
            for name, tensor in tensors.items():
                if not _is_within(tensor, limit):
                    check_finite(f"{path}.{name}", tensor, limit)
    if component.kind != "LORA":
        if component.config.get(component._alpha) is not None:
            _check_numbers(component.config, component._alpha)
            _check_other_scaling(component, limits.scaling)
        return
    _check_numbers(component.config, "lora_alpha")
    for name in ("use_dora", "use_rslora"):
        if not isinstance(component.config.get(name), bool | None):
            value = shown(component.config[name])
            raise BadAdapterFile(f"{name} is {value}, not true or false", field=name)
    for path in component.targets:
        _check_factors(component, path)
        _check_scaling(component, path, limits.scaling)


def _is_within(tensor: Tensor, limit: float) -> bool:
    """Tells quickly of most tensors that `check_finite` has nothing to say."""
    if tensor.dtype != torch.float32 or tensor.is_meta or not tensor.numel():
        return False
    low, high = torch.aminmax(tensor)
    return -limit <= low.item() and high.item() <= limit < math.inf  # false of NaN


def check_finite(name: str, tensor: Tensor, limit: float = math.inf) -> None:
    """Checks the values of a tensor; those on meta have none to look at.

    Raises:
        BadAdapterFile: Some are NaN, infinite, or above the limit, which is given for factors:
            finite values of 1e30 turn every output into NaN as well.
    """
    if tensor.device.type == "meta" or not tensor.is_floating_point() or not tensor.numel():
        return
    # torch finds no extremes of the one-byte kinds
    values = tensor.float() if tensor.element_size() == 1 else tensor
    low, high = (float(x) for x in torch.aminmax(values))  # NaN if any value is
    if not (math.isfinite(low) and math.isfinite(high)):
        raise BadAdapterFile(
            f"{name} holds NaN or infinite values",
            fix="The training diverged or the file was damaged; use an earlier checkpoint.",
            field=name,
        )
    if max(-low, high) > limit:
        raise BadAdapterFile(
            f"{name} holds values up to {max(-low, high):g}, far above what training makes",
            fix=f"Expected values up to {limit:g}; pass limits=LoadLimits(value=...) if you trust "
            "it.",
            field=name,
        )


def _check_numbers(config: Mapping[str, Any], alpha: str) -> None:
    """Checks rank and alpha; `alpha` is the field that holds it."""
    rows = [("r", True, config.get("r")), (alpha, False, config.get(alpha))]
    for name, whole in (("rank_pattern", True), ("alpha_pattern", False)):
        patterns = config.get(name) or {}
        if not isinstance(patterns, Mapping):
            raise BadAdapterFile(f"{name} is {type(patterns).__name__}, not an object", field=name)
        rows += [(f"{name}[{shown(plain_key(k, name))}]", whole, v) for k, v in patterns.items()]
    for name, whole, value in rows:
        good = isinstance(value, int) and 0 < value < 1 << 53 if whole else _is_finite(value)
        if not good or isinstance(value, bool):
            wanted = "a positive whole number" if whole else "a finite number"
            raise BadAdapterFile(f"{name} is {shown(value)}, not {wanted}", field=name)


def _is_finite(value: object) -> bool:
    # the bound first: isfinite of an integer too large for a float is an OverflowError
    return isinstance(value, int | float) and abs(value) < 1e300 and math.isfinite(value)


# A switch of the config, the factor that it needs, and that factor in words.
_EXTRAS = (
    ("use_dora", "lora_magnitude_vector", "magnitude"),
    ("lora_bias", "lora_B.bias", "lora_B.bias"),
)


def _check_factors(component: Component, path: str) -> None:
    factors = component.targets[path]
    for name, tensor in factors.items():
        matrix = name.endswith(("lora_A", "lora_B", "embedding_A", "embedding_B"))
        if not tensor.is_floating_point() or (matrix and tensor.ndim < 2):
            kind = str(tensor.dtype).removeprefix("torch.")
            raise BadAdapterFile(
                f"{path}.{name} holds {kind} values of shape {tuple(tensor.shape)}, not a "
                "floating point matrix",
                field=f"{path}.{name}",
            )
    for a, b in (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B")):
        if (a in factors) != (b in factors):
            present, absent = (a, b) if a in factors else (b, a)
            raise AdapterMismatch(f"{path} has {present} but no {absent}", field=path)
        if a in factors and not _one_rank(component, factors[a], factors[b]):
            raise AdapterMismatch(
                f"at {path} A {tuple(factors[a].shape)} and B {tuple(factors[b].shape)} "
                "disagree on the rank",
                field=path,
            )
    _check_stated(component, path)


def _one_rank(component: Component, a: Tensor, b: Tensor) -> bool:
    """Tells whether A and B are of one rank; B of grouped layers has a share of it per group."""
    rank, share = a.shape[0], b.shape[1]
    grouped = a.ndim > 2 or component.config.get("use_bdlora")
    return rank == share or bool(grouped and 0 < share < rank and rank % share == 0)


def _check_stated(component: Component, path: str) -> None:
    """Compares what the config says of a LoRA target with its factors."""
    factors, rank = component.targets[path], component.rank(path)
    if rank is None:
        raise BadAdapterFile(
            f"{path} has no lora_A, but {listing(sorted(factors))}",
            fix="Keys end in .lora_A.weight and .lora_B.weight, without the adapter's name.",
            field=path,
        )
    for switch, name, what in _EXTRAS:
        if component.config.get(switch) and name not in factors:
            raise AdapterMismatch(
                f"{switch} is set but {path} has no {what}",
                fix="Config and weights are not of one save; download or save both again.",
                field=path,
            )
    stated = component.stated_rank(path)
    fused = component.config.get("target_parameters") and rank and rank % stated == 0
    if rank != stated and not fused:  # A of fused experts is (experts*rank, in)
        raise AdapterMismatch(
            f"rank {rank} in file, {stated} in config, at {path}",
            fix="Config and weights are not of one save; download or save both again.",
            field=path,
        )


def _check_scaling(component: Component, path: str, limit: float) -> None:
    scaling = component.scaling(path)
    if not 0 < abs(scaling) <= limit:
        raise BadAdapterFile(
            f"the scaling at {path} is {scaling:g}, which is nothing or far off",
            fix=f"Expected lora_alpha over rank above 0 and up to {limit:g}; pass "
            "limits=LoadLimits(scaling=...) if you trust it.",
            field="lora_alpha",
        )


def _check_other_scaling(component: Component, limit: float) -> None:
    """Checks the scaling of LoHa and LoKr, which peft computes from alpha and r."""
    for path in component.targets:
        scaling = component.alpha(path) / component.stated_rank(path)
        if not 0 < abs(scaling) <= limit:
            raise BadAdapterFile(
                f"the scaling at {path} is {scaling:g}, which is nothing or far off",
                fix=f"Expected alpha over r above 0 and up to {limit:g}; pass "
                "limits=LoadLimits(scaling=...) if you trust it.",
                field="alpha",
            )
