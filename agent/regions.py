"""Which countries a disc may lie in: polygons in longitude and latitude, asked with distances in metres.

Everything that decides the country of a place lives here; guard distances and overrides are in `guards`.

- A country is left out only when every point of it is farther from the disc than the guard of the border between.
- Distances are lower bounds of the true ones on the WGS84 ellipsoid: degrees are scaled by the smallest metres per
  degree that occur within reach, so a rounding error can only add a country, never lose one.
- Edges are straight in longitude and latitude (RFC 7946, 3.1.1); no polygon crosses the antimeridian (3.1.9), and a
  disc that does is looked up on both sides of it.
- Inside an override the codes of the override stand alone; the countries around it begin at its edge.

Compact file: `RBRD` and a version byte; a 4-byte little-endian length; a JSON header `{"source", "polygons":
[[codes, [vertices per ring, ...]], ...]}`; then all vertices as little-endian int32 pairs (longitude, latitude) in
1e-7 degrees, rings open.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from agent.errors import ConfigError
from agent.guards import OVERRIDES, Guards, Override

UNKNOWN = "ZZ"  # CLDR's code of the unknown region: the open sea, outside every polygon
UNITS_PER_DEGREE = 10_000_000  # 1e-7 degrees: 11 mm, and 180 degrees still fit an int32
MAGIC = b"RBRD\x01"

# WGS84: the smallest metres per degree of latitude (at the equator) and of longitude (per cosine of latitude).
LATITUDE_M = math.pi / 180 * 6_378_137.0 * (1 - 0.00669437999014)
LONGITUDE_M = math.pi / 180 * 6_378_137.0
POLAR_DEGREES = 85.0  # beyond this parallel longitude says nothing about distance
WORLD_RADIUS_M = 1_000_000.0  # a larger disc touches every country

Ring = NDArray[np.int32]  # (n, 2): longitude, latitude in 1e-7 degrees, open


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Polygon:
    """One outer ring and its holes under the law of every one of `codes` (several where the area is disputed)."""

    codes: tuple[str, ...]
    rings: tuple[Ring, ...]
    override: bool = False


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Outline:
    """A piece of a border for drawing: `points` is (n, 2) longitude, latitude in degrees."""

    codes: tuple[str, ...]
    points: NDArray[np.float64]


class RegionMap:
    """Countries by place; immutable, about 1 MB. Build it with `from_bytes` or with `geojson.read_polygons`."""

    def __init__(
        self, polygons: Iterable[Polygon], *, guards: Guards | None = None, overrides: Sequence[Override] = OVERRIDES
    ) -> None:
        self._polygons = (*polygons, *map(_polygon_of, overrides))
        self._guards = guards or Guards()
        self._edges, self._owners, self._bands = _index(self._polygons)
        self.countries = frozenset(code for polygon in self._polygons for code in polygon.codes)

    @classmethod
    def from_bytes(
        cls, data: bytes, *, guards: Guards | None = None, overrides: Sequence[Override] = OVERRIDES
    ) -> Self:
        """Read the compact file; raises ConfigError where the bytes are not one."""
        return cls(unpack_polygons(data), guards=guards, overrides=overrides)

    def countries_near(self, latitude: float, longitude: float, radius_m: float) -> frozenset[str]:
        """ISO 3166-1 codes of all countries that the disc may touch, guards included; {"ZZ"} where there is none.

        A position that is not on Earth, or a radius over 1,000 km, gives every country.
        """
        if not (abs(latitude) <= 90 and abs(longitude) <= 360 and 0 <= radius_m <= WORLD_RADIUS_M):
            return self.countries | {UNKNOWN}
        longitude = (longitude + 180) % 360 - 180
        distances = self._country_distances(latitude, longitude, radius_m + self._guards.widest_m)
        touched = [code for code, metres in distances.items() if metres <= radius_m]
        return frozenset(
            code
            for code, metres in distances.items()
            if metres <= radius_m + self._guards.widest_between(code, touched)
        ) or frozenset({UNKNOWN})

    def outlines(self, west: float, south: float, east: float, north: float) -> Iterator[Outline]:
        """Pieces of all borders with an edge that may enter the box (degrees), for drawing a map."""
        low, high = np.array([west, south]), np.array([east, north])
        for polygon in self._polygons:
            for ring in polygon.rings:
                points = np.concatenate([ring, ring[:1]]) / UNITS_PER_DEGREE
                one, other = points[:-1], points[1:]
                outside = (np.minimum(one, other) > high) | (np.maximum(one, other) < low)
                for start, end in _runs(~np.any(outside, axis=1)):
                    yield Outline(codes=polygon.codes, points=points[start : end + 1])

    def _country_distances(self, latitude: float, longitude: float, reach_m: float) -> dict[str, float]:
        """Metres to each country within reach, 0 inside; a lower bound."""
        inside = self._polygons_around(latitude, longitude)
        metres = self._edge_distances(latitude, longitude, reach_m)
        edge = max((metres.get(i, math.inf) for i in inside if self._polygons[i].override), default=0.0)
        distances: dict[str, float] = {}
        for index in inside | metres.keys():
            polygon = self._polygons[index]
            nearest = 0.0 if index in inside else metres[index]
            nearest = nearest if polygon.override else max(nearest, edge)
            if nearest <= reach_m:
                distances.update({code: min(nearest, distances.get(code, math.inf)) for code in polygon.codes})
        return distances

    def _polygons_around(self, latitude: float, longitude: float) -> set[int]:
        """Indices of the polygons that contain the point: an odd number of their edges is crossed going east."""
        band = _band(latitude * UNITS_PER_DEGREE)
        rows = slice(self._bands[band], self._bands[band + 1])
        y = latitude * UNITS_PER_DEGREE
        crossed = rows.start + np.flatnonzero((self._edges[1, rows] > y) != (self._edges[3, rows] > y))
        x1, y1, x2, y2 = self._edges[:, crossed].astype(np.float64)
        east = x1 + (y - y1) / (y2 - y1) * (x2 - x1) > longitude * UNITS_PER_DEGREE
        odd: set[int] = set()
        for owner in self._owners[crossed[east]].tolist():
            odd ^= {owner}
        return odd

    def _edge_distances(self, latitude: float, longitude: float, reach_m: float) -> dict[int, float]:
        """Metres from the point to the nearest edge of each polygon that has one within reach; a lower bound."""
        margin = reach_m / LATITUDE_M
        farthest = abs(latitude) + margin
        east_m = LONGITUDE_M * math.cos(math.radians(farthest)) if farthest < POLAR_DEGREES else 0.0
        first, last = (_band((latitude + side) * UNITS_PER_DEGREE) for side in (-margin, margin))
        rows = slice(self._bands[first], self._bands[last + 1])
        edges = self._edges[:, rows].astype(np.float64)
        scale = np.array([[east_m], [LATITUDE_M]] * 2) / UNITS_PER_DEGREE
        nearest: dict[int, float] = {}
        for meridian in _meridians(longitude, reach_m, east_m):
            origin = np.array([[meridian], [latitude]] * 2) * UNITS_PER_DEGREE
            metres = _from_origin((edges - origin) * scale)
            close = np.flatnonzero(metres <= reach_m)
            for owner, distance in zip(self._owners[rows][close].tolist(), metres[close].tolist(), strict=True):
                nearest[owner] = min(distance, nearest.get(owner, math.inf))
        return nearest


def pack_polygons(polygons: Sequence[Polygon], source: str) -> bytes:
    """The compact file of polygons; `source` is a line on where they come from."""
    shape = [[list(polygon.codes), [len(ring) for ring in polygon.rings]] for polygon in polygons]
    header = json.dumps({"source": source, "polygons": shape}, separators=(",", ":")).encode()
    rings = b"".join(ring.astype("<i4").tobytes() for polygon in polygons for ring in polygon.rings)
    return MAGIC + len(header).to_bytes(4, "little") + header + rings


def unpack_polygons(data: bytes) -> list[Polygon]:
    """The polygons of the compact file; raises ConfigError where the bytes are not one."""
    start = len(MAGIC) + 4
    end = start + int.from_bytes(data[len(MAGIC) : start], "little")
    try:
        shape = json.loads(data[start:end] if data.startswith(MAGIC) else b"")["polygons"]
        vertices = np.frombuffer(data[end:], dtype="<i4").astype(np.int32, copy=False).reshape(-1, 2)
        polygons = list(_cut(shape, vertices))
    except (ValueError, TypeError, KeyError, IndexError) as exc:
        raise ConfigError("borders", "bytes", f"{len(data)} bytes", "a whole compact border file") from exc
    return polygons


def _cut(shape: Sequence[tuple[list[str], list[int]]], vertices: Ring) -> Iterator[Polygon]:
    """The vertices as polygons of the given shape; raises ValueError unless they fit exactly."""
    if sum(size for _, sizes in shape for size in sizes) != len(vertices) or not len(vertices):
        message = "the header does not describe the vertices"
        raise ValueError(message)
    at = 0
    for codes, sizes in shape:
        ends = np.cumsum(sizes).tolist()
        rings = np.split(vertices[at : at + ends[-1]], ends[:-1])
        yield Polygon(codes=tuple(codes), rings=tuple(rings))
        at += ends[-1]


def _polygon_of(override: Override) -> Polygon:
    ring = np.round(np.array(override.ring) * UNITS_PER_DEGREE).astype(np.int32)
    return Polygon(codes=override.codes, rings=(ring,), override=True)


def _index(polygons: Sequence[Polygon]) -> tuple[Ring, NDArray[np.int32], list[int]]:
    """All edges sorted by one-degree band of latitude, once per band that they enter.

    Returns (4, n) int32 x1 y1 x2 y2 in 1e-7 degrees, the polygon of each edge, and where each of the 180 bands starts.
    """
    rings = [(index, ring) for index, polygon in enumerate(polygons) for ring in polygon.rings]
    edges = np.concatenate([np.hstack([ring, np.roll(ring, -1, axis=0)]) for _, ring in rings])
    owners = np.repeat([index for index, _ in rings], [len(ring) for _, ring in rings]).astype(np.int32)
    low, high = (_bands(pick(edges[:, 1], edges[:, 3])) for pick in (np.minimum, np.maximum))
    copies = high - low + 1
    which = np.repeat(np.arange(len(edges)), copies)
    band = np.arange(len(which)) - np.repeat(np.cumsum(copies) - copies, copies) + low[which]
    order = np.argsort(band, kind="stable")
    starts = np.searchsorted(band[order], np.arange(181)).tolist()
    return np.ascontiguousarray(edges[which[order]].T), owners[which[order]], starts


def _bands(latitudes: NDArray[np.int32]) -> NDArray[np.int64]:
    return np.clip(latitudes // UNITS_PER_DEGREE + 90, 0, 179).astype(np.int64)


def _band(latitude: float) -> int:
    """The one-degree band of a latitude in 1e-7 degrees: 0 at the south pole, 179 at the north pole."""
    return min(max(math.floor(latitude / UNITS_PER_DEGREE) + 90, 0), 179)


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
