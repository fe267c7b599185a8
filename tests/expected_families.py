"""What the planner should find in 75 models, read from upstream source and from nothing else.

Read from transformers 5.23.0 and diffusers 0.42.1, before any scan was looked at: the modeling
file and the defaults of the config, never a built model. Each entry cites its file, below
`transformers/models/` or `diffusers/models/`.

EXPECTED[class][pattern] is every nn.Linear, transformers Conv1D and fused 3-D expert parameter
whose path holds an index, in a model built from the default config:
    "attn.q"                     the role; a default target
    ("moe.router", "router")     the role, and why it is not a default target
What EXPECTED does not list, a linear without an index in its path above all, is no default target.

A pattern is a module path (for a fused expert the path of the parameter); `*` is one run of digits:
    re.fullmatch(re.escape(pattern).replace(r"\\*", r"[0-9]+"), name)
so it also stands for the index of an nn.Sequential (`to_out.*` is `to_out.0`) and for the number
in `expert_*`.

BESIDE, in the form of EXPECTED: what stands in the blocks and is no linear of the kinds above (a
router held as a bare parameter, a convolution). A scan may pass these by; if it lists them, then
with this role, and never as a default target.

UNSURE[class][pattern] says where source leaves the role or the default open, and the other reading.
"""

Entry = str | tuple[str, str]
Table = dict[str, Entry]

ROUTER = "router"
SHARED_GATE = "shared-expert gate"
EXPERT = "routed experts are opt-in"
VISION = "vision tower"
AUDIO = "audio tower"
PROJECTOR = "projector"
HEAD = "head"
FEED_FORWARD = "feed-forward is opt-in"
MODULATION = "modulation"
TIME = "time"
EMBED = "embedding outside the blocks"
WEIGHT_READ = "the forward reads the weight without calling the layer"
FUSED_READ = "a fused training kernel reads the weight without calling the layer"
NOT_LINEAR = "not a linear layer"

QKVO = {"q_proj": "attn.q", "k_proj": "attn.k", "v_proj": "attn.v", "o_proj": "attn.o"}
QKV_OUT = {"q_proj": "attn.q", "k_proj": "attn.k", "v_proj": "attn.v", "out_proj": "attn.o"}
T5 = {"q": "attn.q", "k": "attn.k", "v": "attn.v", "o": "attn.o"}
GLU = {"gate_proj": "mlp.gate", "up_proj": "mlp.up", "down_proj": "mlp.down"}
W123 = {"w1": "mlp.gate", "w3": "mlp.up", "w2": "mlp.down"}
FC = {"fc1": "mlp.up", "fc2": "mlp.down"}
H_TO_4H = {"dense_h_to_4h": "mlp.up", "dense_4h_to_h": "mlp.down"}
EXPERTS = {"gate_up_proj": "moe.experts.gate_up", "down_proj": "moe.experts.down"}
SHARED = {
    "gate_proj": "moe.shared.gate",
    "up_proj": "moe.shared.up",
    "down_proj": "moe.shared.down",
}
TO_QKV = {"to_q": "attn.q", "to_k": "attn.k", "to_v": "attn.v"}
TO_QKVO = TO_QKV | {"to_out.*": "attn.o"}
ADDED = {
    "add_q_proj": "attn.add_q",
    "add_k_proj": "attn.add_k",
    "add_v_proj": "attn.add_v",
    "to_add_out": "attn.add_o",
}
KANDINSKY = {
    "to_query": "attn.q",
    "to_key": "attn.k",
    "to_value": "attn.v",
    "out_layer": "attn.o",
}
FF_GELU = {"net.*.proj": "mlp.up", "net.*": "mlp.down"}
FF_GEGLU = {"net.*.proj": "mlp.gate_up", "net.*": "mlp.down"}


def _at(prefix: str, roles: dict[str, str], why: str = "") -> Table:
    return {f"{prefix}.{name}": (role, why) if why else role for name, role in roles.items()}


def _cross(roles: dict[str, str]) -> dict[str, str]:
    return {name: f"cross_{role}" for name, role in roles.items()}


def _decoder(block: str) -> Table:
    return _at(f"{block}.self_attn", QKVO) | _at(f"{block}.mlp", GLU)


def _moe(block: str, experts: str = "mlp.experts") -> Table:
    return _at(f"{block}.self_attn", QKVO) | _at(f"{block}.{experts}", EXPERTS, EXPERT)


def _bert(block: str, q: str = "query", k: str = "key", v: str = "value") -> Table:
    attention = {
        f"self.{q}": "attn.q",
        f"self.{k}": "attn.k",
        f"self.{v}": "attn.v",
        "output.dense": "attn.o",
    }
    ffn = {"intermediate.dense": "mlp.up", "output.dense": "mlp.down"}
    return _at(f"{block}.attention", attention) | _at(block, ffn)


