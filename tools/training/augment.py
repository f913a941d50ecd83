"""From labelled pictures to training tiles: scale jitter toward small objects, mosaic, pasted objects.

Everything is a function of its arguments and a numpy generator: the same seed gives the same tile.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image

from tools.training.dataset import CLASSES, Targets

Pixels = NDArray[np.uint8]

SIZES = {"person": (16.0, 560.0), "face": (7.0, 320.0), "plate": (6.0, 260.0)}  # smaller side (person: height), pixels
SCALES = (0.3, 2.2)  # limits of the scale jitter
GREY = 114  # lies outside a picture, as the agent pads it
COVER = 0.8  # a picture scaled by this times the mean relation of the sides is the smallest that a cell shows
WHOLE, WHOLES = 0.35, (0.85, 1.5)  # chance that a picture is shown as a whole, and its scale against filling the cell
FIT = {"person": 1.2, "face": 0.95, "plate": 0.95}  # largest share of a cell's side that the wanted object takes
SEEN = 0.3  # visible share of an object below which its rest teaches nothing
LEAST = {"person": 10.0, "face": 5.0, "plate": 4.0}  # smaller side (person: height) below which a box teaches nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """A picture (H, W, 3) RGB with its targets in its own pixels."""

    pixels: Pixels
    targets: Targets


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """Which part of a picture is shown where: source corner (x, y) in pixels, scales, and the size shown."""

    x: float
    y: float
    scale_x: float
    scale_y: float
    width: int
    height: int


def object_size(box: NDArray[np.float32], label: str) -> float:
    """The measure by which an object's size is told: height of a person, smaller side of anything else."""
    width, height = float(box[2] - box[0]), float(box[3] - box[1])
    return height if label == "person" else min(width, height)


def choose_window(tile: Tile, width: int, height: int, rng: Generator) -> Window:
    """A window that shows either the whole picture, or a random object at a random size, log-uniform, inside."""
    usable = np.flatnonzero(~tile.targets.ignored)
    high, wide = tile.pixels.shape[:2]
    if not len(usable) or rng.random() < WHOLE:
        scale = _log_uniform(*WHOLES, rng) * min(width / wide, height / high)
        return _window((0.0, 0.0, float(wide), float(high)), tile, (width, height), scale, rng)
    chosen = int(rng.choice(usable))
    box, label = tile.targets.boxes[chosen], CLASSES[int(tile.targets.classes[chosen])]
    smallest = max(SCALES[0], min(COVER * math.sqrt(width / wide * height / high), SCALES[1]))
    fit = FIT[label] * min(width / max(box[2] - box[0], 1), height / max(box[3] - box[1], 1))
    wanted = _log_uniform(*SIZES[label], rng) / max(object_size(box, label), 1.0)
    scale = float(np.clip(min(wanted, fit), smallest, SCALES[1]))
    x1, y1, x2, y2 = (float(value) for value in box)
    return _window((x1, y1, x2, y2), tile, (width, height), scale, rng)


def _log_uniform(low: float, high: float, rng: Generator) -> float:
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def _window(
    box: tuple[float, float, float, float],
    tile: Tile,
    size: tuple[int, int],
    scale: float,
    rng: Generator,
) -> Window:
    """A window of `size` (width, height) that holds a box at about a scale."""
    high, wide = tile.pixels.shape[:2]
    stretch = float(np.exp(rng.normal(0, 0.08)))
    scale_x, scale_y = scale * stretch, scale / stretch
    x = _place(box[0], box[2], size[0] / scale_x, wide, rng)
    y = _place(box[1], box[3], size[1] / scale_y, high, rng)
    return Window(x=x, y=y, scale_x=scale_x, scale_y=scale_y, width=size[0], height=size[1])


def _place(low: float, high: float, span: float, limit: int, rng: Generator) -> float:
    """Start of a window of `span` that holds [low, high) where it can, inside 0..limit where it can."""
    first, last = high - span, low
    if first > last:
        first, last = last, first
    start = float(rng.uniform(first, last))
    if span <= limit:
        return min(max(start, 0.0), limit - span)
    return min(max(start, limit - span), 0.0)


