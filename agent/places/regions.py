"""Which countries a disc may lie in: polygons in longitude and latitude, asked with distances in metres.

Everything that decides the country of a place lives here and in `edges`; guard distances and overrides in `guards`.

- A country is left out only when the disc lies outside it and every edge of it is farther away than its guard.
- Distances are lower bounds of the true ones on the WGS84 ellipsoid: degrees are scaled by the smallest metres per
  degree that occur within reach, so a rounding error can only add a country, never lose one.
- Edges are straight in longitude and latitude (RFC 7946, 3.1.1); no polygon crosses the antimeridian (3.1.9), and a
  disc that does is looked up on both sides of it.
- Inside an override, farther from its edge than its guard, the codes of the override stand alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from agent.places.edges import LATITUDE_M, LONGITUDE_M, index_edges
from agent.places.geojson import read_polygons
from agent.places.guards import OVERRIDES, Guards, Override
from agent.places.polygons import UNITS_PER_DEGREE, Polygon, unpack_polygons

UNKNOWN = "ZZ"  # CLDR's code of the unknown region: the open sea, outside every polygon

POLAR_DEGREES = 85.0  # beyond this parallel longitude says nothing about distance
SAME_M, SAME_GROWTH = 1_000.0, 4.0  # how much wider than asked for a disc is looked at, at least and in proportion
MOST_REMEMBERED = 256  # places
WORLD_RADIUS_M = 1_000_000.0  # a larger disc touches every country


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Outline:
    """A piece of a border for drawing: `points` is (n, 2) longitude, latitude in degrees."""

    codes: tuple[str, ...]
    points: NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Known:
    """What is remembered of a place: up to `same_m` every disc has these codes; none where that is negative."""

    same_m: float
    tried_m: float
    codes: frozenset[str]

    def is_to_be_tried(self, radius_m: float) -> bool:
        """Whether another radius may tell more: a wider one where all was the same, one half as wide where not."""
        if self.same_m >= 0:
            return radius_m > self.same_m
        return 2 * _wide_m(radius_m) <= self.tried_m


class RegionMap:
    """Countries by place; immutable but for what it remembers of the places asked for last. About 1 MB."""

    def __init__(
        self, polygons: Iterable[Polygon], *, guards: Guards | None = None, overrides: Sequence[Override] = OVERRIDES
    ) -> None:
        self._polygons = (*polygons, *map(_polygon_of, overrides))
        self._edges = index_edges(self._polygons, guards or Guards())
        self.countries = frozenset(code for polygon in self._polygons for code in polygon.codes)
        self._same: dict[tuple[float, float], _Known] = {}

    @classmethod
    def from_bytes(
        cls, data: bytes, *, guards: Guards | None = None, overrides: Sequence[Override] = OVERRIDES
    ) -> Self:
        """Read the compact file; raises ConfigError where the bytes are not one."""
        return cls(unpack_polygons(data), guards=guards, overrides=overrides)

    @classmethod
    def from_geojson(
        cls,
        text: str,
        *,
        file: str = "GeoJSON",
        code_property: str = "iso1A2",
        guards: Guards | None = None,
        overrides: Sequence[Override] = OVERRIDES,
    ) -> Self:
        """Read borders of the user's own; raises ConfigError naming the feature and the ring that are wrong."""
        return cls(read_polygons(text, file=file, code_property=code_property), guards=guards, overrides=overrides)

    def countries_near(self, latitude: float, longitude: float, radius_m: float) -> frozenset[str]:
        """ISO 3166-1 codes of all countries that the disc may touch, guards included; {"ZZ"} where there is none.

        A position that is not on Earth, or a radius over 1,000 km, gives every country.
        """
        if not (abs(latitude) <= 90 and abs(longitude) <= 360 and 0 <= radius_m <= WORLD_RADIUS_M):
            return self.countries | {UNKNOWN}
        place = (latitude, (longitude + 180) % 360 - 180)
        known = self._same.get(place)
        if known is None or known.is_to_be_tried(radius_m):
            known = self._remember(place, _wide_m(radius_m))
        return known.codes if radius_m <= known.same_m else self._codes(place, self._polygons_near(*place, radius_m))

    def _remember(self, place: tuple[float, float], wide_m: float) -> _Known:
        """Whether a disc around the place touches the same countries up to this radius, as far as it pays to know.

        A car asks again and again about discs around its last fix. The edges near a wider disc are those near a
        narrower one and more: where a wide disc and the point itself are near the same ones, all discs between are.
        """
        at_point = self._polygons_near(*place, 0.0)
        same = at_point == self._polygons_near(*place, wide_m)
        if len(self._same) >= MOST_REMEMBERED:
            self._same.clear()
        known = _Known(same_m=wide_m if same else -1.0, tried_m=wide_m, codes=self._codes(place, at_point))
        self._same[place] = known
        return known

    def _codes(self, place: tuple[float, float], near: set[int]) -> frozenset[str]:
        """The codes at a place that is near the edges of these polygons."""
        inside = self._polygons_around(*place)
        only = [i for i in inside if self._polygons[i].override and i not in near]
        codes = (code for i in only or inside | near for code in self._polygons[i].codes)
        return frozenset(codes) or frozenset({UNKNOWN})

    def outlines(self, west: float, south: float, east: float, north: float) -> Iterator[Outline]:
        """Pieces of all borders with an edge that may enter the box, for drawing a map: degrees, west below east."""
        low, high = np.array([west, south]), np.array([east, north])
        for polygon in self._polygons:
            for ring in polygon.rings:
                points = np.concatenate([ring, ring[:1]]) / UNITS_PER_DEGREE
                one, other = points[:-1], points[1:]
                outside = (np.minimum(one, other) > high) | (np.maximum(one, other) < low)
                for start, end in _runs(~np.any(outside, axis=1)):
                    yield Outline(codes=polygon.codes, points=points[start : end + 1])

    def _polygons_around(self, latitude: float, longitude: float) -> set[int]:
        """Indices of the polygons that contain the point: an odd number of their edges is crossed going east."""
        x, y = longitude * UNITS_PER_DEGREE, latitude * UNITS_PER_DEGREE
        rows = self._edges.rows(latitude, latitude)
        ends = self._edges.ends[:, rows]
        crossed = np.flatnonzero((ends[1] > y) != (ends[3] > y))
        x1, y1, x2, y2 = ends[:, crossed].astype(np.float64)
        east = x1 + (y - y1) / (y2 - y1) * (x2 - x1) > x
        odd: set[int] = set()
        for owner in self._edges.owners[rows][crossed[east]].tolist():
            odd ^= {owner}
        return odd

    def _polygons_near(self, latitude: float, longitude: float, radius_m: float) -> set[int]:
        """Indices of the polygons that have an edge within the radius and the edge's guard of the point."""
        margin = (radius_m + self._edges.widest_guard_m) / LATITUDE_M
        farthest = abs(latitude) + margin
        east_m = LONGITUDE_M * math.cos(math.radians(farthest)) if farthest < POLAR_DEGREES else 0.0
        rows = self._edges.rows(latitude - margin, latitude + margin)
        ends = self._edges.ends[:, rows].astype(np.float64)
        reach_m = self._edges.guards_m[rows] + radius_m
        scale = np.array([[east_m], [LATITUDE_M]] * 2) / UNITS_PER_DEGREE
        near: set[int] = set()
        for meridian in _meridians(longitude, margin * LATITUDE_M, east_m):
            origin = np.array([[meridian], [latitude]] * 2) * UNITS_PER_DEGREE
            close = np.flatnonzero(_from_origin((ends - origin) * scale) <= reach_m)
            near.update(self._edges.owners[rows][close].tolist())
        return near


