import tomllib
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from agent.errors import InvalidConfigError
from agent.messages import Basis, Capture, Hold, Priority, Publish, Record, Refuse, State, Whereabouts
from agent.policy import UNLISTED, Cleared, Policy, is_loopback
from agent.settings.config import load_policy
from agent.settings.policy_config import DataClass, Endpoint, PolicyConfig, Region, Rule

EXAMPLE = Path(__file__).parent.parent / "systemd" / "policy.example.toml"
REGIONS = {"cn": ["CN"], "hk": ["HK"], "eea": ["DE", "FR"]}
ENDPOINTS = ["a", "b", "c"]


EVERYTHING = Rule(topic="#", action="forward", data_class="data")


def policy_of(permit, *, rules=(EVERYTHING,), classes=None, endpoints=None, regions=None):
    return Policy(
        PolicyConfig(
            version="test",
            regions={name: Region(countries=countries) for name, countries in (regions or REGIONS).items()},
            endpoints=endpoints or {name: Endpoint(host=f"{name}.example.com") for name in ENDPOINTS},
            classes=classes or {"data": DataClass()},
            permit=permit,
            rules=list(rules),
        )
    )


def record(regions, data_class="data", topic="t"):
    return Record(
        id="1",
        state=State.PENDING,
        route=("a",),
        regions=tuple(regions),
        basis=Basis.GNSS,
        data_class=data_class,
        topic=topic,
        priority=Priority.LIVE,
        capture=Capture(time_ns=0, monotonic_ns=0),
        recorded_ns=0,
        expires_ns=1,
        sequence=1,
        envelope=b"",
    )


permits = st.dictionaries(
    st.sampled_from(list(REGIONS)),
    st.fixed_dictionaries({"data": st.lists(st.sampled_from(ENDPOINTS), unique=True)}),
)
candidates = st.lists(st.sampled_from([*REGIONS, UNLISTED]), min_size=1, unique=True).map(lambda x: tuple(sorted(x)))
countries = st.sampled_from(["", "CN", "HK", "DE", "US"])


def model_permits(permit, regions, endpoint):
    """The reference: every candidate's own row must name the endpoint."""
    return all(endpoint in permit.get(region, {}).get("data", []) for region in regions)


@given(permits, candidates)
def test_an_endpoint_is_permitted_only_if_every_candidate_permits_it(permit, regions):
    policy = policy_of(permit)
    expected = {name for name in ENDPOINTS if model_permits(permit, regions, name)}
    assert set(policy.permitted(regions, "data")) == expected


@given(permits, candidates, countries, st.booleans())
def test_decision_never_names_an_endpoint_that_a_candidate_forbids(permit, regions, registration, bound):
    policy = policy_of(permit, classes={"data": DataClass(registration_bound=bound)})
    decision = policy.decide("data", Whereabouts(regions=regions), registration)
    asked = set(regions)
    if bound:
        asked |= set(policy.regions_of([registration] if registration else []))
    allowed = {name for name in ENDPOINTS if model_permits(permit, asked, name)}
    if isinstance(decision, Publish):
        assert set(decision.endpoints) == allowed
        assert allowed
    else:
        assert not allowed


@given(permits, candidates, st.sampled_from(Basis))
def test_doubt_that_fixes_may_end_holds_and_all_else_refuses(permit, regions, basis):
    policy = policy_of(permit)
    decision = policy.decide("data", Whereabouts(regions=regions, basis=basis))
    hope = len(regions) > 1 and any(model_permits(permit, [region], name) for region in regions for name in ENDPOINTS)
    hope = hope and basis is Basis.GNSS
    allowed = any(model_permits(permit, regions, name) for name in ENDPOINTS)
    expected = Publish if allowed else Hold if hope else Refuse
    assert isinstance(decision, expected)


@given(permits, candidates, st.sampled_from([*ENDPOINTS, "unknown"]))
def test_the_last_line_clears_exactly_what_every_candidate_permits(permit, regions, endpoint):
    cleared = policy_of(permit).clear(record(regions), endpoint)
    assert (cleared is not None) == model_permits(permit, regions, endpoint)
    if cleared is not None:
        assert (cleared.record.regions, cleared.endpoint) == (regions, endpoint)


