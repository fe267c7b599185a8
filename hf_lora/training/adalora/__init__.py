"""AdaLoRA under any Trainer: ranks are allocated, and evaluation is of the task alone.

peft's injection in place throws away the model class that adds AdaLoRA's orthogonal penalty and
holds its allocator; under a plain `Trainer` nobody calls the allocator even where it exists; and
peft adds the penalty to the loss of evaluations too. Source: arXiv 2303.10512; peft 0.21.2.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import AdaLoraConfig, PeftModel
from peft.tuners.adalora.layer import AdaLoraLayer, RankAllocator
from torch import Tensor, nn
from transformers.utils import logging

from hf_lora.errors import BadCheckpoint, TrainingError, listing
from hf_lora.formats import write_adapter
from hf_lora.hosts import active_names, model_of, peft_configs
from hf_lora.training.adalora.export import plain_lora
from hf_lora.training.adalora.state import (
    AVERAGES,
    STEP,
    check_schedule,
    compare_schedule,
    read_averages,
    read_pattern,
    schedule_of,
)

__all__ = ["Allocator", "allocator_of", "plain_lora"]

logger = logging.get_logger(__name__)

_FACTORS = ("lora_A", "lora_B", "lora_E")  # in peft's order, which its sums follow


def allocator_of(host: object, total_steps: int) -> Allocator | None:
    """Returns what lets a run's AdaLoRA adapter allocate ranks; None where no AdaLoRA is trained.

    Args:
        host: The model or `PeftModel` that is trained, wrapped or not.
        total_steps: Optimizer steps of the whole run. The config's `total_step`, which peft wants
            before the run is known, is set to it.

    Raises:
        TrainingError: The schedule leaves no step for allocating, its numbers cannot be, or several
            AdaLoRA adapters are active.
    """
    configs = peft_configs(model_of(host))
    names = [
        name
        for name in active_names(model_of(host))
        if isinstance(configs[name], AdaLoraConfig) and not configs[name].inference_mode
    ]
    if not names:
        return None
    if len(names) > 1:
        raise TrainingError(
            f"{len(names)} AdaLoRA adapters are active, {listing(names)}, and ranks are allocated "
            "for one",
            fix=f"Choose one: set_adapters(model, {names[0]!r}).",
        )
    return Allocator(host, names[0], total_steps)


class Allocator:
    """Drives AdaLoRA of one run: peft's own allocator, called at the right steps.

    A loop does what `LoraCallback` does under a Trainer::

        allocator.begin()
        for step in range(1, total + 1):
            model(**batch).loss.backward()
            optimizer.step()
            allocator.step(step)
            optimizer.zero_grad()
        allocator.end()

    Make it with `allocator_of`.

    Attributes:
        notes: What a user should know: a `total_step` that was corrected, a run that ended early.
        rank_pattern: Name of each E -> which of its ranks are kept, as peft writes it; None until
            ranks are allocated. It goes into a `PeftModel`'s config at the end only: with it
            there, peft saves fewer rows than a run needs to go on, and in place transformers' save
            fails.
    """

    def __init__(self, host: object, name: str, total_steps: int) -> None:
        self._host, self._name = host, name
        model = model_of(host)
        self._config = _config_of(model, name)
        check_schedule(self._config, total_steps)
        self.notes: list[str] = []
        if self._config.total_step != total_steps:
            self.notes.append(
                f"AdaLoRA's total_step is {self._config.total_step} in the config of {name!r}, the "
                f"run has {total_steps} steps: ranks are allocated over these"
            )
            self._config.total_step = total_steps
        self._factors = _Factors(model, name)
        allocator: Any = RankAllocator  # peft does not type it
        self._ranks = allocator(self._factors, self._config, name)
        self._tuner = _tuner_of(host)
        if self._tuner is not None and self._tuner.trainable_adapter_name == name:
            self._tuner.rankallocator = self._ranks
        self.rank_pattern: dict[str, list[bool]] | None = None
        self._idle = self._ranks.init_bgt <= self._ranks.target_bgt
        if self._idle:
            self.notes.append(
                f"adapter {name!r} has {self._ranks.init_bgt} ranks and its budget is "
                f"{self._ranks.target_bgt}: there is nothing to allocate"
            )
        else:
            self._config.rank_pattern = None  # of an earlier run, or {}, which peft takes for one
        self._step = 0
        self._weight = float(self._config.orth_reg_weight)
        self._muted = self._weight
        self._reached = False
        self._hooks: list[Any] = []

    # --- the run ----------------------------------------------------------------------------

    def begin(self) -> None:
        """Adds the orthogonal penalty to the loss of training, and of nothing else."""
        if self._hooks:
            return
        for note in self.notes:
            logger.warning(note)
        for module in (model_of(self._host), self._tuner):
            _drop_stale(module)
        # peft's model class runs the model's forward directly, past hooks on the model; and a
        # PeftModel without a task runs the model past peft's class, which adds no penalty then
        self._hooks = [model_of(self._host).register_forward_hook(self._after)]
        if self._tuner is not None:
            self._hooks += [
                self._tuner.register_forward_pre_hook(self._mute),
                self._tuner.register_forward_hook(self._unmute, always_call=True),
            ]

    def end(self) -> None:
        """Takes the penalty off, and gives a `PeftModel`'s config the ranks that are left."""
        self._leave()
        last = self._config.total_step - self._config.tfinal
        if not self._idle and self._step < last:
            self.notes.append(
                f"the run ended after {self._step} of {self._config.total_step} steps, with "
                f"{sum(self.ranks.values())} ranks alive and a budget of {self._ranks.target_bgt}"
            )
            logger.warning(self.notes[-1])
        # of the weights as they are: after an early end, or where the best ones of a run were put
        # back, other ranks may be alive than were chosen last
        alive = {name: (e.detach() != 0).flatten().tolist() for name, e in self._singular()}
        if self._tuner is not None and not all(kept for row in alive.values() for kept in row):
            self._config.rank_pattern = alive

    def _leave(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def step(self, step: int, *, dropped: bool = False) -> None:
        """Updates importances and drops ranks; call after `optimizer.step()`, gradients kept.

        Args:
            step: Optimizer steps taken so far, this one included: 1 after the first, in a
                `TrainerCallback.on_optimizer_step` that is `state.global_step + 1`. The paper's
                algorithm counts so; with it the last step masks to the budget. (peft's example
                counts from 0, one step behind.)
            dropped: Whether the step was left out, its gradients dropped: it says nothing of
                importances, and ranks go all the same, so that the schedule holds.

        Raises:
            TrainingError: No factor has a gradient, or the penalty never reached one since the last
                call, so that the loss that is trained is not the one with the penalty in it.
        """
        if not dropped:
            self._check_gradients(step)
        self._step, self._reached = step, False
        if self._idle:
            return
        ranks, last = self._ranks, self._config.total_step - self._config.tfinal
        if step > last:
            if self.rank_pattern is None:
                raise TrainingError(
                    f"no ranks were chosen before step {step}, after {last} of them"
                )
            ranks.mask_using_rank_pattern(self._factors, self.rank_pattern)
            return
        if step < last and not dropped:
            self._update()
        budget, due = ranks.budget_schedule(step)
        if (due or step == last) and ranks.exp_avg_ipt:
            self.rank_pattern = ranks.mask_to_budget(self._factors, budget)
        if step == last:
            ranks.reset_ipt()

    def _update(self) -> None:
        """Updates importances; a step whose gradients overflowed, as in fp16, says nothing."""
        grads = [p.grad for _, p in self._factors.named_parameters() if p.grad is not None]
        if bool(torch.isfinite(torch.nn.utils.get_total_norm(grads))):
            with self._factors.without_gaps():
                self._ranks.update_ipt(self._factors)

    def _check_gradients(self, step: int) -> None:
        if all(p.grad is None for _, p in self._factors.named_parameters()):
            raise TrainingError(
                f"no factor of adapter {self._name!r} has a gradient at step {step}",
                fix="Call Allocator.step after optimizer.step() and before zero_grad().",
            )
        if self._hooks and self._weight and not self._reached:
            raise TrainingError(
                "AdaLoRA's orthogonal penalty did not reach the gradients: the loss that is "
                "trained is not the model's own (label smoothing, compute_loss_func, a trainer "
                "that computes it from logits), or the model is not in training mode",
                fix="Train on the model's own loss, or without the penalty: orth_reg_weight=0 in "
                "the AdaLoraConfig.",
                field="orth_reg_weight",
            )

    # --- the penalty ------------------------------------------------------------------------

    def penalty(self) -> Tensor:
        """Returns the penalty, weighted: the mean Frobenius norm of A A^T - I and B^T B - I.

        Sums, order and weight as in peft's `AdaLoraModel.forward`, but never in half precision.
        """
        total: Any = 0
        count = 0
        for name, p in self._factors.named_parameters():
            if ".lora_E." in name:
                continue
            with torch.autocast(p.device.type, enabled=False):
                wide = p.to(torch.promote_types(p.dtype, torch.float32))
                product = wide @ wide.T if ".lora_A." in name else wide.T @ wide
                unit = torch.eye(len(product), dtype=product.dtype, device=product.device)
                norm = torch.linalg.matrix_norm(product - unit)
            total = total + (norm if isinstance(total, int) else norm.to(total.device))
            count += 1
        return self._weight * (total / count)  # type: ignore[no-any-return]

    def _mute(self, *_: Any) -> None:
        config = _own_config(self._tuner)
        # peft adds its own in evaluations as well
        self._muted, config.orth_reg_weight = config.orth_reg_weight, 0.0

    def _unmute(self, module: nn.Module, arguments: Any, outputs: Any) -> Any:
        _own_config(self._tuner).orth_reg_weight = self._muted
        return self._after(module, arguments, outputs)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _after(self, module: nn.Module, _: Any, outputs: Any) -> Any:
        if outputs is None or not (self._weight and module.training and torch.is_grad_enabled()):
            return None  # outputs are None where the forward has failed
        if self._factors.gone:  # detached after a run that never ended
            self._leave()
            return None
        return _with_loss(outputs, self._added)

    def _added(self, loss: Tensor) -> Tensor:
        penalty = self.penalty()
        if penalty.requires_grad:
            penalty.register_hook(self._mark)  # type: ignore[no-untyped-call]
        return (loss + penalty.to(loss.device)).to(loss.dtype)

    def _mark(self, _: Tensor) -> None:
        self._reached = True

    # --- what there is, and what is kept ------------------------------------------------------

    @property
    def ranks(self) -> dict[str, int]:
        """Path of each layer -> its ranks whose singular value is not zero.

        Between two allocations (`deltaT` above 1) ranks that were dropped may come alive again.
        """
        return {
            name.rpartition(".lora_E.")[0]: int(e.detach().count_nonzero())
            for name, e in self._singular()
        }

    def _singular(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((n, p) for n, p in self._factors.named_parameters() if ".lora_E." in n)

    def export(self, folder: str | os.PathLike[str]) -> Path:
        """Saves what the adapter is now as a plain LoRA; see `plain_lora`."""
        return write_adapter(plain_lora(self._host, self._name), folder)

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Returns what a resumed run needs, to the bit: tensors, and plain data for JSON."""
        tensors = {STEP: torch.tensor(self._step)}
        for kind in AVERAGES:
            held: Mapping[str, Tensor] = getattr(self._ranks, kind)
            tensors |= {f"{kind}.{name}": tensor for name, tensor in held.items()}
        return tensors, {"schedule": schedule_of(self._config), "rank_pattern": self.rank_pattern}

    def load_state_dict(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Takes back what `state_dict` returned.

        Raises:
            BadCheckpoint: It is of another adapter or schedule, or damaged. Nothing is changed.
        """
        here = dict(self._factors.named_parameters())
        step, averages = read_averages(tensors, here)
        pattern = read_pattern(state.get("rank_pattern"), here)
        note = compare_schedule(state.get("schedule"), schedule_of(self._config))
        if step >= self._config.total_step - self._config.tfinal and not self._idle and not pattern:
            raise BadCheckpoint(f"AdaLoRA's state is of step {step} and names no ranks")
        if note:
            self.notes.append(note)
            logger.warning(note)
        self._step, self.rank_pattern = step, pattern
        self._ranks.reset_ipt()
        for kind, held in averages.items():
            getattr(self._ranks, kind).update(held)
        self._ranks.ipt = {name: torch.zeros_like(here[name]) for name in averages[AVERAGES[0]]}


class _Factors:
    """All that peft's allocator sees of a model: one adapter's factors, by their full names.

    peft looks for the adapter's name anywhere in a parameter's, and so finds those of others.
    """

    def __init__(self, model: nn.Module, name: str) -> None:
        self._places = [
            (f"{path}.{kind}.{name}", getattr(module, kind))
            for path, module in model.named_modules()
            if isinstance(module, AdaLoraLayer) and name in module.lora_A
            for kind in _FACTORS
        ]
        self._key = name

    @property
    def gone(self) -> bool:
        """Whether the adapter has been taken off the model."""
        return any(self._key not in held for _, held in self._places)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yields (name, parameter), looked up anew: loads put new parameters in."""
        for name, held in self._places:
            yield name, held[self._key]

    @contextmanager
    def without_gaps(self) -> Iterator[None]:
        """Gives factors of modules that the forward did not use a gradient of zero."""
        empty = [p for _, p in self.named_parameters() if p.grad is None]
        try:
            for parameter in empty:
                parameter.grad = torch.zeros_like(parameter)
            yield
        finally:
            for parameter in empty:
                parameter.grad = None


def _drop_stale(module: Any) -> None:
    """Takes off the hooks of a run that failed before its end: two would add two penalties."""
    for hook in list(module._forward_hooks.values()) if module is not None else ():
        owner = getattr(hook, "__self__", None)
        if isinstance(owner, Allocator):
            owner._leave()


def _config_of(model: nn.Module, name: str) -> Any:
    return peft_configs(model)[name]


def _tuner_of(host: Any) -> Any:
    """Returns peft's own model class where the host has one that knows a trained AdaLoRA."""
    while not isinstance(host, PeftModel) and isinstance(getattr(host, "module", None), nn.Module):
        host = host.module
    tuner = host.base_model if isinstance(host, PeftModel) else None
    return tuner if hasattr(tuner, "rankallocator") else None


def _own_config(tuner: Any) -> Any:
    return tuner.peft_config[tuner.trainable_adapter_name]


def _with_loss(outputs: Any, change: Any) -> Any:
    """Returns a model's outputs with its loss changed, in each form that models return."""
    if isinstance(outputs, dict):
        if isinstance(outputs.get("loss"), Tensor):
            outputs["loss"] = change(outputs["loss"])
    elif isinstance(outputs, tuple):
        # transformers' tuples begin with the loss when labels were given
        if outputs and isinstance(outputs[0], Tensor) and not outputs[0].ndim:
            return (change(outputs[0]), *outputs[1:])
    elif isinstance(getattr(outputs, "loss", None), Tensor):
        outputs.loss = change(outputs.loss)
    return outputs
