import asyncio
import random
import time
from collections import Counter
from contextlib import contextmanager

import msgspec
import pytest
from endpoints import HOUR_NS, bench, number_of, numbers_of, policy_of
from fake_broker import CONNACK, fake_broker, packet, silent
from hypothesis import given
from hypothesis import strategies as st
from test_uplink_presence import ASKED

from agent.errors import LedgerStalledError
from agent.messages import Priority
from agent.mqtt import connection as mqtt
from agent.store.entries import Ending, Redecided
from agent.uplink import group, reach, settling, supply
from agent.uplink.patience import LONGEST_PAUSE_SECONDS, Patience
from agent.uplink.shares import SHARE, Shares

pytestmark = pytest.mark.usefixtures("quick_uplinks")


@pytest.fixture
async def other():
    async with fake_broker() as broker:
        yield broker


def numbers(broker):
    return [number_of(payload) for payload in broker.payloads]


async def test_record_leaves_the_ledger_only_after_the_puback(endpoint, patience):
    endpoint.on_publish = silent
    async with asyncio.timeout(patience), bench({"a": endpoint.port}) as it:
        await it.store([1])
        it.start()
        await endpoint.until(lambda: endpoint.published)
        assert (it.counts.pending, it.counts.delivered) == (1, 0)
        endpoint.session.puback(endpoint.published[0].mid)
        await it.until(lambda: it.counts.delivered == 1)


async def test_record_that_is_stored_while_no_other_waits_is_not_read_from_the_disk(endpoint, patience, monkeypatch):
    monkeypatch.setattr(supply, "LOOK_SECONDS", 3600.0)
    async with asyncio.timeout(patience), bench({"a": endpoint.port}) as it:
        await it.store([0])
        it.start()
        await it.until(lambda: it.counts.delivered == 1)
        reads, pending = [], it.committer.ledger.pending
        monkeypatch.setattr(
            it.committer.ledger, "pending", lambda *args, **which: reads.append(args) or pending(*args, **which)
        )
        for number in range(1, 20):
            await it.store([number], size=40 if number % 5 else 300_000)
        await it.until(lambda: it.counts.delivered == 20 and not it.board.claimed)
        assert (numbers(endpoint), reads) == ([*range(20)], [])


@pytest.mark.parametrize("seed", range(3))
async def test_records_go_in_the_order_of_their_arrival_whether_taken_or_read(endpoint, patience, seed):
    rng = random.Random(seed)

    def slowly(session, publish):
        asyncio.get_running_loop().call_later(rng.choice((0, 0, 0.002, 0.03)), session.puback, publish.mid)

    endpoint.on_publish = slowly
    async with asyncio.timeout(patience), bench({"a": endpoint.port}, in_flight=4) as it:
        it.start()
        await it.store([0])
        await it.until(lambda: endpoint.published)  # what is stored before the connection is backlog, which has a share
        number = 1
        while number < 300:
            burst = range(number, number + rng.choice((1, 1, 2, 3, 12, 40)))
            await it.store(burst, size=rng.choice((40, 40, 40, 20_000, 200_000)))
            number = burst.stop
            await asyncio.sleep(rng.choice((0, 0, 0.01, 0.05)))
        await it.until(lambda: it.counts.delivered == number and not it.board.claimed)
        assert numbers(endpoint) == [*range(number)]


async def test_record_whose_delivery_is_not_durable_yet_is_sent_once_and_written_down_with_the_next_store(
    endpoint, patience
):
    endpoint.on_publish = lambda session, publish: session.puback(publish.mid)
    async with asyncio.timeout(patience), bench({"a": endpoint.port}, company_s=3600) as it:
        await it.store([1])
        it.start()
        await it.until(lambda: endpoint.published and not it.uplinks["a"].in_flight)
        it.board.wake(["a"])
        await asyncio.sleep(0.1)
        assert (numbers(endpoint), it.board.claimed, it.counts.pending) == ([1], {"id-1"}, 1)
        await it.store([2])
        await it.until(lambda: it.counts.delivered == 1)
        await it.until(lambda: len(endpoint.published) == 2 and not it.uplinks["a"].in_flight)
        assert (numbers(endpoint), it.board.claimed) == ([1, 2], {"id-2"})


async def test_delivery_is_durable_once_the_connection_is_lost_or_the_uplink_has_ended(endpoint, patience):
    endpoint.on_publish = lambda session, publish: session.puback(publish.mid)
    async with asyncio.timeout(patience), bench({"a": endpoint.port}, company_s=3600) as it:
        await it.store([1])
        it.start()
        await it.until(lambda: endpoint.published and not it.uplinks["a"].in_flight)
        endpoint.session.abort()
        await it.until(lambda: it.counts.delivered == 1)
        await it.store([2])
        await it.until(lambda: len(endpoint.published) == 2 and not it.uplinks["a"].in_flight)
        await it.uplinks["a"].drain()
        await it.stop()
        assert (it.counts.delivered, it.board.claimed) == (2, set())


