"""The ledger against a model of a few lines, with crash, reopening and a clock that is not set yet as rules."""

import os
import shutil
from collections import Counter

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule
from ledger_samples import NOW, SECOND, delivered, in_memory, opened, refused, store
from msgspec.structs import replace

from agent.clock import IS_SET_NS, Moment
from agent.errors import LedgerEntryError
from agent.messages import Capture, Priority, State
from agent.store.audit_cli import verify
from agent.store.entries import IntakeKey, Rejected, Released, Store, Withdrawn
from agent.store.lanes import RECORD_OVERHEAD

LANE, TOTAL, INLINE = 6000, 14_000, 1000
REGIONS = (("cn",), ("hk",), ("cn", "hk"))
ROUTES = ((), ("a",), ("b",), ("a", "b"))


class Model:
    """What the ledger promises, by arrival: records that are in the car, and how many ended how."""

    def __init__(self):
        self.spool, self.ended, self.received = {}, Counter(), 0

    def size(self, regions=None):
        own = (item for item in self.spool.values() if regions in (None, item.regions))
        return sum(len(item.envelope) + RECORD_OVERHEAD for item in own)

    def evict(self):
        for regions, limit in [*((regions, LANE) for regions in REGIONS), (None, TOTAL)]:
            while self.size(regions) > limit:
                own = [item for item in self.spool.values() if regions in (None, item.regions)]
                self.end(max(own, key=lambda item: item.priority).id, State.EVICTED)  # max takes the oldest of equals

    def end(self, name, state):
        self.ended["late" if self.spool.pop(name, None) is None else state] += 1

    def sweep(self, now):
        for item in list(self.spool.values()):
            if item.recorded_ns <= IS_SET_NS:
                since_ns = item.capture.monotonic_ns if item.capture.boot_id == now.boot_id else 0
                made_ns, ttl_ns = now.time_ns - now.monotonic_ns + since_ns, item.expires_ns - item.recorded_ns
                self.spool[item.id] = replace(item, recorded_ns=made_ns, expires_ns=made_ns + ttl_ns)
            elif item.expires_ns <= now.time_ns:
                self.end(item.id, State.EXPIRED)

    def served(self, endpoint, down, now):
        route = {
            item.id: next((name for name in item.route if name not in down or name == endpoint), None)
            for item in self.spool.values()
        }
        own = (item for item in self.spool.values() if route[item.id] == endpoint)
        alive = (item for item in own if item.recorded_ns <= IS_SET_NS or item.expires_ns > now.time_ns)
        return sorted(alive, key=lambda item: item.priority)


