"""Disk space set aside for the day the disk is full: deletes need room in SQLite's journal."""

from __future__ import annotations

import os
from pathlib import Path

from agent.store.storage import beside


class Reserve:
    """Disk space held in a file: given up when the disk is full, taken again when it is not."""

    def __init__(self, path: Path, size: int) -> None:
        self._path = beside(path, ".reserve")
        self._size = size

    def take(self) -> bool:
        """Allocate the reserve where it is missing; False where the disk has no room for it."""
        try:
            file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                if self._size and os.fstat(file).st_size < self._size:
                    os.posix_fallocate(file, 0, self._size)
            finally:
                os.close(file)
        except OSError:
            self.give()
            return False
        return True

    def give(self) -> bool:
        """Free the reserve; False where it was free already."""
        try:
            self._path.unlink()
        except OSError:
            return False
        return True
