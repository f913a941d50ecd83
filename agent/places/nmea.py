"""NMEA 0183: positions of RMC and GGA sentences, accuracy of GST and of GGA's HDOP. A checksum is required."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from agent.errors import PositionError

SECOND_NS = 1_000_000_000
RAYLEIGH_95 = math.sqrt(-2 * math.log(0.05))  # 95 % radius of a two-dimensional normal error, in sigmas
HDOP_95_M = 2 * 5.0  # metres of 95 % radius per unit of HDOP: twice a user range error of 5 m
ACCURACY_AGE_NS = 10 * SECOND_NS
GGA_FIXED = frozenset("123459")  # 0 is no fix, 6 dead reckoning, 7 typed in, 8 simulated
RMC_FIXED = frozenset("ADFPR")  # mode since NMEA 2.3; E is dead reckoning, M typed in, N no fix, S simulated

_KIND = r"(?:[A-Z]{2}(?P<kind>[A-Z]{3})|P[A-Z0-9]+)"  # P: a maker's own, which says nothing here
_SENTENCE = re.compile(rf"\$(?P<body>{_KIND},(?P<fields>[ -)+-~]*))\*(?P<sum>[0-9A-Fa-f]{{2}})")
_LATITUDE = re.compile(r"(\d{2})([0-5]\d(?:\.\d{1,10})?)")
_LONGITUDE = re.compile(r"([01]\d{2})([0-5]\d(?:\.\d{1,10})?)")
_TIME = re.compile(r"([01]\d|2[0-3])([0-5]\d)([0-5]\d|60)(?:\.(\d{1,9}))?")


@dataclass(frozen=True, slots=True, kw_only=True)
class NmeaPosition:
    """A position in degrees, 95 % radius in metres; Unix ns once an RMC sentence has given the date."""

    latitude: float
    longitude: float
    accuracy_m: float
    time_ns: int | None


class NmeaReader:
    """Sentences of one receiver, any number per message; remembers the last accuracy and the date."""

    def __init__(self, *, default_accuracy_m: float) -> None:
        self._default_m = default_accuracy_m
        self._accuracy: dict[str, tuple[float, int]] = {}  # by sentence: metres, monotonic ns
        self._dated: datetime | None = None

    def read(self, payload: bytes, monotonic_ns: int) -> NmeaPosition | None:
        """The last position of the payload; None where no sentence gives one. Raises PositionError.

        One damaged sentence spoils the payload: what is missing may be what says that there is no fix.
        """
        place: tuple[float, float, int | None] | None = None
        for line in payload.decode("ascii").splitlines():
            if line.strip():
                place = self._sentence(line.strip(), monotonic_ns) or place
        if place is None:
            return None
        latitude, longitude, time_ns = place
        accuracy_m = self._accuracy_m(monotonic_ns)
        return NmeaPosition(latitude=latitude, longitude=longitude, accuracy_m=accuracy_m, time_ns=time_ns)

    def _sentence(self, line: str, monotonic_ns: int) -> tuple[float, float, int | None] | None:
        kind, fields = split_sentence(line)
        if kind == "RMC":
            return self._rmc(fields)
        if kind == "GGA":
            return self._gga(fields, monotonic_ns)
        if kind == "GST":
            largest = math.hypot(_positive(fields[5]), _positive(fields[6]))  # no axis of the ellipse is longer
            self._accuracy["GST"] = (RAYLEIGH_95 * largest, monotonic_ns)
        return None

    def _rmc(self, fields: list[str]) -> tuple[float, float, int]:
        if fields[1] != "A" or (len(fields) > 11 and fields[11] not in RMC_FIXED):
            detail = "the receiver has no fix (RMC)"
            raise PositionError(detail)
        day = datetime.strptime(fields[8], "%d%m%y").replace(tzinfo=UTC)
        self._dated = day + _time_of_day(fields[0])
        return *_degrees(fields[2:6]), _unix_ns(self._dated)

    def _gga(self, fields: list[str], monotonic_ns: int) -> tuple[float, float, int | None]:
        if fields[5] not in GGA_FIXED:
            detail = "the receiver has no fix (GGA)"
            raise PositionError(detail)
        if fields[7]:
            self._accuracy["GGA"] = (HDOP_95_M * _positive(fields[7]), monotonic_ns)
        return *_degrees(fields[1:5]), self._dated_ns(_time_of_day(fields[0]))

    def _dated_ns(self, time: timedelta) -> int | None:
        """The time of day on the day that puts it nearest to the last dated sentence."""
        if self._dated is None:
            return None
        midnight = self._dated.replace(hour=0, minute=0, second=0, microsecond=0)
        dated = self._dated
        days = (midnight + timedelta(days=shift) + time for shift in (-1, 0, 1))
        return _unix_ns(min(days, key=lambda moment: abs(moment - dated)))

    def _accuracy_m(self, now_ns: int) -> float:
        """The worst of what GST and HDOP said; what is old cannot make it better than the default."""
        fresh = [metres for metres, at_ns in self._accuracy.values() if now_ns - at_ns <= ACCURACY_AGE_NS]
        known = [metres for metres, _ in self._accuracy.values()]
        return max(fresh) if fresh else max([self._default_m, *known])


def split_sentence(line: str) -> tuple[str, list[str]]:
    """Kind (empty: a maker's own) and fields of a sentence; raises PositionError for a checksum missing or wrong."""
    found = _SENTENCE.fullmatch(line)
    if found is None:
        detail = "not an NMEA sentence with a checksum"
        raise PositionError(detail)
    total = 0
    for byte in found["body"].encode():
        total ^= byte
    if total != int(found["sum"], 16):
        detail = "NMEA checksum is wrong"
        raise PositionError(detail)
    return found["kind"] or "", found["fields"].split(",")


def _degrees(fields: list[str]) -> tuple[float, float]:
    """Degrees of ddmm.mm, N or S, dddmm.mm, E or W; raises PositionError."""
    north, east = _LATITUDE.fullmatch(fields[0]), _LONGITUDE.fullmatch(fields[2])
    if north is None or east is None or fields[1] not in {"N", "S"} or fields[3] not in {"E", "W"}:
        detail = "NMEA coordinates are not degrees and minutes"
        raise PositionError(detail)
    latitude = int(north[1]) + float(north[2]) / 60
    longitude = int(east[1]) + float(east[2]) / 60
    return latitude if fields[1] == "N" else -latitude, longitude if fields[3] == "E" else -longitude


def _time_of_day(field: str) -> timedelta:
    found = _TIME.fullmatch(field)
    if found is None:
        detail = "NMEA time is not hhmmss"
        raise PositionError(detail)
    microseconds = int((found[4] or "0").ljust(6, "0")[:6])
    return timedelta(hours=int(found[1]), minutes=int(found[2]), seconds=int(found[3]), microseconds=microseconds)


def _positive(field: str) -> float:
    value = float(field)
    if not (0 < value < math.inf):
        detail = "NMEA accuracy is not positive"
        raise PositionError(detail)
    return value


def _unix_ns(moment: datetime) -> int:
    epoch = datetime(1970, 1, 1, tzinfo=UTC)
    return (moment - epoch) // timedelta(microseconds=1) * 1000
