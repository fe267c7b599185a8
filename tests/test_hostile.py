"""Hostile input: a refusal that helps, or the right result. Never a wrong one, a hang or a trace.

Every row of `hostile_models`, `hostile_files` and `hostile_pipelines` is one file or call that is
wrong by intent or accident. `cites` says which measured case it stands for: the short name of a
table in `TABLES`, and words of the row. Those tables hold what peft 0.21.2, transformers 5.23.0 and
diffusers 0.42.1 made of such input, mostly something silently wrong, a hang, or a bare Python
error. Rows that cite `own` were added beyond them.
"""

import builtins
import contextlib
import copy
import importlib
import math
import os
import pickle
import re
import shutil
import socket
import subprocess
import sys
import tracemalloc
from collections import Counter
from dataclasses import dataclass
from functools import cache

import peft
import pytest
import torch
from peft.tuners.tuners_utils import check_target_module_exists
from torch.utils._python_dispatch import TorchDispatchMode

from hf_lora import attach_lora, load_lora, merge_lora, open_adapter, save_lora
from hf_lora.adapter import Adapter, Component
from hf_lora.errors import AdapterExists, BadAdapterFile, LoraError, MergeError
from hf_lora.formats import read_header
from hf_lora.hosts import parts_of
from hf_lora.manifest import KEY
from hf_lora.testing import component_output, tiny, tiny_pipeline
from tests import hostile_files, hostile_models, hostile_pipelines
from tests.damage import GONE, metadata
from tests.hostile_models import EVIL, EVIL_TOO
from tests.support import ALPHA, RANK, assert_same, logits, randomise, snapshot

TABLES = {
    "1.systems": "Trusted systems: what they promise, how they test",
    "1.issues": "Trusted systems: other peft issues that match what was measured",
    "2.code": "peft today: code execution",
    "2.tamper": "peft today: silent tampering, silent wrong",
    "2.hang": "peft today: hang, resource",
    "2.cryptic": "peft today: cryptic errors",
    "2.clear": "peft today: clear and right",
    "2.accepted": "peft today: accepted paths",
    "2.transaction": "peft today: transactionality",
    "2.crash": "peft today: crash safety of save",
    "3.traps": "run-time traps, measured",
    "4.goals": "goals, each with how to test it",
    "own": "added here",
}
VARIANTS = 3  # of one measured case; more of them count no further
SAMPLED = 10  # after every so many rows a good file is loaded into the same host
STEPS = 6_000_000  # function calls; a good load takes some ten thousand
MEMORY = 64 << 20  # bytes, besides thirty for each byte of the file (parsed JSON takes twenty)
ARGUMENTS = ("name", "limits", "file", "source")  # errors about these name no file
KEPT = ("tensors", "requires_grad", "training")  # of a base that an adapter is loaded on

ROWS = [
    *hostile_models.CODE,
    *hostile_models.TAMPERED,
    *hostile_models.HANGING,
    *hostile_files.CRYPTIC,
    *hostile_files.CLEAR,
    *hostile_files.PLACES,
    *hostile_files.KILLED,
    *hostile_files.GOALS,
    *hostile_files.CONTAINER,
    *hostile_files.MANIFEST,
    *hostile_pipelines.ROWS,
]

# ---------------------------------------------------------------- hosts and good files

PARTS = {
    "unet": ["to_q", "to_v", "conv_in"],
    "transformer": ["to_q", "to_v"],
    "text_encoder": ["layers.1.self_attn.q_proj"],
}


@dataclass(frozen=True)
class File:
    """A good file: the host it is for, the config of a model's adapter, and who wrote it."""

    host: str
    config: peft.PeftConfig | None = None
    ours: bool = False


def lora(**options):
    return peft.LoraConfig(**{"r": RANK, "lora_alpha": ALPHA, **options})


QV = {"target_modules": ["q_proj", "v_proj"]}

FILES = {
    "foreign": File("llama", lora(**QV)),
    "ours": File("llama", lora(**QV), ours=True),
    "dora": File("llama", lora(use_dora=True)),
    "high rank": File("llama", lora(r=40)),
    "loha": File("llama", peft.LoHaConfig(r=4, alpha=ALPHA)),
    "our loha": File("llama", peft.LoHaConfig(r=4, alpha=ALPHA), ours=True),
    "lokr": File("llama", peft.LoKrConfig(r=4, alpha=ALPHA)),
    "c3a": File("llama", peft.C3AConfig(block_size=8)),
    "ia3": File("llama", peft.IA3Config(feedforward_modules=[])),
    "head": File("bert", lora()),
    "sd": File("sd"),
    "our sd": File("sd", ours=True),
    "flux": File("flux"),
}


