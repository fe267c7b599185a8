"""AdaLoRA in place and under Trainer: judged by peft's own loop, and by the paper's formula."""

import copy
import json
import warnings

import peft
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_lora import attach_lora, detach_lora, open_adapter, save_adapter
from hf_lora.algebra import fold_diagonal
from hf_lora.errors import (
    AdapterNotFound,
    BadCheckpoint,
    InvalidOption,
    MetaHost,
    TrainingError,
    UnsupportedTarget,
)
from hf_lora.testing import tiny, tiny_batch
from hf_lora.training.adalora import allocator_of, plain_lora
from hf_lora.training.optimizers import lora_optimizer
from tests.support import logits, tuner_layers

TOTAL = 12
LAYERS = 4  # q_proj and v_proj of two blocks


def config(**changes):
    values = {
        "init_r": 6,
        "target_r": 3,
        "lora_alpha": 11,
        "tinit": 2,
        "tfinal": 3,
        "deltaT": 2,
        "total_step": TOTAL,
        "target_modules": ["q_proj", "v_proj"],
    }
    return peft.AdaLoraConfig(**{**values, **changes})


def in_place(model=None, **changes):
    torch.manual_seed(0)
    return attach_lora(tiny("llama") if model is None else model, config=config(**changes))


def wrapped(task="CAUSAL_LM", **changes):
    torch.manual_seed(0)
    return peft.get_peft_model(tiny("llama"), config(task_type=task, **changes))


def bare(host):
    return host.get_base_model() if isinstance(host, peft.PeftModel) else host


