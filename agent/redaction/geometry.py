"""Box arithmetic of detection: letterbox, decoding of network cells, overlap, suppression. Pure arrays, no pictures.

Boxes are float rows (x1, y1, x2, y2), half-open, in pixels of the picture that the function speaks of.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

FAR_TOP, FAR_BOTTOM = 0.3, 0.8  # shares of a picture's height between which a level camera sees far plates
SHARED = 128  # pixels that neighbouring windows share, more than a far plate is wide
BLOCK = 64  # boxes whose overlaps are worked out at once
GRIDS = 4  # input sizes whose cells are kept: a car has few cameras, and a grid of 1280x736 takes 0.2 MB
LARGEST_LOGARITHM = 5.0  # of a distance in strides: a box side lies at most 148 strides from its cell


@dataclass(frozen=True, slots=True, kw_only=True)
class Letterbox:
    """A picture scaled to (content_width, content_height) in the top left corner of a (width, height) input."""

    width: int
    height: int
    content_width: int
    content_height: int
    picture_width: int
    picture_height: int

    def to_picture(self, boxes: Floats) -> Floats:
        """Boxes (n, 4) of the input as boxes of the picture, clipped to it."""
        across = self.picture_width / self.content_width
        down = self.picture_height / self.content_height
        scaled = boxes.astype(np.float64) * np.array([across, down, across, down])
        limits = [self.picture_width, self.picture_height, self.picture_width, self.picture_height]
        return np.asarray(np.clip(scaled, 0, limits), np.float32)

    def to_input(self, boxes: Floats) -> Floats:
        """Boxes (n, 4) of the picture as boxes of the input."""
        across = self.content_width / self.picture_width
        down = self.content_height / self.picture_height
        return np.asarray(boxes.astype(np.float64) * np.array([across, down, across, down]), np.float32)


def letterbox(width: int, height: int, *, long_side: int, upscale: float = 1.0, multiple: int = 32) -> Letterbox:
    """The smallest input, in whole multiples, for a (width, height) picture.

    The picture is scaled so that its longer side is `long_side`, but enlarged at most `upscale` times.
    """
    if min(width, height) < 1:
        message = f"a picture of {width}x{height} pixels has no area"
        raise ValueError(message)
    scale = min(long_side / max(width, height), upscale)
    content_width, content_height = max(1, round(width * scale)), max(1, round(height * scale))
    return Letterbox(
        width=math.ceil(content_width / multiple) * multiple,
        height=math.ceil(content_height / multiple) * multiple,
        content_width=content_width,
        content_height=content_height,
        picture_width=width,
        picture_height=height,
    )


def fixed_letterbox(width: int, height: int, *, input_width: int, input_height: int) -> Letterbox:
    """A (width, height) picture in an input of fixed size, as large as it fits."""
    if min(width, height) < 1:
        message = f"a picture of {width}x{height} pixels has no area"
        raise ValueError(message)
    scale = min(input_width / width, input_height / height)
    return Letterbox(
        width=input_width,
        height=input_height,
        content_width=min(input_width, max(1, round(width * scale))),
        content_height=min(input_height, max(1, round(height * scale))),
        picture_width=width,
        picture_height=height,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """Whole pixels of a picture, half-open."""

    x1: int
    y1: int
    x2: int
    y2: int


def far_windows(width: int, height: int, long_side: int) -> list[Window]:
    """Windows, at most `long_side` wide, over the band of a (width, height) picture where far plates are.

    None where the picture's longer side is within `long_side`: it is seen in full resolution anyway.
    """
    if max(width, height) <= long_side:
        return []
    side = min(long_side, width)
    count = 1 if width <= side else math.ceil((width - SHARED) / max(side - SHARED, 1))
    wide = min(side, math.ceil((width + (count - 1) * SHARED) / count))
    top, bottom = math.floor(height * FAR_TOP), math.ceil(height * FAR_BOTTOM)
    starts = [round(index * (width - wide) / max(count - 1, 1)) for index in range(count)]
    return [Window(x1=start, y1=top, x2=start + wide, y2=bottom) for start in starts]


def cell_count(width: int, height: int, strides: Sequence[int]) -> int:
    """Cells of all strides over a (width, height) input."""
    return sum((width // stride) * (height // stride) for stride in strides)


@functools.lru_cache(maxsize=GRIDS)
def cell_grid(width: int, height: int, strides: tuple[int, ...]) -> tuple[Floats, Floats]:
    """Centres (n, 2) and strides (n,) of all cells, read-only: by stride as given, then row by row."""
    centres, sizes = [], []
    for stride in strides:
        rows, columns = height // stride, width // stride
        y, x = np.mgrid[0:rows, 0:columns]
        centres.append((np.stack([x, y], axis=-1).reshape(-1, 2) + 0.5) * stride)
        sizes.append(np.full(rows * columns, stride))
    grid = np.concatenate(centres).astype(np.float32), np.concatenate(sizes).astype(np.float32)
    for part in grid:
        part.flags.writeable = False
    return grid


def boxes_from_distances(logarithms: Floats, centres: Floats, strides: Floats) -> Floats:
    """Boxes from logarithms (n, 4) of the distances, in strides, to the left, top, right and bottom side."""
    distances = np.exp(np.clip(logarithms, -LARGEST_LOGARITHM, LARGEST_LOGARITHM)) * strides[:, None]
    return np.concatenate([centres - distances[:, :2], centres + distances[:, 2:]], axis=1)


def boxes_from_centres(rows: Floats) -> Floats:
    """Boxes from (n, 4) centre x, centre y, width, height."""
    half = rows[:, 2:] / 2
    return np.concatenate([rows[:, :2] - half, rows[:, :2] + half], axis=1)


def areas(boxes: Floats) -> Floats:
    """Area of each box; nothing is negative."""
    return np.asarray(np.maximum(boxes[:, 2] - boxes[:, 0], 0) * np.maximum(boxes[:, 3] - boxes[:, 1], 0))


def intersections(first: Floats, second: Floats) -> Floats:
    """Shared area of every pair: (n, 4) and (m, 4) -> (n, m)."""
    x1, y1, x2, y2 = first.T[..., None]
    left, top, right, bottom = np.ascontiguousarray(second.T)
    across = np.minimum(x2, right) - np.maximum(x1, left)
    down = np.minimum(y2, bottom) - np.maximum(y1, top)
    return np.asarray(np.maximum(across, 0) * np.maximum(down, 0))


def overlaps(first: Floats, second: Floats) -> Floats:
    """Intersection over union of every pair: (n, 4) and (m, 4) -> (n, m)."""
    shared = intersections(first, second)
    union = areas(first)[:, None] + areas(second)[None] - shared
    return np.asarray(shared / np.maximum(union, 1e-9), np.float32)


def suppress(boxes: Floats, scores: Floats, limit: float, block: int = BLOCK) -> NDArray[np.int64]:
    """Indices of the boxes that remain, best first: a box falls to a better one that it overlaps by more than `limit`.

    Equal scores are taken in the order given, so that the result is always the same.
    """
    order = np.argsort(-scores, kind="stable")
    remaining = [order[:0]]
    while len(order):
        first, rest = order[:block], order[block:]
        apart = overlaps(boxes[first], boxes[first]) <= limit
        kept = np.ones(len(first), bool)
        for index in range(len(first)):
            if kept[index]:
                kept[index + 1 :] &= apart[index, index + 1 :]
        remaining.append(first[kept])
        order = rest[(overlaps(boxes[first[kept]], boxes[rest]) <= limit).all(axis=0)]
    return np.concatenate(remaining)
