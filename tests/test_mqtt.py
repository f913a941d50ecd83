import asyncio
import select
import socket
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from paho.mqtt.client import Client
from paho.mqtt.enums import MQTTErrorCode
from paho.mqtt.exception import MQTTException
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from agent.boot import boot_ns
from agent.errors import EndpointError
from agent.mqtt.client import SEND_BYTES, Incoming, _incoming, new_client
from agent.mqtt.connection import Connection
from agent.mqtt.packets import Outgoing, Session
from agent.mqtt.sockets import Gauge
from agent.mqtt.transport import Transport
from tools.brokers import mosquitto


def session(broker, name, **changes):
    return Session(host=broker.host, port=broker.port, client_id=name, **changes)


async def opened(broker, name="tester", **changes):
    options = {
        key: changes.pop(key) for key in ("queue_limit", "queue_bytes", "check_peer", "prompt") if key in changes
    }
    connection = Connection(session(broker, name, **changes), **{"queue_limit": 1} | options)
    connection.was_present = await connection.open()
    return connection


async def publish(broker, topic, payloads, **changes):
    sender = await opened(broker, "sender")
    pubacks = await asyncio.gather(
        *(sender.publish(Outgoing(topic=topic, payload=payload, **changes)) for payload in payloads)
    )
    sender.close()
    return pubacks


async def test_keep_alive_that_the_broker_asks_for_goes_before_ours(endpoint, patience):
    endpoint.connack_properties = {"server_keep_alive": 1}
    async with asyncio.timeout(patience):
        connection = await opened(endpoint, keepalive_s=3600)
        await connection.publish(Outgoing(topic="car/a", payload=bytes(200)))
        await endpoint.until(lambda: endpoint.session.pings)
        connection.close()


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
async def test_published_bytes_arrive_in_order(broker, patience, protocol):
    async with asyncio.timeout(patience):
        receiver = await opened(broker, protocol=protocol, queue_limit=10, queue_bytes=1 << 20)
        await receiver.subscribe(["car/#"])
        payloads = [bytes([number]) * 100 for number in range(50)]
        await publish(broker, "car/a", payloads)
        got = []
        for _ in payloads:
            delivery = await receiver.receive()
            got.append(delivery.payload)
            receiver.ack(delivery)
        receiver.close()
    assert got == payloads


async def test_broker_holds_nothing_back_until_we_send_something(broker, patience):
    async with asyncio.timeout(patience):
        receiver = await opened(broker, prompt=True, queue_limit=10, queue_bytes=1 << 20)
        await receiver.subscribe(["car/#"])
        waits = []
        for _ in range(20):
            begun = time.monotonic()
            await receiver.publish(Outgoing(topic="car/a", payload=b"x"))  # its PUBACK is sent, then the message
            receiver.ack(await receiver.receive())
            waits.append(time.monotonic() - begun)
        receiver.close()
    assert min(waits[10:]) < 0.03, "TCP's delayed acknowledgement: 40 ms, each time"


async def test_content_type_and_user_properties_travel(broker, patience):
    async with asyncio.timeout(patience):
        receiver = await opened(broker)
        await receiver.subscribe(["car/#"])
        await publish(broker, "car/a", [b"x"], content_type="image/jpeg", properties=[("time", "1"), ("time", "2")])
        delivery = await receiver.receive()
        receiver.close()
    assert delivery.content_type == "image/jpeg"
    assert delivery.property("time") == "1"
    assert delivery.property("absent") is None


async def test_unacknowledged_message_comes_again_with_the_same_packet_identifier(broker, patience):
    kept = {"clean_start": False, "session_expiry_s": 600}
    async with asyncio.timeout(patience):
        first = await opened(broker, **kept)
        assert not first.was_present
        await first.subscribe(["car/#"])
        await publish(broker, "car/a", [b"one"])
        before = await first.receive()
        first.close()
        second = await opened(broker, **kept)
        again = await second.receive()
        second.ack(before)  # of a connection that is gone: must have no effect
        second.ack(again)
        await publish(broker, "car/a", [b"two"])
        after = await second.receive()
        second.close()
    assert second.was_present
    assert (again.payload, again.dup, again.mid) == (b"one", True, before.mid)
    assert after.payload == b"two"