async def test_records_in_flight_when_the_connection_breaks_are_sent_again_on_the_next(endpoint, patience):
    endpoint.on_publish = silent
    async with asyncio.timeout(patience), bench({"a": endpoint.port}) as it:
        await it.store(range(5))
        it.start()
        await endpoint.until(lambda: len(endpoint.published) == 5)
        endpoint.on_publish = lambda session, publish: session.puback(publish.mid)
        endpoint.session.abort()
        await it.until(lambda: it.counts.delivered == 5)
        assert sorted(numbers(endpoint)) == sorted([*range(5), *range(5)])
        assert it.uplinks["a"].resent == 5
        await it.until(lambda: it.board.claimed == set())


async def test_only_records_without_puback_are_sent_twice(endpoint, patience):
    endpoint.on_publish = lambda session, publish: publish.mid <= 3 and session.puback(publish.mid)
    async with asyncio.timeout(patience), bench({"a": endpoint.port}) as it:
        await it.store(range(6))
        it.start()
        await it.until(lambda: it.counts.delivered == 3)
        endpoint.on_publish = lambda session, publish: session.puback(publish.mid)
        endpoint.session.abort()
        await it.until(lambda: it.counts.delivered == 6)
        assert sorted(numbers(endpoint)) == [0, 1, 2, 3, 3, 4, 4, 5, 5]
        assert it.uplinks["a"].resent == 3


async def test_connected_but_nothing_acknowledged_is_noticed_and_the_next_endpoint_takes_over(
    endpoint, other, patience
):
    endpoint.on_publish = silent
    ports = {"a": endpoint.port, "b": other.port}
    async with asyncio.timeout(patience), bench(ports, ack_timeout_s=0.5) as it:
        await it.store(range(20), route=("a", "b"))
        it.start()
        await it.until(lambda: it.counts.delivered == 20)
        assert sorted(numbers(other)) == list(range(20))
        assert "no PUBACK" in it.uplinks["a"].last_error or it.uplinks["a"].connected
        assert "a" in it.board.down, "a CONNACK proves nothing: only a PUBACK makes the endpoint good again"


async def test_endpoint_that_acknowledges_again_gets_its_records_back(endpoint, other, patience):
    endpoint.on_publish = silent
    ports = {"a": endpoint.port, "b": other.port}
    async with asyncio.timeout(patience), bench(ports, ack_timeout_s=0.4) as it:
        await it.store(range(5), route=("a", "b"))
        it.start()
        await it.until(lambda: it.counts.delivered == 5)
        endpoint.on_publish = lambda session, publish: session.puback(publish.mid)
        number = 5
        while "a" in it.board.down:
            await it.store([number], route=("a", "b"))
            number += 1
            await asyncio.sleep(0.05)
        await it.until(lambda: it.counts.pending == 0)
        before = len(other.published)
        await it.store(range(1000, 1010), route=("a", "b"))
        await it.until(lambda: it.counts.pending == 0)
        assert set(range(1000, 1010)) <= set(numbers(endpoint))
        assert len(other.published) == before


async def test_no_record_is_in_flight_at_two_endpoints(endpoint, other, patience):
    open_at = {}
    overlaps = []

    def answering(name, answer):
        def on_publish(session, publish):
            number = number_of(publish.payload)
            if open_at.get(number, (name, None))[0] != name and not open_at[number][1].ended.is_set():
                overlaps.append(number)
            open_at[number] = (name, session)
            if answer(number):
                open_at.pop(number)
                session.puback(publish.mid)

        return on_publish

    endpoint.on_publish = answering("a", lambda number: number % 7 != 0)
    other.on_publish = answering("b", lambda _: True)
    ports = {"a": endpoint.port, "b": other.port}
    async with asyncio.timeout(patience), bench(ports, ack_timeout_s=0.3, in_flight=8) as it:
        await it.store(range(60), route=("a", "b"))
        it.start()
        await it.until(lambda: it.counts.delivered == 60)
    assert overlaps == []


async def test_one_lost_puback_among_others_is_noticed(endpoint, patience):
    lost = []

    def on_publish(session, publish):
        if number_of(publish.payload) == 3 and not lost:
            lost.append(publish)
        else:
            session.puback(publish.mid)

    endpoint.on_publish = on_publish
    async with asyncio.timeout(patience), bench({"a": endpoint.port}, ack_timeout_s=0.5) as it:
        it.start()
        number = 0
        while it.counts.delivered < 4 or 3 not in numbers(endpoint)[4:]:
            await it.store([number])
            number += 1
            await asyncio.sleep(0.02)
        await it.until(lambda: it.counts.pending == 0)
        assert numbers(endpoint).count(3) == 2
        assert endpoint.connections == 2


