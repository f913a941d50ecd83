"""The verdict on a run: what was sent against what the regional brokers received. Values in, values out.

The judge knows from the recording's ground truth where every message was really captured and what is really to be seen
in its pictures. It asks the agent nothing but its counters.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import UnidentifiedImageError

from tools import pixels
from tools.schemas import picture_format
from tools.witness import Seen, WitnessError, opened

STATES = ("delivered", "pending", "held", "refused", "expired", "evicted")
# Of all labelled objects. A detector's recall is measured by `evaluate` on hundreds of pictures and stated in its model
# card; this floor only tells a run whose pictures were masked from one whose pictures were not.
REQUIRED_SHARE = 0.75

Permits = Callable[[str, str], tuple[str, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """One message as it went to the in-car broker, with the truth about it: country, labelled objects.

    `recorded_ns` is its capture time in the recording, `captured_ns` the one that it stated when it was replayed.
    """

    topic: str
    payload: bytes
    country: str
    objects: tuple[tuple[str, int, int, int, int], ...] = ()
    recorded_ns: int = 0
    captured_ns: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """One record that arrived: of which sent message (its index), where, when, and with which region as its tag."""

    sent: int
    broker: str
    time_ns: int
    tag: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Redacted:
    """One delivered picture beside the one that was sent; `hits` are labelled objects found covered or not."""

    broker: str
    sent: Sent
    data: bytes
    width: int
    height: int
    claimed: Mapping[str, int]
    hits: tuple[tuple[str, bool], ...]


@dataclass(slots=True, kw_only=True)
class Verdict:
    """What was found; `problems` is empty where the run kept its promises."""

    problems: list[str] = field(default_factory=list)
    arrived: Counter[tuple[str, str]] = field(default_factory=Counter)
    repeated: int = 0
    deliveries: list[Delivery] = field(default_factory=list)
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
        self._sent = sent
        self._by_digest = {_digest(one.payload): index for index, one in enumerate(sent)}
        shown = list(_thumbnails(sent))
        self._pictures = [index for index, _ in shown]
        self._thumbnails = np.array([small for _, small in shown], np.int16)

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
        record = opened(one)
        key = (record.attributes.get("source", ""), record.attributes.get("id", ""))
        if key in known:
            verdict.repeated += 1
            return
        known.add(key)
        is_picture = picture_format(record.data) is not None
        index = self._picture(record.data) if is_picture else self._by_digest.get(_digest(record.data))
        if index is None:
            verdict.problems.append(f"{one.broker}: {one.topic}: data that nobody sent")
            return
        sent, tag = self._sent[index], record.attributes.get("dataregion", "")
        verdict.deliveries.append(Delivery(sent=index, broker=one.broker, time_ns=one.time_ns, tag=tag))
        verdict.arrived[sent.country, one.broker] += 1
        allowed = self._permits(sent.country, sent.topic)
        if one.broker not in allowed:
            verdict.problems.append(
                f"{one.broker}: {sent.topic} captured in {sent.country} is permitted for {list(allowed)} only"
            )
        if is_picture:
            self._inspect(one, sent, record.attributes.get("redaction", ""), record.data, verdict)

    def _picture(self, data: bytes) -> int | None:
        if not self._pictures:
            return None
        return self._pictures[pixels.nearest(pixels.thumbnail(data), self._thumbnails)]

    def _inspect(self, one: Seen, sent: Sent, claim: str, data: bytes, verdict: Verdict) -> None:
        masked = claimed(claim)  # where nothing was, the very bytes that were sent may leave
        if (masked and _digest(data) in self._by_digest) or not pixels.hides_nothing(data):
            verdict.problems.append(
                f"{one.broker}: {sent.topic}: the picture, or something hidden in it, is unredacted"
            )
        before, after = pixels.decode(sent.payload), pixels.decode(data)
        if before.shape != after.shape:
            verdict.problems.append(f"{one.broker}: {sent.topic}: the picture changed its size")
            return
        told = [(label, pixels.covered(before, after, (x1, y1, x2, y2))) for label, x1, y1, x2, y2 in sent.objects]
        hits = tuple((label, hit) for label, hit in told if hit is not None)
        verdict.pictures.append(
            Redacted(
                broker=one.broker,
                sent=sent,
                data=data,
                width=after.shape[1],
                height=after.shape[0],
                claimed=masked,
                hits=hits,
            )
        )


def _thumbnails(sent: Sequence[Sent]) -> Iterator[tuple[int, NDArray[np.int16]]]:
    """Every sent picture that can be decoded, by its index; the others can only arrive as they are, or not at all."""
    for index, one in enumerate(sent):
        if picture_format(one.payload):
            with contextlib.suppress(UnidentifiedImageError, OSError, ValueError, SyntaxError):
                yield index, pixels.thumbnail(one.payload)


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
    """A picture in which none of its labelled objects is covered, and a run in which few are, are not redacted."""
    bare = [one for one in verdict.pictures if one.hits and not any(hit for _, hit in one.hits)]
    problems = [f"{one.broker}: {one.sent.topic}: none of {len(one.hits)} labelled objects is covered" for one in bare]
    hits, total = (sum(column) for column in zip((0, 0), *verdict.recall().values(), strict=True))
    if hits < REQUIRED_SHARE * total:
        problems.append(f"only {hits} of {total} labelled objects are covered in the delivered pictures")
    return problems


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()
