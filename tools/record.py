"""`residency-tools record`: write the traffic of a broker as MCAP.

While it records, every message goes to FILE.part at once, so a recorder that is killed leaves a readable recording of
all but the last moment. At the end FILE is written from it with an index, and FILE.part is removed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO

import paho.mqtt.client as paho
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from agent.errors import AgentError, EndpointError
from tools.client import Address, add_address_arguments, address_of, connected, from_paho, new_client, own_id
from tools.progress import progress
from tools.recording import PROVENANCE, Recorded, RecordingWriter, messages
from tools.signals import ended_by_signals
from tools.stamps import DEFAULT_KEYS, stated_ns
from tools.whole_files import whole

FLUSH_SECONDS = 0.5  # at most this much is lost when the power goes
TROUBLE_STATUS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Where a recording ends by itself: payload bytes, messages, seconds."""

    payload_bytes: float = float("inf")
    count: float = float("inf")
    seconds: float = float("inf")


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What is recorded, until when, and where the capture time stands in JSON payloads."""

    limits: Limits
    filters: tuple[str, ...] = ("#",)
    keys: tuple[str, ...] = DEFAULT_KEYS


class RecordError(AgentError):
    """A message that cannot be recorded, or the rest of another recording in the way."""


@dataclass(slots=True, kw_only=True)
class Recorder:
    """Takes messages from the client's network thread and writes them; stops by itself at its limits.

    `failure` is what ended it otherwise; `lost` counts how often the connection to the broker was lost meanwhile.
    """

    stream: IO[bytes]
    limits: Limits
    keys: tuple[str, ...] = DEFAULT_KEYS
    topics: Counter[str] = field(default_factory=Counter)
    payload_bytes: int = 0
    done: threading.Event = field(default_factory=threading.Event)
    reason: str = "interrupted"
    failure: Exception | None = None
    lost: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _writer: RecordingWriter = field(init=False)

    def __post_init__(self) -> None:
        self._writer = RecordingWriter(self.stream, chunked=False)
        self._writer.metadata(PROVENANCE, {"composite": "false", "recorded": "from a broker"})

    @property
    def count(self) -> int:
        """How many messages are written."""
        return self.topics.total()

    def on_message(self, _client: paho.Client, _data: object, message: paho.MQTTMessage) -> None:
        """Write one message, unless it would pass a limit; what prevents it ends the recording."""
        receipt_ns = time.time_ns()
        with self._lock:
            if self.done.is_set() or self._full(len(message.payload)):
                return
            try:
                self._write(message, receipt_ns)
            except Exception as exc:  # noqa: BLE001 - on paho's thread nobody else would hear of it
                self._fail(exc)

    def on_subscribe(self, _client: paho.Client, _data: object, _id: int, codes: list[ReasonCode], *_: object) -> None:
        """End where the broker does not grant a subscription."""
        refused = [str(code) for code in codes if code.is_failure]
        if refused:
            with self._lock:
                self._fail(EndpointError(f"the broker does not let us subscribe: {refused[0]}"))

    def on_disconnect(self, *_: object) -> None:
        """Count a lost connection; paho opens it again, and what was sent meanwhile is missing."""
        with self._lock:
            self.lost += not self.done.is_set()

    def flush(self) -> None:
        """Bring what was written to the disk."""
        with self._lock:
            self.stream.flush()
            os.fsync(self.stream.fileno())

    def finish(self) -> None:
        """Write the end of the file, or raise what ended the recording; later messages are ignored."""
        with self._lock:
            self.done.set()
            if isinstance(self.failure, AgentError | OSError):
                raise self.failure
            if self.failure is not None:
                message = f"a message cannot be recorded: {type(self.failure).__name__}: {self.failure}"
                raise RecordError(message) from self.failure
            self._writer.finish()

    def _write(self, message: paho.MQTTMessage, receipt_ns: int) -> None:
        payload, properties = bytes(message.payload), from_paho(message.properties)
        capture_ns = stated_ns(payload, properties, self.keys)
        self._writer.write(
            Recorded(
                topic=message.topic,
                payload=payload,
                capture_ns=receipt_ns if capture_ns is None else capture_ns,
                receipt_ns=receipt_ns,
                qos=message.qos,
                retain=message.retain,
                properties=properties,
            )
        )
        self.topics[message.topic] += 1
        self.payload_bytes += len(payload)
        if self.count >= self.limits.count:
            self._end("message limit")

    def _fail(self, failure: Exception) -> None:
        self.failure = self.failure or failure
        self.done.set()

    def _full(self, size: int) -> bool:
        if self.payload_bytes + size <= self.limits.payload_bytes:
            return False
        self._end("size limit")
        return True

    def _end(self, reason: str) -> None:
        self.reason = reason
        self.done.set()


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What a recording holds, and why it ended; `lost` is how often the connection was lost, and messages with it."""

    file: str
    count: int
    payload_bytes: int
    seconds: float
    ended: str
    lost: int
    topics: dict[str, int]


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to `residency-tools`."""
    parser = subparsers.add_parser("record", help="record the traffic of a broker as MCAP", description=__doc__)
    parser.add_argument("recording", type=Path, metavar="FILE", help="the MCAP file to write")
    parser.add_argument("--topic", action="append", metavar="FILTER", help="what to record, default: everything")
    parser.add_argument("--max-mb", type=float, default=float("inf"), help="end before the payloads exceed this")
    parser.add_argument("--max-messages", type=float, default=float("inf"), metavar="N", help="end after N messages")
    parser.add_argument("--duration", type=float, default=float("inf"), metavar="S", help="end after S seconds")
    parser.add_argument("--stamp", action="append", metavar="KEY", help="JSON key of the capture time, default: ts")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")
    parser.add_argument("--quiet", action="store_true", help="no live counters")
    add_address_arguments(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Record until a limit or Ctrl-C; 0 done, 3 the broker or the disk is in trouble, or the connection was lost."""
    wanted = Wanted(
        limits=Limits(payload_bytes=arguments.max_mb * 1e6, count=arguments.max_messages, seconds=arguments.duration),
        filters=tuple(arguments.topic or ("#",)),
        keys=tuple(arguments.stamp or DEFAULT_KEYS),
    )
    try:
        summary = record(arguments.recording, address_of(arguments), wanted, quiet=arguments.quiet)
    except (AgentError, OSError) as exc:
        print(f"record: {exc}", file=sys.stderr)
        return TROUBLE_STATUS
    print(json.dumps(asdict(summary)) if arguments.json else _sentence(summary))
    if summary.lost:
        print(f"record: lost connections: {summary.lost}; messages may be missing", file=sys.stderr)
    return TROUBLE_STATUS if summary.lost else 0


