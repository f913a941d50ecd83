"""The straight line of one message: inspect, locate, decide, (redact,) envelope. Pure: time and identity are arguments.

The daemon calls `examine`, lets the redaction process work where `Plan.redact` says so, and calls `record`. Whatever
cannot be shown to be permitted leaves as RefusedError with a constant reason. What is held is redacted before it is
held, and `reconsider` looks at it again when later fixes have narrowed the doubt.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import msgspec
from msgspec.structs import replace

from agent.errors import EnvelopeError, RefusedError
from agent.messages import (
    Basis,
    Capture,
    Decision,
    Held,
    Hold,
    Message,
    Priority,
    Publish,
    Record,
    Redaction,
    Refuse,
    State,
    Whereabouts,
)
from agent.payloads.fields import FieldRules, apply_field_rules
from agent.payloads.inspection import Contents, InspectionLimits, inspect
from agent.places.capture import stated_ns
from agent.places.positions import PositionHistory, capture_of
from agent.places.regions import RegionMap
from agent.policy import Policy
from agent.settings.policy_config import Rule
from agent.wire.attributes import Attributes, traceparent_or_none
from agent.wire.envelope import pack, repack
from agent.wire.signing import Signer

EVENT_TYPE = "residency-agent.record.v1"
SECOND = 10**9
PRIORITIES: Mapping[str, Priority] = {"urgent": Priority.URGENT, "live": Priority.LIVE, "bulk": Priority.BULK}


PICTURE_TYPES = {b"\xff\xd8": "image/jpeg", b"\x89P": "image/png", b"RI": "image/webp"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """This vehicle: `source` is the CloudEvents source; countries are ISO codes or empty."""

    source: str
    boot_id: str
    registration: str = ""
    fixed_country: str = ""


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What was decided of a message before its pictures were redacted."""

    message: Message
    rule: Rule
    capture: Capture
    whereabouts: Whereabouts
    decision: Publish | Hold
    media_type: str
    redact: bool


