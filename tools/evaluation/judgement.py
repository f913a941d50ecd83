"""Right, wrong or neither: one detector's boxes of one class against the truth of one picture.

Everything is kept as the score from which it holds, so that one run at a low threshold answers for every threshold
above it: boxes of a lower score never change what boxes of a higher score have reached.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from agent.redaction.geometry import intersections, overlaps
from tools.evaluation.truths import Floats, Truth

COVERED = 0.5  # share of an object's box that must be masked: GB/T 44464-2024, B.5.3
MATCHED = 0.5  # intersection over union of a match
ROUNDING = 1e-9  # share by which sums of areas may be off
NEVER = -1.0  # the score of what no threshold reaches


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """One class's boxes (n, 4) and scores (n,) in one picture, best first."""

    boxes: Floats
    scores: Floats


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """Of each object: its size, and the threshold up to which it is covered and matched (NEVER: at none).

    Of each box: its score, whether it intersects no object and no ignored place (`false`, B.5), whether it is the match
    of an object (`right`) or must be left out of precision and false rate (`neutral`: an ignored place, or a picture
    whose labels are not complete). `size` is a person's height, else the smaller side, in pixels.
    """

    sizes: Floats
    covered: Floats
    matched: Floats
    scores: Floats
    false: NDArray[np.bool_]
    right: NDArray[np.bool_]
    neutral: NDArray[np.bool_]


def judge(label: str, found: Found, truth: Truth) -> Judgement:
    """Compare what was found with what is true."""
    matched, right = _matches(found, truth.objects)
    near_object = _touch(found.boxes, truth.objects)
    near_doubt = _touch(found.boxes, truth.ignored)
    return Judgement(
        sizes=sizes_of(truth.objects, label),
        covered=np.array([cover_score(item, found) for item in truth.objects], np.float64),
        matched=matched,
        scores=found.scores,
        false=~near_object & ~near_doubt & truth.complete,
        right=right,
        neutral=~right & (near_doubt | (not truth.complete)),
    )


def sizes_of(boxes: Floats, label: str) -> Floats:
    """Height of people, smaller side of faces and plates (GB/T 44464-2024, 5.6.2.1)."""
    widths, heights = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    return heights if label == "person" else np.minimum(widths, heights)


def cover_score(item: Floats, found: Found) -> float:
    """The lowest score that is needed until the boxes together mask half of an object (4,); NEVER if all do not."""
    near = _touch(found.boxes, item[None])
    boxes = np.clip(found.boxes[near], item[[0, 1, 0, 1]], item[[2, 3, 2, 3]])
    xs, ys = np.unique(boxes[:, [0, 2]]), np.unique(boxes[:, [1, 3]])  # between two of these all is masked, or nothing
    areas = np.outer(np.diff(ys), np.diff(xs))
    wanted = (COVERED - ROUNDING) * (item[2] - item[0]) * (item[3] - item[1])
    masked = np.zeros(areas.shape, np.bool_)
    for box, score in zip(boxes, found.scores[near], strict=True):
        masked |= ((ys[:-1] >= box[1]) & (ys[:-1] < box[3]))[:, None] & ((xs[:-1] >= box[0]) & (xs[:-1] < box[2]))
        if areas[masked].sum() >= wanted:
            return float(score)
    return NEVER


def _matches(found: Found, objects: Floats) -> tuple[Floats, NDArray[np.bool_]]:
    """Each box, best first, takes the free object that it overlaps most, by MATCHED at least."""
    matched, right = np.full(len(objects), NEVER), np.zeros(len(found.scores), np.bool_)
    if not len(objects):
        return matched, right
    table = overlaps(found.boxes.astype(np.float32), objects.astype(np.float32))
    for row, score in enumerate(found.scores):
        values = np.where(matched == NEVER, table[row], 0.0)
        best = int(values.argmax())
        if values[best] >= MATCHED:
            matched[best], right[row] = score, True
    return matched, right


def _touch(boxes: Floats, others: Floats) -> NDArray[np.bool_]:
    """Whether each box shares any area with any of the others."""
    if not len(others):
        return np.zeros(len(boxes), np.bool_)
    shared = intersections(boxes.astype(np.float32), others.astype(np.float32))
    return np.asarray((shared > 0).any(axis=1))


def masked_outside(boxes: Floats, allowed: Floats, width: int, height: int) -> float:
    """Share of a (width, height) picture that boxes mask outside every allowed box; boxes may cross its edges."""
    masked, free = np.zeros((height, width), np.bool_), np.zeros((height, width), np.bool_)
    for field, items in ((masked, boxes), (free, allowed)):
        for x1, y1, x2, y2 in np.clip(items, 0, [width, height] * 2):
            field[int(np.floor(y1)) : int(np.ceil(y2)), int(np.floor(x1)) : int(np.ceil(x2))] = True
    return float((masked & ~free).mean())
