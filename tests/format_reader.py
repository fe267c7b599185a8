"""Reads adapters from what docs/format.md says, with Python and numpy alone.

It shares no line with hf_lora: where the two disagree, the page is not good enough.
"""

import hashlib
import json
import math
import re
import struct
from dataclasses import dataclass, field

import numpy as np

CRITICAL = {"fused"}
PREFIX = "base_model.model."
DROPPED = {"base_model", "language_model", "model", "text_model", "transformer"}
SUFFIXED = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector.weight")
COMMENTS = set(
    """auto_mapping base_model_name_or_path boft_dropout corda_config ensure_weight_tying eva_config
    inference_mode init_ia3_weights init_lora_weights init_weights loftq_config lora_dropout
    lora_ga_config megatron_config megatron_core miss_dropout module_dropout peft_version
    rank_dropout rank_dropout_scale revision runtime_config task_type""".split()
)
PLACES = set(
    """exclude_modules fan_in_fan_out layers_pattern layers_to_transform modules_to_save peft_type
    target_modules target_parameters trainable_token_indices""".split()
)
KINDS = {
    int: ("format",),
    str: ("digest", "host", "family"),
    list: ("critical", "optional", "trigger_words", "derived_from"),
    dict: ("configs", "base", "fused", "training"),
}


class Refused(Exception):
    """The page says that a reader refuses this; the message is the field."""


@dataclass
class Component:
    config: dict
    targets: dict = field(default_factory=dict)  # path -> factor -> array
    modules: dict = field(default_factory=dict)  # path -> parameter -> array


@dataclass
class Adapter:
    layout: str
    components: dict
    manifest: dict | None
    metadata: dict
    tensors: dict
    differing: list  # fields of a config that is no true copy of the manifest's


# --- container ------------------------------------------------------------------------------

CODES = np.arange(256, dtype=np.uint16)  # an 8-bit float is a float16 of fewer bits
E5M2 = (CODES << 8).view(np.float16).astype(np.float32)
E4M3 = ((CODES & 128) << 8 | (CODES & 127) << 7).view(np.float16).astype(np.float32) * 256
E4M3[[127, 255]] = np.nan  # no infinity, one NaN
FLOAT8 = {"F8_E4M3": E4M3, "F8_E5M2": E5M2}
PLAIN = dict(F64="<f8", F32="<f4", F16="<f2", I64="<i8", I32="<i4", I16="<i2", I8="i1", U8="u1")


