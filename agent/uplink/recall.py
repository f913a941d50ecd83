"""What becomes of a record that was about to be sent, and must not go, or cannot.

It is written down beside the sending: a disk that takes nothing holds up neither the records that may go nor the watch
over the connection.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from agent.messages import Record
from agent.store.entries import Entry, Withdrawn
from agent.uplink.settling import Settling


class Recall:
    """One endpoint's. `again` says what becomes of a record that the policy no longer lets go here; None: withdrawn."""

    def __init__(self, settling: Settling, again: Callable[[Record], Entry | None]) -> None:
        self._settling = settling
        self._again = again

    def decide_again(self, record: Record) -> None:
        """The policy does not permit it here any more."""
        self._settling.add(record, self._again(record) or _withdrawn(record, "policy.withdrawn"))

    def withdraw(self, record: Record, reason: str) -> None:
        """It is not sent at all, on record."""
        self._settling.add(record, _withdrawn(record, reason))


def _withdrawn(record: Record, reason: str) -> Withdrawn:
    return Withdrawn(id=record.id, reason=reason, time_ns=time.time_ns())
