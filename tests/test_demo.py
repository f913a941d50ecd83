from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from agent.assembly import load
from tools.brokers import mosquitto_path
from tools.demo import BUNDLED
from tools.importing.truth import ATTACHMENT, Truth
from tools.recording import RecordingWriter, contents, messages
from tools.scene import MAX_SPEED_MPS, PERMITS, agent_values, data_class, permitted, policy_values
from tools.toml_text import toml_text

ROOT = Path(__file__).parents[1]
# From Shenzhen through the lost stretch into Hong Kong, where every outcome occurs: 33 seconds. The agent is killed in
# the lost stretch, so that what waited for it in the broker does not decide about Hong Kong.
STRETCH = ("--from", "210", "--to", "540", "--speed", "10", "--kill-after", "10")
WAIT_SECONDS = 120
needs_model = pytest.mark.skipif(
    not (ROOT / "models" / "detector.json").exists(), reason="no detector is committed under models/ yet"
)
needs_mosquitto = pytest.mark.skipif(mosquitto_path() is None, reason="mosquitto is not installed")


def demo(folder, *options):
    command = [sys.executable, "-m", "tools", "demo", "--quiet", "--out", str(folder), *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=WAIT_SECONDS, check=False)


@needs_model
@needs_mosquitto
def test_drive_over_the_border_keeps_every_promise_although_the_agent_is_killed_on_the_way(tmp_path):
    done = demo(tmp_path, *STRETCH, "--broker", "mosquitto", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    counts = json.loads(done.stdout)["status"]["counts"]
    assert counts["conserved"]
    assert counts["held"]
    assert counts["refused"]
    pictures = json.loads((tmp_path / "run.json").read_text())["pictures"]
    masked = [one for one in pictures if one["claimed"]]  # where nothing was found, the same bytes may leave
    assert len(masked) > len(pictures) / 2
    for one in masked:
        before, after = (tmp_path / "pictures" / one[name] for name in ("before", "after"))
        assert before.read_bytes() != after.read_bytes()


@needs_model
def test_brokers_of_mqtt_3_1_1_do_as_well_and_a_region_that_nothing_reaches_is_a_problem(tmp_path):
    done = demo(tmp_path, "--to", "100", "--speed", "20", "--broker", "amqtt", "--json")
    assert done.returncode == 1, done.stdout + done.stderr
    assert json.loads(done.stdout)["problems"] == ["nothing arrived at hk"]


def test_folder_of_an_earlier_run_is_not_used_again(tmp_path):
    (tmp_path / "state").mkdir()
    done = demo(tmp_path)
    assert done.returncode == 3
    assert "empty folder" in done.stderr


@needs_mosquitto
def test_interrupted_demo_ends_everything_that_it_started(tmp_path):
    command = [sys.executable, "-m", "tools", "demo", "--quiet", "--out", str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        wait_for(tmp_path / "agent.log", "intake.connected")
        pid = json.loads((tmp_path / "state" / "status.json").read_text())["pid"]
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=WAIT_SECONDS)
    assert process.returncode == 130, errors
    assert not Path(f"/proc/{pid}").exists()
    configurations = sorted(tmp_path.glob("brokers/*/mosquitto.conf"))
    assert len(configurations) == 1 + len(PERMITS)
    for one in configurations:
        port = int(re.search(r"listener (\d+)", one.read_text())[1])
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", port)) != 0


def wait_for(path, text):
    tick = threading.Event()
    for _ in range(WAIT_SECONDS * 20):
        if path.exists() and text in path.read_text():
            return
        tick.wait(0.05)
    pytest.fail(f"{text} did not appear in {path}")


def test_recording_without_a_ground_truth_is_told_to_go_to_verify(tmp_path):
    path = tmp_path / "plain.mcap"
    with path.open("wb") as stream, RecordingWriter(stream):
        pass
    done = demo(tmp_path / "run", "--recording", str(path))
    assert done.returncode == 3
    assert "verify" in done.stderr


def test_speed_that_the_agent_could_not_believe_is_wrong_usage(tmp_path):
    assert demo(tmp_path / "new", "--speed", "100").returncode == 2
    assert not (tmp_path / "new").exists()


def test_written_policy_says_what_the_judge_holds_it_to(tmp_path):
    policy = policy_values()
    for number, endpoint in enumerate(policy["endpoints"].values()):
        endpoint |= {"host": "127.0.0.1", "port": 20_000 + number, "tls": False}
    (tmp_path / "policy.toml").write_text(toml_text(policy))
    (tmp_path / "agent.toml").write_text(toml_text(agent_values(10)))
    setup = load(tmp_path / "agent.toml")
    assert setup.config.motion.max_speed_mps == MAX_SPEED_MPS * 10
    assert setup.policy.config.permit == {
        region: {name: list(endpoints) for name, endpoints in row.items()} for region, row in PERMITS.items()
    }
    rules = {rule.topic: rule for rule in setup.policy.config.rules}
    assert rules["vehicle/camera/front"].capture_time == "property:time"
    assert rules["vehicle/camera/cabin"].action == "refuse"
    assert data_class("vehicle/camera/cabin") is None
    assert permitted("HK", "vehicle/diagnostics/brakes") == ("hk", "cn")
    assert permitted("CN", "vehicle/unheard/of") == ()


def test_bundled_drive_is_small_labelled_as_composite_and_crosses_the_border_while_gnss_is_lost():
    assert BUNDLED.stat().st_size <= 5_000_000
    kept = contents(BUNDLED)
    assert kept.complete
    assert kept.composite
    truth = Truth.decode(kept.attachments[ATTACHMENT])
    drive = list(messages(BUNDLED))
    fixes = [one.capture_ns for one in drive if one.topic == "vehicle/gnss"]
    crossing = truth.crossings[1].from_ns
    before, after = max(one for one in fixes if one < crossing), min(one for one in fixes if one >= crossing)
    assert after - before > 60 * 10**9
    assert [one.country for one in truth.crossings] == ["CN", "HK"]
    assert {truth.country_at(one.capture_ns) for one in drive} == {"CN", "HK"}
    assert len({one.payload for one in drive}) == len(drive)
    pictured = {one.capture_ns for one in drive if one.topic == "vehicle/camera/front"}
    assert pictured == {one.capture_ns for one in truth.pictures}
