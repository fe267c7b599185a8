"""Reads and compares base fingerprints from what docs/format.md says, as format_reader does."""

import base64
import hashlib
import math

import numpy as np

from tests.format_reader import FLOAT8, Refused, as_text, canonical_paths, decode


def positions(count):
    if count <= 32:
        return list(range(count))
    return [((i * 0x9E3779B97F4A7C15 % (1 << 64)) * count) >> 64 for i in range(32)]


def fingerprint_of(weights):
    """Returns the JSON of the fingerprint of arrays by name."""
    tensors = {}
    for name, spelt in canonical_paths(weights).items():
        values = weights[name]
        if values.ndim < 2 or values.size == 0 or values.dtype.kind != "f":
            continue
        flat = values.reshape(-1)[positions(values.size)].astype("<f4")
        halves = flat.view("<u2").reshape(-1, 2)
        key, sampled = ("fp32", flat) if halves[:, 0].any() else ("bf16", halves[:, 1])
        text = base64.b64encode(sampled.tobytes()).decode("ascii")
        tensors[spelt] = {"shape": list(values.shape), key: text}
    return {"version": 1, "tensors": tensors}


def short_id(fingerprint):
    return "fp1:" + hashlib.sha256(as_text(fingerprint)).hexdigest()[:12]


def read_sample(name, entry):
    """Returns shape and values of one tensor of a fingerprint."""
    shape, key = entry["shape"], "bf16" if "bf16" in entry else "fp32"
    named = 1 <= len(name) <= 1000 and name.isprintable() and set(entry) == {"shape", key}
    sizes = all(type(size) is int and size > 0 for size in shape) and 2 <= len(shape) <= 16
    if not (named and sizes and math.prod(shape) < 1 << 63):
        raise ValueError
    raw, dtype = base64.b64decode(entry[key], validate=True), key.upper().replace("FP", "F")
    return tuple(shape), decode(dtype, (min(32, math.prod(shape)),), raw)


def read_fingerprint(fingerprint):
    """Returns shape and values by name."""
    tensors = fingerprint.get("tensors")
    if fingerprint != {"version": 1, "tensors": tensors} or len(tensors) > 200_000:
        raise Refused("fingerprint")
    try:
        return {name: read_sample(name, entry) for name, entry in tensors.items()}
    except (KeyError, TypeError, ValueError, Refused):
        raise Refused("fingerprint") from None


def fp16(values):
    with np.errstate(over="ignore"):
        return values.astype(np.float16).astype(np.float32)


def bf16(values):
    bits = values.view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32)
    return np.where(np.isnan(values), values, rounded.view(np.float32))


def to_float8(values, table):
    """Rounds to the nearest value of an 8-bit type, ties to the even code."""
    size = np.abs(table[:128])
    finite = size[np.isfinite(size)].astype(np.float64)
    middles = (finite + np.append(finite[1:], 2 * finite[-1] - finite[-2])) / 2
    below, above = (np.searchsorted(middles, np.abs(values), side) for side in ("left", "right"))
    return np.copysign(size[np.where(below % 2, above, below)], values)


def chain(*casts):
    def run(values):
        for cast in casts:
            values = cast(values)
        return values

    return run


FP16_FIRST = [chain(fp16), chain(fp16, bf16), chain(fp16, bf16, fp16)]
BF16_FIRST = [chain(bf16), chain(bf16, fp16)]
CHAINS = [chain(), *FP16_FIRST, *BF16_FIRST]

# step 1 of the page
VOCABULARIES = (
    *("embed_tokens", "word_embeddings", "word_embedding", "token_embedding", "tok_embeddings"),
    *("tokens_embed", "embeddings", "wte", "shared", "embed_in", "embed_out", "lm_head"),
    *("lm_head.decoder", "generator_lm_head", "predictions.decoder", "vocab_projector"),
    *("output_projection", "lm_loss"),
)


def same(left, right):
    return (left.view(np.uint32) == right.view(np.uint32)) | (np.isnan(left) & np.isnan(right))


