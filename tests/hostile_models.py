"""Bad adapters for models: see `tests/test_hostile.py` for what a row means."""

import os
import pickle

import torch

from hf_lora.errors import (
    AdapterExists,
    AdapterMismatch,
    AdapterNotFound,
    BadAdapterFile,
    InvalidOption,
)
from hf_lora.manifest import KEY
from tests.damage import (
    CONFIG,
    GONE,
    PIPELINE,
    WEIGHTS,
    Row,
    both,
    config,
    configs,
    drop,
    edit,
    edit_all,
    entry,
    given,
    header_only,
    manifest_config,
    metadata,
    move,
    only,
    put,
    replace,
    respell,
    signed,
    tensors,
    typed,
    without,
    write,
)

Bad, Mis, Not, Opt = BadAdapterFile, AdapterMismatch, AdapterNotFound, InvalidOption

LAYER = "base_model.model.model.layers.1.self_attn.q_proj"
A, B = f"{LAYER}.lora_A.weight", f"{LAYER}.lora_B.weight"
# Expressions that take exponential time on the names of modules.
EVIL = "([a-z_.0-9]+)+X"
EVIL_TOO = r"^(\w+\.?)*$(?<!z)"


class Command:
    """What a pickle would run; the test fails when it does."""

    def __reduce__(self):
        return os.system, ("false planted",)


PICKLE = pickle.dumps(Command())


def torch_file(path):
    torch.save({"lora_A": torch.zeros(2, 2)}, path)


def planted(folder):
    """A module beside the adapter that must not be imported."""
    (folder / "planted.py").write_text("raise SystemExit('planted ran')\n")


def mapping(base, library):
    return both(planted, config(auto_mapping={"base_model_class": base, "parent_library": library}))


def remote_code(folder):
    """A base with code of its own, as `trust_remote_code` would run it."""
    planted(folder)
    (folder / "config.json").write_text(
        '{"model_type": "planted", "auto_map": {"AutoConfig": "planted.Config",'
        ' "AutoModelForCausalLM": "planted.Model"}}'
    )
    config(base_model_name_or_path=str(folder))(folder)


