import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from canary import saved
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from agent.errors import ModelError, RefusedError
from agent.pictures.formats import Colour, PictureLimits, RedactionOptions, View
from agent.redaction.detector import Detector, frame_of, prepared
from agent.redaction.geometry import far_windows
from agent.redaction.manifest import Input, read_manifest
from agent.redaction.redaction import redact_picture
from tools.training.plates import STYLES, flat_plate

CLASSES = ["person", "face", "plate"]


def model_bytes(nodes, constants, *, output=(1, "n", "v"), given=(1, "h", "w", 3), kind=TensorProto.UINT8):
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("picture", kind, list(given))],
        [helper.make_tensor_value_info("cells", TensorProto.FLOAT, list(output))],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    return model.SerializeToString()


def constant_model(value):
    """Whatever the picture, this output: (1, N, V)."""
    nodes = [
        helper.make_node("Cast", ["picture"], ["real"], to=TensorProto.FLOAT),
        helper.make_node("ReduceSum", ["real"], ["sum"], keepdims=0),
        helper.make_node("Mul", ["sum", "nothing"], ["zero"]),
        helper.make_node("Add", ["value", "zero"], ["cells"]),
    ]
    constants = {"value": np.asarray(value, np.float32), "nothing": np.float32(0)}
    return model_bytes(nodes, constants, output=np.shape(value))


def mean_model(channels=(0, 1, 2), less=100):
    """One stride-32 cell layer: person's logit is a cell's mean over channels, less this; sides lie one stride away."""
    weight = np.zeros((15, 3, 32, 32), np.float32)
    weight[0, channels] = 1 / (len(channels) * 32 * 32)
    bias = np.full(15, 0, np.float32)
    bias[:3] = (-less, -50, -50)
    nodes = [
        helper.make_node("Transpose", ["picture"], ["planes"], perm=[0, 3, 1, 2]),
        helper.make_node("Cast", ["planes"], ["real"], to=TensorProto.FLOAT),
        helper.make_node("Conv", ["real", "w", "b"], ["map"], kernel_shape=[32, 32], strides=[32, 32]),
        helper.make_node("Reshape", ["map", "flat"], ["rows"]),
        helper.make_node("Transpose", ["rows"], ["cells"], perm=[0, 2, 1]),
    ]
    return model_bytes(nodes, {"w": weight, "b": bias, "flat": np.array([1, 15, -1], np.int64)})


def manifest_for(folder, data, **changes):
    content = {
        "format": 1,
        "model": "tiny.onnx",
        "sha256": hashlib.sha256(data).hexdigest(),
        "input": {"name": "picture", "long_side": 256},
        "output": {"name": "cells", "layout": "cells", "strides": [32]},
        "classes": CLASSES,
        "thresholds": {"person": 0.5, "face": 0.5, "plate": 0.5},
    }
    content.update(changes)
    (folder / "tiny.onnx").write_bytes(data)
    path = folder / "tiny.json"
    path.write_text(json.dumps(content))
    return path


def picture(height=128, width=256):
    return np.zeros((height, width, 3), np.uint8)


def test_bright_cell_is_found_where_it_is(tmp_path):
    detector = Detector.open(manifest_for(tmp_path, mean_model()))
    scene = picture()
    scene[32:64, 96:128] = 255
    (box,) = detector.detect(scene, Colour.RGB)
    assert (box.label, box.x1, box.y1, box.x2, box.y2) == ("person", 80, 16, 144, 80)
    assert 0.99 < box.score <= 1


def test_boxes_are_in_the_picture_s_own_pixels_when_the_input_is_smaller(tmp_path):
    detector = Detector.open(manifest_for(tmp_path, mean_model()))
    scene = picture(256, 512)
    scene[64:128, 192:256] = 255
    (box,) = detector.detect(scene, Colour.RGB)
    assert (box.x1, box.y1, box.x2, box.y2) == (160, 32, 288, 160)


