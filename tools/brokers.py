"""Brokers on loopback as processes of their own: mosquitto, or amqtt where mosquitto is not installed.

Each broker listens on a free port, is ready when it accepts a connection, and is ended by its own process id. It also
ends when the process that started it is killed: mosquitto by the parent-death signal where `setpriv` (util-linux) is
installed, amqtt by the end of its standard input.
"""

from __future__ import annotations

import asyncio
import getpass
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from agent.errors import AgentError
from tools import processes

HOST = "127.0.0.1"
FIRST_PORT, LAST_PORT = 15_000, 32_000  # below Linux's ephemeral range, so a restart finds its port still free
START_SECONDS = 20.0
STOP_SECONDS = 5.0
POLL_SECONDS = 0.02
ATTEMPTS = 3  # another process may take the chosen port first

Command = Callable[[int, Path], list[str]]
_CHOICE = random.SystemRandom()
_HELD: dict[int, int] = {}  # ports that this process picked, each with the descriptor of the socket that tells so


class BrokerError(AgentError, OSError):
    """A broker is not installed, or did not start; the message holds the end of its log."""


class Broker:
    """One broker process. The port and the folder (configuration, log, persistence) stay the same over restarts."""

    host = HOST

    def __init__(self, kind: str, command: Command, folder: Path, port: int | None = None) -> None:
        self.kind = kind
        self.folder = folder
        self.port = port or free_port()
        self.log_path = folder / f"{kind}.log"
        self._command = command
        self._fixed_port = port is not None
        self._process: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int | None:
        """The process id while the broker runs."""
        return self._process.pid if self._process is not None and self._process.returncode is None else None

    async def start(self) -> None:
        """Start the process and return once it accepts connections; raises BrokerError."""
        for attempt in range(1, ATTEMPTS + 1):
            try:
                await self._start_once()
            except BrokerError:
                if self._fixed_port or attempt == ATTEMPTS:
                    raise
                give_back(self.port)
                self.port = free_port()
            else:
                self._fixed_port = True
                return

    async def stop(self) -> None:
        """SIGTERM and wait; SIGKILL where it does not end in time."""
        await self._end(signal.SIGTERM)

    async def kill(self) -> None:
        """SIGKILL and wait: the broker gets no chance to save anything."""
        await self._end(signal.SIGKILL)

    async def restart(self) -> None:
        """Stop where it still runs, then start again on the same port with the same folder."""
        await self.stop()
        await self.start()

    async def _start_once(self) -> None:
        command = self._command(self.port, self.folder)
        with self.log_path.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *command, stdin=asyncio.subprocess.PIPE, stdout=log, stderr=log
            )
        try:
            async with asyncio.timeout(START_SECONDS):
                await self._accepts()
        except BaseException as exc:
            await self.kill()
            if isinstance(exc, TimeoutError):
                raise BrokerError(self._story("did not accept a connection in time")) from exc
            raise

    async def _accepts(self) -> None:
        while not await _connects(self.port):
            if self.pid is None:
                raise BrokerError(self._story("ended while it started"))
            await asyncio.sleep(POLL_SECONDS)
        if self.pid is None:
            raise BrokerError(self._story("ended; another process has its port"))

    async def _end(self, number: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        if process.stdin is not None:
            process.stdin.close()
        await processes.end(process, number, STOP_SECONDS)

    def _story(self, what: str) -> str:
        tail = self.log_path.read_text(errors="replace")[-1000:] if self.log_path.exists() else ""
        return f"{self.kind} on port {self.port} {what}: {tail.strip() or 'no log'}"


def free_port() -> int:
    """Pick a loopback port that nothing listens on now, outside the range of outgoing connections.

    No other process picks it until this one ends or gives it back, also while a broker on it is down: two runs beside
    each other do not meet. A name of Linux's abstract sockets tells that, which the kernel forgets with its process.
    """
    for _ in range(1000):
        port = _CHOICE.randint(FIRST_PORT, LAST_PORT)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
        if _hold(port):
            return port
    message = f"no free port in {FIRST_PORT}-{LAST_PORT}"
    raise BrokerError(message)


def _hold(port: int) -> bool:
    name = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        name.bind(f"\0residency-tools-port-{port}")
    except OSError:
        name.close()
        return False
    _HELD[port] = name.detach()  # open until it is given back, or this process ends
    return True


def give_back(port: int) -> None:
    """Let others pick a port of `free_port` again; nothing where it is none."""
    descriptor = _HELD.pop(port, None)
    if descriptor is not None:
        os.close(descriptor)


def mosquitto_path() -> str | None:
    """Where mosquitto is installed: on the PATH or in /usr/sbin, where Debian puts it; None where it is not."""
    return shutil.which("mosquitto", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/usr/local/sbin")


@asynccontextmanager
async def mosquitto(
    *, config_lines: Sequence[str] = (), folder: Path | None = None, port: int | None = None
) -> AsyncIterator[Broker]:
    """Run mosquitto. The lines follow the listener's, so they may set TLS, ACLs, persistence, any limit.

    A line replaces the default with the same key. Files go to `folder`, by default one that is deleted at the end.
    """
    path = mosquitto_path()
    if path is None:
        message = "mosquitto is not installed; on Debian and Ubuntu: apt-get install mosquitto"
        raise BrokerError(message)

    def command(chosen: int, where: Path) -> list[str]:
        configuration = where / "mosquitto.conf"
        configuration.write_text(_mosquitto_text(chosen, where, config_lines), encoding="utf-8")
        return [*_ends_with_parent(), path, "-c", str(configuration)]

    async with _running("mosquitto", command, folder, port) as broker:
        yield broker


@asynccontextmanager
async def amqtt(*, folder: Path | None = None, port: int | None = None) -> AsyncIterator[Broker]:
    """Run amqtt: MQTT 3.1.1, no persistence, no properties."""

    def command(chosen: int, _where: Path) -> list[str]:
        return [sys.executable, "-m", "tools.embedded_broker", str(chosen)]

    async with _running("amqtt", command, folder, port) as broker:
        yield broker


@asynccontextmanager
async def installed(*, folder: Path | None = None, port: int | None = None) -> AsyncIterator[Broker]:
    """Run mosquitto where it is installed, else amqtt."""
    manager = mosquitto if mosquitto_path() else amqtt
    async with manager(folder=folder, port=port) as broker:
        yield broker


@asynccontextmanager
async def _running(kind: str, command: Command, folder: Path | None, port: int | None) -> AsyncIterator[Broker]:
    """Start, yield, and stop whatever happens; a folder of its own is deleted afterwards."""
    where = folder or Path(tempfile.mkdtemp(prefix=f"{kind}-"))
    where.mkdir(parents=True, exist_ok=True)
    broker = Broker(kind, command, where, port)
    try:
        await broker.start()
        yield broker
    finally:
        await broker.stop()
        give_back(broker.port)
        if folder is None:
            shutil.rmtree(where, ignore_errors=True)


def _mosquitto_text(port: int, folder: Path, lines: Sequence[str]) -> str:
    """Defaults first, then the caller's lines; a default whose key the caller sets is left out."""
    defaults = [
        f"listener {port} {HOST}",
        "allow_anonymous true",
        "persistence false",
        f"persistence_location {folder}/",
        f"user {getpass.getuser()}",
        "max_queued_messages 0",
        "log_dest stderr",
        "log_type error",
        "log_type warning",
        "log_type notice",
    ]
    replaced = {line.split(maxsplit=1)[0] for line in lines if line.strip()}
    return "\n".join([line for line in defaults if line.split(maxsplit=1)[0] not in replaced] + [*lines, ""])


def _ends_with_parent() -> list[str]:
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", "KILL"] if setpriv else []


async def _connects(port: int) -> bool:
    try:
        _reader, writer = await asyncio.open_connection(HOST, port)
    except OSError:
        return False
    writer.close()
    try:
        await writer.wait_closed()
    except OSError:
        return True
    return True
