"""Ending the agent: the first signal drains within its limit, the second ends it at once."""

import asyncio
import contextlib
import signal
import socket
import time

import pytest
from fake_broker import fake_broker
from harness import SHENZHEN, car

DRAIN_SECONDS = 3.0


@contextlib.asynccontextmanager
async def car_with(folder, port):
    """A car whose mainland endpoint listens on a port of the test's own."""
    async with car(folder) as it:
        agent, policy = it.config, it.folder / "policy.toml"
        agent.write_text(agent.read_text().replace("[limits]\n", f"[limits]\ndrain_s = {DRAIN_SECONDS}\n"))
        policy.write_text(policy.read_text().replace(f"port = {it.outer['cn'].port}", f"port = {port}"))
        await it.start()
        await it.at(SHENZHEN)
        yield it


async def ended(it, *signals):
    """Send signals, a moment apart; (exit status, seconds until the end)."""
    process, started = it.process, time.monotonic()
    for number in signals:
        process.send_signal(number)
        await asyncio.sleep(0.2)
    status = await process.wait()
    it.process = None
    return status, time.monotonic() - started


async def test_first_signal_waits_for_pubacks_that_come(tmp_path, patience):
    async with asyncio.timeout(3 * patience), fake_broker() as endpoint, car_with(tmp_path, endpoint.port) as it:
        endpoint.on_publish = lambda session, publish: asyncio.get_running_loop().call_later(
            1.0, session.puback, publish.mid
        )
        it.telemetry(1)
        await endpoint.until(lambda: endpoint.published)
        status, _ = await ended(it, signal.SIGTERM)
        assert status == 0
        counts = it.counts()
        assert (counts["delivered"], counts["pending"], counts["conserved"]) == (1, 0, True)


async def test_first_signal_waits_no_longer_than_its_limit(tmp_path, patience):
    async with asyncio.timeout(3 * patience), fake_broker() as endpoint, car_with(tmp_path, endpoint.port) as it:
        endpoint.on_publish = lambda _session, _publish: None
        it.telemetry(1)
        await endpoint.until(lambda: endpoint.published)
        status, seconds = await ended(it, signal.SIGTERM)
        assert status == 0
        assert DRAIN_SECONDS <= seconds < DRAIN_SECONDS + patience / 4
        counts = it.counts()
        assert (counts["delivered"], counts["pending"], counts["conserved"]) == (0, 1, True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_second_signal_ends_the_agent_at_once(tmp_path, patience, number):
    async with asyncio.timeout(3 * patience), fake_broker() as endpoint, car_with(tmp_path, endpoint.port) as it:
        endpoint.on_publish = lambda _session, _publish: None
        it.telemetry(1)
        await endpoint.until(lambda: endpoint.published)
        status, seconds = await ended(it, number, number)
        assert status == 130
        assert seconds < DRAIN_SECONDS
        assert (it.counts()["pending"], it.counts()["conserved"]) == (1, True)


async def test_endpoint_that_swallows_the_connection_does_not_delay_the_end(tmp_path, patience):
    """A listener whose queue is full answers no SYN: the connect hangs in a thread for ten seconds."""
    with socket.socket() as listener, contextlib.ExitStack() as stack:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(3):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        async with asyncio.timeout(3 * patience), car_with(tmp_path, listener.getsockname()[1]) as it:
            it.telemetry(1)
            await it.until(lambda: it.counts()["pending"] == 1)
            await asyncio.sleep(1.0)  # the uplink has begun to connect
            status, seconds = await ended(it, signal.SIGTERM)
            assert status == 0
            assert seconds < patience / 4
