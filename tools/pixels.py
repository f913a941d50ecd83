"""Looking at delivered pictures without the agent's code: which picture it is, and what in it is covered."""

from __future__ import annotations

import contextlib
import hashlib
import io
import re
import struct
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from tools import schemas

Pixels = NDArray[np.uint8]
Grey = NDArray[np.uint8]
Box = tuple[int, int, int, int]
Part = tuple[bytes, bytes]  # what a part of a file is called in its format, and what is in it

THUMBNAIL = (96, 54)  # pixels; enough to tell crops of one photograph apart
LIKELY = 48  # candidates that are compared in full
SAME = 4  # of 255: JPEG leaves the inside of a constant area within this of its colour; night sky is noisier
COVERED_SHARE = 0.5  # GB/T 44464-2024, B.5.3: masked area / box area from which an object counts as anonymised
UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)  # what Pillow raises for bad pictures

_MARKER = re.compile(rb"\xff+([^\x00\xd0-\xd7\xff])", re.DOTALL)  # in a scan 0xFF is stuffed, or a restart's
_SOS, _EOI = b"\xda", b"\xd9"
OPAQUE_MODES = ("L", "RGB")
NEEDED = frozenset(
    {b"\xc0", b"\xc1", b"\xc2", b"\xc4", b"\xda", b"\xdb", b"\xdd", b"\xe0", b"\xee"}  # JPEG: SOF, DHT, SOS, DQT, ...
    | {b"IHDR", b"IDAT", b"IEND"}
    | {b"VP8X", b"VP8 ", b"VP8L"}
)
SIZES = {b"\xe0": 14, b"\xee": 12, b"VP8X": 10, b"IEND": 0}  # bytes: JFIF without a thumbnail, Adobe's colours
EXIF = frozenset({b"\xe1", b"eXIf", b"EXIF"})


def picture_format(data: bytes) -> str | None:
    """`jpeg`, `png` or `webp` by the first bytes, None for anything else."""
    return "webp" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else schemas.picture_format(data)


def decode(data: bytes) -> Pixels:
    """Decode to (H, W, 3) RGB, upright."""
    with Image.open(io.BytesIO(data)) as picture:
        return np.asarray(ImageOps.exif_transpose(picture).convert("RGB"))


def thumbnail(data: bytes) -> Grey:
    """Shrink to grey levels of one size, upright, for `nearest`."""
    with Image.open(io.BytesIO(data)) as picture:
        return np.asarray(ImageOps.exif_transpose(picture).convert("L").resize(THUMBNAIL, Image.Resampling.BOX))


def nearest(wanted: Grey, candidates: Grey) -> int:
    """Index of the candidate that looks most alike; masks do not disturb it while they cover less than half.

    The lower part of the differences is compared: pixels under a mask are among the others. Of many candidates only
    those are looked at in full that are most alike in every eighth pixel of every sixth row.
    """
    likely = np.arange(len(candidates))
    if len(candidates) > LIKELY:
        likely = np.argsort(_difference(wanted[::6, ::8], candidates[:, ::6, ::8]), kind="stable")[:LIKELY]
        likely.sort()
    return int(likely[np.argmin(_difference(wanted, candidates[likely]))])


@dataclass(slots=True)
class Shown:
    """The sent pictures of a topic that can be decoded, as thumbnails; others can only arrive by mistake.

    Those that look the same have one digest.
    """

    _grey: bytearray = field(default_factory=bytearray)
    _same: dict[bytes, list[int]] = field(default_factory=dict)

    def add(self, index: int, picture: bytes) -> None:
        """Keep how a picture looks."""
        with contextlib.suppress(*UNREADABLE):
            small = thumbnail(picture).tobytes()
            self._grey += small
            self._same.setdefault(hashlib.sha256(small).digest(), []).append(index)

    def like(self, picture: bytes) -> list[int]:
        """The index of the picture that looks most like this one, and of those that look the same as that."""
        if not self._same:
            return []
        thumbnails = np.frombuffer(self._grey, np.uint8).reshape(-1, *THUMBNAIL[::-1])
        best = thumbnails[nearest(thumbnail(picture), thumbnails)]
        return self._same[hashlib.sha256(best.tobytes()).digest()]