async def test_receive_maximum_of_the_endpoint_is_never_exceeded(endpoint, patience):
    endpoint.connack_properties = {"receive_maximum": 3}
    open_mids, most = set(), []

    def on_publish(session, publish):
        open_mids.add(publish.mid)
        most.append(len(open_mids))

        def answer():
            open_mids.discard(publish.mid)
            session.puback(publish.mid)

        asyncio.get_running_loop().call_later(0.01, answer)

    endpoint.on_publish = on_publish
    async with asyncio.timeout(patience), bench({"a": endpoint.port}) as it:
        await it.store(range(30))
        it.start()
        await it.until(lambda: it.counts.delivered == 30)
    assert max(most) == 3


async def test_packet_limit_of_the_endpoint_is_kept_to_the_byte(endpoint, patience):
    async with asyncio.timeout(patience), bench({"a": endpoint.port}) as it:
        await it.store([1], size=500)
        it.start()
        await it.until(lambda: it.counts.delivered == 1)
        size = endpoint.published[0].size
        await it.stop()
        endpoint.connack_properties = {"maximum_packet": size}
        await it.store([2], size=500)
        await it.store([3], size=501)
        it.start()
        await it.until(lambda: it.counts.pending == 0)
        assert numbers(endpoint) == [1, 2]
        assert it.counts.refused == 1
        assert it.counts.conserved


async def test_tiny_packet_limit_refuses_on_record_and_never_reconnects_for_it(endpoint, patience):
    endpoint.connack_properties = {"maximum_packet": 100}
    async with asyncio.timeout(patience), bench({"a": endpoint.port}) as it:
        await it.store(range(10))
        it.start()
        await it.until(lambda: it.counts.refused == 10)
        assert endpoint.published == []
        assert endpoint.connections == 1


@pytest.mark.parametrize("code", [0x90, 0x99])
async def test_record_that_the_endpoint_refuses_for_good_is_not_sent_again(endpoint, patience, code):
    endpoint.on_publish = lambda session, publish: session.puback(publish.mid, code)
    async with asyncio.timeout(patience), bench({"a": endpoint.port}) as it:
        await it.store(range(5))
        it.start()
        await it.until(lambda: it.counts.refused == 5)
        assert len(endpoint.published) == 5
        assert it.counts.conserved


async def test_record_that_is_too_large_for_one_endpoint_goes_to_the_next_that_is_permitted(endpoint, other, patience):
    endpoint.connack_properties = {"maximum_packet": 1000}
    async with asyncio.timeout(patience), bench({"a": endpoint.port, "b": other.port}) as it:
        await it.store([1], size=2000, route=("a", "b"))
        await it.store([2], route=("a", "b"))
        it.start()
        await it.until(lambda: it.counts.delivered == 2)
        assert (numbers(endpoint), numbers(other)) == ([2], [1])


@pytest.mark.parametrize("code", [0x90, 0x99])
async def test_record_that_every_endpoint_of_its_route_refuses_for_good_is_asked_for_once_each(
    endpoint, other, patience, code
):
    for one in (endpoint, other):
        one.on_publish = lambda session, publish: session.puback(publish.mid, code)
    async with asyncio.timeout(patience), bench({"a": endpoint.port, "b": other.port}) as it:
        await it.store(range(3), route=("a", "b"))
        it.start()
        await it.until(lambda: it.counts.refused == 3)
        assert (sorted(numbers(endpoint)), sorted(numbers(other))) == ([0, 1, 2], [0, 1, 2])
        assert it.counts.conserved


@pytest.mark.parametrize("code", [0x80, 0x83, 0x87, 0x91, 0x97])
async def test_record_that_the_endpoint_does_not_take_now_is_kept_and_delivered_later(endpoint, patience, code):
    answers = [code, code]
    endpoint.on_publish = lambda session, publish: session.puback(publish.mid, answers.pop() if answers else 0)
    async with asyncio.timeout(patience), bench({"a": endpoint.port}) as it:
        await it.store(range(5))
        it.start()
        await it.until(lambda: it.counts.delivered == 5)
        assert len(endpoint.published) == 7
        assert endpoint.connections == 1


async def test_endpoint_over_its_quota_is_asked_ever_more_rarely(endpoint, patience):
    endpoint.on_publish = lambda session, publish: session.puback(publish.mid, 0x97)
    async with asyncio.timeout(patience), bench({"a": endpoint.port}) as it:
        await it.store(range(500))
        it.start()
        await asyncio.sleep(2.0)
        first_window, asked = 128, len(endpoint.published)
        assert asked <= first_window + 8, "a pause that starts at 0.1 s and doubles fits five times into two seconds"
        assert it.counts.pending == 500


async def test_one_record_that_is_never_taken_does_not_hold_up_the_others(endpoint, patience):
    endpoint.on_publish = lambda session, publish: session.puback(
        publish.mid, 0x83 if number_of(publish.payload) == 0 else 0
    )
    async with asyncio.timeout(patience), bench({"a": endpoint.port}, in_flight=1) as it:
        await it.store(range(20))
        it.start()
        await it.until(lambda: it.counts.delivered == 19)
        assert it.counts.pending == 1


