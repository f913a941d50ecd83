import asyncio
import json
import shutil
import time
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
from endpoints import record
from fake_broker import PUBLISH, fake_broker, packet, text
from ledger_samples import in_memory
from msgspec import structs

from agent.board import Board
from agent.boot import boot_ns
from agent.errors import LedgerCorruptError
from agent.intake import intake
from agent.intake.intake import NEVER_NS, Fixes, Intake, IntakeOptions, Inward
from agent.intake.turns import Turns
from agent.intake.waiting import FOREVER_NS
from agent.messages import State
from agent.mqtt import backoff
from agent.mqtt.connection import Connection
from agent.mqtt.packets import Outgoing, Session
from agent.places.positions import PositionHistory
from agent.store.committer import CommitOptions, Committer
from agent.store.entries import LedgerLimits, Refused, Store
from agent.store.ledger import Ledger
from tools.brokers import amqtt, mosquitto

TOPIC = "vehicle/speed"
MARKERS = 30_000  # the fake broker's own packet identifiers begin here


class Line:
    """Stores everything; a payload named in `gates` waits until its event is set."""

    def __init__(self):
        self.seen, self.gates, self.clocks = [], {}, []
        self.turns = Turns()

    def observe(self, received_ns, monotonic_ns):
        self.clocks.append((received_ns, monotonic_ns))

    async def entry(self, message, key):
        self.seen.append(message)
        if message.payload in self.gates:
            await self.gates[message.payload].wait()
        if message.payload == b"refuse":
            return Refused(reason="test", time_ns=1, intake=key)
        stored = record(len(self.seen))
        if message.payload == b"held":
            stored = structs.replace(stored, state=State.HELD, route=())
        return Store(record=stored, intake=key)

    @property
    def payloads(self):
        return [message.payload for message in self.seen]


def echo(session, publish):
    """A broker that sends a client's messages back to it where it has subscribed to them."""
    session.puback(publish.mid)
    if publish.topic in session.filters:
        session.deliver(publish.topic, publish.payload)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(backoff, "FIRST_SECONDS", 0.02)
    monkeypatch.setattr(backoff, "LONGEST_SECONDS", 0.1)
    monkeypatch.setattr(intake, "MARKER_SECONDS", 0.02)


@pytest.fixture
async def broker():
    async with fake_broker() as broker:
        broker.on_publish = echo
        yield broker


@asynccontextmanager
async def taking(port, *, alive_ns=None, name="telemetry", line=None, outgoing=("vehicle/#",), kept=None, **session):
    """An intake at work: (intake, line, committer). `kept`: the folder of its ledger, which stays."""
    folder, line = kept or in_memory(), line or Line()
    ledger = Ledger.open(folder / "ledger.db", LedgerLimits(reserve_bytes=65536))
    async with Committer(ledger, CommitOptions(max_delay_s=0.001)) as committer:
        inward = Inward(line=line, committer=committer, fixes=Fixes([], PositionHistory()), board=Board())
        defaults = {"clean_start": False, "session_expiry_s": 600, "receive_maximum": 16}
        settings = Session(host="127.0.0.1", port=port, client_id=f"agent-{name}", **defaults | session)
        made = Intake(IntakeOptions(name=name, session=settings, outgoing=outgoing), inward, alive_ns)
        task = made.task = asyncio.create_task(made.run_loop())
        try:
            yield made, line, committer
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
    ledger.close()
    if not kept:
        shutil.rmtree(folder)


def own_acks(broker, session=None):
    """The acknowledged packet identifiers without those of markers, in order."""
    session = session or broker.session
    return [mid for mid in session.acked if mid < MARKERS]


async def subscribed(broker):
    await broker.until(lambda: broker.sessions and broker.session.filters)
    broker.session._mid = MARKERS
    return broker.session


async def test_puback_goes_out_only_once_the_message_is_durable(broker, patience):
    async with asyncio.timeout(patience), taking(broker.port) as (_, line, committer):
        line.gates[b"one"] = asyncio.Event()
        session = await subscribed(broker)
        session.deliver(TOPIC, b"one", mid=1)
        await broker.until(lambda: line.seen)
        await asyncio.sleep(0.1)
        assert own_acks(broker) == []
        line.gates[b"one"].set()
        await broker.until(lambda: own_acks(broker) == [1])
        assert committer.ledger.counts().received == 1


