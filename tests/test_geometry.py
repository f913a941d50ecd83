import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.redaction.geometry import (
    areas,
    boxes_from_centres,
    boxes_from_distances,
    cell_count,
    cell_grid,
    far_windows,
    fixed_letterbox,
    intersections,
    letterbox,
    overlaps,
    suppress,
)

SIDES = st.integers(1, 5000)
COORDINATES = st.floats(-500, 500, width=32)
BOXES = st.lists(
    st.tuples(COORDINATES, COORDINATES, st.floats(0, 300, width=32), st.floats(0, 300, width=32)), max_size=12
)


def rows(items):
    return np.array([(x, y, x + w, y + h) for x, y, w, h in items], np.float32).reshape(-1, 4)


@given(width=SIDES, height=SIDES, upscale=st.floats(0.5, 3))
def test_letterbox_holds_the_scaled_picture_in_whole_multiples_and_no_more(width, height, upscale):
    frame = letterbox(width, height, long_side=1280, upscale=upscale)
    assert frame.width % 32 == 0
    assert frame.height % 32 == 0
    assert frame.content_width <= frame.width < frame.content_width + 32
    assert frame.content_height <= frame.height < frame.content_height + 32
    assert max(frame.content_width, frame.content_height) <= 1280


def test_full_hd_picture_is_seen_at_1280_by_736_and_a_small_one_at_its_own_size():
    large = letterbox(1920, 1080, long_side=1280)
    small = letterbox(300, 200, long_side=1280)
    assert (large.width, large.height, large.content_height) == (1280, 736, 720)
    assert (small.width, small.height, small.content_width, small.content_height) == (320, 224, 300, 200)


def test_upscale_enlarges_small_pictures_but_never_beyond_the_long_side():
    assert letterbox(400, 300, long_side=1280, upscale=2.0).content_width == 800
    assert letterbox(1000, 300, long_side=1280, upscale=2.0).content_width == 1280


def test_picture_without_area_has_no_letterbox():
    with pytest.raises(ValueError, match="0x5"):
        letterbox(0, 5, long_side=1280)
    with pytest.raises(ValueError, match="5x0"):
        fixed_letterbox(5, 0, input_width=64, input_height=64)


@given(width=SIDES, height=SIDES)
def test_fixed_letterbox_fills_one_side_and_never_exceeds_the_other(width, height):
    frame = fixed_letterbox(width, height, input_width=640, input_height=480)
    assert (frame.width, frame.height) == (640, 480)
    assert frame.content_width <= 640
    assert frame.content_height <= 480
    assert frame.content_width == 640 or frame.content_height == 480


@given(width=st.integers(8, 3000), height=st.integers(8, 3000))
def test_boxes_come_back_from_the_input_to_where_they_were_in_the_picture(width, height):
    frame = letterbox(width, height, long_side=640)
    box = np.array([[0.1 * width, 0.2 * height, 0.7 * width, height]], np.float32)
    assert np.allclose(frame.to_picture(frame.to_input(box)), box, atol=0.01 * max(width, height))


@given(width=SIDES, height=SIDES, items=BOXES)
def test_boxes_of_the_picture_never_leave_it(width, height, items):
    boxes = letterbox(width, height, long_side=1280).to_picture(rows(items))
    assert (boxes[:, [0, 2]] >= 0).all()
    assert (boxes[:, [0, 2]] <= width).all()
    assert (boxes[:, [1, 3]] >= 0).all()
    assert (boxes[:, [1, 3]] <= height).all()


def test_last_row_and_column_of_the_picture_can_be_reached():
    frame = letterbox(1919, 1079, long_side=1280)
    box = frame.to_picture(np.array([[0, 0, 2000, 2000]], np.float32))[0]
    assert tuple(box) == (0, 0, 1919, 1079)


def test_cells_lie_in_the_middle_of_their_stride_row_by_row():
    centres, strides = cell_grid(64, 32, (16, 32))
    assert len(centres) == cell_count(64, 32, (16, 32)) == 10
    assert centres[0].tolist() == [8, 8]
    assert centres[1].tolist() == [24, 8]
    assert centres[4].tolist() == [8, 24]
    assert centres[8].tolist() == [16, 16]
    assert strides.tolist() == [16] * 8 + [32] * 2


