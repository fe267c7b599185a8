"""A load or attach that fails at any step leaves nothing behind, and the next one works."""

import inspect
import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import hf_lora
from hf_lora import attach_lora, detach_lora, load_lora, save_lora
from hf_lora.errors import LoraError
from hf_lora.hosts import parts_of
from hf_lora.record import Snapshot, record_of
from hf_lora.testing import component_output, tiny, tiny_pipeline
from tests.support import ALPHA, RANK, assert_same, logits, randomise, snapshot

ERRORS = (RuntimeError, MemoryError, KeyboardInterrupt, OSError)
OURS = str(Path(hf_lora.__file__).parent)
THEIRS = tuple(f"/{name}/" for name in ("peft", "transformers", "diffusers"))


class Steps:
    """Counts the calls of hf_lora and the libraries below it; raises an error at one of them.

    Generators are no steps: an error in one that goes on would pass by its own handlers, which no
    real error does.
    """

    def __init__(self, wanted=-1, error=RuntimeError):
        self.count, self.place = 0, ""
        self._wanted, self._error = wanted, error
        self._known = {}  # code -> whether calls of it are steps, and calls from it to C

    def __enter__(self):
        known, classify = self._known, self._classify

        def profile(frame, event, function):
            if event == "call":
                code = frame.f_code
                if (known.get(code) or classify(code))[0]:
                    self._step(frame, "")
            elif event == "c_call":
                code = frame.f_code
                if (known.get(code) or classify(code))[1]:
                    self._step(frame, function.__name__)

        sys.setprofile(profile)
        return self

    def __exit__(self, *_):
        sys.setprofile(None)

    def _classify(self, code):
        ours = code.co_filename.startswith(OURS)
        theirs = any(name in code.co_filename for name in THEIRS)
        self._known[code] = (ours or theirs) and not code.co_flags & inspect.CO_GENERATOR, ours
        return self._known[code]

    def _step(self, frame, called):
        self.count += 1
        if self.count - 1 == self._wanted:
            self.place = f"{frame.f_code.co_qualname}:{frame.f_lineno} {called}"
            raise self._error("injected")


def state(host):
    """Everything of a host that a load could change, identities included."""
    found = {}
    for name, part in parts_of(host).items():
        found[name] = snapshot(part)
        found[name]["objects"] = [id(x) for x in (*part.modules(), *part.parameters())]
        found[name]["record"] = record_of(part).copy()
        configs = getattr(part, "peft_config", None) or {}
        found[name]["configs"] = {n: c.to_dict() for n, c in configs.items()}
    return found


def outputs(host):
    if isinstance(host, torch.nn.Module):
        return [logits(host)]
    return [component_output(part) for part in parts_of(host).values()]


def assert_bit_equal(one, other, place):
    assert all(map(torch.equal, one, other)), place


@dataclass
class Case:
    """A host and what is done to it, again and again: a host that is as before can be used again.

    Attributes:
        host: A model or pipeline, as it is before.
        act: Puts an adapter of the name `new` on it.
    """

    host: Any
    act: Callable[[], object]

    def __post_init__(self):
        self.act()  # fills caches of the libraries
        self._undo()
        self._state, self._before = state(self.host), outputs(self.host)
        with Steps() as steps:
            self.act()
        self.steps = steps.count
        self._good = outputs(self.host)
        self._undo()
        self._check("after the dry run")

    def _undo(self):
        for part in parts_of(self.host).values():
            detach_lora(part, "new")

    def _check(self, place):
        now = state(self.host)
        for name, before in self._state.items():
            assert_same(before, now[name])
        assert_bit_equal(self._before, outputs(self.host), place)

    def fail_at(self, number, error):
        """Fails at one step; returns whether the error came out. Checks the host, and a retry."""
        steps = Steps(number, error)
        try:
            with steps:
                self.act()
        except (error, LoraError):
            raised = True
            self._check(steps.place)
            self.act()
        else:
            raised = False
        assert steps.place, f"step {number} of {self.steps} did not come"
        assert_bit_equal(self._good, outputs(self.host), steps.place)
        self._undo()
        self._check(f"detached after {steps.place}")
        return raised

    def fail_at_some(self, count):
        """Fails at so many steps, the first and the last included; returns how many came out."""
        errors = itertools.cycle(ERRORS)
        numbers = [n * (self.steps - 1) // (count - 1) for n in range(count)]
        return sum(self.fail_at(number, next(errors)) for number in numbers)


def _saved(model, folder, **options):
    options = options or {"rank": RANK, "alpha": ALPHA}
    host = randomise(attach_lora(model, **options))
    return save_lora(host, folder)


def bare(folder):
    _saved(tiny("llama"), folder)
    return tiny("llama"), {"scale": 0.5}


def beside_another(folder):
    _saved(tiny("llama"), folder, targets="attention")
    host = randomise(attach_lora(tiny("llama"), name="first", targets="mlp")).train()
    host.model.norm.eval()
    return host, {}


def with_a_head(folder):
    _saved(tiny("bert", task="classifier"), folder)
    return tiny("bert", task="classifier"), {}


def dora(folder):
    _saved(tiny("llama"), folder, config=peft.LoraConfig(r=RANK, lora_alpha=ALPHA, use_dora=True))
    return tiny("llama"), {"trainable": True}


def conv1d(folder):
    _saved(tiny("gpt2"), folder)
    host = tiny("gpt2").train()
    host.transformer.wte.requires_grad_(False)
    return host, {}


def pipeline(folder):
    pipe = tiny_pipeline("sd")
    for part in (pipe.unet, pipe.text_encoder):
        randomise(attach_lora(part, rank=RANK, alpha=ALPHA))
    save_lora(pipe, folder)
    return tiny_pipeline("sd"), {"scale": 0.5}


HOSTS = (
    (bare, 60),
    (beside_another, 60),
    (with_a_head, 60),
    (dora, 50),
    (conv1d, 50),
    (pipeline, 20),  # slow
)


# an error between `open` and the block that closes: the file is closed when it is collected
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize(("kind", "count"), HOSTS)
def test_a_load_that_fails_at_any_step_leaves_nothing_behind(kind, count, tmp_path):
    host, options = kind(tmp_path / "adapter")
    case = Case(host, lambda: load_lora(host, tmp_path / "adapter", name="new", **options))
    # an OSError while the config is read does not come out: it is repaired from the header
    assert case.fail_at_some(count) >= 0.9 * count


@pytest.mark.parametrize("kind", [bare, beside_another, with_a_head, conv1d])
def test_an_attach_that_fails_at_any_step_leaves_nothing_behind(kind, tmp_path):
    host, _ = kind(tmp_path / "adapter")
    case = Case(host, lambda: attach_lora(host, name="new"))
    assert case.fail_at_some(15) == 15


def test_a_model_that_is_a_dict_of_modules_is_put_back_whole():
    blocks = [torch.nn.ModuleDict({"up": torch.nn.Linear(4, 4)}) for _ in range(2)]
    model = torch.nn.ModuleDict({"blocks": torch.nn.ModuleList(blocks)})
    before = dict(vars(model)), list(model.state_dict())
    snapshot = Snapshot(model)
    attach_lora(model, rank=2)
    snapshot.restore()
    assert (dict(vars(model)), list(model.state_dict())) == before
