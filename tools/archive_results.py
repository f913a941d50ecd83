"""What became of the recordings of an archive: a journal that survives any end, and one Parquet table.

The journal has one JSON line per judged recording, on the disk before the next one counts as done; a torn last line is
none. The table is written anew from it, as a whole or not at all.
"""

from __future__ import annotations

import os
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import msgspec

from agent.errors import AgentError
from tools.drawing import KEPT
from tools.expectations import Check
from tools.judge import Delivery
from tools.recording import Contents
from tools.schemas import NANOSECONDS
from tools.stamps import rfc3339
from tools.verification import Verification
from tools.whole_files import whole

JOURNAL, TABLE = "results.jsonl", "results.parquet"
Outcome = Literal["passed", "failed", "broken"]


class ArchiveError(AgentError):
    """An archive that cannot be judged, or a folder without its results."""


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """What a recording was judged by: SHA-256 digests in hex, and the agent's version."""

    agent: str
    policy: str
    policy_sha256: str
    expectations_sha256: str
    model_sha256: str
    job_sha256: str


class Fate(msgspec.Struct, frozen=True, kw_only=True):
    """How many messages of a topic ended at which brokers."""

    topic: str
    fate: str
    messages: int


class Kept(msgspec.Struct, frozen=True, kw_only=True):
    """One check, as `expectations.Check`."""

    name: str
    passed: bool
    wanted: str
    found: str


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """One recording: `recording` is its path in the archive, `reason` says why it failed or could not be judged.

    `ways` is, compressed by zlib, one byte a message in the order of the file: its place in `fate_names`.
    """

    recording: str
    sha256: str
    outcome: Outcome
    reason: str
    facts: Facts
    run_s: float
    begins: str = ""
    drive_s: float = 0.0
    complete: bool = False
    composite: bool = False
    messages: int = 0
    payload_bytes: int = 0
    pictures: int = 0
    states: dict[str, int] = {}
    arrived: dict[str, int] = {}
    refused: dict[str, int] = {}
    masked: dict[str, int] = {}
    covered: dict[str, int] = {}
    labelled: dict[str, int] = {}
    checks: tuple[Kept, ...] = ()
    fates: tuple[Fate, ...] = ()
    fate_names: tuple[str, ...] = ()
    ways: bytes = b""


def result_of(name: str, sha256: str, facts: Facts, found: Contents, done: Verification) -> Result:
    """Put together what is kept of a judged recording."""
    sent, verdict = done.sent, done.verdict
    failed = [one for one in done.checks if not one.passed]
    ways = _ways(len(sent), verdict.deliveries)
    names = tuple(sorted(set(ways)))
    recall = verdict.recall()
    counts = done.trial.status["counts"]
    times = [one.recorded_ns for one in sent]
    return Result(
        recording=name,
        sha256=sha256,
        outcome="failed" if failed else "passed",
        reason="; ".join(f"{one.name}: wanted {one.wanted}, found {one.found}" for one in failed),
        facts=facts,
        run_s=round(done.trial.seconds, 3),
        begins=rfc3339(min(times)),
        drive_s=round((max(times) - min(times)) / NANOSECONDS, 3),
        complete=found.complete,
        composite=found.composite,
        messages=len(sent),
        payload_bytes=sum(one.payload.length for one in sent),
        pictures=len(verdict.pictures),
        states={name: value for name, value in counts.items() if type(value) is int and not name.endswith("_bytes")},
        arrived=dict(Counter(one.broker for one in verdict.deliveries)),
        refused=dict(counts["breakdown"].get("refused", {}).get("reason", {})),
        masked=dict(verdict.masked),
        covered={label: hits for label, (hits, _) in recall.items()},
        labelled={label: total for label, (_, total) in recall.items()},
        checks=tuple(_kept(one) for one in done.checks),
        fates=tuple(
            Fate(topic=topic, fate=fate, messages=count)
            for (topic, fate), count in sorted(Counter(zip((one.topic for one in sent), ways, strict=True)).items())
        ),
        fate_names=names,
        ways=zlib.compress(bytes(names.index(way) for way in ways)),
    )


