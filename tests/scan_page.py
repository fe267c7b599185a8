"""docs/families.md from the rows of the scan."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from hf_lora.roles import ROLES
from tests.scan import problems, why_no_target
from tests.scan_build import DIFFUSERS, NO_MIXIN
from tests.scan_configs import EXCEPTIONS

Row = dict[str, Any]

# Kind of model -> auto classes; the first kind that fits lists the class.
KINDS = {
    "Causal language models": ("CAUSAL_LM",),
    "Masked language models": ("MASKED_LM",),
    "Sequence to sequence": ("SEQ_TO_SEQ_CAUSAL_LM",),
    "Image and text to text": ("IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "VISUAL_QUESTION_ANSWERING"),
    "Diffusion models": (DIFFUSERS, NO_MIXIN),
    "Speech to text": ("SPEECH_SEQ_2_SEQ", "CTC", "RNNT", "TDT"),
    "Text to speech and music": ("TEXT_TO_WAVEFORM", "TEXT_TO_SPECTROGRAM"),
    "Audio classification": (
        *("AUDIO_CLASSIFICATION", "AUDIO_FRAME_CLASSIFICATION", "AUDIO_XVECTOR"),
        "AUDIO_TOKENIZATION",
    ),
    "Image and video classification": ("IMAGE_CLASSIFICATION", "VIDEO_CLASSIFICATION"),
    "Zero-shot classification and detection": (
        *("ZERO_SHOT_IMAGE_CLASSIFICATION", "ZERO_SHOT_OBJECT_DETECTION"),
    ),
    "Detection, segmentation, depth": (
        *("OBJECT_DETECTION", "SEMANTIC_SEGMENTATION", "INSTANCE_SEGMENTATION"),
        *("UNIVERSAL_SEGMENTATION", "IMAGE_SEGMENTATION", "DEPTH_ESTIMATION", "MASK_GENERATION"),
        *("KEYPOINT_DETECTION", "KEYPOINT_MATCHING", "POSE_ESTIMATION", "NORMAL_ESTIMATION"),
        *("POINTMAP_ESTIMATION", "IMAGE_MATTING"),
    ),
    "Text classification and question answering": (
        *("SEQUENCE_CLASSIFICATION", "TOKEN_CLASSIFICATION", "QUESTION_ANSWERING"),
        *("MULTIPLE_CHOICE", "NEXT_SENTENCE_PREDICTION", "TABLE_QUESTION_ANSWERING"),
        *("DOCUMENT_QUESTION_ANSWERING",),
    ),
}
OTHER = "Other models"

_INTRO = """# Supported families

Which layers `attach_lora(model)` adapts when nothing else is asked for, read from every model class
of transformers {transformers} and diffusers {diffusers} that can be built without weights. The page
is generated: `make golden` builds each class on the meta device from its default config, plans it
with `plan_lora` and writes the result to `tests/golden/families.json`. A model that is not listed
here is read by the same lexicon; `print(plan_lora(model))` shows the outcome.

Built means that the class could be built from its default config. Right means that every linear
layer inside the repeated blocks has a role or stands in a reviewed table of exceptions, that
transformers' own tensor-parallel plan names no layer whose role is unknown, and that the defaults
are not empty without a reviewed reason.

