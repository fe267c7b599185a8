"""A bar while a large file is read, and nothing anywhere else."""

import importlib
import io
import sys

import pytest

from hf_lora.progress import LARGE, reading


class Terminal(io.StringIO):
    """A standard error that somebody looks at."""

    def isatty(self):
        return True


def shown(monkeypatch, size, stream):
    monkeypatch.setattr(sys, "stderr", stream)
    with reading("style.safetensors", size) as moved:
        if moved is not None:
            moved(size // 2)
            moved(size - size // 2)
    return moved is not None


@pytest.fixture(autouse=True)
def switch(monkeypatch):
    """The module of the switch; `huggingface_hub.utils.tqdm` is its class."""
    module = importlib.import_module("huggingface_hub.utils.tqdm")
    monkeypatch.setattr(module, "HF_HUB_DISABLE_PROGRESS_BARS", None)
    monkeypatch.setattr(module, "progress_bar_states", {})
    return module


def test_a_large_file_shows_a_bar_on_a_terminal(monkeypatch):
    stream = Terminal()
    assert shown(monkeypatch, LARGE, stream)
    assert "style.safetensors" in stream.getvalue()
    assert "200M" in stream.getvalue()


@pytest.mark.parametrize(
    ("size", "stream"), [(LARGE - 1, Terminal()), (LARGE, io.StringIO()), (LARGE, None)]
)
def test_small_files_and_pipes_are_quiet(monkeypatch, size, stream):
    assert not shown(monkeypatch, size, stream)
    assert stream is None or stream.getvalue() == ""


def test_a_closed_standard_error_is_no_error(monkeypatch):
    stream = Terminal()
    stream.close()
    assert not shown(monkeypatch, LARGE, io.TextIOWrapper(io.BytesIO()))
    closed = io.TextIOWrapper(io.BytesIO())
    closed.close()
    assert not shown(monkeypatch, LARGE, closed)


def test_the_switch_of_huggingface_hub_holds(switch, monkeypatch):
    monkeypatch.setattr(switch, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    stream = Terminal()
    shown(monkeypatch, LARGE, stream)
    assert stream.getvalue() == ""
