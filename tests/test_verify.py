from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from tools.__main__ import main
from tools.brokers import mosquitto_path
from tools.demo import BUNDLED
from tools.expectations import UNKNOWN, Check, ExpectationError, checks, permits_of, read_expectations
from tools.importing.truth import Crossing, Truth
from tools.judge import Delivery, Sent, Verdict
from tools.run_file import load
from tools.scene import PERMITS, REGION_OF_COUNTRY, agent_values, permitted, policy_values
from tools.spool import Spool
from tools.toml_text import toml_text
from tools.verify import _agent, _print, junit

ROOT = Path(__file__).parents[1]
SPOOL = Spool(io.BytesIO())
TOPICS = ("vehicle/camera/front", "vehicle/camera/cabin", "vehicle/gnss", "vehicle/telemetry/speed", "other")


def expectations(tmp_path, text):
    path = tmp_path / "expect.toml"
    path.write_text(text)
    return read_expectations(path)


def run(*arrivals, **verdict):
    """A sent message for each arrival (topic, broker or None, latency in ms)."""
    sent = [Sent(topic=topic, payload=SPOOL.keep(b""), country="CN") for topic, _, _ in arrivals]
    deliveries = [
        Delivery(sent=index, broker=broker, time_ns=late * 1_000_000, tag="")
        for index, (_, broker, late) in enumerate(arrivals)
        if broker
    ]
    return sent, Verdict(deliveries=deliveries, **verdict)


def outcomes(expected, ran):
    return {one.name: one.passed for one in checks(expected, *ran)}


@pytest.mark.parametrize("country", REGION_OF_COUNTRY)
@pytest.mark.parametrize("topic", TOPICS)
def test_permits_read_from_a_policy_are_those_it_was_written_from(country, topic):
    assert permits_of(policy_values())(country, topic) == permitted(country, topic)


def test_unknown_place_permits_what_any_place_may_and_a_country_without_a_region_nothing():
    permits = permits_of(policy_values())
    assert permits(UNKNOWN, "vehicle/gnss") == tuple(PERMITS)
    assert permits(UNKNOWN, "vehicle/camera/cabin") == ()
    assert permits("DE", "vehicle/gnss") == ()


@pytest.mark.parametrize(
    "wrong",
    [
        {"regions": {"cn": {}}},
        {"regions": ["cn"]},
        {"rules": [{"topic": "#", "action": "forward"}]},
        {"rules": [{"action": "refuse"}]},
        {"permit": {"cn": 1}},
        {"rules": [{"topic": "#", "action": "forward", "class": "x", "fields": {"positions": [{}]}}]},
    ],
    ids=str,
)
def test_policy_that_is_none_is_wrong_usage_and_told_before_anything_runs(wrong, tmp_path, capsys):
    (tmp_path / "policy.toml").write_text(toml_text({**policy_values(), **wrong}))
    options = ["--policy", str(tmp_path / "policy.toml"), "--offline", "--quiet", "--out", str(tmp_path / "run")]
    assert main(["verify", str(BUNDLED), *options]) == 2
    assert "the policy cannot be read" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_files_that_agent_toml_names_are_found_from_the_folder_of_the_run(tmp_path):
    (tmp_path / "pseudonym.key").write_bytes(b"sixteen bytes or more")
    policy = policy_values()
    next(one for one in policy["rules"] if one["topic"] == "vehicle/telemetry/#")["fields"] = {"pseudonymise": ["/kmh"]}
    agent = {**agent_values(1), "signing": {"pseudonym_key_file": "pseudonym.key"}}
    (tmp_path / "policy.toml").write_text(toml_text(policy))
    (tmp_path / "agent.toml").write_text(toml_text(agent))
    options = ["--policy", str(tmp_path / "policy.toml"), "--agent", str(tmp_path / "agent.toml"), "--to", "10"]
    options += ["--without", "vehicle/camera/#", "--offline", "--quiet", "--out", str(tmp_path / "run")]
    assert main(["verify", str(BUNDLED), *options]) == 0
    assert any(one.topic.startswith("vehicle/telemetry/") and one.brokers for one in load(tmp_path / "run").events)


def test_stretch_says_where_the_car_was_and_else_the_ground_truth_does(tmp_path):
    expected = expectations(tmp_path, '[[stretch]]\nfrom_s = 10\nto_s = 20\ncountry = "DK"')
    truth = Truth(positions=(), crossings=(Crossing(from_ns=0, country="CN"),), pictures=())
    assert expected.country_at(10, truth, 0) == "DK"
    assert expected.country_at(20, truth, 0) == "CN"
    assert expected.country_at(20, None, 0) == UNKNOWN


def test_topic_that_must_never_leave_fails_where_it_arrived(tmp_path):
    expected = expectations(tmp_path, '[[never]]\ntopic = "secret/#"')
    assert outcomes(expected, run(("public", "cn", 1), ("secret/a", None, 1)))["never secret/#"]
    assert not outcomes(expected, run(("secret/a", "cn", 1)))["never secret/#"]


