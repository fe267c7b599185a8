"""A LoRA is trained, saved, loaded and taken off on tiny models: `python -m tests.zoo [family]`."""

from __future__ import annotations

import argparse
import logging
import math
import re
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch import Tensor

from hf_lora import attach_lora, detach_lora, load_lora, plan_lora, save_lora
from tests import zoo_denoisers, zoo_senses, zoo_text
from tests.support import randomise
from tests.zoo_row import Row

ZOO: Mapping[str, Row] = {**zoo_text.ROWS, **zoo_senses.ROWS, **zoo_denoisers.ROWS}
# A gradient this much smaller than the largest of its kind is rounding. Over the whole zoo the
# smallest real one is 2e-5 of the largest, and what `silent` lists has none at all.
_ROUNDING = 1e-6
_SHOWN = 8  # failures of one family


def check(row: Row) -> list[str]:
    """Puts one family through everything; returns a line `step: what` for each failure."""
    failures = []
    with tempfile.TemporaryDirectory() as folder:
        case = _Case(row, Path(folder))
        for step in (case.build, case.attach, case.train, case.peft, case.load, case.detach):
            try:
                failures += [f"{step.__name__}: {what}" for what in step()]
            except Exception as error:  # any error of any family is a line of the result
                failures.append(f"{step.__name__}: {_in_short(error)}")
                if step in (case.build, case.attach):
                    break
    return failures


class _Case:
    """The steps of one family, in order; each yields what is wrong."""

    def __init__(self, row: Row, folder: Path):
        self.row, self.folder = row, folder

    def build(self) -> Iterator[str]:
        self.model = self.row.build()
        self.bare = _state(self.model)
        self.flags = _flags(self.model)
        self.before = _output(self.row, self.model)
        if not torch.isfinite(self.before).all():
            yield "the output of the bare model is not finite"
        yield from _differences(self.bare, _state(self.row.build()), "a second build")

    def attach(self) -> Iterator[str]:
        planned = {target.path for target in plan_lora(self.model).targets}
        attach_lora(self.model)
        self.paths = {n for n, m in self.model.named_modules() if isinstance(m, BaseTunerLayer)}
        if not planned:
            yield "no targets"
        for path in sorted(planned ^ self.paths):
            yield f"{path} is {'planned' if path in planned else 'adapted'} only"

    def train(self) -> Iterator[str]:
        model = self.model.train()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for factor in ("lora_B", "lora_A"):  # A has none before the first step, as B is zero
            optimizer.zero_grad()
            self.row.run(model).float().pow(2).mean().backward()
            yield from _unreached(self.row, model, self.paths, factor)
            optimizer.step()

    def peft(self) -> Iterator[str]:
        self.adapted = _output(self.row, randomise(self.model))
        if torch.equal(self.adapted, self.before):
            yield "random factors change nothing"
        save_lora(self.model, self.folder)
        load = _inject if self.row.is_denoiser else peft.PeftModel.from_pretrained
        theirs = load(self.row.build(), str(self.folder))
        yield from _unequal(_output(self.row, theirs), self.adapted)

    def load(self) -> Iterator[str]:
        fresh = self.row.build()
        report = load_lora(fresh, self.folder)
        yield from _unequal(_output(self.row, fresh), self.adapted)
        if not report.verified:
            yield f"not verified: {report.base}"

    def detach(self) -> Iterator[str]:
        detach_lora(self.model)
        yield from _unequal(_output(self.row, self.model), self.before)
        yield from _differences(self.bare, _state(self.model), "the state after detaching")
        if _flags(self.model) != self.flags:
            yield "requires_grad differs"


@torch.no_grad()
def _output(row: Row, model: Any) -> Tensor:
    """Runs in evaluation mode and with every parameter frozen.

    torch chooses a matmul kernel by `requires_grad`, even where nothing is recorded (ATen
    `should_fold`, LinearAlgebra.cpp), and kernels differ in the last bit. A fresh base is
    trainable, one with an adapter is not.
    """
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    output = row.run(model.eval().requires_grad_(False))
    for parameter, flag in flags.items():
        parameter.requires_grad_(flag)
    return output


