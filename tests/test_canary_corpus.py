"""Each vector of the corpus hides a secret in one place; none may be found in what leaves, whatever became of it."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from canary import Vector, find_mark, leaks
from corpus import vectors

from agent.errors import RefusedError
from agent.payloads.inspection import InspectionLimits
from agent.pictures.formats import RedactionOptions
from agent.redaction.redaction import redact_payload
from agent.redaction.worker import RedactionWorker, WorkerOptions

VECTORS = vectors()
LIMITS, OPTIONS = InspectionLimits(), RedactionOptions()


def named(vector: Vector) -> str:
    return vector.name


def fate_of(vector: Vector) -> tuple[str, bytes]:
    """What became of the vector, and every byte that left or was said about it."""
    try:
        done = redact_payload(vector.payload, find_mark, OPTIONS, LIMITS)
    except RefusedError as error:
        return error.reason, str(error).encode()
    return "redacted" if done.pictures else "unseen", done.payload


def test_corpus_has_at_least_forty_vectors_of_distinct_names():
    assert len({vector.name for vector in VECTORS}) == len(VECTORS) >= 40


@pytest.mark.parametrize("vector", [v for v in VECTORS if v.fate == "redacted"], ids=named)
def test_search_finds_the_secret_before_redaction(vector):
    assert leaks(vector, vector.payload)


@pytest.mark.usefixtures("codec")
@pytest.mark.parametrize("vector", VECTORS, ids=named)
def test_no_secret_leaves(vector):
    fate, said = fate_of(vector)
    assert (fate, leaks(vector, said)) == (vector.fate, [])


async def test_no_secret_leaves_the_worker_process_nor_stands_in_a_log(tmp_path, caplog, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
    caplog.set_level(0)
    options = WorkerOptions(manifest=tmp_path, factory="detectors:marks")
    fates = {}
    async with RedactionWorker(options) as worker:
        for vector in VECTORS:
            try:
                done = await worker.redact(vector.payload)
                said, fates[vector.name] = done.payload, "redacted"
            except RefusedError as error:
                said, fates[vector.name] = str(error).encode(), error.reason
            assert not leaks(vector, said + caplog.text.encode()), vector.name
        assert worker.restarts == 0
    assert fates == {vector.name: vector.fate for vector in VECTORS}


@pytest.mark.skipif(
    importlib.util.find_spec("deface") is None, reason="deface is not installed; see the README's table"
)
def test_deface_lets_a_thumbnail_pass_with_its_metadata_option_that_stays_here(tmp_path):
    made, leaked = deface_leaks(tmp_path, sys.executable, keep=True)
    assert "jpeg-exif-thumbnail" in made & leaked
    assert not leaked & {vector.name for vector in VECTORS if leaks(vector, fate_of(vector)[1])}


def deface_leaks(folder, python, *, keep: bool) -> tuple[set[str], set[str]]:
    """The picture vectors of which `deface` makes a picture, and those whose hidden secret it lets pass.

    The visible mark is left out of account: it is no face.
    """
    made, leaked = set(), set()
    for vector in (v for v in VECTORS if v.picture and v.needles):
        suffix = vector.name.split("-")[0].replace("jpeg", "jpg")
        source, target = folder / f"in.{suffix}", folder / f"out.{suffix}"
        source.write_bytes(vector.payload)
        target.unlink(missing_ok=True)
        command = [python, "-m", "deface.deface", str(source), "-o", str(target), *(["-m"] if keep else [])]
        subprocess.run(command, check=False, capture_output=True, timeout=60)
        if target.exists():
            made.add(vector.name)
            if "bytes" in leaks(vector, target.read_bytes()):
                leaked.add(vector.name)
    return made, leaked