def _vit(block: str) -> Table:
    return _at(f"{block}.attention", QKVO) | _at(f"{block}.mlp", FC)


def _clip(block: str, why: str = "") -> Table:
    return _at(f"{block}.self_attn", QKV_OUT, why) | _at(f"{block}.mlp", FC, why)


def _bart(encoder: str, decoder: str) -> Table:
    return (
        _at(f"{encoder}.self_attn", QKV_OUT)
        | _at(encoder, FC)
        | _at(f"{decoder}.self_attn", QKV_OUT)
        | _at(f"{decoder}.encoder_attn", _cross(QKV_OUT))
        | _at(decoder, FC)
    )


def _t5_attention(encoder: str) -> Table:
    return (
        _at(f"encoder.block.*.layer.*.{encoder}", T5)
        | _at("decoder.block.*.layer.*.SelfAttention", T5)
        | _at("decoder.block.*.layer.*.EncDecAttention", _cross(T5))
    )


def _t5_ffn(ffn: str, roles: dict[str, str], why: str = "") -> Table:
    encoder, decoder = f"encoder.block.*.layer.*.{ffn}", f"decoder.block.*.layer.*.{ffn}"
    return _at(encoder, roles, why) | _at(decoder, roles, why)


def _unet_attention(place: str) -> Table:
    block = f"{place}.attentions.*.transformer_blocks.*"
    return (
        _at(f"{block}.attn1", TO_QKVO)
        | _at(f"{block}.attn2", _cross(TO_QKVO))
        | _at(f"{block}.ff", FF_GEGLU, FEED_FORWARD)
    )


def _self_cross(block: str, ff: str) -> Table:
    return (
        _at(f"{block}.attn1", TO_QKVO)
        | _at(f"{block}.attn2", _cross(TO_QKVO))
        | _at(f"{block}.{ff}", FF_GELU, FEED_FORWARD)
    )


def _joint(block: str, ff: str, ff_context: str, ff_roles: dict[str, str]) -> Table:
    return (
        _at(f"{block}.attn", TO_QKVO | ADDED)
        | _at(f"{block}.{ff}", ff_roles, FEED_FORWARD)
        | _at(f"{block}.{ff_context}", ff_roles, FEED_FORWARD)
    )


def _modulation(*names: str) -> Table:
    return {name: ("modulation", MODULATION) for name in names}


def _flux_single(block: str) -> Table:
    # proj_out reads cat(attention, mlp): attention and mlp out in one matrix.
    return (
        _at(f"{block}.attn", TO_QKV)
        | {f"{block}.proj_out": "attn.o_mlp", f"{block}.proj_mlp": ("mlp.up", FEED_FORWARD)}
        | _modulation(f"{block}.norm.linear")
    )


def _z_image(block: str) -> Table:
    return _at(f"{block}.attention", TO_QKVO) | _at(f"{block}.feed_forward", W123, FEED_FORWARD)


