"""Quantised bases: which kinds there are, what training on each needs, and what it cannot do.

Everything here was compared with a dense twin, a model whose weights are the dequantised ones:
logits and the gradient of every factor agree (`tests/test_quantised.py`, torch 2.13, peft 0.21.2,
transformers 5.23, bitsandbytes 0.50.2, torchao 0.18, hqq 0.2.8, optimum-quanto 0.2.7, on the CPU).
No package of these is imported: their layers are known by name, for a loaded base has them already.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from torch import Tensor, nn

from hf_lora.errors import InvalidOption, UnsupportedHost, UnsupportedTarget, shown
from hf_lora.hosts import config_of, features, kind_of
from hf_lora.walks import bare_modules

# peft methods whose layers only add to the output or rotate the input of whatever stands below
_OUTSIDE = frozenset({"LORA", "OFT", "BOFT", "MISS"})
_LINEAR = _OUTSIDE | {"IA3", "FOURIERFT"}  # and those that ask for an nn.Linear besides

_WHOLE = (
    "Load the base unquantised and merge there: hf-lora merge MODEL ADAPTER OUT, or load_lora and "
    "merge_lora."
)
_IN_MEMORY = f"{_WHOLE} Or save_lora, detach_lora, model.dequantize(dtype), load_lora, merge_lora."


@dataclass(frozen=True)
class Storage:
    """One way in which linears are stored in few bits.

    Attributes:
        name: What it is called.
        package: The package of the layer's class, or of the class of its weight.
        layer: Name of the layer's class; empty where its weight's class decides.
        methods: The peft methods that compute what they compute on the dense twin; None where
            nothing was compared, so that peft decides.
        no_dora: Device type -> why DoRA does not work there.
        skip: How a load leaves a module as it is.
        merge: How to merge all the same.
        varied: Whether layers of one class compute in many ways, so that gradients are tried.
    """

    name: str
    package: str
    layer: str
    methods: frozenset[str] | None
    no_dora: Mapping[str, str] = field(default_factory=dict)
    skip: str = ""
    merge: str = _WHOLE
    varied: bool = False


FOUR_BIT = Storage(
    "bitsandbytes 4 bit",
    "bitsandbytes",
    "Linear4bit",
    # not LoHa, LoKr and HRA: they take the shape of the packed weight for the layer's
    methods=_LINEAR | {"ADALORA", "C3A"},
    skip="BitsAndBytesConfig(..., llm_int8_skip_modules={})",
    merge=_IN_MEMORY,
)

# What packs its weight in another way (GPTQ, AWQ, GGUF ...), known by having no weight of floats.
FOREIGN = Storage("a kind that hf_lora does not know", "", "", methods=None, varied=True)

# The first row that holds a layer decides.
STORAGES: tuple[Storage, ...] = (
    FOUR_BIT,
    Storage(
        "bitsandbytes int8",
        "bitsandbytes",
        "Linear8bitLt",
        # HRA multiplies by the int8 values without their scales, and nothing fails
        methods=_LINEAR | {"ADALORA", "C3A", "LOHA", "LOKR"},
        no_dora={"cpu": "peft 0.21 loses the scales of the weight there, in the second forward"},
        skip="BitsAndBytesConfig(..., llm_int8_skip_modules={})",
        merge=_IN_MEMORY,
    ),
    Storage("hqq", "hqq", "HQQLinear", methods=_OUTSIDE),
    Storage(
        "optimum-quanto",
        "optimum",
        "QLinear",
        # AdaLoRA and C3A add in place to the output of its int8 product, which autograd refuses
        methods=_LINEAR | {"LOHA", "LOKR", "HRA"},
        skip="QuantoConfig(..., modules_to_not_convert={})",
    ),
    Storage(
        "torchao",
        "torchao",
        "",
        methods=_LINEAR | {"ADALORA", "C3A", "LOHA", "LOKR"},
        skip="TorchAoConfig(..., modules_to_not_convert={})",
        varied=True,
    ),
)


HALF = (torch.float16, torch.bfloat16)

# whether eval mode repacks a 4-bit weight on the CPU (bitsandbytes 0.50, where it has AVX512-BF16)
PACKS = "support_avx512bf16_for_cpu"


def is_packed(layer: nn.Module) -> bool:
    """Tells whether bitsandbytes has given a 4-bit layer the layout of inference on the CPU."""
    state = getattr(layer._parameters.get("weight"), "quant_state", None)
    return bool(getattr(state, "packing_format_for_cpu", False))


@cache
def _by_class(layer: Any, weight: Any) -> Storage | None:
    """Returns the row of a layer's class, or of the class of its weight."""
    for row in STORAGES:
        kind = layer if row.layer else weight
        names = ((c.__module__.partition(".")[0], c.__name__) for c in kind.__mro__)
        if any(package == row.package and row.layer in ("", name) for package, name in names):
            return row
    return None


