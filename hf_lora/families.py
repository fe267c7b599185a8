"""Families: rows of knowledge for the model types on which the lexicon is wrong or too generous.

A family overrides aliases (`roles`), takes roles out of the defaults with a reason (`frozen`), and
names towers that the shared table cannot know (`towers`). A type that the lexicon reads right has
no row. Third parties add rows with `register_family`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from hf_lora.errors import InvalidOption, closest
from hf_lora.roles import ROLES, TOWERS, match_alias, role_of, tower_of

__all__ = [
    "DENOISER",
    "FAMILIES",
    "LANGUAGE",
    "Defaults",
    "Family",
    "defaults_of",
    "family_of",
    "frozen_in",
    "register_family",
    "role_in",
    "tower_in",
    "unregister_family",
]


@dataclass(frozen=True, eq=False)
class Family:
    """One row: which models it speaks for, and what differs there from the lexicon.

    Attributes:
        name: Unique name of the row.
        model_types: Values of `config.model_type` that the row claims.
        classes: Class names that the row claims; for models without a `model_type`, such as those
            of diffusers. Subclasses inherit the claim.
        roles: Role -> alias or aliases (dotted suffixes of whole segments, see `hf_lora.roles`),
            asked before the lexicon.
        frozen: Role -> why it is no default target here.
        towers: Whole segments, dotted, that may stand anywhere in a path -> tower. Asked before
            `hf_lora.roles.TOWERS`; the name of a tower is one of its values or "language".
        main: Towers that are the trunk, whose layers are default targets; left out, language, or
            all but projectors where nothing is language.
        denoiser: Whether it is the denoiser of a diffusion pipeline, with the defaults of one; what
            diffusers defines is one without a row.
        source: Library, version and file the row was read from.

    Raises:
        InvalidOption: The row claims no model, has no source, or uses an unknown role or tower.
    """

    name: str
    model_types: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    roles: Mapping[str, str | tuple[str, ...]] = field(default_factory=dict)
    frozen: Mapping[str, str] = field(default_factory=dict)
    towers: Mapping[str, str] = field(default_factory=dict)
    main: tuple[str, ...] = ()
    denoiser: bool = False
    source: str = ""

    def __post_init__(self) -> None:
        if not self.name or not self.source:
            raise InvalidOption(
                f"family {self.name!r} lacks a name or a source",
                fix='Name both, for example source="transformers 5.23.0 models/mamba".',
            )
        if not self.model_types and not self.classes:
            raise InvalidOption(
                f"family {self.name!r} claims no model", fix="Give model_types or classes."
            )
        _check_known(self.name, "role", [*self.roles, *self.frozen], ROLES)
        towers = [*self.towers.values(), *self.main]
        _check_known(self.name, "tower", towers, [*TOWERS.values(), "language"])

    @property
    def claims(self) -> tuple[str, ...]:
        """Model types and class names together: what no other row may claim."""
        return (*self.model_types, *self.classes)

    @cached_property
    def by_alias(self) -> Mapping[str, str]:
        """Alias -> role of this row alone."""
        return {
            alias: role
            for role, aliases in self.roles.items()
            for alias in ((aliases,) if isinstance(aliases, str) else aliases)
        }


def _check_known(name: str, kind: str, used: Iterable[str], known: Iterable[str]) -> None:
    pool = list(dict.fromkeys(known))
    for word in used:
        if word not in pool:
            raise InvalidOption(
                f"family {name!r} uses the unknown {kind} {word!r}",
                fix=f"Closest: {', '.join(closest(word, pool))}.",
            )


_SKIPPED = "the fused training kernel reads this weight without calling the layer"
_OUT_FROZEN = {"ssm.out": f"{_SKIPPED}; peft refuses it on Mamba types"}
_HYBRID_OUT = "layers.linear"  # zamba: brings the shared transformer's output into a mamba layer

FAMILIES: tuple[Family, ...] = (
    Family(
        "mamba",
        model_types=("mamba", "falcon_mamba"),
        frozen={"ssm.x": _SKIPPED, "ssm.dt": _SKIPPED, **_OUT_FROZEN},
        source="transformers 5.23.0 models/mamba/modeling_mamba.py (mamba_inner_fn); "
        "peft 0.21.2 tuners/tuners_utils.py (_check_lora_target_modules_mamba)",
    ),
    Family(
        "mamba2",
        model_types=("mamba2", "falcon_h1", "nemotron_h"),
        frozen=_OUT_FROZEN,
        source="transformers 5.23.0 models/mamba2/modeling_mamba2.py "
        "(mamba2_split_conv1d_scan_combined, outproj_weight=); "
        "peft 0.21.2 tuners/tuners_utils.py (_check_lora_target_modules_mamba)",
    ),
    Family(
        "bamba",
        model_types=("bamba", "granitemoehybrid"),
        frozen={"ssm.out": _SKIPPED},
        source="transformers 5.23.0 models/bamba/modeling_bamba.py (outproj_weight=)",
    ),
    Family(
        "jamba",
        model_types=("jamba",),
        frozen={"ssm.dt": "the forward multiplies by dt_proj.weight without calling the layer"},
        source="transformers 5.23.0 models/jamba/modeling_jamba.py (JambaMambaMixer.forward)",
    ),
    Family(
        "zamba",
        model_types=("zamba",),
        roles={"block.out": _HYBRID_OUT},
        source="transformers 5.23.0 models/zamba/modeling_zamba.py (ZambaHybridLayer)",
    ),
    Family(
        "zamba2",
        model_types=("zamba2",),
        roles={"block.out": _HYBRID_OUT},
        frozen={"ssm.out": _SKIPPED},
        source="transformers 5.23.0 models/zamba2/modeling_zamba2.py "
        "(Zamba2HybridLayer; outproj_weight=)",
    ),
    Family(
        "rwkv",
        model_types=("rwkv",),
        frozen=dict.fromkeys(
            ("attn.o", "mlp.down"),
            "evaluation divides this weight by powers of two (rescale_every), not the LoRA on it",
        ),
        source="transformers 5.23.0 models/rwkv/modeling_rwkv.py (_rescale_layers)",
    ),
    Family(
        "reformer",
        model_types=("reformer",),
        frozen=dict.fromkeys(
            ("attn.qk", "attn.v"),
            "cached generation multiplies by this weight without calling the layer",
        ),
        source="transformers 5.23.0 models/reformer/modeling_reformer.py (_query_per_attn_head)",
    ),
    Family(
        "ctrl",
        model_types=("ctrl",),
        roles={"mlp.up": "ffn.0", "mlp.down": "ffn.2"},
        source="transformers 5.23.0 models/ctrl/modeling_ctrl.py (point_wise_feed_forward_network)",
    ),
    Family(
        "jetmoe",
        model_types=("jetmoe",),
        # Attention has experts too: input_linear makes the query, output_linear the output.
        roles={
            "moe.experts.gate_up": "mlp.input_linear",
            "moe.experts.up": "self_attention.experts.input_linear",
            "moe.experts.down": ("mlp.output_linear", "self_attention.experts.output_linear"),
        },
        source="transformers 5.23.0 models/jetmoe/modeling_jetmoe.py (JetMoeMoE, JetMoeMoA)",
    ),
    Family(
        "standalone_decoder",
        classes=(
            *("BartForCausalLM", "BigBirdPegasusForCausalLM", "BlenderbotForCausalLM"),
            *("BlenderbotSmallForCausalLM", "MarianForCausalLM", "MBartForCausalLM"),
            *("MvpForCausalLM", "PegasusForCausalLM", "PLBartForCausalLM"),
            *("ProphetNetForCausalLM", "TrOCRForCausalLM", "WhisperForCausalLM"),
        ),
        frozen=dict.fromkeys(
            ("cross_attn.q", "cross_attn.k", "cross_attn.v", "cross_attn.o"),
            "a decoder on its own runs cross-attention only when given encoder_hidden_states",
        ),
        source="transformers 5.23.0 models/bart/modeling_bart.py (BartDecoderLayer.forward) "
        "and the same place of the others",
    ),
    Family(
        "deepseek_v4",
        model_types=("deepseek_v4",),
        frozen={"attn.o_a": "block-diagonal over head groups: a plain LoRA has the wrong shape"},
        source="transformers 5.23.0 models/deepseek_v4/modeling_deepseek_v4.py "
        "(DeepseekV4GroupedLinear)",
    ),
    Family(
        "granite_speech",
        model_types=("granite_speech", "granite_speech_plus"),
        towers={"encoder.layers": "audio"},  # the conformer has no name of its own
        source="transformers 5.23.0 models/granite_speech/modeling_granite_speech.py "
        "(GraniteSpeechCTCEncoder)",
    ),
    Family(
        "squeezebert",
        model_types=("squeezebert",),
        # Every projection is a grouped 1x1 convolution, so only a request by role reaches them.
        roles={
            "attn.o": "post_attention.conv1d",
            "mlp.up": "intermediate.conv1d",
            "mlp.down": "output.conv1d",
        },
        source="transformers 5.23.0 models/squeezebert/modeling_squeezebert.py (SqueezeBertModule)",
    ),
)

_claimed: dict[str, Family] = {}


def register_family(family: Family) -> Family:
    """Adds a row; the models it claims use it from now on.

    Args:
        family: The row. Its model types and classes must be free.

    Returns:
        The same row, so that the call can stand around the constructor.

    Raises:
        InvalidOption: Another row already claims one of its model types or classes.
    """
    for claim in family.claims:
        other = _claimed.get(claim)
        if other is not None and other is not family:
            raise InvalidOption(
                f"families {other.name!r} and {family.name!r} both claim {claim!r}",
                fix=f"Leave {claim!r} out of {family.name!r}, or unregister {other.name!r} first.",
            )
    _claimed.update(dict.fromkeys(family.claims, family))
    return family


def unregister_family(family: Family) -> None:
    """Takes a row out again; what it claimed is read by the lexicon alone."""
    for claim in family.claims:
        if _claimed.get(claim) is family:
            del _claimed[claim]


for _row in FAMILIES:
    register_family(_row)


def family_of(host_or_config: object) -> Family | None:
    """Row that speaks for a model or config, or None.

    The class of a model comes first, then `model_type`, then that of `text_config`: a
    vision-language model around a Mamba is a Mamba where it matters.

    Args:
        host_or_config: A model, a config, or anything; what has neither gives None.
    """
    config = getattr(host_or_config, "config", None) or host_or_config
    names = [cls.__name__ for cls in type(host_or_config).__mro__]
    for part in (config, getattr(config, "text_config", None)):
        model_type = getattr(part, "model_type", None)
        if isinstance(model_type, str):
            names.append(model_type)
    return next((_claimed[name] for name in names if name in _claimed), None)


@dataclass(frozen=True)
class Defaults:
    """What an adapter is when the user asks for nothing in particular.

    Attributes:
        preset: The preset that `targets="default"` means.
        alpha: Alpha; None for alpha = rank.
        init: peft's `init_lora_weights`.
    """

    preset: str
    alpha: float | None
    init: bool | Literal["gaussian"]


# alpha/rank with a fixed alpha keeps the best learning rate independent of rank; 32 is twice the
# default rank. Denoisers: as diffusers' own training scripts (0.42.1 examples/text_to_image).
LANGUAGE = Defaults("default", 32, True)
DENOISER = Defaults("attention", None, "gaussian")


def defaults_of(host: object) -> Defaults:
    """Defaults for a model: those of denoisers for what diffusers defines or a row says is one."""
    family = family_of(host)
    if family is not None and family.denoiser:
        return DENOISER
    libraries = {cls.__module__.partition(".")[0] for cls in type(host).__mro__}
    return DENOISER if "diffusers" in libraries else LANGUAGE


def role_in(path: str, family: Family | None) -> str | None:
    """Role of the module or parameter at `path`: the family's aliases first, then the lexicon."""
    own = match_alias(path, family.by_alias) if family else None
    return own or role_of(path)


def frozen_in(path: str, family: Family | None) -> str:
    """Why the family keeps the module at `path` out of the defaults; empty when it does not."""
    role = role_in(path, family)
    return family.frozen.get(role, "") if family and role else ""


def tower_in(path: str, family: Family | None) -> str:
    """Tower that `path` lies in: the family's towers first, then `hf_lora.roles.tower_of`."""
    rows = family.towers if family else {}
    inside = (tower for run, tower in rows.items() if f".{run}." in f".{path}.")
    return next(inside, "") or tower_of(path)
