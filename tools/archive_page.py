"""The page of an archive: what became of its recordings, which checks failed, what everything was judged by."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template

from tools.archive_results import Result
from tools.judge import STATES
from tools.report import PAGES, bullets, style, table
from tools.stamps import rfc3339
from tools.whole_files import write_whole

PAGE = "archive.html"
OUTCOMES = ("failed", "broken", "passed")
MOST_ROWS = 5000  # in the page, those that did not pass first; the table has them all
SQUARES_IN_A_ROW, SQUARE = 75, 12.0
HOUR_S = 3600


def write(path: Path, name: str, results: Sequence[Result]) -> None:
    """Write the page; raises OSError."""
    write_whole(path, page(name, results, time.time_ns()).encode())


def page(name: str, results: Sequence[Result], created_ns: int) -> str:
    """Fill the template."""
    outcomes = Counter[str](one.outcome for one in results)
    values = {
        "style": style(),
        "title": escape(name),
        "created": rfc3339(created_ns)[:19].replace("T", " ") + " UTC",
        "verdict": "PASSED" if outcomes["passed"] == len(results) else "FAILED" if outcomes["failed"] else "INCOMPLETE",
        "verdict_class": "passed" if outcomes["passed"] == len(results) else "failed",
        "summary": _summary(results, outcomes),
        "squares": _squares(results),
        "checks": _checks(results),
        "equation": _equation(results),
        "reasons": bullets(f"refused: {reason}: {count}" for reason, count in _sum(results, _refused).most_common()),
        "arrived": _arrived(results),
        "masked": _masked(results),
        "rows": _rows(results),
        "rows_note": _rows_note(results),
        "evidence": _evidence(results),
    }
    return Template((PAGES / PAGE).read_text(encoding="utf-8")).substitute(values)


def _summary(results: Sequence[Result], outcomes: Mapping[str, int]) -> str:
    hours = sum(one.drive_s for one in results) / HOUR_S
    told = ", ".join(f"{outcomes[name]} {name}" for name in OUTCOMES if outcomes[name])
    messages, pictures = sum(one.messages for one in results), sum(one.pictures for one in results)
    return f"{len(results)} recordings, {hours:.1f} hours, {messages} messages, {pictures} pictures delivered: {told}."


def _squares(results: Sequence[Result]) -> str:
    """A square for every recording, in the order of their paths, row by row."""
    drawn: dict[str, list[str]] = {}
    for index, one in enumerate(results):
        row, column = divmod(index, SQUARES_IN_A_ROW)
        drawn.setdefault(one.outcome, []).append(f"M{(column + 0.5) * SQUARE:g} {(row + 0.5) * SQUARE:g}h.1")
    height = SQUARE * -(-len(results) // SQUARES_IN_A_ROW)
    paths = "".join(f'<path class="square {name}" d="{"".join(parts)}"/>' for name, parts in sorted(drawn.items()))
    size = f"0 0 {SQUARES_IN_A_ROW * SQUARE:g} {height:g}"
    return f'<svg viewBox="{size}" role="img" aria-label="Outcome of every recording">{paths}</svg>'


def _checks(results: Sequence[Result]) -> str:
    counts = Counter((check.name, check.passed) for one in results for check in one.checks)
    names = sorted({name for name, _ in counts}, key=lambda name: (-counts[name, False], name))
    return table(["check", "passed", "failed"], [[name, counts[name, True], counts[name, False]] for name in names])


def _equation(results: Sequence[Result]) -> str:
    total = _sum(results, lambda one: one.states)
    parts = " + ".join(f"{total[state]} {state}" for state in STATES)
    holds = "=" if total["received"] == sum(total[state] for state in STATES) else "≠"
    return f"<strong>{total['received']} received {holds} {parts}</strong>"


def _arrived(results: Sequence[Result]) -> str:
    return table(["endpoint", "records"], _sum(results, lambda one: one.arrived).most_common())


def _masked(results: Sequence[Result]) -> str:
    masked = _sum(results, lambda one: one.masked)
    covered, labelled = _sum(results, lambda one: one.covered), _sum(results, lambda one: one.labelled)
    rows = [
        [label, masked[label], f"{covered[label]} of {labelled[label]}" if labelled[label] else "none labelled"]
        for label in sorted({*masked, *labelled})
    ]
    return table(["object", "masked", "labelled objects covered"], rows)


def _rows(results: Sequence[Result]) -> str:
    return "".join(_row(one) for one in _shown(results))


def _row(one: Result) -> str:
    cells = [
        f"{one.drive_s / 60:.1f}",
        one.messages,
        *(one.states.get(state, 0) for state in ("delivered", "held", "refused")),
        one.pictures,
        sum(one.masked.values()),
    ]
    notes = [] if one.complete or one.outcome == "broken" else ["the file was cut off"]
    told = escape("; ".join([*([one.reason] if one.reason else []), *notes]))
    reason = f'<br><span class="quiet">{told}</span>' if told else ""
    numbers = "".join(f"<td>{cell}</td>" for cell in cells)
    return (
        f'<tr data-outcome="{one.outcome}"><td>{escape(one.recording)}{reason}</td>'
        f'<td class="{one.outcome}">{one.outcome}</td>{numbers}</tr>'
    )


def _shown(results: Sequence[Result]) -> list[Result]:
    return sorted(results, key=lambda one: (OUTCOMES.index(one.outcome), one.recording))[:MOST_ROWS]


def _rows_note(results: Sequence[Result]) -> str:
    rest = len(results) - MOST_ROWS
    return f"{rest} more recordings are only in the table, results.parquet." if rest > 0 else ""


def _evidence(results: Sequence[Result]) -> str:
    found = sorted({one.facts.job_sha256: one.facts for one in results}.values(), key=lambda one: one.job_sha256)
    rows = [
        (title, text)
        for facts in found
        for title, text in (
            ("Agent", facts.agent),
            ("Policy", f"{facts.policy}, SHA-256 {facts.policy_sha256}"),
            ("Expectations", f"SHA-256 {facts.expectations_sha256}"),
            ("Model", f"SHA-256 {facts.model_sha256}" if facts.model_sha256 else "none came with the agent"),
        )
    ]
    return "".join(f"<tr><th scope=row>{name}</th><td><code>{escape(text)}</code></td></tr>" for name, text in rows)


def _refused(one: Result) -> Mapping[str, int]:
    return one.refused


def _sum(results: Sequence[Result], counts: Callable[[Result], Mapping[str, int]]) -> Counter[str]:
    total: Counter[str] = Counter()
    for one in results:
        total.update(counts(one))
    return total
