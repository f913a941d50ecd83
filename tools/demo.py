"""`residency-tools demo`: the main job, end to end, on this machine.

An in-car broker and one broker per region run on loopback, the agent as its own process, and the bundled drive from
Shenzhen to Hong Kong is replayed through it. Independent witnesses on the regional brokers say what arrived. The exit
status is 0 only if nothing arrived where it may not, delivered pictures are redacted, and nothing is unaccounted for.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from agent.errors import AgentError
from tools.agent_process import AgentProcess, agent
from tools.brokers import Broker, amqtt, installed, mosquitto
from tools.client import Address, connected, new_client
from tools.demo_report import save_pictures, show
from tools.importing.truth import ATTACHMENT, Labelled, Truth
from tools.judge import Judge, Sent, Verdict, judge_counts
from tools.progress import Advance, progress
from tools.recording import Recorded, contents, messages
from tools.replay import Outcome, Player
from tools.scene import MAX_SPEED_MPS, PERMITS, Port, agent_toml, permitted, policy_toml
from tools.schedule import Due, Options, due
from tools.witness import Seen, Witness, witness

BUNDLED = Path(__file__).parent / "drives" / "shenzhen-hong-kong.mcap"
BROKERS = {"auto": installed, "mosquitto": mosquitto, "amqtt": amqtt}
SETTLE_SECONDS = 40.0  # after the last message: pictures wait for the detector, records for their PUBACK
MAX_SPEEDUP = 20.0  # the agent's configuration takes no car for faster than 1000 m/s
FAILED_STATUS, USAGE_STATUS, TROUBLE_STATUS, INTERRUPTED_STATUS = 1, 2, 3, 130


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What is to be demonstrated, and where its files go."""

    recording: Path
    folder: Path
    speed: float
    broker: str = "auto"
    kill_after_s: float | None = None
    start_s: float = 0.0
    end_s: float = float("inf")
    quiet: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """How it went."""

    verdict: Verdict
    status: dict[str, Any]
    outcome: Outcome
    seconds: float


