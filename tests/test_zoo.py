"""One family of each kind goes through everything; `make golden` puts the whole zoo through it."""

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest

from hf_lora import attach_lora, save_lora
from tests import zoo, zoo_denoisers, zoo_senses, zoo_text
from tests.support import randomise
from tests.zoo import ZOO, check

DOZEN = (
    "gpt_neox",
    "gpt_oss",
    "mamba2",
    "modernbert",
    "t5",
    "swin",
    "qwen2_vl",
    "whisper",
    "sd",
    "sd3",
    "flux2",
    "kandinsky5",
)


@pytest.mark.parametrize("family", DOZEN)
def test_a_family_trains_saves_loads_and_detaches(family):
    assert check(ZOO[family]) == []


def test_the_dozen_has_every_kind():
    assert {ZOO[family].kind for family in DOZEN} == {row.kind for row in ZOO.values()}


def test_the_zoo_is_large_and_names_no_family_twice():
    tables = (zoo_text.ROWS, zoo_senses.ROWS, zoo_denoisers.ROWS)
    kinds = Counter(row.kind for row in ZOO.values())
    assert len(ZOO) == sum(map(len, tables)) >= 80
    assert kinds["dit"] >= 15


def test_exceptions_that_are_not_true_are_failures():
    reason = "a test"
    row = replace(ZOO["gpt_neox"], silent={r".*\.0\..*dense": reason, "layers": reason})
    failures = check(row)
    place = "gpt_neox.layers.0.attention.dense"
    assert f"train: lora_B of {place} has a gradient and is listed as silent" in failures
    assert "train: no target matches the silent 'layers'" in failures


def test_a_matrix_without_a_gradient_is_a_failure():
    last = "transformer_blocks.1.attn.add_q_proj"
    assert check(replace(ZOO["sd3"], silent={})) == [
        f"train: lora_B of {last} gets no gradient",
        f"train: lora_A of {last} gets no gradient",
    ]


def _attach_less(model):
    attach_lora(model, targets=["query_key_value"])


def _save_another(model, folder):
    save_lora(randomise(model, seed=6), folder)


@pytest.mark.parametrize(
    ("name", "wrong", "steps"),
    [
        ("attach_lora", _attach_less, {"attach"}),
        ("save_lora", _save_another, {"peft", "load"}),
        ("load_lora", lambda *_: SimpleNamespace(verified=False, base=""), {"load"}),
        ("detach_lora", lambda model: model, {"detach"}),
    ],
)
def test_what_is_wrong_is_seen_where_it_happens(name, wrong, steps, monkeypatch):
    monkeypatch.setattr(zoo, name, wrong)
    assert {line.partition(":")[0] for line in check(ZOO["gpt_neox"])} == steps


def test_a_model_that_cannot_be_built_is_a_line_and_not_an_exception():
    (failure,) = check(replace(ZOO["t5"], model="NoSuchModel"))
    assert failure.startswith("build: AttributeError")