async def test_record_on_which_the_endpoint_hangs_up_lets_the_others_pass(endpoint, patience):
    def on_publish(session, publish):
        if number_of(publish.payload) == 0:
            session.abort()
        else:
            session.puback(publish.mid)

    endpoint.on_publish = on_publish
    async with asyncio.timeout(patience), bench({"a": endpoint.port}) as it:
        await it.store(range(20))
        it.start()
        await it.until(lambda: it.counts.delivered == 19)
        assert it.counts.pending == 1


async def test_record_that_makes_no_mqtt_topic_is_refused_on_record(endpoint, patience):
    async with asyncio.timeout(patience), bench({"a": endpoint.port}) as it:
        it.options["topic"] = "/".join(["{topic}"] * 9)
        await it.store([1], subject="vehicle/" + "x" * 8000)
        await it.store([2])
        it.start()
        await it.until(lambda: it.counts.pending == 0)
        assert (it.counts.refused, it.counts.delivered) == (1, 1)


async def test_large_record_on_a_slow_link_is_sent_once(patience):
    async with asyncio.timeout(2 * patience), fake_broker(receive_buffer=16384) as endpoint:
        endpoint.bytes_per_s = 400_000
        async with bench({"a": endpoint.port}, ack_timeout_s=1.0, keepalive_s=1) as it:
            await it.store([1], size=1_600_000)
            it.start()
            started = time.monotonic()
            await it.until(lambda: it.counts.delivered == 1)
            assert time.monotonic() - started > 3.0, "slower than acknowledgement and keep alive allow"
            assert numbers(endpoint) == [1]
            assert endpoint.connections == 1


async def test_endpoint_that_stops_reading_is_given_up_although_tcp_is_alive(patience):
    async with (
        asyncio.timeout(patience),
        fake_broker(receive_buffer=16384) as endpoint,
        bench({"a": endpoint.port}, ack_timeout_s=0.5) as it,
    ):
        endpoint.on_publish = lambda _session, _publish: endpoint.reading.clear()
        await it.store(range(30), size=50_000)
        it.start()
        await endpoint.until(lambda: endpoint.connections >= 2)
        assert "no PUBACK" in it.uplinks["a"].last_error
        assert it.counts.pending == 30


async def test_urgent_record_overtakes_a_backlog_on_a_slow_link(patience):
    async with asyncio.timeout(2 * patience), fake_broker(receive_buffer=16384) as endpoint:
        endpoint.bytes_per_s = 1_000_000
        async with bench({"a": endpoint.port}) as it:
            await it.store(range(200), size=20_000, priority=Priority.BULK)
            it.start()
            await endpoint.until(lambda: len(endpoint.published) > 5)
            before = len(endpoint.published)
            await it.store([999], priority=Priority.URGENT)
            await endpoint.until(lambda: 999 in numbers(endpoint))
            waited = numbers(endpoint).index(999) - before
            assert waited * 20_000 < 700_000, "the batch that was ready, and what the sockets hold"


async def test_puback_alone_is_no_reason_to_read_the_ledger_again(endpoint, patience, monkeypatch):
    async with asyncio.timeout(patience), bench({"a": endpoint.port}) as it:
        it.start()
        await it.store([0])
        await endpoint.until(lambda: numbers(endpoint) == [0])
        reads, pending = Counter(), it.committer.ledger.pending
        monkeypatch.setattr(
            it.committer.ledger, "pending", lambda *args, **which: reads.update("x") or pending(*args, **which)
        )
        for number in range(1, 51):
            await it.store([number])
            await endpoint.until(lambda number=number: len(endpoint.published) > number)
        await it.until(lambda: it.counts.delivered == 51)
        assert numbers(endpoint) == list(range(51))
    assert reads.total() < 50 * 3 * 1.5, "urgent, live, backlog: once for each record"


@pytest.mark.parametrize("in_flight", [1, 7, 8])
async def test_backlog_drains_while_live_records_keep_coming(endpoint, patience, in_flight):
    backlog = range(60)
    async with asyncio.timeout(2 * patience), bench({"a": endpoint.port}, in_flight=in_flight) as it:
        await it.store(backlog)
        it.start()
        live = 1000
        while not set(backlog) <= set(numbers(endpoint)):
            await it.store(range(live, live + 10))
            live += 10
        assert len(endpoint.published) < len(backlog) * SHARE * 1.5


async def test_live_records_go_before_the_backlog(endpoint, patience):
    gate = []
    endpoint.on_publish = lambda session, publish: gate.append((session, publish.mid))
    async with asyncio.timeout(patience), bench({"a": endpoint.port}, in_flight=4) as it:
        await it.store(range(100))
        it.start()
        await endpoint.until(lambda: len(endpoint.published) == 4)
        await it.store(range(1000, 1020))
        endpoint.on_publish = lambda session, publish: session.puback(publish.mid)
        for session, mid in gate:
            session.puback(mid)
        await it.until(lambda: it.counts.pending == 0)
        place = numbers(endpoint).index
        assert max(place(number) for number in range(1000, 1020)) < place(60)


