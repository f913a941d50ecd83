"""A trial: the real agent between real brokers on loopback, a recording replayed through it, and witnesses at the end.

Every endpoint of the policy becomes a broker of its own on a free port; its network settings are replaced, its name,
wire format and topic stay. Everything that a trial starts it also ends, on cancellation as well.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agent.errors import AgentError
from tools.agent_process import AgentProcess, agent
from tools.brokers import Broker, amqtt, installed, mosquitto
from tools.client import Address, connected, new_client
from tools.progress import Advance, progress
from tools.recording import Recorded, messages
from tools.replay import Outcome, Player
from tools.schedule import NO_OPTIONS, Due, Options, due
from tools.spool import Spool, spool_in
from tools.toml_text import toml_text
from tools.witness import Seen, Witness, witness

BROKERS = {"auto": installed, "mosquitto": mosquitto, "amqtt": amqtt}
SETTLE_SECONDS = 40.0  # after the last message: pictures wait for the detector, records for their PUBACK
KEPT_OF_AN_ENDPOINT = ("wire", "topic", "in_flight")
KEPT_ON_MQTT_5 = (*KEPT_OF_AN_ENDPOINT, "batch_records", "batch_compression")
AGENT_FILE, POLICY_FILE, LOG_FILE = "agent.toml", "policy.toml", "agent.log"

Place = Mapping[str, object]  # host, port and protocol of a broker
Sending = Callable[[Recorded, Recorded], None]


class TrialError(AgentError):
    """A trial that cannot begin."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What is tried: both configuration files as values, the recording and how it is replayed, a prepared folder."""

    agent: Mapping[str, Any]
    policy: Mapping[str, Any]
    recording: Path
    folder: Path
    options: Options = NO_OPTIONS
    broker: str = "auto"
    kill_after_s: float | None = None
    quiet: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """Everything that runs: the car's broker, a witness at each regional broker, the agent."""

    car: Address
    witnesses: dict[str, Witness]
    agent: AgentProcess


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """How it went: the agent's last status, what the regional brokers received, how the replay kept its times.

    `outcome` is None where nothing was replayed: the recording was judged offline.
    """

    status: dict[str, Any]
    outcome: Outcome | None
    seen: list[Seen] = field(repr=False)
    others: list[Seen] = field(repr=False)
    audit: str
    audit_intact: bool
    seconds: float


async def conduct(setting: Setting, on_sent: Sending, spool: Spool) -> Trial:
    """Set everything up, replay with fresh time stamps, wait until all is settled; what arrives is in the spool.

    `on_sent` gets each message as it was sent, and as it was recorded. Raises AgentError where something of the trial
    itself fails; safe to cancel.
    """
    begun = time.monotonic()
    counted = _Counted(on_sent)
    async with stage(setting, spool) as running:
        outcome, _ = await asyncio.gather(_replay(setting, running, counted), _kill(setting, running.agent))
        status = await _settled(running.agent, counted.count)
        await running.agent.stop()
        status |= {"counts": (await running.agent.status())["counts"]}
        intact, audit = await running.agent.audit()
        witnesses = running.witnesses.values()
        seen = [one for found in witnesses for one in found.records]
        others = [one for found in witnesses for one in found.others]
    return Trial(
        status=status,
        outcome=outcome,
        seen=seen,
        others=others,
        audit=audit,
        audit_intact=intact,
        seconds=time.monotonic() - begun,
    )


@asynccontextmanager
async def stage(setting: Setting, spool: Spool) -> AsyncIterator[Stage]:
    """Brokers, witnesses and a connected agent; raises AgentError where one of them does not start."""
    folder = setting.folder
    start = BROKERS[setting.broker]
    async with AsyncExitStack() as stack:
        car = await stack.enter_async_context(start(folder=folder / "brokers" / "car"))
        names = list(setting.policy["endpoints"])
        regional = {name: await stack.enter_async_context(start(folder=folder / "brokers" / name)) for name in names}
        witnesses = {
            name: stack.enter_context(witness(name, address_of(broker), spool)) for name, broker in regional.items()
        }
        configure(setting, _place(car), {name: _place(broker) for name, broker in regional.items()})
        process = await stack.enter_async_context(agent(folder / AGENT_FILE, folder / LOG_FILE))
        yield Stage(car=address_of(car), witnesses=witnesses, agent=process)


