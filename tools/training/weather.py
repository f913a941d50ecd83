"""What happens between the scene and the file: light, night, rain, motion, noise, dead pixels and JPEG damage."""

from __future__ import annotations

import io
from functools import lru_cache

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Pixels = NDArray[np.uint8]

NIGHT, RAIN, MOTION, NOISE, DEAD, DAMAGE, GREY = 0.12, 0.04, 0.08, 0.12, 0.05, 0.2, 0.05  # chances


def weathered(pixels: Pixels, rng: Generator) -> Pixels:
    """Colour, light, night, rain, motion blur, noise, dead pixels and JPEG damage, each with its own chance."""
    dark = rng.random() < NIGHT
    result = _coloured(pixels, rng, float(rng.uniform(1.4, 2.5)) if dark else float(rng.uniform(0.75, 1.35)))
    if dark:
        result = _with_lamps(result, rng)
    if rng.random() < RAIN:
        result = _rainy(result, rng)
    if rng.random() < MOTION:
        result = _moved(result, rng)
    if rng.random() < NOISE:
        result = _noisy(result, rng)
    if rng.random() < DEAD:
        result = _strewn(result, rng)
    return _damaged(result, rng) if rng.random() < DAMAGE else result


def _coloured(pixels: Pixels, rng: Generator, gamma: float) -> Pixels:
    """Gamma, contrast, and a gain for each channel, by table; seldom grey."""
    if rng.random() < GREY:
        pixels = np.repeat(np.asarray(Image.fromarray(pixels).convert("L"))[..., None], 3, 2)
    steps = np.arange(256, dtype=np.float32) / 255
    contrast, light = rng.uniform(0.8, 1.25), rng.uniform(0.75, 1.25)
    result = np.empty_like(pixels)
    for channel in range(3):
        curve = ((steps**gamma - 0.45) * contrast + 0.45) * light * rng.uniform(0.92, 1.08)
        result[..., channel] = (np.clip(curve, 0, 1) * 255).astype(np.uint8)[pixels[..., channel]]
    return result


def _with_lamps(pixels: Pixels, rng: Generator) -> Pixels:
    """A few lamps that glare."""
    height, width = pixels.shape[:2]
    rows, columns = np.arange(height, dtype=np.float32), np.arange(width, dtype=np.float32)
    values = pixels.astype(np.float32)
    for _ in range(int(rng.integers(0, 4))):
        spread = np.float32(2 * rng.uniform(3, 25) ** 2)
        down = np.exp(-((rows - rng.uniform(0, height)) ** 2) / spread)
        across = np.exp(-((columns - rng.uniform(0, width)) ** 2) / spread)
        values += np.outer(down, across)[..., None] * rng.uniform(120, 300, 3).astype(np.float32)
    return np.clip(values, 0, 255).astype(np.uint8)


def _noisy(pixels: Pixels, rng: Generator) -> Pixels:
    """Sensor noise: a piece of one fixed field at a random strength."""
    height, width = pixels.shape[:2]
    field = _noise_field(max(height, width) + 64)
    y, x = (int(value) for value in rng.integers(0, 64, 2))
    strength = np.float32(rng.uniform(2, 14))
    noise: NDArray[np.int16] = (field[y : y + height, x : x + width] * strength).astype(np.int16)
    return np.asarray(np.clip(pixels + noise, 0, 255), np.uint8)


def _strewn(pixels: Pixels, rng: Generator) -> Pixels:
    """Dead and stuck pixels, or a broken transfer: up to one in twelve is black or white."""
    result = pixels.copy()
    count = int(rng.uniform(0.002, 0.08) * pixels.shape[0] * pixels.shape[1])
    rows, columns = rng.integers(0, pixels.shape[:2], (count, 2)).T
    result[rows, columns] = rng.choice(np.array([0, 255], np.uint8), (count, 1))
    return result


@lru_cache(maxsize=2)
def _noise_field(size: int) -> NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal((size, size, 3), np.float32)


def _rainy(pixels: Pixels, rng: Generator) -> Pixels:
    """Slanted bright streaks and less contrast."""
    height, width = pixels.shape[:2]
    layer = Image.new("L", (width, height))
    draw = ImageDraw.Draw(layer)
    slant = rng.uniform(-6, 6)
    for x, y, length in rng.uniform((0, 0, 6), (width, height, 24), (int(rng.integers(60, 240)), 3)):
        draw.line((x, y, x + slant, y + length), fill=int(rng.integers(60, 160)))
    streaks = np.asarray(layer, np.float32)[..., None]
    return np.clip(pixels * np.float32(0.85) + 20 + streaks * np.float32(0.6), 0, 255).astype(np.uint8)


def _moved(pixels: Pixels, rng: Generator) -> Pixels:
    """Mean of shifted copies: the camera or the car moved during the exposure."""
    steps = int(rng.integers(2, 6))
    angle = rng.uniform(0, np.pi)
    total = pixels.astype(np.uint16)
    for step in range(1, steps):
        total += np.roll(pixels, (round(step * np.sin(angle)), round(step * np.cos(angle))), (0, 1))
    return (total // steps).astype(np.uint8)


def _damaged(pixels: Pixels, rng: Generator) -> Pixels:
    """Once through JPEG at low quality."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=int(rng.integers(25, 80)))
    with Image.open(stream) as picture:
        return np.asarray(picture.convert("RGB"))
