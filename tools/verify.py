"""`residency-tools verify`: judge recordings against a policy and expectations.

One recording with the real agent and real brokers, or `--offline` with the agent's code in this process; an archive of
recordings offline, over the cores or a Dask cluster, into one table and one page.

Made for the continuous integration of a vehicle programme: exit status 0 only if every check passes, a readable list of
what was wanted and what was found, JUnit XML, and a run folder from which `report` and `compare` make pages and tables.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import sys
import time
import tomllib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import msgspec
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from agent.errors import AgentError
from tools import archive, archive_page, archive_results, offline
from tools.expectations import Check, ExpectationError, Expectations, fields_of, permits_of, read_expectations
from tools.run_file import keep
from tools.scene import agent_values
from tools.schedule import Options
from tools.trial import BROKERS, Setting, conduct, prepared
from tools.verification import judged
from tools.whole_files import write_whole

MOST_MPS = 1000.0  # the fastest car that the agent's configuration takes
CAR_MPS = 70.0  # the agent's own default of motion.max_speed_mps
PATHS_OF_A_POLICY = (("borders", "geojson"),)  # tables and keys that name a file
PATHS_OF_AN_AGENT = (("signing", "key_file"), ("signing", "pseudonym_key_file"), ("model", "manifest"))
SHOWN = 20  # recordings that did not pass; the table has them all
_NOT_XML = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")  # XML 1.0, 2.2: no characters
FAILED_STATUS, USAGE_STATUS, TROUBLE_STATUS = 1, 2, 3


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to `residency-tools`."""
    parser = subparsers.add_parser("verify", help="judge a run against a policy and expectations", description=__doc__)
    parser.add_argument("recording", type=Path, nargs="?")
    parser.add_argument("--archive", type=Path, metavar="DIR", help="every recording below it, offline, instead of one")
    parser.add_argument("--policy", type=Path, required=True, help="policy.toml; its endpoints become local brokers")
    parser.add_argument("--agent", type=Path, help="agent.toml; default: the topics of the bundled drive")
    parser.add_argument("--expect", type=Path, metavar="TOML", help="expectations; default: only what always holds")
    parser.add_argument("--manifest", type=Path, help="of the detector; default: the agent's own choice")
    parser.add_argument("--out", type=Path, help="folder of the run's files, default: runs/verify-TIME")
    parser.add_argument("--junit", type=Path, metavar="XML", help="write the checks as JUnit XML as well")
    parser.add_argument("--speed", type=float, default=10.0, help="times recorded speed, default: %(default)g")
    parser.add_argument("--from", dest="start_s", type=float, default=0.0, metavar="S", help="start at this second")
    parser.add_argument("--to", dest="end_s", type=float, default=float("inf"), metavar="S", help="end at this second")
    parser.add_argument("--without", action="append", default=[], metavar="FILTER", help="topics to leave out")
    parser.add_argument("--kill-after", type=float, metavar="S", help="SIGKILL the agent S seconds after the start")
    parser.add_argument("--broker", choices=sorted(BROKERS), default="auto", help="default: mosquitto where installed")
    parser.add_argument("--offline", action="store_true", help="drive the agent's code in this process, no brokers")
    parser.add_argument("--workers", type=int, metavar="N", help="processes for --archive, default: one per core")
    parser.add_argument("--scheduler", default="", metavar="ADDRESS", help="Dask scheduler for --archive")
    parser.add_argument("--json", action="store_true", help="print the checks as JSON")
    parser.add_argument("--quiet", action="store_true", help="no progress display")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Verify; 0 all checks passed, 1 one failed, 2 wrong usage, 3 the run itself failed, 130 interrupted."""
    if (arguments.recording is None) == (arguments.archive is None):
        print("verify: name one recording, or an archive with --archive", file=sys.stderr)
        return USAGE_STATUS
    try:
        expected = read_expectations(arguments.expect)
        return (_archive if arguments.archive else _one)(arguments, expected)
    except (ExpectationError, tomllib.TOMLDecodeError) as exc:
        print(f"verify: {exc}", file=sys.stderr)
        return USAGE_STATUS
    except (AgentError, OSError) as exc:
        print(f"verify: {exc}", file=sys.stderr)
        return TROUBLE_STATUS


def _one(arguments: argparse.Namespace, expected: Expectations) -> int:
    folder = (arguments.out or Path("runs") / time.strftime("verify-%Y%m%d-%H%M%S")).absolute()
    setting = _setting(arguments, folder)
    begun = time.monotonic()
    with prepared(folder) as spool:
        done = asyncio.run(judged(setting, expected, offline.conduct if arguments.offline else conduct, spool))
        keep(folder, setting, done.sent, done.trial, done.verdict)
    if arguments.junit:
        write_whole(arguments.junit, junit(arguments.recording.name, done.checks, time.monotonic() - begun))
    _print(done.checks, folder, as_json=arguments.json)
    return 0 if all(one.passed for one in done.checks) else FAILED_STATUS


def _archive(arguments: argparse.Namespace, expected: Expectations) -> int:
    """As for one recording; 3 where none failed, but some could not be judged."""
    out = arguments.out or Path("runs") / f"archive-{arguments.archive.absolute().name}"
    job = archive.job_of(_setting(arguments, out), expected)
    out.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    with archive_results.Journal(out / archive_results.JOURNAL) as journal:
        cluster = archive.Cluster(scheduler=arguments.scheduler, workers=arguments.workers)
        quiet = arguments.quiet or arguments.json
        results = archive.judge_archive(arguments.archive, journal, job, cluster, quiet=quiet)
    archive_results.write_table(out / archive_results.TABLE, results)
    archive_page.write(out / archive_page.PAGE, arguments.archive.absolute().name, results)
    if arguments.junit:
        checks = [archive_results.as_check(one) for one in results]
        write_whole(arguments.junit, junit(arguments.archive.name, checks, time.monotonic() - begun))
    _print_archive(results, out, as_json=arguments.json)
    outcomes = {one.outcome for one in results}
    return FAILED_STATUS if "failed" in outcomes else TROUBLE_STATUS if "broken" in outcomes else 0


def junit(name: str, done: Sequence[Check], seconds: float) -> bytes:
    """Write the checks as JUnit XML: a test case each."""
    failed = sum(not one.passed for one in done)
    suite = ET.Element(
        "testsuite", name=name, tests=str(len(done)), failures=str(failed), errors="0", time=f"{seconds:.1f}"
    )
    for one in done:
        case = ET.SubElement(suite, "testcase", classname=name, name=one.name)
        if not one.passed:
            found = _NOT_XML.sub("?", one.found)
            ET.SubElement(case, "failure", message=f"wanted {one.wanted}; found {found}").text = found
    return bytes(ET.tostring(suite, encoding="utf-8", xml_declaration=True))


def _setting(arguments: argparse.Namespace, folder: Path) -> Setting:
    """Raises ExpectationError, OSError or TOMLDecodeError for what cannot be meant."""
    policy = _read(arguments.policy, PATHS_OF_A_POLICY)
    given = _read(arguments.agent, PATHS_OF_AN_AGENT) if arguments.agent else agent_values(1)
    missing = [key for key in ("version", "regions", "endpoints", "permit", "rules") if key not in policy]
    if missing or arguments.speed <= 0:
        message = f"{arguments.policy}: no {missing[0]}" if missing else "--speed: wanted more than 0"
        raise ExpectationError(message)
    permits_of(policy)  # told now rather than after the run, which reads both for its verdict
    fields_of(policy)
    speed = 1.0 if arguments.offline or arguments.archive else arguments.speed
    return Setting(
        agent=_agent(given, speed, arguments.manifest),
        policy=policy,
        recording=arguments.recording or arguments.archive,
        folder=folder,
        options=Options(
            speed=speed,
            start_s=arguments.start_s,
            end_s=arguments.end_s,
            without=tuple(arguments.without),
        ),
        broker=arguments.broker,
        kill_after_s=arguments.kill_after,
        quiet=arguments.quiet or arguments.json,
    )


def _read(path: Path, names: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """Read a TOML file; file names in it, by table and key, become absolute: the run has a folder of its own."""
    values = tomllib.loads(path.read_text(encoding="utf-8"))
    for table, key in names:
        if values.get(table, {}).get(key):
            values[table][key] = str(path.absolute().parent / values[table][key])
    return values


def _agent(given: dict[str, Any], speed: float, manifest: Path | None) -> dict[str, Any]:
    """At 10x speed the car seems ten times as fast, so its speed limit grows alike, as far as the agent takes it."""
    motion = given.get("motion", {})
    limit = min(motion.get("max_speed_mps", CAR_MPS) * max(speed, 1.0), MOST_MPS)
    model = {**given.get("model", {}), **({"manifest": str(manifest.absolute())} if manifest else {})}
    return {**given, "motion": {**motion, "max_speed_mps": limit}, "model": model}


def _print(done: Sequence[Check], folder: Path, *, as_json: bool) -> None:
    if as_json:
        print(msgspec.json.encode({"checks": [asdict(one) for one in done], "folder": str(folder)}).decode())
        return
    table = Table(box=SIMPLE_HEAD)
    for column in ("", "check", "wanted", "found"):
        table.add_column(column)
    for one in done:
        mark = Text("pass", "green") if one.passed else Text("FAIL", "red")
        table.add_row(mark, one.name, one.wanted, one.found)
    console = Console(markup=False)  # topics may hold brackets
    console.print(table)
    console.print(f"Files of this run: {folder}; `residency-tools report {folder}` makes a page of it.", soft_wrap=True)


def _print_archive(results: Sequence[archive_results.Result], out: Path, *, as_json: bool) -> None:
    outcomes = Counter[str](one.outcome for one in results)
    numbers = {name: outcomes[name] for name in ("passed", "failed", "broken")}
    if as_json:
        print(msgspec.json.encode({"recordings": len(results), **numbers, "folder": str(out.absolute())}).decode())
        return
    console = Console()
    for one in [one for one in results if one.outcome != "passed"][:SHOWN]:
        console.print(f"[red]{one.outcome}[/red] {escape(one.recording)}: {escape(one.reason)}", soft_wrap=True)
    hours = sum(one.drive_s for one in results) / 3600
    told = ", ".join(f"{number} {name}" for name, number in numbers.items())
    console.print(
        f"{len(results)} recordings, {hours:.1f} h: {told}. Table and page: {escape(str(out))}", soft_wrap=True
    )