async def test_pubacks_go_out_in_the_order_of_the_messages(broker, patience):
    async with asyncio.timeout(patience), taking(broker.port) as (_, line, committer):
        line.gates[b"slow"] = asyncio.Event()
        session = await subscribed(broker)
        session.deliver(TOPIC, b"slow", mid=1)
        for mid in range(2, 6):
            session.deliver(TOPIC, b"quick", mid=mid)
        await broker.until(lambda: committer.ledger.counts().received == 4)
        assert own_acks(broker) == []
        line.gates[b"slow"].set()
        await broker.until(lambda: own_acks(broker) == [1, 2, 3, 4, 5])


async def test_marker_does_not_overtake_a_message_either(broker, patience):
    async with asyncio.timeout(patience), taking(broker.port) as (_, line, _committer):
        line.gates[b"slow"] = asyncio.Event()
        session = await subscribed(broker)
        broker.on_publish = lambda session, publish: session.puback(publish.mid)  # hold the markers back
        await broker.until(lambda: session.published)
        session.deliver(TOPIC, b"slow", mid=1)
        session.deliver(session.published[-1].topic, b"an old marker", mid=2)
        await broker.until(lambda: line.seen)
        await asyncio.sleep(0.1)
        assert session.acked.count(2) == 0
        line.gates[b"slow"].set()
        await broker.until(lambda: 2 in session.acked)
        assert session.acked.index(1) < session.acked.index(2)


async def test_window_is_announced_and_a_refusal_is_acknowledged_too(broker, patience):
    async with asyncio.timeout(patience), taking(broker.port, receive_maximum=7) as (_, _line, committer):
        session = await subscribed(broker)
        assert session.connect[0x21] == 7
        assert session.connect[0x11] == 600
        session.deliver(TOPIC, b"refuse", mid=1)
        await broker.until(lambda: own_acks(broker) == [1])
        assert committer.ledger.counts().refused == 1


async def test_record_that_is_held_is_looked_at_again_once_it_is_durable(broker, patience):
    async with asyncio.timeout(patience), taking(broker.port) as (made, _, committer):
        session, fixes = await subscribed(broker), made._inward.fixes
        fixes.taken()  # a pass, and what it found, before the record was there
        session.deliver(TOPIC, b"80", mid=1)
        await broker.until(lambda: own_acks(broker) == [1])
        assert (fixes.arrived.is_set(), fixes.taken()) == (False, NEVER_NS)
        session.deliver(TOPIC, b"held", mid=2)
        await fixes.arrived.wait()
        assert committer.ledger.counts().held == 1
        assert fixes.taken() == record(2).capture.monotonic_ns


async def test_message_beyond_the_window_waits_in_the_socket_and_is_not_lost(broker, patience):
    async with asyncio.timeout(patience), taking(broker.port, receive_maximum=2) as (_, line, committer):
        line.gates[b"slow"] = asyncio.Event()
        session = await subscribed(broker)
        for mid in range(1, 41):
            session.deliver(TOPIC, b"slow", mid=mid)
        await broker.until(lambda: len(line.seen) >= 2)
        await asyncio.sleep(0.1)
        assert len(line.seen) <= 5, "more than the window and what is between two queues was taken"
        line.gates[b"slow"].set()
        await broker.until(lambda: len(own_acks(broker)) == 40)
        assert committer.ledger.counts().received == 40


async def test_late_puback_of_a_lost_connection_has_no_effect_on_the_next(broker, patience):
    async with asyncio.timeout(patience), taking(broker.port) as (_, line, committer):
        line.gates[b"old"], line.gates[b"new"] = asyncio.Event(), asyncio.Event()
        first = await subscribed(broker)
        first.deliver(TOPIC, b"old", mid=1)
        await broker.until(lambda: line.seen)
        first.abort()
        line.gates[b"old"].set()
        await broker.until(lambda: len(broker.sessions) == 2 and broker.session.filters)
        second = broker.session
        second._mid = MARKERS
        second.deliver(TOPIC, b"new", mid=1)
        await broker.until(lambda: b"new" in line.payloads)
        await asyncio.sleep(0.1)
        assert own_acks(broker, second) == []
        line.gates[b"new"].set()
        await broker.until(lambda: own_acks(broker, second) == [1])
        assert committer.ledger.counts().received == 2


