"""`LoraTrainer`: adapter-only checkpoints, exact resumes, the best model at the end."""

import json
import math
import shutil

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
    set_seed,
)

from hf_lora import (
    BadCheckpoint,
    TrainingError,
    attach_lora,
    load_lora,
    open_adapter,
    set_adapters,
)
from hf_lora.testing import tiny
from hf_lora.training.checkpoints import MARKER, checked
from hf_lora.training.keep import STATE, kept_state
from hf_lora.training.trainer import LoraTrainer, LoraTrainerMixin
from tests.runs import arguments, assert_equal, factors, model, rows, trainer
from tests.support import logits


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run that nothing interrupts: its folder and its trained factors."""
    out = tmp_path_factory.mktemp("whole")
    run = trainer(LoraTrainer, out)
    run.train()
    return out, factors(run.model), run


def interrupted(whole, tmp_path, *, after):
    """Copies the run as it was when its checkpoint at step `after` had just been saved."""
    out = tmp_path / "run"
    out.mkdir()
    for folder in whole[0].glob("checkpoint-*"):
        if int(folder.name.rpartition("-")[2]) <= after:
            shutil.copytree(folder, out / folder.name)
    return out


def test_a_run_is_the_one_that_plain_trainer_makes(whole, tmp_path):
    plain = trainer(Trainer, tmp_path, save_strategy="no")
    plain.train()
    assert_equal(whole[1], factors(plain.model))


def test_a_checkpoint_holds_the_adapter_and_never_the_base(whole):
    folder = whole[0] / "checkpoint-12"
    names = {path.name for path in folder.iterdir()}
    assert names >= {"adapter_model.safetensors", "adapter_config.json", "optimizer.pt", MARKER}
    assert not names & {"model.safetensors", "pytorch_model.bin"}
    assert open_adapter(folder).digest == json.loads((folder / MARKER).read_text())["adapter"]
    assert open_adapter(folder).manifest.training["steps"] == 12


@pytest.mark.parametrize("after", [3, 6, 9])
def test_a_resumed_run_ends_with_the_same_bits(whole, tmp_path, after):
    out = interrupted(whole, tmp_path, after=after)
    run = trainer(LoraTrainer, out)
    run.train(resume_from_checkpoint=True)
    assert run.state.global_step == 12
    assert_equal(whole[1], factors(run.model))
    assert (
        open_adapter(out / "checkpoint-12").digest
        == open_adapter(whole[0] / "checkpoint-12").digest
    )


def test_a_resume_writes_into_the_parameters_that_are_there(whole, tmp_path):
    out = interrupted(whole, tmp_path, after=6)
    host = model()
    mine = [p for p in host.parameters() if p.requires_grad]
    # the two groups that Trainer makes, with and without weight decay
    optimizer = torch.optim.AdamW([{"params": mine}, {"params": []}], lr=1e-2, weight_decay=0.0)
    before = {id(p) for p in host.parameters()}
    run = trainer(LoraTrainer, out, host=host, optimizers=(optimizer, None))
    run.train(resume_from_checkpoint=True)
    assert {id(p) for p in host.parameters()} == before
    assert_equal(whole[1], factors(host))


def test_a_checkpoint_of_another_optimizer_is_refused(whole, tmp_path):
    out = interrupted(whole, tmp_path, after=6)
    host = model()
    optimizer = torch.optim.SGD([p for p in host.parameters() if p.requires_grad], lr=1e-2)
    run = trainer(LoraTrainer, out, host=host, optimizers=(optimizer, None))
    with pytest.raises(BadCheckpoint, match="optimizer does not fit"):
        run.train(resume_from_checkpoint=True)
    # with groups of the same size, torch would find out at the first step, by a KeyError
    run = trainer(LoraTrainer, out, optim="sgd")
    with pytest.raises(BadCheckpoint, match="it has no dampening, momentum"):
        run.train(resume_from_checkpoint=True)


BROKEN = {
    "no optimizer": lambda f: (f / "optimizer.pt").unlink(),
    "no random states": lambda f: (f / "rng_state.pth").unlink(),
    "no schedule": lambda f: (f / "scheduler.pt").unlink(),
    "no state": lambda f: (f / "trainer_state.json").unlink(),
    "no adapter": lambda f: (f / "adapter_model.safetensors").unlink(),
    "empty config": lambda f: (f / "adapter_config.json").write_bytes(b""),
    "short optimizer": lambda f: (f / "optimizer.pt").write_bytes(
        (f / "optimizer.pt").read_bytes()[:1000]
    ),
    "one bit of the random states": lambda f: (f / "rng_state.pth").write_bytes(
        bytes([(f / "rng_state.pth").read_bytes()[0] ^ 1]) + (f / "rng_state.pth").read_bytes()[1:]
    ),
    "marked incomplete": lambda f: (f / MARKER).write_text('{"format": 1, "complete": false}'),
    "damaged marker": lambda f: (f / MARKER).write_text("{"),
    "empty folder": lambda f: [path.unlink() for path in f.iterdir()],
}


@pytest.mark.parametrize("damage", BROKEN)
def test_a_broken_newest_checkpoint_is_passed_over_for_the_newest_complete_one(
    whole, tmp_path, damage
):
    out = interrupted(whole, tmp_path, after=9)
    BROKEN[damage](out / "checkpoint-9")
    run = trainer(LoraTrainer, out)
    began = []

    class Witness(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            began.append(state.global_step)

    run.add_callback(Witness())
    run.train(resume_from_checkpoint=True)
    assert began == [6]
    assert_equal(whole[1], factors(run.model))


@pytest.mark.parametrize("damage", BROKEN)
def test_a_broken_checkpoint_named_by_its_path_is_an_error_and_changes_nothing(
    whole, tmp_path, damage
):
    out = interrupted(whole, tmp_path, after=9)
    BROKEN[damage](out / "checkpoint-9")
    run = trainer(LoraTrainer, out)
    before = factors(run.model)
    with pytest.raises(BadCheckpoint) as caught:
        run.train(resume_from_checkpoint=str(out / "checkpoint-9"))
    assert "checkpoint-9" in str(caught.value)
    assert_equal(before, factors(run.model))


@pytest.mark.parametrize(
    ("damage", "what"),
    [("no optimizer", "optimizer"), ("no random states", "random"), ("short optimizer", "optim")],
)
def test_a_plain_trainers_checkpoint_is_checked_without_a_marker(whole, tmp_path, damage, what):
    out = interrupted(whole, tmp_path, after=9)
    (out / "checkpoint-9" / MARKER).unlink()
    BROKEN[damage](out / "checkpoint-9")
    with pytest.raises(BadCheckpoint, match=what):
        trainer(LoraTrainer, out).train(resume_from_checkpoint=str(out / "checkpoint-9"))


def test_a_damaged_header_of_an_archive_is_named_without_a_marker(whole, tmp_path):
    folder = interrupted(whole, tmp_path, after=3) / "checkpoint-3"
    (folder / MARKER).unlink()
    content = bytearray((folder / "optimizer.pt").read_bytes())
    content[content.rfind(b"PK\x01\x02") + 10] = 99  # the compression of a member
    (folder / "optimizer.pt").write_bytes(content)
    with pytest.raises(BadCheckpoint, match=r"optimizer.pt cannot be read \(That compression"):
        checked(folder)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"files": {"optimizer.pt": 1}}, "is damaged: optimizer.pt is 1"),
        ({"format": 2}, "is of format 2, and this hf_lora reads format 1. Resume with the hf_lora"),
        ({"format": "1"}, "is of format '1'"),
    ],
)
def test_a_marker_that_cannot_be_followed_is_named(whole, tmp_path, fields, said):
    folder = interrupted(whole, tmp_path, after=3) / "checkpoint-3"
    assert checked(folder).step == 3
    marker = json.loads((folder / MARKER).read_text())
    (folder / MARKER).write_text(json.dumps({**marker, **fields}))
    with pytest.raises(BadCheckpoint, match=said):
        checked(folder)


@pytest.mark.parametrize(
    ("field", "state"),
    [
        ("loss_guard", {"loss_guard": [1]}),
        ("loss_guard.losses", {"loss_guard": {"losses": ["1"]}}),
        ("overfit_guard.worse", {"overfit_guard": {"worse": -1}}),
        ("overfit_guard.best", {"overfit_guard": {"best": math.inf}}),
        ("in_a_row.backs", {"in_a_row": {"backs": True}}),
        ("events", {"events": [{"step": 1}]}),
        ("adalora", {"adalora": None}),
    ],
)
def test_what_guards_left_in_a_checkpoint_is_checked_field_by_field(tmp_path, field, state):
    (tmp_path / STATE).write_text(json.dumps(state))
    with pytest.raises(BadCheckpoint, match="hf_lora_state.json is damaged") as caught:
        kept_state(tmp_path)
    assert caught.value.field == field


def test_no_complete_checkpoint_is_an_error_that_says_what_is_wrong_with_each(whole, tmp_path):
    out = interrupted(whole, tmp_path, after=6)
    for folder in out.iterdir():
        (folder / "optimizer.pt").unlink()
    with pytest.raises(BadCheckpoint, match=r"checkpoint-6: optimizer.pt is missing; checkpoint-3"):
        trainer(LoraTrainer, out).train(resume_from_checkpoint=True)
    with pytest.raises(BadCheckpoint, match="no complete checkpoint"):
        trainer(LoraTrainer, tmp_path / "new").train(resume_from_checkpoint=True)


def test_weights_alone_are_no_checkpoint_to_resume_from(tmp_path):
    run = trainer(LoraTrainer, tmp_path, save_only_model=True)
    run.train()
    with pytest.raises(BadCheckpoint, match="lacks the optimizer"):
        trainer(LoraTrainer, tmp_path).train(resume_from_checkpoint=True)


OTHERS = {
    "rank": (lambda: model(rank=8), "r is 16 there and 8"),
    "alpha": (lambda: model(alpha=11), "lora_alpha is 32 there and 11"),
    "targets": (lambda: model(targets="attention"), "target_modules"),
    "kind": (lambda: model(config=LoraConfig(r=16, lora_alpha=32, use_dora=True)), "use_dora"),
    "base": (lambda: attach_lora(tiny("llama", seed=5), dropout=0.1), "another base"),
    "family": (lambda: model("qwen3"), "saved on LlamaForCausalLM"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_checkpoint_of_another_adapter_or_base_is_refused(whole, tmp_path, other):
    make, said = OTHERS[other]
    host = make()
    before = factors(host)
    run = trainer(LoraTrainer, tmp_path, host=host)
    with pytest.raises(BadCheckpoint, match=said):
        run.train(resume_from_checkpoint=str(whole[0] / "checkpoint-6"))
    assert_equal(before, factors(host))


def test_the_best_model_is_loaded_at_the_end(tmp_path):
    # random rows say nothing of other random rows, so the last steps are not the best
    best_of = {"eval_strategy": "steps", "eval_steps": 3, "load_best_model_at_end": True}
    run = trainer(LoraTrainer, tmp_path, **best_of)
    run.train()
    best = run.state.best_model_checkpoint
    losses = [row["eval_loss"] for row in run.state.log_history if "eval_loss" in row]
    assert min(losses) < losses[-1]
    assert run.evaluate()["eval_loss"] == min(losses) == run.state.best_metric
    fresh = tiny("llama")
    load_lora(fresh, best)
    assert torch.equal(logits(fresh), logits(run.model))


def test_old_checkpoints_go_and_the_best_and_the_newest_stay(tmp_path):
    run = trainer(
        LoraTrainer,
        tmp_path,
        save_total_limit=2,
        eval_strategy="steps",
        eval_steps=3,
        load_best_model_at_end=True,
    )
    run.train()
    best = f"checkpoint-{run.state.best_global_step}"
    assert best in ("checkpoint-3", "checkpoint-6")
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-12", best}
    saved = torch.load(tmp_path / "checkpoint-12" / "training_args.bin", weights_only=False)
    assert saved.save_total_limit == run.args.save_total_limit == 2


def test_an_incomplete_checkpoint_is_removed_before_a_complete_one(whole, tmp_path):
    out = interrupted(whole, tmp_path, after=9)
    (out / "checkpoint-9").rename(out / "checkpoint-20")
    (out / "checkpoint-20" / "optimizer.pt").unlink()
    (out / "checkpoint-20" / MARKER).write_text('{"complete": false}')
    trainer(LoraTrainer, out, max_steps=7, save_steps=7, save_total_limit=2).train(
        resume_from_checkpoint=True
    )
    assert sorted(p.name for p in out.glob("checkpoint-*")) == ["checkpoint-6", "checkpoint-7"]


@pytest.mark.parametrize("config", [{"targets": "qv"}, {"config": LoraConfig(use_dora=True)}])
def test_fused_parts_and_dora_resume_to_the_bit(tmp_path, config):
    """A LoRA on parts of GPT-2's fused projection holds blocks, which the optimizer must keep."""
    first = trainer(LoraTrainer, tmp_path / "a", host=model("gpt2", **config))
    first.train()
    shutil.copytree(tmp_path / "a" / "checkpoint-6", tmp_path / "b" / "checkpoint-6")
    host = model("gpt2", **config)
    ids = {id(p) for p in host.parameters()}
    second = trainer(LoraTrainer, tmp_path / "b", host=host)
    second.train(resume_from_checkpoint=True)
    assert_equal(factors(first.model), factors(second.model))
    assert {id(p) for p in host.parameters()} == ids


