"""The tables of docs/file-formats.md: measured here, and compared with the page by a test.

python -m tests.conformance.foreign_page --write
"""

import argparse
import logging
import re
import tempfile
import warnings
from pathlib import Path

from hf_lora import LoraError, detach_lora, load_lora
from hf_lora.formats.kinds import REFUSED
from hf_lora.hosts import adapter_names, model_of, parts_of
from tests.conformance.foreign_files import (
    HOSTS,
    bare_outputs,
    difference,
    outputs,
    pipeline,
)
from tests.conformance.foreign_rows import ROWS
from tests.support import assert_same, snapshot

PAGE = Path(__file__).parents[2] / "docs" / "file-formats.md"
MARKS = ("<!-- tables: begin -->\n", "<!-- tables: end -->")
BAR = 2e-6  # relative to the largest output; float32 sums in another order make up to 1.3e-6
NONE = "-"

# What an error says -> the words of the cell.
REASONS = {
    "apart on the host|turned on the host|cannot be cut": "refused: rows apart",
    "alpha is not known": "refused: no alpha",
}


def measured(row, kind, host, folder):
    """What the page says of one cell: a difference, 0.0 included, or the words of a refusal."""
    path, wanted = row.make(host, kind, folder)
    pipe = pipeline(host.pipeline)
    parts = parts_of(pipe)
    bare = bare_outputs(host.pipeline)
    changed = [name for name in wanted if difference(wanted[name], bare[name]) > 1e-3]
    assert host.denoiser in changed  # the adapter does something
    # two transformers of one kind: a file of a single model does not say which it is for
    into = pipe.transformer if row.single and "transformer_2" in parts else pipe
    before = {name: snapshot(part) for name, part in parts.items()}
    try:
        report = load_lora(into, path)
    except LoraError as error:
        for name, part in parts.items():
            assert_same(before[name], snapshot(part))
        return next(words for found, words in REASONS.items() if re.search(found, str(error)))
    found = outputs(pipe)
    for part in parts.values():
        if adapter_names(model_of(part)):
            detach_lora(part)
    assert not report.skipped
    assert all(difference(found[name], bare[name]) > 1e-3 for name in changed)
    return max(difference(found[name], wanted[name]) for name in wanted)


def shown(value):
    """A cell as the page has it: `4e-7`."""
    if isinstance(value, str):
        return value
    return f"{value:.0e}".replace("e-0", "e-") if value else "0"


def table(row, cells):
    """The section of one format; cells: kind -> host -> text."""
    lines = [f"### {row.title}", "",
             f"`{row.keys}`; compared with {row.judge}.", "",
             f"| kind | {' | '.join(HOSTS)} |", f"|---|{'---|' * len(HOSTS)}"]  # fmt: skip
    lines += [f"| {kind} | {' | '.join(found[host] for host in HOSTS)} |"
              for kind, found in cells.items()]  # fmt: skip
    return "\n".join(lines)


def refused():
    """The kinds that are known by name and not read."""
    rows = [f"| {row.name} | {row.why} |" for row in REFUSED]
    return "\n".join(["### Not read", "", "| kind | why |", "|---|---|", *rows])


def block(cells):
    """The generated part of the page; cells: title -> kind -> host -> text."""
    sections = [table(row, cells[row.title]) for row in ROWS]
    return "\n\n".join([*sections, refused()]) + "\n\n"


def cells_of(text):
    """The cells of a page, title -> kind -> host -> text."""
    found = {}
    for row in ROWS:
        title = f"### {row.title}\n"
        section = text.partition(title)[2].partition("\n### ")[0]
        lines = [line.strip("| ").split(" | ") for line in section.splitlines()
                 if line.startswith("| ")]  # fmt: skip
        found[row.title] = {kind: dict(zip(HOSTS, cells, strict=True))
                            for kind, *cells in lines[1:]}  # fmt: skip
    return found


def generated():
    """The generated part of the committed page."""
    return PAGE.read_text(encoding="utf-8").partition(MARKS[0])[2].partition(MARKS[1])[0]


def write():
    """Measures every cell and writes the page anew."""
    found = {}
    for row in ROWS:
        found[row.title] = {kind: dict.fromkeys(HOSTS, NONE) for kind in row.cells}
        for kind, hosts in row.cells.items():
            for name in hosts:
                with tempfile.TemporaryDirectory() as folder:
                    value = measured(row, kind, HOSTS[name], Path(folder))
                assert isinstance(value, str) or value <= BAR, (row.title, kind, name, value)
                found[row.title][kind][name] = shown(value)
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(MARKS[0])
    after = rest.partition(MARKS[1])[2]
    PAGE.write_text(f"{before}{MARKS[0]}\n{block(found)}{MARKS[1]}{after}", encoding="utf-8")


def quiet():
    """LyCORIS and diffusers say what they choose and miss; none of it is news here."""
    for name in ("LyCORIS", "diffusers", "transformers"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--write", action="store_true", required=True)
    parser.parse_args()
    quiet()
    warnings.simplefilter("ignore")
    write()
