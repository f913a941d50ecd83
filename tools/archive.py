"""Thousands of recordings through the offline trial, over the cores of this machine or over a Dask cluster.

Only this process writes: workers read recordings and send results back. A result stands as long as the recording, the
policy and its borders, the agent's configuration, the expectations, the model, the part that is judged and the agent's
version are the same, by their digests; a recording that could not be judged is tried again.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import logging
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from agent import __version__
from agent.assembly import SHIPPED_BORDERS
from agent.redaction.manifest import read_manifest
from agent.settings.config import shipped_manifest
from tools import offline
from tools.archive_results import ArchiveError, Facts, Journal, Result, broken, result_of
from tools.expectations import Expectations
from tools.progress import progress
from tools.recording import contents
from tools.run_file import policy_digest
from tools.trial import Setting, prepared
from tools.verification import judged

AHEAD = 3  # recordings given out per worker thread: none waits for us, and cancelling forgets few
PATTERN = "*.mcap"
MISSING = "verify --archive needs: pip install 'residency-agent[archive]'"


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """How every recording is judged; the setting's recording and folder are filled in for each."""

    setting: Setting
    expected: Expectations
    facts: Facts


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """Where to judge: the address of a scheduler, else so many processes here; None: one per core."""

    scheduler: str = ""
    workers: int | None = None


def recordings_in(folder: Path) -> list[Path]:
    """Every recording below the folder, in the order of its path; raises ArchiveError where there is none."""
    found = sorted(folder.rglob(PATTERN))
    if not found:
        message = f"{folder}: no {PATTERN} in it"
        raise ArchiveError(message)
    return found


def job_of(setting: Setting, expected: Expectations) -> Job:
    """Name everything that a result depends on; raises OSError, ModelError for a manifest that cannot be read."""
    options = {name: getattr(setting.options, name) for name in ("start_s", "end_s", "without")}
    model, manifest = _model(setting.agent)
    borders = Path(setting.policy.get("borders", {}).get("geojson") or SHIPPED_BORDERS).read_bytes()
    parts = [setting.policy, setting.agent, expected, options, manifest, _digest(borders), __version__]
    facts = Facts(
        agent=__version__,
        policy=str(setting.policy["version"]),
        policy_sha256=policy_digest(setting.policy),
        expectations_sha256=_digest(msgspec.json.encode(expected)),
        model_sha256=model,
        job_sha256=_digest(msgspec.json.encode(parts)),
    )
    return Job(setting=setting, expected=expected, facts=facts)


def judge_archive(folder: Path, journal: Journal, job: Job, cluster: Cluster, *, quiet: bool) -> list[Result]:
    """Judge what has no result yet; results of all recordings, in the order of their paths.

    Every result is in the journal at once, so that an interrupted run loses only what was under way. Raises
    ArchiveError where the cluster is not there or is lost.
    """
    paths = recordings_in(folder)
    known = {one.sha256: one for one in journal.results if _stands(one, job)}
    done: dict[str, Result] = {}
    outcomes: Counter[str] = Counter()
    with _connected(cluster) as client, progress("judging", len(paths), quiet=quiet) as advance:
        for name, found in _judged(client, folder, paths, job, frozenset(known)):
            result = replace_name(known[found], name) if isinstance(found, str) else found
            if not isinstance(found, str):
                journal.add(result)
            done[name] = result
            outcomes[result.outcome] += 1
            advance(len(done), f"{outcomes['failed']} failed, {outcomes['broken']} broken")
    return [done[_name(path, folder)] for path in paths]


