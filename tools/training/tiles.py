"""The stream of training tiles: tile number n of a seed is always the same tile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from tools.training.augment import Tile, flipped, mosaic, paste_from
from tools.training.dataset import Entry, Targets, load_picture, targets_of
from tools.training.plates import with_plate
from tools.training.weather import weathered

GRIDS, GRID_CHANCES = (1, 4, 9), (0.6, 0.35, 0.05)
PASTE, SYNTHETIC, FLIP = 0.2, 0.15, 0.5  # chances
EMPHASIS: Mapping[str, float] = {
    "coco_minis": 2.0,
    "tud_street": 1.6,
    "bikeshelmets": 1.3,
    "facemask853_train": 1.6,
    "ro_dashcam_day": 1.2,
    "openimages_lp": 1.3,
    "usfl_lhqow": 1.0,
    "experiment_plates_uniq": 0.6,
}  # how often a picture is drawn: more where streets, people and far objects are


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


def training_tile(album: Album, size: int, seed: int, number: int) -> Tile:
    """Tile `number` of the stream, (size, size) pixels."""
    rng = np.random.default_rng((seed, number))
    tile = mosaic(album.draw(int(rng.choice(GRIDS, p=GRID_CHANCES)), rng), size, rng)
    if rng.random() < PASTE:
        tile = paste_from(tile, album.draw(1, rng)[0], rng)
    if rng.random() < SYNTHETIC:
        tile = with_plate(tile, rng)
    if rng.random() < FLIP:
        tile = flipped(tile)
    return Tile(pixels=weathered(tile.pixels, rng), targets=tile.targets)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """Which tiles: their side in pixels (a multiple of 32), how many in a batch, and the seed."""

    tile: int = 384
    batch: int = 16
    seed: int = 1


def batch_of(album: Album, stream: Stream, number: int) -> tuple[NDArray[np.uint8], list[Targets]]:
    """Batch `number`: pixels (batch, tile, tile, 3) and their targets."""
    first = number * stream.batch
    tiles = [training_tile(album, stream.tile, stream.seed, first + index) for index in range(stream.batch)]
    return np.stack([tile.pixels for tile in tiles]), [tile.targets for tile in tiles]
