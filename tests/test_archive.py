from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree as ET

import msgspec
import pytest
from chromium import needs_chromium, opened

from tools import archive, archive_page
from tools.archive_results import (
    JOURNAL,
    TABLE,
    ArchiveError,
    Facts,
    Journal,
    Kept,
    Result,
    broken,
    read_table,
    ways_of,
    write_table,
)
from tools.demo import BUNDLED
from tools.expectations import Expectations, Never
from tools.recording import RecordingWriter, messages
from tools.scene import agent_values, policy_values
from tools.schedule import Options
from tools.toml_text import toml_text
from tools.trial import Setting

pytest.importorskip("distributed")
pytest.importorskip("pyarrow")
ROOT = Path(__file__).parents[1]
FACTS = Facts(
    agent="1", policy="p", policy_sha256="a", expectations_sha256="b", model_sha256="c" * 64, job_sha256="d" * 64
)


def result(name="one.mcap", outcome="passed", **changes):
    values = {"recording": name, "sha256": name, "outcome": outcome, "reason": "", "facts": FACTS, "run_s": 1.0}
    return Result(**{**values, **changes})


def slices(folder, *starts):
    """Recordings of 15 seconds of the bundled drive without its pictures."""
    drive = [one for one in messages(BUNDLED) if "camera" not in one.topic]
    for index, start in enumerate(starts):
        path = folder / f"day{index}" / f"{index}.mcap"
        path.parent.mkdir(parents=True)
        with path.open("wb") as stream, RecordingWriter(stream) as writer:
            for one in drive:
                if start <= (one.receipt_ns - drive[0].receipt_ns) / 1e9 < start + 15:
                    writer.write(one)


def job(**changes):
    setting = Setting(agent=agent_values(1), policy=policy_values(), recording=BUNDLED, folder=ROOT, options=Options())
    return archive.job_of(replace(setting, **changes), Expectations())


def test_journal_gives_back_what_was_added_and_goes_on_behind_a_torn_line(tmp_path):
    path = tmp_path / JOURNAL
    with Journal(path) as journal:
        journal.add(result("a"))
        journal.add(result("b"))
    path.write_bytes(path.read_bytes()[:-20])
    with Journal(path) as journal:
        assert [one.recording for one in journal.results] == ["a"]
        journal.add(result("c"))
    with Journal(path) as journal:
        assert [one.recording for one in journal.results] == ["a", "c"]


def test_table_gives_back_every_column_of_every_result(tmp_path):
    whole = result(
        states={"received": 3},
        masked={"person": 2},
        checks=(Kept(name="n", passed=False, wanted="w", found="f"),),
        ways=b"\x00\x01",
        begins="2026-01-01T00:00:00.000000000Z",
    )
    write_table(tmp_path / TABLE, [whole, broken("bad.mcap", "", FACTS, "why")])
    assert read_table(tmp_path / TABLE) == [whole, broken("bad.mcap", "", FACTS, "why")]
    assert [one.name for one in tmp_path.iterdir()] == [TABLE]
    with pytest.raises(ArchiveError, match="no table"):
        read_table(tmp_path / "other")


def test_everything_that_a_result_depends_on_changes_the_job():
    policy = {**policy_values(), "version": "2"}
    others = [
        job(policy=policy),
        job(agent={**agent_values(1), "limits": {"picture_pixels": 1000}}),
        job(options=Options(end_s=5)),
        archive.job_of(job().setting, Expectations(never=(Never(topic="a"),))),
    ]
    assert job().facts == job().facts
    assert len({one.facts.job_sha256 for one in [job(), *others]}) == 5


def test_recording_that_cannot_be_read_is_a_row_with_its_reason(tmp_path):
    (tmp_path / "bad.mcap").write_text("no recording")
    for name, reason in (("bad.mcap", "does not begin as an MCAP file"), ("missing.mcap", "No such file")):
        found = archive.examine(tmp_path / name, name, job(), frozenset())
        assert (found.outcome, found.recording) == ("broken", name)
        assert reason in found.reason


def test_recording_with_a_standing_result_is_not_judged_again(tmp_path):
    slices(tmp_path, 0)
    found = archive.examine(tmp_path / "day0/0.mcap", "0", job(), frozenset())
    assert found.outcome == "passed"
    assert ways_of(found).count("cn") == found.arrived["cn"] > 0
    assert len(ways_of(found)) == found.messages == sum(one.messages for one in found.fates)
    assert archive.examine(tmp_path / "day0/0.mcap", "0", job(), frozenset({found.sha256})) == found.sha256


