"""The detector: an ONNX file that is what its manifest says, or no detector at all.

Invariants: the bytes that run are the bytes whose SHA-256 was compared; every output is checked for shape and
finiteness before it is believed; whatever fails is a ModelError, and the picture is then refused by the caller.
The same picture gives the same boxes, whatever the number of threads.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from PIL import Image

from agent.errors import ModelError
from agent.messages import Box
from agent.pictures.formats import MODES, Colour, View
from agent.redaction.decoding import Candidates, candidates
from agent.redaction.geometry import Floats, Letterbox, Window, far_windows, fixed_letterbox, letterbox, suppress
from agent.redaction.manifest import Input, Manifest, check_model, parse_manifest, read_manifest, read_model

GREY = 128  # chroma without colour
ERRORS_ONLY = 3  # onnxruntime's severity: warnings about foreign models are no business of the car's log


@dataclass(frozen=True, slots=True, kw_only=True)
class Detector:
    """A verified session. `digest` is the SHA-256, in hexadecimal, of the ONNX bytes.

    `far`: a picture larger than the input is seen a second time, in full resolution where far plates are.
    """

    manifest: Manifest
    session: Any
    digest: str
    far: bool = False

    @staticmethod
    def open(
        manifest: Path, *, threads: int = 1, far: bool = False, contents: tuple[bytes, bytes] | None = None
    ) -> Detector:
        """The detector of a manifest; ModelError where file, hash, input or output is not what the manifest says.

        `contents`: of the manifest and, unless empty, of the model, which then are not read again.
        """
        described = read_manifest(manifest) if contents is None else parse_manifest(manifest, contents[0])
        if contents and contents[1]:
            data = contents[1]
            check_model(manifest, described, data)
        else:
            data = read_model(manifest, described)
        try:
            session = onnxruntime.InferenceSession(data, _options(threads), providers=["CPUExecutionProvider"])
        except Exception as exc:  # onnxruntime's own exceptions share no base of their own
            message = f"{described.model}: onnxruntime cannot load it: {exc}"
            raise ModelError(message) from exc
        _check_ends(session, described)
        return Detector(manifest=described, session=session, digest=described.sha256, far=far)

    def with_thresholds(self, thresholds: dict[str, float]) -> list[float]:
        """The thresholds in the order of the manifest's classes, those given here first."""
        merged = {**self.manifest.thresholds, **thresholds}
        return [1.0 if label is None else merged[label] for label in self.manifest.classes]

    @property
    def colour(self) -> Colour:
        """What the network's input holds; BGR is RGB in another order."""
        return Colour.YCC if self.manifest.input.colour == "YCbCr" else Colour.RGB

    def wanted(self, width: int, height: int) -> View:
        """How the network sees a picture of this width and height: shown so, `detect` has nothing to convert."""
        if self.far:
            return View(width=width, height=height, colour=self.colour)
        frame = frame_of(width, height, self.manifest.input)
        return View(width=frame.content_width, height=frame.content_height, colour=self.colour)

    def detect(
        self, picture: NDArray[np.uint8], colour: Colour, thresholds: dict[str, float] | None = None
    ) -> list[Box]:
        """Everything found in an upright (H, W, 3) picture, as boxes clipped to it, best first within each label.

        `colour` says what its samples are, RGB or YCC. `thresholds` replaces the manifest's, for measuring.
        """
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
            message = f"a picture is uint8 (H, W, 3), found {picture.dtype} {picture.shape}"
            raise ValueError(message)
        picture = converted(picture, colour, self.colour)
        limits = self.with_thresholds(thresholds or {})
        found = self._seen(picture, limits)
        for window in self._windows(picture.shape[1], picture.shape[0]):
            part = np.ascontiguousarray(picture[window.y1 : window.y2, window.x1 : window.x2])
            for label, own in self._seen(part, limits).items():
                found[label] = found[label].joined(own.whole_in(window).moved(window.x1, window.y1))
        return [box for item in found.values() for box in boxes_of(item, self.manifest.output.suppression)]

    def _windows(self, width: int, height: int) -> list[Window]:
        if not self.far or self.manifest.input.fixed is not None:
            return []
        return far_windows(width, height, self.manifest.input.long_side)

    def _seen(self, picture: NDArray[np.uint8], limits: list[float]) -> dict[str, Candidates]:
        """What one pass over a picture finds, by label, in the picture's pixels and clipped to it."""
        frame = frame_of(picture.shape[1], picture.shape[0], self.manifest.input)
        values = self._run(prepared(picture, frame, self.manifest.input))
        found: dict[str, Candidates] = {}
        for item in candidates(values, frame, self.manifest, limits):  # several of them may have one label
            own = replace(item, boxes=frame.to_picture(item.boxes))
            found[own.label] = found[own.label].joined(own) if own.label in found else own
        return found

    def _run(self, batch: NDArray[Any]) -> Floats:
        """The session's one output for one input, as it came."""
        try:
            results = self.session.run([self.manifest.output.name], {self.manifest.input.name: batch})
        except Exception as exc:  # as above
            message = f"{self.manifest.model}: onnxruntime failed: {exc}"
            raise ModelError(message) from exc
        value = results[0]
        if not isinstance(value, np.ndarray) or value.dtype != np.float32:
            message = f"{self.manifest.model}: the output is not a float32 array"
            raise ModelError(message)
        return value


