import importlib.util
import json
from collections import Counter
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from agent.messages import Box
from agent.pictures.formats import Colour
from agent.redaction.detector import Detector
from agent.redaction.manifest import read_manifest
from tools.evaluation.contest import Contestant
from tools.training import plates
from tools.training.augment import Tile, choose_window, flipped, mosaic, paste_from, pasted, rolled, show
from tools.training.completion import completed, open_classes, weighed
from tools.training.dataset import (
    BLOCK,
    CLASSES,
    DatasetError,
    Entry,
    Targets,
    difference_hash,
    groups,
    is_held_out,
    overlap,
    read_entries,
    split,
    targets_of,
)
from tools.training.export import (
    RGB_FROM_YCC,
    Range,
    float_model,
    int8_model,
    rgb_from_ycc,
    side_by_side,
    weight_scales,
    ycc_from_rgb,
)
from tools.training.layers import INPUT, Conv, Merge, Sum
from tools.training.plan import Shape, head_names, plan, trunk_names
from tools.training.rounding import moments, rounded
from tools.training.tiles import Album, Stream, batch_of
from tools.training.weather import weathered

PERSON, FACE, PLATE = range(3)
SMALL = Shape(widths=(4, 8, 8, 8, 8), blocks=(0, 1, 0, 0), neck=8, beside=0)
BESIDE = replace(SMALL, beside=8)
torch_needed = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="torch, the train extra, is missing"
)


def entry(source, boxes=(), taught=(), file="x/0.jpg"):
    return Entry(file=file, source=source, width=100, height=100, boxes=tuple(boxes), taught=tuple(taught))


def of_class(targets, number, *, ignored):
    chosen = (targets.classes == number) & (targets.ignored == ignored)
    return targets.boxes[chosen].tolist()


def test_class_that_a_source_does_not_label_is_unknown_everywhere_and_not_absent():
    targets = targets_of(entry("tud_street", [("person", (1, 1, 20, 80))]))
    assert of_class(targets, PLATE, ignored=True) == [[0, 0, 100, 100]]
    assert of_class(targets, PLATE, ignored=False) == []


def test_class_that_a_source_labels_fully_is_absent_where_it_is_not_labelled():
    targets = targets_of(entry("openimages_lp", [("plate", (1, 1, 20, 10))]))
    assert of_class(targets, PLATE, ignored=True) == []
    assert of_class(targets, PLATE, ignored=False) == [[1, 1, 20, 10]]


def test_sure_teacher_s_box_is_true_a_doubtful_one_ignored_and_a_wild_one_background():
    taught = [("person", (0, 0, 10, 40), 0.8), ("person", (20, 0, 30, 40), 0.3), ("person", (40, 0, 50, 40), 0.15)]
    targets = targets_of(entry("openimages_lp", (), taught))
    assert of_class(targets, PERSON, ignored=False) == [[0, 0, 10, 40]]
    assert of_class(targets, PERSON, ignored=True) == [[20, 0, 30, 40]]


def test_teacher_never_adds_an_object_to_a_full_label_but_its_place_is_ignored():
    taught = [("face", (0, 0, 10, 10), 0.9), ("face", (50, 50, 60, 60), 0.9)]
    targets = targets_of(entry("facemask853_train", [("face", (0, 0, 10, 11))], taught))
    assert of_class(targets, FACE, ignored=False) == [[0, 0, 10, 11]]
    assert of_class(targets, FACE, ignored=True) == [[50, 50, 60, 60]]


def test_head_without_a_face_is_ignored_for_faces_and_one_with_a_face_is_not():
    heads = [("head", (0, 0, 20, 20)), ("head", (50, 0, 70, 20))]
    targets = targets_of(entry("bikeshelmets", heads, [("face", (5, 8, 15, 18), 0.9)]))
    assert of_class(targets, FACE, ignored=False) == [[5, 8, 15, 18]]
    assert of_class(targets, FACE, ignored=True) == [[50, 0, 70, 20]]


def test_box_outside_its_picture_is_no_object():
    assert of_class(targets_of(entry("openimages_lp", [("plate", (10, 10, 15000, 20))])), PLATE, ignored=False) == []


def test_completed_labels_speak_of_what_was_unknown():
    taught = [("plate", (0, 0, 20, 10), 0.9)]
    targets = targets_of(entry("tud_street", (), taught), completed=True)
    assert of_class(targets, PLATE, ignored=False) == [[0, 0, 20, 10]]
    assert of_class(targets, PLATE, ignored=True) == []


def test_unlisted_source_is_known_for_what_it_labels_and_unknown_for_the_rest():
    targets = targets_of(entry("my_own", [("face", (0, 0, 10, 10))]))
    assert of_class(targets, FACE, ignored=True) == []
    assert of_class(targets, PLATE, ignored=True) == [[0, 0, 100, 100]]


def test_overlap_of_equal_boxes_is_one_and_of_none_nothing():
    assert overlap((0, 0, 4, 4), [(0, 0, 4, 4), (9, 9, 10, 10)]) == 1
    assert overlap((0, 0, 4, 4), []) == 0


BOXLESS = '[{"file":"a","source":"b","w":1,"h":1,"boxes":[["x"]]}]'


@pytest.mark.parametrize("text", ["{", "[1]", '[{"file": "a"}]', BOXLESS])
def test_malformed_label_file_is_named(tmp_path, text):
    (tmp_path / "labels.json").write_text(text)
    with pytest.raises(DatasetError, match=r"labels\.json"):
        read_entries(tmp_path / "labels.json")


