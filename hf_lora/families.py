"""Families: which row of `hf_lora.rows` speaks for a model, and what a path means with it.

Third parties add rows with `register_family`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hf_lora.errors import InvalidOption
from hf_lora.roles import match_alias, role_of, tower_of
from hf_lora.rows import FAMILIES, Family

__all__ = [
    "DENOISER",
    "FAMILIES",
    "LANGUAGE",
    "Defaults",
    "Family",
    "defaults_of",
    "family_of",
    "frozen_in",
    "register_family",
    "role_in",
    "tower_in",
    "unregister_family",
]


_claimed: dict[str, Family] = {}


def register_family(family: Family) -> Family:
    """Adds a row; the models it claims use it from now on.

    Args:
        family: The row. Its model types and classes must be free.

    Returns:
        The same row, so that the call can stand around the constructor.

    Raises:
        InvalidOption: Another row already claims one of its model types or classes.
    """
    for claim in family.claims:
        other = _claimed.get(claim)
        if other is not None and other is not family:
            raise InvalidOption(
                f"families {other.name!r} and {family.name!r} both claim {claim!r}",
                fix=f"Leave {claim!r} out of {family.name!r}, or unregister {other.name!r} first.",
            )
    _claimed.update(dict.fromkeys(family.claims, family))
    return family


def unregister_family(family: Family) -> None:
    """Takes a row out again; what it claimed is read by the lexicon alone."""
    for claim in family.claims:
        if _claimed.get(claim) is family:
            del _claimed[claim]


for _row in FAMILIES:
    register_family(_row)


def family_of(host_or_config: object) -> Family | None:
    """Row that speaks for a model or config, or None.

    The class of a model comes first, then `model_type`, then that of `text_config`: a
    vision-language model around a Mamba is a Mamba where it matters.

    Args:
        host_or_config: A model, a config, or anything; what has neither gives None.
    """
    config = getattr(host_or_config, "config", None) or host_or_config
    names = [cls.__name__ for cls in type(host_or_config).__mro__]
    for part in (config, getattr(config, "text_config", None)):
        model_type = getattr(part, "model_type", None)
        if isinstance(model_type, str):
            names.append(model_type)
    return next((_claimed[name] for name in names if name in _claimed), None)


@dataclass(frozen=True)
class Defaults:
    """What an adapter is when the user asks for nothing in particular.

    Attributes:
        preset: The preset that `targets="default"` means.
        alpha: Alpha; None for alpha = rank.
        init: peft's `init_lora_weights`.
    """

    preset: str
    alpha: float | None
    init: bool | Literal["gaussian"]


# alpha/rank with a fixed alpha keeps the best learning rate independent of rank; 32 is twice the
# default rank. Denoisers: as diffusers' own training scripts (0.42.1 examples/text_to_image).
LANGUAGE = Defaults("default", 32, True)
DENOISER = Defaults("attention", None, "gaussian")


def defaults_of(host: object) -> Defaults:
    """Defaults for a model: those of denoisers for what diffusers defines or a row says is one."""
    family = family_of(host)
    if family is not None and family.denoiser:
        return DENOISER
    libraries = {cls.__module__.partition(".")[0] for cls in type(host).__mro__}
    return DENOISER if "diffusers" in libraries else LANGUAGE


def role_in(path: str, family: Family | None) -> str | None:
    """Role of the module or parameter at `path`: the family's aliases first, then the lexicon."""
    own = match_alias(path, family.by_alias) if family else None
    return own or role_of(path)


def frozen_in(path: str, family: Family | None) -> str:
    """Why the family keeps the module at `path` out of the defaults; empty when it does not."""
    role = role_in(path, family)
    return family.frozen.get(role, "") if family and role else ""


def tower_in(path: str, family: Family | None) -> str:
    """Tower that `path` lies in: the family's towers first, then `hf_lora.roles.tower_of`."""
    rows = family.towers if family else {}
    inside = (tower for run, tower in rows.items() if f".{run}." in f".{path}.")
    return next(inside, "") or tower_of(path)
