"""What is true in a picture, and what nobody knows.

A class that a picture's source does not label is unknown there: nothing is counted for it. An ignored box marks a place
where an object may be (a teacher's doubt, a crowd): finding it is neither right nor wrong.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tools.training.dataset import CLASSES, DOUBT, SOURCES, Entry, Knowledge, Source, load_picture

Floats = NDArray[np.float64]

TEACHERS = frozenset({"person", "face"})  # classes of which the supplied teachers speak where labels are incomplete


@dataclass(frozen=True, slots=True, kw_only=True)
class Truth:
    """One class in one picture: objects (n, 4) and ignored places (m, 4), in pixels.

    `complete`: every other object lies in an ignored place, so that what is found elsewhere is false.
    """

    objects: Floats
    ignored: Floats
    complete: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Labelled:
    """A picture on disk with the truth of each class that is known there; its size is that of the upright picture."""

    path: Path
    source: str
    width: int
    height: int
    truths: Mapping[str, Truth] = field(default_factory=dict)

    def pixels(self) -> NDArray[np.uint8]:
        """The picture, (H, W, 3) RGB."""
        return load_picture(self.path)


def rows(boxes: Sequence[Sequence[float]]) -> Floats:
    """Boxes as (n, 4), also where there are none."""
    return np.array(boxes, np.float64).reshape(-1, 4)


def from_entry(entry: Entry, folder: Path, labelled: Collection[str] = ()) -> Labelled:
    """An entry of labels.json: people's boxes are true; teachers' boxes and heads without a face are ignored.

    `labelled`: classes that its source labels, where it is not one of SOURCES.
    """
    source = SOURCES.get(entry.source, Source())
    truths = {}
    for label in CLASSES:
        listed = Knowledge(getattr(source, label)) in {Knowledge.FULL, Knowledge.PARTIAL}
        if listed or (entry.source not in SOURCES and label in labelled):
            complete = Knowledge(getattr(source, label)) is not Knowledge.PARTIAL or label in TEACHERS
            truths[label] = _truth_of(entry, label, complete=complete)
    return Labelled(
        path=folder / entry.file,
        source=entry.source,
        width=entry.width,
        height=entry.height,
        truths=truths,
    )


def _truth_of(entry: Entry, label: str, *, complete: bool) -> Truth:
    objects = rows([box for name, box in entry.boxes if name == label])
    doubts = [box for name, box, score in entry.taught if name == label and score >= DOUBT]
    heads = [box for name, box in entry.boxes if name == "head"] if label == "face" else []
    return Truth(objects=objects, ignored=rows([*doubts, *heads]), complete=complete)
