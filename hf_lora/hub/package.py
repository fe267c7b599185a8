"""The files of a push: an adapter that names its base by a Hub id, checked, and its images."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from hf_lora.adapter import Adapter
from hf_lora.errors import InvalidOption
from hf_lora.exchange import open_adapter, save_adapter
from hf_lora.hub.about import is_hub_id
from hf_lora.save import adapter_on

log = logging.getLogger(__name__)

CARD = "README.md"
_PATH = re.compile(r"(/|~|\.{1,2}[/\\]|[A-Za-z]:[/\\]|\\\\|file:)")
_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif")


def package(host: object, folder: Path, name: str, base_model: str) -> tuple[Adapter, list[Path]]:
    """Writes the files of an adapter as they are published, and reads them back.

    Args:
        host: A model or pipeline with the adapter, or an `Adapter`.
        folder: An empty folder.
        name: Which adapter of the host.
        base_model: Hub id of the base; empty: the one that the adapter names, if it is an id.

    Returns:
        The adapter as it was read back, and its files.
    """
    adapter = host if isinstance(host, Adapter) else adapter_on(host, name)
    save_adapter(_published(adapter, base_model), folder)
    return open_adapter(folder), sorted(folder.iterdir())


def _published(adapter: Adapter, base_model: str) -> Adapter:
    """Returns the adapter without what only this machine knows."""
    if base_model and not is_hub_id(base_model):
        raise InvalidOption(
            f"base_model={base_model!r} is no repository id",
            fix="Give one like 'user/name'.",
            field="base_model",
        )
    manifest = adapter.manifest
    found = manifest.base.id or str(adapter.info["base"] or "")
    base = base_model or (found if is_hub_id(found) else "")
    if not base:
        log.warning(
            "the base of the adapter was loaded from %s; name it: push_lora(..., "
            "base_model='user/name')",
            repr(found) if found else "an unknown place",
        )
    components = {
        n: replace(c, config={**c.config, "base_model_name_or_path": base or None})
        for n, c in adapter.components.items()
    }
    manifest = replace(
        manifest,
        base=replace(
            manifest.base, id=base, revision=manifest.base.revision if base == found else ""
        ),
        training=_without_paths(manifest.training),
    )
    return replace(adapter, components=components, manifest=manifest)


def _without_paths(facts: Mapping[str, Any]) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for key, value in facts.items():
        if isinstance(value, Mapping):
            kept[key] = _without_paths(value)
        elif not (isinstance(value, str) and _PATH.match(value)):
            kept[key] = value
    return kept


def pictures(images: Mapping[str | os.PathLike[str], str]) -> dict[str, tuple[Path, str]]:
    """Returns path in the repository -> (file, prompt).

    Raises:
        InvalidOption: A file is missing or no picture, or two have one name.
    """
    found: dict[str, tuple[Path, str]] = {}
    for source, prompt in images.items():
        file = Path(source)
        at = f"images/{file.name}"
        if not file.is_file() or file.suffix.lower() not in _PICTURES or at in found:
            why = "is there twice" if at in found else "is no picture that a browser shows"
            raise InvalidOption(
                f"images has {str(source)!r}, which {why if file.is_file() else 'does not exist'}",
                fix=f"Give files of {', '.join(_PICTURES)}, each with a name of its own.",
                field="images",
            )
        found[at] = (file, str(prompt))
    return found
