"""`doctor`: each failure is planted, and what it advises is read."""

import asyncio
import errno
import io
import os
import socket
import stat
import time
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from authority import Authority
from fake_broker import fake_broker
from harness import car
from PIL import Image

from agent import assembly
from agent import clock as agent_clock
from agent.__main__ import main
from agent.doctor import machine, network
from agent.doctor.examine import examine
from agent.doctor.model import png, try_model
from agent.redaction.turbojpeg import codec
from agent.redaction.worker import RedactionWorker
from agent.settings.config import shipped_manifest
from tools.brokers import free_port, mosquitto

NEEDS_DETECTOR = pytest.mark.skipif(not shipped_manifest().is_file(), reason="the detector is not in this checkout")
HOST = "broker.example.com"
DNS = pytest.mark.usefixtures("dns")


async def findings(setup, regions=()):
    return {finding.name: finding async for finding in examine(setup, regions)}


@NEEDS_DETECTOR
async def test_doctor_finds_nothing_wrong_with_a_working_car(tmp_path, patience):
    async with asyncio.timeout(2 * patience), car(tmp_path) as it:
        found = await findings(assembly.load(it.config))
    wanted = {
        "clock",
        "disk",
        "permissions",
        "borders",
        "metrics",
        "in-car broker",
        "endpoint cn",
        "endpoint hk",
        "model",
    }
    assert set(found) == wanted
    assert all(not finding.advice for finding in found.values()), [str(finding) for finding in found.values()]
    assert str(found["endpoint cn"]).startswith("ok    endpoint cn: ")
    assert "1280x720 in" in found["model"].detail
    assert f"JPEG by {codec()}" in found["model"].detail
    assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == 0o700, "made as the daemon makes it"


async def test_one_failure_does_not_hide_another(tmp_path, patience):
    async with asyncio.timeout(2 * patience), car(tmp_path) as it:
        it.configure(agent='[model]\nmanifest = "absent.json"\n[signing]\nkey_file = "absent.pem"\n')
        await it.inner.kill()
        await it.outer["hk"].kill()
        found = await findings(assembly.load(it.config))
    failed = {name for name, finding in found.items() if finding.advice}
    assert failed == {"permissions", "in-car broker", "endpoint hk", "model"}
    assert str(found["model"]).startswith("FAIL  model: ")
    assert "every picture is refused" in found["model"].advice


async def test_endpoint_that_reach_forbids_is_not_contacted_from_there_nor_from_anywhere(tmp_path, patience):
    async with asyncio.timeout(2 * patience), car(tmp_path) as it:
        policy = it.folder / "policy.toml"
        policy.write_text(policy.read_text().replace('countries = ["CN"]', 'countries = ["CN"]\nreach = ["cn"]'))
        setup = assembly.load(it.config)
        for regions in ((), ("cn",), ("cn", "hk")):
            found = await findings(setup, regions)
            assert str(found["endpoint cn"]).startswith("ok    ")
            assert str(found["endpoint hk"]).startswith("skip  endpoint hk: not to be reached from ")
            assert "-doctor" not in it.outer["hk"].log_path.read_text()
        found = await findings(setup, ("hk",))
        assert str(found["endpoint hk"]).startswith("ok    ")
        assert "-doctor" in it.outer["hk"].log_path.read_text()


def test_region_that_the_policy_does_not_have_is_named(setup, capsys):
    assert main(["doctor", str(setup.file), "--in", "mars"]) == 1
    assert "--in mars: the policy has no such region; it has cn, unlisted" in capsys.readouterr().err


# --- The machine ---------------------------------------------------------------------------------------------------


@pytest.fixture
def setup(tmp_path):
    """A car's configuration whose brokers are not there."""
    (tmp_path / "policy.toml").write_text(
        'version = "1"\nrules = []\n[regions.cn]\ncountries = ["CN"]\n'
        f'[endpoints.cn]\nhost = "{HOST}"\n[classes.data]\n[permit.cn]\ndata = ["cn"]\n'
    )
    (tmp_path / "agent.toml").write_text(
        '[vehicle]\nsource = "urn:x"\nname = "x"\n[intake]\ntelemetry = ["car/#"]\n[[position]]\ntopic = "gnss"\n'
    )
    return assembly.load(tmp_path / "agent.toml")


def configured(setup, **tables):
    """The same with some keys changed: `broker={"port": 1}`."""
    changed = {name: replace_struct(getattr(setup.config, name), keys) for name, keys in tables.items()}
    return replace(setup, config=replace_struct(setup.config, changed))


def replace_struct(struct, keys):
    return msgspec.structs.replace(struct, **keys)


def test_clock_that_was_never_set_is_a_finding(setup, monkeypatch):
    monkeypatch.setattr("time.time_ns", lambda: 86_400 * 10**9)
    found = machine.clock(setup)
    assert "1970-01-02" in found.detail
    assert "timedatectl" in found.advice


