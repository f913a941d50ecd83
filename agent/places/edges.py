"""All edges of a map, indexed by latitude, each with its guard distance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from agent.places.guards import Guards, Stretch
from agent.places.polygons import UNITS_PER_DEGREE, Polygon

# WGS84: the smallest metres per degree of latitude (at the equator) and of longitude (per cosine of latitude).
LATITUDE_M = math.pi / 180 * 6_378_137.0 * (1 - 0.00669437999014)
LONGITUDE_M = math.pi / 180 * 6_378_137.0

Ends = NDArray[np.int32]  # (4, n): x1 y1 x2 y2 in 1e-7 degrees


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Edges:
    """Edges sorted by one-degree band of latitude, once per band that they enter; `starts` holds 181 positions.

    `owners` are indices of polygons, `guards_m` the metres by which an edge may be wrong.
    """

    ends: Ends
    owners: NDArray[np.int32]
    guards_m: NDArray[np.float32]
    starts: tuple[int, ...]
    widest_guard_m: float

    def rows(self, south: float, north: float) -> slice:
        """Where the edges stand that enter the bands of these latitudes; a band's own edges once each."""
        return slice(self.starts[_band(south)], self.starts[_band(north) + 1])


def index_edges(polygons: Sequence[Polygon], guards: Guards) -> Edges:
    """The edges of all rings of the polygons."""
    rings = [(index, ring) for index, polygon in enumerate(polygons) for ring in polygon.rings]
    ends = np.concatenate([np.hstack([ring, np.roll(ring, -1, axis=0)]) for _, ring in rings]).T
    owners = np.repeat([index for index, _ in rings], [len(ring) for _, ring in rings]).astype(np.int32)
    guards_m = _guards_of(ends, owners, polygons, guards)
    low, high = _bands(np.minimum(ends[1], ends[3])), _bands(np.maximum(ends[1], ends[3]))
    copies = high - low + 1
    which = np.repeat(np.arange(len(owners)), copies)
    band = np.arange(len(which)) - np.repeat(np.cumsum(copies) - copies, copies) + low[which]
    order = np.argsort(band, kind="stable")
    rows = which[order]
    return Edges(
        ends=np.ascontiguousarray(ends[:, rows]),
        owners=owners[rows],
        guards_m=guards_m[rows],
        starts=tuple(np.searchsorted(band[order], np.arange(181)).tolist()),
        widest_guard_m=float(guards_m.max()),
    )


def _guards_of(
    ends: Ends, owners: NDArray[np.int32], polygons: Sequence[Polygon], guards: Guards
) -> NDArray[np.float32]:
    """The guard of each edge: by its length, or by the pair of countries that share it where that was measured."""
    x1, y1, x2, y2 = ends.astype(np.float64) / UNITS_PER_DEGREE
    east_m = (x2 - x1) * np.cos(np.radians((y1 + y2) / 2)) * LONGITUDE_M
    length_m = np.hypot(east_m, (y2 - y1) * LATITUDE_M)
    widest_m = max(guards.cap_m, guards.default_m)
    guards_m: NDArray[np.float32] = np.clip(length_m * guards.length_share, guards.default_m, widest_m).astype(
        np.float32
    )
    for pair, rows in _shared(ends, owners, polygons, guards):
        guards_m[rows] = guards.pairs[pair]
        for stretch in guards.stretches:
            if stretch.pair == pair:
                guards_m[rows[_inside(ends[:, rows] / UNITS_PER_DEGREE, stretch)]] = stretch.metres
    return guards_m


def _shared(
    ends: Ends, owners: NDArray[np.int32], polygons: Sequence[Polygon], guards: Guards
) -> list[tuple[frozenset[str], NDArray[np.int64]]]:
    """For each measured pair of countries the edges that both of them have."""
    found = []
    for pair in guards.pairs:
        of_pair = [i for i, polygon in enumerate(polygons) if pair.intersection(polygon.codes) and not polygon.override]
        rows = np.flatnonzero(np.isin(owners, of_pair))
        one, other = ends[:2, rows], ends[2:, rows]
        swap = (one[0] > other[0]) | ((one[0] == other[0]) & (one[1] > other[1]))
        keys = np.where(swap, np.concatenate([other, one]), np.concatenate([one, other]))
        _, which, times = np.unique(keys, axis=1, return_inverse=True, return_counts=True)
        found.append((pair, rows[times[which.reshape(-1)] > 1]))
    return found


def _inside(ends: NDArray[np.float64], box: Stretch) -> NDArray[np.bool_]:
    x, y = ends[[0, 2]], ends[[1, 3]]
    inside: NDArray[np.bool_] = np.all((x >= box.west) & (x <= box.east) & (y >= box.south) & (y <= box.north), axis=0)
    return inside


def _bands(latitudes: NDArray[np.int32]) -> NDArray[np.int64]:
    return np.clip(latitudes // UNITS_PER_DEGREE + 90, 0, 179).astype(np.int64)


def _band(latitude: float) -> int:
    """The one-degree band of a latitude: 0 at the south pole, 179 at the north pole."""
    return min(max(math.floor(latitude) + 90, 0), 179)
