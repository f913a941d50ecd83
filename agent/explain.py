"""Why a message goes where it goes: each step of the decision as a line, taken by the code that decides.

What is asked about is a message that arrives as soon as it was captured; one that waits on its way is in more doubt.
The fixes are believed at once, where the running agent waits for a second one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from agent import topics, wiring
from agent.assembly import Setup
from agent.commands import Place
from agent.messages import Capture, Fix, Hold, Message, Publish, Refuse, Whereabouts
from agent.pipeline import Identity, Pipeline
from agent.places.positions import PositionHistory, capture_of
from agent.settings.policy_config import Fields, Rule

SECOND = 10**9
BOOT_NS = 30 * 86_400 * SECOND  # monotonic time of the question: any, as long as the fixes are later than a boot


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A message on a topic, captured at `time_ns` (Unix), while the receiver said `places`, each with its time."""

    topic: str
    places: tuple[Place, ...] = ()
    time_ns: int


def explain(setup: Setup, question: Question) -> str:
    """Rule, class, position, candidates, what each region permits, and the decision."""
    steps = [("policy", setup.policy.version), ("topic", question.topic), *_steps(setup, question)]
    labels = ["", *(label for label, _ in steps)]
    return "\n".join(
        f"{'' if label == before else label:<12}{text}" for before, (label, text) in zip(labels, steps, strict=False)
    )


def _steps(setup: Setup, question: Question) -> Iterator[tuple[str, str]]:
    yield "intake", _intake(setup, question.topic)
    rule = setup.policy.rule_for(question.topic)
    if rule is None:
        yield "rule", "none matches"
        yield "decision", "refuse: policy.no-rule"
        return
    yield "rule", f"rules[{setup.policy.config.rules.index(rule)}] {rule.topic} -> {rule.action}"
    if rule.action == "refuse":
        yield "decision", "refuse: policy.refused"
        return
    yield "class", _data_class(setup, rule)
    yield from (("fields", text) for text in _fields(rule.fields))
    pipeline = _pipeline(setup, question)
    capture = _capture(rule, question)
    if rule.basis == "gnss" and not setup.config.vehicle.fixed_country:
        yield from _position(pipeline, question, capture)
    whereabouts = pipeline.locate(rule, capture)
    yield "candidates", f"{', '.join(whereabouts.regions)} ({whereabouts.basis})"
    yield from _permission(setup, rule, whereabouts)
    yield from _reach(setup, whereabouts)


def _intake(setup: Setup, topic: str) -> str:
    intake = setup.config.intake
    sessions = [("telemetry", name) for name in intake.telemetry] + [("pictures", name) for name in intake.pictures]
    taken = next(((session, name) for session, name in sessions if topics.matches(name, topic)), None)
    return f"{taken[1]} ({taken[0]} session)" if taken else "not subscribed to: such a message stays where it is"


def _data_class(setup: Setup, rule: Rule) -> str:
    found = setup.policy.data_class(rule.data_class)
    bound = ", bound to the registration" if found.registration_bound else ""
    return f"{rule.data_class}: {found.priority}, kept for {found.ttl_s:g} s, held for {found.held_s:g} s{bound}"


def _fields(fields: Fields | None) -> Iterator[str]:
    if fields is None:
        return
    for verb, places in (("keep only", fields.keep), ("drop", fields.drop), ("pseudonymise", fields.pseudonymise)):
        if places:
            yield f"{verb} {' '.join(places)}"
    for position in fields.positions:
        yield f"coarsen {position.latitude} {position.longitude} to {position.metres:g} m"
    for time in fields.times:
        yield f"coarsen {time.place} to {time.seconds} s"


def _pipeline(setup: Setup, question: Question) -> Pipeline:
    vehicle = setup.config.vehicle
    history = PositionHistory(replace(wiring.position_limits(setup), confirmations=1))
    for place in question.places:
        history.add(_fix(place, question))
    return Pipeline(
        identity=Identity(
            source=vehicle.source, boot_id="", registration=vehicle.registration, fixed_country=vehicle.fixed_country
        ),
        policy=setup.policy,
        borders=setup.borders(),
        positions=history,
        limits=wiring.inspection_limits(setup),
        signer=None,
    )


def _fix(place: Place, question: Question) -> Fix:
    time_ns = question.time_ns if place.time_ns is None else place.time_ns
    return Fix(
        latitude=place.latitude,
        longitude=place.longitude,
        accuracy_m=place.accuracy_m,
        time_ns=time_ns,
        monotonic_ns=BOOT_NS + time_ns - question.time_ns,
    )


def _capture(rule: Rule, question: Question) -> Capture:
    message = Message(topic=question.topic, payload=b"", received_ns=question.time_ns, monotonic_ns=BOOT_NS)
    return capture_of(message, question.time_ns if rule.capture_time else None, boot_id="")


def _position(pipeline: Pipeline, question: Question, capture: Capture) -> Iterator[tuple[str, str]]:
    yield "captured", f"{_moment(capture.time_ns)}, known to {capture.doubt_ns / SECOND:g} s"
    for place in question.places:
        when = "" if place.time_ns is None else f" at {_moment(place.time_ns)}"
        yield "fix", f"{place.latitude}, {place.longitude} within {place.accuracy_m:g} m (95 %){when}"
    discs = pipeline.positions.discs(capture)
    for disc in discs:
        countries = sorted(pipeline.borders.countries_near(disc.latitude, disc.longitude, disc.radius_m))
        yield (
            "position",
            f"{disc.latitude:.5f}, {disc.longitude:.5f} within {disc.radius_m:.0f} m: {', '.join(countries)}",
        )
    if not discs:
        yield "position", "no usable fix: the car may be anywhere"


def _permission(setup: Setup, rule: Rule, whereabouts: Whereabouts) -> Iterator[tuple[str, str]]:
    policy, registration = setup.policy, setup.config.vehicle.registration
    bound = policy.bound(rule.data_class, whereabouts, registration)
    for region in bound:
        origin = "" if region in whereabouts.regions else f" (registered in {registration or 'no country'})"
        yield "permits", f"{region}: {_names(policy.permitted((region,), rule.data_class))}{origin}"
    yield "all permit", _names(policy.permitted(bound, rule.data_class))
    match policy.decide(rule.data_class, whereabouts, registration):
        case Publish(endpoints=endpoints):
            yield "decision", f"publish to {', else '.join(endpoints)}"
        case Hold(reason=reason):
            held_s = policy.data_class(rule.data_class).held_s
            yield "decision", f"hold: {reason}; later fixes may settle it, it expires after {held_s:g} s"
        case Refuse(reason=reason):
            yield "decision", f"refuse: {reason}"


def _reach(setup: Setup, whereabouts: Whereabouts) -> Iterator[tuple[str, str]]:
    """What the policy says of connecting from there, where it says anything."""
    for region in whereabouts.regions:
        found = setup.policy.config.regions.get(region)
        if found is not None and found.reach:
            yield "reach", f"while the car may be in {region}, only {_names(found.reach)} may be connected to"


def _names(endpoints: Sequence[str]) -> str:
    return " ".join(endpoints) or "nothing"


def _moment(time_ns: int) -> str:
    return f"{datetime.fromtimestamp(time_ns / SECOND, UTC):%Y-%m-%dT%H:%M:%SZ}"
