"""What the tasks of the agent know of each other."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from agent.messages import Record

MOST_UNCERTAIN = 65_536  # ids remembered, for the count of resent records only


@dataclass(slots=True, kw_only=True)
class Board:
    """What the uplinks know of each other: who is down, and which records are in flight somewhere.

    `news` names the endpoints for which there may be more to read in the ledger than when they last looked.
    `uncertain` records were in flight on a connection that was lost: they may have arrived without our knowing.
    `takers` are the connected endpoints' own: each says whether it takes a record that was just stored.
    `reachable` says whether an endpoint may be connected to from where the vehicle is now.
    """

    down: set[str] = field(default_factory=set)
    claimed: set[str] = field(default_factory=set)
    stored: dict[str, asyncio.Event] = field(default_factory=dict)
    news: set[str] = field(default_factory=set)
    takers: dict[str, Callable[[Record], bool]] = field(default_factory=dict)
    uncertain: dict[str, None] = field(default_factory=dict)
    reachable: Callable[[str], bool] = lambda _endpoint: True

    def doubt(self, records: Iterable[str]) -> None:
        """These records were in flight when their connection was lost."""
        self.uncertain.update(dict.fromkeys(records))
        while len(self.uncertain) > MOST_UNCERTAIN:
            del self.uncertain[next(iter(self.uncertain))]

    def is_resent(self, record: str) -> bool:
        """Whether a record that is sent now may have arrived before."""
        return self.uncertain.pop(record, record) is None

    def offer(self, record: Record) -> None:
        """A record is durable: its first endpoint takes it as it is, or its endpoints are told to read it.

        While the first is down they vie for it in the ledger: the others for its sake, the first to come back by it.
        """
        first = next(iter(record.route), "")
        if first not in self.down and first in self.takers and self.takers[first](record):
            self.stored[first].set()
        else:
            self.wake(record.route)

    def wake(self, endpoints: Iterable[str]) -> None:
        """Tell the uplinks of these endpoints that there may be something to send."""
        for endpoint in endpoints:
            if endpoint in self.stored:
                self.news.add(endpoint)
                self.stored[endpoint].set()