def show(tile: Tile, window: Window, fill: Pixels) -> Tile:
    """What a window shows; outside the picture lies the colour `fill` (3,)."""
    high, wide = tile.pixels.shape[:2]
    canvas = np.empty((window.height, window.width, 3), np.uint8)
    canvas[:] = fill
    left, top = max(0, round(-window.x * window.scale_x)), max(0, round(-window.y * window.scale_y))
    right = min(window.width, round((wide - window.x) * window.scale_x))
    bottom = min(window.height, round((high - window.y) * window.scale_y))
    if right > left and bottom > top:
        area = (
            max(0.0, window.x + left / window.scale_x),
            max(0.0, window.y + top / window.scale_y),
            min(float(wide), window.x + right / window.scale_x),
            min(float(high), window.y + bottom / window.scale_y),
        )
        part = Image.fromarray(tile.pixels).resize((right - left, bottom - top), Image.Resampling.BILINEAR, area)
        canvas[top:bottom, left:right] = np.asarray(part)
    return Tile(pixels=canvas, targets=_seen(tile.targets, window))


def _seen(targets: Targets, window: Window) -> Targets:
    """Targets in a window's pixels: cut at its edge, dropped outside, ignored where too little or too small is left."""
    scales = np.array([window.scale_x, window.scale_y] * 2, np.float32)
    moved = (targets.boxes - np.array([window.x, window.y] * 2, np.float32)) * scales
    limits = np.array([window.width, window.height] * 2, np.float32)
    cut = np.clip(moved, 0, limits)
    areas = (moved[:, 2] - moved[:, 0]) * (moved[:, 3] - moved[:, 1])
    shares = (cut[:, 2] - cut[:, 0]) * (cut[:, 3] - cut[:, 1]) / np.maximum(areas, 1e-6)
    kept = (cut[:, 2] - cut[:, 0] > 1) & (cut[:, 3] - cut[:, 1] > 1)
    ignored = targets.ignored | (shares < SEEN) | _too_small(cut, targets.classes)
    return Targets(boxes=cut[kept], classes=targets.classes[kept], ignored=ignored[kept])


def _too_small(boxes: NDArray[np.float32], classes: NDArray[np.int64]) -> NDArray[np.bool_]:
    widths, heights = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    least = np.array([LEAST[label] for label in CLASSES], np.float32)[classes]
    person = classes == CLASSES.index("person")
    return np.asarray(np.where(person, heights, np.minimum(widths, heights)) < least)


def mosaic(tiles: list[Tile], size: int, rng: Generator) -> Tile:
    """1, 4 or 9 tiles on a grid with moved lines."""
    count = math.isqrt(len(tiles))
    across, down = _lines(count, size, rng), _lines(count, size, rng)
    canvas = np.empty((size, size, 3), np.uint8)
    parts = []
    for index, tile in enumerate(tiles):
        x, y = across[index % count], down[index // count]
        width, height = across[index % count + 1] - x, down[index // count + 1] - y
        shown = show(tile, choose_window(tile, width, height, rng), _fill(rng))
        canvas[y : y + height, x : x + width] = shown.pixels
        offset = np.array([x, y, x, y], np.float32)
        parts.append(replace(shown.targets, boxes=shown.targets.boxes + offset))
    return Tile(pixels=canvas, targets=Targets.joined(parts))


def _lines(count: int, size: int, rng: Generator) -> list[int]:
    """Where the cells of a grid begin and end along one side."""
    inner = [round(size * (index + rng.uniform(-0.22, 0.22)) / count) for index in range(1, count)]
    return [0, *inner, size]


def _fill(rng: Generator) -> Pixels:
    return rng.integers(0, 256, 3).astype(np.uint8) if rng.random() < 0.5 else np.full(3, GREY, np.uint8)


def flipped(tile: Tile) -> Tile:
    """Left and right exchanged."""
    boxes = tile.targets.boxes.copy()
    boxes[:, [0, 2]] = tile.pixels.shape[1] - boxes[:, [2, 0]]
    return Tile(pixels=tile.pixels[:, ::-1], targets=replace(tile.targets, boxes=boxes))


def rolled(tile: Tile, degrees: float) -> Tile:
    """The tile turned about its centre, as a camera that is not level sees it; corners without a picture are grey.

    A box becomes the smallest upright one around its turned corners; what is mostly turned out of the tile is ignored.
    """
    high, wide = tile.pixels.shape[:2]
    turned = Image.fromarray(tile.pixels).rotate(degrees, Image.Resampling.BILINEAR, fillcolor=(GREY, GREY, GREY))
    centre = np.array([wide / 2, high / 2], np.float32)
    angle = math.radians(degrees)
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]], np.float32)
    corners = (tile.targets.boxes[:, [[0, 1], [2, 1], [2, 3], [0, 3]]] - centre) @ turn + centre
    boxes = np.concatenate([corners.min(1), corners.max(1)], 1)
    whole = Window(x=0.0, y=0.0, scale_x=1.0, scale_y=1.0, width=wide, height=high)
    return Tile(pixels=np.asarray(turned), targets=_seen(replace(tile.targets, boxes=boxes), whole))