def test_box_at_the_edge_is_clipped_to_the_picture(tmp_path):
    detector = Detector.open(manifest_for(tmp_path, mean_model()))
    scene = picture()
    scene[96:128, 224:256] = 255
    (box,) = detector.detect(scene, Colour.RGB)
    assert (box.x2, box.y2) == (256, 128)


def test_nothing_in_the_picture_gives_no_box(tmp_path):
    assert Detector.open(manifest_for(tmp_path, mean_model())).detect(picture(), Colour.RGB) == []


@pytest.mark.parametrize("size", [(1, 1), (1, 900), (33, 31), (2000, 3)])
def test_pictures_of_any_shape_are_taken(tmp_path, size):
    Detector.open(manifest_for(tmp_path, mean_model())).detect(np.full((*size, 3), 255, np.uint8), Colour.RGB)


def test_same_picture_gives_the_same_boxes_whatever_the_threads(tmp_path):
    path = manifest_for(tmp_path, mean_model())
    scene = np.random.default_rng(1).integers(0, 256, (200, 300, 3), np.uint8)
    low = {"person": 0.01}
    results = [Detector.open(path, threads=threads).detect(scene, Colour.RGB, low) for threads in (1, 2, 1)]
    assert results[0] == results[1] == results[2]


def test_threshold_of_a_class_decides_what_is_a_box(tmp_path):
    path = manifest_for(tmp_path, mean_model(), thresholds={"person": 0.999999, "face": 0.5, "plate": 0.5})
    scene = picture()
    scene[32:64, 96:128] = 102
    detector = Detector.open(path)
    assert detector.detect(scene, Colour.RGB) == []
    assert len(detector.detect(scene, Colour.RGB, {"person": 0.6})) == 1


def test_digest_is_the_hash_of_the_file(tmp_path):
    data = mean_model()
    assert Detector.open(manifest_for(tmp_path, data)).digest == hashlib.sha256(data).hexdigest()


def test_altered_model_is_refused_before_it_is_loaded(tmp_path, monkeypatch):
    path = manifest_for(tmp_path, mean_model())
    data = bytearray((tmp_path / "tiny.onnx").read_bytes())
    data[-1] ^= 1
    (tmp_path / "tiny.onnx").write_bytes(data)
    monkeypatch.setattr("onnxruntime.InferenceSession", lambda *_, **__: pytest.fail("the bytes were loaded"))
    with pytest.raises(ModelError, match="not the one of the manifest"):
        Detector.open(path)


def test_contents_that_were_accepted_before_are_used_whatever_the_files_have_become(tmp_path):
    data = mean_model()
    path = manifest_for(tmp_path, data)
    manifest = path.read_bytes()
    path.write_text("{}")
    assert Detector.open(path, contents=(manifest, b"")).digest == hashlib.sha256(data).hexdigest()
    (tmp_path / "tiny.onnx").unlink()
    assert Detector.open(path, contents=(manifest, data)).digest == hashlib.sha256(data).hexdigest()
    with pytest.raises(ModelError, match="not the one of the manifest"):
        Detector.open(path, contents=(manifest, data + b"x"))
    with pytest.raises(ModelError, match="cannot be read"):
        Detector.open(path, contents=(manifest, b""))


def test_missing_model_is_refused(tmp_path):
    path = manifest_for(tmp_path, mean_model())
    (tmp_path / "tiny.onnx").unlink()
    with pytest.raises(ModelError, match=r"tiny.onnx: the model cannot be read"):
        Detector.open(path)


def test_oversized_model_is_refused_unread(tmp_path, monkeypatch):
    monkeypatch.setattr("agent.redaction.manifest.LARGEST_MODEL", 10)
    with pytest.raises(ModelError, match="larger than 10 bytes"):
        Detector.open(manifest_for(tmp_path, mean_model()))


