"""WebP files (RFC 9649) read chunk by chunk; only the bitstream and its alpha are carried on."""

from __future__ import annotations

from agent.errors import RefusedError
from agent.pictures import exif
from agent.pictures.formats import Format, Header, PictureLimits, check_frames, check_size

ALPHA, EXIF = 0x10, 0x08  # VP8X flags, RFC 9649 section 2.7.1
CARRIED = frozenset({b"VP8 ", b"VP8L", b"ALPH"})
MAX_CHUNKS = 1000
MACROBLOCK = (16, 16)  # RFC 6386, section 2
FILTER_REACH = 3  # pixels on either side of a macroblock's edge, RFC 6386, section 15.3


def parse(data: bytes, limits: PictureLimits) -> Header:
    """Read up to the RIFF size and ignore what follows it; RefusedError for what is malformed or too big."""
    chunks = _chunks(data)
    check_frames(sum(kind == b"ANMF" for kind, _ in chunks), limits)
    kept = [(kind, body) for kind, body in chunks if kind in CARRIED]
    streams = [(kind, body) for kind, body in kept if kind != b"ALPH"]
    canvas = next((body for kind, body in chunks if kind == b"VP8X"), None)
    if len(streams) != 1 or len(kept) > 2:
        raise RefusedError("picture.corrupt", "bitstreams")
    lossless = streams[0][0] == b"VP8L"
    width, height = (_lossless_size if lossless else _lossy_size)(streams[0][1])
    if canvas is not None and (len(canvas) != 10 or (_u24(canvas, 4), _u24(canvas, 7)) != (width, height)):
        raise RefusedError("picture.corrupt", "canvas")
    check_size(width, height, limits)
    return Header(
        format=Format.WEBP,
        width=width,
        height=height,
        clean=_file(kept, width, height),
        orientation=_orientation(chunks),
        lossless=lossless,
        quantizer=0 if lossless else quantizer(streams[0][1]),
        block=(1, 1) if lossless else MACROBLOCK,
        bleed=0 if lossless else FILTER_REACH,
    )


def finish(header: Header, orientation: int) -> bytes:
    """Return the clean file with the one value that may survive: an orientation other than 1."""
    if orientation == 1:
        return header.clean
    chunks = [(kind, body) for kind, body in _chunks(header.clean) if kind in CARRIED]
    chunks.append((b"EXIF", exif.block(orientation)))
    return _file(chunks, header.width, header.height)


def quantizer(frame: bytes) -> int:
    """Return the base quantiser index, 0 (best) to 127, of a VP8 key frame (RFC 6386, section 9.6)."""
    bits = _Bits(frame[10:])
    bits.read(2)  # colour space, clamping
    if bits.read(1):
        _skip_segments(bits)
    bits.read(1 + 6 + 3)  # filter type, level, sharpness
    if bits.read(1) and bits.read(1):
        for _ in range(8):
            if bits.read(1):
                bits.read(7)
    bits.read(2)  # token partitions
    return bits.read(7)


def quality(index: int) -> int:
    """Return the encoder's quality (0-100) whose base quantiser index is `index`: the inverse of libwebp's curve.

    libwebp takes q -> 127 (1 - cbrt(l)) with l = 2/3 q below q = 0.75 and 2 q - 1 above it.
    """
    linear = (1 - index / 127) ** 3
    return round(100 * (1.5 * linear if linear < 0.5 else (linear + 1) / 2))


class _Bits:
    """The boolean decoder of RFC 6386, section 7.3, at even probability; reads zeros past the end."""

    def __init__(self, data: bytes) -> None:
        self._data = data[:256].ljust(256, b"\x00")
        self._value = int.from_bytes(self._data[:2], "big")
        self._next = 2
        self._range = 255
        self._shifted = 0

    def read(self, count: int) -> int:
        """Return `count` bits, the most significant first."""
        value = 0
        for _ in range(count):
            value = value << 1 | self._bit()
        return value

    def _bit(self) -> int:
        split = 1 + ((self._range - 1) * 128 >> 8)
        bit = self._value >= split << 8
        if bit:
            self._range -= split
            self._value -= split << 8
        else:
            self._range = split
        while self._range < 128:
            self._shift()
        return int(bit)

    def _shift(self) -> None:
        self._value <<= 1
        self._range <<= 1
        self._shifted += 1
        if self._shifted == 8:
            self._shifted = 0
            self._value |= self._data[self._next] if self._next < len(self._data) else 0
            self._next += 1


def _skip_segments(bits: _Bits) -> None:
    update_map, update_data = bits.read(1), bits.read(1)
    if update_data:
        bits.read(1)
        for width in (7, 7, 7, 7, 6, 6, 6, 6):
            if bits.read(1):
                bits.read(width + 1)
    if update_map:
        for _ in range(3):
            if bits.read(1):
                bits.read(8)


def _chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    end = 8 + int.from_bytes(data[4:8], "little")
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP":
        raise RefusedError("picture.corrupt", "no RIFF header")
    if end > len(data):
        raise RefusedError("picture.truncated")
    chunks: list[tuple[bytes, bytes]] = []
    at = 12
    while at + 8 <= end:
        length = int.from_bytes(data[at + 4 : at + 8], "little")
        if at + 8 + length > end or len(chunks) == MAX_CHUNKS:
            raise RefusedError("picture.corrupt", "chunks")
        chunks.append((data[at : at + 4], data[at + 8 : at + 8 + length]))
        at += 8 + length + length % 2
    return chunks


def _file(chunks: list[tuple[bytes, bytes]], width: int, height: int) -> bytes:
    kinds = {kind for kind, _ in chunks}
    flags = ALPHA * (b"ALPH" in kinds) | EXIF * (b"EXIF" in kinds)
    if flags:
        canvas = bytes([flags, 0, 0, 0]) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
        chunks = [(b"VP8X", canvas), *chunks]
    body = b"".join(_encode(kind, data) for kind, data in chunks)
    return b"RIFF" + (len(body) + 4).to_bytes(4, "little") + b"WEBP" + body


def _encode(kind: bytes, body: bytes) -> bytes:
    return kind + len(body).to_bytes(4, "little") + body + b"\x00" * (len(body) % 2)


def _lossy_size(frame: bytes) -> tuple[int, int]:
    if len(frame) < 10 or frame[0] & 1 or frame[3:6] != b"\x9d\x01\x2a":
        raise RefusedError("picture.corrupt", "VP8 header")
    return int.from_bytes(frame[6:8], "little") & 0x3FFF, int.from_bytes(frame[8:10], "little") & 0x3FFF


def _lossless_size(frame: bytes) -> tuple[int, int]:
    if len(frame) < 5 or frame[0] != 0x2F:
        raise RefusedError("picture.corrupt", "VP8L header")
    bits = int.from_bytes(frame[1:5], "little")
    return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1


def _u24(data: bytes, at: int) -> int:
    return int.from_bytes(data[at : at + 3], "little") + 1


def _orientation(chunks: list[tuple[bytes, bytes]]) -> int:
    body = next((body for kind, body in chunks if kind == b"EXIF"), b"")
    return exif.orientation(body.removeprefix(exif.PREFIX))
