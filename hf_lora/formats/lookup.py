"""Where the modules of a foreign file lie on a host: names looked up whole, in tables.

The tables are made of the host's own module names and of those that the makers of the model gave
them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from hf_lora.adapter import MODEL
from hf_lora.errors import AdapterMismatch
from hf_lora.formats.grammar import ANY, Group, Start, is_never, part_of
from hf_lora.formats.kinds import Loose
from hf_lora.formats.kinds.loose import suits
from hf_lora.formats.misfits import Lost
from hf_lora.formats.names import Names, Piece
from hf_lora.formats.native import native_names

Host = Mapping[str, Names]  # component -> its names
_WHOLE = "text_model."  # transformers 5 hosts have no such segment, files of others do


@dataclass(frozen=True)
class Place:
    """Where one name leads, and whether it is the host's own."""

    pieces: tuple[Piece, ...]
    own: bool


class Index:
    """Every name that a component's layers go by, dotted and flat."""

    def __init__(self, names: Names) -> None:
        self.names = names
        self.native = native_names(names)

    @cached_property
    def dotted(self) -> Mapping[str, Place]:
        """Names with the dots of paths."""
        found = {name: Place(pieces, _is_own(name, pieces)) for name, pieces in self.native.items()}
        for path in self.names.layers:
            for spelt in _spellings(path):
                found.setdefault(spelt, Place((Piece(path),), own=True))
        return found

    @cached_property
    def flat(self) -> Mapping[str, Place]:
        """Names with underscores for the dots."""
        found: dict[str, Place] = {}
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

    def table(self, start: Start) -> Mapping[str, Place]:
        """Returns the names as keys that begin so write them."""
        return self.flat if start.flat else self.dotted


def _is_own(name: str, pieces: tuple[Piece, ...]) -> bool:
    """Tells whether a name is the host's own path in another version of the host."""
    return name.removeprefix(_WHOLE) == pieces[0].path.removeprefix(_WHOLE)


Indices = Mapping[str, Index]


def indices_of(host: Host) -> Indices:
    """Returns the names of every component of a host."""
    return {name: Index(names) for name, names in host.items()}


def _spellings(path: str) -> Iterator[str]:
    """Yields a path as the host has it, and with or without the segment that versions differ in."""
    yield path
    if path.startswith(_WHOLE):
        yield path.removeprefix(_WHOLE)
    elif path.startswith("encoder."):
        yield f"{_WHOLE}{path}"


@dataclass(frozen=True)
class Hit:
    """One module of a file, and where its name leads."""

    component: str
    place: Place
    start: Start
    loose: Loose


def looked_up(groups: Sequence[Group], indices: Indices) -> tuple[list[Hit], list[Lost]]:
    """Returns where the modules of a file lead, and those that lead nowhere."""
    found: list[Hit] = []
    lost: list[Lost] = []
    for group, component in zip(groups, components_for(groups, indices), strict=True):
        table = {} if component is None else indices[component].table(group.start)
        for name, loose in group.layers.items():
            place = table.get(name)
            if component is None or place is None:
                lost.append((group, name))
            else:
                found.append(Hit(component, place, group.start, loose))
    return found, lost


def components_for(groups: Sequence[Group], indices: Indices) -> list[str | None]:
    """Returns for each group the component that most of its modules fit; None where none has any.

    A host that is one model is one component of the pipeline that a file is for: it gets the groups
    of that one component of the file of which it has most, in its shapes before in names.

    Raises:
        AdapterMismatch: Two components of the file fit such a host alike.
    """
    found = [_component_for(group, indices) for group in groups]
    if MODEL not in indices:
        return found
    index = indices[MODEL]
    scores: dict[str, tuple[int, int]] = {}
    for group, component in zip(groups, found, strict=True):
        of = part_of(group.start)
        if component is not None and of and not is_never(group.start, index.names.kind):
            one, other = scores.get(of, (0, 0)), _score(group, index)
            scores[of] = (one[0] + other[0], one[1] + other[1])
    best = max(scores, key=lambda of: scores[of], default="")
    alike = [of for of in scores if scores[of] == scores[best]]
    if len(alike) > 1:
        raise AdapterMismatch(
            f"the file has modules of {' and of '.join(alike)}, which fit the single "
            f"{index.names.kind} alike",
            fix="Load it into the pipeline.",
        )
    kept = ("", best)
    return [
        component if part_of(group.start) in kept else None
        for group, component in zip(groups, found, strict=True)
    ]


def _component_for(group: Group, indices: Indices) -> str | None:
    """Returns the component that most of a group's modules fit; None where no one has any."""
    if MODEL in indices or group.start.components == ANY:
        allowed = list(indices)
    else:
        allowed = [name for name in group.start.components if name in indices]
    if len(allowed) == 1:
        table = indices[allowed[0]].table(group.start)
        return allowed[0] if any(map(table.__contains__, group.layers)) else None
    scores = {name: _score(group, indices[name]) for name in allowed}
    best = max(allowed, key=lambda name: scores[name], default=None)
    return best if best is not None and scores[best][1] else None


def _score(group: Group, index: Index) -> tuple[int, int]:
    """Returns how many modules of a group a component has in their shapes, and how many at all."""
    table = index.table(group.start)
    places = [(table[name], loose) for name, loose in group.layers.items() if name in table]
    return sum(_suits(place, loose, index.names) for place, loose in places), len(places)


def _suits(place: Place, loose: Loose, names: Names) -> bool:
    first, *others = [names.layers[piece.path] for piece in place.pieces]
    return suits(loose.factors, (first[0] + sum(shape[0] for shape in others), *first[1:]))


def known_names(start: Start, indices: Indices) -> list[str]:
    """Returns how keys that begin so would spell the modules that there are."""
    return [
        f"{start.text}{spelt}"
        for component, index in indices.items()
        if MODEL in indices or start.components == ANY or component in start.components
        for spelt in index.table(start)
    ]
