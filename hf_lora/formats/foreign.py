"""Files of other programs: what their keys name is found among the names of a host.

Every key is applied or named in an error. Names are looked up whole in tables made of the host's
own module names and of those the original repository gave them; nothing is guessed from parts of a
name.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hf_lora.adapter import Adapter, check_component
from hf_lora.errors import AdapterMismatch, BadAdapterFile, LoraError, listing
from hf_lora.formats.container import Contents
from hf_lora.formats.grammar import Group, format_of, grouped, parsed
from hf_lora.formats.header import (
    Steps,
    check_digest,
    in_words,
    read_manifest,
    sound,
    trigger_words,
)
from hf_lora.formats.kinds import Loose, component_of, divided
from hf_lora.formats.kinds.loose import ALPHA
from hf_lora.formats.lookup import (
    Hit,
    Host,
    Indices,
    Place,
    indices_of,
    known_names,
    looked_up,
)
from hf_lora.formats.misfits import misfit, no_factors, strange_keys, without_refused
from hf_lora.formats.names import Names
from hf_lora.formats.stated import Stated
from hf_lora.limits import LoadLimits
from hf_lora.manifest import Manifest

NamesOf = Callable[[Sequence[Group]], Host]  # finds the host that a file's groups are read for

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
            field="host",
        )
    host = names_of(groups)
    try:
        indices = indices_of(host)
        found, left_out = _found(groups, strange, indices, strict=strict)
        found, said = _with_alphas(found, contents.metadata, limits)
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
    adapter = Adapter(parts, manifest, str(weights), (*said, *_said_of(layers)), left_out)
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
    indices = indices_of(host)
    found, lost = looked_up(groups, indices)
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
        found, _ = looked_up(groups, indices_of(names_of(groups)))
    except LoraError:
        return False
    return any(not hit.place.own for hit in found)


def _with_words(manifest: Manifest) -> Manifest:
    """Returns the manifest with the trigger words that the other program wrote down."""
    words = manifest.trigger_words or trigger_words(manifest.foreign)
    return replace(manifest, trigger_words=words)


def _with_alphas(
    found: Sequence[Hit], metadata: Mapping[str, str], limits: LoadLimits
) -> tuple[list[Hit], tuple[str, ...]]:
    """Returns the modules with the header's alpha where they state none, and what to say of it."""
    if all(ALPHA in hit.loose.factors for hit in found):
        return list(found), ()
    stated = Stated(metadata, limits)
    done = []
    for hit in found:
        names = (parsed(hit.loose.keys[0])[1], hit.place.pieces[0].path)
        loose = stated.completed(hit.loose, (hit.component, *hit.start.components), names)
        done.append(replace(hit, loose=loose))
    count = sum(new.loose is not old.loose for new, old in zip(done, found, strict=True))
    where = "" if count == len(found) else f" at {count} modules"
    said = f"alpha is the header's{where}, which as a tensor the file does not state"
    return done, (said,) if count else ()


def _said_of(layers: Mapping[str, Mapping[str, Loose]]) -> tuple[str, ...]:
    bare = [x for held in layers.values() for x in held.values() if ALPHA not in x.factors]
    if not bare:
        return ()
    where = "the file states no alpha" if len(bare) == sum(map(len, layers.values())) else (
        f"{len(bare)} modules state no alpha"
    )  # fmt: skip
    return (f"{where}; alpha = rank was taken, as other programs do",)


def _found(
    groups: Sequence[Group], strange: Sequence[str], indices: Indices, *, strict: bool
) -> tuple[list[Hit], tuple[str, ...]]:
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
    found, lost = looked_up(groups, indices)
    if (lost and strict) or not found:
        kinds = {name: index.names.kind for name, index in indices.items()}
        raise misfit(groups, lost, kinds, lambda group: known_names(group.start, indices))
    if strange and strict:
        raise strange_keys(strange, groups)
    left_out += [key for group, name in lost for key in group.layers[name].keys]
    return found, tuple(left_out)


def _layers(found: Sequence[Hit], indices: Indices) -> dict[str, dict[str, Loose]]:
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


def _check_spelling(found: Sequence[Hit], indices: Indices) -> None:
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


def _put(layers: dict[str, Loose], place: Place, loose: Loose, names: Names) -> None:
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
