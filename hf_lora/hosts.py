"""The host: what is attached to, seen as a bare model with adapters on it.

Paths are those of the bare model: `layers.0.q_proj`, whether or not a tuner layer wraps it now.
A host is a model, or a pipeline that holds several.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from peft import PeftConfig, PeftMixedModel, PeftModel
from peft.tuners.tuners_utils import BaseTuner
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_lora.adapter import MODEL
from hf_lora.errors import (
    AdapterExists,
    AdapterNotFound,
    InvalidOption,
    MetaHost,
    UnsupportedHost,
    closest,
    shown,
)
from hf_lora.walks import bare_modules, modules_of, nested, parameters_of, tuner_modules

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")

# Names of peft's own parts of a layer, and how its factors begin.
_PEFTS = ("lora_", "base_layer", "modules_to_save", "original_module")


def model_of(host: object) -> nn.Module:
    """Returns the model that paths are relative to: `host`, or what a wrapper holds.

    Raises:
        UnsupportedHost: `host` is no `torch.nn.Module`; the error says what to give instead.
    """
    if isinstance(host, PeftMixedModel) or getattr(host, "_is_prompt_learning", False):
        raise UnsupportedHost(
            f"{type(host).__name__} holds prompts or several methods at once, beside which no LoRA "
            "can be attached",
            fix="Load the base model again and attach to that.",
        )
    if isinstance(host, PeftModel):
        # not get_base_model(), which fails while the active adapter is being taken off
        inner: Any = host.base_model
        return inner.model if isinstance(inner, BaseTuner) else inner  # type: ignore[no-any-return]
    if isinstance(host, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return model_of(host.module)
    if isinstance(host, nn.Module):
        compiled = getattr(host, "_orig_mod", None)
        return compiled if isinstance(compiled, nn.Module) else host
    if isinstance(host, str):
        raise UnsupportedHost(
            f"a host is a loaded model, not the name {host!r}",
            fix=f"Load it first: AutoModelForCausalLM.from_pretrained({host!r}).",
        )
    if isinstance(host, type):
        loads = hasattr(host, "from_pretrained")
        raise UnsupportedHost(
            f"a host is a loaded model or pipeline, not the class {host.__name__}",
            fix=f"Load it first: {host.__name__}{'.from_pretrained' * loads}(...).",
        )
    held = getattr(host, "components", {})
    named = (*getattr(type(host), "_lora_loadable_modules", ()), *held)
    parts = [n for n in named if isinstance(held.get(n), nn.Module)]
    if parts:
        raise UnsupportedHost(
            f"{type(host).__name__} is a pipeline, and one of its models is needed here",
            fix=f"Give a component, pipe.{parts[0]}.",
        )
    raise UnsupportedHost(
        f"{type(host).__name__} is no torch.nn.Module",
        fix="Give a model from from_pretrained or any torch.nn.Module.",
    )


def class_name(model: nn.Module) -> str:
    """Returns the name of a model's class, and not the one that FSDP2 has put over it."""
    kinds = (k for k in type(model).__mro__ if not k.__module__.startswith("torch.distributed."))
    return next(kinds).__name__


def parts_of(host: object) -> dict[str, nn.Module]:
    """Returns component name -> model; a host that is one model has the single component `"model"`.

    A model may stand in a wrapper (`PeftModel`), see `model_of`. A pipeline's components are those
    that diffusers loads LoRAs into and that it has; one model under two names is the first of them.

    Raises:
        UnsupportedHost: `host` is neither a model nor a pipeline with such components.
    """
    names = getattr(type(host), "_lora_loadable_modules", None)
    if isinstance(host, nn.Module) and hasattr(host, "lora_host"):
        raise UnsupportedHost(
            f"{type(host).__name__} trains a {type(host.lora_host).__name__}, which is the host",
            fix="Give the pipeline that it was made from.",
        )
    if isinstance(host, nn.Module) or not names:
        model_of(host)
        return {MODEL: host}  # type: ignore[dict-item]
    held = {name: getattr(host, name, None) for name in names}
    found: dict[int, tuple[str, nn.Module]] = {}
    for name, part in held.items():
        if isinstance(part, nn.Module):
            found.setdefault(id(model_of(part)), (name, part))
    return dict(found.values())


def check_components(components: object) -> None:
    """Checks the `components` argument of a host that is one model."""
    if components not in (None, [MODEL], (MODEL,)):
        raise InvalidOption(
            f"components={components!r}, but a model has the single component {MODEL!r}",
            fix="Leave components out.",
            field="components",
        )


def peft_configs(model: nn.Module) -> dict[str, PeftConfig]:
    """Returns adapter name -> peft config, peft's own dict; empty for a bare model."""
    found: dict[str, PeftConfig] | None = getattr(model, "peft_config", None)
    return {} if found is None else found


def adapter_names(model: nn.Module) -> list[str]:
    """Returns the names of all adapters on the model, whoever attached them."""
    return list(peft_configs(model))


def active_names(model: nn.Module) -> tuple[str, ...]:
    """Returns the active adapters in order, over all layers (a layer may lack some of them)."""
    names: dict[str, None] = {}
    for _, outer in tuner_modules(model):
        for module in nested(outer):
            present = module._get_available_adapters()
            names.update(dict.fromkeys(n for n in module.active_adapters if n in present))
    return tuple(names)


