"""Faults that a replay plants on request: values in, values out, repeatable by the seed of the caller's generator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from random import Random

from agent.errors import AgentError
from agent.topics import matches

REORDER_SECONDS = 1.0  # a reordered message is held back by at most this


class FaultError(AgentError, ValueError):
    """A fault or a link profile that is not written as `--fault` or `--link` wants it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """A link as its messages feel it: nothing is lost on it, because TCP repeats; it is late."""

    latency_s: float = 0.0
    jitter_s: float = 0.0
    bytes_per_s: float = 0.0
    outage_every_s: float = 0.0
    outage_s: float = 0.0


# Round figures of the order that drive tests report; a profile is a test condition, not a model of one network.
LINKS = {
    "none": Link(),
    "3g": Link(latency_s=0.15, jitter_s=0.1, bytes_per_s=125_000),
    "edge": Link(latency_s=0.6, jitter_s=0.4, bytes_per_s=15_000),
    "tunnel": Link(latency_s=0.05, jitter_s=0.02, outage_every_s=180.0, outage_s=45.0),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """A stretch of recorded time, in seconds from the start of the recording; half-open."""

    start_s: float
    end_s: float

    def holds(self, offset_s: float) -> bool:
        """Whether the moment lies in the window."""
        return self.start_s <= offset_s < self.end_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """What goes wrong. Probabilities are per message; `jumps` are (from second, shift of the clock in seconds)."""

    drop: float = 0.0
    duplicate: float = 0.0
    reorder: float = 0.0
    delay: float = 0.0
    delay_s: float = 1.0
    gnss_loss: tuple[Window, ...] = ()
    gnss_topics: tuple[str, ...] = ("vehicle/gnss",)
    jumps: tuple[tuple[float, float], ...] = ()
    link: Link = Link()


NO_FAULTS = Faults()
FAULT_USAGE = "drop=P duplicate=P reorder=P delay=P:MEAN_S gnss-loss=FROM_S-TO_S clock-jump=AT_S:SHIFT_S"


class Channel:
    """Carries one replay's messages over the faults; the link's queue is its only memory."""

    def __init__(self, faults: Faults, random: Random) -> None:
        self._faults = faults
        self._random = random
        self._clean = replace(faults, gnss_topics=NO_FAULTS.gnss_topics) == NO_FAULTS
        self._free_at_s = 0.0

    def arrivals(self, topic: str, size: int, offset_s: float, at_s: float) -> tuple[float, ...]:
        """When a message sent at `at_s` arrives: never, once or twice. `offset_s` is its place in the recording."""
        faults = self._faults
        if self._clean:
            return (at_s,)
        dropped, doubled, reordered, delayed = (self._random.random() for _ in range(4))
        lost_fix = any(window.holds(offset_s) for window in faults.gnss_loss)
        if dropped < faults.drop or (lost_fix and any(matches(wanted, topic) for wanted in faults.gnss_topics)):
            return ()
        late_s = self._random.uniform(0, REORDER_SECONDS) if reordered < faults.reorder else 0.0
        late_s += self._random.expovariate(1 / faults.delay_s) if delayed < faults.delay else 0.0
        arrival = self._over_link(at_s, size) + late_s
        return (arrival, arrival) if doubled < faults.duplicate else (arrival,)

    def clock_shift_s(self, offset_s: float) -> float:
        """How far the sender's clock is off at this place of the recording."""
        return sum(shift for start, shift in self._faults.jumps if offset_s >= start)

    def _over_link(self, at_s: float, size: int) -> float:
        link = self._faults.link
        if link == Link():
            return at_s
        start = max(at_s, self._free_at_s)
        if link.outage_every_s and start % link.outage_every_s >= link.outage_every_s - link.outage_s:
            start += link.outage_every_s - start % link.outage_every_s
        self._free_at_s = start + (size / link.bytes_per_s if link.bytes_per_s else 0.0)
        return self._free_at_s + link.latency_s + self._random.uniform(0, link.jitter_s)


def parse_faults(texts: list[str], link: str, gnss_topics: tuple[str, ...]) -> Faults:
    """Read faults as `FAULT_USAGE` writes them; raises FaultError."""
    if link not in LINKS:
        message = f"--link {link}: wanted one of {', '.join(LINKS)}"
        raise FaultError(message)
    faults = Faults(gnss_topics=gnss_topics, link=LINKS[link])
    for text in texts:
        name, _, value = text.partition("=")
        try:
            faults = _READERS[name](faults, value)
        except (KeyError, ValueError) as exc:
            message = f"--fault {text}: wanted {FAULT_USAGE}"
            raise FaultError(message) from exc
    return faults


def _probability(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise ValueError(text)
    return value


def _pair(text: str, separator: str) -> tuple[float, float]:
    first, second = text.split(separator)
    return float(first), float(second)


def _delay(faults: Faults, value: str) -> Faults:
    chance, mean_s = value.split(":")
    return replace(faults, delay=_probability(chance), delay_s=float(mean_s))


def _loss(faults: Faults, value: str) -> Faults:
    start_s, end_s = _pair(value, "-")
    return replace(faults, gnss_loss=(*faults.gnss_loss, Window(start_s=start_s, end_s=end_s)))


_READERS: dict[str, Callable[[Faults, str], Faults]] = {
    "drop": lambda faults, value: replace(faults, drop=_probability(value)),
    "duplicate": lambda faults, value: replace(faults, duplicate=_probability(value)),
    "reorder": lambda faults, value: replace(faults, reorder=_probability(value)),
    "delay": _delay,
    "gnss-loss": _loss,
    "clock-jump": lambda faults, value: replace(faults, jumps=(*faults.jumps, _pair(value, ":"))),
}