def record(target: Path, address: Address, wanted: Wanted, *, quiet: bool) -> Summary:
    """Record into the file; SIGINT and SIGTERM end it as a limit does. Raises RecordError, EndpointError, OSError."""
    part = target.with_name(f"{target.name}.part")
    begun = time.monotonic()
    with _created(part) as stream:
        recorder = Recorder(stream=stream, limits=wanted.limits, keys=wanted.keys)
        try:
            _take(recorder, address, wanted.filters, begun, quiet=quiet)
        except BaseException:
            if not recorder.count:
                part.unlink()
            raise
    _index(part, target, recorder.count, quiet=quiet)
    return Summary(
        file=str(target),
        count=recorder.count,
        payload_bytes=recorder.payload_bytes,
        seconds=round(time.monotonic() - begun, 1),
        ended=recorder.reason,
        lost=recorder.lost,
        topics=dict(sorted(recorder.topics.items())),
    )


def _created(part: Path) -> IO[bytes]:
    try:
        return part.open("xb")
    except FileExistsError as exc:
        message = f"{part}: a recording that was cut off, or is being made; it reads as it is: give it another name"
        raise RecordError(message) from exc


def _take(recorder: Recorder, address: Address, filters: tuple[str, ...], begun: float, *, quiet: bool) -> None:
    """Record until a limit, a signal or a failure, which is raised."""
    client = new_client(address, own_id("record"))
    client.on_message = recorder.on_message
    client.on_subscribe = recorder.on_subscribe
    client.on_disconnect = recorder.on_disconnect
    with (
        ended_by_signals() as stopped,
        connected(client, address, on_connected=lambda own: _subscribe(own, filters)),
    ):
        _watch(recorder, stopped, begun, quiet=quiet)
        recorder.finish()
    recorder.flush()


def _watch(recorder: Recorder, stopped: threading.Event, begun: float, *, quiet: bool) -> None:
    """Flush and show counters until a limit or a signal."""
    with progress("recording", None, quiet=quiet) as advance:
        while not recorder.done.wait(FLUSH_SECONDS) and not stopped.is_set():
            recorder.flush()
            advance(recorder.count, f"{recorder.payload_bytes / 1e6:.1f} MB on {len(recorder.topics)} topics")
            if time.monotonic() - begun >= recorder.limits.seconds:
                recorder.reason = "duration limit"
                return


def _subscribe(client: paho.Client, filters: tuple[str, ...]) -> None:
    """Ask for every message as it was published: at its own QoS, with its own retain flag."""
    if client.protocol == paho.MQTTv5:
        client.subscribe([(wanted, SubscribeOptions(qos=2, retainAsPublished=True)) for wanted in filters])
    else:
        client.subscribe([(wanted, 2) for wanted in filters])


def _index(part: Path, target: Path, count: int, *, quiet: bool) -> None:
    with (
        whole(target) as stream,
        RecordingWriter(stream) as writer,
        progress("indexing", count, quiet=quiet) as advance,
    ):
        writer.metadata(PROVENANCE, {"composite": "false", "recorded": "from a broker"})
        for number, message in enumerate(messages(part), start=1):
            writer.write(message)
            advance(number, "")
    part.unlink()


def _sentence(summary: Summary) -> str:
    size = summary.payload_bytes / 1e6
    head = (
        f"{summary.file}: {summary.count} messages ({size:.1f} MB) in {summary.seconds:g} s; ended by {summary.ended}"
    )
    return "\n".join([head, *(f"  {topic}: {count}" for topic, count in summary.topics.items())])
