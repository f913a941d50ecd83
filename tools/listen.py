"""`residency-tools listen`: the reference consumer of an endpoint.

It verifies every record, drops duplicates by source and id, counts gaps by sequence, refuses and reports records that
this endpoint may not hold, and writes the good ones as JSONL or partitioned Parquet. Several of them with one
`--group` and one `--out` share a stream without loss and without double output.

Exit status: 0 all good, 1 something was refused, 2 wrong usage, 3 a file or the broker could not be used.
"""

from __future__ import annotations

import argparse
import asyncio
import fcntl
import json
import signal
import socket
import sqlite3
import ssl
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from rich.console import Console
from rich.live import Live

from agent.errors import AgentError, EndpointError
from agent.mqtt.packets import Session
from agent.policy import Policy
from agent.settings.config import load_policy
from agent.wire.signing import public_key, public_keys
from tools.client import Address, add_address_arguments, address_of, own_id
from tools.listening.board import Board
from tools.listening.files import FORMS, StoreError, needed
from tools.listening.inbox import Inbox
from tools.listening.judging import Expectations
from tools.listening.receiving import Listener, Options, Output

WINDOW = 1000  # Receive Maximum: records taken but not yet acknowledged
SESSION_SECONDS = 7 * 86_400  # how long the broker keeps records for a named listener that is away
INBOX = ".listen.sqlite"
USAGE_STATUS, TROUBLE_STATUS = 2, 3
TROUBLES = (EndpointError, StoreError, sqlite3.Error, OSError)

MayHold = Callable[[tuple[str, ...], str], bool]


def add_parser(subparsers: Any) -> None:  # noqa: ANN401 - argparse has no public type for it
    """Add the command's options."""
    parser = subparsers.add_parser("listen", help="receive, verify and store the stream of an endpoint")
    add_address_arguments(parser)
    parser.add_argument("--topic", action="append", help="topic filter, may be repeated; default: +/+/#")
    parser.add_argument("--group", help="share the stream with all listeners of this name ($share)")
    parser.add_argument("--name", help="keep a session under this name, so that nothing is lost while it is away")
    trust = parser.add_argument_group("trust").add_mutually_exclusive_group(required=True)
    trust.add_argument("--keys", type=Path, action="append", help="PEM file of trusted public keys, or KEYID=FILE")
    trust.add_argument("--unverified", action="store_true", help="do not look at signatures")
    place = parser.add_argument_group("place").add_mutually_exclusive_group(required=True)
    place.add_argument("--allow", help="regions that this endpoint may hold, joined by commas; * for any")
    place.add_argument("--policy", type=Path, help="policy.toml that says what --endpoint may hold")
    parser.add_argument("--endpoint", help="this endpoint's name in the policy")
    parser.add_argument("--out", type=Path, help="folder for the good records; default: only look")
    parser.add_argument("--format", choices=sorted(FORMS), default="jsonl", help="default: %(default)s")
    parser.add_argument("--roll-rows", type=int, default=5_000, help="rows per file at most, default: %(default)s")
    parser.add_argument("--roll-seconds", type=float, default=10.0, help="a file at least so often")
    parser.add_argument("--remember", type=int, default=1_000_000, help="records known as seen, default: %(default)s")
    parser.add_argument("--count", type=int, help="end after so many good records")
    parser.add_argument("--idle", type=float, help="end after so many seconds without a message")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON at the end, and no table")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Listen until the end that the options name, or a signal."""
    try:
        return asyncio.run(_listen(arguments))
    except (AgentError, sqlite3.Error, OSError, ValueError) as exc:
        print(f"residency-tools listen: {str(exc) or type(exc).__name__}", file=sys.stderr)
        return TROUBLE_STATUS if isinstance(exc, TROUBLES) else USAGE_STATUS