DECODERS: dict[str, Table] = {
    # llama/modeling_llama.py
    "LlamaForCausalLM": _decoder("model.layers.*"),
    # mistral/modeling_mistral.py
    "MistralForCausalLM": _decoder("model.layers.*"),
    # qwen2/modeling_qwen2.py
    "Qwen2ForCausalLM": _decoder("model.layers.*"),
    # qwen3/modeling_qwen3.py
    "Qwen3ForCausalLM": _decoder("model.layers.*"),
    # gemma/modeling_gemma.py
    "GemmaForCausalLM": _decoder("model.layers.*"),
    # gemma3/modeling_gemma3.py
    "Gemma3ForCausalLM": _decoder("model.layers.*"),
    # cohere/modeling_cohere.py
    "CohereForCausalLM": _decoder("model.layers.*"),
    # stablelm/modeling_stablelm.py
    "StableLmForCausalLM": _decoder("model.layers.*"),
    # olmo2/modeling_olmo2.py
    "Olmo2ForCausalLM": _decoder("model.layers.*"),
    # phi3/modeling_phi3.py
    "Phi3ForCausalLM": {
        "model.layers.*.self_attn.qkv_proj": "attn.qkv",
        "model.layers.*.self_attn.o_proj": "attn.o",
        "model.layers.*.mlp.gate_up_proj": "mlp.gate_up",
        "model.layers.*.mlp.down_proj": "mlp.down",
    },
    # phi/modeling_phi.py
    "PhiForCausalLM": {
        "model.layers.*.self_attn.q_proj": "attn.q",
        "model.layers.*.self_attn.k_proj": "attn.k",
        "model.layers.*.self_attn.v_proj": "attn.v",
        "model.layers.*.self_attn.dense": "attn.o",
        "model.layers.*.mlp.fc1": "mlp.up",
        "model.layers.*.mlp.fc2": "mlp.down",
    },
    # gpt2/modeling_gpt2.py: Conv1D; add_cross_attention is False by default
    "GPT2LMHeadModel": {
        "transformer.h.*.attn.c_attn": "attn.qkv",
        "transformer.h.*.attn.c_proj": "attn.o",
        "transformer.h.*.mlp.c_fc": "mlp.up",
        "transformer.h.*.mlp.c_proj": "mlp.down",
    },
    # gpt_bigcode/modeling_gpt_bigcode.py: nn.Linear; multi_query: one key and one value head
    "GPTBigCodeForCausalLM": {
        "transformer.h.*.attn.c_attn": "attn.qkv",
        "transformer.h.*.attn.c_proj": "attn.o",
        "transformer.h.*.mlp.c_fc": "mlp.up",
        "transformer.h.*.mlp.c_proj": "mlp.down",
    },
    # gpt_neox/modeling_gpt_neox.py
    "GPTNeoXForCausalLM": {
        "gpt_neox.layers.*.attention.query_key_value": "attn.qkv",
        "gpt_neox.layers.*.attention.dense": "attn.o",
    }
    | _at("gpt_neox.layers.*.mlp", H_TO_4H),
    # gptj/modeling_gptj.py
    "GPTJForCausalLM": _at("transformer.h.*.attn", QKV_OUT)
    | _at("transformer.h.*.mlp", {"fc_in": "mlp.up", "fc_out": "mlp.down"}),
    # bloom/modeling_bloom.py: the sliced F.linear path needs slow_but_exact, False by default
    "BloomForCausalLM": {
        "transformer.h.*.self_attention.query_key_value": "attn.qkv",
        "transformer.h.*.self_attention.dense": "attn.o",
    }
    | _at("transformer.h.*.mlp", H_TO_4H),
    # falcon/modeling_falcon.py: FalconLinear, a subclass of nn.Linear with its own forward
    "FalconForCausalLM": {
        "transformer.h.*.self_attention.query_key_value": "attn.qkv",
        "transformer.h.*.self_attention.dense": "attn.o",
    }
    | _at("transformer.h.*.mlp", H_TO_4H),
    # mpt/modeling_mpt.py: up_proj and down_proj without a gate
    "MptForCausalLM": {
        "transformer.blocks.*.attn.Wqkv": "attn.qkv",
        "transformer.blocks.*.attn.out_proj": "attn.o",
        "transformer.blocks.*.ffn.up_proj": "mlp.up",
        "transformer.blocks.*.ffn.down_proj": "mlp.down",
    },
    # opt/modeling_opt.py: fc1 and fc2 stand in the block itself
    "OPTForCausalLM": _at("model.decoder.layers.*.self_attn", QKV_OUT)
    | _at("model.decoder.layers.*", FC),
}

MIXTURES: dict[str, Table] = {
    # mixtral/modeling_mixtral.py
    "MixtralForCausalLM": _moe("model.layers.*"),
    # qwen3_moe/modeling_qwen3_moe.py: decoder_sparse_step 1, every layer is sparse
    "Qwen3MoeForCausalLM": _moe("model.layers.*"),
    # olmoe/modeling_olmoe.py
    "OlmoeForCausalLM": _moe("model.layers.*"),
    # gpt_oss/modeling_gpt_oss.py: expert parameters are (experts, in, out)
    "GptOssForCausalLM": _moe("model.layers.*"),
    # granitemoe/modeling_granitemoe.py
    "GraniteMoeForCausalLM": _moe("model.layers.*", "block_sparse_moe.experts"),
    # qwen2_moe/modeling_qwen2_moe.py: decoder_sparse_step 1, every layer is sparse
    "Qwen2MoeForCausalLM": _moe("model.layers.*")
    | _at("model.layers.*.mlp.shared_expert", SHARED)
    | {"model.layers.*.mlp.shared_expert_gate": ("moe.shared_gate", SHARED_GATE)},
    # deepseek_v3/modeling_deepseek_v3.py: q_lora_rank 1536, so no q_proj; the first three layers
    # (first_k_dense_replace) are dense; num_mtp_layers builds nothing in this class
    "DeepseekV3ForCausalLM": {
        "model.layers.*.self_attn.q_a_proj": "attn.q_a",
        "model.layers.*.self_attn.q_b_proj": "attn.q_b",
        "model.layers.*.self_attn.kv_a_proj_with_mqa": "attn.kv_a",
        "model.layers.*.self_attn.kv_b_proj": "attn.kv_b",
        "model.layers.*.self_attn.o_proj": "attn.o",
    }
    | _at("model.layers.*.mlp", GLU)
    | _at("model.layers.*.mlp.shared_experts", SHARED)
    | _at("model.layers.*.mlp.experts", EXPERTS, EXPERT),
}

