"""One recognisable secret, the picture that shows it, and the search that would find it again.

Every picture shows the secret mark: a grid of black and white cells on a grey ground, which `find_mark` detects, so a
clean redaction masks it. A vector of the corpus hides the mark, or a line of text, in one further place.
"""

import binascii
import contextlib
import io
import re
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

from agent.messages import Box
from agent.pictures.formats import Colour

WIDTH, HEIGHT = 192, 144
MARK = (64, 40, 128, 104)  # x1, y1, x2, y2
CELLS = np.random.default_rng(20).integers(0, 2, (8, 8)).astype(bool)
TEXT = b"CANARY-5d1f0c92-Fahrer-Anna-Beispiel"
LEAK_CORRELATION = 0.35


@dataclass(frozen=True, kw_only=True)
class Vector:
    """`needles`: bytes of which none may be found. `fate`: what must become of it; both are a pass where not given."""

    name: str
    payload: bytes
    needles: tuple[bytes, ...] = ()
    fate: str = "redacted"
    picture: bool = True


def scene(mark: bool = True) -> np.ndarray:
    """The picture as RGB: a grey ground with a soft gradient, and the mark."""
    ramp = 118 + np.add.outer(np.arange(HEIGHT), np.arange(WIDTH)) * 20 // (WIDTH + HEIGHT)
    pixels = np.repeat(ramp[..., None], 3, axis=2).astype(np.uint8)
    if mark:
        x1, y1, x2, y2 = MARK
        pixels[y1:y2, x1:x2] = np.kron(CELLS, np.ones((8, 8)))[..., None] * 255
    return pixels


def find_mark(rgb: np.ndarray, colour: Colour) -> list[Box]:
    """The perfect detector: everything far from the grey ground lies in one box."""
    assert colour is Colour.RGB
    ys, xs = np.nonzero((np.abs(rgb.astype(int) - 128) > 40).any(axis=2))
    if not len(ys):
        return []
    return [Box(label="person", score=1.0, x1=xs.min(), y1=ys.min(), x2=xs.max() + 1, y2=ys.max() + 1)]


def saved(pixels: np.ndarray | Image.Image, kind: str, **options: object) -> bytes:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def shows_mark(channel: np.ndarray) -> bool:
    """Whether one channel of a picture, brought to the scene's size, correlates with the mark in its place."""
    image = Image.fromarray(channel.astype(np.float32)).resize((WIDTH, HEIGHT), Image.Resampling.BOX)
    x1, y1, x2, y2 = MARK
    cells = np.asarray(image)[y1:y2, x1:x2].reshape(8, 8, 8, 8).mean(axis=(1, 3))
    if cells.std() < 0.5:
        return False
    return bool(abs(np.corrcoef(cells.ravel(), CELLS.ravel())[0, 1]) > LEAK_CORRELATION)


def readings(data: bytes) -> list[bytes]:
    """The bytes as they are and as every reading of base64, hex, escapes, lists and compression gives them."""
    views = [data, data.replace(b"\xcc", b"")]
    joined = (
        re.sub(rb"\\u00(..)", lambda m: bytes.fromhex(m[1].decode()), data).replace(b"\\n", b"").replace(b"\n", b"")
    )
    runs = re.findall(rb"[A-Za-z0-9+/_-]{40,}", joined.replace(b"\\", b"").translate(bytes.maketrans(b"-_", b"+/")))
    views += [binascii.a2b_base64(run[: len(run) // 4 * 4]) for run in runs]
    views += [bytes.fromhex(run.decode()) for run in re.findall(rb"(?:[0-9a-f]{2}\n?){32,}", data)]
    numbered = re.sub(rb'"\d+": ', b"", data).translate(bytes.maketrans(b"{}", b"[]"))
    views += [
        bytes(int(n) & 255 for n in run[1:-1].split(b",") if int(n) < 256)
        for run in re.findall(rb"\[[-\d, ]{64,}\]", numbered)
    ]
    if b"\\u00" in data:
        views.append(data.decode("unicode_escape").encode("latin-1", "replace"))
    for match in re.finditer(rb"x[\x01\x5e\x9c\xda]|\x1f\x8b\x08", data):
        for bits in (15, 31):
            try:
                views.append(zlib.decompressobj(bits).decompress(data[match.start() :], 1 << 20))
            except zlib.error:
                continue
    return views


def visible_marks(data: bytes) -> bool:
    """Whether any frame, channel or 16-bit byte plane of a picture shows the mark."""
    return any(shows_mark(channel) for channel in channels_of(data))


def channels_of(data: bytes) -> Iterator[np.ndarray]:
    """Every channel (H, W) of every frame that can be decoded; damaged pictures as far as they go."""
    with warnings.catch_warnings(), contextlib.suppress(OSError, ValueError, SyntaxError, EOFError):
        warnings.simplefilter("ignore")
        image = Image.open(io.BytesIO(data))
        for frame in range(getattr(image, "n_frames", 1)):
            image.seek(frame)
            image.load()
            pixels = np.asarray(image if image.mode != "P" else image.convert("RGBA"))
            for plane in [pixels & 0xFF, pixels >> 8] if pixels.dtype == np.uint16 else [pixels]:
                channels = plane.reshape(*plane.shape[:2], -1)
                yield from (channels[..., i] for i in range(channels.shape[2]))


def leaks(vector: Vector, published: bytes) -> list[str]:
    """What of the vector's secret can be found in the bytes that left."""
    found = []
    for view in readings(published):
        if any(needle in view for needle in vector.needles):
            found.append("bytes")
        starts = [match.start() for match in re.finditer(rb"\xff\xd8\xff|\x89PNG\r\n|RIFF....WEBP", view, re.DOTALL)]
        if any(visible_marks(view[start:]) for start in starts):
            found.append("picture")
    return sorted(set(found))
