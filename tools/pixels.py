"""Looking at delivered pictures without the agent's code: which picture it is, and what in it is covered."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]
Box = tuple[int, int, int, int]

THUMBNAIL = (96, 54)  # pixels; enough to tell crops of one photograph apart
LIKELY = 48  # candidates that are compared in full
SAME = 4  # of 255: JPEG leaves the inside of a constant area within this of its colour; night sky is noisier
COVERED_SHARE = 0.5  # GB/T 44464-2024, B.5.3: masked area / box area from which an object counts as anonymised


def decode(data: bytes) -> Pixels:
    """Decode to (H, W, 3) RGB."""
    with Image.open(io.BytesIO(data)) as picture:
        return np.asarray(picture.convert("RGB"))


def thumbnail(data: bytes) -> NDArray[np.int16]:
    """Shrink to grey levels of one size, for `nearest`."""
    with Image.open(io.BytesIO(data)) as picture:
        small = picture.convert("L").resize(THUMBNAIL, Image.Resampling.BOX)
    return np.asarray(small).astype(np.int16)


def nearest(wanted: NDArray[np.int16], candidates: NDArray[np.int16]) -> int:
    """Index of the candidate that looks most alike; masks do not disturb it while they cover less than half.

    The lower part of the differences is compared: pixels under a mask are among the others. Of many candidates only
    those are looked at in full that are most alike in every eighth pixel of every sixth row.
    """
    likely = np.arange(len(candidates))
    if len(candidates) > LIKELY:
        likely = np.argsort(_difference(wanted[::6, ::8], candidates[:, ::6, ::8]), kind="stable")[:LIKELY]
        likely.sort()
    return int(likely[np.argmin(_difference(wanted, candidates[likely]))])


def _difference(wanted: NDArray[np.int16], candidates: NDArray[np.int16]) -> NDArray[np.float64]:
    apart = np.abs(candidates - wanted).reshape(len(candidates), -1)
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
    """Whether a JPEG holds nothing but its one picture: no EXIF or comment, no byte behind its end marker.

    Behind the first start of scan, the end marker FF D9 cannot occur before the end (ITU-T T.81, B.1.1.5).
    """
    with Image.open(io.BytesIO(data)) as picture:
        extra = {"exif", "comment", "xmp", "photoshop", "mp", "icc_profile"} & picture.info.keys()
    return not extra and data.find(b"\xff\xd9", data.index(b"\xff\xda")) == len(data) - 2
