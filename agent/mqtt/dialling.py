"""TCP connections, with TLS where a session asks for it, made on the event loop: giving one up ends it at once.

Invariant: what is cancelled leaves no attempt behind. No SYN is sent again, and a handshake under way is reset.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import os
import socket
import ssl
from collections.abc import Callable, Iterator
from typing import Any

from agent.mqtt.packets import Session
from agent.mqtt.sockets import reset
from agent.mqtt.threads import beside


async def dialled(session: Session) -> socket.socket:
    """A connected socket that does not block, its TLS handshake done; the host's addresses are tried in turn.

    Raises OSError, of which ssl.SSLError is one, and ValueError for a name that no certificate can have. Cancelling
    closes the socket.
    """
    ask = functools.partial(socket.getaddrinfo, session.host, session.port, type=socket.SOCK_STREAM)
    failure = OSError(f"{session.host} has no address")
    for family, kind, protocol, _, address in await beside(ask, name=f"resolve-{session.host}"):
        try:
            sock = await _connected(socket.socket(family, kind | socket.SOCK_NONBLOCK, protocol), address)
        except OSError as exc:
            failure = exc
            continue
        return sock if session.tls is None else await _secured(sock, session.tls, session.server_name or session.host)
    raise failure


async def _connected(sock: socket.socket, address: Any) -> socket.socket:  # noqa: ANN401 - as getaddrinfo gives it
    loop = asyncio.get_running_loop()
    with _closed_on_failure(sock):
        code = sock.connect_ex(address)
        if code == errno.EINPROGRESS:
            await _ready(sock, loop.add_writer, loop.remove_writer)
            code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            raise OSError(code, os.strerror(code))
    return sock


async def _secured(sock: socket.socket, context: ssl.SSLContext, name: str) -> socket.socket:
    with _closed_on_failure(sock):
        secured = context.wrap_socket(sock, server_hostname=name, do_handshake_on_connect=False)
    with _closed_on_failure(secured):
        await _shake_hands(secured)
    return secured


@contextlib.contextmanager
def _closed_on_failure(sock: socket.socket) -> Iterator[None]:
    try:
        yield
    except BaseException as exc:
        if isinstance(exc, asyncio.CancelledError):
            reset(sock)
        sock.close()
        raise


async def _shake_hands(sock: ssl.SSLSocket) -> None:
    loop = asyncio.get_running_loop()
    while True:
        try:
            sock.do_handshake()
        except ssl.SSLWantReadError:
            await _ready(sock, loop.add_reader, loop.remove_reader)
        except ssl.SSLWantWriteError:
            await _ready(sock, loop.add_writer, loop.remove_writer)
        else:
            return


async def _ready(
    sock: socket.socket,
    add: Callable[[socket.socket, Callable[[], None]], None],
    remove: Callable[[socket.socket], bool],
) -> None:
    ready = asyncio.Event()
    add(sock, ready.set)
    try:
        await ready.wait()
    finally:
        remove(sock)
