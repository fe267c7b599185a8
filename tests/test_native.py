"""Native names against diffusers' own converters: every layer lands where the table says.

The values are numbers of output features, each of which occurs once: a feature that went to another
layer, another row or the other half shows.
"""

import re
from dataclasses import dataclass, replace
from functools import cache

import diffusers
import pytest
import torch
import transformers
from diffusers.loaders import lora_conversion_utils as lora
from diffusers.loaders import single_file_utils as single_file

from hf_lora.architectures import ARCHITECTURES, architecture, names_of
from hf_lora.formats.names import Names, Piece
from hf_lora.formats.native import ROWS, native_names
from hf_lora.testing import tiny_pipeline

pytestmark = pytest.mark.filterwarnings("ignore:.*FluxPosEmbed.*:FutureWarning")  # of Chroma


@cache
def names_of_class(kind, **sizes):
    """Returns the names of a model of the real size (defaults are those of a public model)."""
    library = diffusers if hasattr(diffusers, kind) else transformers
    made = getattr(library, kind)
    with torch.device("meta"):
        if hasattr(made, "config_class"):
            return names_of(made(made.config_class(**sizes)))
        return names_of(made(**sizes))


IMAGE = (("image_dim", 1280), ("added_kv_proj_dim", 5120))  # Wan with a picture to start from

# What a class spells in two ways is judged once for each: the names that the other spelling has.
COSMOS_1 = r"blocks\.block|final_layer\.adaLN"
COSMOS_2 = r"blocks\.\d|final_layer\.adaln"
COMFY = (
    r".*_attn\.(qkv|proj)$|.*_mod\.lin$|.*modulation\.lin$|.*blocks.*mlp\.\d$"
    r"|(time|guidance)_in\.(in|out)_layer$|.*\.[tc]_embedder\.(in|out)_layer$"
)


@dataclass(frozen=True)
class Judge:
    """One class and the function of diffusers that reads its makers' checkpoints.

    Attributes:
        kind: The class.
        converter: The function.
        own: What the host's layers are called, a number as N, that makers call the same.
        sizes: Arguments of the class.
        besides: A pattern of names that belong to another spelling.
        prefix: What the makers' checkpoint has before every name.
    """

    kind: str
    converter: str
    own: frozenset = frozenset()
    sizes: tuple = ()
    besides: str = r"(?!)"
    prefix: str = ""

    def __str__(self):
        return f"{self.kind} {'' if self.besides == '(?!)' else self.besides}"


def judge(kind, converter, own="", **more):
    return Judge(kind, f"convert_{converter}_to_diffusers", frozenset(own.split()), **more)


