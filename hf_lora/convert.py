"""One adapter in the spelling of another program: exact, or an error that says what would be lost.

What is written is read back before it replaces anything, and compared with what was read: by its
digest, and where that cannot stay the same, layer by layer.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from hf_lora.adapter import MODEL, Adapter, Component
from hf_lora.architectures import ARCHITECTURES, names_of_host
from hf_lora.errors import AdapterMismatch, BadAdapterFile, InvalidOption, LoraError, listing
from hf_lora.exchange import _names_for, guessed, placed, with_name
from hf_lora.fetch import local_files
from hf_lora.findings import ProbedPart
from hf_lora.formats import (
    FOREIGN,
    LAYOUTS,
    SUFFIX,
    check_layout,
    kohya,
    peft,
    read_adapter,
    weights_of,
    write_adapter,
)
from hf_lora.formats import diffusers_io as diffusers
from hf_lora.formats.grammar import Group
from hf_lora.formats.kinds.loose import equal
from hf_lora.formats.lookup import Host
from hf_lora.hosts import parts_of
from hf_lora.recognise import homes_of_record, parts_of_record, scaling_of
from hf_lora.skeletons import laid_out

TARGETS = (*LAYOUTS, *FOREIGN)
# What a layout's folder gets.
_FILES = {
    "peft": (peft.WEIGHTS, peft.CONFIG),
    "diffusers": (diffusers.WEIGHTS,),
    **{layout: (kohya.WEIGHTS,) for layout in FOREIGN},
}
# Advice of a load, which may leave things out; a conversion may not.
_LENIENT = re.compile(
    r"(, or p|P)ass strict=False to leave \w+ out(?=\.)|Pass strict=False[^.]*\.$"
)
# Sums of products of float32 factors, made in another order in float64: differences of its rounding
_ROUNDING = 1e-12


@dataclass(frozen=True)
class Conversion:
    """What a conversion did; `print` shows it.

    Attributes:
        source: What was read.
        out: The file that was written; for peft the folder of its two.
        layout: Whose spelling that is.
        parts: What it holds, by component.
        digest_before: Identity of what was read.
        digest: Identity of what was written, read back.
        checked: How it was made sure that both compute the same.
        not_carried: What was known of the adapter, and the layout has no place for.
        repairs: What was wrong with the file and was put right.
    """

    source: str
    out: str
    layout: str
    parts: tuple[ProbedPart, ...]
    digest_before: str
    digest: str
    checked: str
    not_carried: tuple[str, ...]
    repairs: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Returns all of it as plain data."""
        return asdict(self)

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield f"{self.source} -> {self.out}, as {self.layout}"
        for part in self.parts:
            yield f"  {part.name:<16}{part}"
        same = self.digest == self.digest_before
        yield f"  {'digest before':<16}{self.digest_before}"
        yield f"  {'digest':<16}{'the same' if same else self.digest}"
        yield f"  {'checked':<16}{self.checked}"
        rows = (("not carried", self.not_carried), ("repaired", self.repairs))
        for what, entries in rows:
            yield from (f"  {what:<16}{entry}" for entry in entries)


def convert(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    layout: str,
    *,
    host: str | None = None,
    file: str | None = None,
    revision: str | None = None,
) -> Conversion:
    """Writes an adapter's file in the spelling of another program.

    Args:
        source: A folder, file or repository id of any format that is read.
        out: Folder to write into, made when missing; for all layouts but peft also a
            `.safetensors` file. What it replaces is whole until the new one is.
        layout: `"diffusers"`, `"peft"`, `"kohya"` or `"comfyui"`, as in `save_adapter`.
        host: The pipeline it is for: the name of a public one, or a folder or repository id, of
            which only configs are read. Left out, the first public one that fits.
        file: Which folder or file below `source` is the adapter.
        revision: Branch, tag or commit of a repository.

    Raises:
        InvalidOption: `layout` is unknown, or `out` is `source` or cannot be written.
        BadAdapterFile: The file is damaged, or the layout cannot hold exactly what it holds.
        AdapterMismatch: It fits no pipeline, or holds more components than the layout.
    """
    check_layout(layout)
    found = local_files(source, file=file, revision=revision)
    target = Path(out)
    weights = weights_of(found)
    written = _written(target, layout)
    _check_apart(weights, target, written)
    read = _Reading(None if host is None else laid_out(host))
    try:
        adapter = read_adapter(found, names_of=read.names_of)
    except LoraError as error:
        error.fix = _LENIENT.sub("", error.fix)
        raise
    shaped = _shaped(adapter, layout, read)
    names = _names_to_write(shaped, layout, read)
    try:
        with tempfile.TemporaryDirectory(prefix=".hf_lora-", dir=_existing(target)) as aside:
            trial = Path(aside) / (target.name if written[0] == target else "adapter")
            write_adapter(shaped, trial, layout=layout, host=names)
            back = _read_back(trial, shaped, names)
            checked = _checked(shaped, back, renamed=adapter.digest != shaped.digest)
        write_adapter(shaped, target, layout=layout, host=names)
    except OSError as error:
        raise InvalidOption(
            f"{target} cannot be written ({error.strerror or error})",
            fix="Name a place that can be made and has room.",
            field="out",
        ) from None
    return Conversion(
        source=str(weights),
        out=str(written[0] if len(written) == 1 else target),
        layout=layout,
        parts=tuple(parts_of_record(back)),
        digest_before=adapter.digest,
        digest=back.digest,
        checked=checked,
        not_carried=tuple(_not_carried(shaped)) if layout in FOREIGN else (),
        repairs=adapter.repairs,
    )


