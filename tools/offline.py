"""A trial without brokers: the agent's own line in this process, with the time of the recording.

What runs is the agent's code: the reading of fixes, inspection, location, policy, redaction, envelope, the counters of
the ledger. What does not run: MQTT, the ledger's disk, and the sandbox around the detector with its limits of time and
memory. An endpoint always takes what it is sent, so a record goes to the first endpoint of its route, and its latency
is the time that it was held.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

from msgspec import structs

from agent import assembly, status, wiring
from agent.assembly import Setup
from agent.errors import ModelError, RefusedError
from agent.intake.intake import Fixes
from agent.intake.line import Line, Numbering
from agent.intake.resolver import PAUSE_SECONDS
from agent.messages import Hold, Message, Publish, Record, State
from agent.pictures.formats import RedactedPayload
from agent.redaction.detector import Detector
from agent.redaction.redaction import redact_payload
from agent.redaction.worker import WorkerOptions
from agent.store import tally
from agent.store.entries import Store
from agent.topics import matches
from agent.wire import addressing, envelope
from tools.progress import progress
from tools.recording import Recorded, messages
from tools.schedule import due
from tools.schemas import NANOSECONDS
from tools.spool import Spool, Spooled
from tools.trial import Sending, Setting, Trial, configure
from tools.witness import Seen

NOWHERE = {"host": "127.0.0.1", "port": 1, "protocol": "5"}  # what stands in the configuration; nobody connects
NO_AUDIT = "none: an offline run keeps no ledger"
PAUSE_NS = round(PAUSE_SECONDS * NANOSECONDS)
BOOT_NS = NANOSECONDS * 86_400  # the car's monotonic clock at the first message


async def conduct(setting: Setting, on_sent: Sending, spool: Spool) -> Trial:
    """Take every message of the recording along the line; as `trial.conduct`, and as safe to cancel."""
    begun = time.monotonic()
    setup = assembly.load(configure(setting, NOWHERE, dict.fromkeys(setting.policy["endpoints"], NOWHERE)))
    car = _Car(setup, spool)
    schedule = due(lambda: messages(setting.recording), replace(setting.options, speed=1.0))
    with progress("judging", None, quiet=setting.quiet) as advance:
        for number, one in enumerate(schedule, start=1):
            on_sent(one.message, one.message)
            await car.take(one.message)
            advance(number, f"{one.at_s:.0f} s of the drive")
            await asyncio.sleep(0)
    car.look_again(force=True)
    return Trial(
        status={
            "counts": status.as_dict(tally.counts(car.cells.items()), {}),
            "model": {"digest": car.redactor.digest},
        },
        outcome=None,
        seen=car.seen,
        others=[],
        audit=NO_AUDIT,
        audit_intact=True,
        seconds=time.monotonic() - begun,
    )


@lru_cache(1)
def _detector(manifest: Path, _modified_ns: int, threads: int, *, far: bool) -> Detector:
    """One model is open per process, however many recordings it judges."""
    return Detector.open(manifest, threads=threads, far=far)


class InProcess:
    """Redacts pictures in this process; refuses what the agent's own process would refuse, but for its limits."""

    def __init__(self, options: WorkerOptions) -> None:
        self.digest = ""
        self._options = options

    async def redact(self, payload: bytes, content_type: str | None = None) -> RedactedPayload:
        """The payload with every picture redacted; raises RefusedError."""
        options = self._options
        try:
            modified_ns = options.manifest.stat().st_mtime_ns
            detector = _detector(options.manifest, modified_ns, options.threads, far=options.far)
        except (ModelError, OSError) as exc:
            raise RefusedError("redaction.model", str(exc)) from exc
        self.digest = detector.digest
        try:
            done = redact_payload(
                payload, detector.detect, options.redaction, options.limits, content_type, detector.wanted
            )
        except RefusedError:
            raise
        except Exception as exc:  # whatever a codec raises, as in the agent's process
            raise RefusedError("redaction.failed", type(exc).__name__) from exc
        return replace(done, model_digest=detector.digest)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Held:
    """A held record; its envelope is in the spool, not in it."""

    record: Record
    envelope: Spooled

    @property
    def subject(self) -> tally.Subject:
        """What the counters tell of it."""
        return _subject(self.record, self.envelope.length)

    def whole(self) -> Record:
        """The record with its envelope; raises SpoolError."""
        return structs.replace(self.record, envelope=self.envelope.read())


