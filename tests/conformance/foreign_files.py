"""Files of other programs for the tiny pipelines, and the outputs that they are to give.

What other programs call the layers is written down here by hand, for a few layers of each host, and
owes nothing to the tables of hf_lora. A view of a component has its layers under those names and
fused as those programs have them; LyCORIS's own modules on that view make the factors, and the
weights that they merge to are cut back to where diffusers has them.
"""

import copy
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import nn

from hf_lora.hosts import parts_of
from hf_lora.testing import component_output, tiny_pipeline
from tests import lycoris_files as lycoris

# LoKr of rank 3 beside 8x8 factors is of low rank, that of rank 4 whole
RANKS = ((4, 3), (3, 5))  # (rank, alpha) of every other layer; no ratio is a power of two
CONV = (2, 5)

KINDS = {  # kind -> (variant of LyCORIS, whether it is on the convolutions as well)
    "LoRA": ("lora", False),
    "conv": ("lora", True),
    "Tucker": ("lora tucker", True),
    "LoHa": ("loha", True),
    "LoKr": ("lokr", True),  # on layers that are whole on the host
    "LoKr on fused layers": ("lokr", True),
    "DoRA": ("dora", True),
}


@dataclass(frozen=True)
class Host:
    """A tiny pipeline and what its layers are called.

    Attributes:
        pipeline: Its kind, see `tiny_pipeline`.
        layers: What the makers call a layer of the denoiser -> the host's layers whose output
            features lie in it, in their order; `~` before one whose halves are in the other order.
        convs: The same of convolutions.
        texts: Text encoder -> (how kohya's keys of it begin, ComfyUI's name of it).
    """

    pipeline: str
    layers: Mapping[str, str]
    convs: Mapping[str, str] = field(default_factory=dict)
    texts: Mapping[str, tuple[str, str]] = field(default_factory=dict)

    @property
    def denoiser(self):
        return "unet" if self.pipeline in ("sd", "sdxl") else "transformer"


_UNET = {
    f"{theirs}.transformer_blocks.0.{layer}": f"{ours}.transformer_blocks.0.{layer}"
    for theirs, ours, layer in (
        ("input_blocks.3.1", "down_blocks.1.attentions.0", "attn1.to_q"),
        ("input_blocks.3.1", "down_blocks.1.attentions.0", "ff.net.0.proj"),
        ("middle_block.1", "mid_block.attentions.0", "attn2.to_k"),
        ("output_blocks.1.1", "up_blocks.0.attentions.1", "attn2.to_out.0"),
    )
} | {
    "middle_block.0.emb_layers.1": "mid_block.resnets.0.time_emb_proj",
    "time_embed.2": "time_embedding.linear_2",
}
_UNET_CONVS = {
    "input_blocks.1.0.in_layers.2": "down_blocks.0.resnets.0.conv1",
    "input_blocks.2.0.op": "down_blocks.0.downsamplers.0.conv",
    "middle_block.1.proj_in": "mid_block.attentions.0.proj_in",
    "output_blocks.1.2.conv": "up_blocks.0.upsamplers.0.conv",
    "output_blocks.0.0.skip_connection": "up_blocks.0.resnets.0.conv_shortcut",
}
_QKV = " ".join(f"transformer_blocks.{{0}}.attn.to_{x}" for x in "qkv")
_ADDED = " ".join(f"transformer_blocks.{{0}}.attn.add_{x}_proj" for x in "qkv")
_CLIP_L, _CLIP_G = ("lora_te1", "clip_l"), ("lora_te2", "clip_g")

