"""Where the car was at the moment of capture, and how sure that is. Everything that decides it lives here.

Only monotonic time orders fixes and captures; the wall clock may be unset or jump either way.

What is promised, with `speed` the speed limit and a fix called truthful when the car was within `accuracy_factor` x
accuracy + `floor_m` of it, at most `latency_ns` + its own doubt before its monotonic time:

1. If every fix within `max_age_ns` of the capture is truthful, every disc contains the car.
2. A gross lie is a fix that no truthful fix within `max_age_ns` could be driven to. With any number of gross lies
   among them, in any order, every disc contains the car as long as one truthful fix lies within `max_age_ns` of the
   capture and the lies there are not `outvote` times as many as the truthful fixes.
3. A smaller lie passes as driving. It can move a disc by no more than what the car could have driven between it and
   its truthful neighbours, plus their radii: at 1 Hz that is within the guard distance of borders.

How: fixes that one car can have driven between form a track. A fix that fits no track starts one of its own, and then
all tracks are hypotheses: the answer is one disc around all of them. A track ends to be a hypothesis when it comes
together with another one, when it is older than `max_age_ns`, or when another track that goes on before and after it
has `outvote` times its fixes. A lone track needs `confirmations` fixes before it is believed. Whatever is forgotten
for the sake of memory either widens discs or takes them away.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter

import msgspec

from agent.messages import Capture, Disc, Fix, Message
from agent.places.freshness import CLOCK_SET_NS
from agent.places.geodesy import at_most_m, middle
from agent.places.tracks import SECOND_NS, Sighting, Track

RECENT = 256  # fixes remembered in order to know a repeated one


@dataclass(frozen=True, slots=True, kw_only=True)
class PositionLimits:
    """What is believed of the car and its receiver, and how much is kept."""

    max_speed_mps: float = 70.0  # 252 km/h
    max_age_ns: int = 600 * SECOND_NS
    accuracy_factor: float = 2.0  # a 95 % radius is 2.45 sigma of a Rayleigh distribution: twice it leaves 6e-6
    floor_m: float = 10.0  # antenna, datum epoch, rounding of the payload
    latency_ns: int = SECOND_NS // 2  # from measurement to arrival at the agent
    max_accuracy_m: float = 100_000.0
    confirmations: int = 2
    outvote: int = 10
    fixes: int = 4096
    tracks: int = 32
    horizon_ns: int = 6 * 3600 * SECOND_NS


class PositionHistory:
    """The fixes of one boot, and the discs that follow from them. Memory is bounded by `PositionLimits`."""

    def __init__(self, limits: PositionLimits | None = None, *, boot_id: str = "") -> None:
        self._limits = limits or PositionLimits()
        self._boot_id = boot_id
        self._tracks: list[Track] = []
        self._recent: deque[tuple[int, float, float]] = deque(maxlen=RECENT)
        self._forgotten_ns: int | None = None
        self.rejected = 0

    def __len__(self) -> int:
        return sum(map(len, self._tracks))

    def add(self, fix: Fix) -> int | None:
        """Take a fix in; since when (monotonic ns) captures may have other discs now: all before have the same.

        One that is impossible, repeated or before all memory says nothing (None), and is counted.
        """
        key = (fix.time_ns, fix.latitude, fix.longitude)
        forgotten = self._forgotten_ns is not None and fix.monotonic_ns <= self._forgotten_ns
        if forgotten or key in self._recent or not _plausible(fix, self._limits.max_accuracy_m):
            self.rejected += 1
            return None
        self._recent.append(key)
        self._join(self._sighting(fix))
        oldest_ns, since_ns = min(track.first_ns for track in self._tracks), self._disputed_since(fix.monotonic_ns)
        return (oldest_ns if self._bound() else since_ns) - self._limits.max_age_ns

    def discs(self, capture: Capture) -> tuple[Disc, ...]:
        """Discs that each contain the car at the capture, as promised above; () where nothing can be said."""
        tracks = self._hypotheses(capture)
        around = [self._around(track, capture) for track in tracks]
        if not tracks or not all(around) or not self._known(capture):
            return ()
        if len(tracks) == 1:
            return self._discs_of_one(tracks[0], around[0], capture)
        nearest = (min(self._discs(sightings, capture), key=attrgetter("radius_m")) for sightings in around)
        return _disc_around(list(nearest))

    def _known(self, capture: Capture) -> bool:
        """Whether the capture belongs to this boot, and nothing was forgotten that could speak about it."""
        start = capture.monotonic_ns - self._limits.max_age_ns
        remembered = self._forgotten_ns is None or start > self._forgotten_ns
        return remembered and capture.boot_id == self._boot_id and capture.doubt_ns >= 0

    def _discs_of_one(self, track: Track, around: tuple[Sighting, ...], capture: Capture) -> tuple[Disc, ...]:
        """The discs from before and after, each on its own, when no other track contradicts."""
        discs = tuple(self._discs(around, capture))
        enough = self._limits.confirmations
        if track.weight(*self._window(capture), enough) < enough:
            return ()
        if len(discs) == 1 or around[0].agrees(around[-1], self._limits.max_speed_mps):
            return discs
        return _disc_around(discs)

    def _sighting(self, fix: Fix) -> Sighting:
        limits = self._limits
        return Sighting(
            place=(fix.latitude, fix.longitude),
            radius_m=fix.accuracy_m * limits.accuracy_factor + limits.floor_m,
            monotonic_ns=fix.monotonic_ns,
            late_ns=fix.doubt_ns + limits.latency_ns,
        )

    def _join(self, sighting: Sighting) -> None:
        """Put a sighting into every track that it fits. Tracks that meet in it become one from then on."""
        fitting = [track for track in self._tracks if self._fits(sighting, track)]
        newest = all(sighting.monotonic_ns >= track.last_ns for track in fitting)
        for track in fitting:
            track.insert(sighting)
        if not fitting:
            self._tracks.append(Track(sighting))
        if newest and len(fitting) > 1:
            fitting.remove(max(fitting, key=len))
            for track in fitting:
                track.merged_ns = sighting.monotonic_ns

    def _disputed_since(self, moment_ns: int) -> int:
        """This moment, or since when there has been more than one track that a fix of this moment may lengthen.

        Which of two goes on after the other decides about all the time in which both were there.
        """
        going_on = (track for track in self._tracks if track.last_ns >= moment_ns - self._limits.max_age_ns)
        return min([moment_ns, *sorted(track.first_ns for track in going_on)[1:2]])

    def _fits(self, sighting: Sighting, track: Track) -> bool:
        limits = self._limits
        if not track.speaks_for(sighting.monotonic_ns):
            return False
        around = track.around(sighting.monotonic_ns, sighting.late_ns, limits.max_age_ns, limits.max_speed_mps)
        return bool(around) and all(sighting.agrees(other, limits.max_speed_mps) for other in around)

    def _around(self, track: Track, capture: Capture) -> tuple[Sighting, ...]:
        limits = self._limits
        return track.around(capture.monotonic_ns, capture.doubt_ns, limits.max_age_ns, limits.max_speed_mps)

    def _hypotheses(self, capture: Capture) -> list[Track]:
        """The tracks with a fix near enough to the capture that are not outvoted."""
        window = self._window(capture)
        begin = capture.monotonic_ns - capture.doubt_ns
        speaking = [track for track in self._tracks if track.speaks_for(begin) and track.weight(*window, 1)]
        if len(speaking) < 2:
            return speaking
        weights = [(track, track.weight(*window)) for track in speaking]
        return [track for track, weight in weights if not self._outvoted(track, weight, weights)]

    def _window(self, capture: Capture) -> tuple[int, int]:
        return capture.monotonic_ns - self._limits.max_age_ns, capture.monotonic_ns + self._limits.max_age_ns

    def _outvoted(self, track: Track, weight: int, rivals: list[tuple[Track, int]]) -> bool:
        return any(
            rival.first_ns < track.first_ns
            and rival.last_ns > track.last_ns
            and rival_weight >= self._limits.outvote * weight
            for rival, rival_weight in rivals
        )

    def _discs(self, sightings: Iterable[Sighting], capture: Capture) -> list[Disc]:
        speed = self._limits.max_speed_mps
        return [
            Disc(
                latitude=sighting.place[0],
                longitude=sighting.place[1],
                radius_m=sighting.reach_m(capture.monotonic_ns, capture.doubt_ns, speed),
            )
            for sighting in sightings
        ]

    def _bound(self) -> bool:
        """Keep to the limits: thin the longest track, forget the oldest time; whether a fix went."""
        newest, number = max(track.last_ns for track in self._tracks), len(self)
        if len(self._tracks) > self._limits.tracks:
            self._forget(min(track.last_ns for track in self._tracks))
        if min(track.first_ns for track in self._tracks) < newest - 2 * self._limits.horizon_ns:
            self._forget(newest - self._limits.horizon_ns)
        if len(self) > self._limits.fixes:
            before = len(self)
            max(self._tracks, key=len).thin(self._limits.max_age_ns // 8)
            if len(self) == before:
                self._forget(min(track.first_ns for track in self._tracks))
        return len(self) < number

    def _forget(self, until_ns: int) -> None:
        """Drop everything up to a moment; captures that would have needed it get no discs."""
        self._forgotten_ns = until_ns
        for track in self._tracks:
            track.forget(until_ns)
        self._tracks = [track for track in self._tracks if len(track)]


class CaptureLimits(msgspec.Struct, frozen=True, kw_only=True):
    """How far a stated capture time is believed."""

    max_delay_ns: int = 600 * SECOND_NS  # an older statement is a doubt, not a time
    skew_ns: int = SECOND_NS  # between the clock of the producer and the agent's
    transport_ns: int = 2 * SECOND_NS  # from capture to arrival, where nothing is stated


class WallClock:
    """How far the wall clock was stepped lately, seen as the change of its offset to monotonic time."""

    def __init__(self, window_ns: int = 600 * SECOND_NS) -> None:
        self._window_ns = window_ns
        self._spans: deque[tuple[int, int, int]] = deque(maxlen=17)
        self._step_ns = 0

    def observe(self, received_ns: int, monotonic_ns: int) -> int:
        """Take a pair of readings in; returns the largest step in ns within the window before them."""
        offset = received_ns - monotonic_ns
        span = monotonic_ns * 16 // self._window_ns
        if self._spans:  # readings may come late, as those of a picture that was redacted meanwhile
            span = max(span, self._spans[-1][0])
        if self._spans and self._spans[-1][0] == span:
            _, low, high = self._spans[-1]
            if low <= offset <= high:
                return self._step_ns  # nothing new since the last call
            self._spans.pop()
            self._spans.append((span, min(low, offset), max(high, offset)))
        else:
            self._spans.append((span, offset, offset))
        recent = [entry for entry in self._spans if entry[0] >= span - 16]
        self._step_ns = max(high for _, _, high in recent) - min(low for _, low, _ in recent)
        return self._step_ns


def capture_of(
    message: Message, stated_ns: int | None, *, boot_id: str, step_ns: int = 0, limits: CaptureLimits | None = None
) -> Capture:
    """The moment of capture on both clocks, with the doubt that makes it true.

    `stated_ns` is the message's own capture time (Unix ns), `step_ns` the result of `WallClock.observe`. A statement
    is believed when it lies at most `max_delay_ns` before arrival. An older one leaves everything since then open; one
    in the future, or by a clock that was never set, leaves `max_delay_ns` before arrival open. Without a statement the
    time that is told is the arrival's, less what transport takes, however long the message may have waited.
    """
    limits = limits or CaptureLimits()
    margin = limits.skew_ns + step_ns
    least, most = _delay(message, stated_ns, margin, limits)
    doubt = (most - least + 1) // 2
    ago = least + doubt
    meant = stated_ns is not None and CLOCK_SET_NS <= stated_ns <= message.received_ns + margin
    return Capture(
        time_ns=stated_ns if meant and stated_ns is not None else message.received_ns - min(ago, limits.transport_ns),
        monotonic_ns=message.monotonic_ns - ago,
        doubt_ns=doubt,
        boot_id=boot_id,
    )


def _delay(message: Message, stated_ns: int | None, margin_ns: int, limits: CaptureLimits) -> tuple[int, int]:
    """The least and the most time in ns that may lie between the capture and the arrival of a message."""
    if stated_ns is None:
        return 0, limits.transport_ns + message.wait_ns
    delay = message.received_ns - stated_ns
    if min(stated_ns, message.received_ns) < CLOCK_SET_NS or delay < -margin_ns:
        return 0, limits.max_delay_ns + message.wait_ns
    if delay > limits.max_delay_ns:
        return 0, delay + margin_ns
    return max(0, delay - margin_ns), max(0, delay) + margin_ns


def _disc_around(discs: Sequence[Disc]) -> tuple[Disc, ...]:
    """One disc that contains all of these; () where they surround the Earth."""
    centre = middle((disc.latitude, disc.longitude) for disc in discs)
    if centre is None:
        return ()
    radius = max(at_most_m(centre, (disc.latitude, disc.longitude)) + disc.radius_m for disc in discs)
    return (Disc(latitude=centre[0], longitude=centre[1], radius_m=radius),)


def _plausible(fix: Fix, max_accuracy_m: float) -> bool:
    """On Earth, not at (0, 0) where receivers without a fix say they are, with an accuracy that means something."""
    numbers = (fix.latitude, fix.longitude, fix.accuracy_m)
    return (
        all(map(math.isfinite, numbers))
        and abs(fix.latitude) <= 90
        and abs(fix.longitude) <= 180
        and max(abs(fix.latitude), abs(fix.longitude)) > 1e-4
        and 0 < fix.accuracy_m <= max_accuracy_m
        and fix.doubt_ns >= 0
    )
