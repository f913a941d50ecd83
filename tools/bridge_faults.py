"""The same fault for mosquitto's own bridge and for the agent: how much of what was acknowledged arrives.

The regional broker is away while a car publishes; then what forwards is killed with SIGKILL, a moment after the last
PUBACK, and all is started again. For the bridge that is the in-car broker itself; for the agent it is the agent, and
the in-car broker in front of it keeps what was not acknowledged. `python -m tools.bridge_faults` prints a table.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from agent.assembly import LEDGER_FILE
from agent.errors import EndpointError
from agent.mqtt.connection import Connection
from agent.mqtt.packets import Outgoing, Session
from agent.store.ledger import Ledger
from agent.wire import envelope
from tools.agent_process import AgentProcess
from tools.brokers import Broker, free_port, mosquitto

TOPIC = "vehicle/telemetry/speed"
WINDOW = 100  # publishes without PUBACK that the car's client allows itself
SETTLE_SECONDS = 1.0  # from the last PUBACK to the kill
QUIET_SECONDS = 8.0  # without a new arrival, nothing more is expected
POLL_SECONDS = 0.05
DURABLE = ("persistence true", "autosave_on_changes true", "autosave_interval 1")
BRIDGE = "connection out\naddress 127.0.0.1:{port}\ntopic vehicle/# out 1\nbridge_protocol_version mqttv50\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What one contender did. `rate`: messages per second until they were acknowledged and on the disk."""

    name: str
    acknowledged: int
    arrived: int
    duplicated: int
    rate: float

    @property
    def lost(self) -> int:
        """Acknowledged to the car, and never seen by the subscriber."""
        return self.acknowledged - self.arrived

    def row(self) -> str:
        """One line of the table; no rate without a guarantee to go with it."""
        rate = "-" if self.lost else f"{self.rate:.0f}"
        return f"{self.name:<38} {self.acknowledged:>12} {self.lost:>6} {self.duplicated:>10} {rate:>22}"


HEADER = f"{'':<38} {'acknowledged':>12} {'lost':>6} {'duplicated':>10} {'msg/s, all kept':>22}"


async def bridge(name: str, messages: int, lines: Sequence[str]) -> Outcome:
    """Mosquitto forwards by its bridge; `lines` are its persistence settings."""
    async with _region() as (region, seen):
        settings = [*lines, "max_queued_messages 0", *BRIDGE.format(port=region.port).splitlines()]
        async with mosquitto(config_lines=settings) as gateway:
            await asyncio.sleep(SETTLE_SECONDS)
            await region.kill()
            rate = messages / await _publish(gateway, range(messages))
            await asyncio.sleep(SETTLE_SECONDS)
            await gateway.kill()
            await region.start()
            await gateway.start()
            return await _outcome(name, messages, seen, rate, lambda payload: json.loads(payload)["n"])


async def agent(name: str, messages: int) -> Outcome:
    """The agent forwards. The first half of the messages is timed until all of it is on the disk."""
    async with _region() as (region, seen), mosquitto() as gateway:
        folder = Path(tempfile.mkdtemp(prefix="bridge-faults-"))
        _configure(folder, gateway.port, region.port)
        process = AgentProcess(folder / "agent.toml", folder / "agent.log")
        await process.start()
        try:
            await region.kill()
            half, started = messages // 2, time.monotonic()
            await _publish(gateway, range(half))
            await _durable(folder / "state" / LEDGER_FILE, half)
            rate = half / (time.monotonic() - started)
            await _publish(gateway, range(half, messages))
            await asyncio.sleep(SETTLE_SECONDS)
            await process.kill()
            await region.start()
            await process.start()
            return await _outcome(name, messages, seen, rate, _number_in_envelope)
        finally:
            await process.stop()


async def _durable(ledger: Path, messages: int) -> None:
    """Return once the ledger has received so many."""
    while Ledger.read_counts(ledger).received < messages:  # noqa: ASYNC110 - another process's file
        await asyncio.sleep(POLL_SECONDS)


def _number_in_envelope(payload: bytes) -> int:
    number: int = json.loads(envelope.unpack(payload).data)["n"]
    return number