def test_bytes_that_are_no_model_are_refused_even_with_the_right_hash(tmp_path):
    with pytest.raises(ModelError, match="onnxruntime cannot load it"):
        Detector.open(manifest_for(tmp_path, b"no model"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input": {"name": "image"}}, "no input 'image'"),
        ({"input": {"name": "picture", "dtype": "float32"}}, "wanted tensor\\(float\\)"),
        ({"output": {"name": "boxes", "layout": "cells", "strides": [32]}}, "no output 'boxes'"),
    ],
)
def test_model_whose_ends_are_not_the_manifest_s_is_refused(tmp_path, change, message):
    with pytest.raises(ModelError, match=message):
        Detector.open(manifest_for(tmp_path, mean_model(), **change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "format is 2"),
        ({"model": "../tiny.onnx"}, "plain file name"),
        ({"sha256": "12"}, "64 small hexadecimal"),
        ({"classes": ["person", "dog", "plate"]}, "dog"),
        ({"classes": [None, None, None]}, "nothing that could be masked"),
        ({"thresholds": {"person": 0.5}}, "different labels"),
        ({"thresholds": {"person": 1.5, "face": 0.5, "plate": 0.5}}, "between 0 and 1"),
        ({"surprise": 1}, "surprise"),
        ({"input": {"name": "picture", "layout": "HWC"}}, "HWC"),
        ({"input": {"name": "picture", "colour": "YUV"}}, "YUV"),
        ({"input": {"name": "picture", "dtype": "int4"}}, "int4"),
        ({"input": {"name": "picture", "long_side": 0}}, "between 1 and 8192"),
        ({"input": {"name": "picture", "upscale": 9}}, "upscale"),
        ({"input": {"name": "picture", "divide": 0}}, "divide"),
        ({"input": {"name": "picture", "pad": 300}}, "pad"),
        ({"output": {"name": "cells", "layout": "cells"}}, "strides is needed"),
        ({"output": {"name": "cells", "layout": "cells", "strides": [0]}}, "above 0"),
        ({"output": {"name": "cells", "layout": "cells", "strides": [8], "suppression": 0}}, "suppression"),
        ({"output": {"name": "cells", "layout": "grid"}}, "grid"),
    ],
)
def test_manifest_s_mistake_is_named(tmp_path, change, message):
    with pytest.raises(ModelError, match=message):
        read_manifest(manifest_for(tmp_path, b"", **change))


def test_manifest_that_is_missing_or_no_json_is_refused(tmp_path):
    with pytest.raises(ModelError, match="cannot be read"):
        read_manifest(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ModelError, match="not valid"):
        read_manifest(tmp_path / "bad.json")


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_output_that_is_not_finite_is_no_result(tmp_path, number):
    value = np.zeros((1, 8, 15), np.float32)
    value[0, 3, 7] = number
    detector = Detector.open(manifest_for(tmp_path, constant_model(value)))
    with pytest.raises(ModelError, match="not finite"):
        detector.detect(picture(64, 128), Colour.RGB)


@pytest.mark.parametrize("shape", [(1, 7, 15), (1, 8, 14), (2, 8, 15)])
def test_output_of_the_wrong_shape_is_no_result(tmp_path, shape):
    detector = Detector.open(manifest_for(tmp_path, constant_model(np.zeros(shape))))
    with pytest.raises(ModelError, match="shape"):
        detector.detect(picture(64, 128), Colour.RGB)


def test_failure_inside_the_session_is_a_model_error(tmp_path):
    fixed = model_bytes(
        [
            helper.make_node("Cast", ["picture"], ["real"], to=TensorProto.FLOAT),
            helper.make_node("Reshape", ["real", "shape"], ["cells"]),
        ],
        {"shape": np.array([1, 7, 11], np.int64)},
    )
    detector = Detector.open(manifest_for(tmp_path, fixed))
    with pytest.raises(ModelError, match="onnxruntime failed"):
        detector.detect(picture(), Colour.RGB)


