"""The values that flow through the agent: frozen, slotted, keyword-only.

Times are integers in nanoseconds. `*_ns` without a prefix is Unix time; `monotonic_ns` is CLOCK_BOOTTIME, which
orders events while the wall clock is unset or jumps. Positions are WGS84 degrees. Boxes are upright picture pixels.

Here and elsewhere, what every message makes anew is a `msgspec.Struct`, made in a fifteenth of a frozen dataclass's
time (0.2 us for 3 with seven fields) and changed with `msgspec.structs.replace`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from types import MappingProxyType

import msgspec


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """One MQTT message as it came from the in-car broker.

    `wait_ns` is the longest that it may have waited in the broker before it arrived: 0 unless a session was resumed.
    """

    topic: str
    payload: bytes
    received_ns: int
    monotonic_ns: int
    content_type: str | None = None
    properties: tuple[tuple[str, str], ...] = ()
    wait_ns: int = 0

    def property(self, name: str) -> str | None:
        """The first MQTT 5 user property of this name."""
        return next((value for key, value in self.properties if key == name), None)


class Fix(msgspec.Struct, frozen=True, kw_only=True):
    """One GNSS fix: WGS84 degrees, accuracy as a 95 % radius in metres.

    It was measured at most `doubt_ns` before `monotonic_ns`.
    """

    latitude: float
    longitude: float
    accuracy_m: float
    time_ns: int
    monotonic_ns: int
    doubt_ns: int = 0


class Capture(msgspec.Struct, frozen=True, kw_only=True):
    """The moment of capture on both clocks; the true moment lies within `doubt_ns` either way.

    `boot_id` names the boot that `monotonic_ns` counts from: values of different boots cannot be compared.
    """

    time_ns: int
    monotonic_ns: int
    doubt_ns: int = 0
    boot_id: str = ""


class Disc(msgspec.Struct, frozen=True, kw_only=True):
    """Where the car may have been: every point within `radius_m` of a WGS84 position."""

    latitude: float
    longitude: float
    radius_m: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Box:
    """One detection: half-open pixel box [x1, x2) x [y1, y2) of the upright picture, score in 0..1."""

    label: str
    score: float
    x1: float
    y1: float
    x2: float
    y2: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Redaction:
    """What was masked in all pictures of one payload, and by which model (SHA-256, hex)."""

    counts: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    pictures: int = 1
    model_digest: str

    def summary(self) -> str:
        """`face=1,person=3`: labels sorted; `none` where nothing was found."""
        return ",".join(f"{label}={count}" for label, count in sorted(self.counts.items()) if count) or "none"


class Basis(StrEnum):
    """What the region of a record rests on."""

    GNSS = "gnss"
    FIXED = "fixed"
    REGISTRATION = "registration"


class Whereabouts(msgspec.Struct, frozen=True, kw_only=True):
    """The regions in which a record may have been captured: sorted, never empty; stored with the record."""

    regions: tuple[str, ...]
    basis: Basis = Basis.GNSS


class Publish(msgspec.Struct, frozen=True, kw_only=True):
    """Every candidate region permits these endpoints, in order of preference; never empty."""

    endpoints: tuple[str, ...]


class Hold(msgspec.Struct, frozen=True, kw_only=True):
    """The doubt about the region permits no endpoint; a later fix may narrow it."""

    reason: str


class Refuse(msgspec.Struct, frozen=True, kw_only=True):
    """The record must not leave the car; `reason` is a constant dotted name."""

    reason: str


Decision = Publish | Hold | Refuse


class Priority(IntEnum):
    """Order of delivery: a lower value goes first and is evicted last."""

    URGENT = 0
    LIVE = 1
    BULK = 2


class State(StrEnum):
    """Where a received message stands; every message is in exactly one of these."""

    PENDING = "pending"
    HELD = "held"
    DELIVERED = "delivered"
    REFUSED = "refused"
    EXPIRED = "expired"
    EVICTED = "evicted"


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """One accepted message as the ledger keeps it: `envelope` holds the redacted, tagged, signed payload.

    `route` is the permitted endpoints in order of preference; empty while the record is held. `regions` are the
    candidates at capture: they may be narrowed by later fixes, never widened or replaced.
    """

    id: str
    state: State
    route: tuple[str, ...]
    regions: tuple[str, ...]
    basis: Basis
    data_class: str
    topic: str
    priority: Priority
    capture: Capture
    recorded_ns: int
    expires_ns: int
    sequence: int
    envelope: bytes


class Held(msgspec.Struct, frozen=True, kw_only=True):
    """A held record as far as it is decided about, the envelope left on the disk; `key` is its order of arrival."""

    key: int
    regions: tuple[str, ...]
    basis: Basis
    data_class: str
    topic: str
    capture: Capture
