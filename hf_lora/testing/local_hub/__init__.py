"""A Hub on the loopback address, which the unmodified Hugging Face clients push to and pull from.

store      repositories, commits, their ids
answers    a request, its answer, who may do what
cards      metadata of model cards
repos      routes: accounts, repositories, cards
reading    routes: trees, files, history
writing    routes: uploads, commits, branches, tags
routes     from a request to its route
faults     what goes wrong on purpose
server     HTTP
client     points the libraries of this process at it
hub        LocalHub
"""

from __future__ import annotations

from hf_lora.testing.local_hub.hub import LocalHub
from hf_lora.testing.local_hub.server import Request
from hf_lora.testing.local_hub.store import Commit

__all__ = ["Commit", "LocalHub", "Request"]
