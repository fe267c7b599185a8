"""Methods of a host that would go wrong while adapters are on it, set right on that host alone.

Each stands as an attribute on the one model or pipeline, before the method of its class, and goes
away with the last adapter. Without adapters, as after `unload_lora_weights`, it only calls on. No
class of diffusers or transformers is changed.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.hotswap import prepare_model_for_compiled_hotswap
from torch import Tensor, nn

from hf_lora.adapter import MODEL
from hf_lora.casting import check_castable
from hf_lora.errors import InvalidOption, MergeError, UnsupportedTarget
from hf_lora.hosts import active_names, adapter_names, model_of, of_diffusers, parts_of
from hf_lora.joined import JOINED, SINGLE
from hf_lora.layers.fold import is_merged
from hf_lora.layers.strength import make_adjustable
from hf_lora.layers.unscale import after_fusing, before_fusing
from hf_lora.merged import check_by_others, way_back
from hf_lora.record import record_of
from hf_lora.walks import TunerModule, bare, modules_of, nested, tuner_modules

log = logging.getLogger(__name__)

_ANNOUNCED = "_prepare_lora_hotswap_kwargs"  # what `enable_lora_hotswap` of diffusers leaves


class Override:
    """A method of one object, called in place of the one its class has.

    It is found by name, so that copied and pickled hosts have their own.

    Attributes:
        owner: The model or pipeline.
        name: Name of the method.
    """

    def __init__(self, owner: Any, name: str) -> None:
        self.owner = owner
        self.name = name

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """The method of the class; `inspect.signature` reads this one's."""
        method: Callable[..., Any] = getattr(type(self.owner), self.name).__get__(self.owner)
        return method

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Does what the method does, rightly."""
        return _METHODS[self.name](self.owner, self.__wrapped__, *args, **kwargs)


def guard(model: nn.Module, *, in_pipeline: bool = False) -> None:
    """Sets right the methods of a model that has adapters.

    Args:
        model: The bare model. Those of transformers save adapters alone, as their documentation
            says, unless they are parts of a pipeline, whose folder needs the whole model.
        in_pipeline: Whether the adapter was put on a pipeline.
    """
    if of_diffusers(model):
        _set(model, _OF_DENOISERS)
    elif in_pipeline:
        _set(model, ("save_pretrained",))


def guard_host(host: object, *, loaded: str = "") -> None:
    """Sets right the methods of a host and of its components that have adapters.

    Args:
        host: The model or pipeline.
        loaded: Name of an adapter that was loaded just now: `enable_lora_hotswap` of diffusers
            waits for the first one, to pad it.
    """
    parts = {c: model_of(part) for c, part in parts_of(host).items()}
    for model in parts.values():
        if loaded in adapter_names(model):
            _prepare_hotswap(model)
    in_pipeline = MODEL not in parts
    for model in parts.values():
        if adapter_names(model):
            guard(model, in_pipeline=in_pipeline)
    if in_pipeline:
        _set(host, _OF_PIPELINES)


def _prepare_hotswap(model: nn.Module) -> None:
    """Pads factors as `load_lora_adapter` of diffusers does where a hotswap was announced.

    Raises:
        InvalidOption: The adapter has a larger rank than was announced, or the model is compiled.
    """
    asked = getattr(model, _ANNOUNCED, None)
    if asked is None:
        return
    try:
        prepare_model_for_compiled_hotswap(model, **asked)
    except (TypeError, ValueError) as error:
        raise InvalidOption(
            f"enable_lora_hotswap({', '.join(f'{k}={v!r}' for k, v in asked.items())}) was called "
            f"on {type(model).__name__}, and that fails now: {error}",
            fix="Call it with the largest rank of all adapters, before compiling.",
        ) from None
    vars(model)[_ANNOUNCED] = None
    _settle_ranks(model)


def unguard(owner: object) -> None:
    """Takes the overrides off one model or pipeline."""
    attributes = vars(owner)
    for name in [n for n, value in attributes.items() if isinstance(value, Override)]:
        del attributes[name]


def unguard_host(host: object) -> None:
    """Takes the overrides off a pipeline none of whose components has an adapter any more."""
    parts = parts_of(host)
    if MODEL not in parts and not any(adapter_names(model_of(p)) for p in parts.values()):
        unguard(host)


def _set(owner: Any, names: tuple[str, ...]) -> None:
    for name in names:
        if hasattr(type(owner), name) and name not in vars(owner):
            vars(owner)[name] = Override(owner, name)


def _save_bare(model: nn.Module, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Saves the base; diffusers saves names that no load knows, and loses the weights below them.

    Raises:
        MergeError: Adapters are merged, so that the weights are not those of the base.
    """
    if not any(True for _ in tuner_modules(model)):
        return original(*args, **kwargs)
    if is_merged(model) or record_of(model).merged_names:
        raise MergeError(
            f"adapters are merged into {type(model).__name__}, and its folder would hold neither "
            "the base nor a model without adapters",
            fix=f"{way_back(model)} That saves the base; or call unload_lora_weights() of the "
            "pipeline to save the merged weights.",
        )
    log.warning(
        "%s is saved without its adapters (%s); save_lora saves those",
        type(model).__name__,
        ", ".join(adapter_names(model)),
    )
    with _bare_tree(model):
        return original(*args, **kwargs)