def _configure(folder: Path, gateway: int, region: int) -> None:
    (folder / "policy.toml").write_text(
        f'version = "1"\n[regions.cn]\ncountries = ["CN"]\n[endpoints.cn]\nhost = "127.0.0.1"\nport = {region}\n'
        'tls = false\n[classes.telemetry]\n[permit.cn]\ntelemetry = ["cn"]\n'
        '[[rules]]\ntopic = "vehicle/telemetry/#"\naction = "forward"\nclass = "telemetry"\n',
        encoding="utf-8",
    )
    (folder / "agent.toml").write_text(
        f'[vehicle]\nsource = "urn:test:car"\nname = "car"\nfixed_country = "CN"\n[broker]\nport = {gateway}\n'
        '[intake]\ntelemetry = ["vehicle/telemetry/#"]\n',
        encoding="utf-8",
    )


@asynccontextmanager
async def _region() -> AsyncIterator[tuple[Broker, list[bytes]]]:
    """A regional broker that keeps everything, with a subscriber that comes back whenever the broker does."""
    seen: list[bytes] = []
    async with AsyncExitStack() as stack:
        broker = await stack.enter_async_context(mosquitto(config_lines=DURABLE, port=free_port()))
        subscriber = asyncio.create_task(_subscribe_loop(broker, seen), name="subscriber")
        try:
            yield broker, seen
        finally:
            subscriber.cancel()
            await asyncio.gather(subscriber, return_exceptions=True)


async def _subscribe_loop(broker: Broker, seen: list[bytes]) -> None:
    session = Session(
        host=broker.host, port=broker.port, client_id="subscriber", clean_start=False, session_expiry_s=3600
    )
    while True:
        connection = Connection(session, queue_limit=1000, queue_bytes=1 << 26)
        try:
            await connection.open()
            await connection.subscribe(["#"])
            while True:
                delivery = await connection.receive()
                seen.append(delivery.payload)
                connection.ack(delivery)
        except EndpointError:
            await asyncio.sleep(POLL_SECONDS)
        finally:
            connection.close()


async def _publish(gateway: Broker, numbers: range) -> float:
    """Publish numbered telemetry at QoS 1; seconds until the last PUBACK."""
    connection = Connection(Session(host=gateway.host, port=gateway.port, client_id="car"))
    await connection.open()
    room = asyncio.Semaphore(WINDOW)
    started = time.monotonic()
    pubacks = []
    for number in numbers:
        await room.acquire()
        payload = json.dumps({"n": number, "ts": time.time(), "speed": 17.5}).encode()
        puback = connection.publish(Outgoing(topic=TOPIC, payload=payload))
        puback.add_done_callback(lambda _: room.release())
        pubacks.append(puback)
    await asyncio.gather(*pubacks)
    seconds = time.monotonic() - started
    connection.close()
    return seconds


async def _outcome(name: str, messages: int, seen: list[bytes], rate: float, number: Callable[[bytes], int]) -> Outcome:
    """Wait until nothing more arrives, and count."""
    last, since = -1, time.monotonic()
    while time.monotonic() - since < QUIET_SECONDS:
        if len(seen) != last:
            last, since = len(seen), time.monotonic()
        await asyncio.sleep(POLL_SECONDS)
    counts = Counter(number(payload) for payload in seen)
    return Outcome(
        name=name,
        acknowledged=messages,
        arrived=len(counts),
        duplicated=sum(counts.values()) - len(counts),
        rate=rate,
    )


async def compare(messages: int) -> list[Outcome]:
    """All contenders, one after the other."""
    return [
        await bridge("mosquitto bridge, persistence true", messages, ["persistence true"]),
        await bridge("mosquitto bridge, autosave_on_changes", messages, DURABLE),
        await agent("residency-agent", messages),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; 1 where the agent lost something."""
    parser = argparse.ArgumentParser(prog="bridge_faults", description=__doc__)
    parser.add_argument("--messages", type=int, default=2000, help="default: %(default)s")
    outcomes = asyncio.run(compare(parser.parse_args(argv).messages))
    print("\n".join([HEADER, *(outcome.row() for outcome in outcomes)]))
    return int(outcomes[-1].lost > 0)


if __name__ == "__main__":
    sys.exit(main())
