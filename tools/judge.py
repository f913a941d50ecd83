"""The verdict on a run: what was sent against what the regional brokers received. Values in, values out.

The judge knows from the recording's ground truth where every message was really captured and what is really to be seen
in its pictures. It asks the agent nothing but its counters.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import UnidentifiedImageError

from tools import pixels
from tools.schemas import picture_format
from tools.witness import Seen, WitnessError, opened

STATES = ("delivered", "pending", "held", "refused", "expired", "evicted")
REQUIRED_SHARE = 0.9  # of labelled objects: GB/T 44464-2024, 5.6.2.2.1, though on far fewer objects than its B.4 wants

Permits = Callable[[str, str], tuple[str, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """One message as it went to the in-car broker, with the truth about it: country, labelled objects."""

    topic: str
    payload: bytes
    country: str
    objects: tuple[tuple[str, int, int, int, int], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Redacted:
    """A delivered picture beside the one that was sent; `hits` are labelled objects found covered or not."""

    broker: str
    sent: Sent
    data: bytes
    claimed: Mapping[str, int]
    hits: tuple[tuple[str, bool], ...]


@dataclass(slots=True, kw_only=True)
class Verdict:
    """What was found; `problems` is empty where the run kept its promises."""

    problems: list[str] = field(default_factory=list)
    arrived: Counter[tuple[str, str]] = field(default_factory=Counter)
    repeated: int = 0
    pictures: list[Redacted] = field(default_factory=list)

    @property
    def masked(self) -> Counter[str]:
        """What the agent says that it masked in the delivered pictures, by label."""
        return sum((Counter(picture.claimed) for picture in self.pictures), Counter())

    def recall(self) -> dict[str, tuple[int, int]]:
        """Labelled objects by label: how many were covered, of how many."""
        found: dict[str, list[bool]] = {}
        for label, hit in (one for picture in self.pictures for one in picture.hits):
            found.setdefault(label, []).append(hit)
        return {label: (sum(hits), len(hits)) for label, hits in sorted(found.items())}


class Judge:
    """Holds what was sent, and matches publications with it: data by its bytes, pictures by what they show."""

    def __init__(self, sent: Sequence[Sent], permits: Permits) -> None:
        self._permits = permits
        self._by_digest = {_digest(one.payload): one for one in sent}
        self._pictures = [one for one in sent if picture_format(one.payload)]
        self._thumbnails: list[NDArray[np.int16]] = [pixels.thumbnail(one.payload) for one in self._pictures]

    def judge(self, seen: Iterable[Seen]) -> Verdict:
        """Look at every publication once; the counters are judged by `judge_counts`."""
        verdict = Verdict()
        known: set[tuple[str, str]] = set()
        for one in seen:
            try:
                self._look(one, known, verdict)
            except (WitnessError, UnidentifiedImageError, OSError) as exc:
                verdict.problems.append(f"{one.broker}: {one.topic}: {exc}")
        verdict.problems += _recall_problems(verdict)
        return verdict

    def _look(self, one: Seen, known: set[tuple[str, str]], verdict: Verdict) -> None:
        record = opened(one.payload)
        key = (record.attributes.get("source", ""), record.attributes.get("id", ""))
        if key in known:
            verdict.repeated += 1
            return
        known.add(key)
        is_picture = picture_format(record.data) is not None
        sent = self._picture(record.data) if is_picture else self._by_digest.get(_digest(record.data))
        if sent is None:
            verdict.problems.append(f"{one.broker}: {one.topic}: data that nobody sent")
            return
        verdict.arrived[sent.country, one.broker] += 1
        allowed = self._permits(sent.country, sent.topic)
        if one.broker not in allowed:
            verdict.problems.append(
                f"{one.broker}: {sent.topic} captured in {sent.country} is permitted for {list(allowed)} only"
            )
        if is_picture:
            self._inspect(one, sent, record.attributes.get("redaction", ""), record.data, verdict)

    def _picture(self, data: bytes) -> Sent:
        return self._pictures[pixels.nearest(pixels.thumbnail(data), self._thumbnails)]

    def _inspect(self, one: Seen, sent: Sent, claim: str, data: bytes, verdict: Verdict) -> None:
        if _digest(data) in self._by_digest or not pixels.hides_nothing(data):
            verdict.problems.append(
                f"{one.broker}: {sent.topic}: the picture, or something hidden in it, is unredacted"
            )
        before, after = pixels.decode(sent.payload), pixels.decode(data)
        if before.shape != after.shape:
            verdict.problems.append(f"{one.broker}: {sent.topic}: the picture changed its size")
            return
        told = [(label, pixels.covered(before, after, (x1, y1, x2, y2))) for label, x1, y1, x2, y2 in sent.objects]
        hits = tuple((label, hit) for label, hit in told if hit is not None)
        verdict.pictures.append(Redacted(broker=one.broker, sent=sent, data=data, claimed=claimed(claim), hits=hits))


def claimed(summary: str) -> dict[str, int]:
    """Read the `redaction` attribute, such as `person=3,plate=1` or `none`; raises WitnessError."""
    if summary == "none":
        return {}
    try:
        return {label: int(count) for label, count in (part.split("=") for part in summary.split(","))}
    except ValueError as exc:
        message = f"the picture does not say how it was redacted: {summary!r}"
        raise WitnessError(message) from exc


def judge_counts(counts: Mapping[str, Any], *, sent: int, delivered: int) -> list[str]:
    """Hold the agent's counters against themselves, against what was sent, and against what arrived."""
    problems = []
    total = sum(counts[state] for state in STATES)
    if counts["received"] != total:
        problems.append(f"conservation: {counts['received']} received, but {total} accounted for")
    if counts["received"] < sent:
        problems.append(f"{sent} messages were sent, but only {counts['received']} are recorded as received")
    if counts["pending"]:
        problems.append(f"{counts['pending']} records are still pending")
    if counts["delivered"] != delivered:
        problems.append(f"{counts['delivered']} are recorded as delivered, but {delivered} arrived")
    return problems


def _recall_problems(verdict: Verdict) -> list[str]:
    return [
        f"only {hits} of {total} labelled objects of class {label} are covered in the delivered pictures"
        for label, (hits, total) in verdict.recall().items()
        if hits < REQUIRED_SHARE * total
    ]


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()
