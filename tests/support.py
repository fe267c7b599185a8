"""What many tests need: outputs to compare, adapters that do something, the state of a host."""

from pathlib import Path

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file

from hf_lora.testing import FAMILIES, tiny_batch

# alpha/rank = 11/16 is no power of two, so a lost or doubled factor cannot hide in rounding
RANK, ALPHA = 16, 11

CLASSES = [(family, "lm") for family in FAMILIES] + [
    (family, "classifier") for family, row in FAMILIES.items() if row.classifier
]


@torch.no_grad()
def logits(model, **kwargs):
    """Logits on the fixed batch of the model, in evaluation mode; the mode is put back."""
    modes = {m: m.training for m in model.modules()}
    model.eval()
    out = model(**tiny_batch(model, **kwargs)).logits
    for module, training in modes.items():
        module.training = training
    return out


def randomise(model, seed=5):
    """Gives every trainable parameter random values, so that the adapter does something."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator) * 0.05
            parameter.data.copy_(noise)
    return model


def snapshot(model):
    """Everything that attaching could change: tensors, flags, modes, module tree, attributes."""
    return {
        "tensors": {k: v.detach().clone() for k, v in model.state_dict().items()},
        "requires_grad": {n: p.requires_grad for n, p in model.named_parameters()},
        "training": {n: m.training for n, m in model.named_modules()},
        "types": {n: type(m) for n, m in model.named_modules()},
        "hooks": {n: len(m._forward_pre_hooks) for n, m in model.named_modules()},
        "attributes": {n: set(vars(m)) for n, m in model.named_modules()},
        "loaded": getattr(model, "_hf_peft_config_loaded", None),
        "names": list(getattr(model, "peft_config", None) or {}),
    }


def assert_same(before, after):
    """Asserts that two snapshots are equal, tensors to the bit."""
    assert before["tensors"].keys() == after["tensors"].keys()
    for name, tensor in before["tensors"].items():
        assert torch.equal(tensor, after["tensors"][name]), name
    for key in before.keys() - {"tensors"}:
        assert before[key] == after[key], key


def tuner_layers(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, BaseTunerLayer)}


def as_foreign(path):
    """Writes a folder's or file's weights again as other programs do: without our manifest."""
    found = [path] if path.is_file() else list(Path(path).glob("*.safetensors"))
    for file in found:
        tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
    return path
