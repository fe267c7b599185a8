"""Writes the test vectors of docs/format.md with hf_lora: `python -m tests.vectors.make [folder]`.

Running it twice gives byte-equal files: values are seeded integers over powers of two, which every
dtype that is used holds exactly, and nothing depends on a clock, a path or a library's defaults.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

from hf_lora import save_adapter
from hf_lora.adapter import Adapter, Component
from hf_lora.fingerprint import Fingerprint
from hf_lora.formats.container import to_safetensors
from hf_lora.manifest import Base, Manifest
from hf_lora.paths import canonical_names
from tests.vectors.bases import base, bases, comparisons, whole
from tests.vectors.spoilt import refusals, with_bare_magnitudes, without

HERE = Path(__file__).parent
F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
BITS = {F64: 40, F32: 20, F16: 9, BF16: 6, E4M3: 3, E5M2: 2}  # behind the point, held exactly

Q, V = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"
UP, DOWN = "model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj"


def fill(name, *shape, dtype=F32):
    bits = BITS[dtype]
    return torch.from_numpy(whole(name, shape, bits) / (1 << bits)).to(dtype)


def pair(path, rank=2, wide=6, out=5, dtype=F32):
    """Returns the factors of one target."""
    a, b = fill(f"{path}.A", rank, wide, dtype=dtype), fill(f"{path}.B", out, rank, dtype=dtype)
    return {"lora_A": a, "lora_B": b}


def pairs(*paths, **sizes):
    return {path: pair(path, **sizes) for path in paths}


def lora(targets, modules=None, **fields):
    names = sorted({path.rpartition(".")[2] for path in targets})
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": names, **fields}
    return Component(config, targets, modules or {})


def other(kind, targets, **fields):
    return Component({"peft_type": kind, "inference_mode": True, **fields}, targets)


def renamed(component, old, new):
    """Returns the component with the start of its paths spelt otherwise."""
    paths = {path: path.replace(old, new, 1) for path in component.targets}
    return replace(component, targets={paths[p]: held for p, held in component.targets.items()})


# --- adapters -------------------------------------------------------------------------------


def patterns():
    targets = pairs(V, DOWN, dtype=BF16)
    targets |= {Q: pair(Q, 4, dtype=BF16), UP: pair(UP, 3, dtype=BF16)}
    return lora(
        targets,
        lora_alpha=7,
        rank_pattern={r"^model\.layers\.0\.self_attn\.q_proj": 4, "mlp.up_proj": 3},
        alpha_pattern={  # in the order of the characters, which a saved file has
            r".*\.v_proj": 1.5,
            r"^layers\.1\.mlp\.down_proj": 5,
            "proj": 9,
            "self_attn.v_proj": 2,
            "up_proj$": 11,
        },
    )


def widened(component):
    """Returns the component with the same values in float32."""
    targets = component.targets.items()
    wide = {path: {name: f.float() for name, f in held.items()} for path, held in targets}
    return replace(component, targets=wide)


def dora():
    held = pair(Q) | {"lora_magnitude_vector": fill("m", 5)}
    return lora({Q: held}, use_dora=True)


def lora_bias():
    return lora({Q: pair(Q) | {"lora_B.bias": fill("bias", 5)}}, lora_bias=True)


def head():
    held = {
        "dense.weight": fill("dense", 4, 4),
        "dense.bias": fill("dense.bias", 4, dtype=F16),
        "inner.classifier.weight": fill("inner", 2, 4),
        "mask": torch.tensor([True, False, True]),
        "out_proj.weight": fill("out", 3, 4, dtype=BF16),
        "steps": torch.tensor([-3, 1 << 40]),
    }
    fields = {"modules_to_save": ["classifier"], "task_type": "SEQ_CLS"}
    return lora(pairs(Q), {"model.classifier": held}, **fields)


def embedding():
    table = "model.embed_tokens"
    factors = {"lora_embedding_A": fill("ea", 2, 11), "lora_embedding_B": fill("eb", 4, 2)}
    return lora({table: factors}, {table: {"base_layer.weight": fill("table", 11, 4)}})


def conv2d():
    factors = {"lora_A": fill("ca", 2, 3, 3, 3), "lora_B": fill("cb", 4, 2, 1, 1)}
    return lora({"model.conv_in": factors}, use_rslora=True)


def qalora():
    factors = {"lora_A": fill("qa", 2, 3), "lora_B": fill("qb", 5, 2)}
    return lora({Q: factors}, use_qalora=True, qalora_group_size=2)


def eights():
    return lora({Q: pair(Q, dtype=E4M3), V: pair(V, dtype=E5M2)})


def loha():
    names = ("hada_w1_a", "hada_w2_a", "hada_w1_b", "hada_w2_b")
    held = {n: fill(n, *((5, 2) if n.endswith("a") else (2, 6))) for n in names}
    fields = {"r": 2, "alpha": 3, "rank_dropout": 0.1, "rank_pattern": {}, "init_weights": True}
    return other(
        "LOHA", {Q: held}, **fields, alpha_pattern={"k_proj": 1}, target_modules=["q_proj"]
    )


def ia3():
    targets = {Q: {"ia3_l": fill("l", 5, 1)}, DOWN: {"ia3_l": fill("d", 1, 6)}}
    return other("IA3", targets, feedforward_modules=["down_proj"], fan_in_fan_out=False)


def oft():
    held = {"oft_R.weight": fill("R", 2, 3)}
    return other(
        "OFT", {Q: held}, r=0, oft_block_size=3, coft=False, eps=6e-05, use_cayley_neumann=True
    )


def vision_language():
    paths = ("layers.0.self_attn.q_proj", "layers.1.self_attn.q_proj")
    tower = "model.vision_tower.encoder.layers.0.self_attn.q_proj"
    return lora(pairs(*(f"model.language_model.{path}" for path in paths), tower))


def older(component):
    component = renamed(component, "model.language_model.", "language_model.model.")
    return renamed(component, "model.vision_tower.", "vision_tower.vision_model.")


def collision():
    return lora(pairs(Q, Q.replace("model", "language_model"), UP, "model.transformer"))


def pipeline():
    block = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    unet = pairs(f"{block}.to_q", f"{block}.to_v")
    for path in unet:
        unet[path]["lora_magnitude_vector"] = fill(f"{path}.m", 5)
    text = pairs("encoder.layers.0.self_attn.q_proj", "encoder.layers.1.self_attn.q_proj")
    for path in text:
        text[path]["lora_B.bias"] = fill(f"{path}.bias", 5)
    return {
        "text_encoder": lora(text, lora_bias=True, alpha_pattern={"layers.1.self_attn.q_proj": 3}),
        "unet": lora(unet, use_dora=True, lora_alpha=1),
    }


def facts(**fingerprints):
    return Manifest(
        base=Base("example/tiny", "c0ffee" * 6 + "c0ff", fingerprints),
        host="LlamaForCausalLM",
        family="llama",
        training={"steps": 10, "learning_rate": 1e-4, "note": "größer"},
        trigger_words=("fjörd", "浮世絵 🎏"),
        derived_from=("v1:sha256:" + "0" * 64,),
        optional=("example",),
        foreign={"ss_tag_frequency": '{"höhe": {"雪": 3}}', "modelspec.title": "Übung 試験"},
    )


def models():
    """Returns the adapters of the peft layout by name."""
    strange = "model.größe.\N{MATHEMATICAL ITALIC SMALL ALPHA}.q_proj"
    return {
        "plain": lora(pairs(Q, UP), base_model_name_or_path="example/tiny"),
        "metadata": lora(pairs(Q, strange)),
        "patterns": patterns(),
        "patterns_widened": widened(patterns()),
        "rslora": lora(pairs(Q, rank=3), r=3, use_rslora=True),
        "dora": dora(),
        "lora_bias": lora_bias(),
        "head": head(),
        "embedding": embedding(),
        "conv2d": conv2d(),
        "qalora": qalora(),
        "halves": lora(pairs(Q, UP, dtype=F16)),
        "doubles": lora(pairs(Q, UP, dtype=F64)),
        "eights": eights(),
        "loha": loha(),
        "ia3": ia3(),
        "oft": oft(),
        "vision_language": vision_language(),
        "vision_language_older": older(vision_language()),
        "collision": collision(),
        "foreign": lora(pairs(Q, UP)),
        "foreign_dora": dora(),
        "config_disagrees": lora(pairs(Q, UP), base_model_name_or_path="example/tiny"),
    }


def pipelines():
    """Returns the adapters of the diffusers layout by name."""
    newer = pipeline()
    spelt = renamed(newer["text_encoder"], "encoder.", "text_model.encoder.")
    return {
        "pipeline": newer,
        "pipeline_text_model": newer | {"text_encoder": spelt},
        "foreign_pipeline": {"transformer": lora(pairs("blocks.0.attn.to_q"), lora_alpha=2)},
    }


# --- all of them ----------------------------------------------------------------------------


def expected(adapter, layout):
    """Returns what every reader must find."""
    components = {}
    for name, held in adapter.components.items():
        paths, modules = canonical_names(held.targets), canonical_names(held.modules)
        scaled = held.kind == "LORA"
        components[name] = {
            "scalings": {paths[p]: held.scaling(p) if scaled else None for p in held.targets},
            "modules": {modules[path]: sorted(held.modules[path]) for path in held.modules},
        }
    prints = {name: found.short for name, found in adapter.manifest.base.fingerprints.items()}
    row = {"layout": layout, "digest": adapter.digest, "components": components}
    row |= {"fingerprints": prints, "metadata": dict(adapter.manifest.foreign), "differing": []}
    return row | {"foreign": False}


def write_adapters(folder, prints):
    rows = {}
    for name, component in models().items():
        manifest = facts(model=prints["bf16"]) if name == "metadata" else Manifest()
        adapter = Adapter({"model": component}, manifest)
        save_adapter(adapter, folder / name)
        rows[name] = expected(adapter, "peft")
    for name, components in pipelines().items():
        base = {part: prints["few"] for part in components} if name == "pipeline" else {}
        adapter = Adapter(components, Manifest(base=Base("example/pipe", "", base)))
        save_adapter(adapter, folder / f"{name}.safetensors")
        rows[f"{name}.safetensors"] = expected(adapter, "diffusers")
    return rows


def spoil(folder, rows):
    """Makes the foreign files foreign and one config another one than its header's."""
    for name, file, keys in (
        ("foreign", "foreign/adapter_model.safetensors", ["hf_lora"]),
        ("foreign_dora", "foreign_dora/adapter_model.safetensors", ["hf_lora"]),
        ("foreign_pipeline.safetensors", "", ["hf_lora", "lora_adapter_metadata"]),
    ):
        path = folder / (file or name)
        path.write_bytes(with_bare_magnitudes(without(path.read_bytes(), *keys)))
        rows[name]["foreign"] = True
    path = folder / "config_disagrees" / "adapter_config.json"
    config = json.loads(path.read_text("utf-8"))
    changed = {"base_model_name_or_path": "elsewhere", "lora_alpha": 64, "use_rslora": True}
    changed |= {"target_modules": config["target_modules"][::-1], "alpha_pattern": {}}
    write_json(path, config | changed)
    rows["config_disagrees"]["differing"] = ["lora_alpha", "use_rslora"]