async def test_redelivered_message_that_is_durable_is_acknowledged_and_not_taken_twice(broker, patience):
    broker.session_present = 1
    async with asyncio.timeout(patience), taking(broker.port) as (_, line, committer):
        first = await subscribed(broker)
        broker.on_puback = lambda session: session.abort()  # the PUBACK is lost with the connection
        first.deliver(TOPIC, b"one", mid=5)
        await broker.until(lambda: len(broker.sessions) == 2 and broker.session.filters)
        broker.on_puback = lambda _session: None
        broker.session.deliver(TOPIC, b"one", mid=5, dup=True)
        await broker.until(lambda: 5 in broker.session.acked)
        assert committer.ledger.counts().received == 1
        broker.session.deliver(TOPIC, b"other", mid=5, dup=True)
        await broker.until(lambda: committer.ledger.counts().received == 2)
        broker.session.deliver(TOPIC, b"other", mid=5)
        await broker.until(lambda: committer.ledger.counts().received == 3)
        assert line.payloads == [b"one", b"other", b"other"]


async def test_new_session_forgets_the_packet_identifiers_of_the_old(broker, patience):
    async with asyncio.timeout(patience), taking(broker.port) as (_, _line, committer):
        first = await subscribed(broker)
        first.deliver(TOPIC, b"80", mid=5)
        await broker.until(lambda: 5 in first.acked)
        first.abort()
        await broker.until(lambda: len(broker.sessions) == 2 and broker.session.filters)
        broker.session.deliver(TOPIC, b"80", mid=5, dup=True)
        await broker.until(lambda: committer.ledger.counts().received == 2)


async def test_wait_in_the_broker_counts_from_when_the_session_was_last_empty(broker, patience):
    broker.session_present = 1
    broker.on_publish = lambda session, publish: session.puback(publish.mid)  # the marker waits behind the others
    hour = 3600 * 10**9
    async with asyncio.timeout(patience), taking(broker.port, alive_ns=boot_ns() - hour) as (made, line, _):
        session = await subscribed(broker)
        session.deliver(TOPIC, b"waited", mid=1)
        await broker.until(lambda: session.published and line.seen)
        assert hour <= line.seen[0].wait_ns < hour + 60 * 10**9
        session.deliver(session.published[-1].topic, session.published[-1].payload)
        broker.on_publish = echo
        await broker.until(lambda: boot_ns() - made.alive_ns < 10**9)
        session.deliver(TOPIC, b"fresh", mid=2)
        await broker.until(lambda: len(line.seen) == 2)
        assert line.seen[1].wait_ns < 2 * 10**9


async def test_wait_is_unbounded_where_nothing_is_known_of_the_time_before(broker, patience):
    broker.session_present = 1
    broker.on_publish = lambda session, publish: session.puback(publish.mid)
    async with asyncio.timeout(patience), taking(broker.port) as (_, line, _committer):
        session = await subscribed(broker)
        session.deliver(TOPIC, b"waited", mid=1)
        await broker.until(lambda: line.seen)
        assert line.seen[0].wait_ns == FOREVER_NS


async def test_both_clocks_are_read_with_whatever_comes_also_what_does_not_go_out(broker, patience):
    async with asyncio.timeout(patience), taking(broker.port) as (_, line, _):
        session = await subscribed(broker)
        await until(lambda: line.clocks)  # a marker's
        marked = len(line.clocks)
        session.deliver("car/gnss", b"fix")
        session.deliver("vehicle/x", b"1")
        await until(lambda: line.payloads)
        assert len(line.clocks) >= marked + 2


async def test_retained_message_is_of_unknown_age(broker, patience):
    async with asyncio.timeout(patience), taking(broker.port, protocol="3.1.1") as (_, line, _committer):
        session = await subscribed(broker)
        assert session.version == 4
        session.deliver(TOPIC, b"kept", mid=1, retain=True)
        session.deliver(TOPIC, b"live", mid=2)
        await broker.until(lambda: len(line.seen) == 2)
        assert line.seen[0].wait_ns == FOREVER_NS
        assert line.seen[1].wait_ns < 2 * 10**9


async def test_message_behind_slow_ones_says_how_long_it_waited(patience):
    """The broker's own limit is one in flight, which nobody tells us."""
    async with asyncio.timeout(patience), mosquitto(config_lines=["max_inflight_messages 1"]) as real:
        line = Line()
        line.gates[b"slow"] = asyncio.Event()
        async with taking(real.port, line=line, protocol="3.1.1") as (made, _, _committer), sender(real) as publish:
            await until(lambda: made.connected)
            await publish(b"slow")
            await until(lambda: line.seen)
            started = boot_ns()
            await publish(b"behind")
            published = boot_ns()
            await asyncio.sleep(1.0)
            line.gates[b"slow"].set()
            await until(lambda: len(line.seen) == 2)
            true_wait = line.seen[1].monotonic_ns - published
            assert true_wait > 0.9 * 10**9
            assert line.seen[1].wait_ns >= true_wait
            assert line.seen[1].wait_ns < line.seen[1].monotonic_ns - started + 2 * 10**9


