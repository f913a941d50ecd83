"""One zstd frame (RFC 8878) that says how much is in it; this module needs the extra `zstd`."""

from __future__ import annotations

import zstandard

from agent.errors import EnvelopeError

LEVEL = 3  # zstd's own default; higher ones take several times as long for a few per cent
NO_DICTIONARY = 0

_compressor = zstandard.ZstdCompressor(level=LEVEL, write_content_size=True)
_decompressor = zstandard.ZstdDecompressor()


def compress(data: bytes) -> bytes:
    """Give one frame with its content size; other versions of the library may give another one."""
    return _compressor.compress(data)


def decompress(frame: bytes, max_bytes: int) -> bytes:
    """Read what is exactly one frame; raises EnvelopeError.

    Nothing is allocated for a frame that says it holds more than `max_bytes`, or does not say how much.
    """
    try:
        head = zstandard.get_frame_parameters(frame)
    except zstandard.ZstdError as exc:
        raise EnvelopeError(f"zstd: {exc}") from exc
    if head.content_size == zstandard.CONTENTSIZE_UNKNOWN or head.dict_id != NO_DICTIONARY:
        raise EnvelopeError("zstd: the frame does not say how much it holds, or needs a dictionary")
    if not 0 < head.content_size <= max_bytes:
        raise EnvelopeError(f"zstd: a frame of {head.content_size} bytes; the limit is {max_bytes}")
    try:
        data = _decompressor.decompress(frame, read_across_frames=False, allow_extra_data=False)
    except zstandard.ZstdError as exc:
        raise EnvelopeError(f"zstd: {exc}") from exc
    if len(data) != head.content_size:
        raise EnvelopeError(f"zstd: a frame that says {head.content_size} bytes holds {len(data)}")
    return data
