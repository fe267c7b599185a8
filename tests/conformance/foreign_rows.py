"""One row a file format: how a file of each kind is made for a host, and what it is to give.

The judges are not ours: weights that LyCORIS's own modules merge to, the dense update in float64
where a format leaves alpha out, the model of plain peft that the file was saved from, or what plain
diffusers makes of the file.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import peft
import torch
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

from hf_lora.testing import component_output, tiny_pipeline
from tests import lycoris_files as lycoris
from tests.conformance.foreign_files import (
    HOSTS,
    KINDS,
    RANKS,
    bare_outputs,
    made,
    merged_outputs,
    names_in,
    pipeline,
)

KOHYA = {"lora_A": "lora_down.weight", "lora_B": "lora_up.weight", "lora_mid": "lora_mid.weight"}
PEFT = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"}
DEFAULT = {"lora_A": "lora_A.default.weight", "lora_B": "lora_B.default.weight"}
DITS = ("SD3", "Flux", "Flux2", "Wan", "Qwen-Image")
FUSED = ("SD3", "Flux", "Flux2")  # whose makers have one layer where diffusers has three
ACROSS = "LoKr on fused layers"
ALL = tuple(KINDS)
WHOLE = tuple(kind for kind in KINDS if kind != ACROSS)
OF_PEFT = ("LoRA", "conv", "LoHa", "LoKr", "DoRA")
WITH_CONVS = tuple(name for name, host in HOSTS.items() if host.convs)


@dataclass(frozen=True)
class Row:
    """One format.

    Attributes:
        title: Its name.
        keys: What keys look like.
        judge: Whose outputs are the right ones.
        cells: Kind -> hosts that the format has files of this kind for.
        make: (host, kind, folder) -> (file or folder, component -> output).
        single: Whether the file is of one model, and names no component.
    """

    title: str
    keys: str
    judge: str
    cells: Mapping[str, tuple[str, ...]]
    make: Callable
    single: bool = False


def cells(kinds, hosts=tuple(HOSTS)):
    """Kind -> hosts, convolutions only where a host has some."""
    found = {}
    for kind in kinds:
        which = [h for h in hosts if kind not in ("conv", "Tucker") or h in WITH_CONVS]
        if kind == ACROSS:
            which = [h for h in hosts if h in FUSED]
        if which:
            found[kind] = tuple(which)
    return found


# --- files of LyCORIS, in its own spelling and in others ------------------------------------


def of_lycoris(starts, *, native, ends=None, flat=True, alpha=True, texts=True):
    """Makes files whose factors are LyCORIS's.

    Args:
        starts: Host -> component -> how keys begin.
        native: Whether layers have the makers' names.
        ends: Factor -> how keys end; None leaves the file as LyCORIS wrote it.
        flat: Whether `_` stands for the dots of names.
        alpha: Whether the file states it, of kinds besides LoRA in any case.
        texts: Whether text encoders are in it.
    """

    def make(host, kind, folder):
        begin = starts(host)
        if not texts:
            begin = {host.denoiser: begin[host.denoiser]}
        found = made(host, kind, native=native(host), starts=begin)
        stated = alpha or KINDS[kind][0].startswith("lokr")
        tensors, weights = {}, {}
        for part, own in found.items():
            model = getattr(pipeline(host.pipeline), part)
            loose = {name: dict(x.factors) for name, x in own.written.loose().items()}
            if not stated:
                for factors in loose.values():
                    del factors["alpha"]
            if ends is None:
                tensors |= own.written.tensors
            else:
                tensors |= spelt(loose, begin[part], ends, flat=flat)
            weights[part] = own.weights(model, own.written.weight if stated else dense(own, loose))
        save_file(tensors, folder / "style.safetensors")
        return folder / "style.safetensors", merged_outputs(host, weights)

    return make


def dense(own, loose):
    def weight(name):
        return lycoris.dense(loose[name], own.written.modules[name].org_weight.detach())

    return weight


def spelt(loose, start, ends, *, flat):
    found = {}
    for name, factors in loose.items():
        name = name.replace(".", "_") if flat else name
        for factor, tensor in factors.items():
            found[f"{start}{name}.{ends.get(factor, factor)}"] = tensor
    return found


def kohya(host):
    """kohya's beginnings, to which LyCORIS adds the underscore."""
    return {host.denoiser: "lora_unet", **{text: start for text, (start, _) in host.texts.items()}}


