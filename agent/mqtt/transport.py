"""The socket under an MQTT connection: paho's client on the event loop's selector.

Invariants:
- Nothing is sent before `check_peer` has accepted the connected socket: it runs before CONNECT.
- The socket is read only while `wanted` says so; bytes that the broker sends meanwhile push back by TCP.
- Whatever paho raises over a packet that makes no sense ends this connection, and nothing else.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

from paho.mqtt.client import Client
from paho.mqtt.enums import MQTTErrorCode

from agent.mqtt.client import DirectClient
from agent.mqtt.sockets import Gauge, reset

if TYPE_CHECKING:  # paho defines it for type checkers only
    import socket

    from paho.mqtt.client import SocketLike

MAX_READS = 64  # packets per readiness event, so that one busy session cannot starve the loop


class Transport:
    """Drives one client's one socket. `lost` is called once, with the reason, when the connection has ended.

    `packets` is counted up by the client's callbacks: a read that leaves it as it was has emptied the socket.
    `prompt`: see `Gauge.acknowledge`; it costs packets, which a link to a region may have to pay for.
    """

    def __init__(
        self,
        client: DirectClient,
        *,
        check_peer: Callable[[SocketLike], None],
        wanted: Callable[[], bool],
        lost: Callable[[str], None],
        prompt: bool,
    ) -> None:
        self.gauge: Gauge | None = None
        self.packets = 0
        self.unsent = 0
        self.on_drained: Callable[[], None] = lambda: None
        self._client = client
        self._check_peer = check_peer
        self._wanted = wanted
        self._lost = lost
        self._prompt = prompt
        self._loop = asyncio.get_running_loop()
        self._socket: socket.socket | None = None
        self._reading = self._writing = False
        self._ended = False
        client.on_socket_open = self._on_open
        client.on_socket_close = self._on_close
        client.on_socket_register_write = self._on_register_write
        client.on_socket_unregister_write = self._on_unregister_write

    def keep_alive(self) -> bool:
        """To be called every second: paho's keep alive; False where the peer did not answer in time.

        The peer's Server Keep Alive, which paho takes over, goes before ours (MQTT 5.0, 3.2.2.3.14).
        """
        if self.gauge is not None:
            self.gauge.look_out()
            self._look_in()
            if self.gauge.moved_within(self._client.keepalive):
                return True  # a PINGREQ would wait behind the bytes that are under way, and be missed
        return self._client.loop_misc() == MQTTErrorCode.MQTT_ERR_SUCCESS

    def resume(self) -> None:
        """Read on, where reading had stopped because nothing was wanted."""
        if self._socket is None or self._reading or self._ended or not self._wanted():
            return
        self._reading = True
        self._loop.add_reader(self._socket, self._read)
        self._loop.call_soon(self._read)  # TLS may hold bytes that the selector does not see

    def end(self, *, graceful: bool) -> None:
        """Close the socket; unless graceful, what it had not sent yet goes to nobody. Idempotent."""
        self._ended = True
        self._detach()
        if self._socket is not None:
            if not graceful:
                reset(self._socket)
            self._socket.close()

    def _on_open(self, _client: Client, _userdata: object, sock: SocketLike) -> None:
        self._check_peer(sock)
        self._socket = cast("socket.socket", sock)
        self.gauge = Gauge(self._socket)
        self.resume()

    def _on_close(self, _client: Client, _userdata: object, _sock: SocketLike) -> None:
        self._detach()  # at once: a closed descriptor cannot be taken out of the selector

    def _on_register_write(self, _client: Client, _userdata: object, sock: SocketLike) -> None:
        self._loop.call_soon(self._write, sock)  # together with what else is published in this turn of the loop

    def _on_unregister_write(self, _client: Client, _userdata: object, sock: SocketLike) -> None:
        if self._writing and sock.fileno() >= 0:
            self._loop.remove_writer(sock)
        self._writing = False
        self.unsent = 0
        self.on_drained()

    def _write(self, sock: SocketLike) -> None:
        """Write what waits, and the rest when the socket has room again."""
        if sock.fileno() < 0 or self._ended:
            return
        self._client.loop_write()
        if self._client.want_write() and sock.fileno() >= 0 and not self._ended and not self._writing:
            self._writing = True
            self._loop.add_writer(sock, self._client.loop_write)

    def _detach(self) -> None:
        if self._socket is not None and self._socket.fileno() >= 0:
            self._loop.remove_reader(self._socket)
            self._loop.remove_writer(self._socket)
        self._reading = self._writing = False

    def _read(self) -> None:
        for _ in range(MAX_READS):
            if not self._reading:
                return
            if not self._wanted():
                self._pause()
                return
            before = self.packets
            if not self._read_once():
                return
            found = self.packets > before and self._client.emptied_ns is None
            if not (found or self._client.has_packet):
                self._look_in(self._client.emptied_ns)
                return  # no other whole packet is there: the selector calls again
        self._loop.call_soon(self._read)

    def _look_in(self, emptied_ns: int | None = None) -> None:
        """Note the moment if nothing waits to be read, neither in the socket nor behind it, or when nothing did."""
        if self.gauge is not None and self._reading and not self._client.has_packet:
            self.gauge.look_in(emptied_ns)
            if self._prompt:
                self.gauge.acknowledge()

    def _read_once(self) -> bool:
        """Let paho read; False once the connection has ended."""
        try:
            result = self._client.loop_read()
        except Exception as exc:  # noqa: BLE001 - paho raises many kinds for packets that make no sense
            self._lost(f"protocol error: {type(exc).__name__}")
            return False
        if result != MQTTErrorCode.MQTT_ERR_SUCCESS:
            self._lost("the connection was lost")
            return False
        return True

    def _pause(self) -> None:
        if self._socket is not None:
            self._loop.remove_reader(self._socket)
        self._reading = False
