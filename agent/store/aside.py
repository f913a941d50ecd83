"""Opening the database, or setting aside a damaged one, in steps that a kill or a power cut may end anywhere.

Invariants
- A damaged file is never a reason not to start: database, journal, spool files and seal are renamed to
  `<name>.corrupt-<n>...`, and new ones begun. Only the last one set aside is kept.
- A mark, `<name>.salvage`, stands on the disk from before the first rename until the old files are salvaged. Until then
  the new ledger takes nothing else: a start that finds the mark throws it away and salvages the old files again.
- The database is renamed last. Once `<name>.corrupt-<n>` is there, nothing at `<name>` belongs to the old ledger.
- After `ATTEMPTS` salvages that did not end, the ledger goes on with what the last one committed: it is conserved.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic

import msgspec

from agent.store.blobs import sync_directory, write_synced
from agent.store.storage import Loaded, beside, check_size, is_damage, open_checked

ATTEMPTS = 5  # a car may be switched off during some of them; what ends all of them is the salvage itself


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened(Generic[Loaded]):
    """An open database, what `load` read from it, and the damaged predecessor that is to be salvaged, if any."""

    connection: sqlite3.Connection
    loaded: Loaded
    aside: Path | None = None
    incidents: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """What `<name>.salvage` says: the damaged database's new name, what was found, how many salvages have begun."""

    aside: str
    why: str
    attempts: int = 0


def connect(path: Path, journal_bytes: int, load: Callable[[sqlite3.Connection], Loaded]) -> Opened[Loaded]:
    """Open or create the database, its journal written back beyond `journal_bytes`, and `load` from it.

    Damage, also where `load` finds nonsense (ValueError, TypeError), sets the files aside. sqlite3.Error, OSError or
    LedgerError where that does not help.
    """
    mark = _read(path)
    if mark is None or mark.attempts >= ATTEMPTS:
        try:
            check_size(path)
            connection, loaded = open_checked(path, journal_bytes, load)
            given_up = () if mark is None else (f"salvage of {mark.aside} given up, what it saved is kept: {mark.why}",)
            return Opened(connection=connection, loaded=loaded, incidents=given_up)
        except sqlite3.DatabaseError as exc:
            if not is_damage(exc):
                raise
            mark = _announce(path, str(exc))
    aside = _set_aside(path, mark)
    connection, loaded = open_checked(path, journal_bytes, load)
    again = f" (salvage {mark.attempts + 1}, the one before did not end)" if mark.attempts else ""
    incident = f"{path.name} set aside as {aside.name}: {mark.why}{again}"
    return Opened(connection=connection, loaded=loaded, aside=aside, incidents=(incident,))


def begin_salvage(path: Path) -> None:
    """Count the attempt before it is made. OSError."""
    if mark := _read(path):
        _write(path, replace(mark, attempts=mark.attempts + 1))


def end_salvage(path: Path) -> None:
    """From now on the new ledger stands for itself. OSError."""
    if _mark(path).exists():
        _mark(path).unlink()
        sync_directory(path.parent)


def _mark(path: Path) -> Path:
    return beside(path, ".salvage")


def _read(path: Path) -> Mark | None:
    """The mark, None where there is none. One that is nonsense cannot say what is whose: nothing is thrown away."""
    try:
        return msgspec.json.decode(_mark(path).read_bytes(), type=Mark)
    except FileNotFoundError:
        return None
    except msgspec.MsgspecError as exc:
        return Mark(aside="damaged files", why=f"{_mark(path).name} is not readable: {exc}", attempts=ATTEMPTS)


def _write(path: Path, mark: Mark) -> None:
    write_synced(_mark(path), msgspec.json.encode(mark) + b"\n")


def _announce(path: Path, why: str) -> Mark:
    """Say what will be set aside, with the room of what was set aside before."""
    earlier = _asides(path)
    number = max((int(file.name.rpartition("-")[2]) for file in earlier), default=0) + 1
    beside(path, ".reserve").unlink(missing_ok=True)
    for old in earlier:
        _clear(old)
        os.truncate(old, 0)  # its name stays for now, so that no number comes twice
    mark = Mark(aside=f"{path.name}.corrupt-{number}", why=why)
    _write(path, mark)
    return mark


def _set_aside(path: Path, mark: Mark) -> Path:
    """Rename the whole family of a damaged ledger, as far as it was not yet, and remove all others; the new name."""
    target = path.with_name(mark.aside)
    if target.exists():
        _clear(path)
        path.unlink(missing_ok=True)
    else:
        _rename(path, target)
    for old in _asides(path):
        if old != target:
            old.unlink()
    return target


def _rename(path: Path, target: Path) -> None:
    for suffix in ("-shm", ".suspect"):
        beside(path, suffix).unlink(missing_ok=True)
    for suffix in ("-wal", ".files", ".seal"):
        if beside(path, suffix).exists():
            beside(path, suffix).replace(beside(target, suffix))
    sync_directory(path.parent)
    if path.exists():
        path.replace(target)
    else:
        target.touch()
    sync_directory(path.parent)


def _asides(path: Path) -> list[Path]:
    prefix = path.name + ".corrupt-"
    return [file for file in path.parent.glob(prefix + "*") if file.name[len(prefix) :].isdigit()]


def _clear(database: Path) -> None:
    """Remove what stands beside a database."""
    shutil.rmtree(beside(database, ".files"), ignore_errors=True)
    for suffix in ("-wal", "-shm", ".seal", ".suspect"):
        beside(database, suffix).unlink(missing_ok=True)
