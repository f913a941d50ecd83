"""`residency-agent doctor`: tries everything that the agent needs, and says what to do about each failure.

Nothing is published and nothing is subscribed to; the endpoints see a connection that says CONNECT and DISCONNECT.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path

from agent import wiring
from agent.assembly import Setup
from agent.clock import is_set
from agent.errors import AgentError
from agent.mqtt.connection import Connection
from agent.mqtt.packets import Session
from agent.redaction.worker import RedactionWorker
from agent.uplink.egress import peer_check, resolve, tls_context

GRAY_PICTURE = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108000000003a7e9b550"
    "000000a49444154789c636800000082008177cd72b60000000049454e44ae426082"
)
"""The smallest PNG: one gray pixel."""

SLOW_SECONDS = 1.0  # a picture that takes longer holds the pictures' session back


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was tried. `advice` is empty where it is as it should be."""

    name: str
    detail: str
    advice: str = ""

    def __str__(self) -> str:
        if not self.advice:
            return f"ok    {self.name}: {self.detail}"
        return f"FAIL  {self.name}: {self.detail}\n      {self.advice}"


async def examine(setup: Setup) -> AsyncIterator[Finding]:
    """Everything in turn; a failure does not stop the rest. Cancelling is safe."""
    yield _clock()
    yield await asyncio.to_thread(_disk, setup)
    for options in wiring.intakes(setup)[:1]:
        session = replace(options.session, client_id=f"{options.session.client_id}-doctor", clean_start=True)
        advice = "is it running, and does [broker] name its host, port, user and password?"
        yield await _tried("in-car broker", advice, lambda: _connect(session))  # noqa: B023 - awaited at once
    for name in setup.policy.endpoints:
        advice = "look at host, port, networks, spki_sha256 and ca_file in the policy, and at [credentials] here"
        yield await _tried(f"endpoint {name}", advice, lambda: _endpoint(setup, name))  # noqa: B023 - awaited at once
    yield await _model(setup)


async def _tried(name: str, advice: str, attempt: Callable[[], Awaitable[str]]) -> Finding:
    try:
        return Finding(name=name, detail=await attempt())
    except AgentError as exc:
        return Finding(name=name, detail=str(exc), advice=advice)


def _clock() -> Finding:
    now_ns = time.time_ns()
    detail = time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime(now_ns // 10**9))
    if is_set(now_ns):
        return Finding(name="clock", detail=detail)
    return Finding(name="clock", detail=detail, advice="the clock was never set: records do not expire until it is")


def _disk(setup: Setup) -> Finding:
    """Whether the ledger's folder can be written durably, has room, and is not readable by others."""
    folder, wanted = Path(setup.config.paths.state), setup.config.limits.ledger_bytes
    try:
        folder.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(4096))
            file.flush()
            os.fsync(file.fileno())
        sync_ms = (time.monotonic() - started) * 1000
        free, mode = shutil.disk_usage(folder).free, folder.stat().st_mode
    except OSError as exc:
        advice = "the agent's user must own this folder (StateDirectory= of the unit does that)"
        return Finding(name="disk", detail=str(exc), advice=advice)
    detail = f"{folder}: {free >> 20} MiB free, fsync {sync_ms:.0f} ms"
    if free < wanted:
        advice = f"limits.ledger_bytes promises {wanted >> 20} MiB: free some, or lower it"
        return Finding(name="disk", detail=detail, advice=advice)
    if mode & 0o007:
        return Finding(name="disk", detail=f"{folder} is open to every user", advice=f"chmod o-rwx {folder}")
    return Finding(name="disk", detail=detail)


async def _connect(session: Session) -> str:
    connection = Connection(session)
    try:
        await connection.open()
    finally:
        connection.close()
    return f"{session.host}:{session.port} speaks MQTT {session.protocol}"


async def _endpoint(setup: Setup, name: str) -> str:
    options = wiring.uplink(setup, name)
    address = (await resolve(options.peer))[0]
    session = replace(
        options.session,
        host=address,
        client_id=f"{options.session.client_id}-doctor",
        tls=await asyncio.to_thread(tls_context, options.peer),
    )
    connection = Connection(session, check_peer=peer_check(options.peer))
    try:
        await connection.open()
    finally:
        connection.close()
    return f"{options.peer.host} at {address}:{session.port}, {'TLS verified' if options.peer.tls else 'no TLS'}"


async def _model(setup: Setup) -> Finding:
    """Whether the detector opens in its sandbox and answers."""
    options = wiring.worker_options(setup)
    async with RedactionWorker(options) as worker:
        if worker.error:
            advice = "without a verified model every picture is refused: reinstall it, or correct model.manifest"
            return Finding(name="model", detail=worker.detail or worker.error, advice=advice)
        started = time.monotonic()
        try:
            await worker.redact(GRAY_PICTURE)
        except AgentError as exc:
            return Finding(name="model", detail=str(exc), advice="raise model.memory_bytes or model.timeout_s")
        seconds = time.monotonic() - started
    detail = f"{worker.digest[:12]}, answers in {seconds * 1000:.0f} ms"
    if seconds > SLOW_SECONDS:
        return Finding(name="model", detail=detail, advice="the machine is busy or model.threads is too low")
    return Finding(name="model", detail=detail)
