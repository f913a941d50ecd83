import asyncio
import dataclasses
import functools
import ipaddress
import socket
import ssl
import threading
import types
from contextlib import asynccontextmanager

import paho.mqtt.client
import pytest
from authority import Authority
from cryptography.exceptions import UnsupportedAlgorithm
from hypothesis import given
from hypothesis import strategies as st
from peers import MOVED, USE_ANOTHER, farewell, peer, reference

from agent.errors import EndpointError
from agent.mqtt.packets import Outgoing, Session
from agent.uplink import egress
from agent.uplink.egress import PeerRules, dial, permitted, resolve, tls_context
from tools.brokers import mosquitto

HOST = "broker.example.com"
HERE = "127.0.0.1"
SESSION = Session(host="never used", port=1, client_id="car")


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture(scope="module")
def server(authority):
    """The true broker's identity."""
    return authority.issue(HOST)


@pytest.fixture
def dns(monkeypatch):
    """What names resolve to; every question is noted in `asked`. Addresses are what they are."""
    answers, real = {HOST: [HERE], "asked": []}, socket.getaddrinfo

    def getaddrinfo(host, port, *numbers, **options):
        if host not in answers:
            return real(host, port, *numbers, **options)
        answers["asked"].append(host)
        if isinstance(answers[host], OSError):
            raise answers[host]
        return [
            (socket.AF_INET6 if ":" in name else socket.AF_INET, socket.SOCK_STREAM, 6, "", (name, port))
            for name in answers[host]
        ]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return answers


@pytest.fixture
def rules(authority, dns):
    """The rules of a TLS endpoint whose name resolves to this machine."""
    assert dns
    return functools.partial(PeerRules, host=HOST, ca_file=str(authority.file))


@asynccontextmanager
async def connected(rules, patience):
    async with asyncio.timeout(patience):
        connection = await dial(rules, SESSION)
        yield connection
        connection.close()


async def visit(rules, patience):
    """Connect, and say goodbye."""
    async with connected(rules, patience):
        pass


async def refused(rules, seen, patience, match):
    """Dial in vain; no byte of MQTT may have reached the peer."""
    async with asyncio.timeout(patience):
        with pytest.raises(EndpointError, match=match):
            (await dial(rules, SESSION)).close()
        await asyncio.to_thread(seen.settle)
    assert seen.data == b""


# --- TLS ---------------------------------------------------------------------------------------------------------


async def test_endpoint_with_the_right_name_and_authority_is_connected_to(server, authority, patience, dns):
    lines = [f"certfile {server.cert}", f"keyfile {server.key}"]
    async with mosquitto(config_lines=lines) as broker:
        rules = PeerRules(host=HOST, port=broker.port, ca_file=str(authority.file), networks=("127.0.0.0/8",))
        async with connected(rules, patience) as connection:
            puback = await connection.publish(Outgoing(topic="cn/car/speed", payload=b"1"))
    assert puback.accepted
    assert dns["asked"].count(HOST) == 1


async def test_certificate_for_another_name_is_refused(authority, rules, patience):
    with peer(authority.issue("other.example.com")) as seen:
        await refused(rules(port=seen.port), seen, patience, "Hostname mismatch")


async def test_certificate_for_the_address_alone_is_refused_where_the_rules_name_a_host(authority, rules, patience):
    with peer(authority.issue(HERE)) as seen:
        await refused(rules(port=seen.port), seen, patience, "Hostname mismatch")


async def test_endpoint_named_by_its_address_is_verified_by_its_address(authority, server, patience):
    rules = functools.partial(PeerRules, host=HERE, ca_file=str(authority.file))
    with peer(authority.issue(HERE)) as seen:
        await visit(rules(port=seen.port), patience)
    with peer(server) as seen:
        await refused(rules(port=seen.port), seen, patience, "IP address mismatch")


async def test_expired_certificate_is_refused(authority, rules, patience):
    with peer(authority.issue(HOST, name="expired", days=-1)) as seen:
        await refused(rules(port=seen.port), seen, patience, "expired")


async def test_certificate_of_an_unknown_authority_is_refused(tmp_path, rules, patience):
    with peer(Authority(tmp_path).issue(HOST)) as seen:
        await refused(rules(port=seen.port), seen, patience, "CERTIFICATE_VERIFY_FAILED")


