import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from agent import systemd
from agent.settings.config import Model, shipped_manifest

UNIT = Path(__file__).parent.parent / "systemd" / "residency-agent.service"
MOST_EXPOSURE = 1.5
AGENT_BYTES = 256 << 20
AGENT_SEEN_BYTES = 170 << 20  # the most that a load has made of it
LARGEST_REDACTION_BYTES = 834 << 20  # measured: WebP of 39.7 Mpx

MDWE = """
import ctypes, mmap, sys
if ctypes.CDLL(None).prctl(65, 1, 0, 0, 0):  # PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN (Linux 6.3)
    sys.exit(77)
try:
    mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    sys.exit(78)
except PermissionError:
    pass
import numpy
from pathlib import Path
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from agent.pictures.formats import Colour
from agent.redaction.detector import Detector
Ed25519PrivateKey.generate().sign(b"x")
Detector.open(Path(sys.argv[1])).detect(numpy.zeros((240, 320, 3), numpy.uint8), Colour.RGB)
"""


def test_notify_sends_its_lines_to_systemds_socket(tmp_path, monkeypatch):
    path = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(path))
        monkeypatch.setenv("NOTIFY_SOCKET", str(path))
        assert systemd.notify("READY=1", "STATUS=fine")
        assert listener.recv(100) == b"READY=1\nSTATUS=fine"


def test_notify_is_silent_where_nobody_listens(tmp_path, monkeypatch):
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    assert not systemd.notify("READY=1")
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "gone"))
    assert not systemd.notify("READY=1")


def test_abstract_socket_is_reached(monkeypatch):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind("")  # autobind: the kernel chooses an abstract name
        monkeypatch.setenv("NOTIFY_SOCKET", "@" + listener.getsockname()[1:].decode())
        assert systemd.notify("WATCHDOG=1")
        assert listener.recv(100) == b"WATCHDOG=1"


def test_watchdog_is_fed_at_half_its_time_and_only_by_its_own_process(monkeypatch):
    monkeypatch.delenv("WATCHDOG_PID", raising=False)
    monkeypatch.setenv("WATCHDOG_USEC", "30000000")
    assert systemd.watchdog_seconds() == 15.0
    monkeypatch.setenv("WATCHDOG_PID", "1")
    assert systemd.watchdog_seconds() is None
    monkeypatch.delenv("WATCHDOG_PID")
    monkeypatch.delenv("WATCHDOG_USEC")
    assert systemd.watchdog_seconds() is None


def test_unit_lets_the_largest_picture_be_redacted_and_outlives_the_process_that_takes_too_much():
    unit = dict(re.findall(r"^(\w+)=(.*)$", UNIT.read_text(), re.MULTILINE))
    most, high = (int(unit[key].removesuffix("M")) << 20 for key in ("MemoryMax", "MemoryHigh"))
    assert most == Model().processes * Model().memory_bytes + AGENT_BYTES
    assert LARGEST_REDACTION_BYTES + AGENT_SEEN_BYTES < high < most
    assert unit["OOMPolicy"] == "continue"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_unit_exposes_little():
    command = ["systemd-analyze", "security", "--offline=true", "--no-pager", str(UNIT)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    found = re.search(r"Overall exposure level for \S+: ([0-9.]+)", result.stdout)
    assert found, result.stderr
    assert float(found[1]) <= MOST_EXPOSURE


@pytest.mark.skipif(not shipped_manifest().is_file(), reason="the detector is not in this checkout")
def test_detector_and_signatures_bear_memory_deny_write_execute():
    command = [sys.executable, "-c", MDWE, str(shipped_manifest())]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode == 77:
        pytest.skip("this kernel has no PR_SET_MDWE")
    assert result.returncode == 0, result.stderr
