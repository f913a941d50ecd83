"""`residency-tools compare`: runs over the same recording side by side: two policies, two models, two versions.

Each run is a folder that `verify` or `demo` kept. Messages are the same where topic and moment in the recording are.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from agent.errors import AgentError
from tools.drawing import fate_of, percentiles
from tools.judge import STATES
from tools.run_file import RunFile, load

DIFFERENT_STATUS, USAGE_STATUS, TROUBLE_STATUS = 1, 2, 3
SHORT_DIGEST = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One figure of every run; `timing` figures differ between any two runs and do not count as a difference."""

    name: str
    values: tuple[str, ...]
    timing: bool = False

    @property
    def differs(self) -> bool:
        """Whether the runs do not agree."""
        return not self.timing and len(set(self.values)) > 1


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to `residency-tools`."""
    parser = subparsers.add_parser("compare", help="put runs side by side", description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folders of runs; two or more")
    parser.add_argument("--all", action="store_true", help="show figures that do not differ as well")
    parser.add_argument("--fail", action="store_true", help="exit with 1 where the runs differ")
    parser.add_argument("--json", action="store_true", help="print all figures as JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Compare; 0 done, 1 different and told to fail, 2 wrong usage, 3 a run cannot be read."""
    if len(arguments.runs) < 2:
        print("compare: wanted two runs or more", file=sys.stderr)
        return USAGE_STATUS
    try:
        found = rows([load(folder) for folder in arguments.runs])
    except AgentError as exc:
        print(f"compare: {exc}", file=sys.stderr)
        return TROUBLE_STATUS
    if arguments.json:
        print(json.dumps({one.name: {"values": one.values, "differs": one.differs} for one in found}))
    else:
        _show(found, [folder.name for folder in arguments.runs], everything=arguments.all)
    return DIFFERENT_STATUS if arguments.fail and any(one.differs for one in found) else 0


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
    known = [{(event.topic, event.second): fate_of(event) for event in one.events} for one in runs]
    others = [sum(known[0].get(key, fate) != fate for key, fate in one.items()) for one in known]
    return Row(name="messages that went another way", values=tuple(str(number) for number in others))


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


def _show(found: Sequence[Row], names: Sequence[str], *, everything: bool) -> None:
    table = Table(box=SIMPLE_HEAD)
    table.add_column("")
    for name in names:
        table.add_column(name, justify="right")
    for one in found:
        if everything or one.differs or one.timing:
            style = "bold yellow" if one.differs else ""
            table.add_row(one.name, *one.values, style=style)
    console = Console()
    console.print(table)
    differing = sum(one.differs for one in found)
    console.print(f"{differing} of {sum(not one.timing for one in found)} figures differ.")