def test_messages_that_must_arrive_are_counted_once_each_at_their_own_endpoint(tmp_path):
    expected = expectations(tmp_path, '[[reach]]\ntopic = "a/#"\nendpoint = "cn"\nat_least = 2\nat_most = 3')
    name = "reach a/# at cn"
    twice = run(("a/1", "cn", 1), ("b", "cn", 1))
    twice[1].deliveries.append(twice[1].deliveries[0])
    assert not outcomes(expected, twice)[name]
    assert not outcomes(expected, run(("a/1", "cn", 1), ("a/2", "hk", 1)))[name]
    assert outcomes(expected, run(*[("a/1", "cn", 1)] * 3))[name]
    assert not outcomes(expected, run(*[("a/1", "cn", 1)] * 4))[name]


def test_latency_is_that_of_delivered_messages_and_none_delivered_is_a_failure(tmp_path):
    expected = expectations(tmp_path, "[latency]\np99_ms = 100")
    assert outcomes(expected, run(("a", "cn", 50), ("a", None, 0)))["latency #"]
    assert not outcomes(expected, run(*[("a", "cn", 50)] * 20, ("a", "cn", 5000)))["latency #"]
    assert not outcomes(expected, run(("a", None, 0)))["latency #"]


def test_masked_objects_and_promises_are_checks_as_well(tmp_path):
    expected = expectations(tmp_path, '[[masked]]\nlabel = "person"\nat_least = 1')
    found = outcomes(expected, run(("a", "cn", 1), problems=["something"]))
    assert found == {"promises": False, "masked person": False}


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("[[never]]\ntopics = 'x'", "topics"),
        ("[[reach]]\ntopic = 'x'", "endpoint"),
        ("[[masked]]\nlabel = 'person'\nat_least = 'many'", "at_least"),
        ("nonsense", "expect.toml"),
        ("typo = 1", "typo"),
    ],
)
def test_mistake_in_the_expectations_names_file_and_key(text, key, tmp_path):
    with pytest.raises(ExpectationError, match=key):
        expectations(tmp_path, text)


def test_junit_has_a_case_for_each_check_and_survives_control_characters():
    done = [
        Check(name="one", passed=True, wanted="w", found="f"),
        Check(name="two", passed=False, wanted="w", found="bad \x00 <topic>"),
    ]
    suite = ET.fromstring(junit("drive", done, 1.0))  # noqa: S314 - our own text
    assert (suite.get("tests"), suite.get("failures")) == ("2", "1")
    assert [case.get("name") for case in suite] == ["one", "two"]
    assert suite[1][0].text == "bad ? <topic>"


def test_names_with_brackets_are_printed_as_they_are(tmp_path, capsys):
    check = Check(name="never a/[left]", passed=False, wanted="0", found="1: a/[/red]")
    _print([check], tmp_path, as_json=False)
    told = capsys.readouterr().out
    assert "a/[left]" in told
    assert "a/[/red]" in told


def test_speed_limit_of_the_car_grows_with_the_replay_up_to_what_the_agent_takes():
    assert _agent({}, 10, None)["motion"]["max_speed_mps"] == 700
    assert _agent({"motion": {"max_speed_mps": 30.0}}, 2, None)["motion"]["max_speed_mps"] == 60
    assert _agent({}, 100, None)["motion"]["max_speed_mps"] == 1000
    assert _agent({}, 0.5, None)["motion"]["max_speed_mps"] == 70


def ways(kept):
    """Where every message went."""
    return {(one.topic, one.second): (one.brokers, one.tag) for one in kept.events}


@pytest.mark.skipif(mosquitto_path() is None, reason="mosquitto is not installed")
def test_command_tells_a_kept_expectation_from_a_broken_one_and_offline_decides_as_the_running_agent_does(tmp_path):
    (tmp_path / "policy.toml").write_text(toml_text(policy_values()))
    (tmp_path / "expect.toml").write_text(
        '[[reach]]\ntopic = "vehicle/telemetry/#"\nendpoint = "cn"\nat_least = 10\n'
        '[[reach]]\ntopic = "#"\nendpoint = "hk"\nat_least = 1\n'
    )
    options = ("--policy", tmp_path / "policy.toml", "--expect", tmp_path / "expect.toml", "--out", tmp_path / "run")
    options += ("--junit", tmp_path / "junit.xml", "--speed", "5", "--to", "40", "--without", "vehicle/camera/front")
    command = [sys.executable, "-m", "tools", "verify", BUNDLED, *options, "--quiet"]
    offline = [*options[:4], "--out", tmp_path / "offline", "--to", "40", "--without", "vehicle/camera/front"]
    done = subprocess.run(
        [str(one) for one in command], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 1, done.stdout + done.stderr
    suite = ET.parse(tmp_path / "junit.xml").getroot()  # noqa: S314 - our own text
    assert {case.get("name"): len(case) == 0 for case in suite} == {
        "promises": True,
        "reach vehicle/telemetry/# at cn": True,
        "reach # at hk": False,
    }
    kept = load(tmp_path / "run")
    assert kept.counts["delivered"] > 10
    assert main(["verify", *(str(one) for one in [BUNDLED, *offline, "--offline", "--quiet"])]) == 1
    assert ways(load(tmp_path / "offline")) == ways(kept)
    again = subprocess.run([str(one) for one in command], cwd=ROOT, capture_output=True, timeout=120, check=False)
    assert again.returncode == 3
