"""A recipe as a YAML file: read with every fault named, written so that it needs no PyYAML."""

from __future__ import annotations

import json
import os
import re
from typing import Any

from hf_lora.errors import InvalidOption, MissingExtra
from hf_lora.training.recipe import Recipe, make_recipe

FILE = "train.yaml"
EXTRA_FIX = 'pip install "hf-lora[train]"'
_LARGEST = 1 << 20  # bytes
# Characters that JSON leaves as they are and YAML refuses, or takes for the end of a line.
_UNFIT = re.compile("[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]")


def read_recipe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a YAML file of rows; hyphens in names count as underscores.

    Returns:
        Row -> value, checked.

    Raises:
        InvalidOption: The file cannot be read, is no YAML mapping, names a row twice or one that
            is not there, or a value is of another kind.
        MissingExtra: The file is no plain list of `name: JSON value`, which is what hf_lora writes,
            and PyYAML is not installed.
    """
    where = os.fspath(path)
    try:
        with open(path, "rb") as file:
            raw = file.read(_LARGEST + 1)
        if len(raw) > _LARGEST:
            raise InvalidOption(f"the config is larger than {_LARGEST:,} bytes", file=where)
        text = raw.decode("utf-8-sig")
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or "it is not UTF-8"
        raise InvalidOption(f"the config cannot be read ({why})", file=where) from None
    pairs = _plain_pairs(text)
    if pairs is None:
        pairs = _yaml_pairs(text, where)
    found: dict[str, Any] = {}
    for key, value in pairs:
        name = key.replace("-", "_") if isinstance(key, str) else str(key)
        if name in found:
            raise InvalidOption(f"{name} stands there twice", fix="Leave one.", file=where)
        found[name] = value
    recipe = make_recipe(found, where)
    return {name: getattr(recipe, name) for name, value in found.items() if value is not None}


def _plain_pairs(text: str) -> list[tuple[Any, Any]] | None:
    """Reads what `write_recipe` writes; None for any other YAML."""
    pairs = []
    for line in text.split("\n"):  # other ends of a line, such as U+0085, may stand in a value
        if not line.strip() or line.startswith("#"):
            continue
        found = re.fullmatch(r"([a-z_-]+): (.+)", line)
        try:
            pairs.append((found[1], json.loads(found[2]))) if found else None
        except (ValueError, RecursionError):
            return None
        if not found:
            return None
    return pairs or None


def _yaml_pairs(text: str, where: str) -> list[tuple[Any, Any]]:
    try:
        import yaml  # type: ignore[import-untyped]
    except ImportError:
        raise MissingExtra(
            f"{where} is YAML, which needs PyYAML", fix=f"Run: {EXTRA_FIX}"
        ) from None
    try:
        tree = yaml.compose(text, Loader=yaml.SafeLoader)  # keeps keys that stand there twice
        loaded = yaml.safe_load(text)
    except Exception as error:  # YAMLError, or what a tag such as !!int '' comes to
        why = " ".join(str(error).split())[:300] or type(error).__name__
        raise InvalidOption(f"the config is no YAML ({why})", file=where) from None
    if not isinstance(loaded, dict):
        kind = "empty" if loaded is None else "no mapping"
        raise InvalidOption(
            f"the config is {kind}", fix="Write one `name: value` a line.", file=where
        )
    keys = [key.value for key, _ in tree.value]
    twice = [key for key in keys if keys.count(key) > 1]
    return [*loaded.items(), *((key, None) for key in twice[:1])]


def write_recipe(recipe: Recipe, comment: str) -> str:
    """Returns a recipe as YAML that `read_recipe` reads without PyYAML."""
    lines = [f"# {line}" for line in comment.splitlines()]
    for name, value in recipe.to_dict().items():
        if value not in (None, []):
            lines.append(f"{name}: {_scalar(value)}")
    return "\n".join(lines) + "\n"


def _scalar(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    if isinstance(value, float):  # 1e-05 is a text for YAML 1.1, 1.0e-05 a number
        return re.sub(r"^(-?\d+)e", r"\1.0e", text)
    return _UNFIT.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
