import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from agent.messages import Box
from tools.__main__ import main
from tools.evaluate import chosen, names_of, record
from tools.evaluation.baselines import FILES, baselines
from tools.evaluation.card import CLOSING, OPENING
from tools.evaluation.contest import Contestant, chosen_thresholds, facts_of, outcome
from tools.evaluation.judgement import NEVER, Found, judge, masked_outside
from tools.evaluation.latency import medians, timed
from tools.evaluation.raw import LabelsError
from tools.evaluation.readers import read_folder
from tools.evaluation.report import class_table, contest_table, loss_table, misses, percent, printed, size_table
from tools.evaluation.summary import (
    Rate,
    annex_b,
    average_precision,
    class_facts,
    detection_rate,
    false_rate,
    joined,
    recall,
    threshold_for,
)
from tools.evaluation.truths import Labelled, Truth, from_entry, rows
from tools.training.dataset import Entry


def found(*items):
    listed = sorted(items, key=lambda item: -item[4])
    return Found(boxes=rows([item[:4] for item in listed]), scores=np.array([item[4] for item in listed], np.float64))


def truth(*objects, ignored=()):
    return Truth(objects=rows(objects), ignored=rows(ignored))


def test_object_is_covered_from_the_score_at_which_half_of_it_is_masked():
    judged = judge("plate", found((0, 0, 30, 50, 0.9), (25, 0, 60, 50, 0.4)), truth((0, 0, 100, 50)))
    assert judged.covered.tolist() == [0.4]
    assert detection_rate(judged, 0.4).hits == 1
    assert detection_rate(judged, 0.41).hits == 0


def test_object_of_which_less_than_half_is_masked_is_never_covered():
    assert judge("face", found((0, 0, 49, 100, 0.9)), truth((0, 0, 100, 100))).covered.tolist() == [NEVER]


def test_masked_share_of_an_object_is_counted_exactly():
    judged = judge("person", found((0, 0, 50.34, 60, 0.9)), truth((0, 0, 100, 60)))
    assert judged.covered.tolist() == [0.9]
    assert judge("person", found((0, 0, 49.96, 60, 0.9)), truth((0, 0, 100, 60))).covered.tolist() == [NEVER]
    half = judge("person", found((76.2, 44.5, 77.3, 81.6, 0.9)), truth((76.2, 44.5, 78.4, 81.6)))
    assert half.covered.tolist() == [0.9]


def test_two_masks_on_the_same_half_do_not_add_up():
    judged = judge("face", found((0, 0, 40, 100, 0.9), (0, 0, 40, 100, 0.8)), truth((0, 0, 100, 100)))
    assert judged.covered.tolist() == [NEVER]


def test_second_box_on_a_matched_object_matches_nothing_but_is_not_false():
    judged = judge("face", found((0, 0, 10, 10, 0.9), (0, 0, 10, 11, 0.8)), truth((0, 0, 10, 10)))
    assert judged.right.tolist() == [True, False]
    assert judged.false.tolist() == [False, False]


def test_box_is_false_only_when_it_intersects_no_object():
    judged = judge("plate", found((9, 9, 30, 30, 0.9), (10, 0, 20, 10, 0.8)), truth((0, 0, 10, 10)))
    assert judged.false.tolist() == [False, True]


def test_box_on_an_ignored_place_is_neither_right_nor_wrong():
    judged = judge("person", found((50, 50, 60, 60, 0.9)), truth((0, 0, 10, 10), ignored=[(40, 40, 80, 80)]))
    assert judged.false.tolist() == [False]
    assert judged.neutral.tolist() == [True]


def test_person_s_size_is_the_height_and_a_plate_s_the_smaller_side():
    box = (0, 0, 20, 60)
    assert judge("person", found(), truth(box)).sizes.tolist() == [60]
    assert judge("plate", found(), truth(box)).sizes.tolist() == [20]


