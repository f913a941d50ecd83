"""A whole system of a test's own: this machine's files under an overlay, and a systemd that is the first process of
its own namespaces. Nothing of it touches the machine: files live in memory, the network is a loopback, and all ends
with the test.

What it cannot show is told by `controllers`: limits on memory and CPU time need cgroup controllers of version 2, which
a machine may have handed to version 1.
"""

import os
import shutil
import subprocess
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

SECONDS = 60.0
PROGRAMS = ("dpkg-deb", "mosquitto", "nsenter", "setpriv", "unshare")
SYSTEMD = Path("/lib/systemd/systemd")

# $1: the folder of files that are read, $2: a folder of the test's own, $3: a cgroup of its own
OUTER = """
set -e
mkdir "$2/cgroup"
mount -t cgroup2 cgroup2 "$2/cgroup"
mkdir "$2/cgroup/$3"
echo $$ > "$2/cgroup/$3/cgroup.procs"
unshare --mount --pid --fork --uts --ipc --net --cgroup --kill-child sh -c "$INNER" inner "$1" "$2" || true
echo $$ > "$2/cgroup/cgroup.procs"
find "$2/cgroup/$3" -depth -type d -exec rmdir {} +
"""
INNER = """
set -e
mkdir "$2/files" "$2/root"
mount -t tmpfs -o mode=755 tmpfs "$2/files"
mkdir "$2/files/upper" "$2/files/work"
mount -t overlay overlay -o "lowerdir=$1,upperdir=$2/files/upper,workdir=$2/files/work" "$2/root"
cd "$2/root"
mount -t proc proc proc
mount -t sysfs -o ro sysfs sys
mount -t cgroup2 cgroup2 sys/fs/cgroup
for place in run tmp dev; do mount -t tmpfs -o mode=755 tmpfs $place; done
for name in null zero full random urandom tty; do touch dev/$name; mount --bind /dev/$name dev/$name; done
mkdir dev/pts dev/shm run/exchange .machine
ln -s /proc/self/fd dev/fd
mount -t devpts -o newinstance,ptmxmode=666 devpts dev/pts
ln -s pts/ptmx dev/ptmx
mount --bind "$2/exchange" run/exchange
pivot_root . .machine
umount -l .machine
mount --make-rshared /
exec env -i container=private PATH=/usr/sbin:/usr/bin:/sbin:/bin /lib/systemd/systemd --system --unit=basic.target
"""


class SystemFailedError(Exception):
    """A command in the private system failed; the message is what it said."""


class NoSystemError(SystemFailedError):
    """This machine does not let a systemd of our own run; the message is what it said."""


class PrivateSystem:
    """A booted system; `exchange` is a folder of this machine that it sees as /run/exchange."""

    def __init__(self, first_process, exchange):
        self._first = first_process
        self.exchange = exchange

    def run(self, *command, check=True, seconds=SECONDS):
        """Run a program inside and return its output; raises SystemFailedError unless `check` is off."""
        result = subprocess.run(
            ["nsenter", f"--target={self._first}", "--all", "--", *command],
            capture_output=True,
            text=True,
            check=False,
            timeout=seconds,
            stdin=subprocess.DEVNULL,
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"},
        )
        if check and result.returncode != 0:
            raise SystemFailedError(f"{' '.join(command)}: {result.returncode}\n{result.stdout}\n{result.stderr}")
        return result.stdout

    def start(self, *command):
        """Start a program inside that outlives the call; it ends with the system at the latest."""
        return subprocess.Popen(
            ["nsenter", f"--target={self._first}", "--all", "--", *command],
            stdout=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
        )

    def path(self, place):
        """A file inside, seen from outside."""
        return Path(f"/proc/{self._first}/root") / place.lstrip("/")

    def write(self, place, text):
        self.path(place).parent.mkdir(parents=True, exist_ok=True)
        self.path(place).write_text(text)

    def show(self, unit, name):
        """One property of a unit."""
        return self.run("systemctl", "show", "--value", f"--property={name}", unit).strip()

    def until(self, condition, seconds):
        """Wait for a condition; raises SystemFailedError with the end of the journal."""
        deadline = time.monotonic() + seconds
        while not (found := condition()):
            if time.monotonic() > deadline:
                journal = self.run("journalctl", "--no-pager", "--lines=40", check=False)
                raise SystemFailedError(f"it did not come about in {seconds:g} s; the journal:\n{journal}")
            time.sleep(0.2)
        return found

    @property
    def controllers(self):
        """What the private systemd can limit."""
        return self.path("/sys/fs/cgroup/cgroup.controllers").read_text().split()


def debootstrap(folder, *options):
    """Fill a folder with this machine's Debian release from the mirror that apt is configured for."""
    listed = ["apt-get", "indextargets", "--format", "$(REPO_URI) $(CODENAME)", "Created-By: Packages"]
    lines = subprocess.run(listed, check=True, capture_output=True, text=True).stdout.splitlines()
    mirror, codename = next(line.split() for line in lines if line.split()[0].endswith("/debian/"))
    command = ["debootstrap", "--variant=minbase", *options, codename, str(folder), mirror]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def why_not():
    """Why this machine runs no private system; empty where it does."""
    if os.geteuid() != 0:
        return "a private systemd needs root"
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    missing += [] if SYSTEMD.exists() else ["systemd"]
    if missing:
        return f"a private systemd needs {', '.join(missing)}"
    return "" if "overlay" in Path("/proc/filesystems").read_text() else "this kernel has no overlay file system"


@contextmanager
def booted(lower=Path("/"), seconds=SECONDS):
    """A private system over the files of `lower`; raises NoSystemError where none runs."""
    with tempfile.TemporaryDirectory(prefix="private-system-", dir="/tmp") as name:
        folder = Path(name)
        (folder / "exchange").mkdir()
        command = ["setpriv", "--pdeathsig=KILL", "unshare", "--mount", "sh", "-c", OUTER, "outer"]
        command += [str(lower), str(folder), f"private-system-{os.getpid()}"]
        with (folder / "log").open("wb") as log:
            outer = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "INNER": INNER})
        try:
            yield _wait(outer, folder, time.monotonic() + seconds)
        finally:
            _end(outer)


def _wait(outer, folder, deadline):
    """The system, once its systemd has reached its target."""
    while True:
        first = _first_process(outer.pid)
        if first is not None:
            system = PrivateSystem(first, folder / "exchange")
            if system.run("systemctl", "is-active", "basic.target", check=False).strip() == "active":
                return system
        if outer.poll() is not None or time.monotonic() > deadline:
            raise NoSystemError(f"the private system did not start: {(folder / 'log').read_text()}")
        time.sleep(0.1)


def _first_process(outer):
    """The private systemd's process id outside; None before it runs."""
    try:
        (unshare,) = _children(outer)
        (first,) = _children(unshare)
        name = Path(f"/proc/{first}/comm").read_text().strip()
    except (OSError, ValueError):
        return None
    return first if name == "systemd" else None


def _children(process):
    return [int(word) for word in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def _end(outer):
    """End the first process, with which its whole system ends, and let the outer one tidy up."""
    first = _first_process(outer.pid)
    if first is not None:
        os.kill(first, 9)
    try:
        outer.wait(10)
    except subprocess.TimeoutExpired:
        outer.kill()
        outer.wait()
