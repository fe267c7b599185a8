"""Rows of families: the model types on which the lexicon is wrong or too generous.

A family overrides aliases (`roles`), takes roles out of the defaults with a reason (`frozen`),
names towers that the shared table cannot know (`towers`), and says which are the trunk (`main`). A
type that the lexicon reads right has no row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from hf_lora.errors import InvalidOption, closest
from hf_lora.fused import Split
from hf_lora.roles import ROLES, TOWERS

__all__ = ["FAMILIES", "Family"]


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
        split: How the fused projections of q, k and v are cut: the config -> a
            `hf_lora.fused.Split`, asked before the table there.
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
    split: Callable[[Any], Split] | None = None
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
    Family(
        "wavlm",
        model_types=("wavlm",),
        frozen=dict.fromkeys(
            ("attn.q", "attn.k", "attn.v", "attn.o"),
            "F.multi_head_attention_forward reads this weight without calling the layer",
        ),
        source="transformers 5.23.0 models/wavlm/modeling_wavlm.py "
        "(WavLMAttention.torch_multi_head_self_attention)",
    ),
    Family(
        "dual_encoder",
        model_types=(
            *("aimv2", "align", "altclip", "bridgetower", "chinese_clip", "clip", "clipseg"),
            *("depth_pro", "groupvit", "metaclip_2", "owlv2", "owlvit", "siglip", "siglip2"),
            *("tipsv2", "videoprism", "vision-text-dual-encoder"),
        ),
        classes=("BlipModel", "BlipForImageTextRetrieval"),
        main=("language", "vision"),
        source="transformers 5.23.0 models/clip/modeling_clip.py (CLIPModel) and the same place of "
        "the others",
    ),
    Family(
        "segment_anything",
        model_types=(
            *("edgetam", "edgetam_video", "sam", "sam2", "sam2_video", "sam3", "sam3_lite_text"),
            *("sam3_tracker", "sam3_tracker_video", "sam3_video", "sam_hq"),
        ),
        main=("language", "vision"),  # the decoder's layers have no name of their own
        source="transformers 5.23.0 models/sam/modeling_sam.py (SamModel) and its relatives",
    ),
    Family(
        "xclip",
        model_types=("xclip",),
        roles={"mlp.down": "mlp.3"},
        main=("language", "vision"),
        source="transformers 5.23.0 models/x_clip/modeling_x_clip.py (XCLIPPromptGenerator)",
    ),
    Family(
        "audio_text_encoder",
        model_types=("clap", "pe_audio", "pe_audio_video", "pe_video"),
        main=("language", "audio", "vision"),
        source="transformers 5.23.0 models/clap/modeling_clap.py (ClapModel), pe_audio alike",
    ),
    Family(
        "q_former_retrieval",
        classes=("Blip2ForImageTextRetrieval",),
        main=("vision", "projector"),  # the Q-Former reads the text
        source="transformers 5.23.0 models/blip_2/modeling_blip_2.py (Blip2ForImageTextRetrieval)",
    ),
    Family(
        "musicgen",
        model_types=("musicgen", "musicgen_melody"),
        towers={"text_encoder": "condition"},
        source="transformers 5.23.0 models/musicgen/modeling_musicgen.py (freeze_text_encoder)",
    ),
    Family(
        "vjepa2_classifier",
        classes=("VJEPA2ForVideoClassification",),
        towers={"vjepa2.predictor": "condition"},  # the forward passes skip_predictor=True
        source="transformers 5.23.0 models/vjepa2/modeling_vjepa2.py "
        "(VJEPA2ForVideoClassification.forward)",
    ),
    Family(
        "superglue",
        model_types=("superglue",),
        roles={"mlp.up": "mlp.linear", "mlp.down": "mlp.1"},
        source="transformers 5.23.0 models/superglue/modeling_superglue.py (SuperGlueGNN)",
    ),
    Family(
        "flux2",
        classes=("Flux2Transformer2DModel",),
        roles={"attn.o_mlp": "single_transformer_blocks.attn.to_out"},
        source="diffusers 0.42.1 models/transformers/transformer_flux2.py "
        "(Flux2ParallelSelfAttention)",
    ),
    Family(
        "glu_feed_forward",
        classes=(
            *("ControlNetModel", "DreamLiteUNetModel", "MiniMaxH3Transformer3DModel"),
            *("MochiTransformer3DModel", "NucleusMoEImageTransformer2DModel"),
            *("OvisImageTransformer2DModel", "UNet2DConditionModel", "UNetControlNetXSModel"),
            *("UNetSpatioTemporalConditionModel", "UVit2DModel", "AudioLDM2UNet2DConditionModel"),
        ),
        roles={"mlp.gate_up": "net.0.proj"},  # GEGLU and SwiGLU hold both halves in one matrix
        source="diffusers 0.42.1 models/activations.py (GEGLU, SwiGLU) and models/attention.py "
        "(FeedForward)",
    ),
    Family(
        "unet_motion",
        classes=("UNetMotionModel", "UNet3DConditionModel"),
        roles={
            "mlp.gate_up": "net.0.proj",
            # over the frames: both attentions of such a block are self-attention
            **{
                f"attn.{part}": (
                    f"motion_modules.transformer_blocks.attn2.to_{name}",
                    f"temp_attentions.transformer_blocks.attn2.to_{name}",
                )
                for part, name in (("q", "q"), ("k", "k"), ("v", "v"), ("o", "out"))
            },
        },
        source="diffusers 0.42.1 models/unets/unet_motion_model.py, unet_3d_blocks.py "
        "(double_self_attention=True)",
    ),
)
