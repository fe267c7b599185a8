"""Files for other programs: kohya's `lora_unet_...` and ComfyUI's `diffusion_model....`.

Alpha is always a tensor beside the factors, because no other program reads it from a header. Names
are those the original repositories use; sd-scripts and ComfyUI know no others for transformers.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from hf_lora.adapter import MODEL, Adapter
from hf_lora.errors import BadAdapterFile, listing
from hf_lora.formats.container import to_safetensors
from hf_lora.formats.disk import Files
from hf_lora.formats.fusing import joined
from hf_lora.formats.header import TRIGGER, carried
from hf_lora.formats.kinds import Loose, loose_of
from hf_lora.formats.names import Names
from hf_lora.formats.native import UNETS, native_names

WEIGHTS = "lora.safetensors"
SECOND = "transformer_2"

# Components whose names a file has place for once, the one that is asked for first. ComfyUI and
# kohya's scripts load the file of Wan 2.2's second transformer as that of the first.
_DENOISERS = ("unet", "transformer", "prior", MODEL, SECOND)
_MOTION = re.compile(r"(?:^|\.)motion_modules\.")
# factor of the record -> what a key ends in
_ENDS = {"lora_A": "lora_down.weight", "lora_B": "lora_up.weight", "lora_mid": "lora_mid.weight"}


@dataclass(frozen=True)
class Spelling:
    """How a program names the modules of one component.

    Attributes:
        start: What keys begin with.
        flat: Whether the dots of paths become underscores.
        native: Whether modules have the original repository's names.
    """

    start: str
    flat: bool
    native: bool


def files_of(adapter: Adapter, path: Path, host: Mapping[str, Names], *, comfy: bool) -> Files:
    """Returns the one file to write: `path` itself when it has a suffix, else into that folder.

    Args:
        adapter: What to write.
        path: A file or a folder.
        host: Names of the pipeline it is for.
        comfy: Whether transformers are spelt as ComfyUI has them, and not as kohya.

    Raises:
        BadAdapterFile: The format has no names for a component or cannot hold its factors exactly.
    """
    _check_values(adapter)
    _check_one_denoiser(adapter)
    flat: dict[str, Tensor] = {}
    for name, component in adapter.components.items():
        if component.modules:
            raise BadAdapterFile(
                f"{name} brings modules trained whole ({listing(component.modules)}), which that "
                "format has no keys for",
            )
        if name not in host:
            raise BadAdapterFile(f"{name} is no component of the pipeline it is written for")
        spelling = _spelling(name, host, comfy=comfy)
        for module, loose in _renamed(loose_of(component), host[name], spelling):
            spelt = module.replace(".", "_") if spelling.flat else module
            for factor, tensor in loose.factors.items():
                flat[f"{spelling.start}{spelt}.{_ENDS.get(factor, factor)}"] = tensor
    one_file = path.suffix == ".safetensors" and not path.is_dir()
    folder, file = (path.parent, path.name) if one_file else (path, WEIGHTS)
    return Files(folder, {file: to_safetensors(flat, _header(adapter, flat))})


def _spelling(name: str, host: Mapping[str, Names], *, comfy: bool) -> Spelling:
    """Returns how a component is spelt."""
    several = "text_encoder_2" in host or not any(x.kind in UNETS for x in host.values())
    texts = {
        "text_encoder": "lora_te1_" if several else "lora_te_",
        "text_encoder_2": "lora_te2_",
        "text_encoder_3": "lora_te3_",
    }
    if name in texts:
        return Spelling(texts[name], flat=True, native=False)
    if name not in _DENOISERS:
        raise BadAdapterFile(
            f"that format has no names for the component {name}",
            fix="Save it in the diffusers layout.",
        )
    if host[name].kind in UNETS:
        # sd-scripts trains SD1 and SD2 on diffusers' UNet, and SDXL on its own with the first names
        return Spelling("lora_unet_", flat=True, native=several)
    if comfy:
        return Spelling("diffusion_model.", flat=False, native=True)
    return Spelling("lora_unet_", flat=True, native=True)


def _renamed(
    layers: Mapping[str, Loose], names: Names, spelling: Spelling
) -> Iterator[tuple[str, Loose]]:
    """Yields the modules by the names that the format has for them."""
    left = dict(layers)
    motion = [path for path in left if names.kind in UNETS and _MOTION.search(path)]
    if motion:
        raise BadAdapterFile(
            f"{len(motion)} layers are of motion modules ({listing(motion, limit=2)}), which that "
            "format has no names for",
            fix="Save it in the diffusers layout.",
            field=motion[0],
        )
    for name, pieces in native_names(names).items() if spelling.native else ():
        found = {p.path: left.pop(p.path) for p in pieces if p.path in left}
        if found:
            yield name, joined(name, pieces, found)
    for path, loose in left.items():
        inner = path.startswith(("encoder.", "embeddings."))
        clip = names.kind.startswith("CLIPText") and inner
        yield f"text_model.{path}" if clip else path, loose


def _header(adapter: Adapter, flat: Mapping[str, Tensor]) -> dict[str, str]:
    """Returns the header: what the adapter brought along, and what other programs look for."""
    manifest = adapter.manifest
    own = carried(manifest.foreign)
    if manifest.trigger_words:
        own[TRIGGER] = ", ".join(manifest.trigger_words)
    ranks = Counter(len(t) for key, t in flat.items() if key.endswith("lora_down.weight"))
    alphas = Counter(float(t) for key, t in flat.items() if key.endswith(".alpha"))
    if ranks and alphas:
        own.setdefault("ss_network_module", "networks.lora")
        own["ss_network_dim"] = str(ranks.most_common(1)[0][0])
        own["ss_network_alpha"] = str(alphas.most_common(1)[0][0])
    return {**own, "format": "pt"}


def _check_one_denoiser(adapter: Adapter) -> None:
    """Raises BadAdapterFile for both transformers of Wan 2.2, which have the same names."""
    held = [name for name in _DENOISERS if name in adapter.components]
    if len(held) > 1:
        raise BadAdapterFile(
            f"that format has the same names for {listing(held)}, and one file holds one of them",
            fix="Write a file for each: save_adapter(replace(adapter, components={name: "
            "adapter.components[name]}), path, ...), with replace of dataclasses. Or save it in "
            "the diffusers layout.",
        )


def _check_values(adapter: Adapter) -> None:
    """Raises BadAdapterFile for an adapter without values."""
    if any(t.is_meta for c in adapter.components.values() for _, t in c.tensors()):
        raise BadAdapterFile("the adapter was read from its header only and has no values to save")
