"""Bytes that wait on the disk instead of in memory: written once, read again as often as they are wanted.

Once the file did not take something, nothing is given out of it any more: what is left must not pass for all.
"""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from agent.errors import AgentError


class SpoolError(AgentError):
    """The disk does not take bytes or does not give them back; no OSError, which Pillow raises for a bad picture."""


class Spool:
    """Appends to a seekable stream and reads from it; threads may share it."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._turn = threading.Lock()
        self._failure = ""

    def keep(self, data: bytes) -> Spooled:
        """Append the bytes; raises SpoolError."""
        with self._in_turn() as stream:
            place = stream.seek(0, os.SEEK_END)
            stream.write(data)
        return Spooled(spool=self, place=place, length=len(data))

    def read(self, place: int, length: int) -> bytes:
        """So many bytes from this place; raises SpoolError."""
        with self._in_turn() as stream:
            stream.seek(place)
            return stream.read(length)

    @contextmanager
    def _in_turn(self) -> Iterator[IO[bytes]]:
        with self._turn:
            if self._failure:
                raise SpoolError(self._failure)
            try:
                yield self._stream
            except OSError as exc:
                self._failure = f"payloads cannot be kept on the disk: {exc}"
                raise SpoolError(self._failure) from exc


@dataclass(frozen=True, slots=True, kw_only=True)
class Spooled:
    """A stretch of a spool, both numbers in bytes."""

    spool: Spool = field(repr=False)
    place: int
    length: int

    def read(self) -> bytes:
        """The bytes; raises SpoolError."""
        return self.spool.read(self.place, self.length)


@contextmanager
def spool_in(folder: Path) -> Iterator[Spool]:
    """A spool in a file without a name in this folder: it is gone with the block, whatever ends it. Raises OSError."""
    with tempfile.TemporaryFile(dir=folder) as stream:
        yield Spool(stream)