HOSTS = {
    "SD1": Host("sd", _UNET, _UNET_CONVS, {"text_encoder": ("lora_te", "clip_l")}),
    "SDXL": Host(
        "sdxl", {**_UNET, "label_emb.0.0": "add_embedding.linear_1"}, _UNET_CONVS,
        {"text_encoder": _CLIP_L, "text_encoder_2": _CLIP_G},
    ),
    "SD3": Host(
        "sd3",
        {
            "joint_blocks.0.x_block.attn.qkv": _QKV.format(0),
            "joint_blocks.0.x_block.attn2.qkv": _QKV.format(0).replace("attn.", "attn2."),
            "joint_blocks.1.context_block.attn.qkv": _ADDED.format(1),
            "joint_blocks.0.context_block.mlp.fc1": "transformer_blocks.0.ff_context.net.0.proj",
            "joint_blocks.1.x_block.adaLN_modulation.1": "transformer_blocks.1.norm1.linear",
            "joint_blocks.1.context_block.adaLN_modulation.1":
                "~transformer_blocks.1.norm1_context.linear",
            "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
            "final_layer.linear": "proj_out",
        },
        {"x_embedder.proj": "pos_embed.proj"},
        {"text_encoder": _CLIP_L, "text_encoder_2": _CLIP_G},
    ),
    "Flux": Host(
        "flux",
        {
            "double_blocks.0.img_attn.qkv": _QKV.format(0),
            "double_blocks.1.txt_attn.qkv": _ADDED.format(1),
            "double_blocks.1.img_mlp.0": "transformer_blocks.1.ff.net.0.proj",
            "double_blocks.0.txt_mod.lin": "transformer_blocks.0.norm1_context.linear",
            "single_blocks.0.linear1":
                f"{_QKV.format(0).replace('tr', 'single_tr')} single_transformer_blocks.0.proj_mlp",
            "single_blocks.1.linear2": "single_transformer_blocks.1.proj_out",
            "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
            "final_layer.adaLN_modulation.1": "~norm_out.linear",
        },
        texts={"text_encoder": _CLIP_L},
    ),
    "Flux2": Host(
        "flux2",
        {
            "double_blocks.0.img_attn.qkv": _QKV.format(0),
            "double_blocks.1.txt_attn.qkv": _ADDED.format(1),
            "double_blocks.1.img_mlp.0": "transformer_blocks.1.ff.linear_in",
            "double_blocks.0.txt_attn.proj": "transformer_blocks.0.attn.to_add_out",
            "single_blocks.0.linear1": "single_transformer_blocks.0.attn.to_qkv_mlp_proj",
            "single_blocks.1.linear2": "single_transformer_blocks.1.attn.to_out",
            "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
            "final_layer.adaLN_modulation.1": "~norm_out.linear",
        },
    ),
    "Wan": Host(
        "wan",
        {
            "blocks.0.self_attn.q": "blocks.0.attn1.to_q",
            "blocks.1.self_attn.o": "blocks.1.attn1.to_out.0",
            "blocks.0.cross_attn.k": "blocks.0.attn2.to_k",
            "blocks.1.ffn.0": "blocks.1.ffn.net.0.proj",
            "text_embedding.2": "condition_embedder.text_embedder.linear_2",
            "time_projection.1": "condition_embedder.time_proj",
            "head.head": "proj_out",
        },
        {"patch_embedding": "patch_embedding"},
    ),
    "Qwen-Image": Host(
        "qwen-image",
        {
            name: name
            for name in (
                "transformer_blocks.0.attn.to_q", "transformer_blocks.1.attn.add_k_proj",
                "transformer_blocks.0.attn.to_out.0", "transformer_blocks.0.img_mlp.net.0.proj",
                "transformer_blocks.1.txt_mod.1", "txt_in", "proj_out",
            )
        },
    ),
}  # fmt: skip
TEXT_LAYERS = (
    "encoder.layers.0.self_attn.q_proj",
    "encoder.layers.0.self_attn.out_proj",
    "encoder.layers.1.mlp.fc1",
)


@cache
def pipeline(kind):
    """A tiny pipeline that every test leaves as it was."""
    return tiny_pipeline(kind)


@cache
def bare_outputs(kind):
    return outputs(pipeline(kind))


def outputs(pipe):
    return {name: component_output(part) for name, part in parts_of(pipe).items()}


def names_in(host, *, native, convs):
    """Component -> what another program calls some layers -> where the host has them."""
    theirs = {**host.layers, **(host.convs if convs else {})}
    if not native:
        paths = [place.lstrip("~") for places in theirs.values() for place in places.split()]
        theirs = {path: path for path in paths}
    pipe = pipeline(host.pipeline)
    texts = {text: {f"text_model.{n}": _place(pipe, text, n) for n in TEXT_LAYERS}
             for text in host.texts}  # fmt: skip
    return {host.denoiser: theirs, **texts}


