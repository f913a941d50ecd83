"""The readable side: tables of one detector, tables side by side, and a contact sheet of the misses."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image, ImageDraw
from rich.console import Console
from rich.table import Table

from tools.evaluation.contest import Outcome
from tools.evaluation.summary import BANDS, SMALLEST, band_name

COLOURS = {"person": "lime", "face": "yellow", "plate": "red"}
CELL = 320  # pixels of a contact sheet's cell
COLUMNS = 4


def percent(facts: object, *, bound: bool = False) -> str:
    """`93.1 (>= 90.2)` from a rate's facts; a dash where nothing was counted."""
    if not isinstance(facts, Mapping) or facts.get("rate") is None:
        return "-"
    text = f"{100 * float(facts['rate']):.1f}"
    return f"{text} (>= {100 * float(facts['wilson_lower']):.1f})" if bound else text


def share(value: object, *, digits: int = 2) -> str:
    """A share in per cent; a dash where there is none."""
    if not isinstance(value, int | float) or math.isnan(value):
        return "-"
    return f"{100 * value:.{digits}f}"


def class_table(facts: Mapping[str, Any]) -> Table:
    """Each class, and each source below it."""
    table = Table(title=f"{facts['name']}, {facts['pictures']} pictures; per cent")
    headings = (
        "class, source",
        "threshold",
        "smallest px",
        "objects",
        "covered",
        "false",
        "recall",
        "AP",
        "over, median",
    )
    for heading in headings:
        table.add_column(heading, justify="left" if heading == headings[0] else "right")
    for label, own in facts["classes"].items():
        table.add_row(label, *_cells(own), style="bold")
        for source, part in own["sources"].items():
            table.add_row(f"  {source}", *_cells(part))
    return table


def _cells(own: Mapping[str, Any]) -> list[str]:
    return [
        f"{own['threshold']:.3f}",
        f"{own['smallest']:.0f}",
        str(own["detection"]["total"]),
        percent(own["detection"], bound=True),
        percent(own["false"]),
        percent(own["recall"]),
        share(own["average_precision"], digits=1),
        share(own["over_redacted"]["median"]),
    ]


def size_table(facts: Mapping[str, Any]) -> Table:
    """Recall at IoU 0.5 and coverage by object size."""
    table = Table(title=f"{facts['name']}: recall at IoU 0.5 / at least half covered, by size in pixels")
    for heading in ("class", "size", "objects", "recall", "covered"):
        table.add_column(heading, justify="left" if heading == "class" else "right")
    for label, own in facts["classes"].items():
        for low, high in BANDS[label]:
            part = own["sizes"][band_name(low, high)]
            row = (str(part["recall"]["total"]), percent(part["recall"]), percent(part["coverage"]))
            table.add_row(label, band_name(low, high), *row)
    return table


def contest_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """All detectors at thresholds where their false rates are alike."""
    table = Table(title="side by side, each at the threshold where a tenth of its boxes is false")
    headings = ("class", "pictures", "detector", "threshold", "false", "covered", "recall", "AP")
    for heading in headings:
        table.add_column(heading, justify="left" if heading in headings[:3] else "right")
    for row in rows:
        table.add_row(
            str(row["class"]),
            str(row.get("source", "all")),
            str(row["detector"]),
            f"{row['threshold']:.3f}",
            percent(row["false"]),
            percent(row["detection"], bound=True),
            percent(row["recall"]),
            share(row["average_precision"], digits=1),
        )
    return table


def loss_table(first: Mapping[str, Any], second: Mapping[str, Any]) -> Table:
    """What the first detector, in int8, loses against the second, in float, at the first one's thresholds."""
    table = Table(title=f"{first['name']} against {second['name']}, at the same thresholds; per cent")
    for heading in ("class", "recall", "recall of the other", "loss in points", "AP", "AP of the other"):
        table.add_column(heading, justify="left" if heading == "class" else "right")
    for label, own in first["classes"].items():
        other = second["classes"].get(label)
        if other is None or own["recall"]["rate"] is None:
            continue
        loss = 100 * (other["recall"]["rate"] - own["recall"]["rate"])
        precisions = (share(own["average_precision"], digits=1), share(other["average_precision"], digits=1))
        table.add_row(label, percent(own["recall"]), percent(other["recall"]), f"{loss:.2f}", *precisions)
    return table


def printed(tables: Sequence[Table], width: int = 130) -> str:
    """Tables as plain text."""
    stream = io.StringIO()
    console = Console(file=stream, width=width, color_system=None)
    for table in tables:
        console.print(table)
    return stream.getvalue()


def misses(outcomes: Sequence[Outcome], thresholds: Mapping[str, float], most: int = 48) -> Image.Image:
    """A contact sheet of pictures with objects that count and were not covered: the misses drawn, thick, the rest thin.

    It shows people: it is for the eyes of whoever may see the pictures, and belongs in no repository.
    """
    chosen = [item for item in outcomes if _missed(item, thresholds)][:most]
    lines = max(1, math.ceil(len(chosen) / COLUMNS))
    sheet = Image.new("RGB", (COLUMNS * CELL, lines * CELL), "black")
    for index, item in enumerate(chosen):
        picture = _drawn(item, thresholds)
        picture.thumbnail((CELL, CELL))
        sheet.paste(picture, (index % COLUMNS * CELL, index // COLUMNS * CELL))
    return sheet


def _missed(item: Outcome, thresholds: Mapping[str, float]) -> list[tuple[str, Sequence[float]]]:
    return [
        (label, [float(value) for value in box])
        for label, own in item.judgements.items()
        for box, size, covered in zip(item.picture.truths[label].objects, own.sizes, own.covered, strict=True)
        if size >= SMALLEST[label] and covered < thresholds[label]
    ]


def _drawn(item: Outcome, thresholds: Mapping[str, float]) -> Image.Image:
    picture = Image.fromarray(item.picture.pixels())
    draw = ImageDraw.Draw(picture)
    for label, found in item.boxes.items():
        for box, score in zip(found.boxes, found.scores, strict=True):
            if score >= thresholds.get(label, 1.0):
                draw.rectangle([float(value) for value in box], outline=COLOURS[label])
    for label, box in _missed(item, thresholds):
        draw.rectangle(box, outline=COLOURS[label], width=4)
    return picture
