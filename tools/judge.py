"""The verdict on a run: what was sent against what the regional brokers received. Values in, values out.

The judge knows from the recording's ground truth where every message was really captured and what is really to be seen
in its pictures. It asks the agent nothing but its counters. Of what the records say of themselves, topic and time only
help to tell equal messages apart; where that does not single one out, all that it may be have to permit what was done.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tools import pixels
from tools.leaves import Fields, common, digest, leaves, pictures
from tools.schemas import NANOSECONDS
from tools.spool import Spooled
from tools.stamps import read_rfc3339
from tools.witness import Opened, Seen, WitnessError, opened

STATES = ("delivered", "pending", "held", "refused", "expired", "evicted")
# Of all labelled objects. A detector's recall is measured by `evaluate` on hundreds of pictures and stated in its model
# card; this floor only tells a run whose pictures were masked from one whose pictures were not.
REQUIRED_SHARE = 0.75
NEAR_NS = NANOSECONDS  # a record says when it was captured, or when it arrived: on this machine, much sooner than this

Permits = Callable[[str, str], tuple[str, ...]]
Identity = tuple[str, str, bytes]  # source, id and a digest of the data: what has all in common came again
FieldsOf = Callable[[str], Fields | None]  # by topic


def no_fields(_topic: str) -> Fields | None:
    """A policy without field rules."""
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """One message as it went to the in-car broker, with the truth about it: country, labelled objects.

    `recorded_ns` is its moment in the recording, `captured_ns` the capture that it stated when it was replayed.
    """

    topic: str
    payload: Spooled
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
    """One delivered picture beside the one that was sent; `hits` are labelled objects found covered or not.

    `number` counts the pictures of the payload that may leave, from 0. What the record claims stands with the first.
    """

    sent: Sent
    seen: Seen
    fields: Fields | None
    number: int
    width: int
    height: int
    claimed: Mapping[str, int]
    hits: tuple[tuple[str, bool], ...]

    def read(self) -> tuple[bytes, bytes]:
        """The picture as it was sent and as it arrived; raises SpoolError."""
        both = (self.sent.payload.read(), opened(self.seen).data)
        before, after = (pictures(payload, self.fields)[self.number] for payload in both)
        return before, after


@dataclass(slots=True, kw_only=True)
class Verdict:
    """What was found; `problems` is empty where the run kept its promises.

    Its text has no payloads: `asyncio.run` writes the text of what a task returns at its end, all of it.
    """

    problems: list[str] = field(default_factory=list)
    arrived: Counter[tuple[str, str]] = field(default_factory=Counter)
    repeated: int = 0
    deliveries: list[Delivery] = field(default_factory=list, repr=False)
    pictures: list[Redacted] = field(default_factory=list, repr=False)

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
    """Holds what was sent, and matches publications with it: pictures by what they show, data by what must not change.

    That is every byte, but where pictures in a document are masked or the policy's field rules change it, its values.
    """

    def __init__(self, sent: Sequence[Sent], permits: Permits, fields: FieldsOf = no_fields) -> None:
        self._sent = sent
        self._permits = permits
        self._fields = fields
        self._matched: set[int] = set()
        self._alike: dict[tuple[str, bytes], list[int]] = {}
        self._shown: dict[str, pixels.Shown] = {}
        for index, one in enumerate(sent):
            payload = one.payload.read()
            self._alike.setdefault((one.topic, common(payload, fields(one.topic))), []).append(index)
            if pixels.picture_format(payload):
                self._shown.setdefault(one.topic, pixels.Shown()).add(index, payload)
        for alike in self._alike.values():
            alike.sort(key=self._captured_ns)

    def judge(self, seen: Iterable[Seen]) -> Verdict:
        """Look at every publication once; the counters are judged by `judge_counts`."""
        verdict = Verdict()
        known: dict[Identity, int] = {}
        self._matched.clear()
        for one in seen:
            try:
                self._look(one, known, verdict)
            except pixels.UNREADABLE as exc:  # a WitnessError is a ValueError
                verdict.problems.append(f"{one.broker}: {one.topic}: {exc}")
        verdict.problems += _recall_problems(verdict)
        return verdict

    def _look(self, one: Seen, known: dict[Identity, int], verdict: Verdict) -> None:
        record = opened(one)
        key = (record.attributes.get("source", ""), record.attributes.get("id", ""), digest(record.data))
        if key in known:
            verdict.repeated += 1
            self._placed(one.broker, [known[key]], verdict)
            return
        candidates = self._candidates(record)
        if not candidates:
            verdict.problems.append(
                f"{one.broker}: {one.topic}: data that nobody sent, or in a form that cannot be read"
            )
            return
        index = self._placed(one.broker, candidates, verdict)
        self._matched.add(index)
        known[key] = index
        sent, tag = self._sent[index], record.attributes.get("dataregion", "")
        verdict.deliveries.append(Delivery(sent=index, broker=one.broker, time_ns=one.time_ns, tag=tag))
        verdict.arrived[sent.country, one.broker] += 1
        fields = self._fields(sent.topic)
        if fields and not fields.are_kept(leaves(record.data) or ()):
            verdict.problems.append(
                f"{one.broker}: {sent.topic}: holds what the policy's field rules take out or change"
            )
        self._inspect(one, sent, record, verdict)

    def _placed(self, broker: str, candidates: Sequence[int], verdict: Verdict) -> int:
        """Which of the messages that a record may be it is: the first that does not permit the broker, if one is."""
        for index in candidates:
            sent = self._sent[index]
            allowed = self._permits(sent.country, sent.topic)
            if broker not in allowed:
                problem = f"{broker}: {sent.topic} captured in {sent.country} is permitted for {list(allowed)} only"
                others = sorted({self._sent[one].country for one in candidates} - {sent.country})
                doubt = f"; an equal message was captured in {', '.join(others)}" if others else ""
                verdict.problems.append(problem + doubt)
                return index
        return candidates[0]

    def _candidates(self, record: Opened) -> Sequence[int]:
        """The messages that a record may be, as few as its topic and time leave; one for each country."""
        topic, is_picture = record.attributes.get("subject", ""), pixels.picture_format(record.data)
        alike = (self._looking_alike if is_picture else self._having_alike)(topic, record.data)
        if len(alike) <= 1:
            return alike
        near = self._near(topic, alike, read_rfc3339(record.attributes.get("time", "")))
        left = near or [index for index in alike if index not in self._matched] or alike
        return list({self._sent[index].country: index for index in reversed(left)}.values())

    def _near(self, topic: str, alike: Sequence[int], time_ns: int | None) -> list[int]:
        """Of messages by capture time the one of which a record says its time; all in the step that a rule makes of it.

        What another record was is left out.
        """
        if time_ns is None:
            return []
        step_ns = fields.step_s * NANOSECONDS if (fields := self._fields(topic)) else 0
        first = bisect_left(alike, time_ns - NEAR_NS, key=self._captured_ns)
        last = bisect_right(alike, time_ns + step_ns + NEAR_NS, key=self._captured_ns)
        near = [index for index in alike[first:last] if index not in self._matched]
        return near if step_ns else sorted(near, key=lambda index: abs(self._captured_ns(index) - time_ns))[:1]

    def _captured_ns(self, index: int) -> int:
        return self._sent[index].captured_ns

    def _having_alike(self, topic: str, data: bytes) -> list[int]:
        return self._alike.get((topic, common(data, self._fields(topic))), [])

    def _looking_alike(self, topic: str, data: bytes) -> list[int]:
        """The sent picture of a topic that looks most like this one, and those that look the same as that."""
        return sorted(self._shown.get(topic, pixels.Shown()).like(data), key=self._captured_ns)

    def _inspect(self, seen: Seen, sent: Sent, record: Opened, verdict: Verdict) -> None:
        broker, fields = seen.broker, self._fields(sent.topic)
        delivered = pictures(record.data, fields)
        if not delivered:
            return
        masked = claimed(record.attributes.get("redaction", ""))
        pairs = list(zip(pictures(sent.payload.read(), fields), delivered, strict=True))
        bare = masked and all(digest(original) == digest(data) for original, data in pairs)
        if bare or not all(map(pixels.hides_nothing, delivered)):  # where nothing was, the bytes that came may leave
            verdict.problems.append(f"{broker}: {sent.topic}: the picture, or something hidden in it, is unredacted")
        for number, (original, data) in enumerate(pairs):
            before, after = pixels.decode(original), pixels.decode(data)
            if before.shape != after.shape:
                verdict.problems.append(f"{broker}: {sent.topic}: the picture changed its size")
                continue
            labelled = sent.objects if len(pairs) == 1 else ()
            told = [(label, pixels.covered(before, after, (x1, y1, x2, y2))) for label, x1, y1, x2, y2 in labelled]
            verdict.pictures.append(
                Redacted(
                    sent=sent,
                    seen=seen,
                    fields=fields,
                    number=number,
                    width=after.shape[1],
                    height=after.shape[0],
                    claimed={} if number else masked,
                    hits=tuple((label, hit) for label, hit in told if hit is not None),
                )
            )


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
    problems = [
        f"{one.seen.broker}: {one.sent.topic}: none of {len(one.hits)} labelled objects is covered" for one in bare
    ]
    hits, total = (sum(column) for column in zip((0, 0), *verdict.recall().values(), strict=True))
    if hits < REQUIRED_SHARE * total:
        problems.append(f"only {hits} of {total} labelled objects are covered in the delivered pictures")
    return problems
