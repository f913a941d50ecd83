"""The arm64 package on an emulated processor: asked for by --packages, as it takes minutes and fetches 200 MB."""

import io
import shutil
import subprocess
from pathlib import Path

import numpy as np
import private_system
import pytest
from conftest import TIME_SCALE
from PIL import Image

from agent import status
from tools.packaging import deb, targets

ROOT = Path(__file__).parent.parent
EMULATOR = "/usr/bin/qemu-aarch64-static"
SECONDS = 120 * TIME_SCALE

# The kernel's handlers of foreign programs belong to the user namespace, so nothing outside learns of this one.
# $1: the foreign root. No /sys: onnxruntime would read the host's processor in it.
INSIDE = r"""
set -e
mount -t proc proc /proc
mkdir -p "$1/handlers"
mount -t binfmt_misc handlers "$1/handlers"
printf '%s' ':aarch64:M::\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00:'\
'\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff:/usr/bin/qemu-aarch64-static:F' \
    > "$1/handlers/register"
mount -t proc proc "$1/proc"
for name in null zero random urandom; do touch "$1/dev/$name"; mount --bind "/dev/$name" "$1/dev/$name"; done
ip link set lo up
mosquitto -c "$1/car/inner.conf" &
mosquitto -c "$1/car/outer.conf" &
chroot "$1" uname -m > "$1/car/machine"
chroot "$1" residency-agent run /car/agent.toml &
agent=$!
until grep -q '"ready": *true' "$1/car/state/status.json" 2> /dev/null; do sleep 1; done
mosquitto_sub -p 1884 -t '#' -C 2 -F '%t %x' > "$1/car/received" &
subscriber=$!
mosquitto_pub -q 1 -t vehicle/telemetry/speed -m '{"n": 1}'
mosquitto_pub -q 1 -t vehicle/camera/front -f "$1/car/picture.jpg"
wait $subscriber
kill $agent
wait $agent
"""
AGENT = """
[vehicle]
source = "urn:test:car"
name = "car"
fixed_country = "CN"
[intake]
telemetry = ["vehicle/telemetry/#"]
pictures = ["vehicle/camera/#"]
[model]
timeout_s = 60.0
[paths]
policy = "policy.toml"
state = "state"
"""
POLICY = """
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
host = "127.0.0.1"
port = 1884
tls = false
[permit.cn]
picture = ["cn"]
telemetry = ["cn"]
[classes.telemetry]
[classes.picture]
"""


@pytest.fixture
def foreign(packages, tmp_path):
    """A folder of Debian for aarch64 with the package unpacked in it."""
    if not packages:
        pytest.skip("asked for by --packages: it takes minutes")
    if private_system.why_not() or not Path(EMULATOR).exists():
        pytest.skip(private_system.why_not() or f"{EMULATOR} is not installed")
    root = tmp_path / "aarch64"
    private_system.debootstrap(root, "--foreign", "--arch=arm64", "--include=python3")
    options = deb.Options(
        target=targets.named("arm64", "3.11"), maintainer="A Builder <b@example.com>", compression=("gzip", "1")
    )
    fetched = sorted((root / "var/cache/apt/archives").glob("*.deb"))
    for path in [*fetched, deb.build(ROOT, tmp_path, options)]:
        subprocess.run(["dpkg-deb", "--extract", str(path), str(root)], check=True)
    yield root
    shutil.rmtree(root)


def test_agent_delivers_telemetry_and_a_redacted_picture_on_aarch64(foreign):
    car = foreign / "car"
    car.mkdir()
    (car / "agent.toml").write_text(AGENT)
    (car / "policy.toml").write_text(POLICY)
    for name, port in (("inner", 1883), ("outer", 1884)):
        (car / f"{name}.conf").write_text(f"user root\nlistener {port} 127.0.0.1\nallow_anonymous true\n")
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(7).integers(0, 255, (240, 320, 3), np.uint8)).save(buffer, "JPEG")
    (car / "picture.jpg").write_bytes(buffer.getvalue())
    command = ["unshare", "--user", "--map-root-user", "--mount", "--pid", "--net", "--fork", "--kill-child"]
    with (car / "log").open("wb") as log:
        inside = subprocess.Popen([*command, "sh", "-c", INSIDE, "inside", str(foreign)], stdout=log, stderr=log)
    try:
        inside.wait(SECONDS)
    finally:
        inside.kill()
        inside.wait()
    said = (car / "log").read_text()
    assert inside.returncode == 0, said
    assert (car / "machine").read_text() == "aarch64\n"
    topics = {line.split()[0] for line in (car / "received").read_text().splitlines()}
    assert topics == {"cn/car/vehicle/telemetry/speed", "cn/car/vehicle/camera/front"}
    counts = status.read(car / "state" / "status.json")["counts"]
    assert (counts["delivered"], counts["refused"]) == (2, 0)