async def test_receive_maximum_holds_the_broker_back(broker, patience):
    async with asyncio.timeout(patience):
        receiver = await opened(broker, receive_maximum=3, queue_limit=100)
        await receiver.subscribe(["car/#"])
        await publish(broker, "car/a", [b"%d" % number for number in range(8)])
        got = [await receiver.receive() for _ in range(3)]
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(receiver.receive(), 0.3)
        receiver.ack(got[0])
        assert (await receiver.receive()).payload == b"3"
        receiver.close()


async def test_full_queue_stops_reading_and_loses_nothing(broker, patience):
    async with asyncio.timeout(patience):
        receiver = await opened(broker, queue_limit=2, queue_bytes=1 << 30)
        await receiver.subscribe(["car/#"])
        await publish(broker, "car/a", [b"%d" % number for number in range(200)])
        got = []
        for _ in range(200):
            delivery = await receiver.receive()
            assert len(receiver._inbox) <= 2
            receiver.ack(delivery)
            got.append(int(delivery.payload))
        receiver.close()
    assert got == list(range(200))


async def test_lost_connection_fails_what_waits(patience):
    async with asyncio.timeout(patience), mosquitto() as broker:
        receiver = await opened(broker)
        await receiver.subscribe(["car/#"])
        waiting = asyncio.create_task(receiver.receive())
        await broker.kill()
        with pytest.raises(EndpointError):
            await waiting
        with pytest.raises(EndpointError):
            await receiver.publish(Outgoing(topic="car/a", payload=b""))


async def test_nobody_listening_is_an_endpoint_error(patience):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    async with asyncio.timeout(patience):
        with pytest.raises(EndpointError):
            await Connection(Session(host="127.0.0.1", port=port, client_id="x")).open()


async def test_refused_credentials_are_an_endpoint_error(patience):
    async with asyncio.timeout(patience), mosquitto(config_lines=["allow_anonymous false"]) as broker:
        with pytest.raises(EndpointError, match="CONNACK"):
            await opened(broker)


async def test_a_peer_that_is_not_the_endpoint_gets_no_byte(patience):
    received = asyncio.get_running_loop().create_future()

    async def serve(reader, writer):
        received.set_result(await reader.read(100))
        writer.close()

    def check(_sock):
        raise EndpointError("not the endpoint")

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with asyncio.timeout(patience), server:
        connection = Connection(Session(host="127.0.0.1", port=port, client_id="x"), check_peer=check)
        with pytest.raises(EndpointError, match="not the endpoint"):
            await connection.open()
        assert await received == b""


@pytest.fixture
def pair():
    client = new_client(Session(host="127.0.0.1", port=1, client_id="x"))
    with socket.create_server(("127.0.0.1", 0)) as server:
        own = socket.create_connection(server.getsockname())
        peer, _ = server.accept()
    own.setblocking(False)
    client._sock = own
    yield client, peer
    own.close()
    peer.close()


PACKETS = b"\x32\x0a\0\1t\0\7\0data" + b"\x40\2\0\x09" + b"\x40\3\0\x0a\x97" + b"\x30\6\0\1t\0hi"


@pytest.mark.parametrize("step", [1, 2, 5, 100])
def test_client_takes_packets_one_at_a_time_however_they_come(pair, step):
    client, peer = pair
    came = []
    client.on_incoming = lambda one: came.append((one.topic, one.payload, one.mid, one.qos))
    client.on_puback = lambda mid, code: came.append((mid, code))
    for at in range(0, len(PACKETS), step):
        peer.sendall(PACKETS[at : at + step])
        select.select([client._sock], [], [])
        before = len(came)
        while client._packet_read() is MQTTErrorCode.MQTT_ERR_SUCCESS:
            assert len(came) == before + 1
            before += 1
    assert came == [(b"t", b"data", 7, 1), (9, 0), (10, 0x97), (b"t", b"hi", 0, 0)]
    peer.close()
    select.select([client._sock], [], [])
    assert client._packet_read() is MQTTErrorCode.MQTT_ERR_CONN_LOST


