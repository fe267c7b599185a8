"""host <-> Adapter: strict, all or nothing, and never silent about what was applied."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from peft.tuners.lora import LoraLayer
from torch import nn

from hf_lora.adapter import MODEL, Adapter, Component, check_component
from hf_lora.configs import heads_of
from hf_lora.errors import AdapterMismatch, InvalidOption, LoraError, listing
from hf_lora.families import family_of, role_in
from hf_lora.fetch import local_files
from hf_lora.fit import drop_base_copies, expression_of, fitted_config, match_targets, split_heads
from hf_lora.formats import open_adapter, save_adapter
from hf_lora.hosts import (
    check_has_weights,
    check_known_name,
    check_new_name,
    model_of,
    nested,
    peft_configs,
    tuner_modules,
)
from hf_lora.inject import activate, check_targets, inject
from hf_lora.merge import check_unmerged
from hf_lora.record import flags_of, restore_flags, transaction
from hf_lora.slots import Slot, check_saveable, component_of, slots_of
from hf_lora.switch import strengths
from hf_lora.targets import UNKNOWN


@dataclass(frozen=True)
class LoadReport:
    """What a load did; `print(report)` shows it.

    Attributes:
        name: The adapter's name on the host.
        source: Where it came from.
        host: Class name of the model.
        roles: Role -> number of targets.
        parameters: Values loaded, heads included.
        heads: Modules that were loaded whole.
        skipped: Targets of the file that the host lacks; only with `strict=False`.
        dtype: Dtype of the factors on the host.
        scale: The run-time multiplier that was set.
        trainable: Whether the adapter can be trained on.
        base: Whether the base was verified, or why not.
        notes: What a reader should know besides.
    """

    name: str
    source: str
    host: str
    roles: Mapping[str, int]
    parameters: int
    heads: tuple[str, ...]
    skipped: tuple[str, ...]
    dtype: str
    scale: float
    trainable: bool
    base: str
    notes: tuple[str, ...]

    @property
    def targets(self) -> int:
        """Number of layers that got the adapter."""
        return sum(self.roles.values())

    def __str__(self) -> str:
        roles = ", ".join(f"{role} {count}" for role, count in self.roles.items())
        lines = [
            f"Loaded {self.name!r} from {self.source or 'memory'} into {self.host}: "
            f"{self.targets} targets, {self.parameters:,} parameters, {self.dtype}, "
            f"scale {self.scale:g}, {'trainable' if self.trainable else 'frozen'}",
            f"  by role: {roles}",
            f"  base: {self.base}",
        ]
        lines += [f"  trained whole: {head}" for head in self.heads]
        lines += [f"  skipped: {path}" for path in self.skipped]
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


def save_lora(host: object, path: str | os.PathLike[str], *, name: str = "default") -> Path:
    """Saves one adapter as a peft folder that plain peft and transformers load.

    Args:
        host: The host.
        path: The folder; it is made when missing, and its adapter files are replaced.
        name: Which adapter.

    Returns:
        The folder.

    Raises:
        AdapterNotFound: The host has no such adapter.
        MetaHost: The adapter has no weights.
        BadAdapterFile: It holds NaN or infinite values, or a kind that files cannot carry.
        InvalidOption: `path` is a file.
    """
    model = model_of(host)
    check_known_name(model, name)
    check_has_weights(model, "saved")
    config = peft_configs(model)[name]
    try:
        check_saveable(config)
        component = component_of(model, name)
        check_component(component)
    except LoraError as error:
        raise error.within(file=f"adapter {name!r}") from None
    return save_adapter(Adapter({MODEL: component}), path)


def load_lora(
    host: object,
    source: str | os.PathLike[str] | Adapter,
    *,
    name: str | None = None,
    file: str | None = None,
    scale: float = 1.0,
    revision: str | None = None,
    token: str | None = None,
    trainable: bool = False,
    strict: bool = True,
    extra_modules: bool = False,
) -> LoadReport:
    """Loads an adapter onto a model, in place, and makes it the active one.

    Every tensor of the file must have its place on the host and every target its tensors, in
    matching shapes; only tensors the load created are written. When anything fails the host is as
    it was, bit for bit. Training mode and requires_grad of the base stay as they are; adapters
    that were active before become inactive, and their factors frozen.

    Args:
        host: A model, as for `attach_lora`.
        source: A peft folder, a file in one, a Hub repository id, or an `Adapter`.
        name: Name of the adapter on the host; `"default"` when left out.
        file: Which folder below `source` holds the adapter.
        scale: Multiplies the adapter's own scaling at run time.
        revision: Branch, tag or commit of a repository.
        token: Access token for a repository; the logged-in one when left out.
        trainable: Go on training: the factors require gradients and the base is frozen.
        strict: With False, targets the host lacks are left out and listed in the report.
        extra_modules: Allow modules in the file that replace pretrained ones. Task heads of a
            classification class need no permission.

    Returns:
        What was applied.

    Raises:
        AdapterNotFound: There is no adapter at `source`.
        AdapterExists: The name is in use.
        BadAdapterFile: The file or config is broken, unsafe or not understood.
        AdapterMismatch: The adapter is for another architecture or size, or tensors are missing.
        LoraError: Another of its subclasses.
    """
    model = model_of(host)
    name = "default" if name is None else name
    check_new_name(model, name)
    check_has_weights(model, "loaded into")
    check_unmerged(model, "load another adapter")
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale):
        raise InvalidOption(f"scale={scale!r} is not a finite number", field="scale")
    adapter = _opened(source, file, revision, token)
    where = adapter.source or "adapter"
    try:
        if set(adapter.components) != {MODEL}:
            raise AdapterMismatch(
                f"the adapter is for a pipeline with {listing(adapter.components)}, not for a model"
            )
        component = adapter.components[MODEL]
        check_component(component)
        component = drop_base_copies(model, component)
        component, skipped = match_targets(model, component, strict=strict)
        split_heads(model, component, extra_modules=extra_modules)
        config = fitted_config(model, component)
        flags = flags_of(model)
        with transaction(host):
            inject(host, config, name, empty=True)
            check_targets(model, name, {_outer(p) for p in component.targets})
            _fill(model, component, name)
            _check_scaling(model, component, name)
            config.inference_mode = not trainable
            if not trainable:
                restore_flags(model, flags, modes=True)
            activate(host, (name,))
            if scale != 1.0:
                for layer, weight in strengths(model, name, scale):
                    layer.set_scale(name, weight)
            return _report(model, component, name, where, scale, trainable, skipped)
    except LoraError as error:
        raise error.within(file=where) from None


def _opened(
    source: str | os.PathLike[str] | Adapter,
    file: str | None,
    revision: str | None,
    token: str | None,
) -> Adapter:
    if isinstance(source, Adapter):
        return source
    return open_adapter(local_files(source, file=file, revision=revision, token=token))


def _outer(path: str) -> str:
    """Peft nests several parameters of one module as path.base_layer; the module is the target."""
    while path.endswith(".base_layer"):
        path = path.removesuffix(".base_layer")
    return path


def _fill(model: nn.Module, component: Component, name: str) -> None:
    """Puts every tensor of the file into its slot; both sides must match exactly."""
    slots: dict[str, Slot] = {f"{s.path}.{s.name}": s for s in slots_of(model, name)}
    tensors = dict(component.tensors())
    missing = [k for k in slots if k not in tensors]
    extra = [k for k in tensors if k not in slots]
    if missing or extra:
        raise AdapterMismatch(
            f"{len(missing)} tensors are missing ({listing(missing, limit=2) or 'none'}) and "
            f"{len(extra)} have no place ({listing(extra, limit=2) or 'none'}) on "
            f"{type(model).__name__}",
            fix="Save the adapter again whole, or load it into the architecture it was made for.",
        )
    for key, slot in slots.items():
        if slot.value.shape != tensors[key].shape:
            raise AdapterMismatch(
                f"the adapter is for another size: {key} is {tuple(tensors[key].shape)} in the "
                f"file, {tuple(slot.value.shape)} on {type(model).__name__}",
                fix=f"Load it into {component.config.get('base_model_name_or_path') or 'its base'}"
                ".",
                field=key,
            )
    for key, slot in slots.items():
        slot.put(tensors[key])


def _check_scaling(model: nn.Module, component: Component, name: str) -> None:
    """Checks that peft read rank and alpha as we did: the end of lost alphas."""
    if component.kind != "LORA":
        return
    for path, outer in tuner_modules(model):
        where = path
        for layer in nested(outer):
            if isinstance(layer, LoraLayer) and name in layer.scaling:
                wanted = component.scaling(where)
                if layer.scaling[name] != wanted and not component.config.get("target_parameters"):
                    raise AdapterMismatch(
                        f"scaling at {path} is {wanted} by the file and {layer.scaling[name]} "
                        "by peft",
                        field="alpha_pattern",
                    )
            where += ".base_layer"


def _report(
    model: nn.Module,
    component: Component,
    name: str,
    source: str,
    scale: float,
    trainable: bool,
    skipped: tuple[str, ...],
) -> LoadReport:
    family = family_of(model)
    roles = Counter(role_in(_outer(p), family) or UNKNOWN for p in component.targets)
    dtypes = sorted({str(s.value.dtype).removeprefix("torch.") for s in slots_of(model, name)})
    made_for = component.config.get("base_model_name_or_path")
    here = getattr(model, "name_or_path", None)
    notes = []
    if made_for and here and made_for != here:
        notes.append(f"the file names the base {made_for!r}, the host is {here!r}")
    field = expression_of(component)
    if field:
        notes.append(f"{field} is an expression, so it was not checked that no target is missing")
    headless = [head for head in heads_of(model) if head not in component.modules]
    if headless and not component.modules:
        notes.append(f"the file brings no {' and no '.join(headless)}: the host's own is used")
    above = [p for p in component.targets if _above_full_rank(component, p)]
    if above:
        notes.append(f"rank is above min(in, out) at {len(above)} targets")
    return LoadReport(
        name=name,
        source=source,
        host=type(model).__name__,
        roles=dict(roles),
        parameters=sum(t.numel() for _, t in component.tensors()),
        heads=tuple(component.modules),
        skipped=skipped,
        dtype=", ".join(dtypes),
        scale=float(scale),
        trainable=trainable,
        base="not verified: the file carries no fingerprint",
        notes=tuple(notes),
    )


def _above_full_rank(component: Component, path: str) -> bool:
    factors = component.targets[path]
    if "lora_A" not in factors or "lora_B" not in factors:
        return False
    a, b = factors["lora_A"], factors["lora_B"]
    return a.shape[0] > min(a[0].numel(), b.shape[0])