def test_neighbours_of_a_drive_stay_on_one_side_of_the_split():
    entries = [entry("ro_dashcam_day", file=f"ro/{index:05}.jpg") for index in range(400)]
    training, validation = split(entries, {})
    sides = {item.file: side for side, items in (("t", training), ("v", validation)) for item in items}
    ordered = [sides[item.file] for item in entries]
    changes = [index for index in range(1, 400) if ordered[index] != ordered[index - 1]]
    assert len(training) + len(validation) == 400
    assert all(index % BLOCK == 0 for index in changes)


def test_near_duplicates_are_one_group_and_different_pictures_are_not():
    entries = [entry("openimages_lp", file=name) for name in ("a", "b", "c")]
    found = groups(entries, {"a": 0b1111, "b": 0b1110, "c": 0xFFFF_0000_FFFF})
    assert found["a"] == found["b"] != found["c"]


def test_split_depends_on_the_name_alone():
    assert [is_held_out(f"g{index}") for index in range(500)] == [is_held_out(f"g{index}") for index in range(500)]
    assert 30 < sum(is_held_out(f"g{index}") for index in range(500)) < 100


def test_difference_hash_is_nearly_the_same_in_another_light_and_size():
    scene = np.random.default_rng(0).integers(0, 200, (8, 9, 3)).astype(np.uint8)
    one = Image.fromarray(scene).resize((200, 200), Image.Resampling.NEAREST)
    two = Image.fromarray((scene * 0.9 + 20).astype(np.uint8)).resize((300, 260), Image.Resampling.NEAREST)
    assert (difference_hash(one) ^ difference_hash(two)).bit_count() < 6


def tile(size=200, *items, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)
    return Tile(pixels=pixels, targets=Targets.of(items or [(PLATE, (50, 60, 90, 80), False)]))


@given(seed=st.integers(0, 10_000))
def test_window_moves_pixels_and_boxes_alike(seed):
    rng = np.random.default_rng(seed)
    pixels = np.zeros((200, 200, 3), np.uint8)
    pixels[60:80, 50:90] = 255
    scene = Tile(pixels=pixels, targets=Targets.of([(PLATE, (50, 60, 90, 80), False)]))
    shown = show(scene, choose_window(scene, 128, 96, rng), np.zeros(3, np.uint8))
    assert shown.pixels.shape == (96, 128, 3)
    bright = shown.pixels[..., 0] > 127
    rows, columns = np.flatnonzero(bright.any(1)), np.flatnonzero(bright.any(0))
    if len(rows) and len(columns) and len(shown.targets.boxes):
        box = shown.targets.boxes[0]
        seen = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
        assert np.abs(box - seen).max() <= 2.5


def test_flip_mirrors_pixels_and_boxes():
    scene = tile()
    back = flipped(flipped(scene))
    assert (back.pixels == scene.pixels).all()
    assert np.allclose(back.targets.boxes, scene.targets.boxes)
    assert flipped(scene).targets.boxes[0].tolist() == [110, 60, 150, 80]


@pytest.mark.parametrize("degrees", [-25.0, -8.0, 3.0, 12.0])
def test_roll_turns_pixels_and_boxes_alike(degrees):
    pixels = np.zeros((160, 240, 3), np.uint8)
    pixels[60:80, 100:160] = 255
    boxes = (PLATE, (100, 60, 160, 80), False), (FACE, (0, 0, 6, 6), False), (PERSON, (0, 0, 240, 160), True)
    made = rolled(Tile(pixels=pixels, targets=Targets.of(boxes)), degrees)
    bright = made.pixels[..., 0] > 127
    rows, columns = np.flatnonzero(bright.any(1)), np.flatnonzero(bright.any(0))
    seen = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
    assert np.abs(made.targets.boxes[0] - seen).max() <= 2.5
    assert made.targets.boxes[made.targets.classes == PERSON].tolist() == [[0, 0, 240, 160]]
    assert not made.targets.ignored[0]


def test_what_a_roll_turns_out_of_the_tile_teaches_nothing():
    made = rolled(tile(100, (FACE, (0, 0, 20, 20), False)), 40.0)
    assert made.targets.ignored.all()


@pytest.mark.parametrize("count", [1, 4, 9])
@pytest.mark.parametrize("seed", range(4))
def test_mosaic_fills_its_size_and_keeps_every_box_inside(count, seed):
    made = mosaic([tile(seed=index) for index in range(count)], 192, np.random.default_rng(seed))
    assert made.pixels.shape == (192, 192, 3)
    assert made.targets.boxes.min(initial=0) >= 0
    assert made.targets.boxes.max(initial=0) <= 192
    assert len(made.targets.boxes) >= 1


def test_object_of_which_little_is_left_teaches_nothing():
    scene = tile(200, (FACE, (0, 0, 100, 100), False))
    rng = np.random.default_rng(0)
    window = choose_window(scene, 64, 64, rng)
    sliver = type(window)(x=95, y=0, scale_x=1, scale_y=1, width=64, height=64)
    assert show(scene, sliver, np.zeros(3, np.uint8)).targets.ignored.tolist() == [True]


def test_pasted_patch_becomes_a_target_and_what_it_hides_is_ignored():
    scene = tile(100, (PLATE, (10, 10, 30, 20), False), (PERSON, (0, 0, 100, 100), True))
    patch, mask = np.full((30, 40, 3), 9, np.uint8), np.full((30, 40), 255, np.uint8)
    made = pasted(scene, patch, mask, "plate", (5, 5))
    assert (made.pixels[5:35, 5:45] == 9).all()
    assert made.targets.boxes[-1].tolist() == [5, 5, 45, 35]
    assert made.targets.ignored.tolist() == [True, True, False]
    assert scene.targets.ignored.tolist() == [False, True]


def test_copied_object_keeps_its_class():
    rng = np.random.default_rng(1)
    made = paste_from(tile(200, (PERSON, (0, 0, 200, 200), True)), tile(200, (PLATE, (50, 60, 90, 80), False)), rng)
    assert made.targets.classes[-1] == PLATE