RECURRENT: dict[str, Table] = {
    # mamba/modeling_mamba.py: mamba_inner_fn reads three weights, the plain forward dt_proj's
    "MambaForCausalLM": {
        "backbone.layers.*.mixer.in_proj": "ssm.in",
        "backbone.layers.*.mixer.x_proj": ("ssm.x", FUSED_READ),
        "backbone.layers.*.mixer.dt_proj": ("ssm.dt", WEIGHT_READ),
        "backbone.layers.*.mixer.out_proj": ("ssm.out", FUSED_READ),
    },
    # mamba2/modeling_mamba2.py: mamba2_split_conv1d_scan_combined takes out_proj.weight
    "Mamba2ForCausalLM": {
        "backbone.layers.*.mixer.in_proj": "ssm.in",
        "backbone.layers.*.mixer.out_proj": ("ssm.out", FUSED_READ),
    },
    # jamba/modeling_jamba.py: no mamba_inner_fn, so x_proj and out_proj are called; dt_proj is
    # called only for a quantized config. Odd layers have experts, even ones a dense MLP.
    "JambaForCausalLM": {
        "model.layers.*.mamba.in_proj": "ssm.in",
        "model.layers.*.mamba.x_proj": "ssm.x",
        "model.layers.*.mamba.dt_proj": ("ssm.dt", WEIGHT_READ),
        "model.layers.*.mamba.out_proj": "ssm.out",
    }
    | _at("model.layers.*.self_attn", QKVO)
    | _at("model.layers.*.feed_forward", GLU)
    | _at("model.layers.*.feed_forward.experts", EXPERTS, EXPERT),
    # qwen3_next/modeling_qwen3_next.py: q_proj also makes the output gate; every MLP is sparse
    "Qwen3NextForCausalLM": _moe("model.layers.*")
    | {
        "model.layers.*.linear_attn.in_proj_qkvz": "linear_attn.qkv",
        "model.layers.*.linear_attn.in_proj_ba": "linear_attn.decay",
        "model.layers.*.linear_attn.out_proj": "linear_attn.o",
        "model.layers.*.mlp.shared_expert_gate": ("moe.shared_gate", SHARED_GATE),
    }
    | _at("model.layers.*.mlp.shared_expert", SHARED),
    # falcon_h1/modeling_falcon_h1.py: attention and Mamba-2 side by side in every layer
    "FalconH1ForCausalLM": {
        "model.layers.*.mamba.in_proj": "ssm.in",
        "model.layers.*.mamba.out_proj": ("ssm.out", FUSED_READ),
    }
    | _at("model.layers.*.self_attn", QKVO)
    | _at("model.layers.*.feed_forward", GLU),
    # recurrent_gemma/modeling_recurrent_gemma.py: act(linear_y(x)) gates rg_lru(conv(linear_x(x)))
    "RecurrentGemmaForCausalLM": {
        "model.layers.*.temporal_block.linear_y": "ssm.gate",
        "model.layers.*.temporal_block.linear_x": "ssm.in",
        "model.layers.*.temporal_block.linear_out": "ssm.out",
    }
    | _at("model.layers.*.temporal_block", QKVO)
    | _at("model.layers.*.mlp_block", GLU),
    # lfm2/modeling_lfm2.py: full_attn_idxs defaults to every layer, so no short convolution is
    # built; with one: conv.in_proj (conv.in), conv.out_proj (conv.out)
    "Lfm2ForCausalLM": _at("model.layers.*.self_attn", QKV_OUT)
    | _at("model.layers.*.feed_forward", W123),
}

