"""Files of other programs: what their keys name is found among the names of a host.

Every key is applied or named in an error. Names are looked up whole in tables made of the host's
own module names and of those the original repository gave them; nothing is guessed from parts of a
name.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from hf_lora.adapter import MODEL, Adapter, check_component
from hf_lora.errors import AdapterMismatch, BadAdapterFile, LoraError, listing
from hf_lora.formats.container import Contents
from hf_lora.formats.grammar import ANY, Group, Start, format_of, grouped
from hf_lora.formats.header import Steps, check_digest, in_words, read_manifest, sound
from hf_lora.formats.kinds import Loose, component_of, divided
from hf_lora.formats.misfits import Lost, misfit, no_factors, strange_keys, without_refused
from hf_lora.formats.names import Names, Piece
from hf_lora.formats.native import native_names
from hf_lora.limits import LoadLimits
from hf_lora.manifest import Manifest

Host = Mapping[str, Names]  # component -> its names
NamesOf = Callable[[Sequence[Group]], Host]  # finds the host that a file's groups are read for

TRIGGER = "modelspec.trigger_phrase"
_WHOLE = "text_model."  # transformers 5 hosts have no such segment, files of others do
_TWO_FILES = "Two files were put into one; load those that it was made of, one by one."


@dataclass(frozen=True)
class Finder:
    """Finds the names for a file, and for one that does not fit them, where it would.

    Attributes:
        names_of: The groups of a file -> the names they are looked up in.
        elsewhere: The groups -> public pipelines that they fit, by name.
    """

    names_of: NamesOf
    elsewhere: Callable[[Sequence[Group]], Iterable[str]]

    def __call__(self, groups: Sequence[Group]) -> Host:
        """Returns the names for the groups of a file."""
        return self.names_of(groups)


@dataclass(frozen=True)
class _Place:
    """Where one name leads, and whether it is the host's own."""

    pieces: tuple[Piece, ...]
    own: bool


class _Index:
    """Every name that a component's layers go by, dotted and flat."""

    def __init__(self, names: Names) -> None:
        self.names = names
        self.native = native_names(names)

    @cached_property
    def dotted(self) -> Mapping[str, _Place]:
        found = {
            name: _Place(pieces, _is_own(name, pieces)) for name, pieces in self.native.items()
        }
        for path in self.names.layers:
            for spelt in _spellings(path):
                found.setdefault(spelt, _Place((Piece(path),), own=True))
        return found

    @cached_property
    def flat(self) -> Mapping[str, _Place]:
        found: dict[str, _Place] = {}
        for name, place in self.dotted.items():
            spelt = name.replace(".", "_")
            if found.setdefault(spelt, place).pieces != place.pieces:
                raise AdapterMismatch(
                    f"{spelt} would name two layers of {self.names.kind}, for instance {name}",
                    fix="Save the file with dots in the names.",
                )
        return found

    @cached_property
    def respelt(self) -> frozenset[str]:
        """The host's layers that have a name of their own in the original repository."""
        return frozenset(piece.path for pieces in self.native.values() for piece in pieces)

    def table(self, start: Start) -> Mapping[str, _Place]:
        return self.flat if start.flat else self.dotted


def _is_own(name: str, pieces: tuple[Piece, ...]) -> bool:
    """Tells whether a name is the host's own path in another version of the host."""
    return name.removeprefix(_WHOLE) == pieces[0].path.removeprefix(_WHOLE)


Indices = Mapping[str, _Index]


def _indices(host: Host) -> Indices:
    return {name: _Index(names) for name, names in host.items()}


def _spellings(path: str) -> Iterator[str]:
    """Yields a path as the host has it, and with or without the segment that versions differ in."""
    yield path
    if path.startswith(_WHOLE):
        yield path.removeprefix(_WHOLE)
    elif path.startswith("encoder."):
        yield f"{_WHOLE}{path}"


