"""PNG streams (W3C PNG, third edition) read chunk by chunk; only what is needed to decode is carried on."""

from __future__ import annotations

import zlib

from agent.errors import RefusedError
from agent.pictures import exif
from agent.pictures.formats import Format, Header, PictureLimits, check_frames, check_size

SIGNATURE = b"\x89PNG\r\n\x1a\n"
CARRIED = frozenset({b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"})
DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}  # clause 11.2.1, by colour type
MAX_CHUNKS = 100_000


def parse(data: bytes, limits: PictureLimits) -> Header:
    """Read up to IEND and ignore what follows it; RefusedError for what is malformed or too big."""
    width, height = _size(data)
    check_size(width, height, limits)
    kept, orientation, frames = [SIGNATURE], 1, 1
    at, kind, count = len(SIGNATURE), b"", 0
    while kind != b"IEND":
        kind, body, at = _chunk(data, at)
        count += 1
        if count > MAX_CHUNKS or (kind == b"IHDR") != (count == 1):
            raise RefusedError("picture.corrupt", "chunks")
        if kind in CARRIED:
            kept.append(encode(kind, b"" if kind == b"IEND" else body))
        elif not kind[0] & 0x20:
            raise RefusedError("picture.coding", "unknown critical chunk")
        elif kind == b"eXIf":
            orientation = exif.orientation(body)
        elif kind == b"acTL":
            frames = max(frames, int.from_bytes(body[:4], "big"))
        elif kind == b"fdAT":
            frames = max(frames, 2)
    check_frames(frames, limits)
    return Header(
        format=Format.PNG,
        width=width,
        height=height,
        clean=b"".join(kept),
        orientation=orientation,
    )


def finish(header: Header, orientation: int) -> bytes:
    """Return the clean stream with the one value that may survive: an orientation other than 1."""
    extra = b""
    if orientation != 1:
        extra += encode(b"eXIf", exif.block(orientation))
    clean, at = header.clean, len(SIGNATURE) + 25
    return clean[:at] + extra + clean[at:]


def encode(kind: bytes, body: bytes) -> bytes:
    """One chunk: length, type, data, CRC."""
    return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")


def _size(data: bytes) -> tuple[int, int]:
    if data[:8] != SIGNATURE or data[8:16] != b"\x00\x00\x00\rIHDR" or len(data) < 33:
        raise RefusedError("picture.corrupt", "no IHDR")
    depth, colour, compression, method, interlace = data[24:29]
    if depth not in DEPTHS.get(colour, ()) or compression or method or interlace > 1:
        raise RefusedError("picture.coding", "IHDR")
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


def _chunk(data: bytes, at: int) -> tuple[bytes, bytes, int]:
    length = int.from_bytes(data[at : at + 4], "big")
    end = at + 12 + length
    if end > len(data):
        raise RefusedError("picture.truncated")
    kind, body = data[at + 4 : at + 8], data[at + 8 : end - 4]
    if zlib.crc32(body, zlib.crc32(kind)) != int.from_bytes(data[end - 4 : end], "big"):
        raise RefusedError("picture.corrupt", "CRC")
    return kind, body, end