ENCODERS: dict[str, Table] = {
    # bert/modeling_bert.py: add_cross_attention is False by default, here and below
    "BertForMaskedLM": _bert("bert.encoder.layer.*"),
    # roberta/modeling_roberta.py
    "RobertaForMaskedLM": _bert("roberta.encoder.layer.*"),
    # electra/modeling_electra.py
    "ElectraForMaskedLM": _bert("electra.encoder.layer.*"),
    # deberta_v2/modeling_deberta_v2.py: relative_attention is False by default, so no pos_key_proj
    "DebertaV2ForMaskedLM": _bert(
        "deberta.encoder.layer.*", q="query_proj", k="key_proj", v="value_proj"
    ),
    # modernbert/modeling_modernbert.py: Wi is chunked into input and gate
    "ModernBertForMaskedLM": {
        "model.layers.*.attn.Wqkv": "attn.qkv",
        "model.layers.*.attn.Wo": "attn.o",
        "model.layers.*.mlp.Wi": "mlp.gate_up",
        "model.layers.*.mlp.Wo": "mlp.down",
    },
    # albert/modeling_albert.py: one group of one layer, run num_hidden_layers times
    "AlbertForMaskedLM": _at(
        "albert.encoder.albert_layer_groups.*.albert_layers.*",
        {
            "attention.query": "attn.q",
            "attention.key": "attn.k",
            "attention.value": "attn.v",
            "attention.dense": "attn.o",
            "ffn": "mlp.up",
            "ffn_output": "mlp.down",
        },
    ),
    # distilbert/modeling_distilbert.py
    "DistilBertForMaskedLM": _at(
        "distilbert.transformer.layer.*",
        {
            "attention.q_lin": "attn.q",
            "attention.k_lin": "attn.k",
            "attention.v_lin": "attn.v",
            "attention.out_lin": "attn.o",
            "ffn.lin1": "mlp.up",
            "ffn.lin2": "mlp.down",
        },
    ),
}

SEQ2SEQ: dict[str, Table] = {
    # t5/modeling_t5.py: feed_forward_proj "relu", so wi and no wi_0, wi_1
    "T5ForConditionalGeneration": _t5_attention("SelfAttention")
    | _t5_ffn("DenseReluDense", {"wi": "mlp.up", "wo": "mlp.down"}),
    # longt5/modeling_longt5.py: encoder_attention_type "local", feed_forward_proj "relu"
    "LongT5ForConditionalGeneration": _t5_attention("LocalSelfAttention")
    | _t5_ffn("DenseReluDense", {"wi": "mlp.up", "wo": "mlp.down"}),
    # switch_transformers/modeling_switch_transformers.py: one layer in four is sparse
    "SwitchTransformersForConditionalGeneration": _t5_attention("SelfAttention")
    | _t5_ffn("mlp", {"wi": "mlp.up", "wo": "mlp.down"})
    | _t5_ffn("mlp.experts.expert_*", {"wi": "moe.experts.up", "wo": "moe.experts.down"}, EXPERT)
    | _t5_ffn("mlp.router", {"classifier": "moe.router"}, ROUTER),
    # bart/modeling_bart.py
    "BartForConditionalGeneration": _bart("model.encoder.layers.*", "model.decoder.layers.*"),
    # marian/modeling_marian.py
    "MarianMTModel": _bart("model.encoder.layers.*", "model.decoder.layers.*"),
}

VISION_MODELS: dict[str, Table] = {
    # vit/modeling_vit.py
    "ViTForImageClassification": _vit("vit.layers.*"),
    # beit/modeling_beit.py
    "BeitForImageClassification": _vit("beit.layers.*"),
    # dinov2/modeling_dinov2.py: use_swiglu_ffn is False by default
    "Dinov2ForImageClassification": _vit("dinov2.encoder.layer.*"),
    # swin/modeling_swin.py: patch merging ends every stage but the last
    "SwinForImageClassification": _vit("swin.encoder.layers.*.blocks.*")
    | {"swin.encoder.layers.*.downsample.reduction": "proj"},
    # segformer/modeling_segformer.py: the decode head has one linear a stage
    "SegformerForSemanticSegmentation": _vit("segformer.stages.*.blocks.*")
    | {"decode_head.linear_projections.*.proj": ("head", HEAD)},
    # detr/modeling_detr.py: the backbone (timm resnet50) is convolutions only
    "DetrForObjectDetection": _at("model.encoder.layers.*.self_attn", QKVO)
    | _at("model.encoder.layers.*.mlp", FC)
    | _at("model.decoder.layers.*.self_attn", QKVO)
    | _at("model.decoder.layers.*.encoder_attn", _cross(QKVO))
    | _at("model.decoder.layers.*.mlp", FC)
    | {"bbox_predictor.layers.*": ("head", HEAD)},
    # clip/modeling_clip.py
    "CLIPModel": _clip("text_model.encoder.layers.*") | _clip("vision_model.encoder.layers.*"),
    # siglip/modeling_siglip.py: the pooling head, an nn.MultiheadAttention, has no index
    "SiglipModel": _clip("text_model.encoder.layers.*") | _clip("vision_model.encoder.layers.*"),
}

