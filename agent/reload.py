"""Taking a new configuration while the agent runs (SIGHUP): all of it, or nothing.

Invariants
- Everything that can fail happens before anything changes: files, signatures, serial, keys, borders, and redaction
  processes with the new model. Where one fails, all stays as it is, and the status says why until a reload succeeds.
- No message is between its decision and its commit when the policy changes; none is decided by two policies.
- From the change on nothing is published that the new policy forbids: each record is cleared right before (`uplink`).
  That the records in the car are decided again afterwards brings them where they may go; a crash begins it anew.
- A region that lost a country takes the records that carry its name with it, before the new policy is in force.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from agent import assembly, systemd, wiring
from agent.accepted import NOTE, REVIEWED, Accepted
from agent.assembly import Setup
from agent.errors import AgentError, ConfigError, InvalidConfigError, LedgerStalledError
from agent.intake.intake import Inward
from agent.intake.resolver import Resolver
from agent.pipeline import Pipeline
from agent.redaction.pool import RedactionPool
from agent.store.entries import Noted
from agent.uplink.group import Start, UplinkGroup
from agent.uplink.options import UplinkOptions
from agent.wire.signing import Signer

log = logging.getLogger(__name__)

RELOADABLE = frozenset({"credentials", "model", "signing", "trust"})
"""Tables of agent.toml that a reload takes over; every other one needs a restart, and so does paths.state."""

TURN_SECONDS = 120.0  # for which what is being decided is waited for: a queue of pictures takes long
PAUSE_SECONDS = 5.0  # before what a stalled disk or an uplink's claim kept from being decided is tried again


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A configuration of which everything was read, verified and built."""

    setup: Setup
    pipeline: Pipeline
    signer: Signer | None
    uplinks: Mapping[str, UplinkOptions]


