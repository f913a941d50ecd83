"""A self-training round: teachers that check one another, and a trained detector that speaks where nobody has.

Of a class that people labelled fully nothing is changed. What two teachers saw keeps the better score, what only one of
them saw loses, so that it is left out of training rather than believed unless that one was very sure.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from agent.messages import Box
from agent.pictures.formats import Colour
from tools.evaluation.contest import Contestant
from tools.training.dataset import CLASSES, DOUBT, SAME, SOURCES, Knowledge, Source, load_picture, overlap

ALONE = 0.7  # what is left of a score that only one of two teachers gave


class Finds(Protocol):
    """What is needed of a detector."""

    def detect(
        self, picture: NDArray[np.uint8], colour: Colour, thresholds: dict[str, float] | None = None
    ) -> list[Box]:
        """Everything found."""


def open_classes(source: str) -> list[str]:
    """Classes of which a source's labels and teachers leave something open: unknown, or labelled in part."""
    return _classes(source, Knowledge.UNKNOWN, Knowledge.PARTIAL)


def taught_classes(source: str) -> list[str]:
    """Classes that a teacher completes or speaks for."""
    return _classes(source, Knowledge.TAUGHT, Knowledge.PARTIAL)


def _classes(source: str, *wanted: Knowledge) -> list[str]:
    known = SOURCES.get(source, Source())
    return [label for label in CLASSES if Knowledge(getattr(known, label)) in wanted]


def completed(
    raw: Iterable[Mapping[str, Any]],
    pictures: Path,
    detector: Finds,
    second: Sequence[Contestant] = (),
) -> list[dict[str, Any]]:
    """The label file's items, the first teachers' boxes weighed by `second` ones, the rest by the detector.

    The detector's boxes, from DOUBT on, stand for open classes of which no teacher has spoken in that picture.
    """
    result = []
    for item in raw:
        source, rows = str(item["source"]), list(item.get("pseudo", []))
        spoken = {row[0] for row in rows}
        wanted = [label for label in open_classes(source) if label not in spoken]
        checked = [(teacher, set(teacher.labels) & set(taught_classes(source))) for teacher in second]
        picture = load_picture(pictures / str(item["file"])) if wanted or any(labels for _, labels in checked) else None
        for teacher, labels in checked:
            if picture is not None and labels:
                rows = weighed(rows, [_row(box) for box in teacher.detect(picture) if box.label in labels], labels)
        if picture is not None and wanted:
            found = detector.detect(picture, Colour.RGB, dict.fromkeys(CLASSES, DOUBT))
            rows.extend(_row(box) for box in found if box.label in wanted)
        result.append({**item, "pseudo": rows})
    return result


def weighed(first: Sequence[Sequence[Any]], second: Sequence[Sequence[Any]], labels: set[str]) -> list[list[Any]]:
    """Rows (class, x1, y1, x2, y2, score) of two teachers as one; only `labels` are touched, boxes are the first's.

    What both saw has the higher score, what one saw keeps ALONE of its own.
    """
    result = [list(row) for row in first if row[0] not in labels]
    left = [list(row) for row in second]
    for row in sorted((list(row) for row in first if row[0] in labels), key=lambda row: -float(row[5])):
        shares = [overlap(row[1:5], [other[1:5]]) if other[0] == row[0] else 0.0 for other in left]
        best = int(np.argmax(shares)) if shares else -1
        if best >= 0 and shares[best] >= SAME:
            score = max(float(row[5]), float(left.pop(best)[5]))
        else:
            score = ALONE * float(row[5])
        result.append([*row[:5], round(score, 3)])
    return result + [[*row[:5], round(ALONE * float(row[5]), 3)] for row in left]


def _row(box: Box) -> list[Any]:
    return [box.label, *(round(value, 1) for value in (box.x1, box.y1, box.x2, box.y2)), round(box.score, 3)]
