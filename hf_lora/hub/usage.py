"""How an adapter is loaded: code with its own repository, file and base."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

from hf_lora.adapter import MODEL, Component
from hf_lora.formats import diffusers_io as diffusers
from hf_lora.formats import peft
from hf_lora.hub.about import About
from hf_lora.hub.escape import fenced, plain

__all__ = ["usage"]

_BASE = "user/base"  # in the place of a base that is not known
# `max_lora_rank` of vLLM takes only these (docs.vllm.ai, 0.14, vllm.config.lora).
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


def usage(about: About) -> str:
    """Returns the Markdown of "How to use"."""
    return "\n\n".join(_blocks(about))


def _blocks(about: About) -> Iterator[str]:
    if about.extras.private:
        yield "The repository is private: log in first, with `hf auth login`."
    if not about.base:
        yield f"Its base has no id on the Hub that is known. Put it in the place of `{_BASE}`."
    yield from _pipeline(about) if about.is_pipeline else _model(about)


def _base(about: About) -> str:
    return _text(about.base or _BASE)


def _text(value: str) -> str:
    """Returns a text as a literal of Python, which JSON's are as well."""
    return json.dumps(value, ensure_ascii=False)


def _place(about: About, name: str, *, file: bool) -> str:
    """Returns the argument of `load_lora` or of diffusers that names folder or file, if needed."""
    inner = f"{about.folder}/{about.file}" if about.folder and file else about.file
    where = inner if file else about.folder
    return f", {name}={_text(where)}" if where else ""


# ---------------------------------------------------------------- pipelines


def _pipeline(about: About) -> Iterator[str]:
    task = about.task
    imports = f"from diffusers import {task.loader}"
    if task.needs:
        imports += f"\nfrom diffusers.utils import {', '.join(task.needs)}"
    made = f"pipe = {task.loader}.from_pretrained({_base(about)})"
    call = task.call.format(prompt=_text(about.prompt or "a prompt"))
    usual = about.file == diffusers.WEIGHTS and not about.folder
    named = "" if usual else _place(about, "file", file=True)
    yield "With hf_lora (`pip install hf-lora`), which checks the base as well:"
    yield fenced(
        f"{imports}\nfrom hf_lora import load_lora\n\n{made}\n"
        f"load_lora(pipe, {_text(about.repo)}{named})\n{call}",
        "python",
    )
    if set(about.kinds.values()) <= {"lora", "dora", "rslora"}:
        folder = _place(about, "subfolder", file=False)
        yield "With plain diffusers:"
        yield fenced(
            f"{imports}\n\n{made}\n"
            f"pipe.load_lora_weights({_text(about.repo)}, weight_name={_text(about.file)}{folder})"
            f"\n{call}",
            "python",
        )


# ---------------------------------------------------------------- models


def _model(about: About) -> Iterator[str]:
    loader = about.task.loader or "AutoModel"
    usual = about.file == peft.WEIGHTS
    labels = _labels(about)
    count = f", num_labels={labels}" if labels else ""
    inner = f", subfolder={_text(about.task.folder)}" if about.task.folder else ""
    made = f"model = {loader}.from_pretrained({_base(about)}{count}{inner})"
    writes = about.task.tag == "text-generation"
    imports = f"from {about.library} import {loader}{', AutoTokenizer' if writes else ''}"
    named = _place(about, "file", file=not usual)
    yield "With hf_lora (`pip install hf-lora`), which checks the base as well:"
    yield fenced(
        f"{imports}\nfrom hf_lora import load_lora\n\n{made}\n"
        f"load_lora(model, {_text(about.repo)}{named})" + (_written(about) if writes else ""),
        "python",
    )
    if not usual:
        return  # peft and vLLM look for no other name
    folder = _place(about, "subfolder", file=False)
    yield f"With plain peft and {about.library}:"
    yield fenced(
        f"from peft import PeftModel\nfrom {about.library} import {loader}\n\n{made}\n"
        f"model = PeftModel.from_pretrained(model, {_text(about.repo)}{folder})",
        "python",
    )
    if about.task.loader == "AutoModelForCausalLM":
        yield from _vllm(about)


def _written(about: About) -> str:
    prompt = plain(about.extras.answers[0][0], 200) if about.extras.answers else about.prompt
    return (
        f"\n\ntokenizer = AutoTokenizer.from_pretrained({_base(about)})\n"
        f'inputs = tokenizer({_text(prompt or "Once upon a time")}, return_tensors="pt")\n'
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))"
    )


def _labels(about: About) -> int:
    """Returns how many labels the head of a classifier tells apart; 0 where it has none."""
    if not about.task.tag.endswith("classification"):
        return 0
    held = about.adapter.components[MODEL].modules.values()
    rows = [t.shape[0] for tensors in held for t in tensors.values() if t.ndim == 2]
    return min(rows, default=0)


# Holds -> why vLLM does not serve the adapter, as of `PEFTHelper` and `LoRALayerWeights` there,
# which read one rank and one alpha for all layers.
_REFUSED: tuple[tuple[Callable[[About], bool], str], ...] = (
    (lambda about: _part(about).kind != "LORA", "it serves LoRA only"),
    (lambda about: bool(_part(about).config.get("use_dora")), "it does not serve DoRA"),
    (lambda about: bool(_part(about).modules), "it takes no modules that were trained whole"),
    (
        lambda about: (
            _part(about).config.get("bias", "none") != "none"
            or bool(_part(about).config.get("lora_bias"))
        ),
        "it takes no biases",
    ),
    (
        lambda about: bool(_part(about).config.get("trainable_token_indices")),
        "it takes no new rows of an embedding",
    ),
    (
        lambda about: bool(_part(about).config.get("target_parameters")),
        "it reads no LoRA on experts that are one parameter",
    ),
    (
        lambda about: (
            len(about.parts[MODEL]["rank"]) != 1 or len(about.parts[MODEL]["scaling"]) != 1
        ),
        "ranks or scalings differ between layers, and it reads one for all",
    ),
    (lambda about: _rank(about) > VLLM_RANKS[-1], f"it takes ranks up to {VLLM_RANKS[-1]}"),
    (lambda about: bool(about.folder), "it looks for the adapter at the root of a repository"),
)


def _part(about: About) -> Component:
    return about.adapter.components[MODEL]


def _rank(about: About) -> int:
    return max(about.parts[MODEL]["rank"], default=0)


def _vllm(about: About) -> Iterator[str]:
    reason = next((why for holds, why in _REFUSED if holds(about)), "")
    if reason:
        yield f"vLLM does not load this adapter: {reason}."
        return
    most = next(rank for rank in VLLM_RANKS if rank >= _rank(about))
    name = about.repo.rpartition("/")[2]
    yield "With vLLM, which then serves it as a model of that name:"
    yield fenced(
        f"vllm serve {about.base or _BASE} --enable-lora --max-lora-rank {most} \\\n"
        f"  --lora-modules {name}={about.repo}",
        "shell",
    )
