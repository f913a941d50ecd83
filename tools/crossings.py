"""Synthetic border crossings: records misrouted (none may be), time held, flips of the region.

A car drives over a border and back while records are captured. Positions, candidates and holding are the agent's own:
a record is sent when its candidates are one region, and later fixes are chances to narrow them. The judge knows the
true track and takes the true border to be the drawn one, or the drawn one moved by `BORDER_OFFSET_M` in any of eight
directions; all of these must be among the candidates whenever a record is looked at.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise

from agent.messages import Capture, Fix
from agent.places.geodesy import Place, sphere_m
from agent.places.guards import Guards
from agent.places.polygons import Polygon
from agent.places.positions import PositionHistory, PositionLimits
from agent.places.regions import RegionMap

SECOND_NS = 1_000_000_000
METRES_PER_DEGREE = 111_195.0  # of latitude, on a sphere of 6371 km
BORDER_OFFSET_M = 450.0  # less than the smallest guard distance
RECORD_PERIOD_S = 7  # falls between the fixes of every rate but 1 Hz
SPEED_MPS = 25.0
BARE = Guards(default_m=0.0, length_share=0.0, cap_m=0.0, pairs={}, stretches=())
_EEA = "AT BE BG HR CY CZ DK EE FI FR DE GR HU IE IT LV LT LU MT NL PL PT RO SK SI ES SE IS LI NO"
FIRST_LOOKS = 4  # a held record is looked at for each of the first fixes after it, then every LATER_LOOK_S
LATER_LOOK_S = 60

# From far inside one country to far inside the other, by way of the usual crossing: latitude, longitude. Without their
# first and last places the routes stay within about 20 km of the border.
ROUTES: Mapping[str, tuple[Place, ...]] = {
    "Shenzhen-Hong Kong": (
        (23.10, 113.75),
        (22.62, 114.05),
        (22.54, 114.07),
        (22.515, 114.068),
        (22.45, 114.05),
        (22.28, 114.16),
    ),
    "Macau-Zhuhai": (
        (22.75, 113.40),
        (22.27, 113.52),
        (22.217, 113.549),
        (22.190, 113.543),
        (22.150, 113.560),
        (22.118, 113.57),
    ),
    "Basel": ((48.00, 7.80), (47.66, 7.57), (47.590, 7.605), (47.55, 7.60), (47.49, 7.73), (46.95, 7.45)),
    "Detroit-Windsor": (
        (42.70, -83.60),
        (42.40, -83.20),
        (42.312, -83.074),
        (42.27, -83.00),
        (42.25, -82.85),
        (42.35, -82.20),
    ),
    "Newry": ((54.60, -5.95), (54.25, -6.33), (54.18, -6.34), (54.085, -6.37), (53.98, -6.42), (53.45, -6.22)),
    "Narva": ((59.43, 26.00), (59.37, 28.00), (59.3745, 28.2015), (59.375, 28.40), (59.55, 29.60)),
}
PERIODS_S: Mapping[str, int] = {"1 Hz": 1, "0.1 Hz": 10, "1 in 10 min": 600}


@dataclass(slots=True, kw_only=True)
class Held:
    """A record captured at a second of the drive, its true regions, and how often it was looked at."""

    second: int
    truth: frozenset[str]
    looks: int = 0


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What became of the records of one drive; `regions` are those of the records sent, in order of capture."""

    records: int = 0
    misrouted: int = 0
    holds_s: list[int] = field(default_factory=list)
    never_sent: int = 0
    sent: dict[int, str] = field(default_factory=dict)

    @property
    def flips(self) -> int:
        """Changes of region along the records that were sent."""
        regions = [region for _, region in sorted(self.sent.items())]
        return sum(one != other for one, other in pairwise(regions))

    def held_s(self, share: float) -> int:
        """The hold time that this share of the released records did not exceed."""
        ordered = sorted(self.holds_s) or [0]
        return ordered[min(len(ordered) - 1, math.floor(share * len(ordered)))]


def track(route: Iterable[Place], speed_mps: float = SPEED_MPS) -> list[Place]:
    """The car's place at each second, along the route and back."""
    points = list(route)
    points += points[-2::-1]
    places: list[Place] = []
    for one, other in pairwise(points):
        seconds = math.ceil(sphere_m(one, other) / speed_mps)
        places += [_between(one, other, step / seconds) for step in range(seconds)]
    return [*places, points[-1]]


def fixes(places: list[Place], period_s: int, rng: random.Random, accuracy_m: float = 8.0) -> Iterator[Fix]:
    """Truthful fixes every `period_s` seconds, with errors of up to twice the stated 95 % radius."""
    for second in range(0, len(places), period_s):
        error_m = min(2 * accuracy_m, rng.expovariate(1 / (accuracy_m / 2)))
        place = _moved(places[second], rng.uniform(0, math.tau), error_m)
        yield fix_at(second, place, accuracy_m)


