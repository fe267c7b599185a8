"""The body of a card: one function a section, which gives nothing where nothing is known."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from hf_lora.adapter import MODEL
from hf_lora.hub.about import About
from hf_lora.hub.escape import code, fenced, inline, is_path, prose, table
from hf_lora.hub.readme import Section
from hf_lora.hub.training import evaluation, facts
from hf_lora.hub.usage import usage

__all__ = ["sections_of"]

_HUB = "https://huggingface.co"
_MOST = 20  # answers, trigger words and module names that a page shows

CITATION = """\
@inproceedings{hu2022lora,
  title     = {{LoRA}: Low-Rank Adaptation of Large Language Models},
  author    = {Edward J. Hu and Yelong Shen and Phillip Wallis and Zeyuan Allen-Zhu and
               Yuanzhi Li and Shean Wang and Lu Wang and Weizhu Chen},
  booktitle = {International Conference on Learning Representations},
  year      = {2022},
  url       = {https://openreview.net/forum?id=nZeVKeeFYf9}
}"""


def sections_of(about: About) -> list[Section]:
    """Returns the sections that hold something, in the order of the page."""
    found = ((name, title, make(about)) for name, title, make in _SECTIONS)
    intro = Section("intro", inline(about.title, 100), _intro(about), depth=0)
    return [intro, *(Section(name, title, text) for name, title, text in found if text)]


def _count(number: int, one: str, more: str = "") -> str:
    return f"{number:,} {one if number == 1 else more or one + 's'}"


def _intro(about: About) -> str:
    adapter, parts = about.adapter, about.parts.values()
    layers = sum(len(part.targets) for part in adapter.components.values())
    whole = sum(len(part.modules) for part in adapter.components.values())
    base = f"[{inline(about.base)}]({_HUB}/{about.base})" if about.base else inline(about.host)
    ranks = sorted({rank for part in parts for rank in part["rank"]})
    rank = f" of rank {_span(ranks)}" if ranks else ""
    kind = f"{'An' if about.kind[:1] in 'AEIOU' else 'A'} {inline(about.kind)} adapter{rank}"
    added = f"{_count(adapter.parameters, 'parameter')} to {_count(layers, 'layer')}"
    brings = f", and brings {_count(whole, 'module')} trained whole" if whole else ""
    lines = [
        f"{kind} for {base or 'a base that its file does not name'}. It adds {added}{brings}; the "
        "base itself stays as it is and is downloaded apart.",
        prose(about.extras.description),
    ]
    return "\n\n".join(line for line in lines if line)


def _span(values: Sequence[int]) -> str:
    return str(values[0]) if len(values) == 1 else f"{values[0]} to {values[-1]}"


def _gallery(about: About) -> str:
    return "<Gallery />" if about.extras.images else ""


def _trigger(about: About) -> str:
    words, prompt = list(about.trigger_words), about.extras.instance_prompt
    lines = []
    if words:
        lines.append(f"Put into the prompt: {', '.join(code(word) for word in words[:_MOST])}.")
    if prompt.strip():
        lines.append(f"It was trained with the prompt {code(prompt, 500)}.")
    return "\n\n".join(lines)


# ---------------------------------------------------------------- tables


def _adapter(about: About) -> str:
    names = list(about.parts)
    head = ["", *(inline(name, 40) if name != MODEL else "" for name in names)]
    return f"{table(head, _by_part(about))}\n\n{table(['', ''], _of_all(about))}"


def _by_part(about: About) -> Iterator[list[str]]:
    """Yields the rows in which components differ."""
    parts, held = about.parts, about.adapter.components
    counted = {name: sum(t.numel() for _, t in part.tensors()) for name, part in held.items()}
    rows: dict[str, list[str]] = {
        "kind": [_kind(parts[name]["method"], parts[name]["dora"]) for name in parts],
        "rank": [_ranks(about, name) for name in parts],
        "alpha": [_number(parts[name]["alpha"]) for name in parts],
        "scaling": [_scaling(about, name) for name in parts],
        "parameters": [f"{counted[name]:,}" for name in parts],
        "layers": [f"{parts[name]['targets']:,}" for name in parts],
        "by role": [_roles(about, name) for name in parts],
        "trained whole": [_whole(about, name) for name in parts],
        "values": [inline(parts[name]["dtype"]) for name in parts],
    }
    yield from ([name, *cells] for name, cells in rows.items() if any(cells))


def _kind(method: str, dora: bool) -> str:
    return inline("DoRA" if dora and method == "LORA" else method.replace("LORA", "LoRA"), 40)


def _ranks(about: About, name: str) -> str:
    ranks = about.parts[name]["rank"]
    if not ranks:
        return _number(about.adapter.components[name].config.get("r"))
    if len(ranks) == 1:
        return str(next(iter(ranks)))
    return ", ".join(f"{rank} ({_count(n, 'layer')})" for rank, n in list(ranks.items())[:_MOST])


def _number(value: object) -> str:
    return f"{value:g}" if isinstance(value, int | float) else ""


def _scaling(about: About, name: str) -> str:
    found = about.parts[name]["scaling"]
    how = "alpha/√rank" if about.parts[name]["rslora"] else "alpha/rank"
    if not found:
        return ""
    span = f"{found[0]:.4g}" if len(found) == 1 else f"{found[0]:.4g} to {found[-1]:.4g}"
    return f"{span} ({how})"


def _roles(about: About, name: str) -> str:
    roles = sorted(about.parts[name]["roles"].items())
    return ", ".join(f"{inline(role)} ({count:,})" for role, count in roles)


def _whole(about: About, name: str) -> str:
    held = list(about.parts[name]["trained_whole"].items())
    more = f" and {len(held) - _MOST:,} more" if len(held) > _MOST else ""
    return ", ".join(f"{inline(path, 120)} ({n:,} values)" for path, n in held[:_MOST]) + more


def _of_all(about: About) -> Iterator[list[str]]:
    """Yields the rows on the adapter as a whole and on its base."""
    adapter = about.adapter
    prints = adapter.info["fingerprint"]
    alone = list(prints) == [MODEL]
    rows = {
        "base": f"[{inline(about.base)}]({_HUB}/{about.base})" if about.base else "",
        "revision of the base": inline(about.revision, 64),
        "class of the base": inline(about.host),
        "fingerprint of the base": ", ".join(
            short if alone else f"{inline(name, 40)}: {short}" for name, short in prints.items()
        ),
        "size": f"{adapter.nbytes:,} bytes",
        "file": inline(f"{about.folder}/{about.file}".lstrip("/")),
        "digest": inline(adapter.digest),
        "made from": ", ".join(_known(adapter.manifest.derived_from)[:_MOST]),
    }
    yield from ([name, value] for name, value in rows.items() if value)


def _known(digests: Sequence[str]) -> list[str]:
    return [inline(one, 80) for one in digests if not is_path(one)]


def _training(about: About) -> str:
    rows = [[inline(name, 60), inline(value)] for name, value in facts(about)]
    return table(["", ""], rows) if rows else ""


def _evaluation(about: About) -> str:
    rows = [[inline(cell) for cell in row] for row in evaluation(about)]
    return table(["data", "metric", "value"], rows) if rows else ""


# ---------------------------------------------------------------- texts


def _answers(about: About) -> str:
    blocks = []
    for prompt, answer in list(about.extras.answers)[:_MOST]:
        blocks.append(f"Prompt:\n\n{fenced(prompt)}\n\nAnswer:\n\n{fenced(answer)}")
    return "\n\n".join(blocks)


def _limitations(about: About) -> str:
    base = inline(about.base) if about.base else "its base"
    parts = [inline(name, 40) for name in about.parts if name != MODEL]
    inside = f" of {' and '.join(parts)}" if parts else ""
    lines = [
        f"- What {base} cannot do, gets wrong or is biased in, it still is with this adapter, and "
        "its licence holds on.",
        f"- Only the layers{inside} in the table above are changed. On another base, a fine-tune "
        "of the same one included, it is untested.",
        "- It has learnt from the data it was trained on, as far as this page tells of them. What "
        "lies beyond (other languages, subjects, lengths or styles) was not measured, unless it "
        "stands above.",
    ]
    own = prose(about.extras.limitations)
    return (f"{own}\n\n" if own else "") + "\n".join(lines)


def _citation(about: About) -> str:
    return f"Low-rank adaptation was described in:\n\n{fenced(CITATION, 'bibtex')}"


_SECTIONS: tuple[tuple[str, str, Callable[[About], str]], ...] = (
    ("images", "Pictures", _gallery),
    ("trigger", "Trigger words", _trigger),
    ("use", "How to use", usage),
    ("adapter", "The adapter", _adapter),
    ("training", "Training", _training),
    ("evaluation", "Evaluation", _evaluation),
    ("answers", "Answers", _answers),
    ("limitations", "Limitations", _limitations),
    ("citation", "Citation", _citation),
)