def values(host):
    return {n: p.detach().clone() for n, p in bare(host).named_parameters()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def adamw(host):
    return torch.optim.AdamW([p for p in host.parameters() if p.requires_grad], lr=1e-2)


def train(host, count=TOTAL, *, first=1, optimizer=None, allocator=None, each=lambda step: None):
    """The loop of the documentation; returns the allocator, begun and not ended."""
    host.train()
    optimizer = adamw(host) if optimizer is None else optimizer
    if allocator is None:
        allocator = allocator_of(host, TOTAL)
        allocator.begin()
    for step in range(first, count + 1):
        host(**tiny_batch(bare(host), seed=step)).loss.backward()
        optimizer.step()
        allocator.step(step)
        optimizer.zero_grad()
        each(step)
    return allocator


def by_peft(host, count=TOTAL):
    """Yields the weights after each step of the loop in peft's documentation."""
    host.train()
    optimizer = adamw(host)
    for step in range(1, count + 1):
        host(**tiny_batch(bare(host), seed=step)).loss.backward()
        optimizer.step()
        host.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        yield step, values(host), host.peft_config["default"].rank_pattern


# --- allocation ------------------------------------------------------------------------------


# a PeftModel without a task runs the model past peft's class, and peft's penalty is lost
MAKERS = [in_place, wrapped, lambda: wrapped(None)]


@pytest.mark.parametrize("make", MAKERS, ids=["in place", "PeftModel", "PeftModel without task"])
def test_weights_and_ranks_equal_those_of_pefts_loop_at_each_step(make):
    judge = {step: rest for step, *rest in by_peft(wrapped())}
    host, seen = make(), {}

    def each(step):
        seen[step] = (values(host), allocator.rank_pattern)

    allocator = allocator_of(host, TOTAL)
    allocator.begin()
    train(host, allocator=allocator, each=each)
    for step, (weights, pattern) in judge.items():
        assert same(seen[step][0], weights), step
        if pattern is not None:
            assert seen[step][1] == pattern, step
    assert sum(allocator.ranks.values()) == 3 * LAYERS


def budget(step, *, start=6 * LAYERS, target=3 * LAYERS, tinit=2, tfinal=3, total=TOTAL):
    """b(t) of arXiv 2303.10512, equation 12, in whole ranks; ti < t < T - tf in between."""
    if step <= tinit:
        return start
    if step >= total - tfinal:
        return target
    left = 1 - (step - tinit) / (total - tfinal - tinit)
    return int(target + (start - target) * left**3)


def test_a_step_that_was_left_out_says_nothing_of_importances_and_keeps_the_schedule():
    host = in_place(deltaT=1)
    allocator = train(host, 5)
    before, _ = allocator.state_dict()
    with pytest.raises(TrainingError, match="no factor .* has a gradient at step 6"):
        allocator.step(6)
    allocator.step(6, dropped=True)
    after, _ = allocator.state_dict()
    assert (int(before.pop("step")), int(after.pop("step"))) == (5, 6)
    assert same(before, after)
    assert sum(allocator.ranks.values()) == budget(6) < budget(5)


def test_the_budget_is_the_papers_and_the_last_ranks_stay():
    host, seen = in_place(deltaT=1), {}
    allocator = allocator_of(host, TOTAL)
    allocator.begin()
    # E is zero at the start, and a rank that was dropped before its E moved counts as dropped
    train(host, allocator=allocator, each=lambda step: seen.update({step: allocator.ranks}))
    assert {s: sum(r.values()) for s, r in seen.items()} == {
        step: budget(step) for step in range(1, TOTAL + 1)
    }
    assert seen[9] == seen[10] == seen[11] == seen[12]
    assert {sum(kept) for kept in allocator.rank_pattern.values()} == set(seen[12].values())


@pytest.mark.parametrize("deltaT", [1, 5])
def test_without_final_steps_the_last_step_masks_to_the_budget(deltaT):
    host = in_place(tfinal=0, tinit=0, deltaT=deltaT)
    assert sum(train(host).ranks.values()) == 3 * LAYERS


def test_total_step_of_the_config_is_that_of_the_run():
    host = in_place(total_step=1000)
    allocator = allocator_of(host, TOTAL)
    assert host.peft_config["default"].total_step == TOTAL
    assert allocator.notes == [
        "AdaLoRA's total_step is 1000 in the config of 'default', the run has 12 steps: ranks are "
        "allocated over these"
    ]
    judge = in_place()
    assert not allocator_of(judge, TOTAL).notes
    train(host), train(judge)
    assert same(values(host), values(judge))


def test_nothing_is_allocated_where_the_budget_is_all_ranks():
    host = in_place(init_r=4, target_r=4)
    allocator = train(host)
    assert "nothing to allocate" in allocator.notes[0]
    assert allocator.rank_pattern is None
    assert set(allocator.ranks.values()) == {4}
    other = in_place(init_r=4, target_r=4)
    allocator = allocator_of(other, TOTAL)
    allocator.load_state_dict(*allocator_of(in_place(init_r=4, target_r=4), TOTAL).state_dict())


def test_no_adalora_no_allocator():
    assert allocator_of(tiny("llama"), TOTAL) is None
    assert allocator_of(attach_lora(tiny("llama"), rank=4), TOTAL) is None
    model = in_place()
    attach_lora(model, rank=4, name="other", targets=["o_proj"])
    assert allocator_of(model, TOTAL) is None  # it is not the active one
    loaded = wrapped(inference_mode=True)
    assert allocator_of(loaded, TOTAL) is None


class Half(nn.Module):
    """A model one of whose layers the forward leaves out."""

    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return {"loss": (self.used(x) - 1).square().mean()}


def test_factors_of_a_module_that_the_forward_leaves_out_count_nothing():
    torch.manual_seed(0)
    model = attach_lora(Half(), config=config(target_modules=["used", "unused"], target_r=2))
    model.train()
    optimizer = adamw(model)
    allocator = allocator_of(model, TOTAL)
    allocator.begin()
    for step in range(1, TOTAL + 1):
        model(torch.ones(2, 8))["loss"].backward()
        model.unused.lora_E["default"].grad = None
        optimizer.step()
        allocator.step(step)
        assert model.unused.lora_E["default"].grad is None
        optimizer.zero_grad()
    assert allocator.ranks == {"used": 4, "unused": 0}


def test_another_adapter_whose_name_begins_alike_is_let_alone():
    model = attach_lora(tiny("llama"), config=config(), name="default2")
    model.peft_config["default2"].inference_mode = True  # peft trains one AdaLoRA at a time
    in_place(model)
    before = {n: v for n, v in values(model).items() if "default2" in n}
    allocator = train(model)
    assert sum(allocator.ranks.values()) == 3 * LAYERS
    assert all(torch.equal(v, values(model)[n]) for n, v in before.items())
    judge = in_place()
    train(judge)
    assert all(torch.equal(v, values(model)[n]) for n, v in values(judge).items())


def test_a_step_whose_gradients_overflowed_says_nothing_of_importance():
    host, judge = in_place(), in_place()
    one, other = (train(h, 3) for h in (host, judge))
    for parameter in host.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.full_like(parameter, torch.inf)
    one._reached = True
    one.step(4)
    ours, theirs = one.state_dict()[0], other.state_dict()[0]
    assert all(torch.equal(ours[k], theirs[k]) for k in ours if k != "step")
    assert sum(one.ranks.values()) == budget(4)


# --- the penalty -----------------------------------------------------------------------------


def loss_of(host, **kwargs):
    outputs = host(**tiny_batch(bare(host)), **kwargs)
    return (outputs[0] if isinstance(outputs, tuple) else outputs["loss"]).detach()


@pytest.mark.parametrize("make", MAKERS, ids=["in place", "PeftModel", "PeftModel without task"])
def test_evaluation_carries_no_penalty_and_training_pefts(make):
    host, judge = make(), wrapped()
    entropy = loss_of(in_place().eval())  # no allocator, no PeftModel: the model's own loss
    allocator = allocator_of(host, TOTAL)
    allocator.begin()
    assert torch.equal(loss_of(host.train()), loss_of(judge.train()))
    assert torch.equal(loss_of(host.eval()), entropy)
    assert not torch.equal(loss_of(judge.eval()), entropy)  # what is put right here
    with torch.no_grad():
        assert torch.equal(loss_of(host.train()), entropy)
    config = host.peft_config["default"]
    assert config.orth_reg_weight == 0.5
    allocator.end()
    assert torch.equal(loss_of(host.eval()), entropy) is (type(host) is not type(judge))


def test_an_error_in_the_forward_leaves_pefts_weight_as_it_was():
    host = wrapped()
    allocator_of(host, TOTAL).begin()
    with pytest.raises(TypeError, match="must be Tensor"):
        host(input_ids="nothing")
    assert host.peft_config["default"].orth_reg_weight == 0.5


@pytest.mark.parametrize("make", [in_place, wrapped])
def test_a_run_that_failed_leaves_no_second_penalty_and_none_after_detaching(make):
    host, judge = make(), wrapped()
    train(host, 2)  # begun and never ended
    again = allocator_of(host, TOTAL)
    again.begin()
    bare(judge).load_state_dict(bare(host).state_dict())
    assert torch.equal(loss_of(host.train()), loss_of(judge.train()))
    if make is in_place:
        detach_lora(host)
        assert torch.equal(loss_of(host.train()), loss_of(tiny("llama").train()))
        assert not host._forward_hooks


def test_the_penalty_is_that_of_the_formula():
    host = in_place()
    allocator = allocator_of(host, TOTAL)
    norms = [
        torch.linalg.matrix_norm(m @ m.T - torch.eye(6))
        for layer in tuner_layers(host).values()
        for m in (layer.lora_A["default"], layer.lora_B["default"].T)
    ]
    expected = 0.5 * torch.stack(norms).mean()
    assert allocator.penalty().item() == pytest.approx(expected.item(), rel=1e-6)  # float32


@pytest.mark.parametrize("form", ["tuple", "dict", "object"])
def test_the_penalty_goes_into_whatever_a_model_returns(form):
    class Loss:
        def __init__(self, loss):
            self.loss = loss

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(8, 8)

        def forward(self, x):
            loss = self.lin(x).square().mean()
            return {"tuple": (loss, x), "dict": {"loss": loss}, "object": Loss(loss)}[form]

    model = attach_lora(Model(), config=config(target_modules=["lin"])).train()
    allocator = allocator_of(model, TOTAL)
    allocator.begin()
    outputs = model(torch.ones(1, 8))
    loss = outputs[0] if form == "tuple" else getattr(outputs, "loss", None)
    loss = outputs["loss"] if form == "dict" else loss
    plain = model.lin(torch.ones(1, 8)).square().mean()
    assert torch.equal(loss, plain + allocator.penalty())
    if form == "tuple":
        assert torch.equal(outputs[1], torch.ones(1, 8))


def test_half_precision_autocast_does_not_reach_the_penalty():
    allocator = allocator_of(in_place(), TOTAL)
    expected = allocator.penalty()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(allocator.penalty(), expected)


def test_a_loss_that_is_not_the_models_own_is_an_error_at_the_first_step():
    host = in_place().train()
    optimizer = adamw(host)
    allocator = allocator_of(host, TOTAL)
    allocator.begin()
    host(**tiny_batch(host)).logits.square().mean().backward()
    optimizer.step()
    with pytest.raises(TrainingError, match="penalty did not reach.*label smoothing.*weight=0"):
        allocator.step(1)
    free = in_place(orth_reg_weight=0.0).train()
    allocator = allocator_of(free, TOTAL)
    allocator.begin()
    free(**tiny_batch(free)).logits.square().mean().backward()
    allocator.step(1)


# --- Trainer ---------------------------------------------------------------------------------


class Drive(TrainerCallback):
    """What `LoraCallback` does for AdaLoRA, in ten lines."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.allocator = allocator_of(kwargs["model"], state.max_steps)
        self.allocator.begin()

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.allocator.step(state.global_step + 1)

    def on_train_end(self, args, state, control, **kwargs):
        self.allocator.end()


class Peft(TrainerCallback):
    """What peft's documentation asks for."""

    def on_optimizer_step(self, args, state, control, **kwargs):
        kwargs["model"].base_model.update_and_allocate(state.global_step + 1)


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Accelerate's states are shared by all of a process."""
    yield
    for state in (AcceleratorState, GradientState):
        state._reset_state()


ROWS = [
    {k: v[0] for k, v in tiny_batch(tiny("llama", meta=True), rows=1, seed=seed).items()}
    for seed in range(8)
]


def trainer_of(host, folder, *callbacks, **changes):
    arguments = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": TOTAL,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return Trainer(
        host,
        TrainingArguments(**{**arguments, **changes}),
        train_dataset=ROWS,
        eval_dataset=ROWS[:4],
        callbacks=list(callbacks),
    )


