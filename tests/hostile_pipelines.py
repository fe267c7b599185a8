"""Bad adapters for pipelines: see `tests/test_hostile.py` for what a row means."""

import os

import torch

from hf_lora import LoadLimits
from hf_lora.errors import (
    AdapterExists,
    AdapterMismatch,
    AdapterNotFound,
    BadAdapterFile,
    InvalidOption,
)
from hf_lora.formats.diffusers import METADATA
from hf_lora.manifest import KEY
from tests.damage import (
    GONE,
    PIPELINE,
    WEIGHTS,
    Row,
    both,
    cut,
    drop,
    edit,
    edit_all,
    given,
    header_only,
    manifest,
    manifest_config,
    metadata,
    move,
    only,
    out_of_folder,
    put,
    replace,
    respell,
    signed,
    stated,
    tensors,
    typed,
    without,
    write,
)
from tests.hostile_models import EVIL, EVIL_TOO, PICKLE, planted

Bad, Mis, Not, Opt = BadAdapterFile, AdapterMismatch, AdapterNotFound, InvalidOption

UNET = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
A, B = f"{UNET}.lora_A.weight", f"{UNET}.lora_B.weight"
TEXT = "text_encoder.encoder.layers.1.self_attn.q_proj"
FLUX = "transformer.transformer_blocks.1.attn.to_q"


def kohya(**extra):
    """Replaces the file by one in kohya's spelling."""
    down = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    values = {
        f"{down}.lora_down.weight": torch.zeros(4, 64),
        f"{down}.lora_up.weight": torch.zeros(64, 4),
        f"{down}.alpha": torch.tensor(4.0),
    }
    values |= {f"{down}.{key}": value for key, value in extra.items()}
    return both(metadata(**{KEY: GONE, METADATA: GONE}), tensors(lambda _: values))


# What a file means that states no alpha: alpha = rank.
alpha_is_rank = stated(
    unet__lora_alpha=16, unet__alpha_pattern={"conv_in": 4}, text_encoder__lora_alpha=16
)


def sd(name, cites, damage, error, words, **more):
    return Row(name, cites, damage, error, words, **{"file": "sd", **more})


def ours(name, cites, damage, error, words, **more):
    return Row(name, cites, damage, error, words, **{"file": "our sd", **more})


def flux(name, cites, damage, error, words, **more):
    return Row(name, cites, damage, error, words, **{"file": "flux", **more})


