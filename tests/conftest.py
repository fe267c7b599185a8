"""The order of the tests, and the Hub that several files push to.

Files that take long run first, so that no worker ends alone with one.
"""

import pytest

from hf_lora.testing import LocalHub

# The longest first; every other file takes seconds.
LONG = (
    "test_demo.py",
    "test_examples.py",
    "test_processes.py",
    "test_docs.py",
    "test_train.py",
)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


@pytest.fixture
def hub(monkeypatch):
    """A Hub on this machine, of whose requests none is unknown to it; nobody waits for it."""
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    with LocalHub("ann") as opened:
        yield opened
    assert not opened.unknown
