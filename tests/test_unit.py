"""The Debian package and the unit as they are: installed by dpkg, run by systemd, upgraded, removed and purged.

The system is this machine's under an overlay; with `--packages`, one that debootstrap makes.
"""

import io
import json
import re
import shutil
import subprocess
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import private_system
import pytest
from authority import Authority
from conftest import TIME_SCALE
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
from PIL import Image

from agent import __version__
from agent.settings.config import shipped_manifest
from agent.wire.envelope import unpack, verify
from tools.packaging import deb, targets
from tools.packaging.targets import PackagingError

ROOT = Path(__file__).parent.parent
REGION = "203.0.113.7"  # RFC 5737: an address that is nobody's; here one of the private system's own
UNIT = "residency-agent.service"
NEWER = f"{__version__}+1"
SECONDS = 30.0 * TIME_SCALE
CLEAN_ROOT = "systemd-sysv,python3,mosquitto,mosquitto-clients,iproute2,ca-certificates"

AGENT = """
[vehicle]
source = "urn:test:car"
name = "car"
fixed_country = "CN"
[intake]
telemetry = ["vehicle/telemetry/#"]
pictures = ["vehicle/camera/#"]
[signing]
key_file = "/run/credentials/residency-agent.service/keys_signing.pem"
[paths]
policy = "policy.toml"
state = "/var/lib/residency-agent"
"""
POLICY = f"""
version = "test"
[[rules]]
topic = "vehicle/camera/#"
action = "redact"
class = "picture"
[[rules]]
topic = "vehicle/telemetry/#"
action = "forward"
class = "telemetry"
[regions.cn]
countries = ["CN"]
[endpoints.cn]
host = "{REGION}"
networks = ["{REGION}/32"]
ca_file = "/etc/residency-agent/ca.pem"
[permit.cn]
picture = ["cn"]
telemetry = ["cn"]
[classes.telemetry]
[classes.picture]
"""
BROKER = """
[Service]
ExecStart=/usr/sbin/mosquitto -c /etc/region/mosquitto.conf
"""
BROKER_CONF = f"""
listener 8883 {REGION}
cafile /etc/region/ca.pem
certfile /etc/region/cert.pem
keyfile /etc/region/key.pem
allow_anonymous true
"""
QUICK = f"""
[Service]
WatchdogSec={2 * TIME_SCALE:g}
TimeoutAbortSec=1
RestartSec=200ms
"""

pytestmark = pytest.mark.skipif(
    bool(private_system.why_not()) or not shipped_manifest().is_file(),
    reason=private_system.why_not() or "the detector is not in this checkout",
)


def system_python():
    found = subprocess.run(["/usr/bin/python3", "--version"], check=False, capture_output=True, text=True).stdout
    return ".".join(found.removeprefix("Python ").split(".")[:2])


@pytest.fixture(scope="module")
def debs(tmp_path_factory):
    """The package, and the same one version later, for this machine's own python3."""
    folder = tmp_path_factory.mktemp("deb")
    try:
        target = targets.named(targets.DEBIAN_NAMES.get(targets.here().architecture, "?"), system_python())
    except PackagingError as exc:
        pytest.skip(str(exc))
    staged = folder / "root"
    deb.stage(ROOT, staged, target)
    options = {"target": target, "maintainer": "A Builder <builder@example.com>", "compression": ("gzip", "1")}
    return [deb.pack(ROOT, staged, folder, deb.Options(**options, version=version)) for version in (__version__, NEWER)]


@pytest.fixture(scope="module")
def lower(packages, tmp_path_factory):
    if not packages:
        yield Path("/")
        return
    folder = tmp_path_factory.mktemp("debootstrap")
    private_system.debootstrap(folder, f"--include={CLEAN_ROOT}")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def system(debs, lower):
    """A booted system with a broker in the car, one in the region, and the package installed and configured."""
    with ExitStack() as stack:
        try:
            booted = stack.enter_context(private_system.booted(lower))
        except private_system.NoSystemError as exc:
            pytest.skip(str(exc))
        for path in debs:
            shutil.copy(path, booted.exchange)
        booted.run("ip", "address", "add", f"{REGION}/32", "dev", "lo")
        install(booted, debs[0])
        configure(booted)
        booted.run("systemctl", "daemon-reload")
        booted.run("systemctl", "enable", "--now", "mosquitto", "region")
        booted.run("systemctl", "enable", "--now", "--no-block", "residency-agent")
        booted.until(lambda: connected(booted), SECONDS)
        yield booted