def test_clock_that_is_behind_what_was_written_is_a_finding(setup, monkeypatch):
    assert machine.clock(setup).advice == ""
    monkeypatch.setattr("time.time_ns", lambda: agent_clock.IS_SET_NS + 10**9)
    found = machine.clock(setup)
    assert "agent.toml was written" in found.detail
    assert "behind" in found.advice


def test_folder_that_cannot_be_made_is_a_finding(setup, tmp_path):
    (tmp_path / "file").write_text("")
    found = machine.disk(configured(setup, paths={"state": str(tmp_path / "file" / "state")}))
    assert "StateDirectory=" in found.advice


def test_disk_that_cannot_be_written_is_a_finding(setup, monkeypatch):
    def fails(_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "fsync", fails)
    found = machine.disk(setup)
    assert "Read-only" in found.detail
    assert "can be written" in found.advice


def test_file_that_a_running_agent_has_done_with_meanwhile_is_no_finding(setup, monkeypatch):
    picture = Path(setup.config.paths.state) / "picture"
    picture.parent.mkdir()
    picture.write_bytes(b"x")
    real = Path.stat

    def delivered(path, **options):
        known = real(path, **options)
        if path == picture:
            picture.unlink()
        return known

    monkeypatch.setattr(Path, "stat", delivered)
    assert machine.disk(setup).advice == ""
    assert not picture.exists()


def test_disk_without_the_promised_room_is_a_finding(setup):
    found = machine.disk(configured(setup, limits={"ledger_bytes": 1 << 60}))
    assert "limits.ledger_bytes promises" in found.advice


def test_room_that_the_ledger_already_fills_counts_as_its_own(setup, tmp_path, monkeypatch):
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "ledger").write_bytes(bytes(3 << 20))
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1 << 20}))
    given = configured(setup, limits={"ledger_bytes": 4 << 20})
    assert machine.disk(given).advice == ""
    assert machine.disk(configured(setup, limits={"ledger_bytes": 5 << 20})).advice


def test_disk_that_syncs_slowly_is_a_finding(setup, monkeypatch):
    monkeypatch.setattr(machine, "_sync_seconds", lambda _: 0.4)
    found = machine.disk(setup)
    assert "fsync 400 ms" in found.detail
    assert "worn" in found.advice


def test_ledger_that_is_open_to_all_is_a_finding(setup, tmp_path):
    (tmp_path / "state").mkdir(mode=0o755)
    (found,) = machine.permissions(setup)
    assert found.advice == f"chmod o-rwx {tmp_path / 'state'}"


@pytest.mark.parametrize("name", ["agent.toml", "policy.toml"])
def test_configuration_that_others_can_write_is_a_finding(setup, tmp_path, name):
    (tmp_path / name).chmod(0o664)
    (found,) = machine.permissions(setup)
    assert found.advice.endswith(f"chmod go-w {tmp_path / name}")


SECRETS = [
    ("broker", "password_file", "broker.password_file"),
    ("signing", "key_file", "signing.key_file"),
    ("signing", "pseudonym_key_file", "signing.pseudonym_key_file"),
]


@pytest.mark.parametrize(("table", "key", "named"), SECRETS)
def test_secret_that_others_can_read_or_that_is_missing_is_a_finding(setup, tmp_path, table, key, named):
    secret = tmp_path / "secret"
    given = configured(setup, **{table: {key: str(secret)}})
    (found,) = machine.permissions(given)
    assert found.detail.startswith(f"{named}: [Errno 2]")
    assert "can read" in found.advice
    secret.write_text("s")
    secret.chmod(0o640)
    (found,) = machine.permissions(given)
    assert found.advice == f"chmod 600 {secret}"
    secret.chmod(0o600)
    (found,) = machine.permissions(given)
    assert found.advice == ""


def test_secrets_of_endpoints_are_looked_at_as_well(setup, tmp_path):
    (tmp_path / "agent.toml").write_text(
        f'{setup.file.read_text()}[credentials.cn]\nusername = "car"\npassword_file = "absent"\n'
        'cert_file = "absent"\nkey_file = "absent"\n'
    )
    found = list(machine.permissions(assembly.load(tmp_path / "agent.toml")))
    assert [finding.detail.split(":")[0] for finding in found] == [
        "credentials.cn.password_file",
        "credentials.cn.key_file",
    ]


def test_credential_that_only_systemd_gives_says_so(setup):
    given = configured(setup, signing={"key_file": "/run/credentials/residency-agent.service/signing-key"})
    (found,) = machine.permissions(given)
    assert "put it into /etc/residency-agent/keys, start the unit" in found.advice


