"""Requests and bytes of pulls and pushes: hf_lora beside plain peft and huggingface_hub.

All talk to a Hub on this machine (`hf_lora.testing.LocalHub`), which counts what it is asked for.
The base is loaded before; peft's `PeftModel.from_pretrained` and our `load_lora` load the same
repository. Times are left out: a loopback connection says nothing of the real one.

    python benchmarks/hub.py
"""

import logging
import platform
import sys
import tempfile
import warnings
from pathlib import Path

import huggingface_hub
import peft
import transformers
from huggingface_hub import HfApi

from hf_lora import attach_lora, load_lora, pull_lora, push_lora, save_lora
from hf_lora.testing import LocalHub, tiny

REPO = "user/style"


def measure(hub, act):
    """Returns how many requests an action makes, and the bytes that it receives and sends."""
    hub.requests.clear()
    act()
    found = list(hub.requests)
    return len(found), sum(r.received for r in found), sum(r.sent for r in found)


def pulls(hub):
    """Yields (what, who, figures) of loads of one published adapter."""
    commit = hub.commits(REPO)[0].oid

    def theirs():
        peft.PeftModel.from_pretrained(tiny("llama"), REPO)

    for state in ("empty cache", "again"):
        if state == "empty cache":
            hub.clear_cache()
        yield f"load, {state}", "peft", measure(hub, theirs)
    hub.clear_cache()
    for state in ("empty cache", "again"):
        yield f"load, {state}", "hf_lora", measure(hub, lambda: load_lora(tiny("llama"), REPO))
    pinned = measure(hub, lambda: pull_lora(REPO, revision=commit))
    yield "pull of a commit in the cache", "hf_lora", pinned


def pushes(hub, folder):
    """Yields (what, who, figures) of pushes."""
    model = attach_lora(tiny("llama"))
    saved = save_lora(model, folder / "adapter")
    api = HfApi()

    def theirs():
        api.create_repo("user/theirs", exist_ok=True)
        api.upload_folder(repo_id="user/theirs", folder_path=saved)

    for state in ("new", "unchanged"):
        yield f"push, {state}", "upload_folder", measure(hub, theirs)
    for state in ("new", "unchanged"):
        yield f"push, {state}", "hf_lora", measure(hub, lambda: push_lora(model, "user/ours"))


def main():
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    huggingface_hub.utils.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    print(
        f"{platform.machine()}, Python {sys.version.split()[0]}, huggingface_hub "
        f"{huggingface_hub.__version__}, peft {peft.__version__}"
    )
    print(
        "| what | by | requests | received, bytes | sent, bytes |\n| --- | --- | --- | --- | --- |"
    )
    with tempfile.TemporaryDirectory() as folder, LocalHub("user") as hub:
        push_lora(attach_lora(tiny("llama")), REPO)
        for rows in (pulls(hub), pushes(hub, Path(folder))):
            for what, who, (count, received, sent) in rows:
                print(f"| {what} | {who} | {count} | {received:,} | {sent:,} |")


if __name__ == "__main__":
    main()
