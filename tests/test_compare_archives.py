from __future__ import annotations

import argparse
import json
import sys
import zlib
from pathlib import Path

import pytest

from tools.__main__ import main
from tools.archive_results import TABLE, ArchiveError, Facts, Fate, Result, broken, write_table
from tools.compare_archives import different, figures
from tools.variants import Variant, VariantError, add_arguments, judge_all, variants

FACTS = Facts(agent="1", policy="p", policy_sha256="a", expectations_sha256="b", model_sha256="c", job_sha256="d")


def result(name="one.mcap", ways="AAB", **changes):
    names = tuple(sorted(set(ways)))
    values = {
        "recording": name,
        "sha256": f"digest of {name}",
        "outcome": "passed",
        "reason": "",
        "facts": FACTS,
        "run_s": 1.0,
        "states": {"received": len(ways), "delivered": len(ways)},
        "fates": tuple(Fate(topic="t", fate=way, messages=ways.count(way)) for way in names),
        "fate_names": names,
        "ways": zlib.compress(bytes(names.index(way) for way in ways)),
    }
    return Result(**{**values, **changes})


def differing(*tables):
    return {one.name: one.values for one in figures(tables) if one.differs}


def test_same_results_do_not_differ_although_they_took_another_time():
    assert differing([result()], [result(run_s=99.0)]) == {}
    assert different([[result()], [result(run_s=99.0)]]) == []


def test_messages_that_swap_their_ways_differ_although_all_totals_agree():
    assert differing([result(ways="AAB")], [result(ways="BAA")]) == {"messages that went another way": ("0", "2")}
    (found,) = different([[result(ways="AAB")], [result(ways="BAA")]])
    assert found.recording == "one.mcap"
    assert [(row.name, row.values) for row in found.rows] == [("messages that went another way", ("0", "2"))]


def test_recordings_are_the_same_by_their_digest_and_one_that_is_missing_is_named():
    moved = result("two.mcap", sha256="digest of one.mcap")
    assert different([[result()], [moved]]) == []
    (found,) = different([[result(), result("two.mcap")], [result()]])
    assert (found.recording, found.rows[0].values) == ("two.mcap", ("passed", "-"))


def test_masks_and_outcomes_and_settings_are_compared():
    one = [result(masked={"person": 2}, covered={"person": 1}, labelled={"person": 2})]
    facts = Facts(agent="2", policy="p", policy_sha256="a", expectations_sha256="b", model_sha256="x", job_sha256="d")
    other = [result(outcome="failed", facts=facts, covered={"person": 2}, labelled={"person": 2})]
    assert differing(one, other) == {
        "agent": ("1", "2"),
        "model": ("c", "x"),
        "passed": ("1", "0"),
        "failed": ("0", "1"),
        "masked person": ("2", "0"),
        "labelled person covered": ("1/2", "2/2"),
    }


def test_recording_that_one_way_could_not_judge_differs_by_its_outcome_only():
    lost = broken("one.mcap", "digest of one.mcap", FACTS, "why")
    (found,) = different([[result()], [lost]])
    assert ("outcome", ("passed", "broken")) in [(row.name, row.values) for row in found.rows]
    assert "messages that went another way" not in [row.name for row in found.rows]


def ways(*words, out=Path("out")):
    parser = argparse.ArgumentParser()
    parser.add_argument("--quiet", action="store_true")
    parser.add_argument("--json", action="store_true")
    add_arguments(parser)
    return variants(parser.parse_args(["--archive", "drives", *words]), out)


def test_option_that_stands_once_holds_for_every_way():
    one, other = ways("--policy", "a", "--manifest", "m1", "--manifest", "m2", "--expect", "e")
    assert (one.folder, other.folder) == (Path("out/1"), Path("out/2"))
    assert one.command[:5] == (sys.executable, "-P", "-m", "tools", "verify")
    for way, manifest in ((one, "m1"), (other, "m2")):
        told = dict(zip(way.command[5::2], way.command[6::2], strict=True))
        assert told == {
            "--archive": "drives",
            "--policy": "a",
            "--manifest": manifest,
            "--out": str(way.folder),
            "--expect": "e",
        }


def test_versions_of_the_agent_are_those_of_the_interpreters_that_are_named():
    one, other = ways("--policy", "a", "--python", "/old/python", "--python", "/new/python")
    assert (one.command[0], other.command[0]) == ("/old/python", "/new/python")
    assert "--python" not in one.command


@pytest.mark.parametrize(
    "words", [("--policy", "a"), ("--manifest", "a", "--manifest", "b"), ("--policy", "a") * 2 + ("--agent", "a") * 3]
)
def test_options_that_name_no_two_ways_are_wrong_usage(words):
    with pytest.raises(VariantError):
        ways(*words)
    assert main(["compare", "--archive", "drives", *words]) == 2


def test_way_that_ends_without_a_table_is_an_error_and_one_with_failures_is_not(tmp_path):
    def way(status):
        return Variant(folder=tmp_path, command=(sys.executable, "-c", f"raise SystemExit({status})"))

    judge_all([way(0), way(1), way(3)])
    with pytest.raises(ArchiveError, match="status 2"):
        judge_all([way(2)])


def test_command_compares_the_tables_of_two_folders(tmp_path, capsys):
    for name, table in (("one", [result(ways="AAB")]), ("two", [result(ways="BAA")])):
        (tmp_path / name).mkdir()
        write_table(tmp_path / name / TABLE, table)
    folders = [str(tmp_path / "one"), str(tmp_path / "two")]
    assert main(["compare", *folders, "--fail"]) == 1
    assert "1 recordings did not go alike" in capsys.readouterr().out
    assert main(["compare", *folders, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["figures"]["received"] == {"values": ["3", "3"], "differs": False}
    assert told["recordings"]["one.mcap"]["messages that went another way"]["values"] == ["0", "2"]
