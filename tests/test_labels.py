"""Labels of other people's sets: each kind of folder gives the right picture, or says why not."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from tools.__main__ import main
from tools.evaluation.fitting import TURNS
from tools.evaluation.names import label_of, listed_names, yaml_names
from tools.evaluation.raw import LabelsError
from tools.evaluation.readers import read_folder

ORIENTATION = 0x112  # EXIF tag


def save(path, size=(100, 80), grey=0, orientation=1):
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    Image.new("RGB", size, (grey, grey, grey)).save(path, exif=exif)


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text if isinstance(text, str) else json.dumps(text))


def coco(*files, name="person", size=(100, 80), annotations=None, categories=None):
    """A COCO file in which each picture has one box, 10 20 30 40 wide and high."""
    boxes = [{"image_id": index, "category_id": 1, "bbox": [10, 20, 30, 40]} for index in range(len(files))]
    return {
        "images": [
            {"id": index, "file_name": file, "width": size[0], "height": size[1]} for index, file in enumerate(files)
        ],
        "annotations": boxes if annotations is None else annotations,
        "categories": categories or [{"id": 1, "name": name}],
    }


def voc(filename="", size=(100, 80), name="person"):
    box = "<bndbox><xmin>10</xmin><ymin>20</ymin><xmax>40</xmax><ymax>60</ymax></bndbox>"
    stated = f"<size><width>{size[0]}</width><height>{size[1]}</height></size>" if size else ""
    file = f"<filename>{filename}</filename>" if filename else ""
    return f"<annotation>{file}{stated}<object><name>{name}</name>{box}</object></annotation>"


def greys(folder, names=()):
    """By picture, its grey: which picture was really read."""
    return {
        item.path.relative_to(folder).as_posix(): int(item.pixels()[0, 0, 0])
        for item in read_folder(folder, names).pictures
    }


def test_voc_takes_the_picture_beside_and_never_a_mask_of_the_same_stem(tmp_path):
    save(tmp_path / "JPEGImages" / "2007_1.png", grey=7)
    save(tmp_path / "SegmentationObject" / "2007_1.png", grey=90)
    save(tmp_path / "SegmentationObject" / "2007_2.png", grey=90)
    for stem in ("2007_1", "2007_2"):
        write(tmp_path / "Annotations" / f"{stem}.xml", voc(f"{stem}.jpg"))
    reading = read_folder(tmp_path)
    assert greys(tmp_path) == {"JPEGImages/2007_1.png": 7}
    assert reading.missing == 1


def test_voc_of_several_splits_keeps_to_its_own(tmp_path):
    for grey, split in enumerate(("train", "valid")):
        save(tmp_path / split / "images" / "1.png", grey=grey)
        write(tmp_path / split / "annotations" / "1.xml", voc())
    save(tmp_path / "plain" / "2.png", grey=2)
    write(tmp_path / "plain" / "xml" / "2.xml", voc())
    assert greys(tmp_path) == {"plain/2.png": 2, "train/images/1.png": 0, "valid/images/1.png": 1}


def test_voc_file_name_that_was_copied_from_another_gives_way_to_the_own_one(tmp_path):
    for grey, stem in enumerate(("a", "a_flipped")):
        save(tmp_path / f"{stem}.png", grey=grey)
        write(tmp_path / f"{stem}.xml", voc("a.png"))
    assert greys(tmp_path) == {"a.png": 0, "a_flipped.png": 1}
    write(tmp_path / "other.xml", voc("a.png"))
    with pytest.raises(LabelsError, match=r"other\.xml both label"):
        read_folder(tmp_path)


def test_yolo_of_several_splits_keeps_to_its_own(tmp_path):
    write(tmp_path / "data.yaml", "train: ../train/images\nnames:\n- car\n- License_Plate\nnc: 2\n")
    for grey, split in enumerate(("train", "valid", "test")):
        save(tmp_path / split / "images" / "0001.png", grey=grey)
        write(tmp_path / split / "labels" / "0001.txt", "1 0.5 0.5 0.2 0.25\n")
    write(tmp_path / "test" / "labels" / "0002.txt", "1 0.5 0.5 0.2 0.25\n")
    reading = read_folder(tmp_path)
    assert greys(tmp_path) == {"test/images/0001.png": 2, "train/images/0001.png": 0, "valid/images/0001.png": 1}
    assert reading.line() == "read 3 pictures, 3 labels; not understood: none; without picture: 1"


def test_yolo_of_images_train_and_labels_train_is_read(tmp_path):
    save(tmp_path / "images" / "train" / "a.b.png", grey=3)
    write(tmp_path / "labels" / "train" / "a.b.txt", "\ufeff0 0.5 0.5 0.2 0.25\n")
    write(tmp_path / "images" / "train" / "a.b.xml", "<notes/>")
    assert greys(tmp_path, ["face"]) == {"images/train/a.b.png": 3}
    assert read_folder(tmp_path, ["face"]).labels() == 1


def test_files_that_an_archive_brings_along_are_no_labels_and_unlabelled_pictures_are_counted(tmp_path):
    save(tmp_path / "a.png", grey=3)
    save(tmp_path / "b.png")
    write(tmp_path / "a.txt", "0 0.5 0.5 0.2 0.25\n")
    for name in ("._a.txt", "._a.png", "._a.xml", "._a.json"):
        write(tmp_path / "__MACOSX" / name, "junk")
    assert greys(tmp_path, ["face"]) == {"a.png": 3}
    assert read_folder(tmp_path, ["face"]).remarks == ("left out, as no label speaks of them: 1 pictures",)


def test_picture_that_cannot_be_read_is_left_out_and_named(tmp_path):
    for name in ("a", "b"):
        save(tmp_path / f"{name}.png")
        write(tmp_path / f"{name}.txt", "0 0.5 0.5 0.2 0.25\n")
    (tmp_path / "b.png").write_bytes(b"junk")
    reading = read_folder(tmp_path, ["face"])
    assert [item.path.name for item in reading.pictures] == ["a.png"]
    assert "b.png" in reading.remarks[0]


def test_yolo_lines_are_boxes_scored_boxes_or_polygons(tmp_path):
    save(tmp_path / "a.png")
    write(tmp_path / "a.txt", "0 0.5 0.5 0.2 0.25\n0 0.5 0.5 0.2 0.25 0.9\n0 0.1 0.2 0.9 0.2 0.9 0.6\n")
    (item,) = read_folder(tmp_path, ["face"]).pictures
    assert np.allclose(item.truths["face"].objects, [[40, 30, 60, 50], [40, 30, 60, 50], [10, 16, 90, 48]])


@pytest.mark.parametrize("line", ["-1 0.5 0.5 0.1 0.1", "0 50 40 20 20", "0 0.1 0.1 0.2 0.2 0.3 0.3 0.4"])
def test_yolo_line_that_can_be_no_box_is_a_mistake_in_its_file(tmp_path, line):
    save(tmp_path / "a.png")
    write(tmp_path / "a.txt", line)
    with pytest.raises(LabelsError, match=r"a\.txt: ValueError"):
        read_folder(tmp_path, ["face"])


def test_coco_takes_the_picture_that_agrees_with_most_of_the_path(tmp_path):
    save(tmp_path / "a" / "0.png", grey=1)
    save(tmp_path / "b" / "0.png", grey=2)
    write(tmp_path / "labels.json", coco("/somewhere/b/0.png"))
    assert greys(tmp_path) == {"b/0.png": 2}
    write(tmp_path / "labels.json", coco("0.png"))
    with pytest.raises(LabelsError, match="several pictures could be meant"):
        read_folder(tmp_path)


def test_coco_of_equal_names_takes_the_folder_that_the_file_is_named_for_or_that_holds_pictures(tmp_path):
    for grey, part in enumerate(("train", "val")):
        save(tmp_path / part / "[0].png", grey=grey)
        write(tmp_path / "annotations" / f"instances_{part}.json", coco("[0].png"))
    assert greys(tmp_path) == {"train/[0].png": 0, "val/[0].png": 1}
    save(tmp_path / "one" / "images" / "x.png", grey=8)
    save(tmp_path / "one" / "masks" / "x.png", grey=9)
    write(tmp_path / "one" / "coco.json", coco("x.png"))
    assert greys(tmp_path / "one") == {"images/x.png": 8}


def test_coco_reads_every_file_and_leaves_those_out_of_which_no_picture_is_there(tmp_path):
    for grey, split in enumerate(("train", "valid", "test")):
        save(tmp_path / split / "a.png", grey=grey)
        write(tmp_path / split / "_annotations.coco.json", coco("a.png"))
    write(tmp_path / "instances_all.json", coco("gone.png", "gone too.png"))
    reading = read_folder(tmp_path)
    assert greys(tmp_path) == {"test/a.png": 2, "train/a.png": 0, "valid/a.png": 1}
    assert reading.missing == 0
    assert "none of its 2 pictures is there, such as gone.png" in reading.remarks[0]


def test_coco_boxes_that_two_files_give_count_once(tmp_path):
    save(tmp_path / "a.png")
    write(tmp_path / "instances.json", coco("a.png"))
    write(tmp_path / "person_keypoints.json", coco("a.png"))
    write(tmp_path / "faces.json", coco("a.png", name="face"))
    (item,) = read_folder(tmp_path).pictures
    assert {label: len(truth.objects) for label, truth in item.truths.items()} == {"person": 1, "face": 1}


def test_coco_annotations_without_box_or_picture_are_counted_and_polygons_give_their_bounds(tmp_path):
    save(tmp_path / "a.png")
    annotations = [
        {"image_id": 0, "category_id": 1, "segmentation": [[10, 20, 40, 20, 40, 60]]},
        {"image_id": 0, "category_id": 1, "bbox": [], "segmentation": {"counts": "", "size": [1, 1]}},
        {"image_id": 9, "category_id": 1, "bbox": [1, 1, 5, 5]},
        {"image_id": 0, "category_id": 7, "bbox": [1, 1, 5, 5]},
    ]
    write(tmp_path / "x.json", coco("a.png", "gone.png", annotations=annotations))
    reading = read_folder(tmp_path)
    assert reading.pictures[0].truths["person"].objects.tolist() == [[10, 20, 40, 60]]
    assert reading.line() == "read 1 pictures, 1 labels; not understood: category 7 (1); without picture: 1"
    assert [remark.split(": ")[1] for remark in reading.remarks] == [
        "1 annotations of pictures that it does not list",
        "1 annotations without a box",
    ]


def test_declared_class_without_annotations_is_known_but_not_one_that_is_only_a_family(tmp_path):
    save(tmp_path / "a.png")
    categories = [
        {"id": 0, "name": "people", "supercategory": "none"},
        {"id": 1, "name": "face", "supercategory": "people"},
    ]
    write(tmp_path / "x.json", coco("a.png", annotations=[], categories=categories))
    (item,) = read_folder(tmp_path).pictures
    assert set(item.truths) == {"face"}
    assert item.truths["face"].objects.shape == (0, 4)


@pytest.mark.parametrize(
    ("name", "label"),
    [
        *((name, "plate") for name in ("licence-plate", "License_Plate", "LicensePlate", "number plate", "plates")),
        *((name, "plate") for name in ("Vehicle registration plate", "number_plate", "licence")),
        *((name, "person") for name in ("Person", "man", "Woman", "pedestrian", "rider")),
        *((name, "face") for name in ("Human face", "face", "FACE", "without_mask")),
        *((name, None) for name in ("head", "car", "person on a poster", "")),
    ],
)
def test_class_names_are_understood_however_they_are_written(name, label):
    assert label_of(name) == label


@pytest.mark.parametrize(
    "text",
    [
        "names: [car, 'License Plate']\n",
        'nc: 2\nnames: ["car",\n  "License Plate"]  # two\n',
        "names:\n- car\n- License Plate  # of any land\nnc: 2\n",
        "names:\n  # two\n  0: car\n\n  1: 'License Plate'\nval: x\n",
        "names: {1: License Plate, 0: car}\n",
    ],
)
def test_names_of_data_yaml_are_read_as_list_and_as_map(text):
    assert yaml_names(text) == ["car", "License Plate"]


def test_yaml_without_names_names_nothing():
    assert yaml_names("train: x\nclass_names: [a]\nnames: data/coco.names\nnc: 1\n") == []


def test_class_lists_that_differ_are_a_mistake(tmp_path):
    write(tmp_path / "classes.txt", "\ufeffface\n")
    write(tmp_path / "data.yaml", "names: [face]\n")
    assert listed_names(tmp_path) == ["face"]
    write(tmp_path / "data.yaml", "names: [plate]\n")
    with pytest.raises(LabelsError, match="different classes"):
        listed_names(tmp_path)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_lie_on_the_object_however_the_camera_was_held(tmp_path, orientation):
    stored = Image.new("RGB", (100, 60))
    stored.paste((255, 255, 255), (10, 20, 40, 50))
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    stored.save(tmp_path / "a.png", exif=exif)
    content = coco("a.png", size=(100, 60), annotations=[{"image_id": 0, "category_id": 1, "bbox": [10, 20, 30, 30]}])
    write(tmp_path / "x.json", content)
    (item,) = read_folder(tmp_path).pictures
    pixels = item.pixels()
    assert pixels.shape == (item.height, item.width, 3)
    if orientation in TURNS:
        x1, y1, x2, y2 = item.truths["person"].objects[0].astype(int)
        assert pixels[y1:y2, x1:x2].min() == 255
        assert (pixels == 255).sum() == 3 * (x2 - x1) * (y2 - y1)


def test_yolo_shares_are_those_of_the_upright_picture(tmp_path):
    save(tmp_path / "a.png", (100, 60), orientation=6)
    write(tmp_path / "a.txt", "0 0.5 0.25 0.2 0.1")
    (item,) = read_folder(tmp_path, ["face"]).pictures
    assert (item.width, item.height) == (60, 100)
    assert np.allclose(item.truths["face"].objects, [[24, 20, 36, 30]])


def test_boxes_in_the_upright_size_stay_as_they_are(tmp_path):
    save(tmp_path / "a.jpg", (80, 100), orientation=6)
    write(tmp_path / "a.xml", voc("a.jpg", size=(100, 80)))
    assert read_folder(tmp_path).pictures[0].truths["person"].objects.tolist() == [[10, 20, 40, 60]]


def test_picture_of_another_size_than_its_labels_say_is_left_out_and_named(tmp_path):
    for name, size in (("a.png", (100, 80)), ("b.png", (50, 40))):
        save(tmp_path / name, size)
        write(tmp_path / name.replace("png", "xml"), voc(name))
    reading = read_folder(tmp_path)
    assert [item.path.name for item in reading.pictures] == ["a.png"]
    (remark,) = reading.remarks
    assert "do not fit: 1" in remark
    assert remark.endswith("b.png: is 50x40, its labels say 100x80")


def test_voc_without_a_size_takes_the_picture_s(tmp_path):
    save(tmp_path / "a.png")
    for size in (None, (0, 0)):
        write(tmp_path / "a.xml", voc("a.png", size=size))
        assert read_folder(tmp_path).pictures[0].width == 100


def test_boxes_are_cut_off_at_the_edges_and_left_out_where_nothing_remains(tmp_path):
    save(tmp_path / "a.png")
    boxes = [[-60, 10, 100, 60], [5, 5, 0, 0], [200, 5, 10, 10]]
    annotations = [{"image_id": 0, "category_id": 1, "bbox": box} for box in boxes]
    write(tmp_path / "x.json", coco("a.png", annotations=annotations))
    assert read_folder(tmp_path).pictures[0].truths["person"].objects.tolist() == [[0, 10, 40, 70]]


def test_what_an_unlisted_source_labels_is_known_in_all_its_pictures(tmp_path):
    rows = [
        ("a.png", "mine", [["plate", 1, 1, 40, 30]]),
        ("b.png", "mine", []),
        ("c.png", "other", [["face", 1, 1, 9, 9]]),
    ]
    for name, _, _ in rows:
        save(tmp_path / name)
    rows.append(("gone.png", "mine", [["bus", 1, 1, 40, 30]]))
    entries = [{"file": name, "w": 100, "h": 80, "source": source, "boxes": boxes} for name, source, boxes in rows]
    write(tmp_path / "labels.json", entries)
    reading = read_folder(tmp_path)
    assert [set(item.truths) for item in reading.pictures] == [{"plate"}, {"plate"}, {"face"}]
    assert reading.line() == "read 3 pictures, 2 labels; not understood: bus (1); without picture: 1"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("x.json", '{"images": [{"id": 1}], "annotations": [], "categories": []}'),
        ("x.json", '{"images": 1, "annotations": 2, "categories": 3}'),
        ("labels.json", "["),
        ("a.xml", voc().replace("<xmin>10</xmin>", "")),
        ("a.xml", voc().replace("<xmin>10</xmin>", "<xmin>left</xmin>")),
        ("a.txt", "face 0.5 0.5 0.1 0.1"),
    ],
)
def test_every_mistake_names_its_file(tmp_path, name, text):
    save(tmp_path / "a.png")
    write(tmp_path / name, text)
    with pytest.raises(LabelsError, match=name):
        read_folder(tmp_path, ["face"])


class Blind:
    manifest = SimpleNamespace(thresholds={"face": 0.5}, input=SimpleNamespace(upscale=1.0, long_side=1280))

    def detect(self, _picture, _colour, _thresholds):
        return []


def test_mistakes_end_the_command_with_a_line_and_status_1(tmp_path, capsys):
    assert main(["evaluate", str(tmp_path / "nowhere"), "--no-baselines"]) == 1
    assert capsys.readouterr().err.startswith("evaluate: ")
    save(tmp_path / "a.png")
    write(tmp_path / "x.json", coco("a.png"))
    assert main(["evaluate", str(tmp_path), "--no-baselines", "--manifest", str(tmp_path / "nope.json")]) == 1
    assert "nope.json" in capsys.readouterr().err


def test_pictures_without_any_known_class_end_with_status_1(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("tools.evaluate.Detector.open", lambda *_, **__: Blind())
    save(tmp_path / "a.png")
    write(tmp_path / "x.json", coco("a.png", name="dog"))
    assert main(["evaluate", str(tmp_path), "--no-baselines", "--manifest", "m.json"]) == 1
    told = capsys.readouterr()
    assert "read 1 pictures, 0 labels; not understood: dog (1); without picture: 0" in told.out
    assert "nothing can be measured" in told.err


def test_damaged_picture_is_named_and_the_others_are_measured(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("tools.evaluate.Detector.open", lambda *_, **__: Blind())
    for name in ("a.jpg", "b.jpg"):
        save(tmp_path / name, (400, 300))
    (tmp_path / "b.jpg").write_bytes((tmp_path / "b.jpg").read_bytes()[:-400])
    write(tmp_path / "x.json", coco("a.jpg", "b.jpg", size=(400, 300), name="face"))
    words = ["evaluate", str(tmp_path), "--no-baselines", "--manifest", "m.json", "--json", str(tmp_path / "out.json")]
    assert main(words) == 0
    assert "b.jpg" in capsys.readouterr().err
    content = json.loads((tmp_path / "out.json").read_text())
    assert content["detectors"]["m"]["pictures"] == 1
    assert content["read"]["labels"] == 2
