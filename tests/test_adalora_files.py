"""AdaLoRA adapters as files: ours with all ranks, peft's with the dropped ones left out."""

import json
import warnings

import peft
import pytest
import torch

from hf_lora import BadAdapterFile, attach_lora, load_lora, save_lora
from hf_lora.testing import tiny
from tests.support import logits
from tests.test_adalora import bare, by_peft, config, in_place, train, wrapped

ROUNDING = 1e-6  # peft drops the rows of dead ranks, so that sums have another length


@pytest.fixture
def theirs(tmp_path):
    """A PeftModel that peft's own loop trained, and the folder that peft wrote of it."""
    model = wrapped()
    list(by_peft(model))
    model.save_pretrained(tmp_path / "peft")
    return model, tmp_path / "peft"


def test_what_we_save_loads_here_and_in_plain_peft_to_the_bit(tmp_path):
    model = in_place()
    train(model)
    save_lora(model, tmp_path)
    fresh = tiny("llama")
    load_lora(fresh, tmp_path)
    judge = peft.PeftModel.from_pretrained(tiny("llama"), tmp_path)
    assert torch.equal(logits(fresh), logits(model))
    assert torch.equal(logits(bare(judge)), logits(model))


def test_what_peft_saves_loads_and_is_saved_again(theirs, tmp_path):
    model, folder = theirs
    fresh = tiny("llama")
    load_lora(fresh, folder)
    assert (logits(fresh) - logits(bare(model))).abs().max() < ROUNDING
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft warns of its own rank_pattern
        again = peft.PeftModel.from_pretrained(tiny("llama"), folder)
    save_lora(again, tmp_path / "ours")
    fresh = tiny("llama")
    load_lora(fresh, tmp_path / "ours")
    assert (logits(fresh) - logits(bare(model))).abs().max() < ROUNDING


def test_a_head_goes_with_the_ranks(tmp_path):
    torch.manual_seed(0)
    only = config(target_modules=["query"])
    model = attach_lora(tiny("bert", task="classifier"), config=only)
    train(model)
    save_lora(model, tmp_path)
    fresh = tiny("bert", task="classifier")
    load_lora(fresh, tmp_path)
    assert torch.equal(logits(fresh), logits(model))


SPOILT = {
    "another target": lambda pattern: pattern.update({"nothing.lora_E": [True]}),
    "no booleans": lambda pattern: pattern.update({next(iter(pattern)): [1]}),
    "another number of ranks": lambda pattern: pattern.update({next(iter(pattern)): [True] * 5}),
}


@pytest.mark.parametrize("how", SPOILT)
def test_a_pattern_that_does_not_fit_is_refused_by_name(theirs, how):
    path = theirs[1] / "adapter_config.json"
    fields = json.loads(path.read_text())
    SPOILT[how](fields["rank_pattern"])
    path.write_text(json.dumps(fields))
    with pytest.raises(BadAdapterFile, match="rank_pattern"):
        load_lora(tiny("llama"), theirs[1])
