import errno
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import ledger_samples
import pytest

from agent import __main__ as command_line
from agent import assembly, commands, status, wiring
from agent.errors import InvalidConfigError
from agent.payloads.fields import apply_field_rules
from agent.store.entries import LedgerLimits
from agent.store.ledger import Ledger

ROOT = Path(__file__).parent.parent
NOBODY = 65_534
AGENT = """
[vehicle]
source = "urn:example:1"
name = "one"
[intake]
telemetry = ["vehicle/#"]
[[position]]
topic = "vehicle/gnss"
"""
POLICY = """
version = "1"
rules = [{ topic = "vehicle/#", action = "forward", class = "data" }]
[regions.cn]
countries = ["CN"]
[endpoints.cn]
host = "127.0.0.1"
tls = false
networks = ["192.0.2.0/24", "2001:db8::/32"]
[endpoints.eu]
host = "mqtt.example.com"
[endpoints.fixed]
host = "198.51.100.7"
[classes.data]
[permit.cn]
data = ["cn"]
"""


VSS = 'format = "vss"\nlatitude = "vss/lat"\n'


@pytest.fixture
def files(tmp_path):
    (tmp_path / "agent.toml").write_text(AGENT)
    (tmp_path / "policy.toml").write_text(POLICY)
    return tmp_path


def mistakes(folder):
    with pytest.raises(InvalidConfigError) as caught:
        assembly.load(folder / "agent.toml")
    return {mistake.key for mistake in caught.value.mistakes}


def change(file, old, new):
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def test_check_prints_what_would_be_published_where_and_warns(files, capsys):
    assert command_line.main(["check", str(files / "agent.toml")]) == 0
    printed = capsys.readouterr().out
    assert "cn        cn" in printed
    assert "unlisted  -" in printed
    assert "(any other)  refuse" in printed
    assert "warning: endpoints.eu is permitted to no region" in printed
    assert "records are not signed" in printed


def test_shipped_examples_fit_together():
    setup = assembly.load(ROOT / "systemd" / "agent.example.toml")
    printed = commands.check(setup)
    assert "unlisted" in printed
    assert "never reached" not in printed


def test_mistakes_of_both_files_are_reported_at_once(files, capsys):
    change(files / "agent.toml", '"vehicle/#"', '"vehicle/#", "vehicle/+"')
    change(files / "policy.toml", 'data = ["cn"]', 'data = ["us"]')
    assert mistakes(files) == {"intake", "permit.cn.data"}
    assert command_line.main(["check", str(files / "agent.toml")]) == 2
    printed = capsys.readouterr().err
    assert f"{files / 'policy.toml'}: permit.cn.data: found 'us', wanted one of [endpoints]" in printed


def test_compression_without_its_library_is_a_mistake_that_names_the_extra(files, capsys, monkeypatch):
    change(files / "policy.toml", "tls = false", 'tls = false\nbatch_records = 8\nbatch_compression = "zstd"')
    assert command_line.main(["check", str(files / "agent.toml")]) == 0
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "zstandard" else found(name))
    assert command_line.main(["check", str(files / "agent.toml")]) == 2
    printed = capsys.readouterr().err
    assert f"{files / 'policy.toml'}: endpoints.cn.batch_compression: found 'zstd', wanted none" in printed
    assert "pip install 'residency-agent[zstd]'" in printed


