"""The commands of `residency-agent` besides `run`: functions of their arguments that return text."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from agent import typed
from agent.assembly import Setup
from agent.config import AgentConfig
from agent.messages import Basis, Hold, Publish, Refuse, Whereabouts
from agent.policy_config import PolicyConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A position that a person asks about."""

    latitude: float
    longitude: float
    accuracy_m: float


def check(setup: Setup) -> str:
    """What would be published where: a line per region and class, a line per rule, and warnings."""
    classes = list(setup.policy.config.classes)
    rows = [["region", *classes]]
    rows += [
        [region, *(" ".join(setup.policy.permitted((region,), name)) or "-" for name in classes)]
        for region in setup.policy.everywhere
    ]
    rules = [["topic", "action", "class"]]
    rules += [[rule.topic, rule.action, rule.data_class or "-"] for rule in setup.policy.config.rules]
    rules.append(["(any other)", "refuse", "-"])
    warnings = [f"warning: {text}" for text in _warnings(setup)]
    return "\n".join([f"policy {setup.policy.version}", "", *_aligned(rows), "", *_aligned(rules), *warnings])


def _warnings(setup: Setup) -> Iterator[str]:
    yield from setup.policy.warnings()
    if not setup.manifest_path.is_file():
        yield f"model.manifest: {setup.manifest_path} does not exist: every picture will be refused"
    if not setup.config.signing.key_file:
        yield "signing.key_file is empty: records are not signed"
    if setup.config.vehicle.registration == "" and any(
        data_class.registration_bound for data_class in setup.policy.config.classes.values()
    ):
        yield "vehicle.registration is empty: classes that are bound to it may go nowhere"


def explain(setup: Setup, topic: str, place: Place | None) -> str:
    """Which rule, class, candidates, permitted endpoints and decision a message would meet, step by step."""
    policy, vehicle = setup.policy, setup.config.vehicle
    rule = policy.rule_for(topic)
    if rule is None:
        return f"topic       {topic}\nrule        none matches\ndecision    refuse: policy.no-rule"
    lines = [f"topic       {topic}", f"rule        {rule.topic} -> {rule.action}, class {rule.data_class or '-'}"]
    if rule.action == "refuse":
        return "\n".join([*lines, "decision    refuse: policy.refused"])
    whereabouts, steps = _whereabouts(setup, rule.basis, place)
    lines += steps
    lines.append(f"candidates  {', '.join(whereabouts.regions)} ({whereabouts.basis})")
    bound = policy.bound(rule.data_class, whereabouts, vehicle.registration)
    for region in bound:
        endpoints = " ".join(policy.permitted((region,), rule.data_class)) or "nothing"
        lines.append(f"permitted   by {region}: {endpoints}")
    lines.append(f"by all      {' '.join(policy.permitted(bound, rule.data_class)) or 'nothing'}")
    match policy.decide(rule.data_class, whereabouts, vehicle.registration):
        case Publish(endpoints=endpoints):
            lines.append(f"decision    publish to {endpoints[0]}" + "".join(f", else {name}" for name in endpoints[1:]))
        case Hold(reason=reason):
            hold_s = policy.data_class(rule.data_class).hold_s
            lines.append(f"decision    hold: {reason}; expires after {hold_s:g} s")
        case Refuse(reason=reason):
            lines.append(f"decision    refuse: {reason}")
    return "\n".join(lines)


def _whereabouts(setup: Setup, basis: str, place: Place | None) -> tuple[Whereabouts, list[str]]:
    policy, vehicle = setup.policy, setup.config.vehicle
    if basis == "registration":
        regions = policy.regions_of([vehicle.registration] if vehicle.registration else [])
        return Whereabouts(regions=regions, basis=Basis.REGISTRATION), []
    if vehicle.fixed_country:
        return Whereabouts(regions=policy.regions_of([vehicle.fixed_country]), basis=Basis.FIXED), []
    if place is None:
        return Whereabouts(regions=policy.everywhere), ["position    none: every region is a candidate"]
    countries = setup.borders().countries_near(place.latitude, place.longitude, place.accuracy_m)
    steps = [
        f"position    {place.latitude}, {place.longitude} within {place.accuracy_m:g} m",
        f"countries   {', '.join(sorted(countries))}",
    ]
    return Whereabouts(regions=policy.regions_of(countries)), steps


def reference() -> str:
    """Every key of both files as Markdown tables."""
    lines: list[str] = []
    for title, wanted in (("agent.toml", AgentConfig), ("policy.toml", PolicyConfig)):
        lines += [f"### {title}", "", "| key | type | default | meaning |", "|---|---|---|---|"]
        lines += [f"| `{key.name}` | {key.type} | {key.default} | {key.meaning} |" for key in typed.keys(wanted)]
        lines.append("")
    return "\n".join(lines)


def _aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def egress_rules(setup: Setup) -> str:
    """A systemd drop-in that lets the agent reach its endpoints' networks and nothing else."""
    lines = [
        f"# Written by `residency-agent egress-rules` from policy {setup.policy.version}.",
        "# /etc/systemd/system/residency-agent.service.d/egress.conf",
        "[Service]",
        "IPAddressDeny=any",
        "IPAddressAllow=localhost",
    ]
    for name, endpoint in sorted(setup.policy.endpoints.items()):
        networks = endpoint.networks or _own_address(endpoint.host)
        lines += [f"IPAddressAllow={network}" for network in networks]
        if not networks:
            lines.append(f"# endpoints.{name}: {endpoint.host} has no `networks`, so nothing can be allowed for it")
    return "\n".join(lines)


def _own_address(host: str) -> list[str]:
    try:
        return [str(ipaddress.ip_address(host))]
    except ValueError:
        return []
