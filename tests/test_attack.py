"""An attacker who knows font, place, size and method compares what left with what each character would have left.

Constant fill leaves nothing to compare: characters are guessed at chance. The weaker fills, which have to be asked
for by name, give characters away; the measured table is in the README.
"""

import io

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from agent.messages import Box
from agent.pictures.formats import Fill, PictureLimits, RedactionOptions
from agent.redaction.masking import areas, paint, whole_blocks
from agent.redaction.redaction import redact_picture

ALPHABET = "ABCDEFGHJKLMNPQRSTUVWXYZ0123456789"  # no I and O, as on most plates
CHANCE = 1 / len(ALPHABET)
CHARACTERS = 4
LIMITS = PictureLimits()
SENSOR_NOISE = 4.0  # standard deviation in grey levels: a camera by day


class Plate:
    """Where a plate lies in its picture: characters of a height in pixels, a light ground, a margin around it."""

    def __init__(self, height: int) -> None:
        self.height = height
        self.step = round(height * 0.8)
        self.pad = max(2, height // 6)
        self.x, self.y = height // 2 + 5, height // 2 + 3  # off the coding grid on purpose
        self.width = self.step * CHARACTERS + 2 * self.pad
        self.size = (self.width + 2 * self.x, height + 2 * self.pad + 2 * self.y)
        self.font = ImageFont.load_default(size=height * 1.35)  # whose capitals are then `height` pixels high
        self.glyphs = {character: self._glyph(character) for character in ALPHABET}

    def _glyph(self, character: str) -> np.ndarray:
        image = Image.new("L", (self.step, self.height), 235)
        ImageDraw.Draw(image).text((self.step / 2, self.height / 2), character, 20, self.font, anchor="mm")
        return np.asarray(image)

    def picture(self, text: str) -> np.ndarray:
        pixels = np.full((self.size[1], self.size[0]), 90, np.uint8)
        x, y = self.x, self.y
        pixels[y : y + self.height + 2 * self.pad, x : x + self.width] = 235
        for place, character in enumerate(text):
            at = x + self.pad + place * self.step
            pixels[y + self.pad : y + self.pad + self.height, at : at + self.step] = self.glyphs[character]
        return np.repeat(pixels[..., None], 3, axis=2)

    def box(self) -> Box:
        x2, y2 = self.x + self.width, self.y + self.height + 2 * self.pad
        return Box(label="plate", score=1.0, x1=self.x, y1=self.y, x2=x2, y2=y2)


def published(plate: Plate, text: str, fill: Fill, kind: str, seed: int) -> np.ndarray:
    """What the attacker holds: a noisy photograph of the plate, through the real redaction, decoded."""
    noise = np.random.default_rng(seed).normal(0, SENSOR_NOISE, plate.picture(text).shape[:2])[..., None]
    photograph = (plate.picture(text) + noise).round().clip(0, 255).astype(np.uint8)
    source = io.BytesIO()
    Image.fromarray(photograph).save(source, kind, **({"quality": 85} if kind == "JPEG" else {}))
    options = RedactionOptions(fill=fill, margins={})
    data, _ = redact_picture(source.getvalue(), lambda *_: [plate.box()], options, LIMITS)
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("L")).astype(float)


def expected(plate: Plate, text: str, fill: Fill, kind: str) -> np.ndarray:
    """What the attacker renders for a guess."""
    pixels = plate.picture(text)
    if kind == "JPEG":
        source = io.BytesIO()
        Image.fromarray(pixels).save(source, kind, quality=85)
        with Image.open(source) as image:
            pixels = np.array(image.convert("RGB"))
    height, width = pixels.shape[:2]
    block = (16, 16) if kind == "JPEG" else (1, 1)  # 4:2:0
    where = [whole_blocks(area, block, 0, width, height) for area in areas([plate.box()], width, height, {})]
    grey = Image.fromarray(pixels[..., 0].copy())
    paint(grey, where, fill)
    return np.asarray(grey).astype(float)


def guess(plate: Plate, held: np.ndarray, fill: Fill, kind: str, seed: int) -> str:
    """Start anywhere and improve one character after the other, twice; ties go to a random candidate."""
    generator = np.random.default_rng(seed)
    text = list(generator.choice(list(ALPHABET), CHARACTERS))
    for place in [*range(CHARACTERS)] * 2:
        candidates = list(generator.permutation(list(ALPHABET)))
        errors = []
        for candidate in candidates:
            text[place] = candidate
            errors.append(((expected(plate, "".join(text), fill, kind) - held) ** 2).sum())
        text[place] = candidates[int(np.argmin(errors))]
    return "".join(text)


def read_back(height: int, fill: Fill, kind: str, plates: int) -> float:
    """The share of characters that the attacker reads correctly."""
    plate, generator, right = Plate(height), np.random.default_rng(height), 0
    for seed in range(plates):
        text = "".join(generator.choice(list(ALPHABET), CHARACTERS))
        read = guess(plate, published(plate, text, fill, kind, seed), fill, kind, seed + 1000)
        right += sum(a == b for a, b in zip(read, text, strict=True))
    return right / (plates * CHARACTERS)


def output(plate: Plate, text: str, kind: str, **coding: object) -> bytes:
    """The published bytes of a noiseless photograph, blue on yellow: the best case for the attacker."""
    source, pixels = io.BytesIO(), plate.picture(text)
    pixels[..., 2] = 255 - pixels[..., 2]
    Image.fromarray(pixels).save(source, kind, **coding)
    options = RedactionOptions(margins={})
    return redact_picture(source.getvalue(), lambda *_: [plate.box()], options, LIMITS)[0]


@pytest.mark.usefixtures("codec")
@pytest.mark.parametrize("height", [16, 32, 64])
@pytest.mark.parametrize(
    ("kind", "coding"),
    [
        ("PNG", {}),
        ("WEBP", {"lossless": True}),
        ("JPEG", {"quality": 85}),
        ("JPEG", {"quality": 50, "subsampling": 1}),
        ("JPEG", {"quality": 95, "subsampling": 1}),
        ("JPEG", {"quality": 95, "subsampling": 0}),
        ("JPEG", {"quality": 75, "progressive": True}),
    ],
    ids=str,
)
def test_constant_fill_leaves_the_same_bytes_whatever_the_plate_says(height, kind, coding):
    plate = Plate(height)
    assert len({output(plate, text, kind, **coding) for text in ("AAAA", "8888", "WJ1X")}) == 1


def test_mask_that_ends_within_a_coding_block_would_give_characters_away(monkeypatch):
    monkeypatch.setattr("agent.redaction.redaction.turbo", lambda: None)  # which masks no part of a block
    monkeypatch.setattr("agent.redaction.redaction.whole_blocks", lambda area, *_: area)
    plate = Plate(16)
    assert len({output(plate, text, "JPEG", quality=85) for text in ("AAAA", "8888", "WJ1X")}) == 3


@pytest.mark.parametrize("height", [16, 32, 64])
def test_constant_fill_is_read_back_at_chance(height):
    assert read_back(height, Fill.CONSTANT, "JPEG", plates=5) <= 5 * CHANCE


@pytest.mark.parametrize(("fill", "least"), [(Fill.WEAKER_MOSAIC, 0.4), (Fill.WEAKER_BLUR, CHANCE)])
def test_weaker_fills_are_read_back_above_chance(fill, least):
    assert read_back(16, fill, "PNG", plates=6) > least
