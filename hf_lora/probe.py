"""What is this file, for which base, and would it load here? Read from its header alone."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from hf_lora.adapter import MODEL, Adapter, check_component
from hf_lora.architectures import architecture, names_of_host
from hf_lora.errors import LoraError, listing
from hf_lora.exchange import finder, guessed
from hf_lora.facts import Said, said_by
from hf_lora.fetch import local_files
from hf_lora.findings import ProbedPart, ProbeReport
from hf_lora.formats import diffusers_io as diffusers
from hf_lora.formats import layout_of, peft, run, weights_of
from hf_lora.formats.container import Contents, read_safetensors
from hf_lora.formats.foreign import NamesOf
from hf_lora.formats.foreign import steps as foreign_steps
from hf_lora.formats.grammar import Group, format_of, grouped
from hf_lora.formats.header import read_manifest
from hf_lora.formats.lookup import Host
from hf_lora.hosts import parts_of
from hf_lora.limits import DEFAULT_LIMITS
from hf_lora.manifest import Manifest
from hf_lora.recognise import homes_of, homes_of_record, parts_of_groups, parts_of_record
from hf_lora.rehearsal import Rehearsed, rehearse
from hf_lora.skeletons import laid_out

__all__ = ["ProbeReport", "ProbedPart", "probe_lora"]

Reader = Callable[[NamesOf | None, bool], Adapter]


@dataclass(frozen=True)
class _Subject:
    """What is probed.

    Attributes:
        source: Where it lies.
        groups: The modules of a file of another program; empty for peft's and diffusers' layouts.
        manifest: What the header says.
        tensors: Key -> tensor, on meta save for scalars.
        read: (how to find the host's names, strict) -> the record; raises what a load raises.
    """

    source: str
    groups: Sequence[Group]
    manifest: Manifest
    tensors: Mapping[str, Tensor]
    read: Reader


@dataclass(frozen=True)
class _Outcome:
    """What came of one try to load it; `adapter` where it could be read at all."""

    adapter: Adapter | None = None
    rehearsed: Rehearsed | None = None
    error: LoraError | None = None


def probe_lora(source: str | os.PathLike[str] | Adapter, host: object | None = None) -> ProbeReport:
    """Says what an adapter is, for which base, and whether it would load; loads nothing.

    Only the header of the file is read, and single numbers such as alpha. A host is not changed,
    and may be in use meanwhile: every step of a load is gone through on a stand-in. What only
    values tell is not seen: NaN, and a digest that does not match (`hf-lora verify` reads them).

    Args:
        source: A folder or file that `open_adapter` reads, a Hub repository id, or an `Adapter`.
        host: What it shall go on: a loaded model or pipeline; or, of which only configs are looked
            at, the name of a public pipeline (`"sdxl"`), or the folder or repository id of one.
            Left out, it is looked for among the public pipelines.

    Returns:
        The findings. A kind of adapter that is not read here (GLoRA, OFT ...) is named in them.

    Raises:
        AdapterNotFound: There is no adapter at `source`.
        BadAdapterFile: The file is none, or damaged.
        AdapterMismatch: Config and tensors contradict each other.
        InvalidOption: `host` names nothing.
        UnsupportedHost: `host` is neither a model nor a pipeline.
    """
    target: Any = laid_out(host) if isinstance(host, str) else host
    named = host if isinstance(host, str) else ""
    if target is not None:
        parts_of(target)
    subject = _subject_of(source, target)
    strict, lenient, homes = _judged(subject, target, ready=not named)
    adapter = strict.adapter or (lenient.adapter if lenient else None)
    if subject.groups:
        parts = parts_of_groups(subject.groups, _names(target, homes))
    else:
        parts = parts_of_record(subject.read(None, True))
    said = said_by(subject.manifest if adapter is None else adapter.manifest, adapter)
    return _report(subject, adapter, tuple(parts), said, homes, strict, lenient, target, named)


def _report(
    subject: _Subject,
    adapter: Adapter | None,
    parts: tuple[ProbedPart, ...],
    said: Said,
    homes: tuple[str, ...],
    strict: _Outcome,
    lenient: _Outcome | None,
    target: object | None,
    named: str,
) -> ProbeReport:
    factors = [t for key, t in subject.tensors.items() if not key.endswith(".alpha")]
    told = strict.rehearsed or (lenient.rehearsed if lenient else None)
    repairs = () if adapter is None else adapter.repairs
    return ProbeReport(
        source=subject.source,
        format=_format(subject, adapter),
        parts=parts,
        parameters=sum(t.numel() for t in factors),
        bytes=sum(t.numel() * t.element_size() for t in subject.tensors.values()),
        digest=subject.manifest.digest,
        fits=homes,
        said=said.base,
        host="" if target is None else named or type(target).__name__,
        loads=None if target is None else strict.error is None,
        reason=strict.error.fact if strict.error else "",
        fix=strict.error.fix if strict.error else "",
        base=told.base if told else "",
        lenient=bool(lenient and lenient.error is None),
        left_out=lenient.rehearsed.left_out if lenient and lenient.rehearsed else (),
        trigger_words=said.trigger_words,
        tags=said.tags,
        facts=said.facts,
        repairs=repairs,
        notes=(*(told.notes if told else ()), *_whole(adapter), *said.notes),
    )


def _format(subject: _Subject, adapter: Adapter | None) -> str:
    if subject.groups:
        return format_of(subject.groups)
    assert adapter is not None  # a layout of our own is read whole, or has raised
    if any(key.startswith(peft.PREFIX) for key in subject.tensors) or not subject.tensors:
        return "peft"
    return "diffusers" if MODEL not in adapter.components else "diffusers, of one model"


def _whole(adapter: Adapter | None) -> Iterator[str]:
    """Yields a note on the modules that a file brings whole."""
    for name, part in adapter.components.items() if adapter is not None else ():
        if part.modules:
            size = sum(t.numel() for held in part.modules.values() for t in held.values())
            yield f"{name} brings modules trained whole: {listing(part.modules)} ({size:,} values)"


# ---------------------------------------------------------------- reading


def _subject_of(source: str | os.PathLike[str] | Adapter, target: object | None) -> _Subject:
    if isinstance(source, Adapter):
        return _in_memory(source)
    weights = weights_of(local_files(source))
    contents = read_safetensors(weights, DEFAULT_LIMITS, header_only=True)
    try:
        own = _of_own_layout(contents, weights, finder(target))
        if own is not None:
            return _Subject(str(weights), (), own.manifest, contents.tensors, lambda *_: own)

        def read(names_of: NamesOf | None, strict: bool) -> Adapter:
            return run(foreign_steps(contents, weights, DEFAULT_LIMITS, names_of, strict=strict))

        groups, _ = grouped(contents.tensors)
        if not groups:
            read(None, True)  # raises: this is no adapter
        manifest = read_manifest(contents.metadata, DEFAULT_LIMITS)
        return _Subject(str(weights), groups, manifest, contents.tensors, read)
    except LoraError as error:
        raise error.within(file=str(weights)) from None


def _of_own_layout(contents: Contents, weights: Path, names_of: NamesOf) -> Adapter | None:
    """Returns what a file of peft or diffusers holds; None for one of another program."""
    layout = layout_of(contents, weights, names_of)
    steps = {"peft": peft.steps, "diffusers": diffusers.steps}.get(layout)
    return None if steps is None else run(steps(contents, weights, DEFAULT_LIMITS))


def _in_memory(adapter: Adapter) -> _Subject:
    def read(names_of: NamesOf | None, strict: bool) -> Adapter:
        for component in adapter.components.values():
            check_component(component, DEFAULT_LIMITS)
        return adapter

    tensors = {f"{n}.{key}": t for n, c in adapter.components.items() for key, t in c.tensors()}
    return _Subject(adapter.source or "memory", (), adapter.manifest, tensors, read)


# ---------------------------------------------------------------- would it load


def _judged(
    subject: _Subject, target: object | None, *, ready: bool
) -> tuple[_Outcome, _Outcome | None, tuple[str, ...]]:
    """Returns what came of a load, of one with `strict=False` where that failed, and the homes."""
    strict = None if target is None else _attempt(subject, target, ready=ready, strict=True)
    if strict is not None and strict.error is None:
        return strict, None, ()
    groups = subject.groups
    homes = homes_of(groups) if groups else homes_of_record(subject.read(None, True))
    if strict is None:
        return _without_host(subject, homes), None, homes
    return strict, _attempt(subject, target, ready=ready, strict=False), homes


def _attempt(subject: _Subject, target: Any, *, ready: bool, strict: bool) -> _Outcome:
    """Goes through one load."""
    adapter = None
    try:
        adapter = subject.read(finder(target), strict)
        return _Outcome(adapter, rehearse(target, adapter, strict=strict, ready=ready))
    except LoraError as error:
        return _Outcome(adapter, error=error)


def _without_host(subject: _Subject, homes: Sequence[str]) -> _Outcome:
    """Reads for the first pipeline that fits, or finds out why none does."""
    try:
        return _Outcome(subject.read(finder(homes[0]) if homes else guessed, True))
    except LoraError as error:
        return _Outcome(error=error)


def _names(target: object | None, homes: Sequence[str]) -> Host:
    if target is not None:
        return names_of_host(target)
    return architecture(homes[0]) if homes else {}