CODE = (
    Row(
        "a pickle under peft's old name",
        "2.code: pickle adapter_model.bin with malicious reduce (p)",
        both(drop(WEIGHTS), write("adapter_model.bin", PICKLE)),
        Not,
        "holds no .*adapter_model.bin is a pickle, which can run code, and is not read",
    ),
    Row(
        "the pickle itself",
        "2.code: pickle adapter_model.bin with malicious reduce (p)",
        given(write("adapter_model.bin", PICKLE), file="adapter_model.bin"),
        Bad,
        r"\.bin files are pickles.*Convert it to safetensors",
    ),
    Row(
        "the pickle of a manifest-less copy of our own file",
        "2.code: same (t): FileNotFoundError for the .safetensors name",
        both(drop(WEIGHTS), write("adapter_model.bin", PICKLE)),
        Not,
        "adapter_model.bin is a pickle",
        file="ours",
    ),
    Row(
        "tensors that torch.save wrote",
        "2.code: benign .bin (p)",
        replace(WEIGHTS, lambda path: torch_file(path.with_name("adapter_model.bin"))),
        Not,
        "adapter_model.bin is a pickle.*Save the adapter again as safetensors",
    ),
    Row(
        "tensors that torch.save wrote under the right name",
        "2.code: benign .bin (p)",
        replace(WEIGHTS, torch_file),
        Bad,
        "no whole safetensors file",
    ),
    Row(
        "auto_mapping to a function of the system",
        "2.code: auto_mapping {os, system}, planted module",
        mapping("system", "os"),
        None,
        "4 targets",
    ),
    Row(
        "auto_mapping to a module beside the adapter",
        "2.code: auto_mapping {os, system}, planted module",
        mapping("Model", "planted"),
        None,
        "4 targets",
    ),
    Row(
        "auto_mapping that is no object",
        "2.code: auto_mapping {os, system}, planted module",
        config(auto_mapping=["planted"]),
        None,
        "4 targets",
    ),
    Row(
        "megatron_core names a module beside the adapter",
        '2.code: megatron_core = planted module / "os" (p, d)',
        both(planted, config(megatron_core="planted")),
        None,
        "4 targets",
    ),
    Row(
        "megatron_core with the config that makes peft import it",
        '2.code: megatron_core = planted module / "os" (p, d)',
        both(planted, config(megatron_core="planted", megatron_config={"tp": 1})),
        Bad,
        "'megatron_config' is not accepted from a file",
    ),
    Row(
        "the base named in the file has code of its own",
        "2.code: base_model_name_or_path -> remote-code repo",
        remote_code,
        None,
        "4 targets",
    ),
    Row(
        "the file gives itself trust",
        '2.code: same with trust_remote_code=True given "for the adapter"',
        both(remote_code, config(trust_remote_code=True)),
        Bad,
        "'trust_remote_code' is not known to the installed peft",
    ),
    Row(
        "the base named in the file is a folder of this machine",
        "2.code: base_model_name_or_path -> other local path",
        config(base_model_name_or_path="/etc"),
        None,
        "the file names the base '/etc', the host is 'mine/base'",
        host="named",
    ),
    Row(
        "the base named in the file is another one",
        "2.code: base_model_name_or_path differs from the model actually passed (p, t)",
        config(base_model_name_or_path="other/base"),
        None,
        "the file names the base 'other/base', the host is 'mine/base'",
        host="named",
    ),
    Row(
        "the base named in our config copy is another one",
        "2.code: base_model_name_or_path differs from the model actually passed (p, t)",
        config(base_model_name_or_path="other/base"),
        None,
        "the file names the base 'other/base', the host is 'mine/base'",
        file="ours",
        host="named",
    ),
    Row(
        "the base named in the file is no name",
        "own: base_model_name_or_path of another type",
        config(base_model_name_or_path={"a": [1]}),
        Bad,
        "base_model_name_or_path is .*, not",
        host="named",
    ),
    Row(
        "the config of the base brings kernel code",
        "1.systems: CVE-2026-4372 (config.json `_attn_implementation_internal`)",
        config(_attn_implementation_internal="planted/kernel"),
        Bad,
        "'_attn_implementation_internal' is not known",
    ),
    Row(
        "a class of its own through auto_map",
        "1.systems: CVE-2026-22807 (auto_map ran without trust_remote_code)",
        both(planted, config(auto_map={"AutoModel": "planted.Model"})),
        Bad,
        "'auto_map' is not known",
    ),
    Row(
        "a deny-listed pickle under another suffix",
        "1.systems: CVE-2026-15969: pickle deny-list bypass",
        given(write("adapter_model.pt", PICKLE), file="adapter_model.pt"),
        Bad,
        r"\.pt files are pickles",
    ),
    Row(
        "a checkpoint for torch.load",
        "1.systems: LoRA loaded with torch.load without weights_only",
        given(write("lora.ckpt", PICKLE), file="lora.ckpt"),
        Bad,
        r"\.ckpt files are pickles",
    ),
    Row(
        "a pickle under the suffix of safetensors",
        "1.systems: CVE-2025-32434 (RCE with weights_only=True)",
        given(write("lora.safetensors", PICKLE), file="lora.safetensors"),
        Bad,
        "no whole safetensors file",
    ),
    Row(
        "a pickle of which the suffix says nothing",
        "1.systems: CVE-2026-24747 (heap corruption with weights_only=True)",
        given(both(drop(WEIGHTS), write("lora.data", PICKLE)), file="lora.data"),
        Bad,
        "no whole safetensors file",
    ),
)


def whole(name, value, **fields):
    """Adds a module trained whole, listed as peft lists it."""
    return both(put(f"base_model.model.{name}", value), config(**fields))