async def test_rate_limit_holds_the_backlog_back_but_not_live_records(endpoint, patience):
    async with asyncio.timeout(patience), bench({"a": endpoint.port}, backlog_bytes_per_s=50_000) as it:
        await it.store(range(100), size=9_500)
        it.start()
        await endpoint.until(lambda: endpoint.published)
        started = time.monotonic()
        await it.store(range(1000, 1050))
        await endpoint.until(lambda: set(range(1000, 1050)) <= set(numbers(endpoint)))
        await asyncio.sleep(max(0.0, started + 2.0 - time.monotonic()))
        backlog = [number for number in numbers(endpoint) if number < 1000]
        elapsed = time.monotonic() - started
        allowed = 50_000 * (elapsed + 1) + 128 * 1024
        assert 5 < len(backlog) <= allowed / 9_500 + 1


async def test_message_expiry_is_what_is_left_when_it_is_sent(endpoint, patience):
    async with asyncio.timeout(patience), bench({"a": endpoint.port}) as it:
        await it.store([1], ttl_ns=100 * 10**9)
        await asyncio.sleep(1.1)
        it.start()
        await endpoint.until(lambda: endpoint.published)
        assert endpoint.published[0].properties[0x02] in {97, 98}


async def test_record_past_its_time_to_live_never_goes_out(endpoint, patience):
    async with asyncio.timeout(patience), bench({"a": endpoint.port}) as it:
        await it.store([1, 2], ttl_ns=-1)
        await it.store([3], priority=Priority.BULK)
        it.start()
        await it.until(lambda: it.counts.delivered)
        await it.store([4], ttl_ns=-1)
        await it.store([5])
        await it.until(lambda: it.counts.delivered == 2)
        assert numbers(endpoint) == [3, 5]
        assert (await it.committer.sweep(time.time_ns())).expired == 3
        assert it.counts.pending == 0


@pytest.mark.parametrize(("batch_records", "ready"), [(1, {2}), (4, {2, 3})])
async def test_record_whose_time_is_up_before_its_turn_comes_is_left_to_the_sweep(
    endpoint, patience, monkeypatch, batch_records, ready
):
    endpoint.connack_properties = {"receive_maximum": 1}
    endpoint.on_publish = silent
    async with asyncio.timeout(patience), bench({"a": endpoint.port}, batch_records=batch_records) as it:
        await it.store([1])
        it.start()
        await endpoint.until(lambda: endpoint.published)
        await it.store([2], ttl_ns=HOUR_NS)
        await it.store([3], ttl_ns=3 * HOUR_NS)
        await it.until(lambda: {f"id-{number}" for number in ready} <= it.board.claimed)
        true = time.time_ns
        monkeypatch.setattr(time, "time_ns", lambda: true() + 2 * HOUR_NS)
        endpoint.on_publish = lambda session, publish: session.puback(publish.mid)
        endpoint.session.puback(endpoint.published[0].mid)
        await it.until(lambda: it.counts.delivered == 2)
        assert [number for publish in endpoint.published for number in numbers_of(publish)] == [1, 3]
        await it.until(lambda: not it.board.claimed)
        assert (await it.committer.sweep(time.time_ns())).expired == 1
        assert (it.counts.pending, it.counts.late, it.counts.conserved) == (0, 0, True)


async def test_old_protocol_gets_the_envelope_without_properties(endpoint, patience):
    async with asyncio.timeout(patience), bench({"a": endpoint.port}, protocol="3.1.1") as it:
        await it.store(range(3))
        it.start()
        await it.until(lambda: it.counts.delivered == 3)
        assert endpoint.session.version == 4
        assert numbers(endpoint) == [0, 1, 2]


async def test_answers_in_single_bytes_are_understood(endpoint, patience):
    endpoint.segment = 1
    async with asyncio.timeout(patience), bench({"a": endpoint.port}) as it:
        await it.store(range(50))
        it.start()
        await it.until(lambda: it.counts.delivered == 50)
        assert endpoint.connections == 1