VISION_LANGUAGE: dict[str, Table] = {
    # llava/modeling_llava.py: clip_vision_model and llama; the projector has no index
    "LlavaForConditionalGeneration": _decoder("model.language_model.layers.*")
    | _clip("model.vision_tower.encoder.layers.*", VISION),
    # qwen2_vl/modeling_qwen2_vl.py: the merger's mlp is an nn.Sequential of two linears
    "Qwen2VLForConditionalGeneration": _decoder("model.language_model.layers.*")
    | _at("model.visual.blocks.*.attn", {"qkv": "attn.qkv", "proj": "attn.o"}, VISION)
    | _at("model.visual.blocks.*.mlp", FC, VISION)
    | {"model.visual.merger.mlp.*": ("proj", PROJECTOR)},
    # idefics3/modeling_idefics3.py: text config llama; the connector has no index
    "Idefics3ForConditionalGeneration": _decoder("model.text_model.layers.*")
    | _clip("model.vision_model.encoder.layers.*", VISION),
    # gemma3/modeling_gemma3.py: siglip_vision_model; the projector is a bare parameter, no index
    "Gemma3ForConditionalGeneration": _decoder("model.language_model.layers.*")
    | _clip("model.vision_tower.encoder.layers.*", VISION),
}

SPEECH: dict[str, Table] = {
    # whisper/modeling_whisper.py: an encoder-decoder, both are the trunk
    "WhisperForConditionalGeneration": _bart("model.encoder.layers.*", "model.decoder.layers.*"),
    # wav2vec2/modeling_wav2vec2.py: do_stable_layer_norm False, adapter_attn_dim None, by default
    "Wav2Vec2ForCTC": _at("wav2vec2.encoder.layers.*.attention", QKV_OUT)
    | {
        "wav2vec2.encoder.layers.*.feed_forward.intermediate_dense": "mlp.up",
        "wav2vec2.encoder.layers.*.feed_forward.output_dense": "mlp.down",
    },
    # hubert/modeling_hubert.py
    "HubertForCTC": _at("hubert.encoder.layers.*.attention", QKV_OUT)
    | {
        "hubert.encoder.layers.*.feed_forward.intermediate_dense": "mlp.up",
        "hubert.encoder.layers.*.feed_forward.output_dense": "mlp.down",
    },
    # qwen2_audio/modeling_qwen2_audio.py: text config qwen2; the projector has no index
    "Qwen2AudioForConditionalGeneration": _decoder("model.language_model.layers.*")
    | _at("model.audio_tower.layers.*.self_attn", QKV_OUT, AUDIO)
    | _at("model.audio_tower.layers.*", FC, AUDIO),
}

