"""`LoraCallback`: what any `Trainer` lacks when it trains an adapter.

It checks at the start that the optimizer holds the adapter, watches gradients and losses, adds the
adapter's figures to Trainer's log, makes checkpoints whole, and writes a report at the end.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.utils import logging

from hf_lora.errors import TrainingError
from hf_lora.merge import check_unmerged
from hf_lora.slots import parameters_in
from hf_lora.training import summary
from hf_lora.training.adalora import Allocator, allocator_of
from hf_lora.training.batches import check_rows
from hf_lora.training.coverage import check_coverage
from hf_lora.training.guards import (
    KEPT_EVERY,
    Lifeline,
    Memory,
    NonFinite,
    Overfitting,
    Spike,
    check_choices,
)
from hf_lora.training.keep import (
    checkpoint_folder,
    finish_checkpoint,
    keep_state,
    remember,
    run_facts,
    state_of_run,
)
from hf_lora.training.measure import Meter
from hf_lora.training.processes import check_processes, spread_noise
from hf_lora.training.pushing import Pusher, checked
from hf_lora.training.restore import Trained, facts_of, trained_adapter
from hf_lora.training.samples import Prompt, Samples
from hf_lora.training.sharding import check_shardable, gathered

logger = logging.get_logger(__name__)

_BACKS = 5  # times in a row that a run goes back before it is given up
_SCALER_STEPS = 25  # steps an fp16 loss scale may take to come down to where gradients are finite


class LoraCallback(TrainerCallback, ExportableState):
    """Makes a run with an adapter safe and seen; for any `Trainer`, part of `LoraTrainer`.

    At the start it is an error when the optimizer misses parameters of the adapter (it was built
    before attaching), or when parameters of the base would be trained. AdaLoRA ranks are allocated
    on the right steps. Checkpoints hold the adapter as an ordinary folder that `load_lora` reads,
    and a plain `Trainer` resumes from them too: `resume_from_checkpoint=path`. At the end
    `report.json`, and pictures, are in the output folder.

    Args:
        name: The adapter; None for the one that is active.
        figures: Add `adapter_norm`, `adapter_effective_rank` and `grad_norm/ROLE` to the log.
        non_finite: When a gradient is no number: `"stop"` with an error before the optimizer steps,
            or go `"back"` to the last good weights and halve the rate. Good are those of the last
            sound loss that was logged, of the last save, or of the last hundredth step.
        spike: When a logged loss is above three times the median of the last 20: `"warn"`, `"stop"`
            the run, go `"back"` and halve the rate, or `"ignore"`. With `"back"` the hundredth
            steps do not count where losses are logged: one of them may lie within the spike.
        overfitting: When the held-out loss has risen `patience` evaluations in a row while the
            training loss fell: `"warn"`, `"stop"` the run, or `"ignore"`.
        patience: Evaluations that count as overfitting.
        samples: Prompts that are answered, or drawn by a pipeline, at each evaluation; where a run
            has none at each save and at the end. Each is a text, the messages of a chat, or for a
            pipeline `{"prompt": text, "seed": 3, ...}` with options of its call.
        sample_tokens: The longest answer, in tokens.
        report: Write `report.json` at the end.
        pictures: Draw PNG pictures beside it; None where matplotlib is installed.
        processes: How many processes there must be; None for as many as launcher, arguments and
            environment say, which is checked in any case.
        push_to: A repository of the Hub. Checkpoints are pushed to it in the background, and at
            the end the adapter, which is waited for. A push that fails is a warning.

    Raises:
        InvalidOption: An argument has a value that cannot work.
        MissingExtra: `pictures=True` without matplotlib.
    """

    def __init__(
        self,
        *,
        name: str | None = None,
        figures: bool = True,
        non_finite: NonFinite = "stop",
        spike: Spike = "warn",
        overfitting: Overfitting = "warn",
        patience: int = 3,
        samples: Sequence[Prompt] = (),
        sample_tokens: int = 48,
        report: bool = True,
        pictures: bool | None = None,
        processes: int | None = None,
        push_to: str | None = None,
    ) -> None:
        arguments = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        check_choices(
            {"non_finite": non_finite, "spike": spike, "overfitting": overfitting},
            {"patience": patience, "sample_tokens": sample_tokens},
        )
        if pictures:
            summary.check_can_draw()
        self.name = name
        self._samples = Samples(samples, sample_tokens)
        self._arguments = {**arguments, "samples": list(samples)}
        self._figures = figures
        self._non_finite, self._spike, self._overfitting = non_finite, spike, overfitting
        self._patience, self._report = patience, report
        self._pictures = summary.can_draw() if pictures is None else pictures
        self.processes = processes
        self._push_to = checked(push_to)
        self._joined = False
        self._restored: Path | None = None
        self._begin_anew()
        self._forget()

    def _begin_anew(self) -> None:
        """Drops what guards and events hold of a run before: the callback may serve several."""
        self._memory = Memory(self._patience)
        self.saved_in = self.mark = ""

    def _forget(self) -> None:
        """Lets go of what holds the model of a run."""
        self._trained: Trained | None = None
        self._meter: Meter | None = None
        self._allocator: Allocator | None = None
        self._lifeline: Lifeline | None = None
        self._parameters: dict[str, nn.Parameter] = {}
        self._gradients: dict[str, Tensor] = {}
        self._pusher: Pusher | None = None
        self._samples.end()

    @property
    def events(self) -> list[dict[str, Any]]:
        """What the guards did in this run or the last, in order: `step`, `what` and `then`."""
        return self._memory.events

    def join(self) -> None:
        """Tells the callback that a `LoraTrainer` saves the checkpoints and asks for figures."""
        self._joined = True

    def replace(self, before: LoraCallback) -> None:
        """Takes the place of the callback that Trainer has made this one anew from."""
        self._joined, self._restored = before._joined, before._restored

    def state(self) -> dict[str, Any]:
        """Returns what Trainer keeps of a callback: its arguments, and where the checkpoint is."""
        kept = {"saved_in": self.saved_in, "mark": self.mark}
        return {"args": self._arguments, "attributes": kept}

    # --- the run ----------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Checks that this run trains the adapter, the whole adapter and nothing but."""
        self._forget()
        self._begin_anew()
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        self._trained = trained_adapter(model, self.name)
        check_shardable(self._trained.model, self._trained.name)
        check_processes(args, AcceleratorState(), model=model, processes=self.processes)
        spread_noise(args, state, model)
        check_unmerged(self._trained.model, "train one")
        check_coverage(model, optimizer)
        self._samples.begin(self._trained.model, kwargs.get("processing_class"))
        named = parameters_in(self._trained.model, self._trained.name)
        self._parameters = {name: p for name, p in named if p.requires_grad}
        # a checkpoint of before has no place for a callback that is new, and Trainer needs one
        state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        check_rows(kwargs.get("train_dataloader"))
        if self._push_to is not None and state.is_world_process_zero:
            self._pusher = Pusher(self._push_to)
        if self._figures or self._report:
            with gathered(self._trained.model, self._trained.name):
                self._meter = Meter(self._trained)
        self._allocator = allocator_of(model, state.max_steps)
        if self._allocator is not None:
            self._allocator.begin()
        if state.global_step:
            self._resume(args, state)
        if "back" in (self._non_finite, self._spike):
            self._lifeline = Lifeline(self._parameters, optimizer, state.global_step)

    def _resume(self, args: Any, state: Any) -> None:
        """Takes back what the guards and AdaLoRA knew when the checkpoint was saved."""
        needed = self._allocator is not None
        kept, tensors = state_of_run(self._restored, args, state, needed=needed)
        if self._allocator is not None:
            if not tensors:
                raise TrainingError(
                    "the checkpoint does not hold AdaLoRA's state, so ranks would be chosen anew",
                    fix="Resume from a checkpoint that was saved with LoraCallback.",
                )
            self._allocator.load_state_dict(tensors, kept.get("adalora", {}))
        self._memory.load(kept)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Notes what tells a checkpoint of this step from others, before Trainer writes its state.

        Takes a copy of the weights where losses and saves may be too rare for going back to them.
        """
        self.saved_in = str(checkpoint_folder(args, state).absolute())
        self.mark = secrets.token_hex(8)
        spikes = self._spike == "back" and args.logging_strategy != "no"
        if not spikes and not state.global_step % KEPT_EVERY:
            self._all_well(state)

    def _all_well(self, state: Any) -> None:
        """Takes a copy of the weights to go back to, and ends a row of steps that went wrong."""
        if not self._memory.not_finite:
            self._memory.backs = 0
        if self._lifeline is not None:
            self._lifeline.keep(state.global_step)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stops, or goes back, before a gradient that is no number reaches the weights."""
        grads = [p.grad for p in self._parameters.values() if p.grad is not None]
        if not grads:
            raise TrainingError(
                f"no parameter of adapter {self._trained.name!r} got a gradient at step "  # type: ignore[union-attr]
                f"{state.global_step + 1}",
                fix="Check that the loss depends on the model's output, and that no adapter is "
                "disabled or merged.",
            )
        norm: Any = torch.nn.utils.get_total_norm(grads)
        if bool(torch.isfinite(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)):
            self._memory.not_finite = 0
        else:
            self._meet_non_finite(args, state, kwargs)
        due = (state.global_step + 1) % max(1, state.logging_steps) == 0
        first = args.logging_first_step and not state.global_step
        if self._figures and self._meter is not None and (due or first):
            self._gradients = self._meter.gradients()

    def _meet_non_finite(self, args: Any, state: Any, kwargs: Mapping[str, Any]) -> None:
        self._memory.not_finite += 1
        if args.fp16 and self._memory.not_finite <= _SCALER_STEPS:
            return  # the loss scale of fp16 finds its size this way, and skips the step
        what = f"the gradients at step {state.global_step + 1} are not finite"
        if self._non_finite == "back" and self._go_back(what, state, kwargs):
            return
        raise TrainingError(
            what,
            fix="The weights are those of the step before. Lower the learning rate, check the data "
            'for rows without labels, or use LoraCallback(non_finite="back").',
        )

    def _go_back(self, what: str, state: Any, kwargs: Mapping[str, Any]) -> bool:
        """Puts the last good weights back with half the rate; False when that was of no use."""
        self._memory.backs += 1
        if self._lifeline is None or self._memory.backs > _BACKS:
            return False
        rate = self._lifeline.back(kwargs.get("lr_scheduler"), 0.5)
        step = self._lifeline.step
        self._note(state, what, f"went back to the weights of step {step}, rate now {rate:.3g}")
        return True

    def _note(self, state: Any, what: str, then: str) -> None:
        self._memory.events.append({"step": state.global_step, "what": what, "then": then})
        logger.warning(f"{what}: {then}")

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Lets AdaLoRA choose ranks, after the step and before gradients are dropped."""
        if self._allocator is not None:
            back = all(p.grad is None for p in self._parameters.values())
            self._allocator.step(state.global_step + 1, dropped=back)

    # --- what is logged ---------------------------------------------------------------------

    def add_figures(self, logs: dict[str, float]) -> None:
        """Adds the adapter's figures to a log of the training loss."""
        if not self._figures or self._meter is None or "loss" not in logs:
            return
        assert self._trained is not None
        with gathered(self._trained.model, self._trained.name):  # by every process
            logs.update(self._meter.figures())
        norms = {role: float(norm) for role, norm in self._gradients.items()}
        # taken after clipping; Trainer logs the norm of before
        total = sum(norm**2 for norm in norms.values()) ** 0.5
        before = logs.get("grad_norm", total)
        unclipped = before / total if total else 1.0
        logs.update({f"grad_norm/{role}": norm * unclipped for role, norm in norms.items()})

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Adds figures where the trainer has not, and watches the loss."""
        if not logs or "loss" not in logs or self._trained is None:
            return
        if not self._joined:
            self.add_figures(logs)
            state.log_history[-1].update(logs)
        wrong = self._memory.loss.see(float(logs["loss"]))
        if not wrong:
            self._all_well(state)
        elif self._spike == "stop":
            self._note(state, wrong, "stopped")
            control.should_training_stop = True
        elif self._spike == "back" and not self._go_back(wrong, state, kwargs):
            raise TrainingError(
                f"{wrong}, and going back {_BACKS} times did not help",
                fix="Lower the learning rate or look at the data of these steps.",
            )
        elif self._spike == "warn":
            self._note(state, wrong, "went on")

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any
    ) -> None:
        """Watches for overfitting and takes samples."""
        if self._trained is None:
            return  # an evaluation outside of a run
        held_out = (metrics or {}).get("eval_loss")
        if held_out is not None and self._overfitting != "ignore":
            losses = [row["loss"] for row in state.log_history if "loss" in row]
            wrong = self._memory.overfit.see(float(held_out), losses[-1] if losses else None)
            if wrong and self._overfitting == "stop":
                self._note(state, wrong, "stopped")
                control.should_training_stop = True
            elif wrong:
                self._note(state, wrong, "went on")
        self._samples.take(args, state)

    # --- what is kept -----------------------------------------------------------------------

    def save_state(self, folder: Path) -> None:
        """Writes into a checkpoint what a resumed run needs of guards and AdaLoRA."""
        kept = self._memory.state()
        tensors: Mapping[str, Tensor] = {}
        if self._allocator is not None:
            tensors, kept["adalora"] = self._allocator.state_dict()
        keep_state(folder, kept, tensors)

    def load_state(self, folder: Path) -> None:
        """Says which checkpoint the run goes on from; its state is read when training begins."""
        self._restored = folder

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Makes a plain Trainer's checkpoint an ordinary adapter folder, whole and marked so."""
        if self._lifeline is not None:  # a run that is resumed from here has no older weights
            self._lifeline.keep(state.global_step)
        if self._trained is not None and not self._joined:
            self._complete(args, state, kwargs["model"])
        if self._pusher is not None:
            self._pusher.offer_checkpoint(checkpoint_folder(args, state), state.global_step)
        self._samples.take_without_evaluation(args, state)

    def _complete(self, args: Any, state: Any, model: Any) -> None:
        assert self._trained is not None
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.barrier()  # every process has written its random states
        folder = checkpoint_folder(args, state)
        with gathered(self._trained.model, self._trained.name):
            if state.is_world_process_zero and folder.is_dir():  # else a search trial's own folder
                self.save_state(folder)
                finish_checkpoint(folder, model, self._trained, state, args)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Writes the report, the pictures and, of AdaLoRA, the plain LoRA it came to."""
        if self._trained is None:
            return
        self._samples.take_without_evaluation(args, state)
        remember(self._trained, args, state, ended=True)
        with gathered(self._trained.model, self._trained.name):  # by every process
            layers = self._meter.layers() if self._meter is not None else []
            known = facts_of(self._trained)
            if self._pusher is not None:
                known["pushed"] = self._pusher.finish(self._trained, state.global_step)
        if state.is_world_process_zero and self._report:
            folder = Path(args.output_dir)
            facts = {**known, "run": run_facts(args)}
            report = summary.summarise(state, layers, facts, self._memory.events)
            summary.write_report(folder, report)
            if self._pictures:
                summary.draw(folder, report)
        if self._allocator is not None:
            self._allocator.end()
            if state.is_world_process_zero:
                self._allocator.export(Path(args.output_dir) / "plain_lora")
        self._joined, self._restored = False, None
        self._forget()
