"""A disk that can be cut off, filled up or broken under SQLite and under the ledger's files.

It stands between SQLite and the real file system as the default VFS (built on the unix VFS, so locks and shared memory
are real), and in place of `os` in `agent.store.blobs`. Every write, truncation, sync and unlink goes into one journal;
a crash image is the durable state at any point of that journal plus any part of what was not synced yet.
"""

import ctypes
import ctypes.util
import errno
import os
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

from agent.store import blobs

FULL, IOERR_WRITE, IOERR_FSYNC = 13, 10 | 3 << 8, 10 | 4 << 8
MAIN_DB, WAL = 0x100, 0x80000

_P, _I, _L = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
_OPEN = ctypes.CFUNCTYPE(_I, _P, _P, _P, _I, _P)  # plain pointers: SQLite keeps the name it passes
_WRITE = ctypes.CFUNCTYPE(_I, _P, _P, _I, _L)
_TRUNCATE = ctypes.CFUNCTYPE(_I, _P, _L)
_SYNC = ctypes.CFUNCTYPE(_I, _P, _I)

_KEPT = []  # what SQLite may still call, for as long as some connection of a failed test lives


class _Vfs(ctypes.Structure):
    _fields_ = [
        *(("version", _I), ("file_size", _I), ("path_size", _I), ("next", _P), ("name", ctypes.c_char_p)),
        *(("data", _P), ("open", _P), *((f"call{n}", _P) for n in range(15))),
    ]


class _Methods(ctypes.Structure):
    _fields_ = [
        *(("version", _I), ("close", _P), ("read", _P), ("write", _P), ("truncate", _P), ("sync", _P)),
        *((f"call{n}", _P) for n in range(13)),
    ]


@dataclass
class Step:
    """One event of the journal; `data` None truncates to `offset`; kind `mark` carries the test's own note."""

    kind: str
    path: str = ""
    offset: int = 0
    data: bytes | None = None
    note: object = None


@dataclass
class FaultDisk:
    """`fails(kind, path, growth)` may return an errno for a step; it sees `write`, `sync` and `unlink`."""

    journal: list = field(default_factory=list)
    fails: object = None

    def mark(self, note):
        self.journal.append(Step("mark", note=note))

    def _fault(self, kind, path, growth=0):
        return self.fails(kind, path, growth) if self.fails else 0

    @contextmanager
    def mounted(self):
        """Be the disk of every connection that is opened inside."""
        library = ctypes.CDLL(ctypes.util.find_library("sqlite3"))
        library.sqlite3_vfs_find.restype = ctypes.POINTER(_Vfs)
        unix = library.sqlite3_vfs_find(b"unix")
        vfs = _Vfs.from_buffer_copy(unix.contents)
        vfs.name = b"faultdisk"
        real_open = ctypes.cast(vfs.open, _OPEN)
        opener = _OPEN(lambda *arguments: self._open(real_open, *arguments))
        vfs.open = ctypes.cast(opener, _P)
        _KEPT.extend([vfs, opener])
        library.sqlite3_vfs_register(ctypes.byref(vfs), 1)
        try:
            with mock.patch.object(blobs, "os", self._os()), mock.patch.object(blobs.Blobs, "remove", self._remove()):
                yield self
        finally:
            library.sqlite3_vfs_unregister(ctypes.byref(vfs))
            library.sqlite3_vfs_register(unix, 1)

    def _open(self, real_open, *arguments):
        _, name, file, flags, _ = arguments
        code = real_open(*arguments)
        if code == 0 and flags & (MAIN_DB | WAL):
            slot = ctypes.cast(file, ctypes.POINTER(ctypes.POINTER(_Methods)))
            methods = self._methods(_Methods.from_buffer_copy(slot.contents.contents), ctypes.string_at(name).decode())
            slot[0] = ctypes.pointer(methods)
        return code

    def _methods(self, methods, path):
        real_write, real_truncate = ctypes.cast(methods.write, _WRITE), ctypes.cast(methods.truncate, _TRUNCATE)

        def write(file, data, amount, offset):
            growth = max(0, offset + amount - Path(path).stat().st_size)
            if fault := self._fault("write", path, growth):
                return FULL if fault == errno.ENOSPC else IOERR_WRITE
            self.journal.append(Step("write", path, offset, ctypes.string_at(data, amount)))
            return real_write(file, data, amount, offset)

        def truncate(file, size):
            self.journal.append(Step("write", path, size))
            return real_truncate(file, size)

        def sync(_file, _flags):
            if self._fault("sync", path):
                return IOERR_FSYNC
            self.journal.append(Step("sync", path))
            return 0  # the real sync would only cost time: what survives is decided by the journal

        kept = [_WRITE(write), _TRUNCATE(truncate), _SYNC(sync), methods]
        methods.write, methods.truncate, methods.sync = (ctypes.cast(call, _P) for call in kept[:3])
        _KEPT.extend(kept)
        return methods

    def _remove(self):
        remove = blobs.Blobs.remove

        def journaled(own, numbers):
            numbers = list(numbers)
            self.journal += [Step("unlink", str(own._path(number))) for number in numbers]
            remove(own, numbers)

        return journaled

    def _os(self):
        names = {}

        def open_(path, flags, mode=0o777):
            file = os.open(path, flags, mode)
            names[file] = str(path)
            return file

        def write(file, data):
            if fault := self._fault("write", names[file], len(data)):
                raise OSError(fault, os.strerror(fault))
            offset = os.lseek(file, 0, os.SEEK_CUR)
            self.journal.append(Step("write", names[file], offset, bytes(data)))
            return os.write(file, data)

        def fsync(file):
            if file not in names:  # a seal, replaced as a whole
                return
            if fault := self._fault("sync", names[file]):
                raise OSError(fault, os.strerror(fault))
            kind = "names" if Path(names[file]).is_dir() else "sync"
            self.journal.append(Step(kind, names[file]))

        def close(file):
            names.pop(file, None)
            os.close(file)

        own = {"close": close, "open": open_, "write": write, "fsync": fsync}
        return SimpleNamespace(**{name: getattr(os, name) for name in dir(os)} | own)