def _state(model: Any) -> dict[str, Tensor]:
    return {key: value.detach().clone() for key, value in model.state_dict().items()}


def _flags(model: Any) -> dict[str, bool]:
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}


def _inject(model: Any, folder: str) -> Any:
    """Loads as diffusers does: inject the file's config, then set its tensors."""
    config = peft.PeftConfig.from_pretrained(folder)
    peft.inject_adapter_in_model(config, model)
    tensors = load_file(Path(folder, "adapter_model.safetensors"))
    names = {name.removeprefix("base_model.model."): value for name, value in tensors.items()}
    unexpected = peft.set_peft_model_state_dict(model, names).unexpected_keys
    if unexpected:
        raise ValueError(f"peft does not expect {unexpected[:3]}")
    return model


def _unreached(row: Row, model: Any, paths: set[str], factor: str) -> Iterator[str]:
    """Yields factors without a gradient, and rows of `silent` that are not true."""
    sizes = dict.fromkeys(paths, 0.0)
    for name, parameter in model.named_parameters():
        path, found, _ = name.partition(f".{factor}.")
        if found and parameter.grad is not None:
            sizes[path] = parameter.grad.abs().max().item()
    if not all(map(math.isfinite, sizes.values())):
        yield f"{factor} has a gradient that is not finite"
    floor = _ROUNDING * max(sizes.values())
    reached = {path: size > floor for path, size in sizes.items()}
    silent = {p for p in paths if any(re.fullmatch(pattern, p) for pattern in row.silent)}
    for path in sorted(silent):
        if reached[path]:
            yield f"{factor} of {path} has a gradient and is listed as silent"
    for path in sorted(paths - silent):
        if not reached[path]:
            yield f"{factor} of {path} gets no gradient"
    for pattern in row.silent:
        if not any(re.fullmatch(pattern, path) for path in paths):
            yield f"no target matches the silent {pattern!r}"


def _unequal(found: Tensor, expected: Tensor) -> Iterator[str]:
    if not torch.equal(found, expected):
        yield f"the output is off by {(found - expected).abs().max().item():.2e}"


def _differences(
    expected: Mapping[str, Tensor], found: Mapping[str, Tensor], what: str
) -> Iterator[str]:
    for name in sorted(expected.keys() ^ found.keys()):
        yield f"{what}: {name} is there on one side only"
    for name in sorted(expected.keys() & found.keys()):
        if not torch.equal(expected[name], found[name]):
            yield f"{what}: {name} differs"


def _in_short(error: Exception) -> str:
    words = " ".join(f"{type(error).__name__}: {error}".split())
    return words if len(words) < 240 else f"{words[:120]} ... {words[-120:]}"


def main() -> int:
    """Runs the families named, or all; prints a line each and returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*", help="all when left out")
    families = parser.parse_args().families or list(ZOO)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    failed, start = 0, time.perf_counter()
    for family in families:
        row, since = ZOO[family], time.perf_counter()
        failures = check(row)
        failed += bool(failures)
        verdict, seconds = "FAILED" if failures else "ok", time.perf_counter() - since
        line = f"{verdict:6} {row.kind:7} {family:19} {row.model:42} {seconds:.1f} s"
        more = [f"and {len(failures) - _SHOWN} more"] if len(failures) > _SHOWN else []
        sys.stdout.write("\n       ".join([line, *failures[:_SHOWN], *more]) + "\n")
        sys.stdout.flush()
    kinds = Counter(ZOO[family].kind for family in families)
    listed = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    seconds = time.perf_counter() - start
    sys.stdout.write(f"{len(families)} families ({listed}), {failed} failed, {seconds:.0f} s\n")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