def test_false_rate_counts_all_boxes_and_recall_only_objects_of_the_size():
    judged = judge(
        "plate",
        found((0, 0, 40, 20, 0.9), (100, 0, 140, 20, 0.7), (200, 0, 210, 8, 0.5)),
        truth((0, 0, 40, 20), (200, 0, 210, 8)),
    )
    assert (false_rate(judged, 0.6).hits, false_rate(judged, 0.6).total) == (1, 2)
    assert (recall(judged, 0.6, 16).hits, recall(judged, 0.6, 16).total) == (1, 1)
    assert (recall(judged, 0.6).hits, recall(judged, 0.6).total) == (1, 2)


def test_labels_that_are_not_complete_make_no_box_false_but_still_count_their_objects():
    item = Truth(objects=rows([(0, 0, 10, 10)]), ignored=rows([]), complete=False)
    judged = judge("plate", found((50, 50, 60, 60, 0.9), (0, 0, 10, 10, 0.8)), item)
    assert (false_rate(judged, 0.1).hits, false_rate(judged, 0.1).total) == (0, 1)
    assert average_precision(judged) == 1


@given(total=st.integers(1, 5000), data=st.data())
def test_wilson_bound_lies_below_the_rate_and_above_nothing(total, data):
    rate = Rate(hits=data.draw(st.integers(0, total)), total=total)
    assert -1e-12 <= rate.lower() <= rate.value() + 1e-12


def test_wilson_bound_is_the_published_one():
    assert Rate(hits=90, total=100).lower() == pytest.approx(0.8256, abs=1e-4)
    assert Rate(hits=200, total=200).lower() == pytest.approx(0.9812, abs=1e-4)


def test_rate_of_nothing_is_not_a_number():
    assert math.isnan(Rate(hits=0, total=0).value())
    assert Rate(hits=0, total=0).facts()["rate"] is None


def test_average_precision_is_one_when_all_is_found_first_and_falls_with_a_false_box_in_front():
    item = truth((0, 0, 10, 10), (20, 0, 30, 10))
    perfect = judge("face", found((0, 0, 10, 10, 0.9), (20, 0, 30, 10, 0.8), (50, 50, 60, 60, 0.1)), item)
    late = judge("face", found((50, 50, 60, 60, 0.95), (0, 0, 10, 10, 0.9), (20, 0, 30, 10, 0.8)), item)
    assert average_precision(perfect) == pytest.approx(1)
    assert average_precision(late) == pytest.approx(2 / 3)


def test_threshold_is_the_lowest_at_which_a_tenth_of_the_boxes_is_false():
    right = [(20 * index, 0, 20 * index + 10, 10, 0.9 - index / 1000) for index in range(40)]
    wrong = [(20 * index, 500, 20 * index + 10, 510, 0.5 - index / 1000) for index in range(40)]
    judged = judge("face", found(*right, *wrong), truth(*(item[:4] for item in right)))
    threshold = threshold_for(judged)
    assert false_rate(judged, threshold).value() <= 0.1
    assert false_rate(judged, threshold).total == 44
    assert false_rate(judged, 0.495).value() > 0.1


def test_chosen_threshold_has_four_digits_and_keeps_the_box_out_that_was_too_much():
    right = [(20 * index, 0, 20 * index + 10, 10, 0.9) for index in range(18)]
    wrong = [(20 * index, 500, 20 * index + 10, 510, 0.5 - 0.00004 * index) for index in range(4)]
    judged = judge("face", found(*right, *wrong), truth(*(item[:4] for item in right)))
    assert threshold_for(judged) == 0.5
    written = json.loads(json.dumps(class_facts(judged, "face", threshold_for(judged))))["threshold"]
    assert written == threshold_for(judged)
    assert false_rate(judged, written).value() <= 0.1
    assert false_rate(judged, 0.4999).value() > 0.1