QWEN_21_OWN = """
    time_text_embed.timestep_embedder.linear_N txt_in.in_layer txt_in.out_layer img_in modulation.N
    transformer_blocks.N.attn.to_q transformer_blocks.N.attn.to_k transformer_blocks.N.attn.to_v
    transformer_blocks.N.attn.to_out.N transformer_blocks.N.img_mlp.out norm_out.linear proj_out
"""
LTX_OWN = """
    caption_projection.linear_N proj_out transformer_blocks.N.attnN.to_q
    transformer_blocks.N.attnN.to_k transformer_blocks.N.attnN.to_v
    transformer_blocks.N.attnN.to_out.N transformer_blocks.N.ff.net.N
    transformer_blocks.N.ff.net.N.proj
"""
LTX2_ATTENTIONS = ("attnN", "audio_attnN", "audio_to_video_attn", "video_to_audio_attn")
LTX2_OWN = """
    caption_projection.linear_N audio_caption_projection.linear_N proj_out audio_proj_out
    transformer_blocks.N.ff.net.N transformer_blocks.N.ff.net.N.proj
    transformer_blocks.N.audio_ff.net.N transformer_blocks.N.audio_ff.net.N.proj
""" + " ".join(
    f"transformer_blocks.N.{attention}.{part}"
    for attention in LTX2_ATTENTIONS
    for part in ("to_q", "to_k", "to_v", "to_out.N")
)
Z_IMAGE_OWN = "t_embedder.mlp.N cap_embedder.N " + " ".join(
    f"{block}.N.{part}"
    for block in ("layers", "noise_refiner", "context_refiner")
    for part in ("feed_forward.wN", "adaLN_modulation.N")
    if (block, part) != ("context_refiner", "adaLN_modulation.N")
)
JUDGES = [
    judge("AuraFlowTransformer2DModel", "auraflow_transformer_checkpoint"),
    judge(
        "ChromaTransformer2DModel",
        "chroma_transformer_checkpoint",
        "distilled_guidance_layer.in_proj distilled_guidance_layer.out_proj",
    ),
    judge("ChronoEditTransformer3DModel", "wan_transformer", "patch_embedding", sizes=IMAGE),
    judge("CosmosTransformer3DModel", "cosmos_transformer_checkpoint", besides=COSMOS_1),
    judge(
        "CosmosTransformer3DModel", "cosmos_transformer_checkpoint", besides=COSMOS_2,
        prefix="net.",
    ),
    judge("Flux2Transformer2DModel", "flux2_transformer_checkpoint"),
    judge("Flux3Transformer2DModel", "flux3_transformer_checkpoint"),
    judge(
        "FluxTransformer2DModel", "flux_transformer_checkpoint", sizes=(("guidance_embeds", True),)
    ),
    judge("HunyuanVideoTransformer3DModel", "hunyuan_video_transformer", besides=COMFY),
    judge("Krea2Transformer2DModel", "krea2_transformer_checkpoint"),
    judge("LTX2VideoTransformer3DModel", "ltx2_transformer", LTX2_OWN),
    judge("LTXVideoTransformer3DModel", "ltx_transformer_checkpoint", LTX_OWN),
    judge("Lumina2Transformer2DModel", "lumina2", "x_embedder"),
    judge("MiniMaxH3Transformer3DModel", "minimax_h3_transformer_checkpoint"),
    judge("MochiTransformer3DModel", "mochi_transformer_checkpoint"),
    judge("QwenImage21Transformer2DModel", "qwen_image21_transformer_checkpoint", QWEN_21_OWN),
    judge("SD3Transformer2DModel", "sd3_transformer_checkpoint", "context_embedder",
          sizes=(("dual_attention_layers", (0, 1, 2)), ("qk_norm", "rms_norm"))),
    judge("SanaTransformer2DModel", "sana_transformer"),
    judge("SkyReelsV2Transformer3DModel", "wan_transformer", "patch_embedding", sizes=IMAGE),
    judge(
        "WanAnimate2Transformer3DModel", "wan_animate_2_transformer",
        "patch_embedding text_embedding.N time_embedding.N time_projection.N head.head "
        "img_emb.proj.N",
    ),
    judge(
        "WanAnimateTransformer3DModel", "wan_transformer",
        "patch_embedding pose_patch_embedding face_encoder.out_proj",
    ),
    judge("WanTransformer3DModel", "wan_transformer", "patch_embedding", sizes=IMAGE),
    judge(
        "WanVACETransformer3DModel", "wan_transformer", "patch_embedding vace_patch_embedding",
        sizes=IMAGE,
    ),
    judge("ZImageTransformer2DModel", "z_image_transformer_checkpoint", Z_IMAGE_OWN),
]  # fmt: skip


class Checkpoint(dict):
    """A makers' checkpoint of which only layers are there, and norms and tables read as zeros."""

    def __init__(self):
        super().__init__()
        self.popped = set()

    def pop(self, key, *default):
        self.popped.add(key)
        return super().pop(key, torch.zeros(6, 1, dtype=torch.int32))

    def __contains__(self, key):  # Cosmos' function asks for a key after it has taken all (0.42.1)
        return super().__contains__(key) or key in self.popped


def features(widths):
    """Returns name -> numbers (width, 1) of its output features, none of them twice."""
    first, made = 0, {}
    for name, width in widths.items():
        made[name] = torch.arange(first, first + width, dtype=torch.int32).unsqueeze(1)
        first += width
    return made


def width_of(pieces, names):
    return sum(names.layers[piece.path][0] for piece in pieces)


def cut(values, piece):
    """Returns what a host's layer gets of a foreign layer's features, by the words of `Piece`."""
    rows = values if piece.rows is None else values[slice(*piece.rows)]
    return torch.cat(rows.chunk(2)[::-1]) if piece.swapped else rows


