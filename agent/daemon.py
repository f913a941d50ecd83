"""The running agent: its tasks, signals, drain, watchdog and status.

SIGHUP takes a new configuration (`reload`). First SIGTERM or SIGINT: nothing new is taken, what is in flight may still
be acknowledged for `limits.drain_s`, then everything is closed. A second one exits at once; the ledger makes that safe.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import time
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from agent import __version__, boot, journal, status, systemd, vitals, wiring
from agent.assembly import Setup
from agent.beacon import Beacon
from agent.board import Board
from agent.errors import AgentError, LedgerStalledError
from agent.intake.intake import Fixes, Intake, Inward
from agent.intake.line import Line, Numbering
from agent.memory import Memory
from agent.policy import Policy
from agent.redaction.pool import RedactionPool
from agent.reload import Reloader
from agent.store.committer import CommitOptions, Committer
from agent.store.entries import SweepResult
from agent.store.ledger import Ledger
from agent.uplink.group import UplinkGroup
from agent.uplink.options import UplinkOptions
from agent.uplink.uplink import Uplink

log = logging.getLogger(__name__)
E = TypeVar("E", bound=BaseException)

STATUS_SECONDS = 1.0
SWEEP_SECONDS = 5.0
SIDE_THREADS = 2  # for what would block the loop for a moment: the status file, certificates
REACH_NS = 10**9
SECOND_SIGNAL_STATUS = 130


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What an assembled agent consists of; `setup` is what it started with, `reloader` has what holds now."""

    setup: Setup
    boot_id: str
    committer: Committer
    fixes: Fixes
    intakes: dict[str, Intake]
    reloader: Reloader
    line: Line
    watchdog: systemd.Watchdog
    beacon: Beacon | None
    publish_status: Callable[[Mapping[str, Any]], None]


class _Reach:
    """Which endpoints may be connected to from where the vehicle is; asked again at most once a second."""

    def __init__(self, line: Line) -> None:
        self._line = line
        self._pipeline = line.pipeline
        self._regions: tuple[str, ...] = ()
        self._asked_ns = -REACH_NS

    def allows(self, endpoint: str) -> bool:
        now_ns, pipeline = boot.boot_ns(), self._line.pipeline
        if now_ns - self._asked_ns >= REACH_NS or pipeline is not self._pipeline:
            self._regions = pipeline.here(now_ns, time.time_ns())
            self._asked_ns, self._pipeline = now_ns, pipeline
        return pipeline.policy.reachable(self._regions, endpoint)


async def run(setup: Setup) -> int:
    """Run until a signal; the exit status. Raises AgentError where the agent cannot start."""
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(SIDE_THREADS, thread_name_prefix="side"))
    await asyncio.to_thread(_make_folder, Path(setup.config.paths.state))
    stop, reload = _on_signals()
    async with contextlib.AsyncExitStack() as stack:
        parts = await _assemble(setup, stack, reload)
        try:
            await _run_until(stop, parts)
        except BaseExceptionGroup as group:
            expected, others = group.split(AgentError)
            if expected is None or others is not None:
                raise
            raise first(expected) from group
    return 0


def _make_folder(state: Path) -> None:
    try:
        state.mkdir(mode=0o700, parents=True, exist_ok=True)
        owner = state.stat().st_uid
    except OSError as exc:
        raise AgentError(f"paths.state: {state}: {exc.strerror}") from exc
    if os.geteuid() == 0 != owner:  # what root stores there, the agent of the owner could not read
        raise AgentError(f"paths.state: {state} is of user {owner}: let systemd run the agent, or run it as this user")


def first(group: BaseExceptionGroup[E]) -> E:
    """What ended the agent, without the tasks around it."""
    found = group.exceptions[0]
    return first(found) if isinstance(found, BaseExceptionGroup) else found


async def _assemble(setup: Setup, stack: contextlib.AsyncExitStack, reload: asyncio.Event) -> Parts:
    signer = wiring.signer(setup)
    pipeline = wiring.pipeline(setup, signer)
    boot_id = pipeline.identity.boot_id
    ledger = Ledger.open(setup.ledger_path, wiring.ledger_limits(setup), seal=wiring.audit_seal(signer))
    stack.callback(ledger.close)
    for incident in ledger.incidents:
        log.warning("ledger.incident", extra={"incident": incident})
    options = CommitOptions(max_delay_s=setup.config.limits.commit_ms / 1000)
    committer = await stack.enter_async_context(Committer(ledger, options))
    worker = await RedactionPool(wiring.worker_options(setup), setup.config.model.processes).__aenter__()
    stack.push_async_callback(worker.close)
    line = Line(pipeline, worker, Numbering(ledger.sequences()))
    board = Board(reachable=_Reach(line).allows)
    committer.on_stored(board.offer)
    fixes = Fixes(wiring.fix_readers(setup), pipeline.positions)
    inward = Inward(line=line, committer=committer, fixes=fixes, board=board)
    registration = setup.config.vehicle.registration

    def policy() -> Policy:
        return line.pipeline.policy

    def uplink(options: UplinkOptions) -> Uplink:
        return Uplink(options, policy, registration, committer, board, again=reloader.resolver.again)

    reloader = Reloader(setup, inward, worker, UplinkGroup(board, uplink), reload)
    stack.push_async_callback(lambda: reloader.worker.close())  # noqa: PLW0108 - the one that runs then
    alive = _alive(setup, boot_id)
    return Parts(
        setup=setup,
        boot_id=boot_id,
        committer=committer,
        fixes=fixes,
        intakes={options.name: Intake(options, inward, alive.get(options.name)) for options in wiring.intakes(setup)},
        reloader=reloader,
        line=line,
        watchdog=systemd.Watchdog(),
        beacon=Beacon(told) if (told := wiring.beacon(setup)) else None,
        publish_status=_metrics(setup, stack),
    )


