"""Uplinks of one car against brokers of a test, with a real ledger under them and nothing else of the agent."""

import asyncio
import contextlib
import shutil
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

from ledger_samples import in_memory
from stream import TELEMETRY

from agent.board import Board
from agent.messages import Basis, Capture, Priority, Record, State
from agent.mqtt.packets import Session
from agent.policy import Policy
from agent.settings.policy_config import DataClass, Endpoint, PolicyConfig, Region, Rule
from agent.store.committer import CommitOptions, Committer
from agent.store.entries import LedgerLimits, Store
from agent.store.ledger import Ledger
from agent.uplink.egress import PeerRules
from agent.uplink.options import UplinkOptions
from agent.uplink.uplink import Uplink
from agent.wire import batch
from agent.wire.envelope import pack, unpack

HOUR_NS = 3600 * 10**9


def policy_of(*endpoints):
    return Policy(
        PolicyConfig(
            version="1",
            regions={"cn": Region(countries=["CN"])},
            endpoints={name: Endpoint(host="127.0.0.1", tls=False) for name in endpoints},
            classes={"telemetry": DataClass()},
            permit={"cn": {"telemetry": list(endpoints)}},
            rules=[Rule(topic="#", action="forward", data_class="telemetry")],
        )
    )


def record(number, *, route=("a",), priority=Priority.LIVE, size=40, ttl_ns=HOUR_NS, subject="vehicle/speed"):
    now = time.time_ns()
    attributes = replace(TELEMETRY, id=f"id-{number}", sequence=number, subject=subject)
    return Record(
        id=f"id-{number}",
        state=State.PENDING,
        route=tuple(route),
        regions=("cn",),
        basis=Basis.GNSS,
        data_class="telemetry",
        topic=subject,
        priority=priority,
        capture=Capture(time_ns=now, monotonic_ns=1, boot_id="boot"),
        recorded_ns=now,
        expires_ns=now + ttl_ns,
        sequence=number,
        envelope=pack(attributes, b"%d" % number + b"." * size, None),
    )


def number_of(payload):
    """The number of the record that a broker got."""
    return int(unpack(payload).data.split(b".")[0])


def numbers_of(publish):
    """The numbers of the records in a PUBLISH that a broker got."""
    content_type = publish.properties.get(0x03, b"").decode() or None
    if batch.is_batch(publish.payload, content_type):
        return [number_of(member) for member in batch.unpack(publish.payload, content_type)]
    return [number_of(publish.payload)]


@dataclass
class Bench:
    committer: Committer
    board: Board
    policy: Policy
    ports: dict
    options: dict
    again: object = lambda _: None
    uplinks: dict = field(default_factory=dict)
    tasks: dict = field(default_factory=dict)

    async def store(self, numbers, **fields):
        records = [record(number, **fields) for number in numbers]
        await asyncio.gather(*(self.committer.submit(Store(record=one)) for one in records))

    def options_of(self, name):
        session = Session(host="127.0.0.1", port=self.ports[name], client_id=f"car-{name}", keepalive_s=30)
        own = {key: self.options[key] for key in ("protocol", "keepalive_s") if key in self.options}
        return UplinkOptions(
            name=name,
            vehicle="car",
            session=replace(session, **own),
            peer=PeerRules(host="127.0.0.1", port=self.ports[name], tls=False),
            **{"topic": "{region}/{vehicle}/{topic}"}
            | {key: value for key, value in self.options.items() if key not in own},
        )

    def make(self, options):
        self.uplinks[options.name] = Uplink(
            options, lambda: self.policy, "", self.committer, self.board, again=self.again
        )
        return self.uplinks[options.name]

    def run(self, name, loop):
        self.tasks[name] = asyncio.create_task(loop, name=name)
        return self.tasks[name]

    def start(self, *names):
        for name in names or self.ports:
            self.run(name, self.make(self.options_of(name)).run_loop())

    async def stop(self, *names):
        for name in names or list(self.tasks):
            task = self.tasks.pop(name)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    @property
    def counts(self):
        return self.committer.ledger.counts()

    async def until(self, condition):
        while not condition():
            for task in self.tasks.values():
                if task.done():
                    await task
            await asyncio.sleep(0.01)


@asynccontextmanager
async def bench(ports, company_s=1.0, **options):
    """A ledger and an uplink for each of `ports` ({name: port}); `options` are those of every uplink."""
    folder = in_memory()
    ledger = Ledger.open(folder / "ledger.db", LedgerLimits(reserve_bytes=65536))
    async with Committer(ledger, CommitOptions(max_delay_s=0.001, company_s=company_s)) as committer:
        made = Bench(committer, Board(), policy_of(*ports), ports, options)
        committer.on_stored(made.board.offer)
        try:
            yield made
        finally:
            await made.stop()
    ledger.close()
    shutil.rmtree(folder)
