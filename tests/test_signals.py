"""Every long command: a signal ends what it started, its status says so, and no half of a file is left."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from tools import import_
from tools.__main__ import main
from tools.brokers import mosquitto, mosquitto_path
from tools.demo import BUNDLED
from tools.recording import RecordingWriter, messages
from tools.scene import policy_values
from tools.toml_text import toml_text
from tools.whole_files import whole, write_whole

ROOT = Path(__file__).parents[1]
INTERRUPTED = 130
MARK = "RESIDENCY_TEST_MARK"
needs_mosquitto = pytest.mark.skipif(mosquitto_path() is None, reason="mosquitto is not installed")


class Command:
    """A command in a session of its own; whatever it started carries a mark in its environment."""

    def __init__(self, *words):
        self.mark = uuid.uuid4().hex
        command = [sys.executable, "-m", "tools", *(str(word) for word in words)]
        environment = {**os.environ, MARK: self.mark}
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for pid in self.alive():
            os.kill(pid, signal.SIGKILL)
        self.process.communicate()

    def until(self, condition, patience):
        """Wait until the condition holds while the command runs."""
        end = time.monotonic() + patience
        while not condition():
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < end, "it did not come so far"
            time.sleep(0.02)

    def end(self, number, patience):
        """Send the signal as a terminal sends Ctrl-C, or as systemd sends SIGTERM; status and errors."""
        (os.killpg if number == signal.SIGINT else os.kill)(self.process.pid, number)
        _, errors = self.process.communicate(timeout=patience)
        return self.process.returncode, errors.decode()

    def alive(self):
        """What still runs of all that it started."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if f"{MARK}={self.mark}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(int(folder.name))
        return found


def left(folder):
    """Files that are not finished."""
    return [path for path in folder.rglob("*") if path.suffix in {".new", ".part"}]


@pytest.fixture
def policy(tmp_path):
    path = tmp_path / "policy.toml"
    path.write_text(toml_text(policy_values()))
    return path


@needs_mosquitto
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_replay_ends_after_the_message_in_hand_and_tells_what_it_did(number, patience):
    async with mosquitto(config_lines=["log_type all"]) as broker:
        with Command("replay", BUNDLED, "--port", broker.port, "--json") as command:
            command.until(lambda: "Received PUBLISH" in broker.log_path.read_text(), patience)
            command.process.send_signal(number)
            output, _ = command.process.communicate(timeout=patience)
    assert command.process.returncode == INTERRUPTED
    outcome = json.loads(output)
    assert outcome["stopped"]
    assert outcome["sent"] == outcome["acknowledged"] > 0


def test_import_that_is_ended_while_it_reads_leaves_nothing(tmp_path, patience):
    os.mkfifo(tmp_path / "source.jsonl")
    with Command("import", "--jsonl", tmp_path / "source.jsonl", "-o", tmp_path / "out.mcap") as command:
        with (tmp_path / "source.jsonl").open("wb"):  # returns once the command reads
            status, errors = command.end(signal.SIGTERM, patience)
        assert command.alive() == []
    assert status == INTERRUPTED, errors
    assert [path.name for path in tmp_path.iterdir()] == ["source.jsonl"]


def test_import_that_is_ended_while_it_writes_leaves_the_earlier_file_as_it_was(tmp_path, monkeypatch):
    def interrupted(_writer, _message):
        raise KeyboardInterrupt

    monkeypatch.setattr(import_.RecordingWriter, "write", interrupted)
    (tmp_path / "track.nmea").write_text("$GPRMC,120000.00,A,5209.00,N,00940.00,E,0.0,0.0,010126,,,A*5A\n")
    (tmp_path / "out.mcap").write_text("earlier")
    words = [
        "import",
        "--nmea",
        str(tmp_path / "track.nmea"),
        "--skip-bad",
        "-o",
        str(tmp_path / "out.mcap"),
        "--quiet",
    ]
    assert main(words) == INTERRUPTED
    assert (tmp_path / "out.mcap").read_text() == "earlier"
    assert left(tmp_path) == []


@needs_mosquitto
def test_verify_ends_its_brokers_and_its_agent(tmp_path, policy, patience):
    with Command("verify", BUNDLED, "--policy", policy, "--out", tmp_path / "run") as command:
        command.until((tmp_path / "run" / "state" / "status.json").exists, patience)
        status, errors = command.end(signal.SIGTERM, patience)
        assert command.alive() == [], errors
    assert status == INTERRUPTED, errors
    assert left(tmp_path / "run") == []
    assert not (tmp_path / "run" / "run.json").exists()


def test_compare_ends_the_workers_of_the_archive_and_what_was_judged_stands(tmp_path, policy, patience):
    pytest.importorskip("distributed")
    drive = list(messages(BUNDLED))
    for index in range(40):
        path = tmp_path / "drives" / f"{index:02d}.mcap"
        path.parent.mkdir(exist_ok=True)
        with path.open("wb") as stream, RecordingWriter(stream) as writer:
            for one in drive[index : index + 150]:
                writer.write(one)
    journal = tmp_path / "out" / "1" / "results.jsonl"
    ways = ("--policy", policy, "--manifest", "models/detector.json", "--manifest", "models/detector-float.json")
    with Command("compare", "--archive", tmp_path / "drives", *ways, "--out", tmp_path / "out") as command:
        command.until(lambda: journal.exists() and journal.stat().st_size > 0, 2 * patience)
        status, errors = command.end(signal.SIGINT, patience)
        assert command.alive() == [], errors
    assert status == INTERRUPTED, errors
    assert "Traceback" not in errors
    assert json.loads(journal.read_bytes().splitlines()[0])["outcome"] == "passed"
    assert [path.name for path in (tmp_path / "out" / "1").iterdir()] == ["results.jsonl"]


def test_file_is_replaced_only_when_it_is_whole(tmp_path):
    path = tmp_path / "file"
    write_whole(path, b"one")
    with pytest.raises(ValueError, match="half"), whole(path) as stream:
        stream.write(int("half"))
    assert path.read_bytes() == b"one"
    assert [one.name for one in tmp_path.iterdir()] == ["file"]
