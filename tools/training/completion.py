"""A self-training round: a trained detector speaks of the classes that a picture's source did not label."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from agent.messages import Box
from tools.training.dataset import CLASSES, DOUBT, SOURCES, Knowledge, Source, load_picture


class Finds(Protocol):
    """What is needed of a detector."""

    def detect(self, picture: NDArray[np.uint8], thresholds: dict[str, float] | None = None) -> list[Box]:
        """Everything found."""


def open_classes(source: str) -> list[str]:
    """Classes of which a source's labels and teachers leave something open: unknown, or labelled in part."""
    known = SOURCES.get(source, Source())
    unsure = {Knowledge.UNKNOWN, Knowledge.PARTIAL}
    return [label for label in CLASSES if Knowledge(getattr(known, label)) in unsure]


def completed(raw: Sequence[Mapping[str, Any]], pictures: Path, detector: Finds) -> list[dict[str, Any]]:
    """The label file's items with the detector's boxes, from DOUBT on, among the teachers' of the open classes.

    Where another teacher has spoken of the class already, it keeps the word.
    """
    result = []
    for item in raw:
        spoken = {row[0] for row in item.get("pseudo", [])}
        wanted = [label for label in open_classes(str(item["source"])) if label not in spoken]
        rows = list(item.get("pseudo", []))
        if wanted:
            found = detector.detect(load_picture(pictures / str(item["file"])), dict.fromkeys(CLASSES, DOUBT))
            rows.extend(_row(box) for box in found if box.label in wanted)
        result.append({**item, "pseudo": rows})
    return result


def _row(box: Box) -> list[object]:
    return [box.label, *(round(value, 1) for value in (box.x1, box.y1, box.x2, box.y2)), round(box.score, 3)]
