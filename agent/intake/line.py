"""One message along the straight line, with the waiting in it: the redaction process, the numbering, the clock."""

from __future__ import annotations

import logging
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Protocol

from agent.errors import RefusedError
from agent.intake.turns import Turns
from agent.messages import Hold, Message, Redaction
from agent.pipeline import Pipeline, Plan, Stamp, coarse
from agent.places.positions import WallClock
from agent.store.entries import IntakeKey, Refused, Store

log = logging.getLogger(__name__)

RANDOM_BYTES = 8  # of a record's id, beside the time
IDS_AHEAD = 64  # for which the kernel is asked at once


class Redacted(Protocol):
    """A payload that may leave."""

    @property
    def payload(self) -> bytes:
        """The payload."""

    @property
    def counts(self) -> Mapping[str, int]:
        """Masked boxes per label."""

    @property
    def pictures(self) -> int:
        """How many pictures there were."""

    @property
    def model_digest(self) -> str:
        """SHA-256 of the model, hex."""


class Redactor(Protocol):
    """The redaction process."""

    async def redact(self, payload: bytes, content_type: str | None = None) -> Redacted:
        """The payload with every picture redacted; raises RefusedError."""


class Numbering:
    """The next sequence number of each stream; a stream is the records with the same candidate regions."""

    def __init__(self, last: Mapping[str, int]) -> None:
        self._last = dict(last)

    @contextmanager
    def next(self, regions: tuple[str, ...]) -> Iterator[int]:
        """The next number of the stream, from 1; it is used up only where the block ends without an exception."""
        stream = ",".join(regions)
        number = self._last.get(stream, 0) + 1
        yield number
        self._last[stream] = number


class Line:
    """Turns messages into ledger entries. Nothing that is raised on the way lets a message out.

    `pipeline` and `redactor` may be replaced in `turns.alone()`. `holds` counts by reason the records that began held.
    `now_ns` is Unix time, a recording's where one is judged.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        redactor: Redactor,
        numbering: Numbering,
        now_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self.pipeline = pipeline
        self.numbering = numbering
        self.redactor = redactor
        self.turns = Turns()
        self.holds: Counter[str] = Counter()
        self._now_ns = now_ns
        self._clock = WallClock()
        self._random = ""

    def observe(self, received_ns: int, monotonic_ns: int) -> None:
        """Note both clocks of anything that arrives: a step is known before the first message that it hits."""
        self._clock.observe(received_ns, monotonic_ns)

    async def entry(self, message: Message, key: IntakeKey | None) -> Store | Refused:
        """What the ledger keeps of this message. Cancelling loses nothing: the message stays unacknowledged."""
        try:
            plan = self.pipeline.examine(message, self._clock.observe(message.received_ns, message.monotonic_ns))
            payload, redaction = await self._redact(plan) if plan.redact else (message.payload, None)
            return self._store(plan, payload, redaction, key)
        except RefusedError as exc:
            return self._refused(message, exc.reason, key)
        except Exception as exc:  # noqa: BLE001 - whatever goes wrong, the message stays in the car
            log.error("line.failed", extra={"error": type(exc).__name__})  # noqa: TRY400 - a trace could quote the payload
            return self._refused(message, "internal.error", key)

    async def _redact(self, plan: Plan) -> tuple[bytes, Redaction]:
        clean = await self.redactor.redact(plan.message.payload, plan.message.content_type)
        redaction = Redaction(counts=clean.counts, pictures=clean.pictures, model_digest=clean.model_digest)
        return clean.payload, redaction

    def _store(self, plan: Plan, payload: bytes, redaction: Redaction | None, key: IntakeKey | None) -> Store:
        held, now_ns = isinstance(plan.decision, Hold), self._now_ns()
        with nullcontext(0) if held else self.numbering.next(plan.whereabouts.regions) as sequence:
            stamp = Stamp(record_id=self._record_id(coarse(now_ns, plan.rule)), sequence=sequence, now_ns=now_ns)
            record = self.pipeline.record(plan, payload, redaction, stamp)
        reason = plan.decision.reason if isinstance(plan.decision, Hold) else ""
        if reason:
            self.holds[reason] += 1
        return Store(record=record, intake=key, redaction=redaction, reason=reason)

    def _record_id(self, now_ns: int) -> str:
        """32 hexadecimal digits, unique and ascending with the time that the record may state.

        So neighbours in the ledger's index are written together.
        """
        if not self._random:
            self._random = secrets.token_hex(RANDOM_BYTES * IDS_AHEAD)
        tail, self._random = self._random[: 2 * RANDOM_BYTES], self._random[2 * RANDOM_BYTES :]
        return f"{now_ns:016x}{tail}"

    def _refused(self, message: Message, reason: str, key: IntakeKey | None) -> Refused:
        rule = self.pipeline.policy.rule_for(message.topic)
        data_class = rule.data_class if rule is not None else ""
        return Refused(reason=reason, time_ns=self._now_ns(), data_class=data_class or None, intake=key)
