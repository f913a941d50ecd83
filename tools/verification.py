"""One recording judged: conducted with the agent, held against the truth and the expectations."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from tools.expectations import Check, Expectations, checks, fields_of, permits_of
from tools.importing.truth import ATTACHMENT, Labelled, Truth
from tools.judge import Judge, Sent, Verdict, judge_counts
from tools.recording import Recorded, contents, messages
from tools.schemas import NANOSECONDS
from tools.spool import Spool
from tools.trial import Sending, Setting, Trial, TrialError

Conduct = Callable[[Setting, Sending, Spool], Awaitable[Trial]]


@dataclass(slots=True, kw_only=True)
class TruthLog:
    """What was sent, and where it was really captured as far as anybody says.

    `start_ns` is the receipt of the recording's first message; what was captured before counts as captured then.
    """

    expected: Expectations
    truth: Truth | None
    start_ns: int
    spool: Spool
    sent: list[Sent] = field(default_factory=list)
    objects: dict[tuple[str, int], Labelled] = field(init=False)

    def __post_init__(self) -> None:
        pictures = self.truth.pictures if self.truth else ()
        self.objects = {(one.topic, one.capture_ns): one for one in pictures}

    def note(self, message: Recorded, original: Recorded) -> None:
        """Keep one message as it was sent; `original` is how it was recorded. Raises SpoolError."""
        second = max(original.capture_ns - self.start_ns, 0) / NANOSECONDS
        labelled = self.objects.get((original.topic, original.capture_ns))
        self.sent.append(
            Sent(
                topic=message.topic,
                payload=self.spool.keep(message.payload),
                country=self.expected.country_at(second, self.truth, original.capture_ns),
                objects=labelled.objects if labelled else (),
                recorded_ns=original.moment_ns,
                captured_ns=message.capture_ns,
            )
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """How a recording went, and what became of each expectation; its text has no payloads, as that of a verdict."""

    sent: list[Sent] = field(repr=False)
    trial: Trial
    verdict: Verdict
    checks: list[Check]


async def judged(setting: Setting, expected: Expectations, conduct: Conduct, spool: Spool) -> Verification:
    """Conduct the trial and judge it; raises AgentError where the trial itself fails, or nothing is in it.

    The payloads stay in the spool. Safe to cancel.
    """
    start_ns = next((one.receipt_ns for one in messages(setting.recording)), 0)
    log = TruthLog(expected=expected, truth=_truth(setting.recording), start_ns=start_ns, spool=spool)
    trial = await conduct(setting, log.note, spool)
    if not log.sent:
        message = f"{setting.recording}: no message in it, or none in the part that is judged"
        raise TrialError(message)
    verdict = await asyncio.to_thread(_judge, log.sent, trial, setting)
    done = list(checks(expected, log.sent, verdict))
    return Verification(sent=log.sent, trial=trial, verdict=verdict, checks=done)


def _truth(recording: Path) -> Truth | None:
    attached = contents(recording).attachments.get(ATTACHMENT)
    try:
        return Truth.decode(attached) if attached is not None else None
    except msgspec.DecodeError as exc:
        message = f"{recording}: its {ATTACHMENT} is none: {exc}"
        raise TrialError(message) from exc


def _judge(sent: list[Sent], trial: Trial, setting: Setting) -> Verdict:
    verdict = Judge(sent, permits_of(setting.policy), fields_of(setting.policy)).judge(trial.seen)
    verdict.problems += judge_counts(trial.status["counts"], sent=len(sent), delivered=sum(verdict.arrived.values()))
    verdict.problems += [] if trial.audit_intact else [f"audit: {trial.audit}"]
    return verdict
