"""`LoraCallback`: what it checks, watches, measures and writes, with a plain Trainer and ours."""

import json
import math
import shutil

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from transformers import Trainer, TrainerCallback

from hf_lora import (
    BadDataset,
    InvalidOption,
    MergeError,
    TrainingError,
    attach_lora,
    load_lora,
    merge_lora,
    open_adapter,
)
from hf_lora.testing import tiny
from hf_lora.training.callback import LoraCallback
from hf_lora.training.checkpoints import MARKER
from hf_lora.training.guards import LossGuard, OverfitGuard
from hf_lora.training.measure import Meter
from hf_lora.training.restore import trained_adapter
from hf_lora.training.summary import curve
from hf_lora.training.trainer import LoraTrainer
from tests.runs import assert_equal, factors, model, rows, trainer
from tests.support import logits, randomise


class Toy:
    """A tokenizer of numbers, for samples: prompts are ids, answers are their decimals."""

    chat_template = "yes"
    eos_token_id = 2

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [int(word) for word in text.split()]}

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        return " ".join(turn["content"] for turn in messages)

    def decode(self, ids, skip_special_tokens):
        return " ".join(map(str, ids))

    def save_pretrained(self, folder):
        pass


# --- what a run must be ---------------------------------------------------------------------


def test_an_optimizer_built_before_attaching_is_an_error(tmp_path):
    host = tiny("llama")
    early = torch.optim.AdamW(host.parameters(), lr=1e-2)
    attach_lora(host)
    run = trainer(
        Trainer, tmp_path, host=host, callbacks=[LoraCallback()], optimizers=(early, None)
    )
    with pytest.raises(TrainingError, match=r"misses 28 of 28 parameters"):
        run.train()
    assert run.state.global_step == 0


def test_an_optimizer_that_misses_one_parameter_or_has_one_twice_is_an_error(tmp_path):
    host = model()
    mine = [p for p in host.parameters() if p.requires_grad]
    part = torch.optim.AdamW(mine[1:], lr=1e-2)
    with pytest.raises(TrainingError, match=r"misses 1 of 28 .*lora_A"):
        trainer(LoraTrainer, tmp_path, host=host, optimizers=(part, None)).train()
    with pytest.warns(UserWarning, match="duplicate parameters"):
        twice = torch.optim.SGD([*mine, mine[0]], lr=1e-2)
    with pytest.raises(TrainingError, match="stepped twice"):
        trainer(LoraTrainer, tmp_path, host=host, optimizers=(twice, None)).train()


def test_base_parameters_that_would_be_trained_by_accident_are_an_error(tmp_path):
    host = model()
    host.model.norm.weight.requires_grad_(True)
    with pytest.raises(TrainingError, match=r"1 parameters of the base .*model.norm.weight"):
        trainer(LoraTrainer, tmp_path, host=host).train()


def test_a_run_that_gives_the_adapter_no_gradient_is_an_error(tmp_path):
    run = trainer(Trainer, tmp_path, callbacks=[LoraCallback()])
    beside = torch.ones((), requires_grad=True)
    run.compute_loss = lambda model, inputs, **kwargs: beside * 1.0
    with pytest.raises(TrainingError, match="got a gradient at step 1"):
        run.train()


@pytest.mark.parametrize(
    ("data", "changes", "said"),
    [([], {}, "is empty"), (rows(3), {"dataloader_drop_last": True}, "has no batch")],
)
def test_data_without_a_batch_is_an_error_and_no_silent_end(tmp_path, data, changes, said):
    with pytest.raises(BadDataset, match=said):
        trainer(LoraTrainer, tmp_path, data=data, **changes).train()


def test_data_that_gives_no_loss_is_an_error_before_the_first_step(tmp_path):
    ids = torch.ones(4, dtype=torch.long)
    for data, said in (
        ([{"text": "words"}] * 8, "no column of the training data is an argument"),
        ([{"input_ids": ids}] * 8, "has no labels: a batch holds input_ids, and the model"),
    ):
        run = trainer(LoraTrainer, tmp_path, data=data)
        before = factors(run.model)
        with pytest.raises(BadDataset, match=said):
            run.train()
        assert_equal(before, factors(run.model))
    table = pytest.importorskip("datasets", reason="the data set class of a library")
    with pytest.raises(BadDataset, match=r"No columns in the dataset match .*\[text\]"):
        trainer(LoraTrainer, tmp_path, data=table.Dataset.from_list([{"text": "a"}] * 8)).train()


