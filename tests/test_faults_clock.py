"""Memory and clocks under faults, at the uplink and the intake."""

import asyncio
import time

import pytest
from endpoints import bench, number_of, record
from fake_broker import fake_broker
from msgspec.structs import replace

from agent import boot
from agent.messages import Capture
from agent.store.entries import Store
from agent.uplink import flights

SECOND = 10**9
YEAR_NS = 365 * 86_400 * 10**9


def expiries(endpoint):
    """Message Expiry by the number of the record."""
    return {number_of(publish.payload): publish.properties[0x02] for publish in endpoint.published}


async def test_clock_that_jumps_by_years_stops_no_delivery(patience, monkeypatch):
    true = time.time_ns
    async with asyncio.timeout(patience), fake_broker() as endpoint, bench({"a": endpoint.port}) as it:
        it.start()
        for number, years in enumerate((0, 5, -30, 0)):
            monkeypatch.setattr(time, "time_ns", lambda years=years: true() + years * YEAR_NS)
            await it.store([number])
            await it.until(lambda number=number: it.counts.delivered == number + 1)
        assert [number_of(payload) for payload in endpoint.payloads] == [0, 1, 2, 3]


async def test_expiry_on_the_wire_stays_a_valid_number_after_a_jump_back(patience, monkeypatch):
    true = time.time_ns
    monkeypatch.setattr(boot, "boot_ns", lambda: 60 * SECOND)
    async with asyncio.timeout(patience), fake_broker() as endpoint, bench({"a": endpoint.port}) as it:
        await it.store([1])
        await it.store([2], ttl_ns=200 * YEAR_NS)
        monkeypatch.setattr(time, "time_ns", lambda: true() - 50 * YEAR_NS)
        it.start()
        await it.until(lambda: it.counts.delivered == 2)
        assert expiries(endpoint) == {1: 3540, 2: 0xFFFF_FFFF}


@pytest.mark.parametrize("years", [-56, -1, 0, 3])
async def test_expiry_of_a_record_of_this_boot_is_what_is_left_whatever_the_wall_clock_says(
    patience, monkeypatch, years
):
    true = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: true() + years * YEAR_NS)
    arrived = {"monotonic_ns": boot.boot_ns() - 60 * SECOND, "doubt_ns": 20 * SECOND, "boot_id": boot.boot_id()}
    capture = Capture(time_ns=time.time_ns() - 40 * SECOND, **arrived)
    made = replace(record(1), capture=capture, recorded_ns=capture.time_ns, expires_ns=capture.time_ns + 3600 * SECOND)
    async with asyncio.timeout(patience), fake_broker() as endpoint, bench({"a": endpoint.port}) as it:
        await it.committer.submit(Store(record=made))
        monkeypatch.setattr(time, "time_ns", true)
        it.start()
        await it.until(lambda: it.counts.delivered == 1)
        assert 3500 < expiries(endpoint)[1] <= (3560 if years <= 0 else 3600)


async def test_record_of_an_earlier_boot_is_as_old_as_this_boot_while_the_clock_is_not_set(patience, monkeypatch):
    true = time.time_ns
    monkeypatch.setattr(boot, "boot_ns", lambda: 60 * SECOND)
    async with asyncio.timeout(patience), fake_broker() as endpoint, bench({"a": endpoint.port}) as it:
        await it.store([1])
        monkeypatch.setattr(time, "time_ns", lambda: true() % YEAR_NS)
        await it.store([2])
        it.start()
        await it.until(lambda: it.counts.delivered == 2)
        assert expiries(endpoint) == {1: 3540, 2: 3540}


@pytest.mark.parametrize("set_at", ["neither end", "its making", "its delivery"])
async def test_wait_of_a_record_is_known_by_its_boot_where_the_clock_is_not_set_and_else_left_out(
    patience, monkeypatch, set_at
):
    true = time.time_ns
    made_ns = true() if set_at == "its making" else YEAR_NS
    here = Capture(time_ns=made_ns, monotonic_ns=boot.boot_ns() - 60 * SECOND, boot_id=boot.boot_id())
    async with asyncio.timeout(patience), fake_broker() as endpoint, bench({"a": endpoint.port}) as it:
        if set_at != "its delivery":
            monkeypatch.setattr(time, "time_ns", lambda: true() % YEAR_NS)
        for number, capture in enumerate((here, replace(here, monotonic_ns=1, boot_id="earlier"))):
            made = replace(record(number), capture=capture, recorded_ns=made_ns, expires_ns=made_ns + 3600 * SECOND)
            await it.committer.submit(Store(record=made))
        it.start()
        await it.until(lambda: it.counts.delivered == 2)
        found = it.uplinks["a"].delivered.as_dict()
    assert found["buckets"]["+Inf"] == 1
    assert 60 <= found["sum"] <= 60 + patience


async def test_memory_in_flight_is_bounded_in_bytes(patience, monkeypatch):
    monkeypatch.setattr("agent.uplink.window.IN_FLIGHT_BYTES", 200_000)
    most = []
    add = flights.Flights.add

    def noted(self, *arguments):
        add(self, *arguments)
        most.append(self.bytes)

    monkeypatch.setattr(flights.Flights, "add", noted)
    async with asyncio.timeout(patience), fake_broker() as endpoint, bench({"a": endpoint.port}) as it:
        endpoint.on_publish = lambda _session, _publish: None
        await it.store(range(40), size=50_000)
        it.start()
        await endpoint.until(lambda: len(endpoint.published) >= 4)
        await asyncio.sleep(0.3)
        assert max(most) < 260_000
        assert len(it.board.claimed) < 40, "the rest waits on the disk"
