"""The machine under the agent: clock, disk, and who may read and write its files."""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from stat import S_ISREG

from agent.assembly import Setup
from agent.clock import is_set
from agent.doctor.findings import Finding
from agent.errors import InvalidConfigError

MIB = 1 << 20
SLOW_SYNC_SECONDS = 0.25  # each group commit waits for one
TOLERANCE_NS = 10**9
OTHERS, OTHERS_WRITE = 0o077, 0o022
CREDENTIALS = "/run/credentials/"


def clock(setup: Setup) -> Finding:
    """Whether the clock was ever set, and is not behind the files that were written on this machine."""
    now = time.time_ns()
    detail = time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime(now // 10**9))
    if not is_set(now):
        advice = "the clock was never set: set it (timedatectl); until then records do not expire and TLS may fail"
        return Finding(name="clock", detail=detail, advice=advice)
    for file in (setup.file, Path(setup.config.paths.policy), setup.status_path):
        known = _stat(file)
        if known and known.st_mtime_ns > now + TOLERANCE_NS:
            advice = "the clock is behind: set it (timedatectl); is a time server reachable, has the RTC power?"
            return Finding(name="clock", detail=f"{detail}, before {file} was written", advice=advice)
    return Finding(name="clock", detail=detail)


def _stat(file: Path) -> os.stat_result | None:
    """None for what is missing or may not be looked at: another finding says so."""
    try:
        return file.stat()
    except OSError:
        return None


def disk(setup: Setup) -> Finding:
    """Whether the ledger's folder can be written durably, fast enough, and has room."""
    folder, wanted = Path(setup.config.paths.state), setup.config.limits.ledger_bytes
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        sync_s = _sync_seconds(folder)
        free = shutil.disk_usage(folder).free
        held = sum(known.st_size for file in folder.rglob("*") if (known := _stat(file)) and S_ISREG(known.st_mode))
    except OSError as exc:
        advice = "the agent's user must own it, on a file system that can be written (StateDirectory= of the unit)"
        return Finding(name="disk", detail=str(exc), advice=advice)
    detail = f"{folder}: {free // MIB} MiB free, fsync {sync_s * 1000:.0f} ms"
    if free + held < wanted:
        advice = f"limits.ledger_bytes promises {wanted // MIB} MiB: free some, or lower it"
        return Finding(name="disk", detail=detail, advice=advice)
    if sync_s > SLOW_SYNC_SECONDS:
        advice = "every acknowledgement waits for an fsync: is the disk worn, busy, or far away?"
        return Finding(name="disk", detail=detail, advice=advice)
    return Finding(name="disk", detail=detail)


def _sync_seconds(folder: Path) -> float:
    started = time.monotonic()
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(bytes(4096))
        file.flush()
        os.fsync(file.fileno())
    return time.monotonic() - started


def permissions(setup: Setup) -> Iterator[Finding]:
    """Who may read the ledger and the secrets, and who may write the configuration; one finding where all is well."""
    findings = [*_secrets(setup), *_state(setup), *_configuration(setup)]
    yield from findings
    if not findings:
        yield Finding(name="permissions", detail="secrets and ledger are their owner's, and so is writing the rules")


def _secrets(setup: Setup) -> Iterator[Finding]:
    config = setup.config
    files = {
        "broker.password_file": config.broker.password_file,
        "signing.key_file": config.signing.key_file,
        "signing.pseudonym_key_file": config.signing.pseudonym_key_file,
    }
    for name, credential in config.credentials.items():
        files[f"credentials.{name}.password_file"] = credential.password_file
        files[f"credentials.{name}.key_file"] = credential.key_file
    for key, file in files.items():
        if file:
            yield from _secret(key, Path(file))


def _secret(key: str, path: Path) -> Iterator[Finding]:
    try:
        mode = path.stat().st_mode
        path.read_bytes()
    except OSError as exc:
        advice = f"{key} must name a file that the agent's user can read"
        if str(path).startswith(CREDENTIALS):
            advice = "the running unit alone has it: put it into /etc/residency-agent/keys, start the unit, ask as root"
        yield Finding(name="permissions", detail=f"{key}: {exc}", advice=advice)
        return
    # systemd lets the unit's user in by an ACL, which shows as the group's permission; the folder is closed to others
    if mode & OTHERS and not str(path).startswith(CREDENTIALS):
        yield Finding(name="permissions", detail=f"{key}: {path} is not its owner's alone", advice=f"chmod 600 {path}")


def _state(setup: Setup) -> Iterator[Finding]:
    folder = Path(setup.config.paths.state)
    known = _stat(folder)
    if known and known.st_mode & 0o007:
        yield Finding(name="permissions", detail=f"{folder} is open to every user", advice=f"chmod o-rwx {folder}")


def _configuration(setup: Setup) -> Iterator[Finding]:
    for file in (setup.file, Path(setup.config.paths.policy), setup.manifest_path):
        known = _stat(file)
        if known and known.st_mode & OTHERS_WRITE:
            advice = f"whoever can write it decides what leaves the vehicle: chmod go-w {file}"
            yield Finding(name="permissions", detail=f"{file} can be written by others than its owner", advice=advice)


def borders(setup: Setup) -> Finding:
    """Whether the polygons can be used."""
    try:
        known = setup.borders().countries
    except InvalidConfigError as exc:
        return Finding(name="borders", detail=str(exc), advice="mend the file, or leave borders.geojson out")
    return Finding(name="borders", detail=f"{len(known)} countries")


def extras(setup: Setup) -> Finding:
    """Whether what the configuration asks for is installed."""
    table = setup.config.metrics
    if not table.port and not table.socket:
        return Finding(name="metrics", detail="not asked for")
    if importlib.util.find_spec("prometheus_client") is None:
        advice = "pip install 'residency-agent[metrics]', or set metrics.port to 0"
        return Finding(name="metrics", detail="prometheus_client is not installed", advice=advice)
    return Finding(name="metrics", detail=f"on {table.socket or f'{table.host}:{table.port}'}")
