"""What a file holds, layer by layer, and which public pipelines have a place for all of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from hf_lora.adapter import MODEL, Adapter, Component
from hf_lora.architectures import ARCHITECTURES, architecture
from hf_lora.errors import LoraError
from hf_lora.exchange import has_place
from hf_lora.findings import ProbedPart
from hf_lora.formats.foreign import fits
from hf_lora.formats.grammar import Group
from hf_lora.formats.kinds import Loose, refusal
from hf_lora.formats.kinds.table import kind_of
from hf_lora.formats.lookup import Host, components_for, indices_of
from hf_lora.formats.misfits import split_refused
from hf_lora.formats.names import Names
from hf_lora.paths import canonical

# peft's name of a kind -> for people
_KINDS = {"LORA": "LoRA", "LOHA": "LoHa", "LOKR": "LoKr", "ADALORA": "AdaLoRA"}
# what peft calls the tasks of language models, whose adapters fit no pipeline
_LANGUAGE = ("CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
_RANKED = ("lora_A", "hada_w1_b", "lokr_w1_b", "lokr_w2_b")  # factors with one row a rank
_CORES = ("lora_mid", "hada_t1", "lokr_t2")  # which convolutions have


def homes_of(groups: Sequence[Group]) -> tuple[str, ...]:
    """Returns the known pipelines in which every module of a file has its place, in their order.

    By names and shapes; by names alone for kinds of layers that are not read.
    """
    refused = any(refusal(loose.factors) for g in groups for loose in g.layers.values())

    def is_home(names: Host) -> bool:
        try:
            return _all_named(groups, names) and (refused or fits(groups, names))
        except LoraError:
            return False

    return tuple(name for name in ARCHITECTURES if is_home(architecture(name)))


def _all_named(groups: Sequence[Group], names: Host) -> bool:
    indices = indices_of(names)
    for group, component in zip(groups, components_for(groups, indices), strict=True):
        if component is None:
            return False
        if group.layers.keys() - indices[component].table(group.start).keys():
            return False
    return True


def homes_of_record(adapter: Adapter) -> tuple[str, ...]:
    """Returns the known pipelines that have all layers of a record."""
    parts = adapter.components
    if any(part.config.get("task_type") in _LANGUAGE for part in parts.values()):
        return ()

    def is_home(names: Host) -> bool:
        if set(parts) == {MODEL}:
            return any(_has_place(parts[MODEL], held) for held in names.values())
        return all(n in names and _has_place(part, names[n]) for n, part in parts.items())

    return tuple(name for name in ARCHITECTURES if is_home(architecture(name)))


def _has_place(component: Component, names: Names) -> bool:
    """Tells whether all targets are layers of a host, in their shapes as far as these tell."""
    layers = {canonical(path): shape for path, shape in names.layers.items()}
    spelt = ((canonical(path.partition(".base_layer")[0]), path) for path in component.targets)
    here = {path: component.targets[old] for path, old in spelt}
    return has_place(replace(component, targets=here), layers)


def parts_of_groups(groups: Sequence[Group], names: Host) -> Iterator[ProbedPart]:
    """Yields what a file of another program holds, by component and kind."""
    indices = indices_of(names)
    found: dict[tuple[str, str, str], list[Loose]] = {}
    try:
        components = components_for(groups, indices)
    except LoraError:  # two of the file fit a host alike, which is why it does not load
        components = [None] * len(groups)
    for group, component in zip(groups, components, strict=True):
        place = component or f"{group.start.text}..."
        for module, loose in group.layers.items():
            for part in split_refused(loose):
                if part is not None:
                    found.setdefault((place, *_kind(module, part)), []).append(part)
    for (place, kind, why), layers in found.items():
        ranks = [_rank(loose) for loose in layers]
        alphas = [_alpha(loose) for loose in layers]
        yield ProbedPart.of(
            place,
            kind,
            ranks,
            alphas,
            [_scaling(r, a) for r, a in zip(ranks, alphas, strict=True)],
            dora=any({"dora_scale", "lora_magnitude_vector"} & x.factors.keys() for x in layers),
            convolutions=sum(map(_is_convolution, layers)),
            why_not=why,
        )


def _kind(module: str, loose: Loose) -> tuple[str, str]:
    """Returns the kind of a layer, and why it is not read; empty where it is."""
    name, _, why = refusal(loose.factors).partition(": ")
    if why:
        return name, why
    try:
        return kind_of(module, loose).name, ""
    except LoraError as error:
        why = error.fact.partition(" (in the file: ")[0]  # which is another key for each layer
        _, there, rest = why.partition(" there ")
        return "factors of no known kind", f"there {rest}" if there else why


def _rank(loose: Loose) -> int | None:
    held = (loose.factors[name] for name in _RANKED if name in loose.factors)
    return next((t.shape[0] for t in held if t.ndim), None)


def _alpha(loose: Loose) -> float | None:
    alpha = loose.factors.get("alpha")
    return None if alpha is None or alpha.is_meta or alpha.numel() != 1 else float(alpha)


def _scaling(rank: int | None, alpha: float | None) -> float | None:
    if not rank:
        return None
    return 1.0 if alpha is None else alpha / rank


def _is_convolution(loose: Loose) -> bool:
    a = loose.factors.get("lora_A")
    return any(name in loose.factors for name in _CORES) or (a is not None and a.ndim > 2)


def parts_of_record(adapter: Adapter) -> Iterator[ProbedPart]:
    """Yields what a record holds, by component."""
    for name, part in adapter.components.items():
        known = part.kind in _KINDS
        yield ProbedPart.of(
            name,
            _KINDS.get(part.kind, part.kind),
            [part.rank(p) or (part.stated_rank(p) if known else None) for p in part.targets],
            [part.alpha(p) if known else None for p in part.targets],
            [scaling_of(part, p) for p in part.targets],
            dora=bool(part.config.get("use_dora")),
            convolutions=sum(f["lora_A"].ndim > 2 for f in part.targets.values() if "lora_A" in f),
        )


def scaling_of(component: Component, path: str) -> float | None:
    """Returns what the update at a target is multiplied by; None for methods without such."""
    if component.kind == "LORA" and component.rank(path) is not None:
        return component.scaling(path)
    if component.kind in ("LOHA", "LOKR"):
        return component.alpha(path) / component.stated_rank(path)
    return None
