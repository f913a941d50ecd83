"""A small world for properties: four stripes of land on the equator, a car that crosses them, and its receiver."""

import json
from dataclasses import dataclass

from agent.messages import Fix, Message

START_NS = 1_800_000_000 * 10**9
SECOND = 10**9
STRIPE_M = 3000.0
COUNTRIES = ("AA", "BB", "CC", "DD")
SEA = "ZZ"
METRES_PER_DEGREE = 111_319.49  # of longitude on the equator, WGS84
WEST = 10.0  # longitude of the first stripe's western edge


def longitude(x):
    return WEST + x / METRES_PER_DEGREE


def country(x):
    """Where a point x metres east of the western edge lies."""
    stripe = int(x // STRIPE_M)
    return COUNTRIES[stripe] if 0 <= stripe < len(COUNTRIES) else SEA


class Stripes:
    """The world's borders, asked as `RegionMap` is."""

    def countries_near(self, latitude, longitude, radius_m):
        """Discs far away or huge touch everything; a little more is touched than must be."""
        if abs(latitude) > 1 or radius_m > 100_000:
            return frozenset({*COUNTRIES, SEA})
        x, reach = (longitude - WEST) * METRES_PER_DEGREE, 1.01 * radius_m + 1
        found = {
            name
            for index, name in enumerate(COUNTRIES)
            if x + reach >= index * STRIPE_M and x - reach <= (index + 1) * STRIPE_M
        }
        if x - reach < 0 or x + reach > len(COUNTRIES) * STRIPE_M:
            found.add(SEA)
        return frozenset(found)


@dataclass(frozen=True, slots=True, kw_only=True)
class Drive:
    """A car that goes through `stops`, (seconds, metres east), in straight lines."""

    stops: tuple[tuple[float, float], ...]

    @property
    def seconds(self):
        return self.stops[-1][0]

    def x(self, seconds):
        for (t1, x1), (t2, x2) in zip(self.stops, self.stops[1:], strict=False):
            if t1 <= seconds <= t2:
                return x1 + (x2 - x1) * (seconds - t1) / (t2 - t1)
        return self.stops[-1][1] if seconds > 0 else self.stops[0][1]


def fix(drive, seconds, *, accuracy_m, error, latency_s):
    """A truthful fix: `error` in -1..1 of what the promise of `positions` allows; it arrives `latency_s` late."""
    x = drive.x(seconds) + error * (2 * accuracy_m + 10) * 0.99
    return _fix(x, 0.0, seconds, seconds + latency_s, accuracy_m)


def lie(seconds, place):
    """A fix half a continent away."""
    return _fix(place, 40.0, seconds, seconds, 5.0)


def _fix(x, latitude, measured_s, arrived_s, accuracy_m):
    return Fix(
        latitude=latitude,
        longitude=longitude(x),
        accuracy_m=accuracy_m,
        time_ns=START_NS + round(measured_s * SECOND),
        monotonic_ns=round((arrived_s + 10_000) * SECOND),
    )


def message(captured_s, arrived_s, *, states_time, skew_s=0.0):
    """A message; the producer's clock may be off by `skew_s`. Without a stated time it was captured as it arrived."""
    stated = {"ts": START_NS + round((captured_s + skew_s) * SECOND)} if states_time else {}
    return Message(
        topic="car/stated" if states_time else "car/plain",
        payload=json.dumps({"n": 1, **stated}).encode(),
        received_ns=START_NS + round(arrived_s * SECOND),
        monotonic_ns=round((arrived_s + 10_000) * SECOND),
    )