# ---------------------------------------------------------------- where to


def _written(out: Path, layout: str) -> tuple[Path, ...]:
    """Returns the files that a save will write, as `write_adapter` names them."""
    if layout != "peft" and out.suffix == SUFFIX and not out.is_dir():
        return (out,)
    return tuple(out / name for name in _FILES[layout])


def _check_apart(weights: Path, out: Path, written: tuple[Path, ...]) -> None:
    """Raises InvalidOption where what is read would be replaced, or get a second beside it."""
    standard = weights.name in (peft.WEIGHTS, diffusers.WEIGHTS)  # a folder of both is of neither
    read = [weights, *([weights.parent / peft.CONFIG] if weights.name == peft.WEIGHTS else [])]
    if any(_is_same(old, new) for old in read for new in written) or (
        standard and _is_same(weights.parent, out)
    ):
        raise InvalidOption(
            f"{out} is where {weights.name} is read from, which stays as it is",
            fix="Name another place.",
            field="out",
        )


def _is_same(one: Path, other: Path) -> bool:
    try:
        return one.exists() and other.exists() and os.path.samefile(one, other)
    except OSError:
        return False


def _existing(out: Path) -> Path:
    """Returns the nearest folder around `out` that exists."""
    out = out.absolute()
    return next(path for path in (out, *out.parents) if path.is_dir())


# ---------------------------------------------------------------- for which host


class _Reading:
    """The host that names are looked up in, given or found by the first file that asks for it."""

    def __init__(self, target: Any) -> None:
        self.target = target
        self.names: Host | None = None if target is None else names_of_host(target)

    def names_of(self, groups: list[Group] | Any) -> Host:
        if self.names is None:
            self.names = guessed(groups)
        return self.names


def _shaped(adapter: Adapter, layout: str, read: _Reading) -> Adapter:
    """Returns the adapter with the components that the layout has: one model, or a pipeline's."""
    if layout == "peft":
        return _as_model(adapter)
    if set(adapter.components) != {MODEL}:
        return adapter
    if read.target is None:
        homes = homes_of_record(adapter)
        if homes:
            read.target = laid_out(homes[0])
            read.names = names_of_host(read.target)
    found = adapter if read.target is None else placed(adapter, parts_of(read.target))
    if MODEL in found.components:
        raise AdapterMismatch(
            f"the adapter is for a single model, and {layout} files are for the components of a "
            "pipeline",
            fix="Give the pipeline that has this model: --for PIPELINE; known by name are "
            f"{', '.join(ARCHITECTURES)}.",
        )
    return found


def _as_model(adapter: Adapter) -> Adapter:
    """Returns the adapter of one component as that of a model by itself."""
    if set(adapter.components) == {MODEL}:
        return adapter
    if len(adapter.components) != 1:
        alien = any(part.kind != "LORA" for part in adapter.components.values())
        raise AdapterMismatch(
            f"the adapter is for {listing(adapter.components)}, and a peft folder holds one model, "
            "so that the others would be lost",
            fix=f"Convert it to {'kohya' if alien else 'diffusers'}, which holds all.",
        )
    alone = with_name(adapter, next(iter(adapter.components)), MODEL)
    return replace(alone, manifest=replace(alone.manifest, host="", configs={}))


def _names_to_write(adapter: Adapter, layout: str, read: _Reading) -> Host | None:
    """Returns the names of the host, for layouts that need them."""
    if layout not in FOREIGN:
        return None
    return _names_for(adapter, None) if read.names is None else read.names