@pytest.mark.parametrize(
    "nonsense",
    [
        pytest.param(b"\x40\x04\x00\x01\x77\x00", id="unknown reason code"),
        pytest.param(b"\x40\x00", id="PUBACK without identifier"),
        pytest.param(b"\x40\x06\x00\x01\x00\x02\x99\x99", id="unknown property"),
        pytest.param(b"\xff\xff\xff\xff\xff\x01", id="endless length"),
        pytest.param(b"\x00\x00", id="reserved packet"),
        pytest.param(b"\x32\x03\xff\xff\x41", id="torn PUBLISH"),
        pytest.param(b"\x62\x02\x00\x09", id="PUBREL out of nowhere"),
        pytest.param(b"\xd0\x00\xff\xff\xff\xff\xff\x01", id="endless length behind a PINGRESP"),
        pytest.param(b"\x90\x00", id="SUBACK without identifier"),
        pytest.param(b"\xe0\x02\x42\x00", id="DISCONNECT with an unknown code"),
    ],
)
async def test_nonsense_from_the_endpoint_costs_at_most_its_connection(endpoint, patience, nonsense, caplog):
    answers = [nonsense]

    def on_publish(session, publish):
        if answers:
            session.send(answers.pop())
        session.puback(publish.mid)

    endpoint.on_publish = on_publish
    async with asyncio.timeout(patience), bench({"a": endpoint.port}, ack_timeout_s=1.0) as it:
        await it.store(range(10))
        it.start()
        await it.until(lambda: it.counts.delivered == 10)
        assert it.counts.conserved
    escaped = [row for row in caplog.records if row.name == "asyncio" and row.levelname == "ERROR"]
    assert escaped == []


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
async def test_endpoint_that_sends_messages_nobody_asked_for_gets_its_records_once(endpoint, patience, protocol):
    def on_publish(session, publish):
        session.deliver("hello", b"", qos=publish.mid % 3)
        session.puback(publish.mid)

    endpoint.on_publish = on_publish
    async with asyncio.timeout(patience), bench({"a": endpoint.port}, ack_timeout_s=1.0, protocol=protocol) as it:
        await it.store(range(20))
        it.start()
        await it.until(lambda: it.counts.delivered == 20)
        assert sorted(numbers(endpoint)) == list(range(20))
        assert (endpoint.connections, endpoint.session.acked) == (1, [])


async def test_endpoint_that_sends_a_packet_above_our_limit_loses_its_connection_before_we_read_it(endpoint, patience):
    endpoint.on_publish = lambda session, _publish: session.send(b"\x30\xff\xff\xff\x7f" + bytes(100_000))
    async with asyncio.timeout(patience), bench({"a": endpoint.port}) as it:
        await it.store([1])
        it.start()
        await it.until(lambda: it.uplinks["a"].last_error)
        assert "protocol error" in it.uplinks["a"].last_error


async def test_puback_twice_and_puback_for_nothing_change_nothing(endpoint, patience):
    def on_publish(session, publish):
        for mid in (publish.mid, publish.mid, 60_000):
            session.puback(mid)

    endpoint.on_publish = on_publish
    async with asyncio.timeout(patience), bench({"a": endpoint.port}) as it:
        await it.store(range(20))
        it.start()
        await it.until(lambda: it.counts.pending == 0)
        assert (it.counts.delivered, it.counts.late) == (20, 0)


@pytest.mark.parametrize("refusal", [0x87, 0x97, 0x9C, 0x9D, 0x88])
async def test_refused_connection_is_tried_again_with_growing_waits(endpoint, patience, refusal):
    endpoint.connack = refusal
    async with asyncio.timeout(patience), bench({"a": endpoint.port}) as it:
        await it.store([1])
        it.start()
        await endpoint.until(lambda: endpoint.connections == 3)
        endpoint.connack = 0
        await it.until(lambda: it.counts.delivered == 1)


async def test_disconnect_by_the_endpoint_loses_and_doubles_nothing(endpoint, patience):
    def on_publish(session, publish):
        session.puback(publish.mid)
        if len(endpoint.published) == 7:
            session.disconnect(0x8B)

    endpoint.on_publish = on_publish
    async with asyncio.timeout(patience), bench({"a": endpoint.port}, in_flight=1) as it:
        await it.store(range(20))
        it.start()
        await it.until(lambda: it.counts.delivered == 20)
        assert numbers(endpoint) == list(range(20))


@pytest.mark.parametrize("properties", [{"maximum_qos": 0}, {"receive_maximum": 0}])
async def test_endpoint_that_takes_nothing_at_qos_1_gets_nothing(endpoint, patience, properties):
    endpoint.connack_properties = properties
    async with asyncio.timeout(patience), bench({"a": endpoint.port}) as it:
        await it.store([1])
        it.start()
        await endpoint.until(lambda: endpoint.connections == 2)
        assert endpoint.published == []
        assert "a" in it.board.down


async def test_nothing_more_goes_to_an_endpoint_that_got_out_of_reach_while_it_was_connected_to(
    endpoint, patience, monkeypatch
):
    monkeypatch.setattr(reach, "LOOK_SECONDS", 3600.0)
    endpoint.connack = None
    async with asyncio.timeout(patience), bench({"a": endpoint.port}, presence=ASKED) as it:
        await it.store(range(5))
        it.start()
        await endpoint.until(lambda: endpoint.sessions)
        it.board.reachable = lambda _: False
        endpoint.session.send(packet(CONNACK, b"\0\0\0"))
        await endpoint.session.ended.wait()
        assert endpoint.published == []
        assert "not to be reached" in it.uplinks["a"].last_error


