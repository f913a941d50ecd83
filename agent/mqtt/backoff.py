"""How long to wait before a connection is tried again."""

from __future__ import annotations

from collections.abc import Callable, Iterator

FIRST_SECONDS = 0.5
LONGEST_SECONDS = 60.0


def delays(
    draw: Callable[[], float], *, first: float = FIRST_SECONDS, longest: float = LONGEST_SECONDS
) -> Iterator[float]:
    """Endless delays in seconds: doubling up to `longest`, each shortened by up to half; `draw` gives 0..1.

    The jitter keeps a fleet that lost its broker at one moment from coming back at one moment.
    """
    base = first
    while True:
        yield base * (1 - draw() / 2)
        base = min(base * 2, longest)