def order(values):
    """Returns whole numbers that are ordered as the values are, -0 below 0."""
    bits = values.view(np.uint32).astype(np.int64)
    return np.where(bits < 1 << 31, bits, (1 << 31) - 1 - bits)


def ordered(numbers):
    bits = np.where(numbers >= 0, numbers, (1 << 31) - 1 - numbers)
    return bits.astype(np.uint32).view(np.float32)


def first_at_least(wanted, cast):
    """Returns, as whole numbers, the lowest values of which the cast makes `wanted` or more."""
    low, high = (np.full(len(wanted), order(np.float32([end]))[0]) for end in (-np.inf, np.inf))
    high = high + 1  # none
    while (low < high).any():
        middle = (low + high) // 2
        reached = order(cast(ordered(middle))) >= wanted
        low, high = np.where(reached, low, middle + 1), np.where(reached, middle, high)
    return low


def origins(values, cast):
    """Returns the first value that becomes each one, and the one behind the last."""
    wanted = order(np.where(np.isnan(values), np.float32(0), values))
    return first_at_least(wanted, cast), first_at_least(wanted + 1, cast)


def have_origin(left, right, left_casts, right_casts):
    """Tells whether one pair of chains explains every sample by a value of its own."""
    if (np.isnan(left) != np.isnan(right)).any():
        return False
    lefts = [origins(left, cast) for cast in left_casts]
    rights = [origins(right, cast) for cast in right_casts]
    return any(
        (np.isnan(left) | (np.maximum(low, other_low) < np.minimum(end, other_end))).all()
        for low, end in lefts
        for other_low, other_end in rights
    )


def float8_type(side):
    """Returns the name of the 8-bit type that more than half of the tensors consist of, if any."""
    filled = [values for values in side if values.any()]
    for name, table in FLOAT8.items():
        if 2 * sum(bool(same(to_float8(v, table), v).all()) for v in filled) > len(filled):
            return name
    return None


def chains_to(name):
    """Returns the chains that may have made a side of this 8-bit type, or of none."""
    last = [chain(one, lambda v: to_float8(v, FLOAT8[name])) for one in CHAINS]
    return CHAINS + (last if name else [])


def explained(left, right, names):
    """Returns a row for each chain that may have made one side: which samples it explains."""
    forward = [same(cast(left), right) for cast in chains_to(names[1])]
    return np.array(forward + [same(cast(right), left) for cast in chains_to(names[0])])


def resized(name, ours, theirs):
    """Tells whether two tensors are a vocabulary with another number of tokens."""
    ends = tuple(f".{table}.weight" for table in VOCABULARIES)
    same_width = ours[0][1:] == theirs[0][1:]
    return f".{name}".endswith(ends) and same_width and ours[0] != theirs[0]


def compare(stored, host):
    """Returns `matched`, `rounded`, `mismatched` or `unverified` for two read fingerprints."""
    spelt = [name for name in stored if name in host]
    common = [(stored[name], host[name]) for name in spelt]
    if not common or 2 * len(common) < len(stored):
        return "unverified"
    common = [pair for name, pair in zip(spelt, common, strict=True) if not resized(name, *pair)]
    if not common:
        return "unverified"
    if any(ours[0] != theirs[0] for ours, theirs in common):
        return "mismatched"
    pairs = [(ours[1], theirs[1]) for ours, theirs in common]
    names = [float8_type(side) for side in zip(*pairs, strict=True)]
    rows = [explained(*pair, names) for pair in pairs]
    inexact = [at for at, row in enumerate(rows) if not row.all(axis=1).any()]
    ways = (FP16_FIRST, BF16_FIRST), (BF16_FIRST, FP16_FIRST)
    found = max(sum(have_origin(*pairs[at], *way) for at in inexact) for way in ways)
    if found < len(inexact):
        return "mismatched" if names[0] == names[1] else "unverified"
    steps = sum(int((~rows[at].any(axis=0)).sum()) for at in inexact)
    if inexact:
        return "rounded" if steps >= 10 else "unverified"
    return "matched"
