"""The rehearsal: the whole agent drives across a border and back while endpoints die, DNS lies and brokers beckon.

The car is a network namespace of its own, so that every packet which leaves it is seen. Time is in lapse: the car
drives at 900 m/s, which the agent is told is possible.
"""

import asyncio
import json
import signal
import socket
import sys
import threading
import time
from bisect import bisect
from contextlib import ExitStack
from dataclasses import dataclass, field

import netns
import paho.mqtt.client as paho
import pytest
from authority import Authority
from netns import TCP, UDP, Resolver, Wire, question_of
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from peers import CONNACK, MOVED, Peer, farewell, reference, server_context

from agent import status
from agent.assembly import SHIPPED_BORDERS
from agent.places.regions import RegionMap
from agent.wire.envelope import unpack
from tools.brokers import mosquitto_path

DNS = "10.77.0.53"
CN, CN_SPARE, HK = "10.81.0.10", "10.81.0.20", "10.82.0.10"
TRAP, TRAP_6 = "203.0.113.7", "2001:db8::7"
CN_NAME, HK_NAME = "mqtt.cn.test", "mqtt.hk.test"
HONEST = {CN_NAME: [CN], HK_NAME: [HK]}
ADDRESSES = {"cn": CN, "spare": CN_SPARE, "hk": HK}
PORT = 8883
INNER, WATCH = 1883, {"cn": 1901, "spare": 1902, "hk": 1903}

LONGITUDE = 114.075
SHENZHEN, HONG_KONG = 22.570, 22.473  # the border at this longitude is near 22.521; both are beyond all doubt
METRES_PER_DEGREE = 110_750.0  # of latitude, at 22 degrees north
SPEED_MPS = 900.0
TICK_SECONDS = 0.1

AGENT = f"""
[vehicle]
source = "urn:test:car"
name = "car"
[broker]
port = {INNER}
[intake]
telemetry = ["vehicle/telemetry/#"]
[[position]]
topic = "vehicle/gnss"
accuracy = "/acc"
time = "/ts"
[motion]
max_speed_mps = 1000.0
[paths]
state = "state"
"""

POLICY = """
version = "rehearsal"
[[rules]]
topic = "vehicle/telemetry/#"
action = "forward"
class = "telemetry"
capture_time = "/ts"
[classes.telemetry]
[regions.cn]
countries = ["CN"]
reach = ["cn", "spare"]
[regions.hk]
countries = ["HK"]
reach = ["hk"]
[permit.cn]
telemetry = ["cn", "spare"]
[permit.hk]
telemetry = ["hk"]
"""

ENDPOINT = """
[endpoints.{name}]
host = "{host}"
ca_file = "ca.pem"
networks = ["{network}"]
"""

IN_LAPSE = """
import sys
from agent.mqtt import backoff
from agent.__main__ import main
backoff.LONGEST_SECONDS = 1.0
sys.exit(main())
"""  # an endpoint is tried again every second at least, where the real agent waits for up to a minute

WITH_MODEL = "import time, agent.redaction.detector; time.sleep(600)"
"""The libraries of the process that redacts, without its system call filter: do they talk by themselves?"""


@pytest.fixture(scope="module", autouse=True)
def allowed():
    """Never pass where nothing was rehearsed."""
    reason = netns.why_not() or ("" if mosquitto_path() else "mosquitto is not installed")
    if reason:
        pytest.skip(reason)