def fix_at(second: float, place: Place, accuracy_m: float = 8.0) -> Fix:
    """A fix that arrived at a second of the drive."""
    moment = round(second * SECOND_NS)
    return Fix(latitude=place[0], longitude=place[1], accuracy_m=accuracy_m, time_ns=moment, monotonic_ns=moment)


class Rehearsal:
    """Drives over borders with the shipped map, judged by the same geometry without guards or overrides."""

    def __init__(
        self, polygons: list[Polygon], *, guards: Guards | None = None, limits: PositionLimits | None = None
    ) -> None:
        self._borders = RegionMap(polygons, guards=guards)
        self._truth = RegionMap(polygons, guards=BARE, overrides=())
        self._limits = limits

    def drive(self, places: list[Place], seen: Iterable[Fix]) -> Outcome:
        """Play the drive second by second: the fixes in order of arrival, a record every `RECORD_PERIOD_S`."""
        outcome, history, held = Outcome(), PositionHistory(self._limits), list[Held]()
        arriving = deque(sorted(seen, key=lambda fix: fix.monotonic_ns))
        for second, place in enumerate(places):
            waiting = len(arriving)
            while arriving and arriving[0].monotonic_ns <= second * SECOND_NS:
                history.add(arriving.popleft())
            if len(arriving) < waiting:
                held = [one for one in held if not self._settled(one, second, history, outcome)]
            if second % RECORD_PERIOD_S == 0:
                outcome.records += 1
                record = Held(second=second, truth=self.true_regions(place))
                if not self._settled(record, second, history, outcome):
                    held.append(record)
        outcome.never_sent = len(held)
        return outcome

    def _settled(self, record: Held, now: int, history: PositionHistory, outcome: Outcome) -> bool:
        """Look at a record; send it where it has one candidate. Counts it as misrouted where a true one is missing."""
        record.looks += 1
        if record.looks > FIRST_LOOKS and (now - record.second) % LATER_LOOK_S:
            return False
        candidates = self.candidates(history, record.second)
        if candidates is None:
            return False
        outcome.misrouted += not record.truth <= candidates
        if len(candidates) > 1:
            return False
        outcome.sent[record.second] = next(iter(candidates))
        if now > record.second:
            outcome.holds_s.append(now - record.second)
        return True

    def candidates(self, history: PositionHistory, second: int) -> frozenset[str] | None:
        """The regions that touch every disc; None where they may be any."""
        discs = history.discs(Capture(time_ns=0, monotonic_ns=second * SECOND_NS))
        sets = [self._regions(self._borders, (disc.latitude, disc.longitude), disc.radius_m) for disc in discs]
        return frozenset.intersection(*sets) or None if sets else None

    def true_regions(self, place: Place) -> frozenset[str]:
        """The region of a place for every position that the true border may have."""
        around = self._regions(self._truth, place, 1.01 * BORDER_OFFSET_M)
        if len(around) == 1:
            return around
        moved = (_moved(place, bearing * math.tau / 8, BORDER_OFFSET_M) for bearing in range(8))
        return frozenset[str]().union(*(self._regions(self._truth, one, 0.0) for one in (place, *moved)))

    def _regions(self, borders: RegionMap, place: Place, radius_m: float) -> frozenset[str]:
        return frozenset(map(region_of_country, borders.countries_near(*place, radius_m)))


def region_of_country(country: str) -> str:
    """`eea` for its members, else the country itself."""
    return "eea" if country in _EEA.split() else country.lower()


def table(polygons: list[Polygon], seed: int = 1) -> Iterator[str]:
    """Lines of the table of all crossings and fix rates."""
    rehearsal = Rehearsal(polygons)
    yield f"{'crossing':20} {'fixes':12} records misrouted  at once  held: n  median    max  never  flips"
    for name, route in ROUTES.items():
        for rate, period_s in PERIODS_S.items():
            places = track(route if period_s > 60 else route[1:-1])
            outcome = rehearsal.drive(places, fixes(places, period_s, random.Random(seed)))
            at_once = outcome.records - outcome.never_sent - len(outcome.holds_s)
            yield (
                f"{name:20} {rate:12} {outcome.records:7} {outcome.misrouted:9} {at_once:8} {len(outcome.holds_s):8}"
                f" {outcome.held_s(0.5):5} s {outcome.held_s(1.0):4} s {outcome.never_sent:6} {outcome.flips:6}"
            )


def _between(one: Place, other: Place, share: float) -> Place:
    return one[0] + (other[0] - one[0]) * share, one[1] + (other[1] - one[1]) * share


def _moved(place: Place, bearing: float, metres: float) -> Place:
    """A place some metres away, on the plane; good for a few kilometres away from the poles."""
    north, east = metres * math.cos(bearing), metres * math.sin(bearing)
    return (
        place[0] + north / METRES_PER_DEGREE,
        place[1] + east / METRES_PER_DEGREE / math.cos(math.radians(place[0])),
    )
