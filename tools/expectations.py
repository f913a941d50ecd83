"""What a recording is expected to lead to: a TOML file in, checks with findings out. No clock, no network, no disk.

[[stretch]]                      # the truth about the place; what is sent here is judged by this country's permits
from_s = 0
to_s = 250
country = "CN"

[[never]]                        # no message of these topics reaches any broker
topic = "vehicle/camera/cabin"

[[reach]]                        # at least (and at most) so many messages reach a broker
topic = "vehicle/telemetry/#"
endpoint = "cn"
at_least = 100

[[masked]]                       # at least so many objects are masked in the delivered pictures
label = "person"
at_least = 10

[latency]                        # from capture to the regional broker, of what was delivered
topic = "vehicle/telemetry/#"
p99_ms = 2000
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from agent.errors import AgentError
from agent.topics import matches
from tools.importing.truth import Truth
from tools.judge import Delivery, FieldsOf, Permits, Sent, Verdict
from tools.leaves import Fields

UNKNOWN = "?"  # the country of a message that no stretch and no ground truth speaks about
EXAMPLES = 5


class ExpectationError(AgentError, ValueError):
    """A file of expectations that cannot be meant; the message names file and key."""


class Stretch(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The car was in this country from one second of the recording to another; half-open."""

    country: str
    from_s: float = 0.0
    to_s: float = float("inf")


class Never(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Messages that must stay in the car."""

    topic: str


class Reach(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Messages that must arrive."""

    topic: str
    endpoint: str
    at_least: int = 0
    at_most: float = float("inf")


class Masked(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Objects that must be masked."""

    label: str
    at_least: int


class Latency(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How long delivered messages may have taken."""

    p99_ms: float
    topic: str = "#"


class Expectations(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole file; every part may be absent."""

    stretch: tuple[Stretch, ...] = ()
    never: tuple[Never, ...] = ()
    reach: tuple[Reach, ...] = ()
    masked: tuple[Masked, ...] = ()
    latency: Latency | None = None

    def country_at(self, second: float, truth: Truth | None, time_ns: int) -> str:
        """The country of a moment: of the first stretch that holds it, else of the recording's own ground truth."""
        stated = next((one.country for one in self.stretch if one.from_s <= second < one.to_s), None)
        return stated or (truth.country_at(time_ns) if truth else UNKNOWN)


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One expectation and what became of it; `found` says more where it was not met."""

    name: str
    passed: bool
    wanted: str
    found: str


def read_expectations(path: Path | None) -> Expectations:
    """Read the file; without one nothing is expected beyond what always holds. Raises ExpectationError."""
    if path is None:
        return Expectations()
    try:
        return msgspec.convert(tomllib.loads(path.read_text(encoding="utf-8")), Expectations)
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError, msgspec.ValidationError) as exc:
        message = f"{path}: {exc}"
        raise ExpectationError(message) from exc


def permits_of(policy: Mapping[str, Any]) -> Permits:
    """What a policy.toml permits, read from its values without the agent's code: first rule, then the permit table.

    Raises ExpectationError for values that are no policy's.
    """
    try:
        region_of = {code: name for name, region in policy["regions"].items() for code in region["countries"]}
        rules = [(one["topic"], "" if one["action"] == "refuse" else one["class"]) for one in policy["rules"]]
        endpoints, permit = tuple(policy["endpoints"]), {name: dict(row) for name, row in policy["permit"].items()}
    except (AttributeError, KeyError, TypeError, ValueError) as exc:
        message = f"the policy cannot be read: {type(exc).__name__}: {exc}"
        raise ExpectationError(message) from exc

    def permitted(country: str, topic: str) -> tuple[str, ...]:
        data_class = next((found for pattern, found in rules if matches(pattern, topic)), "")
        if not data_class:
            return ()
        if country == UNKNOWN:
            return endpoints
        return tuple(permit.get(region_of.get(country, ""), {}).get(data_class, ()))

    return permitted


def fields_of(policy: Mapping[str, Any]) -> FieldsOf:
    """What the field rules of a policy.toml take out or change, by topic; read without the agent's code.

    Raises ExpectationError for values that are no policy's.
    """
    try:
        rules = [(one["topic"], Fields.of(one["fields"]) if "fields" in one else None) for one in policy["rules"]]
    except (AttributeError, KeyError, TypeError, ValueError) as exc:
        message = f"the policy cannot be read: {type(exc).__name__}: {exc}"
        raise ExpectationError(message) from exc
    return lambda topic: next((found for pattern, found in rules if matches(pattern, topic)), None)


def checks(expected: Expectations, sent: Sequence[Sent], verdict: Verdict) -> Iterator[Check]:
    """Hold a run against what is expected, in the order of the file; first what always holds."""
    yield Check(
        name="promises",
        passed=not verdict.problems,
        wanted="no record out of place, pictures redacted, everything accounted for",
        found=_some(verdict.problems) or "as wanted",
    )
    for never in expected.never:
        yield _never(never, sent, verdict.deliveries)
    for reach in expected.reach:
        yield _reach(reach, sent, verdict.deliveries)
    for masked in expected.masked:
        found = verdict.masked[masked.label]
        yield _check(f"masked {masked.label}", found >= masked.at_least, f"at least {masked.at_least}", str(found))
    if expected.latency:
        yield _latency(expected.latency, sent, verdict.deliveries)


def _never(never: Never, sent: Sequence[Sent], deliveries: Sequence[Delivery]) -> Check:
    arrived = [one for one in deliveries if matches(never.topic, sent[one.sent].topic)]
    found = _some([f"{sent[one.sent].topic} at {one.broker}" for one in arrived]) or "none"
    return _check(f"never {never.topic}", not arrived, "nothing arrives", found)


def _reach(reach: Reach, sent: Sequence[Sent], deliveries: Sequence[Delivery]) -> Check:
    number = len(
        {one.sent for one in deliveries if one.broker == reach.endpoint and matches(reach.topic, sent[one.sent].topic)}
    )
    wanted = f"at least {reach.at_least}" + (f", at most {reach.at_most:g}" if reach.at_most < float("inf") else "")
    name = f"reach {reach.topic} at {reach.endpoint}"
    return _check(name, reach.at_least <= number <= reach.at_most, wanted, str(number))


def _latency(latency: Latency, sent: Sequence[Sent], deliveries: Sequence[Delivery]) -> Check:
    late = [
        (one.time_ns - sent[one.sent].captured_ns) / 1e6
        for one in deliveries
        if matches(latency.topic, sent[one.sent].topic)
    ]
    p99 = float(np.percentile(late, 99)) if late else float("inf")
    return _check(f"latency {latency.topic}", p99 <= latency.p99_ms, f"p99 <= {latency.p99_ms:g} ms", f"{p99:.0f} ms")


def _check(name: str, passed: bool, wanted: str, found: str) -> Check:  # noqa: FBT001 - the four fields in their order
    return Check(name=name, passed=passed, wanted=wanted, found=found)


def _some(lines: Sequence[str]) -> str:
    rest = len(lines) - EXAMPLES
    return "; ".join(lines[:EXAMPLES]) + (f"; and {rest} more" if rest > 0 else "")
