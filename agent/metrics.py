"""Prometheus metrics over loopback, from the same content as the status file. Needs the extra `metrics`.

Names follow the Prometheus conventions: base units, `_total` for counters. No label holds a topic, a position or an
identity. The endpoint listens on loopback only: a scraper outside the vehicle would be one more way out.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any, Self

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from agent.errors import AgentError

COUNTED = ("received", "delivered", "refused", "expired", "evicted")
WAITING = ("pending", "held")


class Exporter(Collector):
    """`with Exporter("127.0.0.1", 9464) as exporter:` serves what `update` was last given."""

    def __init__(self, host: str, port: int) -> None:
        if not ipaddress.ip_address(host).is_loopback:
            raise AgentError(f"metrics may be served on loopback only, not on {host}")
        self._address = host, port
        self._content: Mapping[str, Any] = {}

    def __enter__(self) -> Self:
        """Start to serve; raises AgentError where the port is taken."""
        registry = CollectorRegistry()
        registry.register(self)
        host, port = self._address
        try:
            self._server, self._thread = start_http_server(port, host, registry)
        except OSError as exc:
            raise AgentError(f"metrics on {host}:{port}: {exc}") from exc
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop to serve."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def port(self) -> int:
        """Where it really listens."""
        return int(self._server.server_port)

    def update(self, content: Mapping[str, Any]) -> None:
        """Take the content of the status file."""
        self._content = content

    def collect(self) -> Iterator[Metric]:
        """The metrics of the last content; none before the first."""
        content = self._content
        if not content:
            return
        yield from _messages(content["counts"])
        yield from _parts(content)


def _messages(counts: Mapping[str, Any]) -> Iterator[Metric]:
    for state in COUNTED:
        yield CounterMetricFamily(f"residency_messages_{state}", f"Messages {state}.", value=counts[state])
    records = GaugeMetricFamily("residency_records", "Records in the ledger.", labels=["state"])
    size = GaugeMetricFamily("residency_records_bytes", "Bytes of the records in the ledger.", labels=["state"])
    for state in WAITING:
        records.add_metric([state], counts[state])
        size.add_metric([state], counts[f"{state}_bytes"])
    yield records
    yield size
    reasons = CounterMetricFamily("residency_refusals", "Refused messages by reason.", labels=["reason"])
    for reason, count in counts["breakdown"].get("refused", {}).get("reason", {}).items():
        reasons.add_metric([reason], count)
    yield reasons
    yield GaugeMetricFamily("residency_conserved", "1 while every message is accounted for.", int(counts["conserved"]))


def _parts(content: Mapping[str, Any]) -> Iterator[Metric]:
    up = GaugeMetricFamily("residency_endpoint_up", "1 while connected.", labels=["endpoint"])
    flight = GaugeMetricFamily("residency_endpoint_in_flight", "Publishes without PUBACK.", labels=["endpoint"])
    for name, endpoint in content["endpoints"].items():
        up.add_metric([name], int(endpoint["connected"]))
        flight.add_metric([name], endpoint["in_flight"])
    sessions = GaugeMetricFamily("residency_intake_up", "1 while connected.", labels=["session"])
    for name, session in content["sessions"].items():
        sessions.add_metric([name], int(session["connected"]))
    fixes = CounterMetricFamily("residency_fixes", "Position messages.", labels=["result"])
    for result, count in content["fixes"].items():
        fixes.add_metric([result], count)
    model = content["model"]
    yield from (up, flight, sessions, fixes)
    yield GaugeMetricFamily("residency_model_ready", "1 while pictures can be redacted.", int(model["ready"]))
    yield CounterMetricFamily(
        "residency_worker_restarts", "Restarts of the redaction process.", value=model["restarts"]
    )
    stalled = int(content["stalled"] is not None)
    yield GaugeMetricFamily("residency_ledger_stalled", "1 while the disk takes no records.", stalled)