def test_credential_that_systemd_gives_by_an_acl_is_fine(setup, tmp_path, monkeypatch):
    secret = tmp_path / "keys_signing.pem"
    secret.write_text("s")
    secret.chmod(0o440)
    given = configured(setup, signing={"key_file": str(secret)})
    assert next(machine.permissions(given)).advice
    monkeypatch.setattr(machine, "CREDENTIALS", f"{tmp_path}/")
    (found,) = machine.permissions(given)
    assert found.advice == ""


def test_borders_that_cannot_be_used_are_a_finding(setup):
    assert machine.borders(setup).advice == ""
    found = machine.borders(replace(setup, own_borders=b"{}"))
    assert "FeatureCollection" in found.detail
    assert found.advice


def test_metrics_without_their_library_are_a_finding(setup, monkeypatch):
    assert machine.extras(setup).advice == ""
    given = configured(setup, metrics={"port": 9464})
    assert machine.extras(given).detail == "on 127.0.0.1:9464"
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert "residency-agent[metrics]" in machine.extras(given).advice


# --- The network ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture
def dns(monkeypatch):
    """What the broker's name resolves to."""
    answers, real = {"host": "127.0.0.1"}, socket.getaddrinfo

    def getaddrinfo(host, port, *numbers, **options):
        if host != HOST:
            return real(host, port, *numbers, **options)
        if isinstance(answers["host"], OSError):
            raise answers["host"]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (answers["host"], port))]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return answers


@asynccontextmanager
async def served(identity, *lines):
    """A real broker with this identity."""
    files = [f"certfile {identity.cert}", f"keyfile {identity.key}"]
    async with mosquitto(config_lines=[*files, *lines]) as broker:
        yield broker


def endpoint(setup, credential="", **keys):
    """The setup with keys of its endpoint, and of this vehicle's credential for it."""
    folder = setup.file.parent
    lines = "".join(
        f"{key} = {value!r}\n" if isinstance(value, str) else f"{key} = {value}\n" for key, value in keys.items()
    )
    policy = (folder / "policy.toml").read_text()
    (folder / "policy.toml").write_text(policy.replace(f'host = "{HOST}"\n', f'host = "{HOST}"\n{lines}'))
    if credential:
        (folder / "agent.toml").write_text(f"{setup.file.read_text()}[credentials.cn]\n{credential}")
    return assembly.load(folder / "agent.toml")


async def examined(setup):
    return await network.endpoint(setup, "cn")


@DNS
async def test_endpoint_that_is_as_the_policy_says_is_fine(setup, authority):
    identity = authority.issue(HOST)
    async with served(identity) as broker:
        found = await examined(
            endpoint(
                setup,
                port=broker.port,
                ca_file=str(authority.file),
                spki_sha256=[identity.pin],
                networks=["127.0.0.0/8"],
            )
        )
    assert str(found) == f"ok    endpoint cn: {HOST} at 127.0.0.1:{broker.port}, TLS verified"


@DNS
@pytest.mark.parametrize(
    ("issued", "keys", "advice"),
    [
        ({"days": -1}, {}, "has expired"),
        ({"hosts": ("other.example.com",)}, {}, "for other names: correct endpoints.cn.host"),
        ({}, {"ca_file": None}, "name the right roots in endpoints.cn.ca_file"),
        ({}, {"spki_sha256": ["00" * 32]}, "endpoints.cn.spki_sha256 was not"),
        ({}, {"networks": ["192.0.2.0/24"]}, "correct endpoints.cn.networks"),
        ({}, {"ca_file": "absent.pem"}, "look at endpoints.cn.ca_file"),
    ],
    ids=["expired", "other-name", "untrusted", "pin", "networks", "no-file"],
)
async def test_endpoint_that_is_not_who_or_where_the_policy_says_is_a_finding(setup, authority, issued, keys, advice):
    name = setup.file.parent.name
    identity = authority.issue(*issued.get("hosts", (HOST,)), name=name, days=issued.get("days", 30))
    async with served(identity) as broker:
        given = {"port": broker.port, "ca_file": str(authority.file)} | keys
        found = await examined(endpoint(setup, **{key: value for key, value in given.items() if value is not None}))
    assert advice in found.advice, found


async def test_certificate_that_is_not_valid_yet_points_at_the_clock():
    assert "clock of the vehicle behind" in network._certificate_advice("endpoints.cn", 9)
    assert "not acceptable" in network._certificate_advice("endpoints.cn", 23)


async def test_name_that_the_dns_does_not_know_is_a_finding(setup, dns):
    dns["host"] = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    found = await examined(setup)
    assert "Name or service not known" in found.detail
    assert "resolvectl query" in found.advice


@DNS
async def test_port_on_which_nothing_listens_is_a_finding(setup, authority):
    found = await examined(endpoint(setup, port=free_port(), ca_file=str(authority.file)))
    assert "nothing listens there" in found.advice


