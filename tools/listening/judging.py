"""What a received message is worth. Pure; the one place that says which records count as good."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from agent import topics
from agent.errors import EnvelopeError
from agent.wire import batch, presence
from agent.wire.addressing import PRESENCE_TEMPLATE, STATUS_TEMPLATE
from agent.wire.envelope import CONTENT_TYPE, MAX_ENVELOPE_BYTES, Envelope, received, verify

_NOTICES = tuple(template.format(vehicle="+") for template in (PRESENCE_TEMPLATE, STATUS_TEMPLATE))


class Verdict(StrEnum):
    """Every received message gets exactly one, but for a batch: there every record gets one."""

    GOOD = "good"
    NOTICE = "notice"
    MALFORMED = "malformed"
    UNSIGNED = "unsigned"
    FORGED = "forged"
    MISPLACED = "misplaced"


REFUSED = (Verdict.MALFORMED, Verdict.UNSIGNED, Verdict.FORGED, Verdict.MISPLACED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Expectations:
    """What makes a record good here.

    `keys`: trusted keys by id; None = signatures are not looked at. `may_hold`: whether this endpoint may hold a
    record with these candidate regions and this data class.
    """

    keys: Mapping[str, Ed25519PublicKey] | None
    may_hold: Callable[[tuple[str, ...], str], bool]
    max_bytes: int = MAX_ENVELOPE_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """A verdict; `envelope` is there wherever the bytes could be read, which alone makes nothing true."""

    verdict: Verdict
    envelope: Envelope | None = None
    detail: str = ""


def judge_all(
    topic: str,
    payload: bytes,
    content_type: str | None,
    user_properties: tuple[tuple[str, str], ...],
    expectations: Expectations,
) -> list[Judgement]:
    """Judge one message: each record of a batch as if it had come alone; a batch that cannot be read is one refusal."""
    if _is_notice(topic, content_type) or not batch.is_batch(payload, content_type):
        return [judge(topic, payload, content_type, user_properties, expectations)]
    try:
        members = batch.unpack(payload, content_type, expectations.max_bytes)
    except EnvelopeError as exc:
        return [Judgement(verdict=Verdict.MALFORMED, detail=str(exc))]
    return [judge(topic, member, CONTENT_TYPE, user_properties, expectations) for member in members]


def judge(
    topic: str,
    payload: bytes,
    content_type: str | None,
    user_properties: tuple[tuple[str, str], ...],
    expectations: Expectations,
) -> Judgement:
    """Judge one message that is no batch; the signature comes before the region.

    For without it nothing in the record is known.
    """
    if _is_notice(topic, content_type):
        return Judgement(verdict=Verdict.NOTICE)
    try:
        envelope = received(payload, content_type, user_properties, expectations.max_bytes)
    except EnvelopeError as exc:
        return Judgement(verdict=Verdict.MALFORMED, detail=str(exc))
    if expectations.keys is not None:
        try:
            verify(envelope, expectations.keys)
        except EnvelopeError as exc:
            verdict = Verdict.UNSIGNED if envelope.signature is None else Verdict.FORGED
            return Judgement(verdict=verdict, envelope=envelope, detail=str(exc))
    attributes = envelope.attributes
    if not expectations.may_hold(attributes.dataregion, attributes.dataclassification):
        detail = f"{attributes.dataclassification} captured in {','.join(attributes.dataregion)} must not be here"
        return Judgement(verdict=Verdict.MISPLACED, envelope=envelope, detail=detail)
    return Judgement(verdict=Verdict.GOOD, envelope=envelope)


def _is_notice(topic: str, content_type: str | None) -> bool:
    return content_type == presence.CONTENT_TYPE or any(topics.matches(notice, topic) for notice in _NOTICES)
