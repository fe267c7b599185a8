"""The tiny hosts are what they say: small, seeded, and they leave the generator alone."""

import pytest
import torch

from hf_lora.errors import InvalidOption
from hf_lora.testing import FAMILIES, tiny, tiny_batch


def test_the_seed_decides_the_weights_and_nothing_else_moves():
    torch.manual_seed(7)
    first = torch.rand(1)
    torch.manual_seed(7)
    one, two, other = tiny("llama"), tiny("llama"), tiny("llama", seed=1)
    assert torch.equal(torch.rand(1), first)
    assert torch.equal(one.lm_head.weight, two.lm_head.weight)
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_runs_in_a_few_kilobytes(family):
    model = tiny(family)
    assert sum(p.numel() for p in model.parameters()) < 100_000
    assert torch.isfinite(model(**tiny_batch(model)).loss)
    assert not model.training


def test_unknown_families_and_classes_are_named():
    with pytest.raises(InvalidOption, match="no tiny lm of 'lama'.*'llama'"):
        tiny("lama")
    with pytest.raises(InvalidOption, match="no tiny classifier of 'mamba2'"):
        tiny("mamba2", task="classifier")
