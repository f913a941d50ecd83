"""Borders of the user's own as GeoJSON (RFC 7946), checked: a mistake in a border misroutes records.

A FeatureCollection of Polygons and MultiPolygons. A property of each feature (`iso1A2` unless told otherwise) holds
its ISO 3166-1 alpha-2 code, or a list of codes where the area is disputed. Features may overlap: all codes count.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agent.errors import ConfigError
from agent.places.polygons import UNITS_PER_DEGREE, Polygon, Ring

MAX_VERTICES = 200_000  # 4 MB and a few seconds of checking at start


def read_polygons(text: str, *, file: str, code_property: str = "iso1A2") -> list[Polygon]:
    """The polygons of a GeoJSON text; raises ConfigError naming file, feature, polygon and ring."""
    return list(_Reader(file, code_property).polygons(text))


class _Reader:
    """One file; knows its name and the property for the messages."""

    def __init__(self, file: str, code_property: str) -> None:
        self._file = file
        self._code_property = code_property
        self._vertices = 0

    def polygons(self, text: str) -> Iterator[Polygon]:
        try:
            document = json.loads(text)
        except (ValueError, RecursionError) as exc:
            raise self._wrong("file", str(exc), "JSON") from exc
        if not isinstance(document, dict) or document.get("type") != "FeatureCollection":
            raise self._wrong("type", _short(document), "a FeatureCollection")
        if "crs" in document and "CRS84" not in str(document["crs"]):
            raise self._wrong("crs", _short(document["crs"]), "none: RFC 7946 is WGS84")
        features = document.get("features")
        if not isinstance(features, list) or not features:
            raise self._wrong("features", _short(features), "at least one feature")
        for index, feature in enumerate(features):
            yield from self._feature(f"features[{index}]", feature)

    def _feature(self, key: str, feature: object) -> Iterator[Polygon]:
        properties = feature.get("properties") if isinstance(feature, dict) else None
        geometry = feature.get("geometry") if isinstance(feature, dict) else None
        if not isinstance(properties, dict) or not isinstance(geometry, dict):
            raise self._wrong(key, _short(feature), "a feature with properties and a geometry")
        codes = self._codes(f"{key}.properties.{self._code_property}", properties.get(self._code_property))
        key = f"{key} ({','.join(codes)})"
        coordinates = geometry.get("coordinates")
        if geometry.get("type") == "Polygon":
            coordinates = [coordinates]
        elif geometry.get("type") != "MultiPolygon":
            raise self._wrong(f"{key}.geometry.type", _short(geometry.get("type")), "Polygon or MultiPolygon")
        for index, rings in enumerate(self._list(f"{key}.geometry.coordinates", coordinates)):
            where = f"{key} polygon {index}"
            checked = (self._ring(f"{where} ring {n}", ring) for n, ring in enumerate(self._list(where, rings)))
            yield Polygon(codes=codes, rings=tuple(checked))

    def _codes(self, key: str, value: object) -> tuple[str, ...]:
        codes = value if isinstance(value, list) else [value]
        if not codes or not all(isinstance(code, str) and re.fullmatch("[A-Z]{2}", code) for code in codes):
            raise self._wrong(key, value, "an ISO 3166-1 alpha-2 code, or a list of them")
        if "ZZ" in codes:
            raise self._wrong(key, value, "a country; ZZ is the open sea")
        return tuple(sorted(set(codes)))

    def _list(self, key: str, value: object) -> list[Any]:
        if not isinstance(value, list) or not value:
            raise self._wrong(key, _short(value), "a list that is not empty")
        return value

    def _ring(self, key: str, positions: object) -> Ring:
        """A closed GeoJSON ring as an open one in 1e-7 degrees."""
        points = self._points(key, positions)
        self._vertices += len(points)
        if self._vertices > MAX_VERTICES:
            raise self._wrong(key, self._vertices, f"at most {MAX_VERTICES} vertices in the file")
        if len(points) < 4:
            raise self._wrong(key, f"{len(points)} positions", "at least 4 (RFC 7946, 3.1.6)")
        if not np.array_equal(points[0], points[-1]):
            raise self._wrong(key, f"{points[0]} first and {points[-1]} last", "a closed ring")
        if np.abs(np.diff(points[:, 0])).max() > 180:
            raise self._wrong(key, "an edge longer than 180 degrees", "parts cut at the antimeridian (RFC 7946, 3.1.9)")
        ring = np.round(points[:-1] * UNITS_PER_DEGREE).astype(np.int32)
        if not _area(ring):
            raise self._wrong(key, "no area", "a ring that encloses something")
        if (crossing := _crossing(ring)) is not None:
            raise self._wrong(key, f"edges {crossing[0]} and {crossing[1]} that cross", "a ring that does not")
        return ring

    def _points(self, key: str, positions: object) -> NDArray[np.float64]:
        for index, position in enumerate(self._list(key, positions)):
            if not _is_position(position):
                wanted = "[longitude, latitude] in degrees, -180..180 and -90..90"
                raise self._wrong(f"{key} position {index}", _short(position), wanted)
        return np.array([position[:2] for position in self._list(key, positions)], dtype=np.float64)

    def _wrong(self, key: str, found: object, wanted: str) -> ConfigError:
        return ConfigError(self._file, key, found, wanted)


def _is_position(position: object) -> bool:
    return (
        isinstance(position, list)
        and len(position) in {2, 3}
        and all(isinstance(x, int | float) and not isinstance(x, bool) for x in position)
        and abs(position[0]) <= 180
        and abs(position[1]) <= 90
    )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _area(ring: Ring) -> float:
    """Twice the enclosed area; the ring's own sign."""
    x, y = (ring - ring[0]).astype(np.float64).T
    return float(np.sum(x * np.roll(y, -1) - np.roll(x, -1) * y))


def _crossing(ring: Ring) -> tuple[int, int] | None:
    """Two edges that cross each other properly, by their first vertices; None where there are none.

    Edges are sorted by their western end, so that each is compared only with those that begin before it ends.
    """
    ends = np.hstack([ring, np.roll(ring, -1, axis=0)]).astype(np.float64)
    order = np.argsort(np.minimum(ends[:, 0], ends[:, 2]), kind="stable")
    edges = ends[order]
    west, east = np.minimum(edges[:, 0], edges[:, 2]), np.maximum(edges[:, 0], edges[:, 2])
    last = np.searchsorted(west, east, side="right")
    for index in range(len(edges)):
        others = edges[index + 1 : last[index]]
        found = np.flatnonzero(_cross(edges[index], others))
        if len(found):
            first, second = sorted((int(order[index]), int(order[index + 1 + found[0]])))
            return first, second
    return None


def _cross(edge: NDArray[np.float64], others: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which edges (n, 4) have their ends on both sides of the edge, and the edge its ends on both sides of them."""
    a, b = edge[:2], edge[2:]
    c, d = others[:, :2], others[:, 2:]
    apart: NDArray[np.bool_] = (_side(a, b, c) * _side(a, b, d) < 0) & (_side(c, d, a) * _side(c, d, b) < 0)
    return apart


def _side(a: NDArray[np.float64], b: NDArray[np.float64], p: NDArray[np.float64]) -> NDArray[np.float64]:
    """-1, 0 or 1: the side of the line a-b on which p lies."""
    along, across = b - a, p - a
    side: NDArray[np.float64] = np.sign(along[..., 0] * across[..., 1] - along[..., 1] * across[..., 0])
    return side