ROWS = (
    sd(
        "a pickle under diffusers' old name",
        '2.code: (d) OSError "Unable to load weights from checkpoint file", reason hidden',
        both(drop(PIPELINE), write("pytorch_lora_weights.bin", PICKLE)),
        Not,
        "pytorch_lora_weights.bin is a pickle, which can run code, and is not read",
    ),
    sd(
        "the pickle itself, for a pipeline",
        '2.code: (d) OSError "Unable to load weights from checkpoint file", reason hidden',
        given(write("pytorch_lora_weights.bin", PICKLE), file="pytorch_lora_weights.bin"),
        Bad,
        r"\.bin files are pickles",
    ),
    sd(
        "megatron_core names a module beside a pipeline's file",
        '2.code: megatron_core = planted module / "os" (p, d)',
        both(planted, stated(unet__megatron_core="planted")),
        None,
        "unet: ",
    ),
    sd(
        "megatron_config in a pipeline's file",
        '2.code: megatron_core = planted module / "os" (p, d)',
        both(planted, stated(unet__megatron_core="planted", unet__megatron_config={"tp": 1})),
        Bad,
        "'megatron_config' is not accepted from a file",
    ),
    sd(
        "a pipeline's own code beside the file",
        "1.systems: issue 13446 (open): local / custom_pipeline path runs code without consent",
        both(
            planted,
            write("pipeline.py", b"raise SystemExit('planted ran')"),
            write("model_index.json", b'{"_class_name": ["pipeline", "Planted"]}'),
        ),
        None,
        "unet: ",
    ),
    sd(
        "NaN in a text encoder, where softmax hides it",
        "2.tamper: NaN in a text-encoder q_proj gave FINITE wrong output (softmax hides it)",
        edit(f"{TEXT}.lora_A.weight", lambda t: t * float("nan")),
        Bad,
        "layers.1.self_attn.q_proj.lora_A holds NaN or infinite values",
    ),
    ours(
        "NaN in a text encoder of our own file",
        "2.tamper: NaN in a text-encoder q_proj gave FINITE wrong output (softmax hides it)",
        signed(edit(f"{TEXT}.lora_B.weight", lambda t: t * float("nan"))),
        Bad,
        "layers.1.self_attn.q_proj.lora_B holds NaN or infinite values",
    ),
    sd(
        "infinity in a denoiser",
        "2.tamper: NaN / Inf / 1e30 weight; fp16 overflow file (d)",
        edit(A, lambda t: t / 0),
        Bad,
        "attn1.to_q.lora_A holds NaN or infinite values",
    ),
    sd(
        "values of 1e30 in a denoiser",
        "2.tamper: NaN / Inf / 1e30 weight; fp16 overflow file (d)",
        edit(A, lambda t: torch.full_like(t, 1e30)),
        Bad,
        "attn1.to_q.lora_A holds values up to",
    ),
    flux(
        "fp16 values of a transformer that overflowed",
        "2.tamper: NaN / Inf / 1e30 weight; fp16 overflow file (d)",
        edit_all(lambda t: (t * 1e7).half()),
        Bad,
        "holds NaN or infinite values",
    ),
    sd(
        "a negative alpha in the metadata",
        "2.tamper: metadata alpha -1600 silent",
        stated(unet__lora_alpha=-11, text_encoder__lora_alpha=-11),
        None,
        "unet: ",
        scale=-1.0,
    ),
    sd(
        "an alpha of -1e9 in the metadata",
        "2.tamper: metadata alpha -1600 silent",
        stated(unet__lora_alpha=-1e9),
        Bad,
        r"scaling at .* is -2\.5e\+08, .*lora_alpha.*LoadLimits",
    ),
    ours(
        "another alpha in the metadata than in the manifest",
        "2.tamper: metadata alpha -1600 silent",
        stated(unet__lora_alpha=-1600),
        None,
        "repaired: lora_adapter_metadata gives another scaling than the manifest at unet",
    ),
    sd(
        "a kohya file with an alpha of -1e9",
        "2.tamper: kohya alpha -1e9 and NaN silent",
        kohya(alpha=torch.tensor(-1e9)),
        Bad,
        "the scaling at .* is -2.5e",
    ),
    sd(
        "a kohya file with an alpha of NaN",
        "2.tamper: kohya alpha -1e9 and NaN silent",
        kohya(alpha=torch.tensor(float("nan"))),
        Bad,
        "alpha is nan",
    ),
    ours(
        "a file without the metadata that diffusers reads",
        "2.tamper: metadata block dropped: silent, wrong scale (16 -> r)",
        metadata(**{METADATA: GONE}),
        None,
        "repaired: lora_adapter_metadata",
    ),
    sd(
        "a file without any metadata",
        "2.tamper: metadata block dropped: silent, wrong scale (16 -> r)",
        metadata(**{METADATA: GONE}),
        None,
        "repaired: the file states no alpha; as in diffusers, alpha = rank was taken",
        like=alpha_is_rank,
    ),
    sd(
        "a file of which the metadata is empty",
        "2.tamper: metadata block dropped: silent, wrong scale (16 -> r)",
        metadata(**{METADATA: ""}),
        None,
        "repaired: the file states no alpha",
        like=alpha_is_rank,
    ),
    sd(
        "an alpha of NaN in the metadata",
        "2.tamper: alpha NaN (JSON NaN is parsed) (d)",
        stated(unet__lora_alpha=float("nan")),
        Bad,
        "lora_adapter_metadata is no valid JSON .NaN is no JSON number",
    ),
    ours(
        "an alpha of NaN in the metadata of our own file",
        "2.tamper: alpha NaN (JSON NaN is parsed) (d)",
        stated(unet__lora_alpha=float("nan")),
        None,
        "repaired: lora_adapter_metadata is broken .*NaN is no JSON number.*manifest",
    ),
    ours(
        "another pipeline of the same shapes",
        "2.tamper: same-shaped other base (d)",
        given(),
        Mis,
        r"made on another base: \d+ of \d+ weights of (text_encoder|unet) differ",
        host="sd other seed",
    ),
    sd(
        "another pipeline, of which a foreign file says nothing",
        "2.tamper: same-shaped other base (d)",
        given(),
        None,
        "base: not verified: the file carries no fingerprint",
        host="sd other seed",
    ),
    sd(
        "a module that the denoiser has not",
        "2.tamper: kohya extra module: log only",
        both(
            put("unet.mid_block.nowhere.lora_A.weight", torch.zeros(16, 64)),
            put("unet.mid_block.nowhere.lora_B.weight", torch.zeros(64, 16)),
            stated(unet__target_modules=["to_q", "to_v", "conv_in", "nowhere"]),
        ),
        Mis,
        "targets are no modules of UNet2DConditionModel, for instance mid_block.nowhere",
    ),
    sd(
        "another prefix than a component's",
        '2.tamper: unknown prefix: logged "safe to ignore", adapters={}',
        respell("unet.", "net."),
        Bad,
        "are no LoRA factors of a pipeline's component: net",
    ),
    sd(
        "a component that no pipeline has, named in the metadata",
        '2.tamper: unknown prefix: logged "safe to ignore", adapters={}',
        both(metadata(**{METADATA: '{"vae.r": 16}'}), tensors(lambda t: vae_only(t))),
        Mis,
        "for vae as well, and StableDiffusionPipeline has .*unet",
    ),
    ours(
        "another prefix in our own file",
        '2.tamper: unknown prefix: logged "safe to ignore", adapters={}',
        respell("unet.", "net."),
        Bad,
        "are no LoRA factors of a pipeline's component: net",
    ),
    sd(
        "half of a denoiser's layers missing",
        "2.tamper: half: silent without metadata; only lora_A: IndexError",
        without("mid_block"),
        Mis,
        "config targets 2|config targets 4 layers for which the file has no tensors",
    ),
    sd(
        "no B at all in a pipeline's file",
        "2.tamper: half: silent without metadata; only lora_A: IndexError",
        only("lora_A"),
        Mis,
        "has lora_A but no lora_B",
    ),
    sd(
        "no B at all and no metadata",
        "2.tamper: half: silent without metadata; only lora_A: IndexError",
        both(metadata(**{METADATA: GONE}), only("lora_A")),
        Mis,
        "has lora_A but no lora_B",
    ),
    sd(
        "no tensors at all in a pipeline's file",
        "2.tamper: half the keys missing / keys match nothing / zero tensors (d)",
        only("nothing"),
        Bad,
        "the file holds no tensors",
    ),
    sd(
        "names that match nothing in the denoiser",
        "2.tamper: half the keys missing / keys match nothing / zero tensors (d)",
        respell("attn1", "attn9"),
        Mis,
        "targets are no modules of UNet2DConditionModel",
    ),
    sd(
        "a field of a newer peft in the metadata",
        '2.tamper: unknown newer field: TypeError "class could not be instantiated"',
        stated(unet__lora_temperature=0.5),
        Bad,
        "'lora_temperature' is not known to the installed peft",
    ),
    sd(
        "a field of a newer peft in the metadata that is off",
        '2.tamper: unknown newer field: TypeError "class could not be instantiated"',
        stated(unet__lora_temperature=None),
        None,
        "unet: ",
    ),
    sd(
        "a magnitude in LyCORIS' spelling",
        "2.tamper: dora_scale dropped with a log line",
        put(f"{UNET}.dora_scale", torch.zeros(64)),
        Bad,
        "no LoRA factors of a pipeline's component: .*dora_scale",
    ),
    sd(
        "DoRA without magnitudes in a denoiser",
        "2.tamper: use_dora true, no magnitude (d)",
        stated(unet__use_dora=True),
        Mis,
        "use_dora is set but .* has no magnitude",
    ),
    sd(
        "a switch in quotes",
        "2.tamper: use_dora true, no magnitude (d)",
        stated(unet__use_dora="no"),
        Bad,
        "use_dora is 'no', not true or false",
    ),
    sd(
        "int8 values in a denoiser",
        "2.tamper: int8 / bool tensors as weights (d)",
        edit(A, lambda t: (t * 100).to(torch.int8)),
        Bad,
        "attn1.to_q.lora_A holds int8 values",
    ),
    sd(
        "complex64 values in a denoiser",
        "2.tamper: complex64 (d)",
        typed(A, "C64", 8),
        Bad,
        "attn1.to_q.lora_A.weight has the dtype C64, which is not read",
    ),
    Row(
        "an adapter of a language model for a pipeline",
        "2.tamper: language adapter into a pipeline: log only, no effect",
        given(),
        Mis,
        "the adapter is for a single model, and StableDiffusionPipeline has .*load_lora.pipe",
        host="sd",
    ),
    Row(
        "our adapter of a language model for a pipeline",
        "2.tamper: language adapter into a pipeline: log only, no effect",
        given(),
        Mis,
        "the adapter is for a single model, and FluxPipeline has",
        file="ours",
        host="flux",
    ),
    Row(
        "an adapter of a language model for a pipeline's component",
        "2.tamper: language adapter into a pipeline: log only, no effect",
        given(),
        Mis,
        "another architecture",
        host="clip",
    ),
    sd(
        "an adapter of a pipeline for a model",
        "own: a pipeline's file for a model",
        given(),
        Mis,
        "for a pipeline with text_encoder, unet, none of which fits.*single LlamaForCausalLM",
        host="llama",
    ),
    ours(
        "our adapter of a pipeline for a model",
        "own: a pipeline's file for a model",
        given(),
        Mis,
        "for a pipeline with text_encoder, unet, none of which fits.*single LlamaForCausalLM",
        host="llama",
    ),
    sd(
        "an adapter of one kind of pipeline for another",
        "own: a file of another kind of pipeline",
        given(),
        Mis,
        "for unet as well, and FluxPipeline has transformer.*strict=False",
        host="flux",
    ),
    flux(
        "an adapter of the other kind for the first",
        "own: a file of another kind of pipeline",
        given(),
        Mis,
        "for transformer as well, and StableDiffusionPipeline has",
        host="sd",
    ),
    sd(
        "two files in a pipeline's folder",
        "2.tamper: two .safetensors in the folder: log, picks one",
        both(lambda f: (f / "b.safetensors").write_bytes(b""), move(PIPELINE, "a.safetensors")),
        Bad,
        "holds 2 adapters: a.safetensors, b.safetensors.*file='a.safetensors'",
    ),
    sd(
        "a name in use on a pipeline",
        '2.tamper: load_adapter("default") twice (d)',
        given(),
        AdapterExists,
        "already has an adapter 'default'",
        host="sd loaded",
    ),
    sd(
        "an adapter named like a part of a text encoder",
        "2.tamper: second adapter named self_attn / q_proj (d)",
        given(name="self_attn"),
        Opt,
        "'self_attn' is also a part of module names of CLIPTextModel",
    ),
    sd(
        "targets of a pipeline by an expression that never ends",
        "2.hang: metadata target_modules (d)",
        stated(unet__target_modules=EVIL),
        None,
        "target_modules is an expression",
        costs="all",
    ),
    sd(
        "such an expression among a pipeline's targets",
        "2.hang: metadata target_modules (d)",
        stated(unet__target_modules=["to_q", EVIL_TOO]),
        Bad,
        "target_modules has the entry .*no plain module name",
        costs="all",
    ),
    ours(
        "such an expression in a forged manifest of a pipeline",
        "2.hang: metadata target_modules (d)",
        signed(manifest_config("unet", target_modules=EVIL, rank_pattern={EVIL_TOO: 16})),
        Bad,
        "rank_pattern has the key .*regular expression",
        costs="all",
    ),
    sd(
        "ranks of a pipeline by an expression that never ends",
        "own: ReDoS in the patterns of the metadata",
        stated(unet__rank_pattern={EVIL: 16}),
        Bad,
        "rank_pattern has the key .*regular expression",
        costs="all",
    ),
    sd(
        "alphas of a pipeline by an expression that never ends",
        "own: ReDoS in the patterns of the metadata",
        stated(text_encoder__alpha_pattern={EVIL: 16}),
        Bad,
        "alpha_pattern has the key .*regular expression",
        costs="all",
    ),
    sd(
        "a pipe without a writer for a pipeline's file",
        "2.hang: weights file is a FIFO",
        replace(PIPELINE, os.mkfifo),
        Bad,
        "pytorch_lora_weights.safetensors: it is no regular file",
    ),
    sd(
        "a rank of a billion in the metadata",
        "2.hang: r=1e9, (d) metadata 1e9",
        stated(unet__r=10**9),
        Mis,
        "rank 16 in file, 1000000000 in config",
        costs="all",
    ),
    flux(
        "a rank of a billion for one target in the metadata",
        "2.hang: r=1e9, (d) metadata 1e9",
        stated(transformer__rank_pattern={"to_q": 10**9}),
        Mis,
        "rank 16 in file, 1000000000 in config, at .*to_q",
        costs="all",
    ),
    sd(
        "metadata nested a hundred thousand deep",
        "2.hang: JSON nested 1e5 (d)",
        metadata(**{METADATA: "[" * 100_000}),
        Bad,
        "lora_adapter_metadata is nested deeper than 32 levels",
        costs="all",
    ),
    sd(
        "metadata nested deeper than asked for",
        "2.hang: JSON nested 1e5 (d)",
        given(stated(unet__corda_config=[[[[[]]]]]), limits=LoadLimits(depth=4)),
        Bad,
        "lora_adapter_metadata is nested deeper than 4 levels",
    ),
    sd(
        "factors of a text encoder that the pipeline has not",
        "2.cryptic: text-encoder keys into a pipeline without text encoder",
        given(),
        Mis,
        "for text_encoder as well, and StableDiffusionPipeline has unet.*strict=False",
        host="sd without text encoder",
    ),
    ours(
        "factors of a text encoder in our own file that the pipeline has not",
        "2.cryptic: text-encoder keys into a pipeline without text encoder",
        given(),
        Mis,
        "for text_encoder as well, and StableDiffusionPipeline has unet.*strict=False",
        host="sd without text encoder",
    ),
    flux(
        "factors of a second text encoder that is of another kind",
        "2.cryptic: text-encoder keys into a pipeline without text encoder",
        both(respell("text_encoder.", "text_encoder_2."), metadata(**{METADATA: GONE})),
        Mis,
        "another architecture|for text_encoder_2 as well",
    ),
    sd(
        "a kohya file of which an alpha has a thousand values",
        "2.cryptic: kohya alpha with 1000 elements",
        kohya(alpha=torch.zeros(1000)),
        Bad,
        "alpha has 1000 elements, not one",
    ),
    sd(
        "factors of B only in a pipeline's file",
        "2.cryptic: only lora_B (`Could not automatically infer state dict type`)",
        only("lora_B"),
        Mis,
        "has lora_B but no lora_A",
    ),
    sd(
        "factors of B only and no metadata",
        "2.cryptic: only lora_B (`Could not automatically infer state dict type`)",
        both(only("lora_B"), metadata(**{METADATA: GONE})),
        Bad,
        "has no lora_A to take a rank from",
    ),
    sd(
        "a pipeline's metadata that is a list",
        "2.cryptic: metadata list",
        metadata(**{METADATA: "[]"}),
        Bad,
        "lora_adapter_metadata is no JSON object",
    ),
    sd(
        "metadata that is null",
        "2.cryptic: metadata list",
        metadata(**{METADATA: "null"}),
        Bad,
        "lora_adapter_metadata is no JSON object",
    ),
    sd(
        "metadata without components",
        "2.cryptic: metadata list",
        metadata(**{METADATA: '{"r": 16, "lora_alpha": 11}'}),
        Bad,
        "lora_adapter_metadata has the key 'r', which is no <component>.<field>",
    ),
    sd(
        "a pipeline's file without its last byte",
        "2.cryptic: Truncated (d)",
        cut(-1),
        Bad,
        "no whole safetensors file",
    ),
    ours(
        "our pipeline's file cut in half",
        "2.cryptic: Truncated (d)",
        cut(20_000),
        Bad,
        "no whole safetensors file: 20000 bytes, header of",
    ),
    sd(
        "a pipeline's file of no bytes",
        "2.cryptic: empty file (d)",
        write(PIPELINE, b""),
        Bad,
        "no whole safetensors file: 0 bytes",
    ),
    sd(
        "a rank in quotes in the metadata",
        "2.cryptic: r='4' (d)",
        stated(unet__r="16"),
        Bad,
        "r is '16', not a positive whole number",
    ),
    sd(
        "no value for alpha in the metadata",
        "2.cryptic: alpha null / '8' (d)",
        stated(unet__lora_alpha=None),
        Bad,
        "lora_alpha is None, not a finite number",
    ),
    sd(
        "another kind of adapter in the metadata",
        "2.cryptic: unknown peft_type (d)",
        stated(unet__peft_type="LOHA"),
        Bad,
        r"keys are no LoRA factors of a pipeline's component: unet\.conv_in\.lora_A",
    ),
    ours(
        "another kind of adapter in the manifest of a pipeline",
        "2.cryptic: unknown peft_type (d)",
        signed(manifest_config("unet", peft_type="SUPERLORA")),
        Bad,
        "peft_type of unet is 'SUPERLORA', not 'LORA'",
    ),
    ours(
        "alphas that are a list in the manifest of a pipeline",
        "own: configs of a pipeline's manifest",
        signed(manifest_config("unet", alpha_pattern=["to_q"])),
        Bad,
        "alpha_pattern is list, not an object",
    ),
    ours(
        "an alpha of four hundred digits in the manifest of a pipeline",
        "own: configs of a pipeline's manifest",
        signed(manifest_config("unet", lora_alpha=10**400)),
        Bad,
        "lora_alpha is 1000.*not a finite number",
    ),
    ours(
        "no kind of adapter in the manifest of a pipeline",
        "2.cryptic: unknown peft_type (d)",
        signed(manifest_config("unet", peft_type=GONE)),
        Bad,
        "peft_type of unet is None, not 'LORA'",
    ),
    sd(
        "a number for the targets in the metadata",
        "2.cryptic: target_modules int (d)",
        stated(unet__target_modules=5),
        Bad,
        "target_modules is 5, not a list of names",
    ),
    sd(
        "LoHa keys",
        "2.clear: LoHa keys (d)",
        respell(".lora_A.weight", ".hada_w1_a"),
        Bad,
        "no LoRA factors of a pipeline's component: .*hada_w1_a",
    ),
    sd(
        "a rank of nothing in the metadata",
        "2.clear: r<=0 (d)",
        stated(unet__r=0),
        Bad,
        "r is 0, not a positive whole number",
    ),
    sd(
        "a denoiser of another size",
        "2.clear: wrong hidden size (d)",
        edit(A, lambda t: torch.zeros(16, 32)),
        Mis,
        r"another size: .*attn1.to_q.lora_A is \(16, 32\) in the file, \(16, 64\) on",
    ),
    flux(
        "a transformer of another size",
        "2.clear: wrong hidden size (d)",
        edit(f"{FLUX}.lora_B.weight", lambda t: torch.zeros(99, 16)),
        Mis,
        r"another size: .*attn.to_q.lora_B is \(99, 16\) in the file, \(32, 16\) on",
    ),
    sd(
        "a convolution's factor of another kernel",
        "2.clear: transposed shapes (d)",
        edit("unet.conv_in.lora_A.weight", lambda t: t[..., :1, :1].clone()),
        Mis,
        r"another size: conv_in.lora_A is \(4, 4, 1, 1\) in the file, \(4, 4, 3, 3\) on",
    ),
    sd(
        "a convolution's factor that is a matrix",
        "2.clear: transposed shapes (d)",
        edit("unet.conv_in.lora_A.weight", lambda t: t.flatten(1).clone()),
        Mis,
        r"another size: conv_in.lora_A is \(4, 36\)",
    ),
    sd(
        "another rank in the metadata",
        "2.clear: r mismatch (d)",
        stated(text_encoder__r=8),
        Mis,
        "rank 16 in file, 8 in config",
    ),
    ours(
        "another rank in the metadata than in the manifest",
        "2.clear: r mismatch (d)",
        stated(text_encoder__r=8),
        None,
        "text_encoder: ",
    ),
    sd(
        "no file",
        "2.clear: config missing (d)",
        drop(PIPELINE),
        Not,
        "the folder holds no .*pytorch_lora_weights.safetensors",
    ),
    sd(
        "a pipeline's file that links out of the folder",
        "2.accepted: symlinked weights pointing out of the folder: followed (d)",
        out_of_folder(PIPELINE),
        Bad,
        "pytorch_lora_weights.safetensors is a link that leads out of its folder",
    ),
    sd(
        "a file that is above",
        '2.accepted: (d) weight_name="../dgood/x": followed',
        given(file="../good/pytorch_lora_weights.safetensors"),
        Opt,
        "leads out of",
    ),
    sd(
        "shapes for another size in the component that comes second",
        "2.transaction: (d) 192 lora modules left in the UNet after a wrong-dimension load",
        edit(B, lambda t: torch.zeros(7, 16)),
        Mis,
        "another size: .*attn1.to_q.lora_B",
    ),
    sd(
        "shapes for another size in the component that comes first",
        "2.transaction: (d) 192 lora modules left in the UNet after a wrong-dimension load",
        edit(f"{TEXT}.lora_A.weight", lambda t: torch.zeros(16, 7)),
        Mis,
        "another size: .*q_proj.lora_A",
    ),
    ours(
        "shapes for another size in our own file of a pipeline",
        "2.transaction: (d) 192 lora modules left in the UNet after a wrong-dimension load",
        signed(edit(B, lambda t: torch.zeros(7, 16))),
        Mis,
        "another size: .*attn1.to_q.lora_B",
    ),
    sd(
        "a component in the metadata of which there are no tensors",
        "own: components that do not agree",
        without("text_encoder"),
        Bad,
        "text_encoder: the file has a config but not tensors",
    ),
    sd(
        "a component of which the metadata says nothing",
        "own: components that do not agree",
        lambda f: drop_component(f),
        Bad,
        "text_encoder: the file has tensors but not a config in lora_adapter_metadata",
    ),
    ours(
        "a manifest of a model in a pipeline's file",
        "own: components that do not agree",
        manifest(lambda m: m["configs"].update(model=m["configs"].pop("unet"))),
        Bad,
        "configs of its manifest are for model, text_encoder, its tensors for text_encoder, unet",
    ),
    ours(
        "metadata of which the JSON is cut",
        "own: lora_adapter_metadata that is broken in our own file",
        metadata(**{METADATA: '{"unet.r": 16,'}),
        None,
        "repaired: lora_adapter_metadata is broken",
    ),
    ours(
        "metadata for other components than the manifest",
        "own: lora_adapter_metadata that is broken in our own file",
        metadata(**{METADATA: '{"vae.r": 16}'}),
        None,
        "repaired: lora_adapter_metadata is broken",
    ),
    ours(
        "a manifest of a pipeline that is no JSON",
        "own: a damaged manifest",
        metadata(**{KEY: "{"}),
        Bad,
        "the manifest is no valid JSON",
    ),
    ours(
        "values changed in our own file of a pipeline",
        "own: altered content of a pipeline's file",
        edit(A, lambda t: t * 1.01),
        Bad,
        "its content has the digest .*its manifest states",
    ),
    ours(
        "another alpha in the manifest of a pipeline",
        "own: altered content of a pipeline's file",
        manifest_config("unet", lora_alpha=44),
        Bad,
        "its content has the digest .*its manifest states",
    ),
    sd(
        "a peft folder's name around a pipeline's tensors",
        "own: one layout under the other's name",
        move(PIPELINE, WEIGHTS),
        Not,
        "no adapter_config.json",
    ),
    Row(
        "a pipeline's name around a peft folder's tensors",
        "own: one layout under the other's name",
        move(WEIGHTS, PIPELINE),
        Not,
        "holds peft factors but no config",
    ),
    sd(
        "one model's file without component names",
        "own: keys of other programs",
        respell("unet.", ""),
        Bad,
        "no LoRA factors of a pipeline's component: conv_in",
    ),
    sd(
        "a file of the makers of Flux",
        "own: keys of other programs",
        tensors(lambda t: {f"double_blocks.0.{k}": v for k, v in t.items()}),
        Bad,
        "no LoRA factors of a pipeline's component: double_blocks",
    ),
    sd(
        "keys of ComfyUI under the header of diffusers",
        "own: keys of other programs",
        respell("unet.", "diffusion_model."),
        None,
        "alpha is the header's, which as a tensor the file does not state",
    ),
    sd(
        "whole modules in the metadata",
        "own: whole modules in a pipeline's file",
        stated(unet__modules_to_save=["conv_out"]),
        Mis,
        "modules_to_save lists 'conv_out', but the file has no tensors",
    ),
    sd(
        "a whole module among the factors",
        "own: whole modules in a pipeline's file",
        both(put("unet.conv_out.weight"), stated(unet__modules_to_save=["conv_out"])),
        Bad,
        "no LoRA factors of a pipeline's component: unet.conv_out.weight",
    ),
    sd(
        "weights that were to be taken out of a denoiser",
        '2.tamper: init_lora_weights="pissa" in the file (d)',
        stated(unet__init_lora_weights="pissa"),
        Bad,
        "changes base weights: init_lora_weights='pissa'",
    ),
    sd(
        "layers repeated in a denoiser",
        "2.hang: layer_replication [[0,2]] x 20000 (d)",
        stated(unet__layer_replication=[[0, 2]] * 20_000),
        Bad,
        "changes base weights: layer_replication",
        costs="all",
    ),
    sd(
        "twenty thousand empty tensors in a pipeline's file",
        "own: many empty tensors",
        header_only(
            {
                f"unet.x{i}.lora_A.weight": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
                for i in range(20_000)
            }
        ),
        Bad,
        "unet",
        costs="steps",
    ),
)


def vae_only(found):
    return {k.replace("unet.", "vae."): v for k, v in found.items() if "attn" in k and "unet" in k}


def drop_component(folder):
    import json

    from tests.damage import raw_header, write_raw

    values, data = raw_header(folder / PIPELINE)
    kept = json.loads(values["__metadata__"][METADATA])
    kept = {k: v for k, v in kept.items() if not k.startswith("text_encoder")}
    values["__metadata__"][METADATA] = json.dumps(kept)
    write_raw(folder / PIPELINE, values, data)