def broken(name: str, sha256: str, facts: Facts, reason: str, run_s: float = 0.0) -> Result:
    """A recording that could not be judged."""
    return Result(recording=name, sha256=sha256, outcome="broken", reason=reason, facts=facts, run_s=round(run_s, 3))


def as_check(result: Result) -> Check:
    """A whole recording as one check."""
    found = result.reason or "as wanted"
    return Check(name=result.recording, passed=result.outcome == "passed", wanted="every check passes", found=found)


def ways_of(result: Result) -> list[str]:
    """The fate of every message, in the order of the file."""
    return [result.fate_names[index] for index in zlib.decompress(result.ways)] if result.ways else []


class Journal:
    """The results so far, in the order in which they came; `with` closes it. Safe against any end of the process."""

    def __init__(self, path: Path) -> None:
        self.results = list(_lines(path))
        self._stream = path.open("a+b")
        if self._stream.tell() and not _ends_with_newline(path):
            self._stream.write(b"\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()

    def add(self, result: Result) -> None:
        """Append; it is on the disk when this returns."""
        self._stream.write(msgspec.json.encode(result) + b"\n")
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self.results.append(result)


def write_table(path: Path, results: Sequence[Result]) -> None:
    """Write the Parquet table: the old one or the new one, never half of it. Raises OSError."""
    import pyarrow as pa  # noqa: PLC0415 - an optional extra
    import pyarrow.parquet as pq  # noqa: PLC0415 - as above

    counts = pa.map_(pa.string(), pa.int64())
    text, number = pa.string(), pa.int64()
    check = pa.struct([("name", text), ("passed", pa.bool_()), ("wanted", text), ("found", text)])
    fate = pa.struct([("topic", text), ("fate", text), ("messages", number)])
    columns: list[tuple[str, Any]] = [
        *((name, text) for name in ("recording", "outcome", "reason", "sha256", "begins")),
        *((name, pa.float64()) for name in ("drive_s", "run_s")),
        *((name, pa.bool_()) for name in ("complete", "composite")),
        *((name, number) for name in ("messages", "payload_bytes", "pictures")),
        *((name, counts) for name in ("states", "arrived", "refused", "masked", "covered", "labelled")),
        ("checks", pa.list_(check)),
        ("fates", pa.list_(fate)),
        ("fate_names", pa.list_(text)),
        ("ways", pa.binary()),
        ("facts", pa.struct([(name, text) for name in Facts.__struct_fields__])),
    ]
    rows = [msgspec.to_builtins(one, builtin_types=(bytes,)) for one in results]
    with whole(path) as stream:
        pq.write_table(pa.Table.from_pylist(rows, pa.schema(columns)), stream, compression="zstd")


def read_table(path: Path) -> list[Result]:
    """Read what `write_table` wrote; raises ArchiveError."""
    import pyarrow as pa  # noqa: PLC0415 - as above
    import pyarrow.parquet as pq  # noqa: PLC0415 - as above

    try:
        rows = pq.read_table(path).to_pylist(maps_as_pydicts="strict")
        return [msgspec.convert(row, Result) for row in rows]
    except (OSError, pa.ArrowException, msgspec.ValidationError) as exc:
        message = f"{path}: no table of results: {exc}"
        raise ArchiveError(message) from exc


def _ways(count: int, deliveries: Iterable[Delivery]) -> list[str]:
    found: list[set[str]] = [set() for _ in range(count)]
    for delivery in deliveries:
        found[delivery.sent].add(delivery.broker)
    return ["+".join(sorted(brokers)) or KEPT for brokers in found]


def _kept(check: Check) -> Kept:
    return Kept(name=check.name, passed=check.passed, wanted=check.wanted, found=check.found)


def _lines(path: Path) -> Iterable[Result]:
    """What can be read: a torn line, or one of another version's form, is judged again."""
    if not path.exists():
        return
    for line in path.read_bytes().splitlines():
        try:
            yield msgspec.json.decode(line, type=Result)
        except msgspec.DecodeError:
            continue


def _ends_with_newline(path: Path) -> bool:
    return path.read_bytes()[-1:] == b"\n"