def decode(dtype, shape, raw):
    """Returns the values; floating point ones narrower than 64 bits as float32."""
    if dtype == "BF16":
        values = (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
    elif dtype == "BOOL":
        values = np.frombuffer(raw, np.uint8) != 0
    elif dtype in FLOAT8:
        values = FLOAT8[dtype][np.frombuffer(raw, np.uint8)]
    elif dtype in PLAIN:
        values = np.frombuffer(raw, PLAIN[dtype])
    else:
        raise ValueError(dtype)
    if values.size != math.prod(shape):
        raise ValueError(shape)
    return (values.astype(np.float32) if dtype == "F16" else values).reshape(shape)


def unique(pairs):
    if len({key for key, _ in pairs}) != len(pairs):
        raise Refused("")
    return dict(pairs)


def no_number(_):
    raise Refused("")


def parse(text):
    return json.loads(text, object_pairs_hook=unique, parse_constant=no_number)


def read_container(data):
    """Returns the tensors by name and the metadata of a safetensors file."""
    length = int.from_bytes(data[:8], "little")
    if length > min(len(data) - 8, 64 << 20):
        raise Refused("")
    header, body, at, tensors = parse(data[8 : 8 + length]), data[8 + length :], 0, {}
    metadata = header.pop("__metadata__", {})
    if max([0, *(entry["data_offsets"][1] for entry in header.values())]) != len(body):
        raise Refused("")
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = entry["data_offsets"]
        if begin != at or end < begin:
            raise Refused(name)
        try:
            tensors[name], at = decode(entry["dtype"], entry["shape"], body[begin:end]), end
        except ValueError:
            raise Refused(name) from None
    return tensors, metadata


# --- manifest and layouts -------------------------------------------------------------------


def read_manifest(metadata):
    """Returns the manifest, or None for a foreign file."""
    if "hf_lora" not in metadata:
        return None
    manifest = parse(metadata["hf_lora"])
    for kind, names in KINDS.items():
        for name in names:
            value = manifest.get(name, kind())
            words = value if kind is list else ()
            if type(value) is not kind or any(type(word) is not str for word in words):
                raise Refused(name)
    if manifest.get("format") != 1:
        raise Refused("format")
    if not manifest.get("configs"):
        raise Refused("configs")
    if not set(manifest.get("critical", ())) <= CRITICAL:
        raise Refused("critical")
    return manifest


def outer_configs(path, metadata):
    """Returns component -> config as it stands outside the manifest, None where none does."""
    if path.is_dir():
        config = parse((path / "adapter_config.json").read_text("utf-8"))
        return {"model": ({"r": 8, "lora_alpha": 8} if kind(config) == "LORA" else {}) | config}
    configs = {}
    for key, value in parse(metadata.get("lora_adapter_metadata", "{}")).items():
        component, _, name = key.partition(".")
        config = configs.setdefault(component, {"peft_type": "LORA", "r": 8, "lora_alpha": 8})
        config[name] = value
    return configs


def read_adapter(path):
    """Reads a folder of the peft layout or a file of the diffusers layout, and checks it."""
    peft = path.is_dir()
    file = path / "adapter_model.safetensors" if peft else path
    tensors, metadata = read_container(file.read_bytes())
    manifest, outer = read_manifest(metadata), outer_configs(path, metadata)
    configs = manifest["configs"] if manifest else outer
    names = {"model"} if peft else {key.partition(".")[0] for key in tensors}
    components = {name: Component(configs.get(name, {"peft_type": "LORA"})) for name in names}
    for key, values in tensors.items():
        name, _, rest = ("model." + key.removeprefix(PREFIX) if peft else key).partition(".")
        place(components[name], rest, values)
    layout = "peft" if peft else "diffusers"
    adapter = Adapter(layout, components, manifest, metadata, tensors, [])
    if manifest and set(configs) != names:
        raise Refused("configs")
    if manifest and peft:
        adapter.differing = differing(configs["model"], outer["model"])
    for component in components.values():
        check(component)
    if manifest and manifest.get("digest") != digest(components):
        raise Refused("digest")
    return adapter


def differing(truth, copy):
    def plain(value):
        return (sorted(value) if isinstance(value, list) else value) or None

    names = {*truth, *copy} - COMMENTS
    return sorted(name for name in names if plain(truth.get(name)) != plain(copy.get(name)))


def place(component, key, values):
    """Puts a tensor where its key, without the component, says."""
    segments, mark = key.split("."), kind(component.config).lower().replace("loha", "hada") + "_"
    for at in range(1, len(segments)):
        if segments[at].startswith(mark):
            factor = ".".join(segments[at:])
            factor = factor.removesuffix(".weight") if factor in SUFFIXED else factor
            component.targets.setdefault(".".join(segments[:at]), {})[factor] = values
            return
    ends = tuple(component.config.get("modules_to_save") or ())
    rows = [at for at in range(1, len(segments)) if segments[at] in ("base_layer", "token_adapter")]
    runs = [at for at in range(1, len(segments)) if ".".join(segments[:at]).endswith(ends)]
    if not rows + runs:
        raise Refused(key)
    at = (rows + runs)[0]
    component.modules.setdefault(".".join(segments[:at]), {})[".".join(segments[at:])] = values


def check(component):
    """Refuses values that are not finite, ranks unlike the config's, scalings over the limit."""
    for path, parts in [*component.targets.items(), *component.modules.items()]:
        for name, values in parts.items():
            if not np.isfinite(values).all():
                raise Refused(f"{path}.{name}")
    for path, value in scalings(component).items():
        rank = rank_of(component.targets[path])
        if value is None:
            continue
        stated = pattern_value(component.config, "rank_pattern", path, "r", rank)
        stacked = component.config.get("target_parameters") and rank % stated == 0
        if stated != rank and not stacked:
            raise Refused(path)
        if not 0 < abs(value) <= 1000:
            raise Refused("lora_alpha")


# --- digest ---------------------------------------------------------------------------------


def canonical(path):
    path = f".{path}.".replace(".vision_tower.vision_model.", ".vision_tower.")[1:-1]
    segments = path.split(".")
    while len(segments) > 1 and segments[0] in DROPPED:
        del segments[0]
    return ".".join(segments)


def canonical_paths(paths):
    """Returns canonical path by path; those that would get the same one keep their own."""
    made = {path: canonical(path) for path in paths}
    taken = list(made.values())
    return {path: path if taken.count(new) > 1 else new for path, new in made.items()}


def pattern_value(config, name, path, default, guess):
    """Returns the value of the first key of a pattern that matches, else that of the field."""
    for key, value in (config.get(name) or {}).items():
        plain = re.sub(r"^\^?(\.\*\\\.|\(\.\*\\\.\)\?)?", "", key).removesuffix("$")
        plain = plain.replace("\\.", ".")
        if not re.fullmatch(r"[\w\-]+(\.[\w\-]+)*", plain):
            raise Refused(name)
        if path == plain or (not key.startswith("^") and path.endswith(f".{plain}")):
            return value
    return config.get(default, guess)


def kind(config):
    return config["peft_type"].upper()


def rank_of(factors):
    first = factors.get("lora_A", factors.get("lora_embedding_A"))
    return None if first is None else len(first)


def scalings(component):
    """Returns path -> effective scaling of a LoRA target, None for all others."""
    config, found = component.config, {}
    for path, factors in component.targets.items():
        rank = rank_of(factors) if kind(config) == "LORA" else None
        if rank is not None and config.get("target_parameters"):
            rank = pattern_value(config, "rank_pattern", path, "r", rank)
        alpha = pattern_value(config, "alpha_pattern", path, "lora_alpha", rank)
        divisor = math.sqrt(rank or 1) if config.get("use_rslora") else rank
        found[path] = None if rank is None else alpha / divisor
    return found


def settings(config):
    counted = set(config) - COMMENTS - PLACES
    if kind(config) == "LORA":
        counted = set()
        if config.get("use_bdlora") or config.get("use_qalora"):
            counted |= {"qalora_group_size", "use_bdlora", "use_qalora"}
        if config.get("target_parameters"):
            counted |= {"alpha_pattern", "lora_alpha", "r", "rank_pattern", "target_parameters"}
    return {name: one_spelling(config[name]) for name in counted if config.get(name)}


def one_spelling(value):
    if isinstance(value, list) and all(isinstance(entry, str) for entry in value):
        return sorted(value)
    return int(value) if isinstance(value, float) and value.is_integer() else value


def value_line(word, name, values):
    little = np.ascontiguousarray(values, values.dtype.newbyteorder("<"))
    hashed = hashlib.sha256(little.tobytes()).hexdigest()
    return [word, name, values.dtype.name, list(values.shape), hashed]


def lines(name, component):
    yield ["component", name, kind(component.config), settings(component.config)]
    scaling = scalings(component)
    for path, spelt in sorted(canonical_paths(component.targets).items(), key=lambda p: p[1]):
        value, factors = scaling[path], component.targets[path]
        yield ["target", spelt, None if value is None else struct.pack(">d", value).hex()]
        yield from (value_line("factor", key, factors[key]) for key in sorted(factors))
    for path, spelt in sorted(canonical_paths(component.modules).items(), key=lambda p: p[1]):
        parameters = component.modules[path]
        parameters = {k: v for k, v in parameters.items() if not k.startswith("base_layer.")}
        if not parameters:
            continue
        yield ["module", spelt]
        yield from (value_line("parameter", key, parameters[key]) for key in sorted(parameters))


def as_text(value):
    return json.dumps(value, separators=(",", ":"), sort_keys=True).encode()


def digest(components):
    """Returns the identity of an adapter."""
    total = hashlib.sha256()
    for name in sorted(components):
        for line in lines(name, components[name]):
            total.update(as_text(line) + b"\n")
    return "v1:sha256:" + total.hexdigest()
