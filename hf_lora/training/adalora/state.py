"""The numbers of an AdaLoRA schedule, and the state of one in a checkpoint: read and checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_lora.errors import BadCheckpoint, TrainingError, shown

AVERAGES = ("exp_avg_ipt", "exp_avg_unc")  # peft's third, `ipt`, is made anew by every step
STEP = "step"

# field of the config -> the least value it may have
_LEAST = {"init_r": 1, "target_r": 1, "tinit": 0, "tfinal": 0, "deltaT": 1}


def schedule_of(config: Any) -> dict[str, Any]:
    """Returns the fields of an AdaLoraConfig that say when which ranks go."""
    names = (*_LEAST, "beta1", "beta2", "total_step")
    return {name: getattr(config, name) for name in names}


def check_schedule(config: Any, total: object) -> None:
    """Checks that a run of `total` steps can follow the schedule.

    Raises:
        TrainingError: A number is out of range, or no step is left to allocate in.
    """
    if not isinstance(total, int) or isinstance(total, bool) or total < 1:
        raise TrainingError(f"total_steps={shown(total)} is no positive whole number")
    for name, least in _LEAST.items():
        value = getattr(config, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise TrainingError(
                f"{name}={shown(value)} of the AdaLoraConfig is no whole number from {least}",
                field=name,
            )
    for name in ("beta1", "beta2"):
        value = getattr(config, name)
        if not isinstance(value, float) or not 0 < value < 1:
            raise TrainingError(
                f"{name}={shown(value)} of the AdaLoraConfig is not between 0 and 1", field=name
            )
    if config.target_r > config.init_r:
        raise TrainingError(
            f"target_r is {config.target_r}, above init_r {config.init_r}: AdaLoRA begins with all "
            "ranks and drops some",
            fix="Set init_r to about 1.5 times target_r.",
            field="target_r",
        )
    last = total - config.tfinal
    if config.tinit >= last or (last < 2 and config.target_r < config.init_r):
        raise TrainingError(
            f"of {total} steps AdaLoRA would warm up for tinit={config.tinit} and end with "
            f"tfinal={config.tfinal} at the final ranks, which leaves none to allocate in",
            fix="Lower tinit and tfinal in the AdaLoraConfig, or train longer.",
            field="tinit",
        )


def compare_schedule(saved: Any, here: Mapping[str, Any]) -> str:
    """Compares the schedule of a checkpoint with the run's; returns what a user should know.

    Raises:
        BadCheckpoint: More than the number of steps differs.
    """
    if not isinstance(saved, Mapping) or saved.keys() != here.keys():
        raise BadCheckpoint(f"AdaLoRA's state names no schedule: {shown(saved)}")
    odd = [name for name in here if saved[name] != here[name]]
    if odd == ["total_step"]:
        return (
            f"AdaLoRA was planned for {saved['total_step']} steps when the checkpoint was saved, "
            f"and is now for {here['total_step']}: its ranks are not those of one run"
        )
    if odd:
        raise BadCheckpoint(
            f"AdaLoRA's state is of another schedule: {odd[0]} is {shown(saved[odd[0]])} there "
            f"and {here[odd[0]]} in this run",
            fix="Attach with the same AdaLoraConfig as that run.",
            field=odd[0],
        )
    return ""


def read_averages(
    tensors: Mapping[str, Tensor], here: Mapping[str, nn.Parameter]
) -> tuple[int, dict[str, dict[str, Tensor]]]:
    """Returns the step and the averages by kind and name, on the factors' devices.

    Args:
        tensors: The tensors of a state.
        here: The run's factors by name.

    Raises:
        BadCheckpoint: They are of another adapter, or damaged.
    """
    held = dict(tensors)
    step = held.pop(STEP, None)
    if step is None or step.numel() != 1 or step.is_floating_point():
        raise BadCheckpoint("AdaLoRA's state holds no step")
    expected = {f"{kind}.{name}" for kind in AVERAGES for name in here}
    if held and held.keys() != expected:
        odd = sorted(held.keys() ^ expected)
        raise BadCheckpoint(
            f"AdaLoRA's state is of another adapter: {len(odd)} of its tensors and ours have no "
            f"match, for instance {odd[0]}",
            fix="Attach with the same arguments, and name, as that run.",
        )
    averages: dict[str, dict[str, Tensor]] = {kind: {} for kind in AVERAGES}
    for key, tensor in held.items():
        kind, _, name = key.partition(".")
        if tensor.shape != here[name].shape or not bool(torch.isfinite(tensor).all()):
            raise BadCheckpoint(
                f"AdaLoRA's state is damaged or of another size: {key} is {tuple(tensor.shape)}, "
                f"and {tuple(here[name].shape)} finite values are needed",
                field=key,
            )
        averages[kind][name] = tensor.to(here[name], copy=True)
    return int(step), averages


def read_pattern(pattern: Any, here: Mapping[str, nn.Parameter]) -> dict[str, list[bool]] | None:
    """Returns the kept ranks of a state, None where none were chosen yet.

    Raises:
        BadCheckpoint: They are not those of the run's factors.
    """
    if pattern is None:
        return None
    sizes = {name: len(p) for name, p in here.items() if ".lora_E." in name}
    fits = isinstance(pattern, Mapping) and pattern.keys() == sizes.keys()
    if not fits or not all(
        isinstance(kept, list) and len(kept) == sizes[name] and set(kept) <= {True, False}
        for name, kept in pattern.items()
    ):
        raise BadCheckpoint(
            "AdaLoRA's state is of another adapter: its rank_pattern does not name our ranks",
            field="rank_pattern",
        )
    return {name: list(kept) for name, kept in pattern.items()}
