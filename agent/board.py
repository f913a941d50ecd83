"""What the tasks of the agent know of each other."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field


@dataclass(slots=True, kw_only=True)
class Board:
    """What the uplinks know of each other: who is down, and which records are in flight somewhere.

    `reachable` says whether an endpoint may be connected to from where the vehicle is now.
    """

    down: set[str] = field(default_factory=set)
    claimed: set[str] = field(default_factory=set)
    stored: dict[str, asyncio.Event] = field(default_factory=dict)
    reachable: Callable[[str], bool] = lambda _endpoint: True

    def wake(self, endpoints: Iterable[str]) -> None:
        """Tell the uplinks of these endpoints that there may be something to send."""
        for endpoint in endpoints:
            if endpoint in self.stored:
                self.stored[endpoint].set()
