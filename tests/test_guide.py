"""The shell session of the guide, run as it is printed, against real brokers."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from agent.settings.config import shipped_manifest
from tools.brokers import free_port, mosquitto_path

README = (Path(__file__).parent.parent / "README.md").read_text()
PORTS = ("1883", "18841", "18842")

pytestmark = [
    pytest.mark.skipif(mosquitto_path() is None, reason="mosquitto is not installed"),
    pytest.mark.skipif(shutil.which("mosquitto_pub") is None, reason="mosquitto-clients is not installed"),
    pytest.mark.skipif(not shipped_manifest().is_file(), reason="the detector is not in this checkout"),
]


def session(name):
    return re.search(rf"<!-- session: {name} -->\n```sh\n(.*?)```", README, re.DOTALL)[1]


def test_first_day_of_the_guide_goes_as_it_is_printed(tmp_path, patience):
    script = session("first day")
    for port in PORTS:
        assert port in script
        script = re.sub(rf"\b{port}\b", str(free_port()), script)
    programs = [Path(sys.executable).parent, Path(mosquitto_path()).parent]
    path = os.pathsep.join([*map(str, programs), os.environ["PATH"]])
    process = subprocess.Popen(
        ["bash", "-c", script],
        cwd=tmp_path,
        env=os.environ | {"PATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        told, _ = process.communicate(timeout=4 * patience)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        told, _ = process.communicate()
        pytest.fail(told + (tmp_path / "agent.log").read_text())
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    judge(told, (tmp_path / "agent.log").read_text())
    assert process.returncode == 0


def judge(told, log):
    """Each command of the session said what the guide promises."""
    assert "wrote car/policy.toml" in told
    assert re.search(r"^cn +cn +cn +cn$", told, re.MULTILINE), "the table of check"
    for name in ("clock", "permissions", "in-car broker", "endpoint cn", "endpoint hk"):
        assert f"ok    {name}: " in told
    assert set(re.findall(r"^FAIL  ([\w-]+)", told, re.MULTILINE)) <= {"disk", "model"}, "only a busy machine is slow"
    assert re.search(r"^cn/car-7/vehicle/gnss \d+ bytes$", told, re.MULTILINE)
    assert "decision    publish to cn" in told
    assert "decision    hold: region.doubt" in told
    running, stopped = (told.index(f"agent       {state}") for state in ("running", "stopped"))
    assert running < stopped
    assert re.search(r"^endpoint    cn: connected", told, re.MULTILINE)
    status = json.loads(next(line for line in told.splitlines() if line.startswith('{"state"')))
    assert (status["state"], status["conserved"]) == ("running", True)
    assert "agent.stopping" in log
    assert "<4>" not in log, log