def _place(pipe, text, name):
    """Where a CLIP has a layer: transformers 5 took the first segment out of one of two classes."""
    nested = hasattr(getattr(pipe, text), "text_model")
    return f"text_model.{name}" if nested else name


def view(model, names):
    """The layers as another program has them: under its names, and fused."""
    root = nn.Module()
    for name, places in names.items():
        *parents, leaf = name.split(".")
        module = root
        for parent in parents:
            if not hasattr(module, parent):
                module.add_module(parent, nn.Module())
            module = getattr(module, parent)
        module.add_module(leaf, _fused(model, places))
    return root


def _fused(model, places):
    layers = [model.get_submodule(place.lstrip("~")) for place in places.split()]
    if not isinstance(layers[0], nn.Linear):
        return copy.deepcopy(layers[0])
    weights = [turned(layer.weight.data, place) for layer, place in zip(layers, places.split())]  # noqa: B905
    weight = torch.cat(weights)
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    made.weight.data = weight.clone()
    return made


def turned(rows, place):
    """Rows with their halves exchanged where the place says so."""
    return torch.cat(rows.chunk(2)[::-1]) if place.startswith("~") else rows


@dataclass(frozen=True)
class Made:
    """Factors that LyCORIS made for one component of a host.

    Attributes:
        written: What it wrote.
        names: What it calls the layers -> where the host has them.
    """

    written: lycoris.Written
    names: Mapping[str, str]

    def weights(self, model, weight):
        """The host's path -> merged weight, from `weight(name)` of the layers as it has them."""
        found = {}
        for name, places in self.names.items():
            rows = weight(name).float()
            for place in places.split():
                path = place.lstrip("~")
                count = model.get_submodule(path).weight.shape[0]
                found[path], rows = turned(rows[:count], place), rows[count:]
            assert not len(rows)
        return found


def made(host, kind, *, native, starts):
    """Component -> `Made`, with two ranks and alphas by turns.

    Args:
        host: Which.
        kind: One of `KINDS`.
        native: Whether layers of the denoiser are named and fused as their makers have them.
        starts: Component -> how its keys begin.
    """
    variant, convs = KINDS[kind]
    pipe = pipeline(host.pipeline)
    found = {}
    for part, names in names_in(host, native=native, convs=convs).items():
        if part not in starts:
            continue
        seen = view(getattr(pipe, part), names)
        if kind.startswith(("LoHa", "LoKr")):
            names = {n: p for n, p in names.items() if seen.get_submodule(n).weight.ndim < 5}
        if kind == "LoKr":
            names = {n: p for n, p in names.items() if " " not in p}
        written = [
            lycoris.write(
                seen, variant, prefix=starts[part], rank=rank, alpha=alpha, conv_rank=CONV[0],
                conv_alpha=CONV[1], seed=turn, only=_one_of(list(names)[turn::2]),
            )
            for turn, (rank, alpha) in enumerate(RANKS)
        ]  # fmt: skip
        one = lycoris.Written(
            *({k: v for w in written for k, v in getattr(w, name).items()}
              for name in ("tensors", "modules", "names"))
        )  # fmt: skip
        found[part] = Made(one, names)
    return found


def _one_of(names):
    return lambda path, _: path in names


@contextmanager
def replaced(model, weights):
    """The model computes with other weights."""
    held = {path: model.get_submodule(path).weight.data for path in weights}
    try:
        for path, weight in weights.items():
            assert weight.shape == held[path].shape
            model.get_submodule(path).weight.data = weight
        yield
    finally:
        for path, weight in held.items():
            model.get_submodule(path).weight.data = weight


def merged_outputs(host, weights):
    """Component -> its output with other weights: component -> path -> weight."""
    pipe = pipeline(host.pipeline)
    found = dict(bare_outputs(host.pipeline))
    for part, own in weights.items():
        with replaced(getattr(pipe, part), own):
            found[part] = component_output(getattr(pipe, part))
    return found


def difference(ours, theirs):
    """The largest relative difference of two outputs."""
    return float((ours - theirs).abs().max() / theirs.abs().max())
