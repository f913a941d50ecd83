"""From judgements to figures: rates with Wilson bounds, sizes, average precision, curves, thresholds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tools.evaluation.judgement import Judgement
from tools.evaluation.truths import Floats

SMALLEST = {"person": 50.0, "face": 32.0, "plate": 16.0}  # pixels; face and plate: GB/T 44464-2024, 5.6.2.1
MOST_FALSE = 0.10  # GB/T 44464-2024, 5.6.2.2.2
LEAST_FOUND = 0.90  # GB/T 44464-2024, 5.6.2.2.1
LEAST_OBJECTS = {"person": 0, "face": 200, "plate": 200}  # GB/T 44464-2024, B.4
LEAST_PICTURES = 500  # GB/T 44464-2024, B.4
BANDS: Mapping[str, tuple[tuple[float, float], ...]] = {
    "person": ((20, 50), (50, 100), (100, math.inf)),
    "face": ((8, 16), (16, 32), (32, 64), (64, math.inf)),
    "plate": ((8, 16), (16, 32), (32, 64), (64, math.inf)),
}
CURVE = tuple(round(0.05 * step, 2) for step in range(1, 20))
LEAST = 0.05  # lowest threshold that is ever chosen
STEPS = 10_000  # of thresholds between 0 and 1: what is measured, printed and written is one value
FEW = 20  # boxes below which a false rate says nothing
Z95 = 1.959964  # two-sided 95 % quantile of the normal distribution


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """`hits` of `total`."""

    hits: int
    total: int

    def value(self) -> float:
        """The share; not a number where there is nothing to count."""
        return self.hits / self.total if self.total else math.nan

    def lower(self) -> float:
        """Wilson's lower bound at 95 %."""
        if not self.total:
            return math.nan
        share, square = self.value(), Z95**2
        middle = share + square / (2 * self.total)
        margin = Z95 * math.sqrt(share * (1 - share) / self.total + square / (4 * self.total**2))
        return (middle - margin) / (1 + square / self.total)

    def facts(self) -> dict[str, float | int | None]:
        """For JSON."""
        if not self.total:
            return {"hits": 0, "total": 0, "rate": None, "wilson_lower": None}
        return {
            "hits": self.hits,
            "total": self.total,
            "rate": round(self.value(), 4),
            "wilson_lower": round(self.lower(), 4),
        }


def joined(parts: Sequence[Judgement]) -> Judgement:
    """One judgement over many pictures."""
    return Judgement(
        sizes=np.concatenate([part.sizes for part in parts]),
        covered=np.concatenate([part.covered for part in parts]),
        matched=np.concatenate([part.matched for part in parts]),
        scores=np.concatenate([part.scores for part in parts]),
        false=np.concatenate([part.false for part in parts]),
        right=np.concatenate([part.right for part in parts]),
        neutral=np.concatenate([part.neutral for part in parts]),
    )


def detection_rate(judged: Judgement, threshold: float, low: float = 0.0, high: float = math.inf) -> Rate:
    """Objects of a size in [low, high) of which at least half is masked."""
    chosen = (judged.sizes >= low) & (judged.sizes < high)
    return Rate(hits=int((judged.covered[chosen] >= threshold).sum()), total=int(chosen.sum()))


def recall(judged: Judgement, threshold: float, low: float = 0.0, high: float = math.inf) -> Rate:
    """Objects of a size in [low, high) that a box matches at IoU 0.5."""
    chosen = (judged.sizes >= low) & (judged.sizes < high)
    return Rate(hits=int((judged.matched[chosen] >= threshold).sum()), total=int(chosen.sum()))


def false_rate(judged: Judgement, threshold: float) -> Rate:
    """Boxes that intersect nothing, of all boxes that are not neutral."""
    chosen = (judged.scores >= threshold) & ~judged.neutral
    return Rate(hits=int((judged.false & chosen).sum()), total=int(chosen.sum()))


