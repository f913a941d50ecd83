"""What a detector's output says, in the layouts that a manifest may name: pure arrays in, boxes of the input out.

Invariants: nothing is read from an output before its shape was compared and every number was found finite; no row that
passes is turned inside out, and rows that are shares of 1 are not taken for pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from agent.errors import ModelError
from agent.redaction.geometry import (
    Floats,
    Letterbox,
    Window,
    boxes_from_centres,
    boxes_from_distances,
    cell_count,
    cell_grid,
)
from agent.redaction.manifest import Layout, Manifest

MOST_CANDIDATES = 2000  # rows of a class that suppression looks at; the best are taken
LARGEST_SHARE = 1.5  # of the input: boxes in shares of 1 reach a little beyond it, those in pixels go further
EDGE = 2.0  # pixels from a window's edge within which an object counts as cut


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidates:
    """What a class's rows say: boxes (n, 4) and scores (n,) in 0..1, above the class's threshold."""

    label: str
    boxes: Floats
    scores: Floats

    def joined(self, other: Candidates) -> Candidates:
        """The rows of both."""
        return replace(
            self,
            boxes=np.concatenate([self.boxes, other.boxes]),
            scores=np.concatenate([self.scores, other.scores]),
        )

    def moved(self, x: int, y: int) -> Candidates:
        """The same rows seen from a corner (x, y) further to the left and top."""
        return replace(self, boxes=self.boxes + np.array([x, y, x, y], np.float32))

    def whole_in(self, window: Window) -> Candidates:
        """The rows, in the window's own pixels, that touch none of its inner edges: others may be cut objects."""
        limits = np.array([window.x2 - window.x1, window.y2 - window.y1], np.float32)
        kept = ((self.boxes[:, :2] > EDGE) & (self.boxes[:, 2:] < limits - EDGE)).all(axis=1)
        return replace(self, boxes=self.boxes[kept], scores=self.scores[kept])


def candidates(values: Floats, frame: Letterbox, manifest: Manifest, limits: Sequence[float]) -> list[Candidates]:
    """Rows of the output that pass `limits`, class by class.

    ModelError for a wrong shape, a number not finite, a score outside 0..1, a box turned inside out or boxes in shares.
    """
    _check_values(values, frame, manifest)
    output, count = manifest.output, len(manifest.classes)
    if output.layout is Layout.CELLS:
        return _from_cells(values[0], frame, manifest, limits)
    if output.layout is Layout.CORNERS:
        boxes, scores = values[0, :, :4], values[0, :, 4:]
    else:
        boxes, scores = boxes_from_centres(values[0, :4].T), values[0, 4:].T
    if scores.size and (scores.min() < 0 or scores.max() > 1):
        message = f"{manifest.model}: a score lies outside 0..1"
        raise ModelError(message)
    found = []
    for number, label in zip(range(count), manifest.classes, strict=True):
        if label is not None:
            chosen = _best(scores[:, number], limits[number])
            found.append(Candidates(label=label, boxes=boxes[chosen], scores=scores[chosen, number]))
    _check_boxes(np.concatenate([item.boxes for item in found]), frame, manifest)
    return found


def _check_boxes(boxes: Floats, frame: Letterbox, manifest: Manifest) -> None:
    """Raise ModelError unless boxes (n, 4) have their corners in order and can be in pixels of the input.

    A detector of another layout or unit than its manifest says would leave pictures unmasked.
    """
    if (boxes[:, 2:] < boxes[:, :2]).any():
        message = f"{manifest.model}: a box is turned inside out; is its layout {manifest.output.layout}?"
        raise ModelError(message)
    if len(boxes) and np.abs(boxes).max() <= LARGEST_SHARE < min(frame.width, frame.height):
        message = f"{manifest.model}: all boxes lie within {LARGEST_SHARE} pixels of the corner, as if in shares of 1"
        raise ModelError(message)


def _check_values(values: Floats, frame: Letterbox, manifest: Manifest) -> None:
    classes, layout = len(manifest.classes), manifest.output.layout
    count: int | None = None
    if layout is Layout.CELLS:
        count = cell_count(frame.width, frame.height, manifest.output.strides)
    axis, length = (1, 4 + classes) if layout is Layout.CENTRES else (2, 5 * classes)
    if layout is Layout.CORNERS:
        length = 4 + classes
    right = values.ndim == 3 and values.shape[0] == 1 and values.shape[axis] == length
    if not right or (count is not None and values.shape[1] != count):
        message = f"{manifest.model}: the output has the shape {values.shape}, wanted {length} values for {count} cells"
        raise ModelError(message)
    if not np.isfinite(values).all():
        message = f"{manifest.model}: the output holds a number that is not finite"
        raise ModelError(message)


def _from_cells(rows: Floats, frame: Letterbox, manifest: Manifest, limits: Sequence[float]) -> list[Candidates]:
    """Decode only the cells that pass."""
    centres, strides = cell_grid(frame.width, frame.height, manifest.output.strides)
    classes = len(manifest.classes)
    found = []
    for number, label in enumerate(manifest.classes):
        if label is None:
            continue
        logits = rows[:, number]
        chosen = _best(logits, float(np.log(limits[number] / (1 - limits[number]))))
        start = classes + 4 * number
        boxes = boxes_from_distances(rows[chosen, start : start + 4], centres[chosen], strides[chosen])
        scores = np.asarray(1 / (1 + np.exp(-logits[chosen])), np.float32)
        found.append(Candidates(label=label, boxes=boxes, scores=scores))
    return found


def _best(scores: Floats, limit: float) -> NDArray[np.int64]:
    """Indices of scores not below a limit, the best MOST_CANDIDATES of them."""
    chosen = np.flatnonzero(scores >= limit)
    if len(chosen) > MOST_CANDIDATES:
        chosen = np.sort(chosen[np.argsort(-scores[chosen], kind="stable")[:MOST_CANDIDATES]])
    return chosen
