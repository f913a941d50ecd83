import contextlib
import dataclasses
from dataclasses import dataclass

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from worlds import COUNTRIES, SEA, STRIPE_M, Drive, Stripes, country, fix, lie, message

from agent.errors import RefusedError
from agent.intake.line import Line, Numbering
from agent.messages import Basis, Hold, Message, Publish, Record, State
from agent.payloads.fields import CoarsePosition, FieldRules
from agent.payloads.inspection import InspectionLimits
from agent.pipeline import Identity, Pipeline, Stamp
from agent.places.positions import PositionHistory
from agent.policy import UNLISTED, Policy
from agent.settings.policy_config import CoarsenTime, DataClass, Endpoint, Fields, PolicyConfig, Region, Rule
from agent.store.entries import Refused
from agent.wire.envelope import unpack

ENDPOINTS = ("a", "b", "c")
REGIONS = ("one", "two", "three")
TOP_SPEED = 60.0  # m/s, below the 70 that the history allows


# --- the reference model ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Law:
    """The policy as plain data: which region a country is in, and what each region permits."""

    region_of: dict
    permit: dict
    bound: bool
    registration: str

    def region(self, name):
        return self.region_of.get(name, UNLISTED)

    def permits(self, regions, endpoint):
        asked = set(regions)
        if self.bound:
            asked |= {self.region(self.registration)} if self.registration else {*self.region_of.values(), UNLISTED}
        return all(endpoint in self.permit.get(region, ()) for region in asked)


# --- scenarios ----------------------------------------------------------------------------------------------------


@st.composite
def laws(draw):
    region_of = draw(st.dictionaries(st.sampled_from(COUNTRIES), st.sampled_from(REGIONS), min_size=1))
    rows = st.lists(st.sampled_from(ENDPOINTS), unique=True)
    permit = {region: draw(rows) for region in sorted(set(region_of.values()))}
    registration = draw(st.sampled_from(["", *COUNTRIES]))
    return Law(region_of=region_of, permit=permit, bound=draw(st.booleans()), registration=registration)


@st.composite
def drives(draw):
    seconds, x = 0.0, draw(st.floats(-500, len(COUNTRIES) * STRIPE_M + 500))
    stops = [(seconds, x)]
    speeds = st.one_of(st.just(0.0), st.floats(-15, 15), st.floats(-TOP_SPEED, TOP_SPEED))
    for duration, speed in draw(st.lists(st.tuples(st.floats(1, 300), speeds), min_size=1, max_size=5)):
        seconds, x = seconds + duration, x + duration * speed
        stops.append((seconds, x))
    return Drive(stops=tuple(stops))


@st.composite
def scenarios(draw, lies=0):
    """A law, a drive, and (arrival, captured or None, thing) of every fix and message in order of arrival."""
    drive = draw(drives())
    moments = st.floats(0, drive.seconds)
    events = []
    for seconds in draw(st.lists(moments, min_size=2, max_size=20)):
        latency = draw(st.floats(0, 0.49))
        seen = fix(
            drive,
            seconds,
            accuracy_m=draw(st.floats(1, 300)),
            error=draw(st.floats(-1, 1)),
            latency_s=latency,
        )
        events.append((seconds + latency, None, seen))
    if lies:
        places = st.sampled_from([-(10.0**6), 2.0 * 10**6])
        events += [(at, None, lie(at, draw(places))) for at in draw(st.lists(moments, max_size=lies))]
    for captured in draw(st.lists(moments, min_size=1, max_size=6)):
        states_time = draw(st.booleans())
        delay = draw(st.floats(0, 500 if states_time else 1.9))
        skew = draw(st.floats(-0.99, 0.99))
        made = message(captured, captured + delay, states_time=states_time, skew_s=skew)
        events.append((captured + delay, captured, made))
    return draw(laws()), drive, sorted(events, key=lambda event: event[0])


