"""What a run is told, from flags or a file: the rows of `table`, checked."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from hf_lora.errors import InvalidOption, closest, listing, shown
from hf_lora.training.recipe.kinds import QUOTED, Kind
from hf_lora.training.recipe.table import FIELDS, Recipe, flag_of

__all__ = ["FIELDS", "Recipe", "add_flags", "differing", "flag_of", "make_recipe"]


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds a flag for every row; one that is not given leaves no mark."""
    parser.add_argument("--config", metavar="FILE", help="YAML with any of these; flags override")
    for name, row in FIELDS.items():
        facts = row.metadata
        text = facts["text"] + (f" (default: {facts['default']})" if facts["default"] else "")
        options = dict(facts["kind"].flag)
        if facts["choices"]:
            options = {"choices": facts["choices"]}
        parser.add_argument(
            flag_of(name),
            dest=name,
            default=argparse.SUPPRESS,
            help=text.replace("%", "%%"),
            **options,
        )


def make_recipe(given: Mapping[str, Any], where: str = "") -> Recipe:
    """Builds a recipe of values from flags or a file.

    Args:
        given: Row -> value; None stands for left out.
        where: The file they are from, for errors.

    Raises:
        InvalidOption: A name is unknown, or a value is of another kind or out of its bounds.
    """
    values = {}
    for name, value in given.items():
        if name not in FIELDS:
            near = closest(name, FIELDS)
            raise InvalidOption(
                f"there is no option {shown(name)}", fix=f"Closest: {listing(near)}.",
                file=where, field=name,
            )  # fmt: skip
        if value is None:
            continue
        kind: Kind = FIELDS[name].metadata["kind"]
        try:
            values[name] = kind.take(value)
        except TypeError:
            quotes = kind in QUOTED and not isinstance(value, str)
            raise InvalidOption(
                f"{name} is {shown(value)}, not {kind.what}",
                fix="Texts such as no, on and 1 need quotes in YAML: 'no'." if quotes else "",
                file=where,
                field=name,
            ) from None
    try:
        return Recipe(**values)
    except InvalidOption as error:
        raise error.within(file=where) from None


def differing(one: Recipe, other: Recipe) -> list[str]:
    """Returns the rows in which two recipes describe two different runs."""
    return [
        name
        for name, row in FIELDS.items()
        if row.metadata["shapes"] and getattr(one, name) != getattr(other, name)
    ]