async def test_private_authority_is_not_trusted_unless_the_rules_name_it(server, rules, patience):
    with peer(server) as seen:
        await refused(rules(port=seen.port, ca_file=""), seen, patience, "CERTIFICATE_VERIFY_FAILED")


async def test_server_that_speaks_no_tls_is_refused(rules):
    with peer() as seen, pytest.raises(EndpointError):
        await dial(rules(port=seen.port), SESSION)
    assert seen.data[:1] == b"\x16", "a TLS handshake record, not an MQTT packet"
    assert b"MQTT" not in seen.data


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion.TLSv1_1 is deprecated")
async def test_tls_below_1_2_is_refused(server, rules, patience, monkeypatch):
    def lax(rules):
        context = tls_context(rules)
        context.minimum_version = ssl.TLSVersion.TLSv1_1
        context.set_ciphers("ALL:@SECLEVEL=0")
        return context

    old = (ssl.TLSVersion.TLSv1_1, ssl.TLSVersion.TLSv1_1)
    with peer(server, versions=old) as seen:
        await refused(rules(port=seen.port), seen, patience, "(?i)version|protocol|alert|EOF")
        monkeypatch.setattr(egress, "tls_context", lax)
        await visit(rules(port=seen.port), patience)  # so the server works, and it was the version that was refused
    assert b"MQTT" in seen.data


async def test_tls_1_2_is_accepted(server, rules, patience):
    only = (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_2)
    with peer(server, versions=only) as seen:
        await visit(rules(port=seen.port), patience)
    assert b"MQTT" in seen.data


def test_verification_can_not_be_switched_off(authority):
    context = tls_context(PeerRules(host=HOST, port=1, ca_file=str(authority.file)))
    assert context.verify_mode is ssl.CERT_REQUIRED
    assert context.check_hostname
    assert context.minimum_version is ssl.TLSVersion.TLSv1_2
    fields = {field.name for field in dataclasses.fields(PeerRules)}
    assert not [name for name in fields if "insecure" in name or "verify" in name]


# --- pins and client certificates ---------------------------------------------------------------------------------


async def test_right_pin_is_accepted_also_beside_a_spare_one(server, rules, patience):
    with peer(server) as seen:
        await visit(rules(port=seen.port, spki_sha256=("0" * 64, server.pin)), patience)
    assert b"MQTT" in seen.data


async def test_wrong_pin_is_refused_before_connect_although_the_certificate_is_valid(
    authority, server, rules, patience
):
    with peer(authority.issue(HOST, name="new key")) as seen:
        await refused(rules(port=seen.port, spki_sha256=(server.pin,)), seen, patience, "not one of the pinned")
        assert seen.connections == 1


async def test_pinned_endpoint_with_a_key_of_an_unknown_kind_is_refused_and_nothing_else(
    server, rules, patience, monkeypatch
):
    def unknown(_certificate):
        raise UnsupportedAlgorithm("2.16.840.1.101.3.4.3.17")

    monkeypatch.setattr(egress.x509, "load_der_x509_certificate", unknown)
    with peer(server) as seen:
        await refused(rules(port=seen.port, spki_sha256=(server.pin,)), seen, patience, "no kind that can be pinned")


async def test_pin_on_an_endpoint_without_tls_is_refused(patience):
    with peer() as seen:
        rules = PeerRules(host=HERE, port=seen.port, tls=False, spki_sha256=("0" * 64,))
        await refused(rules, seen, patience, "not one of the pinned")


async def test_client_certificate_is_shown_where_the_endpoint_asks_for_one(authority, server, rules, patience):
    car = authority.issue(name="car-7")
    lines = [
        *(f"certfile {server.cert}", f"keyfile {server.key}", f"cafile {authority.file}"),
        *("require_certificate true", "use_identity_as_username true", "allow_anonymous false"),
    ]
    async with mosquitto(config_lines=lines) as broker:
        shown = rules(port=broker.port, cert_file=str(car.cert), key_file=str(car.key))
        async with connected(shown, patience) as connection:
            assert (await connection.publish(Outgoing(topic="a", payload=b""))).accepted
        with pytest.raises(EndpointError):
            await dial(rules(port=broker.port), SESSION)


