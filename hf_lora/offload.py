"""Offloading: weights that hooks of accelerate or diffusers move, while adapters come and go.

Three kinds, of diffusers 0.42.1 and accelerate 1.15:

- model offloading (`enable_model_cpu_offload`) moves whole models; nothing needs to be done;
- sequential offloading (`enable_sequential_cpu_offload`) keeps every weight in a dict beside the
  model, which then lies on the meta device: its hooks are taken off and put on again around a
  change, for the components of a pipeline;
- group offloading (`enable_group_offload`) holds lists of modules, or copies of their parameters:
  its hooks are made anew around a change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any, TypeVar, cast
from weakref import WeakSet

from peft.tuners.lora.layer import Embedding, LoraLayer, ParamWrapper
from torch import nn

from hf_lora.adapter import MODEL
from hf_lora.errors import UnsupportedHost, UnsupportedTarget
from hf_lora.hosts import model_of, parts_of
from hf_lora.walks import holds, modules_of, nested, tuner_modules

F = TypeVar("F", bound=Callable[..., Any])

# models whose hooks are off at the moment: those of sequential, and of group offloading by leaf
_onloaded: WeakSet[nn.Module] = WeakSet()
_by_leaf: WeakSet[nn.Module] = WeakSet()

_GROUPS = "group_offloading"


@dataclass(frozen=True)
class _Sequential:
    """How a model was offloaded by `accelerate.cpu_offload`."""

    device: Any
    buffers: bool


def with_weights(function: F) -> F:
    """Lets a function run on a host whose weights are all there, its first argument.

    Afterwards they are moved as before. Sequential offloading is taken off and put on again for
    pipelines; for single models nothing is done, and what needs the weights refuses them. Calls
    inside a call end with the outermost.

    The function raises UnsupportedHost, besides what it raises, where weights are offloaded to disk
    or by hooks that are not known.
    """

    @wraps(function)
    def run(host: object, *args: Any, **kwargs: Any) -> Any:
        parts = parts_of(host)
        models = [model_of(part) for part in parts.values()]
        if not any(map(_has_hooks, models)):
            return function(host, *args, **kwargs)  # nothing comes after what is all or nothing
        with _hooks_off(models, sequential=MODEL not in parts):
            return function(host, *args, **kwargs)

    return cast(F, run)


def _has_hooks(model: nn.Module) -> bool:
    marks = ("_hf_hook", "_diffusers_hook")
    walked = modules_of(model, factors=False)  # factors have one only where their layer has
    return any(mark in vars(module) for module in walked for mark in marks)


@contextmanager
def _hooks_off(models: Sequence[nn.Module], *, sequential: bool) -> Iterator[None]:
    put_back: list[Callable[[], None]] = []
    try:
        for model in models:
            put_back += _ungrouped(model)
            put_back += _onloaded_weights(model) if sequential else []
        yield
    finally:
        for act in put_back:
            act()


def _onloaded_weights(model: nn.Module) -> list[Callable[[], None]]:
    """Takes sequential offloading off, where there is some; returns how to put it on again."""
    how = _sequential(model)
    if how is None:
        return []
    _onloaded.add(model)
    _accelerate().hooks.remove_hook_from_module(model, recurse=True)

    def put_back() -> None:
        _accelerate().cpu_offload(model, how.device, offload_buffers=how.buffers)
        _onloaded.discard(model)

    return [put_back]


def is_onloaded(model: nn.Module) -> bool:
    """Tells whether sequential offloading is off for the moment."""
    return model in _onloaded


def _accelerate() -> Any:
    import accelerate.hooks

    return accelerate


def _sequential(model: nn.Module) -> _Sequential | None:
    """Returns how a model is offloaded sequentially; None when it is not.

    Raises:
        UnsupportedHost: Its weights are offloaded to disk, or it has other hooks as well.
    """
    found = [(m, h) for m in modules_of(model) for h in _all_hooks(m)]
    leaves = [hook for _, hook in found if getattr(hook, "offload", False)]
    if not leaves:
        return None
    known = all(type(hook).__name__ == "AlignDevicesHook" for _, hook in found)
    in_memory = all(isinstance(_stored_in(hook), dict) for hook in leaves)
    devices = {hook.execution_device for hook in leaves}
    if not known or not in_memory or len(devices) > 1 or getattr(model, "hf_device_map", None):
        raise UnsupportedHost(
            f"the weights of {type(model).__name__} are offloaded by accelerate in a way that "
            "cannot be taken off and put on again (disk, several devices, or other hooks)",
            fix="Use enable_sequential_cpu_offload() or enable_model_cpu_offload() of the "
            "pipeline, or load it without offloading.",
        )
    return _Sequential(devices.pop(), any(hook.offload_buffers for hook in leaves))


def _all_hooks(module: nn.Module) -> Iterator[Any]:
    hook = getattr(module, "_hf_hook", None)
    if hook is not None:
        yield from getattr(hook, "hooks", (hook,))


def _stored_in(hook: Any) -> Any:
    """Returns what holds the weights of a hook, below the views that name them by module."""
    held = hook.weights_map
    return getattr(held, "dataset", held)


def check_called(model: nn.Module, name: str) -> None:
    """Checks that hooks which bring weights in when a layer is called will do so for an adapter.

    Raises:
        UnsupportedTarget: Its forward reads factors or weights without calling the layers that
            hold them, so that they would stay where they were put away.
    """
    if model not in _onloaded and model not in _by_leaf:
        return
    for path, outer in tuner_modules(model):
        for layer in nested(outer):
            if holds(layer, name) and not _calls_all(layer, name):
                raise UnsupportedTarget(
                    f"the weights of {type(model).__name__} are brought in layer by layer, and "
                    f"the adapter at {path} ({type(layer).__module__}) reads some without calling "
                    "their layer",
                    fix="Use enable_model_cpu_offload(), or group offloading by block; or a plain "
                    "LoRA.",
                )


def _calls_all(layer: Any, name: str) -> bool:
    plain = isinstance(layer, LoraLayer) and not isinstance(layer, Embedding | ParamWrapper)
    return plain and layer.lora_variant.get(name) is None


def _registries(model: nn.Module) -> Iterator[Any]:
    for module in model.modules():  # the outermost first, whose configuration holds for all
        if "_diffusers_hook" in vars(module):
            yield vars(module)["_diffusers_hook"]


def _group_hooks(model: nn.Module) -> Iterator[Any]:
    hooks = (registry.get_hook(_GROUPS) for registry in _registries(model))
    return (hook for hook in hooks if hook is not None)


def _ungrouped(model: nn.Module) -> list[Callable[[], None]]:
    """Takes group offloading off, where there is some; returns how to put it on again.

    As diffusers does when it changes a model (`_maybe_remove_and_reapply_group_offloading`): the
    whole model has one configuration, and between calls its weights are on the offload device.

    Raises:
        UnsupportedHost: The weights are on disk.
    """
    hook = next(_group_hooks(model), None)
    if hook is None:
        return []
    config = hook.config
    if config.offload_to_disk_path is not None:
        raise UnsupportedHost(
            f"the weights of {type(model).__name__} are offloaded to disk in groups, and diffusers "
            "0.42 cannot add to the files there",
            fix="Use enable_group_offload(...) without offload_to_disk_path.",
        )
    from diffusers.hooks import group_offloading

    if config.offload_type == "leaf_level":
        _by_leaf.add(model)
    for registry in list(_registries(model)):
        for name in (_GROUPS, "layer_execution_tracker", "lazy_prefetch_group_offloading"):
            registry.remove_hook(name, recurse=False)

    def put_back() -> None:
        group_offloading._apply_group_offloading(model, config)
        _by_leaf.discard(model)

    return [put_back]