@pytest.mark.parametrize("bad", [np.zeros((4, 4)), np.zeros((4, 4, 3)), np.zeros((4, 4, 4), np.uint8)])
def test_what_is_no_rgb_picture_is_the_caller_s_mistake(tmp_path, bad):
    with pytest.raises(ValueError, match="uint8"):
        Detector.open(manifest_for(tmp_path, mean_model())).detect(bad, Colour.RGB)


CORNERS = np.zeros((1, 2, 7), np.float32)
CORNERS[0, 0] = (8, 8, 24, 40, 0.1, 0.9, 0.2)
CORNERS[0, 1] = (9, 8, 24, 40, 0.1, 0.8, 0.2)


def test_foreign_detector_with_corner_boxes_can_be_brought(tmp_path):
    path = manifest_for(tmp_path, constant_model(CORNERS), output={"name": "cells", "layout": "corners"})
    (box,) = Detector.open(path).detect(picture(64, 64), Colour.RGB)
    assert (box.label, box.x1, box.y1, box.x2, box.y2) == ("face", 8, 8, 24, 40)
    assert box.score == pytest.approx(0.9)


def test_foreign_detector_with_centres_in_columns_and_a_class_of_no_use_can_be_brought(tmp_path):
    rows = np.array([[16, 24, 16, 32, 0.9, 0.95], [50, 50, 4, 4, 0.1, 0.9]], np.float32)
    path = manifest_for(
        tmp_path,
        constant_model(rows.T[None]),
        output={"name": "cells", "layout": "centres"},
        classes=[None, "plate"],
        thresholds={"plate": 0.92},
    )
    (box,) = Detector.open(path).detect(picture(64, 64), Colour.RGB)
    assert (box.label, box.x1, box.y1, box.x2, box.y2) == ("plate", 8, 8, 24, 40)


def test_two_classes_of_one_label_are_both_found(tmp_path):
    rows = np.array([[2, 2, 20, 40, 0.9, 0, 0], [30, 2, 50, 40, 0, 0.8, 0], [5, 50, 15, 55, 0, 0, 0.9]], np.float32)
    path = manifest_for(
        tmp_path,
        constant_model(rows[None]),
        output={"name": "cells", "layout": "corners"},
        classes=["person", "person", "plate"],  # pedestrian and rider
        thresholds={"person": 0.5, "plate": 0.5},
    )
    found = Detector.open(path).detect(picture(64, 64), Colour.RGB)
    assert [(box.label, box.x1) for box in found] == [("person", 2), ("person", 30), ("plate", 5)]


def test_foreign_detector_whose_scores_are_no_shares_is_no_result(tmp_path):
    path = manifest_for(tmp_path, constant_model(CORNERS * 3), output={"name": "cells", "layout": "corners"})
    with pytest.raises(ModelError, match=r"outside 0..1"):
        Detector.open(path).detect(picture(64, 64), Colour.RGB)


@pytest.mark.parametrize(
    ("layout", "rows", "message"),
    [
        ("corners", [[2, 2, 20, 20, 0.9], [40, 30, 16, 50, 0.9]], "inside out"),  # width and height for a corner
        ("corners", [[30, 40, 50, 20, 0.9]], "inside out"),
        ("centres", [[30, 30, -8, 8, 0.9]], "inside out"),
        ("corners", [[0.1, 0.1, 0.6, 0.9, 0.9], [-0.02, 0.4, 0.2, 1.01, 0.6]], "shares of 1"),
        ("centres", [[0.5, 0.5, 0.4, 0.8, 0.9]], "shares of 1"),
    ],
)
def test_boxes_that_are_none_or_in_another_unit_refuse_the_picture(tmp_path, layout, rows, message):
    value = np.array(rows, np.float32)
    path = manifest_for(
        tmp_path,
        constant_model((value.T if layout == "centres" else value)[None]),
        output={"name": "cells", "layout": layout},
        classes=["person"],
        thresholds={"person": 0.5},
    )
    detector = Detector.open(path)
    with pytest.raises(ModelError, match=message):
        detector.detect(picture(64, 64), Colour.RGB)
    data = saved(picture(64, 64), "PNG")
    with pytest.raises(RefusedError, match=message) as refusal:
        redact_picture(data, detector.detect, RedactionOptions(), PictureLimits(), detector.wanted)
    assert refusal.value.reason == "redaction.model"


