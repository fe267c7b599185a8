"""Manners of drawing that are computed from a picture, so that the base learns to tell them apart.

A pipeline that knows each thing in one style alone has no notion of style: a LoRA then unlearns the
things. So the base sees every picture in several manners as well, named in the caption.
"""

import numpy as np
from PIL import Image, ImageChops, ImageEnhance, ImageFilter, ImageOps


def _edges(image, width):
    """Returns where colours change, from 0 to 255, as lines of about `width` pixels."""
    found = Image.new("L", image.size)
    for band in image.split():
        wide = band.filter(ImageFilter.MaxFilter(width))
        narrow = band.filter(ImageFilter.MinFilter(width))
        found = ImageChops.lighter(found, ImageChops.subtract(wide, narrow))
    return found.point(lambda x: min(255, max(0, 3 * x - 120)))


def outlined(image):
    return ImageChops.subtract(image, Image.merge("RGB", [_edges(image, 3)] * 3))


def sketched(image):
    return ImageOps.invert(_edges(image, 3)).convert("RGB")


def flat(image):
    return ImageOps.posterize(image.filter(ImageFilter.MedianFilter(5)), 2).point(_stretched)


def _stretched(value):
    return min(255, value * 255 // 192)


def small(image):
    side = image.width * 3 // 4
    page = Image.new("RGB", image.size, "white")
    page.paste(image.resize((side, side), Image.Resampling.LANCZOS), (image.width // 8,) * 2)
    return page


def turned(degrees):
    """Returns a manner that turns all hues."""

    def manner(image):
        hue, saturation, value = image.convert("HSV").split()
        hue = hue.point(lambda x: (x + degrees * 256 // 360) % 256)
        return Image.merge("HSV", (hue, saturation, value)).convert("RGB")

    return manner


def pale(image):
    return Image.blend(image, Image.new("RGB", image.size, "white"), 0.5)


def dark(image):
    values = np.asarray(image).astype(int)
    white = values.min(2, keepdims=True) > 250  # paper stays white
    return Image.fromarray(np.where(white, 255, values * 3 // 5).astype(np.uint8))


MANNERS = {
    "outlined": outlined,
    "sketched": sketched,
    "flat": flat,
    "small": small,
    "mirrored": ImageOps.mirror,
    "grey": lambda image: ImageOps.grayscale(image).convert("RGB"),
    "green": turned(120),
    "blue": turned(180),
    "purple": turned(240),
    "pale": pale,
    "dark": dark,
    "vivid": lambda image: ImageEnhance.Color(image).enhance(2.0),
}


def in_manners(picture, draw, pairs=8):
    """Yields (words, picture) for each manner and for some pairs of them.

    Args:
        picture: Bytes (height, width, 3).
        draw: A generator of numpy that chooses the pairs.
        pairs: How many.
    """
    image = Image.fromarray(picture)
    words = list(MANNERS)
    chosen = [[word] for word in words]
    chosen += [sorted(draw.choice(words, 2, replace=False).tolist()) for _ in range(pairs)]
    for some in chosen:
        made = image
        for word in sorted(some, key=words.index, reverse=True):  # lines come last
            made = MANNERS[word](made)
        yield some, np.asarray(made)
