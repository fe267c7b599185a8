"""host -> LoraPlan: which layers get a LoRA, what that costs, and what stays frozen and why.

Planning changes nothing and needs shapes only, so it works on meta tensors. `attach_lora` builds
exactly what its plan says.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from peft import LoraConfig, PeftConfig
from torch import nn

from hf_lora.choose import (
    by_pattern,
    cap_ranks,
    choose_heads,
    choose_layers,
    fill_config,
    part_sizes,
    unnamed_heads,
)
from hf_lora.components import Request, chosen_parts, is_pipeline, request_for, spread
from hf_lora.configs import make_config, take_config
from hf_lora.errors import InvalidOption, LoraError, listing
from hf_lora.families import DENOISER
from hf_lora.hosts import check_components, model_of
from hf_lora.joined import barring
from hf_lora.planned import Frozen, Head, LoraPlan, Target
from hf_lora.prepared import describe
from hf_lora.quantised import check_fits, check_trains, check_whole, stored_layers
from hf_lora.select import TargetSpec
from hf_lora.targets import UNKNOWN, Layer, Survey, excuse, survey
from hf_lora.walks import bare_modules

__all__ = ["Frozen", "Head", "LoraPlan", "Target", "plan_lora"]


def plan_lora(
    host: object,
    *,
    rank: int = 16,
    alpha: float | None = None,
    targets: TargetSpec = "default",
    dropout: float = 0.0,
    components: Sequence[str] | None = None,
    train_also: Sequence[str] | None = None,
    name: str = "default",
    config: PeftConfig | Mapping[str, PeftConfig] | None = None,
) -> LoraPlan:
    """Says what `attach_lora` would do with the same arguments, and changes nothing.

    Args:
        host: A transformers model, a `PeftModel`, any `torch.nn.Module`, or a diffusers pipeline;
            weights may be on the meta device.
        rank: Rank of A: (rank, in) and B: (out, rank); capped at min(in, out) for each target.
        alpha: The update is scaled by alpha/rank; when left out 32, and the rank for denoisers and
            pipelines.
        targets: A preset (`default`, `all-linear`, `attention`, `qv`, `mlp`, `cross-attention`,
            `experts`), roles, or module names. On a pipeline a mapping gives them by component.
        dropout: Dropout probability on the input of A.
        components: Which components of a pipeline; its denoisers when left out. A model has one,
            leave it out.
        train_also: Modules trained whole and saved with the adapter. Left out: the task head of a
            classification class; `()`: none. A pipeline has none.
        name: Name of the adapter.
        config: A ready peft tuner config instead of rank, alpha and dropout; its empty
            `target_modules` is filled from the family map. On a pipeline it is taken for every
            component, and a mapping gives one for each.

    Returns:
        The plan.

    Raises:
        UnsupportedHost: `host` is no model, has no linear layers or is quantised in a way that
            nothing can be trained on.
        TargetNotFound: A target or a module of `train_also` matches nothing.
        UnsupportedTarget: A target exists but cannot be adapted, or a head is quantised.
        InvalidOption: An argument cannot work, or not on the way in which the base is quantised, or
            names no component.
    """
    request = Request(rank, alpha, targets, dropout, train_also, name, config)
    if is_pipeline(host):
        return _together(host, _by_component(host, components, request), request)
    check_components(components)
    model = model_of(host)
    return _plan(model, _survey(model), request)


def _survey(model: nn.Module) -> Survey:
    check_trains(model)
    return barring(survey(model), model)


def _plan(model: nn.Module, found: Survey, request: Request) -> LoraPlan:
    config, rank, alpha, dropout = request.config, request.rank, request.alpha, request.dropout
    made = make_config(rank, alpha, dropout, found.defaults) if config is None else None
    ready = made or take_config(config, rank, alpha, dropout)
    whole = choose_heads(model, found, ready, request.train_also)
    chosen = choose_layers(model, found, ready, request.targets, whole)
    if made is not None:
        cap_ranks(made, chosen, found)
    fill_config(ready, model, found, chosen, whole)
    modules = dict(bare_modules(model))
    stored = stored_layers(model)
    check_fits(stored, ready, [x.path for x in chosen])
    check_whole(modules, whole)
    quantised = describe(model, stored, whole)
    return LoraPlan(
        host=found.host,
        family=found.family.name if found.family else None,
        name=request.name,
        targets=tuple(_target(x, ready, model) for x in chosen),
        heads=tuple(
            Head(path, sum(p.numel() for p in modules[path].parameters())) for path in whole
        ),
        frozen=tuple(_frozen(found, chosen, whole)),
        notes=(
            *_notes(found, ready, chosen, request.targets),
            *(_note_on_heads(model, whole) if request.train_also is None else ()),
            *(quantised.notes if quantised else ()),
        ),
        host_parameters=found.parameters,
        config=ready,
        quantised=quantised,
    )


def _by_component(
    host: object, components: Sequence[str] | None, request: Request
) -> dict[str, LoraPlan]:
    """Returns component -> plan; a text encoder is planned with the defaults of the denoiser.

    One adapter has one alpha and one kind of start, and attention is what diffusers' own scripts
    train in text encoders, too (0.42.1 examples/text_to_image/train_text_to_image_lora_sdxl.py).
    """
    parts = {c: model_of(part) for c, part in chosen_parts(host, components, request).items()}
    asked = {component: request_for(component, request) for component in parts}
    found = {}
    for component, model in parts.items():
        with _naming(component):
            found[component] = replace(_survey(model), defaults=DENOISER)
    if not isinstance(request.targets, Mapping):
        shares = spread(found, request.targets)
        asked = {c: replace(each, targets=shares[c]) for c, each in asked.items()}
    plans = {}
    for component, model in parts.items():
        with _naming(component):
            plans[component] = _plan(model, found[component], asked[component])
            _check_no_heads(plans[component])
    return plans


@contextmanager
def _naming(component: str) -> Iterator[None]:
    """Names the component in the errors of the block."""
    try:
        yield
    except LoraError as error:
        raise error.within(file=component) from None


def _check_no_heads(plan: LoraPlan) -> None:
    if plan.heads:
        raise InvalidOption(
            f"modules_to_save names {plan.heads[0].path}, and files of a pipeline carry no modules "
            "that are trained whole",
            fix="Leave modules_to_save out of the config.",
            field="config",
        )


def _together(host: object, plans: Mapping[str, LoraPlan], request: Request) -> LoraPlan:
    """Returns the plan of a pipeline from those of its components."""

    def tagged(what: str) -> Iterator[Any]:
        for component, plan in plans.items():
            yield from (replace(x, component=component) for x in getattr(plan, what))

    alone = len(plans) == 1
    return LoraPlan(
        host=type(host).__name__,
        family=None,
        name=request.name,
        targets=tuple(tagged("targets")),
        heads=(),
        frozen=tuple(tagged("frozen")),
        notes=tuple(
            note if alone else f"{component}: {note}"
            for component, plan in plans.items()
            for note in plan.notes
        ),
        host_parameters=sum(plan.host_parameters for plan in plans.values()),
        config=next(iter(plans.values())).config,
        components=plans,
    )


def _target(layer: Layer, config: PeftConfig, model: nn.Module) -> Target:
    rank = parameters = None
    if isinstance(config, LoraConfig):
        rank = by_pattern(config.rank_pattern, layer.path, config.r) // max(1, len(layer.parts))
        parameters = _lora_parameters(layer, config, rank, model)
    is_parameter = layer.kind == "parameter"
    return Target(
        layer.path, layer.role or UNKNOWN, layer.shape, rank, parameters, is_parameter, layer.rows
    )


def _lora_parameters(layer: Layer, config: LoraConfig, rank: int, model: nn.Module) -> int:
    """Counts A, B and what the variant adds.

    A of a convolution spans its kernel, B is 1x1 and grouped (peft 0.21 `_ConvNd.update_layer`).
    """
    width, height = layer.shape
    extra = height * (bool(config.use_dora) + bool(config.lora_bias))
    if layer.parts:
        return rank * (width * len(layer.parts) + sum(part_sizes(layer)))
    if layer.kind == "parameter":
        return rank * layer.parameters // (width * height) * (width + height)  # for every expert
    if layer.kind != "conv":
        return rank * (width + height) + extra
    module: Any = dict(bare_modules(model))[layer.path]
    kernel: int = math.prod(module.kernel_size)
    groups: int = module.groups
    return rank * width * kernel + height * rank // groups + extra


def _frozen(found: Survey, chosen: Iterable[Layer], whole: Sequence[str]) -> Iterable[Frozen]:
    """Groups every layer that is no target, with its reason."""
    taken = {x.path for x in chosen} | set(whole)
    inside = tuple(f"{path}." for path in whole)
    groups: dict[tuple[str, str], list[Layer]] = {}
    for layer in (*found.layers, *found.experts):
        if layer.path not in taken and not layer.path.startswith(inside):
            groups.setdefault((_what(layer), _reason(found, layer)), []).append(layer)
    for (what, reason), layers in groups.items():
        yield Frozen(what, len(layers), sum(x.parameters for x in layers), reason)


def _what(layer: Layer) -> str:
    names = [s for s in layer.path.split(".") if not s.isdigit()]
    return layer.role or ".".join(names[-2:]) or layer.path


def _reason(found: Survey, layer: Layer) -> str:
    if layer in found.experts:
        return 'fused experts, opt-in: targets=["default", "experts"]'
    return excuse(found, layer) or (
        "not among the targets asked for" if layer.role else "unknown role; name it to target it"
    )


def _note_on_heads(model: nn.Module, whole: Sequence[str]) -> Iterable[str]:
    left = unnamed_heads(model, whole)
    if left:
        yield (
            f"{len(left)} layers of the task head stay as they are in the base, because peft "
            f"cannot name them alone: {listing(left, limit=3)}"
        )


def _notes(
    found: Survey, config: PeftConfig, chosen: Sequence[Layer], targets: TargetSpec
) -> Iterable[str]:
    if found.nameless and targets == "default":
        yield (
            "no layer name is known to the lexicon: all linears of the repeated blocks are "
            "targets; name some with targets=[...] to choose"
        )
    capped = [x for x in chosen if isinstance(config, LoraConfig) and min(x.shape) < config.r]
    if capped and getattr(config, "rank_pattern", None):
        yield f"rank is capped at min(in, out) for {len(capped)} targets"
    taken = {x.path for x in chosen}
    experts = sum(x.parameters for x in found.experts if x.path not in taken)
    if experts:
        share = 100 * experts / found.parameters
        yield f"{share:.0f} % of the parameters lie in fused experts, which stay frozen"