@dataclass
class Rehearsal:
    """The stage: namespaces, brokers, resolver, wire, trap, and the car with its agent."""

    folder: object
    car: netns.Namespace
    world: netns.Namespace
    stack: ExitStack
    resolver: Resolver = None
    wire: Wire = None
    identities: dict = field(default_factory=dict)
    processes: dict = field(default_factory=dict)
    arrived: list = field(default_factory=list)
    sent: dict = field(default_factory=dict)
    latitude: float = SHENZHEN
    target: float = SHENZHEN
    passed: list = field(default_factory=list)
    traps: list = field(default_factory=list)

    def set_up(self):
        authority = Authority(self.folder)
        for address in (DNS, *ADDRESSES.values(), TRAP):
            self.world.ip(f"addr add {address}/32 dev lo")
        self.world.ip(f"addr add {TRAP_6}/128 dev lo nodad")
        for name, host in (("cn", CN_NAME), ("spare", CN_SPARE), ("hk", HK_NAME)):
            self.identities[name] = authority.issue(host)
        self.identities["trap"] = authority.issue(CN_NAME, HK_NAME, CN_SPARE, name="trap")
        self.resolver = Resolver(self.world, DNS)
        self.stack.callback(self.resolver.close)
        self.resolver.answers.update(HONEST)
        self.wire = Wire(self.world)
        self.stack.callback(self.wire.close)
        self.stack.callback(self._end_all)
        self._configure()
        for name in ADDRESSES:
            self.start_broker(name)
        for address in (TRAP, TRAP_6):
            trap, close = self.listen("trap", address=address)
            self.traps.append(trap)
            self.stack.callback(close)
        self.start("model", ["env", "-u", "ORT_DISABLE_TELEMETRY", sys.executable, "-c", WITH_MODEL], self.car)
        self.start("inner", [mosquitto_path(), "-p", str(INNER)], self.car)

    def _configure(self):
        hosts = (("cn", CN_NAME, "10.81.0.0/16"), ("spare", CN_SPARE, "10.81.0.0/16"), ("hk", HK_NAME, "10.82.0.0/16"))
        endpoints = "".join(ENDPOINT.format(name=name, host=host, network=network) for name, host, network in hosts)
        (self.folder / "policy.toml").write_text(POLICY + endpoints)
        (self.folder / "agent.toml").write_text(AGENT)

    def start(self, name, command, where):
        self.processes[name] = where.start(command, self.folder / f"{name}.log")

    def start_broker(self, name):
        folder = self.folder / f"broker-{name}"
        folder.mkdir(exist_ok=True)
        identity = self.identities[name]
        lines = [
            *(f"listener {PORT} {ADDRESSES[name]}", f"certfile {identity.cert}", f"keyfile {identity.key}"),
            *(f"listener {WATCH[name]} 127.0.0.1", "allow_anonymous true", "user root", "max_queued_messages 0"),
            "max_inflight_messages 0",  # what it acknowledges it has passed on: killed, it takes nothing along
            *(f"persistence true\npersistence_location {folder}/", "autosave_on_changes true", "autosave_interval 1"),
        ]
        (folder / "mosquitto.conf").write_text("\n".join([*lines, ""]))
        self.start(name, [mosquitto_path(), "-c", str(folder / "mosquitto.conf")], self.world)

    def kill(self, name, number=signal.SIGKILL):
        process = self.processes.pop(name)
        process.send_signal(number)
        return process.wait(netns.SECONDS)

    def _end_all(self):
        for name in list(self.processes):
            self.kill(name)

    def listen(self, identity, *, address, answer=CONNACK):
        """A peer of the world at an address, with TLS; closed by the function that is returned with it."""
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        listener = self.world.inside(lambda: socket.create_server((address, PORT), family=family))
        peer = Peer(listener, server_context(self.identities[identity]), answer)
        threading.Thread(target=peer.accept_all, daemon=True).start()

        def close():
            listener.shutdown(socket.SHUT_RDWR)
            listener.close()

        return peer, close

    async def until(self, condition):
        """Wait for what must happen; the test's own timeout ends it."""
        while not condition():
            agent = self.processes.get("agent")
            if agent is not None and agent.poll() is not None:
                raise AssertionError(f"the agent ended with {agent.returncode}")
            assert not any(trap.connections for trap in self.traps), "the agent went into the trap"
            await asyncio.sleep(0.02)

    async def watch(self, name):
        """See everything that arrives at a regional broker, over its restarts."""

        def on_message(_client, _userdata, message):
            self.arrived.append((name, json.loads(unpack(bytes(message.payload)).data)["n"]))

        await self._client(self.world, WATCH[name], f"watch-{name}", on_message)

    async def _client(self, where, port, name, on_message=None):
        client = paho.Client(paho.CallbackAPIVersion.VERSION2, name, protocol=paho.MQTTv5)
        subscribed = threading.Event()
        client.on_message = on_message
        client.on_subscribe = lambda *_: subscribed.set()
        properties = Properties(PacketTypes.CONNECT)
        properties.SessionExpiryInterval = 3600

        def connect():
            client.connect("127.0.0.1", port, clean_start=False, properties=properties)
            client.loop_start()

        await self.until(lambda: _succeeds(lambda: where.inside(connect)))
        self.stack.callback(client.loop_stop)
        self.stack.callback(client.disconnect)
        if on_message is not None:
            client.subscribe("#", qos=1)
            await asyncio.to_thread(subscribed.wait, netns.SECONDS)
        return client

    async def drive_loop(self):
        """A fix and a message at every tick, wherever the car is; it moves towards `target`."""
        client, before = await self._client(self.car, INNER, "car"), time.monotonic()
        for number in range(10_000):
            now = time.monotonic()
            step, before = SPEED_MPS * (now - before) / METRES_PER_DEGREE, now
            self.latitude += max(-step, min(step, self.target - self.latitude))
            self.passed.append((time.time(), self.latitude))
            fix = {"lat": self.latitude, "lon": LONGITUDE, "acc": 5.0, "ts": time.time()}
            client.publish("vehicle/gnss", json.dumps(fix), qos=1)
            self.sent[number] = self.latitude
            client.publish("vehicle/telemetry/speed", json.dumps({"n": number, "ts": time.time()}), qos=1)
            await asyncio.sleep(TICK_SECONDS)

    async def go(self, latitude):
        self.target = latitude
        await self.until(lambda: self.latitude == latitude)

    async def more_at(self, name, count=3):
        """Wait for new messages at a broker: sent from now on, not only delivered from now on."""
        newest = max(self.sent, default=-1)
        await self.until(lambda: sum(number > newest for place, number in self.arrived if place == name) >= count)

    def where(self, at):
        """The car's latitude at a moment."""
        return self.passed[max(bisect(self.passed, (at, 90.0)) - 1, 0)][1]

    def all_seen(self):
        """Whether all that counts as delivered has been seen to arrive."""
        return self.status()["counts"]["delivered"] <= len({number for _, number in self.arrived})

    def status(self):
        return status.read(self.folder / "state" / "status.json")


