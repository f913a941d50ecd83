"""Large envelopes in files of their own, so that they are written once and not twice.

Invariants
- A file is complete and synced, and so is its directory entry, before the transaction that names it commits.
- A file is unlinked only after the transaction that forgot it has committed. A crash in between leaves a file that
  nothing names: `orphans` finds it.
- A number is used again only where the transaction that used it failed.

Layout: `<directory>/<number, 16 hex digits>` holds one envelope and nothing else; its length and CRC-32 stand in the
ledger's row.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path


class Blobs:
    """Files named by number in one directory. Errors are OSError."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._unseen: Iterator[os.DirEntry[str]] | None = None

    def _path(self, number: int) -> Path:
        return self.directory / f"{number:016x}"

    def write(self, number: int, data: bytes) -> None:
        """Write and sync one file; `sync_names` makes its name durable."""
        self.directory.mkdir(mode=0o700, exist_ok=True)
        file = os.open(self._path(number), os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(file, view) :]
            os.fsync(file)
        finally:
            os.close(file)

    def sync_names(self) -> None:
        """Make the names of all files written so far durable."""
        sync_directory(self.directory)

    def read(self, number: int) -> bytes:
        """The whole file; FileNotFoundError where it is gone."""
        return self._path(number).read_bytes()

    def remove(self, numbers: Iterable[int]) -> None:
        """Unlink files; a missing one is no error."""
        for number in numbers:
            with contextlib.suppress(FileNotFoundError):
                self._path(number).unlink()

    def numbers(self, limit: int) -> list[int]:
        """The next `limit` files of one walk through the directory; empty at the end of the walk."""
        if self._unseen is None:
            self._unseen = os.scandir(self.directory) if self.directory.is_dir() else iter(())
        found: list[int] = []
        for entry in self._unseen:
            with contextlib.suppress(ValueError):
                found.append(int(entry.name, 16))
            if len(found) >= limit:
                break
        return found


def sync_directory(directory: Path) -> None:
    """Make the names in a directory durable."""
    file = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def write_synced(path: Path, data: bytes) -> None:
    """Replace a small file atomically and durably."""
    fresh = path.with_name(path.name + ".new")
    with fresh.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)
    sync_directory(path.parent)