def _options(threads: int) -> Any:  # noqa: ANN401 - onnxruntime brings no types
    """One session's limits: threads that sleep when idle, and no arena, which would keep its largest size for ever."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.enable_cpu_mem_arena = False
    options.log_severity_level = ERRORS_ONLY
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def _check_ends(session: Any, manifest: Manifest) -> None:  # noqa: ANN401 - as above
    """ModelError unless input and output of the session have the manifest's names, types and ranks."""
    kinds = {"uint8": "tensor(uint8)", "float32": "tensor(float)"}
    for place, ends, name, kind, rank in (
        ("input", session.get_inputs(), manifest.input.name, kinds[manifest.input.dtype], 4),
        ("output", session.get_outputs(), manifest.output.name, "tensor(float)", 3),
    ):
        end = next((end for end in ends if end.name == name), None)
        if end is None:
            message = f"{manifest.model}: it has no {place} {name!r}, only {[end.name for end in ends]}"
            raise ModelError(message)
        if end.type != kind or len(end.shape) != rank:
            message = f"{manifest.model}: {place} {name!r} is {end.type} {end.shape}, wanted {kind} of rank {rank}"
            raise ModelError(message)


def frame_of(width: int, height: int, given: Input) -> Letterbox:
    """Where a (width, height) picture lies in the detector's input."""
    if given.fixed is not None:
        return fixed_letterbox(width, height, input_width=given.fixed[0], input_height=given.fixed[1])
    return letterbox(width, height, long_side=given.long_side, upscale=given.upscale, multiple=given.multiple)


def converted(picture: NDArray[np.uint8], given: Colour, wanted: Colour) -> NDArray[np.uint8]:
    """RGB as JFIF's YCbCr or the other way round; the same array where that is what it is."""
    if given not in MODES:
        message = f"a picture's colours are RGB or YCC, found {given!r}"
        raise ValueError(message)
    if given is wanted:
        return picture
    return np.asarray(Image.fromarray(picture, MODES[given]).convert(MODES[wanted]))


def prepared(picture: NDArray[np.uint8], frame: Letterbox, given: Input) -> NDArray[Any]:
    """The batch of one that the session takes, of a picture in its colours (RGB where it takes BGR)."""
    size = (frame.content_width, frame.content_height)
    content: Any = picture
    if size != (frame.picture_width, frame.picture_height):
        content = Image.fromarray(picture).resize(size, Image.Resampling.BILINEAR)
    pad = (given.pad, GREY, GREY) if given.colour == "YCbCr" else given.pad
    batch = np.empty((1, frame.height, frame.width, 3), np.uint8)
    batch[0, : size[1], : size[0]] = content
    around = np.empty((frame.width, 3), np.uint8)
    around[:] = pad
    batch[0, size[1] :], batch[0, : size[1], size[0] :] = around, around[size[0] :]
    if given.colour == "BGR":
        batch = batch[..., ::-1]
    if given.layout == "NCHW":
        batch = batch.transpose(0, 3, 1, 2)
    if given.dtype == "float32":
        return np.ascontiguousarray(batch, np.float32) / np.float32(given.divide)
    return np.ascontiguousarray(batch)


def boxes_of(found: Candidates, limit: float) -> list[Box]:
    """The boxes that suppression leaves; what lay wholly outside the picture has no area and is no box."""
    kept = suppress(found.boxes, found.scores, limit)
    return [
        Box(label=found.label, score=float(score), x1=float(x1), y1=float(y1), x2=float(x2), y2=float(y2))
        for (x1, y1, x2, y2), score in zip(found.boxes[kept], found.scores[kept], strict=True)
        if x2 > x1 and y2 > y1
    ]
