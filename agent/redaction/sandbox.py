"""The worker's own process (`-m agent.redaction.sandbox PARENT`). Decoders and the model run here and nowhere else.

Before it reads the first payload it gives up what it does not need: new files and sockets (RLIMIT_NOFILE 0), writing
(RLIMIT_FSIZE 0), new processes (RLIMIT_NPROC 0, not for root), core dumps, new privileges, being read by others, and
by a seccomp filter also signals to others, tracing, and all of the former for root too. Memory is bounded by RLIMIT_AS
and the time of each picture by RLIMIT_CPU. It dies with its parent.

Frames on stdin and stdout: 4 bytes length, then msgpack of `Setup`, `Hello`, `Request` or `Reply`. Nothing is ever
written to stderr, which is /dev/null, and a reply's `detail` holds no payload byte.
"""

from __future__ import annotations

import ctypes
import importlib
import io
import os
import resource
import select
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, Protocol, TypeVar

import msgspec
import numpy as np
from PIL import Image

from agent.errors import AgentError, RefusedError
from agent.memory import PAGE_BYTES, trim
from agent.messages import Box
from agent.pictures.formats import Colour, View
from agent.redaction import seccomp
from agent.redaction.frames import HEADER_BYTES, Hello, Reply, Request, Setup, encode
from agent.redaction.masking import Pixels
from agent.redaction.redaction import redact_payload
from agent.redaction.turbojpeg import codec

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS = 1, 4, 38  # linux/prctl.h
WARM_UP_SIDE = 64  # pixels
IDLE_SECONDS = 1.0
T = TypeVar("T")


class Detects(Protocol):
    """What the factory makes: an open model."""

    digest: str

    def wanted(self, width: int, height: int) -> View:
        """In which size and colours it looks at a picture of this width and height."""

    def detect(self, picture: Pixels, colour: Colour) -> list[Box]:
        """Find boxes in an upright picture (H, W, 3) of these colours."""


def main() -> int:
    """Serve until stdin ends. Exit status 3: the parent is already gone."""
    if not _tie_to_parent(int(sys.argv[1])):
        return 3
    stdin, stdout = sys.stdin.buffer, _private_stdout()
    setup = _read(stdin, Setup)
    if setup is None:
        return 0
    _limit_memory(setup)
    statm = os.open("/proc/self/statm", os.O_RDONLY)  # while files may be opened; seen from outside it may be hidden
    try:
        detector = _open(setup)
        _warm_up(setup, detector)
        confined = _lock_down()
        _warm_up(setup, detector)
    except Exception as exc:  # noqa: BLE001 - whatever a model library raises, the parent hears of it and refuses
        _send(stdout, Hello(error=_start_error(exc), detail=str(exc) if isinstance(exc, AgentError) else ""))
        return 1
    _send(stdout, Hello(digest=detector.digest, confined=confined, codec=codec(), resident_bytes=_resident(statm)))
    while (request := _next(stdin)) is not None:
        _limit_time(setup)
        reply = _answer(setup, detector, request)
        _send(stdout, msgspec.structs.replace(reply, resident_bytes=_resident(statm)))
        del request, reply
    return 0


def _next(stdin: BinaryIO) -> Request | None:
    """The next request; None at the end. After IDLE_SECONDS without one, what large pictures took is given back.

    Nothing of it can be in the buffer already, for it is sent only after our reply. (poll is not for a process that may
    open no files: it compares the limit with the number of its own.)
    """
    if not select.select([stdin], [], [], IDLE_SECONDS)[0]:
        trim()
    return _read(stdin, Request)


def _resident(statm: int) -> int:
    """Bytes of memory that this process has now: proc(5), the second number of statm is in pages."""
    return int(os.pread(statm, 128, 0).split()[1]) * PAGE_BYTES


def _start_error(exc: Exception) -> str:
    """Return the reason for which no picture can be redacted; a RefusedError knows its own."""
    if isinstance(exc, MemoryError):
        return "redaction.memory"
    return exc.reason if isinstance(exc, RefusedError) else "redaction.model"


def _answer(setup: Setup, detector: Detects, request: Request) -> Reply:
    try:
        done = redact_payload(
            request.payload, detector.detect, setup.redaction, setup.limits, request.content_type, detector.wanted
        )
    except RefusedError as exc:
        return Reply(refused=exc.reason, detail=exc.detail)
    except AgentError as exc:
        return Reply(refused="redaction.failed", detail=type(exc).__name__)
    except MemoryError:
        return Reply(refused="redaction.memory")
    except Exception as exc:  # noqa: BLE001 - no picture may end the worker; what is unknown is refused
        return Reply(refused="redaction.failed", detail=type(exc).__name__)
    return Reply(payload=done.payload, counts=dict(done.counts), pictures=done.pictures)


def _open(setup: Setup) -> Detects:
    module, _, path = setup.factory.partition(":")
    factory: Callable[..., Detects] = importlib.import_module(module)  # type: ignore[assignment]
    for name in path.split("."):
        factory = getattr(factory, name)
    known = {"contents": (setup.manifest_data, setup.model_data)} if setup.manifest_data else {}
    return factory(Path(setup.manifest), threads=setup.threads, far=setup.far, **known)


def _warm_up(setup: Setup, detector: Detects) -> None:
    """Redact one picture of each format: no library can open a file of its own later, and all works without."""
    pixels = np.zeros((WARM_UP_SIDE, WARM_UP_SIDE, 3), np.uint8)
    for name in ("JPEG", "PNG", "WEBP"):
        picture = io.BytesIO()
        Image.fromarray(pixels).save(picture, name)
        redact_payload(picture.getvalue(), detector.detect, setup.redaction, setup.limits, wanted=detector.wanted)


def _tie_to_parent(parent: int) -> bool:
    """Ask the kernel to kill this process when its parent ends; False where that has happened before."""
    for option, value in ((PR_SET_PDEATHSIG, signal.SIGKILL), (PR_SET_NO_NEW_PRIVS, 1), (PR_SET_DUMPABLE, 0)):
        ctypes.CDLL(None).prctl(option, int(value), 0, 0, 0)
    return os.getppid() == parent


def _private_stdout() -> BinaryIO:
    """Take the frames' stream away from libraries: what they print goes where stderr goes, to /dev/null."""
    frames = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return frames


def _limit_memory(setup: Setup) -> None:
    os.nice(setup.nice)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (setup.memory_bytes, setup.memory_bytes))


def _lock_down() -> bool:
    """Give up files, sockets, processes and signals; whether the kernel also took the filter."""
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))
    return seccomp.forbid()


def _limit_time(setup: Setup) -> None:
    """Move the CPU limit ahead by what one payload may use on all threads; SIGXCPU ends a decoder that loops."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    ahead = int(usage.ru_utime + usage.ru_stime + setup.timeout_s * setup.threads) + 2
    resource.setrlimit(resource.RLIMIT_CPU, (ahead, resource.RLIM_INFINITY))


def _read(stream: BinaryIO, kind: type[T]) -> T | None:
    header = stream.read(HEADER_BYTES)
    if len(header) < HEADER_BYTES:
        return None
    return msgspec.msgpack.decode(stream.read(int.from_bytes(header, "big")), type=kind)


def _send(stream: BinaryIO, value: Hello | Reply) -> None:
    stream.write(encode(value))
    stream.flush()


if __name__ == "__main__":
    sys.exit(main())