def pasted(tile: Tile, patch: Pixels, mask: NDArray[np.uint8], label: str, corner: tuple[int, int]) -> Tile:
    """A patch laid over the tile with `mask` (0..255) as its opacity: a new target; what it hides is ignored."""
    x, y = corner
    height, width = patch.shape[:2]
    pixels = tile.pixels.copy()
    under = pixels[y : y + height, x : x + width].astype(np.uint16)
    opacity = mask[..., None].astype(np.uint16)
    pixels[y : y + height, x : x + width] = ((patch * opacity + under * (255 - opacity)) // 255).astype(np.uint8)
    rows, columns = np.flatnonzero(mask.max(1) > 127), np.flatnonzero(mask.max(0) > 127)
    if not len(rows) or not len(columns):
        return tile
    box = np.array([x + columns[0], y + rows[0], x + columns[-1] + 1, y + rows[-1] + 1], np.float32)
    old = tile.targets
    hidden = _share_inside(old.boxes, box) > 0.5
    small = _too_small(box[None], np.array([CLASSES.index(label)]))
    new = Targets(boxes=box[None], classes=np.array([CLASSES.index(label)]), ignored=small)
    large = (old.boxes[:, 2] - old.boxes[:, 0]) > 4 * width  # an ignore box over the whole picture stays as it is
    return Tile(
        pixels=pixels,
        targets=Targets.joined([replace(old, ignored=old.ignored | (hidden & ~large)), new]),
    )


def _share_inside(boxes: NDArray[np.float32], cover: NDArray[np.float32]) -> NDArray[np.float32]:
    width = np.minimum(boxes[:, 2], cover[2]) - np.maximum(boxes[:, 0], cover[0])
    height = np.minimum(boxes[:, 3], cover[3]) - np.maximum(boxes[:, 1], cover[1])
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    return np.asarray(np.maximum(width, 0) * np.maximum(height, 0) / np.maximum(areas, 1e-6), np.float32)


def paste_from(tile: Tile, donor: Tile, rng: Generator) -> Tile:
    """Copy one object of `donor`, with soft edges, to a random place of `tile` at a random size."""
    usable = np.flatnonzero(~donor.targets.ignored)
    if not len(usable):
        return tile
    chosen = int(rng.choice(usable))
    label = CLASSES[int(donor.targets.classes[chosen])]
    x1, y1, x2, y2 = (round(float(value)) for value in donor.targets.boxes[chosen])
    cut = donor.pixels[max(y1, 0) : y2, max(x1, 0) : x2]
    size = object_size(donor.targets.boxes[chosen], label)
    smallest, largest = SIZES[label]
    scale = float(np.clip(np.exp(rng.uniform(np.log(smallest), np.log(largest / 2))) / max(size, 1), 0.1, 1.6))
    width, height = round(cut.shape[1] * scale), round(cut.shape[0] * scale)
    high, wide = tile.pixels.shape[:2]
    if min(width, height) < 4 or width >= wide or height >= high:
        return tile
    patch = np.asarray(Image.fromarray(np.ascontiguousarray(cut)).resize((width, height), Image.Resampling.BILINEAR))
    corner = (int(rng.integers(0, wide - width)), int(rng.integers(0, high - height)))
    return pasted(tile, patch, _soft_mask(width, height), label, corner)


def _soft_mask(width: int, height: int) -> NDArray[np.uint8]:
    """Opaque inside, half transparent on the outermost pixel."""
    mask = np.full((height, width), 255, np.uint8)
    mask[[0, -1]] = 128
    mask[:, [0, -1]] = 128
    return mask