def pipeline_of(law):
    regions = {name: [c for c, region in law.region_of.items() if region == name] for name in law.region_of.values()}
    policy = Policy(
        PolicyConfig(
            version="1",
            regions={name: Region(countries=countries) for name, countries in regions.items()},
            endpoints={name: Endpoint(host=f"{name}.example.com") for name in ENDPOINTS},
            classes={"data": DataClass(registration_bound=law.bound)},
            permit={name: {"data": list(row)} for name, row in law.permit.items()},
            rules=[
                Rule(topic="car/stated", action="forward", data_class="data", capture_time="/ts", capture_unit="ns"),
                Rule(topic="car/plain", action="forward", data_class="data"),
            ],
        )
    )
    return Pipeline(
        identity=Identity(source="urn:test", boot_id="boot", registration=law.registration),
        policy=policy,
        borders=Stripes(),
        positions=PositionHistory(boot_id="boot"),
        limits=InspectionLimits(),
        signer=None,
    )


class Run:
    """The straight line with everything around it that decides: takes events, looks again at what is held."""

    def __init__(self, law, drive):
        self.law, self.drive, self.line = law, drive, pipeline_of(law)
        self.held = {}
        self.outcomes = []

    def take(self, thing, captured):
        if isinstance(thing, Message):
            self._message(thing, captured)
            return
        self.line.positions.add(thing)
        for number in list(self.held):
            self._look_again(number)

    def _message(self, received, captured):
        truth = self.law.region(country(self.drive.x(captured)))
        plan = self._examine(received)
        if plan is None:
            assert not any(self.law.permits([truth], name) for name in ENDPOINTS), "doubt must hold, not refuse"
            self.outcomes.append("refused")
            return
        record = self.line.record(plan, received.payload, None, Stamp(record_id="1", sequence=1, now_ns=1))
        assert record.regions == plan.whereabouts.regions
        self.check(record, truth)
        if isinstance(plan.decision, Hold):
            assert record.state is State.HELD
            self.held[len(self.outcomes)] = record, truth
        self.outcomes.append(type(plan.decision).__name__)

    def _examine(self, received):
        with contextlib.suppress(RefusedError):
            return self.line.examine(received)
        return None

    def _look_again(self, number):
        record, truth = self.held[number]
        whereabouts = self.line.narrowed(record)
        if whereabouts is None:
            return
        assert truth in whereabouts.regions
        assert set(whereabouts.regions) < set(record.regions)
        decision = self.line.verdict(record, whereabouts)
        if isinstance(decision, Publish):
            released = self.line.release(record, whereabouts, decision.endpoints, 1)
            assert released.regions == whereabouts.regions
            self.check(released, truth)
            self.outcomes[number] = "released"
        if not isinstance(decision, Hold):
            del self.held[number]

    def check(self, record: Record, truth):
        """What must be true of every record: the true region is a candidate, and every candidate permits the route."""
        assert truth in record.regions
        for endpoint in ENDPOINTS:
            permitted = self.law.permits(record.regions, endpoint)
            assert (endpoint in record.route) == permitted
            assert (self.line.policy.clear(record, endpoint, self.law.registration) is not None) == permitted


QUIET = [HealthCheck.too_slow, HealthCheck.data_too_large]


@settings(max_examples=120, suppress_health_check=QUIET)
@given(scenarios())
def test_no_record_is_routed_where_a_region_that_it_may_come_from_forbids_it(scenario):
    law, drive, events = scenario
    run = Run(law, drive)
    for _, captured, thing in events:
        run.take(thing, captured)


@settings(max_examples=60, suppress_health_check=QUIET)
@given(scenarios(lies=6))
def test_lies_of_the_receiver_route_nothing_out_of_the_true_region(scenario):
    law, drive, events = scenario
    run, truthful = Run(law, drive), []
    for arrival, captured, thing in events:
        if not isinstance(thing, Message):
            truthful += [arrival] if thing.latitude == 0 else []
            run.line.positions.add(thing)
            continue
        if any(abs(moment - captured) < 500 for moment in truthful):
            run.take(thing, captured)


