"""Each guard is taken away in turn, and the test that is named for it must fail; with all guards it passes."""

import dataclasses
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest
from paho.mqtt.client import Client

import agent.uplink.outlet
from agent.mqtt.client import DirectClient
from agent.pipeline import Pipeline
from agent.places.positions import PositionHistory, PositionLimits
from agent.places.tracks import Sighting
from agent.policy import _SEAL, Cleared, Policy
from agent.uplink import egress

TESTS = Path(__file__).parent


@dataclass(frozen=True)
class Guard:
    """`without` breaks the guard; `test` (file::name) is the one that must notice."""

    name: str
    test: str
    without: Callable[[pytest.MonkeyPatch], None]


def replace(owner, name, function):
    return lambda patch: patch.setattr(owner, name, function)


def any_candidate(policy, regions, data_class):
    """The union, where the intersection belongs."""
    return tuple(sorted({name for region in regions for name in policy._permit.get((region, data_class), ())}))


def without_registration(_policy, _data_class, whereabouts, _registration):
    return whereabouts.regions


def only_known(policy, countries):
    """Countries that no region names are forgotten, where they belong to the region that permits nothing."""
    found = {policy._region_of[country] for country in countries if country in policy._region_of}
    return tuple(sorted(found)) or policy.everywhere


def cleared_anyway(_policy, record, endpoint, _registration=""):
    return Cleared(record=record, endpoint=endpoint, seal=_SEAL)


def believing_any_age(history, limits=None, *, boot_id=""):
    made(history, dataclasses.replace(limits or PositionLimits(), max_age_ns=10**18), boot_id=boot_id)


def same_place(sighting, _moment_ns, _doubt_ns, _speed_mps):
    """The car stands still."""
    return sighting.radius_m


def first_track_only(history, capture):
    found = hypotheses(history, capture)
    return found[:1]


def widened(pipeline, record):
    """Where the car is known to be now, whatever was known of the capture."""
    regions = pipeline._regions(msgspec.structs.replace(record.capture, monotonic_ns=10**18))
    return msgspec.structs.replace(pipeline.locate(pipeline.policy.config.rules[0], record.capture), regions=regions)


def tls_that(**changes):
    """A context with other settings."""

    def build(rules):
        context = tls_context(rules)
        for name, value in changes.items():
            setattr(context, name, value)
        return context

    return replace(egress, "tls_context", build)


async def unjudged(rules):
    """What the name resolves to, whatever the networks say."""
    return await resolve(dataclasses.replace(rules, networks=(), tls=True))


made, hypotheses = PositionHistory.__init__, PositionHistory._hypotheses
tls_context, resolve = egress.tls_context, egress.resolve

POLICY, PIPELINE, EGRESS, OUTLET = "test_policy.py", "test_pipeline.py", "test_egress.py", "test_outlet.py"
GUARDS = [
    Guard(
        "intersection over the candidates",
        f"{POLICY}::test_example_policy_never_lets_chinese_data_out_and_gives_cabin_pictures_no_route",
        replace(Policy, "_permitted", any_candidate),
    ),
    Guard(
        "registration binds",
        "test_explain.py::test_class_that_is_bound_to_the_registration_asks_its_region_too",
        replace(Policy, "bound", without_registration),
    ),
    Guard(
        "a country without a region permits nothing",
        f"{POLICY}::test_country_of_no_region_is_unlisted_and_permits_nothing",
        replace(Policy, "regions_of", only_known),
    ),
    Guard(
        "second permission check",
        f"{OUTLET}::test_record_that_the_policy_permits_no_longer_is_withdrawn_and_never_sent",
        replace(Policy, "clear", cleared_anyway),
    ),
    Guard(
        "reach",
        f"{POLICY}::test_reach_of_every_region_where_the_vehicle_may_be_limits_the_connections",
        replace(Policy, "reachable", lambda *_: True),
    ),
    Guard(
        "only what was cleared is published",
        f"{OUTLET}::test_outlet_takes_nothing_but_what_was_cleared_for_its_endpoint",
        replace(agent.uplink.outlet, "Cleared", object),
    ),
    Guard(
        "seal of a clearance",
        f"{OUTLET}::test_clearance_cannot_be_carried_over_to_another_record_or_endpoint",
        replace(Cleared, "__post_init__", lambda *_: None),
    ),
    Guard(
        "network check of what a name resolves to",
        f"{EGRESS}::test_name_that_suddenly_resolves_elsewhere_is_not_used",
        replace(egress, "resolve", unjudged),
    ),
    Guard(
        "network check of the connected peer",
        f"{EGRESS}::test_connected_address_outside_the_networks_gets_no_byte_of_mqtt",
        replace(egress, "permitted", lambda *_: True),
    ),
    Guard(
        "pin of the server's key",
        f"{EGRESS}::test_wrong_pin_is_refused_before_connect_although_the_certificate_is_valid",
        replace(egress, "peer_check", lambda _rules: lambda _sock: None),
    ),
    Guard(
        "nothing but loopback without TLS",
        f"{EGRESS}::test_localhost_that_resolves_elsewhere_is_not_used_without_tls",
        replace(egress, "resolve", unjudged),
    ),
    Guard(
        "name in the certificate",
        f"{EGRESS}::test_certificate_for_another_name_is_refused",
        tls_that(check_hostname=False),
    ),
    Guard(
        "verification of the certificate",
        f"{EGRESS}::test_certificate_of_an_unknown_authority_is_refused",
        tls_that(check_hostname=False, verify_mode=ssl.CERT_NONE),
    ),
    Guard(
        "no proxy",
        f"{EGRESS}::test_proxy_of_the_environment_is_not_used",
        replace(DirectClient, "_create_socket", Client._create_socket),
    ),
    Guard(
        "staleness: a disc grows with the age of its fix",
        f"{PIPELINE}::test_record_is_held_when_the_last_fix_is_stale",
        replace(Sighting, "reach_m", same_place),
    ),
    Guard(
        "staleness: a fix beyond the largest age says nothing",
        f"{PIPELINE}::test_fix_beyond_the_largest_age_says_nothing",
        replace(PositionHistory, "__init__", believing_any_age),
    ),
    Guard(
        "contradicting fixes leave every region open",
        f"{PIPELINE}::test_fixes_that_contradict_each_other_leave_every_region_open",
        replace(PositionHistory, "_hypotheses", first_track_only),
    ),
    Guard(
        "held records only narrow",
        f"{PIPELINE}::test_held_record_is_narrowed_and_never_widened",
        replace(Pipeline, "narrowed", widened),
    ),
]


class Outcomes:
    """A pytest plugin that notes how each test ended."""

    def __init__(self):
        self.found = []

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.failed:
            self.found.append((report.when, report.outcome))


def run(*tests):
    outcomes = Outcomes()
    pytest.main(["-q", "--no-header", "-p", "no:cacheprovider", *(f"{TESTS / test}" for test in tests)], [outcomes])
    return outcomes.found


@pytest.mark.parametrize("guard", GUARDS, ids=lambda guard: guard.name)
def test_guard_that_is_taken_away_is_missed(guard, monkeypatch):
    guard.without(monkeypatch)
    assert run(guard.test) == [("call", "failed")]


def test_named_tests_pass_with_every_guard_in_its_place():
    named = list(dict.fromkeys(guard.test for guard in GUARDS))
    assert run(*named) == [("call", "passed")] * len(named)
