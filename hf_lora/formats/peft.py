"""The peft folder: `adapter_config.json` + `adapter_model.safetensors`.

Key grammar, as written by peft 0.21 (`get_peft_model_state_dict`):
    base_model.model.<module path>.lora_A.weight          factors of a LoRA target
    base_model.model.<module path>.lora_magnitude_vector  DoRA
    base_model.model.<module path>.<parameter>            modules listed in `modules_to_save`
transformers' `save_pretrained` writes the same keys without a difference.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from hf_lora.adapter import MODEL, Adapter, Component, check_component
from hf_lora.errors import AdapterNotFound, BadAdapterFile, LoraError, listing

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
MAX_CONFIG_BYTES = 1 << 20  # far above any real config; a larger one is not a config

# Segment prefixes that mark where the module path ends and the factor name begins.
# One row a peft type whose saved keys are its parameter names minus the adapter name.
FACTOR_MARKS: Mapping[str, tuple[str, ...]] = {
    "LORA": ("lora_",),
    "LOHA": ("hada_",),
    "LOKR": ("lokr_",),
    "IA3": ("ia3_",),
    "OFT": ("oft_",),
    "BOFT": ("boft_",),
    "HRA": ("hra_",),
    "C3A": ("c3a_",),
    "MISS": ("miss_",),
}

TOKENS = "token_adapter"  # new rows of an embedding (`trainable_token_indices`)
COPY = "base_layer"  # the base weight of a targeted embedding, which peft saves as well

# dtype names of the safetensors header -> torch; others are refused by name
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def read(folder: Path, *, header_only: bool = False) -> Adapter:
    """Reads a peft folder into an adapter with the single component `"model"`.

    Raises:
        AdapterNotFound: The folder holds no adapter; pickled weights are named but never read.
        BadAdapterFile: Config or weights are broken; the error names the file and the field.
        AdapterMismatch: Config and tensors contradict each other.
    """
    config = read_config(folder / CONFIG)
    weights = folder / WEIGHTS
    if not weights.is_file():
        pickled = (folder / "adapter_model.bin").exists()
        raise AdapterNotFound(
            f"the folder holds {CONFIG} but no {WEIGHTS}"
            + (" (adapter_model.bin is a pickle, which can run code, and is not read)" * pickled),
            fix="Save the adapter again as safetensors." if pickled else "",
            file=str(folder),
        )
    tensors = _read_tensors(weights, header_only=header_only)
    try:
        component = split(config, tensors)
        check_component(component)
    except LoraError as error:
        raise error.within(file=str(weights)) from None
    return Adapter({MODEL: component}, source=str(folder))


def read_config(path: Path) -> dict[str, Any]:
    """Reads and checks `adapter_config.json`: an object of at most 1 MiB with a known peft type."""
    if not path.is_file():
        raise AdapterNotFound(f"there is no {CONFIG} in {path.parent}", file=str(path.parent))
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise BadAdapterFile(f"the config is over {MAX_CONFIG_BYTES} bytes", file=str(path))
    try:
        config = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise BadAdapterFile(f"the config is no valid JSON ({error})", file=str(path)) from None
    if not isinstance(config, dict):
        raise BadAdapterFile("the config is no JSON object", file=str(path))
    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind.upper() not in FACTOR_MARKS:
        raise BadAdapterFile(
            f"peft_type is {kind!r}",
            fix=f"Types that are read: {', '.join(FACTOR_MARKS)}; for others use "
            "peft.PeftModel.from_pretrained.",
            file=str(path),
            field="peft_type",
        )
    if kind.upper() == "LORA":
        # peft's own defaults, which old configs leave out
        config = {"r": 8, "lora_alpha": 8, **config}
    return config


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _read_tensors(path: Path, *, header_only: bool) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            keys = list(file.keys())
            if not header_only:
                return {key: file.get_tensor(key) for key in keys}
            return {key: _meta_tensor(file.get_slice(key)) for key in keys}
    except (SafetensorError, OSError) as error:
        raise BadAdapterFile(
            f"the file is no whole safetensors file ({error})",
            fix="Download or save it again.",
            file=str(path),
        ) from None


def _meta_tensor(part: Any) -> Tensor:
    name = part.get_dtype()
    if name not in _DTYPES:
        raise BadAdapterFile(f"the tensor dtype {name} is not understood")
    return torch.empty(part.get_shape(), dtype=_DTYPES[name], device="meta")


def split(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Component:
    """Sorts a flat peft state dict into targets and whole modules.

    Raises:
        BadAdapterFile: A key is neither a factor nor inside a module listed in `modules_to_save`.
            Such keys overwrite base weights when plain peft loads them.
    """
    marks = FACTOR_MARKS[str(config["peft_type"]).upper()]
    listed = config.get("modules_to_save") or []
    if not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
        raise BadAdapterFile(
            f"modules_to_save is {listed!r}, not a list of names", field="modules_to_save"
        )
    targets: dict[str, dict[str, Tensor]] = defaultdict(dict)
    modules: dict[str, dict[str, Tensor]] = defaultdict(dict)
    foreign = []
    for key, tensor in sorted(tensors.items()):
        segments = key.removeprefix(PREFIX).split(".")
        cut = next((i for i, s in enumerate(segments) if s.startswith(marks)), 0)
        whole = _module_cut(segments, listed)
        place: dict[str, Tensor]
        if cut:
            place = targets[".".join(segments[:cut])]
            name = factor_name(".".join(segments[cut:]))
        elif TOKENS in segments or COPY in segments:
            row = next(i for i, s in enumerate(segments) if s in (TOKENS, COPY))
            place, name = modules[".".join(segments[:row])], ".".join(segments[row:])
        elif whole:
            place, name = modules[".".join(segments[:whole])], ".".join(segments[whole:])
        else:
            foreign.append(key)
            continue
        if name in place:
            raise BadAdapterFile(f"{key} stands twice, under two spellings", field=key)
        place[name] = tensor
    if foreign:
        raise BadAdapterFile(
            f"{len(foreign)} tensors are neither {config['peft_type']} factors nor inside "
            f"modules_to_save: {listing(foreign)}",
            fix="Loading them would overwrite base weights; remove them from the file.",
            field=foreign[0],
        )
    if not targets:
        raise BadAdapterFile(
            f"no key of the {len(tensors)} tensors is a {config['peft_type']} factor",
            fix=f"Expected names like {PREFIX}<module>.{marks[0]}A.weight.",
        )
    return Component(dict(config), dict(targets), dict(modules))


def _module_cut(segments: list[str], listed: list[str]) -> int:
    """Returns how many leading segments name a module of `modules_to_save`; 0 for none.

    peft compares the ends of names, so `classifier` saves `pre_classifier` as well.
    """
    ends = tuple(name for name in listed if name)
    lengths = range(1, len(segments))
    return next((n for n in lengths if ".".join(segments[:n]).endswith(ends)), 0) if ends else 0


def join(component: Component) -> dict[str, Tensor]:
    """Returns the flat peft state dict of a component, the inverse of `split`."""
    flat = {}
    for path, factors in component.targets.items():
        for name, tensor in factors.items():
            flat[f"{PREFIX}{path}.{name}{_SUFFIXED.get(name, '')}"] = tensor
    for path, parameters in component.modules.items():
        for name, tensor in parameters.items():
            flat[f"{PREFIX}{path}.{name}"] = tensor
    return flat


# peft holds these as modules, so their keys end in `.weight`; old DoRA files have it as well.
_SUFFIXED = {"lora_A": ".weight", "lora_B": ".weight", "lora_magnitude_vector": ""}


def factor_name(name: str) -> str:
    """Returns a factor as the record spells it: without the `.weight` peft adds to some."""
    bare = name.removesuffix(".weight")
    return bare if bare in _SUFFIXED else name


def write(adapter: Adapter, folder: Path) -> None:
    """Writes weights and then config, each aside and renamed into place.

    Raises:
        BadAdapterFile: The adapter has another component than `"model"`, or meta tensors.
    """
    if set(adapter.components) != {MODEL}:
        raise BadAdapterFile(
            f"the peft layout carries one model, not {sorted(adapter.components)}",
            fix="Save each component apart.",
        )
    component = adapter.components[MODEL]
    flat = {k: v.detach().to("cpu").contiguous() for k, v in join(component).items()}
    folder.mkdir(parents=True, exist_ok=True)
    config = json.dumps(component.config, indent=2, sort_keys=True, allow_nan=False)
    _replace(folder / WEIGHTS, to_bytes(_unshared(flat), metadata={"format": "pt"}))
    _replace(folder / CONFIG, config.encode())


def _unshared(flat: dict[str, Tensor]) -> dict[str, Tensor]:
    """Clones tensors that share storage, which safetensors refuses."""
    seen: set[int] = set()
    for key, tensor in flat.items():
        pointer = tensor.untyped_storage().data_ptr()
        if pointer in seen:
            flat[key] = tensor.clone()
        seen.add(pointer)
    return flat


def _replace(path: Path, data: bytes) -> None:
    handle, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(aside, 0o666 & ~umask)  # mkstemp makes 0600, which hides a shared folder's file
        os.replace(aside, path)
    except BaseException:
        Path(aside).unlink(missing_ok=True)
        raise
