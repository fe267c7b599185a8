"""What must hold of any file: it loads as an independent reading says, or it is refused in words.

The reading here knows nothing of hf_lora: safetensors' own reader, `json`, and names compared as
peft spells them.
"""

import json
import math
import warnings
from contextlib import suppress
from pathlib import Path

import peft
import safetensors.torch
import torch
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from hf_lora import detach_lora, load_lora, open_adapter
from hf_lora.errors import LoraError
from hf_lora.formats import read_header
from tests.fuzz_files import CONFIG, GOOD, MANIFEST, PREFIX, STATED, host_of, parts_of
from tests.support import assert_same, snapshot

SPARE = 64 << 20  # bytes of address space that a load may take whatever the file's size,
TIMES = 32  # and besides these for each byte of the file


class Fault(AssertionError):
    """A case that hf_lora got wrong; `kind` says in which way."""

    def __init__(self, kind, why, case):
        super().__init__(f"{kind}: {why}\n{case}")
        self.kind = kind


def checked(case, folder):
    """Loads a case onto its host and says what became of it: `loaded`, or the error's class.

    Raises:
        Fault: An error that is no LoraError, a load that differs from what the file says, a host
            that is not as before, a message without the path, or too much memory.
    """
    kind = GOOD[case.good.partition(",")[0]][0]
    if kind == "llama":  # by the file itself, so that a case says it all
        kind = ("llama", "llama", "llama", "bfloat16", "occupied")[sum(case.weights) % 5]
    host, before = host_of(kind)
    weights = written(case, folder)
    size, used = len(weights) + len(case.config or b""), peak()
    wrong, why = "raw error", ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = read_and_loaded(case, host, folder)
        wrong = "wrong load"
        if result == "loaded":
            check_host(case, host, before, weights)
            for part in parts_of(host).values():
                if "default" in getattr(part, "peft_config", ()):
                    detach_lora(part, "default")
        wrong = "changed host"
        for name, part in parts_of(host).items():
            assert_same(before[name], snapshot(part))
        wrong = "memory"
        grown = peak() - used
        assert grown <= SPARE + TIMES * size, f"{grown:,} bytes taken for a file of {size:,}"
    except Exception as error:
        host_of.cache_clear()
        why = f"{type(error).__name__}: {error}"
        raise Fault(wrong, why, case) from error
    return result


def read_and_loaded(case, host, folder):
    """Reads the header alone, then loads; what loads must have a readable header."""
    refused = ""
    try:
        read_header(folder)
    except LoraError as error:
        refused = said(error, folder)
    try:
        rows = case.good.startswith("tokens")  # new rows of an embedding need permission
        report = load_lora(host, folder, extra_modules=rows)
    except LoraError as error:
        said(error, folder)
        return type(error).__name__
    assert not refused, f"read_header refuses what load_lora takes: {refused}"
    assert str(report)
    return "loaded"


def said(error, folder):
    """Returns an error's message, which must be words, name the file, and fit into a log."""
    text = str(error)
    assert error.fact, f"{error!r} says nothing"
    assert str(folder) in text, f"no path in: {text}"
    assert len(text) < 5000, f"{len(text)} characters: {text[:200]}"
    text.encode()
    return text


def written(case, folder):
    """Writes the files of a case and returns the weights.

    A restated one gets the digest of what it now holds, as somebody who alters a file would give.
    """
    for old in Path(folder).iterdir():
        old.unlink()
    name = "pytorch_lora_weights" if case.config is None else "adapter_model"
    path = Path(folder, f"{name}.safetensors")
    path.write_bytes(case.weights)
    if case.config is not None:
        Path(folder, CONFIG).write_bytes(case.config)
    if not case.restate:
        return case.weights
    weights = case.weights
    with suppress(Exception):  # what this raises, the load that follows raises as well
        try:
            open_adapter(folder)
        except LoraError as error:
            found, stated = (w for w in error.fact.replace(",", " ").split() if ":sha256:" in w)
            weights = weights.replace(stated.encode(), found.encode())
            path.write_bytes(weights)
    return weights


