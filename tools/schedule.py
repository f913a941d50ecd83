"""What a replay sends and when: a recording and options in, due messages out. No clock, no network, no disk."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from random import Random

from agent.topics import matches
from tools.faults import NO_FAULTS, Channel, Faults
from tools.recording import Recorded
from tools.schemas import NANOSECONDS

TOPICS_REMEMBERED = 4096
# A clock that was set while it was recorded: the receipts go back by more than disorder explains, or on by more than a
# pause in a drive does.
DISORDER_NS = 10 * NANOSECONDS
PAUSE_NS = 86_400 * NANOSECONDS


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How a recording is replayed. `speed` None sends as fast as it goes; `loops` 0 repeats without end."""

    speed: float | None = 1.0
    start_s: float = 0.0
    end_s: float = float("inf")
    loops: int = 1
    only: tuple[str, ...] = ("#",)
    without: tuple[str, ...] = ()
    rename: tuple[tuple[str, str], ...] = ()
    seed: int = 0
    faults: Faults = NO_FAULTS


NO_OPTIONS = Options()


@dataclass(frozen=True, slots=True, kw_only=True)
class Due:
    """One message to send `at_s` seconds after the start; its capture lies `captured_s` after the start.

    `shift_s` is a planted error of the sender's clock, which its time stamps want added.
    """

    at_s: float
    captured_s: float
    shift_s: float
    message: Recorded


def due(read: Callable[[], Iterable[Recorded]], options: Options) -> Iterator[Due]:
    """Yield the messages in the order of their sending; `read` is called once for every loop."""
    channel = Channel(options.faults, Random(options.seed))
    waiting: list[tuple[float, int, Due]] = []
    number, offset_s, loop = 0, 0.0, 0
    while options.loops == 0 or loop < options.loops:
        length_s = 0.0
        for place_s, message in _selected(read(), options):
            length_s = max(length_s, place_s - options.start_s)
            sent_s = offset_s + (place_s - options.start_s)
            for one in _arrivals(channel, message, place_s, sent_s, options):
                number += 1
                heapq.heappush(waiting, (one.at_s, number, one))
            while waiting and waiting[0][0] <= _scaled(sent_s, options):
                yield heapq.heappop(waiting)[2]
        loop += 1
        if number == 0:
            return
        offset_s += length_s
    while waiting:
        yield heapq.heappop(waiting)[2]


def renamed(topic: str, rename: tuple[tuple[str, str], ...]) -> str:
    """Replace the first prefix of whole levels that matches."""
    for old, new in rename:
        if topic == old or topic.startswith(old.rstrip("/") + "/"):
            return new.rstrip("/") + topic[len(old.rstrip("/")) :]
    return topic


def _selected(messages: Iterable[Recorded], options: Options) -> Iterator[tuple[float, Recorded]]:
    """The messages that are replayed, each with its place in the recording, in seconds."""

    @lru_cache(TOPICS_REMEMBERED)
    def wanted(topic: str) -> bool:
        chosen = any(matches(one, topic) for one in options.only)
        return chosen and not any(matches(one, topic) for one in options.without)

    for place_s, message in _placed(messages):
        if place_s >= options.end_s:
            return
        if place_s >= options.start_s and wanted(message.topic):
            topic = renamed(message.topic, options.rename)
            yield place_s, message if topic == message.topic else replace(message, topic=topic)


def _placed(messages: Iterable[Recorded]) -> Iterator[tuple[float, Recorded]]:
    """Each message with its receipt in seconds after that of the first; setting the clock takes no time."""
    begun_ns: int | None = None
    latest_ns = 0
    for message in messages:
        if begun_ns is None:
            begun_ns = latest_ns = message.receipt_ns
        elif not -DISORDER_NS <= message.receipt_ns - latest_ns <= PAUSE_NS:
            begun_ns += message.receipt_ns - latest_ns
            latest_ns = message.receipt_ns
        latest_ns = max(latest_ns, message.receipt_ns)
        yield max(message.receipt_ns - begun_ns, 0) / NANOSECONDS, message


def _arrivals(channel: Channel, message: Recorded, place_s: float, sent_s: float, options: Options) -> Iterator[Due]:
    age_s = (message.receipt_ns - message.capture_ns) / NANOSECONDS
    shift_s = channel.clock_shift_s(place_s)
    for arrival_s in channel.arrivals(message.topic, len(message.payload), place_s, sent_s):
        yield Due(
            at_s=_scaled(arrival_s, options),
            captured_s=_scaled(sent_s - age_s, options),
            shift_s=shift_s,
            message=message,
        )


def _scaled(seconds: float, options: Options) -> float:
    """Recorded seconds after the start -> seconds of the replay; the order is kept even as fast as it goes."""
    return seconds / (options.speed or 1.0)
