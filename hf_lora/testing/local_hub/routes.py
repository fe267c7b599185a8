"""From a request to its answer: who asks, and which route it takes."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from urllib.parse import unquote

from hf_lora.testing.local_hub import reading, repos, writing
from hf_lora.testing.local_hub.answers import Answer, Call, Refused
from hf_lora.testing.local_hub.store import Store

__all__ = ["answer"]

# A revision with a slash comes quoted; so does a folder, but not the path of a file.
_PARTS = {
    "{repo}": r"([^/]+(?:/[^/]+)?)",
    "{revision}": r"([^/]+)",
    "{oid}": r"([0-9a-f]{64})",
    "{path}": r"(.+)",
}
Route = Callable[..., Answer]


def _compiled(template: str) -> re.Pattern[str]:
    pattern = re.escape(template)
    for name, part in _PARTS.items():
        pattern = pattern.replace(re.escape(name), part)
    return re.compile(pattern)


# The last row of `repos` takes any id, so it comes after all others.
_ROUTES: tuple[tuple[str, re.Pattern[str], Route], ...] = tuple(
    (method, _compiled(template), route)
    for method, template, route in (*reading.ROUTES, *writing.ROUTES, *repos.ROUTES)
)


def _user(store: Store, call: Call) -> str | None:
    """Returns who signs a request, None for nobody.

    Raises:
        Refused: The token is not one of this Hub.
    """
    said = call.headers.get("authorization")
    if said is None:
        return None
    if said != f"Bearer {store.token}":
        raise Refused(401, "Invalid credentials in Authorization header")
    return store.user


def answer(store: Store, call: Call) -> Answer | None:
    """Carries a request out.

    A request that is refused changes nothing.

    Returns:
        The answer, None when the Hub has no such route.
    """
    method = "GET" if call.method == "HEAD" else call.method
    for known, pattern, route in _ROUTES:
        match = pattern.fullmatch(call.path) if known == method else None
        if match is None:
            continue
        with store.lock:
            try:
                signed = replace(call, user=_user(store, call))
                return route(store, signed, *map(unquote, match.groups()))
            except Refused as refused:
                return refused.answer()
    return None