def test_rows_below_the_threshold_and_small_boxes_beside_large_ones_are_no_reason_to_refuse(tmp_path):
    value = np.array([[40, 40, 16, 20, 0.4], [0, 0, 1, 1, 0.9], [8, 8, 24, 40, 0.9]], np.float32)
    path = manifest_for(
        tmp_path,
        constant_model(value[None]),
        output={"name": "cells", "layout": "corners"},
        classes=["person"],
        thresholds={"person": 0.5},
    )
    found = Detector.open(path).detect(picture(64, 64), Colour.RGB)
    assert [(box.x1, box.x2) for box in found] == [(0, 1), (8, 24)]


def test_planes_first_blue_first_and_shares_of_one_are_prepared_as_the_manifest_says():
    given = Input(name="x", layout="NCHW", colour="BGR", dtype="float32", divide=255, long_side=64, pad=0)
    scene = picture(20, 30)
    scene[..., 0] = 255
    batch = prepared(scene, frame_of(30, 20, given), given)
    assert (batch.shape, batch.dtype) == ((1, 3, 32, 32), np.float32)
    assert batch[0, 2, :20, :30].min() == 1
    assert batch[0, :2].max() == 0
    assert batch[0, 2, 20:].max() == 0


YCC_INPUT = {"name": "picture", "long_side": 256, "colour": "YCbCr"}


@pytest.mark.parametrize(("colour", "wanted"), [("RGB", Colour.RGB), ("BGR", Colour.RGB), ("YCbCr", Colour.YCC)])
@pytest.mark.parametrize("far", [False, True])
def test_detector_says_in_which_size_and_colours_it_wants_a_picture(tmp_path, colour, wanted, far):
    path = manifest_for(tmp_path, mean_model(), input={**YCC_INPUT, "colour": colour})
    width, height = (512, 128) if far else (256, 64)
    assert Detector.open(path, far=far).wanted(512, 128) == View(width=width, height=height, colour=wanted)


@pytest.mark.parametrize("far", [False, True])
def test_picture_of_either_colours_is_shown_to_a_network_in_its_own(tmp_path, far):
    rgb = np.full((128, 512, 3), (20, 30, 30), np.uint8)
    rgb[:64, 192:256] = (250, 20, 20)
    ycc = np.asarray(Image.fromarray(rgb).convert("YCbCr"))
    for channel, given in ((0, {**YCC_INPUT, "colour": "RGB"}), (2, YCC_INPUT)):
        detector = Detector.open(manifest_for(tmp_path, mean_model([channel], 180), input=given), far=far)
        found = detector.detect(rgb, Colour.RGB)
        assert found == detector.detect(ycc, Colour.YCC)
        assert len(found) == 1 or far
        assert {(box.label, box.y1) for box in found} == {("person", 0)}


@pytest.mark.parametrize("colour", [Colour.GREY, Colour.CMYK])
def test_colours_that_no_network_knows_are_the_caller_s_mistake(tmp_path, colour):
    with pytest.raises(ValueError, match="RGB or YCC"):
        Detector.open(manifest_for(tmp_path, mean_model())).detect(picture(), colour)


def test_space_around_a_ycbcr_picture_is_grey():
    given = Input(name="x", colour="YCbCr", fixed=(64, 96), pad=7)
    batch = prepared(np.full((50, 100, 3), 200, np.uint8), frame_of(100, 50, given), given)
    assert (batch[0, :32] == 200).all()
    assert (batch[0, 32:] == (7, 128, 128)).all()