@pytest.mark.parametrize("seed", range(20))
def test_weather_changes_pixels_but_neither_shape_nor_kind(seed):
    scene = tile().pixels
    result = weathered(scene, np.random.default_rng(seed))
    assert (result.shape, result.dtype) == (scene.shape, np.uint8)
    assert (result != scene).any()


@pytest.mark.parametrize("style", plates.STYLES, ids=lambda style: style.name)
def test_synthetic_plate_has_its_style_s_proportions_and_something_written(style):
    flat = plates.flat_plate(style, np.random.default_rng(0))
    assert flat.width / flat.height == pytest.approx(style.aspect, abs=0.02)
    assert np.asarray(flat.convert("L")).std() > 15


def test_eight_regions_are_drawn():
    assert {style.name[:2] for style in plates.STYLES} == {"cn", "eu", "uk", "us", "jp", "kr", "hk", "in"}


def car(brightness, *rows):
    """A grey scene with a white plate, as bright as given, in each labelled place."""
    pixels = np.full((120, 300, 3), 60, np.uint8)
    for _, (x1, y1, x2, y2), _ in rows:
        pixels[y1:y2, x1:x2] = brightness
    return Tile(pixels=pixels, targets=Targets.of(rows))


@pytest.mark.parametrize("seed", range(4))
def test_plate_of_another_style_takes_exactly_the_place_of_the_real_one_and_its_light(seed):
    before = {light: car(light, (PLATE, (20, 30, 124, 56), False)) for light in (240, 48)}
    after = {light: plates.restyled(scene, 1.0, np.random.default_rng(seed)) for light, scene in before.items()}
    for light, scene in after.items():
        assert scene.targets is before[light].targets
        changed = (scene.pixels != before[light].pixels).any(axis=2)
        assert changed[30:56, 20:124].mean() > 0.5
        changed[30:56, 20:124] = False
        assert not changed.any()
    assert after[48].pixels[30:56, 20:124].mean() < after[240].pixels[30:56, 20:124].mean() / 3


@pytest.mark.parametrize(
    ("row", "chance"),
    [
        ((PLATE, (20, 30, 124, 56), False), 0.0),
        ((PLATE, (20, 30, 124, 56), True), 1.0),
        ((FACE, (20, 30, 124, 56), False), 1.0),
        ((PLATE, (20, 30, 30, 110), False), 1.0),
        ((PLATE, (20, 30, 50, 37), False), 1.0),
        ((PLATE, (310, 30, 420, 56), False), 1.0),
    ],
    ids=["no chance", "ignored", "no plate", "shaped like none", "too small", "outside"],
)
def test_what_is_no_plate_to_restyle_is_left_as_it_is(row, chance):
    scene = car(240, row)
    assert np.array_equal(plates.restyled(scene, chance, np.random.default_rng(0)).pixels, scene.pixels)


def test_homography_sends_corners_to_their_images():
    points = np.array([(0, 0), (10, 1), (11, 8), (1, 7)], np.float64)
    images = np.array([(0, 0), (20, 0), (20, 10), (0, 10)], np.float64)
    a, b, c, d, e, f, g, h = plates.homography(points, images)
    for (x, y), image in zip(points, images, strict=True):
        whole = g * x + h * y + 1
        assert ((a * x + b * y + c) / whole, (d * x + e * y + f) / whole) == pytest.approx(image, abs=1e-6)


@pytest.mark.parametrize("seed", range(6))
def test_synthetic_plate_s_box_is_where_its_pixels_are(seed):
    scene = Tile(pixels=np.zeros((700, 1000, 3), np.uint8), targets=Targets.of(()))
    made = plates.with_plate(scene, np.random.default_rng(seed))
    x1, y1, x2, y2 = (int(value) for value in made.targets.boxes[0])
    lit = made.pixels.max(axis=2) > 0
    assert lit[y1:y2, x1:x2].any()
    lit[max(y1 - 1, 0) : y2 + 1, max(x1 - 1, 0) : x2 + 1] = False
    assert not lit.any()


def album():
    scenes = (tile(160, seed=1), tile(220, (FACE, (20, 20, 60, 70), False), seed=2))
    return Album(tiles=scenes, chances=np.array([0.5, 0.5]))


def test_batch_of_a_seed_and_number_is_always_the_same_and_another_number_is_another():
    stream = Stream(sides=(96,), batch=2, seed=5)
    first, again, other = (batch_of(album(), stream, number) for number in (3, 3, 4))
    assert (first[0] == again[0]).all()
    assert all((one.boxes == two.boxes).all() for one, two in zip(first[1], again[1], strict=True))
    assert (first[0] != other[0]).any()


def test_batches_have_all_sides_in_turn_and_none_more_pixels_than_that_of_the_largest():
    shapes = {batch_of(album(), Stream(sides=(64, 96, 128), batch=2), number)[0].shape for number in range(20)}
    assert shapes == {(8, 64, 64, 3), (3, 96, 96, 3), (2, 128, 128, 3)}


def test_windows_often_show_a_close_plate_as_large_as_the_tile():
    scene = Tile(pixels=np.zeros((480, 640, 3), np.uint8), targets=Targets.of([(PLATE, (40, 120, 600, 400), False)]))
    shown = [
        show(scene, choose_window(scene, 320, 320, np.random.default_rng(seed)), np.zeros(3)) for seed in range(60)
    ]
    widths = [float(np.ptp(one.targets.boxes[0][[0, 2]])) for one in shown]
    assert max(widths) > 280
    assert sum(width > 230 for width in widths) > 30


