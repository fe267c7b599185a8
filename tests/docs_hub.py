"""Imported before a page that pushes: a Hub on this machine, with the pages' model on it."""

import atexit
from pathlib import Path

from huggingface_hub import constants

from hf_lora import attach_lora, save_lora
from hf_lora.testing import LocalHub, tiny

cache = Path(constants.HF_HUB_CACHE)
models = {
    repo.name.removeprefix("models--").replace("--", "/"): {
        str(file.relative_to(repo / "snapshots" / ("0" * 40))): file.read_bytes()
        for file in repo.glob("snapshots/*/**/*")
        if file.is_file()
    }
    for repo in cache.glob("models--*")
}
hub = LocalHub("ann")
atexit.register(hub.__exit__, None, None, None)
hub.__enter__()
for name, files in models.items():
    hub.add_repo(name, files)
if not Path("plain").exists():
    save_lora(attach_lora(tiny("llama")), "plain")
