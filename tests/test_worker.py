"""The worker process: whatever a picture does to it, the agent lives and the next picture is redacted."""

import asyncio
import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from canary import find_mark, saved, scene
from detectors import DIGEST, POISON

from agent.errors import RefusedError
from agent.payloads.inspection import InspectionLimits
from agent.pictures.formats import PictureLimits, RedactionOptions
from agent.redaction import seccomp
from agent.redaction.pool import RedactionPool
from agent.redaction.redaction import redact_payload
from agent.redaction.worker import RedactionWorker, WorkerOptions
from tools.recording import messages

ROOT = Path(__file__).parent.parent
HARMLESS = saved(scene(), "PNG")


@pytest.fixture(autouse=True)
def _detectors(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)


@pytest.fixture
def options(tmp_path, patience):
    return WorkerOptions(
        manifest=tmp_path / "model.json", factory="detectors:marks", timeout_s=patience, start_timeout_s=2 * patience
    )


def poisoned() -> bytes:
    pixels = scene()
    pixels[:8, :8] = POISON
    return saved(pixels, "PNG")


async def until(task):
    """A tick of the loop every 10 ms, as long as a task runs."""
    while not task.done():
        await asyncio.wait({task}, timeout=0.01)
        yield


def ends(pid: int, seconds: float) -> bool:
    """Whether a process that is not ours ends in time; a zombie has ended."""
    deadline, status = time.monotonic() + seconds, Path(f"/proc/{pid}/stat")
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            if status.read_text().split()[2] != "Z":
                time.sleep(0.01)
                continue
        return True
    return False