async def until(condition):
    """Wait for what must happen; the test's own timeout ends it."""
    while not condition():  # noqa: ASYNC110 - a condition over another's state
        await asyncio.sleep(0.01)


@asynccontextmanager
async def sender(broker, protocol="5"):
    """`await publish(payload, **fields)`: QoS 1, returns with the PUBACK."""
    connection = Connection(Session(host=broker.host, port=broker.port, client_id="sender", protocol=protocol))
    await connection.open()

    async def publish(payload, topic=TOPIC, **fields):
        assert (await connection.publish(Outgoing(topic=topic, payload=payload, **fields))).accepted

    try:
        yield publish
    finally:
        connection.close()


@pytest.mark.parametrize("start", [mosquitto, amqtt])
async def test_brokers_of_the_old_protocol_are_served(patience, start):
    async with asyncio.timeout(2 * patience), start() as real, taking(real.port, protocol="3.1.1") as (made, line, com):
        await until(lambda: made.connected)
        async with sender(real, "3.1.1") as publish:
            for number in range(50):
                await publish(b"%d" % number)
        await until(lambda: com.ledger.counts().received == 50)
        assert line.payloads == [b"%d" % number for number in range(50)]


async def test_messages_are_kept_by_the_broker_while_the_agent_is_away(patience):
    async with asyncio.timeout(patience), mosquitto() as real, sender(real) as publish:
        async with taking(real.port) as (made, _, _committer):
            await until(lambda: made.connected)
        for number in range(20):
            await publish(b"%d" % number)
        async with taking(real.port) as (made, line, committer):
            await until(lambda: committer.ledger.counts().received == 20)
            assert [message.wait_ns for message in line.seen] == [FOREVER_NS] * 20


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
async def test_filters_that_are_no_longer_configured_are_unsubscribed(tmp_path, patience, caplog, protocol):
    caplog.set_level("INFO")
    async with asyncio.timeout(patience), mosquitto() as real, sender(real) as publish:

        def configured(*outgoing):
            caplog.clear()
            return taking(real.port, outgoing=outgoing, kept=tmp_path, protocol=protocol)

        async with configured("vehicle/#", "door/+") as (made, _, _committer):
            await until(lambda: made.connected)
        for number in range(3):
            await publish(b"%d" % number)
        async with configured("car/#", "door/+") as (made, line, committer):
            await until(lambda: made.connected)
            assert made.unasked == 3, "what the broker had kept for the old filter"
            await publish(b"old")
            await publish(b"new", "car/speed")
            await until(lambda: committer.ledger.counts().received)
            assert (line.payloads, made.unasked) == ([b"new"], 3)
            assert [caplog.messages.count(event) for event in ("intake.unasked", "intake.unsubscribed")] == [1, 1]
        async with configured("car/#", "door/+") as (made, line, _):
            await until(lambda: made.connected)
            await publish(b"open", "door/1")
            await until(lambda: line.payloads == [b"open"])
            assert "intake.unsubscribed" not in caplog.messages


@pytest.mark.parametrize("answers", [(0, 0), (1, 0), (1, 0x11), (1, 0x87)])
async def test_filter_is_noted_before_it_is_subscribed_and_until_the_broker_has_ended_it(
    broker, tmp_path, patience, monkeypatch, answers
):
    present, code = answers  # whether the session is, and what becomes of the filter

    def noted():
        return json.loads(committer.ledger.meta("subscribed.telemetry") or "[]")

    async def subscribe(connection, filters, real=Connection.subscribe):
        assert set(filters) <= set(noted())
        await real(connection, filters)

    monkeypatch.setattr(Connection, "subscribe", subscribe)
    old, new, marker = "vehicle/#", "car/#", "residency-agent/agent-telemetry/marker"
    async with asyncio.timeout(patience):
        async with taking(broker.port, outgoing=(old,), kept=tmp_path) as (made, _, committer):
            await broker.until(lambda: made.connected)
            assert noted() == [marker, old]
        broker.session_present, broker.unsuback = present, code
        async with taking(broker.port, outgoing=(new,), kept=tmp_path) as (made, _, committer):
            await broker.until(lambda: made.connected)
            assert broker.session.ended_filters == [old] * present
            assert noted() == sorted([new, marker, *[old] * (code == 0x87)])


