"""The part of `hf-lora demo` on the Hub: push the adapter, pull it back, compare.

The Hub is one on this machine. Nothing is sent to the real one unless a repository is named.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from hf_lora.errors import LoraError

Log = Callable[[str], None]

REPO = "you/king-james"
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"


def run(
    out: Path, answers: list[dict[str, str]], push: str = "", log: Log = lambda _: None
) -> dict[str, Any]:
    """Pushes the demo's adapter to a Hub on this machine, pulls it and writes its card.

    Args:
        out: The demo's folder, which holds `adapter`; `card.md` is written there.
        answers: What the model answered, rows of `prompt` and `after`, for the card.
        push: A repository of the real Hub to push it to as well; empty: none.
        log: Receives the results.

    Returns:
        Requests of the push and of the pull, the digest, and the commit on the real Hub, if any.

    Raises:
        LoraError: What was pulled is not what was pushed.
        HubError: The real Hub refuses.
    """
    from hf_lora.exchange import open_adapter
    from hf_lora.hub import CardExtras, pull_lora, push_lora
    from hf_lora.testing import LocalHub

    adapter = open_adapter(out / "adapter")
    card = CardExtras(
        license="apache-2.0",
        language=("en",),
        description="Says plain English in the English of King James.",
        answers=[(row["prompt"], row["after"]) for row in answers],
    )
    with LocalHub("you") as hub:
        push_lora(adapter, REPO, base_model=BASE, card=card)
        pushed = len(hub.requests)
        digest = pull_lora(REPO).digest
        pulled = len(hub.requests) - pushed
        (out / "card.md").write_bytes(hub.files(REPO)["README.md"])
    if digest != adapter.digest:
        raise LoraError(f"what was pulled has the digest {digest}, pushed was {adapter.digest}")
    log(
        f"pushed to and pulled from a Hub on this machine: {pushed} and {pulled} requests, the "
        f"same digest; its card is {out / 'card.md'}"
    )
    result: dict[str, Any] = {"push_requests": pushed, "pull_requests": pulled, "digest": digest}
    if push:
        commit = push_lora(adapter, push, base_model=BASE, card=card)
        result["pushed"] = commit.commit_url
        log(f"pushed to {commit.commit_url}")
    return result