def _succeeds(function):
    try:
        function()
    except OSError:
        return False
    return True


async def rehearse(it):
    """The drive."""
    # In Shenzhen. The first broker dies: its spare, which is known by address, takes over.
    await it.more_at("cn")
    it.kill("cn")
    await it.more_at("spare")

    # The spare dies too, and DNS lies about the first: elsewhere, elsewhere as well, IPv6, the other region's broker.
    it.kill("spare")
    for lie in ([TRAP], [CN, TRAP], [TRAP_6], [CN, TRAP_6], [HK], [f"::ffff:{TRAP}"], []):
        it.resolver.answers[CN_NAME] = lie
        asked = len(it.resolver.asked)
        await it.until(lambda asked=asked, lie=lie: (CN_NAME, tuple(lie)) in it.resolver.asked[asked:])
    it.start_broker("cn")
    it.resolver.answers.update(HONEST)
    await it.more_at("cn")

    # Across the border. In Hong Kong, a broker that says: go to the other region, go anywhere.
    await it.go(HONG_KONG)
    await it.more_at("hk")
    it.kill("hk")
    for answer in (reference(MOVED, CN_NAME.encode()), farewell(MOVED, f"{TRAP}:{PORT}".encode())):
        rogue, close = await until_listening(it, answer)
        await it.until(lambda rogue=rogue: b"MQTT" in rogue.data)
        close()
    it.start_broker("hk")
    await it.more_at("hk")

    # The broker vanishes without a word before the car drives back: what was captured here waits, and goes nowhere
    # else, and no kernel repeats into the void from across the border what it had sent before.
    it.world.ip(f"addr del {HK}/32 dev lo")
    await it.until(lambda: it.status()["counts"]["pending"] > 0)
    await it.go(SHENZHEN)
    await it.more_at("cn", 10)


