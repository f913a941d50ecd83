"""What the demonstration shows at its end: tables in the terminal, pictures before and after in a folder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tools.judge import STATES, Verdict
from tools.replay import Outcome

SHOWN_PROBLEMS = 20


def show(console: Console, verdict: Verdict, counts: Mapping[str, Any], outcome: Outcome) -> None:
    """Print the tables and the verdict."""
    console.print(_regions(counts))
    console.print(_arrivals(verdict))
    reasons = counts["breakdown"].get("refused", {}).get("reason", {})
    for reason, count in sorted(reasons.items()):
        console.print(f"  refused: {reason}: {count}")
    masked = verdict.masked
    console.print(
        f"Redacted in {len(verdict.pictures)} delivered pictures: "
        + (", ".join(f"{count} x {label}" for label, count in sorted(masked.items())) or "nothing")
        + "; labelled objects covered: "
        + (", ".join(f"{label} {hits}/{total}" for label, (hits, total) in verdict.recall().items()) or "none labelled")
    )
    console.print(
        f"Sent {outcome.sent} messages, late by {outcome.late_p50_ms:g} ms (p50), {outcome.late_p99_ms:g} ms (p99); "
        f"{verdict.repeated} repeated deliveries (at least once)."
    )
    _verdict(console, verdict.problems)


def save_pictures(folder: Path, verdict: Verdict) -> None:
    """Write every delivered picture beside the one that was sent."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, picture in enumerate(verdict.pictures):
        (folder / f"{number:03d}-{picture.broker}-before.jpg").write_bytes(picture.sent.payload)
        (folder / f"{number:03d}-{picture.broker}-after.jpg").write_bytes(picture.data)


def _regions(counts: Mapping[str, Any]) -> Table:
    """The agent's own counters; a row per set of regions in which records may have been captured."""
    breakdown = counts["breakdown"]
    table = Table(title="What the agent did, by region of capture")
    for column in ("captured in", "received", *STATES):
        table.add_column(column, justify="left" if column == "captured in" else "right")
    for region in sorted({name for rows in breakdown.values() for name in rows.get("region", {})}):
        row = [breakdown.get(state, {}).get("region", {}).get(region, 0) for state in ("received", *STATES)]
        table.add_row(_named(region), *_numbers([row[0] or sum(row[1:]), *row[1:]]))
    placed = [sum(breakdown.get(state, {}).get("region", {}).values()) for state in STATES]
    rest = [counts[state] - known for state, known in zip(STATES, placed, strict=True)]
    if any(rest):
        table.add_row("anywhere: never leaves", *_numbers([sum(rest), *rest]))
    table.add_section()
    table.add_row("all", *_numbers([counts[state] for state in ("received", *STATES)]))
    return table


def _arrivals(verdict: Verdict) -> Table:
    """What the witnesses saw, by the country in which it was really captured."""
    brokers = sorted({broker for _, broker in verdict.arrived})
    table = Table(title="What arrived, by the true place of capture (independent witnesses)")
    table.add_column("captured in")
    for broker in brokers:
        table.add_column(f"broker {broker}", justify="right")
    for country in sorted({country for country, _ in verdict.arrived}):
        table.add_row(country, *_numbers(verdict.arrived[country, broker] for broker in brokers))
    return table


def _verdict(console: Console, problems: list[str]) -> None:
    if not problems:
        console.print(
            "[bold green]PASSED[/bold green]: nothing arrived where it may not, delivered pictures are redacted, and "
            "every message is accounted for."
        )
        return
    console.print(f"[bold red]FAILED[/bold red]: {len(problems)} problems")
    for problem in problems[:SHOWN_PROBLEMS]:
        console.print(f"  - {problem}", markup=False)


def _named(regions: str) -> str:
    return f"{regions} (in doubt)" if "," in regions else regions


def _numbers(values: Iterable[int]) -> list[str]:
    return [str(value) for value in values]