@given(scores=st.lists(st.floats(0.03, 1), min_size=30, max_size=60), data=st.data())
def test_no_more_than_a_tenth_is_false_at_the_chosen_threshold(scores, data):
    boxes = [(20 * index, 0, 20 * index + 10, 10, score) for index, score in enumerate(scores)]
    objects = [box[:4] for box in boxes if data.draw(st.booleans())]
    judged = judge("face", found(*boxes), truth(*objects))
    rate = false_rate(judged, threshold_for(judged))
    assert rate.total < 20 or rate.value() <= 0.1


def test_masked_area_outside_counts_pixels_once_and_not_those_on_objects():
    share = masked_outside(rows([(0, 0, 10, 10), (5, 0, 15, 10)]), rows([(0, 0, 5, 10)]), 100, 10)
    assert share == pytest.approx(0.1)


def test_box_over_the_edge_of_the_picture_counts_as_far_as_it_is_inside():
    assert masked_outside(rows([(-5, -5, 5, 5)]), rows([]), 100, 10) == pytest.approx(0.025)
    assert masked_outside(rows([(0, 0, 5, 5)]), rows([(-5, -5, 5, 5)]), 100, 10) == 0


def test_annex_b_is_met_only_at_ninety_per_cent_found_and_says_when_counts_are_too_small():
    items = [(20 * index, 0, 20 * index + 16, 16, 0.9) for index in range(10)]
    nine = judge("plate", found(*items[:9]), truth(*(item[:4] for item in items)))
    eight = judge("plate", found(*items[:8]), truth(*(item[:4] for item in items)))
    thresholds = {"plate": 0.5, "face": 0.5}
    assert annex_b({"plate": nine}, thresholds, {"plate": 600})["plate"]["shall"] is True
    assert annex_b({"plate": eight}, thresholds, {"plate": 600})["plate"]["shall"] is False
    assert annex_b({"plate": nine}, thresholds, {"plate": 600})["plate"]["enough"] is False
    many = joined([nine] * 20)
    assert annex_b({"plate": many}, thresholds, {"plate": 600})["plate"]["enough"] is True
    assert annex_b({"plate": many}, thresholds, {"plate": 499})["plate"]["enough"] is False


def entry(source, boxes=(), taught=()):
    return Entry(file="a.jpg", source=source, width=100, height=100, boxes=tuple(boxes), taught=tuple(taught))


def test_class_that_a_source_does_not_label_is_not_measured(tmp_path):
    item = from_entry(entry("openimages_lp", [("plate", (1, 1, 9, 9))], [("person", (0, 0, 50, 50), 0.9)]), tmp_path)
    assert set(item.truths) == {"plate"}


def test_teacher_s_boxes_are_ignored_places_and_never_truth(tmp_path):
    taught = [("person", (60, 0, 90, 50), 0.9), ("person", (0, 60, 20, 90), 0.1)]
    item = from_entry(entry("tud_street", [("person", (1, 1, 40, 90))], taught), tmp_path)
    assert item.truths["person"].objects.tolist() == [[1, 1, 40, 90]]
    assert item.truths["person"].ignored.tolist() == [[60, 0, 90, 50]]


def save_picture(path, size=(100, 80)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size).save(path)


def test_coco_labels_are_read_with_crowds_ignored_and_unknown_classes_left_out(tmp_path):
    save_picture(tmp_path / "images" / "one.png")
    content = {
        "images": [{"id": 7, "file_name": "one.png", "width": 100, "height": 80}],
        "categories": [{"id": 1, "name": "Pedestrian"}, {"id": 2, "name": "dog"}],
        "annotations": [
            {"image_id": 7, "category_id": 1, "bbox": [10, 20, 30, 40]},
            {"image_id": 7, "category_id": 1, "bbox": [50, 20, 30, 40], "iscrowd": 1},
            {"image_id": 7, "category_id": 2, "bbox": [0, 0, 5, 5]},
        ],
    }
    (tmp_path / "instances.json").write_text(json.dumps(content))
    (item,) = read_folder(tmp_path).pictures
    assert set(item.truths) == {"person"}
    assert item.truths["person"].objects.tolist() == [[10, 20, 40, 60]]
    assert item.truths["person"].ignored.tolist() == [[50, 20, 80, 60]]
    assert item.pixels().shape == (80, 100, 3)