def _not_carried(adapter: Adapter) -> Iterator[str]:
    """Yields what other programs' headers have no place for."""
    manifest = adapter.manifest
    rows: tuple[tuple[object, str], ...] = (
        (manifest.base.id, f"the base's id: {manifest.base.id}"),
        (manifest.base.fingerprints, "the base's fingerprint, by which another base is noticed"),
        (manifest.training, "facts of the training run"),
        (manifest.fused, "which parts of fused projections were trained"),
        (manifest.derived_from, "what the adapter was made from"),
        (
            kohya.SECOND in adapter.components,
            f"that it is for {kohya.SECOND}: load it with load_lora(pipe.{kohya.SECOND}, ...)",
        ),
    )
    yield from (words for held, words in rows if held)


# ---------------------------------------------------------------- is it the same


def _read_back(path: Path, written: Adapter, names: Host | None) -> Adapter:
    """Returns what a file holds; the second transformer of Wan 2.2 is spelt there as the first."""
    host = dict(names or {})
    alone = kohya.SECOND in written.components and kohya.SECOND in host
    if alone:
        host["transformer"] = host.pop(kohya.SECOND)
    back = read_adapter(path, names_of=lambda _: host)
    if not alone:
        return back
    parts = {kohya.SECOND if n == "transformer" else n: x for n, x in back.components.items()}
    return replace(back, components=parts)


def _checked(wanted: Adapter, back: Adapter, *, renamed: bool) -> str:
    """Compares what was written with what it was made of; returns how, in words.

    Args:
        wanted: What was to be written.
        back: What was read back.
        renamed: Whether a component has another name than in the file that was read.

    Raises:
        BadAdapterFile: They do not compute the same; nothing was replaced.
    """
    if wanted.digest == back.digest:
        if renamed:
            return "read back: every factor and scaling is the same; the component's name is not"
        return "read back: the digest is the same, so every factor and scaling is"
    if wanted.components.keys() != back.components.keys():
        raise _differs(f"it holds {listing(back.components)}")
    computed = equal = 0
    for name, component in wanted.components.items():
        other = back.components[name]
        for path in {**component.targets, **other.targets}:
            if _same_factors(component, other, path):
                equal += 1
            elif _same_update(component, other, path):
                computed += 1
            else:
                raise _differs(f"the update of {name}.{path} is another one")
    return (
        f"read back: {equal} layers have the same factors; of {computed}, which were joined or cut,"
        " the update is the same"
    )


def _differs(fact: str) -> BadAdapterFile:
    return BadAdapterFile(
        f"read back, the file is not the adapter that it was made of: {fact}",
        fix="Nothing was replaced. Convert it to diffusers instead.",
    )


def _same_factors(one: Component, other: Component, path: str) -> bool:
    if path not in one.targets or path not in other.targets:
        return False
    here, there = one.targets[path], other.targets[path]
    return (
        one.kind == other.kind
        and here.keys() == there.keys()
        and all(equal(here[n], there[n]) for n in here)
        and scaling_of(one, path) == scaling_of(other, path)
    )


def _same_update(one: Component, other: Component, path: str) -> bool:
    """Compares the dense updates of LoRA, in float64, and the rest of the factors as they are."""
    if {one.kind, other.kind} != {"LORA"}:
        return False
    held = [part.targets.get(path, {}) for part in (one, other)]
    rest = [{n: t for n, t in x.items() if not _in_update(n, t)} for x in held]
    known = [x for x in rest if x]
    if len(known) == 1 or (known and not _equal(*known)):
        return False
    found = [_update(part, path) for part in (one, other)]
    if None in found:
        return all(t is None or not t.any() for t in found)
    first, second = found
    assert first is not None
    assert second is not None
    if first.shape != second.shape:
        return False
    return bool((first - second).abs().max() <= _ROUNDING * first.abs().max())


def _in_update(name: str, tensor: Tensor) -> bool:
    """Tells whether a factor is in B @ A, or adds nothing: biases of zeros are not written."""
    return name in ("lora_A", "lora_B") or (name == "lora_B.bias" and not tensor.any())


def _equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(equal(one[n], other[n]) for n in one)


def _update(component: Component, path: str) -> Tensor | None:
    """Returns scaling * B @ A, (out, in * kernel), in float64; None where there is no target."""
    factors = component.targets.get(path)
    if factors is None:
        return None
    a, b = factors["lora_A"].double().flatten(1), factors["lora_B"].double().flatten(1)
    return component.scaling(path) * (b @ a)