def test_a_merged_adapter_is_not_trained(tmp_path):
    with pytest.raises(MergeError, match="cannot train one. Call unmerge_lora"):
        trainer(LoraTrainer, tmp_path, host=merge_lora(model())).train()


def test_an_iterable_that_is_spent_is_an_error(tmp_path):
    class Spent(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(())

    with pytest.raises(ValueError, match="does not contain any data"):  # accelerate's own words
        trainer(LoraTrainer, tmp_path, data=Spent()).train()


@pytest.mark.parametrize("kind", [Trainer, LoraTrainer])
def test_a_loss_that_is_no_number_stops_the_run_before_the_weights_change(tmp_path, kind):
    run = trainer(kind, tmp_path, callbacks=[LoraCallback()])
    before = factors(run.model)
    plain = run.compute_loss
    run.compute_loss = lambda *a, **k: plain(*a, **k) * math.nan
    with pytest.raises(TrainingError, match="gradients at step 1 are not finite"):
        run.train()
    assert_equal(before, factors(run.model))


class Poison(TrainerCallback):
    """Makes the gradients of one step infinite."""

    def __init__(self, step):
        self.step = step

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step + 1 == self.step:
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad.fill_(math.inf)


def test_going_back_leaves_the_step_out_and_halves_the_rate(tmp_path):
    guard = LoraCallback(non_finite="back")
    run = trainer(LoraTrainer, tmp_path, callbacks=[Poison(6), guard], lr_scheduler_type="constant")
    seen = {}

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen[state.global_step] = factors(kwargs["model"])

    run.add_callback(Look())
    run.train()
    assert_equal(seen[5], seen[6])
    rates = [row["learning_rate"] for row in run.state.log_history if "loss" in row]
    assert rates == [0.01] * 5 + [0.005] * 7
    assert [event["step"] for event in guard.events] == [5]
    assert all(torch.isfinite(value).all() for value in seen[12].values())


def test_going_back_in_vain_ends_with_an_error(tmp_path):
    class Always(Poison):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            self.step = state.global_step + 1
            super().on_pre_optimizer_step(args, state, control, **kwargs)

    run = trainer(
        LoraTrainer,
        tmp_path,
        callbacks=[Always(1), LoraCallback(non_finite="back")],
        logging_steps=100,
    )
    before = factors(run.model)
    with pytest.raises(TrainingError, match="not finite"):
        run.train()
    assert_equal(before, factors(run.model))


def diverging(kind, out, step, **changes):
    """A run that goes back; the loss of one step, counted in calls, is no number."""
    guard = LoraCallback(non_finite="back", report=False)
    run = trainer(kind, out, callbacks=[guard], **changes)
    plain, run.steps = run.compute_loss, 0

    def loss(*args, **kwargs):
        run.steps += 1
        return plain(*args, **kwargs) * (math.nan if run.steps == step else 1)

    run.compute_loss = loss
    return run


def test_a_resumed_run_goes_back_to_where_the_whole_one_does(tmp_path):
    spans = {"logging_steps": 4, "save_steps": 6}
    whole = diverging(LoraTrainer, tmp_path, 8, **spans)
    whole.train()
    shutil.rmtree(tmp_path / "checkpoint-12")
    again = diverging(LoraTrainer, tmp_path, 2, **spans)  # the eighth step of the run
    again.train(resume_from_checkpoint=True)
    assert_equal(factors(whole.model), factors(again.model))
    assert again._lora.events == whole._lora.events
    assert [event["then"] for event in again._lora.events] == [
        "went back to the weights of step 6, rate now 0.00208"  # half of 0.01 * 5/12
    ]


@pytest.mark.parametrize(
    ("saving", "every", "kept"),
    [({"save_strategy": "no"}, 4, 8), ({"save_steps": 5}, 100, 10)],
)
def test_going_back_needs_no_logged_loss_and_names_the_step(
    tmp_path, monkeypatch, saving, every, kept
):
    monkeypatch.setattr("hf_lora.training.callback.KEPT_EVERY", every)
    run = diverging(LoraTrainer, tmp_path, 12, logging_strategy="no", **saving)
    seen = {}

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen[state.global_step] = factors(kwargs["model"])

    run.add_callback(Look())
    run.train()
    assert_equal(seen[kept], factors(run.model))
    assert f"to the weights of step {kept}, " in run._lora.events[0]["then"]


@pytest.mark.parametrize(
    ("losses", "found"),
    [
        ([1.0] * 5 + [2.9], False),
        ([1.0] * 5 + [3.1], True),
        ([1.0] * 4 + [9.0], False),  # too few to say what is usual
        ([4.0, 3.0, 2.0, 1.5, 1.2, 1.1, 6.0], True),
        ([math.nan], True),
        ([1.0, math.inf], True),
    ],
)
def test_a_spike_is_three_times_the_median_of_the_last_losses(losses, found):
    guard = LossGuard()
    assert [bool(guard.see(loss)) for loss in losses] == [False] * (len(losses) - 1) + [found]


@pytest.mark.parametrize(
    ("pairs", "found"),
    [
        ([(2.0, 2.0), (2.1, 1.9), (2.2, 1.8), (2.3, 1.7)], True),
        ([(2.0, 2.0), (2.1, 1.9), (2.2, 1.8), (1.9, 1.7)], False),  # a new best
        ([(2.0, 2.0), (2.1, 2.1), (2.2, 2.2), (2.3, 2.3)], False),  # worse in training as well
        ([(2.0, 2.0), (2.1, 1.9), (2.2, 1.8)], False),  # not yet
        ([(2.0, None), (2.1, None), (2.2, None), (2.3, None)], False),  # nothing to compare
    ],
)
def test_overfitting_is_a_held_out_loss_that_rises_while_training_falls(pairs, found):
    guard = OverfitGuard(3)
    assert bool([guard.see(*pair) for pair in pairs][-1]) is found


def test_a_spike_stops_the_run_when_asked_and_the_report_says_why(tmp_path):
    guard = LoraCallback(spike="stop")
    run = trainer(LoraTrainer, tmp_path, callbacks=[guard])
    plain = run.compute_loss

    def jump(*args, **kwargs):
        return plain(*args, **kwargs) * (10 if run.state.global_step == 7 else 1)

    run.compute_loss = jump
    run.train()
    assert run.state.global_step == 8
    report = json.loads((tmp_path / "report.json").read_text())
    assert [event["then"] for event in report["events"]] == ["stopped"]


def test_a_callback_that_serves_a_second_run_begins_anew(tmp_path):
    guard = LoraCallback(spike="stop", pictures=False)
    for scale, steps in ((0.1, 6), (1.0, 8)):  # the second run's losses are ten times the first's
        run = trainer(LoraTrainer, tmp_path, callbacks=[guard], max_steps=8, save_strategy="no")
        plain = run.compute_loss

        def jump(*args, run=run, plain=plain, scale=scale, **kwargs):
            late = scale < 1 and run.state.global_step == 5
            return plain(*args, **kwargs) * scale * (10 if late else 1)

        run.compute_loss = jump
        run.train()
        assert run.state.global_step == steps
    assert guard.events == []
    assert json.loads((tmp_path / "report.json").read_text())["events"] == []


def test_overfitting_stops_the_run_when_asked(tmp_path):
    run = trainer(
        LoraTrainer,
        tmp_path,
        callbacks=[LoraCallback(overfitting="stop", patience=1)],
        eval_strategy="steps",
        eval_steps=1,
        data=rows(4),
        learning_rate=0.1,
        max_steps=40,
        save_strategy="no",
    )
    run.train()
    assert run.state.global_step < 40


def test_guards_go_on_where_a_checkpoint_left_them(tmp_path):
    first = trainer(LoraTrainer, tmp_path, callbacks=[Poison(2), LoraCallback(non_finite="back")])
    first.train()
    again = LoraCallback(non_finite="back")
    second = trainer(LoraTrainer, tmp_path, callbacks=[again], max_steps=14)
    second.train(resume_from_checkpoint=True)
    assert [event["step"] for event in again.events] == [1]
    assert len(again._memory.loss.losses) == 14


def test_a_callback_that_trainer_makes_anew_is_still_the_trainers_own(tmp_path):
    trainer(LoraTrainer, tmp_path, callbacks=[LoraCallback(patience=2)], max_steps=6).train()
    again = trainer(
        LoraTrainer,
        tmp_path,
        callbacks=[LoraCallback(patience=2)],
        restore_callback_states_from_checkpoint=True,
    )
    first = again._lora
    again.train(resume_from_checkpoint=True)
    assert again._lora is not first
    assert again._lora._arguments == first._arguments
    # else it would write the factors a second time, as for a plain Trainer
    assert not (tmp_path / "checkpoint-12" / "model.safetensors").exists()
    assert not LoraCallback.from_state(again._lora.state())._joined  # for a plain Trainer


# --- figures --------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [{}, {"config": LoraConfig(r=8, use_rslora=True)}])
def test_norms_and_ranks_are_those_of_the_updates_that_peft_makes(config):
    host = randomise(model(**config))
    found = {x.path: x for x in Meter(trained_adapter(host)).layers()}
    layers = {n: m for n, m in host.named_modules() if hasattr(m, "get_delta_weight")}
    assert found.keys() == layers.keys()
    for path, layer in layers.items():
        values = torch.linalg.svdvals(layer.get_delta_weight("default").detach().double())
        shares = values[values > 1e-9] / values.sum()
        # relative 1e-4: peft's update is float32, and squares lose half of its digits
        assert found[path].norm == pytest.approx(float(values.square().sum().sqrt()), rel=1e-4)
        assert found[path].effective_rank == pytest.approx(
            math.exp(-float((shares * shares.log()).sum())), rel=1e-4
        )


def test_a_fresh_adapter_has_no_norm_and_no_rank():
    assert Meter(trained_adapter(model())).figures() == {
        "adapter_norm": 0.0,
        "adapter_effective_rank": 0.0,
    }


def test_a_large_rank_has_its_norm_without_its_spectrum(monkeypatch):
    meter = Meter(trained_adapter(randomise(model())))
    whole = meter.figures()
    monkeypatch.setattr("hf_lora.training.measure.SPECTRA", 4)
    # float32 sums in another order
    assert meter.figures() == {"adapter_norm": pytest.approx(whole["adapter_norm"], rel=1e-5)}


def test_a_layer_that_is_not_finite_has_no_figures_and_leaves_the_others_theirs():
    host = randomise(model())
    before = {x.path: x for x in Meter(trained_adapter(host)).layers()}
    broken = "model.layers.0.mlp.up_proj"
    with torch.no_grad():
        host.get_submodule(broken).lora_B["default"].weight[0, 0] = math.inf
    meter = Meter(trained_adapter(host))
    after = {x.path: x for x in meter.layers()}
    odd = after.pop(broken)
    assert math.isnan(odd.norm)
    assert math.isnan(odd.effective_rank)
    assert after == {path: x for path, x in before.items() if path != broken}
    assert all(map(math.isnan, meter.figures().values()))


def test_a_run_that_diverged_ends_with_a_report(tmp_path):
    trainer(LoraTrainer, tmp_path, learning_rate=1e20, max_steps=1, save_strategy="no").train()
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["curves"]["adapter_norm"] == [[1, None]]
    assert {layer["norm"] for layer in report["layers"]} == {None}
    assert (tmp_path / "norms.png").exists()


def test_a_metric_that_was_none_once_is_a_gap_in_its_curve():
    rows = [{"step": 1, "f1": None}, {"step": 2, "f1": 0.5}, {"step": 3, "f1": "good"}]
    assert curve(rows, "f1") == [(2, 0.5)]


@pytest.mark.parametrize("kind", [Trainer, LoraTrainer])
def test_figures_stand_in_trainers_own_log(tmp_path, kind):
    run = trainer(kind, tmp_path, callbacks=[LoraCallback()], logging_steps=3, max_grad_norm=0.01)
    run.train()
    logged = [row for row in run.state.log_history if "loss" in row]
    assert len(logged) == 4
    for row in logged:
        roles = [v for k, v in row.items() if k.startswith("grad_norm/")]
        assert len(roles) == 7
        # the norm of before clipping, which Trainer logs, from gradients of after: float32
        assert sum(v**2 for v in roles) ** 0.5 == pytest.approx(row["grad_norm"], rel=1e-4)
        assert row["adapter_norm"] > 0
        assert 0 < row["adapter_effective_rank"] <= 16


def test_figures_change_no_bit_of_the_run(tmp_path):
    on = trainer(LoraTrainer, tmp_path / "on", callbacks=[LoraCallback(non_finite="back")])
    on.train()
    bare = LoraCallback(figures=False, report=False)
    off = trainer(LoraTrainer, tmp_path / "off", callbacks=[bare])
    off.train()
    assert_equal(factors(on.model), factors(off.model))
    assert not any("adapter_norm" in row for row in off.state.log_history)
    assert not (tmp_path / "off" / "report.json").exists()


# --- checkpoints of a plain Trainer ---------------------------------------------------------


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    out = tmp_path_factory.mktemp("plain")
    run = trainer(Trainer, out, callbacks=[LoraCallback()])
    run.train()
    return out, run


def test_a_plain_trainer_resumes_to_the_bit_and_so_does_ours(plain, tmp_path):
    for kind in (Trainer, LoraTrainer):
        run = trainer(kind, tmp_path / kind.__name__, callbacks=[LoraCallback()])
        run.train(resume_from_checkpoint=str(plain[0] / "checkpoint-6"))
        assert run._initial_global_step == 6
        assert_equal(factors(plain[1].model), factors(run.model))


def test_a_plain_trainer_takes_what_the_guards_knew_from_its_own_checkpoint(
    plain, tmp_path, monkeypatch
):
    """In the output folder lies a checkpoint of the same step, of another run."""
    spans = {"max_steps": 6, "save_steps": 6, "data": rows(seed=9)}
    trainer(Trainer, tmp_path, callbacks=[LoraCallback(report=False)], **spans).train()
    again = LoraCallback(report=False)
    run = trainer(Trainer, tmp_path, callbacks=[again])
    run.train(resume_from_checkpoint=str(plain[0] / "checkpoint-6"))
    losses = [row["loss"] for row in plain[1].state.log_history if "loss" in row]
    assert list(again._memory.loss.losses) == losses
    moved, said = tmp_path / "moved" / "checkpoint-6", []
    shutil.copytree(plain[0] / "checkpoint-6", moved)
    state = json.loads((moved / "trainer_state.json").read_text())
    # as if the first one were gone
    state["stateful_callbacks"]["LoraCallback"]["attributes"]["mark"] = "another"
    (moved / "trainer_state.json").write_text(json.dumps(state))
    monkeypatch.setattr("hf_lora.training.keep.logger.warning", said.append)
    guard = LoraCallback(report=False)
    run = trainer(Trainer, tmp_path / "new", callbacks=[guard], max_steps=7)
    run.train(resume_from_checkpoint=str(moved))
    assert "the guards of the run begin anew: the checkpoint was moved" in said[0]


def test_a_plain_trainers_checkpoint_is_an_ordinary_adapter_folder(plain):
    adapter = open_adapter(plain[0] / "checkpoint-12")
    assert adapter.manifest.base.fingerprints
    assert adapter.manifest.training["steps"] == 12
    fresh = tiny("llama")
    assert "matched" in str(load_lora(fresh, plain[0] / "checkpoint-12"))
    assert torch.equal(logits(fresh), logits(plain[1].model))


def test_a_plain_trainer_loads_the_best_model_at_the_end(tmp_path):
    best_of = {"eval_strategy": "steps", "eval_steps": 3, "load_best_model_at_end": True}
    run = trainer(Trainer, tmp_path, callbacks=[LoraCallback()], **best_of)
    run.train()
    losses = [row["eval_loss"] for row in run.state.log_history if "eval_loss" in row]
    assert run.evaluate()["eval_loss"] == min(losses) < losses[-1]


def test_a_peft_model_under_a_plain_trainer_keeps_pefts_own_way(tmp_path):
    host = get_peft_model(tiny("llama"), LoraConfig())
    run = trainer(Trainer, tmp_path / "a", host=host, callbacks=[LoraCallback()])
    run.train()
    assert not (tmp_path / "a" / "checkpoint-6" / "model.safetensors").exists()
    assert open_adapter(tmp_path / "a" / "checkpoint-6").manifest.digest
    host = get_peft_model(tiny("llama"), LoraConfig())
    second = trainer(Trainer, tmp_path / "b", host=host, callbacks=[LoraCallback()])
    second.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-6"))
    assert_equal(factors(run.model), factors(second.model))


# --- AdaLoRA --------------------------------------------------------------------------------


def adalora():
    return model(
        config=AdaLoraConfig(
            init_r=8, target_r=4, tinit=2, tfinal=3, deltaT=1, total_step=99, lora_dropout=0.1
        )
    )


@pytest.mark.parametrize("kind", [Trainer, LoraTrainer])
def test_adalora_allocates_resumes_to_the_bit_and_ends_as_a_plain_lora(tmp_path, kind):
    whole = trainer(kind, tmp_path / "a", host=adalora(), callbacks=[LoraCallback()])
    whole.train()
    alive = [p for n, p in whole.model.named_parameters() if "lora_E" in n]
    assert sum(int(p.count_nonzero()) for p in alive) == 4 * len(alive)
    again = trainer(kind, tmp_path / "b", host=adalora(), callbacks=[LoraCallback()])
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-6"))
    assert_equal(factors(whole.model), factors(again.model))
    exported = open_adapter(tmp_path / "a" / "plain_lora")
    assert exported.components["model"].kind == "LORA"
    plain = tiny("llama")
    load_lora(plain, tmp_path / "a" / "plain_lora")
    # float32: the singular values are multiplied into B, which rounds once more
    assert torch.allclose(logits(plain), logits(whole.model), atol=1e-5)


def test_a_plain_trainer_finds_adaloras_state_where_it_is_told_to(tmp_path):
    def run(out, **changes):
        guard = LoraCallback(report=False)
        return trainer(Trainer, out, host=adalora(), callbacks=[guard], save_steps=6, **changes)

    whole = run(tmp_path / "a")
    whole.train()
    moved = tmp_path / "moved"
    shutil.move(tmp_path / "a" / "checkpoint-6", moved)
    with pytest.raises(TrainingError, match="the checkpoint was moved.*Say where it is"):
        run(tmp_path / "b").train(resume_from_checkpoint=str(moved))
    again = run(tmp_path / "b", resume_from_checkpoint=str(moved))
    again.train(resume_from_checkpoint=str(moved))
    assert_equal(factors(whole.model), factors(again.model))


@pytest.mark.parametrize("step", [1, 9, 12])  # before ranks go, with the last of them, after
def test_adalora_goes_back_and_ends_with_its_budget(tmp_path, step):
    run = diverging(LoraTrainer, tmp_path, step, host=adalora(), save_strategy="no")
    run.train()
    assert [event["step"] for event in run._lora.events] == [step - 1]
    alive = [p for n, p in run.model.named_parameters() if "lora_E" in n]
    assert sum(int(p.count_nonzero()) for p in alive) == 4 * len(alive)


def test_a_checkpoint_without_adaloras_state_is_refused(tmp_path):
    whole = trainer(LoraTrainer, tmp_path, host=adalora())
    whole.train()
    folder = tmp_path / "checkpoint-6"
    (folder / "hf_lora_state.safetensors").unlink()
    (folder / MARKER).unlink()
    again = trainer(LoraTrainer, tmp_path / "b", host=adalora())
    with pytest.raises(TrainingError, match="does not hold AdaLoRA's state"):
        again.train(resume_from_checkpoint=str(folder))


# --- samples and the report -----------------------------------------------------------------


def test_samples_are_answered_at_each_evaluation_and_change_nothing(tmp_path):
    def run(out, samples):
        made = trainer(
            LoraTrainer,
            out,
            callbacks=[LoraCallback(samples=samples, sample_tokens=4)],
            processing_class=Toy(),
            eval_strategy="steps",
            eval_steps=6,
        )
        made.train()
        return factors(made.model)

    chat = [{"role": "user", "content": "5 6 7"}]
    assert_equal(run(tmp_path / "a", ["3 4", chat]), run(tmp_path / "b", []))
    lines = (tmp_path / "a" / "samples.jsonl").read_text().splitlines()
    said = [json.loads(line) for line in lines]
    assert [(row["step"], row["prompt"]) for row in said] == [
        (6, "3 4"), (6, chat), (12, "3 4"), (12, chat),
    ]  # fmt: skip
    assert all(1 <= len(row["answer"].split()) <= 4 for row in said)


def test_samples_are_written_once_a_step_for_several_sets_and_after_a_resume(tmp_path):
    def run(**kwargs):
        made = trainer(
            LoraTrainer,
            tmp_path,
            callbacks=[LoraCallback(samples=["3 4"], sample_tokens=2, report=False)],
            processing_class=Toy(),
            judge={"one": rows(4), "other": rows(4, seed=3)},
            eval_strategy="steps",
            eval_steps=4,
            save_steps=6,
        )
        made.train(**kwargs)
        return (tmp_path / "samples.jsonl").read_text()

    whole = run()
    assert [json.loads(line)["step"] for line in whole.splitlines()] == [4, 8, 12]
    shutil.rmtree(tmp_path / "checkpoint-12")
    assert run(resume_from_checkpoint=True) == whole


def test_samples_go_to_tensorboard_where_trainer_reports_there(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "runs"))
    run = trainer(
        LoraTrainer,
        tmp_path,
        callbacks=[LoraCallback(samples=["3 4"], sample_tokens=2)],
        processing_class=Toy(),
        eval_strategy="steps",
        eval_steps=12,
        report_to="tensorboard",
    )
    run.train()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tags = {"tensors": set(), "scalars": set()}
    for events in (tmp_path / "runs").rglob("events*"):
        seen = EventAccumulator(str(events))
        seen.Reload()
        for kind in tags:
            tags[kind] |= set(seen.Tags()[kind])
    assert "samples/0/text_summary" in tags["tensors"]
    assert {"train/adapter_norm", "train/grad_norm/attn.q"} <= tags["scalars"]