# ---------------------------------------------------------------- what the file says


def strict(text):
    """Parses JSON in which no key stands twice and every number is one."""

    def once(pairs):
        assert len(dict(pairs)) == len(pairs), "a key stands twice"
        return dict(pairs)

    def refused(constant):
        raise AssertionError(f"{constant} in JSON")

    return json.loads(text, object_pairs_hook=once, parse_constant=refused)


def truth(weights, beside):
    """Returns component -> (config, name -> tensor)."""
    tensors = safetensors.torch.load(weights)
    header = strict(weights[8 : 8 + int.from_bytes(weights[:8], "little")])
    metadata = header.get("__metadata__", {})
    configs = strict(metadata[MANIFEST])["configs"] if MANIFEST in metadata else {}
    if beside is not None:
        kept = {k.removeprefix(PREFIX): t for k, t in tensors.items()}
        assert len(kept) == len(tensors)
        return {"": (configs.get("model") or strict(beside), kept)}
    if not configs and metadata.get(STATED):
        for key, value in strict(metadata[STATED]).items():
            component, _, name = key.partition(".")
            configs.setdefault(component, {})[name] = value
    found = {}
    for key, tensor in tensors.items():
        component, _, name = key.partition(".")
        found.setdefault(component, (configs.get(component, {}), {}))[1][name] = tensor
    assert not configs or configs.keys() == found.keys()
    return found


WRAPPERS = ("base_model.", "model.", "language_model.", "text_model.", "transformer.")


def plain(name):
    """A tensor's name without what may be spelt in several ways."""
    while name.startswith(WRAPPERS):
        name = name.partition(".")[2]
    return name.removesuffix(".weight") if ".lora_" in name else name


def value_at(config, field, path, default):
    """The value of the first pattern that is the path or its end."""
    for key, value in (config.get(field) or {}).items():
        end = key.removeprefix("^").removeprefix(".*\\.").removeprefix("(.*\\.)?")
        end = plain(end.removesuffix("$").replace("\\.", ".")) or end
        if path == end or (path.endswith(f".{end}") and not key.startswith("^")):
            return value
    return default


def scaling_of(config, path, tensors):
    """What a target is multiplied by: alpha/rank, with peft's defaults where a config lacks one."""
    alpha, rank = config.get("alpha", 8), config.get("r", 8)
    if config["peft_type"].upper() == "LORA":
        a = next(tensors[n] for n in (f"{path}.lora_A", f"{path}.lora_embedding_A") if n in tensors)
        silent = "r" not in config and "lora_alpha" not in config  # diffusers: alpha = rank
        rank = a.shape[0] if silent else rank
        alpha = config.get("lora_alpha", rank if silent else 8)
    alpha = value_at(config, "alpha_pattern", path, alpha)
    rank = value_at(config, "rank_pattern", path, rank)
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


# ---------------------------------------------------------------- what the host has


def check_host(case, host, before, weights):
    """Compares a loaded host with its file, and its base with what it was."""
    for name, (config, tensors) in truth(weights, case.config).items():
        check_loaded(parts_of(host)[name], {"peft_type": "LORA", **config}, tensors)
    for name, part in parts_of(host).items():
        own = held_by(part, base=True)
        for key, tensor in before[name]["tensors"].items():
            assert torch.equal(own[without(key, AROUND)], tensor), key


def held_by(part, *, base):
    """Returns name -> tensor: what the model has of its own, or what a load added."""
    found = {}
    for name, tensor in (*part.named_parameters(), *part.named_buffers()):
        segments = name.split(".")
        added = "default" in segments and "trainable_tokens_original" not in segments
        if added != base:
            found[without(name, AROUND if base else ("default", "modules_to_save"))] = tensor
    return found


AROUND = ("base_layer", "original_module", "token_adapter")  # what peft puts into a base's names


def without(name, segments):
    return ".".join(s for s in name.split(".") if s not in segments)


