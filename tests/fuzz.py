"""Damages good adapter files in structured ways and checks that each loads right or is refused.

    python -m tests.fuzz [--cases 20000] [--seed 0]

Then puts 1000 expressions that take a matcher years into every place of a file, and checks that
none is run. About five minutes on one core. Prints what became of the cases; exits with 1 when an
error was no LoraError, a host was changed, or a load differs from an independent reading.
"""

import argparse
import sys
import tempfile
import time
from collections import Counter

from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.fuzz_damage import PARTS, cases
from tests.fuzz_oracle import Fault, checked
from tests.fuzz_patterns import PLACES, check_place, expressions

EXPRESSIONS = 1000
KINDS = ("raw error", "wrong load", "changed host", "memory", "expression run")


def main(arguments=None):
    """Runs both parts, prints their figures, and returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", type=int, default=20_000, help="damaged files (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    options = parser.parse_args(arguments)
    faults, lines = [], []
    with tempfile.TemporaryDirectory() as folder:
        lines += _damaged(options, folder, faults)
        lines += _hostile(options, folder, faults)
    for fault in faults[:20]:
        lines += ["", str(fault)[:2000]]
    count = Counter(fault.kind for fault in faults)
    lines += ["", *(f"{kind:20}{count[kind]:8,}" for kind in KINDS)]
    sys.stdout.write("\n".join(lines) + "\n")
    return 1 if faults else 0


def _damaged(options, folder, faults):
    """Runs the damaged files and returns the lines of their table."""
    table = {part: Counter() for part in ["all", *dict.fromkeys(PARTS)]}
    start = time.perf_counter()

    @seed(options.seed)
    @settings(
        max_examples=options.cases,
        phases=[Phase.generate],
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(cases())
    def each(case):
        try:
            result = checked(case, folder)
        except Fault as fault:
            faults.append(fault)
            result = fault.kind
        for part in ("all", *case.parts):
            table[part][result] += 1

    each()
    seconds = time.perf_counter() - start
    outcomes = [name for name, _ in table["all"].most_common()]
    rows = [
        f"{part:12}{rows.total():8,}" + "".join(f"{rows[name]:20,}" for name in outcomes)
        for part, rows in table.items()
    ]
    head = f"{'damaged':12}{'cases':>8}" + "".join(f"{name:>20}" for name in outcomes)
    return [head, *rows, f"{seconds:.0f} s, {options.cases / seconds:.0f} cases a second"]


def _hostile(options, folder, faults):
    """Runs the expressions and returns the lines of their table."""
    found = expressions(EXPRESSIONS, options.seed)
    start, lines = time.perf_counter(), ["", f"{len(found):,} expressions in each of"]
    for place in PLACES:
        results = Counter()
        for number, evil in enumerate(found):
            try:
                results[check_place(place, number % 2 == 0, evil, folder)] += 1
            except Fault as fault:
                faults.append(fault)
                results[fault.kind] += 1
        said = ", ".join(f"{name} {count:,}" for name, count in results.most_common())
        lines.append(f"  {place:32}{said}")
    return [*lines, f"{time.perf_counter() - start:.0f} s"]


if __name__ == "__main__":
    sys.exit(main())