@pytest.mark.parametrize(
    ("make", "accepts"), [(in_place, True), (in_place, False), (wrapped, True)]
)
def test_a_run_of_trainer_equals_one_of_peft_with_gradients_accumulated(make, accepts, tmp_path):
    host, judge = make(), wrapped()
    drive = Drive()
    for each, callback in ((host, drive), (judge, Peft())):
        trainer = trainer_of(each, tmp_path, callback)
        # whether the loss is divided by all tokens in the model, or by the batches afterwards
        trainer.model_accepts_loss_kwargs = accepts
        trainer.train()
    assert same(values(host), values(judge))
    assert sum(drive.allocator.ranks.values()) == 3 * LAYERS
    metrics = trainer_of(host, tmp_path).evaluate()
    with torch.no_grad():
        batch = {k: torch.stack([row[k] for row in ROWS[:4]]) for k in ROWS[0]}
        entropy = bare(host).eval()(**batch).loss.item()
    if make is in_place:
        assert metrics["eval_loss"] == pytest.approx(entropy, rel=1e-6)  # float32


def test_evaluations_during_a_run_are_of_the_task_alone(tmp_path):
    host = wrapped()
    seen = []

    class Look(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            batch = {k: torch.stack([row[k] for row in ROWS[:4]]) for k in ROWS[0]}
            with torch.no_grad():
                entropy = bare(host).eval()(**batch).loss.item()
            seen.append((metrics["eval_loss"], entropy))

    trainer_of(host, tmp_path, Drive(), Look(), eval_strategy="steps", eval_steps=4).train()
    assert len(seen) == 3
    for found, entropy in seen:
        assert found == pytest.approx(entropy, rel=1e-6)  # float32


@pytest.mark.parametrize("how", ["label_smoothing_factor", "compute_loss_func"])
def test_trainers_other_losses_stop_at_the_first_step(how, tmp_path):
    changes = {how: 0.1} if how == "label_smoothing_factor" else {}
    trainer = trainer_of(in_place(), tmp_path, Drive(), **changes)
    if how == "compute_loss_func":
        trainer.compute_loss_func = lambda outputs, labels, **_: outputs.logits.square().mean()
    with pytest.raises(TrainingError, match="orthogonal penalty did not reach"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_plain_trainer_saves_the_adapter_in_place_during_the_run_and_after_it(tmp_path):
    model = in_place()
    trainer = trainer_of(model, tmp_path, Drive(), save_strategy="steps", save_steps=6)
    trainer.train()
    model.save_pretrained(tmp_path / "end")
    for folder in (tmp_path / "checkpoint-12", tmp_path / "end"):
        judge = peft.PeftModel.from_pretrained(tiny("llama"), folder)
        assert torch.equal(logits(bare(judge)), logits(model))


def test_a_peft_model_saves_its_ranks_as_peft_does_when_the_run_is_over(tmp_path):
    host, judge = wrapped(), wrapped()
    allocator = train(host)
    assert host.peft_config["default"].rank_pattern is None
    allocator.end()
    list(by_peft(judge))
    for name, each in (("ours", host), ("theirs", judge)):
        each.save_pretrained(tmp_path / name)
    ours, theirs = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs")
    )
    assert same(ours, theirs)
    settings = [
        json.loads((tmp_path / name / "adapter_config.json").read_text())
        for name in ("ours", "theirs")
    ]
    assert settings[0] == settings[1]
    again = allocator_of(host, TOTAL)  # a second run begins with all rows
    assert host.peft_config["default"].rank_pattern is None
    assert again.rank_pattern is None


@pytest.mark.parametrize("count", [4, 5])
def test_an_early_end_is_noted_and_what_is_saved_is_what_the_model_computes(count, tmp_path):
    host = wrapped()
    allocator = train(host, count)
    allocator.end()
    alive = {4: 16, 5: 24}[count]  # deltaT is 2: a step later the others have moved again
    assert f"ended after {count} of 12 steps, with {alive} ranks alive" in allocator.notes[0]
    host.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft takes AdaLoRA's rank_pattern for one of LoRA
        judge = peft.PeftModel.from_pretrained(tiny("llama"), tmp_path)
    error = (logits(bare(judge)) - logits(bare(host))).abs().max()
    assert error < 1e-6  # of logits up to 3: a product of fewer rows is summed otherwise
    fresh = allocator_of(host, TOTAL)
    fresh.begin(), fresh.begin()
    assert len(bare(host)._forward_hooks) == len(host.base_model._forward_hooks) == 1
    fresh.end()
    assert not bare(host)._forward_hooks
    assert not host.base_model._forward_hooks


# --- a run that was interrupted --------------------------------------------------------------


@pytest.mark.parametrize("make", [in_place, wrapped])
@pytest.mark.parametrize("cut", [1, 5, 9, 11])
def test_a_resumed_run_is_bit_equal(make, cut, tmp_path):
    whole = make()
    first = train(whole)
    host = make()
    optimizer = adamw(host)
    allocator = train(host, cut, optimizer=optimizer)
    tensors, state = allocator.state_dict()
    assert (tensors.keys() == {"step"}) is (cut >= 9)  # no importances when ranks are final
    save_file(tensors, tmp_path / "state.safetensors")
    text = json.dumps(state)
    kept = copy.deepcopy((bare(host).state_dict(), optimizer.state_dict()))

    resumed = make()
    bare(resumed).load_state_dict(kept[0])
    optimizer = adamw(resumed)
    optimizer.load_state_dict(kept[1])
    allocator = allocator_of(resumed, TOTAL)
    allocator.load_state_dict(load_file(tmp_path / "state.safetensors"), json.loads(text))
    allocator.begin()
    train(resumed, first=cut + 1, optimizer=optimizer, allocator=allocator)
    assert same(values(resumed), values(whole))
    assert allocator.rank_pattern == first.rank_pattern
    mine, theirs = allocator.state_dict(), first.state_dict()
    assert same(mine[0], theirs[0])
    assert mine[1] == theirs[1]


def spoilt(change):
    allocator = train(in_place(), 5)
    tensors, state = allocator.state_dict()
    tensors, state = dict(tensors), copy.deepcopy(state)
    change(tensors, state)
    return tensors, state


A = "exp_avg_ipt.model.layers.0.self_attn.q_proj.lora_A.default"
E = "model.layers.0.self_attn.q_proj.lora_E.default"
SPOILT = [
    (lambda t, s: t.pop("step"), "holds no step"),
    (lambda t, s: t.pop(A), "of another adapter: 1 of its tensors.*exp_avg_ipt"),
    (lambda t, s: t.update({A: t[A][:, :3]}), "of another size: exp_avg_ipt.*is \\(6, 3\\)"),
    (lambda t, s: t.update({A: t[A] * torch.nan}), "state is damaged"),
    (lambda t, s: s.update(rank_pattern={}), "rank_pattern does not name our ranks"),
    (lambda t, s: s["rank_pattern"].update({E: [True]}), "rank_pattern does not name"),
    (lambda t, s: s.pop("schedule"), "names no schedule: None"),
    (lambda t, s: s["schedule"].update(tinit=1), "tinit is 1 there and 2 in this run"),
    (lambda t, s: (t.update(step=torch.tensor(10)), s.update(rank_pattern=None)), "names no ranks"),
]


@pytest.mark.parametrize(("change", "words"), SPOILT, ids=[words for _, words in SPOILT])
def test_a_state_of_another_run_is_refused_and_changes_nothing(change, words):
    tensors, state = spoilt(change)
    allocator = allocator_of(in_place(), TOTAL)
    before = allocator.state_dict()
    with pytest.raises(BadCheckpoint, match=words):
        allocator.load_state_dict(tensors, state)
    assert same(before[0], allocator.state_dict()[0])
    assert before[1] == allocator.state_dict()[1]


def test_another_number_of_steps_is_noted():
    tensors, state = train(in_place(), 5).state_dict()
    allocator = allocator_of(in_place(), 20)
    allocator.load_state_dict(tensors, state)
    assert "planned for 12 steps" in allocator.notes[-1]
    assert allocator.state_dict()[1]["schedule"]["total_step"] == 20


# --- as a plain LoRA -------------------------------------------------------------------------


def outputs_by_peft(base, folder):
    judge = peft.PeftModel.from_pretrained(base, folder)
    assert type(judge.base_model).__name__ == "LoraModel"
    return judge


@pytest.mark.parametrize("make", [in_place, wrapped])
def test_plain_peft_computes_the_same_from_the_exported_folder(make, tmp_path):
    host = make()
    allocator = train(host)
    folder = allocator.export(tmp_path / "plain")
    judge = outputs_by_peft(tiny("llama"), folder)
    error = (logits(bare(judge)) - logits(bare(host))).abs().max()
    assert error < 1e-6  # of logits up to 3: float32, one rounding of B
    assert (logits(bare(host)) - logits(tiny("llama"))).abs().max() > 1e-3
    ranks = {n: m.r["default"] for n, m in tuner_layers(bare(judge)).items()}
    assert ranks == {n: r for n, r in allocator.ranks.items() if r}
    assert sum(ranks.values()) == 3 * LAYERS
    assert {m.scaling["default"] for m in tuner_layers(bare(judge)).values()} == {11 / 6}


def test_the_exported_update_is_that_of_the_layer_with_its_odd_divisor():
    host = in_place()
    train(host)
    host.double()
    component = plain_lora(host).components["model"]
    for path, factors in component.targets.items():
        update = component.scaling(path) * factors["lora_B"] @ factors["lora_A"]
        expected = host.get_submodule(path).get_delta_weight("default")  # over rank + 1e-5
        # float64; peft's own rank + 1e-5 is float32
        assert torch.allclose(update, expected, rtol=1e-7, atol=0)


def test_the_exported_adapter_is_a_sound_record(tmp_path):
    host = in_place()
    train(host)
    adapter = plain_lora(host)
    assert adapter.info["components"]["model"]["method"] == "LORA"
    assert adapter.info["host"] == "LlamaForCausalLM"
    read = open_adapter(save_adapter(adapter, tmp_path / "x"))
    assert read.digest == adapter.digest
    assert not read.repairs
    assert read.manifest.base.fingerprints


def test_layers_without_a_rank_are_left_out_and_not_targeted(tmp_path):
    host = in_place()
    layers = tuner_layers(host)
    with torch.no_grad():
        for number, layer in enumerate(layers.values()):
            layer.lora_E["default"][: 2 * number] = 1.0
    adapter = plain_lora(host)
    ranks = [len(f["lora_A"]) for f in adapter.components["model"].targets.values()]
    assert ranks == [2, 4, 6]
    folder = save_adapter(adapter, tmp_path / "x")
    judge = outputs_by_peft(tiny("llama"), folder)
    assert list(tuner_layers(bare(judge))) == list(layers)[1:]
    error = (logits(bare(judge)) - logits(host)).abs().max()
    assert error < 1e-6  # of logits up to 3


def test_heads_come_along_and_a_negative_alpha_is_pefts(tmp_path):
    torch.manual_seed(0)
    model = tiny("llama", task="classifier")
    setting = config(lora_alpha=5, init_r=7, target_r=2)
    attach_lora(model, config=setting)
    train(model)
    folder = save_adapter(plain_lora(model), tmp_path / "x")
    judge = outputs_by_peft(tiny("llama", task="classifier"), folder)
    assert (logits(bare(judge)) - logits(model)).abs().max() < 1e-6  # float32
    weight = next(p for n, p in judge.named_parameters() if "score.modules_to_save" in n)
    assert torch.equal(weight, model.score.modules_to_save["default"].weight)


def test_linears_of_gpt2_and_convolutions_are_exported_too(tmp_path):
    torch.manual_seed(0)
    model = attach_lora(tiny("gpt2"), config=config(target_modules=["c_attn", "c_fc"]))
    train(model)
    folder = save_adapter(plain_lora(model), tmp_path / "gpt2")
    judge = outputs_by_peft(tiny("gpt2"), folder)
    assert (logits(bare(judge)) - logits(model)).abs().max() < 1e-6  # float32

    def convolutions(**options):
        torch.manual_seed(1)
        return nn.ModuleDict({"kernel": nn.Conv2d(3, 4, 3, stride=2, padding=1, **options)})

    def forward(model):
        return model.kernel(torch.arange(3 * 64.0).reshape(1, 3, 8, 8) / 64)

    host = attach_lora(convolutions(), config=config(target_modules=["kernel"]))
    host.kernel.lora_E["default"].data[::2] = 1.0
    folder = save_adapter(plain_lora(host), tmp_path / "conv")
    judge = bare(outputs_by_peft(convolutions(), folder))
    assert judge.kernel.r["default"] == 3
    assert torch.allclose(forward(judge), forward(host), rtol=1e-5, atol=1e-6)  # float32
    assert not torch.allclose(forward(host), forward(convolutions()), atol=1e-4)
    host = attach_lora(convolutions(dilation=2), config=config(target_modules=["kernel"]))
    host.kernel.lora_E["default"].data.fill_(1.0)
    with pytest.raises(UnsupportedTarget, match="kernel has no equal as a LoRA: peft leaves the"):
        plain_lora(host)


def test_folding_a_diagonal_keeps_the_product_and_drops_zeros():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(5, 7, generator=generator, dtype=torch.float64)
    b = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    e = torch.tensor([[0.5], [0.0], [-2.0], [0.0], [1e-20]], dtype=torch.float64)
    plain_a, plain_b = fold_diagonal(a, e, b, factor=3.0)
    assert plain_a.shape == (3, 7)
    assert torch.equal(plain_a, a[[0, 2, 4]])
    expected = 3.0 * b @ torch.diag(e.flatten()) @ a
    assert torch.allclose(plain_b @ plain_a, expected, rtol=1e-14, atol=1e-30)  # float64
    half = fold_diagonal(a.half(), e.half(), b.half(), factor=3.0)
    assert {t.dtype for t in half} == {torch.float16}


def test_what_is_no_adalora_cannot_be_exported():
    with pytest.raises(InvalidOption, match="of the method LORA, and this is for AdaLoRA"):
        plain_lora(attach_lora(tiny("llama"), rank=4))
    with pytest.raises(InvalidOption, match="all singular values of adapter 'default' are zero"):
        plain_lora(in_place())
    with pytest.raises(AdapterNotFound, match="no adapter 'other'"):
        plain_lora(in_place(), "other")
    with pytest.raises(MetaHost):
        plain_lora(in_place(tiny("llama", meta=True)))


# --- bad input -------------------------------------------------------------------------------

WRONG = [
    ({"tinit": 9}, TOTAL, "of 12 steps AdaLoRA would warm up for tinit=9 and end with tfinal=3"),
    ({}, 5, "of 5 steps AdaLoRA would warm up"),
    ({"tinit": 0, "tfinal": 0}, 1, "which leaves none to allocate in"),
    ({"target_r": 7}, TOTAL, "target_r is 7, above init_r 6"),
    ({"target_r": 0}, TOTAL, "target_r=0 of the AdaLoraConfig is no whole number from 1"),
    ({"deltaT": 0}, TOTAL, "deltaT=0"),
    ({"tinit": 0.1}, TOTAL, "tinit=0.1"),
    ({"beta1": 1.0}, TOTAL, "beta1=1.0 of the AdaLoraConfig is not between 0 and 1"),
    ({}, 0, "total_steps=0 is no positive whole number"),
    ({}, 2.5, "total_steps=2.5"),
]


@pytest.mark.parametrize(("changes", "total", "words"), WRONG, ids=[w for *_, w in WRONG])
def test_a_schedule_that_cannot_be_is_an_error_before_the_run(changes, total, words):
    model = in_place(total_step=50)
    for name, value in changes.items():
        setattr(model.peft_config["default"], name, value)
    with pytest.raises(TrainingError, match=words):
        allocator_of(model, total)
    assert model.peft_config["default"].total_step == 50


def test_a_step_without_gradients_is_an_error():
    allocator = allocator_of(in_place(), TOTAL)
    with pytest.raises(TrainingError, match="no factor of adapter 'default' has a gradient"):
        allocator.step(1)


def test_steps_that_were_left_out_are_an_error():
    host = in_place()
    allocator = allocator_of(host, TOTAL)
    host(**tiny_batch(host)).loss.backward()
    with pytest.raises(TrainingError, match="no ranks were chosen before step 10"):
        allocator.step(10)


def test_lora_optimizer_trains_adalora_as_adamw_does():
    host, judge = in_place(), in_place()
    train(host, optimizer=lora_optimizer(host, lr=1e-2))
    train(
        judge,
        optimizer=torch.optim.AdamW(
            [p for p in judge.parameters() if p.requires_grad], lr=1e-2, weight_decay=0
        ),
    )
    assert same(values(host), values(judge))