def test_the_properties_are_tried_in_all_their_branches():
    """Without it the properties above could pass because every record is refused."""
    found = set()

    @settings(max_examples=150, database=None, derandomize=True, suppress_health_check=QUIET)
    @given(scenarios())
    def explore(scenario):
        law, drive, events = scenario
        run = Run(law, drive)
        for _, captured, thing in events:
            run.take(thing, captured)
        found.update(run.outcomes)

    explore()
    assert found == {"Publish", "Hold", "released", "refused"}, found


# --- examples -----------------------------------------------------------------------------------------------------

LAW = Law(
    region_of={"AA": "one", "BB": "two", "CC": "two"}, permit={"one": ["a"], "two": ["b"]}, bound=False, registration=""
)
STANDING = Drive(stops=((0.0, 1500.0), (3600.0, 1500.0)))


def standing(line, seconds, x=1500.0):
    for at in seconds:
        line.positions.add(fix(Drive(stops=((0.0, x), (3600.0, x))), at, accuracy_m=5.0, error=0.0, latency_s=0.1))


def test_record_far_from_every_border_has_one_candidate():
    line = pipeline_of(LAW)
    standing(line, range(10))
    plan = line.examine(message(9.5, 9.6, states_time=False))
    assert plan.whereabouts.regions == ("one",)
    assert plan.decision == Publish(endpoints=("a",))


def test_record_is_held_when_the_last_fix_is_stale():
    line = pipeline_of(LAW)
    standing(line, range(10))
    plan = line.examine(message(109.0, 109.0, states_time=False))
    assert set(plan.whereabouts.regions) == {"one", "two", UNLISTED}, "in 100 s a car drives 7 km"
    assert isinstance(plan.decision, Hold)


def test_fix_beyond_the_largest_age_says_nothing():
    line = pipeline_of(LAW)
    standing(line, range(10))
    young, old = (line.examine(message(9 + age, 9 + age, states_time=False)).capture for age in (590.0, 610.0))
    assert line.positions.discs(young)
    assert line.positions.discs(old) == ()


def test_record_without_any_fix_may_come_from_everywhere():
    plan = pipeline_of(LAW).examine(message(1.0, 1.0, states_time=False))
    assert plan.whereabouts.regions == ("one", "two", UNLISTED)
    assert isinstance(plan.decision, Hold)


def test_fixes_that_contradict_each_other_leave_every_region_open():
    line = pipeline_of(LAW)
    standing(line, range(5))
    line.positions.add(lie(5.0, 10.0**6))
    line.positions.add(lie(6.0, 10.0**6))
    assert line.examine(message(6.0, 6.0, states_time=False)).whereabouts.regions == ("one", "two", UNLISTED)


def test_held_record_is_narrowed_and_never_widened():
    line = pipeline_of(LAW)
    received = message(5.0, 5.0, states_time=False)
    plan = line.examine(received)
    record = line.record(plan, received.payload, None, Stamp(record_id="1", sequence=0, now_ns=1))
    standing(line, range(6, 16))
    narrow = line.narrowed(record)
    assert narrow.regions == ("one",)
    released = line.release(record, narrow, ("a",), 1)
    standing(line, range(100, 110), x=4500.0)
    assert line.narrowed(released) is None, "where the car went later says nothing about the capture"


def test_held_record_expires_after_the_hold_time_and_a_released_one_after_its_whole_life():
    line, received = pipeline_of(LAW), message(5.0, 5.0, states_time=False)
    plan = line.examine(received)
    record = line.record(plan, received.payload, None, Stamp(record_id="1", sequence=0, now_ns=1000))
    assert (record.state, record.route, record.expires_ns) == (State.HELD, (), 1000 + 3600 * 10**9)
    standing(line, range(6, 16))
    released = line.release(record, line.narrowed(record), ("a",), 7)
    assert (released.state, released.route) == (State.PENDING, ("a",))
    assert released.expires_ns == 1000 + 7 * 86_400 * 10**9
    attributes = unpack(released.envelope).attributes
    assert (attributes.dataregion, attributes.sequence, attributes.policyversion) == (("one",), 7, "1")
    assert unpack(record.envelope).attributes.dataregion == ("one", "two", UNLISTED)


