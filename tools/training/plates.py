"""Synthetic licence plates in the styles of eight regions: drawn flat, then seen in perspective, or on a real car.

The styles follow the published sizes and colours of real plates; letters are the picture library's own font, and
Chinese, Japanese and Korean signs are strokes that only look like them. No real plate is copied.
"""

from __future__ import annotations

import string
from dataclasses import dataclass, replace

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from tools.training.augment import Tile, pasted
from tools.training.dataset import CLASSES

Colour = tuple[int, int, int]
WHITE, BLACK, YELLOW, BLUE, GREEN = (240, 240, 238), (20, 20, 22), (240, 190, 30), (20, 60, 160), (90, 200, 130)
DARK_GREEN, DARK_BLUE = (20, 80, 50), (25, 35, 90)
HEIGHT = 64  # pixels of a flat plate before perspective


@dataclass(frozen=True, slots=True, kw_only=True)
class Style:
    """A plate's look: width over height, colours, the pattern (A letter, 9 digit, # sign, space, dot), side bands."""

    name: str
    aspect: float
    grounds: tuple[tuple[Colour, Colour], ...]
    patterns: tuple[str, ...]
    left_band: Colour | None = None
    right_band: Colour | None = None


STYLES = (
    Style(name="cn", aspect=440 / 140, grounds=((BLUE, WHITE), (YELLOW, BLACK)), patterns=("#A.99A99", "#A.A9999")),
    Style(name="cn_new_energy", aspect=480 / 140, grounds=((GREEN, BLACK),), patterns=("#A A99999", "#A 99999A")),
    Style(
        name="eu",
        aspect=520 / 110,
        grounds=((WHITE, BLACK),),
        patterns=("AA 999 AA", "AA-AA 999", "A 999 AAA", "9999 AAA"),
        left_band=BLUE,
    ),
    Style(name="uk_front", aspect=520 / 111, grounds=((WHITE, BLACK),), patterns=("AA99 AAA",), left_band=BLUE),
    Style(name="uk_rear", aspect=520 / 111, grounds=((YELLOW, BLACK),), patterns=("AA99 AAA",)),
    Style(
        name="us",
        aspect=305 / 152,
        grounds=((WHITE, BLUE), (WHITE, (140, 20, 30)), ((200, 215, 240), BLACK), (YELLOW, BLACK)),
        patterns=("9AAA999", "AAA 9999", "AAA-999", "999 AAA"),
    ),
    Style(
        name="jp",
        aspect=330 / 165,
        grounds=((WHITE, DARK_GREEN), (YELLOW, BLACK), (DARK_GREEN, WHITE)),
        patterns=("## 999|# 99-99",),
    ),
    Style(name="kr", aspect=520 / 110, grounds=((WHITE, BLACK),), patterns=("99# 9999", "999# 9999"), left_band=BLUE),
    Style(
        name="kr_older", aspect=335 / 170, grounds=((DARK_GREEN, WHITE), (YELLOW, BLACK)), patterns=("## 99|# 9999",)
    ),
    Style(name="cn_black", aspect=440 / 140, grounds=((BLACK, WHITE),), patterns=("#A.99A99", "#A.9999#")),
    Style(
        name="hk", aspect=520 / 110, grounds=((WHITE, BLACK), (YELLOW, BLACK)), patterns=("AA 9999", "AA 999", "A 9999")
    ),
    Style(
        name="hk_square", aspect=295 / 200, grounds=((WHITE, BLACK), (YELLOW, BLACK)), patterns=("AA|9999", "AA|999")
    ),
    Style(
        name="eu_square", aspect=280 / 200, grounds=((WHITE, BLACK),), patterns=("AA 9|999", "A 99|AAA"), left_band=BLUE
    ),
    Style(
        name="us_dark",
        aspect=305 / 152,
        grounds=((BLACK, YELLOW), (DARK_BLUE, WHITE), (DARK_BLUE, YELLOW), (DARK_GREEN, WHITE)),
        patterns=("9AAA999", "AAA 9999", "999 AAA"),
    ),
    Style(
        name="in",
        aspect=500 / 120,
        grounds=((WHITE, BLACK), (YELLOW, BLACK), (DARK_GREEN, WHITE), (BLACK, YELLOW)),
        patterns=("AA99AA9999", "AA 99 A 9999"),
    ),
)
NARROWED = (0.55, 1.15)  # how much narrower or wider than from the front a real plate may be seen that is restyled
BRIGHT = 235.0  # what the brightest tenth of a plate shows in full light: its ground or its letters
LEAST_RESTYLED = 8  # pixels of height


