"""Labels brought onto the upright picture: its true size, turned boxes where they lay on their side, clipped boxes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.ExifTags import Base

from tools.evaluation.truths import Floats, Labelled, Truth

SLACK = 2  # pixels by which labels may state another size
Turn = Callable[[Floats, int, int], Floats]
TURNS: Mapping[int, Turn] = {  # EXIF orientation -> boxes of a stored (width, height) picture in the upright one
    5: lambda box, _width, _height: box[:, [1, 0, 3, 2]],
    6: lambda box, _width, height: np.stack([height - box[:, 3], box[:, 0], height - box[:, 1], box[:, 2]], axis=1),
    7: lambda box, width, height: np.stack(
        [height - box[:, 3], width - box[:, 2], height - box[:, 1], width - box[:, 0]], axis=1
    ),
    8: lambda box, width, _height: np.stack([box[:, 1], width - box[:, 2], box[:, 3], width - box[:, 0]], axis=1),
}


def upright_size(path: Path) -> tuple[int, int]:
    """Width and height of a picture as it is looked at; raises OSError."""
    (width, height), orientation = _header(path)
    return (height, width) if orientation in TURNS else (width, height)


def _header(path: Path) -> tuple[tuple[int, int], int]:
    with Image.open(path) as opened:
        return opened.size, int(opened.getexif().get(Base.Orientation, 1))


def fitted(item: Labelled) -> Labelled | str:
    """The same with the upright picture's size, boxes cut off at its edges, those below 1 px left out.

    The size that comes in is the one that the labels state, 0 where they do not. Where it is that of the picture on its
    side, boxes are turned. A line that says why where the picture cannot be read, or is not the one that was labelled.
    """
    try:
        stored, orientation = _header(item.path)
    except (OSError, Image.DecompressionBombError) as exc:
        return f"{item.path}: {exc}"
    width, height = stored[::-1] if orientation in TURNS else stored
    truths = item.truths
    stated = (item.width, item.height)
    if all(stated) and not _alike(stated, (width, height)):
        if not (orientation in TURNS and _alike(stated, stored)):
            return f"{item.path}: is {width}x{height}, its labels say {item.width}x{item.height}"
        turn = TURNS[orientation]
        truths = {
            label: replace(truth, objects=turn(truth.objects, *stored), ignored=turn(truth.ignored, *stored))
            for label, truth in truths.items()
        }
    clipped = {label: _clipped(truth, width, height) for label, truth in truths.items()}
    return replace(item, width=width, height=height, truths=clipped)


def _alike(one: tuple[int, int], two: tuple[int, int]) -> bool:
    return abs(one[0] - two[0]) <= SLACK and abs(one[1] - two[1]) <= SLACK


def _clipped(truth: Truth, width: int, height: int) -> Truth:
    limits = np.array([width, height] * 2, np.float64)
    objects, ignored = (np.clip(boxes, 0, limits) for boxes in (truth.objects, truth.ignored))
    sane = (objects[:, 2] - objects[:, 0] >= 1) & (objects[:, 3] - objects[:, 1] >= 1)
    return replace(truth, objects=objects[sane], ignored=ignored)
