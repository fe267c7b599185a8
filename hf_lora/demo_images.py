"""The demo's second part: style LoRAs in a diffusion pipeline, from files as kohya writes them.

The pipeline is Stable Diffusion in small, with random weights, made on the spot: its pictures show
nothing but that a style changes them, by how much, and that two mix. The files are put together
here key by key, not by the code that reads them, and every picture is compared with one of a base
whose weights hold the updates, computed in float64.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

STYLES = {"waves": (4, 2.0, 1), "sparks": (8, 12.0, 2)}  # name -> rank, alpha, seed
STRENGTHS = (0.0, 0.5, 1.0)
ROWS: tuple[tuple[str, ...], ...] = (("waves",), ("sparks",), ("waves", "sparks"))
SCALE, GAP = 6, 4  # pixels of the grid for one of the picture, and between pictures
TOLERANCE = 1e-3  # a quarter of a grey level, after steps in float32 that magnify all rounding

Log = Callable[[str], None]


def run(out: Path, log: Log = lambda _: None) -> dict[str, Any]:
    """Loads two styles, mixes them at three strengths and writes `styles.png`.

    Args:
        out: Folder for the files and the picture; made when missing.
        log: Receives the results, some lines at a time.

    Returns:
        Largest difference from the judge for each picture (white is 1), seconds, and the grid.

    Raises:
        LoraError: A picture is not what the base with the styles in its weights makes.
    """
    from hf_lora.attach import set_adapters
    from hf_lora.errors import LoraError
    from hf_lora.load import load_lora
    from hf_lora.testing import tiny_pipeline

    began = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    pipe = tiny_pipeline("sd")
    files = {name: write_style(pipe.unet, out, name) for name in STYLES}
    for name, file in files.items():
        report = load_lora(pipe, file, name=name)
        rank, alpha, _ = STYLES[name]
        what = f"{report.targets} layers, alpha {alpha:g}, rank {rank}"
        log(f"{file.name}, in kohya's spelling: {what}")
    pictures, differences = [], {}
    for names in ROWS:
        for strength in STRENGTHS:
            set_adapters(pipe, dict.fromkeys(names, strength))
            pictures.append(_picture(pipe))
            key = f"{' + '.join(names)} at {strength:g}"
            differences[key] = _difference(pictures[-1], names, strength)
    worst = max(differences.values())
    _grid(pictures, len(STRENGTHS)).save(out / "styles.png")
    seconds = time.perf_counter() - began
    log(
        f"{len(pictures)} pictures in {out / 'styles.png'}, at most {worst:.0e} from the base with "
        f"the styles in its weights; {seconds:.0f} s"
    )
    if worst > TOLERANCE:
        raise LoraError(f"a picture differs by {worst:.1e} from the judge's: {differences}")
    return {"differences": differences, "seconds": seconds, "picture": str(out / "styles.png")}


def factors(unet: Any, name: str) -> dict[str, tuple[Any, Any]]:
    """Returns path -> (A: (rank, in), B: (out, rank)) of a style, float32, drawn from its seed."""
    import torch

    rank, _, seed = STYLES[name]
    draw = torch.Generator().manual_seed(seed)
    return {
        path: (
            torch.randn(rank, module.in_features, generator=draw) / module.in_features**0.5,
            torch.randn(module.out_features, rank, generator=draw),
        )
        for path, module in unet.named_modules()
        if isinstance(module, torch.nn.Linear) and ".attn" in path
    }


def write_style(unet: Any, folder: Path, name: str) -> Path:
    """Writes a style as sd-scripts does: flat names, alpha as a tensor, facts in the header."""
    import torch
    from safetensors.torch import save_file

    rank, alpha, _ = STYLES[name]
    tensors: dict[str, Any] = {}
    for path, (a, b) in factors(unet, name).items():
        key = f"lora_unet_{path.replace('.', '_')}"
        tensors |= {f"{key}.lora_down.weight": a, f"{key}.lora_up.weight": b}
        tensors[f"{key}.alpha"] = torch.tensor(alpha)
    header = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(alpha),
        "ss_base_model_version": "sd_v1",
        "modelspec.trigger_phrase": f"{name} style",
    }
    file = folder / f"{name}.safetensors"
    save_file(tensors, file, header)
    return file


def _picture(pipe: Any) -> Any:
    """Returns one picture as values from 0 to 1, (height, width, 3), from the same noise always."""
    import torch

    draw = torch.Generator().manual_seed(0)
    options: Mapping[str, Any] = {"num_inference_steps": 4, "output_type": "np"}
    return pipe("a ship", generator=draw, **options).images[0]


def _difference(picture: Any, names: tuple[str, ...], strength: float) -> float:
    """Returns the largest difference from the picture of a base that holds the styles itself."""
    import numpy
    import torch

    from hf_lora.testing import tiny_pipeline

    pipe = tiny_pipeline("sd")
    layers = dict(pipe.unet.named_modules())
    updates = {name: factors(pipe.unet, name) for name in names}
    with torch.no_grad():
        for name, held in updates.items():
            rank, alpha, _ = STYLES[name]
            for path, (a, b) in held.items():
                delta = strength * alpha / rank * (b.double() @ a.double())
                weight = layers[path].weight
                weight.copy_(weight.double() + delta)
    judge = _picture(pipe)
    return float(numpy.abs(picture - judge).max())


def _grid(pictures: list[Any], columns: int) -> Any:
    """Returns the pictures as one, enlarged, a style a row and a strength a column."""
    from PIL import Image

    height, width = (SCALE * size for size in pictures[0].shape[:2])
    rows = -(-len(pictures) // columns)
    size = (columns * (width + GAP) + GAP, rows * (height + GAP) + GAP)
    grid = Image.new("RGB", size, "white")
    for number, picture in enumerate(pictures):
        row, column = divmod(number, columns)
        image = Image.fromarray((255 * picture).round().astype("uint8"))
        place = (GAP + column * (width + GAP), GAP + row * (height + GAP))
        grid.paste(image.resize((width, height), Image.Resampling.NEAREST), place)
    return grid