def test_heads_are_saved_and_restored_with_the_adapter(tmp_path):
    def run(out, **kwargs):
        set_seed(0)
        host = attach_lora(tiny("bert", task="classifier"))
        data = [{"input_ids": r["input_ids"], "labels": i % 2} for i, r in enumerate(rows())]
        made = trainer(LoraTrainer, out, host=host, data=data, judge=data[:4])
        made.train(**kwargs)
        return factors(made.model)

    first = run(tmp_path / "a")
    assert any("modules_to_save" in name for name in first)
    shutil.copytree(tmp_path / "a" / "checkpoint-6", tmp_path / "b" / "checkpoint-6")
    assert_equal(first, run(tmp_path / "b", resume_from_checkpoint=True))


def test_a_peft_model_is_trained_and_resumed_as_well(tmp_path):
    def run(out, **kwargs):
        set_seed(0)
        host = get_peft_model(tiny("llama"), LoraConfig(lora_dropout=0.1))
        made = trainer(LoraTrainer, out, host=host)
        made.train(**kwargs)
        return factors(made.model)

    first = run(tmp_path / "a")
    shutil.copytree(tmp_path / "a" / "checkpoint-6", tmp_path / "b" / "checkpoint-6")
    assert_equal(first, run(tmp_path / "b", resume_from_checkpoint=True))


