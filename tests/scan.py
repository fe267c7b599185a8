"""Which default targets every model class gets, on the meta device: the golden snapshot.

    python -m tests.scan [--only BertModel,FluxTransformer2DModel] [--jobs 2] [--write]

Builds each class of transformers' auto classes and each class of diffusers with `PeftAdapterMixin`
from its default config without weights, and reads it with `plan_lora` (about two minutes on two
cores). Prints what is worth a look. `--write` (`make golden`) rewrites `tests/golden/families.json`
and `docs/families.md`. The exit status is 1 when a class has no default target and no table of
`tests/scan_configs.py` says why, or a linear inside the blocks has no role.

A row: `auto` is auto class -> model types, `default` is role -> pattern -> count, `frozen` the same
below a reason, `heads` what is trained whole. In a pattern `*` stands for a number that differs
between the layers it means. `plan_gap` and `heads_refused` stand only where there is something.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from torch import nn

from hf_lora.errors import InvalidOption, LoraError, TargetNotFound
from hf_lora.plan import LoraPlan, plan_lora
from hf_lora.roles import NEVER
from hf_lora.targets import OPT_IN_EXPERTS, Layer, Survey, excuse, survey
from tests.scan_build import DIFFUSERS, Jobs, build, jobs
from tests.scan_configs import EXCEPTIONS, NO_TARGET

HERE = Path(__file__).parent
GOLDEN = HERE / "golden" / "families.json"
PAGE = HERE.parent / "docs" / "families.md"
UNKNOWN = "unknown"
VERSIONS = {"transformers": transformers.__version__, DIFFUSERS: diffusers.__version__}
# Short words for the reasons that nearly every row has; the file lists them.
WORDS = {OPT_IN_EXPERTS: "experts"} | {
    "outside the repeated blocks": "outside",
    "only linear layers are targets by default": "kind",
    "not among the targets asked for": "preset",
}
_NUMBER = re.compile(r"(?<![^._])\d+(?![^.])")

Row = dict[str, Any]
Patterns = dict[str, int]


def patterns(paths: Iterable[str]) -> Patterns:
    """Returns pattern -> number of paths; `*` where paths of the same shape differ in a number."""
    shapes: dict[str, list[list[str]]] = {}
    for path in paths:
        shapes.setdefault(_NUMBER.sub("*", path), []).append(_NUMBER.findall(path))
    found: Counter[str] = Counter()
    for shape, rows in shapes.items():
        columns = [set(column) for column in zip(*rows, strict=True)]
        numbers = iter("*" if len(column) > 1 else min(column) for column in columns)
        found["".join(next(numbers) if c == "*" else c for c in shape)] += len(rows)
    return dict(sorted(found.items()))


def grouped(layers: Iterable[Layer]) -> dict[str, Patterns]:
    """Returns role -> patterns."""
    roles: dict[str, list[str]] = {}
    for layer in layers:
        roles.setdefault(layer.role or "?", []).append(layer.path)
    return {role: patterns(paths) for role, paths in sorted(roles.items())}


def reason(found: Survey, layer: Layer) -> str:
    """Returns the short word, or the sentence of a family, for why a layer stays frozen."""
    why = excuse(found, layer)
    if why in NEVER.values():
        return "never"
    if not why:
        return UNKNOWN if layer.role is None else "preset"
    tower = re.fullmatch(r"(\w+) tower is opt-in", why)
    return f"{tower[1]} tower" if tower else WORDS.get(why, why)


def read(model: nn.Module) -> Row:
    """Reads one model into plain data."""
    found = survey(model)
    plan, refused = planned(model)
    targets = {t.path for t in plan.targets} if plan else set()
    heads = {head.path: head.parameters for head in plan.heads} if plan else {}
    inside = tuple(f"{path}." for path in heads)
    chosen, rest = [], {}
    for layer in (*found.layers, *found.experts):
        if layer.path in targets:
            chosen.append(layer)
        elif layer.path not in heads and not layer.path.startswith(inside):
            rest.setdefault(reason(found, layer), []).append(layer)
    row: Row = {
        "family": found.family.name if found.family else None,
        "main": " ".join(found.main),
        "parameters": found.parameters,
        "default": grouped(chosen),
        "frozen": {why: grouped(layers) for why, layers in sorted(rest.items())},
    }
    gap = plan_gap(model, found)
    more = {"heads": heads, "heads_refused": refused, "plan_gap": gap}
    return row | {key: value for key, value in more.items() if value}


def planned(model: nn.Module) -> tuple[LoraPlan | None, str]:
    """Returns the default plan, or none; and why its heads were left out, where they had to be."""
    refused = ""
    for heads in (None, ()):
        try:
            return plan_lora(model, train_also=heads), refused
        except TargetNotFound:
            break
        except InvalidOption as error:
            refused = str(error).partition(". ")[0]
    return None, refused


def plan_gap(model: nn.Module, found: Survey) -> list[str]:
    """Returns the linears of transformers' tensor-parallel plan that have no role."""
    names = {
        name
        for module in model.modules()
        for name in getattr(getattr(module, "config", None), "base_model_tp_plan", None) or ()
    }
    planned = [re.compile(rf"(.*\.)?{re.escape(n)}".replace(r"\*", r"\d+")) for n in names]
    open_layers = [x.path for x in found.layers if x.linear and x.role is None]
    return sorted(p for p in open_layers if any(name.fullmatch(p) for name in planned))