async def test_connecting_is_given_up_where_the_endpoint_gets_out_of_reach(endpoint, patience, monkeypatch):
    monkeypatch.setattr(reach, "LOOK_SECONDS", 0.02)
    monkeypatch.setattr(mqtt, "CONNECT_SECONDS", 3600.0)
    endpoint.connack = None
    async with asyncio.timeout(patience), bench({"a": endpoint.port}) as it:
        await it.store([1])
        it.start()
        await endpoint.until(lambda: endpoint.sessions)
        it.board.reachable = lambda _: False
        await endpoint.session.ended.wait()
        await it.until(lambda: it.uplinks["a"].last_error)
        assert "not to be reached" in it.uplinks["a"].last_error


async def test_endpoint_that_never_answers_connect_is_down_and_others_deliver(endpoint, other, patience, monkeypatch):
    monkeypatch.setattr(mqtt, "CONNECT_SECONDS", 0.5)
    endpoint.connack = None
    ports = {"a": endpoint.port, "b": other.port}
    async with asyncio.timeout(2 * patience), bench(ports) as it:
        await it.store(range(5), route=("a", "b"))
        it.start()
        await it.until(lambda: it.counts.delivered == 5)
        assert sorted(numbers(other)) == list(range(5))


async def test_drain_waits_for_pubacks_and_sends_nothing_new(endpoint, patience):
    endpoint.on_publish = silent
    async with asyncio.timeout(patience), bench({"a": endpoint.port}, in_flight=2) as it:
        await it.store(range(5))
        it.start()
        await endpoint.until(lambda: len(endpoint.published) == 2)
        drained = asyncio.create_task(it.uplinks["a"].drain())
        for publish in list(endpoint.published):
            endpoint.session.puback(publish.mid)
        await drained
        await it.stop()
        assert (it.counts.delivered, it.counts.pending, len(endpoint.published)) == (2, 3, 2)


async def test_failed_connection_leaves_nothing_in_its_socket_for_later(patience):
    async with (
        asyncio.timeout(patience),
        fake_broker(receive_buffer=8192) as endpoint,
        bench({"a": endpoint.port}, ack_timeout_s=0.5) as it,
    ):
        endpoint.on_publish = lambda _session, _publish: endpoint.reading.clear()
        await it.store(range(5), size=60_000)
        it.start()
        await endpoint.until(lambda: endpoint.connections == 2)
        first = endpoint.sessions[0]
        await it.stop()
        endpoint.reading.set()
        await first.ended.wait()
        assert len(first.published) < 5, "a record that was given up arrived after all"


@pytest.mark.parametrize("stays", [True, False], ids=["endpoint that others may go to", "endpoint that is gone"])
async def test_once_a_change_of_the_policy_is_done_no_socket_holds_what_it_forbids(patience, monkeypatch, stays):
    monkeypatch.setattr(group, "DRAIN_SECONDS", 0.1)
    async with (
        asyncio.timeout(patience),
        fake_broker(receive_buffer=8192) as endpoint,
        bench({"a": endpoint.port}) as it,
    ):
        endpoint.on_publish = lambda _session, _publish: endpoint.reading.clear()
        uplinks, options = group.UplinkGroup(it.board, it.make), {"a": it.options_of("a")}
        await it.store(range(5), size=60_000)
        await uplinks.apply(options, it.run)
        await endpoint.until(lambda: endpoint.published)
        it.policy = policy_of("b")
        await uplinks.apply(options if stays else {}, it.run)
        first, endpoint.on_publish = endpoint.session, silent
        endpoint.reading.set()
        await first.ended.wait()
        assert len(first.published) == 1, "a record arrived after the endpoint had lost its permission"
        assert not stays or not any(session.published for session in endpoint.sessions[1:])
        assert it.counts.delivered == 0


class Except:
    """A policy that forbids one record beside what it forbids anyway."""

    version = "test"

    def __init__(self, policy, record):
        self.policy, self.record = policy, record

    def clear(self, record, endpoint, registration):
        return None if record.id == self.record else self.policy.clear(record, endpoint, registration)


def to_b(record):
    return Redecided(record=msgspec.structs.replace(record, route=("b",)), reason="test", time_ns=1)


@contextmanager
def full_disk(it, monkeypatch):
    """It takes what ends records, and nothing else."""

    def commit(entries, commit=it.committer.ledger.commit):
        if not all(isinstance(entry, Ending) for entry in entries):
            raise LedgerStalledError("the disk is full")
        return commit(entries)

    with monkeypatch.context() as patch:
        patch.setattr(it.committer.ledger, "commit", commit)
        yield


