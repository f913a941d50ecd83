"""The manifest that stands beside a detector's ONNX file: what the file is, what goes in, what comes out.

A manifest names the file's SHA-256, so that a detector is what its tables were measured on or is not used at all.
Unknown keys are mistakes. Anyone's detector can be brought by a manifest; its output must have one of `Layout`.
"""

from __future__ import annotations

import hashlib
import re
from enum import StrEnum
from pathlib import Path, PurePath

import msgspec

from agent.errors import ModelError

FORMAT = 1
LARGEST_MODEL = 64 * 2**20  # bytes
LABELS = frozenset({"person", "face", "plate"})
COLOURS = frozenset({"RGB", "BGR", "YCbCr"})  # the last as JFIF (ITU-T T.871) has it: all of 0..255, chroma from 128
SHA256 = re.compile(r"[0-9a-f]{64}")


class Layout(StrEnum):
    """How one output row tells of one possible object."""

    CELLS = "cells"  # (1, N, C*5): C logits, then for each class log distances l t r b in strides; N by rising stride
    CORNERS = "corners"  # (1, N, 4+C): x1 y1 x2 y2 in input pixels, C scores in 0..1
    CENTRES = "centres"  # (1, 4+C, N): centre x, y, width, height in input pixels, C scores in 0..1


class Input(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a picture is handed over. Without `fixed` the size follows the picture, in multiples of `multiple`.

    `pad` is the grey around it; in YCbCr that is its luma.
    """

    name: str
    layout: str = "NHWC"
    colour: str = "RGB"
    dtype: str = "uint8"
    divide: float = 1.0
    long_side: int = 1280
    upscale: float = 1.0
    multiple: int = 32
    pad: int = 114
    fixed: tuple[int, int] | None = None


class Output(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What comes back; `strides` only for `cells`, `suppression` is the overlap above which the worse box falls."""

    name: str
    layout: Layout
    strides: tuple[int, ...] = ()
    suppression: float = 0.5


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All of it. `classes` names the output's classes in order, null for one that the agent has no use for."""

    format: int
    model: str
    sha256: str
    input: Input
    output: Output
    classes: tuple[str | None, ...]
    thresholds: dict[str, float]
    name: str = ""
    licence: str = ""
    training_data: tuple[str, ...] = ()
    measured: dict[str, object] = msgspec.field(default_factory=dict)


def read_manifest(path: Path) -> Manifest:
    """The manifest of a file; ModelError says what is wrong with it."""
    try:
        return parse_manifest(path, path.read_bytes())
    except OSError as exc:
        message = f"{path}: the manifest cannot be read: {exc.strerror or exc}"
        raise ModelError(message) from exc


def parse_manifest(path: Path, data: bytes) -> Manifest:
    """The same for bytes that were read from this path before."""
    try:
        manifest = msgspec.json.decode(data, type=Manifest)
    except msgspec.DecodeError as exc:
        message = f"{path}: the manifest is not valid: {exc}"
        raise ModelError(message) from exc
    for wrong, reason in _mistakes(manifest):
        if wrong:
            message = f"{path}: the manifest is not valid: {reason}"
            raise ModelError(message)
    return manifest


def read_model(path: Path, manifest: Manifest) -> bytes:
    """The bytes of the model that stands beside its manifest at `path`, if they are the right ones; else ModelError."""
    file = path.parent / manifest.model
    try:
        if file.stat().st_size > LARGEST_MODEL:
            message = f"{file}: the model is larger than {LARGEST_MODEL} bytes"
            raise ModelError(message)
        data = file.read_bytes()
    except OSError as exc:
        message = f"{file}: the model cannot be read: {exc.strerror or exc}"
        raise ModelError(message) from exc
    check_model(path, manifest, data)
    return data


def check_model(path: Path, manifest: Manifest, data: bytes) -> None:
    """Raise ModelError unless these are the bytes that the manifest at `path` speaks of."""
    found = hashlib.sha256(data).hexdigest()
    if found != manifest.sha256:
        file = path.parent / manifest.model
        message = f"{file}: the model is not the one of the manifest: its SHA-256 is {found}, wanted {manifest.sha256}"
        raise ModelError(message)


def _mistakes(manifest: Manifest) -> list[tuple[bool, str]]:
    """(is it so, what it is) of everything that types alone do not tell."""
    named = {label for label in manifest.classes if label is not None}
    given, output = manifest.input, manifest.output
    sizes = (given.long_side, given.multiple, *(given.fixed or ()))
    return [
        (manifest.format != FORMAT, f"format is {manifest.format}, this agent reads {FORMAT}"),
        (PurePath(manifest.model).name != manifest.model, f"model {manifest.model!r} is not a plain file name"),
        (SHA256.fullmatch(manifest.sha256) is None, "sha256 is not 64 small hexadecimal digits"),
        (not named <= LABELS, f"classes are among {sorted(LABELS)}, found {sorted(named - LABELS)}"),
        (not named, "classes names nothing that could be masked"),
        (set(manifest.thresholds) != named, "thresholds and classes name different labels"),
        (any(not 0 < value < 1 for value in manifest.thresholds.values()), "a threshold lies between 0 and 1"),
        (given.layout not in {"NHWC", "NCHW"}, f"input.layout is NHWC or NCHW, found {given.layout!r}"),
        (given.colour not in COLOURS, f"input.colour is RGB, BGR or YCbCr, found {given.colour!r}"),
        (given.dtype not in {"uint8", "float32"}, f"input.dtype is uint8 or float32, found {given.dtype!r}"),
        (not all(0 < size <= 8192 for size in sizes), "an input size lies between 1 and 8192 pixels"),
        (not 0 < given.upscale <= 4, "input.upscale lies between 0 and 4"),
        (not given.divide > 0, "input.divide is above 0"),
        (not 0 <= given.pad <= 255, "input.pad lies between 0 and 255"),
        (not 0 < output.suppression <= 1, "output.suppression lies between 0 and 1"),
        (output.layout is Layout.CELLS and not output.strides, "output.strides is needed for cells"),
        (any(stride < 1 for stride in output.strides), "output.strides are above 0"),
    ]