def places_of(names, besides=r"(?!)"):
    """Returns name -> pieces in one spelling, and of the layers without another name their own."""
    native = {n: p for n, p in native_names(names).items() if not re.match(besides, n)}
    covered = {piece.path for pieces in native.values() for piece in pieces}
    own = {path: (Piece(path),) for path in names.layers if path not in covered}
    return native, own


@pytest.mark.parametrize("case", JUDGES, ids=str)
def test_a_checkpoint_of_the_makers_lands_where_the_names_say(case):
    names = names_of_class(case.kind, **dict(case.sizes))
    native, own = places_of(names, case.besides)
    assert {re.sub(r"\d+", "N", path) for path in own} == case.own
    places = native | own
    values = features({name: width_of(pieces, names) for name, pieces in places.items()})
    given = Checkpoint()
    for name, rows in values.items():
        given[f"{case.prefix}{name}.weight"] = rows
        given[f"{case.prefix}{name}.bias"] = rows
    # the layout of the published files; nothing but MiniMax-H3 has another
    found = getattr(single_file, case.converter)(given, config={})
    wrong = [
        f"{name} -> {piece}"
        for name, pieces in places.items()
        for piece in pieces
        if not torch.equal(found[f"{piece.path}.weight"], cut(values[name], piece))
    ]
    assert not wrong


def test_every_class_with_rows_has_a_judge():
    judged = {case.kind for case in JUDGES} | {case.kind for case in LORAS}
    same = {"HunyuanVideoFramepackTransformer3DModel"}  # HunyuanVideo's layers, and some more
    assert set(ROWS) == judged | same


@dataclass(frozen=True)
class LoraJudge:
    """A function of diffusers that reads LoRAs in native names.

    Attributes:
        kind: The class.
        converter: The function.
        start: What stands before every name.
        sizes: Arguments of the class.
        flat: Whether names have `_` for every dot.
        factors: What A and B are called.
        knows: A pattern of the names that the function knows.
    """

    kind: str
    converter: str
    start: str = "diffusion_model."
    sizes: tuple = ()
    flat: bool = False
    factors: tuple = ("lora_A", "lora_B")
    knows: str = ".*"

    def __str__(self):
        return self.converter


def lora_judge(kind, converter, **more):
    return LoraJudge(kind, f"_convert_{converter}_lora_to_diffusers", **more)


DOWN_UP = ("lora_down", "lora_up")
KOHYA = {"start": "lora_unet_", "flat": True, "factors": DOWN_UP}
LORAS = [
    lora_judge("AceStepTransformer1DModel", "non_diffusers_ace_step", start="base_model.model."),
    lora_judge("CosmosTransformer3DModel", "non_diffusers_anima", knows=rf"(?!{COSMOS_1})"),
    # it forgets to swap the halves of final_layer.adaLN_modulation.1 (0.42.1)
    lora_judge("Flux2Transformer2DModel", "non_diffusers_flux2", knows=r"(?!final_layer\.ada)"),
    lora_judge(
        "Flux2Transformer2DModel", "kohya_flux2", **KOHYA,
        knows=r"double_blocks|single_blocks|img_in|txt_in|time_in|final_layer\.linear",
    ),
    lora_judge("Flux3Transformer2DModel", "non_diffusers_flux3",
               knows=r"(content_mode|txt_mode|single)_blocks"),
    lora_judge("FluxTransformer2DModel", "kohya_flux", **KOHYA),
    lora_judge("FluxTransformer2DModel", "kohya_flux", factors=DOWN_UP),
    # it cuts the A of txt_in's qkv in three and that of the last in two, as their B (0.42.1)
    lora_judge("HunyuanVideoTransformer3DModel", "hunyuan_video",
               knows=rf"(?!{COMFY})(?!.*self_attn_qkv|final_layer\.ada)"),
    lora_judge("Ideogram4Transformer2DModel", "non_diffusers_ideogram4"),
    lora_judge("Krea2Transformer2DModel", "non_diffusers_krea2"),
    lora_judge("LTX2VideoTransformer3DModel", "non_diffusers_ltx2",
               sizes=(("cross_attn_mod", True), ("audio_cross_attn_mod", True))),  # LTX-2.3
    lora_judge("Lumina2Transformer2DModel", "non_diffusers_lumina2",
               knows=r"(layers|noise_refiner|context_refiner)\."),
    lora_judge("MiniMaxH3Transformer3DModel", "non_diffusers_minimax_h3"),
    lora_judge("MiniMaxH3Transformer3DModel", "non_diffusers_minimax_h3", **KOHYA),
    lora_judge("WanTransformer3DModel", "non_diffusers_wan", sizes=IMAGE),
    lora_judge("WanTransformer3DModel", "musubi_wan", **KOHYA, sizes=IMAGE, knows=r"blocks\."),
    lora_judge("ZImageTransformer2DModel", "non_diffusers_z_image", **KOHYA, knows=r".*attention"),
]  # fmt: skip