def test_cells_of_a_size_are_made_once_and_nobody_can_change_them():
    first, again = cell_grid(64, 32, (16, 32)), cell_grid(64, 32, (16, 32))
    for one, other in zip(first, again, strict=True):
        assert one is other
        with pytest.raises(ValueError, match="read-only"):
            one[0] = 1


def test_distances_are_counted_in_strides_from_the_cell():
    logarithms = np.log(np.array([[1, 2, 3, 4]], np.float32))
    box = boxes_from_distances(logarithms, np.array([[100, 100]], np.float32), np.array([8], np.float32))[0]
    assert np.allclose(box, [92, 84, 124, 132])


def test_a_runaway_distance_stays_finite():
    logarithms = np.full((1, 4), 1e30, np.float32)
    box = boxes_from_distances(logarithms, np.zeros((1, 2), np.float32), np.array([32], np.float32))
    assert np.isfinite(box).all()


def test_centre_and_size_become_corners():
    assert boxes_from_centres(np.array([[10, 20, 4, 6]], np.float32)).tolist() == [[8, 17, 12, 23]]


@given(first=BOXES, second=BOXES)
def test_overlap_is_symmetric_and_between_nothing_and_all(first, second):
    one, two = rows(first), rows(second)
    table = overlaps(one, two)
    assert table.shape == (len(one), len(two))
    assert (table >= 0).all()
    assert (table <= 1 + 1e-4).all()
    assert np.allclose(table, overlaps(two, one).T, atol=1e-5)


def test_touching_boxes_share_nothing_because_boxes_are_half_open():
    left, right = rows([(0, 0, 10, 10)]), rows([(10, 0, 10, 10)])
    assert intersections(left, right)[0, 0] == 0


def test_a_turned_box_has_no_area():
    assert areas(np.array([[10, 10, 5, 20]], np.float32))[0] == 0


@given(items=BOXES, limit=st.floats(0.1, 0.9))
def test_boxes_that_remain_do_not_overlap_beyond_the_limit_and_the_fallen_do(items, limit):
    boxes = rows(items)
    scores = np.linspace(0.9, 0.1, len(boxes)).astype(np.float32)
    kept = suppress(boxes, scores, limit)
    table = overlaps(boxes[kept], boxes[kept]) - 2 * np.eye(len(kept))
    assert (table <= limit + 1e-6).all()
    for index in set(range(len(boxes))) - set(kept.tolist()):
        better = [other for other in kept if scores[other] >= scores[index]]
        assert (overlaps(boxes[[index]], boxes[better]) > limit).any()


@given(items=BOXES, limit=st.floats(0.1, 0.9), block=st.integers(1, 13))
def test_boxes_that_remain_are_the_same_however_many_are_compared_at_once(items, limit, block):
    boxes = rows(items)
    scores = np.linspace(0.1, 0.9, len(boxes)).astype(np.float32)
    assert suppress(boxes, scores, limit, block).tolist() == suppress(boxes, scores, limit, 1).tolist()


def test_best_box_comes_first_and_equal_ones_keep_their_order():
    boxes = rows([(0, 0, 10, 10), (100, 0, 10, 10), (200, 0, 10, 10)])
    assert suppress(boxes, np.array([0.5, 0.9, 0.5], np.float32), 0.5).tolist() == [1, 0, 2]


def test_nothing_remains_of_nothing():
    assert suppress(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), 0.5).tolist() == []
    assert math.prod(overlaps(np.zeros((0, 4), np.float32), rows([(0, 0, 1, 1)])).shape) == 0


@given(width=st.integers(1, 6000), height=st.integers(1, 4000))
def test_far_windows_cover_the_band_in_windows_no_wider_than_the_input(width, height):
    windows = far_windows(width, height, 1280)
    if max(width, height) <= 1280:
        assert windows == []
        return
    assert windows[0].x1 == 0
    assert windows[-1].x2 == width
    assert all(0 <= item.y1 < item.y2 <= height for item in windows)
    assert all(item.x2 - item.x1 <= 1280 for item in windows)
    assert all(left.x2 - right.x1 >= 100 for left, right in pairwise(windows))


def test_full_hd_picture_has_two_far_windows():
    assert [(item.x1, item.x2, item.y1, item.y2) for item in far_windows(1920, 1080, 1280)] == [
        (0, 1024, 324, 864),
        (896, 1920, 324, 864),
    ]