def test_samples_that_cannot_be_answered_are_an_error_before_the_first_step(tmp_path):
    asked = [LoraCallback(samples=["3 4"])]
    with pytest.raises(TrainingError, match="need a tokenizer"):
        trainer(LoraTrainer, tmp_path, callbacks=asked).train()
    host = attach_lora(tiny("bert", task="classifier"))
    data = [{"input_ids": r["input_ids"], "labels": i % 2} for i, r in enumerate(rows())]
    run = trainer(
        LoraTrainer, tmp_path, host=host, callbacks=asked, data=data, processing_class=Toy()
    )
    with pytest.raises(TrainingError, match="generates no text"):
        run.train()


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("3 " * 61, "has 61 tokens, and with an answer of 4 goes past the 64 positions of GPT2"),
        (" ", "has no tokens"),
        ([{"role": "user", "content": "words"}], "cannot encode .*invalid literal for int"),
    ],
)
def test_prompts_that_leave_no_answer_are_named_before_the_first_step(tmp_path, prompt, said):
    asked = [LoraCallback(samples=["3 " * 60, prompt], sample_tokens=4)]
    run = trainer(
        LoraTrainer, tmp_path, host=model("gpt2"), callbacks=asked, processing_class=Toy()
    )
    with pytest.raises(TrainingError, match=said) as caught:
        run.train()
    assert caught.value.field == "samples"


