"""The stream of training tiles: batch number n of a seed is always the same batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from tools.training.augment import Tile, flipped, mosaic, paste_from, rolled
from tools.training.dataset import Entry, Targets, load_picture, targets_of
from tools.training.plates import restyled, with_plate
from tools.training.weather import weathered

GRIDS, GRID_CHANCES = (1, 4, 9), (0.7, 0.27, 0.03)
PASTE, SYNTHETIC, RESTYLED, FLIP, ROLL = 0.2, 0.15, 0.25, 0.5, 0.15  # chances; RESTYLED is each real plate's
LEVEL = 6.0  # standard deviation of a roll, degrees
EMPHASIS: Mapping[str, float] = {
    "coco_minis": 7.0,
    "facemask853_train": 3.0,
    "experiment_plates_uniq": 1.3,
    "openimages_lp": 2.6,
    "usfl_lhqow": 2.0,
    "tud_street": 0.8,
    "bikeshelmets": 1.2,
    "ro_dashcam_day": 0.7,
}  # how often a picture is drawn: more where pictures are few and objects are hard


@dataclass(frozen=True, slots=True, kw_only=True)
class Album:
    """Decoded pictures with their targets, and the chance with which each is drawn."""

    tiles: tuple[Tile, ...]
    chances: NDArray[np.float64]

    @staticmethod
    def open(entries: Sequence[Entry], pictures: Path, *, completed: bool) -> Album:
        """Decode all entries' pictures from a folder."""
        tiles = tuple(
            Tile(pixels=load_picture(pictures / entry.file), targets=targets_of(entry, completed=completed))
            for entry in entries
        )
        weights = np.array([EMPHASIS.get(entry.source, 1.0) for entry in entries])
        return Album(tiles=tiles, chances=weights / weights.sum())

    def draw(self, count: int, rng: Generator) -> list[Tile]:
        """Tiles at random, with repetition."""
        return [self.tiles[int(index)] for index in rng.choice(len(self.tiles), size=count, p=self.chances)]


def training_tile(album: Album, size: int, rng: Generator) -> Tile:
    """One tile of (size, size) pixels."""
    tile = mosaic(album.draw(int(rng.choice(GRIDS, p=GRID_CHANCES)), rng), size, rng)
    tile = restyled(tile, RESTYLED, rng)
    if rng.random() < PASTE:
        tile = paste_from(tile, album.draw(1, rng)[0], rng)
    if rng.random() < SYNTHETIC:
        tile = with_plate(tile, rng)
    if rng.random() < FLIP:
        tile = flipped(tile)
    if rng.random() < ROLL:
        tile = rolled(tile, float(rng.normal(0, LEVEL)))
    return Tile(pixels=weathered(tile.pixels, rng), targets=tile.targets)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """Which tiles: the sides in pixels (multiples of 32) that batches have in turn, and the seed.

    `batch` is how many tiles of the largest side go into one; of smaller sides as many as have no more pixels.
    """

    sides: tuple[int, ...] = (320, 384, 512, 640)
    batch: int = 6
    seed: int = 1


def batch_of(album: Album, stream: Stream, number: int) -> tuple[NDArray[np.uint8], list[Targets]]:
    """Batch `number`: pixels (B, side, side, 3) and their targets; the same number gives the same batch."""
    rng = np.random.default_rng((stream.seed, number))
    side = int(rng.choice(stream.sides))
    count = stream.batch * max(stream.sides) ** 2 // side**2
    tiles = [training_tile(album, side, rng) for _ in range(count)]
    return np.stack([tile.pixels for tile in tiles]), [tile.targets for tile in tiles]