DENOISERS: dict[str, Table] = {
    # unets/unet_2d_condition.py, unet_2d_blocks.py, attention.py, resnet.py: GEGLU feed-forward;
    # use_linear_projection is False, so proj_in and proj_out are convolutions (BESIDE)
    "UNet2DConditionModel": _unet_attention("down_blocks.*")
    | _unet_attention("mid_block")
    | _unet_attention("up_blocks.*")
    | {
        "down_blocks.*.resnets.*.time_emb_proj": ("time", TIME),
        "mid_block.resnets.*.time_emb_proj": ("time", TIME),
        "up_blocks.*.resnets.*.time_emb_proj": ("time", TIME),
    },
    # transformers/transformer_sd3.py, attention.py: no dual attention (attn2) by default; the last
    # block has no to_add_out and no ff_context
    "SD3Transformer2DModel": _joint("transformer_blocks.*", "ff", "ff_context", FF_GELU)
    | _modulation("transformer_blocks.*.norm1.linear", "transformer_blocks.*.norm1_context.linear"),
    # transformers/transformer_flux.py
    "FluxTransformer2DModel": _joint("transformer_blocks.*", "ff", "ff_context", FF_GELU)
    | _modulation("transformer_blocks.*.norm1.linear", "transformer_blocks.*.norm1_context.linear")
    | _flux_single("single_transformer_blocks.*"),
    # transformers/transformer_flux2.py: modulation is shared by the blocks and has no index
    "Flux2Transformer2DModel": _joint(
        "transformer_blocks.*",
        "ff",
        "ff_context",
        {"linear_in": "mlp.gate_up", "linear_out": "mlp.down"},
    )
    | {
        "single_transformer_blocks.*.attn.to_qkv_mlp_proj": "attn.qkv_mlp",
        "single_transformer_blocks.*.attn.to_out": "attn.o_mlp",
    },
    # transformers/transformer_wan.py: added_kv_proj_dim is None (text to video), so no add_k_proj
    "WanTransformer3DModel": _self_cross("blocks.*", "ffn"),
    # transformers/transformer_qwenimage.py: img_mod and txt_mod are nn.Sequential(SiLU, Linear)
    "QwenImageTransformer2DModel": _joint("transformer_blocks.*", "img_mlp", "txt_mlp", FF_GELU)
    | _modulation("transformer_blocks.*.img_mod.*", "transformer_blocks.*.txt_mod.*"),
    # transformers/sana_transformer.py: the feed-forward is convolutions (BESIDE)
    "SanaTransformer2DModel": _at("transformer_blocks.*.attn1", TO_QKVO)
    | _at("transformer_blocks.*.attn2", _cross(TO_QKVO)),
    # transformers/transformer_hunyuan_video.py
    "HunyuanVideoTransformer3DModel": _joint("transformer_blocks.*", "ff", "ff_context", FF_GELU)
    | _modulation("transformer_blocks.*.norm1.linear", "transformer_blocks.*.norm1_context.linear")
    | _flux_single("single_transformer_blocks.*")
    | _at("context_embedder.token_refiner.refiner_blocks.*.attn", TO_QKVO)
    | _at("context_embedder.token_refiner.refiner_blocks.*.ff", FF_GELU, FEED_FORWARD)
    | _modulation("context_embedder.token_refiner.refiner_blocks.*.norm_out.linear"),
    # transformers/transformer_ltx.py: modulation is a table, not a linear
    "LTXVideoTransformer3DModel": _self_cross("transformer_blocks.*", "ff"),
    # transformers/transformer_kandinsky.py
    "Kandinsky5Transformer3DModel": _at("text_transformer_blocks.*.self_attention", KANDINSKY)
    | _at("visual_transformer_blocks.*.self_attention", KANDINSKY)
    | _at("visual_transformer_blocks.*.cross_attention", _cross(KANDINSKY))
    | _at(
        "text_transformer_blocks.*.feed_forward",
        {"in_layer": "mlp.up", "out_layer": "mlp.down"},
        FEED_FORWARD,
    )
    | _at(
        "visual_transformer_blocks.*.feed_forward",
        {"in_layer": "mlp.up", "out_layer": "mlp.down"},
        FEED_FORWARD,
    )
    | _modulation(
        "text_transformer_blocks.*.text_modulation.out_layer",
        "visual_transformer_blocks.*.visual_modulation.out_layer",
    ),
    # transformers/pixart_transformer_2d.py, attention.py: ada_norm_single, modulation is a table
    "PixArtTransformer2DModel": _self_cross("transformer_blocks.*", "ff"),
    # transformers/auraflow_transformer_2d.py: silu(linear_1(x)) * linear_2(x)
    "AuraFlowTransformer2DModel": _joint(
        "joint_transformer_blocks.*",
        "ff",
        "ff_context",
        {"linear_1": "mlp.gate", "linear_2": "mlp.up", "out_projection": "mlp.down"},
    )
    | _at("single_transformer_blocks.*.attn", TO_QKVO)
    | _at(
        "single_transformer_blocks.*.ff",
        {"linear_1": "mlp.gate", "linear_2": "mlp.up", "out_projection": "mlp.down"},
        FEED_FORWARD,
    )
    | _modulation(
        "joint_transformer_blocks.*.norm1.linear",
        "joint_transformer_blocks.*.norm1_context.linear",
        "single_transformer_blocks.*.norm1.linear",
    ),
    # transformers/transformer_z_image.py: context_refiner has no modulation; siglip_feat_dim None
    "ZImageTransformer2DModel": _z_image("layers.*")
    | _z_image("noise_refiner.*")
    | _z_image("context_refiner.*")
    | _modulation("layers.*.adaLN_modulation.*", "noise_refiner.*.adaLN_modulation.*")
    | _modulation("all_final_layer.2-1.adaLN_modulation.*")
    | {"t_embedder.mlp.*": ("time", TIME), "cap_embedder.*": ("embed", EMBED)},
    # transformers/cogvideox_transformer_3d.py: text and video tokens share one set of projections
    "CogVideoXTransformer3DModel": _at("transformer_blocks.*.attn1", TO_QKVO)
    | _at("transformer_blocks.*.ff", FF_GELU, FEED_FORWARD)
    | _modulation("transformer_blocks.*.norm1.linear", "transformer_blocks.*.norm2.linear"),
}

EXPECTED: dict[str, Table] = (
    DECODERS
    | MIXTURES
    | RECURRENT
    | ENCODERS
    | SEQ2SEQ
    | VISION_MODELS
    | VISION_LANGUAGE
    | SPEECH
    | DENOISERS
)

