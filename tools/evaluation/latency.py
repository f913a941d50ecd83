"""How long one pass takes, next to CenterFace, in the same run: alternating, medians, one thread each."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from agent.redaction.manifest import Input, read_manifest
from tools.evaluation.baselines import dynamic_centerface, session_of

WIDTH, HEIGHT = 1280, 736  # pixels


def passes(manifest: Path, centerface: Path) -> dict[str, Callable[[], object]]:
    """One 1280x736 pass of ours and of CenterFace, as its package runs it and with its weights folded."""
    described = read_manifest(manifest)
    ours = session_of((manifest.parent / described.model).read_bytes())
    theirs = session_of(dynamic_centerface(centerface))
    folded = session_of(dynamic_centerface(centerface, folded=True))
    picture = np.random.default_rng(0).integers(0, 256, (1, HEIGHT, WIDTH, 3), np.uint8)
    given = _batch(picture, described.input)
    real = np.ascontiguousarray(picture.transpose(0, 3, 1, 2), np.float32)
    return {
        "ours": lambda: ours.run(None, {described.input.name: given}),
        "centerface": lambda: theirs.run(None, {"input.1": real}),
        "centerface-folded": lambda: folded.run(None, {"input.1": real}),
    }


def _batch(picture: np.ndarray, given: Input) -> np.ndarray:
    batch = picture.transpose(0, 3, 1, 2) if given.layout == "NCHW" else picture
    if given.dtype == "float32":
        return np.ascontiguousarray(batch, np.float32) / np.float32(given.divide)
    return np.ascontiguousarray(batch)


def timed(runs: Mapping[str, Callable[[], object]], rounds: int = 15) -> dict[str, list[float]]:
    """Milliseconds of each, in turn, so that a busy machine is busy for all; one round before is not counted."""
    spent: dict[str, list[float]] = {name: [] for name in runs}
    for step in range(rounds + 1):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            if step:
                spent[name].append(1000 * (time.perf_counter() - started))
    return spent


def medians(spent: Mapping[str, list[float]]) -> dict[str, float]:
    """The median milliseconds of each."""
    return {name: round(statistics.median(values), 2) for name, values in spent.items()}