class Reloader:
    """Holds the configuration that is in force (`setup`, `worker`), and replaces it when that is asked for."""

    def __init__(
        self, setup: Setup, inward: Inward, worker: RedactionPool, uplinks: UplinkGroup, requested: asyncio.Event
    ) -> None:
        """`requested` is set to ask for a reload; during one it asks for another after it."""
        self.setup = setup
        self.worker = worker
        self.resolver = Resolver(inward)
        self.uplinks = uplinks
        self._inward = inward
        self._accepted = Accepted.read(inward.committer.ledger.meta(NOTE), Path(setup.config.paths.state))
        self._requested, self._due = requested, asyncio.Event()
        self._options: Mapping[str, UplinkOptions] = {}
        self._done, self._changed_ns, self._error, self._error_ns = 0, time.time_ns(), "", 0

    def as_dict(self) -> dict[str, Any]:
        """For the status: reloads since the start, since when this configuration holds, what is wrong with the next."""
        return {
            "count": self._done,
            "since_ns": self._changed_ns,
            "error": self._error,
            "error_ns": self._error_ns,
            "deciding_again": self._due.is_set(),
        }

    async def begin(self, start: Start) -> None:
        """Put the configuration that the agent started with in force; raises InvalidConfigError for a step back."""
        self._accepted.check(self.setup)
        await self._remember(self.setup)
        self._options = _uplinks(self.setup, self._inward.line.pipeline.signer)
        await self.uplinks.apply(self._options, start)
        if self._inward.committer.ledger.meta(REVIEWED) != self.setup.digest:
            self._due.set()

    async def run_loop(self, start: Start) -> None:
        """Reload whenever it is requested; returns only by cancelling. `start` runs the loops of uplinks."""
        while True:
            await self._requested.wait()
            self._requested.clear()
            systemd.notify("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
            try:
                await self._reload(start)
            except TimeoutError:
                self._refused(AgentError(f"what is being decided is not durable after {TURN_SECONDS:.0f} s"))
            except AgentError as exc:
                self._refused(exc)
            else:
                log.info("reload.done", extra={"policy": self.setup.policy.version})
            systemd.notify("READY=1", f"STATUS=policy {self.setup.policy.version}")

    def _refused(self, why: AgentError) -> None:
        self._error, self._error_ns = str(why), time.time_ns()
        log.error("reload.refused", extra={"reason": _told(why)})

    async def review_loop(self) -> None:
        """Decide again about what is in the car after every change; returns only by cancelling."""
        while True:
            await self._due.wait()
            digest = self.setup.digest
            try:
                changed, left = await self.resolver.review()
                if not left:
                    await self._inward.committer.submit(Noted(name=REVIEWED, value=digest, time_ns=time.time_ns()))
            except LedgerStalledError:
                left = 1
            if left:
                await asyncio.sleep(PAUSE_SECONDS)
                continue
            self._inward.fixes.look_again()  # what is held now may be settled by fixes that are known already
            log.info("reload.reviewed", extra={"changed": changed})
            if self.setup.digest == digest:
                self._due.clear()

    async def _reload(self, start: Start) -> None:
        prepared, old = await asyncio.to_thread(self._read), self.worker
        new = await self._worker(prepared.setup)
        try:
            await self._change(prepared, new, start)
        finally:
            for unused in {old, new} - {self.worker}:
                await unused.close()

    def _read(self) -> Prepared:
        """`_prepare`, where no file can end the agent; raises AgentError."""
        try:
            return self._prepare()
        except AgentError:
            raise
        except Exception as exc:  # a mistake of the agent's own; nothing has changed yet
            raise AgentError(f"the configuration could not be read: {type(exc).__name__}") from exc

    def _prepare(self) -> Prepared:
        setup = assembly.load(self.setup.file)
        mistakes = list(_fixed(self.setup, setup))
        if mistakes:
            raise InvalidConfigError(mistakes)
        self._accepted.check(setup)
        signer = wiring.signer(setup)
        pipeline = replace(
            self._inward.line.pipeline,
            policy=setup.policy,
            borders=setup.borders(),
            signer=signer,
            field_rules=wiring.field_rules_of(setup),
        )
        return Prepared(setup=setup, pipeline=pipeline, signer=signer, uplinks=_uplinks(setup, signer))

    async def _worker(self, setup: Setup) -> RedactionPool:
        """The running redaction processes, or new ones where they have to be others; raises AgentError."""
        made_of = wiring.worker_options(setup), setup.config.model.processes
        if made_of == self.worker.made_of:
            return self.worker
        worker = await RedactionPool(*made_of).__aenter__()
        if worker.error:
            await worker.close()
            raise AgentError(f"{setup.manifest_path}: {worker.error}: {worker.detail}")
        return worker

    async def _change(self, prepared: Prepared, worker: RedactionPool, start: Start) -> None:
        """Replace everything in one step, with nothing under way; then let the uplinks follow."""
        line, committer = self._inward.line, self._inward.committer
        try:
            async with contextlib.AsyncExitStack() as stack:
                async with asyncio.timeout(TURN_SECONDS):
                    await stack.enter_async_context(line.turns.alone())
                    await self._remember(prepared.setup)
                line.pipeline, line.redactor, self.worker = prepared.pipeline, worker, worker
                if prepared.setup.digest != self.setup.digest:
                    self._due.set()
                self.setup, self._options = prepared.setup, prepared.uplinks
                self._done, self._changed_ns = self._done + 1, time.time_ns()
                self._error, self._error_ns = "", 0
            await committer.call(lambda ledger: ledger.seal_with(wiring.audit_seal(prepared.signer)))
        finally:
            await self.uplinks.apply(self._options, start)

    async def _remember(self, setup: Setup) -> None:
        """Note what is accepted, once no record is left whose regions would mean something else."""
        if self._inward.committer.stalled:
            raise AgentError(f"the ledger takes nothing: {self._inward.committer.stalled}")
        shrunk = setup.policy.shrunk(self._accepted.meanings)
        if shrunk:
            await self.uplinks.stop(list(self.uplinks.running))
            if self._inward.board.claimed:  # nobody else may end these, and they carry such a region perhaps
                raise AgentError("what became of records is not written down yet")
            count = await self.resolver.give_up(shrunk)
            log.warning("reload.regions-redefined", extra={"regions": sorted(shrunk), "refused": count})
        accepted = self._accepted.after(setup)
        if accepted != self._accepted:
            await self._inward.committer.submit(Noted(name=NOTE, value=accepted.note(), time_ns=time.time_ns()))
            await asyncio.to_thread(accepted.write, Path(setup.config.paths.state))
            self._accepted = accepted


def _told(exc: AgentError) -> str:
    """For the log: of a configuration only which keys are wrong, since a value may be an identity."""
    if isinstance(exc, InvalidConfigError):
        return "; ".join(f"{mistake.file}: {mistake.key}" for mistake in exc.mistakes)
    return str(exc)


def _uplinks(setup: Setup, signer: Signer | None) -> dict[str, UplinkOptions]:
    return {name: wiring.uplink(setup, name, signer.key_id if signer else None) for name in setup.policy.endpoints}


def _fixed(old: Setup, new: Setup) -> Iterator[ConfigError]:
    """What changed although it can change only by a restart."""
    for table in msgspec.structs.fields(old.config):
        if table.name in RELOADABLE:
            continue
        before, after = getattr(old.config, table.name), getattr(new.config, table.name)
        keys: list[tuple[str, Callable[[Any], object]]] = [(table.name, lambda value: value)]
        if isinstance(before, msgspec.Struct):
            names = [name for name in before.__struct_fields__ if (table.name, name) != ("paths", "policy")]
            keys = [(f"{table.name}.{name}", lambda value, name=name: getattr(value, name)) for name in names]  # type: ignore[misc]
        for key, value in keys:
            if value(before) != value(after):
                wanted = f"{value(before)!r}: this changes only by a restart"
                yield ConfigError(Path(new.file), key, value(after), wanted)