@contextmanager
def _bare_tree(model: nn.Module) -> Iterator[None]:
    """Shows the model without tuner layers for the block."""
    flag = "_hf_peft_config_loaded"  # with it transformers saves the adapter alone
    places = [
        (parent._modules, key, child)
        for parent in modules_of(model)
        for key, child in parent._modules.items()
        if isinstance(child, TunerModule)
    ]
    held = {flag: vars(model)[flag]} if flag in vars(model) else {}
    try:
        vars(model).pop(flag, None)
        for modules, key, child in places:
            modules[key] = bare(child)
        yield
    finally:
        for modules, key, child in places:
            modules[key] = child
        vars(model).update(held)


def _refuse(model: nn.Module, what: str, leaves: object, doing: str) -> None:
    found = [
        path
        for path, outer in tuner_modules(model)
        if path.rpartition(".")[2] in leaves  # type: ignore[operator]
        and outer._get_available_adapters()
        and hasattr(model.get_submodule(path.rpartition(".")[0]), "fuse_projections")
    ]
    if found:
        raise UnsupportedTarget(
            f"{what} would leave {len(found)} layers with adapters out of use, for instance "
            f"{found[0]}",
            fix=f"Call detach_lora, {doing}, and attach or load anew. To keep an adapter in the "
            "weights: merge_lora, then unload_lora_weights() of the pipeline.",
        )


