"""What a host remembers, so that everything done to it can be undone.

What must be undone later is recorded on the model itself, as plain data without references to
modules, so that a copied or pickled model carries a right record. What must be undone now, because
a step failed, is held as a snapshot of every module's attributes.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TypeVar
from weakref import WeakSet

from torch import Tensor, nn

from hf_lora.fingerprint import Fingerprint
from hf_lora.hosts import (
    AROUND,
    active_names,
    adapter_names,
    modules_of,
    parameters_of,
    parts_of,
    tuner_modules,
)
from hf_lora.manifest import Manifest

RECORD = "_hf_lora_record"

T = TypeVar("T")


@dataclass
class Flags:
    """What attaching changes besides the module tree.

    Attributes:
        requires_grad: Bare parameter name -> flag, for every parameter that existed.
        training: Module path -> training mode; empty where it was not asked for.
        names: Names of the adapters that were there.
        active: Names of those that were active, in order.
        enabled: Whether adapters took part at all (`disable_adapters()` was not called).
    """

    requires_grad: Mapping[str, bool]
    training: Mapping[str, bool]
    names: tuple[str, ...]
    active: tuple[str, ...]
    enabled: bool


@dataclass
class Record:
    """What hf_lora must undo on one host.

    Attributes:
        bare: The flags before the first adapter; None when somebody else attached it.
        before: Adapter name -> the flags just before it was attached.
        merged: Weight name -> the untouched weight, while merged with `keep="cpu"`.
        merged_names: Names of the merged adapters; empty when nothing is merged by us.
        before_merge: The flags just before the merge.
        merge_figures: What the merge rounded, as `merge_report` shows it; empty when not merged.
        merge_replaced: Full name -> the parameter that stood there, tied to another, where the
            merge has put in a new one; None where there was none.
        manifests: Adapter name -> what the file it was loaded from says of it.
        sampled: Samples of the base weights of before they were sharded; None without sharding.
        unpacked: Paths of 4-bit layers that are kept from repacking, see `layers.quantised`.
    """

    bare: Flags | None = None
    before: dict[str, Flags] = field(default_factory=dict)
    merged: dict[str, Tensor] | None = None
    merged_names: tuple[str, ...] = ()
    before_merge: Flags | None = None
    merge_figures: Mapping[str, float] = field(default_factory=dict)
    merge_replaced: Mapping[str, nn.Parameter | None] = field(default_factory=dict)
    manifests: dict[str, Manifest] = field(default_factory=dict)
    sampled: Fingerprint | None = None
    unpacked: tuple[str, ...] = ()

    def copy(self) -> Record:
        """Returns a record that does not change with this one."""
        return replace(self, before=dict(self.before), manifests=dict(self.manifests))


def record_of(model: nn.Module) -> Record:
    """Returns the record on the model, or an empty one that is not kept."""
    record = model.__dict__.get(RECORD)
    return record if isinstance(record, Record) else Record()


def keep_record(model: nn.Module, record: Record) -> None:
    """Puts the record on the model."""
    model.__dict__[RECORD] = record


def drop_record(model: nn.Module) -> None:
    """Removes the record."""
    model.__dict__.pop(RECORD, None)


def enabled(model: nn.Module) -> bool:
    """Tells whether the active adapters take part; `disable_adapters()` turns them off."""
    return not any(m._disable_adapters for _, m in tuner_modules(model))


# not on the models: a copy made inside a block is a model of its own
_switched_off: WeakSet[nn.Module] = WeakSet()


@contextmanager
def switched_off(models: Sequence[nn.Module]) -> Iterator[None]:
    """Marks models whose adapters are off for the block; nested blocks end with the outermost."""
    fresh = [model for model in models if model not in _switched_off]
    _switched_off.update(fresh)
    try:
        yield
    finally:
        _switched_off.difference_update(fresh)


def is_switched_off(model: nn.Module) -> bool:
    """Tells whether a model is inside a `switched_off` block."""
    return model in _switched_off


def flags_of(model: nn.Module, *, modes: bool = True) -> Flags:
    """Takes down the flags of the model as they are now, with the training modes if asked."""
    requires_grad = _needs_grad_by_name(model)
    names = tuple(adapter_names(model))
    return Flags(
        requires_grad=requires_grad,
        training={n: m.training for n, m in model.named_modules()} if modes else {},
        names=names,
        active=active_names(model) if names else (),
        enabled=enabled(model) if names else True,
    )


def _needs_grad_by_name(model: nn.Module) -> dict[str, bool]:
    """Returns bare name -> requires_grad of every parameter, by the first of its names.

    Names are without the segments of tuner layers around the base. One loop without generators:
    every load passes the factors of all adapters.
    """
    found: dict[str, bool] = {}
    seen: set[int] = set()
    stack = [("", model)]
    while stack:
        path, module = stack.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        front = f"{path}." if path else ""
        for key, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                found[front + key] = parameter.requires_grad
        if module._modules:
            stack += [
                (path if key in AROUND else front + key, child)
                for key, child in reversed(module._modules.items())
                if child is not None and (child._modules or child._parameters)
            ]
    return found


def restore_flags(model: nn.Module, flags: Flags, *, modes: bool) -> None:
    """Sets requires_grad, and training modes if asked, of all that existed when taken down."""
    for name, parameter in model.named_parameters():
        if _bare_name(name) in flags.requires_grad:
            parameter.requires_grad_(flags.requires_grad[_bare_name(name)])
    if modes:
        for name, module in model.named_modules():
            known = flags.training.get(name, flags.training.get(_bare_name(name)))
            module.training = module.training if known is None else known


def _bare_name(name: str) -> str:
    """Returns the name a parameter or module of the base has without tuner layers around it."""
    return ".".join(s for s in name.split(".") if s not in AROUND)


# Not their subclasses: the config of a diffusers model is a dict that refuses to be changed.
_CHANGEABLE = (dict, OrderedDict, defaultdict, list, set)


class Snapshot:
    """Class and attributes of every module of a model, to be put back when a step fails midway.

    Undoing by the inverse steps would need each of them to work on a half-made state. Tensors are
    held, not copied: what is taken back here never writes into tensors that existed.
    """

    def __init__(self, model: nn.Module) -> None:
        # not the factors: no step changes what is there of them but requires_grad
        modules = list(modules_of(model, factors=False))
        # most hold factors by adapter, and only their content changes; the model itself gets flags
        dicts = [type(m) is nn.ModuleDict and m is not model for m in modules]
        pairs = list(zip(modules, dicts, strict=True))
        self._dicts = [(m, m.training, m._modules.copy()) for m, is_dict in pairs if is_dict]
        self._modules = [(m, type(m), dict(vars(m))) for m, is_dict in pairs if not is_dict]
        for _, _, attributes in self._modules:
            if RECORD in attributes:
                attributes[RECORD] = attributes[RECORD].copy()
        # dicts, lists and sets are shared between modules (peft_config): contents go back in place
        self._contents = [
            (value, value.copy() if value else ())  # most are empty
            for _, _, attributes in self._modules
            for value in attributes.values()
            if type(value) in _CHANGEABLE
        ]
        self._needs_grad = [(p, p.requires_grad) for p in parameters_of(model)]

    def restore(self) -> None:
        """Puts everything back; modules and parameters made since are forgotten."""
        for module, kind, attributes in self._modules:
            if type(module) is not kind:
                module.__class__ = kind
            vars(module).clear()
            vars(module).update(attributes)
        for holder, training, held in self._dicts:
            holder.training = training
            holder._modules.clear()
            holder._modules.update(held)
        for value, content in self._contents:
            value.clear()
            value.extend(content) if isinstance(value, list) else value.update(content)
        for parameter, needs_grad in self._needs_grad:
            parameter.requires_grad_(needs_grad)


def all_or_nothing(host: object, step: Callable[[], T]) -> T:
    """Returns what the step returns; when it raises, the modules of the host are as before.

    A function, because a `with` block has a moment between its last line and its exit in which an
    interrupt passes by the exit.
    """
    snapshots = [Snapshot(part) for part in parts_of(host).values()]
    try:
        return step()
    except BaseException:
        for snapshot in snapshots:
            snapshot.restore()
        raise


class transaction:
    """Context manager that leaves the modules of a host as they were when its body raises.

    Where an interrupt between the body and what follows it would matter, use `all_or_nothing`.
    """

    def __init__(self, host: object) -> None:
        self._snapshots = [Snapshot(part) for part in parts_of(host).values()]

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # no generator: one that an interrupt passes by would restore when it is collected
        for snapshot in self._snapshots if kind else ():
            snapshot.restore()
