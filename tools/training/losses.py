"""Which cell answers for which object, and what a wrong answer costs.

Each class is assigned on its own. A cell is a candidate for an object when its centre lies inside the object's box; of
these the ten best aligned by score and overlap answer for it (task alignment, arXiv 2108.07755, 3.2, with exponents 0.5
and 6). The score learns the overlap that the cell reaches (quality focal loss, arXiv 2006.04388, 3.1); places that the
labels say nothing about cost nothing. A further cell whose box would fall to a better one of the same object may say
what it likes up to its own overlap: were it taught to be silent, a large object's many like cells would all learn to
mumble.
"""

# torch is read as if it were absent (pyproject.toml).
# mypy: disable-error-code="misc, no-any-return"

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from tools.training.dataset import CLASSES, Targets
from tools.training.plan import STRIDES

BEST = 10  # cells per object
SCORE_POWER, OVERLAP_POWER = 0.5, 6.0
BOX_WEIGHT = 2.0
SPARE = 0.5  # overlap with its object from which a cell that does not answer for it is not taught to be silent
FARTHEST = 5.0  # largest logarithm of a distance in strides: 148 strides


@dataclass(frozen=True, slots=True, kw_only=True)
class Cells:
    """Centres (N, 2) in pixels and strides (N,) of all cells of a tile size, by rising stride, row by row."""

    centres: Tensor
    strides: Tensor

    @staticmethod
    def of(height: int, width: int) -> Cells:
        """Cells of a (height, width) input, both multiples of 32."""
        centres, strides = [], []
        for stride in STRIDES:
            y = (torch.arange(height // stride) + 0.5) * stride
            x = (torch.arange(width // stride) + 0.5) * stride
            rows, columns = torch.meshgrid(y, x, indexing="ij")
            centres.append(torch.stack([columns, rows], dim=-1).reshape(-1, 2))
            strides.append(torch.full((rows.numel(),), float(stride)))
        return Cells(centres=torch.cat(centres), strides=torch.cat(strides))

    def to(self, device: torch.device) -> Cells:
        """The same on another device."""
        return Cells(centres=self.centres.to(device), strides=self.strides.to(device))


@dataclass(frozen=True, slots=True, kw_only=True)
class Objects:
    """All boxes of a batch: picture (G,), class (G,), box (G, 4), ignored (G,)."""

    pictures: Tensor
    classes: Tensor
    boxes: Tensor
    ignored: Tensor

    @staticmethod
    def of(batch: Sequence[Targets]) -> Objects:
        """Targets of the pictures of a batch, in order."""
        joined = Targets.joined(list(batch))
        numbers = [index for index, targets in enumerate(batch) for _ in range(len(targets.classes))]
        return Objects(
            pictures=torch.tensor(numbers, dtype=torch.long),
            classes=torch.from_numpy(joined.classes),
            boxes=torch.from_numpy(joined.boxes),
            ignored=torch.from_numpy(joined.ignored),
        )

    def to(self, device: torch.device) -> Objects:
        """The same on another device."""
        return Objects(
            pictures=self.pictures.to(device),
            classes=self.classes.to(device),
            boxes=self.boxes.to(device),
            ignored=self.ignored.to(device),
        )

    def where(self, chosen: Tensor) -> Objects:
        """The rows where `chosen` (G,) is true."""
        return Objects(
            pictures=self.pictures[chosen],
            classes=self.classes[chosen],
            boxes=self.boxes[chosen],
            ignored=self.ignored[chosen],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """Rows that answer for an object, as picture, class, cell (P,), their object's box (P, 4) and wanted score (P,).

    `spare` (B, N, C) is the overlap with an object that a cell lies in, where it is SPARE or more, else 0.
    """

    pictures: Tensor
    classes: Tensor
    cells: Tensor
    boxes: Tensor
    wanted: Tensor
    spare: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """The two parts, each per unit of wanted score."""

    score: Tensor
    box: Tensor

    def total(self) -> Tensor:
        """What is minimised."""
        return self.score + BOX_WEIGHT * self.box


def decoded(values: Tensor, cells: Cells) -> Tensor:
    """Boxes (B, N, C, 4) in pixels from network output (B, N, C * 5)."""
    classes = values.shape[-1] // 5
    logarithms = values[..., classes:].float().unflatten(-1, (classes, 4)).clamp(-FARTHEST, FARTHEST)
    distances = logarithms.exp() * cells.strides[:, None, None]
    centres = cells.centres[:, None, :]
    return torch.cat([centres - distances[..., :2], centres + distances[..., 2:]], dim=-1)


def overlaps(first: Tensor, second: Tensor) -> Tensor:
    """Intersection over union of boxes of equal or broadcastable shape (..., 4)."""
    corner = torch.maximum(first[..., :2], second[..., :2])
    end = torch.minimum(first[..., 2:], second[..., 2:])
    shared = (end - corner).clamp(min=0).prod(-1)
    areas = (first[..., 2:] - first[..., :2]).prod(-1) + (second[..., 2:] - second[..., :2]).prod(-1)
    return shared / (areas - shared).clamp(min=1e-6)


def distance_overlaps(first: Tensor, second: Tensor) -> Tensor:
    """Intersection over union less the centres' distance and the aspect's difference (CIoU, arXiv 1911.08287)."""
    plain = overlaps(first, second)
    sizes1, sizes2 = first[..., 2:] - first[..., :2], second[..., 2:] - second[..., :2]
    hull = torch.maximum(first[..., 2:], second[..., 2:]) - torch.minimum(first[..., :2], second[..., :2])
    apart = ((first[..., :2] + first[..., 2:] - second[..., :2] - second[..., 2:]) ** 2).sum(-1) / 4
    angles1 = torch.atan2(sizes1[..., 0], sizes1[..., 1].clamp(min=1e-3))
    angles2 = torch.atan2(sizes2[..., 0], sizes2[..., 1].clamp(min=1e-3))
    aspect = (4 / torch.pi**2) * (angles1 - angles2) ** 2
    weight = (aspect / (1 - plain + aspect).clamp(min=1e-6)).detach()
    return plain - apart / (hull**2).sum(-1).clamp(min=1e-6) - weight * aspect


def inside(boxes: Tensor, centres: Tensor) -> Tensor:
    """Whether each centre (N, 2) lies in each box (G, 4): (G, N)."""
    return (
        (centres[None, :, 0] > boxes[:, None, 0])
        & (centres[None, :, 0] < boxes[:, None, 2])
        & (centres[None, :, 1] > boxes[:, None, 1])
        & (centres[None, :, 1] < boxes[:, None, 3])
    )


def assign(scores: Tensor, boxes: Tensor, objects: Objects, cells: Cells) -> Assignment:
    """Which cells answer for the objects (none of them ignored); scores (B, N, C) in 0..1, boxes (B, N, C, 4).

    Scores and boxes come detached: nothing is learnt through the choice.
    """
    rows, places = objects.pictures, objects.classes
    found = boxes[rows, :, places]
    reached = overlaps(found, objects.boxes[:, None])
    candidates = inside(objects.boxes, cells.centres)
    alignment = scores[rows, :, places] ** SCORE_POWER * reached**OVERLAP_POWER
    alignment = torch.where(candidates, alignment + 1e-12, torch.zeros_like(alignment))
    values, chosen = alignment.topk(min(BEST, alignment.shape[1]), dim=1)
    taken = values > 0
    best_alignment = values.amax(1, keepdim=True)
    best_overlap = (reached * candidates).gather(1, chosen).mul(taken).amax(1, keepdim=True)
    wanted = values / best_alignment.clamp(min=1e-12) * best_overlap
    owner = torch.arange(len(rows), device=rows.device)[:, None].expand_as(chosen)[taken]
    cell = chosen[taken]
    key = (objects.pictures[owner] * scores.shape[2] + objects.classes[owner]) * scores.shape[1] + cell
    kept = undisputed(key, reached.gather(1, chosen)[taken], scores.numel())
    return Assignment(
        pictures=objects.pictures[owner[kept]],
        classes=objects.classes[owner[kept]],
        cells=cell[kept],
        boxes=objects.boxes[owner[kept]],
        wanted=wanted[taken][kept],
        spare=_spare(reached * candidates, objects, scores),
    )


def _spare(reached: Tensor, objects: Objects, scores: Tensor) -> Tensor:
    """Largest overlap (B, N, C) of a cell with an object of its class, 0 below SPARE, from all pairs' (G, N)."""
    result = torch.zeros(scores.shape[0] * scores.shape[2], scores.shape[1], device=scores.device)
    row = (objects.pictures * scores.shape[2] + objects.classes)[:, None].expand_as(reached)
    result = result.scatter_reduce(0, row, reached * (reached >= SPARE), "amax")
    return result.unflatten(0, (scores.shape[0], scores.shape[2])).transpose(1, 2)


def undisputed(key: Tensor, value: Tensor, keys: int) -> Tensor:
    """For each key (P,) in 0..keys that occurs, the index of the row with the largest value (P,)."""
    order = torch.argsort(value, stable=True)
    last = torch.full((keys,), -1, dtype=torch.long, device=key.device)
    last = last.scatter_reduce(0, key[order], torch.arange(len(order), device=key.device), "amax")
    return order[last[last >= 0]]


def teaching(objects: Objects, cells: Cells, shape: Sequence[int]) -> Tensor:
    """1 where a cell's score of a class is taught, 0 inside ignored places: (B, N, C)."""
    result = torch.ones(tuple(shape), device=cells.centres.device)
    hidden = objects.where(objects.ignored)
    covered = inside(hidden.boxes, cells.centres)
    row, cell = covered.nonzero(as_tuple=True)
    result[hidden.pictures[row], cell, hidden.classes[row]] = 0.0
    return result


def loss_of(values: Tensor, objects: Objects, cells: Cells) -> Loss:
    """Loss of network output (B, N, C * 5)."""
    classes = len(CLASSES)
    logits = values[..., :classes].float()
    scores = logits.sigmoid()
    boxes = decoded(values, cells)
    found = assign(scores.detach(), boxes.detach(), objects.where(~objects.ignored), cells)
    place = (found.pictures, found.cells, found.classes)
    wanted = torch.minimum(scores.detach(), found.spare)
    wanted[place] = found.wanted
    weight = teaching(objects, cells, scores.shape)
    weight[place] = 1.0
    unit = found.wanted.sum().clamp(min=1.0)
    entropy = functional.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    score = (entropy * (wanted - scores.detach()).abs() ** 2 * weight).sum() / unit
    missed = 1 - distance_overlaps(boxes[place], found.boxes)
    return Loss(score=score, box=(missed * found.wanted).sum() / unit)
