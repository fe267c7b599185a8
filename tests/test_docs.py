"""Every code block of the README and of the documentation runs.

The Python blocks of a page run in order, in one fresh interpreter in an empty folder; after them
its `hf-lora plan` and `hf-lora inspect` lines. The model ids on the pages are real. Here HF_HOME
names a cache prepared below, where each of these ids is a tiny random model of the same class, so
that a page runs offline in seconds and reads as a user would write it.
"""

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_lora import demo_images
from hf_lora.testing import tiny_pipeline

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
MODEL_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
PIPELINE_ID = "stable-diffusion-v1-5/stable-diffusion-v1-5"
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NOT_RUN = (["demo"], ["register"], ["unregister"])  # takes minutes; changes the home folder
# All commands of a page in one process, since importing takes longer than most of them.
COMMANDS = """
import contextlib, io, json, sys
from hf_lora.cli import main
for words in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        code = main(words)
    assert code == 0 and printed.getvalue().strip(), (words, code, printed.getvalue())
"""


def blocks(page, language):
    """Yields (number of lines before the block, its text) for each fenced block of a language."""
    text = page.read_text(encoding="utf-8")
    for match in re.finditer(rf"^```{language}\n(.*?)^```", text, re.M | re.S):
        yield text.count("\n", 0, match.start(1)), match.group(1)


def script_of(page):
    """Returns the page's Python blocks at the lines they have on the page."""
    lines = []
    for before, text in blocks(page, "python"):
        lines += [""] * (before - len(lines)) + text.splitlines()
    return "\n".join(lines) + "\n"


def commands_of(page):
    """Yields the `hf-lora` lines of the page that need no download and no minutes."""
    for _, text in blocks(page, "shell"):
        for line in text.splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["hf-lora"] and words[1:2] not in NOT_RUN:
                yield words[1:]


def byte_tokenizer():
    """Returns a tokenizer of single bytes, which is enough for any text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<|im_end|>", *alphabet])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    made.chat_template = CHATML
    return made


def in_cache(home, repo_id):
    """Returns the folder of a repository's only commit in a cache."""
    repo = home / "hub" / f"models--{repo_id.replace('/', '--')}"
    commit = "0" * 40
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    return repo / "snapshots" / commit


@pytest.fixture(scope="session")
def hf_home(tmp_path_factory):
    """Returns an HF_HOME whose cache holds tiny stand-ins for the pages' model and pipeline."""
    home = tmp_path_factory.mktemp("hf_home")
    snapshot = in_cache(home, MODEL_ID)
    tiny_pipeline("sd").save_pretrained(in_cache(home, PIPELINE_ID))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(snapshot)
    byte_tokenizer().save_pretrained(snapshot)
    return home


@pytest.fixture
def run(hf_home, tmp_path):
    """Returns a function that runs Python in an empty folder, with the prepared cache, offline."""
    environment = os.environ | {
        "HF_HOME": str(hf_home),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),
        "PYTHONIOENCODING": "utf-8",
    }
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "TRANSFORMERS_CACHE"):
        environment.pop(name, None)

    def call(*arguments):
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=tmp_path,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return call


def put_styles(folder):
    """Writes two files as kohya does, under the names that pages give them."""
    unet = tiny_pipeline("sd").unet
    for name, style in (("style", "waves"), ("detail", "sparks")):
        demo_images.write_style(unet, folder, style).rename(folder / f"{name}.safetensors")


def has_code(page):
    return bool(script_of(page).strip() or list(commands_of(page)))


@pytest.mark.parametrize("page", list(filter(has_code, PAGES)), ids=lambda page: page.name)
def test_the_code_of_the_page_runs(page, run, tmp_path):
    if "style.safetensors" in page.read_text(encoding="utf-8"):
        put_styles(tmp_path)
    if "examples/emoji" in script_of(page):  # read from the root of a clone
        (tmp_path / "examples").symlink_to(ROOT / "examples")
    # pages that push do so to a Hub on this machine
    opened = "import tests.docs_hub; " if "hf-lora push" in page.read_text(encoding="utf-8") else ""
    script = script_of(page)
    if script.strip():
        script = opened + script
        path = tmp_path / f"{page.stem}.py"  # a traceback's line is the page's line
        path.write_text(script, encoding="utf-8")
        run(path.name)
    commands = list(commands_of(page))
    if commands:
        run("-c", f"{opened}\n{COMMANDS}", json.dumps(commands))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_relative_link_leads_somewhere(page):
    links = re.findall(r"\]\((?!https?://|#)([^)#\s]+)", page.read_text(encoding="utf-8"))
    assert not [link for link in links if not (page.parent / link).exists()]


def test_the_pages_state_the_bounds_and_the_tested_set_as_they_are():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    bounds = dict(line.split(">=") for line in project["dependencies"])
    pins = dict(re.findall(r"^([\w-]+)==(\S+)", (ROOT / "constraints.txt").read_text(), re.M))
    page = (ROOT / "docs/install.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([\w-]+) \| (\d\S*)[^|]* \| (\d\S*) \|", page, re.M)
    assert set(rows) == {(name, bound, pins[name]) for name, bound in bounds.items()}


def test_every_make_target_that_the_pages_name_exists():
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.M))
    pages = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "benchmarks/README.md"]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    named = set(re.findall(r"`make ([a-z][a-z-]*)", text))
    named |= set(re.findall(r"^make ([a-z][a-z-]*)", text, re.M))
    assert named <= targets