async def test_rotated_files_take_effect_at_the_next_connection(tmp_path, rules, patience, dns):
    assert dns
    ca_file, cert_file, key_file = (tmp_path / name for name in ("ca", "cert", "key"))

    def install(authority, name):
        car = authority.issue(name=name)
        for target, source in ((ca_file, authority.file), (cert_file, car.cert), (key_file, car.key)):
            target.write_bytes(source.read_bytes())

    old, new = (Authority(tmp_path, name) for name in ("old", "new"))
    mine = functools.partial(rules, ca_file=str(ca_file), cert_file=str(cert_file), key_file=str(key_file))
    install(old, "car-old")
    with peer(old.issue(HOST), client_ca=old.file) as seen:
        await visit(mine(port=seen.port), patience)
    assert seen.clients == ["car-old"]
    with peer(new.issue(HOST), client_ca=new.file) as seen:
        await refused(mine(port=seen.port), seen, patience, "CERTIFICATE_VERIFY_FAILED")
        install(new, "car-new")
        await visit(mine(port=seen.port), patience)
    assert seen.clients == ["car-new"]


async def test_unusable_tls_files_are_endpoint_errors_and_ask_nobody(authority, rules, tmp_path, patience):
    car = authority.issue(name="locked", passphrase=b"secret")
    (tmp_path / "empty").touch()
    for files in (
        {"cert_file": str(car.cert), "key_file": str(car.key)},  # encrypted: OpenSSL would ask on the terminal
        {"cert_file": str(car.cert), "key_file": str(tmp_path / "absent")},
        {"ca_file": str(tmp_path / "absent")},
        {"ca_file": str(tmp_path / "empty")},
    ):
        async with asyncio.timeout(patience):
            with pytest.raises(EndpointError, match="TLS files"):
                await dial(rules(port=1, **files), SESSION)


# --- addresses ----------------------------------------------------------------------------------------------------


async def test_name_that_suddenly_resolves_elsewhere_is_not_used(server, rules, patience, dns):
    with peer(server) as seen:
        mine = rules(port=seen.port, networks=("127.0.0.0/8", "::1/128"))
        await visit(mine, patience)
        await asyncio.to_thread(seen.settle)
        before = seen.connections
        seen.data.clear()
        for lie in (["203.0.113.9"], [HERE, "203.0.113.9"], ["2001:db8::1"], ["::ffff:203.0.113.9"], []):
            dns[HOST] = lie
            await refused(mine, seen, patience, "outside its networks")
        assert seen.connections == before, "not even a TCP connection was made"
        dns[HOST] = ["::ffff:127.0.0.1"]
        assert await resolve(mine) == ("::ffff:127.0.0.1",)


async def test_name_that_cannot_be_resolved_is_an_endpoint_error(rules, patience, dns):
    dns[HOST] = socket.gaierror(socket.EAI_NONAME, "no such name")
    async with asyncio.timeout(patience):
        with pytest.raises(EndpointError, match="cannot be resolved"):
            await dial(rules(port=1), SESSION)


async def test_resolver_that_never_answers_is_given_up_and_holds_nothing_else_up(rules, monkeypatch, patience):
    answered = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: answered.wait(patience) and [])
    monkeypatch.setattr(egress, "RESOLVE_SECONDS", 0.05)
    async with asyncio.timeout(patience):
        errors = await asyncio.gather(*(dial(rules(port=1), SESSION) for _ in range(40)), return_exceptions=True)
        assert all("cannot be resolved" in str(error) for error in errors)
        assert await asyncio.to_thread(lambda: "the loop's threads are free") == "the loop's threads are free"
    answered.set()


async def test_name_that_no_resolver_can_be_asked_for_is_an_endpoint_error(rules, patience):
    async with asyncio.timeout(patience):
        with pytest.raises(EndpointError, match="cannot be resolved"):
            await dial(rules(host=f"{'a' * 64}.example.com", port=1), SESSION)


async def test_connected_address_outside_the_networks_gets_no_byte_of_mqtt(server, rules, patience, monkeypatch):
    async def deceived(_rules):
        return (HERE,)

    monkeypatch.setattr(egress, "resolve", deceived)
    with peer(server) as seen:
        await refused(rules(port=seen.port, networks=("203.0.113.0/24",)), seen, patience, "outside its networks")
        assert seen.connections == 1


