"""Runs detectors over the same pictures and collects what they found, what it was worth and how long it took."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from agent.messages import Box
from tools.evaluation.judgement import Found, Judgement, judge, masked_outside
from tools.evaluation.summary import (
    SMALLEST,
    annex_b,
    class_facts,
    curve,
    joined,
    shares_facts,
    threshold_for,
)
from tools.evaluation.truths import Labelled, Truth, rows
from tools.training.dataset import CLASSES

LOWEST = 0.03  # score from which boxes are collected

Detect = Callable[[NDArray[np.uint8]], Sequence[Box]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Contestant:
    """A detector to be measured: finds at LOWEST already; `thresholds` are its own, {} lets the pictures choose."""

    name: str
    labels: tuple[str, ...]
    detect: Detect
    thresholds: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What one contestant did in one picture, for each class that is known there."""

    picture: Labelled
    boxes: Mapping[str, Found]
    judgements: Mapping[str, Judgement]


def found_of(boxes: Sequence[Box], label: str) -> Found:
    """Boxes of one label, best first."""
    own = sorted((box for box in boxes if box.label == label), key=lambda box: -box.score)
    return Found(
        boxes=rows([(box.x1, box.y1, box.x2, box.y2) for box in own]),
        scores=np.array([box.score for box in own], np.float64),
    )


def outcome(contestant: Contestant, picture: Labelled) -> Outcome:
    """Run once and judge."""
    boxes = contestant.detect(picture.pixels())
    found = {label: found_of(boxes, label) for label in contestant.labels}
    judgements = {
        label: judge(label, found[label], truth)
        for label, truth in picture.truths.items()
        if label in contestant.labels
    }
    return Outcome(picture=picture, boxes=found, judgements=judgements)


def judged(outcomes: Sequence[Outcome], label: str, source: str | None = None) -> Judgement | None:
    """All judgements of a class, of one source or of all; None where there are none."""
    parts = [
        item.judgements[label]
        for item in outcomes
        if label in item.judgements and source in {None, item.picture.source}
    ]
    return joined(parts) if parts else None


def outside_share(item: Outcome, labels: Sequence[str], thresholds: Mapping[str, float]) -> float | None:
    """Share of a picture masked outside everything known, by classes that are known there; None where none is."""
    known = [label for label in labels if label in item.picture.truths]
    if not known:
        return None
    masks = [item.boxes[label].boxes[item.boxes[label].scores >= thresholds[label]] for label in known]
    allowed = [_all(truth) for truth in item.picture.truths.values()]
    return masked_outside(np.concatenate(masks), np.concatenate(allowed), item.picture.width, item.picture.height)


def _all(truth: Truth) -> NDArray[np.float64]:
    return np.concatenate([truth.objects, truth.ignored])


def thresholds_of(contestant: Contestant, outcomes: Sequence[Outcome]) -> dict[str, float]:
    """The contestant's own thresholds, else those at which a tenth of its boxes is false on these pictures."""
    chosen = {}
    for label in contestant.labels:
        own = judged(outcomes, label)
        chosen[label] = contestant.thresholds.get(label) or (0.5 if own is None else threshold_for(own))
    return chosen


def chosen_thresholds(contestant: Contestant, outcomes: Sequence[Outcome]) -> dict[str, float]:
    """The thresholds that these pictures choose: of each class of which an object was counted."""
    known = {label: own for label in contestant.labels if (own := judged(outcomes, label)) is not None}
    return {label: threshold_for(own) for label, own in known.items() if (own.sizes >= SMALLEST[label]).any()}


def facts_of(contestant: Contestant, outcomes: Sequence[Outcome]) -> dict[str, object]:
    """Everything measured about one contestant."""
    thresholds = thresholds_of(contestant, outcomes)
    known = {label: own for label in contestant.labels if (own := judged(outcomes, label)) is not None}
    counts = {label: sum(label in item.judgements for item in outcomes) for label in known}
    return {
        "name": contestant.name,
        "pictures": len(outcomes),
        "annex_b": annex_b(known, thresholds, counts),
        "classes": {
            label: {
                **class_facts(own, label, thresholds[label]),
                "over_redacted": _shares(outcomes, [label], thresholds),
                "curve": curve(own, label),
                "sources": _by_source(outcomes, label, thresholds),
            }
            for label, own in known.items()
        },
        "over_redacted": _shares(outcomes, list(known), thresholds),
    }


def _by_source(outcomes: Sequence[Outcome], label: str, thresholds: Mapping[str, float]) -> dict[str, object]:
    facts: dict[str, object] = {}
    for source in sorted({item.picture.source for item in outcomes}):
        own = judged(outcomes, label, source)
        if own is not None:
            members = [item for item in outcomes if item.picture.source == source]
            over = _shares(members, [label], thresholds)
            facts[source] = {**class_facts(own, label, thresholds[label]), "over_redacted": over}
    return facts


def _shares(outcomes: Sequence[Outcome], labels: Sequence[str], thresholds: Mapping[str, float]) -> dict[str, object]:
    shares = (outside_share(item, labels, thresholds) for item in outcomes)
    return dict(shares_facts([share for share in shares if share is not None]))


def side_by_side(all_facts: Mapping[str, Mapping[str, Judgement]]) -> list[dict[str, object]]:
    """Each class: every contestant at the threshold where its false rate is as near 10 % as it gets."""
    table = []
    for label in CLASSES:
        for name, known in all_facts.items():
            if label in known:
                facts = class_facts(known[label], label, threshold_for(known[label]))
                table.append({"class": label, "detector": name, **facts})
    return table
