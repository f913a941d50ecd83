"""`residency-tools bench`: the agent and its peers side by side, on this machine, in this run.

Contenders take turns (A B A B), so that a busy machine is busy for all; a row's value is the median of the ratios of
the turns, printed with the least and the greatest. Peers that are not installed are left out, with the reason. What a
slow figure means is the reader's to judge: the exit status is 1 only where something could not be run that should.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import json
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from agent.errors import AgentError
from tools.benchmarks import machine
from tools.benchmarks.results import Row, table
from tools.benchmarks.samples import picture
from tools.benchmarks.settings import Settings

GROUPS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "pictures": ("picture", "floor"),
        "cores": ("cores",),
        "telemetry": ("telemetry", "telemetry-memory"),
        "batches": ("telemetry-batch",),
        "latency": ("latency", "picture-latency", "memory"),
        "backlog": ("catch-up", "start"),
        "scaling": ("load-messages", "load-cameras", "load-bytes"),
        "footprint": ("footprint",),
    }
)
"""The modules of `tools.benchmarks`, and the rows that each measures at once."""
ROWS = tuple(row for rows in GROUPS.values() for row in rows)
SHORT = ("picture", "floor", "telemetry", "telemetry-memory", "latency", "picture-latency", "memory")
SHORT_SECONDS = 1.0


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to `residency-tools`."""
    parser = subparsers.add_parser("bench", help="measure the agent beside its peers", description=__doc__)
    parser.add_argument("--only", choices=ROWS, nargs="+", action="extend", metavar="ROW", help=f"of {', '.join(ROWS)}")
    parser.add_argument("--short", action="store_true", help="a look in less than a minute: fewer rows, seconds, turns")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contender, default: %(default)s")
    parser.add_argument("--seconds", type=float, default=5.0, help="of a turn, about, default: %(default)s")
    parser.add_argument("--backlog", type=int, default=100_000, help="stored records, default: %(default)s")
    parser.add_argument("--picture", type=Path, help="a JPEG to measure on; default: one of the bundled drive at 1080p")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to a file")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Measure and print; 0, or 1 where something could not be run."""
    folder = Path(tempfile.mkdtemp(prefix="residency-bench-"))
    try:
        settings = _settings(arguments, folder)
        found, rows = machine.describe(), asyncio.run(_measured(settings))
        found["load_after"] = machine.load()
    except (AgentError, OSError, TimeoutError) as exc:
        print(f"bench: {exc or type(exc).__name__}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(_head(found))
    print(table(rows))
    if arguments.json is not None:
        content = {"machine": found, "rows": [row.as_dict() for row in rows]}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 0


def _settings(arguments: argparse.Namespace, folder: Path) -> Settings:
    short = arguments.short
    return Settings(
        rows=tuple(arguments.only or (SHORT if short else ROWS)),
        rounds=2 if short else arguments.rounds,
        seconds=min(arguments.seconds, SHORT_SECONDS) if short else arguments.seconds,
        backlog=min(arguments.backlog, 1000) if short else arguments.backlog,
        picture=picture(arguments.picture),
        folder=folder,
    )


async def _measured(settings: Settings) -> list[Row]:
    """The wanted rows, group by group; each group's progress is told on standard error."""
    found: list[Row] = []
    for group, rows in GROUPS.items():
        if set(rows).isdisjoint(settings.rows):
            continue
        print(f"bench: {', '.join(rows)} ...", file=sys.stderr)
        module = importlib.import_module(f"tools.benchmarks.{group}")
        found += [row for row in await module.measure(settings) if row.name in settings.rows]
    return found


def _head(found: Mapping[str, Any]) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in found["packages"].items())
    before, after = (found[key][0] for key in ("load_before", "load_after"))
    return (
        f"{found['cpu']}, {found['cores']} cores, Linux {found['kernel']}, Python {found['python']}, "
        f"mosquitto {found['mosquitto']}, {packages}, JPEG by {found['jpeg']}; "
        f"load average {before} before, {after} after"
    )
