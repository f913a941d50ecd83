"""Who says birth, status and death of the vehicle on one connection; what they say is decided in `wire.presence`.

Only an endpoint that asked for it hears any of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from agent import __version__
from agent.errors import EndpointError
from agent.mqtt.connection import Connection
from agent.mqtt.packets import Outgoing, Puback, Will
from agent.store.entries import Counts
from agent.wire import presence
from agent.wire.presence import Announcement, Session

STATUS_SECONDS = 60.0
GOODBYE_SECONDS = 2.0  # for the PUBACK of the death
STATES = ("received", "delivered", "pending", "held", "refused", "expired", "evicted")


@dataclass(frozen=True, slots=True, kw_only=True)
class PresenceOptions:
    """Who the vehicle is to an endpoint that asked for its presence; `keyid` names the key that signs records."""

    source: str
    vehicle: str
    keyid: str | None = None


class Presence:
    """The presence of one connection, from its Last Will on; with `options` None it says nothing."""

    def __init__(self, options: PresenceOptions | None, policy_version: str, counts: Callable[[], Counts]) -> None:
        self._policy_version = policy_version
        self._counts = counts
        self._session: Session | None = None
        self._keyid: str | None = None
        if options is not None:
            self._session = Session(id=secrets.token_hex(16), source=options.source, vehicle=options.vehicle)
            self._keyid = options.keyid
        self._number = 0
        self._due = 0.0

    def will(self, now_ns: int) -> Will | None:
        """The Last Will: the death that the endpoint's broker publishes when we are lost."""
        if self._session is None:
            return None
        death = presence.death(self._session, now_ns, "lost")
        return Will(topic=death.topic, payload=death.payload)

    def born(self, connection: Connection, now_ns: int) -> asyncio.Future[Puback] | None:
        """Say that we are connected; the PUBACK, None where nothing is said."""
        if self._session is None:
            return None
        birth = presence.birth(
            self._session, now_ns, version=__version__, policy_version=self._policy_version, keyid=self._keyid
        )
        return _say(connection, birth)

    def tell(self, connection: Connection, now_ns: int, monotonic_s: float) -> asyncio.Future[Puback] | None:
        """Say the counts where they are due, once in STATUS_SECONDS; the PUBACK, None where nothing is said."""
        if self._session is None or monotonic_s < self._due:
            return None
        self._due = monotonic_s + STATUS_SECONDS
        self._number += 1
        counts = self._counts()
        totals = {state: getattr(counts, state) for state in STATES}
        return _say(connection, presence.status(self._session, now_ns, self._number, totals))

    async def dead(self, connection: Connection, now_ns: int, reason: Literal["stopped"] = "stopped") -> bool:
        """Say that we go in good order; the DISCONNECT that should follow takes the Last Will back.

        Returns once the broker has answered, GOODBYE_SECONDS later at most. A broker that still has PUBACKs to write
        when the connection closes may fail at that before it reads the DISCONNECT, and publish the Last Will as well.
        False: the broker's Receive Maximum left no room to say it, so the Last Will should speak.
        """
        if self._session is None:
            return True
        said = False
        with contextlib.suppress(EndpointError, TimeoutError):
            async with asyncio.timeout(GOODBYE_SECONDS):
                await connection.slot()
                puback = _say(connection, presence.death(self._session, now_ns, reason))
                said = True
                await puback
        return said


def _say(connection: Connection, message: Announcement) -> asyncio.Future[Puback]:
    outgoing = Outgoing(
        topic=message.topic, payload=message.payload, retain=message.retain, content_type=message.content_type
    )
    puback = connection.publish(outgoing)
    puback.add_done_callback(lambda future: future.cancelled() or future.exception())
    return puback
