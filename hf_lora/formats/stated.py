"""What diffusers' header says of alpha in a file whose keys are of another program.

Such files state alpha as tensors. Where a module has none, the header's is taken, as diffusers
would, and not the rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from hf_lora.errors import BadAdapterFile, shown
from hf_lora.formats.container import parse_json
from hf_lora.formats.diffusers import DEFAULTS, METADATA, known_fields, states_alpha
from hf_lora.formats.kinds.loose import ALPHA, Loose, alpha_tensor
from hf_lora.limits import LoadLimits
from hf_lora.patterns import Patterns

_WHOLE = ""  # the component of a header whose fields name none


class Stated:
    """The configs of a header, by component; none where it states nothing.

    Args:
        metadata: The header.
        limits: Bounds on what is read.

    Raises:
        BadAdapterFile: What stands there is no JSON object.
    """

    def __init__(self, metadata: Mapping[str, str], limits: LoadLimits) -> None:
        self._configs: dict[str, dict[str, Any]] = {}
        if not states_alpha(metadata):
            return
        stated = parse_json(metadata[METADATA], limits.depth, METADATA)
        if not isinstance(stated, dict):
            raise BadAdapterFile(f"{METADATA} is no JSON object", field=METADATA)
        whole = stated.keys() <= known_fields()
        for key, value in stated.items():
            component, _, field = (_WHOLE, "", key) if whole else key.partition(".")
            self._configs.setdefault(component, {})[field] = value

    def completed(self, loose: Loose, components: Iterable[str], names: Iterable[str]) -> Loose:
        """Returns a layer with the header's alpha, where it has none and the header states one.

        Args:
            loose: The layer.
            components: What the header may call its component, the likeliest first.
            names: What patterns of the header may call its module.

        Raises:
            BadAdapterFile: The header's alpha is no number, or a pattern is an expression.
        """
        at = next((n for n in (*components, _WHOLE) if n in self._configs), None)
        if at is None or ALPHA in loose.factors:
            return loose
        alpha = _alpha(self._configs[at], loose, names)
        return Loose({**loose.factors, ALPHA: alpha_tensor(alpha)}, loose.keys)


def _alpha(config: Mapping[str, Any], loose: Loose, names: Iterable[str]) -> float:
    """Returns alpha over rank times rank, which with rsLoRA is not the alpha of the config."""
    kind = str(config.get("peft_type", "LORA")).upper()
    field = "lora_alpha" if kind == "LORA" else "alpha"
    held = config.get("alpha_pattern") or {}
    patterns = Patterns(held if isinstance(held, Mapping) else {}, "alpha_pattern")
    found = [value for n in names if (value := patterns.value(n, None)) is not None]
    alpha = found[0] if found else config.get(field, DEFAULTS.get(kind, {}).get(field))
    number = isinstance(alpha, int | float) and not isinstance(alpha, bool)
    if not number or not math.isfinite(alpha) or alpha == 0:
        raise BadAdapterFile(
            f"{METADATA} has {field}={shown(alpha)}, which is no factor of an update",
            fix="Save it with its alphas.",
            field=METADATA,
        )
    a = loose.factors.get("lora_A")
    if kind == "LORA" and config.get("use_rslora") and a is not None:
        return float(alpha) * math.sqrt(a.shape[0])
    return float(alpha)