async def test_fix_and_marker_are_not_unasked(broker, patience):
    async with asyncio.timeout(patience), taking(broker.port, outgoing=(TOPIC,)) as (made, _, _committer):
        made._options = replace(made._options, fixes=("car/gnss",))
        session = await subscribed(broker)
        for mid, topic in enumerate(("car/gnss", TOPIC, "car/door"), 1):
            session.deliver(topic, b"{}", mid=mid)
        await broker.until(lambda: own_acks(broker) == [1, 2, 3])
        assert made.unasked == 1


async def test_broker_that_denies_the_marker_is_reported(broker, patience, caplog):
    broker.on_publish = lambda session, publish: session.puback(publish.mid, 0x87)
    async with asyncio.timeout(patience), taking(broker.port):
        await broker.until(lambda: "intake.marker-lost" in caplog.messages)


async def test_torn_and_stammering_input_is_the_same_input(broker, patience):
    broker.segment = 1
    async with asyncio.timeout(patience), taking(broker.port) as (_, line, _committer):
        session = await subscribed(broker)
        for mid in range(1, 11):
            session.deliver(TOPIC, b"x" * mid, mid=mid)
        await broker.until(lambda: len(own_acks(broker)) == 10)
        assert line.payloads == [b"x" * mid for mid in range(1, 11)]


@pytest.mark.parametrize(
    "nonsense", [b"\x32\x03\xff\xff\x41", b"\xff\xff\xff\xff\xff\x01", b"\x30\x02\x00\x09", b"\x00\x00"]
)
async def test_nonsense_from_the_broker_costs_at_most_its_connection(broker, patience, nonsense, caplog):
    async with asyncio.timeout(patience), taking(broker.port) as (_, _line, committer):
        session = await subscribed(broker)
        session.send(nonsense)
        await broker.until(lambda: len(broker.sessions) == 2 and broker.session.filters)
        broker.session.deliver(TOPIC, b"fine", mid=1)
        await broker.until(lambda: committer.ledger.counts().received == 1)
    assert [row for row in caplog.records if row.name == "asyncio" and row.levelname == "ERROR"] == []


async def test_properties_that_paho_refuses_do_not_hold_up_what_comes_behind_them(patience):
    async with asyncio.timeout(patience), mosquitto() as real, taking(real.port) as (made, line, _):
        await until(lambda: made.connected)
        async with sender(real) as publish:
            await publish(b"one")
            await publish(b"two", properties=[("\ufeffunit", "\ufeffkm/h")])
            await publish(b"three")
        await until(lambda: len(line.seen) == 3)
    assert [(message.payload, message.properties) for message in line.seen] == [
        (b"one", ()),
        (b"two", (("\ufeffunit", "\ufeffkm/h"),)),
        (b"three", ()),
    ]


async def test_properties_that_make_no_sense_are_a_refusal_with_a_puback(broker, patience):
    async with asyncio.timeout(patience), taking(broker.port) as (made, line, committer):
        session = await subscribed(broker)
        made._inward.fixes.offer = line.seen.append
        session.send(packet(PUBLISH, text(TOPIC) + b"\0\x01\x09\x26\0\xffbroken", flags=2))
        await broker.until(lambda: own_acks(broker) == [1])
        assert committer.ledger.counts().breakdown["refused"]["reason"] == {"message.malformed": 1}
        assert line.seen == []
        assert len(broker.sessions) == 1


async def test_damaged_ledger_ends_the_agent_instead_of_refusing_the_broker_for_ever(broker, patience, monkeypatch):
    def damaged(_ledger, _entries):
        raise LedgerCorruptError("the file is damaged")

    async with asyncio.timeout(patience), taking(broker.port) as (made, _line, _committer):
        session = await subscribed(broker)
        monkeypatch.setattr(Ledger, "commit", damaged)
        session.deliver(TOPIC, b"one", mid=1)
        with pytest.raises(LedgerCorruptError):
            await made.task


async def test_session_that_stands_still_reports_the_time_as_waiting(broker, patience):
    async with asyncio.timeout(patience), taking(broker.port) as (_, line, _committer):
        session = await subscribed(broker)
        session.deliver(TOPIC, b"before", mid=1)
        await broker.until(lambda: line.seen)
        session.deliver(TOPIC, b"while it stands still", mid=2)
        await asyncio.sleep(0)
        time.sleep(2.5)  # noqa: ASYNC251 - the whole loop, as under SIGSTOP
        await broker.until(lambda: len(line.seen) == 2)
        assert line.seen[1].wait_ns > 2 * 10**9
