"""Deciding again under another policy: what it permits, what it takes back, and what a crash in the middle leaves."""

import asyncio
import shutil
from collections import Counter
from contextlib import asynccontextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ledger_samples import in_memory
from msgspec import structs
from stream import TELEMETRY

from agent.board import Board
from agent.intake.intake import EVER_NS, Fixes, Inward
from agent.intake.line import Line, Numbering
from agent.intake.resolver import Resolver
from agent.messages import Basis, Capture, Disc, Hold, Priority, Record, Refuse, State, Whereabouts
from agent.payloads.inspection import InspectionLimits
from agent.pipeline import Identity, Pipeline
from agent.places.positions import PositionHistory
from agent.policy import UNLISTED, Policy
from agent.settings.policy_config import DataClass, Endpoint, PolicyConfig, Region, Rule
from agent.store.blobs import Blobs
from agent.store.committer import CommitOptions, Committer
from agent.store.entries import MIB, LedgerLimits, Refused, Store
from agent.store.ledger import Ledger
from agent.wire.envelope import pack, unpack

COUNTRIES = ("AA", "BB", "CC", "DD")
NAMES = ("one", "two", "three")
ENDPOINTS = ("a", "b", "c")
CLASSES = ("x", "y")
TOPICS = ("t/1", "t/2")
SECOND = 10**9


@dataclass(frozen=True)
class Law:
    """A policy as a test thinks of it."""

    region_of: dict  # country -> name of its region; a country that is missing is unlisted
    permit: dict  # (name, class) -> endpoints
    class_of: dict  # topic -> class; "" is refused, a topic that is missing has no rule
    ttl_s: float = 3600.0

    def policy(self, version="1"):
        named = {name: [c for c, found in self.region_of.items() if found == name] for name in NAMES}
        regions = {name: Region(countries=countries) for name, countries in named.items() if countries}
        rules = [
            Rule(topic=topic, action="forward" if name else "refuse", data_class=name)
            for topic, name in self.class_of.items()
        ]
        permit = {name: {c: list(self.permit.get((name, c), ())) for c in CLASSES} for name in regions}
        return Policy(
            PolicyConfig(
                version=version,
                regions=regions,
                endpoints={name: Endpoint(host=f"{name}.example.com") for name in ENDPOINTS},
                classes={name: DataClass(ttl_s=self.ttl_s) for name in CLASSES},
                permit=permit,
                rules=rules,
            )
        )

    def permits(self, country, data_class, endpoint):
        """The reference: the law of one country."""
        name = self.region_of.get(country, UNLISTED)
        return endpoint in self.permit.get((name, data_class), ())


class World:
    """The fixes and the borders of a test: what is known of a capture stands under its time."""

    def __init__(self):
        self.known = {}
        self.asked = []

    def discs(self, capture):
        number = capture.time_ns
        self.asked.append(number)
        return (Disc(latitude=float(number), longitude=0.0, radius_m=1.0),) if number in self.known else ()

    def countries_near(self, latitude, _longitude, _radius_m):
        return self.known[round(latitude)]


@dataclass
class Bench:
    """A ledger with what decides about it."""

    committer: Committer
    world: World
    line: Line
    board: Board = field(default_factory=Board)
    touched: dict = field(default_factory=dict)  # number -> its regions, countries in which it may have been captured

    def __post_init__(self):
        self.fixes = Fixes([], PositionHistory(boot_id="boot"))
        self.resolver = Resolver(Inward(line=self.line, committer=self.committer, fixes=self.fixes, board=self.board))

    @property
    def policy(self):
        return self.line.pipeline.policy

    def obey(self, policy):
        self.line.pipeline = replace(self.line.pipeline, policy=policy)

    async def take(self, number, countries, topic="t/1", **changes):
        """A message as the line takes it: refused, held or pending by the policy that holds now."""
        rule = self.policy.rule_for(topic)
        regions = self.policy.regions_of(countries)
        decision = Refuse(reason="policy.no-rule")
        if rule is not None and rule.action != "refuse":
            decision = self.policy.decide(rule.data_class, Whereabouts(regions=regions))
        if isinstance(decision, Refuse):
            await self.committer.submit(Refused(reason=decision.reason, time_ns=1))
            return
        self.touched[number] = regions, set(countries)
        made = self.record(number, regions, decision, topic, rule.data_class)
        await self.committer.submit(Store(record=structs.replace(made, **changes)))

    def record(self, number, regions, decision, topic, data_class):
        held = isinstance(decision, Hold)
        with nullcontext(0) if held else self.line.numbering.next(regions) as sequence:
            pass
        return Record(
            id=str(number),
            state=State.HELD if held else State.PENDING,
            route=() if held else decision.endpoints,
            regions=regions,
            basis=Basis.GNSS,
            data_class=data_class,
            topic=topic,
            priority=Priority.LIVE,
            capture=Capture(time_ns=number, monotonic_ns=1, boot_id="boot"),
            recorded_ns=SECOND,
            expires_ns=SECOND + 3600 * SECOND,
            sequence=sequence,
            envelope=pack(replace(TELEMETRY, id=str(number), dataregion=regions, sequence=1), b"1", None),
        )

    def published(self):
        """(record, endpoint) of all that the uplinks would publish now."""
        ledger = self.committer.ledger
        for endpoint in ENDPOINTS:
            for row in ledger.pending(endpoint, limit=1000, down=ENDPOINTS):
                if self.policy.clear(row.record, endpoint) is not None:
                    yield row.record, endpoint

    @property
    def counts(self):
        return self.committer.ledger.counts()

    def find(self, number):
        return self.committer.ledger.find(str(number))


