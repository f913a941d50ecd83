"""The commands of `residency-agent` besides `run`: functions of their arguments that return text."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from agent.assembly import Setup
from agent.policy import is_loopback
from agent.settings import typed
from agent.settings.config import AgentConfig
from agent.settings.policy_config import PolicyConfig

UNREACHED = "# not reached: "


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A fix that a person asks about; without a time it is as old as the message."""

    latitude: float
    longitude: float
    accuracy_m: float
    time_ns: int | None = None


def check(setup: Setup) -> str:
    """What would be published where: a line per region and class, a line per rule, and warnings.

    Raises InvalidConfigError for mistakes in the policy's own borders.
    """
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
    known = setup.borders().countries
    for name, region in sorted(setup.policy.config.regions.items()):
        for country in sorted(set(region.countries) - known):
            yield f"regions.{name}.countries: the borders have no {country}: no record is ever of it"
    if not setup.manifest:
        yield f"model.manifest: {setup.manifest_path} does not exist or is empty: every picture will be refused"
    if not setup.trusted:
        yield "trust.keys_file is empty: whoever can write the policy decides what leaves"
    if not setup.config.signing.key_file:
        yield "signing.key_file is empty: records are not signed"
    if setup.config.vehicle.registration == "" and any(
        data_class.registration_bound for data_class in setup.policy.config.classes.values()
    ):
        yield "vehicle.registration is empty: classes that are bound to it may go nowhere"


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
    """A systemd drop-in that lets the agent reach the in-car broker and its endpoints' networks, and nothing else.

    What it cannot let through stands in it behind UNREACHED.
    """
    lines = [
        f"# Written by `residency-agent egress-rules` from policy {setup.policy.version}.",
        "# /etc/systemd/system/residency-agent.service.d/egress.conf",
        "[Service]",
        "IPAddressDeny=any",
        "IPAddressAllow=localhost",
    ]
    broker = setup.config.broker.host
    wanted = "write IPAddressAllow= with its address here, or name the address instead"
    lines += _allowed(broker, f"{UNREACHED}broker.host: {broker} is a name: {wanted}")
    for name, endpoint in sorted(setup.policy.endpoints.items()):
        host = endpoint.host
        if endpoint.networks:
            lines += [f"IPAddressAllow={network}" for network in endpoint.networks]
        else:
            why = f"{host} is a name without `networks`, so nothing can be allowed for it"
            lines += _allowed(host, f"{UNREACHED}endpoints.{name}: {why}")
    return "\n".join(lines)


def _allowed(host: str, otherwise: str) -> Iterator[str]:
    """What a host needs beside loopback; `otherwise` for a name, since systemd asks no DNS."""
    if is_loopback(host):
        return
    try:
        yield f"IPAddressAllow={ipaddress.ip_address(host)}"
    except ValueError:
        yield otherwise
