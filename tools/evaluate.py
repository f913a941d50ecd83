"""`residency-tools evaluate`: what a detector finds, misses and masks for nothing, on any labelled pictures.

One command makes the tables of the model card: the anonymisation test of GB/T 44464-2024, Annex B, recall and coverage
by size, average precision, over-redacted area, the loss from quantisation, other people's detectors on the same
pictures at equal false rates, and the time of one pass next to CenterFace in the same run.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image
from rich.progress import track

from agent.errors import AgentError
from agent.messages import Box
from agent.pictures.formats import Colour
from agent.redaction.detector import Detector
from tools.evaluation.baselines import baselines, find
from tools.evaluation.card import with_tables
from tools.evaluation.contest import (
    LOWEST,
    Contestant,
    Outcome,
    chosen_thresholds,
    facts_of,
    judged,
    outcome,
    side_by_side,
)
from tools.evaluation.judgement import Judgement
from tools.evaluation.latency import medians, passes, timed
from tools.evaluation.raw import LabelsError
from tools.evaluation.readers import Reading, from_entries, read_folder
from tools.evaluation.report import class_table, contest_table, loss_table, misses, printed, size_table
from tools.evaluation.truths import Labelled
from tools.training.dataset import CLASSES, DatasetError, difference_hash, read_entries, split
from tools.whole_files import write_whole

RECORDED = ("smallest", "detection", "false", "recall", "average_precision", "curve")  # of a class, in a manifest


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = subparsers.add_parser("evaluate", help="measure a detector on labelled pictures", description=__doc__)
    parser.add_argument("pictures", type=Path, help="folder with labels.json, COCO, VOC or YOLO labels")
    parser.add_argument("--manifest", type=Path, action="append", default=[], help="detector to measure; repeatable")
    parser.add_argument(
        "--choose", action="store_true", help="choose the first manifest's thresholds here, and write them"
    )
    parser.add_argument("--held-out", action="store_true", help="of labels.json only the validation split")
    parser.add_argument("--classes", default="", help="YOLO class names in order, joined by commas")
    parser.add_argument(
        "--baselines", type=Path, action="append", help="folder with other detectors' files; repeatable"
    )
    parser.add_argument("--no-baselines", action="store_true", help="leave other people's detectors out")
    parser.add_argument("--limit", type=int, default=0, help="of the pictures only the first so many of each source")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--latency", action="store_true", help="time one pass next to CenterFace")
    parser.add_argument("--json", type=Path, help="write everything measured here")
    parser.add_argument("--card", type=Path, help="write the tables into this Markdown file, between its marks")
    parser.add_argument("--misses", type=Path, help="write a contact sheet of the misses here; it shows people")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure and print; 0 also where a detector is poor: the figures are the result. 1 where there are none."""
    try:
        return _run(args)
    except (AgentError, OSError) as exc:
        print(f"evaluate: {exc}", file=sys.stderr)
        return 1


def _run(args: argparse.Namespace) -> int:
    reading = chosen(args.pictures, held_out=args.held_out, names=_names(args.classes), limit=args.limit)
    print("\n".join([reading.line(), *reading.remarks]))
    contestants, remarks = _contestants(args)
    outcomes = {item.name: measured(item, reading.pictures) for item in contestants}
    if not any(outcomes.values()):
        message = "nothing can be measured: no picture is labelled with a class that a detector finds"
        raise LabelsError(message)
    names = [item.name for item in contestants[: len(args.manifest)]]
    if args.choose and names:
        own = chosen_thresholds(contestants[0], outcomes[names[0]])
        contestants = [
            replace(item, thresholds={**item.thresholds, **own}) if item.name in names else item for item in contestants
        ]
    result: dict[str, Any] = {
        "read": {
            "pictures": len(reading.pictures),
            "labels": reading.labels(),
            "not_understood": dict(reading.strange),
            "without_picture": reading.missing,
            "remarks": list(reading.remarks),
        },
        "detectors": {item.name: facts_of(item, outcomes[item.name]) for item in contestants},
        "side_by_side": _contest(contestants, outcomes),
        "latency_ms": _latency(args) if args.latency else {},
        "remarks": remarks,
    }
    _print(result, names)
    _write(args, result, names, outcomes)
    return 0


def _contest(contestants: Sequence[Contestant], outcomes: Mapping[str, Sequence[Outcome]]) -> list[dict[str, object]]:
    """Over all pictures, then over those of each source."""
    sources = sorted({item.picture.source for listed in outcomes.values() for item in listed})
    table: list[dict[str, object]] = []
    for source in (None, *sources):
        known = {item.name: _known(item, outcomes[item.name], source) for item in contestants}
        table.extend({"source": source or "all", **row} for row in side_by_side(known))
    return table


def _known(item: Contestant, outcomes: Sequence[Outcome], source: str | None) -> dict[str, Judgement]:
    return {label: own for label in item.labels if (own := judged(outcomes, label, source)) is not None}


def _print(result: dict[str, Any], names: Sequence[str]) -> None:
    facts = result["detectors"]
    tables = [table for name in names for table in (class_table(facts[name]), size_table(facts[name]))]
    tables.extend(loss_table(facts[names[0]], facts[name]) for name in names[1:])
    print(printed([*tables, contest_table(result["side_by_side"])]), end="")
    print("\n".join([*_annex_lines(facts, names), *result["remarks"], *_latency_lines(result["latency_ms"])]))


