"""`residency-agent audit export` and `audit verify`: the audit chain, for people who have to trust it.

Both read the ledger beside a running agent and change nothing. `verify` exits with 0 for an intact chain, 1 otherwise.
"""

from __future__ import annotations

import argparse
import contextlib
import sqlite3
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
from cryptography.exceptions import InvalidSignature

from agent import usage
from agent.errors import LedgerError
from agent.store import audit
from agent.store.books import read_base, read_meta
from agent.store.storage import read_only
from agent.store.upkeep import read_seal
from agent.wire.signing import public_keys

_SOME = "SELECT first, count, digest, data FROM audit WHERE first > ? ORDER BY first LIMIT 256"

FAILED = "the chain is not intact, or there is no readable ledger"

Signed = Callable[[bytes, bytes], bool]


def export(path: Path) -> Iterator[dict[str, object]]:
    """The audit rows of the ledger at `path`, in order, each with its hash as `chain`. LedgerError: damaged.

    Rows that the agent drops meanwhile are left out; the checkpoint row, which comes later, tells through where.
    """
    with read_only(path) as connection:
        try:
            start, blocks = _page(connection, audit.Head())
            while blocks:
                yield from audit.unpack(blocks, start)
                start, blocks = _page(connection, audit.head_of(blocks[-1]))
        except (ValueError, msgspec.MsgspecError) as exc:
            msg = f"{path}: audit rows are damaged: {exc}"
            raise LedgerError(msg) from exc


def verify(path: Path, signed: Signed | None = None) -> audit.AuditReport:
    """Check the chain of the ledger at `path`, its seal with `signed(message, signature)`. LedgerError: unreadable."""
    unreadable: tuple[str, ...] = ()
    with read_only(path) as connection:
        try:
            seal = read_seal(path)
        except ValueError as exc:
            seal, unreadable = None, (f"the seal is not readable: {exc}",)
        connection.execute("BEGIN")  # one moment for all that is read; later than the seal, which may only be older
        meta = read_meta(connection)
        written = connection.execute("SELECT number FROM counter WHERE state = 'audit'").fetchone() or (0,)
        report = audit.verify(_blocks(connection), base=read_base(meta), last=written[0], seal=seal, signed=signed)
    return replace(report, problems=unreadable + report.problems)


def _blocks(connection: sqlite3.Connection) -> Iterator[audit.Block]:
    """All blocks, some at a time: a slow reader must not keep the agent from writing its journal back."""
    after = 0
    while blocks := _some(connection, after):
        yield from blocks
        after = blocks[-1].first


def _page(connection: sqlite3.Connection, head: audit.Head) -> tuple[audit.Head, list[audit.Block]]:
    """The next blocks after `head`, or after the last dropped row if that is later; and the row that they follow."""
    connection.execute("BEGIN")
    try:
        start = max(head, read_base(read_meta(connection)), key=lambda row: row.n)
        return start, _some(connection, start.n)
    finally:
        connection.execute("COMMIT")


def _some(connection: sqlite3.Connection, after: int) -> list[audit.Block]:
    rows = connection.execute(_SOME, (after,)).fetchall()
    return [audit.Block(first=first, count=count, digest=digest, data=data) for first, count, digest, data in rows]


def signed_by(pem: bytes) -> Signed:
    """A check against any of the public keys in a PEM bundle. EnvelopeError where it holds none."""
    keys = public_keys(pem)

    def check(message: bytes, signature: bytes) -> bool:
        for key in keys.values():
            with contextlib.suppress(InvalidSignature):
                key.verify(signature, message)
                return True
        return False

    return check


def add_parser(subparsers: Any) -> None:  # noqa: ANN401 - argparse names no public type for it
    """Add `audit` to the agent's command line."""
    calls = [f"residency-agent audit {words}" for words in ("export state/ledger.sqlite", "verify state/ledger.sqlite")]
    calls.append(f"{calls[1]} --key car.pub.pem")
    parser = usage.add(subparsers, "audit", "export or verify the audit log", epilog=usage.epilog(calls, failed=FAILED))
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    for name, action, text in (
        ("export", _export, "print one JSON object per row; `chain` is the row's hash"),
        ("verify", _verify, "check that no row was changed, dropped or cut off"),
    ):
        examples = [call for call in calls if f" {name} " in call]
        command = usage.add(actions, name, text, epilog=usage.epilog(examples, failed=FAILED))
        command.add_argument("ledger", type=Path, metavar="LEDGER", help="the ledger's database file")
        command.set_defaults(run=action)
    command.add_argument("--key", type=Path, metavar="PEM", help="public key that must have signed the seal")


def _export(arguments: argparse.Namespace) -> int:
    for row in export(arguments.ledger):
        sys.stdout.write(msgspec.json.encode(row).decode() + "\n")
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    try:
        signed = signed_by(arguments.key.read_bytes()) if arguments.key else None
    except OSError as exc:
        raise LedgerError(str(exc)) from exc
    report = verify(arguments.ledger, signed)
    for problem in report.problems:
        sys.stdout.write(f"{arguments.ledger}: {problem}\n")
    verdict = "intact" if report.intact else "NOT INTACT"
    sys.stdout.write(f"{arguments.ledger}: rows {report.first} to {report.last} {verdict}, sealed to {report.sealed}\n")
    return 0 if report.intact else 1