def _difference(wanted: Grey, candidates: Grey) -> NDArray[np.float64]:
    apart = np.abs(candidates - wanted.astype(np.int16)).reshape(len(candidates), -1)
    return np.asarray(np.quantile(apart, 0.4, axis=1) + apart.mean(axis=1) / 100, np.float64)


def constant_share(pixels: Pixels, box: Box) -> float:
    """The share of a half-open box that shows one single colour."""
    x1, y1, x2, y2 = box
    inside = pixels[y1:y2, x1:x2].reshape(-1, 3).astype(np.int16)
    if not len(inside):
        return 0.0
    coarse = (inside // (2 * SAME)) @ np.array([1024, 32, 1])
    values, counts = np.unique(coarse, return_counts=True)
    colour = np.median(inside[coarse == values[np.argmax(counts)]], axis=0)
    return float((np.abs(inside - colour).max(axis=1) <= SAME).mean())


def covered(original: Pixels, delivered: Pixels, box: Box) -> bool | None:
    """Whether an object was masked; None where the original shows so little there that it cannot be told."""
    if constant_share(original, box) >= COVERED_SHARE:
        return None
    return constant_share(delivered, box) >= COVERED_SHARE


def hides_nothing(data: bytes) -> bool:
    """Whether a JPEG, PNG or WebP holds nothing but its one opaque picture and at most its orientation.

    No other metadata, no alpha channel, no byte behind the picture's end. Raises what Pillow raises.
    """
    with Image.open(io.BytesIO(data)) as picture:
        if picture.mode not in OPAQUE_MODES:
            return False
    parts, rest = {"jpeg": _segments, "png": _chunks, "webp": _riff}[picture_format(data) or ""](data)
    return not rest and all(_is_needed(kind, body) for kind, body in parts)


def _is_needed(kind: bytes, body: bytes) -> bool:
    if kind in EXIF:
        return _is_orientation(body.removeprefix(b"Exif\x00\x00"))
    return len(body) == SIZES.get(kind, len(body)) and kind in NEEDED


def _is_orientation(tiff: bytes) -> bool:
    """Whether a TIFF block is as long as one entry makes it, and that entry is the orientation."""
    order = {b"MM": ">", b"II": "<"}.get(tiff[:2])
    if order is None or len(tiff) != 26:
        return False
    return struct.unpack(order + "HIHHHI", tiff[2:18]) == (42, 8, 1, 0x0112, 3, 1)


def _segments(data: bytes) -> tuple[list[Part], bytes]:
    """The segments of a JPEG by their markers, and what is no segment or stands behind the end (ITU-T T.81, B.1.1)."""
    parts: list[Part] = []
    at = 2
    while (found := _MARKER.match(data, at)) and found[1] != _EOI:
        body, end = found.end() + 2, found.end() + int.from_bytes(data[found.end() : found.end() + 2], "big")
        parts.append((found[1], data[body:end]))
        behind = _MARKER.search(data, end) if found[1] == _SOS else None
        at = behind.start() if behind else end
    return parts, data[found.end() if found else at :]


def _chunks(data: bytes) -> tuple[list[Part], bytes]:
    """The chunks of a PNG by their types, and what stands behind the last one (W3C PNG, clause 5)."""
    parts: list[Part] = []
    at, kind = 8, b""
    while kind != b"IEND" and at < len(data):
        kind, length = data[at + 4 : at + 8], int.from_bytes(data[at : at + 4], "big")
        parts.append((kind, data[at + 8 : at + 8 + length]))
        at += 12 + length
    return parts, data[at:]


def _riff(data: bytes) -> tuple[list[Part], bytes]:
    """The chunks of a WebP by their FourCC, and what stands behind the RIFF (RFC 9649, section 2.3)."""
    parts: list[Part] = []
    at, end = 12, 8 + int.from_bytes(data[4:8], "little")
    while at < end:
        length = int.from_bytes(data[at + 4 : at + 8], "little")
        parts.append((data[at : at + 4], data[at + 8 : at + 8 + length]))
        at += 8 + length + length % 2
    return parts, data[end:]
