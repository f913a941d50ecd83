"""The dashboard and the alert rules: every metric that they name is one that the exporter has."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from agent.histogram import WORK_SECONDS, Histogram
from agent.metrics import Exporter

ROOT = Path(__file__).parent.parent
RULES = ROOT / "systemd" / "prometheus-alerts.yml"
RULE_TESTS = Path(__file__).with_name("prometheus-alerts.test.yml")
DASHBOARD = ROOT / "systemd" / "grafana-dashboard.json"
NEEDS_PROMTOOL = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
NAME = re.compile(r"\b((?:residency|process)_\w+)")


def full_content():
    """A status in which every metric has something to say."""
    took = Histogram(WORK_SECONDS)
    took.observe(0.1)
    slow = took.as_dict()
    counted = dict.fromkeys(("received", "delivered", "pending", "held", "refused", "expired", "evicted"), 1)
    sizes = {"conserved": True, "pending_bytes": 1, "held_bytes": 1, "oldest_ns": {"pending": 1, "held": 1}}
    reasons = {state: {"reason": {"a.reason": 1}} for state in ("refused", "expired", "evicted")}
    return {
        "version": "1",
        "policy": "p",
        "time_ns": 10**9,
        "process": {"lag_seconds": 0.1, "watchdog_fed": 1, "threads": 5, "resident_bytes": 1},
        "counts": counted | sizes | {"breakdown": reasons},
        "holds": {"region.doubt": 1},
        "reload": {"count": 0, "error": ""},
        "stalled": None,
        "fixes": {"accepted": 1, "malformed": 1, "stale": 1},
        "sessions": {
            "telemetry": {
                "connected": True,
                "emptied_seconds": 0.5,
                "turned_seconds": 0.1,
                "durable_seconds": slow,
                "unasked": 1,
            }
        },
        "endpoints": {
            "cn": {
                "connected": True,
                "error": "",
                "in_flight": 0,
                "resent": 0,
                "certificate": "",
                "turned_seconds": 0.1,
                "delivered_seconds": slow,
            },
        },
        "model": {
            "ready": True,
            "unloaded": False,
            "digest": "d",
            "restarts": 0,
            "resident_bytes": 1,
            "redaction_seconds": slow,
            "start_seconds": slow,
        },
    }


@pytest.fixture(scope="module")
def exported():
    """Names of all samples that the exporter gives."""
    exporter = Exporter("127.0.0.1", 0)
    exporter.update(full_content())
    own = {sample.name for metric in exporter.collect() for sample in metric.samples}
    return own | {"process_resident_memory_bytes", "process_cpu_seconds_total", "process_start_time_seconds"}


def test_every_metric_of_the_alert_rules_is_exported(exported):
    expressions = re.findall(r"^ +expr: (.+)$", RULES.read_text(), re.MULTILINE)
    assert len(expressions) == RULES.read_text().count("- alert:")
    for expression in expressions:
        assert set(NAME.findall(expression)) <= exported, expression
        assert NAME.search(expression) or expression.startswith("up{"), expression


def test_every_metric_of_the_dashboard_is_exported_and_nearly_every_exported_one_is_shown(exported):
    dashboard = json.loads(DASHBOARD.read_text())
    panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    expressions = [target["expr"] for panel in panels for target in panel["targets"]]
    shown = {name for expression in expressions for name in NAME.findall(expression)}
    assert shown <= exported, shown - exported
    families = {re.sub(r"_(bucket|count|sum)$", "", name) for name in exported}
    missing = families - {re.sub(r"_bucket$", "", name) for name in shown}
    assert missing == {"residency_agent_info", "residency_watchdog_feeds_total", "process_start_time_seconds"}


def test_panels_of_the_dashboard_do_not_overlap():
    taken = set()
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert max(x for x, _ in cells) < 24
        assert not taken & cells, panel["title"]
        taken |= cells


def test_every_alert_says_what_to_do_and_has_its_unit_test():
    rules, tests = RULES.read_text(), RULE_TESTS.read_text()
    names = re.findall(r"- alert: (\w+)", rules)
    assert len(names) == len(set(names)) == rules.count("action: ") == rules.count("summary: ")
    assert all(f'alertname="{name}"' in tests for name in names)


@NEEDS_PROMTOOL
@pytest.mark.parametrize("command", [["check", "rules", RULES], ["test", "rules", RULE_TESTS]])
def test_promtool_accepts_the_rules_and_their_tests_pass(command):
    told = subprocess.run(["promtool", *command], capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stdout + told.stderr


@NEEDS_PROMTOOL
def test_promtool_finds_no_fault_with_the_names_of_the_metrics():
    exporter, registry = Exporter("127.0.0.1", 0), CollectorRegistry()
    exporter.update(full_content())
    registry.register(exporter)
    text = generate_latest(registry)
    told = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, check=False)
    assert (told.returncode, told.stderr) == (0, b"")
