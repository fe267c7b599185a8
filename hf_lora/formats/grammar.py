"""The keys of foreign files: how they begin, and how they end.

A key names a module of one component and one factor of it. Beginnings say which component and how
module names are written; endings say which factor. Both are tables. Which modules there are is not
known here; see `foreign`.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from hf_lora.errors import BadAdapterFile
from hf_lora.formats.kinds import Loose

DENOISER = ("unet", "transformer", "prior")
ANY = ("*",)  # whichever component has such modules


@dataclass(frozen=True)
class Start:
    """How the keys of one component begin in one format.

    Attributes:
        text: The beginning.
        components: Components it may stand for, the likeliest first; `ANY` for all.
        flat: Whether dots of module paths are written as underscores.
        format: Name of the format, for people.
    """

    text: str
    components: tuple[str, ...]
    flat: bool
    format: str


_KOHYA, _COMFY, _DIFFUSERS = "kohya", "ComfyUI", "diffusers"
_PEFT, _BARE = "peft, without its config", "without component names"
_FIRST, _SECOND = ("text_encoder",), ("text_encoder_2",)
# Class -> what no pipeline has such a model as: the second text encoders of SDXL and SD3 project.
_NEVER = {"CLIPTextModel": _SECOND}
_T5 = ("text_encoder_3", "text_encoder_2", "text_encoder")

# The longest that fits decides. Sources: facts of sd-scripts, ComfyUI, ai-toolkit, OneTrainer,
# LyCORIS and diffusers 0.42.1 on what their files look like.
STARTS = (
    Start("lora_unet_", DENOISER, True, _KOHYA),
    Start("lora_unet__", DENOISER, True, _KOHYA),  # Wan-Fun
    Start("lora_te_", _FIRST, True, _KOHYA),
    Start("lora_te1_", _FIRST, True, _KOHYA),
    Start("lora_te2_", _SECOND, True, _KOHYA),
    Start("lora_te3_", _T5, True, _KOHYA),
    Start("lora_transformer_", DENOISER, True, "OneTrainer"),
    Start("lora_prior_unet_", ("prior",), True, _KOHYA),
    Start("lycoris_", ANY, True, "LyCORIS"),
    Start("diffusion_model.", DENOISER, False, _COMFY),
    Start("model.diffusion_model.", DENOISER, False, _COMFY),
    Start("text_encoders.clip_l.", _FIRST, False, _COMFY),
    Start("text_encoders.clip_l.transformer.", _FIRST, False, _COMFY),
    Start("text_encoders.clip_g.", _SECOND, False, _COMFY),
    Start("text_encoders.clip_g.transformer.", _SECOND, False, _COMFY),
    Start("text_encoders.t5xxl.", _T5, False, _COMFY),
    Start("text_encoders.t5xxl.transformer.", _T5, False, _COMFY),
    Start("base_model.model.", ANY, False, _PEFT),
    *(
        Start(f"{name}.", (name,), False, _DIFFUSERS)
        for name in (
            "unet", "transformer", "transformer_2", "transformer_ref", "prior", "text_encoder",
            "text_encoder_2", "text_encoder_3", "connectors", "text_conditioner",
        )
    ),
    Start("", ANY, False, _BARE),
)  # fmt: skip
_PLAIN = (_DIFFUSERS, _PEFT, _BARE)
_BY_LENGTH = sorted(STARTS, key=lambda start: -len(start.text))

# How keys end -> the factor. `\1` of a pattern belongs to the module's name.
ENDS = {
    **{f".lora_{end}.weight": f"lora_{factor}" for end, factor in (
        ("down", "A"), ("up", "B"), ("A", "A"), ("B", "B"), ("mid", "mid"),
        ("A.default", "A"), ("B.default", "B"),
    )},
    **{f".lora_{end}": f"lora_{end}" for end in ("A", "B")},
    **{f".{kind}.{end}.weight": f"lora_{factor}" for kind in ("lora", "lora_linear_layer")
       for end, factor in (("down", "A"), ("up", "B"))},
    ".lora_B.bias": "lora_B.bias",
    ".lora_up.bias": "lora_B.bias",
    ".lora_magnitude_vector": "lora_magnitude_vector",
    ".lora_magnitude_vector.weight": "lora_magnitude_vector",
    ".lora_magnitude_vector.default.weight": "lora_magnitude_vector",
    **{f".{name}": name for name in (
        "alpha", "dora_scale", "diff", "diff_b", "w_norm", "b_norm", "set_weight",
        "reshape_weight", "on_input", "rescale", "oft_blocks", "oft_diag", "scalar",
        "p_layer.weight", "q_layer.weight", "lambda_layer", "weight", "bias",
        *(f"hada_{x}" for x in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")),
        *(f"lokr_{x}" for x in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")),
        *(f"{x}.weight" for x in ("a1", "a2", "b1", "b2", "bm")),
    )},
}  # fmt: skip
# IA3's, which end every other tensor of a model as well: only behind a flat name
_FLAT_ONLY = {".weight", ".bias"}
_SEGMENTS = max(end.count(".") for end in ENDS)

# diffusers' attention processors, until 2023: the factor stands beside the projection, not in it.
_PROCESSOR = re.compile(r"(.+?)(?:\.processor)?\.(to_[qkv]|to_out)_lora\.(down|up)\.weight")
_PROJECTIONS = {"to_q": "to_q", "to_k": "to_k", "to_v": "to_v", "to_out": "to_out.0"}
_IN_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
OLD = "diffusers, old"


@dataclass(frozen=True)
class Group:
    """The modules of a file whose keys begin alike.

    Attributes:
        start: How they begin.
        layers: Module name as the file writes it -> its factors.
    """

    start: Start
    layers: Mapping[str, Loose]


def grouped(tensors: Mapping[str, Tensor]) -> tuple[list[Group], list[str]]:
    """Sorts the keys of a file into groups by how they begin.

    Returns:
        The groups, and the keys that end in no factor known here.

    Raises:
        BadAdapterFile: Two keys spell one factor of one module.
    """
    found: dict[Start, dict[str, dict[str, Tensor]]] = defaultdict(lambda: defaultdict(dict))
    keys: dict[tuple[str, str], list[str]] = defaultdict(list)
    strange = []
    for key, tensor in sorted(tensors.items()):
        start, name, factor = parsed(key)
        if not (name and factor):
            strange.append(key)
            continue
        held = found[start][name]
        if factor in held:
            raise BadAdapterFile(f"{key} stands twice, under two spellings", field=key)
        held[factor] = tensor
        keys[start.text, name].append(key)
    groups = [
        Group(start, {n: Loose(f, tuple(keys[start.text, n])) for n, f in layers.items()})
        for start, layers in found.items()
    ]
    return groups, strange


def parsed(key: str) -> tuple[Start, str, str]:
    """Returns how a key begins, the module's name, and the factor; empty texts for none."""
    start = next(s for s in _BY_LENGTH if key.startswith(s.text))
    rest = key[len(start.text) :]
    old = _PROCESSOR.fullmatch(rest)
    if old and not start.flat:
        projections = _IN_TEXT if start.text.startswith("text_") else _PROJECTIONS
        name = f"{old[1]}.{projections[old[2]]}"
        return start, name, {"down": "lora_A", "up": "lora_B"}[old[3]]
    name, factor = _cut(rest, 1 if start.flat else 0)
    return start, name, factor


