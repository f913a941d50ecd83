"""SVG for the report: a map, a timeline, histograms. Values in, text out; colours are classes that the page styles.

Dots are strokes of length zero, so thousands of them are one path per topic and fate, which the page can show and hide.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from numpy.typing import NDArray

from tools.run_file import Event

KEPT = "kept"
METRES_PER_DEGREE = 111_195.0
MAP_WIDTH, MAP_LEAST_HEIGHT, MAP_MOST_HEIGHT = 900.0, 320.0, 640.0
MAP_MARGIN = 0.12  # of the track's extent, on every side
LEAST_EXTENT_M = 500.0
TIME_WIDTH, ROW_HEIGHT, LABEL_WIDTH = 900.0, 26.0, 210.0
LABEL_LETTERS = 30  # of 12 px in this width
HISTOGRAM_WIDTH, HISTOGRAM_HEIGHT = 430.0, 150.0
BINS_PER_DECADE = 4
STEPS = (1, 2, 5)

Line = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where an event stands on the map, and whose dot it is."""

    latitude: float
    longitude: float
    topic: str
    fate: str


class Projection:
    """Equirectangular around the middle of the points: true to scale over the extent of a drive."""

    def __init__(self, points: Sequence[tuple[float, float]]) -> None:
        latitudes, longitudes = np.array(points, dtype=np.float64).T
        self._shrink = math.cos(math.radians(float(latitudes.mean())))
        wide_m = max(float(np.ptp(longitudes)) * self._shrink * METRES_PER_DEGREE, LEAST_EXTENT_M)
        high_m = max(float(np.ptp(latitudes)) * METRES_PER_DEGREE, LEAST_EXTENT_M)
        wide_m, high_m = wide_m * (1 + 2 * MAP_MARGIN), high_m * (1 + 2 * MAP_MARGIN)
        self.height = min(max(MAP_WIDTH * high_m / wide_m, MAP_LEAST_HEIGHT), MAP_MOST_HEIGHT)
        self.metres_per_pixel = max(wide_m / MAP_WIDTH, high_m / self.height)
        self._middle = (
            (float(latitudes.min()) + float(latitudes.max())) / 2,
            (float(longitudes.min()) + float(longitudes.max())) / 2,
        )

    def xy(self, latitude: float, longitude: float) -> tuple[float, float]:
        """Pixels from the upper left corner."""
        scale = METRES_PER_DEGREE / self.metres_per_pixel
        x = MAP_WIDTH / 2 + (longitude - self._middle[1]) * self._shrink * scale
        return round(x, 1), round(self.height / 2 - (latitude - self._middle[0]) * scale, 1)

    def corners(self) -> list[tuple[float, float]]:
        """Latitude and longitude of four places near the corners."""
        west, south, east, north = self.box()
        inset = 0.12
        latitudes = (north + (south - north) * inset, south + (north - south) * inset)
        longitudes = (west + (east - west) * inset, east + (west - east) * inset)
        return [(latitude, longitude) for latitude in latitudes for longitude in longitudes]

    def box(self) -> tuple[float, float, float, float]:
        """West, south, east, north in degrees."""
        scale = METRES_PER_DEGREE / self.metres_per_pixel
        half_lat, half_lon = self.height / 2 / scale, MAP_WIDTH / 2 / scale / self._shrink
        latitude, longitude = self._middle
        return longitude - half_lon, latitude - half_lat, longitude + half_lon, latitude + half_lat


def fate_of(event: Event) -> str:
    """Where a message ended: the brokers that it reached, or that it stayed in the car."""
    return "+".join(event.brokers) or KEPT


def map_svg(
    projection: Projection,
    *,
    borders: Iterable[Line],
    names: Mapping[tuple[float, float], str],
    track: Sequence[tuple[float, float]],
    places: Iterable[Place],
) -> str:
    """Borders as lines, the names of countries where they are, the fixes as a line, and a dot for every event."""
    lines = "".join(f'<path class="border" d="{_polyline(projection, line[:, ::-1])}"/>' for line in borders)
    fixes = f'<path class="track" d="{_polyline(projection, track)}"/>' if track else ""
    dots: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for one in places:
        dots.setdefault((one.topic, one.fate), []).append(projection.xy(one.latitude, one.longitude))
    drawn = "".join(_dots(topic, fate, points) for (topic, fate), points in sorted(dots.items()))
    size = f"0 0 {MAP_WIDTH:g} {projection.height:g}"
    written = "".join(_name(projection.xy(*place), name) for place, name in names.items())
    return (
        f'<svg class="map" viewBox="{size}" role="img" aria-label="Map of the drive">{lines}{written}{fixes}{drawn}'
        f"{_scale_bar(projection)}</svg>"
    )


