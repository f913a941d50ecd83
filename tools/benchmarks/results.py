"""What a benchmark row found: values with their spread, held against what must and what should be reached.

Pure: values in, judgement and text out.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

NOT_RUN = "not run"


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """What a row must reach and aims at; `at_least`: larger is better. `unit` stands behind printed values."""

    must: float
    aim: float
    at_least: bool
    unit: str = "x"

    def judged(self, value: float) -> str:
        """`aim`, `must` or `missed`."""
        sign = 1 if self.at_least else -1
        if sign * value >= sign * self.aim:
            return "aim"
        return "must" if sign * value >= sign * self.must else "missed"

    def text(self, limit: float) -> str:
        """One of the two limits as it is printed."""
        return f"{'>=' if self.at_least else '<='} {limit:g}{self.unit}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row: `values` are judged by their median; `parts` are the figures that they were made from, by name."""

    name: str
    what: str
    beside: str
    goal: Goal | None = None
    values: tuple[float, ...] = ()
    parts: Mapping[str, Sequence[float]] = field(default_factory=dict)
    note: str = ""
    why_not: str = ""

    @property
    def verdict(self) -> str:
        """`aim`, `must`, `missed`, `not run`; empty for a row without a goal."""
        if self.goal is None:
            return "" if self.parts else NOT_RUN
        return self.goal.judged(statistics.median(self.values)) if self.values else NOT_RUN

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        goal = self.goal
        return {
            "row": self.name,
            "what": self.what,
            "beside": self.beside,
            "unit": goal.unit if goal else "",
            "must": goal.text(goal.must) if goal else None,
            "aim": goal.text(goal.aim) if goal else None,
            "verdict": self.verdict,
            "values": spread(self.values) | {"all": [rounded(value) for value in self.values]} if self.values else None,
            "parts": {name: spread(values) for name, values in self.parts.items() if values},
            "note": self.note,
            "why_not": self.why_not,
        }


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, least and greatest of at least one value, and how many there were."""
    found = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: rounded(value) for name, value in found.items()} | {"n": len(values)}


def rounded(value: float) -> float:
    """Four significant digits: what a repetition could show at best."""
    return float(f"{value:.4g}")


def ratios(these: Sequence[float], those: Sequence[float]) -> tuple[float, ...]:
    """Turn by turn; nothing where one side was not run."""
    return tuple(one / other for one, other in zip(these, those, strict=False))


def quantile(values: Iterable[float], share: float) -> float:
    """The smallest value that at least this share of at least one value does not exceed."""
    ranked = sorted(values)
    return ranked[min(len(ranked) - 1, max(0, -int(-share * len(ranked) // 1) - 1))]


def table(rows: Sequence[Row]) -> str:
    """The rows as lines of text: median, min-max, must, aim, verdict, and below each what it was made from."""
    lines = [f"{'row':<17} {'median':>10} {'min - max':>19} {'must':>10} {'aim':>10}  verdict"]
    for row in rows:
        lines.append(_line(row))
        lines += [f"  {name}: {_spread_text(values)}" for name, values in row.parts.items() if values]
        lines += [f"  {text}" for text in (row.note, row.why_not) if text]
    return "\n".join(lines)


def _line(row: Row) -> str:
    goal = row.goal
    must, aim = (goal.text(goal.must), goal.text(goal.aim)) if goal else ("-", "-")
    if not row.values:
        return f"{row.name:<17} {'-':>10} {'-':>19} {must:>10} {aim:>10}  {row.verdict}"
    unit = goal.unit if goal else ""
    median = f"{rounded(statistics.median(row.values)):g}{unit}"
    between = f"{rounded(min(row.values)):g} - {rounded(max(row.values)):g}"
    return f"{row.name:<17} {median:>10} {between:>19} {must:>10} {aim:>10}  {row.verdict}"


def _spread_text(values: Sequence[float]) -> str:
    found = spread(values)
    return f"{found['median']:g}" + (f" ({found['min']:g} - {found['max']:g})" if len(values) > 1 else "")
