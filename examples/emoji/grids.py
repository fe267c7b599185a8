"""The pictures of docs/emoji.md: base, styles, strengths, mixes, and the true pictures beside them.

Two minutes on two cores; for the true pictures it wants the pictures.npz of pictures.py:

    python grids.py FOLDER ../../docs/img
"""

import json
import sys
from pathlib import Path

import numpy as np
from pictures import BASE, CONCEPTS, HERE, SETS, SIDE, caption
from PIL import Image
from train_styles import STYLES

from hf_lora import base_model, load_lora, set_adapters
from hf_lora.demo_styles import drawn, pipeline, sheet

SHOWN = 8
STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)


def main():
    folder, out = Path(sys.argv[1]), Path(sys.argv[2])
    data = np.load(folder / "pictures.npz")
    row = {name: i for i, name in enumerate(data["names"].tolist())}
    held = json.loads(CONCEPTS.read_text())["held_out"]
    concepts = held[:: len(held) // SHOWN][:SHOWN]  # evenly, so not chosen by how they look
    captions = [caption(name) for name in concepts]
    true = {style: data[style][[row[name] for name in concepts]] / 255 for style in SETS}

    fifty = np.stack([data[BASE][row[name]] for name in held[:50]])  # for tests/test_emoji.py
    tiles = fifty.reshape(5, 10, SIDE, SIDE, 3).swapaxes(1, 2).reshape(5 * SIDE, 10 * SIDE, 3)
    Image.fromarray(tiles).save(HERE / "held_out.png", optimize=True)

    pipe = pipeline(HERE / "base")
    for style in STYLES:
        load_lora(pipe, HERE / "styles" / style, name=style)
    with base_model(pipe):
        base = drawn(pipe, captions)
    rows = {f"{BASE}, true": true[BASE], "base": base}
    for style in STYLES:
        set_adapters(pipe, style)
        rows |= {f"{style}, true": true[style], f"LoRA {style}": drawn(pipe, captions)}
    sheet(rows, captions).save(out / "emoji_styles.png", optimize=True)

    rows = {}
    for style in STYLES:
        columns = []
        for strength in STRENGTHS:
            set_adapters(pipe, {style: strength})
            columns.append(drawn(pipe, captions[1:3]))
        for some, name in zip(np.stack(columns, 1), captions[1:3], strict=True):
            rows[f"{style}\n{name}"] = some
    sheet(rows, [f"{s:g}" for s in STRENGTHS]).save(out / "emoji_strengths.png", optimize=True)

    first, second = STYLES[:2]
    rows = {}
    for part in (0.0, 0.25, 0.5, 0.75, 1.0):
        set_adapters(pipe, {first: 1 - part, second: part})
        rows[f"{1 - part:g} + {part:g}"] = drawn(pipe, captions)
    sheet(rows, captions).save(out / "emoji_mixed.png", optimize=True)


if __name__ == "__main__":
    main()