@pytest.mark.parametrize("case", LORAS, ids=str)
def test_a_lora_in_native_names_lands_where_the_names_say(case):
    names = names_of_class(case.kind, **dict(case.sizes))
    native = {n: p for n, p in native_names(names).items() if re.match(case.knows, n)}
    assert native
    values = features({name: width_of(pieces, names) for name, pieces in native.items()})
    down, up = case.factors
    given = {}
    for name, rows in values.items():
        key = case.start + (name.replace(".", "_") if case.flat else name)
        given[f"{key}.{down}.weight"] = rows[:1, :1].float()
        given[f"{key}.{up}.weight"] = rows.float()  # exact: there are less than 2**24 of them
        if case.flat:
            given[f"{key}.alpha"] = torch.tensor(1.0)  # as the rank
    found = getattr(lora, case.converter)(given)
    found = {key.removeprefix("transformer."): value for key, value in found.items()}
    wrong = [
        f"{name} -> {piece}"
        for name, pieces in native.items()
        for piece in pieces
        if not torch.equal(found[f"{piece.path}.lora_A.weight"], values[name][:1, :1].float())
        or not torch.equal(found[f"{piece.path}.lora_B.weight"], cut(values[name], piece).float())
    ]
    assert not wrong


# Names in the order of the text, as ComfyUI's HunyuanVideo renames them when it loads a checkpoint.
COMFY_RENAMES = [
    ("txt_in.t_embedder.mlp.0", "txt_in.t_embedder.in_layer"),
    ("txt_in.t_embedder.mlp.2", "txt_in.t_embedder.out_layer"),
    ("txt_in.c_embedder.linear_1", "txt_in.c_embedder.in_layer"),
    ("txt_in.c_embedder.linear_2", "txt_in.c_embedder.out_layer"),
    ("_mod.linear", "_mod.lin"),
    ("_attn_qkv", "_attn.qkv"),
    ("mlp.fc1", "mlp.0"),
    ("mlp.fc2", "mlp.2"),
    ("_attn_proj", "_attn.proj"),
    (".modulation.linear", ".modulation.lin"),
    ("_in.mlp.2", "_in.out_layer"),
    ("_in.mlp.0", "_in.in_layer"),
]


def test_hunyuan_video_goes_by_comfyuis_names_too():
    native = native_names(names_of_class("HunyuanVideoTransformer3DModel"))
    makers = {name: pieces for name, pieces in native.items() if not re.match(COMFY, name)}
    comfy = {}
    for name, pieces in makers.items():
        for old, new in COMFY_RENAMES:
            name = name.replace(old, new)
        comfy[name] = pieces
    assert native == makers | comfy
    assert len(native) > len(makers)
    assert list(native)[: len(makers)] == list(makers)  # who writes takes the first


