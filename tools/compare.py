"""`residency-tools compare`: runs over the same recording side by side: two policies, two models, two versions.

Each run is a folder that `verify` or `demo` kept; messages are the same where topic and moment in the recording are. Or
each is the folder of a `verify --archive`; with `--archive` here, those are made first: two policies, two detectors or
two installed versions of the agent over the same recordings, without brokers. A result that stands is not made again.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from agent.errors import AgentError
from tools.archive_results import TABLE, read_table
from tools.compare_archives import different, figures
from tools.drawing import fate_of, percentiles
from tools.judge import STATES
from tools.run_file import RunFile, load
from tools.side_by_side import Row, show
from tools.variants import VariantError, add_arguments, judge_all, variants

DIFFERENT_STATUS, USAGE_STATUS, TROUBLE_STATUS = 1, 2, 3
SHORT_DIGEST = 12
SHOWN = 20  # recordings that did not go alike


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to `residency-tools`."""
    parser = subparsers.add_parser("compare", help="put runs side by side", description=__doc__)
    parser.add_argument("runs", type=Path, nargs="*", metavar="RUN", help="folders of runs or of archives")
    parser.add_argument("--all", action="store_true", help="show figures that do not differ as well")
    parser.add_argument("--fail", action="store_true", help="exit with 1 where the runs differ")
    parser.add_argument("--json", action="store_true", help="print all figures as JSON")
    parser.add_argument("--quiet", action="store_true", help="no progress display")
    add_arguments(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Compare; 0 done, 1 different and told to fail, 2 wrong usage, 3 a run cannot be read or an archive not judged."""
    if bool(arguments.archive) == (len(arguments.runs) > 1) or (arguments.archive and arguments.runs):
        print("compare: wanted two runs or more, or an archive with --archive", file=sys.stderr)
        return USAGE_STATUS
    try:
        folders = _judged(arguments) if arguments.archive else arguments.runs
        differs = (_archives if (folders[0] / TABLE).exists() else _runs)(folders, arguments)
    except VariantError as exc:
        print(f"compare: {exc}", file=sys.stderr)
        return USAGE_STATUS
    except (AgentError, OSError) as exc:
        print(f"compare: {exc}", file=sys.stderr)
        return TROUBLE_STATUS
    return DIFFERENT_STATUS if arguments.fail and differs else 0


def _judged(arguments: argparse.Namespace) -> list[Path]:
    """Judge the archive in every way; the folders of the results."""
    out = arguments.out or Path("runs") / f"compare-{arguments.archive.absolute().name}"
    ways = variants(arguments, out)
    judge_all(ways)
    return [way.folder for way in ways]


def _runs(folders: Sequence[Path], arguments: argparse.Namespace) -> bool:
    found = rows([load(folder) for folder in folders])
    if arguments.json:
        print(json.dumps(_as_json(found)))
    else:
        show(Console(markup=False), found, [folder.name for folder in folders], everything=arguments.all)
    return any(one.differs for one in found)


def _archives(folders: Sequence[Path], arguments: argparse.Namespace) -> bool:
    tables = [read_table(folder / TABLE) for folder in folders]
    found, others = figures(tables), different(tables)
    if arguments.json:
        recordings = {one.recording: _as_json(one.rows) for one in others}
        print(json.dumps({"figures": _as_json(found), "recordings": recordings}))
    else:
        console = Console(markup=False)  # topics may hold brackets
        show(console, found, [folder.name for folder in folders], everything=arguments.all)
        for one in others[:SHOWN]:
            told = "; ".join(f"{row.name} {' | '.join(row.values)}" for row in one.rows)
            console.print(f"{one.recording}: {told}", soft_wrap=True)
        console.print(f"{len(others)} recordings did not go alike.")
    return bool(others) or any(one.differs for one in found)


def _as_json(found: Sequence[Row]) -> dict[str, dict[str, object]]:
    return {one.name: {"values": one.values, "differs": one.differs} for one in found}


def rows(runs: Sequence[RunFile]) -> list[Row]:
    """All figures, those about the setting first."""
    return [*_setting(runs), *_counters(runs), *_topics(runs), _fates(runs), *_pictures(runs), *_latencies(runs)]


def _setting(runs: Sequence[RunFile]) -> list[Row]:
    policies = [f"{one.policy['version']} {one.policy['sha256'][:SHORT_DIGEST]}" for one in runs]
    return [
        Row(name="recording", values=tuple(one.title for one in runs)),
        Row(name="policy", values=tuple(policies)),
        Row(name="model", values=tuple(one.model[:SHORT_DIGEST] or "none" for one in runs)),
        Row(name="problems", values=tuple(str(len(one.problems)) for one in runs)),
    ]


def _counters(runs: Sequence[RunFile]) -> list[Row]:
    return [Row(name=state, values=tuple(str(one.counts[state]) for one in runs)) for state in ("received", *STATES)]


def _topics(runs: Sequence[RunFile]) -> list[Row]:
    """How many messages of each topic had each fate."""
    counted = [Counter((event.topic, fate_of(event)) for event in one.events) for one in runs]
    names = sorted({name for counts in counted for name in counts})
    return [
        Row(name=f"{topic} -> {fate}", values=tuple(str(counts[topic, fate]) for counts in counted))
        for topic, fate in names
    ]


def _fates(runs: Sequence[RunFile]) -> Row:
    """How many messages went another way than in the first run; totals may agree although messages do not."""
    known = [_ways(one) for one in runs]
    others = [sum(known[0].get(key, fate) != fate for key, fate in one.items()) for one in known]
    return Row(name="messages that went another way", values=tuple(str(number) for number in others))


def _ways(run: RunFile) -> dict[tuple[str, float, int], str]:
    """The fate of every message by its topic, its moment, and how many of both went before it."""
    seen: Counter[tuple[str, float]] = Counter()
    found = {}
    for event in run.events:
        found[event.topic, event.second, seen[event.topic, event.second]] = fate_of(event)
        seen[event.topic, event.second] += 1
    return found


def _pictures(runs: Sequence[RunFile]) -> list[Row]:
    masked = [sum((Counter(picture.claimed) for picture in one.pictures), Counter()) for one in runs]
    hits = [[hit for picture in one.pictures for hit in picture.hits] for one in runs]
    labels = sorted({label for one in masked for label in one} | {label for one in hits for label, _ in one})
    found = [Row(name=f"masked {label}", values=tuple(str(one[label]) for one in masked)) for label in labels]
    for label in labels:
        told = [[hit for name, hit in one if name == label] for one in hits]
        values = tuple(f"{sum(one)}/{len(one)}" for one in told)
        found.append(Row(name=f"labelled {label} covered", values=values))
    return found


def _latencies(runs: Sequence[RunFile]) -> list[Row]:
    told = [[event.latency_ms for event in one.events if event.latency_ms is not None] for one in runs]
    figures = [percentiles(one) if one else {} for one in told]
    return [
        Row(name=f"latency {name}", values=tuple(f"{one[name]:.0f} ms" if one else "-" for one in figures), timing=True)
        for name in ("p50", "p99")
    ]
