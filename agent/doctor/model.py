"""The detector: whether it opens in its sandbox, and how fast it is with a picture of a camera's size."""

from __future__ import annotations

import struct
import time
import zlib

from agent import wiring
from agent.assembly import Setup
from agent.doctor.findings import Finding
from agent.errors import AgentError
from agent.redaction.worker import RedactionWorker

WIDTH, HEIGHT = 1280, 720
SLOW_SECONDS = 1.0  # a picture that takes longer holds the pictures' session back
REASONS = {
    "redaction.memory": "it needs more memory: raise model.memory_bytes, and MemoryMax= of the unit with it",
    "redaction.timeout": "it does not answer in time: is the machine busy, or CPUQuota= of the unit too small?",
    "redaction.crashed": "its process died: `journalctl -k` may say why; does onnxruntime support the processor?",
}
NO_MODEL = "without a verified model every picture is refused: reinstall it, or correct model.manifest"


def png() -> bytes:
    """A grey picture of a camera's size, each pixel unlike its neighbours."""
    row = bytes(x * 7 % 251 for x in range(WIDTH))
    data = b"".join(b"\0" + row[y % WIDTH :] + row[: y % WIDTH] for y in range(HEIGHT))
    header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, 8, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(data)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )


async def try_model(setup: Setup) -> Finding:
    """Whether the detector opens in its sandbox, and how long a picture takes."""
    async with RedactionWorker(wiring.worker_options(setup)) as worker:
        if worker.error:
            advice = REASONS.get(worker.error, NO_MODEL)
            return Finding(name="model", detail=worker.detail or worker.error, advice=advice)
        started = time.monotonic()
        try:
            await worker.redact(png())
        except AgentError as exc:
            advice = REASONS.get(getattr(exc, "reason", ""), "raise model.memory_bytes or model.timeout_s, or limits")
            return Finding(name="model", detail=str(exc), advice=advice)
        return _judged(worker, time.monotonic() - started)


def _judged(worker: RedactionWorker, seconds: float) -> Finding:
    picture = f"{WIDTH}x{HEIGHT} in {seconds * 1000:.0f} ms, JPEG by {worker.codec}"
    detail = f"{worker.digest[:12]}, {picture}, {worker.resident_bytes >> 20} MiB"
    if not worker.confined:
        advice = "the kernel filters no system calls of the decoders: use one with CONFIG_SECCOMP_FILTER"
        return Finding(name="model", detail=detail, advice=advice)
    if seconds > SLOW_SECONDS:
        advice = "pictures will queue: is the machine busy, model.threads or CPUQuota= of the unit too low?"
        return Finding(name="model", detail=detail, advice=advice)
    return Finding(name="model", detail=detail)