TAMPERED = (
    Row(
        "zeros for the output matrix",
        "2.tamper: extra key base_model.model.lm_head.weight (zeros) in a q/v LoRA file",
        put("base_model.model.lm_head.weight", torch.zeros(96, 32)),
        Bad,
        "neither LORA factors nor inside modules_to_save.*lm_head.*overwrite base weights",
    ),
    Row(
        "zeros for the output matrix in our own file",
        "2.tamper: extra key base_model.model.lm_head.weight (zeros) in a q/v LoRA file",
        signed(put("base_model.model.lm_head.weight", torch.zeros(96, 32))),
        Bad,
        "lm_head.*overwrite base weights",
        file="ours",
    ),
    Row(
        "a base weight of a layer that is no target",
        "2.tamper: same for mlp.up_proj.weight, q_proj.base_layer.weight",
        put("base_model.model.model.layers.0.mlp.up_proj.weight", torch.zeros(48, 32)),
        Bad,
        "mlp.up_proj.weight.*overwrite base weights",
    ),
    Row(
        "a base weight below a target",
        "2.tamper: same for mlp.up_proj.weight, q_proj.base_layer.weight",
        put(f"{LAYER}.base_layer.weight", torch.zeros(32, 32)),
        Mis,
        "own copy of the base weight .*q_proj.base_layer.weight.*overwrite the base",
    ),
    Row(
        "a norm's weight",
        "2.tamper: after that: disable_adapter(), unload(), delete_adapter()",
        put("base_model.model.model.norm.weight", torch.zeros(32)),
        Bad,
        "model.norm.weight.*overwrite base weights",
    ),
    Row(
        "the output matrix trained whole, zeroed",
        "2.tamper: modules_to_save lm_head zeroed; save_embedding_layers weights zeroed",
        whole("lm_head.weight", torch.zeros(96, 32), modules_to_save=["lm_head"]),
        Opt,
        r"replaces pretrained modules: lm_head \(3,072 values\).*extra_modules=True",
    ),
    Row(
        "the embedding that peft saves as well, zeroed",
        "2.tamper: modules_to_save lm_head zeroed; save_embedding_layers weights zeroed",
        put("base_model.model.model.embed_tokens.weight", torch.zeros(96, 32)),
        Bad,
        "embed_tokens.weight.*overwrite base weights",
    ),
    Row(
        "a targeted embedding's base copy, zeroed",
        "2.tamper: modules_to_save lm_head zeroed; save_embedding_layers weights zeroed",
        put("base_model.model.model.embed_tokens.base_layer.weight", torch.zeros(96, 32)),
        Mis,
        "own copy of the base weight model.embed_tokens.base_layer.weight",
    ),
    Row(
        "NaN in A",
        "2.tamper: NaN / Inf / 1e30 weight; fp16 overflow file",
        edit(A, lambda t: t * float("nan")),
        Bad,
        "layers.1.self_attn.q_proj.lora_A holds NaN or infinite values",
    ),
    Row(
        "one infinity in B",
        "2.tamper: NaN / Inf / 1e30 weight; fp16 overflow file",
        edit(B, lambda t: t.index_fill(0, torch.tensor([3]), float("inf"))),
        Bad,
        "q_proj.lora_B holds NaN or infinite values",
    ),
    Row(
        "values of 1e30",
        "2.tamper: NaN / Inf / 1e30 weight; fp16 overflow file",
        edit(A, lambda t: torch.full_like(t, 1e30)),
        Bad,
        "q_proj.lora_A holds values up to 1e\\+30",
    ),
    Row(
        "fp16 values that overflowed",
        "2.tamper: NaN / Inf / 1e30 weight; fp16 overflow file",
        edit_all(lambda t: (t * 1e7).half()),
        Bad,
        "holds NaN or infinite values",
    ),
    Row(
        "fp64 values beyond fp32",
        "own: fp64 values beyond the host's dtype",
        edit(A, lambda t: t.double() * 1e300),
        Bad,
        "q_proj.lora_A holds values up to",
    ),
    Row(
        "NaN in our own file",
        "own: not finite values in a file with a digest that fits",
        signed(edit(B, lambda t: t * float("nan"))),
        Bad,
        "q_proj.lora_B holds NaN or infinite values",
        file="ours",
    ),
    Row(
        "values changed in our own file",
        "4.goals: Base integrity / mixed pair refused: weights altered after the save",
        edit(A, lambda t: t * 1.01),
        Bad,
        "its content has the digest v1:sha256:.*its manifest states v1:sha256:.*download or save",
        file="ours",
    ),
    Row(
        "a negative alpha",
        '2.tamper: alpha -8, 1e38, alpha_pattern {".*": -100}',
        config(lora_alpha=-11),
        None,
        "4 targets",
        scale=-1.0,
    ),
    Row(
        "an alpha of 1e38",
        '2.tamper: alpha -8, 1e38, alpha_pattern {".*": -100}',
        config(lora_alpha=1e38),
        Bad,
        r"scaling at .* is 6\.25e\+36, .*far off.*lora_alpha",
    ),
    Row(
        "an alpha for every name by an expression",
        '2.tamper: alpha -8, 1e38, alpha_pattern {".*": -100}',
        config(alpha_pattern={".*": -100}),
        Bad,
        r"alpha_pattern has the key '\.\*', which is a regular expression",
    ),
    Row(
        "no alpha in the config",
        "2.tamper: alpha key missing (16 -> default 8)",
        config(lora_alpha=GONE),
        None,
        "repaired: adapter_config.json states no lora_alpha; peft's default 8 was taken",
        scale=8 / 11,
    ),
    Row(
        "no alpha in the config beside our own file",
        "2.tamper: alpha key missing (16 -> default 8)",
        config(lora_alpha=GONE),
        None,
        "repaired: lora_alpha is .* in adapter_config.json, but 11 in the header, which holds",
        file="ours",
    ),
    Row(
        "no rank in the config",
        "2.tamper: alpha key missing (16 -> default 8)",
        config(r=GONE),
        Mis,
        "rank 16 in file, 8 in config",
    ),
    Row(
        "an alpha of NaN",
        "2.tamper: alpha NaN (JSON NaN is parsed)",
        config(lora_alpha=float("nan")),
        Bad,
        r"adapter_config.json: it is no valid JSON \(NaN is no JSON number\)",
    ),
    Row(
        "an alpha of NaN beside our own file",
        "2.tamper: alpha NaN (JSON NaN is parsed)",
        config(lora_alpha=float("nan")),
        None,
        r"repaired: adapter_config.json is broken .*NaN is no JSON number.*the header was used",
        file="ours",
    ),
    Row(
        "an infinite alpha",
        "2.tamper: alpha NaN (JSON NaN is parsed)",
        config(lora_alpha=float("-inf")),
        Bad,
        "-Infinity is no JSON number",
    ),
    Row(
        "rsLoRA flipped, which a foreign file cannot tell",
        "2.tamper: use_rslora flipped",
        config(use_rslora=True),
        None,
        "4 targets",
        scale=4.0,  # sqrt(16)
    ),
    Row(
        "rsLoRA flipped beside our own file",
        "2.tamper: use_rslora flipped",
        config(use_rslora=True),
        None,
        "repaired: use_rslora is true in adapter_config.json, but false in the header",
        file="ours",
    ),
    Row(
        "rsLoRA as text",
        "2.tamper: use_rslora flipped",
        config(use_rslora="false"),
        Bad,
        "use_rslora is 'false', not true or false",
    ),
    Row(
        "weights that were to be taken out of the base",
        '2.tamper: init_lora_weights="pissa" in the file',
        config(init_lora_weights="pissa"),
        Bad,
        "changes base weights: init_lora_weights='pissa'",
    ),
    Row(
        "the same in our config copy",
        '2.tamper: init_lora_weights="pissa" in the file',
        config(init_lora_weights="pissa_niter_16"),
        Bad,
        "changes base weights: init_lora_weights='pissa_niter_16'",
        file="ours",
    ),
    Row(
        "weights that were to be quantised with the base",
        '2.tamper: init_lora_weights="pissa" in the file',
        config(init_lora_weights="loftq", loftq_config={"loftq_bits": 4}),
        Bad,
        "changes base weights: init_lora_weights='loftq'",
    ),
    Row(
        "another base of the same shapes",
        "2.tamper: same-shaped other base; Llama adapter on Qwen2 of same dims",
        given(),
        Mis,
        r"made on another base: \d+ of \d+ weights differ, for instance .*strict=False",
        file="ours",
        host="other seed",
    ),
    Row(
        "another family of the same shapes",
        "2.tamper: same-shaped other base; Llama adapter on Qwen2 of same dims",
        given(),
        Mis,
        "made on another base",
        file="ours",
        host="qwen3 other seed",
    ),
    Row(
        "another base, of which a foreign file says nothing",
        "2.tamper: same-shaped other base; Llama adapter on Qwen2 of same dims",
        given(),
        None,
        "base: not verified: the file carries no fingerprint",
        host="other seed",
    ),
    Row(
        "a base with fewer layers",
        "2.tamper: fewer layers in base than adapter",
        given(),
        Mis,
        "2 of its 4 targets are no modules of LlamaForCausalLM",
        host="one layer",
    ),
    Row(
        "layers_to_transform narrower than the weights",
        "2.tamper: layers_to_transform / target_modules / exclude_modules narrower than weights",
        config(layers_to_transform=[0]),
        Mis,
        "tensors for 2 layers that its config does not target: .*layers.1",
    ),
    Row(
        "target_modules narrower than the weights",
        "2.tamper: layers_to_transform / target_modules / exclude_modules narrower than weights",
        config(target_modules=["q_proj"]),
        Mis,
        "tensors for 2 layers that its config does not target: .*v_proj",
    ),
    Row(
        "target_modules narrower beside our own file",
        "2.tamper: layers_to_transform / target_modules / exclude_modules narrower than weights",
        config(target_modules=["q_proj"]),
        None,
        "repaired: target_modules is .*q_proj.* in adapter_config.json, but .* in the header",
        file="ours",
    ),
    Row(
        "exclude_modules narrower than the weights",
        "own: exclude_modules narrower than the weights",
        config(exclude_modules=["v_proj"]),
        Mis,
        "tensors for 2 layers that its config does not target: .*v_proj",
    ),
    Row(
        "layers_to_transform as text",
        "own: layers_to_transform of another type",
        config(layers_to_transform="0"),
        Bad,
        "layers_to_transform is '0', not",
    ),
    Row(
        "layers_to_transform of objects",
        "own: layers_to_transform of another type",
        config(layers_to_transform=[{"a": 1}]),
        Bad,
        "layers_to_transform",
    ),
    Row(
        "half of the layers missing",
        "2.tamper: half the keys missing / only lora_A / keys match nothing / zero tensors",
        without("layers.1"),
        Mis,
        "config targets 2 layers for which the file has no tensors: .*incomplete",
    ),
    Row(
        "no B at all",
        "2.tamper: half the keys missing / only lora_A / keys match nothing / zero tensors",
        only("lora_A"),
        Mis,
        "has lora_A but no lora_B",
    ),
    Row(
        "no tensors at all",
        "2.tamper: half the keys missing / only lora_A / keys match nothing / zero tensors",
        only("nothing"),
        Bad,
        "no key of the 0 tensors is a LORA factor",
    ),
    Row(
        "names that match no module",
        "own: keys match nothing",
        respell("self_attn", "attention"),
        Mis,
        "another architecture: 4 of its 4 targets are no modules.*Closest: model.layers",
    ),
    Row(
        "tensors missing from our own file",
        "own: half the keys missing from a file with a digest",
        without("layers.1"),
        Bad,
        "digest",
        file="ours",
    ),
    Row(
        "keys without peft's prefix",
        "2.tamper: keys without base_model prefix",
        respell("base_model.model.", ""),
        None,
        "4 targets",
    ),
    Row(
        "one target under both spellings of its keys",
        "2.tamper: keys without base_model prefix",
        put(A.removeprefix("base_model.model."), torch.zeros(16, 32)),
        Bad,
        "stands twice, under two spellings",
    ),
    Row(
        "adapter names left in the keys",
        "own: keys with the adapter's name",
        respell(".weight", ".default.weight"),
        Bad,
        "q_proj has no lora_A, but lora_A.default.weight, lora_B.default.weight.*adapter's name",
    ),
    Row(
        "LoRA weights under the config of IA3",
        "2.tamper: peft_type IA3 with LoRA weights",
        config(peft_type="IA3"),
        Bad,
        "4 tensors|8 tensors are neither IA3 factors",
    ),
    Row(
        "the config of IA3 beside our own file",
        "2.tamper: peft_type IA3 with LoRA weights",
        config(peft_type="IA3"),
        None,
        'repaired: peft_type is "IA3" in adapter_config.json, but "LORA" in the header',
        file="ours",
    ),
    Row(
        "IA3 weights under the config of LoRA",
        "2.tamper: peft_type IA3 with LoRA weights",
        config(peft_type="LORA"),
        Bad,
        "neither LORA factors",
        file="ia3",
    ),
    Row(
        "a field of a newer peft that changes the result",
        "2.tamper: unknown newer field",
        config(lora_temperature=0.5),
        Bad,
        "'lora_temperature' is not known to the installed peft.*Update peft",
    ),
    Row(
        "a field of a newer peft that is off",
        "2.tamper: unknown newer field",
        config(lora_temperature=None),
        None,
        "4 targets",
    ),
    Row(
        "a field of a newer peft in the config beside our own file",
        "2.tamper: unknown newer field",
        config(lora_temperature=0.5),
        None,
        "repaired: lora_temperature is 0.5 in adapter_config.json, but null in the header",
        file="ours",
    ),
    Row(
        "DoRA without magnitudes",
        "2.tamper: use_dora true, no magnitude",
        config(use_dora=True),
        Mis,
        "use_dora is set but .* has no magnitude",
    ),
    Row(
        "DoRA with one magnitude missing",
        "2.tamper: use_dora true, no magnitude",
        without("layers.0.self_attn.q_proj.lora_magnitude_vector.weight"),
        Mis,
        "use_dora is set but .*layers.0.self_attn.q_proj has no magnitude",
        file="dora",
    ),
    Row(
        "magnitudes without DoRA",
        "2.tamper: use_dora true, no magnitude",
        config(use_dora=False),
        Mis,
        "4 have no place",
        file="dora",
    ),
    Row(
        "magnitudes of the wrong length",
        "own: a magnitude of the wrong shape",
        edit(f"{LAYER}.lora_magnitude_vector.weight", lambda t: t[:5].clone()),
        Mis,
        r"q_proj.lora_magnitude_vector is \(5,\) in the file, \(32,\) on",
        file="dora",
    ),
    Row(
        "int8 values",
        "2.tamper: int8 / bool tensors as weights",
        edit(A, lambda t: (t * 100).to(torch.int8)),
        Bad,
        "q_proj.lora_A holds int8 values",
    ),
    Row(
        "bool values",
        "2.tamper: int8 / bool tensors as weights",
        edit(B, lambda t: t > 0),
        Bad,
        "q_proj.lora_B holds bool values",
    ),
    Row(
        "int64 values for another kind than LoRA",
        "2.tamper: int8 / bool tensors as weights",
        edit_all(lambda t: t.to(torch.int64)),
        Bad,
        "int64 values where the host has float32",
        file="loha",
    ),
    Row(
        "complex64 values",
        "2.tamper: complex64",
        typed(A, "C64", 8),
        Bad,
        "q_proj.lora_A.weight has the dtype C64, which is not read.*Save it in one of F64",
    ),
    Row(
        "a dtype of which nobody knows",
        "2.tamper: complex64",
        typed(A, "F31", 4),
        Bad,
        "has the dtype F31, which is not read",
    ),
    Row(
        "a dtype that is no text",
        "2.tamper: complex64",
        entry(A, dtype=["F32"]),
        Bad,
        "header entry of .*q_proj.lora_A.weight' is malformed",
    ),
    Row(
        "fp8 values, which are numbers like others",
        "own: fp8",
        edit_all(lambda t: t.to(torch.float8_e4m3fn)),
        None,
        "4 targets",
        like=edit_all(lambda t: t.to(torch.float8_e4m3fn).float()),
    ),
    Row(
        "a sub-byte dtype",
        "own: fp4",
        typed(A, "F4", 1),
        Bad,
        "has the dtype F4, which is not read",
    ),
    Row(
        "two safetensors files of unknown names",
        "2.tamper: two .safetensors in the folder",
        both(lambda f: (f / "b.safetensors").write_bytes(b"x"), move(WEIGHTS, "a.safetensors")),
        Bad,
        "holds 2 adapters: a.safetensors, b.safetensors.*Name one: file='a.safetensors'",
    ),
    Row(
        "a peft folder with a pipeline's file in it",
        "2.tamper: two .safetensors in the folder",
        lambda f: (f / PIPELINE).write_bytes((f / WEIGHTS).read_bytes()) and None,
        Bad,
        "holds 2 adapters: adapter_model.safetensors, pytorch_lora_weights.safetensors",
    ),
    Row(
        "two files and one of them named",
        "2.tamper: two .safetensors in the folder",
        given(write("b.safetensors", b"x"), file=WEIGHTS),
        None,
        "4 targets",
    ),
    Row(
        "a name in use, with other targets and rank",
        '2.tamper: load_adapter("default") twice, other targets/rank',
        given(),
        AdapterExists,
        "already has an adapter 'default'.*Choose another name=",
        host="loaded",
    ),
    Row(
        "a name in use, with another alpha",
        '2.tamper: load_adapter("default") twice, alpha 16 -> other',
        config(lora_alpha=16),
        AdapterExists,
        "already has an adapter 'default'",
        host="loaded",
    ),
    Row(
        "an adapter named like a module that holds targets",
        "2.tamper: second adapter named self_attn / q_proj, save first",
        given(name="self_attn"),
        Opt,
        "'self_attn' is also a part of module names",
        host="loaded",
    ),
    Row(
        "an adapter named like a target",
        "2.tamper: second adapter named self_attn / q_proj, save first",
        given(name="q_proj"),
        Opt,
        "'q_proj' is also a part of module names",
        host="loaded",
    ),
    Row(
        "an adapter named weight",
        '2.tamper: adapter named "weight", "base_layer", "0"',
        given(name="weight"),
        Opt,
        "'weight' is also a part of module names",
    ),
    Row(
        "an adapter named like peft's own attribute",
        '2.tamper: adapter named "weight", "base_layer", "0"',
        given(name="base_layer"),
        Opt,
        "'base_layer' is also a part of module names",
    ),
    Row(
        "an adapter named like a layer's number",
        '2.tamper: adapter named "weight", "base_layer", "0"',
        given(name="0"),
        Opt,
        "'0' is also a part of module names",
    ),
)


