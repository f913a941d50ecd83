"""What a session with the in-car broker is subscribed to.

The broker keeps a session's subscriptions as long as the session, also those that the configuration no longer has, and
MQTT has no way to list them. So each is noted in the ledger before it is made, until the broker has confirmed its end.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Sequence

import msgspec

from agent.mqtt.connection import Connection
from agent.store.committer import Committer
from agent.store.entries import Noted

log = logging.getLogger(__name__)


class Subscriptions:
    """Those of one session."""

    def __init__(self, session: str, committer: Committer) -> None:
        self._session = session
        self._note = f"subscribed.{session}"
        self._committer = committer

    async def renew(self, connection: Connection, wanted: Sequence[str], *, resumed: bool) -> None:
        """Subscribe to these filters, and end all others that a resumed session may have.

        In this order: what both an old and a new filter match may come twice, but it is not missed. A broker that
        refuses to end one is asked again on the next connection. Raises EndpointError as `Connection.subscribe`.
        """
        known = self._noted() if resumed else frozenset()
        await self._keep(known.union(wanted))
        await connection.subscribe(wanted)
        surplus = sorted(known.difference(wanted))
        if surplus and await connection.unsubscribe(surplus):
            await self._keep(wanted)
            log.info("intake.unsubscribed", extra={"session": self._session, "filters": len(surplus)})

    def _noted(self) -> frozenset[str]:
        try:
            return frozenset(msgspec.json.decode(self._committer.ledger.meta(self._note) or "[]", type=list[str]))
        except msgspec.MsgspecError:
            return frozenset()

    async def _keep(self, filters: Collection[str]) -> None:
        if self._noted() == frozenset(filters):
            return
        value = msgspec.json.encode(sorted(filters)).decode()
        await self._committer.submit(Noted(name=self._note, value=value, time_ns=time.time_ns()))
