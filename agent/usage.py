"""What stands below the options in every command's --help: exit status and examples."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

USAGE = "wrong usage, or a mistake in a configuration file"


def epilog(
    examples: Sequence[str],
    *,
    failed: str,
    done: str = "done",
    usage: str = USAGE,
    more: Mapping[int, str] = MappingProxyType({}),
) -> str:
    """What each exit status means, and calls of the command; a call that goes on begins its next line with spaces."""
    statuses = {0: done, 1: failed, 2: usage, **more}
    lines = [f"  {status:<3} {meaning}" for status, meaning in statuses.items()]
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
