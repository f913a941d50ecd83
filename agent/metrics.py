"""Prometheus metrics over loopback or a unix socket, from the content of the status file. Needs the extra `metrics`.

Names follow the Prometheus conventions: base units, `_total` for counters, `_info` for what stays the same. No label
holds a topic, a position or an identity. Nothing is served beyond the vehicle: a scraper outside would be one more way
out. Each server has one thread, and a client that keeps it waiting is hung up on.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket as sockets
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from socketserver import BaseServer, TCPServer, UnixStreamServer
from types import TracebackType
from typing import Any, Self

from prometheus_client import CollectorRegistry, MetricsHandler, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from agent.errors import AgentError

COUNTED = ("received", "delivered", "refused", "expired", "evicted")
WAITING = ("pending", "held")
SECOND = 10**9
CLIENT_SECONDS = 5.0  # for which a scraper may keep the others waiting
SOCKET_MODE = 0o660
POLL_SECONDS = 0.1  # how soon the end is noticed


class Exporter(Collector):
    """`with Exporter("127.0.0.1", 9464) as exporter:` serves what `update` was last given.

    With a `socket`, its path, port 0 means: not over TCP. Without one it means any free port.
    """

    def __init__(self, host: str, port: int, *, socket: str = "") -> None:
        if not ipaddress.ip_address(host).is_loopback:
            raise AgentError(f"metrics may be served on loopback only, not on {host}")
        self.port = 0
        self._address = host, port
        self._socket = Path(socket) if socket else None
        self._content: Mapping[str, Any] = {}
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        """Start to serve; raises AgentError where the port or the socket is taken."""
        registry = CollectorRegistry()
        registry.register(self)
        ProcessCollector(registry=registry)
        handler = type("Handler", (_Handler,), {"registry": registry})
        with contextlib.ExitStack() as stack:
            if self._socket is not None:
                stack.enter_context(_serving(_unix_server(self._socket, handler)))
                stack.callback(self._socket.unlink, missing_ok=True)
            if self._address[1] or self._socket is None:
                server = _tcp_server(*self._address, handler)
                stack.enter_context(_serving(server))
                self.port = int(server.server_address[1])
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop to serve."""
        self._stack.close()

    def update(self, content: Mapping[str, Any]) -> None:
        """Take the content of the status file."""
        self._content = content

    def collect(self) -> Iterator[Metric]:
        """The metrics of the last content; none before the first."""
        content = self._content
        if not content:
            return
        yield from _agent(content)
        yield from _messages(content["counts"], content["time_ns"])
        yield from _reasons(content)
        yield from _endpoints(content["endpoints"])
        yield from _intake(content)
        yield from _loops(content)
        yield from _model(content["model"])


class _Handler(MetricsHandler):
    """One scrape a connection."""

    timeout = CLIENT_SECONDS


