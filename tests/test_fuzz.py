"""Files damaged at random, always the same ones here; `make fuzz` draws others, and many more."""

import json
import pkgutil
import tracemalloc
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from hf_lora import open_adapter
from hf_lora.errors import LoraError
from tests.fuzz import main
from tests.fuzz_damage import cases
from tests.fuzz_files import GOOD, MANIFEST, PREFIX, STATED, case_of, draft_of
from tests.fuzz_oracle import Fault, checked
from tests.fuzz_patterns import PLACES, check_place, compiled, expressions


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(autouse=True)
def _quiet():
    """The hosts and good files are made by whatever test comes first."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("foreign", [False, True])
@pytest.mark.parametrize("good", GOOD)
def test_what_is_not_damaged_loads(good, foreign, folder):
    assert checked(case_of(good, draft_of(good, foreign)), folder) == "loaded"


@settings(
    max_examples=500,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
@given(case=cases())
def test_damaged_files_load_right_or_are_refused(folder, case):
    checked(case, folder)


def test_no_expression_of_a_file_is_run(folder):
    places = list(PLACES)
    for number, evil in enumerate(expressions(1000, seed=0)):
        check_place(places[number % len(places)], number % 3 == 0, evil, folder)


def test_the_watch_on_expressions_sees_them():
    import re

    with compiled() as seen:
        re.fullmatch("zqj(a)", "x")
        re.compile("zqj(b)").search("x")
    assert seen.count("zqj(a)") >= 1
    assert "zqj(b)" in seen


def _configs(draft, **fields):
    for _, config in draft.documents():
        if "peft_type" in config:
            config.update(fields)


def _stated(draft, **fields):
    draft.metadata[STATED] |= {f"unet.{name}": value for name, value in fields.items()}


def _manifest(draft, **fields):
    draft.metadata[MANIFEST]["configs"]["unet"].update(fields)


def _respelt_twice(draft):
    """Both spellings of a module, neither of them the host's."""
    held = {n.removeprefix(f"{PREFIX}model."): t for n, t in draft.tensors.items()}
    other = {f"language_model.{n}": t + 1 for n, t in held.items() if "layers.1.mlp.up" in n}
    draft.tensors = held | other


def _cast(draft, mark, dtype):
    name = _first(draft, mark)
    draft.tensors[name] = draft.tensors[name].to(dtype)


def _narrowed(draft, mark):
    """A file that fits by its names only, so that its load fails late."""
    name = _first(draft, mark)
    draft.tensors[name] = draft.tensors[name][:, :5]


def _first(draft, mark):
    return next(n for n in draft.tensors if mark in n)


def _cut_to_rank_0(draft):
    name = _first(draft, "q_proj.lora_A")
    other = name.replace("lora_A", "lora_B")
    draft.tensors[name] = draft.tensors[name][:0]
    draft.tensors[other] = draft.tensors[other][:, :0]


def _renamed(draft, new):
    draft.tensors[new] = draft.tensors.pop(_first(draft, "lora_A"))


# What the fuzz found: good file, foreign, the damage, what must become of it.
FOUND = [
    ("pipeline", True, lambda d: _stated(d, lora_dropout=4), "BadAdapterFile"),
    ("pipeline", True, lambda d: _narrowed(d, "to_q.lora_A"), "AdapterMismatch"),
    ("pipeline", False, lambda d: _stated(d, alpha_pattern=0.5), "loaded"),
    ("pipeline", False, lambda d: _stated(d, lora_alpha=10**400), "loaded"),
    ("pipeline", False, lambda d: _manifest(d, peft_type=False), "BadAdapterFile"),
    ("pipeline", True, lambda d: _stated(d, target_modules=[]), "AdapterMismatch"),
    ("loha", True, lambda d: _configs(d, alpha_pattern=[1]), "BadAdapterFile"),
    ("loha", True, lambda d: _configs(d, rank_pattern={"q_proj": "4"}), "BadAdapterFile"),
    ("loha", True, lambda d: _configs(d, alpha_pattern={"q_proj": 1e30}), "BadAdapterFile"),
    ("loha", True, lambda d: _configs(d, r=10**400), "BadAdapterFile"),
    ("loha", True, lambda d: _configs(d, layers_to_transform="null"), "BadAdapterFile"),
    ("patterns", True, lambda d: _configs(d, layers_to_transform=""), "loaded"),
    ("patterns", True, lambda d: _configs(d, layers_to_transform=False), "BadAdapterFile"),
    ("patterns", True, lambda d: _configs(d, velora_config={}), "loaded"),
    ("patterns", True, lambda d: _configs(d, trainable_token_indices={"a+": []}), "BadAdapterFile"),
    ("patterns", True, lambda d: d.metadata.update({"\ud800": ""}), "BadAdapterFile"),
    ("patterns", True, lambda d: _configs(d, revision="\ud800"), "BadAdapterFile"),
    ("patterns", True, lambda d: _renamed(d, f"{PREFIX}q\0.lora_A.weight"), "BadAdapterFile"),
    ("patterns", True, lambda d: _renamed(d, f"{PREFIX}q.lora_A{'.x' * 5000}"), "BadAdapterFile"),
    ("ia3", True, _respelt_twice, "AdapterMismatch"),
    ("embedding", True, lambda d: _cast(d, "base_layer", torch.int64), "AdapterMismatch"),
    ("embedding", True, lambda d: _cast(d, "base_layer", torch.bfloat16), "loaded"),
    ("experts", True, _cut_to_rank_0, "AdapterMismatch"),
]