@pytest.mark.parametrize(
    "packet",
    [
        b"\x40\1\0",  # half a packet identifier
        b"\x40\3\0\1\x55",  # no such reason code
        b"\x32\2\0\x09",  # a topic that is longer than the packet
        b"\x32\6\0\1t\0\0\0",  # packet identifier 0
        b"\x36\6\0\1t\0\7\0",  # QoS 3
        b"\x30\xff\xff\xff\xff\1",  # a length of five bytes
    ],
)
def test_packet_that_makes_no_sense_is_an_error(pair, packet):
    client, peer = pair
    peer.sendall(packet)
    select.select([client._sock], [], [])
    with pytest.raises((ValueError, MQTTException)):  # the transport ends the connection whatever is raised
        client._packet_read()


def test_packet_that_is_too_large_is_an_error_before_it_has_come(pair):
    client, peer = pair
    client.largest = 1000
    peer.sendall(b"\x30\xe9\7")  # 1001 bytes follow
    select.select([client._sock], [], [])
    with pytest.raises(ValueError, match="too large"):
        client._packet_read()


def test_message_at_qos_2_is_kept_nowhere_where_we_only_publish(pair):
    client, peer = pair
    client.only_publishes, came = True, []
    client.on_incoming = came.append
    peer.sendall(b"\x34\x0a\0\1t\0\7\0data")
    select.select([client._sock], [], [])
    assert client._packet_read() is MQTTErrorCode.MQTT_ERR_SUCCESS
    assert (len(came), client._in_messages, client.want_write()) == (1, {}, False)


def test_what_makes_no_sense_behind_a_packet_is_seen_and_raises_only_where_it_is_read(pair):
    client, peer = pair
    peer.sendall(b"\xd0\0" + b"\x30\xff\xff\xff\xff\1")
    select.select([client._sock], [], [])
    assert client._packet_read() is MQTTErrorCode.MQTT_ERR_SUCCESS
    assert client.has_packet
    with pytest.raises(ValueError, match="four bytes"):
        client._packet_read()


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=300)


@given(user=st.lists(st.tuples(TEXT, TEXT), max_size=4), content_type=st.none() | TEXT, payload=st.binary(max_size=300))
def test_every_property_that_mqtt_allows_is_read_past(user, content_type, payload):
    packed = Properties(PacketTypes.PUBLISH)
    packed.PayloadFormatIndicator, packed.MessageExpiryInterval, packed.TopicAlias = 1, 2**32 - 1, 9
    packed.ResponseTopic, packed.CorrelationData, packed.SubscriptionIdentifier = "reply/\ufeff", b"\x26\0\1", [300]
    packed.UserProperty = user
    if content_type is not None:
        packed.ContentType = content_type
    found = _incoming(0x32, b"\0\1t\0\7" + packed.pack() + payload, has_properties=True)
    assert found == Incoming(b"t", payload, 7, 1, False, False, content_type, tuple(user))


NONSENSE = [
    b"",  # no length
    b"\xff\xff\xff\xff\1",  # a length of five bytes
    b"\x05\x26\0\1a",  # longer than the packet
    b"\x04\x26\0\1a",  # a name without a value
    b"\x02\x02\0",  # half an expiry interval
    b"\x06\x26\0\xffa\0\0more",  # a text that is longer than the properties
    b"\x02\x0b\x80",  # half a subscription identifier
    b"\x03\x21\0\1",  # Receive Maximum
    b"\x06\x03\0\0\x03\0\0",  # two Content Types
]


