"""MQTT sessions on paho, driven by asyncio: one `Connection` is one paho client on one TCP connection.

Invariants:
- A connection is never re-pointed or re-used: paho resends what is in flight to whatever it reconnects to, so a lost
  connection is thrown away with its client, and the ledger decides what is sent again.
- A PUBACK to the in-car broker goes out only through `Connection.ack`, and only on the connection that delivered the
  message: after a lost session the same packet identifier may name another message.
- Nothing is sent before `check_peer` has accepted the connected socket: it runs before CONNECT.
- Received messages wait in a bounded queue; when it is full the socket is not read, which pushes back by TCP.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from paho.mqtt.client import Client, ConnectFlags, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from agent.errors import EndpointError
from agent.packets import Delivery, Outgoing, Puback, Session

if TYPE_CHECKING:  # paho defines it for type checkers only
    from paho.mqtt.client import SocketLike

CONNECT_SECONDS = 10.0  # TCP, TLS and CONNACK together
MISC_SECONDS = 1.0  # paho's keep-alive bookkeeping
_NUMBERS = itertools.count(1)

MAX_READS = 64  # packets per readiness event, so that one busy session cannot starve the loop


class _DirectClient(Client):
    """A client that connects to the address it is given, whatever `mqtt_proxy` in the environment says."""

    def _get_proxy(self) -> None:
        """No proxy: its address was not judged, and it would see the traffic."""


class Connection:
    """One connection. Use: `await open()`, then the methods, until `closed` is done; then throw it away."""

    def __init__(
        self,
        session: Session,
        *,
        queue_limit: int = 1,
        queue_bytes: int = 1 << 20,
        check_peer: Callable[[SocketLike], None] = lambda _: None,
    ) -> None:
        self.number = next(_NUMBERS)
        self._session = session
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._check_peer = check_peer
        self._queue_limit = queue_limit
        self._queue_bytes = queue_bytes
        self._queued_bytes = 0
        self._packets = 0
        self._socket: SocketLike | None = None
        self._reading = False
        self._connack: asyncio.Future[bool] = self._loop.create_future()
        self._pubacks: dict[int, asyncio.Future[Puback]] = {}
        self._subacks: dict[int, asyncio.Future[list[ReasonCode]]] = {}
        self._misc: asyncio.Task[None] | None = None
        self.closed: asyncio.Future[str] = self._loop.create_future()
        self._deliveries: deque[Delivery] = deque()
        self._arrived = asyncio.Event()
        self.receive_maximum = 65_535
        self.maximum_packet_size: int | None = None
        self._client = self._make_client()

    def _make_client(self) -> Client:
        session, is_v5 = self._session, self._session.protocol == "5"
        client = _DirectClient(
            CallbackAPIVersion.VERSION2,
            client_id=session.client_id,
            protocol=MQTTProtocolVersion.MQTTv5 if is_v5 else MQTTProtocolVersion.MQTTv311,
            clean_session=None if is_v5 else session.clean_start,
            manual_ack=True,
            reconnect_on_failure=False,
        )
        client.connect_timeout = CONNECT_SECONDS
        client.max_inflight_messages_set(0)  # the uplink keeps its own window
        if session.username:
            client.username_pw_set(session.username, session.password)
        if session.tls is not None:
            client.tls_set_context(session.tls)
        if session.will is not None:
            client.will_set(session.will.topic, session.will.payload, qos=1, retain=True)
        client.on_socket_open = self._on_socket_open
        client.on_socket_close = self._on_socket_close
        client.on_socket_register_write = self._on_register_write
        client.on_socket_unregister_write = self._on_unregister_write
        client.on_connect = self._on_connect
        client.on_disconnect = self._on_disconnect
        client.on_message = self._on_message
        client.on_publish = self._on_publish
        client.on_subscribe = self._on_subscribe
        return client

    async def open(self) -> bool:
        """Connect; whether the broker had kept our session. Raises EndpointError. Cancelling closes the connection."""
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                await self._loop.run_in_executor(None, self._connect)
                self._misc = asyncio.create_task(self._misc_loop(), name=f"mqtt-misc-{self._session.client_id}")
                return await self._connack
        except (OSError, TimeoutError, ValueError) as exc:
            self.close(str(exc) or type(exc).__name__)
            raise EndpointError(f"{self._session.host}:{self._session.port}: {exc or type(exc).__name__}") from exc
        except BaseException:
            self.close("cancelled")
            raise

    def _connect(self) -> None:
        session = self._session
        if session.protocol == "5":
            properties = Properties(PacketTypes.CONNECT)
            properties.SessionExpiryInterval = session.session_expiry_s
            properties.ReceiveMaximum = session.receive_maximum
            properties.MaximumPacketSize = session.maximum_packet_bytes
            self._client.connect(
                session.host, session.port, session.keepalive_s, clean_start=session.clean_start, properties=properties
            )
        else:
            self._client.connect(session.host, session.port, session.keepalive_s)

    async def subscribe(self, filters: Sequence[str]) -> None:
        """Subscribe at QoS 1, without retained messages where MQTT 5 allows. Raises EndpointError when refused."""
        if self._session.protocol == "5":
            options = SubscribeOptions(qos=1, retainHandling=SubscribeOptions.RETAIN_DO_NOT_SEND)
            result, mid = self._client.subscribe([(name, options) for name in filters])
        else:
            result, mid = self._client.subscribe([(name, 1) for name in filters])
        if result != MQTTErrorCode.MQTT_ERR_SUCCESS or mid is None:
            raise EndpointError(f"SUBSCRIBE: {result}")
        self._subacks[mid] = self._loop.create_future()
        async with asyncio.timeout(CONNECT_SECONDS):
            codes = await self._subacks[mid]
        refused = [name for name, code in zip(filters, codes, strict=True) if code.is_failure]
        if refused:
            raise EndpointError(f"the broker refuses to let us subscribe to {', '.join(refused)}")

    async def receive(self) -> Delivery:
        """The next message; raises EndpointError once the connection is closed. Cancelling loses nothing."""
        while not self._deliveries:
            if self.closed.done():
                raise EndpointError(self.closed.result())
            await self._arrived.wait()
            self._arrived.clear()
        delivery = self._deliveries.popleft()
        self._queued_bytes -= len(delivery.payload)
        self._resume_reading()
        return delivery

    def ack(self, delivery: Delivery) -> None:
        """Send the PUBACK of a delivery of this connection; on a closed connection nothing happens."""
        if delivery.connection == self.number and delivery.qos == 1 and not self.closed.done():
            self._client.ack(delivery.mid, delivery.qos)

    def publish(self, message: Outgoing) -> asyncio.Future[Puback]:
        """Publish at QoS 1; the future gives the PUBACK, or EndpointError when the connection is lost before it."""
        future: asyncio.Future[Puback] = self._loop.create_future()
        if self.closed.done():
            future.set_exception(EndpointError(self.closed.result()))
            return future
        properties = message.packed() if self._session.protocol == "5" else None
        info = self._client.publish(message.topic, message.payload, 1, message.retain, properties)
        self._pubacks[info.mid] = future
        return future

    def close(self, reason: str = "closed by us") -> None:
        """End the connection; publishes without PUBACK fail. Idempotent."""
        if self.closed.done():
            return
        self._client.disconnect()
        self._client.loop_write()
        self._finish(reason)

    def _finish(self, reason: str) -> None:
        if self.closed.done():
            return
        self.closed.set_result(reason)
        self._arrived.set()
        self._detach()
        if self._socket is not None:
            self._socket.close()
        if self._misc is not None:
            self._misc.cancel()
        error = EndpointError(reason)
        waiting: list[asyncio.Future[Any]] = [self._connack, *self._pubacks.values(), *self._subacks.values()]
        for future in waiting:
            if not future.done():
                future.set_exception(error)
                future.exception()  # a future that nobody waits for any more is no news
        self._pubacks.clear()

    async def _misc_loop(self) -> None:
        while True:
            await asyncio.sleep(MISC_SECONDS)
            if self._client.loop_misc() != MQTTErrorCode.MQTT_ERR_SUCCESS:
                self._finish("no answer within the keep alive")
                return

    # paho calls the socket callbacks of `connect` in the executor's thread, all others in the loop's.

    def _on_socket_open(self, _client: Client, _userdata: object, sock: SocketLike) -> None:
        try:
            self._check_peer(sock)
        except EndpointError:
            sock.close()  # nothing, not even a DISCONNECT, goes to a peer that is not the endpoint
            raise
        self._loop.call_soon_threadsafe(self._attach, sock)

    def _on_socket_close(self, _client: Client, _userdata: object, _sock: SocketLike) -> None:
        if threading.get_ident() == self._thread:
            self._detach()  # at once: a closed descriptor cannot be taken out of the selector

    def _on_register_write(self, _client: Client, _userdata: object, sock: SocketLike) -> None:
        self._loop.call_soon_threadsafe(self._add_writer, sock)

    def _on_unregister_write(self, _client: Client, _userdata: object, sock: SocketLike) -> None:
        if sock.fileno() >= 0 and threading.get_ident() == self._thread:
            self._loop.remove_writer(sock)

    def _attach(self, sock: SocketLike) -> None:
        if self.closed.done():
            sock.close()
            return
        self._socket = sock
        self._resume_reading()

    def _add_writer(self, sock: SocketLike) -> None:
        if sock.fileno() >= 0 and not self.closed.done():
            self._loop.add_writer(sock, self._client.loop_write)

    def _detach(self) -> None:
        if self._socket is not None and self._socket.fileno() >= 0:
            self._loop.remove_reader(self._socket)
            self._loop.remove_writer(self._socket)
        self._reading = False

    def _resume_reading(self) -> None:
        if self._socket is None or self._reading or self._queue_is_full() or self.closed.done():
            return
        self._reading = True
        self._loop.add_reader(self._socket, self._read)
        self._loop.call_soon(self._read)  # TLS may hold bytes that the selector does not see

    def _read(self) -> None:
        for _ in range(MAX_READS):
            if not self._reading:
                return
            if self._queue_is_full():
                self._pause_reading()
                return
            before = self._packets
            if self._client.loop_read() != MQTTErrorCode.MQTT_ERR_SUCCESS:
                self._finish("the connection was lost")
                return
            if self._packets == before:
                return  # no whole packet was there: the selector calls again
        self._loop.call_soon(self._read)

    def _queue_is_full(self) -> bool:
        return len(self._deliveries) >= self._queue_limit or self._queued_bytes >= self._queue_bytes

    def _pause_reading(self) -> None:
        if self._socket is not None:
            self._loop.remove_reader(self._socket)
        self._reading = False

    def _on_connect(
        self, _client: Client, _userdata: object, flags: ConnectFlags, code: ReasonCode, properties: Properties | None
    ) -> None:
        self._packets += 1
        if self._connack.done():
            return
        if code.is_failure:
            self._connack.set_exception(EndpointError(f"CONNACK: {code}"))
            return
        self.receive_maximum = getattr(properties, "ReceiveMaximum", 65_535)
        self.maximum_packet_size = getattr(properties, "MaximumPacketSize", None)
        self._connack.set_result(flags.session_present)

    def _on_disconnect(self, _client: Client, _userdata: object, _flags: object, code: ReasonCode, _: object) -> None:
        self._loop.call_soon_threadsafe(self._finish, f"DISCONNECT: {code}")

    def _on_message(self, _client: Client, _userdata: object, message: MQTTMessage) -> None:
        self._packets += 1
        properties = message.properties
        delivery = Delivery(
            connection=self.number,
            topic=message._topic.decode("utf-8", "backslashreplace"),  # noqa: SLF001 - `topic` raises on bad UTF-8
            payload=bytes(message.payload),
            mid=message.mid,
            qos=message.qos,
            dup=message.dup,
            retain=message.retain,
            content_type=getattr(properties, "ContentType", None),
            properties=tuple(getattr(properties, "UserProperty", ())),
            received_ns=time.time_ns(),
            monotonic_ns=time.clock_gettime_ns(time.CLOCK_BOOTTIME),
        )
        self._queued_bytes += len(delivery.payload)
        self._deliveries.append(delivery)
        self._arrived.set()

    def _on_publish(self, _client: Client, _userdata: object, mid: int, code: ReasonCode, _: object) -> None:
        self._packets += 1
        future = self._pubacks.pop(mid, None)
        if future is not None and not future.done():
            future.set_result(Puback(code=code.value))

    def _on_subscribe(self, _client: Client, _userdata: object, mid: int, codes: list[ReasonCode], _: object) -> None:
        self._packets += 1
        future = self._subacks.pop(mid, None)
        if future is not None and not future.done():
            future.set_result(codes)
