"""What `residency-agent status` shows a person."""

import pytest
from ledger_samples import opened, store

from agent import status, vitals
from agent.boot import boot_id
from agent.errors import LedgerStalledError
from agent.histogram import WORK_SECONDS, Histogram
from agent.store.committer import CommitOptions, Committer

SECOND = 10**9
NOW = 1_000 * SECOND


def took(*seconds):
    found = Histogram(WORK_SECONDS)
    for one in seconds:
        found.observe(one)
    return found.as_dict()


@pytest.fixture
def content():
    counts = dict.fromkeys(status.STATES, 0) | {"received": 5, "pending": 2, "held": 1, "expired": 1, "refused": 1}
    sizes = {"conserved": True, "pending_bytes": 3 << 20, "held_bytes": 1 << 19}
    reasons = {"refused": {"reason": {"policy.no-rule": 1}}, "expired": {"reason": {"ttl": 1}}}
    return {
        "running": True,
        "version": "1.2",
        "policy": "p",
        "counts": counts
        | sizes
        | {"oldest_ns": {"pending": NOW - 90 * SECOND, "held": NOW - 10 * SECOND}, "breakdown": reasons},
        "stalled": None,
        "process": {"resident_bytes": 60 << 20},
        "model": {
            "ready": True,
            "unloaded": False,
            "digest": "ab" * 32,
            "error": "",
            "resident_bytes": 70 << 20,
            "redaction_seconds": took(*[0.2] * 19, 3.0),
        },
        "endpoints": {
            "cn": {"connected": True, "error": "", "in_flight": 2, "delivered_seconds": took(0.04)},
            "hk": {"connected": False, "error": "refused", "in_flight": 0, "delivered_seconds": {}},
            "us": {"connected": False, "error": "", "in_flight": 0, "delivered_seconds": {}},
        },
        "fixes": {"accepted": 0, "malformed": 7, "stale": 0},
        "sessions": {"telemetry": {"connected": False, "durable_seconds": took(20.0)}},
    }


def lines(content):
    return status.table(content, NOW).splitlines()


def test_running_agent_shows_queues_with_age_latencies_memory_and_reasons(content):
    shown = lines(content)
    assert shown[:3] == [
        "agent       running, 130 MiB, version 1.2",
        "policy      p",
        "model       ready, abababababab, 95 % of the payloads redacted within 0.25 s",
    ]
    assert "endpoint    cn: connected, 2 in flight, 95 % delivered within 0.05 s" in shown
    assert "endpoint    hk: down: refused, 0 in flight" in shown
    assert "endpoint    us: idle, 0 in flight" in shown
    assert "intake      telemetry: not connected, 95 % durable within >10 s" in shown
    assert "pending     2, 3.0 MiB, the oldest for 90 s" in shown
    assert "held        1, 0.5 MiB, the oldest for 10 s" in shown
    assert "evicted     0" in shown
    assert "conserved   5 = 0 + 2 + 1 + 1 + 1 + 0" in shown
    assert "  refused   policy.no-rule: 1" in shown
    assert "  expired   ttl: 1" in shown


def test_fixes_that_are_malformed_are_seen(content):
    assert "fixes       0 accepted, 7 malformed" in lines(content)


def test_stopped_agent_shows_no_connections_that_it_no_longer_has(content):
    shown = lines(content | {"running": False})
    assert shown[0] == "agent       stopped, version 1.2"
    assert not [line for line in shown if line.startswith(("endpoint", "intake"))]
    assert "pending     2, 3.0 MiB, the oldest for 90 s" in shown


def test_model_that_is_unloaded_or_not_ready_says_so(content):
    content["model"]["unloaded"] = True
    assert lines(content)[2].startswith("model       unloaded, abababababab")
    content["model"] |= {"ready": False, "error": "redaction.model"}
    assert lines(content)[2] == "model       not ready: redaction.model"


def test_disk_that_takes_no_records_and_counters_that_do_not_add_up_stand_out(content):
    content["stalled"] = "disk full"
    content["counts"]["conserved"] = False
    shown = lines(content)
    assert "disk        TAKES NO RECORDS: disk full" in shown
    assert any(line.startswith("NOT CONSERVED") for line in shown)


def test_status_of_an_agent_of_another_version_is_shown_as_far_as_it_goes(content):
    for name in ("process", "model", "sessions", "policy", "stalled"):
        del content[name]
    for endpoint in content["endpoints"].values():
        del endpoint["delivered_seconds"]
    assert "endpoint    cn: connected, 2 in flight" in lines(content)


def test_clock_that_went_back_makes_no_negative_age(content):
    assert "pending     2, 3.0 MiB, the oldest for 0 s" in status.table(content, NOW - 500 * SECOND)


def test_process_that_is_gone_is_not_running():
    assert not status._is_running(2**22 + 1)


@pytest.mark.parametrize(("boot", "running"), [(boot_id(), True), ("before", False), (None, True)])
def test_agent_of_an_earlier_boot_is_not_running_whoever_has_its_pid_now(tmp_path, monkeypatch, boot, running):
    opened(tmp_path / "ledger.sqlite").close()
    status.write(tmp_path / "status.json", {"pid": 1} | ({"boot_id": boot} if boot else {}))
    monkeypatch.setattr(status, "_is_running", lambda _pid: True)
    assert status.gather(tmp_path / "ledger.sqlite", tmp_path / "status.json")["running"] is running


async def test_disk_that_cannot_be_read_now_ends_nothing_and_is_told_with_the_counters(tmp_path, monkeypatch):
    def unreadable(_connection):
        raise LedgerStalledError("disk I/O error")

    ledger = opened(tmp_path / "ledger.sqlite")
    async with Committer(ledger, CommitOptions()) as committer:
        await committer.submit(store(1))
        monkeypatch.setattr("agent.store.ledger.oldest", unreadable)
        told = await vitals.of_ledger(committer)
    ledger.close()
    assert told["stalled"] == "disk I/O error"
    assert (told["counts"]["received"], told["counts"]["pending"], told["counts"]["oldest_ns"]) == (1, 1, {})
