"""By which bytes pictures, video and compressed data give themselves away; the one list for the whole agent.

Pure. `leading` judges the start of a payload or of a leaf inside it, `search` looks anywhere in opaque bytes. A
signature that is searched for is long enough (or checked further) that random data does not match by chance.
"""

from __future__ import annotations

import re
import zlib

from agent.pictures.containers import format_of

ZLIB_PROBE_BYTES = 1024  # enough for random bytes to fail; inflates to 1 MB at most
MIN_PICTURE_BYTES = 32  # no picture of any accepted or recognised format is smaller

# A literal that every match holds, and the whole pattern: looking for the literal first is what makes a scan cheap.
_ANYWHERE = (
    (b"\xff\xd8\xff", rb"\xff\xd8\xff[\xc0-\xfe]"),
    (b"\x89PNG", rb"\x89PNG\r\n\x1a\n"),
    (b"RIFF", rb"RIFF.{4}(?:WEBP|AVI )"),
    (b"GIF8", rb"GIF8[79]a"),
    (b"NG\r\n\x1a\n", rb"[\x8a\x8b][MJ]NG\r\n\x1a\n"),
    (b"ftyp", rb"\x00\x00..ftyp"),  # ISO base media: HEIC, AVIF, MP4, MOV
    (b"\r\n\x87\n", rb"\x00\x00\x00\x0c(?:jP  |JXL )\r\n\x87\n"),
    (b"\xff\x4f\xff\x51\x00", rb"\xff\x4f\xff\x51\x00"),  # JPEG 2000 codestream
    (b"II*\x00", rb"II\*\x00"),  # TIFF and, below, BigTIFF
    (b"MM\x00*", rb"MM\x00\*"),
    (b"II+\x00", rb"II\+\x00\x08\x00"),
    (b"MM\x00+", rb"MM\x00\+\x00\x08"),
    (b"BM", rb"BM.{4}\x00{4}.{4}[\x0c\x28\x34\x38\x40\x6c\x7c]\x00{3}"),
    (b"8BPS", rb"8BPS\x00[\x01\x02]"),
    (b"\x1aE\xdf\xa3", rb"\x1aE\xdf\xa3"),  # Matroska, WebM
    (b"\x00\x00\x01\xba", rb"\x00\x00\x01\xba"),  # MPEG program stream
    (b"\x00\x00\x01\xb3", rb"\x00\x00\x01\xb3"),  # MPEG video
    (b"\x00\x00\x00\x01", rb"\x00{3}\x01(?:[\x67\x27][\x42\x4d\x58\x64\x6e\x7a\xf4]|[\x40\x42]\x01)"),  # H.264, H.265
)
# Possessive throughout: a payload must not be able to make a match try again what failed, many times over.
_LEADING = (
    rb"\x00\x00[\x01\x02]\x00[\x01-\x20]\x00",  # ICO, CUR
    rb"FLV\x01|qoif|DDS |v/1\x01|FLIF|farbfeld|BPG\xfb|#\?RADIANCE",
    rb"\x00\x00\x00?\x01[\x09\x27\x67\x40\x42\x46]",  # H.264 and H.265 byte streams
    rb"\x47.{187}\x47.{187}\x47",  # MPEG transport stream
    rb"P[1-7]\s++(?:#[^\n]*+\n\s*+)*+(?:\d++\s++\d++\s|WIDTH )",  # netpbm
    rb"\s*+(?:/\* XPM|#define \w+_width \d)",
    rb"\s*+(?:<\?xml[^>]*+>\s*+)?+(?:(?><!--.*?-->)\s*+|<!DOCTYPE svg[^>]*+>\s*+)*+<svg[\s>]",
)
_ARCHIVES = (
    rb"\x1f\x8b\x08|\x28\xb5\x2f\xfd|BZh[1-9]|\xfd7zXZ\x00|\x04\x22\x4d\x18|\xff\x06\x00\x00sNaPpY",
    rb"PK\x03\x04|7z\xbc\xaf\x27\x1c|Rar!\x1a\x07",
    rb"%PDF-|\x89MCAP0|#ROSBAG V|SQLite format 3\x00|\x89HDF\r\n|PAR1|MDF     |begin [0-7]{3} |=ybegin ",
)
# Bytes that no pattern of `leading` starts with, and every JSON object, array and string does.
_INNOCENT = frozenset(b'{["$-01234569')

_SEARCHES = [(literal, re.compile(pattern, re.DOTALL)) for literal, pattern in _ANYWHERE]
_LITERAL = re.compile(b"|".join(re.escape(literal) for literal, _ in _ANYWHERE))
_PICTURE = re.compile(b"|".join((*(pattern for _, pattern in _ANYWHERE), *_LEADING)), re.DOTALL)
_ARCHIVE = re.compile(b"|".join(_ARCHIVES), re.DOTALL)


def leading(data: bytes) -> str | None:
    """Return the reason to refuse these bytes by their start: a picture or archive that cannot be opened here."""
    if data[257:262] == b"ustar":
        return "payload.compressed"
    if not data or data[0] in _INNOCENT or format_of(data):
        return None
    if _PICTURE.match(data):
        return "picture.format"
    if _ARCHIVE.match(data) or _is_zlib(data):
        return "payload.compressed"
    return None


def search(data: bytes) -> int | None:
    """Return the offset of a picture or video signature anywhere in the bytes."""
    if not _LITERAL.search(data):
        return None
    for literal, pattern in _SEARCHES:
        if literal not in data:
            continue
        for match in pattern.finditer(data):
            if literal != b"\xff\xd8\xff" or _segment_follows(data, match.start() + 2):
                return match.start()
    return None


def _segment_follows(data: bytes, at: int) -> bool:
    """Whether a JPEG marker segment stands at `at` and the next one after it, as far as the data goes."""
    end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return end >= len(data) or data[end] == 0xFF


def _is_zlib(data: bytes) -> bool:
    """Whether the bytes are an RFC 1950 stream: the header's check bits hold and it inflates as far as is tried."""
    if data[:1] != b"\x78" or len(data) < 6 or int.from_bytes(data[:2], "big") % 31:
        return False
    stream = zlib.decompressobj()
    try:
        stream.decompress(data[:ZLIB_PROBE_BYTES])
    except zlib.error:
        return False
    return True
