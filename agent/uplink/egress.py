"""The guard in front of every endpoint: who and where the peer is, judged before a byte of MQTT goes out.

Invariants:
- Every address that the endpoint's name resolves to lies inside its `networks`; one outside, and it is not used.
- Without TLS only loopback is connected to, whatever a name resolves to.
- We connect to the address that was judged, never to the name, so a second answer of the DNS changes nothing.
- The connected peer's address and public key are judged again before CONNECT.
- No server reference is followed, and no proxy of the environment is used.
- TLS is at least 1.2 and always verified; the context is new for each connection, so that rotated files take effect.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import ipaddress
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from agent.errors import EndpointError
from agent.mqtt.connection import Connection
from agent.mqtt.packets import Session
from agent.mqtt.threads import beside
from agent.uplink import tls
from agent.uplink.tls import Shown

if TYPE_CHECKING:  # paho defines it for type checkers only
    from paho.mqtt.client import SocketLike

RESOLVE_SECONDS = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerRules:
    """What the policy demands of an endpoint's peer; empty `networks` and `spki_sha256` demand nothing."""

    host: str
    port: int
    networks: tuple[str, ...] = ()
    spki_sha256: tuple[str, ...] = ()
    tls: bool = True
    ca_file: str = ""
    cert_file: str = ""
    key_file: str = ""


async def dial(rules: PeerRules, session: Session, attempt: int = 0, shown: Shown | None = None) -> Connection:
    """An open connection to the endpoint and to nobody else; raises EndpointError. Cancelling closes it.

    `attempt` goes through the endpoint's addresses in turn, so that a dead one does not hide the others. `shown` knows
    which TLS files worked last.
    """
    addresses = await resolve(rules)
    target = replace(session, host=addresses[attempt % len(addresses)], port=rules.port)

    async def opened(context: ssl.SSLContext | None) -> Connection:
        session = replace(target, tls=context, server_name=rules.host)
        connection = Connection(session, check_peer=peer_check(rules))
        await connection.open()
        return connection

    if shown is not None and rules.tls:
        return await shown.connect(rules, opened)
    return await opened(await asyncio.to_thread(tls_context, rules))


async def resolve(rules: PeerRules) -> tuple[str, ...]:
    """The endpoint's addresses, each of which may be connected to, best first; raises EndpointError. Never empty.

    A host that is an address asks no resolver. Cancelling is safe.
    """
    ask = functools.partial(socket.getaddrinfo, rules.host, rules.port, type=socket.SOCK_STREAM)
    try:
        async with asyncio.timeout(RESOLVE_SECONDS):
            found = await beside(ask, name=f"resolve-{rules.host}")
    except (OSError, TimeoutError, UnicodeError) as exc:
        raise EndpointError(f"{rules.host}: cannot be resolved: {str(exc) or type(exc).__name__}") from exc
    addresses = tuple(dict.fromkeys(str(entry[4][0]) for entry in found))
    outside = [address for address in addresses if not permitted(address, rules)]
    if outside or not addresses:
        raise EndpointError(f"{rules.host} resolves to {outside or 'nothing'}, outside its networks")
    return addresses


def permitted(address: str, rules: PeerRules) -> bool:
    """Whether the endpoint may stand at this IP address; an IPv4-mapped one is judged as the IPv4 address it means."""
    parsed = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(parsed, ipaddress.IPv6Address) and parsed.ipv4_mapped is not None:
        parsed = parsed.ipv4_mapped
    if not rules.tls and not parsed.is_loopback:
        return False
    return not rules.networks or any(parsed in ipaddress.ip_network(network) for network in rules.networks)


def tls_context(rules: PeerRules) -> ssl.SSLContext | None:
    """A new verifying context, or None for an endpoint without TLS; raises EndpointError for unusable files."""
    return tls.context(rules, tls.read(rules))


def peer_check(rules: PeerRules) -> Callable[[SocketLike], None]:
    """A check of the connected socket; it raises EndpointError when the peer is not the endpoint."""

    def check(sock: SocketLike) -> None:
        address = cast("socket.socket", sock).getpeername()[0]
        if not permitted(address, rules):
            raise EndpointError(f"{rules.host}: the peer {address} is outside its networks")
        if rules.spki_sha256 and spki_sha256(sock) not in rules.spki_sha256:
            raise EndpointError(f"{rules.host}: the server's public key is not one of the pinned ones")

    return check


def spki_sha256(sock: SocketLike) -> str:
    """Hex SHA-256 of the peer's SubjectPublicKeyInfo (RFC 7469, 2.4); empty without TLS.

    EndpointError for a key that OpenSSL knows and `cryptography` does not.
    """
    certificate = sock.getpeercert(binary_form=True) if isinstance(sock, ssl.SSLSocket) else None
    if certificate is None:
        return ""
    try:
        key = x509.load_der_x509_certificate(certificate).public_key()
    except (ValueError, UnsupportedAlgorithm) as exc:
        raise EndpointError(f"the server's public key is of no kind that can be pinned: {exc}") from exc
    return hashlib.sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()
