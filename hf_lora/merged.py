"""Whether adapters are merged into the weights of a model, by whom, and what that forbids."""

from __future__ import annotations

from torch import nn

from hf_lora.errors import InvalidOption, MergeError
from hf_lora.hosts import adapter_names, of_diffusers
from hf_lora.layers.fold import is_merged
from hf_lora.record import is_switched_off, record_of


def check_unmerged(model: nn.Module, doing: str) -> None:
    """Checks that adapters can be changed.

    Raises:
        InvalidOption: Inside a `base_model` block, whose end would undo the change in part.
        MergeError: Adapters are merged into the weights.
    """
    if is_switched_off(model):
        raise InvalidOption(
            f"inside base_model the adapters of {type(model).__name__} are off, so one cannot "
            f"{doing}",
            fix="Do it after the block.",
        )
    record = record_of(model)
    gone = not adapter_names(model) and not is_merged(model)
    # without a copy or a layer left, the weights are simply those of the model
    if not (record.merged_names or is_merged(model)) or (gone and record.merged is None):
        return
    fix = way_back(model)
    if gone:
        fix = (
            "The layers are gone, the merged weights are not: unmerge_lora(host) restores those of "
            "before. To go on from the merged ones, save the model and load it."
        )
    raise MergeError(
        f"adapters are merged into the weights of {type(model).__name__}, so one cannot {doing}",
        fix=fix,
    )


def check_by_others(model: nn.Module, doing: str) -> None:
    """As `check_unmerged`, for calls of diffusers: what it has fused itself is its own business."""
    ours = set(record_of(model).merged_names) & set(adapter_names(model))
    if ours or is_switched_off(model):
        check_unmerged(model, doing)


def is_ours(model: nn.Module) -> bool:
    """Tells whether `merge_lora` has merged adapters of the model, or looked at it for a merge."""
    return record_of(model).before_merge is not None


def way_back(model: nn.Module) -> str:
    """Returns what to call to have merged adapters out of the weights of a model."""
    if is_ours(model):
        return "Call unmerge_lora(host) first, or reload the base where no copy was kept."
    if of_diffusers(model):
        return "diffusers or peft has merged them: call unfuse_lora() of the pipeline first."
    return (
        "peft or diffusers has merged them: call unmerge_adapter() of the PeftModel, or "
        "unfuse_lora() of the pipeline, first."
    )