@given(
    permits,
    st.lists(
        st.tuples(
            candidates,
            st.sampled_from(["data", "other"]),
            st.sampled_from(["secret", "open"]),
            st.sampled_from(ENDPOINTS),
            countries,
        ),
        max_size=10,
    ),
)
def test_what_was_decided_about_one_record_is_remembered_for_no_other(permit, asked):
    classes = {"data": DataClass(), "other": DataClass(registration_bound=True)}
    rules = [Rule(topic="secret", action="refuse"), EVERYTHING]
    policy = policy_of(permit, rules=rules, classes=classes)
    for regions, data_class, topic, endpoint, registration in asked:
        fresh = policy_of(permit, rules=rules, classes=classes)
        one = record(regions, data_class, topic)
        assert policy.clear(one, endpoint, registration) == fresh.clear(one, endpoint, registration)


@pytest.mark.parametrize("own", [f"class-{number}" for number in range(8)])
def test_stored_record_of_two_classes_keeps_the_order_of_its_own(own):
    classes = {own: DataClass(), "data": DataClass()}
    policy = policy_of({"cn": {own: ["b", "a", "c"], "data": ["a", "b"]}}, classes=classes)
    stored = record(["cn"], data_class=own)
    decision = policy.again(stored, Whereabouts(regions=stored.regions, basis=stored.basis))
    assert decision == Publish(endpoints=("b", "a"))


def test_nothing_but_the_policy_makes_a_clearance():
    with pytest.raises(TypeError):
        Cleared(record=record(["cn"]), endpoint="a", seal=object())


def test_record_without_candidates_or_of_an_unknown_class_is_not_cleared():
    policy = policy_of({"cn": {"data": ["a"]}})
    assert policy.clear(record([]), "a") is None
    assert policy.clear(record(["cn"], "other"), "a") is None


def test_first_rule_that_matches_decides():
    first = Rule(topic="car/cabin/#", action="refuse")
    second = Rule(topic="car/#", action="forward", data_class="data")
    policy = policy_of({}, rules=[first, second])
    assert policy.rule_for("car/cabin/left") is first
    assert policy.rule_for("car/speed") is second
    assert policy.rule_for("bus/speed") is None


def test_country_of_no_region_is_unlisted_and_permits_nothing():
    policy = policy_of({"cn": {"data": ["a"]}})
    assert policy.regions_of(["CN", "XK"]) == ("cn", UNLISTED)
    assert isinstance(policy.decide("data", Whereabouts(regions=(UNLISTED,))), Refuse)


def test_no_country_at_all_means_every_region():
    policy = policy_of({})
    assert policy.regions_of([]) == ("cn", "eea", "hk", UNLISTED)


def test_order_of_preference_is_kept_and_shared_fairly():
    policy = policy_of({"cn": {"data": ["b", "a", "c"]}, "hk": {"data": ["b", "c", "a"]}})
    assert policy.permitted(("cn",), "data") == ("b", "a", "c")
    assert policy.permitted(("cn", "hk"), "data") == ("b", "a", "c")


def mistakes(**changes):
    with pytest.raises(InvalidConfigError) as caught:
        policy_of(changes.pop("permit", {}), **changes)
    return {mistake.key: mistake for mistake in caught.value.mistakes}


def test_references_to_nothing_are_mistakes_with_their_keys():
    found = mistakes(permit={"xx": {"data": []}, "cn": {"other": ["a"], "data": ["nowhere"]}})
    assert set(found) == {"permit.xx", "permit.cn.other", "permit.cn.data"}
    assert found["permit.cn.data"].found == "nowhere"
    assert "a, b, c" in found["permit.cn.data"].wanted


def test_endpoint_without_tls_is_a_mistake_unless_it_is_loopback():
    bad = {"a": Endpoint(host="10.0.0.1", tls=False)}
    assert "endpoints.a.tls" in mistakes(endpoints=bad)
    for host in ("127.0.0.1", "::1", "localhost"):
        policy_of({}, endpoints={"a": Endpoint(host=host, tls=False)})
    assert not is_loopback("localhost.example.com")


def test_every_kind_of_nonsense_is_named():
    found = mistakes(
        endpoints={
            "a": Endpoint(host="a.example.com", topic="{nothing}", networks=["300.0.0.0/8"]),
            "b": Endpoint(host="b.example.com", wire="binary", protocol="3.1.1"),
        },
        rules=[Rule(topic="a/#/b", action="forward", data_class="nothing", capture_time="ts")],
        regions={"one": ["CN"], "two": ["CN"], UNLISTED: ["FR"]},
    )
    assert set(found) == {
        "endpoints.a.topic",
        "endpoints.a.networks",
        "endpoints.b.wire",
        "rules[0].topic",
        "rules[0].class",
        "rules[0].capture_time",
        "regions.two.countries",
        "regions.unlisted",
    }