def average_precision(judged: Judgement) -> float:
    """Area under precision over recall at IoU 0.5, precision made non-increasing; neutral boxes count for nothing."""
    if not len(judged.sizes):
        return math.nan
    counted = ~judged.neutral
    order = np.argsort(-judged.scores[counted], kind="stable")
    right = judged.right[counted][order]
    found = np.cumsum(right)
    precision = found / np.arange(1, len(right) + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float((envelope * right).sum() / len(judged.sizes))


def threshold_for(judged: Judgement, most_false: float = MOST_FALSE) -> float:
    """The lowest score from which on no more than `most_false` of the boxes are false: recall first.

    Read from the highest score down, so that a lucky stretch below a bad one is not taken, and never below LEAST. It is
    rounded up to a whole step of STEPS, so that the box that was too much stays out.
    """
    scores, false = judged.scores[~judged.neutral], judged.false[~judged.neutral]
    order = np.argsort(-scores, kind="stable")
    counts = np.arange(1, len(order) + 1)
    bad = np.flatnonzero((np.cumsum(false[order]) / counts > most_false) & (counts >= FEW))
    scores = scores[order]
    if not len(bad):
        return LEAST
    values = np.arange(1, STEPS) / STEPS
    above = int(np.searchsorted(values, scores[bad[0]], "right"))
    return max(LEAST, float(values[min(above, len(values) - 1)]))


def curve(judged: Judgement, label: str) -> list[dict[str, float | None]]:
    """Detection rate and recall of objects that count, and false rate, over thresholds."""
    least = SMALLEST[label]
    points = []
    for threshold in CURVE:
        rates = (
            detection_rate(judged, threshold, least),
            recall(judged, threshold, least),
            false_rate(judged, threshold),
        )
        values = [None if math.isnan(rate.value()) else round(rate.value(), 4) for rate in rates]
        points.append({"threshold": threshold, "detection": values[0], "recall": values[1], "false": values[2]})
    return points


def class_facts(judged: Judgement, label: str, threshold: float) -> dict[str, object]:
    """Everything about one class at a threshold."""
    least = SMALLEST[label]
    return {
        "threshold": threshold,
        "smallest": least,
        "detection": detection_rate(judged, threshold, least).facts(),
        "false": false_rate(judged, threshold).facts(),
        "recall": recall(judged, threshold, least).facts(),
        "average_precision": _rounded(average_precision(judged)),
        "sizes": {
            band_name(low, high): {
                "recall": recall(judged, threshold, low, high).facts(),
                "coverage": detection_rate(judged, threshold, low, high).facts(),
            }
            for low, high in BANDS[label]
        },
    }


def band_name(low: float, high: float) -> str:
    """`16-31`, `64+`."""
    return f"{low:.0f}+" if math.isinf(high) else f"{low:.0f}-{high - 1:.0f}"


def annex_b(
    judged: Mapping[str, Judgement], thresholds: Mapping[str, float], pictures: Mapping[str, int]
) -> dict[str, object]:
    """The verdict of GB/T 44464-2024 on faces and plates; `enough` says whether B.4's counts were met.

    `pictures`: of each class, the number of pictures whose labels speak of it.
    """
    verdicts: dict[str, object] = {}
    for label in ("face", "plate"):
        if label not in judged:
            continue
        found = detection_rate(judged[label], thresholds[label], SMALLEST[label])
        wrong = false_rate(judged[label], thresholds[label])
        verdicts[label] = {
            "pictures": pictures[label],
            "detection": found.facts(),
            "false": wrong.facts(),
            "shall": bool(found.total) and found.value() >= LEAST_FOUND,
            "should": not wrong.total or wrong.value() <= MOST_FALSE,
            "enough": pictures[label] >= LEAST_PICTURES and found.total >= LEAST_OBJECTS[label],
        }
    return verdicts


def shares_facts(shares: Sequence[float]) -> dict[str, float | int | None]:
    """Median and 95th percentile of shares of pictures."""
    values: Floats = np.array(shares, np.float64)
    if not len(values):
        return {"pictures": 0, "median": None, "p95": None}
    return {
        "pictures": len(values),
        "median": round(float(np.median(values)), 5),
        "p95": round(float(np.quantile(values, 0.95)), 5),
    }


def _rounded(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 4)