def check_new_name(model: nn.Module, name: str) -> None:
    """Checks that a name can be given to a new adapter of this model.

    Raises:
        InvalidOption: Not of `[A-Za-z0-9_-]`, or equal to a path segment: peft 0.21 finds an
            adapter's tensors by that text and would save others' or none.
        AdapterExists: The name is in use.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InvalidOption(
            f"adapter name {shown(name)} is not 1 to 64 letters, digits, '_' or '-'",
            fix="Choose such a name.",
            field="name",
        )
    if name in adapter_names(model):
        raise AdapterExists(
            f"{type(model).__name__} already has an adapter {name!r}",
            fix=f"Choose another name=, or detach_lora(host, {name!r}) first.",
            field="name",
        )
    modules = (module for _, module in bare_modules(model))
    reserved = any(name in m._modules or name in m._parameters for m in modules)
    if reserved or hasattr(nn.ModuleDict, name) or name.startswith(_PEFTS):
        raise InvalidOption(
            f"adapter name {name!r} is also a part of module names of {type(model).__name__}",
            fix="Choose a name that no module has; peft could not tell them apart when saving.",
            field="name",
        )


def check_known_name(model: nn.Module, name: str) -> None:
    """Raises AdapterNotFound, with the names there are, when the model has no such adapter."""
    names = adapter_names(model)
    if name not in names:
        near = closest(str(name), names)
        there = f"It has {', '.join(repr(n) for n in near)}" if names else "It has none"
        raise AdapterNotFound(
            f"{type(model).__name__} has no adapter {name!r}. {there}.", field="name"
        )


def on_meta(model: nn.Module, *, factors: bool = True) -> bool:
    """Tells whether the parameters lie on the meta device, with or without the factors of LoRA.

    Raises:
        UnsupportedHost: Some do and some do not, or accelerate has offloaded them.
    """
    count = Counter([p.is_meta for p in parameters_of(model, factors=factors)])
    if len(count) == 2 and not any(p.is_meta for p in _bare_parameters(model)):
        raise UnsupportedHost(
            f"{count[True]} factors of adapters on {type(model).__name__} lie on the meta device, "
            "and the weights of the model do not",
            fix='Do it outside of torch.device("meta"). Factors that were moved there are lost: '
            "detach_lora, and load them anew.",
        )
    if len(count) == 2:
        raise UnsupportedHost(
            f"{count[True]} of {count.total()} parameters of {type(model).__name__} lie on the "
            "meta device (offloaded), and a LoRA beside them would have no weights",
            fix="Load it without offloading to disk.",
        )
    if count[True] and any(_offloads(module) for module in modules_of(model, factors=False)):
        raise UnsupportedHost(
            f"the weights of {type(model).__name__} are offloaded by accelerate, and a LoRA beside "
            "them would have none of its own",
            fix="Load it without offloading.",
        )
    return bool(count[True])


def _bare_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Yields the parameters of the base, whatever the methods of the adapters."""
    for _, module in bare_modules(model):
        yield from (p for p in module._parameters.values() if p is not None)


def _offloads(module: nn.Module) -> bool:
    hook = getattr(module, "_hf_hook", None)
    return any(getattr(h, "offload", False) for h in (hook, *getattr(hook, "hooks", ())))


def check_has_weights(model: nn.Module, doing: str, *, factors: bool = True) -> None:
    """Raises MetaHost when the model, or its adapters, have no weights to work with."""
    if on_meta(model, factors=factors):
        raise MetaHost(
            f"{type(model).__name__} lies on the meta device and has no weights, so it cannot "
            f"be {doing}",
            fix="Load it with from_pretrained, or call to_empty() and load weights, then attach.",
        )


def features(module: nn.Module) -> tuple[int, int] | None:
    """Returns (in, out) of a layer a LoRA can sit on, or None.

    Linear kinds, transformers' Conv1D, convolutions (channels), embeddings (vocabulary, width),
    and quantised linears that say `in_features` or `infeatures`.
    """
    if type(module) is nn.Linear:  # first, because most are
        return module.in_features, module.out_features
    if isinstance(module, Conv1D):
        return int(module.weight.shape[0]), int(module.weight.shape[1])
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    if not isinstance(module, _KNOWN) and (_holds_float_weight(module) or module._modules):
        return None  # a layer class of its own, such as I-BERT's QuantLinear: peft has no LoRA
    for names in _FEATURES:
        pair = [getattr(module, n, None) for n in names]
        if all(isinstance(value, int) for value in pair):
            return pair[0], pair[1]  # type: ignore[return-value]
    return None


_KNOWN = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def _holds_float_weight(module: nn.Module) -> bool:
    """Tells own layer classes from quantised linears, whose packed weight is no float."""
    weight = module._parameters.get("weight")
    return weight is not None and weight.is_floating_point()


_FEATURES = (
    ("in_features", "out_features"),
    ("infeatures", "outfeatures"),
    ("in_channels", "out_channels"),
)


def kind_of(module: nn.Module) -> str:
    """Returns `linear`, `conv` or `embedding`; empty for what no LoRA can sit on."""
    if features(module) is None:
        return ""
    if isinstance(module, nn.Embedding):
        return "embedding"
    return "conv" if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) else "linear"


def of_diffusers(model: nn.Module) -> bool:
    """Tells whether diffusers defines the class of a model, or one that it inherits from."""
    return any(kind.__module__.startswith("diffusers.") for kind in type(model).__mro__)


def config_of(model: nn.Module) -> Any:
    """Returns the model's own config, or None for a plain module."""
    return getattr(model, "config", None)
