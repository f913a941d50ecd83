"""`residency-agent`: run the daemon, check a configuration, look at a running or stopped agent."""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import math
import sys
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from agent import __version__, assembly, commands, journal, status, trust
from agent.commands import Place
from agent.errors import AgentError, InvalidConfigError
from agent.settings.config import state_folder
from agent.store import audit_cli
from agent.wire import asyncapi

log = logging.getLogger(__name__)

EXIT_FAILED = 1
EXIT_CONFIG = 2

EPILOG = """exit status:
  0  done, or everything is as it should be
  1  the agent could not start or failed, or the counters are not conserved
  2  wrong usage, or a mistake in a configuration file

examples:
  residency-agent check /etc/residency-agent/agent.toml
  residency-agent run /etc/residency-agent/agent.toml
  residency-agent status --json /etc/residency-agent/agent.toml
  residency-agent explain agent.toml --topic vehicle/gnss --at 22.5431,114.0579,10
  residency-agent explain agent.toml --topic vehicle/gnss --time 2026-11-23T10:00:30Z \
      --at 22.5431,114.0579,10,2026-11-23T10:00:00Z --at 22.5160,114.0680,10,2026-11-23T10:01:00Z
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status."""
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except InvalidConfigError as exc:
        print(exc, file=sys.stderr)
        return EXIT_CONFIG
    except AgentError as exc:
        print(f"residency-agent: {exc}", file=sys.stderr)
        return EXIT_FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="residency-agent",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands_ = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(name: str, run: Any, summary: str) -> argparse.ArgumentParser:  # noqa: ANN401 - argparse's own typing
        command = commands_.add_parser(name, help=summary, description=summary)
        command.set_defaults(run=run)
        command.add_argument("config", type=Path, metavar="AGENT_TOML")
        return command

    run = add("run", _run, "run the agent in the foreground until SIGTERM")
    run.add_argument("--log-level", default="info", choices=("debug", "info", "warning", "error"))
    add("check", _check, "validate both files and print what would be published where")
    show = add("status", _status, "counters, connections and model of a running or stopped agent")
    show.add_argument("--json", action="store_true", help="everything, for programs")
    explain = add("explain", _explain, "say step by step what would happen to a message")
    explain.add_argument("--topic", required=True, type=_topic)
    explain.add_argument(
        "--at",
        type=_place,
        action="append",
        default=[],
        metavar="LAT,LON,ACCURACY_M[,TIME]",
        help="a fix, and when it was (RFC 3339; else at --time); may be repeated; without any: no fix",
    )
    explain.add_argument("--time", type=_time, help="when the message was captured (RFC 3339; else now)")
    add("egress-rules", _egress_rules, "print a systemd drop-in that allows the policy's networks and nothing else")
    add("doctor", _doctor, "try brokers, TLS, clock, disk and model, and say what to do about each failure")
    reference = commands_.add_parser("reference", help="print every key of both files as Markdown")
    reference.set_defaults(run=_reference)
    document = commands_.add_parser("asyncapi", help="print the AsyncAPI document of the stream")
    document.set_defaults(run=_asyncapi)
    audit_cli.add_parser(commands_)
    trust.add_parser(commands_)
    return parser


def _run(arguments: argparse.Namespace) -> int:
    from agent import daemon  # noqa: PLC0415 - `check` and `status` start without the daemon's imports

    journal.start(arguments.log_level)
    try:
        return asyncio.run(daemon.run(assembly.load(arguments.config)))
    except AgentError:
        raise
    except Exception as exc:  # noqa: BLE001 - a traceback could quote a payload
        cause = daemon.first(exc) if isinstance(exc, BaseExceptionGroup) else exc
        log.critical("agent.failed", extra={"error": type(cause).__name__, "place": journal.place_of(cause)})
        return EXIT_FAILED


def _check(arguments: argparse.Namespace) -> int:
    print(commands.check(assembly.load(arguments.config)))
    return 0


def _status(arguments: argparse.Namespace) -> int:
    folder = state_folder(arguments.config)  # and nothing else of the file: the rest may have been refused
    content = status.gather(folder / assembly.LEDGER_FILE, folder / assembly.STATUS_FILE)
    print(json.dumps(content, indent=1, sort_keys=True) if arguments.json else status.table(content, time.time_ns()))
    return 0 if content["counts"]["conserved"] else EXIT_FAILED


def _explain(arguments: argparse.Namespace) -> int:
    from agent import explain  # noqa: PLC0415 - as in `_run`

    time_ns = time.time_ns() if arguments.time is None else arguments.time
    question = explain.Question(topic=arguments.topic, places=tuple(arguments.at), time_ns=time_ns)
    print(explain.explain(assembly.load(arguments.config), question))
    return 0


def _topic(text: str) -> str:
    if not text or "+" in text or "#" in text:
        raise argparse.ArgumentTypeError(f"{text!r}: the name of one topic, without + and #")
    return text


def _place(text: str) -> Place:
    numbers, *moment = text.rsplit(",", 1) if text.count(",") == 3 else [text]
    try:
        latitude, longitude, accuracy_m = (float(part) for part in numbers.split(","))
    except ValueError as exc:
        raise argparse.ArgumentTypeError(f"{text!r}: three numbers, as in 22.5431,114.0579,10") from exc
    if not (abs(latitude) <= 90 and abs(longitude) <= 180 and 0 < accuracy_m < math.inf):
        raise argparse.ArgumentTypeError(f"{text!r}: no position on Earth with an accuracy above 0 m")
    time_ns = _time(moment[0]) if moment else None
    return Place(latitude=latitude, longitude=longitude, accuracy_m=accuracy_m, time_ns=time_ns)


def _time(text: str) -> int:
    """Unix nanoseconds."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as exc:
        raise argparse.ArgumentTypeError(f"{text!r}: a time, as in 2026-11-23T10:00:00Z") from exc
    if moment.tzinfo is None:
        raise argparse.ArgumentTypeError(f"{text!r}: a time with its zone, as in 2026-11-23T10:00:00Z")
    return round(moment.timestamp() * 10**6) * 1000


def _egress_rules(arguments: argparse.Namespace) -> int:
    print(commands.egress_rules(assembly.load(arguments.config)))
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from agent import doctor  # noqa: PLC0415 - as in `_run`

    async def print_all(setup: assembly.Setup) -> int:
        failures = 0
        async for finding in doctor.examine(setup):
            print(finding, flush=True)
            failures += bool(finding.advice)
        return EXIT_FAILED if failures else 0

    return asyncio.run(print_all(assembly.load(arguments.config)))


def _reference(_: argparse.Namespace) -> int:
    print(commands.reference())
    return 0


def _asyncapi(_: argparse.Namespace) -> int:
    print(asyncapi.text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
