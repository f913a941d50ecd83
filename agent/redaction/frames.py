"""What the agent and its worker process say to each other: a 4-byte big-endian length, then msgpack of one value."""

from __future__ import annotations

from collections.abc import Mapping

from msgspec import Struct, msgpack

from agent.payloads.inspection import InspectionLimits
from agent.pictures.formats import RedactionOptions

HEADER_BYTES = 4


class Setup(Struct, frozen=True, kw_only=True):
    """Agent to worker, once: how to open the detector, and every limit."""

    factory: str
    manifest: str
    manifest_data: bytes
    model_data: bytes
    threads: int
    far: bool
    nice: int
    timeout_s: float
    memory_bytes: int
    redaction: RedactionOptions
    limits: InspectionLimits


class Hello(Struct, frozen=True, kw_only=True):
    """Worker to agent, once: the SHA-256 of the open model, or the reason why no picture can be redacted.

    `confined`: the kernel filters the worker's system calls. `codec`: what JPEGs are masked with. `resident_bytes`: of
    memory, here and in `Reply`.
    """

    digest: str = ""
    confined: bool = False
    codec: str = ""
    error: str = ""
    detail: str = ""
    resident_bytes: int = 0


class Request(Struct, frozen=True, kw_only=True):
    """One payload to redact."""

    payload: bytes
    content_type: str | None = None


class Reply(Struct, frozen=True, kw_only=True):
    """The redacted payload, or the reason for its refusal."""

    payload: bytes = b""
    counts: dict[str, int] = {}
    pictures: int = 0
    refused: str = ""
    detail: str = ""
    resident_bytes: int = 0


def encode(value: Struct) -> bytes:
    """Return the whole frame."""
    body = msgpack.encode(value, enc_hook=_plain)
    return len(body).to_bytes(HEADER_BYTES, "big") + body


def _plain(value: object) -> object:
    """Frozen mappings travel as maps; nothing else needs help."""
    if isinstance(value, Mapping):
        return dict(value)
    raise NotImplementedError(type(value).__name__)
