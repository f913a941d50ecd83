"""Several records in one PUBLISH: what may share one, and that no record pays for another."""

import asyncio
import itertools

import msgspec
import pytest
from endpoints import HOUR_NS, bench, numbers_of, record
from fake_broker import silent
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from agent.messages import Priority
from agent.policy import Policy
from agent.settings.policy_config import Rule
from agent.uplink.loading import Loading
from agent.uplink.parcels import BATCH_BYTES, Parcels, Room
from agent.uplink.patience import MOST_ASIDE, Patience
from agent.uplink.presence import PresenceOptions
from agent.wire import batch, envelope

pytestmark = pytest.mark.usefixtures("quick_uplinks")

EXPIRY, CONTENT_TYPE, USER = 0x02, 0x03, 0x26
AS_ZSTD = {"batch_records": 64, "batch_compression": "zstd"}


def sent(broker):
    """The numbers of the records of each PUBLISH."""
    return [numbers_of(publish) for publish in broker.published]


def all_sent(broker):
    return [*itertools.chain.from_iterable(sent(broker))]


@pytest.mark.parametrize(
    ("compression", "content_type"), [("none", batch.CONTENT_TYPE), ("zstd", batch.ZSTD_CONTENT_TYPE)]
)
async def test_records_that_are_ready_together_go_together_and_one_puback_settles_all(
    endpoint, patience, compression, content_type
):
    endpoint.on_publish = silent
    options = {"batch_records": 8, "batch_compression": compression}
    async with asyncio.timeout(patience), bench({"a": endpoint.port}, **options) as it:
        await it.store(range(3))
        await it.store([3], ttl_ns=HOUR_NS // 2)
        await it.store(range(4, 10))
        it.start()
        await endpoint.until(lambda: len(endpoint.published) == 2)
        assert sent(endpoint) == [[*range(8)], [8, 9]]
        first = endpoint.published[0]
        assert first.topic == "cn/car/vehicle/speed"
        assert first.properties[CONTENT_TYPE].decode() == content_type
        assert first.properties[USER] == [("dataregion", "cn")]
        assert 1700 < first.properties[EXPIRY] <= 1800, "the record that expires first decides"
        assert (it.uplinks["a"].in_flight, it.counts.pending) == (2, 10)
        endpoint.session.puback(first.mid)
        await it.until(lambda: it.counts.delivered == 8)
        endpoint.session.puback(endpoint.published[1].mid)
        await it.until(lambda: it.counts.delivered == 10)
        assert it.counts.conserved
        assert max(it.uplinks["a"].delivered.as_dict()["buckets"].values()) == 10


async def test_without_the_setting_every_record_goes_alone(endpoint, patience):
    async with asyncio.timeout(patience), bench({"a": endpoint.port}) as it:
        await it.store(range(10))
        it.start()
        await it.until(lambda: it.counts.delivered == 10)
        assert sent(endpoint) == [[number] for number in range(10)]
        assert {publish.properties[CONTENT_TYPE].decode() for publish in endpoint.published} == {envelope.CONTENT_TYPE}


async def test_only_records_of_one_topic_share_a_publish_and_each_topic_keeps_its_order(endpoint, patience):
    topics = ["vehicle/speed", "vehicle/door", "vehicle/light"]
    async with asyncio.timeout(patience), bench({"a": endpoint.port}, **AS_ZSTD) as it:
        for number in range(30):
            await it.store([number], subject=topics[number % 3])
        it.start()
        await it.until(lambda: it.counts.delivered == 30)
        assert len(endpoint.published) == 3
        for publish in endpoint.published:
            of_topic = topics.index(publish.topic.removeprefix("cn/car/"))
            assert numbers_of(publish) == [*range(of_topic, 30, 3)]


async def test_template_without_the_topic_lets_records_of_several_share_a_publish(endpoint, patience):
    async with asyncio.timeout(patience), bench({"a": endpoint.port}, topic="all/{region}", **AS_ZSTD) as it:
        await it.store([1], subject="vehicle/speed")
        await it.store([2], subject="vehicle/door")
        it.start()
        await it.until(lambda: it.counts.delivered == 2)
        assert sent(endpoint) == [[1, 2]]


async def test_urgent_record_goes_first_and_alone(endpoint, patience):
    async with asyncio.timeout(patience), bench({"a": endpoint.port}, **AS_ZSTD) as it:
        await it.store(range(5))
        await it.store([100, 101], priority=Priority.URGENT)
        it.start()
        await it.until(lambda: it.counts.delivered == 7)
        assert sent(endpoint) == [[100], [101], [*range(5)]]


async def test_batch_is_rejected_and_only_the_record_at_fault_is_refused(endpoint, patience, caplog):
    def on_publish(session, publish):
        session.puback(publish.mid, 0x99 if 3 in numbers_of(publish) else 0)

    endpoint.on_publish = on_publish
    async with asyncio.timeout(patience), bench({"a": endpoint.port}, **AS_ZSTD) as it:
        await it.store(range(10))
        it.start()
        await it.until(lambda: it.counts.pending == 0)
        assert (it.counts.refused, it.counts.delivered) == (1, 9)
        assert sent(endpoint) == [[*range(10)], *([number] for number in range(10))]
        await it.store(range(10, 15))
        await it.until(lambda: it.counts.delivered == 14)
        assert it.counts.conserved
    assert [one.message for one in caplog.records if one.levelname == "WARNING"] == ["uplink.batch-rejected"]


async def test_endpoint_that_takes_no_batch_at_all_gets_every_record_alone(endpoint, patience):
    endpoint.on_publish = lambda session, publish: session.puback(
        publish.mid, 0x99 if len(numbers_of(publish)) > 1 else 0
    )
    count = MOST_ASIDE + 200
    async with asyncio.timeout(patience), bench({"a": endpoint.port}, **AS_ZSTD) as it:
        await it.store(range(count), size=1)
        it.start()
        await it.until(lambda: it.counts.delivered == count)
        assert it.counts.refused == 0
        assert sorted(only for only, *more in sent(endpoint) if not more) == [*range(count)]


@pytest.mark.parametrize("code", [0x80, 0x83, 0x87, 0x91, 0x97])
async def test_batch_that_the_endpoint_does_not_take_now_is_kept_and_delivered_later(endpoint, patience, code):
    answers = [code]
    endpoint.on_publish = lambda session, publish: session.puback(publish.mid, answers.pop() if answers else 0)
    async with asyncio.timeout(patience), bench({"a": endpoint.port}, **AS_ZSTD) as it:
        await it.store(range(5))
        it.start()
        await it.until(lambda: it.counts.delivered == 5)
        assert sent(endpoint)[0] == [*range(5)]
        assert sorted(all_sent(endpoint)) == sorted([*range(5), *range(5)])
        assert endpoint.connections == 1


async def test_batch_in_flight_when_the_connection_breaks_is_sent_again_with_the_same_ids(endpoint, patience):
    endpoint.on_publish = silent
    async with asyncio.timeout(patience), bench({"a": endpoint.port}, **AS_ZSTD) as it:
        await it.store(range(20))
        it.start()
        await endpoint.until(lambda: endpoint.published)
        first = batch.unpack(endpoint.published[0].payload, batch.ZSTD_CONTENT_TYPE)
        endpoint.on_publish = lambda session, publish: session.puback(publish.mid)
        endpoint.session.abort()
        await it.until(lambda: it.counts.delivered == 20)
        assert sorted(all_sent(endpoint)) == sorted([*range(20), *range(20)])
        assert it.uplinks["a"].resent == 20
        assert {*first} <= {publish.payload for publish in endpoint.published}, "byte by byte the same"
        await it.until(lambda: it.board.claimed == set())


async def test_record_on_which_the_endpoint_hangs_up_lets_the_others_pass(endpoint, patience):
    def on_publish(session, publish):
        if 7 in numbers_of(publish):
            session.abort()
        else:
            session.puback(publish.mid)

    endpoint.on_publish = on_publish
    async with asyncio.timeout(patience), bench({"a": endpoint.port}, **AS_ZSTD) as it:
        await it.store(range(40))
        it.start()
        await it.until(lambda: it.counts.delivered == 39)
        assert it.counts.pending == 1


async def test_receive_maximum_counts_publishes_and_not_records(endpoint, patience):
    endpoint.connack_properties = {"receive_maximum": 2}
    endpoint.on_publish = silent
    async with asyncio.timeout(patience), bench({"a": endpoint.port}, batch_records=10) as it:
        await it.store(range(50))
        it.start()
        await endpoint.until(lambda: len(endpoint.published) == 2)
        await asyncio.sleep(0.1)
        assert sent(endpoint) == [[*range(10)], [*range(10, 20)]]
        for publish in [*endpoint.published]:
            endpoint.session.puback(publish.mid)
        await endpoint.until(lambda: len(endpoint.published) == 4)


async def test_what_comes_while_pubacks_are_awaited_goes_together(endpoint, patience):
    endpoint.on_publish = silent
    async with asyncio.timeout(patience), bench({"a": endpoint.port}, in_flight=1, **AS_ZSTD) as it:
        it.start()
        await it.store([0])
        await endpoint.until(lambda: endpoint.published)
        for number in range(1, 30):
            await it.store([number])
        endpoint.session.puback(endpoint.published[0].mid)
        await endpoint.until(lambda: len(endpoint.published) == 2)
        assert sent(endpoint) == [[0], [*range(1, 30)]]


async def test_batches_keep_to_the_packet_limit_and_a_lone_record_above_it_is_refused(endpoint, patience):
    endpoint.connack_properties = {"maximum_packet": 6000}
    async with asyncio.timeout(patience), bench({"a": endpoint.port}, batch_records=64) as it:
        await it.store(range(20), size=1000)
        await it.store([20], size=8000)
        it.start()
        await it.until(lambda: it.counts.pending == 0)
        assert (it.counts.delivered, it.counts.refused) == (20, 1)
        assert max(publish.size for publish in endpoint.published) <= 6000
        assert max(map(len, sent(endpoint))) > 1
        assert all_sent(endpoint) == [*range(20)]


async def test_packet_limit_that_no_batch_keeps_splits_it_into_records(endpoint, patience, monkeypatch):
    monkeypatch.setattr("agent.uplink.loading.PACKET_ROOM", -100_000)  # as if the topic took all of the room
    endpoint.connack_properties = {"maximum_packet": 3000}
    async with asyncio.timeout(patience), bench({"a": endpoint.port}, batch_records=64) as it:
        await it.store(range(20), size=500)
        it.start()
        await it.until(lambda: it.counts.pending == 0)
        assert (it.counts.delivered, it.counts.refused) == (20, 0)
        assert sent(endpoint) == [[number] for number in range(20)]


async def test_batch_holds_no_more_bytes_than_its_bound_and_a_larger_record_goes_alone(endpoint, patience):
    async with asyncio.timeout(patience), bench({"a": endpoint.port}, batch_records=64) as it:
        await it.store(range(10), size=20_000)
        await it.store([10], size=BATCH_BYTES)
        it.start()
        await it.until(lambda: it.counts.delivered == 11)
        assert sent(endpoint)[-1] == [10]
        assert max(len(publish.payload) for publish in endpoint.published[:-1]) <= BATCH_BYTES + 500
        assert all_sent(endpoint) == [*range(11)]


async def test_record_that_the_policy_permits_no_longer_leaves_its_batch_and_no_other_does(endpoint, patience):
    """It is cleared by itself the moment before, although its batch was put together under another policy."""
    endpoint.on_publish = silent
    options = {"in_flight": 1, "topic": "all/{region}", **AS_ZSTD}
    async with asyncio.timeout(patience), bench({"a": endpoint.port}, **options) as it:
        it.start()
        await it.store([0])
        await endpoint.until(lambda: endpoint.published)
        for number, subject in enumerate(("vehicle/speed", "vehicle/door", "vehicle/light"), start=1):
            await it.store([number], subject=subject)
        await it.until(lambda: len(it.board.claimed) == 4)
        doors = Rule(topic="vehicle/door", action="refuse")
        it.policy = Policy(msgspec.structs.replace(it.policy.config, rules=[doors, *it.policy.config.rules]))
        endpoint.on_publish = lambda session, publish: session.puback(publish.mid)
        endpoint.session.puback(endpoint.published[0].mid)
        await it.until(lambda: it.counts.pending == 0)
        assert (it.counts.delivered, it.counts.refused) == (3, 1)
        assert sent(endpoint) == [[0], [1, 3]]


async def test_uplink_that_ends_gives_back_what_was_ready_for_a_batch(endpoint, patience):
    endpoint.on_publish = silent
    async with asyncio.timeout(patience), bench({"a": endpoint.port}, in_flight=1, **AS_ZSTD) as it:
        it.start()
        await it.store([0])
        await endpoint.until(lambda: endpoint.published)
        await it.store(range(1, 10))
        await it.until(lambda: len(it.board.claimed) == 10)
        await it.stop()
        assert it.board.claimed == set()


async def test_batch_that_is_rejected_while_the_uplink_says_goodbye_is_pending_again(endpoint, patience):
    batches = []

    def on_publish(session, publish):
        if publish.topic == "cn/car/vehicle/speed":
            batches.append(publish)
            return
        if b"death" in publish.payload:
            session.puback(batches[0].mid, 0x99)
        session.puback(publish.mid)

    endpoint.on_publish = on_publish
    presence = PresenceOptions(source="urn:vehicle:car-7", vehicle="car")
    async with asyncio.timeout(patience), bench({"a": endpoint.port}, presence=presence, **AS_ZSTD) as it:
        await it.store(range(5))
        it.start()
        await endpoint.until(lambda: batches)
        await it.stop()
        assert b"death" in endpoint.published[-1].payload
        assert it.board.claimed == set()
        assert (it.counts.pending, it.counts.refused) == (5, 0)


NAMED = [record(number) for number in range(400)]


class Grouping(RuleBasedStateMachine):
    """Parcels against lists: an address is a letter, and the records of each come out as they went in."""

    def __init__(self):
        super().__init__()
        self.addresses = {}
        self.parcels = Parcels(lambda one: self.addresses[one.id])
        self.fresh = iter(NAMED)
        self.waiting = {}
        self.urgent = []

    @rule(addresses=st.lists(st.sampled_from([None, "a", "b", "c"]), max_size=12))
    def put(self, addresses):
        found = [*zip(itertools.islice(self.fresh, len(addresses)), addresses, strict=False)]
        for one, address in found:
            self.addresses[one.id] = address
            self.waiting.setdefault(address or one.id, []).append(one)
        self.parcels.put([one for one, _ in found])

    @rule(count=st.integers(0, 3))
    def put_first(self, count):
        found = [*itertools.islice(self.fresh, count)]
        self.urgent += found
        self.parcels.put_first(found)

    @rule(records=st.integers(1, 6), bytes_=st.integers(0, 3000))
    def take(self, records, bytes_):
        if not len(self.parcels):
            with pytest.raises(IndexError):
                self.parcels.take(Room())
            return
        parcel = self.parcels.take(Room(records=records, bytes=bytes_))
        if self.urgent:
            assert parcel == [self.urgent.pop(0)], "urgent ones first, in order, each alone"
            return
        address = self.addresses[parcel[0].id]
        queue = self.waiting[address or parcel[0].id]
        assert parcel == queue[: len(parcel)], "of one address, in order"
        assert len(parcel) <= records
        assert len(parcel) == 1 or sum(len(one.envelope) for one in parcel) <= bytes_
        more = queue[len(parcel) : len(parcel) + 1]
        assert not more or len(parcel) == records or sum(len(one.envelope) for one in [*parcel, *more]) > bytes_
        del queue[: len(parcel)]

    @rule()
    def clear(self):
        assert sorted(one.id for one in self.parcels.clear()) == sorted(one.id for one in self.left())
        self.waiting, self.urgent = {}, []

    def left(self):
        return [*self.urgent, *itertools.chain.from_iterable(self.waiting.values())]

    @invariant()
    def nothing_is_lost(self):
        assert len(self.parcels) == len(self.left())


TestGrouping = Grouping.TestCase


@given(flood=st.integers(2, 20))
def test_topic_with_many_records_holds_up_no_other(flood):
    addresses = {one.id: "flood" for one in NAMED[:flood]} | {NAMED[flood].id: "rare"}
    parcels = Parcels(lambda one: addresses[one.id])
    parcels.put(NAMED[: flood + 1])
    parcels.take(Room(records=1))
    assert parcels.take(Room(records=1)) == [NAMED[flood]]


class Addressing:
    """An outlet that has one address for all."""

    def address(self, _record):
        return ("topic", "cn")


def loading(records=8):
    patience = Patience(lambda: 0.5)
    made = Loading(records, patience)
    made.outlet = Addressing()
    return made, patience


def test_doubted_endpoint_gets_one_record_at_a_time_until_it_is_trusted_again():
    made, patience = loading()
    assert made.wanted(1) == 32
    patience.lost([[NAMED[300].id]], 0.0)
    made.ready.put(NAMED[:20])
    assert made.wanted(1) == 1
    assert made.next(None) == NAMED[:1]
    patience.accepted([NAMED[0].id], 1)
    assert made.next(None) == NAMED[1:9]


def test_records_whose_batch_was_first_in_flight_when_the_connection_was_lost_go_alone_until_they_are_taken():
    made, patience = loading()
    first, second = NAMED[:3], NAMED[3:6]
    patience.lost([[one.id for one in first], [one.id for one in second]], 0.0)
    patience.accepted([], 1)
    made.ready.put([*first, *second])
    assert [made.next(None) for _ in range(4)] == [[NAMED[0]], [NAMED[1]], [NAMED[2]], second]
    patience.accepted([NAMED[0].id], 1)
    made.ready.put(first)
    assert made.next(None) == [NAMED[0]]
    assert patience.alone(NAMED[1].id)
    assert not patience.alone(NAMED[0].id)


def test_so_many_records_are_remembered_as_apart_and_no_more():
    patience = Patience(lambda: 0.5)
    patience.rejected([f"id-{number}" for number in range(MOST_ASIDE + 1)])
    assert not patience.alone("id-0")
    assert patience.alone("id-1")
    assert patience.alone(f"id-{MOST_ASIDE}")
