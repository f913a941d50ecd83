"""The brokers: name, address, TLS, pin, and whether they let this vehicle in."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509

from agent import wiring
from agent.assembly import Setup
from agent.doctor.findings import Finding, tried
from agent.errors import AgentError, InvalidConfigError
from agent.mqtt.connection import Connection
from agent.mqtt.packets import Session
from agent.uplink.egress import peer_check, resolve, tls_context

IN_CAR: tuple[tuple[str | type[Exception], str], ...] = (
    ("CONNACK", "it does not let the agent in: look at broker.username, broker.password_file and its access list"),
    (
        ConnectionRefusedError,
        "nothing listens there: does it run (systemctl status mosquitto), and does [broker] name its host and port?",
    ),
)
ENDPOINT: tuple[tuple[str | type[Exception], str], ...] = (
    ("cannot be resolved", "the DNS does not know it: look at {key}.host, and at the resolver (resolvectl query)"),
    (
        "outside its networks",
        "the DNS or the network leads elsewhere; if the broker has moved, correct {key}.networks",
    ),
    ("TLS files", "look at {key}.ca_file, and at cert_file and key_file in [credentials.{name}]"),
    ("pinned", "somebody is in between, or the server's key was changed and {key}.spki_sha256 was not"),
    ("CONNACK", "it does not let this vehicle in: look at [credentials.{name}] and at its access list"),
    (
        ssl.SSLError,
        "no TLS came about: is {key}.port its TLS port, and does it accept this vehicle's certificate?",
    ),
    (ConnectionResetError, "it hangs up at once: is {key}.port its TLS port, and does it accept {key}.protocol?"),
    (ConnectionRefusedError, "nothing listens there: is the broker running, and is {key}.port right?"),
    (
        TimeoutError,
        "no answer: does a firewall, the mobile network or IPAddressAllow= of the unit drop it (egress-rules)?",
    ),
)
SOON = timedelta(days=30)
X509_EXPIRED, X509_NOT_YET, X509_HOSTNAME = 10, 9, 62  # openssl/x509_vfy.h
UNTRUSTED = frozenset({2, 18, 19, 20, 21})  # of the same: no issuer known, self-signed, chain too short


async def in_car(setup: Setup) -> Finding:
    """Whether the in-car broker takes the agent."""

    async def attempt() -> str:
        session = wiring.intakes(setup)[0].session
        return await _connect(replace(session, client_id=f"{session.client_id}-doctor", clean_start=True))

    return await tried("in-car broker", attempt, _in_car_advice)


async def endpoint(setup: Setup, name: str) -> Finding:
    """Whether one endpoint is where and who the policy says, and takes this vehicle."""
    found = await tried(f"endpoint {name}", lambda: _endpoint(setup, name), lambda exc: _advice(name, exc))
    return found if found.advice else replace(found, advice=_expiry_advice(setup, name))


async def _connect(session: Session) -> str:
    connection = Connection(session)
    try:
        await connection.open()
    finally:
        connection.close()
    return f"{session.host}:{session.port} speaks MQTT {session.protocol}"


async def _endpoint(setup: Setup, name: str) -> str:
    options = wiring.uplink(setup, name)
    address = (await resolve(options.peer))[0]
    session = replace(
        options.session,
        host=address,
        client_id=f"{options.session.client_id}-doctor",
        tls=await asyncio.to_thread(tls_context, options.peer),
        server_name=options.peer.host,
    )
    connection = Connection(session, check_peer=peer_check(options.peer))
    try:
        await connection.open()
    finally:
        connection.close()
    return f"{options.peer.host} at {address}:{session.port}, {'TLS verified' if options.peer.tls else 'no TLS'}"


def _in_car_advice(exc: AgentError) -> str:
    if isinstance(exc, InvalidConfigError):
        return "correct [broker] in agent.toml"
    return _first(IN_CAR, exc) or "it does not answer as an MQTT broker does: look at [broker] host, port and protocol"


def _advice(name: str, exc: AgentError) -> str:
    """What to do about it, by what went wrong; `name` is the endpoint's in the policy."""
    cause, key = _cause(exc), f"endpoints.{name}"
    if isinstance(exc, InvalidConfigError):
        return f"correct [credentials.{name}] in agent.toml"
    if isinstance(cause, ssl.SSLCertVerificationError):
        return _certificate_advice(key, cause.verify_code)
    found = _first(ENDPOINT, exc) or "look at the network, and at host, port and protocol of {key}"
    return found.format(key=key, name=name)


def _first(table: Sequence[tuple[str | type[Exception], str]], exc: AgentError) -> str:
    """The advice for the first sign that an error shows: words in its text, or what caused it."""
    cause, text = _cause(exc), str(exc)
    shown = (advice for sign, advice in table if (sign in text if isinstance(sign, str) else isinstance(cause, sign)))
    return next(shown, "")


def _certificate_advice(key: str, code: int) -> str:
    if code == X509_EXPIRED:
        return "its certificate has expired: it must be renewed; or the clock of the vehicle is ahead"
    if code == X509_NOT_YET:
        return "its certificate is not valid yet: is the clock of the vehicle behind?"
    if code == X509_HOSTNAME:
        return f"its certificate is for other names: correct {key}.host, or somebody is in between"
    if code in UNTRUSTED:
        return f"its certificate was signed by nobody who is trusted: name the right roots in {key}.ca_file"
    return f"its certificate is not acceptable: look at {key}.ca_file and at the broker"


def _cause(exc: BaseException) -> BaseException:
    """What an error was translated from, down to the first."""
    return _cause(exc.__cause__) if isinstance(exc.__cause__, Exception) else exc


def _expiry_advice(setup: Setup, name: str) -> str:
    """What to say of the vehicle's own certificate, which works today."""
    for until in _own_expiry(setup, name):
        if until < datetime.now(UTC) + SOON:
            return f"the certificate of [credentials.{name}] ends at {until:%Y-%m-%d}: renew it"
    return ""


def _own_expiry(setup: Setup, name: str) -> Iterator[datetime]:
    file = wiring.uplink(setup, name).peer.cert_file
    if file:
        yield x509.load_pem_x509_certificate(Path(file).read_bytes()).not_valid_after_utc
