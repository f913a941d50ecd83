"""Reads MDF4 bus logs with a DBC through asammdf: positions become GNSS messages, every other CAN message telemetry.

asammdf decodes a log as a whole: six times its size in memory where all its frames are of one CAN message.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tools.importing.rows import TELEMETRY_PREFIX, BadRowError, Complain, SourceError, fix_message, json_message, strict
from tools.recording import Recorded
from tools.schemas import NANOSECONDS

_MESSAGE_NAME = re.compile(r"message (\S+)")
POSITION = ("Latitude", "Longitude")
ACCURACY, VALIDITY = "PositionAccuracy", "PositionValid"
LEAST_GAP_NS = NANOSECONDS // 10  # faster CAN messages are thinned to this: cars send telemetry, not their bus


def read(path: Path, dbc: Path, complain: Complain = strict) -> Iterator[Recorded]:
    """Yield the messages of a log; those of each CAN message are in order, the whole is not. Raises SourceError.

    Positions that are none, such as those of a receiver without a fix, go to `complain`.
    """
    try:
        from asammdf import MDF  # noqa: PLC0415 - LGPL, and only this format needs it
    except ImportError as exc:
        message = "MDF4 needs asammdf: pip install 'residency-agent[mdf]'"
        raise SourceError(message) from exc
    if not dbc.is_file():
        message = f"{dbc}: no such DBC file"
        raise SourceError(message)
    try:
        with MDF(path) as log, log.extract_bus_logging({"CAN": [(str(dbc), 0)]}) as decoded:
            start_ns = round(log.header.start_time.timestamp() * 1_000_000) * 1000
            for index, group in enumerate(decoded.groups):
                for number, (topic, time_ns, values) in enumerate(_rows(decoded, index, group, start_ns), start=1):
                    try:
                        yield from _messages(topic, time_ns, values)
                    except ValueError as exc:
                        complain(BadRowError(path, number, f"{topic}: {exc}"))
    except SourceError:
        raise
    except Exception as exc:
        message = f"{path}: not a readable MDF4 log: {exc}"
        raise SourceError(message) from exc


def _rows(
    decoded: Any,  # noqa: ANN401 - untyped library
    index: int,
    group: Any,  # noqa: ANN401 - as above
    start_ns: int,
) -> Iterator[tuple[str, int, dict[str, float]]]:
    """Topic, time and values of each CAN message of a group, thinned; a value that is no number is left out."""
    names = [channel.name for channel in group.channels if channel.name != "time"]
    signals = {
        name: decoded.get(name, group=index, raw=True).physical(ignore_value2text_conversions=True) for name in names
    }
    times = next(iter(signals.values())).timestamps if signals else []
    named = _MESSAGE_NAME.search(group.channel_group.comment or "")
    topic = TELEMETRY_PREFIX + (named[1] if named else f"can{index}")
    last_ns = -LEAST_GAP_NS
    for row, second in enumerate(times):
        time_ns = start_ns + round(float(second) * NANOSECONDS)
        if time_ns - last_ns >= LEAST_GAP_NS:
            last_ns = time_ns
            values = {name: _plain(one.samples[row]) for name, one in signals.items()}
            yield topic, time_ns, {name: value for name, value in values.items() if math.isfinite(value)}


def _messages(topic: str, time_ns: int, values: dict[str, float]) -> Iterator[Recorded]:
    """One message, or none for a position that the receiver calls invalid."""
    if not all(name in values for name in POSITION):
        yield json_message(topic, time_ns, values)
    elif values.get(VALIDITY, 1):
        yield fix_message(time_ns, values[POSITION[0]], values[POSITION[1]], values.get(ACCURACY))


def _plain(value: Any) -> float:  # noqa: ANN401 - a numpy scalar of any kind
    return round(float(value), 9)