def test_page_shows_failures_first_counts_all_and_escapes_what_it_shows():
    rows = [
        result("a.mcap", drive_s=3600, states={"received": 2, "delivered": 2}, masked={"person": 3}),
        result("<b>.mcap", "failed", reason="promises: <script>alert(1)</script>", drive_s=1800),
        broken("c.mcap", "", FACTS, "why"),
    ]
    html = archive_page.page("fleet", rows, 0)
    assert "3 recordings, 1.5 hours" in html
    assert "1 failed, 1 broken, 1 passed" in html
    assert "2 received = 2 delivered" in html
    assert "<script>alert" not in html
    assert re.findall(r'<tr data-outcome="(\w+)">', html) == ["failed", "broken", "passed"]
    assert "default-src 'none'" in html
    assert "src=" not in html.partition("<body>")[2]


@needs_chromium
def test_page_of_an_archive_filters_by_outcome_and_text_without_an_error_or_a_request(tmp_path):
    rows = [result("a.mcap"), result("b.mcap", "failed", reason="promises"), broken("c.mcap", "", FACTS, "why")]
    archive_page.write(tmp_path / "archive.html", "fleet", rows)
    shown = "document.getElementById('shown').textContent"
    with opened(tmp_path / "archive.html", tmp_path / "profile") as page:
        assert page.evaluate(shown) == "recordings shown: 3"
        page.evaluate("outcome.value = 'failed'; outcome.dispatchEvent(new Event('change'))")
        assert page.evaluate(shown) == "recordings shown: 1"
        page.evaluate("outcome.value = ''; text.value = 'WHY'; text.dispatchEvent(new Event('input'))")
        assert page.evaluate("document.querySelector('.recordings tbody tr:not(.off)').dataset.outcome") == "broken"
    assert page.complaints() == []
    assert page.requests() == []


def test_page_passes_only_where_every_recording_does():
    assert ">PASSED<" in archive_page.page("x", [result()], 0)
    assert ">INCOMPLETE<" in archive_page.page("x", [result(), broken("c", "", FACTS, "why")], 0)
    assert ">FAILED<" in archive_page.page("x", [result(), result(outcome="failed")], 0)


def verify(tmp_path, *options):
    command = [sys.executable, "-m", "tools", "verify", "--archive", tmp_path / "drives", "--out", tmp_path / "out"]
    command += ["--policy", tmp_path / "policy.toml", "--workers", "1", "--json", *options]
    return subprocess.run(
        [str(one) for one in command], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )


def test_archive_is_judged_by_workers_and_only_what_is_new_is_judged_again(tmp_path):
    (tmp_path / "policy.toml").write_text(toml_text(policy_values()))
    (tmp_path / "expect.toml").write_text('[[reach]]\ntopic = "vehicle/gnss"\nendpoint = "cn"\nat_least = 1\n')
    slices(tmp_path / "drives", 0, 500)
    (tmp_path / "drives" / "bad.mcap").write_text("no recording")
    options = ("--expect", tmp_path / "expect.toml", "--junit", tmp_path / "junit.xml")
    done = verify(tmp_path, *options)
    assert done.returncode == 1, done.stderr
    told = json.loads(done.stdout)
    assert (told["recordings"], told["passed"], told["failed"], told["broken"]) == (3, 1, 1, 1)
    rows = read_table(tmp_path / "out" / TABLE)
    assert [(one.recording, one.outcome) for one in rows] == [
        ("bad.mcap", "broken"),
        ("day0/0.mcap", "passed"),
        ("day1/1.mcap", "failed"),
    ]
    suite = ET.parse(tmp_path / "junit.xml").getroot()  # noqa: S314 - our own text
    assert (suite.get("tests"), suite.get("failures")) == ("3", "2")
    assert (tmp_path / "out" / archive_page.PAGE).stat().st_size > 3000

    journal = tmp_path / "out" / JOURNAL
    marked = [msgspec.structs.replace(one, run_s=12345.0) for one in rows if one.outcome != "broken"]
    journal.write_bytes(b"".join(msgspec.json.encode(one) + b"\n" for one in marked))
    (tmp_path / "drives" / "bad.mcap").unlink()
    again = verify(tmp_path, *options)
    assert again.returncode == 1, again.stderr
    assert [one.run_s for one in read_table(tmp_path / "out" / TABLE)] == [12345.0, 12345.0]


def test_wrong_usage_and_missing_things_have_their_own_exit_status(tmp_path):
    (tmp_path / "policy.toml").write_text(toml_text(policy_values()))
    (tmp_path / "drives").mkdir()
    empty = verify(tmp_path)
    assert (empty.returncode, "no *.mcap" in empty.stderr) == (3, True)
    assert verify(tmp_path, tmp_path / "drives" / "one.mcap").returncode == 2
