"""`RedactionWorker`: pictures are decoded and redacted in a process that can be limited and killed.

Why a process: a thread shares the agent's memory and cannot be killed, so one hanging or crashing decoder would take
the deliveries of the whole car with it. A process per picture would cost 0.5 s each; this one lives until it fails.
It is a fresh `exec`, because a fork of a process with threads may hang. Measured on one busy EPYC core: 2 to 3 ms more
per 83 kB picture of 1280x720 than in the same process, 0.5 to 0.9 s per start, 145 MB resident beside the agent's own
46 MB, which then needs neither codecs nor onnxruntime. A 24 Mpx picture needs at most 741 MB of address space.

Invariants:
- A payload comes back redacted, or RefusedError is raised; nothing else can happen to it.
- This module and what it imports load neither Pillow nor onnxruntime.
- Whatever happens to the process, the next payload gets a new one; restarts are spaced by a growing delay.
- A process that was ended because no picture came is no failure: the next picture starts one at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Self, TypeVar

import msgspec

from agent.errors import RefusedError
from agent.histogram import WORK_SECONDS, Histogram
from agent.memory import resident_bytes
from agent.payloads.inspection import InspectionLimits
from agent.pictures.formats import RedactedPayload, RedactionOptions
from agent.redaction.frames import HEADER_BYTES, Hello, Reply, Request, Setup, encode

log = logging.getLogger(__name__)
T = TypeVar("T")
END_S = 5.0  # how long the end of a killed process is waited for
CAUSE_S = 2.0  # how long a broken pipe waits for the exit status that explains it
FIRST_DELAY_S = 0.25  # before the second restart in a row; doubled up to MAX_DELAY_S
MAX_DELAY_S = 8.0
MODEL_RETRY_S = 30.0  # a missing or altered model is looked for again after this time
REPLY_OVERHEAD_BYTES = 1 << 16
GROWTH = 4  # a redacted payload may be larger than its source: 16-bit or CMYK sources, another alphabet
PASSED_ON = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "VIRTUAL_ENV")


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerOptions:
    """Which model, and what one payload may cost.

    `factory` is `module:callable`, called with (manifest, threads=, far=), and with contents= where `manifest_data` has
    the manifest's bytes: then no other manifest is ever opened, nor, with `model_data`, another model. `far` asks for a
    second look at large pictures, within the same `timeout_s`. `memory_bytes` limits the address space. After
    `unload_after_s` without a picture the process is ended; 0: never.
    """

    manifest: Path
    manifest_data: bytes = field(default=b"", repr=False)
    model_data: bytes = field(default=b"", repr=False)
    factory: str = "agent.redaction.detector:Detector.open"
    threads: int = 1
    far: bool = False
    nice: int = 5
    timeout_s: float = 10.0
    start_timeout_s: float = 60.0
    memory_bytes: int = 1 << 30
    unload_after_s: float = 0.0
    redaction: RedactionOptions = field(default_factory=RedactionOptions)
    limits: InspectionLimits = field(default_factory=InspectionLimits)

    def setup(self) -> Setup:
        """Return what the process is told."""
        return Setup(
            factory=self.factory,
            manifest=str(self.manifest),
            manifest_data=self.manifest_data,
            model_data=self.model_data,
            threads=self.threads,
            far=self.far,
            nice=self.nice,
            timeout_s=self.timeout_s,
            memory_bytes=self.memory_bytes,
            redaction=self.redaction,
            limits=self.limits,
        )


class RedactionWorker:
    """One worker process and its restarts. `async with` starts and ends it.

    `digest` is the open model's SHA-256; `error` and `detail` say why the last start failed, empty where it did not.
    `confined` says whether the kernel filters the process's system calls; `codec`, what JPEGs are masked with;
    `unloaded`, that it was ended for want of pictures; `restarts`, how many were started after failures.
    `redactions` and `starts` are the times that payloads and starts took.
    """

    def __init__(self, options: WorkerOptions) -> None:
        self.digest = ""
        self.confined = False
        self.codec = ""
        self.error = ""
        self.detail = ""
        self.unloaded = False
        self.restarts = 0
        self._resident_bytes = 0
        self.redactions, self.starts = Histogram(WORK_SECONDS), Histogram(WORK_SECONDS)
        self._options = options
        self._process: asyncio.subprocess.Process | None = None
        self._turn = asyncio.Lock()
        self._unloading: asyncio.Task[None] | None = None
        self._used = 0.0
        self._failures = 0
        self._not_before = 0.0

    @property
    def ready(self) -> bool:
        """Whether a process with a verified model waits for pictures."""
        return self._process is not None and self._process.returncode is None

    @property
    def resident_bytes(self) -> int:
        """Its memory now; where /proc hides it, when it last answered; 0 while none runs."""
        found = resident_bytes(self._process.pid) if self._process is not None else 0
        return self._resident_bytes if found is None else found

    @property
    def pid(self) -> int | None:
        """The process id while one runs."""
        return self._process.pid if self._process else None

    async def __aenter__(self) -> Self:
        """Start the process; a failure does not raise here, it refuses every payload."""
        async with self._turn:
            try:
                await self._start()
            except RefusedError:
                await self._discard()
            except BaseException:
                await self._discard()
                raise
        if self._options.unload_after_s:
            self._unloading = asyncio.create_task(self._unload_loop(), name="worker-unload")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the process."""
        if self._unloading is not None:
            self._unloading.cancel()
            await asyncio.wait([self._unloading])
        await self._end()

    async def redact(self, payload: bytes, content_type: str | None = None) -> RedactedPayload:
        """Return the payload with every picture redacted, or raise RefusedError.

        Payloads are taken one after the other. Cancelling is safe: the process, whose reply nobody would read, ends.
        """
        async with self._turn:
            try:
                if not self.ready:
                    await self._restart()
                reply = await self._ask(Request(payload=payload, content_type=content_type))
            except RefusedError as exc:
                log.warning("worker.failed", extra={"reason": exc.reason})
                await self._discard()
                raise
            except BaseException:
                await self._discard()
                raise
            self._failures = 0
            self._resident_bytes = reply.resident_bytes
            if reply.refused:
                raise RefusedError(reply.refused, reply.detail)
            counts = MappingProxyType(reply.counts)
            return RedactedPayload(
                payload=reply.payload, counts=counts, pictures=reply.pictures, model_digest=self.digest
            )

    async def _restart(self) -> None:
        """Start a new process, after the delay that the failures before it ask for."""
        wait = self._not_before - asyncio.get_running_loop().time()
        if wait > 0 and self.error == "redaction.model":
            raise RefusedError("redaction.model", self.detail)
        await asyncio.sleep(max(0.0, wait))
        self.restarts += not self.unloaded
        await self._start()

    async def _start(self) -> None:
        began, self.unloaded = time.monotonic(), False
        try:
            hello = await self._greet()
        except RefusedError as exc:
            self.digest, self.error, self.detail = "", exc.reason, exc.detail
            log.warning("worker.start-failed", extra={"reason": exc.reason})
            raise
        self.digest, self.confined, self.codec, self.error, self.detail = (
            hello.digest,
            hello.confined,
            hello.codec,
            "",
            "",
        )
        self._resident_bytes, self._used = hello.resident_bytes, asyncio.get_running_loop().time()
        self.starts.observe(time.monotonic() - began)

    async def _greet(self) -> Hello:
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-B", "-m", "agent.redaction.sandbox", str(os.getpid())),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            start_new_session=True,
            env=_environment(),
        )
        hello = await self._exchange(self._options.setup(), Hello, self._options.start_timeout_s)
        if hello.error:
            raise RefusedError(hello.error, hello.detail)
        return hello

    async def _ask(self, request: Request) -> Reply:
        began = time.monotonic()
        reply = await self._exchange(request, Reply, self._options.timeout_s)
        self.redactions.observe(time.monotonic() - began)
        self._used = asyncio.get_running_loop().time()
        return reply

    async def _exchange(self, value: msgspec.Struct, kind: type[T], timeout_s: float) -> T:
        """Send one frame and read one; RefusedError for a process that is late, gone or talks nonsense."""
        process = self._process
        if process is None or process.stdin is None or process.stdout is None:
            raise RefusedError("redaction.crashed", "no process")
        try:
            async with asyncio.timeout(timeout_s):
                process.stdin.write(encode(value))
                await process.stdin.drain()
                length = int.from_bytes(await process.stdout.readexactly(HEADER_BYTES), "big")
                if length > self._options.limits.max_bytes * GROWTH + REPLY_OVERHEAD_BYTES:
                    raise RefusedError("redaction.crashed", "reply too long")
                return msgspec.msgpack.decode(await process.stdout.readexactly(length), type=kind)
        except TimeoutError as exc:
            raise RefusedError("redaction.timeout", f"{timeout_s} s") from exc
        except (OSError, EOFError, msgspec.MsgspecError) as exc:
            raise RefusedError("redaction.crashed", await self._cause()) from exc

    async def _cause(self) -> str:
        """Return how the process ended, `running` where it has not."""
        if self._process is None:
            return "no process"
        try:
            async with asyncio.timeout(CAUSE_S):
                status = await self._process.wait()
        except TimeoutError:
            return "running"
        return signal.Signals(-status).name if status < 0 else f"exit {status}"

    async def _unload_loop(self) -> None:
        """End the process whenever no picture came for so long; cancelling is safe."""
        patience_s = self._options.unload_after_s
        while True:
            left = self._used + patience_s - asyncio.get_running_loop().time()
            if left > 0 or not self.ready or self._turn.locked():
                await asyncio.sleep(left if left > 0 else patience_s)
                continue
            async with self._turn:
                self.unloaded = True
                await self._end()

    async def _discard(self) -> None:
        """End the process, and note the failure for the delay of the next start."""
        if not await self._end():
            return
        self._failures += 1
        now = asyncio.get_running_loop().time()
        delay = MODEL_RETRY_S if self.error == "redaction.model" else _delay(self._failures)
        self._not_before = now + delay

    async def _end(self) -> bool:
        """Kill the process and its group; whether there was one."""
        process, self._process, self._resident_bytes = self._process, None, 0
        if process is None:
            return False
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # with whatever it may have started that still holds its pipes
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(END_S):
                await process.wait()
        return True


def _delay(failures: int) -> float:
    """Return the seconds before the next start: none after the first failure, then doubling."""
    return min(MAX_DELAY_S, FIRST_DELAY_S * 2.0 ** (failures - 2)) if failures > 1 else 0.0


def _environment() -> dict[str, str]:
    """Return what the process inherits, and one thread for libraries that would reserve memory for each core."""
    passed = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    return passed | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}