@dataclass(slots=True, kw_only=True)
class _Log:
    """What was sent, with the truth about it."""

    truth: Truth
    objects: dict[tuple[str, int], Labelled] = field(default_factory=dict)
    sent: list[Sent] = field(default_factory=list)

    def note(self, message: Recorded, one: Due) -> None:
        original = one.message
        labelled = self.objects.get((original.topic, original.capture_ns))
        self.sent.append(
            Sent(
                topic=message.topic,
                payload=message.payload,
                country=self.truth.country_at(original.capture_ns),
                objects=labelled.objects if labelled else (),
            )
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """Everything that runs: brokers, witnesses, agent."""

    car: Address
    witnesses: dict[str, Witness]
    agent: AgentProcess


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
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--quiet", action="store_true", help="no progress display")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Demonstrate; 0 all promises kept, 1 one broken, 2 wrong usage, 3 the demo itself failed, 130 interrupted."""
    if not 0 < arguments.speed <= MAX_SPEEDUP:
        print(f"demo: --speed {arguments.speed:g}: wanted more than 0, at most {MAX_SPEEDUP:g}", file=sys.stderr)
        return USAGE_STATUS
    folder = arguments.out or Path("runs") / time.strftime("demo-%Y%m%d-%H%M%S")
    wanted = Run(
        recording=arguments.recording,
        folder=folder.absolute(),
        speed=arguments.speed,
        broker=arguments.broker,
        kill_after_s=arguments.kill_after,
        start_s=arguments.start_s,
        end_s=arguments.end_s,
        quiet=arguments.quiet or arguments.json,
    )
    console = Console(quiet=arguments.json)
    try:
        _announce(console, wanted)
        result = asyncio.run(demonstrate(wanted))
    except (AgentError, OSError) as exc:
        print(f"demo: {exc}", file=sys.stderr)
        return TROUBLE_STATUS
    except KeyboardInterrupt:
        print("demo: interrupted; everything that it started has ended", file=sys.stderr)
        return INTERRUPTED_STATUS
    save_pictures(folder / "pictures", result.verdict)
    show(console, result.verdict, result.status["counts"], result.outcome)
    line = f"Files of this run: {folder} (agent.log, pictures before and after); {result.seconds:.0f} s in all."
    console.print(line, soft_wrap=True)
    if arguments.json:
        print(json.dumps({"problems": result.verdict.problems, "status": result.status, "folder": str(folder)}))
    return FAILED_STATUS if result.verdict.problems else 0


async def demonstrate(wanted: Run) -> Result:
    """Set everything up, replay, judge; whatever was started is ended, also on cancellation."""
    begun = time.monotonic()
    found = contents(wanted.recording)
    truth = Truth.decode(found.attachments[ATTACHMENT])
    log = _Log(truth=truth, objects={(one.topic, one.capture_ns): one for one in truth.pictures})
    async with _stage(wanted) as stage:
        outcome, _ = await asyncio.gather(_replay(wanted, stage, log), _kill(wanted, stage.agent))
        status = await _settled(stage.agent, len(log.sent))
        await stage.agent.stop()
        status |= {"counts": (await stage.agent.status())["counts"]}
        seen = [one for found in stage.witnesses.values() for one in found.records]
    verdict = await asyncio.to_thread(_judge, log.sent, seen, status)
    return Result(verdict=verdict, status=status, outcome=outcome, seconds=time.monotonic() - begun)


@asynccontextmanager
async def _stage(wanted: Run) -> AsyncIterator[Stage]:
    folder = wanted.folder
    folder.mkdir(parents=True, exist_ok=True)
    async with AsyncExitStack() as stack:
        start = BROKERS[wanted.broker]
        car = await stack.enter_async_context(start(folder=folder / "brokers" / "car"))
        regional = {name: await stack.enter_async_context(start(folder=folder / "brokers" / name)) for name in PERMITS}
        witnesses = {name: stack.enter_context(witness(name, _address(broker))) for name, broker in regional.items()}
        endpoints = {name: _port(broker) for name, broker in regional.items()}
        text = policy_toml(endpoints, stamped=_port(car).protocol == "5")
        (folder / "policy.toml").write_text(text, encoding="utf-8")
        configuration = folder / "agent.toml"
        configuration.write_text(agent_toml(_port(car), speed=wanted.speed), encoding="utf-8")
        process = await stack.enter_async_context(agent(configuration, folder / "agent.log"))
        yield Stage(car=_address(car), witnesses=witnesses, agent=process)


async def _replay(wanted: Run, stage: Stage, log: _Log) -> Outcome:
    """Replay with fresh time stamps on a thread of its own; cancelling stops it."""
    options = Options(speed=wanted.speed, start_s=wanted.start_s, end_s=wanted.end_s)
    total = sum(1 for _ in due(lambda: messages(wanted.recording), options))
    client = new_client(stage.car, "residency-demo")
    with connected(client, stage.car), progress("replaying", total, quiet=wanted.quiet) as advance:
        player = Player(client, fresh=True)

        def on_sent(message: Recorded, one: Due) -> None:
            log.note(message, one)
            _advance(advance, len(log.sent), stage)

        work = asyncio.create_task(
            asyncio.to_thread(player.play, due(lambda: messages(wanted.recording), options), on_sent=on_sent),
            name="replay",
        )
        try:
            return await asyncio.shield(work)
        finally:
            player.stop()
            with contextlib.suppress(AgentError):
                await work


async def _kill(wanted: Run, process: AgentProcess) -> None:
    if wanted.kill_after_s is None:
        return
    await asyncio.sleep(wanted.kill_after_s)
    await process.kill()
    await process.start()


async def _settled(process: AgentProcess, sent: int) -> dict[str, Any]:
    """Wait until everything sent is recorded and nothing is pending; after the limit, give what there is."""
    with contextlib.suppress(AgentError):
        return await process.until(
            lambda found, _pid: found["counts"]["received"] >= sent and not found["counts"]["pending"], SETTLE_SECONDS
        )
    return await process.status()


def _judge(sent: list[Sent], seen: list[Seen], status: dict[str, Any]) -> Verdict:
    verdict = Judge(sent, permitted).judge(seen)
    verdict.problems += judge_counts(status["counts"], sent=len(sent), delivered=sum(verdict.arrived.values()))
    verdict.problems += [f"nothing arrived at {name}" for name in PERMITS if not _arrived(verdict, name)]
    if not verdict.pictures:
        verdict.problems.append("no picture arrived anywhere")
    return verdict


def _arrived(verdict: Verdict, broker: str) -> int:
    return sum(count for (_country, name), count in verdict.arrived.items() if name == broker)


def _advance(advance: Advance, sent: int, stage: Stage) -> None:
    advance(sent, ", ".join(f"{name} received {len(found.records)}" for name, found in stage.witnesses.items()))


def _announce(console: Console, wanted: Run) -> None:
    kind = "composite recording, see NOTICE" if contents(wanted.recording).composite else "recording"
    limit = f"{MAX_SPEED_MPS:g} m/s x {wanted.speed:g}"
    lines = [
        f"[bold]{wanted.recording.name}[/bold]: {kind}; replayed at {wanted.speed:g}x as if it happened now.",
        "Every capture time (JSON key `ts`, user property `time`) is rewritten, positions stay;",
        f"the car seems {wanted.speed:g} times as fast, so the agent's speed limit is {limit}.",
    ]
    if wanted.kill_after_s is not None:
        lines.append(f"The agent is killed (SIGKILL) after {wanted.kill_after_s:g} s and started again.")
    console.print("\n".join(lines), soft_wrap=True)


def _address(broker: Broker) -> Address:
    return Address(port=broker.port, protocol=_port(broker).protocol)


def _port(broker: Broker) -> Port:
    return Port(port=broker.port, protocol="5" if broker.kind == "mosquitto" else "3.1.1")
