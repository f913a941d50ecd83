"""Reads NMEA 0183 logs: RMC sentences give time and position, GGA sentences before them the accuracy."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import reduce
from operator import xor
from pathlib import Path

from tools.importing.rows import BadRowError, Complain, accuracy_of_hdop, fix_message, strict
from tools.recording import Recorded

_SENTENCE = re.compile(r"[$!]([A-Z][A-Z0-9]+,[^*]*)(?:\*([0-9A-Fa-f]{2}))?")
_MAKERS = "P"  # begins a maker's own sentence, such as $PUBX or $PMTK001, which may end as a standard one does
CENTURY = 2000  # RMC has two digits of the year; GNSS logs are younger than 2000
HDOP_FIELD = 8


def read(path: Path, complain: Complain = strict) -> Iterator[Recorded]:
    """Yield a message for each valid RMC; other sentences are skipped, damaged ones go to `complain`."""
    hdop: float | None = None
    with path.open(encoding="ascii", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            text = line.strip()
            if not text:
                continue
            try:
                fields = _fields(text)
                kind = "" if fields[0].startswith(_MAKERS) else fields[0][2:]
                if kind == "GGA":
                    hdop = float(fields[HDOP_FIELD]) if fields[HDOP_FIELD] else None
                elif kind == "RMC" and fields[2] == "A":
                    yield _fix(fields, hdop)
            except (ValueError, IndexError) as exc:
                complain(BadRowError(path, number, str(exc) or "fields are missing"))


def _fields(text: str) -> list[str]:
    """Split a sentence whose checksum is right; raises ValueError."""
    found = _SENTENCE.fullmatch(text)
    if found is None:
        message = "not an NMEA sentence"
        raise ValueError(message)
    computed = reduce(xor, found[1].encode())
    if found[2] is not None and int(found[2], 16) != computed:
        message = f"the checksum is {found[2]}, wanted {computed:02X}"
        raise ValueError(message)
    return found[1].split(",")


def _fix(fields: list[str], hdop: float | None) -> Recorded:
    time_ns = _time_ns(fields[1], fields[9])
    latitude = _degrees(fields[3], 2) * (-1 if fields[4] == "S" else 1)
    longitude = _degrees(fields[5], 3) * (-1 if fields[6] == "W" else 1)
    return fix_message(time_ns, latitude, longitude, None if hdop is None else accuracy_of_hdop(hdop))


def _time_ns(clock: str, date: str) -> int:
    """Read `hhmmss.sss` and `ddmmyy`."""
    whole, _, fraction = clock.partition(".")
    try:
        moment = datetime.strptime(f"{date}{whole}", "%d%m%y%H%M%S").replace(tzinfo=UTC)
    except ValueError as exc:
        message = f"{clock} of {date} is not a time"
        raise ValueError(message) from exc
    moment = moment.replace(year=CENTURY + moment.year % 100)
    return int(moment.timestamp()) * 10**9 + int(fraction.ljust(9, "0")[:9] or "0")


def _degrees(text: str, digits: int) -> float:
    """Read `ddmm.mmmm`, with two or three digits of degrees."""
    return round(int(text[:digits]) + float(text[digits:]) / 60, 8)