def test_registration_and_a_fixed_country_stand_in_for_the_position():
    line = pipeline_of(LAW)
    standing(line, range(10))
    rented = Rule(topic="car/plain", action="forward", data_class="data", basis="registration")
    capture = line.examine(message(9.5, 9.6, states_time=False)).capture
    for identity, rule, expected in (
        (Identity(source="s", boot_id="boot", registration="BB"), rented, (("two",), Basis.REGISTRATION)),
        (Identity(source="s", boot_id="boot"), rented, (("one", "two", UNLISTED), Basis.REGISTRATION)),
        (
            Identity(source="s", boot_id="boot", fixed_country="CC"),
            line.policy.config.rules[1],
            (("two",), Basis.FIXED),
        ),
    ):
        found = dataclasses.replace(line, identity=identity).locate(rule, capture)
        assert (found.regions, found.basis) == expected


def test_only_a_record_that_rests_on_the_position_is_narrowed():
    line, received = pipeline_of(LAW), message(5.0, 5.0, states_time=False)
    record = line.record(line.examine(received), b"", None, Stamp(record_id="1", sequence=0, now_ns=1))
    standing(line, range(6, 16))
    assert line.narrowed(record) is not None
    assert line.narrowed(replace(record, basis=Basis.REGISTRATION)) is None


def test_sea_is_a_region_that_permits_nothing():
    assert country(-1.0) == SEA
    line = pipeline_of(LAW)
    standing(line, range(10), x=-1500.0)
    with pytest.raises(RefusedError, match=r"region\.not-permitted"):
        line.examine(message(9.5, 9.6, states_time=False))


async def test_a_message_that_is_refused_last_of_all_takes_no_number():
    rules = FieldRules(positions=(CoarsePosition(latitude="/lat", longitude="/lon", metres=1000.0),))
    pipeline = pipeline_of(LAW)
    pipeline = dataclasses.replace(
        pipeline,
        identity=Identity(source="s", boot_id="boot", fixed_country="CC"),
        field_rules={"car/plain": rules},
    )
    line, received = Line(pipeline, None, Numbering({})), message(5.0, 5.0, states_time=False)
    payloads = (b'{"lat": 22.5, "lon": 114.0}', b'{"lat": "no fix", "lon": 114.0}', b'{"lat": 22.5, "lon": 114.0}')
    first, refused, second = [await line.entry(replace(received, payload=payload), None) for payload in payloads]
    assert isinstance(refused, Refused)
    assert [first.record.sequence, second.record.sequence] == [1, 2]


async def test_neither_times_nor_id_of_a_record_tell_what_its_rule_makes_coarse():
    pipeline = pipeline_of(LAW)
    rule = Rule(
        topic="car/plain",
        action="forward",
        data_class="data",
        fields=Fields(times=[CoarsenTime(place="/ts", seconds=3600)]),
    )
    policy = Policy(msgspec.structs.replace(pipeline.policy.config, rules=[rule]))
    pipeline = dataclasses.replace(
        pipeline, policy=policy, identity=Identity(source="s", boot_id="boot", fixed_country="CC")
    )
    now_ns = 1_795_000_000_123_456_789
    line = Line(pipeline, None, Numbering({}), lambda: now_ns)
    stored = await line.entry(message(5.0, 5.0, states_time=False), None)
    attributes = unpack(stored.record.envelope).attributes
    hour = 3600 * 10**9
    assert int(attributes.id[:16], 16) == attributes.recordedtime_ns == now_ns - now_ns % hour
    assert attributes.time_ns % hour == 0
