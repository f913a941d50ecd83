"""MQTT sessions on paho, driven by asyncio: one `Connection` is one paho client on one TCP connection.

Invariants:
- A connection is never re-pointed or re-used: a lost connection is thrown away with its client, and the ledger decides
  what is sent again, and to whom.
- A PUBACK to the in-car broker goes out only through `Connection.ack`, and only on the connection that delivered the
  message: after a lost session the same packet identifier may name another message.
- Received messages wait in a bounded queue; while it is full the socket is not read, which pushes back by TCP. Who only
  publishes takes none: they would hold back the PUBACKs behind them.
- Each delivery says how long it may have lain in the socket unseen, so that a stalled process is no hidden delay.
- A connection that failed is reset: what its socket had not sent yet goes to nobody.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from paho.mqtt.client import Client, ConnectFlags
from paho.mqtt.enums import MQTTErrorCode
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from agent.boot import boot_ns
from agent.errors import EndpointError
from agent.mqtt.client import DirectClient, Incoming, connect, new_client
from agent.mqtt.dialling import dialled
from agent.mqtt.inbox import Inbox
from agent.mqtt.packets import Delivery, Outgoing, Puback, Session
from agent.mqtt.transport import Transport

if TYPE_CHECKING:  # paho defines it for type checkers only
    from paho.mqtt.client import SocketLike

CONNECT_SECONDS = 10.0  # TCP, TLS and CONNACK together
SUBSCRIBE_SECONDS = 60.0  # the SUBACK comes behind all that a resumed session had kept
MISC_SECONDS = 1.0  # paho's keep-alive bookkeeping, and a look at the socket
_NUMBERS = itertools.count(1)

PACKET_TOO_LARGE = 0x95  # MQTT 5.0, 2.4


class Connection:
    """One connection. Use: `await open()`, then the methods, until `closed` is done; then throw it away."""

    def __init__(
        self,
        session: Session,
        *,
        queue_limit: int = 0,
        queue_bytes: int = 1 << 20,
        check_peer: Callable[[SocketLike], None] = lambda _: None,
        prompt: bool = False,
    ) -> None:
        """`prompt`: messages shall not wait in the broker until we send something (`Gauge.acknowledge`).

        Without a `queue_limit` we only publish: a message that comes all the same is passed over, without a PUBACK, and
        a packet above the session's limit ends the connection before it is read.
        """
        self.number = next(_NUMBERS)
        self._session = session
        self._loop = asyncio.get_running_loop()
        self._takes = queue_limit > 0
        self._inbox = Inbox(queue_limit, queue_bytes)
        self._connack: asyncio.Future[bool] = self._loop.create_future()
        self._pubacks: dict[int, asyncio.Future[Puback]] = {}
        self._subacks: dict[int, asyncio.Future[list[ReasonCode]]] = {}  # and UNSUBACKs
        self._misc: asyncio.Task[None] | None = None
        self._handed = (0, 0)  # bytes that the kernel has been given, and after how many writes
        self.closed: asyncio.Future[str] = self._loop.create_future()
        self.receive_maximum = 65_535
        self.maximum_packet_size: int | None = None
        self._client = self._make_client()
        self._transport = Transport(
            self._client,
            check_peer=check_peer,
            wanted=lambda: not (self._takes and self._inbox.full),
            lost=self._finish,
            prompt=prompt,
        )

    def _make_client(self) -> DirectClient:
        client = new_client(self._session)
        if not self._takes:
            client.largest, client.only_publishes = self._session.maximum_packet_bytes, True
        client.on_connect = self._on_connect
        client.on_disconnect = self._on_disconnect
        client.on_incoming = self._on_incoming
        client.on_puback = self._on_puback
        client.on_subscribe = client.on_unsubscribe = self._on_suback
        return client

    async def open(self) -> bool:
        """Connect; whether the broker had kept our session. Raises EndpointError. Cancelling closes the connection."""
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                connect(self._client, self._session, await dialled(self._session))
                self._misc = asyncio.create_task(self._misc_loop(), name=f"mqtt-misc-{self._session.client_id}")
                return await self._connack
        except (OSError, TimeoutError, ValueError) as exc:
            self.close(str(exc) or type(exc).__name__)
            raise EndpointError(f"{self._session.host}:{self._session.port}: {str(exc) or type(exc).__name__}") from exc
        except BaseException:
            self.close("cancelled")
            raise

    async def subscribe(self, filters: Sequence[str]) -> None:
        """Subscribe at QoS 1, without retained messages where MQTT 5 allows. Raises EndpointError when refused."""
        if self._session.protocol == "5":
            options = SubscribeOptions(qos=1, retainHandling=SubscribeOptions.RETAIN_DO_NOT_SEND)
            result, mid = self._client.subscribe([(name, options) for name in filters])
        else:
            result, mid = self._client.subscribe([(name, 1) for name in filters])
        codes = await self._suback("SUBSCRIBE", result, mid)
        refused = [name for name, code in zip(filters, codes, strict=True) if code.is_failure]
        if refused:
            raise EndpointError(f"the broker refuses to let us subscribe to {', '.join(refused)}")

    async def unsubscribe(self, filters: Sequence[str]) -> bool:
        """End these subscriptions, as far as there are any; whether the broker did. Raises EndpointError."""
        result, mid = self._client.unsubscribe(list(filters))
        codes = await self._suback("UNSUBSCRIBE", result, mid)  # MQTT 3.1.1 has none: it is done
        return not any(code.is_failure for code in codes)

    async def _suback(self, packet: str, result: MQTTErrorCode, mid: int | None) -> list[ReasonCode]:
        if result != MQTTErrorCode.MQTT_ERR_SUCCESS or mid is None:
            raise EndpointError(f"{packet}: {result}")
        self._subacks[mid] = self._loop.create_future()
        async with asyncio.timeout(SUBSCRIBE_SECONDS):
            return await self._subacks[mid]

    async def receive(self) -> Delivery:
        """The next message; raises EndpointError once the connection is closed. Cancelling loses nothing."""
        while not self._inbox:
            if self.closed.done():
                raise EndpointError(self.closed.result())
            await self._inbox.arrived.wait()
            self._inbox.arrived.clear()
        delivery = self._inbox.take()
        if self._inbox.low:
            self._transport.resume()
        return delivery

    def ack(self, delivery: Delivery) -> None:
        """Send the PUBACK of a delivery of this connection; on a closed connection nothing happens."""
        if delivery.connection == self.number and delivery.qos == 1 and not self.closed.done():
            self._client.acknowledge(delivery.mid)

    def publish(self, message: Outgoing) -> asyncio.Future[Puback]:
        """Publish at QoS 1; the future gives the PUBACK, or EndpointError when the connection is lost before it.

        A message above the broker's Maximum Packet Size is not sent: the future gives Packet too large.
        """
        future: asyncio.Future[Puback] = self._loop.create_future()
        if self.closed.done():
            future.set_exception(EndpointError(self.closed.result()))
            return future
        is_v5 = self._session.protocol == "5"
        packed = message.packed() if is_v5 else b""
        size = message.size(packed)
        if self.maximum_packet_size is not None and size > self.maximum_packet_size:
            future.set_result(Puback(code=PACKET_TOO_LARGE))
            return future
        self._pubacks[self._client.send(message, packed, self._pubacks)] = future
        self._transport.unsent += size
        return future

    async def slot(self) -> None:
        """Return once the peer's Receive Maximum leaves room for a publish, or the connection has ended.

        Cancelling is safe.
        """
        while len(self._pubacks) >= self.receive_maximum:
            await asyncio.wait([*self._pubacks.values()], return_when=asyncio.FIRST_COMPLETED)

    @property
    def unsent(self) -> int:
        """Bytes of publishes that wait for the socket."""
        return self._transport.unsent

    def on_drained(self, call: Callable[[], None]) -> None:
        """Have `call` called whenever the socket has taken all publishes."""
        self._transport.on_drained = call

    def goal(self) -> int:
        """What `acknowledged` must reach until the peer's TCP has all that was published so far."""
        gauge, writes = self._transport.gauge, self._client.writes
        if gauge is None:
            return 0
        if self._handed[0] != writes:
            self._handed = (writes, gauge.goal())
        return self._handed[1] + self.unsent

    def acknowledged(self) -> int:
        """Bytes that the peer's TCP has taken so far: a sign of life while a large record is under way."""
        gauge = self._transport.gauge
        return gauge.acknowledged() if gauge is not None else 0

    def close(self, reason: str = "closed by us") -> None:
        """Say goodbye and end the connection; publishes without PUBACK fail. Idempotent."""
        if self.closed.done():
            return
        self._client.disconnect()
        self._client.loop_write()
        self._finish(reason, graceful=True)

    def abort(self, reason: str) -> None:
        """End the connection at once; nothing more of it reaches the peer. Idempotent."""
        self._finish(reason)

    def _finish(self, reason: str, *, graceful: bool = False) -> None:
        if self.closed.done():
            return
        self.closed.set_result(reason)
        self._inbox.arrived.set()
        self._transport.end(graceful=graceful)
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
            if not self._transport.keep_alive():
                self._finish("no answer within the keep alive")
                return

    def _on_connect(
        self, _client: Client, _userdata: object, flags: ConnectFlags, code: ReasonCode, properties: Properties | None
    ) -> None:
        self._transport.packets += 1
        if self._connack.done():
            return
        if code.is_failure:
            self._connack.set_exception(EndpointError(f"CONNACK: {code}"))
            return
        self.receive_maximum = getattr(properties, "ReceiveMaximum", 65_535)
        self.maximum_packet_size = getattr(properties, "MaximumPacketSize", None)
        if self.receive_maximum < 1 or getattr(properties, "MaximumQoS", 1) < 1:
            self._connack.set_exception(EndpointError("CONNACK: the broker takes nothing at QoS 1"))
            return
        self._connack.set_result(flags.session_present)

    def _on_disconnect(self, _client: Client, _userdata: object, _flags: object, code: ReasonCode, _: object) -> None:
        self._loop.call_soon(self._finish, f"DISCONNECT: {code}")

    def _on_incoming(self, message: Incoming) -> None:
        self._transport.packets += 1
        if not self._takes:
            return
        gauge, now_ns = self._transport.gauge, boot_ns()
        delivery = Delivery(
            connection=self.number,
            topic=message.topic.decode("utf-8", "backslashreplace"),
            payload=message.payload,
            mid=message.mid,
            qos=message.qos,
            dup=message.dup,
            retain=message.retain,
            content_type=message.content_type,
            properties=message.properties,
            malformed=message.malformed,
            received_ns=time.time_ns(),
            monotonic_ns=now_ns,
            unseen_ns=gauge.unseen_ns(now_ns) if gauge is not None else 0,
        )
        self._inbox.put(delivery)

    def _on_puback(self, mid: int, code: int) -> None:
        self._transport.packets += 1
        future = self._pubacks.pop(mid, None)
        if future is not None and not future.done():
            future.set_result(Puback(code=code))

    def _on_suback(self, _client: Client, _userdata: object, mid: int, codes: list[ReasonCode], _: object) -> None:
        self._transport.packets += 1
        future = self._subacks.pop(mid, None)
        if future is not None and not future.done():
            future.set_result(codes)
