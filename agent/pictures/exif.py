"""The one EXIF value that may matter, the orientation: read from anywhere, written as a block of our own."""

from __future__ import annotations

import struct

ORIENTATION_TAG = 0x0112  # Exif 2.32, 4.6.4 A
SHORT = 3
PREFIX = b"Exif\x00\x00"
MAX_ENTRIES = 512  # far above any real IFD0


def orientation(tiff: bytes) -> int:
    """Orientation 1-8 of a TIFF block (the bytes after `PREFIX`); 1 where it is absent or malformed."""
    order = {b"II*\x00": "<", b"MM\x00*": ">"}.get(tiff[:4])
    if order is None or len(tiff) < 8:
        return 1
    (start,) = struct.unpack_from(order + "I", tiff, 4)
    if start + 2 > len(tiff):
        return 1
    (entries,) = struct.unpack_from(order + "H", tiff, start)
    for at in range(start + 2, start + 2 + 12 * min(entries, MAX_ENTRIES), 12):
        if at + 12 > len(tiff):
            return 1
        tag, kind, count, value = struct.unpack_from(order + "HHIH", tiff, at)
        if tag == ORIENTATION_TAG:
            return value if kind == SHORT and count == 1 and 1 <= value <= 8 else 1
    return 1


def block(value: int) -> bytes:
    """Return a TIFF block that holds the orientation and nothing else."""
    return struct.pack(">4sIHHHIHHI", b"MM\x00*", 8, 1, ORIENTATION_TAG, SHORT, 1, value, 0, 0)