def storage_of(module: nn.Module) -> Storage | None:
    """Returns how a linear is quantised; None for one that is not, and for what is no linear."""
    weight = module._parameters.get("weight")
    kinds: tuple[Any, Any] = type(module), type(weight)
    row = _by_class(*kinds)
    floats = weight is not None and weight.is_floating_point()
    if row is not None or floats or module._modules or kind_of(module) != "linear":
        return row
    own = [p for key, p in module._parameters.items() if p is not None and key != "bias"]
    return None if any(p.is_floating_point() for p in own) else FOREIGN


Stored = dict[str, tuple[nn.Module, Storage]]


def stored_layers(model: nn.Module) -> Stored:
    """Returns path -> (layer, how it is stored) of the quantised linears of a model."""
    found = ((path, module, storage_of(module)) for path, module in bare_modules(model))
    return {path: (module, row) for path, module, row in found if row is not None}


def values_in(module: nn.Module) -> int:
    """Returns how many values a module's own parameters hold, packed ones counted unpacked."""
    shape = None if storage_of(module) is None else features(module)
    if shape is None:
        return sum(p.numel() for p in module._parameters.values() if p is not None)
    bias = getattr(module, "bias", None)
    return shape[0] * shape[1] + (bias.numel() if isinstance(bias, Tensor) else 0)


def values_of(modules: Iterable[nn.Module]) -> int:
    """Returns how many values the modules' own parameters hold together, shared ones once."""
    found: dict[int, int] = {}
    for module in modules:
        if storage_of(module) is None:
            found |= {id(p): p.numel() for p in module._parameters.values() if p is not None}
        else:
            found[id(module)] = values_in(module)
    return sum(found.values())


def bytes_in(modules: Iterable[nn.Module]) -> int:
    """Returns the bytes of all tensors of layers, with their scales, codes and zero points."""
    found: dict[object, int] = {}
    seen: set[int] = set()
    for module in modules:
        for tensor in _tensors_in(vars(module), seen):
            place = tensor.untyped_storage().data_ptr() or id(tensor)
            found[place] = max(found.get(place, 0), tensor.numel() * tensor.element_size())
    return sum(found.values())


_PACKAGES = tuple(dict.fromkeys(row.package for row in STORAGES))


def _tensors_in(thing: Any, seen: set[int]) -> Iterator[Tensor]:
    """Yields plain tensors below a layer's attributes; not what is no part of its weight."""
    if id(thing) in seen or isinstance(thing, nn.Module | type):
        return
    seen.add(id(thing))
    below: Iterable[Any] = ()
    if isinstance(thing, Tensor):
        names = thing.__tensor_flatten__()[0] if hasattr(thing, "__tensor_flatten__") else None
        if names is None:
            yield thing
        below = [*vars(thing).values(), *(getattr(thing, name) for name in names or ())]
    elif isinstance(thing, dict):
        below = [value for key, value in thing.items() if key != "_modules"]
    elif isinstance(thing, list | tuple):
        below = thing
    elif type(thing).__module__.partition(".")[0] in _PACKAGES and hasattr(thing, "__dict__"):
        below = vars(thing).values()
    for value in below:
        yield from _tensors_in(value, seen)