def test_the_report_tells_the_run_and_the_pictures_are_pictures(plain):
    folder, run = plain
    report = json.loads((folder / "report.json").read_text())
    assert report["host"] == "LlamaForCausalLM"
    assert report["steps"] == 12
    assert report["adapter"]["targets"] == 14  # seven linears in each of two blocks
    assert [step for step, _ in report["curves"]["loss"]] == list(range(1, 13))
    by_path = {layer.path: layer for layer in Meter(trained_adapter(run.model)).layers()}
    assert {layer["path"]: layer["norm"] for layer in report["layers"]} == {
        path: layer.norm for path, layer in by_path.items()
    }
    for name in ("loss.png", "rate.png", "norm.png", "norms.png", "ranks.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG"), name


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"non_finite": "ignore"}, "non_finite"),
        ({"spike": "no"}, "spike"),
        ({"overfitting": "back"}, "overfitting"),
        ({"patience": 0}, "patience"),
        ({"patience": True}, "patience"),
        ({"sample_tokens": 1.5}, "sample_tokens"),
        ({"samples": "one text"}, "samples"),
        ({"samples": [""]}, "samples"),
        ({"samples": [[{"content": "no role"}]]}, "samples"),
    ],
)
def test_bad_options_are_named(wrong, field):
    with pytest.raises(InvalidOption) as caught:
        LoraCallback(**wrong)
    assert caught.value.field == field
