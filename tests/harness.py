"""A car for end-to-end tests: an in-car broker, regional brokers, the agent as its own process, plain subscribers."""

import asyncio
import json
import signal
import sys
import time
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import paho.mqtt.client as paho
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from agent import assembly, status
from agent.wire.envelope import unpack
from tools.brokers import mosquitto
from tools.witness import unbatched

SHENZHEN = (22.6329, 114.0580)
HONG_KONG = (22.3193, 114.1694)
LOK_MA_CHAU = (22.5160, 114.0680)  # on the border
REGIONS = {"cn": "CN", "hk": "HK"}


@dataclass
class Received:
    """One record as a subscriber on a regional broker saw it; `company`: how many came in its PUBLISH."""

    region: str
    topic: str
    payload: bytes
    company: int = 1

    @property
    def envelope(self):
        return unpack(self.payload)

    @property
    def attributes(self):
        return self.envelope.attributes

    @property
    def data(self):
        return self.envelope.data


class Client:
    """A plain paho client in its own thread: none of the agent's code."""

    def __init__(self, port, name, on_message=None):
        self._client = paho.Client(paho.CallbackAPIVersion.VERSION2, name, protocol=paho.MQTTv5)
        self._client.on_message = on_message
        self._subscribed = asyncio.Event()
        loop = asyncio.get_running_loop()
        self._client.on_subscribe = lambda *_: loop.call_soon_threadsafe(self._subscribed.set)
        properties = Properties(PacketTypes.CONNECT)
        properties.SessionExpiryInterval = 3600
        self._client.connect("127.0.0.1", port, clean_start=False, properties=properties)
        self._client.loop_start()

    async def subscribe(self, topic):
        self._client.subscribe(topic, qos=1)
        await self._subscribed.wait()

    def publish(self, topic, payload, user=(), content_type=None):
        """QoS 1; returns paho's info, whose `is_published` tells of the PUBACK."""
        properties = Properties(PacketTypes.PUBLISH)
        if user:
            properties.UserProperty = list(user)
        if content_type:
            properties.ContentType = content_type
        return self._client.publish(topic, payload, qos=1, properties=properties)

    def close(self):
        self._client.disconnect()
        self._client.loop_stop()


@dataclass
class Car:
    """What a test holds in its hands."""

    folder: Path
    inner: object
    outer: dict
    received: list[Received] = field(default_factory=list)
    client: Client | None = None
    process: asyncio.subprocess.Process | None = None
    news: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def config(self):
        return self.folder / "agent.toml"

    @property
    def log(self):
        return (self.folder / "agent.log").read_text()

    def configure(self, *, agent="", policy="", rules=None, endpoint=""):
        """Write both files; `agent` and `policy` are appended, `endpoint` is in the table of each endpoint."""
        endpoints = "".join(
            f'[endpoints.{name}]\nhost = "127.0.0.1"\nport = {broker.port}\ntls = false\n{endpoint}\n'
            f'[permit.{name}]\npicture = ["{name}"]\ntelemetry = ["{name}"]\n[regions.{name}]\n'
            f'countries = ["{REGIONS[name]}"]\n'
            for name, broker in self.outer.items()
        )
        (self.folder / "policy.toml").write_text(
            f'version = "test"\n{rules or RULES}\n{endpoints}\n[classes.telemetry]\n[classes.picture]\n'
            f'priority = "bulk"\n{policy}'
        )
        (self.folder / "agent.toml").write_text(
            f'[vehicle]\nsource = "urn:test:car"\nname = "car"\n[broker]\nport = {self.inner.port}\n{AGENT}{agent}'
        )

    async def start(self, log_level="info"):
        """Start the agent and wait until both sessions with the in-car broker are there."""
        before = self.log.count("intake.connected") if (self.folder / "agent.log").exists() else 0
        with (self.folder / "agent.log").open("ab") as log:
            self.process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "agent", "run", "--log-level", log_level, str(self.config)),
                stdout=log,
                stderr=log,
            )
        await self.until(lambda: self.log.count("intake.connected") >= before + 2)

    async def stop(self, number=signal.SIGTERM):
        process, self.process = self.process, None
        if process is not None and process.returncode is None:
            process.send_signal(number)
            await process.wait()
        return process.returncode if process is not None else None

    async def until(self, condition, every=0.05):
        """Wait for what must happen; the test's own timeout ends it."""
        while not condition():
            if self.process is not None and self.process.returncode is not None:
                raise AssertionError(f"the agent ended with {self.process.returncode}\n{self.log}")
            await asyncio.sleep(every)

    def drive(self, place, *, accuracy=10.0, ts=None):
        latitude, longitude = place
        fix = {"lat": latitude, "lon": longitude, "acc": accuracy, "ts": time.time() if ts is None else ts}
        return self.client.publish("vehicle/gnss", json.dumps(fix))

    async def at(self, place):
        """Drive to a place far from the last one: enough fixes and time for it to be believed."""
        before = self.fixes()
        for _ in range(3):
            self.drive(place)
            await asyncio.sleep(0.06)
        while self.fixes() < before + 3:  # a receiver goes on; a fix that may have waited in the broker is not accepted
            await asyncio.sleep(0.5)
            self.drive(place)

    def fixes(self):
        """Fixes that this process of the agent has accepted."""
        content = status.read(self.folder / "state" / "status.json")
        return content["fixes"]["accepted"] if content.get("pid") == self.process.pid else 0

    def telemetry(self, number, **more):
        return self.client.publish("vehicle/telemetry/speed", json.dumps({"n": number, "ts": time.time(), **more}))

    def status(self):
        folder = self.folder / "state"
        return status.gather(folder / assembly.LEDGER_FILE, folder / assembly.STATUS_FILE)

    def counts(self):
        return self.status()["counts"]

    def numbers(self, region):
        """The `n` of all telemetry that arrived in a region."""
        rows = [row for row in self.received if row.region == region and "telemetry" in row.topic]
        return [json.loads(row.data)["n"] for row in rows]


