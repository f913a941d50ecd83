"""How long to wait before a connection is tried again."""

from __future__ import annotations

from collections.abc import Callable, Iterator

FIRST_SECONDS = 0.5
LONGEST_SECONDS = 60.0
STABLE_SECONDS = 30.0  # a connection that lived so long is tried again with the shortest delay


def delays(draw: Callable[[], float], *, first: float, longest: float) -> Iterator[float]:
    """Endless delays in seconds: `first`, doubling up to `longest`, each shortened by up to half; `draw` gives 0..1.

    The jitter keeps a fleet that lost its broker at one moment from coming back at one moment.
    """
    base = first
    while True:
        yield base * (1 - draw() / 2)
        base = min(base * 2, longest)


class Retries:
    """The delays between the connections to one peer; they begin anew after a connection that was stable."""

    def __init__(self, draw: Callable[[], float]) -> None:
        """`draw` is that of `delays`."""
        self._draw = draw
        self._begin()

    def after(self, lived_s: float) -> float:
        """Seconds to wait after a connection, or an attempt at one, that lived for so many seconds."""
        if lived_s > STABLE_SECONDS:
            self._begin()
        return next(self._delays)

    def _begin(self) -> None:
        self._delays = delays(self._draw, first=FIRST_SECONDS, longest=LONGEST_SECONDS)
