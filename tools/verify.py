"""`residency-tools verify`: judge a recording against a policy and expectations, with the real agent and real brokers.

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
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import msgspec
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from agent.errors import AgentError
from tools.expectations import Check, ExpectationError, Expectations, checks, permits_of, read_expectations
from tools.importing.truth import ATTACHMENT, Labelled, Truth
from tools.judge import Judge, Sent, Verdict, judge_counts
from tools.recording import Recorded, contents, messages
from tools.run_file import keep
from tools.scene import agent_values
from tools.schedule import Options
from tools.schemas import NANOSECONDS
from tools.trial import BROKERS, Setting, Trial, conduct

MOST_MPS = 1000.0  # the fastest car that the agent's configuration takes
CAR_MPS = 70.0  # the agent's own default of motion.max_speed_mps
_NOT_XML = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")  # XML 1.0, 2.2: no characters
FAILED_STATUS, USAGE_STATUS, TROUBLE_STATUS, INTERRUPTED_STATUS = 1, 2, 3, 130


@dataclass(slots=True, kw_only=True)
class TruthLog:
    """What was sent, and where it was really captured as far as anybody says."""

    expected: Expectations
    truth: Truth | None
    start_ns: int
    sent: list[Sent] = field(default_factory=list)
    objects: dict[tuple[str, int], Labelled] = field(init=False)

    def __post_init__(self) -> None:
        pictures = self.truth.pictures if self.truth else ()
        self.objects = {(one.topic, one.capture_ns): one for one in pictures}

    def note(self, message: Recorded, original: Recorded) -> None:
        """Keep one message as it was sent; `original` is how it was recorded."""
        second = (original.capture_ns - self.start_ns) / NANOSECONDS
        labelled = self.objects.get((original.topic, original.capture_ns))
        self.sent.append(
            Sent(
                topic=message.topic,
                payload=message.payload,
                country=self.expected.country_at(second, self.truth, original.capture_ns),
                objects=labelled.objects if labelled else (),
                recorded_ns=original.capture_ns,
                captured_ns=message.capture_ns,
            )
        )


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to `residency-tools`."""
    parser = subparsers.add_parser("verify", help="judge a run against a policy and expectations", description=__doc__)
    parser.add_argument("recording", type=Path)
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
    parser.add_argument("--json", action="store_true", help="print the checks as JSON")
    parser.add_argument("--quiet", action="store_true", help="no progress display")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Verify; 0 all checks passed, 1 one failed, 2 wrong usage, 3 the run itself failed, 130 interrupted."""
    folder = (arguments.out or Path("runs") / time.strftime("verify-%Y%m%d-%H%M%S")).absolute()
    try:
        expected = read_expectations(arguments.expect)
        setting = _setting(arguments, folder)
        begun = time.monotonic()
        done = list(asyncio.run(verify(setting, expected)))
    except (ExpectationError, tomllib.TOMLDecodeError, KeyError) as exc:
        print(f"verify: {exc}", file=sys.stderr)
        return USAGE_STATUS
    except (AgentError, OSError) as exc:
        print(f"verify: {exc}", file=sys.stderr)
        return TROUBLE_STATUS
    except KeyboardInterrupt:
        print("verify: interrupted; everything that it started has ended", file=sys.stderr)
        return INTERRUPTED_STATUS
    if arguments.junit:
        arguments.junit.write_bytes(junit(arguments.recording.name, done, time.monotonic() - begun))
    _print(done, folder, as_json=arguments.json)
    return 0 if all(one.passed for one in done) else FAILED_STATUS


async def verify(setting: Setting, expected: Expectations) -> list[Check]:
    """Conduct the trial, judge it, keep its files; raises AgentError where the trial itself fails. Safe to cancel."""
    attached = contents(setting.recording).attachments.get(ATTACHMENT)
    truth = Truth.decode(attached) if attached else None
    start_ns = min((one.capture_ns for one in messages(setting.recording)), default=0)
    log = TruthLog(expected=expected, truth=truth, start_ns=start_ns)
    trial = await conduct(setting, log.note)
    verdict = await asyncio.to_thread(_judge, log.sent, trial, setting)
    keep(setting.folder, setting, log.sent, trial, verdict)
    return list(checks(expected, log.sent, verdict))


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


def _judge(sent: list[Sent], trial: Trial, setting: Setting) -> Verdict:
    verdict = Judge(sent, permits_of(setting.policy)).judge(trial.seen)
    verdict.problems += judge_counts(trial.status["counts"], sent=len(sent), delivered=sum(verdict.arrived.values()))
    verdict.problems += [] if trial.audit_intact else [f"audit: {trial.audit}"]
    return verdict


def _setting(arguments: argparse.Namespace, folder: Path) -> Setting:
    """Raises ExpectationError, OSError or TOMLDecodeError for what cannot be meant."""
    policy = _read(arguments.policy, {"borders": "geojson"})
    given = _read(arguments.agent, {"signing": "key_file", "model": "manifest"}) if arguments.agent else agent_values(1)
    missing = [key for key in ("version", "regions", "endpoints", "permit", "rules") if key not in policy]
    if missing or arguments.speed <= 0:
        message = f"{arguments.policy}: no {missing[0]}" if missing else "--speed: wanted more than 0"
        raise ExpectationError(message)
    return Setting(
        agent=_agent(given, arguments.speed, arguments.manifest),
        policy=policy,
        recording=arguments.recording,
        folder=folder,
        options=Options(
            speed=arguments.speed,
            start_s=arguments.start_s,
            end_s=arguments.end_s,
            without=tuple(arguments.without),
        ),
        broker=arguments.broker,
        kill_after_s=arguments.kill_after,
        quiet=arguments.quiet or arguments.json,
    )


def _read(path: Path, names: Mapping[str, str]) -> dict[str, Any]:
    """Read a TOML file; file names in it, by table and key, become absolute: the run has a folder of its own."""
    values = tomllib.loads(path.read_text(encoding="utf-8"))
    for table, key in names.items():
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
        mark = "[green]pass[/green]" if one.passed else "[red]FAIL[/red]"
        table.add_row(mark, one.name, one.wanted, one.found)
    console = Console()
    console.print(table)
    console.print(f"Files of this run: {folder}; `residency-tools report {folder}` makes a page of it.", soft_wrap=True)