def test_voc_labels_are_read_with_difficult_ones_ignored(tmp_path):
    save_picture(tmp_path / "JPEGImages" / "one.jpg")
    box = "<bndbox><xmin>1</xmin><ymin>2</ymin><xmax>30</xmax><ymax>40</ymax></bndbox>"
    objects = (
        f"<object><name>licence</name>{box}</object><object><name>plate</name><difficult>1</difficult>{box}</object>"
    )
    size = "<size><width>100</width><height>80</height></size>"
    (tmp_path / "Annotations").mkdir()
    (tmp_path / "Annotations" / "one.xml").write_text(f"<annotation>{size}{objects}</annotation>")
    (item,) = read_folder(tmp_path).pictures
    assert item.truths["plate"].objects.tolist() == [[1, 2, 30, 40]]
    assert item.truths["plate"].ignored.tolist() == [[1, 2, 30, 40]]


def test_yolo_labels_are_read_and_a_picture_without_objects_counts_as_empty(tmp_path):
    save_picture(tmp_path / "images" / "one.jpg")
    save_picture(tmp_path / "images" / "two.jpg")
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "one.txt").write_text("1 0.5 0.5 0.2 0.25\n")
    (tmp_path / "labels" / "two.txt").write_text("")
    one, two = read_folder(tmp_path, ["car", "face"]).pictures
    assert np.allclose(one.truths["face"].objects, [[40, 30, 60, 50]])
    assert two.truths["face"].objects.shape == (0, 4)


@pytest.mark.parametrize(
    ("name", "text"),
    [("one.txt", "0 0.5 0.5"), ("one.txt", "4 0.5 0.5 0.1 0.1"), ("one.xml", "<annotation>"), ("one.json", "{")],
)
def test_labels_that_cannot_be_read_are_named(tmp_path, name, text):
    save_picture(tmp_path / "one.jpg")
    (tmp_path / name).write_text(text)
    (tmp_path / "classes.txt").write_text("face\n")
    with pytest.raises(LabelsError, match=tmp_path.name):
        read_folder(tmp_path)


def test_folder_without_labels_is_a_mistake_that_says_so(tmp_path):
    save_picture(tmp_path / "one.jpg")
    with pytest.raises(LabelsError, match="no COCO"):
        read_folder(tmp_path, ["face"])


def test_coco_name_that_leaves_the_folder_is_not_followed(tmp_path):
    save_picture(tmp_path / "secret.png")
    save_picture(tmp_path / "set" / "one.png")
    image = {"id": 1, "file_name": "../secret.png", "width": 1, "height": 1}
    content = {"images": [image], "categories": [], "annotations": []}
    (tmp_path / "set" / "coco.json").write_text(json.dumps(content))
    with pytest.raises(LabelsError, match="secret"):
        read_folder(tmp_path / "set")


def test_limit_takes_so_many_pictures_of_each_source(tmp_path):
    for name in ("one", "two", "three"):
        save_picture(tmp_path / f"{name}.jpg")
        (tmp_path / f"{name}.txt").write_text("0 0.5 0.5 0.2 0.2")
    assert len(chosen(tmp_path, held_out=False, names=["face"], limit=2).pictures) == 2


def scene(tmp_path):
    path = tmp_path / "scene.png"
    save_picture(path, (200, 100))
    objects = truth((10, 10, 60, 60), (100, 10, 150, 60))
    return Labelled(path=path, source="street", width=200, height=100, truths={"face": objects})


def face(x, score, *, y=10):
    return Box(label="face", score=score, x1=x, y1=y, x2=x + 50, y2=y + 50)


