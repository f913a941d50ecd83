"""`residency-tools demo`: the main job, end to end, on this machine.

An in-car broker and one broker per region run on loopback, the agent as its own process, and the bundled drive from
Shenzhen to Hong Kong is replayed through it. Independent witnesses on the regional brokers say what arrived. The exit
status is 0 only if nothing arrived where it may not, delivered pictures are redacted, and nothing is unaccounted for.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from agent.errors import AgentError
from tools.demo_report import show
from tools.importing.truth import ATTACHMENT, Labelled, Truth
from tools.judge import Judge, Sent, Verdict, judge_counts
from tools.recording import Recorded, contents
from tools.run_file import keep
from tools.scene import MAX_SPEED_MPS, PERMITS, agent_values, permitted, policy_values
from tools.schedule import Options
from tools.spool import Spool
from tools.trial import BROKERS, Setting, Trial, TrialError, conduct, prepared

BUNDLED = Path(__file__).parent / "drives" / "shenzhen-hong-kong.mcap"
MAX_SPEEDUP = 20.0  # the agent's configuration takes no car for faster than 1000 m/s
FAILED_STATUS, USAGE_STATUS, TROUBLE_STATUS = 1, 2, 3


@dataclass(slots=True, kw_only=True)
class SentLog:
    """What was sent, with the recording's truth about it."""

    truth: Truth
    spool: Spool
    sent: list[Sent] = field(default_factory=list)
    objects: dict[tuple[str, int], Labelled] = field(init=False)

    def __post_init__(self) -> None:
        self.objects = {(one.topic, one.capture_ns): one for one in self.truth.pictures}

    def note(self, message: Recorded, original: Recorded) -> None:
        """Keep one message as it was sent; `original` is how it was recorded. Raises SpoolError."""
        labelled = self.objects.get((original.topic, original.capture_ns))
        country = self.truth.country_at(original.capture_ns)
        objects = labelled.objects if labelled else ()
        self.sent.append(
            Sent(
                topic=message.topic,
                payload=self.spool.keep(message.payload),
                country=country,
                objects=objects,
                recorded_ns=original.moment_ns,
                captured_ns=message.capture_ns,
            )
        )


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to `residency-tools`."""
    parser = subparsers.add_parser("demo", help="replay the bundled drive and judge the outcome", description=__doc__)
    parser.add_argument("--out", type=Path, help="folder of the run's files, default: runs/demo-TIME")
    parser.add_argument("--recording", type=Path, default=BUNDLED, help="with ground truth; default: the bundled drive")
    parser.add_argument("--speed", type=float, default=10.0, help="times recorded speed, default: %(default)g")
    parser.add_argument("--from", dest="start_s", type=float, default=0.0, metavar="S", help="start at this second")
    parser.add_argument("--to", dest="end_s", type=float, default=float("inf"), metavar="S", help="end at this second")
    parser.add_argument("--kill-after", type=float, metavar="S", help="SIGKILL the agent S seconds after the start")
    parser.add_argument("--broker", choices=sorted(BROKERS), default="auto", help="default: mosquitto where installed")
    parser.add_argument("--manifest", type=Path, help="of the detector; default: the one that comes with the agent")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--quiet", action="store_true", help="no progress display")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Demonstrate; 0 all promises kept, 1 one broken, 2 wrong usage, 3 the demo itself failed, 130 interrupted."""
    if not 0 < arguments.speed <= MAX_SPEEDUP:
        print(f"demo: --speed {arguments.speed:g}: wanted more than 0, at most {MAX_SPEEDUP:g}", file=sys.stderr)
        return USAGE_STATUS
    folder = arguments.out or Path("runs") / time.strftime("demo-%Y%m%d-%H%M%S")
    setting = Setting(
        agent=agent_values(arguments.speed, arguments.manifest),
        policy=policy_values(),
        recording=arguments.recording,
        folder=folder.absolute(),
        options=Options(speed=arguments.speed, start_s=arguments.start_s, end_s=arguments.end_s),
        broker=arguments.broker,
        kill_after_s=arguments.kill_after,
        quiet=arguments.quiet or arguments.json,
    )
    console = Console(quiet=arguments.json)
    try:
        _announce(console, setting, arguments.speed)
        with prepared(setting.folder) as spool:
            sent, trial, verdict = asyncio.run(demonstrate(setting, spool))
            keep(setting.folder, setting, sent, trial, verdict)
    except (AgentError, OSError) as exc:
        print(f"demo: {exc}", file=sys.stderr)
        return TROUBLE_STATUS
    show(console, verdict, trial.status["counts"], trial.outcome)
    line = f"{trial.seconds:.0f} s in all. Files: {escape(str(folder))} (`residency-tools report` makes a page of them)"
    console.print(line, soft_wrap=True)
    if arguments.json:
        print(json.dumps({"problems": verdict.problems, "status": trial.status, "folder": str(folder)}))
    return FAILED_STATUS if verdict.problems else 0


async def demonstrate(setting: Setting, spool: Spool) -> tuple[list[Sent], Trial, Verdict]:
    """Conduct the trial and judge it; raises AgentError where the trial itself fails.

    The payloads stay in the spool. Safe to cancel.
    """
    attached = contents(setting.recording).attachments.get(ATTACHMENT)
    if attached is None:
        message = f"{setting.recording}: no ground truth in it; `residency-tools verify` takes any recording"
        raise TrialError(message)
    log = SentLog(truth=Truth.decode(attached), spool=spool)
    trial = await conduct(setting, log.note, spool)
    return log.sent, trial, await asyncio.to_thread(_judge, log.sent, trial)


def _judge(sent: list[Sent], trial: Trial) -> Verdict:
    verdict = Judge(sent, permitted).judge(trial.seen)
    verdict.problems += judge_counts(trial.status["counts"], sent=len(sent), delivered=sum(verdict.arrived.values()))
    verdict.problems += [] if trial.audit_intact else [f"audit: {trial.audit}"]
    verdict.problems += [f"nothing arrived at {name}" for name in PERMITS if not _arrived(verdict, name)]
    if not verdict.pictures:
        verdict.problems.append("no picture arrived anywhere")
    return verdict


def _arrived(verdict: Verdict, broker: str) -> int:
    return sum(count for (_country, name), count in verdict.arrived.items() if name == broker)


def _announce(console: Console, setting: Setting, speed: float) -> None:
    kind = "composite recording, see NOTICE" if contents(setting.recording).composite else "recording"
    lines = [
        f"[bold]{escape(setting.recording.name)}[/bold]: {kind}; replayed at {speed:g}x as if it happened now.",
        "Every capture time (JSON key `ts`, user property `time`) is rewritten, positions stay;",
        f"the car seems {speed:g} times as fast, so the agent's speed limit is {MAX_SPEED_MPS:g} m/s x {speed:g}.",
    ]
    if setting.kill_after_s is not None:
        lines.append(f"The agent is killed (SIGKILL) after {setting.kill_after_s:g} s and started again.")
    console.print("\n".join(lines), soft_wrap=True)
