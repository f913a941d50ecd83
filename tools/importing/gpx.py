"""Reads the track points of a GPX 1.0 or 1.1 file as GNSS messages."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from xml.parsers import expat

from tools.importing.rows import BadRowError, Complain, SourceError, accuracy_of_hdop, fix_message, strict
from tools.recording import Recorded

PIECE_BYTES = 1 << 16
SEPARATOR = "|"


@dataclass(slots=True)
class _Point:
    """A track point while it is read."""

    line: int
    attributes: dict[str, str]
    values: dict[str, str] = field(default_factory=dict)


class _Points:
    """Handlers of the parser; finished points wait in `ready`."""

    def __init__(self) -> None:
        self.parser = expat.ParserCreate(namespace_separator=SEPARATOR)
        self.parser.StartElementHandler = self._start
        self.parser.EndElementHandler = self._end
        self.parser.CharacterDataHandler = self._text
        self.parser.EntityDeclHandler = self._entity
        self.ready: list[_Point] = []
        self._point: _Point | None = None
        self._name = ""

    def _start(self, name: str, attributes: dict[str, str]) -> None:
        self._name = name.rpartition(SEPARATOR)[2]
        if self._name == "trkpt":
            self._point = _Point(self.parser.CurrentLineNumber, attributes)

    def _text(self, text: str) -> None:
        if self._point is not None and self._name in {"time", "hdop"}:
            self._point.values[self._name] = self._point.values.get(self._name, "") + text

    def _end(self, name: str) -> None:
        if name.rpartition(SEPARATOR)[2] == "trkpt" and self._point is not None:
            self.ready.append(self._point)
            self._point = None
        self._name = ""

    def _entity(self, *_: object) -> None:
        message = "entities are not read"
        raise SourceError(message)


def read(path: Path, complain: Complain = strict) -> Iterator[Recorded]:
    """Yield a message for each point with a time; bad points go to `complain`, XML that is none is a SourceError."""
    points = _Points()
    with path.open("rb") as stream:
        while True:
            piece = stream.read(PIECE_BYTES)
            try:
                points.parser.Parse(piece, not piece)
            except (expat.ExpatError, SourceError) as exc:
                message = f"{path}:{points.parser.CurrentLineNumber}: {exc}"
                raise SourceError(message) from exc
            for point in points.ready:
                yield from _message(path, point, complain)
            points.ready.clear()
            if not piece:
                return


def _message(path: Path, point: _Point, complain: Complain) -> Iterator[Recorded]:
    try:
        moment = datetime.fromisoformat(point.values["time"].strip())
        if moment.tzinfo is None:
            message = "the time has no zone"
            raise ValueError(message)  # noqa: TRY301 - one place turns mistakes into bad rows
        hdop = point.values.get("hdop")
        accuracy = None if hdop is None else accuracy_of_hdop(float(hdop))
        time_ns = round(moment.timestamp() * 1_000_000) * 1000
        yield fix_message(time_ns, float(point.attributes["lat"]), float(point.attributes["lon"]), accuracy)
    except KeyError as exc:
        complain(BadRowError(path, point.line, f"track point without {exc.args[0]}"))
    except ValueError as exc:
        complain(BadRowError(path, point.line, str(exc)))
