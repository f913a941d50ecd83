"""The agent as a process of its own: started, asked for its status, killed, ended."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from agent.errors import AgentError
from tools import processes

READY_SECONDS = 90.0  # a limit for busy machines; an idle one takes two
STOP_SECONDS = 30.0
POLL_SECONDS = 0.3
OK_STATUSES = (0, 1)  # 1: the counters are not conserved, which the status itself says as well


class AgentProcessError(AgentError):
    """The agent did not start, or ended by itself; the message holds the end of its log."""


class AgentProcess:
    """One configured agent; over restarts the configuration, its state and the log stay the same."""

    def __init__(self, configuration: Path, log_path: Path) -> None:
        self.configuration = configuration
        self.log_path = log_path
        self._process: asyncio.subprocess.Process | None = None

    async def start(self, ready_seconds: float = READY_SECONDS) -> None:
        """Start and return once every intake session is connected; raises AgentProcessError."""
        parent = shutil.which("setpriv")
        prefix = [parent, "--pdeathsig", "KILL"] if parent else []
        command = [*prefix, sys.executable, "-m", "agent", "run", str(self.configuration)]
        with self.log_path.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *command, stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log
            )
        await self.until(_connected, ready_seconds, self._written)

    async def stop(self) -> None:
        """SIGTERM, which drains; SIGKILL where it does not end in time."""
        await self._end(signal.SIGTERM)

    async def kill(self) -> None:
        """SIGKILL."""
        await self._end(signal.SIGKILL)

    async def status(self) -> dict[str, Any]:
        """What `residency-agent status --json` prints; empty before the agent has written anything."""
        code, output = await _output("status", "--json", str(self.configuration))
        found: dict[str, Any] = json.loads(output) if code in OK_STATUSES and output else {}
        return found

    async def audit(self) -> tuple[bool, str]:
        """Let `residency-agent audit verify` check the ledger's chain: whether it is intact, and what it printed."""
        ledger = self.configuration.parent / "state" / "ledger.sqlite"
        code, output = await _output("audit", "verify", str(ledger))
        return code == 0, output.strip().replace(f"{ledger}: ", "")

    async def until(
        self,
        condition: Callable[[dict[str, Any], int], bool],
        seconds: float,
        ask: Callable[[], Awaitable[dict[str, Any]]] | None = None,
    ) -> dict[str, Any]:
        """Ask until the condition holds of the status and the process id; raises AgentProcessError after `seconds`."""
        try:
            async with asyncio.timeout(seconds):
                while True:
                    found = await (ask or self.status)()
                    if self._process is None or self._process.returncode is not None:
                        raise AgentProcessError(self._story("ended by itself"))
                    if found and condition(found, self._process.pid):
                        return found
                    await asyncio.sleep(POLL_SECONDS)
        except TimeoutError as exc:
            raise AgentProcessError(self._story(f"is not where it should be after {seconds:g} s")) from exc

    async def _written(self) -> dict[str, Any]:
        """What the agent itself wrote last: cheaper than asking a process of its own, but without fresh counters."""
        try:
            found: dict[str, Any] = json.loads((self.configuration.parent / "state" / "status.json").read_bytes())
        except (OSError, ValueError):
            return {}
        return found

    async def _end(self, number: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        await processes.end(process, number, STOP_SECONDS)

    def _story(self, what: str) -> str:
        tail = self.log_path.read_text(errors="replace")[-2000:] if self.log_path.exists() else ""
        return f"the agent {what}; the end of {self.log_path}:\n{tail.strip()}"


async def _output(*arguments: str) -> tuple[int, str]:
    """Run one command of the agent to its end: exit status and standard output. Cancelling ends it."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "agent", *arguments),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        output, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()
    return process.returncode or 0, output.decode(errors="replace")


@asynccontextmanager
async def agent(configuration: Path, log_path: Path) -> AsyncIterator[AgentProcess]:
    """A running, connected agent; it is ended at the end."""
    process = AgentProcess(configuration, log_path)
    try:
        await process.start()
        yield process
    finally:
        await process.stop()


def _connected(found: dict[str, Any], pid: int) -> bool:
    """Whether this very process, not one before it, has every intake session."""
    sessions = found.get("sessions", {}).values()
    return found.get("pid") == pid and bool(sessions) and all(session["connected"] for session in sessions)
