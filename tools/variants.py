"""Judging one archive in several ways: every way is a `verify --archive` of its own, with its own folder of results.

A way has a policy, a configuration, a detector and a Python whose installed agent does the work, so that two versions
of the agent can be compared as well as two policies or two models.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from agent.errors import AgentError
from tools.archive_results import ArchiveError

JUDGED = (0, 1, 3)  # statuses of `verify --archive` after which there is a table
END_SECONDS = 60.0


class VariantError(AgentError, ValueError):
    """Options that name no ways to compare."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One way: the folder of its results, and the command that judges the archive."""

    folder: Path
    command: tuple[str, ...]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that name an archive and the ways."""
    group = parser.add_argument_group("over many recordings, each option once for all ways or once for each way")
    group.add_argument("--archive", type=Path, metavar="DIR", help="judge every recording below it in each way first")
    group.add_argument("--policy", type=Path, action="append", default=[], help="policy.toml")
    group.add_argument("--agent", type=Path, action="append", default=[], help="agent.toml")
    group.add_argument("--manifest", type=Path, action="append", default=[], help="of the detector")
    group.add_argument("--python", action="append", default=[], help="interpreter whose installed agent is compared")
    group.add_argument("--expect", type=Path, metavar="TOML", help="expectations, the same for all")
    group.add_argument("--out", type=Path, help="folder of the results, default: runs/compare-DIR")
    group.add_argument("--workers", type=int, metavar="N", help="as of verify --archive")
    group.add_argument("--scheduler", metavar="ADDRESS", help="as of verify --archive")


def variants(arguments: argparse.Namespace, out: Path) -> list[Variant]:
    """Spread the options over the ways; raises VariantError."""
    given = {name: getattr(arguments, name) for name in ("policy", "agent", "manifest", "python")}
    number = max(len(values) for values in given.values())
    uneven = [f"--{name}" for name, values in given.items() if len(values) not in {0, 1, number}]
    if number < 2 or not given["policy"] or uneven:
        message = f"wanted --policy, and two ways or more; {', '.join(uneven) or 'an option'} stands once or for each"
        raise VariantError(message)
    spread = {name: values * number if len(values) == 1 else values for name, values in given.items()}
    return [_variant(arguments, spread, index, out) for index in range(number)]


def judge_all(ways: Sequence[Variant]) -> None:
    """Go every way, one after the other; raises ArchiveError. Interrupting ends the way that is gone."""
    for way in ways:
        print(f"compare: {way.folder}", file=sys.stderr)
        status = _status(way.command)
        if status not in JUDGED:
            message = f"{way.folder}: verify ended with status {status}"
            raise ArchiveError(message)


def _variant(arguments: argparse.Namespace, spread: dict[str, list[object]], index: int, out: Path) -> Variant:
    own = {name: values[index] for name, values in spread.items() if values}
    python = str(own.pop("python", sys.executable))
    options = {"archive": arguments.archive, **own, "out": out / str(index + 1)}
    options |= {name: value for name in ("expect", "workers", "scheduler") if (value := getattr(arguments, name))}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    quiet = ["--quiet"] if arguments.quiet or arguments.json else []
    return Variant(folder=out / str(index + 1), command=(python, "-P", "-m", "tools", "verify", *words, *quiet))


def _status(command: Sequence[str]) -> int:
    """Run to the end; a process group of its own, so that a Ctrl-C reaches it once, from here."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True) as process:
        try:
            return process.wait()
        except BaseException:
            process.send_signal(signal.SIGTERM)
            process.wait(END_SECONDS)
            raise