def comfy(host):
    texts = {text: f"text_encoders.{name}.transformer." for text, (_, name) in host.texts.items()}
    return {host.denoiser: "diffusion_model.", **texts}


def one(start):
    return lambda host: {host.denoiser: start}


def ai_toolkit(host):
    """`transformer.` and diffusers' names for the models that it trains as diffusers has them."""
    own = host.pipeline in ("flux", "sd3")
    return {host.denoiser: "transformer." if own else "diffusion_model."}


# --- files of plain peft and plain diffusers ------------------------------------------------


def targets_of(host, part, *, convs, conv3d=True):
    """Some of the host's layers, by its own names; every other one in another rank."""
    names = names_in(host, native=False, convs=convs)[part]
    model = getattr(pipeline(host.pipeline), part)
    paths = list(names.values())
    return [p for p in paths if conv3d or model.get_submodule(p).weight.ndim < 5]


def config_of(host, part, kind):
    """A config of plain peft: two ranks and alphas by turns."""
    paths = targets_of(host, part, convs=KINDS[kind][1], conv3d=kind not in ("LoHa", "LoKr"))
    (rank, alpha), (other_rank, other_alpha) = RANKS
    fields = {
        "r": rank,
        "target_modules": paths,
        "rank_pattern": {f"^{path}": other_rank for path in paths[1::2]},
        "alpha_pattern": {f"^{path}": other_alpha for path in paths[1::2]},
    }
    if kind in ("LoHa", "LoKr"):
        return (peft.LoHaConfig if kind == "LoHa" else peft.LoKrConfig)(alpha=alpha, **fields)
    return peft.LoraConfig(lora_alpha=alpha, use_dora=kind == "DoRA", **fields)


@torch.no_grad()
def randomised(model, seed):
    """Gives every factor random values; magnitudes stay near those of the weights."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.mul_(1 + 0.2 * torch.rand(parameter.shape, generator=generator))
        elif any(mark in name for mark in ("lora_", "hada_", "lokr_")):
            size = 0.5 if "hada_" in name else 0.15
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)
    return model


def with_adapters(host, kind, parts):
    """Component -> a copy of it with an adapter of plain peft inside."""
    found = {}
    for seed, part in enumerate(parts):
        model = copy.deepcopy(getattr(pipeline(host.pipeline), part))
        peft.inject_adapter_in_model(config_of(host, part, kind), model)
        model.peft_config = {"default": config_of(host, part, kind)}
        model._hf_peft_config_loaded = True
        found[part] = randomised(model, seed)
    return found


def saved_by_diffusers(*, metadata):
    """Makes files with `save_lora_weights`; those without metadata are judged by diffusers."""

    def make(host, kind, folder):
        # without metadata plain diffusers is the judge, and drops magnitudes of text encoders
        texts = host.texts if metadata or kind != "DoRA" else ()
        models = with_adapters(host, kind, (host.denoiser, *texts))
        kwargs = {f"{n}_lora_layers": get_peft_model_state_dict(m) for n, m in models.items()}
        if metadata:
            for name, model in models.items():
                config = model.peft_config["default"].to_dict()
                config["target_modules"] = sorted(config["target_modules"])
                kwargs[f"{name}_lora_adapter_metadata"] = config
        type(pipeline(host.pipeline)).save_lora_weights(folder, **kwargs)
        if metadata:
            return folder, {**bare_outputs(host.pipeline), **own_outputs(models)}
        return folder, of_diffusers(host, folder)

    return make


def own_outputs(models):
    return {name: component_output(model) for name, model in models.items()}


def of_diffusers(host, source):
    """Component -> its output after plain diffusers has loaded a file."""
    pipe = tiny_pipeline(host.pipeline)
    pipe.load_lora_weights(str(source))
    found = dict(bare_outputs(host.pipeline))
    parts = (host.denoiser, *host.texts)
    return found | {name: component_output(getattr(pipe, name)) for name in parts}


def old_processors(host, kind, folder):
    """Writes the keys of diffusers' attention processors: attention of UNets and text encoders."""
    models = with_adapters(host, kind, (host.denoiser, *host.texts))
    tensors = {}
    for part, model in models.items():
        for key, tensor in get_peft_model_state_dict(model).items():
            path, factor = key.split(".lora_")
            end = "down" if factor.startswith("A") else "up"
            layer, _, leaf = path.replace("to_out.0", "to_out").rpartition(".")
            if leaf in ("to_q", "to_k", "to_v", "to_out"):
                tensors[f"{part}.{layer}.processor.{leaf}_lora.{end}.weight"] = tensor
            elif leaf in ("q_proj", "out_proj"):
                leaf = {"q_proj": "to_q", "out_proj": "to_out"}[leaf]
                tensors[f"{part}.{layer}.{leaf}_lora.{end}.weight"] = tensor
    save_file(tensors, folder / "style.safetensors")
    return folder / "style.safetensors", of_diffusers(host, folder / "style.safetensors")


