"""Joins sources into one recording: each drive begins when the first one does, and the provenance says so.

Messages wait in a spool: what is joined here is where they stand, and in which order they are to be read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from msgspec import msgpack

from tools.importing.rows import GNSS_TOPIC, carried
from tools.recording import Recorded
from tools.schemas import NANOSECONDS
from tools.spool import Spool, Spooled
from tools.stamps import restamped


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """A message in a spool, and how far it is shifted in time; `receipt_ns` is where that puts it."""

    topic: str
    receipt_ns: int
    packed: Spooled
    shift_ns: int = 0

    @classmethod
    def of(cls, message: Recorded, spool: Spool) -> Waiting:
        """Keep a message as a source has it; raises SpoolError."""
        packed = spool.keep(msgpack.encode(message))
        return cls(topic=message.topic, receipt_ns=message.receipt_ns, packed=packed)

    def read(self) -> Recorded:
        """The message in its place; raises SourceError for a time before 1970, SpoolError."""
        message = msgpack.decode(self.packed.read(), type=Recorded)
        moved = restamped(message, message.capture_ns + self.shift_ns) if self.shift_ns else message
        return carried(replace(moved, receipt_ns=self.receipt_ns))


@dataclass(frozen=True, slots=True, kw_only=True)
class Drive:
    """The messages of one real drive, of one or several files; `name` goes into the provenance."""

    name: str
    messages: tuple[Waiting, ...]

    @property
    def start_ns(self) -> int:
        """When it began; 0 for one without messages."""
        return min((message.receipt_ns for message in self.messages), default=0)


def joined(
    drives: Sequence[Drive], *, align: bool = True, start_ns: int | None = None
) -> tuple[list[Waiting], dict[str, str]]:
    """Give all messages in order of time, and the provenance.

    Aligning shifts the later drives to the first's start; `start_ns` shifts the first one too. A car is in one place:
    positions are taken from the first drive that has any.
    """
    provenance = {"composite": "true" if len(drives) > 1 else "false"}
    first_ns = drives[0].start_ns if start_ns is None else start_ns
    found: list[Waiting] = []
    for number, drive in enumerate(drives, start=1):
        placed = any(one.topic == GNSS_TOPIC for one in found)
        kept = [one for one in drive.messages if not (placed and one.topic == GNSS_TOPIC)]
        shift_ns = first_ns - drive.start_ns if align or (number == 1 and start_ns is not None) else 0
        notes = [f"{drive.name}: {len(kept)} messages"]
        notes += [f"shifted by {shift_ns / NANOSECONDS:+.3f} s"] if shift_ns else []
        notes += [f"{len(drive.messages) - len(kept)} positions left out"] if len(kept) < len(drive.messages) else []
        provenance[f"source {number}"] = ", ".join(notes)
        found += [replace(one, receipt_ns=one.receipt_ns + shift_ns, shift_ns=shift_ns) for one in kept]
    return sorted(found, key=lambda one: one.receipt_ns), provenance
