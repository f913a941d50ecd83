"""`residency-tools replay`: play a recording into a broker, on time, with faults on request."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import paho.mqtt.client as paho
from paho.mqtt.enums import MQTTErrorCode
from paho.mqtt.reasoncodes import ReasonCode

from agent.errors import AgentError
from tools.client import Address, Client, add_address_arguments, address_of, connected, new_client, own_id, to_paho
from tools.faults import FAULT_USAGE, LINKS, FaultError, parse_faults
from tools.progress import progress
from tools.recording import Recorded, messages
from tools.schedule import Due, Options, due
from tools.schemas import NANOSECONDS
from tools.signals import INTERRUPTED_STATUS, ended_by_signals
from tools.stamps import DEFAULT_KEYS, restamped

IN_FLIGHT = 512  # publishes without PUBACK, or fewer where the broker says so; more of them wait here
ACK_SECONDS = 30.0
LOOK_SECONDS = 0.2  # how often a replay that waits for room looks for what went down with a connection
GRAIN_S = 0.001  # shorter waits cost more than they are worth: what falls due meanwhile goes out together, late by this
GONE = (MQTTErrorCode.MQTT_ERR_NO_CONN, MQTTErrorCode.MQTT_ERR_CONN_LOST)
SHOWN = 100  # characters of a topic
USAGE_STATUS = 2
BROKEN_STATUS = 3


class ReplayError(AgentError):
    """The broker stopped acknowledging, or a message cannot be published at all."""


class UsageError(AgentError, ValueError):
    """An option that cannot be meant."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a replay did. Timing errors are how late messages were handed to the client, in milliseconds.

    `refused`: messages that the broker did not take, by its reason; `lost`: those at QoS 0 that went down with a
    connection.
    """

    sent: int
    acknowledged: int
    refused: dict[str, int]
    lost: int
    payload_bytes: int
    seconds: float
    late_p50_ms: float
    late_p99_ms: float
    late_max_ms: float
    stopped: bool


class Player:
    """Publishes due messages over one open connection; `stop` may be called from any thread or signal handler."""

    def __init__(self, client: Client, *, fresh: bool, keys: tuple[str, ...] = DEFAULT_KEYS) -> None:
        self._client = client
        self._fresh = fresh
        self._keys = keys
        self._stop = threading.Event()
        self._window = min(IN_FLIGHT, client.receive_maximum)
        self._room = threading.BoundedSemaphore(self._window)
        self._acknowledged = 0
        self._refused: Counter[str] = Counter()
        self._lost = 0
        self._unsent: deque[paho.MQTTMessageInfo] = deque()  # at QoS 0, in the order of sending
        client.on_publish = self._on_publish

    def stop(self) -> None:
        """End the replay after the message that is being sent."""
        self._stop.set()

    def play(self, schedule: Iterable[Due], *, on_sent: Callable[[Recorded, Due], None], paced: bool = True) -> Outcome:
        """Send everything and wait for the acknowledgements; raises ReplayError where they stay away.

        `on_sent` gets each message as it was sent, and what was due.
        """
        start, start_ns = time.monotonic(), time.time_ns()
        late: list[float] = []
        size = 0
        for one in schedule:
            wait_s = start + one.at_s - time.monotonic() if paced else 0.0
            if self._stop.wait(max(wait_s, GRAIN_S)) if wait_s > 0 else self._stop.is_set():
                break
            late.append(time.monotonic() - start - one.at_s)
            message = self._stamped(one, start_ns)
            self._publish(message)
            size += len(message.payload)
            on_sent(message, one)
        self._drain()
        return self._outcome(late if paced else [0.0], len(late), size, time.monotonic() - start)

    def _stamped(self, one: Due, start_ns: int) -> Recorded:
        shift_ns = round(one.shift_s * NANOSECONDS)
        if self._fresh:
            return restamped(one.message, start_ns + round(one.captured_s * NANOSECONDS) + shift_ns, self._keys)
        return restamped(one.message, one.message.capture_ns + shift_ns, self._keys) if shift_ns else one.message

    def _publish(self, message: Recorded) -> None:
        self._take_room()
        try:
            info = self._client.publish(
                message.topic,
                message.payload,
                qos=message.qos,
                retain=message.retain,
                properties=to_paho(message.properties) if self._client.protocol == paho.MQTTv5 else None,
            )
        except ValueError as exc:
            told = f"a message on {message.topic[:SHOWN]!r} cannot be published: {exc}"
            raise ReplayError(told) from exc
        if message.qos == 0:
            self._unsent.append(info)
            self._look_for_lost()

    def _on_publish(self, _client: object, _data: object, _id: int, reason: ReasonCode, _properties: object) -> None:
        if reason.is_failure:
            self._refused[str(reason)] += 1
        else:
            self._acknowledged += 1
        self._room.release()

    def _take_room(self) -> None:
        deadline = time.monotonic() + ACK_SECONDS
        while not self._room.acquire(timeout=LOOK_SECONDS):
            self._look_for_lost()
            if time.monotonic() > deadline:
                raise _silent()

    def _look_for_lost(self) -> None:
        """Give back the room of messages at QoS 0 that no connection carried: nobody tells of those."""
        while self._unsent:
            if self._unsent[0].rc in GONE:
                self._lost += 1
                self._room.release()
            elif not self._unsent[0].is_published():
                return
            self._unsent.popleft()

    def _drain(self) -> None:
        for _ in range(self._window):
            self._take_room()
        for _ in range(self._window):
            self._room.release()

    def _outcome(self, late: list[float], sent: int, size: int, seconds: float) -> Outcome:
        p50, p99, most = np.percentile(np.array(late or [0.0]) * 1000, [50, 99, 100]).round(3).tolist()
        return Outcome(
            sent=sent,
            acknowledged=self._acknowledged,
            refused=dict(self._refused),
            lost=self._lost,
            payload_bytes=size,
            seconds=round(seconds, 3),
            late_p50_ms=p50,
            late_p99_ms=p99,
            late_max_ms=most,
            stopped=self._stop.is_set(),
        )


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to `residency-tools`."""
    parser = subparsers.add_parser("replay", help="play a recording into a broker", description=__doc__)
    parser.add_argument("recording", type=Path)
    parser.add_argument("--speed", type=float, default=1.0, help="times recorded speed, default: %(default)g")
    parser.add_argument("--fast", action="store_true", help="as fast as the broker takes it, instead of --speed")
    parser.add_argument("--from", dest="start_s", type=float, default=0.0, metavar="S", help="start at this second")
    parser.add_argument("--to", dest="end_s", type=float, default=float("inf"), metavar="S", help="end at this second")
    parser.add_argument("--loop", type=int, default=1, metavar="N", help="play N times; 0: until interrupted")
    parser.add_argument("--only", action="append", metavar="FILTER", help="topics to play; repeatable")
    parser.add_argument("--without", action="append", default=[], metavar="FILTER", help="topics to leave out")
    parser.add_argument("--rename", action="append", default=[], metavar="OLD=NEW", help="rename a topic prefix")
    parser.add_argument("--fresh", action="store_true", help="rewrite capture times as if the drive happened now")
    parser.add_argument("--stamp", action="append", metavar="KEY", help="JSON key of the capture time, default: ts")
    parser.add_argument("--seed", type=int, default=0, help="of every chance below, default: %(default)s")
    parser.add_argument("--fault", action="append", default=[], metavar="FAULT", help=FAULT_USAGE)
    parser.add_argument("--gnss-topic", action="append", metavar="FILTER", help="what gnss-loss takes away")
    parser.add_argument("--link", default="none", help=f"link profile: {', '.join(LINKS)}")
    parser.add_argument("--json", action="store_true", help="print the outcome as JSON")
    parser.add_argument("--quiet", action="store_true", help="no progress display")
    add_address_arguments(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Replay until the end or Ctrl-C; 0 done, 2 wrong usage, 3 broker or recording trouble, 130 interrupted.

    A message that the broker refused, or that was lost with a connection, is trouble.
    """
    try:
        outcome = replay(arguments.recording, address_of(arguments), _options(arguments), arguments)
    except (UsageError, FaultError) as exc:
        print(f"replay: {exc}", file=sys.stderr)
        return USAGE_STATUS
    except (AgentError, OSError) as exc:
        print(f"replay: {exc}", file=sys.stderr)
        return BROKEN_STATUS
    print(json.dumps(asdict(outcome)) if arguments.json else _sentence(outcome))
    for reason, count in outcome.refused.items():
        print(f"replay: the broker refused {count} messages: {reason}", file=sys.stderr)
    if outcome.lost:
        print(f"replay: lost with a connection: {outcome.lost} messages at QoS 0", file=sys.stderr)
    if outcome.refused or outcome.lost:
        return BROKEN_STATUS
    return INTERRUPTED_STATUS if outcome.stopped else 0


def replay(path: Path, address: Address, options: Options, arguments: argparse.Namespace) -> Outcome:
    """Play the recording with a progress display; Ctrl-C stops after the message in hand."""
    keys = tuple(arguments.stamp or DEFAULT_KEYS)
    client = new_client(address, own_id("replay"))
    with connected(client, address), progress(path.name, None, quiet=arguments.quiet) as advance:
        player = Player(client, fresh=arguments.fresh, keys=keys)
        count = itertools.count(1)
        with ended_by_signals(player.stop):
            return player.play(
                due(lambda: messages(path), options),
                on_sent=lambda _message, one: advance(next(count), f"{one.at_s:.0f} s"),
                paced=options.speed is not None,
            )


def _options(arguments: argparse.Namespace) -> Options:
    rename = tuple(_rename(text) for text in arguments.rename)
    if arguments.speed <= 0 or arguments.loop < 0:
        message = "--speed must be positive and --loop not negative"
        raise UsageError(message)
    return Options(
        speed=None if arguments.fast else arguments.speed,
        start_s=arguments.start_s,
        end_s=arguments.end_s,
        loops=arguments.loop,
        only=tuple(arguments.only or ("#",)),
        without=tuple(arguments.without),
        rename=rename,
        seed=arguments.seed,
        faults=parse_faults(arguments.fault, arguments.link, tuple(arguments.gnss_topic or ("vehicle/gnss",))),
    )


def _rename(text: str) -> tuple[str, str]:
    old, separator, new = text.partition("=")
    if not (old and separator and new):
        message = f"--rename {text}: wanted OLD=NEW"
        raise UsageError(message)
    return old, new


def _sentence(outcome: Outcome) -> str:
    rate = outcome.sent / outcome.seconds if outcome.seconds else 0.0
    return (
        f"sent {outcome.sent} messages ({outcome.payload_bytes / 1e6:.1f} MB) "
        f"in {outcome.seconds:.1f} s ({rate:.0f}/s), "
        f"late by {outcome.late_p50_ms:g} ms (p50), {outcome.late_p99_ms:g} ms (p99)"
    )


def _silent() -> ReplayError:
    return ReplayError(f"the broker acknowledged nothing for {ACK_SECONDS:g} s")
