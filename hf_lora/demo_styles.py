"""The demo's part with pictures: styles pulled from a Hub into a pipeline, alone and mixed.

Pipeline and styles are those of the project's `examples/emoji`. The Hub is one on this machine.
What the pipeline draws must be, value by value, what plain diffusers draws with the same files.
"""

from __future__ import annotations

import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

PROMPTS = ("bubble tea", "tiger", "christmas tree", "thinking face", "balloon", "owl")
PAIR = ("openmoji", "fluent")
HALVES = dict.fromkeys(PAIR, 0.5)
# pixels: a picture, between pictures, for the names of rows and for those of columns
SIDE, GAP, MARGIN, TOP = 128, 8, 120, 40

Log = Callable[[str], None]


def run(folder: Path, out: Path, log: Log = lambda _: None) -> dict[str, Any]:
    """Pushes two styles to a Hub on this machine, pulls and mixes them, writes `emoji.png`.

    Args:
        folder: Holds `base`, a pipeline, and `styles`, a folder for each.
        out: Where the picture goes; made when missing.
        log: Receives the results.

    Returns:
        The largest difference from plain diffusers (white is 1), seconds, the picture.

    Raises:
        LoraError: The folder lacks something, or a picture is not that of plain diffusers.
    """
    from hf_lora.attach import base_model, set_adapters
    from hf_lora.errors import LoraError

    began = time.perf_counter()
    check(folder)
    out.mkdir(parents=True, exist_ok=True)
    pipe = pipeline(folder / "base")
    requests = _pull(pipe, folder / "styles")
    with base_model(pipe):
        grid = {"base": drawn(pipe)}
    for label, weights in {**{name: {name: 1.0} for name in PAIR}, "half of each": HALVES}.items():
        set_adapters(pipe, weights)
        grid[label] = drawn(pipe)
    plain = pipeline(folder / "base")
    _load_plainly(plain, folder / "styles")
    plain.set_adapters(list(HALVES), list(HALVES.values()))
    worst = float(abs(drawn(plain) - grid["half of each"]).max())
    sheet(grid, PROMPTS).save(out / "emoji.png")
    seconds = time.perf_counter() - began
    log(
        f"{' and '.join(PAIR)}, pulled from a Hub on this machine ({requests} requests with the "
        f"pushes), alone and mixed in {out / 'emoji.png'}; the mix is {worst:g} from that of "
        f"plain diffusers; {seconds:.0f} s"
    )
    if worst > 0:
        raise LoraError(f"the mix differs by {worst:.1e} from what plain diffusers draws")
    return {"difference": worst, "seconds": seconds, "picture": str(out / "emoji.png")}


def check(folder: Path) -> None:
    """Raises LoraError for a folder without the pipeline or a style of the pair."""
    from hf_lora.errors import LoraError

    for part in ("base", *(f"styles/{name}" for name in PAIR)):
        if not (folder / part).is_dir():
            raise LoraError(
                f"{str(folder)!r} has no folder {part!r}",
                fix="Name the examples/emoji of a clone of the project.",
            )


def pipeline(folder: Path) -> Any:
    """Returns the base in float32, without a progress bar for each call."""
    import torch
    from diffusers import StableDiffusionPipeline

    made: Any = StableDiffusionPipeline
    pipe = made.from_pretrained(folder, safety_checker=None, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(pipe: Any, prompts: Sequence[str] = PROMPTS) -> Any:
    """Returns pictures (prompts, height, width, 3) from 0 to 1, each from its own noise."""
    import torch

    noise = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]
    options: Mapping[str, Any] = {"num_inference_steps": 25, "guidance_scale": 2.0}
    return pipe(list(prompts), generator=noise, output_type="np", **options).images


def sheet(rows: Mapping[str, Any], columns: Sequence[str]) -> Any:
    """Returns pictures as one, with names.

    Args:
        rows: Name of a row -> its pictures, (columns, height, width, 3) from 0 to 1.
        columns: Names of the columns.
    """
    from PIL import Image, ImageDraw

    step = SIDE + GAP
    made = Image.new("RGB", (MARGIN + len(columns) * step, TOP + len(rows) * step), "white")
    draw = ImageDraw.Draw(made)
    for column, name in enumerate(columns):
        place = (MARGIN + column * step + SIDE // 2, TOP // 2)
        lines = textwrap.fill(name, 18)
        draw.multiline_text(place, lines, "black", anchor="mm", align="center", font_size=13)
    for row, (name, pictures) in enumerate(rows.items()):
        top = TOP + row * step
        draw.text((8, top + SIDE // 2), name, "black", anchor="lm", font_size=14)
        for column, picture in enumerate(pictures):
            image = Image.fromarray((255 * picture).round().astype("uint8"))
            large = image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
            made.paste(large, (MARGIN + column * step, top))
    return made


def _load_plainly(pipe: Any, styles: Path) -> None:
    """Loads the styles as diffusers does."""
    from diffusers.utils import logging

    from hf_lora.inject import quiet

    level = logging.get_verbosity()
    logging.set_verbosity_error()  # it warns of text encoders, which these styles have none for
    try:
        with quiet():  # peft warns of a second adapter
            for name in PAIR:
                pipe.load_lora_weights(styles / name, adapter_name=name)
    finally:
        logging.set_verbosity(level)


def _pull(pipe: Any, styles: Path) -> int:
    """Loads the styles from a Hub on this machine; returns the requests that took."""
    from hf_lora.exchange import open_adapter
    from hf_lora.hub import push_lora
    from hf_lora.load import load_lora
    from hf_lora.testing import LocalHub

    with LocalHub("you") as hub:
        for name in PAIR:
            push_lora(open_adapter(styles / name), f"you/{name}", base_model="you/emoji")
            load_lora(pipe, f"you/{name}", name=name)
        return len(hub.requests)
