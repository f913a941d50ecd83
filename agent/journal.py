"""The log: one line per event for journald, a constant dotted name and its data; repeats are counted, not repeated.

Invariants:
- No payload, position or identity: events of the agent are constant names with chosen data, and of what a library says
  only who said it and the kind of the error are told, for its words may quote anything.
- A line that comes again within PERIOD_SECONDS is counted; once a period the count is told, `repeated` beside the
  line. Only the same line hides, so an error of one endpoint never hides that of another.
"""

from __future__ import annotations

import json
import logging
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

PERIOD_SECONDS = 60.0
MOST_LINES = 1024  # remembered at a time; beyond it the oldest is forgotten, its count told
LIBRARY_EVENT = "library.said"
FAILED_EVENT = "agent.failed"
PACKAGE = Path(__file__).parent
STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
PRIORITIES = {logging.CRITICAL: 2, logging.ERROR: 3, logging.WARNING: 4, logging.INFO: 6}  # sd-daemon(3)


def line_of(record: logging.LogRecord) -> str:
    """`<priority>event key=value ...`; journald takes the priority off and adds the time."""
    event, extra = record.getMessage(), {key: value for key, value in vars(record).items() if key not in STANDARD}
    if record.name.partition(".")[0] not in {"agent", "__main__"}:
        error = record.exc_info[0].__name__ if record.exc_info and record.exc_info[0] else ""
        event, extra = LIBRARY_EVENT, {"library": record.name, "error": error}
    data = "".join(f" {key}={json.dumps(value, default=str)}" for key, value in extra.items())
    return f"<{PRIORITIES.get(record.levelno, 7)}>{event}{data}"


def place_of(error: BaseException) -> str:
    """Where in the agent an error came from, `intake/line.py:78`: what a traceback would tell without its words."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if Path(frame.filename).is_relative_to(PACKAGE)]
    return f"{Path(own[-1].filename).relative_to(PACKAGE)}:{own[-1].lineno}" if own else "outside the agent"


@dataclass(slots=True)
class _Said:
    since: float
    repeated: int = 0


class Repeats:
    """Which lines were said lately. Moments are arguments, monotonic seconds."""

    def __init__(self, period_s: float = PERIOD_SECONDS, most: int = MOST_LINES) -> None:
        self._period_s = period_s
        self._most = most
        self._said: dict[str, _Said] = {}

    def lines(self, line: str, now: float) -> Iterator[str]:
        """What to say when `line` comes: counts that are due, then the line unless it was said within the period."""
        yield from self.due(now)
        said = self._said.get(line)
        if said is not None:
            said.repeated += 1
            return
        if len(self._said) >= self._most:
            oldest = next(iter(self._said))
            yield from self._counted(oldest, self._said.pop(oldest), now)
        self._said[line] = _Said(now)
        yield line

    def due(self, now: float, *, all_of_them: bool = False) -> Iterator[str]:
        """The counts of the lines whose period has ended; a line that was not repeated in it is forgotten."""
        for line, said in list(self._said.items()):
            if now - said.since < self._period_s and not all_of_them:
                continue
            del self._said[line]
            if said.repeated:
                yield from self._counted(line, said, now)
                self._said[line] = _Said(now)

    @staticmethod
    def _counted(line: str, said: _Said, now: float) -> Iterator[str]:
        if said.repeated:
            yield f"{line} repeated={said.repeated} within_s={round(now - said.since)}"


class Journal(logging.StreamHandler[TextIO]):
    """Writes lines to stderr, where journald reads; `flush`, called now and then, tells the counts that are due."""

    def __init__(self, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(stream)
        self._repeats = Repeats()
        self._clock = clock

    def emit(self, record: logging.LogRecord) -> None:
        """Say the line, or count it."""
        self._write(self._repeats.lines(line_of(record), self._clock()))

    def flush(self) -> None:
        """Tell the counts that are due."""
        self._tell(all_of_them=False)

    def close(self) -> None:
        """Tell all counts."""
        self._tell(all_of_them=True)
        super().close()

    def _tell(self, *, all_of_them: bool) -> None:
        self.acquire()
        try:
            self._write(self._repeats.due(self._clock(), all_of_them=all_of_them))
        finally:
            self.release()

    def _write(self, lines: Iterator[str]) -> None:
        text = "".join(f"{line}\n" for line in lines)
        try:
            self.stream.write(text)
            self.stream.flush()
        except (OSError, ValueError):
            """A log that nobody takes any more must not end the agent."""


def start(level: str) -> None:
    """Send everything that is logged from `level` on to the journal."""
    logging.basicConfig(level=level.upper(), handlers=[Journal()], force=True)
    logging.raiseExceptions = False  # logging's own complaints would quote what was to be logged


def tell() -> None:
    """Have the counts told that are due; called every few seconds."""
    for handler in logging.getLogger().handlers:
        handler.flush()