@dataclass(slots=True)
class _Car:
    """The agent of one drive: what it holds, what it has counted, what it has sent."""

    setup: Setup
    spool: Spool
    redactor: InProcess = field(init=False)
    seen: list[Seen] = field(default_factory=list)
    cells: tally.Cells = field(default_factory=dict)
    _held: list[_Held] = field(default_factory=list)
    _line: Line = field(init=False)
    _fixes: Fixes = field(init=False)
    _now_ns: int = 0
    _first_ns: int = 0
    _monotonic_ns: int = BOOT_NS
    _looked_ns: int = 0

    def __post_init__(self) -> None:
        setup = self.setup
        pipeline = wiring.pipeline(setup, wiring.signer(setup))
        self.redactor = InProcess(wiring.worker_options(setup))
        self._line = Line(pipeline, self.redactor, Numbering({}), lambda: self._now_ns)
        self._fixes = Fixes(wiring.fix_readers(setup), pipeline.positions)

    async def take(self, recorded: Recorded) -> None:
        """One message as it came over the in-car broker at its moment of receipt."""
        message = self._message(recorded)
        self._fixes.offer(message)
        intake = self.setup.config.intake
        if any(matches(one, message.topic) for one in (*intake.telemetry, *intake.pictures)):
            tally.add(self.cells, (tally.RECEIVED, tally.TOTAL, ""), 1)
            entry = await self._line.entry(message, None)
            if isinstance(entry, Store):
                self._stored(entry.record)
            else:
                subject = tally.Subject(regions=",".join(entry.regions), data_class=entry.data_class or "")
                tally.step(self.cells, State.REFUSED, subject, marks={tally.REASON: entry.reason})
        self.look_again()

    def look_again(self, *, force: bool = False) -> None:
        """Decide again about what is held, as the agent does: after new fixes, at most once a second."""
        due_now = self._fixes.arrived.is_set() and self._monotonic_ns - self._looked_ns >= PAUSE_NS
        if not (due_now or force) or not self._held:
            return
        self._fixes.taken()
        self._looked_ns = self._monotonic_ns
        held, self._held = self._held, []
        for one in held:
            self._reconsider(one)

    def _message(self, recorded: Recorded) -> Message:
        """The wall clock is that of the receipt; the monotonic one stands still where it was set back."""
        self._first_ns = self._first_ns or recorded.receipt_ns
        self._now_ns = recorded.receipt_ns
        self._monotonic_ns = max(self._monotonic_ns, BOOT_NS + recorded.receipt_ns - self._first_ns)
        return Message(
            topic=recorded.topic,
            payload=recorded.payload,
            received_ns=recorded.receipt_ns,
            monotonic_ns=self._monotonic_ns,
            content_type=recorded.properties.content_type,
            properties=recorded.properties.user,
        )

    def _stored(self, record: Record) -> None:
        if record.state is State.HELD:
            held = _Held(record=structs.replace(record, envelope=b""), envelope=self.spool.keep(record.envelope))
            self._held.append(held)
            tally.step(self.cells, State.HELD, held.subject)
            self._fixes.look_again()
        else:
            self._send(record)

    def _reconsider(self, held: _Held) -> None:
        pipeline, record = self._line.pipeline, held.record
        if record.expires_ns <= self._now_ns:
            self._end(held, State.EXPIRED, {})
            return
        whereabouts = pipeline.narrowed(record)
        decision = pipeline.verdict(record, whereabouts) if whereabouts else Hold(reason="")
        if isinstance(decision, Hold) or whereabouts is None:
            self._held.append(held)
        elif isinstance(decision, Publish):
            tally.step(self.cells, State.HELD, held.subject, -1)
            with self._line.numbering.next(whereabouts.regions) as number:
                released = pipeline.release(held.whole(), whereabouts, decision.endpoints, number)
            self._send(released)
        else:
            self._end(held, State.REFUSED, {tally.REASON: decision.reason})

    def _end(self, held: _Held, state: State, marks: dict[str, str]) -> None:
        tally.step(self.cells, State.HELD, held.subject, -1)
        tally.step(self.cells, state, held.subject, marks=marks)

    def _send(self, record: Record) -> None:
        """To the first endpoint for which the policy clears it at the last moment, as the uplink asks it."""
        policy, vehicle = self.setup.policy, self.setup.config.vehicle
        subject = _subject(record, len(record.envelope))
        endpoint = next((one for one in record.route if policy.clear(record, one, vehicle.registration)), None)
        if endpoint is None:
            tally.step(self.cells, State.REFUSED, subject, marks={tally.REASON: "policy.withdrawn"})
            return
        attributes = envelope.unpack(record.envelope).attributes
        topic = addressing.topic(policy.endpoints[endpoint].topic, attributes, vehicle.name)
        payload = self.spool.keep(record.envelope)
        self.seen.append(Seen(broker=endpoint, topic=topic, payload=payload, time_ns=self._now_ns))
        tally.step(self.cells, State.DELIVERED, subject, marks={tally.ENDPOINT: endpoint})


def _subject(record: Record, size: int) -> tally.Subject:
    return tally.Subject(regions=",".join(record.regions), data_class=record.data_class, size=size)