def scan_one(todo: Jobs, cls: str) -> tuple[str, Row]:
    """Builds and reads one class; a class that is not built has a `cause` instead of targets."""
    autos: dict[str, list[str]] = {}
    for model_type, found in sorted(todo[cls].items()):
        for auto in found:
            autos.setdefault(auto, []).append(model_type)
    row: Row = {"auto": dict(sorted(autos.items()))}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of default configs
        model = build(cls, todo[cls])
        if isinstance(model, str):
            return cls, row | {"cause": model}
        try:
            return cls, row | read(model)
        except LoraError as error:
            return cls, row | {"cause": f"not read: {error}"}


def _quiet() -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)


def scan(todo: Jobs, processes: int = 1) -> dict[str, Row]:
    """Returns class -> row, in the order of class names."""
    names = sorted(todo)
    if processes == 1:
        return dict(scan_one(todo, name) for name in names)
    with ProcessPoolExecutor(processes, initializer=_quiet) as pool:
        return dict(pool.map(partial(scan_one, todo), names, chunksize=8))


def unknown(cls: str, row: Row) -> list[str]:
    """Patterns of linears inside the blocks that have no role and no reviewed exception."""
    open_names = row.get("frozen", {}).get(UNKNOWN, {}).get("?", {})
    return [p for p in open_names if p not in EXCEPTIONS.get(cls, {})]


def why_no_target(cls: str) -> str:
    """Returns the reviewed reason for which a class has no default target; empty without one."""
    return next((why for start, why in NO_TARGET.items() if cls.startswith(start)), "")


def problems(rows: dict[str, Row]) -> list[str]:
    """Returns one line for everything that must not be."""
    lines = []
    for cls, row in rows.items():
        if "cause" in row:
            continue
        lines += [f"{cls}: no role: {pattern}" for pattern in unknown(cls, row)]
        lines += [f"{cls}: no role, but in the plan: {p}" for p in row.get("plan_gap", ())]
        if not row["default"] and not why_no_target(cls):
            lines.append(f"{cls}: no default target")
    return lines


def dump(rows: dict[str, Row]) -> str:
    """Returns the golden file: one row a line."""
    lines = [f"{json.dumps(cls)}: {json.dumps(row)}" for cls, row in sorted(rows.items())]
    head = f'{{"versions": {json.dumps(VERSIONS)},\n"rows": {{\n'
    return head + ",\n".join(lines) + "\n}}\n"


def versions() -> dict[str, str]:
    """Returns the versions of the libraries that the golden file was read from."""
    found: dict[str, str] = json.loads(GOLDEN.read_text())["versions"]
    return found


def load() -> dict[str, Row]:
    """Returns the rows of the golden file."""
    rows: dict[str, Row] = json.loads(GOLDEN.read_text())["rows"]
    return rows


def main() -> int:
    """Scans, prints, and returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="comma list of classes; all when empty")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--write", action="store_true", help="rewrite the snapshot and the page")
    options = parser.parse_args()
    only = set(filter(None, options.only.split(",")))
    todo = {cls: types for cls, types in jobs().items() if not only or cls in only}
    rows = scan(todo, options.jobs)
    if options.write:
        from tests.scan_page import page

        kept = load() if only else {}
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(dump(kept | rows))
        PAGE.write_text(page(kept | rows, VERSIONS))
    elif only:
        sys.stdout.write(dump(rows))
    for line in (wrong := problems(rows)):
        sys.stdout.write(f"{line}\n")
    built = sum("cause" not in row for row in rows.values())
    sys.stdout.write(f"{len(rows)} classes, {built} built, {len(wrong)} problems\n")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