def timeline_svg(events: Sequence[Event], fates: Sequence[str]) -> str:
    """A row per topic, a mark per message; marks of different fates stand at different heights in their row."""
    topics = sorted({one.topic for one in events})
    end = max((one.second for one in events), default=0.0) or 1.0
    width = TIME_WIDTH - LABEL_WIDTH
    dots: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for one in events:
        fate = fate_of(one)
        lane = (fates.index(fate) + 1) / (len(fates) + 1)
        x = round(LABEL_WIDTH + one.second / end * (width - 8), 1)
        dots.setdefault((one.topic, fate), []).append((x, round((topics.index(one.topic) + lane) * ROW_HEIGHT, 1)))
    rows = "".join(
        f'<text x="8" y="{(index + 0.65) * ROW_HEIGHT:g}">{escape(_shortened(topic))}'
        f"<title>{escape(topic)}</title></text>"
        f'<path class="row" d="M{LABEL_WIDTH:g} {(index + 1) * ROW_HEIGHT:g}H{TIME_WIDTH:g}"/>'
        for index, topic in enumerate(topics)
    )
    drawn = "".join(_dots(topic, fate, points) for (topic, fate), points in sorted(dots.items()))
    height = ROW_HEIGHT * len(topics) + 22
    axis = "".join(
        f'<text class="tick" x="{LABEL_WIDTH + second / end * (width - 8):g}" y="{height - 4:g}">{second:g} s</text>'
        for second in _ticks(end)
    )
    return (
        f'<svg class="timeline" viewBox="0 0 {TIME_WIDTH:g} {height:g}" role="img" '
        f'aria-label="Timeline of decisions">{rows}{drawn}{axis}</svg>'
    )


def histogram_svg(name: str, latencies_ms: Sequence[float]) -> str:
    """Latencies on a logarithmic axis, four bins to the decade."""
    exponents = [math.log10(max(value, 0.1)) for value in latencies_ms]
    first, last = math.floor(min(exponents)), math.floor(max(exponents)) + 1
    counts = Counter(int((exponent - first) * BINS_PER_DECADE) for exponent in exponents)
    bins = (last - first) * BINS_PER_DECADE
    step, most = HISTOGRAM_WIDTH / bins, max(counts.values())
    floor = HISTOGRAM_HEIGHT - 22
    bars = "".join(
        f'<rect class="bar" x="{index * step + 1:.1f}" y="{floor - count / most * (floor - 4):.1f}" '
        f'width="{step - 2:.1f}" height="{count / most * (floor - 4):.1f}"><title>{count}</title></rect>'
        for index, count in sorted(counts.items())
    )
    labels = "".join(
        f'<text class="tick" x="{(decade - first) * BINS_PER_DECADE * step:.1f}" y="{HISTOGRAM_HEIGHT - 6:g}">'
        f"{_milliseconds(decade)}</text>"
        for decade in range(first, last)
    )
    return (
        f'<svg class="histogram" viewBox="0 0 {HISTOGRAM_WIDTH:g} {HISTOGRAM_HEIGHT:g}" role="img" '
        f'aria-label="{escape(name)}">{bars}{labels}</svg>'
    )


def places_of(events: Sequence[Event], track: Sequence[tuple[float, float, float]]) -> list[Place]:
    """Where the events happened, as the fixes around them tell; none without fixes."""
    if not track:
        return []
    fixes = np.array(sorted(track), dtype=np.float64)
    seconds = [one.second for one in events]
    latitudes = np.interp(seconds, fixes[:, 0], fixes[:, 1]).tolist()
    longitudes = np.interp(seconds, fixes[:, 0], fixes[:, 2]).tolist()
    return [
        Place(latitude=latitude, longitude=longitude, topic=one.topic, fate=fate_of(one))
        for one, latitude, longitude in zip(events, latitudes, longitudes, strict=True)
    ]


def percentiles(values: Sequence[float]) -> Mapping[str, float]:
    """The 50th and 99th percentile, in the values' unit."""
    p50, p99 = np.percentile(np.array(values), [50, 99]).tolist()
    return {"p50": p50, "p99": p99}


def _shortened(topic: str) -> str:
    """What of a topic fits in front of its row: its end tells topics apart."""
    return topic if len(topic) <= LABEL_LETTERS else "…" + topic[1 - LABEL_LETTERS :]


def _polyline(projection: Projection, points: Iterable[Sequence[float]]) -> str:
    return "M" + "L".join(f"{x} {y}" for x, y in (projection.xy(point[0], point[1]) for point in points))


def _dots(topic: str, fate: str, points: Iterable[tuple[float, float]]) -> str:
    drawn = "".join(f"M{x} {y}h.1" for x, y in points)
    return f'<path class="dots" data-topic="{escape(topic)}" data-fate="{escape(fate)}" d="{drawn}"/>'


def _name(xy: tuple[float, float], name: str) -> str:
    return f'<text class="country" x="{xy[0]}" y="{xy[1]}">{escape(name)}</text>'


def _scale_bar(projection: Projection) -> str:
    wanted_m = projection.metres_per_pixel * MAP_WIDTH / 6
    metres = max(step * 10**power for power in range(7) for step in STEPS if step * 10**power <= max(wanted_m, 1))
    width, y = metres / projection.metres_per_pixel, projection.height - 14
    name = f"{metres / 1000:g} km" if metres >= 1000 else f"{metres} m"
    return f'<path class="scale" d="M14 {y:g}h{width:.1f}"/><text class="tick" x="14" y="{y - 6:g}">{name}</text>'


def _ticks(end: float) -> list[float]:
    wanted = end / 6
    step = next((s * 10**p for p in range(-1, 7) for s in STEPS if s * 10**p >= wanted), end)
    return [round(index * step, 3) for index in range(int(end / step) + 1)]


def _milliseconds(decade: int) -> str:
    return f"{10**decade / 1000:g} s" if decade >= 3 else f"{10.0**decade:g} ms"