BESIDE: dict[str, Table] = {
    # The routers of transformers 5 are modules of their own with a bare 2-D `weight`.
    "MixtralForCausalLM": {"model.layers.*.mlp.gate": ("moe.router", ROUTER)},
    "Qwen3MoeForCausalLM": {"model.layers.*.mlp.gate": ("moe.router", ROUTER)},
    "Qwen2MoeForCausalLM": {"model.layers.*.mlp.gate": ("moe.router", ROUTER)},
    "OlmoeForCausalLM": {"model.layers.*.mlp.gate": ("moe.router", ROUTER)},
    "DeepseekV3ForCausalLM": {"model.layers.*.mlp.gate": ("moe.router", ROUTER)},
    "GptOssForCausalLM": {"model.layers.*.mlp.router": ("moe.router", ROUTER)},
    "GraniteMoeForCausalLM": {"model.layers.*.block_sparse_moe.router": ("moe.router", ROUTER)},
    "JambaForCausalLM": {
        "model.layers.*.feed_forward.router": ("moe.router", ROUTER),
        "model.layers.*.mamba.conv1d": ("conv.kernel", NOT_LINEAR),
    },
    "Qwen3NextForCausalLM": {
        "model.layers.*.mlp.gate": ("moe.router", ROUTER),
        "model.layers.*.linear_attn.conv1d": ("conv.kernel", NOT_LINEAR),
    },
    "MambaForCausalLM": {"backbone.layers.*.mixer.conv1d": ("conv.kernel", NOT_LINEAR)},
    "Mamba2ForCausalLM": {"backbone.layers.*.mixer.conv1d": ("conv.kernel", NOT_LINEAR)},
    "FalconH1ForCausalLM": {"model.layers.*.mamba.conv1d": ("conv.kernel", NOT_LINEAR)},
    # The two 3-D parameters are block-diagonal gates (heads, width, width): not experts.
    "RecurrentGemmaForCausalLM": {
        "model.layers.*.temporal_block.conv_1d": ("conv.kernel", NOT_LINEAR),
        "model.layers.*.temporal_block.rg_lru.input_gate_weight": ("ssm.gate", NOT_LINEAR),
        "model.layers.*.temporal_block.rg_lru.recurrent_gate_weight": ("ssm.gate", NOT_LINEAR),
    },
    "UNet2DConditionModel": {
        f"{place}.attentions.*.{name}": ("proj", NOT_LINEAR)
        for place in ("down_blocks.*", "mid_block", "up_blocks.*")
        for name in ("proj_in", "proj_out")
    },
    "SanaTransformer2DModel": {
        "transformer_blocks.*.ff.conv_inverted": ("mlp.gate_up", NOT_LINEAR),
        "transformer_blocks.*.ff.conv_depth": ("conv.kernel", NOT_LINEAR),
        "transformer_blocks.*.ff.conv_point": ("mlp.down", NOT_LINEAR),
    },
    "ZImageTransformer2DModel": {"all_final_layer.2-1.linear": ("head", HEAD)},
}

UNSURE: dict[str, dict[str, str]] = {
    "Qwen3NextForCausalLM": {
        "model.layers.*.linear_attn.in_proj_qkvz": "holds the output gate z too: no word for both",
        "model.layers.*.linear_attn.in_proj_ba": "beta (write strength) and alpha (decay) in one",
    },
    "RecurrentGemmaForCausalLM": {
        f"model.layers.*.temporal_block.{name}": f"config says linear_attention: linear_attn.{role}"
        for name, role in (("linear_y", "gate"), ("linear_x", "qkv"), ("linear_out", "o"))
    },
    "SwinForImageClassification": {
        "swin.encoder.layers.*.downsample.reduction": "between stages: embed or block.out, opt-in"
    },
    "Qwen2VLForConditionalGeneration": {
        "model.visual.merger.mlp.*": "two linears of an mlp: mlp.up and mlp.down; not default"
    },
    "SanaTransformer2DModel": {
        f"transformer_blocks.*.attn1.{name}": f"its processor is linear attention: linear_{role}"
        for name, role in TO_QKVO.items()
    },
    "HunyuanVideoTransformer3DModel": {
        f"context_embedder.token_refiner.refiner_blocks.*.attn.{name}": "text refiner: or opt-in"
        for name in TO_QKVO
    },
    "ZImageTransformer2DModel": {
        f"context_refiner.*.attention.{name}": "text refiner: or opt-in" for name in TO_QKVO
    },
    "Kandinsky5Transformer3DModel": {
        f"text_transformer_blocks.*.self_attention.{name}": "text refiner: or opt-in"
        for name in KANDINSKY
    },
}
