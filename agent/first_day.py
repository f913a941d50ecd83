"""`residency-agent init`: a commented configuration for some regions, cut out of the shipped examples.

The examples (`systemd/*.example.toml`) are the only source: what does not belong to the chosen regions is left out, and
what is known of the vehicle is written in. What is written passes `check`.
"""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from agent.errors import AgentError
from agent.policy import is_loopback

PACKAGE = Path(__file__).parent
BY_REGION = ("regions", "endpoints", "permit")
HEADER = re.compile(r"^\[(\w+)\.([\w-]+)\]")
CREDENTIALS = re.compile(r"^\[credentials\.cn\].*?(?=^\n)", re.MULTILINE | re.DOTALL)
SECTION = "# ---"
MODE = 0o644  # whoever can write them decides what leaves the vehicle
DRAFT_VERSION = "draft-1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Broker:
    """Where a broker listens; without a port it is MQTT's own."""

    host: str
    port: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What is known on the first day. `regions` are names of the example policy, `vehicle` is a pseudonymous URI."""

    vehicle: str
    regions: Sequence[str]
    registration: str = ""
    state: str = "/var/lib/residency-agent"
    broker: Broker = field(default_factory=lambda: Broker(host="127.0.0.1"))
    endpoints: Mapping[str, Broker] = field(default_factory=dict)


def example(name: str) -> str:
    """The text of a shipped example: inside the installed package, or in the checkout beside it."""
    installed = PACKAGE / "examples"
    folder = installed if installed.is_dir() else PACKAGE.parent / "systemd"
    return (folder / f"{name}.example.toml").read_text(encoding="utf-8")


def known_regions() -> list[str]:
    """The regions of the example policy."""
    return re.findall(r"^\[regions\.([\w-]+)\]", example("policy"), re.MULTILINE)


def write(folder: Path, wish: Wish) -> list[Path]:
    """Write agent.toml and policy.toml into the folder; AgentError where one is there already, or a wish is no good."""
    _check(wish)
    files = {folder / "agent.toml": agent_toml(wish), folder / "policy.toml": policy_toml(wish)}
    for file in files:
        if os.path.lexists(file):
            raise AgentError(f"{file} is there already and is not overwritten: name another folder, or move it away")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file, text in files.items():
            with file.open("x", encoding="utf-8") as out:
                out.write(text)
            file.chmod(MODE)
    except OSError as exc:
        raise AgentError(f"{exc.filename}: {exc.strerror}") from exc
    return list(files)


def _check(wish: Wish) -> None:
    known = known_regions()
    for name in (*wish.regions, *wish.endpoints):
        if name not in known:
            raise AgentError(f"{name!r} is no region of the example policy: {', '.join(known)}")
    for name in wish.endpoints.keys() - set(wish.regions):
        raise AgentError(f"endpoint {name!r} belongs to none of the chosen regions")
    if len(set(wish.regions)) != len(wish.regions):
        raise AgentError(f"each region once, not {','.join(wish.regions)}")
    if not wish.regions:
        raise AgentError(f"at least one region is needed: {', '.join(known)}")
    countries = {
        country
        for name, region in tomllib.loads(example("policy"))["regions"].items()
        for country in region["countries"]
        if name in wish.regions
    }
    if wish.registration and wish.registration not in countries:
        raise AgentError(f"registration {wish.registration!r} is a country of none of the chosen regions")
    for text in (wish.vehicle, wish.state):
        if not text.isprintable():
            raise AgentError(f"{text!r}: control characters, or bytes that are no UTF-8, cannot stand in agent.toml")
    if not name_of(wish.vehicle):
        raise AgentError(f"{wish.vehicle!r}: the vehicle's URI must end in its pseudonym, as urn:example:car-7 does")


def name_of(vehicle: str) -> str:
    """The vehicle's pseudonym in topics: the last part of its URI."""
    return re.split(r"[:/]", vehicle)[-1].translate(dict.fromkeys(map(ord, "+#$\0")))


def agent_toml(wish: Wish) -> str:
    """agent.toml of this vehicle."""
    text = example("agent")
    for key, value in (
        ("source", wish.vehicle),
        ("name", name_of(wish.vehicle)),
        ("registration", wish.registration),
        ("host", wish.broker.host),
        ("port", wish.broker.port or 1883),
        ("policy", "policy.toml"),
        ("state", wish.state),
    ):
        text = _set(text, key, value)
    return CREDENTIALS.sub(lambda block: _for_each(block[0], wish), text)


def _set(text: str, key: str, value: str | int) -> str:
    """The text with the first value of a key replaced; what follows it on its line stays."""
    wanted = re.compile(rf'^({key} = )("[^"]*"|\d+)', re.MULTILINE)
    changed, number = wanted.subn(lambda found: found[1] + json.dumps(value, ensure_ascii=False), text, count=1)
    if number != 1:
        raise AgentError(f"the shipped example has no key {key!r}")
    return changed


def _for_each(block: str, wish: Wish) -> str:
    """The credentials of each endpoint, after the pattern of the first."""
    return "\n".join(re.sub(r"\bcn\b", name, block) for name in wish.regions)


def policy_toml(wish: Wish) -> str:
    """policy.toml with the chosen regions only; endpoints of others are permitted nowhere."""
    text = "\n".join(_kept(example("policy").splitlines(), wish)) + "\n"
    return _set(text, "version", DRAFT_VERSION)


def _kept(lines: Sequence[str], wish: Wish) -> Iterator[str]:
    kind = name = ""
    for line in lines:
        found = HEADER.match(line)
        if found:
            kind, name = found.groups()
        elif line.startswith((SECTION, "[[")):
            kind = name = ""
        if kind in BY_REGION and name not in wish.regions:
            continue
        if kind == "endpoints" and line.startswith("host = ") and name in wish.endpoints:
            yield from _address(wish.endpoints[name])
        elif kind == "permit":
            yield re.sub(r"\[\"(.*)\"\]", lambda names: _permitted(names[1].split('", "'), wish), line)
        else:
            yield line


def _address(broker: Broker) -> Iterator[str]:
    yield f"host = {json.dumps(broker.host)}"
    if broker.port is not None:
        yield f"port = {broker.port}"
    if is_loopback(broker.host):
        yield "tls = false # only loopback may go without"


def _permitted(names: Sequence[str], wish: Wish) -> str:
    return json.dumps([name for name in names if name in wish.regions])
