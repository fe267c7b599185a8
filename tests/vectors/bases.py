"""The bases of the test vectors: casts of one small base, and bases that are other ones."""

import zlib

import numpy as np
import torch

from hf_lora.fingerprint import fingerprint_of
from hf_lora.paths import canonical_names
from hf_lora.verdict import compare

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def whole(name, shape, bits):
    """Returns whole numbers from -2^bits to 2^bits that are the same for the same name."""
    state = np.random.RandomState(zlib.crc32(name.encode()))
    return state.randint(-(1 << bits), (1 << bits) + 1, shape, dtype=np.int64)


def base():
    """Returns the weights of a small base, float32 with 24 significant bits."""
    shapes = {"model.embed_tokens.weight": (40, 8), "lm_head.weight": (40, 8)}
    shapes |= {f"model.layers.{i}.self_attn.q_proj.weight": (8, 12) for i in range(4)}
    shapes |= {f"model.layers.{i}.mlp.up_proj.weight": (16, 8) for i in range(4)}
    shapes |= {"model.conv.weight": (4, 3, 3, 3), "model.experts.up": (2, 8, 5)}
    shapes |= {"model.small.weight": (3, 5), "model.norm.weight": (8,)}
    found = {
        name: torch.from_numpy(whole(name, shape, 23) / (1 << 29)) for name, shape in shapes.items()
    }
    weights = {name: values.float() for name, values in found.items()}
    return weights | {"model.ids": torch.arange(12).reshape(3, 4)}


def printed(weights):
    names = canonical_names(weights)
    return fingerprint_of((names[name], tensor) for name, tensor in weights.items())


def cast(weights, *dtypes):
    for dtype in dtypes:
        weights = {n: w.to(dtype) if w.is_floating_point() else w for n, w in weights.items()}
    return weights


def moved(weights, share):
    """Returns the weights with every value moved by at most this share of the largest one."""
    return {
        name: w + share * torch.from_numpy(whole(f"{name}+", w.shape, 10)).float() / (1 << 16)
        if w.is_floating_point()
        else w
        for name, w in weights.items()
    }


def part(weights, count):
    return dict(list(weights.items())[:count])


def tokens(rows, width):
    """Returns another vocabulary, of so many tokens."""
    names = ("model.embed_tokens.weight", "lm_head.weight")
    return {n: torch.from_numpy(whole(f"{n}:", (rows, width), 7)).float() for n in names}


def bases():
    """Returns fingerprints by name: casts of one base, and bases that are other ones."""
    true, q = base(), "model.layers.2.self_attn.q_proj.weight"
    large = {name: w * (1 << 24) if w.is_floating_point() else w for name, w in true.items()}
    edge = {"edge.weight": (65400 + 4 * torch.arange(32.0)).reshape(4, 8)}  # to fp16's largest
    zeros = {name: w * 0 for name, w in true.items()}
    found = {
        "fp32": true,
        "bf16": cast(true, BF16),
        "fp16": cast(true, F16),
        "fp16_bf16": cast(true, F16, BF16),
        "e4m3": cast(true, E4M3),
        "bf16_e5m2": cast(true, BF16, E5M2),
        "e4m3_scaled": cast({n: w * 64 for n, w in true.items()}, F32, E4M3),
        "moved": moved(true, 2**-10),
        "moved_bf16": cast(moved(true, 2**-10), BF16),
        "moved_little_bf16": cast(moved(true, 2**-16), BF16),
        "one_other": true | {q: true[q].flip(0)},
        "one_other_fp16": cast(true | {q: true[q].flip(0)}, F16),
        "one_turned": true | {q: true[q].T},
        "more_tokens": true | tokens(44, 8),
        "more_tokens_fp16": cast(true | tokens(44, 8), F16),
        "wider_tokens": true | tokens(44, 9),
        "only_tokens": tokens(40, 8),
        "only_more_tokens": tokens(44, 8),
        "few": part(true, 5),
        "few_fp16": cast(part(true, 2), F16),
        "few_bf16": cast(part(true, 2), BF16),
        "many": part(true, 8),
        "large": large,
        "large_fp16": cast(large, F16),
        "large_bf16": cast(large, BF16),
        "edge": edge,
        "edge_fp16_bf16": cast(edge, F16, BF16),
        "edge_fp16_bf16_fp16": cast(edge, F16, BF16, F16),
        "zeros": zeros,
        "zeros_below": {name: -w for name, w in zeros.items()},
    }
    return {name: printed(weights) for name, weights in found.items()}


def comparisons(prints):
    """Returns stored -> host -> verdict for pairs that try every rule of the page."""
    edges = [name for name in prints if name.startswith("edge")]
    main = ("fp32", "bf16", "fp16", "e4m3")
    asked = {
        stored: [n for n in prints if not n.startswith(("edge", "large", "zeros"))]
        for stored in main
    }
    asked |= {"bf16_e5m2": ["fp32", "bf16", "e4m3"], "few_fp16": ["few_bf16", "bf16", "fp32"]}
    asked |= {"only_tokens": ["only_more_tokens"], "more_tokens": ["fp32", "one_other", "e4m3"]}
    asked |= {"few_bf16": ["few_fp16"], "large": ["large_fp16", "large_bf16", "fp32"]}
    asked |= {"large_fp16": ["large_bf16", "large"], "large_bf16": ["large_fp16"]}
    asked |= {name: edges for name in edges}
    asked |= {"zeros": ["zeros", "zeros_below", "e4m3"], "zeros_below": ["zeros"]}
    return {
        stored: {host: compare(prints[stored], prints[host]).state for host in hosts}
        for stored, hosts in asked.items()
    }
