"""Results of the same recordings, judged in several ways, side by side. Values in, values out.

Recordings are the same where their digests are, wherever they lie; messages by their place in the recording.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from tools.archive_results import Result, ways_of
from tools.judge import STATES
from tools.side_by_side import Row

SHORT_DIGEST = 12
MISSING = "-"

Results = Sequence[Result]


@dataclass(frozen=True, slots=True, kw_only=True)
class Different:
    """One recording that did not go alike: its name, and the figures that differ."""

    recording: str
    rows: tuple[Row, ...]


def figures(tables: Sequence[Results]) -> list[Row]:
    """Sums over all recordings, those about the setting first."""
    return [
        *_setting(tables),
        *_counted(tables, "", lambda one: {one.outcome: 1}, ("passed", "failed", "broken")),
        *_counted(tables, "", lambda one: one.states, ("received", *STATES)),
        *_counted(tables, "refused: ", lambda one: one.refused),
        *_counted(tables, "", lambda one: {f"{fate.topic} -> {fate.fate}": fate.messages for fate in one.fates}),
        _another_way(tables),
        *_masks(tables),
        _seconds(tables),
    ]


def different(tables: Sequence[Results]) -> list[Different]:
    """The recordings that did not go alike, or are not in every table, by name."""
    by_digest = [_by_digest(results) for results in tables]
    found = []
    for digest in dict.fromkeys(one.sha256 for results in tables for one in results if one.sha256):
        own = [known.get(digest) for known in by_digest]
        name = next(one.recording for one in own if one)
        rows = tuple(row for row in _of_one(own) if row.differs)
        found += [Different(recording=name, rows=rows)] if rows else []
    return sorted(found, key=lambda one: one.recording)


def _setting(tables: Sequence[Results]) -> list[Row]:
    columns: dict[str, Callable[[Result], str]] = {
        "agent": lambda one: one.facts.agent,
        "policy": lambda one: f"{one.facts.policy} {one.facts.policy_sha256[:SHORT_DIGEST]}",
        "expectations": lambda one: one.facts.expectations_sha256[:SHORT_DIGEST],
        "model": lambda one: one.facts.model_sha256[:SHORT_DIGEST] or "none",
    }
    rows = [Row(name="recordings", values=tuple(str(len(results)) for results in tables))]
    for name, text in columns.items():
        values = (", ".join(sorted({text(one) for one in results})) for results in tables)
        rows.append(Row(name=name, values=tuple(values)))
    return rows


def _counted(
    tables: Sequence[Results], prefix: str, counts: Callable[[Result], Mapping[str, int]], names: Iterable[str] = ()
) -> list[Row]:
    """A row for every name, those given or all that occur, with its sum over each table."""
    sums: list[Counter[str]] = []
    for results in tables:
        sums.append(Counter())
        for one in results:
            sums[-1].update(counts(one))
    return [
        Row(name=f"{prefix}{name}", values=tuple(str(one[name]) for one in sums))
        for name in (names or sorted({name for one in sums for name in one}))
    ]


def _another_way(tables: Sequence[Results]) -> Row:
    """How many messages went another way than in the first table; totals may agree although messages do not."""
    first = _by_digest(tables[0])
    sums = [sum(_moved(first.get(one.sha256), one) for one in results) for results in tables]
    return Row(name="messages that went another way", values=tuple(str(number) for number in sums))


def _moved(one: Result | None, other: Result) -> int:
    if one is None or one.outcome == "broken" or other.outcome == "broken":
        return 0
    return sum(before != after for before, after in zip(ways_of(one), ways_of(other), strict=False))


def _masks(tables: Sequence[Results]) -> list[Row]:
    masked = _counted(tables, "masked ", lambda one: one.masked)
    covered, labelled = (_counted(tables, "", counts) for counts in (lambda one: one.covered, lambda one: one.labelled))
    shares = [
        Row(
            name=f"labelled {hits.name} covered",
            values=tuple(f"{hit}/{total}" for hit, total in zip(hits.values, totals.values, strict=True)),
        )
        for hits, totals in zip(covered, labelled, strict=True)
    ]
    return [*masked, *shares]


def _seconds(tables: Sequence[Results]) -> Row:
    values = tuple(f"{sum(one.run_s for one in results):.0f} s" for results in tables)
    return Row(name="time of the workers", values=values, timing=True)


def _of_one(own: Sequence[Result | None]) -> list[Row]:
    """What is compared of one recording."""
    there = next(one for one in own if one)
    rows = [Row(name="outcome", values=tuple(one.outcome if one else MISSING for one in own))]
    if not all(own):
        return rows
    rows.append(
        Row(
            name="messages that went another way",
            values=tuple(str(_moved(there, one)) for one in own if one),
        )
    )
    return [*rows, *_masks([[one] for one in own if one])]


def _by_digest(results: Results) -> dict[str, Result]:
    return {one.sha256: one for one in results if one.sha256}
