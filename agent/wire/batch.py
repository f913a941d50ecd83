"""Several records in one PUBLISH: the batch, and everything about its bytes.

A batch is a msgpack array of envelopes (bin), each with exactly the bytes that it has alone, so each is signed, judged
and told apart from duplicates as if it had come alone. Every length is in its shortest form: equal envelopes in equal
order give equal bytes. With `+zstd` in its Content Type it is one zstd frame of those bytes that names its content
size. A batch holds 2 to MAX_RECORDS records; one record goes as its envelope.

All records of a batch have the topic of the PUBLISH and the same `dataregion`, which is the only user property that a
batch has from the agent. As with an envelope, a reader refuses a record that a user property contradicts.

Where MQTT 3.1.1 or a bridge took the Content Type away, the first byte tells: an envelope is a map, a batch an array,
and zstd has its magic number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType

import msgpack  # type: ignore[import-untyped]  # it ships no annotations
import msgspec

from agent.errors import EnvelopeError
from agent.wire.envelope import MAX_ENVELOPE_BYTES

CONTENT_TYPE = "application/vnd.residency-agent.batch+msgpack"
ZSTD_CONTENT_TYPE = f"{CONTENT_TYPE}+zstd"
PROPERTY = "dataregion"  # the one attribute that stands in a batch's user properties
MAX_RECORDS = 256
FEWEST_RECORDS = 2

_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"  # RFC 8878, 3.1.1
_ARRAY_MARKERS = frozenset({*range(0x90, 0xA0), 0xDC, 0xDD})  # msgpack: fixarray, array 16, array 32
_encode = msgspec.msgpack.Encoder().encode  # every length in its shortest form

Compress = Callable[[bytes], bytes]


def pack(envelopes: Sequence[bytes], compress: Compress | None = None) -> bytes:
    """Give the batch of these envelopes; raises EnvelopeError for a number of them that is none."""
    if not FEWEST_RECORDS <= len(envelopes) <= MAX_RECORDS:
        raise EnvelopeError(f"a batch of {len(envelopes)} records; it holds {FEWEST_RECORDS} to {MAX_RECORDS}")
    packed = _encode(list(envelopes))
    return packed if compress is None else compress(packed)


def is_batch(payload: bytes, content_type: str | None) -> bool:
    """Whether a PUBLISH with this payload is a batch."""
    if content_type is not None:
        return content_type in {CONTENT_TYPE, ZSTD_CONTENT_TYPE}
    return payload[:1] != b"" and (payload[0] in _ARRAY_MARKERS or payload.startswith(_ZSTD_MAGIC))


def unpack(payload: bytes, content_type: str | None, max_bytes: int = MAX_ENVELOPE_BYTES) -> list[bytes]:
    """Give the envelopes of a batch; raises EnvelopeError for everything that `pack` would not have written.

    `max_bytes` bounds the batch, compressed or not. What an envelope holds is not judged: see `envelope.received`.
    """
    if len(payload) > max_bytes:
        raise EnvelopeError(f"a batch of {len(payload)} bytes; the limit is {max_bytes}")
    if content_type == ZSTD_CONTENT_TYPE or (content_type is None and payload.startswith(_ZSTD_MAGIC)):
        payload = _decompressed(payload, max_bytes)
    try:
        found = msgpack.unpackb(payload, raw=False, max_array_len=MAX_RECORDS, max_map_len=0)
    except (ValueError, msgpack.UnpackException) as exc:
        raise EnvelopeError(f"batch: not a msgpack array of at most {MAX_RECORDS}: {exc}") from exc
    if not isinstance(found, list) or not all(isinstance(one, bytes) for one in found):
        raise EnvelopeError("batch: not an array of byte strings")
    if pack(found) != payload:
        raise EnvelopeError("the batch is not in the form that the agent writes")
    return found


def _decompressed(payload: bytes, max_bytes: int) -> bytes:
    if not payload.startswith(_ZSTD_MAGIC):
        raise EnvelopeError("batch: not a zstd frame")
    found: bytes = _zstd().decompress(payload, max_bytes)
    return found


def compressor() -> Compress:
    """What makes a batch a compressed one; raises EnvelopeError without the library."""
    compress: Compress = _zstd().compress
    return compress


def _zstd() -> ModuleType:
    try:
        from agent.wire import zstd  # noqa: PLC0415 - an optional extra
    except ImportError as exc:
        raise EnvelopeError("a compressed batch needs: pip install 'residency-agent[zstd]'") from exc
    return zstd
