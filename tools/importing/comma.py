"""Reads a segment of comma2k19: u-blox positions, speed and steering angle, on the GNSS clock."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tools.importing.rows import TELEMETRY_PREFIX, SourceError, fix_message, json_message
from tools.recording import Recorded
from tools.schemas import NANOSECONDS

MILLISECONDS = 1_000_000  # nanoseconds each
COLUMNS = 6  # latitude, longitude, speed, Unix milliseconds, altitude, bearing; as the data set's README lists them
ACCURACY_M = 10.0  # the log states none; an open-sky u-blox fix is better than this
LEAST_GAP_S = 0.1  # 10 Hz: the log's 83 Hz are a bus, not telemetry


def read(folder: Path) -> Iterator[Recorded]:
    """Yield the messages, each kind in order; raises SourceError."""
    log = folder / "processed_log"
    try:
        yield from _messages(log)
    except SourceError:
        raise
    except ValueError as exc:
        message = f"{log}: {exc}"
        raise SourceError(message) from exc


def _messages(log: Path) -> Iterator[Recorded]:
    boot, fixes = _series(log / "GNSS" / "live_gnss_ublox")
    if fixes.ndim != 2 or fixes.shape[1] != COLUMNS or not len(fixes):
        message = f"{log / 'GNSS' / 'live_gnss_ublox'}: wanted {COLUMNS} columns, found shape {fixes.shape}"
        raise SourceError(message)
    for row in fixes.tolist():
        yield fix_message(round(row[3]) * MILLISECONDS, row[0], row[1], ACCURACY_M)
    offset_s = float(np.median(fixes[:, 3] / 1000 - boot))
    for name, topic, key in (("speed", "speed", "mps"), ("steering_angle", "steering", "degrees")):
        times, values = _series(log / "CAN" / name)
        last_s = -LEAST_GAP_S
        for second, value in zip(times.tolist(), values.reshape(len(times), -1)[:, 0].tolist(), strict=True):
            if second - last_s >= LEAST_GAP_S:
                last_s = second
                time_ns = round((second + offset_s) * NANOSECONDS)
                yield json_message(TELEMETRY_PREFIX + topic, time_ns, {key: round(value, 4)})


def _series(folder: Path) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    try:
        times = np.load(folder / "t", allow_pickle=False)
        values = np.load(folder / "value", allow_pickle=False)
    except (OSError, ValueError) as exc:
        message = f"{folder}: not a readable series: {exc}"
        raise SourceError(message) from exc
    if len(times) != len(values):
        message = f"{folder}: {len(times)} times, but {len(values)} values"
        raise SourceError(message)
    return times, values