def test_unreachable_rule_and_unused_endpoint_are_warned_of():
    rules = [
        Rule(topic="car/#", action="refuse"),
        Rule(topic="car/speed", action="forward", data_class="data"),
    ]
    warnings = list(policy_of({"cn": {"data": ["a"]}}, rules=rules).warnings())
    assert warnings == [
        "rules[1] (car/speed) is never reached: car/# comes first",
        "endpoints.b is permitted to no region",
        "endpoints.c is permitted to no region",
    ]


@pytest.mark.parametrize(
    "own", [{"wire": "binary"}, {"protocol": "3.1.1"}, {"wire": "binary", "protocol": "3.1.1"}], ids=str
)
def test_batches_need_envelopes_and_mqtt_5(own):
    endpoints = {name: Endpoint(host=f"{name}.example.com") for name in ENDPOINTS}
    endpoints["a"] = Endpoint(host="a.example.com", batch_records=2, **own)
    with pytest.raises(
        InvalidConfigError, match=r'a\.batch_records: found 2, wanted 1: .* wire = "msgpack" and protocol = "5"'
    ):
        policy_of({"cn": {"data": ["a"]}}, endpoints=endpoints)
    endpoints["a"] = Endpoint(host="a.example.com", batch_records=2)
    policy_of({"cn": {"data": ["a"]}}, endpoints=endpoints)


def test_compression_without_batches_is_worth_a_warning():
    endpoints = {name: Endpoint(host=f"{name}.example.com", batch_compression="zstd") for name in ENDPOINTS}
    warnings = [*policy_of({"cn": {"data": [*ENDPOINTS]}}, endpoints=endpoints).warnings()]
    assert "endpoints.a.batch_compression does nothing while batch_records is 1" in warnings


def test_example_policy_permits_exactly_what_its_own_table_says():
    policy = Policy(load_policy(EXAMPLE), EXAMPLE)
    raw = tomllib.loads(EXAMPLE.read_text())
    regions = [*raw["regions"], UNLISTED]
    topics = {"picture": "vehicle/camera/front", "telemetry": "vehicle/telemetry/speed", "location": "vehicle/gnss"}
    compared = 0
    for region in regions:
        for data_class in raw["classes"]:
            for endpoint in raw["endpoints"]:
                written = endpoint in raw["permit"].get(region, {}).get(data_class, [])
                cleared = policy.clear(record([region], data_class, topics[data_class]), endpoint) is not None
                assert cleared == written, (region, data_class, endpoint)
                compared += 1
    assert compared == len(regions) * len(raw["classes"]) * len(raw["endpoints"])
    assert not list(policy.warnings())


def test_example_policy_permits_two_candidates_only_what_both_rows_say():
    policy = Policy(load_policy(EXAMPLE), EXAMPLE)
    raw = tomllib.loads(EXAMPLE.read_text())
    for pair in combinations(sorted([*raw["regions"], UNLISTED]), 2):
        for data_class in raw["classes"]:
            rows = [raw["permit"].get(region, {}).get(data_class, []) for region in pair]
            assert set(policy.permitted(pair, data_class)) == set(rows[0]) & set(rows[1]), (pair, data_class)


def test_example_policy_never_lets_chinese_data_out_and_gives_cabin_pictures_no_route():
    policy = Policy(load_policy(EXAMPLE), EXAMPLE)
    for data_class in policy.config.classes:
        assert policy.permitted(("cn",), data_class) == ("cn",)
        assert policy.permitted(("cn", "hk"), data_class) == ()
    rule = policy.rule_for("vehicle/camera/cabin/left")
    assert rule is not None
    assert rule.action == "refuse"
    assert policy.rule_for("vehicle/camera/cabin").action == "refuse"


def test_reach_of_every_region_where_the_vehicle_may_be_limits_the_connections():
    regions = {"cn": Region(countries=["CN"], reach=["a"]), "hk": Region(countries=["HK"])}
    endpoints = {name: Endpoint(host=f"{name}.example.com") for name in ENDPOINTS}
    config = PolicyConfig(version="1", regions=regions, endpoints=endpoints, classes={}, permit={}, rules=[])
    policy = Policy(config)
    assert policy.reachable(["cn"], "a")
    assert not policy.reachable(["cn"], "b")
    assert policy.reachable(["hk"], "b")
    assert not policy.reachable(["cn", "hk"], "b")
    assert policy.reachable([UNLISTED], "b")
    with pytest.raises(InvalidConfigError, match=r"regions\.cn\.reach"):
        Policy(replace(config, regions={"cn": Region(countries=["CN"], reach=["nowhere"])}))
