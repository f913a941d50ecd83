"""Memory and clocks under faults, at the uplink and the intake."""

import asyncio
import time

from endpoints import bench, number_of
from fake_broker import fake_broker

from agent.uplink import flights

YEAR_NS = 365 * 86_400 * 10**9


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
    async with asyncio.timeout(patience), fake_broker() as endpoint, bench({"a": endpoint.port}) as it:
        await it.store([1])
        monkeypatch.setattr(time, "time_ns", lambda: true() - 200 * YEAR_NS)
        it.start()
        await endpoint.until(lambda: endpoint.published)
        assert endpoint.published[0].properties[0x02] == 0xFFFF_FFFF


async def test_memory_in_flight_is_bounded_in_bytes(patience, monkeypatch):
    monkeypatch.setattr("agent.uplink.uplink.IN_FLIGHT_BYTES", 200_000)
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