def steps(
    contents: Contents,
    weights: Path,
    limits: LoadLimits,
    names_of: NamesOf | None,
    *,
    strict: bool,
) -> Steps:
    """Makes an adapter from a file of another program, check by check.

    Args:
        contents: The file.
        weights: Where it lies, for messages.
        limits: Bounds on values.
        names_of: Finds the names that those of the file are looked up in; None for nowhere.
        strict: With False, keys that lead nowhere and layers of kinds that are not read are left
            out; the adapter's `left_out` names them.

    Raises:
        BadAdapterFile: The file is damaged, of a kind that no layer here holds, or of two formats.
        AdapterMismatch: It is for another host.
    """
    manifest = _with_words(read_manifest(contents.metadata, limits))
    yield "manifest", in_words(manifest)
    groups, strange = grouped(contents.tensors)
    if not groups:
        raise no_factors(strange)
    if names_of is None:
        raise BadAdapterFile(
            f"it is a file of the format {format_of(groups)}, whose names are those of a pipeline",
            fix="Open it with open_adapter(source, host=...).",
        )
    host = names_of(groups)
    try:
        indices = _indices(host)
        found, left_out = _found(groups, strange, indices, strict=strict)
        layers = _layers(found, indices)
        parts = {name: component_of(held, host[name]) for name, held in layers.items()}
    except AdapterMismatch as error:
        raise _with_others(error, groups, names_of) from None
    form = format_of(groups)
    for name, component in parts.items():
        try:
            check_component(component, limits)
        except LoraError as error:
            raise error.within(field=name) from None
    kinds = ", ".join(f"{component.kind} for {name}" for name, component in parts.items())
    yield "config", f"{form}: {kinds}"
    adapter = Adapter(parts, manifest, str(weights), _said_of(layers), left_out)
    yield "tensors", "; ".join(f"{name}: {sound(part)}" for name, part in parts.items())
    yield "digest", check_digest(adapter)
    return adapter


def _with_others(
    error: AdapterMismatch, groups: Sequence[Group], names_of: NamesOf
) -> AdapterMismatch:
    """Returns the error with the public pipelines that the file fits as its fix."""
    fit = list(names_of.elsewhere(groups)) if isinstance(names_of, Finder) else []
    if not fit:
        return error
    which = f"the public pipeline {fit[0]}" if len(fit) == 1 else f"these pipelines: {listing(fit)}"
    return AdapterMismatch(
        error.fact, fix=f"It fits {which}; load it into one of that kind.", field=error.field
    )


def fits(groups: Sequence[Group], host: Host) -> bool:
    """Tells whether every module of a file has its place on a host, in its shape."""
    indices = _indices(host)
    found, lost = _looked_up(groups, indices)
    if lost:
        return False
    for name, held in _layers(found, indices).items():
        component_of(held, host[name])  # raises where shapes do not fit
    return True


def has_makers_names(contents: Contents, names_of: NamesOf | None) -> bool:
    """Tells whether a file calls modules what the makers of the host do, and diffusers does not.

    Then it is no file of peft's that has lost its config, whatever its keys begin with.
    """
    groups, _ = grouped(contents.tensors)
    if names_of is None or not groups:
        return False
    try:
        found, _ = _looked_up(groups, _indices(names_of(groups)))
    except LoraError:
        return False
    return any(not hit.place.own for hit in found)


def _with_words(manifest: Manifest) -> Manifest:
    """Returns the manifest with the trigger words that the other program wrote down."""
    words = tuple(w for x in manifest.foreign.get(TRIGGER, "").split(",") if (w := x.strip()))
    return replace(manifest, trigger_words=manifest.trigger_words or words)


def _said_of(layers: Mapping[str, Mapping[str, Loose]]) -> tuple[str, ...]:
    bare = [x for held in layers.values() for x in held.values() if "alpha" not in x.factors]
    if not bare:
        return ()
    where = "the file states no alpha" if len(bare) == sum(map(len, layers.values())) else (
        f"{len(bare)} modules state no alpha"
    )  # fmt: skip
    return (f"{where}; alpha = rank was taken, as other programs do",)


@dataclass(frozen=True)
class _Hit:
    """One module of a file, and where its name leads."""

    component: str
    place: _Place
    start: Start
    loose: Loose


