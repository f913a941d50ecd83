"""The tables of a model card in Markdown, written between two marks so that the rest of the card stays as it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tools.evaluation.report import percent, share
from tools.evaluation.summary import BANDS, band_name

OPENING, CLOSING = "<!-- tables: written by residency-tools evaluate -->", "<!-- end of tables -->"


def with_tables(card: str, result: Mapping[str, Any], names: Sequence[str]) -> str:
    """The card with its marked part replaced; without marks the tables come at its end."""
    body = f"{OPENING}\n\n{tables(result, names)}\n\n{CLOSING}"
    if OPENING in card and CLOSING in card:
        before, rest = card.split(OPENING, 1)
        return before + body + rest.split(CLOSING, 1)[1]
    return f"{card.rstrip()}\n\n{body}\n"


def tables(result: Mapping[str, Any], names: Sequence[str]) -> str:
    """All tables of the first detector, its loss against the others, and the contest."""
    first = result["detectors"][names[0]]
    parts = [_classes(first), _sizes(first), _over(first)]
    parts.extend(_loss(first, result["detectors"][name]) for name in names[1:])
    parts.append(_contest(result["side_by_side"]))
    times = result["latency_ms"]
    if times:
        rows = [[name, f"{value}", f"{times['ours'] / value:.3f}"] for name, value in times.items()]
        parts.append(_table(("one 1280x736 pass, one thread, medians of one run", "ms", "ours / its time"), rows))
    return "\n\n".join(parts)


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _classes(facts: Mapping[str, Any]) -> str:
    rows = []
    for label, own in facts["classes"].items():
        for name, part in ((label, own), *((f"- {source}", part) for source, part in own["sources"].items())):
            rows.append(
                [
                    name,
                    f"{part['threshold']:.3f}",
                    f"{part['smallest']:.0f}",
                    str(part["detection"]["total"]),
                    percent(part["detection"], bound=True),
                    percent(part["false"]),
                    percent(part["recall"]),
                    share(part["average_precision"], digits=1),
                ],
            )
    headings = (
        "class, source",
        "threshold",
        "from px",
        "objects",
        "covered (Wilson)",
        "false",
        "recall, IoU 0.5",
        "AP",
    )
    return _table(headings, rows)


def _sizes(facts: Mapping[str, Any]) -> str:
    rows = []
    for label, own in facts["classes"].items():
        for low, high in BANDS[label]:
            part = own["sizes"][band_name(low, high)]
            recall, coverage = percent(part["recall"], bound=True), percent(part["coverage"], bound=True)
            rows.append([label, band_name(low, high), str(part["recall"]["total"]), recall, coverage])
    return _table(("class", "size, px", "objects", "recall, IoU 0.5", "covered"), rows)


def _over(facts: Mapping[str, Any]) -> str:
    named = [
        *((label, own["over_redacted"]) for label, own in facts["classes"].items()),
        ("all", facts["over_redacted"]),
    ]
    rows = [[label, str(part["pictures"]), share(part["median"]), share(part["p95"])] for label, part in named]
    return _table(("masked outside any object, % of the picture", "pictures", "median", "p95"), rows)


def _loss(first: Mapping[str, Any], second: Mapping[str, Any]) -> str:
    rows = []
    for label, own in first["classes"].items():
        other = second["classes"].get(label)
        if other is not None and own["recall"]["rate"] is not None:
            loss = 100 * (other["recall"]["rate"] - own["recall"]["rate"])
            precisions = [share(part["average_precision"], digits=1) for part in (own, other)]
            rows.append([label, percent(own["recall"]), percent(other["recall"]), f"{loss:.1f}", *precisions])
    one, two = first["name"], second["name"]
    return _table(("class", f"recall, {one}", f"recall, {two}", "loss, points", f"AP, {one}", f"AP, {two}"), rows)


def _contest(contest: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        [
            str(row["class"]),
            str(row["source"]),
            str(row["detector"]),
            f"{row['threshold']:.3f}",
            percent(row["false"]),
            percent(row["detection"], bound=True),
            percent(row["recall"]),
            share(row["average_precision"], digits=1),
        ]
        for row in contest
    ]
    return _table(("class", "pictures", "detector", "threshold", "false", "covered (Wilson)", "recall", "AP"), rows)