def write_refused(folder):
    (folder / "refused").mkdir(exist_ok=True)
    component = lora(pairs("blocks.0.attn.to_q"))
    manifest = Manifest(base=Base("example/pipe", "", {"transformer": Fingerprint({})}))
    source = save_adapter(Adapter({"transformer": component}, manifest), folder / "x.safetensors")
    rows = {}
    for name, (data, field) in refusals(source.read_bytes()).items():
        (folder / "refused" / f"{name}.safetensors").write_bytes(data)
        rows[f"refused/{name}.safetensors"] = field
    source.unlink()
    return rows


def write_json(path, value):
    write_text(path, json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


def write_text(path, text):
    path.write_text(text, encoding="utf-8", newline="\n")  # on every system


def write(folder):
    """Writes all vectors into the folder."""
    prints = bases()
    rows = write_adapters(folder, prints)
    spoil(folder, rows)
    (folder / "base.safetensors").write_bytes(b"".join(to_safetensors(base(), {})))
    text = ",\n".join(f'"{name}": {json.dumps(found.to_json())}' for name, found in prints.items())
    write_text(folder / "fingerprints.json", f"{{\n{text}\n}}\n")
    expectations = {
        "adapters": rows,
        "refused": write_refused(folder),
        "fingerprints": {name: found.short for name, found in prints.items()},
        "comparisons": comparisons(prints),
    }
    write_json(folder / "expected.json", expectations)


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
