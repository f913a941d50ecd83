from __future__ import annotations

import json

import msgspec
import pytest

from tools.__main__ import main
from tools.compare import rows
from tools.judge import STATES
from tools.run_file import FORMAT, RUN_FILE, Event, Picture, RunFile


def event(second, topic="a", brokers=("cn",), latency_ms=10.0):
    return Event(second=second, topic=topic, country="CN", brokers=brokers, latency_ms=latency_ms, tag="cn")


def picture(claimed, hits):
    return Picture(
        before="b", after="a", second=0, broker="cn", width=1, height=1, claimed=claimed, objects=(), hits=hits
    )


def kept(**changes):
    values = {
        "format": FORMAT,
        "title": "drive.mcap",
        "created": "",
        "provenance": {},
        "problems": (),
        "counts": {"received": 2, **dict.fromkeys(STATES, 0), "delivered": 2},
        "policy": {"version": "1", "sha256": "a" * 64},
        "model": "b" * 64,
        "audit": "",
        "replay": {},
        "events": (event(0), event(1)),
        "track": (),
        "pictures": (),
    }
    return RunFile(**{**values, **changes})


def differing(*runs):
    return {one.name: one.values for one in rows(runs) if one.differs}


def test_same_runs_do_not_differ_although_their_timing_does():
    slower = kept(events=(event(0, latency_ms=99.0), event(1, latency_ms=99.0)))
    assert differing(kept(), slower) == {}


def test_policy_model_and_counters_that_differ_are_named():
    other = kept(
        policy={"version": "2", "sha256": "c" * 64},
        model="",
        counts={"received": 2, **dict.fromkeys(STATES, 0), "delivered": 1, "held": 1},
    )
    found = differing(kept(), other)
    assert found["policy"] == ("1 aaaaaaaaaaaa", "2 cccccccccccc")
    assert found["model"] == ("bbbbbbbbbbbb", "none")
    assert (found["delivered"], found["held"]) == (("2", "1"), ("0", "1"))


def test_messages_that_swap_their_ways_differ_although_all_totals_agree():
    one = kept(events=(event(0, brokers=("cn",)), event(1, brokers=("hk",))))
    other = kept(events=(event(0, brokers=("hk",)), event(1, brokers=("cn",))))
    assert differing(one, other) == {"messages that went another way": ("0", "2")}


def test_messages_of_one_topic_and_moment_are_compared_one_by_one():
    one = kept(events=(event(0, brokers=("hk",)), event(0, brokers=("cn",)), event(0)))
    other = kept(events=(event(0, brokers=("cn",)), event(0, brokers=("hk",)), event(0)))
    assert differing(one, other) == {"messages that went another way": ("0", "2")}


def test_pictures_are_compared_by_what_was_masked_and_what_was_covered():
    one = kept(pictures=(picture({"person": 2}, (("person", True), ("plate", False))),))
    other = kept(pictures=(picture({"person": 1}, (("person", True), ("plate", True))),))
    assert differing(one, other) == {"masked person": ("2", "1"), "labelled plate covered": ("0/1", "1/1")}


@pytest.mark.parametrize(("changes", "status"), [({}, 0), ({"model": "c" * 64}, 1)])
def test_command_fails_on_a_difference_where_it_is_told_to(changes, status, tmp_path, capsys):
    changes["events"] = (event(0, topic="a/[left]/[/red]"),)
    for name, run in (("one", kept(events=changes["events"])), ("two", kept(**changes))):
        (tmp_path / name).mkdir()
        (tmp_path / name / RUN_FILE).write_bytes(msgspec.json.encode(run))
    folders = [str(tmp_path / "one"), str(tmp_path / "two")]
    assert main(["compare", *folders, "--fail"]) == status
    assert "figures differ" in capsys.readouterr().out
    assert main(["compare", *folders, "--all"]) == 0
    assert "a/[left]/[/red] -> cn" in capsys.readouterr().out
    assert main(["compare", *folders, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"]["differs"] is ("model" in changes)


def test_one_run_is_wrong_usage_and_a_folder_without_a_run_is_trouble(tmp_path):
    assert main(["compare", str(tmp_path)]) == 2
    assert main(["compare", str(tmp_path), str(tmp_path)]) == 3
