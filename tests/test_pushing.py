"""Checkpoints on the Hub: beside the training, never in its way."""

import json
import threading

import pytest
from transformers import Trainer

from hf_lora import LoraCallback, LoraTrainer, attach_lora, open_adapter, pull_lora, save_lora
from hf_lora.errors import InvalidOption
from hf_lora.testing import tiny
from hf_lora.training.pushing import Pusher
from tests.runs import assert_equal, factors, trainer
from tests.support import randomise

REPO = "ann/style"
COMMIT = "POST /api/models/ann/style/commit/"


def run(kind, out, push_to=REPO, **changes):
    made = trainer(kind, out, callbacks=[LoraCallback(push_to=push_to)], **changes)
    made.train()
    report = json.loads((out / "report.json").read_text())
    return made, report


@pytest.mark.parametrize("kind", [Trainer, LoraTrainer])
def test_checkpoints_are_pushed_and_the_last_one_is_what_the_run_ends_with(hub, tmp_path, kind):
    made, report = run(kind, tmp_path / "a")
    outcomes = report["pushed"]["outcomes"]
    titles = [commit.title for commit in hub.commits(REPO)[:-1]]
    pushed = {outcome["commit"] for outcome in outcomes}
    assert pushed == {commit.oid for commit in hub.commits(REPO)[:-1]}
    assert set(titles) <= {f"The adapter at step {step}" for step in (3, 6, 9, 12)}
    assert titles[0] == "The adapter at step 12"
    last = save_lora(made.model, tmp_path / "last")
    assert pull_lora(REPO).digest == open_adapter(last).digest
    plain = trainer(kind, tmp_path / "b")
    plain.train()
    assert_equal(factors(plain.model), factors(made.model))  # pushing has changed nothing


def test_the_card_holds_the_runs_facts_and_its_last_evaluation(hub, tmp_path):
    made, _ = run(LoraTrainer, tmp_path, eval_strategy="steps", eval_steps=6)
    held_out = [row["eval_loss"] for row in made.state.log_history if "eval_loss" in row][-1]
    training = pull_lora(REPO).manifest.training
    assert training["eval_loss"] == held_out
    assert training["steps"] == 12
    card = hub.files(REPO)["README.md"].decode()
    assert f"{held_out:.4g}"[:5] in card
    assert "| steps | 12 |" in card


def test_no_failure_of_the_hub_reaches_the_training(hub, tmp_path, caplog):
    hub.fail(500, times=10_000)
    made, report = run(LoraTrainer, tmp_path / "a")
    assert made.state.global_step == 12
    assert all("error" in outcome for outcome in report["pushed"]["outcomes"])
    plain = trainer(LoraTrainer, tmp_path / "b")
    plain.train()
    assert_equal(factors(plain.model), factors(made.model))


@pytest.mark.parametrize("name", ["style", "a/b/c", "ann/..", 3])
def test_a_name_that_is_no_repository_is_told_at_once(name):
    with pytest.raises(InvalidOption, match="push_to=.* is no repository id"):
        LoraCallback(push_to=name)


def test_one_push_at_a_time_and_the_newest_next(hub, tmp_path):
    adapters = [
        open_adapter(save_lora(randomise(attach_lora(tiny("llama"), rank=2), n), tmp_path / str(n)))
        for n in range(4)
    ]
    begun, go_on = threading.Event(), threading.Event()

    def hold():
        begun.set()
        assert go_on.wait(30)

    hub.before(COMMIT, hold)
    pusher = Pusher(REPO)
    pusher.offer(adapters[0], 0)
    assert begun.wait(30)
    for step in (1, 2, 3):
        pusher.offer(adapters[step], step)  # returns at once, though the first is held
    assert len(hub.commits(REPO)) == 1
    go_on.set()
    pusher.wait()
    assert [outcome["step"] for outcome in pusher.outcomes] == [0, 3]
    assert pull_lora(REPO).digest == adapters[3].digest


def test_a_checkpoint_that_cannot_be_read_is_told(hub, tmp_path):
    pusher = Pusher(REPO)
    pusher.offer_checkpoint(tmp_path, 3)
    pusher.wait()
    assert pusher.outcomes[0]["step"] == 3
    assert "error" in pusher.outcomes[0]