@DNS
async def test_port_without_tls_is_a_finding(setup, authority):
    async with mosquitto() as broker:
        found = await examined(endpoint(setup, port=broker.port, ca_file=str(authority.file)))
    assert "TLS port" in found.advice, found


@DNS
async def test_broker_that_never_answers_is_a_finding(setup, authority, monkeypatch):
    monkeypatch.setattr("agent.mqtt.connection.CONNECT_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        found = await examined(endpoint(setup, port=silent.getsockname()[1], ca_file=str(authority.file)))
    assert "egress-rules" in found.advice, found


@DNS
async def test_broker_that_does_not_let_the_vehicle_in_is_a_finding(setup, authority, tmp_path):
    (tmp_path / "users").write_text("")
    (tmp_path / "users").chmod(0o600)
    identity = authority.issue(HOST)
    lines = [f"password_file {tmp_path / 'users'}", "allow_anonymous false"]
    async with served(identity, *lines) as broker:
        found = await examined(endpoint(setup, port=broker.port, ca_file=str(authority.file)))
    assert "[credentials.cn]" in found.advice, found


@DNS
async def test_credential_that_cannot_be_read_is_a_finding_and_no_crash(setup):
    found = await examined(endpoint(setup, 'username = "x"\npassword_file = "absent"\n'))
    assert found.advice == "correct [credentials.cn] in agent.toml"
    found = await network.in_car(configured(setup, broker={"password_file": "/absent"}))
    assert found.advice == "correct [broker] in agent.toml"


@DNS
async def test_own_certificate_that_ends_soon_is_a_finding(setup, authority):
    identity, own = authority.issue(HOST), authority.issue(name="car", days=5)
    async with served(identity, f"cafile {authority.file}", "require_certificate true") as broker:
        credential = f'cert_file = "{own.cert}"\nkey_file = "{own.key}"\n'
        found = await examined(endpoint(setup, credential, port=broker.port, ca_file=str(authority.file)))
    assert f"ends at {time.strftime('%Y-', time.gmtime(time.time() + 5 * 86_400))}" in found.advice
    assert "renew it" in found.advice


async def test_in_car_broker_that_does_not_let_the_agent_in_is_a_finding(setup, patience):
    async with asyncio.timeout(patience), fake_broker() as broker:
        broker.connack = 0x87
        found = await network.in_car(configured(setup, broker={"port": broker.port}))
    assert "access list" in found.advice, found


async def test_what_is_no_broker_at_all_is_a_finding(setup):
    with socket.create_server(("127.0.0.1", 0)) as other:
        closing = asyncio.create_task(asyncio.to_thread(lambda: other.accept()[0].close()), name="hang up")  # noqa: PLW0108 - accept blocks
        found = await network.in_car(configured(setup, broker={"port": other.getsockname()[1]}))
        await closing
    assert "as an MQTT broker does" in found.advice, found


async def test_in_car_broker_that_does_not_run_is_a_finding(setup):
    found = await network.in_car(configured(setup, broker={"port": free_port()}))
    assert "systemctl status mosquitto" in found.advice


# --- The model -----------------------------------------------------------------------------------------------------


@NEEDS_DETECTOR
async def test_model_that_is_altered_or_short_of_memory_is_a_finding(setup, tmp_path):
    manifest = shipped_manifest()
    altered = tmp_path / manifest.name
    altered.write_bytes(manifest.read_bytes())
    (tmp_path / "detector.onnx").write_bytes(manifest.with_name("detector.onnx").read_bytes()[:-1] + b"?")
    found = await try_model(configured(setup, model={"manifest": str(altered)}))
    assert "SHA-256" in found.detail
    assert "reinstall it" in found.advice
    found = await try_model(configured(setup, model={"memory_bytes": 64 << 20}))
    assert found.advice, found


@NEEDS_DETECTOR
async def test_model_that_is_slow_or_not_confined_is_a_finding(setup, monkeypatch):
    monkeypatch.setattr("agent.doctor.model.SLOW_SECONDS", 0.0)
    assert "pictures will queue" in (await try_model(setup)).advice
    monkeypatch.setattr(RedactionWorker, "_start", unconfined(RedactionWorker._start))
    assert "CONFIG_SECCOMP_FILTER" in (await try_model(setup)).advice


def unconfined(start):
    async def as_on_an_old_kernel(self):
        await start(self)
        self.confined = False

    return as_on_an_old_kernel


def test_picture_of_the_doctor_is_one():
    with Image.open(io.BytesIO(png())) as picture:
        picture.load()
        assert (picture.size, picture.mode) == ((1280, 720), "L")
        assert len(set(picture.tobytes()[: 1280 * 8])) > 100
