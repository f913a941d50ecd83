"""Where a picture is masked and with what. Boxes are half-open: [x1, x2) x [y1, y2).

Invariants: every pixel inside an area is masked, to the last row and column, and none outside is touched. Where the
source was coded in blocks, an area covers whole blocks: quantisation smears what is inside a block over all of it, and
a plate under a tight mask can be read from the rest of its blocks (tests/test_attack.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from agent.errors import RefusedError
from agent.messages import Box
from agent.pictures.formats import Fill, Margin

Pixels = NDArray[np.uint8]

BLACK: Final[Mapping[str, int | tuple[int, ...]]] = MappingProxyType({"L": 0, "RGB": (0, 0, 0), "YCbCr": (0, 128, 128)})
# Shares of a person's box. Measured on 5,175 labelled heads under machine-found people, with the default margins: at
# least nine tenths of the head lie within in 90 % (standing, street), 94 % (crowds) and 98 % (riders) of them.
HEAD_OF_HEIGHT = 0.3  # of its height at least: a standing adult's head is 1/8 to 1/7, and it is not always upright
HEAD_OF_WIDTH = 0.9  # of its width at least, so that a box that ends at the waist still has its whole head covered
MOSAIC_CELLS = 4  # cells along the longer side of a box
BLUR_PART = 6  # the blur's radius is this part of the box's longer side
BLUR_PASSES = 3  # three box filters come close to a Gaussian


class Area(NamedTuple):
    """Whole pixels, half-open."""

    x1: int
    y1: int
    x2: int
    y2: int


def head_part(box: Box) -> Box:
    """Return the upper part of a person's box, in its full width: the head leans to either side.

    Its height is the larger of two shares, so that a crouching, seated or cut-off person is covered as well.
    """
    height = max(HEAD_OF_HEIGHT * (box.y2 - box.y1), HEAD_OF_WIDTH * (box.x2 - box.x1))
    return replace(box, y2=min(box.y2, box.y1 + height))


def areas(boxes: Iterable[Box], width: int, height: int, margins: Mapping[str, Margin]) -> list[Area]:
    """Grow each box by its label's margin, round outwards, clip to the frame; boxes without a pixel are left out.

    RefusedError where a number is not finite or a box is turned inside out: such a detector cannot be trusted.
    """
    found = (_area(box, width, height, margins.get(box.label, Margin())) for box in boxes)
    return [area for area in found if area.x1 < area.x2 and area.y1 < area.y2]


def _area(box: Box, width: int, height: int, margin: Margin) -> Area:
    if not all(map(math.isfinite, (box.x1, box.y1, box.x2, box.y2, box.score))) or box.x1 > box.x2 or box.y1 > box.y2:
        raise RefusedError("redaction.box", "not a box")
    across = margin.part * (box.x2 - box.x1) + margin.pixels
    down = margin.part * (box.y2 - box.y1) + margin.pixels
    x1, y1, x2, y2 = box.x1 - across, box.y1 - down, box.x2 + across, box.y2 + down
    if x1 >= x2 or y1 >= y2:
        return Area(0, 0, 0, 0)
    return Area(max(0, math.floor(x1)), max(0, math.floor(y1)), min(width, math.ceil(x2)), min(height, math.ceil(y2)))


def upright(pixels: Pixels, orientation: int) -> Pixels:
    """Return the view in which a stored picture (H, W[, C]) of EXIF orientation 1-8 stands upright.

    It is a view: it costs nothing.
    """
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in {2, 3, 6, 7}:
        pixels = pixels[:, ::-1]
    if orientation in {3, 4, 7, 8}:
        pixels = pixels[::-1]
    return pixels


def stored(area: Area, orientation: int, width: int, height: int) -> Area:
    """Map an area of the upright picture (width x height) to the stored one: the inverse of `upright`."""
    x1, y1, x2, y2 = area
    if orientation in {3, 4, 7, 8}:
        y1, y2 = height - y2, height - y1
    if orientation in {2, 3, 6, 7}:
        x1, x2 = width - x2, width - x1
    return Area(y1, x1, y2, x2) if orientation >= 5 else Area(x1, y1, x2, y2)


def whole_blocks(area: Area, block: tuple[int, int], bleed: int, width: int, height: int) -> Area:
    """Grow an area of the stored picture to whole coding blocks, and by what a decoder mixes across their edges."""
    across, down = block
    return Area(
        max(0, area.x1 // across * across - bleed),
        max(0, area.y1 // down * down - bleed),
        min(width, -(-area.x2 // across) * across + bleed),
        min(height, -(-area.y2 // down) * down + bleed),
    )


def paint(image: Image.Image, where: Iterable[Area], fill: Fill) -> None:
    """Mask the areas of a picture of one of BLACK's modes, in place: the others are not touched, nor copied."""
    for area in where:
        if fill is Fill.CONSTANT:
            image.paste(BLACK[image.mode], area)
            continue
        part = np.asarray(image.crop(area))
        weaker = _mosaic(part) if fill is Fill.WEAKER_MOSAIC else _blur(part)
        image.paste(Image.fromarray(weaker, image.mode), area)


def _mosaic(part: Pixels) -> Pixels:
    cell = max(1, math.ceil(max(part.shape[:2]) / MOSAIC_CELLS))
    result = part.copy()
    for y in range(0, part.shape[0], cell):
        for x in range(0, part.shape[1], cell):
            block = part[y : y + cell, x : x + cell]
            result[y : y + cell, x : x + cell] = block.mean(axis=(0, 1)).round().astype(np.uint8)
    return result


def _blur(part: Pixels) -> Pixels:
    radius = max(1, max(part.shape[:2]) // BLUR_PART)
    smooth = part.astype(np.float64)
    for _ in range(BLUR_PASSES):
        for axis in (0, 1):
            smooth = _box_filter(smooth, radius, axis)
    return smooth.round().clip(0, 255).astype(np.uint8)


def _box_filter(values: NDArray[np.float64], radius: int, axis: int) -> NDArray[np.float64]:
    """Return the mean over 2 * radius + 1 neighbours along an axis; the border repeats."""
    edges = [(radius + 1, radius) if i == axis else (0, 0) for i in range(values.ndim)]
    sums = np.pad(values, edges, mode="edge").cumsum(axis=axis)
    size = values.shape[axis]
    window = 2 * radius + 1
    ahead, behind = np.arange(window, window + size), np.arange(size)
    mean: NDArray[np.float64] = (np.take(sums, ahead, axis) - np.take(sums, behind, axis)) / window
    return mean