UNETS = {
    "sd1": {"cross_attention_dim": 768},
    "sdxl": dict(ARCHITECTURES["sdxl"]["unet"].sizes),
    # stabilityai/stable-diffusion-xl-refiner-1.0
    "sdxl-refiner": {
        **ARCHITECTURES["sdxl"]["unet"].sizes,
        "block_out_channels": (384, 768, 1536, 1536),
        "down_block_types": ("DownBlock2D", *("CrossAttnDownBlock2D",) * 2, "DownBlock2D"),
        "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 2, "UpBlock2D"),
        "transformer_layers_per_block": 4,
        "attention_head_dim": (6, 12, 24, 24),
        "cross_attention_dim": 1280,
        "projection_class_embeddings_input_dim": 2560,
    },
    # stabilityai/stable-diffusion-2-1-unclip
    "unclip": {
        **ARCHITECTURES["sd2"]["unet"].sizes,
        "class_embed_type": "projection",
        "projection_class_embeddings_input_dim": 2048,
    },
    # stabilityai/stable-diffusion-x4-upscaler
    "upscaler": {
        "in_channels": 7,
        "num_class_embeds": 1000,
        "cross_attention_dim": 1024,
        "block_out_channels": (256, 512, 512, 1024),
        "down_block_types": ("DownBlock2D", *("CrossAttnDownBlock2D",) * 3),
        "up_block_types": (*("CrossAttnUpBlock2D",) * 3, "UpBlock2D"),
        "only_cross_attention": (True, True, True, False),
        "use_linear_projection": True,
    },
    "one resnet": {"layers_per_block": 1, "cross_attention_dim": 768},
}


@pytest.mark.parametrize("kind", UNETS)
def test_a_checkpoint_of_stability_ai_lands_where_the_names_say(kind):
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(**UNETS[kind])
    names = names_of(unet)
    native, own = places_of(names)
    assert not own
    values = features({name: width_of(pieces, names) for name, pieces in native.items()})
    given = {
        f"model.diffusion_model.{name}.{part}": rows
        for name, rows in values.items()
        for part in ("weight", "bias")
    }
    found = single_file.convert_ldm_unet_checkpoint(given, unet.config)
    places = {name: piece for name, (piece,) in native.items()}
    assert all(piece == Piece(piece.path) for piece in places.values())
    wrong = [
        f"{name} -> {piece.path}"
        for name, piece in places.items()
        if not torch.equal(found[f"{piece.path}.weight"], values[name])
    ]
    assert not wrong


def test_a_kohya_file_for_sdxl_lands_in_diffusers_where_the_names_say():
    pipe = tiny_pipeline("sdxl")
    starts = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
    given, told = {}, {}
    for component, start in starts.items():
        names = names_of(getattr(pipe, component))
        spelt = native_names(names)
        if component == "text_encoder_2":  # kohya says `text_model.`, which this class has already
            spelt = {path: (Piece(path),) for path in names.layers if path.startswith("text_m")}
        for name, (piece,) in spelt.items():
            if "embeddings" in name:
                continue  # no LoRA of kohya sits on those
            out, width, *kernel = names.layers[piece.path]
            b, a = torch.randn(out, 2, *(1 for _ in kernel)), torch.randn(2, width, *kernel)
            key = start + name.replace(".", "_")
            given[f"{key}.lora_down.weight"], given[f"{key}.lora_up.weight"] = a, b
            given[f"{key}.alpha"] = torch.tensor(2.0)
            told[component, piece.path] = a, b
    pipe.load_lora_weights(given, adapter_name="kohya")
    for (component, path), (a, b) in told.items():
        layer = getattr(pipe, component).get_submodule(path)
        assert torch.equal(layer.lora_A["kohya"].weight, a), path
        assert torch.equal(layer.lora_B["kohya"].weight, b), path


def test_a_motion_unet_has_the_names_of_its_unet():
    sizes = {"layers_per_block": 1, "cross_attention_dim": 768}
    plain = native_names(names_of_class("UNet2DConditionModel", **sizes))
    moving = native_names(names_of_class("UNetMotionModel", **sizes))
    assert moving == plain


@pytest.mark.parametrize("wrapped", [False, True])
def test_clip_goes_by_its_names_with_and_without_text_model(wrapped):
    kind = "CLIPTextModelWithProjection" if wrapped else "CLIPTextModel"
    names = names_of_class(kind)
    native = native_names(names)
    assert set(names.layers) - {p.path for (p,) in native.values()} == (
        {"text_projection"} if wrapped else set()
    )
    for name, (piece,) in native.items():
        longer, shorter = (piece.path, name) if wrapped else (name, piece.path)
        assert longer == f"text_model.{shorter}"