DURABLE = ["max_queued_messages 0", "persistence true", "autosave_on_changes true", "autosave_interval 1"]

RULES = """
[[rules]]
topic = "vehicle/camera/cabin"
action = "refuse"
[[rules]]
topic = "vehicle/camera/+"
action = "redact"
class = "picture"
capture_time = "property:time"
capture_unit = "ns"
[[rules]]
topic = "vehicle/telemetry/#"
action = "forward"
class = "telemetry"
capture_time = "/ts"
"""

AGENT = """
[intake]
telemetry = ["vehicle/telemetry/#", "vehicle/other/#"]
pictures = ["vehicle/camera/#"]
[[position]]
topic = "vehicle/gnss"
accuracy = "/acc"
time = "/ts"
[limits]
payload_bytes = 2000000
picture_pixels = 4000000
[paths]
state = "state"
"""


@asynccontextmanager
async def car(folder, regions=("cn", "hk"), lines=()):
    """Brokers, subscribers on every regional one, and a configured agent that the test starts.

    `lines` are more of the regional brokers' configuration.
    """
    async with AsyncExitStack() as stack:
        inner = await stack.enter_async_context(mosquitto(config_lines=["max_queued_messages 0"]))
        outer = {
            name: await stack.enter_async_context(
                mosquitto(config_lines=[*DURABLE, *lines], folder=folder / f"broker-{name}")
            )
            for name in regions
        }
        made = Car(folder=folder, inner=inner, outer=outer)
        made.configure()
        loop = asyncio.get_running_loop()
        for name, broker in outer.items():

            def on_message(_client, _userdata, message, name=name):
                found = unbatched(bytes(message.payload), getattr(message.properties, "ContentType", None))
                received = [
                    Received(region=name, topic=message.topic, payload=payload, company=len(found)) for payload in found
                ]
                loop.call_soon_threadsafe(made.received.extend, received)

            subscriber = Client(broker.port, f"subscriber-{name}", on_message)
            stack.callback(subscriber.close)
            await subscriber.subscribe("#")
        made.client = Client(inner.port, "car")
        stack.callback(made.client.close)
        stack.push_async_callback(made.stop)
        try:
            yield made
        except BaseException:
            sys.stderr.write(json.dumps(status.read(folder / "state" / "status.json"), indent=1) + made.log[-5000:])
            raise