@pytest.mark.parametrize(
    ("old", "new", "key"),
    [
        ('topic = "vehicle/gnss"', 'topic = "vehicle/#/gnss"', "position[0].topic"),
        ('telemetry = ["vehicle/#"]', "telemetry = []", "intake"),
        ('name = "one"', 'name = "one"\nregistration = "FR"', "vehicle.registration"),
        ('[[position]]\ntopic = "vehicle/gnss"', "", "position"),
        ("[intake]", '[credentials.us]\nusername = "x"\n[intake]', "credentials.us"),
        ("[intake]", '[broker]\npassword_file = "pw"\n[intake]', "broker.username"),
        ("[intake]", '[credentials.cn]\npassword_file = "pw"\n[intake]', "credentials.cn.username"),
        ("[intake]", '[credentials.cn]\nkey_file = "key.pem"\n[intake]', "credentials.cn.cert_file"),
        ("[intake]", '[metrics]\nhost = "localhost"\n[intake]', "metrics.host"),
        ('"vehicle/gnss"', '"vehicle/gnss"\nlatitude = "lat"', "position[0].latitude"),
        ('"vehicle/gnss"', '"vehicle/gnss"\nlongitude = ""', "position[0].longitude"),
        ('"vehicle/gnss"', '"vehicle/gnss"\naccuracy = "acc"', "position[0].accuracy"),
        ('"vehicle/gnss"', '"vehicle/gnss"\ntime = "ts"', "position[0].time"),
        ('"vehicle/gnss"', f'"vss/+"\n{VSS}longitude = "other/lon"', "position[0].longitude"),
        ('"vehicle/gnss"', f'"vss/+"\n{VSS}longitude = "vss/lat"', "position[0].longitude"),
        ('"vehicle/gnss"', f'"vss/+"\n{VSS}longitude = "vss/lon"\naccuracy = "/acc"', "position[0].accuracy"),
        ("[intake]", '[metrics]\nhost = "0.0.0.0"\n[intake]', "metrics.host"),
        ("[intake]", "[limits]\npayload_bytes = 268435456\n[intake]", "limits.payload_bytes"),
    ],
)
def test_what_does_not_fit_together_is_named(files, old, new, key):
    change(files / "agent.toml", old, new)
    assert mistakes(files) == {key}


def test_rule_that_is_bound_to_the_registration_needs_one(files, capsys):
    change(files / "policy.toml", 'class = "data" }', 'class = "data", basis = "registration" }')
    assert mistakes(files) == {"vehicle.registration"}
    assert command_line.main(["check", str(files / "agent.toml")]) == 2
    wanted = "vehicle.registration: found 'nothing', wanted a country, to which rules[0] of the policy binds vehicle/#"
    assert wanted in capsys.readouterr().err
    change(files / "agent.toml", 'name = "one"', 'name = "one"\nregistration = "CN"')
    assembly.load(files / "agent.toml")


@pytest.mark.parametrize(
    ("telemetry", "positions", "key"),
    [
        (["vehicle/gnss/+"], ["vehicle/+/raw"], "position"),
        (["car/#"], ["vehicle/+/gnss", "vehicle/front/+"], "position"),
        (["$share/gateway/vehicle/#"], ["vehicle/gnss"], "intake.telemetry"),
        (["car/#"], ["$share/gateway/vehicle/gnss"], "position[0].topic"),
    ],
)
def test_filters_by_which_a_message_would_come_twice_or_under_another_name_are_named(files, telemetry, positions, key):
    change(files / "agent.toml", 'telemetry = ["vehicle/#"]', f"telemetry = {json.dumps(telemetry)}")
    tables = "".join(f'[[position]]\ntopic = "{topic}"\n' for topic in positions)
    change(files / "agent.toml", '[[position]]\ntopic = "vehicle/gnss"\n', tables)
    assert mistakes(files) == {key}


def test_filters_that_another_one_covers_are_not_subscribed(files):
    change(files / "agent.toml", 'telemetry = ["vehicle/#"]', 'telemetry = ["vehicle/gnss/front", "vehicle/speed"]')
    change(
        files / "agent.toml",
        'topic = "vehicle/gnss"',
        'topic = "vehicle/gnss/+"\n[[position]]\ntopic = "vehicle/speed"',
    )
    (options,) = wiring.intakes(assembly.load(files / "agent.toml"))
    assert options.outgoing == ("vehicle/gnss/front", "vehicle/speed")
    assert sorted(options.subscribed) == ["vehicle/gnss/+", "vehicle/speed"]