def _metrics(setup: Setup, stack: contextlib.AsyncExitStack) -> Callable[[Mapping[str, Any]], None]:
    """What takes the status; the exporter is imported only where it is asked for."""
    table = setup.config.metrics
    if table.port == 0 and not table.socket:
        return lambda _: None
    try:
        from agent.metrics import Exporter  # noqa: PLC0415 - an optional extra
    except ImportError as exc:
        raise AgentError("[metrics] needs: pip install 'residency-agent[metrics]'") from exc
    return stack.enter_context(Exporter(table.host, table.port, socket=table.socket)).update


def _alive(setup: Setup, boot_id: str) -> dict[str, int]:
    """When (boot time) an earlier process of this boot had last emptied each session."""
    content = status.read(setup.status_path)
    if content.get("boot_id") != boot_id:
        return {}
    sessions = content.get("sessions", {})
    return {name: session["alive_ns"] for name, session in sessions.items() if session.get("alive_ns") is not None}


def _on_signals() -> tuple[asyncio.Event, asyncio.Event]:
    """What is set to stop (a second signal exits at once), and what is set to reload."""
    stop, reload = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        if stop.is_set():
            os._exit(SECOND_SIGNAL_STATUS)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, on_signal)
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, reload.set)
    return stop, reload


async def _run_until(stop: asyncio.Event, parts: Parts) -> None:
    """Run all loops; an unexpected error in one ends the agent, so that systemd starts a fresh one."""
    async with asyncio.TaskGroup() as group:

        def start(name: str, loop: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
            return group.create_task(loop, name=name)

        reloader = parts.reloader
        await reloader.begin(start)
        inward = [start(f"intake-{name}", intake.run_loop()) for name, intake in parts.intakes.items()]
        inward.append(start("reload", reloader.run_loop(start)))
        outward = [start("resolver", reloader.resolver.run_loop()), start("review", reloader.review_loop())]
        outward.append(start("sweep", _sweep_loop(parts)))
        outward.append(start("status", _status_loop(parts)))
        if parts.beacon is not None:
            outward.append(start("beacon", parts.beacon.run_loop()))
        log.info("agent.ready", extra={"version": __version__, "policy": parts.setup.policy.version})
        systemd.notify("READY=1", f"STATUS=policy {parts.setup.policy.version}")
        await stop.wait()
        log.info("agent.stopping")
        systemd.notify("STOPPING=1")
        for task in inward:
            task.cancel()
        await _drain(parts)
        reloader.uplinks.cancel()
        for task in outward:
            task.cancel()
    await _write_status(parts)


async def _drain(parts: Parts) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(parts.setup.config.limits.drain_s):
            await parts.reloader.uplinks.drain()


async def _sweep(committer: Committer) -> SweepResult:
    now = boot.moment()
    return await committer.sweep(now.time_ns, monotonic_ns=now.monotonic_ns, boot_id=now.boot_id)


async def _sweep_loop(parts: Parts) -> None:
    memory = Memory()
    while True:
        with contextlib.suppress(LedgerStalledError):  # the status says so; the next sweep tries again
            while (await _sweep(parts.committer)).more:
                pass
        journal.tell()
        await asyncio.to_thread(memory.tidy, time.monotonic())
        await asyncio.sleep(SWEEP_SECONDS)


async def _status_loop(parts: Parts) -> None:
    """Write the status, and feed the watchdog: both only while the ledger's thread and the loop make progress."""
    pause_s, lag_s = min(STATUS_SECONDS, systemd.watchdog_seconds() or STATUS_SECONDS), 0.0
    while True:
        await _write_status(parts, lag_s)
        parts.watchdog.feed()
        due = time.monotonic() + pause_s
        await asyncio.sleep(pause_s)
        lag_s = max(time.monotonic() - due, 0.0)


async def _write_status(parts: Parts, lag_s: float = 0.0) -> None:
    ledger = await vitals.of_ledger(parts.committer)
    content = {
        "version": __version__,
        "pid": os.getpid(),
        "boot_id": parts.boot_id,
        "time_ns": time.time_ns(),
        "policy": parts.reloader.setup.policy.version,
        "serial": parts.reloader.setup.policy.config.serial,
        "reload": parts.reloader.as_dict(),
        "model": vitals.of_worker(parts.reloader.worker),
        "process": vitals.of_process() | {"lag_seconds": lag_s, "watchdog_fed": parts.watchdog.fed},
        "fixes": vitals.of_fixes(parts.fixes),
        "holds": dict(parts.line.holds),
        "sessions": vitals.of_intakes(parts.intakes),
        "endpoints": vitals.of_uplinks(parts.reloader.uplinks.running),
        **ledger,
    }
    parts.publish_status(content)
    if parts.beacon is not None:
        parts.beacon.update(content)
    with contextlib.suppress(OSError):  # a full disk must not end the deliveries that may empty it
        await asyncio.to_thread(status.write, parts.setup.status_path, content)
