"""`residency-tools import`: turn other recordings into one MCAP file."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from agent.errors import AgentError
from tools.importing import bundled

TROUBLE_STATUS = 3


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to `residency-tools`."""
    parser = subparsers.add_parser("import", help="turn other recordings into MCAP", description=__doc__)
    parser.add_argument("-o", "--out", type=Path, required=True, help="the MCAP file to write")
    parser.add_argument("--bundled", type=Path, metavar="FOLDER", help="build the bundled drive from these packages")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Import; 0 done, 3 a source cannot be read."""
    try:
        bundled.build(arguments.bundled, arguments.out)
    except (AgentError, OSError) as exc:
        print(f"import: {exc}", file=sys.stderr)
        return TROUBLE_STATUS
    return 0