def examine(recording: Path, name: str, job: Job, standing: frozenset[str]) -> Result | str:
    """Judge one recording, in a worker process; its digest where a result stands. Raises nothing: it says why not."""
    begun, sha256 = time.monotonic(), ""
    try:
        with recording.open("rb") as stream:
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        if sha256 in standing:
            return sha256
        with tempfile.TemporaryDirectory(dir=_scratch()) as scratch, prepared(Path(scratch) / "run") as spool:
            setting = replace(job.setting, recording=recording, folder=Path(scratch) / "run", quiet=True)
            done = asyncio.run(judged(setting, job.expected, offline.conduct, spool))
        return result_of(name, sha256, job.facts, contents(recording), done)
    except Exception as exc:  # noqa: BLE001 - one recording must not stop the others, and its row says why
        return broken(name, sha256, job.facts, f"{type(exc).__name__}: {exc}", time.monotonic() - begun)


def _scratch() -> str | None:
    """The folder of this worker, which goes with its cluster even where it is killed."""
    from distributed import get_worker  # noqa: PLC0415 - an optional extra

    try:
        return str(get_worker().local_directory)
    except ValueError:  # not in a worker
        return None


def dask_setup(_worker: object) -> None:
    """What a worker of ours does first: leave Ctrl-C, which reaches the whole group, to the process that ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def replace_name(result: Result, name: str) -> Result:
    """The same result for a recording that was moved, or that is there twice."""
    return msgspec.structs.replace(result, recording=name)


def _judged(
    client: Any,  # noqa: ANN401 - distributed.Client, of an optional extra
    folder: Path,
    paths: Sequence[Path],
    job: Job,
    standing: frozenset[str],
) -> Iterator[tuple[str, Result | str]]:
    """Give the recordings out, a few ahead of the workers, and take the results as they come."""
    from distributed import as_completed  # noqa: PLC0415 - an optional extra

    shared = client.scatter([job, standing], broadcast=True)
    names: dict[str, str] = {}

    def given_out() -> Iterator[Any]:
        for number, path in enumerate(paths):
            key = f"examine-{job.facts.job_sha256[:8]}-{number}"
            names[key] = _name(path, folder)
            yield client.submit(examine, path.absolute(), names[key], *shared, key=key, pure=False)

    waiting = given_out()
    ahead = AHEAD * max(1, sum(client.nthreads().values()))
    running = as_completed(itertools.islice(waiting, ahead), loop=client.loop)
    for future in running:
        if future.cancelled():
            message = "the cluster was lost; the results so far stand"
            raise ArchiveError(message)
        name = names.pop(future.key)
        error = future.exception()
        yield name, broken(name, "", job.facts, f"the worker ended: {error}") if error else future.result()
        running.update(itertools.islice(waiting, 1))


@contextmanager
def _connected(cluster: Cluster) -> Iterator[Any]:
    """A client of the scheduler, or of processes of our own that end with it; raises ArchiveError."""
    try:
        from distributed import Client, LocalCluster  # noqa: PLC0415 - an optional extra
    except ImportError as exc:
        raise ArchiveError(MISSING) from exc
    if cluster.scheduler:
        try:
            client = Client(cluster.scheduler, set_as_default=False)
        except (OSError, ValueError, TimeoutError) as exc:
            message = f"--scheduler {cluster.scheduler}: {exc}"
            raise ArchiveError(message) from exc
        with client:
            yield client
        return
    with (
        tempfile.TemporaryDirectory(prefix="residency-archive-", ignore_cleanup_errors=True) as scratch,
        LocalCluster(
            n_workers=cluster.workers,
            threads_per_worker=1,  # Python code: a second thread in a process would only wait for the first
            dashboard_address=None,
            local_directory=scratch,
            preload=__name__,
            silence_logs=logging.CRITICAL,
        ) as local,
        Client(local, set_as_default=False) as client,
    ):
        yield client


def _stands(result: Result, job: Job) -> bool:
    return result.facts.job_sha256 == job.facts.job_sha256 and result.outcome != "broken"


def _name(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()


def _model(agent: Mapping[str, Any]) -> tuple[str, str]:
    """Digests of the detector that the configuration names and of its manifest; empty where the agent has none."""
    named = agent.get("model", {}).get("manifest")
    path = Path(named) if named else shipped_manifest()
    if not named and not path.exists():
        return "", ""
    return read_manifest(path).sha256, _digest(path.read_bytes())


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
