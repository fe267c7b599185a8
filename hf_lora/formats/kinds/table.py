"""What the layers of foreign files can hold: one row a kind, and the three ways that use them.

A kind that peft has layers of has code; any other has its name, and why it is not read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from hf_lora.adapter import Component
from hf_lora.errors import BadAdapterFile, listing
from hf_lora.formats.kinds import loha, lokr, lora
from hf_lora.formats.kinds.loose import (
    ALPHA,
    MAGNITUDE,
    SCALE,
    Loose,
    broken,
    refuse_values,
    unfit,
)
from hf_lora.formats.names import Names, Piece


@dataclass(frozen=True)
class Kind:
    """A kind of adapter that peft has layers of.

    Attributes:
        name: For people.
        peft_type: peft's name of it.
        factors: What a layer may hold, besides alpha and magnitudes.
        magnitudes: Whether peft has DoRA on it.
        width: (path, layer) -> number of output features.
        part: (path, layer, piece) -> the layer on a piece of its output features; None where
            nothing of it reaches these.
        component: (layers by the host's paths, names) -> the record.
        loose: (record, path) -> the factors of a layer.
        unsaid: Fields of peft's config that change what the factors mean, and that foreign files
            have no place for.
    """

    name: str
    peft_type: str
    factors: frozenset[str]
    magnitudes: bool
    width: Callable[[str, Loose], int]
    part: Callable[[str, Loose, Piece], Loose | None]
    component: Callable[[Mapping[str, Loose], Names], Component]
    loose: Callable[[Component, str], dict[str, Tensor]]
    unsaid: tuple[str, ...] = ("modules_to_save",)


@dataclass(frozen=True)
class Refused:
    """A kind of layer that is known by name and not read.

    Attributes:
        name: For people.
        marks: Factors of which it has at least one.
        why: Why no layer of peft holds it.
    """

    name: str
    marks: frozenset[str]
    why: str


KINDS = (
    Kind(
        "LoRA",
        "LORA",
        frozenset(lora.FACTORS),
        True,
        lora.width_of,
        lora.part_of,
        lora.component,
        lora.loose,
        unsaid=lora.UNSAID,
    ),
    Kind(
        "LoHa",
        "LOHA",
        frozenset(loha.FACTORS),
        False,
        loha.width_of,
        loha.part_of,
        loha.component,
        loha.loose,
    ),
    Kind(
        "LoKr",
        "LOKR",
        frozenset(lokr.FACTORS),
        False,
        lokr.width_of,
        lokr.part_of,
        lokr.component,
        lokr.loose,
    ),
)

_WHOLE = "it changes weights whole, not by low-rank factors"

# The first row with a mark decides. Factor names as lycoris-lora 4.1.3 (`weight_list` of each of
# its modules), ComfyUI and Black Forest Labs have them.
REFUSED = (
    Refused("T-LoRA", frozenset({"p_layer.weight", "q_layer.weight", "lambda_layer"}),
            "its rank changes with the time step, which no layer of peft is told"),
    Refused("GLoRA", frozenset({f"{x}.weight" for x in ("a1", "a2", "b1", "b2", "bm")}),
            "its update is made of the base weight, and no layer of peft computes it so"),
    Refused("OFT or BOFT", frozenset({"oft_blocks", "oft_diag", "rescale"}),
            "it rotates the base weight, and peft's OFT and BOFT keep other parameters of the "
            "rotation"),
    Refused("(IA)3", frozenset({"on_input"}),
            "it scales weights, and peft's (IA)3 scales biases as well"),
    Refused("a control LoRA", frozenset({"set_weight", "reshape_weight"}),
            "it replaces or widens base weights"),
    Refused("norms (LyCORIS train_norm)", frozenset({"w_norm", "b_norm"}), _WHOLE),
    Refused("whole differences (LyCORIS full, diffs of Wan)", frozenset({"diff", "diff_b"}),
            _WHOLE),
    Refused("a LoRA with a scalar beside the factors", frozenset({"scalar"}),
            "LyCORIS multiplies it in before it saves, so what it stands for here is not known"),
    Refused("whole weights", frozenset({"weight", "bias"}), _WHOLE),
)  # fmt: skip

_OF_KINDS = {name: kind for kind in KINDS for name in kind.factors}
_BESIDE = frozenset({ALPHA, SCALE, MAGNITUDE})
_MERGE = "Merge it into the base with the program that made it."


def component_of(layers: Mapping[str, Loose], names: Names) -> Component:
    """Returns all layers of one component of a foreign file as a record that peft can hold.

    Factors come in peft's shapes and the file's dtypes; alpha/rank is in the config, exactly.

    Args:
        layers: The host's module path -> layer.
        names: What the host has at these paths.

    Raises:
        BadAdapterFile: A layer is incomplete, damaged, or of a kind that peft has no layer of, or
            the layers are of kinds that one adapter of peft cannot hold together.
        AdapterMismatch: A layer has another shape than the host's, or no place there.
    """
    if not layers:
        raise BadAdapterFile(f"there are no layers for {names.kind}")
    seen: dict[tuple[str, ...], Kind] = {}
    first: dict[str, str] = {}  # kind -> the first path that has it
    for path, loose in layers.items():
        held = tuple(loose.factors)
        kind = seen.get(held)
        if kind is None:
            kind = seen[held] = kind_of(path, loose)
            first.setdefault(kind.name, path)
    if len(first) > 1:
        (_, _), (other, path) = list(first.items())[:2]
        raise broken(
            path,
            layers[path],
            f"there is {other}, and at {next(iter(first.values()))} {next(iter(first))}; peft has "
            "one kind on all layers of an adapter",
            fix="Cut the file in two, and load them as two adapters.",
        )
    return next(iter(seen.values())).component(layers, names)


def divided(loose: Loose, pieces: Sequence[Piece], width: int) -> dict[str, Loose]:
    """Returns a foreign layer as the host has it, which may hold its output features apart.

    Factors of the input are shared, those of the output cut, as views where their order stays.

    Args:
        loose: The layer.
        pieces: Where its output features lie on the host; together they are all of them.
        width: The number of its output features.

    Returns:
        The host's path -> its part. A part that the layer changes nothing of is left out.

    Raises:
        BadAdapterFile: The layer is incomplete, of a kind that is not read, or cannot be cut so.
        AdapterMismatch: It has another number of output features.
    """
    whole = pieces[0]
    if len(pieces) == 1 and whole.rows is None and not whole.swapped:
        return {whole.path: loose}
    kind = kind_of(whole.path, loose)
    found = kind.width(whole.path, loose)
    _check_pieces(loose, pieces, width, found)
    parts = {piece.path: kind.part(piece.path, loose, piece) for piece in pieces}
    used = {path: part for path, part in parts.items() if part is not None}
    if used:
        return used
    # B is zero everywhere, as when training begins: none of it may be lost
    return {p.path: Loose(lora.cut(p.path, loose, p), loose.keys) for p in pieces}


def _check_pieces(loose: Loose, pieces: Sequence[Piece], width: int, found: int) -> None:
    """Checks that the pieces are all of a layer's output features, and no more."""
    path = pieces[0].path
    if found != width:
        where = f"{len(pieces)} layers of the host" if len(pieces) > 1 else "the host's layer"
        raise unfit(
            path, loose, f"it has {found} output features, and {where} make up {width}", "lora_B"
        )
    reached = 0
    for first, end in sorted(piece.rows or (0, width) for piece in pieces):
        if not 0 <= first <= reached or not first < end <= width:
            break
        reached = max(reached, end)
    if reached != width:
        raise unfit(path, loose, f"the host has no place for its output features from {reached}")
    for piece in pieces:
        first, end = piece.rows or (0, width)
        if piece.swapped and (end - first) % 2:
            raise unfit(piece.path, loose, f"{end - first} output features have no halves")


def loose_of(component: Component) -> dict[str, Loose]:
    """Returns a component's layers as foreign files have them, the way back of `component_of`.

    alpha is scaling times rank. Tucker cores stay in A, where `component_of` has put them.

    Raises:
        BadAdapterFile: No foreign file can say what the component holds; the error names it.
    """
    kind = next((kind for kind in KINDS if kind.peft_type == component.kind), None)
    if kind is None:
        raise BadAdapterFile(
            f"adapters of the method {component.kind or 'unknown'} are in peft's own files only",
            fix="Save it in the peft layout.",
            field="peft_type",
        )
    if component.modules:
        raise BadAdapterFile(
            f"the adapter has modules that were trained whole ({listing(component.modules)}), "
            "which no foreign file can say",
            fix="Save it in the peft layout.",
            field="modules_to_save",
        )
    refuse_values(component.config, kind.unsaid)
    return {path: Loose(kind.loose(component, path)) for path in component.targets}


def refusal(factors: Iterable[str]) -> str:
    """Returns what a layer with these factors is and why it is not read; empty where it is."""
    held = frozenset(factors)
    row = next((row for row in REFUSED if row.marks & held), None)
    return f"{row.name}: {row.why}" if row else ""


def kind_of(path: str, loose: Loose) -> Kind:
    """Returns the kind of a layer.

    Raises:
        BadAdapterFile: It is a refused one, two at once, or none.
    """
    held = loose.factors.keys()
    why = refusal(held)
    if why:
        mark = next(name for name in held if any(name in row.marks for row in REFUSED))
        raise broken(path, loose, f"the factors are those of {why}", mark, fix=_MERGE)
    strange = [name for name in held if name not in _OF_KINDS and name not in _BESIDE]
    if strange:
        raise broken(path, loose, f"{listing(strange)} is no factor that is known here", strange[0])
    found = {_OF_KINDS[name].name: name for name in held if name in _OF_KINDS}
    if len(found) != 1:
        said = f"factors of {' and of '.join(found)}" if found else f"only {listing(held)}"
        name = list(found.values())[1] if found else ""
        raise broken(path, loose, f"there are {said}", name, fix="The file is damaged.")
    kind = _OF_KINDS[next(iter(found.values()))]
    scale = next((name for name in (SCALE, MAGNITUDE) if name in held), "")
    if scale and not kind.magnitudes:
        raise broken(
            path,
            loose,
            f"there is a magnitude (DoRA) on {kind.name}, and peft has DoRA on LoRA only",
            scale,
            fix=_MERGE,
        )
    return kind


__all__ = ["KINDS", "REFUSED", "Kind", "Refused", "component_of", "divided", "loose_of", "refusal"]