def test_facts_hold_detection_false_boxes_and_area_per_class_and_source(tmp_path):
    contestant = Contestant(
        name="half",
        labels=("face",),
        detect=lambda _: [face(10, 0.9), face(10, 0.6, y=62)],
        thresholds={"face": 0.5},
    )
    facts = facts_of(contestant, [outcome(contestant, scene(tmp_path))])
    own = facts["classes"]["face"]
    assert own["detection"]["rate"] == 0.5
    assert own["false"]["rate"] == 0.5
    assert own["over_redacted"]["median"] == pytest.approx(50 * 38 / 20000, abs=1e-3)
    assert own["sources"]["street"]["recall"] == own["recall"]
    assert own["sizes"]["32-63"]["recall"]["total"] == 2


def test_tables_print_every_class_source_and_detector(tmp_path):
    contestant = Contestant(name="ours", labels=("face",), detect=lambda _: [face(10, 0.9)], thresholds={"face": 0.5})
    item = outcome(contestant, scene(tmp_path))
    facts = facts_of(contestant, [item])
    rows_ = [{"class": "face", "detector": "ours", **class_facts(item.judgements["face"], "face", 0.5)}]
    text = printed([class_table(facts), size_table(facts), contest_table(rows_)])
    for word in ("face", "street", "ours", "32-63", "50.0"):
        assert word in text


def test_loss_against_the_other_detector_is_printed_in_points(tmp_path):
    both = [
        Contestant(name=name, labels=("face",), detect=lambda _, boxes=boxes: boxes, thresholds={"face": 0.5})
        for name, boxes in (("int8", [face(10, 0.9)]), ("float", [face(10, 0.9), face(100, 0.9)]))
    ]
    one, two = (facts_of(item, [outcome(item, scene(tmp_path))]) for item in both)
    assert "50.00" in printed([loss_table(one, two)])


def test_chosen_thresholds_and_their_curve_are_written_into_the_manifest(tmp_path):
    contestant = Contestant(name="ours", labels=("face",), detect=lambda _: [face(10, 0.9)], thresholds={"face": 0.4})
    facts = facts_of(contestant, [outcome(contestant, scene(tmp_path))])
    (tmp_path / "m.json").write_text('{"thresholds": {"face": 0.1}, "model": "m.onnx"}')
    record(tmp_path / "m.json", facts)
    content = json.loads((tmp_path / "m.json").read_text())
    assert content["thresholds"] == {"face": 0.4}
    assert content["model"] == "m.onnx"
    assert len(content["measured"]["face"]["curve"]) == 19


def test_class_of_which_no_object_was_counted_keeps_its_threshold_in_the_manifest(tmp_path):
    contestant = Contestant(
        name="ours", labels=("face", "plate"), detect=lambda _: [face(10, 0.9)], thresholds={"face": 0.4, "plate": 0.3}
    )
    known = scene(tmp_path)
    outcomes = [outcome(contestant, replace(known, truths={**known.truths, "plate": truth()}))]
    assert chosen_thresholds(contestant, outcomes) == {"face": 0.05}
    (tmp_path / "m.json").write_text('{"thresholds": {"face": 0.1, "plate": 0.2}, "measured": {"plate": 1}}')
    record(tmp_path / "m.json", facts_of(contestant, outcomes))
    content = json.loads((tmp_path / "m.json").read_text())
    assert content["thresholds"] == {"face": 0.4, "plate": 0.2}
    assert content["measured"]["plate"] == 1
    assert content["measured"]["face"]["detection"]["total"] == 2


def test_counts_of_b4_are_those_of_pictures_that_label_the_class(tmp_path):
    contestant = Contestant(
        name="ours", labels=("face", "plate"), detect=lambda _: [], thresholds={"face": 0.4, "plate": 0.3}
    )
    known = scene(tmp_path)
    pictures = [known, known, replace(known, truths={"plate": truth()})]
    verdict = facts_of(contestant, [outcome(contestant, item) for item in pictures])["annex_b"]
    assert verdict["face"]["pictures"] == 2
    assert verdict["plate"]["pictures"] == 1


def test_dash_stands_where_nothing_was_counted():
    assert percent(Rate(hits=0, total=0).facts()) == "-"