def test_field_rules_are_those_of_the_rule_that_decides(files):
    rule = '{ topic = "vehicle/%s", action = "forward", class = "data"%s }'
    rules = [
        rule % ("#", ', fields = { drop = ["/vin", "/driver"] }'),
        rule % ("#", ', fields = { drop = ["/debug"] }'),
        rule % ("speed", ""),
        rule % ("speed", ', fields = { drop = ["/debug"] }'),
    ]
    change(files / "policy.toml", rule % ("#", ""), ", ".join(rules))
    (known,) = wiring.field_rules_of(assembly.load(files / "agent.toml")).items()
    assert known[0] == "vehicle/#"
    assert apply_field_rules(b'{"vin":"LSV","driver":"A","debug":1}', known[1]) == b'{"debug":1}'


@pytest.mark.parametrize(
    "keys",
    ['topic = "vss/+"\n' + VSS + 'longitude = "vss/lon"\naccuracy = "vss/acc"', 'topic = "g"\nformat = "nmea"'],
)
def test_positions_that_stand_where_they_are_looked_for_are_fine(files, keys):
    change(files / "agent.toml", 'topic = "vehicle/gnss"', keys)
    assembly.load(files / "agent.toml")


@pytest.mark.parametrize("key", ["policy", "state"])
def test_name_that_no_file_can_have_is_a_mistake_of_every_command(files, capsys, key):
    change(files / "agent.toml", "[intake]", f'[paths]\n{key} = "a\\u0000b"\n[intake]')
    for command in ("check", "run", "doctor", "egress-rules"):
        assert command_line.main([command, str(files / "agent.toml")]) == 2
        assert f"{files / 'agent.toml'}: paths.{key}: found 'a\\x00b', wanted text" in capsys.readouterr().err
    assert command_line.main(["status", str(files / "agent.toml")]) == 1


def test_mistake_in_agent_toml_does_not_hide_those_of_the_policy(files):
    change(files / "agent.toml", "[intake]", '[broker]\nhsot = "x"\n[paths]\npolicy = "fleet.toml"\n[intake]')
    (files / "policy.toml").rename(files / "fleet.toml")
    change(files / "fleet.toml", 'data = ["cn"]', 'data = ["us"]')
    assert mistakes(files) == {"broker.hsot", "permit.cn.data"}
    (files / "agent.toml").write_text("not = [toml")
    assert mistakes(files) == {"the file"}


def test_country_that_the_borders_do_not_have_is_a_warning(files, capsys):
    change(files / "policy.toml", '["CN"]', '["CN", "UK"]')
    assert command_line.main(["check", str(files / "agent.toml")]) == 0
    assert "warning: regions.cn.countries: the borders have no UK" in capsys.readouterr().out


def test_mistake_in_own_borders_is_one_of_check_and_of_run(files, capsys):
    (files / "own.geojson").write_text("{}")
    change(files / "policy.toml", "[classes.data]", '[borders]\ngeojson = "own.geojson"\n[classes.data]')
    for command in ("check", "run"):
        assert command_line.main([command, str(files / "agent.toml")]) == 2
        assert f"{files / 'own.geojson'}: type: found '{{}}', wanted a FeatureCollection" in capsys.readouterr().err


def test_own_borders_replace_the_shipped_ones_and_their_mistakes_are_named(files):
    square = [[[0, 0], [1, 0], [1, 1], [0, 1], [0, 0]]]
    feature = {
        "type": "Feature",
        "properties": {"iso1A2": "CN"},
        "geometry": {"type": "Polygon", "coordinates": square},
    }
    (files / "own.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": [feature]}))
    change(files / "policy.toml", "[classes.data]", '[borders]\ngeojson = "own.geojson"\n[classes.data]')
    borders = assembly.load(files / "agent.toml").borders()
    assert borders.countries_near(0.5, 0.5, 10) == {"CN"}
    (files / "own.geojson").unlink()
    with pytest.raises(InvalidConfigError, match=r"borders\.geojson"):
        assembly.load(files / "agent.toml").borders()


def test_manifest_that_is_missing_is_a_warning_and_one_that_may_not_be_read_is_a_mistake(files, capsys, monkeypatch):
    change(files / "agent.toml", "[intake]", '[model]\nmanifest = "absent.json"\n[intake]')
    assert command_line.main(["check", str(files / "agent.toml")]) == 0
    assert "absent.json does not exist or is empty" in capsys.readouterr().out
    stat, read = Path.stat, Path.read_bytes

    def closed(path, do):
        if path.name == "absent.json":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return do(path)

    monkeypatch.setattr(Path, "stat", lambda path, **_: closed(path, stat))
    monkeypatch.setattr(Path, "read_bytes", lambda path: closed(path, read))
    assert mistakes(files) == {"model.manifest"}


