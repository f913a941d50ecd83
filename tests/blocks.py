"""Pieces of file formats: what the corpus builds its hiding places from."""

import struct
import zlib

from canary import HEIGHT, TEXT, WIDTH, saved, scene
from PIL import Image


def slices(data: bytes) -> tuple[bytes, ...]:
    """Bytes from the middle of a picture's coded samples, which no other picture has."""
    middle = (data.rindex(b"\xff\xda") + 14 + len(data)) // 2
    return (data[middle : middle + 24],)


def segment(marker: int, body: bytes) -> bytes:
    return bytes([0xFF, marker]) + (len(body) + 2).to_bytes(2, "big") + body


def after_soi(jpeg: bytes, *segments: bytes) -> bytes:
    return jpeg[:2] + b"".join(segments) + jpeg[2:]


def tiff(entries: list[tuple[int, int, int, bytes]], second: list[tuple[int, int, int, bytes]] | None = None) -> bytes:
    """A big-endian TIFF block with one or two directories; entries are (tag, type, count, data)."""
    head, blocks = b"MM\x00*" + (8).to_bytes(4, "big"), [entries] + ([second] if second else [])
    at, out = 8, b""
    for number, block in enumerate(blocks):
        data_at, table, data = at + 2 + 12 * len(block) + 4, b"", b""
        for tag, kind, count, value in sorted(block):
            stored = value if kind != 4 or value != b"AFTER" else b""
            if len(stored) <= 4 and stored:
                table += struct.pack(">HHI", tag, kind, count) + stored.ljust(4, b"\x00")
            else:
                table += struct.pack(">HHII", tag, kind, count, data_at + len(data))
                data += stored
        following = data_at + len(data) if number + 1 < len(blocks) else 0
        out += struct.pack(">H", len(block)) + table + struct.pack(">I", following) + data
        at = data_at + len(data)
    return head + out


def exif_text(tag: int = 0x9286, kind: int = 7, value: bytes = TEXT) -> bytes:
    return b"Exif\x00\x00" + tiff([(tag, kind, len(value), value)])


def exif_thumbnail(orientation: int = 1) -> bytes:
    """IFD1 with a JPEG thumbnail of the unredacted scene (tags 0x0201 and 0x0202, which hold offset and length)."""
    thumb = thumbnail()
    first = struct.pack(">HHHIHHI", 1, 0x0112, 3, 1, orientation, 0, 26)
    second = struct.pack(">HHHIIHHII", 2, 0x0201, 4, 1, 56, 0x0202, 4, 1, len(thumb)) + b"\x00" * 4
    return b"Exif\x00\x00" + b"MM\x00*" + struct.pack(">I", 8) + first + second + thumb


def thumbnail() -> bytes:
    return saved(Image.fromarray(scene()).resize((96, 72), Image.Resampling.BOX), "JPEG", quality=70)


def chunk(kind: bytes, body: bytes) -> bytes:
    return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")


def after_ihdr(png: bytes, *chunks: bytes) -> bytes:
    return png[:33] + b"".join(chunks) + png[33:]


def raw_png(width: int, height: int, depth: int, colour: int, rows: bytes, *extra: bytes, tail: bytes = b"") -> bytes:
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = chunk(b"IHDR", head) + b"".join(extra) + chunk(b"IDAT", zlib.compress(rows) + tail) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def riff(*chunks: tuple[bytes, bytes]) -> bytes:
    body = b"".join(kind + len(data).to_bytes(4, "little") + data + b"\x00" * (len(data) % 2) for kind, data in chunks)
    return b"RIFF" + (len(body) + 4).to_bytes(4, "little") + b"WEBP" + body


def with_webp_chunks(webp: bytes, flags: int, *chunks: tuple[bytes, bytes]) -> bytes:
    size = (WIDTH - 1).to_bytes(3, "little") + (HEIGHT - 1).to_bytes(3, "little")
    length = int.from_bytes(webp[16:20], "little")
    return riff((b"VP8X", bytes([flags, 0, 0, 0]) + size), (webp[12:16], webp[20 : 20 + length]), *chunks)
