"""An adapter in the host's spelling of module paths, which differs between versions."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from torch import nn

from hf_lora.adapter import Component
from hf_lora.paths import canonical, canonical_names
from hf_lora.patterns import plain_key, tails

Modules = Mapping[str, nn.Module]  # those of a bare model by path; it is itself at ""

# Config fields that name modules or parameters: a text, a list, or the keys of an object. BDLoRA's
# lie one level down, in `use_bdlora`.
_NAMES = (
    "exclude_modules", "feedforward_modules", "layers_pattern", "modules_to_save", "target_modules",
    "target_modules_bd_a", "target_modules_bd_b", "target_parameters", "trainable_token_indices",
)  # fmt: skip
_PATTERNS = ("alpha_pattern", "block_size_pattern", "rank_pattern")  # they match path ends
_LAYER = re.compile(r".*?\.([^.]*)\.\d+\.")  # where peft finds a layer's number


def respelled(modules: Modules, component: Component) -> tuple[Component, int]:
    """Returns the component in the host's spelling of module paths, and how many had another.

    Wrappers around a trunk differ between versions (vision-language models before transformers 5,
    CLIP with and without `text_model.`). A path is respelt where exactly one module of the host
    has its canonical path.
    """
    spelt = {p.partition(".base_layer")[0] for p in (*component.targets, *component.modules)}
    strange = spelt - modules.keys()
    if not strange:
        return component, 0
    by_name = {name: path for path, name in canonical_names(modules).items()}
    new = {p: by_name[canonical(p)] for p in strange if canonical(p) in by_name}
    if len(set(new.values()) - spelt) < max(1, len(new)):  # none, or two would become one
        return component, 0

    spelling = _Spelling({p: new.get(p, p) for p in sorted(spelt)}, by_name)
    return Component(
        spelling.config(component.config),
        {spelling.here(path): factors for path, factors in component.targets.items()},
        {spelling.here(path): tensors for path, tensors in component.modules.items()},
    ), len(new)


class _Spelling:
    """What the host calls the modules of a file (`paths`), and all others by canonical path."""

    def __init__(self, paths: Mapping[str, str], by_name: Mapping[str, str]) -> None:
        self._paths, self._by_name = paths, by_name
        self._known = {tail for path in by_name.values() for tail in tails(path)}
        # what peft finds by a name, in the file and on the host, both as paths on the host
        self._before: dict[str, list[str]] = defaultdict(list)
        self._after: dict[str, list[str]] = defaultdict(list)
        for old, path in paths.items():
            for spelt, found in ((old, self._before), (path, self._after)):
                for tail in tails(spelt):
                    found[tail].append(path)

    def here(self, path: str) -> str:
        outer, nest, rest = path.partition(".base_layer")
        return f"{self._paths[outer]}{nest}{rest}"

    def config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Returns a config that names on the host what this one names in the file."""
        new = dict(config)
        for field in _NAMES:
            value = new.get(field)
            if isinstance(value, str):
                new[field] = self._names(value)[0]
            elif isinstance(value, dict):
                new[field] = {name: v for entry, v in value.items() for name in self._names(entry)}
            elif isinstance(value, list):
                new[field] = [name for entry in value for name in self._names(entry)]
        for field in _PATTERNS:
            if isinstance(new.get(field), dict):
                new[field] = self._pattern(field, new[field])
        if isinstance(new.get("use_bdlora"), dict):
            new["use_bdlora"] = self.config(new["use_bdlora"])
        if new.get("layers_to_transform") not in (None, []) and not new.get("layers_pattern"):
            # peft finds a number behind two segments; a trunk's own paths may have only one there
            found = [_LAYER.match(path) for path in self._paths]
            new["layers_pattern"] = sorted({match[1] for match in found if match}) or None
        return new

    def _names(self, entry: Any) -> list[Any]:
        if not isinstance(entry, str):
            return [entry]
        parent, _, last = entry.rpartition(".")
        for end, rest in ((entry, ""), (parent, f".{last}")):  # a module, or a parameter of one
            if end in self._before:
                paths = self._before[end]
                return [entry] if paths == self._after.get(end) else [f"{p}{rest}" for p in paths]
        return [entry] if entry in self._known else [self._by_name.get(canonical(entry), entry)]

    def _pattern(self, field: str, pattern: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the pattern by whole paths, save for keys that match the same as they are."""
        new: dict[str, Any] = {}
        whole = "" if field == "block_size_pattern" else "^"  # peft's C3A does not know it
        for key, value in pattern.items():
            parent, _, last = (plain := plain_key(key, field)).rpartition(".")
            ends = ((plain, ""), (parent, f".{last}"))
            if key.startswith("^"):
                keys = [f"^{self._paths[end]}{rest}" for end, rest in ends if end in self._paths]
            elif all(self._before.get(end) == self._after.get(end) for end, _ in ends):
                keys = [key]
            else:
                keys = [f"{whole}{p}{r}" for end, r in ends for p in self._before.get(end, ())]
            new |= {k: value for k in keys if k not in new}  # the first that matches counts
        return new
