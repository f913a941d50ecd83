"""One hypothesis about where the car has been: fixes that a car could have driven between."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, replace
from operator import attrgetter

from agent.places.geodesy import Place, at_least_m

SECOND_NS = 1_000_000_000
LOOKED_AT = 64  # fixes looked at for the best one on each side; stopping early only widens a disc

_moment = attrgetter("monotonic_ns")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sighting:
    """A fix as a disc: the car was within `radius_m` of the place, at most `late_ns` before `monotonic_ns`.

    `weight` counts the fixes that it stands for after thinning.
    """

    place: Place
    radius_m: float
    monotonic_ns: int
    late_ns: int
    weight: int = 1

    def reach_m(self, moment_ns: int, doubt_ns: int, speed_mps: float) -> float:
        """Radius around the place that holds the car at a moment known to within `doubt_ns`."""
        return self.radius_m + speed_mps * self.apart_ns(moment_ns, doubt_ns) / SECOND_NS

    def apart_ns(self, moment_ns: int, doubt_ns: int) -> int:
        """The longest time that may lie between the sighting and the moment."""
        return abs(moment_ns - self.monotonic_ns) + self.late_ns + doubt_ns

    def agrees(self, other: Sighting, speed_mps: float) -> bool:
        """Whether one car can have been seen at both; always true of two truthful fixes."""
        reach = self.radius_m + other.reach_m(self.monotonic_ns, self.late_ns, speed_mps)
        return at_least_m(self.place, other.place) <= reach


class Track:
    """Sightings in monotonic order, each in agreement with the best ones before and after it when it was added."""

    def __init__(self, first: Sighting) -> None:
        self._sightings = [first]
        self.merged_ns: int | None = None

    def __len__(self) -> int:
        return len(self._sightings)

    @property
    def first_ns(self) -> int:
        """Monotonic time of the earliest sighting."""
        return self._sightings[0].monotonic_ns

    @property
    def last_ns(self) -> int:
        """Monotonic time of the latest sighting."""
        return self._sightings[-1].monotonic_ns

    def speaks_for(self, moment_ns: int) -> bool:
        """False after the moment at which this track came together with another one, which speaks for both."""
        return self.merged_ns is None or moment_ns <= self.merged_ns

    def insert(self, sighting: Sighting) -> None:
        """Add in order; equal moments keep the order of arrival."""
        self._sightings.insert(bisect_right(self._sightings, sighting.monotonic_ns, key=_moment), sighting)

    def weight(self, start_ns: int, end_ns: int, enough: int | None = None) -> int:
        """Fixes between two moments, both included; where `enough` is given, it may stop counting there."""
        first, last = self._from(start_ns), self._after(end_ns)
        if enough is not None and last - first >= enough:
            return last - first
        return sum(s.weight for s in self._sightings[first:last])

    def around(self, moment_ns: int, doubt_ns: int, age_ns: int, speed_mps: float) -> tuple[Sighting, ...]:
        """The sighting that says most about the moment from before it, and from after it: none, one or two."""
        at = self._after(moment_ns)
        earlier, later = self._sightings[max(0, at - LOOKED_AT) : at], self._sightings[at : at + LOOKED_AT]
        best = [_best(side, moment_ns, doubt_ns, age_ns, speed_mps) for side in (reversed(earlier), later)]
        return tuple(sighting for sighting in best if sighting is not None)

    def thin(self, gap_ns: int) -> None:
        """Let about half of the older three quarters go, evenly in time, but open no gap longer than `gap_ns`."""
        older = len(self._sightings) * 3 // 4
        self._sightings[:older] = _thinned(self._sightings[:older], gap_ns)

    def forget(self, until_ns: int) -> None:
        """Drop the sightings up to a moment."""
        del self._sightings[: self._after(until_ns)]

    def _from(self, moment_ns: int) -> int:
        return 0 if self.first_ns >= moment_ns else bisect_left(self._sightings, moment_ns, key=_moment)

    def _after(self, moment_ns: int) -> int:
        if self.last_ns <= moment_ns:
            return len(self._sightings)
        return bisect_right(self._sightings, moment_ns, key=_moment)


def _best(side: Iterable[Sighting], moment_ns: int, doubt_ns: int, age_ns: int, speed_mps: float) -> Sighting | None:
    """The sighting with the smallest reach, among those within `age_ns`; `side` goes away from the moment."""
    best: Sighting | None = None
    best_m = float("inf")
    for sighting in side:
        if sighting.apart_ns(moment_ns, doubt_ns) > age_ns:
            continue
        if speed_mps * abs(moment_ns - sighting.monotonic_ns) / SECOND_NS >= best_m:
            break
        reach_m = sighting.reach_m(moment_ns, doubt_ns, speed_mps)
        if reach_m < best_m:
            best, best_m = sighting, reach_m
    return best


def _thinned(sightings: list[Sighting], gap_ns: int) -> list[Sighting]:
    """The first, the last, and others two mean gaps or `gap_ns` apart; weights are handed to the one before."""
    if len(sightings) < 2:
        return sightings
    *inner, last = sightings
    kept = sightings[:1]
    wanted_ns = min(gap_ns, 2 * (last.monotonic_ns - sightings[0].monotonic_ns) // len(sightings) + 1)
    for sighting, following in zip(inner[1:], sightings[2:], strict=True):
        at_ns = kept[-1].monotonic_ns
        if sighting.monotonic_ns - at_ns >= wanted_ns or following.monotonic_ns - at_ns > gap_ns:
            kept.append(sighting)
        else:
            kept[-1] = replace(kept[-1], weight=kept[-1].weight + sighting.weight)
    return [*kept, last]