def part_of(start: Start) -> str:
    """Returns which part of a pipeline keys are of that begin so; empty for any."""
    if start.components == ANY:
        return ""
    return "the denoiser" if {*start.components} & {*DENOISER} else start.components[0]


def is_never(start: Start, kind: str) -> bool:
    """Tells whether a model of this class is no component that keys may be of that begin so."""
    return _NEVER.get(kind) == start.components


def is_of_others(key: str) -> bool:
    """Tells whether neither diffusers nor peft writes such a key."""
    start = next(s for s in _BY_LENGTH if key.startswith(s.text))
    return start.format not in _PLAIN or key.endswith(".alpha")


def _cut(rest: str, dots: int) -> tuple[str, str]:
    """Cuts the longest known ending off; names of flat keys end at the first dot."""
    if dots:
        name, dot, end = rest.partition(".")
        return name, ENDS.get(f"{dot}{end}", "")
    segments = rest.split(".")
    for count in range(min(_SEGMENTS, len(segments) - 1), 0, -1):
        end = "." + ".".join(segments[-count:])
        if end in ENDS and end not in _FLAT_ONLY:
            return ".".join(segments[:-count]), ENDS[end]
    return rest, ""


def format_of(groups: Iterable[Group]) -> str:
    """Returns what the formats of the groups are called, each once."""
    names = dict.fromkeys(
        OLD if any(_is_old(key) for layer in group.layers.values() for key in layer.keys)
        else group.start.format
        for group in groups
    )  # fmt: skip
    return " and ".join(names)


def _is_old(key: str) -> bool:
    return "_lora." in key or ".lora_linear_layer." in key