def test_completion_speaks_only_of_classes_that_nobody_spoke_of(tmp_path):
    Image.new("RGB", (50, 50)).save(tmp_path / "a.jpg")

    class Teacher:
        def detect(self, _picture, _colour, _thresholds=None):
            return [
                Box(label="plate", score=0.7, x1=1, y1=2, x2=30, y2=12),
                Box(label="person", score=0.9, x1=0, y1=0, x2=9, y2=9),
            ]

    raw = [
        {
            "file": "a.jpg",
            "source": "tud_street",
            "w": 50,
            "h": 50,
            "boxes": [],
            "pseudo": [["person", 0, 0, 5, 5, 0.6]],
        }
    ]
    (item,) = completed(raw, tmp_path, Teacher())
    assert item["pseudo"] == [["person", 0, 0, 5, 5, 0.6], ["plate", 1, 2, 30, 12, 0.7]]
    assert open_classes("openimages_lp") == []


def test_what_two_teachers_saw_is_believed_and_what_one_saw_is_doubted():
    first = [["person", 0, 0, 10, 20, 0.3], ["person", 50, 0, 60, 20, 0.6], ["face", 0, 0, 5, 5, 0.4]]
    second = [["person", 0, 1, 10, 20, 0.8], ["person", 80, 0, 90, 20, 0.6]]
    assert weighed(first, second, {"person"}) == [
        ["face", 0, 0, 5, 5, 0.4],
        ["person", 50, 0, 60, 20, 0.42],
        ["person", 0, 0, 10, 20, 0.8],
        ["person", 80, 0, 90, 20, 0.42],
    ]


def test_second_teacher_is_not_asked_where_people_labelled_the_class(tmp_path):
    Image.new("RGB", (50, 50)).save(tmp_path / "a.jpg")
    box = Box(label="person", score=0.9, x1=0, y1=0, x2=9, y2=30)
    second = Contestant(name="second", labels=("person",), detect=lambda _picture: [box])

    class Silent:
        def detect(self, _picture, _colour, _thresholds=None):
            return []

    def item(source):
        return {"file": "a.jpg", "source": source, "w": 50, "h": 50, "boxes": []}

    doubted, labelled = completed([item("tud_street"), item("coco_minis")], tmp_path, Silent(), [second])
    assert doubted["pseudo"] == [["person", 0, 0, 9, 30, 0.63]]
    assert labelled["pseudo"] == []


def weights_of(shape, seed=0):
    rng = np.random.default_rng(seed)
    convs = [layer for layer in plan(shape) if isinstance(layer, Conv)]
    return {
        layer.name: (
            rng.normal(
                0,
                (2 / np.prod(layer.weight_shape[1:])) ** 0.5,
                layer.weight_shape,
            ).astype(np.float32),
            rng.normal(0, 0.1, layer.outputs).astype(np.float32),
        )
        for layer in convs
    }


def outputs_of(model, picture, names=("cells",)):
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    return session.run(list(names), {"picture": picture})[0]


def with_output(model, name):
    """A session that also gives the tensor of this name."""
    changed = onnx.load_from_string(model)
    kind = onnx.TensorProto.UINT8 if any(node.op_type == "QuantizeLinear" for node in changed.graph.node) else 1
    changed.graph.output.append(onnx.helper.make_tensor_value_info(name, kind, None))
    return onnxruntime.InferenceSession(changed.SerializeToString(), providers=["CPUExecutionProvider"])


PICTURE = np.random.default_rng(4).integers(0, 256, (1, 64, 96, 3), np.uint8)


def ranges_of(shape):
    return {layer.name: Range(low=-6.0, high=6.0) for layer in plan(shape) if isinstance(layer, Conv | Merge | Sum)}


def found_ranges(layers, weights):
    """What the tensors of a network reach on the picture."""
    model = onnx.load_from_string(float_model(layers, weights, 15))
    names = [layer.name for layer in layers if isinstance(layer, Conv | Merge | Sum)]
    model.graph.output.extend(onnx.helper.make_tensor_value_info(name, 1, None) for name in names)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found = session.run(names, {"picture": PICTURE})
    return {name: Range(low=float(one.min()), high=float(one.max())) for name, one in zip(names, found, strict=True)}


@pytest.mark.parametrize("shape", [SMALL, BESIDE], ids=["alone", "beside"])
def test_float_and_int8_have_the_same_cells_and_nearly_the_same_values(shape):
    weights, layers = weights_of(shape), plan(shape)
    real = outputs_of(float_model(layers, weights, 15), PICTURE)
    whole = outputs_of(int8_model(layers, weights, found_ranges(layers, weights), 15), PICTURE)
    assert real.shape == whole.shape == (1, 12 * 8 + 6 * 4 + 3 * 2, 15)
    assert np.abs(real - whole).mean() < 0.1 * real.std()


def test_int8_weights_keep_to_reduced_range_so_that_no_cpu_saturates():
    weights = np.random.default_rng(0).normal(0, 1, (8, 4, 3, 3)).astype(np.float32)
    steps = np.round(weights / weight_scales(weights)[:, None, None, None])
    assert np.abs(steps).max() == 64


SMOOTH = np.add.outer(np.arange(9.0), np.arange(9.0))[None] + np.random.default_rng(7).normal(0, 9, (200, 1, 1))
PATCHES = SMOOTH.reshape(200, 81)[:, :27] / 100


def missed(steps, exact):
    """Mean squared error of sums over patches."""
    return float((((steps - exact) @ PATCHES.T) ** 2).mean())


def test_inputs_that_have_nothing_to_do_with_one_another_leave_the_nearest_steps():
    exact = np.random.default_rng(5).uniform(-70, 70, (4, 27))
    assert np.array_equal(rounded(exact, np.eye(27), 64), np.round(exact).clip(-64, 64))


