"""Reads a folder of pictures whose names end in their time, or that `times.csv` (file,seconds) gives times."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from pathlib import Path

from tools.importing.rows import CAMERA_TOPIC, BadRowError, Complain, SourceError, picture_message, strict, whole_ns
from tools.recording import Recorded

_TIME = re.compile(r"(\d+(?:\.\d+)?)(ms|s)?$")
SUFFIXES = frozenset({".jpg", ".jpeg", ".png"})
TIMES = "times.csv"


def read(folder: Path, complain: Complain = strict, topic: str = CAMERA_TOPIC) -> Iterator[Recorded]:
    """Yield the pictures in order of time, seconds counted from 1970; raises SourceError for an empty folder."""
    table = folder / TIMES
    timed = list(_listed(table, complain) if table.is_file() else _named(folder, complain))
    if not timed:
        message = f"{folder}: no pictures with times"
        raise SourceError(message)
    for time_ns, path in sorted(timed):
        yield picture_message(topic, time_ns, path.read_bytes())


def _named(folder: Path, complain: Complain) -> Iterator[tuple[int, Path]]:
    pictures = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    for number, path in enumerate(pictures, start=1):
        found = _TIME.search(path.stem)
        if found is None:
            complain(BadRowError(path, number, "the name does not end in a time such as 00012s or 12500ms"))
            continue
        try:
            yield whole_ns(float(found[1]) / (1000 if found[2] == "ms" else 1)), path
        except ValueError as exc:
            complain(BadRowError(path, number, str(exc)))


def _listed(table: Path, complain: Complain) -> Iterator[tuple[int, Path]]:
    with table.open(newline="", encoding="utf-8-sig") as stream:  # Excel writes a byte order mark
        for number, row in enumerate(csv.DictReader(stream), start=2):
            try:
                path = table.parent / row["file"]
                if not path.is_file():
                    message = f"no file {row['file']}"
                    raise ValueError(message)  # noqa: TRY301 - one place turns mistakes into bad rows
                yield whole_ns(float(row["seconds"])), path
            except (KeyError, TypeError, ValueError) as exc:
                what = f"no column {exc.args[0]}" if isinstance(exc, KeyError) else str(exc)
                complain(BadRowError(table, number, what))
