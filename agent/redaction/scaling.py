"""A picture made smaller for the detector.

One case has arithmetic of its own, for it is the common one and Pillow takes four times as long: two samples of every
three in both directions, as 1920x1080 is seen at 1280x720. Each is the mean over its area of one and a half samples:
two thirds of the nearest sample, one third of the middle one of the three. The detector finds as much as with a
bilinear filter (models/README.md, "Measured").
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from agent.redaction.masking import Pixels

NEAREST, MIDDLE = 171, 85  # the thirds in 256ths: of 255 each, with HALF, they stay within 16 bits
HALF = 128  # rounds


def shrunk(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The picture in another size (width, height)."""
    if image.mode == "L" and (2 * image.width, 2 * image.height) == (3 * size[0], 3 * size[1]):
        return Image.fromarray(_two_of_three(np.asarray(image)))
    return image.resize(size, Image.Resampling.BILINEAR)


def _two_of_three(samples: Pixels) -> Pixels:
    """Shrink (3 h, 3 w) samples to (2 h, 2 w). Rows first, which lie in memory as they are read."""
    height, width = samples.shape[0] // 3, samples.shape[1] // 3
    upper, lower = _sums(*samples.reshape(height, 3, 3 * width).swapaxes(0, 1))
    rows = np.empty((height, 2, 3 * width), np.uint8)
    np.right_shift(upper, 8, out=rows[:, 0], casting="unsafe")
    np.right_shift(lower, 8, out=rows[:, 1], casting="unsafe")
    left, right = _sums(*rows.reshape(2 * height, width, 3).transpose(2, 0, 1))
    left >>= 8
    right &= 0xFF00
    right |= left  # both bytes of a pair at once
    return right.astype("<u2", copy=False).view(np.uint8)


def _sums(first: Pixels, middle: Pixels, last: Pixels) -> tuple[NDArray[np.uint16], NDArray[np.uint16]]:
    """256 times the two samples that are made of each three."""
    shared = np.multiply(middle, MIDDLE, dtype=np.uint16)
    shared += HALF
    one = np.multiply(first, NEAREST, dtype=np.uint16)
    one += shared
    two = np.multiply(last, NEAREST, dtype=np.uint16)
    two += shared
    return one, two
