"""What the demonstration shows at its end: tables in the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from tools.judge import STATES, Verdict
from tools.replay import Outcome

SHOWN_PROBLEMS = 20


def show(console: Console, verdict: Verdict, counts: Mapping[str, Any], outcome: Outcome | None) -> None:
    """Print the tables and the verdict."""
    _say(console, "[bold]What the agent did, by region of capture[/bold]")
    console.print(_regions(counts))
    for reason, count in sorted(counts["breakdown"].get("refused", {}).get("reason", {}).items()):
        _say(console, f"  refused: {reason}: {count}")
    _say(console, "\n[bold]What arrived, by the true place of capture (independent witnesses)[/bold]")
    console.print(_arrivals(verdict))
    masked = ", ".join(f"{label} {count}" for label, count in sorted(verdict.masked.items())) or "nothing"
    covered = ", ".join(f"{label} {hits}/{total}" for label, (hits, total) in verdict.recall().items())
    _say(console, f"Redacted in {len(verdict.pictures)} delivered pictures: {masked}.")
    _say(console, f"Labelled objects found covered: {covered or 'none labelled'}; the model card states its recall.")
    if outcome is not None:
        late = f"{outcome.late_p50_ms:g} ms (p50), {outcome.late_p99_ms:g} ms (p99)"
        _say(console, f"Sent {outcome.sent} messages, late by {late}; {verdict.repeated} repeated deliveries.")
    _verdict(console, verdict.problems)


def _regions(counts: Mapping[str, Any]) -> Table:
    """The agent's own counters; a row per set of regions in which records may have been captured."""
    breakdown = counts["breakdown"]
    table = _table(("received", *STATES))
    for region in sorted({name for rows in breakdown.values() for name in rows.get("region", {})}):
        row = [breakdown.get(state, {}).get("region", {}).get(region, 0) for state in ("received", *STATES)]
        table.add_row(_named(region), *_numbers([row[0] or sum(row[1:]), *row[1:]]))
    placed = [sum(breakdown.get(state, {}).get("region", {}).values()) for state in STATES]
    rest = [counts[state] - known for state, known in zip(STATES, placed, strict=True)]
    if any(rest):
        table.add_row("(none)", *_numbers([sum(rest), *rest]))
    table.add_section()
    table.add_row("all", *_numbers([counts[state] for state in ("received", *STATES)]))
    return table


def _arrivals(verdict: Verdict) -> Table:
    """What the witnesses saw, by the country in which it was really captured."""
    brokers = sorted({broker for _, broker in verdict.arrived})
    table = _table([f"broker {name}" for name in brokers])
    for country in sorted({country for country, _ in verdict.arrived}):
        table.add_row(country, *_numbers(verdict.arrived[country, broker] for broker in brokers))
    return table


def _say(console: Console, text: str) -> None:
    console.print(text, soft_wrap=True)


def _verdict(console: Console, problems: list[str]) -> None:
    if not problems:
        console.print(
            "[bold green]PASSED[/bold green]: nothing arrived where it may not, delivered pictures are redacted,\n"
            "and every message is accounted for."
        )
        return
    console.print(f"[bold red]FAILED[/bold red]: {len(problems)} problems")
    for problem in problems[:SHOWN_PROBLEMS]:
        console.print(f"  - {problem}", markup=False)


def _table(columns: Iterable[str]) -> Table:
    """Fit eight columns of numbers into 80 characters."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("captured in", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _named(regions: str) -> str:
    return f"{regions} (?)" if "," in regions else regions


def _numbers(values: Iterable[int]) -> list[str]:
    return [str(value) for value in values]