@contextmanager
def prepared(folder: Path) -> Iterator[Spool]:
    """Make the folder of a trial, with a spool in it; raises TrialError where there is something in it, OSError."""
    if folder.is_dir() and any(folder.iterdir()):
        message = f"{folder}: wanted a new or an empty folder, so that no earlier run's state counts"
        raise TrialError(message)
    folder.mkdir(parents=True, exist_ok=True)
    with spool_in(folder) as spool:
        yield spool


def address_of(broker: Broker) -> Address:
    """Where a broker of ours is, and the newest MQTT version that it speaks."""
    return Address(port=broker.port, protocol="5" if broker.kind == "mosquitto" else "3.1.1")


def configure(setting: Setting, car: Place, regional: Mapping[str, Place]) -> Path:
    """Write both files with our brokers in place of the real ones; other paths in them are left out or absolute.

    The policy is another file than the one that may have been signed, so no signature is asked for. Returns agent.toml.
    """
    given = setting.policy["endpoints"]
    endpoints = {
        name: {
            **{key: given[name][key] for key in _kept(place) if key in given[name]},
            **place,
            "tls": False,
        }
        for name, place in regional.items()
    }
    policy = {**setting.policy, "endpoints": endpoints, "rules": _rules(setting.policy["rules"], car)}
    vehicle = {**setting.agent, "broker": car, "paths": {"policy": POLICY_FILE, "state": "state"}}
    for table in ("credentials", "trust"):
        vehicle.pop(table, None)
    (setting.folder / POLICY_FILE).write_text(toml_text(policy), encoding="utf-8")
    (setting.folder / AGENT_FILE).write_text(toml_text(vehicle), encoding="utf-8")
    return setting.folder / AGENT_FILE


def _place(broker: Broker) -> Place:
    address = address_of(broker)
    return {"host": address.host, "port": address.port, "protocol": address.protocol}


def _kept(place: Place) -> tuple[str, ...]:
    """What of an endpoint stays: batches need MQTT 5."""
    return KEPT_ON_MQTT_5 if place["protocol"] == "5" else KEPT_OF_AN_ENDPOINT


def _rules(rules: list[dict[str, Any]], car: Place) -> list[dict[str, Any]]:
    """MQTT 3.1.1 drops properties: a rule that reads the capture time from one has to do with the arrival there."""
    if car["protocol"] == "5":
        return rules
    return [
        {key: value for key, value in rule.items() if key not in {"capture_time", "capture_unit"}}
        if str(rule.get("capture_time", "")).startswith("property:")
        else rule
        for rule in rules
    ]


class _Counted:
    """Passes sent messages on and counts them."""

    def __init__(self, on_sent: Sending) -> None:
        self.count = 0
        self._on_sent = on_sent

    def __call__(self, message: Recorded, one: Due) -> None:
        self._on_sent(message, one.message)
        self.count += 1


async def _replay(setting: Setting, running: Stage, counted: _Counted) -> Outcome:
    """Replay on a thread of its own; cancelling stops it."""

    def schedule() -> Iterator[Due]:
        return due(lambda: messages(setting.recording), setting.options)

    total = sum(1 for _ in schedule())
    client = new_client(running.car, "residency-trial")
    with connected(client, running.car), progress("replaying", total, quiet=setting.quiet) as advance:
        player = Player(client, fresh=True)

        def on_sent(message: Recorded, one: Due) -> None:
            counted(message, one)
            _show(advance, counted.count, running)

        work = asyncio.create_task(asyncio.to_thread(player.play, schedule(), on_sent=on_sent), name="replay")
        try:
            return await asyncio.shield(work)
        finally:
            player.stop()
            with contextlib.suppress(AgentError):
                await work


def _show(advance: Advance, sent: int, running: Stage) -> None:
    arrived = {name: len(found.records) for name, found in running.witnesses.items()}
    advance(sent, "arrived: " + ", ".join(f"{name} {count}" for name, count in arrived.items() if count))


async def _kill(setting: Setting, process: AgentProcess) -> None:
    if setting.kill_after_s is None:
        return
    await asyncio.sleep(setting.kill_after_s)
    await process.kill()
    await process.start()


async def _settled(process: AgentProcess, sent: int) -> dict[str, Any]:
    """Wait until everything sent is recorded and nothing is pending; after the limit, give what there is."""
    with contextlib.suppress(AgentError):
        return await process.until(
            lambda found, _pid: found["counts"]["received"] >= sent and not found["counts"]["pending"], SETTLE_SECONDS
        )
    return await process.status()
