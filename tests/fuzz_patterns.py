"""Expressions that take a matcher years, and every place of a file where one can stand."""

import random
import re
import re._compiler
from contextlib import contextmanager

from tests.fuzz_files import MANIFEST, PREFIX, STATED, case_of, draft_of
from tests.fuzz_oracle import Fault, checked

MARK = "zqj"  # in every expression, and in no other that runs while a file is loaded

FAMILIES = (
    lambda x, n: f"({x}+)+$",
    lambda x, n: f"({x}|{x}{x})+$",
    lambda x, n: f"(({x}*)*)*$",
    lambda x, n: f"([a-z_.0-9]+)+{x}",
    lambda x, n: f"(.*.*)*{x}",
    lambda x, n: f"({x}|{x}?)+$",
    lambda x, n: f"({x}{{1,{n}}}){{1,{n}}}$",
    lambda x, n: f"(?:{x}{{0,{n}}}){{0,999}}",
    lambda x, n: rf"({x}*)\1+$",
    lambda x, n: rf"(?P<n>[a-z]+)(?P=n)+{x}$",
    lambda x, n: rf"(?=([a-z.]+))\1*{x}",
    lambda x, n: f"(?!{x}*{x}*$)(?:.+)+",
    lambda x, n: f"(?<=.)(\\w+)+{x}",
    lambda x, n: f"({'|'.join(f'{x}{i}' for i in range(n))})+$",
    lambda x, n: f"({x}|\\w|\N{LATIN SMALL LETTER E WITH ACUTE})+$",
    lambda x, n: f"([\N{CYRILLIC SMALL LETTER A}-\N{CYRILLIC SMALL LETTER YA}{x}]+)+$",
    lambda x, n: f"{'(' * n}{x}{')+' * n}$",
)
AROUND = ("{}", r".*\.{}", "^{}", r"(.*\.)?{}", "{}$", r"model\.{}", "{}|q_proj", "(?i){}")


def expressions(count, seed):
    """Returns different hostile expressions, each of which holds `MARK`."""
    rng, found = random.Random(seed), {}
    while len(found) < count:
        letters = f"{MARK}{rng.randrange(10**6)}"
        family = rng.choice(FAMILIES)(letters, rng.randrange(2, 60))
        found[rng.choice(AROUND).format(family)] = None
    return list(found)


def _configs(draft):
    """Every config of a draft: beside the file and in its manifest."""
    manifest = draft.metadata.get(MANIFEST, {}).get("configs", {})
    return [c for c in (draft.config, *manifest.values()) if c is not None]


def _setter(**fields):
    """Returns a damage that sets config fields to what is made of an expression."""

    def put(draft, evil):
        for config in _configs(draft):
            config.update({name: make(evil) for name, make in fields.items()})

    return put


def _in_stated(draft, evil):
    draft.metadata[STATED] |= {"unet.target_modules": evil, "unet.exclude_modules": evil}
    _setter(target_modules=str, exclude_modules=str)(draft, evil)


def _in_both_patterns(draft, evil):
    draft.metadata[STATED]["unet.alpha_pattern"] = {evil: 4}
    _setter(rank_pattern=lambda x: {x: 4})(draft, evil)


def _in_names(draft, evil):
    draft.tensors = {n.replace("q_proj", evil): t for n, t in draft.tensors.items()}


def _added_name(draft, evil):
    first = next(iter(draft.tensors.values()))
    draft.tensors[f"{PREFIX}{evil}.lora_A.weight"] = first


# what -> good file, how an expression gets there
PLACES = {
    # expressions for targets and exclusions are no reason to refuse a file: the tensors say it all
    "target_modules, exclude_modules": (
        "patterns",
        _setter(target_modules=str, exclude_modules=str),
    ),
    "target_modules list": ("patterns", _setter(target_modules=lambda x: ["q_proj", x])),
    "exclude_modules list": ("patterns", _setter(exclude_modules=lambda x: [x])),
    "rank_pattern": ("patterns", _setter(rank_pattern=lambda x: {x: 4})),
    "alpha_pattern": ("patterns", _setter(alpha_pattern=lambda x: {x: 4})),
    "modules_to_save": ("head", _setter(modules_to_save=lambda x: [x, "classifier"])),
    "layers_pattern": (
        "patterns",
        _setter(layers_pattern=str, layers_to_transform=lambda x: [0, 1]),
    ),
    "layers_pattern list": (
        "patterns",
        _setter(layers_pattern=lambda x: [x], layers_to_transform=lambda x: [0, 1]),
    ),
    "target_parameters": ("experts", _setter(target_parameters=lambda x: [x])),
    "trainable_token_indices": (
        "tokens",
        _setter(trainable_token_indices=lambda x: {x: [1, 5]}),
    ),
    "feedforward_modules": ("ia3", _setter(feedforward_modules=str)),
    "feedforward_modules list": ("ia3", _setter(feedforward_modules=lambda x: [x])),
    "other kind's patterns": ("loha", _setter(alpha_pattern=lambda x: {x: 4})),
    "other kind's targets": ("loha", _setter(target_modules=str)),
    "pipeline's targets": ("pipeline", _in_stated),
    "pipeline's patterns": ("pipeline", _in_both_patterns),
    "tensor names": ("patterns", _in_names),
    "one more name": ("patterns", _added_name),
    "pipeline's names": ("pipeline", _in_names),
}


@contextmanager
def compiled():
    """Yields a list that grows by every expression that anything asks `re` to match or compile."""
    seen, cached, real = [], re._compile, re._compiler.compile

    def look_up(pattern, flags):
        seen.append(pattern)
        return cached(pattern, flags)

    def compile_(pattern, flags=0):
        seen.append(pattern)
        return real(pattern, flags)

    re._compile, re._compiler.compile = look_up, compile_
    try:
        yield seen
    finally:
        re._compile, re._compiler.compile = cached, real


def check_place(place, foreign, evil, folder):
    """Loads a good file with an expression in it; Fault if any part of it gets to `re`."""
    good, damage = PLACES[place]
    draft = draft_of(good, foreign)
    damage(draft, evil)
    case = case_of(good, draft, restate=True)
    with compiled() as seen:
        result = checked(case, folder)
    run = [p for p in seen if MARK in str(p)]
    if run:
        raise Fault("expression run", f"{run[0]!r} at {place}", case)
    return result