class Stamp(msgspec.Struct, frozen=True, kw_only=True):
    """What the daemon adds to a record: its id, its number in the stream of its regions, and the time now."""

    record_id: str
    sequence: int
    now_ns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Pipeline:
    """The decisions of one vehicle under one policy. It reads the fix history and holds no state of its own."""

    identity: Identity
    policy: Policy
    borders: RegionMap
    positions: PositionHistory
    limits: InspectionLimits
    signer: Signer | None
    field_rules: Mapping[str, FieldRules] = field(default_factory=dict)

    def examine(self, message: Message, step_ns: int = 0) -> Plan:
        """Decide everything that can be decided without decoding a picture; raises RefusedError.

        `step_ns`: how far the wall clock was stepped lately.
        """
        rule = self.policy.rule_for(message.topic)
        if rule is None:
            raise RefusedError("policy.no-rule")
        if rule.action == "refuse":
            raise RefusedError("policy.refused")
        if len(message.payload) > self.limits.max_bytes:
            raise RefusedError("payload.limit.bytes")
        found = self._inspect(rule, message)
        capture = capture_of(message, stated_ns(rule, message), boot_id=self.identity.boot_id, step_ns=step_ns)
        whereabouts = self.locate(rule, capture)
        decision = self._decide(rule.data_class, whereabouts)
        if isinstance(decision, Refuse):
            raise RefusedError(decision.reason)
        return Plan(
            message=message,
            rule=rule,
            capture=capture,
            whereabouts=whereabouts,
            decision=decision,
            media_type=message.content_type or media_type(message.payload, found),
            redact=found.pictures,
        )

    def _inspect(self, rule: Rule, message: Message) -> Contents:
        found = inspect(message.payload, self.limits, message.content_type)
        if found.opaque and rule.opaque != "forward":
            raise RefusedError("payload.opaque")
        if rule.action == "redact" and not found.pictures:
            raise RefusedError("payload.no-picture")
        return found

    def locate(self, rule: Rule, capture: Capture) -> Whereabouts:
        """Every region in which the message may have been captured, as far as is known now."""
        identity = self.identity
        if rule.basis == "registration":
            countries = [identity.registration] if identity.registration else []
            return Whereabouts(regions=self.policy.regions_of(countries), basis=Basis.REGISTRATION)
        if identity.fixed_country:
            return Whereabouts(regions=self.policy.regions_of([identity.fixed_country]), basis=Basis.FIXED)
        return Whereabouts(regions=self._regions(capture), basis=Basis.GNSS)

    def here(self, monotonic_ns: int, time_ns: int) -> tuple[str, ...]:
        """The regions in which the vehicle may be now."""
        if self.identity.fixed_country:
            return self.policy.regions_of([self.identity.fixed_country])
        return self._regions(Capture(time_ns=time_ns, monotonic_ns=monotonic_ns, boot_id=self.identity.boot_id))

    def _regions(self, capture: Capture) -> tuple[str, ...]:
        """The regions that touch every disc; where the discs contradict each other, every region."""
        discs = self.positions.discs(capture)
        if not discs:
            return self.policy.everywhere
        near = (self.borders.countries_near(disc.latitude, disc.longitude, disc.radius_m) for disc in discs)
        first, *others = (self.policy.regions_of(countries) for countries in near)
        return (tuple(sorted(set(first).intersection(*others))) if others else first) or self.policy.everywhere

    def _decide(self, data_class: str, whereabouts: Whereabouts) -> Decision:
        return self.policy.decide(data_class, whereabouts, self.identity.registration)

    def _left(self, plan: Plan, payload: bytes) -> bytes:
        """The payload as the rule's field rules leave it; raises RefusedError where they cannot be applied."""
        rules = self.field_rules.get(plan.rule.topic)
        return payload if rules is None else apply_field_rules(payload, rules, plan.media_type)

    def record(self, plan: Plan, payload: bytes, redaction: Redaction | None, stamp: Stamp) -> Record:
        """The record of a message whose payload may leave; raises RefusedError where the wire cannot carry it."""
        data_class = self.policy.data_class(plan.rule.data_class)
        held = isinstance(plan.decision, Hold)
        lifetime_s = data_class.held_s if held else data_class.ttl_s
        try:
            attributes = self._attributes(plan, redaction, stamp)
        except EnvelopeError as exc:
            raise RefusedError("message.malformed", str(exc)) from exc
        return Record(
            id=stamp.record_id,
            state=State.HELD if held else State.PENDING,
            route=() if isinstance(plan.decision, Hold) else plan.decision.endpoints,
            regions=plan.whereabouts.regions,
            basis=plan.whereabouts.basis,
            data_class=plan.rule.data_class,
            topic=plan.message.topic,
            priority=PRIORITIES[data_class.priority],
            capture=plan.capture,
            recorded_ns=stamp.now_ns,
            expires_ns=stamp.now_ns + round(lifetime_s * SECOND),
            sequence=stamp.sequence,
            envelope=pack(attributes, self._left(plan, payload), self.signer),
        )

    def _attributes(self, plan: Plan, redaction: Redaction | None, stamp: Stamp) -> Attributes:
        return Attributes(
            id=stamp.record_id,
            source=self.identity.source,
            type=EVENT_TYPE,
            subject=plan.message.topic,
            time_ns=coarse(max(plan.capture.time_ns, 0), plan.rule),
            datacontenttype=plan.media_type,
            dataregion=plan.whereabouts.regions,
            regionbasis=plan.whereabouts.basis,
            dataclassification=plan.rule.data_class,
            policyversion=self.policy.version,
            recordedtime_ns=coarse(stamp.now_ns, plan.rule),
            sequence=stamp.sequence,
            redaction=redaction.summary() if redaction is not None else None,
            modeldigest=redaction.model_digest if redaction is not None else None,
            traceparent=traceparent_or_none(plan.message.property("traceparent")),
        )

    def narrowed(self, record: Record | Held) -> Whereabouts | None:
        """The candidates of a held record as far as is known now, where they are fewer; None where nothing changed.

        They must all be among those that it carries: a region that it does not name may be one that an earlier policy
        called otherwise, and then what the names have in common says nothing.
        """
        if record.basis is not Basis.GNSS:
            return None
        regions = self._regions(record.capture)
        if regions == record.regions or not set(regions) <= set(record.regions):
            return None
        return Whereabouts(regions=regions, basis=record.basis)

    def verdict(self, record: Record | Held, whereabouts: Whereabouts) -> Decision:
        """What the policy says of a stored record with these candidates."""
        return self.policy.again(record, whereabouts, self.identity.registration)

    def rerouted(self, record: Record, route: tuple[str, ...]) -> Record:
        """A stored record under this policy's decision (no route: held), the record itself where nothing changes.

        It ends no later than before. What it carries stays; the tag names the policy that gave it its route.
        """
        data_class = self.policy.data_class(record.data_class)
        lifetime_s = data_class.ttl_s if route else data_class.held_s
        changed = replace(
            record,
            state=State.PENDING if route else State.HELD,
            route=route,
            priority=PRIORITIES[data_class.priority],
            expires_ns=min(record.expires_ns, record.recorded_ns + round(lifetime_s * SECOND)),
        )
        if changed == record:
            return record
        envelope = repack(record.envelope, self.signer, policyversion=self.policy.version)
        return replace(changed, envelope=envelope)

    def release(self, record: Record, whereabouts: Whereabouts, route: tuple[str, ...], sequence: int) -> Record:
        """A held record with its narrowed candidates and its route: tagged, numbered and signed anew."""
        data_class = self.policy.data_class(record.data_class)
        return replace(
            record,
            state=State.PENDING,
            route=route,
            regions=whereabouts.regions,
            sequence=sequence,
            expires_ns=record.recorded_ns + round(data_class.ttl_s * SECOND),
            envelope=repack(
                record.envelope,
                self.signer,
                dataregion=whereabouts.regions,
                policyversion=self.policy.version,
                sequence=sequence,
            ),
        )


def coarse(time_ns: int, rule: Rule) -> int:
    """A moment (Unix ns) as a record may state it: a time that its rule coarsens must not stand elsewhere in it."""
    step_ns = max((time.seconds for time in rule.fields.times), default=0) * SECOND if rule.fields else 0
    return time_ns - time_ns % step_ns if step_ns else time_ns


def media_type(payload: bytes, contents: Contents) -> str:
    """The content type of a payload whose sender stated none, as far as its first bytes tell."""
    if contents.whole:
        return PICTURE_TYPES.get(payload[:2], "application/octet-stream")
    return "application/json" if payload.lstrip()[:1] in {b"{", b"["} else "application/octet-stream"