def many_tensors(count):
    """A header of empty tensors only."""
    one = b'"base_model.model.x%d.lora_A.weight":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    return b"{" + b",".join(one % i for i in range(count)) + b"}"


def long_header(folder):
    """76 MB of header, as a hole in the file."""
    path = folder / WEIGHTS
    path.write_bytes((76 << 20).to_bytes(8, "little") + b"{")
    os.truncate(path, 80 << 20)


def fifo(name):
    return replace(name, os.mkfifo)


HANGING = (
    Row(
        "targets by an expression that never ends",
        "2.hang: ReDoS string in target_modules",
        config(target_modules=EVIL),
        None,
        "target_modules is an expression, so it was not checked that no target is missing",
        costs="all",
    ),
    Row(
        "such an expression among the targets",
        "2.hang: ReDoS string in target_modules",
        config(target_modules=["q_proj", EVIL_TOO]),
        Bad,
        "target_modules has the entry .*no plain module name",
        costs="all",
    ),
    Row(
        "such an expression beside our own file",
        "2.hang: ReDoS string in target_modules",
        config(target_modules=EVIL),
        None,
        "repaired: target_modules is",
        file="ours",
        costs="all",
    ),
    Row(
        "exclusion by an expression that never ends",
        "2.hang: exclude_modules",
        config(exclude_modules=EVIL),
        None,
        "exclude_modules is an expression",
        costs="all",
    ),
    Row(
        "such an expression among the exclusions",
        "2.hang: exclude_modules",
        config(exclude_modules=[EVIL]),
        Bad,
        "exclude_modules has the entry .*no plain module name",
        costs="all",
    ),
    Row(
        "ranks by an expression that never ends",
        "2.hang: rank_pattern key",
        config(rank_pattern={EVIL: 16}),
        Bad,
        "rank_pattern has the key .*regular expression.*not run",
        costs="all",
    ),
    Row(
        "ranks of LoHa by such an expression",
        "2.hang: rank_pattern key",
        config(rank_pattern={EVIL: 4}),
        Bad,
        "rank_pattern has the key .*regular expression",
        file="loha",
        costs="all",
    ),
    Row(
        "alphas by an expression that never ends",
        "2.hang: alpha_pattern key",
        config(alpha_pattern={EVIL_TOO: 11}),
        Bad,
        "alpha_pattern has the key .*regular expression",
        costs="all",
    ),
    Row(
        "alphas by such an expression in a forged manifest",
        "2.hang: alpha_pattern key",
        signed(manifest_config(alpha_pattern={EVIL: 11})),
        Bad,
        "alpha_pattern has the key .*regular expression",
        file="ours",
        costs="all",
    ),
    Row(
        "whole modules by an expression that never ends",
        "2.hang: modules_to_save (p, t)",
        config(modules_to_save=[EVIL]),
        Bad,
        "modules_to_save has the entry .*no plain module name",
        costs="all",
    ),
    Row(
        "layers by an expression that never ends",
        "own: ReDoS in layers_pattern",
        config(layers_pattern=EVIL, layers_to_transform=[0, 1]),
        Bad,
        "layers_pattern has the entry .*no plain module name",
        costs="all",
    ),
    Row(
        "feed-forward layers by such an expression",
        "own: ReDoS in feedforward_modules",
        config(feedforward_modules=EVIL),
        Bad,
        "feedforward_modules has the entry .*no plain module name",
        file="ia3",
        costs="all",
    ),
    Row(
        "block sizes by such an expression",
        "own: ReDoS in block_size_pattern",
        config(block_size_pattern={EVIL: 8}),
        Bad,
        "block_size_pattern has the key .*regular expression",
        file="c3a",
        costs="all",
    ),
    Row(
        "a block size of a billion for one target",
        "own: sizes of other kinds than LoRA",
        config(block_size_pattern={"q_proj": 10**9}),
        Bad,
        r"block_size_pattern\['q_proj'\] is 1000000000, but no tensor",
        file="c3a",
        costs="all",
    ),
    Row(
        "parameters by such an expression",
        "own: ReDoS in target_parameters",
        config(target_parameters=[EVIL]),
        Mis,
        "target_parameters has .*which names no parameter of LlamaForCausalLM",
        costs="all",
    ),
    Row(
        "new tokens of modules by such an expression",
        "own: ReDoS in trainable_token_indices",
        config(trainable_token_indices={EVIL: [1]}),
        Bad,
        "trainable_token_indices",
        costs="all",
    ),
    Row(
        "layers repeated twenty thousand times",
        "2.hang: layer_replication [[0,2]] x 20000",
        config(layer_replication=[[0, 2]] * 20000),
        Bad,
        "changes base weights: layer_replication",
        costs="all",
    ),
    Row(
        "a pipe without a writer for the weights",
        "2.hang: weights file is a FIFO",
        fifo(WEIGHTS),
        Bad,
        "adapter_model.safetensors: it is no regular file",
    ),
    Row(
        "a pipe without a writer for the config",
        "2.hang: weights file is a FIFO",
        fifo(CONFIG),
        Bad,
        "adapter_config.json: it is no regular file",
    ),
    Row(
        "a pipe for the config beside our own file",
        "2.hang: weights file is a FIFO",
        fifo(CONFIG),
        None,
        "repaired: adapter_config.json is broken .it is no regular file",
        file="ours",
    ),
    Row(
        "a rank of a million",
        "2.hang: r=1e6 (4 MB of real weights absent)",
        config(r=10**6),
        Mis,
        "rank 16 in file, 1000000 in config",
        costs="all",
    ),
    Row(
        "a rank of a million for LoHa",
        "2.hang: r=1e6 (4 MB of real weights absent)",
        config(r=10**6),
        Bad,
        "r is 1000000, but no tensor of the file is larger than",
        file="loha",
        costs="all",
    ),
    Row(
        "a rank of a billion",
        "2.hang: r=1e9, rank_pattern 1e9, (d) metadata 1e9",
        config(r=10**9),
        Mis,
        "rank 16 in file, 1000000000 in config",
        costs="all",
    ),
    Row(
        "a rank of a billion for one target",
        "2.hang: r=1e9, rank_pattern 1e9, (d) metadata 1e9",
        config(rank_pattern={"v_proj": 10**9}),
        Mis,
        "rank 16 in file, 1000000000 in config, at .*v_proj",
        costs="all",
    ),
    Row(
        "a rank of a billion for one target of LoHa",
        "2.hang: r=1e9, rank_pattern 1e9, (d) metadata 1e9",
        config(rank_pattern={"v_proj": 10**9}),
        Bad,
        "rank_pattern.* is 1000000000, but no tensor",
        file="loha",
        costs="all",
    ),
    Row(
        "a header of 76 MB",
        "2.hang: header 76 MB / 1.3 M tensors",
        long_header,
        Bad,
        r"its header has 79,691,776 bytes, over the limit.*limits=LoadLimits\(header=",
        costs="all",
    ),
    Row(
        "a header of too many tensors",
        "2.hang: header 76 MB / 1.3 M tensors",
        header_only(b'{"":"data_offsets"' + b',"data_offsets"' * 500_000),
        Bad,
        "names more than 500,000 tensors",
        costs="all",
    ),
    Row(
        "a header of too many objects",
        "2.hang: header 76 MB / 1.3 M tensors",
        header_only(b"{" * 1_000_001),
        Bad,
        "names more than 500,000 tensors",
        costs="all",
    ),
    Row(
        "a config nested a hundred thousand deep",
        "2.hang: JSON nested 1e5",
        write(CONFIG, b"[" * 100_000),
        Bad,
        "adapter_config.json: it is nested deeper than 32 levels",
        costs="all",
    ),
    Row(
        "a header nested a hundred thousand deep",
        "2.hang: JSON nested 1e5",
        header_only(b'{"a":' * 100_000),
        Bad,
        "the header is nested deeper than 32 levels",
        costs="all",
    ),
    Row(
        "a manifest nested a hundred thousand deep",
        "2.hang: JSON nested 1e5",
        metadata(**{KEY: "[" * 100_000}),
        Bad,
        "the manifest is nested deeper than 32 levels",
        file="ours",
        costs="all",
    ),
    Row(
        "a hundred thousand empty tensors",
        "1.systems: 10k empty tensors in a 0.6 MB header = 0.83 s load_file, 100k = 16 s",
        header_only(many_tensors(100_000)),
        Bad,
        r"x0.lora_A holds float32 values of shape \(0,\)",
        costs="steps",
    ),
    Row(
        "a rank for each of ten thousand names",
        "own: patterns times targets",
        lambda f: quadratic(f),
        Mis,
        "another architecture: 1000 of its 1000 targets",
        costs="all",
    ),
    Row(
        "a tensor of which the name is a megabyte",
        "own: a long name to compare with all modules",
        respell("self_attn", "x" * 1_000_000),
        Bad,
        "name of 1,000,0.. characters",
        costs="all",
    ),
    Row(
        "a hundred thousand modules to save",
        "own: modules_to_save times keys",
        both(
            config(modules_to_save=[f"m{i}" for i in range(100_000)]),
            header_only(many_tensors(1000)),
        ),
        Bad,
        "of shape",
        costs="all",
    ),
    Row(
        "a hundred thousand targets",
        "own: target_modules times modules",
        configs(
            lambda c: c.update(
                target_modules=c["target_modules"] + [f"m{i}" for i in range(90_000)]
            )
        ),
        None,
        "4 targets",
        costs="all",
    ),
)


def quadratic(folder):
    """A thousand targets and twenty thousand names with ranks of their own."""
    config(rank_pattern={f"n{i}": 1 for i in range(20_000)}, r=1)(folder)
    tensors(
        lambda _: {
            f"base_model.model.layers.x{i}.q_proj.lora_{side}.weight": torch.ones(1, 1)
            for i in range(1_000)
            for side in "AB"
        }
    )(folder)
