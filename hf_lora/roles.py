"""What a module does, read off the last segments of its path: one inverted lexicon.

A role is a dotted word (`attn.q`); its aliases are the names libraries give to that part, each a
dotted suffix of whole path segments. Longest alias wins, so `gate_proj` (one segment) is an MLP
gate and `self_attn.gate_proj` (two) an attention gate. A leaf that means different things
(`out_proj`, `dense`, `c_proj`, `output`, `wo`) is listed only with the parent that settles it.

Numbers: a segment of digits (layer, expert or list index; also `expert_7`) is skipped, so
`layer.0.SelfAttention.q` reads `layer.SelfAttention.q`; an alias that spells the digit (`ffn.0`)
is compared with the path as it stands. A last segment `weight` is dropped: a parameter has the
role of its module. Matching is case-sensitive and never by substring.

The words:
    attn.*         self-attention: q k v, fused qkv kv qk, o, gate (gates the attention output);
                   low-rank pairs of latent attention: q_a q_b, kv_a kv_b, o_a o_b
    cross_attn.*   the same below a segment that names cross-attention
    linear_attn.*  delta nets, mLSTM, lightning: q k v qkv o gate, decay (beta, forget, input gates)
    ssm.*          state-space and recurrent mixers: in, gate, x, dt, out
    conv.*         short-convolution mixers: in, out, kernel (makes the filter from the input)
    mlp.*          gate up down, fused gate_up
    moe.experts.*  routed experts, fused 3-D parameters or one module each; moe.shared.* always on
    block.*        in, out: bottlenecks around a whole block or around all its experts
    the rest       never a default target, see `NEVER`

The roles describe language models of transformers 5.23.0; families.py holds the exceptions.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from types import MappingProxyType

__all__ = ["NEVER", "PRESETS", "ROLES", "TOWERS", "expand", "match_alias", "role_of", "tower_of"]

_CROSS_PARENTS = (
    "EncDecAttention",  # t5
    "encoder_attn",  # bart
    "cross_attn",  # mllama, t5gemma, prophetnet
    "cross_attn_layers",  # blt
    "cross_attention",  # nllb-moe, seamless_m4t
    "crossattention",  # gpt2
    "crossattention.self",  # bert
    "crossattention.attention",  # blip-2 style Q-Formers
    "cross_attention.attention.self",  # perceiver
)

_ATTENTION: dict[str, tuple[str, ...]] = {
    "attn.q": (
        "q_proj", "query", "q", "wq", "Wq", "query_proj", "q_lin", "q_head", "to_q", "project_q",
        "q_proj.linear",  # moshi
        "linear_q",
        "query_global",  # longformer, led: the global-attention copy of the query
        "e2e_query", "e2w_query", "w2e_query",  # luke: word/entity pairs
    ),
    "attn.k": (
        "k_proj", "key", "k", "wk", "Wk", "key_proj", "k_lin", "k_head", "to_k", "project_k",
        "k_proj.linear", "key_global", "linear_k",
    ),
    "attn.v": (
        "v_proj", "value", "v", "wv", "Wv", "value_proj", "v_lin", "v_head", "to_v", "project_v",
        "v_proj.linear", "value_global", "linear_v",
        "v_proj_current", "v_proj_delayed",  # zaya: halves of v, of this token and the one before
    ),
    "attn.qkv": (
        "query_key_value", "qkv_proj", "Wqkv", "wqkv", "qkv", "to_qkv",
        "attn.c_attn",  # gpt2
        "self.in_proj",  # deberta (v1)
    ),
    "attn.kv": ("kv_proj", "to_kv", "attn.kv"),
    "attn.qk": ("query_key",),  # reformer's LSH attention shares one projection
    "attn.o": (
        "o_proj", "o_proj.linear", "out_lin", "attention_out",
        "self_attn.out_proj", "attn.out_proj", "attention.out_proj",
        "attention.output.dense", "attention.dense", "attn.dense", "self_attn.dense",
        "self_attention.dense", "self_attention.output.dense", "multi_head_attention.dense",
        "attn.c_proj", "attn.proj", "attn.Wo", "attn.o", "SelfAttention.o", "LocalSelfAttention.o",
        "TransientGlobalSelfAttention.o", "attention.wo", "attention.output", "self_attn.output",
        "attention.post_proj", "attn.to_out", "attention.to_out",
        # of vision and audio towers
        "self_attn.projection", "self_attn.projection_layer", "attention.projection_layer",
        "self_attn.linear_out", "channel_attn.proj", "window_attn.proj", "attention.post",
    ),
    "attn.gate": (
        "self_attn.gate_proj", "self_attn.g_proj", "self_attn.output_gate", "q_gate_proj",
        "g_a_proj", "g_b_proj",  # kimi_linear: low-rank pair
        "output_projection.gate_proj",  # neomme
        "compressor.gate_proj",  # deepseek_v4: pools keys and values
        "attention.receptance",  # rwkv
    ),
    "attn.q_a": ("q_a_proj",),
    "attn.q_b": ("q_b_proj",),
    "attn.kv_a": ("kv_a_proj_with_mqa", "kv_a_proj"),
    "attn.kv_b": ("kv_b_proj",),
    "attn.o_a": ("o_a_proj",),
    "attn.o_b": ("o_b_proj",),
}  # fmt: skip

_CROSS_ONLY: dict[str, tuple[str, ...]] = {
    "cross_attn.q": ("crossattention.q_attn",),  # gpt2
    "cross_attn.kv": ("crossattention.c_attn",),  # gpt2: q has its own layer here
    "cross_attn.o": (
        "crossattention.output.dense", "cross_attention.attention.output.dense",
        "crossattention.c_proj", "encoder_attn.out_proj", "cross_attn.out_proj",
        "cross_attention.out_proj", "encoder_attn.output", "EncDecAttention.o",
    ),
}  # fmt: skip

_MIXERS: dict[str, tuple[str, ...]] = {
    "linear_attn.q": ("linear_attn.q_proj", "mlstm_layer.q"),
    "linear_attn.k": ("linear_attn.k_proj", "mlstm_layer.k"),
    "linear_attn.v": ("linear_attn.v_proj", "mlstm_layer.v"),
    "linear_attn.qkv": ("in_proj_qkv", "in_proj_qkvz"),
    "linear_attn.o": ("linear_attn.out_proj", "linear_attn.o_proj", "mlstm_layer.out_proj"),
    "linear_attn.gate": ("in_proj_z", "linear_attn.g_proj", "ogate_preact"),
    "linear_attn.decay": (
        "in_proj_ba", "in_proj_a", "in_proj_b", "linear_attn.a_proj", "linear_attn.b_proj",
        "self_attn.b_proj", "f_proj", "f_a_proj", "f_b_proj",  # kimi_linear, bailing_hybrid
        "igate_preact", "fgate_preact",  # xlstm
    ),
    "ssm.in": ("mixer.in_proj", "mamba.in_proj", "temporal_block.linear_x"),
    "ssm.gate": ("temporal_block.linear_y",),  # recurrent_gemma
    "ssm.x": ("x_proj",),
    "ssm.dt": ("mixer.dt_proj", "mamba.dt_proj"),
    "ssm.out": ("mixer.out_proj", "mamba.out_proj", "temporal_block.linear_out"),
    "conv.in": ("conv.in_proj", "linear_start", "conv_out_layer"),  # last: convbert
    "conv.out": ("conv.out_proj", "linear_end"),
    "conv.kernel": ("conv_kernel_layer", "k_sconv.weight_proj", "v_sconv.weight_proj"),
}  # fmt: skip

_MLP: dict[str, tuple[str, ...]] = {
    "mlp.gate": (
        "gate_proj", "wi_0", "feed_forward.w1", "w_in.w_0", "proj_up_gate",
        "feed_forward.receptance",  # rwkv: sigmoid gate of the channel mix
    ),
    "mlp.up": (
        "up_proj", "wi_1", "feed_forward.w3", "w_in.w_1", "proj_up",
        "fc1", "fc_in", "lin1", "linear1", "linear_fc1", "intermediate_dense", "ffw_layer_1",
        "mlp.c_fc", "dense_h_to_4h", "mlp.dense1", "mlp.wi",
        "DenseReluDense.wi", "intermediate.dense", "intermediate_query.dense",
        "feed_forward.dense.dense", "feed_forward.intermediate", "feed_forward.key",
        "ff.layer_1", "ffn.linear_1", "albert_layers.ffn",
    ),
    "mlp.down": (
        "down_proj", "feed_forward.w2", "ffn.w_out", "proj_down",
        "fc2", "fc_out", "lin2", "linear2", "linear_fc2", "output_dense", "ffw_layer_2",
        "mlp.c_proj", "dense_4h_to_h", "mlp.dense2", "mlp.wo", "mlp.Wo",
        "DenseReluDense.wo", "output.dense", "output_query.dense",
        "feed_forward.output", "feed_forward.value",
        "ff.layer_2", "ffn.linear_2", "ffn_output",
    ),
    "mlp.gate_up": ("gate_up_proj", "mlp.Wi"),
    # mobilebert around a block, muse_spark around all experts
    "block.in": ("bottleneck.input.dense", "bottleneck.attention.dense", "pre_expert_proj"),
    "block.out": ("output.bottleneck.dense", "post_expert_proj"),
    "moe.experts.gate": ("experts.gate_proj", "experts.w1"),
    "moe.experts.up": ("experts.up_proj", "experts.w3", "experts.fc1", "experts.wi"),
    "moe.experts.down": ("experts.down_proj", "experts.w2", "experts.fc2", "experts.wo"),
    "moe.experts.gate_up": ("experts.gate_up_proj",),
    "moe.shared.gate": (
        "shared_expert.gate_proj", "shared_experts.gate_proj", "shared_mlp.gate_proj",
    ),
    "moe.shared.up": ("shared_expert.up_proj", "shared_experts.up_proj", "shared_mlp.up_proj"),
    "moe.shared.down": (
        "shared_expert.down_proj", "shared_experts.down_proj", "shared_mlp.down_proj",
        "shared_mlp.output_linear",  # granitemoehybrid
    ),
    "moe.shared.gate_up": (
        "shared_expert.gate_up_proj", "shared_experts.gate_up_proj", "shared_mlp.gate_up_proj",
        "shared_mlp.input_linear",
    ),
}  # fmt: skip

_UNTARGETED: dict[str, tuple[str, ...]] = {
    "moe.router": (
        "router", "mlp.gate", "block_sparse_moe.gate", "feed_forward.gate", "router.gate",
        "router.classifier", "router.layer", "router.proj", "router_gate", "gate.down_proj",
        "router_mlp.fc1", "router_mlp.fc2", "router_mlp.out_proj",  # zaya
        "gate.wg",  # hunyuan_v1_moe
    ),
    "moe.shared_gate": ("shared_expert_gate",),
    "indexer": (
        "indexer.wq_b", "indexer.wk", "indexer.weights_proj", "scorer.weights_proj",
        "indexer.q_b_proj", "indexer.kv_proj", "indexer.gate_proj", "index_qk_proj",
    ),
    "position": (
        "relative_pos_embeddings", "relative_attention_bias", "pos_proj", "pos_q_proj",
        "pos_key_proj", "pos_query_proj", "linear_pos", "relative_k_proj",
        "self_attn.r_proj", "sink_proj",  # inkling: relative term, attention sink
        "self_attn.dt_proj",  # doge: dynamic mask
    ),
    "norm": ("ada_rms_norm.linear1", "ada_rms_norm.linear2"),  # voxtral_realtime
    "residual": (
        "modality_router", "prediction_coefs", "correction_coefs", "altup_projections",
        "altup_unembed_projections", "laurel.linear_left", "laurel.linear_right",  # gemma3n
        "input_mix_weight_down", "input_mix_weight_up", "block_inject_weight",  # qwen4_exp
    ),
    "adapter": (
        "gate_up_proj_adapter_list", "linear_q_adapter_list", "linear_k_adapter_list",
        "linear_v_adapter_list",  # zamba2
    ),
    "embed": (
        "embed_tokens", "wte", "wpe", "shared", "word_embeddings", "position_embeddings",
        "token_type_embeddings", "embeddings_project", "embedding_hidden_mapping_in",
        "per_layer_input_gate", "per_layer_projection", "per_layer_model_projection",  # gemma3n
        "ple.key_proj", "ple.value_proj",  # qwen4_exp: n-gram embeddings
    ),
    "lm_head": (
        "lm_head", "lm_heads", "lm_head.dense", "lm_head.decoder", "lm_head.out_proj", "embed_out",
        "output_projection", "pred_layer.proj", "predictions.decoder", "predictions.dense",
        "predictions.transform.dense", "generator_lm_head", "generator_predictions.dense",
        "vocab_projector", "vocab_transform", "proj_out",
    ),
    "head": ("score", "classifier", "qa_outputs", "pooler", "pooler.dense"),
}  # fmt: skip


def _cross_attention() -> dict[str, tuple[str, ...]]:
    """One-segment self-attention aliases below each cross-attention parent, plus the special ones.

    Returns:
        Role -> aliases of `cross_attn.*`.
    """
    rows = {role: list(aliases) for role, aliases in _CROSS_ONLY.items()}
    for role, aliases in _ATTENTION.items():
        leaves = [alias for alias in aliases if "." not in alias]
        if leaves and "_" not in role:  # low-rank pairs occur in self-attention only
            row = rows.setdefault(role.replace("attn.", "cross_attn."), [])
            row += [f"{parent}.{leaf}" for parent in _CROSS_PARENTS for leaf in leaves]
    return {role: tuple(aliases) for role, aliases in sorted(rows.items())}


ROLES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    _ATTENTION | _cross_attention() | _MIXERS | _MLP | _UNTARGETED
)

NEVER: Mapping[str, str] = MappingProxyType(
    {
        "moe.router": "router: adapting it changes which experts run",
        "moe.shared_gate": "shared-expert gate: one scalar a token, weighs the shared expert",
        "indexer": "sparse-attention indexer: picks tokens by top-k, so it gets no gradient",
        "position": "relative position, sink or mask term added to the attention scores",
        "norm": "normalisation and its modulation",
        "residual": "residual-stream mixing (AltUp, LAuReL, hyper-connections): a few scalars",
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
                ("attn", ("q", "v", "qkv", "kv", "qk", "q_b", "kv_b")),
                ("cross_attn", ("q", "v", "qkv", "kv")),
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
             "image_embed", "img_processor", "vision_embed_tokens", "image_tower", "video_tower"),
            "vision",
        ),
        **dict.fromkeys(
            ("audio_tower", "audio_model", "audio_encoder", "audio_embed", "speech_encoder",
             "acoustic_tokenizer_encoder", "semantic_tokenizer_encoder",
             "word_timestamp_encoder", "word_timestamp_head", "codec_model"),
            "audio",
        ),
        **dict.fromkeys(
            ("multi_modal_projector", "mm_projector", "projector", "connector",
             "visual_projection", "embed_vision", "embed_audio", "merger",
             "deepstack_merger_list", "qformer", "aligner", "generation_aligner"),
            "projector",
        ),
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
        "vision", "audio", "projector", "patcher", or "language" where no segment names a tower.
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