async def test_record_that_waits_on_a_full_disk_for_its_new_route_holds_up_neither_the_others_nor_the_look_at_reach(
    endpoint, other, patience, monkeypatch
):
    async with asyncio.timeout(patience), bench({"a": endpoint.port, "b": other.port}) as it:
        await it.store(range(10))
        it.policy, it.again = Except(it.policy, "id-0"), to_b
        with full_disk(it, monkeypatch):
            it.start("a")
            await it.until(lambda: it.counts.delivered == 9)
            assert it.counts.pending == 1
            it.board.reachable = lambda _: False
            await it.until(lambda: not it.uplinks["a"].connected)
            await it.stop("a")
        await it.until(lambda: it.board.claimed == set())
        it.policy, it.board.reachable = it.policy.policy, lambda _: True
        it.start("b")
        await it.until(lambda: it.counts.delivered == 10)
        assert numbers(other) == [0]


async def test_no_more_is_read_while_as_much_as_may_waits_for_the_disk(endpoint, patience, monkeypatch):
    monkeypatch.setattr(settling, "MOST_BYTES", 10_000)
    async with asyncio.timeout(patience), bench({"a": endpoint.port}, in_flight=4) as it:
        await it.store(range(50), size=1000)
        it.policy, it.again = policy_of("b"), to_b
        with full_disk(it, monkeypatch):
            it.start()
            await it.until(lambda: it.committer.stalled and len(it.board.claimed) > 5)
            for _ in range(5):
                it.board.wake(["a"])
                await asyncio.sleep(0.02)
            assert len(it.board.claimed) < 16
        await it.until(lambda: it.board.claimed == set())


async def test_endpoint_that_may_get_all_that_is_in_flight_keeps_its_connection_when_the_policy_changes(
    endpoint, patience
):
    endpoint.on_publish = silent
    async with asyncio.timeout(patience), bench({"a": endpoint.port}) as it:
        uplinks, options = group.UplinkGroup(it.board, it.make), {"a": it.options_of("a")}
        await it.store([1])
        await uplinks.apply(options, it.run)
        await endpoint.until(lambda: endpoint.published)
        it.policy = policy_of("b", "a")
        await uplinks.apply(options, it.run)
        endpoint.session.puback(endpoint.published[0].mid)
        await it.until(lambda: it.counts.delivered == 1)
        assert endpoint.connections == 1


@given(st.lists(st.tuples(st.sampled_from(["accepted", "deferred", "lost"]), st.integers(0, 5)), max_size=60))
def test_patience_always_ends(events):
    patience, now = Patience(lambda: 0.5), 0.0
    for what, number in events:
        now += 0.01
        name = f"id-{number}"
        if what == "accepted":
            patience.accepted([name], 16)
            assert not patience.doubted
        elif what == "deferred":
            patience.deferred([name], now)
        else:
            patience.lost([[name]], now)
        assert patience.pause(now) <= LONGEST_PAUSE_SECONDS
        assert 0 <= patience.window(16, now) <= 16
    later = now + 10_000
    assert patience.window(16, later) >= 1
    assert patience.aside(later) == frozenset()


@given(st.lists(st.tuples(st.integers(1, 100_000), st.integers(1, 100_000)), min_size=20, max_size=200))
def test_backlog_gets_its_share_of_the_bytes_and_no_more_while_live_records_wait(rounds):
    shares, live, backlog = Shares(0, 0.0), 0, 0
    for live_bytes, record in rounds:
        allowed = shares.allowed(0.0, live=live_bytes)
        sent = max(int(allowed // record), 1) * record if allowed > 0 else 0
        shares.backlog_sent(sent)
        shares.live_sent(live_bytes)
        live, backlog = live + live_bytes, backlog + sent
        assert abs(backlog - live / (SHARE - 1)) <= 100_001, "one record, at most"


@given(st.integers(1000, 10**6), st.lists(st.integers(1, 50_000), min_size=1, max_size=100))
def test_rate_limit_is_kept_over_any_time(rate, sizes):
    shares, now, sent = Shares(rate, 0.0), 0.0, 0
    for size in sizes:
        while not shares.allowed(now, live=0):
            now += max(shares.wait(), 1e-6)
        shares.backlog_sent(size)
        sent += size
        assert sent <= rate * (now + 1) + 50_000 + 1


async def test_uplink_that_is_stopped_does_not_wait_for_a_disk_that_takes_nothing(endpoint, patience, monkeypatch):
    monkeypatch.setattr(settling, "FINISH_SECONDS", 0.1)

    def stalled(_entries):
        raise LedgerStalledError("read-only file system")

    async with asyncio.timeout(patience), bench({"a": endpoint.port}, company_s=0.0) as it:
        await it.store([1])
        with monkeypatch.context() as patch:
            patch.setattr(it.committer.ledger, "commit", stalled)
            it.start()
            await it.until(lambda: it.committer.stalled)
            started = time.monotonic()
            await it.stop()
            assert time.monotonic() - started < patience / 2
            assert it.board.claimed == {"id-1"}, "another uplink would send it again"
        await it.until(lambda: it.counts.delivered == 1)
        assert numbers(endpoint) == [1]
