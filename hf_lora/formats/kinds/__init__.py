"""What the layers of foreign files hold, both ways: one foreign layer <-> a target of a record."""

from __future__ import annotations

from hf_lora.formats.kinds.loose import Loose
from hf_lora.formats.kinds.table import (
    KINDS,
    REFUSED,
    component_of,
    divided,
    loose_of,
    refusal,
)

__all__ = ["KINDS", "REFUSED", "Loose", "component_of", "divided", "loose_of", "refusal"]