def test_state_folder_that_cannot_be_made_is_named(files, capsys):
    change(files / "agent.toml", "[intake]", '[paths]\nstate = "policy.toml"\n[intake]')
    assert command_line.main(["run", str(files / "agent.toml")]) == 1
    assert f"paths.state: {files / 'policy.toml'}: File exists" in capsys.readouterr().err


def test_root_stores_nothing_that_the_owner_of_the_state_folder_could_not_read(files, capsys, monkeypatch):
    state = files / "state"
    state.mkdir()
    if os.geteuid() == 0:
        os.chown(state, NOBODY, NOBODY)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert command_line.main(["run", str(files / "agent.toml")]) == 1
    assert f"paths.state: {state} is of user {state.stat().st_uid}" in capsys.readouterr().err
    assert list(state.iterdir()) == []


def test_egress_rules_allow_the_networks_of_the_policy_and_nothing_else(files):
    lines = commands.egress_rules(assembly.load(files / "agent.toml")).splitlines()
    allowed = {line.removeprefix("IPAddressAllow=") for line in lines if line.startswith("IPAddressAllow=")}
    assert allowed == {"localhost", "192.0.2.0/24", "2001:db8::/32", "198.51.100.7"}
    assert "IPAddressDeny=any" in lines
    assert "# not reached: endpoints.eu: mqtt.example.com is a name without `networks`" in "\n".join(lines)


def test_egress_rules_tell_a_person_what_they_do_not_let_through(files, capsys):
    assert command_line.main(["egress-rules", str(files / "agent.toml")]) == 0
    printed = capsys.readouterr()
    (told,) = printed.err.splitlines()
    assert told.startswith("warning: not reached: endpoints.eu: mqtt.example.com is a name without `networks`")
    assert "warning" not in printed.out


@pytest.mark.parametrize(
    ("host", "line"),
    [
        ("192.168.5.1", "IPAddressAllow=192.168.5.1"),
        ("fd00::1", "IPAddressAllow=fd00::1"),
        ("broker.lan", "# not reached: broker.host: broker.lan is a name: write IPAddressAllow= with its address here"),
        ("localhost", ""),
        ("::1", ""),
    ],
)
def test_egress_rules_do_not_cut_off_the_in_car_broker(files, host, line):
    before = commands.egress_rules(assembly.load(files / "agent.toml")).splitlines()
    change(files / "agent.toml", "[intake]", f'[broker]\nhost = "{host}"\n[intake]')
    after = commands.egress_rules(assembly.load(files / "agent.toml")).splitlines()
    added = [row for row in after if row not in before]
    assert len(added) == bool(line)
    assert all(row.startswith(line) for row in added)


@pytest.mark.parametrize(
    ("old", "new", "key"),
    [
        ('"mqtt.example.com"', '"x\\nExecStartPre=+/bin/evil"', "endpoints.eu.host"),
        ('"mqtt.example.com"', '"mqtt.example.com\\n"', "endpoints.eu.host"),
        ('"192.0.2.0/24"', '"fe80::1%a\\nExecStartPre=+/bin/evil"', "endpoints.cn.networks"),
        ("[endpoints.eu]", '[endpoints."eu\\nExecStartPre=+/bin/evil"]', "endpoints"),
        ('version = "1"', 'version = "1\\n"', "version"),
        ('"CN"', '"CN\\n"', "regions.cn.countries"),
    ],
)
def test_no_name_of_the_policy_becomes_a_line_of_the_units(files, old, new, key):
    change(files / "policy.toml", old, new)
    assert mistakes(files) == {key}


def test_status_of_an_agent_that_never_ran_is_a_clear_error(files, capsys):
    assert command_line.main(["status", str(files / "agent.toml")]) == 1
    assert "ledger.sqlite: there is no ledger" in capsys.readouterr().err


