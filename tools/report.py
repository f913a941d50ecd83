"""`residency-tools report`: one self-contained HTML page of a run.

The page needs no network: pictures are inside it, borders come from the agent's own file, and its content security
policy forbids every request. It reads `run.json` and the pictures of a run's folder, as `demo` and `verify` keep them.
"""

from __future__ import annotations

import argparse
import base64
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from agent.assembly import SHIPPED_BORDERS
from agent.errors import AgentError
from agent.places.regions import RegionMap
from tools.drawing import (
    KEPT,
    Projection,
    fate_of,
    histogram_svg,
    map_svg,
    percentiles,
    places_of,
    timeline_svg,
)
from tools.judge import STATES
from tools.progress import progress
from tools.run_file import PICTURES, Event, Picture, RunFile, load
from tools.whole_files import write_whole

PAGES = Path(__file__).parent / "pages"
MOST_PICTURES = 12  # of the run, spread over it: each is 0.2 MB in the page
COLOURS = 5  # classes c0 to c4 in the page
TROUBLE_STATUS = 3
_UNSAFE = re.compile(r"[^A-Za-z0-9_+-]")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to `residency-tools`."""
    parser = subparsers.add_parser("report", help="make a page of a run", description=__doc__)
    parser.add_argument("run_folder", type=Path, metavar="RUN", help="the folder of a run, with run.json")
    parser.add_argument("-o", "--out", type=Path, help="the page to write, default: RUN/report.html")
    parser.add_argument("--json", action="store_true", help="print where the page is, and its counts, as JSON")
    parser.add_argument("--quiet", action="store_true", help="do not say where the page is")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Write the page; 0 done, 3 the run cannot be read."""
    out = arguments.out or arguments.run_folder / "report.html"
    try:
        kept = load(arguments.run_folder)
        with progress("drawing", None, quiet=arguments.quiet):
            write_whole(out, page(kept, arguments.run_folder / PICTURES).encode())
    except (AgentError, OSError) as exc:
        print(f"report: {exc}", file=sys.stderr)
        return TROUBLE_STATUS
    if arguments.json:
        told = {
            "page": str(out),
            "problems": kept.problems,
            "messages": len(kept.events),
            "pictures": len(kept.pictures),
        }
        print(json.dumps(told))
    elif not arguments.quiet:
        print(out)
    return 0


def page(kept: RunFile, pictures: Path) -> str:
    """Fill the template; raises OSError for a picture that is missing."""
    fates = _fates(kept.events)
    values = {
        "style": style(),
        "title": escape(kept.title),
        "created": escape(kept.created[:19].replace("T", " ") + " UTC"),
        "verdict": "FAILED" if kept.problems else "PASSED",
        "verdict_class": "failed" if kept.problems else "passed",
        "provenance": _provenance(kept.provenance),
        "problems": bullets(kept.problems),
        "equation": _equation(kept.counts),
        "regions": _regions(kept.counts),
        "reasons": bullets(f"refused: {name}: {count}" for name, count in _breakdown(kept, "refused", "reason")),
        "topic_options": "".join(f"<option>{escape(topic)}</option>" for topic in _topics(kept.events)),
        "fate_styles": "\n".join(_fate_style(index, fate) for index, fate in enumerate(fates) if fate != KEPT),
        "fate_boxes": "\n".join(_fate_box(index, fate) for index, fate in enumerate(fates)),
        "map": _map(kept),
        "borders_note": "The borders are those of the agent's region file.",
        "timeline": timeline_svg(kept.events, fates),
        "topics": _topic_table(kept.events, fates),
        "pictures": _pictures(kept.pictures, pictures),
        "histograms": _histograms(kept.events),
        "evidence": _evidence(kept),
    }
    return Template((PAGES / "report.html").read_text(encoding="utf-8")).substitute(values)


def style() -> str:
    """What every page looks like."""
    return (PAGES / "style.css").read_text(encoding="utf-8")


def _fates(events: Iterable[Event]) -> list[str]:
    found = sorted({fate_of(one) for one in events})
    return sorted(found, key=lambda fate: (fate == KEPT, fate))


def _topics(events: Iterable[Event]) -> list[str]:
    return sorted({one.topic for one in events})


def _fate_style(index: int, fate: str) -> str:
    """A fate becomes part of a style sheet: a name with other characters than these keeps the neutral colour."""
    if _UNSAFE.search(fate):
        return ""
    colour = f"var(--c{index % COLOURS})"
    return f'.dots[data-fate="{fate}"] {{ stroke: {colour} }} .swatch[data-fate="{fate}"] {{ background: {colour} }}'


def _fate_box(index: int, fate: str) -> str:
    name = "stayed in the car" if fate == KEPT else f"reached {escape(fate)}"
    safe = escape(fate)
    return (
        f'<label><input type="checkbox" checked id="fate{index}" data-fate="{safe}">'
        f'<span class="swatch" data-fate="{safe}"></span>{name}</label>'
    )


def _provenance(found: Mapping[str, str]) -> str:
    kind = "Composite recording" if found.get("composite") == "true" else "Recording of one drive"
    rest = "; ".join(f"{escape(name)}: {escape(value)}" for name, value in found.items() if name != "composite")
    return f"{kind}{': ' + rest if rest else ''}."


def bullets(lines: Iterable[str]) -> str:
    """Lines as a list; nothing where there are none."""
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f"<ul>{items}</ul>" if items else ""


def _equation(counts: Mapping[str, Any]) -> str:
    parts = " + ".join(f"{counts[state]} {state}" for state in STATES)
    holds = "=" if counts["received"] == sum(counts[state] for state in STATES) else "≠"
    return f"<strong>{counts['received']} received {holds} {parts}</strong>"