@pytest.mark.parametrize("rest", NONSENSE)
def test_properties_that_make_no_sense_are_told_and_raise_nothing(rest):
    found = _incoming(0x32, b"\0\1t\0\7" + rest, has_properties=True)
    assert found == Incoming(b"t", rest, 7, 1, False, False, None, (), malformed=True)


@given(st.binary(max_size=100))
def test_no_bytes_after_the_packet_identifier_raise(rest):
    found = _incoming(0x32, b"\0\1t\0\7" + rest, has_properties=True)
    assert (found.topic, found.mid) == (b"t", 7)
    assert rest.endswith(found.payload)


def test_text_that_is_no_utf8_is_escaped():
    found = _incoming(0x32, b"\0\1t\0\7\x09\x26\0\1a\0\3\xed\xa0\x80", has_properties=True)
    assert found.properties == (("a", "\\xed\\xa0\\x80"),)


def test_packet_identifier_of_a_publish_without_puback_is_not_used_again(pair):
    client, _ = pair
    first = client.send(Outgoing(topic="t", payload=b""), b"\0", ())
    client._last_mid = first - 1
    assert client.send(Outgoing(topic="t", payload=b""), b"\0", {first}) == first + 1


def test_client_sends_what_was_collected_before_its_disconnect(pair):
    client, peer = pair
    assert client._sock_send(b"\x30first") == 6
    assert client.want_write()
    assert client._sock_send(b"\xe0\0") == 2
    assert peer.recv(100) == b"\x30first\xe0\0"


def test_client_pushes_back_when_the_peer_does_not_read(pair):
    client, peer = pair
    packet, taken, blocked = b"\x30" + bytes(SEND_BYTES), 0, False
    while not blocked:
        try:
            taken += client._sock_send(packet)
        except BlockingIOError:
            blocked = True
    assert client.want_write()
    received = 0
    while received < taken:
        received += len(peer.recv(1 << 20))
        client._packet_write()
    assert received == taken
    assert not client.want_write()


async def test_socket_that_a_read_has_emptied_is_asked_once_for_all_packets_and_known_to_be_empty(pair, monkeypatch):
    client, peer = pair
    transport = Transport(client, check_peer=lambda _: None, wanted=lambda: True, lost=lambda _: None, prompt=False)
    transport.gauge, transport._reading = Gauge(client._sock), True
    reads, receive = [], Client._sock_recv
    monkeypatch.setattr(Client, "_sock_recv", lambda self, size: reads.append(size) or receive(self, size))

    def came(*_):
        transport.packets += 1

    client.on_incoming = client.on_puback = came
    peer.sendall(PACKETS)
    select.select([client._sock], [], [])
    before, begun = transport.gauge._empty_ns, boot_ns()
    transport._read()
    assert (transport.packets, len(reads)) == (4, 1)
    assert before < begun <= transport.gauge._empty_ns <= boot_ns()
    peer.sendall(PACKETS[:6])
    select.select([client._sock], [], [])
    transport._read()
    assert (transport.packets, len(reads)) == (4, 3), "half a packet, and then nothing"
    peer.sendall(PACKETS[6:])
    select.select([client._sock], [], [])
    transport._read()
    assert (transport.packets, len(reads)) == (8, 4)


async def test_bytes_that_were_read_ahead_count_as_unseen(pair):
    client, peer = pair
    transport = Transport(client, check_peer=lambda _: None, wanted=lambda: True, lost=lambda _: None, prompt=False)
    transport.gauge, transport._reading = Gauge(client._sock), True
    empty_ns = transport.gauge._empty_ns
    peer.sendall(PACKETS)
    select.select([client._sock], [], [])
    client._packet_read()
    transport._look_in()
    assert transport.gauge._empty_ns == empty_ns
    while client._packet_read() is MQTTErrorCode.MQTT_ERR_SUCCESS:
        pass
    transport._look_in()
    assert transport.gauge._empty_ns > empty_ns