async def until_listening(it, answer):
    """Take the dead broker's address."""
    while True:
        try:
            return it.listen("hk", address=HK, answer=answer)
        except OSError:
            await asyncio.sleep(0.05)


async def test_no_packet_leaves_the_car_but_to_where_every_candidate_region_permits(tmp_path, patience):
    with ExitStack() as stack:
        car, world = stack.enter_context(netns.wired(DNS))
        it = Rehearsal(folder=tmp_path, car=car, world=world, stack=stack)
        it.set_up()
        async with asyncio.timeout(10 * patience):
            for name in ADDRESSES:
                await it.watch(name)
            driving = asyncio.create_task(it.drive_loop())
            try:
                it.start("agent", [sys.executable, "-c", IN_LAPSE, "run", str(tmp_path / "agent.toml")], car)
                await rehearse(it)
            except (TimeoutError, AssertionError):
                sys.stderr.write(story(it))
                raise
            finally:
                driving.cancel()
            assert it.kill("agent", signal.SIGTERM) == 0
            await it.until(it.all_seen)  # the brokers acknowledge before those who watch have read it
        judge_packets(it)
        judge_deliveries(it)


def judge_packets(it):
    """Every packet went to an endpoint of the region in which the car was, or was a question to the one resolver."""
    questions = [packet for packet in it.wire.packets if packet.destination == DNS]
    assert questions
    assert all((packet.protocol, packet.port) == (UDP, 53) for packet in questions)
    asked = [(question_of(packet.payload)[0], deep_in(it.where(packet.at))) for packet in questions]
    assert {name for name, _ in asked} == {CN_NAME, HK_NAME}
    assert not {(CN_NAME, "hk"), (HK_NAME, "cn")}.intersection(asked), "not even a name is asked for across the border"
    others = [packet for packet in it.wire.packets if packet.destination != DNS]
    assert {packet.destination for packet in others} == set(ADDRESSES.values())
    assert {packet.protocol for packet in others} == {TCP}
    assert {packet.port for packet in others} == {PORT}
    for packet in others:
        region = "hk" if packet.destination == HK else "cn"
        assert deep_in(it.where(packet.at)) in {region, ""}, packet


def deep_in(latitude):
    """The region in which the car is beyond doubt, more than 2 km from its neighbour; empty around the border."""
    return "cn" if latitude > 22.545 else "hk" if latitude < 22.495 else ""


def judge_deliveries(it):
    """Every message is in its own region, or still in the car; none was lost, though most brokers died."""
    borders = RegionMap.from_bytes(SHIPPED_BORDERS.read_bytes())
    for broker, number in it.arrived:
        assert borders.countries_near(it.sent[number], LONGITUDE, 0.0) == {"HK" if broker == "hk" else "CN"}
    counts = it.status()["counts"]
    assert counts["conserved"]
    assert it.all_seen()
    assert counts["held"] > 0, "what was captured at the border is in doubt"
    assert counts["pending"] > 0, "what was captured in Hong Kong after its last broker had died waits"
    assert counts["refused"] == counts["expired"] == counts["evicted"] == 0


def story(it):
    log = (it.folder / "agent.log").read_text()[-3000:]
    return f"{json.dumps(it.status(), indent=1)}\n{log}\n{it.latitude} {it.arrived[-10:]}"