def test_status_of_a_stopped_agent_shows_its_counters(files, capsys):
    (files / "state").mkdir()
    Ledger.open(files / "state" / "ledger.sqlite", LedgerLimits()).close()
    assert command_line.main(["status", str(files / "agent.toml")]) == 0
    printed = capsys.readouterr().out
    assert "agent       stopped" in printed
    assert "conserved   0 = 0 + 0 + 0 + 0 + 0 + 0" in printed
    assert command_line.main(["status", "--json", str(files / "agent.toml")]) == 0
    assert json.loads(capsys.readouterr().out)["counts"]["conserved"] is True


def test_a_process_of_another_program_is_not_taken_for_the_agent():
    with subprocess.Popen(["sleep", "60"]) as other:
        try:
            assert not status._is_running(other.pid)
            assert not status._is_running(None)
        finally:
            os.kill(other.pid, signal.SIGKILL)


def test_status_file_that_was_cut_reads_as_nothing(tmp_path):
    (tmp_path / "status.json").write_text('{"pid": 1')
    assert status.read(tmp_path / "status.json") == {}
    status.write(tmp_path / "status.json", {"a": 1})
    assert status.read(tmp_path / "status.json") == {"a": 1}


def test_asyncapi_and_reference_are_printed(capsys):
    assert command_line.main(["asyncapi"]) == 0
    assert '"asyncapi": "3.0.0"' in capsys.readouterr().out
    assert command_line.main(["reference"]) == 0
    assert "| `rules[].class` |" in capsys.readouterr().out


UNREAD, INTERRUPTED = 141, 130  # as a shell says it


def called(words, **streams):
    """The status of a command and what it said on standard error, its output going where `streams` says."""
    command = [sys.executable, "-m", "agent", *words]
    result = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False, **streams)
    return result.returncode, result.stderr


@pytest.mark.parametrize("unbuffered", ["", "1"], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize("command", ["check", "status", "audit"])
def test_reader_that_has_seen_enough_ends_a_command_quietly(files, command, unbuffered):
    ledger = files / "state" / "ledger.sqlite"
    ledger.parent.mkdir()
    with closing(ledger_samples.opened(ledger)) as opened:
        opened.commit([ledger_samples.store(1)])
    words = ["audit", "export", str(ledger)] if command == "audit" else [command, str(files / "agent.toml")]
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as stdout:
        status, told = called(words, stdout=stdout, env={**os.environ, "PYTHONUNBUFFERED": unbuffered})
    assert (status, told) == (UNREAD, "")


def test_output_that_cannot_be_written_is_a_failure(files):
    with Path("/dev/full").open("wb") as full:
        status, told = called(["egress-rules", str(files / "agent.toml")], stdout=full)
    assert (status, told) == (1, "residency-agent: the output: No space left on device\n")


def test_ctrl_c_ends_a_command_quietly(files, patience):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        change(files / "agent.toml", "[intake]", f"[broker]\nport = {port}\n[intake]")
        command = [sys.executable, "-m", "agent", "doctor", str(files / "agent.toml")]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as doctor:
            silent.settimeout(patience)
            connection, _ = silent.accept()
            with connection:
                doctor.send_signal(signal.SIGINT)
                _, told = doctor.communicate(timeout=patience)
    assert (doctor.returncode, told) == (INTERRUPTED, "")


def test_program_explains_itself():
    result = subprocess.run([sys.executable, "-m", "agent", "--help"], capture_output=True, text=True, check=False)
    assert result.returncode == 0
    assert "usage: residency-agent" in result.stdout


def test_wrong_usage_exits_with_two():
    with pytest.raises(SystemExit) as caught:
        command_line.main(["explain", "agent.toml", "--topic", "x", "--at", "here"])
    assert caught.value.code == 2


def test_check_and_status_start_without_the_heavy_imports(files):
    script = (
        "import sys; from agent.__main__ import main; "
        f"code = main(['check', {str(files / 'agent.toml')!r}]); "
        "heavy = {'onnxruntime', 'PIL', 'paho.mqtt.client'} & set(sys.modules); sys.exit(10 if heavy else code)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
