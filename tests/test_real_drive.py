from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from agent.topics import matches
from tools.brokers import mosquitto_path
from tools.judge import STATES, Judge, Sent, judge_counts
from tools.recording import contents, messages
from tools.scene import agent_values
from tools.schedule import Options
from tools.trial import Setting, conduct, prepared

ROOT = Path(__file__).parents[1]
DRIVES = ROOT.parent / "shared" / "data" / "drives"
SPEED = 20.0
PATIENT_S = 120.0  # no picture is refused because the machine is busy with other tests
PERMITS = {"telemetry": ("eea",), "picture": ("eea",), "location": ()}
CLASS_OF_TOPIC = {"vehicle/camera/front": "picture", "vehicle/gnss": "location", "vehicle/telemetry/#": "telemetry"}

pytestmark = [
    pytest.mark.skipif(not DRIVES.is_dir(), reason=f"the real drives are not here: {DRIVES}"),
    pytest.mark.skipif(mosquitto_path() is None, reason="mosquitto is not installed"),
]
needs_model = pytest.mark.skipif(
    not (ROOT / "models" / "detector.json").exists(), reason="no detector is committed under models/ yet"
)


@pytest.fixture(scope="module")
def real_drive(tmp_path_factory):
    """One recording of a Danish car's positions and bus, a Californian car's speed, and Romanian street pictures."""
    pytest.importorskip("asammdf")
    out = tmp_path_factory.mktemp("real") / "real.mcap"
    logs = [part for path in sorted((DRIVES / "aarhus-horsens").glob("*.MF4")) for part in ("--mdf", path)]
    sources = [
        *(*logs, "--dbc", DRIVES / "aarhus-horsens" / "canmod-gps.dbc"),
        *("--comma2k19", DRIVES / "comma2k19-example1"),
        *("--frames", DRIVES / "dashcam-romania"),
    ]
    command = [sys.executable, "-m", "tools", "import", "--quiet", "-o", str(out), *(str(one) for one in sources)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=120)
    return out


def policy():
    capture = {"capture_time": "/ts", "capture_unit": "s"}
    return {
        "version": "real-drive",
        "regions": {"eea": {"countries": ["DK", "DE", "SE", "RO"]}, "us": {"countries": ["US"]}},
        "endpoints": {"eea": {}, "us": {}},
        "classes": {name: {} for name in PERMITS},
        "permit": {
            "eea": {name: list(endpoints) for name, endpoints in PERMITS.items() if endpoints},
            "us": {name: ["us"] for name in PERMITS},
        },
        "rules": [
            {
                "topic": "vehicle/camera/front",
                "action": "redact",
                "class": "picture",
                "capture_time": "property:time",
                "capture_unit": "ns",
            },
            {"topic": "vehicle/gnss", "action": "forward", "class": "location", **capture},
            {"topic": "vehicle/telemetry/#", "action": "forward", "class": "telemetry", **capture},
        ],
    }


def permitted(_country, topic):
    return next(PERMITS[name] for wanted, name in CLASS_OF_TOPIC.items() if matches(wanted, topic))


def test_sources_are_one_recording_that_says_it_is_a_composite(real_drive):
    kept = contents(real_drive)
    assert kept.complete
    assert kept.composite
    assert "positions left out" in kept.metadata["provenance"]["source 2"]
    topics = Counter(one.topic for one in messages(real_drive))
    assert topics["vehicle/camera/front"] == 130
    assert topics["vehicle/gnss"] == 1542
    assert topics["vehicle/telemetry/speed"] > 500


@needs_model
async def test_real_drive_reaches_only_its_own_region_and_its_pictures_arrive_redacted(real_drive, tmp_path):
    options = Options(speed=SPEED, start_s=110, end_s=250, without=("vehicle/telemetry/gnss_imu",))
    setting = Setting(
        agent={**agent_values(SPEED), "model": {"timeout_s": PATIENT_S}},
        policy=policy(),
        recording=real_drive,
        folder=tmp_path / "run",
        options=options,
        broker="mosquitto",
    )
    sent = []
    with prepared(setting.folder) as spool:

        def note(message, _original):
            sent.append(Sent(topic=message.topic, payload=spool.keep(message.payload), country="DK"))

        trial = await conduct(setting, note, spool)
        verdict = Judge(sent, permitted).judge(trial.seen)
    counts = trial.status["counts"]
    assert verdict.problems == []
    assert judge_counts(counts, sent=len(sent), delivered=sum(verdict.arrived.values())) == []
    topics = Counter(one.topic for one in sent)
    assert len(verdict.pictures) == topics["vehicle/camera/front"] > 20
    assert verdict.masked.total() > 0
    expected = len(sent) - topics["vehicle/gnss"]
    assert dict(verdict.arrived) == {("DK", "eea"): expected}
    assert {state: counts[state] for state in STATES} == {
        **dict.fromkeys(STATES, 0),
        "delivered": expected,
        "refused": topics["vehicle/gnss"],
    }
