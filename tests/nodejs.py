"""Node and the npm packages of tests/clients, installed once into the virtual environment; None where impossible."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

CLIENTS = Path(__file__).parent / "clients"
INSTALL_SECONDS = 240


@functools.cache
def missing() -> str | None:
    """Why Node clients cannot run here, or None; installs them on the first call."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        return "Node and npm are not installed"
    major = int(
        subprocess.run([node, "--version"], capture_output=True, text=True, check=True).stdout[1:].split(".")[0]
    )
    if major < 20:
        return f"Node {major} is older than the 20 that the clients need"
    return _installed(npm)


def folder() -> Path:
    """The scripts of tests/clients stand here, beside their node_modules."""
    return Path(sys.prefix) / "node-clients"


def command(script: str, *arguments: object) -> list[str]:
    """How to run a script of tests/clients."""
    return ["node", str(folder() / script), *map(str, arguments)]


def _installed(npm: str) -> str | None:
    place = folder()
    place.mkdir(exist_ok=True)
    with (place / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for script in CLIENTS.glob("*.mjs"):
            shutil.copy(script, place)
        stamp, wanted = place / ".stamp", hashlib.sha256((CLIENTS / "package-lock.json").read_bytes()).hexdigest()
        if stamp.exists() and stamp.read_text() == wanted:
            return None
        for name in ("package.json", "package-lock.json"):
            shutil.copy(CLIENTS / name, place)
        try:
            subprocess.run(
                [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund"],
                cwd=place,
                capture_output=True,
                check=True,
                timeout=INSTALL_SECONDS,
            )
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as exc:
            return f"npm ci does not work here: {str(exc.stderr or exc)[-300:]}"
        stamp.write_text(wanted)
        return None