def _fuse(model: nn.Module, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Joins projections; UnsupportedTarget where an adapter would be passed by."""
    # a UNet that is fused already gets new joined layers
    _refuse(model, "fuse_qkv_projections()", {*SINGLE, *JOINED}, "fuse")
    return original(*args, **kwargs)


def _unfuse(model: nn.Module, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Takes joined projections off; UnsupportedTarget where an adapter would go with them."""
    _refuse(model, "unfuse_qkv_projections()", JOINED, "unfuse")
    return original(*args, **kwargs)


def keep_adjustable(model: nn.Module, name: str = "") -> None:
    """Keeps strengths on a diffusers model so that changing one compiles nothing anew.

    Args:
        model: The bare model.
        name: The adapter whose strengths they are; left out, all.
    """
    for _, outer in tuner_modules(model) if of_diffusers(model) else ():
        for layer in nested(outer):
            for known in (name,) if name else layer._get_available_adapters():
                make_adjustable(layer, known)


def _set_adapters(host: object, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Sets strengths as diffusers does, which are numbers then, and part of compiled code.

    Raises:
        MergeError: Adapters are merged by `merge_lora`, and no strength would have an effect.
    """
    models = _free(host, "change adapters")
    result = original(*args, **kwargs)
    for model in models:
        keep_adjustable(model)
    return result


def _load_adapter(model: nn.Module, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Loads as diffusers does, and takes down the rank and alpha that a hotswap has brought.

    peft 0.21 changes the factors and their scaling in place and leaves the old rank and alpha, by
    which later strengths and saves would go.
    """
    _free(model, "load another adapter")
    padded = getattr(model, _ANNOUNCED, None) is not None
    result = original(*args, **kwargs)
    name = str(kwargs.get("adapter_name"))
    if kwargs.get("hotswap", args[2] if len(args) > 2 else False):
        record_of(model).manifests.pop(name, None)
        _settle_ranks(model, swapped=name)
    elif padded:
        _settle_ranks(model)
    return result


def _settle_ranks(model: nn.Module, swapped: str = "") -> None:
    """Goes through what a hotswap can change: plain LoRA of linears and convolutions."""
    for _, outer in tuner_modules(model):
        for layer in nested(outer):
            plain = isinstance(layer, LoraLayer) and not isinstance(layer, ParamWrapper)
            for name in layer.lora_A if plain and isinstance(layer.lora_A, nn.ModuleDict) else ():
                settle_rank(layer, name, anew=name == swapped)


def settle_rank(layer: Any, name: str, *, anew: bool) -> None:
    """Makes rank and alpha of an adapter say what its factors are.

    Args:
        layer: A LoRA layer.
        name: The adapter.
        anew: Whether its scaling is that of newly loaded factors; else they were only padded with
            zeros to a larger rank, and it is that of the rank and alpha of before.
    """
    weight = layer.lora_A[name].weight
    rank, before = int(weight.shape[0]), layer.r[name]
    root = math.sqrt if layer.use_rslora.get(name) else float
    if anew:
        scaling = layer.scaling[name]
        alpha = float(scaling) * root(rank)
        whole = round(alpha)
        if isinstance(scaling, Tensor):  # rounded to float32 by peft
            like = scaling.new_tensor(whole / root(rank))
            alpha = whole if bool(like == scaling) else alpha
        layer.lora_alpha[name] = alpha
    elif rank != before:
        layer.lora_alpha[name] = layer.lora_alpha[name] * root(rank) / root(before)
    layer.r[name] = rank


def _active_adapters(host: object, original: Callable[..., Any]) -> list[str]:
    """Returns the active adapters of all components; diffusers returns those of the last one."""
    models = [model_of(part) for part in parts_of(host).values()]
    return list(dict.fromkeys(name for model in models for name in active_names(model)))


def _fuse_lora(host: object, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Fuses as diffusers does; unfusing puts back the strengths that `lora_scale` multiplies."""
    models = _free(host, "fuse them")
    layers = before_fusing(models)
    try:
        return original(*args, **kwargs)
    finally:
        after_fusing(layers)


def _free(host: object, doing: str) -> list[nn.Module]:
    """Returns the models of a host, into none of which `merge_lora` has merged anything."""
    models = [model_of(part) for part in parts_of(host).values()]
    for model in models:
        check_by_others(model, doing)
    return models


def _add(host: object, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Adds an adapter; MergeError while others are merged, which peft would unmerge in part."""
    _free(host, "add another")
    return original(*args, **kwargs)


def _cast(model: nn.Module, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Casts as diffusers does; UnsupportedTarget where an adapter could not be called then."""
    asked = kwargs.get("storage_dtype", args[0] if args else torch.float8_e4m3fn)
    if isinstance(asked, torch.dtype):
        check_castable(model, asked)
    return original(*args, **kwargs)


def _set_device(host: object, original: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Moves the factors of adapters; diffusers knows those of LoRA alone and fails on others."""
    names, device = (*args, *(kwargs[k] for k in ("adapter_names", "device") if k in kwargs))
    for part in parts_of(host).values():
        for _, outer in tuner_modules(model_of(part)):
            for layer in nested(outer):
                if isinstance(layer, BaseTunerLayer):
                    _move(layer, [names] if isinstance(names, str) else names, device)


def _move(layer: Any, names: Any, device: Any) -> None:
    for attribute in layer.adapter_layer_names:
        held: Any = getattr(layer, attribute, None)
        for name in names if isinstance(held, nn.ModuleDict | nn.ParameterDict) else ():
            item = held[name] if name in held else None
            if isinstance(item, Tensor):  # a parameter in a dict: as `Module.to` moves its own
                moved = item.data.to(device)
                if moved.is_meta == item.is_meta:
                    item.data = moved
                else:
                    held[name] = nn.Parameter(moved, requires_grad=item.requires_grad)
            elif item is not None:
                item.to(device)


_OF_DENOISERS = (
    "save_pretrained",
    "fuse_qkv_projections",
    "unfuse_qkv_projections",
    "load_lora_adapter",
    "add_adapter",
    "set_adapter",
    "set_adapters",
    "fuse_lora",
    "enable_layerwise_casting",
)
_OF_PIPELINES = (
    "get_active_adapters",
    "set_lora_device",
    "load_lora_weights",
    "set_adapters",
    "fuse_lora",
)
_METHODS: Mapping[str, Callable[..., Any]] = {
    "save_pretrained": _save_bare,
    "fuse_qkv_projections": _fuse,
    "unfuse_qkv_projections": _unfuse,
    "load_lora_adapter": _load_adapter,
    "load_lora_weights": _add,
    "add_adapter": _add,
    "set_adapter": _set_adapters,
    "set_adapters": _set_adapters,
    "fuse_lora": _fuse_lora,
    "enable_layerwise_casting": _cast,
    "get_active_adapters": _active_adapters,
    "set_lora_device": _set_device,
}