def test_checkpoints_open_in_plain_peft_and_transformers(whole, tmp_path):
    base = tmp_path / "base"
    tiny("llama").save_pretrained(base)
    set_seed(0)
    host = attach_lora(AutoModelForCausalLM.from_pretrained(base))
    run = trainer(LoraTrainer, tmp_path / "run", host=host)
    run.train()
    run.save_model(str(tmp_path / "final"))
    for folder in (tmp_path / "run" / "checkpoint-12", tmp_path / "final"):
        for judge in (AutoPeftModelForCausalLM, AutoModelForCausalLM):
            assert torch.equal(logits(judge.from_pretrained(folder)), logits(run.model))


class Mixed(LoraTrainerMixin, Seq2SeqTrainer):
    """What a user writes for a trainer of their own."""


def test_the_mixin_works_with_another_trainer_class(tmp_path):
    set_seed(0)
    settings = arguments(tmp_path).to_dict()
    kept = {k: settings[k] for k in ("max_steps", "save_steps", "report_to", "use_cpu")}
    host = attach_lora(tiny("t5"))
    run = Mixed(
        host,
        Seq2SeqTrainingArguments(
            str(tmp_path), disable_tqdm=True, **kept, dataloader_pin_memory=False
        ),
        train_dataset=rows(),
    )
    run.train()
    assert open_adapter(tmp_path / "checkpoint-12").components["model"].targets


def test_hosts_that_cannot_be_trained_are_refused_by_name(tmp_path):
    with pytest.raises(TrainingError, match="no adapter"):
        trainer(LoraTrainer, tmp_path, host=tiny("llama"))
    frozen = model()
    for parameter in frozen.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(TrainingError, match="requires a gradient"):
        trainer(LoraTrainer, tmp_path, host=frozen)
    two = set_adapters(attach_lora(model(), name="second"), ["default", "second"])
    with pytest.raises(TrainingError, match="one adapter is trained at a time"):
        trainer(LoraTrainer, tmp_path, host=two)


def test_an_adapter_that_was_loaded_is_an_ancestor_of_what_it_becomes(whole, tmp_path):
    host = tiny("llama")
    first = open_adapter(whole[0] / "checkpoint-3").digest
    load_lora(host, whole[0] / "checkpoint-3", trainable=True)
    run = trainer(LoraTrainer, tmp_path, host=host)
    run.train()
    made = open_adapter(tmp_path / "checkpoint-12")
    assert made.manifest.derived_from == (first,)
    assert made.digest != first