class _Quiet(BaseServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """A scraper that hangs up is no event."""


class _TcpServer(_Quiet, TCPServer):
    allow_reuse_address = True


class _Tcp6Server(_TcpServer):
    address_family = sockets.AF_INET6


class _UnixServer(_Quiet, UnixStreamServer):
    """Its users are the owner and the group of the socket's file."""


def _tcp_server(host: str, port: int, handler: type[_Handler]) -> TCPServer:
    try:
        return (_Tcp6Server if ":" in host else _TcpServer)((host, port), handler)
    except OSError as exc:
        raise AgentError(f"metrics on {host}:{port}: {exc}") from exc


def _unix_server(path: Path, handler: type[_Handler]) -> UnixStreamServer:
    """Take the place of a socket that an agent before this one left behind, but of nothing else."""
    try:
        if path.is_socket():
            path.unlink()
        server = _UnixServer(os.fspath(path), handler)
        path.chmod(SOCKET_MODE)
    except OSError as exc:
        raise AgentError(f"metrics on {path}: {exc}") from exc
    return server


@contextlib.contextmanager
def _serving(server: BaseServer) -> Iterator[None]:
    thread = threading.Thread(target=server.serve_forever, args=(POLL_SECONDS,), name="metrics", daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _agent(content: Mapping[str, Any]) -> Iterator[Metric]:
    info = GaugeMetricFamily("residency_agent_info", "What runs.", labels=["version", "policy", "model"])
    info.add_metric([content["version"], content["policy"], content["model"]["digest"]], 1)
    yield info
    yield GaugeMetricFamily(
        "residency_status_timestamp_seconds",
        "When the event loop and the ledger's thread last said that they make progress.",
        content["time_ns"] / SECOND,
    )
    reload = content["reload"]
    yield CounterMetricFamily("residency_reloads", "Configurations taken since the start.", value=reload["count"])
    yield GaugeMetricFamily(
        "residency_reload_refused", "1 while the configuration on the disk was refused.", int(bool(reload["error"]))
    )
    process = content["process"]
    yield GaugeMetricFamily("residency_loop_lag_seconds", "How late the event loop last was.", process["lag_seconds"])
    yield CounterMetricFamily(
        "residency_watchdog_feeds", "Times that the watchdog was fed.", value=process["watchdog_fed"]
    )
    yield GaugeMetricFamily("residency_threads", "Threads of the agent's own process.", process["threads"])


def _messages(counts: Mapping[str, Any], now_ns: int) -> Iterator[Metric]:
    for state in COUNTED:
        yield CounterMetricFamily(f"residency_messages_{state}", f"Messages {state}.", value=counts[state])
    records = GaugeMetricFamily("residency_records", "Records in the ledger.", labels=["state"])
    size = GaugeMetricFamily("residency_records_bytes", "Bytes of the records in the ledger.", labels=["state"])
    age = GaugeMetricFamily(
        "residency_oldest_record_age_seconds", "Age of the oldest record; 0: none.", labels=["state"]
    )
    for state in WAITING:
        records.add_metric([state], counts[state])
        size.add_metric([state], counts[f"{state}_bytes"])
        age.add_metric([state], max(now_ns - counts["oldest_ns"].get(state, now_ns), 0) / SECOND)
    yield from (records, size, age)
    yield GaugeMetricFamily("residency_conserved", "1 while every message is accounted for.", int(counts["conserved"]))


def _reasons(content: Mapping[str, Any]) -> Iterator[Metric]:
    breakdown = content["counts"]["breakdown"]
    for name, state, what in (
        ("refusals", "refused", "Refused messages"),
        ("expiries", "expired", "Expired records"),
        ("evictions", "evicted", "Evicted records"),
    ):
        family = CounterMetricFamily(f"residency_{name}", f"{what} by reason.", labels=["reason"])
        for reason, count in breakdown.get(state, {}).get("reason", {}).items():
            family.add_metric([reason], count)
        yield family
    holds = CounterMetricFamily(
        "residency_holds", "Records that began held, since the start, by reason.", labels=["reason"]
    )
    for reason, count in content["holds"].items():
        holds.add_metric([reason], count)
    yield holds
    stalled = int(content["stalled"] is not None)
    yield GaugeMetricFamily("residency_ledger_stalled", "1 while the disk takes no records.", stalled)


def _endpoints(endpoints: Mapping[str, Any]) -> Iterator[Metric]:
    up = GaugeMetricFamily("residency_endpoint_up", "1 while connected.", labels=["endpoint"])
    failing = GaugeMetricFamily("residency_endpoint_failing", "1 while the last attempt failed.", labels=["endpoint"])
    flight = GaugeMetricFamily("residency_endpoint_in_flight", "Publishes without PUBACK.", labels=["endpoint"])
    old = GaugeMetricFamily(
        "residency_endpoint_old_certificate",
        "1 while the new certificate does not work and the old one is used.",
        labels=["endpoint"],
    )
    resent = CounterMetricFamily("residency_records_resent", "Records sent again, by endpoint.", labels=["endpoint"])
    slow = HistogramMetricFamily(
        "residency_delivery_seconds",
        "From a record's commit until the endpoint's PUBACK, time in the queue included.",
        labels=["endpoint"],
    )
    for name, endpoint in endpoints.items():
        up.add_metric([name], int(endpoint["connected"]))
        failing.add_metric([name], int(bool(endpoint["error"])))
        flight.add_metric([name], endpoint["in_flight"])
        old.add_metric([name], int(bool(endpoint["certificate"])))
        resent.add_metric([name], endpoint["resent"])
        _add(slow, [name], endpoint["delivered_seconds"])
    yield from (up, failing, flight, old, resent, slow)


def _intake(content: Mapping[str, Any]) -> Iterator[Metric]:
    up = GaugeMetricFamily("residency_intake_up", "1 while connected.", labels=["session"])
    emptied = GaugeMetricFamily(
        "residency_intake_emptied_age_seconds",
        "Since the in-car broker was last proved to hold nothing back.",
        labels=["session"],
    )
    slow = HistogramMetricFamily(
        "residency_intake_seconds",
        "From a message's arrival until its record or refusal was durable.",
        labels=["session"],
    )
    unasked = CounterMetricFamily(
        "residency_intake_unasked",
        "Messages that no filter of the configuration asks for, dropped.",
        labels=["session"],
    )
    for name, session in content["sessions"].items():
        unasked.add_metric([name], session["unasked"])
        up.add_metric([name], int(session["connected"]))
        if session["emptied_seconds"] is not None:
            emptied.add_metric([name], session["emptied_seconds"])
        _add(slow, [name], session["durable_seconds"])
    fixes = CounterMetricFamily("residency_fixes", "Position messages; the stale are accepted too.", labels=["result"])
    for result, count in content["fixes"].items():
        fixes.add_metric([result], count)
    yield from (up, emptied, slow, unasked, fixes)


def _loops(content: Mapping[str, Any]) -> Iterator[Metric]:
    ages = GaugeMetricFamily(
        "residency_loop_turn_age_seconds",
        "Since a loop last came round; a minute is usual while offline.",
        labels=["loop"],
    )
    for kind, loops in (("intake", content["sessions"]), ("uplink", content["endpoints"])):
        for name, loop in loops.items():
            ages.add_metric([f"{kind}-{name}"], loop["turned_seconds"])
    yield ages


def _model(model: Mapping[str, Any]) -> Iterator[Metric]:
    yield GaugeMetricFamily("residency_model_ready", "1 while pictures can be redacted.", int(model["ready"]))
    yield GaugeMetricFamily(
        "residency_model_unloaded",
        "1 while the redaction process is ended for want of pictures.",
        int(model["unloaded"]),
    )
    yield CounterMetricFamily(
        "residency_worker_restarts", "Restarts of the redaction process after failures.", value=model["restarts"]
    )
    yield GaugeMetricFamily(
        "residency_worker_resident_memory_bytes",
        "Resident memory of the redaction process when it last answered; 0: none runs.",
        model["resident_bytes"],
    )
    for name, key, what in (
        ("residency_redaction_seconds", "redaction_seconds", "Time to redact one payload's pictures."),
        ("residency_worker_start_seconds", "start_seconds", "Time to start the redaction process."),
    ):
        family = HistogramMetricFamily(name, what, labels=[])
        _add(family, [], model[key])
        yield family


def _add(family: HistogramMetricFamily, labels: list[str], durations: Mapping[str, Any]) -> None:
    """What `Histogram.as_dict` gives; one that is empty has no samples yet."""
    if durations:
        family.add_metric(labels, buckets=list(durations["buckets"].items()), sum_value=durations["sum"])
