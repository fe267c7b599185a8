"""What is asked of a pipeline, component by component.

A request is what the arguments of `plan_lora` say. On a pipeline `targets` and `config` may be
given for each component; everything else is the same for all.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from peft import PeftConfig
from torch import nn

from hf_lora.adapter import MODEL
from hf_lora.errors import (
    AdapterNotFound,
    InvalidOption,
    TargetNotFound,
    UnsupportedHost,
    listing,
    shown,
)
from hf_lora.hosts import adapter_names, check_known_name, model_of, parts_of
from hf_lora.select import TargetSpec, select
from hf_lora.targets import Survey

T = TypeVar("T")

# Components that get an adapter when none is asked for, by diffusers 0.42.1's names. The others
# condition a denoiser (text encoders, connectors), or are one of their own that files reach by name
# alone (MiniMax-H3's `transformer_ref`).
DENOISERS = ("unet", "prior", "transformer", "transformer_2")


@dataclass(frozen=True)
class Request:
    """The arguments of `plan_lora`.

    Attributes:
        rank: Rank of the factors.
        alpha: Alpha, or None for the default.
        targets: What is asked for; on a pipeline also component -> what is asked for there.
        dropout: Dropout probability on the input of A.
        train_also: Modules trained whole; None for the default.
        name: Name of the adapter.
        config: A ready peft config; on a pipeline also component -> config.
    """

    rank: int
    alpha: float | None
    targets: TargetSpec
    dropout: float
    train_also: Sequence[str] | None
    name: str
    config: PeftConfig | Mapping[str, PeftConfig] | None


def is_pipeline(host: object) -> bool:
    """Tells whether a host has components; raises UnsupportedHost for what is no host."""
    return MODEL not in parts_of(host)


def check_known(host: object, name: str) -> None:
    """Raises AdapterNotFound when no component of the host has such an adapter.

    The error lists what there is and, for a pipeline, where.
    """
    parts = parts_of(host)
    if set(parts) == {MODEL}:
        check_known_name(model_of(host), name)
        return
    places: dict[str, list[str]] = {}
    for component, part in parts.items():
        for known in adapter_names(model_of(part)):
            places.setdefault(known, []).append(component)
    if name not in places:
        there = listing(f"{n!r} ({', '.join(where)})" for n, where in places.items())
        raise AdapterNotFound(
            f"{type(host).__name__} has no adapter {name!r}. It has {there or 'none'}.",
            field="name",
        )


def chosen_parts(
    host: object, components: Sequence[str] | None, request: Request
) -> dict[str, nn.Module]:
    """Returns component -> model for the components that are to get an adapter.

    Raises:
        InvalidOption: `components` names what the pipeline does not have, or leaves out what other
            arguments are given for.
        UnsupportedHost: Nothing is asked for and the pipeline has no denoiser to take.
    """
    parts = parts_of(host)
    if not parts:
        raise UnsupportedHost(
            f"{type(host).__name__} holds none of its models",
            fix="Load it with from_pretrained.",
        )
    wanted = _wanted(host, parts, components, request)
    return {name: part for name, part in parts.items() if name in wanted}


def _wanted(
    host: object,
    parts: Mapping[str, nn.Module],
    components: Sequence[str] | None,
    request: Request,
) -> Collection[str]:
    given = {
        field: list(value)
        for field, value in (("targets", request.targets), ("config", request.config))
        if isinstance(value, Mapping)
    }
    if components is not None:
        if isinstance(components, str) or not isinstance(components, Collection) or not components:
            raise InvalidOption(
                f"components={shown(components)} is no list of components",
                fix=f"Give a list, of {listing(parts)}.",
                field="components",
            )
        given["components"] = list(components)
    for field, names in given.items():
        unknown = next((name for name in names if name not in parts), None)
        if unknown is not None or not names:
            raise _unknown(host, parts, field, unknown)
    named = dict.fromkeys(name for names in given.values() for name in names)
    if components is not None and set(named) - set(components):
        left = next(name for name in named if name not in components)
        raise InvalidOption(
            f"something is asked for {left}, which components={list(components)} leaves out",
            field="components",
        )
    found = list(named) or [name for name in DENOISERS if name in parts]
    if not found:
        raise UnsupportedHost(
            f"diffusers loads LoRAs into {listing(parts)} of {type(host).__name__}, and into no "
            "denoiser",
            fix=f"Name them: components=[{next(iter(parts))!r}]; or give the denoiser itself, "
            "attach_lora(pipe.transformer).",
        )
    return found


def _unknown(
    host: object, parts: Mapping[str, nn.Module], field: str, name: str | None
) -> InvalidOption:
    fix = ""
    held = getattr(host, name, None) if isinstance(name, str) else None
    if isinstance(held, nn.Module):
        twins = [n for n, part in parts.items() if model_of(part) is model_of(held)]
        fix = f"diffusers loads no LoRA there; adapt it alone: attach_lora(pipe.{name})."
        fix = f"{name} is the same model as {twins[0]}; name that." if twins else fix
    asked = "nothing" if name is None else shown(name)
    return InvalidOption(
        f"{field} asks for {asked}, and the components of {type(host).__name__} are "
        f"{listing(parts, limit=9)}",
        fix=fix,
        field=field,
    )


def request_for(component: str, request: Request) -> Request:
    """Returns what is asked of one component of a pipeline.

    Raises:
        InvalidOption: Modules are to be trained whole, which no file of a pipeline carries; or
            configs are given by component and this one has none.
    """
    if request.train_also:
        raise InvalidOption(
            f"train_also={shown(request.train_also)} on a pipeline, whose files carry no modules "
            "that are trained whole",
            fix="Leave it out, or adapt the component alone: attach_lora(pipe.<component>, ...).",
            field="train_also",
        )
    config = request.config
    if isinstance(config, Mapping):
        if component not in config:
            raise InvalidOption(
                f"config= has {listing(config)} and nothing for {component}", field="config"
            )
        config = config[component]
    targets: Any = request.targets
    if isinstance(targets, Mapping):
        targets = targets.get(component, "default")
    # a config may name modules itself, which is an error of its own
    train_also = () if config is None else None
    return replace(request, targets=targets, config=config, train_also=train_also)


def spread(found: Mapping[str, Survey], targets: TargetSpec) -> dict[str, TargetSpec]:
    """Returns component -> those entries of one list of targets that mean something there.

    Names and roles differ between denoisers and text encoders, so an entry must match in one
    component, and not in all.

    Raises:
        TargetNotFound: An entry matches in none.
    """
    if isinstance(targets, str | Mapping) or not isinstance(targets, Collection) or len(found) < 2:
        return dict.fromkeys(found, targets)
    shares: dict[str, list[str]] = {component: [] for component in found}
    for entry in targets:
        errors: list[TargetNotFound] = []
        for component, known in found.items():
            try:
                select(known, entry)
            except TargetNotFound as error:
                errors.append(error)
            else:
                shares[component].append(entry)
        if len(errors) == len(found):
            raise errors[0]
    return {component: share or targets for component, share in shares.items()}
