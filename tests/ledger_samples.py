"""Records and entries for the tests of the storage modules."""

import os
import tempfile
from pathlib import Path

from agent.messages import Basis, Capture, Priority, Record, State
from agent.store.entries import Delivered, IntakeKey, LedgerLimits, Refused, Store
from agent.store.ledger import Ledger

SECOND = 1_000_000_000
NOW = 1_800_000_000 * SECOND
MODEL = "ab" * 32


def record(
    number, *, size=100, regions=("cn",), route=("cn",), priority=Priority.LIVE, data_class="telemetry", ttl=3600
):
    return Record(
        id=f"id-{number}",
        state=State.PENDING if route else State.HELD,
        route=route,
        regions=regions,
        basis=Basis.GNSS,
        data_class=data_class,
        topic="vehicle/telemetry/speed",
        priority=priority,
        capture=Capture(time_ns=NOW + number, monotonic_ns=number, doubt_ns=5, boot_id="boot"),
        recorded_ns=NOW + number,
        expires_ns=NOW + number + ttl * SECOND,
        sequence=number,
        envelope=bytes([number % 256]) * size,
    )


def store(number, *, mid=None, **fields):
    intake = None if mid is None else IntakeKey(session="telemetry", mid=mid, digest=f"digest-{number}".encode())
    return Store(record=record(number, **fields), intake=intake)


def refused(reason="policy.no-rule", **fields):
    return Refused(reason=reason, time_ns=NOW, **fields)


def delivered(number, endpoint="cn", code=0):
    return Delivered(id=f"id-{number}", endpoint=endpoint, code=code, time_ns=NOW)


def opened(path: Path, **limits) -> Ledger:
    return Ledger.open(path, LedgerLimits(**{"reserve_bytes": 65536, "seal_seconds": 0.0} | limits))


def in_memory() -> Path:
    """A new directory that costs no real sync, for tests whose promise does not need one."""
    memory = Path("/dev/shm")  # noqa: S108 - mkdtemp makes a private directory in it
    return Path(tempfile.mkdtemp(prefix="ledger-", dir=memory if os.access(memory, os.W_OK) else None))


def numbers(spooled):
    return [int(item.record.id.removeprefix("id-")) for item in spooled]
