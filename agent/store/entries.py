"""What goes into the ledger and what comes out: one type per event, values only.

Every event of a received message is one entry; the ledger commits entries together with their audit rows. Sizes are
bytes, times Unix nanoseconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import msgspec

from agent.messages import Record, Redaction

MIB = 1 << 20


class IntakeKey(msgspec.Struct, frozen=True, kw_only=True):
    """Names one PUBLISH of the in-car broker: its session, packet identifier and a digest of topic and payload.

    `redelivered` (the DUP flag): an entry whose very PUBLISH is durable already is ignored.
    """

    session: str
    mid: int
    digest: bytes
    redelivered: bool = False


class Store(msgspec.Struct, frozen=True, kw_only=True):
    """A received message becomes a pending or held record; `reason` says why it is held."""

    record: Record
    intake: IntakeKey | None = None
    redaction: Redaction | None = None
    reason: str = ""


class Refused(msgspec.Struct, frozen=True, kw_only=True):
    """A received message must not leave the car; neither payload nor topic is kept."""

    reason: str
    time_ns: int
    data_class: str | None = None
    regions: tuple[str, ...] = ()
    redaction: Redaction | None = None
    intake: IntakeKey | None = None


class Delivered(msgspec.Struct, frozen=True, kw_only=True):
    """The endpoint acknowledged the record: `code` is the reason code of its PUBACK."""

    id: str
    endpoint: str
    code: int
    time_ns: int


class Rejected(msgspec.Struct, frozen=True, kw_only=True):
    """The endpoint refuses the record for good: `code` is the reason code of its PUBACK."""

    id: str
    endpoint: str
    code: int
    time_ns: int


class Released(msgspec.Struct, frozen=True, kw_only=True):
    """A held record becomes pending: narrowed regions, a route and the envelope that says so."""

    record: Record
    time_ns: int


class Redecided(msgspec.Struct, frozen=True, kw_only=True):
    """A pending or held record stays in the car under another decision; its regions are never widened."""

    record: Record
    reason: str
    time_ns: int


class Withdrawn(msgspec.Struct, frozen=True, kw_only=True):
    """A pending or held record must no longer leave the car: it ends as refused."""

    id: str
    reason: str
    time_ns: int


class Noted(msgspec.Struct, frozen=True, kw_only=True):
    """A fact about the agent itself, such as its policy version: kept under `name` and audited."""

    name: str
    value: str
    time_ns: int


class SessionReset(msgspec.Struct, frozen=True, kw_only=True):
    """The in-car broker began a new session: its packet identifiers name other messages now."""

    session: str


Ending = Delivered | Rejected | Withdrawn
Change = Released | Redecided
Entry = Store | Refused | Delivered | Rejected | Withdrawn | Released | Redecided | Noted | SessionReset


def latest_ns(entries: Iterable[Entry]) -> int:
    """The latest time that the entries name; 0 where none does."""
    times = (
        entry.record.recorded_ns if isinstance(entry, Store) else getattr(entry, "time_ns", 0) for entry in entries
    )
    return max(times, default=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerLimits:
    """The bounds of the ledger on disk.

    `total_bytes` and `lane_bytes` (one lane per set of candidate regions) bound the spool: envelopes and
    `RECORD_OVERHEAD` for each. `audit_bytes` bounds the audit rows. `intake_window` is how many of the last PUBLISHes
    of each session are recognised when they come again; no less than the Receive Maximum. Envelopes above
    `inline_bytes` are kept in files: at 200 kB a growing backlog then costs 1.2 to 1.4 device bytes per payload byte
    instead of 1.9 to 2.2, while below about 100 kB the files' metadata costs more than it saves. SQLite's journal is
    written back beyond `journal_bytes`. `reserve_bytes` is kept aside so that a full disk can be emptied. The
    audit head is sealed every `seal_seconds`: each seal costs some 40 kB of device writes.
    """

    total_bytes: int = 1024 * MIB
    lane_bytes: int = 256 * MIB
    audit_bytes: int = 16 * MIB
    intake_window: int = 1024
    inline_bytes: int = 128 * 1024
    journal_bytes: int = 4 * MIB
    reserve_bytes: int = 8 * MIB
    seal_seconds: float = 60.0


class Spooled(msgspec.Struct, frozen=True, kw_only=True):
    """A record in the car and its `key`: the order of arrival, which grows for ever."""

    key: int
    record: Record


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """Where all messages ever received stand; `late` counts answers for records that had gone before.

    `breakdown[state][dimension][name]`: dimensions are `region` (candidates joined by commas), `class`, `reason` and
    `endpoint`, each present where it makes sense for the state.
    """

    received: int = 0
    delivered: int = 0
    pending: int = 0
    held: int = 0
    refused: int = 0
    expired: int = 0
    evicted: int = 0
    late: int = 0
    pending_bytes: int = 0
    held_bytes: int = 0
    breakdown: Mapping[str, Mapping[str, Mapping[str, int]]]

    @property
    def conserved(self) -> bool:
        """Whether every received message is in exactly one state."""
        ended = self.delivered + self.refused + self.expired + self.evicted
        return self.received == ended + self.pending + self.held


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepResult:
    """What a sweep did; `more`: it stopped at its own bound, call again."""

    expired: int = 0
    evicted: int = 0
    freed_bytes: int = 0
    more: bool = False
