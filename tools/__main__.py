"""`residency-tools`: one subcommand per module of this package, imported only when it is asked for."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Sequence

from agent import streams
from tools import calls
from tools.signals import interruptible

COMMANDS = {
    "demo": "replay the bundled drive through the agent and judge the outcome",
    "record": "record the traffic of a broker as MCAP",
    "import": "turn other recordings into MCAP",
    "replay": "play a recording into a broker",
    "report": "make a page of a run",
    "verify": "judge a run against a policy and expectations",
    "compare": "run two policies, models or versions over the same recordings",
    "listen": "receive, verify and store the stream of an endpoint",
    "bench": "measure the agent beside its peers",
    "evaluate": "measure a detector on labelled pictures",
    "train": "train the detector",
    "regions": "compile and look at the border file",
    "package": "build the packages, the lock file and the bill of materials",
}
OWN = ("agent", "tools")
TOOLS = "tools"
EXTRAS = {"demo": "demo", "train": "train", "package": "package"}
"""What has the libraries of a command; of the others it is TOOLS."""
MISSING_STATUS = 2


def _module_name(command: str) -> str:
    return f"tools.{command}_" if command == "import" else f"tools.{command}"


def is_here(command: str) -> bool:
    """Whether this installation has the command."""
    return importlib.util.find_spec(_module_name(command)) is not None


def parser(chosen: str | None = None) -> argparse.ArgumentParser:
    """The command line; only the chosen command's module is imported, and only its options are known."""
    whole = argparse.ArgumentParser(prog="residency-tools", description=__doc__)
    subparsers = whole.add_subparsers(metavar="COMMAND", required=True)
    for command in filter(is_here, COMMANDS):
        if command == chosen:
            importlib.import_module(_module_name(command)).add_parser(subparsers)
        else:
            subparsers.add_parser(command, help=COMMANDS[command])
    calls.explain(whole)
    return whole


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the status is its own, 2 for wrong usage or a missing library, 130 where a signal ended it."""
    streams.prepare()
    argv = sys.argv[1:] if argv is None else argv
    chosen = next((word for word in argv if word in COMMANDS), None)
    try:
        arguments = parser(chosen).parse_args(argv)
        return interruptible(str(chosen), lambda: int(arguments.run(arguments)))
    except ModuleNotFoundError as exc:
        library = str(exc.name).partition(".")[0]
        if exc.name is None or library in OWN:
            raise
        extra = f"pip install 'residency-agent[{EXTRAS.get(str(chosen), TOOLS)}]'"
        print(f"residency-tools {chosen}: {library} is not installed: {extra}", file=sys.stderr)
        return MISSING_STATUS


if __name__ == "__main__":
    sys.exit(main())