def check_fits(stored: Stored, config: PeftConfig, targets: Collection[str]) -> None:
    """Checks that what a config asks for works on those of its targets that are quantised.

    Args:
        stored: The quantised linears, see `stored_layers`.
        config: The config of the adapter.
        targets: Paths of its targets; a parameter's is `layer.weight`.

    Raises:
        InvalidOption: The method, or a variant of LoRA, reads the weight in a way that the kind of
            base does not allow; the error names the field.
        UnsupportedTarget: A target is the packed weight itself, as a parameter.
    """
    for path in targets:
        layer, row = stored.get(path, (None, None))
        packed = stored.get(path.rpartition(".")[0])
        if packed is not None:
            raise UnsupportedTarget(
                f"{path} is packed ({packed[1].name}) and no parameter that a LoRA could sit on",
                fix=f"Name the layer {path.rpartition('.')[0]} instead.",
                field="target_parameters",
            )
        if layer is None or row is None or row.methods is None:
            continue
        method = str(getattr(config.peft_type, "value", config.peft_type))
        if method not in row.methods:
            raise InvalidOption(
                f"{method} reads the weight of a layer, and {path} is stored as {row.name}",
                fix=f"Use one of {', '.join(sorted(row.methods))}, or load the base unquantised.",
                field="config",
            )
        _check_variant(path, layer, row, config)


def _check_variant(path: str, layer: nn.Module, row: Storage, config: PeftConfig) -> None:
    field = next((name for name in _VARIANTS if getattr(config, name, None)), "")
    if str(getattr(config, "init_lora_weights", None)).lower() == "mica":
        field = "init_lora_weights"
    if field:
        raise InvalidOption(
            f"{field}={shown(getattr(config, field))} is refused on {path}, which is stored as "
            f"{row.name}: peft 0.21 leaves it out without a word on some quantised layers",
            fix="Leave it out, or load the base unquantised.",
            field=field,
        )
    device = next((p.device.type for p in layer.parameters()), "cpu")
    if getattr(config, "use_dora", False) and device in row.no_dora:
        raise InvalidOption(
            f"use_dora cannot be had on {path}, which is stored as {row.name} on the {device}: "
            f"{row.no_dora[device]}",
            fix="Leave it out, or load the base in 4 bit.",
            field="use_dora",
        )


# Variants of LoRA other than DoRA, which peft's classes for quantised layers know in part.
_VARIANTS = (
    *(f.name for f in dataclasses.fields(LoraConfig) if f.metadata.get("is_lora_variant")),
    "use_qalora",
)
_VARIANTS = tuple(name for name in _VARIANTS if name != "use_dora")


def check_whole(modules: Mapping[str, nn.Module], whole: Collection[str]) -> None:
    """Checks that modules to be trained whole are not quantised.

    Args:
        modules: Path -> module of the bare model.
        whole: Paths of the modules to be trained.

    Raises:
        UnsupportedTarget: One of them is, or holds a layer that is. By themselves loads leave out
            the last layer of a model, and not even that where it has a bias (transformers 5.23).
    """
    for head in whole:
        for path, module in modules.items():
            row = storage_of(module) if f"{path}.".startswith(f"{head}.") else None
            if row is not None:
                skip = f", {row.skip.format(list(whole))}," if row.skip else ""
                raise UnsupportedTarget(
                    f"{path} is quantised ({row.name}), so {head} cannot be trained whole",
                    fix=f"Load the base so that it leaves it out{skip} or pass train_also=() to "
                    "train no head.",
                    field="train_also",
                )


def check_trains(model: nn.Module) -> None:
    """Raises UnsupportedHost for a base whose quantiser says that nothing can be trained on it."""
    quantiser = getattr(model, "hf_quantizer", None)
    unpacked = getattr(quantiser, "packed_modules", None) == {}  # a GGUF file, loaded as floats
    if unpacked or getattr(quantiser, "is_trainable", True):
        return
    kind = getattr(config_of(model), "quantization_config", None)
    named = getattr(kind, "quant_method", None) or type(quantiser).__name__
    raise UnsupportedHost(
        f"{type(model).__name__} is quantised by {getattr(named, 'value', named)} in a way that "
        f"{type(quantiser).__module__.partition('.')[0]} says nothing can be trained on",
        fix="Load it in another way: bitsandbytes 4 bit or int8, torchao int8, hqq or quanto.",
    )
