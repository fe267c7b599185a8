"""What a module does, read off the last segments of its path: the matching of the lexicon.

A role is a dotted word (`attn.q`); its aliases are the names libraries give to that part, each a
dotted suffix of whole path segments (`hf_lora.lexicon`). Longest alias wins, so `gate_proj` (one
segment) is an MLP gate and `self_attn.gate_proj` (two) an attention gate.

Numbers: a segment of digits (layer, expert or list index; also `expert_7`) is skipped, so
`layer.0.SelfAttention.q` reads `layer.SelfAttention.q`; an alias that spells the digit (`ffn.0`)
is compared with the path as it stands. A last segment `weight` is dropped: a parameter has the
role of its module. Matching is case-sensitive and never by substring.

The words:
    attn.*         self-attention: q k v, fused qkv kv qk, o, gate (gates the attention output);
                   low-rank pairs of latent attention: q_a q_b, kv_a kv_b, o_a o_b;
                   the text stream of joint attention: add_q add_k add_v add_qkv add_o;
                   projections shared with the MLP of a single-stream block: qkv_mlp, o_mlp
    cross_attn.*   the same below a segment that names cross-attention
    linear_attn.*  delta nets, mLSTM, lightning: q k v qkv o gate, decay (beta, forget, input gates)
    ssm.*          state-space and recurrent mixers: in, gate, x, dt, out
    conv.*         short-convolution mixers: in, out, kernel (makes the filter from the input)
    mlp.*          gate up down, fused gate_up
    moe.experts.*  routed experts, fused 3-D parameters or one module each; moe.shared.* always on
    block.*        in, out: bottlenecks around a whole block or around all its experts
    the rest       never a default target, see `NEVER`

families.py holds the exceptions.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from types import MappingProxyType

from hf_lora.lexicon import ROLES

__all__ = ["NEVER", "PRESETS", "ROLES", "TOWERS", "expand", "match_alias", "role_of", "tower_of"]

NEVER: Mapping[str, str] = MappingProxyType(
    {
        "moe.router": "router: adapting it changes which experts run",
        "moe.shared_gate": "shared-expert gate: one scalar a token, weighs the shared expert",
        "indexer": "sparse-attention indexer: picks tokens by top-k, so it gets no gradient",
        "position": "relative position, sink or mask term added to the attention scores",
        "sampling": "deformable attention: where it samples, started from a fixed pattern",
        "norm": "normalisation",
        "modulation": "modulation by time or condition: scale, shift and gate of a norm",
        "time": "time embedding",
        "proj": "projection around attention, a block or a stage: opt-in",
        "residual": "residual-stream mixing (AltUp, LAuReL, hyper-connections, gateways)",
        "adapter": "the model's own low-rank adapter",
        "embed": "embedding",
        "lm_head": "language-model head: often tied to the embedding",
        "head": "task head or pooler: trained whole, not by low-rank factors",
    }
)

_ATTENTION_WORDS = ("attn", "cross_attn", "linear_attn")

# Patterns are whole-word prefixes of roles. "all-linear" needs no row: it is every linear inside
# the blocks whose role is not in NEVER.
PRESETS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "default": (*_ATTENTION_WORDS, "ssm", "conv", "mlp", "moe.shared", "block"),
        "attention": _ATTENTION_WORDS,
        # q and v of arXiv 2106.09685, section 4.2; where they are fused, the fused projection.
        "qv": tuple(
            f"{word}.{part}"
            for word, parts in (
                ("attn", ("q", "v", "qkv", "kv", "qk", "q_b", "kv_b", "add_q", "add_v")),
                ("cross_attn", ("q", "v", "qkv", "kv", "add_v")),
            )
            for part in parts
        ),
        "mlp": ("mlp", "moe.shared"),
        "cross-attention": ("cross_attn",),
        "experts": ("moe.experts",),
    }
)

TOWERS: Mapping[str, str] = MappingProxyType(
    {
        **dict.fromkeys(
            ("vision_tower", "vision_model", "vision_encoder", "visual", "image_encoder",
             "image_embed", "img_processor", "vision_embed_tokens", "image_tower", "video_tower",
             "vqmodel"),
            "vision",
        ),
        **dict.fromkeys(
            ("audio_tower", "audio_model", "audio_encoder", "audio_embed", "speech_encoder",
             "acoustic_tokenizer_encoder", "semantic_tokenizer_encoder", "token2wav", "talker",
             "word_timestamp_encoder", "word_timestamp_head", "codec_model"),
            "audio",
        ),
        **dict.fromkeys(
            ("multi_modal_projector", "mm_projector", "projector", "connector",
             "visual_projection", "embed_vision", "embed_audio", "merger",
             "deepstack_merger_list", "merger_list", "perceiver_resampler", "qformer", "aligner",
             "generation_aligner", "glyph_projector", "prior_projector",
             "layerwise_projectors", "spatial_projectors"),
            "projector",
        ),
        # encoders of what a model is conditioned on
        **dict.fromkeys(("protein_encoder", "conditioning_encoder"), "condition"),
        # blt: a language model of its own that only cuts the bytes into patches, without gradient.
        "patcher": "patcher",
    }
)  # fmt: skip

_INDEX_SEGMENT = re.compile(r"(?:expert_)?\d+")  # expert_7: nllb-moe and switch_transformers


def _segments(path: str) -> tuple[str, ...]:
    parts = tuple(path.split("."))
    return parts[:-1] if len(parts) > 1 and parts[-1] == "weight" else parts


@lru_cache(maxsize=8192)
def _suffixes(path: str) -> tuple[str, ...]:
    """Dotted suffixes of `path`, longest first; with and without index segments.

    Args:
        path: Dotted module or parameter path.

    Returns:
        Suffixes by falling number of segments; at equal length the path as it stands comes first.
    """
    written = _segments(path)
    plain = tuple(part for part in written if not _INDEX_SEGMENT.fullmatch(part))
    found: list[str] = []
    for length in range(len(written), 0, -1):
        found += [".".join(parts[-length:]) for parts in (written, plain) if len(parts) >= length]
    return tuple(found)


def match_alias(path: str, aliases: Mapping[str, str]) -> str | None:
    """Looks `path` up in alias -> role; the alias with most segments wins.

    Args:
        path: Dotted module or parameter path.
        aliases: Dotted suffix of whole segments -> role.

    Returns:
        The role, or None.
    """
    return next((aliases[suffix] for suffix in _suffixes(path) if suffix in aliases), None)


_BY_ALIAS: Mapping[str, str] = MappingProxyType(
    {alias: role for role, aliases in ROLES.items() for alias in aliases}
)


def role_of(path: str) -> str | None:
    """Role of the module or parameter at `path` by the lexicon alone, without family knowledge.

    Args:
        path: Dotted path inside the model, for example `model.layers.0.self_attn.q_proj`.

    Returns:
        A key of `ROLES`, or None where no alias fits.
    """
    return match_alias(path, _BY_ALIAS)


def tower_of(path: str) -> str:
    """Tower that `path` lies in; the innermost segment of `TOWERS` decides.

    Args:
        path: Dotted path inside the model.

    Returns:
        "vision", "audio", "projector", "condition", "patcher", or "language" where no segment
        names a tower.
    """
    named = (TOWERS[part] for part in reversed(path.split(".")) if part in TOWERS)
    return next(named, "language")


def _under(pattern: str) -> Iterator[str]:
    yield from (role for role in ROLES if role == pattern or role.startswith(f"{pattern}."))


def expand(preset_or_role: str) -> tuple[str, ...] | None:
    """Roles that a preset, a role or a role prefix stands for.

    A role of `NEVER` is included only when it is named in full: "moe" leaves the router out,
    "moe.router" is the router.

    Args:
        preset_or_role: A key of `PRESETS`, a role, or a whole-word prefix of roles ("attn").

    Returns:
        Roles in lexicon order, or None when the word is none of these ("all-linear" included).
    """
    patterns = PRESETS.get(preset_or_role, (preset_or_role,))
    wanted = {role for pattern in patterns for role in _under(pattern)}
    roles = tuple(role for role in ROLES if role in wanted)
    return tuple(r for r in roles if r not in NEVER or r == preset_or_role) or None
