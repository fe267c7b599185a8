"""Good adapter files to damage: taken apart, and put together again whatever they hold by then."""

import copy
import json
import pickle
import tempfile
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import peft
import safetensors.torch
import torch
from torch import nn

from hf_lora import attach_lora, save_lora
from hf_lora.formats.container import DTYPES
from hf_lora.testing import tiny, tiny_pipeline
from tests.support import as_foreign, randomise, snapshot

CONFIG = "adapter_config.json"
PREFIX = "base_model.model."
MANIFEST = "hf_lora"
STATED = "lora_adapter_metadata"

# What JSON can say and Python has no value for: in a draft stands the mark, in the file its text.
RAW = {
    "<inf>": "1e999",
    "<-inf>": "-1e999",
    "<-0>": "-0",
    "<digits>": "9" * 5000,
    "<deep>": "[" * 9999 + "]" * 9999,
}


@dataclass
class Draft:
    """A file taken apart: JSON as objects, tensors by name.

    `config` is None for a pipeline's file, which has none beside it.
    """

    config: dict | None
    metadata: dict
    tensors: dict

    def documents(self):
        """Every JSON document, those of a manifest's configs once more, as they matter most."""
        manifest = self.metadata.get(MANIFEST)
        rows = [(CONFIG, self.config), (STATED, self.metadata.get(STATED)), (MANIFEST, manifest)]
        configs = manifest.get("configs") if isinstance(manifest, dict) else None
        if isinstance(configs, dict):
            rows += [(f"{MANIFEST}.configs.{n}", c) for n, c in configs.items()] * 2
        return [(what, root) for what, root in rows if root and isinstance(root, dict)]


@dataclass(frozen=True)
class Case:
    """A damaged file; its repr says what was done to which good one."""

    good: str
    weights: bytes = field(repr=False)
    config: bytes | None = field(repr=False)
    restate: bool = False
    log: tuple = ()
    parts: tuple = ()


def _lora(**fields):
    return peft.LoraConfig(r=4, lora_alpha=11, **fields)


PATTERNS = {
    "rank_pattern": {"q_proj": 2, "^model.layers.1.mlp.up_proj": 3},
    "alpha_pattern": {"layers.0.self_attn.q_proj": 5, "down_proj": 7.5},
}
# name -> host, config; what fits "llama" is also loaded onto "bfloat16" and "occupied"
GOOD = {
    "patterns": (
        "llama",
        _lora(target_modules=["q_proj", "v_proj", "up_proj", "down_proj"], **PATTERNS),
    ),
    "dora": ("llama", _lora(target_modules=["q_proj"], use_dora=True, use_rslora=True)),
    "head": ("classifier", _lora(target_modules=["query", "value"])),
    "loha": ("plain", peft.LoHaConfig(r=4, alpha=11, target_modules=["q_proj", "v_proj"])),
    "ia3": (
        "plain",
        peft.IA3Config(target_modules=["k_proj", "up_proj"], feedforward_modules=["up_proj"]),
    ),
    "tokens": (
        "llama",
        _lora(target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [1, 5]}),
    ),
    "embedding": ("llama", _lora(target_modules=["embed_tokens", "v_proj"])),
    "experts": (
        "experts",
        _lora(
            target_modules=["q_proj"],
            target_parameters=["experts.gate_up_proj", "experts.down_proj"],
        ),
    ),
    "pipeline": ("pipeline", _lora(target_modules=["to_q", "q_proj", "conv_in"], **PATTERNS)),
}
HOSTS = {
    "plain": lambda: tiny("llama"),
    "llama": lambda: tiny("llama"),
    "bfloat16": lambda: tiny("llama").bfloat16(),
    "occupied": lambda: randomise(attach_lora(tiny("llama"), name="mine", targets="attention")),
    "classifier": lambda: tiny("bert", task="classifier"),
    "experts": lambda: tiny("qwen3_moe"),
    "pipeline": lambda: tiny_pipeline("sd"),
}


def parts_of(host):
    return {"unet": host.unet, "text_encoder": host.text_encoder} if _piped(host) else {"": host}


def _piped(host):
    return not isinstance(host, nn.Module)


@cache
def host_of(name):
    """The host, which every case must leave as it is, and what it is."""
    host = HOSTS[name]()
    return host, {n: snapshot(part) for n, part in parts_of(host).items()}


@cache
def good_file(name, foreign):
    """Returns the JSON, pickled, and the tensors of a good file, ours or as others write it."""
    kind, config = GOOD[name]
    host = HOSTS[kind]()
    with tempfile.TemporaryDirectory() as folder:
        for part in parts_of(host).values():
            own = copy.deepcopy(config)
            leaves = {n.rpartition(".")[2] for n, _ in part.named_modules()}
            own.target_modules = {n for n in own.target_modules if n in leaves}
            randomise(attach_lora(part, config=own))
        path = save_lora(host, Path(folder))
        kept = header_of(next(path.glob("*.safetensors")).read_bytes()).get("__metadata__", {})
        if foreign:
            as_foreign(path)
        weights = next(path.glob("*.safetensors")).read_bytes()
        beside = path / CONFIG
        config = json.loads(beside.read_text()) if beside.exists() else None
    metadata = {"format": "pt"} if foreign else kept
    if foreign and STATED in kept:
        metadata[STATED] = kept[STATED]
    read = {k: json.loads(v) if k in (MANIFEST, STATED) else v for k, v in metadata.items()}
    tensors = safetensors.torch.load(weights)
    if foreign and name == "embedding":  # peft saves the base weight as well
        own = host.get_input_embeddings().get_base_layer().weight.detach()
        tensors[f"{PREFIX}model.embed_tokens.base_layer.weight"] = own
    return pickle.dumps((config, read)), tensors


def draft_of(name, foreign):
    """Returns a draft to damage; its tensors are shared, so they are replaced, never written."""
    texts, tensors = good_file(name, foreign)
    return Draft(*pickle.loads(texts), dict(tensors))


def header_of(weights):
    return json.loads(weights[8 : 8 + int.from_bytes(weights[:8], "little")])


@dataclass
class Layout:
    """The header as an object, and the data behind it."""

    header: dict
    data: bytes


def dumped(value):
    """Returns JSON text, with numbers in it that Python has no value for."""
    text = json.dumps(value)
    for mark, raw in RAW.items():
        text = text.replace(f'"{mark}"', raw)
    return text


def laid_out(draft):
    """Returns the header of a draft as an object, and its data."""
    texts = {
        k: dumped(v) if k in (MANIFEST, STATED) and not isinstance(v, str) else v
        for k, v in draft.metadata.items()
    }
    names = {dtype: name for name, dtype in DTYPES.items()}
    header, data = {"__metadata__": texts}, b""
    for name, tensor in sorted(draft.tensors.items(), key=lambda i: -i[1].element_size()):
        raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        place = [len(data), len(data) + len(raw)]
        header[name] = {
            "dtype": names[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": place,
        }
        data += raw
    return Layout(header, data)


def packed(header, data):
    raw = header.encode("utf-8", "surrogatepass")
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw + data


def case_of(good, draft, *, restate=False):
    """Returns the case of a draft as it is."""
    layout = laid_out(draft)
    config = None if draft.config is None else dumped(draft.config).encode()
    return Case(good, packed(dumped(layout.header), layout.data), config, restate)