async def test_connection_goes_to_the_judged_address_and_asks_no_second_time(server, rules, patience, dns):
    with peer(server) as seen:
        async with connected(rules(port=seen.port), patience) as connection:
            assert connection._session.host == HERE
    assert dns["asked"].count(HOST) == 1


async def test_dead_address_does_not_hide_the_others(server, rules, dns):
    dns[HOST] = ["127.0.0.9", HERE]
    with peer(server) as seen:
        with pytest.raises(EndpointError):
            await dial(rules(port=seen.port), SESSION, 0)
        for attempt in (1, 3):
            (await dial(rules(port=seen.port), SESSION, attempt)).close()
    assert seen.connections == 2


async def test_localhost_that_resolves_elsewhere_is_not_used_without_tls(dns):
    with peer() as seen:
        rules = PeerRules(host="localhost", port=seen.port, tls=False)
        dns["localhost"] = ["10.0.0.1"]
        with pytest.raises(EndpointError, match="outside"):
            (await dial(rules, SESSION)).close()
        dns["localhost"] = [HERE]
        (await dial(rules, SESSION)).close()


async def test_endpoint_stands_on_ipv6_too(authority, patience):
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6 loopback")
    with peer(authority.issue("::1", name="six"), host="::1") as seen:
        rules = PeerRules(host="::1", port=seen.port, ca_file=str(authority.file), networks=("::1/128",))
        await visit(rules, patience)
        await asyncio.to_thread(seen.settle)
        elsewhere = dataclasses.replace(rules, networks=("2001:db8::/32", "127.0.0.0/8"))
        seen.data.clear()
        await refused(elsewhere, seen, patience, "outside its networks")


addresses = st.ip_addresses()
networks = st.tuples(st.ip_addresses(), st.integers(0, 32)).map(
    lambda pair: str(ipaddress.ip_network((pair[0], pair[1]), strict=False))
)


@given(addresses, st.lists(networks, max_size=3), st.booleans())
def test_address_is_permitted_exactly_where_a_network_holds_it(address, found, tls):
    rules = PeerRules(host=HOST, port=1, networks=tuple(found), tls=tls)
    plain = getattr(address, "ipv4_mapped", None) or address
    parsed = [ipaddress.ip_network(network) for network in found]
    expected = (not parsed or any(plain in network for network in parsed)) and (tls or plain.is_loopback)
    assert permitted(str(address), rules) == expected
    if address.version == 4:
        assert permitted(f"::ffff:{address}", rules) == expected
    elif address.ipv4_mapped is None:
        assert permitted(f"{address}%eth0", rules) == expected


# --- what a broker may try ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [USE_ANOTHER, MOVED])
@pytest.mark.parametrize("way", [reference, farewell])
async def test_server_reference_is_not_followed(server, rules, code, way):
    with peer(server) as elsewhere:
        target = f"127.0.0.1:{elsewhere.port}".encode()
        with peer(server, answer=way(code, target)) as seen:
            if way is reference:
                with pytest.raises(EndpointError, match="CONNACK"):
                    await dial(rules(port=seen.port), SESSION)
            else:
                assert "DISCONNECT" in await (await dial(rules(port=seen.port), SESSION)).closed
        assert seen.connections == 1
        assert b"MQTT" in seen.data
    assert elsewhere.connections == 0


async def test_proxy_of_the_environment_is_not_used(server, rules, patience, monkeypatch):
    def through_proxy(*_, **__):
        raise AssertionError("connected through a proxy")

    kinds = {"HTTP": 3, "SOCKS4": 1, "SOCKS5": 2}
    socks = types.SimpleNamespace(**kinds, create_connection=through_proxy, get_default_proxy=tuple)
    monkeypatch.setattr(paho.mqtt.client, "socks", socks)
    monkeypatch.setenv("mqtt_proxy", "socks://127.0.0.1:1080")
    assert paho.mqtt.client.Client(paho.mqtt.client.CallbackAPIVersion.VERSION2)._get_proxy() is not None
    with peer(server) as seen:
        await visit(rules(port=seen.port), patience)
    assert b"MQTT" in seen.data