Frozen by default: routers, embeddings, heads, norms, modulation and time layers, and the towers
named in the last column. Experts are opt-in (`targets="experts"`), and so are towers
(`targets={{"vision": "attention"}}`) and projections around attention (`targets="proj"`).
"""


def kind_of(row: Row) -> str:
    """Returns the kind under which the page lists a class."""
    return next((kind for kind, names in KINDS.items() if row["auto"].keys() & set(names)), OTHER)


def page(rows: dict[str, Row], versions: dict[str, str]) -> str:
    """Returns the page."""
    wrong = {line.partition(":")[0] for line in problems(rows)}
    kinds: dict[str, dict[str, Row]] = {kind: {} for kind in (*KINDS, OTHER)}
    for cls, row in sorted(rows.items()):
        kinds[kind_of(row)][cls] = row
    parts = [_INTRO.format(**versions), _counts(rows, wrong)]
    parts += [_kind(kind, found) for kind, found in kinds.items()]
    return "\n".join([*parts, _unbuilt(rows), _reviewed(rows)])


def _counts(rows: dict[str, Row], wrong: set[str]) -> str:
    """Model types a kind of auto class lists; a type with several heads counts in several kinds."""
    lines = ["| kind | types listed | built | right |", "|---|---|---|---|"]
    for kind, names in (*KINDS.items(), ("all", None)):
        listed = {t for cls, row in rows.items() for t in types_of(cls, row, names)}
        built = {
            t for cls, row in rows.items() if "cause" not in row for t in types_of(cls, row, names)
        }
        broken = {t for cls in wrong for t in types_of(cls, rows[cls], names)}
        lines.append(f"| {kind} | {len(listed)} | {len(built)} | {len(built - broken)} |")
    count = sum("cause" not in row for row in rows.values())
    return "\n".join([*lines, "", f"These are {len(rows)} model classes, {count} of them built."])


def types_of(cls: str, row: Row, autos: Iterable[str] | None = None) -> set[str]:
    """Returns the model types for which some auto classes, or all, list a class."""
    names = row["auto"].keys() if autos is None else row["auto"].keys() & set(autos)
    types = {t for auto in names for t in row["auto"][auto]}
    return {cls} if types == {DIFFUSERS} else types  # diffusers has no model types


def _kind(kind: str, rows: dict[str, Row]) -> str:
    lines = ["", f"## {kind}", ""]
    lines += ["| class | type | default targets | stays frozen |", "|---|---|---|---|"]
    for cls, row in rows.items():
        if "cause" not in row:
            types = ", ".join(sorted(types_of(cls, row) - {cls}))
            lines.append(f"| {cls} | {types} | {_default(cls, row)} | {_frozen(row)} |")
    return "\n".join(lines)


def _default(cls: str, row: Row) -> str:
    """Roles, those of one word together: `attn.{q,k,v,o}`."""
    words: dict[str, list[str]] = {}
    for role in sorted(row["default"], key=list(ROLES).index):
        word, _, part = role.rpartition(".")
        words.setdefault(word, []).append(part)
    if not words:
        return f"none: {why_no_target(cls)}"
    return " ".join(f"{word}.({' '.join(parts)})" for word, parts in words.items())


def _frozen(row: Row) -> str:
    """What a reader would not expect: towers, experts, and reasons of a family."""
    usual = {"never", "outside", "kind", "preset", "unknown"}
    notes: dict[str, tuple[int, list[str]]] = {}
    for why, roles in row["frozen"].items():
        if why not in usual:
            why = re.sub(r"the name '\w+' into", "their name into", why)
            count, names = notes.get(why, (0, []))
            count += sum(n for found in roles.values() for n in found.values())
            notes[why] = (count, names + [role for role in roles if role not in names])
    return "; ".join(
        f"{count} x {why}" + ("" if _plain(why) else f" ({' '.join(names)})")
        for why, (count, names) in notes.items()
    )


def _plain(why: str) -> bool:
    return why == "experts" or why.endswith(" tower")


def _unbuilt(rows: dict[str, Row]) -> str:
    lines = ["", "", "## Not built", "", "| class | type | cause |", "|---|---|---|"]
    for cls, row in sorted(rows.items()):
        if "cause" in row:
            cause = row["cause"].replace("|", "\\|")
            lines.append(f"| {cls} | {', '.join(sorted(types_of(cls, row) - {cls}))} | {cause} |")
    return "\n".join(lines)


def _reviewed(rows: dict[str, Row]) -> str:
    lines = ["", "", "## Reviewed exceptions", ""]
    for cls, found in EXCEPTIONS.items():
        lines += [f"- `{cls}`: {why} ({_listing(p for p in found if found[p] == why)})"
                  for why in dict.fromkeys(found.values())]  # fmt: skip
    for cls, row in sorted(rows.items()):
        if row.get("heads_refused"):
            lines.append(f"- `{cls}`: its head is not trained along: {row['heads_refused']}")
    return "\n".join([*lines, ""])


def _listing(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)