def peft_folder(host, kind, folder):
    model = copy.deepcopy(getattr(pipeline(host.pipeline), host.denoiser))
    wrapped = randomised(peft.get_peft_model(model, config_of(host, host.denoiser, kind)), 0)
    wrapped.save_pretrained(folder)
    return folder, {**bare_outputs(host.pipeline), host.denoiser: component_output(model)}


def lora_adapter(host, kind, folder):
    model = copy.deepcopy(getattr(pipeline(host.pipeline), host.denoiser))
    model.add_adapter(config_of(host, host.denoiser, kind))
    randomised(model, 0).save_lora_adapter(folder)
    return folder, {**bare_outputs(host.pipeline), host.denoiser: component_output(model)}


def never(host):
    return False


def always(host):
    return True


MERGED = "the weights that LyCORIS's own modules merge to"
DENSE = "the update in float64 with alpha = rank"
SAVED = "the model of plain peft that was saved"

ROWS = (
    Row("diffusers, with metadata", "unet.<path>.lora_A.weight", SAVED,
        cells(OF_PEFT), saved_by_diffusers(metadata=True)),
    Row("diffusers, without metadata", "unet.<path>.lora_A.weight", "plain diffusers",
        cells(("LoRA", "conv", "DoRA")), saved_by_diffusers(metadata=False)),
    Row("diffusers, old attention processors", "unet.<path>.processor.to_q_lora.down.weight",
        "plain diffusers", cells(("LoRA",), ("SD1", "SDXL")), old_processors),
    Row("`save_lora_adapter`", "<path>.lora_A.weight", SAVED,
        cells(OF_PEFT), lora_adapter, single=True),
    Row("peft folder of a component", "base_model.model.<path>.lora_A.weight", SAVED,
        cells(OF_PEFT), peft_folder, single=True),
    Row("kohya, with diffusers' names", "lora_unet_<path>.lora_down.weight", MERGED,
        cells(WHOLE), of_lycoris(kohya, native=never)),
    Row("kohya, with the makers' names", "lora_unet_<makers' path>.lora_down.weight", MERGED,
        cells(ALL), of_lycoris(kohya, native=always)),
    Row("LyCORIS", "lycoris_<path>.lora_down.weight", MERGED,
        cells(WHOLE),
        of_lycoris(one("lycoris"), native=never, texts=False)),
    Row("OneTrainer", "lora_transformer_<path>.lora_down.weight", MERGED,
        cells(WHOLE, DITS),
        of_lycoris(one("lora_transformer"), native=never, texts=False)),
    Row("ComfyUI", "diffusion_model.<makers' path>.lora_up.weight", MERGED,
        cells(ALL), of_lycoris(comfy, native=always, ends=KOHYA, flat=False)),
    Row("ai-toolkit", "diffusion_model.<makers' path>.lora_A.weight", f"{DENSE}; LoKr files state "
        "alpha, and `transformer.<path>...` is what Flux and SD3 have",
        cells(("LoRA", "conv", "LoKr"), DITS),
        of_lycoris(ai_toolkit, native=lambda host: host.pipeline not in ("flux", "sd3"),
                   ends=PEFT, flat=False, alpha=False)),
    Row("fal", "base_model.model.<makers' path>.lora_A.weight", DENSE,
        cells(("LoRA",), DITS),
        of_lycoris(one("base_model.model."), native=always, ends=PEFT, flat=False, alpha=False)),
    Row("without component names", "<makers' path>.lora_A.default.weight", DENSE,
        cells(("LoRA",), DITS),
        of_lycoris(one(""), native=always, ends=DEFAULT, flat=False, alpha=False)),
)  # fmt: skip
