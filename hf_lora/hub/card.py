"""The model card of an adapter: what its file, its base and its owner say of it.

Metadata for the Hub's search and widgets, a page for readers. Everything that comes out of a file
is the claim of whoever wrote that file: it is shown as text, never as Markdown, and no local path
gets on the page.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from huggingface_hub.repocard_data import eval_results_to_model_index

from hf_lora.adapter import Adapter
from hf_lora.hub.about import About, CardExtras, is_license
from hf_lora.hub.escape import plain
from hf_lora.hub.metadata import dumped
from hf_lora.hub.readme import Section, State, digest, generated, section_piece
from hf_lora.hub.sections import sections_of
from hf_lora.hub.training import results

__all__ = ["Card", "CardExtras", "card_of"]

_STYLES = ("text-to-image", "image-to-image")  # tasks that the Hub shows a gallery for


@dataclass(frozen=True)
class Card:
    """A model card as it is generated, without any owner's changes.

    Attributes:
        data: The metadata, plain data without empty values.
        sections: The parts of the page.
    """

    data: Mapping[str, Any]
    sections: Sequence[Section]

    @property
    def body(self) -> str:
        """The page below the metadata, with the comments that later pushes go by."""
        pieces = [section_piece(section, 1, "\n") for section in self.sections]
        state = State(self.data, {piece.name: digest(piece.text) for piece in pieces})
        return "".join(piece.mark + piece.text for piece in generated(self.sections, state))

    @property
    def text(self) -> str:
        """The README."""
        return f"---\n{dumped(self.data)}\n---\n\n{self.body}"


def card_of(adapter: Adapter, extras: CardExtras | None = None) -> Card:
    """Returns the model card of an adapter.

    Args:
        adapter: The adapter, from `open_adapter` or from the header alone.
        extras: What no file says.
    """
    about = About(adapter, extras or CardExtras())
    return Card(_data(about), sections_of(about))


def _data(about: About) -> dict[str, Any]:
    extras = about.extras
    widget = [
        {"text": plain(prompt, 500) or "-", "output": {"url": path}}
        for path, prompt in extras.images.items()
    ]
    measured = results(about)
    found = {
        "base_model": about.base,
        "base_model_relation": "adapter" if about.base else "",
        "library_name": "diffusers" if about.is_pipeline else "peft",
        "pipeline_tag": about.task.tag,
        "license": extras.license
        or (extras.base_license if is_license(extras.base_license) else ""),
        "language": list(extras.language),
        "datasets": list(extras.datasets),
        "tags": _tags(about),
        "instance_prompt": about.prompt if about.is_pipeline else "",
        "widget": widget,
        "model-index": eval_results_to_model_index(about.title, measured) if measured else [],
    }
    # through JSON: tuples become lists, and what the state remembers is what YAML gives back
    data = json.loads(json.dumps(found, default=str))
    return {key: value for key, value in data.items() if value}


def _tags(about: About) -> list[str]:
    """Returns the tags, those of the Hub's own pages first."""
    tag, parts = about.task.tag, about.adapter.components
    style = about.is_pipeline and tag in _STYLES
    tags = [
        *about.kinds.values(),
        "hf_lora",
        about.library,
        tag if about.is_pipeline else "",
        f"base_model:adapter:{about.base}" if about.base else "",
        # the page for styles; the newer name is that of cards of diffusion transformers
        "template:sd-lora" if style else "",
        "template:diffusion-lora" if style and "transformer" in parts else "",
        *(plain(word, 100) for word in about.extras.tags),
    ]
    return list(dict.fromkeys(word for word in tags if word))