def flat_plate(style: Style, rng: Generator) -> Image.Image:
    """A plate seen from the front, 64 pixels high."""
    width = round(HEIGHT * style.aspect)
    ground, ink = style.grounds[int(rng.integers(len(style.grounds)))]
    plate = Image.new("RGB", (width, HEIGHT), ground)
    draw = ImageDraw.Draw(plate)
    left = 0
    if style.left_band:
        left = round(HEIGHT * 0.35)
        draw.rectangle((0, 0, left, HEIGHT), fill=style.left_band)
    text = style.patterns[int(rng.integers(len(style.patterns)))]
    rows = text.split("|")
    shares = (0.0, 0.38, 1.0) if len(rows) == 2 else (0.0, 1.0)
    for row, start, end in zip(rows, shares, shares[1:], strict=False):
        area = (left + 4, round(start * HEIGHT) + 5, width - 5, round(end * HEIGHT) - 5)
        _write(draw, row, area, ink, rng)
    draw.rectangle((0, 0, width - 1, HEIGHT - 1), outline=ink if rng.random() < 0.6 else BLACK, width=2)
    return plate


def _write(
    draw: ImageDraw.ImageDraw,
    pattern: str,
    area: tuple[int, int, int, int],
    ink: Colour,
    rng: Generator,
) -> None:
    x1, y1, x2, y2 = area
    step = (x2 - x1) / len(pattern)
    font = ImageFont.load_default(size=min(y2 - y1, step * 1.45))
    for index, kind in enumerate(pattern):
        x = x1 + step * (index + 0.5)
        if kind == "#":
            _sign(draw, (x - step * 0.4, y1 + 2, x + step * 0.4, y2 - 2), ink, rng)
        elif kind != " ":
            draw.text((x, (y1 + y2) / 2), _glyph(kind, rng), fill=ink, font=font, anchor="mm", stroke_width=1)


def _glyph(kind: str, rng: Generator) -> str:
    alphabet = {"A": string.ascii_uppercase, "9": string.digits}.get(kind, kind)
    return alphabet[int(rng.integers(len(alphabet)))]


def _sign(draw: ImageDraw.ImageDraw, area: tuple[float, float, float, float], ink: Colour, rng: Generator) -> None:
    """A few straight strokes, like an ideogram seen from afar."""
    x1, y1, x2, y2 = area
    for _ in range(int(rng.integers(4, 8))):
        if rng.random() < 0.5:
            y = rng.uniform(y1, y2)
            draw.line((x1 + rng.uniform(0, (x2 - x1) / 3), y, x2, y), fill=ink, width=3)
        else:
            x = rng.uniform(x1, x2)
            draw.line((x, y1, x, y2 - rng.uniform(0, (y2 - y1) / 2)), fill=ink, width=3)


