"""How the agent is, told inside the vehicle: one retained message on the in-car broker, with a Last Will.

It has a connection of its own, so that nothing of the intake waits for it. The message is small and of constant shape;
it says nothing of where the vehicle is, not even by the names of the endpoints that are connected, nor who it is.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from agent.errors import AgentError, EndpointError
from agent.mqtt.backoff import Retries
from agent.mqtt.connection import Connection
from agent.mqtt.packets import Outgoing, Session, Will
from agent.status import STATES

log = logging.getLogger(__name__)

SECOND = 10**9
GOODBYE_SECONDS = 1.0  # for which the broker's answer to the last message is waited for
PUBACK_SECONDS = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class BeaconOptions:
    """Where the message goes, and how often; `session` needs no will, the beacon makes it."""

    session: Session
    topic: str
    interval_s: float


class Beacon:
    """Publishes what `update` was last given, for as long as the agent runs."""

    def __init__(self, options: BeaconOptions) -> None:
        self._options = options
        will = Will(topic=options.topic, payload=_encoded({"state": "lost"}))
        self._session = replace(options.session, will=will)
        self._content: Mapping[str, Any] = {}
        self._known = asyncio.Event()

    def update(self, content: Mapping[str, Any]) -> None:
        """Take the content of the status file."""
        self._content = content
        self._known.set()

    async def run_loop(self) -> None:
        """Connect, tell, connect again; returns only by cancelling, which says that the agent has stopped."""
        retries = Retries(random.random)
        await self._known.wait()
        while True:
            started = time.monotonic()
            try:
                await self._serve()
            except (AgentError, TimeoutError) as exc:
                log.warning("beacon.lost", extra={"reason": str(exc) or type(exc).__name__})
            await asyncio.sleep(retries.after(time.monotonic() - started))

    async def _serve(self) -> None:
        connection = Connection(self._session)
        await connection.open()
        try:
            while not connection.closed.done():
                await self._tell(connection, "running", PUBACK_SECONDS)
                await asyncio.wait({connection.closed}, timeout=self._options.interval_s)
            raise EndpointError(connection.closed.result())
        except asyncio.CancelledError:
            with contextlib.suppress(AgentError, TimeoutError):
                await self._tell(connection, "stopped", GOODBYE_SECONDS)
            raise
        finally:
            connection.close()

    async def _tell(self, connection: Connection, state: Literal["running", "stopped"], seconds: float) -> None:
        message = Outgoing(
            topic=self._options.topic,
            payload=summary(self._content, state),
            retain=True,
            content_type="application/json",
        )
        async with asyncio.timeout(seconds):
            puback = await connection.publish(message)
        if not puback.accepted:
            raise EndpointError(f"the broker does not take the status: reason code {puback.code}")


def summary(content: Mapping[str, Any], state: Literal["running", "stopped"]) -> bytes:
    """The status message, JSON, from the content of the status file: numbers and constant words only."""
    counts, endpoints, model = content["counts"], content["endpoints"].values(), content["model"]
    oldest_ns = min(counts["oldest_ns"].values(), default=content["time_ns"])
    return _encoded(
        {
            "state": state,
            "time": content["time_ns"] // SECOND,
            "version": content["version"],
            "policy": content["policy"],
            "configuration": "refused" if content["reload"]["error"] else "ok",
            "counts": {name: counts[name] for name in STATES},
            "conserved": counts["conserved"],
            "queue": {
                "bytes": counts["pending_bytes"] + counts["held_bytes"],
                "oldest_s": max(content["time_ns"] - oldest_ns, 0) // SECOND,
            },
            "disk": "stalled" if content["stalled"] else "ok",
            "model": "unloaded" if model["unloaded"] else "ready" if model["ready"] else model["error"],
            "intake": {name: session["connected"] for name, session in content["sessions"].items()},
            "endpoints": {
                "known": len(endpoints),
                "connected": sum(endpoint["connected"] for endpoint in endpoints),
                "failing": sum(bool(endpoint["error"]) for endpoint in endpoints),
            },
        }
    )


def _encoded(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, separators=(",", ":")).encode()
