"""JPEG streams (ITU-T T.81) read segment by segment; what is not on the list of this module is not carried on.

`parse` never decodes: it walks markers, so its cost does not depend on the claimed size of the picture.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from agent.errors import RefusedError
from agent.pictures import exif
from agent.pictures.formats import Colour, Format, Header, PictureLimits, check_size

SOI, EOI, SOS, DQT, DHT, DRI = 0xD8, 0xD9, 0xDA, 0xDB, 0xC4, 0xDD
APP0, APP1, APP14 = 0xE0, 0xE1, 0xEE
FRAMES = {0xC0: False, 0xC1: False, 0xC2: True}  # baseline, extended, progressive: the coding that is accepted
DROPPED = frozenset({*range(0xE0, 0xF0), 0xFE})  # APPn and COM
CARRIED = frozenset({DQT, DHT, DRI})
QUARTER_CHROMA = ((2, 2), (1, 1), (1, 1))  # 4:2:0
HALF_CHROMA = ((2, 1), (1, 1), (1, 1))  # 4:2:2
MAX_SCANS = 100  # an encoder writes about 10; thousands are an attack on the decoder's time
JFIF_BODY = b"JFIF\x00\x01\x01\x00\x00\x01\x00\x01\x00\x00"  # version 1.1, square pixels, no thumbnail
ADOBE_BODY = b"Adobe\x00\x64\x00\x00\x00\x00"  # version 100, flags 0; the transform byte follows

AFTER_SCAN = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # in a scan 0xFF stands before a stuffed zero and restart numbers
ZIGZAG = (
    *(0, 1, 8, 16, 9, 2, 3, 10, 17, 24, 32, 25, 18, 11, 4, 5, 12, 19, 26, 33, 40, 48, 41, 34, 27, 20, 13, 6, 7, 14, 21),
    *(28, 35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23, 30, 37, 44, 51, 58, 59, 52, 45, 38, 31, 39, 46, 53, 60, 61),
    *(54, 47, 55, 62, 63),
)


@dataclass(slots=True)
class _Walk:
    """What one pass over the segments has gathered so far."""

    kept: list[bytes] = field(default_factory=list)
    tables: dict[int, tuple[int, ...]] = field(default_factory=dict)
    components: tuple[tuple[int, int, int, int], ...] = ()  # (id, h, v, table)
    width: int = 0
    height: int = 0
    progressive: bool = False
    restart: int = 0
    scans: int = 0
    optimised: bool = False
    jfif: bool = False
    adobe: int | None = None
    orientation: int | None = None


def parse(data: bytes, limits: PictureLimits) -> Header:
    """Read up to EOI and ignore what follows it; RefusedError for what is malformed, too big or coded otherwise."""
    if data[:2] != b"\xff\xd8":
        raise RefusedError("picture.corrupt", "no SOI")
    walk, at = _Walk(), 2
    while True:
        marker, at = _marker(data, at)
        if marker == EOI:
            break
        body, at = _body(data, at)
        if marker == SOS:
            at = _scan(walk, data, body, at)
        else:
            _segment(walk, marker, body, limits)
    if not walk.scans:
        raise RefusedError("picture.corrupt", "no scan")
    return _header(walk)


def finish(header: Header, orientation: int) -> bytes:
    """Return the clean stream with the one value that may survive: an orientation other than 1."""
    extra = b""
    if orientation != 1:
        extra += _encode(APP1, exif.PREFIX + exif.block(orientation))
    clean, at = header.clean, 2
    while clean[at + 1] in {APP0, APP14}:
        at += 2 + int.from_bytes(clean[at + 2 : at + 4], "big")
    return clean[:at] + extra + clean[at:]


def _marker(data: bytes, at: int) -> tuple[int, int]:
    if data[at : at + 1] != b"\xff":
        raise RefusedError("picture.corrupt", "marker expected")
    while data[at : at + 1] == b"\xff":
        at += 1
    if at >= len(data):
        raise RefusedError("picture.truncated")
    return data[at], at + 1


def _body(data: bytes, at: int) -> tuple[bytes, int]:
    length = int.from_bytes(data[at : at + 2], "big")
    if length < 2 or at + length > len(data):
        raise RefusedError("picture.truncated")
    return data[at + 2 : at + length], at + length


def _scan(walk: _Walk, data: bytes, body: bytes, at: int) -> int:
    walk.scans += 1
    if not walk.components or walk.scans > MAX_SCANS:
        raise RefusedError("picture.corrupt", "scans")
    end = _scan_end(data, at)
    walk.kept += (_encode(SOS, body), data[at:end])
    return end


def _scan_end(data: bytes, at: int) -> int:
    """Where the next marker that belongs to no scan begins, with the fill bytes before it."""
    found = AFTER_SCAN.search(data, at)
    if found is None:
        raise RefusedError("picture.truncated")
    end = found.start()
    while end > at and data[end - 1] == 0xFF:
        end -= 1
    return end


def _segment(walk: _Walk, marker: int, body: bytes, limits: PictureLimits) -> None:
    if marker in FRAMES:
        _frame(walk, marker, body)
        check_size(walk.width, walk.height, limits)
    elif marker in DROPPED:
        _application(walk, marker, body)
    elif marker not in CARRIED:
        raise RefusedError("picture.coding", f"marker {marker:02x}")
    if marker == DQT:
        _tables(walk, body)
    elif marker == DHT:
        walk.optimised |= not _has_standard_sizes(body)
    elif marker == DRI and len(body) == 2:
        walk.restart = int.from_bytes(body, "big")
    if marker in CARRIED or marker in FRAMES:
        walk.kept.append(_encode(marker, body))


def _frame(walk: _Walk, marker: int, body: bytes) -> None:
    if walk.components or len(body) < 6 or len(body) != 6 + 3 * body[5] or body[5] not in {1, 3, 4}:
        raise RefusedError("picture.corrupt", "frame header")
    if body[0] != 8:
        raise RefusedError("picture.coding", f"{body[0]} bits")
    walk.progressive = FRAMES[marker]
    walk.height, walk.width = int.from_bytes(body[1:3], "big"), int.from_bytes(body[3:5], "big")
    walk.components = tuple((body[i], body[i + 1] >> 4, body[i + 1] & 15, body[i + 2]) for i in range(6, len(body), 3))
    if any(not (1 <= h <= 4 and 1 <= v <= 4) for _, h, v, _ in walk.components):
        raise RefusedError("picture.corrupt", "sampling factors")


def _tables(walk: _Walk, body: bytes) -> None:
    at = 0
    while at < len(body):
        wide, name = body[at] >> 4, body[at] & 15
        size = 64 * (wide + 1)
        values = body[at + 1 : at + 1 + size]
        if wide > 1 or name > 3 or len(values) != size:
            raise RefusedError("picture.corrupt", "quantisation table")
        table = [0] * 64
        for zigzag, natural in enumerate(ZIGZAG):
            table[natural] = int.from_bytes(values[zigzag * (wide + 1) : (zigzag + 1) * (wide + 1)], "big")
        walk.tables.setdefault(name, tuple(table))
        at += 1 + size


def _has_standard_sizes(body: bytes) -> bool:
    """Whether Huffman tables have the sizes of T.81, annex K (12 symbols for DC, 162 for AC): others were optimised."""
    at = 0
    while at < len(body):
        symbols = sum(body[at + 1 : at + 17])
        if symbols != (162 if body[at] >> 4 else 12):
            return False
        at += 17 + symbols
    return True


def _application(walk: _Walk, marker: int, body: bytes) -> None:
    if marker == APP0 and body[:5] == b"JFIF\x00":
        walk.jfif = True
    elif marker == APP14 and body[:5] == b"Adobe" and len(body) >= 12:
        walk.adobe = body[11]
    elif marker == APP1 and body[:6] == exif.PREFIX and walk.orientation is None:
        walk.orientation = exif.orientation(body[6:])


def _colour(walk: _Walk) -> Colour:
    """Read the samples as libjpeg does: JFIF wins over Adobe, Adobe over the component names."""
    if len(walk.components) == 1:
        return Colour.GREY
    if len(walk.components) == 4:
        return Colour.CMYK
    if walk.jfif or walk.adobe is not None:
        return Colour.YCC if walk.jfif or walk.adobe else Colour.RGB
    return Colour.RGB if [name for name, *_ in walk.components] == [0x52, 0x47, 0x42] else Colour.YCC


def _block(walk: _Walk) -> tuple[int, int]:
    """Return the size of an MCU in pixels (T.81, A.2); the factors of a lone component do not count."""
    if len(walk.components) == 1:
        return 8, 8
    return 8 * max(h for _, h, _, _ in walk.components), 8 * max(v for _, _, v, _ in walk.components)


def _bleed(walk: _Walk) -> int:
    """Return how far decoded chroma reaches: one sample of two pixels, none where it is read as stored."""
    sampling = tuple((h, v) for _, h, v, _ in walk.components)
    return 2 if len(set(sampling)) > 1 and sampling != QUARTER_CHROMA else 0


def _header(walk: _Walk) -> Header:
    if any(table not in walk.tables for *_, table in walk.components):
        raise RefusedError("picture.corrupt", "missing quantisation table")
    start = [_encode(APP0, JFIF_BODY)] if walk.jfif else []
    if walk.adobe is not None:
        start.append(_encode(APP14, ADOBE_BODY + bytes([walk.adobe])))
    return Header(
        format=Format.JPEG,
        width=walk.width,
        height=walk.height,
        clean=b"".join([b"\xff\xd8", *start, *walk.kept, b"\xff\xd9"]),
        orientation=walk.orientation or 1,
        colour=_colour(walk),
        progressive=walk.progressive,
        restart=walk.restart,
        optimised=walk.optimised,
        tables=tuple(walk.tables[table] for *_, table in walk.components),
        sampling=tuple((h, v) for _, h, v, _ in walk.components),
        block=_block(walk),
        bleed=_bleed(walk),
    )


def _encode(marker: int, body: bytes) -> bytes:
    return bytes([0xFF, marker]) + (len(body) + 2).to_bytes(2, "big") + body