def test_errors_of_steps_cancel_out_over_inputs_that_are_nearly_alike():
    exact = np.random.default_rng(5).uniform(-64, 64, (4, 27))
    steps = rounded(exact, moments(PATCHES), 64)
    assert np.array_equal(steps, np.round(steps))
    assert np.abs(steps).max() <= 64
    assert missed(steps, exact) < 0.1 * missed(np.round(exact), exact)


def test_first_convolution_is_rounded_for_what_it_sees():
    layers, weights = plan(SMALL), weights_of(SMALL)
    stem, _ = ycc_from_rgb(weights["stem"])
    exact = (stem / weight_scales(stem)[:, None, None, None]).reshape(len(stem), -1)
    errors = []
    for together in (None, {3: moments(PATCHES)}):
        model = onnx.load_from_string(int8_model(layers, weights, ranges_of(SMALL), 15, together))
        (merged,) = (onnx.numpy_helper.to_array(one) for one in model.graph.initializer if one.name == "stem.w.q")
        first = merged.reshape(2, len(stem), 4, 3, 3, 2)[0]  # of two columns of the result
        steps = np.stack([first[:, 3, ..., 0], first[:, 0, ..., 1], first[:, 1, ..., 1]], axis=-1)
        errors.append(missed(steps.reshape(exact.shape).astype(float), exact))
    assert errors[1] < 0.1 * errors[0]


def convolved(values, weight, strides, border):
    """Sums of (H, W, C) values beyond whose border of (rows, columns), each (before, after), there are zeros."""
    rows, across = weight.shape[2:]
    padded = np.pad(values, (*border, (0, 0)))
    high, wide = values.shape[0] // strides[0], values.shape[1] // strides[1]
    views = [[padded[y * strides[0] :, x * strides[1] :][:rows, :across] for x in range(wide)] for y in range(high)]
    return np.einsum("oikl,yxkli->yxo", weight, np.array(views))


KERNELS = st.sampled_from([(3, 2, 1, 2), (3, 2, 1, 4), (3, 2, 1, 8), (6, 4, 0, 4), (6, 4, 1, 8), (5, 1, 2, 2)])


@given(st.integers(1, 3), st.integers(1, 3), KERNELS, st.integers(0, 99))
def test_columns_side_by_side_give_the_same_sums(outputs, channels, kernel, seed):
    side, stride, first, taken = kernel
    layer = Conv(name="c", source=INPUT, inputs=channels, outputs=outputs, kernel=side, stride=stride, first=first)
    rng = np.random.default_rng(seed)
    weight = rng.integers(-64, 65, layer.weight_shape)
    values = rng.integers(-128, 128, (8, 3 * taken, channels))
    beside = side_by_side(weight, layer, taken)
    found = convolved(values.reshape(8, 3, taken * channels), beside.weight, (stride, 1), (layer.border, beside.border))
    wanted = convolved(values, weight, (stride, stride), (layer.border, layer.border))
    assert np.array_equal(found.reshape(wanted.shape), wanted)


@pytest.mark.parametrize("shape", [SMALL, BESIDE], ids=["alone", "beside"])
def test_int8_network_is_run_in_whole_numbers_but_for_the_last_convolution_of_each_head(tmp_path, shape):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 3
    whole = int8_model(plan(shape), weights_of(shape), ranges_of(shape), 15)
    onnxruntime.InferenceSession(whole, options, providers=["CPUExecutionProvider"])
    nodes = Counter(node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node)
    assert nodes["DequantizeLinear"] == nodes["MatMul"] == len(head_names())
    assert nodes["QuantizeLinear"] == nodes["Conv"] == 0
    assert nodes["QLinearAdd"] == sum(isinstance(layer, Merge | Sum) for layer in plan(shape))


def test_zero_is_exact_in_every_range():
    for low, high in ((-3.3, 5.1), (0.2, 7.0), (-4.0, -1.0), (0.0, 0.0)):
        scale, zero = Range(low=low, high=high).grid()
        assert scale > 0
        assert 0 <= zero <= 255


def test_every_layer_of_a_plan_reads_what_an_earlier_one_wrote():
    known = {"picture"}
    for layer in plan(Shape()):
        sources = {getattr(layer, name) for name in ("source", "lateral", "deeper") if hasattr(layer, name)}
        assert sources | set(getattr(layer, "sources", ())) | set(getattr(layer, "parts", ())) <= known
        known.add(layer.name)
    assert set(head_names()) <= known


def rgb_of(ycc):
    """Neither rounded nor clipped."""
    return (ycc - np.array([0, 128, 128.0])) @ RGB_FROM_YCC.T


