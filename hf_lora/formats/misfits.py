"""What is wrong with a foreign file that does not fit, in words: for another host, or not read.

The errors say how much of the file has no place, an example, and what would help.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from hf_lora.adapter import MODEL
from hf_lora.errors import AdapterMismatch, BadAdapterFile, LoraError, closest, listing
from hf_lora.formats.grammar import ANY, DENOISER, Group, is_never, part_of
from hf_lora.formats.kinds import REFUSED, Loose, refusal

Lost = tuple[Group, str]  # a module of the file that leads nowhere: its group and its name

_LEFT_OUT = "pass strict=False to leave them out"
_FACTORS = frozenset(name for row in REFUSED for name in row.marks)
_PAIR = frozenset({"lora_A", "lora_B"})


@dataclass(frozen=True)
class Unread:
    """Keys that are known by name and hold no factor of a module.

    Attributes:
        pattern: What the whole key looks like.
        name: What they are.
        fix: What to do.
    """

    pattern: re.Pattern[str]
    name: str
    fix: str


_BY_DIFFUSERS = "diffusers reads it: pipe.load_lora_weights(file)"

# Sources: diffusers 0.42.1 `loaders/lora_conversion_utils.py`, OneTrainer, Stability AI.
UNREAD = tuple(
    Unread(re.compile(pattern), name, fix)
    for pattern, name, fix in (
        (
            r"(?:diffusion_model\.)?(?:double|single)_blocks\.\d+\.processor\..+",
            "XLabs' attention processors for Flux",
            'diffusers reads it: pipe.load_lora_weights(file, adapter_name="style"); '
            'save_lora(pipe, path, name="style") then writes what is read here.',
        ),
        (
            r".+\.norm\.(?:query|key)_norm\.scale",
            "a control LoRA of Black Forest Labs, which replaces norms and widens the input",
            f"{_BY_DIFFUSERS} of a FluxControlPipeline.",
        ),
        (
            r"lora_controlnet",
            "a control-LoRA of Stability AI, which makes a ControlNet of the UNet",
            f"{_BY_DIFFUSERS} of a ControlNet pipeline.",
        ),
        (
            r"bundle_emb\..+",
            "embeddings that OneTrainer puts beside the LoRA",
            "Pass strict=False to leave them out; prompts that use them need them.",
        ),
        (
            r"(?:first_stage_model|cond_stage_model|conditioner|model\.diffusion_model|vae)\..+",
            "weights of a whole model",
            "This is a checkpoint, not a LoRA: open it with from_single_file of the pipeline.",
        ),
    )
)


def no_factors(strange: Sequence[str]) -> BadAdapterFile:
    """Returns the error for a file without any factor; `strange` are its keys."""
    if not strange:
        return BadAdapterFile("the file holds no tensors")
    row = _unread(strange)
    if row is not None:
        return _named(row, strange, len(strange))
    return BadAdapterFile(
        f"no factor of an adapter is among its {len(strange)} keys: {_shown(strange)}",
        fix="This is no LoRA, or of a kind that is not known here.",
        field=strange[0][:200],
    )


def strange_keys(strange: Sequence[str], groups: Sequence[Group]) -> BadAdapterFile:
    """Returns the error for keys of no factor beside others."""
    total = len(strange) + sum(len(x.keys) for group in groups for x in group.layers.values())
    row = _unread(strange)
    if row is not None:
        return _named(row, strange, total)
    verb = "is no factor" if len(strange) == 1 else "are no factors"
    return BadAdapterFile(
        f"{len(strange)} of its {total} keys {verb} known here: {_shown(strange)}",
        fix=f"{_LEFT_OUT.capitalize()}.",
        field=strange[0][:200],
    )


def _named(row: Unread, strange: Sequence[str], total: int) -> BadAdapterFile:
    keys = [key for key in strange if row.pattern.fullmatch(key)]
    return BadAdapterFile(
        f"the file holds {row.name} ({len(keys)} of its {total} keys, for instance "
        f"{keys[0][:200]})",
        fix=row.fix,
        field=keys[0][:200],
    )


def _unread(keys: Sequence[str]) -> Unread | None:
    return next((row for row in UNREAD if any(row.pattern.fullmatch(key) for key in keys)), None)


def _shown(keys: Sequence[str]) -> str:
    return listing((key[:200] for key in keys), limit=3)


def without_refused(groups: Sequence[Group]) -> tuple[list[Group], list[str]]:
    """Returns the groups without layers of kinds that are not read, and the keys of these.

    Of a layer that is a LoRA with something beside it the LoRA stays.
    """
    kept: list[Group] = []
    keys: list[str] = []
    for group in groups:
        layers: dict[str, Loose] = {}
        for name, loose in group.layers.items():
            own, refused = split_refused(loose)
            if own is not None:
                layers[name] = own
            keys += () if refused is None else refused.keys
        if layers:
            kept.append(Group(group.start, layers))
    return kept, keys


def split_refused(loose: Loose) -> tuple[Loose | None, Loose | None]:
    """Returns what of a layer is read, and what is of a kind that is not; None for nothing."""
    if not _FACTORS & loose.factors.keys():
        return loose, None
    if not loose.factors.keys() - _FACTORS >= _PAIR:
        return None, loose
    halves = []
    for refused in (False, True):
        held = {n: key for n, key in zip(loose.factors, loose.keys, strict=True)
                if (n in _FACTORS) is refused}  # fmt: skip
        halves.append(Loose({n: loose.factors[n] for n in held}, tuple(held.values())))
    return halves[0], halves[1]


def misfit(
    groups: Sequence[Group],
    lost: Sequence[Lost],
    kinds: Mapping[str, str],
    known: Callable[[Group], Iterable[str]],
) -> LoraError:
    """Returns the error for modules that lead nowhere on a host.

    Args:
        groups: All modules of the file.
        lost: Those that lead nowhere.
        kinds: Component of the host -> its class.
        known: Returns how the file would have spelt the modules that the host has for a group.
    """
    group, name = lost[0]
    loose = group.layers[name]
    what = refusal(loose.factors)
    if what:
        return BadAdapterFile(
            f"{name} is {what} (in the file: {loose.keys[0][:200]})",
            fix=f"Merge it into the base with the program that made it, or {_LEFT_OUT}.",
            field=loose.keys[0][:200],
        )
    absent = [x for x in lost if _is_absent(x[0], groups, lost, kinds)]
    total = sum(len(g.layers) for g in groups)
    if len(absent) == len(lost):
        return _without_component(absent, total, kinds)
    group, name = next(x for x in lost if x not in absent)
    here = [n for g, n in lost if g is group]
    example = f"{group.start.text}{name}"
    field = group.layers[name].keys[0][:200]
    if 2 * len(here) > len(group.layers):
        all_of = len(here) == len(group.layers)
        count = f"all of its {len(here)}" if all_of else f"{len(here)} of its {len(group.layers)}"
        return AdapterMismatch(
            f"the file is for another architecture: {count} modules {_that_begin(group)}are none "
            f"of {_classes(group, kinds)}, for instance {example}",
            fix="Load it into the pipeline that it was made for.",
            field=field,
        )
    verb = "has" if len(here) == 1 else "have"
    return AdapterMismatch(
        f"{len(here)} of its {len(group.layers)} modules {_that_begin(group)}{verb} no place in "
        f"{_classes(group, kinds)}: {listing((f'{group.start.text}{n}' for n in here), limit=3)}. "
        f"Closest to the first: {', '.join(closest(example, known(group)))}",
        fix=f"Load it into the pipeline that it was made for, or {_LEFT_OUT}.",
        field=field,
    )


def _is_absent(
    group: Group, groups: Sequence[Group], lost: Sequence[Lost], kinds: Mapping[str, str]
) -> bool:
    """Tells whether a group is of a component that the host does not have."""
    components = group.start.components
    if components == ANY or sum(g is group for g, _ in lost) < len(group.layers):
        return False
    if MODEL in kinds:
        # it is another one's
        return is_never(group.start, kinds[MODEL]) or len(lost) < sum(len(g.layers) for g in groups)
    return not {*(components if components == DENOISER else components[:1])} & {*kinds}


def _without_component(
    absent: Sequence[Lost], total: int, kinds: Mapping[str, str]
) -> AdapterMismatch:
    groups = list({group.start.text: group for group, _ in absent}.values())
    names = listing(dict.fromkeys(part_of(group.start) for group in groups))
    has = f"is a single {kinds[MODEL]}" if MODEL in kinds else f"has {listing(kinds)}"
    whole = len(absent) == total
    return AdapterMismatch(
        f"{len(absent)} of its {_modules(total)} are of {names}, and the host {has}",
        fix="Load it into a pipeline that has it." if whole
        else f"Load it into the pipeline that has it, or {_LEFT_OUT}.",
        field=groups[0].layers[absent[0][1]].keys[0][:200],
    )  # fmt: skip


def _that_begin(group: Group) -> str:
    return f"that begin with {group.start.text} " if group.start.text else ""


def _classes(group: Group, kinds: Mapping[str, str]) -> str:
    """Returns the classes of the components that a group may be of."""
    anywhere = MODEL in kinds or group.start.components == ANY
    own = [kinds[n] for n in kinds if anywhere or n in group.start.components]
    return listing(dict.fromkeys(own))


def _modules(count: int) -> str:
    return f"{count} module{'' if count == 1 else 's'}"