def group_ends(group: int, seconds: float) -> bool:
    """Whether a process group loses its last living member in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        members = [p.parent.name for p in Path("/proc").glob("[0-9]*/stat") if group_of(p) == group]
        if not members:
            return True
        time.sleep(0.01)
    return False


def group_of(stat: Path) -> int:
    """The process group of a living process, 0 for one that has ended."""
    with contextlib.suppress(OSError):
        fields = stat.read_text().rpartition(")")[2].split()
        return 0 if fields[0] == "Z" else int(fields[2])
    return 0


async def refusal(worker: RedactionWorker, payload: bytes) -> str:
    with pytest.raises(RefusedError) as caught:
        await worker.redact(payload)
    return caught.value.reason


async def test_worker_gives_what_the_pure_function_gives_and_logs_nothing(options, caplog):
    caplog.set_level(logging.INFO, "agent")
    async with RedactionWorker(options) as worker:
        done = await worker.redact(HARMLESS)
        assert (worker.ready, worker.digest, done.model_digest) == (True, DIGEST, DIGEST)
    pure = redact_payload(HARMLESS, find_mark, RedactionOptions(), InspectionLimits())
    assert (done.payload, dict(done.counts), done.pictures) == (pure.payload, {"person": 1}, 1)
    assert not caplog.records


@pytest.mark.parametrize(
    ("factory", "reason"),
    [
        ("crashing", "redaction.crashed"),
        ("exiting", "redaction.crashed"),
        ("sleeping", "redaction.timeout"),
        ("looping", "redaction.timeout"),
        ("greedy", "redaction.memory"),
        ("raising", "redaction.detector"),
        ("untrusted", "redaction.model"),
        ("nan", "redaction.box"),
        ("inverted", "redaction.box"),
        ("nonsense", "redaction.detector"),
    ],
)
async def test_fault_refuses_its_picture_and_the_next_one_is_redacted(options, factory, reason, patience):
    limit_s = 1.0 if reason == "redaction.timeout" else patience
    given = replace(options, factory=f"detectors:{factory}", timeout_s=limit_s, memory_bytes=512 << 20)
    async with RedactionWorker(given) as worker:
        assert await refusal(worker, poisoned()) == reason
        assert (await worker.redact(HARMLESS)).counts == {"person": 1}
        died = factory in {"crashing", "exiting", "sleeping", "looping"}
        assert worker.restarts == (1 if died else 0)


async def test_worker_killed_between_two_pictures_is_replaced(options):
    async with RedactionWorker(options) as worker:
        await worker.redact(HARMLESS)
        first = worker.pid
        os.kill(first, signal.SIGKILL)
        with contextlib.suppress(RefusedError):
            await worker.redact(HARMLESS)
        assert (await worker.redact(HARMLESS)).counts == {"person": 1}
        assert worker.pid != first


async def test_missing_model_refuses_every_picture_and_the_agent_lives(options):
    given = replace(options, factory="agent.redaction.detector:Detector.open")
    async with RedactionWorker(given) as worker:
        assert [await refusal(worker, HARMLESS) for _ in range(3)] == ["redaction.model"] * 3
        assert (worker.ready, worker.error, worker.digest) == (False, "redaction.model", "")


async def test_model_that_does_not_open_in_time_refuses(options):
    given = replace(options, factory="detectors:slow_to_open", start_timeout_s=0.5)
    async with RedactionWorker(given) as worker:
        assert (worker.ready, worker.error) == (False, "redaction.timeout")
        assert await refusal(worker, HARMLESS) == "redaction.timeout"


async def test_picture_over_a_limit_is_refused_by_the_limits_that_the_agent_was_given(options):
    limits = InspectionLimits(picture=PictureLimits(max_pixels=100))
    async with RedactionWorker(replace(options, limits=limits)) as worker:
        assert await refusal(worker, HARMLESS) == "picture.limit.pixels"


async def test_two_pictures_at_once_are_both_redacted(options):
    async with RedactionWorker(options) as worker:
        first, second = await asyncio.gather(worker.redact(HARMLESS), worker.redact(saved(scene(), "JPEG")))
        assert first.payload.startswith(b"\x89PNG")
        assert second.payload.startswith(b"\xff\xd8")


async def test_cancelled_picture_does_not_answer_the_next_one(options):
    given = replace(options, factory="detectors:sleeping")
    async with RedactionWorker(given) as worker:
        waiting = asyncio.create_task(worker.redact(poisoned()), name="cancelled picture")
        await asyncio.wait({waiting}, timeout=0.1)
        assert worker._turn.locked()
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert (await worker.redact(HARMLESS)).counts == {"person": 1}


async def test_telemetry_runs_on_while_a_picture_hangs(options):
    given = replace(options, factory="detectors:sleeping", timeout_s=1.0)
    async with RedactionWorker(given) as worker:
        hanging = asyncio.create_task(worker.redact(poisoned()), name="hanging picture")
        ticks = 0
        async for _ in until(hanging):
            ticks += 1
        with pytest.raises(RefusedError):
            await hanging
    assert ticks > 20


async def test_failures_in_a_row_delay_the_next_start_ever_longer(options):
    given = replace(options, factory="detectors:crashing")
    async with RedactionWorker(given) as worker:
        loop, delays = asyncio.get_running_loop(), []
        for _ in range(3):
            await refusal(worker, poisoned())
            delays.append(worker._not_before - loop.time())
    assert delays[0] <= 0.01 < delays[1] < delays[2]


async def test_what_a_library_prints_reaches_neither_the_agent_nor_its_stderr(options, capfd):
    async with RedactionWorker(replace(options, factory="detectors:chatty")) as worker:
        assert (await worker.redact(poisoned())).counts == {}
    assert capfd.readouterr() == ("", "")


async def test_decoder_that_was_taken_over_can_open_no_file_or_socket_and_touch_no_process(options):
    async with RedactionWorker(replace(options, factory="detectors:escaping")) as worker:
        done = await worker.redact(poisoned())
        assert worker.confined
    assert done.counts == {}


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_filter_refuses_each_forbidden_call_allows_the_others_and_kills_another_numbering(machine):
    steps, forbidden = seccomp.program(machine), {pair[machine == "aarch64"] for pair in seccomp.FORBIDDEN.values()}
    for number in range(500):
        verdict = run_filter(steps, number, seccomp.ARCHITECTURES[machine])
        assert verdict == (seccomp.REFUSE if number in forbidden else seccomp.ALLOW)
    assert run_filter(steps, seccomp.X32_BIT, seccomp.ARCHITECTURES[machine]) == seccomp.REFUSE
    assert run_filter(steps, 0, 0) == seccomp.KILL


def run_filter(steps, number: int, architecture: int) -> int:
    """What the kernel would decide: four instructions of classic BPF."""
    at, loaded = 0, 0
    while True:
        code, taken, other, operand = steps[at]
        at += 1
        if code == seccomp.RETURN:
            return operand
        if code == seccomp.LOAD:
            loaded = {seccomp.NUMBER: number, seccomp.ARCHITECTURE: architecture}[operand]
        else:
            held = loaded == operand if code == seccomp.JUMP_IF_EQUAL else loaded >= operand
            at += taken if held else other


async def test_child_of_the_worker_that_holds_its_pipes_ends_with_it(options, patience):
    given = replace(options, factory="detectors:forking", timeout_s=1.0)
    async with RedactionWorker(given) as worker:
        group = worker.pid
        assert await refusal(worker, poisoned()) == "redaction.timeout"
        assert await asyncio.to_thread(group_ends, group, patience)


async def test_worker_ends_with_the_block_that_started_it(options):
    async with RedactionWorker(options) as worker:
        pid = worker.pid
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_worker_dies_with_a_killed_agent_even_in_the_middle_of_a_picture(patience, tmp_path):
    (tmp_path / "picture").write_bytes(poisoned())
    script = (
        "import asyncio, os, signal, sys\n"
        "from pathlib import Path\n"
        "from agent.redaction.worker import RedactionWorker, WorkerOptions\n"
        "async def main():\n"
        "    options = WorkerOptions(manifest=Path('m'), factory='detectors:sleeping', timeout_s=3600)\n"
        "    async with RedactionWorker(options) as worker:\n"
        "        hanging = asyncio.create_task(worker.redact(Path(sys.argv[1]).read_bytes()))\n"
        "        await asyncio.wait({hanging}, timeout=1)\n"
        "        print(worker.pid, flush=True)\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "asyncio.run(main())\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "picture")]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=4 * patience)
    assert ended.returncode == -signal.SIGKILL
    assert ends(int(ended.stdout), patience)


def test_agent_process_imports_neither_pillow_nor_onnxruntime():
    script = "import sys, agent.redaction.worker, agent.payloads.inspection\n"
    script += "print({'PIL', 'onnxruntime', 'numpy'} & set(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert ran.stdout.strip() == "set()"


async def test_shipped_model_gives_the_same_bytes_for_any_number_of_threads(options):
    drive = ROOT / "tools" / "drives" / "shenzhen-hong-kong.mcap"
    street = next(m.payload for m in messages(drive) if m.topic == "vehicle/camera/front" and len(m.payload) > 50_000)
    shipped = replace(
        options, manifest=ROOT / "models" / "detector.json", factory="agent.redaction.detector:Detector.open"
    )
    outputs, counts = set(), {}
    for threads in (1, 2, 1):
        async with RedactionWorker(replace(shipped, threads=threads)) as worker:
            done = await worker.redact(street)
            outputs.add(done.payload)
            counts = done.counts
    assert len(outputs) == 1
    assert counts["person"] > 0


async def test_process_is_ended_without_pictures_and_the_next_picture_starts_one_at_once(options, patience):
    async with RedactionWorker(replace(options, unload_after_s=0.3)) as worker, asyncio.timeout(2 * patience):
        await worker.redact(HARMLESS)
        first = worker.pid
        while not worker.unloaded:  # noqa: ASYNC110 - the worker says it by no event
            await asyncio.sleep(0.02)
        assert await asyncio.to_thread(ends, first, patience)
        assert (worker.ready, worker.resident_bytes, worker.digest) == (False, 0, DIGEST)
        assert (await worker.redact(HARMLESS)).counts == {"person": 1}
        assert worker.pid != first
        assert (worker.restarts, worker.error, worker.unloaded) == (0, "", False)
        assert worker.resident_bytes > 10 << 20
        assert worker.starts.as_dict()["buckets"]["+Inf"] == 2
        assert worker.redactions.as_dict()["buckets"]["+Inf"] == 2


async def test_process_that_has_pictures_to_redact_is_not_ended(options, patience):
    given = replace(options, unload_after_s=0.2, factory="detectors:sleeping", timeout_s=1.0)
    async with RedactionWorker(given) as worker, asyncio.timeout(2 * patience):
        first = worker.pid
        assert await refusal(worker, poisoned()) == "redaction.timeout", "not a crash: the slow picture had its time"
        assert worker.pid != first
        assert (worker.restarts, worker.unloaded) == (0, False)


async def test_pool_redacts_with_one_process_while_another_is_busy(options):
    async with RedactionPool(replace(options, factory="detectors:sleeping"), 2) as pool:
        assert (pool.ready, pool.error, pool.restarts, pool.digest) == (True, "", 0, DIGEST)
        hanging = asyncio.create_task(pool.redact(poisoned()))
        await asyncio.sleep(0)
        assert (await pool.redact(HARMLESS)).pictures == 1
        assert not hanging.done()
        hanging.cancel()
        await asyncio.wait([hanging])
        assert (await asyncio.gather(*(pool.redact(HARMLESS) for _ in range(3))))[2].pictures == 1
        assert pool.restarts == 1


async def test_pool_refuses_every_payload_without_a_model(options):
    async with RedactionPool(replace(options, factory="detectors:missing"), 2) as pool:
        assert not pool.ready
        assert pool.error == "redaction.model"
        assert await refusal(pool, HARMLESS) == "redaction.model"