def install(system, path):
    system.run("dpkg", "--force-confold", "--install", f"/run/exchange/{path.name}", seconds=300)


def configure(system):
    """Everything that a person would write after the installation; the brokers use what the package brings."""
    place = system.exchange / "authority"
    place.mkdir()
    authority = Authority(place)
    server = authority.issue(REGION, name="region")
    for source, name in ((authority.file, "ca"), (server.cert, "cert"), (server.key, "key")):
        system.write(f"/etc/region/{name}.pem", source.read_text())
    system.run("chmod", "644", "/etc/region/key.pem")
    system.write("/etc/residency-agent/ca.pem", authority.file.read_text())
    system.write("/etc/region/mosquitto.conf", BROKER_CONF)
    system.write("/etc/systemd/system/region.service", f"{BROKER}\n[Install]\nWantedBy=multi-user.target\n")
    key = Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    system.write("/etc/residency-agent/keys/signing.pem", key.decode())
    system.run("chmod", "600", "/etc/residency-agent/keys/signing.pem")
    system.write("/etc/residency-agent/agent.toml", AGENT)
    system.write("/etc/residency-agent/policy.toml", POLICY)
    system.write(f"/etc/systemd/system/{UNIT}.d/quick.conf", QUICK)
    system.run("cp", "/usr/share/doc/residency-agent/examples/mosquitto.conf", "/etc/mosquitto/mosquitto.conf")


def status(system):
    text = system.run("residency-agent", "status", "--json", "/etc/residency-agent/agent.toml", check=False)
    return json.loads(text) if text.startswith("{") else {}


def delivered(system):
    return status(system).get("counts", {}).get("delivered", 0)


def process(system):
    """Fields of /proc/PID/status of the agent, as the private system sees it."""
    text = system.path(f"/proc/{system.show(UNIT, 'MainPID')}/status").read_text()
    return dict(re.findall(r"^(\w+):\s*(.*)$", text, re.MULTILINE))


def connected(system):
    """Whether the agent that runs now has both sessions; an earlier one's status lies there until it writes its own."""
    found = status(system)
    sessions = found.get("sessions", {}).values()
    running = str(found.get("pid")) == system.show(UNIT, "MainPID")
    return running and bool(sessions) and all(session["connected"] for session in sessions)


def publish(system, topic, payload):
    (system.exchange / "payload").write_bytes(payload)
    system.run("mosquitto_pub", "-h", "127.0.0.1", "-q", "1", "-t", topic, "-f", "/run/exchange/payload")