async def _listen(arguments: argparse.Namespace) -> int:
    options = _options(arguments)
    with ExitStack() as stack:
        path = stack.enter_context(_folder(options)) if options.output else None
        inbox = Inbox(path, options.consumer, remember=arguments.remember)
        stack.callback(inbox.close)
        board = Board(started=time.monotonic())
        listener = Listener(options=options, inbox=inbox, board=board)
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, listener.stop.set)
        if arguments.json:
            listener.tell = lambda why: print(f"residency-tools listen: {why}; trying again", file=sys.stderr)
        live = None if arguments.json else stack.enter_context(Live(console=Console(), refresh_per_second=4))
        if live is not None:
            listener.show = lambda: live.update(board.table(inbox.missing(), time.monotonic()))
        await listener.run_loop()
        listener.show()
        if arguments.json:
            print(json.dumps(board.as_json(inbox.missing(), time.monotonic())))
    return 1 if board.refused else 0


@contextmanager
def _folder(options: Options) -> Iterator[Path]:
    """The inbox's path, while no other process writes under this consumer's name."""
    if options.output is None:
        raise StoreError("no output folder")
    options.output.folder.mkdir(parents=True, exist_ok=True)
    with (options.output.folder / f".{options.consumer}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            message = (
                f"another listener named {options.consumer} writes to {options.output.folder}: give this one a --name"
            )
            raise StoreError(message) from exc
        yield options.output.folder / INBOX


def _options(arguments: argparse.Namespace) -> Options:
    if arguments.format == "parquet":
        needed("pyarrow.parquet")
    consumer = arguments.name or socket.gethostname()  # the same after a restart, which finishes what was begun
    if not all(letter.isalnum() or letter in "._-" for letter in consumer):
        message = f"--name: {consumer!r} may hold letters, digits, '.', '_' and '-'"
        raise ValueError(message)
    filters = tuple(arguments.topic or ("+/+/#",))
    if arguments.group:
        filters = tuple(f"$share/{arguments.group}/{name}" for name in filters)
    return Options(
        session=_session(address_of(arguments), arguments.name or own_id("listen"), keep=bool(arguments.name)),
        filters=filters,
        expectations=Expectations(keys=_keys(arguments), may_hold=_may_hold(arguments)),
        consumer=consumer,
        output=_output(arguments),
        count=arguments.count,
        idle_s=arguments.idle,
    )


def _output(arguments: argparse.Namespace) -> Output | None:
    if arguments.out is None:
        return None
    return Output(
        folder=arguments.out, form=arguments.format, roll_rows=arguments.roll_rows, roll_s=arguments.roll_seconds
    )


def _session(address: Address, client_id: str, *, keep: bool) -> Session:
    return Session(
        host=address.host,
        port=address.port,
        client_id=client_id,
        protocol=address.protocol,
        username=address.username,
        password=address.password,
        clean_start=not keep,
        session_expiry_s=SESSION_SECONDS if keep else 0,
        receive_maximum=WINDOW,
        maximum_packet_bytes=0xFFFFFFF,  # MQTT 5.0, 2.1.4: the largest packet there is
        tls=ssl.create_default_context(cafile=address.ca_file or None) if address.tls else None,
    )


def _keys(arguments: argparse.Namespace) -> Mapping[str, Ed25519PublicKey] | None:
    if arguments.unverified:
        return None
    found: dict[str, Ed25519PublicKey] = {}
    for given in map(str, arguments.keys):
        name, equals, path = given.rpartition("=")
        pem = Path(path).read_bytes()
        found |= {name: public_key(pem)} if equals else public_keys(pem)
    return found


def _may_hold(arguments: argparse.Namespace) -> MayHold:
    """Every candidate region must permit this endpoint, as it must in the vehicle."""
    if arguments.policy is not None:
        policy = Policy(load_policy(arguments.policy), arguments.policy)
        if arguments.endpoint not in policy.endpoints:
            message = f"--endpoint: {arguments.endpoint!r} is not one of {', '.join(sorted(policy.endpoints))}"
            raise ValueError(message)
        return lambda regions, data_class: arguments.endpoint in policy.permitted(regions, data_class)
    if arguments.allow == "*":
        return lambda _regions, _class: True
    allowed = frozenset(arguments.allow.split(","))
    return lambda regions, _class: allowed.issuperset(regions)