def test_fixed_input_keeps_its_size_and_its_padding():
    given = Input(name="x", fixed=(64, 96), pad=7)
    batch = prepared(np.full((50, 100, 3), 200, np.uint8), frame_of(100, 50, given), given)
    assert batch.shape == (1, 96, 64, 3)
    assert (batch[0, :32] == 200).all()
    assert (batch[0, 32:] == 7).all()


FAR_ONLY = {"classes": ["plate", None, None], "thresholds": {"plate": 0.9}}


def far_scene():
    """A picture of which FAR_ONLY sees the white square, whose corner is given too, in full resolution only."""
    scene = picture(512, 1024)
    window = far_windows(1024, 512, 256)[2]
    x, y = window.x1 + 96, window.y1 + 96
    scene[y : y + 32, x : x + 32] = 255
    return scene, (x, y)


def test_far_plate_that_the_small_input_loses_is_found_in_the_second_pass(tmp_path):
    path = manifest_for(tmp_path, mean_model(), **FAR_ONLY)
    scene, (x, y) = far_scene()
    assert Detector.open(path).detect(scene, Colour.RGB) == []
    (box,) = Detector.open(path, far=True).detect(scene, Colour.RGB)
    assert (box.x1, box.y1, box.x2, box.y2) == pytest.approx((x - 16, y - 16, x + 48, y + 48), abs=2)


def test_object_that_a_window_cuts_is_not_taken_from_the_second_pass(tmp_path):
    path = manifest_for(tmp_path, mean_model(), thresholds={"person": 0.9, "face": 0.5, "plate": 0.5})
    scene = picture(512, 1024)
    top = far_windows(1024, 512, 256)[0].y1
    scene[top : top + 32, 256:288] = 255
    assert Detector.open(path, far=True).detect(scene, Colour.RGB) == []


def test_second_pass_changes_nothing_where_the_picture_fits_the_input(tmp_path):
    path = manifest_for(tmp_path, mean_model())
    scene = np.random.default_rng(1).integers(0, 256, (200, 256, 3), np.uint8)
    assert Detector.open(path, far=True).detect(scene, Colour.RGB) == Detector.open(path).detect(scene, Colour.RGB)


SHIPPED = Path(__file__).parents[1] / "models" / "detector.json"


def test_shipped_detector_is_the_one_of_its_manifest_and_small_and_says_what_it_was_measured_at():
    detector = Detector.open(SHIPPED)
    assert (SHIPPED.parent / detector.manifest.model).stat().st_size <= 2 * 2**20
    assert set(detector.manifest.thresholds) == set(CLASSES)
    for label, threshold in detector.manifest.thresholds.items():
        measured = detector.manifest.measured[label]
        assert {"detection", "false", "curve"} <= measured.keys()
        assert 0.05 <= threshold < 0.9
    assert any("tud_street" in line and "unstated" in line for line in detector.manifest.training_data)


def test_shipped_detector_gives_the_same_boxes_whatever_the_threads():
    scene = np.random.default_rng(3).integers(0, 256, (180, 320, 3), np.uint8)
    low = dict.fromkeys(CLASSES, 0.02)
    one, two = (Detector.open(SHIPPED, threads=threads).detect(scene, Colour.RGB, low) for threads in (1, 2))
    assert one == two
    assert one


def test_shipped_detector_finds_a_plate_on_a_car_s_back():
    scene = np.full((240, 320, 3), (60, 70, 80), np.uint8)
    scene[40:220, 60:260] = (120, 20, 20)
    plate = np.asarray(flat_plate(next(style for style in STYLES if style.name == "eu"), np.random.default_rng(5)))
    small = np.asarray(Image.fromarray(plate).resize((95, 20), Image.Resampling.BILINEAR))
    scene[150:170, 112:207] = small
    boxes = [box for box in Detector.open(SHIPPED).detect(scene, Colour.RGB) if box.label == "plate"]
    assert any(box.x1 < 125 and box.x2 > 195 and box.y1 < 155 and box.y2 > 165 for box in boxes)