def picture():
    pixels = np.random.default_rng(7).integers(0, 255, (240, 320, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def test_unit_runs_in_the_sandbox_that_it_asks_for(system):
    assert system.show(UNIT, "ActiveState") == "active"
    assert system.run("systemd-analyze", "verify", "--man=no", UNIT).strip() == ""
    model = status(system)["model"]
    assert (model["ready"], model["confined"]) == (True, True)
    found = process(system)
    assert found["NoNewPrivs"] == "1"
    assert found["Seccomp"] == "2"
    assert {found[name] for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {"0" * 16}
    assert found["Uid"].split()[0] == system.run("id", "-u", "residency-agent").strip()
    assert system.run("stat", "-c", "%U %a", "/var/lib/residency-agent").split() == ["residency-agent", "700"]
    assert system.run("stat", "-c", "%U %a", "/etc/residency-agent/keys").split() == ["root", "700"]


def test_installation_tells_nothing_of_where_it_was_built(system):
    found = system.run("find", "/opt/residency-agent", "-name", "RECORD", "-o", "-name", "direct_url.json")
    assert found == ""
    assert system.run("grep", "-rlF", str(ROOT), "/opt/residency-agent", check=False) == ""


def test_nothing_leaves_until_the_egress_rules_allow_the_network_and_then_what_leaves_is_signed(system):
    publish(system, "vehicle/telemetry/speed", b'{"n": 1}')
    publish(system, "vehicle/camera/front", picture())
    system.until(lambda: status(system)["counts"]["pending"] == 2, SECONDS)
    assert not status(system)["endpoints"]["cn"]["connected"]
    rules = system.run("residency-agent", "egress-rules", "/etc/residency-agent/agent.toml")
    system.write(f"/etc/systemd/system/{UNIT}.d/egress.conf", rules)
    command = ["mosquitto_sub", "-h", REGION, "-p", "8883", "--cafile", "/etc/region/ca.pem"]
    with system.start(*command, "-q", "1", "-t", "#", "-C", "2", "-W", f"{SECONDS:.0f}", "-F", "%x") as subscriber:
        system.run("systemctl", "daemon-reload")
        system.run("systemctl", "restart", UNIT)
        received = [unpack(bytes.fromhex(line.decode())) for line in subscriber.stdout]
    kinds = {envelope.attributes.datacontenttype for envelope in received}
    assert kinds == {"application/json", "image/jpeg"}
    key = load_pem_private_key(system.path("/etc/residency-agent/keys/signing.pem").read_bytes(), None)
    for envelope in received:
        verify(envelope, {envelope.signature.keyid: key.public_key()})
    system.until(lambda: delivered(system) == 2, SECONDS)


def test_reload_takes_a_new_policy_without_a_restart(system):
    before = system.show(UNIT, "MainPID")
    system.write("/etc/residency-agent/policy.toml", POLICY.replace('version = "test"', 'version = "newer"'))
    system.run("systemctl", "reload", UNIT)
    system.until(lambda: status(system).get("policy") == "newer", SECONDS)
    assert system.show(UNIT, "StatusText") == "policy newer"
    assert (system.show(UNIT, "ActiveState"), system.show(UNIT, "MainPID")) == ("active", before)


def test_agent_that_hangs_is_ended_by_the_watchdog_and_started_again(system):
    before = int(system.show(UNIT, "NRestarts"))
    system.until(lambda: connected(system), SECONDS)
    system.run("sh", "-c", f"kill -STOP {system.show(UNIT, 'MainPID')}")
    system.until(lambda: int(system.show(UNIT, "NRestarts")) > before, SECONDS)
    system.until(lambda: connected(system), SECONDS)
    assert delivered(system) == 2


def test_upgrade_keeps_the_ledger_and_the_configuration_and_runs_the_new_version(system, debs):
    before = system.show(UNIT, "MainPID")
    install(system, debs[1])
    assert system.run("dpkg-query", "--show", "--showformat=${Version}", "residency-agent") == NEWER
    system.until(lambda: system.show(UNIT, "MainPID") not in ("0", before) and connected(system), SECONDS)
    assert delivered(system) == 2
    assert system.path("/etc/residency-agent/agent.toml").read_text() == AGENT
    assert system.run("dpkg", "--verify", "residency-agent").split("\n")[:-1] == [
        "??5?????? c /etc/residency-agent/agent.toml"
    ]


def test_upgrade_while_systemd_waits_to_restart_the_agent_starts_it(system, debs):
    waits = f"/etc/systemd/system/{UNIT}.d/waits.conf"
    system.write(waits, "[Service]\nRestartSec=1h\n")
    system.run("systemctl", "daemon-reload")
    system.run("systemctl", "kill", "--signal=KILL", UNIT)
    system.until(lambda: system.show(UNIT, "SubState") == "auto-restart", SECONDS)
    install(system, debs[1])
    system.until(lambda: connected(system), SECONDS)
    system.path(waits).unlink()
    system.run("systemctl", "daemon-reload")


def test_upgrade_is_done_where_the_agent_does_not_start_and_it_starts_once_it_can(system, debs):
    policy = "/etc/residency-agent/policy.toml"
    system.write(policy, POLICY.replace("[permit.cn]", "[permit.nowhere]"))
    install(system, debs[1])
    assert system.run("dpkg-query", "--show", "--showformat=${db:Status-Status}", "residency-agent") == "installed"
    assert not connected(system)
    system.write(policy, POLICY)
    system.until(lambda: connected(system), SECONDS)


def test_upgrade_leaves_an_agent_stopped_that_was_stopped(system, debs):
    system.run("systemctl", "stop", UNIT)
    install(system, debs[1])
    assert system.show(UNIT, "ActiveState") == "inactive"


def test_removal_keeps_configuration_and_ledger_and_purge_removes_them(system):
    assert system.path("/opt/residency-agent").exists()
    system.run("dpkg", "--remove", "residency-agent")
    assert system.show(UNIT, "ActiveState") == "inactive"
    assert not system.path("/opt/residency-agent").exists()
    assert not system.path("/etc/systemd/system/multi-user.target.wants/residency-agent.service").is_symlink()
    for kept in ("/etc/residency-agent/agent.toml", "/var/lib/residency-agent/ledger.sqlite"):
        assert system.path(kept).exists()
    system.run("dpkg", "--purge", "residency-agent")
    for gone in ("/etc/residency-agent", "/var/lib/residency-agent", f"/etc/systemd/system/{UNIT}.d"):
        assert not system.path(gone).exists()
    assert "residency-agent" not in system.run("dpkg-query", "--list", "residency-agent", check=False)