def _breakdown(kept: RunFile, state: str, dimension: str) -> list[tuple[str, int]]:
    return sorted(kept.counts.get("breakdown", {}).get(state, {}).get(dimension, {}).items())


def _regions(counts: Mapping[str, Any]) -> str:
    """A row per set of candidate regions, as the agent counted them."""
    by_state: list[dict[str, int]] = [counts.get("breakdown", {}).get(state, {}).get("region", {}) for state in STATES]
    rows: list[list[object]] = [
        [name, *(rows.get(name, 0) for rows in by_state)]
        for name in sorted({name for rows in by_state for name in rows})
    ]
    rest = [counts[state] - sum(known.values()) for state, known in zip(STATES, by_state, strict=True)]
    if any(rest):
        rows.append(["(no region: never leaves)", *rest])
    return table(["captured in", *STATES], rows)


def _topic_table(events: Sequence[Event], fates: Sequence[str]) -> str:
    counts = Counter((one.topic, fate_of(one)) for one in events)
    sent = Counter(one.topic for one in events)
    rows = [[topic, sent[topic], *(counts[topic, fate] for fate in fates)] for topic in sorted(sent)]
    heads = ["stayed in the car" if fate == KEPT else f"reached {fate}" for fate in fates]
    return table(["topic", "sent", *heads], rows)


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table with one line of headings."""
    columns = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{columns}</tr></thead><tbody>{body}</tbody></table>"


def _map(kept: RunFile) -> str:
    if not kept.track:
        return "<p>The recording holds no position.</p>"
    track = [(latitude, longitude) for _, latitude, longitude in sorted(kept.track)]
    projection = Projection(track)
    regions = RegionMap.from_bytes(SHIPPED_BORDERS.read_bytes())
    near = {place: regions.countries_near(*place, 0) for place in projection.corners()}
    names = {place: next(iter(found)) for place, found in near.items() if len(found) == 1}
    borders = [one.points for one in regions.outlines(*projection.box())]
    return map_svg(projection, borders=borders, names=names, track=track, places=places_of(kept.events, kept.track))


def _pictures(found: Sequence[Picture], folder: Path) -> str:
    if not found:
        return "<p>No picture was delivered.</p>"
    step = max(1, -(-len(found) // MOST_PICTURES))
    sampled = found[::step]
    drawn = "".join(_picture(number, one, folder) for number, one in enumerate(sampled))
    buttons = '<button id="previous">Previous</button><button id="next">Next</button>'
    note = f"{len(sampled)} of {len(found)} delivered pictures; labelled objects outlined: green covered, red not."
    return f'<p class="row-of">{buttons}<span class="quiet">{note}</span></p>{drawn}'


def _picture(number: int, one: Picture, folder: Path) -> str:
    masked = ", ".join(f"{escape(label)} {count}" for label, count in sorted(one.claimed.items())) or "nothing"
    caption = f"{one.second:.1f} s, delivered to {escape(one.broker)}, masked: {masked}"
    before, after = _embedded(folder / one.before), _embedded(folder / one.after)
    return (
        f'<figure class="picture"><div class="compare"><img alt="before redaction" src="{before}">'
        f'<img class="after" alt="after redaction" src="{after}">{_boxes(one)}'
        f'<div class="handle"></div></div><input type="range" min="0" max="100" value="50" id="cut{number}" '
        f'aria-label="How much of the picture is shown before redaction"><figcaption>{caption}</figcaption></figure>'
    )


def _boxes(one: Picture) -> str:
    """Labelled objects in the picture's own pixels; those that could not be told are left out."""
    if not one.objects or len(one.hits) != len(one.objects):
        return ""
    rects = "".join(
        f'<rect class="{"hit" if hit else "miss"}" x="{x1}" y="{y1}" width="{x2 - x1}" height="{y2 - y1}"/>'
        for (_, x1, y1, x2, y2), (_, hit) in zip(one.objects, one.hits, strict=True)
    )
    return f'<svg class="boxes" viewBox="0 0 {one.width} {one.height}" preserveAspectRatio="none">{rects}</svg>'


def _embedded(path: Path) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(path.read_bytes()).decode()


def _histograms(events: Sequence[Event]) -> str:
    found: dict[str, list[float]] = {}
    for one in events:
        if one.latency_ms is not None:
            found.setdefault("pictures" if "camera" in one.topic else "other data", []).append(one.latency_ms)
    return "".join(_histogram(name, values) for name, values in sorted(found.items())) or "<p>Nothing arrived.</p>"


def _histogram(name: str, values: list[float]) -> str:
    told = percentiles(values)
    caption = f"{escape(name)}: p50 {told['p50']:.0f} ms, p99 {told['p99']:.0f} ms, {len(values)} delivered"
    return f"<figure>{histogram_svg(name, values)}<figcaption>{caption}</figcaption></figure>"


def _replay(told: Mapping[str, float]) -> str:
    if not told:
        return "none: judged offline"
    late = f"{told['late_p50_ms']:g} ms (p50), {told['late_p99_ms']:g} ms (p99)"
    return f"{told['sent']:g} messages, handed to the in-car broker late by {late}"


def _evidence(kept: RunFile) -> str:
    rows = {
        "Audit log": kept.audit,
        "Policy": f"{kept.policy.get('version', '')}, SHA-256 {kept.policy.get('sha256', '')}",
        "Model": f"SHA-256 {kept.model}" if kept.model else "none was loaded",
        "Replay": _replay(kept.replay),
    }
    return "".join(
        f"<tr><th scope=row>{name}</th><td><code>{escape(text)}</code></td></tr>" for name, text in rows.items()
    )