def _write(
    args: argparse.Namespace,
    result: dict[str, Any],
    names: Sequence[str],
    outcomes: Mapping[str, Sequence[Outcome]],
) -> None:
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    if args.choose:
        for path, name in zip(args.manifest, names, strict=True):
            record(path, result["detectors"][name])
    if args.card and names:
        args.card.write_text(with_tables(args.card.read_text(), result, names))
    if args.misses and names:
        thresholds = {label: part["threshold"] for label, part in _classes(result["detectors"][names[0]]).items()}
        misses(outcomes[names[0]], thresholds).save(args.misses)


def record(manifest: Path, facts: dict[str, object]) -> None:
    """Write thresholds, and the figures and curves that they came from, into a manifest.

    Classes of which no object was counted keep what the manifest says of them.
    """
    content = json.loads(manifest.read_bytes())
    for label, part in _classes(facts).items():
        if part["detection"]["total"]:
            content.setdefault("thresholds", {})[label] = part["threshold"]
            content.setdefault("measured", {})[label] = {key: part[key] for key in RECORDED}
    write_whole(manifest, (json.dumps(content, indent=2) + "\n").encode())


def _classes(facts: dict[str, object]) -> dict[str, Any]:
    classes = facts["classes"]
    return classes if isinstance(classes, dict) else {}


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def chosen(folder: Path, *, held_out: bool, names: Sequence[str], limit: int) -> Reading:
    """The pictures to measure on: all of a folder, or its validation split; at most `limit` of each source."""
    if held_out:
        entries = read_entries(folder / "labels.json")
        hashes = {entry.file: _hash(folder / "train" / entry.file) for entry in entries}
        reading = from_entries(split(entries, hashes)[1], folder / "train", entries)
    else:
        reading = read_folder(folder, names)
    kept: list[Labelled] = []
    counts: dict[str, int] = {}
    for picture in reading.pictures:
        counts[picture.source] = counts.get(picture.source, 0) + 1
        if not limit or counts[picture.source] <= limit:
            kept.append(picture)
    return replace(reading, pictures=tuple(kept))


def _hash(path: Path) -> int:
    with Image.open(path) as picture:
        return difference_hash(picture)


def _contestants(args: argparse.Namespace) -> tuple[list[Contestant], list[str]]:
    """Detectors by manifest first, then the baselines; and why some of these do not run here."""
    detectors = [Detector.open(path, threads=args.threads) for path in args.manifest]
    contestants = [contestant(name, item) for name, item in zip(names_of(args.manifest), detectors, strict=True)]
    remarks: list[str] = []
    if not args.no_baselines:
        given = detectors[0].manifest.input if detectors else None
        upscale, long_side = (given.upscale, given.long_side) if given else (1.0, 1280)
        for item in baselines(args.baselines or [], upscale, long_side):
            if isinstance(item, str):
                remarks.append(item)
            else:
                contestants.append(item)
    return contestants, remarks


def names_of(manifests: Sequence[Path]) -> list[str]:
    """By which detectors are told apart: file names, whole paths where files have the same name."""
    alike = Counter(path.stem for path in manifests)
    return [path.stem if alike[path.stem] == 1 else str(path.with_suffix("")) for path in manifests]


def contestant(name: str, detector: Detector) -> Contestant:
    """A manifest's detector at its manifest's thresholds."""
    labels = tuple(label for label in CLASSES if label in detector.manifest.thresholds)
    low = dict.fromkeys(labels, LOWEST)

    def detect(picture: Any) -> list[Box]:  # noqa: ANN401 - an array
        return detector.detect(picture, Colour.RGB, low)

    return Contestant(name=name, labels=labels, detect=detect, thresholds=detector.manifest.thresholds)


def measured(item: Contestant, pictures: Sequence[Labelled]) -> list[Outcome]:
    """One contestant on all pictures where one of its classes is known; damaged ones are named and left out."""
    fitting = [picture for picture in pictures if set(picture.truths) & set(item.labels)]
    outcomes = []
    for picture in track(fitting, description=item.name, transient=True):
        try:
            outcomes.append(outcome(item, picture))
        except DatasetError as exc:
            print(f"evaluate: {item.name}: left out: {exc}", file=sys.stderr)
    return outcomes


def _latency(args: argparse.Namespace) -> dict[str, float]:
    path = find("centerface", args.baselines or [])
    if path is None or not args.manifest:
        return {}
    return medians(timed(passes(args.manifest[0], path)))


def _latency_lines(times: Mapping[str, float]) -> list[str]:
    if not times:
        return []
    others = (
        f"{name} {value} ms: {times['ours'] / value:.3f} of it" for name, value in times.items() if name != "ours"
    )
    return [f"one 1280x736 pass, one thread: {times['ours']} ms; " + "; ".join(others)]


def _annex_lines(facts: dict[str, dict[str, object]], names: Sequence[str]) -> list[str]:
    """The verdict of Annex B in a line for each detector and class."""
    lines = []
    for name in names:
        verdict = facts[name]["annex_b"]
        for label in ("face", "plate"):
            part = verdict.get(label) if isinstance(verdict, dict) else None
            if part:
                state = "met" if part["shall"] and part["should"] else "not met"
                counts = "counts of B.4 met" if part["enough"] else "too few pictures or objects for B.4"
                lines.append(f"GB/T 44464-2024 Annex B, {name}, {label}: {state}; {counts}")
    return lines