class LedgerMachine(RuleBasedStateMachine):
    names = Bundle("names")

    @initialize()
    def begin(self):
        self.root = in_memory()
        self.generation = self.number = self.seconds = 0
        self.model, self.published = Model(), []
        self.open()

    def open(self):
        self.path = self.root / str(self.generation) / "ledger.db"
        limits = {"lane_bytes": LANE, "total_bytes": TOTAL, "inline_bytes": INLINE, "reserve_bytes": 0}
        self.ledger = opened(self.path, **limits, audit_bytes=3000, journal_bytes=60_000, intake_window=5)
        assert self.ledger.incidents == ()

    def teardown(self):
        if hasattr(self, "ledger"):
            self.ledger.close()
            assert verify(self.path).problems == ()
            shutil.rmtree(self.root)

    @rule(
        target=names,
        fields=st.lists(
            st.fixed_dictionaries(
                {
                    "size": st.sampled_from((10, 900, 1500, 7000)),
                    "regions": st.sampled_from(REGIONS),
                    "route": st.sampled_from(ROUTES),
                    "priority": st.sampled_from(Priority),
                    "ttl": st.sampled_from((10, 40, 10_000)),
                    "undated": st.sampled_from((None, None, "boot", "earlier boot")),
                }
            ),
            min_size=1,
            max_size=5,
        ),
    )
    def store(self, fields):
        entries = []
        for each in fields:
            self.number += 1
            boot_id = each.pop("undated")
            entry = store(self.number, mid=self.number**2 % 11, **each)
            entries.append(entry if boot_id is None else replace(entry, record=self.undated(entry.record, boot_id)))
        arrived = self.ledger.commit(entries)
        for entry in entries:
            self.model.received += 1
            self.published.append((entry.intake.mid, entry.intake.digest))
            if len(entry.record.envelope) + RECORD_OVERHEAD > LANE:
                self.model.ended[State.EVICTED] += 1
            else:
                self.model.spool[entry.record.id] = entry.record
        self.model.evict()
        self.came_in(entries, arrived)
        return multiple(*(entry.record.id for entry in entries))

    def came_in(self, entries, arrived):
        """A commit names the records that it has brought into the car, and none that it evicted at once."""
        assert arrived == [entry.record for entry in entries if entry.record.id in self.model.spool]

    @property
    def now(self):
        return Moment(time_ns=NOW + self.seconds * SECOND, monotonic_ns=self.seconds * SECOND, boot_id="boot")

    def undated(self, record, boot_id):
        """The record as it is made now where the clock says 1970."""
        ttl_ns = record.expires_ns - record.recorded_ns
        capture = Capture(time_ns=0, monotonic_ns=self.now.monotonic_ns, boot_id=boot_id)
        return replace(record, capture=capture, recorded_ns=60 * SECOND, expires_ns=60 * SECOND + ttl_ns)

    @rule()
    def refuse(self):
        assert self.ledger.commit([refused()]) == []
        self.model.received += 1
        self.model.ended[State.REFUSED] += 1

    @rule(name=names)
    def deliver(self, name):
        self.ledger.commit([delivered(int(name[3:]))])
        self.model.end(name, State.DELIVERED)

    @rule(one=consumes(names), other=names)
    def end_otherwise(self, one, other):
        entries = [Rejected(id=one, endpoint="a", code=0x99, time_ns=NOW)]
        entries.append(Withdrawn(id=other, reason="policy", time_ns=NOW))
        self.ledger.commit(entries)
        self.model.end(one, State.REFUSED)
        self.model.end(other, State.REFUSED)

    @rule(name=names, size=st.sampled_from((10, 1500)))
    def release(self, name, size):
        held = self.model.spool.get(name)
        if held is None or held.route:
            return
        pending = replace(held, state=State.PENDING, route=("a",), regions=held.regions[:1], envelope=b"n" * size)
        assert self.ledger.commit([Released(record=pending, time_ns=NOW)]) == []
        self.model.spool[name] = pending
        self.model.evict()

    @rule(ended=st.lists(names, max_size=6), sizes=st.lists(st.sampled_from((10, 900)), max_size=40), last=names)
    def deliver_and_store_many(self, ended, sizes, last):
        """One transaction as the committer makes it, with records ended twice; the last is ended behind the stores."""
        numbers = range(self.number + 1, self.number + 1 + len(sizes))
        stores = [store(number, size=size) for number, size in zip(numbers, sizes, strict=True)]
        self.number += len(sizes)
        ends = (delivered(int(name[3:])) for name in ended)
        arrived = self.ledger.commit([*ends, *stores, delivered(int(last[3:]))])
        for name in ended:
            self.model.end(name, State.DELIVERED)
        for entry in stores:
            self.model.received += 1
            self.model.spool[entry.record.id] = entry.record
        self.model.end(last, State.DELIVERED)
        self.model.evict()
        self.came_in(stores, arrived)

    @rule(stores=st.integers(0, 40), wrong=st.integers(0, 40))
    def clash(self, stores, wrong):
        """Of many stores the one that is in the ledger already is named, and nothing is kept."""
        if not self.model.spool:
            return
        entries = [store(900_000 + number) for number in range(stores)]
        entries.insert(min(wrong, stores), Store(record=next(iter(self.model.spool.values()))))
        with pytest.raises(LedgerEntryError) as failed:
            self.ledger.commit(entries)
        assert failed.value.index == min(wrong, stores)

    @rule(name=names)
    def fail(self, name):
        if name not in self.model.spool:
            return
        with pytest.raises(LedgerEntryError):
            self.ledger.commit([refused(), delivered(int(name[3:])), store(999_999), store(999_999)])

    @rule(seconds=st.integers(0, 30))
    def sweep(self, seconds):
        self.seconds += seconds
        now = self.now
        while self.ledger.sweep(now.time_ns, monotonic_ns=now.monotonic_ns, boot_id=now.boot_id).more:
            continue
        self.model.sweep(now)

    @rule(seconds=st.integers(0, 30))
    def sweep_before_the_clock_is_set(self, seconds):
        self.seconds += seconds
        now = self.now
        self.ledger.sweep(now.monotonic_ns, monotonic_ns=now.monotonic_ns, boot_id=now.boot_id)

    @rule()
    def crash(self):
        before, abandoned = self.path.parent, self.ledger
        self.generation += 1
        shutil.copytree(before, self.root / str(self.generation), ignore=shutil.ignore_patterns("*-shm", "*.lock"))
        abandoned.close()
        shutil.rmtree(before)
        self.open()

    @rule()
    def reopen(self):
        self.ledger.close()
        self.open()

    @invariant()
    def everything_is_where_the_model_says(self):
        if not hasattr(self, "ledger"):
            return
        for endpoint, down in (("a", ()), ("b", ()), ("b", ("a",)), ("a", ("a", "b"))):
            found = [item.record for item in self.ledger.pending(endpoint, limit=100, down=down, now=self.now)]
            assert found == self.model.served(endpoint, down, self.now)
        assert [item.record for item in self.ledger.spooled(limit=100)] == list(self.model.spool.values())
        held = self.ledger.held(boot_id="boot", since_ns=0, limit=100)
        assert [item.record for item in self.ledger.keyed([item.key for item in held])] == [
            item for item in self.model.spool.values() if not item.route and item.capture.boot_id == "boot"
        ]
        counts = self.ledger.counts()
        assert (counts.received, counts.conserved) == (self.model.received, True)
        for state in ("delivered", "refused", "expired", "evicted", "late"):
            assert getattr(counts, state) == self.model.ended[state]
        assert counts.pending_bytes + counts.held_bytes == self.model.size()
        recent = dict(self.published[-5:])
        assert self.ledger.recent_intake("telemetry") == recent
        assert all(
            self.ledger.recorded(IntakeKey(session="telemetry", mid=mid, digest=digest))
            for mid, digest in recent.items()
        )
        in_files = [item for item in self.model.spool.values() if len(item.envelope) > INLINE]
        assert len(list(self.path.with_name("ledger.db.files").glob("*"))) == len(in_files)


TestLedgerAgainstModel = LedgerMachine.TestCase
TestLedgerAgainstModel.settings = settings(
    max_examples=int(os.environ.get("RESIDENCY_SOAK_EXAMPLES", "25")),
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