@asynccontextmanager
async def bench(law):
    folder, world = in_memory(), World()
    pipeline = Pipeline(
        identity=Identity(source="urn:test", boot_id="boot"),
        policy=law.policy(),
        borders=world,
        positions=world,
        limits=InspectionLimits(),
        signer=None,
    )
    ledger = Ledger.open(folder / "ledger.db", LedgerLimits(reserve_bytes=65536))
    try:
        async with Committer(ledger, CommitOptions(max_delay_s=0.0)) as committer:
            yield Bench(committer, world, Line(pipeline, None, Numbering({})))
    finally:
        ledger.close()
        shutil.rmtree(folder)


class CrashError(Exception):
    """The agent dies here."""


async def change(it, law, version, meanings, crash_after):
    """What a reload, or a start with another policy, does; `crash_after` entries it begins anew."""
    policy = law.policy(version)
    for allowed in (crash_after, 10**9):
        with suppress(CrashError), dying(it.committer, allowed):
            shrunk = policy.shrunk(meanings)
            if shrunk:
                await it.resolver.give_up(shrunk)
            meanings = meanings | policy.meanings  # a name that is gone may come back
            it.obey(policy)
            check(it, law)  # the uplinks go on while records are decided again
            await it.resolver.review()
    check(it, law)
    return meanings


class dying:  # noqa: N801 - reads as a verb
    """Within it the committer takes so many entries, and then everything ends."""

    def __init__(self, committer, allowed):
        self.committer, self.left, self.submit = committer, allowed, committer.submit

    def __enter__(self):
        async def submit(*entries):
            for entry in entries:
                if self.left <= 0:
                    raise CrashError
                self.left -= 1
                await self.submit(entry)

        self.committer.submit = submit

    def __exit__(self, *_):
        self.committer.submit = self.submit


def check(it, law):
    """The contract: every country in which it may have been captured permits what is published; nothing is lost."""
    for record, endpoint in it.published():
        regions, countries = it.touched[int(record.id)]
        if record.regions != regions:
            countries = it.world.known[int(record.id)]
        for country in countries:
            assert law.permits(country, record.data_class, endpoint), (record, countries, endpoint)
    assert it.counts.conserved


rows = st.sampled_from([("a",), ("b",), ("a", "b"), ("b", "a"), ("c", "a", "b"), ()])
laws = st.builds(
    Law,
    region_of=st.fixed_dictionaries(
        {country: st.sampled_from(["one", "one", "two", UNLISTED]) for country in COUNTRIES}
    ),
    permit=st.fixed_dictionaries({(name, c): rows for name in ("one", "two") for c in CLASSES}),
    class_of=st.fixed_dictionaries({"t/1": st.just("x"), "t/2": st.sampled_from(["x", "y", ""])}),
)
places = st.sets(st.sampled_from(COUNTRIES), min_size=1, max_size=2)
messages = st.lists(st.tuples(places, st.sampled_from(TOPICS), st.booleans()), min_size=1, max_size=5)
steps = st.lists(st.tuples(laws, messages, st.integers(0, 6)), min_size=2, max_size=3)
SEEN = Counter()


async def drive(plan):
    """Take some messages under each law; then the next law comes."""
    first, *_ = plan
    async with bench(first[0]) as it:
        meanings, number = it.policy.meanings, 0
        for index, (law, taken, crash_after) in enumerate(plan):
            if index:
                meanings = await change(it, law, str(index), meanings, crash_after)
            for countries, topic, narrows in taken:
                number += 1
                await it.take(number, countries, topic)
                if narrows and number in it.touched:
                    it.world.known[number] = {min(countries)}  # a later fix says so
            it.fixes.look_again()
            await it.resolver._pass()
            check(it, law)
            SEEN.update(published=len(list(it.published())), refused=it.counts.refused, held=it.counts.held)


