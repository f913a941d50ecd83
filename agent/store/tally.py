"""Counters of the ledger: every state change of a record is one step here, and nowhere else.

A counter is named by (state, dimension, name) and holds how many messages and how many bytes. A delta holds the changes
of one transaction, so that memory follows the disk only after the commit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType

import msgspec

from agent.messages import State
from agent.store.entries import Counts

RECEIVED = "received"
LATE = "late"
AUDIT = "audit"  # rows ever written to the audit chain, and bytes of those that are kept
SEQUENCE = "sequence"  # the last sequence number of each set of regions
TOTAL, REGION, CLASS, REASON, ENDPOINT = "total", "region", "class", "reason", "endpoint"

Name = tuple[str, str, str]
Cells = dict[Name, tuple[int, int]]


class Subject(msgspec.Struct, frozen=True, kw_only=True):
    """What is counted about one message: candidate regions joined by commas, data class, bytes in the spool."""

    regions: str
    data_class: str
    size: int = 0


def add(cells: Cells, name: Name, number: int, size: int = 0) -> None:
    """Add to one counter."""
    count, total = cells.get(name, (0, 0))
    cells[name] = (count + number, total + size)


def step(
    cells: Cells, state: str, subject: Subject, sign: int = 1, marks: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Count one message into a state (`sign` 1) or out of it (-1); `marks` are further dimensions with their names."""
    size = sign * subject.size
    add(cells, (state, TOTAL, ""), sign, size)
    for dimension, name in ((REGION, subject.regions), (CLASS, subject.data_class), *marks.items()):
        if name:
            add(cells, (state, dimension, name), sign, size)


def merge(cells: Cells, delta: Mapping[Name, tuple[int, int]]) -> None:
    """Apply a committed delta; counters that came back to nothing are dropped."""
    for name, (number, size) in delta.items():
        add(cells, name, number, size)
        if cells[name] == (0, 0) and name[0] != SEQUENCE:
            del cells[name]


def spooled_bytes(cells: Cells, dimension: str = TOTAL, name: str = "") -> int:
    """Bytes of pending and held records."""
    return sum(cells.get((state, dimension, name), (0, 0))[1] for state in (State.PENDING, State.HELD))


def sequences(cells: Cells) -> dict[str, int]:
    """The last sequence number of each set of regions."""
    return {name: number for (state, _, name), (number, _) in cells.copy().items() if state == SEQUENCE}


def counts(cells: Iterable[tuple[Name, tuple[int, int]]]) -> Counts:
    """The counters as users see them."""
    totals: dict[str, tuple[int, int]] = {}
    breakdown: dict[str, dict[str, dict[str, int]]] = {}
    for (state, dimension, name), (number, size) in cells:
        if state in {AUDIT, SEQUENCE}:
            continue
        if dimension == TOTAL:
            totals[state] = (number, size)
        elif number:
            breakdown.setdefault(state, {}).setdefault(dimension, {})[name] = number
    numbers = {state: totals.get(state, (0, 0))[0] for state in (RECEIVED, LATE, *State)}
    return Counts(
        **{str(state): number for state, number in numbers.items()},
        pending_bytes=totals.get(State.PENDING, (0, 0))[1],
        held_bytes=totals.get(State.HELD, (0, 0))[1],
        breakdown=breakdown,
    )