def all_names():
    """Yields (id, names) of every class with rows, and of every public pipeline."""
    for kind in ROWS:
        yield kind, names_of_class(kind)
    for name in ARCHITECTURES:
        for component, names in architecture(name).items():
            yield f"{name}.{component}", names


def test_no_two_layers_share_a_name_even_with_underscores_for_dots():
    for ident, names in all_names():
        flat = {path.replace(".", "_"): (Piece(path),) for path in names.layers}
        assert len(flat) == len(names.layers), ident
        for name, pieces in native_names(names).items():
            assert name not in names.layers, ident
            assert flat.setdefault(name.replace(".", "_"), pieces) == pieces, f"{ident}: {name}"


def test_pieces_are_whole_layers_side_by_side():
    for ident, names in all_names():
        for name, pieces in native_names(names).items():
            if len(pieces) == 1:
                assert pieces[0].rows is None, f"{ident}: {name}"
                assert not pieces[0].swapped or names.layers[pieces[0].path][0] % 2 == 0
                continue
            end = 0
            for piece in pieces:
                assert piece.rows == (end, end + names.layers[piece.path][0]), f"{ident}: {name}"
                assert not piece.swapped
                end = piece.rows[1]
            assert len({names.layers[piece.path][1:] for piece in pieces}) == 1


def test_the_host_decides_how_a_fused_layer_is_cut():
    names = names_of_class(
        "Lumina2Transformer2DModel", hidden_size=96, num_attention_heads=6, num_kv_heads=2,
        axes_dim_rope=(4, 4, 8), num_layers=1,
    )  # fmt: skip
    assert native_names(names)["layers.0.attention.qkv"] == (
        Piece("layers.0.attn.to_q", (0, 96)),
        Piece("layers.0.attn.to_k", (96, 128)),
        Piece("layers.0.attn.to_v", (128, 160)),
    )


def test_the_last_block_of_sd3_has_its_shift_and_scale_swapped_and_no_other():
    native = native_names(architecture("sd3")["transformer"])
    swapped = {name for name, pieces in native.items() if pieces[0].swapped}
    last = "joint_blocks.23.context_block.adaLN_modulation.1"
    assert swapped == {last, "final_layer.adaLN_modulation.1"}


@pytest.mark.parametrize("kind", ["flux", "flux2", "sd3", "qwen-image"])
def test_projections_that_the_host_has_fused_are_one_piece(kind):
    model = tiny_pipeline(kind).transformer
    plain = native_names(names_of(model))
    model.fuse_qkv_projections()
    fused = native_names(names_of(model))
    assert fused.keys() == plain.keys()
    weights = dict(model.named_parameters())

    def rows(pieces):
        return torch.cat([weights[f"{piece.path}.weight"] for piece in pieces])

    changed = {name for name in plain if plain[name] != fused[name]}
    assert bool(changed) is (kind != "qwen-image")
    for name in changed:
        assert "qkv" in fused[name][0].path
        assert torch.equal(rows(fused[name]), rows(plain[name]))
    ends = [piece.rows[1] for name in changed for piece in fused[name] if piece.rows]
    assert bool(ends) is (kind == "flux")  # the single blocks, whose MLP lies beside


def test_hosts_whose_makers_have_the_same_names_have_no_others():
    for kind in ("QwenImageTransformer2DModel", "ErnieImageTransformer2DModel", "T5EncoderModel"):
        assert native_names(names_of_class(kind)) == {}
    assert native_names(Names("Anything", {"transformer_blocks.0.attn.to_q": (4, 4)})) == {}


def test_a_host_without_some_layers_lacks_their_names_alone():
    whole = architecture("flux")["transformer"]
    gone = r"time_text_embed\.guidance|transformer_blocks\.7\.|transformer_blocks\.3\.attn\.to_k"
    left = {path: shape for path, shape in whole.layers.items() if not re.match(gone, path)}
    lost = set(native_names(whole)) - set(native_names(replace(whole, layers=left)))
    assert {name for name in lost if not name.startswith("double_blocks.7.")} == {
        "guidance_in.in_layer",
        "guidance_in.out_layer",
        "double_blocks.3.img_attn.qkv",  # a part of it would have no place
    }
    assert len(lost) == 3 + 10
