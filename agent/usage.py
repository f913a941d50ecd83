"""What stands below the options in every command's --help: exit status and examples."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

USAGE = "wrong usage, or a mistake in a configuration file"


def epilog(examples: Sequence[str], *, failed: str, done: str = "done", usage: str = USAGE) -> str:
    """What each exit status means, and calls of the command."""
    lines = [f"  {status}  {meaning}" for status, meaning in enumerate((done, failed, usage))]
    return "\n".join(["exit status:", *lines, "", "examples:", *(f"  {example}" for example in examples)])


def add(commands: Any, name: str, summary: str, *, epilog: str, description: str = "") -> argparse.ArgumentParser:  # noqa: ANN401 - argparse has no public type for it
    """A subcommand whose help keeps its line breaks."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=description or summary,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return parser
