"""Adapters on disk and who judges them: hf_lora, and plain peft or diffusers."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import peft
import torch
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from safetensors.torch import load_file
from torch import nn

from hf_lora import open_adapter, save_adapter
from hf_lora.adapter import MODEL, Adapter
from hf_lora.errors import AdapterNotFound, LoraError
from hf_lora.formats import diffusers as diffusers_layout
from hf_lora.formats import peft as peft_layout

NAMES = {
    "peft": (peft_layout.WEIGHTS, peft_layout.CONFIG),
    "diffusers": (diffusers_layout.WEIGHTS,),
}
SIZES = {"2 KiB": (2, 16, 4), "1 MiB": (1, 512, 256), "14 MiB": (14, 512, 256)}  # layers, width, r
ALPHAS = {"old": 11, "new": 7}
BEFORE = ("nothing", "ours", "foreign")  # what a folder may hold before a save


@dataclass(frozen=True)
class Judge:
    """Tells which of the known adapters a folder holds.

    Attributes:
        layout: `"peft"` or `"diffusers"`.
        known: Name -> adapter.
        folders: `"ours"` and `"foreign"` -> a folder with the old one, as hf_lora and as plain peft
            or diffusers wrote it.
    """

    layout: str
    known: Mapping[str, Adapter]
    folders: Mapping[str, Path]

    def ours(self, folder):
        """What hf_lora reads: a known name, or `nothing`, `corrupt`, `mixed`."""
        try:
            digest = open_adapter(folder).digest
        except AdapterNotFound:
            return "nothing"
        except LoraError:
            return "corrupt"
        return next((n for n, a in self.known.items() if a.digest == digest), "mixed")

    def theirs(self, folder):
        """What plain peft or diffusers read: a known name, `refused`, `corrupt` or `mixed`."""
        try:
            alpha, tensors = _READERS[self.layout](folder)
        except Exception:  # any refusal will do where a file is missing
            whole = all((folder / name).exists() for name in NAMES[self.layout])
            return "corrupt" if whole else "refused"
        for name, adapter in self.known.items():
            if _alpha(adapter) == alpha and _same(self._flat(adapter), tensors):
                return name
        return "mixed"

    def _flat(self, adapter):
        if self.layout == "peft":
            return peft_layout.join(adapter.components[MODEL])
        return diffusers_layout.join(adapter.components)[0]


def _plain_peft(folder):
    config = peft.PeftConfig.from_pretrained(str(folder))
    return config.lora_alpha, load_file(folder / peft_layout.WEIGHTS)


def _plain_diffusers(folder):
    tensors, _, metadata = StableDiffusionLoraLoaderMixin.lora_state_dict(
        str(folder), weight_name=diffusers_layout.WEIGHTS, return_lora_metadata=True
    )
    return metadata["unet.lora_alpha"], tensors


_READERS = {"peft": _plain_peft, "diffusers": _plain_diffusers}


def _alpha(adapter):
    return next(iter(adapter.components.values())).config["lora_alpha"]


def _same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def judge_of(layout, size, root):
    """A judge of an old and a new adapter of one shape, made by plain peft or diffusers."""
    known, folders = {}, {}
    for seed, name in enumerate(ALPHAS):
        folders[name] = root / f"{layout}-{size}-{name}"
        _make(layout, size, ALPHAS[name], seed, folders[name])
        known[name] = open_adapter(folders[name])
    ours = save_adapter(known["old"], root / f"{layout}-{size}-ours")
    return Judge(layout, known, {"ours": ours, "foreign": folders["old"]})


class _Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.to_q = nn.Linear(width, width, bias=False)


def _make(layout, size, alpha, seed, folder):
    layers, width, rank = SIZES[size]
    config = peft.LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=["to_q"], init_lora_weights=False
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        host = nn.Sequential(*(_Block(width) for _ in range(layers)))
        model = peft.get_peft_model(host, config)
    if layout == "peft":
        model.save_pretrained(str(folder))
        return
    factors = peft.get_peft_model_state_dict(model)
    StableDiffusionLoraLoaderMixin.save_lora_weights(
        str(folder),
        unet_lora_layers={k.removeprefix(peft_layout.PREFIX): v for k, v in factors.items()},
        unet_lora_adapter_metadata=config.to_dict(),
    )


def bytes_of(folder):
    """The folder's files as they are: name -> bytes."""
    return {p.name: p.read_bytes() for p in folder.iterdir()} if folder.is_dir() else {}


def prepare(judge, before, folder):
    """Makes the folder as it is before a save, one of `BEFORE`; returns its bytes."""
    shutil.rmtree(folder, ignore_errors=True)
    if before != "nothing":
        shutil.copytree(judge.folders[before], folder)
    return bytes_of(folder)


def next_save(judge, folder, old_names, name):
    """Saves into the folder; returns what is wrong then: files too many, or another adapter."""
    save_adapter(judge.known[name], folder)
    wrong = {p.name for p in folder.iterdir()} ^ {*old_names, *NAMES[judge.layout]}
    read = (judge.ours(folder), judge.theirs(folder))
    return (*sorted(wrong), *(f"reads {x}" for x in read if x != name))
