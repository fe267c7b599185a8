"""What all commands share: how they are added, and how results get to stdout."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def name_of(text: str) -> str:
    """Refuses an empty argument, which `Path` would read as the current folder."""
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty")
    return text


def path_of(text: str) -> Path:
    """Refuses what `name_of` refuses."""
    return Path(name_of(text))


def takes_adapter(command: argparse.ArgumentParser) -> None:
    """Adds the arguments that name an adapter."""
    command.add_argument(
        "adapter",
        metavar="ADAPTER",
        type=name_of,
        help="folder, file or repository id of an adapter",
    )
    command.add_argument(
        "--file", type=name_of, help="which folder or file below ADAPTER is the adapter"
    )
    command.add_argument(
        "--revision", type=name_of, help="branch, tag or commit of the adapter's repository"
    )


def add_command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], None], text: str
) -> argparse.ArgumentParser:
    """Adds a command, which can print its result as JSON."""
    command: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    command.add_argument("--json", action="store_true", help="print the result as JSON")
    command.set_defaults(run=run)
    return command


def put(text: str) -> None:
    """Prints a line of the result."""
    sys.stdout.write(f"{text}\n")


def put_json(value: object) -> None:
    """Prints the result as JSON."""
    put(json.dumps(value, indent=2))


def size_of(count: int) -> str:
    """Returns a number of bytes in MB, or in kB below one."""
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"
