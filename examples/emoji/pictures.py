"""Emoji in four styles as pictures of 64 x 64 pixels, and the concepts that are learnt from them.

The sets are npm packages of Iconify, drawings as SVG. Fetch them into a folder (7 MB) and run this
there, four minutes on one core:

    pip install resvg-py==0.5.0
    npm pack @iconify-json/noto@1.2.9 @iconify-json/openmoji@1.2.29 \
        @iconify-json/fluent-emoji-flat@1.2.6 @iconify-json/twemoji@1.2.5
    python pictures.py FOLDER

It writes `pictures.npz` and `sets.npz` into the folder, and `concepts.json` beside this file where
it is missing.
"""

import io
import json
import re
import sys
import tarfile
from itertools import combinations
from pathlib import Path

import numpy as np

SIDE = 64
HERE = Path(__file__).parent
CONCEPTS = HERE / "concepts.json"
BASE = "noto"
# Style -> package and version, licence and whom it asks to name.
SETS = {
    "noto": ("noto-1.2.9", "Apache-2.0", "Noto Emoji, Google Inc"),
    "openmoji": ("openmoji-1.2.29", "CC-BY-SA-4.0", "OpenMoji, HfG Schwäbisch Gmünd"),
    "fluent": ("fluent-emoji-flat-1.2.6", "MIT", "Fluent Emoji, Microsoft Corporation"),
    "twemoji": ("twemoji-1.2.5", "CC-BY-4.0", "Twemoji, Twitter and other contributors"),
}
# Pictures of things. Signs, flags and people differ by a detail that 64 pixels hardly show.
KINDS = (
    "Activities",
    "Animals & Nature",
    "Food & Drink",
    "Objects",
    "Smileys & Emotion",
    "Travel & Places",
)
NO_THINGS = ("-oclock", "-thirty", "-heart", "-button", "flag", "calendar", "globe-showing")
LEARNT, HELD_OUT = 400, 100
TONES = re.compile(r"-(medium-)?(light|medium|dark)(-skin-tone)?$|-skin-tone")


def read_sets(folder):
    """Returns style -> the set's `icons.json`, and the names of things by Noto's categories."""
    sets, things = {}, set()
    for style, (package, _, _) in SETS.items():
        with tarfile.open(folder / f"iconify-json-{package}.tgz") as file:
            sets[style] = json.load(file.extractfile("package/icons.json"))
            if style == BASE:
                kinds = json.load(file.extractfile("package/metadata.json"))["categories"]
                things = {name for kind in KINDS for name in kinds[kind]}
    return sets, things


def drawn(icons, name):
    """Returns an icon on white, bytes (SIDE, SIDE, 3)."""
    import resvg_py
    from PIL import Image

    icon = icons["icons"][name]
    box = [icon.get(x, icons.get(x, y)) for x, y in zip(("left", "top"), (0, 0), strict=True)]
    box += [icon.get(x, icons.get(x, 16)) for x in ("width", "height")]
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{" ".join(map(str, box))}" width="{SIDE}" height="{SIDE}">{icon["body"]}</svg>'
    )
    made = resvg_py.svg_to_bytes(svg_string=svg, width=SIDE, height=SIDE, background="white")
    return np.asarray(Image.open(io.BytesIO(bytes(made))).convert("RGB"))


def likeness(pictures):
    """Returns how alike the sets draw each concept: mean correlation of their coarse shapes."""
    coarse = []
    for style in SETS:
        few = pictures[style].reshape(-1, 16, SIDE // 16, 16, SIDE // 16, 3).mean((2, 4, 5))
        flat = few.reshape(len(few), -1)
        flat = flat - flat.mean(1, keepdims=True)
        coarse.append(flat / (np.linalg.norm(flat, axis=1, keepdims=True) + 1e-6))
    return np.mean([(a * b).sum(1) for a, b in combinations(coarse, 2)], 0)


def choose(names, pictures):
    """Returns the concepts all sets draw most alike, split at random before any training."""
    best = np.argsort(-likeness(pictures), kind="stable")[: LEARNT + HELD_OUT]
    mixed = np.random.default_rng(0).permutation(sorted(names[i] for i in best)).tolist()
    return {"learnt": sorted(mixed[:LEARNT]), "held_out": sorted(mixed[LEARNT:])}


def caption(concept):
    """Returns what a concept is called: its name in words."""
    return concept.replace("-", " ")


def main():
    folder = Path(sys.argv[1])
    sets, things = read_sets(folder)
    shared = set.intersection(*(set(s["icons"]) for s in sets.values()))
    names = sorted(n for n in shared & things if not any(part in n for part in NO_THINGS))
    pictures = {style: np.stack([drawn(sets[style], n) for n in names]) for style in SETS}
    every = np.stack([drawn(sets[BASE], name) for name in sorted(sets[BASE]["icons"])])
    np.savez_compressed(folder / "pictures.npz", names=names, every=every, **pictures)
    whole = {
        style: [n for n in sorted(sets[style]["icons"]) if not TONES.search(n)] for style in SETS
    }
    np.savez_compressed(
        folder / "sets.npz",  # for the judges
        **{style: np.stack([drawn(sets[style], n) for n in whole[style]]) for style in SETS},
        **{f"{style} names": whole[style] for style in SETS},
    )
    if not CONCEPTS.exists():
        CONCEPTS.write_text(json.dumps(choose(names, pictures), indent=1) + "\n")
    print(f"{len(names)} concepts in {len(SETS)} styles, {len(every)} pictures of {BASE}")


if __name__ == "__main__":
    main()