def named():
    model = tiny("llama")
    model.name_or_path = "mine/base"
    return model


def resized(**sizes):
    config = tiny("llama").config
    config.update(sizes)
    torch.manual_seed(0)
    return type(tiny("llama"))(config).eval()


def loaded():
    return attach_lora(tiny("llama"), rank=4, targets="mlp")


def sd_loaded():
    pipe = tiny_pipeline("sd")
    attach_lora(pipe.unet, rank=2, targets=["to_k"])
    return pipe


def sd_without_text_encoder():
    pipe = tiny_pipeline("sd")
    pipe.register_modules(text_encoder=None)
    return pipe


HOSTS = {
    "llama": lambda: tiny("llama"),
    "named": named,
    "other seed": lambda: tiny("llama", seed=1),
    "one layer": lambda: resized(num_hidden_layers=1),
    "wide": lambda: resized(hidden_size=64),
    "bf16": lambda: tiny("llama").to(torch.bfloat16),
    "training": lambda: tiny("llama").train(),
    "loaded": loaded,
    "merged": lambda: merge_lora(randomise(loaded())),
    "qwen3 other seed": lambda: tiny("qwen3", seed=1),
    "gpt2": lambda: tiny("gpt2"),
    "bert": lambda: tiny("bert", task="classifier"),
    "bert lm": lambda: tiny("bert"),
    "sd": lambda: tiny_pipeline("sd"),
    "sd other seed": lambda: tiny_pipeline("sd", seed=1),
    "sd loaded": sd_loaded,
    "sd without text encoder": sd_without_text_encoder,
    "flux": lambda: tiny_pipeline("flux"),
    "clip": lambda: tiny_pipeline("sd").text_encoder,
}


@cache
def host_named(name):
    """The one host of that name, what it is and what it gives; nothing may change it."""
    host = HOSTS[name]()
    return host, state(host), outputs(host)


def copied(host):
    """A copy of a host that a load may change."""
    if isinstance(host, torch.nn.Module):
        return copy.deepcopy(host)
    pipe = copy.copy(host)
    for name, part in parts_of(host).items():
        setattr(pipe, name, copy.deepcopy(part))
    return pipe


def models(host):
    """Component -> model; of a pipeline also those that no adapter is for, as the VAE."""
    if isinstance(host, torch.nn.Module):
        return {"model": host}
    return {n: m for n, m in host.components.items() if isinstance(m, torch.nn.Module)}


def state(host):
    """Snapshots of all models of a host, and the attributes of the host itself."""
    found = {name: snapshot(model) for name, model in models(host).items()}
    return found, {k: v for k, v in vars(host).items() if isinstance(v, str | int | None)}


def assert_unchanged(before, host):
    after = state(host)
    assert before[0].keys() == after[0].keys()
    for name in before[0]:
        assert_same(before[0][name], after[0][name])
    assert before[1] == after[1]


def outputs(host):
    """What every part of the host that an adapter may be for gives on fixed inputs."""
    if isinstance(host, torch.nn.Module) and not type(host).__name__.startswith("CLIP"):
        return [logits(host)]
    parts = parts_of(host).values()
    return [component_output(part) for part in parts if type(part).__name__ != "T5EncoderModel"]


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """Returns a function: name of a good file -> its folder."""

    @cache
    def folder(name):
        row = FILES[name]
        host = copied(host_named(row.host)[0])
        for part, model in parts_of(host).items():
            if row.config is not None:
                randomise(attach_lora(model, config=copy.deepcopy(row.config)))
            elif part in PARTS:
                randomise(attach_lora(model, rank=RANK, alpha=ALPHA, targets=PARTS[part]))
        path = save_lora(host, tmp_path_factory.mktemp("good") / "adapter")
        if not row.ours:
            metadata(**{KEY: GONE})(path)
        return path

    return folder


# ---------------------------------------------------------------- what must never happen