def perspective(flat: Image.Image, height: float, rng: Generator) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """The plate about `height` pixels high, turned at random: pixels (h, w, 3) and opacity (h, w)."""
    scale = height / flat.height
    width = flat.width * scale * rng.uniform(0.55, 1.0)
    slope, shear = rng.uniform(-0.25, 0.25) * height, rng.uniform(-0.15, 0.15) * height
    corners = np.array([(0, 0), (width, slope), (width + shear, height + slope), (shear, height)], np.float64)
    corners += rng.normal(0, 0.03 * height, corners.shape)
    corners -= corners.min(0) - 1
    width_seen, height_seen = (int(value) for value in np.ceil(corners.max(0)) + 1)
    source = flat.resize((max(2, round(flat.width * scale)), max(2, round(flat.height * scale))), Image.Resampling.BOX)
    source = source if source.height < flat.height else flat
    flat_corners = [(0, 0), (source.width, 0), (source.width, source.height), (0, source.height)]
    matrix = homography(corners, np.array(flat_corners, np.float64))
    size = (width_seen, height_seen)
    pixels = source.transform(size, Image.Transform.PERSPECTIVE, matrix, Image.Resampling.BILINEAR)
    whole = Image.new("L", source.size, 255)
    mask = whole.transform(size, Image.Transform.PERSPECTIVE, matrix, Image.Resampling.BILINEAR)
    return np.asarray(pixels), np.asarray(mask)


def homography(points: NDArray[np.float64], images: NDArray[np.float64]) -> tuple[float, ...]:
    """The eight numbers that send four points (4, 2) to their images: x' = (ax+by+c)/(gx+hy+1), y' likewise."""
    rows: list[list[float]] = []
    values: list[float] = []
    for (x, y), (u, v) in zip(points, images, strict=True):
        rows.append([x, y, 1, 0, 0, 0, -u * x, -u * y])
        rows.append([0, 0, 0, x, y, 1, -v * x, -v * y])
        values.extend((u, v))
    return tuple(float(value) for value in np.linalg.solve(np.array(rows), np.array(values)))


def with_plate(tile: Tile, rng: Generator) -> Tile:
    """A tile with one synthetic plate somewhere, dimmed or brightened to the place's own light."""
    style = STYLES[int(rng.integers(len(STYLES)))]
    height = float(np.exp(rng.uniform(np.log(7), np.log(140))))
    pixels, mask = perspective(flat_plate(style, rng), height, rng)
    high, wide = tile.pixels.shape[:2]
    if pixels.shape[0] >= high or pixels.shape[1] >= wide:
        return tile
    corner = (int(rng.integers(0, wide - pixels.shape[1])), int(rng.integers(0, high - pixels.shape[0])))
    around = tile.pixels[corner[1] : corner[1] + pixels.shape[0], corner[0] : corner[0] + pixels.shape[1]]
    light = np.clip(around.mean() / 130 * rng.uniform(0.8, 1.4), 0.25, 1.1)
    return pasted(tile, np.clip(pixels * light, 0, 255).astype(np.uint8), mask, "plate", corner)


def restyled(tile: Tile, chance: float, rng: Generator) -> Tile:
    """A tile in which each labelled plate has become, with this chance, one of another style in the same light."""
    pixels = tile.pixels.copy()
    for box in tile.targets.boxes[(tile.targets.classes == CLASSES.index("plate")) & ~tile.targets.ignored]:
        if rng.random() >= chance:
            continue
        x1, y1 = np.maximum(box[:2].round().astype(int), 0)
        x2, y2 = box[2:].round().astype(int)
        part = pixels[y1:y2, x1:x2]
        high, wide = part.shape[:2]
        fitting = [style for style in STYLES if high and NARROWED[0] < wide / high / style.aspect < NARROWED[1]]
        if high < LEAST_RESTYLED or not fitting:
            continue
        flat = flat_plate(fitting[int(rng.integers(len(fitting)))], rng).resize((wide, high), Image.Resampling.BOX)
        blurred = flat.filter(ImageFilter.GaussianBlur(rng.uniform(0, high / 25)))
        light = np.clip(np.percentile(part.mean(2), 90) / BRIGHT, 0.1, 1.1)
        part[:] = np.clip(np.asarray(blurred) * light, 0, 255).astype(np.uint8)
    return replace(tile, pixels=pixels)
