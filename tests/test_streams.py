"""The standard streams: what is printed, whatever the terminal's encoding lacks, and streams that are closed."""

import json
import os
import signal
import socket
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

INIT = ("--regions", "cn,hk", "--vehicle", "urn:example:car-7", "--state", "state")


def called(*words, program="agent", encoding="utf-8:strict"):
    """The status of a command, and what it said on standard output and standard error, both as bytes."""
    command = [sys.executable, "-m", program, *words]
    env = {**os.environ, "PYTHONIOENCODING": encoding}  # as in a locale of that encoding
    result = subprocess.run(command, capture_output=True, check=False, env=env)
    return result.returncode, result.stdout, result.stderr


@pytest.fixture
def folder(tmp_path):
    """A folder whose name is no UTF-8, not made yet."""
    return tmp_path / os.fsdecode(b"caf\xe9")


@pytest.fixture
def shown(tmp_path):
    """How it is printed."""
    return os.fsencode(tmp_path) + rb"/caf\udce9"


def test_file_whose_name_is_no_text_is_told_with_its_bytes_escaped(folder, shown):
    status, told, _ = called("init", folder, *INIT)
    assert (status, told.splitlines()[0]) == (0, b"wrote " + shown + b"/agent.toml")
    status, told, _ = called("sign", "--key", folder / "fleet.pem", "--generate", folder / "policy.toml")
    assert (status, told.splitlines()[1][: len(shown)]) == (0, shown)
    status, told, _ = called("check", folder / "agent.toml")
    assert (status, told[:7]) == (0, b"policy ")
    status, _, told = called("status", folder / "agent.toml")
    assert (status, told) == (1, b"residency-agent: " + shown + b"/state/ledger.sqlite: there is no ledger\n")


def test_tools_escape_the_names_of_files_too(folder, shown):
    folder.mkdir()
    line = {"tst": "2026-11-23T10:00:00.000000Z+0000", "topic": "a", "qos": 1, "retain": 0, "payload": "x"}
    (folder / "drive.jsonl").write_text(json.dumps(line))
    words = ("import", "--jsonl", folder / "drive.jsonl", "-o", folder / "drive.mcap")
    status, told, _ = called(*words, program="tools")
    assert (status, told.splitlines()[0]) == (0, shown + b"/drive.mcap: 1 messages, 0 bad rows skipped")


@pytest.mark.parametrize(("encoding", "shown"), [("utf-8", "温度".encode()), ("ascii", rb"\u6e29\u5ea6")])
def test_character_that_the_terminal_lacks_is_escaped(tmp_path, encoding, shown):
    assert called("init", tmp_path, *INIT)[0] == 0
    status, told, _ = called("explain", tmp_path / "agent.toml", "--topic", "温度", encoding=encoding)
    assert status == 0
    assert shown in told


CLOSED = ("sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh")  # a command without any standard stream


def test_agent_whose_standard_streams_are_closed_runs_and_gives_their_numbers_to_nothing_else(tmp_path, patience):
    assert called("init", tmp_path / "car", *INIT, "--broker", "127.0.0.1:1")[0] == 0
    command = [*CLOSED, sys.executable, "-m", "agent", "run", tmp_path / "car" / "agent.toml"]
    with closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as notified:
        notified.bind(str(tmp_path / "notify"))
        notified.settimeout(patience)
        env = {**os.environ, "NOTIFY_SOCKET": str(tmp_path / "notify")}
        with subprocess.Popen(command, env=env) as run:
            try:
                while b"READY=1" not in notified.recv(4096):
                    pass
                opened = [str(Path(f"/proc/{run.pid}/fd/{number}").readlink()) for number in range(3)]
            finally:
                run.send_signal(signal.SIGTERM)
    assert run.returncode == 0
    assert opened == [os.devnull] * 3


def test_error_that_standard_error_does_not_take_does_not_stand_in_the_output(tmp_path):
    command = ["sh", "-c", 'exec "$@" 2>&-', "sh", sys.executable, "-m", "agent", "check", tmp_path / "absent.toml"]
    result = subprocess.run(command, stdout=subprocess.PIPE, check=False)
    assert (result.returncode, result.stdout) == (2, b"")