def _wide_m(radius_m: float) -> float:
    """How far to look for a disc of this radius, so that the next ones need no look."""
    return min(max(SAME_M, SAME_GROWTH * radius_m), WORLD_RADIUS_M)


def _polygon_of(override: Override) -> Polygon:
    ring = np.round(np.array(override.ring) * UNITS_PER_DEGREE).astype(np.int32)
    return Polygon(codes=override.codes, rings=(ring,), override=True)


def _meridians(longitude: float, reach_m: float, east_m: float) -> Iterator[float]:
    """The longitude, and its other name where the reach crosses the antimeridian."""
    yield longitude
    if east_m and reach_m / east_m > 180 - abs(longitude):
        yield longitude - math.copysign(360, longitude)


def _from_origin(edges: NDArray[np.float64]) -> NDArray[np.float64]:
    """Distance of each edge (4, n) from the origin of the plane."""
    x1, y1, x2, y2 = edges
    dx, dy = x2 - x1, y2 - y1
    length = dx * dx + dy * dy
    along = np.clip(-(x1 * dx + y1 * dy) / np.where(length > 0, length, 1.0), 0.0, 1.0)
    distances: NDArray[np.float64] = np.hypot(x1 + along * dx, y1 + along * dy)
    return distances


def _runs(flags: NDArray[np.bool_]) -> Iterator[tuple[int, int]]:
    """Half-open ranges of consecutive true flags."""
    changes = np.flatnonzero(np.diff(np.concatenate([[False], flags, [False]]).astype(np.int8)))
    yield from zip(changes[::2].tolist(), changes[1::2].tolist(), strict=True)