class Recorder:
    """Takes down what a load must never do, where an exception could be caught."""

    def __init__(self, monkeypatch):
        self.patterns, self.done = [], []
        compiled = re._compile  # every function of `re` goes through it

        def compile_noted(pattern, flags):
            self.patterns.append(pattern if isinstance(pattern, str) else "")
            return compiled(pattern, flags)

        monkeypatch.setattr(re, "_compile", compile_noted)
        for owner, name in (
            (builtins, "input"),
            (os, "system"),
            (subprocess, "Popen"),
            (pickle, "load"),
            (pickle, "loads"),
            (torch, "load"),
            (socket, "getaddrinfo"),
            (socket.socket, "connect"),
        ):
            monkeypatch.setattr(owner, name, self._refused(name))
        import_module = importlib.import_module

        def import_noted(name, package=None):
            if name.partition(".")[0] in ("planted", "os"):
                self.done.append(f"import {name}")
            return import_module(name, package)

        monkeypatch.setattr(importlib, "import_module", import_noted)

    def _refused(self, name):
        def refuse(*args, **_):
            self.done.append(f"{name}{args}")
            raise OSError(f"{name} was called")

        return refuse

    def check(self):
        assert not self.done
        assert "planted" not in sys.modules
        assert not [p for p in self.patterns if EVIL in p or EVIL_TOO in p]


@pytest.fixture
def never(monkeypatch):
    return Recorder(monkeypatch)


