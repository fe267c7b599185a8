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
from hf_lora.hosts import active_names, adapter_names, parts_of
from hf_lora.manifest import Manifest
from hf_lora.walks import AROUND, factors_of, modules_of, named_parts, tuner_modules

RECORD = "_hf_lora_record"

T = TypeVar("T")


@dataclass
class Flags:
    """What attaching changes besides the module tree.

    Attributes:
        requires_grad: Bare parameter name -> flag, for every parameter but factors of LoRA layers.
        thawed: Places of the factors that required gradients, see `walks`.
        training: Module path -> training mode; empty where it was not asked for.
        names: Names of the adapters that were there.
        active: Names of those that were active, in order.
        enabled: Whether adapters took part at all (`disable_adapters()` was not called).
    """

    requires_grad: Mapping[str, bool]
    thawed: frozenset[tuple[str, ...]]
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


@dataclass(frozen=True)
class Grads:
    """Which parameters of a model require gradients.

    Attributes:
        model: The model.
        named: Bare name -> parameter, of all but the factors of LoRA layers.
        needed: Names of those among them that require gradients.
        thawed: Place -> parameter, of the factors that require gradients. The others, most by far
            where many adapters are, are looked at and passed by.
    """

    model: nn.Module
    named: Mapping[str, nn.Parameter]
    needed: frozenset[str]
    thawed: Mapping[tuple[str, ...], nn.Parameter]

    @classmethod
    def of(cls, model: nn.Module) -> Grads:
        """Looks at every parameter once."""
        named, layers = named_parts(model)
        thawed: dict[tuple[str, ...], nn.Parameter] = {
            (front, *place): parameter
            for front, layer in layers
            for place, parameter in factors_of(layer)
            if parameter.requires_grad
        }
        needed = frozenset(name for name, p in named.items() if p.requires_grad)
        return cls(model, named, needed, thawed)

    def restore(self) -> None:
        """Makes it so again; new parameters stay as they are, but for factors."""
        for _, layer in named_parts(self.model)[1]:
            for _, parameter in factors_of(layer):
                parameter.requires_grad_(False)
        for name, parameter in self.named.items():
            parameter.requires_grad_(name in self.needed)
        for parameter in self.thawed.values():
            parameter.requires_grad_(True)


def flags_of(model: nn.Module, *, modes: bool = True, grads: Grads | None = None) -> Flags:
    """Takes down the flags of the model as they are now.

    Args:
        model: The bare model.
        modes: Whether to take down training modes.
        grads: Which parameters require gradients, where somebody has looked already.
    """
    grads = grads if grads is not None and grads.model is model else Grads.of(model)
    names = tuple(adapter_names(model))
    return Flags(
        requires_grad={name: name in grads.needed for name in grads.named},
        thawed=frozenset(grads.thawed),
        training={n: m.training for n, m in model.named_modules()} if modes else {},
        names=names,
        active=active_names(model) if names else (),
        enabled=enabled(model) if names else True,
    )


def restore_flags(model: nn.Module, flags: Flags, *, modes: bool) -> None:
    """Sets requires_grad, and training modes if asked, of all that existed when taken down."""
    named, layers = named_parts(model)
    for name, parameter in named.items():
        if name in flags.requires_grad:
            parameter.requires_grad_(flags.requires_grad[name])
    for front, layer in layers:
        for place, parameter in factors_of(layer):
            if place[1] in flags.names:
                parameter.requires_grad_((front, *place) in flags.thawed)
    if modes:
        for name, module in model.named_modules():
            known = flags.training.get(name, flags.training.get(_bare_name(name)))
            module.training = module.training if known is None else known


def _bare_name(name: str) -> str:
    """Returns the name a parameter or module of the base has without tuner layers around it."""
    return ".".join(s for s in name.split(".") if s not in AROUND)


# Not their subclasses: the config of a diffusers model is a dict that refuses to be changed.
_CHANGEABLE = (dict, OrderedDict, defaultdict, list, set)

# containers of torch -> where their content is
_HOLDERS = {nn.ModuleDict: ("_modules",), nn.ParameterDict: ("_parameters", "_keys")}


class Snapshot:
    """Class and attributes of every module of a model, to be put back when a step fails midway.

    Undoing by the inverse steps would need each of them to work on a half-made state. Tensors are
    held, not copied: what is taken back here never writes into tensors that existed.
    """

    def __init__(self, model: nn.Module) -> None:
        # not the factors: no step changes what is there of them but requires_grad
        modules = list(modules_of(model, factors=False))
        # most hold factors by adapter, and only their content changes; the model itself gets flags
        holders = [m for m in modules if type(m) in _HOLDERS and m is not model]
        others = [m for m in modules if type(m) not in _HOLDERS or m is model]
        self._modes = [(m, m.training) for m in holders]
        self._modules = [(m, type(m), dict(vars(m))) for m in others]
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
        for holder in holders:
            held = vars(holder)
            for key in _HOLDERS[type(holder)]:
                value = held[key]
                self._contents.append((value, value.copy() if value else ()))
        self.grads = Grads.of(model)

    def restore(self) -> None:
        """Puts everything back; modules and parameters made since are forgotten."""
        for module, kind, attributes in self._modules:
            if type(module) is not kind:
                module.__class__ = kind
            vars(module).clear()
            vars(module).update(attributes)
        for holder, training in self._modes:
            holder.training = training
        for value, content in self._contents:
            value.clear()
            value.extend(content) if isinstance(value, list) else value.update(content)
        self.grads.restore()


def all_or_nothing(host: object, step: Callable[[Mapping[str, Snapshot]], T]) -> T:
    """Returns what the step returns; when it raises, the modules of the host are as before.

    The step is given the snapshots of the components.

    A function, because a `with` block has a moment between its last line and its exit in which an
    interrupt passes by the exit.
    """
    snapshots = {name: Snapshot(part) for name, part in parts_of(host).items()}
    try:
        return step(snapshots)
    except BaseException:
        for snapshot in snapshots.values():
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