@pytest.mark.parametrize(("good", "foreign", "damage", "outcome"), FOUND)
def test_what_the_fuzz_found_stays_found(good, foreign, damage, outcome, folder):
    draft = draft_of(good, foreign)
    damage(draft)
    assert checked(case_of(good, draft, restate=True), folder) == outcome


def _also(real, then):
    def both(*args, **kwargs):
        result = real(*args, **kwargs)
        then(*args)
        return result

    return both


def _zero_head(model, *_):
    model.lm_head.weight.data.zero_()


# What the oracle must see: what is done to hf_lora, where, in which damage, and what it is called.
PLANTED = [
    ("slots.Slot.put", lambda real: lambda s, t, **k: real(s, t.bfloat16(), **k), "wrong load"),
    ("adapter.Component.alpha", lambda real: lambda s, p: 2 * real(s, p), "wrong load"),
    ("load.fill", lambda real: _also(real, _zero_head), "wrong load"),
    ("load._check_scaling", lambda real: lambda *_: {}["r"], "raw error"),
    ("record.Snapshot.restore", lambda real: lambda _: None, "changed host"),
]


@pytest.mark.parametrize(("where", "make", "kind"), PLANTED)
def test_the_oracle_sees_a_planted_fault(where, make, kind, folder, monkeypatch):
    draft = draft_of("patterns", True)
    if kind == "changed host":
        _narrowed(draft, "q_proj.lora_A")
    module, _, attribute = where.rpartition(".")
    holder = pkgutil.resolve_name(f"hf_lora.{module}")
    monkeypatch.setattr(holder, attribute, make(getattr(holder, attribute)))
    with pytest.raises(Fault) as caught:
        checked(case_of("patterns", draft), folder)
    assert caught.value.kind == kind


def _header(text):
    raw = text.encode()
    return len(raw).to_bytes(8, "little") + raw


N = 50_000
LARGE = {
    "lists": '{"a":[' + ",".join(["[]"] * N) + "]}",
    "objects": '{"a":[' + ",".join(["{}"] * N) + "]}",
    "numbers": '{"a":[' + ",".join(["1000"] * N) + "]}",
    "names": "{" + ",".join(f'"{i}":0' for i in range(N)) + "}",
    "metadata": '{"__metadata__":{' + ",".join(f'"{i}":""' for i in range(N)) + "}}",
    "manifest": '{"__metadata__":{"hf_lora":' + json.dumps("[" + ",".join(["[]"] * N)) + "}}",
    "depth": '{"a":' + "[" * N + "]" * N + "}",
}


@pytest.mark.parametrize("what", LARGE)
def test_a_header_takes_memory_in_proportion_to_its_size(what, tmp_path):
    data = _header(LARGE[what])
    (tmp_path / "adapter_model.safetensors").write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(LoraError):
            open_adapter(tmp_path)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # CPython 3.11 takes 64 bytes and a pointer for the two letters of an empty object
    assert most <= 40 * len(data) + (1 << 20)


def test_the_script_counts_and_fails_on_a_fault(monkeypatch, capsys):
    def wrong(case, folder):
        raise Fault("raw error", "KeyError: 'r'", case)

    monkeypatch.setattr("tests.fuzz.EXPRESSIONS", 1)
    assert main(["--cases", "3"]) == 0
    assert "raw error                  0" in capsys.readouterr().out
    monkeypatch.setattr("tests.fuzz.checked", wrong)
    assert main(["--cases", "3"]) == 1
    assert "raw error                  3" in capsys.readouterr().out
