"""What VAE and text encoders make of rows, to be kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hf_lora.errors import BadDataset
from hf_lora.training.diffusion.inputs import Inputs


class Row(NamedTuple):
    """A picture and what is said of it.

    Attributes:
        pixels: (3, height, width) in [-1, 1].
        caption: May be empty.
        time_ids: Sizes and crop for SDXL, (6,) in pixels; None for the picture as it is.
    """

    pixels: Tensor
    caption: str
    time_ids: Tensor | None


@torch.no_grad()
def encoded(
    inputs: Inputs,
    rows: Sequence[Row],
    generator: torch.Generator | None,
    *,
    text: bool,
    first: int,
) -> dict[str, Tensor]:
    """Returns field -> tensor (rows, ...) of some rows, on the CPU.

    Args:
        inputs: Of the pipeline.
        rows: Checked by themselves.
        generator: Of one draw of latents; None to keep moments.
        text: Keep what the text encoders make of captions; token ids otherwise.
        first: Number of the first row, for errors.

    Raises:
        BadDataset: A caption is longer than an encoder takes.
    """
    found = inputs.encoded(torch.stack([row.pixels for row in rows]))
    if generator is not None and "moments" in found:
        found = {"latents": inputs.latents_of(found["moments"], generator)}
    try:
        ids = inputs.tokenize([row.caption for row in rows])
    except BadDataset as error:
        fact = f"rows {first} to {first + len(rows) - 1}: {error.fact}"
        raise BadDataset(fact, fix=error.fix, field=error.field) from None
    if text:
        made = inputs.encode(list(ids.values()))
        found["prompt_embeds"] = made.embeds
        if made.pooled is not None:
            found["pooled_prompt_embeds"] = made.pooled
    else:
        found.update(ids)
    told = [row.time_ids for row in rows if row.time_ids is not None]
    if told:
        found["time_ids"] = torch.stack(told)
    return {field: value.cpu().contiguous() for field, value in found.items()}


def check_finite(rows: object, piece: Mapping[str, Tensor], first: int) -> None:
    """Raises BadDataset for the first of some rows of which VAE or text encoders make no numbers.

    Args:
        rows: Of `cache_rows`; those of `picture_rows` know their files.
        piece: What was made, field -> tensor (rows, ...).
        first: Number of the first of them.
    """
    for field, value in piece.items():
        sound = value.isfinite().flatten(1).all(1).tolist()
        if all(sound):
            continue
        row = first + sound.index(False)
        known = getattr(rows, "pictures", None)
        raise BadDataset(
            f"{'' if known else f'row {row}: '}what VAE and text encoders make of it is not finite "
            f"({field})",
            fix="The base is broken, or its precision too low: load the VAE in float32.",
            file=str(known[row].path) if known else "",
            field=field,
        )