def test_contact_sheet_shows_only_pictures_with_a_miss(tmp_path):
    blind = Contestant(name="blind", labels=("face",), detect=lambda _: [])
    seeing = Contestant(name="seeing", labels=("face",), detect=lambda _: [face(10, 0.9), face(100, 0.9)])
    picture = scene(tmp_path)
    assert np.asarray(misses([outcome(blind, picture)], {"face": 0.5})).max() > 0
    assert np.asarray(misses([outcome(seeing, picture)], {"face": 0.5})).max() == 0


def test_manifests_of_the_same_name_are_told_apart_by_their_folders():
    paths = [Path("old/detector.json"), Path("new/detector.json"), Path("new/other.json")]
    assert names_of(paths) == ["old/detector", "new/detector", "other"]


def test_one_command_measures_chooses_and_writes(tmp_path, monkeypatch, capsys):
    class Fake:
        manifest = SimpleNamespace(thresholds={"face": 0.5}, input=SimpleNamespace(upscale=1.0, long_side=1280))

        def detect(self, _picture, _colour, _thresholds):
            return [Box(label="face", score=0.9, x1=30, y1=20, x2=70, y2=60)]

    monkeypatch.setattr("tools.evaluate.Detector.open", lambda *_, **__: Fake())
    save_picture(tmp_path / "set" / "one.jpg")
    (tmp_path / "set" / "one.txt").write_text("0 0.5 0.5 0.4 0.5")
    (tmp_path / "m.json").write_text("{}")
    words = ["evaluate", str(tmp_path / "set"), "--manifest", str(tmp_path / "m.json"), "--classes", "face"]
    (tmp_path / "card.md").write_text(f"Before.\n\n{OPENING}\nYESTERDAY\n{CLOSING}\n\nAfter.\n")
    files = ["--json", str(tmp_path / "out.json"), "--misses", str(tmp_path / "misses.png")]
    files += ["--card", str(tmp_path / "card.md")]
    assert main([*words, "--no-baselines", "--choose", *files]) == 0
    assert "Annex B, m, face: met; too few" in capsys.readouterr().out
    assert json.loads((tmp_path / "out.json").read_text())["detectors"]["m"]["classes"]["face"]["recall"]["rate"] == 1
    assert json.loads((tmp_path / "m.json").read_text())["thresholds"] == {"face": 0.05}
    assert (tmp_path / "misses.png").is_file()
    card = (tmp_path / "card.md").read_text()
    assert card.startswith("Before.")
    assert card.endswith("After.\n")
    assert "YESTERDAY" not in card
    assert "100.0 (>= 20.6)" in card


def test_baseline_that_is_not_there_is_named_and_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr("tools.evaluation.baselines.sysconfig.get_paths", lambda: {"purelib": str(tmp_path)})
    remarks = list(baselines([tmp_path], 1.0, 1280))
    assert len(remarks) == 4
    assert all("was not found" in remark for remark in remarks)


def test_timing_alternates_and_gives_medians_of_each():
    order = []
    times = timed({"one": lambda: order.append(1), "two": lambda: order.append(2)}, rounds=3)
    assert order == [1, 2] * 4
    assert {name: len(values) for name, values in times.items()} == {"one": 3, "two": 3}
    assert medians({"one": [3.0, 1.0, 2.004]}) == {"one": 2.0}


def test_baseline_that_the_installed_opencv_cannot_read_is_left_out_with_the_reason(tmp_path, monkeypatch):
    monkeypatch.setattr("tools.evaluation.baselines.sysconfig.get_paths", lambda: {"purelib": str(tmp_path)})
    path = tmp_path / FILES["hyperlpr"]
    path.parent.mkdir(parents=True)
    path.touch()
    monkeypatch.setitem(sys.modules, "cv2", SimpleNamespace(__version__="5.0.0", dnn=SimpleNamespace()))
    remarks = [item for item in baselines([tmp_path], 1.0, 1280) if isinstance(item, str)]
    assert "hyperlpr: not run: OpenCV 5.0.0 reads no Caffe files, 4 does" in remarks