def test_folded_colours_are_those_that_a_decoder_gives():
    image = Image.fromarray(PICTURE[0] // 4 + 96, "YCbCr")  # so grey that nothing is clipped
    assert np.abs(rgb_of(np.asarray(image).astype(float)) - np.asarray(image.convert("RGB"))).max() <= 1


def test_first_convolution_gives_for_ycbcr_what_it_gave_for_rgb_and_can_be_taken_back():
    weight, bias = weights_of(SMALL)["stem"]
    changed, shifted = ycc_from_rgb((weight, bias))
    patch = PICTURE[0, :3, :3].astype(float)
    wanted = np.einsum("oikl,kli->o", weight, rgb_of(patch) / 255) + bias
    assert np.allclose(np.einsum("oikl,kli->o", changed, (patch - 128) / 255) + shifted, wanted, atol=1e-5)
    for back, was in zip(rgb_from_ycc((changed, shifted)), (weight, bias), strict=True):
        assert np.allclose(back, was, atol=1e-5)


def test_nothing_beyond_the_border_is_grey():
    layers, weights = plan(SMALL), weights_of(SMALL)
    grey = np.full((1, 64, 64, 3), 128, np.uint8)
    for model in (float_model(layers, weights, 15), int8_model(layers, weights, ranges_of(SMALL), 15)):
        session = with_output(model, "stem")
        (stem,) = session.run(["stem"], {"picture": grey})
        assert np.ptp(stem.astype(float), axis=(2, 3)).max() < 1e-5


@torch_needed
@pytest.mark.parametrize("shape", [SMALL, BESIDE], ids=["alone", "beside"])
def test_exported_network_computes_what_was_trained(shape):
    import torch  # noqa: PLC0415

    from tools.training.network import Network, folded  # noqa: PLC0415

    torch.manual_seed(0)
    network = Network(shape).train()
    for module in network.convs.values():
        torch.nn.init.normal_(module.norm.bias if hasattr(module, "norm") else module.conv.bias, std=0.3)
    for _ in range(3):
        network(torch.rand(2, 3, 64, 96))
    network.eval()
    weights = {name: (weight.numpy(), bias.numpy()) for name, (weight, bias) in folded(network).items()}
    with torch.no_grad():
        wanted = network(torch.from_numpy(rgb_of(PICTURE) / 255).permute(0, 3, 1, 2).float()).numpy()
    assert np.allclose(outputs_of(float_model(network.layers, weights, 15), PICTURE), wanted, atol=1e-4)


def trained(torch, shape):
    """A network whose norms and biases are no longer those of a fresh one, and its float manifest's weights."""
    from tools.training.network import Network, folded  # noqa: PLC0415

    torch.manual_seed(0)
    network = Network(shape).train()
    for module in network.convs.values():
        torch.nn.init.normal_(module.norm.bias if hasattr(module, "norm") else module.conv.bias, std=0.3)
    for _ in range(3):
        network(torch.rand(2, 3, 64, 96))
    weights = {name: (weight.numpy(), bias.numpy()) for name, (weight, bias) in folded(network.eval()).items()}
    return network, float_model(network.layers, weights, 15)


@torch_needed
@pytest.mark.parametrize("shape", [SMALL, replace(SMALL, blocks=(0, 2, 1, 3))], ids=["as deep", "deeper"])
def test_warm_start_computes_what_the_file_computes_and_trains_as_if_it_had_never_been_folded(tmp_path, shape):
    import torch  # noqa: PLC0415

    from tools.training.network import Network  # noqa: PLC0415
    from tools.training.shipping import write  # noqa: PLC0415
    from tools.training.start import start_from  # noqa: PLC0415

    before, model = trained(torch, SMALL)
    path = write(tmp_path, "shipped-float", model, dict.fromkeys(CLASSES, 0.5), {})
    after = Network(shape)
    tiles = np.random.default_rng(0).integers(0, 256, (4, 96, 96, 3), np.uint8)
    start_from(after, path, [tiles])
    picture = torch.from_numpy(tiles).permute(0, 3, 1, 2).float() / 255
    assert read_manifest(path).input.colour == "YCbCr"
    with torch.no_grad():
        wanted = before(picture)
        assert torch.allclose(after.eval()(picture), wanted, atol=1e-3)
        assert torch.allclose(after.train()(picture), wanted, atol=1e-2)
    assert float(after.convs["s8_1"].conv.weight.detach().std()) == pytest.approx(
        float(Network(SMALL).convs["s8_1"].conv.weight.detach().std()), rel=0.2
    )
    after(picture).square().sum().backward()
    assert all(float(value.grad.abs().max()) > 0 for value in after.parameters())


@torch_needed
def test_trunk_beside_changes_nothing_at_first_and_is_trained_but_for_what_is_borrowed(tmp_path):
    import torch  # noqa: PLC0415

    from tools.training.network import Network, folded  # noqa: PLC0415
    from tools.training.shipping import write  # noqa: PLC0415
    from tools.training.start import start_from  # noqa: PLC0415

    before, model = trained(torch, SMALL)
    path = write(tmp_path, "shipped-float", model, dict.fromkeys(CLASSES, 0.5), {})
    after = Network(BESIDE)
    after.keep(trunk_names(BESIDE, 8))
    borrowed = {
        name: tuple(np.random.default_rng(0).normal(0, 0.1, part.shape).astype(np.float32) for part in parts)
        for name, parts in folded(after).items()
        if name.startswith("borrowed")
    }
    after.borrow(borrowed)
    tiles = np.random.default_rng(0).integers(0, 256, (4, 96, 96, 3), np.uint8)
    start_from(after, path, [tiles])
    picture = torch.from_numpy(tiles).permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        assert torch.allclose(after.eval()(picture), before(picture), atol=1e-3)
    kept = {name: value.clone() for name, value in after.state_dict().items()}
    optimiser = torch.optim.AdamW([value for value in after.parameters() if value.requires_grad], lr=1e-3)
    for _ in range(2):  # in the second step what leads to a silent convolution learns too
        optimiser.zero_grad()
        after.train()(picture).square().mean().backward()
        optimiser.step()
    same = {name for name, value in after.state_dict().items() if torch.equal(value, kept[name])}
    still = {name.split(".")[1] for name in same if name.endswith("conv.weight")}
    assert still == {*borrowed, "stem", "s4_0", "s8_0", "s8_1"}
    for name, parts in borrowed.items():
        assert all(np.array_equal(one, other) for one, other in zip(folded(after)[name], parts, strict=True))


@torch_needed
def test_borrowed_weights_of_whole_steps_stay_so_in_the_float_file_and_are_read_back(tmp_path):
    import torch  # noqa: PLC0415

    from tools.training.network import Network, folded  # noqa: PLC0415
    from tools.training.shipping import write  # noqa: PLC0415
    from tools.training.start import start_from  # noqa: PLC0415

    network, _ = trained(torch, BESIDE)
    rng = np.random.default_rng(0)
    for name, (weight, bias) in folded(network).items():
        if name.startswith("borrowed") and name != "borrowed":
            steps = rng.integers(-126, 127, weight.shape)
            steps[:, 0, 0, 0] = 127
            network.borrow(
                {name: ((steps * rng.uniform(1e-4, 2e-3, (len(bias), 1, 1, 1))).astype(np.float32), bias.numpy())}
            )
    weights = {name: (weight.numpy(), bias.numpy()) for name, (weight, bias) in folded(network).items()}
    model = float_model(network.layers, weights, 15)
    kinds = {one.name: one.data_type for one in onnx.load_from_string(model).graph.initializer}
    assert kinds["borrowed1a.w.q"] == onnx.TensorProto.INT8
    assert kinds["borrowed.w"] == kinds["far32_0.w"] == onnx.TensorProto.FLOAT
    path = write(tmp_path, "shipped-float", model, dict.fromkeys(CLASSES, 0.5), {})
    after = Network(BESIDE)
    start_from(after, path, [PICTURE[:, :64, :64]])
    picture = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        assert torch.allclose(after.eval()(picture), network(picture), atol=1e-3)


def data_folder(path, count=12):
    """A folder of small labelled pictures, each of them its own group."""
    (path / "train").mkdir(parents=True)
    rng, items = np.random.default_rng(2), []
    for number in range(count):
        name = f"{number}.png"
        Image.fromarray(rng.integers(0, 256, (96, 128, 3), np.uint8)).save(path / "train" / name)
        boxes = [["person", 20, 10, 60, 90]]
        items.append({"file": name, "w": 128, "h": 96, "source": "own", "boxes": boxes, "pseudo": []})
    (path / "labels.json").write_text(json.dumps(items))
    return path


@torch_needed
def test_run_has_a_borrowed_trunk_where_its_beginning_brings_one_and_leaves_it_as_it_is(tmp_path, monkeypatch):
    import torch  # noqa: PLC0415

    from tools.__main__ import main  # noqa: PLC0415
    from tools.training import loop  # noqa: PLC0415
    from tools.training.efficientnet import trunk  # noqa: PLC0415

    rng = np.random.default_rng(0)
    borrowed = {
        layer.name: (
            rng.normal(0, 0.05, layer.weight_shape).astype(np.float32),
            np.zeros(layer.outputs, np.float32),
        )
        for layer in trunk()
        if isinstance(layer, Conv)
    }
    monkeypatch.setattr(loop, "read", lambda _: borrowed)
    data = data_folder(tmp_path / "data")
    common = ["train", "network", str(data), "--tile", "64", "--batch", "1", "--minutes", "5"]

    def trained_to(folder, steps, *options):
        assert main([*common, "--folder", str(tmp_path / folder), "--steps", str(steps), *options]) == 0
        return torch.load(tmp_path / folder / "checkpoint.pt", weights_only=True)

    plain = trained_to("plain", 1)
    assert json.loads(plain["shape"])["beside"] == 0
    first = trained_to("first", 1, "--borrow", "lite.tflite", "--keep", "8")
    again = trained_to("first", 3, "--resume", str(tmp_path / "first" / "checkpoint.pt"), "--keep", "8")
    assert (first["step"], again["step"]) == (1, 3)
    for name, (weight, _) in borrowed.items():
        assert np.array_equal(again["network"][f"convs.{name}.conv.weight"].numpy(), weight)
    moved = {name for name, value in again["network"].items() if not torch.equal(value, first["network"][name])}
    assert not [name for name in moved if name.startswith(("convs.stem", "convs.s4", "convs.s8", "convs.borrowed"))]
    assert "convs.out8.conv.weight" in moved
    out = tmp_path / "out"
    assert (
        main(["train", "ship", str(data), "--checkpoint", str(tmp_path / "first/checkpoint.pt"), "--out", str(out)])
        == 0
    )
    started = trained_to("started", 1, "--start", str(out / "detector-float.json"))
    for name, (weight, _) in borrowed.items():
        assert np.allclose(started["network"][f"convs.{name}.conv.weight"].numpy(), weight, atol=1e-6)


@torch_needed
def test_mean_of_a_network_and_a_file_lies_in_the_middle_of_every_folded_weight(tmp_path):
    import torch  # noqa: PLC0415

    from tools.training.network import Network, folded  # noqa: PLC0415
    from tools.training.shipping import write  # noqa: PLC0415
    from tools.training.start import mean_with  # noqa: PLC0415

    network, model = trained(torch, SMALL)
    path = write(tmp_path, "shipped-float", model, dict.fromkeys(CLASSES, 0.5), {})
    picture = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        wanted = network(picture)
        mean_with(network, path)
        assert torch.allclose(network(picture), wanted, atol=1e-3)
    other, first = Network(SMALL).eval(), folded(network)
    second = folded(other)
    mean_with(other, path)
    for name, parts in folded(other).items():
        for mean, one, two in zip(parts, first[name], second[name], strict=True):
            assert torch.allclose(mean, (one + two) / 2, atol=1e-4)


@torch_needed
def test_warm_start_refuses_a_file_of_another_shape_or_of_no_float_weights(tmp_path):
    import torch  # noqa: PLC0415

    from tools.training.network import Network  # noqa: PLC0415
    from tools.training.shipping import write  # noqa: PLC0415
    from tools.training.start import StartError, start_from  # noqa: PLC0415

    _, model = trained(torch, SMALL)
    path = write(tmp_path, "small", model, dict.fromkeys(CLASSES, 0.5), {})
    with pytest.raises(StartError, match="stem"):
        start_from(Network(Shape()), path, [])
    whole = int8_model(plan(SMALL), weights_of(SMALL), ranges_of(SMALL), 15)
    path = write(tmp_path, "whole", whole, dict.fromkeys(CLASSES, 0.5), {})
    with pytest.raises(StartError, match="float file"):
        start_from(Network(SMALL), path, [])


@torch_needed
def test_shipped_files_are_taken_by_the_agent(tmp_path):
    import torch  # noqa: PLC0415

    from tools.training.network import Network  # noqa: PLC0415
    from tools.training.shipping import exported, write  # noqa: PLC0415

    torch.manual_seed(0)
    network = Network(SMALL).eval()
    shipped = exported(network, [PICTURE[0]])
    path = write(tmp_path, "tiny", shipped.int8, dict.fromkeys(CLASSES, 0.5), {"licence": "Apache-2.0"})
    assert Detector.open(path).detect(PICTURE[0], Colour.RGB) == []
    assert json.loads(path.read_text())["licence"] == "Apache-2.0"


@torch_needed
def test_cells_answer_for_the_object_they_lie_in_and_ignored_places_cost_nothing():
    import torch  # noqa: PLC0415

    from tools.training.losses import Cells, Objects, assign, loss_of, teaching  # noqa: PLC0415

    cells = Cells.of(64, 64)
    objects = Objects.of([Targets.of([(PLATE, (8, 8, 40, 24), False), (FACE, (0, 0, 64, 64), True)])])
    boxes = torch.tensor([8.0, 8.0, 40.0, 24.0]).expand(1, len(cells.strides), 3, 4)
    found = assign(torch.full((1, len(cells.strides), 3), 0.5), boxes, objects.where(~objects.ignored), cells)
    assert set(found.classes.tolist()) == {PLATE}
    centres = cells.centres[found.cells]
    assert ((centres > torch.tensor([8.0, 8.0])) & (centres < torch.tensor([40.0, 24.0]))).all()
    assert found.wanted.max() == pytest.approx(1.0)
    weights = teaching(objects, cells, (1, len(cells.strides), 3))
    assert weights[..., FACE].max() == 0
    assert weights[..., PERSON].min() == 1
    loud = torch.zeros(1, len(cells.strides), 15)
    loud[..., FACE] = 9.0
    quiet = torch.zeros(1, len(cells.strides), 15)
    assert loss_of(loud, objects, cells).score == pytest.approx(float(loss_of(quiet, objects, cells).score))


@torch_needed
def test_spare_cell_of_an_object_may_speak_up_to_its_own_overlap_and_no_other_may():
    import torch  # noqa: PLC0415

    from tools.training.losses import Cells, Objects, assign, loss_of  # noqa: PLC0415

    cells = Cells.of(64, 64)
    plate = torch.tensor([4.0, 4.0, 60.0, 44.0])
    objects = Objects.of([Targets.of([(PLATE, plate.tolist(), False)])])
    distances = torch.cat([cells.centres - plate[:2], plate[2:] - cells.centres], dim=1) / cells.strides[:, None]
    values = torch.full((1, len(cells.strides), 15), -9.0)
    values[0, :, 11:15] = distances.clamp(min=1e-4).log()
    boxes = plate.expand(1, len(cells.strides), 3, 4)
    chosen = assign(torch.full((1, len(cells.strides), 3), 0.1), boxes, objects, cells)
    inner = chosen.spare[0, :, PLATE] > 0
    inner[chosen.cells] = False
    assert inner.sum() > 10
    assert chosen.spare[0, :, [PERSON, FACE]].max() == 0
    values[0, chosen.cells, PLATE] = 4.0
    before = float(loss_of(values, objects, cells).score)
    values[0, inner, PLATE] = 2.0
    assert float(loss_of(values, objects, cells).score) == pytest.approx(before, abs=0.05)
    outside = chosen.spare[0, :, PLATE] == 0
    assert outside.sum() > 5
    values[0, outside, PLATE] = 2.0
    assert float(loss_of(values, objects, cells).score) > before + 1


@torch_needed
def test_disputed_cell_goes_to_the_larger_value():
    import torch  # noqa: PLC0415

    from tools.training.losses import undisputed  # noqa: PLC0415

    kept = undisputed(torch.tensor([4, 4, 7]), torch.tensor([0.2, 0.9, 0.1]), 10)
    assert sorted(kept.tolist()) == [1, 2]


@torch_needed
def test_rate_rises_falls_and_ends_low():
    from tools.training.loop import LAST_RATE, WARM_UP, rate_factor  # noqa: PLC0415

    assert rate_factor(0, 0.0) < 0.01
    assert rate_factor(WARM_UP, 0.0) == pytest.approx(1.0)
    assert rate_factor(WARM_UP, 0.5) < 0.6
    assert rate_factor(WARM_UP, 1.0) == pytest.approx(LAST_RATE)


@torch_needed
def test_training_learns_logs_and_goes_on_from_its_checkpoint(tmp_path):
    import torch  # noqa: PLC0415

    from tools.training.loop import Plan, Trainer, load_average  # noqa: PLC0415

    def trainer(steps):
        stream = Stream(sides=(64, 96), batch=1)
        return Trainer(SMALL, Plan(folder=tmp_path, minutes=5, steps=steps, stream=stream, workers=0, threads=1))

    first = trainer(4)
    path = first.run(album())
    assert first.step == 4
    second = trainer(6)
    second.resume(path)
    assert second.step == 4
    second.run(album())
    assert second.step == 6
    assert load_average(path).shape == SMALL
    assert torch.isfinite(torch.cat([value.flatten() for value in second.network.parameters()])).all()


@torch_needed
def test_training_that_is_told_to_stop_leaves_a_checkpoint(tmp_path):
    from tools.training.loop import Plan, Trainer  # noqa: PLC0415

    stopped = Trainer(
        SMALL, Plan(folder=tmp_path, minutes=5, stream=Stream(sides=(64,), batch=1), workers=0, threads=1)
    )
    stopped.stopping = True
    assert stopped.run(album()).is_file()
    assert stopped.step == 0