def check_loaded(part, config, tensors):
    """Compares what a load put onto a model with what its file says."""
    found = {plain(n): t for n, t in held_by(part, base=False).items()}
    own = {plain(n): t for n, t in held_by(part, base=True).items()}
    copies = {n: t for n, t in tensors.items() if n.endswith(".base_layer.weight")}
    for name, tensor in copies.items():
        host = own[plain(name.replace(".base_layer", ""))]
        assert tensor.is_floating_point(), name
        widened = torch.equal(host, tensor.to(host.dtype))
        assert widened or torch.equal(host.to(tensor.dtype), tensor), name  # a cast of the host's
    wanted = {plain(n): t for n, t in tensors.items() if n not in copies}
    assert len(wanted) == len(tensors) - len(copies), "two names for one tensor"
    assert wanted.keys() == found.keys(), wanted.keys() ^ found.keys()
    for name, tensor in wanted.items():
        assert torch.isfinite(found[name]).all(), name
        assert torch.equal(tensor.to(found[name].dtype), found[name]), name
    assert not unfilled(part, config, wanted), unfilled(part, config, wanted)
    for path, layer in part.named_modules():
        if isinstance(layer, TrainableTokensLayer):
            rows = config["trainable_token_indices"]
            named = next(iter(rows.values())) if isinstance(rows, dict) else rows
            assert list(layer.token_indices["default"]) == named, path
        elif isinstance(layer, BaseTunerLayer):
            check_layer(layer, config, plain(f"{path}.lora_")[:-6], wanted)


def unfilled(part, config, tensors):
    """Returns the linear layers that the config names and the file has nothing for."""
    named = config.get("target_modules")
    chosen = config.get("exclude_modules") or config.get("layers_to_transform") is not None
    if not isinstance(named, list) or chosen:
        return []
    bare = {n.replace(".base_layer", "") for n, m in part.named_modules() if type(m) is nn.Linear}
    wanted = [n for n in bare if any(f".{n}".endswith(f".{entry}") for entry in named)]
    return [n for n in wanted if not any(t.startswith(f"{plain(n)}.") for t in tensors)]


@torch.no_grad()
def check_layer(layer, config, path, tensors):
    """Compares scaling, switches and the effective delta of one layer, all to the bit."""
    assert not layer.disable_adapters
    assert not layer.merged
    assert layer.active_adapters == ["default"]
    if isinstance(layer, peft.tuners.ia3.IA3Layer):
        names = config.get("feedforward_modules") or []
        assert layer.is_feedforward == any(f".{path}".endswith(f".{n}") for n in names), path
    scaling = getattr(layer, "scaling", {}).get("default")
    if scaling is None:
        return
    assert abs(scaling) <= 1000, scaling
    assert scaling == scaling_of(config, path, tensors), (path, scaling)
    if type(layer) is peft.tuners.loha.layer.Linear:
        a, b, c, d = (tensors[f"{path}.hada_{x}"].float() for x in ("w1_a", "w1_b", "w2_a", "w2_b"))
        assert torch.equal(layer.get_delta_weight("default"), (a @ b) * (c @ d) * scaling), path
    if type(layer) is peft.tuners.lora.Linear:
        assert bool(layer.use_dora["default"]) == bool(config.get("use_dora"))
        a, b = (tensors[f"{path}.lora_{x}"].float() for x in "AB")
        assert torch.equal(layer.get_delta_weight("default"), b @ a * scaling), path
        if not config.get("use_dora"):
            base = layer.get_base_layer()
            x = torch.linspace(-1, 1, a.shape[1])[None].to(base.weight.dtype)
            bias = tensors.get(f"{path}.lora_B.bias", torch.zeros(1)).float()
            delta = ((x.float() @ a.T @ b.T + bias) * scaling).to(base.weight.dtype)
            own, step = base(x), torch.finfo(base.weight.dtype).eps
            # peft adds in the base's dtype: two roundings, of the delta and of the sum
            most = 16 * step * (own.abs().max() + delta.abs().max()).float()
            assert (layer(x) - (own + delta)).abs().max() <= most, path


def peak():
    """Bytes of address space at its largest: what was asked for, touched or not (Linux only)."""
    with suppress(OSError), open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("VmPeak"))
    return 0