def _found(
    groups: Sequence[Group], strange: Sequence[str], indices: Indices, *, strict: bool
) -> tuple[list[_Hit], tuple[str, ...]]:
    """Returns what leads somewhere, and the keys that are left out: none where `strict`.

    Raises:
        BadAdapterFile: There are keys of no factor.
        AdapterMismatch: There are modules that lead nowhere.
    """
    left_out = list(strange)
    if not strict:
        kept, refused = without_refused(groups)
        if kept:  # else the error that names the kind
            groups = kept
            left_out += refused
    found, lost = _looked_up(groups, indices)
    if (lost and strict) or not found:
        kinds = {name: index.names.kind for name, index in indices.items()}
        raise misfit(groups, lost, kinds, lambda group: _known_names(group.start, indices))
    if strange and strict:
        raise strange_keys(strange, groups)
    left_out += [key for group, name in lost for key in group.layers[name].keys]
    return found, tuple(left_out)


def _looked_up(groups: Sequence[Group], indices: Indices) -> tuple[list[_Hit], list[Lost]]:
    """Returns where the modules of a file lead, and those that lead nowhere."""
    found: list[_Hit] = []
    lost: list[Lost] = []
    for group in groups:
        component = _component_for(group, indices)
        table = {} if component is None else indices[component].table(group.start)
        for name, loose in group.layers.items():
            place = table.get(name)
            if component is None or place is None:
                lost.append((group, name))
            else:
                found.append(_Hit(component, place, group.start, loose))
    return found, lost


def _component_for(group: Group, indices: Indices) -> str | None:
    """Returns the component that has most of a group's modules; None where no one has any."""
    if MODEL in indices or group.start.components == ANY:
        allowed = list(indices)
    else:
        allowed = [name for name in group.start.components if name in indices]
    hits = {n: sum(map(indices[n].table(group.start).__contains__, group.layers)) for n in allowed}
    best = max(allowed, key=lambda name: hits[name], default=None)
    return best if best is not None and hits[best] else None


def _layers(found: Sequence[_Hit], indices: Indices) -> dict[str, dict[str, Loose]]:
    """Returns component -> host path -> layer.

    Raises:
        BadAdapterFile: Modules of one component are spelt in two ways, or one stands twice.
        AdapterMismatch: A layer has another number of output features than the host's.
    """
    _check_spelling(found, indices)
    layers: dict[str, dict[str, Loose]] = defaultdict(dict)
    for hit in found:
        _put(layers[hit.component], hit.place, hit.loose, indices[hit.component].names)
    return dict(layers)


def _check_spelling(found: Sequence[_Hit], indices: Indices) -> None:
    """Checks that all modules of a component are spelt by one format, and by host or makers."""
    formats: dict[str, dict[str, str]] = defaultdict(dict)
    spelt: dict[str, dict[bool, str]] = defaultdict(dict)
    for hit in found:
        key = hit.loose.keys[0]
        formats[hit.component].setdefault(hit.start.format, key)
        if not hit.place.own or hit.place.pieces[0].path in indices[hit.component].respelt:
            spelt[hit.component].setdefault(hit.place.own, key)
    for component in formats:
        for ways in (formats[component], spelt[component]):
            if len(ways) > 1:
                one, other = ways.values()
                raise BadAdapterFile(
                    f"the file spells modules of {component} in two ways, {one} and {other}",
                    fix=_TWO_FILES,
                    field=other,
                )


def _put(layers: dict[str, Loose], place: _Place, loose: Loose, names: Names) -> None:
    """Puts one layer of the file where it belongs on the host, in parts where that has several."""
    first = place.pieces[0]
    if len(place.pieces) == 1 and first.rows is None and not first.swapped:
        found = {first.path: loose}
    else:
        ends = [p.rows[1] for p in place.pieces if p.rows is not None]
        width = max(ends) if ends else names.layers[first.path][0]
        found = divided(loose, place.pieces, width)
    for path, part in found.items():
        if path in layers:
            raise BadAdapterFile(
                f"{path} stands twice, as {layers[path].keys[0]} and as {loose.keys[0]}",
                fix=_TWO_FILES,
                field=loose.keys[0],
            )
        layers[path] = part


def _known_names(start: Start, indices: Indices) -> list[str]:
    """Returns how keys that begin so would spell the modules that there are."""
    return [
        f"{start.text}{spelt}"
        for component, index in indices.items()
        if MODEL in indices or start.components == ANY or component in start.components
        for spelt in index.table(start)
    ]
