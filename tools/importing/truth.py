"""The ground truth that a recording may carry as an attachment: where the car really was, what is really to be seen."""

from __future__ import annotations

import bisect
from typing import Annotated

import msgspec

ATTACHMENT = "ground_truth.json"


class Crossing(msgspec.Struct, frozen=True, kw_only=True):
    """From this moment on the car was in this country (ISO 3166-1 alpha-2)."""

    from_ns: int
    country: str


class Labelled(msgspec.Struct, frozen=True, kw_only=True):
    """The objects of one picture, labelled by hand: label and half-open box x1, y1, x2, y2, upright pixels."""

    topic: str
    capture_ns: int
    objects: tuple[tuple[str, int, int, int, int], ...]


class Truth(msgspec.Struct, frozen=True, kw_only=True):
    """Positions (Unix ns, latitude, longitude), crossings in order of time, at least one, labelled pictures."""

    positions: tuple[tuple[int, float, float], ...]
    crossings: Annotated[tuple[Crossing, ...], msgspec.Meta(min_length=1)]
    pictures: tuple[Labelled, ...]

    def country_at(self, time_ns: int) -> str:
        """Where the car was; before the first crossing it counts as there already."""
        index = bisect.bisect_right([one.from_ns for one in self.crossings], time_ns) - 1
        return self.crossings[max(index, 0)].country

    def encode(self) -> bytes:
        """Write as JSON."""
        return msgspec.json.encode(self)

    @staticmethod
    def decode(data: bytes) -> Truth:
        """Read what `encode` wrote; raises msgspec.DecodeError."""
        return msgspec.json.decode(data, type=Truth)
