"""What is kept of a run for reports and comparisons: `run.json` beside the pictures of the run's folder."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from agent.errors import AgentError
from tools.judge import Delivery, Sent, Verdict
from tools.recording import PROVENANCE, contents, messages
from tools.replay import Outcome
from tools.schemas import NANOSECONDS, json_object, position_of
from tools.stamps import rfc3339
from tools.toml_text import toml_text
from tools.trial import Setting, Trial
from tools.whole_files import write_whole

RUN_FILE, PICTURES = "run.json", "pictures"
FORMAT = 1


class RunFileError(AgentError, ValueError):
    """A folder without a readable `run.json`."""


class Event(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """One sent message: seconds since the recording's start, topic, true country, where it arrived and how late.

    `brokers` is empty for a message that stayed in the car; `tag` is the region that the record carried.
    """

    second: float
    topic: str
    country: str
    brokers: tuple[str, ...]
    latency_ms: float | None
    tag: str


class Picture(msgspec.Struct, frozen=True, kw_only=True):
    """One delivered picture: file names in the folder of pictures, what was masked, labelled objects and hits."""

    before: str
    after: str
    second: float
    broker: str
    width: int
    height: int
    claimed: dict[str, int]
    objects: tuple[tuple[str, int, int, int, int], ...]
    hits: tuple[tuple[str, bool], ...]


class RunFile(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that a report shows. `track` is (second, latitude, longitude) of the fixes that were sent.

    `replay` is empty for an offline run.
    """

    format: int
    title: str
    created: str
    provenance: dict[str, str]
    problems: tuple[str, ...]
    counts: dict[str, Any]
    policy: dict[str, str]
    model: str
    audit: str
    replay: dict[str, float]
    events: tuple[Event, ...]
    track: tuple[tuple[float, float, float], ...]
    pictures: tuple[Picture, ...]


def keep(folder: Path, setting: Setting, sent: Sequence[Sent], trial: Trial, verdict: Verdict) -> None:
    """Write run.json of a trial into its folder, and every delivered picture beside the one that was sent."""
    start_ns = min((one.recorded_ns for one in sent), default=0)
    run = RunFile(
        format=FORMAT,
        title=setting.recording.name,
        created=rfc3339(time.time_ns()),
        provenance=dict(contents(setting.recording).metadata.get(PROVENANCE, {})),
        problems=tuple(verdict.problems),
        counts=dict(trial.status["counts"]),
        policy={"version": str(setting.policy["version"]), "sha256": policy_digest(setting.policy)},
        model=str(trial.status.get("model", {}).get("digest", "")),
        audit=trial.audit,
        replay=_replay(trial.outcome),
        events=_events(sent, verdict, start_ns),
        track=_track(setting.recording, sent, start_ns),
        pictures=_pictures(verdict, start_ns),
    )
    save(folder, run, verdict)


def save(folder: Path, run: RunFile, verdict: Verdict) -> None:
    """Write run.json, and every delivered picture beside the one that was sent."""
    pictures = folder / PICTURES
    pictures.mkdir(parents=True, exist_ok=True)
    for kept, picture in zip(run.pictures, verdict.pictures, strict=True):
        before, after = picture.read()
        (pictures / kept.before).write_bytes(before)
        (pictures / kept.after).write_bytes(after)
    write_whole(folder / RUN_FILE, msgspec.json.encode(run))


def load(folder: Path) -> RunFile:
    """Read run.json; raises RunFileError."""
    try:
        return msgspec.json.decode((folder / RUN_FILE).read_bytes(), type=RunFile)
    except (OSError, msgspec.DecodeError) as exc:
        message = f"{folder}: no readable {RUN_FILE}: {exc}"
        raise RunFileError(message) from exc


def _replay(outcome: Outcome | None) -> dict[str, float]:
    if outcome is None:
        return {}
    return {"sent": outcome.sent, "late_p50_ms": outcome.late_p50_ms, "late_p99_ms": outcome.late_p99_ms}


def policy_digest(policy: Mapping[str, Any]) -> str:
    """SHA-256 of a policy's values, hex; the ports of the trial's brokers are not among them."""
    return hashlib.sha256(toml_text(policy).encode()).hexdigest()


def _events(sent: Sequence[Sent], verdict: Verdict, start_ns: int) -> tuple[Event, ...]:
    arrived: dict[int, list[Delivery]] = {}
    for delivery in verdict.deliveries:
        arrived.setdefault(delivery.sent, []).append(delivery)
    return tuple(_event(one, arrived.get(index, []), start_ns) for index, one in enumerate(sent))


def _event(one: Sent, deliveries: Sequence[Delivery], start_ns: int) -> Event:
    first = min((delivery.time_ns for delivery in deliveries), default=None)
    return Event(
        second=round((one.recorded_ns - start_ns) / NANOSECONDS, 3),
        topic=one.topic,
        country=one.country,
        brokers=tuple(sorted({delivery.broker for delivery in deliveries})),
        latency_ms=None if first is None else round((first - one.captured_ns) / 1e6, 3),
        tag=deliveries[0].tag if deliveries else "",
    )


def _track(recording: Path, sent: Sequence[Sent], start_ns: int) -> tuple[tuple[float, float, float], ...]:
    """The positions in the recording between the first and the last message that was sent; a gap in them is none."""
    end_ns = max((one.recorded_ns for one in sent), default=0)
    found = []
    for message in messages(recording):
        members = json_object(message.payload) if message.payload[:1] == b"{" else None
        if not members or not start_ns <= message.moment_ns <= end_ns:
            continue
        if position := position_of(members):
            found.append((round((message.moment_ns - start_ns) / NANOSECONDS, 3), *position))
    return tuple(found)


def _pictures(verdict: Verdict, start_ns: int) -> tuple[Picture, ...]:
    return tuple(
        Picture(
            before=f"{number:03d}-{picture.seen.broker}-before.jpg",
            after=f"{number:03d}-{picture.seen.broker}-after.jpg",
            second=round((picture.sent.recorded_ns - start_ns) / NANOSECONDS, 3),
            broker=picture.seen.broker,
            width=picture.width,
            height=picture.height,
            claimed=dict(picture.claimed),
            objects=picture.sent.objects,
            hits=picture.hits,
        )
        for number, picture in enumerate(verdict.pictures)
    )
