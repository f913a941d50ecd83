"""From a checkpoint to what the agent loads: calibration, float and int8 ONNX, manifest with thresholds."""

# torch is read as if it were absent (pyproject.toml).
# mypy: disable-error-code="misc, no-any-return"

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from agent.pictures.formats import Colour
from agent.redaction.detector import converted, frame_of, prepared
from agent.redaction.manifest import FORMAT, Input, Layout
from tools.training.dataset import CLASSES
from tools.training.export import Range, float_model, int8_model
from tools.training.layers import INPUT, MIDDLE, Conv, Merge, Sum
from tools.training.network import Network, folded
from tools.training.plan import STRIDES, VALUES_PER_CLASS
from tools.training.rounding import moments

TAIL = 1e-4  # share of a tensor's values beyond its calibrated range on each side
SAMPLE = 20_000  # values kept of a tensor and picture for the percentiles
PATCHES = 2_000  # of a picture, for the moments of what the picture's convolutions see

GIVEN = Input(name=INPUT, colour="YCbCr", long_side=1280, upscale=1.0)
TAUGHT = msgspec.structs.replace(GIVEN, colour="RGB")


@dataclass(frozen=True, slots=True, kw_only=True)
class Shipped:
    """The two files' bytes."""

    real: bytes
    int8: bytes


def calibrated(network: Network, pictures: Iterable[NDArray[np.uint8]], given: Input = TAUGHT) -> dict[str, Range]:
    """Each tensor's range over pictures (H, W, 3) RGB, prepared as they are in training, cut at TAIL."""
    names = [layer.name for layer in network.layers if isinstance(layer, Conv | Merge | Sum)]
    samples: dict[str, list[NDArray[np.float32]]] = {name: [] for name in names}
    rng = np.random.default_rng(0)
    for picture in pictures:
        batch = torch.from_numpy(prepared(picture, frame_of(picture.shape[1], picture.shape[0], given), given))
        with torch.no_grad():
            tensors = network.tensors(batch.permute(0, 3, 1, 2).float() / 255)
        for name in names:
            values = tensors[name].numpy().ravel()
            samples[name].append(values[rng.integers(0, len(values), min(SAMPLE, len(values)))])
    return {name: _range(np.concatenate(parts)) for name, parts in samples.items()}


def together(network: Network, pictures: Iterable[NDArray[np.uint8]]) -> dict[int, NDArray[np.float64]]:
    """Moments of what the convolutions of the picture see, by the side of their kernels.

    `pictures` (H, W, 3) RGB are prepared as by the agent.
    """
    sides = {layer.kernel for layer in network.layers if isinstance(layer, Conv) and layer.source == INPUT}
    patches: dict[int, list[NDArray[np.float64]]] = {side: [] for side in sides}
    rng = np.random.default_rng(0)
    for picture in pictures:
        ycc = converted(picture, Colour.RGB, Colour.YCC)
        batch = prepared(ycc, frame_of(picture.shape[1], picture.shape[0], GIVEN), GIVEN)
        for side, kept in patches.items():
            seen = np.lib.stride_tricks.sliding_window_view(batch[0], (side, side), axis=(0, 1))
            rows, columns = (rng.integers(0, size, PATCHES) for size in seen.shape[:2])
            kept.append((seen[rows, columns].reshape(PATCHES, -1).astype(np.float64) - MIDDLE) / 255)
    return {side: moments(np.concatenate(kept)) for side, kept in patches.items()}


def _range(values: NDArray[np.float32]) -> Range:
    low, high = np.quantile(values, [TAIL, 1 - TAIL])
    return Range(low=float(low), high=float(high))


def exported(network: Network, pictures: Sequence[NDArray[np.uint8]]) -> Shipped:
    """Float and int8 ONNX of an averaged network, the latter calibrated on pictures (H, W, 3) RGB."""
    weights = {name: (weight.numpy(), bias.numpy()) for name, (weight, bias) in folded(network).items()}
    values = network.shape.classes * VALUES_PER_CLASS
    return Shipped(
        real=float_model(network.layers, weights, values),
        int8=int8_model(network.layers, weights, calibrated(network, pictures), values, together(network, pictures)),
    )


def manifest_of(model: str, data: bytes, thresholds: Mapping[str, float], facts: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest of ONNX bytes; `facts` brings name, licence, training_data and measured."""
    return {
        "format": FORMAT,
        "model": model,
        "sha256": hashlib.sha256(data).hexdigest(),
        "input": {
            "name": GIVEN.name,
            "layout": GIVEN.layout,
            "colour": GIVEN.colour,
            "dtype": GIVEN.dtype,
            "long_side": GIVEN.long_side,
            "upscale": GIVEN.upscale,
            "multiple": max(STRIDES),
            "pad": GIVEN.pad,
        },
        "output": {"name": "cells", "layout": Layout.CELLS.value, "strides": list(STRIDES), "suppression": 0.5},
        "classes": list(CLASSES),
        "thresholds": dict(thresholds),
        **facts,
    }


def write(folder: Path, name: str, data: bytes, thresholds: Mapping[str, float], facts: Mapping[str, Any]) -> Path:
    """Write `name.onnx` and `name.json`; the path of the manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.onnx").write_bytes(data)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(manifest_of(f"{name}.onnx", data, thresholds, facts), indent=2) + "\n")
    return path