class CrashImage:
    """What a power cut after `journal` may leave.

    Synced bytes are there. Of what was written and not synced, each 512-byte sector is there or not, by chance; so is a
    file whose name was not synced, and one that was unlinked since its directory was synced.
    """

    def __init__(self, journal):
        self._files = {}
        self._loose = {}
        self._unsure = set()
        self._gone = set()
        for step in journal:
            getattr(self, f"_{step.kind}")(step)

    def _mark(self, step):
        pass

    def _write(self, step):
        if step.path not in self._files:
            self._files[step.path] = bytearray()
            if not step.path.endswith("-wal"):  # SQLite syncs the journal's name together with its content
                self._unsure.add(step.path)
        self._loose.setdefault(step.path, []).append(step)

    def _sync(self, step):
        for write in self._loose.pop(step.path, ()):
            _apply(self._files[step.path], write.offset, write.data)

    def _names(self, step):
        self._unsure = {path for path in self._unsure if Path(path).parent != Path(step.path)}
        for path in [path for path in self._gone if Path(path).parent == Path(step.path)]:
            self._gone.discard(path)
            self._files.pop(path, None)

    def _unlink(self, step):
        self._gone.add(step.path)

    def write_to(self, target, source, rng):
        """Write one image of the files under `source` to `target`."""
        for path, synced in self._files.items():
            if path in (self._unsure | self._gone) and rng.random() < 0.5:
                continue
            content = bytearray(synced)
            for write in self._loose.get(path, ()):
                for offset, data in _sectors(write):
                    if rng.random() < 0.5:
                        _apply(content, offset, data)
            file = target / Path(path).relative_to(source)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)


def _sectors(write):
    if write.data is None:
        return [(write.offset, None)]
    return [(write.offset + k, write.data[k : k + 512]) for k in range(0, len(write.data), 512)]


def _apply(content, offset, data):
    if data is None:
        del content[offset:]
        return
    if len(content) < offset:
        content.extend(bytes(offset - len(content)))
    content[offset : offset + len(data)] = data
