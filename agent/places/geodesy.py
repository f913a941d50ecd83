"""Distances on Earth with a known side of error, and the Chinese datum GCJ-02.

The sphere of the mean radius is within 0.56 % of every WGS84 geodesic; `at_least_m` and `at_most_m` allow 0.6 %.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

EARTH_RADIUS_M = 6_371_008.8  # mean radius of WGS84 (IUGG)
SPHERE_ERROR = 0.006

Place = tuple[float, float]  # latitude, longitude in degrees


def sphere_m(one: Place, other: Place) -> float:
    """Great-circle metres between two places (haversine)."""
    phi1, phi2 = math.radians(one[0]), math.radians(other[0])
    half = math.sin((phi2 - phi1) / 2) ** 2
    half += math.cos(phi1) * math.cos(phi2) * math.sin(math.radians(other[1] - one[1]) / 2) ** 2
    return 2 * EARTH_RADIUS_M * math.asin(min(1.0, math.sqrt(half)))


def at_least_m(one: Place, other: Place) -> float:
    """A lower bound of the WGS84 distance in metres."""
    return sphere_m(one, other) * (1 - SPHERE_ERROR)


def at_most_m(one: Place, other: Place) -> float:
    """An upper bound of the WGS84 distance in metres."""
    return sphere_m(one, other) * (1 + SPHERE_ERROR)


def middle(places: Iterable[Place]) -> Place | None:
    """The place under the mean of the unit vectors; None where they cancel out."""
    x = y = z = 0.0
    for latitude, longitude in places:
        phi, lam = math.radians(latitude), math.radians(longitude)
        x, y, z = x + math.cos(phi) * math.cos(lam), y + math.cos(phi) * math.sin(lam), z + math.sin(phi)
    if math.hypot(x, y, z) < 1e-6:
        return None
    return math.degrees(math.atan2(z, math.hypot(x, y))), math.degrees(math.atan2(y, x))


# GCJ-02: the offset added to WGS84 by public Chinese maps, as published by its many independent reimplementations:
# a sum of sines over the Krasovsky ellipsoid, around 105 E 35 N, for places inside the rectangle below.
_KRASOVSKY_M = 6_378_245.0
_KRASOVSKY_E2 = 0.00669342162296594323
_GCJ02_LATITUDES = (0.8293, 55.8271)
_GCJ02_LONGITUDES = (72.004, 137.8347)


def gcj02_from_wgs84(place: Place) -> Place:
    """A WGS84 place in GCJ-02; unchanged outside the rectangle in which GCJ-02 differs."""
    latitude, longitude = place
    if not (
        _GCJ02_LATITUDES[0] <= latitude <= _GCJ02_LATITUDES[1]
        and _GCJ02_LONGITUDES[0] <= longitude <= _GCJ02_LONGITUDES[1]
    ):
        return place
    x, y = longitude - 105.0, latitude - 35.0
    north = -100.0 + 2.0 * x + 3.0 * y + 0.2 * y * y + 0.1 * x * y + 0.2 * math.sqrt(abs(x)) + _ripple(x)
    north += _waves(y, (20.0, 1.0), (40.0, 3.0), (160.0, 12.0), (320.0, 30.0))
    east = 300.0 + x + 2.0 * y + 0.1 * x * x + 0.1 * x * y + 0.1 * math.sqrt(abs(x)) + _ripple(x)
    east += _waves(x, (20.0, 1.0), (40.0, 3.0), (150.0, 12.0), (300.0, 30.0))
    phi = math.radians(latitude)
    shape = 1 - _KRASOVSKY_E2 * math.sin(phi) ** 2
    per_latitude = math.radians(_KRASOVSKY_M * (1 - _KRASOVSKY_E2) / shape**1.5)
    per_longitude = math.radians(_KRASOVSKY_M / math.sqrt(shape) * math.cos(phi))
    return latitude + north / per_latitude, longitude + east / per_longitude


def wgs84_from_gcj02(place: Place) -> Place:
    """The WGS84 place whose GCJ-02 place this is, to better than 1 mm away from the rectangle's rim."""
    guess = place
    for _ in range(8):  # each round shrinks the error by more than a factor of 100
        shifted = gcj02_from_wgs84(guess)
        guess = guess[0] + place[0] - shifted[0], guess[1] + place[1] - shifted[1]
    return guess


def _ripple(x: float) -> float:
    return 2.0 / 3.0 * (20.0 * math.sin(6.0 * math.pi * x) + 20.0 * math.sin(2.0 * math.pi * x))


def _waves(x: float, *terms: tuple[float, float]) -> float:
    """Two thirds of the sum of amplitude x sin(pi x / period)."""
    return 2.0 / 3.0 * sum(amplitude * math.sin(math.pi * x / period) for amplitude, period in terms)