@settings(max_examples=70, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(steps)
def test_nothing_is_published_that_the_policy_of_the_day_forbids_in_any_country_of_the_capture(plan):
    asyncio.run(drive(plan))


def test_the_property_above_sees_records_that_go_that_wait_and_that_are_refused():
    SEEN.clear()
    settings(max_examples=30, database=None, derandomize=True, deadline=None)(given(steps)(_driven))()
    assert min(SEEN["published"], SEEN["refused"], SEEN["held"]) > 0, SEEN


def _driven(plan):
    asyncio.run(drive(plan))


# --- examples -----------------------------------------------------------------------------------------------------

LAW = Law(
    region_of={"AA": "one", "BB": "two"},
    permit={("one", "x"): ["a", "b"], ("two", "x"): ["b"], ("one", "y"): ["a"], ("two", "y"): ["b"]},
    class_of={"t/1": "x", "t/2": "y"},
)


async def decided(law, countries=("AA",), *, before=LAW, known=None):
    """(state, route or None, refusals by reason) of a record of `before` after the policy has changed to `law`."""
    async with bench(before) as it:
        await it.take(1, set(countries))
        if known is not None:
            it.world.known[1] = set(known)
        await change(it, law, "2", it.policy.meanings, 10**9)
        found = it.find(1)
        reasons = dict(it.counts.breakdown.get("refused", {}).get("reason", {}))
        version = unpack(found.envelope).attributes.policyversion if found else None
        return (found.state if found else None, found.route if found else None, reasons, version)


async def test_record_whose_route_is_still_permitted_is_not_touched():
    assert await decided(LAW) == (State.PENDING, ("a", "b"), {}, TELEMETRY.policyversion)


async def test_record_goes_where_the_new_policy_lets_it_and_says_which_policy_that_was():
    law = replace(LAW, permit=LAW.permit | {("one", "x"): ["c"]})
    assert await decided(law) == (State.PENDING, ("c",), {}, "2")


async def test_record_that_may_go_nowhere_any_more_is_refused():
    law = replace(LAW, permit={})
    assert await decided(law) == (None, None, {"region.not-permitted": 1}, None)


async def test_record_of_a_topic_that_is_refused_now_is_refused():
    assert (await decided(replace(LAW, class_of={"t/1": ""})))[2] == {"policy.refused": 1}
    assert (await decided(replace(LAW, class_of={})))[2] == {"policy.no-rule": 1}


async def test_record_whose_topic_is_of_another_class_now_goes_where_both_classes_may():
    assert (await decided(replace(LAW, class_of={"t/1": "y"})))[1] == ("a",)


async def test_record_of_two_regions_that_no_longer_agree_waits_until_its_region_is_known():
    law = replace(LAW, permit=LAW.permit | {("two", "x"): ["c"]})
    assert (await decided(law, ("AA", "BB")))[0] is State.HELD
    assert (await decided(law, ("AA", "BB"), known=("AA",)))[:2] == (State.PENDING, ("a", "b"))


async def test_held_record_is_released_when_its_regions_come_to_agree():
    before = replace(LAW, permit=LAW.permit | {("two", "x"): ["c"]})
    state, route, _, version = await decided(LAW, ("AA", "BB"), before=before)
    assert (state, route, version) == (State.PENDING, ("b",), "2")


async def test_fixes_cost_the_envelopes_of_the_records_that_they_settle_and_no_others(monkeypatch):
    before, read = replace(LAW, permit=LAW.permit | {("two", "x"): ["c"]}), []
    monkeypatch.setattr(Blobs, "read", lambda blobs, file, real=Blobs.read: read.append(file) or real(blobs, file))
    async with bench(before) as it:
        large = pack(replace(TELEMETRY, dataregion=("one", "two", UNLISTED)), bytes(LedgerLimits().inline_bytes), None)
        for number in range(1, 81):
            await it.take(number, {"AA", "BB", "CC"}, envelope=large)
        it.world.known |= {7: {"AA"}, 8: {"AA", "BB"}, 80: {"BB"}}
        await it.resolver._pass()
        assert len(read) == 2
        assert (it.find(7).route, it.find(8).route, it.find(80).route) == (("a", "b"), (), ("c",))
        assert (it.counts.held, it.counts.pending) == (78, 2)


async def test_records_that_are_too_large_for_one_read_are_all_released():
    async with bench(replace(LAW, permit=LAW.permit | {("two", "x"): ["c"]})) as it:
        large = pack(replace(TELEMETRY, dataregion=("one", "two", UNLISTED)), bytes(3 * MIB), None)
        for number in range(1, 5):
            await it.take(number, {"AA", "BB"}, envelope=large)
        it.world.known |= {number: {"AA"} for number in range(1, 5)}
        await it.resolver._pass()
        assert (it.counts.held, it.counts.pending) == (0, 4)


async def test_records_are_asked_about_at_first_and_then_only_where_there_is_news():
    async with bench(replace(LAW, permit=LAW.permit | {("two", "x"): ["c"]})) as it:
        for number, boot in ((1, "boot"), (2, "boot"), (3, "boot"), (4, "another")):
            capture = Capture(time_ns=number, monotonic_ns=number * SECOND, boot_id=boot)
            await it.take(number, {"AA", "BB"}, capture=capture)
        asked = []
        for news in ([], [], [3 * SECOND, 2 * SECOND], [4 * SECOND], [], [EVER_NS]):
            for since_ns in news:
                it.fixes.look_again(since_ns)
            it.world.asked.clear()
            await it.resolver._pass()
            asked.append(sorted(it.world.asked))
        assert asked == [[1, 2, 3], [], [2, 3], [], [], [1, 2, 3]]


async def test_region_that_lost_a_country_takes_its_records_with_it():
    before = replace(LAW, region_of={"AA": "one", "CC": "one", "BB": "two"})
    law = replace(LAW, region_of={"AA": "one", "CC": "two", "BB": "two"})
    assert (await decided(law, ("AA",), before=before))[2] == {"region.redefined": 1}
    assert (await decided(before, ("AA",), before=law))[1] == ("a", "b"), "one that gained a country does not"


async def test_region_that_the_policy_no_longer_knows_is_not_narrowed_away():
    law = replace(LAW, region_of={"AA": "one"})
    before = replace(LAW, permit=LAW.permit | {("two", "x"): ["c"]})
    assert (await decided(law, ("AA", "BB"), before=before, known=("AA", "BB")))[0] in (State.HELD, None)


async def test_record_lives_no_longer_than_the_new_policy_lets_it():
    async with bench(LAW) as it:
        await it.take(1, {"AA"})
        await change(it, replace(LAW, ttl_s=60.0), "2", it.policy.meanings, 10**9)
        assert it.find(1).expires_ns == SECOND + 60 * SECOND
        await change(it, replace(LAW, ttl_s=9000.0), "3", it.policy.meanings, 10**9)
        assert it.find(1).expires_ns == SECOND + 60 * SECOND


async def test_held_record_that_is_being_released_is_counted_without_a_number_of_its_stream():
    async with bench(replace(LAW, permit=LAW.permit | {("two", "x"): ["c"]})) as it:
        for number in (1, 2):
            await it.take(number, {"AA", "BB"})
        it.world.known |= {1: {"AA"}, 2: {"AA"}}
        it.board.claimed.add("1")  # as by a pass that waits for its commit
        assert await it.resolver.review() == (1, 1)
        it.board.claimed.clear()
        assert await it.resolver.review() == (1, 0)
        assert [it.find(number).sequence for number in (2, 1)] == [1, 2]


async def test_record_that_is_released_while_a_review_waits_for_a_reload_is_not_released_again():
    async with bench(replace(LAW, permit=LAW.permit | {("two", "x"): ["c"]})) as it:
        await it.take(1, {"AA", "BB"})
        it.world.known[1] = {"AA"}

        async def reload():
            async with it.line.turns.alone():
                pass

        async with asyncio.TaskGroup() as group, it.line.turns.deciding():
            group.create_task(reload())
            await asyncio.sleep(0)  # nobody begins to decide from now on
            review = group.create_task(it.resolver.review())
            await it.committer.call(lambda _: None)  # what the review would read by now, it has read
            rows = await it.committer.call(lambda ledger: ledger.spooled(limit=1))
            await it.resolver._change(rows, it.resolver._narrowed)  # a pass that began before
        assert review.result() == (0, 0)
        assert it.find(1).sequence == 1


async def test_record_that_an_uplink_has_claimed_is_left_to_it():
    async with bench(LAW) as it:
        await it.take(1, {"AA"})
        it.board.claimed.add("1")
        it.obey(replace(LAW, permit={}).policy("2"))
        assert await it.resolver.review() == (0, 1)
        it.board.claimed.clear()
        assert await it.resolver.review() == (1, 0)
        assert it.board.claimed == set()
