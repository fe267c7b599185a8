"""ProbeReport: what a file is, for people and programs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hf_lora.errors import listing, shown
from hf_lora.render import short

_WIDE = 18  # characters of a name in front of what it says


@dataclass(frozen=True)
class ProbedPart:
    """The layers of one kind that a file has for one component.

    Attributes:
        name: The component; how its keys begin where that is not known, with three dots.
        kind: `"LoRA"`, `"LoHa"`, `"LoKr"`, another method of peft, or a kind that is not read.
        modules: How many layers, as the file has them.
        ranks: Rank -> on how many of them.
        alphas: The different values of alpha; None where the file states none.
        scalings: The different values of what the update is multiplied by.
        dora: Whether there are magnitudes (DoRA).
        convolutions: How many are convolutions, as far as their factors tell.
        why_not: Why such layers are not read here; empty where they are.
    """

    name: str
    kind: str
    modules: int
    ranks: Mapping[int, int]
    alphas: tuple[float | None, ...]
    scalings: tuple[float, ...]
    dora: bool = False
    convolutions: int = 0
    why_not: str = ""

    @classmethod
    def of(
        cls,
        name: str,
        kind: str,
        ranks: Sequence[int | None],
        alphas: Sequence[float | None],
        scalings: Sequence[float | None],
        *,
        dora: bool,
        convolutions: int,
        why_not: str = "",
    ) -> ProbedPart:
        """Makes a part from one rank, alpha and scaling for each of its layers."""
        count = Counter(rank for rank in ranks if rank is not None)
        return cls(
            name,
            kind,
            len(ranks),
            dict(count.most_common()),
            tuple(sorted(_different(alphas), key=lambda a: (a is None, a or 0))),
            tuple(sorted(s for s in _different(scalings) if s is not None)),
            dora,
            convolutions,
            why_not,
        )

    def __str__(self) -> str:
        said = [f"{self.kind} on {self.modules} modules"]
        if self.convolutions:
            said.append(f"{self.convolutions} of them convolutions")
        if self.why_not:
            return f"{', '.join(said)}; not read: {self.why_not}"
        if self.ranks:
            one = len(self.ranks) == 1
            each = [f"{r}" if one else f"{r} ({n} modules)" for r, n in self.ranks.items()]
            said.append(f"rank {listing(each)}")
        stated = [f"{alpha:g}" for alpha in self.alphas if alpha is not None]
        if stated:
            said.append(f"alpha {listing(stated)}")
        elif self.ranks:
            said.append("no alpha stated, so alpha = rank")
        if self.scalings:
            said.append(f"scaling {listing(f'{scaling:g}' for scaling in self.scalings)}")
        return ", ".join([*said, *(["DoRA"] if self.dora else [])])


@dataclass(frozen=True)
class ProbeReport:
    """What a file is and whether it would load; `print(report)` shows it.

    All of `said`, `trigger_words`, `tags` and `facts` is the claim of whoever wrote the file, and
    stands here as it stands there: of any length, with any characters.

    Attributes:
        source: Where it lies.
        format: Whose spelling it is: `"kohya"`, `"ComfyUI"`, `"diffusers"`, `"peft"` ...
        parts: What it holds, by component and kind.
        parameters: Values in its tensors, without alphas.
        bytes: Of its tensors, without the header.
        digest: The adapter's identity as the file states it; empty where it states none.
        fits: The public pipelines in which every module has its place, the most usual first. Not
            looked for where a host was given that it loads into.
        said: What the header says of the base: key -> value.
        host: What it was checked against; empty for nothing.
        loads: Whether it would load there; None where no host was given.
        reason: Why not; without a host, why it cannot be read. Empty where nothing is wrong.
        fix: What can be done about that.
        base: Whether the host is the base it was made on, in words.
        lenient: Whether it would load with `strict=False`, where it does not without.
        left_out: Keys, modules or components that would be left out then.
        trigger_words: Words that call the style up.
        tags: The most frequent words of the captions it was trained on -> how often. They are no
            triggers.
        facts: What the header says of author, license, training ...
        repairs: What is wrong with the file and can be put right.
        notes: What a reader should know besides.
    """

    source: str
    format: str
    parts: tuple[ProbedPart, ...]
    parameters: int
    bytes: int
    digest: str
    fits: tuple[str, ...]
    said: Mapping[str, str]
    host: str
    loads: bool | None
    reason: str
    fix: str
    base: str
    lenient: bool
    left_out: tuple[str, ...]
    trigger_words: tuple[str, ...]
    tags: Mapping[str, int]
    facts: Mapping[str, str]
    repairs: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether it would load; without a host, whether it can be read for one."""
        return not self.reason

    def as_dict(self) -> dict[str, Any]:
        """Returns all findings as plain data for JSON; numbers that JSON lacks as text."""
        plain = asdict(self)
        for part in plain["parts"]:
            for name in ("alphas", "scalings"):
                part[name] = [_plain(value) for value in part[name]]
        return {**plain, "ok": self.ok}

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        modules = sum(part.modules for part in self.parts)
        yield (
            f"{self.source}: {self.format}, {modules} modules, {short(self.parameters)} "
            f"parameters, {self.bytes / 1e6:.1f} MB"
        )
        for part in self.parts:
            yield _row(part.name, str(part))
        yield _row("digest", self.digest or "none stated")
        if self.fits:
            yield _row("fits", ", ".join(self.fits))
        yield from self._verdict()
        if self.said or self.facts:
            yield "Its header says"
        for key, value in (*self.said.items(), *self.facts.items()):
            yield _row(key, shown(value))
        if self.trigger_words:
            yield f"Trigger words: {listing(map(shown, self.trigger_words), limit=20)}"
        if self.tags:
            tags = ", ".join(f"{shown(tag, limit=40)} {n}" for tag, n in self.tags.items())
            yield f"Most frequent tags of its training images, which are no triggers: {tags}"
        for what, entries in (("repaired", self.repairs), ("note", self.notes)):
            yield from (_row(what, entry) for entry in entries)

    def _verdict(self) -> Iterator[str]:
        why = f"{self.reason.rstrip('.')}. {self.fix}".rstrip()
        if self.loads:
            yield f"Loads into {self.host}: yes, by names and shapes; values were not read"
        elif self.loads is not None:
            yield f"Loads into {self.host}: no. {why}"
        elif self.reason:
            yield f"Cannot be read: {why}"
        if self.base:
            yield _row("base", self.base)
        if self.lenient:
            count = f"without {len(self.left_out)}" if self.left_out else "whole"
            first = f": {listing((name[:200] for name in self.left_out), limit=3)}"
            yield _row("strict=False", f"loads, {count}{first if self.left_out else ''}")


def _row(name: str, text: str) -> str:
    return f"  {name:<{_WIDE}}{text}" if len(name) < _WIDE else f"  {name}  {text}"


def _different(values: Sequence[float | None]) -> set[float | None]:
    """Returns the values, each once; NaN, which equals nothing, too."""
    return {math.nan if value is not None and math.isnan(value) else value for value in values}


def _plain(value: float | None) -> float | str | None:
    return value if value is None or math.isfinite(value) else str(value)