class Bytes(TorchDispatchMode):
    """Adds up the bytes of all tensors that operations return, those on meta left out."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, list | tuple) else [result]:
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                self.total += tensor.numel() * tensor.element_size()
        return result


@contextlib.contextmanager
def bounded(costs, file):
    """Asserts how many functions the body calls and how many bytes it asks for, in all.

    Counted, not timed. `costs` is "steps" where counting bytes would itself take too long.
    """
    calls = 0

    def count(_frame, event, _arg):
        nonlocal calls
        calls += event in ("call", "c_call")

    tensors = Bytes()
    with contextlib.ExitStack() as stack:
        if costs == "all":
            tracemalloc.start()
            stack.callback(tracemalloc.stop)
            stack.enter_context(tensors)
        if costs:
            stack.callback(sys.setprofile, None)
            sys.setprofile(count)
        yield
        sys.setprofile(None)
        peak = tracemalloc.get_traced_memory()[1] if costs == "all" else 0
    assert calls <= STEPS
    assert peak + tensors.total <= MEMORY + 30 * file


def on_disk(folder):
    """Bytes of the files of a folder, holes left out."""
    return sum(p.stat().st_blocks * 512 for p in folder.rglob("*") if p.is_file())


# ---------------------------------------------------------------- the rows


def test_the_tables_stand_for_two_hundred_measured_cases():
    assert len({row.name for row in ROWS}) == len(ROWS)
    assert all(row.cites.partition(": ")[0] in TABLES for row in ROWS)
    measured = Counter(row.cites for row in ROWS if not row.cites.startswith("own: "))
    assert sum(min(VARIANTS, count) for count in measured.values()) >= 200


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_bad_input_is_refused_with_help_or_loaded_right(row, good, never, tmp_path, monkeypatch):
    folder = shutil.copytree(good(row.file), tmp_path / "adapter")
    options = {"source": folder, **(row.damage(folder) or {})}
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if row.error is None:
        check_right(row, good(row.file), options)
    else:
        check_refused(row, folder, options)
        if ROWS.index(row) % SAMPLED == 0:
            check_good_afterwards(row, good)
    never.check()


def check_refused(row, folder, options):
    host, before, wanted = host_named(row.host or FILES[row.file].host)
    try:
        with pytest.raises(LoraError) as caught, bounded(row.costs, on_disk(folder)):
            load_lora(host, **options)
        assert_unchanged(before, host)
        assert all(map(torch.equal, outputs(host), wanted))
    except BaseException:
        host_named.cache_clear()  # for the rows that follow
        raise
    error, text = caught.value, str(caught.value)
    assert type(error) is row.error
    assert re.search(row.words, text), text
    assert error.fix
    assert len(text) < 2000
    assert error.field in text or error.field == KEY  # which messages call the manifest
    asked = error.field in ARGUMENTS or isinstance(error, AdapterExists | MergeError)
    assert asked or options["source"] != folder or str(folder) in text


def check_right(row, original, options):
    name = row.host or FILES[row.file].host
    host, before, bare = host_named(name)
    host, reference = copied(host), copied(host)
    with bounded(row.costs, on_disk(options["source"])):
        report = load_lora(host, **options)
    assert re.search(row.words, str(report)), report
    if row.like is not None:
        original = shutil.copytree(original, options["source"].parent / "like")
        row.like(original)
    load_lora(reference, original, scale=row.scale)
    # other scales and factors may differ in rounding; powers of two do not
    exact = row.like is None and math.log2(abs(row.scale)).is_integer()
    tolerance = 0 if exact else 1e-4
    for got, wanted in zip(outputs(host), outputs(reference), strict=True):
        assert torch.allclose(got, wanted, rtol=0, atol=tolerance)
    assert not all(map(torch.equal, outputs(host), bare))
    assert_base_kept(before[0], host)


def assert_base_kept(before, host):
    """Asserts that what was there before a load is as it was: values, flags, modes."""

    def bare(found):
        return {re.sub(r"\.(base_layer|original_module)\b", "", k): v for k, v in found.items()}

    for part, model in models(host).items():
        after = {kind: bare(found) for kind, found in snapshot(model).items() if kind in KEPT}
        for key, tensor in before[part]["tensors"].items():
            assert torch.equal(after["tensors"][key], tensor), key
        for kind in KEPT[1:]:
            assert {k: after[kind][k] for k in before[part][kind]} == before[part][kind]


def check_good_afterwards(row, good):
    """A copy holds all that the refusal may have left on the host."""
    host = copied(host_named(row.host or FILES[row.file].host)[0])
    if row.host:
        return
    load_lora(host, good(row.file))
    fresh = copied(HOSTS[FILES[row.file].host]())
    load_lora(fresh, good(row.file))
    assert all(map(torch.equal, outputs(host), outputs(fresh)))


# ---------------------------------------------------------------- beyond files


def test_the_recorder_would_notice(never, tmp_path, monkeypatch):
    (tmp_path / "planted.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("planted.missing")
    del sys.modules["planted"]
    with pytest.raises(AssertionError):
        never.check()
    never.done.clear()
    never.check()
    with pytest.raises(OSError, match="input was called"):
        input("Do you wish to run the custom code? [y/N]")
    with pytest.raises(AssertionError):
        never.check()
    never.done.clear()
    config = peft.LoraConfig(target_modules=EVIL_TOO)
    assert not check_target_module_exists(config, "q-")  # too short to take long
    with pytest.raises(AssertionError):
        never.check()


def test_good_files_load_without_repairs(good):
    for name, row in FILES.items():
        host = copied(host_named(row.host)[0])
        assert load_lora(host, good(name)).repairs == (), name


def test_an_adapter_of_which_only_the_header_was_read_is_not_loaded(good):
    for name in ("ours", "sd"):
        host, before, _ = host_named(FILES[name].host)
        with pytest.raises(BadAdapterFile, match="read from its header only.*open_adapter"):
            load_lora(host, read_header(good(name)))
        assert_unchanged(before, host)


def test_an_adapter_in_memory_of_no_known_kind_is_refused():
    factors = {"lora_A": torch.ones(4, 32), "lora_B": torch.ones(32, 4)}
    part = Component({"peft_type": "SUPERLORA"}, {"model.layers.0.self_attn.q_proj": factors})
    with pytest.raises(BadAdapterFile, match="peft_type is 'SUPERLORA'.*Types that are read"):
        load_lora(host_named("llama")[0], Adapter({"model": part}))


def test_a_file_that_does_not_fit_into_memory_is_named(good, tmp_path, monkeypatch):
    folder = shutil.copytree(good("ours"), tmp_path / "adapter")

    def full(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(torch, "empty", full)
    with pytest.raises(BadAdapterFile, match=r"adapter_model.safetensors: .*fit into memory"):
        open_adapter(folder)


def test_saving_over_a_link_replaces_the_link_and_not_what_it_leads_to(tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "mine.json").write_text("mine")
    os.symlink(tmp_path / "mine.json", tmp_path / "adapter" / "adapter_config.json")
    save_lora(attach_lora(tiny("llama")), tmp_path / "adapter")
    assert (tmp_path / "mine.json").read_text() == "mine"
    load_lora(tiny("llama"), tmp_path / "adapter")
