"""`residency-agent`: run the daemon, check a configuration, look at a running or stopped agent."""

from __future__ import annotations

import argparse
import asyncio
import ipaddress
import json
import logging
import math
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from agent import __version__, assembly, commands, first_day, journal, status, streams, trust, usage
from agent.commands import Place
from agent.errors import AgentError, InvalidConfigError
from agent.settings.config import state_folder
from agent.store import audit_cli
from agent.wire import asyncapi

log = logging.getLogger(__name__)
Run = Callable[[argparse.Namespace], int]

SOUTHERN = re.compile(r"-[\d.]")  # how a latitude south of the equator begins

LAST_PORT = 65_535

EXIT_FAILED = 1
EXIT_CONFIG = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as a shell says it
EXIT_UNREAD = 141  # 128 + SIGPIPE

RUN_FAILED = "it could not start, or a mistake of its own ended it; systemd starts it again"
EXPLAIN = (
    "residency-agent explain agent.toml --topic vehicle/gnss --at 22.5431,114.0579,10",
    "residency-agent explain agent.toml --topic vehicle/gnss --time 2026-11-23T10:00:30Z \\",
    "    --at 22.5431,114.0579,10,2026-11-23T10:00:00Z --at 22.5160,114.0680,10,2026-11-23T10:01:00Z",
)
DOCTOR = (
    "residency-agent doctor /etc/residency-agent/agent.toml",
    "residency-agent doctor agent.toml --in eea --in ch",
)
INIT = (
    "residency-agent init draft --regions cn,hk,eea --vehicle urn:example:car-7 --registration CN",
    "residency-agent init car --regions cn --vehicle urn:example:car-7 --state state --endpoint cn=127.0.0.1:18841",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status."""
    streams.prepare()
    arguments = _parser().parse_args(_joined(sys.argv[1:] if argv is None else argv))
    try:
        status = int(arguments.run(arguments))
        print(end="", flush=True)  # here, and not at Python's end, is told what nobody takes
    except InvalidConfigError as exc:
        print(exc, file=sys.stderr)
        return EXIT_CONFIG
    except AgentError as exc:
        print(f"residency-agent: {exc}", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except OSError as exc:  # of the output: those of files are AgentErrors by now
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what Python flushes at its end
        if isinstance(exc, BrokenPipeError):  # the reader has seen enough
            return EXIT_UNREAD
        print(f"residency-agent: {exc.filename or 'the output'}: {exc.strerror}", file=sys.stderr)
        return EXIT_FAILED
    return status


def _joined(words: Sequence[str]) -> list[str]:
    """`--at -33.86,151.2,10` as `--at=-33.86,151.2,10`: argparse takes a word that begins with - for an option."""
    joined: list[str] = []
    for word in words:
        if joined and joined[-1] == "--at" and SOUTHERN.match(word):
            joined[-1] = f"--at={word}"
        else:
            joined.append(word)
    return joined


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="residency-agent",
        description=__doc__,
        epilog=usage.epilog(
            [f"residency-agent {words}" for words in ("check agent.toml", "run agent.toml", "explain --help")],
            failed="the agent could not start or failed, or something is not as it should be",
            done="done, or everything is as it should be",
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands_ = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(
        name: str, run: Run, summary: str, examples: Sequence[str] = (), failed: str = "never"
    ) -> argparse.ArgumentParser:
        epilog = usage.epilog(examples or [f"residency-agent {name} /etc/residency-agent/agent.toml"], failed=failed)
        command = usage.add(commands_, name, summary, epilog=epilog)
        command.set_defaults(run=run)
        command.add_argument("config", type=Path, metavar="AGENT_TOML")
        return command

    _add_init(commands_)
    run = add("run", _run, "run the agent in the foreground until SIGTERM", failed=RUN_FAILED)
    run.add_argument("--log-level", default="info", choices=("debug", "info", "warning", "error"))
    add("check", _check, "validate both files and print what would be published where")
    show = add(
        "status",
        _status,
        "counters, queues, connections and model of a running or stopped agent",
        ("residency-agent status /etc/residency-agent/agent.toml", "residency-agent status --json agent.toml"),
        failed="the counters are not conserved, or there is no readable ledger",
    )
    show.add_argument("--json", action="store_true", help="everything, for programs")
    _add_explain(add("explain", _explain, "say step by step what would happen to a message", EXPLAIN))
    add("egress-rules", _egress_rules, "print a systemd drop-in that allows the policy's networks and nothing else")
    doctor = add(
        "doctor",
        _doctor,
        "try brokers, TLS, clock, disk, keys and model, and say what to do about each failure",
        DOCTOR,
        failed="something is not as it should be",
    )
    doctor.add_argument(
        "--in",
        dest="regions",
        action="append",
        default=[],
        metavar="REGION",
        help="where the vehicle is now: endpoints that the policy's reach forbids from there are not contacted; may be "
        "repeated; without it: anywhere",
    )
    for name, print_it, summary in (
        ("reference", _reference, "print every key of both files as Markdown"),
        ("asyncapi", _asyncapi, "print the AsyncAPI document of the stream"),
    ):
        epilog = usage.epilog([f"residency-agent {name}"], failed="never")
        usage.add(commands_, name, summary, epilog=epilog).set_defaults(run=print_it)
    audit_cli.add_parser(commands_)
    trust.add_parser(commands_)
    return parser


def _add_explain(explain: argparse.ArgumentParser) -> None:
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


def _add_init(commands_: Any) -> None:  # noqa: ANN401 - argparse has no public type for it
    epilog = usage.epilog(INIT, failed="a file is there already, or a wish is no good")
    init = usage.add(commands_, "init", "write a commented configuration for some regions", epilog=epilog)
    init.set_defaults(run=_init)
    init.add_argument("folder", type=Path, metavar="FOLDER", help="agent.toml and policy.toml are written here")
    regions = "joined by commas; names of the example policy, which an unknown one lists"
    init.add_argument("--regions", required=True, type=lambda text: text.split(","), help=regions)
    init.add_argument(
        "--vehicle", required=True, metavar="URI", help="pseudonym of this vehicle; its last part is its name"
    )
    init.add_argument("--registration", default="", metavar="COUNTRY", help="ISO 3166-1 country of registration")
    init.add_argument("--state", default="/var/lib/residency-agent", help="folder of the ledger (default: %(default)s)")
    init.add_argument("--broker", type=_broker, default="127.0.0.1:1883", metavar="HOST[:PORT]", help="in-car broker")
    init.add_argument(
        "--endpoint",
        type=_endpoint,
        action="append",
        default=[],
        metavar="REGION=HOST[:PORT]",
        help="a region's broker; may be repeated",
    )


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


def _init(arguments: argparse.Namespace) -> int:
    wish = first_day.Wish(
        vehicle=arguments.vehicle,
        regions=arguments.regions,
        registration=arguments.registration,
        state=arguments.state,
        broker=arguments.broker,
        endpoints=dict(arguments.endpoint),
    )
    for file in first_day.write(arguments.folder, wish):
        print(f"wrote {file}")
    print(f"Read both, then: residency-agent check {arguments.folder / 'agent.toml'}")
    return 0


def _broker(text: str) -> first_day.Broker:
    host, _, port = text.rpartition(":") if re.search(r"[^:]:\d+$|\]:\d+$", text) else (text, "", "")
    host = host.removeprefix("[").removesuffix("]")
    if not _is_host(host):
        raise argparse.ArgumentTypeError(f"{text!r}: a host, as in mqtt.example.com or 127.0.0.1:1883")
    if port and not 1 <= int(port) <= LAST_PORT:
        raise argparse.ArgumentTypeError(f"{text!r}: a port from 1 to {LAST_PORT}")
    return first_day.Broker(host=host, port=int(port) if port else None)


def _is_host(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return re.fullmatch(r"[\w.-]+", text) is not None
    return True


def _endpoint(text: str) -> tuple[str, first_day.Broker]:
    region, separator, address = text.partition("=")
    if not separator:
        raise argparse.ArgumentTypeError(f"{text!r}: a region and its broker, as in cn=mqtt.cn.example.com:8883")
    return region, _broker(address)


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
    rules = commands.egress_rules(assembly.load(arguments.config))
    print(rules)
    for line in rules.splitlines():  # the rules go to a file, where nobody may see it
        if line.startswith(commands.UNREACHED):
            print(f"warning: {line.removeprefix('# ')}", file=sys.stderr)
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from agent.doctor.examine import examine  # noqa: PLC0415 - as in `_run`

    async def print_all(setup: assembly.Setup) -> int:
        failures = 0
        async for finding in examine(setup, arguments.regions):
            print(finding, flush=True)
            failures += bool(finding.advice)
        return EXIT_FAILED if failures else 0

    setup = assembly.load(arguments.config)
    unknown = set(arguments.regions) - set(setup.policy.everywhere)
    if unknown:
        known = ", ".join(setup.policy.everywhere)
        raise AgentError(f"--in {min(unknown)}: the policy has no such region; it has {known}")
    return asyncio.run(print_all(setup))


def _reference(_: argparse.Namespace) -> int:
    print(commands.reference())
    return 0


def _asyncapi(_: argparse.Namespace) -> int:
    print(asyncapi.text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
